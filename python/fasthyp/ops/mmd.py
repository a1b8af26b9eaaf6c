"""The op behind :func:`fasthyp.mmd2`: argument checks, CPU and CUDA dispatch, the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasthyp import _C, _environment
from fasthyp.ops._library import LIBRARY, address, current_stream
from fasthyp.reference import mmd as reference

KERNELS = ("inverse_multiquadric", "rbf")
ESTIMATORS = ("biased", "unbiased")
DTYPES = (torch.float32, torch.float64)
MAX_BANDWIDTHS = 16
MAX_DIM = 1 << 20
WIDTHS = (1e-9, 1e9)
"""Bandwidths whose squares, and their squares, float32 holds."""

Outputs = tuple[Tensor, Tensor, Tensor]
"""Value (...) and its derivatives by x and y, empty where not asked for."""


def check(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    bandwidths: list[float],
    kernel: str,
    estimator: str,
) -> None:
    """TypeError or ValueError naming the argument for what no kernel may see."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if not 1 <= len(bandwidths) <= MAX_BANDWIDTHS:
        raise ValueError(f"bandwidths: expected 1 to {MAX_BANDWIDTHS}, got {len(bandwidths)}")
    for width in bandwidths:
        if not WIDTHS[0] <= width <= WIDTHS[1]:
            raise ValueError(
                f"bandwidths: expected numbers from {WIDTHS[0]:g} to {WIDTHS[1]:g}, got {width:g}"
            )
    for name, samples in (("x", x), ("y", y)):
        if not isinstance(samples, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(samples).__name__}")
        if samples.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32 or float64, got {samples.dtype}")
        if samples.ndim < 2:
            raise ValueError(f"{name}: expected shape (..., N, D), got {tuple(samples.shape)}")
        least = 1 if estimator == "biased" else 2
        if samples.shape[-2] < least:
            raise ValueError(
                f"{name}: expected at least {least} samples for the {estimator} estimator, "
                f"got {samples.shape[-2]}"
            )
        if not 1 <= samples.shape[-1] <= MAX_DIM:
            raise ValueError(
                f"{name}: expected samples of 1 to {MAX_DIM} numbers, got {samples.shape[-1]}"
            )
    if y.dtype != x.dtype:
        raise TypeError(f"y: expected {x.dtype} as x, got {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"y: expected on {x.device} as x, got it on {y.device}")
    expected = (*x.shape[:-2], y.shape[-2], x.shape[-1])
    if tuple(y.shape) != expected:
        raise ValueError(
            f"y: expected shape {(*x.shape[:-2], 'P', x.shape[-1])} as x has {tuple(x.shape)}, "
            f"got {tuple(y.shape)}"
        )
    for name, weights, samples in (("x_weights", x_weights, x), ("y_weights", y_weights, y)):
        if weights is None:
            continue
        if not isinstance(weights, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(weights).__name__}")
        if weights.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {weights.dtype}")
        if weights.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} as x, got it on {weights.device}")
        if weights.shape != samples.shape[:-1]:
            raise ValueError(
                f"{name}: expected shape {tuple(samples.shape[:-1])}, got {tuple(weights.shape)}"
            )


def _run(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    bandwidths: list[float],
    kernel: str,
    estimator: str,
    x_grad: bool,
    y_grad: bool,
) -> Outputs:
    check(x, y, x_weights, y_weights, bandwidths, kernel, estimator)
    outputs = value, by_x, by_y = _allocate(x, y, x_grad, y_grad)
    x, y = x.contiguous(), y.contiguous()
    is_double, on_cpu = x.dtype == torch.float64, x.device.type == "cpu"
    p = q = squares = workspace = None
    if x_weights is not None or y_weights is not None:
        p = reference.normalised(x, x_weights).contiguous()
        q = reference.normalised(y, y_weights).contiguous()
        sums = [w.double().square().sum(-1) for w in (p, q)]
        squares = torch.stack(sums, -1)
    sizes = x.shape[:-2].numel(), x.shape[-2], y.shape[-2], x.shape[-1]
    if not on_cpu:
        size = _C.mmd_cuda_workspace(is_double, *sizes, x_grad or y_grad)
        workspace = x.new_empty(size, dtype=torch.uint8)
    _C.mmd_run(
        *(x.data_ptr(), y.data_ptr(), is_double, *sizes),
        *(address(p), address(q), address(squares)),
        *(reference.rates(bandwidths, kernel), kernel == "rbf", estimator == "unbiased"),
        *(value.data_ptr(), by_x.data_ptr() if x_grad else 0, by_y.data_ptr() if y_grad else 0),
        *(address(workspace), -1 if on_cpu else x.device.index),
        _environment.num_threads() if on_cpu else current_stream(x.device.index),
    )
    return outputs


def _fake(
    x: Tensor,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    bandwidths: list[float],
    kernel: str,
    estimator: str,
    x_grad: bool,
    y_grad: bool,
) -> Outputs:
    check(x, y, x_weights, y_weights, bandwidths, kernel, estimator)
    return _allocate(x, y, x_grad, y_grad)


def _allocate(x: Tensor, y: Tensor, x_grad: bool, y_grad: bool) -> Outputs:
    return (
        x.new_empty(x.shape[:-2]),
        x.new_empty(x.shape if x_grad else (0,)),
        y.new_empty(y.shape if y_grad else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, y, p, q, *ctx.settings, ctx.x_grad, ctx.y_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, p, q, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, y, p, q, by_x, by_y = ctx.saved_tensors
    rest = (None,) * 7
    if grad is None:
        return None, None, *rest
    needs = ctx.needs_input_grad[:2]
    if needs[0] > ctx.x_grad or needs[1] > ctx.y_grad:
        raise RuntimeError("fasthyp::mmd2 was called without the gradients that are now asked for")
    if torch.is_grad_enabled():  # of second order: the reference, which has derivatives itself
        bandwidths, kernel, estimator = ctx.settings
        value = reference.mmd2(x, y, bandwidths, kernel, estimator == "unbiased", p, q)
        wanted = [tensor for tensor, need in zip((x, y), needs, strict=True) if need]
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True))
        return (*(next(found) if need else None for need in needs), *rest)
    grad = grad[..., None, None]
    return grad * by_x if needs[0] else None, grad * by_y if needs[1] else None, *rest


_NAME = "mmd2"
LIBRARY.define(
    f"{_NAME}(Tensor x, Tensor y, Tensor? x_weights, Tensor? y_weights, float[] bandwidths, "
    "str kernel, str estimator, bool x_grad, bool y_grad) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl(_NAME, _run, "CPU")
if _C.cuda_archs is not None:
    LIBRARY.impl(_NAME, _run, "CUDA")
torch.library.register_fake(f"fasthyp::{_NAME}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    f"fasthyp::{_NAME}", _backward, setup_context=_setup_context, lib=LIBRARY
)
mmd2 = torch.ops.fasthyp.mmd2.default
