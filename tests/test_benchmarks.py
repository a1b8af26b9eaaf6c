"""The README's figures are those of the measurements, and the sweeps can be drawn."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def summary() -> ModuleType:
    spec = importlib.util.spec_from_file_location("summary", ROOT / "benchmarks" / "summary.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def elsewhere(summary: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README and no results, on which the script works."""
    readme = tmp_path / "README.md"
    readme.write_text(summary.README.read_text())
    monkeypatch.setattr(summary, "README", readme)
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    machine = {
        "processor": "P",
        "cores": 4,
        "threads": 1,
        "simd": "avx2",
        "python": "3.12.1",
        "torch": "2.9.0",
        "commit": "abc1234",
    }
    path.write_text(json.dumps({"machine": machine | facts, "rows": rows}))


def test_readme_shows_what_was_measured(
    summary: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert summary.main(["--check"]) == 0, "run python benchmarks/summary.py"
    edited = tmp_path / "README.md"
    ours = summary.line(summary.HEADLINES[0]).split("|")[3].strip()
    edited.write_text(summary.README.read_text().replace(f"| {ours} |", "| 1.00 ms |", 1))
    monkeypatch.setattr(summary, "README", edited)
    assert summary.main(["--check"]) == 1
    assert summary.main([]) == 0
    assert summary.main(["--check"]) == 0
    assert f"| {ours} |" in edited.read_text()


def test_table_of_given_results(summary: ModuleType, elsewhere: Path) -> None:
    mmd = {"workload": "4000 x 48", "device": "cpu", "eager_ms": 3919.0, "fasthyp_ms": 161.14}
    memory = {"compiled_ms": 933.6, "eager_mb": 1284.0, "fasthyp_mb": 0.83}
    on_gpu = {"workload": "4000 x 48", "device": "cuda", "eager_ms": 1.0, "fasthyp_ms": 1.0}
    write(elsewhere / "mmd_avx2.json", [on_gpu, mmd | memory])
    step = "48-d, inverse, 64 x 200 rows"
    runs = [{"workload": step, "run": run, "ms": ms} for run, ms in (("eager", 9.999e3),)]
    runs += [{"workload": step, "run": "reversible", "ms": 1000.0, "extra_mb": 58.6}]
    depth = {"workload": step, "blocks": 2, "reversible_mb": 40.1}
    write(elsewhere / "coupling_training_avx2.json", [*runs, depth], threads=2)
    text = summary.section()
    table = [row for row in text.splitlines() if row.startswith("|")][2:]
    assert table == [
        "| training step, inverse + backward, 64 x 200 rows, 48-d flow | 10.00 s (FrEIA) "
        "| 1.00 s, 59 MB | **10x** | | |",
        "| MMD, 4000 samples of 48, forward + backward | 3.92 s, 1.28 GB (the formula), "
        "934 ms compiled | 161 ms, 0.8 MB | **24x**, 5.8x | | |",
    ]
    machine = "P, 4 cores, {}, AVX2, Python 3.12.1, torch 2.9.0: "
    assert machine.format("1 thread") + "`mmd_avx2` (abc1234)." in text
    assert machine.format("2 threads") + "`coupling_training_avx2` (abc1234)." in text


def test_columns_of_wider_processors(summary: ModuleType, elsewhere: Path) -> None:
    flow = {"workload": "48-d, 2-layer 1024, 1000 hypotheses", "eager_ms": 30.0}
    highest = flow | {"run": "highest", "ms": 10.0, "rate": 0.9}
    write(elsewhere / "coupling_avx2.json", [highest])
    assert summary.line(summary.HEADLINES[0]).endswith("| 10.0 ms | **3.0x** | | |")
    wide = [highest | {"ms": 6.0, "rate": 1.8, "compiled_ms": 24.0}]
    wide += [flow | {"run": "medium", "ms": 4.0}]
    write(elsewhere / "coupling.json", wide, simd="avx512bf16")
    assert summary.line(summary.HEADLINES[0]).endswith("| **3.0x** | **5.0x**, 4.0x | **7.5x** |")
    text = summary.section()
    assert "Sampling runs at 0.90 of the rate" in text
    assert "at 1.80 with AVX-512." in text
    assert "AVX512-BF16, Python 3.12.1, torch 2.9.0: `coupling` (abc1234)." in text


def test_sweep_is_drawn(summary: ModuleType, elsewhere: Path) -> None:
    rows = [{"workload": "w", "n": n, "eager_ms": n**2, "fasthyp_ms": n} for n in (1, 10, 100)]
    rows += [{"workload": "w", "n": 1000, "fasthyp_ms": 1e3}]  # too large for the peer
    write(elsewhere / "mmd_sweep.json", rows, sweep="n")
    assert summary.main(["--plots", str(elsewhere / "plots")]) == 0
    picture = elsewhere / "plots" / "mmd_sweep.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
