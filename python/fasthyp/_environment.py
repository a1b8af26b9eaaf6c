"""The environment variables that fasthyp reads at run time, and nothing else.

``FASTHYP_BACKEND``: ``auto`` (default), ``cpu``, ``cuda`` or ``reference`` (plain PyTorch).
``FASTHYP_NUM_THREADS``: threads of the CPU kernels; default ``torch.get_num_threads()``.
``FASTHYP_SIMD``: highest SIMD level to use (``portable``, ``avx2``, ``avx512``, ``avx512bf16``).

The build reads two more: ``FASTHYP_CUDA`` and ``FASTHYP_CUDA_ARCHS``.
"""

from __future__ import annotations

import os

import torch

BACKENDS = ("auto", "cpu", "cuda", "reference")


def backend() -> str:
    """The backend asked for; ValueError if it is none of ``BACKENDS``."""
    value = os.environ.get("FASTHYP_BACKEND", "auto").strip().lower()
    if value not in BACKENDS:
        raise ValueError(f"FASTHYP_BACKEND: expected one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def num_threads() -> int:
    """Threads that a CPU kernel may use."""
    value = os.environ.get("FASTHYP_NUM_THREADS")
    if value is None:
        return torch.get_num_threads()
    if not value.strip().isdigit() or int(value) < 1:
        raise ValueError(f"FASTHYP_NUM_THREADS: expected a positive integer, got {value!r}")
    return int(value)


def simd_level() -> str | None:
    """The SIMD level asked for, or None for the best that the processor has."""
    return os.environ.get("FASTHYP_SIMD") or None
