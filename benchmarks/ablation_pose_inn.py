"""Trains PoseINN on simulated persons, as it is and without each term of its loss: the paper's
table 4, on motion capture that anyone can have.

    python benchmarks/ablation_pose_inn.py CMU.npz RUNS [--steps N] [--seed 0] [--only full ...]
        [--persons 512] [--threads 1] [--json FILE]

Each run is a folder in RUNS; one that was stopped goes on, one that is done is evaluated again.
All runs have the same persons and initial weights. They are evaluated on held-out clips: on all
persons, and on those of whose joints one is fitted with a standard deviation above 5 cells, as the
paper's "H36MA". Baselines: the mean training pose, the training person with the nearest Gaussians,
and a regression from the same Gaussians with as many steps and persons a step. "worse" says of each
metric of a row whether it is worse than that of the complete loss, which is what the paper reports
of all metrics.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _timing import report, save
from train_systems import curve, regression_beside, trained

from fasthyp.data.simulated_persons import SimulatedPersons
from fasthyp.evaluation import evaluate
from fasthyp.models.pose_inn_input import DETECTOR_JOINTS
from fasthyp.train.baselines import baseline_errors
from fasthyp.train.pose_inn import PoseINNRecipe, PoseINNRecipeConfig
from fasthyp.train.recipe import VALIDATION_SEED

TERMS = ("l2d", "mmd", "det", "best_of_m", "covariance", "generator")
BEST = "best_of.200"
METRICS = {  # name: (path in a row of the table, whether less is better)
    "mode": ("mode.mpjpe_mm", True),
    "best": (f"{BEST}.mpjpe_mm", True),
    "best_pa": (f"{BEST}.pa_mpjpe_mm", True),
    "average_pa": ("average.pa_mpjpe_mm", True),
    "best_pck": (f"{BEST}.pck150", False),
    "best_cps": (f"{BEST}.cps_mm", False),
    "calibration_error": ("calibration_error", True),
}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, (path, _) in METRICS.items():
        value: Any = row
        for step in path.split(".", 2) if path.startswith("best_of") else path.split("."):
            value = value[step]
        found[name] = float(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path, help="CMU poses")
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=PoseINNRecipeConfig.small().steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--persons", type=int, default=512, help="held out, to evaluate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=("full", *TERMS), default=("full", *TERMS))
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    config = replace(PoseINNRecipeConfig.small(), steps=options.steps, seed=options.seed)
    source = SimulatedPersons(options.data, DETECTOR_JOINTS)
    held_out = source.sample(options.persons, VALIDATION_SEED, "test")

    model = regression_beside(config, source, options.runs / "regression")
    table = evaluate(model, held_out, (1,))
    baselines = {
        **baseline_errors(source, options.persons, VALIDATION_SEED, "test"),
        "regression_mm": table["all"]["mode"]["mpjpe_mm"],
        "regression_hard_mm": table["hard"]["mode"]["mpjpe_mm"],
    }
    report("baselines", [{"workload": "MPJPE, mm", **baselines}], None)

    rows: list[dict[str, Any]] = []
    full: dict[str, dict[str, float]] = {}
    for name in options.only:
        weights = config.weights if name == "full" else replace(config.weights, **{name: 0.0})
        recipe = PoseINNRecipe(replace(config, weights=weights), source)
        folder = options.runs / name
        table = evaluate(trained(recipe, folder), held_out, (1, 200))
        for part in ("all", "hard"):
            found = numbers(table[part])
            row: dict[str, Any] = {
                "workload": name if name == "full" else f"without {name}",
                "persons": f"{part}, {table[part]['persons']}",
                **found,
            }
            if name == "full":
                full[part] = found
            elif full:
                row["worse"] = [
                    metric
                    for metric, (_, less) in METRICS.items()
                    if (found[metric] > full[part][metric]) == less
                ]
            row["table"], row["curve"] = table[part], curve(folder) if part == "all" else []
            rows.append(row)
        shown = [{k: v for k, v in r.items() if k not in ("table", "curve")} for r in rows]
        report(f"{options.steps} steps", shown, None)
        if options.json:
            save(rows, options.json, baselines=baselines, config=asdict(config))


if __name__ == "__main__":
    main()
