"""The emulation of CUDA on the host catches what it is there to catch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.simt.tools import HERE, SOURCES, build, execute


@pytest.fixture(scope="module")
def primitives(programs: Path, emulation: Path) -> Path:
    return build(programs / "primitives", HERE / "primitives.cu", emulation)


@pytest.fixture(scope="module")
def planted(programs: Path, emulation: Path) -> Path:
    return build(programs / "planted", HERE / "planted.cu", emulation)


def row(kind: str, program: Path, seed: int) -> list[int]:
    done = execute(program, kind, seed)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


REVERSED = list(range(95, -1, -1))


@pytest.mark.parametrize("seed", range(4))
def test_primitives(primitives: Path, seed: int) -> None:
    done = execute(primitives, seed)
    assert done.returncode == 0, done.stdout + done.stderr


def build_with_nvcc(target: Path, *flags: str) -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc on PATH")
    command = [nvcc, "-std=c++20", "-Werror", "all-warnings", "-I", str(SOURCES), *flags]
    command += [str(HERE / "primitives.cu"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_primitives_compile_with_nvcc(tmp_path: Path) -> None:
    archs = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 90)]
    build_with_nvcc(tmp_path / "primitives.o", "-c", *archs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_primitives_on_a_gpu(tmp_path: Path) -> None:
    """The emulation and the hardware keep the same promises."""
    done = execute(build_with_nvcc(tmp_path / "primitives", "-arch=native"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_shuffles(planted: Path) -> None:
    for seed in range(8):
        sums = row("shuffle", planted, seed)
        assert sums[::32] == [sum(range(start, start + 32)) for start in (0, 32, 64)]


def test_read_out_of_bounds_is_caught(planted: Path) -> None:
    done = execute(planted, "bounds", 0)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_copy_out_of_bounds_is_caught(planted: Path) -> None:
    done = execute(planted, "async, bounds", 0)
    assert done.returncode != 0
    assert "stack-buffer-overflow" in done.stderr


@pytest.mark.parametrize("kind", ["correct", "static", "async"])
def test_correct_kernel(planted: Path, kind: str) -> None:
    for seed in range(8):
        assert row(kind, planted, seed) == REVERSED


@pytest.mark.parametrize(
    "kind",
    [
        "barrier",
        "static, no barrier",
        "async, no wait",
        "async, no barrier",
        "async, reused at once",
    ],
)
def test_missing_barrier_is_caught(planted: Path, kind: str) -> None:
    for seed in range(8):
        assert row(kind, planted, seed) != REVERSED


def test_named_barrier(planted: Path) -> None:
    for seed in range(8):
        assert row("named", planted, seed) == [7] * 96


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("divergent", "deadlock"),
        ("named, too few", "32 wait at barrier 3"),
        ("named, too many", "96 wait at barrier 3"),
        ("named, half a warp", "counts whole warps"),
        ("async, not aligned", "not aligned to 16 bytes"),
        ("product, half a warp", "48 wait for lanes of their warp"),
        ("product, not shared", "not in shared memory"),
    ],
)
def test_reported_mistake(planted: Path, kind: str, message: str) -> None:
    done = execute(planted, kind, 0)
    assert done.returncode == 86
    assert re.search(f"simt: .*{message}", done.stderr), done.stderr


def test_product(planted: Path) -> None:
    """A wrong row address shows in the result: lane 4 g + t has rows g and g + 8 of it."""
    expected = [lane // 4 + 100 * (lane // 4 + 8) for lane in range(32)] * 3
    assert row("product", planted, 0) == expected
    assert row("product, wrong row", planted, 0) != expected


def test_cluster(planted: Path) -> None:
    """Blocks that read each other's shared memory: not before it is written, nor after."""
    swapped = [*range(48, 96), *range(48)]
    for seed in range(8):
        assert row("cluster", planted, seed) == swapped
        assert row("cluster, read too early", planted, seed) != swapped
        assert row("cluster, changed too early", planted, seed) != swapped


@pytest.mark.parametrize(
    ("kind", "message"),
    [("configuration", "invalid configuration argument"), ("shared", "invalid argument")],
)
def test_launch_errors(planted: Path, kind: str, message: str) -> None:
    assert message in execute(planted, kind, 0).stdout
