"""Readers of data sets: files in their formats are written here, and the persons read compared with
what was written."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.utils.data import DataLoader

from fasthyp._unpickling import read_nested_pickle
from fasthyp.body import SMPL
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers import (
    PersonDataset,
    emdb,
    hmr,
    human36m,
    mpi_inf_3dhp,
    open_persons,
    persons,
    save_persons,
    three_dpw,
    wehrbein,
)
from fasthyp.data.readers._containers import ZarrArrays
from fasthyp.skeleton import (
    COCO17_JOINTS,
    H36M17_JOINTS,
    J24_JOINTS,
    MPI_INF_3DHP17_JOINTS,
    MPII16_JOINTS,
    OPENPOSE18_JOINTS,
    OPENPOSE25_JOINTS,
    SMPL24_JOINTS,
)
from tests.body import synthetic_models as synthetic

T = 7
OF_32 = [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def close(found: Any, expected: Any, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=atol)


def pixels_of(batch: PersonBatch, points: torch.Tensor) -> np.ndarray:
    """Points in cells as seen from the principal point, in focal lengths: free of the crop."""
    assert batch.focal_length is not None
    assert batch.centre is not None
    return ((points - batch.centre[:, None]) / batch.focal_length[:, None, None]).numpy()


# --- Human3.6M ---


def camera_values(seed: int) -> dict[str, Any]:
    turn = Rotation.random(random_state=seed)
    return {
        "id": f"5{seed}",
        "orientation": np.roll(turn.as_quat(), 1).tolist(),
        "translation": (1000 * rng(seed).normal(size=3)).tolist(),
        "focal_length": [1145.0, 1143.0],
        "center": [512.0, 515.0],
    }


@pytest.fixture
def h36m(tmp_path: Path) -> tuple[Path, Path, dict[str, Any], dict[str, Any], dict[str, Any]]:
    actions = ("Walking 1", "Walking", "Eating")
    poses = {
        subject: {
            action: rng(i).normal(size=(T + i, 32, 3)).astype(np.float32)
            for i, action in enumerate(actions)
        }
        for subject in ("S9", "S11")
    }
    points = {
        subject: {
            action: [
                rng(k).uniform(0, 1000, (len(values) + 2, 17, 2)).astype(np.float32)
                for k in range(2)
            ]
            for action, values in of_subject.items()
        }
        for subject, of_subject in poses.items()
    }
    cameras = {subject: [camera_values(k) for k in (3, 4)] for subject in poses}
    path_3d, path_2d = tmp_path / "data_3d_h36m.npz", tmp_path / "data_2d_h36m_cpn.npz"
    np.savez_compressed(path_3d, positions_3d=poses)  # type: ignore[arg-type]
    metadata = {"num_joints": 17, "keypoints_symmetry": [[1], [2]]}
    np.savez_compressed(path_2d, positions_2d=points, metadata=metadata)  # type: ignore[arg-type]
    return path_3d, path_2d, cameras, poses, points


def test_human36m(h36m: Any, tmp_path: Path) -> None:
    path_3d, path_2d, cameras, poses, points = h36m
    file = tmp_path / "cameras.json"
    file.write_text(json.dumps(cameras))
    data = human36m(path_3d, path_2d, cameras=file, sigma=2.0)
    assert len(data) == 2 * 2 * (T + T + 1 + T + 2)
    assert data.joint_names == data.detector_names == H36M17_JOINTS
    names = [data.name(row) for row in range(len(data))]
    assert len(set(names)) == len(data)
    row = names.index("S9/Walking 1/54/2")
    assert data.groups([row, 0]) == ["Walking", "Eating"]
    one = data[row]
    camera = cameras["S9"][1]
    turn = Rotation.from_quat(np.roll(camera["orientation"], -1))
    world = poses["S9"]["Walking 1"][2][OF_32]
    local = turn.inv().apply(world - np.array(camera["translation"]) / 1000)
    close(one.joints_3d[0], local - local[0])
    close(one.translation[0], local[0])
    focal = (camera["focal_length"][0] + camera["focal_length"][1]) / 2
    seen = local[:, :2] / local[:, 2:]
    close(pixels_of(one, one.joints_2d)[0], seen, atol=2e-3)
    found = (points["S9"]["Walking 1"][1][2] - camera["center"]) / focal
    close(pixels_of(one, one.mean)[0], found, atol=2e-3)
    close(one.covariance[0, 5], 4 * np.eye(2))
    close(one.amplitude, np.ones((1, 17)))

    few = human36m(
        path_3d, cameras=cameras, subjects=["S11"], actions=["Eating"], every=4, sigma=None
    )
    assert len(few) == 2 * 3
    assert few.groups(slice(0, 2)) == ["Eating", "Eating"]
    whole = human36m(path_3d, cameras=cameras, subjects=["S11"], actions=["Eating"])
    close(few[1].joints_3d, whole[4].joints_3d)
    assert few[0].mean is None
    with pytest.raises(ValueError, match="'S5' is not among"):
        human36m(path_3d, cameras=cameras, subjects=["S5"])
    with pytest.raises(ValueError, match="cameras: expected 'S9'"):
        human36m(path_3d, cameras={"S11": cameras["S11"]})
    with pytest.raises(ValueError, match="detector: expected one of"):
        human36m(path_3d, path_2d, cameras=cameras, detector="body25")
    with pytest.raises(ValueError, match=r"16 joints \(mpii\), got 17"):
        human36m(path_3d, path_2d, cameras=cameras, detector="mpii")
    assert human36m(path_3d, path_2d, cameras=cameras, detector="coco").detector_names == (
        COCO17_JOINTS
    )


def wehrbein_file(path: Path, frames: int = T) -> dict[str, Any]:
    fits = rng(1).uniform(0.5, 5, (frames, 16, 7))
    video = {
        "imgpath": [f"/S9/Directions.54138969/{4 * i}.jpg" for i in range(frames)],
        "3d_gt": 1000 * rng(2).normal(size=(frames, 51)),
        "2d_hrnet": rng(3).uniform(0, 64, (frames, 32)),
        "gaussfit": fits.reshape(frames, 112),
    }
    empty = {"imgpath": [], "3d_gt": [], "2d_hrnet": [], "gaussfit": []}
    data = {"S9": {"Directions": {"0": {"54138969": video, "55011271": empty}}, "Photo": {}}}
    path.write_bytes(pickle.dumps(data, protocol=pickle.HIGHEST_PROTOCOL))
    return video


def test_wehrbein(tmp_path: Path) -> None:
    path = tmp_path / "testset_h36m.pickle"
    video = wehrbein_file(path)
    data = open_persons(path)
    assert len(data) == T
    batch = data[:]
    poses = video["3d_gt"].reshape(T, 3, 17).transpose(0, 2, 1) / 1000
    close(batch.joints_3d, poses - poses[:, :1])
    close(batch.translation, poses[:, 0])
    assert batch.detector_names == MPII16_JOINTS
    fits = video["gaussfit"].reshape(T, 16, 7)
    close(batch.amplitude, fits[..., 0])
    close(batch.mean, fits[..., 1:3])
    # of the Gaussian that was fitted, exp(-(a x^2 + 2 b x y + c y^2)), as utils/fit_gaussians.py
    # writes it
    sx, theta, sy = fits[..., 3], fits[..., 4], fits[..., 5]
    a = np.cos(theta) ** 2 / (2 * sx**2) + np.sin(theta) ** 2 / (2 * sy**2)
    b = -np.sin(2 * theta) / (4 * sx**2) + np.sin(2 * theta) / (4 * sy**2)
    c = np.sin(theta) ** 2 / (2 * sx**2) + np.cos(theta) ** 2 / (2 * sy**2)
    precision = 2 * np.stack([np.stack([a, b], -1), np.stack([b, c], -1)], -2)
    close(batch.covariance, np.linalg.inv(precision), atol=1e-3)
    assert data.groups([0]) == ["Directions"]
    assert len(wehrbein(path, subjects=["S9"], actions=["Photo"])) == 0
    with pytest.raises(ValueError, match="'S1' is not among"):
        wehrbein(path, subjects=["S1"])


# --- MPI-INF-3DHP ---


def write_3dhp(root: Path) -> dict[str, Any]:
    h5py = pytest.importorskip("h5py")
    data = {}
    for k, name in enumerate(("TS1", "TS2")):
        values = {
            "annot2": rng(k).uniform(0, 2048, (T, 1, 17, 2)),
            "annot3": 1000 * rng(k + 5).normal(size=(T, 1, 17, 3)),
            "univ_annot3": 1000 * rng(k + 9).normal(size=(T, 1, 17, 3)),
            "valid_frame": (np.arange(T)[:, None] != 2).astype(np.float64),
            "activity_annotation": np.ones((T, 1)),
        }
        (root / name).mkdir(parents=True)
        with h5py.File(root / name / "annot_data.mat", "w", userblock_size=512) as file:
            for key, value in values.items():
                file[key] = value
        data[name] = values
    return data


def test_mpi_inf_3dhp(tmp_path: Path) -> None:
    written = write_3dhp(tmp_path / "test")
    data = open_persons(tmp_path / "test", sigma=1.0)
    assert len(data) == 2 * (T - 1)
    assert data.groups([0, T - 1]) == ["TS1", "TS2"]
    batch = data[[2, T + 1]]
    for row, (name, frame) in enumerate((("TS1", 3), ("TS2", 3))):
        pose = written[name]["univ_annot3"][frame, 0] / 1000
        root = pose[MPI_INF_3DHP17_JOINTS.index("pelvis")]
        close(batch.joints_3d[row], pose - root)
        close(batch.translation[row], root)
        points = written[name]["annot2"][frame, 0]
        spread = np.ptp(points, 0).max()
        found = batch.joints_2d[row].numpy()
        close(np.ptp(found, 0).max(), 64 / 1.25, atol=1e-2)
        close(found - found[0], (points - points[0]) * 64 / 1.25 / spread, atol=1e-2)
    own = mpi_inf_3dhp(tmp_path / "test", universal=False, sequences=["TS2"])
    assert len(own) == T - 1
    pose = written["TS2"]["annot3"][0, 0] / 1000
    close(own[0].joints_3d[0], pose - pose[14])

    archive = {
        name: {
            "data_2d": values["annot2"][:, 0],
            "data_3d": values["univ_annot3"][:, 0],
            "valid": values["valid_frame"][:, 0],
        }
        for name, values in written.items()
    }
    np.savez_compressed(tmp_path / "data_test_3dhp.npz", data=archive)  # type: ignore[arg-type]
    again = open_persons(tmp_path / "data_test_3dhp.npz", sigma=1.0)
    assert len(again) == len(data)
    for name, value in data[:].tensors().items():
        close(getattr(again[:], name), value)


# --- bodies: 3DPW, EMDB, HMR ---


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> SMPL:
    path = tmp_path_factory.mktemp("body") / "SMPL_NEUTRAL.pkl"
    arrays = synthetic.model(vertices=60)
    path.write_bytes(pickle.dumps(arrays))
    return SMPL(str(path), vertex_ids=synthetic.vertex_ids(60))


def in_camera(
    body: SMPL, pose: np.ndarray, betas: np.ndarray, trans: np.ndarray, extrinsics: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Joints and vertices in the camera of a body posed in the world."""
    out = body(
        betas=torch.from_numpy(betas[None]).float(),
        global_orient=torch.from_numpy(pose[None, :3]).float(),
        body_pose=torch.from_numpy(pose[None, 3:]).float(),
        transl=torch.from_numpy(trans[None]).float(),
    )
    turn, shift = extrinsics[:3, :3], extrinsics[:3, 3]
    joints, vertices = out.joints[0, :24].numpy(), out.vertices[0].numpy()
    return joints @ turn.T + shift, vertices @ turn.T + shift


def extrinsics(number: int, seed: int) -> np.ndarray:
    out = np.tile(np.eye(4), (number, 1, 1))
    out[:, :3, :3] = Rotation.random(number, random_state=seed).as_matrix()
    out[:, :3, 3] = rng(seed).normal(size=(number, 3)) + np.array([0, 0, 8])
    return out


INTRINSICS = np.array([[1961.0, 0, 540], [0, 1963.0, 960], [0, 0, 1]])


def three_dpw_values(body: SMPL | None = None) -> dict[str, Any]:
    camera = extrinsics(T, 1)
    poses = [0.4 * rng(k).normal(size=(T, 72)) for k in range(2)]
    trans = [rng(k + 3).normal(size=(T, 3)) for k in range(2)]
    betas = [rng(k + 5).normal(size=10) for k in range(2)]
    points = [rng(k + 7).uniform(100, 900, (T, 3, 18)) for k in range(2)]
    points[0][:, 2] = 0.7
    points[0][3, 2, 4] = 0.0
    valid = [np.ones(T, bool), np.arange(T) % 2 == 0]
    joints = []
    for pose, move, shape in zip(poses, trans, betas, strict=True):
        still = np.eye(4)
        if body is None:
            joints.append(rng(11).normal(size=(T, 72)))
        else:
            posed = [in_camera(body, pose[t], shape, move[t], still)[0] for t in range(T)]
            joints.append(np.stack(posed).reshape(T, 72))
    return {
        "sequence": "downtown_bar_00",
        "poses": poses,
        "trans": trans,
        "betas": betas,
        "genders": ["m", "f"],
        "cam_poses": camera,
        "cam_intrinsics": INTRINSICS,
        "poses2d": points,
        "campose_valid": [v.astype(int) for v in valid],
        "jointPositions": joints,
        "texture_maps": [],
        "img_frame_ids": np.arange(T),
    }


@pytest.mark.parametrize("python2", [False, True])
def test_three_dpw(tmp_path: Path, body: SMPL, python2: bool) -> None:
    values = three_dpw_values(body)
    raw = pickle.dumps(values, 2)
    if python2:
        raw = synthetic.Python2Writer().done(values)
    (tmp_path / "downtown_bar_00.pkl").write_bytes(raw)
    plain, full = open_persons(tmp_path, sigma=1.5), three_dpw(tmp_path, body=body)
    assert len(plain) == len(full) == T + 4
    assert plain.groups([0]) == ["downtown_bar_00"]
    assert plain.joint_names == SMPL24_JOINTS
    assert plain.detector_names == OPENPOSE18_JOINTS
    row = T + 2  # the second person's fifth frame
    for data in (plain, full):
        one = data[row]
        camera = values["cam_poses"][4]
        pose, shape, move = (values[name][1] for name in ("poses", "betas", "trans"))
        joints, vertices = in_camera(body, pose[4], shape, move[4], camera)
        close(one.joints_3d[0], joints - joints[0])
        close(one.translation[0], joints[0])
        close(pixels_of(one, one.joints_2d)[0], joints[:, :2] / joints[:, 2:], atol=2e-3)
        turned = camera[:3, :3] @ Rotation.from_rotvec(pose[4, :3]).as_matrix()
        close(one.global_orient[0], turned)
        expected = Rotation.from_rotvec(pose[4, 3:].reshape(23, 3)).as_matrix()
        close(one.body_pose[0], expected)
        close(one.betas[0], shape)
        points = (values["poses2d"][1][4, :2].T - INTRINSICS[:2, 2]) / 1962
        close(pixels_of(one, one.mean)[0], points, atol=2e-3)
        if data is full:
            close(one.vertices[0], vertices - joints[0])
    hidden = plain[3]
    assert not hidden.visible[0, 4]
    assert hidden.mean[0, 4].isnan().all()
    assert hidden.visible[0].sum() == 17
    both = three_dpw(tmp_path, body={"male": body, "female": body})
    close(both[row].vertices, full[row].vertices)
    with pytest.raises(ValueError, match="expected one for 'female'"):
        three_dpw(tmp_path, body={"male": body})[row]


def test_emdb(tmp_path: Path, body: SMPL) -> None:
    values = {
        "gender": "female",
        "name": "P1_14_outdoor_climb",
        "emdb1": True,
        "emdb2": False,
        "n_frames": T,
        "good_frames_mask": np.arange(T) > 1,
        "camera": {
            "intrinsics": INTRINSICS,
            "extrinsics": extrinsics(T, 2),
            "width": 1440,
            "height": 1920,
        },
        "smpl": {
            "poses_root": rng(1).normal(size=(T, 3)),
            "poses_body": 0.3 * rng(2).normal(size=(T, 69)),
            "trans": rng(3).normal(size=(T, 3)),
            "betas": rng(4).normal(size=10),
        },
        "kp2d": rng(5).uniform(0, 1000, (T, 24, 2)),
        "bboxes": {"bboxes": np.zeros((T, 4)), "invalid_idxs": np.array([0])},
    }
    folder = tmp_path / "P1" / "14_outdoor_climb"
    folder.mkdir(parents=True)
    (folder / "P1_14_outdoor_climb_data.pkl").write_bytes(pickle.dumps(values))
    data = open_persons(tmp_path, body=body)
    assert len(data) == T - 2
    one = data[3]
    smpl = values["smpl"]
    pose = np.concatenate([smpl["poses_root"][5], smpl["poses_body"][5]])  # type: ignore[index]
    joints, vertices = in_camera(
        *(body, pose, smpl["betas"], smpl["trans"][5]),  # type: ignore[index]
        values["camera"]["extrinsics"][5],  # type: ignore[index]
    )
    close(one.joints_3d[0], joints - joints[0])
    close(one.vertices[0], vertices - joints[0])
    close(one.translation[0], joints[0])
    without = emdb(tmp_path)[3]
    assert without.joints_3d is None
    points = (values["kp2d"][5] - INTRINSICS[:2, 2]) / 1962  # type: ignore[index]
    close(pixels_of(without, without.joints_2d)[0], points, atol=2e-3)
    assert len(emdb(tmp_path, subset=2)) == 0
    assert len(emdb(tmp_path, subset=1, sequences=["P1_14_outdoor_climb"])) == T - 2


def test_hmr_of_spin(tmp_path: Path) -> None:
    joints = rng(1).normal(size=(T, 24, 4))
    joints[..., 3] = 1
    joints[2, 5, 3] = 0
    joints[3, J24_JOINTS.index("pelvis"), 3] = 0
    has = np.arange(T) != 4
    values = {
        "imgname": np.array([f"S9_Walking/{i}.jpg" for i in range(T)]),
        "center": rng(2).uniform(300, 600, (T, 2)),
        "scale": rng(3).uniform(1, 2, T),
        "pose": rng(4).normal(size=(T, 72)),
        "shape": rng(5).normal(size=(T, 10)),
        "has_smpl": has.astype(float),
        "S": joints,
        "openpose": rng(6).uniform(0.1, 900, (T, 25, 3)),
    }
    path = tmp_path / "h36m_valid.npz"
    np.savez(path, **values)
    data = open_persons(path, group_by_folder=True, sigma=2.0)
    batch = data[:]
    root = J24_JOINTS.index("pelvis")
    close(batch.joints_3d[0], joints[0, :, :3] - joints[0, root, :3])
    assert batch.joints_3d[2, 5].isnan().all()
    hips = joints[3, [2, 3], :3].mean(0)
    close(batch.joints_3d[3, 0], joints[3, 0, :3] - hips)
    close(batch.betas[has], values["shape"][has])
    assert batch.betas[4].isnan().all()
    assert batch.global_orient[4].isnan().all()
    matrices = Rotation.from_rotvec(values["pose"][0].reshape(24, 3)).as_matrix()
    close(batch.body_pose[0], matrices[1:])
    assert batch.detector_names == OPENPOSE25_JOINTS
    side = 200 * values["scale"][0]
    cells = (values["openpose"][0, :, :2] - values["center"][0] + side / 2) * 64 / side
    close(batch.mean[0], cells, atol=1e-2)
    assert data.groups(slice(0, 1)) == ["S9_Walking"]
    assert hmr(path).groups(slice(0, 1)) is None


def test_hmr_of_bedlam_and_prohmr(tmp_path: Path, body: SMPL) -> None:
    cam_ext = np.tile(np.eye(4), (T, 1, 1))
    cam_ext[:, :3, 3] = rng(7).normal(size=(T, 3)) + np.array([0, 0, 9])
    pose = 0.3 * rng(1).normal(size=(T, 72))
    values = {
        "imgname": np.array([f"seq/{i}.png" for i in range(T)]),
        "center": rng(2).uniform(300, 600, (T, 2)),
        "scale": rng(3).uniform(1, 2, T),
        "pose_cam": pose,
        "shape": rng(4).normal(size=(T, 11)),
        "trans_cam": rng(5).normal(size=(T, 3)),
        "cam_int": np.tile(INTRINSICS, (T, 1, 1)),
        "cam_ext": cam_ext,
        "vitpose": rng(6).uniform(0.2, 900, (T, 17, 3)),
        "gender": np.array(["m", "f"] * 3 + ["m"]),
    }
    np.savez_compressed(tmp_path / "bedlam.npz", **values)
    batch = hmr(tmp_path / "bedlam.npz", body={"male": body, "female": body})[[3, 0]]
    moved = values["trans_cam"][3] + cam_ext[3, :3, 3]
    joints, vertices = in_camera(body, pose[3], values["shape"][3, :10], moved, np.eye(4))
    close(batch.joints_3d[0], joints - joints[0])
    close(batch.translation[0], joints[0])
    close(batch.vertices[0], vertices - joints[0])
    close(pixels_of(batch, batch.joints_2d)[0], joints[:, :2] / joints[:, 2:], atol=2e-3)
    points = (values["vitpose"][3][:, [1, 0]] - INTRINSICS[:2, 2]) / 1962
    close(pixels_of(batch, batch.mean)[0], points, atol=2e-3)
    assert batch.detector_names == COCO17_JOINTS
    # SMPL-X's poses have 55 joints, of which 22 are the body's
    np.savez(
        tmp_path / "smplx.npz",
        **{**values, "pose_cam": np.concatenate([pose, np.ones((T, 93))], 1)},
    )
    assert hmr(tmp_path / "smplx.npz")[0].body_pose.shape == (1, 21, 3, 3)

    extra = np.ones((T, 19, 4))
    extra[..., :3] = rng(9).normal(size=(T, 19, 3))
    prohmr = {
        "center": values["center"],
        "scale": np.stack([values["scale"] * 100, values["scale"] * 200], 1),
        "body_pose": pose,
        "has_body_pose": np.ones(T),
        "betas": values["shape"][:, :10],
        "body_keypoints_2d": rng(8).uniform(0.1, 900, (T, 25, 3)),
        "extra_keypoints_3d": extra,
    }
    np.savez(tmp_path / "prohmr.npz", **prohmr)
    data = hmr(tmp_path / "prohmr.npz")
    assert data.joint_names == J24_JOINTS[:19]
    batch = data[:]
    close(batch.joints_3d[1], extra[1, :, :3] - extra[1, 14, :3])
    side = 200 * values["scale"][0]
    cells = (prohmr["body_keypoints_2d"][0, :, :2] - values["center"][0] + side / 2) * 64 / side
    close(batch.mean[0], cells, atol=1e-2)


# --- arrays ---


def batch_of(number: int) -> PersonBatch:
    g = torch.Generator().manual_seed(0)
    return PersonBatch(
        joints_3d=torch.randn(number, 17, 3, generator=g),
        amplitude=torch.rand(number, 16, generator=g),
        mean=torch.rand(number, 16, 2, generator=g),
        covariance=torch.eye(2).expand(number, 16, 2, 2).clone(),
        visible=torch.rand(number, 16, generator=g) > 0.5,
        features=torch.randn(number, 5, generator=g),
        joint_names=H36M17_JOINTS,
        detector_names=MPII16_JOINTS,
    )


def test_persons_round_trip(tmp_path: Path) -> None:
    batch = batch_of(9)
    save_persons(tmp_path / "p.npz", batch)
    assert persons(tmp_path / "p.npz").groups([0]) is None
    save_persons(tmp_path / "p.npz", batch, [f"g{i % 2}" for i in range(9)])
    data = persons(tmp_path / "p.npz")
    assert isinstance(data.clips[0].read.arrays._array("mean"), np.memmap)  # type: ignore[attr-defined]
    for rows in (slice(None), [8, 0, 3], slice(7, 2, -2), torch.arange(9) % 2 == 0, 4, -1):
        found = data[rows]
        index = torch.arange(9)[[rows]] if isinstance(rows, int) else torch.arange(9)
        if not isinstance(rows, int):
            index = index[list(range(9))[rows]] if isinstance(rows, slice) else index[rows]
        for name, value in batch[index].tensors().items():
            assert torch.equal(getattr(found, name), value), (rows, name)
            assert getattr(found, name).dtype == value.dtype
    assert data[0].joint_names == H36M17_JOINTS
    assert data.groups([0, 1, 2]) == ["g0", "g1", "g0"]
    with pytest.raises(IndexError, match="9"):
        data[9]
    every = persons(tmp_path / "p.npz", every=4)
    assert torch.equal(every[:].mean, batch.mean[::4])  # type: ignore[index, arg-type]
    np.savez_compressed(tmp_path / "c.npz", **dict(np.load(tmp_path / "p.npz")))
    assert torch.equal(persons(tmp_path / "c.npz")[[3, 1]].mean, batch.mean[[3, 1]])  # type: ignore[index, arg-type]


def write_zarr(path: Path, arrays: dict[str, np.ndarray], **options: Any) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(path), mode="w", **options)
    for name, value in arrays.items():
        group.create_array(name, data=value, chunks=(2, *value.shape[1:]))


@pytest.mark.parametrize("kind", ["npz", "npy", "h5", "zarr2", "zarr3"])
def test_heatmaps(tmp_path: Path, kind: str) -> None:
    maps = rng().random((T, 17, 6, 5)).astype(np.float16 if kind == "h5" else np.float32)
    path = tmp_path / f"maps.{kind.rstrip('23')}"
    if kind == "npz":
        np.savez(path, heatmaps=maps)
    elif kind == "npy":
        np.save(path, maps)
    elif kind == "h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file.create_dataset("heatmaps", data=maps, chunks=(2, 17, 6, 5), compression="gzip")
            file["detector_names"] = [f"joint {k}" for k in range(17)]
    else:
        write_zarr(path, {"heatmaps": maps}, zarr_format=int(kind[-1]))
    data = open_persons(path)
    assert len(data) == T
    close(data[[5, 0, 1]].heatmaps, maps[[5, 0, 1]], atol=0)
    expected = tuple(f"joint {k}" for k in range(17)) if kind == "h5" else COCO17_JOINTS
    assert data[0].detector_names == expected
    pickle.loads(pickle.dumps(data))[1]
    # a worker opens the file for itself
    loader = DataLoader(data, batch_size=3, num_workers=1, collate_fn=PersonBatch.cat)
    close(torch.cat([batch.heatmaps for batch in loader]), maps, atol=0)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("h5py", "zarr"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.h5").touch()
    (tmp_path / "b.zarr").mkdir()
    for file, name in (("a.h5", "h5py"), ("b.zarr", "zarr")):
        with pytest.raises(ImportError, match=rf"needs {name}: pip install 'fasthyp\[data\]'"):
            persons(tmp_path / file)


# --- hostile and damaged files ---


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_hostile_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = three_dpw_values()
    cases: dict[str, Callable[[], Any]] = {}
    np.savez("h36m.npz", positions_3d={"S1": {"Walk": Evil()}})  # type: ignore[arg-type]
    cases["h36m.npz"] = lambda: human36m("h36m.npz", cameras={})
    np.savez("3dhp.npz", data={"TS1": Evil()})  # type: ignore[arg-type]
    cases["3dhp.npz"] = lambda: mpi_inf_3dhp("3dhp.npz")
    Path("w.pickle").write_bytes(pickle.dumps({"S9": {"a": np.array([Evil()], object)}}))
    cases["w.pickle"] = lambda: wehrbein("w.pickle")
    Path("seq.pkl").write_bytes(pickle.dumps({**values, "betas": Evil()}))
    cases["seq.pkl"] = lambda: three_dpw("seq.pkl")
    Path("P_data.pkl").write_bytes(pickle.dumps({"smpl": {"betas": Evil()}}))
    cases["P_data.pkl"] = lambda: emdb("P_data.pkl")
    for name, read in cases.items():
        with pytest.raises(ValueError, match=rf"{name}.*refused: the pickle names 'posix.mkdir'"):
            read()
    np.savez("hmr.npz", center=np.zeros((2, 2)), scale=np.ones(2), imgname=np.array([Evil()] * 2))
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        hmr("hmr.npz", group_by_folder=True)
    np.savez("maps.npz", heatmaps=np.array([Evil()]))
    with pytest.raises(ValueError, match=r"maps.npz: heatmaps: expected"):
        persons("maps.npz")[0]
    Path("maps.npy").write_bytes(Path("maps.npz").read_bytes()[:0])
    np.save("evil.npy", np.array([Evil()]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil\.npy"):
        persons("evil.npy")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_zarr_whose_chunks_are_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    numcodecs = pytest.importorskip("numcodecs")
    monkeypatch.chdir(tmp_path)
    write_zarr(tmp_path / "m.zarr", {"heatmaps": np.zeros((2, 17, 4, 4), "f4")}, zarr_format=2)
    meta = json.loads(Path("m.zarr/heatmaps/.zarray").read_text())
    codec = numcodecs.Pickle().get_config()
    meta |= {"filters": [codec] if place == "filters" else None}
    meta |= {"compressor": codec if place == "compressor" else None}
    Path("m.zarr/heatmaps/.zarray").write_text(json.dumps(meta))
    for chunk in Path("m.zarr/heatmaps").glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(Evil()))
    Path("m.zarr/.zmetadata").unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match=r"m\.zarr.*(refused, its chunks are pickles|not a readable Zarr)"
    ):
        persons("m.zarr")[0]
    assert not Path("pwned").exists()


def test_zarr_of_releases_that_would_run_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zarr(tmp_path / "m.zarr", {"heatmaps": np.zeros((2, 17, 4, 4), "f4")})
    described = {"dtype": "<f4", "filters": [{"id": "pickle", "protocol": 5}]}
    metadata = SimpleNamespace(to_dict=lambda: described)
    array = SimpleNamespace(metadata=metadata, dtype=np.dtype("f4"), shape=(2, 17, 4, 4))
    monkeypatch.setattr(ZarrArrays, "_group", lambda self: Group(heatmaps=array))
    with pytest.raises(ValueError, match="heatmaps: refused, its chunks are pickles"):
        persons(tmp_path / "m.zarr")


class Group(dict):  # type: ignore[type-arg]
    def array_keys(self) -> list[str]:
        return list(self)


def test_nested_pickles_are_bounded() -> None:
    doubling = b"]q\x00" + b"0]h\x00ah\x00aq\x00" * 60 + b"."
    assert read_nested_pickle(pickle.dumps([[1]]), "m") == [[1]]
    for raw, message in (
        (doubling, "deeper than any"),
        (b"]q\x00h\x00a.", "holds itself"),
        (b"]" * 5000 + b"a" * 4999 + b".", "deeper than any"),
        (pickle.dumps({"a": np.arange(9.0)})[:-20], "truncated"),
        (pickle.dumps(np.array([[None]])), "expected one axis"),
    ):
        with pytest.raises(ValueError, match=rf"m: .*{message}"):
            read_nested_pickle(raw, "m")
    texts = {"a": np.array(["x", "\N{SNOWMAN}"]), "b": np.array(b"raw"), "c": np.str_("y")}
    for protocol in range(6):
        found = read_nested_pickle(pickle.dumps(texts, protocol), "m")
        assert found == {"a": ["x", "\N{SNOWMAN}"], "b": "raw", "c": "y"}


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_npz(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "p.npz"
    save = np.savez_compressed if compressed else np.savez
    arrays = {"heatmaps": rng().random((40, 17, 8, 8)), "mean": rng().random((40, 17, 2))}
    save(path, **arrays)  # type: ignore[arg-type]
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"p\.npz: not a readable \.npz file, perhaps cut off"):
        persons(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"p\.npz: not a readable"):
        persons(path)
    with pytest.raises(FileNotFoundError):
        persons(tmp_path / "none.npz")
    # a header that promises more than there is
    with zipfile.ZipFile(path, "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, arrays["mean"])
        archive.writestr("mean.npy", buffer.getvalue()[:-8])
    with pytest.raises(ValueError, match=r"shape \(40, 17, 2\) takes"):
        persons(path)
    if compressed:
        broken = bytearray(raw)
        broken[raw.index(b"heatmaps.npy") + 200 : raw.index(b"heatmaps.npy") + 400] = b"\0" * 200
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"p\.npz"):
            persons(path)[0]


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    def wrong(message: str, **arrays: np.ndarray) -> None:
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            open_persons(tmp_path / "x.npz")

    wrong(r"mean: expected shape \(N, K, 2\), got \(3, 16\)", mean=np.zeros((3, 16)))
    wrong(
        "as many rows",
        mean=np.zeros((3, 16, 2)),
        amplitude=np.zeros((2, 16)),
    )
    wrong(
        r"mean: expected shape \(N, 15, 2\)",
        mean=np.zeros((3, 16, 2)),
        amplitude=np.zeros((3, 15)),
    )
    wrong("expected detector_names, the 5 joints", heatmaps=np.zeros((2, 5, 4, 4)))
    wrong("expected joint_names", joints_3d=np.zeros((2, 5, 3)))
    wrong("expected arrays such as", other=np.zeros(3))
    crops = {"center": np.zeros((2, 2)), "scale": np.ones(2)}
    wrong(r"S: expected shape \(N, 24, 4\)", **crops, S=np.zeros((2, 24, 3)))
    wrong("S: expected 2 rows, got 3", **crops, S=np.zeros((3, 24, 4)))
    wrong("expected an array 'shape'", **crops, pose=np.zeros((2, 72)))
    wrong(
        "pose: expected .* numbers, got 70", **crops, pose=np.zeros((2, 70)), shape=np.ones((2, 9))
    )
    values = three_dpw_values()
    for change, message in (
        ({"poses": [np.zeros((T, 71))] * 2}, r"poses\[0\]: expected an array \(T, 72\)"),
        ({"poses2d": [np.zeros((T, 18, 3))] * 2}, r"poses2d\[0\]: expected an array"),
        ({"cam_poses": None}, r"cam_poses: expected an array"),
        ({"campose_valid": []}, "expected 'campose_valid/0'"),
    ):
        (tmp_path / "s.pkl").write_bytes(pickle.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            three_dpw(tmp_path / "s.pkl")[0]
    path = tmp_path / "w.pickle"
    wehrbein_file(path)
    data = pickle.loads(path.read_bytes())
    data["S9"]["Directions"]["0"]["54138969"]["gaussfit"] = np.zeros((T, 111))
    path.write_bytes(pickle.dumps(data))
    with pytest.raises(ValueError, match=r"S9/Directions/0/54138969/gaussfit: .*\(T, 112\)"):
        wehrbein(path)
    with pytest.raises(ValueError, match="format: expected one of"):
        open_persons(path, "coco")
    np.savez(tmp_path / "h.npz", positions_3d={"S1": {}})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cameras"):
        open_persons(tmp_path / "h.npz")


def test_a_worker_reads_what_its_process_wrote(h36m: Any) -> None:
    """Readers of pickles too, in both kinds of worker processes."""
    path_3d, _, cameras, *_ = h36m
    data = human36m(path_3d, cameras=cameras, subjects=["S9"], actions=["Walking"], every=3)
    copy: PersonDataset = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 100_000  # and not the poses
    loader = DataLoader(data, batch_size=4, num_workers=2, collate_fn=PersonBatch.cat)
    found = PersonBatch.cat(list(loader))
    assert torch.equal(found.joints_3d, copy[:].joints_3d)  # type: ignore[arg-type]
