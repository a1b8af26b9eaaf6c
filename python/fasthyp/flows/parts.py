"""What the front ends share: whether a module is what its class says, and its subnets as MLPs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fasthyp.flows.program import MLP, Linear, Opaque, UnsupportedFlow, Watch, has_hooks
from fasthyp.reference.coupling import LinearMap


def computes_as(module: nn.Module, package: str, *methods: str) -> bool:
    """Whether these methods, where the module has them, are ``package``'s or this package's."""
    owners = (f"{package}.", "fasthyp.flows.")
    found = (getattr(type(module), name, None) for name in methods)
    return not any(name in vars(module) for name in methods) and all(
        method is None or method.__module__.startswith(owners) for method in found
    )


def require_plain(module: nn.Module, name: str) -> None:
    """UnsupportedFlow for a module that calls more than its class's ``forward``."""
    if has_hooks(module):
        raise UnsupportedFlow(f"{name} has hooks")
    if "forward" in module.__dict__:
        raise UnsupportedFlow(f"{name} has a forward of its own")


def act_norm(log_scale: Tensor, shift: Tensor, name: str) -> Linear:
    """``x * exp(log_scale) + shift``."""
    return Linear((log_scale, shift), _act_norm, diagonal=True, name=name)


def _act_norm(log_scale: Tensor, shift: Tensor) -> LinearMap:
    return LinearMap(log_scale.exp().reshape(-1), shift.reshape(-1), log_scale.sum())


def subnet(module: nn.Module, watch: Watch, ending: str | None = None) -> MLP | Opaque:
    """An MLP where the module is nothing but Linear layers with one kind of activation between
    them (inactive dropout and Identity do not count), an Opaque with the reason otherwise.

    With ``ending`` the module must end with that activation, which is left out of the MLP.
    """
    try:
        return _mlp(module, watch, ending)
    except UnsupportedFlow as error:
        return Opaque(module, str(error))


def _mlp(module: nn.Module, watch: Watch, ending: str | None) -> MLP:
    linears: list[nn.Linear] = []
    activations: list[tuple[str, float]] = []
    for name, part in _flatten(module, "", watch):
        kind = type(part)
        if kind is nn.Identity:
            continue
        if kind is nn.Dropout:
            require_inactive(part, name, watch)
        elif kind is nn.Linear:
            if len(activations) != len(linears):
                raise UnsupportedFlow(f"{name} is a Linear right after another")
            linears.append(part)
        else:
            activation = _activation(part, name, watch)
            if len(activations) + 1 != len(linears):
                raise UnsupportedFlow(f"{name} is not between two Linear layers")
            activations.append(activation)
    if ending is not None and len(activations) == len(linears):
        last = activations.pop()[0]
        if last != ending:
            raise UnsupportedFlow(f"it ends with {last}, not with {ending}")
    elif ending is not None:
        raise UnsupportedFlow(f"it does not end with {ending}")
    if len(activations) + 1 != len(linears):
        raise UnsupportedFlow("it does not end with a Linear layer")
    if len(set(activations)) > 1:
        raise UnsupportedFlow("it has different activations")
    return MLP(tuple(linears), *(activations[0] if activations else ()))


def require_inactive(dropout: nn.Dropout, name: str, watch: Watch) -> None:
    """UnsupportedFlow for a dropout that drops."""
    watch.attributes(dropout, "training", "p")
    if dropout.training and dropout.p > 0:
        raise UnsupportedFlow(f"{name} is a Dropout in training mode")


def _flatten(module: Any, name: str, watch: Watch) -> Iterable[tuple[str, Any]]:
    require_plain(module, name or "it")
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
