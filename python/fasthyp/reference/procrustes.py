"""Procrustes alignment in plain PyTorch: the oracle of the kernels, and the path for what they do
not cover. In float64, with first derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_UNDETERMINED = 1e-12
"""Share of the largest eigenvalue below which a direction of rotation gets no gradient."""
_ONE_POINT = 1e-28
"""Variance, in squares of the mean, of a pose in one point, but for the rounding of the mean."""


def procrustes(
    source: Tensor, target: Tensor, mask: Tensor | None = None, rotation: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation (..., 3, 3), scale (...) and translation (..., 3) in the dtype of the poses.

    The rotation of Kabsch 1976 and the scale of Umeyama, "Least-squares estimation of
    transformation parameters between two point patterns", TPAMI 1991. Poses (..., J, 3) and a bool
    mask (..., J) broadcast.

    Args:
        rotation: the rotation, where it is known; what is left is then its derivative.
    """
    fit = _align(source, target, mask, rotation)
    moved = (fit.rotation @ fit.source_mean.mT)[..., 0]
    translation = fit.target_mean[..., 0, :] - fit.scale[..., None] * moved
    return tuple(x.to(source.dtype) for x in (fit.rotation, fit.scale, translation))  # type: ignore[return-value]


def distances(source: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """(..., J) from the aligned source to the target, 0 where a joint does not count."""
    return _distances(_align(source, target, mask)).to(source.dtype)


def error(source: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """(...) mean distance of the joints that count."""
    fit = _align(source, target, mask)
    return (_distances(fit).sum(-1) / fit.number).to(source.dtype)


class _Fit(NamedTuple):
    rotation: Tensor  # (..., 3, 3)
    scale: Tensor  # (...)
    source_mean: Tensor  # (..., 1, 3)
    target_mean: Tensor
    source: Tensor  # (..., J, 3) about its mean, zero where a joint does not count
    target: Tensor
    number: Tensor  # (...) of joints that count
    counted: Tensor  # (..., J) or (1,) bool: these


def _align(
    source: Tensor, target: Tensor, mask: Tensor | None, rotation: Tensor | None = None
) -> _Fit:
    shape = torch.broadcast_shapes(source.shape, target.shape)
    source, target = source.double().expand(shape), target.double().expand(shape)
    count = torch.tensor(float(shape[-2]), dtype=torch.float64, device=source.device)
    counted = torch.ones(1, 1, dtype=torch.bool, device=source.device)
    if mask is not None:
        counted = mask.expand(shape[:-1])[..., None]
        count = counted.sum((-2, -1)).double()

    def about_mean(points: Tensor) -> tuple[Tensor, Tensor]:
        # A joint that does not count may hold anything, NaN included.
        mean = torch.where(counted, points, 0.0).sum(-2, keepdim=True) / count[..., None, None]
        return torch.where(counted, points - mean, 0.0), mean

    source, source_mean = about_mean(source)
    target, target_mean = about_mean(target)
    products = target.mT @ source + 0 * (source_mean + target_mean)  # NaN where no joint counts
    known = None if rotation is None else rotation.double()
    rotation = _Rotation.apply(products, known)
    variance = source.square().sum((-2, -1))
    trace = (rotation * products).sum((-2, -1))
    point = variance <= _ONE_POINT * count * source_mean.square().sum((-2, -1))
    scale = torch.where(point, 0.0, trace / torch.where(point, 1.0, variance))
    return _Fit(
        *(rotation, scale, source_mean, target_mean, source, target),
        *(count.expand(scale.shape), counted[..., 0]),
    )


def _distances(fit: _Fit) -> Tensor:
    turned = fit.source @ (fit.scale[..., None, None] * fit.rotation).mT
    # The norm has gradient zero at zero.
    norms = torch.linalg.vector_norm(turned - fit.target, dim=-1)
    return torch.where(fit.counted, norms, 0.0)


class _Rotation(torch.autograd.Function):
    """The rotation R (..., 3, 3) that maximises trace(R^T B) for products B."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, known: Tensor | None) -> Tensor:
        rotation = _rotation(products) if known is None else known.clone()
        ctx.save_for_backward(products, rotation)
        return rotation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # R^T B = S is symmetric at the maximum. With dR = R [w]x that gives
        # (tr(S) 1 - S) w = axis(R^T dB), axis(X) = (X21 - X12, X02 - X20, X10 - X01).
        products, rotation = ctx.saved_tensors
        symmetric = rotation.mT @ products
        symmetric = (symmetric + symmetric.mT) / 2
        trace = symmetric.diagonal(dim1=-2, dim2=-1).sum(-1)
        eye = torch.eye(3, dtype=products.dtype, device=products.device)
        system = trace[..., None, None] * eye - symmetric
        system = torch.where(system.isfinite().all(-1).all(-1)[..., None, None], system, eye)
        size = _size(system)
        values, vectors = torch.linalg.eigh(system / size)
        # An undetermined direction (eigenvalue 0) gets no gradient.
        floor = _UNDETERMINED * values[..., -1:].abs()
        inverse = torch.where(values > floor, 1 / values, 0.0) / size[..., 0]
        turn = rotation.mT @ gradient
        axis = torch.stack(
            [turn[..., i, j] - turn[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))], -1
        )
        axis = (vectors @ (inverse[..., None] * (vectors.mT @ axis[..., None])))[..., 0]
        zero = torch.zeros_like(axis[..., 0])
        x, y, z = axis.unbind(-1)
        cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
        return rotation @ cross, None


def _rotation(products: Tensor) -> Tensor:
    finite = products.isfinite().all(-1).all(-1)[..., None, None]
    products = torch.where(finite, products, 0.0)
    u, _, vt = torch.linalg.svd(products / _size(products))
    sign = torch.ones_like(u[..., 0])
    sign[..., 2] = torch.linalg.det(u @ vt).sign()
    return torch.where(finite, (u * sign[..., None, :]) @ vt, torch.nan)


def _size(matrices: Tensor) -> Tensor:
    """(..., 1, 1) the largest element, or 1: divided by it, squares neither vanish nor overflow."""
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest == 0, 1.0, largest)
