"""Objectives that fit a body to keypoints or to several views, with a flow as the prior."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp.geometry import perspective_projection
from fasthyp.losses._base import LossModule, Shapes, check_number


def geman_mcclure(residual: Tensor, *, sigma: float = 100.0) -> Tensor:
    """The robust error ``sigma^2 r^2 / (sigma^2 + r^2)`` of Geman and McClure, 1987, elementwise.

    SMPLify's and ProHMR's; nears sigma^2 for large residuals.

    Args:
        residual: float32 or float64, any shape, in the unit of ``sigma``.
        sigma: positive; where the error bends.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    Shapes()("residual", residual, "...")
    check_number("sigma", sigma, above=True)
    # as the square of a ratio, so that a large residual does not overflow
    ratio = residual / sigma
    return (sigma * ratio / torch.hypot(torch.ones_like(ratio), ratio)) ** 2


def flow_prior(z: Tensor) -> Tensor:
    """``||z||^2`` of each latent (..., D): (...).

    ProHMR (ICCV 2021), section 3.6: the log-determinant of its additive couplings is constant, so
    ``-2 log p(theta | image)`` is this but for a constant.

    Raises:
        TypeError: not a tensor of a floating dtype.
    """
    Shapes()("z", z, "... D")
    return (z * z).sum(-1)


def keypoint_fitting_loss(
    joints: Tensor,
    keypoints: Tensor,
    confidence: Tensor,
    translation: Tensor,
    focal_length: Tensor,
    camera_center: Tensor,
    image_size: Tensor,
    z: Tensor,
    betas: Tensor,
    *,
    sigma: float = 100.0,
    pose_weight: float = 4.0,
    shape_weight: float = 6.0,
) -> Tensor:
    """ProHMR's objective of fitting a body to 2D keypoints, over z, betas and the translation.

    ProHMR (ICCV 2021), section 3.6: robust reprojection error, image-based prior ``||z||^2`` and
    shape prior ``||beta||^2``. As in its code, residuals are scaled to an image of 1000 pixels
    (SMPLify-X), confidences and all weights are squared, and images are summed.

    Args:
        joints: (B, N, 3) float32 or float64, metres, of the body model.
        keypoints: (B, N, 2) pixels.
        confidence: (B, N) of any real or bool dtype.
        translation: (B, 3) metres.
        focal_length, camera_center: (B, 2) pixels.
        image_size: (B, 2) pixels, in any order.
        z: (B, D) latents.
        betas: (B, K) shape coefficients.
        sigma: of :func:`geman_mcclure`, pixels.
        pose_weight, shape_weight: of the priors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    for name, value, pattern in (
        ("joints", joints, "B N 3"),
        ("keypoints", keypoints, "B N 2"),
        ("translation", translation, "B 3"),
        ("focal_length", focal_length, "B 2"),
        ("camera_center", camera_center, "B 2"),
        ("image_size", image_size, "B 2"),
        ("z", z, "B D"),
        ("betas", betas, "B K"),
    ):
        shapes(name, value, pattern)
    shapes("confidence", confidence, "B N", mask=True)
    check_number("pose_weight", pose_weight)
    check_number("shape_weight", shape_weight)
    projected = perspective_projection(joints, translation, focal_length, camera_center)
    scale = 1000 / image_size.amax(-1)[:, None, None]
    weight = (scale * confidence.to(joints.dtype)[..., None]) ** 2
    error = (weight * geman_mcclure(projected - keypoints, sigma=sigma)).sum()
    return error + pose_weight**2 * flow_prior(z).sum() + shape_weight**2 * (betas * betas).sum()


def multiview_consistency_loss(
    body_pose: Tensor,
    z: Tensor,
    *,
    consistency_weight: float = 300.0,
    prior_weight: float = 1.0,
) -> Tensor:
    """ProHMR's objective for several views of one person: poses near their mean, likely latents.

    ProHMR (ICCV 2021), equation 12. Its weights are squared in the code, and here.

    Args:
        body_pose: (V, J, 3, 3) float32 or float64, rotation matrices of V views, without the
            global one.
        z: (V, D), their latents.
        consistency_weight, prior_weight: not negative.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("body_pose", body_pose, "V J 3 3")
    shapes("z", z, "V D")
    check_number("consistency_weight", consistency_weight)
    check_number("prior_weight", prior_weight)
    if shapes["V"] == 0:
        return flow_prior(z).sum()
    spread = body_pose - body_pose.mean(0, keepdim=True)
    consistency = consistency_weight**2 * (spread * spread).sum()
    return consistency + prior_weight**2 * flow_prior(z).sum()


class GemanMcClure(LossModule, function=geman_mcclure):
    """Module of :func:`geman_mcclure`."""


class KeypointFittingLoss(LossModule, function=keypoint_fitting_loss):
    """Module of :func:`keypoint_fitting_loss`."""


class MultiviewConsistencyLoss(LossModule, function=multiview_consistency_loss):
    """Module of :func:`multiview_consistency_loss`."""
