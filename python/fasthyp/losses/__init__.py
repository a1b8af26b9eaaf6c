"""The losses of the five papers, as functions and as modules; the weights of each as a preset.

Tensors are positional arguments, options keyword-only; the module of a function takes its options
when it is made. Where the code of a paper differs from the paper, the paper is the default and
``official=True`` computes as the code.
"""

from fasthyp.losses.best_of_m import (
    BestOfMLoss,
    best_hypotheses,
    best_of_m_loss,
    best_of_m_loss_streamed,
)
from fasthyp.losses.covariance import (
    POSE_INN_FITTED,
    POSE_INN_ROOT,
    HeatmapCovarianceLoss,
    heatmap_covariance_loss,
    pose_inn_positions,
)
from fasthyp.losses.critic import (
    POSE_INN_BONES,
    KCSLayer,
    PoseCritic,
    critic_loss,
    generator_loss,
    gradient_penalty,
)
from fasthyp.losses.fitting import (
    KeypointFittingLoss,
    MultiviewConsistencyLoss,
    flow_prior,
    geman_mcclure,
    keypoint_fitting_loss,
    multiview_consistency_loss,
)
from fasthyp.losses.keypoints import (
    PROHMR_PELVIS,
    SPIN_HIPS,
    KeypointLoss,
    ParameterLoss,
    camera_scale_loss,
    keypoint_loss,
    mode_and_expectation,
    parameter_loss,
)
from fasthyp.losses.mask import MaskLoss, mask_loss, off_mask
from fasthyp.losses.mmd import (
    HeatmapMMDLoss,
    JointValidity,
    LatentMMDLoss,
    heatmap_mmd_loss,
    joint_validity,
    latent_mmd_loss,
)
from fasthyp.losses.nll import NegativeLogLikelihood, negative_log_likelihood
from fasthyp.losses.orthonormality import OrthonormalityLoss, orthonormality_loss
from fasthyp.losses.presets import (
    HUMR_WEIGHTS,
    POCO_CLIFF_WEIGHTS,
    POCO_WEIGHTS,
    POSE_INN_WEIGHTS,
    PROHMR_LIFTING_WEIGHTS,
    PROHMR_WEIGHTS,
    PROPOSE_WEIGHTS,
    weighted_sum,
)
from fasthyp.losses.prior import PosePriorDiscriminator, discriminator_loss, prior_loss
from fasthyp.losses.propose import (
    BidirectionalLoss,
    EnergyDiscriminatorLoss,
    bidirectional_loss,
    energy_discriminator_loss,
    energy_generator_loss,
    mode_to_mode_loss,
    pulling_away_term,
)
from fasthyp.losses.reconstruction import (
    JointDistanceLoss,
    PoseL1Loss,
    joint_distance_loss,
    pose_l1_loss,
)
from fasthyp.losses.residual import (
    PoseResidualLoss,
    ResidualLogLikelihoodLoss,
    ResidualNLL,
    flow_residual_nll,
    image_keypoint_loss,
    normalised_residual,
    pose_residual_loss,
    residual_log_likelihood_loss,
    residual_nll,
)

__all__ = [
    "HUMR_WEIGHTS",
    "POCO_CLIFF_WEIGHTS",
    "POCO_WEIGHTS",
    "POSE_INN_BONES",
    "POSE_INN_FITTED",
    "POSE_INN_ROOT",
    "POSE_INN_WEIGHTS",
    "PROHMR_LIFTING_WEIGHTS",
    "PROHMR_PELVIS",
    "PROHMR_WEIGHTS",
    "PROPOSE_WEIGHTS",
    "SPIN_HIPS",
    "BestOfMLoss",
    "BidirectionalLoss",
    "EnergyDiscriminatorLoss",
    "HeatmapCovarianceLoss",
    "HeatmapMMDLoss",
    "JointDistanceLoss",
    "JointValidity",
    "KCSLayer",
    "KeypointFittingLoss",
    "KeypointLoss",
    "LatentMMDLoss",
    "MaskLoss",
    "MultiviewConsistencyLoss",
    "NegativeLogLikelihood",
    "OrthonormalityLoss",
    "ParameterLoss",
    "PoseCritic",
    "PoseL1Loss",
    "PosePriorDiscriminator",
    "PoseResidualLoss",
    "ResidualLogLikelihoodLoss",
    "ResidualNLL",
    "best_hypotheses",
    "best_of_m_loss",
    "best_of_m_loss_streamed",
    "bidirectional_loss",
    "camera_scale_loss",
    "critic_loss",
    "discriminator_loss",
    "energy_discriminator_loss",
    "energy_generator_loss",
    "flow_prior",
    "flow_residual_nll",
    "geman_mcclure",
    "generator_loss",
    "gradient_penalty",
    "heatmap_covariance_loss",
    "heatmap_mmd_loss",
    "image_keypoint_loss",
    "joint_distance_loss",
    "joint_validity",
    "keypoint_fitting_loss",
    "keypoint_loss",
    "latent_mmd_loss",
    "mask_loss",
    "mode_and_expectation",
    "mode_to_mode_loss",
    "multiview_consistency_loss",
    "negative_log_likelihood",
    "normalised_residual",
    "off_mask",
    "orthonormality_loss",
    "parameter_loss",
    "pose_inn_positions",
    "pose_l1_loss",
    "pose_residual_loss",
    "prior_loss",
    "pulling_away_term",
    "residual_log_likelihood_loss",
    "residual_nll",
    "weighted_sum",
]
