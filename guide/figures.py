"""Draw the pictures of GUIDE.md from guide/measured/ and from the code, and fill its tables.

    python -m guide.figures
"""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import load_checkpoint
from data import DATASETS, load_dataset, to_model, to_uint8
from data_sources.points import COLOURS, POINT_SHAPE
from diffusion import DiffusionProcess
from evaluation.mixture import Mixture
from evaluation.point_plots import draw_paths, exact_mixture
from guide import results
from guide.measure import SPOILS
from models import create_model
from runtime.checkpoints import find_checkpoint
from runtime.parser import Parser
from runtime.script import script
from samplers import SAMPLERS, image_noise
from utils import plain_log_ticks, pyplot, save_figure, tile

TIMES = (0, 100, 250, 400, 500, 650, 800, 999)
DPI = 80
FOLDER = results.MEASURED  # of the figures that are drawn


def digits() -> Tensor:
    """The clean digits (4, 1, 28, 28) in [-1, 1] of guide/measured/digits.png."""
    picture = read_picture("digits")[:, :, 0]
    cells = torch.stack(
        [picture[1:29, 1 + 29 * i:29 + 29 * i] for i in range((picture.shape[1] - 1) // 29)])
    return to_model(cells[:, None])


def read_picture(name: str) -> Tensor:
    """A picture (H, W, 3) uint8 of guide/measured/."""
    from PIL import Image

    with Image.open(FOLDER / f"{name}.png") as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))


def bare(axis, title: str = "", label: str = "") -> None:
    """An axis without ticks and frame, with a title above and a label on the left."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)


def show(axis, image: Tensor, title: str = "", label: str = "") -> None:
    """One grey image (1, H, W) in [-1, 1]."""
    axis.imshow(to_uint8(image)[0].numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    bare(axis, title, label)


# ------------------------------------------------------------------------------------------------------ the pictures


def draw_forward():
    """A digit with two different noises, and the two moons, at the same times."""
    diffusion, x_0 = DiffusionProcess(schedule="cosine"), digits()[:1]
    moons = load_dataset("moons", "train", points=True).images[:800]
    figure, axes = pyplot().subplots(3, len(TIMES), figsize=(10.5, 4.2), layout="constrained")
    noises = [image_noise([k], 0, x_0.shape[1:])() for k in (0, 1)]
    spread = image_noise(range(len(moons)), 1, POINT_SHAPE)()
    for column, t in enumerate(TIMES):
        for row, noise in enumerate(noises):
            name = f"noise {'AB'[row]}" if column == 0 else ""
            show(axes[row, column], diffusion.q_sample(x_0, t, noise)[0], f"t = {t}" if row == 0 else "", name)
        axis, points = axes[2, column], diffusion.q_sample(moons, t, spread).flatten(1)
        axis.scatter(*points.T.numpy(), s=1, color=COLOURS[0])
        axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
        bare(axis, label="800 points" if column == 0 else "")
    return figure


def draw_schedules():
    """alpha and the log-SNR of the schedules, and a digit on both."""
    figure = pyplot().figure(figsize=(10.5, 4.6), layout="constrained")
    curves, strips = figure.subfigures(2, 1, height_ratios=(2.4, 2))
    left, right = curves.subplots(1, 2)
    t, processes = torch.arange(1000), {name: DiffusionProcess(schedule=name) for name in ("linear", "cosine")}
    for name, diffusion in processes.items():
        left.plot(t, diffusion.alpha(t).flatten(), label=name)
        right.plot(t, diffusion.log_snr(t).flatten(), label=name)
    stretched = DiffusionProcess(schedule="linear", prediction="v", zero_terminal_snr=True)
    right.plot(t[:-1], stretched.log_snr(t[:-1]).flatten(), ":", label="linear, zero terminal SNR")
    left.plot(500, processes["linear"].alpha(500), "ko", markersize=4)
    left.annotate(f"{processes['linear'].alpha(500).item():.2f} at t = 500", (500, processes["linear"].alpha(500)),
                  (560, 0.45), fontsize=9, arrowprops=dict(arrowstyle="-"))
    for axis, title in ((left, "alpha: how much of the image is left"), (right, "lambda: log signal-to-noise ratio")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("t")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    rows = strips.subplots(2, len(TIMES))
    noise, x_0 = image_noise([0], 0, (1, 28, 28))(), digits()[1:2]
    for row, (name, diffusion) in enumerate(processes.items()):
        for column, t in enumerate(TIMES):
            show(rows[row, column], diffusion.q_sample(x_0, t, noise)[0], f"t = {t}" if row == 0 else "",
                 name if column == 0 else "")
    return figure


def draw_targets():
    """The error of x_0_hat against the noise, and what remains when noise is subtracted in the wrong way."""
    figure = pyplot().figure(figsize=(10.5, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    axis, rows = left.subplots(), results.read("errors", FOLDER)["rows"]
    levels = [row["noise"] for row in rows]
    for name, key, style in (("the network", "network", "o-"), ("x_t / alpha, as it is", "as_it_is", "--"),
                             ("always the mean image", "mean_image", ":")):
        axis.plot(levels, [row[key] for row in rows], style, markersize=3, label=name)
    axis.set(xscale="log", ylim=(0, 0.75), xlabel="noise: sigma / alpha", ylabel="error of x_0_hat (root mean square)")
    times = np.geomspace(levels[0], levels[-1], 300)
    mean, std = DATASETS["mnist"].noise_level
    data_std = load_checkpoint(find_checkpoint("mnist"))["config"]["diffusion"]["data_std"]
    where = np.log(times / data_std) - mean
    axis.fill_between(times, 0.3 * np.exp(-((where / std) ** 2) / 2), alpha=0.15, color="black")
    axis.text(1.2, 0.03, "times of training", ha="center", fontsize=8)
    axis.legend(fontsize=8, loc="upper left")
    axis.grid(alpha=0.3)
    diffusion, x_0, noise = DiffusionProcess(schedule="cosine"), digits()[2:3], image_noise([5], 0, (1, 28, 28))()
    x_t, alpha, sigma = diffusion.q_sample(x_0, 400, noise), diffusion.alpha(400), diffusion.sigma(400)
    shown = {"x_t, t = 400": x_t, "the noise": noise, "x_t - noise": x_t - noise,
             "(x_t - sigma · noise)\n/ alpha": (x_t - sigma * noise) / alpha}
    for axis, (title, image) in zip(right.subplots(2, 2).flat, shown.items(), strict=True):
        show(axis, image[0].float(), title)
    return figure


def stage_shapes() -> dict[str, Sequence[int]]:
    """The shape of the output of each part of the network for MNIST, as its forward pass gives it."""
    model, shapes = create_model(base_channels=48, patch_size=2, middle_depth=3, num_classes=10), {}
    parts = {"stem": model.stem, "down 1": model.downs[0].stage, "middle": model.middle, "up 1": model.ups[0],
             "head": model.head}
    for name, part in parts.items():
        part.register_forward_hook(lambda module, _, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return shapes


def draw_network():
    """The U: each part with the shape of its output."""
    shapes = stage_shapes()
    boxes = {"x_t": (0, 2, "x_t\n1 × 28 × 28"), "stem": (1, 2, "stem: 2×2 pixels\nbecome channels"),
             "down 1": (2, 2, "down 1: one\nresidual block"),
             "middle": (3, 0.6, "middle: three residual\nblocks, attention"),
             "up 1": (4, 2, "up 1: one\nresidual block"), "head": (5, 2, "head: channels\nbecome pixels")}
    figure, axis = pyplot().subplots(figsize=(10.5, 3.2), layout="constrained")
    for name, (x, y, text) in boxes.items():
        shape = "" if name == "x_t" else f"\n{' × '.join(map(str, shapes[name]))}"
        axis.text(1.75 * x, y, text + shape, ha="center", va="center", fontsize=9,
                  bbox=dict(boxstyle="round", facecolor="#dbe9f6", edgecolor="#1f77b4"))
    arrow = dict(arrowstyle="->", color="black", shrinkA=42, shrinkB=42)
    path = ["x_t", "stem", "down 1", "middle", "up 1", "head"]
    for a, b in pairwise(path):
        axis.annotate("", (1.75 * boxes[b][0], boxes[b][1]), (1.75 * boxes[a][0], boxes[a][1]), arrowprops=arrow)
    axis.annotate("", (7, 2), (3.5, 2), arrowprops=dict(arrow, linestyle="--"))
    axis.text(5.25, 2.12, "skip: joined as more channels", ha="center", fontsize=8)
    axis.text(5.25, -0.25, "time t and label → embedding (256 numbers) → scales and shifts the channels of every block",
              ha="center", fontsize=9, color="#b04a00")
    axis.set(xlim=(-0.9, 9.7), ylim=(-0.5, 2.8))
    axis.axis("off")
    return figure


def draw_samplers():
    """The error of each sampler against the exact path, and paths of few and many steps."""
    figure, axes = pyplot().subplots(1, 4, figsize=(12, 3.3), layout="constrained", width_ratios=(1.5, 1, 1, 1))
    rows = results.read("order", FOLDER)["rows"]
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        own = [row for row in rows if row["sampler"] == sampler]
        axes[0].plot([row["evaluations"] for row in own], [row["distance"] for row in own], "o-", markersize=3,
                     label=sampler)
    axes[0].set(xscale="log", yscale="log", xlabel="evaluations of the denoiser", ylabel="distance to the exact end")
    plain_log_ticks(axes[0].xaxis)
    axes[0].legend(fontsize=8)
    axes[0].grid(alpha=0.3)
    diffusion = DiffusionProcess(schedule="cosine", data_std=0.5)
    moons = load_dataset("moons", "train", points=True)
    denoise = exact_mixture("moons", moons.images).denoiser(diffusion)
    for axis, steps in zip(axes[1:], (1, 4, 30), strict=True):
        draw_paths(axis, denoise, steps, diffusion, "ddim", "log_snr", 0)
    return figure


def draw_guidance():
    """Points that were asked to lie on the upper moon."""
    rows = results.read("guidance", FOLDER)["rows"]
    moons = load_dataset("moons", "test", points=True)
    figure, axes = pyplot().subplots(1, len(rows), figsize=(10.5, 2.5), layout="constrained")
    for axis, row in zip(axes, rows, strict=True):
        for label, colour in ((0, "#9ecae1"), (1, "#dddddd")):
            axis.scatter(*moons.images[moons.labels == label][:600].flatten(1).T.numpy(), s=2, color=colour)
        axis.scatter(*np.array(row["points"]).T, s=3, color=COLOURS[1])
        axis.set(xlim=(-1.1, 1.1), ylim=(-0.8, 0.8), aspect="equal")
        bare(axis, f"scale {row['scale']:g}")
    return figure


def draw_spoiled():
    """The digits, spoiled, with the figures of many such images."""
    rows = [row for row in results.read("spoiled", FOLDER)["rows"] if row["name"] in SPOILS]
    torch.manual_seed(0)
    images = to_uint8(digits())
    figure, axes = pyplot().subplots(2, 3, figsize=(10.5, 3.4), layout="constrained")
    for axis, row in zip(axes.flat, rows, strict=True):
        spoiled = SPOILS[row["name"]](images[[0]] if row["name"].startswith("ten") else images)
        axis.imshow(tile(spoiled.expand(4, -1, -1, -1), 4), interpolation="nearest")
        bare(axis, f"{row['name']}\ndistance {row['frechet_distance']:.2f}, precision {row['precision']:.2f}, "
                   f"recall {row['recall']:.2f}, levels {row['levels']:.2f}")
    return figure


def draw_strips(names: dict[str, str], width: float, height: float):
    """Pictures of guide/measured/ below each other, with their titles."""
    figure, axes = pyplot().subplots(len(names), 1, figsize=(width, height), layout="constrained")
    for axis, (name, title) in zip(axes, names.items(), strict=True):
        axis.imshow(read_picture(name).numpy(), interpolation="nearest")
        bare(axis, title)
    return figure


EDITS = {"inpaint": "inpainting: the picture, the mask, what is kept, and six ways to fill in the left half",
         "vary": "variations: six ways to go on from the same picture with some noise",
         "interpolate": "interpolation: from one seed to another"}
SYMPTOMS = {"untrained": "noise: a learning rate of 0", "grey": "grey: the same, where the network predicts x0",
            "diverged": "white: a learning rate of 1,000", "noise": "blotches: 10 steps of training",
            "blobs": "blurred: one step of the sampler", "guided": "hard edges, all alike: guidance 20"}


def draw_costs():
    """Work and memory of a training step against the width, one line for each size of image."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10.5, 3.2), layout="constrained")
    rows = results.read("costs", FOLDER)["rows"]
    kinds = dict.fromkeys((row["size"], row["patch_size"]) for row in rows)
    for axis, key, unit, label in ((axes[0], "multiplications", 1e9, "billion multiplications"),
                                   (axes[1], "kept", 2**20, "MiB kept for the backward pass")):
        for size, patch in kinds:
            own = [row for row in rows if (row["size"], row["patch_size"]) == (size, patch)]
            axis.plot([row["width"] for row in own], [row[key] / unit for row in own], "o-", markersize=3,
                      label=f"{size}×{size}, patches of {patch}")
        axis.set(xlabel="base_channels", ylabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def draw_relatives():
    """Paths of one number from noise to data: random, of the ODE, and of the ODE as flow matching draws it."""
    mixture = Mixture(torch.tensor([-0.6, 0.6]).view(2, 1, 1, 1), 0.05)
    diffusion = DiffusionProcess(schedule="cosine", data_std=0.6)
    denoise, times = mixture.denoiser(diffusion), [*range(999, 0, -4)]
    randn = image_noise(range(24), 2, (1, 1, 1))
    x_T = randn().double()
    figure, axes = pyplot().subplots(1, 3, figsize=(10.5, 3), layout="constrained")
    for axis, name in zip(axes, ("ddpm", "heun", "flow"), strict=True):
        function = SAMPLERS["heun" if name == "flow" else name].function
        way = [(times[0], x_T), *((t, x) for t, x, _ in function(denoise, x_T, times, diffusion, randn=randn))]
        at = torch.tensor([t for t, _ in way])
        rates = [(diffusion.alpha(t).item(), diffusion.sigma(t).item()) for t, _ in way]
        scale = torch.tensor([a + s if name == "flow" else 1.0 for a, s in rates])
        across = torch.tensor([s / (a + s) for a, s in rates]) if name == "flow" else at
        axis.plot(across, torch.stack([x.flatten() for _, x in way]) / scale[:, None], color="black", linewidth=0.6,
                  alpha=0.7)
        axis.set(xlabel="u = sigma / (alpha + sigma)" if name == "flow" else "t")
    for axis, title in zip(axes, ("ddpm: random paths", "ddim, heun: paths of the ODE",
                                  "the same paths: x_t / (alpha + sigma)"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    return figure


DRAWINGS: dict[str, Callable] = dict(
    forward=draw_forward, schedules=draw_schedules, targets=draw_targets, network=draw_network,
    samplers=draw_samplers, guidance=draw_guidance, spoiled=draw_spoiled,
    editing=lambda: draw_strips(EDITS, 9, 4), costs=draw_costs,
    symptoms=lambda: draw_strips(SYMPTOMS, 7, 5.2), relatives=draw_relatives)


# --------------------------------------------------------------------------------------------------------- the tables


def parameters_table() -> str:
    """The number of parameters of networks for MNIST: computed, not measured."""
    rows = []
    for width in (24, 32, 48, 64):
        model = create_model(base_channels=width, patch_size=2, middle_depth=3, num_classes=10)
        rows.append((width, f"{sum(p.numel() for p in model.parameters()):,}"))
    return results.table(("`--base_channels`", "parameters"), rows)


def targets_table() -> str:
    found = results.read("targets", FOLDER)
    rows = [(f"`{row['prediction']}`", row["times"], f"{row['val_loss']:.3f}",
             f"{row['distance']:.1f} ± {row['spread']:.1f}") for row in found["rows"]]
    return results.table(("prediction", "times", "loss", "distance of the points"), rows) + results.source(found)


def guidance_table() -> str:
    found = results.read("guidance", FOLDER)
    rows = [(f"{row['scale']:g}", f"{row['distance']:.1f}", f"{row['near']:.0%}", f"{row['covered']:.0%}")
            for row in found["rows"]]
    return results.table(("scale", "distance", "generated points near real ones of this moon",
                          "real points of this moon near generated ones"), rows) + results.source(found)


def spoiled_table() -> str:
    found = results.read("spoiled", FOLDER)
    rows = [(row["name"], *(f"{row[name]:.2f}" for name in ("frechet_distance", "precision", "recall", "levels")))
            for row in found["rows"]]
    return results.table((f"{found['rows'][0]['images']} images", "Fréchet distance", "precision", "recall", "levels"),
                         rows) + results.source(found)


def costs_table() -> str:
    found = results.read("costs", FOLDER)
    rows = [(f"{row['size']}×{row['size']}", "grey" if row["channels"] == 1 else "colour", row["patch_size"],
             f"{row['parameters']:,}", f"{row['multiplications'] / 1e6:,.0f} million", f"{row['kept'] / 2**20:.1f} MiB")
            for row in found["rows"] if row["width"] == 48]
    return results.table(("image", "colours", "`--patch_size`", "parameters", "multiplications", "memory"),
                         rows) + results.source(found)


TABLES = dict(parameters=parameters_table, targets=targets_table, guidance=guidance_table, spoiled=spoiled_table,
              costs=costs_table)


@script
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--folder", default=str(results.PICTURES), help="the folder to write the pictures to")
    args = parser.parse_args(argv)
    for name, draw in DRAWINGS.items():
        save_figure(draw(), Path(args.folder) / f"{name}.png", DPI)
        print(f"Saved {Path(args.folder) / name}.png")
    results.fill_file(results.ROOT / "GUIDE.md", TABLES)


if __name__ == "__main__":
    sys.exit(main())
