"""Loss curves of the same training in four ways: does the fused flow train as the original does?

    python benchmarks/training_equivalence.py [--steps 300] [--seed 0] [--json FILE]

Per flow, the same weights and batches: the original code in float64, the original in float32, and
the accelerated flow in float32 with either checkpoint mode. The original is FrEIA's for
``GraphINN``, and for ``ConditionalGlow`` its plain PyTorch form, which computes what the fork of
nflows does. The deviation of the original's own float32 from its float64 is the noise to compare
with.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import torch
from _timing import report
from torch import Tensor, nn

import fasthyp.flows as flows

DIM, COND, BATCH = 24, 16, 64
Call = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def graph() -> nn.Module:
    def mlp(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, outputs))

    nodes = [ff.InputNode(DIM, name="x")]
    cond = ff.ConditionNode(COND, name="c")
    for k in range(8):
        arguments = {"subnet_constructor": mlp, "clamp": 2.0}
        nodes.append(ff.Node(nodes[-1], fm.GLOWCouplingBlock, arguments, cond))
        nodes.append(ff.Node(nodes[-1], fm.PermuteRandom, {"seed": k}))
    return ff.GraphINN([*nodes, ff.OutputNode(nodes[-1], name="z"), cond])


def glow() -> nn.Module:
    """Without dropout and batch norm, which run as they are whatever the flow runs on."""
    settings = {"dropout_probability": 0.0, "batch_norm_within_layers": False}
    return flows.ConditionalGlow(DIM, 128, 4, 2, context_features=COND, **settings)


def run_graph(net: Any, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    z, log_jac = net(x, c)
    return -(log_jac - 0.5 * z.square().sum(1)).mean(), net(z.detach().roll(1, 0), c, rev=True)[0]


def run_glow(net: Any, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    log_prob, z = net.log_prob(x, c)
    noise = z.detach().roll(1, 0)[:, None]
    return -log_prob.mean(), net.sample_and_log_prob(1, noise=noise, context=c)[0][:, 0]


def train(net: Any, call: Call, dtype: torch.dtype, steps: int) -> Tensor:
    """Adam on the likelihood of the data and the error of a hypothesis -> losses (steps,)."""
    net = net.to(dtype).train()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 5e-4)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(COND, DIM, generator=generator) / COND**0.5
    losses = []
    for _ in range(steps):
        c = torch.randn(BATCH, COND, generator=generator)
        x = torch.tanh(c @ mix) + 0.3 * torch.randn(BATCH, DIM, generator=generator)
        nll, drawn = call(net, x.to(dtype), c.to(dtype))
        loss = nll + 0.1 * (drawn - x.to(dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def plain(net: Any, call: Call, dtype: torch.dtype, steps: int) -> Tensor:
    """The original: FrEIA's module as it is, ConditionalGlow without its kernels."""
    before = os.environ.get("FASTHYP_BACKEND")
    os.environ["FASTHYP_BACKEND"] = "reference"
    try:
        return train(net, call, dtype, steps)
    finally:
        os.environ.pop("FASTHYP_BACKEND")
        if before is not None:
            os.environ["FASTHYP_BACKEND"] = before


def compare(
    name: str, make: Callable[[], Any], call: Call, steps: int, seed: int
) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    net = make()
    exact = plain(copy.deepcopy(net), call, torch.float64, steps)
    curves = {"original float64": exact}
    curves["original float32"] = plain(copy.deepcopy(net), call, torch.float32, steps)
    for mode in ("reversible", "store"):
        fast = flows.accelerate(copy.deepcopy(net), inplace=True, checkpoint=mode)
        curves[f"accelerated float32, {mode}"] = train(fast, call, torch.float32, steps)
    return [
        {
            "workload": f"{name}, {which}",
            "first loss": float(curve[0]),
            "last loss": float(curve[-1]),
            "max deviation": float((curve - exact).abs().max()),
            "mean deviation": float((curve - exact).abs().mean()),
        }
        for which, curve in curves.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    rows = compare("GraphINN", graph, run_graph, options.steps, options.seed)
    rows += compare("ConditionalGlow", glow, run_glow, options.steps, options.seed)
    report(f"Training, {options.steps} Adam steps", rows, options.json)


if __name__ == "__main__":
    main()
