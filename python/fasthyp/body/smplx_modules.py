"""``fasthyp.accelerate`` for modules of the ``smplx`` package: their own code, with the skinning
replaced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from fasthyp.body.skinning import lbs


class FusedSkinning(nn.Module):
    """The forward of the class after this one, in which the name ``lbs`` is
    :func:`fasthyp.body.lbs`.

    Everything else, parameters, defaults, appended joints and output, is the original's.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        order = type(self).__mro__
        forward: Any = _with_own_lbs(order[order.index(FusedSkinning) + 1])
        return forward(self, *args, **kwargs)


def is_smplx(module: object) -> bool:
    """Whether this is a body whose forward, or that of a class it is made from, calls smplx's
    ``lbs``."""
    return _skinning_class(type(module)) is not None


def fused_class(module: Any) -> Any:
    """The class that runs a module of smplx with this package's skinning; None for others."""
    if isinstance(module, FusedSkinning) or not is_smplx(module):
        return None
    return _fused(module.__class__)


def _skinning_class(kind: type) -> Any:
    """The first class, along the order of inheritance, whose own forward calls smplx's lbs."""
    package = sys.modules.get("smplx.lbs")
    if package is None:  # then nobody can have made one
        return None
    for part in kind.__mro__:
        forward = part.__dict__.get("forward")
        if (
            isinstance(forward, FunctionType)
            and "lbs" in forward.__code__.co_names
            and forward.__globals__.get("lbs") is package.lbs
        ):
            return part
    return None


@cache
def _with_own_lbs(kind: Any) -> FunctionType:
    forward = kind.__dict__["forward"]
    made = FunctionType(
        forward.__code__,
        {**forward.__globals__, "lbs": lbs},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@cache
def _fused(kind: Any) -> Any:
    """``kind`` with the fused class put before the one that does the skinning, where the
    ``super().forward`` of a class derived from smplx's finds it."""
    base = _skinning_class(kind)
    names = {"__module__": kind.__module__, "__reduce__": _reduce, "_fused_from": kind}
    inner = type(base.__name__, (FusedSkinning, base), names)
    return inner if kind is base else type(kind.__name__, (kind, inner), names)


def _reduce(self: Any) -> tuple[Callable[..., Any], tuple[Any], dict[str, Any]]:
    return _revive, (type(self)._fused_from,), self.__getstate__()


def _revive(kind: Any) -> Any:
    made = _fused(kind)
    return made.__new__(made)
