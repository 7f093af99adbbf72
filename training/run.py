"""A training run: its records, its checkpoints, when it stops, and what is said when it cannot go on."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import load_checkpoint, save_checkpoint, saved_step
from runtime import distributed, threads
from runtime.errors import RunFailed, UserError
from runtime.files import one_line, write_json_lines
from runtime.memory import out_of_memory
from runtime.progress import Bar, say
from training.autotune import now
from training.budget import Budget
from training.cuda_graph import QueuedSteps
from training.tensorboard import Board
from utils import count_parameters

LOG_STEPS = 50  # steps between two records
AGREE_STEPS, AGREE_SECONDS = 10, 1.0  # after so many steps or seconds several processes agree on time and signals
MAX_BAD_STEPS = 20  # a run fails after so many steps in a row without a finite gradient
FIRST_STEPS = 6  # of a sitting on a CPU: after them its speed is known for the first time
CLOSING_SECONDS = 1.5  # time to write the last checkpoint and the plot


class Run:
    """A trainer, its budget and its folder, as train.py and distill.py use them.

    config             the config of the checkpoints
    advice             what to do when numbers are not finite, one line
    closing_images     the network's work after the last step, in images of a training step: with the speed it gives
                       the reserve of the budget
    keep_checkpoints   files in checkpoints/; None: all
    records            the lines of metrics.jsonl
    board              gets the records too, for TensorBoard
    losses             losses of the steps since the last record, on the device
    progress           how much of the run is done (0..1)
    signal, stopped    the signal that this process received, and the one for which all processes stop
    agreed             the time share and the signal on which several processes agreed last, at agree_time and after
                       agree_step steps; they do so again after agree_at steps
    step_time          time.perf_counter() after the last step
    first_times        the seconds of the first steps of this sitting, on a CPU
    timed_step         the last of these steps
    preview            the step of the last preview and its images; None before the first
    """

    def __init__(self, folder: Path, trainer, budget: Budget, config: dict, advice: str, closing_images: float,
                 keep_checkpoints: int | None = None):
        self.folder, self.trainer, self.budget, self.config, self.advice = folder, trainer, budget, config, advice
        self.closing_images, self.keep_checkpoints = closing_images, keep_checkpoints
        self.records: list[dict] = []
        self.board = Board()
        self.losses: list[Tensor] = []
        self.preview: tuple[int, Tensor] | None = None
        self.signal, self.stopped, self.progress, self.agreed = None, None, 0.0, None
        self.agree_time, self.agree_step, self.agree_at = time.perf_counter(), trainer.step, trainer.step
        self.reported, self.fastest = 0.0, 0.0  # skipped steps that the user was told of; images a second
        self.last_save = self.step_time = time.perf_counter()
        self.first_times: list[float] = []
        self.timed_step = trainer.step
        self.queued = QueuedSteps(trainer.device)
        self.mark()

    def restore(self, checkpoint: dict) -> None:
        """Continue from a checkpoint. UserError if its tensors do not fit."""
        self.trainer.restore(checkpoint)
        self.records = checkpoint["history"].get("records", [])
        self.losses = [torch.tensor(loss, device=self.trainer.device)
                       for loss in checkpoint["history"].get("losses", [])]
        self.timed_step = self.agree_step = self.trainer.step
        self.mark()

    # ---------------------------------------------------------------------------------------------- time and signals

    def update(self) -> None:
        """Set `progress` and `stopped` by the clock and by the signal, on which several processes agree."""
        self.queued.limit()
        self.time_first_steps()
        step, time_share, signal = self.trainer.step, self.budget.time_share, self.signal
        if distributed.world_size() > 1:
            if self.agreed is None or step >= self.agree_at:
                self.agree(time_share, signal)
            time_share, signal = self.agreed
        self.progress, self.stopped = self.budget.progress(step, time_share), int(signal or 0)
        self.step_time = time.perf_counter()

    def agree(self, time_share: float, signal: int | None) -> None:
        """Set `agreed`, the largest time share and signal of all processes, and `agree_at`, when to do so again."""
        now, step = time.perf_counter(), self.trainer.step
        pace = (now - self.agree_time) / (step - self.agree_step) if step > self.agree_step else math.inf
        mine = torch.tensor([time_share, signal or 0, pace], dtype=torch.float32, device=self.trainer.device)
        *self.agreed, pace = distributed.all_reduce_max(mine).tolist()
        self.agree_at = step + max(1, min(AGREE_STEPS, int(AGREE_SECONDS / max(pace, 1e-9))))
        self.agree_time, self.agree_step = now, step

    def time_first_steps(self) -> None:
        """Set the reserve of the budget by the quickest of the FIRST_STEPS but the first, before there is a record.

        A slow network may take all its time for fewer steps than are between records. (On a GPU those are quick, and
        the first ones are not: cuDNN chooses algorithms, and a CUDA graph is recorded.)
        """
        step = self.trainer.step
        if self.trainer.device.type != "cpu" or step == self.timed_step or len(self.first_times) >= FIRST_STEPS:
            return
        self.first_times.append(time.perf_counter() - self.step_time)
        self.timed_step = step
        if len(self.first_times) == FIRST_STEPS:
            self.set_reserve(self.trainer.batch_size / max(1e-9, min(self.first_times[1:])))

    def mark(self) -> None:
        """Measure the speed from here on."""
        self.marked_step, self.marked_time = self.trainer.step, now(self.trainer.device)

    def speed(self) -> float:
        """Images a second since the last mark."""
        seconds = max(now(self.trainer.device) - self.marked_time, 1e-9)
        return (self.trainer.step - self.marked_step) * self.trainer.batch_size / seconds

    def set_reserve(self, speed: float) -> None:
        """Reserve the time that the work after the last step takes at this speed, in images a second."""
        self.fastest = max(self.fastest, speed)  # CLOSING_SECONDS are for a machine that is not busy
        self.budget.reserve = CLOSING_SECONDS * self.fastest / speed + self.closing_images / speed

    # --------------------------------------------------------------------------------------------------- the records

    def record(self, speed: float, val_loss: float | None = None) -> None:
        """Add a record of the steps since the last one. RunFailed if their gradients were not finite.

        speed: images a second.
        """
        trainer = self.trainer
        losses = torch.stack(self.losses).tolist() if self.losses else []  # waits for the device
        finite = [loss for loss in losses if math.isfinite(loss)]
        self.records.append(dict(
            step=trainer.step, epoch=trainer.epoch, images_seen=trainer.images_seen,
            loss=sum(finite) / len(finite) if finite else None,
            val_loss=val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            lr=trainer.lr, images_per_second=round(speed, 1), seconds=round(self.budget.seconds_used, 3)))
        self.losses = []
        with warn_of_failed_writes():
            self.board.add_record(self.records[-1])
        if speed:  # a resumed run may end without a step
            self.set_reserve(speed)
        self.check_gradients()
        self.mark()

    def check_gradients(self) -> None:
        """Warn of steps without a finite gradient. RunFailed after MAX_BAD_STEPS of them in a row."""
        skipped, in_a_row = self.trainer.skipped.tolist()
        if in_a_row >= MAX_BAD_STEPS:
            raise RunFailed(f"the loss or its gradient was not finite in {in_a_row:.0f} steps in a row, up to step "
                            f"{self.trainer.step}; {self.advice}")
        if skipped > self.reported:
            self.reported = skipped
            say(f"Warning: {skipped:.0f} steps so far had no finite gradient and were skipped", sys.stderr)

    # -------------------------------------------------------------------------------------------------------- saving

    def save(self, name: str) -> Path:
        """Write a checkpoint and metrics.jsonl, and delete surplus checkpoints. RunFailed if weights are not finite."""
        self.last_save = time.perf_counter()
        if not self.trainer.is_finite():
            raise RunFailed(f"the weights are not finite after step {self.trainer.step}; {self.advice}")
        if distributed.rank() == 0:
            history = dict(records=self.records, losses=[loss.item() for loss in self.losses],
                           skipped=self.trainer.skipped.tolist())
            save_checkpoint(self.folder / name, config=self.config, seconds=self.budget.seconds_used, history=history,
                            **self.trainer.state())
            if self.keep_checkpoints:
                prune(self.folder, self.keep_checkpoints)
            self.save_records()
        return self.folder / name

    def save_records(self) -> None:
        write_json_lines(self.records, self.folder / "metrics.jsonl")

    def save_step(self) -> Path:
        """Write a checkpoint that is named after the step."""
        return self.save(f"checkpoints/model_step_{self.trainer.step:08d}.pt")

    def save_every(self, minutes: float) -> None:
        """Write a checkpoint, if possible, when the last one is `minutes` old; 0: never."""
        if minutes and time.perf_counter() - self.last_save > 60 * minutes:
            with warn_of_failed_writes():
                self.save_step()

    # ----------------------------------------------------------------------------------------------------- the ending

    def carry_out(self, loop: Callable[[], None], advise_memory: Callable[[], str]) -> None:
        """Call loop(). RunFailed, with advice, if memory is too small or another process has ended.

        advise_memory(): a line to print after a step that ran out of memory; it may measure.
        """
        try:
            return loop()
        except OSError:
            with warn_of_failed_writes():
                self.save_step()
            raise
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                if distributed.process_lost(error):
                    raise RunFailed(f"another process of this run has ended; {self.advice}") from error
                raise
        raise RunFailed(advise_memory())  # outside the except block, where what the error held is free again


def print_summary(trainer, network: str) -> None:
    """Print the device, the images, the size of the network, which is called `network`, and the number of threads."""
    print(f"Using device: {trainer.device}")
    print(f"{trainer.data.name}: {len(trainer.data.images):,} {trainer.data.code.holds}; {network} of "
          f"{count_parameters(trainer.model):,} parameters; {trainer.precision}", flush=True)
    if trainer.device.type == "cpu":
        print(threads.describe(), flush=True)


@contextlib.contextmanager
def warn_of_failed_writes() -> Iterator[None]:
    """Turn an OSError into a warning: a run continues without the file, and later there may be room."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            say(f"Warning: a file could not be written ({error}); the run continues", sys.stderr)


# ------------------------------------------------------------------------------------------------ the progress bar


def progress_bar(run: Run) -> Bar:
    """A bar from the start of a run to its end, on rank 0. It looks at the run by itself, and never waits for it."""
    return Bar(total=1.0, ask=partial(status, run), leave=True, hidden=distributed.rank() > 0)


def status(run: Run) -> tuple[float, str, float | None]:
    """(progress, a note of epoch, step, loss and speed, seconds left), as `Bar` asks for it."""
    step, per_epoch, steps = run.trainer.step, run.trainer.steps_per_epoch, run.budget.steps
    epoch = max(1, -(-step // per_epoch))
    note = f"epoch {epoch}{f'/{steps // per_epoch}' if steps < math.inf else ''}"
    note += f", step {step - (epoch - 1) * per_epoch}/{per_epoch}"
    speed, loss = recent_speed(run), recent_loss(run)
    note += f", loss {loss:.3f}" if loss is not None else ""
    note += f", {speed:,.0f} images/s" if speed else ""
    left = run.budget.seconds_left(step, run.trainer.batch_size / speed if speed else math.inf)
    since_step = 0.0 if run.budget.seconds else time.perf_counter() - run.step_time
    return run.progress, note, max(0.0, left - since_step)


def recent_speed(run: Run) -> float | None:
    """Images a second since the last record or, within a second after it, up to it; None where neither is known."""
    steps, seconds = run.trainer.step - run.marked_step, run.step_time - run.marked_time
    if steps > 0 and seconds > (1.0 if run.records else 0.0):
        return steps * run.trainer.batch_size / seconds
    return run.records[-1]["images_per_second"] if run.records else None


def recent_loss(run: Run) -> float | None:
    """The mean loss since the last record, else that of the record, without waiting for a device; None: not known."""
    losses = [loss.item() for loss in list(run.losses)] if run.trainer.device.type == "cpu" else []
    losses = [loss for loss in losses if math.isfinite(loss)]
    if losses or not run.records:
        return sum(losses) / len(losses) if losses else None
    return run.records[-1]["loss"]


# ------------------------------------------------------------------------------------- the checkpoints in the folder


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run by their steps, the latest first; unreadable ones come before all others.

    The step in the file counts, not its date: a copied folder has the dates of the copying.
    """
    found = [*folder.glob("checkpoints/model_*.pt"), *folder.glob("model_final.pt")]
    return sorted(found, key=lambda path: (saved_step(path), path.stat().st_mtime_ns, path.name), reverse=True)


def newest_valid(folder: Path) -> tuple[Path, dict] | None:
    """The path and the content of the latest checkpoint that loads; prints a line for each one that does not."""
    for path in checkpoints(folder):
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            print(f"Skipping {one_line(error, None)}")
    return None


def is_complete(folder: Path) -> bool:
    """Whether the latest checkpoint is the end of a run: model_final.pt, and after it the plot."""
    final, plot = folder / "model_final.pt", folder / "training_loss.png"
    return (final.exists() and plot.exists() and plot.stat().st_mtime_ns >= final.stat().st_mtime_ns
            and saved_step(final) == max((step for step in map(saved_step, checkpoints(folder)) if step < math.inf),
                                         default=0))


def is_valid(path: Path) -> bool:
    """Whether a checkpoint loads."""
    try:
        load_checkpoint(path)
    except UserError:
        return False
    return True


def prune(folder: Path, keep: int) -> None:
    """Delete all but `keep` files in checkpoints/: unreadable ones first, then those within epochs, then the oldest.

    The newest file and the newest valid one always stay: --resume needs them.
    """
    numbered = [path for path in checkpoints(folder) if path.parent != folder]
    readable = [path for path in numbered if saved_step(path) < math.inf]
    epochs_first = readable[:1] + sorted(readable[1:], key=lambda path: path.name.startswith("model_step_"))
    kept, surplus = epochs_first[:keep], epochs_first[keep:]
    broken = [path for path in numbered if path not in readable][max(0, keep - len(kept)):]
    spared = next(filter(is_valid, readable), None) if surplus else None
    for path in [*surplus, *broken]:
        if path != spared:
            path.unlink(missing_ok=True)
