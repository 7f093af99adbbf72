"""What several test files need: where the project lies, and a data folder with the glyphs drawn once."""

import hashlib
from pathlib import Path

import pytest
import torch
from harness import TRIED

from data import load_dataset
from runtime import threads

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # tensors are tiny here: threads would only wait for each other


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one process of several, by pytest-xdist
        session.config.workeroutput["tried"] = dict(TRIED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TRIED.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter):
    """What torture.py tried and how often. A loss is a failure: a table without failures says that nothing was lost."""
    if TRIED:
        terminalreporter.write_line("\n| what was tried | how often | lost |\n| --- | --- | --- |")
    for what, count in TRIED.items():
        lost = "see above" if terminalreporter.stats.get("failed") else "nothing"
        terminalreporter.write_line(f"| {what} | {count:,} | {lost} |")


@pytest.fixture
def cores(monkeypatch):
    """A machine on which torch would take two threads; they are not used. Returns the numbers that are set."""
    numbers = []
    monkeypatch.setattr(threads, "default_number", lambda: 2)
    monkeypatch.setattr(threads, "idle_and_total_time", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1] if numbers else 2)
    monkeypatch.setattr(threads, "WINDOW", 1e-9)
    monkeypatch.setattr(threads, "PATIENCE", 0.0)
    return numbers


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def data_dir(request, tmp_path_factory):
    """A folder that holds the glyphs: data/ where they are there, else one in pytest's cache, kept between runs."""
    if all((ROOT / "data/glyphs" / name).exists() for name in ("train.npz", "test.npz")):
        return ROOT / "data"
    cache = getattr(request.config, "cache", None)
    drawn_by = hashlib.sha256((ROOT / "data_sources/glyphs.py").read_bytes()).hexdigest()[:12]
    folder = Path(cache.mkdir(f"data-{drawn_by}")) if cache else tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        load_dataset("glyphs", split, folder)
    return folder


@pytest.fixture(scope="session")
def real_mnist():
    """The project's data folder, where MNIST's own files lie in it."""
    if not (ROOT / "data/MNIST/raw/train-images-idx3-ubyte").exists():
        pytest.skip("data/MNIST/raw/train-images-idx3-ubyte is missing: real MNIST is not here")
    return ROOT / "data"
