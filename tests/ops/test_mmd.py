"""The maximum mean discrepancy: the official codes' numbers, the reference's, gradients, laws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import Tensor

import fasthyp
from fasthyp import _C
from fasthyp.ops import mmd as ops
from fasthyp.reference import mmd as reference
from tests.conftest import Golden, assert_as_good_as, golden_files, max_error

WIDTHS = (0.05, 0.2, 0.9)
KERNELS, ESTIMATORS = ops.KERNELS, ops.ESTIMATORS
SHAPES = [
    (3, 25, 25, 2),
    (2, 7, 70, 3),
    (1, 2, 3, 1),
    (2, 129, 66, 5),  # several blocks, done by one thread
    (2, 300, 290, 3),  # more than one thread does
    (1, 530, 2, 17),
]
"""Problems, N, P, D."""


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)
    threads, level = torch.get_num_threads(), _C.simd_level()
    yield
    torch.set_num_threads(threads)
    _C.set_simd_level(level)


def samples(
    count: int, n: int, p: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Two sets that overlap, with a pair of equal samples in x and one across."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(count, n, dim, generator=generator, dtype=torch.float64)
    y = 0.4 * torch.randn(count, p, dim, generator=generator, dtype=torch.float64) + 0.1
    x[:, 1] = x[:, 0]
    y[:, 1] = x[:, -1]
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def some_weights(count: int, n: int, seed: int = 0) -> Tensor:
    """A third of them zero, the first two not."""
    weights = torch.rand(count, n, generator=torch.Generator().manual_seed(seed))
    weights[:, 2::3] = 0
    return weights


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        (value * torch.linspace(-1, 2, value.numel())).sum(), inputs, retain_graph=True
    )


# --- the official codes ---


@pytest.mark.parametrize("path", golden_files("mmd_*.npz"))
def test_values_and_gradients_are_the_official_ones(path: Path) -> None:
    golden = Golden(path)
    x, y = (golden[f"in/{name}"].requires_grad_() for name in "xy")
    value = fasthyp.mmd2(x, y)
    cotangent = golden["in/w"] if "in/w" in golden.names else torch.ones(())
    (value * cotangent).sum().backward()
    assert_as_good_as(value, golden["out/mmd"], golden["out64/mmd"], "mmd")
    for name, samples in (("x", x), ("y", y)):
        assert samples.grad is not None
        assert_as_good_as(
            samples.grad, golden[f"grad/{name}"], golden[f"grad64/{name}"], name, times=1.0
        )


@pytest.mark.parametrize("path", golden_files("mmd_*.npz"))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_both_estimators_in_float64(
    path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTHYP_BACKEND", backend)
    golden = Golden(path)
    x, y = (golden[f"in/{name}"].double().requires_grad_() for name in "xy")
    for estimator in ESTIMATORS:
        value = fasthyp.mmd2(x, y, estimator=estimator)
        torch.testing.assert_close(
            value, golden[f"out64/direct_{estimator}"], rtol=1e-11, atol=1e-14
        )
    cotangent = golden["in/w"] if "in/w" in golden.names else torch.ones(())
    found = torch.autograd.grad((fasthyp.mmd2(x, y) * cotangent).sum(), (x, y))
    for name, grad in zip("xy", found, strict=True):
        torch.testing.assert_close(grad, golden[f"grad64/{name}"], rtol=1e-7, atol=1e-11)


# --- the reference ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("level", _C.simd_levels())
def test_the_reference_in_float64(
    shape: tuple[int, int, int, int], kernel: Any, estimator: Any, weighted: bool, level: str
) -> None:
    _C.set_simd_level(level)
    x, y = samples(*shape)
    weights = None
    if weighted:
        weights = some_weights(*shape[:2])
    expected = reference.mmd2(x, y, WIDTHS, kernel, estimator == "unbiased", weights)
    value = fasthyp.mmd2(x, y, WIDTHS, kernel, estimator, weights)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(gradients(value, x, y), gradients(expected, x, y), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    with torch.no_grad():  # the value alone takes another path
        alone = fasthyp.mmd2(x, y, WIDTHS, kernel, estimator, weights)
    torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-14)
    for leaf, other in ((x, y.detach()), (y, x.detach())):
        sets = (leaf, other) if leaf is x else (other, leaf)
        value = fasthyp.mmd2(*sets, WIDTHS, kernel, estimator, weights)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        found, theirs = gradients(value, leaf)[0], gradients(expected, leaf)[0]
        torch.testing.assert_close(found, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("level", _C.simd_levels())
def test_float32_is_as_good_as_the_reference(
    shape: tuple[int, int, int, int], kernel: Any, level: str
) -> None:
    _C.set_simd_level(level)
    x, y = samples(*shape, dtype=torch.float32)
    arguments = WIDTHS, kernel, False
    peer = reference.mmd2(x, y, *arguments)
    wide = [s.detach().double().requires_grad_() for s in (x, y)]
    exact = reference.mmd2(*wide, *arguments)
    value = fasthyp.mmd2(x, y, *arguments[:2])
    assert value.dtype == torch.float32
    # what is subtracted from each other is of the order of the number of widths
    assert max_error(value, exact) < 4e-7 * len(WIDTHS)
    ours, theirs, best = gradients(value, x, y), gradients(peer, x, y), gradients(exact, *wide)
    for i, name in enumerate("xy"):
        assert_as_good_as(ours[i], theirs[i], best[i], name, times=4.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(kernel: Any, estimator: Any) -> None:
    x, y = samples(2, 5, 4, 3)
    weights = some_weights(2, 5)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fasthyp.mmd2(x, y, (0.3, 1.1), kernel, estimator, weights)

    assert torch.autograd.gradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(loss, (x, y))


def test_x_and_y_of_one_tensor() -> None:
    """Gradients of both places add up."""
    both = samples(1, 9, 9, 2)[0]
    other = samples(1, 9, 9, 2, seed=1)[0].detach()
    for first, second in ((both, both * 0.9), (both[:, :4], both[:, 3:]), (both, other)):
        value = fasthyp.mmd2(first, second, (0.4,))
        expected = reference.mmd2(first, second, (0.4,), KERNELS[0], False)
        torch.testing.assert_close(gradients(value, both), gradients(expected, both))
    value = fasthyp.mmd2(both, both)
    assert float(value.detach().abs().max()) < 1e-15
    assert float(gradients(value, both)[0].abs().max()) < 1e-13


def test_equal_samples_have_finite_gradients() -> None:
    x = torch.zeros(2, 6, 3, requires_grad=True)
    y = torch.zeros(2, 4, 3, requires_grad=True)
    for kernel in KERNELS:
        for grad in gradients(fasthyp.mmd2(x, y, kernel=kernel), x, y):
            assert torch.equal(grad, torch.zeros_like(grad))


# --- laws ---

_sizes = st.tuples(st.integers(1, 3), st.integers(2, 90), st.integers(2, 90), st.integers(1, 9))


@settings(max_examples=25, deadline=None)
@given(_sizes, st.sampled_from(KERNELS), st.integers(0, 1000))
def test_laws(shape: tuple[int, int, int, int], kernel: Any, seed: int) -> None:
    x, y = (s.detach() for s in samples(*shape, seed=seed))
    close = {"rtol": 1e-11, "atol": 1e-14}
    for estimator in ESTIMATORS:
        value = fasthyp.mmd2(x, y, WIDTHS, kernel, estimator)
        generator = torch.Generator().manual_seed(seed)
        shuffled = [s[:, torch.randperm(s.shape[1], generator=generator)] for s in (x, y)]
        again = fasthyp.mmd2(*shuffled, WIDTHS, kernel, estimator)
        torch.testing.assert_close(again, value, **close)
        swapped = fasthyp.mmd2(y, x, WIDTHS, kernel, estimator)
        torch.testing.assert_close(swapped, value, **close)
        moved = fasthyp.mmd2(x + 8, y + 8, WIDTHS, kernel, estimator)
        torch.testing.assert_close(moved, value, rtol=1e-8, atol=1e-10)
    assert (fasthyp.mmd2(x, y, WIDTHS, kernel) > -1e-14).all()
    assert (fasthyp.mmd2(x, x, WIDTHS, kernel).abs() < 1e-14).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_unbiased_averages_zero(kernel: Any) -> None:
    """Both sets from one distribution, with weights or without."""
    x, y = torch.randn(2, 2000, 12, 2, generator=torch.Generator().manual_seed(1)).double()
    for weights in (None, some_weights(2000, 12)):
        value = fasthyp.mmd2(x, y, (0.5, 2.0), kernel, "unbiased", weights)
        error = value.std() / math.sqrt(len(value))
        assert value.mean().abs() < 3 * error
        assert fasthyp.mmd2(x, y, (0.5, 2.0), kernel, "biased", weights).mean() > 20 * error


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_sample_test(kernel: Any, estimator: Any) -> None:
    """Gretton et al., JMLR 2012: at 5% it rejects 5% of equal pairs, and most of unequal ones.

    What the value is compared with are the Gram matrices' values for 99 random splits of the
    samples, so a value of another scale or bias would reject more or less often.
    """
    pairs, n, splits = 1000, 12, 99
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, pairs, n, 2, generator=generator, dtype=torch.float64)
    signs = torch.full((pairs, splits, 2 * n), -1.0 / n, dtype=torch.float64)
    order = torch.rand(signs.shape, generator=generator).argsort(-1)
    signs.scatter_(-1, order[..., :n], 1.0 / n)

    def rejections(x: Tensor, y: Tensor) -> int:
        pool = torch.cat((x, y), 1)
        squares = (pool[:, :, None] - pool[:, None]).square().sum(-1)
        gram = sum(
            (-squares / (2 * a * a)).exp() if kernel == "rbf" else a * a / (a * a + squares)
            for a in (0.5, 2.0)
        )
        null = (signs @ gram * signs).sum(-1)  # (pairs, splits): the biased estimates
        if estimator == "unbiased":  # from sums over the pairs of two samples
            alone = gram.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
            everything = gram.sum((1, 2))[:, None] - alone
            difference = n * n * null - alone  # within the sets less across them
            within, across = (everything + difference) / 2, (everything - difference) / 2
            null = within / (n * (n - 1)) - across / n**2
        value = fasthyp.mmd2(x, y, (0.5, 2.0), kernel, estimator)
        return int(((null >= value[:, None]).sum(1) < 5).sum())  # of 100 values the greatest five

    assert binomtest(rejections(x, y), pairs, 0.05).pvalue > 1e-3
    assert rejections(x, y + 2.0) > 0.9 * pairs


# --- weights ---


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n", [40, 400])
def test_a_mask_selects_samples(estimator: Any, n: int) -> None:
    x, y = samples(1, n, n + 30, 3)
    keep_x, keep_y = torch.arange(n) % 3 > 0, torch.arange(n + 30) % 5 < 3
    with torch.no_grad():  # what is masked may be anything
        x[0, 0], y[0, 3], y[0, 4] = math.nan, math.inf, math.nan
    masks = {"x_weights": keep_x[None], "y_weights": 7.5 * keep_y[None]}
    value = fasthyp.mmd2(x, y, estimator=estimator, **masks)
    expected = fasthyp.mmd2(x[:, keep_x], y[:, keep_y], estimator=estimator)
    torch.testing.assert_close(value, expected)
    ours, theirs = gradients(value, x, y), gradients(expected, x, y)
    torch.testing.assert_close(ours, theirs)
    assert not ours[0][:, ~keep_x].any()
    assert not ours[1][:, ~keep_y].any()


def test_repeated_samples_are_weights() -> None:
    x, y = samples(2, 6, 5, 2)
    times = torch.tensor([2, 1, 3, 1, 1, 2])
    value = fasthyp.mmd2(x, y, x_weights=times.expand(2, 6))
    torch.testing.assert_close(value, fasthyp.mmd2(x.repeat_interleave(times, 1), y))


def test_all_weights_zero() -> None:
    x, y = samples(2, 6, 5, 2)
    weights = torch.ones(2, 6)
    weights[0] = 0
    value = fasthyp.mmd2(x, y, x_weights=weights)
    assert value.isnan().tolist() == [True, False]
    weights[0, 0] = 1
    assert fasthyp.mmd2(x, y, x_weights=weights).isfinite().all()
    value = fasthyp.mmd2(x, y, estimator="unbiased", x_weights=weights)
    assert value.isnan().tolist() == [True, False]


# --- the same whatever the machine ---


@pytest.mark.parametrize("shape", [(5, 25, 31, 2), (3, 300, 290, 3), (1, 700, 20, 5)])
@pytest.mark.parametrize("level", _C.simd_levels())
def test_threads_and_splits(shape: tuple[int, int, int, int], level: str) -> None:
    _C.set_simd_level(level)
    x, y = samples(*shape, dtype=torch.float32)

    def results(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        value = fasthyp.mmd2(x, y)
        return value, *torch.autograd.grad(value.sum(), (x, y))

    expected = results(x, y)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for ours, theirs in zip(results(x, y), expected, strict=True):
            assert torch.equal(ours, theirs)
    for i in range(shape[0]):
        one = slice(i, i + 1)
        for ours, theirs in zip(results(x[one], y[one])[:1], expected, strict=False):
            assert torch.equal(ours, theirs[one])


def test_nan_stays_in_its_problem() -> None:
    for n in (25, 600):
        x, y = samples(3, n, n, 2, dtype=torch.float32)
        expected = fasthyp.mmd2(x, y)
        with torch.no_grad():
            x[1, n // 2, 1] = math.nan
        value = fasthyp.mmd2(x, y)
        assert value.isnan().tolist() == [False, True, False]
        assert torch.equal(value[::2], expected[::2])
        for grad in torch.autograd.grad(value.sum(), (x, y)):
            assert grad[::2].isfinite().all()
            assert grad[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_and_near(dtype: torch.dtype) -> None:
    """Distances beyond all widths, and widths beyond all distances."""
    x = torch.tensor([[0.0], [1e18]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[-1e18], [3e17]], dtype=dtype, requires_grad=True)
    for kernel in KERNELS:
        for widths in ((1e-9,), (1e-9, 1.0), (1e9,)):
            value = fasthyp.mmd2(x, y, widths, kernel)
            torch.testing.assert_close(value.detach(), torch.tensor(float(len(widths))).to(dtype))
            assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, (x, y)))


# --- arguments ---


def test_shapes_and_dtypes() -> None:
    x, y = torch.randn(2, 4, 6, 3), torch.randn(2, 4, 5, 3)
    expected = fasthyp.mmd2(x, y)
    assert expected.shape == (2, 4)
    assert fasthyp.mmd2(x[0, 0], y[0, 0]).shape == ()
    assert torch.equal(fasthyp.mmd2(x[0, 0], y[0, 0]), expected[0, 0])
    assert fasthyp.mmd2(x[:0], y[:0]).shape == (0, 4)
    for half in (torch.bfloat16, torch.float16):
        ours = fasthyp.mmd2(x.to(half).requires_grad_(), y.to(half))
        assert ours.dtype == torch.float32
        assert torch.equal(ours, fasthyp.mmd2(x.to(half).float(), y.to(half).float()))
        ours.sum().backward()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(fasthyp.mmd2(turned, y), expected)
    assert torch.equal(fasthyp.mmd2(x, y[:, :1].expand(2, 4, 5, 3))[:, 0], expected[:, 0])
    empty = torch.zeros(0, 3, 2, requires_grad=True)
    fasthyp.mmd2(empty, empty).sum().backward()
    assert empty.grad is not None


def test_gradients_that_are_not_contiguous() -> None:
    x, y = samples(6, 5, 4, 2)
    value = fasthyp.mmd2(x, y)
    for cotangent in (
        torch.ones(()).double().expand(6),
        torch.arange(12.0, dtype=torch.float64)[::2],
        torch.arange(6.0, dtype=torch.float64).flip(0),
    ):
        found = torch.autograd.grad(value, (x, y), cotangent, retain_graph=True)
        expected = torch.autograd.grad(value, (x, y), cotangent.clone(), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


X, Y = torch.zeros(2, 5, 3), torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X.numpy()}, TypeError, "x: expected a torch.Tensor, got ndarray"),
        ({"y": None}, TypeError, "y: expected a torch.Tensor, got NoneType"),
        ({"x": X.int()}, TypeError, "x: expected float32 or float64, got .*int32"),
        ({"y": Y.double()}, TypeError, "y: expected torch.float32 as x, got torch.float64"),
        ({"y": Y.to("meta")}, ValueError, "y: expected on cpu as x, got it on meta"),
        ({"x": X[0, 0]}, ValueError, r"x: expected shape \(..., N, D\), got \(3,\)"),
        ({"x": X[:, :0]}, ValueError, "x: expected at least 1 samples .* biased .*, got 0"),
        ({"x": X[..., :0]}, ValueError, "x: expected samples of 1 to .* numbers, got 0"),
        ({"y": Y[..., :2]}, ValueError, r"y: expected shape \(2, 'P', 3\) .*, got \(2, 4, 2\)"),
        ({"y": Y[:1]}, ValueError, r"y: expected shape .*, got \(1, 4, 3\)"),
        ({"y": Y[0]}, ValueError, r"y: expected shape .*, got \(4, 3\)"),
        ({"x": X[:, :1], "estimator": "unbiased"}, ValueError, "x: .* 2 samples .*unbiased.* 1"),
        ({"y": Y[:, :1], "estimator": "unbiased"}, ValueError, "y: .* 2 samples .*unbiased.* 1"),
        ({"bandwidths": ()}, ValueError, "bandwidths: expected 1 to 16, got 0"),
        ({"bandwidths": [1.0] * 17}, ValueError, "bandwidths: expected 1 to 16, got 17"),
        ({"bandwidths": (0.5, 0.0)}, ValueError, "bandwidths: expected .* got 0"),
        ({"bandwidths": (-0.5,)}, ValueError, "bandwidths: expected .* got -0.5"),
        ({"bandwidths": (math.nan,)}, ValueError, "bandwidths: expected .* got nan"),
        ({"bandwidths": (math.inf,)}, ValueError, "bandwidths: expected .* got inf"),
        ({"bandwidths": 0.5}, TypeError, "bandwidths: expected a sequence of numbers, got 0.5"),
        ({"bandwidths": ("wide",)}, TypeError, "bandwidths: expected a sequence of numbers"),
        ({"kernel": "linear"}, ValueError, "kernel: expected one of inverse.*, got 'linear'"),
        ({"estimator": "best"}, ValueError, "estimator: expected one of biased.*, got 'best'"),
        ({"x_weights": [1.0]}, TypeError, "x_weights: expected a torch.Tensor, got list"),
        ({"x_weights": X[..., 0].cfloat()}, TypeError, "x_weights: expected real numbers, got"),
        ({"x_weights": X}, ValueError, r"x_weights: expected shape \(2, 5\), got \(2, 5, 3\)"),
        ({"y_weights": X[..., 0]}, ValueError, r"y_weights: expected shape \(2, 4\), got \(2, 5\)"),
        ({"y_weights": -Y[..., 0]}, ValueError, "y_weights: expected no negative weight, got -1"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fasthyp.mmd2(**{"x": X, "y": Y, **arguments})


# --- the loss ---


def test_loss() -> None:
    x, y = samples(3, 8, 6, 2)
    options = {"bandwidths": (0.3, 1.0), "kernel": "rbf", "estimator": "unbiased"}
    value = fasthyp.mmd2(x, y, **options)
    for reduction, expected in (("mean", value.mean()), ("sum", value.sum()), ("none", value)):
        assert torch.equal(fasthyp.MMDLoss(**options, reduction=reduction)(x, y), expected)
    weights = some_weights(3, 8), some_weights(3, 6)
    torch.testing.assert_close(
        fasthyp.MMDLoss(**options)(x, y, *weights),
        fasthyp.mmd2(x, y, **options, x_weights=weights[0], y_weights=weights[1]).mean(),
    )
    for blocked, other in ((x, y), (y, x)):
        name = "x" if blocked is x else "y"
        loss = fasthyp.MMDLoss(**options, block_grad=name)(x, y)
        found = torch.autograd.grad(loss, (blocked, other), allow_unused=True)
        assert found[0] is None
        torch.testing.assert_close(
            found[1], torch.autograd.grad(value.mean(), other, retain_graph=True)[0]
        )
    assert "block_grad='y'" in repr(fasthyp.MMDLoss(block_grad="y"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction: expected mean, sum or none, got 'max'"),
        ({"block_grad": "z"}, "block_grad: expected 'x', 'y' or None, got 'z'"),
        ({"kernel": "cubic"}, "kernel: expected one of"),
        ({"estimator": "best"}, "estimator: expected one of"),
        ({"bandwidths": (0,)}, "bandwidths: expected numbers from"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fasthyp.MMDLoss(**options)


# --- the op ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
def test_opcheck(dtype: torch.dtype, weighted: bool, wanted: tuple[bool, bool]) -> None:
    x, y = samples(2, 5, 4, 3, dtype=dtype)
    x, y = (s.detach().requires_grad_(need) for s, need in zip((x, y), wanted, strict=True))
    weights = (some_weights(2, 5), some_weights(2, 4)) if weighted else (None, None)
    op = torch.ops.fasthyp.mmd2.default
    torch.library.opcheck(op, (x, y, *weights, [0.3, 0.9], "rbf", "unbiased", *wanted))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(reference, "mmd2")  # both passes take the kernels

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (fasthyp.mmd2(x.sin(), y) * 2).sum()

    x, y = samples(2, 9, 8, 3)
    expected = loss(x, y)
    value = torch.compile(loss, fullgraph=True, dynamic=dynamic)(x, y)
    assert torch.equal(value, expected)
    ours, theirs = (torch.autograd.grad(v, (x, y)) for v in (value, expected))
    torch.testing.assert_close(ours, theirs)


def test_function_transforms() -> None:
    x, y = (s.detach() for s in samples(3, 9, 8, 2))
    weights = some_weights(3, 9)
    value = fasthyp.mmd2(x, y, x_weights=weights)

    def mmd2(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return fasthyp.mmd2(x, y, x_weights=weights)

    torch.testing.assert_close(torch.func.vmap(mmd2)(x, y, weights), value)
    shared = fasthyp.mmd2(x, y[0].expand(3, 8, 2), x_weights=weights)
    torch.testing.assert_close(torch.func.vmap(mmd2, (0, None, 0))(x, y[0], weights), shared)
    found = torch.func.grad(lambda x: mmd2(x, y, weights).sum())(x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(mmd2(leaf, y, weights).sum(), leaf)[0]
    torch.testing.assert_close(found, expected)


# --- CUDA ---

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cuda_mmd_is_that_of_the_cpu(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: Any, estimator: Any
) -> None:
    assert_cuda_equals_the_cpu(shape, dtype, kernel, estimator)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(1088, 25, 25, 2), (1, 1500, 1400, 48), (2, 300, 20, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_large(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_cuda_equals_the_cpu(shape, dtype, KERNELS[0], ESTIMATORS[0])


def assert_cuda_equals_the_cpu(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: Any, estimator: Any
) -> None:
    x, y = samples(*shape, dtype=dtype)
    there = [s.detach().cuda().requires_grad_() for s in (x, y)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for weights in (None, some_weights(*shape[:2])):
        ours = None if weights is None else weights.cuda()
        value = fasthyp.mmd2(x, y, WIDTHS, kernel, estimator, weights)
        cuda = fasthyp.mmd2(*there, WIDTHS, kernel, estimator, ours)
        torch.testing.assert_close(cuda.cpu(), value, rtol=tolerance, atol=tolerance / 10)
        with torch.no_grad():
            alone = fasthyp.mmd2(*there, WIDTHS, kernel, estimator, ours)
        torch.testing.assert_close(alone.cpu(), value, rtol=tolerance, atol=tolerance / 10)
        cpu_grads = torch.autograd.grad(value.sum(), (x, y))
        for on_cuda, on_cpu in zip(torch.autograd.grad(cuda.sum(), there), cpu_grads, strict=True):
            scale = float(on_cpu.abs().max())
            torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=tolerance * scale)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(64, 25, 25, 2), (1, 900, 800, 5)])
def test_cuda_streams_and_graph(shape: tuple[int, int, int, int]) -> None:
    x, y = (s.detach().cuda().requires_grad_() for s in samples(*shape, dtype=torch.float32))

    def results(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        value = fasthyp.mmd2(x, y)
        return value, *torch.autograd.grad(value.sum(), (x, y))

    expected = results(x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = results(x, y)
    stream.synchronize()
    for ours, theirs in zip(other, expected, strict=True):
        assert torch.equal(ours, theirs)
    static = [torch.zeros_like(s).requires_grad_() for s in (x, y)]
    with torch.cuda.stream(stream):
        results(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(*static)
    with torch.no_grad():
        for to, source in zip(static, (x, y), strict=True):
            to.copy_(source)
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)
