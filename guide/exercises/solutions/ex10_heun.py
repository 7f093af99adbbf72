"""Exercise 10: write a sampler and measure its order."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from diffusion import Denoise, DiffusionProcess
from samplers import Trajectory, batch_time, ddim_step, step_pairs


def heun(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess) -> Trajectory:
    """Heun's method (Karras et al. 2022, algorithm 1): two evaluations a step, one in the last."""
    x = x_T
    for t, s in step_pairs(timesteps):
        x_0_hat = denoise(x, batch_time(t, x))
        x_s = ddim_step(x, x_0_hat, t, s, diffusion)
        if s >= 0:
            (alpha_t, alpha_s), (sigma_t, sigma_s) = ([rate(u) for u in (t, s)]
                                                      for rate in (diffusion.alpha, diffusion.sigma))
            here = (x - alpha_t * x_0_hat) / sigma_t
            there = (x_s - alpha_s * denoise(x_s, batch_time(s, x_s))) / sigma_s
            x_s = alpha_s * (x / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * (here + there) / 2)
        x = x_s
        yield s, x, x_0_hat


def order(error: Callable[[int], float], steps: int) -> float:
    """log2(error(steps) / error(2 · steps)): twice as many steps divide the error by 2^p."""
    return math.log2(error(steps) / error(2 * steps))
