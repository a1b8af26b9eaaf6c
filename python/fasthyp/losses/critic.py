"""A Wasserstein critic of 3D poses with kinematic chains, and its losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from fasthyp.losses._base import LossModule, Shapes, check_number, mean

POSE_INN_BONES = (
    *((0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (7, 10), (10, 11), (11, 12)),
    *((7, 13), (13, 14), (14, 15), (0, 3), (0, 6), (3, 6)),
)
"""Bones between the 16 joints of pose_inn (Human3.6M without the root): a triangle of the hips and
the spine stands for those at the root."""


class KCSLayer(nn.Module):
    """Kinematic chain space: inner products of all pairs of bones.

    Wandt and Rosenhahn, "RepNet", CVPR 2019: with B the vectors of the bones, ``B^T B``; lengths
    squared on the diagonal, angles elsewhere.

    Args:
        bones: (from, to) joints of each bone.
        joints: number of joints.

    Raises:
        ValueError: a bone that is not between two of the joints.
    """

    def __init__(self, bones: Sequence[tuple[int, int]] = POSE_INN_BONES, joints: int = 16) -> None:
        super().__init__()
        matrix = torch.zeros(joints, len(bones))
        for k, (start, end) in enumerate(bones):
            if not (0 <= start < joints and 0 <= end < joints and start != end):
                raise ValueError(
                    f"bones: expected pairs of different joints below {joints}, got {(start, end)}"
                )
            matrix[start, k], matrix[end, k] = 1, -1
        self.register_buffer("matrix", matrix, persistent=False)
        self.matrix: Tensor

    def forward(self, poses: Tensor) -> Tensor:
        """Poses (B, 3 J), all x, then all y, then all z -> (B, bones, bones).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        joints = len(self.matrix)
        Shapes()("poses", poses, f"B {3 * joints}")
        bones = poses.unflatten(-1, (3, joints)) @ self.matrix
        return bones.mT @ bones


class PoseCritic(nn.Module):
    """The critic of Wehrbein et al., ICCV 2021 (after RepNet): one path on the coordinates, one on
    the kinematic chain space. Its ``state_dict`` has the official ``CriticNetwork``'s keys.

    Args:
        hidden: width of the kinematic path.
        bones, joints: as for :class:`KCSLayer`.
    """

    def __init__(
        self,
        hidden: int = 1000,
        bones: Sequence[tuple[int, int]] = POSE_INN_BONES,
        joints: int = 16,
    ) -> None:
        super().__init__()
        self.kcs_layer = KCSLayer(bones, joints)
        self.fc1 = nn.Linear(3 * joints, 100)
        self.fc2 = nn.Linear(100, 100)
        self.fc3 = nn.Linear(100, 100)
        self.fc4 = nn.Linear(100, 100)
        self.fc5 = nn.Linear(len(bones) ** 2, hidden)
        self.fc6 = nn.Linear(hidden, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden + 100, 100)
        self.fc9 = nn.Linear(100, 1)

    def forward(self, poses: Tensor) -> Tensor:
        """Poses (B, 3 J) in metres, all x, then all y, then all z -> scores (B, 1)."""
        kinematic = leaky_relu(self.fc5(self.kcs_layer(poses).flatten(1)))
        kinematic = self.fc7(leaky_relu(self.fc6(kinematic))) + kinematic
        first = self.fc1(poses)
        direct = self.fc3(leaky_relu(self.fc2(leaky_relu(first)))) + leaky_relu(first)
        direct = self.fc4(leaky_relu(direct))
        return self.fc9(leaky_relu(self.fc8(torch.cat((direct, kinematic), dim=1))))


def critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """What the critic minimises, without the penalty: ``mean D(fake) - mean D(real)``.

    Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, equation 3, as Wehrbein
    et al., ICCV 2021, use it.

    Args:
        real_scores, fake_scores: float32 or float64, of any shapes.

    Raises:
        TypeError: not tensors of one floating dtype.
    """
    shapes = Shapes()
    shapes("real_scores", real_scores, "...")
    shapes("fake_scores", fake_scores, "...")
    return mean(fake_scores) - mean(real_scores)


def generator_loss(fake_scores: Tensor) -> Tensor:
    """L_gen, what the generator minimises: ``-mean D(fake)``. Equation 9 of Wehrbein et al., ICCV
    2021, in which it has weight 1.

    Raises:
        TypeError: not a tensor of a floating dtype.
    """
    Shapes()("fake_scores", fake_scores, "...")
    return -mean(fake_scores)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | None = None,
    *,
    weight: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``weight * mean (||grad D(x)|| - 1)^2`` at random points between real and fake samples.

    Gulrajani et al., NeurIPS 2017, equation 3. Real and fake samples are detached; the gradient
    goes to the critic's parameters.

    Args:
        critic: (B, ...) -> scores (B, 1) or (B,), each of its own sample alone.
        real, fake: (B, ...) of one shape, float32 or float64.
        alpha: (B,) or (B, 1), shares of the real samples; drawn uniformly unless given.
        weight: the paper's 10.
        generator: for the draw.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not callable(critic):
        raise TypeError(f"critic: expected a function, got {type(critic).__name__}")
    shapes = Shapes()
    shapes("real", real, "...")
    shapes("fake", fake, "...")
    if real.ndim < 2 or real.shape != fake.shape:
        raise ValueError(
            f"fake: expected shape {tuple(real.shape)} as real, (B, ...), got {tuple(fake.shape)}"
        )
    check_number("weight", weight)
    if alpha is None:
        alpha = torch.rand(len(real), generator=generator, device=real.device, dtype=real.dtype)
    shapes("alpha", alpha, "...")
    if alpha.numel() != len(real):
        raise ValueError(f"alpha: expected shape ({len(real)}, 1), got {tuple(alpha.shape)}")
    alpha = alpha.reshape(-1, *[1] * (real.ndim - 1))
    with torch.enable_grad():
        points = (alpha * real + (1 - alpha) * fake).detach().requires_grad_()
        (slope,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return weight * mean((slope.flatten(1).norm(dim=1) - 1) ** 2)


class CriticLoss(LossModule, function=critic_loss):
    """Module of :func:`critic_loss`."""


class GeneratorLoss(LossModule, function=generator_loss):
    """Module of :func:`generator_loss`."""


class GradientPenalty(LossModule, function=gradient_penalty):
    """Module of :func:`gradient_penalty`."""
