"""From heatmaps to 1000 hypotheses of each person: fasthyp against SciPy and plain PyTorch.

    python benchmarks/bench_estimator.py [--json FILE] [--seconds S] [--no-compile]

On a CUDA device where there is one, otherwise on the CPU. The maps are the bundled ones, 64 x 64,
the model the bundled one. "graph" and "call" are ``PoseEstimator``, captured and not, "fit",
"condition" and "sample" its stages; times include the wait for the result. The peer fits with SciPy
(on the CPU, for one person only) and does the rest in PyTorch with FrEIA's flow, which is also
compiled. ``vs_eager`` and ``vs_compiled`` compare the whole, ``rest_vs_eager`` and
``rest_vs_compiled`` what comes after the fits (condition and sample) with PyTorch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
import torch
from _timing import interleaved, report
from torch import Tensor

import fasthyp
from fasthyp._graphs import Noise
from fasthyp._peers import scipy_fit
from fasthyp.estimator import is_fitted
from fasthyp.models import LiftingFlow
from fasthyp.observations import Gaussians

HYPOTHESES = 1000
PERSONS = (1, 16)
JOINTS = [0, *range(5, 17)]


def bundled_heatmaps(persons: int) -> Tensor:
    """(persons, 13, 64, 64): the bundled person, a little fainter each time."""
    with np.load(str(resources.files("fasthyp") / "data" / "astronaut_heatmaps.npz")) as data:
        maps = torch.from_numpy(data["heatmaps"]).reshape(-1, 17, 64, 64)[:1, JOINTS]
    return maps * torch.linspace(1.0, 0.9, persons)[:, None, None, None]


def in_pytorch(
    model: LiftingFlow, flow: Callable[..., Any], given: Gaussians, size: tuple[int, int]
) -> tuple[Tensor, ...]:
    """What the estimator does after the fits, with one row of the condition per hypothesis."""
    cond = model.condition(*given, size).repeat_interleave(HYPOTHESES + 1, 0)
    z = torch.randn(len(cond), 39, device=cond.device)
    z[:: HYPOTHESES + 1] = 0
    x, log_jac = flow(z, c=[cond], rev=True)
    log_prob = -0.5 * (z.square() + np.log(2 * np.pi)).sum(-1) - log_jac + model.log_det_whiten
    poses = 1000 * model.to_pose(x).unflatten(0, (-1, HYPOTHESES + 1))
    mode, poses = poses[:, 0], poses[:, 1:]
    mean = poses.mean(1)
    centred = poses - mean[:, None]
    covariance = torch.einsum("bmjx,bmjy->bjxy", centred, centred) / HYPOTHESES
    return poses, log_prob, mode, mean, covariance


def contenders(
    model: LiftingFlow, heatmaps: Tensor, precisions: tuple[str, ...], compiled: Any
) -> dict[str, Callable[[], Any]]:
    graphs = (False, True) if heatmaps.is_cuda else (False,)
    found: dict[str, Callable[[], Any]] = {}
    for precision in precisions:
        for graph in graphs:
            whole = fasthyp.PoseEstimator(model, HYPOTHESES, precision, graph)
            found[f"{'graph' if graph else 'call'}, {precision}"] = partial(whole, heatmaps, 0)
        stages = fasthyp.PoseEstimator(model, HYPOTHESES, precision)
        fit = stages.fit(heatmaps)
        given, observed = Gaussians(fit.amplitude, fit.mean, fit.covariance), is_fitted(fit)
        size = (heatmaps.shape[2], heatmaps.shape[3])
        cond = stages.condition(given, observed, size)
        found["fit"] = partial(stages.fit, heatmaps)
        found["condition"] = partial(stages.condition, given, observed, size)
        found[f"sample, {precision}"] = partial(stages.sample, cond, Noise(0))
        found["PyTorch, eager"] = partial(in_pytorch, model, model.flow, given, size)
        if compiled is not None:
            found["PyTorch, compiled"] = partial(in_pytorch, model, compiled, given, size)
    if len(heatmaps) == 1:
        found["SciPy"] = partial(scipy_fit, heatmaps[0].cpu().double().numpy())
    return found


def compare(times: dict[str, float]) -> dict[str, dict[str, float]]:
    """Ratios, of each run that has some."""
    ratios: dict[str, dict[str, float]] = {name: {} for name in times}
    for peer in ("eager", "compiled"):
        rest = times.get(f"PyTorch, {peer}")
        if rest is None:
            continue
        for name, ms in times.items():
            stage = name.split(",")[0]
            if stage in ("graph", "call") and "SciPy" in times:
                ratios[name][f"vs_{peer}"] = (times["SciPy"] + rest) / ms
            elif stage == "sample":
                ratios[name][f"rest_vs_{peer}"] = rest / (times["condition"] + ms)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--seconds", type=float, default=6.0, help="per workload")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    precisions = ("highest", "high", "medium") if cuda else ("highest", "medium")
    model = LiftingFlow.from_pretrained().to("cuda" if cuda else "cpu")

    def finished(run: Callable[[], Any]) -> None:
        run()
        if cuda:
            torch.cuda.synchronize()

    rows: list[dict[str, Any]] = []
    for persons in PERSONS:
        compiled = None
        if not options.no_compile:
            compiled = torch.compile(model.flow, mode="reduce-overhead" if cuda else None)
        heatmaps = bundled_heatmaps(persons).to(model.centre.device)
        with torch.no_grad():
            runs = contenders(model, heatmaps, precisions, compiled)
            measured = interleaved(
                {name: partial(finished, run) for name, run in runs.items()}, options.seconds
            )
        ratios = compare({name: value["ms"] for name, value in measured.items()})
        for name, value in measured.items():
            row = {
                "workload": f"{persons} x 13 maps, {HYPOTHESES} hypotheses",
                "run": name,
                "us": 1e3 * value["ms"],
                "us_q1": 1e3 * value["ms_q1"],
                "us_q3": 1e3 * value["ms_q3"],
            }
            rows.append({**row, **ratios[name]})
    report(f"heatmaps to hypotheses, {model.centre.device.type}", rows, options.json)


if __name__ == "__main__":
    main()
