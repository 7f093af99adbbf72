"""run.json says what a run was, when it began and ended, and how; of every sitting of a run that was resumed."""

import errno
import json
import os
import signal
from datetime import datetime, timedelta

import pytest
import torch
from harness import StopAt, needs_fork, run, start, tiny

import train
from runtime.cores import available_cores, processor
from runtime.version import __version__
from training import run_record


def assert_lasted(sitting):
    began, ended = (datetime.fromisoformat(sitting[name]) for name in ("began", "ended"))
    assert timedelta(0) <= ended - began < timedelta(minutes=2)
    assert abs(datetime.now().astimezone() - ended) < timedelta(minutes=2)


@needs_fork
def test_every_sitting_of_a_run_is_kept_with_what_began_and_ended_it(data_dir, tmp_path):
    folder, log = tmp_path / "a run", tmp_path / "log"
    argv = tiny(data_dir, folder, "--seed", 7)
    assert run(argv, log, StopAt(3, signal.SIGTERM)) == 128 + signal.SIGTERM
    killed = start([*argv, "--resume", "--checkpoint_minutes", "0.000001"], log, StopAt(6, signal.SIGKILL))
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    during = run_record.sittings(folder)
    assert (during[-1]["ended"], during[-1]["how"], during[-1]["process"]) == (None, None, killed.pid)
    assert run([*argv, "--resume"], log) == 0
    first, second, third = run_record.sittings(folder)
    assert (first["how"], second["how"], third["how"]) == ("stopped by SIGTERM", run_record.DIED, "completed")
    assert [each["step"] for each in (first, second)] == [0, 3] and third["step"] >= 5
    for sitting in (first, third):
        assert_lasted(sitting)
    assert first["command"].startswith("python train.py --dataset glyphs") and f"'{folder}'" in first["command"]
    assert "--resume" in second["command"] and first["seed"] == 7
    assert first["versions"]["tiny_diffusion"] == __version__ and first["versions"]["torch"] == str(torch.__version__)
    assert first["machine"]["cores"] == available_cores() and first["machine"]["device"] == "cpu"
    assert first["machine"]["processor"] == processor() and torch.backends.cpu.get_cpu_capability() in processor()


def no_room_for_checkpoints():
    from training import run

    def save(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    run.save_checkpoint = save


@needs_fork
def test_a_run_that_fails_says_why(data_dir, tmp_path):
    folder = tmp_path / "run"
    assert run(tiny(data_dir, folder), tmp_path / "log", no_room_for_checkpoints) == 1
    [sitting] = run_record.sittings(folder)
    assert sitting["how"].startswith("failed: ") and "No space left on device" in sitting["how"]
    assert_lasted(sitting)


def test_what_is_refused_changes_no_older_runs_record(data_dir, tmp_path, capfd):
    folder = tmp_path / "run"
    assert train.main(tiny(data_dir, folder, "--epochs", 1, "--sample_interval", 0)) == 0
    before = (folder / "run.json").read_bytes()
    assert train.main(tiny(data_dir, folder, "--resume", "--base_channels", 16)) == 2
    assert train.main(tiny(data_dir, folder, "--resume", "--epochs", 1)) == 0  # it is complete
    assert (folder / "run.json").read_bytes() == before
    run_record.end_sitting(folder, "of another process")
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sittings": 3}', '{"sittings": [3]}', "\0", '{"sittings": []}'])
def test_a_damaged_record_is_none_and_is_replaced(tmp_path, monkeypatch, content):
    (tmp_path / "run.json").write_text(content)
    assert run_record.sittings(tmp_path) == [] and not run_record.is_of_this_launch(tmp_path)
    monkeypatch.setattr(run_record.distributed, "launch", lambda: "this")
    assert not run_record.is_of_this_launch(tmp_path)


def test_the_command_of_several_processes_is_that_of_torchrun(monkeypatch):
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [run_record.launcher(count) for count in (1, 4)] == ["python", "torchrun --nproc_per_node=4"]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert run_record.launcher(8) == "torchrun --nnodes=2 --nproc_per_node=4"


def test_only_the_latest_sitting_tells_whose_the_folder_is(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record.distributed, "launch", lambda: "this")
    for launches, expected in [(["this", "other"], False), (["other", "this"], True), ([None], False)]:
        (tmp_path / "run.json").write_text(json.dumps({"sittings": [dict(launch=each) for each in launches]}))
        assert run_record.is_of_this_launch(tmp_path) == expected
