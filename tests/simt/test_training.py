"""The CUDA kernels of passes with gradients on the host, against run_folded and autograd in
float64: every form of step, awkward shapes; the order of the threads must not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fasthyp.ops._coupling_plan import describe, parse
from fasthyp.ops._coupling_steps import fold, run_folded
from fasthyp.reference.coupling import ACTIVATIONS, CLAMP_ACTIVATIONS, KINDS, Layer
from tests.conftest import assert_as_good_as, max_error
from tests.ops.test_coupling import Random, as_dtype, random_inputs, random_layers
from tests.simt.tools import build_kernels, execute

SCRATCH = 128 << 20
TOLERANCE = 1e-2  # of tf32, relative to the largest element, after couplings that amplify
PRECISIONS = {"highest": 0, "high": 1}


@pytest.fixture(scope="session")
def training(programs: Path, emulation: Path) -> Path:
    parts = ("", "_gradient", "_layout", "_plan")
    names = ("cuda_gemm.cu", "cuda_elementwise.cu", *(f"cuda_training{part}.cu" for part in parts))
    return build_kernels(programs / "training", emulation, *(f"coupling/{n}" for n in names))


@dataclass
class Case:
    """A pass and its gradient: what goes in, and the expected results in any dtype."""

    layers: Sequence[Layer]
    index: Sequence[int]
    x: Tensor
    cond: Tensor | None
    inverse: bool = False
    log_det: bool = True
    wanted: Sequence[bool] | None = None  # the condition, then the tensors; None: all

    def __post_init__(self) -> None:
        self.layers = as_dtype(self.layers, torch.float32)
        self.x = self.x.float()
        self.cond = None if self.cond is None else self.cond.float()
        generator = torch.Generator().manual_seed(3)
        self.grad_out = torch.randn(self.x.shape, generator=generator)
        self.grad_log_det = torch.randn(self.x.shape[:2], generator=generator)
        dim, cond_dim = self.x.shape[2], 0 if self.cond is None else self.cond.shape[1]
        steps = fold(self.layers, dim, cond_dim, torch.float32)
        plan, tensors = describe(steps, self.index, dim, cond_dim, 0, 1, log_det=False)
        self.plan, self.weights = plan, [t.float() for t in tensors]
        if self.wanted is None:
            self.wanted = [self.cond is not None, *[True] * len(tensors)]

    def expected(self, dtype: torch.dtype, reversible: bool = False) -> dict[str, Tensor]:
        """By autograd; reversible: each step from the input that its inverse gives."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.weights]
        cond = None if self.cond is None else self.cond.to(dtype).requires_grad_()
        steps, index = parse(self.plan, leaves)
        x = self.x.to(dtype)
        with torch.no_grad():
            out, log_det = run_folded(steps, index, x, cond, self.inverse)
        results = {"out": out, "log_det": log_det}
        parts = [(steps, index)]
        if reversible:
            slots = list(range(self.x.shape[2]))
            parts = [([step], slots) for step in steps]
            reorder = ([], index)
            parts = [reorder, *reversed(parts)] if self.inverse else [*parts, reorder]
        grads = [torch.zeros_like(t) for t in leaves]
        grad_cond = None if cond is None else torch.zeros_like(cond)
        grad = self.grad_out.to(dtype)
        for part in reversed(parts):
            with torch.no_grad():
                source = run_folded(*part, out, cond, not self.inverse)[0] if reversible else x
            source.requires_grad_()
            results_here = run_folded(*part, source, cond, self.inverse)
            value = (results_here[0] * grad).sum()
            if self.log_det:
                value = value + (results_here[1] * self.grad_log_det.to(dtype)).sum()
            inputs = [source, *leaves, *([] if cond is None else [cond])]
            grad, *found = torch.autograd.grad(
                value, inputs, allow_unused=True, materialize_grads=True
            )
            grads = [a + b for a, b in zip(grads, found, strict=False)]
            if cond is not None:
                grad_cond = grad_cond + found[-1]
            out = source.detach()
        results["grad_x"] = grad
        if self.wanted[0]:
            results["grad_cond"] = grad_cond
        for i, (found, want) in enumerate(zip(grads, self.wanted[1:], strict=True)):
            if want:
                results[f"grad_weights[{i}]"] = found
        return results

    def run(
        self,
        program: Path,
        files: Path,
        precision: str = "highest",
        keep_every: int = 0,
        store: bool = False,
        scratch: int = SCRATCH,
        thread_seed: int = 0,
    ) -> dict[str, Tensor]:
        batch, samples, _ = self.x.shape
        cond_dim = 0 if self.cond is None else self.cond.shape[1]
        numbers = [
            *(len(self.plan), len(self.weights), self.inverse, batch, samples, cond_dim),
            *(self.log_det, keep_every, store, PRECISIONS[precision], scratch, self.wanted[0]),
            *self.plan,
        ]
        for weight, want in zip(self.weights, self.wanted[1:], strict=True):
            numbers += [weight.numel(), want]
        tensors = [*self.weights, self.x, self.cond, self.grad_out]
        tensors.append(self.grad_log_det if self.log_det else None)
        with open(files / "in", "wb") as file:
            file.write(np.array(numbers, np.int64).tobytes())
            for tensor in tensors:
                if tensor is not None:
                    file.write(tensor.detach().contiguous().numpy().tobytes())
        done = execute(program, thread_seed, files / "in", files / "out")
        assert done.returncode == 0, done.stderr
        found = torch.from_numpy(np.fromfile(files / "out", np.float32))
        shapes = {"out": self.x.shape, "log_det": self.x.shape[:2], "grad_x": self.x.shape}
        if self.wanted[0]:
            shapes["grad_cond"] = self.cond.shape
        for i, (weight, want) in enumerate(zip(self.weights, self.wanted[1:], strict=True)):
            if want:
                shapes[f"grad_weights[{i}]"] = weight.shape
        parts = found.split([int(np.prod(shape)) for shape in shapes.values()])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }


def check(program: Path, files: Path, case: Case, times: float = 8.0, **options: object) -> None:
    """At "highest" about as good as PyTorch in float32."""
    exact = case.expected(torch.float64)
    reversible = not options.get("store") and not options.get("keep_every")
    peer = case.expected(torch.float32, reversible)
    got = case.run(program, files, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        if options.get("precision", "highest") == "highest":
            assert_as_good_as(value, peer[name], exact[name], name, times=times)
        else:
            allowed = TOLERANCE * max(1e-3, float(exact[name].abs().max()))
            assert max_error(value, exact[name]) <= allowed, name


def both(*arguments: object, **options: object) -> list[Case]:
    return [Case(*arguments, inverse=inverse, **options) for inverse in (False, True)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(training: Path, tmp_path: Path, activation: str) -> None:
    names = {"activation": activation, "negative_slope": 0.2}
    layers, index = random_layers(7, 5, depth=3, hidden=17, count=2, **names)
    for case in both(layers, index, *random_inputs(2, 3, 7, 5)):
        check(training, tmp_path, case)


@pytest.mark.parametrize("clamp_activation", CLAMP_ACTIVATIONS)
def test_clamps(training: Path, tmp_path: Path, clamp_activation: str) -> None:
    names = {"clamp": 1.7, "clamp_activation": clamp_activation}
    layers, index = random_layers(5, 3, hidden=9, count=2, **names)
    for case in both(layers, index, *random_inputs(2, 4, 5, 3)):
        check(training, tmp_path, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nets", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_kinds_and_nets(
    training: Path, tmp_path: Path, kind: str, nets: int, residual: bool
) -> None:
    make = Random(11, 6, seed=3)
    layers: list[Layer] = [
        make.coupling(kind, nets, residual=residual, activation="silu"),
        make.coupling(kind, nets, active=4, passive=5, residual=residual),
    ]
    for case in both(layers, make.order(), *random_inputs(2, 5, 11, 6)):
        check(training, tmp_path, case)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_residual_nets(training: Path, tmp_path: Path, norm: bool, gate: bool, store: bool) -> None:
    make = Random(7, 5, seed=5)
    net = {"gate": gate, "norm": norm, "hidden": 10, "activation": "gelu"}
    layers: list[Layer] = [
        make.coupling("additive", blocks=1, **net),
        make.coupling("affine", blocks=2, **net),
    ]
    for case in both(layers, make.order(), *random_inputs(3, 4, 7, 5)):
        check(training, tmp_path, case, store=store)


@pytest.mark.parametrize("store", [False, True])
def test_linear_steps(training: Path, tmp_path: Path, store: bool) -> None:
    make = Random(13, 6, seed=6)
    layers = [make.diagonal(), make.coupling(residual=False), make.linear(), make.diagonal()]
    layers += [make.coupling("gin", residual=False), make.diagonal()]
    for case in both(layers, make.order(), *random_inputs(2, 9, 13, 6)):
        check(training, tmp_path, case, store=store)
    for case in both([make.linear()], make.order(), *random_inputs(2, 9, 13, 0)):
        check(training, tmp_path, case, keep_every=1, precision="high", store=store)


@pytest.mark.parametrize(
    ("batch", "samples", "dim", "cond_dim", "hidden"),
    [
        (1, 1, 1, 1, 1),
        (2, 1, 2, 3, 1),
        (70, 1, 3, 17, 3),  # M = 1: rows are images
        (3, 65, 33, 1, 17),
        (1, 130, 17, 33, 33),
        (1, 17, 6, 0, 140),
        (2, 300, 2, 4, 50),  # sums over an image in several pieces
        (2, 5, 64, 8, 132),  # copies of 16 bytes
        (3, 100, 4, 3, 10),  # weights' gradients are split by images
    ],
)
def test_shapes(
    training: Path,
    tmp_path: Path,
    batch: int,
    samples: int,
    dim: int,
    cond_dim: int,
    hidden: int,
) -> None:
    layers, index = random_layers(dim, cond_dim, hidden=hidden, count=2)
    for case in both(layers, index, *random_inputs(batch, samples, dim, cond_dim)):
        check(training, tmp_path, case)


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("keep_every", [0, 1, 2])
def test_depths(training: Path, tmp_path: Path, depth: int, keep_every: int) -> None:
    layers, index = random_layers(9, 4, depth, hidden=17, count=4, bias=depth != 2)
    for case in both(layers, index, *random_inputs(2, 10, 9, 4)):
        check(training, tmp_path, case, keep_every=keep_every)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tf32(training: Path, tmp_path: Path, depth: int) -> None:
    """A smooth activation: a rounding may take an argument across the edge of relu."""
    layers, index = random_layers(9, 4, depth, hidden=17, count=3, activation="silu")
    for case in both(layers, index, *random_inputs(2, 10, 9, 4)):
        check(training, tmp_path, case, precision="high")


def test_store(training: Path, tmp_path: Path) -> None:
    layers, index = random_layers(9, 4, depth=3, hidden=17, count=3, activation="gelu_tanh")
    for case in both(layers, index, *random_inputs(2, 10, 9, 4)):
        check(training, tmp_path, case, store=True)


@pytest.mark.parametrize(("samples", "scratch"), [(1, 0), (31, 0), (75, 0), (100, 90_000)])
@pytest.mark.parametrize("store", [False, True])
def test_rounds_of_rows(
    training: Path, tmp_path: Path, samples: int, scratch: int, store: bool
) -> None:
    """Where the workspace is too small for all rows, they go in rounds: of 64, which begin and end
    within images, or of whole images."""
    make = Random(6, 3, seed=11)
    layers: list[Layer] = [make.linear(), make.coupling(gate=True, hidden=5), make.diagonal()]
    case = Case(layers, make.order(), *random_inputs(-(-150 // samples), samples, 6, 3))
    check(training, tmp_path, case, scratch=scratch // (1 + store), store=store, keep_every=2)


def test_wanted(training: Path, tmp_path: Path) -> None:
    """Each gradient is the same, whatever else is wanted."""
    make = Random(6, 3, seed=12)
    layers: list[Layer] = [make.coupling(gate=True, hidden=5, blocks=1), make.linear()]
    layers += [make.coupling(residual=False, hidden=5), make.diagonal()]
    arguments = layers, make.order(), *random_inputs(3, 4, 6, 3)
    everything = Case(*arguments)
    count, rng = len(everything.weights), np.random.RandomState(0)
    whole = everything.run(training, tmp_path)
    masks = [[False] * count, *(list(rng.rand(count) < 0.4) for _ in range(4))]
    for i, mask in enumerate(masks):
        case = Case(*arguments, wanted=[i % 2 == 1, *mask])
        for name, value in case.run(training, tmp_path).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)


def test_without_grad_of_log_det(training: Path, tmp_path: Path) -> None:
    layers, index = random_layers(5, 3, hidden=9, count=2)
    for case in both(layers, index, *random_inputs(2, 4, 5, 3), log_det=False):
        check(training, tmp_path, case)


def test_no_passive_slots(training: Path, tmp_path: Path) -> None:
    make = Random(6, 5, seed=7)
    layers: list[Layer] = [make.coupling(active=6, passive=0, residual=False)]
    layers.append(make.coupling(active=6, passive=0, hidden=9))
    for case in both(layers, make.order(), *random_inputs(3, 4, 6, 5)):
        check(training, tmp_path, case)


def test_order_of_threads(training: Path, tmp_path: Path) -> None:
    make = Random(9, 4, seed=8)
    layers: list[Layer] = [make.coupling(gate=True), make.linear(), make.coupling("gin", 2)]
    case = Case(layers, make.order(), *random_inputs(2, 70, 9, 4))
    first, *others = (case.run(training, tmp_path, thread_seed=seed) for seed in range(3))
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("batch", "samples"), [(0, 5), (3, 0)])
def test_empty(training: Path, tmp_path: Path, batch: int, samples: int) -> None:
    layers, index = random_layers(5, 3, hidden=9, count=1)
    case = Case(layers, index, *random_inputs(batch, samples, 5, 3))
    for name, value in case.run(training, tmp_path).items():
        assert not value.any(), name
