"""The figures: features of generated images compared with those of real images.

    frechet_distance   distance between two Gaussians fitted to the features             lower is better, 0 best
    kernel_distance    distance without the Gaussian assumption; unbiased, can be < 0    lower is better, 0 best
    precision          share of generated images that lie among the real ones            higher is better, 1 best
    recall             share of real images that lie among the generated ones            higher is better, 1 best
    density            density of real images around a generated image                   about 1 for real images
    coverage           share of real images with a generated image close to them         higher is better, 1 best
    confident          share of images whose class probability is above 0.9              as for real images
    class_distance     difference between the shares of the classes and the real shares  lower is better, 0 best
    asked_class        share of images that show the requested class                     higher is better, 1 best
    class_frechet      Fréchet distance within each class, averaged over the classes     lower is better, 0 best
    levels             difference between the histograms of the 256 grey levels          lower is better, 0 best
    scene_right        share of scenes with the asked number of objects, of clear colours higher is better, 1 best
    mark_distance      difference between the shares of scenes with each colour and kind lower is better, 0 best

autoencoder_distance, autoencoder_precision and autoencoder_recall are frechet_distance, precision and recall in the
features of a second network, which was trained without labels: those of a classifier need not change where a class
loses its variety, or all strokes get thicker. Two more, two_sample_pixels and two_sample_shapes, are in
evaluation/two_sample.py.

Every figure is computed from all N generated images, and then again without each of GROUPS random groups of them: a
jackknife, whose spread gives the interval (`estimate`). The reference images stay the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_sources.scenes import COLOURS
from runtime.errors import UserError

Progress = Callable  # wraps an iterable and shows how far it is, as tqdm does

GROUPS, T_QUANTILE = 20, 2.093  # the 97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom
PRECISION_K, DENSITY_K = 3, 5  # number of neighbours: Kynkäänniemi et al. 2019, section 3; Naeem et al. 2020, section 4
CONFIDENT = 0.9  # the least class probability of a confident classification
MAX_DISTANCES = 2**20  # computed at a time: 8 MB in float64
NEAREST_ROWS, NEAREST_VALUES = 2000, 2**25  # images and values that `nearest` compares with as many others at a time
CLASS_IMAGES = 20  # a class with fewer generated images cannot be measured by itself, in `class_frechet`
MAX_CLASS_FEATURES = 512  # more features than a class has images: no `class_frechet`
SHARES = ("precision", "recall", "coverage", "confident", "class_distance", "asked_class", "levels",
          "autoencoder_precision", "autoencoder_recall", "two_sample_pixels", "two_sample_shapes", "scene_right",
          "mark_distance")  # figures in 0..1
# Which way is better: 1 higher, -1 lower, 0 as for real images.
BETTER = dict(frechet_distance=-1, kernel_distance=-1, precision=1, recall=1, density=0, coverage=1, confident=0,
              class_distance=-1, asked_class=1, class_frechet=-1, levels=-1, autoencoder_distance=-1,
              autoencoder_precision=1, autoencoder_recall=1, two_sample_pixels=-1, two_sample_shapes=-1, cas=1,
              bits_per_dim=-1, scene_right=1, mark_distance=-1)


class ImageFeatures(NamedTuple):
    """What networks say of N images: features (N, D) float32 and class probabilities (N, classes), on the CPU.

    second (N, D2) float32: the features of the autoencoder, or None.
    marks (N, num_marks) float32: how likely each mark is in each image, 0..1, or None where the data has none.
    """

    features: Tensor
    probabilities: Tensor
    second: Tensor | None = None
    marks: Tensor | None = None


def torchmetrics_image():
    """torchmetrics.image with its fid and kid. UserError if torchmetrics is not installed."""
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.kid
    except ImportError as error:
        raise UserError("evaluate.py needs torchmetrics: pip install -r requirements-eval.txt") from error
    return torchmetrics.image


# -------------------------------------------------------------------------------------------- the interval of a figure


def random_groups(count: int, seed: int = 0) -> Tensor:
    """The group 0..GROUPS-1 of each of `count` images (count,): random, of sizes that differ by at most one."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % GROUPS


def estimate(values: Tensor, lowest: float = -math.inf, highest: float = math.inf) -> dict[str, float]:
    """{"value", "low", "high"}: a figure and the 95 % interval of its mean over new sets of as many images.

    values (G + 1,): the figure of all images, then without each of G groups. The delete-a-group jackknife (Kott 2001):
        se² = (G - 1) / G · Σ_g (F_without_g - mean)²,   interval = F ± t · se  with t of G - 1 degrees of freedom.
    A bootstrap would count images twice, and copies raise a Fréchet distance and change neighbourhoods. A figure that
    depends on N is biased as the floor is, which is of the same N. The interval is clipped to lowest..highest.
    """
    value, without = values[0].item(), values[1:].double()
    error = math.sqrt((GROUPS - 1) / GROUPS * (without - without.mean()).square().sum().item())
    return dict(value=value, low=max(lowest, value - T_QUANTILE * error), high=min(highest, value + T_QUANTILE * error))


def jackknife_means(values: Tensor, groups: Tensor) -> Tensor:
    """The mean of values (N,) over all images, then without each group: (G + 1,)."""
    values = values.double()
    sums = torch.zeros(GROUPS, dtype=torch.float64).index_add_(0, groups, values)
    sizes = groups.bincount(minlength=GROUPS)
    return torch.cat([values.mean()[None], (sums.sum() - sums) / (len(values) - sizes)])


# ------------------------------------------------------------------------------------- distances between two sets


def _identity(features: Tensor) -> nn.Module:
    """A feature module for torchmetrics that returns its input, for features that are computed already."""
    module = nn.Identity()
    module.num_features = features.shape[1]  # else torchmetrics calls the module with images of 299 × 299
    return module


def frechet_distance(generated: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """|mu - mu'|² + tr(S + S' - 2 (S S')^(1/2)), the squared Fréchet distance between two Gaussians: (G + 1,).

    Heusel et al. 2017, eq. 6, by torchmetrics in float64. generated (N, D), reference (M, D); at least 0. It is biased
    upwards by about const / N: compare figures of the same N only.
    """
    distance = torchmetrics_image().fid.FrechetInceptionDistance
    metric = distance(feature=_identity(reference), reset_real_features=False, sync_on_compute=False)
    metric.update(reference.double(), real=True)
    values = []
    for left_out in range(-1, GROUPS):  # -1: none
        metric.update(generated[groups != left_out].double(), real=False)
        values.append(metric.compute())
        metric.reset()
    return torch.stack(values).cpu()


def kernel_distance(generated: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """The squared maximum mean discrepancy, unbiased, with the kernel k(x, y) = (x·y / D + 1)³: (G + 1,).

    mean of k(x, x') over pairs of generated images + the same of real ones - 2 · mean of k(x, y). Bińkowski et al.
    2018, section 4. torchmetrics' KernelInceptionDistance estimates it from random subsets; here all images are used.
    generated (N, D), reference (M, D). It can be negative.
    """
    poly_kernel = torchmetrics_image().kid.poly_kernel
    generated, reference, member = generated.double(), reference.double(), F.one_hot(groups, GROUPS).double()
    fake, cross, real = torch.zeros(GROUPS, GROUPS).double(), torch.zeros(GROUPS).double(), 0.0
    at_once = max(1, MAX_DISTANCES // max(len(generated), len(reference)))
    for rows in torch.arange(len(generated)).split(at_once):
        kernel = poly_kernel(generated[rows], generated)                                    # (rows, N)
        kernel[torch.arange(len(rows)), rows] = 0  # pairs of different images only
        fake += member[rows].T @ (kernel @ member)
        cross += member[rows].T @ poly_kernel(generated[rows], reference).sum(1)
    for rows in torch.arange(len(reference)).split(at_once):
        kernel = poly_kernel(reference[rows], reference)
        real += kernel.sum() - kernel[torch.arange(len(rows)), rows].sum()
    m, sizes = len(reference), groups.bincount(minlength=GROUPS)
    n = torch.cat([torch.tensor([len(generated)]), len(generated) - sizes])
    fakes = torch.cat([torch.zeros(1), fake.sum(1) + fake.sum(0) - fake.diagonal()])  # pairs with an image of the group
    crosses = torch.cat([torch.zeros(1), cross])
    return ((fake.sum() - fakes) / (n * (n - 1)) + real / (m * (m - 1)) - 2 * (cross.sum() - crosses) / (n * m))


# ---------------------------------------------------------------------------------------------------- neighbourhoods


def distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances between a (N, D) and b (M, D), a few rows at a time: yields (rows, (rows, M) float64)."""
    b, rows = b.double(), max(1, MAX_DISTANCES // len(b))
    for start in range(0, len(a), rows):
        part = slice(start, min(start + rows, len(a)))
        yield part, torch.cdist(a[part].double(), b)


def _exclude_self(part: slice, distance: Tensor) -> Tensor:
    """Distances within one set, with the distance of each point from itself set to infinity."""
    rows = torch.arange(len(distance))
    distance[rows, rows + part.start] = math.inf
    return distance


def radii(points: Tensor, *ks: int) -> Tensor:
    """The distance from each point (N, D) to its k-th nearest other one, for each k: (len(ks), N)."""
    near = torch.empty(len(points), max(ks), dtype=torch.float64)  # allocated once: less memory
    for part, d in distances(points, points):
        near[part] = _exclude_self(part, d).topk(max(ks), largest=False).values
    return near[:, [k - 1 for k in ks]].T


def jackknife_radii(points: Tensor, k: int, groups: Tensor) -> Tensor:
    """`radii` among all points, then without each group: (G + 1, N); -1 for the points of the group left out."""
    members = [(groups == g).nonzero()[:, 0] for g in range(GROUPS)]
    result = torch.empty(GROUPS + 1, len(points), dtype=torch.float64)
    owner = torch.arange(GROUPS).repeat_interleave(torch.tensor([min(k, len(m)) for m in members]))
    for part, d in distances(points, points):
        d = _exclude_self(part, d)
        near = torch.cat([d[:, m].topk(min(k, len(m)), largest=False).values for m in members], 1)  # (rows, G · k)
        result[:, part] = torch.stack([near[:, owner != g].kthvalue(k).values for g in range(-1, GROUPS)])
    result[groups + 1, torch.arange(len(points))] = -1
    return result


def neighbour_figures(generated: Tensor, reference: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """precision, recall, density and coverage, each (G + 1,), from balls whose radius is the k-th neighbour's distance.

        precision   share of generated points within any real point's ball,  k = 3   (Kynkäänniemi et al. 2019, eq. 2)
        recall      share of real points within any generated point's ball,  k = 3   (ibid.)
        density     real balls that a generated point lies in, divided by k, k = 5   (Naeem et al. 2020, eq. 3)
        coverage    share of real balls with a generated point inside,       k = 5   (ibid., eq. 4)
    generated (N, D), reference (M, D).
    """
    real, own = radii(reference, PRECISION_K, DENSITY_K), jackknife_radii(generated, PRECISION_K, groups)
    member = F.one_hot(groups, GROUPS).float()                                              # (N, G)
    precise, dense = torch.zeros(len(generated), dtype=torch.bool), torch.zeros(len(generated))
    recalled, covered = torch.zeros(GROUPS + 1), torch.zeros(GROUPS + 1)
    for part, d in distances(reference, generated):                                         # (rows, N)
        precise |= (d <= real[0, part, None]).any(0)
        inside = (d <= real[1, part, None]).float()
        dense += inside.sum(0)
        hits = inside @ member                                                              # (rows, G)
        total = hits.sum(1, keepdim=True)
        covered += (torch.cat([total, total - hits], 1) > 0).sum(0)
        recalled += torch.stack([(d <= radius).any(1).sum() for radius in own])
    return dict(precision=jackknife_means(precise, groups), recall=recalled / len(reference),
                density=jackknife_means(dense / DENSITY_K, groups), coverage=covered / len(reference))


# ------------------------------------------------------------------------------------------------------ class figures


def class_shares(probabilities: Tensor) -> Tensor:
    """The share of images whose most probable class is each class: (classes,) float64."""
    return probabilities.argmax(1).bincount(minlength=probabilities.shape[1]).double() / len(probabilities)


def named_shares(class_names: Sequence[str], probabilities: Tensor) -> dict[str, float]:
    """`class_shares` by the names of the classes; nothing for pictures without classes."""
    return dict(zip(class_names, class_shares(probabilities).tolist(), strict=True)) if class_names else {}


def class_distance(probabilities: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """½ Σ_c |share of class c - its share of the reference|, the total variation distance, 0..1: (G + 1,).

    Both shares are those of the classifier, so that its errors do not count as a difference.
    """
    shares = torch.stack([class_shares(probabilities[groups != g]) for g in range(-1, GROUPS)])
    return (shares - class_shares(reference)).abs().sum(1) / 2


def class_frechet(generated: ImageFeatures, reference: ImageFeatures, groups: Tensor) -> Tensor:
    """The mean over the classes of `frechet_distance` between the images of one class: (G + 1,).

    The class of an image, real or generated, is its most probable one. So a lack of variety within the classes is seen
    by itself, which the differences between the classes hide in the distance of the whole sets. A class counts if it
    has CLASS_IMAGES real images or more, and if its share of the real ones would give it twice as many generated ones.
    If it has fewer than CLASS_IMAGES of these, it is compared with all generated images: so leaving it out makes the
    figure worse, and chance hardly does. The fewer images in a class, the larger the bias: compare with the floor.
    """
    classes, real_classes = generated.probabilities.argmax(1), reference.probabilities.argmax(1)
    distances = []
    for label in range(generated.probabilities.shape[1]):
        real, chosen = real_classes == label, classes == label
        if real.sum() < CLASS_IMAGES or real.double().mean() * len(classes) < 2 * CLASS_IMAGES:
            continue
        if chosen.sum() < CLASS_IMAGES:
            chosen = torch.ones_like(chosen)
        distances.append(frechet_distance(generated.features[chosen], reference.features[real], groups[chosen]))
    if not distances:
        return frechet_distance(generated.features, reference.features, groups)
    return torch.stack(distances).mean(0)


# -------------------------------------------------------------------------------------------------------- grey levels


def level_counts(images: Tensor, groups: Tensor | None = None) -> Tensor:
    """How often each of the 256 levels occurs in uint8 images (N, C, H, W), by group: (G, 256); one row if None."""
    parts = [images] if groups is None else [images[groups == g] for g in range(GROUPS)]
    return torch.stack([part.flatten().bincount(minlength=256) for part in parts]).double()


def levels(generated: Tensor, reference: Tensor, groups: Tensor) -> Tensor:
    """½ Σ_k |share of level k among the pixels - its share in the reference|, 0..1: (G + 1,).

    The total variation distance of the histograms of the 256 grey levels, all channels together. It sees a haze over
    the background that is too weak for an eye or for a classifier. uint8 images (N, C, H, W) and (M, C, H, W).
    """
    counts = level_counts(generated, groups)
    counts = torch.cat([counts.sum(0, keepdim=True), counts.sum(0) - counts])               # (G + 1, 256)
    shares, real = counts / counts.sum(1, keepdim=True), level_counts(reference)[0]
    return (shares - real / real.sum()).abs().sum(1) / 2


# ---------------------------------------------------------------------------------------------------- all figures


def check_image_count(count: int, num_features: int) -> None:
    """UserError if `count` images are too few for a covariance of so many features, also without one group."""
    needed = 2 * max(num_features, GROUPS * PRECISION_K)
    if count < needed:
        raise UserError(f"the figures need at least {needed} images (twice the number of features), not {count}: "
                        f"give more, or a larger --num_images")


def figures(generated: ImageFeatures, reference: ImageFeatures, labels: Tensor | None = None,
            images: tuple[Tensor, Tensor] | None = None) -> dict[str, dict]:
    """Every figure by its name: {"value", "low", "high", "n"}; arguments and errors as in `figure_values`."""
    count = len(generated.features)
    return {name: dict(bounded_estimate(name, values), n=count)
            for name, values in figure_values(generated, reference, labels, images).items()}


def bounded_estimate(name: str, values: Tensor) -> dict[str, float]:
    """`estimate` of the values (G + 1,) of the figure `name`, with the interval clipped to the figure's range."""
    lowest = {"kernel_distance": -math.inf}
    return estimate(values, lowest.get(name, 0.0), 1.0 if name in SHARES else math.inf)


def figure_values(generated: ImageFeatures, reference: ImageFeatures, labels: Tensor | None = None,
                  images: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """Every figure by its name: of all images, then without each of the `random_groups`: (G + 1,).

    asked_class needs the requested labels (N,); levels needs the uint8 `images`, the generated and those of the
    reference. UserError if there are too few images (`check_image_count`).
    """
    count = len(generated.features)
    check_image_count(count, generated.features.shape[1])
    check_image_count(len(reference.features), generated.features.shape[1])
    groups = random_groups(count)
    values = dict(frechet_distance=frechet_distance(generated.features, reference.features, groups),
                  kernel_distance=kernel_distance(generated.features, reference.features, groups),
                  **neighbour_figures(generated.features, reference.features, groups),
                  confident=jackknife_means(generated.probabilities.amax(1) > CONFIDENT, groups),
                  class_distance=class_distance(generated.probabilities, reference.probabilities, groups))
    if generated.probabilities.shape[1] == 1:  # pictures without classes
        del values["confident"], values["class_distance"]
        labels = None
    elif generated.features.shape[1] <= MAX_CLASS_FEATURES:
        values["class_frechet"] = class_frechet(generated, reference, groups)
    if images is not None:
        values["levels"] = levels(*images, groups)
    if generated.second is not None:
        values |= second_figures(generated.second, reference.second, groups)
    if labels is not None:
        values["asked_class"] = jackknife_means(generated.probabilities.argmax(1) == labels, groups)
    if generated.marks is not None:
        values |= scene_figures(generated, reference, labels, groups)
    return values


def second_figures(generated: Tensor, reference: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """autoencoder_distance, _precision and _recall, each (G + 1,), of the autoencoder's features (N, D), (M, D)."""
    shares = neighbour_figures(generated, reference, groups)
    return dict(autoencoder_distance=frechet_distance(generated, reference, groups),
                autoencoder_precision=shares["precision"], autoencoder_recall=shares["recall"])


def scene_figures(generated: ImageFeatures, reference: ImageFeatures, labels: Tensor | None,
                  groups: Tensor) -> dict[str, Tensor]:
    """scene_right and mark_distance, each (G + 1,), of scenes (`data_sources.scenes`), by what the classifier sees.

        scene_right     share of images with the asked number of objects, and with at least one and at most so many
                        colours, each clearly there or clearly not (with a probability above CONFIDENT or below
                        1 - CONFIDENT); only with labels
        mark_distance   mean over the marks of |share of images that have it - its share of the reference|
    """
    count, marks = generated.probabilities.argmax(1) + 1, generated.marks > 0.5
    colours = marks[:, :len(COLOURS)].sum(1)
    clear = ((generated.marks[:, :len(COLOURS)] - 0.5).abs() > CONFIDENT - 0.5).all(1)
    shares = torch.stack([jackknife_means(mark, groups) for mark in marks.T], 1)            # (G + 1, marks)
    values = {}
    if labels is not None:
        right = (count == labels + 1) & clear & (colours >= 1) & (colours <= count)
        values["scene_right"] = jackknife_means(right, groups)
    return values | dict(mark_distance=(shares - (reference.marks > 0.5).double().mean(0)).abs().mean(1))


# ------------------------------------------------------------------------------------------------------ memorisation


def nearest(queries: Tensor, points: Tensor, progress: Progress = iter) -> tuple[Tensor, Tensor]:
    """(distance, index) of the nearest of points (M, ...) for each query (N, ...), both (N,): Euclidean.

    Both are uint8 images, whose levels 0..255 count as 0..1, or both are floats. The search by |p|² - 2 q·p is in
    float32 on the device of the queries; the distances are then computed in float64, so that a copy is at distance 0.
    """
    best = torch.full((len(queries),), math.inf, device=queries.device)
    index = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    rows = max(1, min(NEAREST_ROWS, NEAREST_VALUES // math.prod(points.shape[1:])))
    for start in progress(range(0, len(points), rows)):
        chunk = _flat(points[start:start + rows].to(queries.device))                        # (rows, D)
        norms = chunk.square().sum(1)
        for first in range(0, len(queries), rows):
            part = slice(first, first + rows)
            value, where = torch.addmm(norms, _flat(queries[part]), chunk.T, alpha=-2).min(1)
            closer = value < best[part]
            best[part] = torch.where(closer, value, best[part])
            index[part] = torch.where(closer, where + start, index[part])
    index = index.cpu()
    queries, points, size = queries.cpu(), points.cpu(), min(rows, 500)
    pairs = zip(queries.split(size), index.split(size), strict=True)
    return torch.cat([(_flat(q).double() - _flat(points[i]).double()).norm(dim=1) for q, i in pairs]), index


def versions(images: Tensor, mirrored: bool) -> list[Tensor]:
    """Images (N, C, H, W), and their mirror images if those count as the same: for networks that learned from both."""
    return [images, images.flip(3)] if mirrored else [images]


def nearest_version(queries: Sequence[Tensor], points: Tensor, progress: Progress = iter) -> tuple[Tensor, Tensor]:
    """(distance, index) as `nearest`, of whichever version of each query is nearest to a point.

    queries: versions (N, ...) of the same queries, such as those of `versions`.
    """
    distances, indices = map(torch.stack, zip(*(nearest(each, points, progress) for each in queries), strict=True))
    smallest, which = distances.min(0)
    return smallest, indices.gather(0, which[None])[0]


def _flat(points: Tensor) -> Tensor:
    """(N, ...) -> (N, D) float32; uint8 levels 0..255 become 0..1."""
    return points.flatten(1).float().div_(255) if points.dtype == torch.uint8 else points.flatten(1)


def closeness(generated: Tensor, real: Tensor) -> dict[str, float]:
    """Distances to the nearest training image: of generated images (N,), compared with unseen real images (M,).

        closer_than_any_real    share of generated images closer than the closest real one: 0 expected
        closer_than_99_percent  share closer than 99 % of the real ones: 1 if all are copies
        expected                what this share is on average if both sets are alike: a little more than 0.01
        copies, real_copies     share at distance 0 of both
        median, real_median     of both sets of distances
    """
    def share(condition: Tensor) -> float:
        return condition.double().mean().item()
    # The quantile lies at the (0.01 (M - 1) + 1)th of the M real distances, the jth of which is above j / (M + 1) of
    # all that could be drawn, on average.
    expected = (0.01 * (len(real) - 1) + 1) / (len(real) + 1)
    return dict(closer_than_any_real=share(generated < real.min()),
                closer_than_99_percent=share(generated < real.quantile(0.01)), expected=expected,
                copies=share(generated == 0), real_copies=share(real == 0),
                median=generated.median().item(), real_median=real.median().item())
