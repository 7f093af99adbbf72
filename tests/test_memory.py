"""What fits in memory is measured in a copy of the process, which may be killed without harm to this one."""

import os
import signal
import sys

import pytest
import torch
from harness import needs_fork

import memory
from memory import fits_in_memory

CPU = torch.device("cpu")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="a copy is made on Linux only")


def fail(error):
    raise error


def test_work_fits_or_does_not():
    assert fits_in_memory(lambda: None, CPU)
    assert not fits_in_memory(lambda: fail(MemoryError()), CPU)
    assert not fits_in_memory(lambda: fail(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")), CPU)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        fits_in_memory(lambda: fail(RuntimeError("shape mismatch")), CPU)
    with pytest.raises(ZeroDivisionError):
        fits_in_memory(lambda: 1 / 0, CPU)


@only_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_copy_that_is_killed_did_not_fit(number):
    assert not fits_in_memory(lambda: os.kill(os.getpid(), number), CPU)


@only_linux
def test_the_work_is_done_elsewhere_and_says_nothing(capfd):
    done = []
    assert fits_in_memory(lambda: (done.append(os.getpid()), os.write(1, b"here"), os.write(2, b"there")), CPU)
    assert done == [] and capfd.readouterr() == ("", "")


@only_linux
def test_a_copy_can_learn_after_this_process_has_learnt():
    weight = torch.ones(64, 64, requires_grad=True)

    def learn():
        torch.nn.functional.conv2d(torch.ones(4, 64, 9, 9), weight.view(64, 64, 1, 1)).sum().backward()
    learn()
    assert fits_in_memory(learn, CPU)


@needs_fork
def test_where_no_copy_can_be_made_it_is_done_here(monkeypatch):
    done = []
    monkeypatch.setattr(memory.os, "fork", lambda: fail(OSError(12, "Cannot allocate memory")))
    assert fits_in_memory(lambda: done.append(1), CPU) and done == [1]
    assert not fits_in_memory(lambda: fail(MemoryError()), CPU)
