"""Every script from end to end on a few scenes: 64×64 pixels in colour, with the flags that digits have."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import distill
import doctor
import edit
import evaluate
import sample
import train
import visualize_diffusion
from checkpoint import load_checkpoint
from data import load_dataset, load_marks
from data_sources.scenes import MARKS, draw_scenes
from evaluation import metrics, two_sample
from training.budget import Budget

COUNT = 260  # images of each split: as many as the figures need
CPU = ["--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A data folder with COUNT scenes in each split, which stays in force for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SCENES", ((COUNT, 3, 64, 64), (2 * COUNT, 3, 64, 64)))
        patch.setattr(data, "VALIDATION_IMAGES", COUNT)
        patch.setattr(two_sample, "EPOCHS", 1)
        patch.setattr(two_sample, "CHANNELS", (8, 8, 8, 8))
        patch.setattr(metrics, "MAX_CLASS_FEATURES", 0)  # distances within classes take long
        data._read.cache_clear()
        yield tmp_path_factory.mktemp("data")
    data._read.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train.main(["--dataset", "scenes", "--data_dir", str(few), "--output_dir", str(folder), "--epochs", "1",
                       "--base_channels", "8", "--time_emb_dim", "16", "--batch_size", "130", *CPU]) == 0
    return folder / "model_final.pt"


def test_scenes_are_drawn_once_and_their_marks_keep_their_order(few):
    images, labels, colours, kinds, _ = draw_scenes(2 * COUNT, 0)
    for split, part in (("train", slice(0, COUNT)), ("validation", slice(COUNT, None))):
        found, marks = load_dataset("scenes", split, few), load_marks("scenes", split, few)
        assert np.array_equal(found.images.numpy(), images[part]) and np.array_equal(found.labels, labels[part])
        assert marks.shape == (COUNT, len(MARKS))
        for row, mine in zip(marks[:20], range(*part.indices(2 * COUNT)), strict=False):
            assert bool(row[colours[mine, 0]]) and bool(row[8 + kinds[mine, 0]])
    assert torch.equal(load_dataset("scenes", "test", few).images, torch.from_numpy(draw_scenes(COUNT, 1).images))
    assert sorted(path.name for path in (few / "scenes").iterdir()) == ["test.npz", "train.npz"]
    assert load_marks("glyphs", "train", few) is None


def test_training_takes_the_size_of_the_rule_and_keeps_the_names_of_the_classes(checkpoint):
    config = load_checkpoint(checkpoint)["config"]
    assert config["data"]["shape"] == [3, 64, 64] and config["data"]["class_names"] == ["one", "two", "three", "four"]
    assert (config["model"]["patch_size"], config["model"]["channel_mults"]) == (2, [1, 2, 2])
    assert (config["model"]["attention"], config["model"]["num_classes"]) == ([8], 4)


def test_a_number_of_objects_can_be_asked_for(checkpoint, tmp_path):
    path = tmp_path / "two.npz"
    assert sample.main(["--checkpoint", str(checkpoint), "--label", "two", "--num_images", "3", "--steps", "2",
                        "--output", str(path), *CPU]) == 0
    with np.load(path) as file:
        assert file["arr_0"].shape == (3, 64, 64, 3) and file["labels"].tolist() == [1, 1, 1]


def test_the_evaluation_of_scenes_has_their_own_figures(checkpoint, few, tmp_path):
    assert evaluate.main(["--checkpoint", str(checkpoint), "--num_images", str(COUNT), "--steps", "1", "--output_dir",
                          str(tmp_path), "--data_dir", str(few), *CPU]) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())["figures"]
    assert figures["scene_right"]["floor"] > 0.5 > figures["scene_right"]["value"]  # hardly trained
    assert figures["mark_distance"]["floor"] < 0.1 < figures["mark_distance"]["value"]


def test_pictures_in_colour_are_edited_distilled_examined_and_looked_into(checkpoint, few, tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "progress", lambda budget, step, _: step / 2)  # however long two steps take
    Image.fromarray(load_dataset("scenes", "test", few).images[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    here = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert edit.main(["inpaint", *here, "--image", str(tmp_path / "a.png"), "--mask", "left", "--steps", "2",
                      "--output", str(tmp_path / "b.png")]) == 0
    assert distill.main([*here, "--data_dir", str(few), "--output_dir", str(tmp_path / "student"), "--teacher_steps",
                         "4", "--batch_size", "8"]) == 0
    assert doctor.main([*here, "--data_dir", str(few)]) in (0, 1)  # a network of two steps has its defects
    for what in ("denoising", "attention", "loss"):
        assert visualize_diffusion.main([*here, "--what", what, "--data_dir", str(few), "--save_path",
                                         str(tmp_path / f"{what}.png")]) == 0
