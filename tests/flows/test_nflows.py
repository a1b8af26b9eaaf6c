"""Flows of nflows: ConditionalGlow against the fork's stored results, and other flows described,
accelerated and restored. nflows is not installed: stand-ins have its names and its arithmetic."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthyp.flows as flows
from fasthyp.sampling import HypothesisSampler
from tests.conftest import Golden, assert_as_good_as, golden_files, max_error
from tests.flows import nflows_stand_ins as nflows

ALL = golden_files("prohmr_glow_*.npz")
TRAINED = [file for file in ALL if "train" in file.id]
CONDITIONAL = [file for file in ALL if "train" not in file.id and "uncond" not in file.id]
UNCONDITIONAL = [file for file in ALL if "uncond" in file.id]


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTHYP_BACKEND", request.param)
    return request.param


def spread(flow: nn.Module) -> None:
    """Weights, batch norms and ActNorms that are at work."""
    with torch.no_grad():
        for parameter in flow.parameters():
            scale = 0.3 / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0)
            parameter.add_(torch.randn_like(parameter), alpha=scale)
        for part in flow.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
            if type(part).__name__ == "ActNorm":
                part.initialized.fill_(True)


def glow(**settings: Any) -> flows.ConditionalGlow:
    arguments = {"context_features": 6, "dropout_probability": 0.2, **settings}
    flow = flows.ConditionalGlow(9, 16, 3, 2, **arguments)
    spread(flow)
    return flow.eval()


def is_fused(flow: nn.Module) -> bool:
    return all(row["accelerated"] for row in flows.explain(flow).rows)


# --- stored results ---------------------------------------------------------------------------


def relative(value: Tensor, exact: Tensor) -> float:
    return max_error(value, exact) / max(1.0, float(exact.abs().max()))


def run(flow: flows.ConditionalGlow, golden: Golden, dtype: torch.dtype) -> dict[str, Tensor]:
    def given(name: str) -> Tensor:
        return golden[f"in/{name}"].to(dtype, copy=True).requires_grad_()

    x, context, noise, again = given("x"), given("context"), given("noise"), given("context")
    log_prob, z = flow.log_prob(x, context)
    samples, sample_log_prob, returned = flow.sample_and_log_prob(
        noise.shape[1], noise=noise, context=again
    )
    assert torch.equal(returned, noise.flatten(0, 1))
    objective = (given("W") * samples).sum() + (given("v") * sample_log_prob).sum()
    parameters = dict(flow.named_parameters())
    grad = torch.autograd.grad(-log_prob.mean(), [x, context, *parameters.values()])
    ginv = torch.autograd.grad(objective, [noise, again, *parameters.values()])
    found = {
        "out/log_prob": log_prob,
        "out/z": z,
        "out/samples": samples,
        "out/sample_log_prob": sample_log_prob,
    }
    keys = [f"sd/{key}" for key in parameters]
    found.update(zip([f"grad/{key}" for key in ("x", "context", *keys)], grad, strict=True))
    found.update(zip([f"ginv/{key}" for key in ("noise", "context", *keys)], ginv, strict=True))
    return found


@pytest.mark.parametrize("path", CONDITIONAL)
def test_stored_results(path: Any) -> None:
    golden = Golden(path)
    for name, value in run(golden.conditional_glow(), golden, torch.float32).items():
        if "/sd/" not in name:
            assert_as_good_as(value, golden[name], golden[name.replace("/", "64/", 1)], name)


@pytest.mark.parametrize("path", CONDITIONAL)
def test_stored_results_in_float64(path: Any) -> None:
    golden = Golden(path)
    flow = golden.conditional_glow().double()
    deviations = golden.meta["tol_float32_vs_float64"]
    found = run(flow, golden, torch.float64)
    for name, value in found.items():
        if "/sd/" not in name:
            assert relative(value, golden[name.replace("/", "64/", 1)]) < 1e-11, name
        elif name in golden.names:  # stored in float32 only
            peer = float(deviations[f"{name.split('/')[0]}/sd/<all params>"][1])
            exact = golden[name]
            assert max_error(value, exact) <= 1.01 * peer * float(exact.abs().max()), name
    assert set(found) >= {n for n in golden.names if n.startswith(("grad/", "ginv/", "out/lo"))}


@pytest.mark.parametrize("path", CONDITIONAL)
@torch.no_grad()
def test_stored_results_fused(path: Any, backend: str) -> None:
    golden = Golden(path)
    flow = golden.conditional_glow()
    assert is_fused(flow) is (backend == "auto")
    x, context, noise = golden["in/x"], golden["in/context"], golden["in/noise"]
    log_prob, z = flow.log_prob(x, context)
    samples, sample_log_prob, _ = flow.sample_and_log_prob(1, noise, context)
    sampled, density = HypothesisSampler(flow, "highest")(context, z=noise, return_log_prob=True)
    for name, value in (
        *(("log_prob", log_prob), ("z", z)),
        *(("samples", samples), ("sample_log_prob", sample_log_prob)),
        *(("samples", sampled), ("sample_log_prob", density)),
    ):
        assert_as_good_as(value, golden[f"out/{name}"], golden[f"out64/{name}"], name)


@pytest.mark.parametrize("path", UNCONDITIONAL)
@torch.no_grad()
def test_stored_results_without_context(path: Any, backend: str) -> None:
    golden = Golden(path)
    flow = golden.conditional_glow()
    assert is_fused(flow) is (backend == "auto")
    log_prob, z = flow.log_prob(golden["in/x"])
    x, log_jac = flow._transform.inverse(golden["out/z"])
    for name, value in (("log_prob", log_prob), ("z", z), ("xi", x), ("lj", log_jac)):
        assert_as_good_as(value, golden[f"out/{name}"], golden[f"out64/{name}"], name)


@pytest.mark.parametrize("path", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_training_step(path: Any, dtype: torch.dtype) -> None:
    """ActNorm set by the first batch, batch statistics, and one step of AdamW."""
    golden = Golden(path)
    flow = golden.conditional_glow().to(dtype).train()
    x, context = (golden[f"in/{name}"].to(dtype).requires_grad_() for name in ("x", "context"))
    log_prob, z = flow.log_prob(x, context)
    (-log_prob.mean()).backward()
    found = {"out/log_prob": log_prob, "out/z": z, "grad/x": x.grad, "grad/context": context.grad}
    for key, value in flow.state_dict().items():
        if f"sd_after_forward/{key}" in golden.names:
            tolerance = {"rtol": 1e-5, "atol": 1e-6}  # stored in float32
            stored = golden[f"sd_after_forward/{key}"]
            torch.testing.assert_close(value.to(stored.dtype), stored, **tolerance)
    torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=1e-4).step()
    after = flow.log_prob(x, context)
    found.update({"out/log_prob_after_step": after[0], "out/z_after_step": after[1]})
    for name, value in found.items():
        exact = golden[name.replace("/", "64/", 1)]
        if dtype == torch.float32:
            assert_as_good_as(value, golden[name], exact, name)
        else:
            # Biases before a batch norm have no gradient: AdamW makes steps of their roundings,
            # which the batch norm takes off again.
            assert relative(value, exact) < 1e-9, name


# --- ConditionalGlow --------------------------------------------------------------------------


def test_keys_are_the_forks() -> None:
    keys = set(glow().state_dict())
    prefix = "_transform._transforms."
    assert {
        "_transform.dummy_buffer",
        *(f"{prefix}0.{name}" for name in ("dummy_buffer", "initialized", "log_scale", "shift")),
        f"{prefix}1.unconstrained_upper_diag",
        f"{prefix}2.identity_features",
        f"{prefix}2.transform_net.blocks.0.batch_norm_layers.1.running_mean",
    } < keys


@torch.no_grad()
def test_shapes() -> None:
    for features, context in ((6, torch.randn(5, 6)), (None, None)):
        flow = glow(context_features=features)
        images = () if context is None else (5,)
        log_prob, z = flow.log_prob(torch.randn(5, 9), context)
        assert (log_prob.shape, z.shape) == ((5,), (5, 9))
        assert flow.sample(4, context).shape == (*images, 4, 9)
        samples, log_prob, noise = flow.sample_and_log_prob(4, context=context)
        assert samples.shape == (*images, 4, 9)
        assert log_prob.shape == (*images, 4)
        assert noise.shape == ((20 if images else 4), 9)
        samples, log_prob, noise = flow.sample_and_log_prob(1, torch.randn(5, 4, 9), context)
        assert (samples.shape, log_prob.shape, noise.shape) == ((5, 4, 9), (5, 4), (20, 9))


@torch.no_grad()
def test_samples_have_their_log_prob() -> None:
    flow, context = glow(), torch.randn(5, 6)
    samples, log_prob, noise = flow.sample_and_log_prob(4, context=context)
    again, z = flow.log_prob(samples.flatten(0, 1), context.repeat_interleave(4, 0))
    torch.testing.assert_close(again.reshape(5, 4), log_prob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z, noise, rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    drawn = flow.sample(4, context)
    torch.manual_seed(1)
    noise = torch.randn(20, 9).reshape(5, 4, 9)
    assert torch.equal(drawn, flow.sample_and_log_prob(4, noise, context)[0])


@torch.no_grad()
def test_the_sampler_shares_its_flow() -> None:
    flow, context = glow(), torch.randn(5, 6)
    sampler = HypothesisSampler(flow)
    x, log_prob = sampler(context, 50, seed=3, return_log_prob=True)
    expected = flow.log_prob(x.flatten(0, 1), context.repeat_interleave(50, 0))[0]
    torch.testing.assert_close(log_prob.flatten(), expected, rtol=1e-4, atol=1e-4)
    flow.train()
    assert torch.equal(sampler(context, 50, seed=3), x)  # as in eval mode
    assert all(part.training for part in flow.modules())


def test_batch_norms_and_dropout_in_training() -> None:
    """As the plain modules, which is how the fork does it, and with the same random numbers."""
    flow = glow().train()
    plain = copy.deepcopy(flow)
    plain._transform.__class__ = type(flow._transform).__mro__[3]  # without the fused methods
    x, context = torch.randn(7, 9), torch.randn(7, 6)
    rows = flows.explain(flow).rows
    assert "training mode" in rows[1]["reason"]
    for step in range(3):
        found = []
        for one in (flow, plain):
            torch.manual_seed(step)
            found.append(one.log_prob(x, context)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        for a, b in zip(flow.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    flow.eval()
    assert is_fused(flow)


@torch.no_grad()
def test_the_sampler_takes_a_flow_before_its_first_batch() -> None:
    flow = flows.ConditionalGlow(9, 16, 2, 1, context_features=6)
    context = torch.randn(5, 6)
    x = HypothesisSampler(flow)(context, 3, seed=1)
    assert flow.training
    assert torch.equal(HypothesisSampler(flow.eval())(context, 3, seed=1), x)


@torch.no_grad()
def test_the_first_batch_sets_the_act_norms() -> None:
    flow = flows.ConditionalGlow(9, 16, 1, 1, context_features=6)
    x, context = torch.randn(50, 9), torch.randn(50, 6)
    x[:, 2] = 5.0  # no deviation: counts as 1e-3
    assert "first batch" in flows.explain(flow).rows[0]["reason"]
    flow.log_prob(x, context)
    norm = flow._transform._transforms[0]
    out = norm(x)[0]
    assert bool(norm.initialized)
    torch.testing.assert_close(out.mean(0), torch.zeros(9), rtol=0, atol=5e-3)
    assert float(norm.log_scale[2]) == pytest.approx(6.9078, rel=1e-3)
    before = norm.log_scale.clone()
    flow.log_prob(2.0 * x, context)
    assert torch.equal(norm.log_scale, before)
    assert "first batch" not in flows.explain(flow).rows[0]["reason"]


def _step(flow: Any) -> None:
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.5)
    with torch.enable_grad():
        (-flow.log_prob(torch.randn(7, 9), torch.randn(7, 6))[0].mean()).backward()
    optimizer.step()


def _load(flow: Any) -> None:
    flow.load_state_dict(glow().state_dict())


@pytest.mark.parametrize(
    "change",
    [
        _step,
        _load,
        lambda flow: flow._transform._transforms[0].shift.add_(1.0),
        lambda flow: flow._transform._transforms[1].upper_entries.add_(0.1),
        lambda flow: flow._transform._transforms[1].bias.add_(1.0),
        lambda flow: setattr(flow._transform._transforms[1], "eps", 0.5),
        lambda flow: _block(flow).batch_norm_layers[0].running_var.mul_(4.0),
        lambda flow: _block(flow).batch_norm_layers[1].running_mean.add_(1.0),
        lambda flow: setattr(_block(flow).batch_norm_layers[1], "eps", 3.0),
        lambda flow: setattr(_block(flow), "activation", torch.tanh),
        lambda flow: setattr(_block(flow), "activation", torch.sin),
        lambda flow: _swap_features(flow._transform._transforms[2]),
        lambda flow: _block(flow).linear_layers[0].register_forward_hook(lambda m, i, o: o + 1.0),
        lambda flow: flow._transform._transforms[3].register_forward_hook(
            lambda m, i, o: (o[0] + 1.0, o[1])
        ),
    ],
)
@torch.no_grad()
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    flow, x, context = glow(), torch.randn(7, 9), torch.randn(7, 6)
    before = flow.log_prob(x, context)[1]
    change(flow)
    after = flow.log_prob(x, context)[1]
    assert max_error(after, before) > 1e-3
    plain = copy.deepcopy(flow)
    plain._transform.__class__ = type(flow._transform).__mro__[3]
    torch.testing.assert_close(plain.log_prob(x, context)[1], after, rtol=1e-4, atol=1e-4)


def _block(flow: Any) -> Any:
    return flow._transform._transforms[2].transform_net.blocks[0]


def _swap_features(coupling: Any) -> None:
    coupling.identity_features.copy_(coupling.identity_features.flip(0))


def _pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [_pickled, _saved, copy.deepcopy])
@torch.no_grad()
def test_copies(duplicate: Callable) -> None:
    flow, x, context = glow(), torch.randn(7, 9), torch.randn(7, 6)
    expected = flow.log_prob(x, context)[1]
    twin = duplicate(flow)
    assert torch.equal(twin.log_prob(x, context)[1], expected)
    next(twin.parameters()).add_(1.0)
    assert torch.equal(flow.log_prob(x, context)[1], expected)
    assert not torch.equal(twin.log_prob(x, context)[1], expected)


def test_function_transforms_and_compile() -> None:
    flow, x, context = glow(), torch.randn(7, 9), torch.randn(7, 6)
    with torch.no_grad():
        expected = flow.log_prob(x, context)[1]
        mapped = torch.func.vmap(lambda x, c: flow._transform(x[None], c[None])[0][0])(x, context)
        torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(flow._transform, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, context)[0], expected, rtol=1e-4, atol=1e-4)
    jacobian = torch.func.jacrev(lambda x: flow._transform(x[None], context[:1])[0][0])(x[0])
    log_jac = flow._transform(x[:1], context[:1])[1][0]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_jac, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f: f.log_prob(torch.randn(5, 8), torch.randn(5, 6)),
            ValueError,
            "inputs: expected",
        ),
        (lambda f: f.log_prob(torch.randn(9), torch.randn(5, 6)), ValueError, "inputs: exp"),
        (lambda f: f.log_prob("x", torch.randn(5, 6)), TypeError, "inputs: expected a tensor"),
        (lambda f: f.log_prob(torch.randn(5, 9)), TypeError, "context: expected a tensor"),
        (
            lambda f: f.log_prob(torch.randn(5, 9), torch.randn(4, 6)),
            ValueError,
            r"context: expected shape \(5, 6\), got \(4, 6\)",
        ),
        (lambda f: f.sample(4, torch.randn(5, 7)), ValueError, r"context: expected .*\(any, 6\)"),
        (lambda f: f.sample(0, torch.randn(5, 6)), ValueError, "num_samples: expected a positive"),
        (lambda f: f.sample(2.0, torch.randn(5, 6)), TypeError, "num_samples: expected an int"),
        (
            lambda f: f.sample_and_log_prob(1, torch.randn(4, 1, 9), torch.randn(5, 6)),
            ValueError,
            r"context: expected shape \(4, 6\)",
        ),
        (
            lambda f: f.sample_and_log_prob(1, torch.randn(5, 9), torch.randn(5, 6)),
            ValueError,
            r"noise: expected shape \(any, any, 9\)",
        ),
    ],
)
def test_bad_input(call: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(glow())


def test_context_for_a_flow_without() -> None:
    with pytest.raises(ValueError, match="context: expected None"):
        glow(context_features=None).sample(2, torch.randn(5, 6))


# --- flows of nflows --------------------------------------------------------------------------


def mixed(upstream: bool = True, activation: Any = F.relu, **settings: Any) -> nn.Module:
    """A flow with every transform that is described."""

    def net(inputs: int, outputs: int) -> nn.Module:
        return nflows.ResidualNet(inputs, outputs, 16, 6, 2, activation, upstream, **settings)

    mask = torch.ones(9)
    mask[::2] = -1
    transforms = [
        nflows.ActNorm(9),
        nflows.LULinear(9),
        nflows.AffineCouplingTransform(mask, net),
        nflows.RandomPermutation(9),
        nflows.CompositeTransform(
            [nflows.AdditiveCouplingTransform(-mask, net), nflows.ReversePermutation(9)]
        ),
        nflows.AffineCouplingTransform(mask, net),
    ]
    flow = nflows.Flow(nflows.CompositeTransform(transforms), nflows.StandardNormal([9]))
    spread(flow)
    return flow.eval()


def both(flow: Any, fast: Any, x: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """What the two give for all methods."""
    results: list[list[Tensor]] = []
    for one in (flow, fast):
        torch.manual_seed(2)
        results.append(
            [
                one.log_prob(x, context),
                one.transform_to_noise(x, context),
                one.sample(4, context),
                *one.sample_and_log_prob(4, context=context),
            ]
        )
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("upstream", [True, False])
@pytest.mark.parametrize("activation", [F.relu, torch.tanh, F.silu, torch.sin])
@pytest.mark.parametrize("batch_norm", [True, False])
@torch.no_grad()
def test_same_numbers_as_the_flow(upstream: bool, activation: Any, batch_norm: bool) -> None:
    flow = mixed(upstream, activation, use_batch_norm=batch_norm)
    fast = flows.accelerate(flow)
    assert isinstance(fast, type(flow))
    assert "own forward" not in str(flows.explain(fast))
    for a, b in both(flow, fast, torch.randn(7, 9), torch.randn(7, 6)):
        assert a.shape == b.shape
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_flows() -> None:
    flow = mixed().double()
    fast = flows.accelerate(flow)
    x, context = torch.randn(7, 9).double(), torch.randn(7, 6).double()
    found = []
    for one in (flow, fast):
        leaves = [x.clone().requires_grad_(), context.clone().requires_grad_()]
        torch.manual_seed(1)
        samples, log_prob = one.sample_and_log_prob(3, context=leaves[1])
        objective = one.log_prob(*leaves).sum() + (samples * log_prob[..., None]).sum()
        found.append(torch.autograd.grad(objective, [*leaves, *one.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_flows_anywhere_in_a_model() -> None:
    model = nn.ModuleDict({"flow": mixed(), "rest": nn.Linear(2, 2)})
    kinds = [type(part) for part in model.modules()]
    fast: Any = flows.accelerate(model)
    assert [type(part) for part in model.modules()] == kinds
    (row, *_) = flows.explain(fast).rows
    assert (row["name"], row["kind"]) == ("flow", "Flow")
    assert all("not accelerated" in row["reason"] for row in flows.explain(model).rows)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert flows.restore(fast) is model
    assert flows.accelerate(model, inplace=True) is model
    assert [type(part) for part in model.modules()] != kinds
    attributes = [set(vars(part)) for part in flows.restore(model).modules()]
    assert [type(part) for part in model.modules()] == kinds
    assert not any({"_accelerated_from", "precision", "_flow"} & names for names in attributes)


@pytest.mark.parametrize("duplicate", [_pickled, _saved, copy.deepcopy])
@torch.no_grad()
def test_copies_of_an_accelerated_flow(
    duplicate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nflows", ModuleType("nflows"))
    flow = mixed()
    fast = flows.accelerate(flow)
    x, context = torch.randn(7, 9), torch.randn(7, 6)
    expected = fast.log_prob(x, context)
    twin = duplicate(fast)
    assert type(twin) is type(fast)
    assert torch.equal(twin.log_prob(x, context), expected)
    assert [type(part) for part in flows.restore(twin).modules()] == [
        type(part) for part in flow.modules()
    ]


@torch.no_grad()
def test_the_sampler_takes_flows_of_nflows() -> None:
    flow, context = mixed(), torch.randn(5, 6)
    x, log_prob = HypothesisSampler(flow)(context, 8, seed=1, return_log_prob=True)
    expected = flow.log_prob(x.flatten(0, 1), context.repeat_interleave(8, 0))
    torch.testing.assert_close(log_prob.flatten(), expected, rtol=1e-4, atol=1e-4)


class _Scaled(nflows.ActNorm):
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        outputs, log_jac = super().forward(2.0 * inputs)
        return outputs, log_jac + 9 * torch.tensor(2.0).log()


_Scaled.forward.__module__ = "somewhere"


def _other_base(flow: Any) -> None:
    flow._distribution = nn.Identity()


def _embedding(flow: Any) -> None:
    flow._embedding_net = nn.Linear(6, 6)


def _own_transform(flow: Any) -> None:
    flow._transform._transforms[0] = _Scaled(9)


def _other_net(flow: Any) -> None:
    flow._transform._transforms[2].transform_net = nn.Linear(4, 10)


def _unconditional(flow: Any) -> None:
    flow._transform._transforms[2].unconditional_transform = nflows.ActNorm(5)


def _image_permutation(flow: Any) -> None:
    flow._transform._transforms[3]._dim = 2


def _other_transform(flow: Any) -> None:
    flow._transform._transforms.append(nflows.ResidualNet(9, 9, 16, None, 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_base, "base distribution is a Identity"),
        (_embedding, "embedding net"),
        (_own_transform, "a forward or an inverse of its own"),
        (_other_net, "Linear, not a ResidualNet"),
        (_unconditional, "transforms the identity features too"),
        (_image_permutation, "permutes dimension 2"),
        (_other_transform, "ResidualNet, which has no fused form"),
    ],
)
def test_flows_that_are_not_described(change: Callable[[Any], None], reason: str) -> None:
    flow = mixed()
    change(flow)
    with pytest.raises(flows.UnsupportedFlow, match=reason):
        flows.describe(flow)


@torch.no_grad()
def test_what_is_not_described_runs_as_nflows() -> None:
    for change in (_own_transform, _embedding):
        flow = mixed()
        change(flow)
        fast = flows.accelerate(flow)
        for a, b in both(flow, fast, torch.randn(7, 9), torch.randn(7, 6)):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_training_is_that_of_nflows() -> None:
    flow = mixed(use_batch_norm=True, dropout=0.3)
    for part in flow.modules():
        if type(part).__name__ == "ActNorm":
            part.initialized.fill_(False)
    twin = flows.accelerate(copy.deepcopy(flow), inplace=True)
    x, context = torch.randn(7, 9), torch.randn(7, 6)
    for one in (flow.train(), twin.train()):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.01)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            (-one.log_prob(x, context).mean()).backward()
            optimizer.step()
    for a, b in zip(flow.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
