"""The face that every script shows: its flags, what they mean together, and how it ends."""

import argparse
import contextlib
import difflib
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data import DATASETS
from runtime import distributed
from runtime.errors import RunFailed, UserError
from runtime.files import one_line
from runtime.memory import give_memory_back, out_of_memory
from samplers import (
    DEFAULT_GUIDANCE,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    SAMPLERS,
    SPACINGS,
    STUDENT_SAMPLER,
    STUDENT_STEPS,
)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows every default and puts an error on one line.

    After parsing `typed` holds the names of the flags that the user gave.
    """

    def __init__(self, description: str):
        class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
            def _get_help_string(self, action):
                plain = any(action.default is value for value in (None, False, argparse.SUPPRESS))
                told = plain or "(default" in action.help
                return action.help if told else super()._get_help_string(action)

        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but --no_x is --no-x too, and a flag that there is not is refused here, by its own parser."""
        known, words = self._option_string_actions, list(sys.argv[1:] if args is None else args)
        no_flags = {name.replace("--no-", "--no_"): name for name in known if name.startswith("--no-")}
        words = [no_flags.get(word, word) for word in words]
        self.typed = {known[name].dest for name in (word.split("=")[0] for word in words) if name in known}
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            near = [name for word in rest for name in difflib.get_close_matches(word.split("=")[0], known, 1)]
            self.error(f"unrecognized arguments: {' '.join(rest)}{f'; did you mean {near[0]}?' if near else ''}")
        return namespace, []

    def error(self, message: str):
        if "required" in message and "--checkpoint" in message:
            message += ", such as --checkpoint outputs/model_final.pt"
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A parser of flags' values: a finite number of `kind` (int or float) in low..high."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value in (math.inf, -math.inf):
            name = "a whole number" if kind is int else "a number"
            bounds = {(False, False): "", (True, False): f" from {low:g} up", (False, True): f" up to {high:g}",
                      (True, True): f" in {low:g}..{high:g}"}[math.isfinite(low), math.isfinite(high)]
            raise argparse.ArgumentTypeError(f"must be {name}{bounds}, not {text!r}")
        return value
    return parse


def duration(text: str) -> float:
    """A parser of flags' values: seconds from "90", "90s", "10m" or "1.5h"."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 10m or 1.5h, not {text!r}")
    return seconds


class InOrder(argparse.Action):
    """Of a flag that takes a low and a high value."""

    def __call__(self, parser, namespace, values, option_string=None):
        low, high = values
        if low > high:
            raise argparse.ArgumentError(self, f"takes the lower first: {high:g} {low:g}")
        setattr(namespace, self.dest, (low, high))


SHARED_FLAGS = {
    "dataset": dict(choices=tuple(DATASETS), default="mnist", help="what to learn or look at"),
    "data_dir": dict(default="data", help="where data sets lie or are downloaded to"),
    "output_dir": dict(default="outputs", help="where results are written"),
    "device": dict(default="auto", help="auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu"),
    "seed": dict(type=number(int, 0, 2**63 - 1), default=0, help="of all that is random"),
    "precision": dict(choices=("auto", "fp32", "bf16"), default="auto",
                      help="of the network's arithmetic; auto is bf16 where the processor multiplies in it, and in "
                           "training what is measured to be faster"),
    # of the scripts that make images with a checkpoint
    "use_ema": dict(action=argparse.BooleanOptionalAction, default=True,
                    help="the averaged weights, the better ones; --no-use_ema: as the last step left them"),
    "num_images": dict(type=number(int, 1, 10_000_000), default=64, help="how many"),
    "sampler": dict(choices=tuple(SAMPLERS),
                    help=f"the way from noise to image (default: {DEFAULT_SAMPLER}; of a student: {STUDENT_SAMPLER})"),
    "steps": dict(type=number(int, 1), help="of the sampler, at most the checkpoint's T "
                                            f"(default: {DEFAULT_STEPS}; of a student: {STUDENT_STEPS})"),
    "spacing": dict(choices=tuple(SPACINGS), help="how the times of the steps are spread (default: the sampler's own)"),
    "eta": dict(type=number(float, 0, 1),
                help="fresh noise in every step, of --sampler ddim (0 none, 1 as ddpm) and heun (by how large a share "
                     "the noise rises) only (default: 0)"),
    "label": dict(help="of a model that was trained with --conditional: a class by its number or name, a range such as "
                       "0-9, or several with commas"),
    "guidance_scale": dict(type=number(float, 0, 100),
                           help="how strongly the label is asked for: 1 as learnt, more for clearer and less varied "
                                f"images (default: {DEFAULT_GUIDANCE} where there are labels; of a student: 1)"),
    "guidance_interval": dict(type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"), action=InOrder,
                              help="the times t in which guidance acts (default: all)"),
    "batch_size": dict(type=number(int, 1), default=64, help="images at a time; changes no image"),
}


def add_shared_flags(parser, *names: str) -> None:
    """Add flags that have one meaning in every script."""
    for name in names:
        parser.add_argument(f"--{name}", **SHARED_FLAGS[name])


def asked_labels(args, num_classes: int | None, class_names: Sequence[str], count: int) -> Tensor | None:
    """The label of each of `count` images (count,) by --label, as many in a row for each class; None without --label.

    UserError if --label or --guidance_scale asks a model for labels that it does not know.
    """
    if args.label is None and (num_classes or args.guidance_scale in (None, 1)):
        return None
    classes = torch.tensor(chosen_classes(str(args.label), class_names if num_classes else ()))
    if len(classes) > count:
        raise UserError(f"--label names {len(classes)} classes, more than the {count} to be made: name fewer")
    return classes[torch.arange(count) * len(classes) // count]


def image_labels(args, num_classes: int | None, class_names: Sequence[str]) -> Tensor | None:
    """The label of each of --num_images (N,): those of --label, or all in turn; None for a model without labels."""
    labels = asked_labels(args, num_classes, class_names, args.num_images)
    return torch.arange(args.num_images) % num_classes if labels is None and num_classes else labels


def check_useful(args, samplers: Sequence[str], guided: bool) -> None:
    """UserError for an --eta that none of the samplers reads, and a --guidance_interval of images without guidance."""
    if args.eta is not None and not all(SAMPLERS[name].reads_eta for name in samplers):
        readers = " and ".join(name for name, sampler in SAMPLERS.items() if sampler.reads_eta)
        raise UserError(f"--eta is read by --sampler {readers} only: choose one, or leave it out")
    if args.guidance_interval and not guided:
        raise UserError("--guidance_interval needs guidance: a checkpoint trained with --conditional, and another "
                         "--guidance_scale than 1")


def guidance(scale: float | None, labels: Tensor | None, student: bool = False) -> float:
    """The guidance scale that a flag asks for, or the default one where images have labels."""
    return scale if scale is not None else 1.0 if labels is None or student else DEFAULT_GUIDANCE


def is_student(checkpoint: dict) -> bool:
    """Whether distill.py wrote this checkpoint."""
    return checkpoint["config"]["training"].get("student") is True


def trained_on(args, checkpoint: dict) -> str:
    """The data set that --checkpoint has learned. UserError if --dataset names another."""
    name = checkpoint["config"]["data"]["dataset"]
    if args.dataset not in (None, name):
        raise UserError(f"{args.checkpoint} was trained on {name}, not {args.dataset}: leave out --dataset")
    return name


def sampler_and_steps(args, checkpoint: dict) -> tuple[str, int]:
    """What --sampler and --steps ask for, or what measured best for checkpoints of this kind."""
    best = (STUDENT_SAMPLER, STUDENT_STEPS) if is_student(checkpoint) else (DEFAULT_SAMPLER, DEFAULT_STEPS)
    return args.sampler or best[0], args.steps or min(best[1], checkpoint["config"]["diffusion"]["num_timesteps"])


def chosen_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """The classes that --label names. UserError that lists what there is."""
    if not class_names:
        raise UserError("this checkpoint was trained without labels: leave --label and --guidance_scale out, or train "
                         "one with python train.py --conditional")
    known = {name.lower(): i for i, name in enumerate(class_names)} | {str(i): i for i in range(len(class_names))}
    classes = []
    for part in text.lower().split(","):
        dashes = [i for i, character in enumerate(part) if character == "-"]  # names have some too
        pairs = [(part, part), *((part[:i], part[i + 1:]) for i in dashes)]
        ends = [(known[a.strip()], known[b.strip()]) for a, b in pairs if a.strip() in known and b.strip() in known]
        if not ends or ends[0][0] > ends[0][1]:
            listed = ", ".join(f"{i} {name}" if name != str(i) else name for i, name in enumerate(class_names))
            raise UserError(f"unknown label {part!r}: choose from {listed}, or a range such as "
                             f"0-{len(class_names) - 1}")
        classes += range(ends[0][0], ends[0][1] + 1)
    return classes


def script(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Make `main(argv)` a script's entry point, main(argv=None) -> exit status.

    0 done; 1 the run failed; 2 the user asked for something that cannot be, told in one line on stderr; 130 Ctrl-C.
    """
    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except SystemExit as stop:  # --help
            return stop.code or 0
        except KeyboardInterrupt:
            return _complain("stopped by Ctrl-C", 130)
        except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
            return _complain(error, 2)
        except (RunFailed, OSError) as error:
            return _complain(error, 1)
        except (RuntimeError, MemoryError) as error:
            if distributed.lost(error):
                return _complain("another process of this run has ended", 1)
            if not out_of_memory(error):
                raise
            return _complain(f"out of memory ({one_line(error, 100)}): try a smaller --batch_size", 1)
        finally:
            give_memory_back()  # torch takes some more to leave
    return run


def _complain(message, status: int) -> int:
    name = Path(sys.argv[0]).name
    if status == 2 and os.environ.get("RANK", "0") != "0":
        return status  # every process of torchrun's finds the same: one says it
    with contextlib.suppress(OSError):
        print(f"{name}: {one_line(message, None)}", file=sys.stderr, flush=True)
    return status
