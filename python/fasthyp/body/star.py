"""STAR, whose pose blend shapes are sparse, local to the joints, and depend on the shape too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasthyp.body.arrays import body_arrays, find_model_file
from fasthyp.body.linear import Arrays, LinearBody
from fasthyp.body.rotations import to_matrices
from fasthyp.body.skinning import Rotation
from fasthyp.geometry import matrix_to_axis_angle


class STAR(LinearBody):
    """The STAR body: 6890 vertices, 24 joints; calls as for :class:`~fasthyp.body.LinearBody`.

    Osman et al., "STAR: Sparse Trained Articulated Human Body Regressor", ECCV 2020. The 93 pose
    blend shapes are multiplied with the quaternions of all joints but the root, (x, y, z, w - 1)
    each, and, as in the official code, with the second shape coefficient. Quaternions are those of
    the axis angle as it is given, also beyond pi; for matrices and 6D those of at most pi.

    Args:
        model_path: the ``.npz`` file as published (or ``.pkl``, ``.safetensors``), a folder that
            holds it as ``<gender>/model.npz`` or as ``STAR_<GENDER>``, or a mapping of its arrays.
        gender: which file of a folder.
        num_betas: number of shape coefficients, at least 2, at most those in the file.
        dtype: of the buffers.
        ext: ending of the file in a folder; by default whichever is there.

    Raises:
        ModelFileError: an array is missing or wrong, or the file is refused.
        FileNotFoundError: no such file.
        ValueError: fewer than two shape coefficients.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | Mapping[str, Any],
        gender: str = "neutral",
        num_betas: int = 10,
        dtype: torch.dtype = torch.float32,
        ext: str | None = None,
    ) -> None:
        source: Any = model_path
        if not isinstance(model_path, Mapping):
            published = Path(model_path) / gender / "model.npz"
            source = (
                published
                if published.is_file()
                else find_model_file(model_path, f"STAR_{gender.upper()}", ext)
            )
        arrays = body_arrays(source, pose_features=lambda joints: 4 * (joints - 1) + 1)
        if min(num_betas, arrays.shapedirs.shape[2]) < 2:
            raise ValueError(
                f"num_betas: expected at least 2, got {num_betas} of {arrays.shapedirs.shape[2]}"
            )
        self.gender = gender
        super().__init__(arrays, num_betas, dtype)

    def _model(self) -> Arrays:
        """Linear blend skinning whose shape coefficients are those and the pose's features.

        The features move vertices but no joints. So the joints at rest are vertices of their own,
        after those of the mesh, which the regressor takes and the features leave alone.
        """
        sources = self.v_template, self.shapedirs, self.posedirs, self.J_regressor, self.lbs_weights

        def make() -> Arrays:
            template, shapes, poses, regressor, weights = sources
            joints = len(regressor)
            rest = regressor @ template, torch.einsum("jv,vcs->jcs", regressor, shapes)
            corrective = poses.unflatten(1, (-1, 3)).permute(1, 2, 0)
            eye = torch.eye(joints, dtype=template.dtype, device=template.device)
            directions = torch.cat([shapes, corrective], 2)
            return (
                torch.cat([template, rest[0]]),
                torch.cat([directions, pad(rest[1], (0, len(poses)))]),
                template.new_zeros(0, 3 * (len(template) + joints)),
                torch.cat([torch.zeros_like(regressor), eye], 1),
                self.parents,
                torch.cat([weights, eye]),
            )

        found: Arrays = self._cached(("star",), (*sources, self.parents), make)
        return found

    def _coefficients(self, betas: Tensor, pose: Tensor, form: Rotation) -> Tensor:
        if not len(self.posedirs):
            return betas
        if form == "axis_angle":
            angles = pose.unflatten(1, (-1, 3))
        else:
            angles = matrix_to_axis_angle(to_matrices(pose, form))
        angles = angles[:, 1:]
        turn = (angles + 1e-8).norm(dim=-1, keepdim=True)
        half = turn / 2
        quaternions = torch.cat([half.sin() * (angles / turn), half.cos() - 1], -1)
        return torch.cat([betas, quaternions.flatten(1), betas[:, 1:2]], 1)

    def _skin(
        self, shape: Tensor, pose: Tensor, transl: Tensor | None, form: Rotation
    ) -> tuple[Tensor, Tensor]:
        vertices, joints = super()._skin(shape, pose, transl, form)
        return vertices[:, : self.get_num_verts()], joints
