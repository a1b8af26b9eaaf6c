"""Data sets and options of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasthyp.data.readers import PersonDataset, open_persons

_LISTS = ("subjects", "actions", "sequences", "detector_names")


def open_data(path: Path, format: str | None, options: Sequence[str]) -> PersonDataset:
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
    return open_persons(path, format, **given)


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
