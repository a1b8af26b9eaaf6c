"""Flows of FrEIA 0.2 and git master against their stored float32 and float64 results."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fasthyp.flows as flows
from fasthyp.ops.coupling_training import CHECKPOINTS
from tests.conftest import Golden, assert_as_good_as, golden_files, max_error

FILES = [
    *golden_files("freia_glow_*.npz"),
    *golden_files("freia_head_*.npz"),
    *golden_files("freia_other_*.npz"),
]
BACKENDS = ("auto", "reference")


@pytest.fixture(params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTHYP_BACKEND", request.param)
    return request.param


def conditions(golden: Golden, suffix: str = "") -> list[Tensor]:
    return [golden[f"in/cond{i}{suffix}"] for i in range(len(golden.meta["cond_dims"]))]


def as_double(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def run_both_ways(net: flows.GraphINN, golden: Golden, cast: Callable) -> dict[str, Tensor]:
    x, z = cast([golden["in/x"], golden["in/z"]])
    out, log_jac = net(x, cast(conditions(golden)))
    inv, log_jac_inv = net(z, cast(conditions(golden, "_inv")), rev=True)
    return {"z": out, "logjac": log_jac, "x_inv": inv, "logjac_inv": log_jac_inv}


def assert_fused(net: flows.GraphINN, backend: str) -> None:
    """A program runs; on the kernels, unless the reference was asked for."""
    (row,) = flows.explain(net).rows
    assert row["accelerated"] is (backend == "auto"), row
    assert "own forward" not in row["reason"], row


def test_values(golden: Golden, backend: str) -> None:
    net = flows.accelerate(golden.freia())
    assert_fused(net, backend)
    times = 4.0 if "rnvp_tanh" in golden.path.stem else 2.0  # a flow that amplifies roundings
    with torch.no_grad():
        for name, value in run_both_ways(net, golden, list).items():
            assert_as_good_as(value, golden[f"out/{name}"], golden[f"out64/{name}"], name, times)


def test_values_in_float64(golden: Golden, backend: str) -> None:
    net = flows.accelerate(golden.freia().double())
    assert_fused(net, backend)
    # the stress file amplifies float64 roundings too (its README: 2e-11)
    tolerance = 1e-9 if "stress" in golden.path.stem else 1e-12
    with torch.no_grad():
        for name, value in run_both_ways(net, golden, as_double).items():
            exact = golden[f"out64/{name}"]
            assert value.dtype == torch.float64
            assert max_error(value, exact) <= tolerance * max(1.0, float(exact.abs().max())), name


def objectives(net: flows.GraphINN, golden: Golden, cast: Callable) -> dict[str, Tensor]:
    """Gradients of both directions' objectives, keyed as in the file."""
    gradients = {}
    for direction, value, cotangents in (("grad", "x", ()), ("ginv", "z", ("W", "v"))):
        inputs = cast([golden[f"in/{value}"]])
        conds = cast(conditions(golden, "_inv" if direction == "ginv" else ""))
        leaves = [tensor.requires_grad_() for tensor in (*inputs, *conds)]
        out, log_jac = net(leaves[0], leaves[1:], rev=direction == "ginv")
        if direction == "grad":
            objective = 0.5 * out.square().sum() - log_jac.sum()
        else:
            w, v = cast([golden[f"in/{name}"] for name in cotangents])
            objective = (w * out).sum() + (v * log_jac).sum()
        parameters = {k: p for k, p in net.named_parameters() if p.requires_grad}
        wanted = [*leaves, *parameters.values()]
        # FrEIA's GIN blocks do not read all of their parameters
        found = torch.autograd.grad(objective, wanted, allow_unused=True)
        names = [value, *(f"cond{i}" for i in range(len(conds))), *(f"sd/{k}" for k in parameters)]
        gradients.update(
            {f"{direction}/{k}": g for k, g in zip(names, found, strict=True) if g is not None}
        )
    return gradients


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_gradients(golden: Golden, checkpoint: str) -> None:
    net = flows.accelerate(golden.freia(), checkpoint=checkpoint)
    for name, value in objectives(net, golden, lambda ts: [t.clone() for t in ts]).items():
        if "/sd/" not in name:
            exact = golden[name.replace("/", "64/", 1)]
            # A few rows, of flows that amplify roundings: see the next test for what is typical.
            assert_as_good_as(value, golden[name], exact, name, times=5.0)


@pytest.mark.parametrize("rev", [False, True])
def test_gradients_of_many_rows(golden: Golden, rev: bool) -> None:
    """Typical and large errors of rows, in float32 against float64, are no larger than FrEIA's."""
    net = golden.freia()
    torch.manual_seed(0)
    rows, dim = 400, golden["in/z"].shape[1]
    widths = [cond.shape[1] for cond in conditions(golden)]
    x, w = torch.randn(rows, dim), torch.randn(rows, dim)
    conds = [torch.randn(rows, width) for width in widths]

    def errors(model: nn.Module) -> Tensor:
        return (gradient(model, torch.float32).double() - exact).norm(dim=1) / exact.norm(dim=1)

    def gradient(model: nn.Module, dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        out, log_jac = model(leaf, [cond.to(dtype) for cond in conds], rev=rev)
        (found,) = torch.autograd.grad((w.to(dtype) * out).sum() + log_jac.sum(), leaf)
        return found

    exact = gradient(copy.deepcopy(net).double(), torch.float64)
    ours, peer = errors(flows.accelerate(net)), errors(net)
    assert float(ours.median()) <= 1.3 * float(peer.median())
    assert float(ours.quantile(0.9)) <= 1.5 * float(peer.quantile(0.9))


def test_gradients_in_float64(golden: Golden) -> None:
    net = flows.accelerate(golden.freia().double())
    stress = "stress" in golden.path.stem
    deviations = golden.meta["tol_float32_vs_float64"]
    found = objectives(net, golden, as_double)
    for name, value in found.items():
        if "/sd/" not in name:
            exact, tolerance = golden[name.replace("/", "64/", 1)], 1e-7 if stress else 1e-11
            assert max_error(value, exact) <= tolerance * float(exact.abs().max()), name
        elif name in golden.names:
            # Stored in float32 only, with its own largest relative deviation from float64.
            peer = float(deviations[f"{name.split('/')[0]}/sd/<all params>"][1])
            exact = golden[name]
            assert max_error(value, exact) <= 1.01 * peer * float(exact.abs().max()), name
    assert set(found) >= {n for n in golden.names if n.startswith(("grad/", "ginv/"))}
