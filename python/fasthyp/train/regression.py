"""The recipe of :class:`fasthyp.models.regression.Regression`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fasthyp.data.persons import PersonBatch
from fasthyp.data.simulated_persons import PersonSource
from fasthyp.models.regression import Regression
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


class RegressionRecipe(Recipe):
    """Mean distance of the joints in metres; of a body also the squared error of its rotations."""

    Config = RegressionRecipeConfig
    config: RegressionRecipeConfig
    model: Regression
    name = "regression"

    def __init__(self, config: RegressionRecipeConfig, source: PersonSource) -> None:
        super().__init__(config, source)
        (features,) = source.sample(1, 0, "train").need("features")
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
            orient, pose, shape = persons.need("global_orient", "body_pose", "betas")
            terms["orient"] = (rotations[:, 0] - orient).square().mean()
            terms["pose"] = (rotations[:, 1:] - pose).square().mean()
            terms["betas"] = 1e-3 * (betas - shape).square().mean()
        return terms
