"""What fits in memory is measured in a copy of the process, which may be killed without harm to this one."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import needs_fork

from runtime import memory
from runtime.memory import fits_in_memory

CPU = torch.device("cpu")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="a copy is made on Linux only")


def fail(error):
    raise error


def test_cuda_libraries_without_memory_are_recognised():
    for library in ("CUBLAS", "CUDNN"):
        assert memory.out_of_memory(RuntimeError(f"CUDA error: {library}_STATUS_ALLOC_FAILED when calling `create`"))
    assert not memory.out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE"))


def test_work_fits_or_does_not():
    assert fits_in_memory(lambda _: None, 8, CPU)
    assert not fits_in_memory(lambda _: fail(MemoryError()), 8, CPU)
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")
    assert not fits_in_memory(lambda _: fail(error), 8, CPU)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        fits_in_memory(lambda _: fail(RuntimeError("shape mismatch")), 8, CPU)
    with pytest.raises(ZeroDivisionError):
        fits_in_memory(lambda _: 1 / 0, 8, CPU)


@only_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_copy_that_is_killed_did_not_fit(number):
    assert not fits_in_memory(lambda _: os.kill(os.getpid(), number), 8, CPU)


@only_linux
def test_all_threads_of_a_script_take_memory_from_one_heap(tmp_path):
    """Else a thread whose allocation fails changes to a heap of its own, in which another batch fits than in a run."""
    code = """
import ctypes, sys, threading
from runtime.script import script
if len(sys.argv) > 2:
    script(lambda argv: None)([])
libc, together = ctypes.CDLL(None), threading.Barrier(4)
libc.fopen.restype = libc.malloc.restype = ctypes.c_void_p
def take():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, ctypes.c_void_p(file))
libc.fclose(ctypes.c_void_p(file))
"""
    if not hasattr(ctypes.CDLL(None), "malloc_info"):
        pytest.skip("this is not the C library of GNU")
    heaps = []
    for more in ([], ["in a script"]):
        subprocess.run([sys.executable, "-c", code, tmp_path / "heaps", *more], check=True, env=os.environ | {
            "OMP_NUM_THREADS": "1"}, cwd=Path(memory.__file__).parents[1])
        heaps.append((tmp_path / "heaps").read_text().count("<heap nr="))
    assert heaps[0] > 1 and heaps[1] == 1


@only_linux
def test_the_work_is_done_elsewhere_and_says_nothing(capfd):
    done = []
    assert fits_in_memory(lambda _: (done.append(os.getpid()), os.write(1, b"here"), os.write(2, b"there")), 8, CPU)
    assert done == [] and capfd.readouterr() == ("", "")


@only_linux
def test_a_copy_can_learn_after_this_process_has_learnt():
    weight = torch.ones(64, 64, requires_grad=True)

    def learn(_=None):
        torch.nn.functional.conv2d(torch.ones(4, 64, 9, 9), weight.view(64, 64, 1, 1)).sum().backward()
    learn()
    assert fits_in_memory(learn, 8, CPU)


@needs_fork
def test_where_no_copy_can_be_made_it_is_done_here(monkeypatch):
    done = []
    monkeypatch.setattr(memory.os, "fork", lambda: fail(OSError(12, "Cannot allocate memory")))
    assert fits_in_memory(lambda _: done.append(1), 8, CPU) and done == [1]
    assert not fits_in_memory(lambda _: fail(MemoryError()), 8, CPU)


@only_linux
def test_what_only_fits_once_does_not_fit(tmp_path):
    """A second step needs more than the first where the heap is left with holes."""
    assert not fits_in_memory(lambda count: (tmp_path / str(count)).mkdir() if not any(tmp_path.iterdir())
                              else fail(MemoryError()), 8, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]  # a quarter more
