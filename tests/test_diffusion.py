"""The mathematics of diffusion.py, checked against closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from diffusion import (
    LOW_NOISE,
    PREDICTIONS,
    SCHEDULES,
    DiffusionProcess,
    cosine_schedule,
    linear_schedule,
)

ALL_T = (1, 2, 10, 1000, 4000)
EXACT = dict(rtol=1e-10, atol=1e-10)  # float64 rounding, amplified by 1/alpha <= 200
HO_LOG_END = float(np.log1p(-np.linspace(1e-4, 0.02, 1000)).sum())

schedules = pytest.mark.parametrize("schedule", SCHEDULES)
all_T = pytest.mark.parametrize("T", ALL_T)
predictions = pytest.mark.parametrize("prediction, data_std", [
    ("eps", 1.0), ("x0", 1.0), ("v", 1.0), ("edm", 0.3), ("edm", 1.0), ("edm", 2.0)])


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(process, count=7, dtype=torch.float64):
    """Times over the whole range, real ones between the two ends."""
    return torch.linspace(0, process.num_timesteps - 1, count, dtype=dtype)


# ------------------------------------------------------------------------------------------------------- schedules


@schedules
@all_T
def test_alphas_cumprod_falls_strictly_within_0_and_1(schedule, T):
    process = DiffusionProcess(T, schedule)
    curve = torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_cumprod])
    assert curve.shape == (T + 1,) and curve.dtype == torch.float64
    assert (curve.diff() < 0).all() and curve[-1] > 0
    assert ((process.betas > 0) & (process.betas < 1)).all()


@schedules
@all_T
def test_alphas_cumprod_is_the_product_of_one_minus_betas(schedule, T):
    process = DiffusionProcess(T, schedule)
    assert_close(process.alphas, 1 - process.betas, **EXACT)
    assert_close(torch.cumprod(1 - process.betas, 0), process.alphas_cumprod, rtol=1e-8, atol=0)


@schedules
@all_T
def test_the_walk_ends_in_nearly_pure_noise(schedule, T):
    process = DiffusionProcess(T, schedule)
    assert process.alpha(T - 1) < 0.04  # 0.0064 for linear; sqrt(1 - 0.999) for cosine in one step
    assert process.sigma(T - 1) > 0.999


@schedules
@pytest.mark.parametrize("T", [1000, 4000])
def test_the_walk_begins_nearly_clean(schedule, T):
    assert DiffusionProcess(T, schedule).alpha(0) > 0.9999


def test_linear_betas_at_1000_are_those_of_ho_et_al():
    assert_close(DiffusionProcess(1000, "linear").betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
                 rtol=1e-9, atol=0)  # betas come from a difference of numbers near 1


@all_T
def test_linear_schedules_end_at_the_same_noise_for_every_number_of_steps(T):
    assert math.log(linear_schedule(T)[-1]) == pytest.approx(HO_LOG_END, rel=1e-12)


@pytest.mark.parametrize("T", [1, 2, 10, 100, 500])
def test_a_linear_schedule_with_fewer_steps_is_a_subsequence_of_the_one_with_1000(T):
    np.testing.assert_allclose(linear_schedule(T), linear_schedule(1000)[1000 // T - 1::1000 // T], rtol=1e-12)


@all_T
def test_cosine_is_eq_17_of_nichol_and_dhariwal_until_beta_is_clipped(T):
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    curve = cosine_schedule(T)
    np.testing.assert_allclose(curve[:-1], (f / f[0])[1:-1], rtol=1e-8)
    np.testing.assert_allclose(curve[-1] / (curve[-2] if T > 1 else 1), 1 - 0.999, rtol=1e-12)


def test_other_betas_end_where_they_should():
    process = DiffusionProcess(1000, "linear", beta_start=1e-3, beta_end=0.01)
    assert_close(process.betas[[0, -1]], torch.tensor([1e-3, 0.01], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("beta_end, possible", [(0.1, True), (0.5, True), (0.999, False)])
def test_large_betas_give_a_finite_process_or_are_refused(beta_end, possible):
    if possible:
        assert DiffusionProcess(1000, "linear", beta_end=beta_end).log_snr(999).isfinite()
        return
    with pytest.raises(ValueError, match=str(beta_end)):
        DiffusionProcess(1000, "linear", beta_end=beta_end)


def test_no_time_between_two_whole_ones_is_nan_where_the_last_has_no_signal():
    process = DiffusionProcess(100, "cosine", prediction="v", zero_terminal_snr=True)
    t = torch.linspace(97, 99, 21, dtype=torch.float64)
    assert (process.log_snr(t).flatten()[11:] == -torch.inf).all() and process.log_snr(t[:11]).isfinite().all()
    assert all(process.alpha(time.item()) == 0 for time in t[11:])


@schedules
def test_zero_terminal_snr_scales_the_root_and_keeps_its_first_value(schedule):
    plain, scaled = (DiffusionProcess(100, schedule, prediction="v", zero_terminal_snr=zero).alphas_cumprod.sqrt()
                     for zero in (False, True))
    assert_close(scaled[0], plain[0], **EXACT)
    assert scaled[-1] == 0
    assert_close(scaled.diff() / plain.diff(), torch.full((99,), (plain[0] / (plain[0] - plain[-1])).item(),
                                                          dtype=torch.float64), rtol=1e-9, atol=0)


# ---------------------------------------------------------------------------------------------- alpha, sigma, log_snr


@schedules
@all_T
def test_alpha_squared_plus_sigma_squared_is_1_at_whole_and_real_times(schedule, T):
    process = DiffusionProcess(T, schedule)
    for t in (times(process, 31), torch.arange(T, dtype=torch.float64), torch.full((1,), -1.0, dtype=torch.float64)):
        total = process.alpha(t) ** 2 + process.sigma(t) ** 2
        assert_close(total, torch.ones(len(t), 1, 1, 1, dtype=torch.float64), **EXACT)
    for t in (-1, 0, (T - 1) / 3, T - 1):
        assert process.alpha(t) ** 2 + process.sigma(t) ** 2 == pytest.approx(1, abs=1e-12)


@schedules
def test_alpha_and_sigma_are_the_roots_of_alphas_cumprod(schedule):
    process = DiffusionProcess(100, schedule)
    t = torch.arange(100, dtype=torch.float64)
    assert_close(process.alpha(t).flatten(), process.alphas_cumprod.sqrt(), **EXACT)
    assert_close(process.sigma(t).flatten(), (1 - process.alphas_cumprod).sqrt(), **EXACT)


@schedules
@all_T
def test_time_minus_1_is_the_clean_image(schedule, T):
    process = DiffusionProcess(T, schedule)
    for t in (-1, -1.0, torch.tensor([-1]), torch.tensor([-1.0])):
        assert process.alpha(t).item() == 1 and process.sigma(t).item() == 0
        assert process.log_snr(t).item() == math.inf
    x_0 = images(2, 1, 4, 4)
    assert_close(process.q_sample(x_0, -1), x_0, rtol=0, atol=0)


@schedules
def test_log_snr_is_linear_between_two_entries(schedule):
    process = DiffusionProcess(20, schedule)
    whole = torch.arange(19, dtype=torch.float64)
    left, right = process.log_snr(whole), process.log_snr(whole + 1)
    for weight in (0.0, 0.25, 0.5, 0.875):
        assert_close(process.log_snr(whole + weight), (1 - weight) * left + weight * right, **EXACT)
    assert_close(left.flatten(), torch.logit(process.alphas_cumprod[:-1]), **EXACT)


def test_numbers_and_tensors_of_times_agree():
    process = DiffusionProcess(50, "cosine")
    for t in (-1, 0, 7, 7.25, 49):
        number, tensor = process.log_snr(t), process.log_snr(torch.tensor([float(t)], dtype=torch.float64))
        assert number.shape == () and tensor.shape == (1, 1, 1, 1)
        assert number.item() == tensor.item()
    assert process.log_snr(torch.tensor([3, 4])).dtype == torch.float32
    assert_close(process.log_snr(torch.tensor([3])), process.log_snr(torch.tensor([3.0])), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- forward process


@schedules
@pytest.mark.parametrize("T, t", [(1, 0), (10, 0), (10, 5), (1000, 100), (1000, 333.5), (1000, 999)])
def test_q_sample_has_the_mean_and_variance_of_the_forward_process(schedule, T, t):
    process, draws = DiffusionProcess(T, schedule), 20_000
    x_0 = images(1, 1, 2, 2, seed=1).clamp(-1, 1)
    noise = images(draws, 1, 2, 2, seed=2)
    x_t = process.q_sample(x_0.expand(draws, -1, -1, -1), t, noise)
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
    five_errors = 5 / math.sqrt(draws)  # standard errors of a mean; sqrt(2) more for a variance
    assert_close(x_t.mean(0, keepdim=True), alpha * x_0, rtol=0, atol=sigma * five_errors)
    assert_close(x_t.var(0), torch.full((1, 2, 2), sigma**2, dtype=torch.float64),
                 rtol=five_errors * math.sqrt(2), atol=0)


def test_forward_diffusion_returns_the_noise_that_it_drew_and_keeps_the_dtype():
    process = DiffusionProcess(100)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x_0 = images(3, 1, 4, 4).to(dtype)
        torch.manual_seed(0)
        x_t, noise = process.forward_diffusion(x_0, torch.tensor([0, 50, 99]))
        assert x_t.dtype == noise.dtype == dtype and noise.std() > 0.5
        assert_close(process.q_sample(x_0, torch.tensor([0, 50, 99]), noise), x_t, rtol=0, atol=0)


def test_each_image_has_its_own_time():
    process, x_0, noise = DiffusionProcess(100), images(3, 1, 4, 4), images(3, 1, 4, 4, seed=1)
    t = torch.tensor([0.0, 17.5, 99.0], dtype=torch.float64)
    together = process.q_sample(x_0, t, noise)
    one_by_one = [process.q_sample(x_0[i:i + 1], t[i].item(), noise[i:i + 1]) for i in range(3)]
    assert_close(together, torch.cat(one_by_one), **EXACT)


# -------------------------------------------------------------------------------------------------- parametrisations


@schedules
@predictions
@pytest.mark.parametrize("T", [1, 2, 1000])
def test_to_x_0_and_to_noise_are_the_inverse_of_target(schedule, prediction, data_std, T):
    process = DiffusionProcess(T, schedule, prediction=prediction, data_std=data_std)
    t = times(process)
    x_0, noise = images(7, 1, 4, 4), images(7, 1, 4, 4, seed=1)
    x_t = process.q_sample(x_0, t, noise)
    output = process.target(x_0, noise, t)
    assert_close(process.to_x_0(output, x_t, t), x_0, **EXACT)
    assert_close(process.to_noise(output, x_t, t), noise, **EXACT)
    assert_close(process.target(process.to_x_0(output, x_t, t), process.to_noise(output, x_t, t), t), output, **EXACT)


@predictions
def test_any_output_is_a_consistent_split_of_x_t_into_image_and_noise(prediction, data_std):
    process = DiffusionProcess(100, prediction=prediction, data_std=data_std)
    t, x_t, output = times(process), images(7, 1, 4, 4), images(7, 1, 4, 4, seed=1)
    x_0_hat, noise_hat = process.to_x_0(output, x_t, t), process.to_noise(output, x_t, t)
    assert_close(process.q_sample(x_0_hat, t, noise_hat), x_t, **EXACT)


def test_targets_are_what_the_papers_say():
    x_0, noise, t = images(4, 1, 2, 2), images(4, 1, 2, 2, seed=1), torch.tensor([0.0, 3, 50.5, 99]).double()
    process = {name: DiffusionProcess(100, prediction=name) for name in PREDICTIONS}
    alpha, sigma = process["v"].alpha(t), process["v"].sigma(t)
    assert_close(process["eps"].target(x_0, noise, t), noise, rtol=0, atol=0)
    assert_close(process["x0"].target(x_0, noise, t), x_0, rtol=0, atol=0)
    assert_close(process["v"].target(x_0, noise, t), alpha * noise - sigma * x_0, **EXACT)


def test_edm_for_data_of_standard_deviation_1_is_minus_v():
    edm, v = (DiffusionProcess(100, prediction=name) for name in ("edm", "v"))
    x_0, noise, t = images(7, 1, 4, 4), images(7, 1, 4, 4, seed=1), times(v)
    assert_close(edm.target(x_0, noise, t), -v.target(x_0, noise, t), **EXACT)


@pytest.mark.parametrize("data_std", [0.3, 0.66, 1.0, 2.0])
@pytest.mark.parametrize("t", [0, 40, 70.5, 99])
def test_edm_shows_the_network_variance_1_and_asks_it_for_variance_1(data_std, t):
    process, draws = DiffusionProcess(100, prediction="edm", data_std=data_std), 40_000
    x_0, noise = data_std * images(draws, 1, 1, 1), images(draws, 1, 1, 1, seed=1)
    seen = []
    process.predict(lambda x, _: seen.append(x) or x, process.q_sample(x_0, t, noise), t)
    target = process.target(x_0, noise, t)
    five_errors = 5 * math.sqrt(2 / draws)
    assert seen[0].var().item() == pytest.approx(1, abs=five_errors)
    assert target.var().item() == pytest.approx(1, abs=five_errors)
    assert (seen[0] * target).mean().item() == pytest.approx(0, abs=five_errors)  # Karras et al.: no leak of the input


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_other_parametrisations_show_the_network_x_t_itself(prediction):
    process, x_t = DiffusionProcess(100, prediction=prediction, data_std=0.5), images(2, 1, 4, 4)
    assert_close(process.predict(lambda x, t: x, x_t, torch.tensor([3, 80])), x_t, rtol=0, atol=0)


def test_a_model_gets_one_time_for_each_image_and_the_labels():
    process, seen = DiffusionProcess(100), []

    def model(x, t, *labels):
        seen.append((t.tolist(), *labels))
        return x
    process.predict(model, images(3, 1, 4, 4), 7)
    process.predict(model, images(3, 1, 4, 4), torch.tensor([1, 2, 3]), labels="labels")
    assert seen == [([7.0] * 3,), ([1, 2, 3], "labels")]


@predictions
def test_the_denoiser_of_a_perfect_network_returns_x_0(prediction, data_std):
    process = DiffusionProcess(100, prediction=prediction, data_std=data_std)
    x_0, noise, t = images(7, 1, 4, 4).clamp(-1, 1), images(7, 1, 4, 4, seed=1), times(process)
    denoise = process.denoiser(lambda x, t: process.target(x_0, noise, t))
    assert_close(denoise(process.q_sample(x_0, t, noise), t), x_0, **EXACT)


def test_clip_keeps_x_0_hat_in_the_range_of_images():
    process, x_t = DiffusionProcess(100, prediction="x0"), 3 * images(4, 1, 4, 4)
    assert process.denoiser(lambda x, t: x)(x_t, 5).abs().max() == 1
    assert_close(process.denoiser(lambda x, t: x, clip=False)(x_t, 5), x_t, **EXACT)


# -------------------------------------------------------------------------------------------------- the way backwards


def composed(process, t, s):
    """(mean's factor of x_0, variance) of q(x_t | x_0) followed by posterior(s | t, x_0)."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    keep, variance = process.posterior(one, zero, t, s)
    move, _ = process.posterior(zero, one, t, s)
    return keep * process.alpha(t) + move, keep**2 * process.sigma(t) ** 2 + variance


@schedules
@all_T
def test_posterior_after_q_sample_is_q_sample_for_neighbours_and_for_the_clean_image(schedule, T):
    process = DiffusionProcess(T, schedule)
    for t in {0, 1 % T, T // 2, T - 1}:
        for s in {t - 1, -1}:
            mean, variance = composed(process, t, s)
            assert mean.item() == pytest.approx(process.alpha(s).item(), abs=1e-12)
            assert variance.item() == pytest.approx(process.sigma(s).item() ** 2, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 300), st.data())
def test_posterior_after_q_sample_is_q_sample_for_any_two_times(schedule, T, data):
    process = DiffusionProcess(T, schedule)
    t = data.draw(st.floats(0.01, T - 1))
    s = data.draw(st.floats(0, 0.999).map(lambda part: part * t))
    mean, variance = composed(process, t, s)
    assert mean.item() == pytest.approx(process.alpha(s).item(), abs=1e-10)
    assert variance.item() == pytest.approx(process.sigma(s).item() ** 2, abs=1e-10)


def test_the_posterior_of_neighbours_is_eqs_6_and_7_of_ho_et_al():
    process, x_t, x_0 = DiffusionProcess(1000), images(3, 1, 2, 2), images(3, 1, 2, 2, seed=1)
    t = torch.tensor([1, 500, 999])
    ac, before, beta = process.alphas_cumprod[t], process.alphas_cumprod[t - 1], process.betas[t]
    mean, variance = process.posterior(x_t, x_0, t.double(), t.double() - 1)
    ho_mean = (before.sqrt() * beta / (1 - ac)).view(-1, 1, 1, 1) * x_0 + (
        (1 - beta).sqrt() * (1 - before) / (1 - ac)).view(-1, 1, 1, 1) * x_t
    assert_close(mean, ho_mean, **EXACT)
    assert_close(variance.flatten(), (1 - before) / (1 - ac) * beta, **EXACT)


def test_the_posterior_of_the_clean_image_is_x_0_hat_itself():
    process, x_t, x_0 = DiffusionProcess(10), images(2, 1, 2, 2), images(2, 1, 2, 2, seed=1)
    for t in (0, 4.5, 9):
        mean, variance = process.posterior(x_t, x_0, t, -1)
        assert_close(mean, x_0, rtol=0, atol=0)
        assert variance.item() == 0


def test_posterior_takes_numbers_and_tensors():
    process, x_t, x_0 = DiffusionProcess(100), images(2, 1, 2, 2), images(2, 1, 2, 2, seed=1)
    by_number = process.posterior(x_t, x_0, 50, 20.5)
    by_tensor = process.posterior(x_t, x_0, torch.full((2,), 50.0).double(), torch.full((2,), 20.5).double())
    assert_close(by_number[0], by_tensor[0], **EXACT)
    assert by_number[1].shape == () and by_tensor[1].shape == (2, 1, 1, 1)
    assert_close(by_number[1].expand(2, 1, 1, 1), by_tensor[1], **EXACT)


def test_p_sample_adds_no_noise_at_time_0():
    process, x_t = DiffusionProcess(10, prediction="x0"), images(3, 1, 4, 4)
    for t in (0, torch.zeros(3, dtype=torch.int64)):
        assert_close(process.p_sample(lambda x, t: 0.1 * x, x_t, t, noise=1e6 * images(3, 1, 4, 4)), 0.1 * x_t, **EXACT)


def test_p_sample_adds_the_posterior_standard_deviation_times_the_noise():
    process, x_t, noise = DiffusionProcess(100, prediction="v"), images(2, 1, 4, 4), images(2, 1, 4, 4, seed=1)
    model = lambda x, t: torch.sin(x)  # noqa: E731
    x_0_hat = process.denoiser(model)(x_t, 60)
    mean, variance = process.posterior(x_t, x_0_hat, 60, 59)
    assert_close(process.p_sample(model, x_t, 60, noise), mean + variance.sqrt() * noise, **EXACT)
    assert variance > 0


def test_sample_is_p_sample_from_the_last_time_to_the_first():
    process = DiffusionProcess(5, prediction="v")
    model = lambda x, t: torch.tanh(x) * (1 + t[:, None, None, None] / 10)  # noqa: E731
    torch.manual_seed(3)
    images = process.sample(model, image_size=4, batch_size=2, channels=3)
    torch.manual_seed(3)
    x = torch.randn(2, 3, 4, 4)
    for t in (4, 3, 2, 1, 0):
        x = process.p_sample(model, x, t)
    assert_close(images, x, rtol=0, atol=0)
    assert images.shape == (2, 3, 4, 4) and images.abs().max() <= 1


# -------------------------------------------------------------------------------------------------- training times


@pytest.mark.parametrize("prediction, weight", [
    ("eps", lambda snr: snr.clamp(max=5) / snr), ("x0", lambda snr: snr.clamp(max=5)),
    ("v", lambda snr: snr.clamp(max=5) / (snr + 1))])
def test_min_snr_is_the_weight_of_hang_et_al(prediction, weight):
    """Hang et al. 2023, for each prediction."""
    t, x_0 = torch.tensor([0, 20, 50, 80, 95]), torch.linspace(-1, 1, 80).view(5, 1, 4, 4)
    noise = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = [DiffusionProcess(100, "cosine", prediction=prediction, loss_weight=name, snr_gamma=5.0).loss(
        lambda x, _: 0.3 * torch.ones_like(x), x_0, t, noise, reduction="none") for name in ("min_snr", "target")]
    snr = DiffusionProcess(100, "cosine").log_snr(t).flatten().exp()
    assert snr.min() < 5 < snr.max()
    assert_close(losses[0] / losses[1], weight(snr), rtol=1e-5, atol=0, check_dtype=False)


@pytest.mark.parametrize("sampling", ["uniform", "stratified", "lognormal"])
@schedules
@all_T
def test_training_times_are_whole_and_in_range(sampling, schedule, T):
    process = DiffusionProcess(T, schedule, timestep_sampling=sampling)
    t = process.sample_timesteps(1000, torch.Generator().manual_seed(0))
    assert t.shape == (1000,) and t.dtype == torch.int64
    assert t.min() >= 0 and t.max() <= T - 1


@pytest.mark.parametrize("sampling", ["uniform", "stratified", "lognormal"])
def test_training_times_are_in_range_even_if_a_random_number_rounds_to_1(sampling, monkeypatch):
    below_1 = float(np.nextafter(np.float32(1), np.float32(0)))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, below_1))
    t = DiffusionProcess(1000, timestep_sampling=sampling).sample_timesteps(128)
    assert 990 < t.max() <= 999


@pytest.mark.parametrize("sampling", ["uniform", "stratified", "lognormal"])
def test_training_times_depend_on_the_generator_alone(sampling):
    process = DiffusionProcess(1000, timestep_sampling=sampling)
    draw = [process.sample_timesteps(64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_uniform_times_are_uniform():
    t = DiffusionProcess(10).sample_timesteps(100_000, torch.Generator().manual_seed(0))
    assert_close(t.bincount(minlength=10) / len(t), torch.full((10,), 0.1), rtol=0, atol=0.005)  # 5 standard errors


@pytest.mark.parametrize("batch_size", [1, 2, 10, 50])
def test_stratified_times_fall_one_into_each_part(batch_size):
    process = DiffusionProcess(100, timestep_sampling="stratified")
    t = process.sample_timesteps(batch_size, torch.Generator().manual_seed(0))
    assert (t // (100 // batch_size)).tolist() == list(range(batch_size))


@schedules
@pytest.mark.parametrize("mean, std, data_std", [(-0.5, 1.2, 1.0), (-1.2, 0.8, 0.6), (0.3, 2.0, 0.5)])
def test_lognormal_times_have_a_normal_log_noise_level(schedule, mean, std, data_std):
    process = DiffusionProcess(4000, schedule, data_std=data_std, timestep_sampling="lognormal", noise_mean=mean,
                               noise_std=std)
    levels = -process.log_snr(torch.arange(4000, dtype=torch.float64)).flatten() / 2 - math.log(data_std)
    drawn = levels[process.sample_timesteps(20_000, torch.Generator().manual_seed(0))]
    points = torch.linspace(levels[0], levels[-1], 21, dtype=torch.float64)
    normal = torch.special.ndtr((points - mean) / std)
    intended = (normal - normal[0]) / (normal[-1] - normal[0])  # what the schedule reaches of the density
    found = (drawn[:, None] <= points).double().mean(0)
    # Half of the widest bin of a 4000-step schedule holds 0.002 of the mass, a stratified draw misses by 1/20,000.
    assert_close(found[1:-1], intended[1:-1], rtol=0, atol=0.004)


@schedules
@pytest.mark.parametrize("T", [1, 2, 1000])
def test_the_last_time_is_drawn_as_often_as_asked(schedule, T):
    share = 0.01 if T > 2 else 0.7
    process = DiffusionProcess(T, schedule, timestep_sampling="lognormal", noise_std=0.3, last_share=share)
    drawn = process.sample_timesteps(10_000, torch.Generator().manual_seed(0))
    others = DiffusionProcess(T, schedule, timestep_sampling="lognormal", noise_std=0.3)
    usual = (others.sample_timesteps(10_000, torch.Generator().manual_seed(0)) == T - 1).double().mean().item()
    assert (drawn == T - 1).double().mean().item() == pytest.approx(share + (1 - share) * usual, abs=2e-4)


def test_a_low_share_of_the_times_has_nearly_clean_images():
    """The distribution is the mixture of the two, and with a share of 0 it is what it was."""
    level = lambda process: -process.log_snr(torch.arange(1000)).flatten() / 2 - math.log(process.data_std)  # noqa: E731
    config = dict(schedule="cosine", data_std=0.6, timestep_sampling="lognormal", noise_mean=0.7, noise_std=0.9)
    mean, std = LOW_NOISE
    parts = [DiffusionProcess(**config), DiffusionProcess(**config | dict(noise_mean=mean, noise_std=std)),
             DiffusionProcess(**config, low_share=0.3)]
    usual, low, mixed = (process._timestep_cdf.diff(prepend=torch.zeros(1)) for process in parts)
    assert_close(mixed, 0.7 * usual + 0.3 * low)
    assert usual[level(parts[0]) < mean].sum() < 0.01 < 0.1 < mixed[level(parts[0]) < mean].sum()
    drawn = parts[2].sample_timesteps(20_000, torch.Generator().manual_seed(0)).bincount(minlength=1000) / 20_000
    assert_close(drawn.double().cumsum(0), mixed.cumsum(0), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- loss


@predictions
def test_loss_is_the_mean_squared_distance_to_the_target(prediction, data_std):
    process = DiffusionProcess(100, prediction=prediction, data_std=data_std)
    x_0, noise, t = images(5, 1, 4, 4), images(5, 1, 4, 4, seed=1), times(process, 5)
    zero = lambda x, t: torch.zeros_like(x)  # noqa: E731
    each = (process.target(x_0, noise, t) ** 2).mean((1, 2, 3))
    assert_close(process.loss(zero, x_0, t, noise, reduction="none"), each, **EXACT)
    assert_close(process.loss(zero, x_0, t, noise), each.mean(), **EXACT)
    perfect = lambda x, t: process.target(x_0, noise, t)  # noqa: E731
    assert process.loss(perfect, x_0, t, noise).item() == 0


def test_loss_equals_a_calculation_by_hand():
    process = DiffusionProcess(1, beta_start=0.1, beta_end=0.1)
    alpha2 = 0.9**1000
    x_0, noise = torch.full((1, 1, 1, 2), 0.5).double(), torch.tensor([1.0, -2.0]).double().view(1, 1, 1, 2)
    x_t = [math.sqrt(alpha2) * 0.5 + math.sqrt(1 - alpha2) * n for n in (1, -2)]
    expected = sum((3 * x - n) ** 2 for x, n in zip(x_t, (1, -2), strict=True)) / 2
    loss = process.loss(lambda x, t: 3 * x, x_0, torch.zeros(1).double(), noise)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_loss_draws_times_and_noise_and_hands_on_labels():
    process, seen = DiffusionProcess(100), []

    def model(x, t, labels):
        seen.append((t, labels))
        return x
    torch.manual_seed(0)
    assert process.loss(model, images(64, 1, 2, 2), labels="labels").isfinite()
    assert seen[0][0].unique().numel() > 10 and seen[0][1] == "labels"


# --------------------------------------------------------------------------------------------- config, devices, errors


def test_the_config_rebuilds_the_process_through_json():
    process = DiffusionProcess(77, "cosine", prediction="edm", data_std=0.6, timestep_sampling="lognormal",
                               noise_mean=-1.0, noise_std=0.9)
    again = DiffusionProcess(**json.loads(json.dumps(process.config)))
    assert again.config == process.config
    assert torch.equal(again.alphas_cumprod, process.alphas_cumprod)
    draws = [p.sample_timesteps(64, torch.Generator().manual_seed(0)) for p in (process, again)]
    assert torch.equal(*draws)


def test_to_returns_the_process_itself():
    process = DiffusionProcess(5, timestep_sampling="lognormal")
    assert process.to("cpu") is process and process.device.type == "cpu"


@pytest.mark.parametrize("arguments, words", [
    (dict(last_share=1.5), ["last_share", "1.5"]), (dict(low_share=-0.1), ["low_share", "-0.1"]),
    (dict(last_share=0.6, low_share=0.6), ["together", "0.6"]),
    (dict(lowest_noise=0.0), ["lowest_noise", "0.0"]), (dict(lowest_noise=math.inf), ["lowest_noise", "inf"]),
    (dict(num_timesteps=0), ["num_timesteps", "0", "1"]),
    (dict(num_timesteps=-3), ["num_timesteps", "-3"]),
    (dict(num_timesteps=2.5), ["num_timesteps", "2.5"]),
    (dict(num_timesteps=True), ["num_timesteps", "True"]),
    (dict(num_timesteps=math.nan), ["num_timesteps", "nan"]),
    (dict(num_timesteps=math.inf), ["num_timesteps", "inf"]),
    (dict(schedule="sigmoid"), ["schedule", "sigmoid", "linear", "cosine"]),
    (dict(prediction="epsilon"), ["prediction", "epsilon", "eps", "x0", "v", "edm"]),
    (dict(timestep_sampling="normal"), ["timestep_sampling", "normal", "uniform", "stratified", "lognormal"]),
    (dict(beta_start=0.0), ["beta_start", "0.0"]),
    (dict(beta_end=1.0), ["beta_end", "1.0"]),
    (dict(beta_start=0.02, beta_end=0.01), ["beta_start", "0.02", "0.01"]),
    (dict(beta_start=1e-18), ["beta_start", "1e-18"]),
    (dict(beta_start=math.nan), ["beta_start", "nan"]),
    (dict(data_std=0.0), ["data_std", "0.0"]),
    (dict(data_std=math.nan), ["data_std", "nan"]),
    (dict(noise_std=-1.0), ["noise_std", "-1.0"]),
    (dict(noise_mean=math.inf), ["noise_mean", "inf"]),
])
def test_impossible_arguments_are_named_with_what_is_allowed(arguments, words):
    with pytest.raises(ValueError) as caught:
        DiffusionProcess(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("t", [-2, 10, -0.5, 9.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", [lambda t: t, lambda t: torch.tensor([0, t])])
def test_times_outside_the_process_are_refused_with_the_range(t, form):
    process = DiffusionProcess(10)
    with pytest.raises(ValueError, match=r"0\.\.9") as caught:
        process.q_sample(torch.zeros(2, 1, 4, 4), form(t))
    assert "-1" in str(caught.value) and f"{float(t):g}" in str(caught.value)


def zeros(*shape):
    return torch.zeros(*shape)


@pytest.mark.parametrize("call, words", [
    (lambda p: p.q_sample(zeros(4, 4), 0), ["(B, C, H, W)", "(4, 4)"]),
    (lambda p: p.q_sample(zeros(2, 1, 4, 4).long(), 0), ["floating", "int64"]),
    (lambda p: p.q_sample(zeros(2, 1, 4, 4), torch.zeros(3)), ["2", "(3,)"]),
    (lambda p: p.q_sample(zeros(2, 1, 4, 4), torch.zeros(1)), ["2", "(1,)"]),
    (lambda p: p.q_sample(zeros(2, 1, 4, 4), torch.zeros(2, 1)), ["t must", "(2, 1)"]),
    (lambda p: p.q_sample(zeros(2, 1, 4, 4), 0, zeros(1, 1, 4, 4)), ["noise", "(2, 1, 4, 4)", "(1, 1, 4, 4)"]),
    (lambda p: p.log_snr(torch.zeros(2, 2)), ["t must", "(B,)", "(2, 2)"]),
    (lambda p: p.loss(torch.mul, zeros(2, 1, 4), torch.zeros(2)), ["(B, C, H, W)", "(2, 1, 4)"]),
    (lambda p: p.loss(lambda x, t: x, zeros(2, 1, 4, 4), reduction="sum"), ["reduction", "sum", "mean", "none"]),
    (lambda p: p.posterior(zeros(2, 1, 4, 4), zeros(1, 1, 4, 4), 5, 3), ["x_0_hat", "(2, 1, 4, 4)", "(1, 1, 4, 4)"]),
    (lambda p: p.posterior(zeros(2, 1, 4, 4), zeros(2, 1, 4, 4), 3, 3), ["s must be less than t", "3"]),
    (lambda p: p.posterior(zeros(2, 1, 4, 4), zeros(2, 1, 4, 4), 3, 5), ["s must be less than t", "3", "5"]),
    (lambda p: p.posterior(zeros(2, 1, 4, 4), zeros(2, 1, 4, 4), 3, -0.5), ["0..9", "-0.5"]),
    (lambda p: p.p_sample(lambda x, t: x, zeros(2, 1, 4, 4), torch.zeros(3)), ["2", "(3,)"]),
    (lambda p: p.p_sample(lambda x, t: x, zeros(2, 1, 4, 4), 5, zeros(1, 1, 4, 4)), ["noise", "(1, 1, 4, 4)"]),
    (lambda p: p.p_sample(lambda x, t: x, zeros(2, 1, 4, 4), -1), ["-1"]),
])
def test_wrong_shapes_and_orders_are_refused_with_both_sides_named(call, words):
    with pytest.raises(ValueError) as caught:
        call(DiffusionProcess(10))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_times_of_half_precision_are_looked_up_in_full_precision(dtype):
    process, t = DiffusionProcess(1000), torch.tensor([0.0, 16.0, 512.0])
    found = process.log_snr(t.to(dtype))
    assert found.dtype == torch.float32 and torch.equal(found, process.log_snr(t))
