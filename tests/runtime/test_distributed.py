"""Two processes do what one does: the same batches, weights to rounding, and images; one of them writes."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import (
    STEPS,
    CountsDifferently,
    OnRank,
    Restarted,
    SmallSplits,
    StopAt,
    assert_refused,
    files,
    metrics,
    needs_fork,
    run,
    run_together,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import small_checkpoint
from torch.distributed import TCPStore
from torch.testing import assert_close

import distill
import evaluate
import sample
from checkpoint import load_checkpoint
from data import load_dataset
from evaluation import inputs, reference, two_sample
from evaluation import metrics as figures_of
from runtime import distributed
from runtime.errors import UserError
from runtime.script import outside_cause, script
from training import run as training_run
from training.run import AGREE_STEPS, newest_valid

pytestmark = needs_fork
NO_LOCAL_RANK = dict(RANK="3", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
LAUNCHED = NO_LOCAL_RANK | dict(LOCAL_RANK="3", LOCAL_WORLD_SIZE="4")
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
            "--label", "0-6", "--show_intermediate", "--gif", "--output"]
    assert sample.main([*argv, str(tmp_path / "one/x.npz")]) == 0
    assert run_together([*argv, str(tmp_path / "two/x.npz")], tmp_path / "log", script="sample") == [0, 0]
    pictures = sorted(path.relative_to(tmp_path / "one") for path in tmp_path.glob("one/**/*.png"))
    assert len(pictures) >= 4 and files(tmp_path / "one").keys() == files(tmp_path / "two").keys()
    for name in pictures:
        one, two = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
        assert abs(one - two).max() <= 2 and one.std() > 1
    one, two = (np.load(tmp_path / f"{name}/x.npz") for name in ("one", "two"))
    assert one["arr_0"].shape == (7, 28, 28, 1) and abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert np.array_equal(one["labels"], two["labels"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_process_stops_all_of_them_at_the_same_step(data_dir, tmp_path, rank, stop):
    argv, log = argv_of(data_dir, tmp_path / "run", "--epochs", 6, "--sample_interval", 0), tmp_path / "log"
    assert run_together(argv, log, OnRank(rank, StopAt(3, stop))) == [128 + stop] * 2
    assert 3 <= newest_valid(tmp_path / "run")[1]["step"] <= 1 + AGREE_STEPS
    said, silent = (log.with_suffix(f".{rank}").read_text() for rank in (0, 1))
    assert "continue with torchrun --nproc_per_node=2 train.py --resume --output_dir" in said and silent == ""


# --------------------------------------------------------------------------------------------------------- evaluate.py


COUNT, SPLIT = 257, 600  # images to make, which do not divide by two, and of each split to compare with


@pytest.fixture
def measured(tmp_path, data_dir, monkeypatch):
    """The folders of two evaluations with the same flags, by one process and by two."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is missing: pip install -r requirements-eval.txt")

    def run_both(*flags, compare=False):
        path = small_checkpoint(tmp_path / "model.pt", conditional=True, patch_size=4)
        begin = ["--compare", path, path] if compare else ["--checkpoint", path]
        argv = list(map(str, [*begin, "--num_images", COUNT, "--data_dir", data_dir, "--device", "cpu",
                              "--precision", "fp32", *flags, "--output_dir"]))
        folders = [tmp_path / name for name in ("one", "two")]
        for module in (evaluate, inputs, reference):
            monkeypatch.setattr(module, "load_dataset", lambda *args: load_dataset(*args).first(SPLIT))
        monkeypatch.setattr(figures_of, "GROUPS", 5)
        monkeypatch.setattr(two_sample, "EPOCHS", 2)
        monkeypatch.setattr(two_sample, "CHANNELS", (8, 8, 8, 8))
        assert evaluate.main([*argv, str(folders[0])]) == 0
        log = tmp_path / "log"
        assert run_together([*argv, str(folders[1])], log, SmallSplits(SPLIT), script="evaluate") == [0, 0]
        assert "Saved" in log.with_suffix(".0").read_text() and log.with_suffix(".1").read_text() == ""
        assert files(folders[0]).keys() == files(folders[1]).keys()
        return folders
    return run_both


def assert_same_figures(one, two):
    """To rounding: a pixel may fall on the next of the 256 levels."""
    assert one.keys() == two.keys()
    for name, figure in one.items():
        assert (figure["n"], figure["floor"]) == (two[name]["n"], two[name]["floor"])
        assert_close(figure["value"], two[name]["value"], rtol=0.01, atol=0.01)


def test_two_processes_measure_what_one_measures(measured):
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in measured("--steps", 2))
    assert_same_figures(one["figures"], two["figures"])
    assert (one["num_images"], two["num_images"], one["processes"], two["processes"]) == (COUNT, COUNT, 1, 2)


def test_two_processes_sweep_as_one_does(measured):
    one, two = (json.loads((folder / "sweep.json").read_text())["rows"] for folder in measured("--sweep", 2))
    for a, b in zip(one, two, strict=True):
        assert [a[name] for name in ("series", "steps", "nfe")] == [b[name] for name in ("series", "steps", "nfe")]
        assert_same_figures(a["figures"], b["figures"])


def test_two_processes_compare_as_one_does(measured):
    one, two = (json.loads((folder / "compare.json").read_text()) for folder in measured("--steps", 2, compare=True))
    assert {tuple(row["difference"].values()) for row in two["figures"].values()} == {(0, 0, 0)}
    assert one["figures"].keys() == two["figures"].keys() and two["a"]["images_sha256"] == two["b"]["images_sha256"]
    for name, row in one["figures"].items():
        assert_close(row["a"]["value"], two["figures"][name]["a"]["value"], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("flags, word", [(["--num_images", "20"], "at least"), (["--steps", "41"], "1..40"),
                                         (["--cas"], "labels")])
def test_what_cannot_be_evaluated_is_told_by_one_process(data_dir, tmp_path, flags, word):
    path = small_checkpoint(tmp_path / "model.pt")
    argv = ["--checkpoint", str(path), "--data_dir", str(data_dir), "--output_dir", str(tmp_path), *flags]
    assert run_together(argv, tmp_path / "log", script="evaluate") == [2, 2]
    said = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert len(said[0].splitlines()) == 1 and word in said[0] and said[1] == ""


class UnsuitableSize:
    """A patch: no network can be built for the size of the images."""

    def __call__(self):
        from training import autotune

        def refuse(*_):
            raise UserError("the height must be a multiple of 4")
        autotune.images_per_second = refuse


def test_what_one_process_refuses_while_it_measures_ends_all_of_them(data_dir, tmp_path):
    argv = ["--dataset", "glyphs", "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run"), "--budget", "20",
            "--train_images", "256", "--device", "cpu", "--precision", "fp32"]
    assert run_together(argv, tmp_path / "log", UnsuitableSize()) == [2, 2]
    said = (tmp_path / "log.0").read_text().splitlines()
    assert "multiple of 4" in said[-1] and (tmp_path / "log.1").read_text() == ""


def test_several_processes_without_a_checkpoint_are_refused(tmp_path):
    argv = ["--images", "x.npz", "--dataset", "glyphs", "--output_dir", str(tmp_path)]
    assert run_together(argv, tmp_path / "log", script="evaluate") == [2, 2]
    assert "leave torchrun out" in (tmp_path / "log.0").read_text() and (tmp_path / "log.1").read_text() == ""


# ------------------------------------------------------------------------------------------------------------ by itself


@settings(deadline=None)
@given(count=st.integers(0, 200), size=st.integers(1, 30))
def test_shares_are_a_partition_in_order_and_as_even_as_can_be(count, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: size)
        shares = []
        for rank in range(size):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(range(count)[distributed.rank_slice(count)])
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("seconds, after", [(0.01, AGREE_STEPS), (0.3, 3), (4.0, 1)])
def test_processes_agree_after_some_steps_or_about_a_second(monkeypatch, seconds, after):
    run = SimpleNamespace(trainer=SimpleNamespace(step=8, device="cpu"), agree_time=100.0, agree_step=4)
    monkeypatch.setattr(training_run.time, "perf_counter", lambda: 100 + 4 * seconds)
    training_run.Run.agree(run, 0.25, None)
    assert run.agreed == [0.25, 0] and (run.agree_at, run.agree_step) == (8 + after, 8)


def test_one_gpu_for_two_processes_is_named(monkeypatch, capsys):
    @script
    def main(_):
        raise RuntimeError("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on 1000")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "several processes were given one GPU" in said and "--nproc_per_node" in said and said.count("\n") == 1


@pytest.mark.parametrize("rank, local, lines", [("4", "0", 1), ("5", "1", 0), ("0", "0", 1)])
def test_a_mistake_is_told_once_on_each_machine(monkeypatch, capsys, rank, local, lines):
    @script
    def main(_):
        raise UserError("no pictures")
    set_environment(monkeypatch, LAUNCHED | dict(RANK=rank, WORLD_SIZE="8", LOCAL_RANK=local))
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == lines


def test_one_process_alone_does_nothing():
    value = torch.tensor([1.0, 2.0])
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_reduce_sum(value) is value and distributed.all_reduce_mean(value) is value
    assert torch.equal(distributed.all_gather(value), value) and distributed.broadcast("x") == "x"
    assert distributed.from_rank_0(lambda: 5) == 5
    assert distributed.all_reduce_min(3) == 3 and distributed.all_reduce_max(value) is value
    assert not distributed.launch() and not distributed.process_lost(RuntimeError("Connection lost"))
    with distributed.local_rank_0_first():
        pass


NCCL = ("NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error. \nLast error:\n")


@pytest.mark.parametrize("text, lost, said", [
    (NCCL + "Error while creating shared memory segment /dev/shm/nccl-x (size 9)", False, "/dev/shm/nccl-x (size"),
    (NCCL + "socketStartConnect: Connect to 10.0.0.2<35000> failed : Connection refused", True, None),
    ("NCCL error: remote process exited or there was a network error\nncclRemoteError: a call failed", True, None),
    ("setting up NCCL communicator and retrieving ncclUniqueId, but got error: Broken pipe", True, None),
    ("NCCL communicator was aborted on rank 1.", True, None),
    ("[../third_party/gloo] Connection closed by peer [127.0.0.1]:5000", True, None),
    ("[../third_party/gloo] socket failed", True, None),
    ("shape mismatch", False, None)])
def test_what_nccl_says_of_itself_is_told(monkeypatch, text, lost, said):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    error = RuntimeError(text)
    assert distributed.process_lost(error) == lost
    told = outside_cause(error)
    assert (told is None) == (text == "shape mismatch")
    if said:
        assert said in told and "--shm-size" in told and "another process" not in told and "\n" not in told
    assert "out of memory" in outside_cause(RuntimeError(NCCL + "Cuda failure 2 'out of memory'"))


@pytest.mark.parametrize("launched, gpus, name, expected", [
    ({}, 0, "auto", "auto"), ({}, 2, "cuda", "cuda"), ({}, 0, "mps", "mps"), ({}, 2, "cuda:1", "cuda:1"),
    (LAUNCHED, 2, "auto", "cuda:1"), (LAUNCHED, 2, "cuda", "cuda:1"), (LAUNCHED, 0, "auto", "cpu"),
    (LAUNCHED, 2, "cpu", "cpu"), (NO_LOCAL_RANK, 2, "auto", "cuda:1"), (NO_LOCAL_RANK, 8, "cuda", "cuda:3"),
    (dict(RANK="3"), 2, "auto", "auto"), (dict(LOCAL_RANK="1"), 2, "auto", "auto"),
    (LAUNCHED | dict(LOCAL_WORLD_SIZE="1"), 2, "cuda:0", "cuda:0")])
def test_each_process_has_a_device_through_which_it_can_talk(monkeypatch, launched, gpus, name, expected):
    """Of process 3, which torchrun launched, or none; on a Mac "auto" is not mps there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    set_environment(monkeypatch, launched)
    assert distributed.local_device(name) == expected


@pytest.mark.parametrize("name, words", [("mps", "--device cpu"), ("cuda:1", "CUDA_VISIBLE_DEVICES")])
def test_several_processes_cannot_use_mps_or_one_gpu(monkeypatch, name, words):
    set_environment(monkeypatch, LAUNCHED)
    with pytest.raises(ValueError, match=words):
        distributed.local_device(name)


@pytest.mark.parametrize("left_over", [dict(WORLD_SIZE="1"), dict(RANK="1"), dict(LOCAL_RANK="1", RANK="0"),
                                       dict(WORLD_SIZE="")], ids=str)
def test_variables_of_a_launch_that_is_over_do_not_disturb_one_process(monkeypatch, tmp_path, capfd, left_over):
    set_environment(monkeypatch, left_over)
    path = small_checkpoint(tmp_path / "model.pt")
    argv = ["--checkpoint", str(path), "--num_images", "2", "--device", "cpu", "--output", str(tmp_path / "x.png")]
    assert sample.main([*argv, "--steps", "2"]) == 0 and (tmp_path / "x.png").exists()
    capfd.readouterr()
    assert_refused(capfd, sample.main([*argv, "--steps", "0"]), "steps")  # and what is wrong is said


def test_several_processes_without_the_variables_of_a_launcher_are_refused(monkeypatch, tmp_path, capfd):
    set_environment(monkeypatch, dict(WORLD_SIZE="2", RANK="1"))
    path = small_checkpoint(tmp_path / "model.pt")
    argv = ["--checkpoint", str(path), "--device", "cpu", "--output", str(tmp_path / "x.png")]
    assert_refused(capfd, sample.main(argv), "WORLD_SIZE is 2", "MASTER_ADDR, MASTER_PORT", "torchrun")


def test_distilling_by_several_processes_is_refused_in_one_line(tmp_path, monkeypatch, capfd):
    set_environment(monkeypatch, LAUNCHED | dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"))
    status = distill.main(["--checkpoint", "mnist", "--output_dir", str(tmp_path / "student")])
    assert_refused(capfd, status, "one process", "without torchrun")
    assert not (tmp_path / "student").exists()


def set_environment(monkeypatch, variables):
    for name in (*distributed.REQUIRED_VARIABLES, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# ------------------------------------------------------------------------------------------------------------ restarts


def attempt_of(store, count, ranks):
    """The names that these ranks of an attempt agree on, each in a thread of its own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: distributed._agree_on_attempt(store.clone(), rank, count), ranks))


def test_every_attempt_has_a_name_of_its_own_whatever_an_earlier_one_left_in_the_store():
    """Also where an earlier attempt died before all of its processes had said that they are there."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    names = []
    for left in ([], [1], [2], [1, 2]):
        for rank in left:
            store.set(f"process {rank}", "of a process that was killed")
        found = attempt_of(store, 3, [2, 1, 0])
        assert len(set(found)) == 1
        names += found[:1]
    assert len(set(names)) == 4


def test_processes_whose_launcher_counts_restarts_differently_still_meet(data_dir, tmp_path):
    """On two machines torchrun counts a restart only on the machine whose process died."""
    assert run_together(argv_of(data_dir, tmp_path / "run"), tmp_path / "log", CountsDifferently()) == [0, 0]


@pytest.mark.parametrize("written_by", ["another launch", "this launch"])
def test_a_restart_resumes_what_its_own_launch_wrote_and_nothing_else(one, data_dir, tmp_path, written_by):
    """torchrun says that it restarts, and the folder holds an older run of one epoch and another seed."""
    folder, patch = tmp_path / "run", Restarted(tmp_path / "run" if written_by == "this launch" else None)
    assert run(argv_of(data_dir, folder, "--epochs", 1, "--seed", 1), tmp_path / "log") == 0
    before = files(folder)
    assert run_together(argv_of(data_dir, folder), tmp_path / "log", patch) == [0, 0]
    resumed = written_by == "this launch"
    assert ("Resuming" in (tmp_path / "log.0").read_text()) == resumed
    if not resumed:
        assert_same_to_rounding(one, folder)
        [place] = (folder / "previous").iterdir()
        assert files(place) == before
