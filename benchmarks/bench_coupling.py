"""1000 hypotheses of a coupling flow: fasthyp against FrEIA and the nflows fork's architecture,
eager and compiled, in one process.

    python benchmarks/bench_coupling.py [--json FILE] [--seconds S] [--no-compile] [--sweep]

Each row is one workload at one precision; "accelerated" is the FrEIA module itself after
``fasthyp.accelerate``, called as FrEIA is, with one condition row per hypothesis. ``rate`` is the
share of the rate of one large torch matrix product of the same operand type, counting only the
work that is left once the condition's part of each first layer is computed once per image.
bfloat16 runs only where the processor multiplies it. ``--sweep`` measures instead how time grows
with the number of hypotheses (``coupling_sweep.json``, which ``summary.py --plots`` draws).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

import numpy as np
import torch
from _timing import gemm_rate, interleaved, report
from torch import Tensor, nn

import fasthyp
from fasthyp._peers import freia_flow, hoisted_flop
from fasthyp.flows.program import ResidualBlock, ResidualMLP
from fasthyp.ops import coupling as ops
from fasthyp.reference.coupling import CouplingLayer, LinearLayer, LinearMap

WORKLOADS = (
    # name, dim, condition, hidden layers, hypotheses, calls in a row
    ("48-d, 2-layer 1024, 1000 hypotheses", 48, 56, (1024,), 1000, 1),
    ("132-d, 3-layer 1024, 1000 hypotheses", 132, 979, (1024, 1024), 1000, 1),
    ("48-d, 2-layer 1024, 1 hypothesis, again and again", 48, 56, (1024,), 1, 20),
    ("48-d, 2-layer 1024, 1 hypothesis, weights not in cache", 48, 56, (1024,), 1, 1),
)
SWEEP = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)


class GlowStep(nn.Module):
    """ActNorm, LU linear and additive coupling of the nflows fork's ConditionalGlow, z -> x."""

    def __init__(self, dim: int, context: int, hidden: int, blocks: int, first: int) -> None:
        super().__init__()
        self.log_scale, self.shift = (nn.Parameter(0.1 * torch.randn(dim)) for _ in range(2))
        self.factors = nn.Parameter(torch.randn(dim, dim) / dim)
        self.log_diagonal = nn.Parameter(0.1 * torch.randn(dim))
        self.bias = nn.Parameter(0.1 * torch.randn(dim))
        self.passive = torch.arange(first, dim, 2)
        self.active = torch.arange(1 - first, dim, 2)
        self.initial = nn.Linear(len(self.passive) + context, hidden)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(2 * blocks))
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2 * blocks))
        self.final = nn.Linear(hidden, len(self.active))

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.initial(torch.cat([z[:, self.passive], context], 1))
        for i in range(0, len(self.linears), 2):
            inner = self.linears[i](torch.relu(self.norms[i](hidden)))
            hidden = hidden + self.linears[i + 1](torch.relu(self.norms[i + 1](inner)))
        z = z.index_add(1, self.active, self.final(hidden), alpha=-1.0)
        columns = (z - self.bias).T
        columns = torch.linalg.solve_triangular(
            self.factors, columns, upper=False, unitriangular=True
        )
        upper = self.factors.triu(1) + self.log_diagonal.exp().diag()
        x = torch.linalg.solve_triangular(upper, columns, upper=True).T
        x = (x - self.shift) / self.log_scale.exp()
        return x, -(self.log_diagonal.sum() + self.log_scale.sum()).expand(len(z))

    def layers(self, dim: int, context: int) -> list[LinearLayer | CouplingLayer]:
        """The same in the order x -> z, as the kernels take it."""

        def lu(factors: Tensor, log_diagonal: Tensor, bias: Tensor) -> LinearMap:
            lower = factors.tril(-1) + torch.eye(dim, dtype=factors.dtype)
            upper = factors.triu(1) + log_diagonal.exp().diag()
            return LinearMap(lower @ upper, bias, log_diagonal.sum())

        slots = tuple(range(dim))
        norm = LinearLayer(
            *(slots, (self.log_scale, self.shift)),
            lambda log_scale, shift: LinearMap(log_scale.exp(), shift, log_scale.sum()),
            diagonal=True,
        )
        linear = LinearLayer(slots, (self.factors, self.log_diagonal, self.bias), lu)
        blocks = [
            ResidualBlock(*self.linears[i : i + 2], *self.norms[i : i + 2])  # type: ignore[arg-type]
            for i in range(0, len(self.linears), 2)
        ]
        net = ResidualMLP(self.initial, tuple(blocks), self.final).net(None, None)
        active, passive = tuple(self.active.tolist()), tuple(self.passive.tolist())
        coupling = CouplingLayer(active, passive, tuple(range(context)), (net,), "additive")
        return [norm, linear, coupling]


class Glow(nn.Module):
    def __init__(self, dim: int, context: int, hidden: int, layers: int, blocks: int) -> None:
        super().__init__()
        steps = [GlowStep(dim, context, hidden, blocks, i % 2) for i in range(layers)]
        self.steps = nn.ModuleList(steps)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        log_jac = z.new_zeros(len(z))
        for step in reversed(self.steps):
            z, change = step.inverse(z, context)  # type: ignore[operator]
            log_jac = log_jac + change
        return z, log_jac


def glow(options: argparse.Namespace, rates: dict[str, float]) -> list[dict[str, Any]]:
    dim, context_dim, hidden, layers, blocks, count = 144, 2048, 1024, 4, 2, 1000
    torch.manual_seed(0)
    net = Glow(dim, context_dim, hidden, layers, blocks)
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_mean.normal_(0.0, 0.1)  # type: ignore[union-attr]
                norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    net = net.eval()
    z, context = torch.randn(1, count, dim), torch.randn(1, context_dim)
    repeated = context.repeat(count, 1)
    folded = [part for step in net.steps for part in step.layers(dim, context_dim)]  # type: ignore
    packed = {
        precision: ops.PackedFlow(folded, range(dim), dim, context_dim, precision)
        for precision in rates
    }
    contenders: dict[str, Callable[[], Any]] = {
        "eager": lambda: net(z[0], repeated),
        **{p: lambda flow=flow: flow.inverse(z, context) for p, flow in packed.items()},
    }
    if not options.no_compile:
        compiled = torch.compile(net)
        contenders["compiled"] = lambda: compiled(z[0], repeated)
    half = dim // 2
    flop = 2.0 * count * layers * (2 * half * hidden + 2 * blocks * hidden**2 + dim**2)
    with torch.no_grad():
        times = interleaved(contenders, options.seconds)
        exact = net(z[0], repeated)[0]
        return [
            {
                "workload": "ConditionalGlow 144-d, 1000 hypotheses",
                "run": precision,
                **ratios(times, precision),
                "rate": flop / times[precision]["ms"] / 1e6 / rates[precision],
                "max_difference": (contenders[precision]()[0][0] - exact).abs().max().item(),
            }
            for precision in packed
        ]


def ratios(times: dict[str, dict[str, float]], run: str) -> dict[str, float]:
    """The run's time, and those of the peers and what they are more."""
    ms = times[run]["ms"]
    row = {"ms": ms}
    for peer in ("eager", "compiled"):
        if peer in times:
            row[f"{peer}_ms"] = times[peer]["ms"]
            row[f"vs_{peer}"] = times[peer]["ms"] / ms
    return row


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


def sweep(options: argparse.Namespace, precisions: Iterable[str]) -> list[dict[str, Any]]:
    """The 48-d flow for one image and more and more hypotheses."""
    dim, cond_dim = 48, 56
    net, cond = freia_flow(dim, cond_dim, (1024,)), torch.randn(1, cond_dim)
    samplers = {p: fasthyp.HypothesisSampler(net, precision=p) for p in precisions}
    rows = []
    for count in SWEEP:
        z, repeated = torch.randn(1, count, dim), cond.repeat(count, 1)
        contenders: dict[str, Callable[[], Any]] = {
            "eager": lambda z=z[0], c=repeated: net(z, c=[c], rev=True),
            **{p: lambda s=s, z=z: s(cond, z=z) for p, s in samplers.items()},
        }
        with torch.no_grad():
            times = interleaved(contenders, options.seconds)
        row: dict[str, Any] = {"workload": "48-d, 2-layer 1024, 1 image", "hypotheses": count}
        rows.append(row | {f"{name}_ms": found["ms"] for name, found in times.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=6.0, help="per workload")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--sweep", action="store_true", help="growth with the hypotheses instead")
    options = parser.parse_args()

    rates = {"highest": gemm_rate(torch.float32)}
    if ops.operand_dtype("medium", torch.float32) == torch.bfloat16:
        rates["medium"] = gemm_rate(torch.bfloat16)
    if options.sweep:
        report(*("coupling flow, growth", sweep(options, rates), options.json), sweep="hypotheses")
        return
    rows = []
    for name, dim, cond_dim, hidden, count, in_a_row in WORKLOADS:
        net = freia_flow(dim, cond_dim, hidden)
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
                out = contenders[precision]()
                error = (out[0] - exact).abs().max().item()
                row: dict[str, Any] = {
                    "workload": name,
                    "run": precision,
                    **ratios(times, precision),
                }
                if count > 1:
                    rate = rates.get(precision, rates["highest"])
                    row["rate"] = hoisted_flop(dim, hidden, count) / row["ms"] / 1e6 / rate
                row["max_difference"] = error
                rows.append(row)
    rows += glow(options, rates)
    rows += bundled_model()
    report("coupling flow, inverse (sampling) direction", rows, options.json)


if __name__ == "__main__":
    main()
