"""nflows front end: its flows as programs, and their classes fused.

nflows' modules are known by class name, package and attributes; nflows itself is not needed. Both
the upstream package and the fork that ProHMR uses (nkolot/nflows) are described: they differ in
what a residual net does with the context, which its layers show.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyp.flows.executor import FlowExecutor
from fasthyp.flows.fused import FusedFlow, adopted
from fasthyp.flows.parts import act_norm, computes_as, require_inactive, require_plain
from fasthyp.flows.program import (
    AdditiveKind,
    AffineKind,
    Coupling,
    FlowProgram,
    Linear,
    Opaque,
    Permute,
    ResidualBlock,
    ResidualMLP,
    Step,
    UninitializedFlow,
    UnsupportedFlow,
    Watch,
)
from fasthyp.reference.coupling import LinearMap

_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.gelu: "gelu",
}


def is_a(module: object, name: str) -> bool:
    """Whether a module is an instance of nflows' class of this name, or of this package's."""
    return any(
        cls.__name__ == name and cls.__module__.startswith(("nflows.", "fasthyp.flows."))
        for cls in type(module).__mro__
    )


def knows(module: object) -> bool:
    """Whether :func:`describe` is the one for this module."""
    return any(is_a(module, name) for name in ("Flow", "ConditionalGlow", "CompositeTransform"))


def describe(module: Any) -> FlowProgram:
    """The program of an nflows ``Flow`` or ``CompositeTransform``.

    Raises:
        UnsupportedFlow: the base is no standard normal, the context is embedded, or the transform
            is not a chain of ActNorm, LULinear, permutations and couplings with residual nets.
    """
    if is_a(module, "CompositeTransform"):
        return program(module)
    if not is_a(module, "Flow"):  # this package's ConditionalGlow
        return program(module._transform)
    if not is_a(module._distribution, "StandardNormal"):
        kind = type(module._distribution).__name__
        raise UnsupportedFlow(f"its base distribution is a {kind}, not a StandardNormal")
    if type(module._embedding_net) is not nn.Identity:
        raise UnsupportedFlow("it has an embedding net for the context")
    return program(module._transform)


def program(transform: nn.Module) -> FlowProgram:
    """The program of a transform; UnsupportedFlow where there is none."""
    watch = Watch()
    steps: list[Step] = []
    widths: set[int] = set()  # of the context
    dims: set[int] = set()
    _add(transform, "", steps, dims, widths, watch)
    if len(dims) != 1 or len(widths) > 1:
        raise UnsupportedFlow(f"its transforms have features {dims} and context features {widths}")
    (dim,) = dims
    return FlowProgram(dim, [width for width in widths if width], steps, watch)


def _add(
    transform: Any, name: str, steps: list[Step], dims: set[int], widths: set[int], watch: Watch
) -> None:
    """Append the steps of a transform, its features and those of the context that it reads."""
    what = name or type(transform).__name__
    if not computes_as(transform, "nflows", "forward", "inverse"):
        raise UnsupportedFlow(f"{what} has a forward or an inverse of its own")
    require_plain(transform, what)
    watch.module(transform)
    if is_a(transform, "CompositeTransform"):
        watch.module(transform._transforms)
        for i, part in enumerate(transform._transforms):
            prefix = f"{name}." if name else ""
            _add(part, f"{prefix}_transforms.{i}", steps, dims, widths, watch)
    elif is_a(transform, "ActNorm"):
        dims.add(len(transform.shift))
        steps.append(_act_norm(transform, name, watch))
    elif is_a(transform, "LULinear"):
        dims.add(transform.features)
        steps.append(_lu_linear(transform, name, watch))
    elif is_a(transform, "Permutation"):
        if transform._dim != 1:
            raise UnsupportedFlow(f"{what} permutes dimension {transform._dim}")
        dims.add(len(transform._permutation))
        steps.append(Permute(transform._permutation, name=name))
    elif is_a(transform, "AffineCouplingTransform") or is_a(transform, "AdditiveCouplingTransform"):
        dims.add(transform.features)
        steps.append(_coupling(transform, name, widths, watch))
    else:
        raise UnsupportedFlow(f"{what} is a {type(transform).__name__}, which has no fused form")


def _act_norm(transform: Any, name: str, watch: Watch) -> Linear:
    watch.attributes(transform, "training")
    watch.values(transform.initialized)
    if transform.training and not transform.initialized:
        raise UninitializedFlow(f"{name} is an ActNorm that its first batch will initialise")
    return act_norm(transform.log_scale, transform.shift, name)


def _lu_linear(transform: Any, name: str, watch: Watch) -> Linear:
    watch.attributes(transform, "eps")
    tensors = (
        transform.lower_entries,
        transform.upper_entries,
        transform.unconstrained_upper_diag,
        transform.bias,
    )
    return Linear(tensors, partial(lu_map, transform.eps), name=name)


def lu_factors(lower: Tensor, upper: Tensor, diagonal: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Entries row by row -> L with a unit diagonal, U with the diagonal softplus + eps."""
    size = len(diagonal)
    unit = torch.eye(size, dtype=diagonal.dtype, device=diagonal.device)
    below = torch.tril_indices(size, size, -1, device=diagonal.device).unbind()
    above = torch.triu_indices(size, size, 1, device=diagonal.device).unbind()
    return (
        unit.index_put(below, lower),
        torch.diag_embed(F.softplus(diagonal) + eps).index_put(above, upper),
    )


def lu_map(eps: float, lower: Tensor, upper: Tensor, diagonal: Tensor, bias: Tensor) -> LinearMap:
    """``y = L U x + bias``."""
    left, right = lu_factors(lower, upper, diagonal, eps)
    return LinearMap(left @ right, bias, right.diagonal().log().sum())


# --- couplings --------------------------------------------------------------------------------


def _coupling(transform: Any, name: str, widths: set[int], watch: Watch) -> Coupling:
    if transform.unconditional_transform is not None:
        raise UnsupportedFlow(f"{name} transforms the identity features too")
    couples = ("_scale_and_shift", "_coupling_transform_forward", "_coupling_transform_inverse")
    if not computes_as(transform, "nflows", *couples):
        raise UnsupportedFlow(f"{name} has couplings of its own")
    watch.values(transform.identity_features, transform.transform_features)
    active = tuple(transform.transform_features.tolist())
    passive = tuple(transform.identity_features.tolist())
    net = transform.transform_net
    name = f"{name}.transform_net" if name else "transform_net"
    if not is_a(net, "ResidualNet"):
        raise UnsupportedFlow(f"{name} is a {type(net).__name__}, not a ResidualNet")
    width = net.context_features or 0
    widths.add(width)
    cond, size = tuple(range(width)), len(active)
    try:
        subnet: ResidualMLP | Opaque = _residual(net, watch)
    except UnsupportedFlow as error:
        subnet = Opaque(net, str(error), partial(_rows, net, len(passive)))
    if is_a(transform, "AdditiveCouplingTransform"):
        return Coupling(active, passive, subnet, AdditiveKind(), cond, name)
    # The net says [t | scale], and the scale is that of an activation: s is its logarithm.
    watch.attributes(transform, "scale_activation")
    log_scale = partial(_log_scale, getattr(transform, "scale_activation", _sigmoid_scale))
    kind = AffineKind(1.0, clamp_fn=log_scale)
    if isinstance(subnet, Opaque):
        subnet = Opaque(net, subnet.reason, partial(_rows, net, len(passive), swap=size))
        return Coupling(active, passive, subnet, kind, cond, name)
    outputs = (*range(size, 2 * size), *range(size))
    return Coupling(active, passive, subnet, kind, cond, name, outputs=outputs)


def _rows(net: nn.Module, split: int, rows: Tensor, swap: int = 0) -> Tensor:
    """Rows [passive, cond] through a net that takes the two apart; ``swap`` puts the outputs from
    there on first."""
    context = rows[:, split:] if rows.shape[1] > split else None
    out = net(rows[:, :split], context)
    return torch.cat([out[:, swap:], out[:, :swap]], 1) if swap else out


def _sigmoid_scale(u: Tensor) -> Tensor:
    return torch.sigmoid(u + 2) + 1e-3


def _log_scale(activation: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    return activation(u).log()


def _residual(net: Any, watch: Watch) -> ResidualMLP:
    """A ResidualNet in eval mode; UnsupportedFlow where it must run as the module it is."""
    if not computes_as(net, "nflows", "forward"):
        raise UnsupportedFlow("it has a forward of its own")
    blocks, activations = [], set()
    for name, part in (("it", net), ("blocks", net.blocks)):
        require_plain(part, name)
        watch.module(part)
    for i, block in enumerate(net.blocks):
        name = f"blocks.{i}"
        if not (is_a(block, "ResidualBlock") and computes_as(block, "nflows", "forward")):
            raise UnsupportedFlow(f"{name} is a {type(block).__name__}")
        watch.attributes(block, "activation", "use_batch_norm")
        parts: list[Any] = [block, block.linear_layers, block.dropout]
        norms: list[Any] = [None, None]
        if block.use_batch_norm:
            norms = list(block.batch_norm_layers)
            parts.append(block.batch_norm_layers)
        for part in parts:
            require_plain(part, name)
            watch.module(part)
        require_inactive(block.dropout, f"{name}.dropout", watch)
        for norm in norms:
            _require_running(norm, f"{name}.batch_norm_layers", watch)
        activations.add(_ACTIVATIONS.get(block.activation))
        gate = getattr(block, "context_layer", None)
        first, second = _linears(block.linear_layers, name)
        blocks.append(ResidualBlock(first, second, norms[0], norms[1], gate))
        if gate is not None:
            _linears([gate], name)
    activation = activations.pop() if len(activations) == 1 else None
    if activation is None:
        raise UnsupportedFlow("its blocks have no single known activation")
    initial, final = _linears([net.initial_layer, net.final_layer], "it")
    return ResidualMLP(initial, tuple(blocks), final, activation)


def _linears(modules: Any, name: str) -> list[nn.Linear]:
    for module in modules:
        if type(module) is not nn.Linear:
            raise UnsupportedFlow(f"{name} has a {type(module).__name__} for a Linear")
        require_plain(module, name)
    return list(modules)


def _require_running(norm: Any, name: str, watch: Watch) -> None:
    """UnsupportedFlow for a batch norm that uses the statistics of its batch."""
    if norm is None:
        return
    if type(norm) is not nn.BatchNorm1d:
        raise UnsupportedFlow(f"{name} holds a {type(norm).__name__}")
    require_plain(norm, name)
    watch.attributes(norm, "training", "eps")
    if norm.training or norm.running_mean is None:
        raise UnsupportedFlow(f"{name} are batch norms in training mode")


# --- fused classes ----------------------------------------------------------------------------


class FusedTransform(FusedFlow):
    """The methods of a fused ``CompositeTransform``."""

    inverse: Callable[..., tuple[Tensor, Tensor]]

    def _describe(self) -> FlowProgram:
        return program(self)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """inputs (N, D), context (N, C) -> outputs (N, D), log|det| (N,)."""
        fused = self._fused_rows(inputs, context, rev=False)
        return super().forward(inputs, context) if fused is None else fused

    def inverse(  # type: ignore[no-redef]
        self, inputs: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """inputs (N, D), context (N, C) -> outputs (N, D), log|det| (N,) of the inverse."""
        fused = self._fused_rows(inputs, context, rev=True)
        return super().inverse(inputs, context) if fused is None else fused  # type: ignore[misc]

    def _fused_rows(
        self, inputs: Tensor, context: Tensor | None, rev: bool
    ) -> tuple[Tensor, Tensor] | None:
        if not self._delegates() and isinstance(inputs, Tensor) and inputs.dim() == 2:
            try:
                if (context is not None) == bool(self._dims()[1]):
                    conditions = [] if context is None else [context]
                    return self._run_rows(inputs, conditions, rev, ("inputs", "context"))
            except UnsupportedFlow:
                pass
        return None

    def inverse_shared(self, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """noise (B, M, D), of which M share a row of the context (B, C) -> outputs (B, M, D),
        log|det| (B, M) of the inverse."""
        if not self._delegates():
            try:
                if (context is not None) == bool(self._dims()[1]):
                    return self._pass(noise, context, rev=True)
            except UnsupportedFlow:
                pass
        rows = None if context is None else context.repeat_interleave(noise.shape[1], 0)
        outputs, log_jac = self.inverse(noise.flatten(0, 1), rows)
        return outputs.reshape(noise.shape), log_jac.reshape(noise.shape[:2])


class FusedSampling(FusedFlow):
    """The methods of a fused ``Flow``: what its transform makes of many samples of one context.

    Everything else is as nflows defines it, on the fused transform.
    """

    _transform: Any
    _distribution: Any
    _embedding_net: Any

    def flow(self) -> FlowExecutor:
        return self._transform.flow()

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        if context is None:
            return super()._sample(num_samples, context)  # type: ignore[misc]
        embedded = self._embedding_net(context)
        noise = self._distribution.sample(num_samples, context=embedded)
        return self._transform.inverse_shared(noise, embedded)[0]

    def sample_and_log_prob(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        plain = super().sample_and_log_prob  # type: ignore[misc]
        signature = inspect.signature(plain)
        given = signature.bind(*args, **kwargs).arguments
        context, takes_noise = given.get("context"), "noise" in signature.parameters  # the fork
        if context is None or given.get("noise") is not None or given.get("ignore_context"):
            return plain(*args, **kwargs)
        embedded = self._embedding_net(context)
        noise, log_prob = self._distribution.sample_and_log_prob(
            given["num_samples"], context=embedded
        )
        samples, log_jac = self._transform.inverse_shared(noise, embedded)
        drawn = samples, log_prob - log_jac
        return (*drawn, noise.flatten(0, 1)) if takes_noise else drawn


def fused_class(module: Any) -> Any:
    """The fused class for an object of nflows; None where there is none."""
    kind: Any = type(module)
    if isinstance(module, FusedFlow):
        return None
    if is_a(module, "CompositeTransform") and computes_as(module, "nflows", "forward", "inverse"):
        return adopted(kind, FusedTransform)
    if (
        is_a(module, "Flow")
        and is_a(module._transform, "CompositeTransform")
        and computes_as(module, "nflows", "_sample", "sample_and_log_prob")
    ):
        return adopted(kind, FusedSampling)
    return None
