"""How well generated points agree with real ones: the energy distance, and the gap to the nearest real point."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import load_dataset

POINTS = 2000


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| of points (N, D) and (M, D): 0 for equal distributions (Székely 2003).

    The means leave out the pairs of a point with itself, so that two samples of one distribution give about 0.
    """
    def mean_within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))
    a, b = a.double(), b.double()
    return (2 * torch.cdist(a, b).mean() - mean_within(a) - mean_within(b)).item()


def relative_gap(made: Tensor, real: Tensor, others: Tensor) -> float:
    """The mean distance from points (N, D) to the nearest of `real` (M, D), divided by that of `others`, real ones too.

    1: the points lie as close to real ones as real ones do. It sees points beside the shape, which hardly change the
    energy distance. It does not see which parts of the shape are missing.
    """
    gaps = [torch.cdist(points, real).amin(1).mean() for points in (made, others)]
    return (gaps[0] / gaps[1]).item()


def point_figures(path: Path, dataset: str, data_dir: str = "data", label: int | None = None) -> dict[str, float]:
    """How the points of a .npz of sample.py agree with the test points of a set.

    distance   1,000 times the energy distance to POINTS of them; 0 is best
    gap        `relative_gap` to all of them, beside that of the validation points; 1 is best
    label: only the points with this label are real ones.
    """
    with np.load(path) as file:
        made = torch.from_numpy(file["arr_0"]).flatten(1)
    test, validation = (load_dataset(dataset, split, data_dir, points=True) for split in ("test", "validation"))
    real, others = ((data.images if label is None else data.images[data.labels == label]).flatten(1)
                    for data in (test, validation))
    return dict(distance=1000 * energy_distance(made, real[:POINTS]), gap=relative_gap(made, real, others))
