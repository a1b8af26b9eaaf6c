"""Simulated detector: 3D poses seen by random cameras, as the Gaussians a heatmap fit returns.

Everything is vectorised over the batch and drawn from one ``torch.Generator``, so a seed fixes the
batch. The 2D statistics (standard deviation per joint state, amplitude, anisotropy along the limb,
true error for a given standard deviation) follow rotated-Gaussian fits to real 64x64 heatmaps of a
sigmoid-output detector, measured on photographs with human 2D labels; see the model card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasthyp.skeleton import COCO13_JOINTS, COCO13_MIRROR

GRID = 64
VISIBLE, HIDDEN, OUTSIDE = 0, 1, 2

# Fitted std in cells: floor + median * exp(spread * n), per joint where visible, else per state.
_FLOOR = 1.0
_STATE_SPREAD = (0.80, 0.98, 0.75)
_HIDDEN_MEDIAN, _OUTSIDE_MEDIAN = 1.25, 2.75
_MAX_STD = 10.0
# Amplitude of the fit: the wider, the lower.
_AMPLITUDE, _AMPLITUDE_SPREAD = 1.27, 0.13
# Spread of log(major / minor) per state, and of the major axis about the limb (radians).
_ELONGATION = (0.24, 0.50, 0.65)
_AXIS_SPREAD = (0.30, 0.55, 0.60)
# True error as a multiple of the fitted std: narrow maps are wider than their error, broad ones
# narrower. A share of joints are outliers of several times that.
_ERROR_STD = (1.2, 2.0, 2.6, 3.7, 5.3)
_ERROR_RATIO = (0.58, 0.62, 0.85, 1.05, 1.2)
_OUTLIER_SHARE, _OUTLIER_FACTOR = 0.04, 4.0
# Outside the picture there are no labels to compare with, and nothing that a detector could see.
_OUTSIDE_ERROR = 1.3
# A detector that does not see a joint pulls it towards its parent (lower bound of the factor).
# Nearly all cut-off legs it only imagines, hanging down, at so many trunk lengths a segment.
_PULL = (1.0, 0.85, 0.40)
_IMAGINED_SHARE, _IMAGINED_LENGTH = 0.9, (0.15, 1.0)

# Of each kind of joint: the median above where it is visible, and how often it is hidden though
# inside the picture. Only the COCO body joints were measured; other points of the trunk have the
# numbers of the shoulders or the hips, other points of the head those of the nose.
_KINDS = {
    "head": (0.19, 0.0),
    "shoulder": (0.35, 0.0),
    "elbow": (0.32, 0.32),
    "wrist": (0.22, 0.34),
    "hip": (0.44, 0.0),
    "knee": (0.33, 0.32),
    "ankle": (0.26, 0.28),
}
_KIND_OF = {
    **dict.fromkeys(("nose", "eye", "ear", "head", "head_top"), "head"),
    **dict.fromkeys(("shoulder", "neck", "upper_neck", "thorax", "jaw"), "shoulder"),
    **dict.fromkeys(("hip", "pelvis", "spine"), "hip"),
    **{kind: kind for kind in ("elbow", "wrist", "knee", "ankle")},
}
_LIMBS = {"elbow": "shoulder", "wrist": "elbow", "knee": "hip", "ankle": "knee"}

_LEFT_ARM, _RIGHT_ARM = (1, 3, 5), (2, 4, 6)
_LEFT_LEG, _RIGHT_LEG = (7, 9, 11), (8, 10, 12)
_UPPER = (0, 1, 2, 3, 4, 5, 6)


class DetectorJoints:
    """What the simulated detector knows of its joints; all of it follows from their names.

    Args:
        names: such as ``COCO13_JOINTS``; with both shoulders and both hips.

    Raises:
        ValueError: a name that no statistics are known for, or no shoulders or hips.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        sides = [name.removeprefix("left_").removeprefix("right_") for name in self.names]
        for name, kind in zip(self.names, sides, strict=True):
            if kind not in _KIND_OF:
                raise ValueError(f"detector: unknown joint {name!r}")
        self.visible_median, self.hidden_rate = zip(
            *(_KINDS[_KIND_OF[kind]] for kind in sides), strict=True
        )
        self.shoulders, self.hips = self._pair("shoulder"), self._pair("hip")
        self.limbs: list[tuple[int, int]] = []
        """Joint and the one that it hangs on, nearer ones first."""
        for kind, parent in _LIMBS.items():
            for joint, name in enumerate(self.names):
                if sides[joint] == kind:
                    before = name.replace(kind, parent)
                    if before not in self.names:
                        raise ValueError(f"detector: {name} without {before}")
                    self.limbs.append((joint, self.names.index(before)))
        self.legs = [joint for joint, _ in self.limbs if sides[joint] in ("knee", "ankle")]

    def __len__(self) -> int:
        return len(self.names)

    def _pair(self, kind: str) -> tuple[int, int]:
        pair = (f"left_{kind}", f"right_{kind}")
        if not set(pair) <= set(self.names):
            raise ValueError(f"detector: expected joints {pair}, got {self.names}")
        return self.names.index(pair[0]), self.names.index(pair[1])


_COCO13 = DetectorJoints(COCO13_JOINTS)


@dataclass(frozen=True)
class SimulationConfig:
    """Ranges of the random cameras and of the pose augmentation.

    Attributes:
        elevation_deg: mean and standard deviation of the camera's downward tilt.
        roll_deg: standard deviation of the roll.
        off_axis_deg: standard deviation of the angle between the person and the optical axis.
        distance_m: nearest and farthest camera, drawn uniformly in the logarithm.
        scale_std, limb_std: log-normal spread of the body's size and of each limb's length.
        trunk_deg, joint_deg: spread of the random rotation of the trunk and each limb segment.
        head_deg: spread of the random head yaw.
        mix: chance that the legs, and each arm, come from another frame.
        upright: chance that the trunk's lean is reduced, by a random share of it.
        seated: chance that the legs are those of somebody sitting.
        noise_mm: isotropic Gaussian noise on the 3D target (after centring, so that the density
            has full rank).
        augment: False leaves the skeleton as it is (evaluation); cameras and 2D noise remain.
    """

    elevation_deg: tuple[float, float] = (4.0, 6.0)
    roll_deg: float = 5.0
    off_axis_deg: float = 3.0
    distance_m: tuple[float, float] = (2.2, 12.0)
    scale_std: float = 0.05
    limb_std: float = 0.04
    trunk_deg: float = 4.0
    joint_deg: float = 6.0
    head_deg: float = 20.0
    mix: float = 0.25
    upright: float = 0.7
    seated: float = 0.35
    noise_mm: float = 5.0
    augment: bool = True


@dataclass(frozen=True)
class SimulatedBatch:
    """B persons: the 3D pose and the Gaussians that a fit to their heatmaps would give.

    Attributes:
        pose: (B, 13, 3) metres, mid-hip centred, camera axes (x right, y down, z forward), with
            the configured target noise.
        clean_pose: (B, 13, 3) the same without that noise.
        amplitude: (B, 13).
        mean: (B, 13, 2) x, y in cells of a 64 x 64 heatmap.
        covariance: (B, 13, 2, 2) cells^2.
        true_mean: (B, 13, 2) the exact projection.
        state: (B, 13) 0 visible, 1 hidden, 2 outside the picture.
    """

    pose: Tensor
    clean_pose: Tensor
    amplitude: Tensor
    mean: Tensor
    covariance: Tensor
    true_mean: Tensor
    state: Tensor


def _axis_angle(axis: Tensor, angle: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) about unit axes (..., 3)."""
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    sine, cosine = angle.sin()[..., None, None], angle.cos()[..., None, None]
    return (
        torch.eye(3, dtype=axis.dtype, device=axis.device)
        + sine * cross
        + (1 - cosine) * (cross @ cross)
    )


def _rotate(points: Tensor, rotation: Tensor, pivot: Tensor) -> Tensor:
    """Rotate (B, K, 3) about (B, 3) by (B, 3, 3)."""
    return (points - pivot[:, None]) @ rotation.transpose(-1, -2) + pivot[:, None]


def mirror(pose: Tensor) -> Tensor:
    """Reflect poses (..., 13, 3) in the plane x = 0 and exchange left and right joints."""
    return pose[..., COCO13_MIRROR, :] * pose.new_tensor([-1.0, 1.0, 1.0])


def camera_rotation(azimuth: Tensor, elevation: Tensor, roll: Tensor) -> Tensor:
    """World (z up) to camera (x right, y down, z forward) rotations (..., 3, 3), angles in radians.

    A positive elevation looks down on the person.
    """
    zero, one = torch.zeros_like(azimuth), torch.ones_like(azimuth)
    ca, sa, ce, se = azimuth.cos(), azimuth.sin(), elevation.cos(), elevation.sin()
    forward = torch.stack([ca * ce, sa * ce, -se], -1)
    right = torch.stack([sa, -ca, zero], -1)
    down = torch.cross(forward, right, dim=-1)
    upright = torch.stack([right, down, forward], -2)
    cr, sr = roll.cos(), roll.sin()
    turn = torch.stack([cr, -sr, zero, sr, cr, zero, zero, zero, one], -1).unflatten(-1, (3, 3))
    return turn @ upright


class Random:
    """Noise of shape (B, ...) from one generator."""

    def __init__(self, batch: int, generator: torch.Generator, device: torch.device) -> None:
        self.batch, self.generator, self.device = batch, generator, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.batch, *shape, generator=self.generator, device=self.device)


def _seat(pose: Tensor, random: Random) -> Tensor:
    """Poses (B, 13, 3) with the thighs forward and the shanks down, each at random angles."""
    pose = pose.clone()
    left = pose[:, 7] - pose[:, 8]
    sideways = torch.nn.functional.normalize(left * left.new_tensor([1.0, 1.0, 0.0]), dim=-1)
    up = torch.zeros_like(left)
    up[:, 2] = 1
    forward = torch.cross(sideways, up, dim=-1)

    def direction(pitch: Tensor, splay: Tensor) -> Tensor:
        """Unit vectors: 0 points forward, a pitch of pi / 2 down, a splay of pi / 2 left."""
        level = splay.cos()[:, None] * forward + splay.sin()[:, None] * sideways
        return pitch.cos()[:, None] * level - pitch.sin()[:, None] * up

    thigh_pitch, shank_pitch = 0.1 + 0.2 * random.normal(), 1.6 + 0.3 * random.normal()
    for outward, (hip, knee, ankle) in ((1.0, _LEFT_LEG), (-1.0, _RIGHT_LEG)):
        thigh = (pose[:, knee] - pose[:, hip]).norm(dim=-1, keepdim=True)
        shank = (pose[:, ankle] - pose[:, knee]).norm(dim=-1, keepdim=True)
        splay = outward * 0.15 + 0.2 * random.normal()
        pose[:, knee] = pose[:, hip] + thigh * direction(
            thigh_pitch + 0.15 * random.normal(), splay
        )
        pose[:, ankle] = pose[:, knee] + shank * direction(
            shank_pitch + 0.2 * random.normal(), splay
        )
    return pose


class PoseSimulator:
    """Draws :class:`SimulatedBatch` from motion capture poses.

    Args:
        poses: (N, 13, 3) metres, mid-hip centred, world axes with z up.
        config: cameras and augmentation.
        weights: (N,) relative chance of each frame; uniform by default.
    """

    def __init__(
        self,
        poses: Tensor,
        config: SimulationConfig | None = None,
        weights: Tensor | None = None,
    ) -> None:
        if poses.ndim != 3 or poses.shape[1:] != (13, 3) or len(poses) == 0:
            raise ValueError(f"poses: expected (N, 13, 3) with N > 0, got {tuple(poses.shape)}")
        if weights is not None and weights.shape != poses.shape[:1]:
            raise ValueError(f"weights: expected ({len(poses)},), got {tuple(weights.shape)}")
        self.poses = poses
        self.config = config or SimulationConfig()
        self.cumulative = None if weights is None else weights.double().cumsum(0) / weights.sum()

    def to(self, device: torch.device | str) -> PoseSimulator:
        """Move the poses to ``device``; generators given to `sample` must be there too."""
        self.poses = self.poses.to(device)
        if self.cumulative is not None:
            self.cumulative = self.cumulative.to(device)
        return self

    def sample(
        self, batch: int, generator: torch.Generator, index: Tensor | None = None
    ) -> SimulatedBatch:
        """Draw ``batch`` persons, or one for each pose in ``index`` (B,)."""
        if index is None:
            index = self._draw_index(batch, generator)
        pose = self.poses[index]
        if self.config.augment:
            pose = self._augment(pose, generator)
        return self._observe(pose, generator)

    def _draw_index(self, batch: int, generator: torch.Generator) -> Tensor:
        device = self.poses.device
        if self.cumulative is None:
            return torch.randint(len(self.poses), (batch,), generator=generator, device=device)
        chance = torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
        return torch.searchsorted(self.cumulative, chance).clamp_(max=len(self.poses) - 1)

    def _augment(self, pose: Tensor, generator: torch.Generator) -> Tensor:
        config, batch = self.config, len(pose)
        random = Random(batch, generator, pose.device)

        def yaw_of(axis: Tensor) -> Tensor:
            return torch.atan2(axis[:, 1], axis[:, 0])

        up = pose.new_tensor([0.0, 0.0, 1.0]).expand(batch, 3)

        # Legs, and each arm, of other frames, turned about the vertical to fit hips or shoulders.
        pose = pose.clone()
        sources = ((_LEFT_LEG + _RIGHT_LEG, 8, 7), (_LEFT_ARM, 2, 1), (_RIGHT_ARM, 2, 1))
        for part, (joints, start, end) in enumerate(sources):
            other = self.poses[self._draw_index(batch, generator)]
            turn = yaw_of(pose[:, end] - pose[:, start]) - yaw_of(other[:, end] - other[:, start])
            other = _rotate(other, _axis_angle(up, turn), torch.zeros_like(up))
            if part:
                other = other + (pose[:, joints[:1]] - other[:, joints[:1]])
            take = random.uniform(1, 1) < config.mix
            pose[:, joints] = torch.where(take, other[:, joints], pose[:, joints])

        # Photographs show more upright and seated people than motion capture does.
        trunk = torch.nn.functional.normalize(pose[:, 1] + pose[:, 2], dim=-1)
        axis = torch.cross(trunk, up, dim=-1)
        lean = torch.atan2(axis.norm(dim=-1), trunk[:, 2])
        share = torch.where(random.uniform() < config.upright, random.uniform(), 0.0)
        righting = _axis_angle(torch.nn.functional.normalize(axis, dim=-1), lean * share)
        pose[:, _UPPER] = _rotate(pose[:, _UPPER], righting, torch.zeros_like(up))
        pose = torch.where(random.uniform(1, 1) < config.seated, _seat(pose, random), pose)

        # Random rotations of the trunk, the head and every limb segment.
        def swing(joints: tuple[int, ...], pivot: Tensor, degrees: float) -> None:
            vector = random.normal(3) * math.radians(degrees)
            angle = vector.norm(dim=-1)
            rotation = _axis_angle(vector / angle.clamp_min(1e-6)[:, None], angle)
            pose[:, joints] = _rotate(pose[:, joints], rotation, pivot)

        swing(_UPPER, torch.zeros_like(up), config.trunk_deg)
        neck = (pose[:, 1] + pose[:, 2]) / 2
        trunk = torch.nn.functional.normalize(neck, dim=-1)
        yaw = random.normal() * math.radians(config.head_deg)
        pose[:, :1] = _rotate(pose[:, :1], _axis_angle(trunk, yaw), neck)
        for first, middle, last in (_LEFT_ARM, _RIGHT_ARM, _LEFT_LEG, _RIGHT_LEG):
            swing((middle, last), pose[:, first].clone(), config.joint_deg)
            swing((last,), pose[:, middle].clone(), config.joint_deg)

        # Limb lengths, left and right alike: rebuild the tree from scaled bones.
        factor = (random.normal(8, 1) * config.limb_std).exp().unbind(1)
        hips, trunk_length, shoulders, head, upper_arm, forearm, thigh, shank = factor
        neck = (pose[:, 1] + pose[:, 2]) / 2
        new = torch.empty_like(pose)
        new_neck = neck * trunk_length
        new[:, 0] = new_neck + (pose[:, 0] - neck) * head
        for side in (0, 1):
            shoulder, elbow, wrist = (_LEFT_ARM, _RIGHT_ARM)[side]
            hip, knee, ankle = (_LEFT_LEG, _RIGHT_LEG)[side]
            new[:, shoulder] = new_neck + (pose[:, shoulder] - neck) * shoulders
            new[:, elbow] = new[:, shoulder] + (pose[:, elbow] - pose[:, shoulder]) * upper_arm
            new[:, wrist] = new[:, elbow] + (pose[:, wrist] - pose[:, elbow]) * forearm
            new[:, hip] = pose[:, hip] * hips
            new[:, knee] = new[:, hip] + (pose[:, knee] - pose[:, hip]) * thigh
            new[:, ankle] = new[:, knee] + (pose[:, ankle] - pose[:, knee]) * shank
        new = new * (random.normal(1, 1) * config.scale_std).exp()
        return torch.where(random.uniform(1, 1) < 0.5, mirror(new), new)

    def _observe(self, pose: Tensor, generator: torch.Generator) -> SimulatedBatch:
        random = Random(len(pose), generator, pose.device)
        view = look(pose, _COCO13, self.config, random)
        state = detector_states(view, _COCO13, random)
        mean, covariance, amplitude = detector_fits(view.projected, state, _COCO13, random)
        noisy = view.points + random.normal(13, 3) * (self.config.noise_mm / 1000)
        return SimulatedBatch(
            noisy, view.points, amplitude, mean, covariance, view.projected, state
        )


@dataclass(frozen=True)
class View:
    """B persons in front of a random camera each, and the 64 x 64 crop around each of them.

    Attributes:
        points: (B, K, 3) metres, camera axes, origin as in the world.
        projected: (B, K, 2) where they are seen, in cells.
        rotation: (B, 3, 3) world to camera axes.
        translation: (B, 3) metres, where in the camera the origin is.
        focal_length: (B,) in cells.
        centre: (B, 2) the principal point, in cells.
    """

    points: Tensor
    projected: Tensor
    rotation: Tensor
    translation: Tensor
    focal_length: Tensor
    centre: Tensor

    def project(self, points: Tensor) -> Tensor:
        """Cells (B, N, 2) of points (B, N, 3) in metres, axes and origin as ``self.points``."""
        points = points + self.translation[:, None]
        image = points[..., :2] / points[..., 2:]
        return image * self.focal_length[:, None, None] + self.centre[:, None]


def look(pose: Tensor, joints: DetectorJoints, config: SimulationConfig, random: Random) -> View:
    """Random cameras, and crops as a top-down detector takes them.

    Args:
        pose: (B, K, 3) metres, world axes with z up, origin between the hips.
        joints: which those are.
        config: ranges of the cameras.
        random: the noise.
    """
    normal, uniform = random.normal, random.uniform

    # Camera. One in ten looks from well above or below.
    elevation_mean, elevation_std = config.elevation_deg
    steep = torch.where(uniform() < 0.1, 3.0, 1.0)
    rotation = camera_rotation(
        uniform() * (2 * math.pi),
        torch.deg2rad(elevation_mean + elevation_std * steep * normal()).clamp(-1.3, 1.3),
        torch.deg2rad(config.roll_deg * normal()),
    )
    clean = pose @ rotation.transpose(-1, -2)
    near, far = (math.log(limit) for limit in config.distance_m)
    distance = (near + (far - near) * uniform()).exp()
    offset = torch.tan(math.radians(config.off_axis_deg) * normal(2)) * distance[:, None]
    in_camera = clean.clone()
    in_camera[..., :2] += offset[:, None]
    in_camera[..., 2] = (in_camera[..., 2] + distance[:, None]).clamp_min(0.5)
    image = in_camera[..., :2] / in_camera[..., 2:]

    # Crop: mid-hip centred square around the farthest joint, with margin and jitter.
    left, right = joints.hips
    middle = (image[:, left] + image[:, right]) / 2
    image = image - middle[:, None]
    radius = image.norm(dim=-1).amax(-1)
    margin = (math.log(1.5) + 0.14 * normal()).exp()
    scale = (GRID / 2) / (margin * radius)
    centre = GRID / 2 + 0.5 * normal(2)
    return View(
        points=clean,
        projected=image * scale[:, None, None] + centre[:, None],
        rotation=rotation,
        translation=torch.cat([offset, distance[:, None]], -1),
        focal_length=scale,
        centre=centre - middle * scale[:, None],
    )


def detector_states(view: View, joints: DetectorJoints, random: Random) -> Tensor:
    """(B, K) visible, hidden (likelier behind the trunk and in crowded pictures) or cut off."""
    normal, uniform = random.normal, random.uniform
    true_mean = view.projected
    rate = true_mean.new_tensor(joints.hidden_rate)
    trunk_depth = view.points[:, (*joints.shoulders, *joints.hips), 2].mean(1, keepdim=True)
    behind = view.points[..., 2] - trunk_depth
    logit = torch.logit(rate.clamp(1e-4)) - 0.4 + 4.0 * behind + 1.3 * normal(1)
    hidden = (uniform(len(joints)) < logit.sigmoid()) & (rate > 0)

    # The picture's edge: mostly legs cut off at the bottom, sometimes a side or the top.
    kind = uniform(1)
    low, high = true_mean[..., 1].amin(1, keepdim=True), true_mean[..., 1].amax(1, keepdim=True)
    hip = true_mean[:, joints.hips, 1].mean(1, keepdim=True)
    bottom = hip + (high - hip) * (uniform(1) * 1.05 - 0.1)
    left, right = (
        true_mean[..., 0].amin(1, keepdim=True),
        true_mean[..., 0].amax(1, keepdim=True),
    )
    side = left + (right - left) * 0.45 * uniform(1)
    other_side = right - (right - left) * 0.45 * uniform(1)
    top = low + (hip - low) * 0.3 * uniform(1)
    x, y = true_mean.unbind(-1)
    outside = (
        ((kind < 0.17) & (y > bottom))
        | ((kind > 0.17) & (kind < 0.20) & (x < side))
        | ((kind > 0.20) & (kind < 0.23) & (x > other_side))
        | ((kind > 0.23) & (kind < 0.24) & (y < top))
    )
    state = torch.where(hidden, HIDDEN, VISIBLE)
    return torch.where(outside, OUTSIDE, state)


def detector_fits(
    true_mean: Tensor, state: Tensor, joints: DetectorJoints, random: Random
) -> tuple[Tensor, Tensor, Tensor]:
    """Fitted Gaussians: (B, K, 2) mean, (B, K, 2, 2) covariance, (B, K) amplitude."""
    normal, uniform, table = random.normal, random.uniform, true_mean.new_tensor
    number = len(joints)
    visible = table(joints.visible_median).expand_as(state)
    median = torch.where(
        state == VISIBLE, visible, table((0.0, _HIDDEN_MEDIAN, _OUTSIDE_MEDIAN))[state]
    )
    std = _FLOOR + median * (table(_STATE_SPREAD)[state] * normal(number)).exp()
    std = std.clamp(max=_MAX_STD)
    amplitude = _AMPLITUDE / std * (_AMPLITUDE_SPREAD * normal(number)).exp()

    # Where the detector thinks the joint is, but for the noise of the fit.
    pull = 1 - (1 - table(_PULL)[state]) * uniform(number)
    neck, hip = true_mean[:, joints.shoulders].mean(1), true_mean[:, joints.hips].mean(1)
    trunk = (neck - hip).norm(dim=-1, keepdim=True).clamp_min(4.0)
    shortest, longest = _IMAGINED_LENGTH
    down = trunk * (shortest + (longest - shortest) * uniform(1))
    imagined = torch.cat([0.2 * down * normal(1), down], -1)
    imagines = (state == OUTSIDE) & (uniform(1) < _IMAGINED_SHARE)
    guess = true_mean.clone()
    parents = list(range(number))
    for joint, parent in joints.limbs:
        parents[joint] = parent
        step = (true_mean[:, joint] - true_mean[:, parent]) * pull[:, joint, None]
        if joint in joints.legs:
            step = torch.where(imagines[:, joint, None], imagined, step)
        guess[:, joint] = guess[:, parent] + step

    # Elongated along the limb; head and trunk in any direction.
    limb = guess - guess[:, parents]
    angle = torch.atan2(limb[..., 1], limb[..., 0]) + table(_AXIS_SPREAD)[state] * normal(number)
    free = torch.tensor([parent == k for k, parent in enumerate(parents)], device=state.device)
    angle = torch.where(free, 2 * math.pi * uniform(number), angle)
    elongation = (table(_ELONGATION)[state] * normal(number).abs()).clamp(max=1.5)
    major, minor = std * (elongation / 2).exp(), std * (-elongation / 2).exp()
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    across = torch.stack([-angle.sin(), angle.cos()], -1)
    covariance = (
        major.square()[..., None, None] * direction[..., :, None] * direction[..., None, :]
        + minor.square()[..., None, None] * across[..., :, None] * across[..., None, :]
    )

    # The error of the centre, distributed like the blob but scaled to what labels show.
    outlier = torch.where(uniform(number) < _OUTLIER_SHARE, _OUTLIER_FACTOR, 1.0)
    ratio = _interpolate(std, table(_ERROR_STD), table(_ERROR_RATIO)) * outlier
    ratio = torch.where(state == OUTSIDE, _OUTSIDE_ERROR * ratio, ratio)
    error = ratio[..., None] * (
        (major * normal(number))[..., None] * direction
        + (minor * normal(number))[..., None] * across
    )
    return guess + error, covariance, amplitude


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), constant outside."""
    x = x.clamp(knots[0], knots[-1])
    upper = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    weight = (x - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
    return values[upper - 1] + weight * (values[upper] - values[upper - 1])
