"""The CUDA kernels of linear blend skinning on the host, against the CPU kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthyp import body
from fasthyp.ops import skinning as ops
from tests.ops.test_skinning import random_bodies, random_model
from tests.simt.tools import build_kernels, execute


@pytest.fixture(scope="module")
def skinning(programs: Path, emulation: Path) -> Path:
    return build_kernels(programs / "skinning", emulation, "skinning/cuda.cu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("vertices", "joints", "shapes", "bodies", "rotation"),
    [
        (1, 1, 0, 1, "axis_angle"),
        (8, 2, 3, 33, "matrix"),
        (61, 7, 5, 2, "axis_angle"),
        (150, 24, 10, 40, "columns"),
        (70, 9, 2, 3, "interleaved"),
        (65, 11, 1, 31, "rows"),
        (300, 3, 2, 2, "axis_angle"),  # several parts
    ],
)
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("cameras", [0, 3, 7])
def test_the_cpu_kernels(
    skinning: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    vertices: int,
    joints: int,
    shapes: int,
    bodies: int,
    rotation: Any,
    sums: bool,
    cameras: int,
) -> None:
    if cameras and not sums:
        pytest.skip("a mesh is not projected")
    arrays = random_model(vertices, joints, shapes, pose_blend=joints != 9, dtype=dtype)
    model = body.SkinningModel(*arrays)
    points = model.points()
    if sums:
        regressor = torch.rand(3, vertices, generator=torch.Generator().manual_seed(2)).to(dtype)
        regressor[1] *= torch.arange(vertices) % 17 == 0
        if cameras:  # more than the lanes of a warp
            regressor = regressor.repeat(13, 1)
        points = model.fold(regressor).points
    one = bodies == 40
    given = random_bodies(bodies, arrays, rotation, shapes=1 if one else -1)
    betas, pose, transl = (t.detach() for t in given)
    translated = bodies != 2
    bodies_given = betas, pose, transl if translated else None
    camera = torch.rand(bodies, cameras).to(dtype) + 1 if cameras else None
    if camera is not None and cameras == 7:
        camera[:, 2] += 20
    expected = points(*bodies_given, rotation, camera=camera)
    cotangents = [torch.randn(part.shape).to(dtype) for part in expected]
    through = (cotangents[2], camera, expected[0]) if cameras else (None, None, None)
    expected += ops.skinning_backward(
        *(*cotangents[:2], *bodies_given, *points.arrays, points.pose_blend, rotation),
        *(points.outputs, *through),
    )
    counts = [points.rows.numel(), points.bones.numel()]
    head = [dtype == torch.float64, shapes, joints, points.pose_blend, points.starts.numel() - 1]
    head += [points.outputs, bodies, len(betas), len(pose), ops.ROTATIONS.index(rotation)]
    head += [translated, sums, *counts, cameras]
    parts = [np.array(head, np.int64), *(a for a in points.arrays if a is not None), betas, pose]
    parts += [*[transl] * translated, *([] if camera is None else [camera]), *cotangents]
    (tmp_path / "in").write_bytes(b"".join(np.asarray(part).tobytes() for part in parts))
    for seed in (0, 1):
        done = execute(skinning, seed, tmp_path / "in", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        raw = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=dtype)
        found = raw.split([part.numel() for part in expected])
        tolerance = 5e-6 if dtype == torch.float32 else 1e-13
        for ours, theirs in zip(found, expected, strict=True):
            scale = max([1.0, *theirs.abs().flatten().tolist()])
            torch.testing.assert_close(ours, theirs.flatten(), rtol=0, atol=tolerance * scale)
