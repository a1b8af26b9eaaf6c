"""PoseINN against the published code on the FrEIA it was trained with, and its checkpoints."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fasthyp.flows as flows
from fasthyp.data.persons import PersonBatch
from fasthyp.models.pose_inn import PoseINN, PoseINNConfig
from fasthyp.models.pose_inn_input import DETECTOR_JOINTS
from fasthyp.skeleton import H36M17_JOINTS
from tests.conftest import GOLDEN, Golden, assert_as_good_as, golden_files, max_error

CHECKPOINT = GOLDEN / "freia_old_checkpoint.pt"


@pytest.fixture(params=golden_files("freia_old_clamp*.npz"))
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def from_golden(golden: Golden, tmp_path: Path) -> PoseINN:
    path = tmp_path / "weights.pt"
    torch.save({"net": golden.state_dict()}, path)
    return PoseINN.from_checkpoint(path)


def assert_stored_outputs(model: PoseINN, golden: Golden) -> None:
    with torch.no_grad():
        y, log_jac = model(golden["in/x"], golden["in/gauss"])
        x, log_jac_rev = model.reverse(golden["in/y"], golden["in/gauss"])
        cond = model.cond_net(golden["in/gauss"])
    values = {"y": y, "logjac": log_jac, "x_rev": x, "logjac_rev": log_jac_rev, "cond": cond}
    for name, value in values.items():
        assert_as_good_as(value, golden[f"out/{name}"], golden[f"out64/{name}"], name)


@pytest.mark.parametrize("path", golden_files("freia_old_checkpoint.pt"))
def test_published_kind_of_checkpoint(path: Path) -> None:
    model = PoseINN.from_checkpoint(path)
    assert model.config.freia == "old"
    assert all(row["accelerated"] for row in flows.explain(model).rows)
    assert_stored_outputs(model, Golden(path.parent / "freia_old_clamp.npz"))


def test_values_under_compile(golden: Golden, tmp_path: Path) -> None:
    model = from_golden(golden, tmp_path)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        y, log_jac = compiled(golden["in/x"], golden["in/gauss"])
    assert_as_good_as(y, golden["out/y"], golden["out64/y"])
    assert_as_good_as(log_jac, golden["out/logjac"], golden["out64/logjac"])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_values(
    golden: Golden, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTHYP_BACKEND", backend)
    assert_stored_outputs(from_golden(golden, tmp_path), golden)


def test_float64_values_and_gradients(golden: Golden, tmp_path: Path) -> None:
    model = from_golden(golden, tmp_path).double()
    gauss = golden["in/gauss"].double().requires_grad_()
    checked = 0
    for direction, leaf in (("grad", "x"), ("ginv", "y")):
        value = golden[f"in/{leaf}"].double().requires_grad_()
        out, log_jac = (model if leaf == "x" else model.reverse)(value, gauss)
        if leaf == "x":
            objective = 0.5 * out.square().sum() - log_jac.sum()
            names = ("y", "logjac")
        else:
            objective = (golden["in/W"].double() * out).sum()
            names = ("x_rev", "logjac_rev")
        for name, got in zip(names, (out, log_jac), strict=True):
            assert max_error(got, golden[f"out64/{name}"]) < 1e-12
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(objective, [value, gauss, *parameters.values()])
        for name, gradient in zip((leaf, "gauss"), found, strict=False):
            assert max_error(gradient, golden[f"{direction}64/{name}"]) < 1e-11, name
        peer = float(golden.meta["tol_float32_vs_float64"][f"{direction}/sd/<all params>"][1])
        for name, gradient in zip(parameters, found[2:], strict=True):
            exact = golden[f"{direction}/sd/{name}"]
            assert max_error(gradient, exact) <= 1.01 * peer * float(exact.abs().max()), name
            checked += 1
    assert checked == 2 * 68


def test_permutations_are_rebuilt_from_their_seeds(golden: Golden, tmp_path: Path) -> None:
    model = from_golden(golden, tmp_path)
    for k in range(8):
        place = 2 * k + 2
        assert torch.equal(model.inn.module_list[place].perm, golden[f"perm/{place}"])


def test_keys_are_those_of_the_checkpoint() -> None:
    stored = torch.load(CHECKPOINT, weights_only=True)["net"]
    model = PoseINN.from_checkpoint(CHECKPOINT)
    assert list(model.state_dict()) == list(stored)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in stored.items())


def test_as_freia_0_2_the_same_weights_give_other_poses(tmp_path: Path) -> None:
    golden = Golden(GOLDEN / "freia_old_clamp.npz")
    old = from_golden(golden, tmp_path)
    new = PoseINN(hidden=64, freia="0.2")
    state = new.state_dict()
    for key, value in old.state_dict().items():
        parts = key.split(".")
        if parts[0] == "inn":
            parts[2] = str(int(parts[2]) - 1)
            parts[3] = {"s1": "subnet1", "s2": "subnet2"}[parts[3]]
        state[".".join(parts)] = value
    path = tmp_path / "new.pt"
    torch.save(state, path)
    loaded = PoseINN.from_checkpoint(path)
    assert loaded.config.freia == "0.2"
    assert len(loaded.state_dict()) == 68 + 16
    with torch.no_grad():
        x, gauss = golden["in/x"], golden["in/gauss"]
        assert max_error(loaded(x, gauss)[0], old(x, gauss)[0]) > 1e-3


@pytest.mark.parametrize("freia", ["0.2", "old"])
def test_save_and_load(freia: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PoseINN(hidden=12, freia=freia).eval()
    loaded = PoseINN.from_pretrained(model.save_pretrained(tmp_path / "model"))
    torch.save({"net": model.state_dict()}, tmp_path / "official.pt")
    official = PoseINN.from_checkpoint(tmp_path / "official.pt")
    assert loaded.config == official.config == model.config
    x, gauss = torch.randn(3, 48), torch.randn(3, 78)
    with torch.no_grad():
        for other in (loaded, official):
            for a, b in zip(other(x, gauss), model(x, gauss), strict=True):
                assert torch.equal(a, b)
            assert torch.equal(pickle.loads(pickle.dumps(model))(x, gauss)[0], model(x, gauss)[0])
        back = model.reverse(model(x, gauss)[0], gauss)[0]
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


def test_sample() -> None:
    torch.manual_seed(0)
    model = PoseINN(hidden=12)
    gauss, pose_2d = torch.randn(3, 78), torch.randn(3, 32)
    poses, log_prob = model.sample(
        gauss, pose_2d, 20, seed=1, include_mode=True, return_log_prob=True
    )
    assert poses.shape == (3, 20, 48)
    assert log_prob.shape == (3, 20)
    with torch.no_grad():
        mode = model.reverse(torch.cat([torch.zeros(3, 16), pose_2d], 1), gauss)[0]
        back = model(poses.reshape(-1, 48), gauss.repeat_interleave(20, 0))[0]
    torch.testing.assert_close(poses[:, 0], mode, rtol=1e-4, atol=1e-4)
    want = pose_2d.repeat_interleave(20, 0)
    torch.testing.assert_close(back[:, 16:], want, rtol=1e-3, atol=1e-3)
    assert model.sample(gauss, pose_2d).shape == (3, 1000, 48)
    for arguments, error, message in (
        ((gauss[:, 1:], pose_2d), ValueError, r"gauss: expected shape \(B, 78\)"),
        ((gauss, pose_2d[:, 1:]), ValueError, r"pose_2d: expected shape \(B, 32\)"),
        ((gauss, pose_2d[1:]), ValueError, r"fixed: expected shape \(3, F\)"),
        ((gauss.numpy(), pose_2d), TypeError, "gauss: expected a tensor"),
    ):
        with pytest.raises(error, match=message):
            model.sample(*arguments)


def persons(number: int) -> PersonBatch:
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(number, 16, 2, 2, generator=generator)
    return PersonBatch(
        amplitude=torch.rand(number, 16, generator=generator),
        mean=10 + 40 * torch.rand(number, 16, 2, generator=generator),
        covariance=root @ root.mT + torch.eye(2),
        detector_names=DETECTOR_JOINTS,
    )


def test_hypotheses() -> None:
    torch.manual_seed(0)
    model, given = PoseINN(hidden=12).eval(), persons(3)
    found = model.hypotheses(given, 20, seed=1)
    assert found.joint_names == H36M17_JOINTS
    assert found.joints_3d.shape == (3, 20, 17, 3)
    assert found.log_prob is not None
    assert found.log_prob.shape == (3, 20)
    gauss, pose_2d = model.inputs(given)
    with torch.no_grad():
        mode = model.reverse(torch.cat([torch.zeros(3, 16), pose_2d], 1), gauss)[0]
    mode = mode.unflatten(1, (3, 16)).mT * torch.tensor([1.0, -1.0, -1.0])
    want = mode - (mode[:, :1] + mode[:, 3:4]) / 2
    torch.testing.assert_close(found.joints_3d[:, 0, 1:], want, rtol=1e-4, atol=1e-4)
    assert found.joints_3d[:, :, 0].abs().max() < 1e-5
    fewer = model.hypotheses(given, 7, seed=1)
    torch.testing.assert_close(fewer.joints_3d, found.joints_3d[:, :7])
    other = model.hypotheses(given, 7, seed=2)
    assert (other.joints_3d[:, 1:] - fewer.joints_3d[:, 1:]).abs().max() > 1e-3
    drawn = model.hypotheses(given, 7, seed=1, include_mode=False)
    torch.testing.assert_close(drawn.joints_3d[:, 1:], fewer.joints_3d[:, 1:])
    assert (drawn.joints_3d[:, 0] - fewer.joints_3d[:, 0]).abs().max() > 1e-3
    last = model.hypotheses(given[2:], 7, seed=1, image_offset=2)
    torch.testing.assert_close(last.joints_3d, fewer.joints_3d[2:])
    assert model.hypotheses(given, 2, vertices=True).vertices is None


def test_one_inverse_pass_of_many_latents() -> None:
    """As FrEIA's reverse pass of repeated conditions, with the same gradients."""
    torch.manual_seed(0)
    model = PoseINN(hidden=12).double()
    y, gauss, weight = torch.randn(3, 4, 48), torch.randn(3, 78), torch.randn(3, 4, 48)
    y, gauss, weight = (t.double() for t in (y, gauss, weight))
    together = model.inverse(y, gauss)
    apart = model.reverse(y.flatten(0, 1), gauss.repeat_interleave(4, 0))[0].view(3, 4, 48)
    torch.testing.assert_close(together, apart)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((together * weight).sum(), parameters),
        torch.autograd.grad((apart * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_named_configurations() -> None:
    """The paper's 1024, the code's 1028 and old FrEIA's clamp, which is the paper's equation 2."""
    assert PoseINNConfig().hidden == 1024
    assert PoseINNConfig.official() == PoseINNConfig(hidden=1028, freia="old")
    block = PoseINN(hidden=4).inn.module_list[1]
    scale = torch.tensor([0.5, 30.0])
    want = 2 * 2.0 / torch.pi * torch.atan(scale / 2.0)
    torch.testing.assert_close(2.0 * block.f_clamp(scale), want, rtol=2e-3, atol=0)


def _without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "inn.module_list.3.s2.2.bias": torch.zeros(47)}, r"3\.s2\.2\.bias.*\(47,"),
        (
            lambda s: {**s, "cond_net.0.weight": torch.zeros(256, 77)},
            r"cond_net\.0\.weight.*\(256, 78\)",
        ),
        (lambda s: _without(s, "inn.module_list.15.s1.0.bias"), r"15\.s1\.0\.bias' is missing"),
        (lambda s: {**s, "extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        (lambda s: _without(s, "inn.module_list.1.s1.0.weight"), "no matrix inn"),
        (lambda s: {**s, "inn.module_list.1.s1.0.weight": torch.zeros(3)}, "no matrix inn"),
        (lambda s: {"weight": torch.zeros(2)}, "no matrix inn"),
        (lambda s: {"weight": 3}, "weight: expected a tensor, got int"),
        (lambda s: [1], "expected a dict of tensors, got list"),
    ],
)
def test_wrong_checkpoints(change: Any, message: str, tmp_path: Path) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)["net"]
    path = tmp_path / "wrong.pt"
    torch.save(change(state), path)
    with pytest.raises(ValueError, match=message):
        PoseINN.from_checkpoint(path)


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PoseINN.from_checkpoint(tmp_path / "nowhere.pt")
    content = CHECKPOINT.read_bytes()
    for name, data in {"empty": b"", "text": b"hello", "cut": content[: len(content) // 2]}.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            PoseINN.from_checkpoint(path)
    path = tmp_path / "pickled"
    torch.save({"net": {"a": np.float64}}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        PoseINN.from_checkpoint(path)


def test_temporary_variables_are_passed_over(tmp_path: Path) -> None:
    state = torch.load(CHECKPOINT, weights_only=True)
    state["net"]["inn.tmp_var_1"] = torch.zeros(3)
    state["opt"] = {"state": {}, "param_groups": []}
    torch.save(state, tmp_path / "full.pt")
    PoseINN.from_checkpoint(tmp_path / "full.pt")


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="freia: expected"):
        PoseINN(freia="0.3")
