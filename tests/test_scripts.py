"""The scripts, called as a user calls them: what they write, what they say, and how they end."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_checkpoint
from torch.testing import assert_close

import sample
import train
import visualize_diffusion
from checkpoint import load_checkpoint
from data_sources.cache import Pictures
from training.budget import Budget

SCRIPTS = {"train": train, "sample": sample, "visualize_diffusion": visualize_diffusion}
METRICS = {"step", "epoch", "images_seen", "loss", "val_loss", "lr", "images_per_second", "seconds"}
STEPS = 4  # of an epoch: 256 images in batches of 64


def call(name, *argv):
    return SCRIPTS[name].main([str(argument) for argument in argv])


def tiny(data_dir, output_dir, *more):
    """Flags of a training run of a few seconds."""
    return ["--dataset", "glyphs", "--data_dir", data_dir, "--output_dir", output_dir, "--train_images", 256,
            "--epochs", 2, "--base_channels", 8, "--time_emb_dim", 16, "--patch_size", 4, "--batch_size", 64,
            "--device", "cpu", "--precision", "fp32", *more]


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The folder of a tiny run that wrote a checkpoint after each of its two epochs."""
    folder = tmp_path_factory.mktemp("run") / "outputs"
    assert call("train", *tiny(data_dir, folder, "--save_interval", 1, "--no-conditional")) == 0
    return folder


@pytest.fixture(scope="module")
def conditional(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional") / "outputs"
    assert call("train", *tiny(data_dir, folder, "--conditional", "--epochs", 1, "--timesteps", 30, "--schedule",
                               "linear", "--prediction", "v", "--timestep_sampling", "uniform")) == 0
    return folder


def assert_picture(path):
    """It opens as an image and is not of one colour."""
    with Image.open(path) as picture:
        picture.load()
        assert np.asarray(picture.convert("RGB")).std() > 1, f"{path} is blank"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder):
    """The files below a folder, without the lock that a run holds."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in files)


def arrays(path):
    with np.load(path) as file:
        return file["arr_0"]


# -------------------------------------------------------------------------------------------------------------- train


def test_train_writes_what_it_promises(trained):
    assert written(trained) == ["checkpoints/model_epoch_001.pt", "checkpoints/model_epoch_002.pt", "metrics.jsonl",
                                "model_final.pt", "run.json", "samples/epoch_001.png", "samples/epoch_002.png",
                                "training_loss.png"]
    for path in trained.rglob("*.png"):
        assert_picture(path)


def test_metrics_count_steps_epochs_and_images(trained):
    records = metrics(trained)
    assert all(record.keys() == METRICS for record in records)
    assert [record["step"] for record in records] == [STEPS, 2 * STEPS]
    assert [record["images_seen"] for record in records] == [256, 512]
    assert [record["epoch"] for record in records] == [1, 2]
    assert all(np.isfinite([r["loss"], r["val_loss"], r["lr"], r["images_per_second"]]).all() for r in records)
    assert records[0]["seconds"] < records[1]["seconds"]


def test_the_checkpoint_says_what_was_trained(trained, data_dir):
    saved = load_checkpoint(trained / "model_final.pt")
    assert (saved["step"], saved["epoch"], saved["images_seen"]) == (2 * STEPS, 2, 512)
    assert saved["config"]["data"]["dataset"] == "glyphs" and saved["config"]["data"]["shape"] == [1, 28, 28]
    assert saved["config"]["model"]["base_channels"] == 8 and saved["config"]["training"]["batch_size"] == 64
    assert saved["model"].keys() == saved["ema"].keys()
    assert any(not torch.equal(saved["model"][name], saved["ema"][name]) for name in saved["model"])


def test_training_lowers_the_loss(data_dir, tmp_path):
    assert call("train", *tiny(data_dir, tmp_path, "--epochs", 3, "--train_images", 2048, "--sample_interval", 0,
                               "--save_interval", 0, "--lr", 1e-2)) == 0
    losses = [record["val_loss"] for record in metrics(tmp_path)]
    assert losses[-1] < losses[0] and losses[-1] < 0.8  # edm's target has variance 1, which is what zero would cost


def test_the_same_seed_trains_the_same_network_and_another_does_not(trained, data_dir, tmp_path):
    final = load_checkpoint(trained / "model_final.pt")["ema"]
    for seed in (0, 1):
        assert call("train", *tiny(data_dir, tmp_path / str(seed), "--seed", seed, "--sample_interval", 0,
                                   "--no-conditional")) == 0
        other = load_checkpoint(tmp_path / str(seed) / "model_final.pt")["ema"]
        assert all(torch.equal(final[name], other[name]) for name in final) == (seed == 0)


def test_interval_0_switches_samples_and_checkpoints_off(data_dir, tmp_path):
    assert call("train", *tiny(data_dir, tmp_path, "--epochs", 1, "--sample_interval", 0, "--save_interval", 0)) == 0
    assert written(tmp_path) == ["metrics.jsonl", "model_final.pt", "run.json", "training_loss.png"]


def test_a_resumed_run_equals_one_that_was_not_interrupted(trained, data_dir, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(trained / "checkpoints/model_epoch_001.pt", tmp_path / "checkpoints")
    assert call("train", *tiny(data_dir, tmp_path, "--save_interval", 1, "--resume")) == 0
    one, two = (load_checkpoint(folder / "model_final.pt") for folder in (trained, tmp_path))
    for name in ("model", "ema", "optimizer"):
        assert_close(one[name], two[name], rtol=0, atol=0)
    keep = [{k: r[k] for k in ("step", "epoch", "images_seen", "loss", "val_loss", "lr")} for r in metrics(trained)]
    assert [{k: r[k] for k in keep[0]} for r in metrics(tmp_path)] == keep


def test_a_run_by_epochs_keeps_its_number_of_threads_and_says_so(cores, data_dir, tmp_path, capsys):
    assert call("train", *tiny(data_dir, tmp_path, "--epochs", 1, "--sample_interval", 0)) == 0
    assert set(cores) == {2} and "2 threads from beginning to end" in capsys.readouterr().out
    assert call("train", *tiny(data_dir, tmp_path, "--epochs", 1, "--sample_interval", 0, "--threads", 1)) == 0
    assert cores[-1] == 1 and "1 thread from beginning to end" in capsys.readouterr().out
    cores.clear()
    assert call("train", "--resume", "--output_dir", tmp_path, "--data_dir", data_dir, "--epochs", 2) == 0
    assert set(cores) == {1}  # the flag is in the checkpoint


def test_a_run_by_time_adapts_its_number_of_threads_and_says_so(cores, monkeypatch, data_dir, tmp_path, capsys):
    monkeypatch.setattr(Budget, "progress", lambda _, step, time_share: min(1.0, step / 8))
    flags = [flag for flag in tiny(data_dir, tmp_path, "--sample_interval", 0, "--budget", "1h")
             if flag not in ("--epochs", 2)]
    assert call("train", *flags) == 0
    assert set(cores) == {1, 2} and "2 threads now, fewer or more" in capsys.readouterr().out


def test_resuming_with_more_epochs_goes_on_counting(trained, data_dir, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    assert call("train", *tiny(data_dir, tmp_path / "run", "--resume", "--epochs", 3)) == 0
    assert [record["step"] for record in metrics(tmp_path / "run")] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert load_checkpoint(tmp_path / "run/model_final.pt")["step"] == 3 * STEPS
    assert (tmp_path / "run/samples/epoch_003.png").exists()


def test_resuming_a_run_that_has_no_checkpoint_yet_starts_afresh(data_dir, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    assert call("train", *tiny(data_dir, tmp_path, "--resume", "--epochs", 1, "--sample_interval", 0)) == 0
    assert "othing to resume" in capsys.readouterr().out
    assert metrics(tmp_path)[-1]["step"] == STEPS


def test_resuming_another_network_is_refused_and_harms_nothing(trained, data_dir, capsys):
    before = {name: (trained / name).read_bytes() for name in written(trained)}
    assert call("train", *tiny(data_dir, trained, "--resume", "--base_channels", 16)) == 2
    assert "base_channels" in capsys.readouterr().err
    assert {name: (trained / name).read_bytes() for name in written(trained)} == before


def test_every_option_of_the_network_and_the_process_trains(data_dir, tmp_path):
    for i, more in enumerate([
            ["--schedule", "linear", "--prediction", "eps", "--timestep_sampling", "stratified", "--activation",
             "gelu"],
            ["--prediction", "x0", "--timesteps", 1, "--attention", 0, "--depth", 2, "--patch_size", 2],
            ["--patch_size", 2, "--channel_mults", 1, 2, "--conditional", "--label_dropout", 0.5, "--dropout", 0.2,
             "--checkpointing", "--warmup", 0,
             "--weight_decay", 0.1, "--max_grad_norm", 0.5, "--ema_decay", 0.9, "--lr", 1e-3, "--precision", "bf16"]]):
        assert call("train", *tiny(data_dir, tmp_path / str(i), "--epochs", 1, "--train_images", 64, *more)) == 0
        assert_picture(tmp_path / str(i) / "samples/epoch_001.png")


def test_real_mnist_trains(real_mnist, tmp_path):
    argv = tiny(real_mnist, tmp_path, "--epochs", 1)
    argv[argv.index("glyphs")] = "mnist"
    assert call("train", *argv) == 0
    assert load_checkpoint(tmp_path / "model_final.pt")["config"]["data"]["dataset"] == "mnist"
    assert_picture(tmp_path / "samples/epoch_001.png")


# ------------------------------------------------------------------------------------------------------------- sample


def draw(checkpoint, output, *more):
    assert call("sample", "--checkpoint", checkpoint, "--output", output, "--num_images", 8, "--steps", 5, "--device",
                "cpu", "--precision", "fp32", *more) == 0
    return arrays(output) if output.suffix == ".npz" else assert_picture(output)


def test_sample_writes_a_picture_and_the_way_to_it(trained, tmp_path):
    draw(trained / "model_final.pt", tmp_path / "generated_samples.png", "--show_intermediate")
    names = written(tmp_path)
    assert {"generated_samples.png", "film_strip.png", "intermediate/step_0999.png"} <= set(names)
    assert len([name for name in names if re.fullmatch(r"intermediate/step_\d{4}\.png", name)]) == 5
    first = {name: (tmp_path / name).read_bytes() for name in names}
    draw(trained / "model_final.pt", tmp_path / "x.png", "--show_intermediate", "--seed", 1)
    assert all((tmp_path / name).read_bytes() == content for name, content in first.items())  # another output's stay
    assert {"x.png", "x_film_strip.png", "x_intermediate/step_0999.png"} <= set(written(tmp_path))
    for name in names:
        assert_picture(tmp_path / name)


def test_the_way_of_an_earlier_run_goes_and_other_files_stay(trained, tmp_path):
    folder = tmp_path / "intermediate"
    folder.mkdir()
    for name in ("step_0123.png", "step_12345.png", "final.png", "mine.png", "step_by_step.png"):
        (folder / name).write_text("old")
    draw(trained / "model_final.pt", tmp_path / "generated_samples.png", "--num_images", 2, "--steps", 2,
         "--show_intermediate")
    names = written(folder)
    assert {"mine.png", "step_by_step.png", "final.png"} < set(names) and len(names) == 5  # two times, and the end
    assert not {"step_0123.png", "step_12345.png"} & set(names)
    assert_picture(folder / "final.png")


def test_sample_writes_arrays(trained, conditional, tmp_path):
    for folder in (trained, conditional):
        images = draw(folder / "model_final.pt", tmp_path / "x.npz")
        assert images.shape == (8, 28, 28, 1) and images.dtype == np.uint8 and images.std() > 1


def test_the_same_seed_makes_the_same_images_in_any_batch(trained, tmp_path):
    checkpoint, output = trained / "model_final.pt", tmp_path / "x.npz"
    for options in (["--sampler", "dpmpp_2m"], ["--sampler", "ddpm"], ["--sampler", "ddim", "--eta", 1]):
        images = draw(checkpoint, output, *options)
        assert len({image.tobytes() for image in images}) == 8
        assert np.array_equal(images, draw(checkpoint, output, *options))
        for size in (1, 3):
            other = draw(checkpoint, output, "--batch_size", size, *options)
            assert abs(images.astype(int) - other).max() <= 1  # 1e-3 can cross from one level to the next
        assert not np.array_equal(images, draw(checkpoint, output, "--seed", 1, *options))


def test_sampling_holds_the_numbers_of_one_batch_at_a_time(trained, tmp_path, monkeypatch):
    ends, held, generate = [], [], sample.generate

    def watched(*args, **options):
        for batch, trajectory in generate(*args, **options):
            held.append(sum(end() is not None for end in ends))
            yield batch, watch(trajectory)

    def watch(trajectory):
        for step in trajectory:
            yield step
        ends.append(weakref.ref(step[1]))
    monkeypatch.setattr(sample, "generate", watched)
    draw(trained / "model_final.pt", tmp_path / "a.npz", "--batch_size", 2)
    assert len(ends) == 4 and max(held) <= 1  # the images before this batch are bytes by now


def test_sampling_adapts_its_number_of_threads_unless_it_is_given(cores, trained, tmp_path):
    flags = ["--checkpoint", trained / "model_final.pt", "--num_images", 4, "--output", tmp_path / "x.npz", "--device",
             "cpu"]
    assert call("sample", *flags) == 0 and set(cores) == {1, 2}
    cores.clear()
    assert call("sample", *flags, "--threads", 2) == 0 and set(cores) == {2}


def test_samplers_steps_and_weights_make_a_difference(trained, tmp_path):
    checkpoint, output = trained / "model_final.pt", tmp_path / "x.npz"
    made = [draw(checkpoint, output, *options).tobytes() for options in (
        [], ["--sampler", "ddpm"], ["--sampler", "ddim"], ["--sampler", "ddim", "--eta", 0.5], ["--timesteps", 6],
        ["--no-use_ema"], ["--seed", 2**63 - 1])]
    assert len(set(made)) == len(made)


# ---------------------------------------------------------------------------------------------------------- visualize


GLYPHS = ["--dataset", "glyphs"]


@pytest.mark.parametrize("argv", [[*GLYPHS, "--what", "forward", "--num_images", 3],
                                  [*GLYPHS, "--schedule", "cosine", "--timesteps", 3],
                                  ["--what", "schedules"], ["--what", "schedules", "--timesteps", 1]], ids=str)
def test_visualize_draws_without_a_model(data_dir, tmp_path, argv):
    path = tmp_path / "new" / "picture.png"
    assert call("visualize_diffusion", "--data_dir", data_dir, "--save_path", path, *argv) == 0
    assert written(tmp_path) == ["new/picture.png"]
    assert_picture(path)


def test_visualize_draws_how_a_model_denoises(trained, conditional, tmp_path):
    for folder, steps in ((trained, 20), (conditional, 1)):
        path = tmp_path / f"{steps}.png"
        assert call("visualize_diffusion", "--what", "denoising", "--checkpoint", folder / "model_final.pt",
                    "--num_images", 2, "--steps", steps, "--device", "cpu", "--save_path", path) == 0
        assert_picture(path)


def test_visualize_shows_the_same_images_for_the_same_seed(data_dir, tmp_path):
    pictures = []
    for i, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{i}.png"
        assert call("visualize_diffusion", "--dataset", "glyphs", "--data_dir", data_dir, "--num_images", 2, "--seed",
                    seed, "--save_path", path) == 0
        pictures.append(np.asarray(Image.open(path)).tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.fixture(scope="module")
def flags():
    """The flags that each script knows."""
    args = {"train": train.parse_args([]), "sample": sample.parse_args(["--checkpoint", "x"]),
            "visualize_diffusion": visualize_diffusion.parse_args([])}
    return {name: set(vars(a[0] if isinstance(a, tuple) else a)) for name, a in args.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name, flags, root):
    """In the script, where flags become a sampler, or where those of train.py become a config."""
    read = set()

    class Reader(ast.NodeVisitor):
        def visit_Attribute(self, node):  # args.flag, settings.flag
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", None)) in ("args", "settings"):
                read.add(node.attr)
            self.generic_visit(node)

        def visit_Call(self, node):  # not where the flags are defined
            if getattr(node.func, "attr", getattr(node.func, "id", None)) not in ("add_argument", "add_shared_flags"):
                self.generic_visit(node)

        def visit_Assign(self, node):  # lists of names that getattr reads, but not those that it must not
            if getattr(node.targets[0], "id", None) != "OWN_FLAGS":
                self.generic_visit(node)

        def visit_Constant(self, node):
            read.add(node.value)

    others = {"train": [f"training/{part}.py" for part in ("flags", "resume", "setup")],
              "sample": ["runtime/sampling.py"], "visualize_diffusion": ["runtime/sampling.py"]}
    for path in (f"{name}.py", *others[name]):
        Reader().visit(ast.parse((root / path).read_text()))
    if "chosen_dataset" in (root / f"{name}.py").read_text():
        read |= set(Pictures._fields)  # it looks them up by these names
    assert not flags[name] - read


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag_and_ends_with_0(name, flags, capsys):
    assert call(name, "--help") == 0
    text = capsys.readouterr().out
    assert all(f"--{flag}" in text for flag in flags[name])
    assert f"python {name}.py" in text


COMMANDS = ("train", "sample", "visualize_diffusion", "edit inpaint", "edit vary", "edit interpolate", "edit invert",
            "edit", "evaluate", "doctor", "distill", "export", "benchmark")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_tells_each_default_once_and_as_a_user_would_type_it(command, capsys):
    name, *argv = command.split()
    assert importlib.import_module(name).main([*argv, "--help"]) == 0
    for part in re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]:
        text = " ".join(part.split())
        assert text.count("(default") <= 1 and "[None]" not in text, text
        assert "(default: [" not in text, text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_flag_is_more_than_a_fragment(command, capsys):
    name, *argv = command.split()
    assert importlib.import_module(name).main([*argv, "--help"]) == 0
    parts = re.split(r"\n  (?=-)", re.sub(r"\n\n\S.*", "", capsys.readouterr().out))[1:]
    for part in (" ".join(part.split()) for part in parts):
        text = re.sub(r"^(-\S+( [A-Z]\w*)*( \{\S*\})*( \[[^]]*\])*(, )?)+", "", part).strip()  # without the flag
        assert len(text.split("(default")[0].split()) >= 3, part
        assert not re.match(r"(how many|for --what|of|and|to|peak|size|side|steps|channels|images in) ", text), part


def test_the_help_of_evaluate_says_which_figures_should_be_high(capsys):
    import evaluate
    assert evaluate.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for direction, names in (("lower is better", ["frechet_distance", "kernel_distance", "class_distance",
                                                  "autoencoder_distance"]),
                             ("higher is better", ["precision", "recall", "coverage", "autoencoder_precision",
                                                   "autoencoder_recall", "asked_class", "cas"]),
                             ("as for real images", ["density", "confident"])):
        [start] = [i for i, line in enumerate(lines) if line.strip().startswith(direction)]
        ends = [i for i, line in enumerate(lines)
                if i > start and (not line or " better " in line or " as for " in line)]
        block = " ".join(lines[start:ends[0]])
        assert all(name in block for name in names), block


# -------------------------------------------------------------------------------------------------------------- errors


def assert_refused(capsys, name, argv, words, folder):
    """Exit status 2, one line on stderr with these words, nothing new in the folder."""
    before = written(folder)
    capsys.readouterr()
    status = call(name, *argv)
    error = capsys.readouterr().err
    assert status == 2
    assert len(error.splitlines()) == 1 and "Traceback" not in error, error
    assert all(word in error for word in words), error
    assert written(folder) == before


@pytest.mark.parametrize("flags, words", [
    (["--device", "cuda:99"], ["cuda:99", "--device auto"]),
    (["--dataset", "emnist"], ["emnist", "glyphs"]),
    (["--epochs", "0"], ["--epochs", "'0'"]),
    (["--batch_size", "-1"], ["--batch_size", "'-1'"]),
    (["--lr", "fast"], ["--lr", "'fast'"]),
    (["--lr", "nan"], ["--lr", "'nan'"]),
    (["--timesteps", "0"], ["--timesteps", "'0'"]),
    (["--schedule", "sigmoid"], ["sigmoid", "linear", "cosine"]),
    (["--prediction", "epsilon"], ["epsilon", "eps"]),
    (["--time_emb_dim", "15"], ["time_emb_dim", "15", "even"]),
    (["--channel_mults", "1", "1", "1", "1", "--patch_size", "1"], ["divisible by 8", "28×28"]),
    (["--no_such_flag"], ["--no_such_flag"]),
])
def test_train_refuses_what_cannot_be(data_dir, tmp_path, capsys, flags, words):
    assert_refused(capsys, "train", tiny(data_dir, tmp_path / "outputs", *flags), words, tmp_path)


def test_train_refuses_a_folder_that_cannot_be_written(data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert_refused(capsys, "train", tiny(data_dir, tmp_path / "file" / "outputs"), ["cannot write", "file"], tmp_path)


@pytest.mark.parametrize("name", ["train", "distill", "evaluate", "visualize_diffusion"])
def test_an_unwritable_folder_is_told_before_data_are_drawn(conditional, tmp_path, capsys, monkeypatch, name):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "load_dataset", lambda *_, **__: pytest.fail("data are drawn before it is told"))
    (tmp_path / "file").write_text("")
    folder, checkpoint = tmp_path / "file/outputs", conditional / "model_final.pt"
    argv = {"train": tiny(tmp_path, folder), "visualize_diffusion": ["--save_path", folder / "x.png"],
            "distill": ["--checkpoint", checkpoint, "--output_dir", folder, "--device", "cpu"],
            "evaluate": ["--checkpoint", checkpoint, "--output_dir", folder, "--device", "cpu"]}[name]
    assert module.main(list(map(str, argv))) == 2
    assert f"cannot write to {folder}" in capsys.readouterr().err


def test_train_refuses_a_damaged_data_file(tmp_path, capsys):
    (tmp_path / "data/glyphs").mkdir(parents=True)
    (tmp_path / "data/glyphs/train.npz").write_bytes(b"half")
    assert_refused(capsys, "train", tiny(tmp_path / "data", tmp_path / "outputs"), ["train.npz", "damaged"], tmp_path)


@pytest.mark.parametrize("flags, words", [
    (["--steps", "1001"], ["1..1000", "1001"]),
    (["--steps", "0"], ["steps", "'0'"]),
    (["--num_images", "0"], ["--num_images", "'0'"]),
    (["--eta", "2"], ["--eta", "'2'"]),
    (["--eta", "0.5"], ["--eta", "--sampler ddim and heun"]),
    (["--eta", "0", "--sampler", "ddpm"], ["--eta", "--sampler ddim and heun"]),
    (["--guidance_interval", "1", "2"], ["--guidance_interval", "--conditional"]),
    (["--checkpiont", "x"], ["--checkpiont", "did you mean --checkpoint?"]),
    (["--seed", "-1"], ["--seed", "'-1'"]),
    (["--sampler", "euler"], ["euler", "ddim"]),
    (["--device", "cuda:99"], ["cuda:99", "--device auto"]),
    (["--checkpoint", "missing.pt"], ["missing.pt", "train.py"]),
    (["--checkpoint", __file__], ["test_scripts.py", "checkpoint"]),
    (["--output", "x.jpg"], [".png", ".npz", "x.jpg"]),
])
def test_sample_refuses_what_cannot_be(trained, tmp_path, capsys, flags, words):
    argv = ["--checkpoint", trained / "model_final.pt", "--output", tmp_path / "x.png", "--device", "cpu", *flags]
    assert_refused(capsys, "sample", argv, words, tmp_path)


def test_sample_refuses_an_output_that_cannot_be_written(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["--checkpoint", trained / "model_final.pt", "--output", tmp_path / "file" / "x.png"]
    assert_refused(capsys, "sample", argv, ["cannot write", "file"], tmp_path)


@pytest.mark.parametrize("name, argv, taken", [
    ("sample", ["--gif", "--output", "x.png"], "x.gif/"),
    ("sample", ["--show_intermediate", "--output", "x.png"], "x_film_strip.png/"),
    ("sample", ["--show_intermediate", "--output", "x.png"], "x_intermediate"),
    ("edit", ["vary", "--image", "picture.png", "--gif", "--output", "x.png"], "x.gif/"),
    ("evaluate", ["--num_images", "500"], "nearest.png/"),
    ("train", ["--data_dir", "nowhere", "--output_dir", ".", "--dataset", "glyphs"], "checkpoints"),
    ("distill", ["--output_dir", "."], "previous"),
    ("benchmark", ["--output_dir", "."], "benchmark_quality.png/"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_each_of_several_outputs_is_checked_before_anything_is_done(tmp_path, monkeypatch, capsys, name, argv, taken):
    """taken: what is in the place of the second output: a folder (with a /) for a file, or a file for a folder."""
    module = importlib.import_module(name)
    if hasattr(module, "load_dataset"):
        monkeypatch.setattr(module, "load_dataset", lambda *_, **__: pytest.fail("data are drawn before it is told"))
    monkeypatch.chdir(tmp_path)
    small_checkpoint(tmp_path / "in/model.pt", "mnist")
    Image.new("L", (28, 28), 9).save("picture.png")
    Path(taken).mkdir() if taken.endswith("/") else Path(taken).write_text("mine")
    before, given = written(tmp_path), [] if name in ("train", "benchmark") else ["--checkpoint", "in/model.pt"]
    if name == "evaluate":
        given += ["--output_dir", "."]
    assert module.main([*argv, *given, "--device", "cpu"]) == 2
    out, error = capsys.readouterr()
    assert len(error.splitlines()) == 1 and taken.rstrip("/") in error and "Saved" not in out, error
    assert written(tmp_path) == before


LONG = 300 * "a"


@pytest.mark.parametrize("name, argv", [
    ("sample", ["--checkpoint", LONG]), ("sample", ["--output", f"{LONG}.png"]),
    ("sample", ["--output", f"new/{241 * 'a'}.png"]), ("sample", ["--gif", "--output", f"{120 * 'ä'}.png"]),
    ("edit", ["vary", "--image", LONG]), ("edit", ["inpaint", "--image", "in/model.pt", "--mask", LONG]),
    ("evaluate", ["--runs", LONG]), ("evaluate", ["--compare", LONG, LONG]), ("train", ["--output_dir", LONG]),
    ("train", ["--resume", "--output_dir", LONG]), ("train", ["--init", LONG]), ("doctor", ["--checkpoint", LONG]),
    ("export", ["--output", f"{LONG}.html"]), ("visualize_diffusion", ["--save_path", f"{LONG}.png"]),
], ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_name_that_is_too_long_is_told_in_a_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, name, argv):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    small_checkpoint(tmp_path / "in/model.pt", "mnist")
    reads = name in ("sample", "edit", "export") and "--checkpoint" not in argv
    assert module.main([*argv, *(["--checkpoint", "in/model.pt"] if reads else [])]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Traceback" not in error and len(error) < 600, error
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["model.pt"]


def test_no_folder_is_made_for_a_checkpoint_that_is_missing(tmp_path, capsys):
    argv = ["--checkpoint", tmp_path / "missing.pt", "--output", tmp_path / "new" / "x.png"]
    assert_refused(capsys, "sample", argv, ["missing.pt"], tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (["--what", "denoising", "--checkpoint", "missing.pt"], ["missing.pt", "train.py"]),
    (["--save_path", "x.jpg"], [".png", ".pdf", ".svg", "x.jpg"]),
    (["--num_images", "0"], ["--num_images", "'0'"]),
    (["--what", "sideways"], ["sideways", "forward"]),
])
def test_visualize_refuses_what_cannot_be(data_dir, tmp_path, capsys, flags, words):
    argv = ["--dataset", "glyphs", "--data_dir", data_dir, "--save_path", tmp_path / "x.png", *flags]
    assert_refused(capsys, "visualize_diffusion", argv, words, tmp_path)


def test_visualize_refuses_more_steps_than_the_checkpoint_has(conditional, tmp_path, capsys):
    argv = ["--what", "denoising", "--checkpoint", conditional / "model_final.pt", "--steps", 31, "--save_path",
            tmp_path / "x.png", "--device", "cpu"]
    assert_refused(capsys, "visualize_diffusion", argv, ["1..30", "31"], tmp_path)


# ----------------------------------------------------------------------------------------------- as separate processes


def python(root, *argv):
    """Run a script by its file. Only the project's own warnings count: other packages' are theirs to mend."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=root, env=environment, capture_output=True, text=True,
                          timeout=200)


@pytest.mark.parametrize("name, argv", [("train.py", ["--device", "no-such"]),
                                        ("sample.py", ["--checkpoint", "no-such"]),
                                        ("visualize_diffusion.py", ["--num_images", "no-such"])])
def test_a_refusal_of_a_script_is_one_line_that_begins_with_its_name(root, tmp_path, name, argv):
    output = {"train.py": "--output_dir", "sample.py": "--output", "visualize_diffusion.py": "--save_path"}[name]
    ended = python(root, name, *argv, output, tmp_path / "x.png")
    assert ended.returncode == 2 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith(f"{name}: ") and "no-such" in ended.stderr


def test_the_whole_way_ends_well_without_warnings(root, data_dir, tmp_path):
    run, picture = tmp_path / "run", tmp_path / "run/generated_samples.png"
    code = ("import sys, json; import train, sample, visualize_diffusion; "
            "sys.exit(max(globals()[name].main(argv) for name, argv in json.loads(sys.argv[1])))")
    steps = [("train", tiny(data_dir, run, "--epochs", 1)),
             ("sample", ["--checkpoint", run / "model_final.pt", "--output", picture, "--steps", 3]),
             ("visualize_diffusion", ["--dataset", "glyphs", "--data_dir", data_dir, "--save_path",
                                      tmp_path / "f.png"])]
    # Errors from the end of the imports on: what other packages warn of when they are loaded is not the project's.
    code = code.replace("sys.exit", "import warnings; warnings.simplefilter('error'); sys.exit")
    ended = python(root, "-c", code, json.dumps([(name, list(map(str, argv))) for name, argv in steps]))
    assert ended.returncode == 0, ended.stderr
    assert "arning" not in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr
    for path in (picture, tmp_path / "f.png", run / "training_loss.png"):
        assert_picture(Path(path))


@pytest.mark.parametrize("name", ["train", "sample"])
def test_a_script_whose_reader_leaves_writes_its_files(root, data_dir, trained, tmp_path, name):
    """As in `python sample.py ... 2>&1 | head -1`."""
    argv, path = {
        "train": (tiny(data_dir, tmp_path, "--epochs", 1, "--sample_interval", 0), tmp_path / "model_final.pt"),
        "sample": (["--checkpoint", trained / "model_final.pt", "--steps", 3, "--output", tmp_path / "x.png"],
                   tmp_path / "x.png")}[name]
    process = subprocess.Popen([sys.executable, "-u", f"{name}.py", *map(str, argv)], cwd=root, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline().startswith(b"Using device")
    process.stdout.close()
    assert process.wait(100) == 0 and path.exists()


def test_pip_says_nothing_but_errors(root):
    lines = [line for line in (root / "Makefile").read_text().splitlines() if "pip install" in line]
    assert lines and all("-qq --disable-pip-version-check" in line for line in lines)


def test_importing_the_scripts_warns_of_nothing_and_prints_nothing(root):
    ended = python(root, "-W", "error", "-c", "import train, sample, visualize_diffusion")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_frames_of_times_that_round_alike_have_names_of_their_own():
    assert sample.frame_names([999.0, 499.0, -1]) == ["step_0999.png", "step_0499.png", "final.png"]
    assert sample.frame_names([8.1, 8.0, -1]) == ["step_0008.1.png", "step_0008.0.png", "final.png"]
