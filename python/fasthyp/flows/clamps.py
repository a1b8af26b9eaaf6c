"""The soft clamps of FrEIA's couplings as functions that have names and can be pickled."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor


def atan_clamp(u: Tensor) -> Tensor:
    """FrEIA's ``"ATAN"``."""
    return 0.636 * torch.atan(u)


def sigmoid_clamp(u: Tensor) -> Tensor:
    """FrEIA's ``"SIGMOID"``."""
    return 2.0 * (torch.sigmoid(u) - 0.5)


class ScaledAtan:
    """The clamp of FrEIA before 0.2, ``0.636 * atan(u / clamp)``."""

    def __init__(self, clamp: float) -> None:
        self.clamp = clamp

    def __call__(self, u: Tensor) -> Tensor:
        return 0.636 * torch.atan(u / self.clamp)


CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "atan": atan_clamp,
    "tanh": torch.tanh,
    "sigmoid": sigmoid_clamp,
}


def clamp_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name of a clamp function: known by identity, or, for FrEIA's lambdas, by its values."""
    for name, known in CLAMPS.items():
        if function is known:
            return name
    if isinstance(function, FunctionType) and function.__closure__ is None:
        probe = torch.linspace(-9.0, 9.0, 73, dtype=torch.float64)
        try:
            values = function(probe)
        except Exception:  # a user's function may take other inputs: not one of ours
            return None
        for name, known in CLAMPS.items():
            if isinstance(values, Tensor) and torch.equal(values, known(probe)):
                return name
    return None
