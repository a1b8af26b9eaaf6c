"""How far the two vectors of a 6D rotation are from orthonormal."""

from __future__ import annotations

import torch
from torch import Tensor

from fasthyp.geometry import ROTATION_6D, Rotation6D
from fasthyp.losses._base import LossModule, Shapes, check_choice


def orthonormality_loss(pose_6d: Tensor, *, convention: Rotation6D = "columns") -> Tensor:
    """``mean (A^T A - I)^2`` of the two vectors A = [a1, a2] of each 6D rotation.

    L_orth of ProHMR (ICCV 2021) and HUMR (WACV 2025): a flow over 6D rotations puts no mass on
    vectors that Gram-Schmidt would have to correct. The papers write the norm; both codes, and so
    their weight 0.1, have the mean over rotations and the four entries.

    Args:
        pose_6d: (..., 6 n) float32 or float64, n rotations each.
        convention: as for :func:`fasthyp.geometry.rotation_6d_to_matrix`; ``"columns"`` and
            ``"rows"`` give the same.

    Returns:
        (...), for :func:`mode_and_expectation` or a mean.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    Shapes()("pose_6d", pose_6d, "... D")
    check_choice("convention", convention, ROTATION_6D)
    numbers = pose_6d.shape[-1]
    if numbers == 0 or numbers % 6:
        raise ValueError(f"pose_6d: expected shape (..., 6 n), got {tuple(pose_6d.shape)}")
    pairs = pose_6d.unflatten(-1, (-1, 6))
    if convention == "interleaved":
        pairs = pairs.unflatten(-1, (3, 2)).mT
    else:
        pairs = pairs.unflatten(-1, (2, 3))
    identity = torch.eye(2, dtype=pairs.dtype, device=pairs.device)
    return ((pairs @ pairs.mT - identity) ** 2).mean((-3, -2, -1))


class OrthonormalityLoss(LossModule, function=orthonormality_loss):
    """Module of :func:`orthonormality_loss`."""
