"""What benchmark.py measures, one job in a process of its own, so that memory and threads are that job's alone.

A job is a function of JSON values that returns a dict of them; `work` adds the memory that its process took.
"""

import contextlib
import inspect
import io
import json
import resource
import runpy
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import BATCH, make_peer
from checkpoint import load_model
from data import ImageData, load_dataset
from learned_variance import create_process
from models import create_model
from runtime.files import atomic_write
from samplers import final_image, generate
from training.autotune import LAYOUTS, Recorded, now, prepare
from training.trainer import Trainer
from utils import autocast, count_parameters, get_device

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, LEAST_STEPS = 2, 3
ARITHMETIC = ("conv", "mm", "gemm", "matmul", "attention", "flash", "cutlass", "xmma")  # in names of operations


def work(text: str) -> dict:
    """Do the job that a JSON text describes."""
    fields = json.loads(text)
    result = JOBS[fields.pop("job")](**fields)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        result["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return dict(result, peak_mb=peak_memory())


def peak_memory() -> float:
    """The most memory that this process has held, in 10^6 bytes.

    From /proc where there is one: ru_maxrss counts what the parent held when it started this process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def times(step, device: torch.device, seconds: float) -> list[float]:
    """Seconds of each call of step(), after WARM_UP calls, for about `seconds`, but LEAST_STEPS calls."""
    for _ in range(WARM_UP + Recorded.WARM_UP * (device.type == "cuda")):
        step()
    taken, end = [], now(device) + seconds
    while len(taken) < LEAST_STEPS or time.perf_counter() < end:
        start = now(device)
        step()
        taken.append(now(device) - start)
    return taken


def nothing() -> dict:
    """What every process takes that has imported torch and this project."""
    return {}


# ------------------------------------------------------------------------------------------------------------- ours


def script(name: str, argv: list[str]) -> dict:
    """Run a script of this project as a shell would, in this process; returns what it printed."""
    sys.argv, output = [name, *argv], io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return dict(output=output.getvalue())


def make_trainer(config: dict, image_size: int | None, batch_size: int | None, device: torch.device,
                 recorded: bool = False) -> Trainer:
    """A trainer by a checkpoint's config, on random images: what they show changes no time. recorded: as Trainer's."""
    prepare(device)
    training, (channels, height, width) = dict(config["training"]), config["data"]["shape"]
    training["batch_size"] = batch_size or training["batch_size"]
    shape = (2 * training["batch_size"], channels, image_size or height, image_size or width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.long)
    data = ImageData("noise", "train", images, labels, tuple(config["data"]["class_names"])).to(device)
    accepted = inspect.signature(Trainer).parameters
    model = create_model(**config["model"]).to(device, memory_format=LAYOUTS[training.get("layout") or "nchw"])
    diffusion = create_process(model.learn_variance, **config["diffusion"]).to(device)
    return Trainer(data, model, diffusion, recorded=recorded,
                   **{name: value for name, value in training.items() if name in accepted})


def train_steps(config: dict, device: str, seconds: float, batch_size: int | None = None,
                base_channels: int | None = None, image_size: int | None = None) -> dict:
    """Seconds of a training step: the median."""
    if base_channels:
        config["model"]["base_channels"] = base_channels
    device = get_device(device)
    trainer = make_trainer(config, image_size, batch_size, device, recorded=device.type == "cuda")
    taken = times(lambda: trainer.train_step(0.5), trainer.device, seconds)
    return dict(seconds=statistics.median(taken), batch_size=trainer.batch_size,
                parameters=count_parameters(trainer.model))


def sample_steps(checkpoint: str, device: str, images: int, steps: int) -> dict:
    """Seconds for some images in so many steps, by a sampler that has been warmed up by two."""
    model, diffusion, saved = load_model(checkpoint, get_device(device))

    def make(steps: int) -> None:
        for _, trajectory in generate(model, diffusion, saved["config"]["data"]["shape"], range(images), steps=steps):
            final_image(trajectory)

    with autocast(diffusion.device, saved["precision"]):
        make(WARM_UP)
        start = now(diffusion.device)
        make(steps)
        return dict(seconds=now(diffusion.device) - start, images=images, steps=steps)


# ------------------------------------------------------------------------------------------------- share of the peak


def matrix_product(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """GFLOP/s of the fastest product of two size × size matrices: 2 · size³ operations."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(times(lambda: a @ b, device, seconds)) / 1e9


def count_flops(step) -> dict[str, int]:
    """Floating-point operations of step() by the operation: a multiplication and an addition count as two.

    Convolutions and matrix products, the backward pass included; attention is done by its formula, so that it counts.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return {str(name).removeprefix("aten."): flops for name, flops in counter.get_flop_counts()["Global"].items()}


def spent_on(step, device: torch.device) -> dict[str, float]:
    """Which operations take the time of step(), in shares of all of it, the longest first: what limits the speed."""
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
    """GFLOP/s of the best matrix product and of a training step, in this one process, and what the step spends.

    `arithmetic` is the share of the time in the operations that are counted, and `share_within` what these reach of the
    peak: where the first is small, memory and overhead limit the speed, where the second is, the shapes do.
    """
    device = get_device(device)
    prepare(device)
    products = {"fp32": matrix_product(size, torch.float32, device, seconds / 4),
                "bf16": matrix_product(size, torch.bfloat16, device, seconds / 4)}
    trainer = make_trainer(config, None, None, device, recorded=device.type == "cuda")
    taken = statistics.median(times(lambda: trainer.train_step(0.5), device, seconds / 2))
    trainer = make_trainer(config, None, None, device)  # nothing can be counted within a CUDA graph

    def step():
        return trainer.train_step(0.5)

    step()
    flops, spent = count_flops(step), spent_on(step, device)
    reached, best = sum(flops.values()) / taken / 1e9, max(products.values())
    arithmetic = sum(share for name, share in spent.items() if any(word in name.lower() for word in ARITHMETIC))
    return dict(matrix_size=size, matrix_gflops=products, step_flops=sum(flops.values()), by_operation=flops,
                step_seconds=taken, batch_size=trainer.batch_size, precision=trainer.precision, step_gflops=reached,
                share_of_best=reached / best, share_of_own=reached / products[trainer.precision],
                arithmetic=arithmetic, share_within=reached / best / max(arithmetic, 1e-9),
                slowest=dict(list(spent.items())[:8]))


# ------------------------------------------------------------------------------------------------------------- peers


def batches(images: torch.Tensor, batch_size: int):
    """Random batches of the images without end, all images once before any comes again."""
    while True:
        order = torch.randperm(len(images)).to(images.device)
        yield from (images[rows] for rows in order.split(batch_size) if len(rows) == min(batch_size, len(images)))


def open_peer(peer: str, dataset: str, data_dir: str, device: str, batch_size: int):
    """(the peer, its batches, device) on the training images of a data set."""
    device = get_device(device)
    data = load_dataset(dataset, "train", data_dir).to(device)
    made = make_peer(peer, data.images.shape[1:], device, len(data.images), batch_size)
    return made, batches(data.images, batch_size), device


def peer_train(peer: str, dataset: str, data_dir: str, device: str, batch_size: int, seconds: float) -> dict:
    """A peer's images a second in training, step by step."""
    made, source, device = open_peer(peer, dataset, data_dir, device, batch_size)
    taken = times(lambda: made.train_step(next(source)), device, seconds)
    return dict(speeds=[batch_size / each for each in taken], parameters=count_parameters(made.network))


def peer_sample(peer: str, shape: list[int], device: str, images: int, sampler: str, steps: int) -> dict:
    """Seconds that a peer takes for images, its first call included."""
    made = make_peer(peer, shape, get_device(device))
    start = now(made.device)
    made.sample(images, sampler, steps)
    return dict(seconds=now(made.device) - start)


def images_in_time(made, images: int, steps: int, weights, seconds: float) -> Iterator[torch.Tensor]:
    """Parts of so many images by a peer's fast sampler; none that would begin after `seconds`."""
    start, count = now(made.device), 0
    while count < images and (not count or now(made.device) - start < seconds):
        part = made.sample(min(BATCH, images - count), "few", steps, weights)
        count += len(part)
        yield part


def peer_quality(peer: str, dataset: str, data_dir: str, device: str, batch_size: int, budgets: list[float],
                 images: int, steps: int, image_seconds: float, folder: str, started: float) -> dict:
    """Train a peer until each of the budgets, counted from `started`, and write the images that it makes then.

    One run serves all budgets, for nothing in a peer's training depends on how long it will be. Images are made after
    all of it, in image_seconds for each budget, out of the averaged weights that were kept there.
    """
    made, source, _ = open_peer(peer, dataset, data_dir, device, batch_size)
    rows, kept, step = [], [], 0
    for budget in sorted(budgets):
        while time.time() - started < budget:
            made.train_step(next(source))
            step += 1
        rows.append(dict(budget=budget, seconds=time.time() - started, images_seen=step * batch_size))
        kept.append(made.snapshot())
    for row, weights in zip(rows, kept, strict=True):
        row["images"] = f"{folder}/{peer}_{row['budget']:g}s.npz"
        made_images = torch.cat(list(images_in_time(made, images, steps, weights, image_seconds)))
        with atomic_write(row["images"]) as file:
            np.savez_compressed(file, arr_0=made_images.permute(0, 2, 3, 1).numpy())
    return dict(rows=rows, parameters=count_parameters(made.network))


JOBS = {job.__name__: job for job in (nothing, script, train_steps, sample_steps, peak, peer_train, peer_sample,
                                      peer_quality)}
