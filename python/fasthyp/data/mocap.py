"""Reader of the CMU motion capture poses (``.npz``): 13 COCO or 17 Human3.6M joints."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from fasthyp.skeleton import COCO13_JOINTS

VALIDATION_CLIPS = ("01_08", "02_07")
"""Clips held out of the training split, one per training subject."""


@dataclass(frozen=True)
class MocapPoses:
    """Poses of one part of the data.

    Attributes:
        poses: (N, 13, 3), or (N, 17, 3), metres, mid-hip centred, world axes (right-handed, z up).
        subject: (N,) subject number.
        clip: (N,) clip name of every frame.
    """

    poses: Tensor
    subject: Tensor
    clip: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.poses)


def _array(data: np.lib.npyio.NpzFile, path: str, key: str) -> np.ndarray:
    if key not in data.files:
        raise ValueError(f"{path}: expected an array {key!r}, found only {sorted(data.files)}")
    try:
        return data[key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: array {key!r} cannot be read: {error}") from error


_LAYOUTS = {"coco13": ("coco13_mm", "coco13_names"), "h36m17": ("poses_mm", "h36m17_names")}
H36M17_NAMES = (
    *("Hip", "RHip", "RKnee", "RFoot", "LHip", "LKnee", "LFoot", "Spine", "Thorax", "Neck/Nose"),
    *("Head", "LShoulder", "LElbow", "LWrist", "RShoulder", "RElbow", "RWrist"),
)
"""What the file calls :data:`fasthyp.skeleton.H36M17_JOINTS`."""

_NAMES = {"coco13": COCO13_JOINTS, "h36m17": H36M17_NAMES}
_HIPS = {"coco13": (7, 8), "h36m17": (1, 4)}


def load_cmu(path: str | PathLike[str], part: str, joints: str = "coco13") -> MocapPoses:
    """Read one part of the CMU poses.

    Frames flagged as capture glitches are dropped. Whole clips, never frames, are kept apart:
    ``"train"`` and ``"validation"`` share the subjects of the file's training split, and
    ``"test"`` is its test split.

    Args:
        path: ``.npz`` with ``coco13_mm`` (N, 13, 3) and ``coco13_names``, or ``poses_mm``
            (N, 17, 3) and ``h36m17_names``; ``clip_id``, ``clip_names``, ``split`` (0 train, 1
            test), ``subject`` and ``glitch``. Never unpickled.
        part: ``"train"``, ``"validation"`` or ``"test"``.
        joints: ``"coco13"``, or ``"h36m17"`` for those of Human3.6M, in
            :data:`~fasthyp.skeleton.H36M17_JOINTS`' order.

    Raises:
        ValueError: the file cannot be read, an array is missing or has the wrong shape, the joint
            order differs, a pose is not finite, or the part is empty.
    """
    if part not in ("train", "validation", "test"):
        raise ValueError(f"part: expected 'train', 'validation' or 'test', got {part!r}")
    if joints not in _LAYOUTS:
        raise ValueError(f"joints: expected one of {', '.join(_LAYOUTS)}, got {joints!r}")
    poses_key, names_key = _LAYOUTS[joints]
    expected = _NAMES[joints]
    name = str(path)
    try:
        archive = np.load(name, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: not a readable .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{name}: expected an .npz archive, got a single array")
    with archive as data:
        pose_mm = _array(data, name, poses_key)
        found = tuple(str(joint) for joint in _array(data, name, names_key))
        clip_id = _array(data, name, "clip_id")
        clip_names = [str(clip) for clip in _array(data, name, "clip_names")]
        split = _array(data, name, "split")
        subject = _array(data, name, "subject")
        glitch = _array(data, name, "glitch").astype(bool)

    if pose_mm.ndim != 3 or pose_mm.shape[1:] != (len(expected), 3):
        raise ValueError(
            f"{name}: {poses_key}: expected (N, {len(expected)}, 3), got {pose_mm.shape}"
        )
    per_frame = {"clip_id": clip_id, "split": split, "subject": subject, "glitch": glitch}
    for key, values in per_frame.items():
        if values.shape != pose_mm.shape[:1]:
            raise ValueError(f"{name}: {key}: expected ({len(pose_mm)},), got {values.shape}")
    if found != expected:
        raise ValueError(f"{name}: {names_key}: expected {expected}, got {found}")
    if len(clip_id) and not 0 <= clip_id.min() <= clip_id.max() < len(clip_names):
        raise ValueError(f"{name}: clip_id: expected indices into {len(clip_names)} clip_names")

    clip = np.array(clip_names)[clip_id]
    validation = np.isin(clip, VALIDATION_CLIPS)
    chosen = {
        "train": (split == 0) & ~validation,
        "validation": (split == 0) & validation,
        "test": split == 1,
    }[part] & ~glitch
    if not chosen.any():
        raise ValueError(f"{name}: no frames in the {part} part")
    pose = pose_mm[chosen].astype(np.float32) / 1000.0
    if not np.isfinite(pose).all():
        raise ValueError(f"{name}: {poses_key}: expected finite values, got NaN or infinity")
    left, right = _HIPS[joints]
    pose -= (pose[:, left : left + 1] + pose[:, right : right + 1]) / 2
    return MocapPoses(
        torch.from_numpy(pose),
        torch.from_numpy(subject[chosen].astype(np.int64)),
        tuple(clip[chosen].tolist()),
    )
