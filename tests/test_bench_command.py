"""``fasthyp bench``: what it prints and writes, and that both sides of a row do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fasthyp import _timing
from fasthyp.cli import _bench, main


def test_prints_and_writes_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "rows.json"
    assert main(["bench", "heatmaps", "--quick", "--json", str(written)]) == 0
    found = json.loads(written.read_text())
    assert found["machine"]["torch"] == torch.__version__
    (row,) = (row for row in found["rows"] if row["device"] == "cpu")
    assert row["family"] == "heatmaps"
    assert row["fasthyp_ms"] > 0
    assert row["ratio"] == pytest.approx(row["peer_ms"] / row["fasthyp_ms"])
    said = capsys.readouterr().out
    assert "heatmaps: 25 samples of 8 x 17 heatmaps" in said
    assert f"{row['fasthyp_ms']:.3g}" in said
    assert f"{row['ratio']:.1f}x" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_share_of_the_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {"fasthyp": {"ms": 4.0}, "peer": {"ms": 10.0}, "gemm": {"ms": 8.0}}
    monkeypatch.setattr(_timing, "interleaved", lambda runs, **effort: {k: ms[k] for k in runs})
    (row,) = _bench.measure("coupling", "cpu", quick=True)
    flop = 2 * 1000 * 2 * 8 * (24 * 1024 + 1024 * 48)
    assert row["of_gemm"] == pytest.approx((flop / 4.0) / (2 * 1024**3 / 8.0))
    assert row["ratio"] == 2.5


@pytest.mark.parametrize("family", sorted({*_bench.FAMILIES} - {"heatmaps"}))
def test_both_sides_compute_the_same(family: str) -> None:
    with torch.set_grad_enabled(family in _bench._WITH_GRADIENTS):
        for workload in _bench.FAMILIES[family]("cpu", True):
            assert workload.theirs is not None
            theirs, ours = workload.theirs(), workload.ours()
            if family == "coupling":
                theirs, ours = theirs[0], ours[0]
            if family == "gaussian_fit":
                theirs, ours = torch.from_numpy(theirs), ours.rmse
            assert isinstance(ours, Tensor)
            error = (ours - theirs).norm() / theirs.norm()
            # the formula's distances from inner products are poor in float32
            assert error < (0.02 if family == "mmd" else 1e-3), workload.name


def test_samples_of_heatmaps_have_the_same_mean() -> None:
    (workload,) = _bench.heatmaps("cpu", True)
    assert workload.theirs is not None
    theirs, ours = (run().mean((0, 1)) for run in (workload.theirs, workload.ours))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4.0)


def test_peer_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_bench, "find_spec", lambda name: None)
    assert main(["bench", "gaussian_fit", "--quick"]) == 0
    assert "(SciPy: not installed)" in capsys.readouterr().out
    with torch.no_grad():
        workload, _ = _bench.skinning("cpu", True)
        assert workload.peer == "plain PyTorch"
        assert workload.theirs is not None
        torch.testing.assert_close(workload.ours(), workload.theirs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["wings"], "family: expected one of coupling"), (["mmd", "--json", "no/f"], "no/f: cannot")],
)
def test_refusals(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert named in said.err
