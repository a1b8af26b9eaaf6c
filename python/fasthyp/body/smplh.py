"""SMPL+H (Romero et al., "Embodied Hands", SIGGRAPH Asia 2017): SMPL with hands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthyp.body.arrays import BodyArrays
from fasthyp.body.outputs import SMPLHOutput
from fasthyp.body.rotations import form_of, in_form
from fasthyp.body.skinning import Rotation
from fasthyp.body.smpl import SMPL

_HAND = 15
_HANDS = ("left_hand_pose", "right_hand_pose")


class SMPLH(SMPL):
    """SMPL with articulated hands: 6890 vertices, 52 joints.

    Args, beyond those of :class:`~fasthyp.body.SMPL`:
        create_left_hand_pose, left_hand_pose, and the right ones: as for the other parts.
        use_pca: whether hand poses are principal components; otherwise axis angles (B, 45).
        num_pca_comps: how many of them.
        flat_hand_mean: whether a zero hand pose is the flat hand, not the mean of the data.
    """

    NUM_BODY_JOINTS = 21
    NUM_HAND_JOINTS = _HAND
    NUM_JOINTS = NUM_BODY_JOINTS + 2 * _HAND
    _STEM = "SMPLH"
    _PARTS: tuple[tuple[str, int], ...] = (
        ("global_orient", 1),
        ("body_pose", 21),
        ("left_hand_pose", _HAND),
        ("right_hand_pose", _HAND),
    )
    _output: Any = SMPLHOutput

    left_hand_components: Tensor
    right_hand_components: Tensor
    left_hand_mean: Tensor
    right_hand_mean: Tensor
    pose_mean: Tensor

    def __init__(
        self,
        model_path: str | os.PathLike[str] | Mapping[str, Any],
        create_left_hand_pose: bool = True,
        left_hand_pose: Tensor | None = None,
        create_right_hand_pose: bool = True,
        right_hand_pose: Tensor | None = None,
        use_pca: bool = True,
        num_pca_comps: int = 6,
        flat_hand_mean: bool = False,
        **settings: Any,
    ) -> None:
        if not 0 < num_pca_comps <= 3 * _HAND:
            raise ValueError(f"num_pca_comps: expected 1 to {3 * _HAND}, got {num_pca_comps}")
        self.use_pca, self.num_pca_comps = use_pca, num_pca_comps
        self.flat_hand_mean = flat_hand_mean
        self._hands = (
            (create_left_hand_pose, left_hand_pose),
            (create_right_hand_pose, right_hand_pose),
        )
        super().__init__(model_path, **settings)
        del self._hands

    def _finish(self, arrays: BodyArrays) -> None:
        for side, (create, value) in zip(("left", "right"), self._hands, strict=True):
            components = arrays.extra(f"hands_components{side[0]}", None, 3 * _HAND)
            mean = arrays.extra(f"hands_mean{side[0]}", 3 * _HAND)
            count = min(self.num_pca_comps, len(components))
            if self.use_pca:
                kept = torch.tensor(components[:count], dtype=self.dtype)
                self.register_buffer(f"{side}_hand_components", kept)
            mean = np.zeros_like(mean) if self.flat_hand_mean else mean
            self.register_buffer(f"{side}_hand_mean", torch.tensor(mean, dtype=self.dtype))
            width = count if self.use_pca else 3 * _HAND
            self._own(f"{side}_hand_pose", create, value, width)
        before = 3 * sum(joints for name, joints in self._PARTS if name not in _HANDS)
        still = torch.zeros(before, dtype=self.dtype)
        self.register_buffer(
            "pose_mean", torch.cat([still, self.left_hand_mean, self.right_hand_mean])
        )

    def name(self) -> str:
        return "SMPL+H"

    def _reported(self) -> tuple[str, ...]:
        return (*super()._reported(), *_HANDS)

    def _with_mean(self, pose: Tensor) -> Tensor:
        return pose + self.pose_mean

    def _part(
        self, name: str, joints: int, value: Tensor | None, form: Rotation
    ) -> tuple[Tensor | None, Tensor]:
        if name not in _HANDS or (value is not None and form != "axis_angle"):
            return super()._part(name, joints, value, form)
        value = getattr(self, name, None) if value is None else value
        side = name.removesuffix("_pose")
        if value is None:
            angles = self._rest(joints, "axis_angle")
            if form != "axis_angle":  # without parameters: the flat hand, as smplx's layers
                return super()._part(name, joints, value, form)
        elif self.use_pca:
            components = getattr(self, f"{side}_components")
            angles = self._rows(name, value, len(components)) @ components
        else:
            angles = self._rotations(name, value, joints, "axis_angle")
        if form == "axis_angle":
            return angles, angles
        turned = in_form(angles + getattr(self, f"{side}_mean"), form)
        return turned, turned

    def forward(  # type: ignore[override]
        self,
        betas: Tensor | None = None,
        global_orient: Tensor | None = None,
        body_pose: Tensor | None = None,
        left_hand_pose: Tensor | None = None,
        right_hand_pose: Tensor | None = None,
        transl: Tensor | None = None,
        return_verts: bool = True,
        return_full_pose: bool = False,
        pose2rot: bool = True,
        vertices: bool = True,
        rotation: Rotation | None = None,
        **others: Any,
    ) -> Any:
        """Pose bodies, as :meth:`SMPL.forward <fasthyp.body.SMPL.forward>`.

        Args, beyond those:
            body_pose: (B, 63) rad, or (B, 21, 3, 3).
            left_hand_pose, right_hand_pose: (B, number of components), or (B, 45) rad without
                them; with ``pose2rot=False`` matrices (B, 15, 3, 3), to which no mean is added.

        Returns:
            :class:`~fasthyp.body.outputs.SMPLHOutput`, joints (B, 73, 3).
        """
        parts = {
            "global_orient": global_orient,
            "body_pose": body_pose,
            "left_hand_pose": left_hand_pose,
            "right_hand_pose": right_hand_pose,
        }
        self._no_others(others)
        mesh, form = return_verts and vertices, form_of(rotation, pose2rot)
        return self._run(parts, betas, None, transl, mesh, return_full_pose, form)
