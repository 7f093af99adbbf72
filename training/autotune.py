"""What makes a training step fast on this machine, found out by trying: precision, layout, compilation, a CUDA graph.

Nothing here changes what is learned, but for rounding.
"""

import copy
import logging
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from data import ImageData, to_model
from diffusion import DiffusionProcess
from runtime import distributed
from runtime.errors import UserError
from runtime.files import one_line
from runtime.memory import out_of_memory
from utils import autocast, pick_precision

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# The rounds that candidates are measured in: the share of the batch (not all of it, which in fp32 would take more
# memory than the training), and that of the best speed below which one is not in the next round.
ROUNDS = ((1 / 8, 0.02), (1 / 8, 0.25), (1 / 2, 0.5), (1 / 2, 0.8), (1 / 2, 0.8))
SECONDS, SHARE = 2.0, 1 / 20  # after so long, and after this share of a run's budget, there is no further round
SHORT = 100  # steps; a run of fewer is over sooner than the rounds
GAIN, CLEAR_GAIN = 1.2, 10.0  # how much faster than the likeliest another must be, after all rounds and after fewer
COMPILE_BUDGET = 600.0  # seconds of a run from which on a GPU's is compiled


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def rehearse(network: nn.Module, diffusion: DiffusionProcess, data: ImageData, conditional: bool, precision: str,
             count: int) -> None:
    """The forward and the backward pass of a step with `count` images; changes no weight and draws nothing."""
    some = torch.arange(count, device=data.images.device) % len(data.images)
    x_0, t = to_model(data.images[some]), torch.zeros_like(some)
    try:
        with autocast(some.device, precision):
            diffusion.loss(network, x_0, t, x_0, data.labels[some] if conditional else None).backward()
    finally:
        network.zero_grad()


# -------------------------------------------------------------------------------------------- precision and layout


def candidates(precision: str, layout: str | None, device: torch.device) -> list[tuple[str, str]]:
    """What two flags leave open, the likeliest first; layout None is open where the precision is."""
    guess = pick_precision(precision, device)
    precisions = [guess, *({"fp32", "bf16"} - {guess})] if precision == "auto" else [guess]
    layouts = list(LAYOUTS) if layout == "auto" or (layout is None and precision == "auto") else [layout or "nchw"]
    return [(precision, layout) for layout in layouts for precision in precisions]


def seconds_for_trials(steps: float, budget: float | None) -> float:
    """How long a run of so many steps and with this budget may try what is fastest: not at all if it is short."""
    return 0.0 if steps < SHORT else min(SECONDS, SHARE * budget if budget else SECONDS)


def race(options: list, trial: Callable[[tuple, int], float], count: int, seconds: float) -> tuple[tuple, dict]:
    """(the winner, {option: the best of its speeds}), each of which trial(option, images) measures.

    In rounds, so that a busy moment hits all alike; one that cannot win leaves. The first option wins unless another is
    clearly faster, or overwhelmingly where `seconds` did not suffice for all rounds: the machine is busy then.
    """
    first, rates, start = options[0], {}, time.perf_counter()

    def in_time() -> bool:
        return len(rates) < 2 or time.perf_counter() - start < seconds

    for share, least in ROUNDS:
        for option in options:
            if in_time():
                rates[option] = max(rates.get(option, 0.0), trial(option, max(1, round(share * count))))
        options = [option for option in options if rates.get(option, 0.0) >= least * max(rates.values())]
    best, gain = max(rates, key=rates.get), GAIN if in_time() else CLEAR_GAIN
    return best if rates[best] > gain * rates[first] else first, rates


def choose(precision: str, layout: str | None, model: nn.Module, diffusion: DiffusionProcess, data: ImageData,
           conditional: bool, count: int, seconds: float) -> tuple[str, str]:
    """(precision, layout) of the fastest steps of `count` images among what the flags leave open; says what it found.

    Copies of the model are tried, for `seconds`. Of several processes the first decides.
    """
    device = data.images.device

    def trial(option: tuple[str, str], images: int) -> float:
        network = copy.deepcopy(model).to(memory_format=LAYOUTS[option[1]])
        start = now(device)
        try:
            rehearse(network, diffusion, data, conditional, option[0], images)
        except (RuntimeError, MemoryError):  # what this device cannot do is not fast
            return 0.0
        return images / (now(device) - start)

    options = candidates(precision, layout, device)
    taken = options[0]
    if len(options) > 1 and seconds and distributed.rank() == 0:
        taken, rates = race(options, trial, count, seconds)
        found = ", ".join(f"{' '.join(option)} {rate:,.0f}" for option, rate in rates.items())
        print(f"Measured, images a second: {found}; taking {' '.join(taken)}", flush=True)
    return distributed.from_first(taken)


# --------------------------------------------------------------------------------------------- compiled and recorded


def prepare(device: torch.device) -> None:
    """On CUDA: TensorFloat-32 where fp32 remains, and convolutions by whichever way is the fastest when tried."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def worth_compiling(budget: float | None, device: torch.device) -> bool:
    """Whether a run is long enough for a compiler that takes a minute; on a CPU it gives too little."""
    return device.type == "cuda" and (budget or 0) >= COMPILE_BUDGET


def compiled(network: nn.Module, attempt: Callable[[nn.Module], None], insist: bool) -> nn.Module:
    """torch.compile(network), compiled here and now by attempt(network).

    Where this machine cannot, UserError or, unless we insist, a line that says so and the network as it is.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of CUDA missing on a CPU
    made = torch.compile(network)
    try:
        attempt(made)
    except Exception as error:  # those of the compilers have no class in common
        if out_of_memory(error):
            raise
        problem = f"this machine cannot compile the network ({one_line(error)})"
        if insist:
            raise UserError(f"{problem}: install a C++ compiler such as g++, or leave out --compile") from error
        print(f"Not compiled: {problem}", flush=True)
        return network
    return made


class Recorded:
    """A function of tensors whose work on a GPU is recorded once and then repeated as one CUDA graph, without Python.

    The inputs keep their shapes, the function waits for nothing, and what changes between calls lies in tensors. The
    first calls are ordinary ones; where recording fails, a line says so and all are.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self._aside(inputs)
        if self.calls == self.WARM_UP + 1:
            self._record(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for own, new in zip(self.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(new)
        self.graph.replay()
        return self.output.clone()

    def _aside(self, inputs) -> Tensor:
        """An ordinary call on a stream of its own, as recording wants it before."""
        main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(main)
        with torch.cuda.stream(aside), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # it will be captured
            output = self.function(*inputs)
        main.wait_stream(aside)
        return output

    def _record(self, inputs) -> None:
        """Note what a call does, without doing it."""
        self.inputs, graph = [None if each is None else each.clone() for each in inputs], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.output = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            print(f"Not recorded as a CUDA graph: {one_line(error)}", flush=True)
