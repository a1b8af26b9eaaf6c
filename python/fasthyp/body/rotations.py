"""The forms in which a body's call takes rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp import geometry
from fasthyp.body.skinning import Rotation
from fasthyp.ops.skinning import ROTATIONS


def form_of(rotation: Rotation | None, pose2rot: bool) -> Rotation:
    """``rotation``, or smplx's two forms where it is None.

    Raises:
        ValueError: another name.
    """
    if rotation is None:
        return "axis_angle" if pose2rot else "matrix"
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation: expected one of {', '.join(ROTATIONS)}, got {rotation!r}")
    return rotation


def rotation_matrices(axis_angles: Tensor) -> Tensor:
    """(..., 3) rad -> (..., 3, 3), the exponential of the cross product's matrix."""
    x, y, z = axis_angles.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)
    return torch.linalg.matrix_exp(cross.unflatten(-1, (3, 3)))


def in_form(axis_angles: Tensor, form: Rotation) -> Tensor:
    """Axis angles (B, 3 J) as (B, 3 J), (B, J, 3, 3) or (B, 6 J)."""
    if form == "axis_angle":
        return axis_angles
    matrices = rotation_matrices(axis_angles.unflatten(1, (-1, 3)))
    if form == "matrix":
        return matrices
    return geometry.matrix_to_rotation_6d(matrices, form).flatten(1)


def to_matrices(pose: Tensor, form: Rotation) -> Tensor:
    """(B, J, 3, 3) of what :func:`in_form` gives."""
    if form == "axis_angle":
        return rotation_matrices(pose.unflatten(1, (-1, 3)))
    if form == "matrix":
        return pose
    return geometry.rotation_6d_to_matrix(pose.unflatten(1, (-1, 6)), form)
