"""Accelerated flows under torch.compile(fullgraph=True): the fused op is in the graph, gradients
are eager's, and what changes in a module is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fasthyp.flows as flows
from tests.conftest import poco_s, poco_t, random_flow
from tests.flows import nflows_stand_ins as nflows
from tests.flows.test_nflows import spread

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
        return make_boxed_func(module.forward)

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


def additive() -> nn.Module:
    """A flow of nflows of which every part has a fused form."""

    def net(inputs: int, outputs: int) -> nn.Module:
        return nflows.ResidualNet(inputs, outputs, 8, 4, 1, F.relu, True)

    mask = torch.ones(9)
    mask[::2] = -1
    parts = [nflows.AdditiveCouplingTransform(mask, net), nflows.RandomPermutation(9)]
    parts = [nflows.ActNorm(9), nflows.LULinear(9), *parts]
    flow = nflows.Flow(nflows.CompositeTransform(parts), nflows.StandardNormal([9]))
    spread(flow)
    return flow.eval()


def small_glow(**settings: Any) -> flows.ConditionalGlow:
    flow = flows.ConditionalGlow(9, 8, 2, 1, context_features=4, **settings)
    spread(flow)
    return flow.eval()


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
    "ConditionalGlow": small_glow,
    "RealNVP": poco,
    "nflows": lambda: flows.accelerate(additive()),
}


def results(call: Any, module: nn.Module, x: Tensor, c: Tensor) -> list[Tensor]:
    """Outputs, and gradients by inputs and parameters."""
    x, c = (t.detach().clone().requires_grad_() for t in (x, c))
    out, log_jac = call(x, c)
    weights = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)
    objective = (weights * out.square()).sum() - (weights[..., 0] * log_jac).sum()
    wanted = [x, c, *(p for p in module.parameters() if p.requires_grad)]
    return [
        out,
        log_jac,
        *torch.autograd.grad(objective, wanted, materialize_grads=True, allow_unused=True),
    ]


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
        assert compiled.count(torch.ops.aten.addmm.default) == 0  # no Linear of its own
        close(found, results(call, module, x, c))
        with torch.no_grad():
            close(list(compiled(x, c)), list(call(x, c)))
        assert compiled.count(PASS) == 2


def graph(**settings: Any) -> Any:
    return flows.accelerate(random_flow(9, (4,), blocks=2, **settings))


def rows(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 9), torch.randn(count, 4)


def check(compiled: Any, net: Any, x: Tensor, c: Tensor, grad: bool) -> None:
    """The compiled function does what the module does now."""
    if grad:
        close(results(compiled, net, x, c), results(net, net, x, c))
    else:
        with torch.no_grad():
            close(list(compiled(x, c)), list(net(x, c)))


def _in_place(net: Any) -> None:
    with torch.no_grad():
        net.module_list[0].subnet1[0].weight.add_(0.1)


def _data(net: Any) -> None:
    net.module_list[0].subnet1[0].weight.data.add_(0.1)
    net.eval()  # for the eager call


def _replaced(net: Any) -> None:
    linear = net.module_list[0].subnet1[0]
    linear.weight = nn.Parameter(linear.weight.detach() + 0.1)


def _loaded(net: Any) -> None:
    state = {k: v + 0.02 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)


def _assigned(net: Any) -> None:
    state = {k: v + 0.02 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def _step(net: Any) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-3)
    net(*rows())[0].square().mean().backward()
    optimizer.step()


def _double(net: Any) -> None:
    net.double()


def _frozen(net: Any) -> None:
    for p in net.module_list[0].subnet1.parameters():
        p.requires_grad_(False)


def _subnet(net: Any) -> None:
    net.module_list[0].subnet1 = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 10))


def _activation(net: Any) -> None:
    net.module_list[2].subnet2[1] = nn.Tanh()


def _longer(net: Any) -> None:
    net.module_list[2].subnet2.append(nn.Linear(8, 8))
    net.module_list[2].subnet2.insert(3, nn.ReLU())


def _clamp(net: Any) -> None:
    net.module_list[0].clamp = 0.5


def _clamp_function(net: Any) -> None:
    net.module_list[0].f_clamp = torch.tanh


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        ((_in_place, _data, _loaded, _step, _replaced, _assigned), 1),  # without compiling again
        ((_double,), 2),
        ((_subnet, _activation, _longer), 4),
        ((_clamp, _clamp_function), 3),
        ((_frozen,), 2),
    ],
)
def test_changes_are_seen(changes: Any, graphs: int, grad: bool) -> None:
    net = graph()
    compiled = Compiled(net)
    x, c = rows()
    check(compiled, net, x, c, grad)
    for change in changes:
        with torch.no_grad():
            before = compiled(x, c)[0] if not grad else None
        change(net)
        dtype = next(net.parameters()).dtype
        x, c = x.to(dtype), c.to(dtype)
        check(compiled, net, x, c, grad)
        if before is not None and change not in (_double, _frozen):
            with torch.no_grad():
                assert (compiled(x, c)[0] - before).abs().max() > 1e-4
    if grad or changes != (_frozen,):
        assert compiled.count(PASS) == graphs


def test_changed_permutations_are_an_error() -> None:
    """Loading weights with other permutations does not give silent nonsense."""
    net, other = graph(), graph()
    with torch.no_grad():
        for k in (1, 3):
            perm = torch.randperm(9)
            other.module_list[k].perm.copy_(perm)
            other.module_list[k].perm_inv.copy_(perm.argsort())
    compiled = Compiled(net)
    x, c = rows()
    check(compiled, net, x, c, True)
    net.load_state_dict(other.state_dict())
    for grad in (True, False):
        with pytest.raises(RuntimeError, match=r"permutations .* torch\.compiler\.reset"):
            check(compiled, net, x, c, grad)
        torch.compiler.reset()
        check(compiled, net, x, c, grad)
        torch.compiler.reset()
        if grad:
            net = graph()
            compiled = Compiled(net)
            check(compiled, net, x, c, False)
            net.load_state_dict(other.state_dict())


def test_dynamic_batches_compile_twice_at_most() -> None:
    net = graph()
    marked = Compiled(net)
    for count in (6, 3, 17, 1, 5):
        x, c = rows(count)
        if count > 1:
            for tensor in (x, c):
                torch._dynamo.mark_dynamic(tensor, 0)
        check(lambda *given: marked(*given), net, x, c, False)
    assert marked.count(PASS) <= 2
    torch._dynamo.reset()
    unmarked = Compiled(net)
    for count in (6, 3, 17, 5, 8):
        check(unmarked, net, *rows(count), True)
    assert unmarked.count(PASS) == 2


def dropout(inputs: int, outputs: int) -> nn.Module:
    parts = nn.Linear(inputs, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, outputs)
    return nn.Sequential(*parts)


def test_dropout_traces_the_modules_forward() -> None:
    net = graph(subnet=dropout).train()
    compiled = Compiled(net)
    x, c = rows()
    first, second = compiled(x, c)[0], compiled(x, c)[0]
    assert compiled.count(PASS) == 0
    assert not torch.equal(first, second)
    net.eval()
    check(compiled, net, x, c, True)
    assert compiled.count(PASS) == 1
    net.train()
    assert not torch.equal(compiled(x, c)[0], compiled(x, c)[0])
    assert compiled.count(PASS) == 1


def _own_clamp(u: Tensor) -> Tensor:
    return u / (1 + u.abs())


def test_what_is_opaque_traces_the_modules_forward() -> None:
    net = graph(clamp_activation=_own_clamp)
    compiled = Compiled(net)
    check(compiled, net, *rows(), True)
    assert compiled.count(PASS) == 0


@pytest.mark.parametrize("opaque", ["hook", "norm"])
def test_blocks_beside_an_opaque_one_are_fused(opaque: str) -> None:
    net = graph()
    subnet = net.module_list[0].subnet1
    if opaque == "hook":
        subnet[0].register_forward_hook(lambda m, args, out: 2.0 * out)
    else:
        subnet.insert(1, nn.LayerNorm(32))
    compiled = Compiled(net)
    check(compiled, net, *rows(), True)
    assert compiled.count(PASS) == 1


def test_batch_norms_in_training_mode() -> None:
    flow, twin = (small_glow(dropout_probability=0.0) for _ in range(2))
    twin.load_state_dict(flow.state_dict())
    flow.train()
    twin.train()
    compiled = Compiled(lambda x, c: flow.log_prob(x, c)[::-1])
    x, c = rows()
    found = results(compiled, flow, x, c)
    assert compiled.count(PASS) == 0
    close(found, results(lambda x, c: twin.log_prob(x, c)[::-1], twin, x, c))
    for mine, other in zip(flow.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other)  # running statistics


def test_the_reference_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTHYP_BACKEND", "reference")
    net = graph()
    compiled = Compiled(net)
    check(compiled, net, *rows(), True)
    assert compiled.count(PASS) == 0


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    net = graph()
    image = nn.Linear(3, 4)

    def loss(x: Tensor, pixels: Tensor) -> Tensor:
        z, log_jac = net(x, image(pixels))
        assert z.dtype == log_jac.dtype == torch.float32
        return 0.5 * z.square().sum() - log_jac.sum()

    def inner(x: Tensor, pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(x, pixels)

    wanted = [p for p in (*net.parameters(), *image.parameters()) if p.requires_grad]
    x, pixels = torch.randn(6, 9).bfloat16().requires_grad_(), torch.randn(6, 3)
    compiled = Compiled(inner if inside else loss)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        value = compiled(x, pixels)
    found = torch.autograd.grad(value, [x, *wanted])
    expected = torch.autograd.grad(inner(x, pixels), [x, *wanted])
    assert compiled.count(PASS) == 1
    assert found[0].dtype == torch.bfloat16
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))


def test_a_function_transform_inside() -> None:
    net = graph()
    x, c = rows(4)

    def each(x: Tensor, c: Tensor) -> Tensor:
        return torch.func.vmap(lambda x, c: net(x[None], c[None])[0][0])(x, c)

    with torch.no_grad():
        torch.testing.assert_close(Compiled(each)(x, c), net(x, c)[0], rtol=1e-4, atol=1e-4)


def test_inside_a_model_with_inductor() -> None:
    """A whole training step's loss, as the model itself would be compiled."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Linear(3, 4)
            self.flow = random_flow(9, (4,), blocks=2)

        def forward(self, x: Tensor, pixels: Tensor) -> Tensor:
            z, log_jac = self.flow(x, self.image(pixels))
            return 0.5 * z.square().sum() - log_jac.sum()

    model = Model()
    fast = flows.accelerate(model)
    wanted = [p for p in fast.parameters() if p.requires_grad]
    x, pixels = torch.randn(6, 9), torch.randn(6, 3)
    compiled = torch.compile(fast, fullgraph=True)
    for _ in range(2):
        found = torch.autograd.grad(compiled(x, pixels), wanted)
        close(list(found), list(torch.autograd.grad(model(x, pixels), wanted)))
        with torch.no_grad():
            for p in wanted:
                p.add_(torch.randn_like(p), alpha=0.05)
            close([compiled(x, pixels)], [model(x, pixels)])
