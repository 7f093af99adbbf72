"""Learned variances of the DDPM reverse step, and the variational bound that they are trained with.

The network has 2C output channels for images of C: the first half is its prediction, the second half, v, says how
large the variance of p(x_s | x_t) is between the smallest and the largest that it can be (Nichol and Dhariwal 2021).
The notation is that of `diffusion.py`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion import DiffusionProcess

VLB_WEIGHT = 0.001  # of the variational bound in the hybrid loss: lambda in Nichol and Dhariwal 2021, eq. 16


def create_process(learn_variance: bool, **config) -> DiffusionProcess:
    """The process of a network with learned variances or without: `learn_variance` of the model's config."""
    return (LearnedVariance if learn_variance else DiffusionProcess)(**config)


class LearnedVariance(DiffusionProcess):
    """A process whose network also learned the variances of the reverse steps.

    Arguments: as DiffusionProcess. A network without a second half counts as v = -1: the posterior's variance.
    """

    def __init__(self, *args, **config):
        super().__init__(*args, **config)
        second = min(1, self.num_timesteps - 1)
        beta_tilde = (1 - self.alphas_cumprod[0]) / (1 - self.alphas_cumprod[second]) * self.betas[second]
        self._first_log_variance = torch.log(beta_tilde).item()  # of the posterior from t = 1 to s = 0

    def predict_both(self, model, x_t: Tensor, t, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(prediction, v), (B, C, H, W) each, from one evaluation of the network."""
        return split_output(self._network_output(model, x_t, t, labels), x_t.shape[1])

    def log_variance_bounds(self, t, s) -> tuple[Tensor, Tensor]:
        """Logs of the smallest and the largest variance that p(x_s | x_t) can need, for any s < t.

        The posterior's, sigma_s² (1 - r), is right for data that are one point, and that of q(x_t | x_s),
        sigma_t² (1 - r) = 1 - alpha_t² / alpha_s², for data that are N(0, 1); r as in `posterior`. For s = t - 1 they
        are beta-tilde and beta of Ho et al. 2020, section 3.2. At s = -1, where the first would be log 0, it is that of
        (1, 0), as in the code of Nichol and Dhariwal 2021. Shapes: as the variance of `posterior`.
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

        v gets its gradient from the second term alone, and the prediction from the first alone.
        """
        t = self.sample_timesteps(len(x_0)) if t is None else t
        x_t, noise = self.forward_diffusion(x_0, t, noise)
        output, v = self.predict_both(model, x_t, t, labels)
        simple = super().loss(lambda *_: output, x_0, t, noise, reduction="none")  # no second evaluation
        x_0_hat = self.to_x_0(output.detach(), x_t, t, clip=True)
        error = simple + VLB_WEIGHT * self.num_timesteps * self.vlb_term(x_0, x_0_hat, v, t)
        return error.mean() if reduction == "mean" else error

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
        nats = torch.where((t == 0).view(-1, 1, 1, 1), -discretised_log_likelihood(x_0, x_0_hat, log_p), divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """(prediction, v), (B, C, H, W) each, for images of C channels; v is -1 where the output has no second half."""
    if output.shape[1] == channels:
        return output, torch.full_like(output, -1)
    return output.chunk(2, dim=1)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log P(x) for each entry of x, 8-bit values in [-1, 1], when N(mean, exp(log_variance)) is rounded to 8 bits.

    The probability is the integral from x - 1/255 to x + 1/255, and on to infinity at -1 and 1, so that the 256 values
    sum to 1 (Ho et al. 2020, eq. 13). Never less than log 1e-30.
    """
    # The normal distribution is symmetric: put each bin below the mean, where no two numbers near 1 are subtracted.
    outermost, half = x.abs() > 0.999, 1 / 255
    centre = torch.where(outermost, -x.sign() * (x - mean), -(x - mean).abs())
    scale = torch.exp(-log_variance / 2) / math.sqrt(2)
    beyond = torch.erfc((half - centre) * scale).masked_fill(outermost, 0.0)
    return ((torch.erfc((-half - centre) * scale) - beyond) / 2).clamp(min=1e-30).log()


# ------------------------------------------------------------------------------------------- the bound of a whole model


@torch.no_grad()
def bits_per_dim(model, diffusion: DiffusionProcess, x_0: Tensor, labels: Tensor | None = None, *,
                 draws: int | None = None, generator: torch.Generator | None = None,
                 noise: Tensor | None = None) -> Tensor:
    """An upper bound of -log2 p(x_0) of 8-bit images x_0 (B, C, H, W) in [-1, 1], per dimension: (B,).

    KL(q(x_{T-1} | x_0) || N(0, 1)) + sum over t of L_t, with L_t the `vlb_term` (Nichol and Dhariwal 2021, eq. 4). For
    networks with learned variances and without; these have the posterior's variance. One noise for each t estimates
    L_t without bias: it is drawn from `generator`, or is `noise` (B, C, H, W) at all t.

    draws None: all t, T evaluations. Else: t = 0 and `draws` others, draws + 1 evaluations. Each image's t are uniform
    in 1..T-1, one in each of `draws` equal parts, so that L_0 + (T - 1) / draws · (sum of their L_t) has the same mean
    as the sum over all t. Over the batch the t are spread evenly too (Kingma et al. 2021: low-discrepancy sampler): the
    mean of many images is far more exact than the bound of one.
    """
    process, last = LearnedVariance(**diffusion.config).to(diffusion.device), diffusion.num_timesteps - 1
    prior = (process.alpha(last) ** 2 * (x_0**2 - 1) - 2 * process.sigma(last).log()) / 2
    bits, weight = prior.flatten(1).mean(1) / math.log(2), 1.0
    times = torch.arange(1, last + 1)[:, None].expand(-1, len(x_0))                         # (T - 1, B)
    if draws is not None and draws < last:
        times, weight = _spread_times(draws, len(x_0), last, generator), last / draws       # (draws, B)
    for i, t in enumerate([torch.zeros(len(x_0), dtype=torch.long), *times]):
        t = t.to(x_0.device)
        x_t = process.q_sample(x_0, t, _randn(x_0, generator) if noise is None else noise)
        output, v = process.predict_both(model, x_t, t, labels)
        term = process.vlb_term(x_0, process.to_x_0(output, x_t, t, clip=True), v, t)
        bits = bits + (weight if i else 1.0) * term
    return bits


def _spread_times(draws: int, images: int, last: int, generator: torch.Generator | None) -> Tensor:
    """Whole times in 1..last (draws, images): in row j each is uniform in part j of `draws`, and the row fills it."""
    device = "cpu" if generator is None else generator.device
    offset = torch.rand(draws, 1, generator=generator, device=device, dtype=torch.float64).cpu()
    share = (torch.arange(images) / images + offset) % 1
    return 1 + ((torch.arange(draws)[:, None] + share) / draws * last).long().clamp(max=last - 1)


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
