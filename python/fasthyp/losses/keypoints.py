"""Losses of joints and of SMPL parameters, for the mode and in expectation over hypotheses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthyp.losses._base import LossModule, Shapes, check_choice, mean

PROHMR_PELVIS = (39,)
"""The pelvis among ProHMR's 44 joints."""
SPIN_HIPS = (2, 3)
"""The hips among the 24 joints of SPIN, HMR and POCO, in whose middle the pelvis is."""


def keypoint_loss(
    predicted: Tensor,
    target: Tensor,
    confidence: Tensor | None = None,
    *,
    norm: str = "l1",
    root: Sequence[int] | None = None,
) -> Tensor:
    """The weighted sum of the errors of a hypothesis' joints, in 2D or 3D.

    L_2D and L_3D of ProHMR (ICCV 2021; ``norm="l1"``, in 3D ``root=PROHMR_PELVIS``) and of HUMR
    (WACV 2025), where the joints' errors are summed over all dimensions;
    :func:`mode_and_expectation` then averages over images and hypotheses.

    Args:
        predicted: (B, S, N, C) float32 or float64.
        target: (B, N, C) or (B, S, N, C).
        confidence: (B, N) or (B, S, N) of any real or bool dtype; 1 unless given. A joint of
            confidence 0 is not looked at.
        norm: ``"l1"``: absolute differences, ``"l2"``: their squares.
        root: joints whose mean is the origin, of both poses.

    Returns:
        (B, S).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("predicted", predicted, "B S N C")
    check_choice("norm", norm, ("l1", "l2"))
    target = _each(shapes, "target", target, "N C")
    if root is not None:
        if not root or any(not isinstance(j, int) or not 0 <= j < shapes["N"] for j in root):
            raise ValueError(f"root: expected joints from 0 to {shapes['N'] - 1}, got {root}")
        joints = list(root)
        predicted = predicted - predicted[:, :, joints].mean(2, keepdim=True)
        target = target - target[:, :, joints].mean(2, keepdim=True)
    difference = predicted - target
    if confidence is not None:
        weight = _each(shapes, "confidence", confidence, "N", mask=True)[..., None]
        difference = torch.where(weight == 0, 0, difference)
    error = difference.abs() if norm == "l1" else difference * difference
    if confidence is not None:
        error = error * weight.to(error.dtype)
    return error.sum((-2, -1))


def parameter_loss(predicted: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """The squared error of SMPL parameters, summed over a hypothesis' numbers.

    L_theta and L_beta of ProHMR (ICCV 2021), on rotation matrices and shape coefficients; HUMR's
    L_beta.

    Args:
        predicted: (B, S, ...) float32 or float64.
        target: (B, ...) or (B, S, ...).
        valid: (B,) or (B, S), of any real or bool dtype: whether there is an annotation.

    Returns:
        (B, S).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("predicted", predicted, "...")
    if predicted.ndim < 2:
        raise ValueError(f"predicted: expected shape (B, S, ...), got {tuple(predicted.shape)}")
    shapes("target", target, "...")
    per_image = predicted.shape[:1] + predicted.shape[2:]
    if target.shape not in (per_image, predicted.shape):
        raise ValueError(
            f"target: expected shape {tuple(per_image)} or {tuple(predicted.shape)}, "
            f"got {tuple(target.shape)}"
        )
    target = target if target.shape == predicted.shape else target[:, None]
    shapes.sizes.update(B=len(predicted), S=predicted.shape[1])
    difference = (predicted - target)[..., None].flatten(2)
    if valid is None:
        return (difference * difference).sum(-1)
    weight = _each(shapes, "valid", valid, "", mask=True)
    difference = torch.where(weight[..., None] == 0, 0, difference)
    return (difference * difference).sum(-1) * weight.to(difference.dtype)


def mode_and_expectation(
    values: Tensor, valid: Tensor | None = None, *, official: bool = False
) -> tuple[Tensor, Tensor]:
    """The mean over images of the first hypothesis, the mode, and over all others.

    The mode and exp parts of ProHMR (ICCV 2021) and HUMR (WACV 2025): ``L_mode = sum_b l_b0 / B``
    and ``L_exp = sum_b sum_{s>0} l_bs / (B (S - 1))``.

    Args:
        values: (B, S) losses of hypotheses, of which the first is the mode (z = 0).
        valid: (B,) of any real or bool dtype; divides by their sum instead of B.
        official: NaN for the expectation where S = 1, as ProHMR's code has it for its
            orthonormality loss; zero otherwise.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("values", values, "B S")
    if shapes["S"] < 1:
        raise ValueError(f"values: expected at least one hypothesis, got {tuple(values.shape)}")
    if valid is not None:
        shapes("valid", valid, "B", mask=True)
    mode, others = mean(values[:, 0], valid), mean(values[:, 1:], valid)
    if official and shapes["S"] == 1:
        others = others * torch.nan
    return mode, others


def camera_scale_loss(scale: Tensor) -> Tensor:
    """``mean exp(-10 s)^2``: keeps the weak-perspective scale s positive, which a mirrored body in
    a negative one would fit as well. In the codes of HUMR (weight 1) and POCO (0.016), as in SPIN;
    in no paper.

    Args:
        scale: float32 or float64, any shape.

    Raises:
        TypeError: not a tensor of a floating dtype.
    """
    Shapes()("scale", scale, "...")
    return mean((-20 * scale).exp())


class KeypointLoss(LossModule, function=keypoint_loss):
    """Module of :func:`keypoint_loss`."""


class ParameterLoss(LossModule, function=parameter_loss):
    """Module of :func:`parameter_loss`."""


class CameraScaleLoss(LossModule, function=camera_scale_loss):
    """Module of :func:`camera_scale_loss`."""


def _each(shapes: Shapes, name: str, tensor: Tensor, end: str, mask: bool = False) -> Tensor:
    """A tensor (B, ...) or (B, S, ...) as one that broadcasts with (B, S, ...)."""
    dims = 1 + len(end.split())
    if isinstance(tensor, Tensor) and tensor.ndim == dims:
        shapes(name, tensor, f"B {end}", mask)
        return tensor[:, None]
    shapes(name, tensor, f"B S {end}", mask)
    return tensor
