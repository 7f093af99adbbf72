"""Diffusion of points in the plane: their density, the arrows that a sampler follows, and its paths."""

import math

import numpy as np
import torch
from torch import Tensor

from data import ImageData
from data_sources.points import CENTRE_STD, CENTRES, COLOURS, POINT_SHAPE
from diffusion import Denoise, DiffusionProcess
from evaluation.mixture import Mixture
from samplers import DEFAULT_SAMPLER, SAMPLERS, batch_time, guide, image_noise, sampler_timesteps
from utils import pyplot

NOISE_LEVELS = (math.inf, 2.0, 0.7, 0.3, 0.1)  # sigma/alpha of the columns, in standard deviations of the data
PATH_STEPS = (1, 3, 10, 50)
PATHS, ENDS = 40, 1000  # paths that are drawn, and points at whose ends there is a dot
PIXELS, ARROWS, LENGTH, MAX_CENTRES = 100, 17, 0.6, 4000


def exact_mixture(name: str, points: Tensor, label: int | None = None) -> Mixture:
    """The distribution of x_0, with this label: of the set "gaussians" its own, else that of the training points."""
    if name == "gaussians":
        centres = CENTRES if label is None else CENTRES[[label]]
        return Mixture(torch.from_numpy(centres)[:, :, None, None], CENTRE_STD)
    return Mixture(points[:MAX_CENTRES])


def learned_denoiser(model, diffusion: DiffusionProcess, label: int | None, guidance_scale: float = 1.0) -> Denoise:
    """denoise(x_t, t) of a network for all points or, guided, for those with the label; without gradients."""
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        if label is None:
            return diffusion.denoiser(model)(x_t, t)
        return guide(diffusion, model, torch.full((len(x_t),), label), guidance_scale)(x_t, t)
    return torch.no_grad()(denoise)


def column_times(diffusion: DiffusionProcess) -> list[float]:
    """The times of NOISE_LEVELS."""
    return [diffusion.time_of(-2 * math.log(level * diffusion.data_std)) for level in NOISE_LEVELS]


def grid(extent: float, count: int) -> Tensor:
    """count × count points (count², 2, 1, 1) of the square [-extent, extent]², row by row from below."""
    axis = torch.linspace(-extent, extent, count)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, *POINT_SHAPE)


def arrows(denoise: Denoise, x_t: Tensor, t: float, diffusion: DiffusionProcess) -> Tensor:
    """alpha · x_0_hat - x_t (B, 2): from x_t to where it lies without its expected noise.

    It is sigma² times the score, the gradient of log p_t (Song et al. 2021, "Score-based generative modeling").
    """
    return (diffusion.alpha(t) * denoise(x_t, batch_time(t, x_t)) - x_t).flatten(1)


def draw_arrows(axis, denoise: Denoise, exact: Mixture, t: float, diffusion: DiffusionProcess) -> None:
    """The density of x_t, and the arrows on a grid; those of the exact denoiser are LENGTH cells long on average."""
    alpha, sigma = diffusion.alpha(t).item(), diffusion.sigma(t).item()
    extent = 1.1 * alpha + 2 * sigma
    density = exact.log_density(grid(extent, PIXELS), t, diffusion).exp().view(PIXELS, PIXELS).numpy()
    axis.imshow(density, origin="lower", extent=(-extent, extent, -extent, extent), cmap="Blues", aspect="equal",
                vmax=np.quantile(density, 0.995) * 1.5)
    places = grid(extent * (1 - 1 / ARROWS), ARROWS)
    x, y = places.flatten(1).T.numpy()
    u, v = arrows(denoise, places, t, diffusion).T.numpy()
    mean = arrows(exact.denoiser(diffusion), places, t, diffusion).norm(dim=1).mean().item()
    axis.quiver(x, y, u, v, angles="xy", scale_units="xy", scale=max(mean, 1e-9) / (LENGTH * 2 * extent / ARROWS),
                width=0.005, color="black", alpha=0.75)
    axis.set_title(f"t = {t:.0f}: alpha {alpha:.2f}, sigma {sigma:.2f}", fontsize=9)
    axis.tick_params(labelsize=7)


def draw_paths(axis, denoise: Denoise, steps: int, diffusion: DiffusionProcess, sampler: str, spacing: str | None,
               seed: int) -> None:
    """The way of some points from noise to data in `steps` steps, and where all of them end."""
    randn = image_noise(range(ENDS), seed, POINT_SHAPE, diffusion.device)
    times = sampler_timesteps(diffusion, sampler, steps, spacing)
    x_T = randn()
    way = [x_T, *(x for _, x, _ in SAMPLERS[sampler].function(denoise, x_T, times, diffusion, randn=randn))]
    way = torch.stack(way).flatten(2).cpu()                                                 # (steps + 1, ENDS, 2)
    draw_points(axis, way[-1], COLOURS[1], f"{steps} step{'s' if steps > 1 else ''}")
    for path in way[:, :PATHS].unbind(1):
        axis.plot(*path.T.numpy(), color="black", linewidth=0.6, alpha=0.6, marker="." if steps <= 10 else None,
                  markersize=2.5)


def draw_points(axis, points: Tensor, colour: str, title: str) -> None:
    """Dots at points (N, 2) or (N, 2, 1, 1)."""
    axis.scatter(*points.flatten(1).T.numpy(), s=2, color=colour)
    axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)


def draw_field(data: ImageData, label: int | None, diffusion: DiffusionProcess, model=None, guidance_scale: float = 1.0,
               sampler: str = DEFAULT_SAMPLER, spacing: str | None = None, seed: int = 0):
    """A figure: arrows at several times and paths, of the model where there is one, and of the best denoiser there is.

    data     the training points
    label    of the only class to show; None: all points
    """
    points = data.images if label is None else data.images[data.labels == label]
    exact = exact_mixture(data.name, points, label)
    denoisers = {"exact": exact.denoiser(diffusion)}
    if model is not None:
        denoisers = {"learned": learned_denoiser(model, diffusion, label, guidance_scale), **denoisers}
    figure, axes = pyplot().subplots(2 * len(denoisers), len(NOISE_LEVELS), layout="constrained",
                                     figsize=(13, 5.5 * len(denoisers) + 0.3))
    for row, (name, denoise) in enumerate(denoisers.items()):
        above, below = axes[row], axes[len(denoisers) + row]
        for axis, t in zip(above, column_times(diffusion), strict=True):
            draw_arrows(axis, denoise, exact, t, diffusion)
        draw_points(below[0], points[:ENDS], COLOURS[0], "data")
        for axis, steps in zip(below[1:], PATH_STEPS, strict=True):
            draw_paths(axis, denoise, min(steps, diffusion.num_timesteps), diffusion, sampler, spacing, seed)
        guided = f", guidance {guidance_scale:g}" if name == "learned" and guidance_scale != 1 else ""
        above[0].set_ylabel(f"{name}{guided}: arrows")
        below[0].set_ylabel(f"{name}{guided}: paths of {sampler}")
    figure.suptitle("Blue: the density of x_t. Arrows: from x_t towards where it would lie without its expected noise; "
                    "their lengths have one scale in each column", fontsize=11)
    return figure
