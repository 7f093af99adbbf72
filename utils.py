"""Devices, seeds, image grids and plots: what several scripts need."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sources.points import is_points, scatter
from runtime.errors import UserError
from runtime.files import atomic_write

GREY = 64  # the level of the lines between the pictures of a grid
CAPTION = 24  # height in pixels of a line of captions
MAX_PIXELS = 2**27  # of a picture to write: several times as many bytes in memory
GRID_SIDE, MAX_SCALE = 800, 8  # of a grid whose scale follows from the number of its pictures
FIGURE_FORMATS = (".png", ".pdf", ".svg")

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


def generator_for(seed: int, *key: int, device="cpu") -> torch.Generator:
    """A random generator that depends on (seed, *key) only: to resume a run no state has to be saved."""
    return torch.Generator(device).manual_seed(seed_for(seed, *key))


def seed_for(seed: int, *key: int) -> int:
    """A seed that depends on (seed, *key) only."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def pick_precision(precision: str, device: torch.device) -> str:
    """fp32 or bf16; "auto": bf16 if the processor has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and has_bf16_instructions() else "fp32"


@cache
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


def grid_layout(shape: Sequence[int], columns: int | None = None, scale: int | None = None) -> tuple[int, int]:
    """(columns, scale) of a grid of images of the shape (B, C, H, W).

    What is None follows: about square, GRID_SIDE pixels large.
    """
    count, _, height, width = shape
    columns = columns or (count if count <= 8 else math.ceil(math.sqrt(count)))
    side = max(min(columns, count) * (width + 1), math.ceil(count / columns) * (height + 1))
    return columns, scale or min(MAX_SCALE, max(1, round(GRID_SIDE / side)))


def check_grid(shape: Sequence[int], columns: int | None = None, scale: int | None = None, other: str = "") -> None:
    """UserError if a grid of images of the shape (B, C, H, W) would be a picture of more than MAX_PIXELS.

    other: what else to advise than fewer images, where they are not enlarged.
    """
    columns, scale = grid_layout(shape, columns, scale)
    count, _, height, width = shape
    columns = min(columns, count)
    pixels = scale**2 * (columns * (width + 1) + 1) * (math.ceil(count / columns) * (height + 1) + 1)
    if pixels > MAX_PIXELS:
        enlarged, instead = (f", {scale} times as large", " or give a smaller --scale") if scale > 1 else ("", "")
        raise UserError(f"a picture of {count:,} images of {height}×{width} pixels{enlarged} would have {pixels:,} "
                        f"pixels, more than {MAX_PIXELS:,}: make fewer images{instead or other}")


def tile(images: Tensor, columns: int, scale: int = 1, captions: Sequence[str] = ()) -> np.ndarray:
    """uint8 images (B, C, H, W), C 1 or 3, in rows of `columns` with a grey line around each: (H', W', 3) uint8.

    Each pixel is scale × scale large; captions[k] stands above image k. As torchvision's make_grid, whose import takes
    a second and 160 MB. Points in the plane (B, 2, 1, 1) are all dots in one picture, without captions.
    """
    if is_points(images.shape[1:]):
        return scatter(images.cpu())
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}: convert them with data.to_uint8")
    count, _, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    cells = torch.full((rows * columns, 3, height + 1, width + 1), GREY, dtype=torch.uint8)  # lines above and left
    cells[:count, :, 1:, 1:] = images.cpu()
    grid = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    grid = F.pad(grid, (0, 0, 0, 1, 0, 1), value=GREY)                                      # and right and below
    grid = grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
    parts, row_height = [], (height + 1) * scale
    for row in range(rows if captions else 0):
        texts = [*captions[row * columns:(row + 1) * columns], *columns * [""]][:columns]
        parts += [caption_line(texts, grid.shape[1])] if any(texts) else []
        parts.append(grid[row * row_height:(row + 1) * row_height])
    return np.concatenate([*parts, grid[rows * row_height:]]) if captions else grid


def caption_line(texts: Sequence[str], width: int) -> np.ndarray:
    """A line of texts, each in the middle of its equal part of the width, white on grey: (CAPTION, width, 3) uint8."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    line = Image.new("RGB", (width, CAPTION), (GREY, GREY, GREY))
    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    for size in (14, 13, 12, 11, 10, 9, 8):  # the largest that fits
        font = ImageFont.truetype(str(file), size)
        if max(font.getlength(text) for text in texts) <= width / len(texts):
            break
    for i, text in enumerate(texts):
        ImageDraw.Draw(line).text((width * (i + 0.5) / len(texts), CAPTION / 2), text, "white", font, anchor="mm")
    return np.array(line)


def time_texts(times: Sequence[float]) -> list[str]:
    """Each time as a number with as many decimals as tell all of them apart."""
    for decimals in range(16):
        texts = [f"{t:.{decimals}f}" for t in times]
        if len(set(texts)) == len(set(times)):
            break
    return texts


def time_titles(times: Sequence[float]) -> list[str]:
    """A title for each time of a trajectory: "t = 12", or "image" for t < 0."""
    return ["image" if t < 0 else f"t = {text}" for t, text in zip(times, time_texts(times), strict=True)]


def evenly_spaced(count: int, shown: int, rounding: Callable[[float], int] = round) -> list[int]:
    """At most `shown` >= 2 of the indices 0..count - 1, evenly spaced, the first and the last among them."""
    return sorted({rounding((count - 1) * i / (shown - 1)) for i in range(shown)})


def save_images(images: Tensor, path: str | Path, columns: int | None = None, scale: int | None = None,
                captions: Sequence[str] = ()) -> None:
    """Write a grid of uint8 images (B, C, H, W) as a PNG, as `tile` makes it; None: as `grid_layout` chooses."""
    save_picture(tile(images, *grid_layout(images.shape, columns, scale), captions), path)


def save_picture(picture: np.ndarray, path: str | Path) -> None:
    """Write a picture (H, W, 3) uint8 as a PNG."""
    from PIL import Image

    with atomic_write(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def save_gif(frames: Sequence[Tensor], path: str | Path, columns: int = 8, seconds: float = 3.0,
             captions: Sequence[str] = ()) -> None:
    """Write an animated GIF of frames, each a grid of uint8 images (B, C, H, W): `seconds` long, then two of pause.

    captions[k] stands above frame k.
    """
    from PIL import Image

    columns, scale = grid_layout(frames[0].shape, columns)
    grids = [tile(images, columns, scale) for images in frames]
    if captions:
        grids = [np.concatenate([caption_line([text], grid.shape[1]), grid])
                 for text, grid in zip(captions, grids, strict=True)]
    colours = 64 if frames[0].shape[1] == 1 else 256
    pictures = [Image.fromarray(grid).quantize(colours) for grid in grids]
    each = max(20, round(1000 * seconds / len(pictures)))  # milliseconds; viewers show 20 at the least
    with atomic_write(path) as file:
        pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], loop=0, optimize=True,
                         duration=[each] * (len(pictures) - 1) + [2000])


def save_figure(figure, path: str | Path, dpi: int = 120) -> None:
    """Write a matplotlib figure in the format of the path's ending, one of FIGURE_FORMATS, and close it.

    UserError for a PNG of more than MAX_PIXELS.
    """
    pixels = math.prod(side * dpi for side in figure.get_size_inches())
    if Path(path).suffix == ".png" and pixels > MAX_PIXELS:
        raise UserError(f"the picture would have {pixels:,.0f} pixels, more than {MAX_PIXELS:,}: give a smaller --dpi")
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=dpi, bbox_inches="tight")
    pyplot().close(figure)


def pyplot():
    """matplotlib.pyplot with a backend that needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plain_text(name: str) -> str:
    """A name as matplotlib shows it: $ begins no formula, and _ does not keep it out of a legend."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def plain_log_ticks(axis) -> None:
    """Label a logarithmic axis of matplotlib 0.1, 0.2, 0.5, 1, 2 ... or, where it is short, evenly: 1.6, 1.7, 1.8.

    Call it when everything has been drawn.
    """
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.AutoLocator() if high < 5 * low else ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


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
        plain_log_ticks(axes.yaxis)
    axes.set(xlabel="training step", ylabel="loss", title="Training loss")
    axes.grid(alpha=0.3, which="both")
    if trained or validated:
        axes.legend()
    save_figure(figure, path)
