"""--tensorboard: the records and the sample grids reach a SummaryWriter; without the package nothing begins."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from harness import assert_refused, files, metrics, tiny
from PIL import Image

import train
from training.tensorboard import SCALARS


class Writer:
    """What a SummaryWriter is told."""

    made: ClassVar[list] = []

    def __init__(self, folder, purge_step, flush_secs):
        self.folder, self.purge_step, self.scalars, self.images, self.closed = folder, purge_step, [], [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, grid, step, dataformats):
        self.images.append((name, grid, step, dataformats))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setattr(train, "PREVIEW_IMAGES", 4)
    return Writer.made


def test_scalars_are_the_records_and_grids_are_the_samples(writers, data_dir, tmp_path):
    assert train.main(tiny(data_dir, tmp_path, "--tensorboard")) == 0
    [writer] = writers
    assert writer.folder == str(tmp_path / "tensorboard") and writer.purge_step == 1 and writer.closed
    expected = [(name, record[name], record["step"]) for record in metrics(tmp_path) for name in SCALARS]
    assert writer.scalars == expected and len(expected) == 8
    [(name, grid, step, dataformats)] = writer.images
    assert (name, step, dataformats) == ("samples", 8, "HWC")
    picture = np.asarray(Image.open(tmp_path / "samples/epoch_002.png"))
    scale = len(picture) // len(grid)
    assert scale > 1 and np.array_equal(grid, picture[::scale, ::scale])


def test_an_error_at_its_end_does_not_cost_the_run(writers, data_dir, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Writer, "close", fail)
    assert train.main(tiny(data_dir, tmp_path, "--tensorboard")) == 0
    assert "Warning: a file could not be written" in capsys.readouterr().err and (tmp_path / "model_final.pt").exists()


def test_a_resumed_run_goes_on_and_keeps_the_flag(writers, data_dir, tmp_path):
    assert train.main(tiny(data_dir, tmp_path, "--tensorboard")) == 0
    assert train.main(["--resume", "--epochs", "3", "--output_dir", str(tmp_path), "--data_dir", str(data_dir),
                       "--device", "cpu"]) == 0
    assert writers[1].purge_step == 9 and {step for _, _, step in writers[1].scalars} == {12}


def test_without_the_flag_nothing_is_written_for_it(writers, data_dir, tmp_path):
    assert train.main(tiny(data_dir, tmp_path, "--epochs", 1)) == 0
    assert not writers and not (tmp_path / "tensorboard").exists()


def test_without_the_package_nothing_begins(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status = train.main(tiny(tmp_path / "data", tmp_path / "run", "--tensorboard"))
    assert_refused(capfd, status, "--tensorboard", "pip install tensorboard")
    assert files(tmp_path) == {}


def test_an_older_runs_files_are_set_aside(writers, data_dir, tmp_path):
    old = tmp_path / "tensorboard/events.out.tfevents.1.host"
    old.parent.mkdir()
    old.write_bytes(b"old")
    assert train.main(tiny(data_dir, tmp_path, "--epochs", 1)) == 0
    [moved] = tmp_path.glob("previous/*/tensorboard/*")
    assert moved.read_bytes() == b"old" and not old.exists()


def test_a_full_disk_does_not_end_the_run(writers, data_dir, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Writer, "add_scalar", full)
    assert train.main(tiny(data_dir, tmp_path, "--epochs", 1, "--tensorboard")) == 0
    assert "No space left" in capfd.readouterr().err
