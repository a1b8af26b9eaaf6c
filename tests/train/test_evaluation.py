"""Evaluation figures: each is checked where its value is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fasthyp.data import PoseSimulator
from fasthyp.models.lifting import LiftingFlow
from fasthyp.skeleton import COCO13_JOINTS, COCO17_TO_COCO13
from fasthyp.train.baselines import nearest_2d
from fasthyp.train.evaluation import (
    evaluate_heatmaps,
    evaluate_lifting,
    reprojection_distance,
)
from tests.synthetic import people, write_mocap


@pytest.fixture(scope="module")
def bundled() -> LiftingFlow:
    return LiftingFlow.from_pretrained()


def test_evaluate_lifting(tmp_path: Path, bundled: LiftingFlow) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate_lifting(
        bundled,
        write_mocap(tmp_path / "cmu.npz"),
        num_samples=20,
        max_persons=30,
        pool=500,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result["persons"] == 30
    assert seen[-1] == (30, 30)
    assert result["best_mm"] < result["mode_mm"] < result["mean_pose_mm"]
    assert list(result["mode_mm_by_subject"]) == ["3"]
    assert list(result["inside_50"]) == list(COCO13_JOINTS)
    for joint in COCO13_JOINTS:
        assert 0 <= result["inside_50"][joint] <= result["inside_90"][joint] <= 1


def test_nearest_2d_finds_the_same_person() -> None:
    batch = PoseSimulator(people(50)).sample(50, torch.Generator().manual_seed(0))
    exact = 3 * batch.true_mean + 5
    assert torch.equal(nearest_2d(exact, batch.covariance, batch.true_mean), torch.arange(50))


def test_reprojection_distance() -> None:
    pose = people(4).view(2, 2, 13, 3)[:, :1].expand(-1, 2, -1, -1)
    mean = 20 * pose[:, 0, :, :2] + torch.tensor([30.0, 32.0])
    covariance = torch.eye(2).expand(2, 13, 2, 2)
    distance = reprojection_distance(pose, mean, covariance)
    assert distance.shape == (2, 2, 13)
    torch.testing.assert_close(distance, torch.zeros(2, 2, 13), atol=1e-4, rtol=0)
    mean[:, 11, 0] += 5
    wide = covariance.clone()
    wide[:, 11] *= 1e6
    expected = torch.zeros(2, 2, 13)
    expected[..., 11] = 5
    got = reprojection_distance(pose, mean, wide)
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=0)


def test_evaluate_heatmaps(tmp_path: Path, bundled: LiftingFlow) -> None:
    batch = PoseSimulator(people(50)).sample(3, torch.Generator().manual_seed(2))
    grid = torch.stack(torch.meshgrid(torch.arange(64), torch.arange(64), indexing="xy"), -1)
    offset = grid - batch.mean[:, :, None, None]
    precision = torch.linalg.inv(batch.covariance)
    exponent = torch.einsum("pjhwa,pjab,pjhwb->pjhw", offset, precision, offset)
    maps = torch.zeros(3, 17, 64, 64)
    maps[:, list(COCO17_TO_COCO13)] = batch.amplitude[..., None, None] * (-exponent / 2).exp()
    np.savez(tmp_path / "maps.npz", heatmaps=maps.numpy())
    result = evaluate_heatmaps(bundled, tmp_path / "maps.npz", num_samples=50)
    assert result["persons"] == 3
    assert result["reprojection_cells"] < 4
    assert list(result["spread_mm"]) == list(COCO13_JOINTS)
    assert all(0 < result["spread_xy_mm"][j] < result["spread_mm"][j] for j in COCO13_JOINTS)

    np.savez(tmp_path / "bad.npz", heatmaps=np.zeros((3, 5, 64, 64)))
    with pytest.raises(ValueError, match="13 or 17"):
        evaluate_heatmaps(bundled, tmp_path / "bad.npz")
