"""Two processes do what one does: the same batches, weights to rounding, and images; one of them writes."""

import numpy as np
import pytest
import torch
from harness import STEPS, files, metrics, needs_fork, run, run_together, tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import small_checkpoint
from torch.testing import assert_close

import parallel
import sample
from checkpoint import load_checkpoint

pytestmark = needs_fork
ADAMW = ("--optimizer", "adamw")  # muon rounds to bfloat16 on its way, and makes more of a difference in rounding


def argv_of(data_dir, folder, *more):
    return tiny(data_dir, folder, *ADAMW, "--sample_interval", 1, *more)


@pytest.fixture(scope="module")
def one(data_dir, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert run(argv_of(data_dir, folder), folder.parent / "log") == 0
    return folder


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory):
    """The folder of the same run of two processes, of which the second cannot write."""
    folder = tmp_path_factory.mktemp("two") / "run"
    assert run_together(argv_of(data_dir, folder), folder.parent / "log") == [0, 0]
    return folder


def assert_same_to_rounding(one, two):
    a, b = (load_checkpoint(folder / "model_final.pt") for folder in (one, two))
    assert (a["step"], a["images_seen"]) == (b["step"], b["images_seen"])
    for part in ("model", "ema"):
        assert_close(a[part], b[part], rtol=0, atol=1e-3)  # the rate is 2e-3: not one step went another way
    for x, y in zip(metrics(one), metrics(two), strict=True):
        assert (x["step"], x["epoch"], x["lr"]) == (y["step"], y["epoch"], y["lr"])
        assert_close([x["loss"], x["val_loss"]], [y["loss"], y["val_loss"]], rtol=1e-3, atol=0)


def test_two_processes_learn_what_one_learns(one, two):
    assert_same_to_rounding(one, two)
    assert files(one).keys() == files(two).keys()


def test_two_processes_draw_the_same_previews(one, two):
    for name in ("samples/epoch_001.png", "samples/epoch_002.png"):
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two))
        assert abs(a - b).max() <= 8 and a.std() > 1


def test_only_one_process_speaks(two):
    said, silent = ((two.parent / "log").with_suffix(f".{rank}").read_text() for rank in (0, 1))
    assert "Saved" in said and silent == ""


def test_a_run_goes_on_with_another_number_of_processes(one, two, data_dir, tmp_path):
    for name, source, resume in [("more", one, lambda argv: run_together(argv, tmp_path / "log")),
                                 ("fewer", two, lambda argv: [run(argv, tmp_path / "log")])]:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        first = "checkpoints/model_epoch_001.pt"
        (tmp_path / name / first).write_bytes((source / first).read_bytes())
        assert set(resume(argv_of(data_dir, tmp_path / name, "--resume"))) == {0}
        assert load_checkpoint(tmp_path / name / "model_final.pt")["step"] == 2 * STEPS
        assert_same_to_rounding(one, tmp_path / name)


def test_a_batch_that_does_not_divide_is_refused_in_one_line(data_dir, tmp_path):
    argv = argv_of(data_dir, tmp_path / "run", "--batch_size", 63)
    assert run_together(argv, tmp_path / "log") == [2, 2]
    said = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert len(said[0].splitlines()) == 1 and "63" in said[0] and said[1] == ""
    assert not (tmp_path / "run").exists()


def test_two_processes_make_the_images_of_one(tmp_path):
    path = small_checkpoint(tmp_path / "model.pt", conditional=True)
    argv = ["--checkpoint", str(path), "--num_images", "7", "--steps", "3", "--device", "cpu", "--precision", "fp32",
            "--label", "0-6", "--output"]
    assert sample.main([*argv, str(tmp_path / "one.npz")]) == 0
    assert run_together([*argv, str(tmp_path / "two.npz")], tmp_path / "log", script="sample") == [0, 0]
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert one["arr_0"].shape == (7, 28, 28, 1) and abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert np.array_equal(one["labels"], two["labels"])


@given(count=st.integers(0, 200), size=st.integers(1, 30))
def test_shares_are_a_partition_in_order_and_as_even_as_can_be(count, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "size", lambda: size)
        shares = []
        for rank in range(size):
            patch.setattr(parallel, "rank", lambda rank=rank: rank)
            shares.append(range(count)[parallel.share(count)])
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone_does_nothing():
    value = torch.tensor([1.0, 2.0])
    assert (parallel.rank(), parallel.size()) == (0, 1)
    assert parallel.total(value) is value and parallel.mean(value) is value
    assert torch.equal(parallel.gather(value), value) and parallel.from_first("x") == "x"
    assert parallel.smallest(3) == 3 and not parallel.restarts() and not parallel.lost(RuntimeError("Connection lost"))
    with parallel.first_alone():
        pass
