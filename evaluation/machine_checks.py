"""The machine part of doctor.py: versions, device, precision, memory and disks."""

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch.nn import functional as F

from evaluation.health_checks import Finding, check_versions, judge
from runtime.cores import processor
from utils import get_device, pick_precision

GB = 1e9


def examine_machine(device_flag: str, folders: dict[str, Path]) -> Iterator[Finding]:
    """Versions, device, precision and memory, and the disks of `folders`, named by their flags."""
    yield check_installation()
    device = get_device(device_flag)
    yield check_device(device, idle_gpu=device_flag == "auto" and shutil.which("nvidia-smi") is not None)
    yield check_precision(device)
    yield check_memory(device)
    for flag, folder in folders.items():
        yield check_disk(flag, folder)


def check_device(device: torch.device, idle_gpu: bool) -> Finding:
    """The device that is used; idle_gpu: there is an NVIDIA driver, so that a CPU would be the wrong one."""
    idle = device.type == "cpu" and idle_gpu
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, " + (
        f"{torch.get_num_threads()} of {os.cpu_count()} processors")
    return judge("device", idle, 0, 1, f"{device.type} ({name})" + ", although there is an NVIDIA driver" * idle,
                 "this torch does not use the GPU: install the CUDA build from pytorch.org, or update the driver")


def check_installation() -> Finding:
    """Whether torch and torchvision load and belong together."""
    try:
        import torchvision
    except Exception as error:  # different kinds, when its binaries were built for another torch
        return Finding("versions", "FAIL", f"torchvision does not load: {str(error)[:120]}",
                       "pip install --upgrade torch torchvision (both in one command)")
    try:
        requirements = [text.partition(";")[0] for text in metadata.requires("torchvision") or []]
    except metadata.PackageNotFoundError:
        requirements = []
    return check_versions(sys.version_info[:2], str(torch.__version__), str(torchvision.__version__), requirements)


def convolution_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The shortest of five runs of a 3×3 convolution; infinite if the device does not support this dtype."""
    count, best = 32 if device.type == "cpu" else 1024, math.inf
    x, weight = torch.randn(count, 64, 14, 14, device=device), torch.randn(64, 64, 3, 3, device=device)
    try:
        for _ in range(6):  # the first is a warm-up
            start = time.perf_counter()
            F.conv2d(x.to(dtype), weight.to(dtype), padding=1).sum().item()
            best = min(best, time.perf_counter() - start)
    except RuntimeError:
        return math.inf
    return best


def check_precision(device: torch.device) -> Finding:
    """Whether --precision auto is the faster one."""
    seconds = dict(fp32=convolution_seconds(device, torch.float32), bf16=convolution_seconds(device, torch.bfloat16))
    chosen, fast = pick_precision("auto", device), min(seconds, key=seconds.get)
    return judge("precision", seconds[chosen] / seconds[fast], 1.5, math.inf, f"a convolution takes "
                 f"{seconds['fp32'] * 1e3:.2f} ms in fp32, {seconds['bf16'] * 1e3:.2f} in bf16; --precision auto is "
                 f"{chosen}",
                 f"python train.py --precision {fast}")


def check_memory(device: torch.device) -> Finding:
    """Free memory of the device."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else main_memory()
    said = (f"{free / GB:.1f} of {total / GB:.1f} GB are free" if math.isfinite(free)
            else f"{total / GB:.1f} GB, of which the system does not tell what is free")
    return judge("memory", -free / GB, -2, -0.5, said,
                 "close other programs, or python train.py --batch_size 32")


def main_memory() -> tuple[float, float]:
    """(free, total) bytes of main memory; infinite where the system does not tell."""
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":") for line in table.read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        total = math.inf
    return math.inf, total


def check_disk(flag: str, folder: Path) -> Finding:
    """Free space where `folder` is or will be, and whether it can be written to; flag: the flag that names it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Finding(f"disk of {flag}", "FAIL", f"{existing} is not a folder, or cannot be written to",
                       f"choose another --{flag}")
    return judge(f"disk of {flag}", -free / GB, -2, -0.2, f"{free / GB:.1f} GB are free at {existing}",
                 f"delete old runs, choose another --{flag}, or python train.py --keep_checkpoints 1")
