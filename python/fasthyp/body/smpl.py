"""SMPL (Loper et al., SIGGRAPH Asia 2015): parameters, poses by parts, and the joints of a call.

Calls, defaults, buffers and the order of joints are those of the ``smplx`` package, here and in the
models made from this one (:mod:`~fasthyp.body.smplh`, :mod:`~fasthyp.body.smplx`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasthyp.body.arrays import BodyArrays, body_arrays, checked, find_model_file
from fasthyp.body.cameras import Camera
from fasthyp.body.files import load_arrays
from fasthyp.body.linear import LinearBody, broadcast
from fasthyp.body.outputs import SMPLOutput
from fasthyp.body.rotations import form_of, in_form
from fasthyp.body.skinning import Rotation, project_joints, regress_joints
from fasthyp.body.vertex_joints import VERTEX_IDS, VertexJointSelector


class SMPL(LinearBody):
    """The SMPL body: 6890 vertices, 24 joints.

    Args:
        model_path: the file (``.pkl`` as published, ``.npz`` or ``.safetensors``), a folder that
            holds ``SMPL_<GENDER>`` with one of these endings, or a mapping of its arrays.
        kid_template_path: with ``age="kid"``, the ``.npy`` file of the infants' template.
        create_betas, create_global_orient, create_body_pose, create_transl: whether the model has
            parameters of its own, used where a call gives none. Without them a call that gives
            none takes the rest pose, the average shape and no translation.
        betas, global_orient, body_pose, transl: their initial values; zero by default.
        num_betas: number of shape coefficients, at most those in the file.
        dtype: of buffers and parameters; arrays are rounded to float32 first, as smplx does.
        batch_size: of the parameters.
        joint_mapper: applied to the joints before the translation.
        gender: which file of a folder.
        vertex_ids: name to vertex of the joints to append, see
            :data:`~fasthyp.body.vertex_joints.EXTRA_JOINTS`.
        v_template: (V, 3) m instead of the file's.
        use_hands, use_feet_keypoints: whether to append finger tips and feet.
        ext: ending of the file in a folder; by default whichever is there.

    Raises:
        ModelFileError: an array is missing or wrong, or the file is refused.
        FileNotFoundError: no such file.
        ValueError: another argument is not what it should be.
    """

    NUM_BODY_JOINTS = 23
    NUM_JOINTS = 23
    SHAPE_SPACE_DIM = 300
    _STEM, _MESH = "SMPL", "smplh"
    _PARTS: tuple[tuple[str, int], ...] = (("global_orient", 1), ("body_pose", 23))
    _output: Any = SMPLOutput

    vertex_joint_selector: VertexJointSelector

    def __init__(
        self,
        model_path: str | os.PathLike[str] | Mapping[str, Any],
        kid_template_path: str | os.PathLike[str] = "",
        create_betas: bool = True,
        betas: Tensor | None = None,
        num_betas: int = 10,
        create_global_orient: bool = True,
        global_orient: Tensor | None = None,
        create_body_pose: bool = True,
        body_pose: Tensor | None = None,
        create_transl: bool = True,
        transl: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 1,
        joint_mapper: Callable[..., Tensor] | None = None,
        gender: str = "neutral",
        age: str = "adult",
        vertex_ids: Mapping[str, int] | None = None,
        v_template: Tensor | np.ndarray | None = None,
        use_hands: bool = True,
        use_feet_keypoints: bool = True,
        ext: str | None = None,
    ) -> None:
        if isinstance(model_path, Mapping):
            arrays = body_arrays(model_path)
        else:
            arrays = body_arrays(find_model_file(model_path, f"{self._STEM}_{gender.upper()}", ext))
        expected = 1 + sum(joints for _, joints in self._PARTS[1:])
        if len(arrays.parents) != expected:
            raise ValueError(
                f"{arrays.source}: expected the {expected} joints of {self.name()}, "
                f"got {len(arrays.parents)}"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"batch_size: expected a whole number, got {batch_size!r}")
        self.gender, self.age = gender, age
        self._raw_shapedirs = arrays.shapedirs
        num_betas = min(num_betas, self._shapes_in(arrays))
        if age == "kid":
            arrays, num_betas = _with_kid(arrays, kid_template_path, num_betas)
        super().__init__(arrays, num_betas, dtype)
        self.batch_size = batch_size
        self.joint_mapper = joint_mapper
        if v_template is not None:
            shape = tuple(v_template.shape)
            if shape != tuple(self.v_template.shape):
                raise ValueError(
                    f"v_template: expected shape {tuple(self.v_template.shape)}, got {shape}"
                )
            given = v_template if isinstance(v_template, Tensor) else self._buffer(v_template)
            self.v_template = given.detach().to(dtype)
        chosen = VERTEX_IDS[self._MESH] if vertex_ids is None else vertex_ids
        selector = VertexJointSelector(chosen, use_hands, use_feet_keypoints)
        top = int(selector.extra_joints_idxs.max())
        if top >= self.get_num_verts():
            raise ValueError(
                f"vertex_ids: expected vertices below {self.get_num_verts()} of this mesh, "
                f"got {top}"
            )
        self.vertex_joint_selector = selector
        self._own("betas", create_betas, betas, self.num_betas)
        self._own("global_orient", create_global_orient, global_orient, 3)
        self._own("body_pose", create_body_pose, body_pose, 3 * self.NUM_BODY_JOINTS)
        self._own("transl", create_transl, transl, 3)
        self._finish(arrays)
        del self._raw_shapedirs

    def _buffer(self, value: np.ndarray) -> Tensor:
        # smplx rounds to float32 whatever the dtype
        return super()._buffer(np.asarray(value, np.float32))

    def _finish(self, arrays: BodyArrays) -> None:
        """What the other models need of the file."""

    def _shapes_in(self, arrays: BodyArrays) -> int:
        return min(arrays.shapedirs.shape[2], self.SHAPE_SPACE_DIM)

    def _own(self, name: str, create: bool, value: Any, width: int) -> None:
        """A parameter of the model itself, (batch_size, width), zero or as given."""
        if not create:
            return
        if value is None:
            value = torch.zeros(self.batch_size, width, dtype=self.dtype)
        else:
            value = torch.as_tensor(value, dtype=self.dtype).detach().clone()
            if value.dim() != 2 or value.shape[1] != width:
                raise ValueError(f"{name}: expected shape (B, {width}), got {tuple(value.shape)}")
        self.register_parameter(name, nn.Parameter(value))

    def name(self) -> str:
        return "SMPL"

    @property
    def num_expression_coeffs(self) -> int:
        return 0

    @torch.no_grad()
    def reset_params(self, **values: Any) -> None:
        """Set the model's own parameters to given values, and all others to zero."""
        for name, parameter in self.named_parameters():
            if name in values:
                parameter.copy_(torch.as_tensor(values[name], dtype=parameter.dtype))
            else:
                parameter.zero_()

    def extra_repr(self) -> str:
        return f"{self.name()}, {self.gender}, {super().extra_repr()}"

    def forward_shape(self, betas: Tensor | None = None) -> Any:
        """The rest vertices (B, V, 3) m of a shape (B, S), as ``vertices`` and ``v_shaped``."""
        own = getattr(self, "betas", None) if betas is None else betas
        if own is None:
            own = self.v_template.new_zeros(1, self.num_betas)
        own = self._rows("betas", own, self.num_betas)
        shaped = self._shaped(own)
        return self._output(vertices=shaped, betas=own, v_shaped=shaped)

    def _shaped(self, betas: Tensor) -> Tensor:
        return self.v_template + torch.einsum("vcs,bs->bvc", self.shapedirs, betas)

    def forward(  # type: ignore[override]
        self,
        betas: Tensor | None = None,
        body_pose: Tensor | None = None,
        global_orient: Tensor | None = None,
        transl: Tensor | None = None,
        return_verts: bool = True,
        return_full_pose: bool = False,
        pose2rot: bool = True,
        vertices: bool = True,
        rotation: Rotation | None = None,
        **others: Any,
    ) -> Any:
        """Pose bodies. What is not given is the model's own parameter, or zero without one.
        Batches of one are repeated to the size of the others.

        Args:
            betas: (B, S).
            body_pose: (B, 69) axis angles in rad; with ``pose2rot=False`` rotation matrices
                (B, 23, 3, 3).
            global_orient: (B, 3), or (B, 1, 3, 3).
            transl: (B, 3) m.
            return_verts, vertices: with either False there is no mesh in the output, and none is
                computed.
            return_full_pose: whether the output has all rotations together.
            pose2rot: whether poses are axis angles.
            rotation: what the numbers of all poses that are given are, instead of ``pose2rot``:
                ``"axis_angle"``, ``"matrix"``, or 6D (B, 6 J) or (B, J, 6) in one of its
                conventions, ``"columns"`` (ProHMR), ``"interleaved"`` (SPIN, POCO), ``"rows"``
                (PyTorch3D, HUMR).

        Returns:
            :class:`~fasthyp.body.outputs.SMPLOutput`: joints (B, 45, 3) are the 24 of the skeleton,
            nose, eyes and ears, feet, and finger tips.

        Raises:
            TypeError, ValueError: an argument of another name, type or shape.
        """
        parts = {"global_orient": global_orient, "body_pose": body_pose}
        self._no_others(others)
        mesh, form = return_verts and vertices, form_of(rotation, pose2rot)
        return self._run(parts, betas, None, transl, mesh, return_full_pose, form)

    def joints(  # type: ignore[override]
        self,
        betas: Tensor | None = None,
        body_pose: Tensor | None = None,
        global_orient: Tensor | None = None,
        transl: Tensor | None = None,
        regressor: Tensor | None = None,
        pose2rot: bool = True,
        expression: Tensor | None = None,
        rotation: Rotation | None = None,
        **parts: Tensor | None,
    ) -> Tensor:
        """Joints without the mesh, exactly those that a regressor of its vertices would give.

        Args:
            betas, body_pose, global_orient, transl, pose2rot, rotation: as in a call.
            regressor: (K, V), dense or sparse, for instance of
                :func:`~fasthyp.body.load_regressor`; by default the joints of a call. It is folded
                into the model once; pass the same tensor again.
            expression: (B, E), of a model that has one.
            parts: the other parts of the pose that a call takes.

        Returns:
            (B, K, 3) m.

        Raises:
            TypeError, ValueError: an argument of another name, type or shape.
        """
        parts = self._known(parts, global_orient, body_pose)
        form = form_of(rotation, pose2rot)
        if regressor is None:
            return self._run(parts, betas, expression, transl, False, False, form).joints
        folded = self._folded(regressor)
        inputs = self._parts(parts, betas, expression, transl, form)
        shape, pose = inputs["shape"], inputs["pose"]
        return regress_joints(folded, shape, pose, inputs.get("transl"), rotation=form)

    def project_joints(  # type: ignore[override]
        self,
        camera: Camera,
        betas: Tensor | None = None,
        body_pose: Tensor | None = None,
        global_orient: Tensor | None = None,
        transl: Tensor | None = None,
        regressor: Tensor | None = None,
        pose2rot: bool = True,
        expression: Tensor | None = None,
        rotation: Rotation | None = None,
        **parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Those joints in the image (B, K, 2) and in space (B, K, 3), in one pass; a joint mapper
        and the contour of SMPL-X's face are taken first.

        Args:
            camera: one for all bodies or one for each.
            others: as for :meth:`joints`.

        Raises:
            TypeError, ValueError: an argument of another name, type or shape.
        """
        parts = self._known(parts, global_orient, body_pose)
        form = form_of(rotation, pose2rot)
        if regressor is None and (self.joint_mapper is not None or self._needs_mesh()):
            joints = self._run(parts, betas, expression, transl, False, False, form).joints
            return camera(joints), joints
        folded = self._own_joints() if regressor is None else self._folded(regressor)
        inputs = self._parts(parts, betas, expression, transl, form)
        shape, pose = inputs["shape"], inputs["pose"]
        return project_joints(folded, shape, pose, camera, inputs.get("transl"), rotation=form)

    def _known(
        self, parts: dict[str, Tensor | None], global_orient: Any, body_pose: Any
    ) -> dict[str, Tensor | None]:
        known = {name for name, _ in self._PARTS}
        self._no_others({name: value for name, value in parts.items() if name not in known})
        return {**parts, "global_orient": global_orient, "body_pose": body_pose}

    def _run(
        self,
        given: Mapping[str, Tensor | None],
        betas: Tensor | None,
        expression: Tensor | None,
        transl: Tensor | None,
        mesh: bool,
        full_pose: bool,
        form: Rotation,
        shaped: bool = False,
    ) -> Any:
        inputs = self._parts(given, betas, expression, transl, form)
        shape, pose, shift = inputs["shape"], inputs["pose"], inputs.get("transl")
        early = shift if self.joint_mapper is None else None  # a mapper sees bodies not yet moved
        if mesh or self._needs_mesh():
            vertices, skeleton = self._skin(shape, pose, early, form)
            joints = self._appended(vertices, skeleton, pose, form)
        else:
            own = self._own_joints()
            vertices, joints = None, regress_joints(own, shape, pose, early, rotation=form)
        if self.joint_mapper is not None:
            joints = self._mapped(joints, vertices)
            if shift is not None:
                joints = joints + shift[:, None]
                vertices = None if vertices is None else vertices + shift[:, None]
        fields = {name: inputs[name] for name in self._reported()}
        if shaped:
            fields["v_shaped"] = self._shaped(inputs["betas"])
        return self._output(
            vertices=vertices if mesh else None,
            joints=joints,
            full_pose=pose if full_pose else None,
            **fields,
        )

    def _reported(self) -> tuple[str, ...]:
        return ("betas", "global_orient", "body_pose")

    def _needs_mesh(self) -> bool:
        return False

    def _mapped(self, joints: Tensor, vertices: Tensor | None) -> Tensor:
        assert self.joint_mapper is not None
        return self.joint_mapper(joints)

    def _appended(self, vertices: Tensor, joints: Tensor, pose: Tensor, form: Rotation) -> Tensor:
        return self.vertex_joint_selector(vertices, joints)

    def _point_buffers(self) -> tuple[Tensor, ...]:
        return (self.vertex_joint_selector.extra_joints_idxs,)

    def _points_on_vertices(self) -> tuple[Tensor, Tensor]:
        chosen = self.vertex_joint_selector.extra_joints_idxs[:, None]
        return chosen, torch.ones_like(chosen, dtype=self.v_template.dtype)

    def _parts(
        self,
        given: Mapping[str, Tensor | None],
        betas: Tensor | None,
        expression: Tensor | None,
        transl: Tensor | None,
        form: Rotation,
    ) -> dict[str, Tensor]:
        """All inputs at one batch size: ``shape``, ``pose`` and ``transl`` for skinning, and what
        the output repeats."""
        coefficients = {"betas": betas, "expression": expression}
        widths = {"betas": self.num_betas, "expression": self.num_expression_coeffs}
        if not widths["expression"]:
            if expression is not None:
                raise ValueError(f"expression: {self.name()} has none")
            del coefficients["expression"]
        shape: dict[str, Tensor | None] = {}
        for name, value in coefficients.items():
            own = getattr(self, name, None) if value is None else value
            if own is None:
                own = self.v_template.new_zeros(1, widths[name])
            shape[name] = self._rows(name, own, widths[name])
        shown: dict[str, Tensor | None] = {}
        pose: dict[str, Tensor | None] = {}
        for name, joints in self._PARTS:
            shown[name], pose[name] = self._part(name, joints, given.get(name), form)
        own = getattr(self, "transl", None) if transl is None else transl
        shift = None if own is None else self._rows("transl", own, 3)
        sized = broadcast({**shape, **pose, "transl": shift})
        rows = torch.cat([sized[name] for name, _ in self._PARTS], 1)
        out = {name: sized[name] if value is None else value for name, value in shown.items()}
        out.update({name: sized[name] for name in shape})
        out["shape"] = (
            torch.cat([sized[name] for name in shape], 1) if len(shape) > 1 else sized["betas"]
        )
        out["pose"] = self._with_mean(rows) if form == "axis_angle" else rows
        if "transl" in sized:
            out["transl"] = sized["transl"]
        return out

    def _part(
        self, name: str, joints: int, value: Tensor | None, form: Rotation
    ) -> tuple[Tensor | None, Tensor]:
        """One part of the pose: as the output shows it (None: as skinning takes it), and as rows
        for skinning."""
        own: Tensor | None = getattr(self, name, None)
        if value is not None:
            return value, self._rotations(name, value, joints, form)
        if own is None:
            return None, self._rest(joints, form)
        turned = in_form(own, form)
        return turned, turned

    def _with_mean(self, pose: Tensor) -> Tensor:
        return pose

    @staticmethod
    def _no_others(others: Mapping[str, Any]) -> None:
        # get_skin is an old argument of smplx that research code still passes
        unknown = [
            name for name, value in others.items() if name != "get_skin" and value is not None
        ]
        if unknown:
            raise TypeError(f"unexpected arguments: {', '.join(unknown)}")


def _with_kid(
    arrays: BodyArrays, path: str | os.PathLike[str], num_betas: int
) -> tuple[BodyArrays, int]:
    """One more shape coefficient, which leads to the infants' template."""
    found = load_arrays(Path(path)) if str(path).endswith(".npy") else {}
    if "" not in found:
        raise ValueError(f"kid_template_path: expected a .npy file, got {str(path)!r}")
    kid = checked(found[""], "template", arrays.v_template.shape, str(path))
    step = kid - kid.mean(0) - arrays.v_template
    arrays.shapedirs = np.concatenate([arrays.shapedirs[:, :, :num_betas], step[:, :, None]], 2)
    return arrays, num_betas + 1
