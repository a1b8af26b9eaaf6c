"""The CUDA side of :mod:`fasthyp.ops.coupling_training`.

The kernels (``csrc/coupling/cuda_training.h``) read the folded weights as they are. What they need
between launches is one workspace from PyTorch's allocator; more rows than it has room for go in
several rounds, so that it does not grow with their number, and it never grows with that of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthyp import _C
from fasthyp.ops._coupling_checks import check_gradient, check_pass
from fasthyp.ops._library import address, contiguous, current_stream

Outputs = tuple[Tensor, Tensor, Tensor]

PRECISIONS = {"highest": 0, "high": 1, "medium": 1}
"""Products of float32 numbers as three of tf32 halves, or of tf32 numbers."""
_SCRATCH_BYTES = 128 << 20
"""Memory for the rows of a round, about; sums of weight gradients take some more."""


def coupling_saved_width(plan: list[int], keep_every: int, store: bool) -> int:
    """Numbers per row that a pass keeps for its gradient."""
    return _C.coupling_cuda_saved_width(plan, keep_every, store)


def run(
    x: Tensor,
    cond: Tensor | None,
    weights: list[Tensor],
    packed: Tensor | None,
    plan: list[int],
    inverse: bool,
    keep_every: int,
    store: bool,
    precision: str,
) -> Outputs:
    check_pass(x, cond, weights, plan, keep_every, precision)
    out, log_det = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[:2]),
    )
    saved = x.new_empty((*x.shape[:2], coupling_saved_width(plan, keep_every, store)))
    x = x.contiguous()
    call = _Call(x, cond, weights, plan, inverse, keep_every, store, precision, gradient=False)
    _C.coupling_cuda_pass(
        *call.arguments,
        *(x.data_ptr(), out.data_ptr(), log_det.data_ptr(), saved.data_ptr()),
        *call.place,
    )
    return out, log_det, saved


def backward(
    out: Tensor,
    saved: Tensor,
    cond: Tensor | None,
    grad_out: Tensor,
    grad_log_det: Tensor | None,
    weights: list[Tensor],
    packed: Tensor | None,
    plan: list[int],
    inverse: bool,
    keep_every: int,
    store: bool,
    precision: str,
    wanted: list[bool],
) -> Outputs:
    check_pass(out, cond, weights, plan, keep_every, precision, "out")
    width = coupling_saved_width(plan, keep_every, store)
    check_gradient(out, saved, grad_out, grad_log_det, width, weights, wanted)
    numbers = sum(w.numel() for w, want in zip(weights, wanted[1:], strict=True) if want)
    grad_cond = out.new_empty(cond.shape if cond is not None and wanted[0] else (0,))
    grad_x, grad_weights = out.new_empty(out.shape), out.new_empty(numbers)
    out, saved, grad_out = out.contiguous(), saved.contiguous(), grad_out.contiguous()
    grad_log_det = contiguous(grad_log_det)
    call = _Call(out, cond, weights, plan, inverse, keep_every, store, precision, gradient=True)
    _C.coupling_cuda_pass_gradient(
        *call.arguments,
        *(out.data_ptr(), saved.data_ptr(), grad_out.data_ptr(), address(grad_log_det)),
        *(grad_x.data_ptr(), grad_cond.data_ptr() if wanted[0] else 0, grad_weights.data_ptr()),
        wanted[1:],
        *call.place,
    )
    return grad_x, grad_cond, grad_weights


class _Call:
    """The arguments that a pass and its gradient share; keeps their tensors alive."""

    def __init__(
        self,
        x: Tensor,
        cond: Tensor | None,
        weights: Sequence[Tensor],
        plan: list[int],
        inverse: bool,
        keep_every: int,
        store: bool,
        precision: str,
        gradient: bool,
    ) -> None:
        images, per_image, _ = x.shape
        scratch = _SCRATCH_BYTES
        size = _C.coupling_cuda_pass_workspace(
            plan, images, per_image, keep_every, store, gradient, scratch
        )
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        cond, weights = contiguous(cond), [weight.contiguous() for weight in weights]
        self.tensors = [workspace, cond, *weights]
        self.arguments = (
            *(plan, [(weight.data_ptr(), weight.numel()) for weight in weights], inverse),
            *(images, per_image, address(cond), keep_every, store, PRECISIONS[precision]),
            *(workspace.data_ptr(), size, scratch),
        )
        device = x.device.index
        self.place = device, current_stream(device)
