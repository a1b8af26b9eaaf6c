"""Seeds of the counter-based generator, for everything that draws."""

from __future__ import annotations

import torch


def resolve_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed; where it is None one drawn from ``generator`` or PyTorch's default generator."""
    if seed is None:
        device = "cpu" if generator is None else generator.device
        draw = torch.randint(2**62, (), generator=generator, device=device)
        return int(draw.item())
    if generator is not None:
        raise ValueError("seed, generator: expected at most one of them, got both")
    check_int("seed", seed, 0, 2**64)
    return seed


def check_int(name: str, value: object, low: int, high: int) -> None:
    """TypeError or ValueError unless ``low <= value < high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name}: expected {low} <= {name} < {high}, got {value}")
