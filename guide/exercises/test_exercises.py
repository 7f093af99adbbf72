"""The tests of the exercises: each fails on the file as it is given, and passes once the exercise is solved.

`python -m pytest guide/exercises -k ex03` runs one; `--answers guide/exercises/solutions` tests the solutions.
"""

import torch
from torch.testing import assert_close

import diffusion
from diffusion import DiffusionProcess


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
