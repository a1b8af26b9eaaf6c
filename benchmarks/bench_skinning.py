"""Linear blend skinning of a body model of SMPL's size: fasthyp against smplx.

    python benchmarks/bench_skinning.py [--json FILE] [--seconds S]

The model is synthetic, in the shape of SMPL: 6890 vertices, 24 joints, 10 shape coefficients, 207
pose features, 4 bones a vertex. `smplx` is ``smplx.lbs.lbs``; joints are 17 that a regressor of 64
vertices each takes from its vertices, or for fasthyp without them; "2D" follows rotations in 6D to
projected joints. Memory is what a call has at its peak beyond what it was given and what it returns
(a fresh process for each).
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import interleaved, report
from torch import Tensor

from fasthyp import body

VERTICES, SHAPES, JOINTS, KEYPOINTS = 6890, 10, 24, 17
PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]

Run = Callable[[], Any]


class Model:
    """The arrays of the model and the regressor."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def choice(rows: int, columns: int, count: int) -> Tensor:
            """Rows of `count` positive numbers that sum to one, zeros elsewhere."""
            chosen = torch.rand(rows, columns, generator=generator).topk(count).indices
            weights = torch.rand(rows, count, generator=generator) + 0.05
            weights /= weights.sum(1, keepdim=True)
            return torch.zeros(rows, columns).scatter_(1, chosen, weights)

        self.arrays = (
            0.5 * normal(VERTICES, 3),
            0.01 * normal(VERTICES, 3, SHAPES),
            0.005 * normal(9 * (JOINTS - 1), 3 * VERTICES),
            choice(JOINTS, VERTICES, 16),
            torch.tensor(PARENTS),
            choice(VERTICES, JOINTS, 4),
        )
        self.regressor = choice(KEYPOINTS, VERTICES, 64)
        self.model = body.SkinningModel(*self.arrays)

    def bodies(self, count: int, numbers: int = 3, gradients: bool = False) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        betas, pose = torch.randn(count, SHAPES), 0.4 * torch.randn(count, JOINTS * numbers)
        return betas.requires_grad_(gradients), pose.requires_grad_(gradients)


def smplx_vertices(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    from smplx.lbs import lbs

    return lbs(betas, pose, *model.arrays)[0]


def smplx_joints(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    return torch.einsum("bvc,kv->bkc", smplx_vertices(model, betas, pose), model.regressor)


def vertices(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    return model.model.vertices(betas, pose)


def joints(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    return model.model.joints(betas, pose, regressor=model.regressor)


def projected(model: Model, betas: Tensor, pose: Tensor) -> Tensor:
    folded = model.model.fold(model.regressor)
    found = body.regress_joints(folded, betas, pose, rotation="columns")
    camera = body.prohmr_camera(torch.tensor([[0.9, 0.0, 0.1]]))
    return body.project(found, camera, 5000 / 224)


def with_gradients(
    function: Callable[..., Tensor], model: Model, betas: Tensor, pose: Tensor
) -> None:
    betas.grad = pose.grad = None
    function(model, betas, pose).sum().backward()


def workloads(model: Model) -> dict[str, dict[str, Run]]:
    """What smplx and fasthyp do for each."""
    out: dict[str, dict[str, Run]] = {}
    pairs = {"vertices": (smplx_vertices, vertices), "17 joints": (smplx_joints, joints)}
    for name, (theirs, ours) in pairs.items():
        for count in (1, 1000):
            given = model.bodies(count)
            out[f"{name}, {count}"] = {
                "smplx": partial(theirs, model, *given),
                "fasthyp": partial(ours, model, *given),
            }
            given = model.bodies(count, gradients=True)
            out[f"{name}, {count}, forward + backward"] = {
                "smplx": partial(with_gradients, theirs, model, *given),
                "fasthyp": partial(with_gradients, ours, model, *given),
            }
    six = model.bodies(1000, numbers=6)
    out["17 joints in 2D from 6D, 1000"] = {"fasthyp": partial(projected, model, *six)}
    return out


def peak_mb(contender: str, workload: str) -> float:
    command = [sys.executable, __file__, "--peak", contender, workload]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(contender: str, workload: str) -> None:
    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    model = Model()
    runs = workloads(model)
    runs[workload.replace("1000", "1")][contender]()  # loads all that a first call loads
    run = runs[workload][contender]
    ctypes.CDLL(None).malloc_trim(0)  # what is free would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before = resident("VmRSS")
    result = run()
    size = result.numel() * result.element_size() / 2**20 if isinstance(result, Tensor) else 0
    print((resident("VmHWM") - before) / 1024 - size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=8.0, help="per workload")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "WORKLOAD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.peak)
        return
    rows: list[dict[str, Any]] = []
    for name, contenders in workloads(Model()).items():
        times = interleaved(contenders, options.seconds, warmup=2)
        ours = times["fasthyp"]["ms"]
        row: dict[str, Any] = {"workload": name}
        row |= {f"{k}_ms": t["ms"] for k, t in times.items()}
        row |= {f"{k}_ratio": t["ms"] / ours for k, t in times.items() if k != "fasthyp"}
        if "1000" in name and "smplx" in contenders:
            row |= {f"{k}_mb": peak_mb(k, name) for k in contenders}
        rows.append(row)
    report("Linear blend skinning", rows, options.json)


if __name__ == "__main__":
    main()
