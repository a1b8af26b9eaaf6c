"""Coupling flows in plain, differentiable PyTorch: the oracle of the fused kernels.

A flow is a list of layers over a state (B, M, D) with a condition (B, C): B images, M hypotheses of
each. A :class:`CouplingLayer` changes some slots of the state with the help of the others and of
the condition, a :class:`LinearLayer` mixes all of them. Permutations are folded into the slots, so
the state is never reordered (see :meth:`fasthyp.flows.FlowProgram.layers`). The condition's part of
a subnet's first layer, W_c c + b, is computed once per image and not once per hypothesis.

Everything here works for any floating dtype and device, under ``vmap`` and for second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyp.reference.philox import philox4x32

ACTIVATIONS = ("relu", "leaky_relu", "silu", "tanh", "gelu", "gelu_tanh")
CLAMP_ACTIVATIONS = ("atan", "tanh", "sigmoid", "atan_scaled", "tanh_scaled", "none")
KINDS = ("affine", "additive", "gin")


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """``nn.BatchNorm1d`` in eval mode."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, eq=False)
class Dense:
    """A Linear of a subnet, and what its output h goes through, in this order.

    Attributes:
        weight: (out, in); of a net's first layer, in = [passive, cond].
        bias: (out,).
        gate: weight (out, |cond|) and bias of h * sigmoid(W c + b).
        add: h + what was kept last.
        keep: keep h (before ``norm`` and the activation) for the next ``add``.
        norm: batch norm.
        activate: the net's activation.
    """

    weight: Tensor
    bias: Tensor | None = None
    gate: tuple[Tensor, Tensor | None] | None = None
    add: bool = False
    keep: bool = False
    norm: BatchNorm | None = None
    activate: bool = False


@dataclass(frozen=True, eq=False)
class Net:
    """A subnet: Linear layers with one activation (of ``ACTIVATIONS``), residual or not.

    ``inputs`` chooses the columns of the first weight that meet [passive, cond], ``outputs`` the
    rows of the last; None: all. ``negative_slope`` is that of ``leaky_relu``.
    """

    layers: tuple[Dense, ...]
    activation: str = "relu"
    negative_slope: float = 0.01
    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None


def mlp(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Net:
    """A plain MLP: the activation between the linears, none after the last."""
    last = len(weights) - 1
    layers = [
        Dense(weight, bias, activate=i < last)
        for i, (weight, bias) in enumerate(zip_longest(weights, biases))
    ]
    return Net(tuple(layers), activation, negative_slope)


@dataclass(frozen=True, eq=False)
class CouplingLayer:
    """One half-coupling: the slots ``active`` change by what the subnets say of the others.

    The subnets take rows [passive, cond] and give raw [s | t]; with two of them, s and t apart.

    - ``affine``: ``x <- x * exp(s) + t``, s softly clamped;
    - ``gin``: the same with ``s - mean(s)``, which keeps the volume;
    - ``additive``: ``x <- x + t``, raw = t.

    Attributes:
        active: state slots that change.
        passive: state slots read, in the order of the subnets' first inputs.
        cond: columns of the concatenated condition, read after them.
        nets: one subnet or two, each a :class:`Net` or any callable from rows to rows.
        kind: one of ``KINDS``.
        clamp: ``s = clamp * f(raw)``.
        clamp_activation: f, one of ``CLAMP_ACTIVATIONS``: ``atan`` 0.636 atan(u), ``tanh``,
            ``sigmoid`` 2 (sigmoid(u) - 0.5), ``atan_scaled`` 0.636 atan(u / clamp) (FrEIA before
            0.2), ``tanh_scaled`` tanh(u / clamp) (AllInOneBlock after 0.2), ``none`` (``s = raw``).
        clamp_fn: a user's own f.
        raw_scale: what raw is multiplied with first (AllInOneBlock: 0.1).
    """

    active: tuple[int, ...]
    passive: tuple[int, ...]
    cond: tuple[int, ...] = ()
    nets: tuple[Net | Callable[[Tensor], Tensor], ...] = ()
    kind: str = "affine"
    clamp: float = 2.0
    clamp_activation: str = "atan"
    clamp_fn: Callable[[Tensor], Tensor] | None = None
    raw_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``y = W x + shift``: weight (D, D), or (D,) for a diagonal W; log|det W|; W^-1 if known."""

    weight: Tensor
    shift: Tensor
    log_det: Tensor
    inverse: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """Applies ``evaluate(*tensors)``, a :class:`LinearMap`, to the slots in the order ``slots``.

    The result of a diagonal map stays in these slots; that of a dense one fills 0..D-1.
    """

    slots: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    evaluate: Callable[..., LinearMap]
    diagonal: bool = False


Layer = CouplingLayer | LinearLayer


def flow_forward(
    layers: Sequence[Layer],
    output_index: Sequence[int],
    x: Tensor,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Data x (B, M, D), condition (B, C) -> z (B, M, D), log|det dz/dx| (B, M).

    ``z[..., k] = state[..., output_index[k]]`` after the last layer.
    """
    state, log_jac = x, x.new_zeros(x.shape[:-1])
    for layer in layers:
        state, change = apply_layer(layer, state, cond)
        log_jac = log_jac + change
    return _select(state, tuple(output_index)), log_jac


def flow_inverse(
    layers: Sequence[Layer],
    output_index: Sequence[int],
    z: Tensor,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Latent z (B, M, D), condition (B, C) -> x (B, M, D), log|det dx/dz| (B, M)."""
    state = _select(z, _inverse(tuple(output_index)))
    log_jac = z.new_zeros(z.shape[:-1])
    for layer in reversed(layers):
        state, change = apply_layer(layer, state, cond, inverse=True)
        log_jac = log_jac + change
    return state, log_jac


def apply_layer(
    layer: Layer, state: Tensor, cond: Tensor | None, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """One layer, in either direction -> new state, log-Jacobian (B, M) or ()."""
    if isinstance(layer, LinearLayer):
        return linear(state, layer, inverse)
    return couple(state, subnet(layer, state, cond), layer, inverse)


def subnet(layer: CouplingLayer, state: Tensor, cond: Tensor | None) -> Tensor:
    """What the layer's subnets say about a state (B, M, D): raw (B, M, outputs)."""
    passive = _select(state, layer.passive)
    columns = None
    if layer.cond:
        assert cond is not None
        columns = _select(cond, layer.cond)
    raw = [
        _net(net, passive, columns) if isinstance(net, Net) else _rows(net, passive, columns)
        for net in layer.nets
    ]
    return raw[0] if len(raw) == 1 else torch.cat(raw, -1)


def _rows(net: Callable[[Tensor], Tensor], passive: Tensor, columns: Tensor | None) -> Tensor:
    rows = _join(passive, columns)
    out = net(rows.reshape(-1, rows.shape[-1]))
    return out.reshape(*passive.shape[:-1], out.shape[-1])


def _join(passive: Tensor, columns: Tensor | None) -> Tensor:
    if columns is None:
        return passive
    return torch.cat([passive, columns[:, None].expand(-1, passive.shape[1], -1)], -1)


def _net(net: Net, passive: Tensor, columns: Tensor | None) -> Tensor:
    hidden, kept, last = passive, None, len(net.layers) - 1
    for i, layer in enumerate(net.layers):
        weight, bias = layer.weight, layer.bias
        if i == 0 and net.inputs is not None:
            weight = _select(weight, net.inputs)
        if i == last and net.outputs is not None:
            weight = _select(weight.mT, net.outputs).mT
            bias = None if bias is None else _select(bias, net.outputs)
        if i > 0 or columns is None:
            hidden = F.linear(hidden, weight, bias)
        # One product of [passive, cond] where there is nothing to share: a single hypothesis per
        # image, which then rounds exactly as the code that is replaced.
        elif passive.shape[1] == 1:
            hidden = F.linear(_join(passive, columns), weight, bias)
        else:
            split = passive.shape[-1]
            per_image = F.linear(columns, weight[:, split:], bias)
            hidden = F.linear(passive, weight[:, :split]) + per_image[:, None]
        if layer.gate is not None:
            assert columns is not None
            hidden = hidden * torch.sigmoid(F.linear(columns, *layer.gate))[:, None]
        if layer.add:
            assert kept is not None
            hidden = kept + hidden
        if layer.keep:
            kept = hidden
        if layer.norm is not None:
            hidden = _batch_norm(hidden, layer.norm)
        if layer.activate:
            hidden = _activate(hidden, net)
    return hidden


def _batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = F.batch_norm(rows, norm.mean, norm.variance, norm.weight, norm.bias, False, 0.0, norm.eps)
    return out.reshape(x.shape)


def couple(
    state: Tensor, raw: Tensor, layer: CouplingLayer, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply raw (..., outputs of the subnets) to a state (..., D) -> new state, log_jac (...).

    The log-Jacobian is that of the direction taken: sum(s), or -sum(s) for the inverse.
    """
    size = len(layer.active)
    if layer.raw_scale != 1.0:
        raw = layer.raw_scale * raw
    active = _select(state, layer.active)
    if layer.kind == "additive":
        changed = active - raw if inverse else active + raw
        log_jac = state.new_zeros(state.shape[:-1])
    else:
        s, t = log_scale(raw[..., :size], layer), raw[..., size:]
        if layer.kind == "gin":
            s = s - s.mean(-1, keepdim=True)
            log_jac = state.new_zeros(state.shape[:-1])
        else:
            log_jac = -s.sum(-1) if inverse else s.sum(-1)
        changed = (active - t) * torch.exp(-s) if inverse else active * torch.exp(s) + t
    dtype = torch.promote_types(state.dtype, changed.dtype)  # they differ under autocast
    index = _index(layer.active, state.device)
    return state.to(dtype).index_copy(-1, index, changed.to(dtype)), log_jac


def linear(state: Tensor, layer: LinearLayer, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Apply a linear layer to a state (..., D) -> new state, log|det| () of the direction taken."""
    m = layer.evaluate(*layer.tensors)
    back = _inverse(layer.slots)
    if layer.diagonal:
        scale, shift = _select(m.weight, back), _select(m.shift, back)
        if inverse:
            return (state - shift) / scale, -m.log_det
        return state * scale + shift, m.log_det
    if not inverse:
        return F.linear(_select(state, layer.slots), m.weight, m.shift), m.log_det
    centred = state - m.shift
    if m.inverse is not None:
        x = F.linear(centred, m.inverse)
    else:
        flat = centred.reshape(-1, centred.shape[-1])
        x = torch.linalg.solve(m.weight, flat.mT).mT.reshape(centred.shape)
    return _select(x, back), -m.log_det


def log_scale(raw: Tensor, layer: CouplingLayer) -> Tensor:
    """The soft clamp, raw -> s; constants of FrEIA (0.636, not 2/pi)."""
    if layer.clamp_fn is not None:
        return layer.clamp * layer.clamp_fn(raw)
    kind = layer.clamp_activation
    if kind == "atan":
        return layer.clamp * (0.636 * torch.atan(raw))
    if kind == "tanh":
        return layer.clamp * torch.tanh(raw)
    if kind == "sigmoid":
        return layer.clamp * (2.0 * (torch.sigmoid(raw) - 0.5))
    if kind == "atan_scaled":
        return layer.clamp * 0.636 * torch.atan(raw / layer.clamp)
    if kind == "tanh_scaled":
        return layer.clamp * torch.tanh(raw / layer.clamp)
    if kind == "none":
        return raw
    raise ValueError(f"clamp_activation: expected one of {CLAMP_ACTIVATIONS}, got {kind!r}")


def _activate(x: Tensor, net: Net) -> Tensor:
    kind = net.activation
    if kind == "relu":
        return F.relu(x)
    if kind == "leaky_relu":
        return F.leaky_relu(x, net.negative_slope)
    if kind == "silu":
        return F.silu(x)
    if kind == "tanh":
        return torch.tanh(x)
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {kind!r}")


def _select(state: Tensor, slots: tuple[int, ...]) -> Tensor:
    """state[..., slots], a view where the slots follow one another."""
    if slots and slots == tuple(range(slots[0], slots[0] + len(slots))):
        return state.narrow(-1, slots[0], len(slots))
    return state.index_select(-1, _index(slots, state.device))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of a permutation."""
    position = [0] * len(order)
    for k, slot in enumerate(order):
        position[slot] = k
    return tuple(position)


def _index(slots: tuple[int, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(slots, dtype=torch.long, device=device)
    return _cached_index(slots, device)


@lru_cache(maxsize=4096)
def _cached_index(slots: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used with autograd later
        return torch.tensor(slots, dtype=torch.long, device=device)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, 1) over the last dimension: (..., D) -> (...)."""
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2.0 * math.pi)


def philox_normal(
    batch: int,
    num_samples: int,
    dim: int,
    seed: int,
    image_offset: int = 0,
    include_mode: bool = False,
    first_sample: int = 0,
) -> Tensor:
    """Standard normal numbers (batch, num_samples, dim), float32, each fixed by its place alone.

    Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
    counter (dim // 4, hypothesis, image_offset + image, 0) and key ``seed``, then Box-Muller on the
    pairs of words. ``include_mode`` makes hypothesis 0 of every image zero. The first hypothesis
    has the number ``first_sample``.
    """
    groups = -(-dim // 4)
    counters = np.meshgrid(
        np.arange(image_offset, image_offset + batch, dtype=np.uint64),
        np.arange(first_sample, first_sample + num_samples, dtype=np.uint64),
        np.arange(groups, dtype=np.uint64),
        indexing="ij",
    )
    words = philox4x32([counters[2], counters[1], counters[0], np.zeros_like(counters[0])], seed)
    normals = []
    for a, b in (words[:2], words[2:]):
        radius = np.sqrt(-2.0 * np.log((a.astype(np.float64) + 0.5) / 2.0**32))
        angle = 2.0 * np.pi * (b.astype(np.float64) / 2.0**32)
        normals += [radius * np.cos(angle), radius * np.sin(angle)]
    values = np.stack(normals, -1).reshape(batch, num_samples, 4 * groups)[..., :dim]
    if include_mode and first_sample == 0:
        values[:, :1] = 0.0
    return torch.from_numpy(values.astype(np.float32))
