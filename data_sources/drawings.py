"""Draw pictures as somebody with wax crayons might: boats, fish, flowers and houses on white paper.

    python -m data_sources.drawings FOLDER --count 400

They are for people who have no pictures of their own, and for measurements. The drawings differ in size, colours,
proportions and place, and are PNG or JPEG files. Their lines tremble, and their fillings do not quite meet the outline.
They go in turn into the sub-folders boat, fish, flower and house. The same seed gives the same files with the same
versions of numpy and Pillow.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from runtime.errors import UserError
from runtime.files import atomic_write, check_writable
from runtime.parser import Parser, number
from runtime.script import script

GREEN = "#3c8d3f"
PENS = ("#c8372d", "#e07b1a", "#e9b90c", GREEN, "#2f6cc0", "#6d4a9c", "#8a5a33", "#38383c")
SIDES = (240, 420)  # of the paper, in pixels
FORMATS = {"png": "PNG", "jpg": "JPEG"}
TURN = np.linspace(0, 2 * np.pi, 24, endpoint=False)


class Paper:
    """A sheet with coordinates from (0, 0) to (1, 1), on which the whole drawing is moved, turned and scaled a little.

    pen(part) is the colour of a part of the drawing, chosen at random when it is first asked for.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng, self.side, self.pens = rng, int(rng.integers(*SIDES)), {}
        shade = int(rng.integers(244, 256))
        self.image = Image.new("RGB", (self.side, int(self.side * rng.uniform(0.9, 1.1))), (shade, shade, shade - 4))
        self.draw = ImageDraw.Draw(self.image)
        angle, scale = rng.normal(0, 0.06), rng.uniform(0.75, 0.98)
        self.matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.middle = 0.5 + rng.uniform(-0.06, 0.06, 2)
        self.width = self.side * rng.uniform(0.012, 0.022)

    def pen(self, part: str) -> str:
        if part not in self.pens:
            self.pens[part] = str(self.rng.choice([pen for pen in PENS if pen not in self.pens.values()]))
        return self.pens[part]

    def place(self, points, tremble: float) -> list[tuple[float, float]]:
        """A line through points of the paper, in pixels, moved, turned and scaled with the paper.

        It has four points a segment; each trembles with the standard deviation `tremble`, in sides of the paper.
        """
        points = np.asarray(points, float)
        shares = np.linspace(0, 1, 5)[:-1, None]
        dense = np.concatenate([*(a + shares * (b - a) for a, b in itertools.pairwise(points)), points[-1:]])
        dense = self.middle + (dense - 0.5) @ self.matrix.T + self.rng.normal(0, tremble, dense.shape)
        return [tuple(point) for point in dense * self.image.size]

    def line(self, points, part: str) -> None:
        self.draw.line(self.place(points, 0.003), self.pen(part), round(self.width), joint="curve")

    def shape(self, points, part: str, filled: bool = True) -> None:
        """A closed outline in the colour of a part, filled with it or left as paper."""
        points = [*points, points[0]]
        if filled:
            self.draw.polygon(self.place(points, 0.006), self.pen(part))
        self.line(points, part)


def oval(x: float, y: float, wide: float, high: float) -> np.ndarray:
    return np.stack([x + wide * np.cos(TURN), y + high * np.sin(TURN)], 1)


def boat(paper: Paper) -> None:
    uniform, water = paper.rng.uniform, 0.78
    left, right, top, mast = uniform(0.1, 0.25), uniform(0.75, 0.9), uniform(0.55, 0.64), uniform(0.42, 0.58)
    paper.shape([(left, top), (right, top), (right - 0.1, water), (left + 0.1, water)], "hull")
    high = uniform(0.08, 0.22)
    paper.line([(mast, top), (mast, high)], "mast")
    paper.shape([(mast + 0.03, high + 0.03), (mast + 0.03, top - 0.05), (right, top - 0.05)], "sail")
    if uniform() < 0.5:
        paper.shape([(mast - 0.03, high + 0.1), (mast - 0.03, top - 0.05), (left + 0.08, top - 0.05)], "second sail")
    paper.line([(x, water + 0.06 + 0.025 * (i % 2)) for i, x in enumerate(np.linspace(0.02, 0.98, 13))], "water")


def fish(paper: Paper) -> None:
    uniform = paper.rng.uniform
    wide, high, x, tail = uniform(0.26, 0.33), uniform(0.14, 0.24), 0.44, uniform(0.1, 0.18)
    way = 1 if uniform() < 0.5 else -1

    def mirror(points):
        return [(0.5 + way * (px - 0.5), py) for px, py in points]

    paper.shape(mirror([(x + wide - 0.05, 0.5), (0.95, 0.5 - tail), (0.9, 0.5), (0.95, 0.5 + tail)]), "tail")
    paper.shape(mirror(oval(x, 0.5, wide, high)), "body")
    for i in range(int(paper.rng.integers(0, 4))):
        at = x - 0.02 + 0.09 * i
        paper.line(mirror([(at, 0.5 - 0.7 * high), (at + 0.02, 0.5), (at, 0.5 + 0.7 * high)]), "stripes")
    paper.shape(mirror(oval(x - 0.65 * wide, 0.5 - 0.25 * high, 0.022, 0.022)), "eye")
    for i in range(int(paper.rng.integers(0, 4))):
        paper.shape(mirror(oval(uniform(0.04, 0.12), 0.3 - 0.09 * i, 0.025, 0.025)), "water", filled=False)


def flower(paper: Paper) -> None:
    uniform, petals = paper.rng.uniform, int(paper.rng.integers(5, 9))
    x, y, reach = uniform(0.44, 0.56), uniform(0.28, 0.36), uniform(0.13, 0.18)
    paper.pens["leaves"] = GREEN
    paper.line([(x, y), (x + uniform(-0.05, 0.05), 0.65), (x + uniform(-0.05, 0.05), 0.95)], "leaves")
    for way in (-1, 1)[:int(paper.rng.integers(1, 3))]:
        low = uniform(0.68, 0.85)
        paper.shape([(x, low), (x + way * 0.12, low - 0.1), (x + way * 0.24, low - 0.08), (x + way * 0.12, low)],
                    "leaves")
    for angle in 2 * np.pi * (np.arange(petals) / petals + uniform()):
        size = 2.1 * reach / petals + 0.03
        paper.shape(oval(x + reach * np.cos(angle), y + reach * np.sin(angle), size, size), "petals")
    paper.shape(oval(x, y, 0.55 * reach, 0.55 * reach), "middle")


def house(paper: Paper) -> None:
    uniform = paper.rng.uniform
    left, right, top, ground = uniform(0.12, 0.24), uniform(0.76, 0.88), uniform(0.42, 0.52), uniform(0.86, 0.94)
    chimney = uniform(0.6, 0.7)
    if uniform() < 0.6:
        paper.shape([(chimney, top), (chimney, 0.12), (chimney + 0.08, 0.12), (chimney + 0.08, top)], "chimney")
    paper.shape([(left, top), (right, top), (right, ground), (left, ground)], "walls", filled=uniform() < 0.6)
    paper.shape([(left - 0.06, top), ((left + right) / 2, uniform(0.08, 0.18)), (right + 0.06, top)], "roof")
    door, middle = uniform(0.08, 0.12), (left + right) / 2
    paper.shape([(middle - door, ground), (middle - door, ground - 0.24), (middle + door, ground - 0.24),
                 (middle + door, ground)], "door")
    for x in (left + 0.11, right - 0.11):
        paper.shape([(x - 0.06, top + 0.06), (x + 0.06, top + 0.06), (x + 0.06, top + 0.17), (x - 0.06, top + 0.17)],
                    "windows")


DRAWINGS = {"boat": boat, "fish": fish, "flower": flower, "house": house}


def draw_folder(folder: Path, count: int, seed: int = 0) -> None:
    """Write the drawings 0 to count - 1 of a seed into a folder; the classes take turns."""
    for k in range(count):
        rng = np.random.default_rng((seed, k))
        name, paper = list(DRAWINGS)[k % len(DRAWINGS)], Paper(rng)
        DRAWINGS[name](paper)
        kind = str(rng.choice(list(FORMATS)))
        with atomic_write(folder / name / f"{name} {k:05d}.{kind}") as path:
            paper.image.save(path, FORMATS[kind], quality=90)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to write them; it must not exist yet, or be empty")
    parser.add_argument("--count", type=number(int, 1), default=400, help="how many drawings")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="another seed gives other drawings")
    args = parser.parse_args(argv)
    if args.folder.exists() and not (args.folder.is_dir() and not any(args.folder.iterdir())):
        raise UserError(f"{args.folder} is a file, or a folder that is not empty: name a new one, or delete it")
    return args


@script
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_writable(args.folder)
    draw_folder(args.folder, args.count, args.seed)
    print(f"Wrote {args.count:,} drawings to {args.folder}")


if __name__ == "__main__":
    sys.exit(main())
