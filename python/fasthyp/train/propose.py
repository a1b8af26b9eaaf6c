"""Training recipe of :class:`fasthyp.models.ProPose`: two phases in turn.

Han, Kim and Lee, "ProPose", AAAI 2025, algorithm 1 and equations 4 to 15.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fasthyp.data.persons import PersonBatch
from fasthyp.data.simulated_persons import PersonSource
from fasthyp.losses import (
    PROPOSE_WEIGHTS,
    best_of_m_loss_streamed,
    energy_discriminator_loss,
    energy_generator_loss,
    joint_distance_loss,
    mode_to_mode_loss,
    negative_log_likelihood,
    pulling_away_term,
    weighted_sum,
)
from fasthyp.models.propose import ProPose, ProPoseConfig
from fasthyp.train.recipe import Recipe, RecipeConfig

_STANDARDISATION_PERSONS, _STANDARDISATION_SEED = 5000, 2


@dataclass(frozen=True)
class ProPoseRecipeConfig(RecipeConfig):
    """Settings of :class:`ProPoseRecipe`.

    The paper gives none of their values, and no batch size or optimiser; where it names a symbol,
    that is in brackets. A step is one batch of either phase.

    Attributes:
        model: of the networks.
        phase_1_steps, phase_2_steps: [N_p1, N_p2] batches of a phase before the other's turn.
        flow_learning_rate: [beta] of the flow; ``learning_rate`` [alpha] is that of the others.
        margin: [m] of the discriminator's energy in metres, summed over joints.
        skip: [b] share of the first phase's batches without the bidirectional loss.
        hypotheses, best: [L, k] poses drawn for the best-of-M loss, and how many count.
        adversarial: whether there is a discriminator, and the pulling-away term.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    clip_norm: float | None = 10.0
    validation_samples: int = 50
    model: ProPoseConfig = field(default_factory=ProPoseConfig)
    phase_1_steps: int = 20
    phase_2_steps: int = 20
    flow_learning_rate: float = 1e-3
    margin: float = 2.0
    skip: float = 0.5
    hypotheses: int = 10
    best: int = 3
    adversarial: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("phase_1_steps", "phase_2_steps", "hypotheses", "best"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.best > self.hypotheses:
            raise ValueError(f"best: expected at most {self.hypotheses}, got {self.best}")
        if not 0 <= self.skip <= 1:
            raise ValueError(f"skip: expected 0 to 1, got {self.skip}")
        if not self.margin > 0:
            raise ValueError(f"margin: expected a positive number, got {self.margin}")

    @classmethod
    def small(cls, **changes: Any) -> ProPoseRecipeConfig:
        """For minutes on one processor."""
        settings = {"steps": 4000, "model": ProPoseConfig.small()}
        return cls(**{**settings, **changes})


class ProPoseRecipe(Recipe):
    """How :class:`fasthyp.models.ProPose` is trained: algorithm 1, with the discriminator that the
    algorithm leaves out.

    In the first phase encoder and decoder of 3D poses learn, and the discriminator against them;
    in the second the autoencoder of 2D poses and the flow. Of several processes each takes the
    pulling-away term of its own share of a batch; all else is as of one process.
    """

    Config = ProPoseRecipeConfig
    config: ProPoseRecipeConfig
    name: ClassVar[str] = "propose"
    find_unused_parameters: ClassVar[bool] = True
    model: ProPose

    def __init__(self, config: ProPoseRecipeConfig, source: PersonSource) -> None:
        super().__init__(config, source)
        self.automatic_optimization = False
        self.model = ProPose(config.model)
        persons = source.sample(_STANDARDISATION_PERSONS, _STANDARDISATION_SEED, "train")
        self.model.fit_standardisation(self._truth(persons))
        self.weights = dict(PROPOSE_WEIGHTS)  # pickled for several processes

    @property
    def phase(self) -> int:
        """1 or 2."""
        config = self.config
        turn = self.step % (config.phase_1_steps + config.phase_2_steps)
        return 1 if turn < config.phase_1_steps else 2

    def configure_optimizers(self) -> Any:
        """Of PILGD learner, discriminator, PAGD learner and flow."""
        model = self.model
        return [
            self.adamw(iter(model.pilgd_parameters())),
            self.adamw(model.discriminator.parameters()),
            self.adamw(iter(model.pagd_parameters())),
            self.adamw(model.flow.parameters(), lr=self.config.flow_learning_rate),
        ]

    def training_step(self, _item: Any, _index: int) -> None:
        persons = self.persons()
        optimizers: Any = self.optimizers()
        pilgd, discriminator, pagd, flow = optimizers
        if self.phase == 1:
            terms, discriminated = self.phase_1(persons)
            loss = weighted_sum(terms, self.weights)
            self.optimise(loss, pilgd)
            if discriminated is not None:
                self.optimise(self.weights["discriminator"] * discriminated, discriminator)
                terms["discriminator"] = discriminated
        else:
            terms = self.phase_2(persons)
            loss = weighted_sum(terms, self.weights)
            self.optimise(
                loss, flow, [*self.model.pagd_parameters(), *self.model.flow.parameters()]
            )
            pagd.step()
            pagd.zero_grad()
        self.log_terms({"loss": loss, **terms})

    def phase_1(self, persons: PersonBatch) -> tuple[dict[str, Tensor], Tensor | None]:
        """L_recon3D, L_Bi, L_G and L_PT; and L_D, of detached poses."""
        config, model = self.config, self.model
        pose, pose_2d = self._truth(persons), model.pose_2d(persons)
        mean = model.encode(pose, pose_2d)
        noise = self.normal(config.model.latent)
        again = model.decode(mean + config.model.pilgd_scale * noise, pose_2d)
        terms = {"recon_3d": joint_distance_loss(again, pose)}
        discriminated = None
        if config.adversarial:
            terms["generator"] = energy_generator_loss(model.energy(again, pose_2d))
            terms["pulling_away"] = pulling_away_term(mean)
            discriminated = energy_discriminator_loss(
                model.energy(pose, pose_2d),
                model.energy(again.detach(), pose_2d),
                margin=config.margin,
            )
        generator = torch.Generator().manual_seed(self.new_seed())
        if float(torch.rand((), generator=generator)) >= config.skip:
            terms["bidirectional"] = self.bidirectional(pose, pose_2d)
        return terms, discriminated

    def bidirectional(self, pose: Tensor, pose_2d: Tensor) -> Tensor:
        """L_BoM + L_rand, equations 12 and 13, of what the sampler gives the decoder."""
        config, model = self.config, self.model
        drawn = model.sample_latents(
            *(pose_2d, config.hypotheses + 1, self.new_seed(), False), image_offset=self._rows_from
        )
        best = best_of_m_loss_streamed(
            lambda latents: model.decode(latents, pose_2d),
            drawn[:, :-1],
            pose,
            k=config.best,
            norm="l2",
        )
        return best + joint_distance_loss(model.decode(drawn[:, -1], pose_2d), pose)

    def phase_2(self, persons: PersonBatch) -> dict[str, Tensor]:
        """L_recon2D, L_NLL and L_m2m, of PILGDs that do not learn."""
        model, latent = self.model, self.config.model.latent
        pose_2d = model.pose_2d(persons)
        with torch.no_grad():
            mean = model.encode(self._truth(persons), pose_2d)
            drawn = mean + self.config.model.pilgd_scale * self.normal(latent)
        base_mean, base_std, again = model.base(pose_2d)
        # Means and draws in one pass through the flow.
        mapped, log_det = model.to_base(torch.cat([drawn, mean]), pose_2d.repeat(2, 1))
        rows = len(mean)
        return {
            "recon_2d": joint_distance_loss(
                again.unflatten(1, (-1, 2)), pose_2d.unflatten(1, (-1, 2)), norm="l1"
            ),
            "nll": negative_log_likelihood(mapped[:rows], log_det[:rows], base_mean, base_std),
            "mode_to_mode": mode_to_mode_loss(mapped[rows:], base_mean),
        }

    @property
    def _rows_from(self) -> int:
        """The first of this process' persons in the batch."""
        return self._rows.start or 0

    def _truth(self, persons: PersonBatch) -> Tensor:
        (joints,) = persons.need("joints_3d")
        names = self.config.model.joint_names
        if persons.joint_names == names:
            return joints
        missing = [name for name in names if name not in persons.joint_names]
        if missing:
            raise ValueError(f"persons: expected joint {missing[0]!r} among {persons.joint_names}")
        return joints[:, [persons.joint_names.index(name) for name in names]]
