"""How flags and a checkpoint become the arguments of samplers.generate."""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from data import DATASETS
from data_sources.cache import Pictures, about, cached, find_cached, pictures_of
from diffusion import DiffusionProcess
from runtime.errors import UserError, checking_user_input
from samplers import (
    DEFAULT_GUIDANCE,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    SAMPLERS,
    STUDENT_SAMPLER,
    STUDENT_STEPS,
    heun,
    sampler_timesteps,
    uniform_timesteps,
)
from utils import time_texts

NO_FLAGS = Namespace()


def sampling_options(config: dict, args: Namespace = NO_FLAGS, count: int = 0, *, labels: Tensor | None = None,
                     label_all: bool = True) -> dict:
    """The keyword arguments of samplers.generate: what the flags ask for, else what measured best for the checkpoint.

    config      that of the checkpoint
    args        parsed flags; a flag that the script does not have counts as not given
    count       how many images are made
    labels      (count,) where the caller has chosen them; else those of --label
    label_all   without --label: all classes in turn (True), or no labels (False)

    UserError for a flag that this checkpoint cannot follow or that would change nothing.
    """
    student, given = is_student(config), vars(args)
    sampler = given.get("sampler") or (STUDENT_SAMPLER if student else DEFAULT_SAMPLER)
    num_timesteps = config["diffusion"]["num_timesteps"]
    steps = given.get("steps") or min(STUDENT_STEPS if student else DEFAULT_STEPS, num_timesteps)
    with checking_user_input():
        uniform_timesteps(num_timesteps, steps)
    if labels is None:
        labels = labels_of_images(config, given.get("label"), count, label_all)
    scale, interval, eta = (given.get(name) for name in ("guidance_scale", "guidance_interval", "eta"))
    if labels is None and scale not in (None, 1):
        raise UserError("--guidance_scale needs --label, the class to ask for" if config["model"].get("num_classes")
                        else f"{NO_LABELS}: leave --guidance_scale out, or {TRAIN_LABELS}")
    check_guidance(config, labels is not None, scale)
    if scale is None:
        guided = labels is not None and can_be_guided(config)
        scale = config["data"].get("guidance_scale", DEFAULT_GUIDANCE) if guided else 1.0
    if eta is not None and not SAMPLERS[sampler].reads_eta:
        readers = " and ".join(name for name, row in SAMPLERS.items() if row.reads_eta)
        raise UserError(f"--eta is read by --sampler {readers} only: choose one, or leave it out")
    if interval and scale == 1:
        raise UserError("--guidance_interval needs guidance: a checkpoint trained with --conditional, and another "
                        "--guidance_scale than 1")
    options = dict(seed=given.get("seed") or 0, sampler=sampler, steps=steps, spacing=given.get("spacing"),
                   eta=eta or 0.0, labels=labels, guidance_scale=scale, guidance_interval=interval)
    return options | ({"batch_size": given["batch_size"]} if "batch_size" in given else {})


def check_guidance(config: dict, labelled: bool, scale: float | None) -> None:
    """UserError if a network that only knows images with their labels gets no label, or is to be guided.

    labelled: whether it gets labels; scale: that of --guidance_scale, or None.
    """
    if not config["model"].get("num_classes") or can_be_guided(config):
        return
    if not labelled:
        raise UserError(f"{NEVER_WITHOUT}: choose one with --label")
    if scale not in (None, 1):
        raise UserError("the guidance of a student is that which it learned: leave --guidance_scale out, or make "
                        "another one with python distill.py --guidance_scale" if is_student(config) else
                        f"{NEVER_WITHOUT}, which guidance needs: leave --guidance_scale out, or train one with "
                        f"python train.py --label_dropout 0.1")


def check_interval(options: dict, diffusion: DiffusionProcess) -> None:
    """UserError if --guidance_interval holds no time of the sampler, so that nothing would be guided."""
    interval, sampler = options["guidance_interval"], SAMPLERS[options["sampler"]]
    if not interval:
        return
    times = sampler_timesteps(diffusion, options["sampler"], options["steps"], options["spacing"])
    churned = sampler.function is heun and options["eta"]  # it also evaluates times between these
    if not churned and not any(interval[0] <= t <= interval[1] for t in times):
        raise UserError(f"--guidance_interval {interval[0]:g} {interval[1]:g} holds none of the times of these steps "
                        f"({', '.join(time_texts(times)[:20])}{' ...' if len(times) > 20 else ''}): choose another "
                        f"one, or leave it out")


NO_LABELS = "this checkpoint was trained without labels"
NEVER_WITHOUT = "this checkpoint was never shown an image without its label"
TRAIN_LABELS = "train one with python train.py --conditional"


def labels_of_images(config: dict, text: str | None, count: int, label_all: bool = True) -> Tensor | None:
    """The label of each image (count,): the classes that --label names, equally many of each; else all in turn.

    None for a model without labels, and without --label where label_all is False.
    """
    num_classes = config["model"].get("num_classes")
    if text is None:
        return torch.arange(count) % num_classes if num_classes and label_all else None
    classes = torch.tensor(named_classes(str(text), config["data"]["class_names"] if num_classes else ()))
    if len(classes) > count:
        raise UserError(f"--label names {len(classes)} classes, more than the {count} images to make: name fewer")
    return classes[torch.arange(count) * len(classes) // count]


def named_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """The classes that --label names. UserError that lists the classes there are."""
    if not class_names:
        raise UserError(f"{NO_LABELS}: leave --label and --guidance_scale out, or {TRAIN_LABELS}")
    known = _words_of_classes(class_names)

    def find(name: str) -> int | None:
        return known.get(name.strip(), known.get(name.strip().lower()))
    classes = []
    for part in text.split(","):
        dashes = [i for i, character in enumerate(part) if character == "-"]  # a name may hold some too
        pairs = [(part, part), *((part[:i], part[i + 1:]) for i in dashes)]
        ends = [(find(a), find(b)) for a, b in pairs if None not in (find(a), find(b))]
        if not ends or ends[0][0] > ends[0][1]:
            numbered = all(name.isdigit() for name in class_names)
            listed = ", ".join(name if numbered else f"{i} {name}" for i, name in enumerate(class_names))
            first, last = (class_names[0], class_names[-1]) if numbered else (0, len(class_names) - 1)
            raise UserError(f"unknown label {part!r}: choose from {listed}, or a range such as {first}-{last}")
        classes += range(ends[0][0], ends[0][1] + 1)
    return classes


def _words_of_classes(class_names: Sequence[str]) -> dict[str, int]:
    """Word -> class: the number of a class, unless all names are numbers, its name in small letters, and its exact
    name, which counts most."""
    known = {} if all(name.isdigit() for name in class_names) else {str(i): i for i in range(len(class_names))}
    return known | {name.lower(): i for i, name in enumerate(class_names)} | {
        name: i for i, name in enumerate(class_names)}


def label_words(class_names: Sequence[str]) -> list[str]:
    """For each class a word of a command line that --label takes for it: its number where that works, else its name."""
    known = _words_of_classes(class_names)
    return [str(i) if known.get(str(i)) == i else quote(name) for i, name in enumerate(class_names)]


def can_be_guided(config: dict) -> bool:
    """Whether the network has learned images with and without labels, as guidance needs it to."""
    return bool(config["model"].get("num_classes")) and not is_student(config) and (
        config["training"].get("label_dropout") != 0)


def is_student(config: dict) -> bool:
    """Whether distill.py wrote the checkpoint with this config."""
    return config["training"].get("student") is True


def dataset_of(checkpoint: dict, data_dir: str | Path, asked: str | None = None) -> str | Path:
    """The data set of a checkpoint, as `load_dataset` takes it. UserError if --dataset asks for another.

    Your own pictures come from their cache in data_dir; without it, or if they are asked for, they are read, and must
    be those of the training.
    """
    data = checkpoint["config"]["data"]
    name, trained = data["dataset"], data.get("pictures")
    if asked not in (None, name) and (asked in DATASETS or not trained):
        raise UserError(f"the checkpoint was trained on {name}, not {asked}: leave out --dataset")
    if not trained:
        return name
    if asked is None and (folder := find_cached(trained["key"], trained["digest"], data_dir)):
        return folder
    path = asked or trained.get("path")
    if path is None or not os.path.exists(path):
        where = f"neither at {path} nor" if path else "not"
        raise UserError(f"the checkpoint was trained on {name}, and its pictures are {where} in "
                        f"{Path(data_dir) / 'pictures'}: give the --data_dir of the training, bring them back to where "
                        f"they were, or, in scripts with this flag, give their new place with --dataset PATH")
    folder = cached(Pictures(str(path), data["shape"][1], trained["fit"], trained["channels"], trained["background"]),
                    data_dir, quiet=True)
    if (now := about(folder))["digest"] != trained["digest"]:
        raise UserError(f"the checkpoint was trained on {trained['count']:,} pictures of {name}, and {path} now holds "
                        f"others ({now['count']:,}): give those of the training, or train again")
    return folder


def place_of_pictures(checkpoint: dict) -> str | None:
    """Where the user's own pictures lay that a checkpoint learned from; None for other data sets."""
    return (checkpoint["config"]["data"].get("pictures") or {}).get("path")


def given_pictures(args: Namespace) -> str | None:
    """The user's own pictures that --dataset names; None for a data set that has a name, or where it is not given."""
    return None if args.dataset in DATASETS else args.dataset


def chosen_dataset(args: Namespace, small: bool = True, quiet: bool = False) -> str | Path:
    """The data set of --dataset, as `load_dataset` takes it: its name or, of your own pictures, their cache.

    small: as for `data_sources.cache.cached`. UserError for flags of pictures with a data set that has a name.
    """
    if args.dataset not in DATASETS:
        return cached(pictures_of(args), args.data_dir, small, quiet)
    for name in Pictures._fields[1:]:
        if getattr(args, name, default := Pictures._field_defaults[name]) != default:
            raise UserError(f"--{name} is for your own pictures, --dataset PATH, and {args.dataset} is read as it is: "
                            f"leave it out")
    return args.dataset
