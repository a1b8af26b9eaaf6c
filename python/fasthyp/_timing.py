"""Timing that survives a noisy machine: all contenders in one process, in turn, medians."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fasthyp
from fasthyp import _C


def interleaved(
    contenders: dict[str, Callable[[], Any]],
    seconds: float = 4.0,
    warmup: int = 3,
    in_a_row: int = 1,
    rounds: int = 5,
) -> dict[str, dict[str, float]]:
    """Median and quartiles (ms) of each, run in turn until the time is up.

    With ``in_a_row`` > 1 each has that many calls at its turn, of which the first is not counted:
    its weights are then in the caches, as in a loop that calls nothing else. There are at least
    ``rounds`` (2 or more) turns.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warmup):
        for run in contenders.values():
            run()
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or time.perf_counter() < end:
        for name, run in contenders.items():
            for call in range(in_a_row):
                start = time.perf_counter()
                run()
                if call > 0 or in_a_row == 1:
                    times[name].append((time.perf_counter() - start) * 1e3)
        done += 1
    out = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        out[name] = {"ms": median, "ms_q1": low, "ms_q3": high, "rounds": done}
    return out


def waiting(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call, and on CUDA the wait for what it started."""
    if device == "cpu":
        return run

    def finished() -> Any:
        result = run()
        torch.cuda.synchronize()
        return result

    return finished


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Where a figure comes from."""
    return {
        "processor": _processor(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": _C.simd_level(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fasthyp": fasthyp.__version__,
    }
