"""Simulated persons: what is said of them agrees, the detector is honest, a seed fixes all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fasthyp
from fasthyp.body.stick import point_indices
from fasthyp.data import (
    DETECTORS,
    PersonBatch,
    PoseSimulator,
    SimulatedPersons,
    SimulationConfig,
    StickPoses,
    StoredPersons,
    gaussian_features,
    load_cmu,
    render_gaussians,
    simulate_persons,
    standard_features,
    stick_poses,
)
from fasthyp.data.simulate import DetectorJoints
from fasthyp.skeleton import COCO13_JOINTS, H36M17_JOINTS, SMPL24_JOINTS
from tests.synthetic import people17, write_mocap


@pytest.fixture(scope="module")
def poses() -> dict[str, StickPoses]:
    subject = torch.arange(200) % 2
    return {
        "train": stick_poses(people17(200), subject),
        "validation": stick_poses(people17(50, seed=5)),
        "test": stick_poses(people17(50, seed=9)),
    }


def equal(a: PersonBatch, b: PersonBatch) -> bool:
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_everything_agrees(poses: dict[str, StickPoses], detector: str, part: str) -> None:
    source = SimulatedPersons(poses, detector)
    persons = source.sample(64, 3, part)
    number = len(DETECTORS[detector])
    assert persons.detector_names == DETECTORS[detector]
    assert persons.joint_names == H36M17_JOINTS
    shapes = {name: tuple(value.shape) for name, value in persons.tensors().items()}
    assert shapes == {
        "joints_3d": (64, 17, 3),
        "joints_2d": (64, 17, 2),
        "translation": (64, 3),
        "focal_length": (64,),
        "centre": (64, 2),
        "amplitude": (64, number),
        "mean": (64, number, 2),
        "covariance": (64, number, 2, 2),
        "visible": (64, number),
        "features": (64, 6 * number),
        "global_orient": (64, 3, 3),
        "body_pose": (64, 23, 3, 3),
        "betas": (64, 10),
        "vertices": (64, 34, 3),
    }
    # Forward kinematics.
    orient, pose, betas = persons.need("global_orient", "body_pose", "betas")
    rotations = torch.cat([orient[:, None], pose], 1)
    vertices, joints = persons.need("vertices", "joints_3d")
    torch.testing.assert_close(
        source.body(betas, rotations, pose2rot=False).vertices, vertices, rtol=0, atol=2e-6
    )
    torch.testing.assert_close(
        fasthyp.body.h36m17_regressor() @ vertices, joints, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        rotations.mT @ rotations, torch.eye(3).expand_as(rotations), rtol=0, atol=2e-6
    )
    assert (torch.linalg.det(rotations) > 0).all()
    assert not joints[:, 0].any()
    # Projection.
    offset, focal, centre, seen = persons.need("translation", "focal_length", "centre", "joints_2d")
    point = joints + offset[:, None]
    image = focal[:, None, None] * point[..., :2] / point[..., 2:] + centre[:, None]
    torch.testing.assert_close(image, seen, rtol=0, atol=1e-4)
    assert 25 < seen.mean() < 39
    # People stand upright in camera axes, y down.
    head, ankle = (H36M17_JOINTS.index(name) for name in ("head", "left_ankle"))
    assert (joints[:, head, 1] < joints[:, ankle, 1]).all()
    amplitude, mean, covariance = persons.need("amplitude", "mean", "covariance")
    assert torch.equal(persons.need("features")[0], standard_features(amplitude, mean, covariance))


def test_same_arguments_same_persons(poses: dict[str, StickPoses]) -> None:
    source, again = SimulatedPersons(poses), SimulatedPersons(poses)
    persons = source.sample(8, 7, "train")
    source.sample(3, 1, "test")
    assert equal(persons, source.sample(8, 7, "train"))
    assert equal(persons, again.sample(8, 7, "train"))
    for other in (source.sample(8, 8, "train"), source.sample(8, 7, "validation")):
        assert not torch.equal(persons.need("mean")[0], other.need("mean")[0])


def test_training_persons_vary_and_others_are_as_captured(poses: dict[str, StickPoses]) -> None:
    source = SimulatedPersons(poses)
    index = torch.arange(50)
    captured = source.sample(50, 0, "validation", index)
    (pose, betas) = captured.need("body_pose", "betas")
    assert torch.equal(pose, poses["validation"].rotations[:, 1:])
    assert torch.equal(betas, poses["validation"].betas)
    varied = source.sample(50, 0, "train", index)
    assert (varied.need("betas")[0] - poses["train"].betas[:50]).std() > 0.3
    plain = SimulatedPersons(poses, config=SimulationConfig(augment=False))
    pose = plain.sample(50, 0, "train", index).need("body_pose")[0]
    assert torch.equal(pose, poses["train"].rotations[:50, 1:])


def test_some_sit(poses: dict[str, StickPoses]) -> None:
    config = SimulationConfig(seated=1.0, joint_deg=0.0, mix=0.0, elevation_deg=(0.0, 0.0))
    joints = SimulatedPersons(poses, config=config).sample(200, 0, "train").need("joints_3d")[0]
    hip, knee, ankle = (H36M17_JOINTS.index(f"left_{n}") for n in ("hip", "knee", "ankle"))
    thigh, shank = joints[:, knee] - joints[:, hip], joints[:, ankle] - joints[:, knee]
    assert (thigh[:, 1].abs() / thigh.norm(dim=-1)).median() < 0.35
    assert (shank[:, 1] / shank.norm(dim=-1)).median() > 0.85


def test_mirror_images_are_people(poses: dict[str, StickPoses]) -> None:
    """Half of the training persons are mirrored: right arms raised become left ones."""
    raised = poses["train"].rotations.clone()
    shoulder = SMPL24_JOINTS.index("right_shoulder")
    turn = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    raised[:, shoulder] = turn
    part = StickPoses(raised, *(poses["train"].betas, poses["train"].subject, poses["train"].error))
    source = SimulatedPersons({"train": part}, config=SimulationConfig(mix=0.0))
    joints = source.sample(300, 0, "train").need("joints_3d")[0]
    higher = [
        joints[:, H36M17_JOINTS.index(f"{side}_elbow"), 1]
        < joints[:, H36M17_JOINTS.index(f"{side}_shoulder"), 1]
        for side in ("left", "right")
    ]
    assert (higher[0] ^ higher[1]).float().mean() > 0.95
    assert 0.4 < higher[0].float().mean() < 0.6


@pytest.mark.parametrize("detector", ["h36m17", "mpii16"])
def test_covariances_are_honest(poses: dict[str, StickPoses], detector: str) -> None:
    """Shares of true joints inside 1, 2, 3 sigma, as measured on the labels of real heatmaps:
    72/94/97 % of narrow maps, fewer of broad ones."""
    source = SimulatedPersons(poses, detector)
    persons = source.sample(2000, 0, "test")
    mean, covariance, visible = persons.need("mean", "covariance", "visible")
    vertices, offset, focal, centre = persons.need(
        "vertices", "translation", "focal_length", "centre"
    )
    point = vertices[:, point_indices(persons.detector_names)]
    point = point + offset[:, None]
    true = focal[:, None, None] * point[..., :2] / point[..., 2:] + centre[:, None]
    error = mean - true
    squared = (torch.linalg.solve(covariance, error[..., None])[..., 0] * error).sum(-1)

    def inside(chosen: Tensor) -> list[float]:
        return [float((squared[chosen] < k * k).double().mean()) for k in (1, 2, 3)]

    one, two, three = inside(visible)
    assert 0.66 < one < 0.78
    assert 0.92 < two < 0.98
    assert 0.95 < three < 0.995
    hidden = inside(~visible)
    assert 0.3 < hidden[0] < 0.55
    assert 0.8 < hidden[2] < 0.95
    assert 0.75 < visible.float().mean() < 0.95
    for trunk in ("left_hip", "right_shoulder"):
        if trunk in persons.detector_names:
            assert visible[:, persons.detector_names.index(trunk)].float().mean() > 0.9


def test_heatmaps_are_of_the_gaussians(poses: dict[str, StickPoses]) -> None:
    persons = SimulatedPersons(poses, "coco13", heatmaps=True).sample(4, 0, "test")
    (heatmaps,) = persons.need("heatmaps")
    assert heatmaps.shape == (4, 13, 64, 64)
    fit = fasthyp.fit_gaussians(heatmaps)
    inside = ((fit.mean > 3) & (fit.mean < 60)).all(-1)
    assert inside.float().mean() > 0.8
    amplitude, mean, covariance = persons.need("amplitude", "mean", "covariance")
    for found, given in (
        (fit.amplitude, amplitude),
        (fit.mean, mean),
        (fit.covariance, covariance),
    ):
        torch.testing.assert_close(found[inside], given[inside], rtol=1e-3, atol=1e-3)
    one = render_gaussians(amplitude[:1, :1], mean[:1, :1], covariance[:1, :1])
    torch.testing.assert_close(one, heatmaps[:1, :1])


def test_subjects_are_balanced() -> None:
    subject = (torch.arange(200) < 10).long()
    part = stick_poses(people17(200), subject)
    shares = []
    for balance in (0.0, 1.0):
        source = SimulatedPersons({"train": part}, subject_balance=balance)
        source.config = SimulationConfig(augment=False)
        betas = source.sample(2000, 0, "train").need("betas")[0]
        shares.append((betas == part.betas[0]).all(1).float().mean())
    assert abs(shares[0] - 0.5) < 0.05
    assert abs(shares[1] - 0.05) < 0.02


def test_of_a_file(tmp_path: Path) -> None:
    path = write_mocap(tmp_path / "cmu.npz")
    source = SimulatedPersons(path)
    assert len(source.poses["train"].betas) == 79
    assert (source.poses["test"].error.mean() < 0.02).all()
    captured = load_cmu(path, "test", "h36m17")
    assert captured.poses.shape == (40, 17, 3)
    assert captured.poses[:, (1, 4)].mean(1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="joints: expected one of"):
        load_cmu(path, "test", "coco14")


def test_poses_once_each() -> None:
    poses = people17(12) + torch.tensor([3.0, -2.0, 1.0])
    persons = simulate_persons(poses, seed=4, detector="coco17")
    assert len(persons) == 12
    assert len(persons.detector_names) == 17
    # The same poses but for the camera: distances between joints are those captured.
    joints = persons.need("joints_3d")[0]
    captured = torch.cdist(poses, poses)
    assert (torch.cdist(joints, joints) - captured).abs().mean() < 0.02
    assert equal(persons, simulate_persons(poses, seed=4, detector="coco17"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda poses: poses[:, :13], r"\(N, 17, 3\)"),
        (lambda poses: poses[:0], "N > 0"),
        (lambda poses: poses / 0, "finite"),
        (lambda poses: torch.zeros_like(poses), "one line"),
        (lambda poses: poses.long(), "floating"),
    ],
)
def test_refuses_poses(change: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        stick_poses(change(people17(3)))  # type: ignore[operator]


def test_refuses(poses: dict[str, StickPoses]) -> None:
    source = SimulatedPersons({"test": poses["test"]})
    with pytest.raises(ValueError, match="part: expected one of test, got 'train'"):
        source.sample(1, 0, "train")
    with pytest.raises(ValueError, match="number"):
        source.sample(0, 0, "test")
    with pytest.raises(ValueError, match="detector: expected one of h36m17"):
        SimulatedPersons(poses, "coco")
    with pytest.raises(ValueError, match="unknown joint 'tail'"):
        SimulatedPersons(poses, ("tail",))
    with pytest.raises(ValueError, match="left_hip"):
        SimulatedPersons(poses, ("left_shoulder", "right_shoulder"))
    with pytest.raises(ValueError, match="left_wrist without left_elbow"):
        DetectorJoints(("left_hip", "right_hip", "left_shoulder", "right_shoulder", "left_wrist"))


def test_detector_joints_of_coco() -> None:
    joints = DetectorJoints(COCO13_JOINTS)
    assert joints.shoulders == (1, 2)
    assert joints.hips == (7, 8)
    assert dict(joints.limbs) == {3: 1, 4: 2, 5: 3, 6: 4, 9: 7, 10: 8, 11: 9, 12: 10}
    assert sorted(joints.legs) == [9, 10, 11, 12]


def test_stored_persons(poses: dict[str, StickPoses]) -> None:
    known = SimulatedPersons(poses).sample(30, 0, "test")
    bare = PersonBatch(
        joints_3d=known.joints_3d,
        amplitude=known.amplitude,
        mean=known.mean,
        covariance=known.covariance,
        joint_names=known.joint_names,
    )
    source = StoredPersons({"train": bare, "validation": bare[:5]})
    persons = source.sample(100, 3, "train")
    assert len(persons) == 100
    assert equal(persons, source.sample(100, 3, "train"))
    assert not torch.equal(persons.need("mean")[0], source.sample(100, 4, "train").need("mean")[0])
    assert len(persons.need("mean")[0].unique(dim=0)) > 20
    held = source.sample(9, 0, "validation")
    assert torch.equal(held.need("features")[0], known.need("features")[0][:5])
    with pytest.raises(ValueError, match="part"):
        source.sample(1, 0, "test")


def test_lifting_features_are_those_of_any_joints() -> None:
    batch = PoseSimulator(torch.randn(4, 13, 3)).sample(6, torch.Generator().manual_seed(0))
    gaussians = (batch.amplitude, batch.mean, batch.covariance)
    features = fasthyp.models.LiftingFlow.features(*gaussians)
    assert features.shape == (6, 78)
    some = gaussian_features(*(value[:, :5] for value in gaussians))
    assert some.shape == (6, 30)
    assert torch.equal(some[:, :5], features[:, :5])  # amplitudes
    standard = standard_features(*gaussians)
    torch.testing.assert_close(standard[:, :13], (features[:, :13] - 0.85) / 0.3)
    torch.testing.assert_close(standard[:, 39:52], features[:, 39:52] + 3.9)
