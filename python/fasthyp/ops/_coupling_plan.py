"""The plan of a flow: its structure as integers, beside a list of its numbers.

The layout is documented in ``csrc/coupling/coupling.h``; :func:`describe` writes it, :func:`parse`
reads it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fasthyp.ops._coupling_steps import (
    ACTIVATIONS,
    CLAMPS,
    KINDS,
    FoldedCoupling,
    FoldedDense,
    FoldedLinear,
    FoldedNet,
    FoldedStep,
    bits_double,
    double_bits,
)


def describe(
    steps: Sequence[FoldedStep],
    output_index: Sequence[int],
    dim: int,
    cond_dim: int,
    element: int,
    lanes: int,
    log_det: bool = True,
) -> tuple[list[int], list[Tensor]]:
    """The plan, and the tensors in its order.

    Without ``log_det`` the plan says 0 for log|det W| of the linear steps, whose values then are
    not read.
    """
    numbers = [dim, cond_dim, element, lanes, len(steps), *output_index]
    for step in steps:
        if isinstance(step, FoldedCoupling):
            numbers += _describe_coupling(step)
        else:
            value = float(step.log_det) if log_det else 0.0
            numbers += [1, int(step.diagonal), double_bits(value)]
    return numbers, step_tensors(steps)


def step_tensors(steps: Sequence[FoldedStep]) -> list[Tensor]:
    """The tensors of the steps, in the order of the plan."""
    tensors: list[Tensor] = []
    for step in steps:
        if isinstance(step, FoldedLinear):
            tensors += [step.weight, step.shift, step.inverse_weight, step.inverse_shift]
            continue
        for net in step.nets:
            for layer in net.layers:
                tensors.append(layer.weight)
                if layer.cond_weight is not None:
                    tensors.append(layer.cond_weight)
                tensors += [layer.bias, *(layer.gate or ()), *(layer.norm or ())]
    return tensors


def _describe_coupling(step: FoldedCoupling) -> list[int]:
    numbers = [
        *(0, len(step.active), len(step.passive), KINDS[step.kind]),
        *(CLAMPS[step.clamp_activation], double_bits(step.clamp), len(step.nets)),
        *(*step.active, *step.passive),
    ]
    for net in step.nets:
        numbers += [len(net.layers), ACTIVATIONS[net.activation], double_bits(net.negative_slope)]
        for layer in net.layers:
            parts = (layer.cond_weight, layer.gate, layer.add, layer.keep, layer.norm)
            numbers.append(len(layer.bias))
            numbers += [int(part is not None and part is not False) for part in parts]
            numbers.append(int(layer.activate))
    return numbers


def parse(
    numbers: Sequence[int], tensors: Sequence[Tensor]
) -> tuple[list[FoldedStep], tuple[int, ...]]:
    """The steps, and the output index, of what :func:`describe` gave."""
    numbers_left, tensors_left = iter(numbers), iter(tensors)
    dim, _, _, _, count = (next(numbers_left) for _ in range(5))
    output_index = tuple(next(numbers_left) for _ in range(dim))
    steps: list[FoldedStep] = []
    for _ in range(count):
        if next(numbers_left):
            next(numbers_left)  # whether it is diagonal: the weight says so too
            log_det = bits_double(next(numbers_left))
            weight, shift, inverse, inverse_shift = (next(tensors_left) for _ in range(4))
            constant = weight.new_full((), log_det)
            steps.append(FoldedLinear(weight, shift, inverse, inverse_shift, constant))
        else:
            steps.append(_parse_coupling(numbers_left, tensors_left))
    return steps, output_index


def _parse_coupling(numbers: Iterator[int], tensors: Iterator[Tensor]) -> FoldedCoupling:
    active, passive = next(numbers), next(numbers)
    kind, clamp_activation = _name(KINDS, next(numbers)), _name(CLAMPS, next(numbers))
    clamp, nets = bits_double(next(numbers)), next(numbers)
    active_slots = tuple(next(numbers) for _ in range(active))
    passive_slots = tuple(next(numbers) for _ in range(passive))
    return FoldedCoupling(
        *(active_slots, passive_slots),
        tuple(_parse_net(numbers, tensors) for _ in range(nets)),
        kind,
        clamp,
        clamp_activation,
    )


def _parse_net(numbers: Iterator[int], tensors: Iterator[Tensor]) -> FoldedNet:
    count, activation = next(numbers), _name(ACTIVATIONS, next(numbers))
    slope = bits_double(next(numbers))
    layers = []
    for _ in range(count):
        next(numbers)  # outputs: the bias says so too
        cond, gate, add, keep, norm, activate = (bool(next(numbers)) for _ in range(6))
        weight = next(tensors)
        cond_weight = next(tensors) if cond else None
        bias = next(tensors)
        layers.append(
            FoldedDense(
                *(weight, bias, cond_weight),
                gate=(next(tensors), next(tensors)) if gate else None,
                add=add,
                keep=keep,
                norm=(next(tensors), next(tensors)) if norm else None,
                activate=activate,
            )
        )
    return FoldedNet(tuple(layers), activation, slope)


def _name(names: dict[str, int], code: int) -> str:
    return next(name for name, known in names.items() if known == code)
