"""The CMU motion capture, seen by simulated cameras and detectors."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fasthyp.data.mocap import load_cmu
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers._dataset import Clip, Fields, PersonDataset
from fasthyp.data.simulate import VISIBLE, PoseSimulator, SimulationConfig
from fasthyp.data.simulated_persons import SimulatedPersons, stick_poses
from fasthyp.skeleton import COCO13_JOINTS


def cmu(
    path: str | os.PathLike[str],
    *,
    detector: str | None = None,
    part: str = "test",
    persons: int | None = None,
    seed: int = 0,
    every: int = 1,
) -> PersonDataset:
    """Frames of one part, each seen once by a random simulated camera; rows by subject.

    Args:
        path: see :func:`fasthyp.data.load_cmu`.
        detector: a name of :data:`fasthyp.data.DETECTORS`: the persons are those of
            :class:`fasthyp.data.SimulatedPersons`, with Human3.6M's 17 joints. Unless told, the 13
            COCO joints as :class:`fasthyp.models.LiftingFlow` has them, and no body.
        part: ``"train"``, ``"validation"`` or ``"test"``.
        persons: this many evenly spaced frames; all unless told.
        seed: of the cameras and of the 2D errors.
        every: take every n-th of these only.

    Raises:
        ValueError: as :func:`fasthyp.data.load_cmu`.
    """
    joints = "coco13" if detector is None else "h36m17"
    poses = load_cmu(path, part, joints)
    chosen = torch.arange(len(poses))
    if persons is not None and persons < len(poses):
        chosen = torch.linspace(0, len(poses) - 1, persons).round().long()
    if detector is None:
        batch = _coco13(poses.poses, chosen, seed)
    else:
        stick = {part: stick_poses(poses.poses, poses.subject)}
        source = SimulatedPersons(stick, detector, SimulationConfig(augment=False))
        batch = source.sample(len(chosen), seed, part, chosen)
    groups = [f"subject {number}" for number in poses.subject[chosen].tolist()]
    clip = Clip(str(path), len(chosen), _Held(batch), groups)
    return PersonDataset([clip], batch.joint_names, batch.detector_names, every)


def _coco13(poses: Tensor, chosen: Tensor, seed: int) -> PersonBatch:
    seen = PoseSimulator(poses, SimulationConfig(augment=False)).sample(
        len(chosen), torch.Generator().manual_seed(seed), chosen
    )
    return PersonBatch(
        joints_3d=seen.clean_pose,
        joints_2d=seen.true_mean,
        amplitude=seen.amplitude,
        mean=seen.mean,
        covariance=seen.covariance,
        visible=seen.state == VISIBLE,
        joint_names=COCO13_JOINTS,
        detector_names=COCO13_JOINTS,
    )


@dataclass(frozen=True)
class _Held:
    persons: PersonBatch

    def __call__(self, rows: np.ndarray) -> Fields:
        return dict(self.persons[torch.from_numpy(rows)].tensors())
