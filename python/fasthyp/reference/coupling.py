"""Coupling flows in plain, differentiable PyTorch: the oracle of the fused kernels.

A flow is a list of :class:`CouplingLayer`, each changing some slots of a state (B, M, D) with the
help of the others and of a condition (B, C): B images, M hypotheses of each. Permutations between
the couplings are folded into the slots, so the state is never reordered (see
:meth:`fasthyp.flows.FlowProgram.layers`). The condition's part of a subnet's first layer,
W_c c + b, is computed once per image and not once per hypothesis.

Everything here works for any floating dtype and device, under ``vmap`` and for second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "leaky_relu", "silu", "tanh", "gelu", "gelu_tanh")
CLAMP_ACTIVATIONS = ("atan", "tanh", "sigmoid", "atan_scaled", "none")


@dataclass(frozen=True, eq=False)
class CouplingLayer:
    """One affine half-coupling: ``x_a <- x_a * exp(s) + t``, ``[s | t] = subnet(x_p, cond)``.

    Attributes:
        active: state slots that change.
        passive: state slots read by the subnet, in the order of its first inputs.
        cond: columns of the concatenated condition, read after them.
        weights: Linear weights (out, in) of the subnet; the first takes
            ``len(passive) + len(cond)`` numbers, the last gives ``2 * len(active)``.
        biases: their biases.
        activation: between the linears, one of ``ACTIVATIONS``.
        negative_slope: of ``leaky_relu``.
        clamp: ``s = clamp * f(raw)``.
        clamp_activation: f, one of ``CLAMP_ACTIVATIONS``: ``atan`` 0.636 atan(u), ``tanh``,
            ``sigmoid`` 2 (sigmoid(u) - 0.5), ``atan_scaled`` 0.636 atan(u / clamp) (FrEIA before
            0.2), ``none`` (``s = raw``).
        module: a subnet that is no plain MLP, called with rows (N, inputs); ``weights`` is then
            empty.
        clamp_fn: a user's own f.
    """

    active: tuple[int, ...]
    passive: tuple[int, ...]
    cond: tuple[int, ...] = ()
    weights: tuple[Tensor, ...] = ()
    biases: tuple[Tensor | None, ...] = ()
    activation: str = "relu"
    negative_slope: float = 0.01
    clamp: float = 2.0
    clamp_activation: str = "atan"
    module: Callable[[Tensor], Tensor] | None = None
    clamp_fn: Callable[[Tensor], Tensor] | None = None


def flow_forward(
    layers: Sequence[CouplingLayer],
    output_index: Sequence[int],
    x: Tensor,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Data x (B, M, D), condition (B, C) -> z (B, M, D), log|det dz/dx| (B, M).

    ``z[..., k] = state[..., output_index[k]]`` after the last layer.
    """
    state, log_jac = x, x.new_zeros(x.shape[:-1])
    for layer in layers:
        state, change = affine_coupling(state, subnet(layer, state, cond), layer)
        log_jac = log_jac + change
    return _select(state, tuple(output_index)), log_jac


def flow_inverse(
    layers: Sequence[CouplingLayer],
    output_index: Sequence[int],
    z: Tensor,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Latent z (B, M, D), condition (B, C) -> x (B, M, D), log|det dx/dz| (B, M)."""
    position = [0] * len(output_index)
    for k, slot in enumerate(output_index):
        position[slot] = k
    state = _select(z, tuple(position))
    log_jac = z.new_zeros(z.shape[:-1])
    for layer in reversed(layers):
        state, change = affine_coupling(state, subnet(layer, state, cond), layer, inverse=True)
        log_jac = log_jac + change
    return state, log_jac


def subnet(layer: CouplingLayer, state: Tensor, cond: Tensor | None) -> Tensor:
    """What the layer's subnet says about a state (B, M, D): raw [s | t], (B, M, 2 * active)."""
    passive = _select(state, layer.passive)
    split, columns = len(layer.passive), None
    if layer.cond:
        assert cond is not None
        columns = _select(cond, layer.cond)
    # One product of [passive, cond] where there is nothing to share: an opaque subnet, or a single
    # hypothesis per image, which then rounds exactly as the code that is replaced.
    if columns is not None and (layer.module is not None or state.shape[1] == 1):
        repeated = columns[:, None].expand(-1, passive.shape[1], -1)
        passive, columns = torch.cat([passive, repeated], -1), None
    if layer.module is not None:
        rows = layer.module(passive.reshape(-1, passive.shape[-1]))
        return rows.reshape(*state.shape[:-1], rows.shape[-1])

    weight, bias = layer.weights[0], layer.biases[0]
    if columns is None:
        hidden = F.linear(passive, weight, bias)
    else:
        per_image = F.linear(columns, weight[:, split:], bias)
        hidden = F.linear(passive, weight[:, :split]) + per_image[:, None]
    for weight, bias in zip(layer.weights[1:], layer.biases[1:], strict=True):
        hidden = F.linear(_activate(hidden, layer), weight, bias)
    return hidden


def affine_coupling(
    state: Tensor, raw: Tensor, layer: CouplingLayer, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply raw [s | t] (..., 2 * active) to a state (..., D) -> new state, log_jac (...).

    The log-Jacobian is that of the direction taken: sum(s), or -sum(s) for the inverse.
    """
    size = len(layer.active)
    s, t = log_scale(raw[..., :size], layer), raw[..., size:]
    active = _select(state, layer.active)
    changed = (active - t) * torch.exp(-s) if inverse else active * torch.exp(s) + t
    dtype = torch.promote_types(state.dtype, changed.dtype)  # they differ under autocast
    index = _index(layer.active, state.device)
    state = state.to(dtype).index_copy(-1, index, changed.to(dtype))
    return state, -s.sum(-1) if inverse else s.sum(-1)


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
    if kind == "none":
        return raw
    raise ValueError(f"clamp_activation: expected one of {CLAMP_ACTIVATIONS}, got {kind!r}")


def _activate(x: Tensor, layer: CouplingLayer) -> Tensor:
    kind = layer.activation
    if kind == "relu":
        return F.relu(x)
    if kind == "leaky_relu":
        return F.leaky_relu(x, layer.negative_slope)
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
) -> Tensor:
    """Standard normal numbers (batch, num_samples, dim), float32, each fixed by its place alone.

    Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
    counter (dim // 4, hypothesis, image_offset + image, 0) and key ``seed``, then Box-Muller on the
    pairs of words. ``include_mode`` makes hypothesis 0 of every image zero.
    """
    groups = -(-dim // 4)
    counters = np.meshgrid(
        np.arange(image_offset, image_offset + batch, dtype=np.uint64),
        np.arange(num_samples, dtype=np.uint64),
        np.arange(groups, dtype=np.uint64),
        indexing="ij",
    )
    words = _philox4x32([counters[2], counters[1], counters[0], np.zeros_like(counters[0])], seed)
    normals = []
    for a, b in (words[:2], words[2:]):
        radius = np.sqrt(-2.0 * np.log((a.astype(np.float64) + 0.5) / 2.0**32))
        angle = 2.0 * np.pi * (b.astype(np.float64) / 2.0**32)
        normals += [radius * np.cos(angle), radius * np.sin(angle)]
    values = np.stack(normals, -1).reshape(batch, num_samples, 4 * groups)[..., :dim]
    if include_mode:
        values[:, :1] = 0.0
    return torch.from_numpy(values.astype(np.float32))


def _philox4x32(counter: list[np.ndarray], seed: int) -> list[np.ndarray]:
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * counter[0]
        p1 = np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (p1 >> shift) ^ counter[1] ^ np.uint64(key[0]),
            p1 & mask,
            (p0 >> shift) ^ counter[3] ^ np.uint64(key[1]),
            p0 & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter
