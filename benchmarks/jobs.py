"""The jobs of benchmark.py. Each runs in a process of its own, so that its memory and threads are its own.

    python -m benchmarks.jobs '{"job": "imports"}'

A job is a function of JSON values and returns a dict of JSON values; `run` adds the peak memory of the process.
"""

import contextlib
import inspect
import io
import json
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import SAMPLE_BATCH, make_peer
from benchmarks.pictures import decode_pictures, own_memory, read_pictures
from benchmarks.processes import ROOT
from checkpoint import load_checkpoint, load_model
from data import ImageData, code_of, load_dataset
from evaluation.copies import FEW
from learned_variance import create_process
from models import create_model
from runtime import threads
from runtime.children import end_with
from runtime.files import atomic_write
from runtime.script import script as entry_point
from samplers import final_image, generate
from training.autotune import LAYOUTS, now, set_up_cuda
from training.cuda_graph import CudaGraph
from training.trainer import Trainer
from utils import autocast, count_parameters, get_device

WARM_UP, LEAST_CALLS = 2, 3
# Parts of the names of operations that are convolutions, matrix products or attention.
ARITHMETIC = ("conv", "mm", "gemm", "matmul", "attention", "flash", "cutlass", "xmma")


def run(text: str) -> dict:
    """Run the job that a JSON text describes."""
    fields = json.loads(text)
    if parent := fields.pop("parent", None):
        end_with(parent)
    result = JOBS[fields.pop("job")](**fields)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        result["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return dict(result, peak_mb=peak_memory())


def peak_memory() -> float | None:
    """The peak memory of this process in 10^6 bytes; None on Windows.

    From /proc where it exists, because ru_maxrss also counts what the parent held when it started this process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def time_calls(step: Callable, device: torch.device, seconds: float) -> list[float]:
    """The seconds of each call of step(), repeated for about `seconds`, but LEAST_CALLS times, after a warm-up."""
    for _ in range(WARM_UP + CudaGraph.WARM_UP * (device.type == "cuda")):
        step()
    times, end = [], now(device) + seconds
    while len(times) < LEAST_CALLS or time.perf_counter() < end:
        start = now(device)
        step()
        times.append(now(device) - start)
    return times


def imports() -> dict:
    """Do nothing: for the peak memory of a process that has imported torch and this project."""
    return {}


# ------------------------------------------------------------------------------------------------------------- ours


def script(name: str, argv: list[str]) -> dict:
    """Run a script of this project in this process, as from a shell; returns its "output"."""
    sys.argv, output = [name, *argv], io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return dict(output=output.getvalue())


def make_trainer(config: dict, image_size: int | None, batch_size: int | None, device: torch.device,
                 cuda_graph: bool = False, data: ImageData | None = None) -> Trainer:
    """A Trainer as the config of a checkpoint says, on these images; by default on random ones, for the same time."""
    set_up_cuda(device)
    training, (channels, height, width) = dict(config["training"]), config["data"]["shape"]
    training["batch_size"] = batch_size or training["batch_size"]
    if data is None:
        shape = (2 * training["batch_size"], channels, image_size or height, image_size or width)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        labels = torch.zeros(len(images), dtype=torch.long)
        data = ImageData("noise", "train", images, labels, tuple(config["data"]["class_names"])).to(device)
    accepted = inspect.signature(Trainer).parameters
    model = create_model(**config["model"]).to(device, memory_format=LAYOUTS[training.get("layout") or "nchw"])
    diffusion = create_process(model.learn_variance, data.code.edges, **config["diffusion"]).to(device)
    return Trainer(data, model, diffusion, cuda_graph=cuda_graph,
                   **{name: value for name, value in training.items() if name in accepted})


def train_steps(config: dict, device: str, seconds: float, batch_size: int | None = None,
                base_channels: int | None = None, image_size: int | None = None) -> dict:
    """The median of the seconds of a training step."""
    if base_channels:
        config["model"]["base_channels"] = base_channels
    device = get_device(device)
    trainer = make_trainer(config, image_size, batch_size, device, cuda_graph=device.type == "cuda")
    times = time_calls(lambda: trainer.train_step(*trainer.batch(), 0.5), trainer.device, seconds)
    return dict(seconds=statistics.median(times), batch_size=trainer.batch_size,
                parameters=count_parameters(trainer.model))


def train_on_pictures(argv: list[str]) -> dict:
    """Run train.py; the most memory of its own that the process had."""
    with own_memory() as memory:
        script("train.py", argv)
    return memory


def picture_steps(checkpoint: str, cache: str, device: str, seconds: float) -> dict:
    """Images a second of training on pictures, mapped from the file of their cache and in memory: five turns of each.

    Each trainer takes another part of the pictures every time, as in training.
    """
    config, device = load_checkpoint(checkpoint)["config"], get_device(device)
    data = load_dataset(Path(cache), "train").coded(code_of(config))
    kinds = {"mapped": data, "in memory": replace(data, images=data.images.clone())}
    trainers = {kind: make_trainer(config, None, None, device, data=each.to(device)) for kind, each in kinds.items()}

    def measure(trainer: Trainer) -> float:
        times = time_calls(lambda: trainer.train_step(*trainer.batch(), 0.5), device, seconds)
        return trainer.batch_size * len(times) / sum(times)
    turns = [{kind: measure(trainer) for kind, trainer in trainers.items()} for _ in range(5)]
    return dict(speeds={kind: [turn[kind] for turn in turns] for kind in kinds})


def busy_steps(config: dict, busy: int, seconds: float, chosen_seconds: float, base_channels: int) -> dict:
    """Images a second of training beside `busy` busy processes, for each number of threads and for the chosen one."""
    device, speeds = torch.device("cpu"), {}
    config["model"]["base_channels"] = base_channels
    trainer = make_trainer(config, None, None, device)

    def measure(number: int | None, seconds: float) -> float:
        threads.set_up(number, device)
        tuner = threads.ThreadTuner()

        def step():
            with tuner:
                trainer.train_step(*trainer.batch(), 0.5)
        times = time_calls(step, device, seconds)
        return trainer.batch_size * len(times) / sum(times)

    with contextlib.redirect_stdout(sys.stderr), busy_processes(busy):
        for number in threads.numbers_to_try(threads.default_number()):
            speeds[f"{number} thread{'s' * (number > 1)}"] = measure(number, seconds)
        return dict(speeds=speeds | dict(chosen=measure(None, chosen_seconds)))


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` other processes busy. They end by themselves after ten minutes, should this one be killed."""
    code = "import time; end = time.time() + 600\nwhile time.time() < end: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def sample_steps(checkpoint: str, device: str, images: int, steps: int) -> dict:
    """Seconds of sampling, after a warm-up of two steps."""
    model, diffusion, saved = load_model(checkpoint, get_device(device))

    def make(steps: int) -> None:
        for _, trajectory in generate(model, diffusion, saved["config"]["data"]["shape"], range(images), steps=steps):
            final_image(trajectory)

    with autocast(diffusion.device, saved["precision"]):
        make(WARM_UP)
        start = now(diffusion.device)
        make(steps)
        return dict(seconds=now(diffusion.device) - start, images=images, steps=steps)


# ------------------------------------------------------------------------------------------------- FLOP/s, peak FLOP/s


def matrix_product_gflops(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """GFLOP/s of the fastest of several products of two size × size matrices, 2 · size³ operations each."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(time_calls(lambda: a @ b, device, seconds)) / 1e9


def count_flops(step: Callable) -> dict[str, int]:
    """FLOPs of step() for each kind of operation; a multiplication and an addition count as two.

    Counts convolutions and matrix products, also in the backward pass. Attention is computed by its formula, because
    the counter does not see the fused kernels.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return {str(name).removeprefix("aten."): flops for name, flops in counter.get_flop_counts()["Global"].items()}


def time_by_operation(step: Callable, device: torch.device) -> dict[str, float]:
    """The share of the time of step() that each operation takes, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        now(device)
    spent = {each.key: each.self_device_time_total if cuda else each.self_cpu_time_total
             for each in profiler.key_averages()}
    total = sum(spent.values()) or 1
    return {name: round(spent[name] / total, 4) for name in sorted(spent, key=spent.get, reverse=True)}


def peak(config: dict, device: str, seconds: float, size: int) -> dict:
    """GFLOP/s of the fastest matrix product and of a training step, and which operations take the time of the step.

    "arithmetic": the share of the time in the operations whose FLOPs are counted; if it is small, memory and overhead
    limit the speed. "share_within": the share of the peak that these operations reach; if it is small, the shapes of
    the tensors limit the speed.
    """
    device = get_device(device)
    set_up_cuda(device)
    products = {"fp32": matrix_product_gflops(size, torch.float32, device, seconds / 4),
                "bf16": matrix_product_gflops(size, torch.bfloat16, device, seconds / 4)}
    trainer = make_trainer(config, None, None, device, cuda_graph=device.type == "cuda")
    step_seconds = statistics.median(time_calls(lambda: trainer.train_step(*trainer.batch(), 0.5), device, seconds / 2))
    trainer = make_trainer(config, None, None, device)  # FLOPs cannot be counted inside a CUDA graph

    def step():
        return trainer.train_step(*trainer.batch(), 0.5)

    step()
    flops, shares = count_flops(step), time_by_operation(step, device)
    gflops, best = sum(flops.values()) / step_seconds / 1e9, max(products.values())
    arithmetic = sum(share for name, share in shares.items() if any(word in name.lower() for word in ARITHMETIC))
    return dict(matrix_size=size, matrix_gflops=products, step_flops=sum(flops.values()), by_operation=flops,
                step_seconds=step_seconds, batch_size=trainer.batch_size, precision=trainer.precision,
                step_gflops=gflops, share_of_best=gflops / best, share_of_own=gflops / products[trainer.precision],
                arithmetic=arithmetic, share_within=gflops / best / max(arithmetic, 1e-9),
                slowest=dict(list(shares.items())[:8]))


# ------------------------------------------------------------------------------------------------------------- peers


def batches(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Endless random batches: epochs in a new order each time, without the incomplete batch at the end."""
    while True:
        order = torch.randperm(len(images)).to(images.device)
        yield from (images[rows] for rows in order.split(batch_size) if len(rows) == min(batch_size, len(images)))


def prepare_peer(name: str, dataset: str, data_dir: str, device: str, batch_size: int):
    """(peer, endless batches of the training images of a data set, device)."""
    device = get_device(device)
    data = load_dataset(dataset, "train", data_dir).to(device)
    peer = make_peer(name, data.images.shape[1:], device, len(data.images), batch_size)
    return peer, batches(data.images, batch_size), device


def peer_train(name: str, dataset: str, data_dir: str, device: str, batch_size: int, seconds: float) -> dict:
    """The training speed of a peer, in images per second for each step."""
    peer, source, device = prepare_peer(name, dataset, data_dir, device, batch_size)
    times = time_calls(lambda: peer.train_step(next(source)), device, seconds)
    return dict(speeds=[batch_size / step_seconds for step_seconds in times],
                parameters=count_parameters(peer.network))


def peer_sample(name: str, shape: list[int], device: str, images: int, sampler: str, steps: int) -> dict:
    """Seconds of sampling with a peer, without a warm-up."""
    peer = make_peer(name, shape, get_device(device))
    start = now(peer.device)
    peer.sample(images, sampler, steps)
    return dict(seconds=now(peer.device) - start)


def images_in_time(peer, images: int, steps: int, weights, seconds: float) -> Iterator[torch.Tensor]:
    """Batches of up to `images` images by the fast sampler of a peer.

    Starts none after `seconds`, unless there are fewer than the FEW images that figures need.
    """
    start, count = now(peer.device), 0
    while count < images and (count < FEW or now(peer.device) - start < seconds):
        part = peer.sample(min(SAMPLE_BATCH, images - count), "few", steps, weights)
        count += len(part)
        yield part


def peer_quality(name: str, dataset: str, data_dir: str, device: str, batch_size: int, budgets: list[float],
                 folders: list[str], images: int, steps: int, image_seconds: float, started: float) -> dict:
    """Train a peer, keep its EMA weights at each budget (seconds since `started`), then write images made with each.

    One run serves all budgets, because the training of a peer does not depend on how long it will last. image_seconds:
    the sampling time for each budget. The budgets rise, and each has one of the folders, which gets weights.pt and
    images.npz.
    """
    peer, source, _ = prepare_peer(name, dataset, data_dir, device, batch_size)
    rows, snapshots, step = [], [], 0
    for budget in budgets:
        while time.time() - started < budget:
            peer.train_step(next(source))
            step += 1
        rows.append(dict(budget=budget, seconds=time.time() - started, images_seen=step * batch_size))
        snapshots.append(peer.snapshot())
    for row, weights, folder in zip(rows, snapshots, folders, strict=True):
        with atomic_write(f"{folder}/weights.pt") as file:
            torch.save(weights, file)
        samples = torch.cat(list(images_in_time(peer, images, steps, weights, image_seconds)))
        row["images"] = f"{folder}/images.npz"
        with atomic_write(row["images"]) as file:
            np.savez_compressed(file, arr_0=samples.permute(0, 2, 3, 1).numpy())
    return dict(rows=rows, parameters=count_parameters(peer.network))


JOBS = {job.__name__: job for job in (imports, script, train_steps, busy_steps, sample_steps, peak, peer_train,
                                      peer_sample, peer_quality, decode_pictures, read_pictures, train_on_pictures,
                                      picture_steps)}


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    [text] = sys.argv[1:] if argv is None else argv
    print(json.dumps(run(text)))


if __name__ == "__main__":
    sys.exit(main())
