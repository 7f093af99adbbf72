"""The difference between two sets of images: its interval is that of paired values, and it covers what it should."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation import compare
from evaluation.compare import check_comparable, comparison, is_ready, paired_difference, print_comparison
from evaluation.metrics import (
    GROUPS,
    T_QUANTILE,
    ImageFeatures,
    estimate,
    figure_values,
    jackknife_means,
    kernel_distance,
    random_groups,
)
from runtime.errors import UserError

pytest.importorskip("torchmetrics", reason="torchmetrics is missing: pip install -r requirements-eval.txt")
D = 6


def gaussian(count, seed):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def classified(points):
    """ImageFeatures of points whose classes are the signs of the first coordinate; the second features are the same."""
    return ImageFeatures(points, torch.stack([-4 * points[:, 0], 4 * points[:, 0]], 1).softmax(1), points)


def test_the_interval_of_a_difference_of_means_is_students_of_the_paired_differences():
    x, y = gaussian(400, 0)[:, 0].double(), gaussian(400, 1)[:, 0].double()
    groups = random_groups(400)
    result = paired_difference(jackknife_means(x, groups), jackknife_means(y, groups))
    means = torch.stack([(y - x)[groups == g].mean() for g in range(GROUPS)])
    assert result["value"] == pytest.approx((y - x).mean().item())
    assert result["high"] - result["value"] == pytest.approx(T_QUANTILE * means.std().item() / GROUPS**0.5)


def test_the_variance_of_the_difference_is_the_sum_of_both_less_twice_the_covariance():
    a, b = torch.randn(2, GROUPS + 1, generator=torch.Generator().manual_seed(0)).double()
    def error(values):
        return (estimate(values)["high"] - estimate(values)["value"]) / T_QUANTILE
    deviations = [values[1:] - values[1:].mean() for values in (a, b)]
    covariance = (GROUPS - 1) / GROUPS * (deviations[0] * deviations[1]).sum().item()
    difference = paired_difference(a, b)
    assert ((difference["high"] - difference["value"]) / T_QUANTILE)**2 == pytest.approx(
        error(a)**2 + error(b)**2 - 2 * covariance)


def test_a_set_does_not_differ_from_itself_and_b_minus_a_is_the_negative_of_a_minus_b():
    reference = classified(gaussian(600, 9))
    x, y = (figure_values(classified(scale * gaussian(240, 0)), reference) for scale in (1, 1.3))
    for row in comparison(x, x, {}).values():
        assert row["difference"] == dict(value=0, low=0, high=0) and not row["differs"] and row["floor"] is None
    there, back = comparison(x, y, {}), comparison(y, x, {})
    assert there["autoencoder_distance"]["differs"] and there["frechet_distance"]["differs"]
    for name, row in there.items():
        assert row["difference"]["low"] == pytest.approx(-back[name]["difference"]["high"])
        assert row["differs"] == back[name]["differs"]


def test_only_figures_that_both_have_are_compared():
    reference, points = classified(gaussian(600, 9)), classified(gaussian(240, 0))
    with_labels, without = (figure_values(points, reference, labels) for labels in (torch.zeros(240).long(), None))
    assert "asked_class" in with_labels and "asked_class" not in comparison(with_labels, without, {})


def test_intervals_of_differences_cover_their_mean_and_are_short_for_images_of_the_same_noise():
    """Over 200 pairs of sets of a common cause; the sum of two variances, which ignores it, would be far too large."""
    trials, count, reference = 200, 240, classified(gaussian(300, 10**6))
    groups = random_groups(count)

    def values(points):
        return dict(kernel_distance=kernel_distance(points, reference.features, groups),
                    confident=jackknife_means(classified(points).probabilities.amax(1) > 0.99, groups))

    def trial(seed):
        noise = gaussian(count, seed)
        a, b = (1.05 * noise + 0.1 * gaussian(count, 10**4 * i + seed) for i in (1, 2))
        return comparison(values(a), values(1.02 * b), {})
    results = [trial(seed) for seed in range(trials)]
    for name in results[0]:
        differences = [r[name]["difference"] for r in results]
        mean = sum(d["value"] for d in differences) / trials
        covered = sum(d["low"] <= mean <= d["high"] for d in differences) / trials
        assert 0.88 <= covered <= 1, f"{name}: {covered:.1%}"
    width = sum(d["high"] - d["low"] for d in (r["kernel_distance"]["difference"] for r in results))
    unpaired = sum(math.hypot(*(r["kernel_distance"][s]["high"] - r["kernel_distance"][s]["value"] for s in "ab"))
                   for r in results)
    assert width / 2 < 0.5 * unpaired


def test_the_mark_stands_where_the_interval_excludes_zero(capsys):
    rows = comparison(dict(same=torch.ones(GROUPS + 1), less=torch.ones(GROUPS + 1)),
                      dict(same=torch.ones(GROUPS + 1), less=torch.zeros(GROUPS + 1)), dict(less=dict(value=0.5)))
    print_comparison(rows, ("one.pt", "two.pt"), 300)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["less"].endswith("*") and not lines["same"].endswith("*") and "-1.0000" in lines["less"]
    assert lines["A:"].endswith("one.pt") and "0.5000" in lines["less"]


@pytest.mark.parametrize("names, digests, counts, word", [
    (("mnist", "glyphs"), (None, None), (5, 5), "mnist"), (("mnist", "mnist"), (None, None), (5, 6), "--num_images"),
    (("my_pets", "my_pets"), ("1", "2"), (5, 5), "different"), (("my_pets", "my_cars"), ("1", "2"), (5, 5), "my_cars"),
    (("my_pets", "mnist"), ("1", None), (5, 5), "mnist"),
    (("mnist", "mnist"), (None, None), (5, 5), None), (("my_pets", "my_copies"), ("1", "1"), (5, 5), None)])
def test_what_cannot_be_compared_is_refused(monkeypatch, names, digests, counts, word):
    """The same pictures in another folder, or read again, can be compared."""
    monkeypatch.setattr(compare, "about", lambda folder: dict(digest=folder.name))
    data = [SimpleNamespace(name=name, folder=digest and Path(digest))
            for name, digest in zip(names, digests, strict=True)]
    if word is None:
        return check_comparable(("a.pt", "b.pt"), data, counts)
    with pytest.raises(UserError, match=word):
        check_comparable(("a.pt", "b.pt"), data, counts)


def test_a_folder_and_an_npz_are_ready_images(tmp_path):
    assert is_ready(tmp_path) and is_ready("x.npz") and not is_ready("x.pt")
    (tmp_path / "model.safetensors").touch()
    assert not is_ready(tmp_path)  # a model of export.py
