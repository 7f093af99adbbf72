"""Run the experiments of guide/experiments.md and write their tables and pictures.

    python -m guide.experiments
    python -m guide.experiments schedule width
    python -m guide.experiments prediction --quick

Without names all are run, which takes a night. What is finished is not run again: a run that was stopped goes on where
it was. The runs lie in --output_dir, the tables in guide/experiments.md.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import evaluate
import sample
import train
from checkpoint import load_checkpoint
from evaluation.copies import FEW
from evaluation.runs import find_runs
from guide import results
from guide.quality import POINTS, point_figures
from runtime.errors import RunFailed
from runtime.files import file_digest, write_json
from runtime.parser import Parser, add_shared_flags
from runtime.script import script
from utils import plain_log_ticks, pyplot, save_figure

POINT_RUN = "--dataset spirals --epochs 20 --sample_interval 0 --save_interval 0"
IMAGE_RUN = "--budget 3m --base_channels 32 --batch_size 64 --sample_interval 0 --save_interval 0"
QUICK_POINTS, QUICK_IMAGES = "--epochs 1 --train_images 512", "--epochs 1 --train_images 256 --batch_size 64"
IMAGES, QUICK_COUNT = 1000, FEW  # generated images that are measured; the fewest that can be
DPI = 70


class Experiment(NamedTuple):
    """One thing that is changed: the flags of each row, and what all rows have in common.

    rows     the flags of train.py (or, with `of_sampling`, of sample.py) that differ
    common   the flags that all runs share
    points   whether points in the plane are learned, which takes seconds, or images
    """

    rows: tuple[str, ...]
    common: str = POINT_RUN
    seeds: tuple[int, ...] = (0, 1, 2)
    points: bool = True
    of_sampling: bool = False

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the figures that judge."""
        return ("distance", "gap") if self.points else ("frechet_distance", "recall", "asked_class")


def flags(name: str, *values) -> tuple[str, ...]:
    """One row for each value of a flag."""
    return tuple(f"--{name} {value}" for value in values)


EXPERIMENTS = {
    "length": Experiment(flags("epochs", 1, 3, 10, 30, 100)),
    "batch_size": Experiment(flags("batch_size", 32, 128, 512, 2048)),
    "learning_rate": Experiment(flags("lr", 2e-5, 2e-4, 2e-3, 2e-2, 0.2), f"{POINT_RUN} --optimizer adamw"),
    "dataset": Experiment(flags("dataset", "moons", "spirals", "checkerboard", "letters", "gaussians")),
    "timesteps": Experiment(flags("timesteps", 50, 100, 1000, 4000)),
    "schedule": Experiment(("--schedule cosine", "--schedule linear", "--schedule linear --zero_terminal_snr")),
    "prediction": Experiment(flags("prediction", "eps", "x0", "v", "edm")),
    "width": Experiment(flags("base_channels", 16, 32, 64, 128, 256)),
    "depth": Experiment(flags("depth", 1, 2, 3, 6)),
    "activation": Experiment(flags("activation", "silu", "gelu", "relu", "mish")),
    "guidance": Experiment(flags("guidance_scale", 1, 1.5, 2, 4), of_sampling=True),
    "images": Experiment(flags("train_images", 100, 300, 1000, 3000, 15000), POINT_RUN.replace("20", "200")),
    "digits_length": Experiment(flags("budget", "30s", "1m", "3m", "10m"), IMAGE_RUN, (0,), False),
    "digits_width": Experiment(flags("base_channels", 16, 32, 48, 64), IMAGE_RUN, (0,), False),
    "digits_depth": Experiment(flags("middle_depth", 1, 3, 5), IMAGE_RUN, (0,), False),
    "digits_guidance": Experiment(flags("guidance_scale", 1, 1.25, 1.5, 2, 4), IMAGE_RUN, (0,), False, True),
    "digits_images": Experiment(flags("train_images", 100, 1000, 10_000, 55_000), IMAGE_RUN, (0,), False),
}


# ----------------------------------------------------------------------------------------------------------- the runs


def check(status: int, what: str) -> None:
    """RunFailed with a script's exit status if it is not 0."""
    if status > 128:
        sys.exit(status)  # stopped by a signal: the next call goes on here
    if status:
        raise RunFailed(f"{what} ended with status {status}")


def carry_out(experiment: Experiment, row: str, seed: int, folder: Path, quick: bool, data_dir: str) -> None:
    """One run: train and measure. What is there already is not done again."""
    if (folder / "evaluation.json").exists():
        return
    model_folder = folder.parent / f"model_{seed}" if experiment.of_sampling else folder
    model, trained = model_folder / "model_final.pt", [] if experiment.of_sampling else row.split()
    place = ["--output_dir", str(model_folder), "--data_dir", data_dir]
    if not model.exists():
        less = (QUICK_POINTS if experiment.points else QUICK_IMAGES).split() if quick else []
        again = ["--resume"] if list(model_folder.glob("checkpoints/*.pt")) else []
        common = experiment.common.split()
        if quick and "--budget" in common:
            common = common[2:]
        check(train.main([*common, *trained, *less, "--seed", str(seed), *place, *again]), f"the training {folder}")
    shown = row.split() if experiment.of_sampling else ["--guidance_scale", "1"] if experiment.points else []
    measure(experiment, model, shown, folder, quick, data_dir)


def measure(experiment: Experiment, model: Path, shown: list[str], folder: Path, quick: bool, data_dir: str) -> None:
    """Make images or points with a model and write evaluation.json."""
    if not experiment.points:
        count = str(QUICK_COUNT if quick else IMAGES)
        check(evaluate.main(["--checkpoint", str(model), "--num_images", count, "--reference", "validation", *shown,
                             "--output_dir", str(folder), "--data_dir", data_dir]), f"the evaluation of {folder}")
        return
    points, count = folder / "points.npz", QUICK_COUNT if quick else POINTS
    folder.mkdir(parents=True, exist_ok=True)
    asked = ["--label", "0"] if experiment.of_sampling else []
    check(sample.main(["--checkpoint", str(model), "--num_images", str(count), "--steps", "50", *shown, *asked,
                       "--output", str(points)]), f"the sampling of {folder}")
    dataset = load_checkpoint(model)["config"]["data"]["dataset"]
    figures = point_figures(points, dataset, data_dir, label=0 if asked else None)
    write_json(dict(figures={name: dict(value=value) for name, value in figures.items()}, num_images=count,
                    reference=dict(split="test"), dataset=dataset, checkpoint=str(model),
                    checkpoint_sha256=file_digest(model)), folder / "evaluation.json")


def folder_of(top: Path, row: str, seed: int) -> Path:
    return top / f"{row.replace('--', '').replace(' ', '_')}_{seed}"


# ---------------------------------------------------------------------------------------------------------- the tables


def rows_of(experiment: Experiment, top: Path) -> list[dict]:
    """What the finished runs of an experiment wrote: mean and standard deviation of each figure over the seeds.

    Of the seconds the fewest: what else the machine does only adds to them.
    """
    found, rows = {run.folder: run for run in find_runs(top)[0]}, []
    for row in experiment.rows:
        runs = [found[folder_of(top, row, seed).name] for seed in experiment.seeds
                if folder_of(top, row, seed).name in found]
        values = {name: [run.figures[name] for run in runs if name in run.figures] for name in experiment.figures}
        values |= dict(images_seen=[run.images_seen for run in runs if run.images_seen],
                       seconds=[min(seconds)] if (seconds := [run.seconds for run in runs if run.seconds]) else [])
        rows.append(dict(flags=row, runs=len(runs), **{
            name: dict(mean=statistics.mean(each), spread=statistics.stdev(each) if len(each) > 1 else None)
            for name, each in values.items() if each}))
    return rows


HEADS = dict(distance="distance", gap="gap", frechet_distance="Fréchet distance", recall="recall",
             asked_class="asked class", images_seen="images seen", seconds="seconds, fastest run")
DIGITS = dict(distance=2, gap=2, images_seen=0, seconds=0)  # that are shown behind the point; of other figures 3
BEST = dict(distance="0 is best", gap="1 is best", frechet_distance="lower is better", recall="higher is better",
            asked_class="higher is better")


def table_of(name: str, folder: Path = results.MEASURED) -> str:
    """The table and the picture of an experiment; empty where it has not been run."""
    if not (Path(folder) / f"experiment_{name}.json").exists():
        return ""
    found = results.read(f"experiment_{name}", folder)
    columns = [column for column in HEADS if any(column in row for row in found["rows"])]

    def cell(column: str, value: dict | None) -> str:
        if value is None:
            return "failed"
        digits = DIGITS.get(column, 3)
        spread = value["spread"] if column in BEST else None
        return f"{value['mean']:,.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "")
    rows = [(f"`{row['flags']}`", *(cell(column, row.get(column)) for column in columns)) for row in found["rows"]]
    picture = f"\n![{name.replace('_', ' ')}: the result of each row](pictures/experiment_{name}.png)\n"
    return results.table(("flags", *(HEADS[column] for column in columns)), rows) + picture + results.source(found)


def draw(rows: Sequence[dict], names: Sequence[str]):
    """The first two of the figures `names` of each row, with their standard deviations over the seeds."""
    rows = [row for row in rows if names[0] in row]
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 0.35 * len(rows) + 1), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=False):
        means = [row[name]["mean"] for row in rows]
        axis.barh([row["flags"] for row in rows], means, xerr=[row[name]["spread"] or 0 for row in rows],
                  color="#9ecae1", capsize=3)
        axis.set_xlabel(f"{HEADS[name]} ({BEST[name]})")
        if min(means) > 0 and max(means) > 30 * min(means):
            axis.set_xscale("log")
            plain_log_ticks(axis.xaxis)
        axis.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    return figure


TABLES = {name: (lambda name=name: table_of(name)) for name in EXPERIMENTS}


def perform(name: str, args) -> bool:
    """Run an experiment, say what came out and, if it was not a quick one, write its table and its picture.

    Returns whether every row has its figures. If none has, nothing is written.
    """
    experiment, top = EXPERIMENTS[name], Path(args.output_dir) / ("quick" if args.quick else "") / name
    top.mkdir(parents=True, exist_ok=True)
    for row in experiment.rows:
        for seed in experiment.seeds[:1] if args.quick else experiment.seeds:
            try:
                carry_out(experiment, row, seed, folder_of(top, row, seed), args.quick, args.data_dir)
            except RunFailed as error:
                print(f"{name}: {row}: {error}", file=sys.stderr)
    rows = rows_of(experiment, top)
    for row in rows:
        found = [f"{figure} {row[figure]['mean']:.4g}" for figure in experiment.figures if figure in row]
        print(f"{name}: {row['flags']}: {', '.join(found) or 'failed'}")
    if not args.quick and any(experiment.figures[0] in row for row in rows):
        results.write(f"experiment_{name}", f"python -m guide.experiments {name}", rows)
        save_figure(draw(rows, experiment.figures), results.PICTURES / f"experiment_{name}.png", DPI)
        results.fill_file(results.ROOT / "guide/experiments.md", TABLES)
    return all(figure in row for row in rows for figure in experiment.figures)


def experiment_name(text: str) -> str:
    """A type for add_argument: a name in EXPERIMENTS."""
    if text not in EXPERIMENTS:
        raise argparse.ArgumentTypeError(f"there is no experiment {text!r}: choose of {', '.join(EXPERIMENTS)}")
    return text


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", type=experiment_name, metavar="NAME",
                        help=f"what to run: {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--output_dir", default="outputs/experiments", help="the folder of the runs")
    parser.add_argument("--quick", action="store_true", help="try the runner: tiny trainings and one seed, in a folder "
                                                             "quick of --output_dir; no table is written")
    add_shared_flags(parser, "data_dir")
    return parser.parse_args(argv)


@script
def main(argv=None):
    args = parse_args(argv)
    complete = [perform(name, args) for name in args.names or EXPERIMENTS]
    return int(not all(complete))


if __name__ == "__main__":
    sys.exit(main())
