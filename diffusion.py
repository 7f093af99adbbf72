"""The mathematics of diffusion models: noise schedules, the forward process, what a network predicts, the way back.

A diffusion model learns to undo noise. The forward process mixes a clean image x_0 with Gaussian noise,

    x_t = alpha_t · x_0 + sigma_t · noise,      alpha_t² + sigma_t² = 1,                    (Ho et al. 2020, eq. 4)

a little at t = 0 and almost completely at t = T - 1. A network sees x_t and t and predicts a mixture of x_0 and noise,
from which x_0_hat, the expected clean image, follows. A sampler starts at pure noise and walks back to t = -1, the
clean image, always asking for x_0_hat. All that the process needs to know about the schedule is one curve, the
log signal-to-noise ratio lambda_t = log(alpha_t² / sigma_t²), which falls with t (Kingma et al. 2021).

Notation: x_0 (B, C, H, W) in [-1, 1]; t a number, or a tensor (B,) with one time for each image; alpha and sigma are
sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) of Ho et al. 2020; s is a time before t.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Denoise = Callable[[Tensor, Tensor | float], Tensor]  # denoise(x_t, t) -> x_0_hat


def linear_schedule(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """alphas_cumprod (T,) of betas that rise linearly over 1,000 steps (Ho et al. 2020, section 4).

    For another T, log alphas_cumprod of that curve is resampled at T points: it begins at 0 and ends where it ends,
    whatever T is, so one step is as valid a process as 4,000.
    """
    log_curve = np.concatenate([[0.0], np.cumsum(np.log1p(-np.linspace(beta_start, beta_end, 1000)))])
    return np.exp(np.interp(np.arange(1, num_timesteps + 1) / num_timesteps, np.linspace(0, 1, 1001), log_curve))


def cosine_schedule(num_timesteps: int, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """alphas_cumprod (T,) = f(t+1) / f(0) with f(t) = cos²((t/T + offset) / (1 + offset) · π/2), betas at most 0.999.

    Nichol and Dhariwal 2021, eq. 17.
    """
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + offset) / (1 + offset) * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], max_beta))


def zero_terminal(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The schedule moved and stretched so that sqrt(alphas_cumprod) keeps its first value and ends at 0.

    Lin et al. 2024, algorithm 1: the last x_t is pure noise, as the sampler's start is.
    """
    alpha = np.sqrt(alphas_cumprod)
    if len(alpha) == 1:
        return np.zeros(1)
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2


SCHEDULES = ("linear", "cosine")

# What the network predicts is target = a · x_0 + b · noise: one row (a, b) for each parametrisation.
# alpha, sigma: of the time; std: of the data; D = alpha² std² + sigma² is the variance of x_t.
PREDICTIONS = {
    "eps": lambda alpha, sigma, std: (0.0, 1.0),  # Ho et al. 2020
    "x0": lambda alpha, sigma, std: (1.0, 0.0),
    "v": lambda alpha, sigma, std: (-sigma, alpha),  # Salimans and Ho 2022
    "edm": lambda alpha, sigma, std: (  # Karras et al. 2022, table 1; for std 1 it is -v
        sigma / std * ((alpha * std) ** 2 + sigma**2) ** -0.5,
        -alpha * std * ((alpha * std) ** 2 + sigma**2) ** -0.5,
    ),
}

TIMESTEP_SAMPLING = ("uniform", "stratified", "lognormal")
LOSS_WEIGHTS = ("target", "min_snr")
VLB_WEIGHT = 0.001  # of the variational bound beside the simple loss: lambda in Nichol and Dhariwal 2021, eq. 16


def _choice(what: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that N(mean, exp(log_variance)) has around x, an 8-bit value in [-1, 1]: for each entry.

    From x - 1/255 to x + 1/255, and on to infinity at -1 and 1, so that the masses of the 256 values sum to 1 (Ho et
    al. 2020, eq. 13). Never less than log 1e-30.
    """
    # By symmetry every bin may lie below the mean, where a small mass is not a difference of numbers near 1.
    outermost, half = x.abs() > 0.999, 1 / 255
    centre = torch.where(outermost, -x.sign() * (x - mean), -(x - mean).abs())
    scale = torch.exp(-log_variance / 2) / math.sqrt(2)
    beyond = torch.erfc((half - centre) * scale).masked_fill(outermost, 0.0)
    return ((torch.erfc((-half - centre) * scale) - beyond) / 2).clamp(min=1e-30).log()


class DiffusionProcess:
    """A noise schedule, what the network predicts, and everything that follows from the two.

    It has no learned state: its constructor arguments rebuild it exactly. A network with 2C output channels for images
    of C also says how uncertain a step back is: the first half is its prediction, the second v of `log_variance`.

    num_timesteps        T, from 1 up
    schedule             "linear" (with beta_start, beta_end) or "cosine"
    prediction           a row of PREDICTIONS
    data_std             standard deviation of the data, which "edm" uses to scale what the network sees and predicts
    timestep_sampling    which t training draws: "uniform", "stratified" (uniform, one in each of B equal parts) or
                         "lognormal" (stratified, log(sigma / alpha / data_std) normal: Karras et al. 2022, section 5)
    noise_mean, noise_std  of that normal distribution
    loss_weight          "target": the error of the target counts the same at all t; "min_snr": that of x_0 counts
                         min(SNR, snr_gamma) (Hang et al. 2023)
    zero_terminal_snr    stretch the schedule until nothing of the image is left at T - 1; not with "eps", which says
                         nothing about the image there

    betas, alphas, alphas_cumprod: (T,) float64 on the CPU. ValueError for names and numbers outside these.
    """

    def __init__(self, num_timesteps: int = 1000, schedule: str = "linear", beta_start: float = 1e-4,
                 beta_end: float = 0.02, prediction: str = "eps", data_std: float = 1.0,
                 timestep_sampling: str = "uniform", noise_mean: float = -0.5, noise_std: float = 1.2,
                 loss_weight: str = "target", snr_gamma: float = 5.0, zero_terminal_snr: bool = False):
        _choice("schedule", schedule, SCHEDULES)
        _choice("prediction", prediction, tuple(PREDICTIONS))
        _choice("timestep_sampling", timestep_sampling, TIMESTEP_SAMPLING)
        _choice("loss_weight", loss_weight, LOSS_WEIGHTS)
        if zero_terminal_snr and prediction == "eps":
            raise ValueError("zero_terminal_snr goes with the predictions x0, v and edm: at the last time eps says "
                             "nothing about the image")
        if not 0 < snr_gamma < math.inf:
            raise ValueError(f"snr_gamma must be a positive number, not {snr_gamma}")
        if not isinstance(num_timesteps, int) or isinstance(num_timesteps, bool) or num_timesteps < 1:
            raise ValueError(f"num_timesteps must be a whole number from 1 up, not {num_timesteps}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, not {beta_start} and {beta_end}")
        if not (data_std > 0 and noise_std > 0 and math.isfinite(data_std + noise_mean + noise_std)):
            raise ValueError(f"data_std and noise_std must be positive and noise_mean finite, not {data_std}, "
                             f"{noise_std} and {noise_mean}")
        self.config = dict(num_timesteps=num_timesteps, schedule=schedule, beta_start=beta_start,
                           beta_end=beta_end, prediction=prediction, data_std=data_std,
                           timestep_sampling=timestep_sampling, noise_mean=noise_mean, noise_std=noise_std,
                           loss_weight=loss_weight, snr_gamma=snr_gamma, zero_terminal_snr=bool(zero_terminal_snr))
        self.snr_gamma = snr_gamma if loss_weight == "min_snr" else None
        self.num_timesteps, self.prediction, self.data_std = num_timesteps, prediction, data_std
        curve = (cosine_schedule(self.num_timesteps) if schedule == "cosine"
                 else linear_schedule(self.num_timesteps, beta_start, beta_end))
        if curve[0] >= 1:
            raise ValueError(f"a first beta of {beta_start} adds no noise, not even in float64: choose a larger "
                             f"beta_start")
        if curve[-1] < 1e-300:
            raise ValueError(f"betas up to {beta_end} leave nothing of the image after {num_timesteps} steps, not even "
                             f"in float64: choose a smaller beta_end")
        self.alphas_cumprod = torch.from_numpy(zero_terminal(curve) if zero_terminal_snr else curve)
        self.alphas = self.alphas_cumprod / torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas
        second = min(1, num_timesteps - 1)
        self._least_log_variance = torch.log(
            (1 - self.alphas_cumprod[0]) / (1 - self.alphas_cumprod[second]) * self.betas[second]).item()
        # lambda at t = -1, 0, ..., T-1: entry t + 1 is time t, and the clean image has infinite signal-to-noise.
        clean = torch.full((1,), math.inf, dtype=torch.float64)
        self._log_snr_table = torch.cat([clean, torch.logit(self.alphas_cumprod)])
        self._timestep_cdf = self._lognormal_cdf(noise_mean, noise_std) if timestep_sampling == "lognormal" else None
        self._stratified = timestep_sampling != "uniform"
        self.to("cpu")

    def to(self, device) -> "DiffusionProcess":
        """Copy the tables that tensors on `device` read to it; returns self."""
        self.device = torch.device(device)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self._device_table = self._log_snr_table.to(self.device, dtype)
        if self._timestep_cdf is not None:
            self._timestep_cdf = self._timestep_cdf.to(self.device, dtype)
        return self

    # ------------------------------------------------------------------------------------------- the noise schedule

    def _lookup(self, t) -> Tensor:
        """lambda_t in the table's precision: 0-dim on the CPU for a number, (B, 1, 1, 1) for a tensor (B,)."""
        if not isinstance(t, Tensor) or t.ndim == 0:
            t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        elif t.ndim != 1:
            raise ValueError(f"t must be a number or a tensor of shape (B,), not of shape {tuple(t.shape)}")
        if t.device.type == "cpu" and not bool(((t == -1) | ((t >= 0) & (t <= self.num_timesteps - 1))).all()):
            raise ValueError(f"t must lie in 0..{self.num_timesteps - 1}, or be -1 for the clean image; got "
                             f"{t.min().item():g}..{t.max().item():g}")
        table = self._log_snr_table if t.device.type == "cpu" else self._device_table
        if not t.is_floating_point():
            value = table[t + 1]
        else:  # between two entries lambda is interpolated
            below = t.floor().long()
            weight = (t - below).to(table.dtype)
            value = torch.where(weight == 0, table[below + 1],
                                torch.lerp(table[below + 1], table[(below + 2).clamp(max=self.num_timesteps)], weight))
        return value.reshape(-1, 1, 1, 1) if t.ndim else value

    def log_snr(self, t) -> Tensor:
        """lambda_t = log(alpha_t² / sigma_t²), the log signal-to-noise ratio; +inf at t = -1.

        For a number a 0-dim float64 tensor on the CPU, which combines with images of any dtype on any device; for a
        tensor (B,) a tensor (B, 1, 1, 1), float32 or of t's own floating dtype. Real t: interpolated.
        """
        value = self._lookup(t)
        return value if value.ndim == 0 else value.to(t.dtype if t.is_floating_point() else torch.float32)

    def time_of(self, log_snr: float) -> float:
        """The real time t in 0..T-1 at which lambda_t has this value, the inverse of log_snr; the nearest end outside.

        t is interpolated between the table's entries as lambda is.
        """
        curve = self._log_snr_table[1:].numpy()
        return float(np.interp(-log_snr, -curve, np.arange(self.num_timesteps)))

    def alpha(self, t) -> Tensor:
        """The signal rate sqrt(alphas_cumprod_t) = sqrt(sigmoid(lambda_t)); 1 at t = -1. Shapes: as log_snr."""
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t) -> Tensor:
        """The noise rate sqrt(1 - alphas_cumprod_t) = sqrt(sigmoid(-lambda_t)); 0 at t = -1. Shapes: as log_snr."""
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def _lognormal_cdf(self, mean: float, std: float) -> Tensor:
        """P(T <= t) (T,): t has the probability that a normal density of log(sigma / alpha / data_std) gives it."""
        noise_level = -self._log_snr_table[1:] / 2 - math.log(self.data_std)
        edges = torch.cat([noise_level[:1], (noise_level[1:] + noise_level[:-1]) / 2, noise_level[-1:]])
        weight = torch.special.ndtr((edges - mean) / std).diff()
        weight = weight + 1e-12  # T = 1 and levels far from the mean keep a chance
        return (weight / weight.sum()).cumsum(0)

    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the training times of a batch, int64 (B,) in 0..T-1, by the process's timestep_sampling."""
        u = torch.rand(batch_size, generator=generator, device=self.device)
        if self._stratified:
            u = (torch.arange(batch_size, device=self.device) + u) / batch_size
        if self._timestep_cdf is not None:
            t = torch.searchsorted(self._timestep_cdf, u.to(self._timestep_cdf.dtype))
        else:
            t = (u * self.num_timesteps).long()
        return t.clamp(max=self.num_timesteps - 1)

    # ------------------------------------------------------------------------------------------ the forward process

    def forward_diffusion(self, x_0: Tensor, t, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x_t, noise) with x_t = alpha_t · x_0 + sigma_t · noise (Ho et al. 2020, eq. 4).

        x_0 (B, C, H, W) in [-1, 1]; t a number or (B,); noise like x_0, drawn from N(0, 1) where it is not given.
        """
        self._check(x_0, t, noise=noise)
        noise = torch.randn_like(x_0) if noise is None else noise
        return (self.alpha(t) * x_0 + self.sigma(t) * noise).to(x_0.dtype), noise

    def q_sample(self, x_0: Tensor, t, noise: Tensor | None = None) -> Tensor:
        """x_t ~ q(x_t | x_0): the images after t noising steps, in one jump. Arguments: as forward_diffusion."""
        return self.forward_diffusion(x_0, t, noise)[0]

    # --------------------------------------------------------------------------------------------- parametrisations

    def _rates(self, t) -> tuple[Tensor, ...]:
        """alpha, sigma, a, b: x_t = alpha · x_0 + sigma · noise, and the target is a · x_0 + b · noise."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        a, b = PREDICTIONS[self.prediction](alpha, sigma, self.data_std)
        return alpha, sigma, a, b

    def target(self, x_0: Tensor, noise: Tensor, t) -> Tensor:
        """What the network should predict, a · x_0 + b · noise with (a, b) the row of PREDICTIONS in use."""
        _, _, a, b = self._rates(t)
        return (a * x_0 + b * noise).to(x_0.dtype)

    def to_x_0(self, output: Tensor, x_t: Tensor, t, clip: bool = False) -> Tensor:
        """x_0_hat from the network's output: the inverse of (x_0, noise) -> (x_t, target).

        x_0 = (b · x_t - sigma · output) / (alpha · b - sigma · a); clip keeps it in [-1, 1], as images are.
        """
        alpha, sigma, a, b = self._rates(t)
        x_0_hat = ((b * x_t - sigma * output) / (alpha * b - sigma * a)).to(x_t.dtype)
        return x_0_hat.clamp(-1, 1) if clip else x_0_hat

    def to_noise(self, output: Tensor, x_t: Tensor, t) -> Tensor:
        """The noise in x_t from the network's output: (alpha · output - a · x_t) / (alpha · b - sigma · a)."""
        alpha, sigma, a, b = self._rates(t)
        return ((alpha * output - a * x_t) / (alpha * b - sigma * a)).to(x_t.dtype)

    def predict(self, model, x_t: Tensor, t, labels: Tensor | None = None) -> Tensor:
        """The network's output (B, C, H, W) for x_t at t, in x_t's dtype; "edm" scales x_t to variance 1 before.

        Of a network that learned variances it is the first half.
        """
        return self.predict_both(model, x_t, t, labels)[0]

    def predict_both(self, model, x_t: Tensor, t, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(output, v) (B, C, H, W) each, from one evaluation; v is None where the network did not learn variances."""
        self._check(x_t, t)
        times = t if isinstance(t, Tensor) and t.ndim else torch.full((len(x_t),), float(t), device=x_t.device)
        if self.prediction == "edm":
            x_t = x_t * ((self.alpha(t) * self.data_std) ** 2 + self.sigma(t) ** 2).rsqrt().to(x_t.dtype)
        output = (model(x_t, times) if labels is None else model(x_t, times, labels)).to(x_t.dtype)
        return output.chunk(2, dim=1) if output.shape[1] == 2 * x_t.shape[1] else (output, None)

    def denoiser(self, model, labels: Tensor | None = None, clip: bool = True) -> Denoise:
        """denoise(x_t, t) -> x_0_hat, the one function that samplers see.

        `model(x, t)` or, with labels, `model(x, t, labels)`; clip keeps x_0_hat in [-1, 1], as images are.
        """
        return lambda x_t, t: self.to_x_0(self.predict(model, x_t, t, labels), x_t, t, clip)

    # ------------------------------------------------------------------------------------------------------ training

    def loss(self, model, x_0: Tensor, t: Tensor | None = None, noise: Tensor | None = None,
             labels: Tensor | None = None, reduction: str = "mean", hybrid: bool = True) -> Tensor:
        """|network(x_t, t) - target|², the mean over the batch or, with reduction="none", of each image (B,).

        The simple loss of Ho et al. 2020, eq. 14, for any parametrisation; t and noise are drawn where not given. With
        a network that learns variances and hybrid=True it is the hybrid loss of Nichol and Dhariwal 2021, eq. 16:
        VLB_WEIGHT · T · `vlb` is added, at the same times, from which v learns and the prediction does not.
        """
        _choice("reduction", reduction, ("mean", "none"))
        t = self.sample_timesteps(len(x_0)) if t is None else t
        x_t, noise = self.forward_diffusion(x_0, t, noise)
        target = self.target(x_0, noise, t)
        output, v = self.predict_both(model, x_t, t, labels)
        error = F.mse_loss(output, target, reduction="none").flatten(1).mean(1) * self._loss_weight(t)
        if v is not None and hybrid:
            x_0_hat = self.to_x_0(output.detach(), x_t, t, clip=True)
            error = error + VLB_WEIGHT * self.num_timesteps * self.vlb(x_0, x_0_hat, v, t)
        return error.mean() if reduction == "mean" else error

    def _loss_weight(self, t: Tensor) -> Tensor | float:
        """What the target's squared error counts at t (B,): 1, or min(SNR, gamma) for the x_0 that follows from it.

        An error of the target is one of x_0 times (alpha · b - sigma · a) / sigma (`to_x_0`).
        """
        if self.snr_gamma is None:
            return 1.0
        alpha, sigma, a, b = self._rates(t)
        weight = torch.exp(self.log_snr(t)).clamp(max=self.snr_gamma) * (sigma / (alpha * b - sigma * a)) ** 2
        return weight.flatten()

    def vlb(self, x_0: Tensor, x_0_hat: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The term of time t (B,), whole, of the variational bound of each image (B,), in bits per dimension.

        t > 0: KL(q(x_s | x_t, x_0) || p(x_s | x_t)) for s = t - 1, between normal distributions whose means differ by
        alpha_s (1 - r) (x_0 - x_0_hat), as in `posterior`; t = 0: -log p(x_0 | x_t) of 8-bit images. The variance of p
        is exp(`log_variance`(v)). Nichol and Dhariwal 2021, eqs. 5 and 6.
        """
        shift, _ = self.posterior(torch.zeros_like(x_0), x_0 - x_0_hat, t, t - 1)
        log_q = self.log_variance_bounds(t, t - 1)[0].to(x_0.dtype)
        log_p = self.log_variance(v, t, t - 1)
        divergence = (log_p - log_q + torch.exp(log_q - log_p) + shift**2 * torch.exp(-log_p) - 1) / 2
        nats = torch.where((t == 0).view(-1, 1, 1, 1), -discretised_log_likelihood(x_0, x_0_hat, log_p), divergence)
        return nats.flatten(1).mean(1) / math.log(2)

    @torch.no_grad()
    def bits_per_dim(self, model, x_0: Tensor, noise: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """An upper bound of -log2 p(x_0) of 8-bit images x_0 (B, C, H, W), per dimension: (B,), from T evaluations.

        KL(q(x_{T-1} | x_0) || N(0, 1)) and the `vlb` of every time (Nichol and Dhariwal 2021, eq. 4), an estimate of it
        from one noise, which is drawn for each time where it is not given. For networks that did not learn variances
        too: p has the posterior's then.
        """
        last = self.num_timesteps - 1
        prior = (self.alpha(last) ** 2 * (x_0**2 - 1) - 2 * self.sigma(last).log()) / 2
        bits = prior.flatten(1).mean(1) / math.log(2)
        for time in range(self.num_timesteps):
            t = torch.full((len(x_0),), time, device=x_0.device)
            x_t = self.q_sample(x_0, t, noise)
            output, v = self.predict_both(model, x_t, t, labels)
            v = torch.full_like(output, -1) if v is None else v
            bits = bits + self.vlb(x_0, self.to_x_0(output, x_t, t, clip=True), v, t)
        return bits

    # ------------------------------------------------------------------------------------------- the reverse process

    def posterior(self, x_t: Tensor, x_0_hat: Tensor, t, s) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_s | x_t, x_0 = x_0_hat) for any s < t.

        With r = SNR(t) / SNR(s) = exp(lambda_t - lambda_s):
            mean = (alpha_t sigma_s²) / (alpha_s sigma_t²) · x_t + alpha_s (1 - r) · x_0_hat
            variance = sigma_s² (1 - r)
        Ho et al. 2020, eqs. 6-7, for s = t - 1; Kingma et al. 2021, appendix A, for all. At s = -1: x_0_hat and 0.
        The variance is 0-dim for numbers t and s, (B, 1, 1, 1) for tensors. ValueError unless s < t.
        """
        self._check(x_t, t, x_0_hat=x_0_hat)
        lambda_t, lambda_s, one_minus_r = self._step(t, s)
        alpha_s, sigma_s2 = torch.sigmoid(lambda_s).sqrt(), torch.sigmoid(-lambda_s)
        keep = torch.sigmoid(lambda_t).sqrt() * sigma_s2 / (alpha_s * torch.sigmoid(-lambda_t))
        keep, move, variance = (c if c.ndim == 0 else c.to(x_t.dtype)
                                for c in (keep, alpha_s * one_minus_r, sigma_s2 * one_minus_r))
        return keep * x_t + move * x_0_hat, variance

    def _step(self, t, s) -> tuple[Tensor, Tensor, Tensor]:
        """lambda_t, lambda_s and 1 - SNR(t) / SNR(s). ValueError unless s < t."""
        lambda_t, lambda_s = self._lookup(t), self._lookup(s)
        if lambda_t.device.type == "cpu" and not bool((torch.as_tensor(s) < torch.as_tensor(t)).all()):
            raise ValueError(f"the posterior goes back in time: s must be less than t, got s = {s} and t = {t}")
        return lambda_t, lambda_s, -torch.expm1(lambda_t - lambda_s)

    def log_variance_bounds(self, t, s) -> tuple[Tensor, Tensor]:
        """Logs of the variances of q(x_s | x_t, x_0), the posterior, and of q(x_t | x_s), for any s < t.

        sigma_s² (1 - r) and sigma_t² (1 - r) = 1 - alpha_t² / alpha_s²: for s = t - 1 the beta-tilde and beta of Ho et
        al. 2020, section 3.2, between which the best variance of p(x_s | x_t) lies: it is the first for data that are
        one point and the second for data that are N(0, 1). At s = -1 the first would be log 0; that of (1, 0) stands in
        for it, as in the code of Nichol and Dhariwal 2021. Shapes: as the variance of `posterior`.
        """
        lambda_t, lambda_s, one_minus_r = self._step(t, s)
        lower, upper = (F.logsigmoid(-each) + one_minus_r.log() for each in (lambda_s, lambda_t))
        return lower.masked_fill(lambda_s == math.inf, self._least_log_variance), upper

    def log_variance(self, v: Tensor, t, s) -> Tensor:
        """The learned log variance of p(x_s | x_t) (B, C, H, W): v' · upper + (1 - v') · lower with v' = (v + 1) / 2.

        v (B, C, H, W) is the second half of the network's output, lower and upper are the `log_variance_bounds`: v = -1
        and 1 give them. Nichol and Dhariwal 2021, eq. 15, for any s < t.
        """
        lower, upper = (bound if bound.ndim == 0 else bound.to(v.dtype) for bound in self.log_variance_bounds(t, s))
        share = (v + 1) / 2
        return share * upper + (1 - share) * lower

    def p_sample(self, model, x_t: Tensor, t, noise: Tensor | None = None, labels: Tensor | None = None,
                 clip: bool = True) -> Tensor:
        """One DDPM reverse step x_t -> x_{t-1} (Ho et al. 2020, algorithm 2).

        t: whole times, a number or (B,). The variance is the posterior's or, where the network learned it, its own; at
        t = 0 it is 0: the result is x_0_hat, without noise.
        """
        self._check(x_t, t, noise=noise)
        output, v = self.predict_both(model, x_t, t, labels)
        mean, variance = self.posterior(x_t, self.to_x_0(output, x_t, t, clip), t, t - 1)
        if v is not None:
            variance = (variance > 0) * self.log_variance(v, t, t - 1).exp()
        return mean + variance.sqrt() * (torch.randn_like(x_t) if noise is None else noise)

    @torch.no_grad()
    def sample(self, model, image_size: int, batch_size: int = 16, channels: int = 1,
               labels: Tensor | None = None) -> Tensor:
        """Images x_0 (B, C, H, W) in [-1, 1] from pure noise by all T steps of p_sample: Ho et al. 2020, algorithm 2.

        `samplers.py` has faster ways, `samplers.generate` a reproducible one.
        """
        x = torch.randn(batch_size, channels, image_size, image_size, device=self.device)
        for t in reversed(range(self.num_timesteps)):
            x = self.p_sample(model, x, t, labels=labels)
        return x

    def _check(self, x: Tensor, t, **same_shape: Tensor | None) -> None:
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"images must be a floating-point tensor (B, C, H, W), not {x.dtype} {tuple(x.shape)}")
        if isinstance(t, Tensor) and t.ndim and t.shape != (len(x),):
            raise ValueError(f"t must be a number or have one entry for each of the {len(x)} images, "
                             f"not shape {tuple(t.shape)}")
        for name, other in same_shape.items():
            if other is not None and other.shape != x.shape:
                raise ValueError(f"{name} must have the shape of the images {tuple(x.shape)}, not {tuple(other.shape)}")
