"""The folder of a run: its lock, signals that stop the run, free space, and the results of an older run."""

import contextlib
import difflib
import glob
import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from runtime import distributed
from runtime.errors import UserError
from runtime.files import check_writable, quoted, temporaries
from runtime.locks import acquire
from training import run_record

# What a run writes into its folder. Everything else there is the user's and stays untouched.
WRITTEN = ("samples/epoch_*.png", "checkpoints/model_*.pt", "model_final.pt", "training_loss.png", "metrics.jsonl",
           "samples.png", "tensorboard/events.out.tfevents.*", run_record.NAME)
# What evaluate.py writes beside a checkpoint: it goes where the run goes that it judges.
JUDGED = ("evaluation.json", "nearest.png", "sweep.json", "sweep.png", "sweep_images.png", "compare.json")
ONE_KEYPRESS = 1.0  # seconds after the first signal in which another one says nothing new


@contextlib.contextmanager
def claim(folder: str | Path) -> Iterator[Path]:
    """Lock `folder` for this run. UserError, on all its processes, if another run holds it.

    The lock ends with the process. Temporary files of a killed run are deleted and, at the end, a folder that was made
    here and stayed empty.
    """
    folder, lock = Path(folder), FileLock(Path(folder) / ".lock")
    made = [path for path in (folder, *folder.parents) if distributed.rank() == 0 and not os.path.exists(path)]
    distributed.from_rank_0(partial(_lock, lock, folder))
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
    """Make `folder`, lock it, and delete temporary files of a killed run.

    UserError if another run holds it, or if one of its sub-folders cannot be made.
    """
    check_writable(folder)
    for name in sorted({"previous", *(pattern.split("/")[0] for pattern in WRITTEN if "/" in pattern)}):
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise UserError(f"{folder / name} is a file, and a run keeps a folder of that name: move it away, or "
                            f"choose another --output_dir")
    try:
        acquire(lock)
    except Timeout as error:
        raise UserError(f"another run is writing to {folder}: wait for it, or choose another --output_dir") from error
    delete_temporaries(folder)


def delete_temporaries(folder: Path) -> None:
    """Delete the files in `folder` that a killed run had not finished."""
    for pattern in WRITTEN:
        for path in temporaries(folder / pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def stop_on_signals(run) -> Iterator[None]:
    """Make SIGTERM, Ctrl-C and a closed terminal set `run.signal`, and say so; the run stops after the current step.

    A second signal ends the process at once, but not within a second of the first: torchrun sends another one after
    the terminal's, and a key may be pressed twice.
    """
    first = None

    def handler(signum, _):
        nonlocal first
        if first is None:
            run.signal, first = signum, time.monotonic()
            name, again = signal.Signals(signum).name, "send it"
            if signum == signal.SIGINT:
                name, again = "Ctrl-C", "press Ctrl-C"
            _say_at_once(f"{name}: saving after this step, {again} once more to leave without saving")
        elif time.monotonic() - first > ONE_KEYPRESS:
            _leave(run.folder, signum)

    stops = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {each: signal.signal(each, handler) for each in stops
              if each != getattr(signal, "SIGHUP", None) or signal.getsignal(each) != signal.SIG_IGN}  # nohup
    try:
        yield
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)


def _say_at_once(line: str) -> None:
    """Write a line to stderr on rank 0. print could fail here: the signal may have interrupted another print."""
    if distributed.rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{line}\n".encode())


def _leave(folder: Path, signum: int) -> None:
    """End this process by the signal, without saving and without half-written files."""
    _say_at_once("Left without saving the steps since the last checkpoint")
    if distributed.rank() == 0:
        run_record.end_sitting(folder, f"left by {signal.Signals(signum).name} without saving")
        delete_temporaries(folder)
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)


def check_space(folder: Path, checkpoint_bytes: int) -> None:
    """UserError unless the disk of `folder` has room for two checkpoints, one of which replaces the other."""
    free = shutil.disk_usage(folder).free
    if free < 2 * checkpoint_bytes:
        raise UserError(f"the disk of {folder} has {free / 1e6:,.1f} MB left, and two checkpoints take "
                        f"{2 * checkpoint_bytes / 1e6:,.1f} MB: free some, or choose another --output_dir")


def results(folder: Path) -> list[Path]:
    """The files that a run wrote into `folder`."""
    return [path for pattern in WRITTEN for path in folder.glob(pattern)]


def holds(folder: Path, path: Path) -> bool:
    """Whether a file is one that a run wrote into `folder`, which a new run there would move to previous/."""
    return path.resolve() in (written.resolve() for written in results(folder))


def has_run(folder: Path) -> bool:
    """Whether a run has written to `folder`."""
    return bool(results(folder)) or (folder / "previous").is_dir()


def no_run_message(folder: Path) -> str:
    """What to type instead of --resume with a folder that no run has written to; names the runs nearby."""
    nearby = [quoted(path) for path in runs_near(folder)[:3]]
    instead = f"give --output_dir {' or '.join(nearby)}, or " if nearby else ""
    return f"no run has written to {folder}: {instead}leave out --resume to start a new run there"


def runs_near(folder: Path) -> list[Path]:
    """The folders of runs near `folder`, up to two levels below the first of its parents that exists.

    Those whose names are most like its own come first.
    """
    top = next((path for path in folder.parents if path.is_dir()), folder)
    found = {(top / path).parent for mark in (run_record.NAME, "model_final.pt", "checkpoints") for depth in
             ("", "*/", "*/*/") for path in glob.glob(depth + mark, root_dir=top)}
    likeness = {path: difflib.SequenceMatcher(None, str(path), str(folder)).ratio() for path in found
                if "previous" not in path.parts and results(path)}
    return sorted(likeness, key=lambda path: (-likeness[path], str(path)))


def place_of(folder: Path, path: str) -> str:
    """Where a file is that may have been a result in `folder`: the newest of previous/ if `set_aside` has moved it."""
    if os.path.exists(path) or not Path(path).resolve().is_relative_to(folder.resolve()):
        return path
    name = glob.escape(str(Path(path).resolve().relative_to(folder.resolve())))
    moved = sorted((folder / "previous").glob(f"*/{name}"), key=lambda found: found.parent.stat().st_mtime)
    return str(moved[-1]) if moved else path


def set_aside(folder: Path) -> Path | None:
    """Move an older run's results to previous/<time>/ in the folder; returns that place, or None without results.

    What evaluate.py wrote of them goes along.
    """
    old = results(folder)
    if not old:
        return None
    newest = max(path.lstat().st_mtime for path in old)
    place = folder / "previous" / time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(newest))
    while place.exists():
        place = place.with_name(place.name + "+")
    judged = [folder / beside / name for beside in ("", "checkpoints") for name in JUDGED]
    for path in [*old, *filter(Path.is_file, judged)]:
        target = place / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return place
