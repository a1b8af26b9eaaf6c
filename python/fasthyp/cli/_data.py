"""Data sets and options of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fasthyp.data.gaussian_features import standard_features
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers import PersonDataset, open_persons
from fasthyp.estimator import fill_unseen
from fasthyp.observations import GRID, Gaussians

_LISTS = ("subjects", "actions", "sequences", "detector_names")


class WithFeatures:
    """Persons of a data set; those with Gaussians and without ``features`` get
    :func:`fasthyp.data.standard_features`, as in training. A joint without a Gaussian enters as a
    wide blob about the others."""

    def __init__(self, persons: PersonDataset) -> None:
        self.persons = persons

    def __len__(self) -> int:
        return len(self.persons)

    def __getitem__(self, rows: slice) -> PersonBatch:
        batch = self.persons[rows]
        if batch.features is not None or not len(batch):
            return batch
        if batch.amplitude is None or batch.mean is None or batch.covariance is None:
            return batch
        given = Gaussians(batch.amplitude, batch.mean, batch.covariance)
        numbers = [given.amplitude[..., None], given.mean, given.covariance.flatten(-2)]
        observed = torch.cat(numbers, -1).isfinite().all(-1)
        features = standard_features(*fill_unseen(given, observed, (GRID, GRID)))
        return replace(batch, features=features)

    def groups(self, rows: slice) -> list[str] | None:
        return self.persons.groups(rows)


def open_data(path: Path, format: str | None, options: Sequence[str]) -> WithFeatures:
    """A data set with the options ``NAME=VALUE`` of its reader.

    Raises:
        ValueError: an option is malformed or unknown.
    """
    given: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ValueError(f"--option: expected NAME=VALUE, got {option!r}")
        given[name.replace("-", "_")] = _value(name.replace("-", "_"), value)
    return WithFeatures(open_persons(path, format, **given))


def _value(name: str, text: str) -> Any:
    if name in _LISTS:
        return text.split(",")
    if name == "body":
        return _bodies(Path(text))
    try:
        return json.loads(text)
    except ValueError:
        return text


def _bodies(path: Path) -> Any:
    """The SMPL model of a file, or those of a folder by gender."""
    from fasthyp.body import SMPL

    if path.is_file():
        return SMPL(str(path))
    found = {
        gender: SMPL(str(path), gender=gender)
        for gender in ("male", "female", "neutral")
        if any(path.glob(f"SMPL_{gender.upper()}.*"))
    }
    if not found:
        raise ValueError(f"body: expected an SMPL file, or a folder with SMPL_MALE.pkl; got {path}")
    return found
