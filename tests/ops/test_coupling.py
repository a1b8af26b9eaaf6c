"""The coupling kernels against the reference, and the reference against finite differences."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasthyp import _C
from fasthyp.ops import coupling as ops
from fasthyp.reference import coupling as reference
from fasthyp.reference.coupling import (
    ACTIVATIONS,
    CLAMP_ACTIVATIONS,
    KINDS,
    BatchNorm,
    CouplingLayer,
    Dense,
    Layer,
    LinearLayer,
    LinearMap,
    Net,
    mlp,
)
from fasthyp.reference.philox import philox4x32
from tests.conftest import assert_as_good_as, max_error


@pytest.fixture
def _restored_settings() -> Iterator[None]:
    level, threads = _C.simd_level(), torch.get_num_threads()
    yield
    _C.set_simd_level(level)
    torch.set_num_threads(threads)


def random_layers(
    dim: int,
    cond_dim: int,
    depth: int = 2,
    hidden: int = 24,
    count: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    bias: bool = True,
    activation: str = "relu",
    negative_slope: float = 0.01,
    **kind: object,
) -> tuple[list[CouplingLayer], list[int]]:
    """Couplings with random slots in random order, and a random order of the outputs."""
    rng = np.random.RandomState(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    layers = []
    for _ in range(count):
        slots = rng.permutation(dim).tolist()
        active, passive = slots[: max(1, dim // 2)], slots[max(1, dim // 2) :]
        columns = rng.permutation(cond_dim).tolist()[: max(cond_dim - 1, 0)]
        inputs = len(passive) + len(columns)
        widths = [inputs, *(hidden + i for i in range(depth - 1)), 2 * len(active)]
        weights = tuple(normal(b, a) / max(a, 1) ** 0.5 for a, b in itertools.pairwise(widths))
        biases = tuple(0.3 * normal(b) if bias else None for b in widths[1:])
        net = mlp(weights, biases, activation, negative_slope)
        layers.append(CouplingLayer(tuple(active), tuple(passive), tuple(columns), (net,), **kind))
    return layers, rng.permutation(dim).tolist()


def random_inputs(
    batch: int, samples: int, dim: int, cond_dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, samples, dim, generator=generator, dtype=torch.float64).to(dtype)
    cond = torch.randn(batch, cond_dim, generator=generator, dtype=torch.float64).to(dtype)
    return x, cond if cond_dim else None


class Random:
    """Layers with random weights."""

    def __init__(self, dim: int, cond_dim: int, seed: int, dtype: torch.dtype = torch.float64):
        self.dim, self.cond_dim, self.dtype = dim, cond_dim, dtype
        self.rng = np.random.RandomState(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape)).to(self.dtype)

    def order(self) -> tuple[int, ...]:
        return tuple(self.rng.permutation(self.dim).tolist())

    def weight(self, outputs: int, inputs: int) -> Tensor:
        return self.normal(outputs, inputs) / max(inputs, 1) ** 0.5

    def batch_norm(self, width: int) -> BatchNorm:
        variance = self.normal(width).square() + 0.5
        weight = None if self.rng.rand() < 0.2 else 1.0 + 0.3 * self.normal(width)
        bias = None if self.rng.rand() < 0.2 else 0.3 * self.normal(width)
        return BatchNorm(0.3 * self.normal(width), variance, weight, bias, 1e-5)

    def residual(
        self,
        inputs: int,
        outputs: int,
        columns: int = 0,
        hidden: int = 24,
        blocks: int = 2,
        norm: bool = True,
        gate: bool = False,
        activation: str = "relu",
    ) -> Net:
        """A residual net in the form of nflows; its gates read ``columns`` of the condition."""

        def dense(inputs: int, **rest: Any) -> Dense:
            return Dense(self.weight(hidden, inputs), 0.3 * self.normal(hidden), **rest)

        def norms() -> dict[str, Any]:
            return {"norm": self.batch_norm(hidden) if norm else None, "activate": True}

        layers, end = [], {}
        for i in range(blocks):
            layers.append(dense(hidden if i else inputs, **end, keep=True, **norms()))
            layers.append(dense(hidden, **norms()))
            end = {"add": True}
            if gate:
                end["gate"] = self.weight(hidden, columns), self.normal(hidden)
        layers.append(dense(hidden if blocks else inputs, **end))
        layers.append(Dense(self.weight(outputs, hidden), 0.3 * self.normal(outputs)))
        return Net(tuple(layers), activation)

    def coupling(
        self,
        kind: str = "affine",
        nets: int = 1,
        active: int | None = None,
        passive: int | None = None,
        residual: bool = True,
        hidden: int = 24,
        gate: bool = False,
        activation: str = "relu",
        **net: Any,
    ) -> CouplingLayer:
        order = self.order()
        active = max(1, self.dim // 2) if active is None else active
        passive = self.dim - active if passive is None else passive
        columns = tuple(self.rng.permutation(self.cond_dim)[: max(self.cond_dim - 1, 1)].tolist())
        inputs = passive + len(columns)
        nets = 1 if kind == "additive" else nets
        outputs = active if kind == "additive" or nets == 2 else 2 * active
        found = []
        for i in range(nets):
            if residual:
                gates = gate and bool(columns)
                shape = (inputs, outputs, len(columns), hidden + 3 * i)
                found.append(self.residual(*shape, gate=gates, activation=activation, **net))
            else:
                widths = [inputs, hidden + 5 * i, outputs]
                pairs = list(itertools.pairwise(widths))
                weights = [self.weight(b, a) for a, b in pairs]
                biases = [0.3 * self.normal(b) for _, b in pairs]
                found.append(mlp(weights, biases, activation))
        return CouplingLayer(
            *(order[:active], order[active : active + passive], columns, tuple(found), kind),
            raw_scale=0.7,
        )

    def linear(self) -> LinearLayer:
        """A dense linear layer, well conditioned."""
        rotation = torch.linalg.qr(self.normal(self.dim, self.dim).double())[0]
        weight = (rotation * (0.3 * self.normal(self.dim).double()).exp()).to(self.dtype)
        return LinearLayer(self.order(), (weight, self.normal(self.dim)), dense_map)

    def diagonal(self) -> LinearLayer:
        tensors = 0.3 * self.normal(self.dim), self.normal(self.dim)
        return LinearLayer(self.order(), tensors, diagonal_map, diagonal=True)


def dense_map(weight: Tensor, shift: Tensor) -> LinearMap:
    return LinearMap(weight, shift, torch.linalg.slogdet(weight)[1])


def diagonal_map(log_scale: Tensor, shift: Tensor) -> LinearMap:
    return LinearMap(log_scale.exp(), shift, log_scale.sum())


def map_tensors(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Layers with every tensor in them changed."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, (list, tuple)):
        return type(part)(map_tensors(inner, change) for inner in part)
    if is_dataclass(part):
        return replace(
            part, **{f.name: map_tensors(getattr(part, f.name), change) for f in fields(part)}
        )
    return part


def leaves_of(layers: Sequence[Layer]) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(list(layers), lambda tensor: found.append(tensor) or tensor)
    return found


def with_leaves(layers: Sequence[Layer], leaves: Sequence[Tensor]) -> list[Layer]:
    rest = iter(leaves)
    return map_tensors(list(layers), lambda _: next(rest))


def as_dtype(layers: Sequence[Layer], dtype: torch.dtype) -> list[Layer]:
    return map_tensors(list(layers), lambda tensor: tensor.to(dtype))


def assert_equals_reference(
    layers: Sequence[Layer],
    index: list[int],
    x: Tensor,
    cond: Tensor | None,
    tolerance: float = 1e-12,
) -> None:
    """Both directions: to ``tolerance`` in float64, about as good as PyTorch in float32."""
    shape = x.shape[-1], 0 if cond is None else cond.shape[1]
    double = ops.PackedFlow(layers, index, *shape, dtype=torch.float64)
    layers32 = as_dtype(layers, torch.float32)
    single = ops.PackedFlow(layers32, index, *shape)
    cond32 = None if cond is None else cond.float()
    # the float64 reference of what the float32 engine was given
    layers_given = as_dtype(layers32, torch.float64)
    cond_given = None if cond32 is None else cond32.double()
    for name in ("forward", "inverse"):
        run = getattr(reference, f"flow_{name}")
        for got, want in zip(
            getattr(double, name)(x, cond), run(layers, index, x, cond), strict=True
        ):
            assert got.shape == want.shape
            assert got.dtype == torch.float64
            assert max_error(got, want) <= tolerance * max(1.0, float(want.abs().max()))
        exact = run(layers_given, index, x.float().double(), cond_given)
        peer = run(layers32, index, x.float(), cond32)
        for got, near, want in zip(
            getattr(single, name)(x.float(), cond32), peer, exact, strict=True
        ):
            assert_as_good_as(got, near, want, name, times=6.0)


# --- kernels equal the reference --------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("clamp_activation", CLAMP_ACTIVATIONS)
def test_activations_and_clamps(activation: str, clamp_activation: str) -> None:
    layers, index = random_layers(
        7,
        5,
        depth=3,
        activation=activation,
        negative_slope=0.2,
        clamp=1.7,
        clamp_activation=clamp_activation,
    )
    assert_equals_reference(layers, index, *random_inputs(3, 5, 7, 5))


@pytest.mark.parametrize(
    ("batch", "samples", "dim", "cond_dim"),
    [
        (1, 1, 2, 1),
        (1, 1, 48, 56),
        (3, 7, 39, 17),
        (2, 1000, 13, 0),
        (130, 1, 48, 56),
        (33, 31, 20, 3),
        (1, 4096, 16, 8),
        (5, 64, 1, 4),
        (2, 17, 132, 64),
    ],
)
def test_shapes(batch: int, samples: int, dim: int, cond_dim: int) -> None:
    layers, index = random_layers(dim, cond_dim)
    assert_equals_reference(layers, index, *random_inputs(batch, samples, dim, cond_dim))


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_depths(depth: int, bias: bool) -> None:
    layers, index = random_layers(9, 4, depth=depth, bias=bias)
    assert_equals_reference(layers, index, *random_inputs(3, 40, 9, 4))


@given(
    dim=st.integers(1, 40),
    cond_dim=st.integers(0, 20),
    depth=st.integers(1, 4),
    hidden=st.integers(1, 70),
    batch=st.integers(1, 4),
    samples=st.integers(1, 70),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(
    dim: int, cond_dim: int, depth: int, hidden: int, batch: int, samples: int, seed: int
) -> None:
    layers, index = random_layers(dim, cond_dim, depth, hidden, count=3, seed=seed)
    x, cond = random_inputs(batch, samples, dim, cond_dim)
    packed = ops.PackedFlow(layers, index, dim, cond_dim, dtype=torch.float64)
    z, log_jac = packed.forward(x, cond)
    want_z, want_log_jac = reference.flow_forward(layers, index, x, cond)
    torch.testing.assert_close(z, want_z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_jac, want_log_jac, rtol=1e-10, atol=1e-10)
    back, back_jac = packed.inverse(z, cond)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back_jac, -log_jac, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("batch", "samples"), [(0, 5), (3, 0), (0, 0)])
def test_empty(batch: int, samples: int) -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    packed = ops.PackedFlow(layers, index, 9, 4)
    x, cond = random_inputs(batch, samples, 9, 4, torch.float32)
    for z, log_jac in (packed.forward(x, cond), packed.inverse(x, cond)):
        assert z.shape == (batch, samples, 9)
        assert log_jac.shape == (batch, samples)


def test_strided_inputs() -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    packed = ops.PackedFlow(layers, index, 9, 4)
    x = torch.randn(9, 6, 4).transpose(0, 2)[:, ::2]
    cond = torch.randn(4, 8)[:, ::2]
    for a, b in zip(
        packed.forward(x, cond), packed.forward(x.contiguous(), cond.contiguous()), strict=True
    ):
        assert torch.equal(a, b)


def test_a_packed_flow_is_a_snapshot() -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    packed = ops.PackedFlow(layers, index, 9, 4)
    x, cond = random_inputs(2, 3, 9, 4, torch.float32)
    before = packed.forward(x, cond)[0]
    layers[0].nets[0].layers[0].weight.add_(1.0)
    assert torch.equal(packed.forward(x, cond)[0], before)


@pytest.mark.usefixtures("_restored_settings")
def test_bits_depend_on_neither_threads_nor_batch_nor_repeated_conditions() -> None:
    layers, index = random_layers(39, 17, hidden=64, dtype=torch.float32)
    packed = ops.PackedFlow(layers, index, 39, 17)
    x, cond = random_inputs(5, 333, 39, 17, torch.float32)
    torch.set_num_threads(1)
    whole = packed.inverse(x, cond)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for a, b in zip(packed.inverse(x, cond), whole, strict=True):
            assert torch.equal(a, b)
    for image in range(5):
        one = packed.inverse(x[image : image + 1], cond[image : image + 1])
        assert torch.equal(one[0][0], whole[0][image])
    some = packed.inverse(x[:, 100:150], cond)
    assert torch.equal(some[0], whole[0][:, 100:150])
    rows = packed.inverse(x.reshape(-1, 1, 39), cond.repeat_interleave(333, 0))
    assert torch.equal(rows[0].reshape(x.shape), whole[0])
    assert torch.equal(rows[1].reshape(5, 333), whole[1])


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_rows_shared_by_threads(depth: int, precision: str, dtype: torch.dtype) -> None:
    # more than a megabyte of weights: threads share the hidden units instead of splitting the rows
    hidden = 3000 if depth == 2 else 600
    layers, index = random_layers(39, 17, hidden=hidden, depth=depth, dtype=dtype)
    packed = ops.PackedFlow(layers, index, 39, 17, precision, dtype)
    assert packed.packed.numel() > 1 << 20
    x, cond = random_inputs(1, 60, 39, 17, dtype)
    torch.set_num_threads(1)
    whole = packed.forward(x, cond), packed.inverse(x, cond)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for rows in (1, 2, 12, 13):
            few = packed.forward(x[:, :rows], cond), packed.inverse(x[:, :rows], cond)
            for (out, log_jac), (all_out, all_log_jac) in zip(few, whole, strict=True):
                assert torch.equal(out, all_out[:, :rows])
                assert torch.equal(log_jac, all_log_jac[:, :rows])


def test_python_threads() -> None:
    layers, index = random_layers(39, 17, dtype=torch.float32)
    packed = ops.PackedFlow(layers, index, 39, 17)
    x, cond = random_inputs(3, 200, 39, 17, torch.float32)
    expected = packed.forward(x, cond)[0]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(packed.forward(x, cond)[0], expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_not_a_number_stays_in_its_row() -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    packed = ops.PackedFlow(layers, index, 9, 4)
    x, cond = random_inputs(2, 20, 9, 4, torch.float32)
    expected = packed.forward(x, cond)[0]
    x[1, 3] = float("nan")
    z = packed.forward(x, cond)[0]
    assert z[1, 3].isnan().all()
    rest = torch.ones(2, 20, dtype=torch.bool)
    rest[1, 3] = False
    assert torch.equal(z[rest], expected[rest])


@pytest.mark.parametrize("clamp_activation", CLAMP_ACTIVATIONS)
@pytest.mark.parametrize("inverse", [False, True])
def test_affine_coupling(clamp_activation: str, inverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    raw = 2.0 * torch.randn(50, 6, generator=generator, dtype=torch.float64)
    layer = CouplingLayer((7, 0, 4), (), clamp=1.3, clamp_activation=clamp_activation)
    want = reference.couple(state, raw, layer, inverse)
    arguments = ((7, 0, 4), 1.3, clamp_activation, inverse)
    got = ops.affine_coupling(state, raw, *arguments)
    untouched = [1, 2, 3, 5, 6, 8]
    assert torch.equal(got[0][:, untouched], state[:, untouched])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    state, raw = state.float(), raw.float()
    exact = reference.couple(state.double(), raw.double(), layer, inverse)
    peer = reference.couple(state, raw, layer, inverse)
    for a, b, c in zip(ops.affine_coupling(state, raw, *arguments), peer, exact, strict=True):
        assert_as_good_as(a, b, c)


def test_opcheck() -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    packed = ops.PackedFlow(layers, index, 9, 4)
    x, cond = random_inputs(2, 3, 9, 4, torch.float32)
    checks = ("test_schema", "test_faketensor")
    arguments = (x, cond, packed.packed, packed.plan, True)
    torch.library.opcheck(torch.ops.fasthyp.coupling_flow.default, arguments, test_utils=checks)
    arguments = (x[:, 0], torch.randn(2, 4), [3, 1], 2.0, 1, False)
    torch.library.opcheck(torch.ops.fasthyp.coupling_affine.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("x", "cond", "error", "message"),
    [
        (torch.randn(2, 9), torch.randn(2, 4), ValueError, "x: expected shape"),
        (torch.randn(2, 3, 8), torch.randn(2, 4), ValueError, "x: expected shape"),
        (torch.randn(2, 3, 9), torch.randn(3, 4), ValueError, "cond: expected shape"),
        (torch.randn(2, 3, 9), torch.randn(2, 3), ValueError, "cond: expected shape"),
        (torch.randn(2, 3, 9), None, ValueError, "cond: expected shape"),
        (torch.randn(2, 3, 9).double(), torch.randn(2, 4), TypeError, "x: expected dtype"),
        (torch.randn(2, 3, 9), torch.randn(2, 4).double(), TypeError, "cond: expected dtype"),
    ],
)
def test_bad_input(x: Tensor, cond: Tensor, error: type, message: str) -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    packed = ops.PackedFlow(layers, index, 9, 4)
    for run in (packed.forward, packed.inverse):
        with pytest.raises(error, match=message):
            run(x, cond)


def test_bad_layers() -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="precision"):
        ops.PackedFlow(layers, index, 9, 4, precision="best")
    with pytest.raises(ValueError, match="plain subnets"):
        ops.PackedFlow([replace(layers[0], nets=(torch.nn.Identity(),))], index, 9, 4)
    net = replace(layers[0].nets[0], activation="softplus")
    for wrong in ({"nets": (net,)}, {"clamp_activation": "erf"}, {"kind": "spline"}):
        with pytest.raises(ValueError, match="expected one of"):
            ops.PackedFlow([replace(layers[0], **wrong)], index, 9, 4)
    first, *rest = leaves_of(layers[:1])
    wrong = with_leaves(layers[:1], [first[:, 1:], *rest])
    with pytest.raises(ValueError, match="expected a weight"):
        ops.PackedFlow(wrong, index, 9, 4)


# --- every step of a flow ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nets", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("cond_dim", [0, 5])
def test_kinds(kind: str, nets: int, residual: bool, cond_dim: int) -> None:
    make = Random(11, cond_dim, seed=3)
    layers = [make.coupling(kind, nets, residual=residual) for _ in range(3)]
    assert_equals_reference(layers, make.order(), *random_inputs(3, 29, 11, cond_dim))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_residual_nets(activation: str, norm: bool, gate: bool) -> None:
    make = Random(9, 6, seed=5)
    options = {"norm": norm, "gate": gate, "activation": activation, "hidden": 37}
    layers = [make.coupling(blocks=blocks, **options) for blocks in (0, 1, 3)]
    assert_equals_reference(layers, make.order(), *random_inputs(2, 50, 9, 6))


def test_a_last_layer_may_do_all_that_others_do() -> None:
    make = Random(6, 4, seed=5)
    gate = make.weight(3, 4), None
    net = Net(
        (
            Dense(make.weight(3, 7), keep=True),
            Dense(make.weight(3, 3), gate=gate, add=True, norm=make.batch_norm(3), activate=True),
        ),
        "tanh",
    )
    single = Net((Dense(make.weight(3, 7), make.normal(3), activate=True),), "silu")
    layers = [
        CouplingLayer((0, 2, 4), (1, 3, 5), (0, 1, 2, 3), (net,), "additive"),
        CouplingLayer((5, 1, 3), (0, 2, 4), (3, 2, 1, 0), (single, net)),
    ]
    assert_equals_reference(layers, make.order(), *random_inputs(2, 20, 6, 4))


def test_chosen_rows_and_columns() -> None:
    """Masked couplings: subnets that are wider than the coupling."""
    make = Random(6, 3, seed=5)
    net = make.residual(9, 6)
    chosen = replace(net, inputs=(4, 1, 0, 8, 6, 7), outputs=(5, 2, 3))
    layers = [CouplingLayer((5, 2, 3), (4, 1, 0), (0, 1, 2), (chosen, chosen))]
    assert_equals_reference(layers, make.order(), *random_inputs(2, 20, 6, 3))


@pytest.mark.parametrize("dim", [1, 5, 16, 33, 144])
@pytest.mark.parametrize("kinds", ["L", "D", "DL", "CLC", "LCDCL", "DCLDLC", "CD", "CDDC", ""])
def test_linear_steps(dim: int, kinds: str) -> None:
    make = Random(dim, 3, seed=dim)
    makers = {"L": make.linear, "D": make.diagonal, "C": make.coupling}
    layers = [makers[kind]() for kind in kinds]
    # 1e-12 of the largest number, for matrices of this width
    assert_equals_reference(layers, make.order(), *random_inputs(2, 60, dim, 3), 5e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_from_the_condition(kind: str) -> None:
    make = Random(7, 5, seed=1)
    layers = [make.coupling(kind, active=7, residual=r, gate=True) for r in (False, True)]
    assert_equals_reference(layers, make.order(), *random_inputs(3, 9, 7, 5))
    assert_equals_reference(layers, make.order(), *random_inputs(9, 1, 7, 5))


@st.composite
def flows(draw: st.DrawFn) -> tuple[list[Layer], tuple[int, ...], int, int]:
    dim, cond_dim = draw(st.integers(1, 40)), draw(st.integers(0, 12))
    make = Random(dim, cond_dim, draw(st.integers(0, 10_000)))
    layers: list[Layer] = []
    for step in draw(st.lists(st.sampled_from(("coupling", "linear", "diagonal")), max_size=6)):
        if step != "coupling":
            layers.append(getattr(make, step)())
            continue
        active = draw(st.integers(1, dim))
        residual = draw(st.booleans())
        options: dict[str, Any] = {"activation": draw(st.sampled_from(ACTIVATIONS))}
        if residual:
            options |= {"blocks": draw(st.integers(0, 2)), "norm": draw(st.booleans())}
        layers.append(
            make.coupling(
                draw(st.sampled_from(KINDS)),
                nets=draw(st.integers(1, 2)),
                active=active,
                passive=draw(st.integers(0, dim - active)),
                residual=residual,
                hidden=draw(st.integers(1, 70)),
                gate=draw(st.booleans()),
                **options,
            )
        )
    return layers, make.order(), dim, cond_dim


@given(flow=flows(), batch=st.integers(1, 4), samples=st.sampled_from([1, 2, 7, 50, 99]))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_flow(
    flow: tuple[list[Layer], tuple[int, ...], int, int], batch: int, samples: int
) -> None:
    layers, index, dim, cond_dim = flow
    x, cond = random_inputs(batch, samples, dim, cond_dim)
    packed = ops.PackedFlow(layers, index, dim, cond_dim, dtype=torch.float64)
    z, log_jac = packed.forward(x, cond)
    want_z, want_log_jac = reference.flow_forward(layers, index, x, cond)
    torch.testing.assert_close(z, want_z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_jac, want_log_jac, rtol=1e-10, atol=1e-10)
    want_x, want_back_jac = reference.flow_inverse(layers, index, z, cond)
    back, back_jac = packed.inverse(z, cond)
    torch.testing.assert_close(back, want_x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back_jac, want_back_jac, rtol=1e-8, atol=1e-8)


@given(flow=flows())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_flow_in_single_precision(
    flow: tuple[list[Layer], tuple[int, ...], int, int],
) -> None:
    layers, index, dim, cond_dim = flow
    assert_equals_reference(layers, index, *random_inputs(2, 40, dim, cond_dim), 1e-10)


def every_step(
    dim: int, cond_dim: int, dtype: torch.dtype, hidden: int = 40
) -> tuple[list[Layer], tuple[int, ...]]:
    make = Random(dim, cond_dim, seed=2, dtype=dtype)
    return [
        make.diagonal(),
        make.coupling("additive", gate=True, hidden=hidden),
        make.linear(),
        make.coupling("affine", nets=2, hidden=hidden),
        make.coupling("gin", residual=False, hidden=hidden),
        make.linear(),
        make.coupling("gin", nets=2, gate=True, hidden=hidden, activation="silu"),
    ], make.order()


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("level", _C.simd_levels())
def test_simd_levels(level: str) -> None:
    _C.set_simd_level(level)
    layers, index = every_step(19, 5, torch.float64)
    assert_equals_reference(layers, index, *random_inputs(3, 61, 19, 5))


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("gates", [False, True])
def test_bits_of_every_step(level: str, precision: str, gates: bool) -> None:
    """Neither threads nor splits nor repeated conditions change a bit."""
    _C.set_simd_level(level)
    layers, index = every_step(19, 5, torch.float32)
    layers = layers if gates else layers[2:-1]
    packed = ops.PackedFlow(layers, index, 19, 5, precision)
    x, cond = random_inputs(5, 133, 19, 5, torch.float32)
    for run in (packed.forward, packed.inverse):
        torch.set_num_threads(1)
        whole = run(x, cond)
        torch.set_num_threads(3)
        assert all(map(torch.equal, run(x, cond), whole))
        one = run(x[3:4], cond[3:4])
        assert torch.equal(one[0][0], whole[0][3])
        some = run(x[:, 40:89], cond)
        assert torch.equal(some[0], whole[0][:, 40:89])
        assert torch.equal(some[1], whole[1][:, 40:89])
        rows = run(x.reshape(-1, 1, 19), cond.repeat_interleave(133, 0))
        assert torch.equal(rows[0].reshape(x.shape), whole[0])
        assert torch.equal(rows[1].reshape(5, 133), whole[1])
        apart = run(x[:, :1], cond)  # a condition for every row
        assert torch.equal(apart[0], whole[0][:, :1])
        assert torch.equal(apart[1], whole[1][:, :1])


@pytest.mark.usefixtures("_restored_settings")
@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_rows_of_every_step(precision: str, dtype: torch.dtype) -> None:
    layers, index = every_step(19, 5, dtype, hidden=200)
    # a last layer that adds, after layers of which others keep
    make = Random(19, 5, seed=2, dtype=dtype)
    net = Net(
        (
            Dense(make.weight(9, 14), make.normal(9), keep=True, activate=True),
            Dense(make.weight(300, 9), activate=True),
            Dense(make.weight(9, 300), add=True),
        )
    )
    order = make.order()
    layers += [
        CouplingLayer(order[:9], order[9:], (0, 1, 2, 3), (net, net), "affine") for _ in range(2)
    ]
    packed = ops.PackedFlow(layers, index, 19, 5, precision, dtype)
    assert packed.packed.numel() > 1 << 20
    x, cond = random_inputs(1, 60, 19, 5, dtype)
    for run in (packed.forward, packed.inverse):
        torch.set_num_threads(1)
        whole = run(x, cond)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for rows in (1, 7, 12):
                for _ in range(5):
                    few = run(x[:, :rows], cond)
                    assert torch.equal(few[0], whole[0][:, :rows])
                    assert torch.equal(few[1], whole[1][:, :rows])


@pytest.mark.parametrize("residual", [False, True])
def test_half_precision(residual: bool) -> None:
    make = Random(24, 30, seed=4, dtype=torch.float32)
    layers: list[Layer] = []
    for kind in KINDS:
        layers += [make.linear(), make.coupling(kind, residual=residual, hidden=100, gate=True)]
    index = make.order()
    packed = ops.PackedFlow(layers, index, 24, 30, "medium")
    if ops.operand_dtype(packed.precision, packed.dtype) != torch.bfloat16:
        pytest.skip("this processor multiplies no bfloat16 numbers")
    x, cond = random_inputs(2, 80, 24, 30, torch.float32)
    exact = as_dtype(layers, torch.float64)
    for name in ("forward", "inverse"):
        got = getattr(packed, name)(x, cond)
        want = getattr(reference, f"flow_{name}")(exact, index, x.double(), cond.double())
        for a, b in zip(got, want, strict=True):
            assert float((a.double() - b).abs().mean()) < 0.01 * float(b.abs().mean() + 1.0)
    # linear steps are computed in float32
    linear = [make.linear(), make.diagonal()]
    single = ops.PackedFlow(linear, index, 24, 30).forward(x, cond)
    assert all(
        map(torch.equal, ops.PackedFlow(linear, index, 24, 30, "medium").forward(x, cond), single)
    )


def test_plans_that_make_no_sense() -> None:
    layers, index = every_step(5, 2, torch.float32)
    packed = ops.PackedFlow(layers, index, 5, 2)
    plan = packed.plan.tolist()
    assert _C.coupling_packed_bytes(plan) == packed.packed.numel()
    for wrong in ([], plan[:-1], [*plan, 0], [0, *plan[1:]], [*plan[:4], 1 << 17, *plan[5:]]):
        with pytest.raises(ValueError, match="flow plan"):
            _C.coupling_packed_bytes(wrong)
    step = 10  # after five numbers and the output index comes a diagonal step, then a coupling
    assert plan[step : step + 2] == [1, 1]
    coupling = step + 3
    for place, value in ((0, 2), (1, 0), (1, 6), (2, 6), (3, 3), (4, 6), (6, 2), (7, 5), (8, -1)):
        wrong = plan.copy()
        wrong[coupling + place] = value
        with pytest.raises(ValueError, match="flow plan"):
            _C.coupling_packed_bytes(wrong)
    rng = np.random.RandomState(0)
    for _ in range(300):  # whatever the plan, an answer or an error
        wrong = plan.copy()
        wrong[rng.randint(len(plan))] = int(rng.choice([-1, 0, 1, 2, 3, 7, 64, 1 << 62]))
        with contextlib.suppress(ValueError):
            assert _C.coupling_packed_bytes(wrong) > 0


def test_tensors_that_do_not_fit_the_plan() -> None:
    packed = ops.PackedFlow([Random(5, 2, seed=0).linear()], range(5), 5, 2, dtype=torch.float64)
    numbers = [torch.zeros(n, dtype=torch.float64) for n in (25, 5, 25, 5)]
    arguments = packed.plan.data_ptr(), len(packed.plan)
    place = packed.packed.data_ptr(), packed.packed.numel()
    tensors = [(tensor.data_ptr(), tensor.numel()) for tensor in numbers]
    _C.coupling_pack(*arguments, tensors, *place, 1)
    for wrong in (tensors[:-1], [*tensors, tensors[0]], tensors[::-1]):
        with pytest.raises(ValueError, match="pack: "):
            _C.coupling_pack(*arguments, wrong, *place, 1)
    with pytest.raises(ValueError, match="too short"):
        _C.coupling_pack(*arguments, tensors, place[0], place[1] - 1, 1)


# --- noise and sampling -----------------------------------------------------------------------


def test_philox_known_answers() -> None:
    """Random123's test vectors for philox4x32-10 (its file kat_vectors)."""
    zero, ones = [np.zeros(1, np.uint64)] * 4, [np.full(1, 0xFFFFFFFF, np.uint64)] * 4
    answers = {
        0: (zero, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        2**64 - 1: (ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    }
    for key, (counter, words) in answers.items():
        assert [int(w[0]) for w in philox4x32(counter, key)] == words


@pytest.mark.parametrize("seed", [0, 1, 12345678901234567890, 2**64 - 1])
@pytest.mark.parametrize("dim", [1, 4, 39, 132])
def test_philox_normal(seed: int, dim: int) -> None:
    arguments = (3, 50, dim, seed, 2**31 + 5)
    got, want = ops.philox_normal(*arguments), reference.philox_normal(*arguments)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    assert torch.equal(ops.philox_normal(3, 50, dim, seed, 2**31 + 4)[1:], got[:2])
    assert torch.equal(ops.philox_normal(3, 20, dim, seed, 2**31 + 5), got[:, :20])
    for normal, whole in ((ops.philox_normal, got), (reference.philox_normal, want)):
        assert torch.equal(normal(3, 37, dim, seed, 2**31 + 5, True, 13), whole[:, 13:])


def test_philox_normal_is_normal() -> None:
    noise = ops.philox_normal(4, 20_000, 7, seed=3).double()
    values = noise.flatten()
    count = values.numel()
    assert abs(float(values.mean())) < 4.0 / count**0.5
    assert abs(float(values.var()) - 1.0) < 4.0 * (2.0 / count) ** 0.5
    ordered = values.sort().values
    expected = torch.special.ndtr(ordered)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert float((expected - places).abs().max()) < 1.95 / count**0.5  # Kolmogorov, p = 0.001
    correlation = torch.corrcoef(noise.reshape(-1, 7).T) - torch.eye(7, dtype=torch.float64)
    assert float(correlation.abs().max()) < 4.5 / (count / 7) ** 0.5


@pytest.mark.parametrize("fixed_dim", [0, 3, 9])
@pytest.mark.parametrize("include_mode", [False, True])
def test_sample(fixed_dim: int, include_mode: bool) -> None:
    layers, index = random_layers(9, 4)
    packed = ops.PackedFlow(layers, index, 9, 4, dtype=torch.float64)
    _, cond = random_inputs(3, 1, 9, 4)
    fixed = torch.randn(3, fixed_dim, dtype=torch.float64) if fixed_dim else None
    x, log_prob = packed.sample(cond, 20, 5, None, 7, fixed, include_mode)
    noise = reference.philox_normal(3, 20, 9 - fixed_dim, 5, 7, include_mode).double()
    z = noise if fixed is None else torch.cat([noise, fixed[:, None].expand(-1, 20, -1)], -1)
    want, log_jac = reference.flow_inverse(layers, index, z, cond)
    torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)
    want_log_prob = reference.standard_normal_log_prob(noise) - log_jac
    torch.testing.assert_close(log_prob, want_log_prob, rtol=1e-5, atol=1e-5)
    if include_mode:
        assert not noise[:, 0].any()
    counter = torch.tensor([2, 6, 0])
    again = packed.sample(cond, 20, 3, None, 1, fixed, include_mode, counter)
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], log_prob)
    for first, last in ((0, 7), (7, 8), (8, 20)):  # a part of the hypotheses
        for counter in (None, torch.tensor([2, 6, first])):
            start = (5, None, 7) if counter is None else (3, None, 1)
            number = first if counter is None else 0
            arguments = (cond, last - first, *start, fixed, include_mode, counter, number)
            part = packed.sample(*arguments)
            assert torch.equal(part[0], x[:, first:last])
            assert torch.equal(part[1], log_prob[:, first:last])
    with pytest.raises(ValueError, match="counter: expected int64"):
        packed.sample(cond, 20, 3, counter=torch.zeros(2, dtype=torch.int64))
    for first in (-1, 2**32 - 19):
        with pytest.raises(ValueError, match="first_sample: expected 0 to"):
            packed.sample(cond, 20, 3, first_sample=first)


@pytest.mark.parametrize("fixed_dim", [0, 2])
def test_sample_through_every_step(fixed_dim: int) -> None:
    layers, index = every_step(9, 4, torch.float64)
    packed = ops.PackedFlow(layers, index, 9, 4, dtype=torch.float64)
    _, cond = random_inputs(3, 1, 9, 4)
    fixed = torch.randn(3, fixed_dim, dtype=torch.float64) if fixed_dim else None
    x, log_prob = packed.sample(cond, 20, 5, fixed=fixed)
    noise = ops.philox_normal(3, 20, 9 - fixed_dim, 5).double()
    z = noise if fixed is None else torch.cat([noise, fixed[:, None].expand(-1, 20, -1)], -1)
    want, log_jac = reference.flow_inverse(layers, index, z, cond)
    torch.testing.assert_close(x, want, rtol=1e-10, atol=1e-10)
    want_log_prob = reference.standard_normal_log_prob(noise) - log_jac
    torch.testing.assert_close(log_prob, want_log_prob, rtol=1e-10, atol=1e-10)


# --- the reference itself ---------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["flow_forward", "flow_inverse"])
@pytest.mark.parametrize("samples", [1, 3])
def test_gradcheck(direction: str, samples: int) -> None:
    layers, index = random_layers(4, 3, hidden=5, count=2, activation="silu")
    x, cond = random_inputs(2, samples, 4, 3)
    leaves = [x, cond, *leaves_of(layers)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def run(x: Tensor, cond: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(reference, direction)(with_leaves(layers, weights), index, x, cond)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_log_jacobian_is_that_of_the_map() -> None:
    layers, index = random_layers(6, 3)
    x, cond = random_inputs(1, 1, 6, 3)
    for run in (reference.flow_forward, reference.flow_inverse):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, run=run: run(layers, index, v[None, None], cond)[0][0, 0], x[0, 0]
        )
        log_jac = run(layers, index, x, cond)[1]
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_jac[0, 0])


def test_vmap_over_images() -> None:
    layers, index = random_layers(6, 3)
    x, cond = random_inputs(4, 5, 6, 3)
    mapped = torch.func.vmap(
        lambda x, cond: reference.flow_forward(layers, index, x[None], cond[None])[0][0]
    )(x, cond)
    torch.testing.assert_close(mapped, reference.flow_forward(layers, index, x, cond)[0])


def test_hoisting_is_exact_algebra() -> None:
    """M rows with one condition, and as many images with one row each."""
    layers, index = random_layers(6, 3)
    x, cond = random_inputs(4, 5, 6, 3)
    rows = x.reshape(20, 1, 6), cond.repeat_interleave(5, 0)
    for run in (reference.flow_forward, reference.flow_inverse):
        hoisted, plain = run(layers, index, x, cond), run(layers, index, *rows)
        torch.testing.assert_close(hoisted[0].reshape(20, 1, 6), plain[0])
        torch.testing.assert_close(hoisted[1].reshape(20, 1), plain[1])


def test_gradients_after_use_in_inference_mode() -> None:
    layers, index = random_layers(6, 3)
    x, cond = random_inputs(2, 3, 6, 3)
    reference._cached_index.cache_clear()
    with torch.inference_mode():
        reference.flow_forward(layers, index, x, cond)
    x.requires_grad_()
    reference.flow_forward(layers, index, x, cond)[0].sum().backward()
    assert x.grad is not None


def test_unknown_names() -> None:
    layers, index = random_layers(6, 3, count=1)
    x, cond = random_inputs(1, 1, 6, 3)
    net = replace(layers[0].nets[0], activation="softplus")
    for wrong in ({"nets": (net,)}, {"clamp_activation": "erf"}):
        with pytest.raises(ValueError, match="expected one of"):
            reference.flow_forward([replace(layers[0], **wrong)], index, x, cond)
