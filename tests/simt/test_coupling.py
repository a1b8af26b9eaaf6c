"""The CUDA kernels of coupling flows on the host, against the reference in float64: every form of
step, awkward shapes, every precision; the order of the threads must not show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fasthyp.ops import _coupling_cuda
from fasthyp.ops._coupling_steps import fold
from fasthyp.reference import coupling as reference
from fasthyp.reference.coupling import ACTIVATIONS, CLAMP_ACTIVATIONS, KINDS, Layer
from tests.conftest import assert_as_good_as, max_error
from tests.ops.test_coupling import Random, as_dtype, random_inputs, random_layers
from tests.simt.tools import execute

# Relative to the largest result, after four couplings that amplify.
TOLERANCES = {"high": 3e-3, "medium": 4e-2}


class Emulated:
    """A flow packed for CUDA, run on the host."""

    def __init__(
        self,
        coupling: Path,
        files: Path,
        layers: Sequence[Layer],
        index: Sequence[int],
        dim: int,
        cond_dim: int,
        precision: str,
    ) -> None:
        self.program, self.files = coupling, files
        self.dim, self.cond_dim = dim, cond_dim
        steps = fold(layers, dim, cond_dim, torch.float32)
        self.plan, self.packed = _coupling_cuda.pack(
            steps, index, dim, cond_dim, precision, torch.device("cpu")
        )

    def run(
        self,
        inverse: bool,
        batch: int,
        samples: int,
        x: Tensor | None,
        cond: Tensor | None,
        thread_seed: int = 0,
        seed: int = 0,
        image_offset: int = 0,
        first_sample: int = 0,
        fixed: Tensor | None = None,
        include_mode: bool = False,
        counter: bool = False,
    ) -> tuple[Tensor, Tensor]:
        fixed_dims = 0 if fixed is None else fixed.shape[1]
        numbers = [
            *(len(self.plan), self.packed.numel(), inverse, batch, samples),
            *(x is not None, cond is not None, seed, image_offset, first_sample),
            *(fixed_dims, include_mode, counter),
        ]
        if cond is not None:
            cond = torch.nn.functional.pad(cond, (0, -cond.shape[1] % 4))
        with open(self.files / "in", "wb") as file:
            file.write(np.array(numbers, np.int64).tobytes())
            for tensor in (self.plan, self.packed, x, cond, fixed):
                file.write(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        done = execute(self.program, thread_seed, self.files / "in", self.files / "out")
        assert done.returncode == 0, done.stderr
        out = torch.from_numpy(np.fromfile(self.files / "out", np.float32))
        rows = batch * samples
        assert len(out) == rows * (self.dim + 1)
        z, log_det = out[: rows * self.dim], out[rows * self.dim :]
        return z.reshape(batch, samples, self.dim), log_det.reshape(batch, samples)


def check(
    coupling: Path,
    files: Path,
    layers: Sequence[Layer],
    index: Sequence[int],
    x: Tensor,
    cond: Tensor | None,
    precisions: Sequence[str] = ("highest", "high", "medium"),
) -> None:
    """Both directions against float64; at "highest" about as good as PyTorch in float32."""
    layers = as_dtype(layers, torch.float32)
    x, cond = x.float(), None if cond is None else cond.float()
    shape = x.shape[-1], 0 if cond is None else cond.shape[1]
    wide = as_dtype(layers, torch.float64), index, x.double()
    for precision in precisions:
        flow = Emulated(coupling, files, layers, index, *shape, precision)
        for inverse in (False, True):
            run = reference.flow_inverse if inverse else reference.flow_forward
            exact = run(*wide, None if cond is None else cond.double())
            peer = run(layers, index, x, cond)
            got, again = (
                flow.run(inverse, *x.shape[:2], x, cond, thread_seed) for thread_seed in (0, 1)
            )
            for a, b, near, want in zip(got, again, peer, exact, strict=True):
                assert torch.equal(a, b)
                if precision == "highest":
                    assert_as_good_as(a, near, want, f"inverse {inverse}", times=6.0)
                else:
                    allowed = TOLERANCES[precision] * max(1.0, float(want.abs().max()))
                    assert max_error(a, want) <= allowed, (precision, inverse)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("clamp_activation", CLAMP_ACTIVATIONS)
def test_activations_and_clamps(
    coupling: Path, tmp_path: Path, activation: str, clamp_activation: str
) -> None:
    names = {"activation": activation, "clamp_activation": clamp_activation}
    layers, index = random_layers(7, 5, count=2, negative_slope=0.2, clamp=1.7, **names)
    check(coupling, tmp_path, layers, index, *random_inputs(2, 3, 7, 5), ("highest",))


@pytest.mark.parametrize(
    ("batch", "samples", "dim", "cond_dim"),
    [
        (1, 1, 2, 1),
        (1, 15, 48, 56),  # a tile less one, a tile, one more
        (1, 16, 13, 0),
        (1, 17, 39, 17),
        (3, 7, 39, 17),  # tiles with rows of several images
        (20, 1, 12, 3),
        (2, 65, 9, 4),  # wide tiles
        (1, 161, 5, 0),
        (5, 4, 1, 4),
    ],
)
def test_shapes(
    coupling: Path, tmp_path: Path, batch: int, samples: int, dim: int, cond_dim: int
) -> None:
    layers, index = random_layers(dim, cond_dim, count=2)
    check(coupling, tmp_path, layers, index, *random_inputs(batch, samples, dim, cond_dim))


@pytest.mark.parametrize("samples", [1, 20])
def test_clusters(coupling: Path, tmp_path: Path, samples: int) -> None:
    """Four blocks to a tile, or two; hidden units enough for all their warps."""
    layers, index = random_layers(10, 6, hidden=530, count=3)
    check(coupling, tmp_path, layers, index, *random_inputs(1, samples, 10, 6))
    layers, index = random_layers(60, 6, hidden=300, count=2)  # several groups of outputs
    check(coupling, tmp_path, layers, index, *random_inputs(1, samples, 60, 6), ("high",))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [9, 62])
def test_depths(coupling: Path, tmp_path: Path, depth: int, dim: int) -> None:
    """Dim 62: more outputs than a warp holds at a time."""
    layers, index = random_layers(dim, 4, depth, hidden=40, count=2, bias=depth != 3)
    check(coupling, tmp_path, layers, index, *random_inputs(2, 10, dim, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nets", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_kinds_and_nets(
    coupling: Path, tmp_path: Path, kind: str, nets: int, residual: bool
) -> None:
    make = Random(11, 6, seed=3)
    layers: list[Layer] = [
        make.coupling(kind, nets, residual=residual, activation="silu"),
        make.coupling(kind, nets, active=4, passive=5, residual=residual),
    ]
    check(coupling, tmp_path, layers, make.order(), *random_inputs(2, 9, 11, 6))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_residual_nets(coupling: Path, tmp_path: Path, norm: bool, gate: bool, blocks: int) -> None:
    make = Random(10, 7, seed=5)
    layers: list[Layer] = [
        make.coupling("additive", gate=gate, norm=norm, blocks=blocks, hidden=33),
        make.coupling("affine", gate=gate, norm=norm, blocks=blocks),
    ]
    check(coupling, tmp_path, layers, make.order(), *random_inputs(3, 7, 10, 7))


def test_linear_steps(coupling: Path, tmp_path: Path) -> None:
    make = Random(37, 6, seed=6)
    layers = [make.diagonal(), make.coupling(residual=False), make.linear(), make.diagonal()]
    layers += [make.coupling("gin", residual=False), make.diagonal()]
    check(coupling, tmp_path, layers, make.order(), *random_inputs(2, 19, 37, 6))
    check(coupling, tmp_path, [make.linear()], make.order(), *random_inputs(2, 19, 37, 0))


def test_everything_from_the_condition(coupling: Path, tmp_path: Path) -> None:
    make = Random(9, 5, seed=7)
    layers: list[Layer] = [make.coupling(active=9, passive=0, residual=False)]
    layers.append(make.coupling(active=9, passive=0))
    check(coupling, tmp_path, layers, make.order(), *random_inputs(3, 4, 9, 5))


@pytest.mark.parametrize("shared", [64, 99])
def test_little_shared_memory(
    coupling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: int
) -> None:
    """Fewer warps and stages, and no clusters."""
    monkeypatch.setenv("SIMT_SHARED", str(shared * 1024))
    monkeypatch.setenv("SIMT_MAJOR", "8")
    layers, index = random_layers(48, 20, hidden=70, count=2)
    check(coupling, tmp_path, layers, index, *random_inputs(2, 21, 48, 20))
    make = Random(48, 20, seed=8)
    layers = [make.coupling("additive", gate=True), make.linear(), make.coupling(nets=2)]
    check(coupling, tmp_path, layers, make.order(), *random_inputs(2, 21, 48, 20))


def test_a_flow_that_does_not_fit(coupling: Path, tmp_path: Path) -> None:
    make = Random(2000, 3, seed=9, dtype=torch.float32)
    layers = [make.coupling(residual=False)]
    flow = Emulated(coupling, tmp_path, layers, make.order(), 2000, 3, "high")
    x, cond = random_inputs(1, 1, 2000, 3, torch.float32)
    with pytest.raises(AssertionError, match="2000 dims"):
        flow.run(False, 1, 1, x, cond)


def test_rounds_of_rows(coupling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the scratch memory is too small for all rows, they go in several rounds."""
    layers, index = random_layers(6, 3, depth=3, count=2)
    x, cond = random_inputs(7, 31, 6, 3)
    check(coupling, tmp_path, layers, index, x, cond, ("highest",))
    monkeypatch.setattr(_coupling_cuda, "_SCRATCH_BYTES", 0)
    check(coupling, tmp_path, layers, index, x, cond, ("highest",))


@pytest.mark.parametrize("fixed_dim", [0, 3, 13])
@pytest.mark.parametrize("residual", [False, True])
def test_samples(coupling: Path, tmp_path: Path, fixed_dim: int, residual: bool) -> None:
    """The same noise as on the CPU, whether the flow is one launch or several."""
    make = Random(13, 5, seed=10, dtype=torch.float32)
    layers = [make.coupling(residual=residual), make.linear(), make.coupling(residual=residual)]
    index = make.order()
    _, cond = random_inputs(3, 1, 13, 5, torch.float32)
    fixed = make.normal(3, fixed_dim) if fixed_dim else None
    flow = Emulated(coupling, tmp_path, layers, index, 13, 5, "highest")
    options = {"seed": 7, "image_offset": 2**31 + 5, "fixed": fixed, "include_mode": True}
    x, log_prob = flow.run(True, 3, 11, None, cond, **options)
    noise = reference.philox_normal(3, 11, 13 - fixed_dim, 7, 2**31 + 5, True)
    z = noise if fixed is None else torch.cat([noise, fixed[:, None].expand(-1, 11, -1)], -1)
    again = flow.run(True, 3, 11, None, cond, **options, counter=True)
    assert torch.equal(x, again[0])
    assert torch.equal(log_prob, again[1])
    want, log_jac = reference.flow_inverse(layers, index, z, cond)
    torch.testing.assert_close(x, want, rtol=2e-5, atol=2e-5)
    want_log_prob = reference.standard_normal_log_prob(noise) - log_jac
    torch.testing.assert_close(log_prob, want_log_prob, rtol=1e-5, atol=2e-5)
    for counter in (False, True):  # hypotheses 0 to 4, then 5 to 10
        parts = [
            flow.run(True, 3, count, None, cond, **options, first_sample=first, counter=counter)
            for first, count in ((0, 5), (5, 6))
        ]
        assert torch.equal(torch.cat([part for part, _ in parts], 1), x)
        assert torch.equal(torch.cat([part for _, part in parts], 1), log_prob)
