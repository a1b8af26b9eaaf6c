"""Training recipe of :class:`fasthyp.models.lifting.LiftingFlow`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fasthyp.data.simulate import SimulationConfig
from fasthyp.models.lifting import LiftingFlow


@dataclass(frozen=True)
class LiftingTrainConfig:
    """Everything that determines a training run, saved beside its result as ``config.json``.

    Attributes:
        seed: of the initial weights and of every batch.
        steps, batch_size: optimiser steps and persons per step.
        learning_rate, warmup_steps, decay_steps: linear warm-up, constant, then a cosine to zero
            over the last ``decay_steps``; so a run's length can still be changed on resuming.
        weight_decay: of AdamW, on matrices only.
        clip_norm: largest gradient norm.
        mode_weight, mode_share: weight (per metre) of the joint error of the z = 0 hypothesis, and
            the share of each batch it is computed on.
        subject_balance: frames of a subject with n frames have the weight n ** (balance - 1).
        validate_every, validation_size: steps between validations and persons in each.
        precision: ``"bf16"`` (matrix products under autocast) or ``"float32"``.
        hidden, blocks, cond_dim, cond_hidden: of the model.
        simulation: cameras and augmentation.
    """

    seed: int = 0
    steps: int = 20_500
    batch_size: int = 1024
    learning_rate: float = 2e-3
    warmup_steps: int = 500
    decay_steps: int = 17_500
    weight_decay: float = 1e-2
    clip_norm: float = 20.0
    mode_weight: float = 30.0
    mode_share: float = 0.25
    subject_balance: float = 0.1
    validate_every: int = 1000
    validation_size: int = 2048
    precision: str = "bf16"
    hidden: int = 1024
    blocks: int = 8
    cond_dim: int = 56
    cond_hidden: int = 256
    simulation: SimulationConfig = field(default_factory=SimulationConfig)

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "warmup_steps",
            "validate_every",
            "validation_size",
            "decay_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.precision not in ("bf16", "float32"):
            raise ValueError(f"precision: expected 'bf16' or 'float32', got {self.precision!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LiftingTrainConfig:
        """Build from parsed JSON; an unknown key is a ValueError."""
        values = dict(values)
        for kind, given, prefix in (
            (cls, values, ""),
            (SimulationConfig, values.get("simulation", {}), "simulation."),
        ):
            unknown = sorted(set(given) - {f.name for f in fields(kind)})
            if unknown:
                raise ValueError(f"unknown setting {prefix}{unknown[0]}")
        if "simulation" in values:
            simulation: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values["simulation"].items()
            }
            values["simulation"] = SimulationConfig(**simulation)
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> LiftingTrainConfig:
        """Read a configuration file; missing keys keep their defaults."""
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable configuration: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def train(
    config: LiftingTrainConfig,
    data_path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    resume: bool = False,
    progress: bool = True,
) -> LiftingFlow:
    """Train a lifting flow and write it to ``out_dir``.

    Writes ``config.json``, ``metrics.csv`` (training and validation curves; those of
    earlier starts are ``metrics-1.csv`` and so on), checkpoints
    (``last.ckpt`` and the best by validation likelihood) and, at the end, ``lifting.safetensors``
    with ``lifting.json`` of the best validation. Every batch is drawn from (seed, step), so a
    resumed run sees what the uninterrupted one would have.

    Args:
        config: the recipe; with ``resume``, the one of ``out_dir`` but for ``steps`` and
            ``decay_steps``.
        data_path: CMU poses, see :func:`fasthyp.data.load_cmu`.
        out_dir: created where missing.
        resume: go on from ``last.ckpt`` in ``out_dir``.
        progress: show a progress bar.

    Raises:
        ValueError: unusable data, or nothing to resume from, or a different configuration.
        ImportError: Lightning is not installed (``pip install fasthyp[train]``).
    """
    try:
        from fasthyp.train.lifting_module import run
    except ImportError as error:
        raise ImportError(
            f"training needs Lightning: pip install 'fasthyp[train]' ({error})"
        ) from error
    return run(config, Path(data_path), Path(out_dir), resume, progress)
