"""Exercise 1: a schedule whose log signal-to-noise ratio falls on a straight line."""

import numpy as np


def schedule(num_timesteps: int, highest: float = 9.0, lowest: float = -9.0) -> np.ndarray:
    """alphas_cumprod (T,) = 1 / (1 + exp(-log_snr)): the sigmoid is the inverse of the log-SNR's formula."""
    log_snr = np.linspace(highest, lowest, num_timesteps)
    return 1 / (1 + np.exp(-log_snr))
