"""Small random batches of persons, and bodies made of integer hashes."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp.body import SMPL, SMPLX
from fasthyp.body.joint_maps import COCO17_JOINTS, H36M17_JOINTS
from fasthyp.data.persons import PersonBatch
from fasthyp.geometry import axis_angle_to_matrix
from fasthyp.models import BodyJoints
from tests.body import synthetic_models

FEATURES = 12


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotations(*shape: int, seed: int = 0, scale: float = 0.4) -> Tensor:
    return axis_angle_to_matrix(scale * numbers(*shape, 3, seed=seed))


def smpl() -> BodyJoints:
    arrays = synthetic_models.model(vertices=120)
    body = SMPL(arrays, vertex_ids=synthetic_models.vertex_ids(120))
    return BodyJoints(body)


def smplx(betas: int = 11) -> BodyJoints:
    arrays = synthetic_models.model(synthetic_models.SMPLX_PARENTS, 150, 400)
    arrays = synthetic_models.with_face(synthetic_models.with_hands(arrays))
    body = SMPLX(
        arrays,
        num_betas=betas,
        num_expression_coeffs=5,
        use_pca=False,
        vertex_ids=synthetic_models.vertex_ids(150),
    )
    return BodyJoints(body)


def persons(number: int = 5, seed: int = 0, names: tuple[str, ...] = COCO17_JOINTS) -> PersonBatch:
    """Everything that a recipe may ask for, consistent in shape alone."""
    keypoints, joints = len(names), len(H36M17_JOINTS)
    shape = numbers(number, keypoints, 2, 2, seed=seed + 1)
    return PersonBatch(
        joints_3d=0.3 * numbers(number, joints, 3, seed=seed + 2),
        joints_2d=32 + 8 * numbers(number, joints, 2, seed=seed + 3),
        translation=torch.tensor([0.0, 0.0, 5.0]) + 0.1 * numbers(number, 3, seed=seed + 4),
        focal_length=150 + 10 * numbers(number, seed=seed + 5),
        centre=32 + 5 * numbers(number, 2, seed=seed + 6),
        amplitude=numbers(number, keypoints, seed=seed + 7).sigmoid(),
        mean=32 + 8 * numbers(number, keypoints, 2, seed=seed + 8),
        covariance=shape @ shape.mT + torch.eye(2),
        visible=numbers(number, keypoints, seed=seed + 9) > -1,
        features=numbers(number, FEATURES, seed=seed + 10),
        global_orient=rotations(number, seed=seed + 11),
        body_pose=rotations(number, 23, seed=seed + 12),
        betas=numbers(number, 10, seed=seed + 13),
        joint_names=H36M17_JOINTS,
        detector_names=names,
    )
