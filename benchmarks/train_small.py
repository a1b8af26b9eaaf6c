"""Train a system's small configuration on simulated persons, and measure it on held-out ones.

    python benchmarks/train_small.py poco --data cmu_mocap_h36m17.npz --out runs/poco

Goes on from the last checkpoint where the folder has one. Writes the curve, the figures of the
best model and of what it has to beat, and how they were made to
``benchmarks/results/train_<system>.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthyp._files import replacing
from fasthyp.data import PersonBatch
from fasthyp.metrics import (
    calibration_curve,
    confidence_rank,
    mpjpe,
    over_hypotheses,
    pa_mpjpe,
    pearson,
    sparsification,
)
from fasthyp.train import baseline_errors, load_recipe
from fasthyp.train.recipe import Recipe, run
from fasthyp.train.regression import RegressionRecipe, RegressionRecipeConfig

RESULTS = Path(__file__).parent / "results"
CHUNK = 128


def measure(model: Any, persons: PersonBatch, samples: int) -> dict[str, float]:
    """Errors in mm of root-centred joints, and whether the model knows where it errs.

    ``pcc`` is Pearson's correlation of uncertainty and error of the first hypothesis over all
    joints but the root, or all bodies; ``ause`` the area under the joints' sparsification error;
    ``coverage`` the share of true joints in the region that holds this share of the hypotheses.
    """
    parts: dict[str, list[Tensor]] = {}

    def keep(**values: Tensor) -> None:
        for name, value in values.items():
            parts.setdefault(name, []).append(value.detach())

    for start in range(0, len(persons), CHUNK):
        rows = persons[start : start + CHUNK]
        found = model.hypotheses(rows, samples, seed=start)
        (truth,) = rows.need("joints_3d")
        known = [rows.joint_names.index(name) for name in found.joint_names]
        others = [k for k, name in enumerate(found.joint_names) if name != "pelvis"]
        truth, poses = 1000 * truth[:, known], 1000 * found.joints_3d
        error = mpjpe(poses, truth[:, None])
        keep(
            mode_mm=error[:, 0],
            pa_mode_mm=pa_mpjpe(poses[:, 0], truth),
            joints=(poses[:, 0] - truth).norm(dim=-1)[:, others],
        )
        if samples > 1:
            spread = poses.var(1).sum(-1).sqrt()[:, others]
            keep(
                best_mm=over_hypotheses(error).best,
                mean_mm=mpjpe(poses.mean(1), truth),
                random_mm=error[:, 1],
                spread=spread,
                ranks=confidence_rank(poses[:, :, others], truth[:, others]),
            )
        if found.uncertainty is not None:
            keep(uncertainty=found.uncertainty[:, others])
        if hasattr(model, "whole_body_uncertainty"):
            keep(body=model.whole_body_uncertainty(model.predict(rows)))
    all_rows = {name: torch.cat(values) for name, values in parts.items()}
    figures = {k: float(v.mean()) for k, v in all_rows.items() if k.endswith("_mm")}
    error, wrong = all_rows["joints"], all_rows["mode_mm"]
    for name in ("uncertainty", "spread"):
        if name in all_rows:
            unsure = all_rows[name].to(error.dtype)
            figures[f"{name}_pcc_joints"] = float(pearson(unsure, error))
            figures[f"{name}_pcc_bodies"] = float(pearson(unsure.mean(1), wrong))
            figures[f"{name}_ause"] = float(sparsification(unsure, error).ause)
    if "body" in all_rows:
        body = all_rows["body"].to(wrong.dtype)
        figures["whole_body_pcc"] = float(pearson(body, wrong))
        order = body.argsort()
        for share in (0.25, 0.5):
            kept = order[: round(share * len(order))]
            figures[f"mode_mm_of_surest_{share:g}"] = float(wrong[kept].mean())
    if "ranks" in all_rows:
        coverage, off = calibration_curve(all_rows["ranks"], (0.1, 0.25, 0.5, 0.75, 0.9))
        figures |= {
            f"coverage_{level}": float(value)
            for level, value in zip((10, 25, 50, 75, 90), coverage, strict=True)
        }
        figures["calibration_error"] = float(off)
    return figures


def trained(recipe: Recipe, folder: Path) -> tuple[Any, float]:
    """Its best model, and the seconds of processor time that the training took here."""
    start = time.process_time()
    model = run(
        recipe, folder, resume=(folder / "last.ckpt").exists(), progress=sys.stderr.isatty()
    )
    return model, time.process_time() - start


def curve(path: Path) -> dict[str, list[float | None]]:
    """The points of the training curve at which there was a validation."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if any(row[k] for k in row if "val_" in k)]
    return {k: [round(float(row[k]), 4) if row[k] else None for row in rows] for k in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--test-size", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    kind = load_recipe(arguments.system)
    config = kind.Config.small()  # type: ignore[attr-defined]
    if arguments.steps is not None:
        config = replace(config, steps=arguments.steps)
    source = kind.make_source(config, arguments.data)
    recipe = kind(config, source)
    model, seconds = trained(recipe, arguments.out / "model")

    width, size = 256, arguments.test_size
    regression_config = RegressionRecipeConfig(
        steps=config.steps, batch_size=config.batch_size, width=width, depth=2
    )
    regression_recipe = RegressionRecipe(regression_config, source)
    regression, _ = trained(regression_recipe, arguments.out / "regression")

    test = source.sample(size, 1, "test")
    figures = {
        "train": {"command": " ".join(["python", *sys.argv]), "processor_seconds": round(seconds)},
        "config": asdict(config),
        "machine": {"processor": platform.processor(), "torch": torch.__version__},
        "test_persons": size,
        "hypotheses": arguments.samples,
        "model": measure(model, test, arguments.samples),
        "regression": measure(regression, test, 1),
        "baselines": baseline_errors(source, size, 1, "test"),
        "curve": curve(arguments.out / "model" / "metrics.csv"),
    }
    path = RESULTS / f"train_{arguments.system}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    for name in ("model", "regression", "baselines"):
        print(name, {k: round(v, 4) for k, v in figures[name].items()})


if __name__ == "__main__":
    main()
