"""FrEIA's other coupling blocks and linear maps, fused, against FrEIA itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
from torch import Tensor, nn

import fasthyp.flows as flows
from fasthyp.flows.freia_master import MasterAllInOneBlock
from fasthyp.sampling import HypothesisSampler
from tests.conftest import max_error

COUPLINGS = (
    "GLOWCouplingBlock",
    "RNVPCouplingBlock",
    "NICECouplingBlock",
    "GINCouplingBlock",
    "AffineCouplingOneSided",
    "ConditionalAffineTransform",
    "AllInOneBlock",
)
ALL_IN_ONE: tuple[dict[str, Any], ...] = (
    {},
    {"gin_block": True},
    {"permute_soft": True},
    {"permute_soft": True, "gin_block": True, "reverse_permutation": True},
    {"reverse_permutation": True},
    {"global_affine_type": "SIGMOID", "affine_clamping": 1.3},
    {"global_affine_type": "EXP", "global_affine_init": 0.6},
    {"learned_householder_permutation": 3},
    {"learned_householder_permutation": 2, "reverse_permutation": True, "permute_soft": True},
)


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)


def mlp(inputs: int, outputs: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))
    with torch.no_grad():
        net[2].weight.mul_(2.0)
    return net


def sine(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), Sine(), nn.Linear(8, outputs))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def sequence(
    block: Any, dim: int = 9, cond: int | None = 4, framework: Any = ff, **settings: Any
) -> Any:
    net = framework.SequenceINN(dim)
    settings = {"subnet_constructor": mlp, **settings}
    for k in range(2):
        given = {} if cond is None else {"cond": 0, "cond_shape": (cond,)}
        net.append(block, **given, **settings)
        net.append(fm.PermuteRandom, seed=k)
    disturb(net)
    return net.eval()


def graph(block: Any, dim: int = 9, kind: str = "GraphINN", **settings: Any) -> Any:
    settings = {"subnet_constructor": mlp, **settings}
    condition = ff.ConditionNode(4, name="c")
    nodes = [ff.InputNode(dim, name="x")]
    for k in range(2):
        nodes.append(ff.Node(nodes[-1], block, dict(settings), condition))
        nodes.append(ff.Node(nodes[-1], fm.PermuteRandom, {"seed": k}))
    net = getattr(ff, kind)([*nodes, condition, ff.OutputNode(nodes[-1])])
    disturb(net)
    return net.eval()


def disturb(net: nn.Module) -> None:
    """Global scales and offsets that are at work."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "global" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)


def is_fused(net: nn.Module) -> bool:
    return all(row["accelerated"] for row in flows.explain(net).rows)


def assert_same(net: nn.Module, fast: nn.Module, conds: list[Tensor], dim: int = 9) -> None:
    """The same numbers as FrEIA in float64, and its accuracy in float32, both ways."""
    x = torch.randn(7, dim)
    net64, fast64 = copy.deepcopy(net).double(), copy.deepcopy(fast).double()
    for rev in (False, True):
        exact = net64(x.double(), [c.double() for c in conds], rev=rev)
        double = fast64(x.double(), [c.double() for c in conds], rev=rev)
        peer, single = net(x, conds, rev=rev), fast(x, conds, rev=rev)
        for i in range(2):
            if not isinstance(exact[i], Tensor):  # no log-Jacobian
                assert exact[i] == double[i] == single[i] == 0.0
                continue
            scale = max(1.0, float(exact[i].abs().max()))
            assert single[i].shape == exact[i].shape
            assert max_error(double[i], exact[i]) <= 1e-12 * scale
            allowed = max(4.0 * max_error(peer[i], exact[i]), 2e-5 * scale)
            assert max_error(single[i], exact[i]) <= allowed


# --- couplings --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GraphINN", "ReversibleGraphNet", "SequenceINN"])
@pytest.mark.parametrize("block", COUPLINGS)
@torch.no_grad()
def test_same_numbers(block: str, kind: str) -> None:
    block = getattr(fm, block)
    net = sequence(block) if kind == "SequenceINN" else graph(block, kind=kind)
    fast = flows.accelerate(net)
    assert is_fused(fast)
    assert_same(net, fast, [torch.randn(7, 4)])


@pytest.mark.parametrize(
    "settings",
    [
        *({"clamp_activation": name, "clamp": 1.5} for name in ("ATAN", "TANH", "SIGMOID")),
        {"clamp_activation": lambda u: u / (1 + u.abs())},
        {"split_len": 2},
        {"split_len": 0},
        {"split_len": 1.0},
        {"subnet_constructor": sine},
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [b for b in COUPLINGS if b != "AllInOneBlock"])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_same_numbers_for_every_setting(block: str, settings: dict[str, Any]) -> None:
    if block == "NICECouplingBlock":
        settings = {k: v for k, v in settings.items() if "clamp" not in k}
    if block == "GINCouplingBlock" and settings.get("split_len") in (0, 1.0):
        pytest.skip("FrEIA takes the mean of nothing")
    net = sequence(getattr(fm, block), **settings)
    fast = flows.accelerate(net)
    assert "own forward" not in str(flows.explain(fast))
    assert_same(net, fast, [torch.randn(7, 4)])


@pytest.mark.parametrize("settings", ALL_IN_ONE, ids=str)
@pytest.mark.parametrize("cond", [4, None])
@torch.no_grad()
def test_all_in_one(settings: dict[str, Any], cond: int | None) -> None:
    net = sequence(fm.AllInOneBlock, cond=cond, **settings)
    fast = flows.accelerate(net)
    assert is_fused(fast)
    conds = [] if cond is None else [torch.randn(7, cond)]
    assert_same(net, fast, conds)


@pytest.mark.parametrize("settings", ALL_IN_ONE, ids=str)
@torch.no_grad()
def test_all_in_one_of_git_master(settings: dict[str, Any]) -> None:
    net = sequence(MasterAllInOneBlock, **settings)
    fast = flows.accelerate(net)
    assert is_fused(fast)
    hard = not ("permute_soft" in settings or "learned_householder_permutation" in settings)
    if hard:
        assert net.state_dict()["module_list.0.w_perm"].dtype == torch.int64
    assert_same(net, fast, [torch.randn(7, 4)])
    x = [torch.randn(7, 9)]
    block = net.module_list[0]
    for a, b in zip(block(x, [torch.ones(7, 4)]), block(x, [torch.ones(7, 4)]), strict=True):
        torch.testing.assert_close(a, b)
    tanh = sequence(fm.AllInOneBlock, **settings).module_list[0]
    assert tanh._affine is not block._affine
    large = torch.full((1, 8), 100.0)
    scale = block._affine(torch.ones(1, 4), large.clone())[1]
    if not settings.get("gin_block"):
        clamp = block.clamp
        expected = 4 * clamp * torch.tanh(torch.tensor(10.0 / clamp))
        torch.testing.assert_close(scale, expected[None])


@pytest.mark.parametrize("block", COUPLINGS)
def test_own_classes(block: str) -> None:
    """Same weights and keys, gradients of everything, return types alone and in a sequence."""
    net = sequence(getattr(fm, block)).double()
    own = sequence(getattr(flows, block), framework=flows).double()
    assert list(own.state_dict()) == list(net.state_dict())
    own.load_state_dict(net.state_dict())
    assert is_fused(own)
    x, c = torch.randn(7, 9).double(), torch.randn(7, 4).double()
    for rev in (False, True):
        found = []
        for one in (net, own):
            leaves = [x.clone().requires_grad_(), c.clone().requires_grad_()]
            out, log_jac = one(leaves[0], [leaves[1]], rev=rev)
            parameters = [p for p in one.parameters() if p.requires_grad]
            objective = out.pow(3).sum() + (log_jac + 0 * out.sum(1)).square().sum()
            found.append(torch.autograd.grad(objective, [*leaves, *parameters]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            peer, got = (one.module_list[0]([x], [c], rev=rev) for one in (net, own))
        assert type(got[0]) is type(peer[0])
        assert type(got[1]) is type(peer[1])
        torch.testing.assert_close(got[0][0], peer[0][0])
        torch.testing.assert_close(torch.as_tensor(got[1]), torch.as_tensor(peer[1]))
        assert type(own(x, [c], rev=rev)[1]) is type(net(x, [c], rev=rev)[1])


@pytest.mark.parametrize("block", COUPLINGS)
@torch.no_grad()
def test_alone(block: str) -> None:
    net = getattr(fm, block)([(9,)], [(3,), (2,)], subnet_constructor=mlp)
    fast = flows.accelerate(net)
    assert is_fused(fast)
    assert type(flows.restore(copy.deepcopy(fast))) is type(net)
    x, c = [torch.randn(7, 9)], [torch.randn(7, 3), torch.randn(7, 2)]
    torch.testing.assert_close(fast(x, c)[0][0], net(x, c)[0][0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="c: expected 5 columns, got no tensor"):
        fast(x)


@pytest.mark.parametrize("block", COUPLINGS)
@torch.no_grad()
def test_copies(block: str) -> None:
    for net in (sequence(getattr(fm, block)), graph(getattr(fm, block))):
        fast = flows.accelerate(net)
        x, c = torch.randn(7, 9), [torch.randn(7, 4)]
        expected = fast(x, c)[0]
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert is_fused(twin)
            assert torch.equal(twin(x, c)[0], expected)
            next(p for p in twin.parameters() if p.requires_grad).add_(1.0)
            assert not torch.equal(twin(x, c)[0], expected)
        assert torch.equal(fast(x, c)[0], expected)


def _scale(block: Any) -> None:
    block.global_scale.add_(1.0)


def _rotate(block: Any) -> None:
    block.w_perm.copy_(block.w_perm.flip(0))
    block.w_perm_inv.copy_(block.w_perm.T)


def _scale_rotation(block: Any) -> None:
    block.w_perm.mul_(2.0)
    block.w_perm_inv.mul_(0.5)


def _gin(block: Any) -> None:
    block.GIN = True


def _clamp(block: Any) -> None:
    block.clamp = 0.3


def _reverse(block: Any) -> None:
    block.reverse_pre_permute = True


def _exponential(block: Any) -> None:
    block.global_scale_activation = torch.exp


def _unknown_scale(block: Any) -> None:
    block.global_scale_activation = lambda a: a.square() + 0.1


@pytest.mark.parametrize(
    "change",
    [
        *(_scale, _rotate, _scale_rotation, _gin, _clamp, _reverse, _exponential, _unknown_scale),
        lambda block: block.global_offset.add_(1.0),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"permute_soft": True}], ids=str)
@torch.no_grad()
def test_changes_of_an_all_in_one_block(change: Callable, settings: dict[str, Any]) -> None:
    fast = flows.accelerate(sequence(fm.AllInOneBlock, **settings), inplace=True)
    x, c = torch.randn(7, 9), [torch.randn(7, 4)]
    before = fast(x, c)[0]
    change(fast.module_list[0])
    after = fast(x, c)[0]
    assert max_error(after, before) > 1e-3
    torch.testing.assert_close(after, ff.SequenceINN.forward(fast, x, c)[0], rtol=1e-4, atol=1e-4)
    plain = flows.restore(copy.deepcopy(fast))
    torch.testing.assert_close(after, plain(x, c)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reflections_that_change() -> None:
    fast = flows.accelerate(sequence(fm.AllInOneBlock, learned_householder_permutation=2))
    x, c = torch.randn(7, 9), [torch.randn(7, 4)]
    before = fast(x, c)[0]
    fast.module_list[0].vk_householder.copy_(torch.randn(2, 9))
    assert max_error(fast(x, c)[0], before) > 1e-2
    plain = flows.restore(copy.deepcopy(fast))
    torch.testing.assert_close(fast(x, c)[0], plain(x, c)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", ["RNVPCouplingBlock", "NICECouplingBlock", "AllInOneBlock"])
@torch.no_grad()
def test_opaque_subnets_are_named(block: str) -> None:
    fast = flows.accelerate(sequence(getattr(fm, block), subnet_constructor=sine))
    rows = flows.explain(fast).rows[1:]
    names = {"RNVPCouplingBlock": 8, "NICECouplingBlock": 4, "AllInOneBlock": 2}
    assert len({row["name"] for row in rows}) == names[block]
    modules = dict(fast.named_modules())
    assert all(type(modules[row["name"]]) is nn.Sequential for row in rows)
    assert all("Sine" in row["reason"] for row in rows)


# --- linear maps ------------------------------------------------------------------------------


def _chain(*parts: tuple[Any, dict[str, Any]]) -> Any:
    net = ff.SequenceINN(9)
    net.append(fm.GLOWCouplingBlock, subnet_constructor=mlp)
    for block, settings in parts:
        net.append(block, **settings)
        net.append(fm.GLOWCouplingBlock, subnet_constructor=mlp)
    return net.eval()


@pytest.mark.parametrize(
    ("block", "settings"),
    [
        (fm.FixedLinearTransform, {"M": torch.randn(9, 9)}),
        (fm.FixedLinearTransform, {"M": torch.randn(9, 9), "b": torch.randn(9)}),
        (fm.HouseholderPerm, {"n_reflections": 3}),
        (fm.HouseholderPerm, {"n_reflections": 4, "fixed": True}),
    ],
)
@torch.no_grad()
def test_linear_maps(block: Any, settings: dict[str, Any]) -> None:
    net = _chain((block, settings))
    fast = flows.accelerate(net)
    assert is_fused(fast)
    assert_same(net, fast, [])


@torch.no_grad()
def test_act_norm() -> None:
    net, x = _chain((fm.ActNorm, {})), torch.randn(50, 9)
    twin = copy.deepcopy(net)
    fast = flows.accelerate(net)
    assert "first batch" in flows.explain(fast).rows[0]["reason"]
    out = fast(x)[0]  # which sets it
    torch.testing.assert_close(out, twin(x)[0], rtol=1e-4, atol=1e-4)
    assert is_fused(fast)
    twin.load_state_dict(fast.state_dict())
    assert_same(twin, fast, [])


# --- what stays FrEIA's -----------------------------------------------------------------------


@pytest.mark.parametrize("block", COUPLINGS)
@torch.no_grad()
def test_images(block: str) -> None:
    def conv(inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 1)

    net = ff.SequenceINN(4, 3, 3)
    net.append(getattr(fm, block), cond=0, cond_shape=(2, 3, 3), subnet_constructor=conv)
    fast = flows.accelerate(net.eval())
    assert "not one dimension" in flows.explain(fast).rows[0]["reason"]
    x, c = torch.randn(2, 4, 3, 3), [torch.randn(2, 2, 3, 3)]
    for a, b in zip(fast(x, c), net(x, c), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


class Halved(fm.AllInOneBlock):
    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        return super()._affine(x, 0.5 * a, rev)


class Shifted(fm.RNVPCouplingBlock):
    def _coupling2(self, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        y, log_jac = super()._coupling2(x2 - 1.0 if not rev else x2, u1, rev)
        return y + 1.0 if rev else y, log_jac


@pytest.mark.parametrize("block", [Halved, Shifted])
@torch.no_grad()
def test_blocks_with_arithmetic_of_their_own_keep_it(block: Any) -> None:
    net = sequence(block)
    fast = flows.accelerate(net)
    assert block.__name__ in flows.explain(fast).rows[0]["reason"]
    assert_same(net, fast, [torch.randn(7, 4)])


@pytest.mark.parametrize("block", COUPLINGS)
@torch.no_grad()
def test_hooks(block: str) -> None:
    fast = flows.accelerate(sequence(getattr(fm, block)))
    x, c = torch.randn(7, 9), [torch.randn(7, 4)]
    before = fast(x, c)[0]
    handle = fast.module_list[0].register_forward_hook(lambda m, i, o: ((o[0][0] + 1,), o[1]))
    assert max_error(fast(x, c)[0], before) > 1e-2
    handle.remove()
    torch.testing.assert_close(fast(x, c)[0], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", COUPLINGS)
def test_function_transforms(block: str) -> None:
    net = sequence(getattr(fm, block)).double()
    fast = flows.accelerate(net)
    x, c = torch.randn(3, 9).double(), torch.randn(3, 4).double()
    with torch.no_grad():
        expected, log_jac = net(x, [c])
        if block != "AllInOneBlock":  # FrEIA's changes its subnet's output in place
            mapped = torch.func.vmap(lambda x, c: fast(x[None], [c[None]])[0][0])(x, c)
            torch.testing.assert_close(mapped, expected)
    jacobian = torch.func.jacrev(lambda x: fast(x[None], [c[:1]])[0][0])(x[0])
    log_det = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(log_det, torch.as_tensor(log_jac).expand(3)[0].to(log_det))


@pytest.mark.parametrize("block", COUPLINGS)
@torch.no_grad()
def test_sampler(block: str) -> None:
    net, cond = sequence(getattr(fm, block)), torch.randn(3, 4)
    x, log_prob = HypothesisSampler(net)(cond, 8, seed=1, return_log_prob=True)
    z, log_jac = net(x.flatten(0, 1), [cond.repeat_interleave(8, 0)])
    density = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + log_jac
    torch.testing.assert_close(log_prob.flatten(), density, rtol=1e-3, atol=1e-3)
