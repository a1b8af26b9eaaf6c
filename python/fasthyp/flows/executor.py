"""Runs a :class:`~fasthyp.flows.program.FlowProgram`: fused kernels where they apply, the reference
where they do not, and :meth:`FlowExecutor.explain` says which and why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from fasthyp import _C
from fasthyp._environment import backend
from fasthyp.flows.program import FlowProgram, stamp
from fasthyp.ops import coupling as ops
from fasthyp.ops import coupling_training as training
from fasthyp.ops._coupling_cuda import UnsupportedOnCuda
from fasthyp.reference import coupling as reference
from fasthyp.reference.coupling import CouplingLayer, Layer, LinearLayer, Net

_DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32,)}


class _Steps:
    """Counts the steps of optimizers that may change parameters without PyTorch counting it: those
    with ``fused=True``, and those of other packages."""

    count = 0

    @classmethod
    def after(cls, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        foreign = not type(optimizer).__module__.startswith("torch.optim.")
        if foreign or any(group.get("fused") for group in optimizer.param_groups):
            cls.count += 1


register_optimizer_step_post_hook(_Steps.after)


def _stamp(weights: list[Tensor]) -> Any:
    """Changes whenever the weights may have changed (None: cannot be known)."""
    found = stamp(weights)
    return None if found is None else (found, _Steps.count)


def check_precision(precision: str) -> str:
    """``precision`` itself; ValueError where it is none of ``highest``, ``high``, ``medium``."""
    if precision not in ops.PRECISIONS:
        raise ValueError(f"precision: expected one of {ops.PRECISIONS}, got {precision!r}")
    return precision


def check_checkpoint(checkpoint: str) -> str:
    """``checkpoint`` itself; ValueError where it is none of ``reversible`` and ``store``."""
    if checkpoint not in training.CHECKPOINTS:
        raise ValueError(f"checkpoint: expected one of {training.CHECKPOINTS}, got {checkpoint!r}")
    return checkpoint


@dataclass(frozen=True, eq=False)
class Plan:
    """A program simplified for the present values of its permutations."""

    program: FlowProgram
    indices: list[Tensor]
    index_stamp: Any
    layers: tuple[Layer, ...]
    output_index: tuple[int, ...]
    weights: list[Tensor]
    like: Tensor  # has the dtype and device of the flow


@dataclass(frozen=True, eq=False)
class _Packed:
    """A plan packed for the present values of its weights."""

    plan: Plan
    stamp: Any
    segments: tuple[ops.PackedFlow | Layer, ...]
    why: str | None = None  # the kernels do not run it

    @property
    def whole(self) -> ops.PackedFlow | None:
        """The packed flow where a single one covers everything."""
        only = self.segments[0] if len(self.segments) == 1 else None
        return only if isinstance(only, ops.PackedFlow) else None


@dataclass(frozen=True, eq=False)
class _Trainable:
    """A plan in the pieces that a call with gradients runs, packed for the present weights."""

    plan: Plan
    stamp: Any
    segments: tuple[training.TrainableFlow | Layer, ...]


class FlowExecutor:
    """A flow that runs, with the packed form of its weights as a cache.

    The cache is made anew when a parameter was changed in place (an optimizer step,
    ``load_state_dict``), replaced or moved. PyTorch does not count changes made through
    ``parameter.data``; after those call :meth:`clear`. The cache is never pickled or copied.
    Safe to use from several threads.

    Args:
        source: a program, or a function that makes it (called again when the module it
            describes has changed its structure).
        precision: ``"highest"``, ``"high"`` or ``"medium"``.
        checkpoint: ``"reversible"`` or ``"store"``, see :func:`fasthyp.accelerate`.
    """

    def __init__(
        self,
        source: FlowProgram | Callable[[], FlowProgram],
        precision: str = "highest",
        checkpoint: str = "reversible",
    ) -> None:
        self.source = source
        self.precision = check_precision(precision)
        self.checkpoint = check_checkpoint(checkpoint)
        self.clear()

    def clear(self) -> None:
        """Forget everything derived from the module."""
        self._plan: Plan | None = None
        self._packed: _Packed | None = None
        self._trainable: _Trainable | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "precision": self.precision,
            "checkpoint": self.checkpoint,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def program(self) -> FlowProgram:
        """The program of the module as it is now."""
        return self.current_plan().program

    def current_plan(self) -> Plan:
        """The program of the module as it is now, simplified."""
        plan = self._plan
        if plan is not None and plan.program.watch.unchanged():
            now = stamp(plan.indices)
            if now is not None and plan.index_stamp == now:
                return plan
            program = plan.program
        elif isinstance(self.source, FlowProgram):
            old = self.source
            program = FlowProgram(old.dim, old.cond_dims, old.steps, inverted=old.inverted)
        else:
            program = self.source()
        indices, weights = program.indices(), program.tensors()
        like = next(iter(weights or program.opaque_tensors()), torch.empty(0))
        self._plan = plan = Plan(program, indices, stamp(indices), *program.layers(), weights, like)
        return plan

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data x (B, M, D), condition (B, C) -> z (B, M, D), log|det dz/dx| (B, M)."""
        return self._run(x, cond, inverse=False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent z (B, M, D), condition (B, C) -> x (B, M, D), log|det dx/dz| (B, M)."""
        return self._run(z, cond, inverse=True)

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor | None,
        num_samples: int,
        seed: int,
        image_offset: int = 0,
        fixed: Tensor | None = None,
        include_mode: bool = False,
        counter: Tensor | None = None,
        first_sample: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draw hypotheses: x (B, M, D) and log p(x) (B, M), without gradients.

        The noise of a hypothesis depends on ``seed``, the image's number (``image_offset`` + its
        place in the batch) and its own number (``first_sample`` + its place) alone. ``fixed``
        (B, F) fills the last F latent dims; the density is then that of the noise dims. Without
        conditions B is 1. ``counter``, int64 (3,) on the flow's device, is added to seed, image
        offset and first sample.
        """
        plan = self.current_plan()
        like = next((t for t in (cond, fixed) if t is not None), None)
        like = plan.like.new_empty(1, 0) if like is None else like
        batch, dim = like.shape[0], plan.program.dim
        whole = self.whole(plan, [like])
        if isinstance(whole, ops.PackedFlow):
            return whole.sample(
                cond,
                num_samples,
                seed,
                batch=batch,
                image_offset=image_offset,
                fixed=fixed,
                include_mode=include_mode,
                counter=counter,
                first_sample=first_sample,
            )
        if counter is not None:
            more = counter.tolist()
            seed, image_offset, first_sample = (
                seed + more[0],
                image_offset + more[1],
                first_sample + more[2],
            )
        noise_dim = dim - (0 if fixed is None else fixed.shape[1])
        normal = reference.philox_normal if backend() == "reference" else ops.philox_normal
        noise = (seed, image_offset, include_mode, first_sample)
        z = normal(batch, num_samples, noise_dim, *noise).to(like)
        log_noise = reference.standard_normal_log_prob(z)
        if fixed is not None:
            z = torch.cat([z, fixed[:, None].expand(-1, num_samples, -1)], -1)
        x, log_jac = self.inverse(z, cond)
        return x, log_noise - log_jac

    def whole(self, plan: Plan, inputs: list[Tensor]) -> ops.PackedFlow | str:
        """The packed flow that is all that :meth:`sample` runs on such inputs (another object once
        a weight has changed), or why there is none."""
        with torch.no_grad():
            packed = self._fused(plan, inputs)
        if isinstance(packed, str):
            return packed
        if packed.whole is None:
            return "not every subnet has a form and a clamp that the kernels know"
        if plan.program.inverted:
            return "its steps lead from latent to data"
        return packed.whole

    def explain(self) -> tuple[bool, str]:
        """Whether calls are fused, and a sentence that says how or why not."""
        plan = self.current_plan()
        with torch.no_grad():
            packed = self._fused(plan, [plan.like.detach()])
        if isinstance(packed, str):
            return False, f"reference: {packed}"
        couplings = [layer for layer in plan.layers if isinstance(layer, CouplingLayer)]
        fused, linear = sum(map(_fusible, couplings)), len(plan.layers) - len(couplings)
        if not fused and (couplings or not linear):
            return False, "reference: no subnet has a form and a clamp that the kernels know"
        count = f"{fused}" if fused == len(couplings) else f"{fused} of {len(couplings)}"
        steps = f" and {linear} linear steps" if linear else ""
        where = "the CPU" if plan.like.device.type == "cpu" else plan.like.device
        return True, (
            f"{count} half-couplings{steps} fused on {where}, precision {self.precision}; "
            f"gradients: {self._explain_gradients(plan)}"
        )

    def _explain_gradients(self, plan: Plan) -> str:
        found = self._trained(plan, [plan.like.detach()])
        if isinstance(found, str):
            return f"reference, {found}"
        if self.checkpoint == "store":
            return "hidden layers kept"
        return "reversible, hidden layers recomputed"

    # ------------------------------------------------------------------------------------------

    def _run(self, state: Tensor, cond: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        plan = self.current_plan()
        _check_inputs(plan, state, cond, "z" if inverse else "x")
        inverse = inverse != plan.program.inverted
        kind = plan.like.device.type
        if torch.is_autocast_enabled(kind):
            # What a flow computes is exp-ed and summed: all of it stays in the parameters' dtype.
            state = state.to(plan.like.dtype)
            cond = None if cond is None else cond.to(plan.like.dtype)
            with torch.autocast(kind, enabled=False):
                return self._dispatch(plan, state, cond, inverse)
        return self._dispatch(plan, state, cond, inverse)

    def _dispatch(
        self, plan: Plan, state: Tensor, cond: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        inputs = [state] if cond is None else [state, cond]
        find = self._trained if _needs_gradients(plan, inputs) else self._fused
        found = find(plan, inputs)
        if isinstance(found, str):
            run = reference.flow_inverse if inverse else reference.flow_forward
            return run(plan.layers, plan.output_index, state, cond)
        if len(found.segments) == 1:
            only = found.segments[0]
            if not isinstance(only, Layer):
                return (only.inverse if inverse else only.forward)(state, cond)
        return _run_segments(plan, found.segments, state, cond, inverse)

    def _trained(self, plan: Plan, inputs: list[Tensor]) -> _Trainable | str:
        """The flow with gradients, or why this call cannot run on the kernels."""
        why = _why_reference(inputs) or _unfit(plan.weights)
        if why:
            return why
        now = _stamp(plan.weights)
        found = self._trainable
        if found is None or found.plan is not plan or found.stamp is None or found.stamp != now:
            try:
                found = _Trainable(plan, now, _segments(plan, self._trainable_flow))
            except UnsupportedOnCuda as error:
                return str(error)
            self._trainable = found
        return found

    def trainable(self) -> training.TrainableFlow | None:
        """The differentiable fused flow where a single one covers everything."""
        plan = self.current_plan()
        found = self._trained(plan, [plan.like.detach()])
        if isinstance(found, str) or len(found.segments) != 1:
            return None
        only = found.segments[0]
        return None if isinstance(only, Layer) else only

    def _trainable_flow(
        self, plan: Plan, layers: Sequence[Layer], output_index: Sequence[int]
    ) -> training.TrainableFlow:
        return training.TrainableFlow(
            *(layers, output_index, plan.program.dim, plan.program.cond_dim),
            *(self.precision, self.checkpoint, plan.like.dtype, plan.like.device),
        )

    def _packed_flow(
        self, plan: Plan, layers: Sequence[Layer], output_index: Sequence[int]
    ) -> ops.PackedFlow:
        return ops.PackedFlow(
            *(layers, output_index, plan.program.dim, plan.program.cond_dim),
            *(self.precision, plan.like.dtype, plan.like.device),
        )

    def _fused(self, plan: Plan, inputs: list[Tensor]) -> _Packed | str:
        """The packed flow, or why this call cannot run on the kernels."""
        why = _why_reference(inputs)
        if why:
            return why
        now = _stamp(plan.weights)
        if now is None:
            return "parameters made in inference mode do not tell when they change"
        packed = self._packed
        if packed is not None and packed.plan is plan and packed.stamp == now:
            return packed.why or packed
        why = _unfit(plan.weights)
        if why:
            return why
        with self._lock:
            packed = self._packed
            if packed is None or packed.plan is not plan or packed.stamp != now:
                try:
                    packed = _Packed(plan, now, _segments(plan, self._packed_flow))
                except UnsupportedOnCuda as error:
                    packed = _Packed(plan, now, (), str(error))
                self._packed = packed
        return packed.why or packed


def _check_inputs(plan: Plan, state: Tensor, cond: Tensor | None, name: str) -> None:
    dim, cond_dim = plan.program.dim, plan.program.cond_dim
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(state).__name__}")
    if state.dim() != 3 or state.shape[-1] != dim:
        raise ValueError(f"{name}: expected shape (B, M, {dim}), got {tuple(state.shape)}")
    if cond is None:
        if cond_dim:
            raise ValueError(f"cond: expected shape ({state.shape[0]}, {cond_dim}), got None")
    elif not isinstance(cond, Tensor):
        raise TypeError(f"cond: expected a tensor, got {type(cond).__name__}")
    elif cond.shape != (state.shape[0], cond_dim):
        raise ValueError(
            f"cond: expected shape ({state.shape[0]}, {cond_dim}), got {tuple(cond.shape)}"
        )
    like = plan.like
    for what, tensor in ((name, state), ("cond", state if cond is None else cond)):
        if tensor.device != like.device:
            raise ValueError(
                f"{what}: is on {tensor.device}, the flow's parameters are on {like.device}"
            )
        if tensor.dtype is not like.dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise TypeError(f"{what}: expected {like.dtype} as the parameters, got {tensor.dtype}")


def _needs_gradients(plan: Plan, inputs: list[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = (*inputs, *plan.weights, *plan.program.opaque_tensors())
    return any(tensor.requires_grad for tensor in tensors)


def _why_reference(inputs: list[Tensor]) -> str | None:
    if backend() == "reference":
        return "FASTHYP_BACKEND=reference"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return _unfit(inputs)


def _unfit(tensors: list[Tensor]) -> str | None:
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"{type(tensor).__name__} is a tensor subclass"
        kind = tensor.device.type
        if kind not in _DTYPES:
            return f"on {tensor.device}, and the fused coupling kernels run on CPUs and CUDA"
        if kind == "cuda" and _C.cuda_archs is None:
            return f"on {tensor.device}, and fasthyp was built without CUDA kernels"
        if kind == "cuda" and backend() == "cpu":
            return "FASTHYP_BACKEND=cpu"
        if tensor.dtype not in _DTYPES[kind]:
            known = " and ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[kind])
            return f"{tensor.dtype}, and the fused coupling kernels take {known} on {kind}"
        if tensor.dtype != tensors[0].dtype:
            return "parameters of different dtypes"
    return None


def _fusible(layer: Layer) -> bool:
    if isinstance(layer, LinearLayer):
        return True
    return layer.clamp_fn is None and all(isinstance(net, Net) for net in layer.nets)


def _segments(plan: Plan, make: Callable[..., Any]) -> tuple[Any, ...]:
    """Runs of fusible layers become fused flows; the others stay as they are.

    A single fused flow ends with the output index; several work on the bare state.
    """
    if plan.layers and all(map(_fusible, plan.layers)):
        return (make(plan, plan.layers, plan.output_index),)
    same_order = tuple(range(plan.program.dim))
    segments: list[Any] = []
    for fusible, layers in groupby(plan.layers, _fusible):
        run = list(layers)
        segments += [make(plan, run, same_order)] if fusible else run
    return tuple(segments)


def _run_segments(
    plan: Plan, segments: Sequence[Any], state: Tensor, cond: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    order = torch.tensor(plan.output_index, device=state.device)
    if inverse:
        state = state.index_select(-1, order.argsort())
    log_jac = state.new_zeros(state.shape[:-1])
    for segment in segments[::-1] if inverse else segments:
        if isinstance(segment, Layer):
            state, change = _run_layer(segment, state, cond, inverse)
        else:
            state, change = (segment.inverse if inverse else segment.forward)(state, cond)
        log_jac = log_jac + change
    return (state if inverse else state.index_select(-1, order)), log_jac


def _run_layer(
    layer: Layer, state: Tensor, cond: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The subnets as torch runs them, with fused arithmetic around them where there is some."""
    if (
        isinstance(layer, LinearLayer)
        or layer.clamp_fn is not None
        or layer.kind != "affine"
        or state.device.type != "cpu"
        or torch.is_grad_enabled()
    ):
        return reference.apply_layer(layer, state, cond, inverse)
    raw = layer.raw_scale * reference.subnet(layer, state, cond).to(state.dtype)
    changed, log_jac = ops.affine_coupling(
        state.reshape(-1, state.shape[-1]),
        raw.reshape(-1, raw.shape[-1]),
        layer.active,
        layer.clamp,
        layer.clamp_activation,
        inverse,
    )
    return changed.reshape(state.shape), log_jac.reshape(state.shape[:-1])
