"""Likelihoods of a regressor's residual, with a predicted scale: POCO's losses."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fasthyp.losses._base import LossModule, Shapes, check_choice, check_number, mean
from fasthyp.losses.nll import LOG_2PI

Base = Literal["gaussian", "laplace"]
BASES = ("gaussian", "laplace")


def normalised_residual(
    predicted: Tensor, target: Tensor, sigma: Tensor, *, official: bool = False
) -> Tensor:
    """``(target - predicted) / sigma``, what POCO's (3DV 2024, equation 3) error density is over.

    Args:
        predicted, target: (B, ...) float32 or float64: rotation matrices (B, 24, 3, 3).
        sigma: positive, of the shape of ``predicted`` or of its first dimensions: (B, 24).
        official: the absolute value, over sigma + 1e-9, as POCO's code: its flow, whose base is
            symmetric, sees positive residuals only.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    sigma = _check(predicted, target, sigma)
    if official:
        return (predicted - target).abs() / (sigma + 1e-9)
    return (target - predicted) / sigma


def residual_nll(
    predicted: Tensor,
    target: Tensor,
    sigma: Tensor,
    valid: Tensor | None = None,
    *,
    base: Base = "gaussian",
    constant: bool = False,
    official: bool = False,
) -> Tensor:
    """The negative log-likelihood of residuals r under a density of scale sigma, per number.

    ``r^2 / (2 sigma^2) + log sigma`` (Gaussian; POCO, 3DV 2024, equation 2, after Kendall and Gal)
    or ``|r| / sigma + log sigma`` (Laplace; Li et al., "Human Pose Regression With Residual
    Log-likelihood Estimation", ICCV 2021).

    Args:
        predicted, target, sigma: as for :func:`normalised_residual`.
        valid: (B,) of any real or bool dtype, weights of the images.
        base: ``"gaussian"`` or ``"laplace"``.
        constant: with log(2 pi) / 2, or log 2.
        official: as POCO's code. ``norm_flow_res_gaus`` takes sigma, which its flow divides by, for
            the variance: ``(r^2 / v + log v) / 2`` with v = sigma + 1e-8. ``norm_flow_res`` has a
            density that is not normalised:
            ``log(sigma sqrt(2 pi)) + |r| / (sqrt(2) sigma + 1e-9)``.

    Returns:
        The mean over all numbers of the images; 0 if there are none.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    sigma = _filled(_check(predicted, target, sigma, valid), valid, 1)
    check_choice("base", base, BASES)
    residual = _filled(predicted - target, valid, 0)
    return mean(_nll(residual, sigma, base, constant, official), valid)


def flow_residual_nll(log_prob: Tensor, sigma: Tensor, valid: Tensor | None = None) -> Tensor:
    """``mean log sigma - mean log P(r / sigma)``: POCO (3DV 2024), equation 4, and its code.

    Args:
        log_prob: (B, ...) float32 or float64: log P of :func:`normalised_residual`.
        sigma: (B, ...), positive; the means are apart, so no shape has to fit but B.
        valid: (B,) of any real or bool dtype, weights of the images.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    for name, value in (("log_prob", log_prob), ("sigma", sigma)):
        shapes(name, value, "...")
        if value.ndim < 1 or len(value) != shapes.sizes.setdefault("B", len(value)):
            expected = f"(B={shapes.sizes.get('B', '')}, ...)"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    if valid is not None:
        shapes("valid", valid, "B", mask=True)
    return mean(_filled(sigma, valid, 1).log(), valid) - mean(log_prob, valid)


def residual_log_likelihood_loss(
    predicted: Tensor,
    target: Tensor,
    sigma: Tensor,
    log_prob: Tensor,
    valid: Tensor | None = None,
    *,
    base: Base = "gaussian",
    flow_weight: float = 1e-4,
    base_weight: float = 1e-2,
    sigma_weight: float = 1e-4,
) -> Tensor:
    """L_NF of POCO (3DV 2024), equation 6: the flow models what a simple density Q leaves over.

    ``-l_nf log P(r / sigma) - l_q log Q(r / sigma) + l_sigma log sigma``, averaged over images and
    numbers. Q, of unit scale, passes the gradient to the regressor while the flow is untrained.
    POCO's code has log sigma in both terms and other weights: that is :func:`pose_residual_loss`
    plus :func:`flow_residual_nll`, weighted by ``POCO_CLIFF_WEIGHTS``.

    Args:
        predicted, target, sigma, valid, base: as for :func:`residual_nll`.
        log_prob: (B, ...): log P of :func:`normalised_residual`, conditioned on the image.
        flow_weight, base_weight, sigma_weight: the paper's.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    wide = _check(predicted, target, sigma, valid, log_prob)
    check_choice("base", base, BASES)
    for name, weight in (
        ("flow_weight", flow_weight),
        ("base_weight", base_weight),
        ("sigma_weight", sigma_weight),
    ):
        check_number(name, weight)
    ratio = _filled(target - predicted, valid, 0) / _filled(wide, valid, 1)
    base_nll = mean(_nll(ratio, torch.ones_like(ratio), base, True, False), valid)
    log_sigma = mean(_filled(sigma, valid, 1).log(), valid)
    flow_nll = flow_residual_nll(log_prob, sigma, valid) - log_sigma
    return flow_weight * flow_nll + base_weight * base_nll + sigma_weight * log_sigma


def pose_residual_loss(
    predicted: Tensor,
    target: Tensor,
    sigma: Tensor,
    valid: Tensor | None = None,
    conditioned: Tensor | None = None,
    *,
    base: Base | Literal["flow"] = "gaussian",
    official: bool = False,
) -> Tensor:
    """The pose loss of POCO's training, with its dual conditioning.

    For most images :func:`residual_nll`. Where the scale network was shown the true pose instead
    of the predicted one (a quarter of Human3.6M in the released configuration), it should be
    certain: the mean squared error plus the mean of sigma. The paper does not mention this.

    Args:
        predicted, target: (B, J, 3, 3) float32 or float64, rotation matrices.
        sigma: (B, J) or (B, J, 3, 3), positive.
        valid: (B,) of any real or bool dtype: images with SMPL annotations; others do not count.
        conditioned: (B,) of any real or bool dtype: images whose scale network saw the true pose.
        base: ``"gaussian"`` or ``"laplace"``, the code's ``norm_flow_res_gaus`` and
            ``norm_flow_res``; ``"flow"``, its ``norm_flow``: nothing, as :func:`flow_residual_nll`
            is the whole loss.
        official: as POCO's code: see :func:`residual_nll`, and for ``sigma`` (B, J), as in both
            released configurations, its variants are never reached: the loss is the mean squared
            error, without sigma, whatever the base.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("predicted", predicted, "B J 3 3")
    wide = _check(predicted, target, sigma, valid)
    check_choice("base", base, (*BASES, "flow"))
    batch = predicted.new_ones(len(predicted))
    weight = batch if valid is None else valid.to(batch.dtype)
    shown = torch.zeros_like(weight)
    if conditioned is not None:
        shapes("conditioned", conditioned, "B", mask=True)
        shown = torch.where(conditioned != 0, weight, 0)
    free = weight - shown
    square = _filled(predicted - target, weight, 0) ** 2
    if official and sigma.ndim == 2:
        loss = mean(square, free)
    elif base == "flow":
        loss = predicted.new_zeros(())
    else:
        loss = residual_nll(predicted, target, wide, free, base=base, official=official)
    return loss + mean(square, shown) + mean(sigma, shown)


def image_keypoint_loss(
    predicted: Tensor,
    target: Tensor,
    confidence: Tensor,
    image_size: Tensor,
    box_size: Tensor,
) -> Tensor:
    """The reprojection error in the whole image of CLIFF and POCO: L_2D of equation 7.

    The mean over images, joints and coordinates of the squared error, in units of half the image,
    times the confidence and the ratio of image to box, so that small persons count as well.

    Args:
        predicted, target: (B, N, 2) float32 or float64, pixels of the whole image.
        confidence: (B, N) of any real or bool dtype; POCO sets it to 0 for OpenPose's 25 joints.
        image_size: (B, 2) width and height in pixels.
        box_size: (B,) side of the person's box in pixels (200 times POCO's ``scale``).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("predicted", predicted, "B N 2")
    shapes("target", target, "B N 2")
    shapes("confidence", confidence, "B N", mask=True)
    shapes("image_size", image_size, "B 2")
    shapes("box_size", box_size, "B")
    weight = confidence.to(predicted.dtype)[..., None]
    difference = torch.where(weight == 0, 0, predicted - target)
    scale = 4 / (image_size * box_size[:, None])
    return mean(weight * difference * difference * scale[:, None])


class ResidualNLL(LossModule, function=residual_nll):
    """Module of :func:`residual_nll`."""


class FlowResidualNLL(LossModule, function=flow_residual_nll):
    """Module of :func:`flow_residual_nll`."""


class ResidualLogLikelihoodLoss(LossModule, function=residual_log_likelihood_loss):
    """Module of :func:`residual_log_likelihood_loss`."""


class PoseResidualLoss(LossModule, function=pose_residual_loss):
    """Module of :func:`pose_residual_loss`."""


class ImageKeypointLoss(LossModule, function=image_keypoint_loss):
    """Module of :func:`image_keypoint_loss`."""


def _nll(residual: Tensor, sigma: Tensor, base: str, constant: bool, official: bool) -> Tensor:
    if base == "gaussian":
        if official:
            variance = sigma + 1e-8
            return 0.5 * (residual * residual / variance + variance.log())
        value = 0.5 * (residual / sigma) ** 2 + sigma.log()
        return value + 0.5 * LOG_2PI if constant else value
    if official:
        return (sigma * math.sqrt(2 * math.pi)).log() + residual.abs() / (
            math.sqrt(2) * sigma + 1e-9
        )
    value = residual.abs() / sigma + sigma.log()
    return value + math.log(2) if constant else value


def _check(
    predicted: Tensor,
    target: Tensor,
    sigma: Tensor,
    valid: Tensor | None = None,
    log_prob: Tensor | None = None,
) -> Tensor:
    """The checked sigma, of as many dimensions as the residual."""
    shapes = Shapes()
    shapes("predicted", predicted, "...")
    shapes("target", target, "...")
    shapes("sigma", sigma, "...")
    shape = tuple(predicted.shape)
    if not shape or target.shape != predicted.shape:
        raise ValueError(f"target: expected shape {shape}, got {tuple(target.shape)}")
    if sigma.ndim < 1 or tuple(sigma.shape) != shape[: sigma.ndim]:
        raise ValueError(f"sigma: expected shape {shape} or its start, got {tuple(sigma.shape)}")
    shapes.sizes["B"] = shape[0]
    if valid is not None:
        shapes("valid", valid, "B", mask=True)
    if log_prob is not None:
        shapes("log_prob", log_prob, "...")
        if log_prob.shape[:1] != predicted.shape[:1]:
            got = tuple(log_prob.shape)
            raise ValueError(f"log_prob: expected shape (B={shape[0]}, ...), got {got}")
    return sigma.reshape(sigma.shape + (1,) * (predicted.ndim - sigma.ndim)).expand_as(predicted)


def _filled(values: Tensor, valid: Tensor | None, number: float) -> Tensor:
    """``number`` where the image does not count, so that no gradient is NaN for what is there."""
    if valid is None:
        return values
    return torch.where((valid == 0).reshape(-1, *[1] * (values.ndim - 1)), number, values)
