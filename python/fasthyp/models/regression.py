"""Plain regression of one pose a person: what a distribution is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fasthyp.body.linear import LinearBody
from fasthyp.body.stick import h36m17_regressor, stick_body
from fasthyp.data.persons import PersonBatch
from fasthyp.geometry import rotation_6d_to_matrix
from fasthyp.models._pretrained import PretrainedModel
from fasthyp.models.hypotheses import Hypotheses
from fasthyp.skeleton import H36M17_JOINTS

_BODY_JOINTS = 24


def mlp_trunk(features: int, width: int, depth: int) -> nn.Sequential:
    """``depth`` linear layers with ReLU after each, (B, features) to (B, width)."""
    widths = [features, *[width] * depth]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class RegressionConfig:
    """Of :class:`Regression`.

    Attributes:
        features: C of ``persons.features`` (B, C).
        width, depth: of the trunk.
        target: ``"joints"``, 17 positions; or ``"body"``, 24 rotations and 10 shape coefficients
            of the stick body.
    """

    features: int = 102
    width: int = 512
    depth: int = 2
    target: str = "joints"

    def __post_init__(self) -> None:
        if self.target not in ("joints", "body"):
            raise ValueError(f"target: expected 'joints' or 'body', got {self.target!r}")
        for name in ("features", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


class Regression(PretrainedModel):
    """An MLP from features to one pose, of Human3.6M's 17 joints in camera axes.

    Args:
        config: a :class:`RegressionConfig`.
        changes: settings that differ from it.
    """

    Config = RegressionConfig
    config: RegressionConfig

    def __init__(self, config: RegressionConfig | None = None, **changes: object) -> None:
        super().__init__(config, **changes)
        config = self.config
        self.trunk = mlp_trunk(config.features, config.width, config.depth)
        self.body: LinearBody | None = None
        if config.target == "body":
            self.body = stick_body()
            self.register_buffer("joints", h36m17_regressor(), persistent=False)
            self.head = nn.Linear(config.width, 6 * _BODY_JOINTS + self.body.num_betas)
            with torch.no_grad():  # begins at the upright T pose, seen from the front
                self.head.weight.mul_(0.1)
                identity = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).repeat(_BODY_JOINTS)
                self.head.bias[: len(identity)] = identity
                self.head.bias[:6] = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0, 0.0])
        else:
            self.head = nn.Linear(config.width, 3 * len(H36M17_JOINTS))

    def forward(self, features: Tensor) -> Tensor:
        """Poses (B, 17, 3) in metres of features (B, C)."""
        if features.ndim != 2 or features.shape[1] != self.config.features:
            expected = self.config.features
            raise ValueError(f"features: expected (B, {expected}), got {tuple(features.shape)}")
        return self._pose(features)[0]

    def parameters_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Rotations (B, 24, 3, 3) and shape coefficients (B, 10), with ``target="body"``."""
        if self.body is None:
            raise ValueError("target: expected 'body', got 'joints'")
        numbers = self.head(self.trunk(features)).float()
        number = 6 * _BODY_JOINTS
        rotations = rotation_6d_to_matrix(numbers[:, :number].unflatten(1, (_BODY_JOINTS, 6)))
        return rotations, numbers[:, number:]

    def _pose(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.body is None:
            numbers = self.head(self.trunk(features)).float()
            return numbers.unflatten(1, (len(H36M17_JOINTS), 3)), None
        rotations, betas = self.parameters_of(features)
        vertices = self.body(betas, rotations, pose2rot=False).vertices
        assert vertices is not None
        return self.joints @ vertices, vertices

    def saved_state(self) -> dict[str, Tensor]:
        """All but the body, which is the same in every model."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("body.")}

    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
        image_offset: int = 0,
    ) -> Hypotheses:
        """The one pose, ``num_samples`` times.

        Raises:
            ValueError: persons without features, or of another width.
        """
        (features,) = persons.need("features")
        pose, points = self._pose(features)

        def repeated(values: Tensor) -> Tensor:
            return values[:, None].expand(-1, num_samples, -1, -1)

        shown = repeated(points) if vertices and points is not None else None
        return Hypotheses(repeated(pose), H36M17_JOINTS, vertices=shown)
