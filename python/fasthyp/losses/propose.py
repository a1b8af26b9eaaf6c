"""Losses of ProPose: an energy-based discriminator, mode-to-mode, random selection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fasthyp.losses._base import LossModule, Shapes, check_number, mean


def energy_discriminator_loss(real_energy: Tensor, fake_energy: Tensor, *, margin: float) -> Tensor:
    """``L_D = D(real) + max(0, m - D(fake))``, averaged: ProPose (AAAI 2025), equation 11.

    Zhao, Mathieu and LeCun, "Energy-Based Generative Adversarial Networks", ICLR 2017. D is the
    reconstruction error of a conditional autoencoder.

    Args:
        real_energy, fake_energy: float32 or float64, of any shapes; fake poses detached.
        margin: positive; the paper does not say which.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("real_energy", real_energy, "...")
    shapes("fake_energy", fake_energy, "...")
    check_number("margin", margin, above=True)
    return mean(real_energy) + mean((margin - fake_energy).relu())


def energy_generator_loss(fake_energy: Tensor) -> Tensor:
    """``L_G = D(fake)``, averaged: ProPose (AAAI 2025), equation 11.

    Raises:
        TypeError: not a tensor of a floating dtype.
    """
    Shapes()("fake_energy", fake_energy, "...")
    return mean(fake_energy)


def pulling_away_term(codes: Tensor) -> Tensor:
    """L_PT: the mean squared cosine between different samples' codes. ProPose, equation 11.

    In [0, 1]; keeps the encoder of the pose distribution from collapsing. ProPose applies it to
    that encoder's outputs, not to the discriminator's.

    Args:
        codes: (N, D) float32 or float64. A code of zeros is orthogonal to all.

    Returns:
        A number; 0 for fewer than two codes.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("codes", codes, "N D")
    count = shapes["N"]
    unit = normalize(codes, dim=1)
    # the sum of all squared cosines, of N x N or D x D products, whichever are fewer
    gram = unit @ unit.mT if count <= shapes["D"] else unit.mT @ unit
    own = (unit * unit).sum(1).square().sum()
    return ((gram * gram).sum() - own) / max(count * (count - 1), 1)


def mode_to_mode_loss(mapped_mode: Tensor, base_mode: Tensor) -> Tensor:
    """L_m2m: ``||f(mu_3D) - mu_2D||_2``, averaged over poses. ProPose, equation 15.

    Args:
        mapped_mode: (..., D) float32 or float64: the flow's image of the pose distribution's mode.
        base_mode: (..., D), the mode of the base distribution.

    Returns:
        A number. The gradient at equal modes is zero.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("mapped_mode", mapped_mode, "... D")
    shapes("base_mode", base_mode, "... D")
    if mapped_mode.shape != base_mode.shape:
        shape, got = tuple(mapped_mode.shape), tuple(base_mode.shape)
        raise ValueError(f"base_mode: expected shape {shape} as mapped_mode, got {got}")
    return mean((mapped_mode - base_mode).norm(dim=-1))


def bidirectional_loss(
    best_of_m: Tensor,
    random: Tensor,
    beta: Tensor | None = None,
    *,
    threshold: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """L_Bi: ``L_BoM + L_rand`` in a share 1 - b of the steps, else 0. ProPose, equation 14.

    With L_BoM of ``best_of_m_loss(norm="l2")`` (equation 12) and L_rand of
    :func:`joint_distance_loss` (equation 13). Nothing waits for the device; a step that is left
    out has zero gradients.

    Args:
        best_of_m, random: the two losses, numbers.
        beta: a number in [0, 1); drawn uniformly unless given.
        threshold: b in [0, 1]; the paper does not say which.
        generator: for the draw.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    shapes = Shapes()
    shapes("best_of_m", best_of_m, "")
    shapes("random", random, "")
    check_number("threshold", threshold)
    if threshold > 1:
        raise ValueError(f"threshold: expected 0 to 1, got {threshold}")
    if beta is None:
        beta = torch.rand((), generator=generator, device=best_of_m.device, dtype=best_of_m.dtype)
    shapes("beta", beta, "")
    return torch.where(beta < threshold, 0, best_of_m + random)


class EnergyDiscriminatorLoss(LossModule, function=energy_discriminator_loss):
    """Module of :func:`energy_discriminator_loss`."""


class BidirectionalLoss(LossModule, function=bidirectional_loss):
    """Module of :func:`bidirectional_loss`."""


class EnergyGeneratorLoss(LossModule, function=energy_generator_loss):
    """Module of :func:`energy_generator_loss`."""


class PullingAwayTerm(LossModule, function=pulling_away_term):
    """Module of :func:`pulling_away_term`."""


class ModeToModeLoss(LossModule, function=mode_to_mode_loss):
    """Module of :func:`mode_to_mode_loss`."""
