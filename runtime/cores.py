"""The processor: its name, and its cores."""

import functools
import os
import platform
import re
from pathlib import Path

import torch


def available_cores() -> int:
    """How many cores this process may use: a container or `taskset` may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def processor() -> str:
    """The processor's model, and the vector instructions of torch's own kernels: "AMD EPYC (AVX512)".

    Whether it has bf16 is not in it: see `utils.has_bf16_instructions`.
    """
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # only Linux has this file
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
