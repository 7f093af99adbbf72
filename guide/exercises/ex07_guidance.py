"""Exercise 7: classifier-free guidance at some of the times."""

from torch import Tensor

from diffusion import Denoise


def guided(with_label: Denoise, without: Denoise, scale: float, interval: tuple[float, float]) -> Denoise:
    """denoise(x_t, t) -> x_0_hat = without + scale · (with_label - without) at the times interval[0]..interval[1].

    Both ends of the interval belong to it. Scale 1 is with_label alone and 0 without (here, as in most programs). At
    other times the result is that of with_label, and `without` is not called: guidance costs nothing there. t is (B,),
    the same time for all images.
    The body below counts the scale from 0, as the formula of Ho and Salimans 2022 does, and acts at all times.
    """
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return (1 + scale) * with_label(x_t, t) - scale * without(x_t, t)
    return denoise
