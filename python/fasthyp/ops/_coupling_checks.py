"""Checks of arguments that the coupling ops share, whatever the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, as the flow, got {tensor.dtype}")


def check_cond(cond: Tensor | None, batch: int, cond_dim: int, dtype: torch.dtype) -> None:
    if cond is not None:
        check_dtype("cond", cond, dtype)
    elif not cond_dim:
        return
    got = None if cond is None else tuple(cond.shape)
    if got != (batch, cond_dim):
        raise ValueError(f"cond: expected shape ({batch}, {cond_dim}), got {got}")


def check_packed(packed: Tensor) -> None:
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.data_ptr() % 64:
        raise ValueError("packed: expected a contiguous, 64-byte aligned uint8 tensor")


def check_sample(
    batch: int,
    num_samples: int,
    first_sample: int,
    fixed: Tensor | None,
    counter: Tensor | None,
    dim: int,
    dtype: torch.dtype,
) -> None:
    if batch < 0 or num_samples < 0:
        raise ValueError(f"batch, num_samples: expected >= 0, got {batch}, {num_samples}")
    if not 0 <= first_sample <= 2**32 - num_samples:
        raise ValueError(f"first_sample: expected 0 to 2**32 - {num_samples}, got {first_sample}")
    if fixed is not None:
        check_dtype("fixed", fixed, dtype)
        if fixed.dim() != 2 or fixed.shape[0] != batch or fixed.shape[1] > dim:
            raise ValueError(
                f"fixed: expected shape ({batch}, F) with F <= {dim}, got {tuple(fixed.shape)}"
            )
    if counter is not None and (counter.dtype != torch.int64 or tuple(counter.shape) != (3,)):
        raise ValueError(
            f"counter: expected int64 of shape (3,), got {counter.dtype} {tuple(counter.shape)}"
        )


PASS_PRECISIONS = ("highest", "high", "medium")


def check_pass(
    x: Tensor,
    cond: Tensor | None,
    weights: Sequence[Tensor],
    plan: Sequence[int],
    keep_every: int,
    precision: str,
    name: str = "x",
) -> None:
    """The arguments of a coupling pass; of its gradient, ``x`` is its output."""
    dim, cond_dim, element = plan[:3]
    dtype = torch.float64 if element == 1 else torch.float32
    check_dtype(name, x, dtype)
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"{name}: expected shape (B, M, {dim}), got {tuple(x.shape)}")
    check_cond(cond, x.shape[0], cond_dim, dtype)
    _check_device("cond", cond, x)
    for i, weight in enumerate(weights):
        check_dtype(f"weights[{i}]", weight, dtype)
        _check_device(f"weights[{i}]", weight, x)
    if keep_every < 0:
        raise ValueError(f"keep_every: expected >= 0, got {keep_every}")
    if precision not in PASS_PRECISIONS:
        raise ValueError(
            f"precision: expected one of {', '.join(PASS_PRECISIONS)}, got {precision!r}"
        )


def check_gradient(
    out: Tensor,
    saved: Tensor,
    grad_out: Tensor,
    grad_log_det: Tensor | None,
    width: int,
    weights: Sequence[Tensor],
    wanted: Sequence[bool],
) -> None:
    """The other arguments of its gradient; ``width`` numbers per row are saved."""
    rows = tuple(out.shape[:2])
    given = (
        ("saved", saved, (*rows, width)),
        ("grad_out", grad_out, tuple(out.shape)),
        ("grad_log_det", grad_log_det, rows),
    )
    for name, tensor, shape in given:
        if tensor is None:
            continue
        check_dtype(name, tensor, out.dtype)
        _check_device(name, tensor, out)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if len(wanted) != len(weights) + 1:
        raise ValueError(f"wanted: expected {len(weights) + 1} numbers, got {len(wanted)}")


def _check_device(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is not None and tensor.device != x.device:
        raise ValueError(f"{name}: is on {tensor.device}, the rows are on {x.device}")
