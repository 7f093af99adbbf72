"""Exercise 4: many small steps of noise are one jump."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor


def small_steps(x_0: Tensor, betas: Sequence[float], randn: Callable[[Tensor], Tensor]) -> Tensor:
    """x after one step x <- sqrt(1 - beta) · x + sqrt(beta) · fresh noise for each of the betas."""
    x = x_0
    for beta in betas:
        x = (1 - beta) ** 0.5 * x + beta**0.5 * randn(x)
    return x


def jump_rates(betas: Sequence[float]) -> tuple[float, float]:
    """alpha² is the product of all 1 - beta, and the variance stays 1: sigma² = 1 - alpha²."""
    alphas_cumprod = math.prod(1 - beta for beta in betas)
    return alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
