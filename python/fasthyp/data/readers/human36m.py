"""Human3.6M as VideoPose3D keeps it, and as Wehrbein et al. do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasthyp.data.readers._containers import (
    NpzArrays,
    array_of,
    entry,
    matching,
    read_pickled,
)
from fasthyp.data.readers._dataset import (
    Clip,
    Fields,
    PersonDataset,
    into_cells,
    projected,
    root_at_origin,
    square_about,
)
from fasthyp.geometry import quaternion_to_matrix
from fasthyp.skeleton import COCO17_JOINTS, H36M17_JOINTS, MPII16_JOINTS

OF_32 = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)
"""Which of the 32 joints of the motion capture are the 17, in order."""

DETECTORS = {"h36m": H36M17_JOINTS, "coco": COCO17_JOINTS, "mpii": MPII16_JOINTS}
_MILLIMETRES = 1000.0

Cameras = Mapping[str, Sequence[Mapping[str, Any]]]


def human36m(
    path_3d: str | os.PathLike[str],
    path_2d: str | os.PathLike[str] | None = None,
    *,
    cameras: Cameras | str | os.PathLike[str],
    subjects: Sequence[str] | None = None,
    actions: Sequence[str] | None = None,
    detector: str | None = None,
    sigma: float | None = None,
    every: int = 1,
) -> PersonDataset:
    """Human3.6M in the files of VideoPose3D (github.com/facebookresearch/VideoPose3D,
    ``common/h36m_dataset.py``, ``data/prepare_data_h36m.py``): 3D joints in camera axes, one person
    per frame and camera; rows by action ("Walking 1" counts as "Walking").

    Args:
        path_3d: ``data_3d_h36m.npz``: ``positions_3d``, a pickled dict subject -> action ->
            (T, 32 or 17, 3) metres in the world. Read without being run, whole.
        path_2d: ``data_2d_h36m_*.npz``: ``positions_2d``, subject -> action -> one
            (T, K, 2 or more) per camera, pixels; becomes ``mean``.
        cameras: subject -> the cameras in the order of the 2D file, or a ``.json`` file of that:
            ``id``, ``orientation`` (quaternion w, x, y, z of camera axes in the world),
            ``translation`` (the camera in the world, mm), ``focal_length`` (x, y) and ``center``
            (x, y) in pixels, named as VideoPose3D names them. Lens distortion is left out.
        subjects, actions: only these; all unless told. An action is named without its number.
        detector: joints of the 2D file: ``"h36m"``, ``"coco"`` or ``"mpii"``; unless told MPII's
            for 16, COCO's where the file's name or metadata says so, else Human3.6M's.
        sigma: cells; makes the points of the 2D file Gaussians of this standard deviation.
        every: take every n-th frame only.

    Raises:
        ValueError: a file is damaged, names code, or lacks something; says what.
    """
    poses = _Nested(NpzArrays(path_3d), "positions_3d")
    points = None if path_2d is None else _Nested(NpzArrays(path_2d), "positions_2d")
    if isinstance(cameras, str | os.PathLike):
        cameras = _read_cameras(cameras)
    clips, counts = [], set()
    for subject in matching(subjects, sorted(poses.value), "subjects", poses.source):
        by_action = poses.at(subject)
        if not isinstance(by_action, dict):
            raise ValueError(f"{poses.source}: {subject}: expected actions by name")
        of_subject = entry(cameras, "cameras", subject)
        for action in sorted(by_action):
            group = action.split(" ")[0]
            if actions is not None and group not in actions:
                continue
            place = f"{poses.source}: {subject}/{action}"
            length = len(array_of(by_action[action], place, "T", "J", 3))
            for number, camera in enumerate(of_subject):
                if points is not None:
                    detected = points.points(subject, action, number)
                    counts.add(detected.shape[1])
                    if len(detected) < length:
                        raise ValueError(
                            f"{points.source}: {subject}/{action}/{number}: expected at least "
                            f"{length} frames, as in 3D, got {len(detected)}"
                        )
                reader = _Frames(poses, points, subject, action, number, _camera(camera), sigma)
                name = f"{subject}/{action}/{camera.get('id', number)}"
                clips.append(Clip(name, length, reader, group))
    names: tuple[str, ...] = ()
    if points is not None:
        names = _detector_names(detector, counts, points)
    return PersonDataset(clips, H36M17_JOINTS, names, every)


@dataclass
class _Nested:
    """Nested dicts of an .npz member; read when first asked for in each process."""

    arrays: NpzArrays
    member: str
    _value: Any = field(default=None, repr=False)

    @property
    def source(self) -> str:
        return self.arrays.path

    @property
    def value(self) -> dict[str, Any]:
        if self._value is None:
            value = self.arrays.nested(self.member)
            if not isinstance(value, dict):
                raise ValueError(f"{self.source}: {self.member}: expected subjects by name")
            self._value = value
        return self._value

    def at(self, *keys: str | int) -> Any:
        return entry(self.value, f"{self.source}: {self.member}", *keys)

    def points(self, *keys: str | int) -> np.ndarray:
        place = f"{self.source}: {'/'.join(map(str, keys))}"
        return array_of(self.at(*keys), place, "T", "K", "2 or more")[..., :2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_value": None}


@dataclass(frozen=True)
class _Camera:
    rotation: np.ndarray  # world to camera
    position: np.ndarray  # metres
    focal: float
    centre: np.ndarray


def _read_cameras(path: str | os.PathLike[str]) -> Cameras:
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable cameras: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected cameras by subject, got {type(value).__name__}")
    return value


def _camera(values: Mapping[str, Any]) -> _Camera:
    given = {}
    for name, size in (("orientation", 4), ("translation", 3), ("focal_length", 2), ("center", 2)):
        value = entry(values, "cameras", name)
        given[name] = np.asarray(value, np.float64)
        if given[name].shape != (size,):
            raise ValueError(f"cameras: {name}: expected {size} numbers, got {value!r}")
    to_world = quaternion_to_matrix(torch.from_numpy(given["orientation"])).numpy()
    return _Camera(
        to_world.T,
        given["translation"] / _MILLIMETRES,
        float(given["focal_length"].mean()),
        given["center"],
    )


@dataclass(frozen=True)
class _Frames:
    poses: _Nested
    points: _Nested | None
    subject: str
    action: str
    number: int
    camera: _Camera
    sigma: float | None

    def __call__(self, rows: np.ndarray) -> Fields:
        place = f"{self.poses.source}: {self.subject}/{self.action}"
        world = array_of(self.poses.at(self.subject, self.action), place, "T", "J", 3)[rows]
        if world.shape[1] == 32:
            world = world[:, OF_32]
        if world.shape[1] != len(H36M17_JOINTS):
            raise ValueError(f"{place}: expected 32 or 17 joints, got {world.shape[1]}")
        joints = (world - self.camera.position) @ self.camera.rotation.T
        focal = np.full(len(rows), self.camera.focal)
        centre = np.broadcast_to(self.camera.centre, (len(rows), 2))
        seen = projected(joints, focal, centre)
        joints, root = root_at_origin(joints, 0)
        fields: Fields = {
            "joints_3d": joints,
            "translation": root,
            "joints_2d": seen,
            "focal_length": focal,
            "centre": centre,
        }
        if self.points is not None:
            found = self.points.points(self.subject, self.action, self.number)[rows]
            fields["mean"] = found
            if self.sigma is not None:
                fields["amplitude"] = np.ones(found.shape[:2])
        return into_cells(fields, *square_about(seen), self.sigma)


def _detector_names(detector: str | None, counts: set[int], points: _Nested) -> tuple[str, ...]:
    if len(counts) != 1:
        raise ValueError(f"{points.source}: expected as many joints everywhere, got {counts}")
    (count,) = counts
    if detector is None:
        named = Path(points.source).name
        if "metadata" in points.arrays.names:
            named += str(points.arrays.nested("metadata"))
        detector = "mpii" if count == 16 else "coco" if "coco" in named.lower() else "h36m"
    if detector not in DETECTORS:
        raise ValueError(f"detector: expected one of {sorted(DETECTORS)}, got {detector!r}")
    names = DETECTORS[detector]
    if len(names) != count:
        raise ValueError(f"{points.source}: expected {len(names)} joints ({detector}), got {count}")
    return names


def wehrbein(
    path: str | os.PathLike[str],
    *,
    subjects: Sequence[str] | None = None,
    actions: Sequence[str] | None = None,
    every: int = 1,
) -> PersonDataset:
    """Human3.6M with the Gaussians fitted to HRNet's heatmaps, the files of Wehrbein et al., ICCV
    2021 (``data/data_h36m.py`` and ``data/data_info.txt`` of their code); rows by action.

    Args:
        path: ``testset_h36m.pickle`` or that of the training set: subject -> action -> subaction ->
            camera -> ``3d_gt`` (T, 51), all x, all y, all z of the 17 joints in camera axes, mm,
            and ``gaussfit`` (T, 112): of each of MPII's 16 joints amplitude, mean x, mean y,
            sigma x, theta, sigma y (cells of the 64 x 64 map) and the error of the fit. Its
            ``2d_hrnet``, the peaks of the same maps, is not read. Read without being run, whole.
        subjects, actions: only these; all unless told.
        every: take every n-th frame only.

    Raises:
        ValueError: the file is damaged, names code, or lacks something; says what.
    """
    source = str(path)
    data = read_pickled(path)
    if not isinstance(data, dict):
        raise ValueError(f"{source}: expected subjects by name, got {type(data).__name__}")
    clips = []
    for subject in matching(subjects, sorted(map(str, data)), "subjects", source):
        for action, subactions in sorted(entry(data, source, subject).items()):
            if actions is not None and action not in actions:
                continue
            for subaction, by_camera in sorted(subactions.items()):
                for camera, values in sorted(by_camera.items()):
                    place = f"{subject}/{action}/{subaction}/{camera}"
                    if not len(values.get("imgpath", (0,))):
                        continue
                    poses, fits = (
                        array_of(
                            entry(values, f"{source}: {place}", name),
                            f"{source}: {place}/{name}",
                            "T",
                            width,
                        )
                        for name, width in (("3d_gt", 51), ("gaussfit", 112))
                    )
                    if len(poses) != len(fits):
                        raise ValueError(
                            f"{source}: {place}: 3d_gt and gaussfit: expected as many frames, got "
                            f"{len(poses)} and {len(fits)}"
                        )
                    clips.append(Clip(place, len(poses), _Fitted(poses, fits), action))
    return PersonDataset(clips, H36M17_JOINTS, MPII16_JOINTS, every)


@dataclass(frozen=True)
class _Fitted:
    poses: np.ndarray
    fits: np.ndarray

    def __call__(self, rows: np.ndarray) -> Fields:
        joints = self.poses[rows].reshape(-1, 3, 17).swapaxes(1, 2) / _MILLIMETRES
        joints, root = root_at_origin(joints, 0)
        amplitude, x, y, sigma_x, theta, sigma_y, _ = np.moveaxis(
            self.fits[rows].reshape(-1, 16, 7), -1, 0
        )
        # the first axis of a fit is (cos, -sin), y down
        a, b, cos, sin = sigma_x**2, sigma_y**2, np.cos(theta), np.sin(theta)
        xx, xy, yy = a * cos**2 + b * sin**2, (b - a) * cos * sin, a * sin**2 + b * cos**2
        covariance = np.stack([xx, xy, xy, yy], -1).reshape(*xx.shape, 2, 2)
        return {
            "joints_3d": joints,
            "translation": root,
            "amplitude": amplitude,
            "mean": np.stack([x, y], -1),
            "covariance": covariance,
        }
