"""Choose what makes a training step fast on this machine, by measuring: precision, memory layout, compilation.

Nothing here changes what is learned, except for rounding and, with --dropout, which numbers become 0.
"""

import contextlib
import copy
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from data import ImageData
from diffusion import DiffusionProcess
from runtime import distributed
from runtime.errors import UserError
from runtime.files import one_line
from runtime.memory import out_of_memory
from utils import autocast, pick_precision

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Where a network has so many positions at its first resolution, a step on a CPU takes so many images at a time.
LARGE, PART = 32 * 32, 32
# One row for each round of the race: the share of the batch that is measured (the whole batch in fp32 could take more
# memory than the training), and the share of the best speed that an option needs to stay in the race.
ROUNDS = ((1 / 8, 0.02), (1 / 8, 0.25), (1 / 2, 0.5), (1 / 2, 0.8), (1 / 2, 0.8))
MAX_SECONDS, MAX_SHARE = 2.0, 1 / 20  # no further round after so many seconds, or this share of a run's budget
MAX_REHEARSAL = 4.0  # nor after so many times as many seconds of rehearsals, which are not timed
MIN_STEPS = 100  # in a run of fewer steps the race would take longer than it saves
GAIN, CLEAR_GAIN = 1.2, 10.0  # how many times faster than the first option a winner is: after all rounds, after fewer
COMPILE_BUDGET = 600.0  # on a GPU, runs of at least so many seconds are compiled


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def loss_and_gradient(network: nn.Module, diffusion: DiffusionProcess, x_0: Tensor, t: Tensor, noise: Tensor,
                      labels: Tensor | None, precision: str, part: int | None = None) -> Tensor:
    """The loss () of a batch (B, C, H, W); its gradient is added to those of the weights.

    On a CPU, networks of LARGE positions or more take `part` images at a time, by default PART: the gradient is the
    same, in less memory and not slower (measured: benchmarks/RECORDS.md, "Large images in parts"). Several processes
    exchange their gradients after the last part only.
    """
    patch_size = getattr(network, "module", network).config.get("patch_size", 1)  # module: of several processes
    in_parts = x_0.device.type == "cpu" and x_0[0, 0].numel() >= LARGE * patch_size**2
    parts = -(-len(x_0) // (part or PART))
    rows = torch.arange(len(x_0), device=x_0.device).chunk(parts) if in_parts else [slice(None)]
    total = torch.zeros((), device=x_0.device)
    for chosen in rows:
        more_follow = hasattr(network, "no_sync") and chosen is not rows[-1]
        with network.no_sync() if more_follow else contextlib.nullcontext():
            with autocast(x_0.device, precision):
                loss = diffusion.loss(network, x_0[chosen], t[chosen], noise[chosen],
                                      None if labels is None else labels[chosen])
            if in_parts:
                loss = loss * (len(chosen) / len(x_0))
            loss.backward()
        total += loss.detach()
    return total


def forward_backward(network: nn.Module, diffusion: DiffusionProcess, data: ImageData, conditional: bool,
                     precision: str, count: int) -> None:
    """The forward and the backward pass of a step with `count` images; it changes no weight."""
    try:
        loss_and_gradient(network, diffusion, *trial_batch(data, conditional, count), precision)
    finally:
        network.zero_grad()


def trial_batch(data: ImageData, conditional: bool, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(x_0, t, noise, labels) of `count` images for a trial. The noise is the images: no random number is drawn."""
    chosen = torch.arange(count, device=data.images.device) % len(data.images)
    x_0 = data.x_0(chosen)
    return x_0, torch.zeros_like(chosen), x_0, data.labels[chosen] if conditional else None


def images_per_second(network: nn.Module, diffusion: DiffusionProcess, data: ImageData, conditional: bool,
                      precision: str, count: int) -> float:
    """The speed of `forward_backward` with `count` images; 0 where this device cannot do it."""
    start = now(data.images.device)
    try:
        forward_backward(network, diffusion, data, conditional, precision, count)
    except (RuntimeError, MemoryError):
        return 0.0
    return count / (now(data.images.device) - start)


# -------------------------------------------------------------------------------------------- precision and layout


def options_left_open(precision: str, layout: str | None, device: torch.device) -> list[tuple[str, str]]:
    """The (precision, layout) pairs that the flags allow, the likeliest first. layout None is open if precision is.

    On CUDA only layouts race: there a trial spends its time in starting kernels, of which bf16 has more, and in a run
    they are started by a CUDA graph.
    """
    guess = pick_precision(precision, device)
    open_precision = precision == "auto" and device.type != "cuda"
    precisions = [guess, *({"fp32", "bf16"} - {guess})] if open_precision else [guess]
    layouts = list(LAYOUTS) if layout == "auto" or (layout is None and precision == "auto") else [layout or "nchw"]
    return [(precision, layout) for layout in layouts for precision in precisions]


def seconds_for_race(steps: float, budget: float | None) -> float:
    """How many seconds a run of `steps` steps and this budget may spend on the race: 0 for a short run."""
    return 0.0 if steps < MIN_STEPS else min(MAX_SECONDS, MAX_SHARE * budget if budget else MAX_SECONDS)


def race(options: list, trial: Callable[[tuple, int], float], count: int, seconds: float,
         rehearse: bool = False) -> tuple[tuple, dict, float]:
    """(the winner, {option: its best speed}, the gain that was asked for); trial(option, images) measures a speed.

    The options are measured in rounds, so that a busy moment slows all of them; slow ones leave. The first option wins
    unless another is GAIN times faster, or CLEAR_GAIN times where `seconds` were too few for all rounds, because the
    machine is busy then. rehearse: each option does each number of images once before it is timed.
    """
    first, rates, rehearsed, spent = options[0], {}, set(), dict(rehearsal=0.0, trial=0.0)

    def in_time() -> bool:
        return len(rates) < 2 or (spent["trial"] < seconds and spent["rehearsal"] < MAX_REHEARSAL * seconds)

    def run(purpose: str, option: tuple, images: int) -> float:
        start = time.perf_counter()
        rate = trial(option, images)
        spent[purpose] += time.perf_counter() - start
        return rate

    for share, least in ROUNDS:
        images = max(1, round(share * count))
        for option in options:
            if rehearse and in_time() and (option, images) not in rehearsed:
                rehearsed.add((option, images))
                run("rehearsal", option, images)
            if in_time():
                rates[option] = max(rates.get(option, 0.0), run("trial", option, images))
        options = [option for option in options if rates.get(option, 0.0) >= least * max(rates.values())]
    best, gain = max(rates, key=rates.get), GAIN if in_time() else CLEAR_GAIN
    return best if rates[best] > gain * rates[first] else first, rates, gain


def fastest_arithmetic(precision: str, layout: str | None, model: nn.Module, diffusion: DiffusionProcess,
                       data: ImageData, conditional: bool, count: int, seconds: float) -> tuple[str, str]:
    """The (precision, layout) with the fastest steps of `count` images among what the flags allow; prints the speeds.

    Copies of the model are measured for at most about `seconds`; on CUDA after rehearsals, because libraries are loaded
    and algorithms chosen when a shape is new. With several processes, rank 0 decides.
    """
    device = data.images.device

    def trial(option: tuple[str, str], images: int) -> float:
        network = copy.deepcopy(model).to(memory_format=LAYOUTS[option[1]])
        return images_per_second(network, diffusion, data, conditional, option[0], images)

    options = options_left_open(precision, layout, device)
    taken = options[0]
    if len(options) > 1 and seconds and distributed.rank() == 0:
        taken, rates, gain = race(options, trial, count, seconds, rehearse=device.type == "cuda")
        found = ", ".join(f"{' '.join(option)} {rate:,.0f}" for option, rate in rates.items())
        usual = "" if rates[taken] == max(rates.values()) else (
            f", the usual choice: another one must be {gain:g} times as fast, because short measurements vary")
        print(f"Measured, images a second: {found}; taking {' '.join(taken)}{usual}", flush=True)
    return distributed.broadcast(taken)


# ---------------------------------------------------------------------------------------------- settings and compiler


def set_up_cuda(device: torch.device) -> None:
    """On CUDA: TensorFloat-32 for fp32 products, and cuDNN's fastest convolution, found by trying."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def worth_compiling(budget: float | None, device: torch.device) -> bool:
    """Whether a run is long enough for a compiler that takes a minute. On a CPU compiling gains too little."""
    return device.type == "cuda" and (budget or 0) >= COMPILE_BUDGET


def compiled(network: nn.Module, attempt: Callable[[nn.Module], None], required: bool) -> nn.Module:
    """torch.compile(network), after a call attempt(network) that makes it compile.

    Where it fails: UserError if `required`, else a line that says so, and the network as it is.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of missing CUDA on a CPU
    result = torch.compile(network)
    try:
        attempt(result)
    except Exception as error:  # the errors of the compilers have no class in common
        if out_of_memory(error):
            raise
        problem = f"this machine cannot compile the network ({one_line(error)})"
        if required:
            raise UserError(f"{problem}: install a C++ compiler such as g++, or leave out --compile") from error
        print(f"Not compiled: {problem}", flush=True)
        return network
    return result
