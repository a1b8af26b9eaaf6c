"""The regressors that POCO is put on, from image features to a body: HMR, CLIFF and PARE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasthyp.geometry import rotation_6d_to_matrix

PARTS = 24
"""Parts of the SMPL body, of which each has a rotation and an uncertainty."""
BOX_INFO = 3


@dataclass(frozen=True)
class Regressed:
    """What a head says of B persons.

    Attributes:
        pose: (B, 24, 3, 3) rotations relative to the parent, the root's first.
        betas: (B, S) shape coefficients.
        camera: (B, 3) weak perspective (s, t_x, t_y).
        features: (B, F) that the scale network and the error density see.
    """

    pose: Tensor
    betas: Tensor
    camera: Tensor
    features: Tensor


class _Head(nn.Module):
    """A head with a mean body, from which the regression starts. Rotations are six numbers each,
    the first two columns of the matrix row by row (SPIN's layout)."""

    init_pose: Tensor
    init_shape: Tensor
    init_cam: Tensor

    def __init__(self, betas: int) -> None:
        super().__init__()
        rest = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
        self.register_buffer("init_pose", rest.repeat(1, PARTS))
        self.register_buffer("init_shape", torch.zeros(1, betas))
        self.register_buffer("init_cam", torch.tensor([[0.9, 0.0, 0.0]]))

    def start_at(self, pose: Tensor, betas: Tensor, camera: Tensor | None = None) -> None:
        """Set the mean body: rotations (24, 3, 3), not necessarily orthonormal, coefficients (S,)
        and camera (3,). Until then it is the rest pose, seen at scale 0.9."""
        self.init_pose.copy_(pose[..., :2].reshape(1, -1))
        self.init_shape.copy_(betas[None])
        if camera is not None:
            self.init_cam.copy_(camera[None])

    def _regressed(
        self, pose: Tensor, betas: Tensor, camera: Tensor, features: Tensor
    ) -> Regressed:
        rotations = rotation_6d_to_matrix(pose.reshape(-1, PARTS, 6), "interleaved")
        return Regressed(rotations, betas, camera, features)


class IterativeHead(_Head):
    """The regression with error feedback of HMR (Kanazawa et al., CVPR 2018), and CLIFF's
    (Li et al., ECCV 2022), which also sees where the box is in the image.

    Parameters and buffers have the names of both codes.

    Args:
        features: C, the width of the pooled image features.
        hidden: width of the two layers.
        betas: number of shape coefficients.
        dropout: after each of the two layers, which have no activation.
        box_info: whether three numbers of the box come after the features.
        iterations: how often the estimate is corrected.
    """

    def __init__(
        self,
        features: int,
        hidden: int = 1024,
        betas: int = 10,
        dropout: float = 0.5,
        box_info: bool = False,
        iterations: int = 3,
    ) -> None:
        super().__init__(betas)
        pose = 6 * PARTS
        self.box_info, self.iterations, self.width = box_info, iterations, features
        inputs = features + pose + betas + 3 + (BOX_INFO if box_info else 0)
        self.fc1, self.drop1 = nn.Linear(inputs, hidden), nn.Dropout(dropout)
        self.fc2, self.drop2 = nn.Linear(hidden, hidden), nn.Dropout(dropout)
        self.decpose = nn.Linear(hidden, pose)
        self.decshape = nn.Linear(hidden, betas)
        self.deccam = nn.Linear(hidden, 3)
        for last in (self.decpose, self.decshape, self.deccam):
            nn.init.xavier_uniform_(last.weight, gain=0.01)

    def forward(self, features: Tensor, box_info: Tensor | None = None) -> Regressed:
        """Features (B, C), or (B, C, H, W), which are averaged over the picture, and the box
        (B, 3) where it is wanted."""
        if features.ndim == 4:
            features = features.mean((2, 3))
        _check("features", features, self.width)
        seen = [features]
        if self.box_info:
            if box_info is None:
                raise ValueError("box_info: expected a tensor (B, 3), got None")
            _check("box_info", box_info, BOX_INFO, len(features))
            seen.append(box_info)
        rows = len(features)
        pose, betas, camera = (
            start.expand(rows, -1) for start in (self.init_pose, self.init_shape, self.init_cam)
        )
        for _ in range(self.iterations):
            x = torch.cat([*seen, pose, betas, camera], 1)
            x = self.drop2(self.fc2(self.drop1(self.fc1(x))))
            pose, betas = pose + self.decpose(x), betas + self.decshape(x)
            camera = camera + self.deccam(x)
        return self._regressed(pose, betas, camera, features)


class PartAttentionHead(_Head):
    """PARE (Kocabas et al., ICCV 2021): each part's rotation from the features where it is seen.

    A branch of part maps says where to look (softmax over the picture), a branch of body features
    what is there; both are ``layers`` of 3 x 3 convolution, batch norm and ReLU.

    Args:
        features: C, the channels of the feature maps.
        channels: of both branches; features of a part.
        shape_channels: of the features that shape and camera are regressed from.
        betas: number of shape coefficients.
        layers: of each branch.
    """

    def __init__(
        self,
        features: int,
        channels: int = 128,
        shape_channels: int = 64,
        betas: int = 10,
        layers: int = 2,
    ) -> None:
        super().__init__(betas)
        self.width = features
        self.part_branch = _branch(features, channels, layers)
        self.body_branch = _branch(features, channels, layers)
        self.part_maps = nn.Conv2d(channels, PARTS + 1, 1)
        self.shape_features = nn.Conv2d(channels, shape_channels, 1)
        self.shape = nn.Linear(PARTS * shape_channels, betas)
        self.cam = nn.Linear(PARTS * shape_channels, 3)
        self.pose = nn.Parameter(torch.empty(PARTS, 6, channels))
        bound = (6 / (6 + channels)) ** 0.5  # Xavier's, of each part's own map
        nn.init.uniform_(self.pose, -bound, bound)

    def forward(self, features: Tensor, box_info: Tensor | None = None) -> Regressed:
        """Feature maps (B, C, H, W). The box is not looked at."""
        if (
            not isinstance(features, Tensor)
            or features.ndim != 4
            or features.shape[1] != self.width
        ):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features: expected shape (B, {self.width}, H, W), got {got}")
        where = self.attention(features)
        seen = self.body_branch(features)
        local = _attended(seen, where)
        shape = _attended(self.shape_features(seen), where).flatten(1)
        pose = torch.einsum("bcp,pdc->bpd", local, self.pose)
        return self._regressed(pose, self.shape(shape), self.cam(shape), local.flatten(1))

    def segmentation(self, features: Tensor) -> Tensor:
        """Scores (B, 25, H, W) of the background and the 24 parts, for a loss of the part maps."""
        return self.part_maps(self.part_branch(features))

    def attention(self, features: Tensor) -> Tensor:
        """Where each part is looked for: (B, 24, H, W), of sum 1 over the picture."""
        scores = self.segmentation(features)[:, 1:]
        return scores.flatten(2).softmax(-1).unflatten(-1, scores.shape[2:])


def box_info(box_centre: Tensor, box_size: Tensor, centre: Tensor, focal_length: Tensor) -> Tensor:
    """CLIFF's three numbers of a box, (B, 3), with its constants, which are Human3.6M's.

    Args:
        box_centre: (B, 2), ``box_size`` (B,) its side; any unit, but one.
        centre: (B, 2), middle of the image.
        focal_length: (B,). CLIFF takes the diagonal of the image for it.
    """
    place = 2.8 * (box_centre - centre) / focal_length[:, None]
    size = (box_size / focal_length - 0.24) / 0.06
    return torch.cat([place, size[:, None]], 1)


def _branch(inputs: int, channels: int, layers: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        parts.append(nn.ReLU())
        inputs = channels
    return nn.Sequential(*parts)


def _attended(features: Tensor, where: Tensor) -> Tensor:
    """Features (B, C, H, W) averaged with weights (B, P, H, W): (B, C, P)."""
    return features.flatten(2) @ where.flatten(2).mT


def _check(name: str, value: object, width: int, rows: int | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.ndim != 2 or value.shape[1] != width or rows not in (None, len(value)):
        expected = f"({'B' if rows is None else rows}, {width})"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
