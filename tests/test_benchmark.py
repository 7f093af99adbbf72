"""benchmark.py: its figures are right, its JSON has what it promises, and its errors take one line."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import benchmark
from benchmarks import busy, jobs, machine, peers, pictures, plots, processes, quality, scaling, speed, tables
from benchmarks.context import OURS, Context
from data_sources.cache import Pictures, cached
from runtime.errors import RunFailed
from training import flags
from training.sizing import choose


def call(*argv):
    return benchmark.main([str(argument) for argument in argv])


def make_context(folder, *argv):
    args = benchmark.parse_args([*argv, "--output_dir", str(folder)])
    return Context(args, "cpu", benchmark.FULL, folder)


@pytest.fixture(scope="module")
def report(data_dir, tmp_path_factory):
    """The folder and the JSON of a quick run of the parts that need no long training."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        # In this process: to begin one takes seconds, and test_a_job_finds_its_modules_from_every_folder begins one.
        patch.setattr(processes, "run_job", lambda job, **fields: jobs.run(json.dumps(dict(job=job, **fields))))
        patch.setenv("OMP_NUM_THREADS", "1")  # the threads of its scripts would wait for those of other tests
        assert call("scaling", "train", "peak", "--quick", "--contestants", "fast", "--dataset", "glyphs", "--data_dir",
                    data_dir, "--output_dir", folder, "--device", "cpu") == 0
    return folder, json.loads((folder / "benchmark.json").read_text())


def test_a_short_run_on_a_gpu_has_the_network_of_a_long_one(tmp_path):
    context = make_context(tmp_path)
    assert context.images_of(2) == 2 * context.plan.batch_size
    context.device = "cuda"
    short, long = (choose(images, None, torch.device("cuda"), speed=None) for images in (context.images_of(2), 60_000))
    assert short == long


def test_the_bar_names_what_is_measured_and_the_rows_stand_above_it(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr("runtime.progress.SECONDS", 0.02)

    def measure(name):
        time.sleep(0.1)
        tables.print_row(name, 1.0)
    make_context(tmp_path).measure_each("train", measure, ["fast", "ddpm"])
    drawn = [part for part in stream.getvalue().split("\r") if part.strip()]
    assert any(re.search(r"train:  50%\|.*\| 1/2 measurements, 00:00, ddpm, 00:00 left", part) for part in drawn), drawn
    rows = [line.split("\r")[-1].split()[0] for line in stream.getvalue().split("\n")[:2]]
    assert rows == ["fast", "ddpm"]


def test_a_run_is_described(report):
    _, found = report
    assert {"command", "flags", "machine", "train", "scaling", "peak", "errors", "seconds"} <= found.keys()
    assert {"cpu", "cores", "threads", "torch", "date", "load", "device"} <= found["machine"].keys()
    assert found["machine"]["torch"] == torch.__version__.split("+")[0] and not found["errors"]


def test_training_speed_lies_between_its_lowest_and_highest(report):
    row = report[1]["train"]["rows"]["fast"]
    assert 0 < row["low"] <= row["images_per_second"] <= row["high"] and row["runs"] >= 1
    assert_close(row["minutes_for_20_epochs"], 20 * 55_000 / row["images_per_second"] / 60)


def test_the_share_of_the_peak_is_the_ratio_of_what_was_measured(report):
    row = report[1]["peak"]["rows"]["fast"]
    assert_close(row["step_gflops"], row["step_flops"] / row["step_seconds"] / 1e9)
    assert_close(row["share_of_best"], row["step_gflops"] / max(row["matrix_gflops"].values()))
    assert row["step_flops"] == sum(row["by_operation"].values()) > 0
    assert 0 < row["arithmetic"] < 1 and len(row["slowest"]) == 8
    assert_close(row["share_within"], row["share_of_best"] / row["arithmetic"])


def test_scaling_has_time_and_memory_along_each_axis(report):
    folder, found = report
    for axis in found["scaling"]["axes"].values():
        assert all(point["seconds"] > 0 and point["peak_mb"] > 50 for point in axis["points"])
        assert axis["power"].keys() == {"seconds", "peak_mb"}
    with Image.open(folder / "benchmark_scaling.png") as picture:
        picture.load()


def test_the_speeds_beside_busy_processes_are_compared(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(busy, "load_checkpoint", lambda _: dict(config="that of the network"))
    monkeypatch.setattr(Context, "checkpoint", lambda *_: "file")

    def job(_, name, **fields):
        asked.append((name, fields["busy"], fields["config"], fields["base_channels"]))
        return dict(speeds={"2 threads": 600 / (1 + 3 * fields["busy"]), "1 thread": 350.0, "chosen": 340.0})
    monkeypatch.setattr(Context, "job", job)
    found = busy.measure_busy(make_context(tmp_path))
    assert asked == [("busy_steps", count, "that of the network", 48) for count in (0, 1, 2)]
    assert [row["best"] for row in found["rows"].values()] == ["2 threads", "1 thread", "1 thread"]
    assert_close(found["rows"]["beside 1"]["share_of_best"], 340 / 350)
    assert_close(found["ratios"]["beside 1"]["chosen against 2 threads"], 340 / 150)
    assert "97.1%" in capsys.readouterr().out


def test_busy_processes_run_while_the_speed_is_measured_and_end_after_it(monkeypatch):
    started = []

    def popen(*args):
        started.append(subprocess.Popen(*args))
        return started[-1]
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=popen))
    with jobs.busy_processes(2):
        assert len(started) == 2 and all(process.poll() is None for process in started)
    assert all(process.poll() is not None for process in started)


def test_each_number_of_threads_is_measured(monkeypatch):
    numbers = []
    monkeypatch.setattr(jobs.threads, "default_number", lambda: 2)
    monkeypatch.setattr(jobs.threads, "set_up", lambda number, _: numbers.append(number))
    monkeypatch.setattr(jobs, "busy_processes", lambda _: contextlib.nullcontext())
    config = dict(model=dict(base_channels=16, time_emb_dim=8, patch_size=4, num_classes=None), diffusion={},
                  data=dict(shape=[1, 8, 8], class_names=["a", "b"]), training=dict(batch_size=4, conditional=False))
    speeds = jobs.busy_steps(config, 1, 0.0, 0.0, base_channels=8)["speeds"]
    assert list(speeds) == ["2 threads", "1 thread", "chosen"] and numbers == [2, 1, None]
    assert min(speeds.values()) > 0 and config["model"]["base_channels"] == 8


def test_many_pictures_are_different_and_each_is_decoded_and_read(tmp_path):
    pictures.draw_pictures(tmp_path / "many", 90)
    files = sorted((tmp_path / "many").rglob("*.png"))
    assert len(files) == len({file.read_bytes() for file in files}) == 90
    assert {file.parent.name for file in files} <= set("1234")
    assert jobs.decode_pictures(str(tmp_path / "many"))["values"] == 90 * 64 * 64 * 3
    found = jobs.read_pictures(str(tmp_path / "many"), str(tmp_path / "data"))
    assert json.loads((Path(found["cache"]) / "about.json").read_text())["count"] == 90 and found["seconds"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is told in /proc")
def test_memory_of_its_own_is_what_is_held_and_not_what_is_mapped(tmp_path):
    def most(hold):
        with pictures.own_memory() as memory:
            held = hold()
            time.sleep(0.1)
        return memory["own_mb"] + 0 * len(held)
    np.ones(100_000_000, np.uint8).tofile(tmp_path / "file")
    nothing = most(lambda: b"")
    assert 95 < most(lambda: np.ones(100_000_000, np.uint8)) - nothing < 115

    def mapped():
        pixels = np.memmap(tmp_path / "file", np.uint8, "r")
        assert pixels.sum(dtype=int) == 100_000_000
        return pixels
    assert most(mapped) - nothing < 15


def test_training_on_pictures_is_compared_with_the_same_in_memory(monkeypatch, tmp_path):
    pictures.draw_pictures(tmp_path / "many", 20)
    folder = cached(Pictures(str(tmp_path / "many"), 16), tmp_path / "data", quiet=True)
    config = dict(model=dict(base_channels=8, time_emb_dim=8, patch_size=4, num_classes=None, image_channels=3),
                  diffusion={}, data=dict(shape=[3, 16, 16], class_names=[]),
                  training=dict(batch_size=4, conditional=False))
    seen = []

    def trainer_on(*args, data, **kwargs):
        seen.append(data)
        return make_trainer(*args, data=data, **kwargs)
    make_trainer = jobs.make_trainer
    monkeypatch.setattr(jobs, "make_trainer", trainer_on)
    monkeypatch.setattr(jobs, "load_checkpoint", lambda _: dict(config=config))
    speeds = jobs.picture_steps("file", str(folder), "cpu", 0.0)["speeds"]
    assert list(speeds) == ["mapped", "in memory"] and all(len(each) == 5 and min(each) > 0 for each in speeds.values())
    assert torch.equal(seen[0].images, seen[1].images) and seen[0].images.data_ptr() != seen[1].images.data_ptr()


def test_the_ratios_of_many_pictures(monkeypatch, tmp_path, capsys):
    answers = iter([dict(seconds=9.0), dict(seconds=15.0, own_mb=300.0, cache="cache"), dict(seconds=11.0),
                    dict(own_mb=800.0), dict(speeds={"mapped": [90.0, 99.0, 10.0], "in memory": [100.0, 1.0, 200.0]})])
    asked = []
    monkeypatch.setattr(pictures, "draw_pictures", lambda folder, count: asked.append(count))
    monkeypatch.setattr(pictures.processes, "run_job", lambda job, **_: asked.append(job) or next(answers))
    found = pictures.measure_pictures(make_context(tmp_path))
    assert asked == [200_000, "decode_pictures", "read_pictures", "decode_pictures", "train_on_pictures",
                     "picture_steps"]
    assert (found["read_ratio"], found["speed_ratio"], found["own_mb"]) == (1.5, 0.9, 800.0)
    assert "1.5" in capsys.readouterr().out and "pictures" not in benchmark.chosen_parts([], "cuda")


def test_many_pictures_alone_need_no_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "load_dataset", lambda *_: pytest.fail("a data set was read"))
    args = benchmark.parse_args(["pictures", "--output_dir", str(tmp_path)])
    benchmark.check(args, benchmark.chosen_parts(args.what, "cpu"))


def test_the_operations_of_a_convolutional_network_are_those_counted_by_hand():
    """Two 3×3 convolutions on 8×8 and a matrix: 2 · B · H · W · C_in · C_out · 9 each, and 2 · B · in · out."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 3, padding=1), nn.Flatten(),
                            nn.Linear(7 * 64, 11))
    x = torch.randn(4, 3, 8, 8)
    first, second, last = 2 * 4 * 64 * 3 * 5 * 9, 2 * 4 * 64 * 5 * 7 * 9, 2 * 4 * 7 * 64 * 11
    assert sum(jobs.count_flops(lambda: network(x)).values()) == first + second + last
    # The backward pass costs that twice, but the gradient by the input image is not asked for.
    both = jobs.count_flops(lambda: network(x).sum().backward())
    assert sum(both.values()) == 3 * (first + second + last) - first


def test_attention_counts():
    q = torch.randn(2, 3, 16, 8)
    counted = jobs.count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert sum(counted.values()) == 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_a_power_law_is_found():
    xs = [1, 2, 4, 8]
    assert_close(scaling.power(xs, [3 * x**1.5 for x in xs]), 1.5)


def test_ratios_are_above_one_where_the_first_wins():
    assert tables.ratios({"a": 10.0, "b": 2.0}, smaller_is_better=False) == {"a against b": 5.0}
    assert tables.ratios({"a": 10.0, "b": 2.0}, smaller_is_better=True) == {"a against b": 0.2}
    assert tables.ratios({"a": 10.0}, smaller_is_better=True) == {}
    assert tables.ratios({"a": 0.1, "b": -0.1, "c": 0.2}, smaller_is_better=True) == {"a against c": 2.0}
    assert tables.ratios({"a": -0.1, "b": 0.1}, smaller_is_better=True) == {}
    assert tables.ratios({"a": 0.1, "b": None, "c": 0.2}, smaller_is_better=True) == {"a against c": 2.0}


def test_the_speed_of_an_epoch_is_that_of_all_its_records():
    """Two epochs of 60 steps, the second at half the speed at first and at the same in its last ten steps."""
    records = [dict(step=50, epoch=0, images_per_second=100.0), dict(step=60, epoch=1, images_per_second=100.0),
               dict(step=110, epoch=1, images_per_second=50.0), dict(step=120, epoch=2, images_per_second=100.0)]
    assert_close(speed.epoch_speeds(records, 60), [100.0, 60 / (50 / 50 + 10 / 100)])


@pytest.mark.parametrize("images, sampler, rate, from_images, from_steps", [
    (64, "few", 1e9, None, None),           # fast: all of it is measured
    (64, "ddpm", 150, 64, 70),              # 4,500 evaluations in 30 s: fewer steps
    (10_000, "few", 150, 448, 10),          # fewer images, whole batches
    (10_000, "few", 1, 64, 10),             # never fewer than a batch
])
def test_a_time_beyond_the_limit_is_extrapolated_and_marked(images, sampler, rate, from_images, from_steps, tmp_path,
                                                             monkeypatch):
    """With a sampler whose time is exactly images · steps / rate, the extrapolation is exact."""
    context = make_context(tmp_path, "--limit", "30")
    monkeypatch.setattr(context, "sample", lambda name, images, sampler, steps: dict(seconds=images * steps / rate))
    row = speed.sample_row(context, "fast", images, sampler, rate)
    assert_close(row["seconds"], images * row["steps"] / rate)
    source = row["extrapolated_from"]
    assert (source and source["images"], source and source["steps"]) == (from_images, from_steps)
    monkeypatch.setattr(context, "sample", lambda name, images, sampler, steps: dict(seconds=2 + images * steps / rate))
    with_overhead = speed.sample_row(context, "fast", images, sampler, rate, overhead=2.0)
    assert_close(with_overhead["seconds"], 2 + row["seconds"])


def test_a_peer_makes_the_images_that_its_time_allows(monkeypatch):
    clock = [0.0]

    class Peer:
        device = torch.device("cpu")

        def sample(self, count, sampler, steps, weights):
            clock[0] += count
            return torch.zeros(count, 1, 2, 2)
    monkeypatch.setattr(jobs, "now", lambda _: clock[0])
    for seconds, expected in ((1e9, 1000), (400, 448), (0, 256)):  # parts of 64: the seventh begins at 384
        assert sum(map(len, jobs.images_in_time(Peer(), 1000, 20, None, seconds))) == expected


def stub_scripts(monkeypatch, tmp_path, *argv, made=None):
    """A Context, and the scripts that it calls; evaluate.py reports on `made` images, or on --num_images."""
    context, asked = make_context(tmp_path, *argv), []

    def script(name, argv):
        asked.append([name, *argv])
        flag = dict(pairwise(argv))
        if name == "evaluate.py":
            folder = Path(flag["--output_dir"])
            folder.mkdir(parents=True, exist_ok=True)
            figures = dict(frechet_distance=dict(value=3.0, floor=1.0, low=2.5, high=3.5), confident=dict(value=0.5))
            found = dict(figures=figures, num_images=made or int(flag["--num_images"]))
            (folder / "evaluation.json").write_text(json.dumps(found))
        return dict(output="64 images by x in 20 steps: 0.50 s", process_seconds=1.0)
    monkeypatch.setattr(processes, "run_script", script)
    monkeypatch.setattr(quality, "load_checkpoint", lambda _: dict(images_seen=7))
    return context, asked


def test_fewer_images_than_asked_for_are_told_of(monkeypatch, tmp_path, capsys):
    context, asked = stub_scripts(monkeypatch, tmp_path, "quality", "--contestants", "fast", "--budgets", "5m",
                                  "--num_images", "1000", "--image_time", "2s")
    (tmp_path / "model_final.pt").write_bytes(b"weights")
    monkeypatch.setattr(context, "train", lambda *_, **__: dict(folder=tmp_path, process_seconds=1.0))
    found = quality.measure_quality(context)
    [row] = found["rows"]
    assert not found["ratios"]  # too few images to be compared
    assert (tmp_path / "quality" / "fast_300s" / "model_final.pt").read_bytes() == b"weights"
    assert (row["num_images"], row["budget"], row["above_floor"]) == (256, 300, 2.0)  # 64 take half a second
    assert "--num_images 256" in " ".join(asked[-1]) and "only 256 of 1,000 images" in capsys.readouterr().out


def test_the_ratios_of_quality_take_the_first_at_the_upper_end_of_its_interval(monkeypatch, tmp_path):
    context, _ = stub_scripts(monkeypatch, tmp_path, "quality", "--contestants", "fast", "ddpm", "--budgets", "1m",
                              "2m")
    (tmp_path / "model_final.pt").write_bytes(b"weights")
    monkeypatch.setattr(context, "train", lambda *_, **__: dict(folder=tmp_path, process_seconds=1.0))
    pair = {"fast against ddpm": (3.0 - 1.0) / (3.5 - 1.0)}  # values and upper end above the floor
    assert quality.measure_quality(context)["ratios"] == {"60 s, at least": pair, "120 s, at least": pair}


def test_the_seconds_of_the_gpu_part_are_those_of_training(monkeypatch, tmp_path):
    """A run whose start and end take 7 s, and an epoch's log that begins after 50 steps."""
    context, _ = stub_scripts(monkeypatch, tmp_path, "gpu")
    budgets = []

    def train(name, *flags):
        budgets.append(flags[-1])
        first = dict(seconds=5.0 + 6400 / 1e4, images_seen=6400, images_per_second=1e4)
        last = dict(seconds=flags[-1] - 2.0, images_seen=1, images_per_second=1.0)
        return dict(folder=tmp_path, process_seconds=1.0, records=[first, last])
    monkeypatch.setattr(context, "train", train)
    rows = quality.measure_gpu(context)["rows"]
    assert budgets == [20, 17, 70, 67]
    assert [(row["budget"], row["sampling_seconds"]) for row in rows.values()] == [(10, 0.5), (60, 0.5)]
    assert "gpu" in benchmark.chosen_parts([], "cuda") and "gpu" not in benchmark.chosen_parts([], "cpu")
    assert benchmark.chosen_parts(["gpu"], "cpu") == ["gpu"]


def test_memory_is_that_of_this_process_alone(monkeypatch):
    """A child of a large process is small, although ru_maxrss would count its parent."""
    ballast = bytearray(300 * 2**20)
    code = "import importlib.util as u; from pathlib import Path; print(Path('/proc/self/status').read_text())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert len(ballast) / 1e6 < jobs.peak_memory()
    if "VmHWM" in child:
        assert int(child.split("VmHWM:")[1].split()[0]) * 1024 < len(ballast)
        monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=10**9))  # that of the parent
        assert jobs.peak_memory() < 10**5


def test_where_memory_and_load_cannot_be_measured_they_are_null(monkeypatch, tmp_path, capsys):
    """As on Windows, which has neither resource nor os.getloadavg()."""
    monkeypatch.setattr(jobs, "Path", lambda _: tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert json.loads(json.dumps(jobs.run('{"job": "imports"}')))["peak_mb"] is None
    monkeypatch.delattr(os, "getloadavg", raising=False)
    described = machine.describe_machine("cpu")
    assert described["load"] is None
    benchmark.print_machine(described, False)
    tables.print_row("steps", 5, 1.0, None)
    assert "load unknown" in (said := capsys.readouterr().out) and said.rstrip().endswith("unknown")
    points = [dict(value=value, seconds=1.0 * value, peak_mb=None) for value in (5, 10)]
    found = dict(contestant="fast", axes=dict(steps=dict(points=points, power=dict(
        seconds=scaling.power([5, 10], [5.0, 10.0]), peak_mb=scaling.power([5, 10], [None, None])))))
    plots.plot_scaling(found, tmp_path / "scaling.png")
    assert found["axes"]["steps"]["power"]["peak_mb"] is None and (tmp_path / "scaling.png").stat().st_size


def test_a_job_finds_its_modules_from_every_folder(monkeypatch, tmp_path):
    """Even from a folder that has a module of the same name; a failed job tells its last line."""
    (tmp_path / "utils.py").write_text("raise SystemExit('the wrong utils')")
    monkeypatch.chdir(tmp_path)
    assert processes.run_job("imports")["peak_mb"] != 0
    with pytest.raises(RunFailed, match="--device auto"):
        processes.run_job("peer_sample", name="diffusers", shape=[1, 8, 8], device="abacus", images=1, sampler="few",
                          steps=1)


def test_the_weights_and_images_of_a_peer_are_kept_where_the_results_are(monkeypatch, tmp_path):
    peer = SimpleNamespace(device=torch.device("cpu"), network=nn.Linear(2, 2), train_step=lambda _: time.sleep(0.01),
                           snapshot=lambda: dict(w=torch.ones(3)),
                           sample=lambda count, *_: torch.zeros(count, 1, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(jobs, "prepare_peer", lambda *_: (peer, iter(range(10**9)), None))
    monkeypatch.chdir(tmp_path)
    context = SimpleNamespace(
        args=SimpleNamespace(budgets=[0.05, 0.1], num_images=70, image_time=9.0, output_dir="out", dataset="glyphs"),
        plan=SimpleNamespace(batch_size=4, few_steps=1), data=dict(dataset="glyphs", data_dir="data", device="cpu"))
    monkeypatch.setattr(processes, "run_job", lambda _, **fields: jobs.peer_quality(**fields))
    monkeypatch.setattr(quality, "evaluate", lambda *given: given)
    rows = list(quality.peer_quality(context, "diffusers"))
    for budget, row in zip((0.05, 0.1), rows, strict=True):
        place = quality.quality_folder(context, "diffusers", budget)
        assert place.is_absolute() and str(place / "images.npz") in row
        assert np.load(place / "images.npz")["arr_0"].shape == (70, 8, 8, 1)
        assert torch.equal(torch.load(place / "weights.pt", weights_only=True)["w"], torch.ones(3))


def test_the_named_configurations_are_flags_of_train():
    parser = flags.make_parser("")
    assert OURS["first_try"]
    for argv in OURS.values():
        parser.parse_args(argv)
    args = parser.parse_args(OURS["first_try"])
    assert (args.base_channels, args.depth, args.patch_size, args.optimizer, args.lr) == (32, 2, 2, "adamw", 2e-3)
    assert (args.middle_depth, args.noise_mean, args.noise_std, args.conditional) == (2, -0.5, 1.2, False)


@pytest.mark.parametrize("argv, said", [
    (["speed"], "must be one of train, sample"),
    (["train", "--contestants", "nobody"], "invalid choice"),
    (["quality", "--budgets", "soon"], "90s, 10m or 1.5h"),
    (["--device", "abacus"], "not available"),
    (["--limit", "-1"], "from 0 up"), (["quality", "--num_images", "100"], "256"),
    (["scaling", "--contestants", "diffusers"], "--contestants"),
])
def test_what_cannot_be_is_told_in_one_line(argv, said, data_dir, tmp_path, capsys):
    assert call(*argv, "--dataset", "glyphs", "--data_dir", data_dir, "--output_dir", tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]


def test_missing_peers_are_told_of_and_left_out(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    args = benchmark.parse_args(["train", "--dataset", "glyphs", "--data_dir", str(data_dir), "--output_dir",
                                 str(tmp_path)])
    benchmark.check(args, ["train"])
    assert capsys.readouterr().err == ("Left out diffusers and denoising-diffusion-pytorch: pip install -r "
                                       "requirements-bench.txt\n")
    assert Context(args, "cpu", benchmark.FULL, tmp_path).contestants == ["fast", "ddpm", "first_try"]
    assert call("train", "--contestants", "diffusers", "--dataset", "glyphs", "--data_dir", data_dir, "--output_dir",
                tmp_path) == 2


def test_a_job_that_fails_is_told_of_and_does_not_stop_the_rest(tmp_path, capsys):
    context = make_context(tmp_path)

    def measure(name):
        if name == "ddpm":
            raise RunFailed("it broke")
        return 1
    assert context.measure_each("train", measure, ["fast", "ddpm"]) == {"fast": 1}
    assert context.errors == {"train ddpm": "it broke"} and "ddpm failed: it broke" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers' own
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_has_the_textbooks_size_and_makes_images(name):
    if find_spec(peers.PEERS[name].package) is None:
        pytest.skip(f"{name} is missing: pip install -r requirements-bench.txt")
    made = peers.make_peer(name, (1, 28, 28), "cpu")
    assert 1.7e6 < sum(weight.numel() for weight in made.network.parameters()) < 2.1e6
    assert made.train_step(torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)) > 0
    kept = made.snapshot()
    for sampler in ("few", "ddpm"):
        images = made.sample(2, sampler, 2, kept)
        assert images.shape == (2, 1, 28, 28) and images.dtype == torch.uint8


def test_a_job_ends_with_the_benchmark_that_started_it(monkeypatch):
    given, parents = [], []
    monkeypatch.setattr(processes, "_run", lambda argv, **_: given.append(argv[-1]) or dict(output="{}"))
    processes.run_job("imports")
    monkeypatch.setattr(jobs, "end_with", parents.append)
    monkeypatch.setitem(jobs.JOBS, "imports", dict)
    jobs.run(given[0])
    assert parents == [os.getpid()]
