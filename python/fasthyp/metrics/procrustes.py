"""The similarity that brings one pose closest to another, for many poses at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasthyp import _C, _environment
from fasthyp.metrics._checks import check_mask, check_pair
from fasthyp.ops import procrustes as ops
from fasthyp.reference import procrustes as reference


class Similarity(NamedTuple):
    """``scale * rotation @ point + translation`` for points (..., J, 3).

    Attributes:
        rotation: (..., 3, 3), determinant 1.
        scale: (...), not negative.
        translation: (..., 3) in the unit of the points.
    """

    rotation: Tensor
    scale: Tensor
    translation: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """The points (..., J, 3), transformed."""
        turned = points @ self.rotation.mT
        return self.scale[..., None, None] * turned + self.translation[..., None, :]


def procrustes(source: Tensor, target: Tensor, mask: Tensor | None = None) -> Similarity:
    """The similarity (rotation, scale, translation) that brings ``source`` closest to ``target``.

    It minimises ``sum_j |scale * rotation @ source_j + translation - target_j|^2`` over proper
    rotations: a mirrored pose stays mirrored, as in the official codes
    (``procrustes_torch_parallel`` of Wehrbein et al., ICCV 2021; ``compute_similarity_transform``
    of ProHMR, ICCV 2021). Where several rotations are equally good (points on a line), one of
    them. Where the source is a single point, the official codes give NaN; here the scale is 0.

    Computed in float64 whatever the dtype, by a singular value decomposition (Kabsch 1976, Umeyama
    1991) by Jacobi rotations. With first derivatives for both poses; they are zero in directions in
    which the rotation is not determined. Results do not depend on the number of threads or on what
    else is in the batch.

    Args:
        source: (..., J, 3) in any unit.
        target: (..., J, 3), same dtype, device and unit; leading dimensions broadcast.
        mask: (..., J) bool, the joints that count; all unless told. Where none does, NaN.

    Returns:
        The transform in the dtype of the poses (float32 for float16 and bfloat16).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    source, target = _checked(("source", "target"), source, target, mask)
    function = ops.procrustes if _has_kernel(source) else reference.procrustes
    return Similarity(*function(source, target, mask))


def pa_mpjpe(pred: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean per joint position error after alignment by :func:`procrustes` (PA-MPJPE, P-MPJPE,
    "Protocol 2", reconstruction error): mean over joints of the distance to the truth.

    The numbers of ``err_3dpe_parallel`` (Wehrbein et al., ICCV 2021) and of
    ``reconstruction_error`` (ProHMR, ICCV 2021). A pose in one point, for which they give NaN, is
    aligned with the mean of the truth.

    Args:
        pred: (..., J, 3) in any unit. Where it, or the truth, requires a gradient, the result has
            a first derivative, through the alignment.
        truth: (..., J, 3), same dtype, device and unit; leading dimensions broadcast, so that
            hypotheses (B, M, J, 3) go with ``truth[:, None]``.
        mask: (..., J) bool, the joints that count, for the alignment and for the mean; all unless
            told. Where none does, the error is NaN.

    Returns:
        (...), in the unit of the poses, float32 for float16 and bfloat16.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    pred, truth = _checked(("pred", "truth"), pred, truth, mask)
    if not _has_kernel(pred):
        return reference.error(pred, truth, mask)
    recording = torch.is_grad_enabled()
    wanted = recording and pred.requires_grad, recording and truth.requires_grad
    return ops.pa_mpjpe(pred, truth, mask, *wanted)[0]


def aligned_distances(pred: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """(..., J) the distances whose mean :func:`pa_mpjpe` is, without gradients; 0 for joints that
    do not count. Arguments and errors are those of :func:`pa_mpjpe`."""
    pred, truth = _checked(("pred", "truth"), pred.detach(), truth.detach(), mask)
    function = ops.pa_distances if _has_kernel(pred) else reference.distances
    return function(pred, truth, mask)


def _checked(
    names: tuple[str, str], source: Tensor, target: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The poses, half precision as float32."""
    shape = check_pair(names, source, target, 3)
    check_mask(mask, shape, source.shape[-2], source.device)
    dtype = torch.promote_types(source.dtype, torch.float32)
    return source.to(dtype), target.to(dtype)


def _has_kernel(poses: Tensor) -> bool:
    if _environment.backend() == "reference":
        return False
    kind = poses.device.type
    return kind == "cpu" or (kind == "cuda" and _C.cuda_archs is not None)
