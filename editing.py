"""Editing with a model that only knows how to denoise: inpainting, inversion, interpolation."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffusion import Denoise, DiffusionProcess
from samplers import Trajectory, batch_time, ddim_step, forward_step, step_pairs


def keep_known(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """A denoise whose result is x_0_hat where mask is 1, and the known picture where it is 0.

    A sampler then adds noise to the known pixels as RePaint does, and its last step returns them exactly.
    """
    return lambda x_t, t: torch.where(mask.bool(), denoise(x_t, t), known)


def inpaint(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess, *, known: Tensor,
            mask: Tensor, resample: int = 5, randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Trajectory:
    """Fill in `known` (1 or B, C, H, W) where mask (the same, or broadcast to it) is 1, by ddpm steps.

    Each step is repeated `resample` times; in between, fresh noise leads from s back to t. So the new part comes to fit
    the known one (Lugmayr et al. 2022, algorithm 1). `resample` evaluations for each yielded step, one for the last.
    """
    if resample < 1:
        raise ValueError(f"resample must be 1 or more, not {resample}")
    denoise, x = keep_known(denoise, known, mask), x_T
    for t, s in step_pairs(timesteps):
        for again in reversed(range(resample if s >= 0 else 1)):
            x_0_hat = denoise(x, batch_time(t, x))
            mean, variance = diffusion.posterior(x, x_0_hat, t, s)
            x_s = mean + variance.sqrt() * randn(x) if s >= 0 else mean
            x = forward_step(x_s, s, t, diffusion, randn) if again else x_s
        yield s, x, x_0_hat


def ddim_inversion(denoise: Denoise, x_0: Tensor, timesteps: Sequence[float],
                   diffusion: DiffusionProcess) -> Trajectory:
    """Reverse ddim: from an image up the same times to about the noise x_T that ddim turns into it (Song et al. 2021).

    Two approximations limit how exactly ddim comes back; both get better with smaller steps. The start, alpha · x_0 at
    the lowest of the times, holds no noise. A step from s up to t uses the x_0_hat of x_s, where ddim used that of x_t.
    ValueError for a single time, at which there is only the start.
    """
    times = [t for t, _ in reversed(step_pairs(timesteps))]
    if len(times) < 2:
        raise ValueError("an inversion needs two times or more")
    x = diffusion.alpha(times[0]) * x_0
    yield times[0], x, x_0
    for s, t in pairwise(times):
        x_0_hat = denoise(x, batch_time(s, x))
        x = ddim_step(x, x_0_hat, s, t, diffusion)
        yield t, x, x_0_hat


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation from noise a (share 0) to noise b (share 1): what lies between is as likely as they are.

    sin((1 - share) θ) / sin θ · a + sin(share θ) / sin θ · b, with θ the angle between a and b (Shoemake 1985), each
    the noise of one image.
    """
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
