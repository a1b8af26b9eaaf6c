"""Body models: linear blend skinning, joints without a mesh, cameras."""

from __future__ import annotations

from fasthyp.body.skinning import (
    FoldedJoints,
    SkinningModel,
    fold_joints,
    humr_camera,
    lbs,
    prohmr_camera,
    project,
    regress_joints,
    weak_perspective,
)

__all__ = [
    "FoldedJoints",
    "SkinningModel",
    "fold_joints",
    "humr_camera",
    "lbs",
    "prohmr_camera",
    "project",
    "regress_joints",
    "weak_perspective",
]
