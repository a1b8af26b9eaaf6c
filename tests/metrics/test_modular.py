"""The classes: batches, merged instances and two processes give the function of everything."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

import fasthyp
from fasthyp import metrics
from tests.metrics.test_procrustes import poses

DRAWN, TRUTH = 100 * poses(30, 9, 17), 100 * poses(30, 17, seed=1)
MASK = torch.rand(30, 17, generator=torch.Generator().manual_seed(0)) < 0.7
MASK[11] = False

FORK = multiprocessing.get_context("fork")
"""Processes that have imported already what this one has, which takes most of the time."""

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "MPJPE": (metrics.MPJPE, metrics.mpjpe),
    "NMPJPE": (metrics.NMPJPE, metrics.n_mpjpe),
    "PAMPJPE": (metrics.PAMPJPE, metrics.pa_mpjpe),
    "PVE": (metrics.PVE, metrics.pve),
    "PCK": (metrics.PCK, metrics.pck),
    "AUC": (metrics.AUC, metrics.auc),
    "CPS": (lambda over=None: metrics.CPS(over, align=False), metrics.cps),
}


def in_batches(metric: Any, *arguments: Tensor) -> Any:
    for part in zip(*(x.split(7) for x in arguments), strict=True):
        metric.update(*part)
    return metric


@pytest.mark.parametrize("name", list(PAIRS))
@pytest.mark.parametrize("over", [None, "best", "mean", "median", "worst"])
def test_batches_are_the_function_of_everything(name: str, over: Any) -> None:
    make, function = PAIRS[name]
    values = function(DRAWN, TRUTH[:, None])
    chosen = function(DRAWN, TRUTH[:, None], mask=MASK[:, None])[MASK.any(1)]
    wants = []
    for part in (values, chosen):
        if over in ("best", "worst"):
            low = (over == "best") != (name in ("PCK", "AUC", "CPS"))
            part = part.amin(1) if low else part.amax(1)
        elif over is not None:
            part = getattr(metrics.over_hypotheses(part), over)
        wants.append(part.mean())
    truth, mask = (TRUTH[:, None], MASK[:, None]) if over is None else (TRUTH, MASK)
    metric = in_batches(make(over=over), DRAWN, truth)
    assert metric.compute().dtype == torch.float64
    torch.testing.assert_close(metric.compute(), wants[0], rtol=1e-12, atol=0)
    metric.reset()
    torch.testing.assert_close(
        in_batches(metric, DRAWN, truth, mask).compute(), wants[1], rtol=1e-12, atol=0
    )


def all_metrics() -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    error, sigma = (TRUTH - DRAWN[:, 0]).norm(dim=-1), (TRUTH - DRAWN[:, 1]).norm(dim=-1)
    found: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
        name: (make(over="best"), (DRAWN, TRUTH)) for name, (make, _) in PAIRS.items()
    }
    return found | {
        "CPS aligned": (metrics.CPS("best"), (DRAWN, TRUTH)),
        "Diversity": (metrics.Diversity(17), (DRAWN,)),
        "Sharpness": (metrics.Sharpness(), (DRAWN,)),
        "Calibration": (metrics.Calibration(), (DRAWN, TRUTH)),
        "Pearson": (metrics.Pearson(), (sigma, error)),
        "SparsificationCurve": (metrics.SparsificationCurve(13), (sigma, error)),
    }


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_the_others_are_their_functions() -> None:
    found = {name: in_batches(m, *a).compute() for name, (m, a) in all_metrics().items()}
    _, (sigma, error) = all_metrics()["Pearson"]
    aligned = metrics.procrustes(DRAWN, TRUTH[:, None])(DRAWN)
    wants: dict[str, Any] = {
        "CPS aligned": metrics.cps(aligned, TRUTH[:, None]).amax(1).mean(),
        "Diversity": metrics.diversity(DRAWN).mean(0),
        "Sharpness": metrics.sharpness(DRAWN).mean(),
        "Calibration": metrics.calibration_curve(metrics.confidence_rank(DRAWN, TRUTH)),
        "Pearson": metrics.pearson(sigma, error),
        "SparsificationCurve": metrics.sparsification(sigma, error, 13),
    }
    for name, want in wants.items():
        for a, b in zip(flat(found[name]), flat(want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", list(all_metrics()))
def test_two_instances_merged_are_one(name: str) -> None:
    whole, arguments = all_metrics()[name]
    assert isinstance(whole, Metric)
    first, second = all_metrics()[name][0], all_metrics()[name][0]
    in_batches(whole, *arguments)
    in_batches(first, *(x[:13] for x in arguments))
    in_batches(second, *(x[13:] for x in arguments))
    second = pickle.loads(pickle.dumps(second))
    first.merge_state(second)
    for a, b in zip(flat(first.compute()), flat(whole.compute()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_seen() -> None:
    for name, (metric, _) in all_metrics().items():
        if name == "SparsificationCurve":
            with (
                pytest.raises(ValueError, match="at least one"),
                pytest.warns(UserWarning, match="before the"),
            ):
                metric.compute()
        else:
            with pytest.warns(UserWarning, match="before the"):
                assert all(x.isnan().all() for x in flat(metric.compute())), name


def test_sums_are_stable() -> None:
    """A million small errors after a large one: float32 sums would lose them."""
    metric = metrics.MPJPE()
    large = torch.zeros(1, 1, 3)
    large[..., 0] = 1e8
    metric.update(large, torch.zeros(1, 1, 3))
    small = torch.full((1000, 1, 3), 3**-0.5)
    for _ in range(100):
        metric.update(small, torch.zeros(1000, 1, 3))
    assert float(metric.compute()) == pytest.approx((1e8 + 1e5) / 100_001, rel=1e-7)
    correlation = metrics.Pearson()
    x = 1e4 + torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    for part in x:
        correlation.update(part, 2 * part)
    assert float(correlation.compute()) == pytest.approx(1, abs=1e-6)


def test_in_a_collection_and_a_training_loop() -> None:
    collection = MetricCollection({"p1": metrics.MPJPE("best"), "p2": metrics.PAMPJPE("best")})
    step = collection(DRAWN[:5], TRUTH[:5])
    errors = metrics.mpjpe(DRAWN[:5], TRUTH[:5, None]).amin(1).mean()
    torch.testing.assert_close(step["p1"], errors)
    collection.update(DRAWN[5:], TRUTH[5:])
    want = metrics.pa_mpjpe(DRAWN, TRUTH[:, None]).amin(1).mean()
    torch.testing.assert_close(collection.compute()["p2"], want)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"over.*best.*'least'"):
        metrics.MPJPE("least")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pred, truth.*over='best'"):
        metrics.MPJPE("best").update(TRUTH, TRUTH)
    with pytest.raises(ValueError, match="thresholds"):
        metrics.CPS(thresholds=[1.0])
    with pytest.raises(ValueError, match="levels"):
        metrics.Calibration((0.5, 2.0))
    with pytest.raises(ValueError, match=r"hypotheses: expected \(17, 3\)"):
        metrics.Diversity(17).update(DRAWN[:, :, :5])
    with pytest.raises(TypeError, match="pred"):
        metrics.PCK("best").update([1.0], TRUTH)  # type: ignore[arg-type]


def finished(*runs: multiprocessing.process.BaseProcess) -> list[int | None]:
    """The exit codes of processes, started together."""
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        run.kill()
        run.join()
    return [run.exitcode for run in runs]


def without_torchmetrics() -> None:
    for name in [name for name in sys.modules if name.startswith("fasthyp.metrics")]:
        del sys.modules[name]
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]
    fresh = importlib.import_module("fasthyp.metrics")
    assert fresh is not metrics
    pose = torch.ones(2, 5, 3)
    assert fresh.mpjpe(pose, pose).tolist() == [0, 0]
    with pytest.raises(ImportError, match=r"fasthyp\[metrics\]"):
        _ = fresh.MPJPE


def test_functions_do_without_torchmetrics() -> None:
    assert finished(FORK.Process(target=without_torchmetrics)) == [0]
    code = "import sys, fasthyp; assert 'fasthyp.metrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(metrics.__all__) <= {*dir(metrics), *metrics._CLASSES}
    assert fasthyp.metrics is metrics
    with pytest.raises(AttributeError, match="nothing"):
        _ = metrics.nothing


def one_of_two(rank: int, meet: str, wants: dict[str, list[Tensor]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    part = slice(0, 13) if rank == 0 else slice(13, 30)
    for name, (metric, arguments) in all_metrics().items():
        found = flat(in_batches(metric, *(x[part] for x in arguments)).compute())
        for a, b in zip(found, wants[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """gloo: each process sees a part, each computes the value of everything."""
    wants = {name: flat(in_batches(m, *a).compute()) for name, (m, a) in all_metrics().items()}
    arguments = str(tmp_path / "meet"), wants
    runs = [FORK.Process(target=one_of_two, args=(rank, *arguments)) for rank in range(2)]
    assert finished(*runs) == [0, 0]
