"""Synthetic people: a jointed stick figure, and files in the motion capture format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fasthyp.data.mocap import H36M17_NAMES
from fasthyp.skeleton import COCO13_JOINTS, COCO13_PARENTS

# Facing +x, z up, so that left is +y; metres, mid-hip at the origin.
STANDING = torch.tensor(
    [
        [0.12, 0.00, 0.62],
        [0.00, 0.18, 0.48],
        [0.00, -0.18, 0.48],
        [0.00, 0.22, 0.20],
        [0.00, -0.22, 0.20],
        [0.05, 0.24, -0.05],
        [0.05, -0.24, -0.05],
        [0.00, 0.09, 0.00],
        [0.00, -0.09, 0.00],
        [0.02, 0.10, -0.42],
        [0.02, -0.10, -0.42],
        [0.00, 0.10, -0.83],
        [0.00, -0.10, -0.83],
    ]
)


def people(number: int, seed: int = 0) -> Tensor:
    """(N, 13, 3) standing people with swinging limbs, each turned about the vertical at random."""
    generator = torch.Generator().manual_seed(seed)
    pose = STANDING.repeat(number, 1, 1)
    for joint in (3, 4, 5, 6, 9, 10, 11, 12):
        bone = STANDING[joint] - STANDING[COCO13_PARENTS[joint]]
        swung = bone + 0.1 * torch.randn(number, 3, generator=generator)
        swung = swung / swung.norm(dim=-1, keepdim=True) * bone.norm()
        pose[:, joint] = pose[:, COCO13_PARENTS[joint]] + swung
    angle = 2 * torch.pi * torch.rand(number, generator=generator)
    zero, one = torch.zeros(number), torch.ones(number)
    turn = torch.stack(
        [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, one], -1
    ).view(-1, 3, 3)
    return pose @ turn.mT


def people17(number: int, seed: int = 0) -> Tensor:
    """The same people with Human3.6M's 17 joints, which move the trunk and the head as well."""
    pose = people(number, seed)
    shoulders, hips = pose[:, (1, 2)].mean(1), pose[:, (7, 8)].mean(1)
    generator = torch.Generator().manual_seed(seed + 1)

    def near(point: Tensor) -> Tensor:
        return point + 0.01 * torch.randn(number, 3, generator=generator)

    up = torch.tensor([0.0, 0.0, 1.0])
    nose = pose[:, 0]
    thorax = near(shoulders)
    joints = (
        *(hips, pose[:, 8], pose[:, 10], pose[:, 12], pose[:, 7], pose[:, 9], pose[:, 11]),
        *(near(0.45 * shoulders), thorax, nose, nose + 0.15 * up - 0.2 * (nose - thorax)),
        *(pose[:, 1], pose[:, 3], pose[:, 5], pose[:, 2], pose[:, 4], pose[:, 6]),
    )
    return torch.stack(joints, 1)


def mocap_arrays(frames: int = 40) -> dict[str, np.ndarray]:
    """Arrays of a motion capture file with four clips: train, validation, train, test."""
    clips = ["01_01", "01_08", "02_05", "03_01"]
    clip_id = np.repeat(np.arange(4, dtype=np.int32), frames)
    pose = people(4 * frames).numpy() * 1000 + np.array([500, -200, 900], np.float32)
    glitch = np.zeros(4 * frames, bool)
    glitch[3] = True
    return {
        "coco13_mm": pose.astype(np.float32),
        "coco13_names": np.array(COCO13_JOINTS),
        "poses_mm": 1000 * people17(4 * frames).numpy() + np.array([500, -200, 900], np.float32),
        "h36m17_names": np.array(H36M17_NAMES),
        "clip_id": clip_id,
        "clip_names": np.array(clips),
        "split": (clip_id == 3).astype(np.int8),
        "subject": np.array([1, 1, 2, 3], np.int8)[clip_id],
        "glitch": glitch,
    }


def write_mocap(path: Path, frames: int = 40) -> Path:
    np.savez(path, **mocap_arrays(frames))
    return path
