"""Train a system's small configuration on simulated persons and measure it on held-out clips.

    python benchmarks/train_systems.py prohmr --data cmu_mocap_h36m17.npz --runs RUNS

Each run is a folder of RUNS; one that was stopped goes on, one that is done is measured again.
Writes ``benchmarks/results/train_<system>.json``: the curve, the tables of
``fasthyp.evaluation.evaluate``, what the model has to beat (the mean training pose, the training
person with the nearest detections, a regression from the same Gaussians with as many steps and
persons a step), and what the system is made for beyond sampling.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _downstream import fitting, surest, views
from _timing import machine

from fasthyp._files import replacing
from fasthyp.evaluation import evaluate
from fasthyp.models import HUMR, POCO, ProHMR
from fasthyp.train import SYSTEMS, baseline_errors, load_recipe
from fasthyp.train.recipe import Recipe, run
from fasthyp.train.regression import RegressionRecipe, RegressionRecipeConfig

RESULTS = Path(__file__).parent / "results"
TEST_SEED = 5


def trained(recipe: Recipe, folder: Path) -> Any:
    """Its best model; goes on where the folder was left."""
    resume = (folder / "last.ckpt").exists()
    return run(recipe, folder, resume=resume, progress=sys.stderr.isatty())


def curve(folder: Path) -> list[dict[str, float]]:
    """The points of the training curve at which there was a validation."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    validated = [row for row in rows if any(name.startswith("val_") for name in row)]
    return [{k: round(v, 4) for k, v in row.items()} for row in validated]


def regression_beside(config: Any, source: Any, folder: Path) -> Any:
    """A regression with as many steps and persons a step."""
    plain = RegressionRecipeConfig(
        seed=config.seed,
        steps=config.steps,
        batch_size=config.batch_size,
        validate_every=min(RegressionRecipeConfig.validate_every, config.steps),
        validation_size=256,
        width=256,
    )
    return trained(RegressionRecipe(plain, source), folder)


def downstream(model: Any, source: Any, persons: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(model, ProHMR):
        found["fitting"] = fitting(model, persons[:64], rounds=10)
    if isinstance(model, (ProHMR, HUMR)):
        found["views"] = views(model, source, persons=16, rounds=10, seed=TEST_SEED)
    if isinstance(model, POCO):
        found["surest"] = surest(model, persons)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=sorted(SYSTEMS.keys() - {"regression"}))
    parser.add_argument("--data", type=Path, required=True, help="CMU poses")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, help="instead of the small configuration's")
    parser.add_argument("--persons", type=int, default=512, help="held out, to measure on")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 10, 200])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    kind: Any = load_recipe(options.system)
    config = kind.Config.small()
    if options.steps is not None:
        config = replace(config, steps=options.steps)
    source = kind.make_source(config, options.data)
    new = not (options.runs / options.system / "last.ckpt").exists()
    started = time.process_time()
    model = trained(kind(config, source), options.runs / options.system)
    seconds = time.process_time() - started
    regression = regression_beside(config, source, options.runs / f"{options.system}_regression")

    persons = source.sample(options.persons, TEST_SEED, "test")
    result = {
        "machine": {
            **machine(),
            "command": f"python train_systems.py {options.system} --steps {config.steps}",
        },
        "processor_seconds": round(seconds) if new else None,
        "config": asdict(config),
        "curve": curve(options.runs / options.system),
        "test": evaluate(model, persons, options.samples),
        "baselines": {
            **baseline_errors(source, options.persons, TEST_SEED, "test"),
            "regression": evaluate(regression, persons, (1,))["all"]["mode"],
        },
        **downstream(model, source, persons),
    }
    with replacing(RESULTS / f"train_{options.system}.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    shown = {k: v for k, v in result.items() if k not in ("config", "curve", "machine")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
