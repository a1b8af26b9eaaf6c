"""One ``describe`` for the flows of every front end."""

from __future__ import annotations

from torch import nn

from fasthyp.flows import freia, nflows, realnvp
from fasthyp.flows.program import FlowProgram

_FRONT_ENDS = (freia, nflows, realnvp)


def is_flow(module: object) -> bool:
    """Whether :func:`describe` takes this module."""
    return any(front_end.knows(module) for front_end in _FRONT_ENDS)


def describe(module: nn.Module) -> FlowProgram:
    """The program of a flow; its base distribution is the standard normal.

    Args:
        module: a FrEIA ``GraphINN``, ``ReversibleGraphNet``, ``SequenceINN`` or coupling block, an
            nflows ``Flow`` or ``CompositeTransform``, POCO's ``RealNVP``, or a class of this
            package for one of them; accelerated or not.

    Raises:
        TypeError: none of these.
        UnsupportedFlow: one of these that a program cannot describe; the message says why.
    """
    for front_end in _FRONT_ENDS:
        if front_end.knows(module):
            return front_end.describe(module)
    raise TypeError(
        "expected a FrEIA GraphINN, ReversibleGraphNet, SequenceINN or coupling block, an nflows "
        f"Flow or a POCO RealNVP, got {type(module).__name__}"
    )
