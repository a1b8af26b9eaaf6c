"""Training steps of coupling flows on a GPU: fasthyp against FrEIA, eager and compiled.

    python benchmarks/bench_coupling_training_cuda.py [--json FILE] [--seconds S] [--no-compile]

A step is an inverse pass of all hypotheses, a mean of squares and of the log-Jacobian, and the
gradients of all parameters, of the condition and of the latents. The peers get the condition
repeated for every hypothesis, as FrEIA asks for it. "fold" is the step with the folding of the
weights (plain PyTorch) in it, "op" the pass and its gradient alone, "graph" the same replayed as a
CUDA graph. ``rate`` is the share of the rate of one large torch product of the same operands
(tf32x3 counts three products), of the work that is left once the condition's part is computed once
per image: the pass, the pass again, and both gradients. ``extra_mb`` is peak memory beyond what is
there before the step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from _timing import interleaved, report
from bench_coupling_cuda import PRODUCTS, product_rate, synchronized
from torch import Tensor, nn

from fasthyp._peers import freia_flow, hoisted_flop
from fasthyp.flows import freia
from fasthyp.ops import coupling_training
from fasthyp.ops._coupling_plan import describe
from fasthyp.ops._coupling_steps import fold

WORKLOADS = (
    # name, dim, condition, hidden layers, images, hypotheses of each
    ("48-d, 2-layer 1024, 64 x 200", 48, 56, (1024,), 64, 200),
    ("132-d, 3-layer 1024, 64 x 25", 132, 979, (1024, 1024), 64, 25),
)
MODES = {"reversible": (0, False), "store": (0, True)}


class Fused:
    """The pass of a FrEIA chain as the op takes it."""

    def __init__(self, net: nn.Module, dim: int, cond_dim: int) -> None:
        self.program, self.shape = freia.describe(net), (dim, cond_dim)
        self.plan, self.weights = self.folded()
        self.weights = [w.detach().requires_grad_() for w in self.weights]

    def folded(self) -> tuple[list[int], list[Tensor]]:
        layers, index = self.program.layers()
        steps = fold(layers, *self.shape, torch.float32)
        return describe(steps, index, *self.shape, 0, 1, log_det=False)

    def step(
        self, z: Tensor, cond: Tensor, mode: str, precision: str, weights: list[Tensor] | None
    ) -> tuple[Tensor, ...]:
        weights = self.folded()[1] if weights is None else weights
        x, log_det, _ = coupling_training.coupling_pass(
            z, cond, weights, None, self.plan, True, *MODES[mode], precision
        )
        return loss_gradients(x, log_det, [z, cond, *weights])


def loss_gradients(x: Tensor, log_det: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(x.square().mean() + log_det.mean(), inputs)


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def extra_mb(step: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=5.0, help="per workload")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 2

    precisions = ("highest", "high")
    rates = {precision: product_rate(precision) for precision in precisions}
    rows: list[dict[str, Any]] = []
    for name, dim, cond_dim, hidden, images, count in WORKLOADS:
        net = freia_flow(dim, cond_dim, hidden).cuda()
        parameters = [p for p in net.parameters() if p.requires_grad]
        cond = torch.randn(images, cond_dim, device="cuda", requires_grad=True)
        z = torch.randn(images, count, dim, device="cuda", requires_grad=True)
        fused = Fused(net, dim, cond_dim)

        def peer(
            model: Any, z: Tensor = z, c: Tensor = cond, count: int = count, ps: Any = parameters
        ) -> Any:
            repeated = c.repeat_interleave(count, 0)
            x, log_det = model(z.flatten(0, 1), c=[repeated], rev=True)
            return synchronized(loss_gradients(x, log_det, [z, c, *ps]))

        steps: dict[str, Callable[[], Any]] = {"FrEIA, eager": lambda net=net: peer(net)}
        if not options.no_compile:
            compiled = torch.compile(net)
            steps["FrEIA, compiled"] = lambda net=compiled: peer(net)
        for precision in precisions:
            for mode in MODES:

                def op(
                    fused: Fused = fused,
                    z: Tensor = z,
                    c: Tensor = cond,
                    mode: str = mode,
                    precision: str = precision,
                ) -> Any:
                    return fused.step(z, c, mode, precision, fused.weights)

                replay = captured(op)
                steps[f"op, {mode}, {precision}"] = lambda op=op: synchronized(op())
                steps[f"graph, {mode}, {precision}"] = lambda replay=replay: synchronized(replay())
            steps[f"fold, reversible, {precision}"] = (
                lambda fused=fused, z=z, c=cond, precision=precision, ps=parameters: synchronized(
                    torch.autograd.grad(
                        _loss(fused, z, c, precision),
                        [z, c, *ps],
                    )
                )
            )
        times = interleaved(steps, options.seconds, warmup=4)
        for run, step in steps.items():
            ms = times[run]["ms"]
            row = {"workload": name, "run": run, "ms": ms}
            row["vs_eager"] = times["FrEIA, eager"]["ms"] / ms
            if "FrEIA, compiled" in times:
                row["vs_compiled"] = times["FrEIA, compiled"]["ms"] / ms
            precision = run.split(", ")[-1]
            if precision in rates:
                passes = 3 if "store" in run else 4
                flop = PRODUCTS[precision] * passes * hoisted_flop(dim, hidden, images * count)
                row["rate"] = flop / rates[precision] / ms * 1e3
            if not run.startswith("graph"):
                row["extra_mb"] = extra_mb(step)
            rows.append(row)
    report("coupling flow on a GPU, training", rows, options.json)
    return 0


def _loss(fused: Fused, z: Tensor, cond: Tensor, precision: str) -> Tensor:
    x, log_det, _ = coupling_training.coupling_pass(
        z, cond, fused.folded()[1], None, fused.plan, True, 0, False, precision
    )
    return x.square().mean() + log_det.mean()


if __name__ == "__main__":
    sys.exit(main())
