"""The tests of the exercises: each fails on the file as it is given, and passes once the exercise is solved.

`python -m pytest guide/exercises -k ex03` runs one; `--answers guide/exercises/solutions` tests the solutions.
"""

import torch
from torch.testing import assert_close

import diffusion
from diffusion import DiffusionProcess
from evaluation.mixture import Mixture


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
