"""From observations to hypotheses: units, order, independence from batches, unseen joints."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

import fasthyp
from fasthyp import HypothesisSampler
from fasthyp.models.lifting import LiftingFlow
from fasthyp.observations import Observations, from_heatmaps, from_keypoints
from fasthyp.pipeline import PoseHypotheses, check_memory, estimate
from fasthyp.skeleton import COCO13_JOINTS
from tests.synthetic import people

SIZE = 24


@pytest.fixture(scope="module")
def model() -> LiftingFlow:
    torch.manual_seed(0)
    model = LiftingFlow(hidden=16, blocks=2, cond_dim=8, cond_hidden=16)
    poses = people(500) + 0.05 * torch.randn(500, 13, 3)
    model.fit_standardisation(poses, torch.randn(500, 78))
    return model.eval()


@pytest.fixture(scope="module")
def observations() -> Observations:
    """Five people on maps with round blobs."""
    points = people(5, seed=1)[..., 1:] * torch.tensor([9.0, -9.0]) + SIZE / 2
    cells = torch.arange(float(SIZE))
    dx = (cells - points[..., :1])[..., None, :]
    dy = (cells - points[..., 1:])[..., :, None]
    return from_heatmaps((0.9 * torch.exp(-(dx**2 + dy**2) / (2 * 1.4**2))).numpy())


def stored(result: PoseHypotheses) -> dict[str, np.ndarray]:
    file = io.BytesIO()
    result.save(file, "a model")
    file.seek(0)
    return dict(np.load(file, allow_pickle=False))


def test_is_what_the_parts_give(model: LiftingFlow, observations: Observations) -> None:
    result = estimate(observations, model, 40, seed=3)
    assert observations.heatmaps is not None
    fit = fasthyp.fit_gaussians(observations.heatmaps)
    assert fit.converged.all()
    with torch.no_grad():
        cond = model.condition(fit.amplitude, fit.mean, fit.covariance, (SIZE, SIZE))
        x = HypothesisSampler(model.flow)(cond, 41, seed=3, include_mode=True)
        pose = model.to_pose(x[:, 1:])  # after the mode
        log_prob = model.log_prob(pose, cond)
        mode = model.to_pose(model.flow(torch.zeros(5, 39), c=[cond], rev=True)[0])
    close = {"rtol": 1e-4, "atol": 0.02}
    np.testing.assert_allclose(result.hypotheses, 1000 * pose.numpy(), **close)
    np.testing.assert_allclose(result.log_prob, log_prob.numpy(), rtol=1e-4, atol=0.01)
    np.testing.assert_allclose(result.mode, 1000 * mode.numpy(), **close)
    np.testing.assert_allclose(result.gaussians.mean, fit.mean, rtol=1e-6)


def test_spread_is_that_of_the_hypotheses(model: LiftingFlow, observations: Observations) -> None:
    result = estimate(observations, model, 60)
    centred = result.hypotheses.astype(np.float64) - result.hypotheses.mean(1, keepdims=True)
    rms = np.sqrt((centred**2).sum(-1).mean(1))
    np.testing.assert_allclose(result.std, rms, rtol=1e-4)
    assert result.covariance.shape == (5, 13, 3, 3)
    for p, j in ((0, 0), (4, 12)):
        expected = np.cov(centred[p, :, j].T, bias=True)
        atol = 1e-4 * expected.max()
        np.testing.assert_allclose(result.covariance[p, j], expected, rtol=1e-3, atol=atol)
    assert result.std.min() > 10  # millimetres: the people are 1.5 m tall
    assert np.abs(result.mode[:, 7] + result.mode[:, 8]).max() < 1000


def test_does_not_depend_on_batches(model: LiftingFlow, observations: Observations) -> None:
    done: list[int] = []
    whole = estimate(observations, model, 30, seed=1, batch_size=5)
    split = estimate(observations, model, 30, seed=1, batch_size=2, progress=done.append)
    alone = estimate(observations.person(3), model, 30, seed=1, first=3)
    assert done == [2, 2, 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    single = estimate(observations, model, 30, seed=1)
    torch.set_num_threads(threads)
    for name in ("hypotheses", "log_prob", "mode", "std", "covariance"):
        expected = getattr(whole, name)
        np.testing.assert_array_equal(getattr(split, name), expected)
        np.testing.assert_array_equal(getattr(single, name), expected)
        np.testing.assert_array_equal(getattr(alone, name)[0], expected[3])
    other = estimate(observations, model, 30, seed=2)
    assert np.abs(other.hypotheses - whole.hypotheses).max() > 1
    assert np.abs(whole.hypotheses[0] - whole.hypotheses[1]).max() > 1


def test_more_samples_begin_with_the_same(model: LiftingFlow, observations: Observations) -> None:
    few, many = (estimate(observations, model, n).hypotheses for n in (1, 50))
    np.testing.assert_allclose(many[:, :1], few, rtol=1e-5, atol=1e-3)
    assert estimate(observations, model, 1).std.max() == 0


def test_unseen_joints_enter_as_wide_blobs(model: LiftingFlow, observations: Observations) -> None:
    assert observations.heatmaps is not None
    maps = observations.heatmaps.clone()
    maps[0, 5], maps[0, 6], maps[1, 0, 3, 3], maps[2, 9] = torch.nan, 0.0, torch.inf, 0.3
    result = estimate(replace(observations, heatmaps=maps), model, 20)
    expected = np.ones((5, 13), bool)
    expected[[0, 0, 1, 2], [5, 6, 0, 9]] = False
    np.testing.assert_array_equal(result.observed, expected)
    assert np.isfinite(result.hypotheses).all()
    np.testing.assert_array_equal(stored(result)["fit_converged"], expected)
    whole = estimate(observations, model, 20)
    np.testing.assert_array_equal(result.hypotheses[3:], whole.hypotheses[3:])
    # what was in the unseen map does not matter
    maps[0, 5], maps[0, 6] = 0.0, -torch.inf
    again = estimate(replace(observations, heatmaps=maps), model, 20)
    np.testing.assert_array_equal(again.hypotheses, result.hypotheses)


def test_a_person_that_is_not_seen_at_all(model: LiftingFlow, observations: Observations) -> None:
    assert observations.heatmaps is not None
    maps = observations.heatmaps.clone()
    maps[3] = 0
    with pytest.raises(ValueError, match="none of person 3's heatmaps"):
        estimate(replace(observations, heatmaps=maps), model, 5, batch_size=2)


def test_keypoints_give_what_their_heatmaps_give(
    model: LiftingFlow, observations: Observations
) -> None:
    whole = estimate(observations, model, 20)
    given = from_keypoints(
        *(values.double().numpy() for values in (whole.gaussians.mean, whole.gaussians.covariance)),
        amplitudes=whole.gaussians.amplitude.numpy(),
        image_size=(SIZE, SIZE),
    )
    result = estimate(given, model, 20)
    np.testing.assert_allclose(result.hypotheses, whole.hypotheses, rtol=1e-3, atol=0.5)
    assert result.fit is None
    assert result.observed.all()
    assert "fit_rmse" not in stored(result)


def test_what_is_saved(model: LiftingFlow, observations: Observations) -> None:
    result = estimate(observations, model, 7, seed=2**63 + 5)
    arrays = stored(result)
    shapes = {
        "hypotheses": (5, 7, 13, 3),
        "log_prob": (5, 7),
        "mode": (5, 13, 3),
        "std": (5, 13),
        "covariance": (5, 13, 3, 3),
        "fit_amplitude": (5, 13),
        "fit_mean": (5, 13, 2),
        "fit_covariance": (5, 13, 2, 2),
        "fit_sigma_x": (5, 13),
        "fit_sigma_y": (5, 13),
        "fit_theta": (5, 13),
        "fit_rmse": (5, 13),
        "fit_converged": (5, 13),
        "joint_names": (13,),
        "seed": (),
        "model": (),
        "version": (),
    }
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert all(arrays[name].dtype == np.float32 for name in list(shapes)[:12])
    assert tuple(arrays["joint_names"]) == COCO13_JOINTS
    assert int(arrays["seed"]) == 2**63 + 5
    assert str(arrays["model"]) == "a model"
    assert str(arrays["version"]) == fasthyp.__version__


def test_numbers_that_are_not_finite_are_no_result(observations: Observations) -> None:
    model = LiftingFlow(hidden=4, blocks=1, cond_dim=2, cond_hidden=2)
    model.unwhiten.fill_(torch.nan)
    with pytest.raises(ValueError, match="model: its hypotheses of person 0 are not finite"):
        estimate(observations, model, 5)


def test_refuses(model: LiftingFlow, observations: Observations) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        estimate(observations, model, 5, batch_size=0)
    with pytest.raises(ValueError, match="num_samples"):
        estimate(observations, model, 0)
    with pytest.raises(ValueError, match="precision"):
        estimate(observations, model, 5, precision="low")
    check_memory(10, 1000)
    with pytest.raises(ValueError, match=r"num_samples: .* GiB, this machine has"):
        check_memory(1000, 10**9)
