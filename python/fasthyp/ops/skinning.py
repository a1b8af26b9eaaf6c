"""The op behind :mod:`fasthyp.body.skinning`: argument checks, dispatch, the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fasthyp import _C, _environment
from fasthyp.ops._library import LIBRARY, address, current_stream
from fasthyp.reference import skinning as reference

DTYPES = (torch.float32, torch.float64)
ROTATIONS = reference.ROTATIONS
COLUMNS = 3 * reference.TILE


@dataclass(frozen=True, eq=False)
class Points:
    """Points that follow the bones of a kinematic tree, folded for the kernels; see
    ``csrc/skinning/skinning.h``. The index arrays are int32, the others of one dtype."""

    parents: Tensor  # (J)
    rest: Tensor  # (J, 3)
    rest_shapes: Tensor  # (J, 3, shapes)
    row_starts: Tensor  # (tiles + 1)
    rows: Tensor  # (rows), features
    columns: Tensor  # (rows, 24)
    base: Tensor  # (tiles, 24)
    starts: Tensor  # (points + 1)
    bones: Tensor  # (entries)
    weights: Tensor  # (entries, 2)
    targets: Tensor | None  # (points)
    lift: Tensor | None  # (outputs)
    pose_blend: bool  # whether the rotations are features

    @property
    def outputs(self) -> int:
        if self.lift is not None:
            return self.lift.numel()
        return self.starts.numel() - 1

    @cached_property
    def checked(self) -> bool:
        """True; TypeError or ValueError for arrays that no kernel may see."""
        rest, joints, shapes = self.rest, self.rest.shape[0], self.rest_shapes.shape[-1]
        if rest.dtype not in DTYPES:
            raise TypeError(f"rest: expected float32 or float64, got {rest.dtype}")
        number, rows, entries = self.starts.numel() - 1, self.rows.numel(), self.bones.numel()
        tiles = -(-number // reference.TILE)
        expected: dict[str, tuple[int, ...]] = {
            "parents": (joints,),
            "rest": (joints, 3),
            "rest_shapes": (joints, 3, shapes),
            "row_starts": (tiles + 1,),
            "rows": (rows,),
            "columns": (rows, COLUMNS),
            "base": (tiles, COLUMNS),
            "starts": (number + 1,),
            "bones": (entries,),
            "weights": (entries, 2),
            "targets": (number,),
            "lift": (self.outputs,),
        }
        integers = ("parents", "row_starts", "rows", "starts", "bones", "targets")
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
            dtype = torch.int32 if name in integers else rest.dtype
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
            if tensor.device != rest.device:
                raise ValueError(f"{name}: expected on {rest.device}, got it on {tensor.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor")
        return True

    @property
    def arrays(self) -> tuple[Tensor | None, ...]:
        """The arrays in the order of the op's arguments."""
        return tuple(getattr(self, name) for name in ARRAYS)

    def __call__(
        self,
        betas: Tensor,
        pose: Tensor,
        transl: Tensor | None,
        rotation: str,
        want_outputs: bool = True,
        camera: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (B, outputs, 3), empty unless wanted, joints (B, J, 3), and the projections
        (B, outputs, 2) by cameras (B, 3) or (B, 7), empty without any."""
        inputs = (betas, pose, transl, camera)
        for name, tensor in zip(INPUTS, inputs, strict=True):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        arguments = (
            *(betas, pose, transl, *self.arrays, self.pose_blend),
            *(rotation, self.outputs, want_outputs, camera),
        )
        if why_reference(self.rest):
            shapes, joints = self.rest_shapes.shape[-1], self.rest.shape[0]
            check_bodies(*inputs, shapes, joints, self.rest)
            return reference.skin(*arguments)  # type: ignore[arg-type]
        if is_plain(inputs):  # what dispatch would do next
            count = check(*inputs, self, rotation)
            return _forward(inputs, self, rotation, count, want_outputs)
        return skinning(*arguments)


INPUTS = ("betas", "pose", "transl", "camera")
ARRAYS = tuple(Points.__dataclass_fields__)[:-1]


def is_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether nothing watches these tensors: no gradient, transform, mode, tracer or subclass.

    The kernels may then be called without PyTorch's dispatcher, which for one body takes as long as
    they do.
    """
    if torch.compiler.is_compiling():
        return False
    watched = (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    )
    if watched:
        return False
    grad = torch.is_grad_enabled()
    return all(
        t is None
        or ((type(t) is Tensor or type(t) is Parameter) and not (grad and t.requires_grad))
        for t in tensors
    )


def why_reference(like: Tensor) -> str | None:
    """Why the kernels do not run on such a tensor, if they do not."""
    if _environment.backend() == "reference":
        return "FASTHYP_BACKEND=reference"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    kind = like.device.type
    if kind == "cuda" and _C.cuda_archs is not None:
        return None
    if kind != "cpu":
        return f"on {like.device}, and the skinning kernels run on CPUs and, if built, on CUDA"
    return None


def check_bodies(
    betas: Tensor,
    pose: Tensor,
    transl: Tensor | None,
    camera: Tensor | None,
    shapes: int,
    joints: int,
    like: Tensor,
) -> int:
    """The number of bodies; TypeError or ValueError naming the argument that is wrong.

    ``pose`` is (B, joints, C); ``like`` has the dtype and device of the model.
    """
    count, dtype, device = 1, like.dtype, like.device
    inputs = (betas, pose, transl, camera)
    for name, tensor in zip(INPUTS, inputs, strict=True):
        if tensor is None and name in ("transl", "camera"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as the model, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device}, got it on {tensor.device}")
    if betas.ndim != 2 or betas.shape[1] != shapes:
        raise ValueError(f"betas: expected shape (B, {shapes}), got {tuple(betas.shape)}")
    if pose.ndim != 3 or pose.shape[1] != joints:
        raise ValueError(f"pose: expected {joints} rotations, got shape {tuple(pose.shape)}")
    if transl is not None and (transl.ndim != 2 or transl.shape[1] != 3):
        raise ValueError(f"transl: expected shape (B, 3), got {tuple(transl.shape)}")
    cameras = (reference.WEAK, reference.PERSPECTIVE)
    if camera is not None and (camera.ndim != 2 or camera.shape[1] not in cameras):
        raise ValueError(
            f"camera: expected shape (B, {cameras[0]}) or (B, {cameras[1]}), "
            f"got {tuple(camera.shape)}"
        )
    for tensor in inputs:
        size = 1 if tensor is None else tensor.shape[0]
        if size == 1:
            continue
        if count not in (1, size):
            given = [(n, t.shape[0]) for n, t in zip(INPUTS, inputs, strict=True) if t is not None]
            listed = ", ".join(f"{number} {name}" for name, number in given)
            names = ", ".join(name for name, _ in given)
            raise ValueError(f"{names}: expected as many of each or one, got {listed}")
        count = size
    return count


def check(
    betas: Tensor,
    pose: Tensor,
    transl: Tensor | None,
    camera: Tensor | None,
    points: Points,
    rotation: str,
) -> int:
    """The number of bodies; TypeError or ValueError for what no kernel may see."""
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation: expected one of {', '.join(ROTATIONS)}, got {rotation!r}")
    points.checked  # noqa: B018  raises, once
    rest, shapes = points.rest, points.rest_shapes.shape[-1]
    count = check_bodies(betas, pose, transl, camera, shapes, rest.shape[0], rest)
    if pose.shape[-1] != reference.NUMBERS[rotation]:
        raise ValueError(
            f"pose: expected {reference.NUMBERS[rotation]} numbers a joint for {rotation}, "
            f"got shape {tuple(pose.shape)}"
        )
    if camera is not None and points.targets is None:
        raise ValueError("camera: expected points that are summed up into joints, got a mesh")
    return count


def _taken(
    arguments: tuple[Any, ...],
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], Points, str, int]:
    """The inputs, points, rotation and number of bodies of an op's arguments, checked.

    They are betas to outputs, and the camera.
    """
    betas, pose, transl, *arrays, rotation, outputs, camera = arguments
    points = Points(*arrays)
    count = check(betas, pose, transl, camera, points, rotation)
    if outputs != points.outputs:
        raise ValueError(f"outputs: expected {points.outputs}, got {outputs}")
    return (betas, pose, transl, camera), points, rotation, count


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *model, want_outputs, camera = arguments
    return _forward(*_taken((*model, camera)), want_outputs)


def _forward(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    points: Points,
    rotation: str,
    count: int,
    want_outputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    results = _allocate(inputs, points, count, want_outputs)
    out, joints, projected = results
    wanted = (
        out if want_outputs else None,
        joints,
        projected if want_outputs and inputs[3] is not None else None,
    )
    _call(inputs, points, rotation, count, wanted)
    return results


def _call(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    points: Points,
    rotation: str,
    count: int,
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
    grads: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> None:
    betas, camera = inputs[0], inputs[3]
    given = [t if t is None else t.contiguous() for t in inputs]
    sizes = (
        *(betas.dtype == torch.float64, points.rest_shapes.shape[-1], points.rest.shape[0]),
        *(points.pose_blend, points.starts.numel() - 1, points.outputs),
    )
    arrays = [address(tensor) for tensor in points.arrays]
    on_cpu, workspace = betas.device.type == "cpu", None
    if not on_cpu:
        projected = results[2] is not None
        size = _C.skinning_cuda_workspace(sizes, arrays, count, grads is not None, projected)
        workspace = betas.new_empty(size, dtype=torch.uint8)
    _C.skinning_run(
        sizes,
        arrays,
        count,
        [address(tensor) for tensor in given],
        [0 if t is None or t.shape[0] == 1 else t[0].numel() if t.numel() else 0 for t in given],
        ROTATIONS.index(rotation),
        0 if camera is None or results[2] is None else camera.shape[1],
        [address(tensor) for tensor in results],
        grads is not None,
        address(out),
        [address(tensor) for tensor in grads or (None,) * 4],
        address(workspace),
        *((-1, _environment.num_threads()) if on_cpu else _place(betas)),
    )


def _place(tensor: Tensor) -> tuple[int, int]:
    index = tensor.device.index
    return index, current_stream(index)


def _allocate(
    inputs: tuple[Tensor | None, ...], points: Points, count: int, want_outputs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    like, outputs = inputs[0], points.outputs
    assert like is not None
    flat = want_outputs and inputs[3] is not None
    return (
        like.new_empty((count, outputs, 3) if want_outputs else (0,)),
        like.new_empty(count, points.rest.shape[0], 3),
        like.new_empty((count, outputs, 2) if flat else (0,)),
    )


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *model, want_outputs, camera = arguments
    inputs, points, _, count = _taken((*model, camera))
    return _allocate(inputs, points, count, want_outputs)


def _run_backward(
    out_grad: Tensor | None, joints_grad: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *model, projected_grad, camera, out = arguments
    inputs, points, rotation, count = _taken((*model, camera))
    dtype, outputs, joints = inputs[0].dtype, points.outputs, points.rest.shape[0]
    if (projected_grad is None) != (out is None) or (out is not None and camera is None):
        raise ValueError("projected_grad: expected with camera and out, or without both")
    for name, value, shape in (
        ("out_grad", out_grad, (count, outputs, 3)),
        ("joints_grad", joints_grad, (count, joints, 3)),
        ("projected_grad", projected_grad, (count, outputs, 2)),
        ("out", out, (count, outputs, 3)),
    ):
        if value is not None and (tuple(value.shape) != shape or value.dtype != dtype):
            raise ValueError(f"{name}: expected {dtype} {shape}, got {tuple(value.shape)}")
    grads = _allocate_grads(inputs, count, projected_grad is not None)
    by_out, by_joints, by_projected, found = (
        None if t is None else t.contiguous() for t in (out_grad, joints_grad, projected_grad, out)
    )
    _call(inputs, points, rotation, count, (by_out, by_joints, by_projected), grads, found)
    return grads


def _fake_backward(
    out_grad: Tensor | None, joints_grad: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *model, projected_grad, camera, _ = arguments
    inputs, _, _, count = _taken((*model, camera))
    return _allocate_grads(inputs, count, projected_grad is not None)


def _allocate_grads(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], count: int, projected: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    betas, pose, _, camera = inputs
    return (
        betas.new_empty(count, betas.shape[1]),
        pose.new_empty(count, *pose.shape[1:]),
        pose.new_empty(count, 3),
        pose.new_empty((count, camera.shape[1]) if projected and camera is not None else (0,)),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    *tensors, ctx.pose_blend, ctx.rotation, ctx.outputs, ctx.want_outputs, camera = inputs
    ctx.projects = ctx.want_outputs and camera is not None
    ctx.save_for_backward(camera, output[0] if ctx.projects else None, *tensors)
    ctx.mark_non_differentiable(
        *([] if ctx.want_outputs else output[:1]), *([] if ctx.projects else output[2:])
    )
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, out_grad: Tensor | None, joints_grad: Tensor | None, projected_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    camera, out, *tensors = ctx.saved_tensors
    if not ctx.want_outputs:
        out_grad = None
    if not ctx.projects:
        projected_grad = None
    results_grads = (out_grad, joints_grad, projected_grad)
    rest = (None,) * 16
    if all(grad is None for grad in results_grads):
        return (None,) * 20
    if any(ctx.needs_input_grad[3:15]):
        raise RuntimeError("fasthyp::skinning has no gradient for the arrays of a model")
    given = (*tensors[:3], camera)
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, -1)]
    if torch.is_grad_enabled():  # of second order: the reference, which has derivatives itself
        settings = ctx.pose_blend, ctx.rotation, ctx.outputs, ctx.want_outputs
        results = reference.skin(*tensors, *settings, camera)  # type: ignore[call-arg]
        pairs = zip(results, results_grads, strict=True)
        values, cotangents = zip(*((r, g) for r, g in pairs if g is not None), strict=True)
        wanted = [tensor for tensor, need in zip(given, needed, strict=True) if need]
        second = iter(
            torch.autograd.grad(values, wanted, cotangents, create_graph=True, allow_unused=True)
        )
        *by_inputs, by_camera = (next(second) if need else None for need in needed)
        return *by_inputs, *rest, by_camera
    through = (None, None, None) if projected_grad is None else (projected_grad, camera, out)
    options = ctx.pose_blend, ctx.rotation, ctx.outputs
    found = skinning_backward(out_grad, joints_grad, *tensors, *options, *through)
    needed[3] = needed[3] and projected_grad is not None
    *by_inputs, by_camera = (
        None if not need else grad.sum(0, keepdim=True) if tensor.shape[0] < len(grad) else grad
        for tensor, grad, need in zip(given, found, needed, strict=True)
    )
    return *by_inputs, *rest, by_camera


_MODEL = (
    "Tensor betas, Tensor pose, Tensor? transl, Tensor parents, Tensor rest, Tensor rest_shapes, "
    "Tensor row_starts, Tensor rows, Tensor columns, Tensor base, Tensor starts, Tensor bones, "
    "Tensor weights, Tensor? targets, "
    "Tensor? lift, bool pose_blend, str rotation, int outputs"
)
LIBRARY.define(f"skinning({_MODEL}, bool want_outputs, Tensor? camera) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"skinning_backward(Tensor? out_grad, Tensor? joints_grad, {_MODEL}, "
    "Tensor? projected_grad, Tensor? camera, Tensor? out) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("skinning", _run, "CPU")
LIBRARY.impl("skinning_backward", _run_backward, "CPU")
if _C.cuda_archs is not None:
    LIBRARY.impl("skinning", _run, "CUDA")
    LIBRARY.impl("skinning_backward", _run_backward, "CUDA")
torch.library.register_fake("fasthyp::skinning", _fake, lib=LIBRARY)
torch.library.register_fake("fasthyp::skinning_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "fasthyp::skinning", _backward, setup_context=_setup_context, lib=LIBRARY
)
skinning = torch.ops.fasthyp.skinning.default
skinning_backward = torch.ops.fasthyp.skinning_backward.default
