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


def contour_entry(turns: Tensor, neck_chain: Tensor) -> Tensor:
    """Which of the 79 entries of SMPL-X's contour tables belongs to each body: by the turn of the
    neck about the vertical, in whole degrees, 0 to 39 to one side and 40 to 78 to the other.

    Args:
        turns: (B, J, 3, 3) rotations of all joints.
        neck_chain: (N,) joints from the neck to the root.

    Returns:
        (B,) int64.
    """
    turns = turns.detach()
    turn = torch.eye(3, dtype=turns.dtype, device=turns.device).expand(len(turns), 3, 3)
    for joint in neck_chain.tolist():
        turn = turns[:, joint] @ turn
    forward = turn[:, :2, 0].norm(dim=1)
    angle = -torch.atan2(-turn[:, 2, 0], forward) * (180 / torch.pi)
    degrees = angle.clamp(max=39).round().long()
    return torch.where(degrees >= 0, degrees, (39 - degrees).clamp(max=78))
