"""The adversarial prior of SMPL parameters of HMR and ProHMR."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasthyp.losses._base import LossModule, Shapes


class PosePriorDiscriminator(nn.Module):
    """Tells SMPL poses and shapes of a regressor from those of motion capture.

    Kanazawa et al., "End-to-end Recovery of Human Shape and Pose", CVPR 2018; ProHMR (ICCV 2021)
    uses it unchanged. One score for each joint's rotation, one for the shape and one for all
    rotations together. Its ``state_dict`` has the keys and shapes of ProHMR's ``Discriminator``.

    Args:
        hidden: width of the path of all joints.
    """

    joints = 23

    def __init__(self, hidden: int = 1024) -> None:
        super().__init__()
        self.D_conv1 = nn.Conv2d(9, 32, kernel_size=1)
        self.D_conv2 = nn.Conv2d(32, 32, kernel_size=1)
        self.pose_out = nn.ModuleList(nn.Linear(32, 1) for _ in range(self.joints))
        self.betas_fc1 = nn.Linear(10, 10)
        self.betas_fc2 = nn.Linear(10, 5)
        self.betas_out = nn.Linear(5, 1)
        self.D_alljoints_fc1 = nn.Linear(32 * self.joints, hidden)
        self.D_alljoints_fc2 = nn.Linear(hidden, hidden)
        self.D_alljoints_out = nn.Linear(hidden, 1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(self, body_pose: Tensor, betas: Tensor) -> Tensor:
        """Scores (N, 25): 23 joints, shape, all joints.

        Args:
            body_pose: (N, 23, 3, 3) or (N, 207) rotation matrices, without the global one.
            betas: (N, 10).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        shapes = Shapes()
        if isinstance(body_pose, Tensor) and body_pose.ndim == 2:
            shapes("body_pose", body_pose, f"N {9 * self.joints}")
        else:
            shapes("body_pose", body_pose, f"N {self.joints} 3 3")
        shapes("betas", betas, "N 10")
        joints = body_pose.reshape(len(body_pose), self.joints, 9).mT[..., None]
        features = self.D_conv2(self.D_conv1(joints).relu()).relu()[..., 0]  # (N, 32, 23)
        layers = list(self.pose_out.named_parameters())
        weight = torch.cat([value for name, value in layers if name.endswith("weight")])
        bias = torch.cat([value for name, value in layers if name.endswith("bias")])
        scores = (features * weight.mT).sum(1) + bias
        shape = self.betas_fc2(self.betas_fc1(betas).relu()).relu()
        every = self.D_alljoints_fc1(features.flatten(1)).relu()
        every = self.D_alljoints_fc2(every).relu()
        return torch.cat((scores, self.betas_out(shape), self.D_alljoints_out(every)), dim=1)


def prior_loss(scores: Tensor, images: int | None = None) -> Tensor:
    """L_adv of ProHMR (ICCV 2021), what the regressor minimises: ``sum (D - 1)^2 / B``.

    Args:
        scores: (N, 25) of the regressed bodies.
        images: B; N unless told. ProHMR sums over all S hypotheses of an image, N = B S.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    Shapes()("scores", scores, "N K")
    if images is not None and (not isinstance(images, int) or images < 1):
        raise ValueError(f"images: expected a positive int, got {images!r}")
    return ((scores - 1) ** 2).sum() / max(images or len(scores), 1)


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """What the discriminator minimises: ``sum (D(real) - 1)^2 / B + sum D(fake)^2 / B``.

    Each divided by its own number of bodies; in ProHMR's code the two are the same, as it takes as
    many real bodies as regressed ones. Detach the regressed bodies.

    Args:
        real_scores: (R, 25).
        fake_scores: (N, 25).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("real_scores", real_scores, "R K")
    shapes("fake_scores", fake_scores, "N K")
    real = ((real_scores - 1) ** 2).sum() / max(len(real_scores), 1)
    return real + (fake_scores**2).sum() / max(len(fake_scores), 1)


class PriorLoss(LossModule, function=prior_loss):
    """Module of :func:`prior_loss`."""


class DiscriminatorLoss(LossModule, function=discriminator_loss):
    """Module of :func:`discriminator_loss`."""
