"""The Lightning half of :mod:`fasthyp.train.lifting`; imported only when training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from fasthyp._files import replacing
from fasthyp.data.mocap import MocapPoses, load_cmu
from fasthyp.data.simulate import PoseSimulator, SimulatedBatch
from fasthyp.models.lifting import DIMS, LiftingFlow
from fasthyp.train.lifting import LiftingTrainConfig

_STANDARDISATION_SIZE = 20_000
_VALIDATION_SEED, _STANDARDISATION_SEED = 1, 2


class _Steps(IterableDataset[int]):
    """One item per step: batches are simulated on the device, from the step's own seed."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.number))


def _to_float(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _simulator(data: MocapPoses, config: LiftingTrainConfig, train: bool) -> PoseSimulator:
    simulation = config.simulation
    if not train:
        simulation = type(simulation)(**{**vars(simulation), "augment": False})
    _, group, counts = data.subject.unique(return_inverse=True, return_counts=True)
    weights = counts[group].double() ** (config.subject_balance - 1) if train else None
    return PoseSimulator(data.poses, simulation, weights)


class LiftingModule(L.LightningModule):
    """Negative log-likelihood of simulated persons, plus the error of the z = 0 hypothesis."""

    def __init__(
        self, config: LiftingTrainConfig, train_data: MocapPoses, validation: MocapPoses
    ) -> None:
        super().__init__()
        self.config = config
        self.train_simulator = _simulator(train_data, config, train=True)
        self.validation_simulator = _simulator(validation, config, train=False)
        self.model = LiftingFlow(config.hidden, config.blocks, config.cond_dim, config.cond_hidden)
        # Only matrix products run in bf16; what they feed (log-scales, their sum) stays float32.
        for name, module in self.model.flow.named_modules():
            if name.endswith(("subnet1", "subnet2")):
                module.register_forward_hook(_to_float)
        generator = torch.Generator().manual_seed(_STANDARDISATION_SEED + 1000 * config.seed)
        batch = self.train_simulator.sample(_STANDARDISATION_SIZE, generator)
        self.model.fit_standardisation(batch.pose, self._features(batch))

    @staticmethod
    def _features(batch: SimulatedBatch) -> Tensor:
        return LiftingFlow.features(batch.amplitude, batch.mean, batch.covariance)

    def on_fit_start(self) -> None:
        for simulator in (self.train_simulator, self.validation_simulator):
            simulator.to(self.device)

    def _batch(self, simulator: PoseSimulator, number: int, seed: int) -> SimulatedBatch:
        generator = torch.Generator(self.device).manual_seed(seed)
        return simulator.sample(number, generator)

    def _nll(self, batch: SimulatedBatch, cond: Tensor) -> Tensor:
        return -self.model.log_prob(batch.pose[:, None], cond)[:, 0]

    def _mode_error(self, batch: SimulatedBatch, cond: Tensor) -> Tensor:
        z = cond.new_zeros(len(cond), DIMS)
        x, _ = self.model.flow(z, c=[cond], rev=True, jac=False)
        truth = batch.clean_pose[: len(cond)]
        return (self.model.to_pose(x) - truth).norm(dim=-1).mean(-1)

    def training_step(self, _item: Tensor, _index: int) -> Tensor:
        config = self.config
        seed = (config.seed + 1) * 1_000_003 + self.global_step * 7919
        batch = self._batch(self.train_simulator, config.batch_size, seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            cond = self.model.encode(self._features(batch)).float()
            nll = self._nll(batch, cond).mean()
            loss = nll
            if config.mode_weight:
                share = max(1, int(config.mode_share * config.batch_size))
                mode = self._mode_error(batch, cond[:share]).mean()
                loss = loss + config.mode_weight * mode
                self.log("train_mode_mm", mode.detach() * 1000, prog_bar=True)
        self.log("train_nll", nll.detach(), prog_bar=True)
        return loss

    def validation_step(self, _item: Tensor, _index: int) -> None:
        batch = self._batch(
            self.validation_simulator, self.config.validation_size, _VALIDATION_SEED
        )
        cond = self.model.encode(self._features(batch))
        values = {
            "val_nll": self._nll(batch, cond).mean(),
            "val_mode_mm": self._mode_error(batch, cond).mean() * 1000,
        }
        self.log_dict(values, prog_bar=True, batch_size=len(cond))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config
        learned = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learned if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99))

    def on_train_batch_start(self, _batch: Any, _index: int) -> None:
        # From the step alone, so that a resumed run goes on as configured now.
        config, step = self.config, self.global_step
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        left = min(1.0, (config.steps - step) / config.decay_steps)
        rate = config.learning_rate * warmup * 0.5 * (1 - math.cos(math.pi * left))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        self.log("learning_rate", rate)


def run(
    config: LiftingTrainConfig, data_path: Path, out_dir: Path, resume: bool, progress: bool
) -> LiftingFlow:
    """See :func:`fasthyp.train.lifting.train`."""
    config_path, last = out_dir / "config.json", out_dir / "last.ckpt"
    if resume:
        if not last.exists():
            raise ValueError(f"resume: no checkpoint {last}")
        started = LiftingTrainConfig.from_json(config_path)
        if replace(started, steps=config.steps, decay_steps=config.decay_steps) != config:
            raise ValueError(f"resume: more than steps and decay_steps differs from {config_path}")
    train_data, validation = load_cmu(data_path, "train"), load_cmu(data_path, "validation")
    out_dir.mkdir(parents=True, exist_ok=True)
    with replacing(config_path) as temporary:
        temporary.write_text(config.to_json())

    metrics = out_dir / "metrics.csv"
    if metrics.exists():  # the logger starts a new one
        part = len(list(out_dir.glob("metrics-*.csv"))) + 1
        metrics.rename(out_dir / f"metrics-{part}.csv")

    L.seed_everything(config.seed, verbose=False)
    module = LiftingModule(config, train_data, validation)
    best = ModelCheckpoint(
        out_dir, filename="best", monitor="val_nll", save_last=True, enable_version_counter=False
    )
    callbacks: list[L.Callback] = [best]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=20))
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=config.steps,
        val_check_interval=config.validate_every,
        check_val_every_n_epoch=None,
        gradient_clip_val=config.clip_norm,
        callbacks=callbacks,
        logger=CSVLogger(out_dir, name="", version=""),
        enable_progress_bar=progress,
        enable_model_summary=False,
        log_every_n_steps=min(100, config.validate_every),
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        # Items are step numbers; there is nothing for loader workers to do.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*exists and is not empty.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        trainer.fit(
            module,
            DataLoader(_Steps(config.steps), batch_size=None),
            DataLoader(_Steps(1), batch_size=None),
            ckpt_path=str(last) if resume else None,
        )
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(state)
    module.model.save_pretrained(out_dir)
    return LiftingFlow.from_pretrained(out_dir)
