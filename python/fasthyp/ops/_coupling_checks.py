"""Checks of arguments that the coupling ops share, whatever the device."""

from __future__ import annotations

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


def check_sample(
    batch: int,
    num_samples: int,
    fixed: Tensor | None,
    counter: Tensor | None,
    dim: int,
    dtype: torch.dtype,
) -> None:
    if batch < 0 or num_samples < 0:
        raise ValueError(f"batch, num_samples: expected >= 0, got {batch}, {num_samples}")
    if fixed is not None:
        check_dtype("fixed", fixed, dtype)
        if fixed.dim() != 2 or fixed.shape[0] != batch or fixed.shape[1] > dim:
            raise ValueError(
                f"fixed: expected shape ({batch}, F) with F <= {dim}, got {tuple(fixed.shape)}"
            )
    if counter is not None and (counter.dtype != torch.int64 or tuple(counter.shape) != (2,)):
        raise ValueError(
            f"counter: expected int64 of shape (2,), got {counter.dtype} {tuple(counter.shape)}"
        )
