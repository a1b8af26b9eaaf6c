"""EMDB: persons in the wild with SMPL parameters from electromagnetic sensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasthyp.data.readers._body import body_for, rotations
from fasthyp.data.readers._containers import entry
from fasthyp.data.readers._dataset import (
    Clip,
    Fields,
    PersonDataset,
    into_cells,
    projected,
    square_about,
)
from fasthyp.data.readers.three_dpw import SequenceFile, in_camera, rotations_times
from fasthyp.skeleton import SMPL24_JOINTS


def emdb(
    path: str | os.PathLike[str],
    *,
    body: Any = None,
    sequences: Sequence[str] | None = None,
    subset: int | None = None,
    every: int = 1,
) -> PersonDataset:
    """Persons of EMDB (Kaufmann et al., ICCV 2023), those frames that its authors mark as good, in
    camera axes; rows by sequence. Read as in ``evaluation_engine.py`` of its code
    (github.com/eth-ait/emdb).

    Args:
        path: a ``P*_*_data.pkl``, or a folder with them anywhere inside: ``smpl`` with
            ``poses_root`` (T, 3) and ``poses_body`` (T, 69) axis angles in the world, ``trans``
            (T, 3) metres, ``betas`` (10,); ``camera`` with ``extrinsics`` (T, 4, 4) world to
            camera and ``intrinsics`` (3, 3); ``good_frames_mask`` (T,), ``kp2d`` (T, 24, 2) pixels,
            ``gender``, ``name``, ``emdb1``, ``emdb2``. Read without being run, a file at a time.
        body: an SMPL model called as smplx's are, or one for each of ``"male"``, ``"female"`` and
            ``"neutral"``; gives joints and vertices, of which the files have none.
        sequences: names of sequences; all unless told.
        subset: 1 or 2: only the sequences of EMDB 1 (camera frame) or EMDB 2 (global).
        every: take every n-th frame only.

    Raises:
        ValueError: a file is damaged, names code, or lacks something; says what.
    """
    if subset not in (None, 1, 2):
        raise ValueError(f"subset: expected 1, 2 or None, got {subset!r}")
    root = Path(path)
    files = sorted(root.rglob("*_data.pkl")) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"{root}: expected files *_data.pkl")
    clips = []
    for file in files:
        sequence = SequenceFile(str(file))
        name = str(sequence.value.get("name", file.stem.removesuffix("_data")))
        wanted = sequences is None or name in sequences
        if wanted and (subset is None or sequence.value.get(f"emdb{subset}")):
            frames = np.flatnonzero(sequence.array("good_frames_mask", shape=("T",)))
            clips.append(Clip(name, len(frames), _Frames(sequence, frames, body), name))
    return PersonDataset(clips, SMPL24_JOINTS, (), every)


@dataclass(frozen=True)
class _Frames:
    sequence: SequenceFile
    frames: np.ndarray
    body: Any

    def __call__(self, rows: np.ndarray) -> Fields:
        sequence, frames = self.sequence, self.frames[rows]
        camera = sequence.array("camera", "extrinsics", shape=("T", 4, 4))[frames]
        turn, shift = camera[:, :3, :3], camera[:, :3, 3]
        intrinsics = sequence.array("camera", "intrinsics", shape=(3, 3))
        orient = rotations(sequence.array("smpl", "poses_root", shape=("T", 3))[frames])[
            :, 0
        ].numpy()
        betas = sequence.array("smpl", "betas", shape=("S",))[:10]
        focal = np.full(len(rows), intrinsics[[0, 1], [0, 1]].mean())
        centre = np.broadcast_to(intrinsics[:2, 2], (len(rows), 2))
        points = sequence.array("kp2d", shape=("T", 24, 2))[frames]
        fields: Fields = {
            "global_orient": rotations_times(turn, orient),
            "body_pose": rotations(sequence.array("smpl", "poses_body", shape=("T", 69))[frames]),
            "betas": np.broadcast_to(betas, (len(rows), len(betas))),
            "focal_length": focal,
            "centre": centre,
            "joints_2d": points,
        }
        if self.body is not None:
            gender = str(entry(sequence.value, sequence.path, "gender"))
            body = body_for(self.body, gender, sequence.path)
            trans = sequence.array("smpl", "trans", shape=("T", 3))[frames]
            fields |= in_camera(body, fields, turn, shift, trans)
            whole = np.asarray(fields["joints_3d"]) + np.asarray(fields["translation"])[:, None]
            fields["joints_2d"] = projected(whole, focal, centre)
        return into_cells(fields, *square_about(points))
