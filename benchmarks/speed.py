"""Measure the speed of training and sampling, and their peak memory."""

import math
import statistics
from collections.abc import Sequence

from benchmarks.context import OURS, Context
from benchmarks.peers import PEERS
from benchmarks.tables import print_row, ratios
from checkpoint import load_checkpoint
from samplers import DEFAULT_STEPS

LEAST_IMAGES, LEAST_DDPM_STEPS = 64, 50  # that an extrapolated sampling time is measured with

# ---------------------------------------------------------------------------------------------------------- training


def measure_train(context: Context) -> dict:
    """Training speed in images per second: mean, lowest and highest.

    Ours: of each epoch except the first, from metrics.jsonl. Peers: of each step.
    """
    def measure(name: str) -> dict:
        speeds, parameters, precision = (peer_speeds if name in PEERS else our_speeds)(context, name)
        row = dict(images_per_second=statistics.mean(speeds), low=min(speeds), high=max(speeds), runs=len(speeds),
                   parameters=parameters, precision=precision)
        row["minutes_for_20_epochs"] = 20 * context.train_images / row["images_per_second"] / 60
        print_row(name, row["images_per_second"], row["low"], row["high"], row["minutes_for_20_epochs"], parameters)
        return row
    print_row("images per second", "mean", "low", "high", "min/20 epochs", "parameters")
    rows = context.measure_each("train", measure)
    return dict(rows=rows, ratios=ratios({n: r["images_per_second"] for n, r in rows.items()}, False))


def our_speeds(context: Context, name: str) -> tuple[list[float], int, str]:
    """(images per second of each epoch except the first, number of parameters, precision)."""
    plan = context.plan
    images = plan.train_images or images_in(context, name, plan.seconds)
    run = context.train(name, "--epochs", plan.epochs, "--train_images", images, "--sample_interval", 0)
    context.keep_first_run(name, run)
    checkpoint = load_checkpoint(run["folder"] / "model_final.pt")
    parameters = sum(weight.numel() for weight in checkpoint["model"].values())
    return epoch_speeds(run["records"], images // plan.batch_size)[1:], parameters, checkpoint["precision"]


def images_in(context: Context, name: str, seconds: float) -> int:
    """About how many images one of our contestants trains on in this time: whole batches, at least `images_of(2)`."""
    batch_size = context.plan.batch_size
    least = math.ceil(context.images_of(2) / batch_size)
    steps = context.first_run(name)["records"][-1]["images_per_second"] * seconds / batch_size
    return batch_size * min(max(least, round(steps)), context.train_images // batch_size)


def epoch_speeds(records: Sequence[dict], steps_per_epoch: int) -> list[float]:
    """Images per second of each epoch. `records` are those of metrics.jsonl, several for an epoch."""
    steps, times, previous = {}, {}, 0
    for record in records:
        epoch, count = (record["step"] - 1) // steps_per_epoch, record["step"] - previous
        steps[epoch] = steps.get(epoch, 0) + count
        times[epoch] = times.get(epoch, 0.0) + count / record["images_per_second"]
        previous = record["step"]
    return [steps[epoch] / times[epoch] for epoch in sorted(steps)]


def peer_speeds(context: Context, name: str) -> tuple[list[float], int, str]:
    """(images per second of each step, number of parameters, precision)."""
    plan = context.plan
    result = context.job("peer_train", name=name, **context.data, batch_size=plan.batch_size,
                         seconds=plan.seconds * (plan.epochs - 1))
    return result["speeds"], result["parameters"], "fp32"


# ------------------------------------------------------------------------------------------------------------ memory


MEMORY_HEADS = dict(train_mb="training", train_gpu_mb="on the GPU", sample_mb="sampling", sample_gpu_mb="on the GPU")


def measure_memory(context: Context) -> dict:
    """Peak memory of training and of sampling 64 images.

    Training by ours is all of train.py (validation, samples, checkpoint), by peers the training steps alone.
    """
    batch_size = context.plan.batch_size

    def measure(name: str) -> dict:
        if name in PEERS:
            train = context.job("peer_train", name=name, **context.data, batch_size=batch_size, seconds=0.0)
        else:
            train = context.train(name, "--epochs", 1, "--train_images", context.images_of(5), as_job=True)
        sample = context.sample(name, 64, "few", context.plan.few_steps, as_job=True)
        row = {f"{what}_{kind}": result[f"peak_{kind}"] for what, result in (("train", train), ("sample", sample))
               for kind in ("mb", "gpu_mb") if f"peak_{kind}" in result}
        if not heads:
            heads.extend(MEMORY_HEADS[each] for each in row)
            print_row("peak memory, MB", *heads)
        print_row(name, *row.values())
        return row
    heads = []
    rows = context.measure_each("memory", measure)
    imports = context.job("imports")["peak_mb"]
    print_row("imports alone", imports)
    compared = {name: row.get("train_gpu_mb", row["train_mb"]) for name, row in rows.items()}
    return dict(rows=rows, batch_size=batch_size, imports_mb=imports, ratios=ratios(compared, True))


# ---------------------------------------------------------------------------------------------------------- sampling


def measure_sample(context: Context) -> dict:
    """Seconds for few and for many images, by the fast sampler ("few") and by all steps of DDPM ("ddpm")."""
    many = context.plan.many

    def measure(name: str) -> dict:
        cells, speed = [], None
        # On a GPU the first use of its libraries takes a second or so: nearly all of the time of a few images.
        overhead = 0.0 if context.device == "cpu" else context.sample(name, 1, "few", 1)["seconds"]
        for images, sampler in ((64, "few"), (64, "ddpm"), (many, "few"), (many, "ddpm")):
            cells.append(row := sample_row(context, name, images, sampler, speed, overhead))
            source = row["extrapolated_from"]
            speed = speed or images * row["steps"] / max(row["seconds"] - overhead, 0.1 * row["seconds"], 1e-3)
            print_row(name, f"{images:,}", f"{sampler} {row['steps']}", row["seconds"],
                      f"from {source['images']:,} × {source['steps']}" if source else "measured")
        return dict(cells=cells)
    print_row("seconds", "images", "steps", "seconds", "")
    rows = context.measure_each("sample", measure)
    times: dict[tuple, dict] = {}
    for name, row in rows.items():
        for cell in row["cells"]:
            times.setdefault((cell["images"], cell["sampler"]), {})[name] = cell["seconds"]
    return dict(rows=rows, ratios={f"{images} images, {sampler}": ratios(values, True)
                                   for (images, sampler), values in times.items()})


def sample_row(context: Context, name: str, images: int, sampler: str, speed: float | None,
               overhead: float = 0.0) -> dict:
    """Seconds for some images. speed: network evaluations per second, once it is known.

    A time that would exceed --limit at this speed is extrapolated from fewer images and, for ddpm, fewer steps: but for
    the overhead, it is proportional to both.
    """
    plan, limit = context.plan, context.args.limit
    steps = plan.ddpm_steps if sampler == "ddpm" else plan.few_steps
    if sampler == "few" and name in OURS:
        steps = min(steps, DEFAULT_STEPS)
    few_images, few_steps = images, steps
    if speed and images * steps > speed * limit:
        few_images = min(images, max(LEAST_IMAGES, int(speed * limit / steps / 64) * 64))
        if sampler == "ddpm" and few_images * steps > speed * limit:
            few_steps = min(steps, max(LEAST_DDPM_STEPS, int(speed * limit / few_images)))
    result = context.sample(name, few_images, sampler, few_steps)
    measured = (few_images, few_steps) == (images, steps)
    factor = 1.0 if measured else images / few_images * steps / few_steps
    seconds = overhead + max(result["seconds"] - overhead, 0) * factor if not measured else result["seconds"]
    return dict(images=images, sampler=sampler, steps=steps, seconds=seconds,
                prompt_to_file=result.get("process_seconds") if measured else None,
                extrapolated_from=None if measured else dict(images=few_images, steps=few_steps,
                                                             seconds=result["seconds"]))
