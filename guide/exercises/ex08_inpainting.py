"""Exercise 8: fill in a part of an image by replacing the known pixels at each step."""

from collections.abc import Callable

from torch import Tensor

from diffusion import DiffusionProcess


def replace_known(x_s: Tensor, s: float, known: Tensor, mask: Tensor, diffusion: DiffusionProcess,
                  randn: Callable[[Tensor], Tensor]) -> Tensor:
    """x_s (B, C, H, W) where mask is 1; where it is 0, the known picture with the noise of time s.

    known and mask have the shape of x_s. s = -1 is the clean image: there the known pixels are exact. randn(x) returns
    noise of the shape of x.
    The body below puts in the known pixels without noise, whatever the time: the denoiser expects noise everywhere.
    """
    return mask * x_s + (1 - mask) * known
