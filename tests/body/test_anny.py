"""The free body against Anny's own computation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp import body
from fasthyp.body import joint_maps as maps
from tests.conftest import max_error

anny = pytest.importorskip("anny")


@pytest.fixture(scope="module")
def model() -> body.AnnyBody:
    return body.from_anny(dtype=torch.float64)


@pytest.fixture(scope="module")
def peer(model: body.AnnyBody) -> Any:
    return model._anny[0]


PEOPLE = {
    "gender": torch.tensor([0.1, 0.9, 0.5]),
    "age": torch.tensor([0.3, 0.8, 0.6]),
    "weight": torch.tensor([0.2, 0.9, 0.5]),
    "height": torch.tensor([0.9, 0.1, 0.5]),
}


def pose_of(batch: int, joints: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.4 * torch.randn(batch, joints, 3, generator=generator, dtype=torch.float64)


def test_equals_anny(model: body.AnnyBody, peer: Any) -> None:
    pose = pose_of(3, len(model.bone_labels))
    transl = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    deltas = torch.eye(4, dtype=torch.float64).repeat(3, pose.shape[1], 1, 1)
    deltas[..., :3, :3] = body.rotations.rotation_matrices(pose)
    deltas[:, 0, :3, 3] = transl
    want = peer(deltas, {k: v.double() for k, v in PEOPLE.items()})
    betas = model.shape(**PEOPLE)
    got = model(betas, pose, transl)
    assert got.vertices.shape == want["vertices"].shape
    assert max_error(got.vertices, want["vertices"]) < 1e-12
    assert max_error(got.joints, want["bone_poses"][..., :3, 3]) < 1e-12
    matrices = model(betas, deltas[..., :3, :3], transl, pose2rot=False)
    assert max_error(matrices.vertices, got.vertices) < 1e-12
    # joints without the mesh
    lean = model(betas, pose, transl, vertices=False)
    assert lean.vertices is None
    assert max_error(lean.joints, got.joints) < 1e-12
    keypoints = anny.KeypointsRegressor.coco(peer, list(maps.COCO17_JOINTS))(want)
    assert max_error(model.joints(betas, pose, transl, model.coco17), keypoints) < 1e-12
    assert max_error(model.joints(betas, pose, transl), got.joints) < 1e-12


def test_rest_and_batches(model: body.AnnyBody, peer: Any) -> None:
    rest = model()
    assert max_error(rest.vertices, peer()["vertices"]) < 1e-12
    one = model(model.shape(height=0.9), pose_of(4, len(model.bone_labels)))
    assert one.vertices.shape[0] == 4
    assert model(pose=pose_of(4, len(model.bone_labels))[:0]).vertices.shape[0] == 0
    with pytest.raises(ValueError, match="phenotypes: expected gender"):
        model.shape(shoe_size=0.3)
    with pytest.raises(ValueError, match="pose: expected axis angles"):
        model(pose=torch.zeros(1, 24, 3).double())
    with pytest.raises(ValueError, match="regressor: expected shape"):
        model.joints(regressor=torch.zeros(2, 6890).double())


def test_joints_lie_where_they_should(model: body.AnnyBody) -> None:
    """Left is +x, up is +z, and a person is as tall as people are."""
    body17 = model.joints(regressor=model.h36m17)[0]
    named = dict(zip(maps.H36M17_JOINTS, body17, strict=True))
    for part in ("hip", "knee", "ankle", "shoulder", "elbow", "wrist"):
        assert named[f"left_{part}"][0] > 0.02 > -0.02 > named[f"right_{part}"][0]
    chain = ("right_ankle", "right_knee", "right_hip", "spine", "thorax", "jaw", "head")
    heights = [float(named[name][2]) for name in chain]
    assert heights == sorted(heights)
    points = model().vertices[0]
    assert 1.4 < float(points[:, 2].max() - points[:, 2].min()) < 2.0
    assert float(named["head"][2]) == pytest.approx(float(points[:, 2].max()))


def test_gradients_reach_shape_and_pose(model: body.AnnyBody) -> None:
    betas = model.shape(height=0.7).requires_grad_()
    pose = pose_of(1, len(model.bone_labels)).requires_grad_()
    joints = model.joints(betas, pose, regressor=model.coco17)
    for grad in torch.autograd.grad(joints.square().sum(), (betas, pose)):
        assert torch.isfinite(grad).all()
        assert float(grad.abs().max()) > 0
    step = torch.randn(betas.shape, generator=torch.Generator().manual_seed(0)).double()
    grad = torch.autograd.grad(model(betas, pose).vertices.square().sum(), betas)[0]
    with torch.no_grad():
        near = [model(betas + h * step, pose).vertices.square().sum() for h in (1e-5, -1e-5)]
    assert float((grad * step).sum()) == pytest.approx(float(near[0] - near[1]) / 2e-5, rel=1e-5)


def test_float32(model: body.AnnyBody) -> None:
    single = copy.deepcopy(model).float()
    pose = pose_of(2, len(model.bone_labels))
    got = single(pose=pose.float())
    assert got.vertices.dtype == torch.float32
    assert max_error(got.vertices, model(pose=pose).vertices) < 1e-5
