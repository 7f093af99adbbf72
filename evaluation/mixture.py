"""Mixtures of Gaussians: data whose density and best denoiser are known in closed form at every time."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffusion import Denoise, DiffusionProcess

PART = 128  # images whose distances to all centres are held at a time: 4 MB for 4,000 centres


class Mixture:
    """x_0 = a centre, drawn with its weight, plus Gaussian noise of standard deviation std in every value.

    centres (K, C, H, W); weights (K,), by default equal. std = 0: x_0 is one of the centres, as of a training set.
    At time t it is again a mixture, with the centres alpha · centre and the variance alpha² std² + sigma².
    """

    def __init__(self, centres: Tensor, std: float = 0.0, weights: Tensor | None = None):
        self.centres, self.std = centres.flatten(1).double(), std                           # (K, D)
        weights = torch.ones(len(centres)) if weights is None else weights
        self.log_weights = (weights / weights.sum()).double().log()                         # (K,)

    def _parts(self, x_t: Tensor, t, diffusion: DiffusionProcess) -> Iterator[tuple[Tensor, ...]]:
        """For some images at a time: x_t (B, D), alpha (B, 1), the variance (B, 1), and the log density of each image
        together with each centre (B, K)."""
        times = t if isinstance(t, Tensor) and t.ndim else torch.as_tensor(t, dtype=torch.float64).expand(len(x_t))
        for x, s in zip(x_t.flatten(1).double().split(PART), times.split(PART), strict=True):
            alpha, sigma = (rate(s).double().flatten(1) for rate in (diffusion.alpha, diffusion.sigma))
            variance = (alpha * self.std) ** 2 + sigma**2
            squared = (x.square().sum(1, keepdim=True) - 2 * alpha * x @ self.centres.T
                       + alpha**2 * self.centres.square().sum(1)).clamp(min=0)              # |x - alpha · centre|²
            log_norm = self.centres.shape[1] / 2 * torch.log(2 * math.pi * variance)
            yield x, alpha, variance, self.log_weights - squared / (2 * variance) - log_norm

    def log_density(self, x_t: Tensor, t, diffusion: DiffusionProcess) -> Tensor:
        """log p_t(x_t) (B,), of images (B, C, H, W) at time t."""
        return torch.cat([joint.logsumexp(1) for *_, joint in self._parts(x_t, t, diffusion)])

    def denoiser(self, diffusion: DiffusionProcess) -> Denoise:
        """denoise(x_t, t) -> E[x_0 | x_t]: the estimate for each centre, weighted by its probability given x_t.

        For one centre it is c + alpha std² / variance · (x_t - alpha · c). No network has a smaller loss.
        """
        def denoise(x_t: Tensor, t) -> Tensor:
            estimates = []
            for x, alpha, variance, joint in self._parts(x_t, t, diffusion):
                centre = joint.softmax(1) @ self.centres                                    # (B, D)
                estimates.append(centre + alpha * self.std**2 / variance * (x - alpha * centre))
            return torch.cat(estimates).view_as(x_t).to(x_t.dtype)
        return denoise
