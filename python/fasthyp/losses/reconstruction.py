"""Distances between a pose and its reconstruction: L_2D, L_det, and those of ProPose."""

from __future__ import annotations

from torch import Tensor

from fasthyp.losses._base import LossModule, Shapes, check_choice, check_same_shape, mean


def pose_l1_loss(predicted: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """The L1 distance of poses: L_2D and L_det, equations 5 and 7 of Wehrbein et al., ICCV 2021.

    Their equations have the norm ``||.||_1``, their code (``torch.nn.L1Loss``) and so the weights
    of their equation 9 the mean over all numbers.

    Args:
        predicted, target: (..., D), of one shape, float32 or float64: for L_2D normalised 2D poses
            (B, 32), for L_det 3D poses (B, 48) in metres, reconstructed with the latent that the
            forward pass gave.
        reduction: ``"mean"`` over all numbers; ``"norm"``, the sum over D, averaged over poses;
            ``"none"`` for (...) norms.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("predicted", predicted, "... D")
    shapes("target", target, "... D")
    check_same_shape("target", target, "predicted", predicted)
    check_choice("reduction", reduction, ("mean", "norm", "none"))
    distance = (predicted - target).abs()
    if reduction == "mean":
        return mean(distance)
    distance = distance.sum(-1)
    return distance if reduction == "none" else mean(distance)


def joint_distance_loss(
    predicted: Tensor,
    target: Tensor,
    *,
    norm: str = "l2",
    joints: str = "sum",
    reduction: str = "mean",
) -> Tensor:
    """The distance between joints, summed over the joints of a pose: ProPose (AAAI 2025).

    L_recon3D and L_rand (equations 4 and 13, ``norm="l2"``), L_recon2D (equation 6, ``"l1"``).
    The paper calls the first two mean squared errors but writes the norm, not its square
    (``"squared"``).

    Args:
        predicted, target: (..., J, C), of one shape, float32 or float64, in one unit.
        norm: over the C coordinates, ``"l2"``, ``"l1"`` or ``"squared"``, the square of ``"l2"``.
        joints: ``"sum"`` or ``"mean"`` over the J joints.
        reduction: ``"mean"`` over poses or ``"none"``.

    Returns:
        A number, or (...) for ``"none"``. The gradient at equal joints is zero.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("predicted", predicted, "... J C")
    shapes("target", target, "... J C")
    check_same_shape("target", target, "predicted", predicted)
    check_choice("norm", norm, ("l2", "l1", "squared"))
    check_choice("joints", joints, ("sum", "mean"))
    check_choice("reduction", reduction, ("mean", "none"))
    difference = predicted - target
    if norm == "squared":
        distance = (difference * difference).sum(-1)
    else:
        distance = difference.norm(p=2 if norm == "l2" else 1, dim=-1)
    distance = distance.sum(-1) / (1 if joints == "sum" else max(shapes["J"], 1))
    return distance if reduction == "none" else mean(distance)


class PoseL1Loss(LossModule, function=pose_l1_loss):
    """Module of :func:`pose_l1_loss`."""


class JointDistanceLoss(LossModule, function=joint_distance_loss):
    """Module of :func:`joint_distance_loss`."""
