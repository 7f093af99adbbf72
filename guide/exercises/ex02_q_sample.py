"""Exercise 2: noisy images in one jump, each at its own time."""

from torch import Tensor


def q_sample(x_0: Tensor, t: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(alphas_cumprod_t) · x_0 + sqrt(1 - alphas_cumprod_t) · noise (Ho et al. 2020, eq. 4).

    x_0 and noise (B, C, H, W); t (B,) int64, one time for each image; alphas_cumprod (T,) float64.
    The result has the dtype of x_0. The body below has two mistakes.
    """
    rate = alphas_cumprod[t]
    return rate * x_0 + (1 - rate) * noise
