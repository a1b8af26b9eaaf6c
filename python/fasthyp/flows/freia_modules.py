"""Drop-in subclasses of FrEIA 0.2's classes that run fused.

They own nothing new: same constructor, parameters, ``state_dict`` keys, call signature and return
types as FrEIA's. What a program cannot describe (several inputs, other blocks, images) runs FrEIA's
own ``forward``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import numpy as np
import torch
from torch import Tensor, nn

from fasthyp.flows.clamps import with_names
from fasthyp.flows.freia import describe
from fasthyp.flows.fused import FusedFlow
from fasthyp.flows.program import FlowProgram, UnsupportedFlow

# Blocks of which FrEIA says that log_jac is the number 0.0.
_VOLUME_PRESERVING = (
    fm.NICECouplingBlock,
    fm.GINCouplingBlock,
    fm.PermuteRandom,
    fm.HouseholderPerm,
)


class _FreiaFlow(FusedFlow):
    def _describe(self) -> FlowProgram:
        return describe(self)


class _FusedBlock(_FreiaFlow):
    dims_c: list[tuple[int, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(with_names(self.__dict__))

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor | float]:
        """x: one tensor (N, D) in a sequence; c: conditions (N, C_i) -> ((y,), log_jac (N,))."""
        if not self._delegates():
            conditions = []
            if self.dims_c:
                if not len(c):
                    width = sum(shape[0] for shape in self.dims_c)
                    raise ValueError(f"c: expected {width} columns, got no tensor")
                conditions = [torch.cat(tuple(c), 1) if len(c) > 1 else c[0]]
            try:
                out, log_jac = self._run_rows(x[0], conditions, rev)
                return (out,), 0.0 if isinstance(self, _VOLUME_PRESERVING) else log_jac
            except UnsupportedFlow:
                pass
        return super().forward(x, list(c), rev, jac)

    def __getstate__(self) -> dict[str, Any]:
        return with_names(super().__getstate__())


class GLOWCouplingBlock(_FusedBlock, fm.GLOWCouplingBlock):
    """``FrEIA.modules.GLOWCouplingBlock``, fused."""


class RNVPCouplingBlock(_FusedBlock, fm.RNVPCouplingBlock):
    """``FrEIA.modules.RNVPCouplingBlock``, fused."""


class NICECouplingBlock(_FusedBlock, fm.NICECouplingBlock):
    """``FrEIA.modules.NICECouplingBlock``, fused."""


class GINCouplingBlock(_FusedBlock, fm.GINCouplingBlock):
    """``FrEIA.modules.GINCouplingBlock``, fused."""


class AffineCouplingOneSided(_FusedBlock, fm.AffineCouplingOneSided):
    """``FrEIA.modules.AffineCouplingOneSided``, fused."""


class ConditionalAffineTransform(_FusedBlock, fm.ConditionalAffineTransform):
    """``FrEIA.modules.ConditionalAffineTransform``, fused."""


class AllInOneBlock(_FusedBlock, fm.AllInOneBlock):
    """``FrEIA.modules.AllInOneBlock``, fused."""


class PermuteRandom(fm.PermuteRandom):
    """``FrEIA.modules.PermuteRandom``: the same permutation for the same seed, but NumPy's global
    generator stays as it was (FrEIA's leaves it seeded)."""

    def __init__(
        self,
        dims_in: Sequence[tuple[int]],
        dims_c: Sequence[tuple[int]] | None = None,
        seed: int | None = None,
    ) -> None:
        fm.InvertibleModule.__init__(self, dims_in, dims_c)
        self.in_channels = dims_in[0][0]
        generator: Any = np.random if seed is None else np.random.RandomState(seed)
        perm = torch.from_numpy(generator.permutation(self.in_channels)).long()
        self.perm = nn.Parameter(perm, requires_grad=False)
        self.perm_inv = nn.Parameter(perm.argsort(), requires_grad=False)


class _FusedGraph(_FreiaFlow):
    in_nodes: list[ff.InputNode]
    condition_nodes: list[ff.ConditionNode]
    force_tuple_output: bool

    def forward(
        self,
        x_or_z: Tensor | Iterable[Tensor],
        c: Iterable[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
        intermediate_outputs: bool = False,
        x: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """x_or_z (N, D), c: conditions (N, C_i) -> (output (N, D), log_jac (N,)).

        As FrEIA's ``GraphINN.forward``: ``log_jac`` is that of the direction taken, and zero for
        ``jac=False``.
        """
        if not (intermediate_outputs or x is not None or self._delegates()):
            inputs = (x_or_z,) if isinstance(x_or_z, Tensor) else tuple(x_or_z)
            conditions = () if c is None else (c,) if isinstance(c, Tensor) else tuple(c)
            for what, got, nodes in (
                ("inputs", inputs, self.in_nodes),
                ("conditions", conditions, self.condition_nodes),
            ):
                if len(got) != len(nodes):
                    raise ValueError(f"Got {len(got)} {what}, but expected {len(nodes)}.")
            try:
                out, log_jac = self._run_rows(inputs[0], conditions, rev)
                if not jac:
                    log_jac = torch.zeros_like(log_jac)
                return ((out,) if self.force_tuple_output else out), log_jac
            except UnsupportedFlow:
                pass
        extra = {} if x is None else {"x": x}
        return ff.GraphINN.forward(self, x_or_z, c, rev, jac, intermediate_outputs, **extra)


class GraphINN(_FusedGraph, ff.GraphINN):
    """``FrEIA.framework.GraphINN``, fused where it is a chain of couplings and permutations."""


class ReversibleGraphNet(_FusedGraph, ff.ReversibleGraphNet):
    """``FrEIA.framework.ReversibleGraphNet``, fused; calls do not warn of its deprecation."""


class SequenceINN(_FreiaFlow, ff.SequenceINN):
    """``FrEIA.framework.SequenceINN``, fused where it is a chain of couplings and permutations."""

    append: Callable[..., None]
    conditions: list[int | None]
    module_list: nn.ModuleList

    def forward(
        self,
        x_or_z: Tensor,
        c: Sequence[Tensor] | None = None,
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[Any, Any]:
        """x_or_z (N, D), c: conditions (N, C_i) -> (output (N, D), log_jac (N,)), as FrEIA's
        ``SequenceINN.forward``."""
        if not (self.force_tuple_output or self._delegates()):
            x = x_or_z if isinstance(x_or_z, Tensor) else x_or_z[0]
            used = sorted({index for index in self.conditions if index is not None})
            if used and (c is None or isinstance(c, Tensor) or len(c) <= used[-1]):
                raise ValueError(f"c: expected a list of at least {used[-1] + 1} conditions")
            try:
                out, log_jac = self._run_rows(x, [c[index] for index in used] if c else [], rev)
                keeps_volume = all(isinstance(m, _VOLUME_PRESERVING) for m in self.module_list)
                return out, 0.0 if keeps_volume else log_jac
            except UnsupportedFlow:
                pass
        return super().forward(x_or_z, c, rev, jac)


class _FusedNode:
    """Lets a graph be pickled whose subnet constructor is a local function or a lambda: nothing
    reads the arguments after construction."""

    module_args: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["module_args"] = {
            key: value for key, value in self.module_args.items() if _can_pickle(value)
        }
        return state


def _can_pickle(value: object) -> bool:
    if not callable(value):
        return True
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


class Node(_FusedNode, ff.Node):
    """``FrEIA.framework.Node``."""


class InputNode(_FusedNode, ff.InputNode):
    """``FrEIA.framework.InputNode``."""


class ConditionNode(_FusedNode, ff.ConditionNode):
    """``FrEIA.framework.ConditionNode``."""


class OutputNode(_FusedNode, ff.OutputNode):
    """``FrEIA.framework.OutputNode``."""


# FrEIA's classes and their fused drop-ins: modules and the nodes of a graph.
MODULES: dict[Any, Any] = {
    ff.GraphINN: GraphINN,
    ff.ReversibleGraphNet: ReversibleGraphNet,
    ff.SequenceINN: SequenceINN,
    fm.GLOWCouplingBlock: GLOWCouplingBlock,
    fm.RNVPCouplingBlock: RNVPCouplingBlock,
    fm.NICECouplingBlock: NICECouplingBlock,
    fm.GINCouplingBlock: GINCouplingBlock,
    fm.AffineCouplingOneSided: AffineCouplingOneSided,
    fm.ConditionalAffineTransform: ConditionalAffineTransform,
    fm.AllInOneBlock: AllInOneBlock,
}
NODES: dict[Any, Any] = {
    ff.Node: Node,
    ff.InputNode: InputNode,
    ff.ConditionNode: ConditionNode,
    ff.OutputNode: OutputNode,
}
