"""Exercise 5: the best possible denoiser, for data of two images."""

from torch import Tensor


def x_0_hat(x_t: Tensor, image: Tensor, alpha: float, sigma: float) -> Tensor:
    """tanh(alpha · <x_t, image> / sigma²) · image.

    By Bayes, the log of the ratio of the two probabilities is 2 alpha <x_t, image> / sigma²: all other terms are the
    same for both. P(image) - P(-image) is the tanh of half of it.
    """
    inner = (x_t * image).sum(dim=(1, 2, 3), keepdim=True)                                  # (B, 1, 1, 1)
    return (alpha * inner / sigma**2).tanh() * image
