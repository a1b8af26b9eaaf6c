"""What all fused modules share: a lazily made executor, and classes made for modules of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fasthyp.flows.executor import FlowExecutor
from fasthyp.flows.program import FlowProgram, UninitializedFlow, UnsupportedFlow
from fasthyp.flows.traced import Traced, run, trace


def constant(method: Any) -> Any:
    """``torch.compiler.assume_constant_result``, without the import of dynamo that it costs."""
    method._dynamo_marked_constant = True
    return method


class FusedFlow(nn.Module):
    """A module that runs as the flow program which describes it; its executor is made on first
    use, never saved or copied."""

    precision = "highest"
    checkpoint = "reversible"

    def _describe(self) -> FlowProgram:
        raise NotImplementedError

    def flow(self) -> FlowExecutor:
        """The executor of this module.

        Raises:
            UnsupportedFlow: the module is nothing that a program can describe.
        """
        state = self.__dict__.get("_flow")
        if state is None:
            state = FlowExecutor(self._describe, self.precision, self.checkpoint)
            try:
                _ = state.program
            except UninitializedFlow:
                raise
            except UnsupportedFlow as error:
                state = error
            self.__dict__["_flow"] = state
        if isinstance(state, UnsupportedFlow):
            raise state
        return state

    def train(self, mode: bool = True) -> Any:
        # Called between training and evaluation: also a good moment to forget weights that were
        # changed behind PyTorch's back, through parameter.data.
        self.__dict__.pop("_flow", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_flow", None)
        return state

    @constant
    def _dims(self) -> tuple[int, tuple[int, ...]]:
        """Widths of the state and of the conditions."""
        program = self.flow().program
        return program.dim, program.cond_dims

    @constant
    def _traced(self) -> Traced | None:
        try:
            return trace(self, self.flow())
        except UnsupportedFlow:
            return None

    @constant
    def _guard(self, *objects: Any) -> None:
        """Called by traced code: dynamo guards the identity of what it passes to a constant."""

    def _delegates(self) -> bool:
        """Whether this call is for the plain forward, which every torch transform can trace."""
        if torch.compiler.is_dynamo_compiling():
            return self._traced() is None
        return (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or getattr(self, "_is_replica", False)
        )

    def _pass(self, state: Tensor, cond: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        """State (B, M, D), condition (B, C) -> state, log-Jacobian (B, M)."""
        if not torch.compiler.is_dynamo_compiling():
            flow = self.flow()
            return (flow.inverse if rev else flow.forward)(state, cond)
        traced = self._traced()
        assert traced is not None  # as _delegates() has found
        number, tensors, settings, objects, sizes = traced
        for path, size in sizes:
            assert len(self._part(path)._modules) == size
        for path, name, value in settings:
            assert getattr(self._part(path), name) == value
        self._guard(*[getattr(self._part(path), name) for path, name in objects])
        found = [getattr(self._part(path), name) for path, name in tensors]
        return run(number, found, state, cond, rev)

    def _part(self, path: tuple[str, ...]) -> Any:
        part: Any = self
        for name in path:
            part = part._modules[name]
        return part

    def _run_rows(
        self,
        x: Tensor,
        conditions: Sequence[Tensor],
        rev: bool,
        names: tuple[str, str] = ("x_or_z", "c[{}]"),
    ) -> tuple[Tensor, Tensor]:
        """Rows x (N, D), each with its own row of every condition -> rows, log-Jacobian (N,).

        ``names`` are those of the arguments in messages.
        """
        dim, cond_dims = self._dims()
        if not isinstance(x, Tensor):
            raise TypeError(f"{names[0]}: expected a tensor, got {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != dim:
            raise ValueError(f"{names[0]}: expected shape (N, {dim}), got {tuple(x.shape)}")
        for i, (c, width) in enumerate(zip(conditions, cond_dims, strict=True)):
            name = names[1].format(i)
            if not isinstance(c, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(c).__name__}")
            if c.shape != (x.shape[0], width):
                raise ValueError(
                    f"{name}: expected shape ({x.shape[0]}, {width}), got {tuple(c.shape)}"
                )
        cond = None
        if conditions:
            cond = conditions[0] if len(conditions) == 1 else torch.cat(tuple(conditions), 1)
        out, log_jac = self._pass(x[:, None], cond, rev)
        return out[:, 0], log_jac[:, 0]


@cache
def adopted(original: Any, mixin: Any) -> Any:
    """The class ``original`` of another package with the methods of ``mixin``, to be given to
    objects that exist. It is pickled by the two it is made from."""
    names = {"__module__": mixin.__module__, "__reduce__": _reduce}
    return type(original.__name__, (mixin, original), names)


def _reduce(self: Any) -> tuple[Callable[..., Any], tuple[Any, Any], dict[str, Any]]:
    mixin, original = type(self).__bases__
    return _revive, (original, mixin), self.__getstate__()


def _revive(original: Any, mixin: Any) -> Any:
    made = adopted(original, mixin)
    return made.__new__(made)
