"""FrEIA 0.2 front end: its chains of ``GLOWCouplingBlock`` and ``PermuteRandom`` as programs, and
drop-in subclasses of its classes that run them fused.

The classes own nothing new: same constructor, parameters, ``state_dict`` keys, call signature and
return types as FrEIA's. What a program cannot describe (several inputs, other blocks, images) runs
FrEIA's own ``forward``.
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

from fasthyp.flows.clamps import CLAMPS, ScaledAtan, clamp_name
from fasthyp.flows.executor import FlowExecutor
from fasthyp.flows.freia_old import OldInputNode, OldPermuteRandom
from fasthyp.flows.program import (
    MLP,
    AffineKind,
    Coupling,
    FlowProgram,
    Opaque,
    Permute,
    UnsupportedFlow,
    Watch,
    has_hooks,
)

# --- from modules to programs ---------------------------------------------------------------------


def describe(module: nn.Module) -> FlowProgram:
    """The program of a ``GraphINN``, ``ReversibleGraphNet``, ``SequenceINN`` or coupling block.

    Raises:
        TypeError: not one of these.
        UnsupportedFlow: one of these, but not a chain of GLOW couplings and permutations of
            vectors; the message says where.
    """
    if not isinstance(module, (ff.GraphINN, ff.SequenceINN, fm.GLOWCouplingBlock)):
        raise TypeError(
            "expected a FrEIA GraphINN, ReversibleGraphNet, SequenceINN or GLOWCouplingBlock, "
            f"got {type(module).__name__}"
        )
    if type(module).forward not in _FORWARDS:
        raise UnsupportedFlow(f"{type(module).__name__} has a forward of its own")
    watch = Watch()
    if isinstance(module, ff.GraphINN):
        return _describe_graph(module, watch)
    if isinstance(module, ff.SequenceINN):
        return _describe_sequence(module, watch)
    columns = tuple(range(module.condition_length))
    dims = (module.condition_length,) if columns else ()
    return FlowProgram(module.channels, dims, _couplings(module, columns, "", watch), watch)


def _describe_graph(net: ff.GraphINN, watch: Watch) -> FlowProgram:
    if len(net.in_nodes) != 1 or len(net.out_nodes) != 1:
        raise UnsupportedFlow("it has several inputs or outputs")
    (dim,) = _vector(net.in_nodes[0].dims, "input")
    columns: dict[ff.ConditionNode, tuple[int, ...]] = {}
    cond_dims: list[int] = []
    for node in net.condition_nodes:
        (width,) = _vector(node.dims, f"condition {node.name}")
        start = sum(cond_dims)
        columns[node] = tuple(range(start, start + width))
        cond_dims.append(width)

    names = {id(module): f"module_list.{i}" for i, module in enumerate(net.module_list)}
    steps: list[Coupling | Permute] = []
    node, count = net.in_nodes[0], 0
    while True:
        if len(node.outputs) != 1 or node.outputs[0] is None:
            raise UnsupportedFlow(f"{node} does not have exactly one output")
        node = node.outputs[0][0]
        if node is net.out_nodes[0]:
            break
        if len(node.inputs) != 1:
            raise UnsupportedFlow(f"{node} has {len(node.inputs)} inputs")
        watch.attributes(node, "module")
        cond = tuple(i for c in node.conditions for i in columns[c])
        steps += _steps(node.module, cond, names.get(id(node.module), node.name), watch)
        count += 1
    if count != len(net.module_list):
        raise UnsupportedFlow("its nodes are not one chain")
    return FlowProgram(dim, cond_dims, steps, watch)


def _describe_sequence(net: ff.SequenceINN, watch: Watch) -> FlowProgram:
    (dim,) = _vector(net.shapes[0], "input")
    widths: dict[int, int] = {}
    for index, module in zip(net.conditions, net.module_list, strict=True):
        if index is not None:
            (width,) = _vector(module.dims_c[0], f"condition {index}")
            if widths.setdefault(index, width) != width:
                raise UnsupportedFlow(f"condition {index} has several widths")
    starts, total = {}, 0
    for index in sorted(widths):
        starts[index] = total
        total += widths[index]
    steps: list[Coupling | Permute] = []
    for i, (index, module) in enumerate(zip(net.conditions, net.module_list, strict=True)):
        cond = () if index is None else range(starts[index], starts[index] + widths[index])
        steps += _steps(module, tuple(cond), f"module_list.{i}", watch)
    watch.module(net.module_list)
    return FlowProgram(dim, [widths[index] for index in sorted(widths)], steps, watch)


def _vector(shape: Sequence[int], what: str) -> Sequence[int]:
    if len(shape) != 1:
        raise UnsupportedFlow(f"its {what} has shape {tuple(shape)}, not one dimension")
    return shape


def _steps(module: Any, cond: tuple[int, ...], name: str, watch: Watch) -> list[Coupling | Permute]:
    if isinstance(module, fm.GLOWCouplingBlock) and type(module).forward in _FORWARDS:
        return list(_couplings(module, cond, name, watch))
    if type(module) is OldInputNode:
        return []
    if type(module) in (fm.PermuteRandom, PermuteRandom, OldPermuteRandom):
        _require_plain(module, name)
        watch.module(module)
        return [Permute(module.perm, module.perm_inv, name)]
    raise UnsupportedFlow(
        f"{name} is a {type(module).__name__}, not a GLOWCouplingBlock or PermuteRandom"
    )


def _couplings(
    block: fm.GLOWCouplingBlock, cond: tuple[int, ...], name: str, watch: Watch
) -> tuple[Coupling, Coupling]:
    """x1 changes with subnet2(x2), then x2 with subnet1(the new x1)."""
    _require_plain(block, name)
    if block.ndims != 1:
        raise UnsupportedFlow(f"{name} works on {block.ndims}-dimensional data")
    if len(cond) != block.condition_length:
        raise UnsupportedFlow(
            f"{name} reads {block.condition_length} condition columns, has {len(cond)}"
        )
    if not isinstance(block.clamp, (int, float)):
        raise UnsupportedFlow(f"{name} has a clamp of type {type(block.clamp).__name__}")
    watch.module(block)
    watch.attributes(block, "clamp", "f_clamp", "split_len1")
    kind = _kind(block)
    x1 = tuple(range(block.split_len1))
    x2 = tuple(range(block.split_len1, block.channels))
    prefix = f"{name}." if name else ""
    return (
        Coupling(x1, x2, subnet(block.subnet2, watch), kind, cond, f"{prefix}subnet2"),
        Coupling(x2, x1, subnet(block.subnet1, watch), kind, cond, f"{prefix}subnet1"),
    )


def _kind(block: fm.GLOWCouplingBlock) -> AffineKind:
    function = block.f_clamp
    if type(function) is ScaledAtan and function.clamp == block.clamp:
        return AffineKind(block.clamp, "atan_scaled")
    name = clamp_name(function)
    if name is None:
        return AffineKind(block.clamp, clamp_fn=function)
    return AffineKind(block.clamp, name)


def _require_plain(module: nn.Module, name: str) -> None:
    if has_hooks(module):
        raise UnsupportedFlow(f"{name} has hooks")
    if "forward" in module.__dict__:
        raise UnsupportedFlow(f"{name} has a forward of its own")


def subnet(module: nn.Module, watch: Watch) -> MLP | Opaque:
    """An MLP where the module is nothing but Linear layers with one kind of activation between
    them (inactive dropout and Identity do not count), an Opaque with the reason otherwise."""
    seen = Watch()
    try:
        mlp = _mlp(module, seen)
    except UnsupportedFlow as error:
        return Opaque(module, str(error))
    watch.include(seen)
    return mlp


def _mlp(module: nn.Module, watch: Watch) -> MLP:
    linears: list[nn.Linear] = []
    activations: list[tuple[str, float]] = []
    for name, part in _flatten(module, "", watch):
        kind = type(part)
        if kind is nn.Identity:
            continue
        if kind is nn.Dropout:
            watch.attributes(part, "training", "p")
            if part.training and part.p > 0:
                raise UnsupportedFlow(f"{name} is a Dropout in training mode")
        elif kind is nn.Linear:
            if len(activations) != len(linears):
                raise UnsupportedFlow(f"{name} is a Linear right after another")
            linears.append(part)
        else:
            activation = _activation(part, name, watch)
            if len(activations) + 1 != len(linears):
                raise UnsupportedFlow(f"{name} is not between two Linear layers")
            activations.append(activation)
    if len(activations) + 1 != len(linears):
        raise UnsupportedFlow("it does not end with a Linear layer")
    if len(set(activations)) > 1:
        raise UnsupportedFlow("it has different activations")
    return MLP(tuple(linears), *(activations[0] if activations else ()))


def _flatten(module: Any, name: str, watch: Watch) -> Iterable[tuple[str, Any]]:
    _require_plain(module, name or "it")
    watch.module(module)
    if type(module) is nn.Sequential:
        for key, child in module.named_children():
            yield from _flatten(child, f"{name}.{key}" if name else key, watch)
    else:
        yield name or "it", module


def _activation(module: Any, name: str, watch: Watch) -> tuple[str, float]:
    kind = type(module)
    if kind is nn.ReLU:
        return "relu", 0.0
    if kind is nn.LeakyReLU:
        watch.attributes(module, "negative_slope")
        return "leaky_relu", module.negative_slope
    if kind is nn.SiLU:
        return "silu", 0.0
    if kind is nn.Tanh:
        return "tanh", 0.0
    if kind is nn.GELU:
        watch.attributes(module, "approximate")
        return ("gelu_tanh" if module.approximate == "tanh" else "gelu"), 0.0
    raise UnsupportedFlow(f"{name} is a {kind.__name__}, which the fused MLP does not have")


# --- drop-in classes ------------------------------------------------------------------------------


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

    conditions: list[int | None]
    module_list: nn.ModuleList

    def append(self, *args: Any, **kwargs: Any) -> None:
        super().append(*args, **kwargs)
        self.__dict__.pop("_flow", None)

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
_FORWARDS = {cls.forward for pair in MODULES.items() for cls in pair}
