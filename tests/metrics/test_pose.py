"""Errors of poses: the official codes' numbers, known cases, laws, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasthyp.metrics import (
    CPS_JOINTS,
    PCK_JOINTS,
    auc,
    correct_poses,
    cps,
    mpjpe,
    n_mpjpe,
    over_hypotheses,
    pck,
    procrustes,
    pve,
    root_centred,
)
from tests.conftest import Golden, assert_as_good_as, golden_files
from tests.metrics.test_procrustes import poses

FUNCTIONS: list[Callable[..., Tensor]] = [mpjpe, n_mpjpe, pve, pck, auc, cps]


@pytest.mark.parametrize("path", golden_files("w21_losses_metrics.npz"))
def test_wehrbein_et_al(path: Path) -> None:
    golden = Golden(path)
    pred, truth = (golden[f"in/{name}"].mT for name in ("pred", "gt"))
    errors = mpjpe(pred.double(), truth.double())
    statistics = over_hypotheses(errors, dim=0)
    results = {"mp": errors} | {k: getattr(statistics, k) for k in ("best", "worst", "median")}
    for name, value in results.items():
        torch.testing.assert_close(value, golden[f"out64/{name}"], rtol=1e-12, atol=0, msg=name)
    errors = mpjpe(pred, truth)
    assert_as_good_as(errors, golden["out/mp"], golden["out64/mp"])

    few_pred, few_truth = pred[..., PCK_JOINTS, :], truth[..., PCK_JOINTS, :]
    assert torch.equal(pck(few_pred, few_truth), golden["out/pck"])
    assert torch.equal(pck(few_pred[0], few_truth), golden["out/pck1"])
    mask = torch.zeros(17, dtype=torch.bool)
    mask[list(PCK_JOINTS)] = True
    assert torch.equal(pck(pred, truth, mask=mask), golden["out/pck"])

    few_pred, few_truth = pred[..., CPS_JOINTS, :], truth[..., CPS_JOINTS, :]
    assert torch.equal(correct_poses(few_pred, few_truth, [180])[..., 0], golden["out/cp"])
    pred, truth = pred.double(), truth.double()
    aligned = procrustes(pred, truth)(pred)[..., CPS_JOINTS, :]
    few_truth = truth[..., CPS_JOINTS, :]
    curve = golden["out64/cpl"]
    assert torch.equal(correct_poses(aligned, few_truth).double(), curve)
    steps = list(range(10, 301, 10))
    few_pred = pred[0][..., CPS_JOINTS, :]
    assert torch.equal(correct_poses(few_pred, few_truth, steps).double(), golden["out64/cpl1"])
    # The area under the curve of all poses, the best hypothesis at each threshold.
    want = torch.trapezoid(curve.amax(0).mean(0))
    torch.testing.assert_close(cps(aligned, few_truth).amax(0).mean(), want)
    torch.testing.assert_close(cps(aligned, few_truth), torch.trapezoid(curve))


def test_known_errors() -> None:
    truth = poses(3, 4)
    pred = truth.clone()
    pred[:, 1] += torch.tensor([3.0, 4.0, 0.0])
    assert mpjpe(pred, truth).tolist() == pytest.approx([5 / 4] * 3)
    assert pve(pred, truth).tolist() == pytest.approx([5 / 4] * 3)
    # relative to joint 1 all others are off; relative to the mean of 0 and 1 all are, by half
    assert mpjpe(pred, truth, root=1).tolist() == pytest.approx([5 * 3 / 4] * 3)
    assert mpjpe(pred, truth, root=(0, 1)).tolist() == pytest.approx([2.5] * 3)
    mask = torch.tensor([True, True, False, False])
    assert mpjpe(pred, truth, mask).tolist() == pytest.approx([5 / 2] * 3)
    pred[:, 2:] = torch.nan
    assert mpjpe(pred, truth, mask).tolist() == pytest.approx([5 / 2] * 3)
    assert root_centred(truth, 2)[:, 2].abs().max() == 0


def test_thresholds() -> None:
    truth = torch.zeros(1, 4, 3, dtype=torch.float64)
    pred = truth.clone()
    pred[0, :, 0] = torch.tensor([0.0, 5.0, 10.0, 400.0])
    assert float(pck(pred, truth, 10)) == 0.5  # at the threshold is not below it
    assert float(pck(pred, truth, 10.0001)) == 0.75
    # thresholds 0, 5, 10: below them 0, 1, 2 of the joints
    assert float(auc(pred, truth, (0, 5, 10))) == pytest.approx((0 + 1 + 2) / 12)
    assert float(auc(pred, truth)) == pytest.approx((30 + 29 + 28) / (4 * 31))
    near = pred[:, :3]
    assert correct_poses(near, truth[:, :3], (9, 10, 11)).tolist() == [[False, False, True]]
    assert float(cps(near, truth[:, :3])) == pytest.approx(300 - 11 + 0.5)
    assert float(cps(near, truth[:, :3], (0, 10, 20))) == pytest.approx(5)
    assert float(cps(pred, truth)) == 0


def test_n_mpjpe_is_the_least_over_scales() -> None:
    truth = root_centred(poses(5, 17), 0)
    pred = root_centred(0.4 * truth + 0.1 * poses(5, 17, seed=1), 0)
    assert n_mpjpe(0.3 * truth, truth).abs().max() < 1e-14
    torch.testing.assert_close(n_mpjpe(7 * pred, truth), n_mpjpe(pred, truth))
    torch.testing.assert_close(n_mpjpe(pred + 3, truth - 1, root=0), n_mpjpe(pred, truth))
    scales = torch.linspace(0.5, 5, 2001, dtype=torch.float64)[:, None, None, None]
    squares = (scales * pred - truth).square().sum((2, 3))
    best = scales.flatten()[squares.argmin(0)][:, None, None]
    torch.testing.assert_close(n_mpjpe(pred, truth), mpjpe(best * pred, truth), rtol=1e-3, atol=0)
    zero = torch.zeros_like(truth)
    assert torch.equal(n_mpjpe(zero, truth), mpjpe(zero, truth))
    mask = torch.ones(17, dtype=torch.bool)
    mask[5] = False
    pred[:, 5] = 1e6
    torch.testing.assert_close(n_mpjpe(pred, truth, mask), n_mpjpe(pred[:, mask], truth[:, mask]))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks_shapes_and_dtypes(function: Callable[..., Tensor]) -> None:
    pred, truth = 100 * poses(4, 9, 13), 100 * poses(4, 13, seed=1)
    mask = torch.rand(4, 1, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    found = function(pred, truth[:, None], mask=mask)
    assert found.shape == (4, 9)
    for row in range(4):
        chosen = mask[row, 0]
        torch.testing.assert_close(found[row], function(pred[row][:, chosen], truth[row][chosen]))
    mask[1] = False
    empty = function(pred, truth[:, None], mask=mask)[1]
    assert (empty == 0).all() if function is cps else empty.isnan().all()
    assert function(pred[:0], truth[:0, None]).shape == (0, 9)
    for dtype in (torch.float16, torch.float32):
        assert function(pred.to(dtype), truth[:, None].to(dtype)).dtype == torch.float32
    truth[2, 3, 1] = torch.nan
    assert function(pred, truth[:, None]).isnan().all(1).tolist() == [False, False, True, False]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-1e3, 1e3), scale=st.floats(0.01, 100))
def test_laws(seed: int, shift: float, scale: float) -> None:
    pred, truth = poses(3, 7, seed=seed), poses(3, 7, seed=seed + 1)
    error = mpjpe(pred, truth)
    torch.testing.assert_close(mpjpe(truth, pred), error)
    torch.testing.assert_close(mpjpe(pred + shift, truth + shift), error, rtol=1e-9, atol=0)
    torch.testing.assert_close(mpjpe(scale * pred, scale * truth), scale * error)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(mpjpe(pred[:, order], truth[:, order]), error)
    assert (mpjpe(pred, truth) <= mpjpe(pred, pred + 1) + mpjpe(pred + 1, truth) + 1e-12).all()
    # more thresholds passed with a higher one, and PCK is never below what CPS calls correct
    assert (pck(pred, truth, 1.0) <= pck(pred, truth, 2.0)).all()
    assert (correct_poses(pred, truth, [2.0])[:, 0].double() <= pck(pred, truth, 2.0)).all()
    limit = 3 * 2.0**0.5
    assert 0 <= float(cps(pred, truth, (0, limit)).min()) <= limit


def test_gradient() -> None:
    pred, truth = poses(2, 5).requires_grad_(), poses(2, 5, seed=1)
    mask = torch.tensor([True, False, True, True, True])
    assert torch.autograd.gradcheck(lambda x: mpjpe(x, truth, mask, root=(0, 2)), pred)
    assert torch.autograd.gradcheck(lambda x: n_mpjpe(x, truth, mask, root=0), pred)
    mpjpe(pred, pred.detach()).sum().backward()
    assert torch.equal(pred.grad, torch.zeros(2, 5, 3).double())


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda a: mpjpe(a, a, root=13), ValueError, "root.*0 to 12.*13"),
        (lambda a: mpjpe(a, a, root="hip"), TypeError, "root.*'hip'"),
        (lambda a: mpjpe(a, a, root=()), ValueError, "root"),
        (lambda a: mpjpe(a, a, root=True), TypeError, "root"),
        (lambda a: pck(a, a, threshold=float("nan")), ValueError, "thresholds.*finite"),
        (lambda a: pck(a, a, threshold="far"), TypeError, "thresholds"),
        (lambda a: auc(a, a, []), ValueError, "thresholds.*at least 1"),
        (lambda a: auc(a, a, [2.0, 1.0]), ValueError, "thresholds.*ascending"),
        (lambda a: cps(a, a, [1.0]), ValueError, "thresholds.*at least 2"),
        (lambda a: pve(a[..., :2], a[..., :2]), ValueError, r"pred.*J, 3"),
        (lambda a: mpjpe(a, a[..., :2]), ValueError, r"truth.*\(4, 13, 2\)"),
        (lambda a: mpjpe(a, a.long()), TypeError, "truth.*int64"),
        (lambda a: n_mpjpe(a, a, torch.ones(13)), TypeError, "mask.*float32"),
        (lambda a: correct_poses(1.0, a), TypeError, "pred"),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call(poses(4, 13))
