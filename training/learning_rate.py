"""The learning rate and the decay of the weights' average as pure functions of how far a run is."""

import math

LR_SCHEDULES = ("cosine", "constant")


def learning_rate(progress: float, warmup: float, schedule: str = "cosine", step_share: float = 0.0) -> float:
    """The share of the peak learning rate (0..1) in the step that begins when `progress` (0..1) of the run is done.

    It rises linearly until progress = warmup; then "cosine" falls along half a cosine to 0, "constant" stays at 1.
    step_share: the share of the run that a step is; the n steps of the warm-up have the rates 1/n, 2/n ... 1.
    """
    if progress < warmup:
        return min(1.0, (progress + step_share) / warmup)
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * (progress - warmup) / max(1e-9, 1 - warmup))) / 2


def ema_decay_at(step: int, decay: float) -> float:
    """The decay of the moving average of the weights after `step` steps: min(decay, (1 + step) / (10 + step)).

    A young average forgets the first weights faster.
    """
    return min(decay, (1 + step) / (10 + step))
