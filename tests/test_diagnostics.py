"""`fasthyp info` and `fasthyp doctor`: they see what is there, and what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from fasthyp import _C, _diagnostics
from fasthyp.cli import main


def failed() -> dict[str, str]:
    return {check.name: check.detail for check in _diagnostics.doctor() if not check.passed}


def test_info_says_what_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTHYP_GOLDEN", raising=False)
    monkeypatch.setenv("FASTHYP_NUM_THREADS", "3")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["fasthyp"] == _C.version
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["cpu"]["simd"] == _C.simd_level()
    assert facts["cpu"]["simd_levels"] == _C.simd_levels()
    assert facts["cpu"]["threads"] == 3
    assert facts["environment"] == {"FASTHYP_NUM_THREADS": "3"}
    assert set(facts["families"]) >= {"coupling", "gaussian_fit"}
    assert all(family["cpu"] for family in facts["families"].values())
    assert facts["families"]["gaussian_fit"]["cuda"] == (_C.cuda_archs is not None)
    assert len(facts["cuda"]["devices"]) >= torch.cuda.device_count()

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert _C.simd_level() in text
    assert "FASTHYP_NUM_THREADS=3" in text


def test_families_are_those_of_the_ops_folder() -> None:
    from pathlib import Path

    import fasthyp.ops

    folder = Path(fasthyp.ops.__path__[0])
    assert {p.stem for p in folder.glob("[!_]*.py")} == set(_diagnostics.FAMILIES)


def test_doctor_finds_nothing_here(capsys: pytest.CaptureFixture[str]) -> None:
    level = _C.simd_level()
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    names = [check["name"] for check in report["checks"]]
    for simd in _C.simd_levels():
        assert f"coupling float32, {simd}" in names
        assert f"gaussian_fit, {simd}" in names
    assert {"build", "philox", "CUDA", "bundled model", "bundled heatmaps"} <= set(names)
    assert _C.simd_level() == level


def test_doctor_finds_wrong_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasthyp.ops import coupling, gaussian_fit

    inverse, fit = coupling.PackedFlow.inverse, gaussian_fit.fit_gaussians

    def wrong_log_det(self, z, cond=None):  # type: ignore[no-untyped-def]
        x, log_det = inverse(self, z, cond)
        return x, log_det + 0.01

    def wrong_mean(*arguments):  # type: ignore[no-untyped-def]
        scalars, mean, *rest = fit(*arguments)
        return scalars, mean + 0.05, *rest

    monkeypatch.setattr(coupling.PackedFlow, "inverse", wrong_log_det)
    monkeypatch.setattr(gaussian_fit, "fit_gaussians", wrong_mean)
    monkeypatch.setattr(coupling, "philox_normal", lambda *_: torch.zeros(2, 9, 7))
    found = failed()
    assert set(found) >= {"philox"}
    for simd in _C.simd_levels():
        assert found[f"coupling float32, {simd}"].startswith("inverse log-Jacobian off by")
        assert found[f"gaussian_fit, {simd}"].startswith("mean off by")
    assert "bundled model" not in found

    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAILED philox" in text
    assert "mend it: build again" in text


def test_doctor_finds_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_diagnostics, "_version", lambda name: "0.0.7")
    monkeypatch.setenv("FASTHYP_BACKEND", "tpu")
    monkeypatch.setattr(
        "fasthyp.models.lifting.LiftingFlow.from_pretrained",
        lambda: (_ for _ in ()).throw(ValueError("tensor 'centre' is missing")),
    )
    found = failed()
    assert found["build"] == f"package 0.0.7, but its compiled kernels are of {_C.version}"
    assert "FASTHYP_BACKEND: expected one of" in found["environment"]
    assert found["bundled model"] == "ValueError: tensor 'centre' is missing"
