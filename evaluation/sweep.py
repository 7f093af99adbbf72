"""Quality against cost: samplers at several step counts, all from the same starting noise."""

from collections.abc import Callable, Sequence

from torch import Tensor

from evaluation.inputs import GeneratedImages
from utils import plain_log_ticks, pyplot, save_figure, tile

CELL_IMAGES, CELL_COLUMNS = 16, 4
TABLE_FIGURES = ("kernel_distance", "precision", "recall", "coverage", "confident")


def sweep(options: Sequence[dict], make: Callable[[dict], GeneratedImages],
          measure: Callable[[GeneratedImages], dict[str, dict]],
          show: Callable[[dict], None]) -> tuple[list[dict], list[Tensor]]:
    """(rows, pictures): figures and first images for each of the `options`, the arguments of samplers.generate.

    `show` is called with each row. A row's "series" names its line of the plot: the sampler and, if there are several,
    the guidance scale.
    """
    rows, pictures, scales = [], [], {each["guidance_scale"] for each in options}
    for each in options:
        sampler, scale, steps = each["sampler"], each["guidance_scale"], each["steps"]
        generated = make(each)
        series = sampler if len(scales) == 1 else f"{sampler} ×{scale:g}"
        rows.append(dict(series=series, sampler=sampler, steps=steps, guidance_scale=scale, nfe=generated.nfe,
                         seconds=generated.seconds, figures=measure(generated)))
        pictures.append(generated.images[:CELL_IMAGES])
        show(rows[-1])
    return rows, pictures


def print_table_header() -> None:
    """Print the first line of the table."""
    print(f"{'sampler':15} {'steps':>6} {'NFE':>6} {'seconds':>8} {'n':>8}    {'frechet':>9} {'95 % interval':^19} "
          + " ".join(f"{name.removesuffix('_distance'):>9}" for name in TABLE_FIGURES))


def print_table_row(row: dict) -> None:
    """Print one line of the table."""
    distance = row["figures"]["frechet_distance"]
    print(f"{row['series']:15} {row['steps']:6} {row['nfe']:6g} {row['seconds']:8.1f} {distance['n']:8,}    "
          f"{distance['value']:9.4f} {distance['low']:9.4f}{distance['high']:10.4f} "
          + " ".join(f"{row['figures'][name]['value']:9.4f}" if name in row["figures"] else f"{'-':>9}"
                     for name in TABLE_FIGURES), flush=True)  # without classes there is no `confident`


def plot_sweep(rows: Sequence[dict], path) -> None:
    """Draw the Fréchet distance and its interval against NFE and against seconds, one line for each series."""
    figure, panels = pyplot().subplots(1, 2, figsize=(12.5, 4.5), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row["series"] for row in rows))
    for axes, cost, label in zip(panels, ("nfe", "seconds"),
                                 ("network evaluations for an image", "seconds for all images"), strict=True):
        for i, series in enumerate(names):
            aside = 1.04 ** (i - (len(names) - 1) / 2) if cost == "nfe" else 1  # bars at the same cost lie side by side
            points = sorted((row for row in rows if row["series"] == series), key=lambda row: row[cost])
            distance = [row["figures"]["frechet_distance"] for row in points]
            spread = [[d["value"] - d["low"] for d in distance], [d["high"] - d["value"] for d in distance]]
            axes.errorbar([row[cost] * aside for row in points], [d["value"] for d in distance], spread, marker="o",
                          capsize=3, label=series)
        axes.axhline(rows[0]["figures"]["frechet_distance"]["floor"], color="gray", linestyle="--", label="real images")
        axes.set(xlabel=label, xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            plain_log_ticks(axis)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(f"Fréchet distance ({rows[0]['figures']['frechet_distance']['n']:,} images)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    save_figure(figure, path)


def plot_cells(rows: Sequence[dict], pictures: Sequence[Tensor], path) -> None:
    """Draw the first images, of one starting noise: a row for each series, a column for each step count."""
    series = list(dict.fromkeys(row["series"] for row in rows))
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    figure, cells = pyplot().subplots(len(series), len(steps), figsize=(2.4 * len(steps), 2.7 * len(series)),
                                      squeeze=False)
    for row, images in zip(rows, pictures, strict=True):
        axes = cells[series.index(row["series"]), steps.index(row["steps"])]
        axes.imshow(tile(images, CELL_COLUMNS), interpolation="nearest")
        axes.set_title(f"{row['series']}, {row['steps']} steps\n"
                       f"Fréchet {row['figures']['frechet_distance']['value']:.3g}", fontsize=9)
        axes.axis("off")
    save_figure(figure, path)
