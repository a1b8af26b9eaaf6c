"""The kernels that train coupling flows, against the folded flow in plain PyTorch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp import _C
from fasthyp.ops._coupling_plan import describe, parse
from fasthyp.ops._coupling_steps import FoldedLinear, fold, run_folded
from fasthyp.ops.coupling_training import coupling_pass, coupling_pass_backward
from fasthyp.reference.coupling import ACTIVATIONS, CLAMP_ACTIVATIONS, Layer
from tests.conftest import assert_as_good_as, max_error
from tests.ops.test_coupling import Random, random_inputs, random_layers

MODES = [(0, False), (1, False), (3, False), (0, True), (2, True)]


@pytest.fixture
def _restored_settings() -> Iterator[None]:
    level, threads = _C.simd_level(), torch.get_num_threads()
    yield
    _C.set_simd_level(level)
    torch.set_num_threads(threads)


class Flow:
    """Layers as the op takes them."""

    def __init__(
        self,
        layers: Sequence[Layer],
        index: Sequence[int],
        dim: int,
        cond_dim: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        element = 1 if dtype == torch.float64 else 0
        steps = fold(layers, dim, cond_dim, torch.float64)
        self.plan, weights = describe(
            steps, index, dim, cond_dim, element, _C.coupling_lanes(element), log_det=False
        )
        self.weights = [weight.detach().to(dtype).contiguous() for weight in weights]
        self.linear = [
            isinstance(step, FoldedLinear) for step in parse(self.plan, self.weights)[0]
        ]

    def run(
        self,
        x: Tensor,
        cond: Tensor | None,
        weights: Sequence[Tensor],
        inverse: bool,
        mode: tuple[int, bool] = (0, False),
    ) -> tuple[Tensor, Tensor]:
        found = coupling_pass(x, cond, list(weights), None, self.plan, inverse, *mode, "highest")
        return found[0], found[1]

    def reference(
        self, x: Tensor, cond: Tensor | None, weights: Sequence[Tensor], inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return run_folded(*parse(self.plan, list(weights)), x, cond, inverse)


def normal(*shape: int, seed: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradients(
    run: Any,
    x: Tensor,
    cond: Tensor | None,
    weights: Sequence[Tensor],
    inverse: bool,
    wanted: Sequence[bool] | None = None,
    log_det: bool = True,
) -> list[Tensor]:
    """Outputs, then the gradients of x, cond and weights, zeros where there is none."""
    wanted = [True] * (len(weights) + 2) if wanted is None else wanted
    parts = [x, *([] if cond is None else [cond]), *weights]
    if cond is None:
        wanted = [wanted[0], *wanted[2:]]
    leaves = [p.detach().clone().requires_grad_(w) for p, w in zip(parts, wanted, strict=True)]
    start = 1 if cond is None else 2
    out, log_jac = run(leaves[0], None if cond is None else leaves[1], leaves[start:], inverse)
    loss = (out * normal(*out.shape).to(out)).sum()
    if log_det:
        loss = loss + (log_jac * normal(*log_jac.shape, seed=3).to(out)).sum()
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [out.detach(), log_jac.detach(), *found]


def assert_equals_reference(
    layers: Sequence[Layer],
    index: Sequence[int],
    x: Tensor,
    cond: Tensor | None,
    modes: Sequence[tuple[int, bool]] = MODES,
    tolerance: float = 1e-12,
    times: float = 2.0,
) -> None:
    """Both directions: to ``tolerance`` in float64, as good as PyTorch in float32."""
    shape = x.shape[-1], 0 if cond is None else cond.shape[1]
    double = Flow(layers, index, *shape)
    single = Flow(layers, index, *shape, dtype=torch.float32)
    given = [w.double() for w in single.weights]
    x32, cond32 = x.float(), None if cond is None else cond.float()
    cond64 = None if cond32 is None else cond32.double()
    for inverse in (False, True):
        want = gradients(double.reference, x, cond, double.weights, inverse)
        exact = gradients(double.reference, x32.double(), cond64, given, inverse)
        peer = gradients(single.reference, x32, cond32, single.weights, inverse)
        for mode in modes:

            def run(flow: Flow, *args: Any, mode: tuple[int, bool] = mode) -> Any:
                return flow.run(*args, mode)

            got = gradients(
                lambda *args: run(double, *args), x, cond, double.weights, inverse
            )
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                assert a.shape == b.shape
                assert a.dtype == torch.float64
                error = max_error(a, b) if a.numel() else 0.0
                limit = tolerance * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
                assert error <= limit, f"{i}: {error} > {limit}, inverse {inverse}, mode {mode}"
            got = gradients(
                lambda *args: run(single, *args), x32, cond32, single.weights, inverse
            )
            for i, (a, near, b) in enumerate(zip(got, peer, exact, strict=True)):
                if a.numel():
                    name = f"{i}, inverse {inverse}, mode {mode}"
                    assert_as_good_as(a, near, b, name, times=times)


# --- gradients equal the reference ------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("clamp_activation", CLAMP_ACTIVATIONS)
def test_activations_and_clamps(activation: str, clamp_activation: str) -> None:
    layers, index = random_layers(
        *(7, 5),
        depth=3,
        activation=activation,
        negative_slope=0.2,
        clamp=1.1,
        clamp_activation=clamp_activation,
    )
    assert_equals_reference(layers, index, *random_inputs(3, 40, 7, 5))


@pytest.mark.parametrize(
    ("batch", "samples", "dim", "cond_dim"),
    [
        (1, 1, 2, 1),
        (1, 1, 48, 56),
        (3, 7, 39, 17),
        (2, 1000, 13, 0),
        (130, 1, 48, 56),
        (33, 31, 20, 3),
        (1, 1500, 16, 8),
        (5, 64, 1, 4),
        (2, 17, 132, 64),
        (1, 1, 3, 0),
    ],
)
def test_shapes(batch: int, samples: int, dim: int, cond_dim: int) -> None:
    layers, index = random_layers(dim, cond_dim)
    assert_equals_reference(layers, index, *random_inputs(batch, samples, dim, cond_dim))
