"""A batch of persons: what a detector saw of them and, where it is known, the truth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthyp._files import replacing
from fasthyp.body.files import read_npz


@dataclass(frozen=True)
class PersonBatch:
    """B persons. Every field but the names is a tensor of B rows, or None where it is not known;
    of a joint that is not known of one person the coordinates are NaN.

    Attributes:
        joints_3d: (B, J, 3) metres, camera axes (x right, y down, z forward), root at the origin.
        joints_2d: (B, J, 2) exact projections of these joints, cells of the heatmaps.
        translation: (B, 3) metres, the root in the camera.
        focal_length: (B,) in cells of the heatmaps; ``centre`` (B, 2) the principal point, so that
            a point p of the camera is seen at ``focal_length * p[:2] / p[2] + centre``.
        amplitude, mean, covariance: (B, K), (B, K, 2), (B, K, 2, 2) Gaussians fitted to the
            detector's heatmaps of K joints; cells, x right, y down.
        visible: (B, K) whether the detector's joint is in the picture and not hidden.
        heatmaps: (B, K, H, W).
        features: (B, C) of an image backbone, or what stands for it; or images (B, 3, H, W).
        global_orient: (B, 3, 3) rotation of the root in camera axes.
        body_pose: (B, P, 3, 3) rotations of the other joints of the body.
        betas: (B, S) shape coefficients.
        vertices: (B, V, 3) metres.
        joint_names, detector_names: the J and the K joints.
    """

    joints_3d: Tensor | None = None
    joints_2d: Tensor | None = None
    translation: Tensor | None = None
    focal_length: Tensor | None = None
    centre: Tensor | None = None
    amplitude: Tensor | None = None
    mean: Tensor | None = None
    covariance: Tensor | None = None
    visible: Tensor | None = None
    heatmaps: Tensor | None = None
    features: Tensor | None = None
    global_orient: Tensor | None = None
    body_pose: Tensor | None = None
    betas: Tensor | None = None
    vertices: Tensor | None = None
    joint_names: tuple[str, ...] = ()
    detector_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.tensors().items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"PersonBatch: expected as many rows in every field, got {sizes}")

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are known."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        return next((len(value) for value in self.tensors().values()), 0)

    def __getitem__(self, rows: slice | Tensor) -> PersonBatch:
        """Some of the persons: a slice, or a tensor of indices or of booleans."""
        return self._with({name: value[rows] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str) -> PersonBatch:
        return self._with({name: value.to(device) for name, value in self.tensors().items()})

    def _with(self, changes: dict[str, Any]) -> PersonBatch:
        return replace(self, **changes)

    def need(self, *names: str) -> tuple[Tensor, ...]:
        """The named fields.

        Raises:
            ValueError: one of them is not known; names it.
        """
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"persons: expected {name}, got only {sorted(self.tensors())}")
        return tuple(getattr(self, name) for name in names)

    @staticmethod
    def cat(parts: Sequence[PersonBatch]) -> PersonBatch:
        """Batches one after the other; fields that one of them lacks are dropped."""
        if not parts:
            return PersonBatch()
        common = set.intersection(*(set(part.tensors()) for part in parts))
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in common}
        return PersonBatch(
            joint_names=parts[0].joint_names, detector_names=parts[0].detector_names, **joined
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` with an array a known field and the joints' names; it appears whole or
        not at all.

        Raises:
            ValueError: another ending, or no persons.
            OSError: the file cannot be written.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(f"{path}: expected a file name that ends in .npz")
        if not len(self):
            raise ValueError(f"{path}: no persons to write")
        arrays: dict[str, Any] = {k: v.detach().cpu().numpy() for k, v in self.tensors().items()}
        arrays |= {k: np.array(getattr(self, k)) for k in _NAMES if getattr(self, k)}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> PersonBatch:
        """Read what :meth:`save` wrote, or another program: any of the fields, of the shapes
        above. Nothing is unpickled; numbers become float32, ``visible`` booleans.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be read, has an unknown array, one of another shape or with
                values that are not finite, or no persons; names it.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        arrays = dict(read_npz(file, "biufU"))
        values: dict[str, Any] = {}
        for name in _NAMES:
            if name in arrays:
                names = arrays.pop(name)
                if names.ndim != 1 or names.dtype.kind != "U":
                    raise ValueError(f"{file}: {name}: expected a list of names")
                values[name] = tuple(str(joint) for joint in names)
        sizes = {
            letter: len(values[name])
            for letter, name in (("J", "joint_names"), ("K", "detector_names"))
            if name in values
        }
        for name, array in arrays.items():
            if name not in _SHAPES:
                raise ValueError(f"{file}: unknown array {name}")
            _check(f"{file}: {name}", array, _SHAPES[name], sizes)
            kind = np.bool_ if name == "visible" else np.float32
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(array, kind)
            if not np.isfinite(array).all():
                raise ValueError(f"{file}: {name}: expected finite values in float32")
            values[name] = torch.from_numpy(array.copy())
        if not arrays:
            raise ValueError(f"{file}: expected arrays of {', '.join(_SHAPES)}, found none")
        return PersonBatch(**values)


_NAMES = ("joint_names", "detector_names")
_SHAPES: dict[str, tuple[tuple[str | int, ...], ...]] = {
    "joints_3d": (("J", 3),),
    "joints_2d": (("J", 2),),
    "translation": ((3,),),
    "focal_length": ((),),
    "centre": ((2,),),
    "amplitude": (("K",),),
    "mean": (("K", 2),),
    "covariance": (("K", 2, 2),),
    "visible": (("K",),),
    "heatmaps": (("K", "H", "W"),),
    "features": (("C",), (3, "h", "w")),
    "global_orient": ((3, 3),),
    "body_pose": (("P", 3, 3),),
    "betas": (("S",),),
    "vertices": (("V", 3),),
}
"""Of each field, beyond its rows: the shapes it may have; a letter stands for one size."""


def _check(
    name: str,
    array: np.ndarray,
    shapes: tuple[tuple[str | int, ...], ...],
    sizes: dict[str, int],
) -> None:
    """ValueError unless the array has one of the shapes, with B rows as all the others."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers, got {array.dtype}")
    for shape in shapes:
        letters = ("B", *shape)
        if array.ndim == len(letters):
            known = [
                sizes.get(k, n) if isinstance(k, str) else k
                for k, n in zip(letters, array.shape, strict=True)
            ]
            if tuple(known) == array.shape and array.size:
                pairs = zip(letters, array.shape, strict=True)
                sizes.update({k: n for k, n in pairs if isinstance(k, str)})
                return
    wanted = " or ".join(
        "(" + ", ".join(f"{k}={sizes[k]}" if k in sizes else str(k) for k in ("B", *shape)) + ")"
        for shape in shapes
    )
    raise ValueError(f"{name}: expected shape {wanted}, got {array.shape}")
