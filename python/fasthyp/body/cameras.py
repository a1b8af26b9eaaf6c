"""Cameras: how joints in space are seen in an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasthyp._tensors import check_shape
from fasthyp.reference import skinning as reference


@dataclass(frozen=True, eq=False)
class Camera:
    """Cameras of :func:`~fasthyp.body.project_joints`, made by one of the methods below.

    Attributes:
        numbers: (B, 3), scale and shift of the weak perspective, or (B, 7), translation, focal
            lengths and centre of the perspective.
    """

    numbers: Tensor

    def __call__(self, joints: Tensor) -> Tensor:
        """Joints (B, N, 3) in the image, (B, N, 2)."""
        check_shape("joints", joints, (None, None, 3))
        return reference.project(joints, self.numbers)

    @classmethod
    def weak(cls, camera: Tensor) -> Camera:
        """:func:`weak_perspective`'s, (s, t_x, t_y) (B, 3)."""
        check_shape("camera", camera, (None, 3))
        return cls(camera)

    @classmethod
    def perspective(
        cls,
        translation: Tensor,
        focal_length: Tensor | float,
        camera_center: Tensor | None = None,
    ) -> Camera:
        """:func:`project`'s, with its arguments."""
        check_shape("translation", translation, (None, 3))
        rows = len(translation)
        focal = torch.as_tensor(focal_length, dtype=translation.dtype, device=translation.device)
        if focal.ndim == 1:
            focal = focal[:, None]
        center = translation.new_zeros(2) if camera_center is None else camera_center
        parts = translation, focal.expand(rows, 2), center.expand(rows, 2)
        return cls(torch.cat(parts, 1))

    @classmethod
    def prohmr(
        cls, camera: Tensor, focal_length: float = 5000.0, image_size: float = 224.0
    ) -> Camera:
        """ProHMR's: :func:`prohmr_camera`, and results in sides of the image from its middle."""
        translation = prohmr_camera(camera, focal_length, image_size)
        return cls.perspective(translation, focal_length / image_size)

    @classmethod
    def humr(
        cls,
        camera: Tensor,
        bbox_height: Tensor,
        bbox_center: Tensor,
        image_width: Tensor | float,
        image_height: Tensor | float,
        focal_length: Tensor | float,
    ) -> Camera:
        """HUMR's: :func:`humr_camera` with its arguments, and results in pixels of the image."""
        translation = humr_camera(
            camera, bbox_height, bbox_center, image_width, image_height, focal_length
        )
        middle = [
            torch.as_tensor(side, dtype=camera.dtype, device=camera.device).expand(len(camera)) / 2
            for side in (image_width, image_height)
        ]
        return cls.perspective(translation, focal_length, torch.stack(middle, 1))


def project(
    joints: Tensor,
    translation: Tensor,
    focal_length: Tensor | float,
    camera_center: Tensor | None = None,
) -> Tensor:
    """Perspective projection ``f (X / Z) + c`` of joints (B, N, 3) moved by ``translation``.

    Args:
        translation: (B, 3) metres, from :func:`humr_camera`, :func:`prohmr_camera` or elsewhere.
        focal_length: a number, (B) or (B, 2), in the unit of the result: pixels, or for ProHMR's
            normalised image 5000 / 224.
        camera_center: (2) or (B, 2); zero unless given.

    Returns:
        (B, N, 2); not finite for a point in the plane of the camera.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_shape("joints", joints, (None, None, 3))
    check_shape("translation", translation, (None, 3))
    moved = joints + translation[:, None]
    focal = torch.as_tensor(focal_length, dtype=joints.dtype, device=joints.device)
    if focal.ndim == 1:
        focal = focal[:, None]
    if focal.ndim > 0:
        focal = focal[:, None]
    points = focal * moved[..., :2] / moved[..., 2:]
    if camera_center is None:
        return points
    return points + (camera_center[:, None] if camera_center.ndim == 2 else camera_center)


def weak_perspective(joints: Tensor, camera: Tensor) -> Tensor:
    """``s (X + t)`` of joints (B, N, 3) for cameras (s, t_x, t_y) (B, 3): HMR's, in the unit of
    half the side of the crop.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_shape("joints", joints, (None, None, 3))
    check_shape("camera", camera, (None, 3))
    return camera[:, None, :1] * (joints[..., :2] + camera[:, None, 1:])


def prohmr_camera(
    camera: Tensor, focal_length: float = 5000.0, image_size: float = 224.0
) -> Tensor:
    """The translation (B, 3) of ProHMR's weak-perspective cameras (s, t_x, t_y) (B, 3): the depth
    is 2 f / (image_size s + 1e-9).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_shape("camera", camera, (None, 3))
    scale, x, y = camera.unbind(-1)
    return torch.stack([x, y, 2 * focal_length / (image_size * scale + 1e-9)], -1)


def humr_camera(
    camera: Tensor,
    bbox_height: Tensor,
    bbox_center: Tensor,
    image_width: Tensor | float,
    image_height: Tensor | float,
    focal_length: Tensor | float,
) -> Tensor:
    """The translation (B, 3) in the whole image of HUMR's cameras (s, t_x, t_y) (B, 3), which see
    a square crop.

    Args:
        bbox_height: (B) side of the crop in pixels.
        bbox_center: (B, 2) its middle in pixels.
        image_width, image_height, focal_length: (B) or numbers, in pixels.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_shape("camera", camera, (None, 3))
    check_shape("bbox_height", bbox_height, (None,))
    check_shape("bbox_center", bbox_center, (None, 2))
    scale, x, y = camera.unbind(-1)
    side = scale * bbox_height
    return torch.stack(
        [
            x + 2 * (bbox_center[:, 0] - image_width / 2) / side,
            y + 2 * (bbox_center[:, 1] - image_height / 2) / side,
            2 * focal_length / side,
        ],
        -1,
    )
