"""DistributedDataParallel around a model with an accelerated flow: two processes on gloo have the
gradients of one process with the whole batch."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fasthyp.flows as flows
from tests.conftest import random_flow

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "accumulated": {},
    "static": {"static_graph": True},
}


class Model(nn.Module):
    """A flow with layers before it, and a head that only some of the modes use."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(3, 4)
        self.flow = random_flow(6, (4,), blocks=2, hidden=8)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, pixels: Tensor, head: bool) -> Tensor:
        features = self.image(pixels)
        z, log_jac = self.flow(x, features)
        sampled, _ = self.flow(z.detach(), features, rev=True)
        loss = 0.5 * z.square().sum(1) - log_jac + sampled.square().sum(1)
        return (loss + self.head(features)[:, 0] if head else loss).mean()


def make(fused: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Model().double().train()
    return flows.accelerate(model) if fused else model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(8, d, generator=generator, dtype=torch.float64) for d in (6, 3))
        for _ in range(2)
    ]


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters() if p.requires_grad]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {}
    assert flows.explain(make(fused=True)).rows[0]["accelerated"]
    for mode, settings in MODES.items():
        model = DistributedDataParallel(make(fused=True), **settings)
        parts = [tuple(t[4 * rank : 4 * rank + 4] for t in batch) for batch in batches()]
        head = mode != "unused"
        if mode == "accumulated":
            with model.no_sync():
                model(*parts[0], head).backward()
            model(*parts[1], head).backward()
        else:
            for part in parts:  # more than one iteration: a static graph is found in the first
                model.zero_grad()
                model(*part, head).backward()
        found[mode] = gradients(model)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = mp.spawn(work, (str(tmp_path),), nprocs=2, join=False)
    try:
        for _ in range(24):  # until both are done, two minutes at most
            if context.join(5):
                break
        else:
            pytest.fail("the processes did not end")
    finally:
        for process in context.processes:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for mode in MODES:
        model, (first, second) = make(fused=False), batches()
        if mode == "accumulated":
            model(*first, True).backward()
        model(*second, mode != "unused").backward()
        for found in results:
            for ours, alone in zip(found[mode], gradients(model), strict=True):
                if alone is None:
                    assert ours is None or not ours.any(), mode
                else:
                    torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-9)
                    assert ours.any(), mode
