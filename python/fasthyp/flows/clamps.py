"""The functions that FrEIA keeps as lambdas, with names, so that they are known and can be pickled:
the soft clamps of its couplings and the global scales of its AllInOneBlock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def atan_clamp(u: Tensor) -> Tensor:
    """FrEIA's ``"ATAN"``."""
    return 0.636 * torch.atan(u)


def sigmoid_clamp(u: Tensor) -> Tensor:
    """FrEIA's ``"SIGMOID"``."""
    return 2.0 * (torch.sigmoid(u) - 0.5)


def identity(u: Tensor) -> Tensor:
    """What NICECouplingBlock holds, which clamps nothing."""
    return u


class ScaledAtan:
    """The clamp of FrEIA before 0.2, ``0.636 * atan(u / clamp)``."""

    def __init__(self, clamp: float) -> None:
        self.clamp = clamp

    def __call__(self, u: Tensor) -> Tensor:
        return 0.636 * torch.atan(u / self.clamp)


def sigmoid_scale(a: Tensor) -> Tensor:
    """AllInOneBlock's ``"SIGMOID"``."""
    return 10 * torch.sigmoid(a - 2.0)


def softplus_scale(a: Tensor) -> Tensor:
    """AllInOneBlock's ``"SOFTPLUS"``."""
    return 0.1 * F.softplus(a, beta=0.5)


CLAMPS: dict[str, Function] = {
    "atan": atan_clamp,
    "tanh": torch.tanh,
    "sigmoid": sigmoid_clamp,
}
GLOBAL_SCALES: dict[str, Function] = {
    "sigmoid": sigmoid_scale,
    "softplus": softplus_scale,
    "exp": torch.exp,
}
# attributes of FrEIA's blocks, and what they may be replaced by where they are pickled
_HELD = {"f_clamp": {**CLAMPS, "identity": identity}, "global_scale_activation": GLOBAL_SCALES}


def known_name(function: Any, known: Mapping[str, Function]) -> str | None:
    """The name of a function: known by identity, or, for FrEIA's lambdas, by its values."""
    for name, candidate in known.items():
        if function is candidate:
            return name
    # A closure may change, except that of FrEIA's own "SOFTPLUS" over its block.
    plain = isinstance(function, FunctionType) and function.__closure__ is None
    if plain or str(getattr(function, "__module__", "")).startswith("FrEIA."):
        probe = torch.linspace(-9.0, 9.0, 73, dtype=torch.float64)
        try:
            values = function(probe)
        except Exception:  # a user's function may take other inputs: not one of ours
            return None
        for name, candidate in known.items():
            if isinstance(values, Tensor) and torch.equal(values, candidate(probe)):
                return name
    return None


def clamp_name(function: Function) -> str | None:
    """The name of a clamp, if it is one of FrEIA's."""
    return known_name(function, CLAMPS)


def with_names(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a FrEIA block with named functions for its lambdas."""
    found = {}
    for key, known in _HELD.items():
        name = known_name(state.get(key), known)
        if name is not None:
            found[key] = known[name]
    return {**state, **found}
