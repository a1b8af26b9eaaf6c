"""STAR against its equations, written down here, on a file in its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from fasthyp import body, geometry
from tests.body import synthetic_models as synthetic

V, J, S = 90, 24, 12


def star_arrays() -> dict[str, Any]:
    """A file's: the pose blend shapes are those of another SMPL-like model, 93 of them."""
    arrays = synthetic.model(vertices=V, shapes=S)
    arrays["posedirs"] = arrays["posedirs"][:, :, : 4 * (J - 1) + 1]
    return arrays


@pytest.fixture
def arrays() -> dict[str, Any]:
    return star_arrays()


def bodies(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (10, 3 * J, 3)
    return tuple(  # type: ignore[return-value]
        torch.randn(count, n, generator=generator, dtype=torch.float64) for n in sizes
    )


def by_hand(
    arrays: dict[str, Any], betas: np.ndarray, pose: np.ndarray, transl: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One body, vertex by vertex; equations 3 to 6 of the paper and the code's pose feature."""
    rotations = Rotation.from_rotvec(pose.reshape(J, 3))
    shaped = arrays["v_template"] + arrays["shapedirs"][:, :, : len(betas)] @ betas
    rest = arrays["J_regressor"] @ shaped
    half = np.linalg.norm(pose.reshape(J, 3), axis=1, keepdims=True) / 2
    axis = pose.reshape(J, 3) / (2 * half)
    quaternions = np.concatenate([np.sin(half) * axis, np.cos(half) - 1], 1)
    feature = np.append(quaternions[1:].ravel(), betas[1])
    posed = shaped + arrays["posedirs"] @ feature
    turns, places = [rotations[0].as_matrix()], [rest[0]]
    for joint in range(1, J):
        above = synthetic.SMPL_PARENTS[joint]
        turns.append(turns[above] @ rotations[joint].as_matrix())
        places.append(places[above] + turns[above] @ (rest[joint] - rest[above]))
    vertices = np.zeros((V, 3))
    for vertex in range(V):
        for joint in range(J):
            moved = turns[joint] @ (posed[vertex] - rest[joint]) + places[joint]
            vertices[vertex] += arrays["weights"][vertex, joint] * moved
    return vertices + transl, np.array(places) + transl


def test_the_equations(arrays: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "neutral").mkdir()
    np.savez(tmp_path / "neutral" / "model.npz", **arrays)
    np.savez(tmp_path / "STAR_MALE.npz", **arrays)
    given = bodies(4)
    expected = [by_hand(arrays, *(t[i].numpy() for t in given)) for i in range(4)]
    exact = [torch.tensor(np.stack(part)) for part in zip(*expected, strict=True)]
    model = body.STAR(tmp_path, dtype=torch.float64)
    out = model(*given)
    # the norm of an angle to which 1e-8 is added
    torch.testing.assert_close(out.vertices, exact[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(out.joints, exact[1], rtol=0, atol=1e-7)
    male = body.STAR(tmp_path, "male")
    single = male(*(t.float() for t in given))
    torch.testing.assert_close(single.vertices.double(), exact[0], rtol=0, atol=2e-5)
    assert model.get_num_verts() == V
    assert model.num_betas == 10
    assert model(*given, vertices=False).vertices is None
    torch.testing.assert_close(model(*given, vertices=False).joints, exact[1], rtol=0, atol=1e-7)


def test_the_second_coefficient_is_a_feature(arrays: dict[str, Any]) -> None:
    model = body.STAR(arrays, dtype=torch.float64)
    betas = torch.zeros(2, 10).double()
    betas[1, 1] = 1
    out = model(betas)
    step = torch.tensor(arrays["shapedirs"][:, :, 1] + arrays["posedirs"][:, :, -1])
    torch.testing.assert_close(out.vertices[1] - out.vertices[0], step, rtol=0, atol=1e-12)
    moved = torch.tensor(arrays["J_regressor"] @ arrays["shapedirs"][:, :, 1])
    torch.testing.assert_close(out.joints[1] - out.joints[0], moved, rtol=0, atol=1e-12)


def test_joints_without_the_mesh_and_gradients(arrays: dict[str, Any]) -> None:
    model = body.STAR(arrays, dtype=torch.float64)
    given = tuple(t.requires_grad_() for t in bodies(3))
    regressor = torch.rand(5, V, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.einsum("kv,bvc->bkc", regressor, model(*given).vertices)
    found = model.joints(*given, regressor=regressor)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x.sin().sum(), given) for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    camera = body.Camera.weak(torch.tensor([[2.0, 0.1, 0.3]]).double())
    points, joints = model.project_joints(camera, *given, regressor=regressor)
    assert torch.equal(joints, found)
    assert torch.equal(points, camera(found))
    small = tuple(t[:1].detach().requires_grad_() for t in given)
    assert torch.autograd.gradcheck(lambda *a: model(*a).vertices[:, ::17], small)


def test_other_forms_of_rotations(arrays: dict[str, Any]) -> None:
    model = body.STAR(arrays, dtype=torch.float64)
    betas, pose, transl = bodies(3)
    # quaternions of matrices are those of angles up to pi
    pose = geometry.matrix_to_axis_angle(body.rotations.rotation_matrices(pose.view(3, J, 3)))
    expected = model(betas, pose, transl).vertices
    matrices = body.rotations.rotation_matrices(pose)
    found = model(betas, matrices, transl, pose2rot=False).vertices
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    for form in geometry.ROTATION_6D:
        six = geometry.matrix_to_rotation_6d(matrices, form)  # type: ignore[arg-type]
        found = model(betas, six, transl, rotation=form).vertices
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_bad_input(arrays: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_betas: expected at least 2, got 1"):
        body.STAR(arrays, num_betas=1)
    wrong = synthetic.model(vertices=V)
    with pytest.raises(body.ModelFileError, match=r"posedirs: expected shape \(90, 3, 93\)"):
        body.STAR(wrong)
    with pytest.raises(FileNotFoundError, match="holds no STAR_FEMALE file"):
        body.STAR(tmp_path, "female")
    with pytest.raises(ValueError, match="pose: expected axis angles of shape"):
        body.STAR(arrays)(pose=torch.zeros(2, 71))
