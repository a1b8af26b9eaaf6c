"""Training recipe of :class:`fasthyp.models.PoseINN`.

Wehrbein et al., "Probabilistic Monocular 3D Human Pose Estimation with Normalizing Flows", ICCV
2021, sections 3.3 (equation 9) and 4.2, and ``train.py`` of their code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fasthyp.data.persons import PersonBatch
from fasthyp.data.simulated_persons import PersonSource
from fasthyp.losses import (
    POSE_INN_ROOT,
    POSE_INN_WEIGHTS,
    PoseCritic,
    best_of_m_loss,
    critic_loss,
    generator_loss,
    gradient_penalty,
    heatmap_covariance_loss,
    latent_mmd_loss,
    pose_inn_positions,
    pose_l1_loss,
    weighted_sum,
)
from fasthyp.models.pose_inn import FIXED_DIM, NOISE_DIM, PoseINN, PoseINNConfig
from fasthyp.models.pose_inn_input import DETECTOR_JOINTS, normalise_pose_3d
from fasthyp.skeleton import H36M17_JOINTS
from fasthyp.train.recipe import Recipe, RecipeConfig


class PoseINNBatch(NamedTuple):
    """Persons as the network sees them.

    Attributes:
        pose: (B, 48) metres, the model's frame.
        pose_2d: (B, 32).
        gauss: (B, 78).
    """

    pose: Tensor
    pose_2d: Tensor
    gauss: Tensor

    @classmethod
    def of(cls, model: PoseINN, persons: PersonBatch) -> PoseINNBatch:
        (joints,) = persons.need("joints_3d")
        if persons.joint_names and persons.joint_names != H36M17_JOINTS:
            raise ValueError(f"persons: expected joints {H36M17_JOINTS}, got {persons.joint_names}")
        if joints.shape[1:] != (17, 3):
            got = tuple(joints.shape)
            raise ValueError(f"persons: expected joints_3d (B, 17, 3), got {got}")
        gauss, pose_2d = model.inputs(persons)
        pose = normalise_pose_3d(joints[:, 1:], metres=1.0).mT.flatten(1)
        return cls(pose, pose_2d, gauss)


class PoseINNNoise(NamedTuple):
    """Standard normal latents of a step.

    Attributes:
        target: (B, 16), what the MMD compares the latents of the forward pass with.
        generator: (B, 16), of the poses that the critic judges.
        hypotheses: (B, M, 16), of those whose spread and best count.
    """

    target: Tensor
    generator: Tensor
    hypotheses: Tensor


@dataclass(frozen=True)
class PoseINNWeights:
    """Of the terms of equation 9; a term of weight zero is left out of training.

    Attributes:
        l2d, mmd: of the forward pass.
        det, best_of_m, covariance, generator: of the inverse pass.
    """

    l2d: float = POSE_INN_WEIGHTS["l2d"]
    mmd: float = POSE_INN_WEIGHTS["mmd"]
    det: float = POSE_INN_WEIGHTS["det"]
    best_of_m: float = POSE_INN_WEIGHTS["best_of_m"]
    covariance: float = POSE_INN_WEIGHTS["covariance"]
    generator: float = POSE_INN_WEIGHTS["generator"]


@dataclass(frozen=True)
class PoseINNObjective:
    """The losses of the network and of its critic.

    Attributes:
        weights: of the terms.
        top_k: k of equation 8.
        official: as the authors' code where it differs from the paper: the MMD is the biased
            estimator, and the root, which is always right, counts in the best-of-M loss.
    """

    weights: PoseINNWeights = field(default_factory=PoseINNWeights)
    top_k: int = 5
    official: bool = False

    def losses(
        self,
        model: PoseINN,
        critic: nn.Module,
        batch: PoseINNBatch,
        noise: PoseINNNoise,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> dict[str, Tensor]:
        """The terms of equation 9 that have a weight, without it.

        The forward pass is one call; so is the inverse pass of all latents of all persons, with
        the condition computed once for each person. L_HM compares with the covariances in the
        condition, which are clipped (a failed fit may be of any size), as the authors' code does.
        ``gather`` makes the rows of all processes of those of one: the MMD, alone of the terms, is
        no mean over persons.
        """
        weights = self.weights
        terms: dict[str, Tensor] = {}
        latent, det = None, 0
        if weights.l2d or weights.mmd or weights.det:
            output = model(batch.pose, batch.gauss)[0]
            latent = output[:, :NOISE_DIM].detach()
            if weights.l2d:
                terms["l2d"] = pose_l1_loss(output[:, NOISE_DIM:], batch.pose_2d)
            if weights.mmd:
                target = torch.cat((noise.target, batch.pose_2d), 1)
                terms["mmd"] = latent_mmd_loss(
                    gather(output), gather(target), blocked=FIXED_DIM, official=self.official
                )
        latents = []
        if weights.det and latent is not None:
            latents.append(latent[:, None])
        if weights.generator:
            latents.append(noise.generator[:, None])
        if weights.best_of_m or weights.covariance:
            latents.append(noise.hypotheses)
        if not latents:
            return terms
        z = torch.cat(latents, 1)
        y = batch.pose_2d[:, None].expand(-1, z.shape[1], -1)
        poses = model.inverse(torch.cat((z, y), -1), batch.gauss)
        if weights.det:
            terms["det"] = pose_l1_loss(poses[:, 0], batch.pose)
            det = 1
        if weights.generator:
            terms["generator"] = generator_loss(critic(poses[:, det]))
        drawn = poses[:, -noise.hypotheses.shape[1] :]
        if weights.best_of_m:
            terms["best_of_m"] = best_of_m_loss(
                *(drawn.unflatten(-1, (3, 16)).mT, batch.pose.unflatten(-1, (3, 16)).mT),
                k=self.top_k,
                root=POSE_INN_ROOT,
                official=self.official,
            )
        if weights.covariance:
            covariance = batch.gauss.unflatten(1, (13, 6))[..., (3, 4, 4, 5)]
            terms["covariance"] = heatmap_covariance_loss(
                pose_inn_positions(drawn), covariance.unflatten(-1, (2, 2)), official=True
            )
        return terms

    @staticmethod
    def critic_losses(
        critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor
    ) -> dict[str, Tensor]:
        """WGAN-GP: poses (B, 48) real and fake, alpha (B, 1) uniform, where the slope is looked
        at."""
        scores = critic(torch.cat((real, fake)))
        return {
            "critic": critic_loss(scores[: len(real)], scores[len(real) :]),
            "gradient_penalty": gradient_penalty(critic, real, fake, alpha),
        }


_EPOCH = 482  # steps, of Human3.6M


@dataclass(frozen=True)
class PoseINNRecipeConfig(RecipeConfig):
    """Section 4.2 of the paper; a step has ``batch_size`` persons for the network and as many real
    and as many others for each of the critic's steps.

    Attributes:
        hypotheses: L, of each person, for L_HM and the best-of-M loss.
        top_k: of these the best, whose mean is compared with the truth.
        critic_steps: of the critic for one of the network.
        critic_hidden: width of the critic's kinematic path.
        clip_value: gradients of the network are clipped to plus and minus this.
        weights: of the terms; zero leaves a term out.
        official_code: as the authors' code where it differs from the paper, see
            :class:`PoseINNObjective`; and the condition network's gradients are not clipped.
        model: of the network.
    """

    steps: int = 155 * _EPOCH
    batch_size: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "step"
    milestones: tuple[int, ...] = (150 * _EPOCH,)
    decay: float = 0.5
    validate_every: int = _EPOCH
    validation_samples: int = 200
    hypotheses: int = 200
    top_k: int = 5
    critic_steps: int = 5
    critic_hidden: int = 1000
    clip_value: float = 15.0
    weights: PoseINNWeights = field(default_factory=PoseINNWeights)
    official_code: bool = False
    model: PoseINNConfig = field(default_factory=PoseINNConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_steps < 0:
            raise ValueError(f"critic_steps: expected at least 0, got {self.critic_steps}")
        if not 1 <= self.top_k <= self.hypotheses:
            raise ValueError(f"top_k: expected 1 to {self.hypotheses}, got {self.top_k}")
        if self.hypotheses < 2:
            raise ValueError(f"hypotheses: expected at least 2, got {self.hypotheses}")
        if self.clip_norm is not None:
            raise ValueError(f"clip_norm: expected None beside clip_value, got {self.clip_norm}")
        if not self.clip_value > 0:
            raise ValueError(f"clip_value: expected a positive number, got {self.clip_value}")

    @classmethod
    def official(cls) -> PoseINNRecipeConfig:
        """The authors' ``train.py``."""
        return cls(official_code=True, model=PoseINNConfig.official())

    @classmethod
    def small(cls) -> PoseINNRecipeConfig:
        """For minutes on a processor core: an eighth of the width and of the hypotheses, and a
        fiftieth of the steps at ten times the learning rate."""
        return cls(
            steps=1500,
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=50,
            validate_every=250,
            validation_size=512,
            hypotheses=25,
            critic_hidden=128,
            model=PoseINNConfig.small(),
        )


class PoseINNRecipe(Recipe):
    """Equation 9, and WGAN-GP for the critic: five steps of it for one of the network.

    The batches of the critic are persons of their own, as in the authors' code: one for the real
    poses and one for what the network makes of other persons.
    """

    Config: ClassVar[Any] = PoseINNRecipeConfig
    name = "pose_inn"
    monitor = "best_mm"
    detector = DETECTOR_JOINTS
    find_unused_parameters = True
    config: PoseINNRecipeConfig
    model: PoseINN

    def __init__(self, config: PoseINNRecipeConfig, source: PersonSource) -> None:
        super().__init__(config, source)
        self.automatic_optimization = False
        self.model = PoseINN(config.model)
        self.critic = PoseCritic(config.critic_hidden)
        self.objective = PoseINNObjective(config.weights, config.top_k, config.official_code)
        self.weights = asdict(config.weights)

    def configure_optimizers(self) -> Any:
        """Of the network and of the critic: Adam with the momenta of section 4.2."""
        return [
            self.adamw(module.parameters(), betas=(0.5, 0.9))
            for module in (self.model, self.critic)
        ]

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        noise = PoseINNNoise(
            self.normal(NOISE_DIM),
            self.normal(NOISE_DIM),
            self.normal(self.config.hypotheses, NOISE_DIM),
        )
        batch = PoseINNBatch.of(self.model, persons)
        return self.objective.losses(self.model, self.critic, batch, noise, self._gather)

    def training_step(self, _item: Any, _index: int) -> None:
        optimizer, critic_optimizer = self.optimizers()  # type: ignore[attr-defined]
        persons, *others = self._batches()
        terms: dict[str, Tensor] = {}
        if others and self.config.weights.generator:
            terms = self._train_critic(others, critic_optimizer)
        self.critic.requires_grad_(False)
        with self.autocast():
            found = self.losses(persons)
            loss = weighted_sum(found, self.weights)
        optimizer.zero_grad()
        self.manual_backward(loss)
        clipped = self.model.inn if self.config.official_code else self.model
        nn.utils.clip_grad_value_(clipped.parameters(), self.config.clip_value)
        optimizer.step()
        self.critic.requires_grad_(True)
        self.log_terms({"loss": loss, **found, **terms})

    def _train_critic(self, batches: list[PersonBatch], optimizer: Any) -> dict[str, Tensor]:
        real, other = batches[::2], PersonBatch.cat(batches[1::2])
        with torch.no_grad():  # the network stays as it is meanwhile: all at once
            _, pose_2d, gauss = PoseINNBatch.of(self.model, other)
            z = torch.cat([self.normal(NOISE_DIM) for _ in real])
            latent = torch.cat((z, pose_2d), 1)[:, None]
            fakes = self.model.inverse(latent, gauss)[:, 0].chunk(len(real))
        totals: dict[str, Tensor] = {}
        for persons, fake in zip(real, fakes, strict=True):
            pose = PoseINNBatch.of(self.model, persons).pose
            alpha = torch.special.ndtr(self.normal(1))
            terms = self.objective.critic_losses(self.critic, pose, fake, alpha)
            optimizer.zero_grad()
            self.manual_backward(terms["critic"] + terms["gradient_penalty"])
            optimizer.step()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() / len(real)
        return totals

    def _batches(self) -> list[PersonBatch]:
        """Of the network; and for each step of the critic the real ones, and those to sample."""
        number, size = 1 + 2 * self.config.critic_steps, self.config.batch_size
        persons = self.source.sample(number * size, self._seed, "train")
        parts = [persons[k * size : (k + 1) * size][self._rows] for k in range(number)]
        return [part.to(self.device) for part in parts]

    def _gather(self, rows: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return rows
        gathered: Any = self.all_gather(rows, sync_grads=True)
        return gathered.flatten(0, 1)
