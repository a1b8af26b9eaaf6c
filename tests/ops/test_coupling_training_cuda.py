"""Coupling passes with gradients on CUDA: sizes anywhere, the kernels where there is a device.

The kernels' every step and awkward shape is tested in ``tests/simt``; here is what needs a GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fasthyp import _C
from fasthyp.ops import _coupling_training_cuda as ops
from fasthyp.ops import coupling_training
from fasthyp.ops._coupling_plan import describe, parse
from fasthyp.ops._coupling_steps import fold, run_folded
from fasthyp.reference.coupling import KINDS, Layer
from tests.conftest import assert_as_good_as, max_error
from tests.ops.test_coupling import Random, as_dtype, random_inputs, random_layers

needs_build = pytest.mark.skipif(_C.cuda_archs is None, reason="needs a build with CUDA kernels")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)
TOLERANCE = 1e-2  # of tf32, relative to the largest element


@dataclass
class Flow:
    """A flow as the ops take it, on the CPU."""

    plan: list[int]
    weights: list[Tensor]

    @classmethod
    def of(cls, layers: Sequence[Layer], index: Sequence[int], dim: int, cond_dim: int) -> Flow:
        steps = fold(as_dtype(layers, torch.float32), dim, cond_dim, torch.float32)
        plan, tensors = describe(steps, index, dim, cond_dim, 0, 1, log_det=False)
        return cls(plan, [tensor.float() for tensor in tensors])

    def expected(
        self, x: Tensor, cond: Tensor | None, inverse: bool, dtype: torch.dtype
    ) -> list[Tensor]:
        """Results, and gradients of x, the condition if there is one, and weights."""
        inputs = [t.detach().to(dtype).requires_grad_() for t in _inputs(x, cond, self.weights)]
        c = None if cond is None else inputs[1]
        steps, index = parse(self.plan, inputs[1 if c is None else 2 :])
        results = run_folded(steps, index, inputs[0], c, inverse)
        value = weighted(*results)
        grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        return [r.detach() for r in (*results, *grads)]

    def run(
        self,
        x: Tensor,
        cond: Tensor | None,
        inverse: bool,
        precision: str = "highest",
        keep_every: int = 0,
        store: bool = False,
    ) -> list[Tensor]:
        """The same by the registered op, on the device of what is given."""
        inputs = [t.detach().requires_grad_() for t in _inputs(x, cond, self.weights)]
        c = None if cond is None else inputs[1]
        weights = [t.to(x.device) for t in inputs[1 if c is None else 2 :]]
        out, log_det, _ = coupling_training.coupling_pass(
            inputs[0], c, weights, None, self.plan, inverse, keep_every, store, precision
        )
        grads = torch.autograd.grad(
            weighted(out, log_det), inputs, allow_unused=True, materialize_grads=True
        )
        return [r.detach().cpu() for r in (out, log_det, *grads)]


def _inputs(x: Tensor, cond: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor]:
    return [x, *([] if cond is None else [cond]), *weights]


def weighted(out: Tensor, log_det: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(t.shape, generator=generator).to(t) for t in (out, log_det)]
    return (out * factors[0]).sum() + (log_det * factors[1]).sum()


def small_flow() -> tuple[Flow, Tensor, Tensor]:
    layers, index = random_layers(9, 4, count=2, dtype=torch.float32)
    return Flow.of(layers, index, 9, 4), *random_inputs(2, 40, 9, 4, torch.float32)


# --- without a device ---


@needs_build
@pytest.mark.parametrize("store", [False, True])
def test_workspace_is_bounded(store: bool) -> None:
    """Whatever the number of rows, and, but for what is stored, of steps."""
    sizes = {}
    for count in (2, 8):
        layers, index = random_layers(48, 56, hidden=1024, count=count)
        plan = Flow.of(layers, index, 48, 56).plan
        for images, per_image in ((64, 200), (1, 10**9), (10**9, 1), (10**6, 10**6)):
            size = _C.coupling_cuda_pass_workspace(
                plan, images, per_image, 0, store, True, ops._SCRATCH_BYTES
            )
            sizes[count, images] = size
            assert 0 < size < 180 << 20
    for images in (64, 1, 10**9, 10**6):
        assert abs(sizes[2, images] - sizes[8, images]) < 1 << 16


@needs_build
def test_what_is_saved() -> None:
    layers, index = random_layers(9, 4, count=7)
    plan = Flow.of(layers, index, 9, 4).plan
    widths = [ops.coupling_saved_width(plan, every, False) for every in (0, 1, 2, 3, 7)]
    assert widths == [0, 7 * 12, 4 * 12, 3 * 12, 12]
    assert ops.coupling_saved_width(plan, 0, True) > 7 * (12 + 24)


@needs_build
def test_bad_plans() -> None:
    plan = small_flow()[0].plan
    for bad, message in ((plan[:-1], "too short"), ([*plan, 0], "too long")):
        with pytest.raises(ValueError, match=message):
            ops.coupling_saved_width(bad, 0, False)
    for place in range(len(plan)):
        changed = [*plan]
        changed[place] = -(2**40)
        with contextlib.suppress(ValueError):  # the bits of a real number may be anything
            ops.coupling_saved_width(changed, 0, False)


# --- with a device ---


def check(
    layers: Sequence[Layer],
    index: Sequence[int],
    x: Tensor,
    cond: Tensor | None,
    precisions: Sequence[str] = ("highest", "high"),
    **options: object,
) -> None:
    """Both directions against autograd in float64."""
    x, cond = x.float(), None if cond is None else cond.float()
    flow = Flow.of(layers, index, x.shape[2], 0 if cond is None else cond.shape[1])
    there = Flow(flow.plan, [w.cuda() for w in flow.weights])
    cuda = x.cuda(), None if cond is None else cond.cuda()
    for inverse, precision in itertools.product((False, True), precisions):
        exact = flow.expected(x, cond, inverse, torch.float64)
        peer = flow.expected(x, cond, inverse, torch.float32)
        got = there.run(*cuda, inverse, precision, **options)
        for i, (a, near, want) in enumerate(zip(got, peer, exact, strict=True)):
            if precision == "highest":
                assert_as_good_as(a, near, want, f"{i}, inverse {inverse}", times=10.0)
            else:
                allowed = TOLERANCE * max(1e-3, float(want.abs().max()))
                assert max_error(a, want) <= allowed, (i, inverse)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("batch", "samples"), [(1, 1), (1, 17), (1, 1000), (256, 1), (16, 200), (3, 1000)]
)
@pytest.mark.parametrize(("dim", "cond_dim", "depth"), [(48, 56, 2), (39, 17, 3), (132, 30, 3)])
def test_cuda_gradients(batch: int, samples: int, dim: int, cond_dim: int, depth: int) -> None:
    layers, index = random_layers(dim, cond_dim, depth, hidden=256, count=2, activation="silu")
    check(layers, index, *random_inputs(batch, samples, dim, cond_dim), keep_every=1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keep_every", "store"), [(0, False), (2, False), (0, True)])
def test_cuda_steps_gradients(kind: str, keep_every: int, store: bool) -> None:
    make = Random(37, 20, seed=4)
    layers: list[Layer] = [make.diagonal(), make.coupling(kind, 2, activation="silu")]
    layers += [make.linear(), make.coupling(kind, gate=True, hidden=130, activation="gelu")]
    inputs = random_inputs(3, 70, 37, 20)
    check(layers, make.order(), *inputs, keep_every=keep_every, store=store)


@pytest.mark.gpu
@needs_gpu
def test_cuda_gradients_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, index = random_layers(24, 10, hidden=100, count=2, activation="silu")
    monkeypatch.setattr(ops, "_SCRATCH_BYTES", 1 << 20)
    check(layers, index, *random_inputs(7, 301, 24, 10), keep_every=1)


@pytest.mark.gpu
@needs_gpu
def test_cuda_gradients_as_the_cpu() -> None:
    """The same op on both devices."""
    flow, x, cond = small_flow()
    there = Flow(flow.plan, [w.cuda() for w in flow.weights])
    for inverse in (False, True):
        near = flow.run(x, cond, inverse)
        got = there.run(x.cuda(), cond.cuda(), inverse)
        for a, b in zip(got, near, strict=True):
            assert max_error(a, b) <= 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("batch", "samples"), [(0, 5), (3, 0)])
def test_cuda_empty_gradients(batch: int, samples: int) -> None:
    flow, _, _ = small_flow()
    there = Flow(flow.plan, [w.cuda() for w in flow.weights])
    x, cond = random_inputs(batch, samples, 9, 4, torch.float32)
    for value in there.run(x.cuda(), cond.cuda(), True):
        assert not value.any()


@pytest.mark.gpu
@needs_gpu
def test_cuda_gradients_are_the_same_every_time() -> None:
    layers, index = random_layers(48, 56, hidden=512, count=2)
    flow = Flow.of(layers, index, 48, 56)
    there = Flow(flow.plan, [w.cuda() for w in flow.weights])
    x, cond = (t.float().cuda() for t in random_inputs(16, 200, 48, 56))
    first, *others = (there.run(x, cond, True) for _ in range(4))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@needs_gpu
def test_cuda_gradients_on_other_streams() -> None:
    layers, index = random_layers(24, 10, hidden=512, count=2)
    flow = Flow.of(layers, index, 24, 10)
    there = Flow(flow.plan, [w.cuda() for w in flow.weights])
    x, cond = (t.float().cuda() for t in random_inputs(4, 500, 24, 10))
    want = there.run(x, cond, True)
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            got = there.run(x, cond, True)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("store", [False, True])
def test_cuda_gradients_graph(store: bool) -> None:
    """Pass and gradient, captured and replayed with other inputs."""
    flow, x, cond = small_flow()
    x, cond = x.cuda(), cond.cuda()
    weights = [w.cuda() for w in flow.weights]
    static_x, static_cond = torch.zeros_like(x), torch.zeros_like(cond)
    wanted = [True] * (1 + len(weights))

    def step(x: Tensor, cond: Tensor) -> list[Tensor]:
        options = (None, flow.plan, True, 0, store, "highest")
        out, log_det, saved = ops.run(x, cond, weights, *options)
        grads = ops.backward(out, saved, cond, out, log_det, weights, *options, wanted)
        return [out, log_det, *grads]

    step(static_x, static_cond)  # a kernel's first launch loads it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(static_x, static_cond)
    for scale in (1.0, 0.5):
        static_x.copy_(scale * x)
        static_cond.copy_(cond)
        graph.replay()
        for a, b in zip(got, step(scale * x, cond), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, c, w: (x.double(), c, w), TypeError, "x: expected dtype"),
        (lambda x, c, w: (x[..., :8], c, w), ValueError, "x: expected shape"),
        (lambda x, c, w: (x, c[:1], w), ValueError, "cond: expected shape"),
        (lambda x, c, w: (x, c.cpu(), w), ValueError, "cond: is on cpu"),
        (lambda x, c, w: (x, c, w[:-1]), ValueError, "weights: expected"),
        (lambda x, c, w: (x, c, [w[0].cpu(), *w[1:]]), ValueError, r"weights\[0\]: is on cpu"),
        (lambda x, c, w: (x, c, [w[0][:1], *w[1:]]), ValueError, r"weights\[0\]: expected"),
    ],
)
def test_cuda_bad_input_of_gradients(change: Callable, error: type, message: str) -> None:
    flow, x, cond = small_flow()
    x, cond, weights = change(x.cuda(), cond.cuda(), [w.cuda() for w in flow.weights])
    with pytest.raises(error, match=message):
        ops.run(x, cond, weights, None, flow.plan, True, 0, False, "highest")


@pytest.mark.gpu
@needs_gpu
def test_cuda_opcheck_of_gradients() -> None:
    flow, x, cond = small_flow()
    weights = [w.cuda().requires_grad_() for w in flow.weights]
    arguments = (x.cuda().requires_grad_(), cond.cuda(), weights, None, flow.plan, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        coupling_training.coupling_pass, (*arguments, 1, False, "highest"), test_utils=checks
    )
