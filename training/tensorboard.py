"""Write the records and the sample grids of a run for TensorBoard, for those who have it installed."""

import os
from pathlib import Path

import numpy as np

from runtime.errors import UserError

SCALARS = ("loss", "val_loss", "lr", "images_per_second")  # of the records of metrics.jsonl
FLUSH_SECONDS = 10


def summary_writer() -> type:
    """torch's SummaryWriter. UserError if the package tensorboard is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is loaded if it is there, and logs a lot
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard, or leave "
                        "--tensorboard out") from error
    return SummaryWriter


class Board:
    """What TensorBoard shows of a run.

    folder   where the files of TensorBoard go; None: nothing is written
    step     the steps that the run has already taken; what an earlier sitting wrote of later steps is hidden
    """

    def __init__(self, folder: Path | None = None, step: int = 0):
        self.writer = folder and summary_writer()(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)

    def add_record(self, record: dict) -> None:
        """Add the numbers of a record over its step."""
        for name in SCALARS:
            if self.writer and record[name] is not None:
                self.writer.add_scalar(name, record[name], record["step"])

    def add_samples(self, grid: np.ndarray, step: int) -> None:
        """Add a grid of samples (H, W, 3) uint8."""
        if self.writer:
            self.writer.add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is still in memory."""
        if self.writer:
            self.writer.close()
