"""``fasthyp evaluate``: run and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fasthyp._processes import joined
from fasthyp.cli._data import open_data
from fasthyp.cli._sample import progress_bar
from fasthyp.evaluation import evaluate
from fasthyp.models import load

_COLUMNS = {
    "mpjpe_mm": "MPJPE",
    "pa_mpjpe_mm": "PA-MPJPE",
    "pve_mm": "PVE",
    "pck150": "PCK@150",
    "auc": "AUC",
    "cps_mm": "CPS",
}


def run(
    model: str,
    data: Path,
    *,
    format: str | None,
    options: Sequence[str],
    num_samples: Sequence[int],
    seed: int,
    joints: Sequence[str] | None,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate and print; of several processes the first prints.

    Raises:
        ValueError, OSError, ImportError: in one line what is wrong.
    """
    with joined(device) as here:
        persons = open_data(data, format, options)
        network = load(model, here.device)
        with progress_bar("persons", -(-len(persons) // here.world)) as advance:
            result = evaluate(
                *(network, persons, num_samples),
                seed=seed,
                joints=joints,
                batch_size=batch_size,
                device=here.device,
                progress=advance if here.rank == 0 else lambda done: None,
            )
    if here.rank:
        return
    result = {"model": model, "data": str(data), **result}
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    samples = result["num_samples"][-1]
    console.print(
        f"[bold]{result['persons']:,} persons, {samples:,} hypotheses each[/], "
        f"{len(result['joints'])} joints relative to {' and '.join(result['root'])}"
    )
    for title, row in (("", result.get("all")), ("hard subset", result.get("hard"))):
        if row and row["persons"]:
            console.print(_errors(f"{title}: {row['persons']:,} persons" if title else "", row))
    console.print(_spread(result["all"]))
    if "groups" in result:
        console.print(_groups(result))


def _errors(title: str, row: dict[str, Any]) -> Table:
    table = Table(title or "mm; PCK, AUC in %", box=None, pad_edge=False)
    named = {"mode": row["mode"], "mean of hypotheses": row.get("mean_hypothesis")}
    named |= {f"best of {number}": values for number, values in row["best_of"].items()}
    named["average hypothesis"] = row.get("average")
    columns = [name for name in _COLUMNS if name in row["mode"]]
    for name in columns:
        table.add_column(_COLUMNS[name], justify="right")
    for name, values in named.items():
        if values:
            table.add_row(name, *(_number(column, values[column]) for column in columns))
    return table


def _number(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if column in ("pck150", "auc") else f"{value:.1f}"


def _spread(row: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    if row.get("sharpness_mm") is not None:
        axes = ", ".join(f"{axis} {row['diversity_mm'][axis]:.1f}" for axis in "xyz")
        table.add_row("spread", f"{row['sharpness_mm']:.1f} mm ({axes})")
    if "coverage" in row:
        inside = ", ".join(
            f"{100 * row['coverage'][level]:.1f}% in {100 * float(level):.0f}%"
            for level in ("0.5", "0.9")
        )
        table.add_row("calibration", f"error {row['calibration_error']:.3f}; true joints {inside}")
    if row.get("pcc") is not None:
        table.add_row("uncertainty and error", f"correlation {row['pcc']:.3f}")
    return table


def _groups(result: dict[str, Any]) -> Table:
    most = str(result["num_samples"][-1])
    columns = ("persons", "mode", f"best of {most}", "mode PA", f"best of {most} PA")
    table = Table("MPJPE, mm", *columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {**result["groups"], "mean": result["mean_over_groups"]}
    for name, row in rows.items():
        parts = (row["mode"], row["best_of"][most])
        numbers = [part[key] for key in ("mpjpe_mm", "pa_mpjpe_mm") for part in parts]
        table.add_row(name, f"{row['persons']:,}", *(_number("", value) for value in numbers))
    return table
