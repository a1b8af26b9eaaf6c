"""1000 hypotheses of a coupling flow: fasthyp against FrEIA, eager and compiled, in one process.

    python benchmarks/bench_coupling.py [--json FILE] [--seconds S] [--no-compile]

Each row is one workload at one precision; "accelerated" is the FrEIA module itself after
``fasthyp.accelerate``, called as FrEIA is, with one condition row per hypothesis. ``rate`` is the
share of the rate of one large torch matrix product of the same operand type, counting only the
work that is left once the condition's part of each first layer is computed once per image.
"""

from __future__ import annotations

import argparse
from importlib import resources
from itertools import pairwise
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import torch
from _timing import gemm_rate, interleaved, report
from torch import nn

import fasthyp

WORKLOADS = (
    # name, dim, condition, hidden layers, hypotheses, calls in a row
    ("48-d, 2-layer 1024, 1000 hypotheses", 48, 56, (1024,), 1000, 1),
    ("132-d, 3-layer 1024, 1000 hypotheses", 132, 979, (1024, 1024), 1000, 1),
    ("48-d, 2-layer 1024, 1 hypothesis, again and again", 48, 56, (1024,), 1, 20),
    ("48-d, 2-layer 1024, 1 hypothesis, weights not in cache", 48, 56, (1024,), 1, 1),
)
BLOCKS = 8


def build(dim: int, cond: int, hidden: tuple[int, ...]) -> Ff.GraphINN:
    """The chain that the published models use: 8 x (GLOW coupling, permutation), clamp 2."""

    def subnet(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))

    torch.manual_seed(0)
    nodes: list[Any] = [Ff.InputNode(dim)]
    condition = Ff.ConditionNode(cond)
    for k in range(BLOCKS):
        arguments = {"subnet_constructor": subnet, "clamp": 2.0}
        nodes.append(Ff.Node(nodes[-1], Fm.GLOWCouplingBlock, arguments, conditions=condition))
        nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {"seed": k}))
    return Ff.GraphINN([*nodes, Ff.OutputNode(nodes[-1]), condition]).eval()


def hoisted_flop(dim: int, hidden: tuple[int, ...], rows: int) -> float:
    half = dim // 2
    widths = [half, *hidden, 2 * half]
    return 2.0 * rows * 2 * BLOCKS * sum(a * b for a, b in pairwise(widths))


def bundled_model() -> list[dict[str, Any]]:
    """How far bfloat16 moves the hypotheses of the bundled model on the bundled heatmaps."""
    model = fasthyp.models.LiftingFlow.from_pretrained()
    with np.load(str(resources.files("fasthyp") / "data" / "astronaut_heatmaps.npz")) as data:
        heatmaps = torch.from_numpy(data["heatmaps"])[[0, *range(5, 17)]]
    fit = fasthyp.fit_gaussians(heatmaps[None])
    with torch.no_grad():
        cond = model.condition(fit.amplitude, fit.mean, fit.covariance, size=heatmaps.shape[-2:])
    poses = {p: model.sample(cond, 1000, seed=0, precision=p) for p in ("highest", "medium")}
    moved = 1000 * (poses["medium"] - poses["highest"]).norm(dim=-1).flatten()
    return [
        {
            "workload": "bundled lifting model, 1000 hypotheses",
            "run": "medium against highest",
            "joint_moved_mm_median": moved.median().item(),
            "joint_moved_mm_p99": moved.quantile(0.99).item(),
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=6.0, help="per workload")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()

    rates = {"highest": gemm_rate(torch.float32), "medium": gemm_rate(torch.bfloat16)}
    rows = []
    for name, dim, cond_dim, hidden, count, in_a_row in WORKLOADS:
        net = build(dim, cond_dim, hidden)
        z, cond = torch.randn(1, count, dim), torch.randn(1, cond_dim)
        flat, repeated = z[0], cond.repeat(count, 1)
        samplers = {p: fasthyp.HypothesisSampler(net, precision=p) for p in rates}
        accelerated = fasthyp.accelerate(net)
        contenders = {
            "eager": lambda net=net, z=flat, c=repeated: net(z, c=[c], rev=True),
            "accelerated": lambda net=accelerated, z=flat, c=repeated: net(z, c=[c], rev=True),
            **{p: lambda s=s, z=z, c=cond: s(c, z=z) for p, s in samplers.items()},
        }
        if not options.no_compile:
            compiled = torch.compile(net)
            contenders["compiled"] = lambda net=compiled, z=flat, c=repeated: net(
                z, c=[c], rev=True
            )
        with torch.no_grad():
            times = interleaved(contenders, options.seconds, in_a_row=in_a_row)
            exact = contenders["eager"]()[0]
            for precision in ("accelerated", *samplers):
                ms = times[precision]["ms"]
                out = contenders[precision]()
                error = (out[0] - exact).abs().max().item()
                row: dict[str, Any] = {
                    "workload": name,
                    "run": precision,
                    "ms": ms,
                    "eager_ms": times["eager"]["ms"],
                    "vs_eager": times["eager"]["ms"] / ms,
                }
                if "compiled" in times:
                    row["compiled_ms"] = times["compiled"]["ms"]
                    row["vs_compiled"] = times["compiled"]["ms"] / ms
                if count > 1:
                    rate = rates.get(precision, rates["highest"])
                    row["rate"] = hoisted_flop(dim, hidden, count) / ms / 1e6 / rate
                row["max_difference"] = error
                rows.append(row)
    rows += bundled_model()
    report("coupling flow, inverse (sampling) direction", rows, options.json)


if __name__ == "__main__":
    main()
