"""``fasthyp.accelerate`` for modules of the ``smplx`` package: their own code, with the skinning
replaced."""

from __future__ import annotations

import sys
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from fasthyp.body.skinning import lbs


class FusedSkinning(nn.Module):
    """The forward of a class of smplx, in which the name ``lbs`` is :func:`fasthyp.body.lbs`.

    Everything else, parameters, defaults, appended joints and output, is the original's.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        original = type(self).__mro__[2]  # this class comes between the adopted one and smplx's
        forward: Any = _with_own_lbs(original)
        return forward(self, *args, **kwargs)


def _forward_of(kind: Any) -> Any:
    return getattr(kind, "forward", None)


@cache
def _with_own_lbs(kind: Any) -> FunctionType:
    forward = _forward_of(kind)
    made = FunctionType(
        forward.__code__,
        {**forward.__globals__, "lbs": lbs},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def is_smplx(module: object) -> bool:
    """Whether this is a body of smplx whose forward calls smplx's ``lbs``."""
    package = sys.modules.get("smplx.lbs")
    if package is None:  # then nobody can have made one
        return False
    forward = _forward_of(type(module))
    if isinstance(module, FusedSkinning):
        return True
    return (
        isinstance(forward, FunctionType)
        and forward.__globals__.get("lbs") is package.lbs
        and "lbs" in forward.__code__.co_names
    )


def fused_class(module: Any) -> Any:
    """The class that runs a module of smplx with this package's skinning; None for others."""
    from fasthyp.flows.fused import adopted

    if isinstance(module, FusedSkinning) or not is_smplx(module):
        return None
    return adopted(type(module), FusedSkinning)
