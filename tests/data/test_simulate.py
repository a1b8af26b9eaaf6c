"""The simulated detector: camera geometry, left and right, and the statistics of its fits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fasthyp.data import PoseSimulator, SimulatedBatch, SimulationConfig
from fasthyp.data.simulate import HIDDEN, OUTSIDE, VISIBLE, camera_rotation, mirror
from fasthyp.skeleton import COCO13_JOINTS, COCO13_MIRROR, COCO13_PARENTS
from tests.synthetic import STANDING, people

STILL = SimulationConfig(
    elevation_deg=(0.0, 0.0), roll_deg=0.0, off_axis_deg=0.0, distance_m=(5.0, 5.0), augment=False
)


def draw(number: int, config: SimulationConfig | None = None, seed: int = 0) -> SimulatedBatch:
    simulator = PoseSimulator(people(200), config)
    return simulator.sample(number, torch.Generator().manual_seed(seed))


def degrees(*angles: float) -> list[Tensor]:
    return [torch.tensor(math.radians(angle)) for angle in angles]


def bone_lengths(pose: Tensor) -> Tensor:
    return (pose[:, 1:] - pose[:, COCO13_PARENTS[1:]]).norm(dim=-1)


def test_mirror_exchanges_left_and_right() -> None:
    left = [i for i, name in enumerate(COCO13_JOINTS) if name.startswith("left")]
    for joint in left:
        partner = COCO13_JOINTS[joint].replace("left", "right")
        assert COCO13_JOINTS[COCO13_MIRROR[joint]] == partner
    pose = people(3)
    flipped = mirror(pose)
    torch.testing.assert_close(flipped[:, 3], pose[:, 4] * torch.tensor([-1.0, 1.0, 1.0]))
    torch.testing.assert_close(mirror(flipped), pose)


def test_a_person_facing_the_camera() -> None:
    # They face +x; the camera looks along -x.
    rotation = camera_rotation(*degrees(180, 0, 0))
    seen = STANDING @ rotation.T
    x, y, z = seen.unbind(-1)
    assert x[1] > 0 > x[2]  # their left is on the right of the picture
    assert y[0] < y[1] < y[7] < y[9] < y[11]  # y points down
    assert z[0] < z[1]  # the nose is nearer than the shoulders


def test_camera_angles() -> None:
    rotation = camera_rotation(*degrees(37, 21, -8))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3))
    assert torch.linalg.det(rotation) > 0
    from_above = STANDING @ camera_rotation(*degrees(180, 45, 0)).T
    assert from_above[0, 2] < from_above[11, 2]  # the head is nearer than the feet
    rolled = torch.tensor([0.0, 0.0, 1.0]) @ camera_rotation(*degrees(0, 0, 90)).T
    torch.testing.assert_close(rolled, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_projection_is_a_perspective_one() -> None:
    batch = draw(50, STILL)
    expected = batch.clean_pose[..., :2] / (batch.clean_pose[..., 2:] + 5)
    expected = expected - (expected[:, 7:8] + expected[:, 8:9]) / 2
    seen = batch.true_mean - (batch.true_mean[:, 7:8] + batch.true_mean[:, 8:9]) / 2
    scale = (seen * expected).sum((1, 2)) / (expected * expected).sum((1, 2))
    assert (scale > 0).all()
    torch.testing.assert_close(seen, scale[:, None, None] * expected, atol=1e-3, rtol=0)


def test_persons_are_upright_and_in_the_crop() -> None:
    batch = draw(2000)
    assert (batch.clean_pose[:, 0, 1] < batch.clean_pose[:, 11, 1]).float().mean() > 0.98
    middle = (batch.true_mean[:, 7] + batch.true_mean[:, 8]) / 2
    assert (middle - 32).abs().mean() < 1
    inside = (batch.true_mean > 0) & (batch.true_mean < 64)
    assert inside.all(-1).all(-1).float().mean() > 0.95


def test_same_seed_same_batch() -> None:
    first, second, other = draw(20, seed=3), draw(20, seed=3), draw(20, seed=4)
    for name in ("pose", "amplitude", "mean", "covariance", "state"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.mean, other.mean)


def test_without_augmentation_bones_keep_their_length() -> None:
    batch = draw(100, STILL)
    expected = bone_lengths(STANDING[None]).expand(100, -1)
    torch.testing.assert_close(bone_lengths(batch.clean_pose), expected, atol=1e-5, rtol=0)


def test_augmented_limbs_stay_symmetric() -> None:
    config = SimulationConfig(mix=0.0, joint_deg=0.0, head_deg=0.0, seated=0.0)
    lengths = bone_lengths(draw(500, config).clean_pose)
    left, right = lengths[:, [2, 4, 8, 10]], lengths[:, [3, 5, 9, 11]]
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    spread = (lengths[:, 4] / lengths[:, 10]).log().std()
    assert 0.045 < spread < 0.09  # two independent factors of 4%


def test_seated_people() -> None:
    pose = STANDING.repeat(1000, 1, 1)
    config = SimulationConfig(mix=0.0, seated=1.0, joint_deg=0.0, scale_std=0.0, limb_std=0.0)
    simulator = PoseSimulator(pose, config)
    seated = simulator._augment(pose, torch.Generator().manual_seed(0))
    thigh = (seated[:, 9] - seated[:, 7]) / 0.4206
    shank = (seated[:, 11] - seated[:, 9]) / 0.4105
    torch.testing.assert_close(thigh.norm(dim=-1), torch.ones(1000), atol=1e-3, rtol=0)
    facing = (seated[:, 0, 0] - seated[:, 1, 0]).sign()  # along x: half of them are mirrored
    assert (thigh[:, 0] * facing).mean() > 0.9
    assert shank[:, 2].mean() < -0.9
    assert thigh[:, 2].mean().abs() < 0.2


def test_leaning_people_are_righted() -> None:
    pose = PoseSimulator(people(1)).poses
    leaning = pose.clone()
    turn = camera_rotation(*degrees(0, 40, 0)) @ camera_rotation(*degrees(0, 0, 0)).T
    to_camera = camera_rotation(*degrees(0, 0, 0))
    leaning = leaning @ (to_camera.T @ turn @ to_camera).T

    def lean(upright: float) -> Tensor:
        config = SimulationConfig(mix=0.0, seated=0.0, trunk_deg=0.0, upright=upright)
        simulator = PoseSimulator(leaning, config)
        found = simulator._augment(leaning.repeat(500, 1, 1), torch.Generator().manual_seed(0))
        neck = torch.nn.functional.normalize(found[:, 1] + found[:, 2], dim=-1)
        return torch.rad2deg(neck[:, 2].acos())

    assert lean(0.0).mean() == pytest.approx(40, abs=2)
    assert lean(1.0).mean() == pytest.approx(20, abs=2)
    assert lean(1.0).max() < 42


def test_mixing_swaps_limbs_between_frames() -> None:
    config = SimulationConfig(mix=1.0, scale_std=0.0, limb_std=0.0)
    lengths = bone_lengths(draw(100, config).clean_pose)
    expected = bone_lengths(STANDING[None]).expand(100, -1)
    # shoulder to hip changes with the trunk's turn; limbs do not
    limbs = [2, 3, 4, 5, 8, 9, 10, 11]
    torch.testing.assert_close(lengths[:, limbs], expected[:, limbs], atol=1e-5, rtol=0)


def test_target_noise() -> None:
    batch = draw(3000, SimulationConfig(noise_mm=5.0))
    noise = batch.pose - batch.clean_pose
    assert noise.std().item() == pytest.approx(0.005, rel=0.02)
    assert noise.mean().abs() < 1e-4


def test_fits_have_the_measured_statistics() -> None:
    batch = draw(20_000)
    torch.linalg.cholesky(batch.covariance)
    std = torch.linalg.det(batch.covariance).pow(0.25)
    error = (batch.mean - batch.true_mean).norm(dim=-1)

    def median(values: Tensor, chosen: Tensor) -> float:
        return values[chosen].median().item()

    assert median(std, batch.state == VISIBLE) == pytest.approx(1.31, abs=0.1)
    assert median(std, batch.state == HIDDEN) == pytest.approx(2.23, abs=0.2)
    assert median(std, batch.state == OUTSIDE) == pytest.approx(3.77, abs=0.3)
    # error of the centre for a given std, measured against human labels inside the picture
    inside = batch.state != OUTSIDE
    for low, high, measured in ((0, 1.8, 0.90), (1.8, 2.2, 1.44), (2.2, 3, 2.75), (3, 4.5, 4.92)):
        got = median(error, inside & (std > low) & (std <= high))
        assert got == pytest.approx(measured, rel=0.15), (low, high)
    # wide maps are low
    amplitude = [median(batch.amplitude, (std > a) & (std < b)) for a, b in ((1.1, 1.3), (5, 8))]
    assert amplitude[0] == pytest.approx(1.08, abs=0.1)
    assert amplitude[1] == pytest.approx(0.19, abs=0.05)


def test_states_are_where_they_should_be() -> None:
    batch = draw(20_000)
    hidden = (batch.state == HIDDEN).float().mean(0)
    outside = (batch.state == OUTSIDE).float().mean(0)
    assert hidden[[0, 1, 2, 7, 8]].sum() == 0
    assert 0.2 < hidden[[3, 4, 5, 6, 9, 10, 11, 12]].mean() < 0.45
    assert outside[11] > outside[9] > outside[7]  # pictures mostly end at the bottom
    assert 0.08 < outside[11] < 0.3
    # whatever is below a cut-off joint at the bottom edge is mostly cut off too
    knee = batch.state[:, 9] == OUTSIDE
    below = batch.true_mean[:, 11, 1] > batch.true_mean[:, 9, 1]
    assert (batch.state[knee & below, 11] == OUTSIDE).float().mean() > 0.8


def test_broad_maps_lie_along_the_limb() -> None:
    batch = draw(20_000)
    values, vectors = torch.linalg.eigh(batch.covariance[:, 5])
    limb = torch.nn.functional.normalize(batch.true_mean[:, 5] - batch.true_mean[:, 3], dim=-1)
    along = (vectors[..., 1] * limb).sum(-1).abs()
    assert along[values[:, 1] > 1.7 * values[:, 0]].median() > 0.85


@pytest.mark.parametrize(
    ("poses", "weights", "message"),
    [
        (torch.zeros(3, 17, 3), None, "poses"),
        (torch.zeros(0, 13, 3), None, "poses"),
        (torch.zeros(3, 13, 3), torch.ones(2), "weights"),
    ],
)
def test_refuses(poses: Tensor, weights: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PoseSimulator(poses, weights=weights)


def test_weights_choose_frames() -> None:
    weights = torch.zeros(200)
    weights[7] = 2.0
    simulator = PoseSimulator(people(200), STILL, weights)
    batch = simulator.sample(10, torch.Generator().manual_seed(0))
    chosen = simulator.sample(10, torch.Generator().manual_seed(1), torch.full((10,), 7))
    for found in (batch, chosen):  # the same figure up to a rotation: the same distances
        distances = torch.cdist(found.clean_pose, found.clean_pose)
        expected = torch.cdist(people(200)[7:8], people(200)[7:8]).expand(10, -1, -1)
        torch.testing.assert_close(distances, expected, atol=1e-3, rtol=0)


def test_cut_off_legs_are_mostly_imagined() -> None:
    batch = draw(20_000)
    for ankle, hip in ((11, 7), (12, 8)):
        true = batch.true_mean[:, ankle] - batch.true_mean[:, hip]
        fitted = batch.mean[:, ankle] - batch.mean[:, hip]
        for axis in (0, 1):
            pairs = torch.stack([true[:, axis], fitted[:, axis]])
            seen = torch.corrcoef(pairs[:, batch.state[:, ankle] == VISIBLE])[0, 1]
            cut_off = torch.corrcoef(pairs[:, batch.state[:, ankle] == OUTSIDE])[0, 1]
            assert cut_off < 0.6 * seen
        assert (fitted[batch.state[:, ankle] == OUTSIDE, 1] > 0).float().mean() > 0.85
