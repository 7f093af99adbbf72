"""How long ago the system started this process: imports, and what a busy machine made of them, are part of a budget."""

import contextlib
import os
import subprocess
import time
from pathlib import Path

LONGEST = 60.0  # a larger age is no start-up: a shell that ends in `exec python` hands its own start on


def seconds_since_start() -> float:
    """Seconds since the system started this process; where the system does not say, its processor time."""
    for measure in (_age_in_proc, _age_in_ps):
        with contextlib.suppress(OSError, ValueError, AttributeError, IndexError, subprocess.SubprocessError):
            age = measure()
            return age if 0 <= age < LONGEST else time.process_time()
    return time.process_time()


def _age_in_proc() -> float:
    """The age of this process on Linux, where its start is known in ticks since the boot of the machine."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the name before may contain spaces
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _age_in_ps() -> float:
    """The age of this process in whole seconds by ps, which macOS has too: days-hours:minutes:seconds."""
    text = subprocess.run(["ps", "-o", "etime=", "-p", str(os.getpid())], capture_output=True, text=True, timeout=5,
                          check=True).stdout
    days, _, clock = text.strip().rpartition("-")
    seconds = 86_400 * int(days or 0)
    for place, value in enumerate(reversed(clock.split(":"))):
        seconds += 60**place * int(value)
    return float(seconds)
