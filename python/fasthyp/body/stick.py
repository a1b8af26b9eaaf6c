"""A stick body: SMPL's tree of 24 joints and a few points of the head and the feet, no mesh.

It stands in for SMPL where no licensed file is at hand: the same joints, rotations and call;
lengths that are linear in ten shape coefficients, rotations found in closed form from the 17 joints
of Human3.6M. Rest pose as SMPL's: a T, x to the person's left, y up, z forward, metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fasthyp.body.arrays import BodyArrays
from fasthyp.body.linear import LinearBody
from fasthyp.skeleton import H36M17_JOINTS, SMPL24_JOINTS, SMPL_PARENTS

STICK_SHAPES = (
    *("pelvis", "thigh", "shank", "foot", "lower_trunk", "upper_trunk"),
    *("shoulders", "head", "upper_arm", "forearm"),
)
"""What each shape coefficient lengthens."""

SHAPE_STEP = 0.05
"""One unit of a coefficient is this share of the length."""

# Each point hangs at an offset from another one; the offset grows with a shape coefficient. Points
# beyond SMPL's 24 move with the joint that they hang on. Left side; the right one is its mirror.
_CENTRE = (
    ("spine1", "pelvis", "lower_trunk", (0.0, 0.10, 0.0)),
    ("spine2", "spine1", "lower_trunk", (0.0, 0.115, 0.0)),
    ("spine3", "spine2", "upper_trunk", (0.0, 0.145, 0.0)),
    ("neck", "spine3", "upper_trunk", (0.0, 0.14, 0.0)),
    ("head", "neck", "head", (0.0, 0.13, 0.04)),
    ("head_top", "head", "head", (0.0, 0.10, -0.05)),
    ("nose", "head", "head", (0.0, 0.025, 0.05)),
)
_LEFT = (
    ("hip", "pelvis", "pelvis", (0.085, 0.0, 0.0)),
    ("knee", "hip", "thigh", (0.0, -0.41, 0.0)),
    ("ankle", "knee", "shank", (0.0, -0.425, 0.0)),
    ("foot", "ankle", "foot", (0.0, -0.06, 0.12)),
    ("big_toe", "foot", "foot", (-0.01, 0.0, 0.06)),
    ("heel", "ankle", "foot", (0.0, -0.06, -0.05)),
    ("collar", "neck", "shoulders", (0.05, 0.0, 0.0)),
    ("shoulder", "collar", "shoulders", (0.138, 0.01, -0.015)),
    ("elbow", "shoulder", "upper_arm", (0.287, 0.0, 0.0)),
    ("wrist", "elbow", "forearm", (0.287, 0.0, 0.0)),
    ("hand", "wrist", "forearm", (0.08, 0.0, 0.0)),
    ("eye", "head", "head", (0.03, 0.055, 0.03)),
    ("ear", "head", "head", (0.07, 0.045, -0.055)),
)
_BILATERAL = ("pelvis", "neck", "head")  # points of the middle on which points of a side hang


def _points() -> dict[str, tuple[str, str, tuple[float, float, float]]]:
    found = {name: (anchor, shape, offset) for name, anchor, shape, offset in _CENTRE}
    for side, sign in (("left", 1.0), ("right", -1.0)):
        for name, anchor, shape, (x, y, z) in _LEFT:
            anchor = anchor if anchor in _BILATERAL else f"{side}_{anchor}"
            found[f"{side}_{name}"] = (anchor, shape, (sign * x, y, z))
    return found


_POINTS = _points()

STICK_POINTS = (*SMPL24_JOINTS, *sorted(_POINTS.keys() - set(SMPL24_JOINTS)))
"""The body's vertices: SMPL's 24 joints, both ears, eyes, heels and toes, top of the head, nose."""

_H36M_POINT = {"spine": "spine2", "thorax": "neck", "jaw": "head", "head": "head_top"}
_MPII_POINT = {"thorax": "neck", "upper_neck": "head"}

H36M17_POINTS = tuple(STICK_POINTS.index(_H36M_POINT.get(n, n)) for n in H36M17_JOINTS)
"""Which of the vertices are Human3.6M's 17 joints: SMPL's "neck" is the base of the neck, its
"head" the chin."""


def point_indices(names: Sequence[str]) -> tuple[int, ...]:
    """Vertices of detector joints: COCO's or MPII's names, or those of Human3.6M's 17 alone, in any
    order.

    Raises:
        ValueError: the body has no such point.
    """
    if set(names) <= set(H36M17_JOINTS):
        return tuple(H36M17_POINTS[H36M17_JOINTS.index(name)] for name in names)
    wanted = [_MPII_POINT.get(name, name) for name in names]
    for name in wanted:
        if name not in STICK_POINTS:
            raise ValueError(f"joints: the stick body has no {name!r}")
    return tuple(STICK_POINTS.index(name) for name in wanted)


def stick_body(dtype: torch.dtype = torch.float32) -> LinearBody:
    """The body: 34 vertices, 24 joints, 10 shape coefficients, no faces, no pose blend shapes."""
    rest = np.zeros((len(STICK_POINTS), 3))
    shapes = np.zeros((len(STICK_POINTS), 3, len(STICK_SHAPES)))
    done = {"pelvis"}
    while len(done) < len(STICK_POINTS):
        for name, (anchor, shape, offset) in _POINTS.items():
            if anchor in done and name not in done:
                point, base = STICK_POINTS.index(name), STICK_POINTS.index(anchor)
                rest[point] = rest[base] + offset
                shapes[point] = shapes[base]
                shapes[point, :, STICK_SHAPES.index(shape)] += SHAPE_STEP * np.array(offset)
                done.add(name)
    weights = np.zeros((len(STICK_POINTS), len(SMPL24_JOINTS)))
    for point, name in enumerate(STICK_POINTS):
        bone = name if name in SMPL24_JOINTS else _POINTS[name][0]
        weights[point, SMPL24_JOINTS.index(bone)] = 1
    arrays = BodyArrays(
        v_template=rest,
        shapedirs=shapes,
        posedirs=np.zeros((*rest.shape, 0)),
        J_regressor=np.eye(len(SMPL24_JOINTS), len(STICK_POINTS)),
        parents=np.array(SMPL_PARENTS, np.int64),
        weights=weights,
        faces=np.zeros((0, 3), np.int64),
        source="stick body",
    )
    return LinearBody(arrays, dtype=dtype)


def h36m17_regressor(dtype: torch.dtype = torch.float32) -> Tensor:
    """(17, 34): Human3.6M's joints from the stick body's vertices."""
    return torch.eye(len(STICK_POINTS), dtype=dtype)[list(H36M17_POINTS)]


def fit_stick_shape(poses: Tensor) -> Tensor:
    """Shape coefficients (10,) of one person: from the median length of each bone, left and right
    alike.

    Args:
        poses: (N, 17, 3) metres, Human3.6M's joints, any axes.
    """
    at = H36M17_JOINTS.index
    template = stick_body(torch.float64).v_template
    pairs = {
        "pelvis": (("left_hip", "right_hip"),),
        "thigh": (("left_hip", "left_knee"), ("right_hip", "right_knee")),
        "shank": (("left_knee", "left_ankle"), ("right_knee", "right_ankle")),
        "lower_trunk": (("pelvis", "spine"),),
        "upper_trunk": (("spine", "thorax"),),
        "shoulders": (("thorax", "left_shoulder"), ("thorax", "right_shoulder")),
        "head": (("thorax", "jaw"), ("jaw", "head")),
        "upper_arm": (("left_shoulder", "left_elbow"), ("right_shoulder", "right_elbow")),
        "forearm": (("left_elbow", "left_wrist"), ("right_elbow", "right_wrist")),
    }
    betas = torch.zeros(len(STICK_SHAPES), dtype=torch.float64, device=poses.device)
    for name, bones in pairs.items():
        seen = at_rest = 0.0
        for a, b in bones:
            seen += float((poses[:, at(a)] - poses[:, at(b)]).double().norm(dim=-1).median())
            ends = template[[H36M17_POINTS[at(a)], H36M17_POINTS[at(b)]]]
            at_rest += float((ends[0] - ends[1]).norm())
        betas[STICK_SHAPES.index(name)] = (seen / at_rest - 1) / SHAPE_STEP
    return betas.to(poses.dtype)


def fit_stick_pose(poses: Tensor, betas: Tensor) -> Tensor:
    """Rotations of the stick body for given joints, in closed form.

    From the root outwards each bone is turned the shortest way from where its parent leaves it to
    where the next joint is seen, so a bone's direction is exact and an error of its length is not
    passed on. Pelvis and upper trunk have frames of several joints: the pelvis that of the line
    between the hips, turned so that its y axis is nearest to the spine; the upper trunk that of
    the spine, its x axis nearest to the line between the shoulders. Hands, feet and the joints of
    the spine between those seen keep the rotation of their parent.

    Args:
        poses: (N, 17, 3) metres, Human3.6M's joints, any right-handed axes, pelvis at the origin.
        betas: (N, 10) or (1, 10).

    Returns:
        (N, 24, 3, 3) rotations relative to the parent; of the root from the rest pose's axes to
        those of ``poses``.

    Raises:
        ValueError: a pose whose pelvis or upper trunk has no frame.
    """
    dtype = poses.dtype
    seen = dict(zip(H36M17_JOINTS, poses.double().unbind(1), strict=True))
    body = stick_body(torch.float64).to(poses.device)
    offset_of = body.v_template + torch.einsum("vcs,ns->nvc", body.shapedirs, betas.double())
    rest = dict(zip(STICK_POINTS, offset_of.expand(len(poses), -1, -1).unbind(1), strict=True))
    parents = {name: SMPL24_JOINTS[SMPL_PARENTS[k]] for k, name in enumerate(SMPL24_JOINTS) if k}
    aims = {"spine1": ("spine2", "spine"), "neck": ("head", "jaw"), "head": ("head_top", "head")}
    for side in ("left", "right"):
        chain = ("collar", "shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")
        for joints in chain:
            for name, tip in pairwise(joints):
                aims[f"{side}_{name}"] = (f"{side}_{tip}", f"{side}_{tip}")

    turn = {"pelvis": _frame(seen["left_hip"] - seen["right_hip"], seen["spine"], 0)}
    place = {"pelvis": torch.zeros_like(poses[:, 0], dtype=torch.float64)}
    local = [turn["pelvis"]]
    for name in SMPL24_JOINTS[1:]:
        parent = turn[parents[name]]
        place[name] = place[parents[name]] + _apply(parent, rest[name] - rest[parents[name]])
        if name == "spine2":
            across = seen["left_shoulder"] - seen["right_shoulder"]
            turn[name] = _frame(across, seen["thorax"] - place[name], 1)
        elif name in aims:
            tip, target = aims[name]
            bone = _apply(parent, rest[tip] - rest[name])
            turn[name] = swing(bone, seen[target] - place[name]) @ parent
        else:
            turn[name] = parent
        local.append(parent.mT @ turn[name])
    rotations = torch.stack(local, 1)
    degenerate = (torch.linalg.det(rotations) < 0.5).any(1)
    if degenerate.any():
        raise ValueError(
            f"poses: the hips and the spine, or the spine and the shoulders, of pose "
            f"{int(degenerate.nonzero()[0, 0])} are in one line"
        )
    return rotations.to(dtype)


def swing(start: Tensor, end: Tensor) -> Tensor:
    """The smallest rotations (..., 3, 3) that turn vectors (..., 3) to the direction of others.

    Half a turn is about any axis across; the identity where a vector is zero.
    """
    a = torch.nn.functional.normalize(start, dim=-1)
    b = torch.nn.functional.normalize(end, dim=-1)
    # Two reflections: across the plane between them, after that of a itself (Householder).
    middle = a + b
    opposite = middle.norm(dim=-1, keepdim=True) < 1e-7
    least = a.abs().argmin(-1, keepdim=True)
    any_axis = torch.zeros_like(a).scatter_(-1, least, 1.0)
    across = torch.nn.functional.normalize(torch.linalg.cross(a, any_axis, dim=-1), dim=-1)
    middle = torch.where(opposite, across, torch.nn.functional.normalize(middle, dim=-1))
    eye = torch.eye(3, dtype=a.dtype, device=a.device)
    half_turn = 2 * middle[..., :, None] * middle[..., None, :] - eye
    first = torch.where(opposite, across, a)
    other = 2 * first[..., :, None] * first[..., None, :] - eye
    # A half turn about a, then one about the middle of a and b.
    rotation = torch.where(opposite[..., None], half_turn, half_turn @ other)
    still = (start.norm(dim=-1) == 0) | (end.norm(dim=-1) == 0)
    return torch.where(still[..., None, None], eye, rotation)


def _frame(x: Tensor, y: Tensor, exact: int) -> Tensor:
    """Rotations whose x and y axes are those given, the one numbered ``exact`` as it is."""
    x, y = torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1)
    z = torch.nn.functional.normalize(torch.linalg.cross(x, y, dim=-1), dim=-1)
    if exact == 0:
        y = torch.linalg.cross(z, x, dim=-1)
    else:
        x = torch.linalg.cross(y, z, dim=-1)
    return torch.stack([x, y, z], -1)


def _apply(rotation: Tensor, vector: Tensor) -> Tensor:
    return (rotation @ vector[..., None])[..., 0]
