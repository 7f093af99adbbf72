"""Locks between processes: a file that one of them holds. The lock of a process ends with it."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # what network disks without locks answer


@contextlib.contextmanager
def alone(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock `path`. While another process has it, wait, after printing the line `waiting`.

    On a disk that has no locks: a warning, and no lock.
    """
    lock = FileLock(path)
    try:
        acquire(lock)
    except Timeout:
        print(waiting, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Hold the lock `path` if no process has it: yields whether. False on a disk that has no locks."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError):  # Timeout, too
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def acquire(lock: FileLock) -> None:
    """Take a lock at once. Timeout if another process holds it; on a disk that has no locks a warning."""
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError) as error:  # the second is what older versions of filelock raise
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:  # Timeout, too
            raise
        print(f"Warning: the disk of {Path(lock.lock_file).parent} has no file locks: make sure that no second process "
              f"writes there", flush=True)
