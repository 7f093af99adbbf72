"""Typeset digits: 28x28 images of 0-9 drawn from the typefaces that matplotlib ships.

Every outline is converted to a signed distance field once. An image is a distance field sampled with a random smooth
warp.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 28  # image side in pixels
FIELD_EXTENT = 25.0  # side of the square that a distance field covers, in pixels of an undistorted digit
FIELD_SIDE = 75  # samples along that side
DIGIT_SIZE = 20.0  # larger side of an undistorted digit's bounding box, in pixels
BLOCK = 1000  # images drawn from one random stream; a multiple of ten

# The other font files of matplotlib have no digits.
TYPEFACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic",
    "cmb10", "cmmi10", "cmr10", "cmss10", "cmtt10",
)  # fmt: skip


def outline(typeface: str, digit: int) -> np.ndarray:
    """Line segments (n, 2 ends, 2) of a digit in pixels: y downwards, centred at the origin, of size DIGIT_SIZE."""
    import matplotlib  # slow, and only needed to draw
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{typeface}.ttf"
    path = TextPath((0, 0), str(digit), size=40, prop=FontProperties(fname=str(file)))
    rings = path.to_polygons()
    segments = np.concatenate([np.stack([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in rings])
    low, high = segments.min(axis=(0, 1)), segments.max(axis=(0, 1))
    segments = (segments - (low + high) / 2) * (DIGIT_SIZE / (high - low).max())
    return (segments * [1, -1]).astype(np.float32)


def distance_field(segments: np.ndarray) -> np.ndarray:
    """Signed distance (FIELD_SIDE, FIELD_SIDE) in pixels to an outline: positive inside, negative outside."""
    axis = (np.arange(FIELD_SIDE, dtype=np.float32) + 0.5) * (FIELD_EXTENT / FIELD_SIDE) - FIELD_EXTENT / 2
    x, y = axis[None, :, None], axis[:, None, None]
    (x0, y0), (x1, y1) = segments[:, 0].T, segments[:, 1].T
    dx, dy = x1 - x0, y1 - y0
    along = ((x - x0) * dx + (y - y0) * dy) / np.maximum(dx**2 + dy**2, 1e-12)
    np.clip(along, 0, 1, out=along)
    squared = (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2
    # Winding number: signed crossings of the ray to the right, which is correct for holes and for overlaps.
    crossing_x = x0 + (y - y0) * dx / np.where(dy == 0, 1, dy)
    crossed = ((y0 <= y) != (y1 <= y)) & (crossing_x > x)
    inside = (crossed * np.sign(dy)).sum(axis=-1) != 0
    return np.sqrt(squared.min(axis=-1)) * np.where(inside, 1, -1).astype(np.float32)


@lru_cache(maxsize=1)
def _tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per typeface and digit: distance field (FIELD_SIDE, FIELD_SIDE), half box (2,) as x, y, half stroke width ()."""
    outlines = [outline(typeface, digit) for typeface in TYPEFACES for digit in range(10)]
    fields = torch.from_numpy(np.stack([distance_field(segments) for segments in outlines]))
    boxes = torch.from_numpy(np.stack([segments.max(axis=(0, 1)) for segments in outlines]))
    # Inside a stroke the distance rises linearly from the edge: its maximum is twice its mean.
    strokes = 2 * fields.clamp(min=0).sum(dim=(1, 2)) / (fields > 0).sum(dim=(1, 2))
    return tuple(table.unflatten(0, (len(TYPEFACES), 10)) for table in (fields, boxes, strokes))


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> torch.Tensor:
    """Random float32 tensor of the given shape in [low, high)."""
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))


def _shapes(rng: np.random.Generator, boxes: torch.Tensor) -> torch.Tensor:
    """Random linear maps (n, 2, 2), digit to image, that scale half boxes (n, 2) to 17.5-20.5 pixels in total."""
    n = len(boxes)
    angle, slant, aspect = rng.normal((0, 0.06, 0.1), (0.08, 0.16, 0.14), (n, 3)).clip(-0.35, 0.35).T
    cos, sin, wide = np.cos(angle), np.sin(angle), np.exp(aspect)
    # A change of width, then a slant (x moves against y, which points down), then a rotation.
    rows = [[cos * wide, -cos * slant - sin], [sin * wide, cos - sin * slant]]
    maps = torch.from_numpy(np.array(rows, dtype=np.float32)).permute(2, 0, 1)
    extent = 2 * (maps.abs() * boxes[:, None]).sum(dim=-1).amax(dim=-1)
    return maps * (_uniform(rng, 17.5, 20.5, n) / extent)[:, None, None]


def _displacements(rng: np.random.Generator, n: int) -> torch.Tensor:
    """Smooth random displacements (n, SIDE, SIDE, 2) in pixels: a shift and a distortion, at most about 3."""
    strength = rng.uniform(0.1, 1.0, (n, 1, 1, 1))
    coarse = torch.from_numpy((rng.normal(size=(n, 2, 5, 5)).clip(-1.5, 1.5) * strength).astype(np.float32))
    coarse += _uniform(rng, -0.9, 0.9, n, 2, 1, 1)
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def _sample(fields: torch.Tensor, maps: torch.Tensor, displacements: torch.Tensor) -> torch.Tensor:
    """Fields (n, FIELD_SIDE, FIELD_SIDE) sampled at mapped, displaced pixels: distances (n, SIDE, SIDE) in pixels."""
    axis = torch.arange(SIDE) + 0.5 - SIDE / 2
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1) + displacements
    inverse = torch.linalg.inv(maps) * (2 / FIELD_EXTENT)  # to grid_sample's coordinates, -1 to 1
    points = (pixels.flatten(1, 2) @ inverse.mT).unflatten(1, (SIDE, SIDE))
    sampled = F.grid_sample(fields[:, None], points, padding_mode="border", align_corners=False)
    return sampled[:, 0] * torch.linalg.det(maps).sqrt()[:, None, None]


def _draw_block(seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (BLOCK, SIDE, SIDE) uint8 and labels (BLOCK,) int64; each ten in a row hold every digit once."""
    rng = np.random.default_rng((seed, block))
    labels = rng.permuted(np.tile(np.arange(10), (BLOCK // 10, 1)), axis=1).ravel()
    typefaces = rng.integers(len(TYPEFACES), size=BLOCK)
    fields, boxes, strokes = (table[typefaces, labels] for table in _tables())
    distances = _sample(fields, _shapes(rng, boxes), _displacements(rng, BLOCK))
    # Small changes only: heavy faces must keep their thin lines, and light ones their holes.
    thicker = (_uniform(rng, 1.1, 2.1, BLOCK) - strokes).clamp(-0.3, 0.75)
    edge = _uniform(rng, 0.9, 1.7, BLOCK)
    ink = ((distances + thicker[:, None, None]) / edge[:, None, None] + 0.5).clamp(0, 1)
    return (ink * 255).round().to(torch.uint8).numpy(), labels


class Glyphs(NamedTuple):
    """Images (N, 28, 28) uint8 and labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray


def draw_glyphs(count: int, seed: int, progress: Callable = iter) -> Glyphs:
    """Draw `count` typeset digits: images (count, 28, 28) uint8 and labels (count,) int64.

    White on black as in MNIST, values 0-255, in random order; the numbers of images of two digits differ by at most
    one. seed: a non-negative integer. Image k depends on the seed and k only, not on `count` or the number of threads.
    progress: wraps the list of blocks and shows how far it is.
    """
    images = np.empty((count, SIDE, SIDE), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for start in progress(range(0, count, BLOCK)):
        wanted = min(BLOCK, count - start)
        block_images, block_labels = _draw_block(seed, start // BLOCK)
        images[start : start + wanted] = block_images[:wanted]
        labels[start : start + wanted] = block_labels[:wanted]
    return Glyphs(images, labels)
