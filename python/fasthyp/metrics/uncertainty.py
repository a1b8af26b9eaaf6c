"""Does a predicted uncertainty say how wrong the prediction is?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasthyp._seed import check_int
from fasthyp._tensors import check_floating
from fasthyp.metrics._checks import check_pair, check_thresholds
from fasthyp.metrics.hypotheses import check_hypotheses
from fasthyp.skeleton import SMPL_PARENTS

CALIBRATION_LEVELS = tuple(i / 20 for i in range(1, 20))
"""0.05, 0.10, ..., 0.95."""


def confidence_rank(hypotheses: Tensor, truth: Tensor) -> Tensor:
    """Share of the hypotheses of a joint that are nearer to their mean than the truth is, 0 to 1,
    by the Mahalanobis distance of the hypotheses' covariance.

    The truth lies in the region that holds a share p of the hypotheses where the rank is at most p.
    If the hypotheses are of the truth's distribution, ranks are uniform: "probability integral
    transform", Gneiting et al., JRSS-B 2007, here of a region about the mean. Hypotheses whose
    covariance is singular (fewer than D + 1, or in a plane) get a regularised one: 1e-6 of its
    trace is added along the diagonal.

    Args:
        hypotheses: (..., M, J, D), M >= 2, in any unit.
        truth: (..., J, D), same dtype, device and unit.

    Returns:
        (..., J) float32, for float64 poses float64; NaN where a number is not finite.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_hypotheses(hypotheses)
    check_pair(("hypotheses", "truth"), hypotheses[..., 0, :, :], truth)
    if hypotheses.shape[-3] < 2:
        raise ValueError(f"hypotheses: expected at least two, got {tuple(hypotheses.shape)}")
    dtype = torch.promote_types(hypotheses.dtype, torch.float32)
    drawn = hypotheses.detach().double().movedim(-3, -2)  # (..., J, M, D)
    mean = drawn.mean(-2, keepdim=True)
    offset, true_offset = drawn - mean, truth.detach().double()[..., None, :] - mean
    covariance = offset.mT @ offset / drawn.shape[-2]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(drawn.shape[-1], dtype=drawn.dtype, device=drawn.device)
    regular = covariance + torch.where(trace > 0, 1e-6 * trace, 1.0) * eye
    finite = (offset.isfinite().all(-1).all(-1) & true_offset.isfinite().all(-1).all(-1))[..., None]
    factor = torch.linalg.cholesky(torch.where(finite[..., None], regular, eye))

    def distance(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, x.mT, upper=False).square().sum(-2)

    nearer = (distance(offset) < distance(true_offset)).double().mean(-1)
    return torch.where(finite[..., 0], nearer, torch.nan).to(dtype)


def calibration_curve(
    ranks: Tensor, levels: Tensor | Sequence[float] = CALIBRATION_LEVELS
) -> tuple[Tensor, Tensor]:
    """For each level p, the share of truths in the region that holds a share p of the hypotheses.

    The same as p for a calibrated model, below it for one that is too sure. Kuleshov, Fenner and
    Ermon, "Accurate uncertainties for deep learning using calibrated regression", ICML 2018,
    equation 8, with regions in space for intervals.

    Args:
        ranks: of :func:`confidence_rank`, any shape; NaN are left out.
        levels: ascending, 0 to 1.

    Returns:
        Coverage (L,) float64 at the levels, NaN where there is no rank; and the mean of its
        absolute difference to the levels, the calibration error.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_floating("ranks", ranks)
    limits = check_levels(levels, ranks.device)
    inside, count = count_inside(ranks, limits)
    coverage = inside.double() / count
    return coverage, (coverage - limits).abs().mean()


def check_levels(levels: Tensor | Sequence[float], device: torch.device) -> Tensor:
    """Ascending levels from 0 to 1, float64."""
    limits = check_thresholds(levels, device)
    if limits[0] < 0 or limits[-1] > 1:
        raise ValueError(f"levels: expected 0 to 1, got {limits[0]:g} to {limits[-1]:g}")
    return limits


def count_inside(ranks: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """How many ranks are at most each limit (L,), and how many there are; NaN left out."""
    ranks = ranks[~ranks.isnan()].double().sort().values
    # A rank is a multiple of 1 / M; rounding must not push it beyond an equal level.
    return torch.searchsorted(ranks, limits + 1e-6, right=True), torch.tensor(
        ranks.numel(), device=ranks.device
    )


def pearson(uncertainty: Tensor, error: Tensor) -> Tensor:
    """Pearson's correlation coefficient of predicted uncertainties and errors, -1 to 1 (PCC).

    POCO (3DV 2024), section 5: over all joints of all images. Two passes in float64.

    Args:
        uncertainty: any shape, any unit.
        error: the same shape, dtype and device.

    Returns:
        () in the dtype of the input (float32 for float16 and bfloat16); NaN where one of them is
        constant or has fewer than two numbers.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    x, y = _flat_pair(uncertainty, error)
    dtype = torch.promote_types(uncertainty.dtype, torch.float32)
    if x.numel() < 2:
        return x.new_full((), torch.nan, dtype=dtype)
    constant = (x == x[0]).all() | (y == y[0]).all()
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum().sqrt() * y.square().sum().sqrt()).where(~constant, torch.nan)
    return (((x * y).sum() / scale).clamp(-1, 1)).to(dtype)


class Sparsification(NamedTuple):
    """What a sparsification plot shows.

    Attributes:
        fraction: (S,) float64, share of the predictions left out: 0, 1/S, ...
        error: (S,) float64, mean error of the others, the most uncertain left out.
        oracle: (S,) float64, the same with those of the greatest errors left out.
        ause: () float64, area between the two, divided by the mean error of all: 0 is perfect.
        random: () float64, the mean error of all, which leaving out at random would keep.
    """

    fraction: Tensor
    error: Tensor
    oracle: Tensor
    ause: Tensor
    random: Tensor


def sparsification(uncertainty: Tensor, error: Tensor, steps: int = 100) -> Sparsification:
    """How the mean error falls as the most uncertain predictions are left out.

    Ilg et al., "Uncertainty estimates and multi-hypotheses networks for optical flow", ECCV 2018,
    section 5. Predictions of equal uncertainty are left out in the order in which they come.

    Args:
        uncertainty: any shape, not empty, no NaN.
        error: the same shape, dtype and device, not negative, no NaN.
        steps: S, points of the curve.

    Returns:
        Curves and area, in the unit of the error. ``ause`` is 0 where all errors are zero.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_int("steps", steps, 1, 2**31)
    x, y = _flat_pair(uncertainty, error)
    if not x.numel():
        raise ValueError(f"error: expected at least one, got {tuple(error.shape)}")
    for name, values in (("uncertainty", x), ("error", y)):
        if values.isnan().any():
            raise ValueError(f"{name}: expected no NaN")
    if (y < 0).any():
        raise ValueError(f"error: expected none below zero, got {float(y.min()):g}")
    number = len(y)
    fraction = torch.arange(steps, dtype=torch.float64, device=y.device) / steps
    kept = (number - torch.arange(steps, device=y.device) * number // steps).clamp_min(1)

    def curve(order: Tensor) -> Tensor:
        return y[order].cumsum(0)[kept - 1] / kept

    by_uncertainty = curve(x.argsort(stable=True))
    oracle = curve(y.argsort(stable=True))
    mean = y.mean()
    area = (by_uncertainty - oracle).mean()
    ause = torch.where(mean > 0, area / mean, 0.0)
    return Sparsification(fraction, by_uncertainty, oracle, ause, mean)


def kinematic_uncertainty(uncertainty: Tensor, parents: Sequence[int] = SMPL_PARENTS) -> Tensor:
    """Each part's uncertainty plus that of all parts between it and the root.

    POCO (3DV 2024), section 4: "we sum the per-part uncertainties along SMPL's skeleton";
    ``get_kinematic_uncert`` of its code, which changes its input in place, as this does not.

    Args:
        uncertainty: (..., J).
        parents: of each part, in an order in which parents come first; -1 for a root.

    Returns:
        (..., J).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_floating("uncertainty", uncertainty)
    if uncertainty.ndim < 1 or uncertainty.shape[-1] != len(parents):
        raise ValueError(
            f"uncertainty: expected shape (..., {len(parents)}), got {tuple(uncertainty.shape)}"
        )
    if any(not -1 <= parent < part for part, parent in enumerate(parents)):
        raise ValueError(f"parents: expected -1 or an earlier part, got {tuple(parents)}")
    sums: list[Tensor] = []
    for part, parent in zip(uncertainty.unbind(-1), parents, strict=True):
        sums.append(part if parent < 0 else part + sums[parent])
    return torch.stack(sums, -1)


def body_uncertainty(
    uncertainty: Tensor, threshold: float = 0.4, root_only: bool = False
) -> Tensor:
    """One uncertainty for the whole body.

    POCO (3DV 2024), section 4, as ``get_global_uncert`` of its code does it: the mean over the
    parts, and 1 where the root is less sure than a threshold. (The paper speaks of a
    normalisation to [0, 1]; the code has none.)

    Args:
        uncertainty: (..., J), part 0 the root, for instance of :func:`kinematic_uncertainty`.
        threshold: 0.4 in POCO's demo.
        root_only: the root's uncertainty for the mean, and twice the threshold, as the code does
            for POCO-CLIFF; unless told as for POCO-PARE.

    Returns:
        (...).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_floating("uncertainty", uncertainty)
    if uncertainty.ndim < 1 or not uncertainty.shape[-1]:
        raise ValueError(f"uncertainty: expected shape (..., J), got {tuple(uncertainty.shape)}")
    root = uncertainty[..., 0]
    body = root if root_only else uncertainty.mean(-1)
    return body.masked_fill(root > (2 * threshold if root_only else threshold), 1.0)


def _flat_pair(uncertainty: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    x, y = check_floating("uncertainty", uncertainty), check_floating("error", error)
    if x.dtype != y.dtype:
        raise TypeError(f"error: expected {x.dtype}, as uncertainty, got {y.dtype}")
    if x.shape != y.shape or x.device != y.device:
        raise ValueError(
            f"error: expected {tuple(x.shape)} on {x.device}, as uncertainty, "
            f"got {tuple(y.shape)} on {y.device}"
        )
    return x.detach().double().flatten(), y.detach().double().flatten()
