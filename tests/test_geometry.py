"""Rotations and the camera: laws, small angles, gradients, errors. The official codes' numbers are
in tests/losses/test_golden.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp import geometry

close = torch.testing.assert_close


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def cross_matrix(v: Tensor) -> Tensor:
    x, y, z = v
    zero = torch.zeros_like(x)
    rows = ((zero, -z, y), (z, zero, -x), (-y, x, zero))
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 0.9e-3, 1.1e-3, 0.1, 1.0, 3.14, 7.0])
def test_axis_angle_is_the_matrix_exponential(angle: float) -> None:
    axis = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64)
    exact = torch.linalg.matrix_exp(cross_matrix(angle * axis))
    close(geometry.axis_angle_to_matrix(angle * axis), exact, rtol=0, atol=2e-15 * max(1, angle))
    single = geometry.axis_angle_to_matrix((angle * axis).float())
    close(single.double(), exact, rtol=0, atol=2e-7 * max(1, angle))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0])
def test_axis_angle_is_smooth(scale: float) -> None:
    leaf = (scale * random(2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(geometry.axis_angle_to_matrix, leaf)
    value = geometry.axis_angle_to_matrix(leaf)
    (first,) = torch.autograd.grad((value * random(2, 3, 3, seed=1)).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * first).sum(), leaf)
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("convention", geometry.ROTATION_6D)
@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_rotation_6d(convention: Any, number: int) -> None:
    x = random(number, 6).requires_grad_()
    matrix = geometry.rotation_6d_to_matrix(x, convention)
    close(matrix @ matrix.mT, torch.eye(3).double().expand(number, 3, 3))
    close(torch.linalg.det(matrix), torch.ones(number).double())
    again = geometry.matrix_to_rotation_6d(matrix, convention)
    close(geometry.rotation_6d_to_matrix(again, convention), matrix)
    first = x.reshape(number, 3, 2)[..., 0] if convention == "interleaved" else x[:, :3]
    ours = matrix[:, 0] if convention == "rows" else matrix[:, :, 0]
    close(ours, first / first.norm(dim=-1, keepdim=True))
    if number:
        assert torch.autograd.gradcheck(lambda v: geometry.rotation_6d_to_matrix(v, convention), x)
    official = geometry.rotation_6d_to_matrix(x, convention, official=True)
    assert torch.equal(official, matrix) == (number != 3 or convention == "rows")


def test_rotation_6d_of_no_rotation_is_finite() -> None:
    for six in (torch.zeros(6), torch.tensor([1.0, 2, 3, 2, 4, 6])):
        leaf = six.requires_grad_()
        matrix = geometry.rotation_6d_to_matrix(leaf)
        (gradient,) = torch.autograd.grad(matrix.sum(), leaf)
        assert torch.isfinite(matrix).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1e-5, 1e-3, 1.0, 2.0, 3.0, 3.1415926])
def test_axis_angle_of_a_matrix(angle: float) -> None:
    axis = random(50, 3)
    axis[:3] = torch.eye(3)
    axis = angle * axis / axis.norm(dim=-1, keepdim=True)
    matrix = geometry.axis_angle_to_matrix(axis).requires_grad_()
    back = geometry.matrix_to_axis_angle(matrix)
    close(back, axis, rtol=1e-7, atol=1e-14)
    (gradient,) = torch.autograd.grad(back.sum(), matrix)
    assert torch.isfinite(gradient).all()
    larger = axis * (1 + 2 * torch.pi / angle) if angle else axis
    close(
        geometry.matrix_to_axis_angle(geometry.axis_angle_to_matrix(larger)),
        axis,
        atol=1e-6,
        rtol=0,
    )


def test_any_leading_dimensions() -> None:
    for function, end in (
        *((geometry.axis_angle_to_matrix, (3,)), (geometry.quaternion_to_matrix, (4,))),
        *((geometry.rotation_6d_to_matrix, (6,)), (geometry.matrix_to_rotation_6d, (3, 3))),
    ):
        flat = random(10, *end)
        value = function(flat)
        assert torch.equal(
            function(flat.reshape(5, 2, *end)), value.reshape(5, 2, *value.shape[1:])
        )
        assert torch.equal(function(flat[0]), value[0])
    matrices = geometry.axis_angle_to_matrix(random(5, 2, 3))
    vectors = geometry.matrix_to_axis_angle(matrices)
    assert torch.equal(vectors[3, 1], geometry.matrix_to_axis_angle(matrices[3, 1]))


def test_quaternion() -> None:
    half = torch.tensor([0.4], dtype=torch.float64)
    axis = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64)
    quaternion = torch.cat((half.cos(), half.sin() * axis))
    exact = geometry.axis_angle_to_matrix(0.8 * axis)
    for scale in (1, -1, 3):
        close(geometry.quaternion_to_matrix(scale * quaternion), exact)


def test_projection() -> None:
    points, translation = random(2, 5, 3), random(2, 3) + 9 * torch.tensor([0, 0, 1.0]).double()
    focal, center = 500 + random(2, 2), random(2, 2, seed=1)
    rotation = geometry.axis_angle_to_matrix(random(2, 3))
    value = geometry.perspective_projection(points, translation, focal, center, rotation)
    for b in range(2):
        for n in range(5):
            p = rotation[b] @ points[b, n] + translation[b]
            close(value[b, n], focal[b] * p[:2] / p[2] + center[b])
    plain = geometry.perspective_projection(points, translation, focal)
    moved = geometry.perspective_projection(points, translation, focal, center)
    close(moved - plain, center[:, None].expand(2, 5, 2))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: geometry.rotation_6d_to_matrix([0.0] * 6), TypeError, "x: expected a tensor, got"),
        (
            lambda: geometry.rotation_6d_to_matrix(torch.zeros(6, dtype=torch.int64)),
            *(TypeError, "x: expected a floating dtype, got torch.int64"),
        ),
        (
            lambda: geometry.rotation_6d_to_matrix(torch.zeros(2, 5)),
            *(ValueError, r"x: expected shape \(..., 6\), got \(2, 5\)"),
        ),
        (
            lambda: geometry.rotation_6d_to_matrix(torch.zeros(6), "row"),
            *(ValueError, "convention: expected one of columns, interleaved, rows, got 'row'"),
        ),
        (
            lambda: geometry.matrix_to_rotation_6d(torch.zeros(3, 2)),
            *(ValueError, r"matrix: expected shape \(..., 3, 3\), got \(3, 2\)"),
        ),
        (lambda: geometry.axis_angle_to_matrix(torch.zeros(4)), ValueError, "axis_angle: expected"),
        (lambda: geometry.matrix_to_axis_angle(torch.zeros(4)), ValueError, "matrix: expected"),
        (lambda: geometry.quaternion_to_matrix(torch.zeros(3)), ValueError, "quaternion: expected"),
        (
            lambda: geometry.perspective_projection(
                torch.zeros(5, 3), torch.zeros(1, 3), torch.zeros(1, 2)
            ),
            *(ValueError, r"points: expected shape \(B, N, 3\), got \(5, 3\)"),
        ),
        (
            lambda: geometry.perspective_projection(
                torch.zeros(2, 5, 3), torch.zeros(1, 3), torch.zeros(2, 2)
            ),
            *(ValueError, r"translation: expected shape \(2, 3\), got \(1, 3\)"),
        ),
    ],
)
def test_bad_input(wrong: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()
