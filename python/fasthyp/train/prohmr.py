"""How ProHMR and its lifting variant are trained: Kolotouros et al., "Probabilistic Modeling for
Human Mesh Recovery", ICCV 2021, supplementary material 3, and its code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.body.joint_maps import H36M17_JOINTS
from fasthyp.data.persons import PersonBatch
from fasthyp.losses import (
    PROHMR_LIFTING_WEIGHTS,
    PROHMR_WEIGHTS,
    PosePriorDiscriminator,
    discriminator_loss,
    keypoint_loss,
    mode_and_expectation,
    orthonormality_loss,
    parameter_loss,
    prior_loss,
    weighted_sum,
)
from fasthyp.models.flow_model import BodyFlow, BodyPrediction, root_joints
from fasthyp.models.prohmr import ProHMR, ProHMRConfig, ProHMRLifting, ProHMRLiftingConfig
from fasthyp.train.recipe import PersonSource, Recipe, RecipeConfig

_STANDARDISATION = 4096
"""Persons from whom the lifting's keypoints get their mean and deviation."""


@dataclass(frozen=True)
class ProHMRRecipeConfig(RecipeConfig):
    """The paper's training, but for its mixed precision (float16): ``precision="bf16"`` is near.

    Attributes:
        num_samples: hypotheses of each person at a step, of which the first is the mode.
        noise: standard deviation of what is added to the true 6D pose for its likelihood.
        discriminator_features: width of the adversarial prior.
        model: of the model.
    """

    steps: int = 500_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    validate_every: int = 10_000
    validation_samples: int = 64
    num_samples: int = 2
    noise: float = 0.005
    discriminator_features: int = 1024
    model: ProHMRConfig = field(default_factory=ProHMRConfig)

    @classmethod
    def small(cls, **changes: Any) -> ProHMRRecipeConfig:
        """For simulated persons on one core: a trunk for the Gaussians in place of a backbone,
        an eighth of the width, less dropout, and a larger, falling learning rate."""
        model = ProHMRConfig(
            context_features=256,
            hidden_features=128,
            head_features=128,
            dropout=0.1,
            trunk_inputs=6 * len(H36M17_JOINTS),
            body="stick",
        )
        values: dict[str, Any] = {
            **{"steps": 4_000, "batch_size": 128, "learning_rate": 1e-3, "schedule": "cosine"},
            **{"warmup_steps": 200, "clip_norm": 5.0, "validate_every": 500},
            **{"validation_samples": 50, "discriminator_features": 128, "model": model},
        }
        return cls(**{**values, **changes})


@dataclass(frozen=True)
class ProHMRLiftingRecipeConfig(RecipeConfig):
    """The paper's training of 2D pose lifting. The weight decay is that of its code; the paper says
    that there is none.

    Attributes:
        noise: standard deviation, metres, of what is added to the true joints for their likelihood.
        model: of the model.
    """

    steps: int = 300_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    validate_every: int = 10_000
    validation_samples: int = 64
    noise: float = 0.005
    model: ProHMRLiftingConfig = field(default_factory=ProHMRLiftingConfig)

    @classmethod
    def small(cls, **changes: Any) -> ProHMRLiftingRecipeConfig:
        """As :meth:`ProHMRRecipeConfig.small`, for the joints of simulated persons."""
        model = ProHMRLiftingConfig(
            keypoint_names=H36M17_JOINTS,
            joint_names=H36M17_JOINTS[1:],
            context_features=256,
            hidden_features=128,
            trunk_features=256,
            dropout=0.1,
        )
        values: dict[str, Any] = {
            **{"steps": 4_000, "batch_size": 128, "learning_rate": 1e-3, "schedule": "cosine"},
            **{"warmup_steps": 200, "clip_norm": 5.0, "validate_every": 500},
            **{"validation_samples": 50, "model": model},
        }
        return cls(**{**values, **changes})


class ProHMRRecipe(Recipe):
    """Likelihood, errors of the mode, reprojection of the random hypotheses, and an adversarial
    prior, which is trained in turn.

    The prior's real bodies are the batch's own; the paper takes them from motion capture, as not
    all of its images have such an annotation.

    Args:
        config: a :class:`ProHMRRecipeConfig`.
        source: of persons with rotations, shape, joints and their projections.
        body: a :class:`~fasthyp.models.flow_model.PosedBody`; may be left out where the model's
            configuration names one.
        backbone: as of :class:`~fasthyp.models.ProHMR`.
    """

    Config = ProHMRRecipeConfig
    name = "prohmr"
    find_unused_parameters = True
    config: ProHMRRecipeConfig
    model: ProHMR

    def __init__(
        self,
        config: ProHMRRecipeConfig,
        source: PersonSource,
        body: Any = None,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__(config, source)
        self.automatic_optimization = False
        self.weights = dict(PROHMR_WEIGHTS)
        self.model = ProHMR(config.model, body, backbone)
        self.discriminator = PosePriorDiscriminator(config.discriminator_features)
        first = source.sample(config.batch_size, config.seed, "train")
        pose = self.model.to_6d(self.model.target(first))
        _initialise(self.model, pose, config.noise, first)

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        return self._predict(persons)[0]

    def _predict(self, persons: PersonBatch) -> tuple[dict[str, Tensor], BodyPrediction]:
        number, dims = self.config.num_samples, self.model.dims
        z, noise = self.normal(number - 1, dims), self.config.noise * self.normal(dims)
        terms, prediction = prohmr_terms(self.model, persons, z, noise)
        scores = self.discriminator(*_bodies(prediction))
        return {**terms, "adversarial": prior_loss(scores, len(persons))}, prediction

    def training_step(self, _item: Any, _index: int) -> None:
        persons = self.persons()
        optimiser, critic_optimiser = self.optimizers()  # type: ignore[attr-defined]
        with self.autocast():
            terms, prediction = self._predict(persons)
            loss = weighted_sum(terms, self.weights)
        self.optimise(loss, optimiser)
        target = self.model.target(persons)[:, 1:]
        (betas,) = persons.need("betas")
        with self.autocast():
            real = self.discriminator(target, betas)
            fake = self.discriminator(*(part.detach() for part in _bodies(prediction)))
            critic = discriminator_loss(real.float(), fake.float())
        self.optimise(self.weights["adversarial"] * critic, critic_optimiser)
        self.log_terms({"loss": loss, **terms, "discriminator": critic})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Two AdamW, with weight decay on everything, as in the code."""
        rate, decay = self.config.learning_rate, self.config.weight_decay
        parts = (self.model.trained_parameters(), self.discriminator.parameters())
        return [torch.optim.AdamW(part, lr=rate, weight_decay=decay) for part in parts]


class ProHMRLiftingRecipe(Recipe):
    """Likelihood, and error of the mode.

    Args:
        config: a :class:`ProHMRLiftingRecipeConfig`.
        source: of persons with detected keypoints and joints.
    """

    Config = ProHMRLiftingRecipeConfig
    name = "prohmr_lifting"
    config: ProHMRLiftingRecipeConfig
    model: ProHMRLifting

    def __init__(self, config: ProHMRLiftingRecipeConfig, source: PersonSource) -> None:
        super().__init__(config, source)
        self.weights = dict(PROHMR_LIFTING_WEIGHTS)
        self.model = ProHMRLifting(config.model)
        many = source.sample(_STANDARDISATION, config.seed, "train")
        self.model.fit_standardisation(self.model.keypoints(many))
        first = many[: config.batch_size]
        _initialise(self.model, self.model.target(first).flatten(1), config.noise, first)

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        noise = self.config.noise * self.normal(len(self.config.model.joint_names), 3)
        return lifting_terms(self.model, persons, noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            self.model.trained_parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )


def _initialise(model: Any, x: Tensor, noise: float, persons: PersonBatch) -> None:
    """Set the ActNorms by a first batch x (N, D), with the noise of training: a joint that never
    turns has no other deviation (the code leaves the noise out)."""
    with torch.no_grad():
        cond = model.train().condition(persons)
    model.initialise(x + noise * torch.randn_like(x), cond)


def prohmr_terms(
    model: ProHMR, persons: PersonBatch, z: Tensor, noise: Tensor
) -> tuple[dict[str, Tensor], BodyPrediction]:
    """The terms of :data:`fasthyp.losses.PROHMR_WEIGHTS` but the adversarial one, and what was
    predicted, the mode first. Keypoints count in sides of the crop, joints in metres about the
    pelvis.

    Args:
        model: with a body, some of whose joints the batch knows.
        persons: with ``joints_3d``, ``joints_2d``, ``global_orient``, ``body_pose``, ``betas`` and
            what the model's condition needs.
        z: (B, S, D) latents of the random hypotheses.
        noise: (B, D) added to the true 6D pose for its likelihood.
    """
    joints_3d, joints_2d, betas = persons.need("joints_3d", "joints_2d", "betas")
    cond = model.condition(persons)
    prediction = _with_mode(model, cond, z)
    joints, _ = model.pose(prediction)
    points = model.project(joints, prediction.camera, persons) / 2
    names, ours, theirs = common_joints(model.body.joint_names, persons.joint_names)
    target = model.target(persons)
    log_prob, _ = model.log_prob((model.to_6d(target) + noise)[:, None], cond)
    annotated = joints_2d[:, theirs] / model.config.crop - 0.5
    each_betas = prediction.betas[:, None].expand(-1, points.shape[1], -1)
    errors = {
        "keypoints_2d": keypoint_loss(points[:, :, ours], annotated),
        "keypoints_3d": keypoint_loss(
            joints[:, :, ours], joints_3d[:, theirs], root=root_joints(names)
        ),
        "global_orient": parameter_loss(prediction.rotations[:, :, :1], target[:, :1]),
        "body_pose": parameter_loss(prediction.rotations[:, :, 1:], target[:, 1:]),
        "betas": parameter_loss(each_betas, betas),
        "orthonormality": orthonormality_loss(prediction.pose_6d, convention=model.convention),
    }
    terms = {"nll": -log_prob.mean()}
    for name, error in errors.items():
        terms[f"{name}_mode"], terms[f"{name}_exp"] = mode_and_expectation(error)
    return terms, prediction


def lifting_terms(model: ProHMRLifting, persons: PersonBatch, noise: Tensor) -> dict[str, Tensor]:
    """The terms of :data:`fasthyp.losses.PROHMR_LIFTING_WEIGHTS`: likelihood of the true skeleton,
    and absolute error of the mode summed over its numbers, metres; means over persons.

    Args:
        model: of the model.
        persons: with ``joints_3d`` and what the model's condition needs.
        noise: (B, J, 3) metres, added to the true joints for their likelihood.
    """
    cond = model.condition(persons)
    target = model.target(persons)
    mode, _ = model.decode(target.new_zeros(len(cond), 1, model.dims), cond)
    log_prob, _ = model.log_prob((target + noise).flatten(1)[:, None], cond)
    error, _ = mode_and_expectation(keypoint_loss(mode, target))
    return {"nll": -log_prob.mean(), "keypoints_3d_mode": error}


def common_joints(
    first: tuple[str, ...], second: tuple[str, ...]
) -> tuple[tuple[str, ...], list[int], list[int]]:
    """Names that are in both, in the order of the first, and where they are in each.

    Raises:
        ValueError: there is none.
    """
    names = tuple(name for name in first if name in second)
    if not names:
        raise ValueError(f"joints: expected some of {second}, got {first}")
    return names, [first.index(name) for name in names], [second.index(name) for name in names]


def _with_mode(model: BodyFlow, cond: Tensor, z: Tensor) -> BodyPrediction:
    """In two passes, as the code makes them: in training mode batch norms see either."""
    random, mode = model.decode(z, cond), model.decode(torch.zeros_like(z[:, :1]), cond)
    joined = {
        name: torch.cat([getattr(mode, name), getattr(random, name)], 1)
        for name in ("pose_6d", "rotations", "log_prob")
    }
    return BodyPrediction(betas=mode.betas, camera=mode.camera, **joined)


def _bodies(prediction: BodyPrediction) -> tuple[Tensor, Tensor]:
    """Rotations (B M, 23, 3, 3) and shapes (B M, 10) of all hypotheses."""
    turns = prediction.rotations[:, :, 1:].flatten(0, 1)
    return turns, prediction.betas.repeat_interleave(prediction.rotations.shape[1], 0)
