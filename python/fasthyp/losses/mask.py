"""The mask loss of HUMR: an invisible joint must be where it cannot be seen."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp.losses._base import LossModule, Shapes, check_choice, mean

_REACH = 0.71
"""Distance in pixels, just above sqrt(0.5), to the nearest pixel of a mask that a point is in."""


def off_mask(points: Tensor, mask: Tensor) -> Tensor:
    """Which points are inside the image but not on the mask.

    On the mask is what is less than 0.71 pixels from the centre of one of its pixels, HUMR's bound.
    Only the four pixels around a point can be that near, so they are looked up; the official code
    computes the distance to every pixel of the mask, from inner products, off by up to 0.06 pixels.

    Args:
        points: (B, ..., 2) x, y in pixels; (0, 0) is the centre of the first pixel.
        mask: (B, H, W) of any real or bool dtype.

    Returns:
        (B, ...) bool. False for NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("points", points, "... 2")
    shapes("mask", mask, "B H W", mask=True)
    if points.ndim < 2 or len(points) != shapes["B"]:
        raise ValueError(
            f"points: expected shape (B={shapes['B']}, ..., 2), got {tuple(points.shape)}"
        )
    height, width = shapes["H"], shapes["W"]
    x, y = points.detach().unbind(-1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = torch.where(inside, x, 0), torch.where(inside, y, 0)
    flat = (mask != 0).flatten(1)
    on = torch.zeros_like(inside)
    for right, down in ((0, 0), (0, 1), (1, 0), (1, 1)):
        column, row = x.floor() + right, y.floor() + down
        near = torch.hypot(column - x, row - y) < _REACH
        # one beyond the image is never near: the point is on the border, a whole pixel away
        cell = row.clamp(max=height - 1).long() * width + column.clamp(max=width - 1).long()
        on |= near & flat.gather(1, cell.flatten(1)).reshape(cell.shape)
    return inside & ~on


def mask_loss(
    predicted: Tensor,
    targets: Tensor,
    usable: Tensor,
    mask: Tensor,
    hidden: Tensor,
    *,
    reduction: str = "mean",
    official: bool = False,
) -> Tensor:
    """L_mask of HUMR (WACV 2025): pulls invisible joints that are in view off the background.

    A joint that the detector does not see, but which a hypothesis puts inside the image and not on
    the person's mask, is wrong; its L1 distance to the nearest target of that joint is penalised.
    Targets are the heatmap's samples that are on the mask, and the annotated keypoint. Summed over
    joints.

    Args:
        predicted: (B, S, J, 2) float32 or float64, projections of the random hypotheses (not the
            mode), in the crop's coordinates from -1 to 1.
        targets: (B, T, J, 2), the same coordinates.
        usable: (B, T, J) of any real or bool dtype: a target that may be used. A joint without one
            has no loss.
        mask: (B, H, W) of any real or bool dtype: the person, in the crop.
        hidden: (B, J), of any real or bool dtype: HUMR's are those with a confidence below 0.5 or
            outside the crop, in images with a valid mask.
        reduction: ``"mean"`` over hypotheses and images, 0 if there are none, or ``"none"`` for
            (B, S).
        official: the nearest of all joints' targets, as the official code takes it, which lets a
            wrist rest on a knee.

    Returns:
        A number, which HUMR weights with 0.1, or (B, S).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("predicted", predicted, "B S J 2")
    shapes("targets", targets, "B T J 2")
    shapes("usable", usable, "B T J", mask=True)
    shapes("mask", mask, "B H W", mask=True)
    shapes("hidden", hidden, "B J", mask=True)
    check_choice("reduction", reduction, ("mean", "none"))
    if shapes["T"] == 0:
        raise ValueError(f"targets: expected at least one, got {tuple(targets.shape)}")
    x, y = (predicted + 1).unbind(-1)
    pixels = torch.stack((x * (shapes["W"] / 2), y * (shapes["H"] / 2)), dim=-1)
    wrong = off_mask(pixels, mask) & (hidden != 0)[:, None]
    usable = (usable != 0)[..., None]
    distance = (_nearest_of_all if official else _nearest)(predicted, targets, usable)
    wrong = wrong & distance.isfinite()
    values = torch.where(wrong, distance, 0).sum(-1)
    return mean(values) if reduction == "mean" else values


class MaskLoss(LossModule, function=mask_loss):
    """Module of :func:`mask_loss`."""


def _nearest(predicted: Tensor, targets: Tensor, usable: Tensor) -> Tensor:
    """L1 distance (B, S, J) to the nearest usable target of the same joint."""
    with torch.no_grad():
        distance = (predicted[:, :, None] - targets[:, None]).abs().sum(-1)  # (B, S, T, J)
        best = distance.masked_fill(~usable[:, None, ..., 0], torch.inf).argmin(2)
    nearest = targets.gather(1, best[..., None].expand(*best.shape, 2))
    able = usable.any(1)[:, None]
    return torch.where(able[..., 0], (predicted - nearest).abs().sum(-1), torch.inf)


def _nearest_of_all(predicted: Tensor, targets: Tensor, usable: Tensor) -> Tensor:
    """L1 distance (B, S, J) to the nearest usable target of any joint."""
    points, pool = predicted.flatten(1, 2), targets.flatten(1, 2)
    with torch.no_grad():
        distance = torch.cdist(points, pool, p=1)
        best = distance.masked_fill(~usable.flatten(1, 2).mT, torch.inf).argmin(2)
    nearest = pool.gather(1, best[..., None].expand(*best.shape, 2)).reshape(predicted.shape)
    able = usable.flatten(1).any(1)[:, None, None]
    return torch.where(able, (predicted - nearest).abs().sum(-1), torch.inf)
