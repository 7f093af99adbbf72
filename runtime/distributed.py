"""Several processes, started by `torchrun --nproc_per_node=N train.py ...`: torch.distributed for the scripts.

With one process these functions do nothing. Each process draws the random numbers of the whole batch and keeps its
slice, so the number of processes changes results only by rounding. Only rank 0 writes files.
"""

import contextlib
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import UserError


def init_process_group(device: torch.device) -> None:
    """Join the other processes if torchrun started this one (NCCL on GPUs, gloo on CPUs). Only rank 0 prints."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, number, count = next(dist.rendezvous("env://"))
        attempt = dist.PrefixStore(f"attempt {restart_count()}", store)  # the store keeps old addresses
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=attempt, rank=number,
                                world_size=count)
        warnings.filterwarnings("ignore", "Grad strides do not match")  # 1×1 convolutions; costs little time
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def restart_count() -> int:
    """How often torchrun --max_restarts has restarted this process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def process_lost(error: BaseException) -> bool:
    """Whether this error was raised because another process has ended."""
    words = ("Connection", "gloo", "NCCL", "socket", "timeout", "Timeout", "Broken pipe")
    return world_size() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(name: str) -> str:
    """The device of this process: for auto and cuda the GPU cuda:(local rank), for auto without a GPU the CPU.

    Without torchrun the name is returned as it is. UserError for mps, which torch.distributed does not support.
    """
    if "LOCAL_RANK" not in os.environ:
        return name
    if name == "mps":
        raise UserError("several processes cannot use mps: give --device cpu, or start the script without torchrun")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return "cpu" if name == "auto" else name


def rank_slice(count: int) -> slice:
    """The slice of `count` items that this rank works on; the slices of all ranks differ in length by at most 1."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; overwrites `value`."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    return all_reduce_sum(value.clone()) / world_size() if world_size() > 1 else value


def all_gather(part: Tensor) -> Tensor:
    """The tensors of all processes, concatenated along the first axis in the order of the ranks, on the CPU."""
    if world_size() == 1:
        return part.cpu()
    parts = [None] * world_size()
    dist.all_gather_object(parts, part.cpu())
    return torch.cat(parts)


def broadcast(value):
    """The value of rank 0, on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_reduce_min(value: int) -> int:
    """The smallest of the numbers of all processes."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return min(values)


def all_reduce_max(values: Tensor) -> Tensor:
    """The elementwise maximum of a tensor over all processes; overwrites `values`."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


@contextlib.contextmanager
def local_rank_0_first():
    """Run the block on local rank 0 first, then on the other processes of the machine, so that a download happens once.

    If the block fails on local rank 0, the others run it too and fail in the same way.
    """
    waits = world_size() > 1 and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits:
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and not waits:
            dist.barrier()
