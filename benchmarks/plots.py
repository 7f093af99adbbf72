"""Plots of benchmark.py: scaling, and quality against training time."""

from pathlib import Path

from utils import pyplot, save_figure


def plot_scaling(found: dict, path: Path) -> None:
    """Plot time and, where it is known, peak memory along each axis."""
    figure, panels = pyplot().subplots(1, len(found["axes"]), figsize=(4 * len(found["axes"]), 3.8), squeeze=False)
    for axes, (name, axis) in zip(panels[0], found["axes"].items(), strict=True):
        values = [point["value"] for point in axis["points"]]
        memory = [point["peak_mb"] for point in axis["points"]]
        axes.plot(values, [point["seconds"] for point in axis["points"]], "o-", color="tab:blue")
        axes.set(xlabel=name, xscale="log", yscale="log", title=f"time ~ {name}^{axis['power']['seconds']:.2f}")
        axes.set_xticks(values, [str(value) for value in values])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set_ylabel("seconds" + (" for the images" if name == "steps" else " per step"), color="tab:blue")
        if None not in memory:
            memory_axes = axes.twinx()
            memory_axes.plot(values, memory, "s--", color="tab:orange")
            memory_axes.set_ylabel("peak memory, MB", color="tab:orange")
            memory_axes.set_ylim(0, 1.1 * max(memory))
    figure.suptitle(found["contestant"])
    figure.tight_layout()
    save_figure(figure, path)


def plot_quality(found: dict, path: Path) -> None:
    """Plot the Fréchet distance against the training time, one line for each contestant, and the floor."""
    figure, axes = pyplot().subplots(figsize=(7.5, 5))
    for name in dict.fromkeys(row["contestant"] for row in found["rows"]):
        own_rows = [row for row in found["rows"] if row["contestant"] == name]
        distances = [row["figures"]["frechet_distance"] for row in own_rows]
        errors = [[d["value"] - d["low"] for d in distances], [d["high"] - d["value"] for d in distances]]
        axes.errorbar([row["budget"] for row in own_rows], [d["value"] for d in distances], errors, marker="o",
                      capsize=3, label=name)
    floors = {row["num_images"]: row["figures"]["frechet_distance"]["floor"] for row in found["rows"]}
    for count, floor in floors.items():
        axes.axhline(floor, color="gray", linestyle="--", label=f"floor: {count:,} real images")
    budgets = sorted({row["budget"] for row in found["rows"]})
    axes.set(xlabel="seconds of training, start-up included", ylabel="Fréchet distance", xscale="log", yscale="log")
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


PLOTS = {"scaling": plot_scaling, "quality": plot_quality}
