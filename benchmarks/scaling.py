"""Measure how time and memory grow, and how close training comes to the machine's fastest matrix product."""

from collections.abc import Sequence

import numpy as np

from benchmarks.context import Context
from benchmarks.tables import print_row
from checkpoint import load_checkpoint
from runtime.progress import say


def measure_scaling(context: Context) -> dict:
    """Time and peak memory along each axis, and the exponents of the power laws that fit them.

    Of a training step; on the axis "steps", of sampling.
    """
    name, plan = context.ours[0], context.plan
    config, axes = model_config(context, name), {}
    base = dict(config=config, device=context.device, seconds=plan.seconds / 2, batch_size=plan.batch_size,
                base_channels=config["model"]["base_channels"], image_size=config["data"]["shape"][-1])
    print_row(f"scaling of {name}", "", "seconds", "MB")
    for axis, values in plan.axes.items():
        points = context.measure_each(f"scaling {axis}",
                                      lambda value, axis=axis: scaling_point(context, name, base, axis, value), values)
        if len(points) > 1:
            axes[axis] = dict(points=list(points.values()),
                              power={what: power(list(points), [point[what] for point in points.values()])
                                     for what in ("seconds", "peak_mb")})
    return dict(contestant=name, axes=axes)


def scaling_point(context: Context, name: str, base: dict, axis: str, value: int) -> dict:
    """Seconds and peak memory with one value of an axis; the other fields are as in `base`."""
    if axis == "steps":
        result = context.job("sample_steps", checkpoint=context.checkpoint(name), device=context.device,
                             images=context.plan.steps_images, steps=value)
    else:
        result = context.job("train_steps", **{**base, axis: value})
    memory = result.get("peak_gpu_mb", result["peak_mb"])
    print_row(axis, value, result["seconds"], memory)
    return dict(value=value, seconds=result["seconds"], peak_mb=memory)


def power(xs: Sequence[float], ys: Sequence[float | None]) -> float | None:
    """The p of the power law y ~ x^p: the slope of the line through the logarithms. None if a y is unknown."""
    return None if None in ys else float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def measure_peak(context: Context) -> dict:
    """The FLOP/s of a training step as a share of the fastest matrix product."""
    def measure(name: str) -> dict:
        row = context.job("peak", config=model_config(context, name), device=context.device,
                          seconds=context.plan.seconds, size=context.plan.matrix_size)
        slowest = ", ".join(f"{what} {share:.0%}" for what, share in list(row["slowest"].items())[:4])
        print_row(name, row["step_gflops"], *row["matrix_gflops"].values(), f"{row['share_of_best']:.1%}")
        say(f"    {row['arithmetic']:.0%} of the time in convolutions and matrix products, at "
            f"{row['share_within']:.1%} of the best; slowest operations: {slowest}")
        return row
    print_row("GFLOP/s", "training", "product fp32", "product bf16", "share of best")
    rows = context.measure_each("peak", measure, context.ours)
    return dict(rows=rows, ratios={name: row["share_of_best"] for name, row in rows.items()})


def model_config(context: Context, name: str) -> dict:
    """The config in the checkpoint of one of our contestants."""
    return load_checkpoint(context.checkpoint(name))["config"]
