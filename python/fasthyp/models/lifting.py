"""2D to 3D lifting with uncertainty: a conditional flow from fitted heatmap Gaussians to poses.

The design follows Wehrbein et al., "Probabilistic Monocular 3D Human Pose Estimation with
Normalizing Flows" (ICCV 2021, sections 3.1 and 3.2: affine coupling blocks conditioned on the
Gaussians fitted to a 2D detector's heatmaps), trained by maximum likelihood on all 39 numbers of a
pose. Data, recipe and measured figures are in the model card, ``docs/models/lifting.md``.
"""

from __future__ import annotations

import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fasthyp._files import replacing
from fasthyp.data.gaussian_features import gaussian_features
from fasthyp.data.persons import PersonBatch
from fasthyp.flows.describe import describe
from fasthyp.flows.program import FlowProgram, Linear
from fasthyp.heatmaps import fit_gaussians
from fasthyp.models.hypotheses import Hypotheses
from fasthyp.reference.coupling import LinearMap
from fasthyp.sampling import SamplerCache
from fasthyp.skeleton import COCO13_JOINTS

JOINTS = len(COCO13_JOINTS)
DIMS = 3 * JOINTS
FEATURES = 6 * JOINTS
CLAMP = 2.0
"""The soft clamp of the coupling blocks' log-scales, as in the ICCV 2021 code."""

_CONFIG_KEYS = ("blocks", "cond_dim", "cond_hidden", "hidden")


def _flow(hidden: int, blocks: int, cond_dim: int) -> Ff.GraphINN:
    def subnet(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    condition = Ff.ConditionNode(cond_dim, name="condition")
    nodes: list[Any] = [Ff.InputNode(DIMS, name="pose")]
    # PermuteRandom reseeds NumPy's global generator: leave the caller's as it was.
    random_state = np.random.get_state()  # noqa: NPY002
    try:
        for block in range(blocks):
            options = {"subnet_constructor": subnet, "clamp": CLAMP}
            nodes.append(Ff.Node(nodes[-1], Fm.GLOWCouplingBlock, options, conditions=condition))
            nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {"seed": block}))
        nodes.append(Ff.OutputNode(nodes[-1]))
        return Ff.GraphINN([*nodes, condition])
    finally:
        np.random.set_state(random_state)  # noqa: NPY002


def bone_basis() -> Tensor:
    """(39, 39) matrix taking the 13 joints of a pose to mid-hip, trunk, girdles and bones.

    An invertible linear map: the mid-hip, half the hip and shoulder vectors, the trunk, the head
    and the eight limb segments. Fewer of these directions are coupled than joint positions are.
    """
    rows = torch.zeros(JOINTS, JOINTS, dtype=torch.float64)
    halves = {1: (1, 2), 7: (7, 8)}  # left shoulder, left hip: half the vector across
    for left, (first, second) in halves.items():
        rows[left, first], rows[left, second] = 0.5, -0.5
    rows[8, 7] = rows[8, 8] = 0.5  # mid-hip
    rows[2, 1] = rows[2, 2] = 0.5  # trunk: mid-shoulder from mid-hip
    rows[2, 7] = rows[2, 8] = -0.5
    rows[0, 0], rows[0, 1], rows[0, 2] = 1.0, -0.5, -0.5  # head from mid-shoulder
    for joint in (3, 4, 5, 6, 9, 10, 11, 12):
        rows[joint, joint], rows[joint, joint - 2] = 1.0, -1.0
    return torch.kron(rows, torch.eye(3, dtype=torch.float64))


class LiftingFlow(nn.Module):
    """Distribution of the 13 COCO body joints in 3D, given the Gaussians of their 2D heatmaps.

    Poses are in metres, mid-hip centred, in camera axes (x right, y down, z forward).

    Args:
        hidden: width of the two-layer ReLU subnets.
        blocks: number of GLOW coupling blocks, each followed by a fixed permutation.
        cond_dim: width of the condition that the blocks see.
        cond_hidden: width of the hidden layer of the condition's MLP.

    Attributes:
        flow: the ``GraphINN`` over standardised poses; its forward direction takes a pose to a
            latent, ``rev=True`` a latent to a pose.
        joint_names: the 13 joints in order.
    """

    joint_names: tuple[str, ...] = COCO13_JOINTS
    whiten: Tensor
    unwhiten: Tensor
    centre: Tensor
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self, hidden: int = 1024, blocks: int = 8, cond_dim: int = 56, cond_hidden: int = 256
    ) -> None:
        super().__init__()
        self.config = {
            "hidden": hidden,
            "blocks": blocks,
            "cond_dim": cond_dim,
            "cond_hidden": cond_hidden,
        }
        for name, value in self.config.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.flow = _flow(hidden, blocks, cond_dim)
        self.condition_net = nn.Sequential(
            nn.Linear(FEATURES, cond_hidden), nn.ReLU(), nn.Linear(cond_hidden, cond_dim)
        )
        self.register_buffer("centre", torch.zeros(DIMS))
        self.register_buffer("whiten", torch.eye(DIMS))
        self.register_buffer("unwhiten", torch.eye(DIMS))
        self.register_buffer("feature_mean", torch.zeros(FEATURES))
        self.register_buffer("feature_std", torch.ones(FEATURES))
        self._samplers = SamplerCache()

    # -- standardisation ---------------------------------------------------------------------

    def fit_standardisation(self, pose: Tensor, features: Tensor) -> None:
        """Set the linear map around the flow from poses (N, 13, 3) and :meth:`features` (N, 78)."""
        basis = bone_basis()
        bones = pose.flatten(1).double() @ basis.T
        whiten = basis / bones.std(0)[:, None]
        self.centre.copy_(pose.flatten(1).mean(0))
        self.whiten.copy_(whiten)
        self.unwhiten.copy_(torch.linalg.inv(whiten))
        self.feature_mean.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0).clamp_min(1e-3))

    def to_pose(self, x: Tensor) -> Tensor:
        """Poses (..., 13, 3) in metres of the flow's 39 numbers (..., 39)."""
        if x.shape[-1:] != (DIMS,):
            raise ValueError(f"x: expected (..., {DIMS}), got {tuple(x.shape)}")
        return (x @ self.unwhiten.T + self.centre).unflatten(-1, (JOINTS, 3))

    def from_pose(self, pose: Tensor) -> Tensor:
        """The flow's 39 numbers (..., 39) of poses (..., 13, 3) in metres; inverts `to_pose`."""
        if pose.shape[-2:] != (JOINTS, 3):
            raise ValueError(f"pose: expected (..., {JOINTS}, 3), got {tuple(pose.shape)}")
        return (pose.flatten(-2) - self.centre) @ self.whiten.T

    @property
    def log_det_whiten(self) -> Tensor:
        """log |d x / d pose| of `from_pose`, a constant."""
        return torch.linalg.slogdet(self.whiten.double())[1].to(self.whiten.dtype)

    # -- condition ---------------------------------------------------------------------------

    @staticmethod
    def features(
        amplitude: Tensor, mean: Tensor, covariance: Tensor, size: tuple[int, int] = (64, 64)
    ) -> Tensor:
        """What the condition's MLP sees of the Gaussians (before standardisation): (B, 78).

        :func:`fasthyp.data.gaussian_features` of the 13 joints.

        Args:
            amplitude: (B, 13) peak of each fitted Gaussian (a sigmoid heatmap's is about 1).
            mean: (B, 13, 2) x, y in heatmap cells.
            covariance: (B, 13, 2, 2) cells^2, x right, y down.
            size: (H, W) of the heatmap.

        Raises:
            ValueError: a wrong shape, an empty size, or, on a CPU, a NaN or infinite value (on a
                GPU, to look would be to wait).
        """
        return gaussian_features(amplitude, mean, covariance, size, JOINTS)

    def condition(
        self, amplitude: Tensor, mean: Tensor, covariance: Tensor, size: tuple[int, int] = (64, 64)
    ) -> Tensor:
        """Condition (B, cond_dim) of B persons' fitted Gaussians; arguments as :meth:`features`."""
        return self.encode(self.features(amplitude, mean, covariance, size))

    def encode(self, features: Tensor) -> Tensor:
        """Condition (B, cond_dim) of :meth:`features` (B, 78)."""
        return self.condition_net((features - self.feature_mean) / self.feature_std)

    # -- density and samples -----------------------------------------------------------------

    def program(self) -> FlowProgram:
        """The whole flow as data, standardisation included: from the 39 numbers of a pose in metres
        to the latent."""
        program = describe(self.flow)
        standardise = Linear((self.whiten, self.unwhiten, self.centre), _standardise)
        program.steps = (standardise, *program.steps)
        program.watch.module(self)
        return program

    def log_prob(self, pose: Tensor, cond: Tensor) -> Tensor:
        """Log-density in nats (B, M) of poses (B, M, 13, 3) in metres under conditions (B, C).

        The density is over the 39 numbers of a pose, in metres.
        """
        if pose.ndim != 4 or cond.ndim != 2 or len(pose) != len(cond):
            raise ValueError(
                f"pose, cond: expected (B, M, {JOINTS}, 3) and (B, C), "
                f"got {tuple(pose.shape)} and {tuple(cond.shape)}"
            )
        batch, number = pose.shape[:2]
        rows = cond[:, None].expand(-1, number, -1).flatten(0, 1)
        z, log_det = self.flow(self.from_pose(pose).flatten(0, 1), c=[rows])
        log_normal = -0.5 * (z.square().sum(-1) + DIMS * math.log(2 * math.pi))
        return (log_normal + log_det + self.log_det_whiten).unflatten(0, (batch, number))

    def sample(
        self,
        cond: Tensor,
        num_samples: int,
        seed: int | None = None,
        include_mode: bool = False,
        return_log_prob: bool = False,
        precision: str = "high",
        image_offset: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw hypotheses (B, M, 13, 3) in metres for conditions (B, C).

        Args:
            cond: (B, C) from :meth:`condition`.
            num_samples: M.
            seed: the same seed gives the same hypotheses.
            include_mode: put the hypothesis of z = 0 first.
            return_log_prob: also return the log-density in nats (B, M), as :meth:`log_prob`.
            precision: of :class:`fasthyp.HypothesisSampler`.
            image_offset: number of the first condition, where these are part of a longer list.
        """
        x, log_prob = self._samplers.get(self.program, precision)(
            *(cond, num_samples),
            seed=seed,
            include_mode=include_mode,
            return_log_prob=True,
            image_offset=image_offset,
        )
        pose = x.unflatten(-1, (JOINTS, 3))
        return (pose, log_prob) if return_log_prob else pose

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
        """See :class:`fasthyp.models.Hypothesiser`; without ``vertices``.

        Args:
            persons: with the Gaussians ``amplitude``, ``mean`` and ``covariance`` of detector
                joints among which the 13 are, in cells of a map of 64 x 64, or, where there are
                none, with ``heatmaps``, which are then fitted. A joint whose Gaussian is NaN, or
                whose heatmap could not be fitted, enters as a wide blob about the others; a person
                of whom there is none gets NaN.

        Raises:
            ValueError: neither is known, or the detector lacks one of the 13 joints; names it.
        """
        from fasthyp.estimator import condition_of, is_fitted
        from fasthyp.observations import Gaussians

        joints = self._detected(persons)
        size = (64, 64)
        if persons.mean is None and persons.heatmaps is not None:
            size = (persons.heatmaps.shape[-2], persons.heatmaps.shape[-1])
            fit = fit_gaussians(persons.heatmaps[:, joints])
            given = Gaussians(fit.amplitude, fit.mean, fit.covariance)
            observed = is_fitted(fit)
        else:
            known = persons.need("amplitude", "mean", "covariance")
            given = Gaussians(*(values[:, joints] for values in known))
            numbers = [given.amplitude[..., None], given.mean, given.covariance.flatten(-2)]
            observed = torch.cat(numbers, -1).isfinite().all(-1)
        cond = condition_of(self, given, observed, size)
        options = (seed, include_mode, True, precision, image_offset)
        pose, log_prob = self.sample(cond, num_samples, *options)
        assert isinstance(log_prob, Tensor)
        lost = ~observed.any(1)[:, None]  # a ReLU in the flow may have lost the condition's NaN
        return Hypotheses(
            pose.masked_fill(lost[..., None, None], torch.nan),
            self.joint_names,
            log_prob.masked_fill(lost, torch.nan),
        )

    def _detected(self, persons: PersonBatch) -> list[int]:
        """Where the 13 joints are among the detector's."""
        names = persons.detector_names
        for name in self.joint_names:
            if name not in names:
                raise ValueError(f"persons: the detector has no joint {name!r}, only {names}")
        return [names.index(name) for name in self.joint_names]

    # -- files -------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str]) -> Path:
        """Write weights (float16 safetensors) and configuration (JSON beside them).

        Args:
            path: a ``.safetensors`` file, or a folder in which to write ``lifting.safetensors``.

        Returns:
            The weights' path. Each file is written under a temporary name and renamed.
        """
        target = _weights_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {}
        learned = {name for name, value in self.named_parameters() if value.is_floating_point()}
        for name, value in self.state_dict().items():
            dtype = torch.float16 if name in learned else value.dtype
            tensors[name] = value.detach().cpu().to(dtype).contiguous()
        config = (json.dumps(self.config, indent=2) + "\n").encode()
        for file, content in ((target, save(tensors)), (target.with_suffix(".json"), config)):
            with replacing(file) as temporary:
                temporary.write_bytes(content)
        return target

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str] | None = None) -> LiftingFlow:
        """Load a model written by :meth:`save_pretrained`; ``None`` loads the bundled one.

        Weights are stored in float16 and held in float32.

        Raises:
            ValueError: a file is missing or truncated, or a tensor is missing, unknown or of the
                wrong shape; the message names it.
        """
        if path is None:
            with resources.as_file(resources.files("fasthyp.models") / "weights") as folder:
                return cls.from_pretrained(folder)
        target = _weights_path(path)
        config_path = target.with_suffix(".json")
        try:
            config = json.loads(config_path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{config_path}: not a readable configuration: {error}") from error
        if not isinstance(config, dict) or tuple(sorted(config)) != _CONFIG_KEYS:
            raise ValueError(f"{config_path}: expected the keys {_CONFIG_KEYS}, got {config!r}")
        model = cls(**config)
        try:
            tensors = load_file(str(target))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{target}: not a readable safetensors file: {error}") from error
        wanted = model.state_dict()
        for name in sorted(wanted.keys() | tensors.keys()):
            if name not in tensors:
                raise ValueError(f"{target}: tensor {name!r} is missing")
            if name not in wanted:
                raise ValueError(f"{target}: unknown tensor {name!r}")
            if tensors[name].shape != wanted[name].shape:
                raise ValueError(
                    f"{target}: tensor {name!r}: expected {tuple(wanted[name].shape)}, "
                    f"got {tuple(tensors[name].shape)}"
                )
        model.load_state_dict({k: v.to(wanted[k].dtype) for k, v in tensors.items()})
        return model.eval()


def _standardise(whiten: Tensor, unwhiten: Tensor, centre: Tensor) -> LinearMap:
    return LinearMap(whiten, -whiten @ centre, torch.linalg.slogdet(whiten)[1], unwhiten)


def _weights_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "lifting.safetensors"
