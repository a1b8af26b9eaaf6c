"""Readers of the field's data sets: a :class:`PersonDataset` each, read lazily.

What is known of a person becomes a field of :class:`fasthyp.data.PersonBatch`; the units, axes and
joint orders of the files become those of the batch. Pickles are read without being run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasthyp.data.readers._containers import NpzArrays
from fasthyp.data.readers._dataset import Clip, PersonDataset
from fasthyp.data.readers.arrays import persons, save_persons
from fasthyp.data.readers.cmu import cmu
from fasthyp.data.readers.emdb import emdb
from fasthyp.data.readers.hmr import hmr
from fasthyp.data.readers.human36m import human36m, wehrbein
from fasthyp.data.readers.mpi_inf_3dhp import mpi_inf_3dhp
from fasthyp.data.readers.three_dpw import three_dpw

FORMATS: dict[str, Callable[..., PersonDataset]] = {
    "persons": persons,
    "cmu": cmu,
    "h36m": human36m,
    "wehrbein": wehrbein,
    "3dhp": mpi_inf_3dhp,
    "3dpw": three_dpw,
    "emdb": emdb,
    "hmr": hmr,
}
"""Readers by the names that the command line knows them by."""


def open_persons(
    path: str | os.PathLike[str], format: str | None = None, **options: Any
) -> PersonDataset:
    """The persons of a file or folder.

    Args:
        path: of the data set.
        format: a name of :data:`FORMATS`; unless told, found out from what is there.
        options: of that reader.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: the format is unknown, or the reader lacks an option, or finds the file damaged.
        ImportError: a package that the format needs is not installed.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    name = guess_format(path) if format is None else format
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    try:
        return FORMATS[name](path, **options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ValueError(f"{path}: read as {name}: {error}") from error


def guess_format(path: str | os.PathLike[str]) -> str:
    """The name of the format of a file or folder.

    Raises:
        ValueError: it cannot be told.
    """
    file = Path(path)
    if file.is_dir():
        if any(file.glob("*/annot_data.mat")):
            return "3dhp"
        if any(file.rglob("*_data.pkl")):
            return "emdb"
        if any(file.glob("*.pkl")):
            return "3dpw"
        if any((file / name).is_file() for name in ("zarr.json", ".zgroup")):
            return "persons"
    elif file.suffix in (".npy", ".h5", ".hdf5"):
        return "persons"
    elif file.suffix == ".pickle":
        return "wehrbein"
    elif file.suffix == ".pkl":
        return "emdb" if file.stem.endswith("_data") else "3dpw"
    elif file.suffix == ".npz":
        names = set(NpzArrays(file).names)
        if names & {"coco13_mm", "poses_mm"}:
            return "cmu"
        if "positions_3d" in names:
            return "h36m"
        if names == {"data"}:
            return "3dhp"
        if {"center", "scale"} <= names:
            return "hmr"
        return "persons"
    raise ValueError(f"{path}: its format cannot be told; say which: {', '.join(FORMATS)}")


__all__ = [
    "FORMATS",
    "Clip",
    "PersonDataset",
    "cmu",
    "emdb",
    "guess_format",
    "hmr",
    "human36m",
    "mpi_inf_3dhp",
    "open_persons",
    "persons",
    "save_persons",
    "three_dpw",
    "wehrbein",
]
