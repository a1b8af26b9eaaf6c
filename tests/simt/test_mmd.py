"""The CUDA kernels of the maximum mean discrepancy on the host, against the CPU kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fasthyp.ops import mmd as ops
from fasthyp.reference import mmd as reference
from tests.simt.tools import build_kernels, execute

WIDTHS = [0.2, 0.9]


@pytest.fixture(scope="module")
def mmd(programs: Path, emulation: Path) -> Path:
    return build_kernels(programs / "mmd", emulation, "mmd/cuda.cu")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 7, 5, 2), torch.float32),  # less than a warp
        ((2, 33, 70, 3), torch.float32),
        ((1, 80, 70, 5), torch.float32),  # several blocks of rows
        ((2, 150, 200, 1), torch.float32),  # and of columns
        ((1, 2, 290, 13), torch.float32),
        ((1, 20, 21, 31), torch.float32),
        ((1, 40, 36, 48), torch.float32),
        ((1, 9, 8, 50), torch.float32),
        ((1, 140, 150, 66), torch.float32),  # read where they lie
        ((2, 1, 3, 2), torch.float64),
        ((1, 70, 75, 7), torch.float64),
        ((1, 150, 140, 17), torch.float64),
        ((2, 9, 8, 25), torch.float64),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_cpu_kernels(
    mmd: Path, tmp_path: Path, shape: tuple[int, int, int, int], dtype: torch.dtype, weighted: bool
) -> None:
    problems, n, p, dim = shape
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(problems, n, dim, generator=generator).to(dtype)
    y = 0.5 + torch.randn(problems, p, dim, generator=generator).to(dtype)
    y[:, 0] = x[:, 0]
    weights = None, None
    if weighted:
        weights = tuple(torch.rand(s.shape[:-1], generator=generator) for s in (x, y))
        weights[1][:, 2::3] = 0
        y[:, 2::3] = torch.nan
    for wanted in range(4):
        kernel = ops.KERNELS[wanted % 2]
        estimator = ops.ESTIMATORS[int(n > 1 and wanted > 1)]
        settings = WIDTHS, kernel, estimator, bool(wanted & 1), bool(wanted & 2)
        expected = ops.mmd2(x, y, *weights, *settings)
        head = [dtype == torch.float64, *shape, len(WIDTHS)]
        head += [kernel == "rbf", estimator == "unbiased", wanted, weighted]
        parts = [np.array(head, np.int64), np.array(reference.rates(WIDTHS, kernel)), x, y]
        if weighted:
            normal = [reference.normalised(s, w) for s, w in zip((x, y), weights, strict=True)]
            parts += [*normal, torch.stack([w.double().square().sum(-1) for w in normal], -1)]
        (tmp_path / "in").write_bytes(b"".join(np.asarray(part).tobytes() for part in parts))
        done = execute(mmd, wanted, tmp_path / "in", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        raw = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=dtype)
        found = raw.split([part.numel() for part in expected if part.numel()])
        tolerance = 2e-6 if dtype == torch.float32 else 1e-13
        for ours, theirs in zip(found, [e for e in expected if e.numel()], strict=True):
            scale = max(float(theirs.abs().max()), 0.1)
            torch.testing.assert_close(ours, theirs.flatten(), rtol=0, atol=tolerance * scale)
