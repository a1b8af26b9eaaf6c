"""Evaluation of any model: every figure against its own formula, and the same figures however the
persons are split."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.spatial.transform import Rotation
from torch import Tensor

from fasthyp import evaluation
from fasthyp._processes import joined
from fasthyp.cli import main
from fasthyp.cli._data import open_data
from fasthyp.data.persons import PersonBatch
from fasthyp.data.readers import cmu, persons, save_persons
from fasthyp.evaluation import evaluate
from fasthyp.models import Hypotheses, LiftingFlow, Regression, load
from fasthyp.models.hypotheses import derive_seed, draw
from fasthyp.skeleton import COCO13_JOINTS, H36M17_JOINTS, MPII16_JOINTS
from tests.synthetic import write_mocap

NAMES = ("pelvis", "right_hip", "left_hip", "spine", "head", "jaw", "left_wrist", "right_wrist")


class Blurred:
    """Each person's features as a pose, and noise about it: the first hypothesis is exact."""

    names = NAMES

    def __init__(self, std: float = 0.1, uncertainty: bool = False, mesh: bool = False) -> None:
        self.std, self.uncertainty, self.mesh = std, uncertainty, mesh

    def poses(
        self, batch: PersonBatch, number: int, seed: int, mode: bool, first: int
    ) -> tuple[Tensor, Tensor]:
        assert batch.features is not None
        centre = batch.features.view(len(batch), 1, -1, 3)
        noise = torch.stack(
            [
                torch.randn(
                    (number, *centre.shape[2:]),
                    generator=torch.Generator().manual_seed(derive_seed(seed, first + row) >> 2),
                )
                for row in range(len(batch))
            ]
        )
        if mode:
            noise[:, 0] = 0
        return centre + self.std * noise, noise

    def hypotheses(
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
        image_offset: int = 0,
    ) -> Hypotheses:
        poses, noise = self.poses(persons, num_samples, seed, include_mode, image_offset)
        uncertainty = persons.features.view(len(persons), -1, 3).norm(dim=-1)  # type: ignore[union-attr]
        return Hypotheses(
            joints_3d=poses,
            joint_names=self.names,
            log_prob=-noise.square().sum((-1, -2)),
            vertices=2 * poses if vertices and self.mesh else None,
            uncertainty=uncertainty if self.uncertainty else None,
        )


class WithoutOffset(Blurred):
    def hypotheses(  # type: ignore[override]
        self,
        persons: PersonBatch,
        num_samples: int,
        seed: int = 0,
        include_mode: bool = True,
        vertices: bool = False,
    ) -> Hypotheses:
        return super().hypotheses(persons, num_samples, seed, include_mode, vertices)


def make(number: int = 9, noise: float = 0.05, mesh: bool = False, seed: int = 0) -> PersonBatch:
    g = torch.Generator().manual_seed(seed)
    pose = 0.4 * torch.randn(number, len(NAMES), 3, generator=g)
    truth = pose + noise * torch.randn(pose.shape, generator=g)
    std = torch.full((number, 4), 2.0)
    std[::3, 1] = 6.0
    return PersonBatch(
        joints_3d=truth - truth[:, :1],
        features=pose.flatten(1),
        covariance=torch.diag_embed(torch.stack([std, std / 2], -1).square()),
        vertices=2 * pose if mesh else None,
        # another order than the model's, and a joint that it lacks
        joint_names=NAMES,
    )


def reordered(batch: PersonBatch) -> PersonBatch:
    """The same persons with their joints the other way round, and one more."""
    truth = batch.joints_3d
    assert truth is not None
    extra = torch.cat([truth.flip(1), torch.full_like(truth[:, :1], 7.0)], 1)
    return PersonBatch(
        joints_3d=extra, features=batch.features, joint_names=(*NAMES[::-1], "left_toe")
    )


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    else:
        yield path, value


def same(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-9) -> None:
    a, b = dict(leaves(found)), dict(leaves(expected))
    assert a.keys() == b.keys()
    for name, value in b.items():
        if isinstance(value, float):
            assert a[name] == pytest.approx(value, rel=rtol, abs=1e-9), name
        else:
            assert a[name] == value, name


# --- the figures ---


def test_errors_are_those_of_their_formulas() -> None:
    batch, model, numbers = make(), Blurred(), (1, 3, 40)
    result = evaluate(model, batch, numbers, seed=5)
    answer = model.hypotheses(batch, 40, 5)
    hypotheses = 1000 * answer.joints_3d.numpy().astype(float)
    hypotheses -= hypotheses[:, :, :1]
    truth = 1000 * batch.joints_3d.numpy().astype(float)  # type: ignore[union-attr]
    distance = np.linalg.norm(hypotheses - truth[:, None], axis=-1)  # (B, M, J)
    aligned = np.empty_like(distance)
    for b in range(len(truth)):
        for m in range(40):
            x, y = (points - points.mean(0) for points in (hypotheses[b, m], truth[b]))
            turned = Rotation.align_vectors(y, x)[0].apply(x)
            scaled = turned * (turned * y).sum() / (x * x).sum()
            aligned[b, m] = np.linalg.norm(scaled - y, axis=-1)
    counted = [j for j, name in enumerate(NAMES) if name not in ("pelvis", "spine", "jaw")]
    correct = [j for j, name in enumerate(NAMES) if name != "spine"]
    below = (distance[..., counted, None] < np.arange(0, 151, 5)).mean((-1, -2))
    curve = (aligned[..., correct].max(-1)[..., None] < np.arange(1, 301)).astype(float)
    expected = {
        "mpjpe_mm": (distance.mean(-1), np.min),
        "pa_mpjpe_mm": (aligned.mean(-1), np.min),
        "pck150": ((distance[..., counted] < 150).mean(-1), np.max),
        "auc": (below, np.max),
        "cps_mm": (np.trapezoid(curve, axis=-1), np.max),
    }
    row = result["all"]
    for name, (values, best) in expected.items():
        tolerance = 1e-4 if name != "cps_mm" else 5e-3
        assert row["mode"][name] == pytest.approx(values[:, 0].mean(), rel=tolerance)
        assert row["average"][name] == pytest.approx(values[:, 1:].mean(), rel=tolerance)
        for number in numbers:
            wanted = best(values[:, :number], axis=1).mean()
            assert row["best_of"][str(number)][name] == pytest.approx(wanted, rel=tolerance), name
    middle = hypotheses[:, 1:].mean(1)
    mean = np.linalg.norm(middle - truth, axis=-1).mean()
    assert row["mean_hypothesis"]["mpjpe_mm"] == pytest.approx(mean, rel=1e-4)
    drawn = hypotheses[:, 1:, 1:]
    spread = np.sqrt(drawn.var(1).sum(-1)).mean()
    assert row["sharpness_mm"] == pytest.approx(spread, rel=1e-4)
    for axis in range(3):
        wanted = drawn[..., axis].std(1, ddof=1).mean()
        assert row["diversity_mm"]["xyz"[axis]] == pytest.approx(wanted, rel=1e-4)
    correlation = np.corrcoef(np.sqrt(drawn.var(1).sum(-1)).ravel(), distance[:, 0, 1:].ravel())[
        0, 1
    ]
    assert row["pcc"] == pytest.approx(correlation, abs=1e-4)
    assert (result["persons"], row["persons"], result["root"]) == (9, 9, ["pelvis"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_joints_are_matched_by_name() -> None:
    batch = make()
    expected = evaluate(Blurred(), batch, (1, 5))
    found = evaluate(Blurred(), reordered(batch), (1, 5))
    assert found["joints"] == list(NAMES[::-1])
    for name in ("mode", "best_of", "average"):
        same(found["all"][name], expected["all"][name], rtol=1e-4)
    some = evaluate(Blurred(), batch, (1,), joints=("head", "left_wrist"))
    truth, poses = batch.joints_3d, batch.features.view(-1, len(NAMES), 3)  # type: ignore[union-attr]
    error = (truth - (poses - poses[:, :1])).norm(dim=-1)[:, [4, 6]].mean()
    assert some["all"]["mode"]["mpjpe_mm"] == pytest.approx(1000 * float(error), rel=1e-4)
    assert "mean_hypothesis" not in some["all"]


def test_calibrated_model() -> None:
    """The truth is drawn as the hypotheses are; twice the spread covers too much."""
    batch = make(300, noise=0.1)
    good = evaluate(Blurred(0.1), batch, (100,))["all"]
    assert good["calibration_error"] < 0.03
    assert good["coverage"]["0.5"] == pytest.approx(0.5, abs=0.05)
    wide = evaluate(Blurred(0.2), batch, (100,))["all"]
    assert wide["coverage"]["0.5"] > 0.8
    assert wide["sharpness_mm"] == pytest.approx(2 * good["sharpness_mm"], rel=0.01)


def test_own_uncertainty() -> None:
    batch = make()
    row = evaluate(Blurred(uncertainty=True), batch, (1,))["all"]
    poses = batch.features.view(-1, len(NAMES), 3)  # type: ignore[union-attr]
    error = (batch.joints_3d - (poses - poses[:, :1])).norm(dim=-1)[:, 1:]  # type: ignore[operator]
    expected = np.corrcoef(poses.norm(dim=-1)[:, 1:].ravel(), error.ravel())[0, 1]
    assert row["pcc"] == pytest.approx(expected, abs=1e-5)


def test_vertices() -> None:
    batch = make(mesh=True, noise=0)
    row = evaluate(Blurred(mesh=True), batch, (1, 4))["all"]
    answer = Blurred().hypotheses(batch, 4)
    mesh = 2 * answer.joints_3d - answer.joints_3d[:, :, :1]
    root = torch.zeros(9, 1, 3)
    error = 1000 * (mesh - (batch.vertices - root)[:, None]).norm(dim=-1).mean(-1)
    assert row["mode"]["pve_mm"] == pytest.approx(float(error[:, 0].mean()), rel=1e-4)
    assert row["best_of"]["4"]["pve_mm"] == pytest.approx(float(error.amin(1).mean()), rel=1e-4)


def test_unknown_joints_do_not_count() -> None:
    batch = make()
    truth = batch.joints_3d.clone()  # type: ignore[union-attr]
    truth[:, 4] = torch.nan
    truth[2] = torch.nan
    partly = PersonBatch(joints_3d=truth, features=batch.features, joint_names=NAMES)
    found = evaluate(Blurred(), partly, (1, 5))["all"]
    kept = [j for j in range(len(NAMES)) if j != 4]
    rows = torch.arange(9) != 2
    expected = evaluate(Blurred(), batch, (1, 5), joints=[NAMES[j] for j in kept])
    poses = batch.features.view(-1, len(NAMES), 3)  # type: ignore[union-attr]
    error = (batch.joints_3d - (poses - poses[:, :1])).norm(dim=-1)[rows][:, kept]  # type: ignore[operator]
    assert found["mode"]["mpjpe_mm"] == pytest.approx(1000 * float(error.mean()), rel=1e-4)
    assert expected["all"]["persons"] == found["persons"] == 9
    # a person of whom nothing is known is as if not there
    same(found["mode"], evaluate(Blurred(), partly[rows], (1,))["all"]["mode"])


# --- rows ---


def test_hard_subset_and_groups(tmp_path: Path) -> None:
    batch = make(10)
    save_persons(tmp_path / "p.npz", batch, [f"action {i % 3}" for i in range(10)])
    data = persons(tmp_path / "p.npz", detector_names=("a", "b", "c", "d"))
    result = evaluate(Blurred(), data, (1, 5))
    assert result["hard"]["persons"] == 4
    numbers = evaluate(Blurred(), batch, (1, 5), hard_sigma=7.0)
    assert numbers["hard"]["persons"] == 0
    assert numbers["hard"]["mode"]["mpjpe_mm"] is None
    assert list(result["groups"]) == ["action 0", "action 1", "action 2"]
    assert [row["persons"] for row in result["groups"].values()] == [4, 3, 3]
    errors = [row["best_of"]["5"]["mpjpe_mm"] for row in result["groups"].values()]
    whole = result["all"]["best_of"]["5"]["mpjpe_mm"]
    assert whole == pytest.approx(np.average(errors, weights=[4, 3, 3]), rel=1e-9)
    mean = result["mean_over_groups"]
    assert mean["best_of"]["5"]["mpjpe_mm"] == pytest.approx(np.mean(errors), rel=1e-9)
    assert mean["persons"] == 10


# --- however it is split ---


@pytest.mark.parametrize("model", [Blurred(), WithoutOffset()])
def test_batch_size_changes_nothing(model: Blurred) -> None:
    batch = make(11)
    expected = evaluate(model, batch, (1, 20), batch_size=64)
    for size in (1, 4):
        same(evaluate(model, batch, (1, 20), batch_size=size), expected)
    more = evaluate(model, batch, (1, 20, 30))
    same(more["all"]["best_of"]["20"], expected["all"]["best_of"]["20"])
    assert evaluate(model, batch, (1, 20), seed=1)["all"] != expected["all"]


def test_hypotheses_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CHUNK", 8)
    batch, model = make(5), Blurred()
    parts = [
        draw(model, batch, 8 if k < 2 else 4, derive_seed(3, k) if k else 3, include_mode=k == 0)
        for k in range(3)
    ]
    poses = torch.cat([part.joints_3d for part in parts], 1)
    error = (poses - poses[:, :, :1] - batch.joints_3d[:, None]).norm(dim=-1).mean(-1)  # type: ignore[index]
    row = evaluate(model, batch, (2, 8, 10, 20), seed=3)["all"]
    for number in (2, 8, 10, 20):
        expected = 1000 * float(error[:, :number].amin(1).mean())
        assert row["best_of"][str(number)]["mpjpe_mm"] == pytest.approx(expected, rel=1e-5)
    average = 1000 * float(error[:, 1:].mean())
    assert row["average"]["mpjpe_mm"] == pytest.approx(average, rel=1e-5)
    middle = poses[:, 1:].mean(1)
    expected = 1000 * float((middle - middle[:, :1] - batch.joints_3d).norm(dim=-1).mean())  # type: ignore[operator]
    assert row["mean_hypothesis"]["mpjpe_mm"] == pytest.approx(expected, rel=1e-5)


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    # as torchrun says it
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    data = persons("p.npz", detector_names=("a", "b", "c", "d"))
    with joined("cpu") as here:
        assert (here.rank, here.world) == (rank, 2)
        # the second process has no person of the first data set, and none of a group of the other
        results = [evaluate(Blurred(), part, (1, 6), batch_size=2) for part in (make(2), data)]
    Path(f"{rank}.json").write_text(json.dumps(results))
    os.environ["MASTER_PORT"] = str(port + 1)
    with Path(f"{rank}.txt").open("w") as file, redirect_stdout(file):
        assert main(COMMAND) == 0


COMMAND = ["evaluate", "lifting", "cmu.npz", "-O", "persons=9", "-n", "1,10", "--json"]
COMMAND += ["--batch-size", "2"]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    write_mocap(Path("cmu.npz"))
    save_persons("p.npz", make(9), ["a", "a", "b", "b", "a", "a", "a", "b", "a"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(work, (str(tmp_path), port), nprocs=2, join=False)
    try:
        for _ in range(36):  # until both are done, three minutes at most
            if context.join(5):
                break
        else:
            pytest.fail("the processes did not end")
    finally:
        for process in context.processes:
            process.kill()
    data = persons("p.npz", detector_names=("a", "b", "c", "d"))
    expected = [evaluate(Blurred(), part, (1, 6)) for part in (make(2), data)]
    for rank in range(2):
        for found, alone in zip(
            json.loads(Path(f"{rank}.json").read_text()), expected, strict=True
        ):
            same(found, alone)
    assert main(COMMAND) == 0
    same(json.loads(Path("0.txt").read_text()), json.loads(capsys.readouterr().out))
    assert Path("1.txt").read_text() == ""


# --- refusals ---


def test_refusals() -> None:
    batch, model = make(3), Blurred()
    with pytest.raises(ValueError, match="num_samples: expected at least one"):
        evaluate(model, batch, ())
    with pytest.raises(ValueError, match="expected 1 <= num_samples"):
        evaluate(model, batch, (0,))
    with pytest.raises(ValueError, match="at least one person"):
        evaluate(model, batch[:0])
    with pytest.raises(ValueError, match="do not share 'left_toe'"):
        evaluate(model, batch, (1,), joints=("left_toe",))
    with pytest.raises(ValueError, match="expected joints_3d"):
        evaluate(model, PersonBatch(features=batch.features), (1,))
    legs = PersonBatch(
        joints_3d=batch.joints_3d[:, :1],
        features=batch.features,
        joint_names=("left_toe",),  # type: ignore[index]
    )
    with pytest.raises(ValueError, match="a pelvis or both hips among them"):
        evaluate(model, legs, (1,))
    features = batch.features.clone()  # type: ignore[union-attr]
    features[1, 0] = torch.nan
    lost = PersonBatch(joints_3d=batch.joints_3d, features=features, joint_names=NAMES)
    with pytest.raises(ValueError, match="hypotheses of person 1 are not finite"):
        evaluate(model, lost, (1,), batch_size=1)


# --- the models and the command ---


def test_load(tmp_path: Path) -> None:
    bundled = load("lifting")
    assert isinstance(bundled, LiftingFlow)
    bundled.save_pretrained(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "lifting.safetensors"):
        again = load(path)
        assert isinstance(again, LiftingFlow)
        assert torch.equal(again.centre, bundled.centre)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: not a readable configuration"):
        load(tmp_path / "other")
    for name in ("Unknown", "load", "Hypotheses", 3, None):
        (tmp_path / "other" / "config.json").write_text(json.dumps({"model": name}))
        with pytest.raises(ValueError, match="expected the name of a model, got"):
            load(tmp_path / "other")
    with pytest.raises(ValueError, match="takes no backbone"):
        load("lifting", backbone=None)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            load("lifting", "cuda")


def test_lifting_answers(tmp_path: Path) -> None:
    data = cmu(write_mocap(tmp_path / "cmu.npz"), persons=4)
    model = load("lifting")
    batch = data[:]
    whole = model.hypotheses(batch, 20, seed=2)
    assert whole.joint_names == COCO13_JOINTS
    few = model.hypotheses(batch[2:], 5, seed=2, image_offset=2)  # type: ignore[call-arg]
    assert torch.equal(few.joints_3d, whole.joints_3d[2:, :5])
    cond = model.condition(batch.amplitude, batch.mean, batch.covariance)  # type: ignore[attr-defined]
    poses = model.sample(cond, 20, 2, include_mode=True)  # type: ignore[attr-defined]
    torch.testing.assert_close(whole.joints_3d, poses, atol=1e-5, rtol=1e-5)
    # a joint that was not seen is replaced; a detector without it is refused
    mean = batch.mean.clone()  # type: ignore[union-attr]
    mean[0, 5] = torch.nan
    hidden = PersonBatch(
        amplitude=batch.amplitude,
        mean=mean,
        covariance=batch.covariance,
        detector_names=COCO13_JOINTS,
    )
    answer = model.hypotheses(hidden, 5, seed=2)
    assert answer.joints_3d.isfinite().all()
    assert not torch.equal(answer.joints_3d[0], whole.joints_3d[0, :5])
    assert torch.equal(answer.joints_3d[1:], whole.joints_3d[1:, :5])
    with pytest.raises(ValueError, match="has no joint 'left_shoulder'"):
        model.hypotheses(PersonBatch(mean=mean, detector_names=("nose",)), 5)
    with pytest.raises(ValueError, match="expected amplitude"):
        model.hypotheses(PersonBatch(mean=mean, detector_names=COCO13_JOINTS), 5)


def test_another_model_and_its_mesh(tmp_path: Path) -> None:
    data = cmu(write_mocap(tmp_path / "cmu.npz"), detector="mpii16", persons=6)
    assert data.detector_names == MPII16_JOINTS
    Regression(features=96, width=8, target="body").save_pretrained(tmp_path / "run")
    model = load(tmp_path / "run")
    assert isinstance(model, Regression)
    (tmp_path / "trained").mkdir()
    (tmp_path / "run").rename(tmp_path / "trained" / "model")  # as a training run leaves it
    (tmp_path / "trained" / "config.json").write_text('{"steps": 1}')
    assert isinstance(load(tmp_path / "trained"), Regression)
    other = cmu(tmp_path / "cmu.npz", detector="coco13", persons=2)
    with pytest.raises(ValueError, match=r"features: expected \(B, 96\), got \(2, 78\)"):
        evaluate(model, other, (1,))
    with pytest.raises(ValueError, match="precision: Regression has no choice, got 'medium'"):
        draw(model, data[:1], 1, precision="medium")
    result = evaluate(model, data, (1, 3))
    assert result["joints"] == list(H36M17_JOINTS)
    row = result["all"]
    assert row["mode"] == row["best_of"]["3"]  # it has one pose
    assert row["mode"]["pve_mm"] > 10
    assert row["sharpness_mm"] == pytest.approx(0, abs=1e-4)
    assert (row["pcc"], row["coverage"]["0.95"]) == (None, 0)
    poses = model(data[:].features).detach()
    error = 1000 * (poses - data[:].joints_3d).norm(dim=-1).mean()  # type: ignore[operator]
    assert row["mode"]["mpjpe_mm"] == pytest.approx(float(error), rel=1e-3)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_mocap(tmp_path / "cmu.npz"))
    arguments = ["evaluate", "lifting", data, "-O", "persons=6", "-n", "1,10"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["persons"], result["num_samples"]) == (6, [1, 10])
    assert list(result["groups"]) == ["subject 3"]
    row = result["all"]
    assert row["best_of"]["10"]["mpjpe_mm"] <= row["mode"]["mpjpe_mm"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"{row['mode']['mpjpe_mm']:.1f}" in text
    for bad, message in (
        (["-n", "ten"], "--num-samples: expected numbers"),
        (["-O", "persons"], "expected NAME=VALUE"),
        (["-O", "people=6"], "unexpected keyword argument 'people'"),
        (["--format", "coco"], "format: expected one of"),
        (["--joints", "tail"], "do not share 'tail'"),
        (["-O", "part=all"], "part: expected 'train'"),
    ):
        assert main([*arguments, *bad]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert main(["evaluate", str(tmp_path), data]) == 2
    assert "config.json" in capsys.readouterr().err
    assert main(["evaluate", "lifting", str(tmp_path / "none.npz")]) == 2
    assert "none.npz" in capsys.readouterr().err


def test_features_of_gaussians(tmp_path: Path) -> None:
    """Models of features take data sets that have Gaussians only, joints unseen among them."""
    batch = cmu(write_mocap(tmp_path / "cmu.npz"), detector="mpii16", persons=6)[:]
    mean = batch.mean.clone()  # type: ignore[union-attr]
    known = {"joints_3d": batch.joints_3d, "amplitude": batch.amplitude}
    names = {"joint_names": batch.joint_names, "detector_names": batch.detector_names}
    bare = PersonBatch(mean=mean, covariance=batch.covariance, **known, **names)  # type: ignore[arg-type]
    save_persons(tmp_path / "p.npz", bare)
    found = open_data(tmp_path / "p.npz", None, [])
    torch.testing.assert_close(found[:6].features, batch.features)
    mean[2, 3] = torch.nan
    save_persons(tmp_path / "p.npz", bare)
    features = open_data(tmp_path / "p.npz", None, [])[0:6].features
    assert features is not None
    assert features.isfinite().all()
    assert torch.equal(features[3:], found[3:6].features)  # type: ignore[arg-type]
