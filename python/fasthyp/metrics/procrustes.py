"""The similarity that brings one pose closest to another, for many poses at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fasthyp.metrics._checks import check_mask, check_pair

_NEWTON_STEPS = 12
_NEAR_DEGENERATE = 1e-3
"""Below this share of its largest value the closed form loses digits: the SVD takes over."""
_CHUNK = 4096
"""Poses at a time, so that what is computed of them stays in the caches."""


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

    Computed in float64 by a closed form for the largest root of the characteristic polynomial and
    the rotation (Markley, "Attitude determination using vector observations: a fast optimal matrix
    algorithm", 1993, equations 6 to 14), by an SVD where that would lose digits. With first
    derivatives for both poses; they are zero in directions in which the rotation is not determined.

    Args:
        source: (..., J, 3) in any unit.
        target: (..., J, 3), same dtype, device and unit; leading dimensions broadcast.
        mask: (..., J) bool, the joints that count; all unless told. Where none does, NaN.

    Returns:
        The transform in the dtype of the poses (float32 for float16 and bfloat16).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shape = check_pair(("source", "target"), source, target, 3)
    joints = source.shape[-2]
    check_mask(mask, shape, joints, source.device)
    dtype = torch.promote_types(source.dtype, torch.float32)
    sources, targets, masks = _planes(source, target, mask, shape)
    rotation, scale, source_mean, target_mean = _align(sources, targets, masks)[:4]
    translation = target_mean - scale * (rotation * source_mean).sum(1)
    return Similarity(
        rotation.permute(2, 0, 1).reshape(*shape, 3, 3).to(dtype),
        scale.reshape(shape).to(dtype),
        translation.T.reshape(*shape, 3).to(dtype),
    )


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
    shape = check_pair(("pred", "truth"), pred, truth, 3)
    joints = pred.shape[-2]
    check_mask(mask, shape, joints, pred.device)
    dtype = torch.promote_types(pred.dtype, torch.float32)
    preds = pred.expand(*shape, joints, 3).reshape(-1, joints, 3)
    truths = truth.expand(*shape, joints, 3).reshape(-1, joints, 3)
    masks = None if mask is None else mask.expand(*shape, joints).reshape(-1, joints)
    recording = torch.is_grad_enabled() and (pred.requires_grad or truth.requires_grad)
    chunk = _CHUNK if pred.device.type == "cpu" else 2**20
    errors = []
    for start in range(0, len(preds), chunk):
        rows = slice(start, start + chunk)
        planes = _planes(
            preds[rows], truths[rows], None if masks is None else masks[rows], (len(preds[rows]),)
        )
        errors.append(_aligned_error(*planes, recording).to(dtype))
    return (torch.cat(errors) if errors else preds.new_zeros(0, dtype=dtype)).reshape(shape)


def _planes(
    source: Tensor, target: Tensor, mask: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Poses (..., J, 3) as float64 (3, J, N), mask (..., J) as (J, N): whatever is computed then
    runs over poses side by side in memory."""
    joints = source.shape[-2]

    def planes(points: Tensor) -> Tensor:
        points = points.expand(*shape, joints, 3).reshape(-1, joints, 3).permute(2, 1, 0)
        return points.to(torch.float64, memory_format=torch.contiguous_format).contiguous()

    weight = None
    if mask is not None:
        weight = mask.expand(*shape, joints).reshape(-1, joints).T.to(torch.float64).contiguous()
    return planes(source), planes(target), weight


def _align(
    source: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rotation (3, 3, N), scale (N), both means (3, N), both centred poses (3, J, N)."""
    if weight is None:
        source_mean, target_mean = source.mean(1), target.mean(1)
        source, target = source - source_mean[:, None], target - target_mean[:, None]
        weighted = target
    else:
        # A joint that does not count may hold anything, NaN included.
        source = source.masked_fill(weight == 0, 0.0)
        target = target.masked_fill(weight == 0, 0.0)
        count = weight.sum(0)
        source_mean, target_mean = source.sum(1) / count, target.sum(1) / count
        source, target = source - source_mean[:, None], target - target_mean[:, None]
        source, weighted = source * weight, target * weight
    products = torch.stack(
        [(weighted[a] * source[b]).sum(0) for a in range(3) for b in range(3)]
    ).unflatten(0, (3, 3))
    rotation = _Rotation.apply(products)
    variance = source.square().sum((0, 1))
    trace = (rotation * products).sum((0, 1))
    joints = source.shape[1] if weight is None else weight.sum(0)
    # One point, but for the rounding of its mean.
    single = variance <= 1e-28 * joints * source_mean.square().sum(0)
    scale = torch.where(single, 0.0, trace / torch.where(single, 1.0, variance))
    return rotation, scale, source_mean, target_mean, source, target


def _aligned_error(
    source: Tensor, target: Tensor, weight: Tensor | None, recording: bool
) -> Tensor:
    """(N,) mean distance of the aligned source to the target."""
    rotation, scale, _, _, source, target = _align(source, target, weight)
    scaled = rotation * scale
    parts = [
        scaled[a, 0] * source[0] + scaled[a, 1] * source[1] + scaled[a, 2] * source[2] - target[a]
        for a in range(3)
    ]
    if recording:  # its gradient at zero is zero, not NaN
        distance = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    else:
        distance = (parts[0].square() + parts[1].square() + parts[2].square()).sqrt()
    if weight is None:
        return distance.mean(0)
    return (distance * weight).sum(0) / weight.sum(0)


class _Rotation(torch.autograd.Function):
    """The rotation R (3, 3, N) that maximises trace(R^T B) for products B (3, 3, N)."""

    @staticmethod
    def forward(ctx: Any, products: Tensor) -> Tensor:
        rotation = _rotation(products)
        ctx.save_for_backward(products, rotation)
        return rotation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # R^T B = S is symmetric at the maximum. With dR = R [w]x that gives
        # (tr(S) 1 - S) w = axis(R^T dB), axis(X) = (X21 - X12, X02 - X20, X10 - X01).
        products, rotation = (x.permute(2, 0, 1) for x in ctx.saved_tensors)
        gradient = gradient.permute(2, 0, 1)
        symmetric = rotation.mT @ products
        symmetric = (symmetric + symmetric.mT) / 2
        trace = symmetric.diagonal(dim1=1, dim2=2).sum(-1)
        eye = torch.eye(3, dtype=products.dtype, device=products.device)
        system = trace[:, None, None] * eye - symmetric
        system = torch.where(system.isfinite().all(-1).all(-1)[:, None, None], system, eye)
        values, vectors = torch.linalg.eigh(system)
        # An undetermined direction (eigenvalue 0) gets no gradient.
        floor = 1e-12 * values[:, -1:].abs()
        inverse = torch.where(values > floor, 1 / values, 0.0)
        turn = rotation.mT @ gradient
        axis = torch.stack([turn[:, i, j] - turn[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], -1)
        axis = (vectors @ (inverse[..., None] * (vectors.mT @ axis[..., None])))[..., 0]
        zero = torch.zeros_like(axis[:, 0])
        x, y, z = axis.unbind(-1)
        cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
        return (rotation @ cross).permute(1, 2, 0)


def _rotation(products: Tensor) -> Tensor:
    """Markley's FOAM on float64 (3, 3, N)."""
    largest = products.abs().amax((0, 1))
    b = products / torch.where(largest == 0, 1.0, largest)  # squares neither vanish nor overflow
    norm = b.square().sum((0, 1)).sqrt()
    b = b / torch.where(norm == 0, 1.0, norm)
    rows, after, before = b, b[[1, 2, 0]], b[[2, 0, 1]]
    adjoint = (
        after[:, [1, 2, 0]] * before[:, [2, 0, 1]] - after[:, [2, 0, 1]] * before[:, [1, 2, 0]]
    )
    determinant = (rows[0] * adjoint[0]).sum(0)
    # The sum of the signed singular values is the largest root of
    # p(l) = (l^2 - 1)^2 - 8 det(b) l - 4 |adj(b)|^2; from above Newton's steps fall towards it.
    constant, slope = 4 * adjoint.square().sum((0, 1)), 8 * determinant
    root = torch.full_like(norm, 3**0.5)
    step = torch.zeros_like(root)
    for _ in range(_NEWTON_STEPS):
        square = root * root - 1
        value = square * square - slope * root - constant
        derivative = 4 * root * square - slope
        step = value / derivative.clamp_min(1e-30)
        root = root - step
    half = (root * root - 1) / 2
    pairs = half * root - determinant  # (s1 + s2) (s2 + s3) (s3 + s1)
    outer = (b[:, None] * b[None]).sum(2)
    cubic = (outer[:, :, None] * b[None]).sum(1)
    rotation = ((half + 1) * b + root * adjoint - cubic) / pairs
    poor = ~((pairs > _NEAR_DEGENERATE) & (step.abs() < 1e-12))
    if bool(poor.any()):
        rotation[..., poor] = _rotation_by_svd(b[..., poor])
    return rotation


def _rotation_by_svd(b: Tensor) -> Tensor:
    matrices = b.permute(2, 0, 1)
    finite = matrices.isfinite().all(-1).all(-1)[:, None, None]
    u, _, vt = torch.linalg.svd(torch.where(finite, matrices, 0.0))
    sign = torch.ones_like(u[:, 0])
    sign[:, 2] = torch.linalg.det(u @ vt).sign()
    rotation = (u * sign[:, None]) @ vt
    return torch.where(finite, rotation, torch.nan).permute(1, 2, 0)
