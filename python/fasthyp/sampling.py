"""Hundreds of hypotheses per image from a conditional flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp._graphs import GraphCache, Noise
from fasthyp._seed import check_int, resolve_seed
from fasthyp.flows.accelerate import shared_clone
from fasthyp.flows.describe import describe
from fasthyp.flows.executor import FlowExecutor, Plan
from fasthyp.flows.program import FlowProgram, UninitializedFlow
from fasthyp.reference.coupling import standard_normal_log_prob


class HypothesisSampler:
    """Draws M hypotheses for each of B conditions: x = inverse flow of z, z ~ N(0, 1).

    Samples as in eval mode whatever mode the flow is in, without gradients. The noise comes from a
    counter-based generator: hypothesis m of image b depends on the seed, b and m alone, not on
    ``num_samples``, the number of threads or the split into batches.

    Args:
        flow: what :func:`fasthyp.flows.describe` takes: a FrEIA ``GraphINN``, ``SequenceINN`` or
            coupling block, an nflows ``Flow``, a :class:`fasthyp.flows.ConditionalGlow`, a
            RealNVP of POCO, accelerated or not; or a :class:`fasthyp.flows.FlowProgram` or a
            function that returns one (their opaque subnets run in the mode that they are in).
        precision: ``"highest"``, ``"high"`` or ``"medium"``.
        graph: on a CUDA device, calls of one shape are captured in a CUDA graph: ``"auto"`` from
            the second call on, ``True`` from the first, ``False`` never. Changed weights are
            noticed and captured anew.

    Raises:
        TypeError: ``flow`` is none of these.
        UnsupportedFlow: no program describes the flow, or its base distribution is another; the
            message says why.
        ValueError: unknown precision or graph.
    """

    def __init__(
        self,
        flow: nn.Module | FlowProgram | Callable[[], FlowProgram],
        precision: str = "high",
        graph: bool | str = "auto",
    ) -> None:
        self.flow = flow
        self.precision = precision
        self._graphs = GraphCache(graph)
        source = flow if isinstance(flow, FlowProgram) else partial(_program, flow)
        self._executor = FlowExecutor(source, precision)
        self._eval_mode()  # an unsuitable flow is refused here

    def __call__(
        self,
        cond: Tensor | Sequence[Tensor] | None = None,
        num_samples: int | None = None,
        *,
        seed: int | None = None,
        z: Tensor | None = None,
        fixed: Tensor | None = None,
        include_mode: bool = False,
        return_log_prob: bool = False,
        generator: torch.Generator | None = None,
        image_offset: int = 0,
        first_sample: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Sample hypotheses.

        Args:
            cond: condition (B, C), or a list of the flow's conditions (B, C_i); None for a flow
                without conditions (B = 1, or that of ``z`` or ``fixed``).
            num_samples: M, hypotheses per image; 1000 unless told, or that of ``z``.
            seed: of the noise, 0 <= seed < 2**64. None draws one from ``generator`` or PyTorch's
                default generator, so that ``torch.manual_seed`` makes the result repeatable.
            z: the latents to use, (B, M, D), or (B, M, D - F) with ``fixed``.
            fixed: (B, F), the last F latent dims, the same for all hypotheses of an image
                (Wehrbein et al., ICCV 2021: the 2D pose); only the others are noise.
            include_mode: make hypothesis 0 the mode of the latent, z = 0.
            return_log_prob: also return log p(x) (B, M) in nats, the density of the noise dims.
            generator: where a seed is drawn from.
            image_offset: number of the first image, where a batch is part of a longer list.
            first_sample: number of the first hypothesis, where these are some of many:
                ``num_samples`` and ``first_sample`` give numbers ``first_sample`` to
                ``first_sample + num_samples - 1`` of one long call.

        Returns:
            x (B, M, D), with ``return_log_prob`` also log p (B, M).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        executor, plan = self._eval_mode()
        program, like = plan.program, plan.like
        conditions = _conditions(cond, program.cond_dims, like)
        batch = conditions.shape[0] if conditions is not None else None
        noise_dim = program.dim
        if fixed is not None:
            _check_tensor("fixed", fixed, like, 2)
            if batch not in (None, fixed.shape[0]) or not 0 < fixed.shape[1] <= program.dim:
                rows, got = "B" if batch is None else batch, tuple(fixed.shape)
                raise ValueError(
                    f"fixed: expected shape ({rows}, F) with F <= {program.dim}, got {got}"
                )
            batch = fixed.shape[0]
            noise_dim -= fixed.shape[1]
        check_int("image_offset", image_offset, 0, 2**32 - (batch or 1))
        if num_samples is not None:
            check_int("num_samples", num_samples, 1, 2**32)
        check_int("first_sample", first_sample, 0, 2**32 - (num_samples or 1000) + 1)

        noise = Noise()
        if z is None:
            num_samples = 1000 if num_samples is None else num_samples
            noise = Noise(resolve_seed(seed, generator), image_offset, first_sample)
        else:
            if seed is not None or generator is not None or include_mode or first_sample:
                raise ValueError(
                    "z: given latents leave nothing to seed, generator, include_mode, first_sample"
                )
            _check_tensor("z", z, like, 3)
            expected = (
                z.shape[0] if batch is None else batch,
                z.shape[1] if num_samples is None else num_samples,
                noise_dim,
            )
            if tuple(z.shape) != expected or not z.shape[1]:
                raise ValueError(f"z: expected shape {expected}, got {tuple(z.shape)}")

        def draw(
            cond: Tensor | None, fixed: Tensor | None, z: Tensor | None, noise: Noise
        ) -> tuple[Tensor, ...]:
            if z is None:
                assert num_samples is not None
                x, log_prob = executor.sample(
                    *(cond, num_samples, noise.seed, noise.image_offset, fixed),
                    *(include_mode, noise.counter, noise.first_sample),
                )
                return (x, log_prob) if return_log_prob else (x,)
            latent = z
            if fixed is not None:
                latent = torch.cat([z, fixed[:, None].expand(-1, z.shape[1], -1)], -1)
            x, log_jac = executor.inverse(latent, cond)
            return (x, standard_normal_log_prob(z) - log_jac) if return_log_prob else (x,)

        inputs = (conditions, fixed, z)
        given = [tensor for tensor in inputs if tensor is not None] or [like.detach()]
        with torch.no_grad():
            results = self._graphs(
                *(draw, inputs, noise, like.device),
                key=(num_samples, include_mode, return_log_prob),
                version=partial(executor.whole, plan, given),
            )
        return (results[0], results[1]) if return_log_prob else results[0]

    def _eval_mode(self) -> tuple[FlowExecutor, Plan]:
        """The flow as it is in eval mode."""
        executor, flow = self._executor, self.flow
        try:
            plan = executor.current_plan()
            # Active dropout and batch statistics make a subnet opaque; the others have no modes.
            modes = (part.training for subnet in plan.program.opaque for part in subnet.modules())
            if not any(modes) or not isinstance(flow, nn.Module):
                return executor, plan
        except UninitializedFlow:
            if not isinstance(flow, nn.Module) or not flow.training:
                raise
        # A copy in eval mode on the same parameters: the flow's own mode stays as it is.
        executor = FlowExecutor(partial(describe, shared_clone(flow).eval()), self.precision)
        return executor, executor.current_plan()


def _program(flow: nn.Module | Callable[[], FlowProgram]) -> FlowProgram:
    if isinstance(flow, nn.Module) or not callable(flow):
        return describe(flow)
    program = flow()
    if not isinstance(program, FlowProgram):
        raise TypeError(f"flow: expected to return a FlowProgram, got {type(program).__name__}")
    return program


class SamplerCache:
    """One sampler of a module's flow for each precision. A copied or unpickled one is empty."""

    def __init__(self) -> None:
        self._samplers: dict[str, HypothesisSampler] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return SamplerCache, ()

    def get(self, flow: Any, precision: str) -> HypothesisSampler:
        """The sampler of ``flow``, made where there is none yet."""
        sampler = self._samplers.get(precision)
        if sampler is None or sampler.flow != flow:
            sampler = self._samplers[precision] = HypothesisSampler(flow, precision)
        return sampler


def _conditions(
    cond: Tensor | Sequence[Tensor] | None, widths: Sequence[int], like: Tensor
) -> Tensor | None:
    given = [] if cond is None else [cond] if isinstance(cond, Tensor) else cond
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"cond: expected a tensor or a list of them, got {type(cond).__name__}")
    if len(given) != len(widths):
        raise ValueError(f"cond: expected {len(widths)} condition(s), got {len(given)}")
    for i, (tensor, width) in enumerate(zip(given, widths, strict=True)):
        name = "cond" if len(widths) == 1 else f"cond[{i}]"
        _check_tensor(name, tensor, like, 2)
        if tensor.shape[1] != width or tensor.shape[0] != given[0].shape[0]:
            rows, got = given[0].shape[0] if i else "B", tuple(tensor.shape)
            raise ValueError(f"{name}: expected shape ({rows}, {width}), got {got}")
    if not given:
        return None
    return given[0].detach() if len(given) == 1 else torch.cat(list(given), 1).detach()


def _check_tensor(name: str, tensor: object, like: Tensor, rank: int) -> None:
    """A tensor with at least one row, of the flow's dtype and device; finite, on a CPU (on a GPU,
    to look would be to wait)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, as the flow's, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, as the flow, got {tensor.device}")
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(tensor.shape)}")
    if not tensor.shape[0]:
        raise ValueError(f"{name}: expected at least one image, got shape {tuple(tensor.shape)}")
    if tensor.device.type == "cpu" and not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
