"""The CUDA kernel that samples heatmaps on the host: the cells of the CPU kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fasthyp.ops import heatmaps as sample_ops
from tests.simt.test_gaussian_fit import blobs
from tests.simt.tools import build_kernels, execute


@pytest.fixture(scope="module")
def heatmaps(programs: Path, emulation: Path) -> Path:
    return build_kernels(programs / "heatmaps", emulation, "heatmaps/cuda.cu")


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
