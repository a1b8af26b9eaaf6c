"""Accelerated flows under torch.compile(fullgraph=True): the fused op is in the graph, gradients are
eager's, and what changes in a module is seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fasthyp.flows as flows
from tests.conftest import poco_s, poco_t, random_flow
from tests.flows.test_nflows import glow, mixed, spread

PASS = torch.ops.fasthyp.coupling_pass.default
BACKWARD = torch.ops.fasthyp.coupling_pass_backward.default


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A function, compiled, and the targets in the graphs that came out of it."""

    def __init__(self, function: Any, **options: Any) -> None:
        self.graphs: list[list[Any]] = []
        backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)
        self.call = torch.compile(function, backend=backend, fullgraph=True, **options)

    def _keep(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append([node.target for node in module.graph.nodes])
        return module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def count(self, op: Any) -> int:
        return sum(graph.count(op) for graph in self.graphs)


def block(name: str, **settings: Any) -> Any:
    def mlp(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))

    return getattr(flows, name)([(9,)], [(4,)], subnet_constructor=mlp, **settings)


def poco() -> flows.RealNVP:
    prior = torch.distributions.MultivariateNormal(torch.zeros(9), torch.eye(9))
    return flows.RealNVP(poco_s, poco_t, (13, 8, 9), flows.realnvp_masks("new", 9, 2), prior)


def calls(make: Any) -> Any:
    """A module, and the two directions of it on x (N, 9) and c (N, 4) as functions."""
    net = make()
    if isinstance(net, flows.ConditionalGlow):
        return (
            net,
            lambda x, c: net.log_prob(x, c)[::-1],
            lambda z, c: net.sample_and_log_prob(1, noise=z[:, None], context=c)[:2],
        )
    if isinstance(net, flows.RealNVP):
        return net, net.backward_p, lambda z, c: (net.forward_p(z, c), z.sum(1))
    if hasattr(net, "_transform"):
        return net, net._transform.forward, net._transform.inverse
    if hasattr(net, "_transforms"):
        return net, net.forward, net.inverse
    if hasattr(net, "node_list"):
        return net, net, lambda z, c: net(z, c, rev=True)
    if hasattr(net, "module_list"):
        return net, lambda x, c: net(x, [c]), lambda z, c: net(z, [c], rev=True)

    def one(x: Tensor, c: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        (out,), log_jac = net([x], [c], rev=rev)
        return out, log_jac if isinstance(log_jac, Tensor) else out.sum(1)

    return net, one, lambda z, c: one(z, c, True)


FRONT_ENDS: dict[str, Callable[[], Any]] = {
    "GraphINN": lambda: flows.accelerate(random_flow(9, (4,), blocks=2)),
    "SequenceINN": lambda: flows.accelerate(random_flow(9, (4,), blocks=2, graph="SequenceINN")),
    "GLOWCouplingBlock": lambda: block("GLOWCouplingBlock", clamp=1.0),
    "NICECouplingBlock": lambda: block("NICECouplingBlock"),
    "AllInOneBlock": lambda: block("AllInOneBlock", permute_soft=True),
    "AllInOneBlock-hard": lambda: block("AllInOneBlock"),
    "ConditionalGlow": lambda: glow(context_features=4),
    "RealNVP": poco,
    "nflows": lambda: flows.accelerate(mixed(context_features=4, additive=True)),
}


def results(call: Any, module: nn.Module, x: Tensor, c: Tensor) -> list[Tensor]:
    """Outputs, and gradients by inputs and parameters."""
    x, c = (t.detach().clone().requires_grad_() for t in (x, c))
    out, log_jac = call(x, c)
    weights = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)
    objective = (weights * out.square()).sum() - (weights[..., 0] * log_jac).sum()
    wanted = [x, c, *(p for p in module.parameters() if p.requires_grad)]
    return [out, log_jac, *torch.autograd.grad(objective, wanted, materialize_grads=True, allow_unused=True)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_the_fused_op_is_in_the_graph(name: str) -> None:
    """The first call ever is a compiled one."""
    module, *directions = calls(FRONT_ENDS[name])
    x, c = torch.randn(6, 9), torch.randn(6, 4)
    for call in directions:
        compiled = Compiled(call)
        found = results(compiled, module, x, c)
        assert compiled.count(PASS) == compiled.count(BACKWARD) == 1
        assert not [t for graph in compiled.graphs for t in graph if "mm" in str(t)] or "mm" in name
        close(found, results(call, module, x, c))
        with torch.no_grad():
            close(list(compiled(x, c)), list(call(x, c)))
        assert compiled.count(PASS) == 2
