"""A run that is stopped, killed, or runs out of disk loses nothing; a run's folder has one run and keeps the rest."""

import functools
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import (
    STEPS,
    SlowSave,
    SmallDisk,
    StopAt,
    assert_refused,
    assert_same_run,
    assert_steps_once,
    files,
    kill_until_done,
    metrics,
    needs_fork,
    resume_if_begun,
    run,
    run_together,
    start,
    tiny,
    wait_until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import fields

import checkpoint
import train
from checkpoint import FORMAT, load_checkpoint
from runtime.files import atomic_write
from training import run_folder, run_record
from training.run import checkpoints, is_valid, newest_valid, prune

EVERY_STEP = ("--checkpoint_minutes", "0.000001")


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny(data_dir, folder), folder.parent / "log") == 0
    return folder


@pytest.fixture
def half(whole, tmp_path):
    """The folder of the same run as it was after its first epoch."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints/model_epoch_001.pt", tmp_path / "run/checkpoints")
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------------------ stopped


@needs_fork
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(whole, data_dir, tmp_path):
    folder = tmp_path / "run"
    met = kill_until_done(tiny(data_dir, folder, *EVERY_STEP), tmp_path / "log", folder, 3, random.Random(0), 0.15)
    assert met["kills"] == 3
    assert_same_run(whole, folder)


@needs_fork
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_has_its_exit_status(whole, data_dir, tmp_path, stop):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert run(tiny(data_dir, folder), log, StopAt(3, stop)) == 128 + stop
    assert newest_valid(folder)[1]["step"] == 3
    [told] = [line for line in log.read_text().splitlines() if "Stopped by a signal" in line]
    assert run(shlex.split(told.split("continue with python train.py ")[1]), log) == 0  # as it is told
    assert "Resuming" in log.read_text()
    assert_same_run(whole, folder)


@needs_fork
@pytest.mark.parametrize("stop, words", [
    (signal.SIGTERM, "SIGTERM: saving after this step, send it once more to leave without saving"),
    (signal.SIGINT, "Ctrl-C: saving after this step, press Ctrl-C once more to leave without saving")])
def test_the_first_signal_is_answered_at_once_and_a_second_one_leaves(data_dir, tmp_path, stop, words):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start(tiny(data_dir, folder, *EVERY_STEP), log, SlowSave(tmp_path / "saving"))
    wait_until((tmp_path / "saving").exists, process)
    os.kill(process.pid, stop)
    wait_until(lambda: words in log.read_text(), process, timeout=20)
    time.sleep(run_folder.ONE_KEYPRESS + 0.2)
    assert process.is_alive() and list(folder.rglob("*.tmp"))
    os.kill(process.pid, stop)
    process.join(20)
    assert process.exitcode == -stop
    assert "Left without saving" in log.read_text() and not list(folder.rglob("*.tmp"))
    assert run_record.sittings(folder)[-1]["how"] == f"left by {signal.Signals(stop).name} without saving"


@needs_fork
@pytest.mark.parametrize("stops", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM, signal.SIGINT)])
def test_signals_right_after_each_other_are_one_and_lose_no_step(whole, data_dir, tmp_path, stops):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert run(tiny(data_dir, folder), log, StopAt(3, *stops)) == 128 + stops[0]
    assert newest_valid(folder)[1]["step"] == 3 and log.read_text().count("once more to leave") == 1
    assert run(tiny(data_dir, folder, "--resume"), log) == 0
    assert_same_run(whole, folder)


# ------------------------------------------------------------------------------------------------------------ resumed


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"",
                                    lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]],
                         ids=["truncated", "empty", "one bit"])
def test_a_broken_newest_checkpoint_is_named_and_passed_over(whole, half, capsys, damage):
    newest = half / "checkpoints/model_step_00000006.pt"
    newest.write_bytes(damage((whole / "checkpoints/model_epoch_002.pt").read_bytes()))
    path, saved = newest_valid(half)
    assert path == half / "checkpoints/model_epoch_001.pt" and saved["step"] == STEPS
    assert f"Skipping {newest}" in capsys.readouterr().out


@needs_fork
def test_a_run_resumed_behind_a_broken_checkpoint_equals_one_that_was_not_interrupted(whole, half, data_dir, tmp_path):
    (half / "checkpoints/model_epoch_002.pt").write_bytes(b"half of it")
    shutil.copytree(whole / "samples", half / "samples")
    assert run(tiny(data_dir, half, "--resume"), tmp_path / "log") == 0
    assert "Skipping" in (tmp_path / "log").read_text()
    assert_same_run(whole, half)


def test_the_furthest_checkpoint_is_the_newest_whatever_the_dates_say(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for age, path in enumerate(sorted((tmp_path / "run/checkpoints").iterdir(), reverse=True)):
        os.utime(path, (2e9 + age, 2e9 + age))  # the first epoch's is the last to be copied
    (tmp_path / "run/model_final.pt").unlink()
    assert newest_valid(tmp_path / "run")[1]["step"] == 2 * STEPS


def test_resume_with_a_mistyped_folder_is_refused_and_names_the_runs_nearby(whole, half, data_dir, capfd, monkeypatch):
    monkeypatch.chdir(half.parent)
    shutil.move("run", "outputs/fashion")
    shutil.copytree(whole, "outputs/other/previous/2026-01-01_00-00-00")
    shutil.copytree(whole, "outputs/digits")
    (half.parent / "outputs/notes").mkdir()
    before = files(half.parent)
    for folder, words in [("outputs/fashoin", "give --output_dir outputs/fashion or outputs/digits, or leave out"),
                          ("output/digits", "give --output_dir outputs/digits or outputs/fashion, or leave out"),
                          ("outputs", "outputs/fashion"), ("outputs/notes", "outputs/digits"),
                          (str(half.parent / "outputs/fashoin"), f"{half.parent}/outputs/fashion or ")]:
        assert_refused(capfd, train.main(tiny(data_dir, folder, "--resume")), f"no run has written to {folder}", words)
        assert "previous" not in str(run_folder.runs_near(Path(folder)))
    assert files(half.parent) == before and not (half.parent / "output").exists()


def test_resume_where_no_runs_are_says_what_to_leave_out(data_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("new", ".", tmp_path / "a/b"):
        assert_refused(capfd, train.main(tiny(data_dir, folder, "--resume")), f"to {folder}: leave out --resume")
    assert not files(tmp_path)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_with_its_flags(data_dir, tmp_path):
    command = shlex.join(["python", "train.py", *tiny(data_dir, tmp_path / "gone", "--epochs", 1, "--seed", 5)])
    (tmp_path / "run.json").write_text(json.dumps(dict(sittings=[dict(command=command)])))
    argv = ["--resume", "--output_dir", str(tmp_path), "--data_dir", str(data_dir), "--device", "cpu"]
    assert train.main([*argv, "--seed", "6"]) == 0
    training = load_checkpoint(tmp_path / "model_final.pt")["config"]["training"]
    assert (training["dataset"], training["epochs"], training["batch_size"], training["seed"]) == ("glyphs", 1, 64, 6)
    assert not (tmp_path / "gone").exists()


def test_results_of_one_second_lie_side_by_side(tmp_path):
    for content in (b"one", b"two", b"three"):
        (tmp_path / "model_final.pt").write_bytes(content)
        os.utime(tmp_path / "model_final.pt", (10**9, 10**9))
        run_folder.set_aside(tmp_path)
    assert {path.read_bytes() for path in tmp_path.glob("previous/*/model_final.pt")} == {b"one", b"two", b"three"}


def record(folder, *sittings):
    """Write a run.json of sittings of train.py with these words."""
    commands = [dict(command=shlex.join(["python", "train.py", *words])) for words in sittings]
    (folder / "run.json").write_text(json.dumps(dict(sittings=commands)))


def killed_at_the_first_step():
    train.train = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
def test_a_run_that_was_killed_twice_before_its_first_checkpoint_keeps_its_flags(data_dir, tmp_path):
    command = shlex.join(["python", "train.py", *tiny(data_dir, tmp_path / "gone", "--epochs", 1, "--seed", 5)])
    (tmp_path / "run.json").write_text(json.dumps(dict(sittings=[dict(command=command)])))
    argv = ["--resume", "--output_dir", str(tmp_path), "--data_dir", str(data_dir), "--device", "cpu"]
    assert run(argv, tmp_path / "log", killed_at_the_first_step) == -signal.SIGKILL
    assert train.main(argv) == 0
    training = load_checkpoint(tmp_path / "model_final.pt")["config"]["training"]
    assert (training["dataset"], training["epochs"], training["seed"]) == ("glyphs", 1, 5)
    assert len(run_record.sittings(tmp_path)) == 3


def test_a_run_whose_pictures_are_gone_does_not_begin_again_with_others(data_dir, tmp_path, capfd):
    gone = tmp_path / "gone"
    (tmp_path / "run").mkdir()
    for words in (["--dataset", str(gone), "--epochs", "50"], [f"--dataset={gone}"]):
        record(tmp_path / "run", words)
        before = files(tmp_path)
        argv = ["--resume", "--output_dir", str(tmp_path / "run"), "--data_dir", str(data_dir)]
        assert_refused(capfd, train.main(argv), str(gone), "is not there", "--dataset PATH")
        assert files(tmp_path) == before
    record(tmp_path / "run", ["--dataset", str(gone), "--epochs", "50", "--seed", "3"])
    args = train.parse_args([*argv, "--dataset", "glyphs"])[0]
    assert (args.dataset, args.epochs, args.seed) == ("glyphs", 50, 3)


def test_of_several_sittings_without_a_checkpoint_what_was_said_last_counts(data_dir, tmp_path):
    record(tmp_path, ["--dataset", str(tmp_path / "gone"), "--budget", "10m", "--seed", "3"],
           ["--resume", "--dataset", "glyphs", "--epochs", "50"], ["--resume"])
    args = train.parse_args(["--resume", "--output_dir", str(tmp_path), "--data_dir", str(data_dir)])[0]
    assert (args.dataset, args.epochs, args.budget, args.seed) == ("glyphs", 50, None, 3)


def test_what_a_run_began_with_is_found_where_the_run_has_moved_it(half, data_dir, tmp_path):
    folder = tmp_path / "moving"
    folder.mkdir()
    newest = shutil.copy(newest_valid(half)[0], folder / "model_final.pt")
    command = shlex.join(["python", "train.py", *tiny(data_dir, folder, "--epochs", 1, "--init", newest)])
    assert run_folder.set_aside(folder)
    (folder / "run.json").write_text(json.dumps(dict(sittings=[dict(command=command)])))
    args = train.parse_args(["--resume", "--output_dir", str(folder), "--data_dir", str(data_dir)])[0]
    [moved] = folder.glob("previous/*/model_final.pt")
    assert args.init == str(moved) and run_folder.place_of(folder, "elsewhere.pt") == "elsewhere.pt"


@pytest.mark.parametrize("command", ["python train.py --epochs '1", "python train.py --epochs none",
                                     "python distill.py --epochs 2", "", None, 7])
def test_a_run_whose_command_cannot_be_read_begins_again_with_the_flags_that_are_given(data_dir, tmp_path, command):
    (tmp_path / "run.json").write_text(json.dumps(dict(sittings=[dict(command=command)])))
    assert train.main([*tiny(data_dir, tmp_path, "--epochs", 1), "--resume"]) == 0
    assert load_checkpoint(tmp_path / "model_final.pt")["config"]["training"]["epochs"] == 1


@needs_fork
def test_where_all_is_broken_a_run_starts_afresh_says_so_and_keeps_the_broken(whole, data_dir, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/model_epoch_009.pt").write_bytes(b"broken")
    assert run(tiny(data_dir, folder, "--resume"), log) == 0
    assert all(words in log.read_text() for words in ("Skipping", "Nothing to resume", "starting a new run"))
    assert [path.read_bytes() for path in folder.glob("previous/*/checkpoints/model_epoch_009.pt")] == [b"broken"]
    assert_same_run(whole, folder)


@pytest.mark.parametrize("flags, words", [
    (["--base_channels", 16], ["base_channels", "8", "16"]),
    (["--patch_size", 2], ["patch_size", "4", "2"]),
    (["--prediction", "v"], ["prediction", "edm", "v"]),
    (["--schedule", "linear"], ["schedule", "cosine", "linear"]),
    (["--no-conditional"], ["num_classes", "10", "None"]),
    (["--train_images", 128], ["train_images", "256", "128"]),
    (["--batch_size", 32], ["batch_size", "64", "32"]),
    (["--optimizer", "adamw"], ["optimizer", "muon", "adamw"]),
    (["--level_code", "linear"], ["level_code", "histogram", "linear"]),
], ids=str)
def test_resuming_something_else_is_refused_with_both_values(half, data_dir, capfd, flags, words):
    before = files(half)
    assert_refused(capfd, train.main(tiny(data_dir, half, "--resume", *flags)), *words)
    assert files(half) == before


def test_resuming_with_another_data_set_is_refused_with_both_names(half, real_mnist, capfd):
    before = files(half)
    argv = tiny(real_mnist, half, "--resume", "--dataset", "mnist")
    assert_refused(capfd, train.main(argv), "dataset", "glyphs", "mnist")
    assert files(half) == before


def test_a_resumed_run_has_the_flags_of_its_checkpoint_but_for_those_given_anew(half):
    def flags(*more):
        return train.parse_args(["--resume", "--output_dir", str(half), *more])[0]
    args = flags()
    assert (args.base_channels, args.batch_size, args.epochs, args.sample_interval) == (8, 64, 2, 2)
    assert (args.precision, args.train_images, args.dataset) == ("fp32", 256, "glyphs")
    assert flags("--lr", "0.5").lr == 0.5 != args.lr
    assert (flags("--epochs", "7").epochs, flags("--epochs", "7").budget) == (7, None)
    assert (flags("--budget", "7m").epochs, flags("--budget", "7m").budget) == (None, 420)


@needs_fork
def test_a_resumed_run_with_another_learning_rate_learns_with_it(half, data_dir, tmp_path):
    assert run(tiny(data_dir, half, "--resume", "--lr", "0.5", "--lr_schedule", "constant"), tmp_path / "log") == 0
    assert metrics(half)[-1]["lr"] == 0.5 and len(metrics(half)) == 2


@pytest.mark.parametrize("flags", [{"lr": "high"}, {"lr": -1}, {"batch_size": [1, 2]}, {"epochs": 0}, {"budget": "x"},
                                   {"seed": 1.5}, {"dataset": {"a": 1}}, {"timesteps": 10**12}, {"recipe": "poison"},
                                   {"channel_mults": "x"}, {"attention": [4, "--output_dir"]}, {"conditional": "yes"},
                                   {"precision": [[[]]]}],
                         ids=lambda flags: next(iter(flags)))
def test_a_checkpoint_with_flags_that_no_run_can_have_had_is_refused(half, data_dir, capfd, flags):
    path = half / "checkpoints/model_epoch_001.pt"
    saved = load_checkpoint(path)
    saved.pop("format")
    saved["config"]["training"] |= flags
    torch.save({"format": FORMAT, **saved}, path)
    before = files(half)
    assert_refused(capfd, train.main(["--resume", "--output_dir", str(half), "--data_dir", str(data_dir)]),
                   "model_epoch_001.pt")
    assert files(half) == before


@pytest.mark.parametrize("part, damage", [
    ("muon", lambda state: state.clear()), ("adamw", lambda state: state.clear()),
    ("adamw", lambda state: state[0].update(exp_avg=torch.zeros(1))),
    ("adamw", lambda state: state[0].update(exp_avg=torch.full_like(state[0]["exp_avg"], torch.nan))),
    ("adamw", lambda state: state[0].update(step=3)), ("adamw", lambda state: state[0].pop("step")),
    ("muon", lambda state: state[0].update(momentum="none")),
    ("muon", lambda state: state.update({99: state[0]})), ("adamw", lambda state: state[0].update(more=1)),
])
def test_a_checkpoint_whose_optimiser_does_not_fit_is_refused(half, data_dir, capfd, part, damage):
    path = half / "checkpoints/model_epoch_001.pt"
    saved = load_checkpoint(path)
    damage(saved["optimizer"][part]["state"])
    torch.save(saved, path)
    before = files(half)
    assert_refused(capfd, train.main(tiny(data_dir, half, "--resume")), "optimiser")
    assert files(half) == before


@pytest.mark.parametrize("more", [[], ["--epochs", "1"], ["--budget", "10m"], ["--budget", "602s"]], ids=str)
def test_a_complete_run_that_is_asked_for_no_more_says_so(whole, data_dir, tmp_path, capfd, more):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    saved = load_checkpoint(folder / "model_final.pt")
    torch.save(saved | dict(seconds=600.0), folder / "model_final.pt")
    (folder / "training_loss.png").touch()
    before = files(folder)
    argv = ["--resume", "--output_dir", str(folder), "--data_dir", str(data_dir), *more]
    assert train.main(argv) == 0
    said = capfd.readouterr().out.splitlines()[-1]
    assert all(words in said for words in (
        "is complete, with 2 epochs in 600 seconds", "--budget",
        f"python train.py --resume --output_dir {folder} --data_dir {data_dir} --epochs 20"))
    assert files(folder) == before


def test_a_budget_too_short_for_a_step_is_refused_and_the_older_run_stays(whole, data_dir, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = files(folder)
    assert_refused(capfd, train.main(tiny(data_dir, folder, "--budget", "1e-3")), "before the first step", "--budget 1")
    assert files(folder) == before


@needs_fork
def test_a_run_that_was_killed_before_its_plot_is_finished(whole, data_dir, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/training_loss.png").unlink()
    assert run(tiny(data_dir, tmp_path / "run", "--resume"), tmp_path / "log") == 0
    assert (tmp_path / "run/training_loss.png").exists()
    assert_same_run(whole, tmp_path / "run")


# ------------------------------------------------------------------------------------------------- one run in a folder


@needs_fork
def test_a_new_run_keeps_the_old_ones_results_and_touches_nothing_else(whole, data_dir, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole, folder)
    mine = {"notes.txt": b"mine", "samples/mine.png": b"mine", "checkpoints/best.pt": b"mine",
            ".model_final.pt.mine.tmp": b"mine", "generated_samples.png": b"mine"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    (folder / "checkpoints/.model_step_00000001.pt.abcdefgh.tmp").write_bytes(b"what a killed run left")
    before = files(whole)
    for count in (1, 2):
        assert run(tiny(data_dir, folder, "--seed", count), log) == 0
        assert "Moved the results of an older run to" in log.read_text()
        places = sorted((folder / "previous").iterdir())
        assert len(places) == count and files(places[0]) == before
    assert {name: content for name, content in files(folder).items() if content == b"mine"} == mine
    assert not list(folder.rglob("*.abcdefgh.tmp"))


def test_what_judges_a_run_is_moved_with_it_and_stays_without_one(tmp_path):
    (tmp_path / "evaluation.json").write_text("of a checkpoint elsewhere")
    assert run_folder.set_aside(tmp_path) is None and (tmp_path / "evaluation.json").exists()
    (tmp_path / "model_final.pt").touch()
    place = run_folder.set_aside(tmp_path)
    assert sorted(path.name for path in place.iterdir()) == ["evaluation.json", "model_final.pt"]
    assert not (tmp_path / "evaluation.json").exists()


@needs_fork
def test_a_second_live_process_is_refused_and_the_lock_dies_with_the_first(data_dir, tmp_path, capfd):
    folder, log = tmp_path / "run", tmp_path / "log"
    first = start(tiny(data_dir, folder, "--epochs", 10_000, "--sample_interval", 0, "--save_interval", 0), log)
    wait_until((folder / "metrics.jsonl").exists, first)
    for resume in ([], ["--resume"]):
        assert_refused(capfd, train.main(tiny(data_dir, folder, *resume)), "another run", str(folder), "--output_dir")
    assert not (folder / "previous").exists() and first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with run_folder.claim(folder):
        pass


def test_a_second_run_is_refused_before_it_does_anything(data_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train, "load_dataset", lambda *_, **__: pytest.fail("it reads the data"))
    with run_folder.claim(tmp_path / "run"):
        assert_refused(capfd, train.main(tiny(data_dir, tmp_path / "run")), "another run", "--output_dir")


@needs_fork
def test_a_second_run_of_several_processes_is_refused_by_all_of_them(data_dir, tmp_path):
    with run_folder.claim(tmp_path / "run"):
        assert run_together(tiny(data_dir, tmp_path / "run"), tmp_path / "log") == [2, 2]
    said = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert len(said[0].splitlines()) == 1 and "another run" in said[0] and said[1] == ""


def test_a_folder_that_nothing_was_written_to_goes_again(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new/run", "written"):
        with run_folder.claim(tmp_path / name) as folder:
            assert folder.is_dir()
            if name == "written":
                (folder / "samples").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "written"]


def fake(path: Path, step: int, valid: bool = True) -> Path:
    """A small checkpoint, or what a bad disk made of it."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(fake_content(step, valid))
    return path


@functools.cache
def fake_content(step: int, valid: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"format": FORMAT, **fields(step=step)}, file)
    with zipfile.ZipFile(file) as archive:
        weights = max((part for part in archive.infolist() if "/data/" in part.filename), key=lambda p: p.file_size)
    content = bytearray(file.getvalue())
    content[weights.header_offset + weights.file_size // 2 + 200] ^= not valid
    return bytes(content)


@settings(max_examples=10, deadline=None)
@given(valid=st.lists(st.booleans(), min_size=1, max_size=6), keep=st.integers(1, 4), data=st.data())
def test_pruning_keeps_so_many_and_never_deletes_the_last_valid_one(tmp_path_factory, valid, keep, data):
    folder = tmp_path_factory.mktemp("prune")
    made = [fake(folder / f"checkpoints/model_step_{step:08d}.pt", step, good) for step, good in enumerate(valid, 1)]
    for path in made:
        date = data.draw(st.integers(10**9, 2 * 10**9))
        os.utime(path, (date, date))
    prune(folder, keep)
    left = [path for path in made if path.exists()]
    assert set(made[-keep:]) <= set(left) and len(left) <= keep + 1
    assert any(map(is_valid, left)) == any(valid)
    assert len(left) <= keep or not any(map(is_valid, made[-keep:]))


def test_files_within_epochs_go_before_those_of_epochs(tmp_path):
    kinds = ["epoch_005", "step_2", "step_3", "epoch_010", "step_5", "step_6"]
    for step, kind in enumerate(kinds, 1):
        fake(tmp_path / f"checkpoints/model_{kind}.pt", step)
        prune(tmp_path, 3)
        assert newest_valid(tmp_path)[1]["step"] == step
    names = {path.stem for path in checkpoints(tmp_path)}
    assert names == {"model_epoch_005", "model_epoch_010", "model_step_6"}
    fake(tmp_path / "checkpoints/model_step_7.pt", 7, valid=False)
    prune(tmp_path, 3)
    assert newest_valid(tmp_path)[1]["step"] == 6
    prune(tmp_path, 1)
    names = {path.stem for path in checkpoints(tmp_path)}
    assert names == {"model_step_7", "model_step_6"}


def test_the_step_of_a_checkpoint_is_read_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    read, peek = [], checkpoint.peek
    monkeypatch.setattr(checkpoint, "peek", lambda path: read.append(path.name) or peek(path))
    paths = [fake(tmp_path / f"checkpoints/model_step_{step}.pt", step) for step in (1, 2, 3)]
    for _ in range(3):
        assert checkpoints(tmp_path) == paths[::-1]
    assert sorted(read) == ["model_step_1.pt", "model_step_2.pt", "model_step_3.pt"]
    os.utime(fake(paths[0], 9), (1, 1))
    assert checkpoints(tmp_path) == [paths[0], paths[2], paths[1]] and read[3:] == ["model_step_1.pt"]
    paths[1].write_bytes(b"broken")
    assert checkpoints(tmp_path) == [paths[1], paths[0], paths[2]]


# ---------------------------------------------------------------------------------------------------------- full disks


@needs_fork
@pytest.mark.parametrize("good", [2, 4, 7, 11])
def test_on_a_full_disk_the_last_good_checkpoint_stays_and_the_run_ends_with_one_line(data_dir, tmp_path, good):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert run(tiny(data_dir, folder, *EVERY_STEP), log, SmallDisk(good)) == 1
    last = log.read_text().splitlines()[-1]
    assert "No space left on device" in last and not [name for name in files(folder) if name.endswith(".tmp")]
    for path in folder.glob("checkpoints/*.pt"):
        load_checkpoint(path)
    if (folder / "metrics.jsonl").exists():
        assert_steps_once(folder)
    before = newest_valid(folder)
    assert run(tiny(data_dir, folder, *resume_if_begun(folder)), log) == 0
    assert not before or "Resuming" in log.read_text()


@needs_fork
def test_a_run_goes_on_when_there_is_room_again(whole, data_dir, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert run(tiny(data_dir, folder, *EVERY_STEP), log, SmallDisk(good=3, bad=4)) == 0
    assert "could not be written" in log.read_text()
    assert load_checkpoint(folder / "model_final.pt")["step"] == 2 * STEPS
    assert len(metrics(folder)) == len(metrics(whole))


def test_a_disk_that_is_too_small_is_told_before_training(data_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert_refused(capfd, train.main(tiny(data_dir, tmp_path / "run")), "left", "checkpoints take", "--output_dir")
    assert not (tmp_path / "run").exists()


@needs_fork
def test_a_limit_on_the_size_of_files_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError), atomic_write(path) as file:
            file.write(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == {"file": b"old"}
