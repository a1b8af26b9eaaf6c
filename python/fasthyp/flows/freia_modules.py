"""Drop-in subclasses of FrEIA 0.2's classes that run fused.

They own nothing new: same constructor, parameters, ``state_dict`` keys, call signature and return
types as FrEIA's. What a program cannot describe (several inputs, other blocks, images) runs FrEIA's
own ``forward``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import numpy as np
import torch
from torch import Tensor, nn

from fasthyp.flows.clamps import CLAMPS, clamp_name
from fasthyp.flows.executor import FlowExecutor
from fasthyp.flows.freia import describe
from fasthyp.flows.program import UnsupportedFlow


class FusedFlow(nn.Module):
    """What the drop-in classes share: a lazily made executor, never saved or copied."""

    precision = "highest"

    def flow(self) -> FlowExecutor:
        """The executor of this module; made on first use.

        Raises:
            UnsupportedFlow: the module is not a chain that a program can describe.
        """
        state = self.__dict__.get("_flow")
        if state is None:
            state = FlowExecutor(partial(describe, self), self.precision)
            try:
                _ = state.program
            except UnsupportedFlow as error:
                state = error
            self.__dict__["_flow"] = state
        if isinstance(state, UnsupportedFlow):
            raise state
        return state

    def train(self, mode: bool = True) -> Any:
        # Called between training and evaluation: also a good moment to forget weights that were
        # changed behind PyTorch's back, through parameter.data.
        self.__dict__.pop("_flow", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_flow", None)
        return state

    def _delegates(self) -> bool:
        """Whether this call is for FrEIA's own forward, which every torch transform can trace."""
        return (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or getattr(self, "_is_replica", False)
        )

    def _run_rows(
        self, x: Tensor, conditions: Sequence[Tensor], rev: bool
    ) -> tuple[Tensor, Tensor]:
        """FrEIA's way to call: rows x (N, D), each with its own row of every condition."""
        flow = self.flow()
        program = flow.program
        name = "x_or_z"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != program.dim:
            raise ValueError(f"{name}: expected shape (N, {program.dim}), got {tuple(x.shape)}")
        for i, (c, width) in enumerate(zip(conditions, program.cond_dims, strict=True)):
            if not isinstance(c, Tensor):
                raise TypeError(f"c[{i}]: expected a tensor, got {type(c).__name__}")
            if c.shape != (x.shape[0], width):
                raise ValueError(
                    f"c[{i}]: expected shape ({x.shape[0]}, {width}), got {tuple(c.shape)}"
                )
        cond = None
        if conditions:
            cond = conditions[0] if len(conditions) == 1 else torch.cat(tuple(conditions), 1)
        out, log_jac = (flow.inverse if rev else flow.forward)(x[:, None], cond)
        return out[:, 0], log_jac[:, 0]


class GLOWCouplingBlock(FusedFlow, fm.GLOWCouplingBlock):
    """``FrEIA.modules.GLOWCouplingBlock``, fused."""

    f_clamp: Callable[[Tensor], Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.f_clamp = _picklable_clamp(self.f_clamp)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """x: one tensor (N, D) in a sequence; c: conditions (N, C_i) -> ((y,), log_jac (N,))."""
        if not self._delegates():
            conditions = []
            if self.conditional:
                if not len(c):
                    raise ValueError(f"c: expected {self.condition_length} columns, got no tensor")
                conditions = [torch.cat(tuple(c), 1) if len(c) > 1 else c[0]]
            try:
                out, log_jac = self._run_rows(x[0], conditions, rev)
                return (out,), log_jac
            except UnsupportedFlow:
                pass
        return super().forward(x, list(c), rev, jac)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["f_clamp"] = _picklable_clamp(state["f_clamp"])
        return state


def _picklable_clamp(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """FrEIA keeps lambdas; the same function by name can be pickled."""
    name = clamp_name(function)
    return function if name is None else CLAMPS[name]


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


class _FusedGraph(FusedFlow):
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


class SequenceINN(FusedFlow, ff.SequenceINN):
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
                if any(isinstance(m, fm.GLOWCouplingBlock) for m in self.module_list):
                    return self._run_rows(x, [c[index] for index in used] if c else [], rev)
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
}
NODES: dict[Any, Any] = {
    ff.Node: Node,
    ff.InputNode: InputNode,
    ff.ConditionNode: ConditionNode,
    ff.OutputNode: OutputNode,
}
