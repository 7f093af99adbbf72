"""Locks between processes: a file that one of them holds. A lock ends with its process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def alone(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock `path`. While another process has it, wait, after printing the line `waiting`.

    On a disk that has no locks: a warning, and no lock.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waiting, flush=True)
        lock.acquire()
    except NotImplementedError:
        warn_of_no_locks(path.parent)
    try:
        yield
    finally:
        lock.release()


def warn_of_no_locks(folder: Path) -> None:
    print(f"Warning: the disk of {folder} has no file locks: make sure that no second process writes there", flush=True)
