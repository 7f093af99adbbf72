"""The second features: of a network that removes noise, that no label has shaped, and that sees what others do not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data import DATASETS, ImageData, load_dataset, to_model
from data_sources.points import POINT_SETS
from evaluation import classifier, metrics
from evaluation.autoencoder import SUFFIX, Autoencoder, load_autoencoder
from evaluation.autoencoder_training import AutoencoderRecipe, denoising_error, noised, train_autoencoder
from evaluation.classifier import load_feature_network
from evaluation.features import extract_features
from evaluation.metrics import figures
from evaluation.reference import random_subset

pytest.importorskip("torchmetrics", reason="torchmetrics is missing: pip install -r requirements-eval.txt")
QUICK = AutoencoderRecipe(width=4, feature_dims=8, epochs=2, batch_size=16)
FILES = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (1, 28, 28), (3, 32, 32)])
def test_any_size_that_4_divides_has_features_and_comes_back(shape):
    model = Autoencoder(shape[0], shape[1:], width=4, feature_dims=10).eval()
    x = torch.randn(3, *shape)
    assert model(x).shape == x.shape and model.features(x).shape == (3, 10)
    torch.testing.assert_close(model.features(x)[1:2], model.features(x[1:2]))  # images do not mix


@pytest.mark.parametrize("size", [(4, 8), (10, 8), (28, 30)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 4"):
        Autoencoder(1, size)


def tiny(labels=None):
    images = torch.randint(0, 256, (33, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageData("new", "train", images, torch.arange(33) % 3 if labels is None else labels, tuple("abc"))


def test_training_depends_on_the_seed_and_not_on_labels():
    first, again, other = (train_autoencoder(tiny(labels), QUICK, "cpu", seed)[0].state_dict() for labels, seed in (
        (None, 0), (torch.zeros(33).long(), 0), (None, 1)))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_training_removes_noise(data_dir):
    data = load_dataset("glyphs", "train", data_dir).first(320)
    untrained, trained = (train_autoencoder(data, replace(QUICK, epochs=epochs), "cpu")[0] for epochs in (1, 12))
    assert denoising_error(trained, data, 1.0) < 0.5 * denoising_error(untrained, data, 1.0)


def test_the_noise_has_a_level_for_each_image_up_to_the_largest():
    noise = noised(torch.zeros(400, 1, 20, 20), 0.8, torch.Generator().manual_seed(0)).flatten(1)
    levels = noise.std(1)
    assert levels.max() < 0.9 and levels.min() < 0.03 and levels.mean().item() == pytest.approx(0.4, abs=0.04)


def data_folder(name, request, data_dir):
    if name not in FILES:
        return data_dir
    folder = request.config.rootpath / "data"
    if not (folder / FILES[name]).is_dir():
        pytest.skip(f"{folder / FILES[name]} is missing: real {name} is not here")
    return folder


@pytest.mark.parametrize("name, share", [("glyphs", 0.7), ("mnist", 0.7), ("fashion_mnist", 0.9), ("cifar10", 1.05)])
def test_the_shipped_network_removes_noise_as_well_as_the_best_linear_filter(name, share, request, data_dir):
    """Of all linear filters through D numbers, the best one keeps the D principal axes of largest variance.

    The error along an axis of variance c is c s² / (c + s²) if it is kept, else c. On drawings the network is far
    better than that, on photographs it only equals it.
    """
    images = to_model(random_subset(load_dataset(name, "test", data_folder(name, request, data_dir)), 4000).images)
    model, s, generator = load_autoencoder(name), 0.8, torch.Generator().manual_seed(0)
    kept, x, flat = model.features(images[:2]).shape[1], images[:300], images.flatten(1)
    torch.manual_seed(0)
    singular = torch.svd_lowrank(flat - flat.mean(0), q=kept + 40, niter=4)[1][:kept]  # the largest, all that count
    c = singular.double()**2 / (len(flat) - 1)
    best = ((flat.var(0).double().sum() - c.sum() + (c * s**2 / (c + s**2)).sum()) / flat.shape[1]).item()
    error = F.mse_loss(model(x + s * torch.randn(x.shape, generator=generator)), x).item()
    assert error < share * best, (error, best)


@pytest.mark.parametrize("name, least", [("glyphs", 0.9), ("mnist", 0.9), ("fashion_mnist", 0.7), ("cifar10", 0.2)])
def test_neighbours_in_the_features_are_often_of_one_class(name, least, request, data_dir):
    """Chance is 0.1."""
    folder, network = data_folder(name, request, data_dir), load_autoencoder(name)
    known, asked = (random_subset(load_dataset(name, split, folder), count) for split, count in (
        ("train", 3000), ("test", 400)))
    known_features, features = (torch.cat([network.features(to_model(part)) for part in data.images.split(250)])
                                for data in (known, asked))
    nearest = torch.cdist(features, known_features).argmin(1)
    assert (known.labels[nearest] == asked.labels).double().mean() > least


def test_both_features_come_from_one_pass_and_the_second_only_if_asked(data_dir):
    images, network = load_dataset("glyphs", "test", data_dir).images[:300], load_autoencoder("glyphs")
    both, one = (extract_features(images, load_feature_network("glyphs"), autoencoder=each) for each in (network, None))
    torch.testing.assert_close(both.second, network.features(to_model(images)), rtol=1e-4, atol=1e-4)
    assert torch.equal(both.features, one.features) and one.second is None and both.second.shape == (300, 64)


def test_the_files_are_small_and_listed():
    for name in set(DATASETS) - set(POINT_SETS):
        path = classifier.WEIGHTS / f"{name}{SUFFIX}.pt"
        assert path.stat().st_size < 550_000 and len(classifier.weights_digest(name, SUFFIX)) == 64


@pytest.fixture(scope="module")
def judge(data_dir):
    """judge(images) -> all figures against real test images of glyphs."""
    networks = dict(classifier=load_feature_network("glyphs"), autoencoder=load_autoencoder("glyphs"))
    real = extract_features(random_subset(load_dataset("glyphs", "test", data_dir), 1000).images, **networks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "MAX_CLASS_FEATURES", 0)  # distances within classes take long, and are not looked at
        yield lambda images: figures(extract_features(images, **networks), real)


@pytest.fixture(scope="module")
def floor(judge, data_dir):
    return judge(random_subset(load_dataset("glyphs", "validation", data_dir), 600).images)


def test_recall_and_precision_of_real_images_are_high(floor):
    assert floor["autoencoder_recall"]["value"] > 0.7 and floor["autoencoder_precision"]["value"] > 0.7


def without_variety(data_dir, count):
    """Real training images, of each class the fifth that is closest to its mean."""
    data, chosen = load_dataset("glyphs", "train", data_dir), []
    for label in range(10):
        images = data.images[data.labels == label].float().flatten(1)
        near = (images - images.mean(0)).norm(dim=1).argsort()[:len(images) // 5]
        some = near[torch.randperm(len(near), generator=torch.Generator().manual_seed(0))[:count // 10]]
        chosen.append(data.images[data.labels == label][some])
    return torch.cat(chosen)


def test_a_lack_of_variety_within_the_classes_is_seen(judge, floor, data_dir):
    result = judge(without_variety(data_dir, 600))
    assert result["autoencoder_distance"]["low"] > 2 * floor["autoencoder_distance"]["high"]
    assert result["autoencoder_recall"]["high"] < floor["autoencoder_recall"]["low"]


def test_strokes_that_are_a_pixel_thicker_are_seen(judge, floor, data_dir):
    """Far better than by the classifier, which has learned that the thickness does not matter."""
    images = random_subset(load_dataset("glyphs", "validation", data_dir), 600).images
    result = judge(F.max_pool2d(F.pad(images.float(), (0, 1, 0, 1)), 2, 1).to(torch.uint8))
    assert result["autoencoder_distance"]["low"] > 2 * floor["autoencoder_distance"]["high"]
    assert result["autoencoder_precision"]["high"] < floor["autoencoder_precision"]["low"]
    times = {name: result[name]["value"] / floor[name]["value"] for name in ("autoencoder_distance",
                                                                             "frechet_distance")}
    assert times["autoencoder_distance"] > 2 * times["frechet_distance"]
