"""What the models return: the fields of smplx's outputs, by attribute or by key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class BodyOutput:
    """One batch of bodies; a field is None where the model lacks it or it was not asked for.

    Attributes:
        vertices: (B, V, 3) m.
        joints: (B, K, 3) m, the skeleton's joints and what the model appends to them.
        full_pose: (B, 3 J) rad as axis angles, or (B, J, 3, 3); all parts of the pose together.
        global_orient: as given, or the model's own.
        transl: (B, 3) m.
        v_shaped: (B, V, 3) m, the rest vertices of this shape.
    """

    vertices: Tensor | None = None
    joints: Tensor | None = None
    full_pose: Tensor | None = None
    global_orient: Tensor | None = None
    transl: Tensor | None = None
    v_shaped: Tensor | None = None

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def keys(self) -> Iterator[str]:
        return iter([item.name for item in fields(self)])

    def values(self) -> Iterator[Any]:
        return iter([getattr(self, item.name) for item in fields(self)])

    def items(self) -> Iterator[tuple[str, Any]]:
        return iter([(item.name, getattr(self, item.name)) for item in fields(self)])


@dataclass
class SMPLOutput(BodyOutput):
    """``betas`` (B, S); ``body_pose`` as given, or the model's own."""

    betas: Tensor | None = None
    body_pose: Tensor | None = None


@dataclass
class SMPLHOutput(SMPLOutput):
    """The hands' poses: axis angles (B, 45) rad after principal components, or as given."""

    left_hand_pose: Tensor | None = None
    right_hand_pose: Tensor | None = None


@dataclass
class SMPLXOutput(SMPLHOutput):
    """``expression`` (B, E); ``jaw_pose`` as given, or the model's own."""

    expression: Tensor | None = None
    jaw_pose: Tensor | None = None
