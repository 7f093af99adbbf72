"""A run that is resumed: its flags, the command for it, and whether what is asked for now goes with it."""

import contextlib
import os
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from data import DATASETS
from data_sources.points import POINT_SETS
from runtime import distributed
from runtime.errors import UserError
from runtime.files import quoted
from runtime.parser import PICTURE_FLAGS, SHARED_FLAGS, Parser
from training import run_folder, run_record
from training.flags import FIXED_FLAGS, KEPT

BEFORE_FLAGS = dict(level_code="linear")  # what versions that did not have these flags did
OWN_FLAGS = ("output_dir", "data_dir", "device", "resume", "look", "init")  # not those of the run that is resumed


def without_own_flags(config: dict) -> dict:
    """The config of a checkpoint without what names folders and devices of the machine that trained it.

    Those are OWN_FLAGS and, of a student, the file of its teacher.
    """
    training = {name: value for name, value in config["training"].items() if name not in (*OWN_FLAGS, "checkpoint")}
    if not (pictures := config["data"].get("pictures")):
        return config | dict(training=training)
    training, pictures = training | dict(dataset=config["data"]["dataset"]), dict(pictures)
    pictures.pop("path", None)
    return config | dict(training=training, data=config["data"] | dict(pictures=pictures))


def resume_command(args: Namespace) -> str:
    """The command that resumes the run in args.output_dir, with the OWN_FLAGS that differ from the defaults.

    Of a run on several machines, that of each of them, which has to be told one HOST and PORT.
    """
    start = run_record.launcher(distributed.world_size())
    if "--nnodes" in start:
        start += " --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT"
    own = [f"--{name} {quoted(getattr(args, name))}" for name in OWN_FLAGS[:3]
           if name == "output_dir" or getattr(args, name) != SHARED_FLAGS[name]["default"]]
    return " ".join([start, "train.py --resume", *own])


def flags_of_begun_run(parser: Parser, args: Namespace) -> dict:
    """The flags that the run in args.output_dir was started with, if it was stopped before its first checkpoint.

    They become defaults of the new run that --resume begins then; OWN_FLAGS are left out, except for --init. UserError
    if its pictures are gone, and the user does not say where they are now.
    """
    found, folder = {}, Path(args.output_dir)
    given = args.dataset if "dataset" in parser.typed else None
    sittings = distributed.from_rank_0(lambda: run_record.sittings(folder, "train.py"))
    typed = [_dataset_of_words(run_record.script_and_words(str(sitting["command"]))[1]) for sitting in sittings]
    place = given or next((dataset for dataset, _ in reversed(typed) if dataset), None)
    if place and not given and place not in {*DATASETS, *POINT_SETS} and not os.path.exists(place):
        raise UserError(gone_message(f"the run in {folder}", place))
    for _, words in typed:
        with contextlib.suppress(UserError):  # flags that no run can have had
            before = parser.parse_args([*words, *(["--dataset", place] if place else [])])
            if {"epochs", "budget"} & parser.typed:
                found = {name: value for name, value in found.items() if name not in ("epochs", "budget")}
            found |= {name: getattr(before, name) for name in parser.typed - ({*OWN_FLAGS} - {"init"})}
    if found.get("init"):
        found["init"] = distributed.from_rank_0(lambda: run_folder.place_of(folder, found["init"]))
    if args.epochs or args.budget:
        found = {name: value for name, value in found.items() if name not in ("epochs", "budget")}
    return found


def _dataset_of_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --dataset in the words of a command line, or None, and the other words."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--dataset")
    try:
        found, others = finder.parse_known_args(words)
    except ArgumentError:  # no value stands behind it
        return None, list(words)
    return found.dataset, others


def gone_message(which: str, place: str) -> str:
    """What to do if the pictures that a run learned from are not where they were."""
    return (f"{which} learned from the pictures in {place}, which is not there: bring them back, or give their new "
            f"place with --dataset PATH")


def more_epochs(epochs: int) -> int:
    """A larger number of epochs to suggest for a run that has had `epochs`."""
    return max(20, 2 * epochs)


def saved_flags(parser: Parser, args: Namespace, path: Path, checkpoint: dict) -> list[str]:
    """The flags of a checkpoint's run as words of a command line, without OWN_FLAGS.

    --epochs and --budget are left out where `args` gives one of them anew, --dataset where the user says where his own
    pictures are now. UserError if they are not valid flags, or if the pictures are gone.
    """
    words, left_out = [], {*OWN_FLAGS, *(("epochs", "budget") if args.epochs or args.budget else ())}
    training = BEFORE_FLAGS | checkpoint["config"]["training"]
    if "pictures" in checkpoint["config"]["data"]:
        if "dataset" in parser.typed:  # their new place
            left_out.add("dataset")
        elif not os.path.exists(place := str(training.get("dataset"))):
            raise UserError(gone_message(str(path), place))
    saved = {name: training.get(name) for name in vars(args) if name not in left_out}
    try:
        for name, value in saved.items():
            words += _flag_words(name, value)
        parser.parse_args(words)
    except UserError as error:
        raise UserError(f"{path} holds flags that no run can have had: {error}") from error
    return words


def _flag_words(name: str, value) -> list[str]:
    """A flag with its saved value as words of a command line."""
    if value is None:
        return []
    if type(value) is bool:
        return [f"--{name}" if value else f"--no-{name}"]
    if type(value) is list and all(type(part) is int for part in value):
        return [f"--{name}", *map(str, value or [0])]  # --attention 0 means none
    if type(value) in (int, float, str):
        return [f"--{name}={value}"]
    raise UserError(f"--{name} is of type {type(value).__name__}")


def check_resumable(checkpoint: dict, config: dict, command: str) -> None:
    """UserError if a checkpoint has another network, process, data set or FIXED_FLAGS than the flags ask for.

    config: that of the run, its part "training" included; command: what resumes the run as it was.
    """
    left_out = {"pictures"}
    if "pictures" in config["data"] and "pictures" in checkpoint["config"]["data"]:
        _check_pictures(checkpoint["config"]["data"], config["data"])
        left_out.add("dataset")  # the name of their folder, which may have another one now
    asked = config | dict(training={name: config["training"][name] for name in FIXED_FLAGS},
                          data={name: value for name, value in config["data"].items() if name not in left_out})
    for part, values in asked.items():
        for name, value in sorted(values.items(), key=lambda item: item[0] in ("channel_mults", "attention")):
            # A feature that the file does not know was off.
            before = checkpoint["config"][part].get(name, (KEPT | BEFORE_FLAGS).get(name, False))
            if before != value:
                raise UserError(f"the checkpoint was trained with {name} {before}, the flags ask for {value}: resume "
                                f"it as it was with {command}, or start a new run without --resume")


def _check_pictures(before: dict, now: dict) -> None:
    """UserError if a run learned from other pictures of one's own, or read them in another way, than is asked for now.

    before, now: the part "data" of two configs.
    """
    read, asked = ({name: data["pictures"][name] for name in PICTURE_FLAGS if name != "image_size"}
                   | dict(image_size=data["shape"][1]) for data in (before, now))
    for name, value in read.items():
        if asked[name] != value:
            raise UserError(f"the run read its pictures with --{name} {value}, not {asked[name]}: leave it out, or "
                            f"start a new run without --resume")
    before, now = before["pictures"], now["pictures"]
    if before["digest"] != now["digest"]:
        raise UserError(f"the checkpoint was trained on {before['count']:,} pictures, and {now['path']} now holds "
                        f"others ({now['count']:,}): bring the old ones back to resume, or start a new run without "
                        f"--resume, with --init and the checkpoint if it is to go on from there")
