"""The folder of a run: its lock, signals that stop the run, free space, and the results of an older run."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from runtime import distributed
from runtime.errors import UserError
from runtime.files import check_writable, temporaries

# What a run writes into its folder. Everything else there is the user's and stays untouched.
WRITTEN = ("samples/epoch_*.png", "checkpoints/model_*.pt", "model_final.pt", "training_loss.png", "metrics.jsonl",
           "samples.png")


@contextlib.contextmanager
def claim(folder: str | Path) -> Iterator[Path]:
    """Lock `folder` for this run. UserError, on all its processes, if another run holds it.

    The lock ends with the process. Temporary files of a killed run are deleted and, at the end, a folder that was made
    here and stayed empty.
    """
    folder, lock, problem = Path(folder), FileLock(Path(folder) / ".lock"), None
    made = [path for path in (folder, *folder.parents) if distributed.rank() == 0 and not os.path.exists(path)]
    if distributed.rank() == 0:
        try:
            _lock(lock, folder)
        except UserError as error:
            problem = str(error)
    problem = distributed.broadcast(problem)
    if problem:
        raise UserError(problem)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if made and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
        lock.release()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()  # fails if something is in it


def _lock(lock: FileLock, folder: Path) -> None:
    """Make `folder`, lock it, and delete temporary files of a killed run. UserError if another run holds it."""
    check_writable(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another run is writing to {folder}: wait for it, or choose another --output_dir") from error
    except NotImplementedError:
        print(f"Warning: the disk of {folder} has no file locks: make sure that no second run writes there")
    for pattern in WRITTEN:
        for path in temporaries(folder / pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def stop_on_signals(run) -> Iterator[None]:
    """Make SIGTERM, Ctrl-C and a closed terminal set `run.signal`; the run stops after the current step.

    A second signal ends the process at once.
    """
    def handler(signum, _):
        run.signal = signum
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    stops = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {each: signal.signal(each, handler) for each in stops
              if each != getattr(signal, "SIGHUP", None) or signal.getsignal(each) != signal.SIG_IGN}  # nohup
    try:
        yield
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)


def check_space(folder: Path, checkpoint_bytes: int) -> None:
    """UserError unless the disk of `folder` has room for two checkpoints, one of which replaces the other."""
    free = shutil.disk_usage(folder).free
    if free < 2 * checkpoint_bytes:
        raise UserError(f"the disk of {folder} has {free / 1e6:,.1f} MB left, and two checkpoints take "
                        f"{2 * checkpoint_bytes / 1e6:,.1f} MB: free some, or choose another --output_dir")


def results(folder: Path) -> list[Path]:
    """The files that a run wrote into `folder`."""
    return [path for pattern in WRITTEN for path in folder.glob(pattern)]


def set_aside(folder: Path) -> Path | None:
    """Move an older run's results to previous/<time>/ in the folder; returns that place, or None without results."""
    old = results(folder)
    if not old:
        return None
    newest = max(path.lstat().st_mtime for path in old)
    place = folder / "previous" / time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(newest))
    while place.exists():
        place = place.with_name(place.name + "+")
    for path in old:
        target = place / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return place
