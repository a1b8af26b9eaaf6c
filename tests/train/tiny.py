"""Small recipes on synthetic people, for the tests of the runner."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.data import PersonBatch, PersonSource, SimulatedPersons, stick_poses
from fasthyp.models.regression import Regression
from fasthyp.train.recipe import Recipe, RecipeConfig
from fasthyp.train.regression import RegressionRecipe, RegressionRecipeConfig
from tests.synthetic import people17

TINY = RegressionRecipeConfig(
    steps=6,
    batch_size=16,
    validate_every=3,
    validation_size=300,
    schedule="constant",
    warmup_steps=2,
    log_every=1,
    clip_norm=1.0,
    width=16,
)


def source() -> SimulatedPersons:
    parts = ("train", "validation", "test")
    return SimulatedPersons({part: stick_poses(people17(40, k)) for k, part in enumerate(parts)})


class NoisyRecipe(RegressionRecipe):
    """Draws noise in all the ways there are, each of which a resumed run must repeat."""

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        terms = super().losses(persons)
        noise = self.normal(3).square().mean()
        dropped = nn.functional.dropout(self.model.head.weight, 0.5).square().mean()
        seeded = torch.rand((), generator=torch.Generator().manual_seed(self.new_seed()))
        return {**terms, "noise": noise * dropped * seeded}


class SlowRecipe(NoisyRecipe):
    """Slow enough to be killed."""

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        time.sleep(float(os.environ["SECONDS_PER_STEP"]))
        return super().losses(persons)


@dataclass(frozen=True)
class AdversarialConfig(RecipeConfig):
    """Steps of the critic for one of the model."""

    critic_steps: int = 2


class AdversarialRecipe(Recipe):
    """A critic of poses and a model by turns, with optimisers of their own."""

    Config = AdversarialConfig
    config: AdversarialConfig
    name = "adversarial"
    model: Regression
    find_unused_parameters = True

    def __init__(self, config: AdversarialConfig, source: PersonSource) -> None:
        super().__init__(config, source)
        self.automatic_optimization = False
        self.model = Regression(width=16)
        self.critic = nn.Sequential(nn.Linear(51, 8), nn.ReLU(), nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        return [
            self.adamw(self.model.parameters()),
            self.adamw(self.critic.parameters(), lr=2 * self.config.learning_rate),
        ]

    def training_step(self, _item: Any, _index: int) -> None:
        persons = self.persons()
        features, truth = persons.need("features", "joints_3d")
        generator, critic = self.optimizers()
        for _ in range(self.config.critic_steps):
            fake = self.model(features).detach() + 0.01 * self.normal(17, 3)
            gap = self.critic(fake.flatten(1)).mean() - self.critic(truth.flatten(1)).mean()
            self.optimise(gap, critic)
        pose = self.model(features)
        joints = (pose - truth).norm(dim=-1).mean()
        loss = joints - 0.1 * self.critic(pose.flatten(1)).mean()
        self.optimise(loss, generator)
        self.log_terms({"loss": loss, "joints": joints, "gap": gap})
