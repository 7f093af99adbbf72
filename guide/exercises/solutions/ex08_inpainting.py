"""Exercise 8: fill in a part of an image by replacing the known pixels at each step."""

from collections.abc import Callable

from torch import Tensor

from diffusion import DiffusionProcess


def replace_known(x_s: Tensor, s: float, known: Tensor, mask: Tensor, diffusion: DiffusionProcess,
                  randn: Callable[[Tensor], Tensor]) -> Tensor:
    """x_s where mask is 1, and q(x_s | known) where it is 0: at s = -1, alpha is 1 and sigma is 0."""
    return mask * x_s + (1 - mask) * diffusion.q_sample(known, s, randn(known))
