"""Linear blend skinning in plain PyTorch.

:func:`lbs` is the formula of SMPL (Loper et al., SIGGRAPH Asia 2015, equations 2 to 4 and 9), in
the steps and with the constants of smplx 0.1.28 (``smplx.lbs``). :func:`skin` is the same on the
folded arrays that the kernels take; ``csrc/skinning/skinning.h`` describes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROTATIONS = ("axis_angle", "matrix", "columns", "interleaved", "rows")
"""How the rotation of a joint is given. The last three are the 6D conventions: the first two
columns of the matrix one after the other (ProHMR), row by row (SPIN, POCO, HuManiFlow), and its
first two rows (PyTorch3D, HUMR)."""
NUMBERS = {"axis_angle": 3, "matrix": 9, "columns": 6, "interleaved": 6, "rows": 6}
WEAK, PERSPECTIVE = 3, 7
"""Numbers of a camera, see :func:`project`."""
TILE = 8
"""Points that are stored together."""


def rodrigues(axis_angle: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of axis-angle vectors (..., 3) as smplx computes them: 1e-8 is
    added to every component before the angle is taken."""
    angle = (axis_angle + 1e-8).norm(dim=-1, keepdim=True)
    x, y, z = (axis_angle / angle).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))
    eye = torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device)
    half = (angle / 2).sin()[..., None]
    return eye + angle.sin()[..., None] * cross + 2 * half * half * (cross @ cross)


def to_matrices(pose: Tensor, rotation: str) -> Tensor:
    """Rotation matrices (..., 3, 3) of the numbers (..., C) that ``rotation`` describes."""
    if rotation == "axis_angle":
        return rodrigues(pose)
    if rotation == "matrix":
        return pose.unflatten(-1, (3, 3))
    pairs = (
        pose.unflatten(-1, (3, 2)).mT if rotation == "interleaved" else pose.unflatten(-1, (2, 3))
    )
    a1, a2 = pairs.unbind(-2)
    b1 = normalize(a1, dim=-1)
    b2 = normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    b3 = torch.linalg.cross(b1, b2)
    return torch.stack((b1, b2, b3), dim=-2 if rotation == "rows" else -1)


def rigid_transforms(
    rotations: Tensor, rest: Tensor, parents: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations (B, J, 3, 3) relative to the parents and joints at rest (B, J, 3) -> posed joints
    (B, J, 3), and of each bone the rotation (B, J, 3, 3) and the translation (B, J, 3)."""
    turned, posed = [rotations[:, 0]], [rest[:, 0]]
    for j in range(1, rotations.shape[1]):
        p = parents[j]
        turned.append(turned[p] @ rotations[:, j])
        step = (rest[:, j] - rest[:, p])[..., None]
        posed.append((turned[p] @ step)[..., 0] + posed[p])
    joints, bones = torch.stack(posed, 1), torch.stack(turned, 1)
    return joints, bones, joints - (bones @ rest[..., None])[..., 0]


def project(points: Tensor, camera: Tensor) -> Tensor:
    """Projections (B, N, 2) of points (B, N, 3) by cameras (B, 3), s and t of the weak perspective
    s (x + t), or (B, 7), t, f and c of the perspective f (X + t) / (Z + t_z) + c."""
    if camera.shape[-1] == WEAK:
        return camera[:, None, :1] * (points[..., :2] + camera[:, None, 1:])
    moved = points + camera[:, None, :3]
    return camera[:, None, 3:5] * moved[..., :2] / moved[..., 2:] + camera[:, None, 5:]


def _batch(*tensors: Tensor | None) -> int:
    sizes = {t.shape[0] for t in tensors if t is not None}
    return min(sizes) if len(sizes) == 1 or 0 in sizes else max(sizes)


def _posed(
    betas: Tensor, matrices: Tensor, rest: Tensor, parents: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (B, F) with those of the pose, and what :func:`rigid_transforms` gives."""
    eye = torch.eye(3, dtype=betas.dtype, device=betas.device)
    features = torch.cat([betas, (matrices[:, 1:] - eye).flatten(1)], 1)
    return features, *rigid_transforms(matrices, rest, parents)


def lbs(
    betas: Tensor,
    pose: Tensor,
    transl: Tensor | None,
    v_template: Tensor,
    shapedirs: Tensor,
    posedirs: Tensor | None,
    J_regressor: Tensor,
    parents: list[int],
    lbs_weights: Tensor,
    rotation: str,
) -> tuple[Tensor, Tensor]:
    """Vertices (B, V, 3) and joints (B, J, 3) from the arrays of a model; pose is (B, J, C)."""
    batch = _batch(betas, pose, transl)
    matrices = to_matrices(pose, rotation).expand(batch, -1, -1, -1)
    betas = betas.expand(batch, -1)
    shaped = v_template + torch.einsum("bl,mkl->bmk", betas, shapedirs)
    rest = torch.einsum("bik,ji->bjk", shaped, J_regressor)
    features, joints, bones, shifts = _posed(betas, matrices, rest, parents)
    if posedirs is not None and posedirs.shape[0]:
        shaped = shaped + (features[:, betas.shape[1] :] @ posedirs).view_as(shaped)
    turns = torch.einsum("vj,bjik->bvik", lbs_weights, bones)
    moves = torch.einsum("vj,bji->bvi", lbs_weights, shifts)
    vertices = (turns @ shaped[..., None])[..., 0] + moves
    if transl is not None:
        vertices, joints = vertices + transl[:, None], joints + transl[:, None]
    return vertices, joints


def skin(
    betas: Tensor,
    pose: Tensor,
    transl: Tensor | None,
    parents: Tensor,
    rest: Tensor,
    rest_shapes: Tensor,
    row_starts: Tensor,
    rows: Tensor,
    columns: Tensor,
    base: Tensor,
    starts: Tensor,
    bones: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    lift: Tensor | None,
    pose_blend: bool,
    rotation: str,
    outputs: int,
    want_outputs: bool,
    camera: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, outputs, 3), empty unless wanted, joints (B, J, 3), and the projected outputs
    (B, outputs, 2), empty without cameras."""
    batch = _batch(betas, pose, transl, camera)
    matrices = to_matrices(pose, rotation).expand(batch, -1, -1, -1)
    betas = betas.expand(batch, -1)
    at_rest = rest + torch.einsum("bs,jis->bji", betas, rest_shapes)
    features, joints, turned, shifts = _posed(betas, matrices, at_rest, parents.tolist())
    shift: Any = 0 if transl is None else transl[:, None]
    joints = joints + shift
    if not want_outputs:
        return betas.new_empty(0), joints, betas.new_empty(0)
    points = starts.numel() - 1
    tiles = torch.repeat_interleave(torch.arange(len(base), device=bones.device), row_starts.diff())
    products = features[:, rows, None] * columns
    places = features.new_zeros(batch, *base.shape).index_add(1, tiles, products) + base
    places = places.reshape(batch, len(base) * TILE, 3)[:, :points]
    owners = torch.repeat_interleave(torch.arange(points, device=bones.device), starts.diff())
    dense = weights.new_zeros(2, points, parents.numel())
    dense = dense.index_put(
        (torch.arange(2, device=bones.device)[:, None], owners, bones), weights.T
    )
    turns = torch.einsum("pj,bjik->bpik", dense[0], turned)
    found = (turns @ places[..., None])[..., 0] + torch.einsum("pj,bji->bpi", dense[1], shifts)
    if targets is not None:
        found = found.new_zeros(batch, outputs, 3).index_add(1, targets, found)
    found = found + (shift if lift is None else lift[:, None] * shift)
    return found, joints, betas.new_empty(0) if camera is None else project(found, camera)
