"""Uncertainty: POCO's numbers, calibration where it is known, correlation, sparsification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fasthyp.metrics import (
    SMPL_PARENTS,
    body_uncertainty,
    calibration_curve,
    confidence_rank,
    kinematic_uncertainty,
    pearson,
    sparsification,
)
from tests.conftest import Golden, golden_files


@pytest.mark.parametrize("path", golden_files("poco_losses_uncert_utils.npz"))
def test_poco(path: Path) -> None:
    golden = Golden(path)
    sigma, parts = golden["in/var"], golden["in/var9"].mean((-2, -1))
    kinematic = kinematic_uncertainty(sigma)
    for name in ("kinematic", "kinematic_torch"):
        torch.testing.assert_close(kinematic, golden[f"out/{name}"], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        kinematic_uncertainty(parts), golden["out/prepare"], rtol=1e-5, atol=0
    )
    cliff = body_uncertainty(sigma, root_only=True)
    torch.testing.assert_close(cliff, golden["out/global_cliff"], rtol=1e-6, atol=0)
    torch.testing.assert_close(body_uncertainty(sigma), golden["out/global_pare"])
    assert torch.equal(sigma, golden["in/var"])  # theirs is changed in place


def test_body_uncertainty() -> None:
    sigma = torch.tensor([[0.3, 0.1, 0.2], [0.5, 0.1, 0.3], [0.9, 0.0, 0.0]])
    torch.testing.assert_close(body_uncertainty(sigma), torch.tensor([0.2, 1.0, 1.0]))
    torch.testing.assert_close(
        body_uncertainty(sigma, root_only=True), torch.tensor([0.3, 0.5, 1.0])
    )
    chain = kinematic_uncertainty(torch.tensor([1.0, 2.0, 4.0, 8.0]), (-1, 0, 1, 1))
    assert chain.tolist() == [1, 3, 7, 11]
    assert len(SMPL_PARENTS) == 24


# --- calibration ---


def gaussian(images: int, number: int, width: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hypotheses as wide as the truth's distribution, times a factor."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.3, 5.0]])
    drawn = width * torch.randn(images, number, 4, 3, generator=generator) @ skew
    return drawn + 50, torch.randn(images, 4, 3, generator=generator) @ skew + 50


def test_calibration_of_a_known_distribution() -> None:
    ranks = confidence_rank(*gaussian(2000, 300, 1.0))
    assert ranks.shape == (2000, 4)
    levels = torch.linspace(0.05, 0.95, 19).double()
    coverage, error = calibration_curve(ranks)
    torch.testing.assert_close(coverage, levels, rtol=0, atol=0.02)
    assert error < 0.01
    sure, sure_error = calibration_curve(confidence_rank(*gaussian(500, 300, 0.5)))
    assert (sure < levels - 0.02).all()
    unsure, _ = calibration_curve(confidence_rank(*gaussian(500, 300, 2.0)))
    assert (unsure > levels + 0.02).all()
    assert sure_error > 0.1


def test_ranks_are_exact_in_one_dimension() -> None:
    drawn = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])[None, :, None, None]
    for truth, rank in ((0.0, 0.0), (0.5, 0.2), (2.0, 0.6), (-2.0, 0.6), (10.0, 1.0)):
        found = confidence_rank(drawn, torch.full((1, 1, 1), truth))
        assert float(found) == pytest.approx(rank)
    coverage, error = calibration_curve(torch.tensor([0.2, 0.6, torch.nan, 1.0]), (0.2, 0.5, 0.6))
    assert coverage.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert float(error) == pytest.approx((0.2 + 1 / 3 - 0.2 + 0.5 - 1 / 3 + 2 / 3 - 0.6 - 0.2) / 3)
    coverage, error = calibration_curve(torch.full((3,), torch.nan))
    assert coverage.isnan().all()
    assert error.isnan()


def test_ranks_do_not_depend_on_an_affine_map() -> None:
    drawn, truth = (x.double() for x in gaussian(20, 50, 1.0))
    want = confidence_rank(drawn, truth)
    matrix = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 1.0], [3.0, 0.0, 1.0]]).double()
    found = confidence_rank(drawn @ matrix + 7, truth @ matrix + 7)
    torch.testing.assert_close(found, want, rtol=0, atol=0.021)  # of 50, one may change places
    assert (found == want).double().mean() > 0.99


def test_degenerate_hypotheses() -> None:
    drawn, truth = gaussian(3, 20, 1.0)
    drawn[0] = 1.0  # all the same
    drawn[1, ..., 2] = 0  # in a plane, the truth outside
    drawn[2, 3, 0, 0] = torch.nan
    ranks = confidence_rank(drawn, truth)
    assert torch.equal(ranks[:2], torch.ones(2, 4))
    assert ranks[2].isnan().tolist() == [True, False, False, False]
    assert confidence_rank(drawn[:, :2], truth)[:2].isfinite().all()


# --- correlation ---


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), number=st.integers(2, 200), offset=st.floats(-1e6, 1e6))
def test_pearson_is_scipys(seed: int, number: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, generator=generator, dtype=torch.float64)
    y = 0.5 * x + torch.randn(number, generator=generator, dtype=torch.float64)
    x = x + offset
    want = stats.pearsonr(x.numpy(), y.numpy())[0]
    assert float(pearson(x, y)) == pytest.approx(want, abs=1e-9)
    assert float(pearson(-2 * x, y)) == pytest.approx(-want, abs=1e-9)


def test_pearson_where_it_is_not_defined() -> None:
    x = torch.arange(5.0)
    assert pearson(x, 3 * x + 1) == 1
    assert pearson(x, torch.full((5,), 0.1)).isnan()
    assert pearson(torch.full((5,), 0.1), x).isnan()
    assert pearson(x[:1], x[:1]).isnan()
    assert pearson(x[:0], x[:0]).isnan()
    assert pearson(x.half(), x.half()).dtype == torch.float32
    far = 1e4 + torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert float(pearson(far, far)) == pytest.approx(1, abs=1e-6)


# --- sparsification ---


def test_sparsification_by_hand() -> None:
    error = torch.tensor([1.0, 4.0, 3.0, 2.0])
    uncertainty = torch.tensor([0.1, 0.2, 0.4, 0.3])
    found = sparsification(uncertainty, error, steps=4)
    assert found.fraction.tolist() == [0, 0.25, 0.5, 0.75]
    assert found.error.tolist() == pytest.approx([2.5, 7 / 3, 2.5, 1])
    assert found.oracle.tolist() == pytest.approx([2.5, 2, 1.5, 1])
    assert float(found.ause) == pytest.approx((1 / 3 + 1) / 4 / 2.5)
    assert float(found.random) == 2.5
    assert float(sparsification(error, error).ause) == 0
    assert float(sparsification(error, 0 * error).ause) == 0
    assert float(sparsification(-error, error).ause) > 0
    assert sparsification(error[:1], error[:1], 7).error.tolist() == [1] * 7


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), number=st.integers(1, 300), steps=st.integers(1, 120))
def test_nothing_beats_the_oracle(seed: int, number: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(number, generator=generator, dtype=torch.float64)
    found = sparsification(
        torch.rand(number, generator=generator, dtype=torch.float64), error, steps
    )
    assert (found.oracle <= found.error + 1e-12).all()
    assert (found.oracle.diff() <= 1e-12).all()
    assert float(found.error[0]) == pytest.approx(float(error.mean()))
    assert -1e-12 <= found.ause <= number


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: pearson(ONES, torch.ones(4)), ValueError, r"error.*\(3,\).*\(4,\)"),
        (lambda: pearson(ONES, ONES.double()), TypeError, "error.*float32.*float64"),
        (lambda: pearson(ONES.long(), ONES), TypeError, "uncertainty.*int64"),
        (lambda: sparsification(ONES, -ONES), ValueError, "error.*below zero"),
        (lambda: sparsification(ONES * torch.nan, ONES), ValueError, "uncertainty.*NaN"),
        (lambda: sparsification(ONES[:0], ONES[:0]), ValueError, "at least one"),
        (lambda: sparsification(ONES, ONES, 0), ValueError, "steps"),
        (lambda: calibration_curve(ONES, (0.5, 1.5)), ValueError, "levels.*0 to 1"),
        (lambda: calibration_curve(ONES, (0.5, 0.5)), ValueError, "ascending"),
        (lambda: confidence_rank(torch.ones(2, 1, 4, 3), torch.ones(2, 4, 3)), ValueError, "two"),
        (
            lambda: confidence_rank(torch.ones(2, 5, 4, 3), torch.ones(2, 3, 3)),
            ValueError,
            "truth.*3, 3",
        ),
        (lambda: kinematic_uncertainty(ONES), ValueError, r"uncertainty.*24.*\(3,\)"),
        (lambda: kinematic_uncertainty(ONES, (-1, 2, 0)), ValueError, "parents"),
        (lambda: body_uncertainty(torch.tensor(1.0)), ValueError, "uncertainty"),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()
