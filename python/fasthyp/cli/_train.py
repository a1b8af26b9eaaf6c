"""``fasthyp train`` and ``fasthyp simulate``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasthyp.models._pretrained import config_from, read_json


def run(
    system: str,
    data: Path,
    out: Path,
    validation: Path | None,
    config: Path | None,
    small: bool,
    settings: Sequence[str],
    changes: dict[str, Any],
    resume: bool,
    devices: int,
    tensorboard: bool,
) -> None:
    """Train a system; see the command."""
    if small and (config is not None or resume):
        raise ValueError("--small: is a configuration of its own, without --config and --resume")
    if config is None and resume:
        config = out / "config.json"
    values = _small(system) if small else {} if config is None else read_json(config)
    origin = "--set" if config is None else str(config)
    named = values.pop("system", system)
    if named != system:
        raise ValueError(f"{config}: expected a configuration of {system}, got {named!r}")
    for setting in settings:
        _set(values, setting)
    values |= changes
    progress = sys.stderr.isatty()
    if system == "lifting":
        if devices > 1 or tensorboard or validation is not None:
            raise ValueError("lifting: has no --devices, --tensorboard and --validation")
        _train_lifting(values, data, out, resume, progress)
        return
    from fasthyp.train import load_recipe

    kind = load_recipe(system)
    try:
        recipe_config = config_from(kind.Config, values)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    from fasthyp.train.recipe import run as train

    recipe = kind(recipe_config, kind.make_source(recipe_config, data, validation))
    train(recipe, out, resume, progress, devices, tensorboard)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"wrote {out / 'model'}")


def _small(system: str) -> dict[str, Any]:
    from fasthyp.train import SYSTEMS, load_recipe

    make = getattr(load_recipe(system).Config, "small", None) if system in SYSTEMS else None
    if make is None:
        raise ValueError(f"--small: {system} has no small configuration")
    values: dict[str, Any] = json.loads(json.dumps(asdict(make())))
    return values


def _train_lifting(
    values: dict[str, Any], data: Path, out: Path, resume: bool, progress: bool
) -> None:
    from fasthyp.train.lifting import LiftingTrainConfig, train

    try:
        config = LiftingTrainConfig.from_dict(values)
    except TypeError as error:
        raise ValueError(f"a setting has a wrong type: {error}") from error
    train(config, data, out, resume=resume, progress=progress)
    print(f"wrote {out / 'lifting.safetensors'}")


def _set(values: dict[str, Any], setting: str) -> None:
    """Put ``a.b=value`` into nested objects; a value that is no JSON is a string."""
    path, equals, text = setting.partition("=")
    names = path.split(".")
    if not equals or not all(names):
        raise ValueError(f"--set: expected KEY=VALUE, got {setting!r}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for name in names[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set: {path}: {name} has no parts")
    values[names[-1]] = value


def simulate(
    poses: Path, out: Path, part: str | None, detector: str, heatmaps: bool, seed: int
) -> None:
    """Simulate persons; see the command."""
    from fasthyp.body.files import load_arrays
    from fasthyp.data import load_cmu, simulate_persons
    from fasthyp.data.readers import save_persons

    for path in (poses, out):
        if path.suffix != ".npz":
            raise ValueError(f"{path}: expected a file name that ends in .npz")
    if part is not None:
        captured = load_cmu(poses, part, "h36m17")
        metres, subject, groups = captured.poses, captured.subject, list(captured.clip)
    else:
        array = load_arrays(poses).get("poses_mm")
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{poses}: expected an array poses_mm (N, 17, 3)")
        metres = torch.from_numpy(array.astype(np.float32)) / 1000
        subject, groups = None, None
    try:
        persons = simulate_persons(metres, seed, detector, heatmaps=heatmaps, subject=subject)
    except ValueError as error:
        raise ValueError(f"{poses}: {error}") from error
    save_persons(out, persons, groups)
    print(f"wrote {out}: {len(persons)} persons")
