"""SMPL-X (Pavlakos et al., "Expressive Body Capture", CVPR 2019): SMPL with hands and a face."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.body.arrays import BodyArrays
from fasthyp.body.landmarks import contour_entry, on_faces
from fasthyp.body.outputs import SMPLXOutput
from fasthyp.body.rotations import form_of, to_matrices
from fasthyp.body.skinning import Rotation
from fasthyp.body.smplh import SMPLH


class SMPLX(SMPLH):
    """SMPL-X, body, hands and face: 10475 vertices, 55 joints.

    Args, beyond those of :class:`~fasthyp.body.SMPLH`:
        num_expression_coeffs: number of expression coefficients, at most those in the file.
        create_expression, expression, create_jaw_pose, jaw_pose, and the same for ``leye_pose`` and
            ``reye_pose``: as for the other parts.
        use_face_contour: whether to append the 17 landmarks of the contour, which depend on the
            turn of the neck; a call then always computes the mesh.
    """

    NUM_FACE_JOINTS = 3
    NUM_JOINTS = SMPLH.NUM_JOINTS + 3
    EXPRESSION_SPACE_DIM = 100
    NECK_IDX = 12
    _STEM, _MESH = "SMPLX", "smplx"
    _PARTS = (
        ("global_orient", 1),
        ("body_pose", 21),
        *((f"{name}_pose", 1) for name in ("jaw", "leye", "reye")),
        ("left_hand_pose", SMPLH.NUM_HAND_JOINTS),
        ("right_hand_pose", SMPLH.NUM_HAND_JOINTS),
    )
    _output: Any = SMPLXOutput

    expr_dirs: Tensor
    lmk_faces_idx: Tensor
    lmk_bary_coords: Tensor
    dynamic_lmk_faces_idx: Tensor
    dynamic_lmk_bary_coords: Tensor
    neck_kin_chain: Tensor

    def __init__(
        self,
        model_path: str | os.PathLike[str] | Mapping[str, Any],
        num_expression_coeffs: int = 10,
        create_expression: bool = True,
        expression: Tensor | None = None,
        create_jaw_pose: bool = True,
        jaw_pose: Tensor | None = None,
        create_leye_pose: bool = True,
        leye_pose: Tensor | None = None,
        create_reye_pose: bool = True,
        reye_pose: Tensor | None = None,
        use_face_contour: bool = False,
        **settings: Any,
    ) -> None:
        if num_expression_coeffs < 0:
            raise ValueError(
                f"num_expression_coeffs: expected none or more, got {num_expression_coeffs}"
            )
        self.use_face_contour = use_face_contour
        self._num_expression = num_expression_coeffs
        self._face = {
            "jaw_pose": (create_jaw_pose, jaw_pose),
            "leye_pose": (create_leye_pose, leye_pose),
            "reye_pose": (create_reye_pose, reye_pose),
            "expression": (create_expression, expression),
        }
        super().__init__(model_path, **settings)
        del self._face

    def _full_space(self) -> bool:
        """Whether the file has 300 shapes and 100 expressions; the first files had 10 of each."""
        whole = self.SHAPE_SPACE_DIM + self.EXPRESSION_SPACE_DIM
        return self._raw_shapedirs.shape[2] >= whole

    def _shapes_in(self, arrays: BodyArrays) -> int:
        return self.SHAPE_SPACE_DIM if self._full_space() else min(10, arrays.shapedirs.shape[2])

    def _finish(self, arrays: BodyArrays) -> None:
        super()._finish(arrays)
        full = self._full_space()
        first, most = (self.SHAPE_SPACE_DIM, self.EXPRESSION_SPACE_DIM) if full else (10, 10)
        count = min(self._num_expression, most)
        directions = self._raw_shapedirs[:, :, first : first + count]
        self.register_buffer("expr_dirs", self._buffer(directions))
        del self._num_expression
        self._landmarks(arrays, "lmk")
        if self.use_face_contour:
            self._landmarks(arrays, "dynamic_lmk", 79)
            chain = [self.NECK_IDX]
            while arrays.parents[chain[-1]] >= 0:
                chain.append(int(arrays.parents[chain[-1]]))
            self.register_buffer("neck_kin_chain", torch.tensor(chain))
        widths = {"expression": self.num_expression_coeffs}
        for name, (create, value) in self._face.items():
            self._own(name, create, value, widths.get(name, 3))

    def _landmarks(self, arrays: BodyArrays, prefix: str, *entries: int) -> None:
        faces = arrays.extra(f"{prefix}_faces_idx", *entries, None)
        weights = arrays.extra(f"{prefix}_bary_coords", *faces.shape, 3)
        if faces.size and not (faces.min() >= 0 and faces.max() < len(arrays.faces)):
            raise ValueError(
                f"{arrays.source}: {prefix}_faces_idx: names a face outside 0 to "
                f"{len(arrays.faces) - 1}"
            )
        self.register_buffer(f"{prefix}_faces_idx", torch.tensor(faces, dtype=torch.long))
        self.register_buffer(f"{prefix}_bary_coords", torch.tensor(weights, dtype=self.dtype))

    def name(self) -> str:
        return "SMPL-X"

    @property
    def num_expression_coeffs(self) -> int:
        """Number of expression coefficients."""
        return self.expr_dirs.shape[2]

    def _reported(self) -> tuple[str, ...]:
        return (*super()._reported(), "jaw_pose", *(["expression"] if self._expressive() else []))

    def _expressive(self) -> bool:
        return self.num_expression_coeffs > 0

    def _needs_mesh(self) -> bool:
        # a mapper of SMPL-X is called with the vertices too
        return self.use_face_contour or self.joint_mapper is not None

    def _mapped(self, joints: Tensor, vertices: Tensor | None) -> Tensor:
        assert self.joint_mapper is not None
        return self.joint_mapper(joints=joints, vertices=vertices)

    def _all_shapedirs(self) -> Tensor:
        parts = (self.shapedirs, self.expr_dirs)
        return self._cached(("shapedirs",), parts, lambda: torch.cat(parts, 2))

    def _appended(self, vertices: Tensor, joints: Tensor, pose: Tensor, form: Rotation) -> Tensor:
        joints = super()._appended(vertices, joints, pose, form)
        faces = self.faces_tensor
        found = [on_faces(vertices, faces, self.lmk_faces_idx, self.lmk_bary_coords)]
        if self.use_face_contour:
            entry = contour_entry(to_matrices(pose, form), self.neck_kin_chain)
            face, weight = self.dynamic_lmk_faces_idx[entry], self.dynamic_lmk_bary_coords[entry]
            found.append(on_faces(vertices, faces, face, weight))
        return torch.cat([joints, *found], 1)

    def _point_buffers(self) -> tuple[Tensor, ...]:
        return (
            *super()._point_buffers(),
            self.faces_tensor,
            self.lmk_faces_idx,
            self.lmk_bary_coords,
        )

    def _points_on_vertices(self) -> tuple[Tensor, Tensor]:
        chosen, ones = super()._points_on_vertices()
        # a selected vertex is three times the same one, with the whole weight on the first
        corners = torch.cat([chosen.expand(-1, 3), self.faces_tensor[self.lmk_faces_idx]])
        weights = torch.cat([nn.functional.pad(ones, (0, 2)), self.lmk_bary_coords])
        return corners, weights

    def forward(  # type: ignore[override]
        self,
        betas: Tensor | None = None,
        global_orient: Tensor | None = None,
        body_pose: Tensor | None = None,
        left_hand_pose: Tensor | None = None,
        right_hand_pose: Tensor | None = None,
        transl: Tensor | None = None,
        expression: Tensor | None = None,
        jaw_pose: Tensor | None = None,
        leye_pose: Tensor | None = None,
        reye_pose: Tensor | None = None,
        return_verts: bool = True,
        return_full_pose: bool = False,
        pose2rot: bool = True,
        return_shaped: bool = True,
        vertices: bool = True,
        rotation: Rotation | None = None,
        **others: Any,
    ) -> Any:
        """Pose bodies, as :meth:`SMPLH.forward <fasthyp.body.SMPLH.forward>`.

        Args, beyond those:
            expression: (B, E).
            jaw_pose, leye_pose, reye_pose: (B, 3) rad, or (B, 1, 3, 3).
            return_shaped: whether the output has the rest vertices (where it has vertices).

        Returns:
            :class:`~fasthyp.body.outputs.SMPLXOutput`, joints (B, 127, 3): the 55 of the skeleton,
            the 21 appended, and 51 landmarks of the face (and 17 of its contour).
        """
        parts = {
            "global_orient": global_orient,
            "body_pose": body_pose,
            "jaw_pose": jaw_pose,
            "leye_pose": leye_pose,
            "reye_pose": reye_pose,
            "left_hand_pose": left_hand_pose,
            "right_hand_pose": right_hand_pose,
        }
        self._no_others(others)
        return self._run(
            parts,
            betas,
            expression,
            transl,
            return_verts and vertices,
            return_full_pose,
            form_of(rotation, pose2rot),
            return_shaped and vertices,
        )
