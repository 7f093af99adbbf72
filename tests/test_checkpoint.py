"""The checkpoint file: exact, safe to open, written whole or not at all, and refused with a reason if it is not one."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import assert_identical
from test_trainer import make_trainer
from torch.testing import assert_close

import checkpoint
import sample
import train
from checkpoint import FIELDS, load_checkpoint, load_model, save_checkpoint
from diffusion import DiffusionProcess
from models import create_model
from runtime.errors import UserError
from runtime.version import __version__


def fields(**changes):
    """The fields of a small valid checkpoint, whose averaged weights differ from the raw ones."""
    torch.manual_seed(0)
    model = create_model(base_channels=8, time_emb_dim=8, channel_mults=[1])
    process = DiffusionProcess(10, "cosine", prediction="v")
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    weights = model.state_dict()
    data = dict(dataset="glyphs", shape=[1, 8, 8], class_names=list("0123456789"))
    given = dict(config=dict(model=model.config, diffusion=process.config, data=data, training={}),
                 model=weights, ema={name: value + 1 for name, value in weights.items()},
                 optimizer=optimizer.state_dict(), step=3, epoch=1, images_seen=12, seconds=1.5, precision="fp32",
                 seed=7, history={})
    return {**{name: given[name] for name in FIELDS}, **changes}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, **fields())
    return path


def test_what_is_saved_is_loaded_exactly(path):
    loaded, saved = load_checkpoint(path), fields()
    assert (loaded.pop("format"), loaded.pop("version")) == (checkpoint.FORMAT, __version__)
    assert loaded.keys() == saved.keys()
    assert_identical(loaded, saved)


def test_the_file_is_plain_data(path):
    assert torch.load(path, weights_only=True)["step"] == 3


def test_raw_and_averaged_weights_of_a_trainer_have_the_same_names_and_shapes():
    trainer = make_trainer()
    shapes = [{name: weight.shape for name, weight in trainer.state()[part].items()} for part in ("model", "ema")]
    assert shapes[0] == shapes[1] == {name: weight.shape for name, weight in trainer.model.state_dict().items()}


def test_load_model_gives_the_averaged_weights_unless_told_otherwise(path):
    for options, name in (({}, "ema"), ({"use_ema": True}, "ema"), ({"use_ema": False}, "model")):
        model, process, loaded = load_model(path, **options)
        assert_close(model.state_dict(), fields()[name], rtol=0, atol=0)
        assert model.config == loaded["config"]["model"] and process.config == loaded["config"]["diffusion"]
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()

    def half(_, file):
        file.write(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, **fields(step=4))
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_missing_and_unknown_fields_are_refused(tmp_path):
    incomplete = fields()
    del incomplete["ema"]
    for given in (incomplete, fields(extra=1)):
        with pytest.raises(ValueError, match="fields"):
            save_checkpoint(tmp_path / "model.pt", **given)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [Path("x"), torch.zeros(1), float("nan"), {1, 2}, object()], ids=lambda v: type(v))
def test_a_config_that_is_not_json_is_refused(tmp_path, value):
    config = fields()["config"]
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path / "model.pt", **fields(config={**config, "training": {"flag": value}}))
    assert not any(tmp_path.iterdir())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [
    b"", b"not a checkpoint", b"PK\x03\x04 half of an archive", pickle.dumps({"model": 1}, 2), pickle.dumps(Evil(), 2),
], ids=["empty", "text", "zip", "pickle", "evil"])
def test_foreign_files_are_refused_in_one_line(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(path, part):
    content = path.read_bytes()
    path.write_bytes(content[:int(part * len(content))])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, **fields(history={"x": Evil()})}, "model.pt")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load_checkpoint("model.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["format", *FIELDS])
def test_a_missing_field_is_named(path, name):
    loaded = torch.load(path, weights_only=True)
    del loaded[name]
    torch.save(loaded, path)
    with pytest.raises(ValueError, match=f"{path}.*{name}"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["model", "diffusion", "data", "training"])
def test_a_missing_part_of_the_config_is_named(path, name):
    loaded = torch.load(path, weights_only=True)
    del loaded["config"][name]
    torch.save(loaded, path)
    with pytest.raises(ValueError, match=f"{path}.*{name}"):
        load_checkpoint(path)


def test_other_objects_in_a_torch_file_are_refused(tmp_path):
    for content in ([1, 2], torch.zeros(3), {"state_dict": {}}):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match="format"):
            load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("part, change, reason", [("model", {"base_channels": 16}, r"should be of the shape \(16, "),
                                                  ("model", {"unknown": 1}, "unexpected keyword argument 'unknown'"),
                                                  ("diffusion", {"schedule": "sigmoid"}, "unknown schedule 'sigmoid'"),
                                                  ("diffusion", {"unknown": 1}, "keyword argument 'unknown'")])
def test_weights_and_config_that_do_not_fit_are_refused_in_one_line(path, part, change, reason):
    loaded = torch.load(path, weights_only=True)
    loaded["config"][part] |= change
    torch.save(loaded, path)
    with pytest.raises(ValueError, match=reason) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_file_says_how_to_make_one(tmp_path):
    for path in (tmp_path / "model.pt", tmp_path):
        with pytest.raises(ValueError, match=r"no checkpoint.*train\.py"):
            load_checkpoint(path)


# ------------------------------------------------------------------------------------------------- released versions

RELEASED = sorted((Path(__file__).parent / "checkpoints").glob("*.pt"))  # one tiny run, as each version wrote it


def test_every_released_version_has_a_checkpoint_here_and_this_one_too():
    assert {path.stem for path in RELEASED} >= {"before_1.0.0", __version__}
    assert [load_checkpoint(path).get("version") for path in RELEASED] == [
        None if path.stem.startswith("before") else path.stem for path in RELEASED]


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_a_checkpoint_of_a_released_version_draws_what_it_drew(path, tmp_path):
    argv = ["--checkpoint", str(path), "--num_images", "4", "--seed", "5", "--device", "cpu", "--precision", "fp32"]
    assert sample.main([*argv, "--output", str(tmp_path / "x.npz")]) == 0
    drawn, expected = (np.load(file)["arr_0"].astype(int) for file in (tmp_path / "x.npz", path.parent / "images.npz"))
    assert np.abs(drawn - expected).max() <= 1 and expected.std() > 10


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_a_run_of_a_released_version_is_resumed(path, data_dir, tmp_path):
    (tmp_path / "model_final.pt").write_bytes(path.read_bytes())
    assert train.main(["--resume", "--epochs", "2", "--output_dir", str(tmp_path), "--data_dir", str(data_dir),
                       "--device", "cpu"]) == 0
    saved = load_checkpoint(tmp_path / "model_final.pt")
    assert (saved["epoch"], saved["step"], saved["version"]) == (2, 8, __version__)


def test_a_version_that_is_no_name_is_refused(tmp_path):
    content = torch.load(RELEASED[0], weights_only=True) | dict(version=7)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="version is 7"):
        load_checkpoint(tmp_path / "x.pt")
