"""Exercise 2: noisy images in one jump, each at its own time."""

from torch import Tensor


def q_sample(x_0: Tensor, t: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(alphas_cumprod_t) · x_0 + sqrt(1 - alphas_cumprod_t) · noise (Ho et al. 2020, eq. 4)."""
    rate = alphas_cumprod[t].view(-1, 1, 1, 1)                                              # one number for each image
    return (rate.sqrt() * x_0 + (1 - rate).sqrt() * noise).to(x_0.dtype)
