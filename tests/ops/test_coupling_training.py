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
        self.linear = [isinstance(step, FoldedLinear) for step in parse(self.plan, self.weights)[0]]

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
    times: float = 6.0,
    single_modes: Sequence[tuple[int, bool]] | None = None,
) -> None:
    """Both directions: to ``tolerance`` in float64, about as good as PyTorch in float32 (whose
    largest error over a few numbers may be lucky; see :func:`test_float32_of_a_real_flow`)."""
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

            got = gradients(lambda *args: run(double, *args), x, cond, double.weights, inverse)
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                assert a.shape == b.shape
                assert a.dtype == torch.float64
                error = max_error(a, b) if a.numel() else 0.0
                limit = tolerance * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
                assert error <= limit, f"{i}: {error} > {limit}, inverse {inverse}, mode {mode}"
            if single_modes is not None and mode not in single_modes:
                continue
            got = gradients(lambda *args: run(single, *args), x32, cond32, single.weights, inverse)
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


@pytest.mark.parametrize("kind", ["affine", "additive", "gin"])
@pytest.mark.parametrize("nets", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("gate", [False, True])
def test_residual_nets(kind: str, nets: int, activation: str, gate: bool) -> None:
    random = Random(9, 6, seed=3)
    layers: list[Layer] = [random.linear()]
    for residual in (True, False):
        layers.append(
            random.coupling(kind, nets, residual=residual, gate=gate, activation=activation)
        )
    layers.append(random.diagonal())
    # some slots neither change nor are read
    layers.append(random.coupling(kind, nets, active=3, passive=2, gate=gate, blocks=1))
    layers += [random.linear(), random.coupling(kind, nets, active=2, norm=False)]
    inputs = random_inputs(3, 37, 9, 6)
    # Their scales make the states of such nets ill-conditioned: float32 needs kept states.
    assert_equals_reference(layers, random.order(), *inputs, single_modes=[(1, False)])


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("hidden", [5, 200, 333])
def test_depths(depth: int, hidden: int) -> None:
    layers, index = random_layers(17, 4, depth=depth, hidden=hidden, count=2)
    assert_equals_reference(layers, index, *random_inputs(2, 150, 17, 4), [(0, False), (0, True)])


@pytest.mark.parametrize("order", ["repeated", "interleaved", "distinct"])
@pytest.mark.parametrize("gate", [False, True])
def test_one_row_per_image(order: str, gate: bool) -> None:
    """The form of FrEIA's callers: M = 1, each image's condition once per hypothesis."""
    random = Random(9, 6, seed=4)
    layers = [random.coupling(gate=gate), random.coupling(residual=False)]
    rows = 210
    x, cond = random_inputs(rows, 1, 9, 6)
    assert cond is not None
    if order == "repeated":
        cond = cond[:7].repeat_interleave(30, 0)
    elif order == "interleaved":
        cond = cond[:7].repeat(30, 1)
    assert_equals_reference(layers, random.order(), x, cond, [(0, False), (1, False), (0, True)])


@pytest.mark.parametrize("repeated", [False, True])
def test_conditions_in_parts(repeated: bool) -> None:
    """More hoisted sums than are held at a time."""
    # smooth: a ReLU's gradient jumps where float32 rounds its input across zero
    layers, index = random_layers(6, 3, hidden=1500, count=2, activation="silu")
    x, cond = random_inputs(*((6000, 1) if repeated else (1500, 4)), 6, 3)
    assert cond is not None
    if repeated:
        cond = cond[:1500].repeat(4, 1)
    assert_equals_reference(layers, index, x, cond, [(0, False)])


# --- a condition for each row: it is read by row ----------------------------------------------


@pytest.mark.parametrize(
    ("batch", "samples", "dim", "cond_dim", "hidden", "depth"),
    [
        (101, 1, 7, 5, 33, 2),
        (1, 1, 9, 3, 20, 2),
        (97, 1, 13, 131, 70, 3),  # more than one chunk of inputs
        (259, 1, 5, 1, 17, 1),
        (61, 1, 11, 19, 333, 2),
        (45, 1, 6, 257, 40, 2),  # too wide: hoisted
        (45, 2, 6, 37, 130, 2),  # hoisted
        (5, 1, 1, 4, 12, 2),
    ],
)
def test_condition_per_row(
    batch: int, samples: int, dim: int, cond_dim: int, hidden: int, depth: int
) -> None:
    layers, index = random_layers(dim, cond_dim, hidden=hidden, depth=depth, activation="silu")
    assert_equals_reference(layers, index, *random_inputs(batch, samples, dim, cond_dim))


@pytest.mark.parametrize("kind", ["affine", "additive", "gin"])
@pytest.mark.parametrize("nets", [1, 2])
def test_residual_nets_by_row(kind: str, nets: int) -> None:
    random = Random(9, 6, seed=3)
    layers: list[Layer] = [
        random.linear(),
        random.coupling(kind, nets, activation="gelu"),
        random.coupling(kind, nets, residual=False),
        random.diagonal(),
        random.coupling(kind, nets, active=3, passive=2, blocks=1),
    ]
    inputs = random_inputs(111, 1, 9, 6)
    assert_equals_reference(layers, random.order(), *inputs, single_modes=[(1, False)])


@pytest.mark.parametrize("distinct", [101, 102])  # of 203 rows: at least 2 each, or fewer
@pytest.mark.parametrize("mode", MODES)
def test_mixtures_of_repeated_rows(distinct: int, mode: tuple[int, bool]) -> None:
    layers, index = random_layers(9, 6, hidden=40, activation="silu")
    x, cond = random_inputs(203, 1, 9, 6)
    assert cond is not None
    cond = cond[:distinct].repeat(3, 1)[:203]
    assert_equals_reference(layers, index, x, cond, [mode])


def test_no_passive_slots_by_row() -> None:
    random = Random(3, 4, seed=5)
    layers = [random.coupling(active=3, residual=residual) for residual in (True, False)]
    assert_equals_reference(layers, random.order(), *random_inputs(70, 1, 3, 4))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("cond_dim", [6, 131])
def test_units_by_row_have_the_bits_of_hoisted_ones(inverse: bool, cond_dim: int) -> None:
    """The pass of few rows that stores layers reads conditions by row, that of images does not."""
    random = Random(9, cond_dim, seed=3)
    layers: list[Layer] = [random.coupling(residual=False), random.coupling(hidden=77)]
    flow = Flow(layers, random.order(), 9, cond_dim, torch.float32)
    x, cond = random_inputs(90, 1, 9, cond_dim, torch.float32)
    assert cond is not None
    for mode in MODES[3:]:
        args = flow.weights, None, flow.plan, inverse, *mode, "highest"
        by_row = coupling_pass(x, cond, *args)
        hoisted = coupling_pass(x.expand(90, 2, 9).contiguous(), cond, *args)
        for a, b in zip(by_row, hoisted, strict=True):
            assert torch.equal(a[:, 0], b[:, 0])


def test_no_passive_slots() -> None:
    random = Random(3, 4, seed=5)
    layers = [random.coupling(active=3, residual=residual) for residual in (True, False)]
    assert_equals_reference(layers, random.order(), *random_inputs(4, 30, 3, 4))


@pytest.mark.parametrize("mode", MODES)
def test_float32_of_a_real_flow(mode: tuple[int, bool]) -> None:
    layers, index = random_layers(48, 56, hidden=256, count=8, clamp=0.5, activation="silu")
    x, cond = random_inputs(16, 25, 48, 56)
    assert_equals_reference(layers, index, x, cond, [mode], tolerance=1e-11, times=2.0)


def test_sums_of_many_rows() -> None:
    layers, index = random_layers(6, 3, count=1)
    assert_equals_reference(layers, index, *random_inputs(5, 4000, 6, 3), [(0, False)], times=2.0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(inverse: bool, mode: tuple[int, bool]) -> None:
    random = Random(4, 3, seed=6)
    layers: list[Layer] = [
        random.coupling(hidden=5, gate=True, activation="silu", blocks=1),
        random.linear(),
        random.coupling("gin", 2, hidden=4, residual=False, activation="tanh"),
        random.diagonal(),
        random.coupling("additive", hidden=4, residual=False, activation="gelu"),
    ]
    flow = Flow(layers, random.order(), 4, 3)
    x, cond = random_inputs(2, 3, 4, 3)
    leaves = [t.clone().requires_grad_() for t in (x, cond, *flow.weights)]

    def run(x: Tensor, cond: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return flow.run(x, cond, weights, inverse, mode)

    # of what a direction does not read gradcheck, too, finds zeros
    assert torch.autograd.gradcheck(run, leaves)


# --- what is kept -----------------------------------------------------------------------------


def test_saved_width() -> None:
    layers, index = random_layers(48, 56, count=8)
    plan = Flow(layers, index, 48, 56).plan
    widths = [_C.coupling_saved_width(plan, every, False) for every in (0, 1, 2, 3, 7, 8)]
    assert widths == [48 * states for states in (0, 8, 4, 3, 2, 1)]
    assert _C.coupling_saved_width(plan, 0, True) > 0
    with pytest.raises(ValueError, match="keep_every"):
        _C.coupling_saved_width(plan, -1, False)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("samples", [1, 3, 70])
def test_passes_that_keep_have_the_same_bits(inverse: bool, samples: int) -> None:
    random = Random(9, 6, seed=3)
    layers: list[Layer] = [random.linear(), random.coupling(gate=True), random.coupling("gin", 2)]
    flow = Flow(layers, random.order(), 9, 6, torch.float32)
    x, cond = random_inputs(3, samples, 9, 6, torch.float32)
    want = flow.run(x, cond, flow.weights, inverse)
    for mode in MODES[1:]:
        for got, expected in zip(flow.run(x, cond, flow.weights, inverse, mode), want, strict=True):
            assert torch.equal(got, expected)


def test_reconstructed_states_drift_less_when_kept() -> None:
    """Errors of many reconstructions add up; kept states start anew."""
    layers, index = random_layers(12, 4, count=24, clamp=2.0)
    flow = Flow(layers, index, 12, 4, torch.float32)
    x, cond = random_inputs(4, 50, 12, 4, torch.float32)
    exact = gradients(
        flow.reference, x.double(), cond.double(), [w.double() for w in flow.weights], False
    )
    errors = []
    for mode in ((0, False), (1, False)):
        got = gradients(lambda *args: flow.run(*args, mode), x, cond, flow.weights, False)  # noqa: B023
        errors.append(max_error(got[2], exact[2]))
    assert errors[1] <= errors[0]


# --- the same bits however it is run ----------------------------------------------------------


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("mode", [(0, False), (3, False), (0, True)])
def test_threads_do_not_change_bits(mode: tuple[int, bool]) -> None:
    random = Random(10, 6, seed=3)
    layers: list[Layer] = [random.coupling(gate=True), random.linear(), random.coupling(nets=2)]
    flow = Flow(layers, random.order(), 10, 6, torch.float32)
    x, cond = random_inputs(7, 131, 10, 6, torch.float32)
    want = None
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        got = gradients(lambda *args: flow.run(*args, mode), x, cond, flow.weights, True)
        want = want or got
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("mode", [(0, False), (3, False), (0, True)])
def test_threads_do_not_change_bits_by_row(mode: tuple[int, bool]) -> None:
    layers, index = random_layers(10, 7, hidden=50)
    flow = Flow(layers, index, 10, 7, torch.float32)
    x, cond = random_inputs(401, 1, 10, 7, torch.float32)
    want = None
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        got = gradients(lambda *args: flow.run(*args, mode), x, cond, flow.weights, True)
        want = want or got
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("level", _C.simd_levels())
def test_simd_levels(level: str) -> None:
    _C.set_simd_level(level)
    random = Random(9, 6, seed=3)
    layers: list[Layer] = [
        random.coupling(gate=True),
        random.linear(),
        random.coupling("gin", 2, residual=False, activation="silu"),
        random.coupling(residual=False, hidden=77),
    ]
    assert_equals_reference(layers, random.order(), *random_inputs(3, 61, 9, 6))
    del layers[0]
    assert_equals_reference(layers, random.order(), *random_inputs(131, 1, 9, 6))


def test_python_threads() -> None:
    layers, index = random_layers(12, 5, hidden=60)
    flow = Flow(layers, index, 12, 5, torch.float32)
    inputs = [random_inputs(2, 40 + 13 * i, 12, 5, torch.float32) for i in range(4)]
    want = [gradients(flow.run, x, cond, flow.weights, True) for x, cond in inputs]
    failed: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            got = gradients(flow.run, *inputs[i], flow.weights, True)
            if not all(torch.equal(a, b) for a, b in zip(got, want[i], strict=True)):
                failed.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# --- parts of the gradient --------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["images", "repeated", "distinct"])
def test_wanted(rows: str) -> None:
    """Whatever is not wanted changes nothing in what is."""
    random = Random(8, 5, seed=8)
    layers: list[Layer] = [
        random.coupling(gate=rows != "distinct", blocks=1),
        random.linear(),
        random.coupling(residual=False),
    ]
    flow = Flow(layers, random.order(), 8, 5)
    x, cond = random_inputs(*((3, 20) if rows == "images" else (60, 1)), 8, 5)
    assert cond is not None
    if rows == "repeated":
        cond = cond[:4].repeat(15, 1)
    count = len(flow.weights)
    full = gradients(flow.run, x, cond, flow.weights, False)[2:]
    masks = [[i == j for j in range(count + 2)] for i in range(count + 2)]
    masks += [[i != j for j in range(count + 2)] for i in range(count + 2)]
    generator = torch.Generator().manual_seed(1)
    masks += [(torch.rand(count + 2, generator=generator) < 0.5).tolist() for _ in range(10)]
    for mask in masks:
        if not any(mask):
            continue
        got = gradients(flow.run, x, cond, flow.weights, False, mask)[2:]
        for a, b in zip(got, itertools.compress(full, mask), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_of_one_output(inverse: bool) -> None:
    """Expanded gradients without strides, and outputs without gradients."""
    layers, index = random_layers(7, 4)
    flow = Flow(layers, index, 7, 4)
    x, cond = random_inputs(3, 20, 7, 4)
    losses = [lambda z, j: z.sum(), lambda z, j: j.sum(), lambda z, j: z.sum() - j.mean()]
    for loss in losses:
        found = []
        for run in (flow.run, flow.reference):
            leaves = [t.clone().requires_grad_() for t in (x, cond, *flow.weights)]
            value = loss(*run(leaves[0], leaves[1], leaves[2:], inverse))
            found.append(torch.autograd.grad(value, leaves))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_bad_numbers_stay_in_their_image(bad: float, repeated: bool, inverse: bool) -> None:
    layers, index = random_layers(48, 5, hidden=70)
    flow = Flow(layers, index, 48, 5, torch.float32)
    shape = (120, 1) if repeated else (4, 30)
    x, cond = random_inputs(*shape, 48, 5, torch.float32)
    assert cond is not None
    if repeated:
        cond = cond[:4].repeat_interleave(30, 0)
    want = gradients(flow.run, x, cond, flow.weights, inverse)
    x = x.clone()
    x.view(4, 30, 48)[1, 7] = bad
    x.view(4, 30, 48)[1, 29, 3] = bad
    got = gradients(flow.run, x, cond, flow.weights, inverse)
    others = torch.tensor([0, 2, 3])
    for i in range(4):  # outputs, then the gradients of x and the condition
        a, b = (t[i].reshape(4, -1)[others] for t in (got, want))
        assert torch.equal(a, b), i
    assert not got[2].view(4, 30, 48)[1, 7].isfinite().all()


@pytest.mark.parametrize(("batch", "samples"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_empty(batch: int, samples: int, mode: tuple[int, bool]) -> None:
    random = Random(9, 4, seed=1)
    layers: list[Layer] = [random.coupling(gate=True), random.linear()]
    flow = Flow(layers, random.order(), 9, 4)
    x, cond = random_inputs(batch, samples, 9, 4)
    found = gradients(lambda *args: flow.run(*args, mode), x, cond, flow.weights, True)
    for got, like in zip(found[2:], (x, cond, *flow.weights), strict=True):
        assert got.shape == like.shape
        assert not got.any()


def test_no_steps() -> None:
    flow = Flow([], [1, 0, 2], 3, 0)
    x, _ = random_inputs(2, 3, 3, 0)
    got, want = (gradients(run, x, None, [], False) for run in (flow.run, flow.reference))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# --- the op -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [(0, False), (1, True)])
def test_opcheck(mode: tuple[int, bool]) -> None:
    layers, index = random_layers(7, 4, count=2)
    flow = Flow(layers, index, 7, 4)
    x, cond = random_inputs(3, 5, 7, 4)
    assert cond is not None
    weights = [w.clone().requires_grad_() for w in flow.weights]
    leaves = x.clone().requires_grad_(), cond.clone().requires_grad_()
    torch.library.opcheck(
        coupling_pass, (*leaves, weights, None, flow.plan, False, *mode, "highest")
    )
    out, log_det, saved = coupling_pass(
        x, cond, flow.weights, None, flow.plan, False, *mode, "highest"
    )
    wanted = [True] * (len(weights) + 1)
    torch.library.opcheck(
        coupling_pass_backward,
        (
            *(out, saved, cond, torch.ones_like(out), torch.ones_like(log_det), flow.weights),
            *(None, flow.plan, False, *mode, "highest", wanted),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_wanted_of_the_wrong_length() -> None:
    layers, index = random_layers(7, 0, count=1)
    flow = Flow(layers, index, 7, 0)
    x, _ = random_inputs(3, 5, 7, 0)
    packed = torch.empty(_C.coupling_packed_bytes(flow.plan), dtype=torch.uint8)
    p = x.data_ptr()
    with pytest.raises(ValueError, match="wanted"):
        _C.coupling_backward(
            *(flow.plan, packed.data_ptr(), packed.numel(), False, 3, 5, p, p, 0, False, 0, p, 0),
            *(x.clone().data_ptr(), 0, x.clone().data_ptr(), [], 1),
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 5)}, TypeError, "x: expected dtype torch.float64"),
        ({"x": normal(2, 3, 4)}, ValueError, r"x: expected shape \(B, M, 5\), got \(2, 3, 4\)"),
        ({"cond": None}, ValueError, r"cond: expected shape \(2, 3\), got None"),
        ({"cond": normal(3, 3)}, ValueError, r"cond: expected shape \(2, 3\)"),
        ({"keep_every": -1}, ValueError, "keep_every: expected >= 0, got -1"),
        ({"precision": "low"}, ValueError, "precision: expected one of highest"),
        ({"packed": torch.zeros(8)}, ValueError, "packed: expected a contiguous"),
        ({"grad_out": normal(2, 3, 4)}, ValueError, r"grad_out: expected shape \(2, 3, 5\)"),
        ({"grad_log_det": normal(2, 4)}, ValueError, r"grad_log_det: expected shape \(2, 3\)"),
        ({"saved": normal(2, 3, 4)}, ValueError, r"saved: expected shape \(2, 3, 20\)"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type, message: str) -> None:
    flow = Flow(*random_layers(5, 3), 5, 3)
    given = {
        "x": normal(2, 3, 5),
        "cond": normal(2, 3),
        "weights": flow.weights,
        "packed": None,
        "plan": flow.plan,
        "inverse": False,
        "keep_every": 1,
        "store": False,
        "precision": "highest",
    }
    gradient = change.keys() & {"grad_out", "grad_log_det", "saved"}
    if not gradient:
        with pytest.raises(error, match=message):
            coupling_pass(**{**given, **change})
        return
    out, log_det, saved = coupling_pass(**given)
    given |= {"out": out, "saved": saved, "grad_out": out, "grad_log_det": log_det}
    given["wanted"] = [True] * (len(flow.weights) + 1)
    del given["x"]
    with pytest.raises(error, match=message):
        coupling_pass_backward(**{**given, **change})


# --- wide layers: gradients of weights are summed up over many rows at once --------------------


def wide_layers(random: Random, hidden: int = 515, **net: Any) -> list[Layer]:
    """More than a megabyte of weights in each coupling, in float32 too; and a narrow one."""
    return [
        random.coupling(hidden=hidden, blocks=1, activation="silu", **net),
        random.linear(),
        random.coupling(hidden=20, activation="silu"),
        random.diagonal(),
    ]


@pytest.mark.parametrize("rows", ["images", "repeated", "interleaved", "distinct"])
@pytest.mark.parametrize("gate", [False, True])
def test_wide_layers(rows: str, gate: bool) -> None:
    random = Random(11, 6, seed=4)
    layers = wide_layers(random, gate=gate)
    x, cond = random_inputs(*((5, 61) if rows == "images" else (305, 1)), 11, 6)
    assert cond is not None
    if rows == "repeated":
        cond = cond[:5].repeat_interleave(61, 0)
    elif rows == "interleaved":
        cond = cond[:5].repeat(61, 1)
    modes = [(1, False), (1, True)]
    assert_equals_reference(layers, random.order(), x, cond, modes)


@pytest.mark.parametrize("kind", ["additive", "gin"])
def test_wide_layers_of_other_kinds(kind: str) -> None:
    random = Random(11, 6, seed=4)
    layers: list[Layer] = [random.coupling(kind, 2, hidden=530, blocks=1, activation="gelu")]
    assert_equals_reference(layers, random.order(), *random_inputs(3, 40, 11, 6), [(1, False)])


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("images", [1, 2100])
def test_wide_layers_in_parts(images: int, store: bool) -> None:
    """More rows, or images, than are kept at a time."""
    random = Random(8, 3, seed=4)
    layers = wide_layers(random, gate=True)
    flow = Flow(layers, random.order(), 8, 3)
    x, cond = random_inputs(images, 2100 // images, 8, 3)
    got = gradients(lambda *args: flow.run(*args, (1, store)), x, cond, flow.weights, True)
    want = gradients(flow.reference, x, cond, flow.weights, True)
    for a, b in zip(got, want, strict=True):
        assert max_error(a, b) <= 1e-11 * max(1.0, float(b.abs().max()))


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("mode", [(1, False), (1, True)])
def test_threads_do_not_change_bits_of_wide_layers(mode: tuple[int, bool]) -> None:
    random = Random(10, 6, seed=3)
    flow = Flow(wide_layers(random), random.order(), 10, 6, torch.float32)
    x, cond = random_inputs(7, 131, 10, 6, torch.float32)
    want = None
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        got = gradients(lambda *args: flow.run(*args, mode), x, cond, flow.weights, True)
        want = want or got
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("level", _C.simd_levels())
def test_simd_levels_of_wide_layers(level: str) -> None:
    _C.set_simd_level(level)
    random = Random(9, 6, seed=3)
    assert_equals_reference(
        wide_layers(random), random.order(), *random_inputs(3, 61, 9, 6), [(0, False)]
    )


def test_wanted_of_wide_layers() -> None:
    """Weights without a gradient leave those of the others as they are."""
    random = Random(9, 6, seed=3)
    flow = Flow(wide_layers(random), random.order(), 9, 6)
    x, cond = random_inputs(3, 21, 9, 6)
    count = len(flow.weights)
    every = gradients(flow.run, x, cond, flow.weights, False)
    for start in (0, 1):
        wanted = [False, False, *(i % 2 == start for i in range(count))]
        some = gradients(flow.run, x, cond, flow.weights, False, wanted)
        kept = [g for g, want in zip(every[4:], wanted[2:], strict=True) if want]
        assert len(some) == 2 + len(kept)
        for a, b in zip(some[2:], kept, strict=True):
            assert torch.equal(a, b)
