"""Persons, or a detector's heatmaps of them, as named arrays of a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fasthyp.data.persons import SHAPES, check_shape
from fasthyp.data.readers._containers import Arrays, open_arrays
from fasthyp.data.readers._dataset import Clip, Fields, PersonDataset
from fasthyp.skeleton import COCO13_JOINTS, COCO17_JOINTS, MPII16_JOINTS

DETECTORS = {len(names): names for names in (COCO13_JOINTS, MPII16_JOINTS, COCO17_JOINTS)}
"""The joints of heatmaps of whose detector the file says nothing, by their number."""


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
            or Zarr (a folder), as :meth:`PersonBatch.save` writes the first. Beside the fields:
            ``joint_names`` (J,), ``detector_names`` (K,), and ``group`` (P,), the action or
            sequence of each person; texts.
        detector_names: the K joints, where the file does not say: 13 and 17 are COCO's, 16 MPII's.
        every: take every n-th person only.

    Raises:
        ValueError: an array has the wrong shape, or none is a field; names it.
        ImportError: h5py or Zarr is needed and not installed.
    """
    arrays = open_arrays(path)
    known = [name for name in SHAPES if name in arrays.names]
    if not known:
        found = sorted(arrays.names)[:20]
        raise ValueError(f"{path}: expected arrays such as 'heatmaps' or 'mean', found {found}")
    sizes: dict[str, int] = {}
    for name in known:
        check_shape(f"{path}: {name}", arrays.shape(name), SHAPES[name], sizes)
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
    number = sizes["B"]
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
