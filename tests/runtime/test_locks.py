"""Locks: one at a time, with a line for the one that waits; a disk without locks only gets a warning."""

import contextlib
import errno
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest

from runtime import locks
from runtime.locks import alone, if_free
from training.run_folder import claim


def test_the_second_waits_and_says_so(tmp_path, monkeypatch):
    order, inside, said = [], threading.Event(), threading.Event()
    monkeypatch.setattr(locks, "print", lambda line, **_: (order.append(line), said.set()), raising=False)

    def first():
        with alone(tmp_path / ".lock", "not printed"):
            inside.set()
            assert said.wait(10)
            order.append("first")
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    with alone(tmp_path / ".lock", "waiting for it"):
        order.append("second")
    thread.join()
    assert order == ["waiting for it", "first", "second"]


def test_a_lock_is_taken_if_it_is_free(tmp_path):
    for held in (False, True):
        holding = alone(tmp_path / ".lock", "waiting") if held else contextlib.nullcontext()
        with holding, ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: if_free(tmp_path / ".lock").__enter__()).result() != held


def test_it_is_given_back_after_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="inside"), alone(tmp_path / ".lock", "waiting"):
        raise ValueError("inside")
    with alone(tmp_path / ".lock", "waiting"):
        assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="other systems lock by flock")
def test_a_disk_without_locks_gets_a_warning_and_other_errors_are_raised(tmp_path, capsys, monkeypatch):
    def flock(*_):
        raise OSError(number, "what the disk answers")
    monkeypatch.setattr("fcntl.flock", flock)
    number = errno.ENOLCK
    with alone(tmp_path / ".lock", "waiting"):
        said = capsys.readouterr().out
    assert said.startswith(f"Warning: the disk of {tmp_path}") and "no file locks" in said and said.count("\n") == 1
    with claim(tmp_path / "run"):
        assert "no file locks" in capsys.readouterr().out
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=NotImplementedError))  # of older versions
    with alone(tmp_path / "a", "waiting"):
        assert "no file locks" in capsys.readouterr().out
    with if_free(tmp_path / "a") as free:
        assert not free
    monkeypatch.undo()
    monkeypatch.setattr("fcntl.flock", flock)
    number = errno.EIO
    with pytest.raises(OSError, match="the disk answers"), alone(tmp_path / ".lock", "waiting"):
        pass
