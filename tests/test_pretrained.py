"""models/pretrained/: what is packed is what was trained, in half the bytes; and the files that come along."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import assert_identical, assert_refused, files, tiny
from small import small_checkpoint
from torch.testing import assert_close

import evaluate
import sample
import train
from benchmarks import pretrained
from benchmarks.pretrained import RECORDS, packed
from checkpoint import load_checkpoint, load_model, save_checkpoint
from data import DATASETS, load_dataset
from evaluation import inputs, metrics, reference, two_sample
from evaluation.classifier import load_feature_network
from evaluation.features import extract_features
from evaluation.floors import floor_cache
from runtime import checkpoints
from runtime.files import file_digest
from runtime.parser import SHARED_FLAGS

NAMES = ("cifar10", "fashion_mnist", "glyphs", "mnist")  # that come along
RELEASED = sorted((Path(__file__).parent / "checkpoints").glob("*.pt"))
INSTALLED, INDEX = checkpoints.PRETRAINED, checkpoints.pretrained_models()


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """The folder of a tiny run that was measured."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is missing: pip install -r requirements-eval.txt")
    folder = tmp_path_factory.mktemp("run")
    assert train.main(tiny(data_dir, folder, "--sample_interval", 0)) == 0
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate, inputs, reference):
            patch.setattr(module, "load_dataset", lambda *args: load_dataset(*args).first(600))
        patch.setattr(reference, "floor_cache", lambda *args: floor_cache(*args)._replace(folder=folder / "floors"))
        patch.setattr(two_sample, "EPOCHS", 1)
        patch.setattr(two_sample, "CHANNELS", (8, 8, 8, 8))
        patch.setattr(metrics, "GROUPS", 5)
        assert evaluate.main(["--checkpoint", str(folder / "model_final.pt"), "--num_images", "260", "--steps", "2",
                              "--data_dir", str(data_dir), "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder in the place of models/pretrained/."""
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "pretrained")
    return tmp_path / "pretrained"


def pack(path, name="glyphs"):
    return pretrained.main(["--checkpoint", str(path), "--name", name])


def images(checkpoint, folder, *flags):
    """The images (N, H, W, C) that sample.py makes."""
    argv = ["--checkpoint", checkpoint, "--device", "cpu", "--precision", "fp32", "--output", folder / "x.npz", *flags]
    assert sample.main(list(map(str, argv))) == 0
    return np.load(folder / "x.npz")["arr_0"].astype(int)


# ------------------------------------------------------------------------------------------------------- the command


def test_a_run_becomes_a_model_that_is_read_by_its_name(run, place, tmp_path, capsys):
    assert pack(run / "model_final.pt") == 0
    said = capsys.readouterr().out
    assert "20 images of both files differ by" in said and "python sample.py --checkpoint glyphs" in said
    entry, evaluation = (json.loads(path.read_text()) for path in (place / "index.json", run / "evaluation.json"))
    assert list(entry) == ["glyphs"]
    entry = entry["glyphs"]
    assert entry["sha256"] == file_digest(place / "glyphs.pt")
    assert entry["command"].startswith("python train.py --dataset glyphs") and entry["images_seen"] == 512
    assert entry["measured"].startswith("python evaluate.py --checkpoint")
    assert entry["figures"].keys() == evaluation["figures"].keys()
    for name, figure in evaluation["figures"].items():
        assert_close(entry["figures"][name]["value"], figure["value"], atol=1e-4, rtol=0)
        assert entry["figures"][name]["n"] == 260
    assert len(images("glyphs", tmp_path, "--num_images", 3, "--steps", 2)) == 3


def test_other_models_stay_and_one_of_the_same_name_is_replaced(run, place):
    for name in ("mnist", "glyphs"):
        assert pack(run / "model_final.pt", name) == 0
    before = files(place)
    (place / "mnist.pt").write_bytes(b"damaged")
    assert pack(run / "model_final.pt", "mnist") == 0
    assert files(place) == before and list(checkpoints.pretrained_models()) == ["glyphs", "mnist"]


def copy(run, folder, *names):
    """Some files of the run in a folder of their own; returns its checkpoint."""
    for name in ("model_final.pt", *names):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder / "model_final.pt"


@pytest.mark.parametrize("there, words", [
    (["evaluation.json"], ["run.json", "missing"]), (["run.json"], ["evaluation.json", "python evaluate.py"])])
def test_what_is_not_described_is_not_packed(run, place, tmp_path, capfd, there, words):
    assert_refused(capfd, pack(copy(run, tmp_path, *there)), *words)
    assert not place.exists()


def test_figures_of_another_checkpoint_are_refused(run, place, tmp_path, capfd):
    path = copy(run, tmp_path, "run.json", "evaluation.json")
    small_checkpoint(path)
    assert_refused(capfd, pack(path), "of another checkpoint", "python evaluate.py --checkpoint")
    (tmp_path / "evaluation.json").write_text("{")
    assert_refused(capfd, pack(path), "evaluation.json is no JSON")
    for name in ("../x", "Mnist", "", "a.b"):
        assert_refused(capfd, pack(path, name), "--name")
    assert_refused(capfd, pack(tmp_path / "none.pt"), "no checkpoint", "none.pt")
    assert not place.exists()


# --------------------------------------------------------------------------------------------------- the packed file


@pytest.fixture(params=RELEASED, ids=lambda path: path.stem)
def pair(request, tmp_path):
    """(a checkpoint of a trained network, its packed file)."""
    save_checkpoint(tmp_path / "packed.pt", **packed(load_checkpoint(request.param)))
    return request.param, tmp_path / "packed.pt"


def test_a_packed_file_holds_one_copy_of_the_average_in_half_precision(pair):
    before, stored = load_checkpoint(pair[0]), torch.load(pair[1], weights_only=True)
    count = sum(weight.numel() for weight in before["ema"].values())
    assert pair[1].stat().st_size < 2 * count + 300 * len(before["ema"]) + 20_000  # bytes: weights, names, the rest
    for name, weight in stored["model"].items():
        assert weight.data_ptr() == stored["ema"][name].data_ptr()
        assert weight.dtype == torch.float16
    assert stored["optimizer"] == {} and stored["config"] == before["config"]


def test_a_packed_file_loads_as_float32_and_draws_what_the_checkpoint_draws(pair, tmp_path):
    loaded, before = load_checkpoint(pair[1]), load_checkpoint(pair[0])
    assert_identical(loaded["model"], loaded["ema"])
    for name, weight in loaded["ema"].items():
        assert weight.dtype == torch.float32
        assert_close(weight, before["ema"][name], rtol=2**-11, atol=2**-25)  # half precision rounds by no more
    drawn = [images(path, tmp_path, "--num_images", 16, "--seed", 3) for path in pair]
    assert np.abs(drawn[0] - drawn[1]).max() <= 2 and drawn[0].std() > 10


def test_few_records_of_the_losses_are_kept(pair):
    checkpoint = load_checkpoint(pair[0])
    records = [dict(step=step, loss=1.0 / step, seconds=float(step)) for step in range(1, 1001)]
    kept = packed(checkpoint | dict(history=dict(records=records, losses=[0.5] * 99)))["history"]
    assert len(kept["records"]) == RECORDS and (kept["records"][0], kept["records"][-1]) == (records[0], records[-1])
    assert kept["losses"] == [] and packed(checkpoint | dict(history={}))["history"]["records"] == []


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_half_precision_that_is_not_finite_is_refused(pair, tmp_path, capfd, value):
    content = torch.load(pair[1], weights_only=True)
    next(iter(content["ema"].values())).view(-1)[0] = value
    torch.save(content, tmp_path / "x.pt")
    assert_refused(capfd, sample.main(["--checkpoint", str(tmp_path / "x.pt")]), "not finite")


# ------------------------------------------------------------------------------------------- the files that come along


def test_four_networks_come_along():
    assert tuple(sorted(INDEX)) == NAMES and all(name in SHARED_FLAGS["checkpoint"]["help"] for name in NAMES)
    expected = {"index.json", *(f"{name}.pt" for name in NAMES)}
    assert {path.name for path in INSTALLED.iterdir()} == expected


@pytest.mark.parametrize("name", INDEX)
def test_a_file_that_comes_along_is_small_and_is_what_its_entry_says(name):
    path = checkpoints.find_checkpoint(str(INSTALLED / f"{name}.pt"))  # checks the digest
    assert path.stat().st_size < 4_000_000
    checkpoint, entry = load_checkpoint(path), INDEX[name]
    assert_identical(checkpoint["model"], checkpoint["ema"])
    assert checkpoint["optimizer"] == {} and len(checkpoint["history"]["records"]) <= RECORDS
    assert (checkpoint["images_seen"], checkpoint["seed"]) == (entry["images_seen"], entry["seed"])
    assert checkpoint["config"]["data"]["dataset"] == name and f"--dataset {name}" in entry["command"]
    assert {"frechet_distance", "recall", "asked_class"} <= entry["figures"].keys()


@pytest.mark.parametrize("name", INDEX)
def test_a_file_that_comes_along_draws_the_classes_that_it_is_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = torch.from_numpy(images(name, tmp_path, "--num_images", 60)).permute(0, 3, 1, 2).to(torch.uint8)
    assert load_model(INSTALLED / f"{name}.pt")[0].num_classes == len(DATASETS[name].class_names) == 10
    seen = extract_features(drawn, load_feature_network(name)).probabilities.argmax(1)
    assert (seen == torch.arange(60) % 10).float().mean() > 0.8
