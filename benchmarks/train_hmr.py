"""Train ProHMR, its lifting variant or HUMR on simulated persons and measure what came out.

    python benchmarks/train_hmr.py prohmr --data cmu_mocap_h36m17.npz --out RUN --json RESULT.json

On one core, single-threaded. Beside the curve, the result has: the table of
``fasthyp.evaluation.evaluate`` on test persons (calibration and PCC in it); the errors of the mean
pose, the nearest training person and a regression of about the trunk's size, trained as long; and
what fitting to keypoints and refinement over four views do. With ``--report`` a finished run is
measured only.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthyp._files import replacing
from fasthyp.body import prohmr_camera, project
from fasthyp.data.persons import PersonBatch
from fasthyp.evaluation import evaluate
from fasthyp.metrics import mpjpe, pa_mpjpe
from fasthyp.models import HUMR, ProHMR, load
from fasthyp.models.fitting import FittingConfig, fit_keypoints, refine_views
from fasthyp.train.baselines import baseline_errors
from fasthyp.train.humr import HUMRRecipe
from fasthyp.train.prohmr import ProHMRLiftingRecipe, ProHMRRecipe
from fasthyp.train.recipe import run
from fasthyp.train.regression import RegressionRecipe, RegressionRecipeConfig

RECIPES: dict[str, Any] = {r.name: r for r in (ProHMRRecipe, ProHMRLiftingRecipe, HUMRRecipe)}
TEST_SEED, VIEWS = 5, 4


def curve(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [{k: round(v, 4) for k, v in row.items()} for row in rows if "val_mode_mm" in row]


def errors(joints: Tensor, truth: Tensor) -> dict[str, float]:
    """In mm, of joints (N, 17, 3) in metres."""
    return {
        "mpjpe_mm": 1000 * float(mpjpe(joints, truth, root=0).mean()),
        "pa_mpjpe_mm": 1000 * float(pa_mpjpe(joints, truth).mean()),
    }


def fitting(model: ProHMR, persons: PersonBatch, rounds: int) -> dict[str, Any]:
    """Fit to the detector's means, in the crop, weighted by their certainty; and to the truth."""
    mean, covariance, truth, joints_2d = persons.need(
        "mean", "covariance", "joints_3d", "joints_2d"
    )
    config, batch = FittingConfig(max_iter=rounds), len(persons)
    with torch.no_grad():
        cond = model.condition(persons)
        mode = model.decode(torch.zeros(batch, 1, model.dims), cond)
        joints = model.pose(mode)[0][:, 0]
    size = model.config.image_size
    unit = size / model.config.crop
    focal = torch.full((batch, 2), model.config.focal_length)
    centre = torch.full((batch, 2), size / 2)
    translation = prohmr_camera(mode.camera, model.config.focal_length, size)
    options: dict[str, Any] = {
        "translation": translation,
        "focal_length": focal,
        "camera_center": centre,
        "image_size": torch.full((batch, 2), size),
        "config": config,
    }
    found: dict[str, Any] = {"persons": batch, "rounds": rounds, "mode": errors(joints, truth)}
    # half of a joint's weight for a deviation of two cells
    certainty = 4 / (4 + covariance.diagonal(dim1=-2, dim2=-1).mean(-1))
    for name, points, confidence in (
        ("detections", mean, certainty),
        ("true_keypoints", joints_2d, torch.ones_like(certainty)),
    ):
        fit = fit_keypoints(model, cond, points * unit, confidence, **options)
        assert fit.translation is not None
        before = project(joints, translation, focal, centre)
        after = project(fit.joints, fit.translation, focal, centre)
        found[name] = {
            **errors(fit.joints, truth),
            "keypoint_error_before_px": float((before - points * unit).norm(dim=-1).mean()),
            "keypoint_error_after_px": float((after - points * unit).norm(dim=-1).mean()),
            "z_rms": float(fit.z.square().mean().sqrt()),
        }
    return found


def views(model: ProHMR | HUMR, source: Any, persons: int, rounds: int) -> dict[str, Any]:
    """The same pose seen by four cameras: each mode alone, and after refinement."""
    modes, refined, truths = [], [], []
    number = len(source.poses["test"].betas)
    for person in range(persons):
        index = torch.full((VIEWS,), person * (number // persons))
        seen = source.sample(VIEWS, TEST_SEED + person, "test", index=index)
        with torch.no_grad():
            cond = model.condition(seen)
            modes.append(model.pose(model.decode(torch.zeros(VIEWS, 1, model.dims), cond))[0][:, 0])
        refined.append(refine_views(model, cond, FittingConfig(max_iter=rounds)).joints)
        truths.append(seen.need("joints_3d")[0])
    truth = torch.cat(truths)
    return {
        "persons": persons,
        "views": VIEWS,
        "single": errors(torch.cat(modes), truth),
        "refined": errors(torch.cat(refined), truth),
    }


def _named(argument: str) -> str:
    """Files by their names alone."""
    return Path(argument).name if "/" in argument else argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("system", choices=sorted(RECIPES))
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--validate-every", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--test-persons", type=int, default=512)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 10, 200])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kind = RECIPES[arguments.system]
    given = {"steps": arguments.steps, "validate_every": arguments.validate_every}
    config = kind.Config.small(**{k: v for k, v in given.items() if v is not None})
    source = kind.make_source(config, arguments.data)
    started, cpu = time.time(), time.process_time()
    folder = arguments.out / arguments.system
    if not arguments.report:
        run(kind(config, source), folder, resume=arguments.resume)
    trained = {"seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu}
    values = json.loads((folder / "config.json").read_text())
    model: Any = load(folder / "model")

    plain = RegressionRecipeConfig(
        steps=values["steps"], batch_size=values["batch_size"], width=256, validation_size=256
    )
    beside = arguments.out / f"{arguments.system}_regression"
    if not (beside / "model").exists():
        run(RegressionRecipe(plain, source), beside)
    regression: Any = load(beside / "model")

    persons = source.sample(arguments.test_persons, TEST_SEED, "test")
    size = {"num_samples": sorted(arguments.samples), "batch_size": 32}
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/train_hmr.py", *map(_named, sys.argv[1:])]),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "config": values,
        "training": {} if arguments.report else trained,
        "curve": curve(folder / "metrics.csv"),
        "test": evaluate(model, persons, **size),
        "baselines": {
            **baseline_errors(source, arguments.test_persons, TEST_SEED, "test"),
            "regression": evaluate(regression, persons, [1])["all"]["mode"],
        },
    }
    if isinstance(model, ProHMR):
        result["fitting"] = fitting(model, persons[:64], arguments.rounds)
    if isinstance(model, (ProHMR, HUMR)):
        result["views"] = views(model, source, 16, arguments.rounds)
    with replacing(arguments.json) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in result if k not in ("config", "curve")}, indent=1))


if __name__ == "__main__":
    main()
