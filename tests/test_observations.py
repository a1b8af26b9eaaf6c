"""Reading 2D observations: what is understood, and what is refused and how."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthyp.observations import from_heatmaps, from_keypoints, read_observations
from fasthyp.skeleton import COCO17_TO_COCO13

MAPS = np.random.default_rng(0).random((2, 17, 12, 10), np.float32)
POINTS = 100 * np.random.default_rng(1).random((2, 13, 2))
COVARIANCES = np.broadcast_to(np.array([[4.0, 1.0], [1.0, 3.0]]), (2, 13, 2, 2))


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_reads_npz_and_npy_of_17_or_13_joints(tmp_path: Path) -> None:
    body = MAPS[:, COCO17_TO_COCO13]
    np.save(tmp_path / "maps.npy", body)
    crop = np.zeros((2, 48, 40, 3), np.uint8)
    for read in (
        read_observations(save(tmp_path / "a.npz", heatmaps=MAPS, crop=crop)),
        read_observations(save(tmp_path / "b.npz", heatmaps=MAPS.astype(np.float64))),
        read_observations(tmp_path / "maps.npy"),
    ):
        assert read.heatmaps is not None
        assert read.heatmaps.dtype == torch.float32
        assert len(read) == 2
        assert read.size == (12, 10)
        np.testing.assert_array_equal(read.heatmaps.numpy(), body)
    assert read_observations(tmp_path / "a.npz").crop is not None
    boxes = save(tmp_path / "c.npz", heatmaps=MAPS, crop=np.ones((2, 4)))
    assert read_observations(boxes).crop is None


def test_one_person_without_the_leading_dimension() -> None:
    one = from_heatmaps(MAPS[0], np.zeros((48, 40, 3), np.uint8))
    assert one.heatmaps is not None
    assert one.crop is not None
    assert one.heatmaps.shape == (1, 13, 12, 10)
    assert one.crop.shape == (1, 48, 40, 3)
    g = from_keypoints(POINTS[0], COVARIANCES[0], np.full(13, 0.5)).gaussians
    assert g is not None
    assert g.mean.shape == (1, 13, 2)
    assert g.amplitude.tolist() == [[0.5] * 13]


def test_person_takes_one() -> None:
    both = from_keypoints(POINTS, COVARIANCES)
    second = both.person(1)
    assert len(second) == 1
    assert both.gaussians is not None
    assert second.gaussians is not None
    assert torch.equal(second.gaussians.mean[0], both.gaussians.mean[1])
    with pytest.raises(ValueError, match="person: expected 0 to 1, got 2"):
        both.person(2)


def test_keypoints_are_scaled_to_64_cells() -> None:
    g = from_keypoints(POINTS, COVARIANCES, image_size=(128, 96)).gaussians
    assert g is not None
    middle = POINTS[:, 7:9].mean(1, keepdims=True)
    np.testing.assert_allclose(g.mean, (POINTS - middle) / 2 + 32, rtol=1e-5)
    np.testing.assert_allclose(g.covariance, COVARIANCES / 4, rtol=1e-6)
    assert g.amplitude.eq(1).all()


def test_keypoints_without_image_size_do_not_depend_on_place_or_scale() -> None:
    here = from_keypoints(POINTS, COVARIANCES).gaussians
    there = from_keypoints(7 * POINTS + 300, 49 * COVARIANCES).gaussians
    assert here is not None
    assert there is not None
    torch.testing.assert_close(here.mean, there.mean)
    torch.testing.assert_close(here.covariance, there.covariance)
    reach = (here.mean - 32).norm(dim=-1).amax(1)
    torch.testing.assert_close(reach, torch.full((2,), 32 / 1.5))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (MAPS[0, 0], r"heatmaps: expected \(P, J, H, W\) or \(J, H, W\), got \(12, 10\)"),
        (MAPS[:, :12], r"expected 13 or 17 joints, got \(2, 12, 12, 10\)"),
        (MAPS[:0], r"expected at least one person, got \(0, 17, 12, 10\)"),
        (MAPS[..., :1], "expected at least 2 x 2 cells"),
        ((255 * MAPS).astype(np.uint8), "expected floating-point numbers, got uint8"),
        (MAPS + 1j, "expected floating-point numbers, got complex64"),
    ],
)
def test_refuses_heatmaps(maps: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_heatmaps(maps)


@pytest.mark.parametrize("crop", [np.zeros((1, 48, 40, 3), np.uint8), np.zeros((2, 48, 40, 3))])
def test_refuses_crops(crop: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"crop: expected uint8 \(2, h, w, 3\)"):
        from_heatmaps(MAPS, crop)


def changed(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    array = np.array(array)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((POINTS[..., :1], COVARIANCES), r"keypoints: expected \(P, J, 2\)"),
        ((POINTS[:, :5], COVARIANCES[:, :5]), "keypoints: expected 13 or 17 joints"),
        ((POINTS, COVARIANCES[:1]), r"covariances: expected \(2, 13, 2, 2\), got \(1, 13, 2, 2\)"),
        ((POINTS, COVARIANCES, np.ones((2, 17))), r"amplitudes: expected \(2, 13\)"),
        ((changed(POINTS, (1, 9, 0), np.nan), COVARIANCES), "keypoints.*person 1, left_knee"),
        ((POINTS, changed(COVARIANCES, (0, 2, 0, 0), np.inf)), "finite.*person 0, right_shoulder"),
        ((POINTS, changed(COVARIANCES, (1, 0), -np.eye(2))), "positive definite.*person 1, nose"),
        ((POINTS, changed(COVARIANCES, (1, 0, 0, 1), 2.0)), "symmetric.*person 1, nose"),
        ((0 * POINTS, COVARIANCES), "all joints of person 0 are in one place"),
        ((POINTS, COVARIANCES, None, np.array([64])), r"image_size: expected a positive \(H, W\)"),
        ((POINTS, COVARIANCES, None, (0, 64)), "image_size"),
        ((POINTS[:0], COVARIANCES[:0]), "keypoints: expected at least one person"),
    ],
)
def test_refuses_keypoints(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_keypoints(*arguments)


def test_refuses_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_observations(tmp_path / "none.npz")
    whole = save(tmp_path / "whole.npz", heatmaps=MAPS).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("heatmaps.npy", objects.getvalue())
    for content, message in (
        (b"", "cannot be read"),
        (b"\x93NUMPY", "cannot be read"),
        (b"not an array", "never loaded"),
        (whole[: len(whole) // 2], "cannot be read"),
        (bytes(flipped), "cannot be read"),
        (objects.getvalue(), "never loaded"),
        (archive.getvalue(), "heatmaps: .*never loaded"),
    ):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_observations(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"expected an array heatmaps, or keypoints.*found images"):
        read_observations(save(tmp_path / "other.npz", images=MAPS))
    with pytest.raises(ValueError, match=r"other\.npz: heatmaps: expected 13 or 17 joints"):
        read_observations(save(tmp_path / "other.npz", heatmaps=MAPS[:, :3]))
    with pytest.raises(ValueError, match="cannot be read"):
        read_observations(tmp_path)
