"""Which checkpoint a script reads: of each script that reads one, with a path, with a name, and with neither."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from harness import OnRank, assert_refused, files, run_together
from small import pretrained_folder, small_checkpoint

import distill
import doctor
import edit
import evaluate
import sample
import train
import visualize_diffusion
from benchmarks.pretrained import packed
from checkpoint import load_checkpoint, save_checkpoint
from data import load_dataset
from evaluation import inputs, metrics, reference, two_sample
from evaluation.floors import floor_cache
from runtime import checkpoints
from runtime.errors import UserError
from training.budget import Budget

pytest.importorskip("torchmetrics", reason="torchmetrics is missing: pip install -r requirements-eval.txt")
NAMES = ("mnist", "fashion_mnist", "glyphs")
CALLS = {"sample": (sample, []), "edit": (edit, ["vary"]), "evaluate": (evaluate, []), "distill": (distill, []),
         "visualize_diffusion": (visualize_diffusion, ["--what", "denoising"]), "doctor": (doctor, [])}
CHOOSING = [name for name in CALLS if name != "doctor"]  # doctor.py only examines a checkpoint that is given
STUDENTLESS = ("edit", "distill")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of train.py, one of distill.py, and a folder of pretrained ones, all small and of glyphs."""
    folder = tmp_path_factory.mktemp("made")
    run = small_checkpoint(folder / "run.pt", conditional=True)
    content = torch.load(run, weights_only=True)
    content["config"]["training"]["student"] = True
    torch.save(content, folder / "student.pt")
    return SimpleNamespace(run=run, student=folder / "student.pt",
                           pretrained=pretrained_folder(folder / "pretrained", **dict.fromkeys(NAMES, run)))


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """An empty folder to work in, and an installation of its own with pretrained models."""
    for path in made.pretrained.iterdir():
        (tmp_path / "installed").mkdir(exist_ok=True)
        (tmp_path / "installed" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "installed")
    return tmp_path / "work"


@pytest.fixture
def chosen(here, monkeypatch, capsys):
    """chosen(script, *flags) -> the path of the checkpoint that it loads, and the lines that it prints before."""
    def call(name, *flags):
        (module, argv), paths = CALLS[name], []

        def load(path, *_, **__):
            paths.append(path)
            raise UserError("enough")
        with monkeypatch.context() as patch:
            patch.setattr(inputs if module is evaluate else module, "load_model", load)
            patch.setattr(doctor, "examine_machine", lambda *_: iter(()))
            status = module.main([*argv, *map(str, flags), "--device", "cpu"])
        said = capsys.readouterr()
        assert status == (1 if name == "doctor" else 2) and "enough" in said.err + said.out
        return str(*paths), said.out.splitlines()
    return call


def put(path, content, seconds):
    """Write a copy of a checkpoint, as if it had been written `seconds` after the epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.read_bytes())
    os.utime(path, (seconds, seconds))


# ------------------------------------------------------------------------------------------------------------- a name


@pytest.mark.parametrize("script", CALLS)
def test_a_name_is_a_pretrained_model(chosen, here, made, script):
    put(here / "outputs/model_final.pt", made.run, 1000)
    path, lines = chosen(script, "--checkpoint", "fashion_mnist")
    assert path == str(checkpoints.PRETRAINED / "fashion_mnist.pt") and not any("Using" in line for line in lines)


@pytest.mark.parametrize("script", CALLS)
def test_a_file_that_is_called_like_a_name_wins(chosen, here, made, script):
    put(here / "mnist", made.run, 1000)
    assert chosen(script, "--checkpoint", "mnist")[0] == "mnist"


@pytest.mark.parametrize("script", CALLS)
def test_a_folder_that_is_called_like_a_name_wins(here, capfd, script):
    (here / "mnist").mkdir()
    module, argv = CALLS[script]
    assert_refused(capfd, module.main([*argv, "--checkpoint", "mnist"]), "mnist is a folder", "mnist/model_final.pt")


@pytest.mark.parametrize("script", CALLS)
def test_what_is_neither_a_path_nor_a_name_is_refused(here, capfd, script):
    module, argv = CALLS[script]
    assert_refused(capfd, module.main([*argv, "--checkpoint", "minst"]), "no checkpoint minst", "train.py",
                   "mnist, fashion_mnist, glyphs")
    assert files(here) == {}


DAMAGES = {
    "a bit": lambda folder: flip(folder / "mnist.pt"),
    "half a file": lambda folder: (folder / "mnist.pt").write_bytes((folder / "mnist.pt").read_bytes()[:5000]),
    "no file": lambda folder: (folder / "mnist.pt").unlink(),
    "another file": lambda folder: os.replace(folder / "glyphs.pt", folder / "mnist.pt") or flip(folder / "mnist.pt"),
    "the index": lambda folder: (folder / "index.json").write_text("{"),
    "bytes in the index": lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe"),
    "a list as the index": lambda folder: (folder / "index.json").write_text("[]"),
    "an entry without a digest": lambda folder: (folder / "index.json").write_text('{"mnist": {}}'),
    "an entry that is a number": lambda folder: (folder / "index.json").write_text('{"mnist": 7}'),
}


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("given", [["--checkpoint", "mnist"], []], ids=["by name", "by default"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pretrained_file_is_one_line(here, capfd, damage, given):
    DAMAGES[damage](checkpoints.PRETRAINED)
    assert_refused(capfd, sample.main(given), "damaged", "git checkout models/pretrained")


@pytest.mark.parametrize("script", CALLS)
def test_every_script_tells_of_a_damaged_pretrained_file(here, capfd, script):
    flip(checkpoints.PRETRAINED / "glyphs.pt")
    module, argv = CALLS[script]
    for given in ("glyphs", str(checkpoints.PRETRAINED / "glyphs.pt")):
        assert_refused(capfd, module.main([*argv, "--checkpoint", given]), "glyphs.pt is missing or damaged")
    assert files(here) == {}


def test_without_pretrained_files_a_run_is_asked_for(here, capfd, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", here / "nowhere")
    assert_refused(capfd, sample.main([]), "no pretrained mnist", "train.py")
    assert_refused(capfd, sample.main(["--checkpoint", "mnist"]), "no checkpoint mnist", "train.py")


def test_the_weights_of_the_last_step_are_not_in_a_pretrained_file(here, capfd):
    for given in (["--checkpoint", "mnist"], []):
        assert_refused(capfd, sample.main([*given, "--no-use_ema"]), "mnist.pt only holds the moving average",
                       "--no-use_ema")


# ------------------------------------------------------------------------------------------------- without --checkpoint


@pytest.mark.parametrize("script", CHOOSING)
def test_where_nothing_is_trained_the_pretrained_mnist_is_taken(chosen, here, made, script):
    put(here / "mnist", made.run, 1000)  # it was not asked for by this path
    for make in (lambda: None, (here / "outputs").mkdir, lambda: (here / "outputs/model_final.pt").mkdir()):
        make()
        path, lines = chosen(script)
        assert path == str(checkpoints.PRETRAINED / "mnist.pt")
        assert lines[0].startswith("Using the pretrained mnist (outputs/ holds no model_final.pt")


@pytest.mark.parametrize("script", CHOOSING)
@pytest.mark.parametrize("newest", ["outputs/model_final.pt", "outputs/b/model_final.pt", "outputs/a/b/model_final.pt"])
def test_the_newest_run_is_taken_wherever_it_lies_below_outputs(chosen, here, made, script, newest):
    for older in ("outputs/model_final.pt", "outputs/a/model_final.pt", "outputs/c/model_final.pt"):
        put(here / older, made.run, 1000)
    put(here / "outputs/z/checkpoints/model_epoch_009.pt", made.run, 3000)  # no end of a run
    put(here / "model_final.pt", made.run, 3000)  # not in outputs/
    put(here / newest, made.run, 2000)
    path, lines = chosen(script)
    assert path == newest
    assert lines[0].startswith(f"Using {newest} (the newest") and lines[0].endswith("another with --checkpoint)")


@pytest.mark.parametrize("script", CHOOSING)
def test_a_student_is_taken_only_where_it_can_be_used(chosen, here, made, script):
    put(here / "outputs/student/model_final.pt", made.student, 2000)
    alone = chosen(script)[0]
    put(here / "outputs/model_final.pt", made.run, 1000)
    beside, lines = chosen(script)
    if script in STUDENTLESS:
        assert (alone, beside) == (str(checkpoints.PRETRAINED / "mnist.pt"), "outputs/model_final.pt")
        assert "(the newest of train.py;" in lines[0]
    else:
        assert alone == beside == "outputs/student/model_final.pt" and "(the newest;" in lines[0]


def test_a_newest_run_that_is_damaged_is_named(here, made, capfd):
    put(here / "outputs/old/model_final.pt", made.run, 1000)
    put(here / "outputs/new/model_final.pt", made.run, 2000)
    (here / "outputs/new/model_final.pt").write_bytes(b"broken")
    for script in CHOOSING:
        module, argv = CALLS[script]
        assert_refused(capfd, module.main([*argv, "--device", "cpu"]), "outputs/new/model_final.pt is damaged")


@pytest.mark.parametrize("script, flags", [
    ("evaluate", ["--output_dir", "out"]), ("edit", ["vary", "--index", "0"]), ("distill", ["--output_dir", "out"]),
    ("visualize_diffusion", ["--what", "loss"])])
def test_a_checkpoint_of_other_images_than_its_data_set_has_is_refused(here, made, data_dir, capfd, script, flags):
    content = torch.load(made.run, weights_only=True)
    content["config"]["data"]["shape"] = [1, 32, 32]
    torch.save(content, here / "other.pt")
    status = CALLS[script][0].main([*flags, "--checkpoint", "other.pt", "--data_dir", str(data_dir), "--device", "cpu"])
    assert_refused(capfd, status, "[1, 32, 32]", "--data_dir that it was trained on")


def test_what_needs_no_model_looks_for_none(here, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "find_checkpoint", None)
    monkeypatch.setattr(checkpoints, "newest_checkpoint", None)
    for what in visualize_diffusion.WITHOUT_MODEL:
        dataset = ["--dataset", "glyphs", "--data_dir", str(data_dir)] if what == "forward" else []
        assert visualize_diffusion.main(["--what", what, *dataset]) == 0
    monkeypatch.setattr(doctor, "examine_machine", lambda *_: iter(()))
    assert doctor.main([]) == 0
    monkeypatch.setattr(evaluate, "train_feature_network", lambda *_: "trained")
    monkeypatch.setattr(evaluate, "train_second_network", lambda *_: "trained")
    assert evaluate.main(["--train_features", "glyphs", "--device", "cpu"]) == 0
    monkeypatch.setattr(evaluate, "list_runs", lambda folder: print(f"runs of {folder}"))
    assert evaluate.main(["--runs", "x"]) == 0
    assert "Using the" not in capsys.readouterr().out


class ChoosesAnother:
    """A patch: this process would take another checkpoint than the other one, whose folder has changed since."""

    def __call__(self):
        checkpoints.newest_checkpoint = lambda *_: "outputs/gone/model_final.pt"


def test_two_processes_take_the_same_checkpoint(here, made):
    put(here / "outputs/model_final.pt", made.run, 1000)
    argv = ["--device", "cpu", "--num_images", "2", "--steps", "2", "--output", str(here / "x.png")]
    assert run_together(argv, here / "log", OnRank(1, ChoosesAnother()), script="sample") == [0, 0]
    assert (here / "log.0").read_text().startswith("Using outputs/model_final.pt (the newest")
    assert (here / "log.1").read_text() == ""


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.fixture
def little(monkeypatch, data_dir, tmp_path):
    """Little data and two steps of training."""
    for module in (edit, evaluate, inputs, reference, distill, doctor):
        monkeypatch.setattr(module, "load_dataset",
                            lambda name, split, _: load_dataset(name, split, data_dir).first(600))
    monkeypatch.setattr(Budget, "progress", lambda budget, step, _: step / 2)
    monkeypatch.setattr(doctor, "examine_machine", lambda *_: iter(()))
    monkeypatch.setattr(reference, "floor_cache", lambda *args: floor_cache(*args)._replace(folder=tmp_path / "floors"))
    monkeypatch.setattr(two_sample, "EPOCHS", 1)
    monkeypatch.setattr(two_sample, "CHANNELS", (8, 8, 8, 8))
    monkeypatch.setattr(metrics, "GROUPS", 5)


FEW = {"sample": ["--num_images", 2, "--steps", 2], "edit": ["--num_images", 2, "--steps", 2],
       "evaluate": ["--num_images", 260, "--steps", 2], "distill": ["--teacher_steps", 2, "--batch_size", 8],
       "visualize_diffusion": ["--num_images", 2, "--steps", 2], "doctor": []}
WRITTEN = {"sample": ["outputs/generated_samples.png"], "edit": ["outputs/vary.png"],
           "evaluate": ["outputs/pretrained/glyphs/evaluation.json", "outputs/pretrained/glyphs/nearest.png"],
           "distill": [f"outputs/student/{name}" for name in ("metrics.jsonl", "model_final.pt", "run.json",
                                                              "samples.png")],
           "visualize_diffusion": ["outputs/denoising.png"], "doctor": []}


@pytest.mark.parametrize("script", CALLS)
def test_with_a_name_every_script_does_its_work_and_writes_nothing_beside_the_weights(here, little, capsys, script):
    """The installation may be read-only: not even a file that is deleted again is made there."""
    installed = checkpoints.PRETRAINED
    installed.chmod(0o555)
    before, times = files(installed), [path.stat().st_mtime_ns for path in (installed, *sorted(installed.iterdir()))]
    module, argv = CALLS[script]
    status = module.main([*argv, "--checkpoint", "glyphs", "--device", "cpu", *map(str, FEW[script])])
    said = capsys.readouterr().out
    assert status == (1 if script == "doctor" else 0), said  # the network of this test is not trained
    assert (files(installed), [path.stat().st_mtime_ns for path in (installed, *sorted(installed.iterdir()))]) == (
        before, times)
    assert [name for name in sorted(files(here)) if not name.startswith("data/")] == WRITTEN[script]
    if script == "doctor":
        assert "error against t" in said and "train longer (python train.py --dataset glyphs --budget 10m)" in said
    if script == "evaluate":
        about = json.loads((here / WRITTEN[script][0]).read_text())
        assert about["checkpoint"] == str(installed / "glyphs.pt")


def test_a_pretrained_model_is_compared_with_a_run(here, little, made):
    put(here / "outputs/a/model_final.pt", made.run, 1000)
    assert evaluate.main(["--compare", "glyphs", "outputs/a/model_final.pt", "--num_images", "260", "--steps", "1",
                          "--device", "cpu"]) == 0
    result = json.loads((here / "outputs/compare.json").read_text())
    assert [result[side]["checkpoint"] for side in "ab"] == [str(checkpoints.PRETRAINED / "glyphs.pt"),
                                                             "outputs/a/model_final.pt"]


def test_results_of_a_pretrained_model_do_not_lie_among_those_of_a_run(here, monkeypatch):
    assert checkpoints.folder_of_results("outputs/a/model_final.pt").as_posix() == "outputs/a"
    by_path = checkpoints.find_checkpoint(str(checkpoints.PRETRAINED / "mnist.pt"))
    monkeypatch.chdir(checkpoints.PRETRAINED)
    for path in (by_path, checkpoints.find_checkpoint("mnist"), "mnist.pt"):
        assert checkpoints.folder_of_results(path).as_posix() == "outputs/pretrained/mnist"


def test_no_run_begins_from_a_pretrained_model(here, root, data_dir, capfd):
    with pytest.raises(UserError, match="--checkpoint"):
        train.parse_args(["--checkpoint", "mnist"])
    run = load_checkpoint(root / "tests/checkpoints/1.0.0.pt")
    save_checkpoint(here / "outputs/model_final.pt", **packed(run))
    before = files(here)
    status = train.main(["--resume", "--epochs", "2", "--data_dir", str(data_dir), "--device", "cpu"])
    assert_refused(capfd, status, "optimisers")
    assert files(here) == before
