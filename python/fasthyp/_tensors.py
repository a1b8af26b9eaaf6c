"""Checks of tensors that several parts share."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, values: object) -> Tensor:
    """TypeError unless a floating-point tensor."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}")
    if values.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {values.dtype}")
    return values


def check_shape(name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    """TypeError unless a tensor, ValueError unless of this shape, where None is any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    fits = len(shape) == value.ndim and all(
        want in (None, size) for want, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")
