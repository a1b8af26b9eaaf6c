"""A batch of persons: what a detector saw of them and, where it is known, the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


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
