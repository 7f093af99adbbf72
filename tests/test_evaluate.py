"""evaluate.py from end to end on glyphs: its figures for good, bad and copied images, and what it refuses."""

import functools
import hashlib
import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small import with_level_code
from torch.nn import functional as F

import evaluate
import sample
from checkpoint import FIELDS, load_checkpoint, load_model, save_checkpoint
from data import ImageData, code_of, load_dataset
from data_sources.pictures import read_images
from data_sources.scenes import COLOURS, draw_scenes, marks
from diffusion import DiffusionProcess
from evaluation import autoencoder_training, classifier, classifier_training, inputs, metrics, reference, two_sample
from evaluation.autoencoder import SUFFIX, load_autoencoder
from evaluation.classifier import load_feature_network
from evaluation.classifier_training import ClassifierRecipe
from evaluation.features import extract_features
from evaluation.floors import floor_cache
from evaluation.metrics import figures, random_groups, scene_figures, torchmetrics_image
from evaluation.reference import random_subset
from learned_variance import bits_per_dim
from models import create_model
from runtime.progress import Bar
from utils import generator_for

pytest.importorskip("torchmetrics", reason="torchmetrics is missing: pip install -r requirements-eval.txt")
SPLIT = 600  # images of each split
COUNT = 260


@pytest.fixture(scope="module")
def floors(tmp_path_factory):
    """The folder in which the tests of this file keep floors."""
    return tmp_path_factory.mktemp("floors")


@functools.cache
def first_images(*args):
    return load_dataset(*args).first(SPLIT)


@pytest.fixture
def small(monkeypatch, data_dir, floors):
    """Splits of SPLIT images, so that a whole evaluation takes a second; returns run(*flags) -> exit status."""
    for module in (evaluate, inputs, reference, classifier_training, autoencoder_training):
        monkeypatch.setattr(module, "load_dataset", first_images)
    monkeypatch.setattr(reference, "floor_cache", lambda *args: floor_cache(*args)._replace(folder=floors))
    monkeypatch.setattr(two_sample, "EPOCHS", 1)
    monkeypatch.setattr(two_sample, "CHANNELS", (8, 8, 8, 8))
    monkeypatch.setattr(metrics, "GROUPS", 5)  # each figure is computed 6 times instead of 21

    def run(*flags):
        return evaluate.main([*map(str, flags), "--data_dir", str(data_dir), "--device", "cpu", "--precision", "fp32"])
    return run


@pytest.fixture
def checkpoint(tmp_path):
    """Writes an untrained checkpoint of glyphs."""
    def write(num_classes=None):
        torch.manual_seed(0)
        model = create_model(base_channels=8, time_emb_dim=16, patch_size=4, attention=[], num_classes=num_classes)
        config = dict(model=model.config, diffusion=DiffusionProcess(num_timesteps=20).config,
                      data=dict(dataset="glyphs", shape=[1, 28, 28], class_names=list("0123456789")), training={})
        state = model.state_dict()
        fields = {name: kind() for name, kind in FIELDS.items()}
        save_checkpoint(tmp_path / "model.pt", **fields | dict(config=config, model=state, ema=state))
        return tmp_path / "model.pt"
    return write


def write_npz(path, images, **more):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return path


def report(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def judge(data_dir):
    """judge(images, labels) -> figures against real test images of glyphs; judge.real: other real images."""
    network = load_feature_network("glyphs")
    real = extract_features(random_subset(load_dataset("glyphs", "test", data_dir), 800).images, network)

    def judge(images, labels=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "GROUPS", 2)  # for intervals, which are not looked at
            result = figures(extract_features(images, network), real, labels)
        return {name: figure["value"] for name, figure in result.items()}
    judge.real = random_subset(load_dataset("glyphs", "validation", data_dir), 600)
    judge.whole = judge(judge.real.images, judge.real.labels)
    return judge


def test_the_floor_of_real_images_is_close_to_the_best(judge):
    floor = judge.whole
    assert floor["frechet_distance"] < 1 and abs(floor["kernel_distance"]) < 0.05 and floor["class_distance"] < 0.08
    for name, least in (("precision", 0.6), ("recall", 0.6), ("density", 0.7), ("coverage", 0.7), ("confident", 0.95),
                        ("asked_class", 0.97)):
        assert floor[name] > least, name


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_the_shipped_network_knows_real_images(name, request):
    files = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}
    folder = request.config.rootpath / "data"
    if not (folder / files[name]).is_dir():
        pytest.skip(f"{folder / files[name]} is missing: real {name} is not here")
    data = random_subset(load_dataset(name, "test", folder), 500)
    probabilities = extract_features(data.images, load_feature_network(name)).probabilities
    accuracy = (probabilities.argmax(1) == data.labels).double().mean().item()
    assert accuracy > {"mnist": 0.98, "fashion_mnist": 0.9, "cifar10": 0.8}[name]


@pytest.fixture(scope="module")
def scenes():
    """judge(images, labels) -> the figures of scenes against others; judge.real: 400 scenes that no network knows."""
    network, real = load_feature_network("scenes"), draw_scenes(400, 1)
    known = extract_features(torch.from_numpy(draw_scenes(600, 2).images), network)

    def judge(images, labels):
        features = extract_features(images, network)
        found = scene_figures(features, known, labels, random_groups(len(images)))
        return {name: values[0].item() for name, values in found.items()} | dict(features=features)
    judge.real, judge.labels = real, torch.from_numpy(real.labels)
    return judge


def test_the_shipped_network_knows_scenes(scenes):
    found = scenes(torch.from_numpy(scenes.real.images), scenes.labels)
    right = (found["features"].probabilities.argmax(1) == scenes.labels).double().mean()
    there = marks(torch.from_numpy(scenes.real.colours), torch.from_numpy(scenes.real.kinds))[:, :len(COLOURS)]
    assert right > 0.9 and ((found["features"].marks[:, :len(COLOURS)] > 0.5) == there).double().mean() > 0.97
    assert found["scene_right"] > 0.6 and found["mark_distance"] < 0.05


@pytest.mark.parametrize("spoil", ["other labels", "no colour", "two in one", "blurred"])
def test_wrong_numbers_and_unclear_colours_make_scenes_wrong(scenes, spoil):
    images, labels = torch.from_numpy(scenes.real.images), scenes.labels
    right = scenes(images, labels)["scene_right"]
    if spoil == "other labels":
        assert scenes(images, (labels + 1) % 4)["scene_right"] < 0.1
        return
    spoiled = {"no colour": lambda x: x.float().mean(1, keepdim=True).expand_as(x).to(torch.uint8),
               "two in one": lambda x: ((x.float() + x.roll(1, 0).float()) / 2).to(torch.uint8),
               "blurred": lambda x: blurred(x, 15)}[spoil](images)
    assert scenes(spoiled, labels)["scene_right"] < right / 2


def blurred(images, size):
    return F.avg_pool2d(images.float(), size, 1, size // 2, count_include_pad=False).round().to(torch.uint8)


def noised(images, std):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images.float() + std * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("spoil, amounts", [(blurred, (1, 3, 5)), (noised, (0, 40, 80))])
def test_the_figures_get_worse_as_images_do(judge, spoil, amounts):
    results = [judge(spoil(judge.real.images, amount)) for amount in amounts]
    for name, sign in (("frechet_distance", 1), ("kernel_distance", 1), ("precision", -1), ("density", -1),
                       ("coverage", -1)):
        values = [sign * result[name] for result in results]
        assert values == sorted(values) and values[0] < values[-1], (name, values)


def test_a_missing_class_lowers_recall_and_coverage(judge):
    whole, missing = judge(judge.real.images), judge(judge.real.images[judge.real.labels != 3])
    assert missing["recall"] < whole["recall"] - 0.05
    assert missing["coverage"] < whole["coverage"] - 0.05
    assert missing["frechet_distance"] > whole["frechet_distance"]
    assert missing["class_distance"] > 0.05


def test_copies_of_one_image_have_no_recall(judge):
    copies = judge(judge.real.images[:1].expand(600, -1, -1, -1))
    assert copies["recall"] < 0.02 and copies["coverage"] < 0.02 and copies["class_distance"] > 0.8
    assert copies["frechet_distance"] > judge(judge.real.images)["frechet_distance"]


def test_a_copying_generator_is_caught(small, tmp_path, data_dir, capsys):
    images = load_dataset("glyphs", "train", data_dir).images[:COUNT]
    path = write_npz(tmp_path / "x.npz", images)
    assert small("--images", path, "--dataset", "glyphs", "--output_dir", tmp_path) == 0
    memorised = report(tmp_path)["memorisation"]
    for space in ("pixels", "features"):
        assert memorised[space]["closer_than_99_percent"] == 1 and memorised[space]["copies"] > 0.99
    out = capsys.readouterr().out
    assert "copies: 100.00%" in out and "100 % of them are copies" in out and (tmp_path / "nearest.png").exists()


def test_copies_are_looked_for_among_the_images_that_were_learned_from(small, checkpoint, tmp_path):
    path = checkpoint()
    fields = {name: load_checkpoint(path)[name] for name in FIELDS}
    fields["config"]["training"] = dict(train_images=300)
    save_checkpoint(path, **fields)
    assert small("--checkpoint", path, "--num_images", COUNT, "--steps", 1, "--output_dir", tmp_path) == 0
    assert report(tmp_path)["memorisation"]["training_images"] == 300


def test_mirrored_copies_are_caught_where_the_network_has_seen_them(small, tmp_path, data_dir, monkeypatch):
    path = write_npz(tmp_path / "x.npz", load_dataset("glyphs", "train", data_dir).images[:COUNT].flip(3))
    look, caught = evaluate.memorisation, []
    for mirrored in (False, True):
        monkeypatch.setattr(evaluate, "memorisation", lambda *given, seen=mirrored: look(*given[:6], seen))
        assert small("--images", path, "--dataset", "glyphs", "--output_dir", tmp_path) == 0
        caught.append([report(tmp_path)["memorisation"][space]["copies"] for space in ("pixels", "features")])
    assert max(caught[0]) < 0.5 and min(caught[1]) > 0.99


def test_unseen_images_are_not_accused_and_have_all_figures(small, tmp_path, data_dir, capsys):
    data = load_dataset("glyphs", "validation", data_dir)
    path = write_npz(tmp_path / "x.npz", data.images[-COUNT:], labels=data.labels[-COUNT:].numpy())
    assert small("--images", path, "--dataset", "glyphs", "--output_dir", tmp_path) == 0
    result, out = report(tmp_path), capsys.readouterr().out
    assert result["memorisation"]["features"]["copies"] < 0.1
    assert {"levels", "class_frechet", "two_sample_pixels", "two_sample_shapes"} < set(result["figures"])
    assert "\nWhat gives the images away: " in out
    for name, figure in result["figures"].items():
        assert set(figure) == {"value", "low", "high", "floor", "n"} and figure["n"] == COUNT and name in out
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert result["figures"]["asked_class"]["value"] > 0.95
    assert result["reference"] == {"split": "test", "n": SPLIT}
    assert result["floor"] == {"split": "validation", "n": COUNT}
    assert {"command", "versions", "feature_network_sha256", "images_sha256"} <= set(result)


@pytest.mark.parametrize("coded", [False, True])
def test_a_checkpoint_and_its_images_agree_to_the_digit_and_so_do_two_runs(small, checkpoint, tmp_path, data_dir,
                                                                           coded):
    path = checkpoint()
    if coded:
        with_level_code(path, load_dataset("glyphs", "train", data_dir).images[:500])
    flags = ["--checkpoint", path, "--num_images", COUNT, "--steps", 2, "--batch_size", 100, "--seed", 5,
             "--output_dir", tmp_path]
    assert small(*flags) == 0
    first = (tmp_path / "evaluation.json").read_bytes()
    assert small(*flags) == 0
    assert (tmp_path / "evaluation.json").read_bytes() == first
    assert sample.main(["--checkpoint", str(path), "--num_images", str(COUNT), "--steps", "2", "--batch_size", "100",
                        "--seed", "5", "--device", "cpu", "--precision", "fp32",
                        "--output", str(tmp_path / "x.npz")]) == 0
    assert small("--images", tmp_path / "x.npz", "--dataset", "glyphs", "--output_dir", tmp_path / "again") == 0
    again, first = report(tmp_path / "again"), json.loads(first)
    for part in ("figures", "memorisation", "classes", "images_sha256"):
        assert again[part] == first[part]
    assert first["seed"] == 5 and len(first["checkpoint_sha256"]) == 64


def test_images_that_have_no_name_are_refused(small, capsys):
    for more in ([], ["--dataset", "glyphs"]):
        assert small("--images", "", *more) == 2 and "--images" in capsys.readouterr().err


def test_results_are_not_written_among_the_images_that_are_read(small, tmp_path, capsys):
    from PIL import Image
    Image.new("L", (28, 28)).save(tmp_path / "one.png")
    assert small("--images", tmp_path, "--dataset", "glyphs", "--output_dir", tmp_path) == 2
    assert "written into the input" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_the_floor_has_as_many_images_as_the_figure_or_the_measurement_is_refused(small, checkpoint, tmp_path,
                                                                                  data_dir, monkeypatch, capsys):
    """Also before any image is made; the validation split, as the reference, has the larger test split as its floor."""
    path = write_npz(tmp_path / "x.npz", load_dataset("glyphs", "train", data_dir).images[:COUNT + 40])
    sizes = {"train": SPLIT, "validation": COUNT, "test": SPLIT}
    for module in (evaluate, inputs, reference):
        monkeypatch.setattr(module, "load_dataset", lambda name, split, *where: load_dataset(name, split, *where).first(
            sizes[split]))
    ready = ["--images", path, "--dataset", "glyphs", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(inputs, "generate", None)
    for flags in (ready, ["--checkpoint", checkpoint(), "--num_images", COUNT + 40, "--output_dir", tmp_path / "out"]):
        assert small(*flags) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and f"--num_images {COUNT}" in error and "--reference validation" in error
    assert not (tmp_path / "out/evaluation.json").exists()
    small(*ready, "--reference", "validation")
    result = report(tmp_path / "out")
    assert result["floor"] == {"split": "test", "n": COUNT + 40} and result["num_images"] == COUNT + 40


def test_measuring_adapts_its_number_of_threads_unless_it_is_given(cores, small, checkpoint, tmp_path, monkeypatch):
    flags = ["--checkpoint", checkpoint(), "--num_images", COUNT, "--steps", 4, "--output_dir", tmp_path]
    tuner, searches = evaluate.threads.ThreadTuner, []
    monkeypatch.setattr(tuner, "_search", lambda self, *args, search=tuner._search: searches.append(self) or (
        yield from search(self, *args)))
    assert small(*flags) == 0 and set(cores) == {1, 2}
    assert len(set(searches)) >= 2  # while images are made, and while they are measured
    cores.clear()
    assert small(*flags, "--threads", 2) == 0 and set(cores) == {2}


def test_a_conditional_checkpoint_is_asked_for_the_classes_of_the_data(small, checkpoint, tmp_path):
    assert small("--checkpoint", checkpoint(10), "--num_images", COUNT, "--steps", 1, "--output_dir", tmp_path) == 0
    assert report(tmp_path)["figures"]["asked_class"]["value"] < 0.5  # it is untrained


def test_a_sweep_compares_samplers_step_counts_and_scales(small, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "SAMPLERS", {name: inputs.SAMPLERS[name] for name in ("ddim", "heun")})
    assert small("--checkpoint", checkpoint(10), "--num_images", COUNT, "--sweep", 1, 3, "--guidance_scale", 1, 2,
                 "--output_dir", tmp_path) == 0
    result, out = json.loads((tmp_path / "sweep.json").read_text()), capsys.readouterr().out
    assert [(r["sampler"], r["guidance_scale"], r["steps"]) for r in result["rows"]] == [
        (sampler, scale, steps) for sampler in ("ddim", "heun") for scale in (1, 2) for steps in (1, 3)]
    assert [r["nfe"] for r in result["rows"]] == [1, 3, 2, 6, 1, 5, 2, 10]  # heun: twice but for the last step
    assert (tmp_path / "sweep.png").exists() and (tmp_path / "sweep_images.png").exists()
    assert out.count("heun") == 4 and f"{COUNT}" in out


def test_a_sweep_is_for_choosing(small, checkpoint, tmp_path):
    """Without --reference it takes validation, without values as many steps as there are, of --sampler alone."""
    assert small("--checkpoint", checkpoint(), "--num_images", COUNT, "--sweep", "--sampler", "ddim", "--eta", 0.5,
                 "--output_dir", tmp_path) == 0
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert result["reference"]["split"] == "validation" and result["floor"]["split"] == "test"
    assert [(row["sampler"], row["steps"]) for row in result["rows"]] == [("ddim", 5), ("ddim", 10), ("ddim", 20)]
    assert (result["sampler"], result["steps"], result["eta"]) == ("ddim", None, 0.5)


def test_eta_and_the_last_weights_are_measured_as_sample_makes_them(small, checkpoint, tmp_path, monkeypatch):
    path = checkpoint()
    saved = load_checkpoint(path)
    saved["ema"] = {name: value + 0.1 for name, value in saved["ema"].items()}
    save_checkpoint(path, **{name: saved[name] for name in FIELDS})
    digests = []
    for flags in ([], ["--no-use_ema"], ["--sampler", "ddim"], ["--sampler", "ddim", "--eta", 1]):
        how = ["--num_images", COUNT, "--steps", 3, *flags]
        assert small("--checkpoint", path, *how, "--batch_size", 64) == 0
        measured = report(tmp_path)  # beside the checkpoint
        assert measured["use_ema"] is ("--no-use_ema" not in flags) and measured["eta"] == ("--eta" in flags)
        assert sample.main(list(map(str, ["--checkpoint", path, "--device", "cpu", "--precision", "fp32", "--output",
                                          tmp_path / "x.npz", *how]))) == 0
        images = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).permute(0, 3, 1, 2).contiguous()
        assert measured["images_sha256"] == hashlib.sha256(images.numpy().tobytes()).hexdigest()
        digests.append(measured["images_sha256"])
    assert len(set(digests)) == 4


def test_results_lie_beside_the_checkpoint(monkeypatch):
    asked = ["--checkpoint", "outputs/student/model_final.pt"]
    assert evaluate.output_folder(evaluate.parse_args(asked)) == Path("outputs/student")
    assert evaluate.output_folder(evaluate.parse_args([*asked, "--output_dir", "x"])) == Path("x")
    assert evaluate.output_folder(evaluate.parse_args(["--images", "x.npz", "--dataset", "glyphs"])) == Path("outputs")


def test_no_folder_is_made_for_a_checkpoint_that_is_missing(small, tmp_path, capsys):
    assert "no checkpoint" in refused(small, capsys, "--checkpoint", tmp_path / "new/none.pt")
    assert not any(tmp_path.iterdir())


def test_folders_of_pngs_grey_or_grey_in_colour(tmp_path, data_dir):
    from PIL import Image

    images = load_dataset("glyphs", "test", data_dir).images[:4]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    assert torch.equal(read_images(tmp_path, (1, 28, 28), 10)[0], images)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).convert("RGB").save(tmp_path / f"{i}.png")
    assert torch.equal(read_images(tmp_path, (1, 28, 28), 10)[0], images)


def test_folders_of_pngs_with_a_palette_or_one_bit_are_read_as_they_look(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 4, (28, 28)).astype(np.uint8)
    palette = Image.fromarray(pixels).convert("P")
    palette.putpalette([200, 200, 200, 10, 10, 10, 90, 90, 90, 255, 255, 255] + 252 * [0, 0, 0])
    palette.save(tmp_path / "0.png")
    Image.fromarray(255 * (pixels > 1).astype(np.uint8)).convert("1").save(tmp_path / "1.png")
    with Image.open(tmp_path / "0.png") as image:
        assert image.mode == "P"
    images = read_images(tmp_path, (1, 28, 28), 10)[0]
    assert np.array_equal(images[0, 0], np.array([200, 10, 90, 255])[pixels])
    assert np.array_equal(images[1, 0], 255 * (pixels > 1))


def test_cas_is_the_accuracy_of_a_classifier_that_saw_only_the_images(small, tmp_path, data_dir, monkeypatch):
    recipe = ClassifierRecipe(width=32, epochs=8, batch_size=25, augment=None)
    monkeypatch.setitem(classifier_training.CLASSIFIER_RECIPES, "glyphs", recipe)
    data = load_dataset("glyphs", "train", data_dir).first(COUNT)
    good = write_npz(tmp_path / "x.npz", data.images, labels=data.labels.numpy())
    assert small("--images", good, "--dataset", "glyphs", "--cas", "--output_dir", tmp_path) == 0
    cas = report(tmp_path)["figures"]["cas"]
    assert cas["value"] > 0.5 and cas["floor"] > 0.5 and cas["low"] < cas["value"] < cas["high"] and cas["n"] == COUNT
    trained, made, train = [], [], reference.new_classifier

    def count(data, *how):
        trained.append(data.split)
        if not made:
            made.append(train(data, *how))
        return made[0]
    monkeypatch.setattr(reference, "new_classifier", count)
    assert small("--images", good, "--dataset", "glyphs", "--cas", "--output_dir", tmp_path) == 0
    assert report(tmp_path)["figures"]["cas"] == cas and trained == ["generated"]  # the floor was kept
    assert small("--images", good, "--dataset", "glyphs", "--cas", "--seed", 1, "--output_dir", tmp_path) == 0
    assert trained == ["generated", "generated", "validation"]


def test_no_batch_of_a_classifier_has_one_of_many_images():
    """Batch norm of one value is no number."""
    for count, sizes in ((257, [128, 128]), (256, [128, 128]), (130, [128, 2]), (1, [1])):
        batches = classifier_training.shuffled_batches(count, 128, torch.Generator().manual_seed(0))
        assert [len(next(batches)) for _ in range(2 * len(sizes))] == 2 * sizes


@pytest.mark.parametrize("count, epochs", [(300, 20), (20_000, 20), (80_000, 5), (10**6, 1)])
def test_networks_that_judge_many_pictures_of_ones_own_take_fewer_epochs(count, epochs):
    assert classifier_training.classifier_recipe(Path("x"), count).epochs == epochs
    assert classifier_training.classifier_recipe("cifar10", count).epochs == 24


@pytest.mark.parametrize("num_classes", [None, 10])
def test_the_likelihood_is_the_bound_of_the_checkpoints_process(small, checkpoint, tmp_path, data_dir, monkeypatch,
                                                                capsys, num_classes):
    """The mean over the reference images, with their labels and in their code; the same in every batch size."""
    monkeypatch.setattr(reference, "LIKELIHOOD_IMAGES", 40)
    monkeypatch.setattr(reference, "LIKELIHOOD_BATCH", 16)
    tf32 = []  # it would make figures of a GPU other ones
    monkeypatch.setattr(reference, "bits_per_dim", lambda *given, **more: tf32.append(
        torch.backends.cudnn.allow_tf32) or bits_per_dim(*given, **more))
    path, values = with_level_code(checkpoint(num_classes), load_dataset("glyphs", "train", data_dir).images[:500]), []
    for batch_size in (40, 7):
        assert small("--checkpoint", path, "--num_images", COUNT, "--steps", 1, "--batch_size", batch_size, "--seed", 3,
                     "--likelihood", "--output_dir", tmp_path) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bits_per_dim"))
        values.append(report(tmp_path)["figures"]["bits_per_dim"])
        assert line.split()[-2:] == ["-", "40"] and values[-1]["n"] == 40 and values[-1]["floor"] is None
        assert values[-1]["low"] < values[-1]["value"] < values[-1]["high"]
    assert values[0]["value"] == pytest.approx(values[1]["value"], rel=1e-4) and not any(tf32) and tf32
    model, diffusion, content = load_model(path)
    data, code = random_subset(load_dataset("glyphs", "test", data_dir).first(SPLIT), 40), code_of(content["config"])
    generator, bits = generator_for(3), []
    for rows in torch.arange(40).split(16):
        bits.append(bits_per_dim(model, diffusion, code.encode(data.images[rows]), data.labels[rows] if num_classes
                                 else None, draws=reference.LIKELIHOOD_DRAWS, generator=generator, edges=code.edges))
    assert values[0]["value"] == pytest.approx(torch.cat(bits).mean().item(), rel=1e-4)


def test_a_data_set_without_a_row_has_a_recipe(data_dir):
    """One row is all that a new data set can add, and the default one trains a classifier for any of them."""
    real = load_dataset("glyphs", "train", data_dir)
    data = ImageData("new", "train", real.images[:64].expand(-1, 3, -1, -1), real.labels[:64] % 3, tuple("abc"))
    network = classifier_training.new_classifier(data, "cpu", seed=0, bf16=False)
    assert network.head.out_features == 3 and classifier_training.accuracy(network, data.images, data.labels) > 0.5


def test_train_features_writes_two_checked_networks(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "WEIGHTS", tmp_path)
    recipe = ClassifierRecipe(width=32, epochs=1, batch_size=50, augment=None)
    monkeypatch.setitem(classifier_training.CLASSIFIER_RECIPES, "glyphs", recipe)
    recipe = autoencoder_training.AutoencoderRecipe(width=8, feature_dims=12, epochs=1)
    monkeypatch.setitem(autoencoder_training.AUTOENCODER_RECIPES, "glyphs", recipe)
    seen = []

    def watch(module, name):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda data, *how, **more: (
            seen.append(data.split) or make(data, *how, **more)))
    watch(classifier_training, "new_classifier")
    watch(autoencoder_training, "train_autoencoder")
    assert small("--train_features", "glyphs") == 0
    assert seen == ["train", "train"]  # floors are of images that neither has seen
    out = capsys.readouterr().out
    assert classifier.weights_digest("glyphs") in out and "% on test" in out
    assert classifier.weights_digest("glyphs", SUFFIX) in out and "mean squared error" in out
    assert load_feature_network("glyphs").head.out_features == 10
    assert load_autoencoder("glyphs").features(torch.zeros(2, 1, 28, 28)).shape == (2, 12)
    for name, load in (("glyphs", load_feature_network), (f"glyphs{SUFFIX}", load_autoencoder)):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="damaged"):
            load("glyphs")
        with pytest.raises(ValueError, match="--train_features mnist"):
            load("mnist")  # which is not in this folder


def test_two_sets_are_compared_as_each_is_measured_alone(small, tmp_path, data_dir, capsys):
    data = random_subset(load_dataset("glyphs", "validation", data_dir).first(SPLIT), COUNT)
    real = write_npz(tmp_path / "real.npz", data.images, labels=data.labels.numpy())
    blurry = write_npz(tmp_path / "blurry.npz", blurred(data.images, 3), labels=data.labels.numpy())
    assert small("--compare", real, blurry, "--dataset", "glyphs", "--output_dir", tmp_path) == 0
    out, rows = capsys.readouterr().out, json.loads((tmp_path / "compare.json").read_text())["figures"]
    for side, path in (("a", real), ("b", blurry)):
        assert small("--images", path, "--dataset", "glyphs", "--output_dir", tmp_path) == 0
        alone = report(tmp_path)["figures"]
        assert set(rows) <= set(alone) and "asked_class" in rows and "autoencoder_recall" in rows
        for name, row in rows.items():
            assert dict(row[side], floor=row["floor"], n=COUNT) == alone[name]
    for name, row in rows.items():
        assert row["difference"]["value"] == pytest.approx(row["b"]["value"] - row["a"]["value"])
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert row["differs"] is line.endswith("*")
    assert rows["frechet_distance"]["differs"] and rows["frechet_distance"]["difference"]["low"] > 0


def test_two_checkpoints_are_compared_on_the_same_noise(small, checkpoint, tmp_path):
    path = checkpoint(10)
    flags = ["--num_images", COUNT, "--steps", 2, "--seed", 4, "--output_dir", tmp_path]
    assert small("--compare", path, path, *flags) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert {tuple(row["difference"].values()) for row in result["figures"].values()} == {(0, 0, 0)}
    assert result["a"]["images_sha256"] == result["b"]["images_sha256"] and result["a"]["seed"] == 4
    assert small("--checkpoint", path, *flags) == 0
    assert report(tmp_path)["images_sha256"] == result["a"]["images_sha256"]


def test_what_cannot_be_compared_is_refused(small, checkpoint, tmp_path, data_dir, capsys):
    path, images = checkpoint(), load_dataset("glyphs", "train", data_dir).images
    few, many = (write_npz(tmp_path / f"{count}.npz", images[:count]) for count in (COUNT, COUNT + 1))
    for flags, message in (((few, many), "dataset"), ((few, many, "--dataset", "glyphs"), "as many of both"),
                           ((few, few, "--dataset", "glyphs", "--steps", 3), "--steps needs --checkpoint"),
                           ((path, path, "--cas"), "--cas and --compare"), ((path, path, "--sweep"), "--sweep and"),
                           ((path, path, "--likelihood"), "--likelihood and --compare"),
                           ((path, tmp_path / "none.pt", "--num_images", COUNT), "no checkpoint"),
                           ((path, path, "--images", few), "not allowed")):
        assert message in refused(small, capsys, "--compare", *flags, "--output_dir", tmp_path / "out")


def refused(run, capsys, *flags):
    """The one line on stderr with which these flags are refused."""
    assert run(*flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("array, message", [
    (np.zeros((5, 28, 28, 3), np.uint8), "shape"),
    (np.zeros((5, 32, 32, 1), np.uint8), "shape"),
    (np.zeros((5, 28, 28), np.uint8), "shape"),
    (np.zeros((5, 28, 28, 1), np.float32), "not uint8"),
    (np.full((5, 28, 28, 1), np.nan), "not uint8"),
    (np.zeros((20, 28, 28, 1), np.uint8), "at least 256 .*not 20"),
    (np.zeros((0, 28, 28, 1), np.uint8), "holds no images"),
    (np.array([None] * 300), "damaged or not a .npz"),
])
def test_wrong_arrays_are_refused_in_one_line(small, tmp_path, capsys, array, message):
    np.savez(tmp_path / "x.npz", arr_0=array)
    line = refused(small, capsys, "--images", tmp_path / "x.npz", "--dataset", "glyphs", "--output_dir", tmp_path)
    assert re.search(message, line)


def test_an_npz_may_call_its_images_images(tmp_path):
    images = torch.arange(2 * 784, dtype=torch.uint8).view(2, 1, 28, 28)
    np.savez(tmp_path / "x.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=np.arange(2))
    read, labels = read_images(tmp_path / "x.npz", (1, 28, 28), 10)
    assert torch.equal(read, images) and labels.tolist() == [0, 1]


def test_every_bar_counts_to_its_end(small, checkpoint, tmp_path, monkeypatch):
    closed, leave = [], Bar.__exit__
    monkeypatch.setattr(reference, "floor_cache", lambda *args: floor_cache(*args)._replace(folder=tmp_path / "floors"))
    monkeypatch.setattr(Bar, "__exit__", lambda bar, *error: closed.append((bar.title, bar.done, bar.total)) or leave(
        bar, *error))
    monkeypatch.setattr(reference, "LIKELIHOOD_IMAGES", 40)
    recipe = ClassifierRecipe(width=8, epochs=2, batch_size=100, augment=None)
    monkeypatch.setitem(classifier_training.CLASSIFIER_RECIPES, "glyphs", recipe)
    assert small("--checkpoint", checkpoint(10), "--num_images", COUNT, "--steps", 3, "--batch_size", 100, "--cas",
                 "--likelihood", "--output_dir", tmp_path) == 0
    assert (f"{COUNT} images by dpmpp_2m", 9, 9) in closed and ("training on generated images", 6, 6) in closed
    titles = {"images", "likelihood", "images: nearest in pixels", "computing the figures", "training on real images",
              *(f"telling {some} from test: {view}" for some in ("images", "floor") for view in ("pixels", "shapes"))}
    assert titles <= {title for title, *_ in closed}
    assert all(total is None or done == total > 0 for _, done, total in closed), closed


def test_a_sweep_takes_its_step_counts_with_commas_too(checkpoint):
    for typed in (["5,10"], ["5", "10"]):
        assert evaluate.parse_args(["--checkpoint", "x", "--sweep", *typed]).sweep == [5, 10]


def test_labels_are_not_looked_at_where_there_are_no_classes(tmp_path):
    path = write_npz(tmp_path / "x.npz", torch.zeros(5, 1, 28, 28, dtype=torch.uint8), labels=np.zeros(5, int))
    assert read_images(path, (1, 28, 28), 0)[1] is None


def test_wrong_labels_are_refused(tmp_path):
    images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    for labels in (np.arange(4), np.full(5, 10), np.full(5, -1), np.zeros(5), np.zeros((5, 1), int)):
        with pytest.raises(ValueError, match="labels"):
            read_images(write_npz(tmp_path / "x.npz", images, labels=labels), (1, 28, 28), 10)


def test_files_that_are_missing_empty_or_damaged_are_refused(small, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pngs").mkdir()
    (tmp_path / "pngs" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 half of it")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3), y=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name, message in (("none.npz", "no file"), ("empty", "no .png"), ("pngs", "a.png"), ("half.npz", "damaged"),
                          ("other.npz", "no array arr_0 or images, but pictures, y"), ("array.npy", "arr_0")):
        line = refused(small, capsys, "--images", tmp_path / name, "--dataset", "glyphs", "--output_dir", tmp_path)
        assert message in line


def test_flags_that_do_not_go_together_are_refused(small, tmp_path, checkpoint, data_dir, capsys):
    path = checkpoint()
    npz = write_npz(tmp_path / "x.npz", load_dataset("glyphs", "test", data_dir).images[:COUNT])
    here, ready = ("--output_dir", tmp_path), ("--images", npz, "--dataset", "glyphs")
    for flags, message in (
            (("--images", npz), "--dataset"),
            (("--images", npz, "--checkpoint", path), "not allowed"),
            (("--images", npz, "--dataset", "glyphs", "--sweep"), "--checkpoint"),
            (("--images", npz, "--dataset", "glyphs", "--cas"), "labels"),
            (("--checkpoint", path, "--dataset", "mnist"), "glyphs"), (("--checkpoint", path, "--steps", 21), "1..20"),
            (("--checkpoint", path, "--sweep", 5, 21), "1..20"), (("--checkpoint", path, "--cas"), "labels"),
            (("--checkpoint", path, "--guidance_scale", 2), "--conditional"),
            (("--checkpoint", path, "--guidance_interval", 2, 5), "--guidance_interval needs"),
            (("--checkpoint", path, "--eta", 1), "--sampler ddim and heun"),
            (("--checkpoint", path, "--eta", 1, "--sweep"), "--sampler ddim and heun"),
            (("--checkpoint", path, "--sweep", 5, "--steps", 5), "after --sweep"),
            (("--checkpoint", path, "--sweep", 5, "--likelihood"), "--likelihood and --sweep"),
            ((*ready, "--likelihood"), "--likelihood needs --checkpoint"),
            *(((*ready, flag, 1), f"{flag} needs --checkpoint") for flag in ("--steps", "--batch_size", "--eta",
                                                                             "--guidance_scale")),
            ((*ready, "--num_images", COUNT + 1), f"holds {COUNT} images"),
            (("--train_features", "glyphs", "--num_images", 1), "--num_images"),
            ((*ready, "--sampler", "ddim"), "--sampler needs --checkpoint"),
            ((*ready, "--no-use_ema"), "--use_ema needs --checkpoint"),
            (("--checkpoint", tmp_path / "none.pt"), "no checkpoint")):
        assert message in refused(small, capsys, *flags, *here)


def test_the_first_of_ready_images_can_be_measured(small, tmp_path, data_dir):
    images = load_dataset("glyphs", "train", data_dir).images[:COUNT + 40]
    small("--images", write_npz(tmp_path / "x.npz", images), "--dataset", "glyphs", "--num_images", COUNT,
          "--output_dir", tmp_path)
    assert report(tmp_path)["num_images"] == COUNT
    assert report(tmp_path)["images_sha256"] == hashlib.sha256(images[:COUNT].numpy().tobytes()).hexdigest()


class Inception(torch.nn.Module):
    """In its place: other features of images in three channels, as `evaluate.py` gives them to it."""

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 28, 28)
        return x.flatten(1)[:, ::37].float()


def test_features_of_inception_take_the_place_of_the_first(small, tmp_path, data_dir, monkeypatch):
    images = random_subset(load_dataset("glyphs", "validation", data_dir).first(SPLIT), COUNT).images
    path = write_npz(tmp_path / "x.npz", images)
    monkeypatch.setattr(reference, "load_inception", Inception)
    monkeypatch.setattr(reference, "INCEPTION_FEATURES", 64)
    found = []
    for more in ([], ["--features", "inception"]):
        assert small("--images", path, "--dataset", "glyphs", "--output_dir", tmp_path, *more) == 0
        found.append(report(tmp_path)["figures"])
    own, other = found
    real = load_dataset("glyphs", "test", data_dir).first(SPLIT).images
    features = [Inception()(each.expand(-1, 3, -1, -1)) for each in (images, real)]
    expected = metrics.frechet_distance(*features, random_groups(COUNT))[0].item()
    assert other["frechet_distance"]["value"] == pytest.approx(expected, rel=0.05)
    assert own["frechet_distance"]["value"] < 0.1 * expected
    assert own["autoencoder_distance"]["value"] == pytest.approx(other["autoencoder_distance"]["value"], rel=1e-3)


def test_what_is_not_installed_is_named(small, tmp_path, checkpoint, capsys, monkeypatch):
    flags = ("--checkpoint", checkpoint(), "--num_images", COUNT, "--output_dir", tmp_path)
    if "torch_fidelity" not in sys.modules and not torchmetrics_image().fid._TORCH_FIDELITY_AVAILABLE:
        assert "torch-fidelity" in refused(small, capsys, *flags, "--features", "inception")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    assert "pip install -r requirements-eval.txt" in refused(small, capsys, *flags)


def limit_memory(monkeypatch, largest):
    """Let every evaluation of a network with more than `largest` images fail as for want of memory."""
    denoiser = DiffusionProcess.denoiser

    def limited(*args, **kwargs):
        denoise = denoiser(*args, **kwargs)

        def within(x_t, t):
            if len(x_t) > largest:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return denoise(x_t, t)
        return within
    monkeypatch.setattr(DiffusionProcess, "denoiser", limited)


def draw(checkpoint, folder, *flags):
    """sample.py with these flags."""
    return sample.main(list(map(str, ["--checkpoint", checkpoint, "--output", folder / "x.npz", "--steps", 2,
                                      "--device", "cpu", *flags])))


@pytest.mark.parametrize("classes, flags, fits", [(None, [], 16), (10, ["--label", 3, "--guidance_scale", 2], 8)])
def test_out_of_memory_is_one_line_with_the_batch_size_that_fits(small, checkpoint, tmp_path, monkeypatch, capsys,
                                                                 classes, flags, fits):
    path = checkpoint(classes)
    limit_memory(monkeypatch, 20)  # guidance evaluates twice as many
    for run in (partial(draw, path, tmp_path),
                partial(small, "--checkpoint", path, "--num_images", COUNT, "--output_dir", tmp_path)):
        asked = [flag for flag in flags if run.func is draw or flag not in ("--label", 3)]
        assert run(*asked, "--batch_size", 64) == 1
        err = capsys.readouterr().err
        assert f"64 images at a time: {fits} fit (measured): give --batch_size {fits}" in err.splitlines()[-1]
        assert "Traceback" not in err and run(*asked, "--steps", 1, "--batch_size", fits) == 0


def test_where_fewer_at_a_time_would_not_help_that_is_said(checkpoint, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(sample.distributed, "all_gather", fail)
        assert draw(checkpoint(), tmp_path) == 1
    assert "ask for fewer images in all" in capsys.readouterr().err.splitlines()[-1]
    limit_memory(monkeypatch, 0)
    assert draw(checkpoint(), tmp_path) == 1
    assert "even for one" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.npz").exists()


def test_images_that_are_not_numbers_are_refused(small, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inputs, "final_image", lambda trajectory: torch.full((COUNT, 1, 28, 28), float("nan")))
    assert small("--checkpoint", checkpoint(), "--num_images", COUNT, "--batch_size", COUNT,
                 "--output_dir", tmp_path) == 2
    assert "not finite" in capsys.readouterr().err
