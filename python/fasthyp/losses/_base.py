"""What all losses share: checks of tensors against shape patterns, means, the module form."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64)


class Shapes:
    """Checks tensors against patterns such as ``"B M J 2"``.

    A letter stands for one size, the same in all patterns of this object; ``...`` in front for any
    leading dimensions. Floating tensors must have one dtype, float32 or float64, and all tensors
    one device.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self._first: tuple[str, torch.dtype] | None = None
        self._device: tuple[str, torch.device] | None = None

    def __call__(self, name: str, tensor: Tensor, pattern: str, mask: bool = False) -> None:
        """Raise where ``tensor`` does not fit; ``mask`` lets any real or bool dtype pass."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if mask:
            if tensor.is_complex():
                raise TypeError(f"{name}: expected a real or bool dtype, got {tensor.dtype}")
        elif tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float32 or float64, got {tensor.dtype}")
        elif self._first is None:
            self._first = (name, tensor.dtype)
        elif tensor.dtype != self._first[1]:
            first, dtype = self._first
            raise TypeError(f"{name}: expected {dtype} as {first}, got {tensor.dtype}")
        if self._device is None:
            self._device = (name, tensor.device)
        elif tensor.device != self._device[1]:
            first, device = self._device
            raise ValueError(f"{name}: expected device {device} as {first}, got {tensor.device}")
        wanted = pattern.split()
        free = wanted[:1] == ["..."]
        wanted = wanted[1:] if free else wanted
        got = tuple(tensor.shape)
        fits = len(got) >= len(wanted) if free else len(got) == len(wanted)
        if fits:
            found: dict[str, int] = {}
            for size, want in zip(got[len(got) - len(wanted) :], wanted, strict=True):
                known = int(want) if want.isdigit() else self.sizes.get(want, found.get(want))
                fits = fits and (known is None or known == size)
                if not want.isdigit():
                    found[want] = size
            if fits:
                self.sizes.update(found)
        if not fits:
            parts = [f"{w}={self.sizes[w]}" if w in self.sizes else w for w in wanted]
            expected = ", ".join(["...", *parts] if free else parts)
            raise ValueError(f"{name}: expected shape ({expected}), got {got}")

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(other.shape)} as {other_name}, "
            f"got {tuple(tensor.shape)}"
        )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: float, low: float = 0.0, above: bool = False) -> None:
    """A finite number of at least ``low``, or above it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value < math.inf or (above and value == low):
        bound = "above" if above else "of at least"
        raise ValueError(f"{name}: expected a finite number {bound} {low:g}, got {value}")


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean over everything; with ``weights`` over the leading dimensions, the weighted one.
    Zero, with a graph, where there is nothing (or no weight) instead of NaN."""
    if weights is None:
        return values.sum() / max(values.numel(), 1)
    trailing = math.prod(values.shape[weights.ndim :])
    weights = weights.to(values.dtype)
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    # what weighs nothing may be NaN
    values = torch.where(weights == 0, 0, values) * weights
    total = weights.sum() * trailing
    return values.sum() / torch.where(total == 0, 1, total)


def reduce(values: Tensor, reduction: str) -> Tensor:
    """``"mean"``, ``"sum"`` or ``"none"``."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "none":
        return values
    return mean(values) if reduction == "mean" else values.sum()


class LossModule(nn.Module):
    """A function of this package as a module: ``Module(**options)(*tensors)``.

    Options are the function's keyword-only arguments, with its defaults, and attributes of the
    module; its other arguments are those of ``forward``. The function's docstring describes both.
    """

    function: ClassVar[Callable[..., Any]]
    options: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, function: Callable[..., Any], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.function = staticmethod(function)
        parameters = inspect.signature(function).parameters.values()
        options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        cls.options = tuple(p.name for p in options)
        cls.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        signature: inspect.Signature = type(self).__signature__  # type: ignore[attr-defined]
        bound = signature.bind(**options)  # TypeError that names a wrong option
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            setattr(self, name, value)

    def forward(self, *tensors: Any, **named: Any) -> Any:
        options = {name: getattr(self, name) for name in self.options}
        return type(self).function(*tensors, **named, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.options)
