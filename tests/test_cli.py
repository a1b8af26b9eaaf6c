"""The command line: what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fasthyp
from fasthyp.cli import main
from fasthyp.cli._sample import demo_captions
from fasthyp.models.lifting import LiftingFlow
from fasthyp.train import SYSTEMS
from tests.synthetic import people, write_mocap

SIZE = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with random weights."""
    torch.manual_seed(0)
    model = LiftingFlow(hidden=16, blocks=2, cond_dim=8, cond_hidden=16)
    model.fit_standardisation(people(500) + 0.05 * torch.randn(500, 13, 3), torch.randn(500, 78))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    """(3, 13, 24, 24) round blobs of three people."""
    points = people(3, seed=1)[..., 1:] * torch.tensor([9.0, -9.0]) + SIZE / 2
    cells = torch.arange(float(SIZE))
    dx = (cells - points[..., :1])[..., None, :]
    dy = (cells - points[..., 1:])[..., :, None]
    return (0.9 * torch.exp(-(dx**2 + dy**2) / (2 * 1.4**2))).numpy()


@pytest.fixture
def folder(tmp_path: Path, maps: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``in.npz`` in it and nothing else."""
    np.savez(tmp_path / "in.npz", heatmaps=maps)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must be refused: exit code 2 and one line, which is returned."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fasthyp: error: ")
    assert said.err.endswith("\n")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("fasthyp: error: ").rstrip()


# --- sample ---


def test_sample_writes_what_the_api_gives(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fasthyp.observations import read_observations
    from fasthyp.pipeline import estimate

    arguments = ["sample", "in.npz", "-n", "30", "-o", "out.npz", "--model", str(model)]
    assert main([*arguments, "--seed", "4", "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert said.err == ""
    assert summary["persons"] == 3
    assert summary["num_samples"] == 30
    assert summary["written"] == ["out.npz"]
    assert {"read", "load model", "fit", "condition", "sample", "write"} == set(summary["seconds"])
    expected = estimate(read_observations("in.npz"), LiftingFlow.from_pretrained(model), 30, seed=4)
    with np.load("out.npz", allow_pickle=False) as out:
        np.testing.assert_array_equal(out["hypotheses"], expected.hypotheses)
        np.testing.assert_array_equal(out["log_prob"], expected.log_prob)
        np.testing.assert_allclose(
            list(summary["std_mm"].values()), np.median(out["std"], 0), atol=0.06
        )
        assert int(out["seed"]) == 4
        assert str(out["model"]) == str(model)
    assert sorted(os.listdir()) == ["in.npz", "out.npz"]


def test_same_seed_same_file(folder: Path, model: Path) -> None:
    common = ["sample", "in.npz", "-n", "20", "--model", str(model)]
    assert main([*common, "-o", "a.npz"]) == 0
    assert main([*common, "-o", "b.npz"]) == 0
    assert main([*common, "-o", "c.npz", "--seed", "1"]) == 0
    assert main([*common, "-o", "split.npz", "--batch-size", "2"]) == 0
    assert main([*common, "-o", "second.npz", "--person", "1"]) == 0
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    assert Path("a.npz").read_bytes() == Path("split.npz").read_bytes()
    a, c, second = (np.load(f"{name}.npz")["hypotheses"] for name in ("a", "c", "second"))
    assert np.abs(a - c).max() > 1
    np.testing.assert_array_equal(second, a[1:2])


def test_the_summary_fits_one_screen(
    folder: Path, model: Path, maps: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = maps.copy()
    maps[1, 9] = np.nan
    np.savez("in.npz", heatmaps=maps)
    assert main(["sample", "in.npz", "-n", "5", "--model", str(model), "--plot", "out.png"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") < 24
    for part in ("3 persons, 5 hypotheses each", "shoulder", "condition", "plot", "in all"):
        assert part in text
    assert "person 1: left_knee" in text
    assert "wrote hypotheses.npz" in text
    with np.load("hypotheses.npz") as out:
        assert np.argwhere(~out["fit_converged"]).tolist() == [[1, 9]]
        assert np.isfinite(out["hypotheses"]).all()
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_keypoints(folder: Path, model: Path) -> None:
    points = people(2, seed=1)[..., 1:].numpy() * [100, -100] + 200
    covariances = np.broadcast_to(25 * np.eye(2), (2, 13, 2, 2))
    np.savez("points.npz", keypoints=points, covariances=covariances, image_size=[400, 400])
    assert main(["sample", "points.npz", "-n", "5", "--model", str(model), "--plot", "a.pdf"]) == 0
    with np.load("hypotheses.npz") as out:
        assert out["hypotheses"].shape == (2, 5, 13, 3)
    assert Path("a.pdf").read_bytes().startswith(b"%PDF")


def pickled(maps: np.ndarray) -> None:
    np.savez("in.npz", heatmaps=np.array([{"a": maps}], object))


def truncated(maps: np.ndarray) -> None:
    content = Path("in.npz").read_bytes()
    Path("in.npz").write_bytes(content[: len(content) // 3])


BAD_INPUT: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "missing": (lambda maps: os.remove("in.npz"), "in.npz: no such file"),
    "empty": (lambda maps: Path("in.npz").write_bytes(b""), "in.npz: cannot be read"),
    "text": (lambda maps: Path("in.npz").write_text("hello\n"), "never loaded"),
    "truncated": (truncated, "in.npz: cannot be read, is it truncated?"),
    "pickled": (pickled, "in.npz: heatmaps: not a NumPy file, or one with pickled objects"),
    "rank": (lambda maps: np.savez("in.npz", heatmaps=maps[0, 0]), "expected (P, J, H, W)"),
    "joints": (lambda maps: np.savez("in.npz", heatmaps=maps[:, :12]), "expected 13 or 17 joints"),
    "zero persons": (lambda maps: np.savez("in.npz", heatmaps=maps[:0]), "at least one person"),
    "dtype": (lambda maps: np.savez("in.npz", heatmaps=maps > 0), "floating-point numbers"),
    "all NaN": (lambda maps: np.savez("in.npz", heatmaps=maps * np.nan), "none of person 0's"),
    "other arrays": (lambda maps: np.savez("in.npz", images=maps), "expected an array heatmaps"),
    "covariances": (
        lambda maps: np.savez("in.npz", keypoints=maps[0, :, :2, 0], covariances=maps[0]),
        "covariances: expected (1, 13, 2, 2)",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_refuses_bad_input(
    case: str, folder: Path, model: Path, maps: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_INPUT[case]
    damage(maps)
    before = sorted(os.listdir())
    options = ("-o", "out.npz", "--plot", "out.png", "--model", str(model))
    assert message in refused(capsys, "sample", "in.npz", *options)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-n", "0"), "--num-samples"),
        (("-n", "many"), "--num-samples"),
        (("-n", "999999999999"), "num_samples: "),
        (("--precision", "low"), "--precision"),
        (("--device", "tpu"), "--device"),
        (("--seed", "-1"), "--seed"),
        (("--person", "3"), "person: expected 0 to 2, got 3"),
        (("--batch-size", "0"), "--batch-size"),
        (("--nonsense",), "--nonsense"),
        (("--model", "nowhere"), "lifting.json: not a readable configuration"),
        (("-o", "no/folder/out.npz"), "no/folder/out.npz: cannot be written"),
        (("-o", "."), "expected a file to write, but it is a folder"),
        (("-o", "in.npz"), "expected different files"),
        (("--plot", "out.npz"), "expected different files"),
        (("--plot", "out.bmp3"), "out.bmp3: expected a picture's name"),
        (("--plot", "no/folder/out.png"), "no/folder/out.png: cannot be written"),
    ],
)
def test_refuses_bad_options(
    options: tuple[str, ...],
    message: str,
    folder: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ("-o", "out.npz", "--model", str(model))
    assert message in refused(capsys, "sample", "in.npz", *common, *options)
    assert os.listdir() == ["in.npz"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_cuda_where_there_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "device: cuda" in refused(capsys, "sample", "in.npz", "--device", "cuda")
    assert "device: cuda" in refused(capsys, "demo", "--device", "cuda")
    assert os.listdir() == ["in.npz"]


def test_refuses_damaged_models(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = folder / "damaged"
    damaged.mkdir()
    (damaged / "lifting.json").write_bytes((model / "lifting.json").read_bytes())
    tensors = load_file(model / "lifting.safetensors")
    name = "condition_net.0.weight"
    save_file({**tensors, name: tensors[name][:, 1:].clone()}, damaged / "lifting.safetensors")
    message = refused(capsys, "sample", "in.npz", "--model", "damaged")
    assert f"tensor '{name}': expected (16, 78), got (16, 77)" in message
    (damaged / "lifting.safetensors").write_bytes(b"\x40" + bytes(30))
    message = refused(capsys, "demo", "--model", "damaged")
    assert "damaged/lifting.safetensors: not a readable safetensors file" in message
    assert sorted(os.listdir()) == ["damaged", "in.npz"]


def test_a_failing_write_keeps_the_old_file(
    folder: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Any, file: Any, name: str) -> None:
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasthyp.pipeline.PoseHypotheses.save", full)
    Path("out.npz").write_text("old")
    message = refused(capsys, "sample", "in.npz", "-o", "out.npz", "--model", str(model))
    assert "No space left on device" in message
    assert Path("out.npz").read_text() == "old"
    assert sorted(os.listdir()) == ["in.npz", "out.npz"]


def test_a_fault_of_ours_is_not_called_bad_input(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("fasthyp.cli._sample.estimate", fault)
    with pytest.raises(AssertionError, match="a bug"):
        main(["sample", "in.npz", "--model", str(model)])
    assert os.listdir() == ["in.npz"]


# --- demo ---


def test_demo_draws_the_astronaut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-n", "50", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["written"] == ["fasthyp_demo.png"]
    assert summary["not_fitted"] == []
    spread = summary["std_mm"]
    assert spread["left_ankle"] + spread["right_ankle"] > spread["left_hip"] + spread["right_hip"]
    picture = Path("fasthyp_demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert 1500 < width < 4000
    assert 700 < height < width
    assert sorted(os.listdir()) == ["fasthyp_demo.png", "in.npz"]


def test_demo_captions_are_measured() -> None:
    covariance = np.zeros((1, 13, 3, 3))
    covariance[0, [1, 2, 11, 12]] = np.diag([9.0, 16.0, 10000.0])  # 5 mm across the image
    covariance[0, [11, 12]] *= 100
    result: Any = SimpleNamespace(covariance=covariance, hypotheses=np.zeros((1, 2000, 13, 3)))
    title, subtitle = demo_captions(result)
    assert title.startswith("2,000 poses")
    assert "the ankles vary by 50 mm, the shoulders by 5 mm" in subtitle


# --- train and evaluate ---


def test_train_and_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    write_mocap(folder / "cmu.npz")
    sizes = {"hidden": 16, "blocks": 2, "cond_dim": 8, "cond_hidden": 16}
    steps = {"steps": 9, "batch_size": 32, "decay_steps": 1, "validate_every": 2}
    recipe = {**sizes, **steps, "validation_size": 32, "precision": "float32"}
    Path("recipe.json").write_text(json.dumps(recipe))
    train = ["train", "lifting", "--data", "cmu.npz", "--out", "run"]
    assert main([*train, "--config", "recipe.json", "--steps", "2", "--seed", "3"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert (config["steps"], config["seed"], config["hidden"]) == (2, 3, 16)
    assert main([*train, "--resume", "--steps", "4"]) == 0
    assert "wrote run/lifting.safetensors" in capsys.readouterr().out

    assert main(["evaluate", "run", "cmu.npz", "-n", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_samples"] == [5]
    row = result["all"]
    assert row["best_of"]["5"]["mpjpe_mm"] <= row["mode"]["mpjpe_mm"]


def test_train_and_evaluate_refuse(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ("train", "lifting", "--out", "run", "--data")
    assert "--data" in refused(capsys, "train", "lifting", "--out", "run")
    assert "none.npz" in refused(capsys, *train, "none.npz")
    assert "coco13_mm" in refused(capsys, *train, "in.npz")
    assert "--steps" in refused(capsys, *train, "in.npz", "--steps", "0")
    assert "config.json" in refused(capsys, *train, "in.npz", "--resume")
    for text in ('{"stepz": 1}', '{"steps": "ten"}', '{"simulation": 5}', '{"steps"', "[]"):
        Path("recipe.json").write_text(text)
        refused(capsys, *train, "in.npz", "--config", "recipe.json")
    assert not Path("run").exists()
    assert "joints_3d" in refused(capsys, "evaluate", str(model), "in.npz")


def test_train_a_system(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    write_mocap(folder / "cmu.npz")
    sizes = {"batch_size": 8, "validation_size": 16, "width": 8, "validate_every": 1}
    Path("recipe.json").write_text(json.dumps({**sizes, "system": "regression"}))
    train = ["train", "regression", "--data", "cmu.npz", "--out", "run"]
    settings = ["--set", "learning_rate=0.5", "--set", "schedule=constant", "--seed", "3"]
    assert main([*train, "--config", "recipe.json", *settings, "--steps", "1"]) == 0
    assert capsys.readouterr().out == "wrote run/model\n"
    config = json.loads(Path("run/config.json").read_text())
    assert {**sizes, "learning_rate": 0.5, "seed": 3, "steps": 1}.items() <= config.items()
    assert main([*train, "--resume", "--steps", "2"]) == 0
    assert len(Path("run/metrics.csv").read_text().splitlines()) == 3
    capsys.readouterr()

    simulate = ["simulate", "cmu.npz", "--detector", "h36m17", "--seed", "5"]
    assert main([*simulate, "--part", "test", "-o", "test.npz"]) == 0
    assert capsys.readouterr().out == "wrote test.npz: 40 persons\n"
    assert main([*simulate, "--heatmaps"]) == 0
    with np.load("persons.npz") as persons:
        assert persons["heatmaps"].shape == (160, 17, 64, 64)
        assert persons["joint_names"].tolist() == persons["detector_names"].tolist()
    assert main(["evaluate", "run/model", "test.npz", "-n", "1", "--json"]) == 0
    capsys.readouterr()
    stored = ["train", "regression", "--data", "test.npz", "--validation", "test.npz"]
    assert main([*stored, "--out", "other", "--config", "recipe.json", "--steps", "1"]) == 0


@pytest.mark.parametrize("system", sorted(SYSTEMS.keys() - {"regression"}))
def test_small_systems(folder: Path, capsys: pytest.CaptureFixture[str], system: str) -> None:
    pytest.importorskip("lightning")
    write_mocap(folder / "cmu.npz")
    settings = ("--set", "batch_size=8", "--set", "validation_size=8", "--steps", "1")
    train = ("train", system, "--data", "cmu.npz", "--out", "run", "--small", *settings)
    assert main([*train]) == 0
    detector = "mpii16" if system == "pose_inn" else "h36m17"
    assert (
        main(["simulate", "cmu.npz", "--detector", detector, "--part", "test", "-o", "t.npz"]) == 0
    )
    capsys.readouterr()
    assert main(["evaluate", "run/model", "t.npz", "-n", "1,3", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["all"]
    assert row["persons"] == 40
    assert 0 < row["best_of"]["3"]["mpjpe_mm"] <= row["mode"]["mpjpe_mm"] < 5000


def test_train_a_system_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    write_mocap(folder / "cmu.npz")
    train = ("train", "regression", "--data", "cmu.npz", "--out", "run")
    assert "lifting, humr, poco" in refused(capsys, "train", "foo", *train[2:])
    assert "--small" in refused(capsys, *train, "--small")
    assert "--small" in refused(capsys, "train", "poco", *train[2:], "--small", "--resume")
    assert "--data" in refused(capsys, "train", "regression", "--out", "run")
    assert "--set: unknown setting stepz" in refused(capsys, *train, "--set", "stepz=3")
    assert "steps: expected int" in refused(capsys, *train, "--set", "steps=many")
    assert "expected KEY=VALUE" in refused(capsys, *train, "--set", "steps")
    assert "steps has no parts" in refused(capsys, *train, "--set", "steps=1", "--set", "steps.a=1")
    assert "multiple of 3" in refused(capsys, *train, "--devices", "3")
    assert "config.json" in refused(capsys, *train, "--resume")
    assert "17 joints" in refused(capsys, *train, "--validation", "cmu.npz")
    assert "no such file" in refused(capsys, *train[:3], "none.npz", "--out", "run")
    for text in ('{"stepz": 1}', '{"steps": "ten"}', '{"steps"', "[]", '{"system": "prohmr"}'):
        Path("recipe.json").write_text(text)
        assert "recipe.json" in refused(capsys, *train, "--config", "recipe.json")
    assert "has no --devices" in refused(
        capsys, "train", "lifting", "--data", "cmu.npz", "--out", "run", "--devices", "2"
    )
    assert not Path("run").exists()
    assert "poses_mm" in refused(capsys, "simulate", "in.npz")
    assert "detector" in refused(capsys, "simulate", "cmu.npz", "--detector", "coco")
    assert "part" in refused(capsys, "simulate", "cmu.npz", "--part", "some")
    assert ".npz" in refused(capsys, "simulate", "cmu.npz", "-o", "persons.pkl")
    np.savez("flat.npz", poses_mm=np.zeros((3, 17, 2)))
    assert "(N, 17, 3)" in refused(capsys, "simulate", "flat.npz")
    assert not Path("persons.npz").exists()


# --- the command itself ---


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(fasthyp.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "fasthyp", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )


def test_help_is_quick_and_says_what_there_is() -> None:
    code = "import sys; from fasthyp.cli import main; main(['--help']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for command in ("sample", "demo", "info", "doctor", "train", "evaluate", "simulate"):
        assert command in out.stdout
    assert "'torch'" not in out.stdout
    assert "'matplotlib'" not in out.stdout


@pytest.mark.parametrize(
    "command",
    [(), ("sample",), ("demo",), ("info",), ("doctor",), ("train",), ("simulate",), ("evaluate",)],
)
def test_every_command_has_help(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    assert "Usage: fasthyp" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fasthyp {fasthyp.__version__}\n"


def test_as_a_process(folder: Path, model: Path) -> None:
    done = run("sample", "in.npz", "-n", "3", "--model", str(model), "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["persons"] == 3
    bad = run("sample", "none.npz", "-o", "bad.npz")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr == "fasthyp: error: none.npz: no such file\n"
    assert run("nonsense").returncode == 2
    assert sorted(os.listdir()) == ["hypotheses.npz", "in.npz"]
