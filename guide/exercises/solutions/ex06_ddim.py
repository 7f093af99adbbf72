"""Exercise 6: a step of DDIM."""

from torch import Tensor


def ddim_step(x_t: Tensor, x_0_hat: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> Tensor:
    """x_s = alpha_s · x_0_hat + sigma_s · noise_hat, with noise_hat = (x_t - alpha_t · x_0_hat) / sigma_t."""
    noise_hat = (x_t - alpha_t * x_0_hat) / sigma_t
    return alpha_s * x_0_hat + sigma_s * noise_hat
