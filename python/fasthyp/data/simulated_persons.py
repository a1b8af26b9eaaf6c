"""Persons for training without photographs: motion capture in a stick body, seen by the simulated
detector of :mod:`fasthyp.data.simulate`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fasthyp.body.stick import (
    H36M17_POINTS,
    SHAPE_STEP,
    STICK_SHAPES,
    fit_stick_pose,
    fit_stick_shape,
    point_indices,
    stick_body,
)
from fasthyp.data.gaussian_features import standard_features
from fasthyp.data.mocap import load_cmu
from fasthyp.data.persons import PersonBatch
from fasthyp.data.simulate import (
    GRID,
    VISIBLE,
    DetectorJoints,
    Random,
    SimulationConfig,
    detector_fits,
    detector_states,
    look,
)
from fasthyp.geometry import axis_angle_to_matrix
from fasthyp.skeleton import (
    COCO13_JOINTS,
    COCO17_JOINTS,
    H36M17_JOINTS,
    MPII16_JOINTS,
    SMPL24_JOINTS,
)

PARTS = ("train", "validation", "test")

DETECTORS = {
    "h36m17": H36M17_JOINTS,
    "mpii16": MPII16_JOINTS,
    "coco13": COCO13_JOINTS,
    "coco17": COCO17_JOINTS,
}
"""Joint sets of the simulated detector by name."""


class PersonSource(Protocol):
    """Where recipes get their persons from."""

    def sample(self, number: int, seed: int, part: str) -> PersonBatch:
        """Persons of ``"train"``, ``"validation"`` or ``"test"``; the same arguments give the
        same persons."""
        ...


@dataclass(frozen=True)
class StickPoses:
    """Motion capture as rotations of the stick body.

    Attributes:
        rotations: (N, 24, 3, 3) relative to the parent; the root's into world axes, z up.
        betas: (N, 10).
        subject: (N,).
        error: (N, 17) metres, how far the body's joints are from the captured ones.
    """

    rotations: Tensor
    betas: Tensor
    subject: Tensor
    error: Tensor


def stick_poses(poses: Tensor, subject: Tensor | None = None) -> StickPoses:
    """Fit the stick body to poses: one shape a subject, rotations in closed form.

    Args:
        poses: (N, 17, 3) metres, Human3.6M's joints, world axes with z up.
        subject: (N,) whose they are; one person's by default.

    Raises:
        TypeError, ValueError: poses of another shape or type, not finite, or with joints in one
            place, so that the body cannot be turned to them.
    """
    if not isinstance(poses, Tensor) or not poses.is_floating_point():
        raise TypeError("poses: expected a floating point tensor")
    if poses.ndim != 3 or poses.shape[1:] != (17, 3) or len(poses) == 0:
        raise ValueError(f"poses: expected (N, 17, 3) with N > 0, got {tuple(poses.shape)}")
    if not torch.isfinite(poses).all():
        raise ValueError("poses: expected finite values, got NaN or infinity")
    poses = poses.float() - poses[:, :1].float()
    if subject is None:
        subject = torch.zeros(len(poses), dtype=torch.int64)
    betas = poses.new_empty(len(poses), len(STICK_SHAPES))
    for number in subject.unique():
        betas[subject == number] = fit_stick_shape(poses[subject == number])
    rotations = fit_stick_pose(poses, betas)
    vertices = stick_body()(betas, rotations, pose2rot=False).vertices
    assert vertices is not None
    error = (vertices[:, H36M17_POINTS] - poses).norm(dim=-1)
    return StickPoses(rotations, betas, subject, error)


class SimulatedPersons:
    """Persons of motion capture poses, random cameras and a simulated 2D detector.

    The captured joints are replaced by those of a stick body (:func:`fasthyp.body.stick_body`)
    in the same pose, so that rotations, shape, vertices and joints agree exactly; see
    :class:`StickPoses` for how far that moves them. ``"train"`` persons have varied poses, shapes
    and balanced subjects; the others are as captured, but for random cameras and detections.

    Args:
        data: CMU poses, see :func:`fasthyp.data.load_cmu`; or a mapping of the parts' names to
            :class:`StickPoses`.
        detector: which joints it finds: a name of :data:`DETECTORS`, or names of joints.
        config: cameras and augmentation; ``noise_mm`` is not used, joints are exact.
        heatmaps: also render the Gaussians as heatmaps (B, K, 64, 64).
        subject_balance: training frames of a subject with n frames have the weight
            n ** (balance - 1).

    Attributes:
        body: the stick body.
        detector_names: the K joints.

    Raises:
        ValueError: unusable data, or an unknown detector or joint.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | dict[str, StickPoses],
        detector: str | Sequence[str] = "h36m17",
        config: SimulationConfig | None = None,
        heatmaps: bool = False,
        subject_balance: float = 0.1,
    ) -> None:
        if isinstance(detector, str):
            if detector not in DETECTORS:
                raise ValueError(
                    f"detector: expected one of {', '.join(DETECTORS)}, got {detector!r}"
                )
            detector = DETECTORS[detector]
        self.detector = DetectorJoints(detector)
        self.detector_names = self.detector.names
        self._detected = point_indices(self.detector_names)
        self.config = config or SimulationConfig()
        self.heatmaps = heatmaps
        self.subject_balance = subject_balance
        self.body = stick_body()
        if not isinstance(data, dict):
            path, data = data, {}
            for part in PARTS:
                poses = load_cmu(path, part, "h36m17")
                data[part] = stick_poses(poses.poses, poses.subject)
        self.poses = data

    def to(self, device: torch.device | str) -> SimulatedPersons:
        """Draw on ``device`` from now on; a GPU's persons differ from a CPU's."""
        self.body.to(device)
        self.poses = {
            part: StickPoses(**{name: value.to(device) for name, value in vars(poses).items()})
            for part, poses in self.poses.items()
        }
        return self

    def sample(
        self, number: int, seed: int, part: str = "train", index: Tensor | None = None
    ) -> PersonBatch:
        """Draw persons.

        Args:
            number: how many.
            seed: the same gives the same persons.
            part: ``"train"``, ``"validation"`` or ``"test"``.
            index: (B,) which poses of the part instead of random ones.

        Returns:
            Every field of :class:`PersonBatch` but ``heatmaps``, unless they were asked for;
            ``features`` are :func:`standard_features` (B, 6 K). Joints are Human3.6M's 17.

        Raises:
            ValueError: a part that there is none of, or no persons.
        """
        if part not in self.poses:
            raise ValueError(f"part: expected one of {', '.join(self.poses)}, got {part!r}")
        if number < 1:
            raise ValueError(f"number: expected at least 1, got {number}")
        poses = self.poses[part]
        device = poses.betas.device
        generator = torch.Generator(device).manual_seed((seed * 3 + PARTS.index(part)) % 2**63)
        if index is None:
            index = self._draw(poses, number, generator, balanced=part == "train")
        random = Random(len(index), generator, device)
        rotations, betas = poses.rotations[index], poses.betas[index]
        if part == "train" and self.config.augment:
            rotations, betas = self._vary(poses, rotations, betas, random)
        return self._observe(rotations, betas, random)

    def _draw(
        self, poses: StickPoses, number: int, generator: torch.Generator, balanced: bool
    ) -> Tensor:
        device = poses.betas.device
        if not balanced:
            return torch.randint(len(poses.betas), (number,), generator=generator, device=device)
        _, group, counts = poses.subject.unique(return_inverse=True, return_counts=True)
        cumulative = (counts[group].double() ** (self.subject_balance - 1)).cumsum(0)
        chance = torch.rand(number, generator=generator, device=device, dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, chance * cumulative[-1])
        return drawn.clamp_(max=len(poses.betas) - 1)

    def _vary(
        self, poses: StickPoses, rotations: Tensor, betas: Tensor, random: Random
    ) -> tuple[Tensor, Tensor]:
        """The augmentation of :class:`~fasthyp.data.PoseSimulator`, on rotations."""
        config, number = self.config, len(betas)
        rotations = rotations.clone()
        normal, uniform = random.normal, random.uniform

        # Legs, and each arm, of other frames.
        for joints in (_LEGS, *_ARMS):
            other = self._draw(poses, number, random.generator, balanced=True)
            take = uniform(1, 1, 1) < config.mix
            mixed = torch.where(take, poses.rotations[other][:, joints], rotations[:, joints])
            rotations[:, joints] = mixed

        # More upright and seated people than motion capture shows.
        root = rotations[:, 0].clone()
        up = root.new_tensor([0.0, 0.0, 1.0]).expand(number, 3)
        trunk = root @ rotations[:, _SPINE1] @ rotations[:, _SPINE2]
        axis = torch.linalg.cross(trunk[..., 1], up, dim=-1)
        lean = torch.atan2(axis.norm(dim=-1), trunk[:, 2, 1])
        share = torch.where(uniform() < config.upright, uniform(), 0.0)
        axis = torch.nn.functional.normalize(axis, dim=-1)
        righting = axis_angle_to_matrix(axis * (lean * share)[:, None])
        rotations[:, _SPINE1] = root.mT @ righting @ root @ rotations[:, _SPINE1]
        seated = self._seat(root, random)
        sits = uniform(1, 1, 1) < config.seated
        rotations[:, _HIPS_KNEES] = torch.where(sits, seated, rotations[:, _HIPS_KNEES])

        # Random turns of the trunk, the head and every limb segment.
        for joints, degrees in (((_SPINE1,), config.trunk_deg), (_HINGES, config.joint_deg)):
            turn = axis_angle_to_matrix(normal(len(joints), 3) * math.radians(degrees))
            rotations[:, joints] = turn @ rotations[:, joints]
        yaw = normal(1) * math.radians(config.head_deg) * root.new_tensor([0.0, 1.0, 0.0])
        rotations[:, _NECK] = axis_angle_to_matrix(yaw) @ rotations[:, _NECK]

        # Lengths of limbs and of the whole body, then the mirror image of every other person.
        growth = normal(len(STICK_SHAPES)) * config.limb_std + normal(1) * config.scale_std
        betas = betas + growth / SHAPE_STEP
        flipped = rotations[:, _MIRROR] * _MIRROR_SIGNS.to(rotations)
        return torch.where(uniform(1, 1, 1) < 0.5, flipped, rotations), betas

    @staticmethod
    def _seat(root: Tensor, random: Random) -> Tensor:
        """Hips and knees (B, 4, 3, 3): thighs forward and shanks down, whatever the root's turn."""
        normal = random.normal
        sideways = root[..., 0] * root.new_tensor([1.0, 1.0, 0.0])
        sideways = torch.nn.functional.normalize(sideways, dim=-1)
        up = torch.zeros_like(sideways)
        up[:, 2] = 1
        level = torch.stack([sideways, up, torch.linalg.cross(sideways, up, dim=-1)], -1)
        zero = torch.zeros(len(root), device=root.device)

        def about(axis: int, angle: Tensor) -> Tensor:
            parts = [zero, zero, zero]
            parts[axis] = angle
            return axis_angle_to_matrix(torch.stack(parts, -1))

        # A pitch of 0 points a leg forward, of pi / 2 down.
        thigh_pitch, shank_pitch = 0.1 + 0.2 * normal(), 1.6 + 0.3 * normal()
        hips, knees = [], []
        for outward in (1.0, -1.0):
            splay = about(1, outward * 0.15 + 0.2 * normal())
            thigh = about(0, thigh_pitch + 0.15 * normal() - math.pi / 2)
            shank = about(0, shank_pitch + 0.2 * normal() - math.pi / 2)
            hips.append(root.mT @ level @ splay @ thigh)
            knees.append(thigh.mT @ shank)
        return torch.stack([*hips, *knees], 1)

    def _observe(self, rotations: Tensor, betas: Tensor, random: Random) -> PersonBatch:
        vertices = self.body(betas, rotations, pose2rot=False).vertices
        view = look(vertices[:, self._detected], self.detector, self.config, random)
        vertices = vertices @ view.rotation.mT
        state = detector_states(view, self.detector, random)
        mean, covariance, amplitude = detector_fits(view.projected, state, self.detector, random)
        joints = vertices[:, H36M17_POINTS]
        return PersonBatch(
            joints_3d=joints,
            joints_2d=view.project(joints),
            translation=view.translation,
            focal_length=view.focal_length,
            centre=view.centre,
            amplitude=amplitude,
            mean=mean,
            covariance=covariance,
            visible=state == VISIBLE,
            heatmaps=render_gaussians(amplitude, mean, covariance) if self.heatmaps else None,
            features=standard_features(amplitude, mean, covariance),
            global_orient=view.rotation @ rotations[:, 0],
            body_pose=rotations[:, 1:],
            betas=betas,
            vertices=vertices,
            joint_names=H36M17_JOINTS,
            detector_names=self.detector_names,
        )


def simulate_persons(
    poses: Tensor,
    seed: int = 0,
    detector: str | Sequence[str] = "h36m17",
    config: SimulationConfig | None = None,
    heatmaps: bool = False,
    subject: Tensor | None = None,
) -> PersonBatch:
    """Poses as a simulated detector sees them: each once, by a random camera.

    Args:
        poses: (N, 17, 3) metres, Human3.6M's joints, world axes with z up, anywhere in the world.
        seed: of cameras and detections.
        detector, config, heatmaps: as of :class:`SimulatedPersons`; poses are not varied.
        subject: (N,) whose they are; one person's by default.

    Raises:
        TypeError, ValueError: as :func:`stick_poses` and :class:`SimulatedPersons`.
    """
    parts = {"test": stick_poses(poses, subject)}
    source = SimulatedPersons(parts, detector, config, heatmaps)
    return source.sample(len(poses), seed, "test", torch.arange(len(poses)))


def render_gaussians(
    amplitude: Tensor, mean: Tensor, covariance: Tensor, size: int = GRID
) -> Tensor:
    """Heatmaps (B, K, size, size) that a perfect fit returns these Gaussians for.

    Args:
        amplitude, mean, covariance: (B, K), (B, K, 2), (B, K, 2, 2), x right, y down, in cells;
            the centre of the first cell is at 0.
    """
    cells = torch.arange(size, dtype=mean.dtype, device=mean.device)
    precision = torch.linalg.inv(covariance)
    x = cells[None, :] - mean[..., 0, None, None]
    y = cells[:, None] - mean[..., 1, None, None]
    a, b, d = (precision[..., i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    return amplitude[..., None, None] * torch.exp(-0.5 * (a * x * x + 2 * b * x * y + d * y * y))


def _joints(*names: str) -> tuple[int, ...]:
    return tuple(SMPL24_JOINTS.index(name) for name in names)


def _both(*kinds: str) -> tuple[int, ...]:
    return _joints(*(f"{side}_{kind}" for kind in kinds for side in ("left", "right")))


_SPINE1, _SPINE2, _NECK = _joints("spine1", "spine2", "neck")
_LEGS = _both("hip", "knee", "ankle", "foot")
_ARMS = tuple(
    _joints(*(f"{side}_{kind}" for kind in ("collar", "shoulder", "elbow", "wrist", "hand")))
    for side in ("left", "right")
)
_HIPS_KNEES = _both("hip", "knee")
_HINGES = _both("shoulder", "elbow", "hip", "knee")
_MIRROR = tuple(
    SMPL24_JOINTS.index(
        name.replace("left", "right") if "left" in name else name.replace("right", "left")
    )
    for name in SMPL24_JOINTS
)
# The mirror image of a rotation, in the plane x = 0 of the body and of the world, is F R F with
# F = diag(-1, 1, 1).
_MIRROR_SIGNS = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
