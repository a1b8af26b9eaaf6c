"""Training recipe of :class:`fasthyp.models.PoseINN`.

Wehrbein et al., "Probabilistic Monocular 3D Human Pose Estimation with Normalizing Flows", ICCV
2021, sections 3.3 (equation 9) and 4.2, and ``train.py`` of their code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasthyp.body.joint_maps import H36M17_JOINTS
from fasthyp.data.persons import PersonBatch
from fasthyp.losses import (
    POSE_INN_ROOT,
    POSE_INN_WEIGHTS,
    best_of_m_loss,
    critic_loss,
    generator_loss,
    gradient_penalty,
    heatmap_covariance_loss,
    latent_mmd_loss,
    pose_inn_positions,
    pose_l1_loss,
)
from fasthyp.models.pose_inn import FIXED_DIM, NOISE_DIM, PoseINN
from fasthyp.models.pose_inn_input import normalise_pose_3d


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

    @classmethod
    def draw(cls, persons: int, hypotheses: int, generator: torch.Generator) -> PoseINNNoise:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device)

        shape = (persons, NOISE_DIM)
        return cls(normal(*shape), normal(*shape), normal(persons, hypotheses, NOISE_DIM))


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
        self, model: PoseINN, critic: nn.Module, batch: PoseINNBatch, noise: PoseINNNoise
    ) -> dict[str, Tensor]:
        """The terms of equation 9 that have a weight, without it.

        The forward pass is one call; so is the inverse pass of all latents of all persons, with
        the condition computed once for each person. L_HM compares with the covariances in the
        condition, which are clipped (a failed fit may be of any size), as the authors' code does.
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
                    output, target, blocked=FIXED_DIM, official=self.official
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
