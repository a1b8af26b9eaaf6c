"""The CUDA kernel that aligns poses on the host: the results of the CPU kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fasthyp.ops import procrustes as ops
from tests.metrics.test_procrustes import poses
from tests.simt.tools import build_kernels, execute


@pytest.fixture(scope="module")
def program(programs: Path, emulation: Path) -> Path:
    return build_kernels(programs / "procrustes", emulation, "procrustes/cuda.cu")


@pytest.mark.parametrize("joints", [1, 2, 17, 128, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", ["none", "target", "source", "all"])
@pytest.mark.parametrize("masked", [False, True])
def test_results_are_those_of_the_cpu(
    program: Path, tmp_path: Path, joints: int, dtype: torch.dtype, shared: str, masked: bool
) -> None:
    images, number = (3, 7) if joints > 100 else (5, 37)
    source = poses(images, number, joints, dtype=dtype)
    target = source + 0.3 * poses(images, number, joints, seed=1, dtype=dtype)
    if joints == 17:
        source[0, 1] *= torch.tensor([-1.0, 1.0, 1.0])
        source[0, 2, :, 2] = 0
        source[0, 3, :, 1:] = 0
        source[0, 4] = 0.5
        source[0, 5, 3, 1] = torch.nan
        target[0, 6] = 2.0
        source[0, 7] = target[0, 7]
    rows = {"source": (1, images * number), "target": (1, images * number)}
    if shared in ("target", "all"):
        target, rows["target"] = target[:, :1], (number, images)
    if shared in ("source", "all"):
        source, rows["source"] = source[:1], (1, number)
    mask = None
    if masked:
        generator = torch.Generator().manual_seed(2)
        mask = torch.rand(number, joints, generator=generator) < 0.7
        mask[3] = False
    error, by_source, by_target = ops.pa_mpjpe(source, target, mask, True, True)
    want = [
        *ops.procrustes(source, target, mask),
        error,
        ops.pa_distances(source, target, mask),
        *(by_source, by_target),
    ]
    numbers = [dtype == torch.float64, images * number, joints, *rows["source"], *rows["target"]]
    with open(tmp_path / "in", "wb") as file:
        file.write(np.array([*numbers, 1, number if masked else 0], np.int64).tobytes())
        file.write(source.contiguous().numpy().tobytes() + target.contiguous().numpy().tobytes())
        file.write(b"" if mask is None else mask.numpy().tobytes())
    done = execute(program, 0, tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    raw = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-11
    parts = raw.split([part.numel() for part in want])
    for place, (ours, theirs) in enumerate(zip(parts, want, strict=True)):
        if joints <= 2 and place in (0, 2, 5, 6):  # several rotations are as good
            continue
        some = slice(8, None) if joints == 17 else slice(None)  # those with a best rotation
        ours, theirs = (x.reshape(images, number, -1)[:, some] for x in (ours, theirs))
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=str(place)
        )
    # Whatever the rotation: where several are as good, the distances are still the same.
    torch.testing.assert_close(parts[3], error.flatten(), rtol=1e-5, atol=1e-5, equal_nan=True)
