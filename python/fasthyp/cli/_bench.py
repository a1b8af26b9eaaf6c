"""``fasthyp bench``: the kernels on this machine against what one would run otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import increment_version

import fasthyp
from fasthyp import _C, _peers, _timing
from fasthyp._files import replacing
from fasthyp.body import SkinningModel
from fasthyp.metrics import pa_mpjpe
from fasthyp.reference import skinning as skinning_reference


class Workload(NamedTuple):
    """One comparison: the peer's call, None where it is not installed, and ours."""

    name: str
    peer: str
    theirs: Callable[[], Any] | None
    ours: Callable[[], Any]
    flop: float | None = None  # of ours, where matrix products are the limit


def coupling(device: str, quick: bool) -> Iterator[Workload]:
    dim, cond_dim, hidden, count = 48, 56, (1024,), 1000
    net = _peers.freia_flow(dim, cond_dim, hidden).requires_grad_(False).to(device)
    sampler = fasthyp.HypothesisSampler(net, precision="highest")
    z, cond = torch.randn(1, count, dim, device=device), torch.randn(1, cond_dim, device=device)
    repeated = cond.repeat(count, 1)
    yield Workload(
        f"{dim}-d flow, 1 image x {count} hypotheses",
        "FrEIA",
        lambda: net(z[0], c=[repeated], rev=True),
        lambda: sampler(cond, z=z),
        _peers.hoisted_flop(dim, hidden, count),
    )


def coupling_training(device: str, quick: bool) -> Iterator[Workload]:
    dim, cond_dim, hidden = 48, 56, (1024,)
    images, count = (16 if quick else 64), 50
    net = _peers.freia_flow(dim, cond_dim, hidden).train().to(device)
    fast = fasthyp.accelerate(net)
    z = torch.randn(images * count, dim, device=device)
    cond = torch.randn(images, cond_dim, device=device, requires_grad=True)

    def step(model: Any) -> Tensor | None:
        for parameter in net.parameters():  # as after a step of an optimizer
            increment_version(parameter)
            parameter.grad = None
        cond.grad = None
        loss = model(z, c=[cond.repeat_interleave(count, 0)], rev=True)[0].abs().mean()
        loss.backward()
        return cond.grad

    yield Workload(
        f"{dim}-d flow, inverse + backward, {images} x {count} rows",
        "FrEIA",
        partial(step, net),
        partial(step, fast),
        4 * _peers.hoisted_flop(dim, hidden, images * count),
    )


def _bundled_heatmaps() -> Tensor:
    """(17, 64, 64)"""
    with np.load(str(resources.files("fasthyp.data") / "astronaut_heatmaps.npz")) as data:
        return torch.from_numpy(data["heatmaps"]).reshape(-1, 64, 64)[:17].contiguous()


def gaussian_fit(device: str, quick: bool) -> Iterator[Workload]:
    maps = _bundled_heatmaps()[:16]
    given, array = maps.to(device), maps.double().numpy()
    yield Workload(
        "16 heatmaps of 64 x 64",
        "SciPy",
        (lambda: _peers.scipy_fit(array)) if find_spec("scipy") else None,
        lambda: fasthyp.fit_gaussians(given),
    )


def heatmaps(device: str, quick: bool) -> Iterator[Workload]:
    images, count = (8 if quick else 64), 25
    maps = _bundled_heatmaps().repeat(images, 1, 1, 1).to(device)
    yield Workload(
        f"{count} samples of {images} x 17 heatmaps",
        "torch.multinomial",
        lambda: _peers.multinomial(maps, count, 1.0),
        lambda: fasthyp.sample_heatmaps(maps, count, seed=0),
    )


def mmd(device: str, quick: bool) -> Iterator[Workload]:
    bandwidths = (0.05, 0.2, 0.9)
    for shape in ((1088, 25, 2), (1, 500 if quick else 2000, 48)):
        x, y = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))

        def step(function: Callable[..., Tensor], x: Tensor = x, y: Tensor = y) -> Tensor | None:
            x.grad = y.grad = None
            function(x, y, bandwidths=bandwidths).sum().backward()
            return x.grad

        yield Workload(
            f"{' x '.join(map(str, shape))}, forward + backward",
            "the formula",
            partial(step, _peers.gram_mmd),
            partial(step, fasthyp.mmd2),
        )


def skinning(device: str, quick: bool) -> Iterator[Workload]:
    count = 100 if quick else 1000
    arrays, regressor = _peers.body_arrays()
    arrays, regressor = tuple(a.to(device) for a in arrays), regressor.to(device)
    model = SkinningModel(*arrays)
    betas = torch.randn(count, 10, device=device)
    pose = 0.4 * torch.randn(count, 72, device=device)
    skin: Callable[[], Any]
    if find_spec("smplx"):
        from smplx.lbs import lbs

        peer, skin = "smplx", partial(lbs, betas, pose, *arrays)
    else:
        peer = "plain PyTorch"
        template, shapes, blends, joints, parents, weights = arrays
        tensors = (betas, pose.view(count, -1, 3), None, template, shapes, blends, joints)
        skin = partial(skinning_reference.lbs, *tensors, parents.tolist(), weights, "axis_angle")
    yield Workload(
        f"vertices of {count} bodies", peer, lambda: skin()[0], lambda: model.vertices(betas, pose)
    )
    yield Workload(
        f"17 joints of {count} bodies",
        peer,
        lambda: torch.einsum("bvc,kv->bkc", skin()[0], regressor),
        lambda: model.joints(betas, pose, regressor=regressor),
    )


def procrustes(device: str, quick: bool) -> Iterator[Workload]:
    hypotheses, poses = (20 if quick else 200), 512
    truth = 300 * torch.randn(poses, 17, 3, device=device)
    pred = truth + 50 * torch.randn(hypotheses, poses, 17, 3, device=device)
    yield Workload(
        f"PA-MPJPE of {hypotheses} x {poses} poses",
        "torch.linalg.svd",
        lambda: _peers.svd_pa_mpjpe(pred, truth),
        lambda: pa_mpjpe(pred, truth),
    )


FAMILIES: dict[str, Callable[[str, bool], Iterator[Workload]]] = {
    "coupling": coupling,
    "coupling_training": coupling_training,
    "gaussian_fit": gaussian_fit,
    "heatmaps": heatmaps,
    "mmd": mmd,
    "skinning": skinning,
    "procrustes": procrustes,
}
_WITH_GRADIENTS = ("coupling_training", "mmd")


def measure(family: str, device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each workload of a family."""
    torch.manual_seed(0)
    size = 4096 if device == "cuda" else 1024 if quick else 2048
    a, b = torch.randn(2, size, size, device=device)
    with nullcontext() if family in _WITH_GRADIENTS else torch.no_grad():
        for workload in FAMILIES[family](device, quick):
            runs = {"fasthyp": workload.ours}
            if workload.theirs is not None:
                runs["peer"] = workload.theirs
            if workload.flop is not None:
                runs["gemm"] = partial(torch.matmul, a, b)
            times = _timing.interleaved(
                {name: _timing.waiting(run, device) for name, run in runs.items()},
                seconds=0.5 if quick else 4.0,
                warmup=1 if quick else 3,
                rounds=3 if quick else 5,
            )
            ms = {name: found["ms"] for name, found in times.items()}
            row: dict[str, Any] = {
                "family": family,
                "workload": workload.name,
                "device": device,
                "peer": workload.peer,
                "peer_ms": ms.get("peer"),
                "fasthyp_ms": ms["fasthyp"],
                "ratio": ms["peer"] / ms["fasthyp"] if "peer" in ms else None,
            }
            if workload.flop is not None:
                row["of_gemm"] = workload.flop / ms["fasthyp"] * ms["gemm"] / (2 * size**3)
            yield row


def run(family: str | None, *, quick: bool, json_path: Path | None) -> None:
    """Measure, print a table and write the rows where asked.

    Raises:
        ValueError: there is no such family.
        OSError: the file cannot be written.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    with nullcontext() if json_path is None else replacing(json_path) as temporary:
        devices = ["cpu"] + ["cuda"] * (torch.cuda.is_available() and _C.cuda_archs is not None)
        rows: list[dict[str, Any]] = []
        for device in devices:
            for name in FAMILIES if family is None else (family,):
                rows += measure(name, device, quick)
        machine = _timing.machine()
        if temporary is not None:
            temporary.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    _print(machine, rows)


def _print(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    place = machine.get("gpu"), machine["processor"], threads
    table = Table(
        title=", ".join([*filter(None, place), machine["simd"], f"torch {machine['torch']}"]),
        caption="Medians of runs in turn. of GEMM: of the rate of a large float32 product.",
    )
    for column in ("workload", "device", "peer"):
        table.add_column(column)
    for column in ("peer, ms", "fasthyp, ms", "ratio", "of GEMM"):
        table.add_column(column, justify="right")
    for row in rows:
        peer = row["peer"] if row["peer_ms"] else f"({row['peer']}: not installed)"
        numbers = (row[key] for key in ("peer_ms", "fasthyp_ms"))
        table.add_row(
            *(f"{row['family']}: {row['workload']}", row["device"], peer),
            *("" if n is None else f"{n:.3g}" for n in numbers),
            f"{row['ratio']:.1f}x" if row["ratio"] else "",
            f"{row['of_gemm']:.2f}" if "of_gemm" in row else "",
        )
    Console(width=130 if not Console().is_terminal else None).print(table)
