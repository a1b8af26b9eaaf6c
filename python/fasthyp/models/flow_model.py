"""What models with a conditional flow over poses share; and those whose poses are rotations of a
body: from latents to rotations, joints and vertices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fasthyp.body import SMPL, SMPLX, LinearBody
from fasthyp.body.joint_maps import H36M17_JOINTS, SMPL24_JOINTS, SMPL45_JOINTS
from fasthyp.body.stick import h36m17_regressor, stick_body
from fasthyp.data.persons import PersonBatch
from fasthyp.geometry import Rotation6D, matrix_to_rotation_6d, rotation_6d_to_matrix
from fasthyp.models._pretrained import PretrainedModel
from fasthyp.models.hypotheses import Hypotheses
from fasthyp.reference.coupling import standard_normal_log_prob
from fasthyp.sampling import SamplerCache

SMPLX_BODY_JOINTS = (*SMPL24_JOINTS[:22], *SMPL45_JOINTS[24:35])
"""Of a call of SMPL-X the joints of the body: its skeleton, nose, eyes, ears and feet."""
_SMPLX_BODY = (*range(22), *range(55, 66))


class PosedBody(Protocol):
    """A body under rotations of its joints, as the models here see it."""

    joint_names: tuple[str, ...]

    def __call__(
        self, betas: Tensor, rotations: Tensor, vertices: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Joints (N, K, 3) m, and vertices (N, V, 3) m where wanted, of shapes (N, S) and rotation
        matrices (N, J, 3, 3), the root's first."""
        ...


class BodyJoints(nn.Module):
    """A body of :mod:`fasthyp.body` as a :class:`PosedBody`; joints are computed without the mesh.

    Joints beyond those whose rotations are given (hands, face) stay at rest.

    Args:
        body: SMPL, SMPL-X, or any :class:`~fasthyp.body.LinearBody`.
        regressor: (K, V) of the joints, in place of the model's own.
        joint_names: the K joints; needed with a regressor, and for a body of other joints than
            SMPL's.
    """

    regressor: Tensor | None

    def __init__(
        self,
        body: LinearBody,
        regressor: Tensor | None = None,
        joint_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(body, LinearBody):
            raise TypeError(f"body: expected a LinearBody, got {type(body).__name__}")
        self.body = body
        self._family = isinstance(body, SMPL)
        self._chosen: list[int] | None = None
        own: tuple[str, ...] | None = None
        if isinstance(body, SMPLX):
            own = SMPLX_BODY_JOINTS
            self._chosen = list(_SMPLX_BODY) if regressor is None else None
        elif isinstance(body, SMPL):
            own = SMPL45_JOINTS
        elif len(body.parents) == len(SMPL24_JOINTS):
            own = SMPL24_JOINTS
        if joint_names is None and (regressor is not None or own is None):
            raise ValueError("joint_names: expected the names of the joints")
        number = len(regressor if regressor is not None else own or body.parents)
        self.joint_names = tuple(own or ()) if joint_names is None else tuple(joint_names)
        if len(self.joint_names) != number:
            raise ValueError(f"joint_names: expected {number}, got {len(self.joint_names)}")
        turned = body.NUM_BODY_JOINTS + 1 if isinstance(body, SMPL) else len(body.parents)
        self._turned = turned
        self.register_buffer("regressor", regressor, persistent=False)

    def forward(
        self, betas: Tensor, rotations: Tensor, vertices: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        missing = self._turned - rotations.shape[1]
        if missing > 0:
            still = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
            still = still.expand(len(rotations), missing, 3, 3)
            rotations = torch.cat([rotations, still], 1)
        pose = {"pose": rotations}
        if self._family:
            pose = {"global_orient": rotations[:, :1], "body_pose": rotations[:, 1:]}
        body: Any = self.body
        joints = body.joints(betas=betas, regressor=self.regressor, pose2rot=False, **pose)
        if self._chosen is not None:
            joints = joints[:, self._chosen]
        mesh = body(betas=betas, pose2rot=False, **pose).vertices if vertices else None
        return joints, mesh


@dataclass(frozen=True)
class BodyPrediction:
    """M poses of each of B persons, and their one shape and camera.

    Attributes:
        pose_6d: (B, M, 6 J) as the flow gives them, not orthonormal.
        rotations: (B, M, J, 3, 3), the root's first.
        betas: (B, S).
        camera: (B, 3) weak perspective (s, t_x, t_y) of the crop.
        log_prob: (B, M) nats, of ``pose_6d``.
    """

    pose_6d: Tensor
    rotations: Tensor
    betas: Tensor
    camera: Tensor
    log_prob: Tensor


class FlowModel(PretrainedModel):
    """A conditional flow over D numbers of a pose.

    A subclass has the flow as ``flow`` and says how rows pass through it.

    Args:
        config, changes: as of :class:`PretrainedModel`.
        backbone: from a batch's ``features`` to (B, C); not saved with the model.
    """

    flow: Any
    dims: int

    def __init__(
        self, config: Any = None, backbone: nn.Module | None = None, **changes: Any
    ) -> None:
        super().__init__(config, **changes)
        self.backbone = backbone
        self._samplers = SamplerCache()

    def condition(self, persons: PersonBatch) -> Tensor:
        """The condition (B, C) of the flow.

        Raises:
            ValueError: the batch lacks what it is made of; names it.
        """
        raise NotImplementedError

    def _to_latent(self, rows: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, D), conditions (N, C) -> latents (N, D), log|det| (N,)."""
        raise NotImplementedError

    def _from_latent(self, z: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, M, D), conditions (B, C) -> (B, M, D), log|det| (B, M)."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities (B, M) in nats of x (B, M, D) under conditions (B, C); latents (B, M, D).

        Raises:
            ValueError: other shapes.
        """
        self._check("x", x, cond)
        z, log_det = self._to_latent(x.flatten(0, 1), cond.repeat_interleave(x.shape[1], 0))
        log_prob = standard_normal_log_prob(z) + log_det
        return log_prob.reshape(x.shape[:2]), z.reshape(x.shape)

    def _check(self, name: str, x: Tensor, cond: Tensor) -> None:
        if x.dim() != 3 or cond.dim() != 2 or x.shape[::2] != (len(cond), self.dims):
            raise ValueError(
                f"{name}: expected shape (B, M, {self.dims}) with conditions (B, C), "
                f"got {tuple(x.shape)} and {tuple(cond.shape)}"
            )

    def _inputs(self, persons: PersonBatch, trunk: nn.Module | None, width: int) -> Tensor:
        """The batch's features (B, width), through the backbone and then the trunk, where there
        are any."""
        (features,) = persons.need("features")
        if self.backbone is not None:
            features = self.backbone(features)
        if features.dim() != 2 or features.shape[1] != width:
            expected = (
                f"(B, {width})" if self.backbone is not None else f"(B, {width}), or a backbone"
            )
            raise ValueError(f"persons.features: expected {expected}, got {tuple(features.shape)}")
        return features if trunk is None else trunk(features)

    def _draw(
        self,
        cond: Tensor,
        num_samples: int,
        seed: int | None,
        include_mode: bool,
        precision: str,
        image_offset: int,
    ) -> tuple[Tensor, Tensor]:
        """(B, M, D) and log-densities (B, M), without gradients, in eval mode."""
        x, log_prob = self._samplers.get(self.flow, precision)(
            cond,
            num_samples,
            seed=seed,
            include_mode=include_mode,
            return_log_prob=True,
            image_offset=image_offset,
        )
        return x, log_prob

    def saved_state(self) -> dict[str, Tensor]:
        """All but the backbone and the body."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith(("backbone.", "body."))
        }

    def trained_parameters(self) -> list[nn.Parameter]:
        """What a recipe optimises: all but the body, and the backbone's where they want to be."""
        named = self.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith("body.")]


class BodyFlow(FlowModel):
    """A conditional flow over 6D rotations of a body, with one shape and camera for each person.

    Its configuration has ``body``: ``"stick"`` for simulated persons' stick body where no body is
    given, ``""`` for none.

    Args:
        config, changes: as of :class:`PretrainedModel`.
        body: for joints and vertices; its arrays are not saved with the model.
        backbone: from a batch's ``features`` to (B, C); not saved with the model.
    """

    convention: ClassVar[Rotation6D]
    joints: int

    def __init__(
        self,
        config: Any = None,
        body: Any = None,
        backbone: nn.Module | None = None,
        **changes: Any,
    ) -> None:
        super().__init__(config, backbone, **changes)
        self.body: Any = named_body(self.config.body) if body is None else body

    @property
    def dims(self) -> int:  # type: ignore[override]
        """D = 6 J."""
        return 6 * self.joints

    def shape_and_camera(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes (B, S) and weak-perspective cameras (B, 3) of conditions (B, C)."""
        raise NotImplementedError

    def project(self, joints: Tensor, camera: Tensor, persons: PersonBatch) -> Tensor:
        """Where joints (B, M, K, 3) are seen, (B, M, K, 2) in crop coordinates from -1 to 1."""
        raise NotImplementedError

    def to_6d(self, rotations: Tensor) -> Tensor:
        """The flow's numbers (..., 6 J) of rotation matrices (..., J, 3, 3)."""
        return matrix_to_rotation_6d(rotations, self.convention).flatten(-2)

    def target(self, persons: PersonBatch) -> Tensor:
        """The true rotations (B, J, 3, 3) of a batch, of the joints that the model has.

        Raises:
            ValueError: the batch does not know them, or has fewer joints.
        """
        root, others = persons.need("global_orient", "body_pose")
        rotations = torch.cat([root[:, None], others], 1)
        if rotations.shape[1] < self.joints:
            raise ValueError(
                f"persons.body_pose: expected at least {self.joints - 1} joints, "
                f"got {others.shape[1]}"
            )
        return rotations[:, : self.joints]

    def decode(self, z: Tensor, cond: Tensor) -> BodyPrediction:
        """What latents (B, M, D) stand for under conditions (B, C), with gradients.

        Raises:
            ValueError: other shapes.
        """
        self._check("z", z, cond)
        pose, log_det = self._from_latent(z, cond)
        return self._prediction(pose, cond, standard_normal_log_prob(z) - log_det)

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor,
        num_samples: int,
        seed: int | None = None,
        include_mode: bool = True,
        precision: str = "high",
        image_offset: int = 0,
    ) -> BodyPrediction:
        """Hypotheses of conditions (B, C), as in eval mode; the first is the mode, z = 0, with
        ``include_mode``. Arguments as of :class:`fasthyp.HypothesisSampler`."""
        pose, log_prob = self._draw(cond, num_samples, seed, include_mode, precision, image_offset)
        return self._prediction(pose, cond, log_prob)

    def _prediction(self, pose: Tensor, cond: Tensor, log_prob: Tensor) -> BodyPrediction:
        rotations = rotation_6d_to_matrix(pose.unflatten(-1, (-1, 6)), self.convention)
        betas, camera = (value.to(pose.dtype) for value in self.shape_and_camera(cond))
        return BodyPrediction(pose, rotations, betas, camera, log_prob)

    def pose(
        self, prediction: BodyPrediction, vertices: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Joints (B, M, K, 3) m, and vertices (B, M, V, 3) m where wanted, of a prediction; in
        camera axes, where the body has them.

        Raises:
            ValueError: the model has no body.
        """
        if self.body is None:
            raise ValueError("body: expected one, for joints; the model was made without")
        batch, number = prediction.rotations.shape[:2]
        betas = prediction.betas.repeat_interleave(number, 0)
        joints, mesh = self.body(betas, prediction.rotations.flatten(0, 1), vertices=vertices)
        joints = joints.unflatten(0, (batch, number))
        return joints, None if mesh is None else mesh.unflatten(0, (batch, number))

    @torch.no_grad()
    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
        image_offset: int = 0,
    ) -> Hypotheses:
        """Hypotheses of persons, see :class:`fasthyp.models.Hypothesiser`; the root of each at the
        origin.

        Raises:
            ValueError: the model has no body, or the batch lacks what the condition is made of.
        """
        with evaluating(self):
            cond = self.condition(persons)
            prediction = self.sample(
                cond, num_samples, seed, include_mode, image_offset=image_offset
            )
        joints, mesh = self.pose(prediction, vertices)
        root = joints[:, :, list(root_joints(self.body.joint_names))].mean(2, keepdim=True)
        return Hypotheses(
            joints - root,
            tuple(self.body.joint_names),
            prediction.log_prob,
            None if mesh is None else mesh - root,
        )


def named_body(name: str) -> BodyJoints | None:
    """``"stick"``: :func:`stick_joints`; ``""``: none.

    Raises:
        ValueError: another name.
    """
    if name not in ("", "stick"):
        raise ValueError(f"body: expected 'stick' or nothing, got {name!r}")
    return stick_joints() if name else None


def stick_joints() -> BodyJoints:
    """The stick body of simulated persons, with Human3.6M's joints."""
    return BodyJoints(stick_body(), h36m17_regressor(), H36M17_JOINTS)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every part is in the mode in which it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            if part.training != training:
                part.train(training)


def root_joints(names: Sequence[str]) -> tuple[int, ...]:
    """The joints in whose middle the root is: the pelvis, or else both hips.

    Raises:
        ValueError: neither is there.
    """
    for wanted in (("pelvis",), ("left_hip", "right_hip")):
        if all(name in names for name in wanted):
            return tuple(list(names).index(name) for name in wanted)
    raise ValueError(f"joint_names: expected a pelvis or hips, got {tuple(names)}")
