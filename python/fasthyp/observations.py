"""2D observations of persons, and the files they come in."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasthyp.skeleton import COCO13_JOINTS, COCO17_TO_COCO13

JOINTS = len(COCO13_JOINTS)
COCO17 = 17
GRID = 64
"""Side of the square, in cells, to which keypoints are scaled."""
MARGIN = 1.5
"""Half the side of a person's square over the distance from mid-hip to the farthest joint."""


class Gaussians(NamedTuple):
    """Where each of the 13 joints of P persons is, and how surely.

    Attributes:
        amplitude: (P, 13) peak; about 1 for a sigmoid heatmap of a joint in plain sight.
        mean: (P, 13, 2) x right, y down, in cells.
        covariance: (P, 13, 2, 2) cells^2.
    """

    amplitude: Tensor
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Observations:
    """P persons as a 2D detector sees them: ``heatmaps`` or ``gaussians``, never both.

    Attributes:
        heatmaps: (P, 13, H, W) float32.
        gaussians: of keypoints with covariances, in a square of 64 x 64 cells.
        crop: (P, h, w, 3) uint8, the picture that the heatmaps cover, if the file has it.
    """

    heatmaps: Tensor | None = None
    gaussians: Gaussians | None = None
    crop: np.ndarray | None = None

    def __len__(self) -> int:
        if self.heatmaps is not None:
            return len(self.heatmaps)
        return 0 if self.gaussians is None else len(self.gaussians.mean)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the map, in cells."""
        if self.heatmaps is None:
            return GRID, GRID
        return self.heatmaps.shape[2], self.heatmaps.shape[3]

    def person(self, index: int) -> Observations:
        """One person alone; ValueError if there is no such person."""
        if not 0 <= index < len(self):
            raise ValueError(f"person: expected 0 to {len(self) - 1}, got {index}")
        return self.persons(range(index, index + 1))

    def persons(self, indices: range) -> Observations:
        """Some of the persons."""
        some = slice(indices.start, indices.stop, indices.step)
        g = self.gaussians
        return Observations(
            None if self.heatmaps is None else self.heatmaps[some],
            None if g is None else Gaussians(*(values[some] for values in g)),
            None if self.crop is None else self.crop[some],
        )


def from_heatmaps(heatmaps: np.ndarray, crop: np.ndarray | None = None) -> Observations:
    """Observations of heatmaps.

    Args:
        heatmaps: (P, J, H, W) or (J, H, W), floating point; J = 17 COCO joints, or the 13 body
            joints of :data:`fasthyp.skeleton.COCO13_JOINTS`. Not-a-number is let through: such a
            heatmap comes back as not fitted.
        crop: (P, h, w, 3) or (h, w, 3) uint8, the picture they cover.

    Raises:
        ValueError: naming the array, what was expected and what came.
    """
    heatmaps = _floats("heatmaps", heatmaps)
    if heatmaps.ndim == 3:
        heatmaps = heatmaps[None]
        crop = crop if crop is None or crop.ndim != 3 else crop[None]
    if heatmaps.ndim != 4:
        raise ValueError(f"heatmaps: expected (P, J, H, W) or (J, H, W), got {heatmaps.shape}")
    heatmaps = _body_joints("heatmaps", heatmaps, np.float32)
    if heatmaps.shape[2] < 2 or heatmaps.shape[3] < 2:
        raise ValueError(f"heatmaps: expected at least 2 x 2 cells, got {heatmaps.shape[2:]}")
    if crop is not None and (
        crop.dtype != np.uint8
        or crop.ndim != 4
        or crop.shape[0] != len(heatmaps)
        or crop.shape[3] != 3
        or 0 in crop.shape
    ):
        raise ValueError(
            f"crop: expected uint8 ({len(heatmaps)}, h, w, 3), got {crop.dtype} {crop.shape}"
        )
    return Observations(heatmaps=torch.from_numpy(heatmaps), crop=crop)


def from_keypoints(
    keypoints: np.ndarray,
    covariances: np.ndarray,
    amplitudes: np.ndarray | None = None,
    image_size: np.ndarray | tuple[int, int] | None = None,
) -> Observations:
    """Observations of keypoints with covariances.

    Args:
        keypoints: (P, J, 2) or (J, 2): x right, y down, in pixels; J = 17 COCO joints or the 13.
        covariances: (P, J, 2, 2) or (J, 2, 2) in pixels^2, symmetric and positive definite.
        amplitudes: (P, J) or (J,), peaks of the heatmaps; 1 unless told.
        image_size: (H, W) of each person's crop in pixels. Without it each person is taken to be
            in the middle of a square with the usual margin, so that keypoints of a whole
            photograph can be given as they are.

    Raises:
        ValueError: naming the array, what was expected and what came.
    """
    keypoints, covariances = _floats("keypoints", keypoints), _floats("covariances", covariances)
    if keypoints.ndim == 2:
        keypoints, covariances = keypoints[None], covariances[None]
        amplitudes = None if amplitudes is None else np.asarray(amplitudes)[None]
    if keypoints.ndim != 3 or keypoints.shape[2] != 2:
        raise ValueError(f"keypoints: expected (P, J, 2) or (J, 2), got {keypoints.shape}")
    shape = keypoints.shape[:2]
    if covariances.shape != (*shape, 2, 2):
        raise ValueError(f"covariances: expected {(*shape, 2, 2)}, got {covariances.shape}")
    amplitudes = np.ones(shape) if amplitudes is None else _floats("amplitudes", amplitudes)
    if amplitudes.shape != shape:
        raise ValueError(f"amplitudes: expected {shape}, got {amplitudes.shape}")
    mean = _body_joints("keypoints", keypoints, np.float64)
    covariance = _body_joints("covariances", covariances, np.float64)
    amplitude = _body_joints("amplitudes", amplitudes, np.float64)
    for name, values in (
        ("keypoints", mean),
        ("covariances", covariance),
        ("amplitudes", amplitude),
    ):
        _all_joints(name, np.isfinite(values), "finite numbers")
    _all_joints(
        "covariances",
        (np.linalg.det(covariance) > 0)
        & (covariance[..., 0, 0] > 0)
        & np.isclose(covariance[..., 0, 1], covariance[..., 1, 0], rtol=1e-3),
        "symmetric, positive definite matrices",
    )

    middle = (mean[:, 7:8] + mean[:, 8:9]) / 2
    if image_size is None:
        reach = np.linalg.norm(mean - middle, axis=-1).max(1)
        if not (reach > 0).all():
            raise ValueError(f"keypoints: all joints of person {reach.argmin()} are in one place")
        side = 2 * MARGIN * reach
    else:
        size = np.asarray(image_size)
        if size.shape != (2,) or size.dtype.kind not in "iuf" or not (size > 0).all():
            raise ValueError(f"image_size: expected a positive (H, W), got {size.tolist()}")
        side = np.full(len(mean), float(size.max()))
    unit = (GRID / side).reshape(-1, 1, 1)
    gaussians = Gaussians(
        torch.from_numpy(amplitude).float(),
        torch.from_numpy((mean - middle) * unit + GRID / 2).float(),
        torch.from_numpy(covariance * unit[..., None] ** 2).float(),
    )
    return Observations(gaussians=gaussians)


def read_observations(path: str | os.PathLike[str]) -> Observations:
    """Read a file; nothing in it is ever unpickled.

    ``.npz`` with ``heatmaps`` and, if the picture is to be drawn, a uint8 ``crop``
    (:func:`from_heatmaps`); ``.npy`` with the heatmaps alone; or ``.npz`` with ``keypoints``,
    ``covariances`` and, if known, ``amplitudes`` and ``image_size`` (:func:`from_keypoints`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or what is in it does not fit.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise FileNotFoundError(f"{name}: no such file")
    content = _reading(name, lambda: np.load(name, allow_pickle=False))
    if isinstance(content, np.ndarray):
        return _naming(name, lambda: from_heatmaps(content))
    with content as archive:

        def array(key: str) -> np.ndarray | None:
            if key not in archive.files:
                return None
            return _reading(f"{name}: {key}", lambda: archive[key])

        heatmaps = array("heatmaps")
        if heatmaps is not None:
            crop = array("crop")
            if crop is not None and (crop.dtype != np.uint8 or crop.ndim != heatmaps.ndim):
                crop = None  # something else of that name
            return _naming(name, lambda: from_heatmaps(heatmaps, crop))
        keypoints, covariances = array("keypoints"), array("covariances")
        if keypoints is None or covariances is None:
            raise ValueError(
                f"{name}: expected an array heatmaps, or keypoints and covariances, "
                f"found {', '.join(sorted(archive.files)) or 'nothing'}"
            )
        amplitudes, size = array("amplitudes"), array("image_size")
        return _naming(name, lambda: from_keypoints(keypoints, covariances, amplitudes, size))


def _reading(what: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return read()
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        text = str(error)
        if "pickle" in text or "Object arrays" in text:
            reason = "not a NumPy file, or one with pickled objects, which are never loaded"
        else:
            reason = f"cannot be read, is it truncated? ({text or type(error).__name__})"
        raise ValueError(f"{what}: {reason}") from error


def _naming(path: str, make: Callable[[], Observations]) -> Observations:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _floats(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind != "f":
        raise ValueError(f"{name}: expected floating-point numbers, got {values.dtype}")
    if values.size == 0:
        raise ValueError(f"{name}: expected at least one person, got {values.shape}")
    return values


def _body_joints(name: str, values: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    """The 13 body joints of (P, 17, ...) or (P, 13, ...)."""
    if values.shape[1] == COCO17:
        values = values[:, COCO17_TO_COCO13]
    elif values.shape[1] != JOINTS:
        raise ValueError(f"{name}: expected {JOINTS} or {COCO17} joints, got {values.shape}")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype)


def _all_joints(name: str, good: np.ndarray, expected: str) -> None:
    """ValueError that names the first person and joint for which ``good`` (P, 13, ...) fails."""
    if not good.all():
        person, joint = np.argwhere(~good.reshape(*good.shape[:2], -1).all(-1))[0]
        raise ValueError(
            f"{name}: expected {expected}, but not so for person {person}, {COCO13_JOINTS[joint]}"
        )
