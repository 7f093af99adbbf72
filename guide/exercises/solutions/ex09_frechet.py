"""Exercise 9: the Fréchet distance, and why it is never 0."""

import torch
from torch import Tensor


def frechet(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|mean_a - mean_b|² + tr(A) + tr(B) - 2 · the sum of the square roots of the eigenvalues of A B.

    They are real and at least 0, for A and B are covariances; rounding can make them a little negative or complex.
    """
    root = torch.linalg.eigvals(covariance_a @ covariance_b).real.clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * root).item()


def floor(count: int, dimensions: int, generator: torch.Generator) -> float:
    """The Fréchet distance between two sets of `count` points that are drawn from the same N(0, 1) in every axis."""
    a, b = torch.randn(2, count, dimensions, generator=generator, dtype=torch.float64)
    return frechet(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
