"""What the scripts of this folder share: the package's timing, and reports of what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fasthyp import _timing
from fasthyp._timing import interleaved

__all__ = ["gemm_rate", "interleaved", "machine", "report", "save"]


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of one large torch matrix product: what this machine's library reaches."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    ms = interleaved({"gemm": lambda: a @ b}, seconds=1.0)["gemm"]["ms"]
    return 2 * size**3 / ms / 1e6


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
        **_timing.machine(),
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
