"""What all recipes share: a configuration, batches drawn from (seed, step), and the runner.

A recipe is a :class:`lightning.LightningModule`; :func:`run` trains it. Importing this module
imports Lightning (``pip install 'fasthyp[train]'``).
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from fasthyp._files import replacing
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers import guess_format, open_persons
from fasthyp.data.simulated_persons import PersonSource, SimulatedPersons
from fasthyp.data.stored_persons import StoredPersons
from fasthyp.losses import weighted_sum
from fasthyp.metrics import mpjpe, over_hypotheses
from fasthyp.models._pretrained import PretrainedModel, config_from, read_json
from fasthyp.train.curves import Curves

VALIDATION_SEED = 1
_VALIDATION_CHUNK = 128  # persons at a time, whatever the number of processes
_START_METHOD: Literal["spawn", "fork"] = "spawn"  # the only one that a GPU in use allows


@dataclass(frozen=True)
class RecipeConfig:
    """What determines a training run; saved beside its result as ``config.json``.

    Attributes:
        seed: of the initial weights and of every batch.
        steps, batch_size: training steps, and persons in each over all processes.
        learning_rate, weight_decay: of AdamW, the latter on matrices only.
        warmup_steps: over which the learning rates rise linearly.
        schedule: ``"constant"``; ``"cosine"``, to zero at the last step; or ``"step"``, times
            ``decay`` at each of the ``milestones`` (steps).
        clip_norm: largest gradient norm.
        validate_every, validation_size: steps between validations and persons in each; there is
            one at the end in any case.
        validation_samples: hypotheses of each of them, the first of which is the mode.
        precision: ``"float32"``, or ``"bf16"`` for matrix products of the losses under autocast.
        ema_decay: keep this exponential moving average of the model's parameters; it is what is
            validated and saved. The decay rises to this as (1 + step) / (10 + step).
        log_every: steps between points of the training curve.
    """

    seed: int = 0
    steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    clip_norm: float | None = None
    validate_every: int = 500
    validation_size: int = 1024
    validation_samples: int = 20
    precision: str = "float32"
    ema_decay: float | None = None
    log_every: int = 50

    def __post_init__(self) -> None:
        for name, least in (
            *(("seed", 0), ("steps", 1), ("batch_size", 1), ("warmup_steps", 0)),
            *(("validate_every", 1), ("validation_size", 1), ("validation_samples", 1)),
            *(("log_every", 1), ("learning_rate", 0), ("weight_decay", 0)),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.schedule not in ("constant", "cosine", "step"):
            raise ValueError(
                f"schedule: expected 'constant', 'cosine' or 'step', got {self.schedule!r}"
            )
        if self.precision not in ("bf16", "float32"):
            raise ValueError(f"precision: expected 'bf16' or 'float32', got {self.precision!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a positive number, got {self.clip_norm}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 to 1, got {self.ema_decay}")


class Recipe(L.LightningModule):
    """How a model is trained.

    A subclass makes ``self.model`` in its ``__init__`` and gives :meth:`losses`; with
    ``automatic_optimization = False`` it overrides :meth:`training_step` and
    :meth:`configure_optimizers` instead, and takes its steps by :meth:`optimise`.

    Everything random is drawn from (seed, step): persons by the runner, noise by :meth:`normal` or
    from :meth:`new_seed`; PyTorch's default generator is seeded anew at each step. So a resumed
    run, and one of several processes, sees what the uninterrupted single one would have.

    Args:
        config: a ``Config``. Its seed is given to PyTorch's default generator.
        source: where the persons come from.

    Attributes:
        model: what is trained, validated and saved.
        weights: of the terms of :meth:`losses` by name; 1 each where there are none.
        step: training steps (batches) done.
    """

    Config: ClassVar[type[RecipeConfig]] = RecipeConfig
    name: ClassVar[str] = ""
    monitor: ClassVar[str] = "mode_mm"
    """Which number of :meth:`validate` is the lower the better the model."""
    detector: ClassVar[str | tuple[str, ...]] = "h36m17"
    """Joints of the simulated detector: one of :data:`fasthyp.data.DETECTORS`, or their names."""
    heatmaps: ClassVar[bool] = False
    """Whether the losses need heatmaps."""
    find_unused_parameters: ClassVar[bool] = False
    """Whether a step may leave parameters without a gradient; asked with several processes."""

    model: PretrainedModel

    def __init__(self, config: RecipeConfig, source: PersonSource) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            expected = self.Config.__qualname__
            raise TypeError(f"config: expected {expected}, got {type(config).__name__}")
        self.config = config
        self.source = source
        self.weights: Mapping[str, float] = {}
        self.step = 0
        self._seed, self._draws, self._rows = 0, 0, slice(None)
        self._average: list[Tensor] | None = None
        self._validation_persons: PersonBatch | None = None
        torch.manual_seed(config.seed)

    @classmethod
    def make_source(
        cls,
        config: RecipeConfig,
        data: str | os.PathLike[str],
        validation: str | os.PathLike[str] | None = None,
    ) -> PersonSource:
        """Simulated persons of the CMU poses in a file, as the recipe needs them; or the persons
        of a data set, and of another to validate on (:func:`fasthyp.data.readers.open_persons`).

        Raises:
            ValueError, FileNotFoundError: unusable data.
        """
        if validation is None:
            if not Path(data).exists():
                raise FileNotFoundError(f"{data}: no such file or folder")
            if guess_format(data) != "cmu":
                raise ValueError(f"validation: expected persons to validate on, as {data}")
            return SimulatedPersons(data, cls.detector, heatmaps=cls.heatmaps)
        return StoredPersons({"train": open_persons(data), "validation": open_persons(validation)})

    # -- what a recipe says --------------------------------------------------------------------

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        """The terms of the loss by name, each a scalar: a mean over persons, so that the mean over
        processes is that of the whole batch."""
        raise NotImplementedError

    def validate(self, persons: PersonBatch) -> dict[str, Tensor]:
        """Numbers by name, one a person (B,), to be averaged over all persons.

        Here the error in mm (MPJPE, pelvis at the origin where it is among the joints) of the
        mode, of the best hypothesis and of their mean.
        """
        hypotheses = self.model.hypotheses(  # type: ignore[operator]
            persons, self.config.validation_samples, seed=self.new_seed(), include_mode=True
        )
        (truth,) = persons.need("joints_3d")
        names = hypotheses.joint_names
        known = [persons.joint_names.index(name) for name in names]
        root = names.index("pelvis") if "pelvis" in names else None
        truth, poses = 1000 * truth[:, known], 1000 * hypotheses.joints_3d.to(truth.dtype)
        mask = truth.isfinite().all(-1)
        error = mpjpe(poses, truth[:, None], mask[:, None], root)
        return {
            "mode_mm": error[:, 0],
            "best_mm": over_hypotheses(error).best,
            "mean_mm": mpjpe(poses.mean(1), truth, mask, root),
        }

    def learning_rate_factor(self, step: int) -> float:
        """By what the optimisers' learning rates are multiplied at a step, counted from 0."""
        config = self.config
        factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))
        elif config.schedule == "step":
            factor *= config.decay ** sum(step >= milestone for milestone in config.milestones)
        return factor

    def configure_optimizers(self) -> Any:
        """AdamW on all learned parameters; or a list of optimisers."""
        return self.adamw(self.parameters())

    def adamw(self, parameters: Iterator[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        """AdamW with the configured learning rate, and weight decay on matrices only."""
        learned = [p for p in parameters if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learned if p.ndim > 1]},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]
        settings = {"lr": self.config.learning_rate, "weight_decay": self.config.weight_decay}
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, **{**settings, **options})

    # -- what a recipe uses --------------------------------------------------------------------

    def persons(self) -> PersonBatch:
        """This step's persons, of several processes this one's share of them."""
        batch = self.source.sample(self.config.batch_size, self._seed, "train")
        return batch[self._rows].to(self.device)

    def new_seed(self) -> int:
        """Another seed at each call; the same ones for the same step, or persons validated."""
        self._draws += 1
        return (self._seed * 31 + self._draws * 104_729) % 2**62

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise (B, *shape), B the persons of this step's share."""
        generator = torch.Generator().manual_seed(self.new_seed())
        noise = torch.randn(self.config.batch_size, *shape, generator=generator)
        return noise[self._rows].to(self.device)

    def autocast(self) -> torch.autocast:
        """Where matrix products are in bf16, if so configured."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def log_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Add numbers to the training curve, ``train_<name>``."""
        for name, value in terms.items():
            self._log(f"train_{name}", value.detach(), prog_bar=name == "loss")
        self._log("step", self.step + 1)

    def _log(self, name: str, value: Tensor | float, prog_bar: bool = False) -> None:
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        several = self.trainer.world_size > 1
        self.log(name, value, prog_bar=prog_bar, sync_dist=several, batch_size=1)

    def optimise(
        self, loss: Tensor, optimizer: Any, parameters: Sequence[nn.Parameter] | None = None
    ) -> None:
        """One step of one optimiser of several, with ``automatic_optimization = False``.

        Args:
            loss: a scalar.
            optimizer: one of ``self.optimizers()``.
            parameters: those to clip, by the configured norm; the optimiser's by default.
        """
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.config.clip_norm is not None:
            if parameters is None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        optimizer.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the moving average in place of the model's parameters, if one is kept."""
        if self._average is None:
            yield
            return
        with torch.no_grad():
            parameters = list(self.model.parameters())
            current = [p.detach().clone() for p in parameters]
            _copy(self._average, parameters)
            try:
                yield
            finally:
                _copy(current, parameters)

    # -- steps ---------------------------------------------------------------------------------

    def training_step(self, _item: Any, _index: int) -> Any:
        persons = self.persons()
        with self.autocast():
            terms = self.losses(persons)
            loss = weighted_sum(terms, self.weights or dict.fromkeys(terms, 1.0))
        self.log_terms({"loss": loss, **terms})
        return loss

    def validation_step(self, _item: Any, _index: int) -> None:
        if self._validation_persons is None:
            size = self.config.validation_size
            self._validation_persons = self.source.sample(size, VALIDATION_SEED, "validation")
        chunks = range(0, len(self._validation_persons), _VALIDATION_CHUNK)
        rank, processes = self.global_rank, self.trainer.world_size
        # A process without a share looks at the first one, which counts nothing.
        mine = [k for k in range(len(chunks)) if k % processes == rank] or [0]
        means: dict[str, _Mean] = defaultdict(lambda: _Mean().to(self.device))
        with self.averaged():
            for k in mine:
                rows = slice(chunks[k], chunks[k] + _VALIDATION_CHUNK)
                self._begin(VALIDATION_SEED + k, slice(None))
                values = self.validate(self._validation_persons[rows].to(self.device))
                for name, value in values.items():
                    means[name].update(value, counts=k % processes == rank)
        for name in sorted(means):
            self._log(f"val_{name}", means[name].compute(), prog_bar=True)
        self._log("step", self.step)

    def _begin(self, seed: int, rows: slice) -> None:
        self._seed, self._draws, self._rows = seed, 0, rows
        torch.manual_seed(seed + 15_485_863 * self.global_rank)

    # -- Lightning's hooks ---------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        # In every process; the runner puts both back in its own.
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        for message in _USELESS_WARNINGS:
            warnings.filterwarnings("ignore", message)

    def on_fit_start(self) -> None:
        processes, size = self.trainer.world_size, self.config.batch_size
        if size % processes:
            raise ValueError(f"batch_size: expected a multiple of {processes} devices, got {size}")
        if hasattr(self.source, "to"):
            self.source.to(self.device)
        if self.config.ema_decay is not None:
            kept = self._average or [p.detach().clone() for p in self.model.parameters()]
            self._average = [tensor.to(self.device) for tensor in kept]

    def on_train_batch_start(self, _batch: Any, _index: int) -> None:
        share = self.config.batch_size // self.trainer.world_size
        rows = slice(share * self.global_rank, share * (self.global_rank + 1))
        self._begin((self.config.seed + 1) * 1_000_003 + self.step * 7919, rows)
        factor = self.learning_rate_factor(self.step)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def on_train_batch_end(self, _outputs: Any, _batch: Any, _index: int) -> None:
        self.step += 1
        if self._average is not None:
            assert self.config.ema_decay is not None
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                current = [p.detach() for p in self.model.parameters()]
                torch._foreach_lerp_(self._average, current, 1 - decay)
        if self.step >= self.config.steps:
            self.trainer.should_stop = True  # after a last validation

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = {"step": self.step, "average": self._average}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step, self._average = (checkpoint["recipe"][key] for key in ("step", "average"))


def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for a, b in zip(source, target, strict=True):
        b.copy_(a)


class _Mean(Metric):
    """Mean of all numbers of all processes."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")

    def update(self, values: Tensor, counts: bool = True) -> None:
        if counts:
            self.total += values.detach().sum(dtype=torch.float64)
            self.count += values.numel()

    def compute(self) -> Tensor:
        return self.total / self.count


class _Steps(IterableDataset[int]):
    """One item a step, or no end of them: recipes draw their own batches."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        return repeat(0) if self.number is None else repeat(0, self.number)


class _CheckpointFiles(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and in which nothing is run."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU; tensors and plain values alone.

    Raises:
        ValueError: it cannot be read, or is none of a recipe.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "recipe" not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of a recipe")
    return checkpoint


class _Checkpoints(L.Callback):
    """After each validation ``last.ckpt`` and, where it is the best so far, ``model``."""

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder, self.monitor = folder, monitor
        self.best: float | None = None

    def on_validation_end(self, trainer: L.Trainer, recipe: L.LightningModule) -> None:
        assert isinstance(recipe, Recipe)
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(f"monitor: expected one of {sorted(metrics)}, got {self.monitor}")
        value = float(metrics[self.monitor])
        if self.best is None or value < self.best or math.isnan(self.best):
            self.best = value
            if trainer.is_global_zero:
                with recipe.averaged():
                    recipe.model.save_pretrained(self.folder / "model")
        trainer.save_checkpoint(self.folder / "last.ckpt")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def run(
    recipe: Recipe,
    out_dir: str | os.PathLike[str],
    resume: bool = False,
    progress: bool = True,
    devices: int = 1,
    tensorboard: bool = False,
) -> PretrainedModel:
    """Train a recipe and return its model as it was at the best validation, in eval mode.

    Writes into ``out_dir``: ``config.json``; ``metrics.csv``, the training and validation curves;
    ``last.ckpt``, from which to resume; and ``model``, the best one so far by the recipe's
    ``monitor``, for its ``from_pretrained``. Each file appears whole or not at all. A run that was
    killed and resumed has the same weights and curves as one that was not.

    Args:
        recipe: what to train.
        out_dir: made where missing.
        resume: go on from ``last.ckpt`` in ``out_dir``, with the same configuration but for
            ``steps``; a schedule that depends on them goes on as configured now.
        progress: show a progress bar.
        devices: processes, each with a GPU of its own where there are any; each takes its share
            of every batch. The recipe is pickled for them. Under ``torchrun`` (or another launcher
            that Lightning knows) its processes are used instead.
        tensorboard: also log to ``out_dir/tensorboard``; needs the package of that name.

    Raises:
        ValueError: nothing to resume from, another configuration, a folder that holds a run
            already, or a batch size that is no multiple of ``devices``.
    """
    out, config = Path(out_dir), recipe.config
    last, step = out / "last.ckpt", 0
    if resume:
        step = _resumed_step(recipe, out)
    elif last.exists():
        raise ValueError(f"{out}: holds a run already; resume it, or choose another folder")
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # by torchrun
    if config.batch_size % max(devices, launched):
        raise ValueError(
            f"batch_size: expected a multiple of {max(devices, launched)} devices, "
            f"got {config.batch_size}"
        )
    out.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", 0)) == 0:
        with replacing(out / "config.json") as temporary:
            values = {"system": recipe.name, **asdict(config)}
            temporary.write_text(json.dumps(values, indent=2) + "\n")
    if step < config.steps:
        with _quiet():
            trainer = _trainer(recipe, out, step, progress, devices, tensorboard)
            trainer.fit(
                recipe,
                DataLoader(_Steps(), batch_size=None),
                DataLoader(_Steps(1), batch_size=None),
                ckpt_path=str(last) if resume else None,
            )
        if trainer.interrupted:
            raise KeyboardInterrupt
    recipe.model.load_weights(out / "model")
    return recipe.model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's messages about the machine and about what it has to sell."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        log.setLevel(level)


_USELESS_WARNINGS = (
    ".*does not have many workers.*",
    ".*mid-epoch.*",
    ".*is not stateful.*",
    ".*LeafSpec.*",
    ".*find_unused_parameters=True was specified.*",
)


def _resumed_step(recipe: Recipe, out: Path) -> int:
    last, path = out / "last.ckpt", out / "config.json"
    if not last.exists():
        raise ValueError(f"resume: no checkpoint {last}")
    started = read_recipe(path, recipe)
    if replace(started, steps=recipe.config.steps) != recipe.config:
        raise ValueError(f"resume: more than steps differs from {path}")
    return int(read_checkpoint(last)["recipe"]["step"])


def read_recipe(path: Path, recipe: Recipe | type[Recipe]) -> Any:
    """The ``Config`` of a recipe in a JSON file; settings that it leaves out have their defaults.

    Raises:
        ValueError: unreadable, another system's, or an unknown or wrong setting; names it.
    """
    values = read_json(path)
    system = values.pop("system", recipe.name)
    if system != recipe.name:
        raise ValueError(f"{path}: expected a configuration of {recipe.name}, got {system!r}")
    try:
        return config_from(recipe.Config, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _trainer(
    recipe: Recipe, out: Path, step: int, progress: bool, devices: int, tensorboard: bool
) -> L.Trainer:
    config = recipe.config
    loggers: list[Any] = [Curves(out / "metrics.csv", step)]
    if tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(out, name="tensorboard", version=""))
    callbacks: list[L.Callback] = [_Checkpoints(out, f"val_{recipe.monitor}")]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=20))
    launched = os.environ.get("LOCAL_WORLD_SIZE")
    nodes = 1
    strategy: Any = "auto"
    if launched is not None:
        devices, nodes = int(launched), int(os.environ["WORLD_SIZE"]) // int(launched)
        strategy = DDPStrategy(find_unused_parameters=recipe.find_unused_parameters)
    elif devices > 1:
        strategy = DDPStrategy(
            find_unused_parameters=recipe.find_unused_parameters, start_method=_START_METHOD
        )
    return L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        max_epochs=-1,
        val_check_interval=config.validate_every,
        check_val_every_n_epoch=None,
        gradient_clip_val=config.clip_norm if recipe.automatic_optimization else None,
        callbacks=callbacks,
        logger=loggers,
        plugins=[_CheckpointFiles()],
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        log_every_n_steps=config.log_every,
        num_sanity_val_steps=0,
        inference_mode=False,
    )
