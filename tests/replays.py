"""A stand-in for the capture of CUDA graphs, so that what is built on it is tested on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fasthyp import _graphs


class Replay:
    """The "graph" of a function: replaying runs it again and overwrites what it returned."""

    def __init__(self, run: Callable[[], tuple[Tensor, ...]]) -> None:
        self.run, self.outputs, self.replays = run, run(), 0

    def replay(self) -> None:
        self.replays += 1
        for old, new in zip(self.outputs, self.run(), strict=True):
            old.copy_(new)


class Replays:
    """Takes the place of ``CudaCapture``; keeps the graphs, ``made``, in order."""

    device_type = "cpu"
    made: list[Replay]
    occupied = False

    def __init__(self, device: torch.device) -> None:
        self.device, self.turns = device, 0

    @classmethod
    def busy(cls, device: torch.device) -> bool:
        return cls.occupied

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def record(
        self, run: Callable[[], tuple[Tensor, ...]], beside: Replay | None
    ) -> tuple[Replay, tuple[Tensor, ...]]:
        graph = Replay(run)
        self.made.append(graph)
        return graph, graph.outputs

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        assert self.turns == 1
        yield
        self.turns -= 1


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> type[Replays]:
    """CPU calls are "captured" while a test uses this."""
    fresh = type("Replays", (Replays,), {"made": []})
    monkeypatch.setattr(_graphs, "CudaCapture", fresh)
    return fresh
