"""The network of Wehrbein, Rudolph, Rosenhahn and Wandt, "Probabilistic Monocular 3D Human Pose
Estimation with Normalizing Flows", ICCV 2021, and its published checkpoints."""

from __future__ import annotations

import pickle
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp._files import replacing
from fasthyp.flows import GLOWCouplingBlock, PermuteRandom, SequenceINN
from fasthyp.flows.freia_old import OldGLOWCouplingBlock, OldInputNode, OldPermuteRandom
from fasthyp.sampling import SamplerCache

BLOCKS = 8
CLAMP = 2.0
POSE_DIM = 48  # 16 joints, all x, then all y, then all z
FIXED_DIM = 32  # of the latent: the 2D pose
GAUSS_DIM = 78  # 13 joints x (amplitude, mean x, mean y, variance x, covariance, variance y)
COND_DIM = 56


def _subnet(hidden: int, inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class PoseINN(nn.Module):
    """Invertible network between a 3D pose and [z, 2D pose], conditioned on fitted Gaussians.

    Eight GLOW coupling blocks with random permutations over 48 numbers; the condition is the
    Gaussians through an MLP 78 -> 256 -> 56.

    Args:
        hidden: width of the coupling subnets.
        freia: ``"old"`` computes as the FrEIA that the published checkpoints were trained with
            (its clamp and its ``state_dict`` keys), ``"0.2"`` as FrEIA 0.2. The same weights give
            different poses.
    """

    def __init__(self, hidden: int = 1028, freia: str = "0.2") -> None:
        super().__init__()
        if freia not in ("0.2", "old"):
            raise ValueError(f'freia: expected "0.2" or "old", got {freia!r}')
        self.freia = freia
        self.inn = SequenceINN(POSE_DIM)
        if freia == "old":
            self.inn.append(OldInputNode)
        block, permute = (
            (OldGLOWCouplingBlock, OldPermuteRandom)
            if freia == "old"
            else (GLOWCouplingBlock, PermuteRandom)
        )
        for k in range(BLOCKS):
            self.inn.append(
                block,
                cond=0,
                cond_shape=(COND_DIM,),
                subnet_constructor=partial(_subnet, hidden),
                clamp=CLAMP,
            )
            self.inn.append(permute, seed=k)
        with torch.no_grad():
            for parameter in self.inn.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0.0, 0.05)
        self.cond_net = nn.Sequential(
            nn.Linear(GAUSS_DIM, 256), nn.ReLU(), nn.Linear(256, COND_DIM)
        )
        self._samplers = SamplerCache()

    def forward(self, x: Tensor, gauss: Tensor) -> tuple[Tensor, Tensor]:
        """3D pose x (N, 48), Gaussians (N, 78) -> [z, 2D pose] (N, 48), log|det| (N,)."""
        return self.inn(x, [self.cond_net(gauss)])

    def reverse(self, y: Tensor, gauss: Tensor) -> tuple[Tensor, Tensor]:
        """[z, 2D pose] y (N, 48), Gaussians (N, 78) -> 3D pose (N, 48), log|det| (N,)."""
        return self.inn(y, [self.cond_net(gauss)], rev=True)

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

    @classmethod
    def from_checkpoint(
        cls, path: str | PathLike[str], device: torch.device | str = "cpu"
    ) -> PoseINN:
        """Load a checkpoint ``{'net': state_dict}`` or a bare state dict, in eval mode.

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
        model = cls(hidden=state[first].shape[0], freia="old" if old else "0.2")
        expected = model.state_dict()
        for key in sorted(expected.keys() | state.keys()):
            if key not in state:
                raise ValueError(f"{path}: tensor {key} is missing")
            if key not in expected:
                raise ValueError(f"{path}: unexpected tensor {key}")
            if state[key].shape != expected[key].shape:
                raise ValueError(
                    f"{path}: tensor {key}: expected shape {tuple(expected[key].shape)}, "
                    f"got {tuple(state[key].shape)}"
                )
        model.load_state_dict(state)
        return model.to(device).eval()

    def save(self, path: str | PathLike[str]) -> None:
        """Write ``{'net': state_dict}``, which :meth:`from_checkpoint` reads.

        Raises:
            OSError: the file cannot be written; nothing is left behind.
        """
        with replacing(path) as temporary:
            torch.save({"net": self.state_dict()}, temporary)


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
