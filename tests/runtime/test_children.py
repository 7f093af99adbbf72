"""A process that works for another one ends with it, even if that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import multiprocessing, os, sys, time
from types import SimpleNamespace
from runtime import children

def work(parent, system):
    if "windows" in system:  # where getppid() stays what it was
        children.os = SimpleNamespace(name="nt", _exit=os._exit, getppid=lambda: parent)
    if system == "windows, by itself":  # not a process of multiprocessing
        children.multiprocessing = SimpleNamespace(parent_process=lambda: None)
    children.end_with(parent)
    print(os.getpid(), flush=True)
    time.sleep(60)

multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(), sys.argv[1])).start()
time.sleep(60)
"""


def runs(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "Z (zombie)" not in status.read_text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("system", ["linux", "windows", "windows, by itself"])
def test_a_child_ends_with_a_parent_that_was_killed(root, system):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, system], cwd=root, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    assert runs(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    if system == "windows, by itself":
        assert runs(child)
        return os.kill(child, signal.SIGKILL)
    end = time.monotonic() + 30
    while runs(child):
        assert time.monotonic() < end, "it goes on without its parent"
        time.sleep(0.05)
