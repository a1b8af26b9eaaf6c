"""What POCO adds to a regressor: a scale of each part's error, and the density of the error."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fasthyp.flows.realnvp import RealNVP, realnvp_masks
from fasthyp.losses.residual import normalised_residual
from fasthyp.models.poco.heads import PARTS
from fasthyp.ops.coupling import philox_normal
from fasthyp.sampling import SamplerCache

POSE = 9 * PARTS
ScaleInput = Literal["reduced", "feat", "feat-pose", "feat-pose-net"]
SCALE_INPUTS = ("reduced", "feat", "feat-pose", "feat-pose-net")
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "softplus": nn.Softplus}


class ScaleNetwork(nn.Module):
    """NN_sc of POCO: how wrong each part of the regressed pose is, from the image and the pose.

    Section 3.3.2 of the paper, "Cond-Scale"; ``uncert_head`` of its code.

    Args:
        features: F, width of the image features.
        inputs: ``"reduced"``, the paper's: features reduced to ``hidden`` numbers, then the pose
            beside them. The code's: ``"feat"`` without the pose, ``"feat-pose"`` with the pose
            beside the features (POCO-PARE), ``"feat-pose-net"`` with a layer of its own for each
            of the two (POCO-CLIFF).
        hidden: width of the hidden layers.
        sigma_dim: numbers of a part: 1, or 9 for each entry of its rotation matrix.
        activation: of every layer, the last one included: ``"sigmoid"`` or ``"softplus"``.
        dropout: before the activation of every layer.
        drop_output: dropout in the last layer as well, as the code has it: half of the scales are
            then sigmoid(0) = 0.5 in training.
    """

    def __init__(
        self,
        features: int,
        inputs: ScaleInput = "reduced",
        hidden: int = 216,
        sigma_dim: int = 1,
        activation: str = "sigmoid",
        dropout: float = 0.0,
        drop_output: bool = False,
    ) -> None:
        super().__init__()
        if inputs not in SCALE_INPUTS:
            names = ", ".join(map(repr, SCALE_INPUTS))
            raise ValueError(f"scale_input: expected one of {names}, got {inputs!r}")
        if activation not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"scale_activation: expected one of {names}, got {activation!r}")
        if sigma_dim not in (1, 9):
            raise ValueError(f"sigma_dim: expected 1 or 9, got {sigma_dim}")
        self.inputs, self.sigma_dim = inputs, sigma_dim
        self.pose_net = nn.Linear(POSE, hidden) if inputs == "feat-pose-net" else None
        self.feature_net = nn.Linear(features + (POSE if inputs == "feat-pose" else 0), hidden)
        beside = {"reduced": POSE, "feat-pose-net": hidden}.get(inputs, 0)
        self.output = nn.Linear(hidden + beside, PARTS * sigma_dim)
        self.dropout = nn.Dropout(dropout)
        self.drop_output = nn.Dropout(dropout if drop_output else 0.0)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, features: Tensor, pose: Tensor) -> Tensor:
        """Features (B, F), pose (B, 24, 3, 3) -> scales (B, 24), or (B, 24, 3, 3)."""
        pose = pose.flatten(1)
        if self.inputs == "feat-pose":
            features = torch.cat([features, pose], 1)
        x = self._layer(self.feature_net, features)
        if self.pose_net is not None:
            x = torch.cat([x, self._layer(self.pose_net, pose)], 1)
        elif self.inputs == "reduced":
            x = torch.cat([x, pose], 1)
        sigma = self.activation(self.drop_output(self.output(x)))
        return sigma if self.sigma_dim == 1 else sigma.unflatten(1, (PARTS, 3, 3))

    def _layer(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return self.activation(self.dropout(linear(x)))


class ErrorDensity(nn.Module):
    """The base density of POCO: of residuals in units of their scale, given the image.

    Section 3.3.1 of the paper, "Cond-bDF"; ``flow_head`` of its code.

    Args:
        features: F, width of the image features.
        condition: width of what the flow sees of them; 0 for a density that all images share.
        dim: 9, the density of one part's residual, every part for itself; or 24, of the mean
            residuals of all parts.
        layers: pairs of masked couplings.
        hidden: width of the couplings' networks.
        masks: :func:`fasthyp.flows.realnvp.realnvp_masks`.
        absolute: of absolute residuals, as the code has it; it then has no sign to draw.
    """

    def __init__(
        self,
        features: int,
        condition: int = 512,
        dim: int = 9,
        layers: int = 1,
        hidden: int = 64,
        masks: str = "alter",
        absolute: bool = False,
    ) -> None:
        super().__init__()
        if dim not in (9, PARTS):
            raise ValueError(f"flow_dim: expected 9 or {PARTS}, got {dim}")
        self.dim, self.absolute = dim, absolute
        self.condition = nn.Linear(features, condition) if condition else None
        prior = torch.distributions.MultivariateNormal(torch.zeros(dim), torch.eye(dim))
        self.flow = RealNVP(
            partial(_net, nn.Tanh()),
            partial(_net, None),
            (dim + condition, hidden, dim),
            realnvp_masks(masks, dim, layers),
            prior,
        )
        self._samplers = SamplerCache()

    def log_prob(self, features: Tensor, pose: Tensor, truth: Tensor, sigma: Tensor) -> Tensor:
        """log P of the residual truth - pose in units of sigma.

        Args:
            features: (B, F).
            pose, truth: (B, 24, 3, 3).
            sigma: (B, 24) or (B, 24, 3, 3).

        Returns:
            (B, 24) nats of each part's residual; for ``dim`` 24 (B, 1) of the mean ones.
        """
        residual = normalised_residual(pose, truth, sigma, official=self.absolute)
        rows = residual.mean((2, 3)) if self.dim == PARTS else residual.reshape(-1, 9)
        return self.flow.log_prob(rows, self._condition(features, len(rows))).view(len(pose), -1)

    def draw(
        self,
        features: Tensor,
        number: int,
        seed: int = 0,
        image_offset: int = 0,
        precision: str = "high",
    ) -> Tensor:
        """Residuals (B, number, 24, 3, 3) in units of sigma: a person's depend on the seed and the
        person's number, the first of a batch being ``image_offset``, alone; more go on from fewer.

        Raises:
            ValueError: the density is of absolute residuals, or of the parts' mean ones.
        """
        if self.absolute or self.dim != 9:
            what = "absolute" if self.absolute else "the parts' mean"
            raise ValueError(f"num_samples: expected 1, as {what} residuals say no pose; got more")
        rows = PARTS * len(features)
        noise = philox_normal(rows, number, 9, seed, PARTS * image_offset).to(features)
        drawn = self._samplers.get(self.flow, precision)(self._condition(features, rows), z=noise)
        assert isinstance(drawn, Tensor)
        return drawn.view(len(features), PARTS, number, 3, 3).transpose(1, 2)

    def _condition(self, features: Tensor, rows: int) -> Tensor | None:
        if self.condition is None:
            return None
        return self.condition(features).repeat_interleave(rows // max(len(features), 1), 0)


def _net(ending: nn.Module | None, inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.LeakyReLU()]
    layers += [nn.Linear(hidden, hidden), nn.LeakyReLU(), nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers, *([] if ending is None else [ending]))
