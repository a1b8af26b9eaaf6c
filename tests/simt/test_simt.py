"""The CUDA kernels, run on the host: a block's threads as fibers in a shuffled order, under
AddressSanitizer and UndefinedBehaviorSanitizer, compared with the CPU kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fasthyp
from fasthyp.heatmaps import GaussianFit
from fasthyp.ops import heatmaps as sample_ops

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    '-DFASTHYP_CUDA_ARCHS="host"',
    *("-I", str(HERE), "-I", str(SOURCES)),
]

LANGUAGE = {".o": "none"}  # everything else is C++ to the compiler

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def build(target: Path, *sources: Path) -> Path:
    """A program, or an object file where the target's name says so."""
    kind = ["-c"] if target.suffix == ".o" else []
    inputs = [word for path in sources for word in ("-x", LANGUAGE.get(path.suffix, "c++"), path)]
    command = [str(COMPILER), *FLAGS, *kind, *map(str, inputs), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "sanitizer" in done.stderr and "No such file" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simt")


@pytest.fixture(scope="module")
def emulation(folder: Path) -> Path:
    return build(folder / "simt.o", HERE / "simt.cpp")


@pytest.fixture(scope="module")
def primitives(folder: Path, emulation: Path) -> Path:
    return build(folder / "primitives", HERE / "primitives.cu", emulation)


@pytest.fixture(scope="module")
def planted(folder: Path, emulation: Path) -> Path:
    return build(folder / "planted", HERE / "planted.cu", emulation)


@pytest.fixture(scope="module")
def gaussian_fit(folder: Path, emulation: Path) -> Path:
    kernels = [SOURCES / "gaussian_fit" / "cuda.cu", SOURCES / "common" / "cuda_device.cu"]
    return build(folder / "fit", HERE / "gaussian_fit.cpp", *kernels, emulation)


def execute(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    # leaks: the fibers' own bookkeeping is of no interest
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# --- the emulation itself: it catches what it is there to catch ---


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


@pytest.mark.parametrize(
    ("kind", "message"),
    [("configuration", "invalid configuration argument"), ("shared", "invalid argument")],
)
def test_launch_errors(planted: Path, kind: str, message: str) -> None:
    assert message in execute(planted, kind, 0).stdout


# --- gaussian_fit ---


def fit_emulated(
    program: Path, folder: Path, maps: Tensor, init: Tensor | None = None, seed: int = 0
) -> GaussianFit:
    count, height, width = maps.shape
    columns = 0 if init is None else init.shape[1]
    head = np.array([maps.dtype == torch.float64, count, height, width, columns, 100], np.int64)
    with open(folder / "in", "wb") as file:
        file.write(head.tobytes() + np.float64(1e-8).tobytes() + maps.numpy().tobytes())
        file.write(b"" if init is None else init.to(maps.dtype).numpy().tobytes())
    done = execute(program, seed, folder / "in", folder / "out")
    assert done.returncode == 0, done.stderr
    raw, at = (folder / "out").read_bytes(), 0

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        nonlocal at
        numbers = torch.frombuffer(
            bytearray(raw), dtype=dtype, count=int(np.prod(shape)), offset=at
        )
        at += numbers.numel() * numbers.element_size()
        return numbers.reshape(shape)

    amplitude, sigma_x, sigma_y, theta, rmse = take(maps.dtype, 5, count)
    mean, covariance = take(maps.dtype, count, 2), take(maps.dtype, count, 2, 2)
    converged, iterations = take(torch.bool, count), take(torch.int32, count)
    assert at == len(raw)
    return GaussianFit(
        amplitude, mean, sigma_x, sigma_y, theta, covariance, rmse, converged, iterations
    )


def assert_same(emulated: GaussianFit, cpu: GaussianFit, tolerance: float) -> None:
    assert torch.equal(emulated.converged, cpu.converged)
    for name in ("amplitude", "mean", "sigma_x", "sigma_y", "covariance", "rmse"):
        ours, theirs = getattr(emulated, name), getattr(cpu, name)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def blobs(count: int, height: int, width: int) -> Tensor:
    """A tilted blob, a lower one beside it and noise."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    x, y = torch.arange(width, dtype=torch.float64), torch.arange(height, dtype=torch.float64)
    out = 0.005 * torch.randn(count, height, width, generator=generator, dtype=torch.float64)
    for share in (0.8, 0.2):
        centre = (0.25 + 0.5 * torch.rand(count, 2, 1, 1, generator=generator)).double()
        dx, dy = x - centre[:, 0] * (width - 1), y[:, None] - centre[:, 1] * (height - 1)
        out += share * torch.exp(-(dx**2 / 5 + dy**2 / 9 + dx * dy / 12))
    return out


@pytest.mark.parametrize(
    "shape", [(16, 16), (33, 17), (13, 40), (5, 31), (40, 6), (1, 65), (48, 48)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_fit_matches_cpu(
    gaussian_fit: Path, tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    maps = blobs(3, *shape).to(dtype)
    cpu = fasthyp.fit_gaussians(maps)
    emulated = [fit_emulated(gaussian_fit, tmp_path, maps, seed=seed) for seed in (0, 1)]
    assert_same(emulated[0], cpu, 1e-5)
    for first, second in zip(*emulated, strict=True):
        assert torch.equal(first, second)  # the order of the threads must not show


@pytest.mark.parametrize("columns", [2, 6])
def test_gaussian_fit_with_a_start(gaussian_fit: Path, tmp_path: Path, columns: int) -> None:
    maps = blobs(3, 24, 20).float()
    start = [1.0, 9.0, 12.0, 3.0, 0.3, 2.0]
    init = torch.tensor([start[1:3] if columns == 2 else start]).repeat(3, 1)
    init[1, 0] = torch.nan
    cpu = fasthyp.fit_gaussians(maps, init)
    assert cpu.converged.tolist() == [True, False, True]  # also from a start off the blob
    assert_same(fit_emulated(gaussian_fit, tmp_path, maps, init), cpu, 1e-5)


def test_gaussian_fit_of_bad_maps(gaussian_fit: Path, tmp_path: Path) -> None:
    maps = blobs(6, 20, 24).float()
    maps[0] = 0
    maps[1] = 0.3
    maps[2, 7, 3] = torch.nan
    maps[3, 19, 23] = torch.inf
    maps[4] = torch.nan
    cpu = fasthyp.fit_gaussians(maps)
    assert cpu.converged.tolist() == [False] * 5 + [True]
    assert_same(fit_emulated(gaussian_fit, tmp_path, maps), cpu, 1e-5)


@pytest.mark.parametrize("shape", [(120, 70), (190, 170)])
def test_gaussian_fit_of_large_maps(
    gaussian_fit: Path, tmp_path: Path, shape: tuple[int, int]
) -> None:
    """Beyond the shared memory that every launch has, and beyond all that there is."""
    maps = blobs(1, *shape)
    cpu = fasthyp.fit_gaussians(maps)
    assert_same(fit_emulated(gaussian_fit, tmp_path, maps), cpu, 1e-9)


# --- heatmaps ---


@pytest.fixture(scope="module")
def heatmaps(folder: Path, emulation: Path) -> Path:
    kernels = [SOURCES / "heatmaps" / "cuda.cu", SOURCES / "common" / "cuda_device.cu"]
    return build(folder / "heatmaps", HERE / "heatmaps.cpp", *kernels, emulation)


@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((2, 3, 16, 16), 25),
        ((1, 2, 33, 17), 7),
        ((1, 1, 1, 1), 1),
        ((3, 1, 5, 31), 1),
        ((1, 1, 20, 24), 1100),
        ((1, 1, 130, 70), 60),
        ((1, 2, 1, 65), 33),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_are_those_of_the_cpu(
    heatmaps: Path,
    tmp_path: Path,
    shape: tuple[int, ...],
    n: int,
    dtype: torch.dtype,
    temperature: float,
) -> None:
    maps = blobs(shape[0] * shape[1], *shape[2:]).reshape(shape).to(dtype)
    maps[0, -1, -1, -1] = torch.nan if n == 7 else -torch.inf
    if n == 33:
        maps[0, 0] = -1.0
    arguments = n, temperature, 0.01, 0.25, 5, 3
    expected = sample_ops.sample_heatmaps(maps, *arguments)
    numbers = [dtype == torch.float64, *shape, n, 5, 3]
    with open(tmp_path / "in", "wb") as file:
        file.write(np.array(numbers, np.int64).tobytes())
        threshold = float(torch.tensor(0.01, dtype=dtype))
        file.write(np.array([threshold, temperature, 0.25]).tobytes() + maps.numpy().tobytes())
    for seed in (0, 1):
        done = execute(heatmaps, seed, tmp_path / "in", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        raw = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=dtype)
        sizes = [part.numel() for part in expected]
        for ours, theirs in zip(raw.split(sizes), expected, strict=True):
            torch.testing.assert_close(ours, theirs.flatten(), rtol=0, atol=0, equal_nan=True)
