"""What the scripts share: devices, seeds, pictures, plots, and the face that every script shows."""

import argparse
import contextlib
import difflib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
from data import DATASETS, to_uint8
from files import atomic_write
from memory import and_some, fits_in_memory, give_memory_back, out_of_memory
from samplers import (
    DEFAULT_GUIDANCE,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    ETA_SAMPLERS,
    SAMPLERS,
    SPACINGS,
    STUDENT_SAMPLER,
    STUDENT_STEPS,
)

GREY = 64  # the level of the lines between the pictures of a grid

# ------------------------------------------------------------------------------------------------ device and chance


def get_device(name: str = "auto") -> torch.device:
    """The device by its name; "auto" is CUDA where there is one, then MPS, then the CPU. ValueError if missing."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ValueError(f"device {name!r} is not available: choose --device auto or one of {', '.join(available)}")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # streams and graphs are those of the current device
    return torch.device(name)


def set_seed(seed: int) -> None:
    """Seed torch's global generator, which initialises networks."""
    torch.manual_seed(seed)


def generator_for(seed: int, *key: int, device="cpu") -> torch.Generator:
    """A random generator that depends on (seed, *key) alone, so that no hidden state has to be saved to go on."""
    state = int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state)


def pick_precision(precision: str, device: torch.device) -> str:
    """fp32 or bf16; "auto" is bf16 where the processor multiplies in it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast on `device` for precision "bf16"; nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def within_memory(make: Callable, batches: Callable[[int], Iterator], batch_size: int, device: torch.device):
    """make(batches(batch_size)); where the memory is too small RunFailed with the batch size that fits, measured.

    batches(n): samplers.generate with n images at a time.
    """
    try:
        return make(batches(batch_size))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise

    def rehearse(count: int) -> None:
        _, trajectory = next(batches(count))
        list(islice(trajectory, 2))

    fits = batch_size  # measured out here, where what the error held is free again
    while fits and not fits_in_memory(functools.partial(rehearse, and_some(fits)), device):
        fits //= 2
    advice = {0: ", and even for one: close other programs, or choose another --device",
              batch_size: ", which fit by themselves (measured): ask for fewer images in all"}
    raise RunFailed(f"out of memory for {batch_size} images at a time"
                    + advice.get(fits, f": {fits} fit (measured): give --batch_size {fits}"))


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------- pictures


def tile(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """uint8 images (B, C, H, W), C 1 or 3, in rows of `columns` with a grey line around each: (H', W', 3) uint8.

    Each pixel is scale × scale large. As torchvision's make_grid, whose import takes a second and 160 MB.
    """
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = torch.full((rows * columns, 3, height + 1, width + 1), GREY, dtype=torch.uint8)  # lines above and left
    cells[:count, :, 1:, 1:] = images.cpu()
    grid = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    grid = F.pad(grid, (0, 0, 0, 1, 0, 1), value=GREY)                                      # and right and below
    return grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()


def save_images(images: Tensor, path: str | Path, columns: int = 8, scale: int = 3, quantise: bool = True) -> None:
    """Write a grid of images (B, C, H, W) in [-1, 1] as a PNG, `columns` in a row, each pixel scale × scale large.

    quantise: not where they are uint8 already.
    """
    from PIL import Image

    with atomic_write(path) as file:
        Image.fromarray(tile(to_uint8(images) if quantise else images, columns, scale)).save(file, format="PNG")


def save_gif(frames: Sequence[Tensor], path: str | Path, columns: int = 8, scale: int = 3,
             seconds: float = 3.0) -> None:
    """Write a film: each frame a grid of images (B, C, H, W) in [-1, 1], `seconds` in all, then a pause of two."""
    from PIL import Image

    pictures = [Image.fromarray(tile(to_uint8(images), columns, scale)).quantize(64) for images in frames]
    each = max(20, round(1000 * seconds / len(pictures)))  # milliseconds; viewers show 20 at the least
    with atomic_write(path) as file:
        pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], loop=0, optimize=True,
                         duration=[each] * (len(pictures) - 1) + [2000])


def save_figure(figure, path: str | Path) -> None:
    """Write a matplotlib figure as a PNG and close it."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    pyplot().close(figure)


def pyplot():
    """matplotlib.pyplot with the backend that needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def moving_average(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of each value and up to `window` - 1 before it: as long as `values`."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_losses(records: Sequence[dict], path: str | Path) -> None:
    """Draw the records of metrics.jsonl: training loss, its moving average, and the validation loss, over the steps."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    trained = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None and math.isfinite(r["loss"])]
    validated = [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if trained:
        steps, losses = zip(*trained, strict=True)
        window = max(2, len(losses) // 20)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, label="training")
        axes.plot(steps, moving_average(losses, window), color="tab:blue", label=f"moving average of {window}")
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", color="tab:orange", markersize=4, label="validation (EMA)")
    if trained and min(loss for _, loss in trained) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="training step", ylabel="loss", title="Training loss")
    axes.grid(alpha=0.3, which="both")
    if trained or validated:
        axes.legend()
    save_figure(figure, path)


def write_json_lines(records: Sequence[dict], path: str | Path) -> None:
    """Write one JSON object per line."""
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


# --------------------------------------------------------------------------------------------- the face of a script


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
        raise ValueError(f"{message} (python {self.prog} --help lists the flags)")


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

    ValueError if --label or --guidance_scale asks a model for labels that it does not know.
    """
    if args.label is None and (num_classes or args.guidance_scale in (None, 1)):
        return None
    classes = torch.tensor(chosen_classes(str(args.label), class_names if num_classes else ()))
    if len(classes) > count:
        raise ValueError(f"--label names {len(classes)} classes, more than the {count} to be made: name fewer")
    return classes[torch.arange(count) * len(classes) // count]


def image_labels(args, num_classes: int | None, class_names: Sequence[str]) -> Tensor | None:
    """The label of each of --num_images (N,): those of --label, or all in turn; None for a model without labels."""
    labels = asked_labels(args, num_classes, class_names, args.num_images)
    return torch.arange(args.num_images) % num_classes if labels is None and num_classes else labels


def check_useful(args, samplers: Sequence[str], guided: bool) -> None:
    """ValueError for an --eta that none of the samplers reads, and a --guidance_interval of images without guidance."""
    if args.eta is not None and not {*samplers} <= {*ETA_SAMPLERS}:
        raise ValueError(f"--eta is read by --sampler {' and '.join(ETA_SAMPLERS)} only: choose one, or leave it out")
    if args.guidance_interval and not guided:
        raise ValueError("--guidance_interval needs guidance: a checkpoint trained with --conditional, and another "
                         "--guidance_scale than 1")


def guidance(scale: float | None, labels: Tensor | None, student: bool = False) -> float:
    """The guidance scale that a flag asks for, or the default one where images have labels."""
    return scale if scale is not None else 1.0 if labels is None or student else DEFAULT_GUIDANCE


def is_student(checkpoint: dict) -> bool:
    """Whether distill.py wrote this checkpoint."""
    return checkpoint["config"]["training"].get("student") is True


def sampler_and_steps(args, checkpoint: dict) -> tuple[str, int]:
    """What --sampler and --steps ask for, or what measured best for checkpoints of this kind."""
    best = (STUDENT_SAMPLER, STUDENT_STEPS) if is_student(checkpoint) else (DEFAULT_SAMPLER, DEFAULT_STEPS)
    return args.sampler or best[0], args.steps or min(best[1], checkpoint["config"]["diffusion"]["num_timesteps"])


def chosen_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """The classes that --label names. ValueError that lists what there is."""
    if not class_names:
        raise ValueError("this checkpoint was trained without labels: leave --label and --guidance_scale out, or train "
                         "one with python train.py --conditional")
    known = {name.lower(): i for i, name in enumerate(class_names)} | {str(i): i for i in range(len(class_names))}
    classes = []
    for part in text.lower().split(","):
        dashes = [i for i, character in enumerate(part) if character == "-"]  # names have some too
        pairs = [(part, part), *((part[:i], part[i + 1:]) for i in dashes)]
        ends = [(known[a.strip()], known[b.strip()]) for a, b in pairs if a.strip() in known and b.strip() in known]
        if not ends or ends[0][0] > ends[0][1]:
            listed = ", ".join(f"{i} {name}" if name != str(i) else name for i, name in enumerate(class_names))
            raise ValueError(f"unknown label {part!r}: choose from {listed}, or a range such as "
                             f"0-{len(class_names) - 1}")
        classes += range(ends[0][0], ends[0][1] + 1)
    return classes


class RunFailed(Exception):
    """The run cannot go on, through no fault of what the user asked for: exit status 1."""


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
            if parallel.lost(error):
                return _complain("another process of this run has ended", 1)
            if not out_of_memory(error):
                raise
            return _complain(f"out of memory ({str(error)[:100]}): try a smaller --batch_size", 1)
        finally:
            give_memory_back()  # torch takes some more to leave
    return run


def _complain(message, status: int) -> int:
    name = Path(sys.argv[0]).name
    if status == 2 and os.environ.get("RANK", "0") != "0":
        return status  # every process of torchrun's finds the same: one says it
    with contextlib.suppress(OSError):
        print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    return status
