"""Metrics of 3D poses and of distributions of them.

Poses are (..., J, 3) and hypotheses (B, M, J, 3); a result in a length has the unit of its input.
Functions give a number per pose; the classes of the same names in capitals are
:class:`torchmetrics.Metric` (``pip install "fasthyp[metrics]"``), which see a data set batch by
batch and add up over processes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fasthyp.metrics.hypotheses import (
    Clusters,
    OverHypotheses,
    diversity,
    kmeans,
    over_hypotheses,
    sharpness,
)
from fasthyp.metrics.pose import (
    AUC_THRESHOLDS,
    CPS_JOINTS,
    CPS_THRESHOLDS,
    PCK_JOINTS,
    auc,
    correct_poses,
    cps,
    mpjpe,
    n_mpjpe,
    pck,
    pve,
    root_centred,
)
from fasthyp.metrics.procrustes import Similarity, pa_mpjpe, procrustes
from fasthyp.metrics.streaming import BestOfM, best_of_m, hypothesis_source
from fasthyp.metrics.uncertainty import (
    CALIBRATION_LEVELS,
    SMPL_PARENTS,
    Sparsification,
    body_uncertainty,
    calibration_curve,
    confidence_rank,
    kinematic_uncertainty,
    pearson,
    sparsification,
)

if TYPE_CHECKING:
    from fasthyp.metrics.modular import (
        AUC,
        CPS,
        MPJPE,
        NMPJPE,
        PAMPJPE,
        PCK,
        PVE,
        Calibration,
        Diversity,
        Pearson,
        Sharpness,
        SparsificationCurve,
    )

_CLASSES = (
    *("AUC", "CPS", "MPJPE", "NMPJPE", "PAMPJPE", "PCK", "PVE"),
    *("Calibration", "Diversity", "Pearson", "Sharpness", "SparsificationCurve"),
)

__all__ = [
    "AUC",
    "AUC_THRESHOLDS",
    "CALIBRATION_LEVELS",
    "CPS",
    "CPS_JOINTS",
    "CPS_THRESHOLDS",
    "MPJPE",
    "NMPJPE",
    "PAMPJPE",
    "PCK",
    "PCK_JOINTS",
    "PVE",
    "SMPL_PARENTS",
    "BestOfM",
    "Calibration",
    "Clusters",
    "Diversity",
    "OverHypotheses",
    "Pearson",
    "Sharpness",
    "Similarity",
    "Sparsification",
    "SparsificationCurve",
    "auc",
    "best_of_m",
    "body_uncertainty",
    "calibration_curve",
    "confidence_rank",
    "correct_poses",
    "cps",
    "diversity",
    "hypothesis_source",
    "kinematic_uncertainty",
    "kmeans",
    "mpjpe",
    "n_mpjpe",
    "over_hypotheses",
    "pa_mpjpe",
    "pck",
    "pearson",
    "procrustes",
    "pve",
    "root_centred",
    "sharpness",
    "sparsification",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(import_module("fasthyp.metrics.modular"), name)
    raise AttributeError(f"module 'fasthyp.metrics' has no attribute {name!r}")
