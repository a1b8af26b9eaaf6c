"""Checkpoints of the official codes: their tensors, under the names of this package's models."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Checkpoint: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any]"


def official_state(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], str]:
    """The state dict of a checkpoint, and what messages call it.

    Args:
        checkpoint: a file that ``torch.save`` wrote, or what is in it: Lightning's
            ``{"state_dict": ...}``, ``{"model": ...}`` or a bare state dict. Files are read
            without running code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable so, or something in it is not a tensor; names it.
    """
    if isinstance(checkpoint, Mapping):
        content, source = checkpoint, "checkpoint"
    else:
        source = str(checkpoint)
        try:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{source}: not a readable checkpoint: {error}") from error
    state: Any = content
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise ValueError(f"{source}: expected a state dict, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source}: {name}: expected a tensor, got {type(value).__name__}")
    return dict(state), source


def renamed(
    state: Mapping[str, Tensor], prefixes: Mapping[str, str], ignored: Sequence[str], source: str
) -> dict[str, Tensor]:
    """The tensors whose names start with one of ``prefixes``, which is replaced; those that start
    with one of ``ignored`` are left out.

    Raises:
        ValueError: a name that starts with none of them.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            found[prefixes[prefix] + name.removeprefix(prefix)] = value
        elif not name.startswith(tuple(ignored)):
            raise ValueError(f"{source}: unknown tensor {name!r}")
    return found


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def size(state: Mapping[str, Tensor], name: str, dim: int, source: str) -> int:
    """A size of a matrix.

    Raises:
        ValueError: it is missing, or no matrix; names it.
    """
    if name not in state:
        raise ValueError(f"{source}: tensor {name!r} is missing")
    if state[name].dim() != 2:
        raise ValueError(f"{source}: tensor {name!r}: expected a matrix, got {state[name].dim()}D")
    return state[name].shape[dim]
