"""Several processes, started by `torchrun --nproc_per_node=N train.py ...`: torch.distributed for the scripts.

With one process these functions do nothing. Each process draws the random numbers of the whole batch and keeps its
slice, so the number of processes changes results only by rounding, and with --dropout what becomes 0. Only rank 0
writes files.
"""

import contextlib
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import RunFailed, UserError

REQUIRED_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets
PATIENCE = timedelta(hours=6)  # of a process that waits for another, which may read pictures or measure meanwhile
_launch: str | None = None


def init_process_group(device: torch.device) -> None:
    """Join the other processes if torchrun started this one (NCCL on GPUs, gloo on CPUs). Only rank 0 prints.

    UserError if the environment speaks of several processes and does not say where they are.
    """
    global _launch
    _check_environment()
    if is_launched() and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, number, count = next(dist.rendezvous("env://"))
        attempt = _agree_on_attempt(store, number, count)
        _launch = store.compare_set("launch", "", attempt).decode()  # the first attempt names the launch
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore(attempt, store),
                                rank=number, world_size=count, timeout=PATIENCE)
        warnings.filterwarnings("ignore", "Grad strides do not match")  # 1×1 convolutions; costs little time
        if rank():
            sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115 (until the process ends)


def _agree_on_attempt(store: dist.Store, number: int, count: int) -> str:
    """A name for this start of the processes, the same on all of them.

    torchrun keeps the store when it restarts the processes, and with it the addresses of those that have ended. Its
    count of restarts cannot tell one start from another: it may differ between machines. So every process writes down a
    random name of its own, and process 0 answers with its own name until all have got it.
    """
    own = uuid.uuid4().hex
    store.set(f"process {number}", own)
    if number:
        attempt = store.get(f"attempt of {own}").decode()  # waits until process 0 has answered
        store.add(f"{attempt} has", 1)
        return attempt
    end = time.monotonic() + store.timeout.total_seconds()
    while store.add(f"{own} has", 0) < count - 1:
        if time.monotonic() > end:
            raise RunFailed(f"not all of the {count} processes have started")
        for other in range(1, count):
            if store.check([f"process {other}"]):  # it may be the name of a process that has ended: look again
                store.set(f"attempt of {store.get(f'process {other}').decode()}", own)
        time.sleep(0.02)
    return own


def launch() -> str | None:
    """The name of this launch of torchrun, which its restarts share and no other launch has; None without torchrun."""
    return _launch


def is_launched() -> bool:
    """Whether torchrun or another launcher started this process, alone or as one of several."""
    return all(os.environ.get(name) for name in REQUIRED_VARIABLES)


def _check_environment() -> None:
    """UserError if WORLD_SIZE asks for several processes and other variables are missing."""
    count = os.environ.get("WORLD_SIZE") or "1"
    if count != "1" and not is_launched():
        missing = ", ".join(name for name in REQUIRED_VARIABLES if not os.environ.get(name))
        raise UserError(f"WORLD_SIZE is {count} and {missing} not set: start several processes with torchrun, or one "
                        f"after unset WORLD_SIZE")


def local_rank() -> int:
    """The number of this process on its machine. If the launcher does not set LOCAL_RANK, its rank."""
    return int(os.environ.get("LOCAL_RANK") or os.environ["RANK"]) if is_launched() else 0


def process_lost(error: BaseException) -> bool:
    """Whether this error was raised because another process has ended."""
    text = str(error)
    words = ("Connection", "timeout", "Timeout", "Broken pipe") + (
        ("ncclRemoteError", "remote process", "failed to recv", "aborted") if "NCCL" in text else ("gloo", "socket"))
    return world_size() > 1 and isinstance(error, RuntimeError) and any(word in text for word in words)


def nccl_failure(error: BaseException) -> str | None:
    """A message for what NCCL says of its own failure; None for other errors."""
    if world_size() > 1 and isinstance(error, RuntimeError) and "NCCL" in str(error):
        said = " ".join(str(error).rpartition("Last error:")[2].split())
        return (f"the GPUs cannot exchange data ({said}): NCCL_DEBUG=INFO before the command says more; a container "
                f"may need --ipc=host or a larger --shm-size")
    return None


def shared_gpu(error: BaseException) -> str | None:
    """A message if NCCL says that two processes were given one GPU; None for other errors."""
    if world_size() > 1 and "Duplicate GPU" in str(error):
        return ("several processes were given one GPU: start no more of them on a machine than it has GPUs, with "
                "--nproc_per_node, or give --device cpu")
    return None


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

    Without torchrun the name is returned as it is. UserError for mps, which torch.distributed does not support, and
    for one GPU that is named for several processes.
    """
    if not is_launched():
        return name
    if name == "mps":
        raise UserError("several processes cannot use mps: give --device cpu, or start the script without torchrun")
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"]) > 1:
        raise UserError(f"several processes cannot share the GPU {name}: give --device cuda, and choose among the GPUs "
                        f"with CUDA_VISIBLE_DEVICES=1,2")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{local_rank() % torch.cuda.device_count()}"
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


def from_rank_0(compute: Callable):
    """What compute() returns on rank 0, where alone it is called, on every process; its UserError too."""
    value, error = None, None
    if rank() == 0:
        try:
            value = compute()
        except UserError as raised:
            error = raised
    value, error = broadcast((value, error))
    if error:
        raise error
    return value


def all_reduce_min(value: float) -> float:
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
    waits = world_size() > 1 and local_rank() > 0
    if waits:
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and not waits:
            dist.barrier()
