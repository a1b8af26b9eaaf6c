"""ProPose (Han, Kim and Lee, "ProPose: Probabilistic 3D Human Pose Estimation with Instance-Level
Distribution and Normalizing Flow", AAAI 2025): a flow between two learnt Gaussians.

Each 3D pose has a Gaussian in the latent space of a conditional autoencoder (PILGD), each 2D pose
one in that of another (PAGD); a flow maps between the two, and the decoder makes poses of what is
drawn. Its authors give no code and no widths: those here are this package's choice, as
:class:`ProPoseConfig` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fasthyp._seed import check_int
from fasthyp.body.joint_maps import H36M17_JOINTS
from fasthyp.data.persons import PersonBatch
from fasthyp.flows import GLOWCouplingBlock, PermuteRandom, SequenceINN
from fasthyp.losses import joint_distance_loss, negative_log_likelihood
from fasthyp.models._pretrained import PretrainedModel
from fasthyp.models.flow_model import root_joints
from fasthyp.models.hypotheses import Hypotheses
from fasthyp.ops.coupling import philox_normal
from fasthyp.sampling import SamplerCache


@dataclass(frozen=True)
class ProPoseConfig:
    """Settings of :class:`ProPose`.

    The paper gives none of their values; where it names a symbol, that is in brackets.

    Attributes:
        joint_names, detector_names: of the 3D and of the 2D pose (J of both); the pelvis, or the
            middle of the hips, is the origin.
        latent: [d] of the autoencoders' latent spaces.
        pilgd_scale: [s] standard deviation of every PILGD.
        clamp: [alpha] PILGD means lie within (-alpha, alpha); so do PAGD means.
        log_sigma_clamp: the logarithms of PAGD's standard deviations lie within this of zero.
        hidden, layers: width and number of hidden layers of encoders and decoders.
        code: width of what the 2D autoencoder keeps of a 2D pose.
        discriminator_latent: that of the discriminator's autoencoder.
        flow_blocks, flow_hidden, flow_clamp: GLOW coupling blocks of the flow, the width of their
            two-layer subnets and their soft clamp (those of Wehrbein et al., ICCV 2021).
    """

    joint_names: tuple[str, ...] = H36M17_JOINTS
    detector_names: tuple[str, ...] = H36M17_JOINTS
    latent: int = 64
    pilgd_scale: float = 0.2
    clamp: float = 3.0
    log_sigma_clamp: float = 3.0
    hidden: int = 1024
    layers: int = 2
    code: int = 64
    discriminator_latent: int = 16
    flow_blocks: int = 8
    flow_hidden: int = 512
    flow_clamp: float = 2.0

    @classmethod
    def small(cls, **changes: Any) -> ProPoseConfig:
        """A fraction of the width, for one processor."""
        narrow: dict[str, Any] = {"latent": 32, "hidden": 256, "flow_blocks": 6, "flow_hidden": 128}
        return cls(**{**narrow, **changes})


class ProPose(PretrainedModel):
    """Lifting of 2D poses to distributions of 3D poses.

    3D poses are (..., J, 3) metres in camera axes, root at the origin; 2D poses are normalised by
    :meth:`normalised`.

    Args:
        config: a :class:`ProPoseConfig`.
        changes: settings that differ from it.

    Attributes:
        encoder: [g] 3D and 2D pose -> mean of the PILGD.
        decoder: [k] latent and 2D pose -> 3D pose.
        encoder_2d, decoder_2d, project: [q, v, h] the autoencoder of 2D poses, and its layer that
            gives mean and scale of the PAGD.
        flow: [f] from PILGD (forward) to PAGD, given the 2D pose.
        discriminator: [D] a conditional autoencoder of 3D poses.
    """

    Config = ProPoseConfig
    config: ProPoseConfig
    centre: Tensor
    spread: Tensor

    def __init__(self, config: ProPoseConfig | None = None, **changes: Any) -> None:
        super().__init__(config, **changes)
        c = self.config
        self.joints, self.detector_joints = len(c.joint_names), len(c.detector_names)
        self._root = list(root_joints(c.joint_names))
        pose, seen = 3 * self.joints, 2 * self.detector_joints
        net = partial(ConditionalMLP, hidden=c.hidden, layers=c.layers)
        self.encoder = net(pose, seen, c.latent)
        self.decoder = net(c.latent, seen, pose)
        self.encoder_2d = net(seen, 0, c.code)
        self.decoder_2d = net(c.code, 0, seen)
        self.project = nn.Linear(c.code, 2 * c.latent)
        self.discriminator = nn.ModuleList(
            [net(pose, seen, c.discriminator_latent), net(c.discriminator_latent, seen, pose)]
        )
        self.flow = SequenceINN(c.latent)
        for block in range(c.flow_blocks):
            self.flow.append(
                GLOWCouplingBlock,
                cond=0,
                cond_shape=(seen,),
                subnet_constructor=partial(_subnet, c.flow_hidden),
                clamp=c.flow_clamp,
            )
            self.flow.append(PermuteRandom, seed=block)
        self.register_buffer("centre", torch.zeros(self.joints, 3))
        self.register_buffer("spread", torch.full((3,), 0.3))
        self._samplers = SamplerCache()

    def fit_standardisation(self, poses: Tensor) -> None:
        """Set centre and spread of what the networks see, from poses (N, J, 3) metres."""
        self._check_pose("poses", poses)
        self.centre.copy_(poses.mean(0))
        self.spread.copy_((poses - poses.mean(0)).square().mean((0, 1)).sqrt())

    # -- 2D poses ----------------------------------------------------------------------------

    def normalised(self, points: Tensor) -> Tensor:
        """2D poses (B, K, 2), of any place and size in the picture -> (B, 2 K): about their mean,
        over the root mean square distance from it."""
        if not isinstance(points, Tensor) or points.shape[1:] != (self.detector_joints, 2):
            got = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
            raise ValueError(f"points: expected shape (B, {self.detector_joints}, 2), got {got}")
        points = points - points.mean(1, keepdim=True)
        size = points.square().sum(-1).mean(-1).sqrt()
        return (points / size.clamp_min(1e-6)[:, None, None]).flatten(1)

    def pose_2d(self, persons: PersonBatch) -> Tensor:
        """The detected 2D poses (B, 2 K) of persons with ``mean``, normalised.

        Raises:
            ValueError: they have none, or of other joints.
        """
        (mean,) = persons.need("mean")
        if persons.detector_names and persons.detector_names != self.config.detector_names:
            raise ValueError(
                f"persons: expected detector_names {self.config.detector_names}, "
                f"got {persons.detector_names}"
            )
        return self.normalised(mean)

    # -- PILGD: Gaussians of 3D poses --------------------------------------------------------

    def encode(self, pose: Tensor, pose_2d: Tensor) -> Tensor:
        """Means (B, d) of the PILGD of 3D poses (B, J, 3) seen as (B, 2 K): equations 1, 2, 5."""
        self._check_pose("pose", pose)
        return soft_clamp(self.encoder(self._standard(pose), pose_2d), self.config.clamp)

    def decode(self, latent: Tensor, pose_2d: Tensor) -> Tensor:
        """3D poses (B, J, 3) of latents (B, d), or (B, M, J, 3) of (B, M, d): equation 3."""
        flat = self.decoder(latent, pose_2d)
        pose = flat.unflatten(-1, (self.joints, 3)) * self.spread + self.centre
        return pose - pose[..., self._root, :].mean(-2, keepdim=True)

    def energy(self, pose: Tensor, pose_2d: Tensor) -> Tensor:
        """What the discriminator says of 3D poses (B, J, 3): (B,) metres, the distances of joints
        between a pose and its reconstruction, summed; low for plausible ones."""
        self._check_pose("pose", pose)
        into, out = self.discriminator
        flat = out(into(self._standard(pose), pose_2d), pose_2d)
        again = flat.unflatten(-1, (self.joints, 3)) * self.spread + self.centre
        return joint_distance_loss(again, pose, reduction="none")

    # -- PAGD: Gaussians of 2D poses ---------------------------------------------------------

    def base(self, pose_2d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The PAGD of 2D poses (B, 2 K): means and standard deviations (B, d), equations 7, 8; and
        the poses as the autoencoder reconstructs them, (B, 2 K)."""
        code = self.encoder_2d(pose_2d)
        mean, log_sigma = self.project(code).chunk(2, -1)
        sigma = soft_clamp(log_sigma, self.config.log_sigma_clamp).exp()
        return soft_clamp(mean, self.config.clamp), sigma, self.decoder_2d(code)

    # -- the flow ----------------------------------------------------------------------------

    def to_base(self, latent: Tensor, pose_2d: Tensor) -> tuple[Tensor, Tensor]:
        """f: latents (B, d) of the PILGD -> (B, d) of the PAGD, and log|det| (B,)."""
        mapped, log_det = self.flow(latent, [pose_2d])
        return mapped, log_det

    def from_base(self, base: Tensor, pose_2d: Tensor, precision: str = "high") -> Tensor:
        """f^-1 of (B, M, d), given 2D poses (B, 2 K), without gradients."""
        latent = self._samplers.get(self.flow, precision)(pose_2d.detach(), z=base.detach())
        assert isinstance(latent, Tensor)
        return latent

    def latent_nll(self, latent: Tensor, pose_2d: Tensor) -> Tensor:
        """The negative log-density (B,) nats of latents (B, d), equation 10."""
        mean, sigma, _ = self.base(pose_2d)
        mapped, log_det = self.to_base(latent, pose_2d)
        return negative_log_likelihood(mapped, log_det, mean, sigma, reduction="none")

    @torch.no_grad()
    def sample_latents(
        self,
        pose_2d: Tensor,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        precision: str = "high",
        image_offset: int = 0,
    ) -> Tensor:
        """Latents (B, M, d) drawn from the PAGD through the flow; the first is what its mode is
        mapped to, with ``include_mode``. Noise and arguments as of
        :class:`fasthyp.HypothesisSampler`."""
        check_int("num_samples", num_samples, 1, 2**32)
        mean, sigma, _ = self.base(pose_2d)
        noise = philox_normal(
            *(len(pose_2d), num_samples, self.config.latent, seed, image_offset, include_mode)
        )
        base = mean[:, None] + sigma[:, None] * noise.to(mean)
        return self.from_base(base, pose_2d, precision)

    @torch.no_grad()
    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
        image_offset: int = 0,
        precision: str = "high",
    ) -> Hypotheses:
        """Hypotheses of persons with ``mean``, see :class:`fasthyp.models.Hypothesiser`. They have
        no density: the decoder is not invertible.

        Raises:
            ValueError: the persons lack their 2D pose.
        """
        pose_2d = self.pose_2d(persons)
        latent = self.sample_latents(
            pose_2d, num_samples, seed, include_mode, precision, image_offset
        )
        return Hypotheses(self.decode(latent, pose_2d), self.config.joint_names)

    # -- parts -------------------------------------------------------------------------------

    def pilgd_parameters(self) -> list[nn.Parameter]:
        """Of the first phase of training: g and k."""
        return [*self.encoder.parameters(), *self.decoder.parameters()]

    def pagd_parameters(self) -> list[nn.Parameter]:
        """Of the second phase of training, but the flow's: q, v and h."""
        parts = (self.encoder_2d, self.decoder_2d, self.project)
        return [parameter for part in parts for parameter in part.parameters()]

    def _standard(self, pose: Tensor) -> Tensor:
        return ((pose - self.centre) / self.spread).flatten(-2)

    def _check_pose(self, name: str, pose: Tensor) -> None:
        if not isinstance(pose, Tensor) or pose.ndim < 2 or pose.shape[-2:] != (self.joints, 3):
            got = tuple(pose.shape) if isinstance(pose, Tensor) else type(pose).__name__
            raise ValueError(f"{name}: expected shape (..., {self.joints}, 3), got {got}")


class ConditionalMLP(nn.Module):
    """ReLU layers on [x, condition], where many x may share a condition.

    Args:
        inputs, condition, outputs: widths; ``condition`` 0 for a network without one.
        hidden, layers: width and number of hidden layers.
    """

    def __init__(
        self, inputs: int, condition: int, outputs: int, hidden: int = 1024, layers: int = 2
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        self.inputs = inputs
        widths = [inputs + condition, *[hidden] * layers, outputs]
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(widths)])

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (B, inputs) or (B, M, inputs), condition (B, condition)."""
        first: Any = self.layers[0]
        if condition is None:
            x = first(x)
        else:  # the condition's part of the first layer, once for all x that share it
            shared = linear(condition, first.weight[:, self.inputs :], first.bias)
            x = linear(x, first.weight[:, : self.inputs])
            x = x + (shared if x.ndim == 2 else shared[:, None])
        for layer in self.layers[1:]:
            x = layer(x.relu())
        return x


def soft_clamp(x: Tensor, limit: float) -> Tensor:
    """``2 a / pi * atan(x / a)``, within (-a, a): equation 5, after Ardizzone et al., 2019."""
    return (2 * limit / math.pi) * (x / limit).atan()


def _subnet(hidden: int, inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
