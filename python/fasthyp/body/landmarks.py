"""Points on the faces of a mesh: fixed ones, and a face's contour, which depends on its turn."""

from __future__ import annotations

import torch
from torch import Tensor


def on_faces(vertices: Tensor, faces: Tensor, face: Tensor, weights: Tensor) -> Tensor:
    """Points with given barycentric coordinates.

    Args:
        vertices: (B, V, 3).
        faces: (F, 3) vertices of each triangle.
        face: (L,) or (B, L), which triangle.
        weights: (L, 3) or (B, L, 3), of its vertices.

    Returns:
        (B, L, 3).
    """
    batch = vertices.shape[0]
    corners = faces[face].expand(batch, -1, 3)
    rows = torch.arange(batch, device=vertices.device)[:, None, None]
    return (vertices[rows, corners] * weights[..., None]).sum(2)


def contour_entry(pose: Tensor, neck_chain: Tensor, pose2rot: bool) -> Tensor:
    """Which of the 79 entries of SMPL-X's contour tables belongs to each body: by the turn of the
    neck about the vertical, in whole degrees, 0 to 39 to one side and 40 to 78 to the other.

    Args:
        pose: (B, 3 J) axis angles or (B, J, 3, 3) matrices of all joints.
        neck_chain: (N,) joints from the neck to the root.

    Returns:
        (B,) int64.
    """
    turns = pose.detach()
    if pose2rot:
        turns = rotation_matrices(turns.unflatten(1, (-1, 3)))
    turn = torch.eye(3, dtype=turns.dtype, device=turns.device).expand(len(turns), 3, 3)
    for joint in neck_chain.tolist():
        turn = turns[:, joint] @ turn
    forward = turn[:, :2, 0].norm(dim=1)
    angle = -torch.atan2(-turn[:, 2, 0], forward) * (180 / torch.pi)
    degrees = angle.clamp(max=39).round().long()
    return torch.where(degrees >= 0, degrees, (39 - degrees).clamp(max=78))


def rotation_matrices(axis_angles: Tensor) -> Tensor:
    """(..., 3) rad -> (..., 3, 3), the exponential of the cross product's matrix."""
    x, y, z = axis_angles.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1)
    return torch.linalg.matrix_exp(cross.unflatten(-1, (3, 3)))
