"""Samples of heatmaps: fasthyp against torch.multinomial, as the HUMR code calls it.

    python benchmarks/bench_heatmaps.py [--json FILE] [--seconds S]

25 samples of each of 64 x 17 maps of 64 x 64, as in a training step, and 1000 of each of 17. On a
GPU, times include the launch and the wait for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _timing import interleaved, report
from torch import Tensor

import fasthyp
from fasthyp._peers import multinomial


def run(sample: Callable[..., Tensor], maps: Tensor, n: int, temperature: float) -> None:
    sample(maps, n, temperature)
    if maps.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=4.0, help="per workload")
    options = parser.parse_args()

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows: list[dict[str, Any]] = []
    for images, n, temperature in ((64, 25, 1.0), (64, 25, 2.0), (1, 1000, 1.0)):
        y, x = torch.arange(64.0)[:, None], torch.arange(64.0)
        centres = 10 + 44 * torch.rand(images, 17, 2, 1, 1)
        distance = (x - centres[:, :, 0]) ** 2 + (y - centres[:, :, 1]) ** 2
        maps = torch.exp(-distance / 18) + 0.01 * torch.randn(images, 17, 64, 64)
        for device in devices:
            on_device = maps.to(device)
            ours = partial(fasthyp.sample_heatmaps, seed=0)
            contenders = {
                name: partial(run, sample, on_device, n, temperature)
                for name, sample in (("multinomial", multinomial), ("fasthyp", ours))
            }
            times = interleaved(contenders, options.seconds)
            rows.append(
                {
                    "workload": f"{images} x 17 maps, {n} samples, temperature {temperature:g}",
                    "device": device,
                    "multinomial_ms": times["multinomial"]["ms"],
                    "fasthyp_ms": times["fasthyp"]["ms"],
                    "ratio": times["multinomial"]["ms"] / times["fasthyp"]["ms"],
                }
            )
    report("Samples of heatmaps, 64 x 64", rows, options.json)


if __name__ == "__main__":
    main()
