"""The error of the best linear denoiser, which a trained network has to beat."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion import DiffusionProcess


def gaussian_bound(images: Tensor, diffusion: DiffusionProcess, times: Tensor | Sequence[float]) -> Tensor:
    """The mean squared error of x_0_hat, per pixel, of the best linear denoiser of `images` at each of `times`.

    Of all linear functions of x_t the Wiener filter (Wiener 1949) has the smallest error. For Gaussian data it has the
    smallest error of all functions. Along a principal axis of the data with variance c the error is

        c · sigma² / (alpha² c + sigma²),

    and the bound is its mean over the axes: 0 at t = -1, the variance of a pixel where alpha is 0.
    images (N, C, H, W) in [-1, 1], N several times the number of pixels; times (K,); returns (K,) float64.
    """
    pixels = images.flatten(1).cpu()                                                        # (N, C·H·W)
    mean = pixels.double().mean(0)
    chunks = (part.double() - mean for part in pixels.split(1000))  # all in float64 at once would need much memory
    covariance = sum(part.T @ part for part in chunks) / (len(pixels) - 1)                  # (C·H·W, C·H·W)
    variances = torch.linalg.eigvalsh(covariance).clamp(min=0)
    log_snr = diffusion.log_snr(torch.as_tensor(times, dtype=torch.float64, device="cpu")).reshape(-1, 1)
    alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)                        # (K, 1)
    return (variances * sigma2 / (alpha2 * variances + sigma2).clamp(min=1e-300)).mean(1)
