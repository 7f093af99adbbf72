"""The mathematics of diffusion models: noise schedules, the forward process, parametrisations, the reverse process.

A diffusion model learns to remove noise. The forward process mixes a clean image x_0 with Gaussian noise:

    x_t = alpha_t · x_0 + sigma_t · noise,      alpha_t² + sigma_t² = 1                     (Ho et al. 2020, eq. 4)

At t = 0 there is little noise, at t = T - 1 almost nothing else. A network gets x_t and t and predicts a mixture of x_0
and noise, from which x_0_hat, the expected clean image, follows: the mean of all clean images that x_t may come from,
weighted by their probability, and so blurred where there is much noise. A sampler starts at pure noise and goes back to
t = -1, the clean image; at each step it asks for x_0_hat. The process uses one curve of the schedule, the log
signal-to-noise ratio lambda_t = log(alpha_t² / sigma_t²), which falls with t (Kingma et al. 2021).

Notation: x_0 (B, C, H, W) in [-1, 1]; t is a number, or a tensor (B,) with one time for each image; alpha and sigma are
sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) of Ho et al. 2020; s is a time before t. Times count from 0: time t
here is t + 1 in the papers, and -1 is their time 0, the clean image.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Denoise = Callable[[Tensor, Tensor], Tensor]  # denoise(x_t (B, C, H, W), t (B,)) -> x_0_hat (B, C, H, W)


def linear_schedule(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """alphas_cumprod (T,) of betas that rise linearly over 1,000 steps (Ho et al. 2020, section 4).

    For another T, log alphas_cumprod of that curve is resampled at T points, so the last value is the same for every T.
    """
    log_curve = np.concatenate([[0.0], np.cumsum(np.log1p(-np.linspace(beta_start, beta_end, 1000)))])
    return np.exp(np.interp(np.arange(1, num_timesteps + 1) / num_timesteps, np.linspace(0, 1, 1001), log_curve))


def cosine_schedule(num_timesteps: int, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """alphas_cumprod (T,) = f(t+1) / f(0) with f(t) = cos²((t/T + offset) / (1 + offset) · π/2), betas at most 0.999.

    Nichol and Dhariwal 2021, eq. 17.
    """
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + offset) / (1 + offset) * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], max_beta))


SCHEDULES = {  # name -> alphas_cumprod (T,), from the number of timesteps T and the first and the last beta
    "linear": linear_schedule,
    "cosine": lambda num_timesteps, beta_start, beta_end: cosine_schedule(num_timesteps),
}


def zero_terminal(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The schedule, shifted and scaled so that sqrt(alphas_cumprod) keeps its first value and ends at 0; T = 1: 0.

    Lin et al. 2024, algorithm 1: the last x_t is then pure noise, as at the start of sampling.
    """
    alpha = np.sqrt(alphas_cumprod)
    if len(alpha) == 1:
        return np.zeros(1)
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2


# The network predicts target = a · x_0 + b · noise. A parametrisation is a row: (alpha, sigma, std) -> (a, b), where
# alpha and sigma belong to the time and std is the standard deviation of the data.
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
LOW_NOISE = (-2.0, 0.7)  # mean and standard deviation of log(sigma / alpha / data_std) in a share low_share of training
LOSS_WEIGHTS = ("target", "min_snr")


class DiffusionProcess:
    """A noise schedule, the quantity that the network predicts, and everything that follows from the two.

    It has no learned state: its constructor arguments rebuild it exactly.

    num_timesteps        T, at least 1
    schedule             a row of SCHEDULES; beta_start and beta_end belong to "linear"
    prediction           a row of PREDICTIONS
    data_std             standard deviation of the data; "edm" scales the network's input and target by it, "lognormal"
                         and the samplers' noise levels are multiples of it
    timestep_sampling    distribution of t in training: "uniform"; "stratified" (uniform, one t in each of B equal
                         parts); "lognormal" (stratified, and log(sigma / alpha / data_std) is normally distributed with
                         mean noise_mean and standard deviation noise_std: Karras et al. 2022, section 5). Two parts of
                         the times are drawn otherwise, because the normal distribution hardly ever reaches them: a
                         share last_share is T - 1, where samplers start, and a share low_share has the mean and
                         standard deviation LOW_NOISE, nearly clean images, where the levels of pixels are decided.
                         With zero_terminal_snr only last_share ever draws T - 1
    loss_weight          "target": the squared error of the target has weight 1 at all t; "min_snr": the squared error
                         of x_0_hat has weight min(SNR, snr_gamma) (Hang et al. 2023)
    zero_terminal_snr    no signal is left at T - 1 (`zero_terminal`); not possible with "eps". With "min_snr" nothing
                         is learned at T - 1, where its weight is 0
    lowest_noise, highest_noise
                         the ends of the samplers' noise levels sigma / alpha / data_std (`samplers.noise_range`);
                         None: `samplers.noise_range` chooses

    betas, alphas, alphas_cumprod: (T,) float64 on the CPU. ValueError for names and numbers outside these.
    """

    def __init__(self, num_timesteps: int = 1000, schedule: str = "linear", beta_start: float = 1e-4,
                 beta_end: float = 0.02, prediction: str = "eps", data_std: float = 1.0,
                 timestep_sampling: str = "uniform", noise_mean: float = -0.5, noise_std: float = 1.2,
                 loss_weight: str = "target", snr_gamma: float = 5.0, zero_terminal_snr: bool = False,
                 last_share: float = 0.0, low_share: float = 0.0, lowest_noise: float | None = None,
                 highest_noise: float | None = None):
        self.config = dict(num_timesteps=num_timesteps, schedule=schedule, beta_start=beta_start,
                           beta_end=beta_end, prediction=prediction, data_std=data_std,
                           timestep_sampling=timestep_sampling, noise_mean=noise_mean, noise_std=noise_std,
                           loss_weight=loss_weight, snr_gamma=snr_gamma, zero_terminal_snr=bool(zero_terminal_snr),
                           last_share=last_share, low_share=low_share, lowest_noise=lowest_noise,
                           highest_noise=highest_noise)
        _check_config(**self.config)
        self.num_timesteps, self.prediction, self.data_std = num_timesteps, prediction, data_std
        self.snr_gamma = snr_gamma if loss_weight == "min_snr" else None
        curve = SCHEDULES[schedule](num_timesteps, beta_start, beta_end)
        _check_curve(curve, beta_start, beta_end)
        self.alphas_cumprod = torch.from_numpy(zero_terminal(curve) if zero_terminal_snr else curve)
        self.alphas = self.alphas_cumprod / torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas
        # lambda at t = -1, 0, ..., T-1: time t is entry t + 1. The clean image has infinite signal-to-noise.
        clean = torch.full((1,), math.inf, dtype=torch.float64)
        self._log_snr_table = torch.cat([clean, torch.logit(self.alphas_cumprod)])
        self._timestep_cdf = (_lognormal_cdf(self._log_snr_table[1:], data_std, noise_mean, noise_std, last_share,
                                             low_share)
                              if timestep_sampling == "lognormal" else None)
        self.to("cpu")

    def to(self, device) -> "DiffusionProcess":
        """Copy the tables that tensors on `device` need to it; returns self."""
        self.device = torch.device(device)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        self._device_table = self._log_snr_table.to(self.device, dtype)
        if self._timestep_cdf is not None:
            self._timestep_cdf = self._timestep_cdf.to(self.device, dtype)
        return self

    # ------------------------------------------------------------------------------------------- the noise schedule

    def log_snr(self, t) -> Tensor:
        """lambda_t = log(alpha_t² / sigma_t²), the log signal-to-noise ratio; +inf at t = -1.

        For a number: a 0-dim float64 tensor on the CPU, which combines with images of any dtype on any device. For a
        tensor (B,): a tensor (B, 1, 1, 1), float64 if t is, else float32. For real t lambda is interpolated.
        ValueError for a t outside -1, 0..T-1; but a tensor on a GPU is not checked, because the check would wait for
        the GPU, and gets wrong numbers.
        """
        value = self._lookup(t)
        return value if value.ndim == 0 else value.to(torch.promote_types(t.dtype, torch.float32))

    def _lookup(self, t) -> Tensor:
        """lambda_t in the table's precision. Shapes: as log_snr."""
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
        else:  # interpolate between two entries
            below = t.floor().long()
            weight = (t - below).to(table.dtype)
            low, high = table[below + 1], table[(below + 2).clamp(max=self.num_timesteps)]
            between = torch.where(high == -math.inf, high, torch.lerp(low, high, weight))  # lerp: inf - inf is NaN
            value = torch.where(weight == 0, low, between)
        return value.reshape(-1, 1, 1, 1) if t.ndim else value

    def alpha(self, t) -> Tensor:
        """The signal rate sqrt(alphas_cumprod_t) = sqrt(sigmoid(lambda_t)); 1 at t = -1. Shapes: as log_snr."""
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t) -> Tensor:
        """The noise rate sqrt(1 - alphas_cumprod_t) = sqrt(sigmoid(-lambda_t)); 0 at t = -1. Shapes: as log_snr."""
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def time_of(self, log_snr: float) -> float:
        """The real time t in 0..T-1 at which lambda_t has this value: the inverse of log_snr, clamped to 0..T-1."""
        return float(np.interp(-log_snr, -self._log_snr_table[1:].numpy(), np.arange(self.num_timesteps)))

    # ------------------------------------------------------------------------------------------ the forward process

    def forward_diffusion(self, x_0: Tensor, t, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x_t, noise) with x_t = alpha_t · x_0 + sigma_t · noise (Ho et al. 2020, eq. 4).

        x_0 (B, C, H, W) in [-1, 1]; t a number or (B,); noise like x_0, by default drawn from N(0, 1).
        """
        _check_images(x_0, t, noise=noise)
        noise = torch.randn_like(x_0) if noise is None else noise
        return (self.alpha(t) * x_0 + self.sigma(t) * noise).to(x_0.dtype), noise

    def q_sample(self, x_0: Tensor, t, noise: Tensor | None = None) -> Tensor:
        """x_t ~ q(x_t | x_0): the images after t + 1 noising steps, in one jump. Arguments: as forward_diffusion."""
        return self.forward_diffusion(x_0, t, noise)[0]

    # --------------------------------------------------------------------------------------------- parametrisations

    def _rates(self, t) -> tuple[Tensor, ...]:
        """alpha, sigma, a, b of x_t = alpha · x_0 + sigma · noise and target = a · x_0 + b · noise."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        a, b = PREDICTIONS[self.prediction](alpha, sigma, self.data_std)
        return alpha, sigma, a, b

    def target(self, x_0: Tensor, noise: Tensor, t) -> Tensor:
        """What the network should predict: a · x_0 + b · noise."""
        _, _, a, b = self._rates(t)
        return (a * x_0 + b * noise).to(x_0.dtype)

    def to_x_0(self, output: Tensor, x_t: Tensor, t, clip: bool = False) -> Tensor:
        """x_0_hat from the network's output: the inverse of (x_0, noise) -> (x_t, target).

        x_0 = (b · x_t - sigma · output) / (alpha · b - sigma · a); clip clamps it to [-1, 1].
        """
        alpha, sigma, a, b = self._rates(t)
        x_0_hat = ((b * x_t - sigma * output) / (alpha * b - sigma * a)).to(x_t.dtype)
        return x_0_hat.clamp(-1, 1) if clip else x_0_hat

    def to_noise(self, output: Tensor, x_t: Tensor, t) -> Tensor:
        """The noise in x_t from the network's output: (alpha · output - a · x_t) / (alpha · b - sigma · a)."""
        alpha, sigma, a, b = self._rates(t)
        return ((alpha * output - a * x_t) / (alpha * b - sigma * a)).to(x_t.dtype)

    def predict(self, model, x_t: Tensor, t, labels: Tensor | None = None) -> Tensor:
        """The network's prediction of the target (B, C, H, W), in x_t's dtype; "edm" first scales x_t to variance 1.

        Of a network with learned variances, (B, 2C, H, W), it is the first half.
        """
        return self._network_output(model, x_t, t, labels)[:, :x_t.shape[1]]

    def _network_output(self, model, x_t: Tensor, t, labels: Tensor | None) -> Tensor:
        """The network's output with all its channels: (B, C or 2C, H, W)."""
        _check_images(x_t, t)
        times = t if isinstance(t, Tensor) and t.ndim else torch.full((len(x_t),), float(t), device=x_t.device)
        if self.prediction == "edm":
            x_t = x_t * ((self.alpha(t) * self.data_std) ** 2 + self.sigma(t) ** 2).rsqrt().to(x_t.dtype)
        return (model(x_t, times) if labels is None else model(x_t, times, labels)).to(x_t.dtype)

    def denoiser(self, model, labels: Tensor | None = None, clip: bool = True) -> Denoise:
        """denoise(x_t, t) -> x_0_hat, the only function that samplers call.

        The network is `model(x, t)` or, with labels, `model(x, t, labels)`; clip clamps x_0_hat to [-1, 1].
        """
        return lambda x_t, t: self.to_x_0(self.predict(model, x_t, t, labels), x_t, t, clip)

    # ------------------------------------------------------------------------------------------------------ training

    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the times of a training batch by timestep_sampling: int64 (B,) in 0..T-1."""
        u = torch.rand(batch_size, generator=generator, device=self.device)
        if self.config["timestep_sampling"] != "uniform":
            u = (torch.arange(batch_size, device=self.device) + u) / batch_size
        cdf = self._timestep_cdf
        t = (u * self.num_timesteps).long() if cdf is None else torch.searchsorted(cdf, u.to(cdf.dtype))
        return t.clamp(max=self.num_timesteps - 1)

    def loss(self, model, x_0: Tensor, t: Tensor | None = None, noise: Tensor | None = None,
             labels: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The mean over the pixels of (network(x_t, t) - target)², times the weight of t by loss_weight.

        Of the whole batch or, with reduction="none", of each image (B,). With weight 1 the simple loss of Ho et al.
        2020, eq. 14, for any parametrisation. t and noise are drawn by default.
        """
        t = self.sample_timesteps(len(x_0)) if t is None else t
        x_t, noise = self.forward_diffusion(x_0, t, noise)
        squares = F.mse_loss(self.predict(model, x_t, t, labels), self.target(x_0, noise, t), reduction="none")
        return reduce_loss(squares.flatten(1).mean(1) * self._loss_weight(t), reduction)

    def simple_loss(self, *args, **options) -> Tensor:
        """`loss` without the terms that `LearnedVariance` adds to it; validation compares networks by it."""
        return self.loss(*args, **options)

    def _loss_weight(self, t: Tensor) -> Tensor | float:
        """Weight (B,) of the target's squared error: 1, or what gives the squared error of x_0_hat min(SNR, gamma).

        The error of x_0_hat is -sigma / (alpha · b - sigma · a) times that of the target, by `to_x_0`.
        """
        if self.snr_gamma is None:
            return 1.0
        alpha, sigma, a, b = self._rates(t)
        weight = torch.exp(self.log_snr(t)).clamp(max=self.snr_gamma) * (sigma / (alpha * b - sigma * a)) ** 2
        return weight.flatten()

    # ------------------------------------------------------------------------------------------- the reverse process

    def posterior(self, x_t: Tensor, x_0_hat: Tensor, t, s) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_s | x_t, x_0 = x_0_hat) for any s < t.

        With r = SNR(t) / SNR(s) = exp(lambda_t - lambda_s):
            mean = (alpha_t sigma_s²) / (alpha_s sigma_t²) · x_t + alpha_s (1 - r) · x_0_hat
            variance = sigma_s² (1 - r)
        Ho et al. 2020, eqs. 6-7, for s = t - 1; Kingma et al. 2021, appendix A, for all. At s = -1: x_0_hat and 0.
        The variance is 0-dim for numbers t and s, (B, 1, 1, 1) for tensors. ValueError unless s < t; on a GPU as in
        log_snr.
        """
        _check_images(x_t, t, x_0_hat=x_0_hat)
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

    def p_mean_variance(self, model, x_t: Tensor, t, labels: Tensor | None = None,
                        clip: bool = True) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(x_{t-1} | x_t): those of the posterior with the network's x_0_hat. Whole times t."""
        return self.posterior(x_t, self.denoiser(model, labels, clip)(x_t, t), t, t - 1)

    def p_sample(self, model, x_t: Tensor, t, noise: Tensor | None = None, labels: Tensor | None = None,
                 clip: bool = True) -> Tensor:
        """One DDPM reverse step x_t -> x_{t-1} (Ho et al. 2020, algorithm 2).

        t: whole times, a number or (B,). At t = 0 the variance is 0: the result is x_0_hat, without noise.
        """
        _check_images(x_t, t, noise=noise)
        mean, variance = self.p_mean_variance(model, x_t, t, labels, clip)
        return mean + variance.sqrt() * (torch.randn_like(x_t) if noise is None else noise)

    @torch.no_grad()
    def sample(self, model, image_size: int, batch_size: int = 16, channels: int = 1,
               labels: Tensor | None = None) -> Tensor:
        """Images x_0 (B, C, H, W) in [-1, 1] from pure noise by T steps of p_sample: Ho et al. 2020, algorithm 2.

        `samplers.py` has faster samplers, and `samplers.generate` is reproducible.
        """
        x = torch.randn(batch_size, channels, image_size, image_size, device=self.device)
        for t in reversed(range(self.num_timesteps)):
            x = self.p_sample(model, x, t, labels=labels)
        return x


def _lognormal_cdf(log_snr: Tensor, data_std: float, mean: float, std: float, last_share: float,
                   low_share: float) -> Tensor:
    """P(t <= k) for each time k (T,), of the distribution "lognormal" of `DiffusionProcess`.

    t is T - 1 with probability last_share. Otherwise log(sigma / alpha / data_std) is normally distributed: with the
    parameters LOW_NOISE with probability low_share, else with (mean, std). log_snr (T,).
    """
    noise_level = -log_snr / 2 - math.log(data_std)
    edges = torch.cat([noise_level[:1], (noise_level[1:] + noise_level[:-1]) / 2, noise_level[-1:]])

    def shares(mean: float, std: float) -> Tensor:
        weight = torch.special.ndtr((edges - mean) / std).diff() + 1e-12  # not all 0 where all levels are far from it
        return weight / weight.sum()
    share = (1 - last_share - low_share) * shares(mean, std) + low_share * shares(*LOW_NOISE)
    share[-1] += last_share
    return share.cumsum(0)


def reduce_loss(error: Tensor, reduction: str) -> Tensor:
    """The mean of the losses of the images (B,) for "mean", or these themselves for "none"."""
    _check_choice("reduction", reduction, ("mean", "none"))
    return error.mean() if reduction == "mean" else error


def _check_images(x: Tensor, t, **same_shape: Tensor | None) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"images must be a floating-point tensor (B, C, H, W), not {x.dtype} {tuple(x.shape)}")
    if isinstance(t, Tensor) and t.ndim and t.shape != (len(x),):
        raise ValueError(f"t must be a number or have one entry for each of the {len(x)} images, "
                         f"not shape {tuple(t.shape)}")
    for name, other in same_shape.items():
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} must have the shape of the images {tuple(x.shape)}, not {tuple(other.shape)}")


def _check_choice(what: str, value, allowed) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")


def _check_config(num_timesteps, schedule, beta_start, beta_end, prediction, data_std, timestep_sampling, noise_mean,
                  noise_std, loss_weight, snr_gamma, zero_terminal_snr, last_share, low_share, lowest_noise,
                  highest_noise) -> None:
    _check_choice("schedule", schedule, SCHEDULES)
    _check_choice("prediction", prediction, PREDICTIONS)
    _check_choice("timestep_sampling", timestep_sampling, TIMESTEP_SAMPLING)
    _check_choice("loss_weight", loss_weight, LOSS_WEIGHTS)
    if zero_terminal_snr and prediction == "eps":
        raise ValueError("zero_terminal_snr goes with the predictions x0, v and edm: at the last time eps says "
                         "nothing about the image")
    if not (last_share >= 0 and low_share >= 0 and last_share + low_share <= 1):
        raise ValueError(f"last_share and low_share must be at least 0 and together at most 1, not {last_share} and "
                         f"{low_share}")
    for name, value in dict(lowest_noise=lowest_noise, highest_noise=highest_noise).items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number or None, not {value}")
    if not 0 < snr_gamma < math.inf:
        raise ValueError(f"snr_gamma must be a positive number, not {snr_gamma}")
    if not isinstance(num_timesteps, int) or isinstance(num_timesteps, bool) or num_timesteps < 1:
        raise ValueError(f"num_timesteps must be a whole number from 1 up, not {num_timesteps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, not {beta_start} and {beta_end}")
    if not (data_std > 0 and noise_std > 0 and math.isfinite(data_std + noise_mean + noise_std)):
        raise ValueError(f"data_std and noise_std must be positive and noise_mean finite, not {data_std}, "
                         f"{noise_std} and {noise_mean}")


def _check_curve(alphas_cumprod: np.ndarray, beta_start: float, beta_end: float) -> None:
    """ValueError where float64 is too coarse for the schedule."""
    if alphas_cumprod[0] >= 1:
        raise ValueError(f"a first beta of {beta_start} adds no noise, not even in float64: choose a larger beta_start")
    if alphas_cumprod[-1] < 1e-300:
        raise ValueError(f"betas up to {beta_end} leave nothing of the image after {len(alphas_cumprod)} steps, not "
                         f"even in float64: choose a smaller beta_end")
