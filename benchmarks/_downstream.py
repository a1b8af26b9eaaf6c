"""What a trained model is for beyond sampling: fitting to keypoints and to several views with the
flow as prior (ProHMR, section 4.3), and telling sure from unsure persons (POCO, section 4.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasthyp.body import prohmr_camera, project
from fasthyp.data.persons import PersonBatch
from fasthyp.metrics import mpjpe, pa_mpjpe, pearson
from fasthyp.models import HUMR, POCO, ProHMR
from fasthyp.models.fitting import FittingConfig, fit_keypoints, refine_views

VIEWS = 4


def errors(joints: Tensor, truth: Tensor) -> dict[str, float]:
    """In mm, of joints (N, 17, 3) in metres."""
    return {
        "mpjpe_mm": 1000 * float(mpjpe(joints, truth, root=0).mean()),
        "pa_mpjpe_mm": 1000 * float(pa_mpjpe(joints, truth).mean()),
    }


def fitting(model: ProHMR, persons: PersonBatch, rounds: int) -> dict[str, Any]:
    """Fit to the detector's means, in the crop, weighted by their certainty; and to the truth."""
    mean, covariance, truth, joints_2d = persons.need(
        "mean", "covariance", "joints_3d", "joints_2d"
    )
    config, batch = FittingConfig(max_iter=rounds), len(persons)
    with torch.no_grad():
        cond = model.condition(persons)
        mode = model.decode(torch.zeros(batch, 1, model.dims), cond)
        joints = model.pose(mode)[0][:, 0]
    size = model.config.image_size
    unit = size / model.config.crop
    focal = torch.full((batch, 2), model.config.focal_length)
    centre = torch.full((batch, 2), size / 2)
    translation = prohmr_camera(mode.camera, model.config.focal_length, size)
    options: dict[str, Any] = {
        "translation": translation,
        "focal_length": focal,
        "camera_center": centre,
        "image_size": torch.full((batch, 2), size),
        "config": config,
    }
    found: dict[str, Any] = {"persons": batch, "rounds": rounds, "mode": errors(joints, truth)}
    # half of a joint's weight for a deviation of two cells
    certainty = 4 / (4 + covariance.diagonal(dim1=-2, dim2=-1).mean(-1))
    for name, points, confidence in (
        ("detections", mean, certainty),
        ("true_keypoints", joints_2d, torch.ones_like(certainty)),
    ):
        fit = fit_keypoints(model, cond, points * unit, confidence, **options)
        assert fit.translation is not None
        before = project(joints, translation, focal, centre)
        after = project(fit.joints, fit.translation, focal, centre)
        found[name] = {
            **errors(fit.joints, truth),
            "keypoint_error_before_px": float((before - points * unit).norm(dim=-1).mean()),
            "keypoint_error_after_px": float((after - points * unit).norm(dim=-1).mean()),
            "z_rms": float(fit.z.square().mean().sqrt()),
        }
    return found


def views(
    model: ProHMR | HUMR, source: Any, persons: int, rounds: int, seed: int
) -> dict[str, Any]:
    """The same pose seen by four cameras: each mode alone, and after refinement."""
    modes, refined, truths = [], [], []
    number = len(source.poses["test"].betas)
    for person in range(persons):
        index = torch.full((VIEWS,), person * (number // persons))
        seen = source.sample(VIEWS, seed + person, "test", index=index)
        with torch.no_grad():
            cond = model.condition(seen)
            modes.append(model.pose(model.decode(torch.zeros(VIEWS, 1, model.dims), cond))[0][:, 0])
        refined.append(refine_views(model, cond, FittingConfig(max_iter=rounds)).joints)
        truths.append(seen.need("joints_3d")[0])
    truth = torch.cat(truths)
    return {
        "persons": persons,
        "views": VIEWS,
        "single": errors(torch.cat(modes), truth),
        "refined": errors(torch.cat(refined), truth),
    }


def surest(model: POCO, persons: PersonBatch) -> dict[str, float]:
    """Errors in mm of the persons of whom the model is surest as a whole."""
    found = model.hypotheses(persons, 1)
    (truth,) = persons.need("joints_3d")
    known = [persons.joint_names.index(name) for name in found.joint_names]
    error = 1000 * mpjpe(found.joints_3d[:, 0], truth[:, known], root=0)
    with torch.no_grad():
        unsure = model.whole_body_uncertainty(model.predict(persons)).to(error.dtype)
    order = unsure.argsort()
    return {
        "whole_body_pcc": float(pearson(unsure, error)),
        **{
            f"mpjpe_mm_of_surest_{share:g}": float(error[order[: round(share * len(order))]].mean())
            for share in (0.25, 0.5, 1.0)
        },
    }
