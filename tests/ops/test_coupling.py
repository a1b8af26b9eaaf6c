"""The coupling kernels against the reference, and the reference against finite differences."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasthyp.ops import coupling as ops
from fasthyp.reference import coupling as reference
from fasthyp.reference.coupling import ACTIVATIONS, CLAMP_ACTIVATIONS, CouplingLayer, Dense, mlp
from fasthyp.reference.philox import philox4x32
from tests.conftest import assert_as_good_as, max_error


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
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


def leaves_of(layers: Sequence[CouplingLayer]) -> list[Tensor]:
    """The weights and biases of plain MLPs."""
    found = [
        (part.weight, part.bias) for layer in layers for net in layer.nets for part in net.layers
    ]
    return [tensor for pair in found for tensor in pair if tensor is not None]


def with_leaves(layers: Sequence[CouplingLayer], leaves: Sequence[Tensor]) -> list[CouplingLayer]:
    rest = list(leaves)

    def dense(part: Dense) -> Dense:
        weight = rest.pop(0)
        return replace(part, weight=weight, bias=None if part.bias is None else rest.pop(0))

    return [
        replace(
            layer,
            nets=tuple(replace(net, layers=tuple(map(dense, net.layers))) for net in layer.nets),
        )
        for layer in layers
    ]


def as_dtype(layers: list[CouplingLayer], dtype: torch.dtype) -> list[CouplingLayer]:
    return [with_leaves([layer], [t.to(dtype) for t in leaves_of([layer])])[0] for layer in layers]


def assert_equals_reference(
    layers: list[CouplingLayer],
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


@pytest.mark.usefixtures("_restored_threads")
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


@pytest.mark.usefixtures("_restored_threads")
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
    first, *rest = leaves_of(layers[:1])
    wrong = with_leaves(layers[:1], [first[:, 1:], *rest])
    with pytest.raises(ValueError, match="expected a weight"):
        ops.PackedFlow(wrong, index, 9, 4)


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
