"""HypothesisSampler: what it draws, from what, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
from torch import Tensor, nn

import fasthyp.flows as flows
from fasthyp import _C
from fasthyp.flows.executor import FlowExecutor
from fasthyp.reference.coupling import philox_normal, standard_normal_log_prob
from fasthyp.sampling import HypothesisSampler, SamplerCache
from tests.conftest import max_error, random_flow
from tests.replays import Replays


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def net() -> Any:
    return random_flow(9, (4,))


@pytest.fixture
def cond() -> Tensor:
    return torch.randn(3, 4)


def through_freia(net: Any, z: Tensor, conds: list[Tensor]) -> tuple[Tensor, Tensor]:
    """z (B, M, D) through FrEIA, rows of repeated conditions, in float64."""
    batch, samples, dim = z.shape
    rows = [c.double().repeat_interleave(samples, 0) for c in conds]
    with torch.no_grad():
        net = copy.deepcopy(flows.restore(net)).double().eval()
        x, log_jac = net(z.double().reshape(-1, dim), rows, rev=True)
    return x.reshape(z.shape), log_jac.reshape(batch, samples)


@pytest.mark.parametrize("samples", [1, 7, 1000, 4096])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("accelerated", [False, True])
def test_hypotheses_are_the_flows(net: Any, batch: int, samples: int, accelerated: bool) -> None:
    flow, cond = flows.accelerate(net) if accelerated else net, torch.randn(batch, 4)
    x, log_prob = HypothesisSampler(flow)(cond, samples, seed=5, return_log_prob=True)
    z = philox_normal(batch, samples, 9, 5)
    want, log_jac = through_freia(net, z, [cond])
    assert x.shape == (batch, samples, 9)
    assert log_prob.shape == (batch, samples)
    assert x.dtype == log_prob.dtype == torch.float32
    assert not x.requires_grad
    assert max_error(x, want) < 1e-4 * float(want.abs().max())
    want_log_prob = standard_normal_log_prob(z.double()) - log_jac
    assert max_error(log_prob, want_log_prob) < 1e-3


def test_log_prob_is_the_density_of_x(net: Any, cond: Tensor) -> None:
    x, log_prob = HypothesisSampler(net)(cond, 20, seed=1, return_log_prob=True)
    with torch.no_grad():
        z, log_jac = net(x.reshape(-1, 9), cond.repeat_interleave(20, 0))
    density = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + log_jac
    torch.testing.assert_close(log_prob.reshape(-1), density, rtol=1e-3, atol=1e-3)


def test_defaults_to_a_thousand(net: Any, cond: Tensor) -> None:
    assert HypothesisSampler(net)(cond).shape == (3, 1000, 9)


def test_several_conditions() -> None:
    net = random_flow(9, (4, 2))
    conds = [torch.randn(3, 4), torch.randn(3, 2)]
    x = HypothesisSampler(net)(conds, 6, seed=5)
    want, _ = through_freia(net, philox_normal(3, 6, 9, 5), conds)
    assert max_error(x, want) < 1e-4 * float(want.abs().max())


def test_no_condition() -> None:
    net = random_flow(9)
    sampler = HypothesisSampler(net)
    x = sampler(num_samples=6, seed=5)
    assert x.shape == (1, 6, 9)
    want, _ = through_freia(net, philox_normal(1, 6, 9, 5), [])
    assert max_error(x, want) < 1e-4 * float(want.abs().max())
    assert sampler(z=torch.zeros(4, 2, 9)).shape == (4, 2, 9)
    assert sampler(num_samples=2, fixed=torch.zeros(4, 3)).shape == (4, 2, 9)


def test_given_latents(net: Any, cond: Tensor) -> None:
    sampler = HypothesisSampler(net)
    z = torch.randn(3, 6, 9)
    x, log_prob = sampler(cond, z=z, return_log_prob=True)
    want, log_jac = through_freia(net, z, [cond])
    assert max_error(x, want) < 1e-4 * float(want.abs().max())
    assert max_error(log_prob, standard_normal_log_prob(z.double()) - log_jac) < 1e-3
    assert torch.equal(sampler(cond, 6, z=z), x)
    drawn = sampler(cond, 6, seed=3)
    again = sampler(cond, z=philox_normal(3, 6, 9, 3))
    torch.testing.assert_close(drawn, again, rtol=1e-4, atol=1e-4)


def test_fixed_latents_and_mode(net: Any, cond: Tensor) -> None:
    sampler = HypothesisSampler(net)
    fixed = torch.randn(3, 2)
    x, log_prob = sampler(cond, 5, seed=5, fixed=fixed, include_mode=True, return_log_prob=True)
    noise = philox_normal(3, 5, 7, 5, include_mode=True)
    assert not noise[:, 0].any()
    z = torch.cat([noise, fixed[:, None].expand(-1, 5, -1)], -1)
    want, log_jac = through_freia(net, z, [cond])
    assert max_error(x, want) < 1e-4 * float(want.abs().max())
    assert max_error(log_prob, standard_normal_log_prob(noise.double()) - log_jac) < 1e-3
    same = sampler(cond, z=noise, fixed=fixed)
    torch.testing.assert_close(same, x, rtol=1e-4, atol=1e-4)


# --- reproducible -----------------------------------------------------------------------------


def test_the_seed_decides(net: Any, cond: Tensor) -> None:
    sampler = HypothesisSampler(net)
    first = sampler(cond, 100, seed=5)
    assert torch.equal(sampler(cond, 100, seed=5), first)
    assert torch.equal(HypothesisSampler(copy.deepcopy(net))(cond, 100, seed=5), first)
    assert not torch.equal(sampler(cond, 100, seed=6), first)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(sampler(cond, 100, seed=5), first)
    for image in range(3):
        part = sampler(cond[image : image + 1], 100, seed=5, image_offset=image)
        assert torch.equal(part[0], first[image])
    assert torch.equal(sampler(cond, 1000, seed=5)[:, :100], first)


@pytest.mark.parametrize("kind", ["fused", "float64", "opaque"])
def test_hypotheses_in_parts(net: Any, cond: Tensor, kind: str) -> None:
    """The hypotheses of one call, bit for bit."""
    if kind == "float64":
        net, cond = copy.deepcopy(net).double(), cond.double()
    if kind == "opaque":
        net = random_flow(9, (4,), clamp_activation=lambda u: u / (1 + u.abs()))
    sampler = HypothesisSampler(net)
    for fixed in (None, torch.randn(3, 2).to(cond)):
        options = {"seed": 2**64 - 1, "fixed": fixed, "include_mode": True, "return_log_prob": True}
        whole = sampler(cond, 150, **options)
        splits = [(0, 1), (1, 64), (65, 17), (82, 68)]
        parts = [sampler(cond, count, first_sample=first, **options) for first, count in splits]
        for part, want in zip(zip(*parts, strict=True), whole, strict=True):
            got = torch.cat(part, 1)
            if kind == "opaque":  # PyTorch's products round as their shapes have it
                torch.testing.assert_close(got, want)
            else:
                assert torch.equal(got, want)
        last = sampler(cond, 5, first_sample=2**32 - 5, **options)[0]
        assert not torch.equal(last, whole[0][:, :5])


def test_hypotheses_differ(net: Any) -> None:
    x = HypothesisSampler(net)(torch.zeros(2, 4), 50, seed=5)
    assert len(torch.unique(x.reshape(-1, 9), dim=0)) == 100


def test_seeds_come_from_torch(net: Any, cond: Tensor) -> None:
    sampler = HypothesisSampler(net)
    torch.manual_seed(3)
    first, second = sampler(cond, 5), sampler(cond, 5)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(sampler(cond, 5), first)
    drawn = [sampler(cond, 5, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)
    state = torch.get_rng_state()
    sampler(cond, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["clamp", "opaque"])
def test_parts_that_are_not_fused_draw_the_same_noise(kind: str, cond: Tensor) -> None:
    settings: dict[str, Any] = {
        "clamp": {"clamp_activation": lambda u: u / (1 + u.abs())},
        "opaque": {
            "subnet": lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.ELU(), nn.Linear(8, o))
        },
    }[kind]
    net = random_flow(9, (4,), **settings)
    x = HypothesisSampler(net)(cond, 6, seed=5)
    want, _ = through_freia(net, philox_normal(3, 6, 9, 5), [cond])
    assert max_error(x, want) < 1e-4 * float(want.abs().max())


def test_reference_backend(net: Any, cond: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = HypothesisSampler(net)
    fused = sampler(cond, 6, seed=5, return_log_prob=True)
    monkeypatch.setenv("FASTHYP_BACKEND", "reference")
    for a, b in zip(sampler(cond, 6, seed=5, return_log_prob=True), fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_float64(net: Any, cond: Tensor) -> None:
    x = HypothesisSampler(net.double())(cond.double(), 6, seed=5)
    assert x.dtype == torch.float64
    want, _ = through_freia(net, philox_normal(3, 6, 9, 5), [cond])
    assert max_error(x, want) < 1e-4 * float(want.abs().max())


# --- the flow's state -------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
def test_samples_as_in_eval_mode(cond: Tensor, accelerated: bool) -> None:
    def subnet(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.5),
            nn.ReLU(),
            nn.Linear(8, outputs),
        )

    net = random_flow(9, (4,), subnet=subnet)
    if accelerated:
        net = flows.accelerate(net)
    sampler = HypothesisSampler(net)
    want = sampler(cond, 20, seed=5)
    net.train()
    statistics = net.module_list[0].subnet1[1].running_mean.clone()
    assert torch.equal(sampler(cond, 20, seed=5), want)
    assert all(part.training for part in net.modules())
    assert torch.equal(net.module_list[0].subnet1[1].running_mean, statistics)


def test_new_weights_are_used(net: Any, cond: Tensor) -> None:
    sampler = HypothesisSampler(net)
    before = sampler(cond, 5, seed=5)
    other = random_flow(9, (4,))
    net.load_state_dict(other.state_dict())
    after = sampler(cond, 5, seed=5)
    assert not torch.equal(after, before)
    assert torch.equal(after, HypothesisSampler(other)(cond, 5, seed=5))


def test_no_graph_is_recorded(net: Any, cond: Tensor) -> None:
    x, log_prob = HypothesisSampler(net)(cond.requires_grad_(), 5, return_log_prob=True)
    assert not x.requires_grad
    assert not log_prob.requires_grad


def test_copies(net: Any, cond: Tensor) -> None:
    sampler = HypothesisSampler(flows.accelerate(net))
    want = sampler(cond, 5, seed=5)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(twin(cond, 5, seed=5), want)


def test_a_program(net: Any, cond: Tensor) -> None:
    program = flows.describe(net)
    want = HypothesisSampler(net)(cond, 5, seed=5)
    assert torch.equal(HypothesisSampler(program)(cond, 5, seed=5), want)


def test_a_function_that_makes_a_program(net: Any, cond: Tensor) -> None:
    sampler = HypothesisSampler(lambda: flows.describe(net))
    assert torch.equal(sampler(cond, 5, seed=5), HypothesisSampler(net)(cond, 5, seed=5))


def test_one_sampler_per_precision(net: Any) -> None:
    samplers = SamplerCache()
    first = samplers.get(net, "high")
    assert samplers.get(net, "high") is first
    assert samplers.get(net, "highest") is not first
    other = random_flow(9, (4,))
    assert samplers.get(other, "high").flow is other
    for twin in (copy.deepcopy(samplers), pickle.loads(pickle.dumps(samplers))):
        assert not twin._samplers


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_counter_is_added(
    net: Any, cond: Tensor, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTHYP_BACKEND", backend)
    executor = FlowExecutor(flows.describe(net))
    got = executor.sample(cond, 5, 3, 1, counter=torch.tensor([4, 2, 6]), first_sample=1)
    assert same(got, executor.sample(cond, 5, 7, 3, first_sample=7))


# --- captured calls: on a CPU with a stand-in for the capture ---------------------------------


def calls(cond: Tensor) -> list[dict[str, Any]]:
    """Arguments of every kind of call."""
    fixed, z = torch.randn(3, 2).to(cond.device), torch.randn(3, 7, 9).to(cond.device)
    return [
        {"num_samples": 7},
        {"num_samples": 7, "return_log_prob": True},
        {"num_samples": 7, "include_mode": True, "return_log_prob": True},
        {"num_samples": 7, "fixed": fixed, "include_mode": True},
        {"z": z, "return_log_prob": True},
        {"z": z[..., :7].contiguous(), "fixed": fixed},
    ]


def seeded(arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    if "z" in arguments:
        return arguments
    return {**arguments, "seed": seed, "image_offset": seed, "first_sample": 3 * (seed - 1)}


def same(a: Any, b: Any) -> bool:
    return all(map(torch.equal, a, b)) if isinstance(a, tuple) else torch.equal(a, b)


def test_replays_are_plain_calls(net: Any, cond: Tensor, replays: type[Replays]) -> None:
    sampler, plain = HypothesisSampler(net), HypothesisSampler(net, graph=False)
    kinds = calls(cond)
    for arguments in kinds:
        for seed in (1, 2, 3):
            given = seeded(arguments, seed)
            conds = cond + seed
            assert same(sampler(conds, **given), plain(conds, **given)), (seed, list(arguments))
    assert [graph.replays for graph in replays.made] == [2] * len(kinds)


def test_replays_without_condition(replays: type[Replays]) -> None:
    net = random_flow(9)
    sampler, plain = HypothesisSampler(net, graph=True), HypothesisSampler(net, graph=False)
    for seed in (1, 2):
        assert torch.equal(sampler(num_samples=4, seed=seed), plain(num_samples=4, seed=seed))
    assert len(replays.made) == 1


def test_replays_notice_new_weights(net: Any, cond: Tensor, replays: type[Replays]) -> None:
    sampler = HypothesisSampler(net, graph=True)
    before = sampler(cond, 5, seed=5)
    with torch.no_grad():
        net.module_list[0].subnet1[2].bias.add_(1)
    after = sampler(cond, 5, seed=5)
    assert not torch.equal(before, after)
    assert torch.equal(after, HypothesisSampler(net, graph=False)(cond, 5, seed=5))
    assert len(replays.made) == 2


def test_parts_that_are_not_fused_are_not_captured(cond: Tensor, replays: type[Replays]) -> None:
    net = random_flow(9, (4,), clamp_activation=lambda u: u / (1 + u.abs()))
    sampler = HypothesisSampler(net)
    for _ in range(3):
        sampler(cond, 5)
    assert not replays.made
    with pytest.raises(ValueError, match=r"graph: True, but .* not every subnet"):
        HypothesisSampler(net, graph=True)(cond, 5)


def test_graph_needs_a_gpu(net: Any, cond: Tensor) -> None:
    with pytest.raises(ValueError, match="graph: True needs a CUDA device, got cpu"):
        HypothesisSampler(net, graph=True)(cond, 5)
    with pytest.raises(ValueError, match="graph: expected"):
        HypothesisSampler(net, graph="always")


# --- captured calls: on a GPU -----------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """From the call on, waiting for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_cuda_graphs_are_plain_calls(
    net: Any, cond: Tensor, precision: str, no_sync: Callable[[], None]
) -> None:
    net, cond = net.cuda(), cond.cuda()
    sampler = HypothesisSampler(net, precision)
    plain = HypothesisSampler(net, precision, graph=False)
    kinds = calls(cond)
    for arguments in kinds:
        for sample in (sampler, sampler, plain):  # prepares, captures
            sample(cond, **seeded(arguments, 0))
    assert sum(captured is not None for captured in sampler._graphs._kinds.values()) == len(kinds)
    conds = [cond + seed for seed in range(3)]
    no_sync()
    results = [
        (sampler(conds[seed], **given), plain(conds[seed], **given))
        for arguments in kinds
        for seed in range(3)
        for given in [seeded(arguments, seed)]
    ]
    torch.cuda.set_sync_debug_mode("default")
    assert all(same(*pair) for pair in results)
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_at_once_and_new_weights(net: Any, cond: Tensor) -> None:
    net, cond = net.cuda(), cond.cuda()
    sampler = HypothesisSampler(net, graph=True)
    before = sampler(cond, 5, seed=5)
    assert torch.equal(before, HypothesisSampler(net, graph=False)(cond, 5, seed=5))
    net.load_state_dict(random_flow(9, (4,)).state_dict())
    after = sampler(cond, 5, seed=5)
    assert not torch.equal(before, after)
    assert torch.equal(after, HypothesisSampler(net, graph=False)(cond, 5, seed=5))
    odd = random_flow(9, (4,), clamp_activation=lambda u: u / (1 + u.abs())).cuda()
    with pytest.raises(ValueError, match="graph: True, but"):
        HypothesisSampler(odd, graph=True)(cond, 5)


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_on_streams(net: Any, cond: Tensor) -> None:
    """One sampler on two streams in turn, and two samplers on two streams at once."""
    net, cond = net.cuda(), cond.cuda()
    plain = HypothesisSampler(net, graph=False)
    conds = [cond + i for i in range(40)]
    want = [plain(c, 2000, seed=i) for i, c in enumerate(conds)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    samplers = [HypothesisSampler(net, graph=True) for _ in streams]
    torch.cuda.synchronize()
    for chosen in (samplers[:1] * 2, samplers):
        got = []
        for i, c in enumerate(conds):
            with torch.cuda.stream(streams[i % 2]):
                got.append(chosen[i % 2](c, 2000, seed=i))
        torch.cuda.synchronize()
        assert same(tuple(got), tuple(want))


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_in_threads(net: Any, cond: Tensor) -> None:
    net, cond = net.cuda(), cond.cuda()
    plain, shared = HypothesisSampler(net, graph=False), HypothesisSampler(net)
    want = [plain(cond, 500, seed=i) for i in range(64)]
    torch.cuda.synchronize()

    def draw(seed: int) -> Tensor:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = (shared if seed % 2 else HypothesisSampler(net, graph=True))(cond, 500, seed=seed)
        stream.synchronize()
        return x

    with ThreadPoolExecutor(8) as pool:
        assert same(tuple(pool.map(draw, range(64))), tuple(want))


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_of_the_caller(net: Any, cond: Tensor) -> None:
    net, cond = net.cuda(), cond.cuda()
    sampler = HypothesisSampler(net, graph=True)
    want = sampler(cond, 5, seed=5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = sampler(cond, 5, seed=5)
    graph.replay()
    assert torch.equal(x, want)


@pytest.mark.gpu
@needs_gpu
def test_cuda_hypotheses_are_the_cpus(net: Any, cond: Tensor) -> None:
    want = HypothesisSampler(net, "highest")(cond, 1000, seed=5)
    sampler = HypothesisSampler(net.cuda(), "highest")
    for _ in range(3):
        got = sampler(cond.cuda(), 1000, seed=5).cpu()
        assert max_error(got, want) < 1e-4 * float(want.abs().max())


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cond": torch.randn(3, 5)}, ValueError, r"cond: expected shape \(B, 4\), got \(3, 5\)"),
        ({"cond": torch.randn(4)}, ValueError, "cond: expected 2 dimensions"),
        ({"cond": torch.randn(3, 1, 4)}, ValueError, "cond: expected 2 dimensions"),
        ({"cond": torch.randn(0, 4)}, ValueError, "cond: expected at least one image"),
        ({"cond": torch.randn(3, 4).double()}, TypeError, "cond: expected torch.float32"),
        ({"cond": torch.ones(3, 4).long()}, TypeError, "cond: expected torch.float32"),
        ({"cond": torch.full((3, 4), float("nan"))}, ValueError, "cond: expected finite"),
        ({"cond": torch.full((3, 4), float("inf"))}, ValueError, "cond: expected finite"),
        ({"cond": torch.randn(3, 4, device="meta")}, ValueError, "cond: expected on cpu"),
        ({"cond": None}, ValueError, r"cond: expected 1 condition\(s\), got 0"),
        ({"cond": [torch.randn(3, 4)] * 2}, ValueError, r"cond: expected 1 condition\(s\), got 2"),
        ({"cond": [[1.0]]}, TypeError, "cond: expected a tensor, got list"),
        ({"cond": 3.0}, TypeError, "cond: expected a tensor or a list"),
        ({"num_samples": 0}, ValueError, "num_samples: expected 1 <= num_samples"),
        ({"num_samples": -1}, ValueError, "num_samples: expected 1 <= num_samples"),
        ({"num_samples": 2.0}, TypeError, "num_samples: expected an int, got float"),
        ({"num_samples": True}, TypeError, "num_samples: expected an int, got bool"),
        ({"seed": -1}, ValueError, "seed: expected 0 <= seed"),
        ({"seed": 2**64}, ValueError, "seed: expected 0 <= seed"),
        ({"seed": "1"}, TypeError, "seed: expected an int, got str"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed, generator"),
        ({"image_offset": -1}, ValueError, "image_offset: expected 0 <= image_offset"),
        ({"image_offset": 2**32 - 2}, ValueError, "image_offset: expected 0 <= image_offset"),
        ({"first_sample": -1}, ValueError, "first_sample: expected 0 <= first_sample"),
        ({"first_sample": 2**32 - 999}, ValueError, "first_sample: expected 0 <= first_sample"),
        ({"first_sample": 1.0}, TypeError, "first_sample: expected an int, got float"),
        ({"z": torch.randn(3, 5, 9), "first_sample": 1}, ValueError, "z: given latents"),
        ({"z": torch.randn(3, 9)}, ValueError, "z: expected 3 dimensions"),
        ({"z": torch.randn(3, 5, 8)}, ValueError, r"z: expected shape \(3, 5, 9\)"),
        ({"z": torch.randn(2, 5, 9)}, ValueError, r"z: expected shape \(3, 5, 9\)"),
        ({"z": torch.randn(3, 0, 9)}, ValueError, "z: expected shape"),
        ({"z": torch.randn(3, 5, 9), "num_samples": 6}, ValueError, r"shape \(3, 6, 9\)"),
        ({"z": torch.randn(3, 5, 9).double()}, TypeError, "z: expected torch.float32"),
        ({"z": torch.full((3, 5, 9), float("nan"))}, ValueError, "z: expected finite"),
        ({"z": torch.randn(3, 5, 9), "seed": 1}, ValueError, "z: given latents leave nothing"),
        ({"z": torch.randn(3, 5, 9), "include_mode": True}, ValueError, "z: given latents"),
        ({"z": torch.randn(3, 5, 9), "fixed": torch.randn(3, 2)}, ValueError, r"\(3, 5, 7\)"),
        ({"fixed": torch.randn(2, 2)}, ValueError, r"fixed: expected shape \(3, F\)"),
        ({"fixed": torch.randn(3, 10)}, ValueError, r"fixed: expected shape \(3, F\) with F <= 9"),
        ({"fixed": torch.randn(3, 0)}, ValueError, r"fixed: expected shape \(3, F\)"),
        ({"fixed": torch.randn(3)}, ValueError, "fixed: expected 2 dimensions"),
        ({"fixed": torch.full((3, 2), float("nan"))}, ValueError, "fixed: expected finite"),
        ({"fixed": [1.0]}, TypeError, "fixed: expected a tensor, got list"),
    ],
)
def test_bad_input(net: Any, arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        HypothesisSampler(net)(**{"cond": torch.randn(3, 4), **arguments})


def test_fixed_latents_of_other_images() -> None:
    net = random_flow(9, (4,), clamp_activation=lambda u: u / (1 + u.abs()))
    with pytest.raises(ValueError, match=r"fixed: expected shape \(3, F\)"):
        HypothesisSampler(net)(torch.randn(3, 4), fixed=torch.randn(1, 2))


def test_two_conditions_are_checked_each() -> None:
    sampler = HypothesisSampler(random_flow(9, (4, 2)))
    for conds, message in (
        ([torch.randn(3, 4), torch.randn(2, 2)], r"cond\[1\]: expected shape \(3, 2\)"),
        ([torch.randn(3, 4), torch.randn(3, 4)], r"cond\[1\]: expected shape \(3, 2\)"),
        (torch.randn(3, 6), r"cond: expected 2 condition\(s\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler(conds)


@pytest.mark.parametrize("flow", [nn.Linear(2, 2), "flow", None, dict])
def test_not_a_flow(flow: Any) -> None:
    with pytest.raises(TypeError, match=r"GraphINN|FlowProgram"):
        HypothesisSampler(flow)


def test_flows_that_cannot_be_sampled(net: Any) -> None:
    scaling = ff.SequenceINN(6)
    scaling.append(fm.LearnedElementwiseScaling)
    with pytest.raises(flows.UnsupportedFlow, match="LearnedElementwiseScaling"):
        HypothesisSampler(scaling)
    with pytest.raises(ValueError, match="precision"):
        HypothesisSampler(net, precision="double")
