"""The command line of the scripts: a parser, types of flag values, and the flags that several scripts share."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable

from data import DATASETS
from data_sources.pictures import FITS
from runtime.errors import UserError
from runtime.script import called_as
from samplers import (
    DEFAULT_GUIDANCE,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    SAMPLERS,
    SPACINGS,
    STUDENT_SAMPLER,
    STUDENT_STEPS,
)

PRETRAINED_NAMES = "mnist, fashion_mnist, glyphs or cifar10"  # in help texts; the files are in models/pretrained
GUIDANCE_DEFAULTS = ", ".join([str(DEFAULT_GUIDANCE), *(f"for {name} {row.guidance:g}" for name, row in DATASETS.items()
                                                        if row.guidance)])  # the same


class Parser(argparse.ArgumentParser):
    """An argument parser that shows every default and raises UserError, one line, for what it cannot read.

    After parsing, `typed` holds the names of the flags that the user gave.
    """

    def __init__(self, description: str):
        class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
            def _get_help_string(self, action):
                no_default = any(action.default is value for value in (None, False, argparse.SUPPRESS))
                if no_default or "(default" in action.help:
                    return action.help
                if isinstance(action.default, list):
                    words = (f"{value:g}" if isinstance(value, float) else str(value) for value in action.default)
                    return f"{action.help} (default: {' '.join(words)})"
                return super()._get_help_string(action)

        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse, with --no_x for --no-x, and --x 5,10 for --x 5 10 where --x takes several values.

        An unknown flag is an error that names the most similar one.
        """
        known, words = self._option_string_actions, list(sys.argv[1:] if args is None else args)
        no_flags = {name.replace("--no-", "--no_"): name for name in known if name.startswith("--no-")}
        words = self._split_at_commas([no_flags.get(word, word) for word in words])
        self.typed = {known[name].dest for name in (word.split("=")[0] for word in words) if name in known}
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            near = [name for word in rest for name in difflib.get_close_matches(word.split("=")[0], known, 1)]
            self.error(f"unrecognized arguments: {' '.join(rest)}{f'; did you mean {near[0]}?' if near else ''}")
        return namespace, []

    def _split_at_commas(self, words: list[str]) -> list[str]:
        """The words of a command line; the values of flags that take several numbers or names are split at commas."""
        split, several = [], False
        for word in words:
            flag, equals, value = word.partition("=")
            if word.startswith("--"):
                action = self._option_string_actions.get(flag)
                several = (action is not None and action.nargs in ("*", "+", 2)
                           and (action.type or action.choices) is not None)  # a file name may hold a comma
                parts = [flag, *value.split(",")] if several and equals and "," in value else [word]
            else:
                parts = word.split(",") if several else [word]
            split += [part for part in parts if part] or [word]
        return split

    def error(self, message: str):
        command = " ".join([called_as(), *self.prog.split()[1:]])  # with the sub-command, as in "edit.py vary"
        raise UserError(f"{message} (python {command} --help lists the flags)")


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A type for add_argument: a finite number of `kind` (int or float) in low..high."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value in (math.inf, -math.inf):
            name = "a whole number" if kind is int else "a number"
            least, most = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in (low, high))
            bounds = {(False, False): "", (True, False): f" from {least} up", (False, True): f" up to {most}",
                      (True, True): f" in {least}..{most}"}[math.isfinite(low), math.isfinite(high)]
            raise argparse.ArgumentTypeError(f"must be {name}{bounds}, not {text!r}")
        return value
    return parse


def duration(text: str) -> float:
    """A type for add_argument: seconds from "90", "90s", "10m" or "1.5h"."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 10m or 1.5h, not {text!r}")
    return seconds


def dataset(text: str) -> str:
    """A type for add_argument: the name of a data set or, as an absolute path, what holds pictures."""
    if text in DATASETS:
        return text
    if not os.path.exists(text):
        near = difflib.get_close_matches(text, DATASETS, 1)
        raise argparse.ArgumentTypeError(f"unknown data set {text!r}: choose one of {', '.join(DATASETS)}, or give the "
                                         f"path of a folder, a .zip or a .npz of your own pictures"
                                         f"{f'; did you mean {near[0]}?' if near else ''}")
    return os.path.abspath(text)


def colour(text: str) -> str:
    """A type for add_argument: a colour that PIL knows."""
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a colour such as white, black or #ff8000, not {text!r}") from error
    return text


class LowAndHigh(argparse.Action):
    """An action for a flag that takes two numbers, the lower one first."""

    def __call__(self, parser, namespace, values, option_string=None):
        low, high = values
        if low > high:
            raise argparse.ArgumentError(self, f"takes the lower first: {high:g} {low:g}")
        setattr(namespace, self.dest, (low, high))


SHARED_FLAGS = {
    "dataset": dict(type=dataset, default="mnist", metavar="NAME|PATH",
                    help=f"the images to learn from or to look at: {', '.join(DATASETS)}, or your own pictures: a "
                         f"folder, a .zip of one, or a .npz; its sub-folders are the classes"),
    # for your own pictures
    "image_size": dict(type=number(int), metavar="N",
                       help="for your own pictures: height and width in pixels, a multiple of 4 (above 64 of 8, above "
                            "128 of 16, above 256 of 32; default: 28, 32 or 64, by their sizes; on a CPU at most 32)"),
    "fit": dict(choices=FITS, default="crop",
                help="how a picture of another shape is scaled: cut off what is too much, add --background at two "
                     "sides, or stretch it"),
    "channels": dict(choices=("auto", "1", "3"), default="auto",
                     help="for your own pictures: 1 for grey, 3 for colour; auto: grey if every picture is"),
    "background": dict(type=colour, default="white", metavar="COLOUR",
                       help="what shows through the transparent parts of a picture"),
    "data_dir": dict(default="data", help="the folder with the data sets; what is missing is downloaded to it"),
    "output_dir": dict(default="outputs", help="the folder for the results"),
    "device": dict(default="auto", help="the device that computes: auto (CUDA, else MPS, else the CPU), cuda, cuda:N, "
                                            "mps or cpu"),
    "seed": dict(type=number(int, 0, 2**63 - 1), default=0, help="the seed of everything random"),
    "precision": dict(choices=("auto", "fp32", "bf16"), default="auto",
                      help="the arithmetic of the network; auto: bf16 where the processor supports it and, in "
                           "training, where it is measured to be faster (on CUDA: bf16 where the GPU has it)"),
    "threads": dict(type=number(int, 1, 1024), metavar="N",
                    help="the number of threads on the processor, from beginning to end (default: one for each core; "
                         "fewer while other programs are busy, except in a training that ends after --epochs, so "
                         "that it can be repeated bit for bit)"),
    # for scripts that make images with a checkpoint
    "checkpoint": dict(help="a file of train.py or distill.py, a folder of export.py --format safetensors, or a "
                            f"pretrained model by its name: {PRETRAINED_NAMES} (default: the newest model_final.pt "
                            "below outputs/, else mnist)"),
    "use_ema": dict(action=argparse.BooleanOptionalAction, default=True,
                    help="use the moving average of the weights, which makes better images; --no-use_ema: the weights "
                         "after the last step"),
    "num_images": dict(type=number(int, 1, 10_000_000), default=64, help="the number of images to make"),
    "sampler": dict(choices=tuple(SAMPLERS),
                    help=f"the method from noise to image (default: {DEFAULT_SAMPLER}; for a student: "
                         f"{STUDENT_SAMPLER})"),
    "steps": dict(type=number(int, 1), help="the number of steps of the sampler, at most the checkpoint's T "
                                            f"(default: {DEFAULT_STEPS}; for a student: {STUDENT_STEPS})"),
    "spacing": dict(choices=tuple(SPACINGS), help="the spacing of the sampler's times (default: the sampler's own)"),
    "eta": dict(type=number(float, 0, 1),
                help="how much fresh noise is added in every step; only for --sampler ddim (0: none, 1: as much as "
                     "ddpm) and heun (the share by which the noise level rises before a step, 0.41 at most) "
                     "(default: 0)"),
    "label": dict(help="the class to draw, for a model that was trained with --conditional: a number or name, a range "
                       "such as 0-9, or several with commas"),
    "guidance_scale": dict(type=number(float, 0, 100),
                           help="the strength of the guidance by the label: 1 is none, more gives clearer and less "
                                f"varied images (default: {GUIDANCE_DEFAULTS}, where there are labels; for a "
                                "student: 1)"),
    "guidance_interval": dict(type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"), action=LowAndHigh,
                              help="use guidance only at times t from LOW to HIGH (default: at all times)"),
    "batch_size": dict(type=number(int, 1), default=64, help="the number of images made at the same time; it "
                                                             "changes an image only by rounding"),
    # for scripts that draw pictures
    "columns": dict(type=number(int, 1, 1000), help="the number of pictures in a row (default: by their number)"),
    "scale": dict(type=number(int, 1, 64), help="each pixel of a picture is drawn N×N large (default: by their number)",
                  metavar="N"),
}


PICTURE_FLAGS = ("image_size", "fit", "channels", "background")


def refuse_picture_flags(parser: Parser) -> None:
    """UserError for PICTURE_FLAGS that the user gave with a checkpoint, which says itself how pictures are read."""
    if given := [name for name in PICTURE_FLAGS if name in parser.typed]:
        parser.error(f"--{given[0]} is not read with a checkpoint, whose pictures are read as for its training: leave "
                     f"it out")


def add_shared_flags(parser, *names: str) -> None:
    """Add flags that mean the same in every script."""
    for name in names:
        parser.add_argument(f"--{name}", **SHARED_FLAGS[name])
