"""Folded flows: what the kernels are given is the flow, and gradients pass through the folding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fasthyp.ops import coupling_training as training
from fasthyp.ops._coupling_plan import describe, parse
from fasthyp.ops._coupling_steps import (
    FoldedCoupling,
    FoldedLinear,
    FoldedStep,
    fold,
    run_folded,
)
from fasthyp.ops.coupling_training import TrainableFlow
from fasthyp.reference import coupling as reference
from fasthyp.reference.coupling import CouplingLayer, Layer, Net
from tests.conftest import max_error
from tests.ops.test_coupling import (
    Random,
    every_step,
    flows,
    leaves_of,
    random_inputs,
    random_layers,
)


def through_the_plan(
    layers: Sequence[Layer], index: Sequence[int], dim: int, cond_dim: int
) -> tuple[list[FoldedStep], tuple[int, ...], Tensor]:
    """Folded, written as a plan and read back; and log|det| of the linear steps."""
    steps = fold(layers, dim, cond_dim, torch.float64)
    numbers, tensors = describe(steps, index, dim, cond_dim, 1, 4)
    read, read_index = parse(numbers, tensors)
    log_det = sum(
        (step.log_det for step in read if isinstance(step, FoldedLinear)), torch.zeros(())
    )
    return read, read_index, log_det


@given(flow=flows())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_folded_flows_are_the_flow(
    flow: tuple[list[Layer], tuple[int, ...], int, int],
) -> None:
    layers, index, dim, cond_dim = flow
    x, cond = random_inputs(2, 3, dim, cond_dim)
    steps, read_index, log_det = through_the_plan(layers, index, dim, cond_dim)
    assert read_index == tuple(index)
    for inverse in (False, True):
        run = reference.flow_inverse if inverse else reference.flow_forward
        want = run(layers, index, x, cond)
        out, log_jac = run_folded(steps, read_index, x, cond, inverse)
        log_jac = log_jac - log_det if inverse else log_jac + log_det
        for value, exact in zip((out, log_jac), want, strict=True):
            assert max_error(value, exact) <= 1e-9 * max(1.0, float(exact.abs().max()))


def running_statistics(layers: Sequence[Layer]) -> set[int]:
    """The tensors of batch norms that have no gradient in PyTorch either."""
    nets = [net for layer in layers if isinstance(layer, CouplingLayer) for net in layer.nets]
    norms = [dense.norm for net in nets if isinstance(net, Net) for dense in net.layers]
    return {id(t) for norm in norms if norm is not None for t in (norm.mean, norm.variance)}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("apart", [training.APART, 4])
def test_gradients_reach_every_tensor_of_the_layers(
    inverse: bool, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "APART", apart)
    layers, index = every_step(9, 4, torch.float64)
    statistics = running_statistics(layers)
    x, cond = random_inputs(3, 5, 9, 4)
    inputs = [x, cond, *(t for t in leaves_of(layers) if id(t) not in statistics)]
    for tensor in inputs:
        tensor.requires_grad_()
    flow = TrainableFlow(layers, index, 9, 4, dtype=torch.float64)
    run = reference.flow_inverse if inverse else reference.flow_forward
    found, exact = (
        torch.autograd.grad(out.square().mean() + log_jac.sin().mean(), inputs, allow_unused=True)
        for out, log_jac in (
            (flow.inverse if inverse else flow.forward)(x, cond),
            run(layers, index, x, cond),
        )
    )
    for gradient, want in zip(found, exact, strict=True):
        assert (gradient is None) == (want is None)
        if want is not None:
            assert max_error(gradient, want) <= 1e-10 * max(1.0, float(want.abs().max()))


def test_a_flow_of_constants_still_has_gradients_by_its_input() -> None:
    layers, index = every_step(9, 4, torch.float64)
    x, cond = random_inputs(3, 5, 9, 4)
    flow = TrainableFlow(layers, index, 9, 4, dtype=torch.float64)
    x.requires_grad_()
    out, log_jac = flow.forward(x, cond)
    (gradient,) = torch.autograd.grad(out.sum() + log_jac.sum(), x)
    want = reference.flow_forward(layers, index, x, cond)
    (exact,) = torch.autograd.grad(want[0].sum() + want[1].sum(), x)
    assert max_error(gradient, exact) <= 1e-11 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("inverse", [False, True])
def test_second_derivatives(inverse: bool) -> None:
    layers, index = every_step(5, 2, torch.float64, hidden=6)
    x, cond = (t.requires_grad_() for t in random_inputs(2, 2, 5, 2))
    flow = TrainableFlow(layers, index, 5, 2, dtype=torch.float64)
    run = flow.inverse if inverse else flow.forward
    assert torch.autograd.gradgradcheck(run, (x, cond), atol=1e-5)


def test_norms_of_wide_linears_stay_apart() -> None:
    layer = Random(9, 4, seed=1).coupling(hidden=24, blocks=1)
    for apart, norms in ((None, 1), (24, 1), (23, 2)):  # the first is behind a kept sum
        (step,) = fold([layer], 9, 4, torch.float64, apart)
        assert isinstance(step, FoldedCoupling)
        assert sum(dense.norm is not None for dense in step.nets[0].layers) == norms


class Weights:
    """A trained flow whose weights change without PyTorch counting it."""

    def __init__(self) -> None:
        layers, index = random_layers(6, 3, hidden=40, count=2)
        self.flow = TrainableFlow(layers, index, 6, 3, dtype=torch.float64)
        self.fresh = lambda: TrainableFlow(layers, index, 6, 3, dtype=torch.float64)
        self.leaves = leaves_of(layers)
        self.x, self.cond = random_inputs(4, 5, 6, 3)
        self.x.requires_grad_()

    def change(self) -> None:
        for tensor in self.leaves:
            tensor.data.mul_(1.1)

    def gradient(self, flow: TrainableFlow) -> Tensor:
        return torch.autograd.grad(flow.forward(self.x, self.cond)[0].square().sum(), self.x)[0]


def test_renewed_flows_have_the_new_weights_in_the_old_memory() -> None:
    weights = Weights()
    before, memory = weights.gradient(weights.flow), weights.flow.packed
    assert memory is not None
    address = memory.data_ptr()
    del memory
    weights.change()
    renewed = weights.flow.renewed()
    assert renewed.packed is not None
    assert renewed.packed.data_ptr() == address
    want = weights.gradient(weights.fresh())
    assert not torch.equal(before, want)
    assert torch.equal(weights.gradient(renewed), want)
    assert torch.equal(weights.gradient(weights.flow), want)  # packs in each call from now on


def test_renewed_flows_leave_passes_alone_that_have_no_gradient_yet() -> None:
    weights = Weights()
    want = weights.gradient(weights.flow)
    loss = weights.flow.forward(weights.x, weights.cond)[0].square().sum()
    weights.change()
    renewed = weights.flow.renewed()
    assert torch.equal(torch.autograd.grad(loss, weights.x)[0], want)
    assert torch.equal(weights.gradient(renewed), weights.gradient(weights.fresh()))
