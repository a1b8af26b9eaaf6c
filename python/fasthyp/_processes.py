"""Several processes that were started by ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist


class Place(NamedTuple):
    """Which of how many processes this one is, and its device."""

    rank: int
    world: int
    device: str


def place(device: str) -> Place:
    """As the environment says that ``torchrun`` makes; one process alone without it.

    Args:
        device: ``"cpu"`` or ``"cuda"``, of which each process of a machine takes its own.

    Raises:
        ValueError: the environment says nonsense.
    """
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
    except ValueError as error:
        raise ValueError(f"RANK, LOCAL_RANK, WORLD_SIZE: expected numbers: {error}") from error
    if not 0 <= rank < world:
        raise ValueError(f"RANK: expected 0 to WORLD_SIZE - 1 = {world - 1}, got {rank}")
    return Place(rank, world, f"cuda:{local}" if device == "cuda" and world > 1 else device)


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """The processes, which can add up what they found within."""
    here = place(device)
    if here.world == 1 or dist.is_initialized():
        yield here
        return
    if device == "cuda":
        torch.cuda.set_device(here.device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield here
    finally:
        dist.destroy_process_group()
