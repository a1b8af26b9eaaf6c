"""ProHMR: distributions of SMPL bodies given an image, and of 3D skeletons given 2D keypoints.

Kolotouros, Pavlakos, Jayaraman and Daniilidis, "Probabilistic Modeling for Human Mesh Recovery",
ICCV 2021, and its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fasthyp.body import prohmr_camera, project
from fasthyp.body.joint_maps import J24_JOINTS
from fasthyp.data.persons import PersonBatch
from fasthyp.flows import ConditionalGlow
from fasthyp.geometry import Rotation6D
from fasthyp.models._official import Checkpoint, official_state, part, renamed, size
from fasthyp.models._pretrained import load_exactly
from fasthyp.models.flow_model import BodyFlow, FlowModel, evaluating
from fasthyp.models.hypotheses import Hypotheses
from fasthyp.reference.coupling import standard_normal_log_prob

_OF_FLOW = "_transform._transforms"


class FCBlock(nn.Module):
    """Linear, batch norm, ReLU, dropout; ``repeats`` times, about a skip connection for two."""

    def __init__(self, inputs: int, outputs: int, dropout: float, repeats: int = 1) -> None:
        super().__init__()
        self.residual = repeats == 2
        layers: list[nn.Module] = []
        for width in (inputs, outputs)[:repeats]:
            layers += [nn.Linear(width, outputs), nn.BatchNorm1d(outputs)]
            layers += [nn.ReLU(), nn.Dropout(dropout)]
        self.fc_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc_block(x) if self.residual else self.fc_block(x)


class FCResNet(nn.Module):
    """The residual net of Martinez et al., ICCV 2017, through which ProHMR's 2D keypoints pass:
    (B, inputs) -> (B, outputs). Its ``state_dict`` has the keys of ProHMR's ``FCResNet``."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, blocks: int = 2, dropout: float = 0.5
    ) -> None:
        super().__init__()
        layers = [FCBlock(inputs, hidden, dropout)]
        layers += [FCBlock(hidden, hidden, dropout, repeats=2) for _ in range(blocks)]
        if hidden != outputs:
            layers.append(FCBlock(hidden, outputs, dropout))
        self.fc_layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_layers(x)


class FCHead(nn.Module):
    """Shape and camera as offsets from their means: (B, C) -> betas (B, S), camera (B, 3).

    The means are HMR's where a checkpoint brings them; 0, and a person of 0.9 of the crop, unless
    told.
    """

    init_cam: Tensor
    init_betas: Tensor

    def __init__(self, inputs: int, hidden: int, betas: int = 10) -> None:
        super().__init__()
        last = nn.Linear(hidden, betas + 3)
        nn.init.xavier_uniform_(last.weight, gain=0.02)
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), last)
        self.register_buffer("init_cam", torch.tensor([[[0.9, 0.0, 0.0]]]))
        self.register_buffer("init_betas", torch.zeros(1, 1, betas))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        offset = self.layers(features)
        betas = self.init_betas.shape[-1]
        return offset[:, :betas] + self.init_betas[0], offset[:, betas:] + self.init_cam[0]


@dataclass(frozen=True)
class ProHMRConfig:
    """The paper's model, supplementary material 2; the code's is the same.

    Attributes:
        context_features: C of the backbone's output (ResNet-50's).
        hidden_features: width of the couplings' residual nets.
        num_layers: layers ActNorm, linear, coupling of the flow.
        num_blocks_per_layer: residual blocks of each net.
        dropout: in the residual nets, and in the trunk.
        head_features: hidden width of the head for shape and camera.
        joints: J rotations, the root's among them.
        betas: shape coefficients.
        focal_length: of the camera, pixels.
        image_size: side of the crop, pixels.
        trunk_inputs: width of the features where they come of no backbone and an
            :class:`FCResNet` takes them to the context; 0 for none, as published.
        crop: side of the detector's heatmaps, which show the crop, in cells.
        body: ``"stick"``, or nothing: see :class:`~fasthyp.models.flow_model.BodyFlow`.
    """

    context_features: int = 2048
    hidden_features: int = 1024
    num_layers: int = 4
    num_blocks_per_layer: int = 2
    dropout: float = 0.5
    head_features: int = 1024
    joints: int = 24
    betas: int = 10
    focal_length: float = 5000.0
    image_size: float = 224.0
    trunk_inputs: int = 0
    crop: float = 64.0
    body: str = ""


class _GlowModel(FlowModel):
    """The flow of both variants."""

    flow: ConditionalGlow

    def _make_flow(self, dims: int) -> ConditionalGlow:
        config = self.config
        return ConditionalGlow(
            dims,
            config.hidden_features,
            config.num_layers,
            config.num_blocks_per_layer,
            dropout_probability=config.dropout,
            context_features=config.context_features,
        )

    def _to_latent(self, rows: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow._transform(rows, cond)

    def _from_latent(self, z: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow._transform.inverse_shared(z, cond)

    @torch.no_grad()
    def initialise(self, x: Tensor, cond: Tensor) -> None:
        """Set the flow's ActNorms so that what they give for x (N, D) under conditions (N, C) has
        mean 0 and standard deviation 1, as the code does with its first batch. Does nothing where
        that was done before."""
        flow = self.flow
        mode = flow.training
        flow.train()
        momenta = {m: m.momentum for m in flow.modules() if isinstance(m, nn.BatchNorm1d)}
        for norm in momenta:
            norm.momentum = 0.0  # the statistics of evaluation are not concerned
        try:
            flow.log_prob(x, cond)
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
            flow.train(mode)


class ProHMR(_GlowModel, BodyFlow):
    """Distribution of a SMPL pose, 24 rotations of 6 numbers, given features of an image.

    The log-determinant of its additive couplings is the same for all poses, so that the pose of
    z = 0 is the mode. Shape and camera are regressed from the features and common to all
    hypotheses. Rotations are ProHMR's: the first two columns of each matrix.

    Args:
        config, changes: a :class:`ProHMRConfig`, and settings that differ from it.
        body: for joints and vertices: a :class:`~fasthyp.models.flow_model.BodyJoints` of SMPL, or
            another :class:`~fasthyp.models.flow_model.PosedBody`. Not saved with the model.
        backbone: from images, or whatever a batch has as ``features``, to (B, C). Not saved.
    """

    Config = ProHMRConfig
    convention: ClassVar[Rotation6D] = "columns"

    def __init__(
        self,
        config: ProHMRConfig | None = None,
        body: Any = None,
        backbone: nn.Module | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(config, body, backbone, **changes)
        config = self.config
        self.joints = config.joints
        self.flow = self._make_flow(self.dims)
        self.fc_head = FCHead(config.context_features, config.head_features, config.betas)
        width = config.context_features
        self.trunk = (
            FCResNet(config.trunk_inputs, width, width, dropout=config.dropout)
            if config.trunk_inputs
            else None
        )

    def condition(self, persons: PersonBatch) -> Tensor:
        """The features (B, C), through backbone and trunk."""
        width = self.config.trunk_inputs or self.config.context_features
        return self._inputs(persons, self.trunk, width)

    def shape_and_camera(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc_head(cond)

    def project(self, joints: Tensor, camera: Tensor, persons: PersonBatch | None = None) -> Tensor:
        """Where joints (B, M, K, 3) are seen, (B, M, K, 2) in crop coordinates from -1 to 1: with
        the fixed focal length, from a camera on the axis of the crop."""
        config, number = self.config, joints.shape[1]
        translation = prohmr_camera(camera, config.focal_length, config.image_size)
        focal = 2 * config.focal_length / config.image_size
        points = project(joints.flatten(0, 1), translation.repeat_interleave(number, 0), focal)
        return points.unflatten(0, joints.shape[:2])

    @classmethod
    def from_official(
        cls,
        checkpoint: Checkpoint,
        body: Any = None,
        backbone: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        **changes: Any,
    ) -> ProHMR:
        """Load a checkpoint of the official code, in eval mode; widths are the checkpoint's.

        Args:
            checkpoint: Lightning's file or its content, see
                :func:`~fasthyp.models._official.official_state`.
            body: as of the class; the checkpoint's own copy of SMPL is not looked at.
            backbone: takes the tensors under ``backbone.``, which are left out where there is none.
            discriminator: likewise, a :class:`fasthyp.losses.PosePriorDiscriminator`.
            changes: other settings.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a checkpoint; names the tensor that is missing, unknown or of the
                wrong shape.
        """
        state, source = official_state(checkpoint)
        given = {"backbone.": backbone, "discriminator.": discriminator}
        prefixes = {"flow.flow.": "flow.", "flow.fc_head.": "fc_head."}
        own = renamed(state, prefixes, (*given, "smpl.", "initialized"), source)
        sizes = _flow_sizes(own, source)
        sizes["head_features"] = size(own, "fc_head.layers.0.weight", 0, source)
        model = cls(body=body, backbone=backbone, **{**sizes, **changes})
        load_exactly(model, own, source, model.saved_state())
        for prefix, module in given.items():
            if module is not None:
                load_exactly(module, part(state, prefix), f"{source}: {prefix.rstrip('.')}")
        return model.eval()


_LIFTED = (*range(13), 16, 17, 18)


@dataclass(frozen=True)
class ProHMRLiftingConfig:
    """The paper's 2D pose lifting, section 4.4 and supplementary material 2 and 3.

    Attributes:
        keypoint_names: the 2D keypoints; the code's 17 of Human3.6M.
        joint_names: the 3D joints, without the root.
        context_features, hidden_features, num_layers, num_blocks_per_layer, dropout: as of
            :class:`ProHMRConfig`; the context is what the trunk makes of the keypoints.
        trunk_features, trunk_blocks: width and residual blocks of the trunk.
    """

    keypoint_names: tuple[str, ...] = tuple(J24_JOINTS[k] for k in (*range(13), 14, 16, 17, 18))
    joint_names: tuple[str, ...] = tuple(J24_JOINTS[k] for k in _LIFTED)
    context_features: int = 1024
    hidden_features: int = 1024
    num_layers: int = 4
    num_blocks_per_layer: int = 2
    dropout: float = 0.5
    trunk_features: int = 1024
    trunk_blocks: int = 2


class ProHMRLifting(_GlowModel):
    """Distribution of a 3D skeleton in metres about its root, given 2D keypoints alone.

    Args:
        config, changes: a :class:`ProHMRLiftingConfig`, and settings that differ from it.

    Attributes:
        keypoint_mean, keypoint_std: (K, 2), of the training data, by which keypoints are
            standardised.
    """

    Config = ProHMRLiftingConfig
    keypoint_mean: Tensor
    keypoint_std: Tensor

    def __init__(self, config: ProHMRLiftingConfig | None = None, **changes: Any) -> None:
        super().__init__(config, **changes)
        config = self.config
        keypoints = len(config.keypoint_names)
        self.dims = 3 * len(config.joint_names)
        self.trunk = FCResNet(
            2 * keypoints,
            config.trunk_features,
            config.context_features,
            config.trunk_blocks,
            config.dropout,
        )
        self.flow = self._make_flow(self.dims)
        self.register_buffer("keypoint_mean", torch.zeros(keypoints, 2))
        self.register_buffer("keypoint_std", torch.ones(keypoints, 2))

    @torch.no_grad()
    def fit_standardisation(self, keypoints: Tensor) -> None:
        """Set mean and standard deviation of the keypoints from many (N, K, 2)."""
        self.keypoint_mean.copy_(keypoints.mean(0))
        self.keypoint_std.copy_(keypoints.std(0).clamp_min(1e-3))

    def keypoints(self, persons: PersonBatch) -> Tensor:
        """The detector's keypoints (B, K, 2), in the order of the configuration.

        Raises:
            ValueError: a keypoint is missing; names it.
        """
        (mean,) = persons.need("mean")
        return mean[:, list(joint_indices(self.config.keypoint_names, persons.detector_names))]

    def condition(self, persons: PersonBatch) -> Tensor:
        """The context (B, C) of the standardised keypoints."""
        standard = (self.keypoints(persons) - self.keypoint_mean) / self.keypoint_std
        return self.trunk(standard.flatten(1))

    def target(self, persons: PersonBatch) -> Tensor:
        """The true joints (B, J, 3), in the order of the configuration.

        Raises:
            ValueError: a joint is missing; names it.
        """
        (joints,) = persons.need("joints_3d")
        return joints[:, list(joint_indices(self.config.joint_names, persons.joint_names))]

    def decode(self, z: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Joints (B, M, J, 3) m and log-densities (B, M) of latents (B, M, D) under conditions
        (B, C), with gradients."""
        self._check("z", z, cond)
        x, log_det = self._from_latent(z, cond)
        return x.unflatten(-1, (-1, 3)), standard_normal_log_prob(z) - log_det

    @torch.no_grad()
    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
        image_offset: int = 0,
    ) -> Hypotheses:
        """Hypotheses of persons, see :class:`fasthyp.models.Hypothesiser`; the pelvis
        comes first, at the origin. A skeleton has no vertices.
        """
        with evaluating(self):
            cond = self.condition(persons)
        x, log_prob = self._draw(cond, num_samples, seed, include_mode, "high", image_offset)
        joints = nn.functional.pad(x.unflatten(-1, (-1, 3)), (0, 0, 1, 0))
        return Hypotheses(joints, ("pelvis", *self.config.joint_names), log_prob)

    @classmethod
    def from_official(
        cls, checkpoint: Checkpoint, mean: Tensor, std: Tensor, **changes: Any
    ) -> ProHMRLifting:
        """Load a checkpoint of the official code (``ProSkeleton``), in eval mode; widths are the
        checkpoint's.

        Args:
            checkpoint: as for :meth:`ProHMR.from_official`.
            mean, std: (K, 2) of the keypoints, which the code keeps in a file of its own.
            changes: other settings.

        Raises:
            FileNotFoundError, ValueError: as for :meth:`ProHMR.from_official`.
        """
        state, source = official_state(checkpoint)
        prefixes = {"flow.flow.": "flow.", "backbone.": "trunk."}
        own = renamed(state, prefixes, ("initialized",), source)
        first = "trunk.fc_layers.0.fc_block.0.weight"
        sizes = _flow_sizes(own, source)
        sizes["trunk_features"] = size(own, first, 0, source)
        sizes["trunk_blocks"] = sum(
            name.startswith("trunk.") and name.endswith("fc_block.4.weight") for name in own
        )
        model = cls(**{**sizes, **changes})
        load_exactly(model, {**own, "keypoint_mean": mean, "keypoint_std": std}, source)
        return model.eval()


def joint_indices(wanted: tuple[str, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """Where the wanted joints are among the named.

    Raises:
        ValueError: one is not; names it.
    """
    for name in wanted:
        if name not in names:
            raise ValueError(f"joints: expected {name!r} among {names}")
    return tuple(names.index(name) for name in wanted)


def _flow_sizes(state: dict[str, Tensor], source: str) -> dict[str, int]:
    """The settings of a ConditionalGlow under ``flow.``."""
    net = f"flow.{_OF_FLOW}.2.transform_net"
    first = f"{net}.initial_layer.weight"
    hidden, inputs = (size(state, first, dim, source) for dim in (0, 1))
    passed = size(state, f"{net}.final_layer.weight", 0, source)  # half of an even number
    return {
        "hidden_features": hidden,
        "context_features": inputs - passed,
        "num_layers": sum(name.endswith("transform_net.initial_layer.weight") for name in state),
        "num_blocks_per_layer": sum(
            name.startswith(f"{net}.blocks.") and name.endswith("linear_layers.0.weight")
            for name in state
        ),
    }
