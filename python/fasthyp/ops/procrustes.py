"""The ops behind :func:`fasthyp.metrics.procrustes` and :func:`fasthyp.metrics.pa_mpjpe`: argument
checks, CPU and CUDA dispatch, first derivatives."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fasthyp import _C, _environment
from fasthyp.ops._library import LIBRARY, address, current_stream, define
from fasthyp.reference import procrustes as reference

DTYPES = (torch.float32, torch.float64)
_NAMES = ("source", "target")

Fit = tuple[Tensor, Tensor, Tensor]


def check(source: Tensor, target: Tensor, mask: Tensor | None) -> torch.Size:
    """The leading dimensions; TypeError or ValueError naming the argument for what no kernel may
    see."""
    for name, points in zip(_NAMES, (source, target), strict=True):
        if points.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32 or float64, got {points.dtype}")
        if points.ndim < 2 or points.shape[-2] < 1 or points.shape[-1] != 3:
            raise ValueError(
                f"{name}: expected shape (..., J, 3) with J >= 1, got {tuple(points.shape)}"
            )
    if target.dtype != source.dtype:
        raise TypeError(f"target: expected {source.dtype} as source, got {target.dtype}")
    joints = source.shape[-2]
    if target.shape[-2] != joints:
        raise ValueError(f"target: expected {joints} joints as source, got {target.shape[-2]}")
    shape = torch.broadcast_shapes(source.shape[:-2], target.shape[:-2])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, got {mask.dtype}")
        if mask.ndim < 1 or mask.shape[-1] != joints:
            raise ValueError(f"mask: expected shape (..., {joints}), got {tuple(mask.shape)}")
        if torch.broadcast_shapes(mask.shape[:-1], shape) != shape:
            raise ValueError(
                f"mask: expected to broadcast to {(*shape, joints)}, got {tuple(mask.shape)}"
            )
    for name, tensor in (("target", target), ("mask", mask)):
        if tensor is not None and tensor.device != source.device:
            raise ValueError(f"{name}: expected on {source.device} as source, got {tensor.device}")
    return shape


def _rows(tensor: Tensor, shape: torch.Size, tail: int) -> tuple[Tensor, int, int]:
    """A contiguous tensor whose rows (its last ``tail`` dimensions) all of ``shape`` look at: the
    pose i at row i // inner % count; and inner and count.

    What is broadcast along leading or trailing dimensions, or expanded, is not copied.
    """
    lead = tensor.ndim - tail
    for dim in range(lead):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    own = [1] * (len(shape) - lead) + list(tensor.shape[:lead])
    full = [dim for dim, size in enumerate(own) if size > 1]
    if not full:
        return tensor.contiguous(), 1, 1
    first, last = full[0], full[-1] + 1
    if list(shape[first:last]) != own[first:last]:
        tensor, first, last = tensor.expand(*shape, *tensor.shape[lead:]), 0, len(shape)
    return tensor.contiguous(), prod(shape[last:]), prod(shape[first:last])


def _call(
    source: Tensor,
    target: Tensor,
    mask: Tensor | None,
    shape: torch.Size,
    results: list[Tensor | None],
) -> None:
    joints = source.shape[-2]
    first, second = _rows(source, shape, 2), _rows(target, shape, 2)
    third = None if mask is None else _rows(mask, shape, 1)
    if shape.numel() == 0:
        return
    on_cpu = source.device.type == "cpu"
    _C.procrustes_align(
        *((first[0].data_ptr(), *first[1:]), (second[0].data_ptr(), *second[1:])),
        (0, 1, 1) if third is None else (third[0].data_ptr(), *third[1:]),
        source.dtype == torch.float64,
        shape.numel(),
        joints,
        [address(result) for result in results],
        -1 if on_cpu else source.device.index,
        _environment.num_threads() if on_cpu else current_stream(source.device.index),
    )


# --- the similarity ---


def _fit_fake(source: Tensor, target: Tensor, mask: Tensor | None) -> Fit:
    shape = check(source, target, mask)
    return (
        source.new_empty((*shape, 3, 3)),
        source.new_empty(shape),
        source.new_empty((*shape, 3)),
    )


def _fit_run(source: Tensor, target: Tensor, mask: Tensor | None) -> Fit:
    fit = _fit_fake(source, target, mask)
    _call(source, target, mask, fit[1].shape, [*fit, None, None, None, None])
    return fit


def _fit_context(ctx: Any, inputs: tuple[Any, ...], output: Fit) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _fit_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    source, target, mask, rotation = ctx.saved_tensors
    known = None if torch.is_grad_enabled() else rotation.detach()
    return *_by_reference(ctx, (source, target, mask, known), grads), None


def _by_reference(
    ctx: Any, inputs: tuple[Any, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the reference by source and target, which has first derivatives itself."""
    recorded = torch.is_grad_enabled()
    needs = ctx.needs_input_grad[:2]
    with torch.enable_grad():
        values: tuple[Tensor, ...]
        poses = inputs[:2]
        if not recorded:
            poses = tuple(x.detach().requires_grad_(y) for x, y in zip(poses, needs, strict=True))
        if len(grads) == 3:
            values = reference.procrustes(*poses, *inputs[2:])
        else:
            values = (reference.error(*poses, *inputs[2:]),)
        wanted = [x for x, need in zip(poses, needs, strict=True) if need]
        found = iter(torch.autograd.grad(values, wanted, grads, create_graph=recorded))
    return tuple(next(found) if need else None for need in needs)  # type: ignore[return-value]


# --- the error ---


def _error_fake(
    source: Tensor, target: Tensor, mask: Tensor | None, source_grad: bool, target_grad: bool
) -> Fit:
    shape = check(source, target, mask)
    full = (*shape, *source.shape[-2:])
    return (
        source.new_empty(shape),
        source.new_empty(full if source_grad else (0,)),
        source.new_empty(full if target_grad else (0,)),
    )


def _error_run(
    source: Tensor, target: Tensor, mask: Tensor | None, source_grad: bool, target_grad: bool
) -> Fit:
    outputs = error, by_source, by_target = _error_fake(
        source, target, mask, source_grad, target_grad
    )
    grads = [by_source if source_grad else None, by_target if target_grad else None]
    _call(source, target, mask, error.shape, [None, None, None, error, None, *grads])
    return outputs


def _error_context(ctx: Any, inputs: tuple[Any, ...], output: Fit) -> None:
    source, target, mask, ctx.source_grad, ctx.target_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(source, target, mask, *output[1:])


def _error_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    source, target, mask, by_source, by_target = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if grad is None:
        return (None,) * 5
    if needs[0] > ctx.source_grad or needs[1] > ctx.target_grad:
        raise RuntimeError("fasthyp::pa_mpjpe was called without the gradients that are now wanted")
    if torch.is_grad_enabled():  # recorded: by the reference, which refuses second derivatives
        return *_by_reference(ctx, (source, target, mask), (grad,)), None, None, None
    grad = grad[..., None, None]
    return (
        (grad * by_source).sum_to_size(source.shape) if needs[0] else None,
        (grad * by_target).sum_to_size(target.shape) if needs[1] else None,
        *(None, None, None),
    )


# --- the distances ---


def _distances_fake(source: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    return source.new_empty((*check(source, target, mask), source.shape[-2]))


def _distances_run(source: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    distances = _distances_fake(source, target, mask)
    results = [None, None, None, None, distances, None, None]
    _call(source, target, mask, distances.shape[:-1], results)
    return distances


_POSES = "Tensor source, Tensor target, Tensor? mask"


def _define(schema: str, run: Any, fake: Any, context: Any, backward: Any) -> None:
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    if _C.cuda_archs is not None:
        LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"fasthyp::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"fasthyp::{name}", backward, setup_context=context, lib=LIBRARY
    )


_define(
    f"procrustes({_POSES}) -> (Tensor, Tensor, Tensor)",
    *(_fit_run, _fit_fake, _fit_context, _fit_backward),
)
_define(
    f"pa_mpjpe({_POSES}, bool source_grad, bool target_grad) -> (Tensor, Tensor, Tensor)",
    *(_error_run, _error_fake, _error_context, _error_backward),
)
procrustes = torch.ops.fasthyp.procrustes.default
pa_mpjpe = torch.ops.fasthyp.pa_mpjpe.default
pa_distances = define(
    f"pa_distances({_POSES}) -> Tensor",
    fake=_distances_fake,
    cpu=_distances_run,
    cuda=_distances_run if _C.cuda_archs is not None else None,
)
