"""Joints and vertices of files that hold a body's parameters only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthyp.data.readers._dataset import Fields
from fasthyp.geometry import axis_angle_to_matrix

Body = "Callable[..., Any] | Mapping[str, Callable[..., Any]]"


def body_for(body: Any, gender: str, source: str) -> Any:
    """The body of a gender: ``body`` itself, or the one that the mapping has under ``"male"``,
    ``"female"`` or ``"neutral"``.

    Raises:
        ValueError: the mapping lacks it.
    """
    if not isinstance(body, Mapping):
        return body
    name = {"m": "male", "f": "female"}.get(gender[:1].lower(), "neutral")
    if name not in body:
        raise ValueError(f"{source}: body: expected one for {name!r}, got {sorted(body)}")
    return body[name]


@torch.no_grad()
def posed(
    body: Callable[..., Any],
    betas: np.ndarray | Tensor,
    global_orient: Tensor,
    body_pose: Tensor,
    joints: int,
) -> tuple[Fields, Tensor]:
    """``joints_3d`` of the first so many joints and ``vertices``, the root at the origin; and where
    the root is (R, 3) without a translation.

    Args:
        body: called as smplx's models are.
        betas: (R, S).
        global_orient: (R, 3, 3) in the axes in which the joints are wanted.
        body_pose: (R, P, 3, 3).
    """
    betas = torch.as_tensor(np.array(betas), dtype=torch.float32)
    wanted = int(getattr(body, "num_betas", betas.shape[1]))
    betas = torch.nn.functional.pad(betas, (0, max(0, wanted - betas.shape[1])))[:, :wanted]
    out = body(
        betas=betas,
        global_orient=global_orient[:, None],
        body_pose=body_pose,
        pose2rot=False,
    )
    root = out.joints[:, :1]
    return {"joints_3d": out.joints[:, :joints] - root, "vertices": out.vertices - root}, root[:, 0]


def rotations(axis_angles: np.ndarray) -> Tensor:
    """(R, 3 K) axis angles in rad as (R, K, 3, 3)."""
    values = torch.from_numpy(np.array(axis_angles, np.float32))
    return axis_angle_to_matrix(values.unflatten(-1, (-1, 3)))
