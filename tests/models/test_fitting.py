"""Fitting to keypoints, agreement of views, walks through the latent space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp.body import SMPL, project
from fasthyp.geometry import matrix_to_rotation_6d
from fasthyp.losses import keypoint_fitting_loss, multiview_consistency_loss
from fasthyp.models import BodyJoints, ProHMR
from fasthyp.models.fitting import FittingConfig, fit_keypoints, interpolate, refine_views
from fasthyp.models.flow_model import BodyFlow
from tests.body import synthetic_models
from tests.conftest import Golden, golden_files
from tests.models.random_persons import numbers, persons, rotations, smpl
from tests.models.test_prohmr import official, prohmr


@dataclass(frozen=True)
class _Config:
    joints: int = 24


class Gaussian(BodyFlow):
    """A normal distribution about a pose; the condition is its 6D mean and log deviations."""

    Config = _Config
    convention = "columns"
    joints = 24

    def _from_latent(self, z: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = cond[:, None].chunk(2, -1)
        return mean + log_std.exp() * z, log_std.sum(-1).expand(z.shape[:2])

    def shape_and_camera(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        return cond.new_zeros(len(cond), 10), cond.new_tensor([[0.9, 0, 0]]).expand(len(cond), -1)


def condition(pose: Tensor, std: Tensor, seed: int = 0) -> Tensor:
    """Of poses (B, 24, 3, 3), seen with an error of such deviations (B, 24)."""
    six = matrix_to_rotation_6d(pose).flatten(1)
    std = std.repeat_interleave(6, 1)
    return torch.cat([six + std * numbers(*six.shape, seed=seed), std.log()], 1)


def camera(batch: int) -> dict[str, Tensor]:
    return {
        "translation": torch.tensor([[0.1, 0.2, 6.0]]).repeat(batch, 1),
        "focal_length": torch.full((batch, 2), 1000.0),
        "camera_center": torch.full((batch, 2), 320.0),
        "image_size": torch.full((batch, 2), 640.0),
    }


def seen(joints: Tensor) -> Tensor:
    at = camera(len(joints))
    return project(joints, at["translation"], at["focal_length"], at["camera_center"])


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Between rotations, in radians."""
    cosine = ((a.mT @ b).diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return cosine.clamp(-1, 1).arccos()


# --- keypoints ---


def test_keypoints_are_reached_and_the_prior_holds() -> None:
    truth = rotations(2, 24)
    body = smpl()
    model = Gaussian(body=body)
    cond = condition(truth, torch.full((2, 24), 0.2))
    target = seen(body(torch.zeros(2, 10), truth)[0])
    confidence = torch.ones(target.shape[:2])
    mode = model.decode(torch.zeros(2, 1, 144), cond)
    before = (seen(model.pose(mode)[0][:, 0]) - target).norm(dim=-1).mean()

    options: dict[str, Any] = {**camera(2), "config": FittingConfig(max_iter=5)}
    fit = fit_keypoints(model, cond, target, confidence, **options)
    after = (
        project(fit.joints, fit.translation, *[camera(2)[k] for k in ("focal_length", "camera_center")])
        - target
    ).norm(dim=-1).mean()  # fmt: skip
    assert after < before / 5
    assert angle(fit.rotations, truth).mean() < angle(mode.rotations[:, 0], truth).mean()
    free = fit_keypoints(model, cond, target, confidence, **options, pose_weight=0.0)
    assert fit.z.square().sum() < free.z.square().sum()
    tight = fit_keypoints(model, cond, target, confidence, **options, pose_weight=1e4)
    assert tight.z.abs().max() < 1e-3

    # the objective, from what comes back
    value = keypoint_fitting_loss(
        fit.joints, target, confidence, fit.translation,
        *[camera(2)[k] for k in ("focal_length", "camera_center", "image_size")],
        fit.z, fit.betas,
    )  # fmt: skip
    assert fit.objective == pytest.approx(float(value), rel=1e-4)


def test_keypoints_of_no_confidence_do_not_count() -> None:
    truth, body = rotations(2, 24), smpl()
    model, cond = Gaussian(body=body), condition(truth, torch.full((2, 24), 0.2))
    target = seen(body(torch.zeros(2, 10), truth)[0])
    confidence = torch.ones(target.shape[:2])
    confidence[:, 20:] = 0
    config = FittingConfig(max_iter=3)
    first = fit_keypoints(model, cond, target, confidence, **camera(2), config=config)
    target[:, 20:] += 100
    again = fit_keypoints(model, cond, target, confidence, **camera(2), config=config)
    assert torch.equal(first.z, again.z)
    # some of the joints, in another order
    few = [30, 3, 7]
    config = FittingConfig(max_iter=2)
    some = fit_keypoints(
        model, cond, target[:, few], confidence[:, few], **camera(2), joints=few, config=config
    )
    weights = torch.zeros_like(confidence)
    weights[:, few] = confidence[:, few]
    same = fit_keypoints(model, cond, target, weights, **camera(2), config=config)
    torch.testing.assert_close(some.z, same.z, rtol=0, atol=0.05)


def test_a_flow_fits_and_is_left_as_it_was() -> None:
    model, batch = prohmr(), persons()
    model.train()
    modes = [part.training for part in model.modules()]
    with torch.no_grad():
        model.eval()
        cond = model.condition(batch)
        drawn = model.sample(cond, 2, seed=5)
        target = seen(model.pose(drawn)[0][:, 1])
        model.train()
    confidence = torch.ones(target.shape[:2])
    for config in (FittingConfig(max_iter=2), FittingConfig("adam", 0.05, max_iter=4)):
        start = fit_keypoints(
            model, cond, target, confidence, **camera(5), config=FittingConfig(max_iter=1, round_steps=1)
        )  # fmt: skip
        fit = fit_keypoints(model, cond, target, confidence, **camera(5), config=config)
        assert fit.objective < 0.7 * start.objective
        assert fit.rounds <= 4
    assert [part.training for part in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert model.flow._transform._transforms[0].shift.requires_grad


# --- views ---


@pytest.mark.parametrize("path", golden_files("prohmr_losses_total.npz"))
def test_official_refinement(path: Path) -> None:
    g = Golden(path)
    arrays = synthetic_models.model(vertices=120)
    body = SMPL(arrays, vertex_ids=synthetic_models.vertex_ids(120), dtype=torch.float64)
    model = ProHMR.from_official(official(g.state_dict()), body=BodyJoints(body)).double()
    cond = g["in/feats"].double()
    z = 0.5 * g["in/z"][:, 1].double()
    turns = model.decode(z[:, None], cond).rotations[:, 0, 1:]
    value = multiview_consistency_loss(turns, z)
    torch.testing.assert_close(value, g["out64/multiview_loss_half_z1"], rtol=1e-7, atol=0)
    fit = refine_views(model, cond, FittingConfig(max_iter=10))
    # The line search takes other turns in the last digits.
    torch.testing.assert_close(
        fit.rotations[:, 1:], g["out64/refined_body_pose"], rtol=0, atol=2e-3
    )
    assert torch.equal(fit.betas, fit.betas[:1].expand_as(fit.betas))


def test_views_help_each_other() -> None:
    """What one view is unsure of, the other knows."""
    truth, std = rotations(1, 24).repeat(2, 1, 1, 1), torch.full((2, 24), 0.02)
    truth[1, 0] = rotations(1, seed=9)[0]  # each camera has the root in its own axes
    std[0, 1:12], std[1, 12:] = 0.3, 0.3
    model, cond = Gaussian(body=smpl()), condition(truth, std, seed=3)
    single = angle(model.decode(torch.zeros(2, 1, 144), cond).rotations[:, 0, 1:], truth[:, 1:])
    fit = refine_views(model, cond)
    both = angle(fit.rotations[:, 1:], truth[:, 1:])
    assert (both.mean(1) < single.mean(1) / 2).all()
    assert angle(fit.rotations[0, 1:], fit.rotations[1, 1:]).max() < 0.02
    # as likely as the truth at least
    assert fit.z.square().sum() < 2 * 144
    untouched = fit.z.unflatten(1, (24, 6))[:, 0]
    assert untouched.abs().max() < 1e-3  # the root's


# --- walks ---


def test_walks_from_one_latent_to_another() -> None:
    model, batch = prohmr(), persons()
    cond = model.condition(batch)
    start, end = numbers(5, 144), numbers(5, 144, seed=1)
    walk = interpolate(model, cond, start, end, 3)
    for m, z in enumerate((start, (start + end) / 2, end)):
        found = model.decode(z[:, None], cond).pose_6d[:, 0]
        torch.testing.assert_close(walk.pose_6d[:, m], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: interpolate(m, c, c, c, 1), "steps: expected at least 2"),
        (lambda m, c: interpolate(m, c, c, c, 2), r"start: expected shape \(5, 144\)"),
        (lambda m, c: FittingConfig("newton"), "optimiser: expected one of 'lbfgs', 'adam'"),
        (
            lambda m, c: fit_keypoints(
                m, c, torch.zeros(5, 3, 2), torch.ones(5, 3), **camera(5), joints=[1]
            ),
            "joints: expected 3, got 1",
        ),
        (
            lambda m, c: fit_keypoints(m, c, torch.zeros(5, 3, 2), torch.ones(4, 3), **camera(5)),
            "confidence: expected shape",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    model, batch = prohmr(), persons()
    with pytest.raises(ValueError, match=message):
        call(model, model.condition(batch))
    assert all(p.requires_grad for p in model.flow.parameters())
