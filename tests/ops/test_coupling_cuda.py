"""Coupling flows on CUDA: packing and plans anywhere, the kernels where there is a device.

The kernels' every step and awkward shape is tested in ``tests/simt``; here is what needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fasthyp
from fasthyp import _C
from fasthyp.ops import _coupling_cuda
from fasthyp.ops import coupling as ops
from fasthyp.ops._coupling_steps import fold
from fasthyp.reference import coupling as reference
from fasthyp.reference.coupling import KINDS, Layer, Net
from tests.conftest import assert_as_good_as, max_error, random_flow
from tests.ops.test_coupling import Random, as_dtype, map_tensors, random_inputs, random_layers

needs_build = pytest.mark.skipif(_C.cuda_archs is None, reason="needs a build with CUDA kernels")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)

LOG_DET = 17
"""Place of the linear steps' log|det| in a plan."""

# Relative to the largest result.
TOLERANCES = {"high": 5e-3, "medium": 5e-2}


def pack(layers: Sequence[Layer], index: Sequence[int], dim: int, cond_dim: int) -> Tensor:
    """The plan of a flow, packed on the CPU."""
    steps = fold(layers, dim, cond_dim, torch.float32)
    return _coupling_cuda.pack(steps, index, dim, cond_dim, "high", torch.device("cpu"))[0]


def workspace(plan: Tensor, images: int, per_image: int) -> int:
    return _C.coupling_cuda_workspace(plan.data_ptr(), len(plan), images, per_image)


# --- without a device ---


def test_subnets_that_the_kernels_do_not_have() -> None:
    (layer,), index = random_layers(9, 4, count=1, dtype=torch.float32)
    (net,) = layer.nets
    ends = Net((*net.layers[:-1], type(net.layers[-1])(net.layers[-1].weight, activate=True)))
    changed = type(layer)(layer.active, layer.passive, layer.cond, (ends,))
    with pytest.raises(_coupling_cuda.UnsupportedOnCuda, match="a subnet ends"):
        pack([changed], index, 9, 4)


@needs_build
def test_flows_of_two_layer_subnets_are_one_launch() -> None:
    """A flow in one launch needs no hidden layers between launches; a deeper one does."""
    rows = 10_000
    shallow = workspace(pack(*random_layers(48, 56, hidden=1024), 48, 56), 1, rows)
    deep = workspace(pack(*random_layers(48, 56, depth=3, hidden=1024), 48, 56), 1, rows)
    assert shallow < rows * 4 * 60
    assert deep > rows * 4 * 2 * 1024


@needs_build
def test_workspace_is_bounded() -> None:
    plan = pack(*random_layers(24, 56, depth=3, hidden=512, count=2), 24, 56)
    assert workspace(plan, 0, 5) == workspace(plan, 5, 0) == 0
    most = _coupling_cuda._SCRATCH_BYTES + (1 << 20)
    for images, per_image in ((1, 10**9), (10**9, 1), (10**6, 10**6)):
        assert 0 < workspace(plan, images, per_image) < most


@needs_build
def test_bad_plans() -> None:
    plan = pack(*random_layers(9, 4), 9, 4)
    with pytest.raises(ValueError, match="too short"):
        workspace(plan[:-1].contiguous(), 1, 1)
    with pytest.raises(ValueError, match="too long"):
        workspace(torch.cat([plan, plan[:1]]), 1, 1)
    generator = torch.Generator().manual_seed(0)
    for place in range(1, len(plan)):
        changed = plan.clone()
        changed[place] = -(2**40) - int(torch.randint(10**6, (), generator=generator))
        if place == LOG_DET:
            continue  # the bits of a double
        with pytest.raises(ValueError, match="CUDA flow plan"):
            workspace(changed, 1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_samples": -1}, ValueError, "batch, num_samples: expected >= 0"),
        ({"cond": torch.randn(2, 4)}, ValueError, "cond: expected shape"),
        ({"cond": None}, ValueError, "cond: expected shape"),
        ({"cond": torch.randn(3, 4).double()}, TypeError, "cond: expected dtype"),
        ({"fixed": torch.randn(3, 10)}, ValueError, "fixed: expected shape"),
        ({"fixed": torch.randn(3, 2).double()}, TypeError, "fixed: expected dtype"),
        ({"first_sample": -1}, ValueError, "first_sample: expected 0 to"),
        ({"counter": torch.zeros(3)}, ValueError, "counter: expected int64"),
        ({"plan": torch.zeros(9)}, ValueError, "plan: expected"),
        ({"packed": torch.zeros(64)}, ValueError, "packed: expected"),
    ],
)
def test_bad_samples(change: dict[str, Any], error: type, message: str) -> None:
    """Refused before anything is launched."""
    layers, index = random_layers(9, 4, dtype=torch.float32)
    steps = fold(layers, 9, 4, torch.float32)
    plan, weights = _coupling_cuda.pack(steps, index, 9, 4, "high", torch.device("cpu"))
    arguments = {
        **{"cond": torch.randn(3, 4), "fixed": None, "packed": weights, "plan": plan},
        **{"batch": 3, "num_samples": 5, "seed": 0, "image_offset": 0, "first_sample": 0},
        **{"include_mode": False, "counter": None},
    }
    with pytest.raises(error, match=message):
        _coupling_cuda.sample(**{**arguments, **change})


# --- with a device ---


def on(device: str, layers: Sequence[Layer]) -> list[Layer]:
    return map_tensors(list(layers), lambda tensor: tensor.to(device))


def packed(
    layers: Sequence[Layer], index: Sequence[int], dim: int, cond_dim: int, precision: str
) -> ops.PackedFlow:
    return ops.PackedFlow(layers, index, dim, cond_dim, precision, device="cuda")


def check(
    layers: Sequence[Layer],
    index: Sequence[int],
    x: Tensor,
    cond: Tensor | None,
    precisions: Sequence[str] = ("highest", "high", "medium"),
) -> None:
    """Both directions against float64 and, at "highest", against the CPU kernels."""
    layers = as_dtype(layers, torch.float32)
    x, cond = x.float(), None if cond is None else cond.float()
    shape = x.shape[-1], 0 if cond is None else cond.shape[1]
    cpu = ops.PackedFlow(layers, index, *shape)
    wide = as_dtype(layers, torch.float64)
    there = x.cuda(), None if cond is None else cond.cuda()
    for precision in precisions:
        flow = packed(on("cuda", layers), index, *shape, precision)
        for inverse in (False, True):
            run = reference.flow_inverse if inverse else reference.flow_forward
            exact = run(wide, index, x.double(), None if cond is None else cond.double())
            near = (cpu.inverse if inverse else cpu.forward)(x, cond)
            got = (flow.inverse if inverse else flow.forward)(*there)
            for a, b, want in zip(got, near, exact, strict=True):
                assert a.device == there[0].device
                if precision == "highest":
                    assert_as_good_as(a.cpu(), b, want, f"inverse {inverse}", times=8.0)
                else:
                    allowed = TOLERANCES[precision] * max(1.0, float(want.abs().max()))
                    assert max_error(a.cpu(), want) <= allowed, (precision, inverse)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("batch", "samples"),
    [(1, 1), (1, 15), (1, 17), (1, 1000), (1, 4096), (256, 1), (256, 3), (16, 200), (3, 1000)],
)
@pytest.mark.parametrize(("dim", "cond_dim", "depth"), [(48, 56, 2), (39, 17, 3), (132, 30, 2)])
def test_cuda_matches_cpu(batch: int, samples: int, dim: int, cond_dim: int, depth: int) -> None:
    layers, index = random_layers(dim, cond_dim, depth, hidden=256)
    check(layers, index, *random_inputs(batch, samples, dim, cond_dim))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_cuda_steps(kind: str, residual: bool) -> None:
    make = Random(37, 20, seed=4)
    layers: list[Layer] = [make.diagonal(), make.coupling(kind, 2, residual=residual)]
    layers += [make.linear(), make.coupling(kind, residual=residual, gate=True, hidden=130)]
    check(layers, make.order(), *random_inputs(3, 70, 37, 20))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("depth", [2, 3])
def test_cuda_many_rows(depth: int) -> None:
    layers, index = random_layers(24, 0, depth, hidden=512, dtype=torch.float32)
    flow = packed(on("cuda", layers), index, 24, 0, "high")
    x = torch.randn(1, 65_536, 24, device="cuda")
    whole = flow.inverse(x)
    for first in (0, 30_000, 65_000):
        part = flow.inverse(x[:, first : first + 536])
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b[:, first : first + 536], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("batch", "samples"), [(0, 5), (3, 0)])
def test_cuda_empty(batch: int, samples: int) -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    flow = packed(on("cuda", layers), index, 9, 4, "high")
    x, cond = random_inputs(batch, samples, 9, 4, torch.float32)
    z, log_jac = flow.forward(x.cuda(), cond.cuda())
    assert z.shape == (batch, samples, 9)
    assert log_jac.shape == (batch, samples)


@pytest.mark.gpu
@needs_gpu
def test_cuda_samples_as_the_cpu() -> None:
    layers, index = random_layers(48, 56, hidden=300, dtype=torch.float32)
    _, cond = random_inputs(5, 1, 48, 56, torch.float32)
    fixed = torch.randn(5, 32)
    cpu = ops.PackedFlow(layers, index, 48, 56)
    cuda = packed(on("cuda", layers), index, 48, 56, "highest")
    options = {"seed": 2**63 + 11, "image_offset": 3, "include_mode": True}
    want = cpu.sample(cond, 200, fixed=fixed, **options)
    got = cuda.sample(cond.cuda(), 200, fixed=fixed.cuda(), **options)
    counter = torch.tensor([4, 2, 0], device="cuda")
    options = {**options, "seed": 2**63 + 7, "image_offset": 1}
    same = cuda.sample(cond.cuda(), 200, fixed=fixed.cuda(), counter=counter, **options)
    for a, b, c in zip(got, same, want, strict=True):
        assert torch.equal(a, b)
        assert max_error(a.cpu(), c) <= 1e-5 * float(c.abs().max())
    counter = torch.tensor([4, 2, 60], device="cuda")
    rest = cuda.sample(
        cond.cuda(), 100, fixed=fixed.cuda(), counter=counter, first_sample=40, **options
    )
    for a, c in zip(rest, want, strict=True):
        assert max_error(a.cpu(), c[:, 100:]) <= 1e-5 * float(c.abs().max())


@pytest.mark.gpu
@needs_gpu
def test_cuda_non_contiguous_and_expanded() -> None:
    layers, index = random_layers(9, 6, dtype=torch.float32)
    flow = packed(on("cuda", layers), index, 9, 6, "highest")
    x, cond = random_inputs(40, 1, 9, 6, torch.float32)
    x, cond = x.cuda(), cond.cuda()
    plain = flow.forward(x, cond[:1].repeat(40, 1))
    expanded = flow.forward(x, cond[:1].expand(40, 6))
    strided = flow.forward(x.mT.contiguous().mT, cond[:1].repeat(40, 1).T.contiguous().T)
    for a, b, c in zip(plain, expanded, strided, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("depth", [2, 3])
def test_cuda_streams(depth: int) -> None:
    """Another stream than the default one, and two at once."""
    layers, index = random_layers(24, 10, depth, hidden=512, dtype=torch.float32)
    flow = packed(on("cuda", layers), index, 24, 10, "high")
    x, cond = random_inputs(4, 500, 24, 10, torch.float32)
    inputs = [(x.cuda(), cond.cuda()), (2 * x.cuda(), cond.cuda() - 1)]
    expected = [flow.inverse(*pair) for pair in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(5):
        got = []
        for stream, pair in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(flow.inverse(*pair))
        torch.cuda.synchronize()
        for pair, want in zip(got, expected, strict=True):
            assert torch.equal(pair[0], want[0])
            assert torch.equal(pair[1], want[1])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("depth", [2, 3])
def test_cuda_graph(depth: int) -> None:
    layers, index = random_layers(24, 10, depth, hidden=128, dtype=torch.float32)
    flow = packed(on("cuda", layers), index, 24, 10, "high")
    x, cond = (tensor.cuda() for tensor in random_inputs(2, 300, 24, 10, torch.float32))
    static_x, static_cond = torch.zeros_like(x), torch.zeros_like(cond)
    flow.forward(static_x, static_cond)  # a kernel's first launch loads it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, log_jac = flow.forward(static_x, static_cond)
    for scale in (1.0, 0.5):
        static_x.copy_(scale * x)
        static_cond.copy_(cond)
        graph.replay()
        want = flow.forward(scale * x, cond)
        assert torch.equal(z, want[0])
        assert torch.equal(log_jac, want[1])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, c: (x.cpu(), c), ValueError, "x: expected on cuda"),
        (lambda x, c: (x, c.cpu()), ValueError, "cond: expected on cuda"),
        (lambda x, c: (x.double(), c), TypeError, "x: expected dtype"),
        (lambda x, c: (x[..., :8], c), ValueError, "x: expected shape"),
        (lambda x, c: (x, c[:1]), ValueError, "cond: expected shape"),
        (lambda x, c: (x, None), ValueError, "cond: expected shape"),
    ],
)
def test_cuda_bad_input(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], error: type, message: str
) -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    flow = packed(on("cuda", layers), index, 9, 4, "high")
    x, cond = (tensor.cuda() for tensor in random_inputs(2, 3, 9, 4, torch.float32))
    with pytest.raises(error, match=message):
        flow.forward(*change(x, cond))


@pytest.mark.gpu
@needs_gpu
def test_cuda_flow_too_wide_is_refused() -> None:
    layers, index = random_layers(4000, 0, hidden=8, count=1, dtype=torch.float32)
    with pytest.raises(_coupling_cuda.UnsupportedOnCuda, match="shared memory"):
        packed(on("cuda", layers), index, 4000, 0, "high")


@pytest.mark.gpu
@needs_gpu
def test_cuda_opcheck() -> None:
    layers, index = random_layers(9, 4, dtype=torch.float32)
    flow = packed(on("cuda", layers), index, 9, 4, "high")
    x, cond = (tensor.cuda() for tensor in random_inputs(2, 3, 9, 4, torch.float32))
    arguments = (x, cond, flow.packed, flow.plan, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fasthyp.coupling_flow.default, arguments, test_utils=checks)


@pytest.mark.gpu
@needs_gpu
def test_cuda_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FrEIA model on the device runs fused, follows its weights, and says so."""
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)
    net = random_flow(24, (7,), hidden=64).cuda()
    fast = fasthyp.accelerate(net)
    (row,) = fasthyp.explain(fast).rows
    assert row["accelerated"]
    assert "cuda" in row["reason"]
    x, cond = torch.randn(50, 24, device="cuda"), torch.randn(50, 7, device="cuda")
    with torch.no_grad():
        for rev in (False, True):
            for _ in range(2):
                for a, b in zip(fast(x, [cond], rev=rev), net(x, [cond], rev=rev), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
                next(net.parameters()).mul_(0.9)
        back = fast.cpu()(x.cpu(), [cond.cpu()])[0]
        torch.testing.assert_close(back, net(x.cpu(), [cond.cpu()])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_cuda_float64_runs_the_reference() -> None:
    net = fasthyp.accelerate(random_flow(24, (7,)).cuda().double())
    assert "float64" in fasthyp.explain(net).rows[0]["reason"]
