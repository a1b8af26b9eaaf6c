"""The recipe of :class:`fasthyp.models.regression.Regression`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fasthyp.data.persons import PersonBatch
from fasthyp.data.simulated_persons import PersonSource
from fasthyp.models.regression import Regression
from fasthyp.skeleton import H36M17_JOINTS
from fasthyp.train.recipe import Recipe, RecipeConfig


@dataclass(frozen=True)
class RegressionRecipeConfig(RecipeConfig):
    """Adds the model's ``width``, ``depth`` and ``target`` to :class:`RecipeConfig`."""

    schedule: str = "cosine"
    warmup_steps: int = 100
    validation_samples: int = 1
    width: int = 512
    depth: int = 2
    target: str = "joints"


_NEEDED = {"body": ("global_orient", "body_pose", "betas")}


class RegressionRecipe(Recipe):
    """Mean distance of the joints in metres; of a body also the squared error of its rotations."""

    Config = RegressionRecipeConfig
    config: RegressionRecipeConfig
    model: Regression
    name = "regression"

    def __init__(self, config: RegressionRecipeConfig, source: PersonSource) -> None:
        super().__init__(config, source)
        person = source.sample(1, 0, "train")
        features, *_ = person.need("features", "joints_3d", *_NEEDED.get(config.target, ()))
        if person.joint_names != H36M17_JOINTS:
            raise ValueError(
                f"persons: expected Human3.6M's 17 joints, got {person.joint_names or 'others'}"
            )
        self.model = Regression(
            features=features.shape[1],
            width=config.width,
            depth=config.depth,
            target=config.target,
        )

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        features, truth = persons.need("features", "joints_3d")
        terms = {"joints": (self.model(features) - truth).norm(dim=-1).mean()}
        if self.config.target == "body":
            rotations, betas = self.model.parameters_of(features)
            orient, pose, shape = persons.need(*_NEEDED["body"])
            terms["orient"] = (rotations[:, 0] - orient).square().mean()
            terms["pose"] = (rotations[:, 1:] - pose).square().mean()
            terms["betas"] = 1e-3 * (betas - shape).square().mean()
        return terms
