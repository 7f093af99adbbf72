"""Exercise 1: a schedule whose log signal-to-noise ratio falls on a straight line."""

import numpy as np


def schedule(num_timesteps: int, highest: float = 9.0, lowest: float = -9.0) -> np.ndarray:
    """alphas_cumprod (T,) float64 whose log-SNR falls evenly from `highest` at t = 0 to `lowest` at t = T - 1.

    log-SNR = log(alphas_cumprod / (1 - alphas_cumprod)). The body below lets alphas_cumprod itself fall evenly.
    """
    return np.linspace(0.999, 0.001, num_timesteps)
