"""The flow as data: what a front end says about a module and an engine runs.

A front end (:mod:`fasthyp.flows.freia`, ``nflows``, ``realnvp``) turns a module into a
:class:`FlowProgram`, a list of typed steps that hold references to the module's own parameters.
:meth:`FlowProgram.layers` simplifies it to the flat form that the reference and the kernels share
(permutations become slots of the neighbouring couplings). :class:`FlowExecutor` runs it. Front ends
know module classes, engines know programs, neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import is_
from typing import Any

from torch import Tensor, nn

from fasthyp.reference import coupling as reference
from fasthyp.reference.coupling import CouplingLayer, Dense, Layer, LinearLayer, LinearMap, Net


class UnsupportedFlow(ValueError):
    """A module that a program cannot describe; the message says why."""


class UninitializedFlow(UnsupportedFlow):
    """A module whose first call sets its parameters (ActNorm): it is described after that."""


@dataclass(frozen=True, eq=False)
class MLP:
    """Linear layers with one activation (``reference.coupling.ACTIVATIONS``) between them."""

    linears: tuple[nn.Linear, ...]
    activation: str = "relu"
    negative_slope: float = 0.01

    def modules(self) -> list[nn.Module]:
        return list(self.linears)

    def widths(self) -> list[int]:
        """Inputs, then the outputs of each layer; ValueError where they do not fit together."""
        return _widths(self.linears)

    def net(self, inputs: tuple[int, ...] | None, outputs: tuple[int, ...] | None) -> Net:
        last = len(self.linears) - 1
        layers = [Dense(m.weight, m.bias, activate=i < last) for i, m in enumerate(self.linears)]
        return Net(tuple(layers), self.activation, self.negative_slope, inputs, outputs)


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """``h + gate * (linear2(f(norm2(linear1(f(norm1(h)))))))``, f the activation.

    The norms are batch norms in eval mode; the gate is the sigmoid of a Linear of the condition.
    """

    linear1: nn.Linear
    linear2: nn.Linear
    norm1: nn.BatchNorm1d | None = None
    norm2: nn.BatchNorm1d | None = None
    gate: nn.Linear | None = None

    def modules(self) -> list[nn.Module]:
        parts = (self.linear1, self.linear2, self.norm1, self.norm2, self.gate)
        return [part for part in parts if part is not None]


@dataclass(frozen=True, eq=False)
class ResidualMLP:
    """The residual net of nflows: ``final(block_n(... block_1(initial([passive, cond]))))``."""

    initial: nn.Linear
    blocks: tuple[ResidualBlock, ...]
    final: nn.Linear
    activation: str = "relu"
    negative_slope: float = 0.01

    def modules(self) -> list[nn.Module]:
        inner = [part for block in self.blocks for part in block.modules()]
        return [self.initial, *inner, self.final]

    def widths(self) -> list[int]:
        """Inputs, then the outputs of each layer; ValueError where they do not fit together."""
        inner = [linear for block in self.blocks for linear in (block.linear1, block.linear2)]
        return _widths((self.initial, *inner, self.final))

    def net(self, inputs: tuple[int, ...] | None, outputs: tuple[int, ...] | None) -> Net:
        layers: list[Dense] = []
        before: dict[str, Any] = {}  # what the linear before the next one ends with
        linear = self.initial
        for block in self.blocks:
            norm = _batch_norm(block.norm1)
            layers.append(
                Dense(linear.weight, linear.bias, **before, keep=True, norm=norm, activate=True)
            )
            first = block.linear1
            layers.append(
                Dense(first.weight, first.bias, norm=_batch_norm(block.norm2), activate=True)
            )
            linear = block.linear2
            gate = None if block.gate is None else (block.gate.weight, block.gate.bias)
            before = {"add": True, "gate": gate}
        layers.append(Dense(linear.weight, linear.bias, **before))
        layers.append(Dense(self.final.weight, self.final.bias))
        return Net(tuple(layers), self.activation, self.negative_slope, inputs, outputs)


def _batch_norm(norm: nn.BatchNorm1d | None) -> reference.BatchNorm | None:
    if norm is None:
        return None
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return reference.BatchNorm(mean, variance, norm.weight, norm.bias, norm.eps)


def _widths(linears: Sequence[nn.Linear]) -> list[int]:
    widths = [linears[0].in_features, *(linear.out_features for linear in linears)]
    if any(a.out_features != b.in_features for a, b in pairwise(linears)):
        raise ValueError(f"its linears do not fit together, outputs {widths[1:]}")
    return widths


@dataclass(frozen=True, eq=False)
class Opaque:
    """A subnet that runs as the torch module it is, and the reason why.

    ``call`` takes rows [passive, cond] where the module itself does not.
    """

    module: nn.Module
    reason: str
    call: Callable[[Tensor], Tensor] | None = None


Subnet = MLP | ResidualMLP | Opaque


@dataclass(frozen=True, eq=False)
class AffineKind:
    """How raw [s | t] changes the active half: ``x * exp(s) + t``, ``s <- clamp * f(s)``.

    ``centered`` takes the mean off s (GIN); raw is multiplied with ``raw_scale`` first.
    """

    clamp: float = 2.0
    clamp_activation: str = "atan"
    clamp_fn: Callable[[Tensor], Tensor] | None = None
    centered: bool = False
    raw_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class AdditiveKind:
    """raw = t, and ``x + t``."""


@dataclass(frozen=True, eq=False)
class Coupling:
    """Changes dims ``active`` with a subnet that reads dims ``passive``, then condition columns.

    Where ``shift_subnet`` is given, it computes t and ``subnet`` s alone. ``inputs`` and
    ``outputs`` choose columns and rows of subnets that are wider than the coupling (masked
    couplings): the columns that meet [passive, cond] and the rows that meet ``active``.
    """

    active: tuple[int, ...]
    passive: tuple[int, ...]
    subnet: Subnet
    kind: AffineKind | AdditiveKind = field(default_factory=AffineKind)
    cond: tuple[int, ...] = ()
    name: str = ""
    shift_subnet: Subnet | None = None
    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None

    @property
    def subnets(self) -> tuple[Subnet, ...]:
        return (self.subnet,) if self.shift_subnet is None else (self.subnet, self.shift_subnet)


@dataclass(frozen=True, eq=False)
class Linear:
    """``y = W x + shift`` over all dims, W and shift computed from a module's own tensors.

    A ``diagonal`` one scales and shifts each dim (ActNorm).
    """

    tensors: tuple[Tensor, ...]
    evaluate: Callable[..., LinearMap]
    diagonal: bool = False
    name: str = ""


@dataclass(frozen=True, eq=False)
class Permute:
    """``y = x[:, index]``; the inverse, where given, must be the inverse of ``index``."""

    index: Tensor
    inverse: Tensor | None = None
    name: str = ""


Step = Coupling | Linear | Permute


class Watch:
    """Notices that the modules a program was made from are no longer what they were.

    Module attributes are compared by identity: replaced parameters, submodules, settings such as a
    dropout's ``training`` and newly registered hooks outdate a program, and so do changes in place
    of the few tensors whose values it was made from. It runs before every call of a flow, hence the
    flat lists.
    """

    def __init__(self) -> None:
        self._dicts: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._tables: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._hooks: list[Any] = []
        self._tensors: list[Tensor] = []
        self._stamp: Any = None

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

    def values(self, *tensors: Tensor) -> None:
        """Watch the numbers in these tensors."""
        self._tensors += tensors
        self._stamp = stamp(self._tensors)

    def _entries(self, table: dict[str, Any], names: tuple[str, ...]) -> None:
        for name in names:
            self._dicts.append(table)
            self._keys.append(name)
            self._values.append(table.get(name))

    def settings(self, root: nn.Module) -> list[tuple[str, str, Any]]:
        """The watched attributes of modules inside ``root``: module, attribute and value."""
        names = {id(part.__dict__): name for name, part in root.named_modules()}
        entries = zip(self._dicts, self._keys, self._values, strict=True)
        return [(names[id(d)], key, value) for d, key, value in entries if id(d) in names]

    def values_watched(self) -> list[Tensor]:
        """The tensors of which the numbers are watched."""
        return list(self._tensors)

    def unchanged(self) -> bool:
        return (
            all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
            and not any(self._hooks)
            and list(map(len, self._tables)) == self._sizes
            and (not self._tensors or self._stamp == stamp(self._tensors))
        )


def stamp(tensors: list[Tensor]) -> Any:
    """Changes whenever a tensor's memory or values do (None: cannot be known)."""
    try:
        return [t._version for t in tensors], [t.data_ptr() for t in tensors]
    except RuntimeError:  # inference tensors have no version
        return None


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
        steps: :class:`Coupling`, :class:`Linear` and :class:`Permute`, in the direction data ->
            latent.
        watch: what the front end wants watched beside the linears.
        inverted: the steps lead from latent to data instead.

    Attributes:
        opaque: the subnets that are no plain MLPs.
    """

    def __init__(
        self,
        dim: int,
        cond_dims: Sequence[int],
        steps: Sequence[Step],
        watch: Watch | None = None,
        inverted: bool = False,
    ) -> None:
        self.dim = dim
        self.cond_dims = tuple(cond_dims)
        self.steps = tuple(steps)
        self.watch = watch or Watch()
        self.inverted = inverted
        subnets = [subnet for step in self.couplings for subnet in step.subnets]
        self.opaque = [subnet.module for subnet in subnets if isinstance(subnet, Opaque)]
        for step in self.couplings:
            _check_coupling(step, dim, sum(self.cond_dims))
        for subnet in subnets:
            if not isinstance(subnet, Opaque):
                for module in subnet.modules():
                    self.watch.module(module)

    @property
    def cond_dim(self) -> int:
        return sum(self.cond_dims)

    @property
    def couplings(self) -> list[Coupling]:
        return [step for step in self.steps if isinstance(step, Coupling)]

    def tensors(self) -> list[Tensor]:
        """Weights of the subnets and of the linear steps: what a packed form is made from."""
        found: list[Tensor | None] = []
        for step in self.steps:
            if isinstance(step, Linear):
                found += step.tensors
            elif isinstance(step, Coupling):
                for subnet in step.subnets:
                    for module in () if isinstance(subnet, Opaque) else subnet.modules():
                        found += [*module._parameters.values()]
                        if isinstance(module, nn.BatchNorm1d):
                            found += [module.running_mean, module.running_var]
        return [tensor for tensor in found if tensor is not None]

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

    def layers(self) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
        """The simplified flow: layers on fixed slots, and where each output lies.

        Raises:
            ValueError: a permutation is not one.
        """
        slots = list(range(self.dim))
        layers: list[Layer] = []
        for step in self.steps:
            if isinstance(step, Permute):
                slots = [slots[i] for i in _permutation(step, self.dim)]
            elif isinstance(step, Linear):
                layers.append(LinearLayer(tuple(slots), step.tensors, step.evaluate, step.diagonal))
                if not step.diagonal:
                    slots = list(range(self.dim))
            elif step.active:
                layers.append(_layer(step, slots))
        return tuple(layers), tuple(slots)


def _layer(step: Coupling, slots: list[int]) -> CouplingLayer:
    nets = tuple(
        (subnet.call or subnet.module)
        if isinstance(subnet, Opaque)
        else subnet.net(step.inputs, step.outputs)
        for subnet in step.subnets
    )
    active, passive = (tuple(slots[i] for i in dims) for dims in (step.active, step.passive))
    if isinstance(step.kind, AdditiveKind):
        return CouplingLayer(active, passive, step.cond, nets, "additive")
    return CouplingLayer(
        *(active, passive, step.cond, nets, "gin" if step.kind.centered else "affine"),
        *(step.kind.clamp, step.kind.clamp_activation, step.kind.clamp_fn, step.kind.raw_scale),
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
    if step.shift_subnet is not None and isinstance(step.kind, AdditiveKind):
        raise ValueError(f"coupling {step.name}: an additive coupling has one subnet")
    both = step.shift_subnet is None and isinstance(step.kind, AffineKind)
    outputs = (2 if both else 1) * len(step.active)
    expected = (len(step.passive) + len(step.cond), outputs)
    for chosen, count in zip((step.inputs, step.outputs), expected, strict=True):
        if chosen is not None and len(chosen) != count:
            raise ValueError(f"coupling {step.name}: expected {count} of its rows or columns")
    for subnet in step.subnets:
        if isinstance(subnet, Opaque):
            continue
        try:
            widths = subnet.widths()
        except ValueError as error:
            raise UnsupportedFlow(f"coupling {step.name}: {error}") from None
        got = [widths[0], widths[-1]]
        for i, chosen in enumerate((step.inputs, step.outputs)):
            if chosen is not None:
                if not all(0 <= k < got[i] for k in chosen):
                    raise ValueError(f"coupling {step.name}: rows or columns out of range")
                got[i] = len(chosen)
        if tuple(got) != expected:
            raise UnsupportedFlow(
                f"coupling {step.name}: its linears have widths {widths}, "
                f"expected {expected[0]} inputs and {expected[1]} outputs"
            )
