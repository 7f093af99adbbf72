"""Measure speed, memory and quality on this machine, ours and that of other toolkits, in one run and with ratios.

    python benchmark.py
    python benchmark.py train sample --contestants fast ddpm
    python benchmark.py quality --budgets 1m 3m 10m --num_images 5000
    python benchmark.py gpu

train    images a second in training              sample   seconds for 64 and for 10,000 images
memory   peak memory of training and sampling     scaling  how time and memory grow with batch, width, size and steps
peak     share of the machine's best matrix product that a training step reaches, and what takes its time
quality  Fréchet distance above the floor after training for each of --budgets, the images by the default steps of a
         fast sampler (ours: that of sample.py; diffusers: DPM-Solver++; denoising-diffusion-pytorch: DDIM)
gpu      on CUDA: quality after 10 s on MNIST and 60 s on Fashion-MNIST, start-up aside, and seconds for 10,000 images

Contestants are recipes of train.py, the named configurations in benchmarks/*.txt and, where they are installed (pip
install -r requirements-bench.txt), other toolkits. The first is what the ratios compare with. Every measurement is a
process of its own. Writes benchmark.json, benchmark_scaling.png and benchmark_quality.png. Keep the machine idle.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from benchmarks.peers import PEERS, installed
from benchmarks.plots import PLOTS
from checkpoint import load_checkpoint
from data import load_dataset
from runtime.errors import RunFailed, UserError
from runtime.files import atomic_write, check_writable, write_json
from runtime.parser import Parser, add_shared_flags, duration, number
from runtime.script import script
from samplers import DEFAULT_STEPS
from utils import get_device

ROOT = Path(__file__).resolve().parent
PARTS = ("train", "sample", "memory", "scaling", "peak", "quality", "gpu")
RECIPES = {"fast": [], "ddpm": ["--recipe", "ddpm"]}
CONFIGS = {path.stem: shlex.split(path.read_text(), comments=True)
           for path in sorted((ROOT / "benchmarks").glob("*.txt"))}
OURS = RECIPES | CONFIGS
BATCH_SIZE, FIRST_STEPS = 128, 50
# seconds: of a measurement; many, ddpm_steps: of sample; few_steps: of the peers' fast samplers and our default;
# flags: of every train.py; train_images: of an epoch (None: what `seconds` allow); axes: of scaling; gpu: seconds of
# training by data set
FULL = dict(seconds=8.0, epochs=4, train_images=None, matrix=4096, flags=[], many=10_000, ddpm_steps=1000, few_steps=20,
            gpu=dict(mnist=10.0, fashion_mnist=60.0),
            axes=dict(batch_size=(16, 32, 64, 128, 256, 512), base_channels=(32, 64, 96, 128),
                      image_size=(16, 28, 40, 64), steps=(5, 10, 20, 50, 100)))
QUICK = dict(seconds=0.1, epochs=2, train_images=64, matrix=256, many=128, ddpm_steps=100, few_steps=2,
             gpu=dict(glyphs=2.0),
             flags=["--base_channels", "8", "--patch_size", "4", "--channel_mults", "1", "--batch_size", "16",
                    "--time_emb_dim", "16", "--depth", "1"],
             axes=dict(batch_size=(16, 32), steps=(2, 4)))


def part(text: str) -> str:
    """A parser of what to measure."""
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(PARTS)}, not {text!r}")
    return text


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="*", type=part, metavar="what",
                        help=f"any of {', '.join(PARTS)} (default: all, gpu only on CUDA)")
    parser.add_argument("--contestants", nargs="+", choices=(*OURS, *PEERS), default=[*OURS, *PEERS],
                        help="who is measured; peak takes only ours, scaling and gpu the first of ours")
    parser.add_argument("--budgets", nargs="+", type=duration, default=[60.0, 180.0], metavar="TIME",
                        help="of quality: how long each contestant trains, in seconds or as 10m")
    parser.add_argument("--num_images", type=number(int, 1), default=5000, help="of quality: images that are measured")
    parser.add_argument("--image_time", type=duration, default=300.0, metavar="TIME",
                        help="of quality: the most that making the images for one figure may take; where it does not "
                             "suffice, fewer are measured, which is said")
    parser.add_argument("--limit", type=number(float, 0), default=30.0,
                        help="of sample: seconds beyond which a time is extrapolated, and marked so, from a part of it")
    parser.add_argument("--quick", action="store_true",
                        help="tiny networks and few steps: whether everything works; the numbers mean nothing")
    add_shared_flags(parser, "dataset", "data_dir", "output_dir", "device", "seed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.set_defaults(output_dir="outputs/benchmark")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(budgets=[15.0], num_images=500, limit=1.0)
        args = parser.parse_args(argv)
    args.device = str(get_device(args.device))
    args.what = [each for each in PARTS if (each in args.what if args.what else each != "gpu" or "cuda" in args.device)]
    return args


# --------------------------------------------------------------------------------------------------- the machine


def processor() -> str:
    """The name that the processor gives itself."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str) -> dict:
    """What the numbers depend on besides the code; `load` is how busy the processor was before the first of them."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(date=datetime.now().astimezone().isoformat(timespec="seconds"), system=platform.platform(),
                cpu=processor(), cores=cores, threads=torch.get_num_threads(), load=os.getloadavg()[0], device=device,
                gpu=torch.cuda.get_device_name() if device.startswith("cuda") else None,
                python=platform.python_version(), **{each: installed_version(each) for each in ("torch", *PEERS)})


# ---------------------------------------------------------------------------------------------- one job, one process


def run_script(name: str, argv: Sequence[str]) -> dict:
    """Run a script of this project as a shell would: what it printed, and its seconds from the prompt to the end.

    RunFailed with its last words.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / name), *argv], capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RunFailed(words[-1].strip())
    return dict(output=done.stdout, process_seconds=time.perf_counter() - start)


def run_sample(argv: Sequence[str]) -> dict:
    """run_script of sample.py, with its "steps" and the "seconds" of its sampling."""
    done = run_script("sample.py", argv)
    said = re.search(r"\d+ images by .* in (\d+) steps: ([\d.]+) s", done["output"])
    if not said:
        raise RunFailed(f"sample.py does not tell its time: {done['output'][-200:]!r}")
    return dict(done, steps=int(said[1]), seconds=float(said[2]))


def run_job(job: str, **fields) -> dict:
    """What a job of benchmarks/jobs.py measures in a process of its own."""
    done = run_script("benchmark.py", ["--worker", json.dumps(dict(job=job, **fields))])
    return json.loads(done["output"].splitlines()[-1])


def ratios(values: dict[str, float], smaller_is_better: bool) -> dict[str, float]:
    """How many times better the first contestant is than each other: above 1 it wins. Of what is not above 0: none."""
    if not values:
        return {}
    (first, mine), *others = values.items()
    pairs = [(name, (other, mine) if smaller_is_better else (mine, other)) for name, other in others]
    return {f"{first} against {name}": a / b for name, (a, b) in pairs if a > 0 and b > 0}


def epoch_speeds(records: Sequence[dict], steps_per_epoch: int) -> list[float]:
    """Images a second of each epoch, of which metrics.jsonl has several records, each for the steps since the last."""
    steps, times, before = {}, {}, 0
    for record in records:
        epoch, taken = (record["step"] - 1) // steps_per_epoch, record["step"] - before
        steps[epoch] = steps.get(epoch, 0) + taken
        times[epoch] = times.get(epoch, 0.0) + taken / record["images_per_second"]
        before = record["step"]
    return [steps[epoch] / times[epoch] for epoch in sorted(steps)]


def show(*cells) -> None:
    """One line of a table, written at once."""
    texts = [f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("  " + f"{texts[0]:28}" + "".join(f"{text:>16}" for text in texts[1:]), flush=True)


class Benchmark:
    """One run: who is measured, how thoroughly, and what has been found."""

    def __init__(self, args, temporary: Path):
        self.args, self.temporary, self.output = args, temporary, Path(args.output_dir)
        self.plan = QUICK if args.quick else FULL
        self.ours = [name for name in args.contestants if name in OURS]
        self.peers = [name for name in args.contestants if name in PEERS and installed(name)]
        self.contestants = [name for name in args.contestants if name in (*self.ours, *self.peers)]
        self.batch_size = 16 if args.quick else BATCH_SIZE
        self.where = dict(dataset=args.dataset, data_dir=args.data_dir, device=args.device)
        self.errors, self._known, self._prepared = {}, {}, {}

    def job(self, job: str, **fields) -> dict:
        """run_job, but what was measured once in this run is not measured again."""
        key = json.dumps([job, fields])
        if key not in self._known:
            self._known[key] = run_job(job, **fields)
        return self._known[key]

    def train(self, name: str, *flags, memory: bool = False) -> dict:
        """Run train.py as one of ours. Its "folder" is that of the results, its "records" those of metrics.jsonl.

        memory: in a process that knows how much it took.
        """
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.temporary))
        where = [item for flag, value in self.where.items() for item in (f"--{flag}", str(value))]
        argv = [*OURS[name], *self.plan["flags"], *where, "--output_dir", str(folder),
                "--seed", str(self.args.seed), *map(str, flags)]
        result = run_job("script", name="train.py", argv=argv) if memory else run_script("train.py", argv)
        log = folder / "metrics.jsonl"  # there is none where the time did not suffice for a step
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return dict(result, folder=folder, records=records)

    def prepared(self, name: str) -> dict:
        """The result of two steps of training one of ours: a checkpoint, and a first guess of its speed."""
        if name not in self._prepared:
            self._prepared[name] = self.train(name, "--epochs", 1, "--train_images", 2 * self.batch_size,
                                              "--sample_interval", 0)
        return self._prepared[name]

    def checkpoint(self, name: str) -> str:
        return str(self.prepared(name)["folder"] / "model_final.pt")

    def config(self, name: str) -> dict:
        return load_checkpoint(self.checkpoint(name))["config"]

    def each(self, part: str, measure, contestants: Sequence[str] | None = None) -> dict[str, dict]:
        """measure(name) for each contestant; one that fails is told of and left out."""
        rows = {}
        for name in self.contestants if contestants is None else contestants:
            try:
                rows[name] = measure(name)
            except RunFailed as error:
                self.errors[f"{part} {name}"] = str(error)
                print(f"  {name} failed: {error}", file=sys.stderr, flush=True)
        return rows

    # ------------------------------------------------------------------------------------------ speed and memory

    def measure_train(self) -> dict:
        """Images a second: of ours in train.py's own log, each epoch but the first; of peers step by step."""
        def measure(name: str) -> dict:
            speeds, parameters, precision = (self.peer_speeds if name in PEERS else self.our_speeds)(name)
            row = dict(images_per_second=statistics.mean(speeds), low=min(speeds), high=max(speeds), runs=len(speeds),
                       parameters=parameters, precision=precision)
            row["minutes_for_20_epochs"] = 20 * self.train_images / row["images_per_second"] / 60
            show(name, row["images_per_second"], row["low"], row["high"], row["minutes_for_20_epochs"], parameters)
            return row
        show("images a second", "mean", "low", "high", "min/20 epochs", "parameters")
        rows = self.each("train", measure)
        return dict(rows=rows, ratios=ratios({n: r["images_per_second"] for n, r in rows.items()}, False))

    @cached_property
    def train_images(self) -> int:
        return len(load_dataset(self.args.dataset, "train", self.args.data_dir).images)

    def images_in(self, name: str, seconds: float) -> int:
        """About how many images one of ours learns from in so many seconds: whole batches, at least two."""
        steps = self.prepared(name)["records"][-1]["images_per_second"] * seconds / self.batch_size
        return self.batch_size * min(max(2, round(steps)), self.train_images // self.batch_size)

    def our_speeds(self, name: str) -> tuple[list[float], int, str]:
        images = self.plan["train_images"] or self.images_in(name, self.plan["seconds"])
        run = self.train(name, "--epochs", self.plan["epochs"], "--train_images", images, "--sample_interval", 0)
        self._prepared.setdefault(name, run)
        saved = load_checkpoint(run["folder"] / "model_final.pt")
        parameters = sum(weight.numel() for weight in saved["model"].values())
        return epoch_speeds(run["records"], images // self.batch_size)[1:], parameters, saved["precision"]

    def peer_speeds(self, name: str) -> tuple[list[float], int, str]:
        done = self.job("peer_train", peer=name, **self.where, batch_size=self.batch_size,
                        seconds=self.plan["seconds"] * (self.plan["epochs"] - 1))
        return done["speeds"], done["parameters"], "fp32"

    def measure_memory(self) -> dict:
        """Peak memory: of ours train.py with its validation, samples and checkpoint, and sample.py; of peers the same
        batch without those."""
        def measure(name: str) -> dict:
            if name in PEERS:
                train = self.job("peer_train", peer=name, **self.where, batch_size=self.batch_size, seconds=0.0)
            else:
                train = self.train(name, "--epochs", 1, "--train_images", 5 * self.batch_size, memory=True)
            sample = self.sample(name, 64, "few", self.plan["few_steps"], memory=True)
            row = {f"{what}_{kind}": result[f"peak_{kind}"] for what, result in (("train", train), ("sample", sample))
                   for kind in ("mb", "gpu_mb") if f"peak_{kind}" in result}
            show(name, *row.values())
            return row
        show("peak memory, MB", "training", "sampling")
        rows = self.each("memory", measure)
        nothing = self.job("nothing")["peak_mb"]
        show("imports alone", nothing)
        return dict(rows=rows, batch_size=self.batch_size, imports_mb=nothing,
                    ratios=ratios({name: row["train_mb"] for name, row in rows.items()}, True))

    # -------------------------------------------------------------------------------------------------- sampling

    def sample(self, name: str, images: int, sampler: str, steps: int, memory: bool = False) -> dict:
        """Make images: "seconds" from the start of the sampling and, of ours, "process_seconds" from the prompt on."""
        if name in PEERS:
            shape = list(load_dataset(self.args.dataset, "validation", self.args.data_dir).images.shape[1:])
            return self.job("peer_sample", peer=name, shape=shape, device=self.args.device, images=images,
                            sampler=sampler, steps=steps)
        flags = ["--sampler", "ddpm", "--steps", str(steps)] if sampler == "ddpm" else []
        argv = ["--checkpoint", self.checkpoint(name), "--num_images", str(images), "--device", self.args.device,
                "--output", f"{self.temporary}/{name}-samples.{'png' if images <= 64 else 'npz'}", *flags]
        if memory:
            return self.job("script", name="sample.py", argv=argv)
        if str(argv) not in self._known:
            self._known[str(argv)] = run_sample(argv)
        return self._known[str(argv)]

    def sample_row(self, name: str, images: int, sampler: str, speed: float | None) -> dict:
        """Seconds for some images. Beyond the limit, at `speed` evaluations a second, they are extrapolated from fewer
        images (never below 64) and, for ddpm, from fewer steps: both are proportional to the time."""
        steps = self.plan["ddpm_steps"] if sampler == "ddpm" else self.plan["few_steps"]
        if sampler == "few" and name in OURS:
            steps = min(steps, DEFAULT_STEPS)
        few_images, few_steps = images, steps
        if speed and images * steps > speed * self.args.limit:
            few_images = min(images, max(64, int(speed * self.args.limit / steps / 64) * 64))
            if sampler == "ddpm" and few_images * steps > speed * self.args.limit:
                few_steps = min(steps, max(FIRST_STEPS, int(speed * self.args.limit / few_images)))
        done = self.sample(name, few_images, sampler, few_steps)
        whole = (few_images, few_steps) == (images, steps)
        factor = 1.0 if whole else images / few_images * steps / few_steps
        return dict(images=images, sampler=sampler, steps=steps,
                    seconds=done["seconds"] * factor, prompt_to_file=done.get("process_seconds") if whole else None,
                    extrapolated_from=None if whole else dict(images=few_images, steps=few_steps,
                                                              seconds=done["seconds"]))

    def measure_sample(self) -> dict:
        """Seconds for few and for many images, by our defaults or a peer's fast sampler, and by 1000 DDPM steps."""
        def measure(name: str) -> dict:
            cells, speed = [], None
            for images, sampler in ((64, "few"), (64, "ddpm"), (self.plan["many"], "few"), (self.plan["many"], "ddpm")):
                cells.append(self.sample_row(name, images, sampler, speed))
                row = cells[-1]
                source = row["extrapolated_from"]
                speed = speed or images * row["steps"] / max(row["seconds"], 1e-3)
                show(name, f"{images:,}", f"{sampler} {row['steps']}", row["seconds"],
                     f"from {source['images']:,} × {source['steps']}" if source else "measured")
            return dict(cells=cells)
        show("seconds", "images", "steps", "seconds", "")
        rows = self.each("sample", measure)
        found = {(cell["images"], cell["sampler"]): None for row in rows.values() for cell in row["cells"]}
        times = {key: {name: cell["seconds"] for name, row in rows.items() for cell in row["cells"]
                       if (cell["images"], cell["sampler"]) == key} for key in found}
        return dict(rows=rows, ratios={f"{images} images, {sampler}": ratios(values, True)
                                       for (images, sampler), values in times.items()})

    # ------------------------------------------------------------------------------------------- scaling and peak

    def measure_scaling(self) -> dict:
        """Seconds of a training step, or of sampling 64 images, and memory, along each axis, and the power they grow
        with between its ends."""
        name = self.ours[0]
        config, axes = self.config(name), {}
        base = dict(config=config, device=self.args.device, seconds=self.plan["seconds"] / 2,
                    batch_size=self.batch_size, base_channels=config["model"]["base_channels"],
                    image_size=config["data"]["shape"][-1])
        show(f"scaling of {name}", "", "seconds", "MB")
        for axis, values in self.plan["axes"].items():
            points = self.each(f"scaling {axis}", lambda value, axis=axis: self.scaling_point(name, base, axis, value),
                               values)
            if len(points) > 1:
                axes[axis] = dict(points=list(points.values()),
                                  power={what: power(list(points), [point[what] for point in points.values()])
                                         for what in ("seconds", "peak_mb")})
        return dict(contestant=name, axes=axes)

    def scaling_point(self, name: str, base: dict, axis: str, value: int) -> dict:
        if axis == "steps":
            done = self.job("sample_steps", checkpoint=self.checkpoint(name), device=self.args.device,
                            images=16 if self.args.quick else 64, steps=value)
        else:
            done = self.job("train_steps", **{**base, axis: value})
        memory = done.get("peak_gpu_mb", done["peak_mb"])
        show(axis, value, done["seconds"], memory)
        return dict(value=value, seconds=done["seconds"], peak_mb=memory)

    def measure_peak(self) -> dict:
        """What share of the best matrix product a training step of each of ours reaches."""
        def measure(name: str) -> dict:
            row = self.job("peak", config=self.config(name), device=self.args.device, seconds=self.plan["seconds"],
                           size=self.plan["matrix"])
            limits = ", ".join(f"{what} {share:.0%}" for what, share in list(row["slowest"].items())[:4])
            show(name, row["step_gflops"], *row["matrix_gflops"].values(), f"{row['share_of_best']:.1%}")
            print(f"    {row['arithmetic']:.0%} of its time in convolutions and matrix products, which reach "
                  f"{row['share_within']:.1%} there; its time goes to: {limits}")
            return row
        show("GFLOP/s", "training", "product fp32", "product bf16", "share of best")
        rows = self.each("peak", measure, self.ours)
        return dict(rows=rows, ratios={name: row["share_of_best"] for name, row in rows.items()})

    # --------------------------------------------------------------------------------------------------- quality

    def measure_quality(self) -> dict:
        """Fréchet distance to validation images after training for each budget, start-up and all included.

        The ratios are of what lies above the floor, for the first contestant at the upper end of its 95 % interval: it
        may lie at the floor or, by chance, below.
        """
        rows = []
        show("quality", "budget", "images seen", "Fréchet", "above floor", "confident")
        self.each("quality", lambda name: rows.extend((self.peer_quality if name in PEERS else self.our_quality)(name)))
        found = {}
        for budget in self.args.budgets:
            if at_budget := [row for row in rows if row["budget"] == budget]:
                values = {row["contestant"]: row["above_floor"] for row in at_budget}
                distance = at_budget[0]["figures"]["frechet_distance"]
                values[at_budget[0]["contestant"]] = distance["high"] - distance["floor"]
                found[f"{budget:g} s, at least"] = ratios(values, True)
        return dict(rows=rows, num_images=self.args.num_images, ratios=found)

    def our_quality(self, name: str) -> Iterator[dict]:
        a_second = 64 / self.sample(name, 64, "few", self.plan["few_steps"])["seconds"]
        images = max(64, min(self.args.num_images, round(a_second * self.args.image_time)))
        for budget in sorted(self.args.budgets):
            run = self.train(name, "--budget", budget)
            path = self.quality_folder(name, budget) / "model_final.pt"
            with atomic_write(path) as file:
                file.write((run["folder"] / "model_final.pt").read_bytes())
            yield self.judge(name, budget, run["process_seconds"], load_checkpoint(path)["images_seen"],
                             "--checkpoint", str(path), "--num_images", str(images))

    def peer_quality(self, name: str) -> Iterator[dict]:
        done = run_job("peer_quality", peer=name, **self.where, batch_size=self.batch_size, budgets=self.args.budgets,
                       images=self.args.num_images, steps=self.plan["few_steps"], image_seconds=self.args.image_time,
                       folder=str(self.temporary), started=time.time())
        for row in done["rows"]:
            yield self.judge(name, row["budget"], row["seconds"], row["images_seen"],
                             "--images", row["images"], "--dataset", self.args.dataset)

    def quality_folder(self, name: str, budget: float) -> Path:
        return self.output / "quality" / f"{name}_{budget:g}s"

    def judge(self, name: str, budget: float, seconds: float, images_seen: int, *source: str) -> dict:
        """evaluate.py's figures. Its report, nearest.png and our checkpoint stay in a folder of the output."""
        folder = self.quality_folder(name, budget)
        run_script("evaluate.py", [
            *source, "--reference", "validation", "--seed", str(self.args.seed), "--data_dir", self.args.data_dir,
            "--device", self.args.device, "--output_dir", str(folder)])
        found = json.loads((folder / "evaluation.json").read_text())
        distance, count = found["figures"]["frechet_distance"], found["num_images"]
        row = dict(contestant=name, budget=budget, seconds=seconds, images_seen=images_seen, num_images=count,
                   figures=found["figures"], above_floor=distance["value"] - distance["floor"])
        show(name, f"{budget:g} s", f"{images_seen:,}", distance["value"], row["above_floor"],
             found["figures"]["confident"]["value"])
        if count < self.args.num_images:
            print(f"    only {count:,} of {self.args.num_images:,} images in --image_time: do not compare its distance")
        return row

    # ------------------------------------------------------------------------------------------------ one GPU

    def measure_gpu(self) -> dict:
        """Quality after seconds of training on each data set, start-up aside, and seconds for many images."""
        name = self.ours[0]

        def measure(dataset: str) -> dict:
            seconds, flags = self.plan["gpu"][dataset], ("--dataset", dataset, "--sample_interval", 0)
            trial = trained_seconds(self.train(name, *flags, "--budget", seconds + 10))  # start and end take the rest
            run = self.train(name, *flags, "--budget", 2 * seconds + 10 - trial)
            path = str(run["folder"] / "model_final.pt")
            row = self.judge(f"{name} {dataset}", round(trained_seconds(run), 1), run["process_seconds"],
                             load_checkpoint(path)["images_seen"], "--checkpoint", path, "--num_images",
                             str(self.args.num_images))
            many = ["--checkpoint", path, "--num_images", str(self.plan["many"]), "--batch_size",
                    str(min(2500, self.plan["many"])), "--device", self.args.device, "--output",
                    f"{self.temporary}/{dataset}.npz"]
            row["sampling_seconds"] = run_sample(many)["seconds"]
            show(f"{self.plan['many']:,} images", f"{row['sampling_seconds']:.2f} s")
            return row
        show("quality", "trained", "images seen", "Fréchet", "above floor", "confident")
        return dict(rows=self.each("gpu", measure, list(self.plan["gpu"])))


def trained_seconds(run: dict) -> float:
    """How long the loop of a run of train.py lasted: to its last record, from before its first."""
    first, last = run["records"][0], run["records"][-1]
    steps = first["images_seen"] / first["images_per_second"]
    return last["seconds"] - first["seconds"] + steps


def power(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The p with which y grows as x^p: the slope of the straight line through their logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


# ------------------------------------------------------------------------------------------------------------- main


def check(args) -> None:
    """UserError for what cannot be measured, before anything is."""
    check_writable(args.output_dir)
    load_dataset(args.dataset, "train", args.data_dir)
    missing = [name for name in args.contestants if name in PEERS and not installed(name)]
    if set(missing) == set(args.contestants):
        raise UserError("no contestant is left: pip install -r requirements-bench.txt, or name one of ours: "
                         f"--contestants {' '.join(OURS)}")
    if {"scaling", "peak", "gpu"} & set(args.what) and not set(args.contestants) & set(OURS):
        raise UserError(f"scaling, peak and gpu measure ours: add one of {', '.join(OURS)} to --contestants")
    if missing:
        print(f"Left out {' and '.join(missing)}: pip install -r requirements-bench.txt", file=sys.stderr)


def print_ratios(found: dict) -> None:
    """One line for each comparison with the first contestant, as far as there are others."""
    for name, ratio in found.get("ratios", {}).items():
        for pair, value in ratio.items() if isinstance(ratio, dict) else [(name, ratio)]:
            if " against " in pair:
                title = f"{name}: {pair}" if isinstance(ratio, dict) else pair
                print(f"  {title}: {value:,.3g} times better")


@script
def main(argv=None):
    args = parse_args(argv)
    if args.worker:
        from benchmarks.jobs import work

        print(json.dumps(work(args.worker)))
        return 0
    check(args)
    start = time.perf_counter()
    path = Path(args.output_dir) / "benchmark.json"
    flags = {name: value for name, value in vars(args).items() if name != "worker"}
    report = dict(command=["benchmark.py", *(sys.argv[1:] if argv is None else argv)], flags=flags,
                  machine=machine(args.device))
    print(f"{report['machine']['cpu']}, {report['machine']['cores']} cores, load {report['machine']['load']:.1f}; "
          f"torch {report['machine']['torch']}; {args.device}" + ("; QUICK: no real numbers" if args.quick else ""))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        benchmark = Benchmark(args, Path(temporary))
        for name in args.what:
            found = report[name] = getattr(benchmark, f"measure_{name}")()
            print_ratios(found)
            report |= dict(errors=benchmark.errors, seconds=time.perf_counter() - start)
            if name in PLOTS and (found.get("axes") or found.get("rows")):
                PLOTS[name](found, path.with_name(f"benchmark_{name}.png"))
            write_json(report, path)
    print(f"Saved {path} after {report['seconds'] / 60:.1f} minutes")
    return 1 if benchmark.errors else 0


if __name__ == "__main__":
    sys.exit(main())
