"""Samplers: algorithms that turn noise into images, and the loop that runs them with a network.

A sampler is a generator, `sampler(denoise, x_T, timesteps, diffusion, *, eta=0., randn=torch.randn_like)`. It starts at
x_T, goes down the decreasing list `timesteps` and then to -1, the clean image; the list may be much shorter than the
process's T, which only says how finely the schedule is tabulated. After each step it yields `(t, x_t, x_0_hat)`, where
t is the time just reached and x_0_hat what was expected at the beginning of the step; the last item is (-1, image,
x_0_hat). It knows the network only as `denoise(x_t, t) -> x_0_hat`, t being `batch_time`, which it calls once for each
step (heun: twice). Guidance, labels and clipping are wrappers of `denoise`. To add a sampler: CONTRIBUTING.md.

noise_hat = (x_t - alpha_t · x_0_hat) / sigma_t is the noise that is in x_t if x_0_hat is right.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion import Denoise, DiffusionProcess
from learned_variance import KeepLastOutput, LearnedVariance

Trajectory = Iterator[tuple[float, Tensor, Tensor]]
LogVariance = Callable[[Tensor, float, float], Tensor]  # log_variance(x_t, t, s) of p(x_s | x_t): (B, C, H, W)


def step_pairs(timesteps: Sequence[float]) -> list[tuple[float, float]]:
    """(t, s) of each step: from each time to the next, and from the last to -1."""
    times = [*map(float, timesteps), -1.0]
    if len(times) < 2 or any(s >= t for t, s in pairwise(times)):
        raise ValueError(f"timesteps must be a decreasing list of at least one time from 0 up, not {list(timesteps)}")
    return list(pairwise(times))


def batch_time(t: float, x: Tensor) -> Tensor:
    """The time t, once for each image of x: (B,), float64 where the device has it."""
    return torch.full((len(x),), t, device=x.device, dtype=torch.float32 if x.device.type == "mps" else torch.float64)


def ddpm(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *, eta: float = 0.0,
         randn: Callable[[Tensor], Tensor] = torch.randn_like, log_variance: LogVariance | None = None) -> Trajectory:
    """Ancestral sampling: x_s ~ q(x_s | x_t, x_0_hat) (Ho et al. 2020, algorithm 2), on any subset of the times.

    With the true x_0 the posterior is exact for any s < t. With x_0_hat in its place the variance of x_s is too small,
    by (alpha_s (1 - r))² · Var(x_0 | x_t) with the r of `posterior`: the longer the step, the more. log_variance(x_t,
    t, s), called right after denoise(x_t, t), gives another log variance in place of the posterior's (Nichol and
    Dhariwal 2021, sections 3.1 and 4). eta is not used.
    """
    x = x_T
    for t, s in step_pairs(timesteps):
        x_0_hat = denoise(x, batch_time(t, x))
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
    for t, s in step_pairs(timesteps):
        x_0_hat = denoise(x, batch_time(t, x))
        noise_hat = (x - diffusion.alpha(t) * x_0_hat) / diffusion.sigma(t)
        fresh = eta**2 * diffusion.posterior(x, x_0_hat, t, s)[1]
        x = diffusion.alpha(s) * x_0_hat + (diffusion.sigma(s) ** 2 - fresh).clamp(min=0).sqrt() * noise_hat
        if eta and s >= 0:
            x = x + fresh.sqrt() * randn(x)
        yield s, x, x_0_hat


def consistency(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *,
                eta: float = 0.0, randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): x_s = alpha_s · x_0_hat + sigma_s · fresh noise.

    For the students of distill.py, whose x_0_hat is an image and no mean of images. The noise_hat that ddim keeps
    depends on x_0_hat; fresh noise does not. With other networks the images would lose variety. eta is not used.
    """
    x = x_T
    for t, s in step_pairs(timesteps):
        x_0_hat = denoise(x, batch_time(t, x))
        x = diffusion.alpha(s) * x_0_hat + diffusion.sigma(s) * randn(x) if s >= 0 else x_0_hat
        yield s, x, x_0_hat


def dpmpp_2m(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *,
             eta: float = 0.0, randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """DPM-Solver++ (2M): second order in the half log-SNR, reusing the last x_0_hat (Lu et al. 2022, algorithm 2).

    x_s = sigma_s / sigma_t · x_t - alpha_s · (e^-h - 1) · D,   h = (lambda_s - lambda_t) / 2,
    D = x_0_hat + (x_0_hat - previous x_0_hat) · h / (2 · previous h); D = x_0_hat in the first step, and in the last,
    where h is infinite. Deterministic: eta and randn are not used.
    """
    x, previous, previous_h = x_T, None, None
    for t, s in step_pairs(timesteps):
        x_0_hat = denoise(x, batch_time(t, x))
        h = (diffusion.log_snr(s) - diffusion.log_snr(t)) / 2
        D = x_0_hat
        if previous is not None and s >= 0:
            D = x_0_hat + h / (2 * previous_h) * (x_0_hat - previous)
        x = diffusion.sigma(s) / diffusion.sigma(t) * x - diffusion.alpha(s) * torch.expm1(-h) * D
        previous, previous_h = x_0_hat, h
        yield s, x, x_0_hat


def ddim_step(x: Tensor, x_0_hat: Tensor, t: float, s: float, diffusion: DiffusionProcess) -> Tensor:
    """x_s = alpha_s · x_0_hat + sigma_s · noise_hat: the first-order step of the probability-flow ODE from t to s."""
    keep = diffusion.sigma(s) / diffusion.sigma(t)
    return keep * x + (diffusion.alpha(s) - keep * diffusion.alpha(t)) * x_0_hat


def forward_step(x: Tensor, s: float, t: float, diffusion: DiffusionProcess, randn) -> Tensor:
    """x_t ~ q(x_t | x_s) for a later t: r · x_s + sqrt(sigma_t² - r² sigma_s²) · noise with r = alpha_t / alpha_s."""
    ratio = diffusion.alpha(t) / diffusion.alpha(s)
    return ratio * x + (diffusion.sigma(t) ** 2 - (ratio * diffusion.sigma(s)) ** 2).clamp(min=0).sqrt() * randn(x)


def churn(x: Tensor, t: float, gamma: float, diffusion: DiffusionProcess, randn) -> tuple[float, Tensor]:
    """(later, x_later): fresh noise raises sigma/alpha by the factor 1 + gamma, at most to that of the last time."""
    later = diffusion.time_of(diffusion.log_snr(t).item() - 2 * math.log1p(gamma))
    return (later, forward_step(x, t, later, diffusion, randn)) if later > t else (t, x)


# Row k, counted from 1: the weights of the k newest noise_hats, the newest first (Bashforth and Adams 1883).
ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def heun(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *, eta: float = 0.0,
         randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """Heun's method, second order: two evaluations a step, one in the last (Karras et al. 2022, algorithms 1 and 2).

    For the ODE d(x/alpha) = noise_hat d(sigma/alpha): a step with the noise_hat at its beginning (ddim), another
    evaluation at its end, and then the step with the mean of both. Where sigma/alpha falls to less than a third, as in
    the first step of the default spacing, the mean would go too far: there x_s = alpha_s · (x_0_hat at the end) +
    sigma_s · (noise_hat at the beginning), which is not in the paper. eta > 0: before each step fresh noise raises
    sigma/alpha by the factor 1 + min(eta, sqrt(2) - 1), as far as the schedule goes (`churn`).
    """
    x = x_T
    for t, s in step_pairs(timesteps):
        if eta and s >= 0:
            t, x = churn(x, t, min(eta, math.sqrt(2) - 1), diffusion, randn)
        x_0_hat = denoise(x, batch_time(t, x))
        x = ddim_step(x, x_0_hat, t, s, diffusion)
        if s >= 0:
            correction = denoise(x, batch_time(s, x)) - x_0_hat
            ratio = torch.exp((diffusion.log_snr(s) - diffusion.log_snr(t)) / 2)
            weight = ((ratio - 1) / 2).clamp(max=1)  # 1: sigma/alpha falls to a third; beyond, it overshoots
            x = x + diffusion.alpha(s) * weight * correction
        yield s, x, x_0_hat


def ipndm(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *, eta: float = 0.0,
          randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """Improved pseudo linear multistep (Zhang and Chen 2023, appendix H.2): Adams-Bashforth of order 1, 2, 3, then 4.

    A ddim step with a weighted sum of the last noise_hats; one evaluation a step. The step to -1 is that of ddim. The
    weights are those of equal steps in sigma/alpha: there a step with four noise_hats has order 4, on other smooth
    spacings order 2. The whole path has order 2, because its first step has a single noise_hat. eta and randn are not
    used.
    """
    x, noises = x_T, []
    for t, s in step_pairs(timesteps):
        x_0_hat = denoise(x, batch_time(t, x))
        noises = [(x - diffusion.alpha(t) * x_0_hat) / diffusion.sigma(t), *noises][:4]
        x = ddim_step(x, x_0_hat, t, s, diffusion)
        if s >= 0 and len(noises) > 1:
            weights = ADAMS_BASHFORTH[len(noises) - 1]
            extra = sum(w * n for w, n in zip(weights, noises, strict=True)) - noises[0]
            x = x + (diffusion.sigma(s) - diffusion.alpha(s) * diffusion.sigma(t) / diffusion.alpha(t)) * extra
        yield s, x, x_0_hat


class Sampler(NamedTuple):
    """A sampler's function, the row of SPACINGS that it uses by default, and whether it reads eta."""

    function: Callable[..., Trajectory]
    spacing: str = "uniform"
    reads_eta: bool = False


SAMPLERS = {
    "ddpm": Sampler(ddpm),
    "ddim": Sampler(ddim, reads_eta=True),
    "dpmpp_2m": Sampler(dpmpp_2m, spacing="karras"),
    "heun": Sampler(heun, spacing="karras", reads_eta=True),
    "ipndm": Sampler(ipndm),
    "consistency": Sampler(consistency),
}

# The best for a given time in benchmarks/RECORDS.md: what all scripts do without flags.
DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_GUIDANCE = "dpmpp_2m", 10, 1.5
STUDENT_SAMPLER, STUDENT_STEPS = "consistency", 2  # for checkpoints of distill.py, which have learned the guidance too


# ------------------------------------------------------------------------------------------ wrappers of the denoiser


def guide(diffusion: DiffusionProcess, model, labels: Tensor, scale: float, interval: tuple[float, float] | None = None,
          clip: bool = True) -> Denoise:
    """Classifier-free guidance: x_0_hat = x_0_hat(no label) + scale · (x_0_hat(label) - x_0_hat(no label)).

    Ho and Salimans 2022, eq. 6, with scale = 1 + w. scale 1 is the conditional model, 0 the unconditional one. Both are
    evaluated in one batch. Guidance acts at the times low..high of `interval` (Kynkäänniemi et al. 2024), for which all
    images of a batch must have the same time; outside them, and for scale 1, only the conditional model is evaluated.
    labels (B,) int64 in 0..num_classes - 1, B at least 1.
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


# ---------------------------------------------------------------------------------------------- the times of the steps


def uniform_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` whole times, evenly spaced from T-1 down to about T/steps; for steps = T they are all the times.

    The "trailing" spacing of Lin et al. 2024: with fewer steps than T it spends no evaluation on t = 0, where hardly
    any noise is left. ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must lie in 1..{num_timesteps} (the process's number of timesteps), not {steps}")
    return [math.ceil(num_timesteps * (steps - i) / steps) - 1 for i in range(steps)]


def quadratic_timesteps(num_timesteps: int, steps: int) -> list[float]:
    """Real times, denser near t = 0: t + 1 = T ((steps - i) / steps)² (Song et al. 2021, appendix D.2)."""
    return [max(0.0, num_timesteps * ((steps - i) / steps) ** 2 - 1) for i in range(steps)]


HIGHEST_NOISE, LOWEST_NOISE, KARRAS_RHO = 20.0, 0.1, 3  # measured: benchmarks/RECORDS.md
LOWEST_TRAINED_NOISE = 0.05  # in place of LOWEST_NOISE where a low_share of the training looks at nearly clean data


def highest_noise(shape: Sequence[int]) -> float:
    """The highest sigma / alpha / data_std that the samplers need for images of this shape (C, H, W).

    HIGHEST_NOISE up to (1, 28, 28), above it in proportion to sqrt(C·H·W). The mean of all values of x_t has a noise of
    only sigma / sqrt(C·H·W), so the brightness of a large image still shows through noise that hides its forms. The
    first step goes from pure noise to this level at once. If the brightness is still visible at this level, the first
    step would have to choose it. But it can only return the mean of all images, so the images come out pale, and alike
    in brightness. Hoogeboom et al. 2023, section 3.1, shift the noise of training by the same argument. Measured:
    benchmarks/RECORDS.md.
    """
    return HIGHEST_NOISE * max(1.0, math.sqrt(math.prod(shape)) / 28)


def noise_range(diffusion: DiffusionProcess) -> tuple[float, float]:
    """The lowest and the highest sigma/alpha of `noise_level_timesteps`, within what the schedule has.

    data_std times the process's lowest_noise and highest_noise or, where it has none, LOWEST_NOISE or
    LOWEST_TRAINED_NOISE, and HIGHEST_NOISE. The last step goes from the lowest to the clean image at once.
    """
    levels = [math.exp(-diffusion.log_snr(t).item() / 2) for t in (diffusion.num_timesteps - 1, 0)]
    high = min((diffusion.config["highest_noise"] or HIGHEST_NOISE) * diffusion.data_std, levels[0])
    lowest = diffusion.config["lowest_noise"] or (
        LOWEST_TRAINED_NOISE if diffusion.config["low_share"] else LOWEST_NOISE)
    return min(high, max(lowest * diffusion.data_std, levels[1])), high


def noise_level_timesteps(diffusion: DiffusionProcess, steps: int, rho: float = math.inf) -> list[float]:
    """T-1, then `steps` - 1 real times at which (sigma/alpha)^(1/rho) falls evenly (Karras et al. 2022, eq. 5).

    The even levels lie in `noise_range`; T-1 takes the place of the highest. rho = inf: log(sigma/alpha), and with it
    the log-SNR, is evenly spaced. To start at the highest level, or at several times that level, did not make better
    images than to start at T-1 (benchmarks/RECORDS.md): x_T is pure noise, and images with so much noise are not.
    """
    low, high = noise_range(diffusion)
    share = np.linspace(0, 1, steps)
    if math.isinf(rho):
        sigmas = high ** (1 - share) * low**share
    else:
        sigmas = (high ** (1 / rho) * (1 - share) + low ** (1 / rho) * share) ** rho
    return [diffusion.num_timesteps - 1, *(diffusion.time_of(-2 * math.log(sigma)) for sigma in sigmas[1:])]


SPACINGS = {  # name -> times(diffusion, steps)
    "uniform": lambda diffusion, steps: uniform_timesteps(diffusion.num_timesteps, steps),
    "quadratic": lambda diffusion, steps: quadratic_timesteps(diffusion.num_timesteps, steps),
    "log_snr": noise_level_timesteps,
    "karras": lambda diffusion, steps: noise_level_timesteps(diffusion, steps, rho=KARRAS_RHO),
}


def spaced_timesteps(diffusion: DiffusionProcess, steps: int, spacing: str = "uniform") -> list[float]:
    """`steps` decreasing times from T-1 by a row of SPACINGS, no two the same. ValueError unless 1 <= steps <= T."""
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    uniform_timesteps(diffusion.num_timesteps, steps)  # raises for an impossible number of steps
    times = SPACINGS[spacing](diffusion, steps)
    gap, lowest = 1 / (2 * steps), 0.0
    for i in reversed(range(1, steps)):  # where T is small, several noise levels can have the same time
        times[i] = max(times[i], lowest)
        lowest = times[i] + gap
    if diffusion.alphas_cumprod[-1] == 0:  # no signal at T-1, and by interpolation none after T-2: no second time there
        for i in range(1, steps):
            times[i] = min(times[i], diffusion.num_timesteps - 2 - (i - 1) * gap)
    return times


def sampler_timesteps(diffusion: DiffusionProcess, sampler: str, steps: int, spacing: str | None = None) -> list[float]:
    """The times of a sampler's steps: `spaced_timesteps`, for spacing None by the sampler's own."""
    return spaced_timesteps(diffusion, steps, spacing or SAMPLERS[sampler].spacing)


# ---------------------------------------------------------------------------------------------- images from a network


def image_noise(indices: Iterable[int], seed: int, shape: Sequence[int], device="cpu") -> Callable[..., Tensor]:
    """A function randn() -> (B, *shape): the next standard normal noise of each image, from the image's own generator.

    The noise of image k depends on (seed, k) alone: it is the same bit for bit in every batch and on any number of
    processes. The first call gives the starting noise x_T. seed and indices: from 0 to 2^63 - 1.
    """
    generators = [np.random.Generator(np.random.Philox(key=np.array([seed, k], dtype=np.uint64))) for k in indices]

    def randn(like: Tensor | None = None) -> Tensor:
        noise = np.stack([each.standard_normal(tuple(shape), dtype=np.float32) for each in generators])
        return torch.from_numpy(noise).to(device)
    return randn


def generate(model, diffusion: DiffusionProcess, shape: Sequence[int], indices: Sequence[int], *, seed: int = 0,
             sampler: str = DEFAULT_SAMPLER, steps: int = DEFAULT_STEPS, spacing: str | None = None, eta: float = 0.0,
             batch_size: int = 64, labels: Tensor | None = None, guidance_scale: float = 1.0,
             guidance_interval: tuple[float, float] | None = None,
             clip: bool = True) -> Iterator[tuple[Sequence[int], Trajectory]]:
    """Generate the images with these indices, batch by batch: yields (indices of the batch, its trajectory).

    This is the only loop that makes images from a checkpoint. `shape` is (C, H, W). Image k of seed s has the same
    noise in every batch, and its label is labels[k]. A trajectory is a sampler's generator: consume it before asking
    for the next batch. spacing None: the sampler's default. Guidance (`guide`) needs labels. ddpm uses the learned
    variances where there are any. ValueError for unknown names and impossible numbers of steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    function, timesteps, options = SAMPLERS[sampler].function, sampler_timesteps(diffusion, sampler, steps, spacing), {}
    if function is ddpm and isinstance(diffusion, LearnedVariance):
        model = KeepLastOutput(model, diffusion)
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
        yield batch, function(denoise, randn(), timesteps, diffusion, eta=eta, randn=randn, **options)


def all_images(model, diffusion: DiffusionProcess, shape: Sequence[int], indices: Sequence[int], **options) -> Tensor:
    """The images (N, C, H, W) with these N indices, all of them in memory; options: further arguments of `generate`."""
    images = [final_image(trajectory) for _, trajectory in generate(model, diffusion, shape, indices, **options)]
    return torch.cat([torch.empty(0, *shape, device=diffusion.device), *images])


def expectations(trajectory: Trajectory, start: tuple[float, Tensor] | None = None) -> Trajectory:
    """The (t, x_t, x_0_hat) of a trajectory, but with the x_0_hat that was expected from this x_t, not before it.

    The last item keeps its own. start: the time and the noise that the trajectory began with, to be the first item.
    """
    before = start
    for t, x, x_0_hat in trajectory:
        if before:
            yield *before, x_0_hat
        before = t, x
    yield *before, x_0_hat


def final_image(trajectory: Trajectory) -> Tensor:
    """The images (B, C, H, W) at the end of a trajectory."""
    [(_, x, _)] = deque(trajectory, maxlen=1)  # a list of all steps would keep their images in memory
    return x
