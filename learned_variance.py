"""Learned variances of the DDPM reverse step, and the variational bound that they are trained with.

For images of C channels the network has 2C output channels: the first half is its prediction, the second half is v,
which places the variance of p(x_s | x_t) between a lower and an upper bound (Nichol and Dhariwal 2021). `bits_per_dim`
is for all networks. The notation is that of `diffusion.py`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion import DiffusionProcess, reduce_loss

LINEAR_EDGES = (torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1  # halfway between the 256 values of a pixel
BEYOND = 1e3  # stands for infinity, whose gradient would be NaN
VLB_WEIGHT = 0.001  # of the variational bound in the hybrid loss: lambda in Nichol and Dhariwal 2021, eq. 16


def create_process(learn_variance: bool, edges: Tensor | None = None, **config) -> DiffusionProcess:
    """The process of a network with learned variances or without: `learn_variance` of the model's config.

    edges: as `LearnedVariance`.
    """
    return LearnedVariance(edges=edges, **config) if learn_variance else DiffusionProcess(**config)


class LearnedVariance(DiffusionProcess):
    """A process whose network also learned the variances of the reverse steps.

    Other arguments: as DiffusionProcess. A network without a second half counts as v = -1: the posterior's variance.

    edges    (255,): the numbers halfway between the 256 values of a pixel, `LevelCode.edges`; by default LINEAR_EDGES
    """

    def __init__(self, *args, edges: Tensor | None = None, **config):
        self.edges = LINEAR_EDGES if edges is None else edges  # first, because the next line calls `to`
        super().__init__(*args, **config)
        second = min(1, self.num_timesteps - 1)
        beta_tilde = (1 - self.alphas_cumprod[0]) / (1 - self.alphas_cumprod[second]) * self.betas[second]
        self._first_log_variance = torch.log(beta_tilde).item()  # of the posterior from t = 1 to s = 0

    def to(self, device) -> "LearnedVariance":
        super().to(device)
        self.edges = self.edges.to(self.device, self._device_table.dtype)
        return self

    def predict_both(self, model, x_t: Tensor, t, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(prediction, v), (B, C, H, W) each, from one evaluation of the network."""
        return split_output(self._network_output(model, x_t, t, labels), x_t.shape[1])

    def log_variance_bounds(self, t, s) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the log variance of p(x_s | x_t), for any s < t. Shapes: as that of `posterior`.

        Lower: log of the posterior's variance, sigma_s² (1 - r), exact where all images are the same. Upper: log of
        that of q(x_t | x_s), sigma_t² (1 - r) = 1 - alpha_t² / alpha_s², exact for x_0 ~ N(0, 1). r: see `posterior`.
        For s = t - 1 they are beta-tilde and beta (Ho et al. 2020, section 3.2). At s = -1 the lower would be log 0:
        the one from t = 1 to s = 0 replaces it, as in the code of Nichol and Dhariwal 2021 (where T = 1, log beta).
        """
        lambda_t, lambda_s, one_minus_r = self._step(t, s)
        lower, upper = (F.logsigmoid(-each) + one_minus_r.log() for each in (lambda_s, lambda_t))
        return lower.masked_fill(lambda_s == math.inf, self._first_log_variance), upper

    def log_variance(self, v: Tensor, t, s) -> Tensor:
        """The log variance of p(x_s | x_t) (B, C, H, W): v' · upper + (1 - v') · lower with v' = (v + 1) / 2.

        v (B, C, H, W) is the second half of the network's output; lower and upper are the `log_variance_bounds`, which
        v = -1 and v = 1 give. Nichol and Dhariwal 2021, eq. 15, for any s < t.
        """
        lower, upper = (bound if bound.ndim == 0 else bound.to(v.dtype) for bound in self.log_variance_bounds(t, s))
        share = (v + 1) / 2
        return share * upper + (1 - share) * lower

    def p_mean_variance(self, model, x_t: Tensor, t, labels: Tensor | None = None,
                        clip: bool = True) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(x_{t-1} | x_t): the mean of the posterior, the learned variance, and 0 at t = 0."""
        output, v = self.predict_both(model, x_t, t, labels)
        mean, variance = self.posterior(x_t, self.to_x_0(output, x_t, t, clip), t, t - 1)
        return mean, (variance > 0) * self.log_variance(v, t, t - 1).exp()

    # ------------------------------------------------------------------------------------------------------ training

    def loss(self, model, x_0: Tensor, t: Tensor | None = None, noise: Tensor | None = None,
             labels: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The hybrid loss: simple loss + VLB_WEIGHT · T · `vlb_term`, at the same t (Nichol and Dhariwal 2021, eq. 16).

        v gets its gradient from the second term alone, and the prediction from the first alone. The equation has
        uniform times: with other timestep_sampling the terms of the bound are weighted differently, and the best v of
        each time is the same.
        """
        t = self.sample_timesteps(len(x_0)) if t is None else t
        x_t, noise = self.forward_diffusion(x_0, t, noise)
        output, v = self.predict_both(model, x_t, t, labels)
        simple = super().loss(lambda *_: output, x_0, t, noise, reduction="none")  # no second evaluation
        x_0_hat = self.to_x_0(output.detach(), x_t, t, clip=True)
        error = simple + VLB_WEIGHT * self.num_timesteps * self.vlb_term(x_0, x_0_hat, v, t)
        return reduce_loss(error, reduction)

    def simple_loss(self, *args, **options) -> Tensor:
        """`DiffusionProcess.loss`: the error of the prediction alone."""
        return super().loss(*args, **options)

    def vlb_term(self, x_0: Tensor, x_0_hat: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The term of time t (B,), whole, in the variational bound of each image (B,), in bits per dimension.

        t > 0: KL(q(x_s | x_t, x_0) || p(x_s | x_t)) for s = t - 1, of normal distributions whose means differ by
        alpha_s (1 - r) (x_0 - x_0_hat), see `posterior`. t = 0: -log p(x_0 | x_t) of 8-bit images. The variance of p is
        exp(`log_variance`(v)). Nichol and Dhariwal 2021, eqs. 5 and 6.
        """
        shift, _ = self.posterior(torch.zeros_like(x_0), x_0 - x_0_hat, t, t - 1)
        log_q = self.log_variance_bounds(t, t - 1)[0].to(x_0.dtype)
        log_p = self.log_variance(v, t, t - 1)
        divergence = (log_p - log_q + torch.exp(log_q - log_p) + shift**2 * torch.exp(-log_p) - 1) / 2
        likelihood = discretised_log_likelihood(x_0, x_0_hat, log_p, self.edges)
        nats = torch.where((t == 0).view(-1, 1, 1, 1), -likelihood, divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(prediction, v), (B, C, H, W) each, for images of C channels; v is -1 where the output has no second half."""
    if output.shape[1] == channels:
        return output, torch.full_like(output, -1)
    return output.chunk(2, dim=1)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor, edges: Tensor = LINEAR_EDGES) -> Tensor:
    """log P(x) for each entry of x, one of 256 values in [-1, 1], when N(mean, exp(log_variance)) is rounded to them.

    The probability is the integral between the two of the `edges` (255,) around x, and on to infinity beyond the first
    and the last, so that the 256 values sum to 1 (Ho et al. 2020, eq. 13). float32 or float64; at least log 1e-30.
    """
    # No number is written into it: on a GPU that would wait, which a CUDA graph must not.
    bounds = F.pad(F.pad(edges.to(x), (1, 0), value=-BEYOND), (0, 1), value=BEYOND)         # (257,)
    level = torch.bucketize(x.contiguous(), bounds[1:-1])
    low, high = bounds[level] - mean, bounds[level + 1] - mean
    # The normal distribution is symmetric: put each bin below the mean, where no two numbers near 1 are subtracted.
    above = low + high > 0
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    scale = torch.exp(-log_variance / 2) / math.sqrt(2)
    return ((torch.erfc(-high * scale) - torch.erfc(-low * scale)) / 2).clamp(min=1e-30).log()


# ------------------------------------------------------------------------------------------------ bits per dimension


@torch.no_grad()
def bits_per_dim(model, diffusion: DiffusionProcess, x_0: Tensor, labels: Tensor | None = None, *,
                 draws: int | None = None, generator: torch.Generator | None = None,
                 noise: Tensor | None = None, edges: Tensor | None = None) -> Tensor:
    """An upper bound of -log2 p(x_0) of 8-bit images x_0 (B, C, H, W) in [-1, 1], per dimension: (B,).

    edges: of the code of the images, as `LearnedVariance`; by default those of `diffusion`, else LINEAR_EDGES.

    KL(q(x_{T-1} | x_0) || N(0, 1)) + sum over t of L_t, where L_t is the `vlb_term` (Nichol and Dhariwal 2021, eq. 4).
    A network without learned variances gets the posterior's. Each L_t is estimated with one noise, without bias: drawn
    from `generator`, or `noise` (B, C, H, W) at all t.

    draws None: all t, T evaluations. Otherwise t = 0 and `draws` random times for each image, draws + 1 evaluations:
    t = floor(T^u) with one uniform u in each of `draws` equal parts of [0, 1). On average over the parts
    P(t) = log(1 + 1/t) / log T, about proportional to L_t. The estimate L_0 + sum of L_t / (draws · P(t)) is unbiased:
    its mean is the sum over all t. The u of a batch are spread evenly (Kingma et al. 2021: low-discrepancy sampler), so
    the errors of its images partly cancel in their mean. ValueError for draws below 1.
    """
    if draws is not None and draws < 1:
        raise ValueError(f"draws must be 1 or more, or None for all times, not {draws}")
    edges = getattr(diffusion, "edges", None) if edges is None else edges
    process = LearnedVariance(edges=edges, **diffusion.config).to(diffusion.device)
    last = diffusion.num_timesteps - 1
    prior = (process.alpha(last) ** 2 * (x_0**2 - 1) - 2 * process.sigma(last).log()) / 2
    bits = prior.flatten(1).mean(1) / math.log(2)
    times, weights = torch.arange(1, last + 1)[:, None].expand(-1, len(x_0)), torch.ones(last, len(x_0))
    if draws is not None and draws < last:
        times, weights = _log_uniform_times(draws, len(x_0), last, generator)               # (draws, B)
    zero, one = torch.zeros(1, len(x_0), dtype=torch.long), torch.ones(1, len(x_0))
    for t, weight in zip(torch.cat([zero, times]).to(x_0.device), torch.cat([one, weights]).to(x_0), strict=True):
        x_t = process.q_sample(x_0, t, _randn(x_0, generator) if noise is None else noise)
        output, v = process.predict_both(model, x_t, t, labels)
        bits = bits + weight * process.vlb_term(x_0, process.to_x_0(output, x_t, t, clip=True), v, t)
    return bits


def _log_uniform_times(draws: int, images: int, last: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Times in 1..last and their weights 1 / (draws · P(t)), (draws, images) each: see `bits_per_dim`."""
    device = "cpu" if generator is None else generator.device
    offset = torch.rand(draws, 1, generator=generator, device=device, dtype=torch.float64).cpu()
    u = (torch.arange(draws)[:, None] + (torch.arange(images) / images + offset) % 1) / draws
    t = torch.exp(u * math.log(last + 1)).long().clamp(max=last)
    return t, math.log(last + 1) / (draws * torch.log1p(1 / t.double()))


def _randn(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like x, drawn on the generator's device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


# ---------------------------------------------------------------------------------------- learned variances in samplers


class KeepLastOutput:
    """A network with learned variances that stores its last output: `log_variance` needs no evaluation of its own."""

    def __init__(self, model, diffusion: LearnedVariance):
        self.model, self.diffusion, self.output = model, diffusion, None
        self.num_classes = getattr(model, "num_classes", None)

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.output = self.model(*inputs)
        return self.output

    def log_variance(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """The log variance of x_s (B, C, H, W) by the last evaluation, which was that of denoise(x_t, t).

        With guidance the batch held each image twice: the first half is the one with labels.
        """
        _, v = split_output(self.output[:len(x_t)], x_t.shape[1])
        return self.diffusion.log_variance(v.to(x_t.dtype), t, s)
