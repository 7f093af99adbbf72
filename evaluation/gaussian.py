"""How well a denoiser that knows only the mean and the covariance of the images can do: what a network must beat."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion import DiffusionProcess


def gaussian_bound(images: Tensor, diffusion: DiffusionProcess, times: Tensor | Sequence[float]) -> Tensor:
    """The mean squared error of x_0_hat, per pixel, of the best linear denoiser of `images` at each of `times`.

    Of all functions of x_t that are linear, the Wiener filter (Wiener 1949) has the smallest error; for Gaussian data
    no function has a smaller one. Along a principal axis of the data, of variance c, it is

        c · sigma² / (alpha² c + sigma²),

    and the bound is the mean over the axes: from 0 at t = -1 to the variance of a pixel where nothing of x_0 is left.
    images (N, C, H, W) in [-1, 1], several times as many as they have pixels; times (K,); returns (K,) float64.
    """
    pixels = images.flatten(1).double().cpu()                                               # (N, C·H·W)
    variances = torch.linalg.eigvalsh(torch.cov(pixels.T).reshape(2 * pixels.shape[1:])).clamp(min=0)
    log_snr = diffusion.log_snr(torch.as_tensor(times, dtype=torch.float64, device="cpu")).reshape(-1, 1)
    alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)                        # (K, 1)
    return (variances * sigma2 / (alpha2 * variances + sigma2).clamp(min=1e-300)).mean(1)
