"""Flows under ``torch.compile``: the fused op in the graph, the module's tensors as its inputs.

What a flow consists of is a constant of the compiled code, which :func:`trace` computes while
dynamo traces a call. The traced code reads the weights from the module, so they are inputs of the
graph and their folding is a part of it: there is no packed copy that could go stale. What the
constant was made from is guarded, and a change compiles anew; only the numbers in permutations and
masks cannot be, so the compiled code compares them and fails where they have changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasthyp.flows.executor import FlowExecutor
from fasthyp.ops.coupling_training import TrainableFlow

Path = tuple[str, ...]
"""Names of submodules, one inside the other."""

_CHANGED = (
    "permutations or masks of a flow have changed since torch.compile traced it: "
    "call torch.compiler.reset() after such a change"
)


class Traced(NamedTuple):
    """A flow as a constant of compiled code.

    Attributes:
        number: that of the flow for :func:`run`.
        tensors: where the flow's tensors are, in the order that ``run`` wants: path and name.
        settings: path, name and value of the attributes that the flow was made from.
        objects: path and name of those that are no plain values.
        sizes: the path of every module inside, and how many submodules it has.
    """

    number: int
    tensors: tuple[tuple[Path, str], ...]
    settings: tuple[tuple[Path, str, Any], ...]
    objects: tuple[tuple[Path, str], ...]
    sizes: tuple[tuple[Path, int], ...]


class _Slot(NamedTuple):
    """Stands for a tensor in the layers of a flow."""

    place: int


@dataclass(frozen=True, eq=False)
class _Flow:
    """What :func:`run` needs to know, without any tensor."""

    fused: TrainableFlow  # over slots
    weights: int
    fixed: list[float]  # values of the tensors after the weights
    inverted: bool
    like: tuple[str, torch.dtype]  # kind of device, dtype


_flows: dict[int, _Flow] = {}  # as long as there may be compiled code: for good
_numbers = itertools.count()


def trace(root: nn.Module, flow: FlowExecutor) -> Traced | None:
    """The flow of ``root`` as a constant; None where it does not run as one fused op."""
    plan, fused = flow.current_plan(), flow.trainable()
    places = _places(root)
    watched = [*plan.program.watch.values_watched(), *plan.indices]
    fixed = [tensor for tensor in watched if id(tensor) in places]
    if fused is None or not all(id(weight) in places for weight in plan.weights):
        return None
    slots = {id(weight): _Slot(i) for i, weight in enumerate(plan.weights)}
    layers = _map(plan.layers, Tensor, lambda tensor: slots[id(tensor)])
    number = next(_numbers)
    _flows[number] = _Flow(
        *(fused.over(layers), len(plan.weights), _values(fixed).tolist()),
        *(plan.program.inverted, (plan.like.device.type, plan.like.dtype)),
    )
    torch._dynamo.allow_in_graph(run)
    settings = [(_path(name), *entry) for name, *entry in plan.program.watch.settings(root)]
    plain = [isinstance(value, (bool, int, float, str)) for *_, value in settings]
    return Traced(
        number,
        tuple(places[id(tensor)] for tensor in (*plan.weights, *fixed)),
        tuple(entry for entry, known in zip(settings, plain, strict=True) if known),
        tuple(entry[:2] for entry, known in zip(settings, plain, strict=True) if not known),
        tuple((_path(name), len(part._modules)) for name, part in root.named_modules()),
    )


def run(
    number: int, tensors: Sequence[Tensor], state: Tensor, cond: Tensor | None, rev: bool
) -> tuple[Tensor, Tensor]:
    """A pass of a traced flow over these tensors. Dynamo puts the call into its graph without
    looking inside; the compiler behind it does."""
    flow = _flows[number]
    kind, dtype = flow.like
    if torch.is_autocast_enabled(kind):
        state, cond = state.to(dtype), None if cond is None else cond.to(dtype)
    with torch.autocast(kind, enabled=False):
        if flow.fixed:
            found = _values(tensors[flow.weights :])
            expected = torch.tensor(flow.fixed, dtype=found.dtype, device=found.device)
            torch._assert_async((found == expected).all(), _CHANGED)
        fused = flow.fused.over(_map(flow.fused.layers, _Slot, lambda slot: tensors[slot.place]))
        return (fused.inverse if rev != flow.inverted else fused.forward)(state, cond)


def _path(name: str) -> Path:
    return tuple(name.split(".")) if name else ()


def _places(root: nn.Module) -> dict[int, tuple[Path, str]]:
    """Where the parameters and buffers of a module are, by identity."""
    found: dict[int, tuple[Path, str]] = {}
    for name, part in root.named_modules():
        for table in (part._parameters, part._buffers):
            found.update((id(tensor), (_path(name), key)) for key, tensor in table.items())
    return found


def _values(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in the tensors, as float64."""
    flat = [tensor.detach().reshape(-1).double() for tensor in tensors]
    return torch.cat(flat) if flat else torch.empty(0)


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A tree of tuples and dataclasses with every ``kind`` in it changed."""
    if isinstance(value, kind):
        return change(value)
    if type(value) is tuple:
        return tuple(_map(item, kind, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: _map(part, kind, change) for name, part in parts.items()})
    return value
