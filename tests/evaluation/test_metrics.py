"""The figures compared with closed forms, with torchmetrics and with their definitions."""

import math

import pytest
import torch

from data_sources.scenes import MARKS
from evaluation import metrics
from evaluation.metrics import (
    GROUPS,
    ImageFeatures,
    class_distance,
    class_frechet,
    closeness,
    estimate,
    figures,
    frechet_distance,
    jackknife_means,
    jackknife_radii,
    kernel_distance,
    levels,
    nearest,
    neighbour_figures,
    radii,
    random_groups,
    scene_figures,
)

kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is missing: requirements-eval.txt")
D = 8


def gaussian(count, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def classified(points):
    """ImageFeatures of points whose classes are the signs of two coordinates."""
    logits = torch.stack([sx * points[:, 0] + sy * points[:, 1] for sx in (-1, 1) for sy in (-1, 1)], 1)
    return ImageFeatures(points, (4 * logits).softmax(1))


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    x, y = gaussian(20_000, 0, mean=0.5, std=1.5).double(), gaussian(20_000, 1).double()
    value = frechet_distance(x, y, random_groups(len(x)))[0].item()
    assert value == pytest.approx(D * (0.5**2 + (1.5 - 1) ** 2), rel=0.03)


def test_the_frechet_distance_of_a_set_with_itself_is_zero():
    x = gaussian(500, 0)
    assert frechet_distance(x, x, random_groups(500))[0].abs() < 1e-6


def test_the_frechet_distance_of_two_sets_of_one_gaussian_shrinks_like_one_over_n():
    def distance(n):
        return sum(frechet_distance(gaussian(n, s), gaussian(20_000, 9), random_groups(n))[0].item() for s in range(4))
    assert distance(500) / distance(2000) == pytest.approx(4, rel=0.35)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_the_kernel_distance_is_torchmetrics_own(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_DISTANCES", 5000)  # parts of 25
    x, y = gaussian(200, 0, mean=0.2), gaussian(200, 1)
    oracle = kid.KernelInceptionDistance(feature=metrics._identity(x), subsets=1, subset_size=200)
    oracle.update(x.double(), real=False)
    oracle.update(y.double(), real=True)
    groups = random_groups(200)
    values = kernel_distance(x, y, groups)
    torch.testing.assert_close(values[0], oracle.compute()[0])
    without = kernel_distance(x[groups != 3], y, torch.arange(190) % GROUPS)[0]
    torch.testing.assert_close(values[1 + 3], without)


def test_the_kernel_distance_is_unbiased():
    values = [kernel_distance(gaussian(60, s), gaussian(80, 1000 + s), random_groups(60))[0] for s in range(100)]
    values = torch.stack(values)
    assert values.mean().abs() < 4 * values.std() / 10 and (values < 0).any()


def test_jackknife_radii_a_group_are_those_of_the_set_without_it():
    x, groups = gaussian(130, 0), random_groups(130)
    values = jackknife_radii(x, 3, groups)
    torch.testing.assert_close(values[0], radii(x, 3)[0])
    for group in (0, 7, GROUPS - 1):
        torch.testing.assert_close(values[1 + group, groups != group], radii(x[groups != group], 3)[0])
        assert (values[1 + group, groups == group] == -1).all()


def test_neighbour_figures_are_their_definitions(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_DISTANCES", 1000)  # several chunks
    x, y, groups = gaussian(90, 0, std=0.8), gaussian(70, 1), random_groups(90)
    values = neighbour_figures(x, y, groups)
    for keep, at in ((slice(None), 0), (groups != 5, 6)):
        part = x[keep].double()
        d = (y.double()[:, None] - part[None]).norm(dim=2)                                  # (real, generated)
        real = (y.double()[:, None] - y.double()[None]).norm(dim=2).sort(1).values
        own = (part[:, None] - part[None]).norm(dim=2).sort(1).values
        expected = dict(precision=(d <= real[:, [3]]).any(0).double().mean(),
                        recall=(d <= own[:, 3]).any(1).double().mean(),
                        density=(d <= real[:, [5]]).double().sum(0).mean() / 5,
                        coverage=(d <= real[:, [5]]).any(1).double().mean())
        for name, value in expected.items():
            assert values[name][at].item() == pytest.approx(value.item(), abs=1e-6), name


def test_the_density_and_coverage_of_one_distribution_are_what_naeem_et_al_derive():
    n, k = 1500, metrics.DENSITY_K
    values = neighbour_figures(gaussian(n, 0), gaussian(n, 1), random_groups(n))
    assert values["density"][0].item() == pytest.approx(1, abs=0.05)
    expected = 1 - math.prod((n - 1 - i) / (2 * n - 1 - i) for i in range(k))  # appendix: 1 - C(2n-1-k, n)/C(2n-1, n)
    assert values["coverage"][0].item() == pytest.approx(expected, abs=0.03)


def test_precision_and_recall_tell_what_is_missing():
    real = torch.cat([gaussian(400, 0, mean=-4), gaussian(400, 1, mean=4)])
    half, noisy = gaussian(800, 2, mean=4), torch.cat([real[::2] + 1e-3, gaussian(400, 3, mean=20)])
    half, noisy = (neighbour_figures(x, real, random_groups(800)) for x in (half, noisy))
    assert half["precision"][0] > 0.8 and half["recall"][0] < 0.6 and half["coverage"][0] < 0.6
    assert noisy["precision"][0] == pytest.approx(0.5, abs=0.01) and noisy["recall"][0] > 0.8


def test_class_distance_is_the_total_variation():
    one_hot, groups = torch.eye(4), random_groups(400)
    even = one_hot[torch.arange(400) % 4]
    missing = one_hot[torch.arange(400) % 3]
    assert class_distance(even, even, groups)[0] == 0
    assert class_distance(missing, even, groups)[0].item() == pytest.approx(0.25, abs=0.01)
    assert class_distance(one_hot[:1].expand(400, -1), even, groups)[0].item() == pytest.approx(0.75)


def test_the_frechet_distance_within_classes_is_the_mean_of_each_class():
    """Two classes with the closed form, of a set whose classes are all alike but for their means."""
    def classes(count, seed, stds):
        x, labels = gaussian(2 * count, seed), torch.arange(2 * count) % 2
        x = x * torch.tensor(stds)[labels, None] + 20 * labels[:, None]
        return ImageFeatures(x.double(), torch.eye(2)[labels])
    x, y = classes(10_000, 0, [1.5, 0.8]), classes(10_000, 1, [1.0, 1.0])
    value = class_frechet(x, y, random_groups(20_000))[0].item()
    assert value == pytest.approx(D * (0.5**2 + 0.2**2) / 2, rel=0.03)
    labels = x.probabilities.argmax(1)
    parts = [frechet_distance(x.features[labels == c], y.features[y.probabilities.argmax(1) == c],
                              random_groups(20_000)[labels == c]) for c in (0, 1)]
    torch.testing.assert_close(class_frechet(x, y, random_groups(20_000)), (parts[0] + parts[1]) / 2)


def test_a_class_that_is_left_out_makes_the_distance_within_classes_worse():
    def classes(labels, seed):
        return ImageFeatures(gaussian(len(labels), seed).double() + 20 * labels[:, None], torch.eye(4)[labels])
    real = classes(torch.cat([torch.arange(900) % 3, torch.full((10,), 3)]), 0)  # too few real images of class 3 count
    whole, missing = classes(torch.arange(900) % 3, 1), classes(torch.arange(900) % 2, 2)
    few = classes(torch.cat([torch.arange(881) % 2, torch.full((19,), 2)]), 3)
    values = [class_frechet(x, real, random_groups(900))[0].item() for x in (whole, missing, few)]
    assert values[0] < 0.3 and values[1] > 100 and values[2] > 100
    scarce = classes(torch.cat([torch.arange(900) % 3, torch.full((25,), 3)]), 5)  # 25 are expected: 19 are chance
    missed = classes(torch.cat([torch.arange(906) % 3, torch.full((19,), 3)]), 6)
    assert class_frechet(missed, scarce, random_groups(925))[0] < 0.3
    rare = classes(torch.full((10,), 3), 4)
    alone = class_frechet(rare, rare, torch.arange(10) % GROUPS)[0].item()  # no class counts: the whole sets
    assert alone == pytest.approx(0, abs=1e-6)


def test_levels_is_the_total_variation_of_the_histograms_and_its_jackknife():
    dark, light = (torch.full((40, 1, 4, 4), level, dtype=torch.uint8) for level in (0, 255))
    half, groups = torch.cat([dark[:, :, :2], light[:, :, :2]], 2), random_groups(40)
    assert levels(dark, dark, groups).abs().max() == 0 and (levels(dark, light, groups) == 1).all()
    assert (levels(half, dark, groups) == 0.5).all()
    images = torch.randint(0, 256, (40, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    real = images.square() % 251
    values = levels(images, real, groups)

    def direct(x):
        a, b = (torch.stack([(part == k).double().mean() for k in range(256)]) for part in (x, real))
        return (a - b).abs().sum() / 2
    torch.testing.assert_close(values[0], direct(images))
    torch.testing.assert_close(values[1 + 7], direct(images[groups != 7]))


def test_the_interval_of_a_mean_is_students():
    x = gaussian(400, 0)[:, 0].double()
    result = estimate(jackknife_means(x, torch.arange(400) % GROUPS))
    means = torch.stack([x[g::GROUPS].mean() for g in range(GROUPS)])
    assert result["value"] == pytest.approx(x.mean().item())
    assert result["high"] - result["value"] == pytest.approx(2.093 * means.std().item() / GROUPS**0.5)


def test_intervals_cover_the_mean_of_fresh_sets_of_the_same_size():
    n, trials, reference = 240, 100, classified(gaussian(600, 10**6))

    def trial(seed):
        generated, groups = classified(gaussian(n, seed, mean=0.15, std=1.1)), random_groups(n)
        values = dict(frechet_distance=frechet_distance(generated.features, reference.features, groups),
                      kernel_distance=kernel_distance(generated.features, reference.features, groups),
                      class_distance=class_distance(generated.probabilities, reference.probabilities, groups),
                      class_frechet=class_frechet(generated, reference, groups),
                      confident=jackknife_means(generated.probabilities.amax(1) > 0.9, groups),
                      **neighbour_figures(generated.features, reference.features, groups))
        return {name: estimate(value) for name, value in values.items()}
    results = [trial(seed) for seed in range(trials)]
    for name in results[0]:
        mean = sum(r[name]["value"] for r in results) / trials
        covered = sum(r[name]["low"] <= mean <= r[name]["high"] for r in results) / trials
        assert 0.88 <= covered <= 1, f"{name}: 95 % intervals cover in {covered:.1%} of {trials} trials"


def scenes(*rows):
    """ImageFeatures of scenes (number of objects, colours that are there, a colour that is unclear), each 25 times."""
    probabilities, marks = torch.full((len(rows), 4), 0.02), torch.full((len(rows), len(MARKS)), 0.02)
    for row, (number, colours, unclear) in enumerate(rows):
        probabilities[row, number - 1], marks[row, list(colours)] = 0.94, 0.98
        if unclear is not None:
            marks[row, unclear] = 0.7
    return ImageFeatures(gaussian(25 * len(rows), 0), probabilities.repeat(25, 1), None, marks.repeat(25, 1))


def test_a_scene_is_right_with_the_asked_number_of_objects_in_clear_colours():
    found = scenes((1, [0], None), (2, [0, 5], None), (2, [3], None),  # the third has two objects of one colour
                   (2, [1, 2, 3], None), (3, [], None), (4, [1, 2], 4), (3, [1], None))
    labels, groups = torch.tensor([0, 1, 1, 1, 2, 3, 0]).repeat(25), random_groups(175)
    assert scene_figures(found, found, labels, groups)["scene_right"][0] == pytest.approx(3 / 7)
    assert scene_figures(found, found, None, groups).keys() == {"mark_distance"}
    assert set(scene_figures(found, found, labels, groups)) < set(metrics.BETTER) & set(metrics.SHARES)


def test_mark_distance_is_the_mean_difference_of_the_shares_of_the_marks():
    half, whole = scenes((1, [0], None), (1, [1], None)), scenes((1, [0], None))
    found = scene_figures(half, whole, None, random_groups(50))["mark_distance"]
    assert found.shape == (GROUPS + 1,) and found[0].item() == pytest.approx((0.5 + 0.5) / len(MARKS))
    assert scene_figures(half, half, None, random_groups(50))["mark_distance"][0] == 0


def test_figures_of_the_real_thing_are_near_their_best():
    real = classified(gaussian(2000, 0))
    images = torch.randint(0, 256, (3000, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    result = figures(classified(gaussian(1000, 1)), real, real.probabilities.argmax(1)[:1000],
                     (images[:1000], images[1000:]))
    assert set(result) == {"frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage",
                           "confident", "class_distance", "asked_class", "class_frechet", "levels"}
    assert all(f["low"] <= f["value"] <= f["high"] and f["n"] == 1000 for f in result.values())
    assert result["frechet_distance"]["value"] < 0.1 and abs(result["kernel_distance"]["value"]) < 0.05
    assert result["precision"]["value"] > 0.8 and result["recall"]["value"] > 0.8
    assert result["class_frechet"]["value"] < 0.2 and result["levels"]["value"] < 0.05


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match=r"at least 120 images .* not 100"):
        figures(classified(gaussian(100, 0)), classified(gaussian(1000, 1)))


def test_the_nearest_image_is_found_exactly_however_many_are_compared_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(0, 256, (5000, 1, 6, 6), generator=generator, dtype=torch.uint8)
    queries = torch.cat([points[[17, 4321]], torch.randint(0, 256, (50, 1, 6, 6), generator=generator,
                                                           dtype=torch.uint8)])
    distance, index = nearest(queries, points)
    expected = torch.cdist(queries.flatten(1).double() / 255, points.flatten(1).double() / 255).min(1)
    assert index[:2].tolist() == [17, 4321] and distance[:2].tolist() == [0, 0]
    torch.testing.assert_close(distance, expected.values)
    monkeypatch.setattr(metrics, "NEAREST_VALUES", 36 * 30)  # 30 images at a time, as of large ones
    assert all(torch.equal(*both) for both in zip(nearest(queries, points), (distance, index), strict=True))


def test_a_copying_generator_is_caught_and_an_honest_one_is_not():
    train = gaussian(3000, 0)
    real, honest = gaussian(1000, 1), gaussian(1000, 2)
    copies = train[:1000] + 1e-4
    to_train = [nearest(x, train)[0] for x in (real, honest, copies, train[:1000])]
    assert closeness(to_train[1], to_train[0])["closer_than_99_percent"] < 0.03
    assert closeness(to_train[2], to_train[0])["closer_than_any_real"] == 1
    assert closeness(to_train[3], to_train[0])["copies"] == 1


@pytest.mark.parametrize("count", [20, 80, 1000])
def test_the_share_that_is_expected_is_what_honest_distances_have(count):
    distances = torch.rand(2000, 2, count, generator=torch.Generator().manual_seed(0)).double()
    reports = [closeness(generated, real) for generated, real in distances]
    shares = torch.tensor([report["closer_than_99_percent"] for report in reports])
    assert abs(shares.mean() - reports[0]["expected"]) < 3 * shares.std() / len(shares)**0.5 + 1e-4
