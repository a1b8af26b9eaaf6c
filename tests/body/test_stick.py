"""The stick body: its shape is linear in lengths, and its rotations are found from joints."""

from __future__ import annotations

import pytest
import roma
import torch
from torch import Tensor

from fasthyp.body import (
    STICK_POINTS,
    STICK_SHAPES,
    fit_stick_pose,
    fit_stick_shape,
    h36m17_regressor,
    stick_body,
)
from fasthyp.body.stick import H36M17_POINTS, SHAPE_STEP, point_indices, swing
from fasthyp.skeleton import (
    COCO13_JOINTS,
    COCO17_JOINTS,
    H36M17_JOINTS,
    MPII16_JOINTS,
    SMPL24_JOINTS,
    SMPL_PARENTS,
)
from tests.synthetic import people17


def posed(betas: Tensor, rotations: Tensor) -> Tensor:
    vertices = stick_body(betas.dtype)(betas, rotations, pose2rot=False).vertices
    assert vertices is not None
    return vertices


def random_rotations(number: int, degrees: float = 40.0) -> Tensor:
    """(N, 24, 3, 3) about axes across the bones, for the joints that are seen to turn."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(number, 24, 3, generator=generator, dtype=torch.float64)
    vector *= torch.pi / 180 * degrees / 1.7
    still = ("foot", "hand", "ankle", "wrist", "spine1", "spine3", "collar")
    for joint, name in enumerate(SMPL24_JOINTS):
        if name.endswith(still):
            vector[:, joint] = 0
    return roma.rotvec_to_rotmat(vector)


def test_names_and_tree() -> None:
    body = stick_body()
    assert STICK_POINTS[:24] == SMPL24_JOINTS
    assert body.parents.tolist() == list(SMPL_PARENTS)
    vertices = body().vertices
    assert vertices is not None
    assert torch.equal(body().joints, vertices[:, :24])
    place = dict(zip(STICK_POINTS, vertices[0], strict=True))
    # SMPL's rest pose: x to the left, y up, z forward.
    assert place["left_wrist"][0] > 0.5 > place["right_wrist"][0] + 1
    assert place["head_top"][1] > 0.6 > place["left_ankle"][1] + 1.3
    assert place["left_big_toe"][2] > place["left_heel"][2] + 0.1
    mirrored = [
        n.replace("left", "_").replace("right", "left").replace("_", "right", 1)
        if "left" in n
        else n.replace("right", "left")
        for n in STICK_POINTS
    ]
    other = torch.stack([place[name] for name in mirrored])
    assert torch.equal(other * torch.tensor([-1.0, 1.0, 1.0]), vertices[0])


def test_detectors_joints() -> None:
    assert point_indices(H36M17_JOINTS) == H36M17_POINTS
    names = [STICK_POINTS[k] for k in point_indices(MPII16_JOINTS)]
    assert names[6:10] == ["pelvis", "neck", "head", "head_top"]
    assert [STICK_POINTS[k] for k in point_indices(COCO17_JOINTS)] == list(COCO17_JOINTS)
    assert len(point_indices(COCO13_JOINTS)) == 13
    with pytest.raises(ValueError, match="no 'left_thumb'"):
        point_indices(("left_thumb",))
    picked = h36m17_regressor() @ torch.arange(34.0)
    assert picked.tolist() == list(H36M17_POINTS)


def test_a_coefficient_lengthens_its_bones_alone() -> None:
    place = STICK_POINTS.index
    rest = posed(torch.zeros(1, 10), torch.eye(3).expand(1, 24, 3, 3))[0]
    beta = torch.zeros(1, 10)
    beta[0, STICK_SHAPES.index("thigh")] = 2
    longer = posed(beta, torch.eye(3).expand(1, 24, 3, 3))[0]
    for a, b, factor in (
        ("left_hip", "left_knee", 1 + 2 * SHAPE_STEP),
        ("right_hip", "right_knee", 1 + 2 * SHAPE_STEP),
        ("left_knee", "left_ankle", 1.0),
        ("neck", "head", 1.0),
    ):
        before, after = (p[place(a)] - p[place(b)] for p in (rest, longer))
        torch.testing.assert_close(after.norm(), factor * before.norm())


def test_pose_is_found_again() -> None:
    """From joints that a body of this shape made, they are made again."""
    betas = torch.randn(20, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = random_rotations(20)
    joints = posed(betas, truth)[:, H36M17_POINTS]
    found = fit_stick_pose(joints, betas)
    assert found.dtype == torch.float64
    eye = torch.eye(3, dtype=torch.float64).expand_as(found)
    torch.testing.assert_close(found.mT @ found, eye, rtol=0, atol=1e-12)
    assert (torch.linalg.det(found) > 0).all()
    torch.testing.assert_close(posed(betas, found)[:, H36M17_POINTS], joints, rtol=0, atol=1e-9)


def test_shape_is_found_again() -> None:
    beta = torch.randn(1, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    joints = posed(beta.expand(9, -1), random_rotations(9))[:, H36M17_POINTS]
    found = fit_stick_shape(joints)
    seen = [k for k, name in enumerate(STICK_SHAPES) if name not in ("foot", "shoulders", "head")]
    torch.testing.assert_close(found[seen], beta[0, seen], rtol=0, atol=1e-6)
    assert found[STICK_SHAPES.index("foot")] == 0


def test_people_are_reproduced_within_millimetres() -> None:
    poses = people17(30)
    shape = fit_stick_shape(poses)[None]
    joints = posed(shape.expand(30, -1), fit_stick_pose(poses, shape))[:, H36M17_POINTS]
    assert (joints - poses).norm(dim=-1).mean() < 0.02


def test_swing() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    a[0], b[0] = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, -1.0, 0.0])  # half a turn
    a[1], b[1] = a[2], 3 * a[2]  # none
    turn = swing(a, b)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close((turn @ unit(a, dim=-1)[..., None])[..., 0], unit(b, dim=-1))
    torch.testing.assert_close(turn.mT @ turn, torch.eye(3).double().expand_as(turn))
    assert (torch.linalg.det(turn) > 0).all()
    # The smallest rotation: its angle is that between the vectors.
    angle = roma.rotmat_to_rotvec(turn[1:]).norm(dim=-1)
    between = torch.acos((unit(a, dim=-1) * unit(b, dim=-1)).sum(-1).clamp(-1, 1))[1:]
    torch.testing.assert_close(angle, between, rtol=0, atol=1e-7)
    assert torch.equal(swing(torch.zeros(1, 3), b[:1].float())[0], torch.eye(3))


def test_refuses_a_pose_in_one_line() -> None:
    poses = people17(3)
    poses[1, H36M17_JOINTS.index("spine")] = 2 * poses[1, H36M17_JOINTS.index("left_hip")]
    with pytest.raises(ValueError, match="pose 1 are in one line"):
        fit_stick_pose(poses, torch.zeros(1, 10))
