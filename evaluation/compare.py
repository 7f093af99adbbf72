"""Two sets of images compared figure by figure, with the interval of each difference."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from checkpoint import SAFETENSORS
from data import ImageData
from data_sources.cache import about
from evaluation.metrics import bounded_estimate, estimate
from runtime.errors import UserError


def is_ready(path: str | Path) -> bool:
    """Whether `path` names ready images, a .npz or a folder, and not a checkpoint."""
    path = Path(path)
    return path.suffix == ".npz" or (path.is_dir() and not (path / SAFETENSORS).is_file())


def check_comparable(paths: Sequence, data: Sequence[ImageData], counts: Sequence[int]) -> None:
    """UserError unless both sets are of one data set, read in one way, and have the same number of images.

    paths, data, counts: of each set its name, the real images that it is compared with, and its number of images.
    """
    first, second = data
    pictures = [about(each.folder)["digest"] if each.folder else None for each in data]
    if first.name != second.name and (pictures[0] != pictures[1] or not pictures[0]):
        raise UserError(f"{paths[0]} is of {first.name} and {paths[1]} of {second.name}: compare two of one data set")
    if pictures[0] != pictures[1]:
        raise UserError(f"{paths[0]} and {paths[1]} learned from different pictures, or from the same ones read in "
                        f"different ways ({first.folder} and {second.folder}): compare two of one data set")
    if counts[0] != counts[1]:
        raise UserError(f"{paths[0]} has {counts[0]:,} images and {paths[1]} has {counts[1]:,}: figures depend on the "
                        f"number, so give as many of both (with --num_images)")


def paired_difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """{"value", "low", "high"}: b - a and its 95 % interval, for a figure of two sets of N images each.

    a, b (G + 1,): the figure of all images, then without each of G random groups, the same groups for both sets. Let
    x_k and y_k be image k of the two. Without group g, both figures lack the same pairs (x_k, y_k), so that

        D_g = F(y without g) - F(x without g),   D = F(y) - F(x)

    are the values of one figure, D, of N independent pairs. The delete-a-group jackknife of `estimate` then gives

        se²(D) = (G - 1) / G · Σ_g (D_g - mean D_g)² = se²(F(x)) + se²(F(y)) - 2 cov(F(x), F(y)),

    where cov is (G - 1) / G · Σ_g of the products of the deviations. Image k of two checkpoints is made from the same
    noise and for the same label: the covariance is positive, and the interval shorter than that of two independent
    sets. For independent sets the covariance is 0 on average, and the interval is right as well.
    """
    return estimate(b - a)


def comparison(a: Mapping[str, Tensor], b: Mapping[str, Tensor], floor: Mapping[str, dict]) -> dict[str, dict]:
    """Each figure that both sets have: {"a", "b", "difference", "floor", "differs"}.

    a, b: the values (G + 1,) of each figure, as of `figure_values`. floor: the figures of real images. differs: whether
    the interval of the difference excludes 0.
    """
    rows = {}
    for name in (name for name in a if name in b):
        difference = paired_difference(a[name], b[name])
        rows[name] = dict(a=bounded_estimate(name, a[name]), b=bounded_estimate(name, b[name]), difference=difference,
                          floor=floor[name]["value"] if name in floor else None,
                          differs=difference["low"] > 0 or difference["high"] < 0)
    return rows


def print_comparison(rows: Mapping[str, dict], paths, n: int) -> None:
    """Print the table: one line for each figure, with a * where the interval of the difference excludes 0."""
    print(f"A: {paths[0]}\nB: {paths[1]}\nn: {n:,} images each")
    print(f"{'':21} {'A':>9} {'B':>9} {'floor':>9}   {'B - A':>9}   {'95 % interval':^19}")
    for name, row in rows.items():
        floor, d = "-" if row["floor"] is None else f"{row['floor']:.4f}", row["difference"]
        print(f"{name:21} {row['a']['value']:9.4f} {row['b']['value']:9.4f} {floor:>9}   {d['value']:+9.4f}   "
              f"{d['low']:+9.4f}{d['high']:+10.4f} {'*' if row['differs'] else ''}".rstrip())
    print("*: the interval excludes 0. Of 20 figures without a difference, one has a * on average, two_sample_* "
          "more often: a network of its own judges each set.")
