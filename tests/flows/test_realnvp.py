"""RealNVP against POCO's stored results; POCO's own class described, accelerated and restored."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasthyp.flows as flows
from fasthyp.sampling import HypothesisSampler
from tests.conftest import Golden, assert_as_good_as, golden_files, max_error, poco_s, poco_t

FILES = golden_files("poco_realnvp_*.npz")


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTHYP_BACKEND", request.param)
    return request.param


class RealNVP(nn.Module):
    """A stand-in for POCO's class: its names, its arithmetic."""

    def __init__(self, nets: Any, nett: Any, flow_arch: Any, mask: Tensor, prior: Any) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("mask", mask)
        self.t = nn.ModuleList([nett(*flow_arch) for _ in mask])
        self.s = nn.ModuleList([nets(*flow_arch) for _ in mask])

    def forward_p(self, z: Tensor, x_cond: Tensor | None) -> Tensor:
        x = z
        for mask, s_net, t_net in zip(self.mask, self.s, self.t, strict=True):
            s, t = self._nets(x, x_cond, mask, s_net, t_net)
            x = x * mask + (1 - mask) * (x * torch.exp(s) + t)
        return x

    def backward_p(self, x: Tensor, x_cond: Tensor | None) -> tuple[Tensor, Tensor]:
        log_jac, z = x.new_zeros(x.shape[0]), x
        for mask, s_net, t_net in reversed(list(zip(self.mask, self.s, self.t, strict=True))):
            s, t = self._nets(z, x_cond, mask, s_net, t_net)
            z = (1 - mask) * (z - t) * torch.exp(-s) + mask * z
            log_jac = log_jac - s.sum(1)
        return z, log_jac

    @staticmethod
    def _nets(x: Tensor, x_cond: Any, mask: Tensor, *nets: nn.Module) -> list[Tensor]:
        rows = x * mask if x_cond is None else torch.cat([x * mask, x_cond], 1)
        return [net(rows) * (1 - mask) for net in nets]

    def log_prob(self, x: Tensor, x_cond: Tensor | None) -> Tensor:
        z, log_jac = self.backward_p(x, x_cond)
        return self.prior.log_prob(z) + log_jac

    def sample(self, batch: int, x_cond: Tensor | None) -> Tensor:
        return self.forward_p(self.prior.sample((batch,)), x_cond)


def normal(dim: int) -> torch.distributions.Distribution:
    return torch.distributions.MultivariateNormal(torch.zeros(dim), torch.eye(dim))


def flow(
    kind: Any = flows.RealNVP,
    dim: int = 9,
    cond: int = 4,
    nets: Any = poco_s,
    nett: Any = poco_t,
    masks: str = "alter",
) -> Any:
    mask = flows.realnvp_masks(masks, dim, 2)
    made = kind(nets, nett, (dim + cond, 16, dim), mask, normal(dim))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.0)
    return made


def is_fused(module: nn.Module) -> bool:
    return all(row["accelerated"] for row in flows.explain(module).rows)


# --- stored results ---------------------------------------------------------------------------


def run(net: Any, golden: Golden, dtype: torch.dtype) -> dict[str, Tensor]:
    def given(name: str) -> Tensor:
        return golden[f"in/{name}"].to(dtype, copy=True).requires_grad_()

    contexts = [given("context"), given("context")] if golden.meta["context"] else [None, None]
    x, z = given("x"), given("z")
    latent, log_jac = net.backward_p(x, contexts[0])
    log_prob = net.log_prob(x, contexts[0])
    data = net.forward_p(z, contexts[1])
    found = {
        "out/log_prob": log_prob,
        "out/z": latent,
        "out/log_det_J": log_jac,
        "out/x_fwd": data,
    }
    if torch.is_grad_enabled():
        parameters = dict(net.named_parameters())
        keys = [f"sd/{key}" for key in parameters]
        for kind, objective, leaf, name in (
            ("grad", -log_prob.mean(), x, "x"),
            ("ginv", (given("W") * data).sum(), z, "z"),
        ):
            names, wanted = [name, *keys], [leaf, *parameters.values()]
            context = contexts[kind == "ginv"]
            if context is not None:
                names, wanted = [*names, "context"], [*wanted, context]
            values = torch.autograd.grad(objective, wanted)
            found.update({f"{kind}/{n}": v for n, v in zip(names, values, strict=True)})
    return found


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("grad", [False, True])
def test_stored_results(path: Any, grad: bool, backend: str) -> None:
    golden = Golden(path)
    net = golden.realnvp()
    assert is_fused(net) is (backend == "auto")
    with torch.set_grad_enabled(grad):
        for name, value in run(net, golden, torch.float32).items():
            if "/sd/" not in name:
                assert_as_good_as(value, golden[name], golden[name.replace("/", "64/", 1)], name)


@pytest.mark.parametrize("path", FILES)
def test_stored_results_in_float64(path: Any) -> None:
    golden = Golden(path)
    found = run(golden.realnvp(torch.float64), golden, torch.float64)
    deviations = golden.meta["tol_float32_vs_float64"]
    for name, value in found.items():
        if "/sd/" not in name:
            exact = golden[name.replace("/", "64/", 1)]
            assert max_error(value, exact) <= 1e-11 * max(1.0, float(exact.abs().max())), name
        elif name in golden.names:  # stored in float32 only
            peer = float(deviations[f"{name.split('/')[0]}/sd/<all params>"][1])
            exact = golden[name]
            assert max_error(value, exact) <= 1.01 * peer * float(exact.abs().max()), name
    assert set(found) >= {n for n in golden.names if n.startswith(("grad/", "ginv/"))}


@pytest.mark.parametrize("path", FILES)
def test_sampler(path: Any, backend: str) -> None:
    golden = Golden(path)
    net = golden.realnvp()
    cond = golden["in/context"] if golden.meta["context"] else None
    x = HypothesisSampler(net, "highest")(cond, z=golden["in/z"][:, None])
    assert_as_good_as(x[:, 0], golden["out/x_fwd"], golden["out64/x_fwd"])
    x, log_prob = HypothesisSampler(net)(cond, 6, seed=1, return_log_prob=True)
    rows = None if cond is None else cond.repeat_interleave(6, 0)
    with torch.no_grad():
        expected = net.log_prob(x.flatten(0, 1), rows)
    torch.testing.assert_close(log_prob.flatten(), expected, rtol=1e-4, atol=1e-4)


# --- behaviour --------------------------------------------------------------------------------


def test_masks() -> None:
    assert flows.realnvp_masks("alter", 3, 1).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert flows.realnvp_masks("alter", 4, 1).tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
    assert flows.realnvp_masks("new", 5, 1).tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert flows.realnvp_masks("old", 5, 2).tolist() == [[0, 0, 0, 1, 1], [1, 1, 0, 0, 0]] * 2
    with pytest.raises(ValueError, match='kind: expected "alter", "new" or "old"'):
        flows.realnvp_masks("other", 5, 1)
    with pytest.raises(ValueError, match="dim, layers: expected at least 2 and 1"):
        flows.realnvp_masks("new", 1, 1)


@pytest.mark.parametrize("cond", [0, 4])
@pytest.mark.parametrize("masks", ["alter", "new", "old"])
def test_poco_class_accelerated(cond: int, masks: str) -> None:
    peer = flow(RealNVP, cond=cond, masks=masks).double()
    peer.prior = torch.distributions.MultivariateNormal(
        torch.zeros(9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    )
    fast = flows.accelerate(peer)
    assert isinstance(fast, RealNVP)
    assert is_fused(fast)
    assert list(fast.state_dict()) == list(flow(cond=cond).state_dict())
    x, c = torch.randn(7, 9).double(), torch.randn(7, 4).double() if cond else None
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for a, b in zip(fast.backward_p(x, c), peer.backward_p(x, c), strict=True):
                torch.testing.assert_close(a, b)
            torch.testing.assert_close(fast.forward_p(x, c), peer.forward_p(x, c))
            torch.testing.assert_close(fast.log_prob(x, c), peer.log_prob(x, c))
    assert flows.restore(fast) is peer
    flows.accelerate(peer, inplace=True)
    assert type(flows.restore(peer)) is RealNVP
    assert "_accelerated_from" not in vars(peer)


@pytest.mark.parametrize("kind", [flows.RealNVP, RealNVP])
@torch.no_grad()
def test_copies(kind: Any) -> None:
    net = flows.accelerate(flow(kind))
    x, c = torch.randn(7, 9), torch.randn(7, 4)
    expected = net.log_prob(x, c)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin.log_prob(x, c), expected)
        assert type(flows.restore(twin)) is kind


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.mask.copy_(net.mask.flip(0)),
        lambda net: net.s[1][2].weight.mul_(2.0),
        lambda net: setattr(net.t[0][1], "negative_slope", 0.5),
        lambda net: net.t[0].append(nn.Tanh()),
        lambda net: net.s[0].__delitem__(5),
        lambda net: net.s[0].append(nn.Tanh()),
        lambda net: net.t[2].register_forward_hook(lambda m, i, o: o + 1.0),
    ],
)
@torch.no_grad()
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    net = flow()
    x, c = torch.randn(7, 9), torch.randn(7, 4)
    before = net.backward_p(x, c)[0]
    change(net)
    after = net.backward_p(x, c)[0]
    assert max_error(after, before) > 1e-4
    torch.testing.assert_close(after, _plain(net).backward_p(x, c)[0], rtol=1e-4, atol=1e-4)


def _plain(net: Any) -> Any:
    plain = flow(RealNVP)
    plain.s, plain.t, plain.mask = net.s, net.t, net.mask
    return plain


@torch.no_grad()
def test_other_subnets() -> None:
    def elu(inputs: int, hidden: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ELU(), nn.Linear(hidden, outputs))

    x, c = torch.randn(7, 9), torch.randn(7, 4)
    for nets, nett, fused in (
        (poco_t, poco_t, True),  # s without a clamp
        (poco_s, elu, False),
        (elu, poco_t, False),
    ):
        net = flow(nets=nets, nett=nett)
        assert is_fused(net) is fused
        for a, b in zip(net.backward_p(x, c), _plain(net).backward_p(x, c), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        if nets is poco_s:  # without a clamp some numbers overflow
            back = net.forward_p(net.backward_p(x, c)[0], c)
            torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_is_not_described_runs_as_it_is() -> None:
    x, c = torch.randn(7, 9), torch.randn(7, 4)
    net = flow()
    net.mask.mul_(0.5)
    assert "rows of zeros and ones" in flows.explain(net).rows[0]["reason"]
    for a, b in zip(net.backward_p(x, c), _plain(net).backward_p(x, c), strict=True):
        torch.testing.assert_close(a, b)

    class Doubled(RealNVP):
        def forward_p(self, z: Tensor, x_cond: Tensor | None) -> Tensor:
            return 2.0 * super().forward_p(z, x_cond)

    own = flow(Doubled)
    assert type(flows.accelerate(own)) is Doubled
    with pytest.raises(TypeError, match="got Doubled"):
        flows.describe(own)
    shifted = flow()
    shifted.prior = torch.distributions.MultivariateNormal(torch.ones(9), torch.eye(9))
    with pytest.raises(flows.UnsupportedFlow, match="prior is not a standard normal"):
        HypothesisSampler(shifted)
    assert is_fused(shifted)
    expected = shifted.prior.log_prob(shifted.backward_p(x, c)[0]) + shifted.backward_p(x, c)[1]
    torch.testing.assert_close(shifted.log_prob(x, c), expected)


def test_vmap_and_compile() -> None:
    net, x, c = flow(), torch.randn(7, 9), torch.randn(7, 4)
    with torch.no_grad():
        expected = net.backward_p(x, c)[0]
        mapped = torch.func.vmap(lambda x, c: net.backward_p(x[None], c[None])[0][0])(x, c)
        torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(net.backward_p, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, c)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "c", "error", "message"),
    [
        (torch.randn(7, 8), torch.randn(7, 4), ValueError, r"x: expected shape \(N, 9\)"),
        (torch.randn(7, 9), torch.randn(7, 3), ValueError, r"x_cond: expected shape \(7, 4\)"),
        (torch.randn(7, 9), torch.randn(6, 4), ValueError, r"x_cond: expected shape \(7, 4\)"),
        (torch.randn(7, 9), None, ValueError, "x_cond: expected 4 columns, got None"),
        ("x", torch.randn(7, 4), TypeError, "x: expected a tensor, got str"),
        (torch.randn(7, 9), "c", TypeError, "x_cond: expected a tensor, got str"),
    ],
)
def test_bad_input(x: Any, c: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        flow().backward_p(x, c)
