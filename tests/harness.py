"""What the tests of interrupted, damaged and hostile runs share: tiny runs in processes of their own, and comparing."""

import contextlib
import errno
import functools
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from checkpoint import load_checkpoint
from runtime.files import atomic_write
from training.run_folder import has_run

needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="there are no fork and no SIGKILL on Windows")
STEPS = 4  # of an epoch: 256 images in batches of 64
TRIED = Counter()  # what the tests of torture.py tried, and how often; conftest.py shows it


def tiny(data_dir, output_dir, *more) -> list[str]:
    """Flags of a training run of a second or two."""
    return list(map(str, [
        "--dataset", "glyphs", "--data_dir", data_dir, "--output_dir", output_dir, "--train_images", 256,
        "--epochs", 2, "--base_channels", 8, "--time_emb_dim", 16, "--patch_size", 4, "--batch_size", 64,
        "--middle_depth", 1, "--sample_interval", 2, "--save_interval", 1, "--device", "cpu", "--precision", "fp32",
        *more]))


def _run(argv: list[str], log: str, patch, script: str) -> None:
    """In the process of its own: the main(argv) of a script, what it says in `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    import train
    from training import trainer

    os.environ.pop("PYTHONPATH", None)  # which only the forkserver needed
    torch.set_num_threads(1)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    # What takes long and proves no more:
    trainer.VALIDATION_LOSS_IMAGES, train.PREVIEW_IMAGES, train.plot_losses = 64, 4, _instead_of_a_plot
    if patch:
        patch()
    os._exit(importlib.import_module(script).main(argv))


def _instead_of_a_plot(_, path: Path) -> None:
    with atomic_write(path) as file:  # as a plot is written
        file.write(b"a plot")


class SlowSave:
    """A patch: every checkpoint takes a minute to write, and a file `begun` says that half of it is there."""

    def __init__(self, begun: Path):
        self.begun = begun

    def __call__(self):
        from runtime.files import atomic_write
        from training import run

        def save(path, **_):
            with atomic_write(path) as file:
                file.write(b"half")
                file.flush()
                self.begun.touch()
                time.sleep(60)
        run.save_checkpoint = save


class StopAt:
    """A patch: the process gets a signal in the middle of step `step`, and perhaps more signals right after it."""

    def __init__(self, step: int, number: int, *more: int):
        self.step, self.numbers = step, (number, *more)

    def __call__(self):
        from training.trainer import Trainer
        batch = Trainer.batch

        def stopped(trainer):
            if trainer.step + 1 == self.step:
                for number in self.numbers:
                    os.kill(os.getpid(), number)
                    time.sleep(0.02)
            return batch(trainer)
        Trainer.batch = stopped


class OnRank:
    """A patch: another one for process `rank` of several only."""

    def __init__(self, rank: int, patch):
        self.rank, self.patch = rank, patch

    def __call__(self):
        if os.environ["RANK"] == str(self.rank):
            self.patch()


class CountsDifferently:
    """A patch: the launcher has restarted the processes, and has counted so for the first of them only."""

    def __call__(self):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(1 - int(os.environ["RANK"]))


class Restarted:
    """A patch: torchrun has restarted the processes; this launch wrote what lies in `folder`, if one is given."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def __call__(self):
        from runtime import distributed
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        if self.folder and os.environ["RANK"] == "0":
            path = self.folder / "run.json"
            content = json.loads(path.read_text())
            content["sittings"][-1]["launch"] = "this"
            path.write_text(json.dumps(content))
        if self.folder:
            distributed.launch = lambda: "this"


class SmallSplits:
    """A patch: evaluate.py looks at the first `count` images of each split, and takes less time for them."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self):
        import evaluate
        from evaluation import inputs, metrics, reference, two_sample
        metrics.GROUPS, two_sample.EPOCHS, two_sample.CHANNELS = 5, 2, (8, 8, 8, 8)
        load = evaluate.load_dataset
        for module in (evaluate, inputs, reference):
            module.load_dataset = lambda *args: load(*args).first(self.count)


class LittleMemory:
    """A patch: the process can have so many more bytes than it has."""

    def __init__(self, more: int):
        self.more = more

    def __call__(self):
        import resource
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + self.more,) * 2)


class SmallDisk:
    """A patch: from the `good`-th file on, every file that is written fails half way, but for `bad` files."""

    def __init__(self, good: int, bad: int = 10**9):
        self.good, self.bad = good, bad

    def __call__(self):
        count, fsync = [0], os.fsync

        def full(descriptor):
            count[0] += 1
            if self.good < count[0] <= self.good + self.bad:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return fsync(descriptor)
        os.fsync = full


class Rank:
    """A patch: the process is one of several, as torchrun would start it, and only rank 0 can make files.

    And another patch, if there is one.
    """

    def __init__(self, rank: int, size: int, port: int, more=None):
        self.rank, self.size, self.port, self.more = rank, size, port, more

    def __call__(self):
        os.environ |= dict(RANK=str(self.rank), LOCAL_RANK=str(self.rank), WORLD_SIZE=str(self.size),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port))

        def fail(*_, **__):
            raise AssertionError("only rank 0 writes")
        if self.rank:
            tempfile.mkstemp = fail
        if self.more:
            self.more()


@functools.cache
def forkserver():
    """The context of processes that have imported all before.

    The server of Python 3.11 looks for the modules in its own sys.path, and does without those that it cannot find.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness", "train", "sample", "evaluate", "matplotlib.pyplot", "PIL.Image",
                                    "torchvision.utils", "torchmetrics.image.fid", "torchmetrics.image.kid"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
        multiprocessing.forkserver.ensure_running()
    return context


def start(argv: list[str], log: Path, patch=None, script: str = "train"):
    """Begin the main(argv) of a script in a process of its own, which has imported all before."""
    process = forkserver().Process(target=_run, args=(argv, str(log), patch, script))
    process.start()
    return process


def free_port() -> int:
    """A port that is free, and not of those that the system gives to connections: it stays free until it is used."""
    for port in random.SystemRandom().sample(range(15_000, 30_000), 50):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def reset_peak_memory() -> None:
    """Let `peak_memory` count from here on, where the system can do this (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most memory that this process held since it began, or since `reset_peak_memory`, in KiB."""
    try:
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(argv: list[str], log: Path, patch=None, timeout: float = 120) -> int:
    """The exit status of `train.main(argv)` in a process of its own."""
    process = start(argv, log, patch)
    process.join(timeout)
    assert process.exitcode is not None, f"it hangs: {log.read_text()[-500:]}"
    assert "Traceback" not in log.read_text(), log.read_text()
    return process.exitcode


def run_together(argv: list[str], log: Path, patch=None, size: int = 2, script: str = "train",
                 timeout: float = 120) -> list[int]:
    """The exit statuses of `size` processes that work together on one run; rank i says what it says in log.i."""
    port = free_port()
    processes = [start(argv, log.with_suffix(f".{rank}"), Rank(rank, size, port, patch), script)
                 for rank in range(size)]
    for process in processes:
        process.join(timeout)
        assert process.exitcode is not None, "it hangs"
    return [process.exitcode for process in processes]


def wait_until(condition, process, timeout: float = 60) -> None:
    """Wait until something is so while a process runs."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.is_alive() and time.monotonic() < end, f"never: exit status {process.exitcode}"
        time.sleep(0.002)


def stop_after(argv: list[str], log: Path, folder: Path, stop: int, seconds: float, patch=None) -> int:
    """Start a run, send it a signal `seconds` after it began its first checkpoint, and return its exit status."""
    before = set(folder.glob("checkpoints/*"))
    process = start(argv, log, patch)
    with contextlib.suppress(AssertionError):  # it may have ended before
        wait_until(lambda: set(folder.glob("checkpoints/*")) - before, process)
        time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, stop)
    process.join(60)
    assert process.exitcode is not None, "it did not stop"
    return process.exitcode


def kill_until_done(argv: list[str], log: Path, folder: Path, kills: int, chance: random.Random,
                    longest: float) -> dict:
    """Run, and resume, killed by SIGKILL `kills` times at random moments, then to its end. What was met."""
    met = dict(kills=0, while_writing=0, finished=0)
    while met["kills"] < kills:
        status = stop_after([*argv, *resume_if_begun(folder)], log, folder, signal.SIGKILL, chance.uniform(0, longest))
        if status == 0:  # it was quicker than the signal: begin again
            met["finished"] += 1
            assert met["finished"] < 3 * kills + 10, "the run is too short to be killed"
            for path in [*folder.glob("checkpoints/*"), folder / "model_final.pt"]:
                path.unlink()
            continue
        assert status == -signal.SIGKILL, log.read_text()[-1000:]
        met["kills"] += 1
        met["while_writing"] += any(folder.rglob(".*.tmp"))
        if (folder / "metrics.jsonl").exists():
            assert_steps_once(folder)
    assert run([*argv, *resume_if_begun(folder)], log) == 0
    return met


def resume_if_begun(folder: Path) -> list[str]:
    """The flag --resume, unless the run was killed before it wrote anything."""
    return ["--resume"] if has_run(folder) else []


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_steps_once(folder: Path) -> None:
    steps = [record["step"] for record in metrics(folder)]
    assert steps == sorted(set(steps))


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def assert_identical(a, b) -> None:
    """The same keys, types, numbers and texts, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_identical(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            assert_identical(one, two)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(one: Path, two: Path) -> None:
    """Two runs have the same weights, average, optimisers, records and previews, bit for bit; clocks aside."""
    a, b = (load_checkpoint(folder / "model_final.pt") for folder in (one, two))
    for name in ("model", "ema", "optimizer", "step", "epoch", "images_seen"):
        assert_identical(a[name], b[name])
    clocks = {"seconds", "images_per_second"}
    without = [[{name: value for name, value in record.items() if name not in clocks} for record in metrics(folder)]
               for folder in (one, two)]
    assert without[0] == without[1]
    previews = [{name: content for name, content in files(folder).items() if name.startswith("samples/")}
                for folder in (one, two)]
    assert previews[0] and previews[0] == previews[1]
    assert not [name for name in files(two) if name.endswith(".tmp")]


def assert_refused(capfd, status: int, *words: str) -> None:
    """Exit status 2, and one line on stderr that has the words in it."""
    err = capfd.readouterr().err
    assert status == 2 and len(err.splitlines()) == 1 and "Traceback" not in err, (status, err)
    assert all(word in err for word in words), err
