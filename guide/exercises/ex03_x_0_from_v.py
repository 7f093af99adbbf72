"""Exercise 3: the clean image from a network that predicts v."""

from torch import Tensor


def x_0_from_v(v: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0, from x_t = alpha · x_0 + sigma · noise and v = alpha · noise - sigma · x_0 (Salimans and Ho 2022).

    alpha and sigma are 0-dim or (B, 1, 1, 1), with alpha² + sigma² = 1. alpha may be 0: do not divide by it.
    The body below is the common mistake "clean is noisy minus noise".
    """
    return x_t - v
