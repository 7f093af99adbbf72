"""Describe the machine that the figures were measured on."""

import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.peers import PEERS
from runtime.cores import available_cores, processor


def describe_machine(device: str) -> dict:
    """Processor, cores, GPU, versions and date. "load": the load average of the last minute (None on Windows)."""
    return dict(date=datetime.now().astimezone().isoformat(timespec="seconds"), system=platform.platform(),
                cpu=processor(), cores=available_cores(), threads=torch.get_num_threads(),
                load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None, device=device,
                gpu=torch.cuda.get_device_name() if device.startswith("cuda") else None,
                python=platform.python_version(), **{name: package_version(name) for name in ("torch", *PEERS)})


def package_version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
