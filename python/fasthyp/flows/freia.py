"""FrEIA 0.2 front end: its chains of ``GLOWCouplingBlock`` and ``PermuteRandom`` as programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
from torch import nn

from fasthyp.flows.clamps import ScaledAtan, clamp_name
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
    if not _computes_as(module, "forward"):
        raise UnsupportedFlow(f"{type(module).__name__} has a forward of its own")
    watch = Watch()
    if isinstance(module, ff.GraphINN):
        return _describe_graph(module, watch)
    if isinstance(module, ff.SequenceINN):
        return _describe_sequence(module, watch)
    if not _computes_as(module, "_coupling1", "_coupling2"):
        raise UnsupportedFlow(f"{type(module).__name__} has couplings of its own")
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
    if isinstance(module, fm.GLOWCouplingBlock) and _computes_as(
        module, "forward", "_coupling1", "_coupling2"
    ):
        return list(_couplings(module, cond, name, watch))
    if type(module) is OldInputNode:
        return []
    if isinstance(module, (fm.PermuteRandom, OldPermuteRandom)) and _computes_as(module, "forward"):
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


def _computes_as(module: nn.Module, *methods: str) -> bool:
    """Whether a subclass of FrEIA's left these methods as FrEIA or this package defines them."""
    owners = ("FrEIA.", "fasthyp.flows.")
    return all(getattr(type(module), name).__module__.startswith(owners) for name in methods)


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
