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
# Relative to the largest element of each result.
TOLERANCES = {"high": 1e-2}
PRECISIONS = {"highest": 0, "high": 1}


@pytest.fixture(scope="session")
def training(programs: Path, emulation: Path) -> Path:
    names = ("cuda_training.cu", "cuda_gemm.cu", "cuda_elementwise.cu")
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

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.x, *self.weights)]
        cond = None if self.cond is None else self.cond.to(dtype).requires_grad_()
        steps, index = parse(self.plan, leaves[1:])
        out, log_det = run_folded(steps, index, leaves[0], cond, self.inverse)
        value = (out * self.grad_out.to(dtype)).sum()
        if self.log_det:
            value = value + (log_det * self.grad_log_det.to(dtype)).sum()
        inputs = leaves if cond is None else [*leaves, cond]
        grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        results = {"out": out.detach(), "log_det": log_det.detach(), "grad_x": grads[0]}
        if self.wanted[0]:
            results["grad_cond"] = grads[-1]
        for i, (grad, want) in enumerate(zip(grads[1:], self.wanted[1:], strict=False)):
            if want:
                results[f"grad_weights[{i}]"] = grad
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
        batch, samples, dim = self.x.shape
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
    exact = case.expected(torch.float64)
    peer = case.expected(torch.float32)
    got = case.run(program, files, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        if options.get("precision", "highest") == "highest":
            assert_as_good_as(value, peer[name], exact[name], name, times=times)
        else:
            allowed = TOLERANCES["high"] * max(1e-3, float(exact[name].abs().max()))
            assert max_error(value, exact[name]) <= allowed, name


def both(*arguments: object, **options: object) -> list[Case]:
    return [Case(*arguments, inverse=inverse, **options) for inverse in (False, True)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(training: Path, tmp_path: Path, activation: str) -> None:
    names = {"activation": activation, "negative_slope": 0.2}
    layers, index = random_layers(7, 5, depth=3, hidden=17, count=2, **names)
    for case in both(layers, index, *random_inputs(2, 3, 7, 5)):
        check(training, tmp_path, case)
