"""Scenes: 64x64 colour pictures of one to four objects, which lie on a lit ground and cast shadows.

An object is a shape or a digit in one of eight colours. What a generator has to learn, besides what objects look like:
how many there are, that they do not overlap, and that in one picture all light comes from one side: the ground gets
darker away from it, every object is brighter on that side, and all shadows point the other way.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data_sources.glyphs import DIGIT_SIZE, FIELD_EXTENT, distance_field, outline
from runtime.cores import available_cores

SIDE = 64  # image side in pixels
MOST = 4  # objects in a picture
BLOCK = 200  # pictures drawn from one random stream; a multiple of MOST
COLOURS = {"red": (0.86, 0.13, 0.13), "orange": (0.96, 0.54, 0.07), "yellow": (0.98, 0.9, 0.16),
           "green": (0.12, 0.6, 0.22), "blue": (0.12, 0.34, 0.88), "purple": (0.48, 0.16, 0.68),
           "pink": (0.98, 0.5, 0.72), "black": (0.1, 0.1, 0.12)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
KINDS = (*SHAPES, *"0123456789")
MARKS = (*COLOURS, *KINDS)  # what can be seen in a picture, whatever the object that it belongs to
TYPEFACES = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralBol")  # of the digits
RADII = (7.5, 12.0)  # of the smallest circle around an object, in pixels
GAP = 2.0  # the least distance between these circles
PROPOSALS = 60  # random places of which an object takes the first that is free
SHADOW, SHADOW_EDGE, SHADOW_OFFSET = 0.4, 3.0, 3.0  # its darkness, and two lengths in pixels


class Scenes(NamedTuple):
    """N pictures, and what is in them. An object that is not there has colour and kind -1 and a place of zeros.

    images    (N, 3, SIDE, SIDE) uint8
    labels    (N,) int64, the number of objects less one
    colours   (N, MOST) int8, an index of COLOURS for each object
    kinds     (N, MOST) int8, an index of KINDS
    places    (N, MOST, 3) float32, in pixels: x, y of the centre, from the upper left corner, and the radius
    """

    images: np.ndarray
    labels: np.ndarray
    colours: np.ndarray
    kinds: np.ndarray
    places: np.ndarray


# --------------------------------------------------------------------------------------------------------- outlines


def _polar(radii, turns) -> np.ndarray:
    """The closed polygon (n, 2) with these distances from the origin and angles, in turns from the top."""
    angle = 2 * np.pi * np.asarray(turns)
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.broadcast_to(radii, len(angle))[:, None]


def _shape(name: str) -> np.ndarray:
    """Line segments (n, 2 ends, 2) of a shape around the origin."""
    circle = _polar(1.0, np.arange(64) / 64)
    bar = 0.34  # half the width of the cross's bars
    rings = {
        "circle": [circle],
        "square": [_polar(1.0, [0.125, 0.375, 0.625, 0.875])],
        "triangle": [_polar(1.0, [0, 1 / 3, 2 / 3])],
        "star": [_polar([1.0, 0.45] * 5, np.arange(10) / 10)],
        "cross": [np.array([(bar, -1), (bar, -bar), (1, -bar), (1, bar), (bar, bar), (bar, 1),
                            (-bar, 1), (-bar, bar), (-1, bar), (-1, -bar), (-bar, -bar), (-bar, -1)])],
        "ring": [circle, 0.5 * circle[::-1]],  # the inner one runs backwards: a hole
    }[name]
    return np.concatenate([np.stack([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in rings]).astype(np.float32)


@lru_cache(maxsize=1)
def _fields() -> torch.Tensor:
    """Distance fields (typefaces, KINDS, FIELD_SIDE, FIELD_SIDE) of objects of radius DIGIT_SIZE / 2."""
    shapes = [_shape(name) for name in SHAPES]
    outlines = [segments for face in TYPEFACES for segments in (*shapes, *(outline(face, k) for k in range(10)))]
    scaled = [segments * (DIGIT_SIZE / 2 / np.linalg.norm(segments, axis=-1).max()) for segments in outlines]
    return torch.from_numpy(np.stack([distance_field(each) for each in scaled])).unflatten(0, (len(TYPEFACES), -1))


# ---------------------------------------------------------------------------------------------------------- drawing


def _places(rng: np.random.Generator, n: int) -> np.ndarray:
    """Random places (n, MOST, 3): x, y and radius of circles within the picture that keep GAP between them."""
    radii = rng.uniform(*RADII, (n, MOST))
    places = np.zeros((n, MOST, 3))
    for k in range(MOST):
        radius = radii[:, k, None, None]
        points = radius + 1 + rng.random((n, PROPOSALS, 2)) * (SIDE - 2 * radius - 2)
        apart = np.linalg.norm(points[:, :, None] - places[:, None, :k, :2], axis=-1) - places[:, None, :k, 2]
        free = apart.min(axis=2, initial=np.inf) - radii[:, k, None] - GAP                  # (n, PROPOSALS)
        best = np.minimum(free, 0).argmax(axis=1)  # the first that is free, else the one that lacks least
        chosen = np.arange(n), best
        places[:, k] = np.column_stack([points[chosen], radii[:, k] + np.minimum(free[chosen], 0)])
    return places.astype(np.float32)


def _distances(fields: torch.Tensor, places: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Signed distances (n, SIDE, SIDE) in pixels to n objects at places (n, 3), turned by angles (n,)."""
    cos, sin = turn.cos(), turn.sin()
    rotations = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
    scale = places[:, 2] / (DIGIT_SIZE / 2)
    maps = rotations * (SIDE / FIELD_EXTENT / scale)[:, None, None]  # between grid_sample's coordinates, -1 to 1
    centres = places[:, :2] * (2 / SIDE) - 1
    grid = F.affine_grid(torch.cat([maps, -maps @ centres[:, :, None]], 2), [len(places), 1, SIDE, SIDE],
                         align_corners=False)
    sampled = F.grid_sample(fields[:, None], grid, padding_mode="border", align_corners=False)
    return sampled[:, 0] * scale[:, None, None]


def _draw_block(seed: int, block: int) -> Scenes:
    """BLOCK scenes; each MOST in a row hold every number of objects once."""
    rng = np.random.default_rng((seed, block))
    labels = rng.permuted(np.tile(np.arange(MOST), (BLOCK // MOST, 1)), axis=1).ravel()
    there = np.arange(MOST) <= labels[:, None]                                              # (BLOCK, MOST)
    kind = np.where(rng.random((BLOCK, MOST)) < 0.5, rng.integers(len(SHAPES), size=(BLOCK, MOST)),
                    rng.integers(len(SHAPES), len(KINDS), (BLOCK, MOST)))
    colour = rng.integers(len(COLOURS), size=(BLOCK, MOST))
    places = _places(rng, BLOCK)
    fields = _fields()[torch.from_numpy(rng.integers(len(TYPEFACES), size=(BLOCK, MOST))), torch.from_numpy(kind)]
    paint = np.array(list(COLOURS.values()))[colour] + rng.uniform(-0.04, 0.04, (BLOCK, MOST, 3))
    turn, angle = rng.uniform(-0.35, 0.35, (BLOCK, MOST)), rng.uniform(0, 2 * np.pi, BLOCK)
    ground = rng.uniform(0.62, 0.88, (BLOCK, 1)) + rng.uniform(-0.1, 0.1, (BLOCK, 3))
    light = np.stack([np.cos(angle), np.sin(angle)], 1)                                     # (BLOCK, 2), towards it
    parts = (torch.from_numpy(each.astype(np.float32)) for each in (places, turn, paint, ground, light))
    images = _compose(fields, torch.from_numpy(there), *parts)
    return Scenes((images.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), labels,
                  np.where(there, colour, -1).astype(np.int8), np.where(there, kind, -1).astype(np.int8),
                  np.where(there[:, :, None], places, 0))


def _compose(fields, there, places, turn, paint, ground, light) -> torch.Tensor:
    """Pictures (n, 3, SIDE, SIDE) in 0..1: the ground, the shadows on it, then the objects that are there (n, MOST)."""
    axis = torch.arange(SIDE) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)                 # (SIDE, SIDE, 2)
    facing = ((pixels - SIDE / 2)[None] * light[:, None, None]).sum(-1) / SIDE              # how near the light
    images = ground[:, :, None, None] * (1 + 0.4 * facing[:, None])
    for k in range(MOST):
        rows = there[:, k].nonzero()[:, 0]
        fallen = torch.cat([places[rows, k, :2] - SHADOW_OFFSET * light[rows], places[rows, k, 2:]], 1)
        shadow = _distances(fields[rows, k], fallen, turn[rows, k]) / SHADOW_EDGE + 0.5
        images[rows] *= 1 - SHADOW * shadow.clamp(0, 1)[:, None]
    for k in range(MOST):
        rows = there[:, k].nonzero()[:, 0]
        cover = (_distances(fields[rows, k], places[rows, k], turn[rows, k]) + 0.5).clamp(0, 1)[:, None]
        facing = ((pixels - places[rows, k, None, None, :2]) * light[rows, None, None]).sum(-1)
        facing = (facing / places[rows, k, 2:, None]).clamp(-1, 1)
        lit = paint[rows, k, :, None, None] * (1 + 0.25 * facing[:, None])
        images[rows] = images[rows] * (1 - cover) + lit * cover
    return images


def draw_scenes(count: int, seed: int, progress: Callable = iter) -> Scenes:
    """Draw `count` scenes, in random order; the numbers of pictures with two numbers of objects differ by at most one.

    seed: a non-negative integer. Picture k depends on the seed and k only, not on `count` or the number of threads.
    progress: wraps the list of blocks and shows how far it is.
    """
    scenes = Scenes(np.empty((count, 3, SIDE, SIDE), np.uint8), np.empty(count, np.int64),
                    *(np.empty((count, MOST), np.int8) for _ in range(2)), np.empty((count, MOST, 3), np.float32))
    starts = range(0, count, BLOCK)
    with ThreadPoolExecutor(available_cores()) as pool:
        blocks = pool.map(_draw_block, repeat(seed), range(len(starts)))
        for start, block in zip(progress(starts), blocks, strict=True):
            for whole, part in zip(scenes, block, strict=True):
                whole[start:start + BLOCK] = part[:count - start]
    return scenes


def marks(colours: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Which of MARKS are in each picture: (N, len(MARKS)) bool; colours and kinds (N, MOST) as in `Scenes`."""
    both = torch.cat([colours, torch.where(kinds < 0, kinds, kinds + len(COLOURS))], 1).long() + 1
    return torch.zeros(len(both), 1 + len(MARKS), dtype=torch.bool).scatter_(1, both, True)[:, 1:]
