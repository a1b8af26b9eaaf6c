"""Flows of the official implementations, run by the CUDA kernels on the host, against their stored
results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasthyp.flows import describe
from tests.conftest import Golden, assert_as_good_as, golden_files
from tests.simt.test_coupling import Emulated

FREIA = [f for kind in ("glow", "head", "other") for f in golden_files(f"freia_{kind}_*.npz")]
NFLOWS = [f for f in golden_files("prohmr_glow_*.npz") if "train" not in f.id]
POCO = golden_files("poco_realnvp_*.npz")


class Flow:
    """A module's flow on the emulated kernels; rows (N, D), each with its condition (N, C)."""

    def __init__(self, module: nn.Module, coupling: Path, files: Path) -> None:
        described = describe(module)
        layers, index = described.layers()
        self.inverted = described.inverted
        shape = described.dim, described.cond_dim
        self.kernels = Emulated(coupling, files, layers, index, *shape, "highest")

    def __call__(self, x: Tensor, cond: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        x, cond = x.contiguous(), None if cond is None else cond.contiguous()
        out, log_jac = self.kernels.run(inverse != self.inverted, len(x), 1, x, cond)
        return out[:, 0], log_jac[:, 0]


@pytest.mark.parametrize("path", FREIA)
def test_freia(coupling: Path, tmp_path: Path, path: Any) -> None:
    golden = Golden(path)
    flow = Flow(golden.freia(), coupling, tmp_path)
    for inverse, names in ((False, ("x", "", "z", "logjac")), (True, ("z", "_inv", "x_inv", ""))):
        conditions = [golden[f"in/cond{i}{names[1]}"] for i in range(len(golden.meta["cond_dims"]))]
        cond = torch.cat(conditions, 1) if conditions else None
        found = flow(golden[f"in/{names[0]}"], cond, inverse)
        for value, name in zip(found, (names[2], names[3] or "logjac_inv"), strict=True):
            assert_as_good_as(
                value, golden[f"out/{name}"], golden[f"out64/{name}"], name, times=6.0
            )


@pytest.mark.parametrize("path", NFLOWS)
def test_conditional_glow(coupling: Path, tmp_path: Path, path: Any) -> None:
    golden = Golden(path)
    module = golden.conditional_glow()
    flow = Flow(module, coupling, tmp_path)
    context = golden["in/context"] if "in/context" in golden.names else None
    z, log_jac = flow(golden["in/x"], context, inverse=False)
    assert_as_good_as(z, golden["out/z"], golden["out64/z"], "z", times=6.0)
    normal = torch.distributions.Normal(0.0, 1.0)
    log_prob = normal.log_prob(z.double()).sum(-1) + log_jac
    exact = golden["out64/log_prob"]
    torch.testing.assert_close(log_prob, exact, rtol=1e-5, atol=1e-4)
    if context is None:
        return  # no stored samples
    noise = golden["in/noise"]
    repeated = context.repeat_interleave(noise.shape[1], 0)
    samples, _ = flow(noise.flatten(0, 1), repeated, inverse=True)
    peer, exact = (golden[name].flatten(0, 1) for name in ("out/samples", "out64/samples"))
    assert_as_good_as(samples, peer, exact, "samples", times=6.0)


@pytest.mark.parametrize("path", POCO)
def test_realnvp(coupling: Path, tmp_path: Path, path: Any) -> None:
    golden = Golden(path)
    flow = Flow(golden.realnvp(), coupling, tmp_path)
    context = golden["in/context"] if golden.meta["context"] else None
    z, log_jac = flow(golden["in/x"], context, inverse=False)
    x, _ = flow(golden["in/z"], context, inverse=True)
    for value, name in ((z, "z"), (log_jac, "log_det_J"), (x, "x_fwd")):
        assert_as_good_as(value, golden[f"out/{name}"], golden[f"out64/{name}"], name, times=6.0)
