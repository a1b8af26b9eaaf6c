"""The squared maximum mean discrepancy in plain PyTorch: the oracle of the kernels, and the path
for second derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_PAIRS = 1 << 18
"""Pairs of samples that are looked at together."""


def rates(bandwidths: Sequence[float], kernel: str) -> list[float]:
    """What squared distances are multiplied with: 1 / a^2 (inverse multiquadric) or 1 / (2 a^2)."""
    return [1 / (a * a) if kernel == "inverse_multiquadric" else 0.5 / (a * a) for a in bandwidths]


def normalised(samples: Tensor, weights: Tensor | None) -> Tensor:
    """Weights (..., N) that sum to 1, without a gradient. NaN where one is negative, or all are
    zero."""
    if weights is None:
        count = samples.shape[-2]
        return samples.new_full(samples.shape[:-1], 1 / count)
    weights = weights.detach().to(samples.dtype)
    return torch.where(weights < 0, torch.nan, weights) / weights.sum(-1, keepdim=True)


def mmd2(
    x: Tensor,
    y: Tensor,
    bandwidths: Sequence[float],
    kernel: str,
    unbiased: bool,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    """:func:`fasthyp.mmd2`, differentiable any number of times.

    Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equations 3 (unbiased) and 5 (biased);
    the kernels of Wehrbein et al., ICCV 2021 (``mmd_multiscale`` of their code), summed over
    bandwidths.
    """
    p, q = normalised(x, x_weights), normalised(y, y_weights)
    # what weighs nothing is not looked at: it may be NaN
    x = torch.where(p[..., None] == 0, 0, x)
    y = torch.where(q[..., None] == 0, 0, y)
    factors = rates(bandwidths, kernel)
    within_x = _within(x, p, factors, kernel, unbiased)
    within_y = _within(y, q, factors, kernel, unbiased)
    return within_x + within_y - 2 * _mean(x, p, y, q, factors, kernel)


def _within(
    samples: Tensor, weights: Tensor, factors: list[float], kernel: str, unbiased: bool
) -> Tensor:
    mean = _mean(samples, weights, samples, weights, factors, kernel)
    if not unbiased:
        return mean
    squares = weights.square().sum(-1)  # the pairs of a sample with itself, where kernels are 1
    return (mean - len(factors) * squares) / (1 - squares)


def _mean(a: Tensor, p: Tensor, b: Tensor, q: Tensor, factors: list[float], kernel: str) -> Tensor:
    """The kernels' weighted mean over pairs, some rows at a time."""
    rows = max(1, _PAIRS // max(1, b.shape[:-1].numel()))
    total = a.new_zeros(a.shape[:-2])
    for part, weights in zip(a.split(rows, -2), p.split(rows, -1), strict=True):
        arguments = part, weights, b, q, factors, kernel
        if torch.is_grad_enabled() and part.shape[-2] < a.shape[-2]:
            total = total + checkpoint(_sum, *arguments, use_reentrant=False)
        else:
            total = total + _sum(*arguments)
    return total


def _sum(a: Tensor, p: Tensor, b: Tensor, q: Tensor, factors: list[float], kernel: str) -> Tensor:
    # from differences: |a|^2 + |b|^2 - 2 ab loses what is small
    distances = a.new_zeros(())
    for k in range(a.shape[-1]):
        distances = distances + (a[..., :, None, k] - b[..., None, :, k]).square()
    values = a.new_zeros(())
    for rate in factors:
        scaled = rate * distances
        rbf = kernel == "rbf"
        values = values + (torch.exp(-scaled) if rbf else 1 / (1 + scaled))
    return (p[..., None] * values * q[..., None, :]).sum((-2, -1))
