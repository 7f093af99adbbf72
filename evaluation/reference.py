"""Images measured against real images: the figures and their floors, the accuracy score, the search for copies."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn

from data import ImageData, LevelCode, load_dataset
from diffusion import DiffusionProcess
from evaluation.autoencoder import SUFFIX, Autoencoder, Unlabelled, load_autoencoder
from evaluation.autoencoder_training import train_second_network
from evaluation.classifier import Classifier, is_trained, load_feature_network
from evaluation.classifier_training import new_classifier, recipe_notes, train_feature_network
from evaluation.copies import FEW
from evaluation.features import INCEPTION_FEATURES, extract_features, load_inception
from evaluation.floors import FloorCache, described, floor_cache
from evaluation.metrics import (
    ImageFeatures,
    check_image_count,
    closeness,
    estimate,
    figures,
    jackknife_means,
    nearest_version,
    random_groups,
    versions,
)
from evaluation.two_sample import two_sample_figures
from learned_variance import bits_per_dim
from runtime import threads
from runtime.errors import UserError
from runtime.locks import alone
from runtime.progress import Bar, progress
from utils import GREY, caption_line, generator_for, save_picture, tile

MOST_REFERENCE = 10_000  # pictures of one's own that others are compared with
PAIRS = 16  # in nearest.png: as many of the closest images, and as many others
LIKELIHOOD_IMAGES, LIKELIHOOD_DRAWS = 2000, 4  # real images of bits_per_dim, and random times for each of them
LIKELIHOOD_BATCH = 100  # images at a time; fixed, because the random times depend on it


class Reference(NamedTuple):
    """The real images, the networks that extract features, and the floor: as many other real images, measured alike."""

    classifier: Classifier
    inception: nn.Module | None
    autoencoder: Autoencoder | None
    data: ImageData
    features: ImageFeatures
    floor_data: ImageData
    floor: dict[str, dict]  # the figures of floor_data
    floors: FloorCache  # of figures that are only computed where they are asked for

    def extract(self, images: Tensor, title: str) -> ImageFeatures:
        """Features and class probabilities of uint8 images, with a progress bar."""
        return extract_features(images, self.classifier, self.inception, adapting_bar(title), self.autoencoder)


def adapting_bar(title: str) -> Callable:
    """A progress bar for a loop of equal steps, which also chooses the number of threads meanwhile."""
    return lambda items: threads.ThreadTuner(threads.PATIENCE).steps(progress(title)(items))


def reference_images(source: str | Path, split: str, data_dir) -> ImageData:
    """The images that others are compared with: a split, or MOST_REFERENCE random ones of many pictures of your own.

    As many as other data sets have in test: some figures take a time that grows with the square of this number.
    """
    data = load_dataset(source, split, data_dir)
    return random_subset(data, MOST_REFERENCE) if data.folder and len(data.images) > MOST_REFERENCE else data


def random_subset(data: ImageData, count: int) -> ImageData:
    """`count` random images of a split, or all of it: always the same ones. The split may be sorted."""
    chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:count]
    return replace(data, images=data.images[chosen], labels=data.labels[chosen])


def open_networks(data: ImageData, features: str, count: int, device,
                  data_dir) -> tuple[Classifier, nn.Module | None, Autoencoder | None]:
    """The data set's classifier, Inception for `features` "inception" or None, and the data set's autoencoder.

    Those of your own pictures are trained the first time; without classes the autoencoder takes the place of the
    classifier. UserError if `count` images are too few.
    """
    dataset = data.source
    if data.folder and features == "inception":  # before networks are trained
        held_out = min(len(load_dataset(dataset, split, data_dir).images) for split in ("validation", "test"))
        if held_out < 2 * INCEPTION_FEATURES:
            raise UserError(f"--features inception needs {2 * INCEPTION_FEATURES:,} held-out pictures for each of "
                            f"validation and test, and {data.name} has {held_out:,}: leave it out")
    if data.folder:
        check_image_count(count, FEW // 2)  # before networks are trained
        _train_missing_networks(data, device, data_dir)
    autoencoder = load_autoencoder(dataset, device)
    classifier = load_feature_network(dataset, device) if data.class_names else Unlabelled(autoencoder)
    inception = load_inception().to(device) if features == "inception" else None
    check_image_count(count, INCEPTION_FEATURES if inception else classifier.head.in_features)
    return classifier, inception, autoencoder if data.class_names or inception else None


def _train_missing_networks(data: ImageData, device, data_dir) -> None:
    """Train the networks that judge your own pictures, those that are not there; a folder with all is only read."""
    def missing() -> list[str]:
        needed = (SUFFIX, "") if data.class_names else (SUFFIX,)
        return [suffix for suffix in needed if not is_trained(data.source, suffix)]

    if not missing():
        return
    waiting = "Another process is training the networks that judge these pictures: waiting for it"
    with alone(data.folder / ".features.lock", waiting):
        if SUFFIX in missing():
            print(train_second_network(data.source, data_dir, device, 0, progress("training the autoencoder", "steps")))
        if "" in missing():
            print(train_feature_network(data.source, data_dir, device, 0, False, progress("training", "steps")))


def choose_floor_data(data: ImageData, count: int, data_dir) -> ImageData:
    """`count` real images of another split than `data`, one on which no network was trained.

    UserError if it has fewer: figures are biased by their n (a Fréchet distance by about 1/n), so that a floor of fewer
    images would be too high, and a bad generator could seem to be as good as real images.
    """
    other = load_dataset(data.source, "test" if data.split == "validation" else "validation", data_dir)
    if count > len(other.images):
        enough = other.split == "validation" and count <= len(data.images)
        raise UserError(f"{count:,} images cannot be measured: their floor takes as many real images that no network "
                        f"was trained on, and {other.split} has {len(other.images):,}: measure {len(other.images)}, as "
                        f"with --num_images {len(other.images)}{', or take --reference validation' if enough else ''}")
    return random_subset(other, count)


def make_reference(data: ImageData, floor_data: ImageData, classifier: Classifier, inception: nn.Module | None,
                   autoencoder: Autoencoder | None, data_dir) -> Reference:
    """The reference for as many images as floor_data has. What was computed before comes from data_dir/floors."""
    device = next(classifier.parameters()).device
    floors = floor_cache(data, floor_data, "inception" if inception else "own", device, data_dir)
    features = kept_features(floors, data, autoencoder is not None, lambda: extract_features(
        data.images, classifier, inception, adapting_bar(data.split), autoencoder))

    def compute() -> dict[str, dict]:
        floor_features = extract_features(floor_data.images, classifier, inception, adapting_bar("floor"), autoencoder)
        with Bar("computing the floor"):
            return figures(floor_features, features, floor_data.labels, (floor_data.images, data.images))

    return Reference(classifier, inception, autoencoder, data, features, floor_data, floors.get("figures", compute),
                     floors)


def kept_features(floors: FloorCache, data: ImageData, second: bool,
                  extract: Callable[[], ImageFeatures]) -> ImageFeatures:
    """What extract() returns for all images of a split, or what is kept of it; second: whether with second features."""
    def compute() -> dict[str, Tensor]:
        return {name: value for name, value in extract()._asdict().items() if value is not None}
    name = f"{data.split}_features_{floors.networks['features']}{'_and_second' if second else ''}"
    return ImageFeatures(**floors.tensors(name, data, compute))


def with_floor(result: dict[str, dict], floor: dict[str, dict]) -> dict[str, dict]:
    """The figures of generated images, each with the value of its floor."""
    return {name: dict(figure, floor=floor[name]["value"]) for name, figure in result.items()}


def compare(reference: Reference, images: Tensor, features: ImageFeatures, labels: Tensor | None) -> dict[str, dict]:
    """The figures of generated uint8 images, each with its floor; labels (N,) that were requested, or None."""
    with Bar("computing the figures"):
        result = figures(features, reference.features, labels, (images, reference.data.images))
    return with_floor(result, reference.floor)


def two_sample_test(reference: Reference, images: Tensor, device) -> dict[str, dict]:
    """two_sample_pixels and two_sample_shapes of generated uint8 images, each with its floor."""
    figures = two_sample_figures(images, reference.data.images, device, two_sample_bars(reference, "images"))
    return with_floor(figures, two_sample_floor(reference, device))


def two_sample_floor(reference: Reference, device) -> dict[str, dict]:
    """two_sample_pixels and two_sample_shapes of the real images of the floor."""
    return reference.floors.get("two_sample", lambda: two_sample_figures(
        reference.floor_data.images, reference.data.images, device, two_sample_bars(reference, "floor")))


def two_sample_bars(reference: Reference, title: str) -> Callable[[str], Callable]:
    """The progress bars of a two-sample test."""
    return lambda view: adapting_bar(f"telling {title} from {reference.data.split}: {view}")


def classification_accuracy_score(reference: Reference, images: Tensor, labels: Tensor, device, seed: int,
                                  bf16: bool) -> dict[str, float]:
    """The accuracy on the reference images of a classifier that is trained on generated images alone.

    Ravuri and Vinyals 2019. It is trained by the recipe of the feature network. The floor is the accuracy after
    training on as many real images. The interval is over the reference images: the randomness of the training is not
    in it.
    """
    data = reference.data

    def score(train: ImageData, title: str) -> dict[str, dict]:
        model = new_classifier(train, device, seed, bf16, progress(title))
        right = extract_features(data.images, model).probabilities.argmax(1) == data.labels
        means = jackknife_means(right, random_groups(len(right)))
        return dict(cas=dict(estimate(means, 0.0, 1.0), n=len(train.images)))

    generated = replace(data, split="generated", images=images, labels=labels)
    result = score(generated, "training on generated images")
    floor = reference.floors.get("cas", lambda: score(reference.floor_data, "training on real images"),
                                 recipe=recipe_notes(data.source, len(images)), seed=seed, bf16=bf16)
    return with_floor(result, floor)["cas"]


def memorisation(reference: Reference, images: Tensor, features: ImageFeatures, data_dir, device, path: Path,
                 mirrored: bool = False, train_images: int = 0) -> dict:
    """How close images are to training images, compared with unseen real test images; draws pairs to `path`.

    mirrored: whether the network learned from mirror images, too; train_images: from how many images (0: all).
    `path` shows image | nearest in pixels | nearest in features: first of the closest images, then of others.
    """
    reference = reference._replace(autoencoder=None)  # its features are not compared here
    data = load_dataset(reference.data.source, "train", data_dir).first(train_images or None)
    real, train = random_subset(load_dataset(reference.data.source, "test", data_dir), len(images)), data.images
    train_features = kept_features(reference.floors, data, False, lambda: reference.extract(train, "train")).features

    def search(some: Tensor, their_features: Tensor, title: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(distance, index) of the nearest training image in pixels, then in features."""
        both = versions(some.to(device), mirrored)
        their = [their_features, *(reference.extract(each, f"{title}, mirrored").features for each in both[1:])]
        return (*nearest_version(both, train, adapting_bar(f"{title}: nearest in pixels")),
                *nearest_version([each.to(device) for each in their], train_features,
                                 adapting_bar(f"{title}: nearest in features")))

    def search_real() -> dict[str, Tensor]:
        pixels, _, features, _ = search(real.images, reference.extract(real.images, "test").features, "test")
        return dict(pixels=pixels, features=features)

    kept = reference.floors.tensors(f"distances_{reference.floors.networks['features']}", real, search_real,
                                    train=described(data), mirrored=mirrored)
    pixels, same_pixels, distance, same_features = search(images, features.features, "images")
    closest = pixels.argsort()[:PAIRS]
    shown = torch.cat([closest, torch.arange(min(PAIRS, len(images)))])
    draw_nearest(torch.stack([images[shown], train[same_pixels[shown]], train[same_features[shown]]], 1), path)
    return dict(pixels=closeness(pixels, kept["pixels"]), features=closeness(distance, kept["features"]),
                training_images=len(train), real_images=len(real.images))


def draw_nearest(triples: Tensor, path: Path) -> None:
    """Draw uint8 triples (N, 3, C, H, W) of an image and its nearest training images: of PAIRS closest, then others."""
    gaps = torch.full_like(triples[:, :1], GREY)                                            # between two triples
    captions, parts = ["image", "in pixels", "in features", ""] * PAIRS, []
    for title, some in (("The generated images closest to a training image, each with the nearest training images",
                         slice(None, PAIRS)),
                        ("The first generated images, each with the nearest training images", slice(PAIRS, None))):
        grid = tile(torch.cat([triples, gaps], 1)[some].flatten(0, 1), 16, 3, captions[:16])
        parts += [caption_line([title], grid.shape[1]), grid]
    save_picture(np.concatenate(parts), path)


def likelihood(model, diffusion: DiffusionProcess, data: ImageData, code: LevelCode, seed: int) -> dict[str, float]:
    """bits_per_dim, the variational bound of -log2 p(x_0) per dimension, over LIKELIHOOD_IMAGES real images.

    In float32, by `learned_variance.bits_per_dim` with LIKELIHOOD_DRAWS + 1 network evaluations for an image. It has no
    floor. The interval covers the choice of the images and of the noise.
    """
    data, device, generator = random_subset(data, LIKELIHOOD_IMAGES), diffusion.device, generator_for(seed)

    def batches() -> Iterator[Tensor]:
        for rows in adapting_bar("likelihood")(torch.arange(len(data.images)).split(LIKELIHOOD_BATCH)):
            labels = data.labels[rows].to(device) if model.num_classes else None
            with cudnn.flags(enabled=True, allow_tf32=False):
                bits = bits_per_dim(model, diffusion, code.encode(data.images[rows]).to(device), labels,
                                    draws=LIKELIHOOD_DRAWS, generator=generator, edges=code.edges)
            yield bits.cpu()

    bits = torch.cat(list(batches()))                                                       # (N,)
    return dict(estimate(jackknife_means(bits, random_groups(len(bits)))), n=len(bits), floor=None)
