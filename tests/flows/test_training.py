"""Training through accelerated flows: gradients, modes of autograd, and weights that change."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fasthyp.flows as flows
from fasthyp.ops import coupling_training
from tests.conftest import random_flow
from tests.flows import nflows_stand_ins as nflows
from tests.flows.test_nflows import spread


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)


def pair(**settings: Any) -> tuple[Any, Any]:
    """FrEIA's flow in float64 and an accelerated one with weights of its own."""
    net = random_flow(9, (4,), blocks=2, hidden=8, **settings).double()
    return net, flows.accelerate(copy.deepcopy(net), inplace=True)


def rows(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 9).double(), torch.randn(count, 4).double()


def trainable(net: nn.Module) -> list[Any]:
    return [p for p in net.parameters() if p.requires_grad]


def loss(net: Any, x: Tensor, c: Tensor, rev: bool = False) -> Tensor:
    out, log_jac = net(x, c, rev=rev)
    return 0.5 * out.square().sum() - (log_jac * log_jac.new_tensor(0.7)).sum()


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in net.parameters() if p.requires_grad]


def same(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class Calls:
    """Counts the passes on the fused op, and keeps what its backward was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forward, self.wanted = 0, []
        run, back = coupling_training.coupling_pass, coupling_training.coupling_pass_backward

        def forward(*args: Any) -> Any:
            self.forward += 1
            return run(*args)

        def backward(*args: Any) -> Any:
            self.wanted.append(args[-1])
            return back(*args)

        monkeypatch.setattr(coupling_training, "coupling_pass", forward)
        monkeypatch.setattr(coupling_training, "coupling_pass_backward", backward)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


# --- what gets a gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("rev", [False, True])
def test_gradients_of_everything(rev: bool, calls: Calls) -> None:
    net, fast = pair()
    x, c = (t.requires_grad_() for t in rows())
    same(
        torch.autograd.grad(loss(fast, x, c, rev), [x, c, *trainable(fast)]),
        torch.autograd.grad(loss(net, x, c, rev), [x, c, *trainable(net)]),
    )
    assert calls.forward == 1
    assert all(calls.wanted[0])


def test_inputs_alone(calls: Calls) -> None:
    net, fast = pair()
    for one in (net, fast):
        one.requires_grad_(False)
    x, c = rows()
    assert not loss(fast, x, c).requires_grad
    for given in ((x,), (c,), (x, c)):
        for leaf in (x, c):
            leaf.requires_grad_(any(leaf is one for one in given))
        calls.wanted.clear()
        same(
            torch.autograd.grad(loss(fast, x, c), given),
            torch.autograd.grad(loss(net, x, c), given),
        )
        wants_cond, *wants_weights = calls.wanted[0]
        assert wants_cond == c.requires_grad
        assert not any(wants_weights)


def test_parameters_alone(calls: Calls) -> None:
    net, fast = pair()
    x, c = rows()
    same(
        torch.autograd.grad(loss(fast, x, c), trainable(fast)),
        torch.autograd.grad(loss(net, x, c), trainable(net)),
    )
    wants_cond, *wants_weights = calls.wanted[0]
    assert not wants_cond
    assert all(wants_weights)


def test_frozen_parameters_cost_nothing(calls: Calls) -> None:
    net, fast = pair()
    for one in (net, fast):
        one.module_list[0].requires_grad_(False)
        one.module_list[2].subnet1[0].weight.requires_grad_(False)
    x, c = (t.requires_grad_() for t in rows())
    for one in (net, fast):
        loss(one, x.detach(), c.detach()).backward()
    for ours, theirs in zip(fast.parameters(), net.parameters(), strict=True):
        same([ours.grad], [theirs.grad])
    # two nets of two Linears: first weight, its condition's part, bias, weight, bias
    assert calls.wanted == [[False, *[False] * 10, *[True] * 5, False, False, *[True] * 3]]


def test_only_one_output(calls: Calls) -> None:
    net, fast = pair()
    x, c = (t.requires_grad_() for t in rows())
    for k, rev in ((0, False), (1, False), (0, True), (1, True)):
        found, expected = (
            torch.autograd.grad(
                one(x, c, rev=rev)[k].pow(2).sum(),
                [x, c, *trainable(one)],
                allow_unused=True,
                materialize_grads=True,
            )
            for one in (fast, net)
        )
        same(found, expected)
    assert len(calls.wanted) == 4


def test_accumulation_and_repeated_backward() -> None:
    net, fast = pair()
    x, c = rows(8)
    for one in (net, fast):
        for part in (slice(0, 3), slice(3, 8)):
            loss(one, x[part], c[part]).backward()
        value = loss(one, x, c)
        value.backward(retain_graph=True)
        value.backward()
    same(gradients(fast), gradients(net))
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_hooks_on_parameters() -> None:
    net, fast = pair()
    x, c = rows()
    for one in (net, fast):
        one.module_list[0].subnet1[0].weight.register_hook(lambda grad: 2.0 * grad)
        one.module_list[0].subnet1[0].bias.register_post_accumulate_grad_hook(
            lambda p: setattr(p, "grad", 3.0 * p.grad)
        )
        loss(one, x, c).backward()
    same(gradients(fast), gradients(net))


def test_a_weight_changed_between_forward_and_backward_is_an_error() -> None:
    _, fast = pair()
    x, c = rows()
    for name in ("weight", "bias"):
        value = loss(fast, x, c)
        with torch.no_grad():
            getattr(fast.module_list[0].subnet1[0], name).add_(0.1)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            value.backward()


def test_outputs_changed_in_place_are_an_error() -> None:
    """As of any operation that needs its output."""
    _, fast = pair()
    out, log_jac = fast(*rows())
    changed = out.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (changed.sum() + log_jac.sum()).backward()


# --- modes of autograd ------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    net, fast = pair()
    x, c = (t.requires_grad_() for t in rows())
    out, log_jac = checkpoint(fast, x, c, use_reentrant=reentrant)
    (0.5 * out.square().sum() - 0.7 * log_jac.sum()).backward()
    found = [x.grad, c.grad, *gradients(fast)]
    same(found, torch.autograd.grad(loss(net, x, c), [x, c, *trainable(net)]))


def test_functional_call() -> None:
    net, fast = pair()
    x, c = rows()
    given = {
        name: (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_()
        for name, p in net.named_parameters()
        if p.requires_grad
    }
    before = loss(fast, x, c)
    found, expected = (
        torch.autograd.grad(
            loss(lambda *a, one=one, **k: torch.func.functional_call(one, given, a, k), x, c),
            list(given.values()),
        )
        for one in (fast, net)
    )
    same(found, expected)
    assert torch.equal(loss(fast, x, c), before)
    with torch.no_grad():
        same(
            torch.func.functional_call(fast, given, (x, c)),
            torch.func.functional_call(net, given, (x, c)),
        )
        same(fast(x, c), net(x, c))


def test_function_transforms() -> None:
    net, fast = pair()
    x, c = rows()
    given = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def one(net: Any) -> Callable[..., Tensor]:
        def value(given: dict[str, Tensor], x: Tensor, c: Tensor) -> Tensor:
            z, log_jac = torch.func.functional_call(net, given, (x[None], c[None]))
            return (0.5 * z.square().sum(1) - log_jac)[0]

        return value

    per_row = torch.func.vmap(torch.func.grad(one(fast)), (None, 0, 0))(given, x, c)
    for k in range(2):
        expected = torch.autograd.grad(
            one(net)(dict(net.named_parameters()), x[k], c[k]), trainable(net)
        )
        same([grad[k] for grad in per_row.values()], expected)
    tangents = torch.randn_like(x), torch.zeros_like(c)
    _, forward = torch.func.jvp(lambda x, c: fast(x, c)[0], (x, c), tangents)
    jacobian = torch.autograd.functional.jvp(lambda x, c: net(x, c)[0], (x, c), tangents)[1]
    same([forward], [jacobian])
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, tangents[0])
        same([forward_ad.unpack_dual(fast(dual, c)[0]).tangent], [jacobian])
    models = [pair()[1] for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    integer = {name for name, p in net.named_parameters() if not p.requires_grad}
    stacked = {name: p for name, p in stacked.items() if name not in integer}
    ensemble = torch.func.vmap(lambda given: torch.func.functional_call(fast, given, (x, c))[0])
    with torch.no_grad():
        same(ensemble(stacked), [model(x, c)[0] for model in models])


@pytest.mark.parametrize("rev", [False, True])
def test_second_derivatives(rev: bool, calls: Calls) -> None:
    net = random_flow(4, (2,), blocks=1, hidden=3, subnet=_smooth).double()
    fast = flows.accelerate(net)
    x, c = torch.randn(2, 4).double().requires_grad_(), torch.randn(2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, c: fast(x, c, rev=rev), (x, c))
    assert torch.autograd.gradgradcheck(lambda x, c: fast(x, c, rev=rev), (x, c))
    assert calls.forward > 2


def _smooth(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 3), nn.SiLU(), nn.Linear(3, outputs))


def test_gradient_penalty() -> None:
    net, fast = pair()
    x, c = (t.requires_grad_() for t in rows())
    for one in (net, fast):
        z, log_jac = one(x, c)
        log_prob = log_jac - 0.5 * z.square().sum(1)
        (score,) = torch.autograd.grad(log_prob.sum(), x, create_graph=True)
        (score.square().sum() - log_prob.sum()).backward()
    same(gradients(fast), gradients(net))
    assert max(float(g.abs().max()) for g in gradients(net)) > 1.0


def test_threads() -> None:
    _, fast = pair()
    batches = [rows() for _ in range(4)]
    expected = [torch.autograd.grad(loss(fast, *batch), trainable(fast)) for batch in batches]
    found: dict[int, Any] = {}

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = torch.autograd.grad(loss(fast, *batches[k]), trainable(fast))

    fast.train()  # forget what is packed
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        same(found[k], expected[k])


def test_autocast_leaves_flows_in_their_own_dtype() -> None:
    """No scaler: bfloat16 needs none."""
    torch.manual_seed(1)
    net = random_flow(9, (4,), blocks=2, hidden=8)
    model = nn.ModuleDict({"image": nn.Linear(3, 4), "flow": flows.accelerate(net)})
    optimizer = torch.optim.Adam(trainable(model), 1e-2)
    x, pixels = torch.randn(32, 9).bfloat16().requires_grad_(), torch.randn(32, 3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            cond = model["image"](pixels)
            assert cond.dtype == torch.bfloat16
            z, log_jac = model["flow"](x, cond)
        assert z.dtype == log_jac.dtype == torch.float32
        value = (0.5 * z.square().sum(1) - log_jac).mean()
        value.backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16
        assert all(p.grad.dtype == torch.float32 for p in trainable(model))
        exact = net(x.detach().float(), cond.detach().float())
        same((z, log_jac), exact, 1e-4)
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0] - 0.5


# --- weights that change ----------------------------------------------------------------------


def _optimizer(make: Any) -> Callable[[Any], Any]:
    def change(net: Any) -> None:
        optimizer = make(trainable(net))
        loss(net, *(t.to(next(net.parameters())) for t in rows())).backward()
        optimizer.step()

    return change


class _Foreign(torch.optim.SGD):
    """As optimizers of other packages, whose kernels PyTorch knows nothing of."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.sub_(p.grad, alpha=1e-2)


def _average(net: Any) -> Any:
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(net)
    average(*rows())
    with torch.no_grad():
        average(*rows())
    _optimizer(lambda p: torch.optim.SGD(p, 1e-2))(net)
    average.update_parameters(net)
    return average.module


def _swap(net: Any) -> None:
    """Weights behind autograd's back, then the call that is documented for it."""
    for p in trainable(net):
        p.data.copy_(p.data + 0.1)
    net.eval()


def _states(net: Any) -> dict[str, Tensor]:
    return {k: v + 0.1 if v.is_floating_point() else v for k, v in net.state_dict().items()}


def _in_place(net: Any) -> None:
    with torch.no_grad():
        net.module_list[2].subnet1[2].bias.add_(0.1)


def _copied(net: Any) -> Any:
    return copy.deepcopy(net)


def _pickled(net: Any) -> Any:
    return pickle.loads(pickle.dumps(net))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": _in_place,
    "sgd": _optimizer(lambda p: torch.optim.SGD(p, 1e-2)),
    "foreach": _optimizer(lambda p: torch.optim.Adam(p, 1e-1, foreach=True)),
    "fused": _optimizer(lambda p: torch.optim.Adam(p, 1e-1, fused=True)),
    "foreign": _optimizer(_Foreign),
    "average": _average,
    "swap": _swap,
    "load": lambda net: net.load_state_dict(_states(net)) and None,
    "assign": lambda net: net.load_state_dict(_states(net), assign=True) and None,
    "float": lambda net: net.float() and None,
    "to": lambda net: net.to(torch.float32) and None,
    "deepcopy": _copied,
    "pickle": _pickled,
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_no_stale_weights(change: str, grad: bool) -> None:
    _, fast = pair()
    x, c = rows()
    for enabled in (True, False):  # whatever is packed is packed now
        with torch.set_grad_enabled(enabled):
            before = fast(x, c)[0]
    net = CHANGES[change](fast) or fast
    if change in ("deepcopy", "pickle"):  # in the middle of training: the copy goes its own way
        _in_place(net)
        same([fast(x, c)[0]], [before])
    x, c = (t.to(next(net.parameters()).dtype) for t in (x, c))
    exact = flows.restore(copy.deepcopy(net))
    assert type(exact) is ff.GraphINN
    tolerance = 1e-10 if x.dtype == torch.float64 else 1e-4
    with torch.set_grad_enabled(grad):
        out = net(x, c)
        same(out, exact(x, c), tolerance)
        if change not in ("float", "to"):
            assert (out[0] - before).abs().max() > 1e-4
        if grad:
            same(
                torch.autograd.grad(loss(net, x, c), trainable(net)),
                torch.autograd.grad(loss(exact, x, c), trainable(exact)),
                10 * tolerance,
            )


def test_half_precision_runs_the_reference_with_the_new_weights() -> None:
    _, fast = pair()
    x, c = rows()
    fast(x, c)
    half = fast.half()
    out = half(x.half(), c.half())[0]
    assert "float16" in flows.explain(half).rows[0]["reason"]
    again = half.double()
    same(again(x, c), flows.restore(copy.deepcopy(again))(x, c))
    torch.testing.assert_close(out.double(), again(x, c)[0], rtol=3e-2, atol=3e-2)


# --- parts that training has and inference lacks ----------------------------------------------


def chain(norm: bool = False, dropout: float = 0.0) -> Any:
    """Two layers of ConditionalGlow in nflows' own classes (stand-ins), float64."""

    def net(inputs: int, outputs: int) -> nn.Module:
        return nflows.ResidualNet(
            *(inputs, outputs, 8, 4, 1, F.relu, False), use_batch_norm=norm, dropout=dropout
        )

    mask = torch.ones(9)
    mask[::2] = -1
    parts: list[nn.Module] = []
    for sign in (1, -1):
        parts += [nflows.ActNorm(9), nflows.LULinear(9)]
        parts.append(nflows.AdditiveCouplingTransform(sign * mask, net))
    flow = nflows.Flow(nflows.CompositeTransform(parts), nflows.StandardNormal([9]))
    spread(flow)
    return flow.double()


@pytest.mark.parametrize("settings", [{"norm": True}, {"dropout": 0.4}], ids=["norm", "dropout"])
def test_training_mode_of_subnets_is_nflows(settings: dict[str, Any]) -> None:
    flow = chain(**settings).train()
    fast = flows.accelerate(copy.deepcopy(flow), inplace=True)
    reasons = [row["reason"] for row in flows.explain(fast).rows]
    assert sum("training mode" in reason for reason in reasons) == 2
    x, c = rows()
    for step in range(3):
        for one in (flow, fast):
            torch.manual_seed(step)
            one.zero_grad()
            (-one.log_prob(x, c).sum()).backward()
        same(gradients(fast), gradients(flow))
        same(fast.buffers(), flow.buffers())
    counts = [p.num_batches_tracked for p in fast.modules() if isinstance(p, nn.BatchNorm1d)]
    assert all(int(count) == 3 for count in counts)
    fast.eval()
    assert all(row["accelerated"] for row in flows.explain(fast).rows)


@pytest.mark.parametrize("rev", [False, True])
def test_gradients_of_linear_steps(rev: bool, calls: Calls) -> None:
    """LU factors and ActNorms, in both directions."""
    flow = chain().eval()
    fast = flows.accelerate(copy.deepcopy(flow), inplace=True)
    x, c = (t.requires_grad_() for t in rows())
    found, expected = (
        torch.autograd.grad((out.pow(3).sum() + log_jac.square().sum()), [x, c, *one.parameters()])
        for one in (fast, flow)
        for out, log_jac in [(one._transform.inverse if rev else one._transform)(x, c)]
    )
    same(found, expected, 1e-9)
    assert calls.forward == 1


def test_act_norms_are_fused_once_initialised(calls: Calls) -> None:
    flow = chain()
    for part in flow.modules():
        if isinstance(part, nflows.ActNorm):
            part.initialized.fill_(False)
    fast = flows.accelerate(copy.deepcopy(flow), inplace=True)
    x, c = rows()
    for step in range(2):
        for one in (flow.train(), fast.train()):
            one.zero_grad()
            (-one.log_prob(x, c).sum()).backward()
        same(gradients(fast), gradients(flow), 1e-9)
        same(fast.state_dict().values(), flow.state_dict().values(), 1e-12)
        assert calls.forward == step


@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"permute_soft": True, "reverse_permutation": True},
        {"learned_householder_permutation": 2},
        {"global_affine_type": "SIGMOID"},
        {"global_affine_type": "EXP", "global_affine_init": 0.6},
        {"gin_block": True},
    ],
    ids=str,
)
def test_all_in_one_parameters(settings: dict[str, Any], rev: bool, calls: Calls) -> None:
    net = ff.SequenceINN(9)
    for _ in range(2):
        net.append(*(fm.AllInOneBlock, 0, (4,)), subnet_constructor=_smooth, **settings)
    net = net.double()
    with torch.no_grad():
        for p in trainable(net):
            p.add_(0.3 * torch.randn_like(p))
    fast = flows.accelerate(copy.deepcopy(net), inplace=True)
    x, c = (t.requires_grad_() for t in rows())
    found, expected = (
        torch.autograd.grad(
            out.pow(3).sum() + torch.as_tensor(log_jac).square().sum(),
            [x, c, *trainable(one)],
            allow_unused=True,
            materialize_grads=True,
        )
        for one in (fast, net)
        for out, log_jac in [one(x, [c], rev=rev)]
    )
    scale = max(float(grad.abs().max()) for grad in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(scale, 1.0)
    assert calls.forward == 1


# --- training as a whole ----------------------------------------------------------------------


def curve(net: Any, dtype: torch.dtype, steps: int = 40) -> Tensor:
    """Losses of Adam steps, both directions in the loss."""
    net = net.to(dtype)
    optimizer = torch.optim.Adam(trainable(net), 1e-3)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(steps):
        x = torch.randn(32, 9, generator=generator).to(dtype)
        x[:, 5:] += x[:, :4].square()
        c = torch.stack([x[:, 0].sin(), x[:, 1], x[:, 2].cos(), x[:, 3]], 1)
        z, log_jac = net(x, c)
        drawn, _ = net(torch.randn(32, 9, generator=generator).to(dtype), c, rev=True)
        value = (0.5 * z.square().sum(1) - log_jac).mean() + 0.1 * F.mse_loss(drawn, x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize("checkpoint", ["reversible", "store"])
def test_training_is_equivalent(checkpoint: str, calls: Calls) -> None:
    net = random_flow(9, (4,), blocks=4, hidden=16, spread=0.5)
    fast = flows.accelerate(copy.deepcopy(net), inplace=True, checkpoint=checkpoint)
    exact = curve(copy.deepcopy(net), torch.float64)
    theirs, ours = curve(net, torch.float32), curve(fast, torch.float32)
    assert calls.forward == 80
    assert exact[-5:].mean() < exact[:5].mean() - 0.1
    noise = float((theirs - exact).abs().max())
    assert float((ours - exact).abs().max()) <= max(3.0 * noise, 1e-5)


# --- numbers that are none --------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "cond"])
def test_bad_numbers_stay_in_their_image(where: str, bad: float, grad: bool) -> None:
    net = random_flow(9, (4,), blocks=2, hidden=8)
    flow = flows.accelerate(net).flow()
    x, cond = torch.randn(5, 7, 9), torch.randn(5, 4)
    clean = [t.clone() for t in (x, cond)]
    if where == "x":
        x[2, 3, 1] = bad
    else:
        cond[2, 1] = bad
    others = [0, 1, 3, 4]
    for run in (flow.forward, flow.inverse):
        found, expected = [], []
        for given, results in (((x, cond), found), (clean, expected)):
            leaves = [t.clone().requires_grad_(grad) for t in given]
            with torch.set_grad_enabled(grad):
                results += run(*leaves)
                if grad:
                    objective = results[0].square().sum() + results[1].sum()
                    results += torch.autograd.grad(objective, leaves)
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[others], exact[others], rtol=1e-5, atol=1e-5)
            assert exact.isfinite().all()
        assert not found[0][2].isfinite().all()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rev", [False, True])
def test_an_exploding_scale_is_freias(rev: bool, grad: bool) -> None:
    net = random_flow(9, (4,), blocks=2, hidden=8, clamp=400.0)
    fast = flows.accelerate(net)
    x, c = torch.randn(200, 9), torch.randn(200, 4)
    with torch.set_grad_enabled(grad):
        for ours, theirs in zip(fast(x, c, rev=rev), net(x, c, rev=rev), strict=True):
            wild = ~theirs.isfinite()
            assert 0 < int(wild.sum()) < wild.numel() or theirs.dim() == 1
            # rows on the edge may differ by a rounding
            agree = (ours.isfinite() == theirs.isfinite()).double().mean()
            assert float(agree) > 0.99
        if grad:
            out, log_jac = fast(x.requires_grad_(), c, rev=rev)
            (out.sum() + log_jac.sum()).backward()
