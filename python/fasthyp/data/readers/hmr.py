"""The .npz files of image crops with body parameters: HMR, SPIN, ProHMR, BEDLAM, HUMR."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasthyp.data.readers._body import body_for, posed, rotations
from fasthyp.data.readers._containers import NpzArrays
from fasthyp.data.readers._dataset import (
    Clip,
    Fields,
    PersonDataset,
    into_cells,
    projected,
)
from fasthyp.skeleton import COCO17_JOINTS, J24_JOINTS, OPENPOSE25_JOINTS, SMPL24_JOINTS

_POSES = {"pose_cam": "shape", "body_pose": "betas", "pose": "shape"}
_HAS = {"body_pose": "has_body_pose", "pose": "has_smpl"}
_JOINTS = {72: 24, 66: 22, 156: 22, 165: 22}
"""Joints of the body among those of a pose of so many numbers: SMPL's 24, or the 22 that SMPL-H and
SMPL-X have before the hands and face."""


def hmr(
    path: str | os.PathLike[str],
    *,
    body: Any = None,
    sigma: float | None = None,
    group_by_folder: bool = False,
    every: int = 1,
) -> PersonDataset:
    """Image crops with annotations; which arrays there are decides what of a person is known.

    Read as the loaders of SPIN and POCO (``pocolib/dataset/base_dataset.py``), ProHMR
    (``prohmr/datasets/image_dataset.py``), BEDLAM (``train/dataset/dataset.py``) and HUMR
    (``train/dataset/dataset.py``) do.

    Args:
        path: an ``.npz`` with ``center`` (N, 2) pixels and ``scale`` (N,), the side of the crop in
            200 pixels (in pixels where there is ``body_keypoints_2d`` or ``body_pose``: ProHMR;
            the larger of two), and of these what there is:

            - body: ``pose_cam`` (N, 66 or more), ``body_pose`` (N, 72) or ``pose`` (N, 72), axis
              angles in camera axes, with ``shape`` or ``betas`` (N, S); where ``has_smpl`` or
              ``has_body_pose`` is 0, NaN;
            - joints: ``S`` (N, 24, 4) or ``extra_keypoints_3d`` (N, 19, 4), metres in camera axes
              and whether known;
            - detections: ``vitpose`` (N, 17, 3) as y, x, confidence (HUMR); ``openpose`` or
              ``body_keypoints_2d`` (N, 25, 3) as x, y, confidence;
            - camera: ``cam_int`` (N, 3, 3), ``trans_cam`` (N, 3) and ``cam_ext`` (N, 4, 4), whose
              translations add up (BEDLAM);
            - ``gender`` (N,), ``imgname`` (N,).
        body: an SMPL model called as smplx's are (for poses of 22 joints an SMPL-X model), or one
            for each of ``"male"``, ``"female"`` and ``"neutral"``; gives joints and vertices.
            Without one, joints are those annotated.
        sigma: cells; makes the detections Gaussians of this standard deviation.
        group_by_folder: a row for each folder of ``imgname`` (3DPW: the sequences).
        every: take every n-th person only.

    Raises:
        ValueError: the file is damaged, or an array is missing or has the wrong shape; names it.
    """
    arrays = NpzArrays(path)
    number = arrays.check("center", 2)
    arrays.need("scale")
    shapes: dict[str, tuple[int | str, ...]] = {
        "S": (24, 4),
        "extra_keypoints_3d": (19, 4),
        "vitpose": (17, 3),
        "openpose": (25, 3),
        "body_keypoints_2d": (25, 3),
        "cam_int": (3, 3),
        "trans_cam": (3,),
        "cam_ext": (4, 4),
        "has_smpl": (),
        "has_body_pose": (),
    }
    pose = next((name for name in _POSES if name in arrays.names), None)
    if pose is not None:
        shapes |= {pose: ("3 J",), _POSES[pose]: ("S",)}
    for name, tail in shapes.items():
        if (name in arrays.names or name == _POSES.get(pose or "")) and (
            arrays.check(name, *tail) != number
        ):
            raise ValueError(f"{path}: {name}: expected {number} rows, got {arrays.shape(name)[0]}")
    joints = 0
    if pose is not None:
        width = arrays.shape(pose)[1]
        if width not in _JOINTS:
            raise ValueError(f"{path}: {pose}: expected {sorted(_JOINTS)} numbers, got {width}")
        joints = _JOINTS[width]
    if body is not None and pose is None:
        raise ValueError(f"{path}: body: the file has no poses, only {sorted(arrays.names)[:20]}")

    names: tuple[str, ...] = ()
    if body is not None:
        names = SMPL24_JOINTS[:joints]
    else:
        found = [name for name in ("S", "extra_keypoints_3d") if name in arrays.names]
        if found:
            names = J24_JOINTS[: arrays.shape(found[0])[1]]
    detectors = ("vitpose", "openpose", "body_keypoints_2d")
    detector = next((name for name in detectors if name in arrays.names), None)
    detected = {None: (), "vitpose": COCO17_JOINTS}.get(detector, OPENPOSE25_JOINTS)
    groups: str | list[str] = ""
    if group_by_folder:
        names_of_images = arrays.texts("imgname")
        groups = [os.path.dirname(name.replace("\\", "/")) or "." for name in names_of_images]
        if len(groups) != number:
            raise ValueError(f"{path}: imgname: expected ({number},), got ({len(groups)},)")
    genders = arrays.texts("gender") if body is not None and "gender" in arrays.names else None
    reader = _Crops(arrays, pose, joints, detector, body, genders, sigma)
    return PersonDataset([Clip(str(path), number, reader, groups)], names, detected, every)


@dataclass(frozen=True)
class _Crops:
    arrays: NpzArrays
    pose: str | None
    joints: int
    detector: str | None
    body: Any
    genders: list[str] | None
    sigma: float | None

    def __call__(self, rows: np.ndarray) -> Fields:
        fields: Fields = {}
        if self.pose is not None:
            pose = self.arrays.rows(self.pose, rows)[:, : 3 * self.joints].astype(np.float32)
            betas = self.arrays.rows(_POSES[self.pose], rows).astype(np.float32)
            has = _HAS.get(self.pose, "")
            if has in self.arrays.names:
                unknown = self.arrays.rows(has, rows) <= 0
                pose[unknown], betas[unknown] = np.nan, np.nan
            matrices = rotations(pose)
            fields |= {
                "global_orient": matrices[:, 0],
                "body_pose": matrices[:, 1:],
                "betas": betas,
            }
        if self.body is not None:
            fields |= self._posed(rows, fields)
        else:
            fields |= self._annotated(rows)
        fields |= self._camera(rows, fields)
        if self.detector is not None:
            found = self.arrays.rows(self.detector, rows).astype(np.float32)
            points = found[..., [1, 0]] if self.detector == "vitpose" else found[..., :2]
            unseen = found[..., 2] <= 0
            fields |= {
                "mean": np.where(unseen[..., None], np.nan, points),
                "amplitude": found[..., 2],
                "visible": ~unseen,
            }
        side = self.arrays.rows("scale", rows).astype(np.float64).reshape(len(rows), -1).max(1)
        if not {"body_pose", "body_keypoints_2d"} & set(self.arrays.names):
            side = 200 * side
        centre = self.arrays.rows("center", rows)
        return into_cells(fields, centre - side[:, None] / 2, side, self.sigma)

    def _posed(self, rows: np.ndarray, fields: Fields) -> Fields:
        genders = [self.genders[row] if self.genders else "neutral" for row in rows]
        parts: Fields = {}
        roots = np.zeros((len(rows), 3), np.float32)
        for gender in sorted(set(genders)):
            chosen = np.array([other == gender for other in genders])
            body = body_for(self.body, gender, self.arrays.path)
            orient, pose, betas = (
                fields[name][chosen] for name in ("global_orient", "body_pose", "betas")
            )
            found, root = posed(body, betas, orient, pose, self.joints)
            roots[chosen] = root.numpy()
            for name, values in found.items():
                if name not in parts:
                    parts[name] = np.zeros((len(rows), *values.shape[1:]), np.float32)
                parts[name][chosen] = values.numpy()
        if "trans_cam" in self.arrays.names:
            parts["translation"] = roots + self._shift(rows)
        return parts

    def _shift(self, rows: np.ndarray) -> np.ndarray:
        shift = self.arrays.rows("trans_cam", rows)
        if "cam_ext" in self.arrays.names:
            shift = shift + self.arrays.rows("cam_ext", rows)[:, :3, 3]
        return shift

    def _annotated(self, rows: np.ndarray) -> Fields:
        name = next((n for n in ("S", "extra_keypoints_3d") if n in self.arrays.names), None)
        if name is None:
            return {}
        values = self.arrays.rows(name, rows).astype(np.float32)
        joints = np.where(values[..., 3:] > 0, values[..., :3], np.nan)
        pelvis = J24_JOINTS.index("pelvis")
        hips = [J24_JOINTS.index(f"{side}_hip") for side in ("left", "right")]
        middle, between = joints[:, [pelvis]], joints[:, hips].mean(1, keepdims=True)
        return {"joints_3d": joints - np.where(np.isfinite(middle), middle, between)}

    def _camera(self, rows: np.ndarray, fields: Fields) -> Fields:
        if "cam_int" not in self.arrays.names:
            return {}
        intrinsics = self.arrays.rows("cam_int", rows).astype(np.float64)
        focal = intrinsics[:, [0, 1], [0, 1]].mean(1)
        camera: Fields = {"focal_length": focal, "centre": intrinsics[:, :2, 2]}
        joints, root = fields.get("joints_3d"), fields.get("translation")
        if joints is not None and root is not None:
            whole = np.asarray(joints) + np.asarray(root)[:, None]
            camera["joints_2d"] = projected(whole, focal, intrinsics[:, :2, 2])
        return camera
