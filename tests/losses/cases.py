"""One call of every loss function, for the tests of what all of them promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasthyp import losses


@dataclass
class Case:
    """``function(*tensors.values(), **options)``; ``plain`` names tensors without a gradient,
    ``own_size`` those whose length is their own, ``any_dims`` those that may have more dimensions.
    """

    function: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    module: type | None = None
    options: dict[str, Any] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    finite_at_zero: bool = True
    own_size: tuple[str, ...] = ()
    any_dims: tuple[str, ...] = ()

    def __call__(self, **replaced: Any) -> Tensor:
        return self.function(*{**self.tensors, **replaced}.values(), **self.options)


def numbers(*shape: int, seed: int = 0, low: float = -1, high: float = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def flags(*shape: int, seed: int = 0) -> Tensor:
    value = numbers(*shape, seed=seed) > -0.3
    value.view(-1)[0], value.view(-1)[-1] = True, False
    return value


def covariances(*shape: int) -> Tensor:
    root = numbers(*shape, 2, 2, seed=5, low=0.5, high=3)
    return root @ root.mT


def linear(points: Tensor) -> Tensor:
    return (points.flatten(1) ** 2).sum(1, keepdim=True) / 3


def make(latents: Tensor) -> Tensor:
    return latents.sin().unflatten(-1, (4, 3))


B, S, J = 2, 5, 4

CASES: dict[str, Case] = {
    "nll": Case(
        losses.negative_log_likelihood,
        {
            **{"z": numbers(3, 4), "log_det": numbers(3), "base_mean": numbers(3, 4, seed=1)},
            **{"base_std": numbers(3, 4, low=0.5, high=2), "valid": flags(3)},
        },
        losses.NegativeLogLikelihood,
        {"per_dim": True},
        masks=("valid",),
        finite_at_zero=False,  # a standard deviation of zero
    ),
    "pose_l1": Case(
        losses.pose_l1_loss,
        {"predicted": numbers(3, 6), "target": numbers(3, 6, seed=1)},
        losses.PoseL1Loss,
    ),
    "joint_distance": Case(
        losses.joint_distance_loss,
        {"predicted": numbers(3, 6, 3), "target": numbers(3, 6, 3, seed=1)},
        losses.JointDistanceLoss,
    ),
    "covariance": Case(
        losses.heatmap_covariance_loss,
        {"positions": 0.01 * numbers(B, S, J, 2), "covariance": covariances(B, J)},
        losses.HeatmapCovarianceLoss,
        {"threshold": 1.5},
    ),
    "best_of_m": Case(
        losses.best_of_m_loss,
        {"hypotheses": numbers(B, S, J, 3), "target": numbers(B, J, 3, seed=1)},
        losses.BestOfMLoss,
        {"k": 2, "root": (0, 1), "chunk": 2},
    ),
    "best_of_m_l2": Case(
        losses.best_of_m_loss,
        {"hypotheses": numbers(B, S, J, 3), "target": numbers(B, J, 3, seed=1)},
        losses.BestOfMLoss,
        {"k": 1, "norm": "l2"},
    ),
    "critic": Case(
        losses.critic_loss,
        {"real_scores": numbers(3, 1), "fake_scores": numbers(4, 1)},
        losses.CriticLoss,
        own_size=("fake_scores",),
        any_dims=("real_scores", "fake_scores"),
    ),
    "generator": Case(
        losses.generator_loss,
        {"fake_scores": numbers(4, 1)},
        losses.GeneratorLoss,
        any_dims=("fake_scores",),
    ),
    "latent_mmd": Case(
        losses.latent_mmd_loss,
        {"output": numbers(5, 4), "target": numbers(5, 4, seed=1)},
        losses.LatentMMDLoss,
        {"blocked": 0},
        own_size=("target",),
    ),
    "heatmap_mmd": Case(
        losses.heatmap_mmd_loss,
        {
            **{"predicted": numbers(B, S, J, 2), "samples": numbers(B, S, J, 2, seed=1)},
            "keypoints": numbers(B, J, 2),
            "validity": losses.JointValidity(flags(B, J), flags(B, J, seed=3)),  # type: ignore
        },
        losses.HeatmapMMDLoss,
        plain=("validity",),
    ),
    "mask": Case(
        losses.mask_loss,
        {
            **{"predicted": 0.7 * numbers(B, S, J, 2), "targets": numbers(B, S, J, 2, seed=1)},
            **{"usable": flags(B, S, J), "mask": torch.zeros(B, 20, 20), "hidden": flags(B, J)},
        },
        losses.MaskLoss,
        masks=("usable", "mask", "hidden"),
    ),
    "keypoint": Case(
        losses.keypoint_loss,
        {
            **{"predicted": numbers(B, S, J, 3), "target": numbers(B, J, 3, seed=1)},
            "confidence": flags(B, J),
        },
        losses.KeypointLoss,
        {"root": (2,)},
        masks=("confidence",),
    ),
    "parameter": Case(
        losses.parameter_loss,
        {
            **{"predicted": numbers(B, S, J, 3), "target": numbers(B, J, 3, seed=1)},
            "valid": torch.tensor([True, False]),
        },
        losses.ParameterLoss,
        masks=("valid",),
    ),
    "camera": Case(
        losses.camera_scale_loss,
        {"scale": 0.1 * numbers(4)},
        losses.CameraScaleLoss,
        any_dims=("scale",),
    ),
    "orthonormality": Case(
        losses.orthonormality_loss,
        {"pose_6d": numbers(B, 12)},
        losses.OrthonormalityLoss,
        any_dims=("pose_6d",),
    ),
    "prior": Case(losses.prior_loss, {"scores": numbers(4, 25)}, losses.PriorLoss),
    "discriminator": Case(
        losses.discriminator_loss,
        {"real_scores": numbers(4, 25), "fake_scores": numbers(2, 25)},
        losses.DiscriminatorLoss,
        own_size=("fake_scores",),
    ),
    "geman_mcclure": Case(
        losses.geman_mcclure,
        {"residual": 3 * numbers(6)},
        losses.GemanMcClure,
        {"sigma": 2.0},
        any_dims=("residual",),
    ),
    "flow_prior": Case(losses.flow_prior, {"z": numbers(3, 4)}, any_dims=("z",)),
    "keypoint_fitting": Case(
        losses.keypoint_fitting_loss,
        {
            **{"joints": numbers(B, J, 3), "keypoints": 50 * numbers(B, J, 2)},
            **{"confidence": numbers(B, J, low=0), "translation": numbers(B, 3, low=4, high=5)},
            **{"focal_length": numbers(B, 2, low=90, high=99), "camera_center": numbers(B, 2)},
            **{"image_size": numbers(B, 2, low=200, high=300), "z": numbers(B, 3)},
            "betas": numbers(B, 2),
        },
        losses.KeypointFittingLoss,
        plain=("confidence",),
        masks=("confidence",),
        finite_at_zero=False,  # a joint in the camera
    ),
    "multiview": Case(
        losses.multiview_consistency_loss,
        {"body_pose": numbers(B, J, 3, 3), "z": numbers(B, 3)},
        losses.MultiviewConsistencyLoss,
        {"consistency_weight": 2.0},
    ),
    "residual_gaussian": Case(
        losses.residual_nll,
        {
            **{"predicted": numbers(3, J, 3, 3), "target": numbers(3, J, 3, 3, seed=1)},
            **{"sigma": numbers(3, J, low=0.5, high=2), "valid": flags(3)},
        },
        losses.ResidualNLL,
        masks=("valid",),
        finite_at_zero=False,  # a standard deviation of zero
    ),
    "residual_laplace": Case(
        losses.residual_nll,
        {
            **{"predicted": numbers(3, J), "target": numbers(3, J, seed=1)},
            "sigma": numbers(3, J, low=0.5, high=2),
        },
        losses.ResidualNLL,
        {"base": "laplace", "constant": True},
        finite_at_zero=False,
    ),
    "flow_residual": Case(
        losses.flow_residual_nll,
        {"log_prob": numbers(3, J), "sigma": numbers(3, J, 3, 3, low=0.5), "valid": flags(3)},
        losses.FlowResidualNLL,
        masks=("valid",),
        finite_at_zero=False,
    ),
    "residual_log_likelihood": Case(
        losses.residual_log_likelihood_loss,
        {
            **{"predicted": numbers(3, J, 3, 3), "target": numbers(3, J, 3, 3, seed=1)},
            **{"sigma": numbers(3, J, low=0.5, high=2), "log_prob": numbers(3, J)},
            "valid": flags(3),
        },
        losses.ResidualLogLikelihoodLoss,
        masks=("valid",),
        finite_at_zero=False,
    ),
    "pose_residual": Case(
        losses.pose_residual_loss,
        {
            **{"predicted": numbers(3, J, 3, 3), "target": numbers(3, J, 3, 3, seed=1)},
            **{"sigma": numbers(3, J, low=0.5, high=2), "valid": torch.tensor([1, 1, 0])},
            "conditioned": torch.tensor([0, 1, 1]),
        },
        losses.PoseResidualLoss,
        masks=("valid", "conditioned"),
        finite_at_zero=False,
    ),
    "image_keypoint": Case(
        losses.image_keypoint_loss,
        {
            **{"predicted": numbers(B, J, 2), "target": numbers(B, J, 2, seed=1)},
            **{"confidence": flags(B, J), "image_size": numbers(B, 2, low=4, high=5)},
            "box_size": numbers(B, low=2, high=3),
        },
        losses.ImageKeypointLoss,
        masks=("confidence",),
        finite_at_zero=False,  # an image without pixels
    ),
    "energy_discriminator": Case(
        losses.energy_discriminator_loss,
        {"real_energy": numbers(4), "fake_energy": numbers(4, seed=1)},
        losses.EnergyDiscriminatorLoss,
        {"margin": 0.3},
        own_size=("fake_energy",),
        any_dims=("real_energy", "fake_energy"),
    ),
    "energy_generator": Case(
        losses.energy_generator_loss,
        {"fake_energy": numbers(4)},
        losses.EnergyGeneratorLoss,
        any_dims=("fake_energy",),
    ),
    "pulling_away": Case(
        losses.pulling_away_term, {"codes": numbers(4, 3)}, losses.PullingAwayTerm
    ),
    "mode_to_mode": Case(
        losses.mode_to_mode_loss,
        {"mapped_mode": numbers(4, 3), "base_mode": numbers(4, 3, seed=1)},
        losses.ModeToModeLoss,
    ),
    "bidirectional": Case(
        losses.bidirectional_loss,
        {"best_of_m": numbers(), "random": numbers(seed=1), "beta": torch.tensor(0.4).double()},
        losses.BidirectionalLoss,
        {"threshold": 0.3},
        plain=("beta",),
    ),
}
