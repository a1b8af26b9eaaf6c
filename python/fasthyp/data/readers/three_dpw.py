"""3DPW: persons in the wild with SMPL parameters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fasthyp.data.readers._body import body_for, posed, rotations
from fasthyp.data.readers._containers import array_of, entry, read_pickled
from fasthyp.data.readers._dataset import (
    Clip,
    Fields,
    PersonDataset,
    into_cells,
    projected,
    root_at_origin,
    square_about,
)
from fasthyp.skeleton import OPENPOSE18_JOINTS, SMPL24_JOINTS


def three_dpw(
    path: str | os.PathLike[str],
    *,
    body: Any = None,
    sequences: Sequence[str] | None = None,
    sigma: float | None = None,
    every: int = 1,
) -> PersonDataset:
    """Persons of 3DPW (von Marcard et al., ECCV 2018), those frames that its authors mark as
    valid, in camera axes; rows by sequence. Read as in ``preprocess_3dpw.py`` of ProHMR
    (github.com/nkolot/ProHMR).

    Args:
        path: a sequence's ``.pkl``, or a folder of them: of each person ``poses`` (T, 72) axis
            angles in the world, ``trans`` (T, 3) metres, ``betas``, ``genders``, ``poses2d``
            (T, 3, 18) pixels and confidence, ``campose_valid`` (T,), and where there
            ``jointPositions`` (T, 72) metres in the world; ``cam_poses`` (T, 4, 4) world to
            camera, ``cam_intrinsics`` (3, 3), ``sequence``. Read without being run, a sequence at
            a time.
        body: an SMPL model called as smplx's are, or one for each of ``"male"`` and ``"female"``;
            gives joints and vertices. Without one the joints are ``jointPositions``.
        sequences: only these; all unless told.
        sigma: cells; makes ``poses2d`` Gaussians of this standard deviation.
        every: take every n-th frame only.

    Raises:
        ValueError: a file is damaged, names code, or lacks something; says what.
    """
    root = Path(path)
    files = sorted(root.glob("*.pkl")) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"{root}: expected the .pkl files of sequences")
    clips = []
    for file in files:
        if sequences is not None and file.stem not in sequences:
            continue
        sequence = SequenceFile(str(file))
        for person in range(len(entry(sequence.value, str(file), "poses"))):
            valid = sequence.person("campose_valid", person, "T").reshape(-1) > 0
            frames = np.flatnonzero(valid)
            reader = _Frames(sequence, person, frames, body, sigma)
            clips.append(Clip(f"{file.stem}/{person}", len(frames), reader, file.stem))
    return PersonDataset(clips, SMPL24_JOINTS, OPENPOSE18_JOINTS, every)


@dataclass(frozen=True)
class SequenceFile:
    """The pickle of a sequence, a dict; of those that a process reads the last two stay in memory.

    Attributes:
        path: of the file.
    """

    path: str

    @property
    def value(self) -> dict[str, Any]:
        state = os.stat(self.path)
        value = _read(self.path, state.st_mtime_ns, state.st_size)
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: expected a dict, got {type(value).__name__}")
        return value

    def person(self, name: str, number: int, *shape: int | str) -> np.ndarray:
        """What a list of the file has of one of its persons."""
        value = entry(self.value, self.path, name, number)
        return array_of(value, f"{self.path}: {name}[{number}]", *shape)

    def array(self, *keys: str, shape: tuple[int | str, ...]) -> np.ndarray:
        """An array under keys of nested dicts."""
        value = entry(self.value, self.path, *keys)
        return array_of(value, f"{self.path}: {'/'.join(keys)}", *shape)


@lru_cache(maxsize=2)
def _read(path: str, modified: int, size: int) -> Any:
    return read_pickled(path)


@dataclass(frozen=True)
class _Frames:
    sequence: SequenceFile
    number: int
    frames: np.ndarray
    body: Any
    sigma: float | None

    def __call__(self, rows: np.ndarray) -> Fields:
        sequence, number, frames = self.sequence, self.number, self.frames[rows]
        camera = sequence.array("cam_poses", shape=("T", 4, 4))[frames]
        turn, shift = camera[:, :3, :3], camera[:, :3, 3]
        intrinsics = sequence.array("cam_intrinsics", shape=(3, 3))
        pose = rotations(sequence.person("poses", number, "T", 72)[frames])
        orient = rotations_times(turn, pose[:, 0].numpy())
        betas = sequence.person("betas", number, "S")[:10]
        focal = np.full(len(rows), intrinsics[[0, 1], [0, 1]].mean())
        centre = np.broadcast_to(intrinsics[:2, 2], (len(rows), 2))
        fields: Fields = {
            "global_orient": orient,
            "body_pose": pose[:, 1:],
            "betas": np.broadcast_to(betas, (len(rows), len(betas))),
            "focal_length": focal,
            "centre": centre,
        }
        if self.body is not None:
            gender = str(entry(sequence.value, sequence.path, "genders", number))
            body = body_for(self.body, gender, sequence.path)
            trans = sequence.person("trans", number, "T", 3)[frames]
            fields |= in_camera(body, fields, turn, shift, trans)
        elif "jointPositions" in sequence.value:
            world = sequence.person("jointPositions", number, "T", 72)[frames].reshape(-1, 24, 3)
            joints = np.einsum("nij,nkj->nki", turn, world) + shift[:, None]
            fields["joints_3d"], fields["translation"] = root_at_origin(joints, 0)
        found = sequence.person("poses2d", number, "T", 3, 18)[frames].swapaxes(1, 2)
        unseen = found[..., 2:] <= 0
        points = np.where(unseen, np.nan, found[..., :2])
        seen = points
        if fields.get("joints_3d") is not None:
            whole = np.asarray(fields["joints_3d"]) + np.asarray(fields["translation"])[:, None]
            fields["joints_2d"] = seen = projected(whole, focal, centre)
        fields |= {"mean": points, "amplitude": found[..., 2], "visible": ~unseen[..., 0]}
        return into_cells(fields, *square_about(seen), self.sigma)


def rotations_times(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(R, 3, 3) products."""
    return np.einsum("nij,njk->nik", first, second)


def in_camera(
    body: Any, fields: Fields, turn: np.ndarray, shift: np.ndarray, trans: np.ndarray
) -> Fields:
    """``joints_3d``, ``vertices`` and ``translation`` of a body that is turned in camera axes
    already, whose root the world has ``trans`` (R, 3) beside its place without translation."""
    import torch

    orient = torch.as_tensor(np.asarray(fields["global_orient"]), dtype=torch.float32)
    pose, betas = fields["body_pose"], fields["betas"]
    assert isinstance(pose, torch.Tensor)
    assert betas is not None
    found, root = posed(body, betas, orient, pose, len(SMPL24_JOINTS))
    # the root does not move as the body turns about it
    found["translation"] = np.einsum("nij,nj->ni", turn, root.numpy() + trans) + shift
    return found
