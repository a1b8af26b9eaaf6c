"""Gaussian fits to heatmaps: fasthyp against SciPy's curve_fit, as the ICCV 2021 code calls it.

    python benchmarks/bench_gaussian_fit.py [--json FILE] [--seconds S] [--heatmaps FILE.npz]

The maps are the bundled ones (64 x 64). ``same_minimum`` is the share of maps whose root mean
square residual is at most 1.001 times that of SciPy from the same start; ``--heatmaps`` adds a row
for a file of one's own (an array ``heatmaps`` (..., H, W)). On a GPU, times include the launch and
the wait for it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import interleaved, report
from torch import Tensor

import fasthyp
from fasthyp._peers import scipy_fit


def same_minimum(maps: Tensor) -> float:
    ours = fasthyp.fit_gaussians(maps).rmse.flatten().double().numpy()
    theirs = scipy_fit(maps.flatten(0, -3).double().numpy())
    return float((ours <= 1.001 * theirs).mean())


def on_cpu(maps: Tensor) -> dict[str, Callable[[], Any]]:
    def run(threads: int) -> Any:
        os.environ["FASTHYP_NUM_THREADS"] = str(threads)
        return fasthyp.fit_gaussians(maps)

    counts = sorted({1, torch.get_num_threads()})
    return {f"{n} threads" if n > 1 else "1 thread": partial(run, n) for n in counts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=6.0, help="per workload")
    parser.add_argument("--heatmaps", help="also compare the minima on the maps of this .npz")
    options = parser.parse_args()

    bundled = Path(fasthyp.__file__).parent / "data" / "astronaut_heatmaps.npz"
    maps = torch.from_numpy(np.load(bundled)["heatmaps"])[:16].contiguous()
    rows: list[dict[str, Any]] = []

    array = maps.double().numpy()
    cpu = on_cpu(maps)
    contenders: dict[str, Callable[[], Any]] = {"scipy": lambda: scipy_fit(array), **cpu}
    if torch.cuda.is_available():
        on_device = maps.cuda()
        contenders["cuda"] = lambda: (
            fasthyp.fit_gaussians(on_device),
            torch.cuda.synchronize(),
        )
    times = interleaved(contenders, options.seconds)
    agreement = same_minimum(maps)
    for run in list(contenders)[1:]:
        rows.append(
            {
                "workload": "16 maps",
                "run": run,
                "ms": times[run]["ms"],
                "scipy_ms": times["scipy"]["ms"],
                "vs_scipy": times["scipy"]["ms"] / times[run]["ms"],
                "fits_per_s": 16e3 / times[run]["ms"],
                "same_minimum": agreement,
            }
        )

    many = maps.repeat(256, 1, 1)
    contenders = on_cpu(many)
    if torch.cuda.is_available():
        many_on_device = many.cuda()
        contenders["cuda"] = lambda: (
            fasthyp.fit_gaussians(many_on_device),
            torch.cuda.synchronize(),
        )
    times = interleaved(contenders, options.seconds)
    for run in contenders:
        rows.append(
            {
                "workload": f"{len(many)} maps",
                "run": run,
                "ms": times[run]["ms"],
                "fits_per_s": len(many) * 1e3 / times[run]["ms"],
            }
        )
    if options.heatmaps:
        with np.load(options.heatmaps, allow_pickle=False) as data:
            own = torch.from_numpy(data["heatmaps"].astype(np.float32))
        count = own.shape[:-2].numel()
        share = same_minimum(own)
        rows.append({"workload": f"{count} maps of {options.heatmaps}", "same_minimum": share})
    report("Gaussian fits, 64 x 64", rows, options.json)


if __name__ == "__main__":
    main()
