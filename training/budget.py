"""The steps and the time that a run may use."""

import math
import time


class Budget:
    """The limits of a run, what it has used, and what is left.

    steps         steps of the whole run; math.inf if only the time limits it
    seconds       wall-clock time of the whole run; None if only the steps limit it
    start         time.perf_counter() when this sitting began; a run that is resumed has several sittings
    used_before   seconds of the sittings before this one
    reserve       seconds kept for what follows the last step: validation, samples, saving
    """

    def __init__(self, steps: float, seconds: float | None, start: float, used_before: float = 0.0,
                 reserve: float = 3.0):
        self.steps, self.seconds, self.start = steps, seconds, start
        self.used_before, self.reserve = used_before, reserve

    @property
    def seconds_used(self) -> float:
        """Seconds of the whole run, earlier sittings included."""
        return self.used_before + time.perf_counter() - self.start

    @property
    def time_share(self) -> float:
        """The share of the time for training that is used, from 0; 0 without a limit."""
        return self.seconds_used / max(1e-9, self.seconds - self.reserve) if self.seconds else 0.0

    def progress(self, step: int, time_share: float) -> float:
        """How much of the run is done (0..1) after `step` steps: of its steps or of its time, the larger share."""
        return min(1.0, max(step / self.steps, time_share))

    def seconds_left(self, step: int, seconds_per_step: float) -> float:
        """Seconds until the end of the run at this speed."""
        left = (self.steps - step) * seconds_per_step + self.reserve
        return max(0.0, min(left, self.seconds - self.seconds_used if self.seconds else math.inf))
