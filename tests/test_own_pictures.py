"""Every script from end to end on twelve pictures of one's own in two classes, and what must not happen to pictures."""

import contextlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import OnRank, needs_fork, run_together, tiny
from PIL import Image

import benchmark
import distill
import doctor
import edit
import evaluate
import export
import sample
import train
import visualize_diffusion
from checkpoint import FIELDS, load_checkpoint, save_checkpoint
from data import ImageData, load_dataset
from data_sources.cache import Pictures, cached
from evaluation import autoencoder_training, copies, metrics, reference, two_sample
from evaluation.classifier_training import ClassifierRecipe
from evaluation.network_plots import _plot_points
from models import create_model
from runtime import distributed
from runtime.errors import UserError
from runtime.files import file_digest
from runtime.sampling import dataset_of
from training import autotune, trainer
from training import flags as training_flags
from training.budget import Budget
from training.setup import check_gpu_memory, time_reading
from training.trainer import Trainer
from utils import pyplot

RED, BLUE = (200, 0, 0), (0, 0, 180)
CPU = ["--device", "cpu"]


def draw(folder, colours, count=6, mode="RGB"):
    """Pictures of 20×20 pixels: in each sub-folder one colour, with a darker bar of another height in each; returns
    the folder."""
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            pixels = np.full((20, 20, 3), colour, np.uint8)
            pixels[2:4 + 2 * k, 2:8] //= 2
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def short_epochs():
    """Epochs of 24 images instead of 8,000, and eight samples at the end instead of 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "EPOCH_IMAGES", 24)
        patch.setattr(train, "PREVIEW_IMAGES", 8)
        yield


def learn_briefly():
    """The same for processes of their own, which evaluate two images at a time."""
    trainer.EPOCH_IMAGES, autotune.LARGE, autotune.PART = 24, 0, 2


def flags(pictures, output, *more):
    """The flags of a run of an epoch of three steps of a tiny network."""
    network = [] if "--init" in more else ["--base_channels", "8", "--time_emb_dim", "16"]
    return ["--dataset", str(pictures), "--data_dir", str(Path(pictures).parent / "data"), "--output_dir", str(output),
            "--image_size", "16", "--epochs", "1", "--batch_size", "8", "--sample_interval", "0", "--threads", "1",
            "--precision", "fp32", *CPU, *network, *more]


def train_on(pictures, output, *more):
    """The path of the checkpoint of such a run."""
    assert train.main(flags(pictures, output, *more)) == 0
    return output / "model_final.pt"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def two(place):
    return draw(place / "two", dict(red=RED, blue=BLUE))


@pytest.fixture(scope="module")
def checkpoint(two, place):
    return train_on(two, place / "run")


# ------------------------------------------------------------------------------------------------------ every script


def test_an_archive_of_few_pictures_is_learned_and_the_run_says_what_to_know_and_to_type(two, tmp_path, capsys):
    archive = shutil.make_archive(str(tmp_path / "two"), "zip", two)
    path = train_on(archive, tmp_path / "run")
    said = capsys.readouterr().out
    assert all(line in said for line in (
        "12 pictures used", "2 classes: blue 6, red 6",
        "to learn from: --init cifar10 or --dropout 0.1 or --hflip (where left and right do not matter) gave far fewer",
        "With fewer than 200 different pictures none is held out", " of 8 new images: they are less than a third",
        f"Saved {path}: python sample.py --checkpoint {path}"))
    assert load_checkpoint(path)["config"]["data"]["class_names"] == ["blue", "red"]


@pytest.mark.parametrize("losses, said", [
    ([3.0, 2.0, 1.0], ""), ([1.0, 1.04], ""), ([None, None], ""), ([], ""),
    ([3.0, 1.0, None, 2.0], "lowest after 20 s (1.0000) and is now 2.0000: a smaller --epochs may give fewer copies")])
def test_a_loss_of_held_out_pictures_that_has_risen_is_told_of(losses, said):
    line = train.earlier_end([dict(val_loss=loss, seconds=10.0 * i) for i, loss in enumerate(losses, 1)], "--epochs")
    assert said in line if said else line == ""


def test_classes_are_not_to_be_had_from_a_folder_without_sub_folders(tmp_path, capsys):
    draw(tmp_path / "in", {"only": RED})
    assert train.main(flags(tmp_path / "in", tmp_path / "run", "--conditional")) == 2
    said = capsys.readouterr().err
    assert "--conditional needs two classes or more" in said and said.count("\n") == 1
    assert train.main(flags(tmp_path / "in", tmp_path / "run", "--label_dropout", "0.3")) == 2
    assert "--label_dropout needs two classes or more" in capsys.readouterr().err
    (tmp_path / "in/other").mkdir()
    (tmp_path / "in/other/a.png").write_text("no picture")
    assert train.main(flags(tmp_path / "in", tmp_path / "run", "--conditional")) == 2
    assert "--conditional needs two classes or more" in capsys.readouterr().err
    train_on(tmp_path / "in", tmp_path / "run")


def test_the_classes_of_the_folder_are_asked_for_by_name(checkpoint, tmp_path):
    assert sample.main(["--checkpoint", str(checkpoint), "--label", "red", "--num_images", "2", "--steps", "2",
                        "--output", str(tmp_path / "a.npz"), *CPU]) == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (2, 16, 16, 3) and file["labels"].tolist() == [1, 1]


@pytest.mark.parametrize("command", [["vary"], ["inpaint", "--mask", "left", "--resample", "1"]])
def test_a_picture_is_edited(checkpoint, two, tmp_path, command):
    assert edit.main([*command, "--checkpoint", str(checkpoint), "--image", str(two / "red/0.png"), "--steps", "2",
                      "--num_images", "2", "--output", str(tmp_path / "a.png"), *CPU]) == 0
    assert (tmp_path / "a.png").exists()


def test_a_picture_is_read_as_those_of_the_training_were(two, tmp_path, monkeypatch):
    path = train_on(two, tmp_path / "run", "--fit", "pad", "--background", "red")
    read, seen = edit.read_picture, []
    monkeypatch.setattr(edit, "read_picture", lambda *given: seen.append(given[2:]) or read(*given))
    for more in ([], ["--fit", "crop", "--background", "white"]):
        assert edit.main(["invert", "--checkpoint", str(path), "--image", str(two / "red/0.png"), "--steps", "2",
                          "--output", str(tmp_path / "a.png"), *more, *CPU]) == 0
    assert seen == [("pad", "red"), ("crop", "white")]


@needs_fork
def test_two_processes_that_evaluate_few_pictures_both_end_well(checkpoint, place, tmp_path):
    argv = ["--checkpoint", str(checkpoint), "--num_images", "8", "--steps", "2", "--output_dir", str(tmp_path / "out"),
            "--data_dir", str(place / "data"), *CPU]
    assert run_together(argv, tmp_path / "log", script="evaluate") == [0, 0]
    assert (tmp_path / "out/evaluation.json").exists()


def test_few_pictures_are_compared_with_their_copies(checkpoint, place, tmp_path, capsys):
    assert evaluate.main(["--checkpoint", str(checkpoint), "--num_images", "8", "--steps", "2", "--output_dir",
                          str(tmp_path), "--data_dir", str(place / "data"), *CPU]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["memorisation"]["training_images"] == 12
    assert "Learned by heart?" in capsys.readouterr().out
    assert evaluate.main(["--runs", str(tmp_path)]) == 0
    assert "Skipped" not in capsys.readouterr().out and (tmp_path / "runs.csv").read_text().count("my_two") == 1


def test_copies_are_looked_for_among_what_was_learned_from(two, data_dir, tmp_path, monkeypatch):
    seen, look = [], copies.by_heart
    monkeypatch.setattr(copies, "by_heart", lambda *given: seen.append(given) or look(*given))
    path = train_on(two, tmp_path / "run", "--hflip", "--train_images", "8")
    evaluate.main(["--checkpoint", str(path), "--num_images", "4", "--steps", "2", "--output_dir", str(tmp_path), *CPU])
    assert [(len(pictures), mirrored) for _, pictures, mirrored in seen] == [(8, True), (8, True)]
    learned = []
    monkeypatch.setattr(distill, "make_trainer", lambda *given: learned.append(len(given[3].images)) or stop())
    asked = distill.parse_args(["--checkpoint", str(path), "--data_dir", str(two.parent / "data"), *CPU])
    with pytest.raises(StopIteration):
        distill.make_run(asked, 0)
    assert learned == [8]
    monkeypatch.undo()
    monkeypatch.setattr(Budget, "progress", lambda budget, step, _: step / 2)
    assert distill.main(["--checkpoint", str(path), "--data_dir", str(two.parent / "data"), "--output_dir",
                         str(tmp_path / "student"), "--teacher_steps", "4", *CPU]) == 0
    learned = load_checkpoint(tmp_path / "student/model_final.pt")["config"]["training"]
    assert learned["train_images"] == 8 and learned["hflip"] is True     # read when copies of a student are looked for


def stop():
    raise StopIteration


@pytest.mark.parametrize("flag", ["--sweep", "--likelihood", "--compare", "--reference=validation",
                                  "--features=inception"])
def test_figures_of_few_pictures_are_refused_in_one_line(checkpoint, place, tmp_path, capsys, flag):
    which = ["--compare", str(checkpoint), str(checkpoint)] if flag == "--compare" else [
        flag, "--checkpoint", str(checkpoint)]
    assert evaluate.main([*which, "--num_images", "8", "--data_dir", str(place / "data"), "--output_dir",
                          str(tmp_path), *CPU]) == 2
    said = capsys.readouterr().err
    assert f"{flag.split('=')[0]} needs" in said and "my_two" in said and said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_the_network_is_looked_into(checkpoint, place, tmp_path, capsys):
    for what in ("denoising", "attention", "forward"):
        model = ["--dataset", str(place / "two"), "--image_size", "16"] if what == "forward" else [
            "--checkpoint", str(checkpoint)]
        assert visualize_diffusion.main(["--what", what, *model, "--data_dir", str(place / "data"), "--save_path",
                                         str(tmp_path / f"{what}.png"), *CPU]) == 0
    assert visualize_diffusion.main(["--what", "loss", "--checkpoint", str(checkpoint), "--data_dir",
                                     str(place / "data"), "--save_path", str(tmp_path / "loss.png"), *CPU]) == 2
    assert "none is held out" in capsys.readouterr().err and not (tmp_path / "loss.png").exists()


def test_a_figure_does_not_become_one_of_the_pictures(two, tmp_path, capsys):
    before = sorted(two.rglob("*"))
    for path in (two / "red/0.png", two / "new.png"):
        assert visualize_diffusion.main(["--dataset", str(two), "--image_size", "16", "--data_dir", str(tmp_path),
                                         "--save_path", str(path)]) == 2
        assert "would be written into the input" in capsys.readouterr().err
    assert sorted(two.rglob("*")) == before


@pytest.mark.parametrize("script, argv", [
    (visualize_diffusion, ["--what", "loss", "--save_path", "IN/red/a.png"]),
    (sample, ["--num_images", "2", "--output", "IN/a.png"]), (sample, ["--gif", "--output", "IN/red/a.png"]),
    (edit, ["vary", "--output", "IN/a.png"]), (evaluate, ["--num_images", "8", "--output_dir", "IN"]),
    (evaluate, ["--num_images", "8", "--output_dir", "IN/new"]), (distill, ["--output_dir", "IN/student"])])
def test_what_a_checkpoint_makes_does_not_become_one_of_its_pictures(checkpoint, two, place, capsys, script, argv):
    before = sorted(two.rglob("*"))
    data = [] if script is sample else ["--data_dir", str(place / "data")]
    assert script.main([*[each.replace("IN", str(two)) for each in argv], "--checkpoint", str(checkpoint), *data,
                        *CPU]) == 2
    assert "would be written into the input" in capsys.readouterr().err
    assert sorted(two.rglob("*")) == before


def test_ready_images_are_not_measured_into_the_pictures(two, place, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    before = sorted(two.rglob("*"))
    assert evaluate.main(["--images", str(tmp_path / "x.npz"), "--dataset", str(two), "--image_size", "16",
                          "--data_dir", str(place / "data"), "--output_dir", str(two), *CPU]) == 2
    assert "would be written into the input" in capsys.readouterr().err and sorted(two.rglob("*")) == before


def test_a_folder_that_is_called_as_a_data_set_may_hold_results(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    data_dir = data_dir.resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glyphs").mkdir()
    assert evaluate.main(["--checkpoint", str(checkpoint), "--dataset", "glyphs", "--output_dir", "glyphs", *CPU]) == 2
    assert "was trained on my_two, not glyphs" in capsys.readouterr().err  # and no word of an input
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 28, 28), np.uint8))
    assert evaluate.main(["--images", "x.npz", "--dataset", "glyphs", "--output_dir", "glyphs", "--data_dir",
                          str(data_dir), *CPU]) == 2
    said = capsys.readouterr().err
    assert "have the shape" in said and "input" not in said


def test_points_without_classes_are_all_drawn():
    figure, axis = pyplot().subplots()
    _plot_points(axis, torch.rand(5, 2), None, torch.zeros(5), ())
    assert len(axis.collections[0].get_offsets()) == 5 and axis.get_legend() is None
    pyplot().close(figure)


def test_figures_show_the_names_of_classes_as_they_are():
    figure, axis = pyplot().subplots()
    names = ["$5-$10", "$$", "_hidden", "a_b"]
    _plot_points(axis, torch.rand(4, 2), None, torch.arange(4), names)
    shown = axis.get_legend().get_texts()
    assert len(shown) == 4
    figure.canvas.draw()                                                # an error where a name is taken for a formula
    assert [text.get_text().replace("\\$", "$").strip() for text in shown] == names
    assert all(text._preprocess_math(text.get_text())[1] is not True for text in shown)
    pyplot().close(figure)


def test_the_doctor_finds_no_fault_with_twelve_sound_pictures(checkpoint, place, capsys):
    doctor.main(["--checkpoint", str(checkpoint), "--data_dir", str(place / "data"), "--json", *CPU])
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    data = ("value range", "channels", "classes", "duplicates", "blank images")
    assert {name: found[name]["status"] for name in data} == dict.fromkeys(data, "OK")
    assert found["errors and images"]["status"] == "WARN"
    assert all(finding["status"] in ("OK", "WARN", "FAIL") for finding in found.values())


def test_a_student_is_distilled_and_exported(checkpoint, place, tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "progress", lambda budget, step, _: step / 2)  # however long two steps take
    assert distill.main(["--checkpoint", str(checkpoint), "--data_dir", str(place / "data"), "--output_dir",
                         str(tmp_path / "student"), "--teacher_steps", "4", "--batch_size", "8", *CPU]) == 0
    assert export.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "a.html")]) == 0


def test_look_shows_the_pictures_and_stops(two, tmp_path, capsys):
    assert train.main(flags(two, tmp_path, "--look")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["look.png"]
    assert "2 classes: blue 6, red 6" in capsys.readouterr().out
    with Image.open(tmp_path / "look.png") as image:
        shown = {colour for _, colour in image.convert("RGB").getcolors()}
    assert {RED, BLUE} <= shown


@needs_fork
def test_two_processes_learn_a_folder_as_one_does(two, tmp_path):
    argv = flags(two, tmp_path / "both", "--data_dir", str(tmp_path / "data"))
    assert run_together(argv, tmp_path / "log", learn_briefly) == [0, 0]
    weights = [load_checkpoint(path)["model"] for path in (
        tmp_path / "both/model_final.pt", train_on(two, tmp_path / "alone"))]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=1e-3, atol=1e-4)


def hold_others():
    """A patch: the pictures of this process have another digest."""
    from training import setup
    setup.about = lambda folder: dict(digest="another")


@needs_fork
def test_machines_with_different_pictures_are_told_so(two, tmp_path):
    argv = flags(two, tmp_path / "both", "--data_dir", str(tmp_path / "data"))
    assert run_together(argv, tmp_path / "log", OnRank(1, hold_others)) == [2, 2]
    said = (tmp_path / "log.0").read_text()
    assert "the machines hold different pictures" in said.splitlines()[-1] and "Traceback" not in said


def test_a_network_of_ones_own_pictures_interpolates(checkpoint, tmp_path):
    assert edit.main(["interpolate", "--checkpoint", str(checkpoint), "--steps", "2", "--output",
                      str(tmp_path / "a.png"), *CPU]) == 0
    assert (tmp_path / "a.png").exists()


def test_copies_among_the_pictures_count_as_one_picture():
    images = torch.randint(0, 256, (300, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[290] = images[5]
    distances = copies.among_each_other(images)
    assert len(distances) == 299 and bool((distances > 0).all()) and distances.isfinite().all()


def test_what_was_learned_by_heart_is_found_though_it_is_no_exact_copy():
    pictures = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    nearly = (pictures[:4].float() * 0.9 + 5).to(torch.uint8)                # a network's copies
    between = ((pictures[4:8].float() + pictures[8:12].float()) / 2).to(torch.uint8)
    assert copies.by_heart(torch.cat([nearly, between]), pictures).tolist() == [True] * 4 + [False] * 4
    twice = torch.cat([pictures, pictures])                                  # a picture and its copy are one
    assert copies.by_heart(nearly, twice).all() and copies.by_heart(between, pictures[:1].repeat(3, 1, 1, 1)).all()


def test_a_copy_is_less_than_a_third_as_far_as_every_other_picture():
    pictures, images = (torch.tensor(levels, dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
                        for levels in ([0, 200], [48, 52]))  # 48 / 152 is less than a third, 52 / 148 is more
    assert copies.by_heart(images, pictures).tolist() == [True, False]


def test_mirror_images_are_copies_where_the_network_has_seen_them(monkeypatch):
    pictures = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ImageData("my_own", "train", pictures, torch.zeros(20, dtype=torch.long), (), folder=Path("x"))
    monkeypatch.setattr(copies, "load_dataset", lambda *_: data.first(0))
    images = torch.cat([pictures[:4], pictures[4:8].flip(3)])
    for mirrored, share in ((False, 0.5), (True, 1.0)):
        report, near = copies.copies(images, data, mirrored)
        assert report["by_heart"] == report["copies"] == share
        assert torch.equal(near[:4], pictures[:4]) and (not mirrored or torch.equal(near[4:], pictures[4:8]))
    both = torch.cat([pictures, pictures.flip(3)])                           # a picture and its mirror image are one
    assert copies.by_heart(images, both, True).all() and len(copies.different(both, True)) == 20
    monkeypatch.setattr(copies, "VALUES", 400)  # two images at a time
    assert copies.by_heart(images, pictures, True).all() and copies.copies(images, data)[0]["by_heart"] == 0.5


def test_pictures_of_one_colour_are_refused_in_one_line(tmp_path, capsys):
    pictures = draw(tmp_path / "in", dict(a=(255, 255, 255), b=(255, 255, 255)), 3)
    for path in pictures.rglob("*.png"):
        Image.new("RGBA", (16, 16), (255, 255, 255, 90)).save(path)
    assert train.main(flags(pictures, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "one colour everywhere" in said and "--background" in said and said.count("\n") == 1


def test_pictures_that_are_nowhere_are_missed_in_one_line_where_they_are_needed(checkpoint, tmp_path, capsys):
    saved = load_checkpoint(checkpoint)
    saved["config"]["data"]["pictures"]["path"] = str(tmp_path / "gone")
    torch.save(saved, tmp_path / "model.pt")
    flags = ["--checkpoint", str(tmp_path / "model.pt"), "--data_dir", str(tmp_path / "data"), *CPU]
    assert edit.main(["vary", *flags, "--index", "0", "--output", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "gone") in said and str(tmp_path / "data") in said and said.count("\n") == 1
    assert visualize_diffusion.main([*flags, "--what", "denoising", "--save_path", str(tmp_path / "b.png")]) == 0


# -------------------------------------------------------------------------------------------- the figures of many


@pytest.fixture(scope="module", params=["with classes", "without"])
def grey(request, tmp_path_factory):
    """(what the parameter says, a checkpoint of 400 grey pictures, its data folder)."""
    folder, random = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    labels = dict(labels=np.arange(400) % 2) if request.param == "with classes" else {}
    np.savez(folder / "grey.npz", arr_0=random.integers(0, 256, (400, 16, 16), np.uint8), **labels)
    return request.param, train_on(folder / "grey.npz", folder / "run"), folder / "data"


@pytest.fixture
def many(grey, monkeypatch):
    """The same, where so few count as many, and are judged by networks that are soon trained."""
    for module in (copies, evaluate):
        monkeypatch.setattr(module, "FEW", 20)
    for module in (metrics, reference):
        monkeypatch.setattr(module, "check_image_count", lambda *_: None)
    monkeypatch.setattr(two_sample, "EPOCHS", 1)
    monkeypatch.setattr(two_sample, "CHANNELS", (8, 8, 8, 8))
    monkeypatch.setattr(metrics, "GROUPS", 5)
    monkeypatch.setattr(autoencoder_training, "LEAST_STEPS", 19)
    monkeypatch.setattr(ClassifierRecipe.__init__, "__defaults__", (8, 1, *ClassifierRecipe.__init__.__defaults__[2:]))
    return grey


def test_the_figures_of_many_pictures_come_from_networks_of_their_own(many, tmp_path, capsys, monkeypatch):
    kind, checkpoint, data_dir = many
    classes = kind == "with classes"
    flags = ["--checkpoint", str(checkpoint), "--data_dir", str(data_dir), "--output_dir", str(tmp_path), *CPU]
    assert evaluate.main([*flags, "--steps", "1"]) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    of_classes = {"confident", "class_distance", "class_frechet", "asked_class"}
    assert report["figures"].keys() & of_classes == (of_classes if classes else set())
    assert {"frechet_distance", "recall", "two_sample_pixels"} < report["figures"].keys()
    assert list(report["classes"]["images"]) == (["0", "1"] if classes else [])
    trained = sorted(path.name for path in data_dir.glob("pictures/*/features*.pt"))
    assert trained == ["features.pt", "features_autoencoder.pt"][not classes:]
    assert capsys.readouterr().out.count("features") >= len(trained)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    data = load_dataset(dataset_of(load_checkpoint(checkpoint), data_dir), "test")
    with monkeypatch.context() as patch:
        patch.setattr(reference, "alone", refuse)  # as in a --data_dir of someone else, which is only read now
        assert reference.open_networks(data, "own", 128, torch.device("cpu"), data_dir)[0]

    recipe = torch.load(next(data_dir.glob("pictures/*/features_autoencoder.pt")))["recipe"]
    assert recipe["training_images"] // recipe["batch_size"] == 2 and recipe["epochs"] == 10  # for 19 steps
    digests = [report[f"{name}_sha256"] for name in ("feature_network", "autoencoder")]
    assert set(digests) == {file_digest(next(data_dir.glob(f"pictures/*/{name}"))) for name in trained}
    monkeypatch.setattr(reference, "MOST_REFERENCE", 36)
    for split in ("train", "test", "train"):  # what is kept of the features of one is not taken for the other
        assert evaluate.main([*flags, "--steps", "1", "--reference", split]) == 0
        assert json.loads((tmp_path / "evaluation.json").read_text())["reference"] == dict(split=split, n=36)

    next(data_dir.glob("pictures/*/features*.pt")).unlink()  # a run that was killed between the two
    assert evaluate.main([*flags, "--sweep", "1", "--sampler", "ddim"]) == 0
    assert sorted(path.name for path in data_dir.glob("pictures/*/features*.pt")) == trained


def test_inception_is_refused_for_few_pictures_before_any_network_is_trained(many, tmp_path, capsys):
    _, checkpoint, data_dir = many
    assert evaluate.main(["--checkpoint", str(checkpoint), "--data_dir", str(data_dir), "--output_dir", str(tmp_path),
                          "--features", "inception", *CPU]) == 2
    said = capsys.readouterr()
    assert "4,096 held-out pictures" in said.err and "leave it out" in said.err and "trained" not in said.out


def test_several_processes_train_the_networks_of_ones_pictures_once(many, monkeypatch):
    """Threads stand for processes: each has its own lock, which the others wait for."""
    kind, checkpoint, data_dir = many
    data = load_dataset(dataset_of(load_checkpoint(checkpoint), data_dir), "test")
    trained = []

    def train_network(*_, suffix=""):
        time.sleep(0.2)
        trained.append(suffix)
    monkeypatch.setattr(reference, "is_trained", lambda _, suffix="": suffix in trained)
    monkeypatch.setattr(reference, "train_second_network", partial(train_network, suffix=reference.SUFFIX))
    monkeypatch.setattr(reference, "train_feature_network", train_network)
    monkeypatch.setattr(reference, "load_autoencoder", lambda *_: None)
    monkeypatch.setattr(reference, "load_feature_network", lambda *_: SimpleNamespace(head=torch.nn.Linear(8, 2)))
    monkeypatch.setattr(reference, "Unlabelled", lambda _: SimpleNamespace(head=torch.nn.Linear(8, 1)))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: reference.open_networks(data, "own", 260, "cpu", data_dir), range(3)))
    assert sorted(trained) == (["", reference.SUFFIX] if kind == "with classes" else [reference.SUFFIX])


def test_the_doctor_takes_no_classifier_where_there_are_no_classes(many, capsys):
    kind, checkpoint, data_dir = many
    doctor.main(["--checkpoint", str(checkpoint), "--data_dir", str(data_dir), "--json", *CPU])
    said = [finding for finding in json.loads(capsys.readouterr().out) if finding["check"] == "classifier"]
    assert not any("git checkout" in finding["fix"] for finding in said) and (kind == "with classes" or not said)


def test_the_doctor_asks_for_more_pictures_where_too_few_are_held_out_for_a_classifier(many, capsys, monkeypatch):
    kind, checkpoint, data_dir = many
    monkeypatch.setattr(copies, "FEW", 200)
    monkeypatch.setattr(doctor, "check_samples", lambda *_: [])  # which a network of three steps fails
    doctor.main(["--checkpoint", str(checkpoint), "--data_dir", str(data_dir), "--json", *CPU])
    said = [finding for finding in json.loads(capsys.readouterr().out) if finding["check"] == "classifier"]
    assert [finding["fix"] for finding in said] == ["3,000 different pictures are enough"] * (kind == "with classes")


def test_the_doctor_examines_a_checkpoint_whose_pictures_are_gone(checkpoint, tmp_path, capsys, monkeypatch):
    config = load_checkpoint(checkpoint)["config"]
    config["data"]["pictures"] |= dict(path=str(tmp_path / "gone"))
    fields = {name: load_checkpoint(checkpoint)[name] for name in FIELDS}
    save_checkpoint(tmp_path / "model.pt", **fields | dict(config=config))
    argv = ["--checkpoint", str(tmp_path / "model.pt"), "--data_dir", str(tmp_path), "--json", *CPU]
    assert doctor.main(argv) == 1
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["data set"]["status"] == "FAIL" and "gone" in found["data set"]["message"]
    assert "history of the loss" in found
    assert doctor.main([*argv, "--dataset", "mnist"]) == 2
    assert "leave out --dataset" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ what becomes of pictures


def test_no_picture_is_mirrored_unless_it_is_asked_for():
    images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    images[..., :4] = 255  # light on the left

    def first_columns(**options):
        data = ImageData("a", "train", images, torch.zeros(16, dtype=torch.int64), ())
        made = Trainer(data, torch.nn.Linear(2, 2), None, batch_size=16, optimizer="adamw", **options)
        return made.batch()[0][:, 0, 0, 0].tolist()

    assert set(first_columns()) == {1.0} and set(first_columns(hflip=True)) == {1.0, -1.0}


def test_hflip_reaches_the_trainer_and_is_off_by_default(checkpoint, two, tmp_path, capsys):
    assert load_checkpoint(checkpoint)["config"]["training"]["hflip"] is False
    flipped = train_on(two, tmp_path, "--hflip")
    assert load_checkpoint(flipped)["config"]["training"]["hflip"] is True
    assert "--hflip" not in capsys.readouterr().out


def test_dropout_reaches_the_network_and_is_off_by_default(checkpoint, two, tmp_path, capsys):
    capsys.readouterr()
    dropped = load_checkpoint(train_on(two, tmp_path, "--dropout", "0.5"))
    said = capsys.readouterr().out
    assert "--init cifar10 or --hflip" in said and "--dropout" not in said.replace("--dropout 0.5", "")
    plain = load_checkpoint(checkpoint)
    assert plain["config"]["training"]["dropout"] == 0.0 and dropped["config"]["training"]["dropout"] == 0.5
    assert dropped["config"]["model"] == plain["config"]["model"]
    name = "middle.blocks.0.conv2.weight"
    assert not torch.equal(plain["model"][name], dropped["model"][name])


@pytest.mark.parametrize("mode, names, suggested", [("RGB", ("cat", "dog"), 1), ("RGB", ("b", "d"), 0),
                                                    ("L", ("cat", "dog"), 0)])
def test_hflip_is_suggested_once_and_only_for_colours_without_letters(tmp_path, capsys, mode, names, suggested):
    draw(tmp_path / "in", dict.fromkeys(names, RED), 2, mode)
    train.main(flags(tmp_path / "in", tmp_path / "out", "--look"))
    assert capsys.readouterr().out.count("--hflip") == suggested


def test_a_red_picture_comes_back_red_through_training_sampling_and_saving(tmp_path):
    checkpoint = train_on(draw(tmp_path / "in", {"": RED}, 4), tmp_path / "run", "--epochs", "40", "--ema_decay", "0.8")
    assert sample.main(["--checkpoint", str(checkpoint), "--num_images", "4", "--steps", "5", "--scale", "1",
                        "--output", str(tmp_path / "a.png"), *CPU]) == 0
    with Image.open(tmp_path / "a.png") as image:
        red, green, blue = np.array(image.convert("RGB")).reshape(-1, 3).mean(0)
    assert red > 100 > 50 > max(green, blue)


def test_grey_stays_grey(tmp_path):
    checkpoint = train_on(draw(tmp_path / "in", {"": (120, 120, 120)}, 4), tmp_path / "run")
    assert load_checkpoint(checkpoint)["config"]["data"]["shape"] == [1, 16, 16]
    assert sample.main(["--checkpoint", str(checkpoint), "--num_images", "1", "--steps", "2", "--output",
                        str(tmp_path / "a.png"), *CPU]) == 0
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.array(image.convert("RGB"))
    assert (pixels == pixels[..., :1]).all()


def test_resuming_after_the_folder_changed_is_refused_with_both_counts(tmp_path, capsys):
    pictures = draw(tmp_path / "in", dict(a=RED, b=BLUE), 2)
    train_on(pictures, tmp_path / "run")
    draw(pictures, dict(c=RED), 1)
    assert train.main(["--resume", "--output_dir", str(tmp_path / "run"), "--data_dir", str(tmp_path / "data"),
                       "--epochs", "2", *CPU]) == 2
    said = capsys.readouterr().err
    assert "4 pictures" in said and "(5)" in said


def test_a_run_is_resumed_with_the_new_place_of_its_pictures(tmp_path, capsys):
    pictures = draw(tmp_path / "in", dict(a=RED, b=BLUE), 2)
    train_on(pictures, tmp_path / "run")
    pictures.rename(tmp_path / "moved")
    resume = ["--resume", "--output_dir", str(tmp_path / "run"), "--data_dir", str(tmp_path / "data"), "--epochs", "2",
              *CPU]
    assert train.main(resume) == 2
    said = capsys.readouterr().err
    assert str(pictures) in said and "--dataset" in said and said.count("\n") == 1
    assert train.main([*resume, "--dataset", str(tmp_path / "moved")]) == 0
    assert load_checkpoint(tmp_path / "run/model_final.pt")["epoch"] == 2


@pytest.mark.parametrize("flag, value", [("--fit", "pad"), ("--image_size", "24"), ("--background", "red")])
def test_resuming_with_pictures_read_in_another_way_names_the_flag(checkpoint, place, capsys, flag, value):
    assert train.main(["--resume", "--output_dir", str(place / "run"), "--data_dir", str(place / "data"), "--epochs",
                       "2", flag, value, *CPU]) == 2
    said = capsys.readouterr().err
    assert f"{flag} " in said and f"not {value}" in said and said.count("\n") == 1


@pytest.mark.parametrize("inside", [".", "run", "red/run"])
def test_a_run_that_would_write_among_its_pictures_is_refused(two, capsys, inside):
    before = sorted(two.rglob("*"))
    assert train.main(flags(two, two / inside)) == 2
    said = capsys.readouterr().err
    assert "--output_dir" in said and "among the pictures" in said and said.count("\n") == 1
    assert sorted(two.rglob("*")) == before


def test_a_checkpoint_knows_where_its_pictures_are_now_and_not_where_they_were_read(two, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(two, tmp_path / name, copy_function=shutil.copy2)
        path = train_on(tmp_path / name, tmp_path / "run")
        assert load_checkpoint(path)["config"]["data"]["pictures"]["path"] == str(tmp_path / name)


def test_the_samples_at_the_end_are_made_once(two, tmp_path, monkeypatch):
    made, make = [], train.all_images
    monkeypatch.setattr(train, "all_images", lambda *args, **options: made.append(args) or make(*args, **options))
    train_on(two, tmp_path / "run", "--sample_interval", "1")
    assert len(made) == 1 and (tmp_path / "run/samples/epoch_001.png").exists()


def test_a_restart_by_torchrun_needs_the_file_of_init_no_more(two, tmp_path, monkeypatch):
    path = train_on(two, tmp_path / "run")
    monkeypatch.setattr(train.distributed, "is_launched", lambda: True)
    monkeypatch.setattr(train, "find_checkpoint", lambda _: (path, load_checkpoint(path)))
    args, found = train.parse_args(flags(two, tmp_path / "run", "--init", str(tmp_path / "moved.pt")))
    assert found["step"] == load_checkpoint(path)["step"] and args.base_channels == 8


def test_torchrun_is_not_started_with_an_init_that_its_own_run_would_move(two, tmp_path, monkeypatch):
    path = train_on(two, tmp_path / "run")
    monkeypatch.setattr(train.distributed, "is_launched", lambda: True)
    monkeypatch.setattr(train, "find_checkpoint", lambda _: None)
    with pytest.raises(UserError, match="torchrun could not restart it"):
        train.parse_args(flags(two, tmp_path / "run", "--init", str(path)))
    assert train.parse_args(flags(two, tmp_path / "other", "--init", str(path)))[0].init == str(path)


def test_reading_the_pictures_takes_nothing_of_the_budget(two, data_dir, tmp_path, monkeypatch):
    read = train.open_data

    def slow(*given):
        time.sleep(0.5)
        return read(*given)
    monkeypatch.setattr(train, "open_data", slow)
    for argv, least in ((flags(two, tmp_path / "run"), 0.5), (tiny(data_dir, tmp_path / "run"), 0.0)):
        started = train.make_run(train.parse_args(argv)[0], None, 0.0)[0].budget.start
        assert started >= least if least else started == 0.0


def test_a_process_does_not_count_what_it_waited_for_the_reading_of_another(two, place, monkeypatch):
    """Else the first process would have minutes left, and all would stop with the one that has none."""
    data = load_dataset(cached(Pictures(str(two), 16), place / "data", quiet=True))

    @contextlib.contextmanager
    def waiting():
        time.sleep(0.3)
        yield
    monkeypatch.setattr(distributed, "local_rank_0_first", waiting)
    monkeypatch.setattr(distributed, "all_reduce_min", lambda mine: min(mine, -100.0))  # of a slower machine
    assert time_reading(lambda: data) == (data, 100.0)
    monkeypatch.setattr(distributed, "all_reduce_min", lambda mine: mine)
    assert time_reading(lambda: data)[1] >= 0.3


def test_pictures_that_do_not_fit_into_the_memory_of_a_gpu_are_refused(two, place, monkeypatch):
    data = load_dataset(cached(Pictures(str(two), 16), place / "data", quiet=True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (data.images.nbytes // 2, 10**9))
    check_gpu_memory(data, torch.device("cpu"))
    with pytest.raises(UserError, match="--train_images 4,"):
        check_gpu_memory(data, torch.device("cuda"))
    check_gpu_memory(data.first(4), torch.device("cuda"))


# -------------------------------------------------------------------------------------------------------------- --init


@pytest.mark.parametrize("colours, mode, more, new", [
    (dict(red=RED, blue=BLUE), "RGB", [], ""),
    (dict(a=RED, b=BLUE, c=(0, 200, 0)), "RGB", [], "label_embedding"),
    ({"": RED}, "RGB", [], ""),
    (dict(red=RED, blue=BLUE), "RGB", ["--image_size", "24"], ""),
    (dict(red=RED, blue=BLUE), "L", [], "stem.1.weight"),
])
def test_init_takes_what_fits_and_names_the_rest(checkpoint, tmp_path, capsys, colours, mode, more, new):
    pictures = draw(tmp_path / "in", colours, 3, mode)
    path = train_on(pictures, tmp_path / "run", "--init", str(checkpoint), *more)
    said = capsys.readouterr().out
    assert "pictures to learn from:" in said and "--init cifar10" not in said and "--init mnist" not in said
    line = next(line for line in said.splitlines() if line.startswith("Starting from"))
    assert str(checkpoint) in line and (new in line if new else "new," not in line)
    config, before = (load_checkpoint(each)["config"] for each in (path, checkpoint))
    assert config["model"]["base_channels"] == before["model"]["base_channels"]
    assert config["diffusion"]["prediction"] == before["diffusion"]["prediction"]


def test_init_with_a_size_that_its_network_cannot_divide_names_the_nearest(two, tmp_path, capsys):
    first = train_on(two, tmp_path / "first", "--patch_size", "2", "--channel_mults", "1", "2", "2")
    assert train.main(flags(two, tmp_path / "second", "--init", str(first), "--image_size", "28")) == 2
    said = capsys.readouterr().err
    assert "the nearest is 32×32" in said and said.count("\n") == 1


@pytest.mark.parametrize("before, now", [("ab", "abc"), ("ab", "xy"), ("ab", ""), ("", "abc"), ("ab", "ba")])
def test_a_network_with_other_classes_begins_as_the_old_one_without_a_label(before, now):
    def network(classes, seed):
        torch.manual_seed(seed)
        model = create_model(network="unet", image_channels=3, base_channels=8, time_emb_dim=16, channel_mults=[1],
                             num_classes=len(classes) or None)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model
    old, new = network(before, 0), network(now, 1)
    weights, own = old.state_dict(), new.state_dict()
    new.load_state_dict(own | {name: weight for name, weight in weights.items()
                               if name in own and own[name].shape == weight.shape})
    training_flags.begin_labels(new, weights, list(before), list(now))
    x_t, t = torch.randn(1, 3, 16, 16), torch.tensor([400.0])
    torch.testing.assert_close(new(x_t, t), old(x_t, t))
    for label, name in enumerate(now):
        expected = old(x_t, t, torch.tensor([before.index(name)]) if name in before else None)
        torch.testing.assert_close(new(x_t, t, torch.tensor([label])), expected)


def test_init_from_other_pictures_says_that_held_out_ones_may_be_known(two, checkpoint, tmp_path, capsys):
    for more, said in (((), False), (("--image_size", "24"), True)):
        train_on(two, tmp_path / str(said), "--init", str(checkpoint), *more)
        assert ("will be too good" in capsys.readouterr().out) == said


@pytest.mark.parametrize("before, known", [
    (dict(), False),                                # pictures were added: each is in the split that it was in
    (dict(pictures=dict(digest="now")), False),     # the same pictures
    (dict(pictures=dict(count=199)), True),         # none was held out
    (dict(pictures=dict(count=250, held_out=0)), True), (dict(pictures=dict(count=250, held_out=9)), False),
    (dict(pictures=dict(fit="pad")), True), (dict(shape=[3, 32, 32]), True), (dict(pictures=None), False)])
def test_held_out_pictures_may_be_known_only_where_the_split_was_another(monkeypatch, before, known):
    read = dict(fit="crop", channels="auto", background="white")
    monkeypatch.setattr(training_flags, "about", lambda _: dict(digest="now", shape=[3, 16, 16], **read))
    pictures = dict(digest="then", count=200, **read) | (before.get("pictures", {}) or {})
    saved = dict(shape=before.get("shape", [3, 16, 16]),
                 pictures=pictures if before.get("pictures", {}) is not None else None)
    assert training_flags._may_know_held_out(saved, SimpleNamespace(folder=Path("x"))) == known


def test_a_network_without_attention_is_gone_on_from_and_resumed(two, tmp_path):
    first = train_on(two, tmp_path / "first", "--attention", "0")
    second = train_on(two, tmp_path / "second", "--init", str(first))
    assert load_checkpoint(second)["config"]["model"]["attention"] == []
    assert train.main(["--resume", "--output_dir", str(second.parent), "--epochs", "2", *CPU]) == 0


def test_init_takes_the_times_that_the_weights_know(two, tmp_path):
    first = train_on(two, tmp_path / "first", "--timesteps", "100", "--schedule", "linear")
    process = load_checkpoint(train_on(two, tmp_path / "second", "--init", str(first)))["config"]["diffusion"]
    assert (process["num_timesteps"], process["schedule"]) == (100, "linear")


def test_init_of_points_and_with_resume_is_refused_in_one_line(checkpoint, tmp_path, capsys):
    for given, words in ((["--dataset", "moons"], "not for points"), (["--resume"], "leave out --resume")):
        assert train.main([*given, "--init", str(checkpoint), "--output_dir", str(tmp_path), *CPU]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ unread flags


@pytest.mark.parametrize("script, more", [(doctor, []), (evaluate, [])])
def test_flags_of_pictures_with_a_checkpoint_are_refused_in_one_line(checkpoint, script, more, capsys):
    assert script.main(["--checkpoint", str(checkpoint), "--fit", "pad", *more]) == 2
    said = capsys.readouterr().err
    assert "--fit" in said and said.count("\n") == 1


def test_the_benchmark_refuses_a_folder_in_one_line(two, tmp_path, capsys):
    assert benchmark.main(["train", "--quick", "--dataset", str(two), "--output_dir", str(tmp_path), *CPU]) == 2
    said = capsys.readouterr().err
    assert "argument --dataset" in said and "mnist" in said and said.count("\n") == 1
