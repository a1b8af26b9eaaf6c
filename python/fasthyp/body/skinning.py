"""Linear blend skinning of SMPL-like bodies: vertices, joints without a mesh, their projection."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fasthyp._tensors import check_shape
from fasthyp.body.cameras import Camera
from fasthyp.ops import skinning as ops
from fasthyp.ops.skinning import Points
from fasthyp.reference import skinning as reference

Rotation = Literal["axis_angle", "matrix", "columns", "interleaved", "rows"]


def lbs(
    betas: Tensor,
    pose: Tensor,
    v_template: Tensor,
    shapedirs: Tensor,
    posedirs: Tensor | None,
    J_regressor: Tensor,
    parents: Tensor,
    lbs_weights: Tensor,
    pose2rot: bool = True,
) -> tuple[Tensor, Tensor]:
    """Vertices and joints of posed bodies: ``smplx.lbs.lbs``, its signature and its numbers.

    Nothing of the size (B, V) is made but the vertices. The arrays of the model are folded at the
    first call with them, and again when they change; those of the last few models are remembered
    as long as the tensors live (:class:`SkinningModel` keeps one by itself). Where gradients of
    these arrays are wanted, the PyTorch path of :mod:`fasthyp.reference.skinning` runs.

    Args:
        betas: (B, S) shape coefficients, float32 or float64 as everything else.
        pose: (B, J * 3) or (B, J, 3) axis-angle in radians; without ``pose2rot`` rotation matrices
            (B, J, 3, 3) or (B, J, 9). One shape goes with many poses and the reverse.
        v_template: (V, 3) or (1, V, 3) metres.
        shapedirs: (V, 3, S).
        posedirs: (9 * (J - 1), V * 3); None or (0, ...) for no pose blend shapes.
        J_regressor: (J, V), dense or sparse.
        parents: (J), of each joint but the first one that comes before it.
        lbs_weights: (V, J).

    Returns:
        Vertices (B, V, 3) and joints (B, J, 3) in metres.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    model = _model_of((v_template, shapedirs, posedirs, J_regressor, parents, lbs_weights))
    return model(betas, pose, rotation="axis_angle" if pose2rot else "matrix")


class SkinningModel:
    """The arrays of a body model, folded once for the kernels.

    It holds the tensors themselves, and folds them anew when one was changed in place. PyTorch does
    not count changes made through ``tensor.data``; after those call :meth:`clear`. Safe to use from
    several threads; the folded form is never pickled or copied.

    Args:
        v_template, shapedirs, posedirs, J_regressor, parents, lbs_weights: as for :func:`lbs`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        v_template: Tensor,
        shapedirs: Tensor,
        posedirs: Tensor | None,
        J_regressor: Tensor,
        parents: Tensor,
        lbs_weights: Tensor,
    ) -> None:
        _check_model(v_template, shapedirs, posedirs, J_regressor, parents, lbs_weights)
        self.v_template, self.shapedirs, self.posedirs = v_template, shapedirs, posedirs
        self.J_regressor, self.parents, self.lbs_weights = J_regressor, parents, lbs_weights
        self.clear()

    def clear(self) -> None:
        """Forget what was folded."""
        self._points: tuple[Any, Points] | None = None
        self._folded: OrderedDict[int, tuple[Any, Any, FoldedJoints]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ARRAYS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def arrays(self) -> tuple[Tensor | None, ...]:
        """The tensors of the model, in the order of the arguments."""
        return tuple(getattr(self, name) for name in _ARRAYS)

    def points(self) -> Points:
        """The vertices as the kernels take them."""
        now, found = _stamp(self.arrays), self._points
        if found is None or now is None or found[0] != now:
            with self._lock:
                self._points = found = now, _fold_vertices(*self.arrays)  # type: ignore[arg-type]
        return found[1]

    def __call__(
        self,
        betas: Tensor,
        pose: Tensor,
        transl: Tensor | None = None,
        rotation: Rotation | None = None,
        vertices: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Vertices (B, V, 3), empty (0) where not wanted, and joints (B, J, 3).

        Args:
            betas: (B, S); B may be 1 for each argument.
            pose: (B, J, C) or (B, J * C), matrices also (B, J, 3, 3).
            transl: (B, 3) metres.
            rotation: ``"axis_angle"`` (C = 3), ``"matrix"`` (C = 9), or one of the three 6D
                conventions (C = 6): ``"columns"``, the first two columns of the matrix one after
                the other (ProHMR), ``"interleaved"``, the same row by row (SPIN, POCO, HuManiFlow),
                ``"rows"``, its first two rows (PyTorch3D, HUMR). None: by the shape, axis-angle or
                matrix.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        joints = self.parents.numel()
        pose, rotation = _joint_numbers(pose, rotation, joints)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.arrays):
            shapes = self.shapedirs.shape[-1]
            ops.check_bodies(betas, pose, transl, None, shapes, joints, self.v_template)
            dense = self.J_regressor.to_dense()
            found = reference.lbs(
                *(betas, pose, transl, self.v_template, self.shapedirs, self.posedirs),
                *(dense, self.parents.tolist(), self.lbs_weights, rotation),
            )
            return found if vertices else (betas.new_empty(0), found[1])
        return self.points()(betas, pose, transl, rotation, vertices)[:2]

    def vertices(
        self,
        betas: Tensor,
        rotations: Tensor,
        transl: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """The vertices (B, V, 3); arguments as for a call."""
        return self(betas, rotations, transl, rotation)[0]

    def joints(
        self,
        betas: Tensor,
        rotations: Tensor,
        transl: Tensor | None = None,
        rotation: Rotation | None = None,
        regressor: Tensor | None = None,
    ) -> Tensor:
        """Joints (B, K, 3), without a mesh: the model's own, those of the kinematic tree, or those
        that a linear regressor (K, V) takes from the posed vertices, see :func:`fold_joints`."""
        if regressor is None:
            return self(betas, rotations, transl, rotation, vertices=False)[1]
        pose, rotation = _joint_numbers(rotations, rotation, self.parents.numel())
        return self.fold(regressor).points(betas, pose, transl, rotation)[0]

    def fold(self, regressor: Tensor) -> FoldedJoints:
        """:func:`fold_joints` for this model; those of the last few regressors are remembered."""
        _check_regressor(regressor, self.v_template, self.lbs_weights.shape[0])
        now, key = _stamp((*self.arrays, regressor)), id(regressor)
        with self._lock:
            found = self._folded.get(key)
            known = found is not None and now is not None and found[1] == now
            if found is not None and known and found[0]() is regressor:
                self._folded.move_to_end(key)
                return found[2]
        folded = fold_joints(*self.arrays, regressor)  # type: ignore[arg-type, call-arg]
        with self._lock:
            self._folded[key] = weakref.ref(regressor), now, folded
            if len(self._folded) > _REMEMBERED:
                self._folded.popitem(last=False)
        return folded


@dataclass(frozen=True, eq=False)
class FoldedJoints:
    """A linear regressor of posed vertices, folded with a body model by :func:`fold_joints`."""

    points: Points

    @property
    def joints(self) -> int:
        """How many joints it gives."""
        return self.points.outputs


def fold_joints(
    v_template: Tensor,
    shapedirs: Tensor,
    posedirs: Tensor | None,
    J_regressor: Tensor,
    parents: Tensor,
    lbs_weights: Tensor,
    regressor: Tensor,
) -> FoldedJoints:
    """Fold a regressor of joints with a body model, so that its joints need no mesh.

    Exact for any linear regressor R (K, V) of the posed vertices, dense or sparse: joint_k =
    sum_b G_b (A_kb [1, betas, pose feature]), where G_b moves bone b and A_kb = sum_v R_kv w_vb
    [template_v; shapedirs_v; posedirs_v]. Only bones that a joint depends on are kept; a joint of
    fewer vertices than bones is a sum of those vertices instead. Folded in float64, stored in the
    dtype of the model. The result does not follow later changes of the arrays.

    Args:
        regressor: (K, V), dense or sparse.
        others: as for :func:`lbs`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_model(v_template, shapedirs, posedirs, J_regressor, parents, lbs_weights)
    _check_regressor(regressor, v_template, lbs_weights.shape[0])
    with torch.no_grad():
        dense = regressor.detach().to_dense().to("cpu", torch.float64)
        wide = lbs_weights.detach().to("cpu", torch.float64)
        used = (dense != 0).any(0).nonzero()[:, 0]  # vertices
        rows = _directions(v_template, shapedirs, posedirs, used).to("cpu", torch.float64)
        dense, wide = dense[:, used], wide[used]
        entries: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        targets: list[int] = []
        for joint, row in enumerate(dense):
            at = row.nonzero()[:, 0]
            skin, times = wide[at], row[at]
            bones = (skin != 0).any(0).nonzero()[:, 0]
            if at.numel() <= bones.numel():
                vertex, bone = skin.nonzero(as_tuple=True)
                weight = skin[vertex, bone] * times[vertex]
                counts = (skin != 0).sum(1)
                entries.append((rows[at], counts, bone, torch.stack([weight, weight], 1)))
            else:
                part = (skin[:, bones] * times[:, None]).T
                shifts = torch.stack([torch.ones(len(bones)).double(), part.sum(1)], 1)
                summed = (part @ rows[at].flatten(1)).unflatten(1, rows.shape[1:])
                entries.append((summed, torch.ones_like(bones), bones, shifts))
            targets += [joint] * entries[-1][1].numel()
        if not entries:
            nothing = torch.zeros(0, dtype=torch.long)
            entries = [(rows[:0], nothing, nothing, torch.zeros(0, 2).double())]
        parts = [torch.cat(part) for part in zip(*entries, strict=True)]
        where = torch.tensor(targets, dtype=torch.int32)
        arrays = v_template, shapedirs, J_regressor, parents
        return FoldedJoints(_points(*arrays, *parts, where, dense.sum(1)))  # type: ignore[call-arg]


def regress_joints(
    folded: FoldedJoints,
    betas: Tensor,
    pose: Tensor,
    transl: Tensor | None = None,
    pose2rot: bool = True,
    rotation: Rotation | None = None,
) -> Tensor:
    """The joints (B, K, 3) that a regressor takes from the posed vertices, without those vertices.

    Args:
        folded: from :func:`fold_joints`.
        betas, pose, pose2rot: as for :func:`lbs`.
        transl: (B, 3) metres, added to the vertices; a joint moves by it times the sum of its
            regressor's row.
        rotation: instead of ``pose2rot``, also the 6D conventions, see :class:`SkinningModel`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(folded, FoldedJoints):
        raise TypeError(f"folded: expected FoldedJoints, got {type(folded).__name__}")
    if rotation is None:
        rotation = "axis_angle" if pose2rot else "matrix"
    pose, rotation = _joint_numbers(pose, rotation, folded.points.parents.numel())
    return folded.points(betas, pose, transl, rotation)[0]


def project_joints(
    folded: FoldedJoints,
    betas: Tensor,
    pose: Tensor,
    camera: Camera,
    transl: Tensor | None = None,
    pose2rot: bool = True,
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor]:
    """Joints in the image (B, K, 2) and in space (B, K, 3), in one pass and without vertices.

    The same numbers as :func:`regress_joints` and then :func:`~fasthyp.body.project` or
    :func:`~fasthyp.body.weak_perspective`, with gradients by the camera too.

    Args:
        camera: one for all bodies or one for each.
        others: as for :func:`regress_joints`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(folded, FoldedJoints):
        raise TypeError(f"folded: expected FoldedJoints, got {type(folded).__name__}")
    if not isinstance(camera, Camera):
        raise TypeError(f"camera: expected a Camera, got {type(camera).__name__}")
    if rotation is None:
        rotation = "axis_angle" if pose2rot else "matrix"
    pose, rotation = _joint_numbers(pose, rotation, folded.points.parents.numel())
    joints, _, points = folded.points(betas, pose, transl, rotation, camera=camera.numbers)
    return points, joints


# --- folding ---

_ARRAYS = ("v_template", "shapedirs", "posedirs", "J_regressor", "parents", "lbs_weights")
_REMEMBERED = 4


def _check_model(
    v_template: Tensor,
    shapedirs: Tensor,
    posedirs: Tensor | None,
    J_regressor: Tensor,
    parents: Tensor,
    lbs_weights: Tensor,
) -> None:
    if isinstance(v_template, Tensor) and v_template.ndim == 3 and v_template.shape[0] == 1:
        v_template = v_template[0]
    check_shape("v_template", v_template, (None, 3))
    if v_template.dtype not in ops.DTYPES:
        raise TypeError(f"v_template: expected float32 or float64, got {v_template.dtype}")
    count = v_template.shape[0]
    check_shape("parents", parents, (None,))
    if parents.is_floating_point() or parents.is_complex() or parents.dtype == torch.bool:
        raise TypeError(f"parents: expected integers, got {parents.dtype}")
    joints = parents.numel()
    if joints < 1:
        raise ValueError("parents: expected at least one joint, got none")
    check_shape("shapedirs", shapedirs, (count, 3, None))
    if posedirs is not None and posedirs.shape[:1] != (0,):
        check_shape("posedirs", posedirs, (9 * (joints - 1), 3 * count))
    check_shape("J_regressor", J_regressor, (joints, count))
    check_shape("lbs_weights", lbs_weights, (count, joints))
    for name, value in (
        ("shapedirs", shapedirs),
        ("posedirs", posedirs),
        ("J_regressor", J_regressor),
        ("lbs_weights", lbs_weights),
    ):
        if value is None:
            continue
        if value.dtype != v_template.dtype:
            raise TypeError(f"{name}: expected {v_template.dtype} as v_template, got {value.dtype}")
        if value.device != v_template.device:
            raise ValueError(
                f"{name}: expected on {v_template.device} as v_template, got it on {value.device}"
            )


def _check_regressor(regressor: Tensor, v_template: Tensor, count: int) -> None:
    if not isinstance(regressor, Tensor):
        raise TypeError(f"regressor: expected a torch.Tensor, got {type(regressor).__name__}")
    if regressor.ndim != 2 or regressor.shape[1] != count:
        raise ValueError(f"regressor: expected shape (K, {count}), got {tuple(regressor.shape)}")
    if not regressor.is_floating_point():
        raise TypeError(f"regressor: expected floating numbers, got {regressor.dtype}")
    if regressor.device != v_template.device:
        raise ValueError(
            f"regressor: expected on {v_template.device} as v_template, got it on "
            f"{regressor.device}"
        )


def _checked_parents(parents: Tensor) -> Tensor:
    """As int32, the first one 0."""
    listed = parents.tolist()
    for joint, parent in enumerate(listed[1:], 1):
        if not 0 <= parent < joint:
            raise ValueError(f"parents: expected a joint before it for joint {joint}, got {parent}")
    return torch.tensor([0, *listed[1:]], dtype=torch.int32, device=parents.device)


def _joint_numbers(pose: Tensor, rotation: str | None, joints: int) -> tuple[Tensor, Rotation]:
    """The pose as (B, J, C), and how its numbers are meant."""
    if not isinstance(pose, Tensor):
        raise TypeError(f"pose: expected a torch.Tensor, got {type(pose).__name__}")
    if rotation is not None and rotation not in ops.ROTATIONS:
        raise ValueError(f"rotation: expected one of {', '.join(ops.ROTATIONS)}, got {rotation!r}")
    if rotation is not None and pose.shape[1:] == (joints, reference.NUMBERS[rotation]):
        return pose, rotation  # type: ignore[return-value]
    flat = pose.flatten(1) if pose.ndim > 2 else pose
    if rotation is None:
        numbers = flat.shape[1] // joints if flat.ndim == 2 else 0
        rotation = {3: "axis_angle", 9: "matrix"}.get(numbers)
        if rotation is None:
            raise ValueError(
                f"pose: expected 3 or 9 numbers for each of {joints} joints, or a name of what "
                f"they are as rotation, got shape {tuple(pose.shape)}"
            )
    numbers = reference.NUMBERS[rotation]
    if flat.ndim != 2 or flat.shape[1] != joints * numbers:
        raise ValueError(
            f"pose: expected {numbers} numbers ({rotation}) for each of {joints} joints, "
            f"got shape {tuple(pose.shape)}"
        )
    return flat.reshape(len(flat), joints, numbers), rotation  # type: ignore[return-value]


def _stamp(tensors: tuple[Tensor | None, ...]) -> Any:
    """Changes whenever a tensor's memory or values do; None: cannot be known."""
    try:
        return [
            None if t is None else (t._version, t.data_ptr() if not t.is_sparse else id(t))
            for t in tensors
        ]
    except RuntimeError:  # inference tensors have no version
        return None


_models: OrderedDict[Any, tuple[Any, SkinningModel | None, Any, Points]] = OrderedDict()
_models_lock = threading.Lock()


def _model_of(arrays: tuple[Tensor | None, ...]) -> SkinningModel:
    """A model of these very tensors, with what was folded of them before."""
    model = SkinningModel(*arrays)  # type: ignore[arg-type]
    now = _stamp(arrays)
    if now is None:
        return model
    key = tuple(map(id, arrays))
    with _models_lock:
        for old, (references, *_) in list(_models.items()):
            if any(ref is not None and ref() is None for ref in references):
                del _models[old]
        found = _models.get(key)
        if found is not None and found[2] == now:
            _models.move_to_end(key)
            model._points = now, found[3]
            return model
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arrays):
        return model
    points = model.points()
    references = tuple(None if t is None else weakref.ref(t) for t in arrays)
    with _models_lock:
        _models[key] = references, None, now, points
        while len(_models) > _REMEMBERED:
            _models.popitem(last=False)
    return model


def _directions(
    v_template: Tensor, shapedirs: Tensor, posedirs: Tensor | None, vertices: Tensor
) -> Tensor:
    """(vertices, 3, 1 + features): the template and all that is added to it."""
    vertices = vertices.to(v_template.device)
    parts = [v_template.detach().reshape(-1, 3)[vertices, :, None], shapedirs.detach()[vertices]]
    if posedirs is not None and posedirs.shape[0]:
        number = shapedirs.shape[0]
        of_pose = posedirs.detach().reshape(-1, number, 3)[:, vertices]
        parts.append(of_pose.permute(1, 2, 0))
    return torch.cat(parts, -1)


def _points(
    v_template: Tensor,
    shapedirs: Tensor,
    J_regressor: Tensor,
    parents: Tensor,
    directions: Tensor,
    counts: Tensor,
    bones: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    lift: Tensor | None,
) -> Points:
    """Points (P, 3, 1 + features) and the bones of each, for the kernels."""
    like, number = v_template, directions.shape[0]
    tiles = -(-number // reference.TILE)
    padded = directions.new_zeros(tiles * reference.TILE, *directions.shape[1:])
    padded[:number] = directions
    tiled = padded.reshape(tiles, ops.COLUMNS, directions.shape[-1])
    columns = tiled[..., 1:].mT
    moving = (columns != 0).any(-1)  # what moves points of a tile
    row_starts = torch.zeros(tiles + 1, dtype=torch.int32)
    row_starts[1:] = moving.sum(1).cumsum(0)
    regressor = J_regressor.detach().to_dense().double()
    at_rest = (
        regressor @ v_template.detach().reshape(-1, 3).double(),
        regressor @ shapedirs.detach().double().flatten(1),
    )
    starts = torch.zeros(number + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)

    def put(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype).contiguous()

    def index(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, torch.int32).contiguous()

    return Points(
        parents=index(_checked_parents(parents)),
        rest=put(at_rest[0]),
        rest_shapes=put(at_rest[1].unflatten(1, (3, -1))),
        row_starts=index(row_starts),
        rows=index(moving.nonzero()[:, 1]),
        columns=put(columns[moving]),
        base=put(tiled[..., 0]),
        starts=index(starts),
        bones=index(bones),
        weights=put(weights),
        targets=None if targets is None else index(targets),
        lift=None if lift is None else put(lift),
        pose_blend=directions.shape[-1] > 1 + shapedirs.shape[-1],
    )


def _fold_vertices(
    v_template: Tensor,
    shapedirs: Tensor,
    posedirs: Tensor | None,
    J_regressor: Tensor,
    parents: Tensor,
    lbs_weights: Tensor,
) -> Points:
    with torch.no_grad():
        everything = torch.arange(shapedirs.shape[0])
        skin = lbs_weights.detach()
        vertex, bone = skin.nonzero(as_tuple=True)
        weight = skin[vertex, bone]
        return _points(
            *(v_template, shapedirs, J_regressor, parents),
            _directions(v_template, shapedirs, posedirs, everything),
            (skin != 0).sum(1).cpu(),
            bone,
            torch.stack([weight, weight], 1),
            None,
            None,
        )
