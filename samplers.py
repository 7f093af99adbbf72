"""Ways to walk from noise to an image.

A sampler is a generator, `sampler(denoise, x_T, timesteps, diffusion, *, eta=0., randn=torch.randn_like)`: it starts at
x_T, walks down the decreasing list `timesteps` and then to -1, the clean image, and yields `(t, x_t, x_0_hat)` after
every step, where t is the time just reached; the last item is (-1, image, x_0_hat). All it knows of the network is
`denoise(x_t, t) -> x_0_hat`, which it calls once for each step (heun: twice). Guidance, labels and clipping wrap it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diffusion import Denoise, DiffusionProcess

Trajectory = Iterator[tuple[float, Tensor, Tensor]]
LogVariance = Callable[[Tensor, float, float], Tensor]  # log_variance(x_t, t, s) -> that of x_s given x_t (B, C, H, W)


def walk(timesteps: Sequence[float]) -> list[tuple[float, float]]:
    """The pairs (t, s) of a walk: from each time to the next, and from the last to -1."""
    times = [*map(float, timesteps), -1.0]
    if len(times) < 2 or any(s >= t for t, s in pairwise(times)):
        raise ValueError(f"timesteps must be a decreasing list of at least one time from 0 up, not {list(timesteps)}")
    return list(pairwise(times))


def full_time(t: float, x: Tensor) -> Tensor:
    """The time t for each image of x: (B,), float64 where the device has it."""
    return torch.full((len(x),), t, device=x.device, dtype=torch.float32 if x.device.type == "mps" else torch.float64)


def ddpm(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *, eta: float = 0.0,
         randn: Callable[[Tensor], Tensor] = torch.randn_like, log_variance: LogVariance | None = None) -> Trajectory:
    """Ancestral sampling: x_s ~ q(x_s | x_t, x_0_hat) (Ho et al. 2020, algorithm 2), on any subset of the times.

    The posterior is the exact one from t to s, however far apart they are; the further, the less its variance is
    enough, as x_0_hat is not x_0. log_variance(x_t, t, s), asked right after denoise(x_t, t), takes its place (Nichol
    and Dhariwal 2021, section 3.1). eta is not used.
    """
    x = x_T
    for t, s in walk(timesteps):
        x_0_hat = denoise(x, full_time(t, x))
        mean, variance = diffusion.posterior(x, x_0_hat, t, s)
        if log_variance and s >= 0:
            variance = log_variance(x, t, s).exp()
        x = mean + variance.sqrt() * randn(x) if s >= 0 else mean
        yield s, x, x_0_hat


def ddim(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *, eta: float = 0.0,
         randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """Denoising diffusion implicit models (Song et al. 2021, eqs. 12 and 16).

    x_s = alpha_s · x_0_hat + sqrt(sigma_s² - c²) · noise_hat + c · fresh noise,   c² = eta² · posterior variance.
    eta = 0 follows the probability-flow ODE to first order; eta = 1 has the mean and variance of ddpm.
    """
    x = x_T
    for t, s in walk(timesteps):
        x_0_hat = denoise(x, full_time(t, x))
        noise_hat = (x - diffusion.alpha(t) * x_0_hat) / diffusion.sigma(t)
        fresh = eta**2 * diffusion.posterior(x, x_0_hat, t, s)[1]
        x = diffusion.alpha(s) * x_0_hat + (diffusion.sigma(s) ** 2 - fresh).clamp(min=0).sqrt() * noise_hat
        if eta and s >= 0:
            x = x + fresh.sqrt() * randn(x)
        yield s, x, x_0_hat


def consistency(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *,
                eta: float = 0.0, randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): x_s = alpha_s · x_0_hat + sigma_s · fresh noise.

    For the students of distill.py, whose x_0_hat is an image: it and the noise that ddim would keep depend on each
    other, fresh noise does not. Other networks' x_0_hat is a mean of images, and here their variety would be lost. eta
    is not used.
    """
    x = x_T
    for t, s in walk(timesteps):
        x_0_hat = denoise(x, full_time(t, x))
        x = diffusion.alpha(s) * x_0_hat + diffusion.sigma(s) * randn(x) if s >= 0 else x_0_hat
        yield s, x, x_0_hat


def dpmpp_2m(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *,
             eta: float = 0.0, randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """DPM-Solver++ (2M): second order in the half log-SNR, reusing the last x_0_hat (Lu et al. 2022, algorithm 2).

    x_s = sigma_s / sigma_t · x_t - alpha_s · (e^-h - 1) · D,   h = (lambda_s - lambda_t) / 2,
    D = x_0_hat + (x_0_hat - previous x_0_hat) · h / (2 · previous h), and D = x_0_hat in the first and the last step
    (where h is infinite). eta and randn are not used: it is deterministic.
    """
    x, previous, previous_h = x_T, None, None
    for t, s in walk(timesteps):
        x_0_hat = denoise(x, full_time(t, x))
        h = (diffusion.log_snr(s) - diffusion.log_snr(t)) / 2
        extrapolate = 0 if previous is None or s < 0 else h / (2 * previous_h)
        D = x_0_hat if not extrapolate else x_0_hat + extrapolate * (x_0_hat - previous)
        x = diffusion.sigma(s) / diffusion.sigma(t) * x - diffusion.alpha(s) * torch.expm1(-h) * D
        previous, previous_h = x_0_hat, h
        yield s, x, x_0_hat


def ddim_step(x: Tensor, x_0_hat: Tensor, t: float, s: float, diffusion: DiffusionProcess) -> Tensor:
    """From t to s along the probability-flow ODE, to first order: alpha_s · x_0_hat + sigma_s · noise_hat."""
    keep = diffusion.sigma(s) / diffusion.sigma(t)
    return keep * x + (diffusion.alpha(s) - keep * diffusion.alpha(t)) * x_0_hat


def renoise(x: Tensor, s: float, t: float, diffusion: DiffusionProcess, randn) -> Tensor:
    """From s forward to a later t: x_t ~ q(x_t | x_s), the alpha_t / alpha_s of x and noise to make up for the rest."""
    ratio = diffusion.alpha(t) / diffusion.alpha(s)
    return ratio * x + (diffusion.sigma(t) ** 2 - (ratio * diffusion.sigma(s)) ** 2).clamp(min=0).sqrt() * randn(x)


def _churn(x: Tensor, t: float, gamma: float, diffusion: DiffusionProcess, randn) -> tuple[float, Tensor]:
    """The time at which sigma/alpha is 1 + gamma times that at t, or the last, and x with fresh noise up to it.

    Where t is the last already, as it is.
    """
    later = diffusion.time_of(diffusion.log_snr(t).item() - 2 * math.log1p(gamma))
    return (later, renoise(x, t, later, diffusion, randn)) if later > t else (t, x)


# Weights of the newest noise_hat and of those before it, by how many there are (Bashforth and Adams 1883).
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def heun(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *, eta: float = 0.0,
         randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """Heun's method, second order, two evaluations a step but one in the last (Karras et al. 2022, algorithms 1 and 2).

    The ODE is d(x/alpha) = noise_hat d(sigma/alpha): a step with the noise_hat of its beginning (ddim), a second look
    from its end, and the mean of the two. eta > 0 churns: before each step sigma/alpha rises by the share
    gamma = min(eta, sqrt(2) - 1) through fresh noise, where the schedule has such a time.
    """
    x = x_T
    for t, s in walk(timesteps):
        if eta and s >= 0:
            t, x = _churn(x, t, min(eta, math.sqrt(2) - 1), diffusion, randn)
        x_0_hat = denoise(x, full_time(t, x))
        x = ddim_step(x, x_0_hat, t, s, diffusion)
        if s >= 0:
            correction = denoise(x, full_time(s, x)) - x_0_hat
            ratio = torch.exp((diffusion.log_snr(s) - diffusion.log_snr(t)) / 2)
            weight = ((ratio - 1) / 2).clamp(max=1)  # beyond 1, where noise falls by more than 3, it would overshoot
            x = x + diffusion.alpha(s) * weight * correction
            x_0_hat = x_0_hat + correction
        yield s, x, x_0_hat


def ipndm(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *, eta: float = 0.0,
          randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """Improved pseudo linear multistep (Zhang and Chen 2023, appendix H.2): Adams-Bashforth of order 1, 2, 3, then 4.

    A ddim step with a mixture of the last noise_hats in place of the last; one evaluation a step. Order 4 where the
    steps are equal in sigma/alpha, and 2 on other smooth spacings. eta and randn are not used.
    """
    x, noises = x_T, []
    for t, s in walk(timesteps):
        x_0_hat = denoise(x, full_time(t, x))
        noises = [(x - diffusion.alpha(t) * x_0_hat) / diffusion.sigma(t), *noises][:4]
        x = ddim_step(x, x_0_hat, t, s, diffusion)
        if s >= 0 and len(noises) > 1:
            weights = ADAMS_BASHFORTH[len(noises) - 1]
            extra = sum(w * n for w, n in zip(weights, noises, strict=True)) - noises[0]
            x = x + (diffusion.sigma(s) - diffusion.alpha(s) * diffusion.sigma(t) / diffusion.alpha(t)) * extra
        yield s, x, x_0_hat


# ------------------------------------------------------------------------------------------ wrappers of the denoiser


def guide(diffusion: DiffusionProcess, model, labels: Tensor, scale: float, interval: tuple[float, float] | None = None,
          clip: bool = True) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6): x_0_hat = x_0_hat(no label) + scale · (the difference).

    scale 1 is the conditional model, 0 the unconditional one. Both evaluations are one batched call; where the scale
    is 1, and outside `interval`, the times (low, high) in which guidance acts (Kynkäänniemi et al. 2024), there is only
    the conditional one. labels (B,) int64 in 0..num_classes - 1.
    """
    conditional = diffusion.denoiser(model, labels, clip)
    if scale == 1:
        return conditional
    both = diffusion.denoiser(model, torch.cat([labels, torch.full_like(labels, model.num_classes)]), clip=False)
    low, high = interval or (-math.inf, math.inf)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        if interval and not low <= float(t[0]) <= high:
            return conditional(x_t, t)
        with_label, without = both(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
        x_0_hat = without + scale * (with_label - without)
        return x_0_hat.clamp(-1, 1) if clip else x_0_hat
    return denoise


class Remembering:
    """A network that learned variances, and keeps its last output, so that they cost no evaluation of their own."""

    def __init__(self, model, diffusion: DiffusionProcess):
        self.model, self.diffusion, self.num_classes, self.output = model, diffusion, model.num_classes, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.output = self.model(*inputs)
        return self.output

    def log_variance(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """What the last evaluation, that of denoise(x_t, t), said of x_s: (B, C, H, W).

        With guidance it held each image twice, and the first half, with the labels, counts.
        """
        v = self.output[:len(x_t), x_t.shape[1]:].to(x_t.dtype)
        return self.diffusion.log_variance(v, t, s)


# ---------------------------------------------------------------------------------- which times, which noise, the loop


# What measured best per second (benchmarks/RECORDS.md), and what all scripts do without flags.
DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_GUIDANCE = "dpmpp_2m", 10, 1.5
STUDENT_SAMPLER, STUDENT_STEPS = "consistency", 2  # of checkpoints that distill.py wrote, which hold their guidance

SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "heun": heun, "ipndm": ipndm,
            "consistency": consistency}
ETA_SAMPLERS = ("ddim", "heun")  # those that read eta


def uniform_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` whole times, evenly spaced from T-1 down; the last step goes from about T/steps to the clean image.

    The "trailing" spacing of Lin et al. 2024: no evaluation is spent on t = 0, where nothing is left to remove, unless
    steps = T, which visits every time. ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must lie in 1..{num_timesteps} (the process's number of timesteps), not {steps}")
    return [math.ceil(num_timesteps * (steps - i) / steps) - 1 for i in range(steps)]


def quadratic_timesteps(num_timesteps: int, steps: int) -> list[float]:
    """Real times, dense towards the image: t + 1 = T ((steps - i) / steps)² (Song et al. 2021, appendix D.2)."""
    return [max(0.0, num_timesteps * ((steps - i) / steps) ** 2 - 1) for i in range(steps)]


def noise_level_timesteps(diffusion: DiffusionProcess, steps: int, rho: float = math.inf) -> list[float]:
    """T-1 and then real times at which sigma/alpha, to the power 1/rho, falls evenly (Karras et al. 2022, eq. 5).

    rho = inf: the logarithm of sigma/alpha, and so the log-SNR, falls evenly. From HIGHEST_NOISE down to LOWEST_NOISE
    times the data's standard deviation, as far as the schedule has them.
    """
    levels = [math.exp(-diffusion.log_snr(t).item() / 2) for t in (diffusion.num_timesteps - 1, 0)]
    high = min(HIGHEST_NOISE * diffusion.data_std, levels[0])
    low = min(high, max(LOWEST_NOISE * diffusion.data_std, levels[1]))
    way = np.linspace(0, 1, steps)
    if math.isinf(rho):
        sigmas = high ** (1 - way) * low**way
    else:
        sigmas = (high ** (1 / rho) * (1 - way) + low ** (1 / rho) * way) ** rho
    return [diffusion.num_timesteps - 1, *(diffusion.time_of(-2 * math.log(sigma)) for sigma in sigmas[1:])]


HIGHEST_NOISE, LOWEST_NOISE = 20.0, 0.1  # measured: benchmarks/RECORDS.md
SPACINGS = {
    "uniform": lambda diffusion, steps: uniform_timesteps(diffusion.num_timesteps, steps),
    "quadratic": lambda diffusion, steps: quadratic_timesteps(diffusion.num_timesteps, steps),
    "log_snr": noise_level_timesteps,
    "karras": lambda diffusion, steps: noise_level_timesteps(diffusion, steps, rho=3),
}
DEFAULT_SPACING = {"ddpm": "uniform", "ddim": "uniform", "dpmpp_2m": "karras", "heun": "karras", "ipndm": "uniform",
                   "consistency": "uniform"}


def spaced_timesteps(diffusion: DiffusionProcess, steps: int, spacing: str = "uniform") -> list[float]:
    """`steps` times that fall from T-1 by a row of SPACINGS, no two the same. ValueError unless 1 <= steps <= T."""
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    uniform_timesteps(diffusion.num_timesteps, steps)  # refuses impossible numbers
    times = SPACINGS[spacing](diffusion, steps)
    for i in reversed(range(1, steps)):  # few timesteps leave some levels at one time
        times[i] = max(times[i], times[i + 1] + 1 / (2 * steps) if i + 1 < steps else 0)
    return times


def image_noise(indices: Iterable[int], seed: int, shape: Sequence[int], device="cpu") -> Callable[..., Tensor]:
    """randn() -> (B, *shape): the next standard normal noise of each image; image k's depends on (seed, k) alone.

    Every image has a random stream of its own, so its noise is the same bit for bit in every batch and on every
    number of processes. The first call is the starting noise x_T. seed and indices: from 0 to 2^63 - 1.
    """
    streams = [np.random.Generator(np.random.Philox(key=np.array([seed, k], dtype=np.uint64))) for k in indices]

    def randn(like: Tensor | None = None) -> Tensor:
        noise = np.stack([stream.standard_normal(tuple(shape), dtype=np.float32) for stream in streams])
        return torch.from_numpy(noise).to(device)
    return randn


def generate(model, diffusion: DiffusionProcess, shape: Sequence[int], indices: Sequence[int], *, seed: int = 0,
             sampler: str = DEFAULT_SAMPLER, steps: int = DEFAULT_STEPS, spacing: str | None = None, eta: float = 0.0,
             batch_size: int = 64, labels: Tensor | None = None, guidance_scale: float = 1.0,
             guidance_interval: tuple[float, float] | None = None,
             clip: bool = True) -> Iterator[tuple[Sequence[int], Trajectory]]:
    """Make the images with these indices, batch by batch: yields (indices of the batch, its trajectory).

    This is the only loop that makes images from a checkpoint. `shape` is (C, H, W); image k of seed s has the same
    noise in every batch, and the same label, labels[k]. A trajectory is a sampler's generator: consume it before
    asking for the next batch. spacing None is the sampler's own (DEFAULT_SPACING). Guidance (`guide`) needs labels.
    ddpm uses the variances of a model that learned them. ValueError for unknown names, impossible step counts.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    timesteps, options = spaced_timesteps(diffusion, steps, spacing or DEFAULT_SPACING[sampler]), {}
    if sampler == "ddpm" and getattr(model, "learn_variance", False):
        model = Remembering(model, diffusion)
        options = dict(log_variance=model.log_variance)
    for start in range(0, len(indices), batch_size):
        batch = indices[start:start + batch_size]
        randn = image_noise(batch, seed, shape, diffusion.device)
        if labels is None:
            denoise = diffusion.denoiser(model, clip=clip)
        else:
            batch_labels = labels[list(batch)].to(diffusion.device)
            denoise = guide(diffusion, model, batch_labels, guidance_scale, guidance_interval, clip)
        denoise = torch.no_grad()(denoise)
        yield batch, SAMPLERS[sampler](denoise, randn(), timesteps, diffusion, eta=eta, randn=randn, **options)


def final_image(trajectory: Trajectory) -> Tensor:
    """The images (B, C, H, W) that a trajectory ends in."""
    *_, (_, x, _) = trajectory
    return x
