"""How well generated points agree with real ones: the energy distance."""

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


def point_quality(path: Path, dataset: str, data_dir: str = "data", label: int | None = None) -> float:
    """1,000 times the energy distance between the points of a .npz of sample.py and the test points of a set.

    label: only the test points with this label.
    """
    with np.load(path) as file:
        made = torch.from_numpy(file["arr_0"]).flatten(1)
    data = load_dataset(dataset, "test", data_dir, points=True)
    real = (data.images if label is None else data.images[data.labels == label]).flatten(1)
    return 1000 * energy_distance(made, real[:POINTS])
