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
