"""Samplers on a mixture of two Gaussians, where the perfect denoiser is known but no longer linear; and churn."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffusion import SCHEDULES, DiffusionProcess
from evaluation import mixture
from evaluation.mixture import Mixture
from samplers import SAMPLERS, churn, ddim, ddpm, final_image, heun, uniform_timesteps

SHARE, MODES, STD = 0.3, torch.tensor([-0.7, 0.5], dtype=torch.float64), 0.15  # 30 % at -0.7, 70 % at 0.5
DETERMINISTIC = ("ddim", "dpmpp_2m", "heun", "ipndm")


def perfect_denoiser(process):
    """E[x_0 | x_t] of pixels that are N(MODES[0], STD²) with probability SHARE, and N(MODES[1], STD²) otherwise."""
    return Mixture(MODES.view(2, 1, 1, 1), STD, torch.tensor([SHARE, 1 - SHARE])).denoiser(process)


def normal(count, seed=0):
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_source(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def images(name, process, steps, x_T, **options):
    return final_image(SAMPLERS[name].function(perfect_denoiser(process), x_T, uniform_timesteps(1000, steps), process,
                                               randn=noise_source(1), **options))


@pytest.fixture(scope="module", autouse=True)
def one_part():
    """All images at a time: two centres take no memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "PART", 10**6)
        yield


@pytest.fixture(scope="module")
def limit(one_part):
    """Where noise leads along the ODE of the cosine schedule: heun with all 1,000 steps."""
    process = DiffusionProcess(1000, "cosine")
    x_T = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64).view(-1, 1, 1, 1)
    return process, x_T, images("heun", process, 1000, x_T)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_all_deterministic_samplers_go_to_the_same_image_in_the_limit(limit, name):
    process, x_T, end = limit
    errors = [(images(name, process, steps, x_T) - end).abs().mean().item() for steps in (20, 100, 500)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.005


@pytest.mark.parametrize("name, options", [*((name, {}) for name in DETERMINISTIC), ("ddpm", {}),
                                           ("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5}), ("heun", {"eta": 0.05})])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_sampler_finds_both_modes_with_their_share_place_and_width(name, options, schedule):
    process, count = DiffusionProcess(1000, schedule), 4000
    x = images(name, process, 200, normal(count), **options).flatten()
    left = x < MODES.mean()
    # Five standard errors of 4,000 draws, and what 200 steps miss.
    assert abs(left.double().mean() - SHARE) < 5 * math.sqrt(SHARE * (1 - SHARE) / count)
    for mode, part in zip(MODES, (x[left], x[~left]), strict=True):
        assert abs(part.mean() - mode) < 0.02
        assert abs(part.std() - STD) < 0.02


def test_ddim_with_eta_1_has_the_mean_and_variance_of_ddpm():
    process, x = DiffusionProcess(1000, "cosine"), torch.full((20_000, 1, 1, 1), 0.3, dtype=torch.float64)
    steps = [next(sampler(perfect_denoiser(process), x, [600, 500], process, eta=1.0, randn=noise_source(seed)))[1]
             for seed, sampler in enumerate((ddpm, ddim))]
    _, variance = process.posterior(x, x, 600, 500)
    assert_close(steps[0].mean(), steps[1].mean(), rtol=0, atol=5 * math.sqrt(2 * variance / len(x)))
    for step in steps:
        assert_close(step.var(), variance, rtol=5 * math.sqrt(2 / len(x)), atol=0)


# ------------------------------------------------------------------------------------------------------------- churn


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.0, 10.0, 400.5, 900.0, 999.0])
@pytest.mark.parametrize("gamma", [0.01, 0.2, math.sqrt(2) - 1])
def test_churn_goes_from_the_marginal_of_one_time_to_that_of_a_later_one(schedule, t, gamma):
    process = DiffusionProcess(1000, schedule)

    def parts(gain):  # x_t = alpha · x_0 + sigma · noise, and the fresh noise: what comes of each
        later, x = churn(torch.full((1, 1, 1, 1), gain[0], dtype=torch.float64), t, gamma, process,
                          lambda x: torch.full_like(x, gain[1]))
        return later, x.item()
    (later, kept), (_, fresh) = parts((1.0, 0.0)), parts((0.0, 1.0))
    alpha, sigma, alpha_later, sigma_later = (f(u).item() for u in (t, later) for f in (process.alpha, process.sigma))
    assert kept * alpha == pytest.approx(alpha_later, rel=1e-9)
    assert (kept * sigma) ** 2 + fresh**2 == pytest.approx(sigma_later**2, rel=1e-9)
    assert t <= later <= 999
    if later < 999:
        assert sigma_later / alpha_later == pytest.approx((1 + gamma) * sigma / alpha, rel=1e-6)


@pytest.mark.parametrize("eta", [0.01, 0.1, 1.0])
def test_churn_keeps_the_marginal_variance_on_the_way(eta):
    """Without the mixture: pixels N(0, STD²), whose denoiser is linear, so that the variance is exact."""
    process, times = DiffusionProcess(1000, "cosine"), uniform_timesteps(1000, 250)
    draws, batch = 0, len(times) + 1

    def one_hot(*_):
        nonlocal draws
        unit = torch.zeros(batch, 1, 1, 1, dtype=torch.float64)
        unit[draws] = 1
        draws += 1
        return unit

    def denoise(x_t, t):
        alpha = process.alpha(t)
        return alpha * STD**2 / (alpha**2 * STD**2 + process.sigma(t) ** 2) * x_t
    for s, x, _ in heun(denoise, one_hot(), times, process, eta=eta, randn=one_hot):
        variance = process.alpha(s) ** 2 * STD**2 + process.sigma(s) ** 2
        assert x.square().sum().item() == pytest.approx(variance.item(), rel=0.05)


def test_at_a_time_without_signal_the_density_is_that_of_the_noise():
    process = DiffusionProcess(10, "cosine", prediction="v", zero_terminal_snr=True)
    mix, x = Mixture(torch.tensor([[-1.0], [1.0]]).view(2, 1, 1, 1)), torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    normal_density = -x.flatten().double() ** 2 / 2 - math.log(2 * math.pi) / 2
    assert_close(mix.log_density(x, 9, process), normal_density)
    assert_close(mix.denoiser(process)(x, torch.tensor([9.0, 9.0])).flatten().double(), torch.zeros(2).double())
