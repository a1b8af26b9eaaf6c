"""Simulated persons for tests: a stick body in random poses, and its joints as a model's body."""

from __future__ import annotations

import torch

from fasthyp.body import h36m17_regressor, stick_body
from fasthyp.body.joint_maps import H36M17_JOINTS
from fasthyp.data import SimulatedPersons
from fasthyp.data.simulated_persons import StickPoses
from fasthyp.geometry import axis_angle_to_matrix
from fasthyp.models import BodyJoints


def stick() -> BodyJoints:
    """The stick body, seen at Human3.6M's joints."""
    return BodyJoints(stick_body(), h36m17_regressor(), H36M17_JOINTS)


def stick_people(number: int, seed: int = 0) -> StickPoses:
    """Upright stick bodies with turned joints, of random shapes."""
    generator = torch.Generator().manual_seed(seed)
    turn = 0.25 * torch.randn(number, 24, 3, generator=generator)
    turn[:, 0] = 0
    rotations = axis_angle_to_matrix(turn)
    rotations[:, 0] = axis_angle_to_matrix(torch.tensor([torch.pi / 2, 0, 0]))  # z up
    betas = 0.5 * torch.randn(number, 10, generator=generator)
    return StickPoses(rotations, betas, torch.arange(number) % 2, torch.zeros(number, 17))


def source(number: int = 40, detector: str = "h36m17") -> SimulatedPersons:
    parts = {
        part: stick_people(number, k) for k, part in enumerate(("train", "validation", "test"))
    }
    return SimulatedPersons(parts, detector)
