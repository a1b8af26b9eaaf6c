"""POCO (Dwivedi et al., 3DV 2024): bodies with the uncertainty of their parts."""

from fasthyp.models.poco.heads import IterativeHead, PartAttentionHead, Regressed, box_info
from fasthyp.models.poco.model import (
    POCO,
    POCOConfig,
    POCOPrediction,
    can_be_infilled,
    chain_uncertainty,
    nearest_rotation,
    rotations,
)
from fasthyp.models.poco.uncertainty import ErrorDensity, ScaleNetwork

__all__ = [
    "POCO",
    "ErrorDensity",
    "IterativeHead",
    "POCOConfig",
    "POCOPrediction",
    "PartAttentionHead",
    "Regressed",
    "ScaleNetwork",
    "box_info",
    "can_be_infilled",
    "chain_uncertainty",
    "nearest_rotation",
    "rotations",
]
