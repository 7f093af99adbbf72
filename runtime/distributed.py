"""More than one process: `torchrun --nproc_per_node=N train.py ...` starts them, and these functions let them agree.

With one process everything here does nothing. Every process draws the randomness of the whole batch and keeps its
share, so the number of processes changes no result beyond rounding; only rank 0 writes files.
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
    """Join the other processes, if torchrun started this one; NCCL between GPUs, gloo between CPUs. Rank 0 speaks."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, number, count = next(dist.rendezvous("env://"))
        attempt = dist.PrefixStore(f"attempt {restart_count()}", store)  # torchrun keeps old addresses
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=attempt, rank=number,
                                world_size=count)
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1×1 convolutions: only a little slower
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def restart_count() -> int:
    """How often torchrun --max_restarts has started this process in the place of one that ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def process_lost(error: BaseException) -> bool:
    """Whether this is what is raised where another process has ended."""
    words = ("Connection", "gloo", "NCCL", "socket", "timeout", "Timeout", "Broken pipe")
    return world_size() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def destroy_process_group() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(name: str) -> str:
    """The device of this process: with --device auto, cuda:i for process i of its machine, or else the CPU.

    UserError for mps, through which processes cannot talk.
    """
    if "LOCAL_RANK" not in os.environ:
        return name
    if name == "mps":
        raise UserError("several processes cannot use mps: give --device cpu, or start the script without torchrun")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return "cpu" if name == "auto" else name


def rank_slice(count: int) -> slice:
    """This process's part of `count` things: contiguous, and all parts of the same size where that divides."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    return all_reduce_sum(value.clone()) / world_size() if world_size() > 1 else value


def all_gather(part: Tensor) -> Tensor:
    """The parts of all processes, in the order of their ranks, joined along the first axis, on the CPU."""
    if world_size() == 1:
        return part.cpu()
    parts = [None] * world_size()
    dist.all_gather_object(parts, part.cpu())
    return torch.cat(parts)


def broadcast(value):
    """What rank 0 holds, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_reduce_min(value: int) -> int:
    """The least of the numbers that the processes hold, on every process."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return min(values)


def all_reduce_max(values: Tensor) -> Tensor:
    """The greatest of the values that the processes hold at each place of a tensor, on every process."""
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


@contextlib.contextmanager
def local_rank_0_first():
    """Let one process of each machine through before its others, so that a download or a drawing happens once.

    What the first cannot do the others try too: all end alike.
    """
    waits = world_size() > 1 and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits:
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and not waits:
            dist.barrier()
