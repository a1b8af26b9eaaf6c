"""Vertices of the published meshes that stand for joints which the skeletons lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_FACE = ("nose", "reye", "leye", "rear", "lear")
_FEET = ("LBigToe", "LSmallToe", "LHeel", "RBigToe", "RSmallToe", "RHeel")
_TIPS = tuple(
    side + finger for side in "lr" for finger in ("thumb", "index", "middle", "ring", "pinky")
)
EXTRA_JOINTS = (*_FACE, *_FEET, *_TIPS)
"""The order in which a model appends them to its joints."""

_SMPL = (
    *(332, 6260, 2800, 4071, 583, 3216, 3226, 3387, 6617, 6624, 6787),
    *(2746, 2319, 2445, 2556, 2673, 6191, 5782, 5905, 6016, 6133),
)
_SMPLX = (
    *(9120, 9929, 9448, 616, 6, 5770, 5780, 8846, 8463, 8474, 8635),
    *(5361, 4933, 5058, 5169, 5286, 8079, 7669, 7794, 7905, 8022),
)
VERTEX_IDS: dict[str, dict[str, int]] = {
    "smplh": dict(zip(EXTRA_JOINTS, _SMPL, strict=True)),
    "smplx": dict(zip(EXTRA_JOINTS, _SMPLX, strict=True)),
}
"""Vertex numbers on the meshes of SMPL and SMPL+H (6890 vertices) and of SMPL-X (10475)."""


class VertexJointSelector(nn.Module):
    """Appends chosen vertices to the joints: face, then feet, then finger tips.

    Args:
        vertex_ids: name to vertex, with the names of :data:`EXTRA_JOINTS`.
        use_hands, use_feet_keypoints: whether to append those.

    Raises:
        ValueError: ``vertex_ids`` lacks a name.
    """

    extra_joints_idxs: Tensor

    def __init__(
        self,
        vertex_ids: Mapping[str, int],
        use_hands: bool = True,
        use_feet_keypoints: bool = True,
        **ignored: Any,
    ) -> None:
        super().__init__()
        names = (*_FACE, *(_FEET if use_feet_keypoints else ()), *(_TIPS if use_hands else ()))
        missing = [name for name in names if name not in vertex_ids]
        if missing:
            raise ValueError(f"vertex_ids: expected all of {', '.join(names)}; lacks {missing}")
        chosen = torch.tensor([int(vertex_ids[name]) for name in names], dtype=torch.long)
        self.register_buffer("extra_joints_idxs", chosen)

    def forward(self, vertices: Tensor, joints: Tensor) -> Tensor:
        return torch.cat([joints, vertices.index_select(1, self.extra_joints_idxs)], 1)
