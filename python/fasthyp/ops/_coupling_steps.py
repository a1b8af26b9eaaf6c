"""A coupling flow in numbers: what the CPU and the CUDA kernels read.

:func:`fold` computes, in float64, everything that depends on the weights alone: batch norms in eval
mode become part of the linears before them (or a scale and shift where a residual is kept first),
linear layers in a row become one matrix and its inverse, factors on a subnet's output go into its
last weight.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyp.reference.coupling import (
    BatchNorm,
    CouplingLayer,
    Dense,
    Layer,
    LinearLayer,
    Net,
    apply_layer,
)


@dataclass(frozen=True, eq=False)
class FoldedDense:
    """``h = W u (+ W_c c) + b``, then in this order: gate, add, keep, scale and shift, activation.

    Attributes:
        weight: (out, in), without the condition.
        bias: (out,).
        cond_weight: (out, C) over the whole condition; first layers only.
        gate: weight (out, C) and bias (out,): ``h * sigmoid(W c + b)``.
        add: h + what was kept last. keep: keep h.
        norm: scale and shift (out,), after ``keep``.
        activate: the net's activation.
    """

    weight: Tensor
    bias: Tensor
    cond_weight: Tensor | None = None
    gate: tuple[Tensor, Tensor] | None = None
    add: bool = False
    keep: bool = False
    norm: tuple[Tensor, Tensor] | None = None
    activate: bool = False


@dataclass(frozen=True, eq=False)
class FoldedNet:
    layers: tuple[FoldedDense, ...]
    activation: str
    negative_slope: float


@dataclass(frozen=True, eq=False)
class FoldedCoupling:
    """As :class:`~fasthyp.reference.coupling.CouplingLayer`; with two nets, s and t apart."""

    active: tuple[int, ...]
    passive: tuple[int, ...]
    nets: tuple[FoldedNet, ...]
    kind: str
    clamp: float
    clamp_activation: str


@dataclass(frozen=True, eq=False)
class FoldedLinear:
    """``state <- W state + shift`` on the slots as they are; the inverse likewise; float64.

    Weights are (D, D), or (D,) for a diagonal one; ``log_det`` is log|det W|, ().
    """

    weight: Tensor
    shift: Tensor
    inverse_weight: Tensor
    inverse_shift: Tensor
    log_det: Tensor

    @property
    def diagonal(self) -> bool:
        return self.weight.dim() == 1


FoldedStep = FoldedCoupling | FoldedLinear

# Names as the kernels know them (csrc/coupling/coupling.h).
ACTIVATIONS = {"relu": 0, "leaky_relu": 1, "silu": 2, "tanh": 3, "gelu": 4, "gelu_tanh": 5}
CLAMPS = {"none": 0, "atan": 1, "tanh": 2, "sigmoid": 3, "atan_scaled": 4, "tanh_scaled": 5}
KINDS = {"affine": 0, "additive": 1, "gin": 2}


def double_bits(value: float) -> int:
    """A double as the integer with the same bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def bits_double(bits: int) -> float:
    """The inverse of :func:`double_bits`."""
    return struct.unpack("<d", struct.pack("<q", bits))[0]


APART = 256
"""Inputs of a linear above which the batch norm after it is not made part of the weight where the
weight needs a gradient: to scale the sums of the rows then costs less than to scale the weight and
its gradient in every step."""


def fold(
    layers: Sequence[Layer],
    dim: int,
    cond_dim: int,
    dtype: torch.dtype,
    apart: int | None = None,
) -> list[FoldedStep]:
    """The layers in numbers; weights of couplings in ``dtype``.

    Differentiable; the packers call it without gradients. Batch norms behind linears of more than
    ``apart`` inputs stay a scale and shift of their own (None: none do that need not).

    Raises:
        ValueError: a layer has an opaque subnet or a clamp of the user's own, or its tensors do not
            fit together.
    """
    steps: list[FoldedStep] = []
    for i, layer in enumerate(layers):
        name = f"layers[{i}]"
        if isinstance(layer, LinearLayer):
            linear = _linear(layer, dim, name)
            if steps and isinstance(steps[-1], FoldedLinear):
                linear = _compose(steps.pop(), linear)  # type: ignore[arg-type]
            steps.append(linear)
        else:
            steps.append(_coupling(layer, cond_dim, dtype, name, apart))
    return steps


def run_folded(
    steps: Sequence[FoldedStep],
    output_index: Sequence[int],
    x: Tensor,
    cond: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The pass (B, M, D) -> (B, M, D), log-Jacobian (B, M) of the couplings alone, in PyTorch.

    The reference of what trains folded flows: differentiable by all tensors of the steps that this
    direction reads (an inverse pass reads the inverse of a linear step, a forward pass does not).
    """
    slots = torch.tensor(output_index, device=x.device)
    state, log_jac = x, x.new_zeros(x.shape[:-1])
    if inverse:
        state = state.index_select(-1, slots.argsort())
    for step in reversed(steps) if inverse else steps:
        if isinstance(step, FoldedLinear):
            weight, shift = step.weight, step.shift
            if inverse:
                weight, shift = step.inverse_weight, step.inverse_shift
            state = state * weight + shift if step.diagonal else F.linear(state, weight, shift)
        else:
            state, change = apply_layer(_unfold_coupling(step, cond), state, cond, inverse)
            log_jac = log_jac + change
    return (state if inverse else state.index_select(-1, slots)), log_jac


def _unfold_coupling(step: FoldedCoupling, cond: Tensor | None) -> CouplingLayer:
    cond_dim = 0 if cond is None else cond.shape[1]
    nets = []
    for net in step.nets:
        layers = []
        for i, dense in enumerate(net.layers):
            weight, norm = dense.weight, None
            if i == 0 and cond_dim:
                cond_weight = dense.cond_weight
                if cond_weight is None:
                    cond_weight = weight.new_zeros(weight.shape[0], cond_dim)
                weight = torch.cat([weight, cond_weight], 1)
            if dense.norm is not None:
                zeros, ones = (f(dense.bias) for f in (torch.zeros_like, torch.ones_like))
                norm = BatchNorm(zeros, ones, *dense.norm, eps=0.0)
            layers.append(
                Dense(weight, dense.bias, dense.gate, dense.add, dense.keep, norm, dense.activate)
            )
        nets.append(Net(tuple(layers), net.activation, net.negative_slope))
    return CouplingLayer(
        *(step.active, step.passive, tuple(range(cond_dim)), tuple(nets)),
        *(step.kind, step.clamp, step.clamp_activation),
    )


def _coupling(
    layer: CouplingLayer, cond_dim: int, dtype: torch.dtype, name: str, apart: int | None
) -> FoldedCoupling:
    if layer.clamp_fn is not None:
        raise ValueError(f"{name}: expected a known clamp, got a function")
    _check_known(KINDS, layer.kind, "kind")
    _check_known(CLAMPS, layer.clamp_activation, "clamp_activation")
    both = layer.kind != "additive" and len(layer.nets) == 1
    outputs = (2 if both else 1) * len(layer.active)
    nets = []
    for net in layer.nets:
        if not isinstance(net, Net):
            raise ValueError(f"{name}: expected plain subnets, got {type(net).__name__}")
        nets.append(_net(net, layer, cond_dim, dtype, outputs, name, apart))
    return FoldedCoupling(
        *(layer.active, layer.passive, tuple(nets)),
        *(layer.kind, layer.clamp, layer.clamp_activation),
    )


def _check_known(names: dict[str, int], value: str, what: str) -> None:
    if value not in names:
        raise ValueError(f"{what}: expected one of {', '.join(names)}, got {value!r}")


def _net(
    net: Net,
    layer: CouplingLayer,
    cond_dim: int,
    dtype: torch.dtype,
    outputs: int,
    name: str,
    apart: int | None,
) -> FoldedNet:
    _check_known(ACTIVATIONS, net.activation, "activation")
    folded = []
    width, last = len(layer.passive) + len(layer.cond), len(net.layers) - 1
    for i, dense in enumerate(net.layers):
        weight = dense.weight.to(dtype)
        bias = dense.bias
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(dtype)
        if i == 0 and net.inputs is not None:
            weight = weight.index_select(1, torch.tensor(net.inputs, device=weight.device))
        if i == last and net.outputs is not None:
            weight, bias = weight[list(net.outputs)], bias[list(net.outputs)]
        if tuple(weight.shape) != (len(bias), width) or bias.dim() != 1:
            raise ValueError(
                f"{name}: linear {i}: expected a weight (out, {width}) and a bias (out,), "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        norm = None if dense.norm is None else _scale_shift(dense.norm)
        wide = apart is not None and width > apart
        if norm is not None and not (wide or dense.gate or dense.add or dense.keep):
            weight, bias = _scaled(weight, bias, *norm)
            norm = None
        if i == last and layer.raw_scale != 1.0:
            factor = torch.full((), layer.raw_scale, dtype=torch.float64, device=weight.device)
            weight, bias = _scaled(weight, bias, factor.expand(len(bias)), torch.zeros_like(factor))
        cond_weight = gate = None
        if i == 0 and layer.cond:
            # The gradient of a split is one copy; those of two slices would be added up.
            weight, cond_weight = weight.split([len(layer.passive), len(layer.cond)], 1)
            cond_weight = _spread(cond_weight, layer.cond, cond_dim)
        if dense.gate is not None:
            gate_weight, gate_bias = dense.gate
            shift = bias.new_zeros(len(bias)) if gate_bias is None else gate_bias.to(dtype)
            gate = _spread(gate_weight.to(dtype), layer.cond, cond_dim), shift
        if norm is not None:
            norm = norm[0].to(dtype), norm[1].to(dtype)
        folded.append(
            FoldedDense(
                *(weight, bias, cond_weight, gate),
                *(dense.add, dense.keep, norm, dense.activate),
            )
        )
        width = len(bias)
    if width != outputs:
        raise ValueError(f"{name}: expected {outputs} outputs of its subnet, got {width}")
    return FoldedNet(tuple(folded), net.activation, net.negative_slope)


def _spread(weight: Tensor, columns: Sequence[int], cond_dim: int) -> Tensor:
    """The weight of condition columns as one of the whole condition."""
    if tuple(columns) == tuple(range(cond_dim)):
        return weight
    out = weight.new_zeros(weight.shape[0], cond_dim)
    out[:, list(columns)] = weight
    return out


def _scale_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    scale = (norm.variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _scaled(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    scaled = weight.double() * scale[:, None], bias.double() * scale + shift
    return scaled[0].to(weight.dtype), scaled[1].to(bias.dtype)


def _linear(layer: LinearLayer, dim: int, name: str) -> FoldedLinear:
    found = layer.evaluate(*(tensor.double() for tensor in layer.tensors))
    weight, shift = found.weight.double(), found.shift.double()
    expected = (dim,) if layer.diagonal else (dim, dim)
    if tuple(weight.shape) != expected or tuple(shift.shape) != (dim,):
        raise ValueError(
            f"{name}: expected a weight {expected} and a shift ({dim},), "
            f"got {tuple(weight.shape)} and {tuple(shift.shape)}"
        )
    log_det = found.log_det.double().reshape(())
    slots = torch.tensor(layer.slots, device=weight.device)
    back = slots.argsort()
    if layer.diagonal:
        weight, shift = weight[back], shift[back]
        return FoldedLinear(weight, shift, 1 / weight, -shift / weight, log_det)
    inverse = torch.linalg.inv(weight) if found.inverse is None else found.inverse.double()
    # y = W x[slots] + b  and  x[slots] = W^-1 (y - b)
    return FoldedLinear(*(weight[:, back], shift, inverse[back], -(inverse[back] @ shift), log_det))


def _compose(first: FoldedLinear, second: FoldedLinear) -> FoldedLinear:
    """``second`` after ``first``."""
    log_det = first.log_det + second.log_det
    shift = _apply(second.weight, first.shift) + second.shift
    inverse_shift = _apply(first.inverse_weight, second.inverse_shift) + first.inverse_shift
    return FoldedLinear(
        _product(second.weight, first.weight),
        shift,
        _product(first.inverse_weight, second.inverse_weight),
        inverse_shift,
        log_det,
    )


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    return weight * x if weight.dim() == 1 else weight @ x


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices, of which either may be diagonal."""
    if a.dim() == 1:
        return a * b if b.dim() == 1 else a[:, None] * b
    return a * b if b.dim() == 1 else a @ b
