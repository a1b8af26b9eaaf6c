"""LiftingFlow: the condition, the density, sampling, files, and the bundled weights."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fasthyp.data import PoseSimulator, SimulatedBatch, SimulationConfig
from fasthyp.models.lifting import LiftingFlow, bone_basis
from fasthyp.skeleton import COCO13_JOINTS
from tests.synthetic import people


def observed(number: int = 64, seed: int = 0) -> SimulatedBatch:
    simulator = PoseSimulator(people(200), SimulationConfig(augment=False))
    return simulator.sample(number, torch.Generator().manual_seed(seed))


def gaussians(number: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch = observed(number, seed)
    return batch.amplitude, batch.mean, batch.covariance


@pytest.fixture
def model() -> LiftingFlow:
    """A small one with random weights that fits the synthetic people's size."""
    torch.manual_seed(0)
    model = LiftingFlow(hidden=32, blocks=3, cond_dim=8, cond_hidden=16)
    batch = observed(500)
    model.fit_standardisation(
        batch.pose, LiftingFlow.features(batch.amplitude, batch.mean, batch.covariance)
    )
    return model.eval()


# --- the condition --------------------------------------------------------------------------------


def test_features_do_not_depend_on_place_size_or_resolution() -> None:
    amplitude, mean, covariance = gaussians()
    features = LiftingFlow.features(amplitude, mean, covariance)
    assert features.shape == (4, 78)
    moved = LiftingFlow.features(amplitude, mean + torch.tensor([3.0, -2.0]), covariance)
    torch.testing.assert_close(moved, features, atol=1e-4, rtol=0)
    finer = LiftingFlow.features(amplitude, 4 * mean, 16 * covariance, (256, 256))
    torch.testing.assert_close(finer, features, atol=1e-4, rtol=0)


def test_features_hold_the_matrix_logarithm() -> None:
    amplitude, mean, _ = gaussians(1)
    angle = math.radians(30)
    axes = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    covariance = (axes @ torch.diag(torch.tensor([9.0, 4.0])) @ axes.T).expand(1, 13, 2, 2)
    middle, half, cross = LiftingFlow.features(amplitude, mean, covariance)[0, 39:].view(3, 13)
    log = axes @ torch.diag(torch.tensor([9.0, 4.0]).log()) @ axes.T
    torch.testing.assert_close(half, ((log[0, 0] - log[1, 1]) / 2).expand(13))
    torch.testing.assert_close(cross, log[0, 1].expand(13))
    # the trace is relative to the spread of the means
    torch.testing.assert_close(middle, middle[:1].expand(13))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("amplitude", -3.0),
        ("amplitude", 1e6),
        ("mean", 1e7),
        ("covariance", 1e12),
        ("covariance", 0.0),
        ("covariance", -5.0),
    ],
)
def test_poor_fits_are_clipped(name: str, value: float) -> None:
    given = dict(zip(("amplitude", "mean", "covariance"), gaussians(), strict=True))
    given[name][:, 5] = value
    features = LiftingFlow.features(**given)
    assert torch.isfinite(features).all()
    assert features.abs().max() < 20


def test_all_joints_in_one_place() -> None:
    amplitude, mean, covariance = gaussians()
    features = LiftingFlow.features(amplitude, torch.zeros_like(mean), covariance)
    assert torch.isfinite(features).all()


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("amplitude", lambda t: t[:, :12], ValueError),
        ("mean", lambda t: t[..., :1], ValueError),
        ("covariance", lambda t: t[:2], ValueError),
        ("mean", lambda t: t.long(), TypeError),
        ("mean", lambda t: t.masked_fill(torch.arange(13)[:, None] == 3, math.nan), ValueError),
        ("covariance", lambda t: t / 0, ValueError),
    ],
)
def test_condition_refuses(model: LiftingFlow, name: str, change, error: type) -> None:  # type: ignore[no-untyped-def]
    given = dict(zip(("amplitude", "mean", "covariance"), gaussians(), strict=True))
    given[name] = change(given[name])
    with pytest.raises(error, match=name):
        model.condition(**given)


def test_condition_refuses_an_empty_size(model: LiftingFlow) -> None:
    with pytest.raises(ValueError, match="size"):
        model.condition(*gaussians(), size=(0, 64))


# --- the density ----------------------------------------------------------------------------------


def test_bone_basis_is_invertible_and_means_what_it_says() -> None:
    basis = bone_basis()
    assert torch.linalg.cond(basis) < 20
    pose = people(1).double().flatten(1)
    bones = (pose @ basis.T).view(13, 3)
    figure = pose.view(13, 3)
    torch.testing.assert_close(bones[8], (figure[7] + figure[8]) / 2)
    torch.testing.assert_close(bones[11], figure[11] - figure[9])
    torch.testing.assert_close(bones[0], figure[0] - (figure[1] + figure[2]) / 2)


def test_to_pose_inverts_from_pose(model: LiftingFlow) -> None:
    pose = observed(10).pose.view(2, 5, 13, 3)
    x = model.from_pose(pose)
    assert x.shape == (2, 5, 39)
    assert 0.5 < x.std() < 2
    torch.testing.assert_close(model.to_pose(x), pose, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"\(\.\.\., 39\)"):
        model.to_pose(pose)
    with pytest.raises(ValueError, match=r"\(\.\.\., 13, 3\)"):
        model.from_pose(x)


def test_log_prob_is_the_density_of_the_metres(model: LiftingFlow) -> None:
    model.double()
    pose = observed(2).pose.double()
    cond = model.condition(*(value.double() for value in gaussians(2)))
    got = model.log_prob(pose[:, None], cond)[:, 0]
    for person in range(2):

        def latent(flat: Tensor, person: int = person) -> Tensor:
            x = model.from_pose(flat.view(1, 13, 3))
            return model.flow(x, c=[cond[person : person + 1]])[0][0]

        flat = pose[person].flatten()
        jacobian = torch.autograd.functional.jacobian(latent, flat)
        z = latent(flat)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        expected = expected + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(got[person], expected)


def test_log_prob_refuses(model: LiftingFlow) -> None:
    with pytest.raises(ValueError, match="pose, cond"):
        model.log_prob(observed(3).pose, torch.zeros(3, 8))


def test_training_reaches_every_parameter(model: LiftingFlow) -> None:
    cond = model.condition(*gaussians(8))
    model.log_prob(observed(8).pose[:, None], cond).sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


# --- samples --------------------------------------------------------------------------------------


def test_sample(model: LiftingFlow) -> None:
    cond = model.condition(*gaussians(3)).detach()
    pose, log_prob = model.sample(
        cond, 7, seed=1, include_mode=True, return_log_prob=True, precision="highest"
    )
    assert pose.shape == (3, 7, 13, 3)
    assert torch.equal(model.sample(cond, 7, seed=1, include_mode=True, precision="highest"), pose)
    with torch.no_grad():
        expected = model.log_prob(pose, cond)
        mode = model.flow(torch.zeros(3, 39), c=[cond], rev=True)[0]
    torch.testing.assert_close(log_prob, expected, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(pose[:, 0], model.to_pose(mode), atol=1e-4, rtol=0)


def test_samplers_are_kept_and_not_copied(model: LiftingFlow) -> None:
    cond = model.condition(*gaussians(3)).detach()
    pose = model.sample(cond, 7, seed=1)
    sampler = model._samplers.get(model.program, "high")
    model.sample(cond, 7, seed=1)
    assert model._samplers.get(model.program, "high") is sampler
    twin = copy.deepcopy(model)
    assert torch.equal(twin.sample(cond, 7, seed=1), pose)
    twin.centre.add_(1)
    torch.testing.assert_close(twin.sample(cond, 7, seed=1), pose + 1, atol=1e-4, rtol=0)
    assert torch.equal(model.sample(cond, 7, seed=1), pose)
    model.double()
    assert model.sample(cond.double(), 7, seed=1).dtype == torch.float64


def test_building_leaves_numpys_generator_alone() -> None:
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    LiftingFlow(hidden=4, blocks=2, cond_dim=2, cond_hidden=2)
    assert np.random.rand() == expected  # noqa: NPY002


@pytest.mark.parametrize("settings", [{"hidden": 0}, {"blocks": -1}, {"cond_dim": 2.5}])
def test_refuses_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        LiftingFlow(**settings)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(model: LiftingFlow, tmp_path: Path) -> None:
    target = model.save_pretrained(tmp_path / "deep")
    assert sorted(p.name for p in target.parent.iterdir()) == [
        "lifting.json",
        "lifting.safetensors",
    ]
    loaded = LiftingFlow.from_pretrained(tmp_path / "deep")
    assert loaded.config == model.config
    assert not loaded.training
    for (name, wanted), got in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3, msg=name)
        assert got.dtype == wanted.dtype
    again = loaded.save_pretrained(tmp_path / "again.safetensors")
    for name, value in LiftingFlow.from_pretrained(again).state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def damage(path: Path, kind: str) -> str:
    """Damage a saved model; returns what the error must name."""
    tensors, config = load_file(path), path.with_suffix(".json")
    first = "condition_net.0.weight"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return path.name
    if kind == "not safetensors":
        path.write_bytes(b"hello")
        return path.name
    if kind == "absent":
        path.unlink()
        return path.name
    if kind == "no config":
        config.unlink()
        return config.name
    if kind == "other config":
        config.write_text(json.dumps({**json.loads(config.read_text()), "cond_hidden": 17}))
        return "condition_net"
    if kind == "unknown setting":
        config.write_text(json.dumps({**json.loads(config.read_text()), "depth": 3}))
        return config.name
    if kind == "wrong shape":
        tensors[first] = tensors[first][:, 1:].contiguous()
    elif kind == "missing":
        del tensors[first]
    elif kind == "unknown":
        tensors["extra"] = tensors[first].clone()
        first = "extra"
    save_file(tensors, path)
    return f"'{first}'"


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "not safetensors",
        "absent",
        "no config",
        "other config",
        "unknown setting",
        "wrong shape",
        "missing",
        "unknown",
    ],
)
def test_damaged_files_are_refused(model: LiftingFlow, tmp_path: Path, kind: str) -> None:
    path = model.save_pretrained(tmp_path)
    named = damage(path, kind)
    with pytest.raises(ValueError, match=re.escape(named)):
        LiftingFlow.from_pretrained(path)


# --- the bundled weights --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> LiftingFlow:
    return LiftingFlow.from_pretrained()


def test_bundled_model(bundled: LiftingFlow) -> None:
    assert bundled.config == {"hidden": 1024, "blocks": 8, "cond_dim": 56, "cond_hidden": 256}
    assert bundled.joint_names == COCO13_JOINTS
    assert all(p.dtype == torch.float32 for p in bundled.parameters() if p.is_floating_point())


def test_bundled_model_lifts_people_it_has_not_seen(bundled: LiftingFlow) -> None:
    batch = observed(100, seed=5)
    with torch.no_grad():
        cond = bundled.condition(batch.amplitude, batch.mean, batch.covariance)
        nll = -bundled.log_prob(batch.pose[:, None], cond).mean()
    pose = bundled.sample(cond, 50, seed=0, include_mode=True, precision="highest")
    error = (pose - batch.clean_pose[:, None]).norm(dim=-1).mean(-1)
    mean_pose = observed(2000, seed=6).clean_pose.mean(0)
    mean_error = (mean_pose - batch.clean_pose).norm(dim=-1).mean()
    assert error[:, 0].mean() < 0.6 * mean_error
    assert error.amin(1).mean() < 0.9 * error[:, 0].mean()
    assert nll < -60


def test_bundled_model_is_unsure_of_what_it_does_not_see(bundled: LiftingFlow) -> None:
    mean = observed(20, seed=7).true_mean
    covariance = (1.2**2 * torch.eye(2)).repeat(20, 13, 1, 1)
    wide = covariance.clone()
    wide[:, 11:] *= 5**2

    def spread(covariance: Tensor) -> Tensor:
        """In the plane of the picture: depth is uncertain anyway."""
        amplitude = 1.27 / torch.linalg.det(covariance).pow(0.25)
        with torch.no_grad():
            cond = bundled.condition(amplitude, mean, covariance)
        pose = bundled.sample(cond, 200, seed=0, precision="highest")
        return pose[..., :2].var(1).sum(-1).sqrt().mean(0)

    sharp, blurred = spread(covariance), spread(wide)
    assert (blurred[11:] > 1.5 * sharp[11:]).all(), (sharp, blurred)
    assert (blurred[11:] > 2.5 * blurred[1:3]).all(), (sharp, blurred)
