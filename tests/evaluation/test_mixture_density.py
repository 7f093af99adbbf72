"""The closed form of a mixture: its density, and the denoiser that no other can beat."""

import pytest
import torch
from torch.testing import assert_close

from diffusion import SCHEDULES, DiffusionProcess
from evaluation.mixture import Mixture

CENTRES = torch.tensor([[-0.6, 0.1], [0.5, 0.4], [0.2, -0.7]], dtype=torch.float64)[:, :, None, None]
WEIGHTS, STD = torch.tensor([0.2, 0.5, 0.3]), 0.15


@pytest.fixture(params=SCHEDULES)
def process(request):
    return DiffusionProcess(100, request.param)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(count=101, extent=4.0):
    """Points of a square, and the area that each of them stands for."""
    axis = torch.linspace(-extent, extent, count, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)[:, :, None, None], (2 * extent / (count - 1)) ** 2


@pytest.mark.parametrize("t", [20, 60, 99])
def test_the_density_has_the_integral_one(process, t):
    points, area = square()
    density = Mixture(CENTRES, STD, WEIGHTS).log_density(points, t, process).exp()
    assert density.sum() * area == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("std", [0.0, STD])
@pytest.mark.parametrize("t", [10, 50, 90])
def test_the_arrows_are_sigma_squared_times_the_gradient_of_the_log_density(process, std, t):
    """alpha · x_0_hat - x_t = sigma² · grad log p_t(x_t): Tweedie's formula."""
    mixture, x_t = Mixture(CENTRES, std, WEIGHTS), normal(50, 2, 1, 1).requires_grad_()
    [gradient] = torch.autograd.grad(mixture.log_density(x_t, t, process).sum(), x_t)
    x_0_hat = mixture.denoiser(process)(x_t.detach(), t)
    assert_close(process.alpha(t) * x_0_hat - x_t.detach(), process.sigma(t) ** 2 * gradient, rtol=1e-6, atol=1e-9)


def test_no_other_guess_has_a_smaller_error(process):
    noise, kinds = normal(20_000, 2, 1, 1), torch.multinomial(WEIGHTS, 20_000, replacement=True)
    x_0 = CENTRES[kinds] + STD * normal(20_000, 2, 1, 1, seed=1)
    x_t, denoise = process.q_sample(x_0, 40, noise), Mixture(CENTRES, STD, WEIGHTS).denoiser(process)
    error = (denoise(x_t, 40) - x_0).square().mean()
    for worse in (Mixture(CENTRES, STD), Mixture(CENTRES, 2 * STD, WEIGHTS), Mixture(CENTRES, 0.0, WEIGHTS)):
        assert (worse.denoiser(process)(x_t, 40) - x_0).square().mean() > error


def test_each_point_can_have_its_own_time(process):
    denoise, x_t = Mixture(CENTRES, STD).denoiser(process), normal(3, 2, 1, 1)
    together = denoise(x_t, torch.tensor([5, 50, 99.0], dtype=torch.float64))
    assert_close(together, torch.cat([denoise(x_t[i:i + 1], t) for i, t in enumerate((5, 50, 99))]))
    assert denoise(x_t.float(), 5).dtype == torch.float32
