"""The CMU motion capture, seen by simulated cameras and detectors."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from fasthyp.data.mocap import load_cmu
from fasthyp.data.readers._dataset import Clip, Fields, PersonDataset
from fasthyp.data.simulate import PoseSimulator, SimulationConfig
from fasthyp.skeleton import COCO13_JOINTS


def cmu(
    path: str | os.PathLike[str],
    *,
    part: str = "test",
    persons: int | None = None,
    seed: int = 0,
    every: int = 1,
) -> PersonDataset:
    """The 13 COCO body joints of frames of one part, each seen once by a random simulated camera;
    rows by subject.

    Args:
        path: see :func:`fasthyp.data.load_cmu`.
        part: ``"train"``, ``"validation"`` or ``"test"``.
        persons: this many evenly spaced frames; all unless told.
        seed: of the cameras and of the 2D errors.
        every: take every n-th of these only.

    Raises:
        ValueError: as :func:`fasthyp.data.load_cmu`.
    """
    poses = load_cmu(path, part)
    chosen = torch.arange(len(poses))
    if persons is not None and persons < len(poses):
        chosen = torch.linspace(0, len(poses) - 1, persons).round().long()
    seen = PoseSimulator(poses.poses, SimulationConfig(augment=False)).sample(
        len(chosen), torch.Generator().manual_seed(seed), chosen
    )
    fields = {
        "joints_3d": seen.clean_pose,
        "joints_2d": seen.true_mean,
        "amplitude": seen.amplitude,
        "mean": seen.mean,
        "covariance": seen.covariance,
        "visible": seen.state == 0,
    }
    groups = [f"subject {number}" for number in poses.subject[chosen].tolist()]
    clip = Clip(str(path), len(chosen), _Held(fields), groups)
    return PersonDataset([clip], COCO13_JOINTS, COCO13_JOINTS, every)


@dataclass(frozen=True)
class _Held:
    fields: dict[str, torch.Tensor]

    def __call__(self, rows: np.ndarray) -> Fields:
        return {name: value[torch.from_numpy(rows)] for name, value in self.fields.items()}
