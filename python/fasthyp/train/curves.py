"""The curves of a training run as one CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fasthyp._files import replacing


class Curves(Logger):
    """Rows of a step and the numbers known there, written whole after each validation.

    Args:
        path: the file. What it holds up to ``step`` is kept, the rest is written anew.
        step: from which the run goes on; 0 for a new one.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        super().__init__()
        self.path = path
        self._rows: dict[int, dict[str, str]] = {}
        self._changed = False
        if step and path.exists():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    number = int(row.pop("step"))
                    if number <= step:
                        self._rows[number] = {name: value for name, value in row.items() if value}

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        row = self._rows.setdefault(int(step), {})
        row.update({name: repr(float(v)) for name, v in metrics.items() if name != "epoch"})
        self._changed = self._changed or any(name.startswith("val_") for name in metrics)

    @rank_zero_only
    def save(self) -> None:
        if self._changed:
            self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._rows:
            self._write()

    def _write(self) -> None:
        names = sorted({name for row in self._rows.values() for name in row})
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *names])
            writer.writeheader()
            writer.writerows({"step": k, **self._rows[k]} for k in sorted(self._rows))
        self._changed = False
