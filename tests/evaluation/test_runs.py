"""The table of runs: what it reads from the files of a run, and that no file of another kind stops it."""

import csv
import json
import os
import time
from pathlib import Path

import pytest

import evaluate
from evaluation.runs import LAST_BYTES, find_runs, list_runs, split_command
from runtime.files import file_digest


def write_run(folder, command="python train.py --dataset glyphs --output_dir x", how="completed", images=256,
              began="2026-01-02T03:04:05+00:00", **sitting):
    folder.mkdir(parents=True)
    record = dict(command=command, began=began, ended=None, how=how, seed=3) | sitting
    (folder / "run.json").write_text(json.dumps(dict(sittings=[record])))
    lines = [dict(step=step, images_seen=images * step / 2, loss=0.5, seconds=1.5 * step) for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_evaluation(folder, **values):
    figures = {name: dict(value=value, low=0, high=9, floor=None, n=500) for name, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(figures=figures, dataset="mnist", num_images=500, reference=dict(split="test", n=10000),
                   command=["evaluate.py", "--images", "a b.npz", "--dataset", "mnist"])
    if (folder / "run.json").exists() or (folder / "metrics.jsonl").exists():
        content |= dict(checkpoint="model_final.pt", command=["evaluate.py", "--checkpoint", "model_final.pt"])
    (folder / "evaluation.json").write_text(json.dumps(content))


@pytest.mark.parametrize("fails", ["is a folder", "cannot write"])
def test_a_table_that_cannot_be_saved_is_shown_and_the_reason_is_a_line(tmp_path, monkeypatch, capsys, fails):
    write_run(tmp_path / "a")
    if fails == "is a folder":
        (tmp_path / "runs.csv").mkdir()
    else:
        monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert evaluate.main(["--runs", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert "completed" in out and "Saved" not in out
    assert fails in error and len(error.splitlines()) == 1


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


def rows_of(folder):
    with (folder / "runs.csv").open() as file:
        return {row["folder"]: row for row in csv.DictReader(file)}


def test_a_run_is_told_with_command_end_images_time_and_figures(tmp_path, capsys):
    write_evaluation(write_run(tmp_path / "one/a"), frechet_distance=1.25, recall=0.5, two_sample=0.75)
    write_run(tmp_path / "b", "torchrun --nproc_per_node=2 train.py --dataset glyphs --budget=1m", None,
              began="2026-01-01T00:00:00+00:00")
    assert evaluate.main(["--runs", str(tmp_path)]) == 0
    head, b, a, saved = capsys.readouterr().out.splitlines()[-4:]  # the older one first
    assert "one/a" in a and "1.2500" in a and "256" in a and "3" in a and "completed" in a
    assert b.split()[0] == "b" and "running, or killed" in b and "--budget 1m" in b and "frechet" in head
    assert "2 runs" in saved
    rows = rows_of(tmp_path)
    assert rows["one/a"] == {
        "folder": "one/a", "dataset": "mnist", "command": "python train.py --dataset glyphs --output_dir x",
        "began": "2026-01-02T03:04:05+00:00", "how": "completed", "seed": "3", "images_seen": "256.0",
        "seconds": "3.0", "num_images": "500", "reference": "test", "frechet_distance": "1.25", "recall": "0.5",
        "two_sample": "0.75"}
    assert rows["b"]["dataset"] == "glyphs" and rows["b"]["frechet_distance"] == ""


@pytest.mark.parametrize("name", ["model_final.pt", "checkpoints/model_epoch_001.pt"])
def test_figures_of_an_earlier_checkpoint_are_not_those_of_the_run(tmp_path, capsys, name):
    folder = write_run(tmp_path / "a")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"before")
    write_evaluation(folder, frechet_distance=1.25)
    content = json.loads((folder / "evaluation.json").read_text())
    content |= dict(checkpoint=f"/elsewhere/{name}", checkpoint_sha256=file_digest(folder / name))
    (folder / "evaluation.json").write_text(json.dumps(content))
    assert find_runs(tmp_path)[0][0].figures == dict(frechet_distance=1.25)
    (folder / name).write_bytes(b"after it was resumed")
    assert evaluate.main(["--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1.25" not in out and "completed" in out
    assert f"evaluation.json: it is of another or an earlier {Path(name).name}: run evaluate.py again" in out


@pytest.mark.parametrize("checkpoint", [None, "evaluation/weights/mnist.pt"])
def test_figures_of_other_images_in_the_folder_of_a_run_are_not_those_of_the_run(tmp_path, capsys, checkpoint):
    folder = write_run(tmp_path / "a")
    write_evaluation(folder, frechet_distance=1.25)
    content = json.loads((folder / "evaluation.json").read_text()) | dict(checkpoint=checkpoint, dataset="cifar10")
    (folder / "evaluation.json").write_text(json.dumps(content))
    list_runs(tmp_path)
    out, row = capsys.readouterr().out, rows_of(tmp_path)["a"]
    assert "not of this run: run evaluate.py on its checkpoint" in out and "frechet_distance" not in row
    assert row["dataset"] == "glyphs" and row["num_images"] == ""


def test_flags_that_all_runs_of_a_script_share_are_told_once(tmp_path, capsys):
    for name, flags in (("a", "--lr 1"), ("b", "--lr 2"), ("c", "--lr 2 --conditional")):
        write_run(tmp_path / name, f"python train.py --budget 10m {flags} --output_dir outputs/{name}")
    list_runs(tmp_path)
    out = capsys.readouterr().out
    assert "All runs of train.py: --budget 10m\n" in out and out.count("--budget") == 1
    ends = {line.split()[0]: line for line in out.splitlines()}
    assert ends["a"].endswith("train.py --lr 1") and ends["c"].endswith("train.py --lr 2 --conditional")


def test_images_that_were_measured_without_a_run_are_listed_too(tmp_path):
    write_evaluation(tmp_path / "images", recall=0.5)
    list_runs(tmp_path)
    row = rows_of(tmp_path)["images"]
    assert row["command"] == "evaluate.py --images 'a b.npz' --dataset mnist" and row["recall"] == "0.5"


def test_the_dataset_of_train_without_the_flag_is_its_default(tmp_path):
    write_run(tmp_path / "a", "python train.py")
    write_run(tmp_path / "b", "python distill.py --checkpoint x.pt")
    [a, b], notes = find_runs(tmp_path)
    assert (a.dataset, b.dataset, notes) == ("mnist", None, [])


def test_a_metrics_file_that_is_being_written_or_is_long_counts_by_its_last_whole_line(tmp_path):
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "images_seen": 38')
    assert find_runs(tmp_path)[0][0].images_seen == 256
    line = json.dumps(dict(images_seen=7, seconds=8)) + "\n"
    (folder / "metrics.jsonl").write_text("x" * 3 * LAST_BYTES + "\n" + line)
    assert find_runs(tmp_path)[0][0].images_seen == 7


BROKEN = [b"", b"{", b"null", b"[]", b"{}", b"3", b"\xff\xfe\x00", b'{"sittings": []}', b'{"sittings": [3]}',
          b'{"sittings": {"a": 1}}', b'{"figures": []}', b'{"figures": {"recall": 3}}', b"[" * 100_000,
          b'{"images_seen": 3}', b'{"figures": {}, "reference": null}']
HUGE = 10**400  # no float can hold it


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_or_foreign_file_is_named_and_the_rest_is_listed(tmp_path, capsys, name, content):
    write_run(tmp_path / "whole")
    write_evaluation(write_run(tmp_path / "bad"), recall=0.5)
    (tmp_path / "bad" / name).write_bytes(content)
    assert evaluate.main(["--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("Skipped")).startswith(
        f"Skipped {tmp_path / 'bad' / name}: ")
    assert set(rows_of(tmp_path)) == {"whole", "bad"}  # by its other files


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    write_evaluation(tmp_path / "a", recall="high", precision=float("nan"), coverage=0.5, density=True, levels=HUGE)
    assert find_runs(tmp_path)[0][0].figures == dict(coverage=0.5)


def test_a_folder_with_broken_files_alone_is_no_run(tmp_path, capsys):
    (tmp_path / "run.json").write_text("half of")
    assert evaluate.main(["--runs", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert "run.json" in out and "no run has written" in error and not (tmp_path / "runs.csv").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_name_that_is_no_file_and_links_in_a_circle_stop_nothing(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b/run.json")  # reading it would wait for ever
    (tmp_path / "a/loop").symlink_to(tmp_path)
    runs, notes = find_runs(tmp_path)
    assert [run.folder for run in runs] == ["a"] and len(notes) == 1 and "no file" in notes[0]


def test_control_characters_of_a_command_do_not_reach_the_terminal(tmp_path, capsys):
    write_run(tmp_path / "a", "python train.py --output_dir '\x1b[2Jx' --lr 1\n2", how="failed: \x1b]0;x")
    list_runs(tmp_path)
    assert "\x1b" not in capsys.readouterr().out and "\x1b" not in (tmp_path / "runs.csv").read_text()


def test_no_folder_and_other_flags_are_refused(tmp_path, capsys):
    for flags, word in ((["--runs", tmp_path / "none"], "no folder"), (["--runs", tmp_path, "--seed", 1], "--seed")):
        assert evaluate.main(list(map(str, flags))) == 2
        assert word in capsys.readouterr().err


def test_commands_are_split_into_script_and_flags():
    assert split_command("python train.py --a --b 1 2 --c=3") == ("train.py", {"a": "", "b": "1 2", "c": "3"})
    assert split_command("torchrun --nproc_per_node=2 /x/train.py '--d' 'e f'") == ("train.py", {"d": "e f"})
    assert split_command("python train.py --a 'b") == ("train.py", {"a": "'b"})
    assert split_command("") == ("", {})


def test_hundreds_of_runs_are_listed_at_once(tmp_path):
    for i in range(300):
        write_evaluation(write_run(tmp_path / f"{i}"), recall=0.5)
    start = time.process_time()
    list_runs(tmp_path)
    assert time.process_time() - start < 5
