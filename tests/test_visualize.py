"""visualize_diffusion.py: the hooks read what the network computes, and every picture is drawn."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from PIL import Image
from small import small_checkpoint, small_model
from torch.testing import assert_close

import utils
import visualize_diffusion
from checkpoint import load_model
from diffusion import DiffusionProcess
from evaluation import network_plots
from evaluation.network_plots import (
    attention_maps,
    attention_weights,
    bottleneck_features,
    capture_outputs,
    choose_queries,
    layer_titles,
    project_to_2d,
    unet_stages,
    x_0_errors,
)
from models.layers import Attention
from samplers import SAMPLERS, final_image, generate, spaced_timesteps

INSIDE = ("attention", "features", "embedding", "loss")


@pytest.fixture(scope="module")
def process():
    return DiffusionProcess(40, "cosine", prediction="edm", data_std=0.5)


@pytest.fixture(scope="module")
def noisy():
    return torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 20.0, 39.0])


def test_attention_weights_are_those_that_the_layer_uses():
    torch.manual_seed(0)
    layer, x = Attention(64), torch.randn(2, 64, 3, 5)
    torch.nn.init.normal_(layer.project.weight, std=0.1)
    qkv = layer.qkv(layer.norm(x))
    weights, v = attention_weights(qkv, layer.heads), qkv.reshape(2, 3, layer.heads, 32, 15)[:, 2]
    assert weights.shape == (2, 2, 15, 15)
    assert_close(weights.sum(-1), torch.ones(2, 2, 15))
    mixed = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)
    assert_close(x + layer.project(mixed), layer(x), rtol=1e-4, atol=1e-5)


def test_every_attention_layer_has_a_map(process, noisy):
    model = small_model(attention=[2, 4], depth=2)
    maps = attention_maps(model, process, *noisy)
    layers = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    assert list(maps) == layers and len(layers) == 3  # on the way down, in the middle, on the way up
    for weights in maps.values():
        assert weights.shape[0] == 3 and weights.shape[1:3] == weights.shape[3:] and weights.shape[1] in (8, 4)
        assert_close(weights.sum((3, 4)), torch.ones(weights.shape[:3]))


def test_a_network_without_attention_says_so(process, noisy):
    with pytest.raises(ValueError, match=r"no attention.*--attention 4"):
        attention_maps(small_model(attention=[]), process, *noisy)


def test_looking_changes_nothing(process, noisy):
    model = small_model()
    before = process.denoiser(model)(*noisy)
    capture_outputs(model, process, unet_stages(model), *noisy)
    assert torch.equal(process.denoiser(model)(*noisy), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_taken_off_when_the_network_fails(process):
    model = small_model()
    with pytest.raises(ValueError, match="divisible"):
        capture_outputs(model, process, unet_stages(model), torch.zeros(1, 1, 7, 7), torch.zeros(1))
    assert not any(module._forward_hooks for module in model.modules())


def test_features_of_many_frames_go_through_the_network_in_parts(process, monkeypatch):
    """The means are those of all at once."""
    model, images = small_model(), torch.randn(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    frames, sizes, means = [(t, images, images) for t in (30, 20, 10)], [], []
    capture = network_plots.capture_outputs
    monkeypatch.setattr(network_plots, "capture_outputs", lambda *args: sizes.append(len(args[3])) or capture(*args))
    monkeypatch.setattr(network_plots, "_feature_maps", lambda figure, frames, maps: means.append(maps))
    network_plots.draw_features(model, process, frames, None)
    whole = capture(model, process, unet_stages(model), *network_plots.stack_frames(frames, None))
    assert sizes == [100, 20]
    for name, values in means[0].items():
        assert_close(values.flatten(0, 1), whole[name].abs().mean(1))


def test_levels_come_in_the_order_of_the_image(process, noisy):
    model = small_model(patch_size=1, channel_mults=[1, 2, 3])
    outputs = capture_outputs(model, process, unet_stages(model), *noisy)
    assert list(outputs) == list(unet_stages(model)) == ["stem", "down 1", "down 2", "middle", "up 2", "up 1"]
    assert [output.shape[-1] for output in outputs.values()] == [16, 16, 8, 4, 8, 16]


def test_queries_lie_apart_where_the_image_has_something():
    image = -torch.ones(1, 28, 28)
    image[:, 8:24, 12:16] = 1  # a stroke: rows 2 to 5 of 7, column 3
    assert choose_queries(image, 7, 7, 8) == [(2, 3), (4, 3)]
    assert choose_queries(image, 7, 7, 1) == [(2, 3)]
    assert len(choose_queries(torch.zeros(1, 28, 28), 7, 7, 8)) >= 1  # no contrast: still one query


def test_the_bottleneck_depends_on_the_image_and_on_time(process):
    model, x_0 = small_model(), torch.rand(4, 1, 16, 16)
    features = bottleneck_features(model, process, x_0, torch.tensor([0.0, 0.0, 30.0, 30.0]), seed=0)
    assert features.shape == (4, 16) and len(features.unique(dim=0)) == 4
    assert torch.equal(features, bottleneck_features(model, process, x_0, torch.tensor([0.0, 0.0, 30.0, 30.0]), seed=0))


def test_the_error_of_a_perfect_guess_is_the_variance(process):
    """With prediction "x0", a network that returns 0 has the error |x_0|²."""
    x_0 = torch.rand(6, 1, 8, 8) - 0.5
    errors = x_0_errors(lambda x, t: torch.zeros_like(x), DiffusionProcess(40, prediction="x0"), x_0, [0, 20, 39], 0)
    assert_close(errors, x_0.square().mean().expand(3))


def test_the_network_is_seen_with_its_labels(process, noisy):
    """capture_outputs, bottleneck_features and x_0_errors pass the labels to the network."""
    model, labels = small_model(num_classes=5), torch.tensor([4, 0, 2])
    outputs = capture_outputs(model, process, {"all": model}, *noisy, labels)["all"]
    assert_close(outputs, process.predict(model, *noisy, labels))
    assert not torch.equal(outputs, capture_outputs(model, process, {"all": model}, *noisy)["all"])
    x_0, t = noisy[0].clamp(-1, 1), noisy[1]
    for result in (lambda known: bottleneck_features(model, process, x_0, t, 0, known),
                   lambda known: x_0_errors(model, process, x_0, [20], 0, known)):
        assert not torch.equal(result(labels), result(None)) and not torch.equal(result(labels), result(labels.flip(0)))


# -------------------------------------------------------------------------------------------------------- projection


def test_pca_keeps_the_distances_of_a_plane():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(50, 2, generator=generator)
    into = torch.linalg.qr(torch.randn(20, 2, generator=generator))[0]
    plane = project_to_2d(flat @ into.T + 3, "pca")
    assert_close(torch.pdist(plane), torch.pdist(flat), rtol=1e-4, atol=1e-4)


def test_tsne_keeps_groups_apart():
    pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install -r requirements-eval.txt")
    groups = torch.arange(60) % 3
    noise = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    points = torch.nn.functional.one_hot(groups, 10) * 20 + noise
    flat = project_to_2d(points, "tsne")
    assert flat.shape == (60, 2) and torch.equal(flat, project_to_2d(points, "tsne"))
    nearest = torch.cdist(flat, flat).fill_diagonal_(torch.inf).argmin(1)
    assert (groups[nearest] == groups).float().mean() > 0.95


def test_without_scikit_learn_the_error_names_the_file_and_the_other_way(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-eval.txt.*--projection pca"):
        project_to_2d(torch.zeros(5, 3), "tsne")


# ------------------------------------------------------------------------------------------------------- the pictures


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("see")
    return {"plain": small_checkpoint(folder / "plain.pt"),
            "labels": small_checkpoint(folder / "labels.pt", conditional=True, attention=[2, 4], depth=2),
            "one step": small_checkpoint(folder / "one.pt", num_timesteps=1),
            "no attention": small_checkpoint(folder / "none.pt", attention=[])}


def call(checkpoint, data_dir, path, *flags):
    few = [] if {"embedding", "loss", "forward", "schedules"} & {*flags} else ["--num_images", 3]
    return visualize_diffusion.main(list(map(str, [
        "--checkpoint", checkpoint, "--data_dir", data_dir, "--save_path", path, "--device", "cpu", *few, *flags])))


@pytest.fixture
def few(monkeypatch):
    """Few images and times: the tests only check that the pictures are drawn."""
    for name, value in dict(ERROR_IMAGES=8, ERROR_TIMES=4, GAUSSIAN_IMAGES=100, EMBEDDED_IMAGES=30,
                            EMBEDDED_TIMES=20).items():
        monkeypatch.setattr(f"evaluation.network_plots.{name}", value)


@pytest.mark.parametrize("what, which, flags", [
    ("attention", "plain", ["--steps", 3]), ("attention", "labels", ["--steps", 2]),
    ("attention", "one step", ["--steps", 1]), ("features", "plain", ["--steps", 3]),
    ("features", "one step", ["--steps", 1]), ("embedding", "plain", ["--projection", "pca"]),
    ("embedding", "labels", ["--projection", "pca"]), ("loss", "labels", []), ("loss", "one step", [])])
def test_every_picture_is_drawn(few, checkpoints, data_dir, tmp_path, what, which, flags):
    path = tmp_path / "new" / "picture.png"
    assert call(checkpoints[which], data_dir, path, "--what", what, *flags) == 0
    with Image.open(path) as picture:
        assert picture.convert("L").getextrema()[0] < 100 and min(picture.size) > 200
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("flags, labels, scale", [([], [0, 1, 2], 1.5), (["--label", "2,0"], [2, 2, 0], 1.5),
                                                  (["--guidance_scale", "3"], [0, 1, 2], 3.0)])
def test_what_is_followed_are_the_images_that_sample_makes(checkpoints, flags, labels, scale):
    args = visualize_diffusion.parse_args(["--what", "denoising", "--checkpoint", str(checkpoints["labels"]),
                                           "--num_images", "3", "--steps", "4", *flags])
    model, diffusion, checkpoint = load_model(args.checkpoint)
    with torch.no_grad():
        frames, options = visualize_diffusion.trajectory_frames(args, model, diffusion, checkpoint["config"])
        [(_, trajectory)] = generate(model, diffusion, (1, 28, 28), range(3), steps=4, labels=torch.tensor(labels),
                                     guidance_scale=scale)
        expected = final_image(trajectory)
    assert len(frames) == 4 and torch.equal(frames[-1][2], expected) and options["labels"].tolist() == labels


def test_only_the_steps_that_are_shown_are_kept(checkpoints):
    args = visualize_diffusion.parse_args(["--what", "denoising", "--checkpoint", str(checkpoints["plain"]),
                                           "--num_images", "2", "--steps", "40"])
    model, diffusion, checkpoint = load_model(args.checkpoint)
    with torch.no_grad():
        frames, options = visualize_diffusion.trajectory_frames(args, model, diffusion, checkpoint["config"], True)
    times = [*spaced_timesteps(diffusion, 40, SAMPLERS[options["sampler"]].spacing), -1]
    shown = [times[i] for i in visualize_diffusion.shown_steps(times, diffusion)]
    assert len(frames) == 10 and [t for t, _, _ in frames] == pytest.approx(shown)
    assert torch.equal(frames[-1][1], frames[-1][2])  # the image


def test_a_figure_of_too_many_pixels_is_refused(checkpoints, data_dir, tmp_path, capsys):
    argv = [checkpoints["plain"], data_dir, tmp_path / "x.png", "--what", "denoising", "--steps", 3]
    assert call(*argv, "--dpi", 2400, "--num_images", 64) == 2
    assert "--dpi" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("what", INSIDE)
def test_a_model_with_labels_is_never_asked_without(few, checkpoints, data_dir, tmp_path, monkeypatch, what):
    predict, told = DiffusionProcess.predict, []

    def watched(self, model, x_t, t, labels=None):
        told.append(labels)
        return predict(self, model, x_t, t, labels)
    monkeypatch.setattr(DiffusionProcess, "predict", watched)
    flags = ["--what", what, *{"embedding": ["--projection", "pca"], "loss": []}.get(what, ["--steps", 2])]
    assert call(checkpoints["labels"], data_dir, tmp_path / "x.png", *flags) == 0
    assert told and all(labels is not None for labels in told)


def test_the_folder_is_tried_before_any_work(checkpoints, data_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(visualize_diffusion, "generate", None)
    monkeypatch.setattr(visualize_diffusion, "load_dataset", None)
    for flags in (["--what", "denoising", "--checkpoint", checkpoints["plain"]], []):
        assert visualize_diffusion.main(list(map(str, [*flags, "--device", "cpu", "--data_dir", data_dir, "--save_path",
                                                       tmp_path / "file/x.png"]))) == 2
        assert "cannot write" in capsys.readouterr().err


def test_the_embedding_is_drawn_by_tsne(few, checkpoints, data_dir, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install -r requirements-eval.txt")
    assert call(checkpoints["plain"], data_dir, tmp_path / "x.png", "--what", "embedding") == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("what, which, flags, words", [
    ("attention", "no attention", ["--steps", 2], ["no attention", "--attention 4"]),
    ("attention", "plain", ["--steps", 41], ["1..40", "41"]),
    ("embedding", "one step", [], ["T = 1"]),
    ("denoising", "plain", ["--dataset", "mnist"], ["trained on glyphs", "leave out --dataset"]),
    ("forward", "plain", [], ["--checkpoint", "denoising"]),
    ("embedding", "plain", ["--projection", "umap"], ["umap", "tsne", "pca"])])
def test_what_cannot_be_seen_is_told_in_one_line(checkpoints, data_dir, tmp_path, capsys, what, which, flags, words):
    assert call(checkpoints[which], data_dir, tmp_path / "x.png", "--what", what, *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words) and not any(tmp_path.iterdir())


WHAT = ("forward", "schedules", "denoising", "attention", "features", "embedding", "loss")


@pytest.mark.parametrize("flag, value, readers", [
    ("--schedule", "cosine", ["forward"]), ("--timesteps", 30, ["forward", "schedules"]),
    ("--sampler", "ddim", ["denoising", "attention", "features"]),
    ("--label", 3, ["denoising", "attention", "features"]),
    ("--num_images", 3, ["forward", "denoising", "attention", "features"]), ("--projection", "pca", ["embedding"]),
    ("--seed", 0, [what for what in WHAT if what != "schedules"])])
def test_a_flag_that_changes_nothing_is_refused_and_its_readers_are_named(checkpoints, capsys, flag, value, readers):
    for what in WHAT:
        model = [] if what in visualize_diffusion.WITHOUT_MODEL else ["--checkpoint", str(checkpoints["labels"])]
        argv = ["--what", what, *model, flag, str(value)]
        if what in readers:
            assert getattr(visualize_diffusion.parse_args(argv), flag[2:]) is not None
        else:
            assert visualize_diffusion.main(argv) == 2
            error = capsys.readouterr().err
            assert len(error.splitlines()) == 1 and flag in error and ", ".join(readers) in error


def test_the_checkpoint_is_not_overwritten(checkpoints, data_dir, tmp_path, capsys):
    path = tmp_path / "model.png"
    path.write_bytes(checkpoints["plain"].read_bytes())
    assert call(path, data_dir, path, "--what", "features", "--steps", 1) == 2
    assert "overwrite" in capsys.readouterr().err and path.read_bytes() == checkpoints["plain"].read_bytes()


def test_frames_are_chosen_where_the_image_appears(process):
    """Of 40 even times: the first, the last, and an even spread over the log-SNR that samplers walk through."""
    steps = [*range(39, -1, -1), -1]
    times = [steps[i] for i in visualize_diffusion.shown_steps(steps, process)]
    assert len(times) == 10 and times == sorted(times, reverse=True) and times[0] == 39 and times[-1] == -1
    ends = [-2 * math.log(level * process.data_std) for level in (20, 0.1)]
    places = [min(max(process.log_snr(t).item(), ends[0]), ends[1]) for t in times]
    gaps = [b - a for a, b in pairwise(places)]
    even = visualize_diffusion.evenly_spaced(41, 10)
    even_places = [min(max(process.log_snr(steps[i]).item(), ends[0]), ends[1]) for i in even]
    assert max(gaps) < 0.6 * max(b - a for a, b in pairwise(even_places))
    assert visualize_diffusion.shown_steps(steps[:4], process) == [0, 1, 2, 3]
    assert len(visualize_diffusion.shown_steps(steps, process, 25)) == 25
    assert visualize_diffusion.shown_steps(steps[:1], process) == [0]


def test_every_attention_layer_has_its_own_title():
    model = small_model(attention=[2, 4], depth=2)
    titles = layer_titles(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    assert sorted(titles) == sorted(layers) and len(set(titles.values())) == len(layers)
    assert "middle" in titles.values()


def test_eight_pairs_are_no_portrait():
    pairs = [torch.zeros(20, 1, 28, 28, dtype=torch.uint8)] * 8
    width, height = visualize_diffusion.show_pairs(pairs, [f"t = {i}" for i in range(10)], "x").get_size_inches()
    utils.pyplot().close("all")
    assert width > height


@pytest.mark.parametrize("suffix, start", [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_figures_for_print_have_their_format(checkpoints, data_dir, tmp_path, suffix, start):
    path = tmp_path / f"x{suffix}"
    assert call(checkpoints["plain"], data_dir, path, "--what", "denoising", "--steps", 2, "--columns", 2) == 0
    assert path.read_bytes().startswith(start)
