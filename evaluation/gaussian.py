"""The error of the best linear denoiser, which a trained network has to beat."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion import DiffusionProcess

MOST_VALUES = 4096  # of an image, up to which the covariance of all pairs of its values is computed
ENOUGH = 5  # images for each of their values, from which that covariance can be learned
MOST_NUMBERS = 2**28  # in memory at once: a gigabyte of float32
ROWS = 500  # images at a time in float64: all at once would need much memory


def bound_images(least: int, values: int) -> int:
    """How many images of so many values to give to `gaussian_bound`: at least `least`, fewer of very large ones."""
    return min(max(least, ENOUGH * values if values <= MOST_VALUES else 0), MOST_NUMBERS // values)


def gaussian_bound(images: Tensor, diffusion: DiffusionProcess, times: Tensor | Sequence[float]) -> Tensor:
    """The mean squared error of x_0_hat, per pixel, of the best linear denoiser of `images` at each of `times`.

    Of all linear functions of x_t the Wiener filter (Wiener 1949) has the smallest error. For Gaussian data it has the
    smallest error of all functions. Along a principal axis of the data with variance c the error is

        c · sigma² / (alpha² c + sigma²),

    and the bound is its mean over the axes: 0 at t = -1, the variance of a pixel where alpha is 0. Images of more than
    MOST_VALUES values have too many axes to be computed, and fewer than ENOUGH times as many images as values do not
    show what varies along each: there it is the best of the filters that treat every place alike, whose axes are
    waves, C of each frequency. Its error is larger, unless the data look the same at every place.
    images (N, C, H, W) in [-1, 1], N several times C; times (K,); returns (K,) float64.
    """
    images, values = images.cpu(), images[0].numel()
    waves = values > MOST_VALUES or len(images) < ENOUGH * values
    variances = (_wave_variances if waves else _variances)(images).clamp(min=0)
    log_snr = diffusion.log_snr(torch.as_tensor(times, dtype=torch.float64, device="cpu")).reshape(-1, 1)
    alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)                        # (K, 1)
    return (variances * sigma2 / (alpha2 * variances + sigma2).clamp(min=1e-300)).mean(1)


def _variances(images: Tensor) -> Tensor:
    """The variances along the principal axes of images (N, C, H, W): (C·H·W,) float64."""
    pixels = images.flatten(1)                                                              # (N, C·H·W)
    mean = pixels.mean(0, dtype=torch.float64)
    chunks = (part.double() - mean for part in pixels.split(ROWS))
    return torch.linalg.eigvalsh(sum(part.T @ part for part in chunks) / (len(pixels) - 1))


def _wave_variances(images: Tensor) -> Tensor:
    """The same where the axes have to be waves: those of the C channels at each frequency, (C·H·W,) float64."""
    mean = images.mean(0, dtype=torch.float64)
    spectra = (torch.fft.fft2(part.double() - mean, norm="ortho") for part in images.split(ROWS))
    covariance = sum(torch.einsum("nchw,ndhw->hwcd", s, s.conj()) for s in spectra) / (len(images) - 1)
    return torch.linalg.eigvalsh(covariance).flatten()                                      # (H, W, C) before
