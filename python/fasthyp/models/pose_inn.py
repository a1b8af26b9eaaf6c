"""The network of Wehrbein, Rudolph, Rosenhahn and Wandt, "Probabilistic Monocular 3D Human Pose
Estimation with Normalizing Flows", ICCV 2021, and its published checkpoints."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.data.persons import PersonBatch
from fasthyp.flows import GLOWCouplingBlock, PermuteRandom, SequenceINN
from fasthyp.flows.freia_old import OldGLOWCouplingBlock, OldInputNode, OldPermuteRandom
from fasthyp.models._pretrained import PretrainedModel, load_exactly
from fasthyp.models.hypotheses import Hypotheses
from fasthyp.models.pose_inn_input import camera_joints, person_input
from fasthyp.sampling import SamplerCache
from fasthyp.skeleton import H36M17_JOINTS

POSE_DIM = 48  # 16 joints, all x, then all y, then all z
FIXED_DIM = 32  # of the latent: the 2D pose
NOISE_DIM = POSE_DIM - FIXED_DIM
GAUSS_DIM = 78  # 13 joints x (amplitude, mean x, mean y, variance x, covariance, variance y)


@dataclass(frozen=True)
class PoseINNConfig:
    """The network of section 4.2 of the paper.

    Attributes:
        hidden: width of the coupling subnets.
        freia: ``"old"`` computes as the FrEIA that the published checkpoints were trained with
            (the clamp of the paper's equation 2 and its ``state_dict`` keys), ``"0.2"`` as FrEIA
            0.2, whose clamp is steeper. The same weights give different poses.
        blocks: GLOW coupling blocks, each followed by a random permutation.
        clamp: alpha of equation 2.
        condition_hidden, condition: widths of the condition network.
        heatmap_std: of the detector's training heatmaps, in cells.
        heatmap_size: side of the heatmaps in cells.
    """

    hidden: int = 1024
    freia: str = "old"
    blocks: int = 8
    clamp: float = 2.0
    condition_hidden: int = 256
    condition: int = 56
    heatmap_std: float = 2.0
    heatmap_size: int = 64

    @classmethod
    def official(cls) -> PoseINNConfig:
        """That of the authors' code, whose subnets are 1028 wide where the paper says 1024."""
        return cls(hidden=1028)

    @classmethod
    def small(cls) -> PoseINNConfig:
        """An eighth of the width, for training on a processor core."""
        return cls(hidden=128)


def _subnet(hidden: int, inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class PoseINN(PretrainedModel):
    """Invertible network between a 3D pose and [z, 2D pose], conditioned on fitted Gaussians.

    Eight GLOW coupling blocks with random permutations over 48 numbers; the condition is the
    Gaussians through an MLP 78 -> 256 -> 56. All weights of the blocks start as N(0, 0.05^2), as
    in the authors' code.

    Args:
        config: a :class:`PoseINNConfig`.
        changes: settings that differ from it, such as ``hidden=256``.
    """

    Config = PoseINNConfig

    def __init__(self, config: PoseINNConfig | None = None, **changes: Any) -> None:
        super().__init__(config, **changes)
        settings: PoseINNConfig = self.config
        if settings.freia not in ("0.2", "old"):
            raise ValueError(f'freia: expected "0.2" or "old", got {settings.freia!r}')
        old = settings.freia == "old"
        self.inn = SequenceINN(POSE_DIM)
        if old:
            self.inn.append(OldInputNode)
        for k in range(settings.blocks):
            self.inn.append(
                OldGLOWCouplingBlock if old else GLOWCouplingBlock,
                cond=0,
                cond_shape=(settings.condition,),
                subnet_constructor=partial(_subnet, settings.hidden),
                clamp=settings.clamp,
            )
            self.inn.append(OldPermuteRandom if old else PermuteRandom, seed=k)
        with torch.no_grad():
            for parameter in self.inn.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0.0, 0.05)
        self.cond_net = nn.Sequential(
            nn.Linear(GAUSS_DIM, settings.condition_hidden),
            nn.ReLU(),
            nn.Linear(settings.condition_hidden, settings.condition),
        )
        self._samplers = SamplerCache()

    def forward(self, x: Tensor, gauss: Tensor) -> tuple[Tensor, Tensor]:
        """3D pose x (N, 48), Gaussians (N, 78) -> [z, 2D pose] (N, 48), log|det| (N,)."""
        return self.inn(x, [self.cond_net(gauss)])

    def reverse(self, y: Tensor, gauss: Tensor) -> tuple[Tensor, Tensor]:
        """[z, 2D pose] y (N, 48), Gaussians (N, 78) -> 3D pose (N, 48), log|det| (N,)."""
        return self.inn(y, [self.cond_net(gauss)], rev=True)

    def inverse(self, y: Tensor, gauss: Tensor) -> Tensor:
        """M latents [z, 2D pose] y (B, M, 48) of each of the Gaussians (B, 78) -> 3D poses
        (B, M, 48), with gradients. What depends on the Gaussians alone is computed once for each
        image, not once for each latent."""
        poses: Tensor = self.inn.flow().inverse(y, self.cond_net(gauss))[0]
        return poses

    @torch.no_grad()
    def sample(
        self,
        gauss: Tensor,
        pose_2d: Tensor,
        num_samples: int | None = None,
        precision: str = "high",
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hypotheses of the 3D pose.

        Args:
            gauss: fitted Gaussians (B, 78).
            pose_2d: normalised 2D pose (B, 32), the part of the latent that is not noise.
            num_samples: M, 1000 unless told.
            precision: ``"highest"``, ``"high"`` or ``"medium"``.
            options: as of :class:`fasthyp.HypothesisSampler`: ``seed``, ``include_mode``, ...

        Returns:
            3D poses (B, M, 48); with ``return_log_prob=True`` also the log-density (B, M).
        """
        if not isinstance(gauss, Tensor):
            raise TypeError(f"gauss: expected a tensor, got {type(gauss).__name__}")
        if gauss.dim() != 2 or gauss.shape[1] != GAUSS_DIM:
            raise ValueError(f"gauss: expected shape (B, {GAUSS_DIM}), got {tuple(gauss.shape)}")
        if isinstance(pose_2d, Tensor) and pose_2d.shape[1:] != (FIXED_DIM,):
            got = tuple(pose_2d.shape)
            raise ValueError(f"pose_2d: expected shape (B, {FIXED_DIM}), got {got}")
        sampler = self._samplers.get(self.inn, precision)
        return sampler(self.cond_net(gauss), num_samples, fixed=pose_2d, **options)

    def inputs(self, persons: PersonBatch) -> tuple[Tensor, Tensor]:
        """Gaussians (B, 78) and 2D poses (B, 32) of persons; see
        :func:`fasthyp.models.pose_inn_input.person_input`."""
        return person_input(persons, self.config.heatmap_std, self.config.heatmap_size)

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
        """See :class:`fasthyp.models.hypotheses.Hypothesiser`: the 17 joints of Human3.6M, of
        persons with the Gaussians of the 16 joints of MPII. ``log_prob`` is that of the pose given
        its 2D pose, in the model's frame (metres). There are no vertices.

        Raises:
            ValueError: other joints, or no Gaussians.
        """
        options: dict[str, Any] = {
            "seed": seed,
            "include_mode": include_mode,
            "image_offset": image_offset,
        }
        poses, log_prob = self.sample(
            *self.inputs(persons), num_samples, precision, return_log_prob=True, **options
        )
        return Hypotheses(camera_joints(poses), H36M17_JOINTS, log_prob)

    @classmethod
    def from_checkpoint(
        cls, path: str | PathLike[str], device: torch.device | str = "cpu"
    ) -> PoseINN:
        """Load the authors' ``{'net': state_dict}`` or a bare state dict, in eval mode.

        Both layouts are read: that of the published checkpoints (FrEIA before 0.2; permutations
        rebuilt from their seeds) and that of FrEIA 0.2. The hidden width is the checkpoint's.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a checkpoint of this network; names the tensor that is missing, too
                many, or of the wrong shape.
        """
        state = _read_state(path, device)
        old = any(".s1." in key for key in state)
        first = "inn.module_list.1.s1.0.weight" if old else "inn.module_list.0.subnet1.0.weight"
        if first not in state or state[first].dim() != 2:
            raise ValueError(f"{path}: not a checkpoint of this network: no matrix {first}")
        config = replace(
            cls.Config.official(), hidden=state[first].shape[0], freia="old" if old else "0.2"
        )
        model = cls(config)
        load_exactly(model, state, str(path))
        return model.to(device).eval()


def _read_state(path: str | PathLike[str], device: torch.device | str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error
    state = content.get("net", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    state = {key: value for key, value in state.items() if "tmp_var" not in str(key)}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key}: expected a tensor, got {type(value).__name__}")
    return state
