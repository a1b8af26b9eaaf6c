"""Bodies: SMPL-family models and their files, joints without meshes, a body that is free to use."""

from fasthyp.body.anny_body import AnnyBody, from_anny
from fasthyp.body.arrays import BodyArrays, body_arrays, export_safetensors
from fasthyp.body.cameras import Camera, humr_camera, prohmr_camera, project, weak_perspective
from fasthyp.body.errors import ModelFileError
from fasthyp.body.files import load_arrays, save_arrays
from fasthyp.body.linear import LinearBody
from fasthyp.body.meshes import vertex_spread, write_mesh
from fasthyp.body.outputs import BodyOutput, SMPLHOutput, SMPLOutput, SMPLXOutput
from fasthyp.body.regressors import VertexMapping, load_regressor, load_smplx_to_smpl
from fasthyp.body.skinning import (
    FoldedJoints,
    SkinningModel,
    fold_joints,
    lbs,
    project_joints,
    regress_joints,
)
from fasthyp.body.smpl import SMPL
from fasthyp.body.smplh import SMPLH
from fasthyp.body.smplx import SMPLX
from fasthyp.body.star import STAR
from fasthyp.body.stick import (
    STICK_POINTS,
    STICK_SHAPES,
    fit_stick_pose,
    fit_stick_shape,
    h36m17_regressor,
    stick_body,
)

__all__ = [
    "SMPL",
    "SMPLH",
    "SMPLX",
    "STAR",
    "STICK_POINTS",
    "STICK_SHAPES",
    "AnnyBody",
    "BodyArrays",
    "BodyOutput",
    "Camera",
    "FoldedJoints",
    "LinearBody",
    "ModelFileError",
    "SMPLHOutput",
    "SMPLOutput",
    "SMPLXOutput",
    "SkinningModel",
    "VertexMapping",
    "body_arrays",
    "export_safetensors",
    "fit_stick_pose",
    "fit_stick_shape",
    "fold_joints",
    "from_anny",
    "h36m17_regressor",
    "humr_camera",
    "lbs",
    "load_arrays",
    "load_regressor",
    "load_smplx_to_smpl",
    "prohmr_camera",
    "project",
    "project_joints",
    "regress_joints",
    "save_arrays",
    "stick_body",
    "vertex_spread",
    "weak_perspective",
    "write_mesh",
]
