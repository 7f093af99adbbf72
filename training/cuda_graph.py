"""A function as one CUDA graph: its kernels are recorded once and then started together, without Python."""

import contextlib
import warnings
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from runtime.files import one_line


class CudaGraph:
    """Call function(*inputs) as a CUDA graph. The first WARM_UP calls are ordinary calls.

    The function must not wait for the device, its inputs must keep their shapes, and whatever changes between calls
    must be in tensors. If the graph cannot be captured, a line says so and every call is an ordinary one.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self._call_on_side_stream(inputs)
        if self.calls == self.WARM_UP + 1:
            self._capture(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for own, new in zip(self.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(new)
        self.graph.replay()
        return self.output.clone()

    def _call_on_side_stream(self, inputs) -> Tensor:
        """An ordinary call on another stream: a capture needs such calls before it."""
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # it will be captured
            output = self.function(*inputs)
        main.wait_stream(side)
        return output

    def _capture(self, inputs) -> None:
        """Record the kernels of a call without running them."""
        self.inputs, graph = [None if each is None else each.clone() for each in inputs], torch.cuda.CUDAGraph()
        stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.output = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            _leave_capture(stream, pool)
            print(f"Not captured as a CUDA graph, so that steps take longer (train.py --no-compile does not try): "
                  f"{one_line(error)}", flush=True)


def _leave_capture(stream, pool) -> None:
    """Go back to the stream before a failed capture, and let allocator and random generator leave the capture.

    When the end of a capture fails, torch.cuda.graph does none of this.
    """
    torch.cuda.set_stream(stream)
    with contextlib.suppress(AttributeError, RuntimeError, IndexError):  # a copy of the state is not in a capture
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(AttributeError, RuntimeError):  # private functions; an error if it has left the pool
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)


class QueuedSteps:
    """Lets at most MOST steps wait in the queue of a CUDA device, so that the clock sees them; no-op elsewhere."""

    MOST = 2

    def __init__(self, device: torch.device):
        self.device, self.events = device, deque()

    def limit(self) -> None:
        """Call it after each step: waits until at most MOST steps are not done."""
        if self.device.type == "cuda":
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > self.MOST:
                self.events.popleft().synchronize()
