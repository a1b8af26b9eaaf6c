"""Simulated persons for tests: synthetic people in a stick body, and that body for models."""

from __future__ import annotations

from fasthyp.body import h36m17_regressor, stick_body
from fasthyp.body.joint_maps import H36M17_JOINTS
from fasthyp.data import SimulatedPersons, stick_poses
from fasthyp.models import BodyJoints
from tests.synthetic import people17


def stick() -> BodyJoints:
    """The stick body, seen at Human3.6M's joints."""
    return BodyJoints(stick_body(), h36m17_regressor(), H36M17_JOINTS)


def source(detector: str = "h36m17") -> SimulatedPersons:
    parts = ("train", "validation", "test")
    poses = {part: stick_poses(people17(40, k)) for k, part in enumerate(parts)}
    return SimulatedPersons(poses, detector)
