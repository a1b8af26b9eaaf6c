"""The weights of the papers' losses, and their sum."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

POSE_INN_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"l2d": 1.0, "generator": 1.0, "mmd": 10.0, "det": 4.0, "best_of_m": 4.0, "covariance": 750.0}
)
"""Wehrbein et al., ICCV 2021, equation 9 and section 4.2; the same in their code."""

HUMR_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        **{"nll": 0.1, "keypoints_2d_mode": 0.01, "heatmap_mmd": 0.05, "mask": 0.1},
        **{"betas_mode": 5e-4, "orthonormality_mode": 0.1, "orthonormality_exp": 0.1},
        "camera": 1.0,
    }
)
"""HUMR, WACV 2025, supplementary material A; ``camera``, and that both the mode and the others
have an orthonormality loss, from its code. Its ``nll`` is per dimension, without the constant."""

PROHMR_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        **{"nll": 0.001, "keypoints_2d_exp": 0.001, "keypoints_2d_mode": 0.01},
        **{"keypoints_3d_exp": 0.0, "keypoints_3d_mode": 0.05, "adversarial": 5e-4},
        **{"global_orient_exp": 0.0, "global_orient_mode": 0.001},
        **{"body_pose_exp": 0.0, "body_pose_mode": 0.001},
        **{"betas_exp": 0.0, "betas_mode": 5e-4},
        **{"orthonormality_exp": 0.1, "orthonormality_mode": 0.1},
    }
)
"""ProHMR, ICCV 2021, supplementary material 3; the same in its code."""

PROHMR_LIFTING_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"nll": 0.001, "keypoints_3d_mode": 1.0}
)
"""ProHMR, ICCV 2021, supplementary material 3: lifting of 2D poses."""

POCO_WEIGHTS: Mapping[str, float] = MappingProxyType({"flow": 1e-4, "base": 1e-2, "sigma": 1e-4})
"""POCO, 3DV 2024, section 4: of the terms of equation 6, the defaults of
``residual_log_likelihood_loss``."""

POCO_CLIFF_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        name: 60.0 * weight
        for name, weight in {
            **{"pose": 0.01, "betas": 0.001, "vertices": 1.0, "camera": 0.016},
            **{"keypoints_2d": 2.5, "keypoints_3d": 5.0, "flow": 0.01},
        }.items()
    }
)
"""POCO's released CLIFF configuration, its overall factor of 60 included."""

PROPOSE_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        **{"recon_3d": 1.0, "bidirectional": 1.0},
        **{"recon_2d": 1.0, "nll": 1.0, "mode_to_mode": 1.0},
        **{"discriminator": 1.0, "generator": 1.0, "pulling_away": 1.0},
    }
)
"""ProPose, AAAI 2025, algorithm 1 and equation 11: plain sums."""


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of losses, each times its weight. A term of weight zero is not looked at; a weight
    without a term adds nothing.

    Args:
        terms: losses by name.
        weights: such as :data:`PROHMR_WEIGHTS`.

    Raises:
        ValueError: no terms, or a term without a weight; names it.
    """
    for name in terms:
        if name not in weights:
            raise ValueError(f"terms: expected names of {sorted(weights)}, got {name!r}")
    parts = [weights[name] * term for name, term in terms.items() if weights[name] != 0]
    if not parts:
        raise ValueError(f"terms: expected at least one with a weight, got {sorted(terms)}")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
