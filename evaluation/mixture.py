"""Mixtures of Gaussians: data whose density and best denoiser are known in closed form at every time."""

import math

import torch
from torch import Tensor

from diffusion import Denoise, DiffusionProcess


class Mixture:
    """x_0 = a centre, drawn with its weight, plus Gaussian noise of standard deviation std in every value.

    centres (K, C, H, W); weights (K,), by default equal. std = 0: x_0 is one of the centres, as of a training set.
    At time t it is again a mixture, with the centres alpha · centre and the variance alpha² std² + sigma².
    """

    def __init__(self, centres: Tensor, std: float = 0.0, weights: Tensor | None = None):
        self.centres, self.std = centres.flatten(1).double(), std                           # (K, D)
        weights = torch.ones(len(centres)) if weights is None else weights
        self.log_weights = (weights / weights.sum()).double().log()                         # (K,)

    def _joint(self, x_t: Tensor, t, diffusion: DiffusionProcess) -> tuple[Tensor, ...]:
        """alpha, the variance, both (B, 1) or 0-dim, and the log density of x_t together with each centre (B, K)."""
        alpha, sigma = (rate.double().flatten(1) if rate.ndim else rate for rate in (diffusion.alpha(t),
                                                                                     diffusion.sigma(t)))
        variance = (alpha * self.std) ** 2 + sigma**2
        squared = (torch.cdist(x_t.flatten(1).double() / alpha, self.centres) * alpha) ** 2
        log_norm = self.centres.shape[1] / 2 * torch.log(2 * math.pi * variance)
        return alpha, variance, self.log_weights - squared / (2 * variance) - log_norm

    def log_density(self, x_t: Tensor, t, diffusion: DiffusionProcess) -> Tensor:
        """log p_t(x_t) (B,), of images (B, C, H, W) at time t."""
        return self._joint(x_t, t, diffusion)[2].logsumexp(1)

    def denoiser(self, diffusion: DiffusionProcess) -> Denoise:
        """denoise(x_t, t) -> E[x_0 | x_t]: the estimate for each centre, weighted by its probability given x_t.

        For one centre it is c + alpha std² / variance · (x_t - alpha · c). No network has a smaller loss.
        """
        def denoise(x_t: Tensor, t) -> Tensor:
            alpha, variance, joint = self._joint(x_t, t, diffusion)
            centre = joint.softmax(1) @ self.centres                                        # (B, D)
            x_0_hat = centre + alpha * self.std**2 / variance * (x_t.flatten(1) - alpha * centre)
            return x_0_hat.view_as(x_t).to(x_t.dtype)
        return denoise
