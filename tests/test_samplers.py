"""Samplers, checked on Gaussian data: there the perfect denoiser and the exact path are known, without any training.

Every sampler is affine in its noise then, so its mean and variance follow without Monte Carlo: run a batch in which
element k gets a one as its k-th noise and zeros elsewhere, and sum the squares of the answers.
"""

import inspect
import math
import weakref
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from diffusion import SCHEDULES, DiffusionProcess
from models import create_model
from samplers import (
    ADAMS_BASHFORTH,
    HIGHEST_NOISE,
    SAMPLERS,
    SPACINGS,
    ddim,
    ddpm,
    dpmpp_2m,
    expectations,
    final_image,
    generate,
    heun,
    highest_noise,
    image_noise,
    ipndm,
    noise_range,
    spaced_timesteps,
    uniform_timesteps,
)

MEAN = torch.tensor([[-0.5, 0.0, 0.3], [0.5, -0.2, 0.1]], dtype=torch.float64).view(1, 1, 2, 3)
STD = torch.tensor([[0.2, 0.5, 1.0], [0.3, 0.8, 0.4]], dtype=torch.float64).view(1, 1, 2, 3)
all_samplers = pytest.mark.parametrize("sampler", [row.function for row in SAMPLERS.values()], ids=SAMPLERS)


def perfect_denoiser(process):
    """E[x_0 | x_t] for independent pixels N(MEAN, STD²)."""
    def denoise(x_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x_t - alpha * MEAN)
    return denoise


def mean_and_std(sampler, process, timesteps, **options):
    """Exact mean and standard deviation of what a sampler makes of Gaussian data."""
    draws, batch = 0, len(timesteps) + 2  # element 0 gets no noise at all, x_T is the first noise

    def one_hot(*_):
        nonlocal draws
        draws += 1
        assert draws < batch
        return torch.zeros(batch, *MEAN.shape[1:], dtype=torch.float64).index_fill_(0, torch.tensor([draws]), 1)
    image = final_image(sampler(perfect_denoiser(process), one_hot(), timesteps, process, randn=one_hot, **options))
    return image[:1], (image[1:] - image[:1]).square().sum(0, keepdim=True).sqrt()


# --------------------------------------------------------------------------------------- the right distribution


@pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 0.5}), ("ddim", {"eta": 1.0}),
                                           ("dpmpp_2m", {}), ("heun", {}), ("ipndm", {})])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_sampler_reproduces_the_mean_and_spread_of_the_data(name, options, schedule):
    process = DiffusionProcess(500, schedule)
    mean, std = mean_and_std(SAMPLERS[name].function, process, uniform_timesteps(500, 500), **options)
    # A first-order step is wrong by O(1/steps); measured up to 0.02 with 500.
    assert_close(mean, MEAN, rtol=0, atol=0.03)
    assert_close(std, STD, rtol=0, atol=0.03)


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpmpp_2m", 0.0),
                                       ("heun", 0.0)])
def test_more_steps_bring_the_spread_nearer_to_that_of_the_data(name, eta):
    process = DiffusionProcess(1000, "cosine")
    errors = []
    for steps in (10, 40, 160):
        _, std = mean_and_std(SAMPLERS[name].function, process, uniform_timesteps(1000, steps), eta=eta)
        errors.append((std - STD).abs().max())
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


@all_samplers
def test_one_step_gives_the_expected_image(sampler):
    process = DiffusionProcess(100)
    x_T = torch.ones(2, 1, 2, 3, dtype=torch.float64)
    [(t, image, x_0_hat)] = sampler(perfect_denoiser(process), x_T, [99], process)
    assert t == -1
    assert_close(image, x_0_hat, rtol=1e-12, atol=1e-12)
    assert_close(image, perfect_denoiser(process)(x_T, 99), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ order of convergence


def equal_log_snr_times(process, steps, last=4.0):
    """Real times, equally spaced in log-SNR, from T-1 to where the log-SNR is `last`."""
    T = process.num_timesteps
    table = process.log_snr(torch.arange(T, dtype=torch.float64)).flatten().numpy()
    levels = np.linspace(table[-1], last, steps + 1)
    return [float(T - 1), *np.interp(-levels[1:], -table, np.arange(T)).tolist()]


def exact_path(process, x_t, t, s):
    """The probability-flow ODE's x_s from x_t, for Gaussian data."""
    (a_t, a_s), (v_t, v_s) = ((process.alpha(u) for u in (t, s)),
                              ((process.alpha(u) * STD) ** 2 + process.sigma(u) ** 2 for u in (t, s)))
    return a_s * MEAN + (x_t - a_t * MEAN) * (v_s / v_t).sqrt()


def path_error(sampler, process, steps):
    timesteps = equal_log_snr_times(process, steps)
    x_T = torch.linspace(-2, 2, 30, dtype=torch.float64).view(5, 1, 2, 3)
    reached = {t: x for t, x, _ in sampler(perfect_denoiser(process), x_T, timesteps, process)}
    return (reached[timesteps[-1]] - exact_path(process, x_T, timesteps[0], timesteps[-1])).abs().max().item()


@pytest.mark.parametrize("weights", ADAMS_BASHFORTH, ids=len)
def test_the_weights_of_ipndm_integrate_polynomials_exactly(weights):
    """From 0 to 1, by the values at 0, -1, -2 ...: x^power has the integral 1 / (power + 1)."""
    for power in range(len(weights)):
        assert sum(weight * (-k) ** power for k, weight in enumerate(weights)) == pytest.approx(1 / (power + 1))


@pytest.mark.parametrize("sampler, low, high", [(ddim, 0.8, 1.2), (dpmpp_2m, 1.7, 2.3), (heun, 1.7, 2.3),
                                                (ipndm, 1.7, 2.3)], ids=["ddim", "dpmpp_2m", "heun", "ipndm"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [40, 80, 160])
def test_the_error_against_the_exact_path_falls_at_the_samplers_order(sampler, low, high, schedule, steps):
    process = DiffusionProcess(1000, schedule)
    order = math.log2(path_error(sampler, process, steps) / path_error(sampler, process, 2 * steps))
    assert low <= order <= high


def test_the_second_order_sampler_is_nearer_to_the_exact_path_with_the_same_evaluations():
    process = DiffusionProcess(1000, "cosine")
    assert path_error(dpmpp_2m, process, 20) < path_error(ddim, process, 20) / 3


def test_the_first_step_of_dpmpp_is_that_of_ddim():
    process, x_T = DiffusionProcess(100), torch.linspace(-2, 2, 6).double().view(1, 1, 2, 3)
    first = [next(sampler(perfect_denoiser(process), x_T, [99, 50, 10], process))[1] for sampler in (ddim, dpmpp_2m)]
    assert_close(*first, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- fresh noise


@pytest.mark.parametrize("t, s", [(99, 98), (99, 40), (50.5, 3.25), (1, 0)])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_adds_eta_squared_of_the_posterior_variance(t, s, eta):
    process = DiffusionProcess(100)
    x_T, unit = torch.linspace(-2, 2, 6).double().view(1, 1, 2, 3), torch.ones(1, 1, 2, 3).double()
    denoise = perfect_denoiser(process)
    quiet, loud = (next(ddim(denoise, x_T, [t, s], process, eta=eta, randn=lambda x, n=n: n * unit))[1] for n in (0, 1))
    mean, variance = process.posterior(x_T, denoise(x_T, t), t, s)
    assert_close((loud - quiet) ** 2, eta**2 * variance.expand_as(quiet), rtol=1e-9, atol=1e-12)
    if eta == 1:
        assert_close(quiet, mean, rtol=1e-9, atol=1e-12)


def test_ddim_with_eta_1_is_ddpm():
    process, x_T = DiffusionProcess(100), torch.linspace(-2, 2, 6).double().view(1, 1, 2, 3)
    images = []
    for sampler in (ddpm, ddim):
        generator = torch.Generator().manual_seed(0)
        images.append(final_image(sampler(
            perfect_denoiser(process), x_T, uniform_timesteps(100, 17), process, eta=1.0,
            randn=lambda x, g=generator: torch.randn(x.shape, generator=g, dtype=x.dtype))))
    assert_close(*images, rtol=1e-9, atol=1e-9)


def test_ddpm_over_all_times_is_p_sample_repeated():
    process, noises = DiffusionProcess(20, "cosine", prediction="v"), torch.randn(20, 3, 1, 4, 4).double()
    model = lambda x, t: torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 20)  # noqa: E731
    stream = iter(noises[1:])
    trajectory = ddpm(process.denoiser(model), noises[0], range(19, -1, -1), process, randn=lambda x: next(stream))
    x = noises[0]
    for (s, reached, _), noise in zip(trajectory, [*noises[1:], noises[0]], strict=True):
        x = process.p_sample(model, x, int(s) + 1, noise)
        assert_close(reached, x, rtol=0, atol=1e-6)  # the network sees its times in float32 and in float64


# -------------------------------------------------------------------------------------------------------- the contract


@all_samplers
def test_expectations_stand_beside_the_images_that_they_were_expected_from(sampler):
    process, noise = DiffusionProcess(100, "cosine"), torch.randn(1, 1, 2, 3, dtype=torch.float64)
    denoise, times = perfect_denoiser(process), [99, 60, 20, 5]
    found = list(expectations(sampler(denoise, noise, times, process), (99, noise)))
    assert [t for t, *_ in found] == [*times, -1]
    for t, x, x_0_hat in found[:-1]:
        assert_close(x_0_hat, denoise(x, torch.tensor(float(t))))
    assert_close(found[-1][2], found[-2][2])
    assert [t for t, *_ in expectations(sampler(denoise, noise, times, process))] == [*times[1:], -1]


@all_samplers
def test_samplers_share_one_signature(sampler):
    parameters = inspect.signature(sampler).parameters
    own = ["log_variance"] if sampler is ddpm else []
    assert list(parameters) == ["denoise", "x_T", "timesteps", "diffusion", "eta", "randn", *own]
    assert parameters["eta"].kind is parameters["randn"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", SAMPLERS)
def test_eta_changes_the_images_of_those_samplers_that_say_so(name):
    process, images = DiffusionProcess(20), []
    for eta in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        images.append(final_image(SAMPLERS[name].function(
            perfect_denoiser(process), torch.ones(1, 1, 2, 3).double(), [19, 12, 5], process, eta=eta,
            randn=lambda x, g=generator: torch.randn(x.shape, generator=g, dtype=x.dtype))))
    assert torch.equal(*images) == (not SAMPLERS[name].reads_eta)


decreasing = st.lists(st.integers(0, 49 * 4).map(lambda quarter: quarter / 4), min_size=1, unique=True).map(
    lambda times: sorted(times, reverse=True))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SAMPLERS)), decreasing, st.sampled_from([0.0, 0.5, 1.0]),
       st.sampled_from(sorted(SCHEDULES)))
def test_any_decreasing_list_is_walked_to_the_clean_image_with_the_promised_evaluations(name, times, eta, schedule):
    process, asked = DiffusionProcess(50, schedule), []

    def denoise(x_t, t):
        asked.append(t)
        return perfect_denoiser(process)(x_t, t)
    visited = []
    x_T = torch.ones(2, 1, 2, 3, dtype=torch.float64)
    for t, x_t, x_0_hat in SAMPLERS[name].function(denoise, x_T, times, process, eta=eta):
        visited.append(t)
        assert len(asked) == (2 * len(visited) - (t == -1) if name == "heun" else len(visited))  # Heun looks twice
        assert x_t.shape == x_0_hat.shape == x_T.shape and x_t.isfinite().all()
    assert visited == [*times[1:], -1]
    if name != "heun":
        assert [t.tolist() for t in asked] == [[t, t] for t in times]


@all_samplers
@pytest.mark.parametrize("times", [[], [3, 3], [1, 2], [9, 5, 6], [5, -1], [-1], [-2], [10, 5], [5, -0.5],
                                   [9, math.nan, 2]], ids=str)
def test_a_list_that_does_not_decrease_within_the_process_is_refused(sampler, times):
    process = DiffusionProcess(10)
    with pytest.raises(ValueError, match=r"decreasing|0\.\.9"):
        list(sampler(perfect_denoiser(process), torch.ones(1, 1, 2, 3, dtype=torch.float64), times, process))


@all_samplers
def test_samplers_keep_the_dtype_of_the_images(sampler):
    process = DiffusionProcess(10, prediction="v")
    denoise = process.denoiser(lambda x, t: torch.tanh(x))
    for _, x_t, x_0_hat in sampler(denoise, torch.ones(1, 1, 2, 3), [9, 4.5, 0], process, eta=1.0):
        assert x_t.dtype == x_0_hat.dtype == torch.float32


# --------------------------------------------------------------------------------------------------- uniform_timesteps


def test_uniform_timesteps_fall_strictly_within_the_process_for_every_number_of_steps():
    for T in [*range(1, 61), 1000]:
        for steps in range(1, T + 1):
            times = uniform_timesteps(T, steps)
            assert len(times) == steps and times[0] == T - 1 and times[-1] >= 0
            assert all(isinstance(t, int) for t in times)
            gaps = [t - s for t, s in zip(times, [*times[1:], -1], strict=True)]
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1  # as even as whole numbers can be


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_uniform_timesteps_at_the_extremes(T):
    assert uniform_timesteps(T, T) == list(range(T - 1, -1, -1))
    assert uniform_timesteps(T, 1) == [T - 1]


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_numbers_of_steps_are_refused_with_the_range(steps):
    with pytest.raises(ValueError, match=rf"1\.\.10.* not {steps}"):
        uniform_timesteps(10, steps)


# ------------------------------------------------------------------------------------------------------- other spacings


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 3, 10, 50, 1000])
def test_times_fall_strictly_within_the_process_by_every_spacing(spacing, schedule, T):
    for zero_terminal in (False, True):
        process = DiffusionProcess(T, schedule, prediction="v", zero_terminal_snr=zero_terminal, data_std=0.5)
        for steps in {1, 2, 3, min(T, 20), T}:
            if steps <= T:
                times = spaced_timesteps(process, steps, spacing)
                assert len(times) == steps and times[0] == T - 1 and times[-1] >= 0
                assert all(t > s for t, s in pairwise(times))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_terminal_signal_only_the_first_time_has_none(spacing, schedule):
    """Between T-2 and T-1 the log-SNR is -inf too, and a step from one such time to another is not defined."""
    for T in range(1, 31):
        process = DiffusionProcess(T, schedule, prediction="v", zero_terminal_snr=True, data_std=0.6)
        for steps in range(1, T + 1):
            times = spaced_timesteps(process, steps, spacing)
            assert times[0] == T - 1 and times[-1] >= 0 and all(t > s for t, s in pairwise(times))
            assert all(math.isfinite(process.log_snr(t).item()) for t in times[1:]), (T, steps, times)


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_terminal_signal_images_are_finite_in_processes_of_every_length(name):
    for T in (*range(1, 13), 20, 30):
        process = DiffusionProcess(T, "cosine", prediction="v", zero_terminal_snr=True, data_std=0.6)
        for steps, spacing in product({1, 3, T // 2, T} & {*range(1, T + 1)}, SPACINGS):
            x_T, eta = torch.ones(1, 1, 1, 1), float(SAMPLERS[name].reads_eta)
            times = spaced_timesteps(process, steps, spacing)
            image = final_image(SAMPLERS[name].function(lambda x, t: x / 2, x_T, times, process, eta=eta))
            assert image.isfinite().all(), (T, steps, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_churning_where_nothing_of_the_image_is_left_stays_finite(spacing):
    process = DiffusionProcess(50, "cosine", prediction="v", zero_terminal_snr=True)
    model = lambda x, t: torch.zeros_like(x)  # noqa: E731
    [(_, trajectory)] = generate(model, process, (1, 4, 4), range(3), sampler="heun", steps=5, eta=1.0, spacing=spacing)
    assert final_image(trajectory).isfinite().all()


def evenness(values):
    """The largest difference between two neighbouring gaps, as a share of the mean gap."""
    gaps = np.diff(np.asarray(values))
    return np.abs(np.diff(gaps)).max() / abs(gaps.mean())


@pytest.mark.parametrize("spacing, even", [
    ("uniform", lambda process, t: t),
    ("quadratic", lambda process, t: math.sqrt(t + 1)),
    ("log_snr", lambda process, t: process.log_snr(t).item()),
    ("karras", lambda process, t: math.exp(-process.log_snr(t).item() / 2 / 3)),  # the cube root of sigma/alpha
])
def test_what_falls_evenly_by_each_spacing(spacing, even):
    process = DiffusionProcess(1000, "cosine", prediction="edm", data_std=0.5)
    times = spaced_timesteps(process, 10, spacing)[1:]
    assert evenness([even(process, t) for t in times]) < 1e-2
    others = [name for name in SPACINGS if name != spacing]
    assert all(evenness([even(process, t) for t in spaced_timesteps(process, 10, name)[1:]]) > 0.1 for name in others)


@pytest.mark.parametrize("kept, lowest", [
    (dict(), 0.1), (dict(low_share=0.05), 0.05), (dict(lowest_noise=0.3), 0.3),
    (dict(low_share=0.05, lowest_noise=0.2), 0.2)])
def test_the_last_step_begins_at_the_lowest_noise_of_the_process(kept, lowest):
    process = DiffusionProcess(1000, "cosine", data_std=0.5, timestep_sampling="lognormal", **kept)
    for spacing in ("karras", "log_snr"):
        last = spaced_timesteps(process, 10, spacing)[-1]
        assert math.exp(-process.log_snr(last).item() / 2) == pytest.approx(lowest * 0.5, rel=1e-3)


def test_the_first_noise_level_is_the_highest_of_the_process_and_fits_the_size():
    assert highest_noise((1, 28, 28)) == highest_noise((2, 1, 1)) == HIGHEST_NOISE
    assert highest_noise((3, 64, 64)) == pytest.approx(2 * highest_noise((3, 32, 32)))
    for kept, highest in ((dict(), HIGHEST_NOISE), (dict(highest_noise=60.0), 60)):
        process = DiffusionProcess(1000, "cosine", data_std=0.5, **kept)
        assert noise_range(process)[1] == pytest.approx(highest * 0.5)
        levels = [-process.log_snr(t).item() / 2 for t in spaced_timesteps(process, 10, "log_snr")]
        assert 2 * levels[1] - levels[2] == pytest.approx(math.log(highest * 0.5), rel=1e-3)


@pytest.mark.parametrize("highest, low, high", [(None, 0, 0.4), (highest_noise((3, 64, 64)), 0.7, 1)])
def test_the_brightness_of_large_images_varies_as_it_should(highest, low, high):
    """Brightness has a quarter of the variance, as in photographs; drawn in ten steps with the exact denoiser."""
    shape, std = (3, 64, 64), 0.5
    process = DiffusionProcess(1000, "cosine", prediction="edm", data_std=std, highest_noise=highest)
    bright, rest = std**2 / 4, 3 * std**2 / 4  # variances of the mean of an image and of the pixels around it

    def denoise(x, t):
        alpha, sigma = process.alpha(t[0]), process.sigma(t[0])
        mean = x.mean((1, 2, 3), keepdim=True)
        return (mean * alpha * bright / (alpha**2 * bright + sigma**2 / math.prod(shape))
                + (x - mean) * alpha * rest / (alpha**2 * rest + sigma**2))
    x_T = torch.randn(200, *shape, generator=torch.Generator().manual_seed(0))
    images = final_image(dpmpp_2m(denoise, x_T, spaced_timesteps(process, 10, "karras"), process))
    assert low < images.mean((1, 2, 3)).std() / bright**0.5 < high


def test_unknown_spacings_and_impossible_numbers_are_refused():
    process = DiffusionProcess(10)
    with pytest.raises(ValueError, match="uniform, quadratic, log_snr, karras"):
        spaced_timesteps(process, 5, "even")
    for steps in (0, 11):
        with pytest.raises(ValueError, match=r"1\.\.10"):
            spaced_timesteps(process, steps, "karras")


def test_every_sampler_has_a_spacing_of_its_own_that_a_name_overrides():
    assert {row.spacing for row in SAMPLERS.values()} <= SPACINGS.keys()
    process = DiffusionProcess(100, "cosine", prediction="v")
    model = create_model(base_channels=8, time_emb_dim=8, channel_mults=[1, 2])

    def times(**options):
        [(_, trajectory)] = generate(model, process, (1, 8, 8), [0], steps=5, **options)
        return [t for t, *_ in trajectory]
    for name, row in SAMPLERS.items():
        assert times(sampler=name) == [*spaced_timesteps(process, 5, row.spacing)[1:], -1]
        assert times(sampler=name, spacing="quadratic") == [*spaced_timesteps(process, 5, "quadratic")[1:], -1]


# --------------------------------------------------------------------------------------------------------- image_noise


def test_the_noise_of_an_image_does_not_depend_on_its_batch():
    together = image_noise(range(8), 3, (1, 4, 4))
    rounds = [together(), together(torch.zeros(8, 1, 4, 4))]
    for k in range(8):
        alone = image_noise([k], 3, (1, 4, 4))
        for noise in rounds:
            assert torch.equal(alone(), noise[k:k + 1])
    shuffled = image_noise([5, 0, 7], 3, (1, 4, 4))()
    assert torch.equal(shuffled, rounds[0][[5, 0, 7]])


def test_the_noise_differs_between_images_seeds_and_calls():
    randn = image_noise(range(4), 0, (1, 4, 4))
    first, second, other = randn(), randn(), image_noise(range(4), 1, (1, 4, 4))()
    assert len(torch.cat([first, second, other]).flatten(1).unique(dim=0)) == 12


def test_the_noise_is_standard_normal():
    noise = image_noise(range(200), 0, (1, 20, 20))()
    assert noise.dtype == torch.float32 and noise.shape == (200, 1, 20, 20)
    assert noise.mean().abs() < 5 / math.sqrt(noise.numel())
    assert (noise.var() - 1).abs() < 5 * math.sqrt(2 / noise.numel())


def test_the_largest_seed_and_index_work():
    assert image_noise([2**63 - 1], 2**63 - 1, (1,))().isfinite().all()


# ------------------------------------------------------------------------------------------------------------ generate


@pytest.fixture(scope="module")
def acting():
    """A small network whose zero-initialised layers are filled, so that it acts, and its process."""
    torch.manual_seed(0)
    model = create_model(base_channels=8, time_emb_dim=16, channel_mults=[1, 2], num_classes=3, patch_size=1,
                         attention=[2]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model, DiffusionProcess(50, "cosine", prediction="v")


def made(acting, count=8, **options):
    return torch.cat([final_image(trajectory) for _, trajectory in
                      generate(*acting, (1, 8, 8), range(count), **{"steps": 10, **options})])


@pytest.mark.parametrize("options", [dict(sampler="dpmpp_2m"), dict(sampler="ddim", eta=1.0), dict(sampler="ddpm"),
                                     dict(sampler="ddpm", steps=50),
                                     dict(sampler="dpmpp_2m", labels=torch.arange(8) % 4),
                                     dict(sampler="ddpm", labels=torch.arange(8) % 4, clip=False)], ids=str)
def test_an_image_does_not_depend_on_its_batch(acting, options):
    images = [made(acting, batch_size=size, **options) for size in (1, 3, 8)]
    assert images[0].flatten(1).unique(dim=0).shape[0] == 8  # the images differ, so order matters
    for other in images[1:]:
        assert_close(other, images[0], rtol=0, atol=1e-3)  # rounding of float32 convolutions in other batches


def test_an_image_is_the_same_in_a_longer_run(acting):
    assert_close(made(acting, 3, sampler="ddpm"), made(acting, 8, sampler="ddpm")[:3], rtol=0, atol=1e-3)


def test_images_depend_on_network_seed_label_sampler_steps_and_eta(acting):
    dead = create_model(base_channels=8, time_emb_dim=16, channel_mults=[1, 2], num_classes=3)
    variants = [made(acting), made((dead, acting[1])), made(acting, seed=1), made(acting, sampler="ddim"),
                made(acting, labels=torch.ones(8, dtype=torch.int64)), made(acting, steps=9),
                made(acting, sampler="ddim", eta=0.5), made(acting, sampler="ddpm"), made(acting, clip=False)]
    for i, a in enumerate(variants):
        for b in variants[:i]:
            assert (a - b).abs().max() > 1e-2


def test_no_label_is_the_label_num_classes(acting):
    assert_close(made(acting), made(acting, labels=torch.full((8,), 3)), rtol=0, atol=0)


def test_batches_cover_the_indices_in_order_and_carry_no_gradient(acting):
    batches = [(list(batch), final_image(trajectory)) for batch, trajectory in
               generate(*acting, (1, 8, 8), [4, 2, 9, 0, 1], steps=2, batch_size=2)]
    assert [batch for batch, _ in batches] == [[4, 2], [9, 0], [1]]
    assert [len(images) for _, images in batches] == [2, 2, 1]
    assert not any(images.requires_grad for _, images in batches)


def test_images_of_a_clipped_sampler_lie_in_the_range_of_images(acting):
    assert made(acting).abs().max() <= 1


def test_generate_refuses_unknown_samplers_and_too_many_steps(acting):
    with pytest.raises(ValueError, match=r"'euler'.*ddpm, ddim, dpmpp_2m"):
        made(acting, sampler="euler")
    with pytest.raises(ValueError, match=r"1\.\.50.* not 51"):
        made(acting, steps=51)


def test_the_final_image_is_found_without_keeping_those_of_the_steps_before():
    alive = []

    def trajectory():
        for k in range(20):
            image = torch.full((1, 1, 4, 4), float(k))
            alive.append(weakref.ref(image))
            yield 19 - k, image, image
            del image
            assert sum(each() is not None for each in alive) <= 2
    assert final_image(trajectory()).unique().tolist() == [19]
    with pytest.raises(ValueError, match="not enough values"):
        final_image(iter(()))
