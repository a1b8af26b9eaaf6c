"""The input of PoseINN: the official preprocessing's numbers, and frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp import fit_gaussians
from fasthyp.data.persons import PersonBatch
from fasthyp.heatmaps import GaussianFit
from fasthyp.metrics import root_centred
from fasthyp.models import PoseINN
from fasthyp.models.pose_inn_input import (
    FITTED_JOINTS,
    camera_joints,
    gaussian_condition,
    insert_root,
    normalise_pose_2d,
    normalise_pose_3d,
    person_input,
)
from tests.conftest import Golden, golden_files


def fit_of(rows: Tensor) -> GaussianFit:
    """Of the official (N, 16, 7): A, x, y, sigma_x, theta, sigma_y, rmse."""
    amplitude, x, y, sigma_x, theta, sigma_y, rmse = rows.unbind(-1)
    mean, nothing = torch.stack([x, y], -1), torch.zeros(0)
    return GaussianFit(amplitude, mean, sigma_x, sigma_y, theta, nothing, rmse, nothing, nothing)


@pytest.mark.parametrize("path", golden_files("w21_losses_preprocess.npz"))
def test_wehrbein_et_al(path: Path) -> None:
    golden = Golden(path)
    fit = fit_of(golden["in/gauss_fits"].unflatten(1, (16, 7)))
    torch.testing.assert_close(
        gaussian_condition(fit), golden["out64/gauss_cond"], rtol=1e-11, atol=1e-13
    )
    points, _ = normalise_pose_2d(golden["in/poses_2d"].unflatten(1, (2, 16)).mT)
    torch.testing.assert_close(
        points.mT.flatten(1), golden["out64/poses_2d_norm"], rtol=1e-11, atol=1e-13
    )
    poses = normalise_pose_3d(golden["in/poses_3d"].unflatten(1, (3, 16)).mT)
    torch.testing.assert_close(
        poses.mT.flatten(1), golden["out64/poses_3d_norm"], rtol=1e-11, atol=1e-13
    )
    whole = insert_root(golden["in/p48"].unflatten(1, (3, 16)).mT)
    assert torch.equal(whole.mT.flatten(1), golden["out/reinsert_root"])
    centred = root_centred(whole, 0)
    assert torch.equal(centred.mT.flatten(1), golden["out/root_centred"])


def test_covariances_turn_with_the_frame() -> None:
    """The covariance of normalised draws is the normalised covariance."""
    generator = torch.Generator().manual_seed(0)
    points = 30 + 10 * torch.randn(2, 16, 2, generator=generator, dtype=torch.float64)
    root = torch.randn(2, 16, 2, 2, generator=generator, dtype=torch.float64)
    covariance = root @ root.mT
    normal, turned = normalise_pose_2d(points, covariance)
    assert turned is not None
    torch.testing.assert_close(normal.square().mean((1, 2)), torch.ones(2).double())
    # The map of one pose is linear but for its centre: its matrix from two differences.
    scale = (normal[0, 1] - normal[0, 0]) / (points[0, 1] - points[0, 0])
    matrix = torch.diag(scale)
    assert scale[0] > 0 > scale[1]
    torch.testing.assert_close(turned[0], matrix @ covariance[0] @ matrix.T)


def test_from_heatmaps_to_hypotheses() -> None:
    """The condition of a fit in image axes: the covariance with y up, scaled."""
    y, x = torch.arange(64.0)[:, None], torch.arange(64.0)
    centres = 15 + 34 * torch.rand(16, 2, generator=torch.Generator().manual_seed(0))
    u, v = x - centres[:, :1, None], y - centres[:, 1:, None]
    precision = torch.linalg.inv(torch.tensor([[4.0, 0.9], [0.9, 2.5]]))  # sigmas below 2.1
    square = precision[0, 0] * u * u + 2 * precision[0, 1] * u * v + precision[1, 1] * v * v
    fit = fit_gaussians(torch.exp(-square / 2)[None].double())
    found = gaussian_condition(fit)
    wide = torch.tensor([[4.0, -0.9], [-0.9, 2.5]]).double()
    values, vectors = torch.linalg.eigh(wide)
    values = torch.where(values.sqrt() > 2.1, 4 * values, values) / 400
    want = vectors @ values.diag() @ vectors.T
    for column, (i, j) in zip((3, 4, 5), ((0, 0), (0, 1), (1, 1)), strict=True):
        torch.testing.assert_close(found[0, :, column], want[i, j].expand(13), rtol=1e-4, atol=1e-6)
    points, _ = normalise_pose_2d(fit.mean)
    torch.testing.assert_close(found[..., 1:3], points[:, FITTED_JOINTS])
    model = PoseINN(hidden=16).eval()
    drawn = model.sample(
        found.flatten(1).float(), points.mT.flatten(1).float(), num_samples=3, seed=0
    )
    assert isinstance(drawn, Tensor)
    assert drawn.shape == (1, 3, 48)


@pytest.mark.parametrize("path", golden_files("w21_losses_preprocess.npz"))
def test_persons_have_covariances_only(path: Path) -> None:
    """The principal axes of a covariance give what the fit's own axes give; but the official code
    clips a negative standard deviation as a narrow one, and a covariance has no sign."""
    golden = Golden(path)
    fit = fit_of(golden["in/gauss_fits"].unflatten(1, (16, 7)))
    positive = ((fit.sigma_x > 0) & (fit.sigma_y > 0))[:, FITTED_JOINTS]
    assert positive.float().mean() > 0.8
    cos, sin, none = fit.theta.cos(), fit.theta.sin(), torch.zeros_like(fit.theta)
    axes = torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))  # columns, y down
    squares = torch.stack([fit.sigma_x**2, none, none, fit.sigma_y**2], -1).unflatten(-1, (2, 2))
    persons = PersonBatch(
        amplitude=fit.amplitude, mean=fit.mean, covariance=axes @ squares @ axes.mT
    )
    gauss, pose_2d = person_input(persons)
    torch.testing.assert_close(
        gauss.unflatten(1, (13, 6))[positive],
        golden["out64/gauss_cond"][positive],
        rtol=1e-9,
        atol=1e-9,
    )
    points, _ = normalise_pose_2d(fit.mean.clamp(0, 63))
    torch.testing.assert_close(pose_2d, points.mT.flatten(1))


def test_round_gaussians_have_no_axes() -> None:
    covariance = 9.0 * torch.eye(2).expand(1, 16, 2, 2)
    persons = PersonBatch(
        amplitude=torch.ones(1, 16), mean=10 + 20 * torch.rand(1, 16, 2), covariance=covariance
    )
    gauss, _ = person_input(persons)
    columns = gauss.unflatten(1, (13, 6))[..., 3:]
    torch.testing.assert_close(columns, torch.tensor([0.09, 0.0, 0.09]).expand(1, 13, 3))


def test_to_the_camera_and_back() -> None:
    joints = torch.randn(2, 5, 17, 3, generator=torch.Generator().manual_seed(0))
    joints[..., 0, :] = (joints[..., 1, :] + joints[..., 4, :]) / 2
    joints = root_centred(joints, 0)
    poses = normalise_pose_3d(joints[..., 1:, :], metres=1.0).mT.flatten(-2)
    torch.testing.assert_close(camera_joints(poses), joints)
    torch.testing.assert_close(poses.unflatten(-1, (3, 16)).mean(-1), torch.zeros(2, 5, 3))
    up = poses.unflatten(-1, (3, 16))[..., 1, 8] - poses.unflatten(-1, (3, 16))[..., 1, 0]
    torch.testing.assert_close(up, joints[..., 1, 1] - joints[..., 9, 1])


def gaussians(joints: int) -> PersonBatch:
    return PersonBatch(
        amplitude=torch.ones(2, joints),
        mean=torch.rand(2, joints, 2),
        covariance=torch.eye(2).expand(2, joints, 2, 2),
    )


GOOD = fit_of(torch.rand(2, 16, 7) + 1)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: normalise_pose_2d(torch.ones(2, 3)), ValueError, r"points.*\(2, 3\)"),
        (lambda: normalise_pose_2d(torch.ones(4, 2).long()), TypeError, "points.*int64"),
        (
            lambda: normalise_pose_2d(torch.ones(4, 2), torch.ones(3, 2, 2)),
            ValueError,
            r"covariance.*\(4, 2, 2\).*\(3, 2, 2\)",
        ),
        (lambda: normalise_pose_3d(torch.ones(4, 2)), ValueError, "poses"),
        (lambda: insert_root(torch.ones(4, 3), (0, 4)), ValueError, "hips"),
        (lambda: gaussian_condition(fit_of(torch.rand(2, 13, 7))), ValueError, "fit.mean.*16"),
        (lambda: gaussian_condition(GOOD, 0.0), ValueError, "heatmap_std"),
        (lambda: gaussian_condition(GOOD, size=1), ValueError, "size"),
        (
            lambda: gaussian_condition(GOOD._replace(theta=torch.ones(2, 3))),
            ValueError,
            "fit.theta",
        ),
        (lambda: camera_joints(torch.ones(2, 51)), ValueError, r"poses.*\(2, 51\)"),
        (lambda: person_input(PersonBatch()), ValueError, "persons: expected amplitude"),
        (lambda: person_input(gaussians(13)), ValueError, r"\(B, 16, 2\)"),
        (
            lambda: person_input(replace(gaussians(16), detector_names=("nose",) * 16)),
            ValueError,
            "detector joints.*nose",
        ),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()
