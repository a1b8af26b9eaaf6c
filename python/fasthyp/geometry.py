"""Rotations and the pinhole camera, in the conventions of the published models."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

Rotation6D = Literal["columns", "interleaved", "rows"]
ROTATION_6D = ("columns", "interleaved", "rows")


def rotation_6d_to_matrix(
    x: Tensor, convention: Rotation6D = "columns", *, official: bool = False
) -> Tensor:
    """Rotation matrices from two vectors each, by Gram-Schmidt.

    Zhou et al., "On the Continuity of Rotation Representations in Neural Networks", CVPR 2019.

    Args:
        x: (..., 6) float, any two vectors a1, a2 that are not parallel. Parallel ones give a matrix
            with zeros, not NaN.
        convention: ``"columns"``, ProHMR's: x = [a1, a2], the first two columns of the matrix;
            ``"interleaved"``, POCO's and SPIN's: x = (a1_x, a2_x, a1_y, ...), the first two columns
            row by row; ``"rows"``, PyTorch3D's and HUMR's: x = [a1, a2], the first two rows.
        official: as ProHMR and POCO compute exactly three rotations: their cross product, written
            without a dimension, then runs across the three. Wrong, but what they do; other numbers
            of rotations and ``"rows"`` are not concerned.

    Returns:
        (..., 3, 3).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("x", x, (6,))
    _check_convention(convention)
    pairs = x.unflatten(-1, (3, 2)).mT if convention == "interleaved" else x.unflatten(-1, (2, 3))
    a1, a2 = pairs.unbind(-2)
    b1 = normalize(a1, dim=-1)
    b2 = normalize(a2 - (b1 * a2).sum(-1, keepdim=True) * b1, dim=-1)
    if official and convention != "rows" and b1.numel() == 9:
        b3 = torch.linalg.cross(b1.reshape(3, 3), b2.reshape(3, 3), dim=0).reshape(b1.shape)
    else:
        b3 = torch.linalg.cross(b1, b2)
    return torch.stack((b1, b2, b3), dim=-2 if convention == "rows" else -1)


def matrix_to_rotation_6d(matrix: Tensor, convention: Rotation6D = "columns") -> Tensor:
    """The six numbers of each matrix (..., 3, 3) in a convention of :func:`rotation_6d_to_matrix`.

    POCO's ``matrix_to_rotation_6d`` is PyTorch3D's, ``"rows"``, and not the inverse of its own
    ``rot6d_to_rotmat``, ``"interleaved"``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("matrix", matrix, (3, 3))
    _check_convention(convention)
    if convention == "rows":
        return matrix[..., :2, :].flatten(-2)
    columns = matrix[..., :2]
    return (columns if convention == "interleaved" else columns.mT).flatten(-2)


def axis_angle_to_matrix(axis_angle: Tensor, *, official: bool = False) -> Tensor:
    """Rotation matrices (..., 3, 3) of axis-angle vectors (..., 3) in radians, by Rodrigues'
    formula, smooth at zero.

    Args:
        official: as ProHMR and POCO, which add 1e-8 to every component before they take the angle.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("axis_angle", axis_angle, (3,))
    if official:
        angle = (axis_angle + 1e-8).norm(dim=-1, keepdim=True)
        half = angle / 2
        return quaternion_to_matrix(
            torch.cat((half.cos(), half.sin() * axis_angle / angle), dim=-1)
        )
    square = (axis_angle * axis_angle).sum(-1)[..., None, None]
    small = square < 1e-6
    safe = torch.where(small, 1, square)
    angle = safe.sqrt()
    # sin(t) / t and (1 - cos(t)) / t^2, by their series near zero
    sine = torch.where(small, 1 - square / 6 * (1 - square / 20), angle.sin() / angle)
    half_sine = (angle / 2).sin()
    cosine = torch.where(
        small, 0.5 - square / 24 * (1 - square / 30), 2 * half_sine * half_sine / safe
    )
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).unflatten(-1, (3, 3))
    identity = torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device)
    return identity + sine * cross + cosine * (cross @ cross)


def matrix_to_axis_angle(matrix: Tensor) -> Tensor:
    """The axis-angle vectors (..., 3), of at most pi radians, of rotation matrices (..., 3, 3).

    Smooth at zero; at pi, where the axis has two signs, one of them. By way of the quaternion, of
    whose components the largest is computed first (Shepperd, 1978).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("matrix", matrix, (3, 3))
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    rows = (
        *(1 + a + e + i, h - f, c - g, d - b),
        *(h - f, 1 + a - e - i, d + b, c + g),
        *(c - g, d + b, 1 - a + e - i, f + h),
        *(d - b, c + g, f + h, 1 - a - e + i),
    )
    products = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))  # 4 q q^T
    largest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    row = products.gather(-2, largest.expand(*largest.shape[:-1], 4))[..., 0, :]
    quaternion = normalize(row, dim=-1)
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    real, vector = quaternion[..., :1], quaternion[..., 1:]
    square = (vector * vector).sum(-1, keepdim=True)
    small = square < 1e-12
    sine = torch.where(small, 1, square).sqrt()
    return vector * torch.where(small, 2 + square / 3, 2 * torch.atan2(sine, real) / sine)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), real part first, of any length but
    zero.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("quaternion", quaternion, (4,))
    w, x, y, z = normalize(quaternion, dim=-1).unbind(-1)
    entries = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def perspective_projection(
    points: Tensor,
    translation: Tensor,
    focal_length: Tensor,
    camera_center: Tensor | None = None,
    rotation: Tensor | None = None,
) -> Tensor:
    """Pinhole projection ``f (X / Z) + c`` of the points ``rotation @ point + translation``.

    Args:
        points: (B, N, 3) metres.
        translation: (B, 3) metres.
        focal_length: (B, 2) pixels, along x and y.
        camera_center: (B, 2) pixels; zero unless told.
        rotation: (B, 3, 3); none unless told.

    Returns:
        (B, N, 2) pixels; not finite for a point in the plane of the camera, Z = 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check("points", points, (3,))
    if points.ndim != 3:
        raise ValueError(f"points: expected shape (B, N, 3), got {tuple(points.shape)}")
    batch = len(points)
    for name, value, shape in (
        ("translation", translation, (batch, 3)),
        ("focal_length", focal_length, (batch, 2)),
        ("camera_center", camera_center, (batch, 2)),
        ("rotation", rotation, (batch, 3, 3)),
    ):
        if value is not None:
            _check(name, value, shape[1:])
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if rotation is not None:
        points = points @ rotation.mT
    points = points + translation[:, None]
    projected = focal_length[:, None] * points[..., :2] / points[..., 2:]
    return projected if camera_center is None else projected + camera_center[:, None]


def _check(name: str, value: Tensor, end: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    if value.shape[-len(end) :] != end:
        expected = ", ".join(map(str, end))
        raise ValueError(f"{name}: expected shape (..., {expected}), got {tuple(value.shape)}")


def _check_convention(convention: str) -> None:
    if convention not in ROTATION_6D:
        raise ValueError(
            f"convention: expected one of {', '.join(ROTATION_6D)}, got {convention!r}"
        )
