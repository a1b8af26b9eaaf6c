"""CUDA graphs of calls that repeat: hundreds of launches become one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthyp._environment import backend
from fasthyp.ops._library import signed

KEEP = 8
"""Kinds of calls that a cache remembers; the least recently used goes first."""


class Noise(NamedTuple):
    """What decides the noise: seed, number of the first image and of the first hypothesis.
    ``counter``, int64 (3,) on the device, is added to them: a graph reads it anew each time."""

    seed: int = 0
    image_offset: int = 0
    first_sample: int = 0
    counter: Tensor | None = None


Function = Callable[..., tuple[Tensor, ...]]
"""Takes tensors (or None) and, last, :class:`Noise`; launches work and never waits for it."""


class GraphCache:
    """Runs functions of tensors; on CUDA, calls that repeat are captured and replayed.

    A captured call copies its tensors into buffers of its own, replays and hands out copies of the
    results. Replays wait for nothing; a capture (once per kind of call) waits for the device.
    Calls from several threads and streams take turns. A copied or unpickled cache is empty.

    Args:
        graph: ``"auto"`` captures at the second call of a kind, ``True`` at the first, ``False``
            never.

    Raises:
        ValueError: ``graph`` is none of these.
    """

    def __init__(self, graph: bool | str = "auto") -> None:
        if not isinstance(graph, bool) and graph != "auto":
            raise ValueError(f'graph: expected "auto", True or False, got {graph!r}')
        self.graph = graph
        self._lock = threading.Lock()
        self._kinds: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._version: Any = None
        self._capture: CudaCapture | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphCache, (self.graph,)

    def __call__(
        self,
        function: Function,
        inputs: Sequence[Tensor | None],
        noise: Noise,
        device: torch.device,
        key: Hashable,
        version: Callable[[], Any],
    ) -> tuple[Tensor, ...]:
        """``function(*inputs, noise)``.

        Runs plainly where the caller captures the current stream, and under
        ``FASTHYP_BACKEND=reference``.

        Args:
            device: where it runs, and where the inputs are.
            key: what decides the work that it launches, besides the inputs' shapes and dtypes.
            version: gives what else the function reads, such as weights. Where it is no longer
                equal, what was captured is forgotten. A ``str`` is the reason why the function
                cannot be captured.

        Raises:
            ValueError: ``graph`` is True and the function cannot be captured.
        """
        if not self._wanted(device):
            return function(*inputs, noise)
        now = version()
        if isinstance(now, str):
            if self.graph is True:
                raise ValueError(f"graph: True, but the call cannot be captured: {now}")
            return function(*inputs, noise)
        shapes = tuple(None if t is None else (t.shape, t.dtype) for t in inputs)
        with self._lock:
            captured = self._captured(function, inputs, device, (key, shapes), now)
            if captured is not None:
                assert self._capture is not None
                with self._capture.turn():
                    return captured(inputs, noise)
        return function(*inputs, noise)

    def _wanted(self, device: torch.device) -> bool:
        if self.graph is False or backend() == "reference":
            return False
        if device.type != CudaCapture.device_type:
            if self.graph is True:
                raise ValueError(f"graph: True needs a CUDA device, got {device}")
            return False
        return not CudaCapture.busy(device)

    def _captured(
        self,
        function: Function,
        inputs: Sequence[Tensor | None],
        device: torch.device,
        kind: Hashable,
        version: Any,
    ) -> _Captured | None:
        """The captured call of this kind; None where this call is to run plainly."""
        if self._capture is None or self._capture.device != device or self._version != version:
            self._kinds.clear()
            self._version = version
            if self._capture is None or self._capture.device != device:
                self._capture = CudaCapture(device)
        captured = self._kinds.get(kind)
        if captured is None and (kind in self._kinds or self.graph is True):
            others = (other.graph for other in self._kinds.values() if other is not None)
            captured = _Captured(function, inputs, self._capture, next(others, None))
        self._kinds[kind] = captured
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KEEP:
            self._kinds.popitem(last=False)
        return captured


class _Captured:
    """A captured function and the buffers that its graph reads and writes."""

    def __init__(
        self,
        function: Function,
        inputs: Sequence[Tensor | None],
        capture: CudaCapture,
        beside: Any,
    ) -> None:
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            with capture.aside():
                self.inputs = [
                    None if t is None else t.clone(memory_format=torch.contiguous_format)
                    for t in inputs
                ]
                self.counter = torch.zeros(3, dtype=torch.int64, device=capture.device)
                run = partial(function, *self.inputs, Noise(counter=self.counter))
                run()  # the first run sets up what a capture may not: kernels, libraries
            self.graph, self.outputs = capture.record(run, beside)
        self.slots = self.counter.unbind()

    def __call__(self, inputs: Sequence[Tensor | None], noise: Noise) -> tuple[Tensor, ...]:
        for buffer, given in zip(self.inputs, inputs, strict=True):
            if buffer is not None and given is not None:
                buffer.copy_(given)
        # Filled, not copied: numbers travel with the launch, from no memory that must stay.
        self.slots[0].fill_(signed(noise.seed))
        self.slots[1].fill_(noise.image_offset)
        self.slots[2].fill_(noise.first_sample)
        self.graph.replay()
        return _copies(self.outputs)


class CudaCapture:
    """Captures on a stream of its own, and the order of replays.

    Replays share buffers, so on the device, too, they come one after the other, on whatever streams
    they are. The stream of the captures follows them: memory that is freed there is in use no more.
    """

    device_type = "cuda"
    _one_at_a_time = threading.Lock()  # of all captures in this process, as PyTorch demands

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()

    @staticmethod
    def busy(device: torch.device) -> bool:
        """Whether the caller is capturing the current stream."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work on the captures' stream, between what is before and after on the current one."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
            current.wait_stream(self._stream)

    def record(
        self, run: Callable[[], tuple[Tensor, ...]], beside: torch.cuda.CUDAGraph | None
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        """The graph of what ``run`` launches and what it returns; memory is shared with the graph
        ``beside``."""
        graph = torch.cuda.CUDAGraph()
        with (
            self._one_at_a_time,
            torch.cuda.device(self.device),
            torch.cuda.graph(
                graph,
                pool=None if beside is None else beside.pool(),
                stream=self._stream,
                capture_error_mode="thread_local",  # other threads may allocate meanwhile
            ),
        ):
            outputs = run()
        return graph, outputs

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One replay, with the copies before and after it, on the current stream."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            current.wait_event(self._done)
            yield
            self._done.record(current)
            self._stream.wait_event(self._done)


def _copies(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies that are the caller's, those of one dtype in one launch."""
    copies = tuple(torch.empty_like(tensor) for tensor in tensors)
    for dtype in {tensor.dtype for tensor in tensors}:
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        torch._foreach_copy_([copies[i] for i in chosen], [tensors[i] for i in chosen])
    return copies
