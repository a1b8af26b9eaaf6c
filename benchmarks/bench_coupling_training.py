"""Training steps of coupling flows: fasthyp against FrEIA and the nflows fork's architecture, eager
and compiled, in one process.

    python benchmarks/bench_coupling_training.py [--json FILE] [--seconds S] [--no-compile]

Each row is one workload: a pass and its backward pass, with gradients by input, condition and all
weights. Gradients start from None and weights count as changed, so that they are packed anew: a
step of a training loop without the optimizer. "accelerated" is the FrEIA module itself after
``fasthyp.accelerate``, called as FrEIA is, with one condition row per hypothesis; "reversible" and
"store" are its executor in the two checkpoint modes, called with one condition per image. ``rate``
is the share of the rate of one large torch matrix product, counting the work that is left once the
condition's part of each first layer is computed once per image: four passes for reversible, three
for store. ``extra_mb`` is the peak of the process's memory during a step, less what it held before.

Two more tables: memory against depth, and how far the reversible backward pass moves gradients and
reconstructed inputs where depth and scales grow.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _timing import gemm_rate, interleaved, report, save
from bench_coupling import Glow
from torch import Tensor, nn
from torch.autograd.graph import increment_version

import fasthyp
from fasthyp._peers import BLOCKS, freia_flow, hoisted_flop
from fasthyp.ops import coupling_training as training
from fasthyp.ops.coupling_training import TrainableFlow


def next_step(net: nn.Module) -> None:
    """What an optimizer's step and ``zero_grad`` leave behind."""
    for parameter in net.parameters():
        increment_version(parameter)
        parameter.grad = None


def extra_mb(step: Callable[[], Any]) -> float:
    """Peak resident memory during a call, less what was resident before; Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def timed(
    name: str,
    contenders: dict[str, Callable[[], Any]],
    flop: float,
    rate: float,
    seconds: float,
) -> list[dict[str, Any]]:
    times = interleaved(contenders, seconds, warmup=1)
    memory = {run: extra_mb(step) for run, step in contenders.items()}
    rows = []
    for run in contenders:
        ms = times[run]["ms"]
        row: dict[str, Any] = {"workload": name, "run": run, "ms": ms, "extra_mb": memory[run]}
        for peer in ("eager", "compiled"):
            if peer in times and run not in ("eager", "compiled"):
                row[f"vs_{peer}"] = times[peer]["ms"] / ms
        if run not in ("eager", "compiled"):
            passes = 3 if run == "store" else 4
            row["rate"] = passes * flop / ms / 1e6 / rate
        rows.append(row)
    return rows


def freia(
    name: str,
    shape: tuple[int, int, tuple[int, ...]],
    images: int,
    count: int,
    inverse: bool,
    rate: float,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A pass over images x count rows, then backward; NLL forward, a pose loss inverse."""
    dim, cond_dim, hidden = shape
    net = freia_flow(dim, cond_dim, hidden).train()
    x = torch.randn(images * count, dim)
    cond = torch.randn(images, cond_dim, requires_grad=True)
    target = torch.randn(dim)

    def loss(out: Tensor, log_jac: Tensor) -> Tensor:
        if inverse:
            return (out - target).abs().mean()
        return (0.5 * out.square().sum(-1) - log_jac).mean()

    def rows(model: nn.Module) -> None:
        next_step(net)
        given = cond.repeat_interleave(count, 0)
        loss(*model(x, c=[given], rev=inverse)).backward()

    def grouped(model: Any) -> None:
        next_step(net)
        flow = model.flow()
        run = flow.inverse if inverse else flow.forward
        loss(*run(x.view(images, count, dim), cond)).backward()

    accelerated = fasthyp.accelerate(net)
    stored = fasthyp.accelerate(net, checkpoint="store")
    contenders: dict[str, Callable[[], Any]] = {
        "eager": lambda: rows(net),
        "accelerated": lambda: rows(accelerated),
        "reversible": lambda: grouped(accelerated),
        "store": lambda: grouped(stored),
    }
    if not options.no_compile:
        compiled = torch.compile(net)
        contenders["compiled"] = lambda: rows(compiled)
    flop = hoisted_flop(dim, hidden, images * count)
    return timed(name, contenders, flop, rate, options.seconds)


def glow(images: int, count: int, rate: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The inverse pass of ConditionalGlow without dropout, batch norms in eval mode."""
    dim, context_dim, hidden, layers, blocks = 144, 2048, 1024, 4, 2
    torch.manual_seed(0)
    net = Glow(dim, context_dim, hidden, layers, blocks).eval()
    z = torch.randn(images * count, dim)
    context = torch.randn(images, context_dim, requires_grad=True)
    folded = [part for step in net.steps for part in step.layers(dim, context_dim)]  # type: ignore

    def eager(model: nn.Module) -> None:
        next_step(net)
        x, log_jac = model(z, context.repeat_interleave(count, 0))
        (x.square().mean() - log_jac.mean()).backward()

    def fused(mode: str) -> None:
        next_step(net)
        flows[mode] = flows[mode].renewed()
        x, log_jac = flows[mode].inverse(z.view(images, count, dim), context)
        (x.square().mean() - log_jac.mean()).backward()

    flows = {
        mode: TrainableFlow(folded, range(dim), dim, context_dim, checkpoint=mode)
        for mode in training.CHECKPOINTS
    }
    contenders: dict[str, Callable[[], Any]] = {
        "eager": lambda: eager(net),
        **{mode: lambda mode=mode: fused(mode) for mode in flows},
    }
    if not options.no_compile:
        compiled = torch.compile(net)
        contenders["compiled"] = lambda: eager(compiled)
    half, rows = dim // 2, images * count
    flop = 2.0 * rows * layers * (2 * half * hidden + 2 * blocks * hidden**2 + dim**2)
    name = f"ConditionalGlow 144-d, inverse, {images} x {count} rows"
    return timed(name, contenders, flop, rate, options.seconds)


def depths() -> list[dict[str, Any]]:
    """Extra memory of a step of 12,800 rows by the number of blocks."""
    rows = []
    for blocks in (2, 4, 8, 16, 32):
        row: dict[str, Any] = {"workload": "48-d, inverse, 64 x 200 rows", "blocks": blocks}
        net = freia_flow(48, 56, (1024,), blocks=blocks).train()
        z = torch.randn(64, 200, 48)
        cond = torch.randn(64, 56, requires_grad=True)
        for mode in training.CHECKPOINTS if blocks <= 8 else ("reversible",):
            flow = fasthyp.accelerate(net, checkpoint=mode).flow()  # type: ignore[operator]

            def step(flow: Any = flow, z: Tensor = z, cond: Tensor = cond) -> None:
                flow.inverse(z, cond)[0].abs().mean().backward()

            step()
            row[f"{mode}_mb"] = extra_mb(step)
        weights = sum(p.numel() for p in net.parameters() if p.requires_grad)
        row["weights_mb"] = 4 * weights / 2**20
        rows.append(row)
    return rows


def drift() -> list[dict[str, Any]]:
    """Relative errors of float32 gradients against float64: PyTorch's, reversible, and "bare",
    which keeps no states at all."""
    rows = []
    for clamp in (2.0, 5.0):
        for blocks in (8, 16, 32):
            row: dict[str, Any] = {"workload": f"48-d, clamp {clamp:g}", "blocks": blocks}
            net = freia_flow(48, 56, (256,), blocks=blocks, clamp=clamp)
            x, cond = torch.randn(256, 48), torch.randn(256, 56)
            accelerated, bare = fasthyp.accelerate(net), fasthyp.accelerate(net)
            _keep_no_states(bare, x, cond)
            exact = _gradients(_double(net), x.double(), cond.double())
            for name, model in (("torch", net), ("reversible", accelerated), ("bare", bare)):
                found = _gradients(model, x, cond)
                for part in exact:
                    error = (found[part].double() - exact[part]).norm() / exact[part].norm()
                    row[f"{name}_{part}"] = float(error)
            rows.append(row)
    return rows


def _keep_no_states(net: Any, x: Tensor, cond: Tensor) -> None:
    flow = net.flow()
    flow.forward(x[:, None], cond)
    for segment in flow._trainable.segments:
        segment.keep_every = 0


def _double(net: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(net).double()


def _gradients(net: nn.Module, x: Tensor, cond: Tensor) -> dict[str, Tensor]:
    x, cond = x.clone().requires_grad_(), cond.clone().requires_grad_()
    parameters = [p for p in net.parameters() if p.requires_grad]
    z, log_jac = net(x, c=[cond])
    found = torch.autograd.grad((0.5 * z.square().sum(-1) - log_jac).mean(), [x, cond, *parameters])
    weights = torch.cat([g.flatten() for g in found[2:]])
    return {"x": found[0], "cond": found[1], "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=10.0, help="per workload")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()

    rate = gemm_rate(torch.float32)
    narrow, wide = (48, 56, (1024,)), (132, 979, (1024, 1024))
    rows = freia("48-d, inverse, 64 x 200 rows", narrow, 64, 200, True, rate, options)
    for batch in (64, 256, 1024):
        name = f"48-d, negative log-likelihood, {batch} rows"
        rows += freia(name, narrow, batch, 1, False, rate, options)
    rows += freia("132-d, inverse, 64 x 25 rows", wide, 64, 25, True, rate, options)
    for images, count in ((16, 32), (64, 25)):
        rows += glow(images, count, rate, options)
    tables = {
        "a pass and its backward pass": rows,
        "memory against depth": depths(),
        "float32 gradients against float64": drift(),
    }
    for title, table in tables.items():
        report(title, table, None)
    everything = [row for table in tables.values() for row in table]
    if options.json:
        save(everything, options.json, blocks=BLOCKS, gemm_gflops=rate)


if __name__ == "__main__":
    main()
