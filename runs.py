"""The folder of a training run: one run at a time, nothing of an older one lost, the newest valid checkpoint found."""

import contextlib
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from checkpoint import load_checkpoint
from files import check_writable

# What a run writes into its folder. Everything else there is the user's and is left alone.
WRITTEN = ("samples/epoch_*.png", "checkpoints/model_*.pt", "model_final.pt", "training_loss.png", "metrics.jsonl")


@contextlib.contextmanager
def claim(folder: str | Path):
    """Hold `folder` for this process: a second live run there is a ValueError. The lock dies with the process."""
    folder = check_writable(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another run is writing to {folder}: wait for it, or choose another --output_dir") from error
    try:
        yield folder
    finally:
        lock.release()


def set_aside(folder: Path) -> Path | None:
    """Move what an older run wrote to previous/<time>/ inside the folder; returns that place, None if nothing was."""
    old = [path for pattern in WRITTEN for path in folder.glob(pattern)]
    if not old:
        return None
    newest = max(path.stat().st_mtime for path in old)
    place = folder / "previous" / time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(newest))
    while place.exists():
        place = place.with_name(place.name + "+")
    for path in old:
        target = place / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of the run, the one written last first."""
    found = [*folder.glob("checkpoints/model_*.pt"), *folder.glob("model_final.pt")]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def newest_valid(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that loads, and what it holds; broken ones are named and passed over."""
    for path in checkpoints(folder):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            print(f"Passing over {error}")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete the oldest files in checkpoints/ beyond the `keep` newest, of which the newest was just written whole."""
    numbered = [path for path in checkpoints(folder) if path.parent != folder]
    for path in numbered[keep:]:
        path.unlink(missing_ok=True)
