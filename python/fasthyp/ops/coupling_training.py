"""Whole coupling flows as one differentiable op per direction.

Forward, the op is the fused flow of :mod:`fasthyp.ops.coupling`. Backward, it walks the steps from
the output: hidden layers are computed again tile by tile, and gradients of input, condition and
weights come out of the same sweep. What a pass keeps for that: the state, D numbers per row, before
every ``keep_every``-th step (states between them are reconstructed by the steps' own inverses; 0:
none is kept), and with ``store`` the hidden layers as well, which are then not computed again.

Reconstruction alone would do, but float32 cannot afford it: a step that scales by exp(-s) is undone
with errors exp(s) times as large, and eight blocks of clamp 5 lose all digits (the last table of
``benchmarks/bench_coupling_training.py``). A state per block costs a small part of what one block's
hidden layers would.

The gradient of a pass flows to the *folded* weights (:func:`~fasthyp.ops._coupling_steps.fold`),
and through the folding, which is plain PyTorch, to the parameters of the modules. Log-determinants
of linear steps do not depend on the rows and are added outside the op.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasthyp import _C
from fasthyp._environment import num_threads
from fasthyp.ops import _coupling_training_cuda as cuda
from fasthyp.ops._coupling_checks import check_gradient, check_packed, check_pass
from fasthyp.ops._coupling_plan import describe, parse, step_tensors
from fasthyp.ops._coupling_steps import APART, FoldedLinear, FoldedStep, fold, run_folded
from fasthyp.ops._library import LIBRARY, address, contiguous
from fasthyp.reference.coupling import Layer

CHECKPOINTS = ("reversible", "store")
KEEP_EVERY = 2
"""Couplings per kept state: the two halves of a block, of which the second changes nothing that the
first one's gradient needs."""

Outputs = tuple[Tensor, Tensor, Tensor]


class TrainableFlow:
    """A flow whose passes have gradients by inputs, condition and the tensors of its layers.

    A call folds the layers anew, as part of the autograd graph; what does not need gradients, the
    plan and the packed weights, is made once: an object serves until a weight changes, and then
    :meth:`renewed` gives the next one.

    Args:
        layers, output_index, dim, cond_dim, dtype, device: as of
            :class:`~fasthyp.ops.coupling.PackedFlow`.
        precision: ``"highest"``; on CUDA also ``"high"``, which ``"medium"`` stands for too.
        checkpoint: ``"reversible"`` keeps a state every ``KEEP_EVERY`` steps (every step in flows
            with linear ones, whose stored inverses need not be exact), ``"store"`` the hidden
            layers too.

    Raises:
        UnsupportedOnCuda: the CUDA kernels do not run such a flow.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        output_index: Sequence[int],
        dim: int,
        cond_dim: int,
        precision: str = "highest",
        checkpoint: str = "reversible",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers, self.dtype = layers, dtype
        self.shape = dim, cond_dim
        self.precision = "highest" if precision == "highest" else "high"
        self.store = checkpoint == "store"
        on_cpu = torch.device(device).type == "cpu"
        element = int(dtype == torch.float64)
        with torch.no_grad():
            self.apart = APART if on_cpu else None
            steps = self._fold()
            lanes = _C.coupling_lanes(element) if on_cpu else 1
            self.plan, _ = describe(
                *(steps, output_index, dim, cond_dim, element, lanes), log_det=False
            )
            self.packed = pack(self._weights(steps), self.plan) if on_cpu else None
        linear = any(isinstance(step, FoldedLinear) for step in steps)
        self.keep_every = 1 if linear else KEEP_EVERY
        if not on_cpu:
            cuda.coupling_saved_width(self.plan, self.keep_every, self.store)

    def over(self, layers: Sequence[Layer]) -> TrainableFlow:
        """The same flow over layers of other tensors, whose weights every call packs."""
        flow = copy.copy(self)
        flow.layers, flow.packed = layers, None
        return flow

    def renewed(self) -> TrainableFlow:
        """The same flow for the present values of its weights.

        The packed weights move into it, and are written over where no backward pass and no other
        thread needs them any more: setting up fresh memory takes longer than packing does.
        """
        flow = copy.copy(self)
        packed, self.packed = self.packed, None
        if packed is not None:
            del flow.packed
            if packed._use_count() > 1 or sys.getrefcount(packed) > 2:  # type: ignore[attr-defined]
                packed = None
            with torch.no_grad():
                flow.packed = pack(self._weights(self._fold()), self.plan, packed)
        return flow

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, M, D), cond (B, C) -> z (B, M, D), log|det dz/dx| (B, M)."""
        return self._run(x, cond, inverse=False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, M, D), cond (B, C) -> x (B, M, D), log|det dx/dz| (B, M)."""
        return self._run(z, cond, inverse=True)

    def _run(self, x: Tensor, cond: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        steps = self._fold()
        out, log_det, _ = coupling_pass(
            *(x, cond, self._weights(steps), self.packed, self.plan, inverse),
            *(self.keep_every, self.store, self.precision),
        )
        for step in steps:
            if isinstance(step, FoldedLinear):
                constant = step.log_det.to(self.dtype)
                log_det = log_det - constant if inverse else log_det + constant
        return out, log_det

    def _fold(self) -> list[FoldedStep]:
        return fold(self.layers, *self.shape, self.dtype, self.apart)

    def _weights(self, steps: Sequence[FoldedStep]) -> list[Tensor]:
        return [weight.to(self.dtype) for weight in step_tensors(steps)]


def _run_cpu(
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
    out, log_det, saved = _allocate(x, plan, keep_every, store)
    packed = _packed(packed, weights, plan)
    x, cond = x.contiguous(), contiguous(cond)
    _C.coupling_pass(
        *(plan, packed.data_ptr(), packed.numel(), inverse, x.shape[0], x.shape[1]),
        *(x.data_ptr(), address(cond), out.data_ptr(), log_det.data_ptr(), saved.data_ptr()),
        *(keep_every, store, num_threads()),
    )
    return out, log_det, saved


def _backward_cpu(
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
    width = _C.coupling_saved_width(plan, keep_every, store)
    check_gradient(out, saved, grad_out, grad_log_det, width, weights, wanted)
    grads = grad_x, grad_cond, grad_weights = _allocate_grads(out, cond, weights, wanted)
    packed = _packed(packed, weights, plan)
    out, saved, grad_out = out.contiguous(), saved.contiguous(), grad_out.contiguous()
    cond, grad_log_det = contiguous(cond), contiguous(grad_log_det)
    _C.coupling_backward(
        *(plan, packed.data_ptr(), packed.numel(), inverse, out.shape[0], out.shape[1]),
        *(out.data_ptr(), saved.data_ptr(), keep_every, store, address(cond)),
        *(grad_out.data_ptr(), address(grad_log_det), grad_x.data_ptr()),
        *(grad_cond.data_ptr() if wanted[0] else 0, grad_weights.data_ptr(), wanted[1:]),
        num_threads(),
    )
    return grads


def pack(weights: Sequence[Tensor], plan: Sequence[int], packed: Tensor | None = None) -> Tensor:
    """The weights in the form that the CPU kernels read, in the given memory if there is some."""
    tensors = [weight.detach().contiguous() for weight in weights]
    if packed is None:
        packed = torch.empty(_C.coupling_packed_bytes(plan), dtype=torch.uint8)
    numbers = torch.tensor(plan, dtype=torch.int64)
    _C.coupling_pack(
        *(numbers.data_ptr(), len(numbers)),
        [(tensor.data_ptr(), tensor.numel()) for tensor in tensors],
        *(packed.data_ptr(), packed.numel(), num_threads()),
    )
    return packed


def _packed(packed: Tensor | None, weights: list[Tensor], plan: list[int]) -> Tensor:
    if packed is None:
        return pack(weights, plan)
    check_packed(packed)
    return packed


def _allocate(x: Tensor, plan: list[int], keep_every: int, store: bool) -> Outputs:
    size = cuda if x.device.type == "cuda" else _C
    width = size.coupling_saved_width(plan, keep_every, store)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:2]),
        x.new_empty((*x.shape[:2], width)),
    )


def _allocate_grads(
    out: Tensor, cond: Tensor | None, weights: list[Tensor], wanted: list[bool]
) -> Outputs:
    numbers = sum(w.numel() for w, want in zip(weights, wanted[1:], strict=True) if want)
    cond_shape = cond.shape if cond is not None and wanted[0] else (0,)
    return out.new_empty(out.shape), out.new_empty(cond_shape), out.new_empty(numbers)


def _run_fake(
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
    return _allocate(x, plan, keep_every, store)


def _backward_fake(
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
    return _allocate_grads(out, cond, weights, wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, cond, weights, packed, *ctx.settings = inputs
    out, _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    # x only serves second derivatives; it lives on in the caller's graph anyway.
    ctx.save_for_backward(x, cond, out, saved, packed, *weights)


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_log_det: Tensor | None, _: Any
) -> tuple[Any, ...]:
    x, cond, out, saved, packed, *weights = ctx.saved_tensors
    plan, inverse, keep_every, store, precision = ctx.settings
    needs_x, needs_cond, needs_weights = ctx.needs_input_grad[:3]
    if not isinstance(needs_weights, list | tuple):
        needs_weights = [needs_weights] * len(weights)
    rest = (None,) * 6
    if grad_out is None and grad_log_det is None:
        return None, None, [None] * len(weights), *rest
    if torch.is_grad_enabled():
        grads = _second_order(
            *(x, cond, weights, plan, inverse, grad_out, grad_log_det),
            (needs_x, needs_cond, *needs_weights),
        )
        return grads[0], grads[1], grads[2:], *rest
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wanted = [bool(needs_cond), *map(bool, needs_weights)]
    grad_x, grad_cond, flat = coupling_pass_backward(
        *(out, saved, cond, grad_out, grad_log_det, weights, packed),
        *(plan, inverse, keep_every, store, precision, wanted),
    )
    sizes = [w.numel() for w, need in zip(weights, needs_weights, strict=True) if need]
    parts = iter(flat.split(sizes) if sizes else ())
    grads = [
        next(parts).view(weight.shape) if need else None
        for weight, need in zip(weights, needs_weights, strict=True)
    ]
    return grad_x if needs_x else None, grad_cond if needs_cond else None, grads, *rest


def _second_order(
    x: Tensor,
    cond: Tensor | None,
    weights: list[Tensor],
    plan: list[int],
    inverse: bool,
    grad_out: Tensor | None,
    grad_log_det: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients that have gradients themselves: of the pass in plain PyTorch."""
    steps, output_index = parse(plan, weights)
    results = run_folded(steps, output_index, x, cond, inverse)
    pairs = [
        (result, grad)
        for result, grad in zip(results, (grad_out, grad_log_det), strict=True)
        if grad is not None and result.requires_grad
    ]
    wanted = [
        tensor
        for tensor, need in zip((x, cond, *weights), needs, strict=True)
        if need and tensor is not None
    ]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needs]


LIBRARY.define(
    "coupling_pass(Tensor x, Tensor? cond, Tensor[] weights, Tensor? packed, int[] plan, "
    "bool inverse, int keep_every, bool store, str precision) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "coupling_pass_backward(Tensor out, Tensor saved, Tensor? cond, Tensor grad_out, "
    "Tensor? grad_log_det, Tensor[] weights, Tensor? packed, int[] plan, bool inverse, "
    "int keep_every, bool store, str precision, bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("coupling_pass", _run_cpu, "CPU")
LIBRARY.impl("coupling_pass_backward", _backward_cpu, "CPU")
if _C.cuda_archs is not None:
    LIBRARY.impl("coupling_pass", cuda.run, "CUDA")
    LIBRARY.impl("coupling_pass_backward", cuda.backward, "CUDA")
torch.library.register_fake("fasthyp::coupling_pass", _run_fake, lib=LIBRARY)
torch.library.register_fake("fasthyp::coupling_pass_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "fasthyp::coupling_pass", _backward, setup_context=_setup_context, lib=LIBRARY
)
coupling_pass = torch.ops.fasthyp.coupling_pass.default
coupling_pass_backward = torch.ops.fasthyp.coupling_pass_backward.default
