"""The training recipe on synthetic people: it learns, resumes exactly, and refuses bad input."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fasthyp.data import SimulationConfig
from fasthyp.models.lifting import LiftingFlow
from fasthyp.train.lifting import LiftingTrainConfig, train
from tests.synthetic import write_mocap

pytest.importorskip("lightning", reason="training needs the extra 'train'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TINY = LiftingTrainConfig(
    steps=60,
    batch_size=64,
    learning_rate=3e-3,
    warmup_steps=5,
    decay_steps=20,
    validate_every=20,
    validation_size=128,
    precision="float32",
    hidden=32,
    blocks=3,
    cond_dim=8,
    cond_hidden=16,
)


def curve(folder: Path, name: str, file_name: str = "metrics.csv") -> list[float]:
    with open(folder / file_name) as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_it_learns(tmp_path: Path, precision: str) -> None:
    config = replace(TINY, precision=precision)
    out = tmp_path / "run"
    model = train(config, write_mocap(tmp_path / "cmu.npz"), out, progress=False)
    nll = curve(out, "val_nll")
    assert len(nll) == 3
    assert nll[-1] < nll[0] - 5
    assert LiftingTrainConfig.from_json(out / "config.json") == config
    assert model.config["hidden"] == 32
    assert (out / "lifting.safetensors").exists()


def test_it_resumes_to_the_same_state(tmp_path: Path) -> None:
    data = write_mocap(tmp_path / "cmu.npz")
    config = replace(TINY, steps=10, decay_steps=1, validate_every=5)
    train(config, data, tmp_path / "whole", progress=False)
    train(replace(config, steps=5), data, tmp_path / "parts", progress=False)
    train(config, data, tmp_path / "parts", resume=True, progress=False)
    whole, parts = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["global_step"] == parts["global_step"] == 10
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    both = [curve(tmp_path / "parts", "val_nll", f"metrics{part}.csv") for part in ("-1", "")]
    assert both[0] + both[1] == curve(tmp_path / "whole", "val_nll")


def test_refuses_to_resume(tmp_path: Path) -> None:
    data = write_mocap(tmp_path / "cmu.npz")
    config = replace(TINY, steps=2, validate_every=1)
    with pytest.raises(ValueError, match="no checkpoint"):
        train(config, data, tmp_path / "run", resume=True, progress=False)
    train(config, data, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="differs"):
        train(replace(config, seed=1), data, tmp_path / "run", resume=True, progress=False)


def test_bad_data_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.npz"):
        train(TINY, tmp_path / "absent.npz", tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_config_files(tmp_path: Path) -> None:
    config = LiftingTrainConfig(steps=7, simulation=SimulationConfig(mix=0.5, distance_m=(3, 4)))
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert LiftingTrainConfig.from_json(path) == config
    path.write_text('{"steps": 3}')
    assert LiftingTrainConfig.from_json(path) == LiftingTrainConfig(steps=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 3}', "unknown setting step"),
        ('{"simulation": {"tilt": 3}}', r"unknown setting simulation\.tilt"),
        ('{"steps": 0}', "steps"),
        ('{"precision": "int8"}', "precision"),
        ("[1]", "JSON object"),
        ("{", "not a readable"),
    ],
)
def test_refuses_configs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        LiftingTrainConfig.from_json(path)


def test_modules_are_the_published_architecture() -> None:
    model = LiftingFlow()
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 1.8e6 < learned < 2.0e6
