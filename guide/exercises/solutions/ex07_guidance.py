"""Exercise 7: classifier-free guidance at some of the times."""

from torch import Tensor

from diffusion import Denoise


def guided(with_label: Denoise, without: Denoise, scale: float, interval: tuple[float, float]) -> Denoise:
    """denoise(x_t, t) -> x_0_hat = without + scale · (with_label - without) at the times interval[0]..interval[1]."""
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        conditional = with_label(x_t, t)
        if not interval[0] <= float(t[0]) <= interval[1]:
            return conditional
        unconditional = without(x_t, t)
        return unconditional + scale * (conditional - unconditional)
    return denoise
