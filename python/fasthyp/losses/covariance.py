"""The spread of hypotheses against that of the detector's heatmaps: L_HM of Wehrbein et al."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp.losses._base import LossModule, Shapes, check_number, mean

POSE_INN_ROOT = (0, 3)
"""The hips among the 16 joints of pose_inn; the root is in their middle."""
POSE_INN_FITTED = (2, 1, 4, 5, 6, 7, 9, 15, 14, 13, 10, 11, 12)
"""Which of the 16 joints of pose_inn (Human3.6M without the root) belong to its 13 fitted heatmaps
(MPII without the hips), in their order."""


def pose_inn_positions(poses: Tensor) -> Tensor:
    """Where the 13 joints with fitted heatmaps are, in x and y, relative to the middle of the hips.

    Args:
        poses: (..., 48) metres: 16 joints, all x, then all y, then all z.

    Returns:
        (..., 13, 2) metres.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    Shapes()("poses", poses, "... 48")
    spatial = poses.unflatten(-1, (3, 16))[..., :2, :]
    spatial = spatial - spatial[..., POSE_INN_ROOT].mean(-1, keepdim=True)
    return spatial[..., POSE_INN_FITTED].mT


def heatmap_covariance_loss(
    positions: Tensor,
    covariance: Tensor,
    *,
    metres_per_pixel: float = 0.01,
    threshold: float = 2.1,
    official: bool = False,
) -> Tensor:
    """L_HM: the hypotheses of an uncertain joint must spread as widely as its heatmap does.

    Wehrbein et al., ICCV 2021, equations 3 and 4: with S the covariance of the M hypotheses
    (unbiased) and H that of the heatmap, the mean over images and joints of
    ``m sqrt(max(0, H_xx - S_xx)^2 + max(0, H_yy - S_yy)^2 + (H_xy - S_xy)^2)``. One-sided in the
    variances, two-sided in the covariance; m is 1 where a standard deviation of the heatmap is
    above ``threshold`` and 0 elsewhere, and joints with m = 0 count in the mean.

    Args:
        positions: (B, M, J, 2) float32 or float64, metres, M of at least 2, each relative to its
            pose's root; see :func:`pose_inn_positions`.
        covariance: (B, J, 2, 2) of the heatmaps in pixels^2, as ``fasthyp.fit_gaussians`` gives
            them, in the axes of ``positions``: negate the off-diagonal where these have y up.
        metres_per_pixel: what a pixel of the heatmap is worth; the paper's 10 mm.
        threshold: in pixels; the paper's 1.05 times the 2 pixels of the training targets.
        official: ``covariance`` is what the official code keeps in its condition vector: divided
            by 20^2, of standard deviations that were doubled if above ``threshold``, in axes with
            y up. The code takes 5 mm for a pixel then (here half of ``metres_per_pixel``), so that
            the targets of uncertain joints are the paper's, and compares the doubled ones with the
            threshold. (It also computes in float64 and changes the poses given to it.)

    Returns:
        A number, in metres^2; the paper weights it with 750.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("positions", positions, "B M J 2")
    shapes("covariance", covariance, "B J 2 2")
    if shapes["M"] < 2:
        raise ValueError(f"positions: expected at least 2 hypotheses, got {tuple(positions.shape)}")
    check_number("metres_per_pixel", metres_per_pixel, above=True)
    check_number("threshold", threshold)
    if official:
        covariance, metres_per_pixel = covariance * 20**2, metres_per_pixel / 2
    spread = positions - positions.mean(1, keepdim=True)
    x, y = spread.unbind(-1)
    pairs = torch.stack((x * x, y * y, x * y), dim=-1).sum(1) / (shapes["M"] - 1)
    target = torch.stack(
        (covariance[..., 0, 0], covariance[..., 1, 1], covariance[..., 0, 1]), dim=-1
    )
    uncertain = (target[..., :2] > threshold**2).any(-1)
    missing = target * metres_per_pixel**2 - pairs
    missing = torch.cat((missing[..., :2].relu(), missing[..., 2:]), dim=-1)
    # the tiny number keeps the gradient of the root finite at zero
    distance = ((missing * missing).sum(-1) + 1e-30).sqrt()
    return mean(torch.where(uncertain, distance, 0))


class HeatmapCovarianceLoss(LossModule, function=heatmap_covariance_loss):
    """Module of :func:`heatmap_covariance_loss`."""
