"""The motion capture reader: parts, units, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthyp.data import load_cmu
from tests.synthetic import mocap_arrays, write_mocap


def test_parts_are_whole_clips(tmp_path: Path) -> None:
    path = write_mocap(tmp_path / "cmu.npz")
    clips = {part: set(load_cmu(path, part).clip) for part in ("train", "validation", "test")}
    assert clips == {"train": {"01_01", "02_05"}, "validation": {"01_08"}, "test": {"03_01"}}


def test_metres_centred_without_glitches(tmp_path: Path) -> None:
    train = load_cmu(write_mocap(tmp_path / "cmu.npz"), "train")
    assert len(train) == 79  # 2 clips of 40 frames, one glitch
    assert set(train.subject.tolist()) == {1, 2}
    torch.testing.assert_close((train.poses[:, 7] + train.poses[:, 8]) / 2, torch.zeros(79, 3))
    femur = (train.poses[:, 9] - train.poses[:, 7]).norm(dim=-1)
    torch.testing.assert_close(femur, torch.full((79,), 0.4206), atol=1e-4, rtol=0)


def without(name: str) -> dict[str, Any]:
    arrays = mocap_arrays()
    del arrays[name]
    return arrays


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without("coco13_mm"), "'coco13_mm'"),
        (without("glitch"), "'glitch'"),
        ({**mocap_arrays(), "coco13_mm": np.zeros((160, 17, 3), np.float32)}, r"\(N, 13, 3\)"),
        ({**mocap_arrays(), "coco13_mm": np.full((160, 13, 3), np.nan)}, "finite"),
        ({**mocap_arrays(), "coco13_names": mocap_arrays()["coco13_names"][::-1]}, "coco13_names"),
        ({**mocap_arrays(), "split": np.zeros(3, np.int8)}, "split"),
        ({**mocap_arrays(), "clip_id": np.full(160, 9, np.int32)}, "clip_id"),
        ({**mocap_arrays(), "clip_names": np.array([None, 1], object)}, "clip_names"),
        ({**mocap_arrays(), "split": np.ones(160, np.int8)}, "no frames"),
    ],
)
def test_refuses(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_cmu(tmp_path / "bad.npz", "train")


def test_refuses_damaged_files(tmp_path: Path) -> None:
    path = write_mocap(tmp_path / "cmu.npz")
    (tmp_path / "short.npz").write_bytes(path.read_bytes()[:1000])
    np.save(tmp_path / "single.npy", np.zeros(3))
    for bad in (tmp_path / "short.npz", tmp_path / "absent.npz", tmp_path / "single.npy"):
        with pytest.raises(ValueError, match=bad.name):
            load_cmu(bad, "train")
    with pytest.raises(ValueError, match=r"part: .*'all'"):
        load_cmu(path, "all")
