"""What every metric expects of its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthyp._tensors import check_floating


def check_pair(
    names: tuple[str, str], first: object, second: object, coordinates: int | None = None
) -> tuple[int, ...]:
    """The broadcast leading shape of two sets of points (..., J, D)."""
    a, b = check_floating(names[0], first), check_floating(names[1], second)
    if a.dtype != b.dtype:
        raise TypeError(f"{names[1]}: expected {a.dtype}, as {names[0]}, got {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"{names[1]}: expected on {a.device}, as {names[0]}, got {b.device}")
    last = "D" if coordinates is None else str(coordinates)
    for name, points in zip(names, (a, b), strict=True):
        good = points.ndim >= 2 and points.shape[-2] > 0 and points.shape[-1] > 0
        if not good or (coordinates is not None and points.shape[-1] != coordinates):
            raise ValueError(
                f"{name}: expected shape (..., J, {last}) with J >= 1, got {tuple(points.shape)}"
            )
    try:
        if a.shape[-2:] == b.shape[-2:]:
            return torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        pass
    raise ValueError(
        f"{names[1]}: expected a shape that broadcasts with {names[0]}'s {tuple(a.shape)}, "
        f"the same J and D, got {tuple(b.shape)}"
    )


def check_mask(mask: object, shape: tuple[int, ...], joints: int, device: torch.device) -> None:
    """A bool mask that broadcasts to ``(*shape, joints)``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {got}")
    if mask.device != device:
        raise ValueError(f"mask: expected on {device}, as the poses, got {mask.device}")
    full = (*shape, joints)
    try:
        fits = torch.broadcast_shapes(mask.shape, full) == full
    except RuntimeError:
        fits = False
    if not fits or mask.ndim < 1 or mask.shape[-1] != joints:
        raise ValueError(
            f"mask: expected a shape that broadcasts to {full}, its last {joints}, "
            f"got {tuple(mask.shape)}"
        )


def check_joints(name: str, joints: object, number: int) -> list[int]:
    """One or several joint numbers as a list."""
    listed = [joints] if isinstance(joints, int) else joints
    if (
        not isinstance(listed, Sequence)
        or isinstance(listed, str)
        or any(isinstance(joint, bool) or not isinstance(joint, int) for joint in listed)
    ):
        raise TypeError(f"{name}: expected an int or a sequence of ints, got {joints!r}")
    if not listed or not all(0 <= joint < number for joint in listed):
        raise ValueError(f"{name}: expected joints from 0 to {number - 1}, got {joints!r}")
    return list(listed)


def check_thresholds(
    thresholds: Tensor | Sequence[float], device: torch.device, least: int = 1
) -> Tensor:
    """Ascending thresholds as a float64 tensor."""
    try:
        values = torch.as_tensor(thresholds, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"thresholds: expected numbers, got {thresholds!r}") from None
    if values.ndim != 1 or len(values) < least:
        raise ValueError(
            f"thresholds: expected at least {least} in one dimension, got {tuple(values.shape)}"
        )
    if not torch.isfinite(values).all() or not (values.diff() > 0).all():
        raise ValueError("thresholds: expected finite, strictly ascending numbers")
    return values
