"""Measure the Fréchet distance that a contestant reaches in a given time."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import processes
from benchmarks.context import Context
from benchmarks.peers import PEERS
from benchmarks.tables import print_row, ratios
from checkpoint import load_checkpoint
from evaluation.copies import FEW
from runtime.files import atomic_write
from runtime.progress import say

COLUMNS = ("images seen", "Fréchet", "above floor", "confident")


def measure_quality(context: Context) -> dict:
    """Fréchet distance to validation images after training for each budget, start-up included.

    The ratios compare the distances above the floor. For the first contestant they take the upper end of its 95 %
    interval, because its value may lie at the floor or, by chance, below it.
    """
    rows: list[dict] = []

    def measure(name: str) -> None:
        for row in (peer_quality if name in PEERS else our_quality)(context, name):
            rows.append(row)
    print_row("quality", "budget", *COLUMNS)
    context.measure_each("quality", measure)
    found = {}
    for budget in context.args.budgets:
        if at_budget := [row for row in rows if row["budget"] == budget
                         and row["num_images"] == context.args.num_images]:  # others cannot be compared
            values = {row["contestant"]: row["above_floor"] for row in at_budget}
            distance = at_budget[0]["figures"]["frechet_distance"]
            values[at_budget[0]["contestant"]] = distance["high"] - distance["floor"]
            found[f"{budget:g} s, at least"] = ratios(values, True)
    return dict(rows=rows, num_images=context.args.num_images, ratios=found)


def our_quality(context: Context, name: str) -> Iterator[dict]:
    """Train one of our contestants once for each budget, and yield a row for each."""
    args = context.args
    images_per_second = 64 / context.sample(name, 64, "few", context.plan.few_steps)["seconds"]
    images = max(FEW, min(args.num_images, round(images_per_second * args.image_time)))
    for budget in sorted(args.budgets):
        run = context.train(name, "--budget", budget)
        path = quality_folder(context, name, budget) / "model_final.pt"
        with atomic_write(path) as file:
            file.write((run["folder"] / "model_final.pt").read_bytes())
        yield evaluate(context, name, budget, run["process_seconds"], load_checkpoint(path)["images_seen"],
                       "--checkpoint", str(path), "--num_images", str(images))


def peer_quality(context: Context, name: str) -> Iterator[dict]:
    """Train a peer once for all budgets, and yield a row for each."""
    args, plan, budgets = context.args, context.plan, sorted(context.args.budgets)
    result = processes.run_job(
        "peer_quality", name=name, **context.data, budgets=budgets,
        batch_size=min(plan.batch_size, PEERS[name].batch_size),
        folders=[str(quality_folder(context, name, budget)) for budget in budgets], images=args.num_images,
        steps=plan.few_steps, image_seconds=args.image_time, started=time.time())
    for row in result["rows"]:
        yield evaluate(context, name, row["budget"], row["seconds"], row["images_seen"],
                       "--images", row["images"], "--dataset", args.dataset)


def quality_folder(context: Context, name: str, budget: float) -> Path:
    """Where the report and the checkpoint, or the weights, of a contestant and a budget are kept."""
    return Path(context.args.output_dir).absolute() / "quality" / f"{name}_{budget:g}s"


def evaluate(context: Context, name: str, budget: float, seconds: float, images_seen: int, *source: str) -> dict:
    """Run evaluate.py on a checkpoint or on images; prints and returns a row with its figures.

    source: its flags --checkpoint or --images, and those that go with them.
    """
    args, folder = context.args, quality_folder(context, name, budget)
    processes.run_script("evaluate.py", [
        *source, "--reference", "validation", "--seed", str(args.seed), "--data_dir", args.data_dir,
        "--device", context.device, "--output_dir", str(folder)])
    found = json.loads((folder / "evaluation.json").read_text())
    distance, count = found["figures"]["frechet_distance"], found["num_images"]
    row = dict(contestant=name, budget=budget, seconds=seconds, images_seen=images_seen, num_images=count,
               figures=found["figures"], above_floor=distance["value"] - distance["floor"])
    print_row(name, f"{budget:g} s", f"{images_seen:,}", distance["value"], row["above_floor"],
              found["figures"]["confident"]["value"])
    if count < args.num_images:
        say(f"    only {count:,} of {args.num_images:,} images within --image_time: its distance cannot be compared")
    return row


# ----------------------------------------------------------------------------------------------------------- one GPU


def measure_gpu(context: Context) -> dict:
    """Quality after some seconds of training on each data set, start-up excluded, and seconds for many images."""
    name, many = context.ours[0], context.plan.many

    def measure(dataset: str) -> dict:
        seconds, flags = context.plan.gpu_seconds[dataset], ("--dataset", dataset, "--sample_interval", 0)
        trial = training_seconds(context.train(name, *flags, "--budget", seconds + 10))  # tells how long start-up is
        run = context.train(name, *flags, "--budget", 2 * seconds + 10 - trial)
        checkpoint = str(run["folder"] / "model_final.pt")
        row = evaluate(context, f"{name} {dataset}", round(training_seconds(run), 1), run["process_seconds"],
                       load_checkpoint(checkpoint)["images_seen"], "--checkpoint", checkpoint,
                       "--num_images", str(context.args.num_images))
        row["sampling_seconds"] = processes.run_sample(
            ["--checkpoint", checkpoint, "--num_images", str(many), "--batch_size", str(min(2500, many)),
             "--device", context.device, "--output", f"{context.temporary}/{dataset}.npz"])["seconds"]
        print_row(f"{many:,} images", f"{row['sampling_seconds']:.2f} s")
        return row
    print_row("quality", "trained", *COLUMNS)
    return dict(rows=context.measure_each("gpu", measure, list(context.plan.gpu_seconds)))


def training_seconds(run: dict) -> float:
    """How long the training loop of a run of train.py took, from the first step to the last record."""
    first, last = run["records"][0], run["records"][-1]
    first_seconds = first["images_seen"] / first["images_per_second"]
    return last["seconds"] - first["seconds"] + first_seconds
