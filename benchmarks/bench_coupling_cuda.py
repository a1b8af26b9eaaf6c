"""Hypotheses of coupling flows on a GPU: fasthyp against FrEIA, eager and compiled.

    python benchmarks/bench_coupling_cuda.py [--json FILE] [--seconds S] [--no-compile]

"call" is ``HypothesisSampler`` called plainly, "graph" the same replayed as a CUDA graph; the peers
get the condition repeated for every hypothesis, as FrEIA asks for it, and ready-made noise, which
fasthyp draws itself. ``rate`` is the share of the rate of one large torch product of the same
operands (tf32x3 counts three products), and ``floor_us`` the time at that rate, both of the work
that is left once the condition's part of each first layer is computed once per image.
``weights_us`` is how long the weights of all row tiles of one multiprocessor take to arrive at 64
bytes a clock: the limit of few rows.
"""

from __future__ import annotations

import argparse
import sys
from math import ceil
from typing import Any

import torch
from _timing import interleaved, report
from torch import Tensor

import fasthyp
from fasthyp._peers import freia_flow, hoisted_flop

WORKLOADS = (
    # name, dim, condition, hidden layers, images, hypotheses of each
    ("48-d, 2-layer 1024, 1000 hypotheses", 48, 56, (1024,), 1, 1000),
    ("48-d, 2-layer 1024, 1 hypothesis", 48, 56, (1024,), 1, 1),
    ("48-d, 2-layer 1024, 64 x 200 hypotheses", 48, 56, (1024,), 64, 200),
    ("132-d, 3-layer 1024, 1000 hypotheses", 132, 979, (1024, 1024), 1, 1000),
    ("132-d, 3-layer 1024, 64 x 25 hypotheses", 132, 979, (1024, 1024), 64, 25),
)
BYTES_PER_CLOCK = 64  # from L2 into a multiprocessor
PRODUCTS = {"highest": 3, "high": 1, "medium": 1}
OPERAND_BYTES = {"highest": 4, "high": 4, "medium": 2}


def product_rate(precision: str, size: int = 8192) -> float:
    """FLOP/s of one large torch product of the operands that the precision multiplies."""
    dtype = torch.bfloat16 if precision == "medium" else torch.float32
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ms = interleaved({"product": lambda: synchronized(a @ b)}, seconds=1.0)["product"]["ms"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / ms * 1e3


def synchronized(result: Any) -> Any:
    torch.cuda.synchronize()
    return result


def weights_us(dim: int, hidden: tuple[int, ...], rows: int, precision: str) -> float:
    """Two-layer subnets only: deeper ones pass through a multiprocessor a tile at a time."""
    properties = torch.cuda.get_device_properties(0)
    processors = properties.multi_processor_count
    weights = hoisted_flop(dim, hidden, 1) / 2 * OPERAND_BYTES[precision]
    tiles = ceil(rows / 16)
    if tiles > 2 * processors:
        share = ceil(ceil(rows / 32) / processors)
    else:
        split = 1
        while properties.major >= 9 and split < 8 and tiles * split * 2 <= processors:
            split *= 2
        share = ceil(tiles / processors) / split
    clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
    return weights * share / BYTES_PER_CLOCK / clock * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=3.0, help="per workload")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 2

    rates = {precision: product_rate(precision) for precision in PRODUCTS}
    rows = []
    for name, dim, cond_dim, hidden, images, count in WORKLOADS:
        net = freia_flow(dim, cond_dim, hidden).cuda()
        cond = torch.randn(images, cond_dim, device="cuda")
        z = torch.randn(images, count, dim, device="cuda")
        flat, repeated = z.flatten(0, 1), cond.repeat_interleave(count, 0)

        def peer(model: Any, z: Tensor = flat, c: Tensor = repeated) -> Any:
            return synchronized(model(z, c=[c], rev=True))

        contenders = {"eager": lambda net=net: peer(net)}
        if not options.no_compile:
            compiled = torch.compile(net, mode="reduce-overhead")
            contenders["compiled"] = lambda net=compiled: peer(net)
        for precision in PRODUCTS:
            for graph in (False, True):
                sampler = fasthyp.HypothesisSampler(net, precision, graph=graph)
                contenders[f"{'graph' if graph else 'call'} {precision}"] = (
                    lambda s=sampler, c=cond, m=count: synchronized(s(c, m, seed=0))
                )
        with torch.no_grad():
            times = interleaved(contenders, options.seconds, warmup=5)
            exact = net.double()(flat.double(), c=[repeated.double()], rev=True)[0]
            net.float()
            for precision, products in PRODUCTS.items():
                sampler = fasthyp.HypothesisSampler(net, precision, graph=False)
                error = (sampler(cond, z=z).flatten(0, 1) - exact).abs().max().item()
                flop = products * hoisted_flop(dim, hidden, images * count)
                for run in ("call", "graph"):
                    ms = times[f"{run} {precision}"]["ms"]
                    row: dict[str, Any] = {
                        "workload": name,
                        "run": f"{run}, {precision}",
                        "us": 1e3 * ms,
                        "vs_eager": times["eager"]["ms"] / ms,
                    }
                    if "compiled" in times:
                        row["vs_compiled"] = times["compiled"]["ms"] / ms
                    row["floor_us"] = flop / rates[precision] * 1e6
                    row["rate"] = row["floor_us"] / row["us"]
                    if len(hidden) == 1:
                        row["weights_us"] = weights_us(dim, hidden, images * count, precision)
                    row["max_difference"] = error
                    rows.append(row)
            for peer_name in ("eager", "compiled"):
                if peer_name in times:
                    us = 1e3 * times[peer_name]["ms"]
                    rows.append({"workload": name, "run": f"FrEIA, {peer_name}", "us": us})
    report("coupling flow on a GPU, sampling", rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
