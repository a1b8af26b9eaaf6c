"""The coupling kernels as PyTorch ops: whole flows, sampling, and the arithmetic of one coupling.

A flow is packed once (:class:`PackedFlow`) and then runs as a single op: the weights lie in one
buffer, in the order in which the kernels read them, and the structure is a small integer tensor,
the plan (its layout: ``csrc/coupling/coupling.h``).

Precision: ``"highest"`` computes in the tensors' own dtype (on CUDA: float32 products as three of
tf32 halves); ``"high"`` is the same on a CPU, tf32 products on CUDA; ``"medium"`` multiplies
bfloat16 numbers and sums in float32, on CUDA and on processors that can (AVX512-BF16), and is
``"highest"`` on others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthyp import _C
from fasthyp._environment import num_threads
from fasthyp.ops import _coupling_cuda
from fasthyp.ops._coupling_checks import check_cond, check_packed, check_sample
from fasthyp.ops._coupling_plan import describe
from fasthyp.ops._coupling_steps import CLAMPS, FoldedStep, fold
from fasthyp.ops._library import address, contiguous, define, signed
from fasthyp.reference.coupling import Layer

PRECISIONS = ("highest", "high", "medium")

_ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def operand_dtype(precision: str, dtype: torch.dtype) -> torch.dtype:
    """What the matrix products of a CPU flow of this dtype are made in; ValueError if unknown."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    if precision == "medium" and dtype == torch.float32 and _C.coupling_lanes(2) > 0:
        return torch.bfloat16
    return dtype


class PackedFlow:
    """A flow's weights and structure in the form that the kernels of its device read.

    A snapshot: later changes of the weights do not reach it.

    Args:
        layers: couplings and linear layers in forward order; their subnets must be
            :class:`~fasthyp.reference.coupling.Net`, their clamps known.
        output_index: ``z[k] = state[output_index[k]]`` (D numbers).
        dim: D. cond_dim: C, 0 for none.
        precision: see the module's text.
        dtype: of inputs and outputs, float32 or float64; float32 on CUDA.
        device: where the flow runs.

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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dim, self.cond_dim, self.dtype, self.precision = dim, cond_dim, dtype, precision
        self.device = torch.device(device)
        operands = operand_dtype(precision, dtype)
        with torch.no_grad():
            steps = fold(layers, dim, cond_dim, dtype)
        if self.device.type == "cuda":
            if dtype != torch.float32:
                raise TypeError(f"dtype: expected torch.float32 on CUDA, got {dtype}")
            self.plan, self.packed = _coupling_cuda.pack(
                steps, output_index, dim, cond_dim, precision, self.device
            )
        else:
            self.plan, self.packed = _pack_cpu(steps, output_index, dim, cond_dim, operands, dtype)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, M, D), cond (B, C) -> z (B, M, D), log|det dz/dx| (B, M)."""
        return coupling_flow(x, cond, self.packed, self.plan, False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, M, D), cond (B, C) -> x (B, M, D), log|det dx/dz| (B, M)."""
        return coupling_flow(z, cond, self.packed, self.plan, True)

    def sample(
        self,
        cond: Tensor | None,
        num_samples: int,
        seed: int,
        batch: int | None = None,
        image_offset: int = 0,
        fixed: Tensor | None = None,
        include_mode: bool = False,
        counter: Tensor | None = None,
        first_sample: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draws the latent and inverts it: x (B, M, D), log-density (B, M).

        The noise of latent dims 4 j to 4 j + 3 of hypothesis m of image b is Philox 4x32-10 with
        key ``seed`` and counter ``(j, first_sample + m, image_offset + b, 0)``, made normal by
        Box-Muller.
        ``fixed`` (B, F) fills the last F latent dims; they are left out of the noise's density.
        ``include_mode`` sets the noise of hypothesis 0 to zero. ``counter``, int64 (3,) on the
        flow's device, is added to seed, image offset and first sample: a captured CUDA graph reads
        it anew.
        """
        if batch is None:
            batch = 1 if cond is None else cond.shape[0]
        return coupling_sample(
            *(cond, fixed, self.packed, self.plan, batch, num_samples),
            *(signed(seed), image_offset, first_sample, include_mode, counter),
        )


def _pack_cpu(
    steps: Sequence[FoldedStep],
    output_index: Sequence[int],
    dim: int,
    cond_dim: int,
    operands: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The plan (int64) and the packed weights (uint8)."""
    element = _ELEMENTS[operands]
    lanes = _C.coupling_lanes(element)
    numbers, tensors = describe(steps, output_index, dim, cond_dim, element, lanes)
    tensors = [tensor.to("cpu", dtype).contiguous() for tensor in tensors]
    plan = torch.tensor(numbers, dtype=torch.int64)
    packed = torch.empty(_C.coupling_packed_bytes(numbers), dtype=torch.uint8)
    _C.coupling_pack(
        *(plan.data_ptr(), len(plan)),
        [(tensor.data_ptr(), tensor.numel()) for tensor in tensors],
        *(packed.data_ptr(), packed.numel(), num_threads()),
    )
    return plan, packed


def affine_coupling(
    state: Tensor,
    raw: Tensor,
    active: Sequence[int],
    clamp: float,
    clamp_activation: str,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The arithmetic around a subnet: state (N, D), raw (N, 2 A) -> new state, log-Jacobian (N,).

    ``raw = [s | t]``; ``x_a exp(clamp f(s)) + t``, or its inverse, on the slots ``active``.
    """
    return coupling_affine(state, raw, list(active), clamp, CLAMPS[clamp_activation], inverse)


def philox_normal(
    batch: int,
    num_samples: int,
    dim: int,
    seed: int,
    image_offset: int = 0,
    include_mode: bool = False,
    first_sample: int = 0,
) -> Tensor:
    """The noise that :meth:`PackedFlow.sample` draws, (batch, num_samples, dim) float32, CPU."""
    out = torch.empty(batch, num_samples, dim)
    if out.numel():
        threads = num_threads() if out.numel() > 4096 else 1
        _C.philox_normal(
            *(out.data_ptr(), batch, num_samples, dim, seed % 2**64),
            *(image_offset, first_sample, threads),
        )
    if include_mode and first_sample == 0:
        out[:, :1] = 0
    return out


# --- ops ---


def _check(
    plan: Tensor, packed: Tensor, cond: Tensor | None, batch: int, dtype: torch.dtype
) -> None:
    """Everything the kernel takes on trust."""
    if plan.dtype != torch.int64 or plan.dim() != 1 or not plan.is_contiguous() or len(plan) < 5:
        raise ValueError("plan: expected a contiguous one-dimensional int64 tensor")
    check_packed(packed)
    expected = torch.float64 if int(plan[2]) == 1 else torch.float32
    if dtype != expected:
        raise TypeError(f"x: expected dtype {expected}, as the flow, got {dtype}")
    check_cond(cond, batch, int(plan[1]), expected)


def _run(
    *,
    plan: Tensor,
    packed: Tensor,
    inverse: bool,
    x: Tensor | None,
    cond: Tensor | None,
    out: Tensor,
    seed: int = 0,
    image_offset: int = 0,
    first_sample: int = 0,
    fixed: Tensor | None = None,
    include_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    log_det = out.new_empty(out.shape[:2])
    x, cond, fixed = contiguous(x), contiguous(cond), contiguous(fixed)
    _C.coupling_run(
        *(plan.data_ptr(), len(plan), packed.data_ptr(), packed.numel(), inverse),
        *(out.shape[0], out.shape[1], address(x), address(cond), out.data_ptr()),
        *(log_det.data_ptr(), num_threads(), seed % 2**64, image_offset, first_sample),
        *(address(fixed), 0 if fixed is None else fixed.shape[1], include_mode),
    )
    return out, log_det


def _flow_cpu(
    x: Tensor, cond: Tensor | None, packed: Tensor, plan: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    if x.dim() != 3 or x.shape[2] != int(plan[0]):
        raise ValueError(f"x: expected shape (B, M, {int(plan[0])}), got {tuple(x.shape)}")
    _check(plan, packed, cond, x.shape[0], x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    if cond is not None and x.shape[1] == 1 and x.shape[0] > 1 and cond.stride(0) == 0:
        # one condition expanded over all rows is one image
        x, cond = x.transpose(0, 1), cond[:1]
        flat, log_det = _run(
            plan=plan, packed=packed, inverse=inverse, x=x, cond=cond, out=out.transpose(0, 1)
        )
        return flat.transpose(0, 1), log_det.transpose(0, 1)
    return _run(plan=plan, packed=packed, inverse=inverse, x=x, cond=cond, out=out)


def _flow_fake(
    x: Tensor, cond: Tensor | None, packed: Tensor, plan: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2])


def _sample_cpu(
    cond: Tensor | None,
    fixed: Tensor | None,
    packed: Tensor,
    plan: Tensor,
    batch: int,
    num_samples: int,
    seed: int,
    image_offset: int,
    first_sample: int,
    include_mode: bool,
    counter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dim = int(plan[0])
    dtype = torch.float64 if int(plan[2]) == 1 else torch.float32
    _check(plan, packed, cond, batch, dtype)
    check_sample(batch, num_samples, first_sample, fixed, counter, dim, dtype)
    if counter is not None:
        more = counter.tolist()
        seed, image_offset, first_sample = (
            seed + more[0],
            image_offset + more[1],
            first_sample + more[2],
        )
    out = torch.empty(batch, num_samples, dim, dtype=dtype)
    return _run(
        plan=plan,
        packed=packed,
        inverse=True,
        x=None,
        cond=cond,
        out=out,
        seed=seed,
        image_offset=image_offset,
        first_sample=first_sample,
        fixed=fixed,
        include_mode=include_mode,
    )


def _sample_fake(
    cond: Tensor | None,
    fixed: Tensor | None,
    packed: Tensor,
    plan: Tensor,
    batch: int,
    num_samples: int,
    seed: int,
    image_offset: int,
    first_sample: int,
    include_mode: bool,
    counter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # The width stands in the plan's values, which tracing does not know.
    dim = torch.library.get_ctx().new_dynamic_size()
    dtype = torch.float32 if cond is None else cond.dtype
    return (
        packed.new_empty((batch, num_samples, dim), dtype=dtype),
        packed.new_empty((batch, num_samples), dtype=dtype),
    )


def _affine_cpu(
    state: Tensor,
    raw: Tensor,
    active: list[int],
    clamp: float,
    clamp_activation: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    if state.dtype not in (torch.float32, torch.float64) or raw.dtype != state.dtype:
        raise TypeError(
            f"state, raw: expected float32 or float64, both alike, got {state.dtype}, {raw.dtype}"
        )
    if state.dim() != 2 or raw.shape != (state.shape[0], 2 * len(active)):
        raise ValueError(
            f"state, raw: expected shapes (N, D), (N, {2 * len(active)}), "
            f"got {tuple(state.shape)}, {tuple(raw.shape)}"
        )
    out = state.clone(memory_format=torch.contiguous_format)
    log_det = state.new_empty(state.shape[:1])
    raw = raw.contiguous()
    _C.coupling_affine(
        *(out.data_ptr(), out.shape[0], out.shape[1], raw.data_ptr(), out.dtype == torch.float64),
        active,
        *(clamp, clamp_activation, inverse, log_det.data_ptr(), num_threads()),
    )
    return out, log_det


def _affine_fake(
    state: Tensor,
    raw: Tensor,
    active: list[int],
    clamp: float,
    clamp_activation: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return state.new_empty(state.shape), state.new_empty(state.shape[:1])


coupling_flow = define(
    "coupling_flow(Tensor x, Tensor? cond, Tensor packed, Tensor plan, bool inverse)"
    " -> (Tensor, Tensor)",
    cpu=_flow_cpu,
    cuda=_coupling_cuda.flow if _C.cuda_archs is not None else None,
    fake=_flow_fake,
)
coupling_sample = define(
    "coupling_sample(Tensor? cond, Tensor? fixed, Tensor packed, Tensor plan, int batch,"
    " int num_samples, int seed, int image_offset, int first_sample, bool include_mode,"
    " Tensor? counter) -> (Tensor, Tensor)",
    cpu=_sample_cpu,
    cuda=_coupling_cuda.sample if _C.cuda_archs is not None else None,
    fake=_sample_fake,
)
coupling_affine = define(
    "coupling_affine(Tensor state, Tensor raw, int[] active, float clamp, int clamp_activation,"
    " bool inverse) -> (Tensor, Tensor)",
    cpu=_affine_cpu,
    fake=_affine_fake,
)
