"""Anny, the free body model of NAVER (https://github.com/naver/anny, Apache-2.0 code, CC0 data), as
a body of this package: pictures, examples and tests without a licence to accept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthyp.body.arrays import BodyArrays
from fasthyp.body.cameras import Camera
from fasthyp.body.linear import LinearBody
from fasthyp.body.outputs import BodyOutput
from fasthyp.body.rotations import form_of, to_matrices
from fasthyp.body.skinning import Rotation, project_joints, regress_joints
from fasthyp.skeleton import COCO17_JOINTS, H36M17_JOINTS

# Bones at whose heads Human3.6M's joints lie that COCO lacks.
_H36M_BONES = {"spine": "spine03", "thorax": "neck01", "jaw": "head"}


class AnnyBody(LinearBody):
    """Anny as linear blend skinning; made by :func:`from_anny`.

    The mesh is in metres, z up, facing -y, with the root bone's head at the origin. ``betas`` are
    the coefficients of Anny's blend shapes, which :meth:`shape` makes of a person's description.
    Poses are rotations of each bone about the axes of the room in the reference pose (Anny's
    "local-ref"), so a zero pose is that reference pose for every shape.

    Attributes:
        bone_labels: names of the joints.
        phenotypes: what :meth:`shape` takes.
        coco17, h36m17: regressors (17, V) of COCO's joints, by Anny's own data, and of
            Human3.6M-like ones, in the orders of :mod:`fasthyp.skeleton`.
    """

    coco17: Tensor
    h36m17: Tensor
    reference: Tensor
    orientation: Tensor
    orientation_dirs: Tensor

    def __init__(self, anny: Any, coco: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        # The heads of Anny's bones are not regressed from its mesh but move with the shape on
        # their own. As invisible vertices at the end of the mesh they fit the common form.
        parents = np.asarray(anny.bone_parents, np.int64)
        joints, vertices = len(parents), len(anny.template_vertices)
        indices = _numpy(anny.vertex_bone_indices).astype(np.int64)
        weights = np.zeros((vertices + joints, joints))
        np.add.at(
            weights, (np.arange(vertices)[:, None], indices), _numpy(anny.vertex_bone_weights)
        )
        weights[vertices:] = np.eye(joints)
        heads = np.zeros((joints, vertices + joints))
        heads[:, vertices:] = np.eye(joints)
        shapes = np.concatenate(
            [_numpy(anny.blendshapes), _numpy(anny.bone_heads_blendshapes)], 1
        ).transpose(1, 2, 0)
        super().__init__(
            BodyArrays(
                np.concatenate([_numpy(anny.template_vertices), _numpy(anny.template_bone_heads)]),
                shapes,
                np.zeros((vertices + joints, 3, 0)),
                heads,
                parents,
                weights,
                _numpy(anny.get_triangular_faces()).astype(np.int64),
                source="anny",
            ),
            dtype=dtype,
        )
        self._visible = vertices
        self.bone_labels: tuple[str, ...] = tuple(anny.bone_labels)
        self.phenotypes: tuple[str, ...] = tuple(anny.phenotype_labels)
        # held in a list: Anny is not a part of this module, whose parameters it would double
        self._anny = [anny]
        for name, value in (
            ("reference", anny.reference_bone_orientations),
            ("orientation", anny.bone_template_orientation_matrices),
            ("orientation_dirs", anny.bone_orientation_blendshapes),
        ):
            self.register_buffer(name, value.detach().to(dtype))
        names, rows = list(coco), torch.stack(list(coco.values())).to(dtype)
        rows = torch.cat([rows, rows.new_zeros(len(names), joints)], 1)
        by_name = dict(zip(names, rows, strict=True))
        self.register_buffer("coco17", torch.stack([by_name[name] for name in COCO17_JOINTS]))
        self.register_buffer(
            "h36m17", torch.stack([self._h36m(name, by_name) for name in H36M17_JOINTS])
        )

    def _h36m(self, name: str, coco: Mapping[str, Tensor]) -> Tensor:
        if name == "pelvis":
            return (coco["left_hip"] + coco["right_hip"]) / 2
        if name == "head":
            top = int(self.v_template[: self._visible, 2].argmax())
            row = torch.zeros_like(self.lbs_weights[:, 0])
            row[top] = 1
            return row
        if name in _H36M_BONES:
            return self.J_regressor[self.bone_labels.index(_H36M_BONES[name])].clone()
        return coco[name]

    def get_num_verts(self) -> int:
        """Rows of the arrays and of regressors: the mesh's vertices, and one for each bone."""
        return super().get_num_verts()

    def shape(self, **phenotypes: float | Tensor) -> Tensor:
        """Coefficients (B, S) of a description such as ``age=0.7, gender=0.2, height=0.9``.

        Args:
            phenotypes: numbers in [0, 1] or tensors (B,) of them, 0.5 where none is given; the
                names are :attr:`phenotypes`.

        Raises:
            ValueError: an unknown name.
        """
        unknown = sorted(set(phenotypes) - set(self.phenotypes))
        if unknown:
            raise ValueError(f"phenotypes: expected {', '.join(self.phenotypes)}; got {unknown}")
        anny = self._anny[0]
        _, shape, local, face = anny.get_tensor_inputs(None, dict(phenotypes), None, None)
        found = anny._get_phenotype_blendshape_coefficients(shape, local, face)
        return found.to(self.v_template)

    def forward(
        self,
        betas: Tensor | None = None,
        pose: Tensor | None = None,
        transl: Tensor | None = None,
        pose2rot: bool = True,
        vertices: bool = True,
        rotation: Rotation | None = None,
    ) -> BodyOutput:
        """Pose bodies.

        Args:
            betas: (B, S) of :meth:`shape`; the average person by default.
            pose, transl, pose2rot, vertices, rotation: as for :class:`~fasthyp.body.LinearBody`.

        Returns:
            Vertices (B, V, 3) m, without the bones' ones, and the heads of the bones (B, J, 3) m.
        """
        betas, turned, moved, shown = self._turned(betas, pose, transl, form_of(rotation, pose2rot))
        if vertices:
            points, joints = self._skin(betas, turned, moved, "matrix")
            points = points[:, : self._visible]
        else:
            points, joints = None, regress_joints(self._own_joints(), betas, turned, moved, False)
        return BodyOutput(vertices=points, joints=joints, full_pose=shown)

    def joints(
        self,
        betas: Tensor | None = None,
        pose: Tensor | None = None,
        transl: Tensor | None = None,
        regressor: Tensor | None = None,
        pose2rot: bool = True,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Joints without the mesh, as :meth:`fasthyp.body.LinearBody.joints`; for instance with
        ``regressor=body.coco17``."""
        folded = self._own_joints() if regressor is None else self._folded(regressor)
        betas, turned, moved, _ = self._turned(betas, pose, transl, form_of(rotation, pose2rot))
        return regress_joints(folded, betas, turned, moved, False)

    def project_joints(
        self,
        camera: Camera,
        betas: Tensor | None = None,
        pose: Tensor | None = None,
        transl: Tensor | None = None,
        regressor: Tensor | None = None,
        pose2rot: bool = True,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`fasthyp.body.LinearBody.project_joints`."""
        folded = self._own_joints() if regressor is None else self._folded(regressor)
        betas, turned, moved, _ = self._turned(betas, pose, transl, form_of(rotation, pose2rot))
        return project_joints(folded, betas, turned, camera, moved, False)

    def _turned(
        self, betas: Tensor | None, pose: Tensor | None, transl: Tensor | None, form: Rotation
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shape, rotations in the form of skinning, and translation.

        Anny first turns each bone from its rest orientation, which depends on the shape, to the
        reference orientation, by A; then by the pose, D. Relative to the parent that is
        A_p^T D A, with the identity for the root, whose head is put at the origin.
        """
        if betas is None:
            betas = self.shape()
        few = self._rows("betas", betas, self.num_betas)  # often one shape for many poses
        straight = self._straightening(few)
        head = self.v_template[self._visible] + few @ self.shapedirs[self._visible].T
        betas, pose, transl = self._inputs(betas, pose, transl, form)
        turns = to_matrices(pose, form)
        above = straight[:, self.parents.clamp(min=0)]
        rows = torch.cat([turns[:, :1] @ straight[:, :1], (above.mT @ turns @ straight)[:, 1:]], 1)
        moved = -head if transl is None else transl - head
        return betas, rows, moved.expand(len(rows), 3), pose

    def _straightening(self, betas: Tensor) -> Tensor:
        """(B, J, 3, 3), from rest to reference orientations."""
        dirs = self.orientation_dirs
        measured = self.orientation + (betas @ dirs.flatten(1)).unflatten(1, dirs.shape[1:])
        rest = _nearest_rotation(measured)
        out = self.reference @ rest.mT
        eye = torch.eye(3, dtype=out.dtype, device=out.device).expand(len(out), 1, 3, 3)
        return torch.cat([eye, out[:, 1:]], 1)


def from_anny(
    rig: str = "anny", topology: str = "anny", dtype: torch.dtype = torch.float32, **settings: Any
) -> AnnyBody:
    """A body of the free Anny model; needs ``pip install "fasthyp[body]"``.

    Args:
        rig, topology, settings: as ``anny.Anny`` takes them.
        dtype: of the arrays.

    Raises:
        ImportError: anny is not installed.
        ValueError: a rig without the orientations that this class computes with.
    """
    try:
        import anny
    except ImportError as error:
        raise ImportError('anny is missing: pip install "fasthyp[body]"') from error

    # "lbs" avoids the compilation of Anny's own kernels, which are not used here
    model = anny.Anny(rig=rig, topology=topology, skinning_method="lbs", **settings)
    if model.bone_orientation != "cached" or model.reference_bone_orientations is None:
        raise ValueError(f"rig: expected one with cached bone orientations, got {rig!r}")
    keypoints = anny.KeypointsRegressor.coco(model)
    rows = dict(zip(keypoints.labels, keypoints.regression_weights, strict=True))
    return AnnyBody(model, rows, dtype)


def _nearest_rotation(matrices: Tensor) -> Tensor:
    """Kabsch: the rotation R nearest to each (..., 3, 3), M = R P with P symmetric.

    Its gradient is taken from R^T dM - dM^T R = W P + P W, where dR = R W: unlike that of the
    singular vectors it is finite where singular values are equal, as they are for an undeformed
    bone.
    """
    with torch.no_grad():
        left, _, right = torch.linalg.svd(matrices)
        sign = torch.ones_like(matrices[..., 0])
        sign[..., 2] = torch.det(left @ right).sign()
        rotation = (left * sign[..., None, :]) @ right
        stretch = rotation.mT @ matrices
        trace = stretch.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        eye = torch.eye(3, dtype=matrices.dtype, device=matrices.device)
        inverse = torch.linalg.pinv(trace * eye - (stretch + stretch.mT) / 2)
    if not matrices.requires_grad:
        return rotation
    turned = rotation.mT @ matrices
    skew = turned - turned.mT  # zero, but not its gradient
    axis = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)
    x, y, z = (inverse @ axis[..., None])[..., 0].unbind(-1)
    zero = torch.zeros_like(x)
    change = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return rotation @ (eye + change)


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
