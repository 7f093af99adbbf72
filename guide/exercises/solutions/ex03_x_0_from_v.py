"""Exercise 3: the clean image from a network that predicts v."""

from torch import Tensor


def x_0_from_v(v: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_0 = alpha · x_t - sigma · v: in alpha times x_t minus sigma times v, the two terms with noise cancel."""
    return alpha * x_t - sigma * v
