"""The CUDA kernel of the Gaussian fits on the host, against the CPU kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fasthyp
from fasthyp.heatmaps import GaussianFit
from tests.simt.tools import build_kernels, execute


@pytest.fixture(scope="module")
def gaussian_fit(programs: Path, emulation: Path) -> Path:
    return build_kernels(programs / "gaussian_fit", emulation, "gaussian_fit/cuda.cu")


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
