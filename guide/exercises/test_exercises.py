"""The tests of the exercises: each fails on the file as it is given, and passes once the exercise is solved.

`python -m pytest guide/exercises -k ex03` runs one; `--answers guide/exercises/solutions` tests the solutions.
"""

import torch
from torch.testing import assert_close

import diffusion
from diffusion import DiffusionProcess
from evaluation.mixture import Mixture
from samplers import batch_time, ddim, guide, step_pairs, uniform_timesteps


def images(count: int = 4, channels: int = 1, size: int = 2, seed: int = 0) -> torch.Tensor:
    """Normal noise of the shape of images, (B, C, H, W) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)


def test_ex01_the_log_snr_is_a_straight_line(exercise, monkeypatch):
    monkeypatch.setitem(diffusion.SCHEDULES, "mine", lambda num_timesteps, *_: exercise.schedule(num_timesteps))
    for num_timesteps in (1000, 30):
        process = DiffusionProcess(num_timesteps, "mine")
        found = process.log_snr(torch.arange(num_timesteps, dtype=torch.float64)).flatten()
        assert_close(found, torch.linspace(9, -9, num_timesteps, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(exercise.schedule(2, highest=0.0, lowest=-2.0).tolist(), [0.5, 0.11920292])


def test_ex02_noisy_images_in_one_jump(exercise):
    process, t = DiffusionProcess(schedule="cosine"), torch.tensor([0, 400, 700])
    x_0, noise = images(3, channels=2, size=4).float(), images(3, channels=2, size=4, seed=1).float()
    x_t = exercise.q_sample(x_0, t, noise, process.alphas_cumprod)
    assert x_t.shape == x_0.shape and x_t.dtype == x_0.dtype
    assert_close(x_t, process.q_sample(x_0, t, noise))


def test_ex03_the_clean_image_from_v(exercise):
    process, x_0, noise = DiffusionProcess(prediction="v", zero_terminal_snr=True), images(), images(seed=1)
    for t in (0, 500, 999):  # at the last no signal is left: alpha = 0
        x_t, v = process.q_sample(x_0, t, noise), process.target(x_0, noise, t)
        assert_close(exercise.x_0_from_v(v, x_t, process.alpha(t), process.sigma(t)), x_0)


def test_ex04_many_small_steps_are_one_jump(exercise):
    process, one = DiffusionProcess(schedule="linear"), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t in (0, 40, 199):
        betas = process.betas[:t + 1].tolist()
        alpha, sigma = exercise.jump_rates(betas)
        assert_close((alpha, sigma), (process.alpha(t).item(), process.sigma(t).item()))
        assert_close(exercise.small_steps(one, betas, torch.zeros_like).item(), alpha)
        # Image k gets noise in step k alone: what is left of it at the end. Independent variances add up.
        noise = iter(torch.eye(t + 1, dtype=torch.float64).view(t + 1, t + 1, 1, 1, 1))
        left = exercise.small_steps(0 * one.repeat(t + 1, 1, 1, 1), betas, lambda x, noise=noise: next(noise))
        assert_close(left.square().sum().sqrt().item(), sigma)


def test_ex05_the_best_denoiser_of_two_images(exercise):
    process, image = DiffusionProcess(schedule="cosine"), images(1, size=3)[0]
    exact = Mixture(torch.stack([image, -image])).denoiser(process)
    for t in (50, 500, 950):
        x_t = process.q_sample(image.expand(20, -1, -1, -1), t, images(20, size=3, seed=1))
        found = exercise.x_0_hat(x_t, image, process.alpha(t).item(), process.sigma(t).item())
        assert_close(found, exact(x_t, t), rtol=0, atol=1e-6)


def test_ex06_a_step_of_ddim(exercise):
    process, x_0, noise = DiffusionProcess(schedule="cosine"), images(), images(seed=1)
    for t, s in ((900, 400), (400, 20), (20, -1)):
        rates = [rate(time).item() for time in (t, s) for rate in (process.alpha, process.sigma)]
        x_s = exercise.ddim_step(process.q_sample(x_0, t, noise), x_0, *rates)
        assert_close(x_s, process.alpha(s) * x_0 + process.sigma(s) * noise)  # the same noise, less of it


class TwoClasses(torch.nn.Module):
    """A network that is called as those of models/: model(x_t, t, labels), where the label 2 means "no label"."""

    num_classes = 2

    def forward(self, x_t, t, labels):
        return x_t * (1 + labels.view(-1, 1, 1, 1)) / 10


def test_ex07_guidance_at_some_of_the_times(exercise):
    process, labels, x_t = DiffusionProcess(schedule="cosine"), torch.tensor([0, 1, 1, 0]), images()
    conditional = process.denoiser(TwoClasses(), labels, clip=False)
    unconditional, calls = process.denoiser(TwoClasses(), torch.full((4,), 2), clip=False), []

    def without(x_t, t):
        calls.append(float(t[0]))
        return unconditional(x_t, t)
    for scale in (0.0, 1.0, 3.0):
        found = exercise.guided(conditional, without, scale, (200, 700))
        expected = guide(process, TwoClasses(), labels, scale, (200, 700), clip=False)
        for t in (900, 700, 450, 200, 100):
            assert_close(found(x_t, batch_time(t, x_t)), expected(x_t, batch_time(t, x_t)))
    assert 450 in calls and set(calls) <= {700, 450, 200}, "outside the interval, `without` need not be called"


def test_ex08_inpainting_by_replacing_the_known_pixels(exercise):
    process, known, x_s, noise = DiffusionProcess(schedule="cosine"), images(), images(seed=1), images(seed=2)
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(known)  # the left half is to be filled in
    for s in (600, -1):
        found = exercise.replace_known(x_s, s, known, mask, process, lambda _: noise)
        assert_close(found, torch.where(mask == 1, x_s, process.q_sample(known, s, noise)))

    # The data are two images; only the second has the known half, so its other half has to appear.
    pair = torch.tensor([[-1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64).view(2, 1, 2, 2)
    denoise, times, draw = Mixture(pair).denoiser(process), uniform_timesteps(1000, 100), torch.Generator()
    draw.manual_seed(0)

    def randn(x):
        return torch.randn(x.shape, generator=draw, dtype=x.dtype)
    x = images(100)
    known, mask = pair[1:].expand_as(x), mask[:1].expand_as(x)
    for t, s in step_pairs(times):
        mean, variance = process.posterior(x, denoise(x, t), t, s)
        x = exercise.replace_known(mean + variance.sqrt() * randn(x), s, known, mask, process, randn)
    assert (x - pair[1]).abs().amax((1, 2, 3)).lt(0.01).double().mean() > 0.9


def test_ex09_the_frechet_distance_and_its_floor(exercise):
    mean = torch.tensor([[0.0, 1.0], [2.0, 0.5]], dtype=torch.float64)
    a = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    assert abs(exercise.frechet(mean[0], a, mean[0], a)) < 1e-9
    assert_close(exercise.frechet(mean[0], a, mean[1], a), 4.25)
    # Of two rows and columns: tr(M^(1/2)) = sqrt(tr(M) + 2 sqrt(det(M))).
    root = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    assert_close(exercise.frechet(mean[0], a, mean[1], b), (4.25 + a.trace() + b.trace() - 2 * root).item())

    generator = torch.Generator().manual_seed(0)
    few, many = (sum(exercise.floor(count, 10, generator) for _ in range(20)) / 20 for count in (100, 400))
    # For D axes and N points about 2 D / N of it comes from the means and D (D + 1) / (2 N) from the covariances.
    assert_close(torch.tensor([few, many]), torch.tensor([0.75, 0.1875]), rtol=0.15, atol=0)


STD = 0.5  # of the data of exercise 10, whose pixels are independent and N(0, STD²)


def path_error(sampler, steps: int) -> float:
    """How far a sampler ends from the exact path, on times that are equally spaced in log-SNR, down to log-SNR 3."""
    process = DiffusionProcess(schedule="linear")
    first, last = process.log_snr(999).item(), 3.0
    times = [999.0, *(process.time_of(first + (last - first) * k / steps) for k in range(1, steps + 1))]
    x_T = images()

    def spread(t):  # the standard deviation of x_t
        return ((process.alpha(t) * STD) ** 2 + process.sigma(t) ** 2).sqrt()
    denoise = Mixture(torch.zeros(1, 1, 2, 2), STD).denoiser(process)
    reached = {s: x for s, x, _ in sampler(denoise, x_T, times, process)}
    assert min(reached) == -1
    return (reached[times[-1]] - x_T * spread(times[-1]) / spread(999)).abs().max().item()


def test_ex10_heun_and_its_order(exercise):
    assert_close(exercise.order(lambda steps: 7 * steps**-3, 10), 3.0)
    calls = []
    list(exercise.heun(lambda x, t: calls.append(t) or x, images(), [900, 500, 100], DiffusionProcess()))
    assert len(calls) == 5, "two evaluations in each step but the last"
    assert 0.8 < exercise.order(lambda steps: path_error(ddim, steps), 40) < 1.2
    assert 1.8 < exercise.order(lambda steps: path_error(exercise.heun, steps), 40) < 2.2
