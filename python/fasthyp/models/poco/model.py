"""POCO: a body with the uncertainty of each of its parts, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.body import humr_camera, prohmr_camera, project
from fasthyp.body.joint_maps import SMPL24_JOINTS
from fasthyp.data.persons import PersonBatch
from fasthyp.metrics.uncertainty import SMPL_PARENTS, body_uncertainty, kinematic_uncertainty
from fasthyp.models._official import Checkpoint
from fasthyp.models._pretrained import PretrainedModel
from fasthyp.models.flow_model import PosedBody, evaluating, named_body, root_joints
from fasthyp.models.hypotheses import Hypotheses
from fasthyp.models.poco.heads import (
    PARTS,
    IterativeHead,
    PartAttentionHead,
    Regressed,
    box_info,
)
from fasthyp.models.poco.official import load
from fasthyp.models.poco.uncertainty import ErrorDensity, ScaleNetwork
from fasthyp.models.prohmr import FCResNet

HEADS = ("hmr", "cliff", "pare")
CROP_FOCAL = 5000 / 224
"""Focal length of HMR and PARE, which know none, in units of the crop's side."""

_OF_PART = {
    **{"spine": "spine1", "thorax": "neck", "jaw": "head", "neck_base": "neck"},
    **{f"{side}_{part}": "head" for side in ("left", "right") for part in ("eye", "ear")},
    **{
        f"{side}_{part}": f"{side}_foot"
        for side in ("left", "right")
        for part in ("big_toe", "small_toe", "toe", "heel")
    },
    **{
        f"{side}_{part}": f"{side}_hand"
        for side in ("left", "right")
        for part in ("thumb", "index", "middle", "ring", "pinky")
    },
    **{"nose": "head", "head_top": "head"},
}


@dataclass(frozen=True)
class POCOConfig:
    """Settings of :class:`POCO`; the defaults are the paper's POCO-CLIFF.

    Attributes:
        head: ``"hmr"``, ``"cliff"`` or ``"pare"``.
        features: width C of the image features; for PARE the channels of the feature maps.
        hidden, dropout, iterations: of the head of HMR and CLIFF.
        part_channels, shape_channels: of PARE's head.
        betas: number of shape coefficients.
        scale_input, scale_hidden, scale_activation, scale_dropout, scale_drop_output, sigma_dim:
            see :class:`ScaleNetwork`. The paper says nothing of activation and dropout: the
            activation is the code's, dropout there is none.
        condition, flow_dim, flow_layers, flow_hidden, flow_masks, absolute_residuals: see
            :class:`ErrorDensity`. The masks are the code's; the paper has none of its own.
        whole_body: how the uncertainties of the parts, summed along the skeleton, become one:
            ``"chain"``, the paper's: each sum divided by the number of parts in it, which brings
            it to [0, 1], and the mean; ``"mean"`` (POCO-PARE) and ``"root"`` (POCO-CLIFF), the
            code's (:func:`fasthyp.metrics.body_uncertainty`), which neither sums nor divides.
        keep_below: whole-body uncertainty up to which a pseudo truth is kept.
        reject_above: whole-body uncertainty from which a frame of a video counts as missing.
        crop_size: side of the person's box in cells of ``PersonBatch``; the box is ``[0, side]``.
        trunk_inputs: width of the features where they come of no backbone and an
            :class:`~fasthyp.models.prohmr.FCResNet` makes ``features`` numbers of them; 0: no such
            trunk.
        body: ``"stick"`` for simulated persons' stick body where no body is given, or nothing.
    """

    head: str = "cliff"
    features: int = 2048
    hidden: int = 1024
    dropout: float = 0.5
    iterations: int = 3
    part_channels: int = 128
    shape_channels: int = 64
    betas: int = 10
    scale_input: str = "reduced"
    scale_hidden: int = 216
    scale_activation: str = "sigmoid"
    scale_dropout: float = 0.0
    scale_drop_output: bool = False
    sigma_dim: int = 1
    condition: int = 512
    flow_dim: int = 9
    flow_layers: int = 1
    flow_hidden: int = 64
    flow_masks: str = "alter"
    absolute_residuals: bool = False
    whole_body: str = "chain"
    keep_below: float = 0.3
    reject_above: float = 0.8
    crop_size: float = 64.0
    trunk_inputs: int = 0
    body: str = ""

    @classmethod
    def official_cliff(cls, **changes: Any) -> POCOConfig:
        """The released POCO-CLIFF, ``demo_poco_cliff.yaml``: the scale network has a layer of its
        own for the pose and dropout 0.5 in all its layers, the flow sees absolute residuals, and
        the whole body's uncertainty is the root's."""
        code: dict[str, Any] = {
            **{"scale_input": "feat-pose-net", "scale_dropout": 0.5, "scale_drop_output": True},
            **{"absolute_residuals": True, "whole_body": "root"},
        }
        return cls(**{**code, **changes})

    @classmethod
    def official_pare(cls, **changes: Any) -> POCOConfig:
        """The released POCO-PARE, ``demo_poco_pare.yaml``: on HRNet-W32's 480 channels, a scale
        network of 512 that sees features and pose side by side, three pairs of couplings, and else
        as :meth:`official_cliff`, with the mean over the parts."""
        code: dict[str, Any] = {
            **{"head": "pare", "features": 480, "scale_input": "feat-pose", "scale_hidden": 512},
            **{"scale_dropout": 0.5, "scale_drop_output": True, "flow_layers": 3},
            **{"absolute_residuals": True, "whole_body": "mean"},
        }
        return cls(**{**code, **changes})

    @classmethod
    def small(cls, **changes: Any) -> POCOConfig:
        """A tenth of the width, for one processor."""
        narrow: dict[str, Any] = {
            **{"features": 256, "hidden": 256, "dropout": 0.0},
            **{"scale_hidden": 128, "condition": 64},
        }
        return cls(**{**narrow, **changes})


@dataclass(frozen=True)
class POCOPrediction(Regressed):
    """What POCO says of B persons.

    Attributes:
        sigma: (B, 24), or (B, 24, 3, 3): the scale of the error of each part.
    """

    sigma: Tensor

    @property
    def part_uncertainty(self) -> Tensor:
        """(B, 24): sigma, averaged over a part's numbers."""
        return self.sigma if self.sigma.ndim == 2 else self.sigma.mean((2, 3))


class POCO(PretrainedModel):
    """Dwivedi, Schmid, Yi, Black and Tzionas, "POCO: 3D Pose and Shape Estimation with
    Confidence", 3DV 2024: a regressor of SMPL bodies that also says how wrong each part is.

    ``scale`` predicts sigma from image features and regressed pose, ``density`` is the conditional
    flow of residuals in units of sigma. At test time only ``scale`` is needed.

    Args:
        config: a :class:`POCOConfig`.
        body: what turns rotations into joints; needed by :meth:`hypotheses`, :meth:`curate` and
            :meth:`joints`.
        backbone: from ``persons.features`` to the head's features; not saved. None if they are
            features.
        changes: settings that differ from ``config``.
    """

    Config = POCOConfig
    config: POCOConfig

    def __init__(
        self,
        config: POCOConfig | None = None,
        body: PosedBody | None = None,
        backbone: nn.Module | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(config, **changes)
        c = self.config
        if c.head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {c.head!r}")
        if c.whole_body not in ("chain", "mean", "root"):
            raise ValueError(
                f'whole_body: expected "chain", "mean" or "root", got {c.whole_body!r}'
            )
        self.head: IterativeHead | PartAttentionHead
        if c.head == "pare":
            self.head = PartAttentionHead(c.features, c.part_channels, c.shape_channels, c.betas)
            width = PARTS * c.part_channels
        else:
            self.head = IterativeHead(
                *(c.features, c.hidden, c.betas, c.dropout, c.head == "cliff", c.iterations)
            )
            width = c.features
        self.scale = ScaleNetwork(
            *(width, c.scale_input, c.scale_hidden, c.sigma_dim, c.scale_activation),  # type: ignore[arg-type]
            *(c.scale_dropout, c.scale_drop_output),
        )
        self.density = ErrorDensity(
            *(width, c.condition, c.flow_dim, c.flow_layers, c.flow_hidden, c.flow_masks),
            c.absolute_residuals,
        )
        self.body: PosedBody | None = named_body(c.body) if body is None else body
        self.backbone = backbone
        self.trunk = (
            FCResNet(c.trunk_inputs, c.features, c.features, dropout=c.dropout)
            if c.trunk_inputs
            else None
        )

    # -- what it says ------------------------------------------------------------------------

    def forward(
        self,
        features: Tensor,
        box: Tensor | None = None,
        truth: Tensor | None = None,
        conditioned: Tensor | None = None,
    ) -> POCOPrediction:
        """Bodies and the uncertainty of their parts.

        Args:
            features: (B, C) or (B, C, H, W), of the backbone.
            box: (B, 3) of :func:`box_info`, for CLIFF.
            truth: (B, 24, 3, 3), true rotations of the ``conditioned``.
            conditioned: (B,) bool: persons whose scale network is shown the true pose in place of
                the regressed one. In training alone; the released configuration does it for a
                quarter of Human3.6M.
        """
        found = self.head(features, box)
        shown = found.pose
        if conditioned is not None:
            if truth is None:
                raise ValueError("truth: expected (B, 24, 3, 3) for conditioned persons, got None")
            shown = torch.where(conditioned.bool()[:, None, None, None], truth, shown)
        sigma = self.scale(found.features, shown)
        return POCOPrediction(found.pose, found.betas, found.camera, found.features, sigma)

    def predict(self, persons: PersonBatch, conditioned: Tensor | None = None) -> POCOPrediction:
        """:meth:`forward` of persons with ``features``; for CLIFF with ``focal_length`` and
        ``centre``, for ``conditioned`` ones with their rotations."""
        (features,) = persons.need("features")
        if self.backbone is not None:
            features = self.backbone(features)
        if self.trunk is not None:
            features = self.trunk(features)
        box = None
        if self.config.head == "cliff":
            focal, centre = persons.need("focal_length", "centre")
            middle, size = self._box(centre)
            box = box_info(middle, size, centre, focal)
        truth = None if conditioned is None else rotations(persons)
        return self(features, box, truth, conditioned)

    def log_prob(self, predicted: POCOPrediction, truth: Tensor) -> Tensor:
        """log P of the residual of true rotations (B, 24, 3, 3) in units of sigma: (B, 24) nats, or
        (B, 1) where the flow is over all parts."""
        return self.density.log_prob(predicted.features, predicted.pose, truth, predicted.sigma)

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Of the body."""
        return tuple(self._body().joint_names)

    def joints(self, pose: Tensor, betas: Tensor) -> Tensor:
        """Rotations (B, 24, 3, 3) and shape (B, S) -> joints (B, J, 3) metres, root at the
        origin."""
        return self.posed(pose, betas)[0]

    def posed(
        self, pose: Tensor, betas: Tensor, vertices: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Joints as :meth:`joints`, and vertices (B, V, 3) where wanted and the
        body has them."""
        body = self._body()
        joints, mesh = body(betas, pose, vertices)
        root = joints[:, list(root_joints(body.joint_names))].mean(1, keepdim=True)
        return joints - root, None if mesh is None else mesh - root

    def translation(self, predicted: Regressed, persons: PersonBatch) -> Tensor:
        """The root (B, 3) metres in the camera that the head means: CLIFF's is that of the image;
        HMR's and PARE's one of focal length 5000 / 224 sides before the crop."""
        if self.config.head != "cliff":
            return prohmr_camera(predicted.camera)
        focal, centre = persons.need("focal_length", "centre")
        middle, size = self._box(centre)
        return humr_camera(
            predicted.camera, size, middle, 2 * centre[:, 0], 2 * centre[:, 1], focal
        )

    def joints_2d(self, predicted: Regressed, joints: Tensor, persons: PersonBatch) -> Tensor:
        """Joints (B, J, 3) as the predicted camera sees them, (B, J, 2) cells."""
        translation = self.translation(predicted, persons)
        if self.config.head == "cliff":
            focal, centre = persons.need("focal_length", "centre")
            return project(joints, translation, focal, centre)
        size = self.config.crop_size
        middle = translation.new_full((2,), size / 2)
        return project(joints, translation, CROP_FOCAL * size, middle)

    @torch.no_grad()
    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int = 1,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
        image_offset: int = 0,
        precision: str = "high",
    ) -> Hypotheses:
        """The regressed body, and draws about it.

        The paper infers one body; that is ``num_samples=1``. Others are drawn by its equation 3,
        ``theta + sigma * residual`` with residuals of the error density, each matrix then turned
        into the nearest rotation. The code's density of absolute residuals cannot be drawn from.

        ``uncertainty`` is :meth:`joint_uncertainty`. Arguments as of
        :class:`fasthyp.models.Hypothesiser`.

        Raises:
            ValueError: no body, something of the persons is missing, or more than one hypothesis
                of a model that has no draws.
        """
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples!r}")
        predicted = self._predict_in_eval(persons)
        pose = predicted.pose[:, None]
        drawn = num_samples - (1 if include_mode else 0)
        if drawn:
            residual = self.density.draw(predicted.features, drawn, seed, image_offset, precision)
            sigma = predicted.sigma.reshape(len(persons), 1, PARTS, *predicted.sigma.shape[2:])
            sigma = sigma[..., None, None] if predicted.sigma.ndim == 2 else sigma
            others = nearest_rotation(pose + sigma * residual)
            pose = torch.cat([pose, others], 1) if include_mode else others
        betas = predicted.betas[:, None].expand(-1, num_samples, -1)
        shape = (len(persons), num_samples)
        joints, mesh = self.posed(pose.flatten(0, 1), betas.flatten(0, 1), vertices)
        return Hypotheses(
            joints_3d=joints.unflatten(0, shape),
            joint_names=self.joint_names,
            vertices=None if mesh is None else mesh.unflatten(0, shape),
            uncertainty=self.joint_uncertainty(predicted),
        )

    # -- how sure it is ----------------------------------------------------------------------

    def joint_uncertainty(self, predicted: POCOPrediction) -> Tensor:
        """(B, J), the part's of each of the body's joints, summed along the skeleton
        (:func:`fasthyp.metrics.kinematic_uncertainty`): what a joint's place depends on."""
        parts = [_part_of(name) for name in self.joint_names]
        return kinematic_uncertainty(predicted.part_uncertainty)[:, parts]

    def whole_body_uncertainty(self, predicted: POCOPrediction) -> Tensor:
        """(B,): one uncertainty for each person, see ``POCOConfig.whole_body``."""
        parts = predicted.part_uncertainty
        if self.config.whole_body == "chain":
            return chain_uncertainty(parts).mean(-1)
        return body_uncertainty(parts, root_only=self.config.whole_body == "root")

    @torch.no_grad()
    def curate(
        self, persons: PersonBatch, keep_below: float | None = None
    ) -> tuple[PersonBatch, Tensor]:
        """Pseudo truth for persons without any: the model's own bodies, where it is sure.

        Sections 5.4 (task 1) and F of the paper.

        Args:
            persons: what :meth:`hypotheses` needs; a truth they may have is replaced.
            keep_below: whole-body uncertainty below which a body is kept; the configuration's
                0.3, the paper's, unless told.

        Returns:
            The persons that are kept, with ``joints_3d``, ``joints_2d``, ``global_orient``,
            ``body_pose`` and ``betas`` of the model; and (B,) bool, which they are.
        """
        limit = self.config.keep_below if keep_below is None else keep_below
        predicted = self._predict_in_eval(persons)
        joints = self.joints(predicted.pose, predicted.betas)
        keep = self.whole_body_uncertainty(predicted) < limit
        told = replace(
            persons,
            joints_3d=joints,
            joints_2d=self.joints_2d(predicted, joints, persons),
            translation=self.translation(predicted, persons),
            global_orient=predicted.pose[:, 0],
            body_pose=predicted.pose[:, 1:],
            betas=predicted.betas,
            vertices=None,
            joint_names=self.joint_names,
        )
        return told[keep], keep

    @torch.no_grad()
    def certain(self, persons: PersonBatch, reject_above: float | None = None) -> Tensor:
        """(B,) bool: frames that are kept, where the others count as missing. Section 5.4, task 2;
        the limit is the configuration's 0.8, the paper's, unless told."""
        limit = self.config.reject_above if reject_above is None else reject_above
        return self.whole_body_uncertainty(self._predict_in_eval(persons)) <= limit

    # -- files -------------------------------------------------------------------------------

    @classmethod
    def from_official(
        cls,
        checkpoint: Checkpoint,
        body: PosedBody | None = None,
        backbone: nn.Module | None = None,
        **changes: Any,
    ) -> POCO:
        """The model of a checkpoint of POCO's code, in eval mode.

        Widths are the checkpoint's. What its shapes do not tell is that of
        :meth:`POCOConfig.official_cliff` or :meth:`POCOConfig.official_pare`, unless ``changes``
        say otherwise. The body's tensors (``smpl``) are left out, and so are the backbone's where
        no ``backbone`` with such names is given.

        Args:
            checkpoint: a file or its content, see
                :func:`~fasthyp.models._official.official_state`; names may begin with ``model.``.
            body, backbone: as for the class.
            changes: settings that differ.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not such a checkpoint; names the tensor that is missing, unknown or of the
                wrong shape.
        """
        return load(cls, checkpoint, body, backbone, changes)

    def saved_state(self) -> dict[str, Tensor]:
        """All but the body and the backbone, which are not the model's own."""
        own = self.state_dict().items()
        return {k: v for k, v in own if not k.startswith(("body.", "backbone."))}

    # -- parts -------------------------------------------------------------------------------

    def _predict_in_eval(self, persons: PersonBatch) -> POCOPrediction:
        with evaluating(self):
            return self.predict(persons)

    def _body(self) -> PosedBody:
        if self.body is None:
            raise ValueError("body: expected one to pose, got None")
        return self.body

    def _box(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Middle (B, 2) and side (B,) of the box."""
        size = self.config.crop_size
        return torch.full_like(like, size / 2), torch.full_like(like[:, 0], size)


def rotations(persons: PersonBatch) -> Tensor:
    """True rotations (B, 24, 3, 3) of persons, the root's first."""
    root, others = persons.need("global_orient", "body_pose")
    return torch.cat([root[:, None], others], 1)


def chain_uncertainty(parts: Tensor, parents: Sequence[int] = SMPL_PARENTS) -> Tensor:
    """The mean uncertainty of the parts from the root to each part, (..., 24).

    The sum along the skeleton of :func:`fasthyp.metrics.kinematic_uncertainty`, normalised by what
    it could be: for scales of 0 to 1, 0 to 1.
    """
    return kinematic_uncertainty(parts, parents) / kinematic_uncertainty(
        torch.ones_like(parts), parents
    )


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotations (..., 3, 3) nearest to matrices, in the sum of squared differences."""
    u, _, vh = torch.linalg.svd(matrix)
    sign = torch.linalg.det(u @ vh)
    flip = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1)
    return (u * flip[..., None, :]) @ vh


def can_be_infilled(
    uncertainty: Tensor, ends: int = 5, sure: float = 0.7, longest: int = 15
) -> bool:
    """Whether the frames that are missing from a video can be filled in between the others.

    Section G of the paper: the first and last frames are sure (a confidence above 0.3 is an
    uncertainty below 0.7), and no run of unsure ones is too long.

    Args:
        uncertainty: (T,) whole-body uncertainty of consecutive frames.
        ends: how many frames at each end must be sure.
        sure: the greatest uncertainty of a sure frame.
        longest: the longest run of unsure frames.

    Raises:
        ValueError: not (T,).
    """
    if uncertainty.ndim != 1:
        raise ValueError(f"uncertainty: expected shape (T,), got {tuple(uncertainty.shape)}")
    unsure = (uncertainty > sure).tolist()
    run, worst = 0, 0
    for frame in unsure:
        run = run + 1 if frame else 0
        worst = max(worst, run)
    return not any(unsure[:ends]) and not any(unsure[-ends:]) and worst <= longest


def _part_of(name: str) -> int:
    """The part whose uncertainty a joint's is."""
    name = _OF_PART.get(name, name)
    if name not in SMPL24_JOINTS:
        raise ValueError(f"body: expected joints of SMPL or with names of data sets, got {name!r}")
    return SMPL24_JOINTS.index(name)
