"""PA-MPJPE of many poses, and the best of 100,000 hypotheses a part at a time.

    python benchmarks/bench_metrics.py [--json FILE] [--seconds S]

200 hypotheses of each of 512 poses of 17 joints, as in an evaluation on Human3.6M, float32. `loop`
aligns one pose after another with NumPy's SVD, as the plain form of the official codes does; it
is timed on one hypothesis of each pose and its time multiplied by 200. `batched` is
torch.linalg.svd on all at once. Errors are the largest deviations from the same in float64, in
millionths of the mean error. Then the same with the gradient by the poses, a step of training.
Then hypotheses of one image from a flow of 48 dimensions with 8 blocks of 1024 hidden units. First
what it costs to judge them: `drawn` is one call of the sampler that judges none, `fasthyp` the best
by root-centred MPJPE and `aligned` by PA-MPJPE, a part at a time, and `noise given` the former with
the noise of each part made by NumPy; ratios are to `drawn`. Then the time for M hypotheses, and
what the process has at its peak beyond what it had before (a fresh process for each M).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import interleaved, report
from torch import Tensor

from fasthyp._peers import svd_pa_mpjpe
from fasthyp.metrics import best_of_m, hypothesis_source, mpjpe, pa_mpjpe
from fasthyp.models import PoseINN
from fasthyp.reference.coupling import philox_normal
from fasthyp.sampling import HypothesisSampler

HYPOTHESES, POSES, JOINTS = 200, 512, 17
SAMPLES = (1_000, 10_000, 100_000)
JUDGED = 20_000


def one_by_one(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Errors (N,) of poses (N, J, 3)."""
    errors = np.empty(len(pred))
    for i, (source, target) in enumerate(zip(pred, truth, strict=True)):
        source_mean, target_mean = source.mean(0), target.mean(0)
        a, b = source - source_mean, target - target_mean
        u, s, vt = np.linalg.svd(b.T @ a)
        sign = np.ones(3)
        sign[2] = np.sign(np.linalg.det(u @ vt))
        rotation = (u * sign) @ vt
        aligned = (s * sign).sum() / (a**2).sum() * a @ rotation.T
        errors[i] = np.sqrt(((aligned - b) ** 2).sum(1)).mean()
    return errors


def pa_poses() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    truth = 300 * torch.randn(POSES, JOINTS, 3)
    return truth + 50 * torch.randn(HYPOTHESES, POSES, JOINTS, 3), truth


def pa_row(seconds: float) -> dict[str, Any]:
    pred, truth = pa_poses()
    first, target = pred[0].numpy(), truth.numpy()
    exact = svd_pa_mpjpe(pred.double(), truth.double())
    off = [
        float(1e6 * (function(pred, truth) - exact).abs().max() / exact.mean())
        for function in (svd_pa_mpjpe, pa_mpjpe)
    ]
    np.testing.assert_allclose(pa_mpjpe(pred[0], truth), one_by_one(first, target), rtol=1e-4)
    times = interleaved(
        {
            "loop": partial(one_by_one, first, target),
            "batched": partial(svd_pa_mpjpe, pred, truth),
            "fasthyp": partial(pa_mpjpe, pred, truth),
        },
        seconds,
    )
    ms = {name: t["ms"] for name, t in times.items()}
    ms["loop"] *= HYPOTHESES
    return {
        "workload": f"PA-MPJPE {HYPOTHESES} x {POSES}",
        **{f"{name}_ms": value for name, value in ms.items()},
        **{f"{name}_ratio": ms[name] / ms["fasthyp"] for name in ("loop", "batched")},
        "batched_error": off[0],
        "fasthyp_error": off[1],
    }


def gradient(function: Callable[[Tensor, Tensor], Tensor], pred: Tensor, truth: Tensor) -> Tensor:
    pred = pred.detach().requires_grad_()
    return torch.autograd.grad(function(pred, truth).sum(), pred)[0]


def gradient_row(seconds: float) -> dict[str, Any]:
    pred, truth = pa_poses()
    functions = {"batched": svd_pa_mpjpe, "fasthyp": pa_mpjpe}
    times = interleaved(
        {name: partial(gradient, f, pred, truth) for name, f in functions.items()}, seconds
    )
    ms = {name: t["ms"] for name, t in times.items()}
    return {
        "workload": f"PA-MPJPE {HYPOTHESES} x {POSES}, gradient",
        **{f"{name}_ms": value for name, value in ms.items()},
        "batched_ratio": ms["batched"] / ms["fasthyp"],
    }


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


class Drawn:
    """A sampler's hypotheses of one image, and its true pose."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = PoseINN().eval()
        self.sampler = HypothesisSampler(model.inn, "highest")
        with torch.no_grad():
            self.cond = model.cond_net(torch.randn(1, 78))
        self.fixed, self.truth = torch.randn(1, 32), torch.randn(1, 16, 3)
        self.source = hypothesis_source(self.sampler, self.cond, seed=0, fixed=self.fixed)

    def part(self, first: int, count: int) -> Tensor:
        return self.source(first, count).unflatten(-1, (3, 16)).mT

    def part_of_given_noise(self, first: int, count: int) -> Tensor:
        z = philox_normal(1, count, 16, 0, first_sample=first)
        poses = self.sampler(self.cond, z=z, fixed=self.fixed)
        assert isinstance(poses, Tensor)
        return poses.unflatten(-1, (3, 16)).mT


def judging_row(seconds: float) -> dict[str, Any]:
    drawn = Drawn()
    rooted = partial(best_of_m, truth=drawn.truth, num_samples=JUDGED, error=partial(mpjpe, root=0))
    times = interleaved(
        {
            "drawn": partial(drawn.source, 0, JUDGED),
            "fasthyp": partial(rooted, drawn.part),
            "aligned": partial(rooted, drawn.part, error=pa_mpjpe),
            "noise given": partial(rooted, drawn.part_of_given_noise),
        },
        seconds,
        warmup=1,
    )
    ms = {name: t["ms"] for name, t in times.items()}
    return {
        "workload": f"judging {JUDGED}",
        **{f"{name}_ms": value for name, value in ms.items()},
        **{f"{name}_ratio": value / ms["drawn"] for name, value in ms.items() if name != "drawn"},
    }


def print_best(num_samples: int) -> None:
    """Seconds, MB and the best error of so many hypotheses."""
    drawn = Drawn()
    draw, truth = drawn.part, drawn.truth
    best_of_m(draw, truth, 8192)  # loads all that a first call loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before, start = resident("VmRSS"), time.perf_counter()
    best = float(best_of_m(draw, truth, num_samples).best)
    print(time.perf_counter() - start, (resident("VmHWM") - before) / 1024, best)


def best_row(num_samples: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--best", str(num_samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, mb, best = map(float, done.stdout.split())
    return {
        "workload": f"best of {num_samples}",
        "fasthyp_ms": 1e3 * seconds,
        "fasthyp_mb": mb,
        "hypotheses_mb": num_samples * 48 * 4 / 2**20,
        "best": best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row of PA-MPJPE")
    parser.add_argument("--best", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.best:
        print_best(options.best)
        return
    seconds = options.seconds
    rows = [pa_row(seconds), gradient_row(seconds), judging_row(seconds), *map(best_row, SAMPLES)]
    report("Metrics", rows, options.json)


if __name__ == "__main__":
    main()
