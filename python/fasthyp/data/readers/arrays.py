"""Persons, or a detector's heatmaps of them, as named arrays of a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fasthyp._files import replacing
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers._containers import Arrays, open_arrays
from fasthyp.data.readers._dataset import Clip, Fields, PersonDataset
from fasthyp.skeleton import COCO13_JOINTS, COCO17_JOINTS, MPII16_JOINTS

_NAMES = ("joint_names", "detector_names")
FIELDS = tuple(field.name for field in fields(PersonBatch) if field.name not in _NAMES)
DETECTORS = {len(names): names for names in (COCO13_JOINTS, MPII16_JOINTS, COCO17_JOINTS)}
"""The joints of heatmaps of whose detector the file says nothing, by their number."""

_TAILS: dict[str, tuple[int | str, ...]] = {
    "joints_3d": ("J", 3),
    "joints_2d": ("J", 2),
    "translation": (3,),
    "focal_length": (),
    "centre": (2,),
    "amplitude": ("K",),
    "mean": ("K", 2),
    "covariance": ("K", 2, 2),
    "visible": ("K",),
    "heatmaps": ("K", "H", "W"),
    "global_orient": (3, 3),
    "body_pose": ("P", 3, 3),
    "betas": ("S",),
    "vertices": ("V", 3),
}


def persons(
    path: str | os.PathLike[str],
    detector_names: Sequence[str] | None = None,
    every: int = 1,
) -> PersonDataset:
    """Persons of a file of arrays named as the fields of :class:`fasthyp.data.PersonBatch`.

    Heatmaps that a ViTPose or HRNet wrote (mmpose's ``batch_heatmaps`` (P, K, H, W)) are such a
    file with the one array ``heatmaps``.

    Args:
        path: ``.npz`` (stored arrays are mapped into memory), ``.npy`` of heatmaps, HDF5 (``.h5``)
            or Zarr (a folder), as :func:`save_persons` writes the first. Beside the fields:
            ``joint_names`` (J,), ``detector_names`` (K,) and ``group`` (P,), texts.
        detector_names: the K joints, where the file does not say: 13 and 17 are COCO's, 16 MPII's.
        every: take every n-th person only.

    Raises:
        ValueError: an array has the wrong shape, or none is a field; names it.
        ImportError: h5py or Zarr is needed and not installed.
    """
    arrays = open_arrays(path)
    known = [name for name in FIELDS if name in arrays.names]
    if not known:
        found = sorted(arrays.names)[:20]
        raise ValueError(f"{path}: expected arrays such as 'heatmaps' or 'mean', found {found}")
    shapes = {name: arrays.shape(name) for name in known}
    lengths = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
    sizes: dict[str, int] = {}
    for name in known:
        tail = _TAILS.get(name)
        if tail is not None:
            arrays.check(name, *(sizes.get(n, n) if isinstance(n, str) else n for n in tail))
            for letter, count in zip(tail, shapes[name][1:], strict=True):
                if isinstance(letter, str):
                    sizes[letter] = count
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{path}: expected as many rows in every array, got {lengths}")
    names = {"joint_names": sizes.get("J"), "detector_names": sizes.get("K")}
    given: dict[str, tuple[str, ...]] = {"joint_names": (), "detector_names": ()}
    for name, size in names.items():
        if size is None:
            continue
        if name == "detector_names" and detector_names is not None:
            given[name] = tuple(detector_names)
        elif name in arrays.names:
            given[name] = tuple(arrays.texts(name))
        elif name == "detector_names" and size in DETECTORS:
            given[name] = DETECTORS[size]
        else:
            raise ValueError(f"{path}: expected {name}, the {size} joints")
        if len(given[name]) != size:
            raise ValueError(f"{path}: {name}: expected {size} names, got {len(given[name])}")
    number = lengths[known[0]]
    group: list[str] = arrays.texts("group") if "group" in arrays.names else []
    if group and len(group) != number:
        raise ValueError(f"{path}: group: expected ({number},), got ({len(group)},)")
    clip = Clip(str(path), number, _Reader(arrays, tuple(known)), group)
    return PersonDataset([clip], given["joint_names"], given["detector_names"], every)


@dataclass(frozen=True)
class _Reader:
    arrays: Arrays
    names: tuple[str, ...]

    def __call__(self, rows: np.ndarray) -> Fields:
        return {name: self.arrays.rows(name, rows) for name in self.names}


def save_persons(
    path: str | os.PathLike[str], batch: PersonBatch, groups: Sequence[str] | None = None
) -> None:
    """Write persons as an ``.npz`` for :func:`persons`, stored so that it can be mapped into
    memory; it appears whole or not at all.

    Args:
        path: of the file.
        batch: the persons.
        groups: (P,) the action or sequence of each.

    Raises:
        ValueError: there are not as many groups as persons.
    """
    arrays = {name: value.cpu().numpy() for name, value in batch.tensors().items()}
    for name in _NAMES:
        if getattr(batch, name):
            arrays[name] = np.array(getattr(batch, name))
    if groups is not None:
        if len(groups) != len(batch):
            raise ValueError(f"groups: expected {len(batch)}, got {len(groups)}")
        arrays["group"] = np.array(list(groups), dtype=str)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


__all__ = ["DETECTORS", "persons", "save_persons"]
