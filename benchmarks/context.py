"""What all measurements of one run of benchmark.py share: the contestants, the plan, and earlier results."""

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks import processes
from benchmarks.peers import PEERS, is_installed
from data import load_dataset
from runtime.errors import RunFailed
from runtime.progress import Bar, say
from training.sizing import FEW_IMAGES

# Our contestants and their flags of train.py: two recipes, and the configurations in benchmarks/*.txt.
OURS = {"fast": [], "ddpm": ["--recipe", "ddpm"]} | {
    path.stem: shlex.split(path.read_text(), comments=True) for path in sorted(Path(__file__).parent.glob("*.txt"))}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    seconds: float                    # of one measurement of speed
    epochs: int                       # of `train`; the first is not counted
    train_images: int | None          # of an epoch of `train`; None: as many as `seconds` allow
    batch_size: int                   # of the peers and of `scaling`
    train_flags: tuple[str, ...]      # of every train.py
    many: int                         # images of the longest sampling
    few_steps: int                    # of the fast samplers
    ddpm_steps: int                   # of the sampler ddpm
    steps_images: int                 # images on the axis `steps` of `scaling`
    matrix_size: int                  # of the matrix products of `peak`
    busy: dict[str, float]            # of `busy`: seconds of each measurement, and the width of the network
    pictures: dict[str, float]        # of `pictures`: how many, and seconds of training and of each measurement
    gpu_seconds: dict[str, float]     # of training in `gpu`, for each data set
    axes: dict[str, tuple[int, ...]]  # of `scaling`, with their values


class Context:
    """One run of benchmark.py. A measurement that was made once in it is not repeated."""

    def __init__(self, args, device: str, plan: Plan, temporary: Path):
        self.args, self.device, self.plan, self.temporary = args, device, plan, temporary
        self.ours = [name for name in args.contestants if name in OURS]
        self.contestants = [name for name in args.contestants if name in OURS or is_installed(name)]
        self.data = dict(dataset=args.dataset, data_dir=os.path.abspath(args.data_dir), device=device)
        self.errors: dict[str, str] = {}  # by "part contestant"
        self._results: dict[str, dict] = {}
        self._first_runs: dict[str, dict] = {}

    def measure_each(self, part: str, measure: Callable, contestants: Iterable | None = None) -> dict[str, dict]:
        """{name: measure(name)} for each contestant. Reports a contestant that fails, and leaves it out."""
        rows, names = {}, list(self.contestants if contestants is None else contestants)
        with Bar(part, len(names), "measurements") as bar:
            for name in bar.track(names):
                bar.note = str(name)
                try:
                    rows[name] = measure(name)
                except RunFailed as error:
                    self.errors[f"{part} {name}"] = str(error)
                    say(f"  {name} failed: {error}", sys.stderr)
        return rows

    def job(self, job: str, **fields) -> dict:
        """The result of a job of benchmarks/jobs.py."""
        return self._once(json.dumps([job, fields]), lambda: processes.run_job(job, **fields))

    def _once(self, key: str, measure: Callable[[], dict]) -> dict:
        if key not in self._results:
            self._results[key] = measure()
        return self._results[key]

    @cached_property
    def train_images(self) -> int:
        """The number of training images of the data set."""
        return len(load_dataset(self.args.dataset, "train", self.args.data_dir).images)

    def train(self, name: str, *flags, as_job: bool = False) -> dict:
        """Run train.py as one of our contestants; returns also its "folder" and the "records" of its metrics.jsonl.

        as_job: returns also the peak memory of the process.
        """
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.temporary))
        data_flags = [item for flag, value in self.data.items() for item in (f"--{flag}", str(value))]
        argv = [*OURS[name], *self.plan.train_flags, *data_flags, "--output_dir", str(folder),
                "--seed", str(self.args.seed), *map(str, flags)]
        if as_job:
            result = processes.run_job("script", name="train.py", argv=argv)
        else:
            result = processes.run_script("train.py", argv)
        log = folder / "metrics.jsonl"  # missing if the time was too short for one step
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return dict(result, folder=folder, records=records)

    def images_of(self, steps: int) -> int:
        """Training images for so many steps; on a GPU not so few that `training.sizing` makes a smaller network."""
        return max(steps * self.plan.batch_size, 0 if self.device == "cpu" else FEW_IMAGES)

    def first_run(self, name: str) -> dict:
        """The first training run of one of our contestants: two steps (on a GPU more) if there was none yet."""
        if name not in self._first_runs:
            self.keep_first_run(name, self.train(name, "--epochs", 1, "--train_images", self.images_of(2),
                                                 "--sample_interval", 0))
        return self._first_runs[name]

    def keep_first_run(self, name: str, run: dict) -> None:
        """Let first_run return this run, unless it has one already."""
        self._first_runs.setdefault(name, run)

    def checkpoint(self, name: str) -> str:
        """The path of the checkpoint of the first run."""
        return str(self.first_run(name)["folder"] / "model_final.pt")

    def sample(self, name: str, images: int, sampler: str, steps: int, as_job: bool = False) -> dict:
        """Make images: their "seconds", and for ours also "process_seconds", the start-up included.

        sampler: "few" (ours: the defaults of sample.py, whatever `steps`; peers: their fast sampler) or "ddpm".
        as_job: returns the peak memory instead of the seconds.
        """
        if name in PEERS:
            shape = list(load_dataset(self.args.dataset, "validation", self.args.data_dir).images.shape[1:])
            return self.job("peer_sample", name=name, shape=shape, device=self.device, images=images, sampler=sampler,
                            steps=steps)
        output = self.temporary / f"{name}-samples.{'png' if images <= 64 else 'npz'}"
        argv = ["--checkpoint", self.checkpoint(name), "--num_images", str(images), "--device", self.device,
                "--output", str(output), *(["--sampler", "ddpm", "--steps", str(steps)] if sampler == "ddpm" else [])]
        if as_job:
            return self.job("script", name="sample.py", argv=argv)
        return self._once(str(argv), lambda: processes.run_sample(argv))
