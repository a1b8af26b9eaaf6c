"""Errors of poses: of one prediction, or of each of many hypotheses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthyp.metrics._checks import check_joints, check_mask, check_pair, check_thresholds

PCK_JOINTS = (1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16)
"""The 14 joints of a Human3.6M pose of 17 that count for 3DPCK (Mehta et al., 3DV 2017):
``pck(pred[..., PCK_JOINTS, :], truth[..., PCK_JOINTS, :])``."""

CPS_JOINTS = (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16)
"""The 16 joints that count for the Correct Poses Score: all of 17 but the spine."""

AUC_THRESHOLDS = tuple(range(0, 151, 5))
"""0, 5, ..., 150 mm (Mehta et al., 3DV 2017)."""

CPS_THRESHOLDS = tuple(range(1, 301))
"""1, 2, ..., 300 mm, as in ``compute_CP_list`` of Wehrbein et al., ICCV 2021."""


def root_centred(poses: Tensor, root: int | Sequence[int]) -> Tensor:
    """Poses (..., J, D) relative to a joint, or to the mean of several, as the hips.

    Raises:
        TypeError, ValueError: ``root`` is no joint of these poses.
    """
    check_pair(("poses", "poses"), poses, poses)
    joints = check_joints("root", root, poses.shape[-2])
    return poses - poses[..., joints, :].mean(-2, keepdim=True)


def mpjpe(
    pred: Tensor,
    truth: Tensor,
    mask: Tensor | None = None,
    root: int | Sequence[int] | None = None,
) -> Tensor:
    """Mean per joint position error ("Protocol 1"): mean over joints of the distance to the truth.

    Ionescu et al., "Human3.6M", TPAMI 2014. Of hypotheses (B, M, J, D) with ``truth[:, None]``:
    (B, M), see :func:`over_hypotheses`.

    Args:
        pred: (..., J, D) in any unit.
        truth: (..., J, D), same dtype, device and unit; leading dimensions broadcast.
        mask: (..., J) bool, the joints that count; all unless told. Where none does, NaN.
        root: both poses are taken relative to this joint, or to the mean of these (which need not
            count); as they are unless told. Human3.6M: 0; 16 joints without a root: both hips.

    Returns:
        (...), in the unit of the poses, float32 for float16 and bfloat16.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return _mean(_distances(pred, truth, mask, root), mask)


def n_mpjpe(
    pred: Tensor,
    truth: Tensor,
    mask: Tensor | None = None,
    root: int | Sequence[int] | None = None,
) -> Tensor:
    """Scale-normalised MPJPE: the prediction is first scaled by ``<pred, truth> / <pred, pred>``,
    which brings it closest to the truth.

    Rhodin et al., "Unsupervised geometry-aware representation for 3D human pose estimation", ECCV
    2018. Sensible for root-centred poses only: give ``root`` or centre them. A prediction whose
    joints are all zero keeps scale 1.

    Args, returns and errors are those of :func:`mpjpe`.
    """
    shape = check_pair(("pred", "truth"), pred, truth)
    check_mask(mask, shape, pred.shape[-2], pred.device)
    pred, truth = _widened(pred, root), _widened(truth, root)
    a, b = pred, truth
    if mask is not None:
        a, b = (x.masked_fill(~mask[..., None], 0.0) for x in (a, b))
    square = (a * a).sum((-2, -1))
    nothing = square == 0
    scale = (a * b).sum((-2, -1)) / torch.where(nothing, 1.0, square)
    scale = torch.where(nothing, 1.0, scale)
    return mpjpe(scale[..., None, None] * pred, truth, mask)


def pve(pred: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Per vertex error (PVE, V2V): mean over vertices of the distance to the truth.

    As in POCO (3DV 2024): of meshes as they are, so subtract a root joint from both before, where
    the translation is not to count.

    Args:
        pred: (..., V, 3) in any unit.
        truth: (..., V, 3), same dtype, device and unit; leading dimensions broadcast.
        mask: (..., V) bool, the vertices that count.

    Returns:
        (...), in the unit of the meshes; NaN where no vertex counts.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_pair(("pred", "truth"), pred, truth, 3)
    return mpjpe(pred, truth, mask)


def pck(
    pred: Tensor,
    truth: Tensor,
    threshold: float = 150.0,
    mask: Tensor | None = None,
    root: int | Sequence[int] | None = None,
) -> Tensor:
    """Share of joints nearer to the truth than a threshold (3DPCK), 0 to 1.

    Mehta et al., "Monocular 3D human pose estimation in the wild using improved CNN supervision",
    3DV 2017, on 14 joints: :data:`PCK_JOINTS`. ``compute_3DPCK`` of Wehrbein et al., ICCV 2021. A
    joint at the threshold does not count as correct.

    Args:
        threshold: in the unit of the poses; the default is for millimetres.
        pred, truth, mask, root: as for :func:`mpjpe`.

    Returns:
        (...) float32, for float64 poses float64; NaN where no joint counts.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    distance = _distances(pred, truth, mask, root)
    limit = check_thresholds([threshold], pred.device)[0]
    near = (distance < limit).to(distance.dtype)
    return _mean(near.masked_fill(distance.isnan(), torch.nan), mask)


def auc(
    pred: Tensor,
    truth: Tensor,
    thresholds: Tensor | Sequence[float] = AUC_THRESHOLDS,
    mask: Tensor | None = None,
    root: int | Sequence[int] | None = None,
) -> Tensor:
    """Area under the :func:`pck` curve, as its mean over the thresholds: 0 to 1.

    Mehta et al., 3DV 2017: 31 thresholds, 0 to 150 mm.

    Args:
        thresholds: ascending, in the unit of the poses; the default is for millimetres.
        pred, truth, mask, root: as for :func:`mpjpe`.

    Returns:
        (...) float32, for float64 poses float64; NaN where no joint counts.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    distance = _distances(pred, truth, mask, root)
    limits = check_thresholds(thresholds, pred.device)
    below = _weight_above(distance, limits, torch.full_like(limits, 1 / len(limits)))
    return _mean(below.to(distance.dtype), mask)


def correct_poses(
    pred: Tensor,
    truth: Tensor,
    thresholds: Tensor | Sequence[float] = CPS_THRESHOLDS,
    mask: Tensor | None = None,
) -> Tensor:
    """Whether all joints are nearer to the truth than each threshold: (..., T) bool.

    The curve under which :func:`cps` is the area (``compute_CP`` and ``compute_CP_list`` of
    Wehrbein et al., ICCV 2021). False where no joint counts. Args and errors as for :func:`cps`.
    """
    limits = check_thresholds(thresholds, getattr(pred, "device", torch.device("cpu")))
    return _worst_joint(pred, truth, mask)[..., None] < limits


def cps(
    pred: Tensor,
    truth: Tensor,
    thresholds: Tensor | Sequence[float] = CPS_THRESHOLDS,
    mask: Tensor | None = None,
) -> Tensor:
    """Correct Poses Score: the area under the curve of :func:`correct_poses`, in the unit of the
    poses (0 to 299 mm).

    Wandt et al., "CanonPose", CVPR 2021; Wehrbein et al., ICCV 2021, section 4.1, whose code takes
    the trapezoidal rule over 1, 2, ..., 300 mm, poses aligned by :func:`procrustes` and the joints
    :data:`CPS_JOINTS`, and of M hypotheses the best at each threshold: ``cps(...).amax(-1)``, as
    the best pose is the same at all thresholds.

    Args:
        pred: (..., J, D) in any unit, aligned or not.
        truth: (..., J, D), same dtype, device and unit; leading dimensions broadcast.
        thresholds: ascending, at least two, in the unit of the poses; the default is for
            millimetres.
        mask: (..., J) bool, the joints that count; all unless told.

    Returns:
        (...) float32, for float64 poses float64; 0 where no joint counts.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return cps_of_worst(_worst_joint(pred, truth, mask), thresholds)


def cps_of_worst(worst: Tensor, thresholds: Tensor | Sequence[float]) -> Tensor:
    """:func:`cps` from the largest distance of a joint that counts."""
    limits = check_thresholds(thresholds, worst.device, least=2)
    step = limits.diff() / 2
    zero = step.new_zeros(1)
    return _weight_above(worst, limits, torch.cat([step, zero]) + torch.cat([zero, step])).to(
        worst.dtype
    )


def _widened(poses: Tensor, root: int | Sequence[int] | None) -> Tensor:
    poses = poses.to(torch.promote_types(poses.dtype, torch.float32))
    return poses if root is None else root_centred(poses, root)


def _distances(
    pred: Tensor, truth: Tensor, mask: Tensor | None, root: int | Sequence[int] | None
) -> Tensor:
    """(..., J), after all checks; anything where the joint does not count."""
    shape = check_pair(("pred", "truth"), pred, truth)
    check_mask(mask, shape, pred.shape[-2], pred.device)
    difference = _widened(pred, root) - _widened(truth, root)
    if mask is not None:  # what does not count may be NaN, and its gradient then as well
        difference = difference.masked_fill(~mask[..., None], 0.0)
    # Of another order of strides, as of poses (..., D, J) transposed, PyTorch's norm is slow.
    return torch.linalg.vector_norm(difference.contiguous(), dim=-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over the joints (..., J) that count."""
    if mask is None:
        return values.mean(-1)
    counted = mask.expand(values.shape)
    return (values * counted).sum(-1) / counted.sum(-1)


def _worst_joint(pred: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
    """(...) largest distance of the joints that count; infinite where none does."""
    return worst_of(_distances(pred, truth, mask, None), mask)


def worst_of(distances: Tensor, mask: Tensor | None) -> Tensor:
    """(...) largest of the distances (..., J), 0 where a joint does not count; infinite where none
    does."""
    worst = distances.amax(-1)
    return worst if mask is None else worst.masked_fill(~mask.any(-1), torch.inf)


def _weight_above(values: Tensor, limits: Tensor, weight: Tensor) -> Tensor:
    """float64: the sum of the weights of those ascending limits that are above each value."""
    tail = torch.cat([weight.flip(0).cumsum(0).flip(0), weight.new_zeros(1)])
    place = torch.searchsorted(limits, values.double().contiguous(), right=True)
    return torch.where(values.isnan(), torch.nan, tail[place])
