"""Running out of memory: recognise it, measure what fits, return freed memory to the system."""

import contextlib
import ctypes
import faulthandler
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from runtime.errors import RunFailed

SUCCEEDED, OUT_OF_MEMORY, FAILED = 0, 1, 2  # exit statuses of a fork
M_ARENA_MAX = -8  # of malloc.h


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that the memory of the device or of the host is too small."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc", "failed to allocate",
             "status_alloc_failed",  # cuBLAS, cuDNN
             "could not create a primitive", "could not create a memory", "could not execute a primitive")  # oneDNN
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def fits_in_memory(rehearse: Callable[[int], object], count: int, device: torch.device) -> bool:
    """Whether the free memory suffices for rehearse(count), a trial that must change nothing.

    Tries a quarter more than `count`, because no two trials need exactly the same memory. On a CPU it is tried twice,
    because the second step finds the heap as the first has left it: after large blocks have been freed, glibc takes the
    next ones from its heap, where they fit less well than blocks of their own.
    """
    work = partial(rehearse, count + (count + 2) // 4)
    gc.collect()
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "cpu" and sys.platform == "linux":
        ended = _exit_status_of_fork(lambda: (work(), work()))
        if ended != FAILED:
            return ended == SUCCEEDED
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def _exit_status_of_fork(work: Callable[[], object]) -> int:
    """Fork this process, let the fork do `work`, and return its exit status, or -N if signal N ended it.

    Out of memory on the host, the system or a container kills the process, and oneDNN may crash: that must happen to
    the fork only. The fork has one thread, because OpenMP threads do not survive a fork.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of other threads
        try:
            child = os.fork()
        except OSError:
            return FAILED
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = FAILED
    try:
        import resource
        faulthandler.disable()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # kill the fork first
        torch.set_num_threads(1)
        work()
        status = SUCCEEDED
    except (RuntimeError, MemoryError) as error:
        status = OUT_OF_MEMORY if out_of_memory(error) else FAILED
    finally:
        os._exit(status)


def keep_one_heap() -> None:
    """Let glibc take memory for all threads from one heap.

    Else a thread whose allocation fails changes to another heap for good. There large blocks lie without holes, so that
    what fits in memory after a failure would not fit in a new process.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # without glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Return freed heap memory to the system; glibc would keep it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # without glibc
        ctypes.CDLL(None).malloc_trim(0)


def run_or_suggest_batch_size(make: Callable, batches: Callable[[int], Iterator], batch_size: int,
                              device: torch.device):
    """Return make(batches(batch_size)). If memory runs out, measure which batch size fits and name it in a RunFailed.

    batches(n): an iterator as of samplers.generate, with n images at a time.
    """
    try:
        return make(batches(batch_size))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise

    def rehearse(count: int) -> None:
        _, trajectory = next(batches(count))
        list(islice(trajectory, 2))

    fits = batch_size  # measured outside the except block: there the error keeps tensors alive
    while fits and not fits_in_memory(rehearse, fits, device):
        fits //= 2
    advice = {0: ", and even for one: close other programs, or choose another --device",
              batch_size: ", which fit by themselves (measured): ask for fewer images in all"}
    raise RunFailed(f"out of memory for {batch_size} images at a time"
                    + advice.get(fits, f": {fits} fit (measured): give --batch_size {fits}"))
