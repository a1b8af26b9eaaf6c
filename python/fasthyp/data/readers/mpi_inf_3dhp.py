"""The test set of MPI-INF-3DHP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fasthyp.data.readers._containers import (
    HDF5Arrays,
    NpzArrays,
    array_of,
    entry,
    matching,
)
from fasthyp.data.readers._dataset import (
    Clip,
    Fields,
    PersonDataset,
    into_cells,
    root_at_origin,
    square_about,
)
from fasthyp.skeleton import MPI_INF_3DHP17_JOINTS

_MILLIMETRES = 1000.0
_ROOT = MPI_INF_3DHP17_JOINTS.index("pelvis")


def mpi_inf_3dhp(
    path: str | os.PathLike[str],
    *,
    sequences: Sequence[str] | None = None,
    universal: bool = True,
    sigma: float | None = None,
    every: int = 1,
) -> PersonDataset:
    """The valid frames of the test set (Mehta et al., 3DV 2017); rows by sequence.

    Args:
        path: the folder of ``TS1`` to ``TS6``, each with ``annot_data.mat`` (MATLAB 7.3, needs
            h5py): ``annot2`` (T, 1, 17, 2) pixels, ``univ_annot3`` and ``annot3`` (T, 1, 17, 3) mm
            in camera axes, ``valid_frame``; or the ``data_test_3dhp.npz`` of P-STMO
            (github.com/paTRICK-swk/P-STMO, ``common/load_data_3dhp_mae.py``): ``data``, a pickled
            dict TS -> ``data_2d`` (T, 17, 2), ``data_3d`` (T, 17, 3) mm, ``valid`` (T,). Read
            without being run.
        sequences: only these, such as ``"TS1"``; all unless told.
        universal: of the ``.mat`` files take the poses scaled to the universal skeleton
            (``univ_annot3``), as published figures do; else ``annot3``.
        sigma: cells; makes the 2D annotation the detected Gaussians, of this standard deviation.
        every: take every n-th valid frame only.

    Raises:
        ValueError: a file is damaged, names code, or lacks something; says what.
        ImportError: h5py is needed and not installed.
    """
    root = Path(path)
    clips: list[Clip] = []
    if root.is_dir():
        found = sorted(file.parent.name for file in root.glob("*/annot_data.mat"))
        if not found:
            raise ValueError(f"{root}: expected folders with annot_data.mat, such as TS1")
        for name in matching(sequences, found, "sequences", str(root)):
            arrays = HDF5Arrays(root / name / "annot_data.mat")
            poses = "univ_annot3" if universal else "annot3"
            arrays.need("valid_frame")
            valid = arrays.all("valid_frame").reshape(-1) > 0
            for array, width in (("annot2", 2), (poses, 3)):
                if arrays.check(array, 1, 17, width) != len(valid):
                    raise ValueError(f"{arrays.path}: {array}: expected {len(valid)} frames")
            reader = _Annotations(arrays, poses, np.flatnonzero(valid), sigma)
            clips.append(Clip(name, int(valid.sum()), reader, name))
    else:
        data = NpzArrays(root).nested("data")
        names = sorted(data) if isinstance(data, dict) else []
        for name in matching(sequences, names, "sequences", str(root)):
            place = f"{root}: {name}"
            valid = array_of(entry(data, str(root), name, "valid"), f"{place}/valid", "T") > 0
            points, poses_3d = (
                array_of(entry(data, str(root), name, key), f"{place}/{key}", len(valid), 17, width)
                for key, width in (("data_2d", 2), ("data_3d", 3))
            )
            found_rows = np.flatnonzero(valid)
            clips.append(
                Clip(name, len(found_rows), _Frames(points, poses_3d, found_rows, sigma), name)
            )
    detector = MPI_INF_3DHP17_JOINTS if sigma is not None else ()
    return PersonDataset(clips, MPI_INF_3DHP17_JOINTS, detector, every)


@dataclass(frozen=True)
class _Annotations:
    arrays: HDF5Arrays
    poses: str
    valid: np.ndarray
    sigma: float | None

    def __call__(self, rows: np.ndarray) -> Fields:
        frames = self.valid[rows]
        points, poses = (self.arrays.rows(name, frames)[:, 0] for name in ("annot2", self.poses))
        return _fields(points, poses, self.sigma)


@dataclass(frozen=True)
class _Frames:
    points: np.ndarray
    poses: np.ndarray
    valid: np.ndarray
    sigma: float | None

    def __call__(self, rows: np.ndarray) -> Fields:
        frames = self.valid[rows]
        return _fields(self.points[frames], self.poses[frames], self.sigma)


def _fields(points: np.ndarray, poses: np.ndarray, sigma: float | None) -> Fields:
    joints, root = root_at_origin(poses / _MILLIMETRES, _ROOT)
    fields: Fields = {"joints_3d": joints, "translation": root, "joints_2d": points}
    if sigma is not None:
        fields |= {"mean": points, "amplitude": np.ones(points.shape[:2])}
    return into_cells(fields, *square_about(points), sigma)
