"""HUMR: distributions of SMPL-X bodies given an image feature and a detector's 2D pose.

Wehrbein, Rudolph, Rosenhahn and Wandt, "Utilizing Uncertainty in 2D Pose Detectors for
Probabilistic 3D Human Mesh Recovery", WACV 2025, and its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.body import humr_camera, project
from fasthyp.data.persons import PersonBatch
from fasthyp.flows import (
    ConditionNode,
    GLOWCouplingBlock,
    InputNode,
    Node,
    OutputNode,
    PermuteRandom,
    ReversibleGraphNet,
)
from fasthyp.models._official import Checkpoint, official_state, part, renamed, size
from fasthyp.models._pretrained import load_exactly
from fasthyp.models.flow_model import BodyFlow
from fasthyp.models.prohmr import FCResNet


@dataclass(frozen=True)
class HUMRConfig:
    """The paper's model, supplementary material A, and ``configs/default_config.yaml`` of its code
    (whose ``config.py`` has other defaults: clamp 3 and width 256).

    The condition is the image's feature, the 2D pose through an MLP, and three numbers of the box:
    720 + 256 + 3 = 979.

    Attributes:
        image_features: width of the backbone's output (HRNet-W48's).
        keypoints: K of the detector (COCO's).
        joints: J rotations, of SMPL-X the root and the first 21.
        betas: shape coefficients.
        blocks, hidden, clamp, dropout: of the flow's couplings, whose subnets have three linear
            layers each.
        keypoint_hidden, keypoint_features: widths of the 2D pose's MLP.
        head_features, head_iterations, head_dropout: of the iterative head for shape and camera.
        trunk_inputs: width of the features where they come of no backbone and an
            :class:`~fasthyp.models.prohmr.FCResNet` takes them to ``image_features``; 0 for none,
            as published.
        crop: side of the detector's heatmaps, which show the crop, in cells.
    """

    image_features: int = 720
    keypoints: int = 17
    joints: int = 22
    betas: int = 11
    blocks: int = 8
    hidden: int = 1024
    clamp: float = 2.0
    dropout: float = 0.0
    keypoint_hidden: int = 512
    keypoint_features: int = 256
    head_features: int = 1024
    head_iterations: int = 3
    head_dropout: float = 0.5
    trunk_inputs: int = 0
    crop: float = 64.0

    @property
    def condition_features(self) -> int:
        """C, 979 as published."""
        return self.image_features + self.keypoint_features + 3


class ShapeCameraHead(nn.Module):
    """Shape and camera by iterated offsets, of HMR (CVPR 2018): condition (B, C) -> betas (B, S),
    camera (B, 3). There is no activation between its layers, in HMR's and all codes after it."""

    init_shape: Tensor
    init_cam: Tensor

    def __init__(
        self, inputs: int, hidden: int, betas: int, iterations: int, dropout: float
    ) -> None:
        super().__init__()
        self.iterations = iterations
        self.fc1 = nn.Linear(inputs + betas + 3, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.decshape, self.deccam = nn.Linear(hidden, betas), nn.Linear(hidden, 3)
        for layer in (self.decshape, self.deccam):
            nn.init.xavier_uniform_(layer.weight, gain=0.01)
        self.register_buffer("init_shape", torch.zeros(1, betas))
        self.register_buffer("init_cam", torch.tensor([[0.9, 0.0, 0.0]]))

    def forward(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.init_shape.expand(len(cond), -1)
        camera = self.init_cam.expand(len(cond), -1)
        for _ in range(self.iterations):
            hidden = self.drop1(self.fc1(torch.cat([cond, shape, camera], 1)))
            hidden = self.drop2(self.fc2(hidden))
            shape, camera = shape + self.decshape(hidden), camera + self.deccam(hidden)
        return shape, camera


def _flow(config: HUMRConfig) -> ReversibleGraphNet:
    def subnet(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (inputs, config.hidden):
            layers += [nn.Linear(width, config.hidden), nn.Dropout(config.dropout), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(config.hidden, outputs))

    nodes: list[Any] = [InputNode(6 * config.joints, name="input")]
    condition = ConditionNode(config.condition_features, name="condition")
    options = {"subnet_constructor": subnet, "clamp": config.clamp}
    for k in range(config.blocks):
        nodes.append(Node(nodes[-1], GLOWCouplingBlock, options, condition, name=f"coupling_{k}"))
        nodes.append(Node(nodes[-1], PermuteRandom, {"seed": k}, name=f"permute_{k}"))
    nodes.append(OutputNode(nodes[-1], name="output"))
    return ReversibleGraphNet([*nodes, condition], verbose=False)


class HUMR(BodyFlow):
    """Distribution of a SMPL-X pose, 22 rotations of 6 numbers, given an image's feature, the 2D
    pose and the place of the box.

    Rotations are PyTorch3D's: the first two rows of each matrix. Couplings are affine, so that the
    pose of z = 0 is the mode approximately. Shape and camera are common to all hypotheses; the
    camera sees the whole picture, as in CLIFF. What the official code calls ``log_prob`` is
    ``losses.negative_log_likelihood(..., per_dim=True, constant=False)``.

    Args:
        config, changes: a :class:`HUMRConfig`, and settings that differ from it.
        body: for joints and vertices: a :class:`~fasthyp.models.flow_model.BodyJoints` of SMPL-X,
            or another :class:`~fasthyp.models.flow_model.PosedBody`. Not saved with the model.
        backbone: from images, or whatever a batch has as ``features``, to
            (B, ``image_features``). Not saved.
    """

    Config = HUMRConfig
    convention = "rows"

    def __init__(
        self,
        config: HUMRConfig | None = None,
        body: Any = None,
        backbone: nn.Module | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(config, body, backbone, **changes)
        config = self.config
        self.joints = config.joints
        self.head = ShapeCameraHead(
            config.condition_features,
            config.head_features,
            config.betas,
            config.head_iterations,
            config.head_dropout,
        )
        self.joints_enc = nn.Sequential(
            nn.Linear(3 * config.keypoints, config.keypoint_hidden),
            nn.ReLU(),
            nn.Linear(config.keypoint_hidden, config.keypoint_features),
        )
        self.flow = _flow(config)
        width = config.image_features
        self.trunk = (
            FCResNet(config.trunk_inputs, width, width, dropout=config.dropout)
            if config.trunk_inputs
            else None
        )

    def condition(self, persons: PersonBatch) -> Tensor:
        """Image feature, 2D pose and box, (B, C).

        The detector's keypoints count in the crop, from -1 to 1, with their confidences; the box is
        its offset from the principal point and its side, divided by the focal length. Needs
        ``features``, ``mean``, ``amplitude``, ``focal_length`` and ``centre``.
        """
        mean, amplitude, focal, centre = persons.need("mean", "amplitude", "focal_length", "centre")
        config = self.config
        if mean.shape[1] != config.keypoints:
            raise ValueError(
                f"persons.mean: expected {config.keypoints} keypoints, got {mean.shape[1]}"
            )
        confidence = amplitude.clamp(0, 1)[..., None]
        pose = torch.cat([self.to_crop(mean), confidence], -1).flatten(1)
        side = centre.new_full((len(centre), 1), config.crop)
        box = torch.cat([config.crop / 2 - centre, side], 1) / focal[:, None]
        return torch.cat([self._inputs(persons, self.trunk), self.joints_enc(pose), box], 1)

    def to_crop(self, points: Tensor) -> Tensor:
        """Cells (..., 2) of the heatmaps as crop coordinates from -1 to 1."""
        return 2 * points / self.config.crop - 1

    def shape_and_camera(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(cond)

    def project(self, joints: Tensor, camera: Tensor, persons: PersonBatch) -> Tensor:
        """Where joints (B, M, K, 3) are seen, (B, M, K, 2) in crop coordinates from -1 to 1, with
        the focal length and the principal point of each person's picture."""
        focal, centre = persons.need("focal_length", "centre")
        crop, number = self.config.crop, joints.shape[1]
        side = torch.full_like(focal, crop)
        middle = torch.full_like(centre, crop / 2)
        width, height = (2 * centre).unbind(-1)
        translation = humr_camera(camera, side, middle, width, height, focal)
        each = [value.repeat_interleave(number, 0) for value in (translation, focal, centre)]
        return self.to_crop(project(joints.flatten(0, 1), *each).unflatten(0, joints.shape[:2]))

    def _to_latent(self, rows: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow(rows, c=[cond])

    def _from_latent(self, z: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.flow().inverse(z, cond)

    @classmethod
    def from_official(
        cls,
        checkpoint: Checkpoint,
        body: Any = None,
        backbone: nn.Module | None = None,
        **changes: Any,
    ) -> HUMR:
        """Load a checkpoint of the official code (``HumrTrainer``), in eval mode; widths are the
        checkpoint's.

        Args:
            checkpoint: Lightning's file or its content, see
                :func:`~fasthyp.models._official.official_state`.
            body: as of the class; the checkpoint's own copies of SMPL and SMPL-X are not looked at.
            backbone: takes the tensors under ``model.backbone.``, which are left out where there is
                none. The official HRNet's output is averaged over the picture before it is used.
            changes: other settings (clamp and number of iterations are in no checkpoint).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a checkpoint; names the tensor that is missing, unknown or of the
                wrong shape.
        """
        state, source = official_state(checkpoint)
        prefixes = {f"model.{name}.": f"{name}." for name in ("head", "joints_enc", "flow")}
        ignored = ("model.backbone.", "model.smpl.", "smplx.", "smpl_neutral.", "J_regressor")
        own = renamed(state, prefixes, ignored, source)
        sizes = _sizes(own, source)
        model = cls(body=body, backbone=backbone, **{**sizes, **changes})
        load_exactly(model, own, source, model.saved_state())
        if backbone is not None:
            load_exactly(backbone, part(state, "model.backbone."), f"{source}: model.backbone")
        return model.eval()


def _sizes(state: dict[str, Tensor], source: str) -> dict[str, int]:
    """The settings that a checkpoint's shapes tell."""
    subnet = "flow.module_list.0.subnet1"
    hidden, inputs = (size(state, f"{subnet}.0.weight", dim, source) for dim in (0, 1))
    half = size(state, f"{subnet}.6.weight", 0, source) // 2
    keypoint_features = size(state, "joints_enc.2.weight", 0, source)
    return {
        "hidden": hidden,
        "joints": 2 * half // 6,
        "blocks": sum(name.endswith("subnet1.0.weight") for name in state),
        "keypoint_hidden": size(state, "joints_enc.0.weight", 0, source),
        "keypoints": size(state, "joints_enc.0.weight", 1, source) // 3,
        "keypoint_features": keypoint_features,
        "image_features": inputs - half - keypoint_features - 3,
        "head_features": size(state, "head.fc1.weight", 0, source),
        "betas": size(state, "head.decshape.weight", 0, source),
    }
