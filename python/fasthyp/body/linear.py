"""What all bodies share: the arrays of linear blend skinning, vertices and mesh-free joints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fasthyp.body.arrays import BodyArrays, body_arrays
from fasthyp.body.cameras import Camera
from fasthyp.body.outputs import BodyOutput
from fasthyp.body.rotations import form_of, in_form
from fasthyp.body.skinning import (
    Rotation,
    SkinningModel,
    fold_joints,
    project_joints,
    regress_joints,
)
from fasthyp.reference.skinning import NUMBERS

Arrays: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_FOLDS = 8  # regressors remembered per model


class LinearBody(nn.Module):
    """Any linear blend skinning model given by its arrays.

    Args:
        model: a model file (``.pkl``, ``.npz``, ``.safetensors``), or a mapping with the names of
            SMPL's files: ``v_template`` (V, 3) m, ``shapedirs`` (V, 3, S), ``posedirs``
            (V, 3, 9 (J - 1)) or none, ``J_regressor`` (J, V), ``kintree_table`` (2, J) or
            ``parents`` (J,), ``weights`` (V, J), ``f`` (F, 3) or none.
        num_betas: how many shape coefficients to use; by default all.
        dtype: of the buffers.

    Raises:
        ModelFileError: an array is missing or wrong, or the file is refused.
        ValueError: ``num_betas`` is negative, or another ending of the file's name.
    """

    v_template: Tensor
    shapedirs: Tensor
    posedirs: Tensor
    J_regressor: Tensor
    parents: Tensor
    lbs_weights: Tensor
    faces_tensor: Tensor

    def __init__(
        self,
        model: str | os.PathLike[str] | Mapping[str, Any] | BodyArrays,
        num_betas: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        arrays = model if isinstance(model, BodyArrays) else body_arrays(model)
        self.dtype = dtype
        self._register(arrays, num_betas)

    def _register(self, arrays: BodyArrays, num_betas: int | None) -> None:
        if num_betas is not None and num_betas < 0:
            raise ValueError(f"num_betas: expected none or more, got {num_betas}")
        self.faces = arrays.faces
        vertices = len(arrays.weights)
        posedirs = arrays.posedirs.reshape(3 * vertices, -1).T
        for name, value in (
            ("shapedirs", arrays.shapedirs[:, :, :num_betas]),
            ("v_template", arrays.v_template),
            ("J_regressor", arrays.J_regressor),
            ("posedirs", posedirs),
            ("lbs_weights", arrays.weights),
        ):
            self.register_buffer(name, self._buffer(value))
        self.register_buffer("faces_tensor", torch.tensor(arrays.faces, dtype=torch.long))
        self.register_buffer("parents", torch.tensor(arrays.parents, dtype=torch.long))

    def _buffer(self, value: np.ndarray) -> Tensor:
        return torch.tensor(np.ascontiguousarray(value), dtype=self.dtype)

    @property
    def num_betas(self) -> int:
        """Number of shape coefficients."""
        return self.shapedirs.shape[2]

    def get_num_verts(self) -> int:
        return self.v_template.shape[0]

    def get_num_faces(self) -> int:
        return self.faces_tensor.shape[0]

    def extra_repr(self) -> str:
        joints, vertices = self.J_regressor.shape
        return f"{vertices} vertices, {joints} joints, {self.num_betas} betas"

    def forward(
        self,
        betas: Tensor | None = None,
        pose: Tensor | None = None,
        transl: Tensor | None = None,
        pose2rot: bool = True,
        vertices: bool = True,
        rotation: Rotation | None = None,
    ) -> BodyOutput:
        """Pose bodies. Batches of one are repeated to the size of the others.

        Args:
            betas: (B, S), the average shape by default.
            pose: (B, J, 3) or (B, 3 J) axis angles in rad; rotation matrices (B, J, 3, 3) with
                ``pose2rot=False``; the rest pose by default.
            transl: (B, 3) m.
            vertices: False leaves the mesh out, which then is not computed.
            rotation: what the numbers of the pose are, instead of ``pose2rot``: ``"axis_angle"``,
                ``"matrix"``, or 6D (B, 6 J) or (B, J, 6) in one of its conventions, ``"columns"``
                (ProHMR), ``"interleaved"`` (SPIN, POCO), ``"rows"`` (PyTorch3D, HUMR).

        Returns:
            Vertices (B, V, 3) m, or None, and the skeleton's joints (B, J, 3) m.

        Raises:
            TypeError, ValueError: an argument of another type or shape.
        """
        form = form_of(rotation, pose2rot)
        betas, pose, transl = self._inputs(betas, pose, transl, form)
        shape = self._coefficients(betas, pose, form)
        if vertices:
            points, joints = self._skin(shape, pose, transl, form)
        else:
            own = self._own_joints()
            points, joints = None, regress_joints(own, shape, pose, transl, rotation=form)
        return BodyOutput(vertices=points, joints=joints, full_pose=pose, transl=transl)

    def joints(
        self,
        betas: Tensor | None = None,
        pose: Tensor | None = None,
        transl: Tensor | None = None,
        regressor: Tensor | None = None,
        pose2rot: bool = True,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Joints without the mesh, exactly those that a regressor of its vertices would give.

        Args:
            betas, pose, transl, pose2rot, rotation: as in a call.
            regressor: (K, V), dense or sparse; by default the skeleton's joints. It is folded into
                the model once; pass the same tensor again.

        Returns:
            (B, K, 3) m.

        Raises:
            TypeError, ValueError: an argument of another type or shape.
        """
        folded = self._own_joints() if regressor is None else self._folded(regressor)
        form = form_of(rotation, pose2rot)
        betas, pose, transl = self._inputs(betas, pose, transl, form)
        shape = self._coefficients(betas, pose, form)
        return regress_joints(folded, shape, pose, transl, rotation=form)

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
        """Those joints in the image (B, K, 2) and in space (B, K, 3), in one pass.

        Args:
            camera: one for all bodies or one for each.
            others: as for :meth:`joints`.

        Raises:
            TypeError, ValueError: an argument of another type or shape.
        """
        folded = self._own_joints() if regressor is None else self._folded(regressor)
        form = form_of(rotation, pose2rot)
        betas, pose, transl = self._inputs(betas, pose, transl, form)
        shape = self._coefficients(betas, pose, form)
        return project_joints(folded, shape, pose, camera, transl, rotation=form)

    def _coefficients(self, betas: Tensor, pose: Tensor, form: Rotation) -> Tensor:
        """What the blend shapes of :meth:`_model` are multiplied with."""
        return betas

    def _inputs(
        self, betas: Tensor | None, pose: Tensor | None, transl: Tensor | None, form: Rotation
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        joints = len(self.parents)
        if betas is None:
            betas = self.v_template.new_zeros(1, self.num_betas)
        if pose is None:
            pose = self._rest(joints, form)
        values = {
            "betas": self._rows("betas", betas, self.num_betas),
            "pose": self._rotations("pose", pose, joints, form),
            "transl": None if transl is None else self._rows("transl", transl, 3),
        }
        sized = broadcast(values)
        return sized["betas"], sized["pose"], sized.get("transl")

    def _model(self) -> Arrays:
        """The arrays in the order in which skinning takes them."""
        return (
            self.v_template,
            self._all_shapedirs(),
            self.posedirs,
            self.J_regressor,
            self.parents,
            self.lbs_weights,
        )

    def _all_shapedirs(self) -> Tensor:
        return self.shapedirs

    def _skin(
        self, shape: Tensor, pose: Tensor, transl: Tensor | None, form: Rotation
    ) -> tuple[Tensor, Tensor]:
        arrays = self._model()
        model = self._cached(("skinning",), arrays, lambda: SkinningModel(*arrays))
        return model(shape, pose, transl, form)

    def _folded(self, regressor: Tensor) -> Any:
        if not isinstance(regressor, Tensor):
            raise TypeError(f"regressor: expected a tensor, got {type(regressor).__name__}")
        vertices = self.get_num_verts()
        if regressor.dim() != 2 or regressor.shape[1] != vertices:
            raise ValueError(
                f"regressor: expected shape (K, {vertices}), got {tuple(regressor.shape)}"
            )

        def make() -> Any:
            dense = regressor.to_dense() if regressor.layout != torch.strided else regressor
            more = len(self._model()[0]) - vertices  # of models with vertices that are not seen
            dense = nn.functional.pad(dense.detach().to(self.v_template), (0, more))
            return fold_joints(*self._model(), dense)

        return self._cached(("fold", id(regressor)), (regressor, *self._model()), make)

    def _points_on_vertices(self) -> tuple[Tensor, Tensor]:
        """Vertices and weights (P, N) of the points that the model appends to its joints."""
        none = self.parents.new_zeros(0, 1)
        return none, none.to(self.v_template)

    def _point_buffers(self) -> tuple[Tensor, ...]:
        """What :meth:`_points_on_vertices` is computed from."""
        return ()

    def _own_joints(self) -> Any:
        """The model's own joints as a regressor of very few vertices.

        A posed joint is where skinning takes a vertex at the rest joint that has the whole weight
        of that bone. So the joints, and after them the vertices that are needed, make a body of
        their own, small enough that the size of the mesh does not matter.
        """

        def make() -> Any:
            corner, weight = self._points_on_vertices()
            used, place = corner.unique(return_inverse=True)
            joints, (template, shapedirs, posedirs, regressor, parents, weights) = (
                len(self.parents),
                self._model(),
            )
            rows = posedirs.unflatten(1, (-1, 3))[:, used]
            still = rows.new_zeros(len(rows), joints, 3)
            eye = torch.eye(joints, dtype=template.dtype, device=template.device)
            picked = template.new_zeros(len(corner), len(used)).scatter_add_(1, place, weight)
            return fold_joints(
                torch.cat([regressor @ template, template[used]]),
                torch.cat([torch.einsum("jv,vcs->jcs", regressor, shapedirs), shapedirs[used]]),
                torch.cat([still, rows], 1).flatten(1),
                torch.cat([eye, eye.new_zeros(joints, len(used))], 1),
                parents,
                torch.cat([eye, weights[used]]),
                torch.block_diag(eye, picked),
            )

        return self._cached(("own",), (*self._model(), *self._point_buffers()), make)

    def _cached(
        self, key: tuple[Any, ...], sources: Sequence[Tensor], make: Callable[[], Any]
    ) -> Any:
        """What was made of these tensors before, unless one of them was changed since."""
        cache: dict[Any, Any] = self.__dict__.setdefault("_cache", {})
        stamp = [_stamp(tensor) for tensor in sources]
        found = cache.get(key)
        if found is None or found[0] != stamp:
            with torch.no_grad():
                value = make()
            folds = [other for other in cache if other[0] == "fold"]
            if key[0] == "fold" and len(folds) >= _FOLDS:
                cache.pop(folds[0], None)  # another thread may have been first
            # Holding the sources keeps their addresses from being given to others.
            cache[key] = found = (stamp, value, tuple(sources))
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_cache", None)
        return state

    def _rest(self, joints: int, form: Rotation) -> Tensor:
        if form == "axis_angle":
            return self.v_template.new_zeros(1, 3 * joints)
        eye = torch.eye(3, dtype=self.v_template.dtype, device=self.v_template.device)
        if form == "matrix":
            return eye.expand(1, joints, 3, 3)
        return in_form(self.v_template.new_zeros(1, 3), form).repeat(1, joints)

    def _tensor(self, name: str, value: Any) -> Tensor:
        """``value`` in the model's type, to which half precision is raised."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        like = self.v_template
        if value.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got {value.device}")
        if value.dtype == like.dtype:
            return value
        if not value.dtype.is_floating_point or value.dtype.itemsize > like.dtype.itemsize:
            raise TypeError(f"{name}: expected {like.dtype} as the model, got {value.dtype}")
        return value.to(like.dtype)

    def _rows(self, name: str, value: Any, width: int) -> Tensor:
        value = self._tensor(name, value)
        if value.dim() != 2 or value.shape[1] != width:
            raise ValueError(f"{name}: expected shape (B, {width}), got {tuple(value.shape)}")
        return value

    def _rotations(self, name: str, value: Any, joints: int, form: Rotation) -> Tensor:
        """(B, 3 J), (B, J, 3, 3) or (B, 6 J) of what is given in one of the usual shapes."""
        value = self._tensor(name, value)
        shape, each = tuple(value.shape), NUMBERS[form]
        flat = (each * joints,)
        fits = [flat, (joints, each)]
        if form == "matrix":
            fits += [(joints, 3, 3)] + [(3, 3)] * (joints == 1)
        if shape[1:] not in fits:
            what, wanted = "axis angles", f"(B, {3 * joints}) or (B, {joints}, 3)"
            if form == "matrix":
                what, wanted = "rotation matrices", f"(B, {joints}, 3, 3)"
            elif form != "axis_angle":
                what, wanted = f"6D {form}", f"(B, {6 * joints}) or (B, {joints}, 6)"
            raise ValueError(f"{name}: expected {what} of shape {wanted}, got {shape}")
        wide = (joints, 3, 3) if form == "matrix" else flat
        return value if shape[1:] == wide else value.reshape(shape[0], *wide)


def broadcast(values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that are given, with batches of one repeated to the size of the others.

    Raises:
        ValueError: two sizes other than one.
    """
    given = {name: value for name, value in values.items() if value is not None}
    sizes = {value.shape[0] for value in given.values()}
    if len(sizes) == 1:
        return given
    sizes.discard(1)
    if len(sizes) > 1:
        found = ", ".join(f"{name} {value.shape[0]}" for name, value in given.items())
        raise ValueError(f"batch: expected one size, or one body, in all arguments; got {found}")
    size = sizes.pop()
    return {
        name: value if value.shape[0] == size else value.expand(size, *value.shape[1:])
        for name, value in given.items()
    }


def _stamp(tensor: Tensor) -> tuple[int, int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr() if tensor.layout == torch.strided else 0, version
