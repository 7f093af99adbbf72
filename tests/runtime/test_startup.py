"""The time since the system started a process counts sleeping and waiting, not only the processor's work."""

import os
import subprocess
import sys
import time

import pytest

from runtime import startup

SLEPT = """
import time
first_line = time.perf_counter()
time.sleep(1)
"""
AGE = SLEPT + """
from runtime import startup
{patch}
print(startup.seconds_since_start() - (time.perf_counter() - first_line))
"""
NO_PROC = "startup.Path = lambda _: __import__('pathlib').Path('/no/such/file')"
# main(argv=None) hands the time when the process began to make_run, which ends the script here.
SCRIPT = SLEPT + """
import sys
import {script}
def make_run(*args):
    print(args[-1] - first_line)
    raise SystemExit(0)
{script}.make_run = make_run
sys.argv = ["{script}.py", *{argv!r}]
sys.exit({script}.main())
"""


def said(root, code):
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=100,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    return float(ended.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_process_that_slept_is_as_old_as_it_is(root):
    """To a tenth of a second and what the interpreter takes before its first line."""
    assert -0.1 < said(root, AGE.format(patch="")) < 1.5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ps")
def test_without_proc_ps_says_it_to_a_second(root):
    assert -1.1 < said(root, AGE.format(patch=NO_PROC).replace("sleep(1)", "sleep(2)")) < 1.5


@pytest.mark.parametrize("text, age", [("00:07\n", 7), ("01:02", None), ("   00:59", 59), ("1-00:00:01", None),
                                       ("02:00:00", None), ("", None), ("elapsed", None)])
def test_what_ps_says_is_read_and_an_age_that_is_no_startup_is_not_believed(monkeypatch, text, age):
    """A shell that slept for an hour and ends in `exec python` is as old as that."""
    monkeypatch.setattr(startup, "_age_in_proc", lambda: int("not a number"))
    monkeypatch.setattr(startup.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=text))
    monkeypatch.setattr(startup.time, "process_time", lambda: 0.25)
    assert startup.seconds_since_start() == (0.25 if age is None else age)


@pytest.mark.parametrize("age", [-1.0, 3600.0, float("nan")])
def test_an_age_that_cannot_be_is_replaced_by_the_processor_time(monkeypatch, age):
    monkeypatch.setattr(startup, "_age_in_proc", lambda: age)
    monkeypatch.setattr(startup.time, "process_time", lambda: 0.25)
    assert startup.seconds_since_start() == 0.25


def test_where_the_system_says_nothing_it_is_the_processor_time(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError("ps")
    monkeypatch.setattr(startup, "_age_in_proc", fail)
    monkeypatch.setattr(startup.subprocess, "run", fail)
    before = time.process_time()
    assert before <= startup.seconds_since_start() <= time.process_time()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("script, more", [("train", ["--device", "cpu"]), ("distill", ["--checkpoint", __file__])])
def test_the_budget_of_a_script_begins_when_its_process_does(root, tmp_path, script, more):
    """With processor time it began seconds before the process, or after what the process slept and waited."""
    argv = ["--output_dir", str(tmp_path / "run"), *more]
    assert -1.5 < said(root, SCRIPT.format(script=script, argv=argv)) < 0.1
