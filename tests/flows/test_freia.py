"""The FrEIA drop-ins against live FrEIA 0.2: numbers, call forms, caches, copies, transforms."""

# ruff: noqa: NPY002 - FrEIA draws its permutations from the legacy generator of NumPy
from __future__ import annotations

import copy
import io
import itertools
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fasthyp.flows as flows
from tests.conftest import max_error, random_flow


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)


def inputs(net: nn.Module, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list]:
    if isinstance(net, ff.GraphINN):
        dim, widths = net.in_nodes[0].dims[0], [node.dims[0] for node in net.condition_nodes]
    else:
        blocks = zip(net.conditions, net.module_list, strict=True)
        shapes = {i: module.dims_c[0][0] for i, module in blocks if module.dims_c}
        dim, widths = net.shapes[0][0], [shapes[i] for i in sorted(shapes)]
    return torch.randn(rows, dim, dtype=dtype), [
        torch.randn(rows, width, dtype=dtype) for width in widths
    ]


def close(value: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal up to the roundings of the dtype in a flow, unless told."""
    tolerance = 1e-4 if value.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(value, expected, rtol=rtol or tolerance, atol=atol or tolerance)


def is_fused(net: nn.Module) -> bool:
    return all(row["accelerated"] for row in flows.explain(net).rows)


def assert_same(net: nn.Module, fast: nn.Module, rows: int = 6) -> None:
    """The same numbers as FrEIA, both ways: to 1e-12 in float64, to float32 accuracy in float32."""
    x, c = inputs(net, rows)
    net64, fast64 = copy.deepcopy(net).double(), copy.deepcopy(fast).double()
    for rev in (False, True):
        exact = net64(x.double(), [t.double() for t in c], rev=rev)
        double = fast64(x.double(), [t.double() for t in c], rev=rev)
        peer, single = net(x, c, rev=rev), fast(x, c, rev=rev)
        for i in range(2):
            scale = max(1.0, float(exact[i].abs().max()))
            assert double[i].shape == single[i].shape == exact[i].shape
            assert max_error(double[i], exact[i]) <= 1e-12 * scale
            allowed = max(4.0 * max_error(peer[i], exact[i]), 2e-5 * scale)
            assert max_error(single[i], exact[i]) <= allowed


def mlp(*activations: nn.Module, bias: bool = True, hidden: int = 24) -> Callable:
    def make(inputs: int, outputs: int) -> nn.Sequential:
        widths = [inputs, *(hidden + i for i in range(len(activations))), outputs]
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            parts += [nn.Linear(a, b, bias=bias), *activations[i : i + 1]]
        return nn.Sequential(*parts)

    return make


# --- same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 1000, 4096])
@pytest.mark.parametrize(("dim", "conds"), [(48, (56,)), (39, (17,)), (13, (3, 5)), (2, ())])
@torch.no_grad()
def test_same_numbers(dim: int, conds: tuple[int, ...], rows: int) -> None:
    net = random_flow(dim, conds, blocks=3)
    fast = flows.accelerate(net)
    assert is_fused(fast)
    assert_same(net, fast, rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"clamp_activation": "TANH", "clamp": 3.0},
        {"clamp_activation": "SIGMOID", "clamp": 1.5},
        {"clamp_activation": "ATAN", "clamp": 5},
        {"split_len": 3},
        {"split_len": 0.9},
        {"split_len": 0},
        {"split_len": 1.0},
        {"subnet": mlp()},
        {"subnet": mlp(nn.LeakyReLU(0.2))},
        {"subnet": mlp(nn.SiLU(), nn.SiLU(), nn.SiLU())},
        {"subnet": mlp(nn.Tanh(), nn.Tanh())},
        {"subnet": mlp(nn.GELU(), bias=False)},
        {"subnet": mlp(nn.GELU("tanh"))},
        {"subnet": mlp(nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.Identity()))},
        {"graph": "SequenceINN"},
    ],
    ids=str,
)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_same_numbers_for_every_setting(settings: dict[str, Any]) -> None:
    net = random_flow(11, (4, 3), blocks=3, **settings)
    fast = flows.accelerate(net)
    assert is_fused(fast), flows.explain(fast)
    assert_same(net, fast)


@pytest.mark.parametrize("graph", ["GraphINN", "ReversibleGraphNet", "SequenceINN"])
@torch.no_grad()
def test_own_classes_have_the_same_weights_and_numbers(graph: str) -> None:
    net = random_flow(9, (4,), graph=graph)
    own = random_flow(9, (4,), graph=graph, framework=flows, modules=flows)
    assert list(own.state_dict()) == list(net.state_dict())
    own.load_state_dict(net.state_dict())
    assert isinstance(own, getattr(ff, graph))
    assert is_fused(own)
    assert_same(net, own)


@torch.no_grad()
def test_single_block() -> None:
    block = fm.GLOWCouplingBlock([(7,)], [(3,), (2,)], subnet_constructor=mlp(nn.ReLU()))
    fast = flows.accelerate(block)
    assert is_fused(fast)
    x, c = [torch.randn(5, 7)], [torch.randn(5, 3), torch.randn(5, 2)]
    for rev in (False, True):
        (peer,), peer_jac = block(x, c, rev=rev)
        (out,), log_jac = fast(x, c, rev=rev)
        close(out, peer)
        close(log_jac, peer_jac)
    with pytest.raises(ValueError, match="c: expected 5 columns, got no tensor"):
        fast(x)
    with pytest.raises(ValueError, match=r"c\[0\]: expected shape \(5, 5\), got \(5, 3\)"):
        fast(x, c[:1])


# --- call forms -------------------------------------------------------------------------------


@torch.no_grad()
def test_call_forms_of_a_graph() -> None:
    net = random_flow(9, (4,))
    fast = flows.accelerate(net)
    (x, (c,)) = inputs(net, 5)
    for args, kwargs in (
        ((x, c), {}),
        (((x,), [c]), {}),
        (([x], (c,)), {"rev": True}),
        ((x,), {"c": [c], "jac": False}),
    ):
        peer, got = net(*args, **kwargs), fast(*args, **kwargs)
        assert type(got) is type(peer)
        for a, b in zip(got, peer, strict=True):
            close(a, b)
    net.force_tuple_output = fast.force_tuple_output = True
    assert isinstance(fast(x, c)[0], tuple)
    close(fast(x, c)[0][0], net(x, c)[0][0])


@torch.no_grad()
def test_intermediate_outputs_are_freias_own() -> None:
    net = random_flow(9, (4,))
    fast = flows.accelerate(net)
    (x, (c,)) = inputs(net, 5)
    peer, peer_jac = net(x, c, intermediate_outputs=True)
    got, log_jac = fast(x, c, intermediate_outputs=True)
    assert len(got) == len(peer)
    assert len(log_jac) == len(peer_jac)
    by_name = {(node.name, i): value for (node, i), value in peer.items()}
    for (node, i), value in got.items():
        close(value, by_name[node.name, i])


@torch.no_grad()
def test_call_forms_of_a_sequence() -> None:
    net = random_flow(9, (4, 2), graph="SequenceINN")
    fast = flows.accelerate(net)
    x, c = inputs(net, 5)
    for kwargs in ({}, {"rev": True}, {"jac": False}):
        for a, b in zip(fast(x, c, **kwargs), net(x, c, **kwargs), strict=True):
            close(a, b)
    net.force_tuple_output = fast.force_tuple_output = True
    assert type(fast(x, c)[0]) is type(net(x, c)[0])


def test_log_jacobian_stays_freias() -> None:
    fast = flows.accelerate(random_flow(4))
    with pytest.raises(DeprecationWarning):
        fast.log_jacobian(torch.randn(2, 4))


@torch.no_grad()
def test_log_jacobian_is_that_of_the_map() -> None:
    fast = flows.accelerate(random_flow(6, (3,)).double())
    x, c = torch.randn(1, 6, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    numeric = fast.log_jacobian_numerical(x, [c], h=1e-6)
    close(fast(x, c)[1], numeric.double(), rtol=1e-6, atol=1e-6)


def test_permute_random_leaves_numpy_alone() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    mine = flows.PermuteRandom([(20,)], seed=3)
    assert (np.random.get_state()[1] == before).all()
    peer = fm.PermuteRandom([(20,)], seed=3)
    assert torch.equal(mine.perm, peer.perm)
    assert torch.equal(mine.perm_inv, peer.perm_inv)
    np.random.seed(8)
    mine = flows.PermuteRandom([(20,)])
    np.random.seed(8)
    assert torch.equal(mine.perm, fm.PermuteRandom([(20,)]).perm)


# --- weights that change ----------------------------------------------------------------------


def _optimizer_step(net: Any) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    (x, c) = inputs(net, 4)
    with torch.enable_grad():
        out, log_jac = net(x, c)
        (out.square().mean() - log_jac.mean()).backward()
    optimizer.step()


def _load_other_weights(net: Any) -> None:
    other = random_flow(9, (4,))
    state = other.state_dict()
    state["module_list.1.perm"] = torch.from_numpy(np.random.RandomState(77).permutation(9))
    state["module_list.1.perm_inv"] = state["module_list.1.perm"].argsort()
    net.load_state_dict(state)


def _replace_parameter(net: Any) -> None:
    net.module_list[2].subnet1[0].weight = nn.Parameter(torch.randn(32, 8))


def _assign_data(net: Any) -> None:
    net.module_list[2].subnet2[2].bias.data = torch.randn(8)


def _replace_submodule(net: Any) -> None:
    net.module_list[2].subnet1[1] = nn.Tanh()


def _append_to_subnet(net: Any) -> None:
    net.module_list[0].subnet1.append(nn.Tanh())


def _change_clamp(net: Any) -> None:
    net.module_list[0].clamp = 0.5


def _to_double_and_back(net: Any) -> None:
    _replace_parameter(net.double().float())


def _edit_behind_autograd_then_eval(net: Any) -> None:
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)
    net.eval()


@pytest.mark.parametrize(
    "change",
    [
        _optimizer_step,
        _load_other_weights,
        _replace_parameter,
        _assign_data,
        _replace_submodule,
        _append_to_subnet,
        _change_clamp,
        _to_double_and_back,
        _edit_behind_autograd_then_eval,
    ],
)
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    net = flows.accelerate(random_flow(9, (4,)), inplace=True)
    x, c = inputs(net, 5)
    with torch.no_grad():
        before = net(x, c)[0].clone()
        change(net)
        after = net(x, c)[0]
        expected = ff.GraphINN.forward(flows.restore(copy.deepcopy(net)), x, c)[0]
    assert max_error(before, after) > 1e-3
    close(after, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_registered_later_run() -> None:
    net = flows.accelerate(random_flow(9, (4,)))
    x, c = inputs(net, 5)
    before = net(x, c)[0]
    handle = net.module_list[0].subnet1[2].register_forward_hook(lambda m, i, o: o + 1.0)
    assert max_error(net(x, c)[0], before) > 1e-2
    assert "hooks" in str(flows.explain(net))
    handle.remove()
    close(net(x, c)[0], before)
    handle = net.module_list[0].register_forward_hook(
        lambda m, i, o: ((o[0][0] + 1.0,), o[1]),
    )
    assert max_error(net(x, c)[0], before) > 1e-2


@torch.no_grad()
def test_a_sequence_may_grow() -> None:
    net = random_flow(6, graph="SequenceINN", framework=flows, modules=flows, blocks=1)
    x = torch.randn(3, 6)
    net(x)
    net.append(flows.GLOWCouplingBlock, subnet_constructor=mlp(nn.ReLU()))
    close(net(x)[0], ff.SequenceINN.forward(net, x)[0])


@torch.no_grad()
def test_a_wrong_permutation_is_refused() -> None:
    net = flows.accelerate(random_flow(6))
    x = torch.randn(3, 6)
    net(x)
    net.module_list[1].perm[0] = net.module_list[1].perm[1]
    with pytest.raises(ValueError, match=r"module_list\.1: expected a permutation of 0\.\.5"):
        net(x)
    net.module_list[1].perm.copy_(torch.tensor([1, 2, 0, 3, 4, 5]))
    with pytest.raises(ValueError, match="not its inverse"):
        net(x)


# --- copies -----------------------------------------------------------------------------------


def _pickled(net: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(net))


def _saved(net: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [_pickled, _saved, copy.deepcopy])
@pytest.mark.parametrize("clamp", ["ATAN", "TANH", "SIGMOID"])
@pytest.mark.parametrize("graph", ["GraphINN", "ReversibleGraphNet", "SequenceINN"])
@torch.no_grad()
def test_copies(duplicate: Callable, clamp: str, graph: str) -> None:
    # FrEIA keeps lambdas for the clamp, and its nodes the local function that makes a subnet
    net = flows.accelerate(random_flow(9, (4,), graph=graph, clamp_activation=clamp))
    x, c = inputs(net, 5)
    expected = net(x, c)
    twin = duplicate(net)
    assert "_flow" not in twin.__dict__
    assert is_fused(twin)
    for a, b in zip(twin(x, c), expected, strict=True):
        assert torch.equal(a, b)
    next(twin.parameters()).add_(1.0)
    assert torch.equal(net(x, c)[0], expected[0])
    assert max_error(twin(x, c)[0], expected[0]) > 1e-3


def test_packed_weights_are_not_saved() -> None:
    net = flows.accelerate(random_flow(9, (4,), hidden=256))
    size = len(pickle.dumps(net))
    with torch.no_grad():
        net(*inputs(net, 5))
    assert len(pickle.dumps(net)) == size


# --- what is not a plain MLP ------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 16), nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)))


def _layer_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.LayerNorm(16), nn.Linear(16, outputs))


def _weight_norm(inputs: int, outputs: int) -> nn.Module:
    parts = mlp(nn.ReLU())(inputs, outputs)
    nn.utils.parametrizations.weight_norm(parts[0])
    return parts


def _two_activations(inputs: int, outputs: int) -> nn.Module:
    return mlp(nn.ReLU(), nn.Tanh())(inputs, outputs)


class _SomePlain:
    """Every third subnet opaque: packed segments and torch modules in turn."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        self.count += 1
        return (Residual if self.count % 3 == 0 else mlp(nn.ReLU()))(inputs, outputs)


@pytest.mark.parametrize(
    ("subnet", "reason"),
    [
        (Residual, "Residual"),
        (_layer_norm, "LayerNorm"),
        (_weight_norm, "ParametrizedLinear"),
        (_two_activations, "different activations"),
        (_SomePlain(), "of 8 half-couplings fused"),
    ],
)
@torch.no_grad()
def test_opaque_subnets(subnet: Any, reason: str) -> None:
    net = random_flow(9, (4,), subnet=subnet)
    fast = flows.accelerate(net)
    assert reason in str(flows.explain(fast))
    assert_same(net, fast)


class Wrapped(torch.Tensor):
    """Memory that need not be what a kernel takes it for (quantised, distributed, ...)."""


@torch.no_grad()
def test_weights_of_a_tensor_subclass() -> None:
    net = random_flow(9, (4,))
    net.module_list[2].subnet1[0].weight = nn.Parameter(torch.randn(32, 8).as_subclass(Wrapped))
    fast = flows.accelerate(net)
    assert "Wrapped is a tensor subclass" in flows.explain(fast).rows[0]["reason"]
    x, c = inputs(net, 5)
    close(fast(x, c)[0].as_subclass(Tensor), net(x, c)[0].as_subclass(Tensor))


@pytest.mark.parametrize("subnet", [None, Residual, _SomePlain()])
@torch.no_grad()
def test_clamp_of_the_users_own(subnet: Any) -> None:
    net = random_flow(
        9, (4,), subnet=subnet, clamp_activation=lambda u: u / (1 + u.abs()), clamp=1.5
    )
    fast = flows.accelerate(net)
    assert "clamp function without a fused form" in str(flows.explain(fast)) or subnet
    assert_same(net, fast)


@torch.no_grad()
def test_a_clamp_with_a_changing_constant_is_followed() -> None:
    constant = [0.636]
    net = random_flow(9, (4,), clamp_activation=lambda u: constant[0] * torch.atan(u))
    fast = flows.accelerate(net)
    x, c = inputs(net, 5)
    before = fast(x, c)[0]
    constant[0] = 0.3
    close(fast(x, c)[0], net(x, c)[0])
    assert max_error(fast(x, c)[0], before) > 1e-2


@torch.no_grad()
def test_other_blocks_run_as_freia() -> None:
    net = ff.SequenceINN(8)
    net.append(fm.GLOWCouplingBlock, cond=0, cond_shape=(3,), subnet_constructor=mlp(nn.ReLU()))
    net.append(fm.LearnedElementwiseScaling)
    fast = flows.accelerate(net.eval())
    rows = {row["name"]: row for row in flows.explain(fast).rows}
    assert "LearnedElementwiseScaling, which has no fused form" in rows[""]["reason"]
    assert rows["module_list.0"]["accelerated"]
    assert not rows["module_list.1"]["accelerated"]
    assert_same(net, fast)


class Doubled(fm.GLOWCouplingBlock):
    def _coupling1(self, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        y1, j1 = super()._coupling1(0.5 * x1 if rev else 2.0 * x1, u2, rev)
        return y1, j1


@torch.no_grad()
def test_blocks_with_arithmetic_of_their_own_keep_it() -> None:
    net = ff.SequenceINN(8)
    for block in (fm.GLOWCouplingBlock, Doubled):
        net.append(block, subnet_constructor=mlp(nn.ReLU()))
    fast = flows.accelerate(net.eval())
    x = torch.randn(5, 8)
    close(fast(x)[0], net(x)[0])
    assert "Doubled" in flows.explain(fast).rows[0]["reason"]
    with pytest.raises(flows.UnsupportedFlow, match="Doubled"):
        flows.describe(net.module_list[1])


def test_flows_with_a_forward_of_their_own_are_not_described() -> None:
    class Shifted(ff.GraphINN):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, log_jac = super().forward(*args, **kwargs)
            return out + 1.0, log_jac

    net = Shifted(random_flow(6).node_list)
    with pytest.raises(flows.UnsupportedFlow, match="forward of its own"):
        flows.describe(net)
    patched = random_flow(6)
    patched.module_list[2].forward = patched.module_list[2].forward
    with pytest.raises(flows.UnsupportedFlow, match=r"module_list\.2 has a forward of its own"):
        flows.describe(patched)


@torch.no_grad()
def test_branching_graphs_and_images_run_as_freia() -> None:
    first, second = ff.InputNode(4, name="a"), ff.InputNode(4, name="b")
    join = ff.Node([first.out0, second.out0], fm.Concat, {})
    block = ff.Node(join, fm.GLOWCouplingBlock, {"subnet_constructor": mlp(nn.ReLU())})
    net = ff.GraphINN([first, second, join, block, ff.OutputNode(block)]).eval()
    fast = flows.accelerate(net)
    assert "several inputs" in flows.explain(fast).rows[0]["reason"]
    x = [torch.randn(5, 4), torch.randn(5, 4)]
    for a, b in zip(fast(x), net(x), strict=True):
        close(a, b)

    image = ff.InputNode(4, 5, 5, name="image")
    conv = ff.Node(
        image,
        fm.GLOWCouplingBlock,
        {"subnet_constructor": lambda i, o: nn.Conv2d(i, o, 3, padding=1)},
    )
    net = ff.GraphINN([image, conv, ff.OutputNode(conv)]).eval()
    fast = flows.accelerate(net)
    for a, b in zip(fast(torch.ones(2, 4, 5, 5)), net(torch.ones(2, 4, 5, 5)), strict=True):
        close(a, b)


def test_dropout_in_training() -> None:
    net = random_flow(9, (4,), subnet=mlp(nn.Sequential(nn.Dropout(0.5), nn.ReLU())))
    fast = flows.accelerate(net)
    x, c = inputs(net, 50)
    with torch.no_grad():
        still = fast(x, c)[0]
    net.train()
    fast.train()
    assert "Dropout in training mode" in str(flows.explain(fast))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.manual_seed(1)
            peer = net(x, c)[0]
            torch.manual_seed(1)
            out = fast(x, c)[0]
        close(out, peer)
        assert max_error(out, still) > 1e-2
    fast.eval()
    with torch.no_grad():
        assert torch.equal(fast(x, c)[0], still)
        fast.module_list[0].subnet1[1][0].train()  # a single dropout, behind the flow's back
        assert max_error(fast(x, c)[0], still) > 1e-2


# --- gradients and transforms -----------------------------------------------------------------


@pytest.mark.parametrize("rev", [False, True])
def test_gradients_equal_freias(rev: bool) -> None:
    net = random_flow(9, (4,)).double()
    fast = flows.accelerate(net)
    x, (c,) = inputs(net, 5, torch.float64)
    found = []
    for flow in (net, fast):
        leaves = [x.clone().requires_grad_(), c.clone().requires_grad_()]
        out, log_jac = flow(leaves[0], leaves[1], rev=rev)
        parameters = [p for p in flow.parameters() if p.requires_grad]
        found.append(
            torch.autograd.grad(out.pow(3).sum() + log_jac.square().sum(), leaves + parameters)
        )
    for a, b in zip(*found, strict=True):
        close(a, b, rtol=1e-10, atol=1e-10)


def test_frozen_weights_still_pass_gradients_to_the_input() -> None:
    net = random_flow(9, (4,))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    fast = flows.accelerate(net)
    x, (c,) = inputs(fast, 5)
    assert not fast(x, c)[0].requires_grad
    for leaf in (x, c):
        leaf.requires_grad_()
        found = [torch.autograd.grad(flow(x, c)[0].sum(), leaf)[0] for flow in (fast, net)]
        close(*found)
        leaf.requires_grad_(False)


def test_vmap_and_functional_call() -> None:
    net = random_flow(9, (4,)).double()
    fast = flows.accelerate(net)
    x, (c,) = inputs(net, 5, torch.float64)
    one = torch.func.vmap(lambda x, c: fast(x[None], c[None])[0][0])(x, c)
    close(one, net(x, c)[0])
    jacobian = torch.func.jacrev(lambda x: fast(x[None], c[:1])[0][0])(x[0])
    close(torch.linalg.slogdet(jacobian)[1], net(x, c)[1][0])
    tangent = torch.func.jvp(lambda x: fast(x, c)[0], (x,), (torch.ones_like(x),))[1]
    with torch.no_grad():
        numeric = (fast(x + 1e-6, c)[0] - fast(x - 1e-6, c)[0]) / 2e-6
    close(tangent, numeric, rtol=1e-6, atol=1e-6)
    other = random_flow(9, (4,)).double()
    with torch.no_grad():
        swapped = torch.func.functional_call(fast, dict(other.named_parameters()), (x, c))[0]
        close(swapped, other(x, c)[0])
        close(fast(x, c)[0], net(x, c)[0])


def test_forward_mode_is_not_cut() -> None:
    fast = flows.accelerate(random_flow(9, (4,)))
    x, (c,) = inputs(fast, 5)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = fast(dual, c)[0]
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None


def test_compile() -> None:
    net = random_flow(9, (4,), blocks=2)
    fast = flows.accelerate(net)
    x, c = inputs(net, 5)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for rev in (False, True):
            for a, b in zip(compiled(x, c, rev=rev), net(x, c, rev=rev), strict=True):
                close(a, b)


def test_autocast_and_inference_mode() -> None:
    net = random_flow(9, (4,))
    fast = flows.accelerate(net)
    x, c = inputs(net, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = fast(x.bfloat16(), [given.bfloat16() for given in c])
    # a flow stays in float32 whatever autocast says
    exact = net(x.bfloat16().float(), [given.bfloat16().float() for given in c])
    for value, expected in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        close(value, expected)
    with torch.inference_mode():
        close(fast(x, c)[0], net(x, c)[0])
        inside = flows.accelerate(random_flow(9, (4,)))
        assert "inference mode" in flows.explain(inside).rows[0]["reason"]
        inside(x, c)
    x.requires_grad_()
    fast(x, c)[0].sum().backward()
    assert x.grad is not None


# --- processes and threads --------------------------------------------------------------------


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class _Sampled(Dataset):
    def __init__(self, flow: Any, x: Tensor, c: list[Tensor]) -> None:
        self.flow, self.x, self.c = flow, x, c

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.flow(self.x, self.c)[0]


@pytest.mark.usefixtures("_restored_threads")
def test_workers_forked_after_use() -> None:
    torch.set_num_threads(3)
    fast = flows.accelerate(random_flow(9, (4,)))
    x, c = inputs(fast, 300)
    with torch.no_grad():
        expected = fast(x, c)[0]
    loader = DataLoader(
        _Sampled(fast, x, c), num_workers=2, multiprocessing_context="fork", timeout=60
    )
    results = list(loader)
    assert len(results) == 4
    assert all(torch.equal(result[0], expected) for result in results)


@pytest.mark.usefixtures("_restored_threads")
@torch.no_grad()
def test_a_forked_process_has_threads_of_its_own() -> None:
    torch.set_num_threads(3)
    fast = flows.accelerate(random_flow(9, (4,)))
    x, c = inputs(fast, 300)
    expected = fast(x, c)[0]

    def child() -> None:  # leaves with 0 only if every result is right
        for _ in range(3):
            assert torch.equal(fast(x, c)[0], expected)

    processes = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
    for process in processes:
        process.start()
    assert torch.equal(fast(x, c)[0], expected)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


@pytest.mark.usefixtures("_restored_threads")
@torch.no_grad()
def test_bits_do_not_depend_on_the_thread_count() -> None:
    fast = flows.accelerate(random_flow(39, (17,)))
    x, c = inputs(fast, 999)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(fast(x, c))
    for out, log_jac in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(log_jac, results[0][1])


def test_python_threads() -> None:
    nets = [flows.accelerate(random_flow(9, (4,))) for _ in range(2)]
    x, c = inputs(nets[0], 64)
    with torch.no_grad():
        expected = [[net(x, c, rev=rev)[0] for rev in (False, True)] for net in nets]
    nets = [net.eval() for net in nets]  # caches forgotten: threads race to pack
    wrong: list[str] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for step in range(20):
                which, rev = (number + step) % 2, step % 3 == 0
                if not torch.equal(nets[which](x, c, rev=rev)[0], expected[which][int(rev)]):
                    wrong.append(f"thread {number}, step {step}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "c", "error", "message"),
    [
        (torch.randn(5, 8), torch.randn(5, 4), ValueError, r"x_or_z: expected shape \(N, 9\)"),
        (torch.randn(5, 1, 9), torch.randn(5, 4), ValueError, r"x_or_z: expected shape \(N, 9\)"),
        (torch.randn(5, 9), torch.randn(5, 3), ValueError, r"c\[0\]: expected shape \(5, 4\)"),
        (torch.randn(5, 9), torch.randn(4, 4), ValueError, r"c\[0\]: expected shape \(5, 4\)"),
        (torch.randn(5, 9), None, ValueError, "Got 0 conditions, but expected 1"),
        (torch.randn(5, 9), [torch.randn(5, 4)] * 2, ValueError, "Got 2 conditions"),
        ([torch.randn(5, 9)] * 2, torch.randn(5, 4), ValueError, "Got 2 inputs"),
        (torch.randn(5, 9).double(), torch.randn(5, 4), TypeError, "x: expected torch.float32"),
        (torch.randn(5, 9), torch.randn(5, 4).double(), TypeError, "cond: expected torch.float32"),
        (torch.ones(5, 9).int(), torch.randn(5, 4), TypeError, "x: expected torch.float32"),
        (torch.randn(5, 9, device="meta"), torch.randn(5, 4), ValueError, "x: is on meta"),
        (["a"], torch.randn(5, 4), TypeError, "x_or_z: expected a tensor, got str"),
        (torch.randn(5, 9), [[1.0]], TypeError, r"c\[0\]: expected a tensor, got list"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(x: Any, c: Any, error: type, message: str, grad: bool) -> None:
    fast = flows.accelerate(random_flow(9, (4,)))
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        fast(x, c)


@torch.no_grad()
def test_no_rows() -> None:
    fast = flows.accelerate(random_flow(9, (4,)))
    out, log_jac = fast(torch.empty(0, 9), torch.empty(0, 4))
    assert out.shape == (0, 9)
    assert log_jac.shape == (0,)


@torch.no_grad()
def test_strided_inputs() -> None:
    fast = flows.accelerate(random_flow(9, (4,)))
    x, c = torch.randn(9, 10).T[::2], torch.randn(5, 8)[:, ::2]
    close(fast(x, c)[0], fast(x.contiguous(), c.contiguous())[0])
    expanded = c[:1].expand(5, 4)
    close(fast(x, expanded)[0], fast(x, expanded.contiguous())[0])
