"""Coupling flows on CUDA: packing, and what the ops of :mod:`fasthyp.ops.coupling` run there.

A flow is packed as weights in the order in which warps read them, and the list of launches that run
it in each direction (``csrc/coupling/cuda.h``).

Weights lie in units: 16 outputs by one k-step of 16 (bfloat16) or 8 (float32) inputs, as the tensor
cores' operands, 16 bytes for each lane of a warp. Everything here works on the weights' own device.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasthyp import _C
from fasthyp.ops._coupling_checks import check_cond, check_dtype, check_sample
from fasthyp.ops._coupling_steps import (
    ACTIVATIONS,
    CLAMPS,
    KINDS,
    FoldedCoupling,
    FoldedDense,
    FoldedLinear,
    FoldedNet,
    FoldedStep,
    double_bits,
)
from fasthyp.ops._library import address, contiguous, current_stream

PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
"""Products of float32 numbers as three of tf32 halves; of tf32 numbers; of bfloat16 numbers."""

_FUSED, _HEAD, _TAIL, _SINGLE = range(4)
_OP = (
    *("kind", "form", "slots", "count", "steps", "blocks", "hoisted", "weight", "bias", "columns"),
    *("raw", "shift", "hidden", "kept", "norm", "activation", "slope", "mode"),
    *("clamp_kind", "clamp"),
)
_OPERATIONS = {"net": 0, "couple": 1, "linear": 2}
_COLUMNS = 48  # outputs of a last layer that a warp holds at a time
_UNIT_BYTES = 512
_ALIGN = 64
_SCRATCH_BYTES = 256 << 20
"""Memory for what a round of rows needs between launches; more rows go in several rounds."""


class UnsupportedOnCuda(ValueError):
    """A flow that the CUDA kernels do not run; the message says why."""


def pack(
    steps: Sequence[FoldedStep],
    output_index: Sequence[int],
    dim: int,
    cond_dim: int,
    precision: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The plan (int64, on the CPU) and the packed weights (uint8, on ``device``).

    Raises:
        UnsupportedOnCuda: a subnet is of a form that the kernels do not have, or the flow too wide
            for the device's shared memory.
    """
    plan, packed = _Packer(dim, cond_dim, PRECISIONS[precision], device).pack(steps, output_index)
    if device.type == "cuda" and not _C.coupling_cuda_fits(
        plan.data_ptr(), len(plan), packed.device.index
    ):
        raise UnsupportedOnCuda(f"a flow of {dim} dims needs more shared memory than {device} has")
    return plan, packed


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _float_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


@dataclass
class _Net:
    """Where the packed parts of a subnet lie."""

    form: int  # fused, single, or head: then tail and products follow
    hoisted: int
    steps: int
    blocks: int
    weight: int
    outputs: int
    bias: int
    activation: int
    slope: int
    kept: bool = False
    norm: int = -1
    activate: bool = True
    tail_weight: int = 0
    tail_blocks: int = 0
    products: list[list[int]] = field(default_factory=list)  # numbers but for the buffers


class _Packer:
    def __init__(self, dim: int, cond_dim: int, precision: int, device: torch.device) -> None:
        self.dim, self.cond_dim, self.precision, self.device = dim, cond_dim, precision, device
        self.k_steps = 1 if precision == PRECISIONS["medium"] else 2  # per 16 inputs
        self.pieces: list[Tensor] = []
        self.bytes = 0
        self.hoist: list[tuple[Tensor | None, Tensor]] = []  # weight over the condition, bias
        self.hoisted = 0
        self.hidden = self.steps = self.raw = 0
        self.buffers = self.kept_buffers = 0
        self.units = 1

    def pack(
        self, steps: Sequence[FoldedStep], output_index: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        nets = {
            id(net): self.net(net, len(step.passive))
            for step in steps
            if isinstance(step, FoldedCoupling)
            for net in step.nets
        }
        output = self.add(torch.tensor(output_index, dtype=torch.int32))
        launches = [self.direction(steps, nets, inverse) for inverse in (False, True)]
        weight, bias = self.hoist_operands()
        linears = [step for step in steps if isinstance(step, FoldedLinear)]
        log_det = float(sum(float(step.log_det) for step in linears))
        numbers = [
            *(self.bytes, self.dim, self.cond_dim, _up(self.cond_dim, 4), self.precision),
            *(self.hoisted, weight, bias, self.hidden, self.buffers, self.kept_buffers),
            *(self.raw, self.steps, self.units),
            *(int(any(not step.diagonal for step in linears)), output, _SCRATCH_BYTES),
            double_bits(log_det),
        ]
        for direction in launches:
            numbers += [len(direction), *(n for launch in direction for n in launch)]
        return torch.tensor(numbers, dtype=torch.int64), torch.cat(self.pieces)

    # --- the buffer ---

    def add(self, tensor: Tensor) -> int:
        """Appends the numbers of a tensor; where they begin, in bytes."""
        at = self.bytes
        flat = tensor.to(self.device).contiguous().flatten().view(torch.uint8)
        flat = pad(flat, (0, _up(flat.numel(), _ALIGN) - flat.numel()))
        self.pieces.append(flat)
        self.bytes += flat.numel()
        return at

    def floats(self, *vectors: Tensor, to: int = 16) -> int:
        """Appends float32 vectors, each padded with zeros to a multiple of ``to``."""
        return self.add(torch.cat([pad(v.float(), (0, _up(len(v), to) - len(v))) for v in vectors]))

    def as_units(self, weight: Tensor, outputs: int, inputs: int, precision: int) -> Tensor:
        """A weight padded to multiples of 16, as (outputs / 16, k-steps, bytes of a unit)."""
        w = pad(weight.float(), (0, inputs - weight.shape[1], 0, outputs - weight.shape[0]))
        # outputs: 16, B tile, lane / 4; inputs: 16, half, lane % 4, the two of a lane
        w = w.reshape(outputs // 16, 2, 8, inputs // 16, 2, 4, 2)
        if precision == PRECISIONS["medium"]:
            w = w.permute(0, 3, 2, 5, 1, 4, 6).to(torch.bfloat16)
            return w.reshape(outputs // 16, inputs // 16, 256).view(torch.uint8)
        w = w.permute(0, 3, 4, 2, 5, 1, 6).reshape(outputs // 16, inputs // 8, 128).contiguous()
        if precision == PRECISIONS["high"]:  # to nearest, ties away from zero
            w = ((w.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return w.view(torch.uint8)

    # --- subnets ---

    def net(self, net: FoldedNet, passive: int) -> _Net:
        first, last = net.layers[0], net.layers[-1]
        if last.gate or last.add or last.keep or last.norm or last.activate or first.gate:
            raise UnsupportedOnCuda("a subnet ends or begins in a way that the kernels do not know")
        outputs = len(last.bias)
        reads_cond = first.cond_weight is not None
        slope, activation = _float_bits(net.negative_slope), ACTIVATIONS[net.activation]
        inputs = _up(passive, 16)
        if len(net.layers) == 1:
            hoisted = self.hoist_layer(first) if reads_cond else -1
            steps = inputs // 16 * self.k_steps
            self.steps = max(self.steps, steps)
            weight = self.last_layer(first.weight, inputs)
            bias = self.floats(first.bias)
            return _Net(*(_SINGLE, hoisted, steps, inputs // 16, weight, outputs, bias, -1, slope))
        steps = -(-passive * self.k_steps // 16)
        self.steps = max(self.steps, _up(steps, self.k_steps))
        hoisted = self.hoist_layer(first)
        hidden = _up(len(first.bias), 16)
        units = self.as_units(first.weight, hidden, inputs, self.precision)[:, :steps]
        bias = self.floats(last.bias)
        common = (hoisted, steps, hidden // 16)
        plain = first.activate and not (first.keep or first.norm)
        if len(net.layers) == 2 and plain and outputs <= _COLUMNS:
            after = self.grouped(last.weight, hidden)[0].reshape(hidden // 16, -1, _UNIT_BYTES)
            both = torch.cat([units, after], 1)
            self.units = max(self.units, both.shape[1])
            return _Net(_FUSED, *common, self.add(both), outputs, bias, activation, slope)
        self.units = max(self.units, steps)
        self.hidden = max(self.hidden, hidden)
        packed = _Net(
            *(_HEAD, *common, self.add(units), outputs, bias, activation, slope),
            kept=first.keep,
            norm=-1 if first.norm is None else self.floats(*first.norm),
            activate=first.activate,
        )
        for layer in net.layers[1:-1]:
            packed.products.append(self.product(layer, hidden, net, slope))
            hidden = _up(len(layer.bias), 16)
            self.hidden = max(self.hidden, hidden)
        packed.tail_weight = self.last_layer(last.weight, hidden)
        packed.tail_blocks = hidden // 16
        return packed

    def grouped(self, weight: Tensor, inputs: int) -> Tensor:
        """A last layer's units: (groups of 48 outputs, inputs / 16, k-steps of 16, 3, unit)."""
        groups = -(-weight.shape[0] // _COLUMNS)
        units = self.as_units(weight, groups * _COLUMNS, inputs, self.precision)
        units = units.reshape(groups, 3, inputs // 16, self.k_steps, _UNIT_BYTES)
        return units.permute(0, 2, 3, 1, 4)

    def last_layer(self, weight: Tensor, inputs: int) -> int:
        self.units = max(self.units, 3 * self.k_steps)
        return self.add(self.grouped(weight, inputs))

    def product(self, layer: FoldedDense, inputs: int, net: FoldedNet, slope: int) -> list[int]:
        outputs = _up(len(layer.bias), 16)
        units = self.as_units(layer.weight, outputs, inputs, self.precision)
        gate = -1
        if layer.gate is not None:
            gate = self.hoist_sums(*layer.gate)
        return [
            *(self.add(units), self.floats(layer.bias), inputs // 16, outputs, inputs),
            *(int(layer.add), int(layer.keep)),
            *(-1 if layer.norm is None else self.floats(*layer.norm), gate),
            *(ACTIVATIONS[net.activation] if layer.activate else -1, slope),
        ]

    # --- the condition's part ---

    def hoist_layer(self, layer: FoldedDense) -> int:
        return self.hoist_sums(layer.cond_weight, layer.bias)

    def hoist_sums(self, weight: Tensor | None, bias: Tensor) -> int:
        """The column at which the sums of these outputs begin."""
        at = self.hoisted
        self.hoist.append((weight, bias))
        self.hoisted += _up(len(bias), 16)
        return at

    def hoist_operands(self) -> tuple[int, int]:
        if not self.hoist:
            return 0, 0
        bias = self.floats(*(bias for _, bias in self.hoist))
        if not self.cond_dim:
            return 0, bias
        inputs = _up(self.cond_dim, 16)
        # bfloat16 flows hoist in tf32: it costs little, and an error here is in every hypothesis
        precision = min(self.precision, PRECISIONS["high"])
        at = self.bytes
        for weight, bias_part in self.hoist:
            if weight is None:
                weight = bias_part.new_zeros(len(bias_part), self.cond_dim)
            self.add(self.as_units(weight, _up(len(bias_part), 16), inputs, precision))
        return at, bias

    # --- launches ---

    def direction(
        self, steps: Sequence[FoldedStep], nets: dict[int, _Net], inverse: bool
    ) -> list[list[int]]:
        launches: list[list[int]] = []
        ops = _Operations()
        for step in reversed(steps) if inverse else steps:
            if isinstance(step, FoldedLinear):
                ops.linear(*self.linear(step, inverse), diagonal=step.diagonal)
                continue
            parts = [nets[id(net)] for net in step.nets]
            size = len(step.active)
            places = [0] if len(parts) == 1 else [0, size]
            self.raw = max(self.raw, sum(part.outputs for part in parts))
            deep = [i for i, part in enumerate(parts) if part.form == _HEAD]
            for i in deep:
                ops.net(parts[i], step.passive, hidden=2 * i, kept=i if parts[i].kept else -1)
            if deep:
                launches.append(self.rows(ops))
                ops = _Operations()
            for i, (part, place) in enumerate(zip(parts, places, strict=True)):
                if part.form != _HEAD:
                    ops.net(part, step.passive, raw=place)
                    continue
                buffer = 2 * i
                keeps = part.kept or any(numbers[6] for numbers in part.products)
                for numbers in part.products:
                    kept = i if numbers[5] or numbers[6] else -1
                    other = buffer ^ 1
                    launches.append([1, *numbers[:5], buffer, other, kept, *numbers[5:]])
                    buffer = other
                self.buffers = max(self.buffers, 2 * i + (2 if part.products else 1))
                self.kept_buffers = max(self.kept_buffers, i + 1 if keeps else 0)
                ops.tail(part, raw=place, hidden=buffer)
            shift = 0 if step.kind == "additive" else size
            ops.couple(step, shift)
        launches.append(self.rows(ops))
        return launches

    def linear(self, step: FoldedLinear, inverse: bool) -> tuple[int, int]:
        weight = step.inverse_weight if inverse else step.weight
        shift = step.inverse_shift if inverse else step.shift
        return self.add(weight.float() if step.diagonal else weight.T.float()), self.floats(shift)

    def rows(self, ops: _Operations) -> list[int]:
        ints = ops.ints()
        return [0, self.add(torch.tensor(ints, dtype=torch.int32)), len(ints), len(ops.records)]


class _Operations:
    """The operations of one rows launch."""

    def __init__(self) -> None:
        self.records: list[dict[str, int]] = []
        self.lists: list[int] = []

    def ints(self) -> list[int]:
        start = len(self.records) * len(_OP)
        numbers = []
        for record in self.records:
            full = {"hoisted": -1, "kept": -1, "norm": -1, "activation": -1, **record}
            full["slots"] = full.get("slots", 0) + start
            numbers += [full.get(name, 0) for name in _OP]
        return numbers + self.lists

    def _slots(self, slots: Sequence[int], to: int = 1) -> int:
        at = len(self.lists)
        self.lists += [*slots, *[-1] * (_up(len(slots), to) - len(slots))]
        return at

    def _add(self, kind: str, **fields: int) -> None:
        self.records.append({"kind": _OPERATIONS[kind], **fields})

    def net(
        self, net: _Net, passive: Sequence[int], raw: int = 0, hidden: int = 0, kept: int = -1
    ) -> None:
        self._add(
            "net",
            form=net.form,
            slots=self._slots(passive, 16),
            steps=net.steps,
            blocks=net.blocks,
            hoisted=net.hoisted,
            weight=net.weight // 16,
            bias=net.bias // 16,
            columns=net.outputs,
            raw=raw,
            hidden=hidden,
            kept=kept,
            norm=net.norm // 16 if net.norm >= 0 else -1,
            activation=net.activation if net.activate else -1,
            slope=net.slope,
        )

    def tail(self, net: _Net, raw: int, hidden: int) -> None:
        self._add(
            "net",
            form=_TAIL,
            blocks=net.tail_blocks,
            weight=net.tail_weight // 16,
            bias=net.bias // 16,
            columns=net.outputs,
            raw=raw,
            hidden=hidden,
        )

    def couple(self, step: FoldedCoupling, shift: int) -> None:
        self._add(
            "couple",
            slots=self._slots(step.active),
            count=len(step.active),
            shift=shift,
            mode=KINDS[step.kind],
            clamp_kind=CLAMPS[step.clamp_activation],
            clamp=_float_bits(step.clamp),
        )

    def linear(self, weight: int, shift: int, diagonal: bool) -> None:
        self._add("linear", weight=weight // 16, bias=shift // 16, mode=int(diagonal))


# --- ops ---


def flow(
    x: Tensor, cond: Tensor | None, packed: Tensor, plan: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """x (B, M, D), cond (B, C) -> out (B, M, D), log-Jacobian (B, M)."""
    dim = _check(plan, packed)
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x: expected shape (B, M, {dim}), got {tuple(x.shape)}")
    check_dtype("x", x, torch.float32)
    check_cond(cond, x.shape[0], int(plan[2]), torch.float32)
    _check_device(packed, x=x, cond=cond)
    if cond is not None and x.shape[1] == 1 and x.shape[0] > 1 and cond.stride(0) == 0:
        # one condition expanded over all rows is one image
        flat, log_det = flow(x.transpose(0, 1), cond[:1], packed, plan, inverse)
        return flat.transpose(0, 1).contiguous(), log_det.transpose(0, 1).contiguous()
    return _run(plan, packed, inverse, x, cond, x.new_empty(x.shape))


def sample(
    cond: Tensor | None,
    fixed: Tensor | None,
    packed: Tensor,
    plan: Tensor,
    batch: int,
    num_samples: int,
    seed: int,
    image_offset: int,
    first_sample: int,
    include_mode: bool,
    counter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Draws latents and inverts them: x (B, M, D), log-density (B, M)."""
    dim = _check(plan, packed)
    check_cond(cond, batch, int(plan[2]), torch.float32)
    _check_device(packed, cond=cond)
    check_sample(batch, num_samples, first_sample, fixed, counter, dim, torch.float32)
    _check_device(packed, fixed=fixed, counter=counter)
    out = torch.empty(batch, num_samples, dim, device=packed.device)
    return _run(
        *(plan, packed, True, None, cond, out),
        seed=seed,
        image_offset=image_offset,
        first_sample=first_sample,
        counter=counter,
        fixed=fixed,
        include_mode=include_mode,
    )


def _check(plan: Tensor, packed: Tensor) -> int:
    """D, if these can be a plan and packed weights."""
    if (
        plan.device.type != "cpu"
        or plan.dtype != torch.int64
        or plan.dim() != 1
        or not plan.is_contiguous()
        or len(plan) < 4
    ):
        raise ValueError("plan: expected a contiguous one-dimensional int64 tensor on the CPU")
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.data_ptr() % _ALIGN:
        raise ValueError(f"packed: expected a contiguous, {_ALIGN}-byte aligned uint8 tensor")
    return int(plan[1])


def _check_device(packed: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(
                f"{name}: expected on {packed.device}, as the flow, got it on {tensor.device}"
            )


def _run(
    plan: Tensor,
    packed: Tensor,
    inverse: bool,
    x: Tensor | None,
    cond: Tensor | None,
    out: Tensor,
    seed: int = 0,
    image_offset: int = 0,
    first_sample: int = 0,
    counter: Tensor | None = None,
    fixed: Tensor | None = None,
    include_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    out = out.contiguous()
    log_det = out.new_empty(out.shape[:2])
    if cond is not None and cond.shape[1] % 4:  # rows are copied 16 bytes at a time
        cond = pad(cond, (0, -cond.shape[1] % 4))
    x, cond, fixed = contiguous(x), contiguous(cond), contiguous(fixed)
    batch, samples, _ = out.shape
    size = _C.coupling_cuda_workspace(plan.data_ptr(), len(plan), batch, samples)
    workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
    device = out.device.index
    _C.coupling_cuda_run(
        *(plan.data_ptr(), len(plan), packed.data_ptr(), packed.numel(), inverse, batch, samples),
        *(address(x), address(cond), out.data_ptr(), log_det.data_ptr()),
        *(workspace.data_ptr(), size, seed % 2**64, image_offset, first_sample),
        *(address(counter), address(fixed), 0 if fixed is None else fixed.shape[1], include_mode),
        *(device, current_stream(device)),
    )
    return out, log_det
