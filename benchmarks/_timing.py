"""Timing that survives a noisy machine: all contenders in one process, in turn, medians."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
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
) -> dict[str, dict[str, float]]:
    """Median and quartiles (ms) of each, run in turn until the time is up (at least 5 rounds).

    With ``in_a_row`` > 1 each has that many calls at its turn, of which the first is not counted:
    its weights are then in the caches, as in a loop that calls nothing else.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warmup):
        for run in contenders.values():
            run()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name, run in contenders.items():
            for call in range(in_a_row):
                start = time.perf_counter()
                run()
                if call > 0 or in_a_row == 1:
                    times[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    out = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        out[name] = {"ms": median, "ms_q1": low, "ms_q3": high, "rounds": rounds}
    return out


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of one large torch matrix product: what this machine's library reaches."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    ms = interleaved({"gemm": lambda: a @ b}, seconds=1.0)["gemm"]["ms"]
    return 2 * size**3 / ms / 1e6


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parent
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


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
        "commit": _commit(),
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def report(name: str, rows: list[dict[str, Any]], json_path: str | None, **facts: Any) -> None:
    """Prints the rows as a table and writes them, with the machine and other facts, where asked."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column == "workload" else "right")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    Console(width=max(100, 14 * len(columns))).print(table)
    if json_path:
        save(rows, json_path, **facts)


def save(rows: list[dict[str, Any]], json_path: str, **facts: Any) -> None:
    """Writes the rows, with the machine and other facts."""
    path = Path(json_path)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"machine": {**machine(), **facts}, "rows": rows}, indent=2) + "\n"
    )
    temporary.replace(path)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
