"""The maximum mean discrepancy between two sets of samples, as a number and as a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fasthyp import _C, _environment
from fasthyp.ops import mmd as ops
from fasthyp.reference import mmd as reference

Kernel = Literal["inverse_multiquadric", "rbf"]
Estimator = Literal["biased", "unbiased"]

_HALF = (torch.float16, torch.bfloat16)


def mmd2(
    x: Tensor,
    y: Tensor,
    bandwidths: Sequence[float] = (0.05, 0.2, 0.9),
    kernel: Kernel = "inverse_multiquadric",
    estimator: Estimator = "biased",
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
) -> Tensor:
    """The squared maximum mean discrepancy between samples x and samples y.

    Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, with a sum of kernels of the distance
    d of two samples, one for each bandwidth a: ``a^2 / (a^2 + d^2)``, the inverse multiquadrics of
    Wehrbein et al., ICCV 2021, equation 10 (its b is a^2; their code squares as well), or
    ``exp(-d^2 / (2 a^2))``. The defaults are those of their ``mmd_multiscale`` and of HUMR's
    ``batch_mmd`` (WACV 2025).

    Computed from differences of samples, in memory of the order of the samples. Where a gradient
    is wanted, it is computed together with the value, and the backward pass multiplies; second
    derivatives and the transforms of :mod:`torch.func` take the PyTorch path of
    :mod:`fasthyp.reference.mmd`. Results do not depend on the number of threads or on what else is
    in the batch.

    Args:
        x: (..., N, D) float32 or float64 on a CPU or CUDA device; float16 and bfloat16 are computed
            in float32, and so is the result.
        y: (..., P, D) of the same dtype, device and leading dimensions.
        bandwidths: 1 to 16 numbers from 1e-9 to 1e9, in units of d.
        kernel: ``"inverse_multiquadric"`` or ``"rbf"``.
        estimator: ``"biased"`` averages over all pairs, also of a sample with itself, as the
            official codes do; it is never negative, but for rounding. ``"unbiased"`` leaves those
            out within x and within y (equation 6); it needs two samples of each, and may be
            negative.
        x_weights: (..., N) weights of the samples, not negative, of any real or bool dtype; a mask
            has ones and zeros. They are divided by their sum. A sample of weight zero is not
            looked at and gets a zero gradient. Where all weights of a set are zero (unbiased: all
            but one), the result is NaN. No gradient goes to the weights.
        y_weights: (..., P), the same for y.

    Returns:
        (...), one number for each pair of sets, with gradients for x and y.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Weights are
        looked at on a CPU only, as looking waits for the device; on CUDA a negative one gives NaN.
    """
    x, y = _widened(x), _widened(y)
    widths = _widths(bandwidths)
    ops.check(x, y, x_weights, y_weights, widths, kernel, estimator)
    for name, weights in (("x_weights", x_weights), ("y_weights", y_weights)):
        if weights is not None:
            _check_weights(name, weights)
    if _transformed() or not _has_kernel(x):
        unbiased = estimator == "unbiased"
        return reference.mmd2(x, y, widths, kernel, unbiased, x_weights, y_weights)
    recording = torch.is_grad_enabled()
    return ops.mmd2(
        *(x, y, x_weights, y_weights, widths, kernel, estimator),
        *(recording and x.requires_grad, recording and y.requires_grad),
    )[0]


class MMDLoss(nn.Module):
    """:func:`fasthyp.mmd2` as a loss: ``loss(x, y, x_weights=None, y_weights=None)``.

    Args:
        bandwidths, kernel, estimator: as for :func:`fasthyp.mmd2`.
        reduction: over the leading dimensions: ``"mean"``, ``"sum"`` or ``"none"``.
        block_grad: ``"x"`` or ``"y"`` for a set that gets no gradient, None for none. (Wehrbein et
            al., ICCV 2021, block the gradient of a part of each sample instead: detach that part.)

    Raises:
        ValueError: an option is none of those.
    """

    def __init__(
        self,
        bandwidths: Sequence[float] = (0.05, 0.2, 0.9),
        kernel: Kernel = "inverse_multiquadric",
        estimator: Estimator = "biased",
        reduction: Literal["mean", "sum", "none"] = "mean",
        block_grad: Literal["x", "y"] | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
        if block_grad not in ("x", "y", None):
            raise ValueError(f"block_grad: expected 'x', 'y' or None, got {block_grad!r}")
        self.bandwidths = tuple(_widths(bandwidths))
        self.kernel, self.estimator = kernel, estimator
        self.reduction, self.block_grad = reduction, block_grad
        sample = torch.zeros(2, 1)
        ops.check(sample, sample, None, None, list(self.bandwidths), kernel, estimator)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_weights: Tensor | None = None,
        y_weights: Tensor | None = None,
    ) -> Tensor:
        if self.block_grad == "x":
            x = x.detach()
        elif self.block_grad == "y":
            y = y.detach()
        value = mmd2(x, y, self.bandwidths, self.kernel, self.estimator, x_weights, y_weights)
        if self.reduction == "none":
            return value
        return value.mean() if self.reduction == "mean" else value.sum()

    def extra_repr(self) -> str:
        names = ("bandwidths", "kernel", "estimator", "reduction", "block_grad")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _widened(samples: Tensor) -> Tensor:
    half = isinstance(samples, Tensor) and samples.dtype in _HALF
    return samples.float() if half else samples


def _widths(bandwidths: Sequence[float]) -> list[float]:
    try:
        return [float(width) for width in bandwidths]
    except (TypeError, ValueError):
        raise TypeError(f"bandwidths: expected a sequence of numbers, got {bandwidths!r}") from None


def _check_weights(name: str, weights: Tensor) -> None:
    if weights.device.type != "cpu" or torch.compiler.is_compiling() or _transformed():
        return
    least = weights.detach().amin() if weights.numel() else 0
    if least < 0:
        raise ValueError(f"{name}: expected no negative weight, got {float(least):g}")


def _transformed() -> bool:
    """Whether a function transform of torch.func is at work: for the reference."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _has_kernel(x: Tensor) -> bool:
    if _environment.backend() == "reference":
        return False
    kind = x.device.type
    return kind == "cpu" or (kind == "cuda" and _C.cuda_archs is not None)
