"""The CUDA side of :mod:`fasthyp.ops.coupling_training`."""

from __future__ import annotations

from typing import Any

from fasthyp.ops._coupling_cuda import UnsupportedOnCuda


def coupling_saved_width(plan: list[int], keep_every: int, store: bool) -> int:
    """Numbers per row that a pass keeps for its gradient."""
    raise UnsupportedOnCuda("no CUDA kernels for gradients yet")


def run(*args: Any) -> Any:
    raise UnsupportedOnCuda("no CUDA kernels for gradients yet")


backward = run
