"""Exercise 4: many small steps of noise are one jump."""

from collections.abc import Callable, Sequence

from torch import Tensor


def small_steps(x_0: Tensor, betas: Sequence[float], randn: Callable[[Tensor], Tensor]) -> Tensor:
    """x after one step x <- sqrt(1 - beta) · x + sqrt(beta) · fresh noise for each of the betas.

    randn(x) returns fresh noise of the shape of x (B, C, H, W); call it once a step. Below, x is not made smaller.
    """
    x = x_0
    for beta in betas:
        x = x + beta**0.5 * randn(x)
    return x


def jump_rates(betas: Sequence[float]) -> tuple[float, float]:
    """(alpha, sigma) of the jump x = alpha · x_0 + sigma · noise that has the same distribution as all small steps.

    Two numbers of Python: tensors of float32 would be too coarse for the test.
    """
    raise NotImplementedError
