"""The flow as data: what a front end says about a module and an engine runs.

A front end (:mod:`fasthyp.flows.freia`) turns a module into a :class:`FlowProgram`, a list of typed
steps that hold references to the module's own parameters. :meth:`FlowProgram.layers` simplifies it
to the flat form that the reference and the kernels share (permutations become slots of the
neighbouring couplings). :class:`FlowExecutor` runs it. Front ends know module classes, engines know
programs, neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import is_
from typing import Any

from torch import Tensor, nn

from fasthyp.reference.coupling import CouplingLayer


class UnsupportedFlow(ValueError):
    """A module that a program cannot describe; the message says why."""


@dataclass(frozen=True, eq=False)
class MLP:
    """Linear layers with one activation (``reference.coupling.ACTIVATIONS``) between them."""

    linears: tuple[nn.Linear, ...]
    activation: str = "relu"
    negative_slope: float = 0.01


@dataclass(frozen=True, eq=False)
class Opaque:
    """A subnet that runs as the torch module it is, and the reason why."""

    module: nn.Module
    reason: str


@dataclass(frozen=True, eq=False)
class AffineKind:
    """How raw [s | t] changes the active half: ``x * exp(clamp * f(s)) + t``."""

    clamp: float = 2.0
    clamp_activation: str = "atan"
    clamp_fn: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Coupling:
    """Changes dims ``active`` with a subnet that reads dims ``passive``, then condition columns."""

    active: tuple[int, ...]
    passive: tuple[int, ...]
    subnet: MLP | Opaque
    kind: AffineKind = field(default_factory=AffineKind)
    cond: tuple[int, ...] = ()
    name: str = ""


@dataclass(frozen=True, eq=False)
class Permute:
    """``y = x[:, index]``; the inverse, where given, must be the inverse of ``index``."""

    index: Tensor
    inverse: Tensor | None = None
    name: str = ""


class Watch:
    """Notices that the modules a program was made from are no longer what they were.

    Module attributes are compared by identity: replaced parameters, submodules, settings such as a
    dropout's ``training`` and newly registered hooks outdate a program. It runs before every call
    of a flow, hence the flat lists.
    """

    def __init__(self) -> None:
        self._dicts: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._tables: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._hooks: list[Any] = []

    def attributes(self, owner: object, *names: str) -> None:
        """Watch plain attributes of ``owner``."""
        self._entries(owner.__dict__, names)

    def module(self, module: nn.Module) -> None:
        """Watch a module's parameters, buffers, submodules and hooks."""
        for table in (module._parameters, module._buffers, module._modules):
            self._entries(table, tuple(table))
        if module._modules:
            self._tables.append(module._modules)
            self._sizes.append(len(module._modules))
        self._hooks += _hooks(module)

    def include(self, other: Watch) -> None:
        """Watch everything that ``other`` watches."""
        self._dicts += other._dicts
        self._keys += other._keys
        self._values += other._values
        self._tables += other._tables
        self._sizes += other._sizes
        self._hooks += other._hooks

    def _entries(self, table: dict[str, Any], names: tuple[str, ...]) -> None:
        for name in names:
            self._dicts.append(table)
            self._keys.append(name)
            self._values.append(table.get(name))

    def unchanged(self) -> bool:
        return (
            all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
            and not any(self._hooks)
            and list(map(len, self._tables)) == self._sizes
        )


def _hooks(module: nn.Module) -> list[Any]:
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered on the module itself."""
    return any(_hooks(module))


class FlowProgram:
    """A flow over ``dim`` numbers, from data to latent, as a list of steps.

    Args:
        dim: width D of the state.
        cond_dims: widths of the conditions, concatenated in this order.
        steps: :class:`Coupling` and :class:`Permute`, in the direction data -> latent.
        watch: what the front end wants watched beside the linears.

    Attributes:
        opaque: the subnets that are no plain MLPs.
    """

    def __init__(
        self,
        dim: int,
        cond_dims: Sequence[int],
        steps: Sequence[Coupling | Permute],
        watch: Watch | None = None,
    ) -> None:
        self.dim = dim
        self.cond_dims = tuple(cond_dims)
        self.steps = tuple(steps)
        self.watch = watch or Watch()
        self.opaque = [
            step.subnet.module
            for step in self.steps
            if isinstance(step, Coupling) and isinstance(step.subnet, Opaque)
        ]
        for step in self.steps:
            if isinstance(step, Coupling):
                _check_coupling(step, dim, sum(self.cond_dims))
                if isinstance(step.subnet, MLP):
                    for linear in step.subnet.linears:
                        self.watch.module(linear)

    @property
    def cond_dim(self) -> int:
        return sum(self.cond_dims)

    @property
    def couplings(self) -> list[Coupling]:
        return [step for step in self.steps if isinstance(step, Coupling)]

    def tensors(self) -> list[Tensor]:
        """Weights and biases of the MLPs: what a packed form is made from."""
        return [
            tensor
            for step in self.couplings
            if isinstance(step.subnet, MLP)
            for linear in step.subnet.linears
            for tensor in (linear.weight, linear.bias)
            if tensor is not None
        ]

    def opaque_tensors(self) -> list[Tensor]:
        """Parameters of the opaque subnets."""
        return [tensor for module in self.opaque for tensor in module.parameters()]

    def indices(self) -> list[Tensor]:
        """The tensors of the permutations, whose values :meth:`layers` folds in."""
        return [
            tensor
            for step in self.steps
            if isinstance(step, Permute)
            for tensor in (step.index, step.inverse)
            if tensor is not None
        ]

    def layers(self) -> tuple[tuple[CouplingLayer, ...], tuple[int, ...]]:
        """The simplified flow: coupling layers on fixed slots, and where each output lies.

        Raises:
            ValueError: a permutation is not one.
        """
        slots = list(range(self.dim))
        layers = []
        for step in self.steps:
            if isinstance(step, Permute):
                slots = [slots[i] for i in _permutation(step, self.dim)]
            elif step.active:
                layers.append(_layer(step, slots))
        return tuple(layers), tuple(slots)


def _layer(step: Coupling, slots: list[int]) -> CouplingLayer:
    places: dict[str, Any] = {
        "active": tuple(slots[i] for i in step.active),
        "passive": tuple(slots[i] for i in step.passive),
        "cond": step.cond,
        "clamp": step.kind.clamp,
        "clamp_activation": step.kind.clamp_activation,
        "clamp_fn": step.kind.clamp_fn,
    }
    if isinstance(step.subnet, Opaque):
        return CouplingLayer(**places, module=step.subnet.module)
    return CouplingLayer(
        **places,
        weights=tuple(linear.weight for linear in step.subnet.linears),
        biases=tuple(linear.bias for linear in step.subnet.linears),
        activation=step.subnet.activation,
        negative_slope=step.subnet.negative_slope,
    )


def _permutation(step: Permute, dim: int) -> list[int]:
    index: list[int] = step.index.tolist()
    what = f"permutation {step.name}".rstrip()
    if sorted(index) != list(range(dim)):
        raise ValueError(f"{what}: expected a permutation of 0..{dim - 1}, got {index}")
    if step.inverse is not None and [index[i] for i in step.inverse.tolist()] != list(range(dim)):
        raise ValueError(f"{what}: its stored inverse is not its inverse")
    return index


def _check_coupling(step: Coupling, dim: int, cond_dim: int) -> None:
    used = step.active + step.passive
    if len(set(used)) != len(used) or not all(0 <= i < dim for i in used):
        raise ValueError(
            f"coupling {step.name}: active and passive must be distinct dims below {dim}, "
            f"got {step.active} and {step.passive}"
        )
    if not all(0 <= i < cond_dim for i in step.cond):
        raise ValueError(
            f"coupling {step.name}: condition columns must be below {cond_dim}, got {step.cond}"
        )
    if isinstance(step.subnet, Opaque):
        return
    linears = step.subnet.linears
    widths = [linears[0].in_features, *(linear.out_features for linear in linears)]
    expected = (len(step.passive) + len(step.cond), 2 * len(step.active))
    joined = all(a.out_features == b.in_features for a, b in pairwise(linears))
    if not joined or (widths[0], widths[-1]) != expected:
        raise UnsupportedFlow(
            f"coupling {step.name}: its linears have widths {widths}, "
            f"expected {expected[0]} inputs and {expected[1]} outputs"
        )
