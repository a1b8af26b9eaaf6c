"""Training recipe of :class:`fasthyp.models.POCO`, and its self-improvement on pseudo truth.

Dwivedi et al., "POCO", 3DV 2024, sections 3.3 (equations 6 and 7), 4 and 5.4, and the released
configuration of POCO-CLIFF.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fasthyp.data.persons import PersonBatch
from fasthyp.data.simulated_persons import PersonSource
from fasthyp.losses import (
    POCO_CLIFF_WEIGHTS,
    POCO_WEIGHTS,
    camera_scale_loss,
    flow_residual_nll,
    image_keypoint_loss,
    pose_residual_loss,
    residual_log_likelihood_loss,
)
from fasthyp.models.flow_model import PosedBody
from fasthyp.models.poco import POCO, POCOConfig, POCOPrediction, rotations
from fasthyp.train.recipe import Recipe, RecipeConfig, run

_MEAN_PERSONS, _MEAN_SEED = 5000, 2
OBJECTIVES = ("paper", "code", "likelihood")


@dataclass(frozen=True)
class POCORecipeConfig(RecipeConfig):
    """Settings of :class:`POCORecipe`: batch size, learning rate and steps are the paper's.

    Training has three stages: the regressor alone (for the paper a published one, so none), all
    of POCO, and the scale network and the error density with the regressor frozen.

    Attributes:
        model: of the network.
        pretrain_steps, joint_steps: of the first two stages; what is left of ``steps`` is the
            third.
        objective: ``"paper"``, equation 6 with the three weights below; ``"code"``, the released
            configuration's: the mean squared error of the rotations and the likelihood of the
            flow, weighted by ``POCO_CLIFF_WEIGHTS``. Both count log sigma once for a part, whose
            residual has nine numbers, so that the likelihood rewards a larger sigma and a narrower
            flow; ``"likelihood"`` is the code's with the likelihood of equation 4, per number.
        flow_weight, base_weight, sigma_weight: lambda of equation 6.
        conditioned: share of the persons whose scale network is shown the true pose; 0 in the
            paper, which does not speak of it, a quarter of Human3.6M in the released configuration.
    """

    steps: int = 60_000
    batch_size: int = 64
    learning_rate: float = 3e-6
    weight_decay: float = 0.0
    validation_samples: int = 1
    model: POCOConfig = field(default_factory=POCOConfig)
    pretrain_steps: int = 0
    joint_steps: int = 50_000
    objective: str = "paper"
    flow_weight: float = POCO_WEIGHTS["flow"]
    base_weight: float = POCO_WEIGHTS["base"]
    sigma_weight: float = POCO_WEIGHTS["sigma"]
    conditioned: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        if not 0 <= self.conditioned <= 1:
            raise ValueError(f"conditioned: expected 0 to 1, got {self.conditioned}")

    @classmethod
    def small(cls, **changes: Any) -> POCORecipeConfig:
        """For minutes on one processor, from scratch."""
        settings: dict[str, Any] = {
            **{"steps": 4000, "pretrain_steps": 1000, "joint_steps": 2200, "batch_size": 128},
            **{"learning_rate": 1e-3, "schedule": "cosine", "clip_norm": 10.0},
            **{"objective": "likelihood", "model": POCOConfig.small()},
        }
        return cls(**{**settings, **changes})


class POCORecipe(Recipe):
    """How :class:`fasthyp.models.POCO` is trained.

    Of several processes each has the batch norm (PARE's, the trunk's) of its own share of a batch.

    Args:
        config: a :class:`POCORecipeConfig`.
        source: of persons with rotations, shape, 2D joints and a camera.
        body: what the model poses; the stick body of the simulated persons unless told.
        backbone: of the model; without one, features of another width than the head's pass through
            a trunk.
    """

    Config = POCORecipeConfig
    config: POCORecipeConfig
    name: ClassVar[str] = "poco"
    monitor: ClassVar[str] = "nll"
    find_unused_parameters: ClassVar[bool] = True
    model: POCO

    def __init__(
        self,
        config: POCORecipeConfig,
        source: PersonSource,
        body: PosedBody | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__(config, source)
        persons = source.sample(_MEAN_PERSONS, _MEAN_SEED, "train")
        features, betas = persons.need("features", "betas")
        settings = config.model if body else replace(config.model, body="stick")
        if backbone is None and features.ndim == 2 and features.shape[1] != settings.features:
            settings = replace(settings, trunk_inputs=features.shape[1])
        self.model = POCO(settings, body=body, backbone=backbone)
        self.model.head.start_at(rotations(persons).mean(0), betas.mean(0))
        self.weights = {**POCO_CLIFF_WEIGHTS, "residual": 60.0}

    @property
    def stage(self) -> str:
        """``"pretrain"``, ``"joint"`` or ``"frozen"``."""
        joint = self.config.pretrain_steps
        if self.step < joint:
            return "pretrain"
        return "joint" if self.step < joint + self.config.joint_steps else "frozen"

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        truth = rotations(persons)
        stage = self.stage
        if stage == "frozen":
            return self.uncertainty_losses(self._frozen_prediction(persons, truth), truth)
        number = round(self.config.conditioned * len(persons))
        conditioned = torch.arange(len(persons), device=truth.device) < number
        shown = conditioned if number and stage == "joint" else None
        predicted = self.model.predict(persons, shown)
        terms = self.body_losses(predicted, persons)
        if stage == "pretrain":
            terms["pose"] = (predicted.pose - truth).square().mean()
            return terms
        return {**terms, **self.uncertainty_losses(predicted, truth, shown)}

    def body_losses(self, predicted: POCOPrediction, persons: PersonBatch) -> dict[str, Tensor]:
        """L_beta, L_3D and L_2D of equation 7, the camera's and, of persons and bodies with
        vertices, theirs; as POCO's code has them."""
        model = self.model
        joints, seen, betas, focal = persons.need("joints_3d", "joints_2d", "betas", "focal_length")
        vertices = persons.vertices is not None
        found, mesh = model.posed(predicted.pose, predicted.betas, vertices)
        names = model.joint_names
        known = [persons.joint_names.index(name) for name in names]
        joints, seen = joints[:, known], seen[:, known]
        size = torch.full_like(focal, model.config.crop_size)
        # The code takes the diagonal of the image for the focal length.
        image = (focal / 2**0.5)[:, None].expand(-1, 2)
        if model.config.head != "cliff":
            image = size[:, None].expand(-1, 2)
        terms = {
            "betas": (predicted.betas - betas).square().mean(),
            "keypoints_3d": (found - joints).square().mean(),
            "keypoints_2d": image_keypoint_loss(
                model.joints_2d(predicted, found, persons),
                seen,
                torch.ones_like(seen[..., 0]),
                image,
                size,
            ),
            "camera": camera_scale_loss(predicted.camera[:, 0]),
        }
        if mesh is not None and persons.vertices is not None:
            terms["vertices"] = (mesh - persons.vertices).abs().mean()
        return terms

    def uncertainty_losses(
        self, predicted: POCOPrediction, truth: Tensor, conditioned: Tensor | None = None
    ) -> dict[str, Tensor]:
        """L_NF: equation 6, or what the code has for it."""
        config = self.config
        log_prob = self.model.log_prob(predicted, truth)
        pose, sigma = predicted.pose, predicted.sigma
        if config.objective == "paper":
            residual = residual_log_likelihood_loss(
                *(pose, truth, sigma, log_prob),
                flow_weight=config.flow_weight,
                base_weight=config.base_weight,
                sigma_weight=config.sigma_weight,
            )
            return {"residual": residual}
        if config.objective == "likelihood":
            return {
                "pose": (pose - truth).square().mean(),
                "flow": self._nll(predicted, log_prob).mean(),
            }
        return {
            "pose": pose_residual_loss(pose, truth, sigma, conditioned=conditioned, official=True),
            "flow": flow_residual_nll(log_prob, sigma),
        }

    def _nll(self, predicted: POCOPrediction, log_prob: Tensor) -> Tensor:
        """The negative log-likelihood of the residuals per number, of each person (B,)."""
        log_sigma = predicted.sigma.log().flatten(1).mean(1)
        return log_sigma - log_prob.mean(1) / self.model.config.flow_dim

    def _frozen_prediction(self, persons: PersonBatch, truth: Tensor) -> POCOPrediction:
        """The regressor as it is, without gradients, and a scale network that learns."""
        parts = (self.model.backbone, self.model.trunk, self.model.head)
        modes = [(part, part.training) for part in parts if part is not None]
        for part, _ in modes:
            part.eval()
        with torch.no_grad():
            found = self.model.predict(persons)
        for part, mode in modes:
            part.train(mode)
        return replace(found, sigma=self.model.scale(found.features, found.pose))

    def validate(self, persons: PersonBatch) -> dict[str, Tensor]:
        """And the whole-body uncertainty, and ``nll``, of the residuals per number, which says of
        pose and uncertainty together how good they are."""
        predicted = self.model.predict(persons)
        log_prob = self.model.log_prob(predicted, rotations(persons))
        return {
            **super().validate(persons),
            "uncertainty": self.model.whole_body_uncertainty(predicted),
            "nll": self._nll(predicted, log_prob),
        }


class WithPseudoTruth:
    """A :class:`PersonSource` of which a share is replaced by persons with pseudo truth.

    Args:
        source: of persons with truth.
        pseudo: persons, drawn at random.
        share: of each training batch.
    """

    def __init__(self, source: PersonSource, pseudo: PersonBatch, share: float) -> None:
        if not 0 <= share <= 1 or not len(pseudo):
            raise ValueError(
                f"share, pseudo: expected 0 to 1 of persons, got {share} of {len(pseudo)}"
            )
        self.source, self.pseudo, self.share = source, pseudo, share

    def sample(self, number: int, seed: int, part: str) -> PersonBatch:
        """As :meth:`PersonSource.sample`."""
        told = round(self.share * number) if part == "train" else 0
        known = self.source.sample(number - told, seed, part)
        if not told:
            return known
        generator = torch.Generator().manual_seed(seed)
        drawn = self.pseudo[torch.randint(len(self.pseudo), (told,), generator=generator)]
        return PersonBatch.cat([known, drawn])


def self_improve(
    recipe: POCORecipe,
    unlabelled: PersonBatch,
    out_dir: str | os.PathLike[str],
    config: POCORecipeConfig,
    keep_below: float | None = None,
    share: float = 0.25,
    progress: bool = True,
) -> tuple[POCO, Tensor]:
    """Finetune a trained recipe's model on its own bodies of other persons, where it is sure.

    Section 5.4, task 1, of the paper: predict, keep what is below the threshold, add it to the
    training data, train again from where the model is.

    Args:
        recipe: trained.
        unlabelled: persons as the recipe's, of which the truth is not looked at.
        out_dir: of the second training.
        config: of the second training; its model is the first one's.
        keep_below: whole-body uncertainty; that of the model's configuration unless told.
        share: of each batch that has pseudo truth. The paper does not give its own.

    Returns:
        The finetuned model; (B,) bool, which of the persons were kept.

    Raises:
        ValueError: another model's configuration, or nothing is kept.
    """
    if config.model != recipe.config.model:
        raise ValueError("config: expected the model of the recipe")
    pseudo, kept = recipe.model.curate(unlabelled, keep_below)
    if not len(pseudo):
        raise ValueError("keep_below: expected a threshold that keeps some persons, kept none")
    source = WithPseudoTruth(recipe.source, pseudo, share)
    again = POCORecipe(config, source, recipe.model.body, recipe.model.backbone)
    again.model.load_state_dict(recipe.model.state_dict())
    again.train()  # the backbone, too
    trained = run(again, Path(out_dir), progress=progress)
    assert isinstance(trained, POCO)
    return trained, kept
