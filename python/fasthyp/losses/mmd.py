"""Maximum mean discrepancies as losses: of pose_inn's latent, and of HUMR's joints and heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasthyp.losses._base import LossModule, Shapes, check_choice, mean
from fasthyp.mmd import mmd2

BANDWIDTHS = (0.05, 0.2, 0.9)


def latent_mmd_loss(
    output: Tensor,
    target: Tensor,
    *,
    blocked: int = 32,
    bandwidths: Sequence[float] = BANDWIDTHS,
    official: bool = False,
) -> Tensor:
    """L_MMD: z normal, and independent of the 2D pose y. Wehrbein et al., ICCV 2021, equation 6.

    The squared MMD between the flow's outputs [z, y] and samples of the product of the marginals,
    with the inverse multiquadrics of equation 10. No gradient goes to y.

    Args:
        output: (N, D) float32 or float64, [z, y] of the forward pass.
        target: (N, D), normal z and the data's y.
        blocked: dims of y, the last ones; at least 0 and less than D.
        bandwidths: a of :func:`fasthyp.mmd2`; squared they are the paper's.
        official: the biased estimator of the official code, with each sample's kernel with itself,
            instead of the paper's unbiased one, which may be negative.

    Returns:
        A number; the paper weights it with 10.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; N = 1 has no
        unbiased estimate.
    """
    shapes = Shapes()
    shapes("output", output, "N D")
    shapes("target", target, "P D")
    if not isinstance(blocked, int) or not 0 <= blocked < shapes["D"]:
        raise ValueError(f"blocked: expected 0 to {shapes['D'] - 1}, got {blocked}")
    if not official:
        _check_two("output", shapes["N"])
        _check_two("target", shapes["P"])
    free = shapes["D"] - blocked
    x = torch.cat((output[:, :free], output[:, free:].detach()), dim=1)
    return mmd2(x, target, bandwidths, estimator="biased" if official else "unbiased")


class JointValidity(NamedTuple):
    """Which joints of an image (B, J) the heatmap MMD looks at, and how; all bool.

    Attributes:
        sampled: the heatmap's samples are the target; the keypoint alone, where not.
        counted: the joint counts in the loss.
    """

    sampled: Tensor
    counted: Tensor


def joint_validity(
    confidence: Tensor,
    articulated: Tensor,
    in_box: Tensor,
    in_crop: Tensor,
    *,
    low: float = 0.15,
    high: float = 0.7,
    visible: float = 0.5,
) -> JointValidity:
    """HUMR's (WACV 2025) rules for which joints get a distribution as target.

    Samples of the heatmap are used where the detector is unsure, but not lost: its confidence is
    between ``low`` and ``high``; the joint is one of the highly articulated (elbows, wrists, knees,
    ankles), and the annotated joint is inside the box and the square crop. A joint does not count
    at all where the annotated one is outside the crop, nor where it is none of the articulated and
    the confidence is below ``visible``.

    Args:
        confidence: (B, J) maxima of the heatmaps.
        articulated, in_box, in_crop: (B, J) of any real or bool dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("confidence", confidence, "B J")
    flags = (("articulated", articulated), ("in_box", in_box), ("in_crop", in_crop))
    for name, flag in flags:
        shapes(name, flag, "B J", mask=True)
    articulated, in_box, in_crop = (flag != 0 for _, flag in flags)
    unsure = (confidence > low) & (confidence < high)
    return JointValidity(
        sampled=unsure & articulated & in_box & in_crop,
        counted=in_crop & (articulated | (confidence >= visible)),
    )


def heatmap_mmd_loss(
    predicted: Tensor,
    samples: Tensor,
    keypoints: Tensor,
    validity: JointValidity,
    *,
    bandwidths: Sequence[float] = BANDWIDTHS,
    estimator: str = "biased",
    reduction: str = "mean",
) -> Tensor:
    """L_MMD of HUMR (WACV 2025): each joint's hypotheses against samples of its heatmap.

    One squared MMD for each joint, between the projections of the random hypotheses (not the mode)
    and as many targets, of which the first is always the annotated keypoint; see
    :func:`joint_validity`. Joints that do not count are zero and in the mean. HUMR's code computes
    distances from inner products, with poor float32 gradients; here differences are used.

    Args:
        predicted: (B, S, J, 2) float32 or float64, in the crop's coordinates from -1 to 1.
        samples: (B, T, J, 2), drawn from the heatmaps (``fasthyp.sample_heatmaps``), the same
            coordinates; HUMR has T = S.
        keypoints: (B, J, 2) annotated joints, the same coordinates.
        validity: of :func:`joint_validity`.
        bandwidths: as for :func:`fasthyp.mmd2`.
        estimator: ``"biased"``, HUMR's, or ``"unbiased"``.
        reduction: ``"mean"``, or ``"none"`` for (B, J).

    Returns:
        A number, which HUMR weights with 0.05, or (B, J).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("predicted", predicted, "B S J 2")
    shapes("samples", samples, "B T J 2")
    shapes("keypoints", keypoints, "B J 2")
    shapes("validity.sampled", validity.sampled, "B J", mask=True)
    shapes("validity.counted", validity.counted, "B J", mask=True)
    check_choice("estimator", estimator, ("biased", "unbiased"))
    check_choice("reduction", reduction, ("mean", "none"))
    if estimator == "unbiased":
        _check_two("predicted", shapes["S"])
        _check_two("samples", shapes["T"])
    first = torch.arange(shapes["T"], device=samples.device) == 0
    sampled = (validity.sampled != 0)[:, None] & ~first[:, None]
    targets = torch.where(sampled[..., None], samples, keypoints[:, None])
    counted = validity.counted != 0
    # the same finite numbers for what does not count, so that no gradient of it can be NaN
    x = torch.where(counted[:, None, :, None], predicted, keypoints[:, None].detach())
    discrepancy = mmd2(
        x.transpose(1, 2).contiguous(),
        targets.transpose(1, 2).contiguous(),
        bandwidths,
        estimator="biased" if estimator == "biased" else "unbiased",
    )
    discrepancy = torch.where(counted, discrepancy, 0)
    return mean(discrepancy) if reduction == "mean" else discrepancy


def _check_two(name: str, number: int) -> None:
    if number < 2:
        raise ValueError(f"{name}: expected 2 samples or more (unbiased estimate), got {number}")


class LatentMMDLoss(LossModule, function=latent_mmd_loss):
    """Module of :func:`latent_mmd_loss`."""


class HeatmapMMDLoss(LossModule, function=heatmap_mmd_loss):
    """Module of :func:`heatmap_mmd_loss`."""
