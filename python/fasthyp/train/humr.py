"""How HUMR is trained: Wehrbein et al., "Utilizing Uncertainty in 2D Pose Detectors for
Probabilistic 3D Human Mesh Recovery", WACV 2025, supplementary material A, and its code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.body.joint_maps import H36M17_JOINTS
from fasthyp.data.persons import PersonBatch
from fasthyp.heatmaps import sample_heatmaps
from fasthyp.losses import (
    HUMR_WEIGHTS,
    camera_scale_loss,
    heatmap_mmd_loss,
    joint_validity,
    keypoint_loss,
    mask_loss,
    mode_and_expectation,
    negative_log_likelihood,
    off_mask,
    orthonormality_loss,
    parameter_loss,
)
from fasthyp.models.humr import HUMR, HUMRConfig
from fasthyp.train.prohmr import common_joints
from fasthyp.train.recipe import PersonSource, Recipe, RecipeConfig

ARTICULATED = ("elbow", "wrist", "knee", "ankle")
"""Kinds of joints whose hypotheses follow the heatmaps."""

VISIBLE_CONFIDENCE = 0.5
H36M17_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)
_BONE_RADIUS, _OCCLUDER_RADIUS = 3.0, 6.0  # cells
_CELLS = 2  # of the heatmaps in one of the masks


@dataclass(frozen=True)
class HUMRRecipeConfig(RecipeConfig):
    """The paper's training.

    Attributes:
        num_samples: hypotheses of each person at a step, of which the first is the mode; there is
            one sample less of each heatmap.
        noise: standard deviation of what is added to the true 6D pose for its likelihood.
        model: of the model.
    """

    steps: int = 400_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    validate_every: int = 10_000
    validation_samples: int = 100
    num_samples: int = 26
    noise: float = 0.005
    model: HUMRConfig = field(default_factory=HUMRConfig)

    @classmethod
    def small(cls, **changes: Any) -> HUMRRecipeConfig:
        """For simulated persons on one core: a trunk for the Gaussians in place of a backbone, an
        eighth of the width, fewer hypotheses, and a larger, falling learning rate. 10 shape
        coefficients, as the stick body has them."""
        model = HUMRConfig(
            image_features=128,
            hidden=128,
            keypoint_hidden=128,
            keypoint_features=64,
            head_features=128,
            head_dropout=0.1,
            betas=10,
            trunk_inputs=6 * len(H36M17_JOINTS),
            body="stick",
        )
        values: dict[str, Any] = {
            **{"steps": 5_000, "batch_size": 64, "learning_rate": 1e-3, "schedule": "cosine"},
            **{"warmup_steps": 200, "clip_norm": 5.0, "validate_every": 500},
            **{"validation_samples": 50, "num_samples": 9, "model": model},
        }
        return cls(**{**values, **changes})


class HUMRRecipe(Recipe):
    """Likelihood, reprojection of the mode, and two losses of the random hypotheses: they follow
    the heatmaps where the detector is unsure, and stay where hidden joints can be.

    Args:
        config: a :class:`HUMRRecipeConfig`.
        source: of persons with rotations, shape, projected joints and detections.
        body: a :class:`~fasthyp.models.flow_model.PosedBody`; may be left out where the model's
            configuration names one.
        backbone: as of :class:`~fasthyp.models.HUMR`.
    """

    Config = HUMRRecipeConfig
    name = "humr"
    config: HUMRRecipeConfig
    model: HUMR

    def __init__(
        self,
        config: HUMRRecipeConfig,
        source: PersonSource,
        body: Any = None,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__(config, source)
        self.weights = dict(HUMR_WEIGHTS)
        self.model = HUMR(config.model, body, backbone)

    def masks(self, persons: PersonBatch) -> Tensor | None:
        """(B, H, W) where each person, and what hides it, are in the crop; None for none.

        Simulated persons have no segmentation: here limbs as wide as six cells, and a disc about
        each hidden joint. To be overridden for those that have.
        """
        (points,) = persons.need("joints_2d")
        size = round(self.config.model.crop / _CELLS)
        points = (points + 0.5) / _CELLS - 0.5
        bones = _bones(persons.joint_names)
        masks = person_masks(points, bones, size, _BONE_RADIUS / _CELLS)
        if persons.visible is not None:
            _, seen, known = common_joints(persons.detector_names, persons.joint_names)
            dots = points[:, known].where(~persons.visible[:, seen, None], torch.inf)
            each = [(k, k) for k in range(len(known))]
            masks = masks | person_masks(dots, each, size, _OCCLUDER_RADIUS / _CELLS)
        return masks

    def losses(self, persons: PersonBatch) -> dict[str, Tensor]:
        number, dims = self.config.num_samples, self.model.dims
        z = self.normal(number, dims)
        z[:, 0] = 0
        noise = self.config.noise * self.normal(dims)
        if persons.heatmaps is None:
            shape = number - 1, len(persons.detector_names), 2
            samples = detection_samples(persons, self.normal(*shape))
        else:
            offset = self._rows.start or 0
            samples = sample_heatmaps(
                persons.heatmaps, number - 1, seed=self.new_seed(), image_offset=offset
            )
        return humr_terms(self.model, persons, z, noise, samples, self.masks(persons))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with weight decay on everything, as in the code."""
        config = self.config
        return torch.optim.AdamW(
            self.model.trained_parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )


def _bones(names: tuple[str, ...]) -> list[tuple[int, int]]:
    """Pairs of Human3.6M's joints, or of each joint with itself where there are others."""
    if names == H36M17_JOINTS:
        return [(parent, k) for k, parent in enumerate(H36M17_PARENTS) if parent >= 0]
    return [(k, k) for k in range(len(names))]


def detection_samples(persons: PersonBatch, noise: Tensor) -> Tensor:
    """Where the detector may see each joint, (B, T, K, 2) in cells: draws from the Gaussians that
    were fitted to the heatmaps, for standard normal noise (B, T, K, 2)."""
    mean, covariance = persons.need("mean", "covariance")
    factor = torch.linalg.cholesky(covariance)[:, None]
    return mean[:, None] + (factor @ noise[..., None])[..., 0]


def person_masks(
    points: Tensor, bones: Sequence[tuple[int, int]], size: int, radius: float = 3.0
) -> Tensor:
    """Where stick persons are in their pictures, for data without segmentation: (B, size, size).

    Args:
        points: (B, J, 2) x, y in pixels.
        bones: pairs of joints.
        size: side of the picture.
        radius: half the width of a bone, pixels.
    """
    start, end = (points[:, [bone[k] for bone in bones]] for k in (0, 1))
    along = end - start
    square = along.square().sum(-1)[..., None, None].clamp_min(1e-6)
    line = torch.arange(size, dtype=points.dtype, device=points.device)
    (x, y), (dx, dy) = ((line - start[..., None]).unbind(2), along[..., None].unbind(2))
    # of every pixel: where on the bone is nearest, and how far, from sums over rows and columns
    share = (dx * x)[..., None, :] / square + (dy * y)[..., None] / square
    near = share.clamp(0, 1)
    distance = near * (near - 2 * share) * square + x.square()[..., None, :]
    return (distance + y.square()[..., None] <= radius**2).any(1)


def humr_terms(
    model: HUMR,
    persons: PersonBatch,
    z: Tensor,
    noise: Tensor,
    samples: Tensor,
    masks: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of :data:`fasthyp.losses.HUMR_WEIGHTS`. Points count in the crop from -1 to 1.

    Of the detector's joints those are used that the body and the annotation have too; a joint is
    as confident as the amplitude of its Gaussian.

    Args:
        model: with a body.
        persons: with ``joints_2d``, ``amplitude``, ``global_orient``, ``body_pose``, ``betas`` and
            what the model's condition needs.
        z: (B, S, D) latents, the first of which is zero.
        noise: (B, D) added to the true 6D pose for its likelihood.
        samples: (B, T, K, 2) of the heatmaps, in cells: :func:`detection_samples`.
        masks: (B, H, W) where the person, and what hides it, are in the crop; without them there is
            no such term.
    """
    joints_2d, betas, amplitude = persons.need("joints_2d", "betas", "amplitude")
    cond = model.condition(persons)
    prediction = model.decode(z, cond)
    joints, _ = model.pose(prediction)
    points = model.project(joints, prediction.camera, persons)

    names, ours, theirs = common_joints(model.body.joint_names, persons.joint_names)
    annotated = model.to_crop(joints_2d[:, theirs])
    keypoints = keypoint_loss(points[:, :, ours], annotated)

    detected, among, at = common_joints(names, persons.detector_names)
    samples = model.to_crop(samples[:, :, at])
    random, truth = points[:, 1:, [ours[k] for k in among]], annotated[:, among]
    confidence = amplitude[:, at].clamp(0, 1)
    in_crop = (truth.abs() <= 1).all(-1)
    moving = torch.tensor(
        [name.rpartition("_")[2] in ARTICULATED for name in detected], device=truth.device
    ).expand_as(in_crop)
    # the box of a detector is three quarters as wide as it is high
    in_box = (truth.abs() <= truth.new_tensor([0.75, 1.0])).all(-1)
    validity = joint_validity(confidence, moving, in_box, in_crop)

    latent, log_det = model._to_latent(model.to_6d(model.target(persons)) + noise, cond)
    orthonormality = orthonormality_loss(prediction.pose_6d, convention=model.convention)
    orthonormality_mode, orthonormality_exp = mode_and_expectation(orthonormality)
    terms = {
        "nll": negative_log_likelihood(latent, log_det, per_dim=True, constant=False),
        "keypoints_2d_mode": mode_and_expectation(keypoints)[0],
        "heatmap_mmd": heatmap_mmd_loss(random, samples, truth, validity),
        "betas_mode": mode_and_expectation(parameter_loss(prediction.betas[:, None], betas))[0],
        "orthonormality_mode": orthonormality_mode,
        "orthonormality_exp": orthonormality_exp,
        "camera": camera_scale_loss(prediction.camera[:, 0]),
    }
    if masks is not None:
        hidden = (confidence < VISIBLE_CONFIDENCE) | ~in_crop
        pixels = (samples + 1) * samples.new_tensor([masks.shape[2], masks.shape[1]]) / 2
        inside = ((samples >= -1) & (samples <= 1)).all(-1)
        usable = inside & ~off_mask(pixels, masks)
        targets = torch.cat([samples, truth[:, None]], 1)
        usable = torch.cat([usable, torch.ones_like(in_crop)[:, None]], 1)
        terms["mask"] = mask_loss(random, targets, usable, masks, hidden)
    return terms
