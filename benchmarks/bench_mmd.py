"""Squared maximum mean discrepancy, forward and backward: fasthyp against the formula in PyTorch.

    python benchmarks/bench_mmd.py [--json FILE] [--seconds S] [--no-compile] [--sweep]

1088 joints with 25 samples in 2 dimensions, as in a training step of HUMR, and one problem of 4000
samples in 48, as in the training of Wehrbein et al. `eager` is what their codes compute (Gram
matrices, three bandwidths), `compiled` the same under torch.compile; KeOps, where installed, does
the large problem. Memory is what a call has at its peak beyond what it was given (CPU: of the
process; a fresh one for each). On a GPU, times include the launch and the wait for it. `--sweep`
measures instead how time grows with the number of samples (`mmd_sweep.json`, which `summary.py
--plots` draws).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import interleaved, report
from torch import Tensor

import fasthyp
from fasthyp._peers import gram_mmd

BANDWIDTHS = (0.05, 0.2, 0.9)
WORKLOADS = {"1088 x 25 x 2": (1088, 25, 2), "4000 x 48": (1, 4000, 48)}
SWEEP = (125, 250, 500, 1000, 2000, 4000, 8000, 16_000)
LARGEST_GRAM = 4000  # 1.3 GB


def keops(x: Tensor, y: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    def mean(a: Tensor, b: Tensor) -> Tensor:
        distance = ((LazyTensor(a[:, :, None]) - LazyTensor(b[:, None])) ** 2).sum(-1)
        values = sum(w**2 / (w**2 + distance) for w in BANDWIDTHS)
        return values.sum(2).mean((1, 2))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def run(mmd: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    x.grad = y.grad = None
    mmd(x, y).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def samples(name: str, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shape = WORKLOADS[name]
    scale = 0.3 if shape[-1] == 2 else 1.0
    return tuple((scale * torch.randn(shape, device=device)).requires_grad_() for _ in range(2))


def peak_mb(contender: str, workload: str, device: str) -> float:
    """Of one forward and backward pass, beyond the samples."""
    if device == "cuda":
        x, y = samples(workload, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(CONTENDERS[contender], x, y)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--peak", contender, workload]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(contender: str, workload: str) -> None:
    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    few = (torch.randn(2, 3, 2, requires_grad=True) for _ in range(2))
    run(CONTENDERS[contender], *few)  # loads all that a first call loads
    x, y = samples(workload, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before = resident("VmRSS")
    run(CONTENDERS[contender], x, y)
    print((resident("VmHWM") - before) / 1024)


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eager": partial(gram_mmd, bandwidths=BANDWIDTHS),
    "fasthyp": partial(fasthyp.mmd2, bandwidths=BANDWIDTHS),
}


def sweep(device: str, seconds: float) -> list[dict[str, Any]]:
    """One problem in 48 dimensions of more and more samples; the formula as far as memory goes."""
    rows = []
    for n in SWEEP:
        x, y = (torch.randn(1, n, 48, device=device, requires_grad=True) for _ in range(2))
        fit = {k: f for k, f in CONTENDERS.items() if k != "eager" or n <= LARGEST_GRAM}
        times = interleaved({k: partial(run, f, x, y) for k, f in fit.items()}, seconds)
        row: dict[str, Any] = {"workload": "MMD in 48 dimensions, forward + backward", "n": n}
        rows.append(row | {f"{name}_ms": found["ms"] for name, found in times.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=8.0, help="per workload")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--sweep", action="store_true", help="growth with the samples instead")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "WORKLOAD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(*options.peak)
        return
    if options.sweep:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        report("MMD, growth", sweep(device, options.seconds), options.json, sweep="n")
        return

    contenders = dict(CONTENDERS)
    if not options.no_compile:
        contenders["compiled"] = torch.compile(CONTENDERS["eager"], dynamic=False)
    try:
        import pykeops  # noqa: F401
    except ImportError:
        pass
    else:
        contenders["KeOps"] = keops

    rows: list[dict[str, Any]] = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for name in WORKLOADS:
            x, y = samples(name, device)
            times = interleaved(
                {k: partial(run, mmd, x, y) for k, mmd in contenders.items()}, options.seconds
            )
            ours = times["fasthyp"]["ms"]
            row: dict[str, Any] = {"workload": name, "device": device}
            row |= {f"{k}_ms": t["ms"] for k, t in times.items()}
            row |= {f"{k}_ratio": t["ms"] / ours for k, t in times.items() if k != "fasthyp"}
            row |= {f"{k}_mb": peak_mb(k, name, device) for k in CONTENDERS}
            rows.append(row)
    report("MMD, forward and backward", rows, options.json)


if __name__ == "__main__":
    main()
