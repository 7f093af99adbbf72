"""Points in the plane, drawn on the machine: data in which diffusion can be seen.

A point is an image of two channels and one pixel, its two coordinates: points are (N, 2, 1, 1) float32 in [-1, 1].
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

POINT_SHAPE = (2, 1, 1)
COUNTS = {"train": 20_000, "test": 5_000}  # points that are drawn
LETTERS = "TINY"  # two above, two below
CENTRES = 0.7 * np.array([(math.cos(angle), math.sin(angle)) for angle in np.arange(8) * math.pi / 4])
CENTRE_STD = 0.07  # standard deviation of the points around each of CENTRES, in each coordinate


def is_points(shape: Sequence[int]) -> bool:
    """Whether data of this shape (C, H, W) are points in the plane; images have one channel or three."""
    return tuple(shape) == POINT_SHAPE


class Coordinates:
    """What `data.LevelCode` is for images: points are learned as they are, so that there is nothing to encode."""

    holds = "points"
    is_linear = True  # a checkpoint has no table to keep
    edges = None

    def to(self, device) -> "Coordinates":
        return self

    def encode(self, points: Tensor) -> Tensor:
        """Points (N, 2, 1, 1) as float32."""
        return points.float()

    decode = encode


COORDINATES = Coordinates()

# ---------------------------------------------------------------------------------------------------------- the sets


def moons(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two half circles, each with one end inside the other."""
    angle = rng.uniform(0, math.pi, len(labels))
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
    return 0.55 * np.where(labels[:, None] == 0, upper, -upper) + rng.normal(0, 0.03, (len(labels), 2))


def spirals(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two arms that wind one and a half times round the middle, with as many points on each unit of length."""
    radius = np.sqrt(rng.uniform(0.15**2, 0.85**2, len(labels)))
    angle = 3 * math.pi * (radius - 0.15) / 0.7 + math.pi * labels
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) + rng.normal(0, 0.02, (len(labels), 2))


def checkerboard(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The black squares of a board of 4 × 4; the label is the row, from the top."""
    x, y = rng.uniform(0, 1, (2, len(labels)))
    column = 2 * rng.integers(2, size=len(labels)) + labels % 2
    return 0.45 * np.stack([column + x - 2, 2 - (labels + y)], axis=1)


def gaussians(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Eight round clouds on a circle, the only set whose density is known in closed form."""
    return CENTRES[labels] + rng.normal(0, CENTRE_STD, (len(labels), 2))


def letters(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ink of four letters, two above and two below."""
    places = np.empty((len(labels), 2))
    for label in range(len(LETTERS)):
        mine = labels == label
        pixels = ink(LETTERS[label])                                                        # (M, 2) in 0..1, y down
        chosen = pixels[rng.integers(len(pixels), size=mine.sum())] + rng.uniform(0, 1 / 64, (mine.sum(), 2))
        places[mine] = np.stack([chosen[:, 0] + label % 2 - 1, 1 - chosen[:, 1] - label // 2], axis=1)
    return 0.9 * places


@lru_cache
def ink(letter: str) -> np.ndarray:
    """The dark pixels (M, 2) of a letter that is 64 pixels large, as (x, y) in 0..1, y downwards."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).text((32, 32), letter, 255, ImageFont.truetype(str(file), 64), anchor="mm")
    return np.argwhere(np.array(image) > 127)[:, ::-1] / 64


class PointSet(NamedTuple):
    """How to draw points, draw(labels (N,), rng) -> (N, 2) in [-1, 1], and the names of the labels."""

    draw: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    class_names: tuple[str, ...]


POINT_SETS = {
    "moons": PointSet(moons, ("upper", "lower")),
    "spirals": PointSet(spirals, ("first", "second")),
    "checkerboard": PointSet(checkerboard, ("row 1", "row 2", "row 3", "row 4")),
    "letters": PointSet(letters, tuple(LETTERS)),
    "gaussians": PointSet(gaussians, tuple("01234567")),
}


def read_points(name: str, data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Points (N, 2, 1, 1) float32 and labels (N,) of a row of POINT_SETS, always the same; data_dir is not used."""
    rng, row = np.random.default_rng(0 if train else 1), POINT_SETS[name]
    labels = rng.integers(len(row.class_names), size=COUNTS["train" if train else "test"])
    points = row.draw(labels, rng).clip(-1, 1)
    return torch.from_numpy(points).float()[:, :, None, None], torch.from_numpy(labels)


READERS = {name: partial(read_points, name) for name in POINT_SETS}

# ----------------------------------------------------------------------------------------------------------- a picture

SIDE, EXTENT = 640, 1.25  # of a picture: pixels, and the largest coordinate that lies in it
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")


def scatter(points: Tensor, labels: Tensor | None = None) -> np.ndarray:
    """A picture (SIDE, SIDE, 3) uint8 of points (N, 2, 1, 1), a colour for each label; the frame is [-1, 1]²."""
    from PIL import Image, ImageDraw

    side = 2 * SIDE  # drawn twice as large, for smooth dots
    places = (points.flatten(1).double().numpy() * [1, -1] / EXTENT + 1) * side / 2          # (N, 2) pixels, y down
    radius = max(2.0, min(9.0, 200 / math.sqrt(len(points))))
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    edge = side / 2 / EXTENT
    draw.rectangle((side / 2 - edge, side / 2 - edge, side / 2 + edge, side / 2 + edge), outline="#bbbbbb", width=2)
    for i, (x, y) in enumerate(places):
        colour = COLOURS[int(labels[i]) % len(COLOURS) if labels is not None else 0]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return np.array(image.resize((SIDE, SIDE), Image.Resampling.BOX))
