"""Stand-in in plain PyTorch, to be replaced wholesale by the skinning kernels' front end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _rotations(vectors: Tensor) -> Tensor:
    """Rodrigues' formula for (..., 3), with the 1e-8 that smplx adds before the norm."""
    angle = (vectors + 1e-8).norm(dim=-1, keepdim=True)
    x, y, z = (vectors / angle).unbind(-1)
    zero = torch.zeros_like(x)
    k = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    sine, cosine = angle.sin()[..., None], angle.cos()[..., None]
    return torch.eye(3, dtype=k.dtype, device=k.device) + sine * k + (1 - cosine) * (k @ k)


def lbs(
    betas: Tensor,
    pose: Tensor,
    v_template: Tensor,
    shapedirs: Tensor,
    posedirs: Tensor,
    J_regressor: Tensor,
    parents: Tensor,
    lbs_weights: Tensor,
    pose2rot: bool = True,
) -> tuple[Tensor, Tensor]:
    """Vertices (B, V, 3) and posed joints (B, J, 3)."""
    joints = J_regressor.shape[0]
    batch = max(betas.shape[0], pose.shape[0]) if min(betas.shape[0], pose.shape[0]) else 0
    betas, pose = betas.expand(batch, -1), pose.expand(batch, *pose.shape[1:])
    turn = (
        _rotations(pose.reshape(batch, joints, 3))
        if pose2rot
        else pose.reshape(batch, joints, 3, 3)
    )
    shaped = v_template + torch.einsum("vcs,bs->bvc", shapedirs, betas)
    rest = J_regressor @ shaped
    eye = torch.eye(3, dtype=turn.dtype, device=turn.device)
    feature = (turn[:, 1:] - eye).reshape(batch, 9 * (joints - 1))
    posed = shaped
    if posedirs.shape[0]:
        posed = shaped + (feature @ posedirs).unflatten(1, (-1, 3))
    rotation, place = [turn[:, 0]], [rest[:, 0]]
    for joint in range(1, joints):
        parent = int(parents[joint])
        offset = rest[:, joint] - rest[:, parent]
        rotation.append(rotation[parent] @ turn[:, joint])
        place.append(place[parent] + (rotation[parent] @ offset[..., None])[..., 0])
    bones, heads = torch.stack(rotation, 1), torch.stack(place, 1)
    shift = heads - (bones @ rest[..., None])[..., 0]
    blended = torch.einsum("vj,bjkl->bvkl", lbs_weights, bones)
    moved = (blended @ posed[..., None])[..., 0]
    return moved + torch.einsum("vj,bjk->bvk", lbs_weights, shift), heads


@dataclass
class FoldedJoints:
    """A regressor of posed vertices."""

    model: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    regressor: Tensor


def fold_joints(
    v_template: Tensor,
    shapedirs: Tensor,
    posedirs: Tensor,
    J_regressor: Tensor,
    parents: Tensor,
    lbs_weights: Tensor,
    regressor: Tensor,
) -> FoldedJoints:
    """Prepare :func:`regress_joints` for a regressor (K, V)."""
    model = (v_template, shapedirs, posedirs, J_regressor, parents, lbs_weights)
    return FoldedJoints(model, regressor)


def regress_joints(
    folded: FoldedJoints,
    betas: Tensor,
    pose: Tensor,
    transl: Tensor | None = None,
    pose2rot: bool = True,
) -> Tensor:
    """(B, K, 3) m: the regressor applied to the posed vertices; transl moves them first."""
    vertices, _ = lbs(betas, pose, *folded.model, pose2rot=pose2rot)
    if transl is not None:
        vertices = vertices + transl[:, None]
    return folded.regressor @ vertices
