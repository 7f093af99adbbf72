"""Points in the plane: the sets, the network, and the scripts from training to the picture of the field."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.quiver import Quiver
from PIL import Image
from torch.testing import assert_close

import distill
import doctor
import edit
import evaluate
import export
import sample
import train
import visualize_diffusion
from checkpoint import load_checkpoint
from data import DATASETS, code_of, load_dataset
from data_sources.points import CENTRE_STD, CENTRES, COORDINATES, POINT_SETS, scatter
from diffusion import DiffusionProcess
from evaluation import point_plots
from models import create_model
from runtime.checkpoints import newest_checkpoint
from utils import pyplot

# ----------------------------------------------------------------------------------------------------------- the sets


@pytest.mark.parametrize("name", POINT_SETS)
def test_points_lie_in_the_square_and_every_class_has_its_share(name):
    train_set, validation, test = (load_dataset(name, split, points=True) for split in ("train", "validation", "test"))
    for data in (train_set, validation, test):
        assert data.images.dtype == torch.float32 and data.images.shape == (len(data.labels), 2, 1, 1)
        assert data.images.abs().max() <= 1 and data.images.std() > 0.3
        assert torch.equal(data.x_0(), data.images) and data.code is COORDINATES
        counts = data.labels.bincount(minlength=len(data.class_names))
        assert len(counts) == len(data.class_names) and counts.min() > 0.8 * len(data.labels) / len(counts)
    assert not torch.equal(validation.images[:100], test.images[:100])
    assert torch.equal(load_dataset(name, "train", points=True).images, train_set.images)


def test_the_clouds_are_where_their_closed_form_says():
    data = load_dataset("gaussians", points=True)
    for label, centre in enumerate(CENTRES):
        mine = data.images[data.labels == label].flatten(1).double()
        assert_close(mine.mean(0), torch.from_numpy(centre), rtol=0, atol=0.01)
        assert_close(mine.std(0), torch.full((2,), CENTRE_STD).double(), rtol=0.05, atol=0)


def test_the_squares_of_the_board_are_full_or_empty():
    x, y = load_dataset("checkerboard", points=True).images.flatten(1).T
    column, row = ((x / 0.45 + 2).floor(), (2 - y / 0.45).floor())
    assert set(zip(column.tolist(), row.tolist(), strict=True)) == {(c, r) for c in range(4) for r in range(4)
                                                                    if c % 2 == r % 2}


def test_a_picture_has_a_dot_for_each_point_in_the_colour_of_its_label():
    points = torch.tensor([[-0.5, 0.5], [0.5, -0.5]])[:, :, None, None]
    picture = scatter(points, torch.tensor([0, 1]))
    blue, orange = picture[192, 192], picture[448, 448]  # x to the right, y upwards
    assert blue[2] > 150 > blue[0] and orange[0] > 200 > orange[2] and (picture[192, 448] == 255).all()


# --------------------------------------------------------------------------------------------------------- the network


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = create_model("mlp", base_channels=16, time_emb_dim=16, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model


def test_points_do_not_mix_and_time_and_label_count(network):
    x, t, labels = torch.randn(4, 2, 1, 1), torch.tensor([1.0, 50, 500, 999]), torch.tensor([0, 1, 2, 3])
    out = network(x, t, labels)
    assert out.shape == x.shape
    for i in range(4):
        assert_close(network(x[i:i + 1], t[i:i + 1], labels[i:i + 1]), out[i:i + 1], rtol=1e-4, atol=1e-5)
    assert (network(x, t.flip(0), labels) - out).abs().min() > 0
    assert (network(x, t, labels.flip(0)) - out).abs().min() > 0
    assert torch.equal(network(x, t), network(x, t, torch.full((4,), 3)))  # no label


def test_every_parameter_learns_and_the_config_rebuilds_the_network(network):
    DiffusionProcess(prediction="v").loss(network, torch.randn(8, 2, 1, 1), labels=torch.arange(8) % 4).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    again = create_model(**json.loads(json.dumps(network.config)))
    again.load_state_dict(network.state_dict())
    assert again.config == network.config


@pytest.mark.parametrize("config, words", [(dict(network="transformer"), ["transformer", "unet, mlp"]),
                                           (dict(network="mlp", patch_size=2), ["patch_size"]),
                                           (dict(network="mlp", depth=0), ["depth", "0"]),
                                           (dict(network="mlp", activation="tanh"), ["tanh", "silu"])], ids=str)
def test_impossible_networks_are_named(config, words):
    with pytest.raises(ValueError) as caught:
        create_model(**config)
    assert all(word in str(caught.value) for word in words)


def test_images_are_refused_by_the_network_of_points(network):
    with pytest.raises(ValueError, match=r"\(B, 2, 1, 1\).*\(1, 2, 3, 1\)"):
        network(torch.zeros(1, 2, 3, 1), torch.zeros(1))


# --------------------------------------------------------------------------------------------------------- the scripts


def call(script, *argv):
    return script.main([*map(str, argv)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a short run on gaussians."""
    folder = tmp_path_factory.mktemp("points")
    assert call(train, "--dataset", "gaussians", "--train_images", 1024, "--epochs", 6, "--base_channels", 16,
                "--output_dir", folder, "--device", "cpu", "--sample_interval", 3) == 0
    return folder


@pytest.fixture
def few(monkeypatch):
    for name, value in dict(PIXELS=20, ARROWS=5, ENDS=20, PATHS=3, MAX_CENTRES=50, PATH_STEPS=(1, 2, 3, 4)).items():
        monkeypatch.setattr(point_plots, name, value)


def test_training_writes_all_its_files(run):
    saved = load_checkpoint(run / "model_final.pt")
    assert saved["config"]["model"]["network"] == "mlp" and saved["config"]["data"]["shape"] == [2, 1, 1]
    assert code_of(saved["config"]) is COORDINATES
    losses = [r["val_loss"] for r in saved["history"]["records"] if r["val_loss"] is not None]
    assert losses[-1] < losses[0]
    for epoch in (3, 6):
        assert Image.open(run / f"samples/epoch_{epoch:03d}.png").size == (640, 640)


def test_a_run_of_points_goes_on(run, tmp_path):
    for name in ("model_final.pt", "run.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert call(train, "--output_dir", tmp_path, "--resume", "--epochs", 7, "--device", "cpu") == 0
    assert load_checkpoint(tmp_path / "model_final.pt")["epoch"] == 7


def test_samples_are_a_picture_or_numbers(run, tmp_path, capsys):
    assert call(sample, "--checkpoint", run / "model_final.pt", "--output", tmp_path / "x.png", "--device", "cpu") == 0
    assert "64 points by" in capsys.readouterr().out and Image.open(tmp_path / "x.png").size == (640, 640)
    assert call(sample, "--checkpoint", run / "model_final.pt", "--output", tmp_path / "x.npz", "--label", "3,5",
                "--num_images", 6, "--device", "cpu") == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (6, 1, 1, 2) and file["arr_0"].dtype == np.float32
        assert file["labels"].tolist() == [3, 3, 3, 5, 5, 5] and np.abs(file["arr_0"]).max() <= 1


@pytest.mark.parametrize("flags", [["--dataset", "moons"], ["--dataset", "gaussians", "--label", 2],
                                   ["--checkpoint"], ["--checkpoint", "--label", 1, "--guidance_scale", 2],
                                   ["--checkpoint", "--sampler", "ddpm", "--spacing", "uniform", "--seed", 1]], ids=str)
def test_the_field_is_drawn(run, few, tmp_path, flags):
    flags = [word for flag in flags for word in ([flag, run / "model_final.pt"] if flag == "--checkpoint" else [flag])]
    assert call(visualize_diffusion, "--what", "field", *flags, "--save_path", tmp_path / "field.png") == 0
    assert min(Image.open(tmp_path / "field.png").size) > 400


def test_the_exact_denoiser_is_that_of_the_points_that_are_shown():
    data, process = load_dataset("gaussians", points=True), DiffusionProcess(schedule="cosine")
    noise = torch.randn(500, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    x_t = process.q_sample(data.images[:500], 300, noise)
    own = point_plots.exact_mixture("gaussians", data.images).denoiser(process)(x_t, 300)
    of_points = point_plots.exact_mixture("moons", data.images).denoiser(process)(x_t, 300)
    assert (own - of_points).square().mean().sqrt() < 0.02  # 4,000 points stand for their distribution
    alone = point_plots.exact_mixture("gaussians", data.images, label=2).denoiser(process)(x_t, 300)
    assert (alone - torch.from_numpy(CENTRES[2])[:, None, None]).abs().max() < 0.2


def test_the_field_of_a_network_that_was_never_without_labels_needs_one(run, tmp_path, capsys):
    content = torch.load(run / "model_final.pt", weights_only=True)
    content["config"]["training"]["label_dropout"] = 0.0
    torch.save(content, tmp_path / "model.pt")
    for flags in ([], ["--label", "0", "--guidance_scale", "2"]):
        argv = ["--what", "field", "--checkpoint", tmp_path / "model.pt", "--save_path", tmp_path / "x.png", *flags]
        assert call(visualize_diffusion, *argv) == 2
        assert "never shown an image without its label" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_the_arrows_of_a_column_have_one_scale(few):
    """Also if a network's are half as long: else the picture would be that of the exact denoiser."""
    data, process = load_dataset("gaussians", points=True), DiffusionProcess(schedule="cosine")
    exact, t = point_plots.exact_mixture("gaussians", data.images), 500
    alpha, denoise = process.alpha(t), exact.denoiser(process)
    shown = []
    for each in (denoise, lambda x_t, t: (denoise(x_t, t) + x_t / alpha) / 2):
        axis = pyplot().subplots()[1]
        point_plots.draw_arrows(axis, each, exact, t, process)
        [quiver] = [part for part in axis.collections if isinstance(part, Quiver)]
        shown.append((quiver.scale, float(np.hypot(quiver.U, quiver.V).mean())))
    pyplot().close("all")
    assert shown[0][0] == pytest.approx(shown[1][0]) and shown[1][1] == pytest.approx(shown[0][1] / 2, rel=1e-3)
    extent = 1.1 * alpha.item() + 2 * process.sigma(t).item()
    assert shown[0][1] / shown[0][0] == pytest.approx(point_plots.LENGTH * 2 * extent / point_plots.ARROWS, rel=1e-3)


REFUSED = "holds points in the plane, and this is for images"


@pytest.mark.parametrize("script, flags", [
    (edit, ["inpaint"]), (edit, ["vary"]), (edit, ["interpolate"]), (edit, ["invert"]), (distill, []), (evaluate, []),
    (doctor, []), (visualize_diffusion, ["--what", "denoising"]), (visualize_diffusion, ["--what", "attention"]),
    (visualize_diffusion, ["--what", "loss"])], ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_is_for_images_says_so(run, tmp_path, monkeypatch, capsys, script, flags):
    monkeypatch.chdir(tmp_path)
    assert call(script, *flags, "--checkpoint", run / "model_final.pt", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert REFUSED in error and "gaussians" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("kind", export.OUTPUTS)
def test_points_are_not_exported(run, tmp_path, capsys, kind):
    assert call(export, "--checkpoint", run / "model_final.pt", "--format", kind) == 2
    error = capsys.readouterr().err
    assert REFUSED in error and len(error.splitlines()) == 1
    assert not (run / export.OUTPUTS[kind]).exists()


@pytest.mark.parametrize("script, flags, words", [
    (visualize_diffusion, ["--dataset", "moons"], [REFUSED, "--what field"]),
    (doctor, ["--dataset", "moons"], [REFUSED]),
    (evaluate, ["--images", "x.npz", "--dataset", "moons"], [REFUSED]),
    (evaluate, ["--train_features", "moons"], [REFUSED]),
    (visualize_diffusion, ["--what", "field", "--dataset", "mnist"], ["mnist holds images", "moons"]),
    (visualize_diffusion, ["--what", "field", "--dataset", "moons", "--label", "0,1"], ["one class at a time"]),
    (visualize_diffusion, ["--what", "field", "--dataset", "moons", "--label", "left"], ["left", "0 upper"]),
    (visualize_diffusion, ["--what", "field", "--dataset", "moons", "--guidance_scale", "2"], ["--checkpoint"]),
    (train, ["--dataset", "moons", "--patch_size", "2"], ["--patch_size", "moons", "leave it out"]),
    (train, ["--dataset", "moons", "--learn_variance"], ["--learn_variance", "leave it out"]),
    (train, ["--dataset", "moons", "--dropout", "0.1"], ["--dropout", "leave it out"]),
    (train, ["--dataset", "moons", "--level_code", "histogram"], ["--level_code", "leave it out"])], ids=str)
def test_what_cannot_be_with_points_is_told_in_one_line(tmp_path, monkeypatch, capsys, script, flags, words):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((10, 28, 28, 1), np.uint8))
    assert call(script, *flags, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and len(error.splitlines()) == 1, error


@pytest.mark.parametrize("flags", [["--dropout", "0.1"], ["--hflip"]], ids=str)
def test_flags_for_images_are_refused_for_a_run_on_points_that_is_resumed(run, capsys, flags):
    assert call(train, "--resume", "--output_dir", run, *flags, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert flags[0] in error and "gaussians holds points" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("flag", [["--gif"], ["--show_intermediate"], ["--columns", "3"], ["--scale", "2"]], ids=str)
def test_flags_for_grids_are_refused_with_points(run, tmp_path, capsys, flag):
    assert call(sample, "--checkpoint", run / "model_final.pt", *flag, "--output", tmp_path / "x.png") == 2
    error = capsys.readouterr().err
    assert flag[0] in error and "--what field" in error and not any(tmp_path.iterdir())


def test_scripts_for_images_do_not_choose_the_newest_run_of_points(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path("outputs/model_final.pt")
    path.parent.mkdir()
    path.write_bytes((run / "model_final.pt").read_bytes())
    assert newest_checkpoint() is None and newest_checkpoint(students=False) is None
    assert newest_checkpoint(points=True) == newest_checkpoint(students=False, points=True) == path
    assert call(sample, "--num_images", 4, "--output", tmp_path / "x.png", "--device", "cpu") == 0
    assert f"Using {path}" in capsys.readouterr().out


def test_the_rows_of_points_are_marked():
    assert {name for name, row in DATASETS.items() if row.code is COORDINATES} == set(POINT_SETS)
