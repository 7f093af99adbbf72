"""Exercise 9: the Fréchet distance, and why it is never 0."""

import torch
from torch import Tensor


def frechet(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A B)^(1/2)) of two Gaussians (Heusel et al. 2017, eq. 6).

    means (D,), covariances A and B (D, D), float64. The trace of (A B)^(1/2) is the sum of the square roots of the
    eigenvalues of A B. The body below looks at the diagonals only: it does not see how the axes vary together.
    """
    std_a, std_b = covariance_a.diagonal().sqrt(), covariance_b.diagonal().sqrt()
    return ((mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()).item()


def floor(count: int, dimensions: int, generator: torch.Generator) -> float:
    """The Fréchet distance between two sets of `count` points that are drawn from the same N(0, 1) in every axis.

    Draw both with the generator, in float64; compute the mean and the covariance (torch.cov) of each.
    """
    raise NotImplementedError
