"""Learned variances and the variational bound, checked against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from data import histogram_code
from diffusion import SCHEDULES, DiffusionProcess
from learned_variance import LearnedVariance, bits_per_dim, create_process, discretised_log_likelihood
from samplers import ddpm, final_image, generate, guide, image_noise, uniform_timesteps

EXACT = dict(rtol=1e-10, atol=1e-10)  # float64 rounding, amplified by 1/alpha <= 200
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
predictions = pytest.mark.parametrize("prediction, data_std", [
    ("eps", 1.0), ("x0", 1.0), ("v", 1.0), ("edm", 0.3), ("edm", 1.0), ("edm", 2.0)])


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_v(model, v):
    """A network whose second half of the output is v (a number, or like x), after what `model` says."""
    return lambda x, t, *labels: torch.cat([model(x, t, *labels), torch.zeros_like(x) + v], dim=1)


def reverse_log_variance(process, t, s, std):
    """log Var(x_s | x_t) for x_0 ~ N(mean, std²): the posterior's, and what is not known of x_0 (Bao et al. 2022)."""
    zero, one = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    move, variance = process.posterior(zero, one, t, s)
    unknown = (std * process.sigma(t)) ** 2 / ((std * process.alpha(t)) ** 2 + process.sigma(t) ** 2)
    return (variance + move**2 * unknown).log()


def to_v(process, log_variance, t, s):
    """The v that gives this log variance."""
    lower, upper = process.log_variance_bounds(t, s)
    return 2 * (log_variance - lower) / (upper - lower) - 1


def gaussian_denoiser(process, mean, std):
    """E[x_0 | x_t] for x_0 ~ N(mean, std²)."""
    def denoise(x_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return mean + alpha * std**2 * (x_t - alpha * mean) / ((alpha * std) ** 2 + sigma**2)
    return denoise


@schedules
@pytest.mark.parametrize("T", [2, 10, 1000])
def test_v_of_minus_1_and_1_is_beta_tilde_and_beta_and_0_their_geometric_mean(schedule, T):
    process, t = LearnedVariance(T, schedule), torch.arange(1, T)
    ac, before, beta = process.alphas_cumprod[t], process.alphas_cumprod[t - 1], process.betas[t]
    beta_tilde = (1 - before) / (1 - ac) * beta
    for v, expected in ((-1.0, beta_tilde), (1.0, beta), (0.0, (beta * beta_tilde).sqrt())):
        found = process.log_variance(torch.full((T - 1, 1, 1, 1), v, dtype=torch.float64), t, t - 1)
        assert_close(found.exp().flatten(), expected, rtol=1e-8, atol=0)


@schedules
@pytest.mark.parametrize("t, s", [(99, 98), (99, 0), (50, 20.5), (7.25, 7), (40, -1), (0, -1)])
def test_the_bounds_are_the_posterior_and_the_forward_process_between_any_two_times(schedule, t, s):
    process, x = LearnedVariance(100, schedule), images(3, 1, 2, 2)
    lower, upper = process.log_variance_bounds(t, s)
    assert upper.exp().item() == pytest.approx(1 - (process.alpha(t) / process.alpha(s)).item() ** 2, rel=1e-9)
    instead = process.posterior(x, x, 1, 0) if s < 0 else process.posterior(x, x, t, s)
    assert_close(lower.exp(), instead[1], rtol=1e-9, atol=0)
    assert lower < upper
    by_tensor = process.log_variance(x, *(torch.full((3,), float(time)).double() for time in (t, s)))
    assert_close(by_tensor, process.log_variance(x, t, s), **EXACT)
    assert by_tensor.shape == x.shape and process.log_variance(x.float(), t, s).dtype == torch.float32


def test_with_one_timestep_both_bounds_are_its_variance():
    for process in (LearnedVariance(1, "cosine"), LearnedVariance(1, prediction="v", zero_terminal_snr=True)):
        lower, upper = process.log_variance_bounds(0, -1)
        assert lower.item() == pytest.approx(upper.item()) == pytest.approx(2 * process.sigma(0).log().item())


@schedules
@settings(max_examples=30, deadline=None)
@given(times=st.tuples(st.integers(0, 99), st.integers(0, 99)).filter(lambda pair: pair[0] != pair[1]),
       std=st.floats(0, 1))
def test_the_true_variance_of_a_gaussian_lies_between_the_bounds(schedule, times, std):
    process, s, t = LearnedVariance(100, schedule), min(times), max(times)
    v = to_v(process, reverse_log_variance(process, t, s, std), t, s).item()
    assert -1 - 1e-9 <= v <= 1 + 1e-9
    if std in (0, 1):  # one point, and pure noise
        assert v == pytest.approx(2 * std - 1, abs=1e-9)


@schedules
@pytest.mark.parametrize("steps", [5, 10])
def test_in_few_steps_ddpm_keeps_a_gaussians_variance_only_with_the_learned_one(schedule, steps):
    process, std, count = LearnedVariance(1000, schedule), 0.4, 40_000

    def variances(log_variance):
        """Of x_s after each step, as a share of the true variance."""
        noise = iter(images(steps, count, 1, 1, 1, seed=1))
        path = ddpm(gaussian_denoiser(process, 0.1, std), images(count, 1, 1, 1), uniform_timesteps(1000, steps),
                    process, randn=lambda x: next(noise), log_variance=log_variance)
        return [(x.var() / ((std * process.alpha(s)) ** 2 + process.sigma(s) ** 2)).item() for s, x, _ in path]
    learned, fixed = variances(lambda x, t, s: reverse_log_variance(process, t, s, std)), variances(None)
    five_errors = 5 * math.sqrt(2 / count)
    assert learned[:-1] == pytest.approx([1] * (steps - 1), abs=five_errors)  # the last step adds no noise
    assert min(fixed) < 1 - 2 * five_errors
    assert fixed[-1] < learned[-1] - five_errors < 1


@schedules
def test_the_bound_is_the_divergence_of_torch_and_at_time_0_the_likelihood_in_bits(schedule):
    process, t = LearnedVariance(100, schedule), torch.tensor([1, 2, 50, 99, 0])
    x_0, x_0_hat, v = (images(5, 3, 2, 2, seed=seed).clamp(-1, 1) for seed in range(3))
    x_t = images(5, 3, 2, 2, seed=3)
    bits, log_p = process.vlb_term(x_0, x_0_hat, v, t) * math.log(2), process.log_variance(v, t, t - 1)
    (q_mean, variance), (p_mean, _) = (process.posterior(x_t, image, t, t - 1) for image in (x_0, x_0_hat))
    q, p = (torch.distributions.Normal(mean[:4], std[:4]) for mean, std in
            ((q_mean, variance.sqrt().expand_as(v)), (p_mean, (log_p / 2).exp())))
    assert_close(bits[:4], torch.distributions.kl_divergence(q, p).mean((1, 2, 3)), rtol=1e-8, atol=1e-8)
    assert_close(bits[4], -discretised_log_likelihood(x_0, x_0_hat, log_p)[4].mean(), **EXACT)


@pytest.mark.parametrize("mean, std", [(0.0, 0.5), (-1.0, 0.01), (0.9, 2.0), (0.3, 0.001), (1.0, 1e-4)])
def test_the_masses_of_the_256_values_sum_to_1(mean, std):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_masses = discretised_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std)))
    assert log_masses.exp().sum().item() == pytest.approx(1, abs=1e-12)
    normal, inner = torch.distributions.Normal(x.new_tensor(mean), x.new_tensor(std)), x[1:-1]
    masses = normal.cdf(inner + 1 / 255) - normal.cdf(inner - 1 / 255)
    assert_close(log_masses[1:-1].exp(), masses.clamp(min=1e-30), rtol=1e-6, atol=1e-15)


def test_the_masses_of_the_values_of_a_code_sum_to_1():
    code = histogram_code(torch.zeros(8, 1, 4, 4, dtype=torch.uint8))
    x, edges = code.points, code.edges
    normal = torch.distributions.Normal(x.new_tensor(-0.8), x.new_tensor(0.1))
    log_masses = discretised_log_likelihood(x, torch.full_like(x, -0.8), torch.full_like(x, 2 * math.log(0.1)), edges)
    assert log_masses.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert_close(log_masses[1:-1].exp(), normal.cdf(edges[1:]) - normal.cdf(edges[:-1]), rtol=1e-6, atol=1e-12)
    assert log_masses[0].exp().item() == pytest.approx(normal.cdf(edges[0]).item())


def test_the_process_of_a_checkpoint_rounds_to_the_values_of_its_code():
    code, zero = histogram_code(torch.zeros(8, 1, 4, 4, dtype=torch.uint8)), torch.zeros(1, dtype=torch.long)
    x_0, v = code.encode(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)), torch.zeros(1, 1, 2, 2)
    linear, coded = (create_process(True, edges, num_timesteps=20).vlb_term(x_0, x_0 + 0.02, v, zero).item()
                     for edges in (None, code.edges))
    assert linear > 1 and coded < 0.1  # the next level is farther away in the code


def test_the_likelihood_and_its_gradient_are_finite_wherever_the_mean_is():
    x = torch.linspace(-1, 1, 256).repeat(5)
    mean = torch.tensor([-1.0, -0.5, 0, 0.99, 1]).repeat_interleave(256).requires_grad_()
    for log_variance in (-20.0, -9.0, 0.0):
        log_variance = torch.full_like(x, log_variance).requires_grad_()
        log_masses = discretised_log_likelihood(x, mean, log_variance)
        found = torch.autograd.grad(log_masses.sum(), (mean, log_variance))
        assert all(each.isfinite().all() for each in (log_masses, *found))


@schedules
@pytest.mark.parametrize("t", [1, 30, 99])
def test_the_bound_is_least_at_the_true_variance(schedule, t):
    process, std, count = LearnedVariance(100, schedule), 0.4, 40_000
    x_0, times = std * images(count, 1, 1, 1), torch.full((count,), t)
    x_t = process.q_sample(x_0, times, images(count, 1, 1, 1, seed=1))
    x_0_hat = gaussian_denoiser(process, 0.0, std)(x_t, t)
    best = to_v(process, reverse_log_variance(process, t, t - 1, std), t, t - 1)
    bits = [process.vlb_term(x_0, x_0_hat, (best + change).expand_as(x_0), times).mean() for change in (-0.3, 0, 0.3)]
    assert bits[1] < min(bits[0], bits[2])


@predictions
def test_the_hybrid_loss_adds_the_bound_of_the_x_0_hat_that_samplers_see(prediction, data_std):
    process = LearnedVariance(100, prediction=prediction, data_std=data_std, loss_weight="min_snr")
    x_0, noise, t = images(7, 1, 4, 4).clamp(-1, 1), images(7, 1, 4, 4, seed=1), torch.tensor([0, 1, 2, 30, 60, 98, 99])
    v = images(7, 1, 4, 4, seed=2)
    plain, model = (lambda x, t: torch.sin(x)), with_v(lambda x, t: torch.sin(x), v)
    both, simple = (loss(model, x_0, t, noise, reduction="none") for loss in (process.loss, process.simple_loss))
    fixed = DiffusionProcess(**process.config)
    for network in (plain, model):
        assert_close(simple, fixed.loss(network, x_0, t, noise, reduction="none"), rtol=0, atol=0)
    x_0_hat = process.denoiser(plain)(process.q_sample(x_0, t, noise), t)
    assert_close(both - simple, 0.001 * 100 * process.vlb_term(x_0, x_0_hat, v, t), **EXACT)


@predictions
def test_the_bound_teaches_v_alone_and_the_simple_loss_the_prediction_alone(prediction, data_std):
    process = LearnedVariance(100, prediction=prediction, data_std=data_std)
    x_0, noise, t = images(5, 1, 4, 4).clamp(-1, 1), images(5, 1, 4, 4, seed=1), torch.tensor([0, 1, 30, 60, 99])
    output = images(5, 2, 4, 4, seed=2).requires_grad_()
    gradients = [torch.autograd.grad(loss(lambda x, t: output, x_0, t, noise), output)[0]
                 for loss in (process.loss, process.simple_loss)]
    assert torch.equal(gradients[0][:, :1], gradients[1][:, :1]) and not gradients[1][:, 1:].any()
    assert gradients[0][1:, 1:].all() and gradients[0].isfinite().all()


@schedules
@pytest.mark.parametrize("T", [1, 2, 10])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_hybrid_loss_and_its_gradient_are_finite_at_every_time(schedule, T, zero_terminal_snr):
    process = LearnedVariance(T, schedule, prediction="v", zero_terminal_snr=zero_terminal_snr)
    x_0, output = images(T, 1, 4, 4).float().clamp(-1, 1), images(T, 2, 4, 4, seed=1).float().requires_grad_()
    loss = process.loss(lambda x, t: output, x_0, torch.arange(T))
    assert loss.isfinite() and torch.autograd.grad(loss, output)[0].isfinite().all()


@predictions
def test_x_0_hat_does_not_depend_on_v(prediction, data_std):
    process, x_t = LearnedVariance(100, prediction=prediction, data_std=data_std), images(7, 1, 4, 4)
    plain, t = (lambda x, t: torch.sin(x)), torch.arange(7)
    model = with_v(plain, 5.0)
    assert torch.equal(process.denoiser(model)(x_t, t), process.denoiser(plain)(x_t, t))
    assert torch.equal(process.predict(model, x_t, t), process.predict(plain, x_t, t))
    assert (process.predict_both(plain, x_t, t)[1] == -1).all() and (process.predict_both(model, x_t, t)[1] == 5).all()
    fixed = DiffusionProcess(**process.config)
    assert torch.equal(fixed.predict(model, x_t, t), fixed.predict(plain, x_t, t))


def test_p_sample_adds_noise_of_the_learned_variance_but_none_at_time_0():
    process, x_t, noise = LearnedVariance(100, prediction="v"), images(3, 1, 4, 4), images(3, 1, 4, 4, seed=1)
    model, t = (lambda x, t: torch.sin(x)), torch.tensor([0.0, 1, 60]).double()
    v = images(3, 1, 4, 4, seed=2)
    step = process.p_sample(with_v(model, v), x_t, t, noise) - process.p_sample(with_v(model, v), x_t, t, 0 * noise)
    assert not step[0].any()
    assert_close(step[1:], ((process.log_variance(v, t, t - 1) / 2).exp() * noise)[1:], **EXACT)
    by_number = process.p_sample(with_v(model, v[2:]), x_t[2:], 60, noise[2:])
    assert_close(by_number, process.p_sample(with_v(model, v), x_t, t, noise)[2:], **EXACT)


def test_bits_per_dim_bounds_the_entropy_of_a_gaussian_closely_and_closer_with_the_learned_variance():
    process, std, count = LearnedVariance(50, "cosine", prediction="x0"), 0.2, 4000
    x_0 = ((0.1 + std * images(count, 1, 1, 1)).clamp(-1, 1).add(1).mul(127.5).round() / 127.5 - 1)
    denoise = gaussian_denoiser(process, 0.1, std)

    def learned(x, t):
        v = to_v(process, reverse_log_variance(process, t[:1], t[:1] - 1, std), t[:1], t[:1] - 1)
        return with_v(denoise, v)(x, t)
    entropy = math.log2(std * 127.5) + math.log2(2 * math.pi * math.e) / 2
    bits = [bits_per_dim(model, process, x_0, noise=images(count, 1, 1, 1, seed=1)) for model in (learned, denoise)]
    assert bits[0].shape == (count,)
    error = 5 * bits[0].std().item() / math.sqrt(count)
    assert entropy - error < bits[0].mean().item() < entropy + 0.1 < bits[1].mean().item()


def test_bits_per_dim_counts_what_the_last_time_still_shows_of_the_image():
    process, x_0 = DiffusionProcess(20, beta_end=0.002, prediction="x0"), images(3, 1, 4, 4).clamp(-1, 1)
    learned, noise, model = LearnedVariance(**process.config), images(3, 1, 4, 4, seed=1), lambda x, t: 0.5 * x
    alpha, sigma = process.alpha(19).double(), process.sigma(19).double()
    assert alpha > 0.5
    expected = kl_divergence(Normal(alpha * x_0.double(), sigma), Normal(0.0, 1.0)).flatten(1).mean(1) / math.log(2)
    for t in range(20):
        x_t = process.q_sample(x_0, torch.full((3,), t), noise)
        output, v = learned.predict_both(model, x_t, torch.full((3,), t), None)
        expected += learned.vlb_term(x_0, learned.to_x_0(output, x_t, t, clip=True), v, torch.full((3,), t))
    assert_close(bits_per_dim(model, process, x_0, noise=noise), expected.to(x_0.dtype), rtol=1e-4, atol=1e-4)


def rounded_images(count, mean=0.1, std=0.2):
    """8-bit pixels, normally distributed."""
    return (mean + std * images(count, 1, 1, 1)).clamp(-1, 1).add(1).mul(127.5).round() / 127.5 - 1


def test_the_bound_of_a_network_without_learned_variances_is_that_of_v_equal_to_minus_1():
    process, x_0 = DiffusionProcess(20, "cosine", prediction="x0"), rounded_images(5)
    denoise, noise = gaussian_denoiser(process, 0.1, 0.2), images(5, 1, 1, 1, seed=1)
    plain = bits_per_dim(denoise, process, x_0, noise=noise)
    assert torch.equal(plain, bits_per_dim(with_v(denoise, -1), LearnedVariance(**process.config), x_0, noise=noise))
    asked = []

    def model(x, t, labels):
        asked.append(labels)
        return denoise(x, t)
    assert torch.equal(plain, bits_per_dim(model, process, x_0, "labels", noise=noise)) and asked == ["labels"] * 20


def test_the_bound_rounds_to_the_values_of_the_process_unless_others_are_given():
    code = histogram_code(torch.tensor([0, 0, 0, 0, 128, 255], dtype=torch.uint8), 1.0)
    process, x_0, noise = DiffusionProcess(20, prediction="x0"), rounded_images(5), images(5, 1, 1, 1, seed=1)
    coded = LearnedVariance(edges=code.edges, **process.config)
    bits = bits_per_dim(gaussian_denoiser(process, 0.1, 0.2), coded, x_0, noise=noise)
    assert torch.equal(bits, bits_per_dim(gaussian_denoiser(process, 0.1, 0.2), process, x_0, noise=noise,
                                          edges=code.edges))
    assert not torch.equal(bits, bits_per_dim(gaussian_denoiser(process, 0.1, 0.2), process, x_0, noise=noise))


@pytest.mark.parametrize("draws", [0, -1])
def test_a_bound_without_random_times_is_refused(draws):
    process = DiffusionProcess(20, prediction="x0")
    with pytest.raises(ValueError, match="draws must be 1 or more"):
        bits_per_dim(gaussian_denoiser(process, 0.1, 0.2), process, rounded_images(2), draws=draws)


def test_the_edges_are_where_the_images_are_so_that_no_step_copies_them():
    process = LearnedVariance(20).to("meta")
    assert process.edges.device.type == "meta"


def test_other_reductions_are_refused():
    process, x_0 = LearnedVariance(20), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="reduction 'sum'"):
        process.loss(lambda x, t: x, x_0, reduction="sum")


@pytest.mark.parametrize("draws, batch", [(1, 1), (1, 6), (3, 4), (7, 1), (11, 5)])
def test_the_bound_from_some_of_the_times_is_unbiased_for_each_image(draws, batch):
    process, x_0 = DiffusionProcess(12, "cosine", prediction="x0"), rounded_images(batch)
    denoise, noise = gaussian_denoiser(process, 0.1, 0.2), images(batch, 1, 1, 1, seed=1)
    exact, generator = bits_per_dim(denoise, process, x_0, noise=noise), torch.Generator().manual_seed(0)
    every_time, seen = draws == 11, []
    count = 20 if every_time else 300

    def counted(x, t):
        seen.append(t)
        return denoise(x, t)
    found = torch.stack([bits_per_dim(counted, process, x_0, draws=draws, generator=generator, noise=noise)
                         for _ in range(count)])                                            # (count, B)
    assert len(seen) == count * (draws + 1)
    errors = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() <= 5 * errors + 1e-9).all()
    if every_time:  # all of T - 1, each once
        assert_close(found, exact.expand_as(found), **EXACT)


def test_the_times_are_spread_over_each_image_and_over_the_batch():
    times = []

    def model(x, t):
        times.append(t.long())
        return x
    bits_per_dim(model, DiffusionProcess(100), rounded_images(64).float(), draws=4)
    assert not times[0].any()
    for part, row in enumerate(times[1:]):  # log_100(t) is uniform in [part / 4, (part + 1) / 4]
        for k in range(1, 101):  # the number of images with t < k
            expected = 64 * min(max(4 * math.log(k, 100) - part, 0), 1)
            assert abs((row < k).sum() - expected) <= 1 + 1e-6


def test_the_bound_depends_on_the_generator_alone_and_more_draws_estimate_it_better():
    process, x_0 = DiffusionProcess(200, "cosine", prediction="x0"), rounded_images(64)
    denoise = gaussian_denoiser(process, 0.1, 0.2)

    def found(seed, draws):
        return bits_per_dim(denoise, process, x_0, draws=draws, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(found(0, 5), found(0, 5)) and not torch.equal(found(0, 5), found(1, 5))
    few, many = (torch.stack([found(seed, draws) for seed in range(20)]).std(0).mean() for draws in (2, 40))
    assert many < few / 2


def test_the_model_config_chooses_the_process():
    assert type(create_process(False, num_timesteps=7)) is DiffusionProcess
    learned = create_process(True, num_timesteps=7, schedule="cosine")
    assert type(learned) is LearnedVariance and learned.config == DiffusionProcess(7, "cosine").config


@pytest.mark.parametrize("labels, scale", [(None, 1.0), (torch.tensor([0, 1, 2, 0, 1]), 1.0),
                                           (torch.tensor([0, 1, 2, 0, 1]), 2.5)], ids=str)
def test_generate_takes_the_variances_from_the_evaluations_of_ddpm(labels, scale):
    process, model = LearnedVariance(20, "cosine", prediction="edm"), small_model(num_classes=3, learn_variance=True)
    options = dict(sampler="ddpm", steps=4, labels=labels, guidance_scale=scale, batch_size=5)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    [(_, path)] = generate(model, process, (1, 8, 8), range(5), **options)
    image = final_image(path)
    hook.remove()
    assert len(calls) == 4

    def asked_again(x, t, s):
        return process.log_variance(process.predict_both(model, x, t, labels)[1], t, s)
    denoise = process.denoiser(model) if labels is None else guide(process, model, labels, scale)
    randn = image_noise(range(5), 0, (1, 8, 8))
    by_hand, fixed = (final_image(ddpm(denoise, randn(), uniform_timesteps(20, 4), process, randn=randn,
                                       log_variance=log_variance)) for log_variance in (asked_again, None))
    assert_close(image, by_hand, rtol=0, atol=1e-4)
    assert (image - fixed).abs().max() > 0.05
