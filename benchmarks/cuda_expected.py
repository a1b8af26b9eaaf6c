"""How long the published flows should take on a GPU, counted from their launches; needs no GPU.

    python benchmarks/cuda_expected.py [--json FILE]

Packs each flow for CUDA and reads the list of launches that would run 1000 hypotheses of one image.
A rows launch waits for its weights (64 bytes a clock into a multiprocessor, all weights once per
tile of rows, shared by the blocks of a cluster) or for its products, whichever is longer; a product
launch for its arithmetic, that of the hoisted condition for its weights from memory. What latencies
and launches add is an assumption. To be held against bench_coupling_cuda.py on the same chip.
"""

from __future__ import annotations

import argparse
import json
from math import ceil
from pathlib import Path
from typing import Any

import torch

import fasthyp
from fasthyp._peers import freia_flow
from fasthyp.flows import describe
from fasthyp.ops import _coupling_cuda
from fasthyp.ops._coupling_steps import fold

# An H100 or H200 SXM: data sheet; the share that mma.sync reaches is an assumption.
CHIP = {
    "name": "H100/H200 SXM",
    "processors": 132,
    "clock_ghz": 1.755,
    "l2_bytes_per_clock": 64,
    "tflops": {"highest": 495 / 3, "high": 495, "medium": 989},
    "share_of_peak": 0.6,
    "memory_tb_s": 3.35,
    "us_per_launch": 2.5,
    "us_per_coupling": 1.5,
}
ROWS = 1000
INTS = len(_coupling_cuda._OP)


def flows() -> dict[str, Any]:
    glow = fasthyp.flows.ConditionalGlow(144, 1024, 4, 2, context_features=2048).eval()
    with torch.no_grad():
        for part in glow.modules():
            if hasattr(part, "initialized"):
                part.initialized.fill_(True)
    return {
        "48-d, 8 blocks, 2-layer 1024, condition 56": freia_flow(48, 56, (1024,)),
        "132-d, 8 blocks, 3-layer 1024, condition 979": freia_flow(132, 979, (1024, 1024)),
        "ConditionalGlow 144-d, 4 layers, context 2048": glow,
    }


def launches(plan: list[int]) -> list[list[int]]:
    """Those of the inverse direction."""
    at, found = 18, []
    for _ in range(2):
        count, at = plan[at], at + 1
        found = []
        for _ in range(count):
            size = 4 if plan[at] == 0 else 15
            found.append(plan[at : at + size])
            at += size
    assert at == len(plan)
    return found


def expected(module: Any, precision: str) -> dict[str, Any]:
    program = describe(module)
    layers, index = program.layers()
    shape = program.dim, program.cond_dim
    steps = fold(layers, *shape, torch.float32)
    plan, packed = _coupling_cuda.pack(steps, index, *shape, precision, torch.device("cpu"))
    numbers = plan.tolist()
    k_steps = 1 if precision == "medium" else 2
    tiles = ceil(ROWS / 16)
    split = 1
    while split < 8 and tiles * split * 2 <= CHIP["processors"]:
        split *= 2
    rate = CHIP["tflops"][precision] * CHIP["share_of_peak"] * 1e6  # FLOP/us
    per_us = CHIP["l2_bytes_per_clock"] * CHIP["clock_ghz"] * 1e3  # bytes/us

    hoisted = numbers[5]
    us = hoisted * shape[1] * 4 / (CHIP["memory_tb_s"] * 1e6)
    flop, couplings, bytes_per_tile = 0.0, 0, 0
    run = launches(numbers)
    for launch in run:
        if launch[0] == 1:
            work = 2.0 * ROWS * launch[4] * launch[3] * 16
            flop += work
            us += work / rate
            continue
        _, offset, ints, count = launch
        table = packed[offset : offset + 4 * ints].view(torch.int32)[: count * INTS]
        units = 0
        for row in table.reshape(count, INTS).tolist():
            op = dict(zip(_coupling_cuda._OP, row, strict=True))
            couplings += op["kind"] == 1
            if op["kind"] == 0:
                last = 3 * k_steps * ceil(op["columns"] / 48)
                first = op["steps"]
                units += op["blocks"] * {0: first + last, 1: first}.get(op["form"], last)
        work = 2.0 * ROWS * units * 256 / k_steps
        flop += work
        bytes_per_tile += units * 512
        us += max(units * 512 / split / per_us, work / rate)
    us += CHIP["us_per_launch"] * (len(run) + 1) + CHIP["us_per_coupling"] * couplings
    return {
        "precision": precision,
        "launches": len(run) + 1,
        "gflop": flop / 1e9,
        "weights_mb": packed.numel() / 1e6,
        "streamed_mb_per_tile": bytes_per_tile / 1e6,
        "expected_us": us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    rows = [
        {"flow": name, **expected(module, precision)}
        for name, module in flows().items()
        for precision in _coupling_cuda.PRECISIONS
    ]
    for row in rows:
        print("  ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    if options.json:
        path = Path(options.json)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"chip": CHIP, "rows": rows}, indent=1) + "\n")
        temporary.replace(path)


if __name__ == "__main__":
    main()
