"""Floors that are kept: used where all that they depend on is the same, computed again otherwise."""

import json

import numpy as np
import pytest
import torch

from data import ImageData
from evaluation import classifier, floors
from evaluation.floors import floor_cache

FIGURES = dict(recall=dict(value=0.1 + 0.2, low=0.25, high=float("inf"), n=7))


def image_data(split, seed):
    images = torch.randint(0, 256, (20, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ImageData("glyphs", split, images, torch.arange(20) % 10, tuple("0123456789"))


class Computed:
    """Counts how often something is computed."""

    def __init__(self, result=FIGURES):
        self.times, self.result = 0, result

    def __call__(self):
        self.times += 1
        return self.result


@pytest.fixture
def cache(tmp_path):
    """cache(**changes) -> the floors of two sets of images, after changes of the arguments."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is missing: pip install -r requirements-eval.txt")

    def cache(**changes):
        usual = dict(data=image_data("test", 0), floor_data=image_data("validation", 1), features="own",
                     device=torch.device("cpu"), data_dir=tmp_path)
        return floor_cache(**usual | changes)
    return cache


def test_a_floor_is_computed_once_and_comes_back_to_the_bit(cache):
    compute = Computed()
    assert cache().get("figures", compute) == FIGURES and cache().get("figures", compute) == FIGURES
    assert compute.times == 1


def test_another_name_image_network_device_seed_or_code_is_another_floor(cache, tmp_path, monkeypatch):
    compute = Computed()
    cache().get("figures", compute)
    cache().get("cas", compute, seed=0)
    cache().get("cas", compute, seed=1)
    other = image_data("test", 0)
    other.images[3, 0, 1, 1] ^= 1
    for changes in (dict(data=other), dict(floor_data=image_data("validation", 2)), dict(features="inception"),
                    dict(device=torch.device("cuda")), dict(floor_data=image_data("validation", 1).first(19))):
        cache(**changes).get("figures", compute)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/SHA256SUMS").write_text("0  glyphs.pt\n")
    monkeypatch.setattr(classifier, "WEIGHTS", tmp_path / "weights")
    cache().get("figures", compute)
    changed = tmp_path / "metrics.py"
    changed.write_text("T_QUANTILE = 3\n")
    monkeypatch.setattr(floors, "CODE", [changed])
    cache().get("figures", compute)
    monkeypatch.setattr(floors, "__version__", "another")
    cache().get("figures", compute)
    monkeypatch.setattr(torch, "__version__", "another")
    cache().get("figures", compute)
    assert compute.times == len(list((tmp_path / "floors").iterdir())) == 12
    cache().get("figures", compute)
    assert compute.times == 12


@pytest.mark.parametrize("damage", [
    lambda saved: "", lambda saved: saved[:-40], lambda saved: "[]", lambda saved: "null", lambda saved: "{}",
    lambda saved: saved.replace("0.25", "0.35"), lambda saved: saved.replace('"own"', '"inception"'),
    lambda saved: json.dumps(dict(json.loads(saved), figures=3)), lambda saved: "\udcff"])
def test_a_damaged_or_foreign_file_is_computed_again_and_mended(cache, tmp_path, damage):
    compute = Computed()
    cache().get("figures", compute)
    path = next((tmp_path / "floors").iterdir())
    saved = path.read_text()
    path.write_bytes(damage(saved).encode("utf-8", "surrogateescape"))
    assert cache().get("figures", compute) == FIGURES and compute.times == 2
    assert path.read_text() == saved


def test_a_folder_that_cannot_be_written_or_read_is_no_error(cache, tmp_path):
    compute = Computed()
    (tmp_path / "floors").write_text("a file where the folder should be")
    assert cache().get("figures", compute) == FIGURES and cache().get("figures", compute) == FIGURES
    assert compute.times == 2


# ------------------------------------------------------------------------------------------------ features, distances


FEATURES = dict(features=torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), index=torch.arange(20))


def are_same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_features_are_computed_once_and_come_back_to_the_bit(cache, tmp_path):
    compute, data = Computed(FEATURES), image_data("train", 5)
    assert all(are_same(cache().tensors("train", data, compute), FEATURES) for _ in range(3)) and compute.times == 1
    cache(floor_data=image_data("validation", 2)).tensors("train", data, compute)  # they do not depend on the floor
    assert compute.times == 1
    assert [path.name for path in (tmp_path / "floors").iterdir()] == ["glyphs_train.npz"]


def test_features_of_other_images_networks_or_options_replace_those_kept(cache, tmp_path, monkeypatch):
    compute, data = Computed(FEATURES), image_data("train", 5)
    cache().tensors("train", data, compute)
    cache().tensors("train", image_data("train", 6), compute)
    cache().tensors("train", image_data("train", 6), compute, train=1)
    cache(features="inception").tensors("train", data, compute)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/SHA256SUMS").write_text("0  glyphs.pt\n")
    monkeypatch.setattr(classifier, "WEIGHTS", tmp_path / "weights")
    cache().tensors("train", data, compute)
    assert compute.times == 5 and len(list((tmp_path / "floors").iterdir())) == 1


@pytest.mark.parametrize("damage", [lambda saved, k: saved[:k] + bytes([saved[k] ^ 0x55]) + saved[k + 1:],
                                    lambda saved, k: saved[:k]])
def test_damaged_features_are_computed_again_and_mended(cache, tmp_path, damage):
    compute, data = Computed(FEATURES), image_data("train", 5)
    cache().tensors("train", data, compute)
    path = tmp_path / "floors/glyphs_train.npz"
    saved = path.read_bytes()
    for place in range(0, len(saved), 5):
        before = compute.times
        path.write_bytes(damage(saved, place))
        assert are_same(cache().tensors("train", data, compute), FEATURES)  # of some bytes the content is none
        assert compute.times == before or path.read_bytes() == saved
        path.write_bytes(saved)
    assert compute.times > 1


def test_an_array_of_another_shape_or_another_file_is_computed_again(cache, tmp_path):
    compute, data, path = Computed(FEATURES), image_data("train", 5), tmp_path / "floors/glyphs_train.npz"
    cache().tensors("train", data, compute)
    with np.load(path) as file:
        saved = dict(file)
    for changed in (dict(features=saved["features"][:, :1]), dict(features=saved["features"].astype(np.float64)),
                    dict(index=saved["index"] + 1)):
        np.savez(path, **saved | changed)
        assert are_same(cache().tensors("train", data, compute), FEATURES)
    with path.open("wb") as file:
        np.save(file, saved["features"])
    assert are_same(cache().tensors("train", data, compute), FEATURES)
    assert compute.times == 5
