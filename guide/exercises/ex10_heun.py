"""Exercise 10: write a sampler and measure its order."""

from collections.abc import Callable, Sequence

from torch import Tensor

from diffusion import Denoise, DiffusionProcess
from samplers import Trajectory, batch_time, ddim_step, step_pairs


def heun(denoise: Denoise, x_T: Tensor, timesteps: Sequence[float], diffusion: DiffusionProcess) -> Trajectory:
    """Heun's method (Karras et al. 2022, algorithm 1): two evaluations a step, one in the last.

    With y = x / alpha and u = sigma / alpha, the equation to be solved is dy/du = noise_hat, where
    noise_hat = (x - alpha · x_0_hat) / sigma. A step from t to s:
      1. go to s with the noise_hat at t: this is a step of ddim;
      2. evaluate noise_hat there;
      3. go from t to s once more, with the mean of both: y_s = y_t + (u_s - u_t) · mean.
    The last step, to s = -1, is a step of ddim alone. The body below does 1 only: it is ddim.
    Yields (s, x_s, x_0_hat) after each step, as all samplers do; x_0_hat is that of the beginning of the step.
    """
    x = x_T
    for t, s in step_pairs(timesteps):
        x_0_hat = denoise(x, batch_time(t, x))
        x = ddim_step(x, x_0_hat, t, s, diffusion)
        yield s, x, x_0_hat


def order(error: Callable[[int], float], steps: int) -> float:
    """The order p of a method whose error(steps) falls as steps^(-p): compare `steps` with twice as many."""
    raise NotImplementedError
