"""Devices, seeds, image grids and plots: what several scripts need."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.files import atomic_write

GREY = 64  # the level of the lines between the pictures of a grid

# ------------------------------------------------------------------------------------------------ devices and seeds


def get_device(name: str = "auto") -> torch.device:
    """The device with this name; "auto": CUDA if there is one, else MPS, else the CPU. UserError if it is missing."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(f"device {name!r} is not available: choose --device auto or one of {', '.join(available)}")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # streams and graphs are those of the current device
    return torch.device(name)


def set_seed(seed: int) -> None:
    """Seed torch's global generator, which initialises networks."""
    torch.manual_seed(seed)


def generator_for(seed: int, *key: int, device="cpu") -> torch.Generator:
    """A random generator that depends on (seed, *key) only: to resume a run no state has to be saved."""
    state = int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state)


def pick_precision(precision: str, device: torch.device) -> str:
    """fp32 or bf16; "auto": bf16 if the processor has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if device.type == "cpu" and has_bf16_instructions() else "fp32"


def has_bf16_instructions() -> bool:
    """Whether the CPU has the AVX-512 instructions for bfloat16."""
    if hasattr(torch.cpu, "get_capabilities"):  # not in older versions of torch
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    with contextlib.suppress(OSError):
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    return False


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast on `device` for precision "bf16"; nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def is_tensor_like(value, expected: Tensor) -> bool:
    """Whether `value` is an ordinary CPU tensor of the shape and type of `expected`, with memory for every number."""
    return (type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
            and value.shape == expected.shape and value.dtype == expected.dtype
            and value.untyped_storage().nbytes() >= value.numel() * value.element_size())


def count_parameters(model: nn.Module) -> int:
    """The number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------- pictures


def tile(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """uint8 images (B, C, H, W), C 1 or 3, in rows of `columns` with a grey line around each: (H', W', 3) uint8.

    Each pixel is scale × scale large. As torchvision's make_grid, whose import takes a second and 160 MB.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}: convert them with data.to_uint8")
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = torch.full((rows * columns, 3, height + 1, width + 1), GREY, dtype=torch.uint8)  # lines above and left
    cells[:count, :, 1:, 1:] = images.cpu()
    grid = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    grid = F.pad(grid, (0, 0, 0, 1, 0, 1), value=GREY)                                      # and right and below
    return grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()


def evenly_spaced(count: int, shown: int, rounding: Callable[[float], int] = round) -> list[int]:
    """At most `shown` >= 2 of the indices 0..count - 1, evenly spaced, the first and the last among them."""
    return sorted({rounding((count - 1) * i / (shown - 1)) for i in range(shown)})


def save_images(images: Tensor, path: str | Path, columns: int = 8, scale: int = 3) -> None:
    """Write a grid of uint8 images (B, C, H, W) as a PNG, `columns` in a row, each pixel scale × scale large."""
    from PIL import Image

    with atomic_write(path) as file:
        Image.fromarray(tile(images, columns, scale)).save(file, format="PNG")


def save_gif(frames: Sequence[Tensor], path: str | Path, columns: int = 8, scale: int = 3,
             seconds: float = 3.0) -> None:
    """Write an animated GIF of frames, each a grid of uint8 images (B, C, H, W): `seconds` long, then two of pause."""
    from PIL import Image

    pictures = [Image.fromarray(tile(images, columns, scale)).quantize(64) for images in frames]
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
    """matplotlib.pyplot with a backend that needs no screen."""
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
