"""The op behind :mod:`fasthyp.body.skinning`: argument checks, dispatch, the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, outputs, 3), empty unless wanted, and joints (B, J, 3)."""
        for name, tensor in (("betas", betas), ("pose", pose), ("transl", transl)):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        arguments = (
            *(betas, pose, transl, *self.arrays, self.pose_blend),
            *(rotation, self.outputs, want_outputs),
        )
        if why_reference(self.rest):
            shapes, joints = self.rest_shapes.shape[-1], self.rest.shape[0]
            check_bodies(betas, pose, transl, shapes, joints, self.rest)
            return reference.skin(*arguments)  # type: ignore[arg-type]
        return skinning(*arguments)


ARRAYS = tuple(Points.__dataclass_fields__)[:-1]


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
    betas: Tensor, pose: Tensor, transl: Tensor | None, shapes: int, joints: int, like: Tensor
) -> int:
    """The number of bodies; TypeError or ValueError naming the argument that is wrong.

    ``pose`` is (B, joints, C); ``like`` has the dtype and device of the model.
    """
    given = {"betas": betas, "pose": pose}
    if transl is not None:
        given["transl"] = transl
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype} as the model, got {tensor.dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{name}: expected on {like.device}, got it on {tensor.device}")
    if betas.ndim != 2 or betas.shape[1] != shapes:
        raise ValueError(f"betas: expected shape (B, {shapes}), got {tuple(betas.shape)}")
    if pose.ndim != 3 or pose.shape[1] != joints:
        raise ValueError(f"pose: expected {joints} rotations, got shape {tuple(pose.shape)}")
    if transl is not None and (transl.ndim != 2 or transl.shape[1] != 3):
        raise ValueError(f"transl: expected shape (B, 3), got {tuple(transl.shape)}")
    count = 1
    for tensor in given.values():
        size = tensor.shape[0]
        if size == 1:
            continue
        if count not in (1, size):
            listed = ", ".join(f"{t.shape[0]} {name}" for name, t in given.items())
            raise ValueError(f"betas, pose, transl: expected as many of each or one, got {listed}")
        count = size
    return count


def check(
    betas: Tensor,
    pose: Tensor,
    transl: Tensor | None,
    points: Points,
    rotation: str,
    outputs: int,
) -> int:
    """The number of bodies; TypeError or ValueError for what no kernel may see."""
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation: expected one of {', '.join(ROTATIONS)}, got {rotation!r}")
    rest, joints, shapes = points.rest, points.rest.shape[0], points.rest_shapes.shape[-1]
    if rest.dtype not in DTYPES:
        raise TypeError(f"rest: expected float32 or float64, got {rest.dtype}")
    count = check_bodies(betas, pose, transl, shapes, joints, rest)
    if pose.shape[-1] != reference.NUMBERS[rotation]:
        raise ValueError(
            f"pose: expected {reference.NUMBERS[rotation]} numbers a joint for {rotation}, "
            f"got shape {tuple(pose.shape)}"
        )
    number = points.starts.numel() - 1
    tiles, entries = -(-number // reference.TILE), points.bones.numel()
    rows = points.rows.numel()
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
        "lift": (outputs,),
    }
    integers = ("parents", "row_starts", "rows", "starts", "bones", "targets")
    for name, shape in expected.items():
        tensor = getattr(points, name)
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
    if points.targets is None and outputs != number:
        raise ValueError(f"outputs: expected {number}, got {outputs}")
    return count


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    betas, pose, transl, *arrays, rotation, outputs, want_outputs = arguments
    points = Points(*arrays)
    count = check(betas, pose, transl, points, rotation, outputs)
    out, joints = results = _allocate(betas, points, count, outputs, want_outputs)
    _call(betas, pose, transl, points, rotation, outputs, (out if want_outputs else None, joints))
    return results


def _call(
    betas: Tensor,
    pose: Tensor,
    transl: Tensor | None,
    points: Points,
    rotation: str,
    outputs: int,
    results: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
    count: int | None = None,
) -> None:
    shapes, joints = points.rest_shapes.shape[-1], points.rest.shape[0]
    if count is None:
        assert results[1] is not None
        count = results[1].shape[0]
    given = [t if t is None else t.contiguous() for t in (betas, pose, transl)]
    sizes = (
        *(betas.dtype == torch.float64, shapes, joints, points.pose_blend),
        *(points.starts.numel() - 1, outputs),
    )
    arrays = [address(tensor) for tensor in points.arrays]
    on_cpu, workspace = betas.device.type == "cpu", None
    if not on_cpu:
        size = _C.skinning_cuda_workspace(sizes, arrays, count, grads is not None)
        workspace = betas.new_empty(size, dtype=torch.uint8)
    _C.skinning_run(
        sizes,
        arrays,
        count,
        [address(tensor) for tensor in given],
        [0 if t is None or t.shape[0] == 1 else t[0].numel() if t.numel() else 0 for t in given],
        ROTATIONS.index(rotation),
        [address(tensor) for tensor in results],
        grads is not None,
        [address(tensor) for tensor in grads or (None, None, None)],
        address(workspace),
        *((-1, _environment.num_threads()) if on_cpu else _place(betas)),
    )


def _place(tensor: Tensor) -> tuple[int, int]:
    index = tensor.device.index
    return index, current_stream(index)


def _allocate(
    like: Tensor, points: Points, count: int, outputs: int, want_outputs: bool
) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty((count, outputs, 3) if want_outputs else (0,)),
        like.new_empty(count, points.rest.shape[0], 3),
    )


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    betas, pose, transl, *arrays, rotation, outputs, want_outputs = arguments
    points = Points(*arrays)
    count = check(betas, pose, transl, points, rotation, outputs)
    return _allocate(betas, points, count, outputs, want_outputs)


def _run_backward(
    out_grad: Tensor | None, joints_grad: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    betas, pose, transl, *arrays, rotation, outputs = arguments
    points = Points(*arrays)
    count = check(betas, pose, transl, points, rotation, outputs)
    joints = points.rest.shape[0]
    for name, grad, shape in (
        ("out_grad", out_grad, (count, outputs, 3)),
        ("joints_grad", joints_grad, (count, joints, 3)),
    ):
        if grad is not None and (tuple(grad.shape) != shape or grad.dtype != betas.dtype):
            raise ValueError(f"{name}: expected {betas.dtype} {shape}, got {tuple(grad.shape)}")
    grads = _allocate_grads(betas, pose, count)
    kept = tuple(None if g is None else g.contiguous() for g in (out_grad, joints_grad))
    _call(betas, pose, transl, points, rotation, outputs, (kept[0], kept[1]), grads, count)
    return grads


def _fake_backward(
    out_grad: Tensor | None, joints_grad: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    betas, pose, transl, *arrays, rotation, outputs = arguments
    count = check(betas, pose, transl, Points(*arrays), rotation, outputs)
    return _allocate_grads(betas, pose, count)


def _allocate_grads(betas: Tensor, pose: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        betas.new_empty(count, betas.shape[1]),
        pose.new_empty(count, *pose.shape[1:]),
        pose.new_empty(count, 3),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.pose_blend, ctx.rotation, ctx.outputs, ctx.want_outputs = inputs
    ctx.save_for_backward(*tensors)
    if not ctx.want_outputs:
        ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, out_grad: Tensor | None, joints_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    given, needs = tensors[:3], ctx.needs_input_grad[:3]
    rest = (None,) * 16
    if not ctx.want_outputs:
        out_grad = None
    if out_grad is None and joints_grad is None:
        return None, None, None, *rest
    if any(ctx.needs_input_grad[3:15]):
        raise RuntimeError("fasthyp::skinning has no gradient for the arrays of a model")
    if torch.is_grad_enabled():  # of second order: the reference, which has derivatives itself
        settings = ctx.pose_blend, ctx.rotation, ctx.outputs, ctx.want_outputs
        results = reference.skin(*tensors, *settings)  # type: ignore[call-arg]
        pairs = zip(results, (out_grad, joints_grad), strict=True)
        values, cotangents = zip(*((r, g) for r, g in pairs if g is not None), strict=True)
        wanted = [tensor for tensor, need in zip(given, needs, strict=True) if need]
        second = iter(
            torch.autograd.grad(values, wanted, cotangents, create_graph=True, allow_unused=True)
        )
        return *(next(second) if need else None for need in needs), *rest
    settings = ctx.pose_blend, ctx.rotation, ctx.outputs, ctx.want_outputs
    found = skinning_backward(out_grad, joints_grad, *tensors, *settings[:3])
    return (
        *(
            None if not need else grad.sum(0, keepdim=True) if tensor.shape[0] < len(grad) else grad
            for tensor, grad, need in zip(given, found, needs, strict=True)
        ),
        *rest,
    )


_MODEL = (
    "Tensor betas, Tensor pose, Tensor? transl, Tensor parents, Tensor rest, Tensor rest_shapes, "
    "Tensor row_starts, Tensor rows, Tensor columns, Tensor base, Tensor starts, Tensor bones, "
    "Tensor weights, Tensor? targets, "
    "Tensor? lift, bool pose_blend, str rotation, int outputs"
)
LIBRARY.define(f"skinning({_MODEL}, bool want_outputs) -> (Tensor, Tensor)")
LIBRARY.define(
    f"skinning_backward(Tensor? out_grad, Tensor? joints_grad, {_MODEL}) "
    "-> (Tensor, Tensor, Tensor)"
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
