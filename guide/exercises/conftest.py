"""What the tests of the exercises share: the flag --answers, and the file that a test is about."""

import importlib.util
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent

torch.set_num_threads(1)  # tensors are tiny here


def pytest_addoption(parser):
    parser.addoption("--answers", type=Path, default=HERE,
                     help="folder with the files to be tested, by default guide/exercises itself")


@pytest.fixture
def exercise(request):
    """The module of an exercise: test_ex03_... gets ex03_*.py from the folder --answers."""
    number = request.node.name.split("_")[1]
    folder = request.config.getoption("--answers").resolve()
    paths = sorted(folder.glob(f"{number}_*.py"))
    if len(paths) != 1:
        pytest.fail(f"{folder} should hold one file {number}_*.py, not {len(paths)}: choose the folder by --answers")
    path = paths[0]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
