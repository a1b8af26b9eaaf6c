"""PoseEstimator: one call from heatmaps to hypotheses, the same captured and stage by stage."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fasthyp
from fasthyp import _C, PoseEstimate, PoseEstimator
from fasthyp.models.lifting import LiftingFlow
from fasthyp.observations import from_heatmaps
from fasthyp.pipeline import estimate
from tests.replays import Replays
from tests.synthetic import people

SIZE = 24


@pytest.fixture
def model() -> LiftingFlow:
    torch.manual_seed(0)
    model = LiftingFlow(hidden=16, blocks=2, cond_dim=8, cond_hidden=16)
    poses = people(500) + 0.05 * torch.randn(500, 13, 3)
    model.fit_standardisation(poses, torch.randn(500, 78))
    return model.eval()


@pytest.fixture
def heatmaps() -> Tensor:
    """Five people on maps with round blobs, (5, 13, 24, 24)."""
    points = people(5, seed=1)[..., 1:] * torch.tensor([9.0, -9.0]) + SIZE / 2
    cells = torch.arange(float(SIZE))
    dx = (cells - points[..., :1])[..., None, :]
    dy = (cells - points[..., 1:])[..., :, None]
    return 0.9 * torch.exp(-(dx**2 + dy**2) / (2 * 1.4**2))


def flat(result: PoseEstimate) -> list[Tensor]:
    return [*result[:-1], *result.fit]


def assert_same(result: PoseEstimate, expected: PoseEstimate) -> None:
    """To the last bit; on a GPU but for the rounding of the condition's matrix products."""
    close = {"rtol": 1e-4, "atol": 0.02} if result.mode.is_cuda else {"rtol": 0, "atol": 0}
    for got, want in zip(flat(result), flat(expected), strict=True):
        torch.testing.assert_close(got, want, **close, equal_nan=True)


def test_is_what_estimate_gives(model: LiftingFlow, heatmaps: Tensor) -> None:
    result = PoseEstimator(model, 30)(heatmaps, seed=3, image_offset=2)
    expected = estimate(from_heatmaps(heatmaps.numpy()), model, 30, seed=3, first=2, batch_size=2)
    for name in ("hypotheses", "log_prob", "mode", "std", "covariance", "observed"):
        np.testing.assert_array_equal(getattr(result, name).numpy(), getattr(expected, name))
    torch.testing.assert_close(result.mean, result.hypotheses.mean(1))
    assert expected.fit is not None
    for got, want in zip(result.fit, expected.fit, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_is_what_the_model_gives(model: LiftingFlow, heatmaps: Tensor) -> None:
    result = PoseEstimator(model, 40)(heatmaps, seed=3)
    fit = fasthyp.fit_gaussians(heatmaps)
    cond = model.condition(fit.amplitude, fit.mean, fit.covariance, (SIZE, SIZE)).detach()
    pose = model.sample(cond, 41, seed=3, include_mode=True)
    assert isinstance(pose, Tensor)
    torch.testing.assert_close(result.mode, 1000 * pose[:, 0], rtol=1e-4, atol=0.02)
    torch.testing.assert_close(result.hypotheses, 1000 * pose[:, 1:], rtol=1e-4, atol=0.02)
    with torch.no_grad():
        log_prob = model.log_prob(result.hypotheses / 1000, cond)
    torch.testing.assert_close(result.log_prob, log_prob, rtol=1e-4, atol=0.01)


def test_the_17_joints_of_coco(model: LiftingFlow, heatmaps: Tensor) -> None:
    whole = torch.rand(5, 17, SIZE, SIZE)
    whole[:, [0, *range(5, 17)]] = heatmaps
    estimator = PoseEstimator(model, 20)
    assert_same(estimator(whole, seed=1), estimator(heatmaps, seed=1))


@pytest.mark.parametrize("threads", [1, 2])
def test_does_not_depend_on_the_batch(model: LiftingFlow, heatmaps: Tensor, threads: int) -> None:
    estimator, before = PoseEstimator(model, 1000), torch.get_num_threads()
    heatmaps[1, 4] = torch.nan
    whole = estimator(heatmaps, seed=1)
    torch.set_num_threads(threads)
    parts = [estimator(heatmaps[i : i + 1], seed=1, image_offset=i) for i in range(5)]
    torch.set_num_threads(before)
    for person, part in enumerate(parts):
        for got, want in zip(flat(part), flat(whole), strict=True):
            torch.testing.assert_close(got[0], want[person], rtol=0, atol=0, equal_nan=True)


def test_a_person_that_is_not_seen_at_all(model: LiftingFlow, heatmaps: Tensor) -> None:
    estimator = PoseEstimator(model, 20)
    whole = estimator(heatmaps, seed=1)
    heatmaps[1], heatmaps[3, 2:] = 0.0, torch.nan
    result = estimator(heatmaps, seed=1)
    assert not result.observed[1].any()
    assert result.observed[3].tolist() == [True] * 2 + [False] * 11
    for values in result[:6]:
        assert values[1].isnan().all()
        assert values[[0, 2, 3, 4]].isfinite().all()
    for got, want in zip(flat(result), flat(whole), strict=True):
        assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])


def test_a_model_without_numbers(model: LiftingFlow, heatmaps: Tensor) -> None:
    with torch.no_grad():
        model.condition_net[0].weight.fill_(torch.nan)
    result = PoseEstimator(model, 5)(heatmaps)
    assert result.hypotheses.isnan().all()
    assert result.log_prob.isnan().all()
    with pytest.raises(ValueError, match="model: its hypotheses of person 0 are not finite"):
        estimate(from_heatmaps(heatmaps.numpy()), model, 5)


def test_seeds(model: LiftingFlow, heatmaps: Tensor) -> None:
    estimator = PoseEstimator(model, 20)
    first = estimator(heatmaps, seed=1)
    assert_same(estimator(heatmaps, seed=1), first)
    assert not torch.equal(estimator(heatmaps, seed=2).hypotheses, first.hypotheses)
    torch.manual_seed(3)
    drawn = estimator(heatmaps)
    torch.manual_seed(3)
    assert_same(estimator(heatmaps), drawn)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes(model: LiftingFlow, heatmaps: Tensor, dtype: torch.dtype) -> None:
    estimator = PoseEstimator(model, 20)
    result, expected = estimator(heatmaps.to(dtype), seed=1), estimator(heatmaps, seed=1)
    assert result.hypotheses.dtype == torch.float32
    torch.testing.assert_close(result.hypotheses, expected.hypotheses, rtol=1e-2, atol=20)


def test_replays_are_plain_calls(
    model: LiftingFlow, heatmaps: Tensor, replays: type[Replays]
) -> None:
    estimator, plain = PoseEstimator(model, 20), PoseEstimator(model, 20, graph=False)
    for seed in range(4):
        maps = heatmaps * (1 - 0.1 * seed)
        maps[seed] = torch.nan
        want = plain(maps, seed=seed, image_offset=seed)
        assert_same(estimator(maps, seed=seed, image_offset=seed), want)
    assert [graph.replays for graph in replays.made] == [3]
    with torch.no_grad():
        model.unwhiten.mul_(1.1)
    assert_same(estimator(heatmaps, seed=1), plain(heatmaps, seed=1))
    for change in (
        lambda: model.condition_net[0].weight.mul_(1.1),
        lambda: model.feature_mean.add_(0.1),
        lambda: setattr(model, "feature_std", 2 * model.feature_std),
        lambda: setattr(model, "flow", copy.deepcopy(model.flow)),
    ):
        for _ in range(2):
            assert_same(estimator(heatmaps, seed=1), plain(heatmaps, seed=1))
        made = len(replays.made)
        with torch.no_grad():
            change()
        for _ in range(2):
            assert_same(estimator(heatmaps, seed=1), plain(heatmaps, seed=1))
        assert len(replays.made) == made + 1


def test_copies(model: LiftingFlow, heatmaps: Tensor, replays: type[Replays]) -> None:
    estimator = PoseEstimator(model, 20, graph=True)
    want = estimator(heatmaps, seed=1)
    twin = copy.deepcopy(estimator)
    assert_same(twin(heatmaps, seed=1), want)
    twin.model.centre.add_(1)
    moved = twin(heatmaps, seed=1)
    torch.testing.assert_close(moved.mode, want.mode + 1000, rtol=0, atol=0.1)
    assert_same(estimator(heatmaps, seed=1), want)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heatmaps": np.zeros((1, 13, 8, 8))}, TypeError, "heatmaps: expected a tensor"),
        ({"heatmaps": torch.zeros(1, 13, 8, 8).int()}, TypeError, "heatmaps: .* torch.int32"),
        ({"heatmaps": torch.zeros(13, 8, 8)}, ValueError, r"heatmaps: expected shape \(P, 13,"),
        ({"heatmaps": torch.zeros(1, 14, 8, 8)}, ValueError, r"got \(1, 14, 8, 8\)"),
        ({"heatmaps": torch.zeros(0, 13, 8, 8)}, ValueError, "with P >= 1"),
        ({"heatmaps": torch.zeros(1, 13, 2, 2)}, ValueError, "heatmaps: .* at least 6 cells"),
        ({"heatmaps": torch.zeros(1, 13, 8, 8, device="meta")}, ValueError, "expected on cpu"),
        ({"seed": -1}, ValueError, "seed: expected 0 <= seed"),
        ({"seed": 1.0}, TypeError, "seed: expected an int"),
        ({"image_offset": -1}, ValueError, "image_offset: expected 0 <="),
        ({"image_offset": 2**32 - 4}, ValueError, "image_offset: expected 0 <="),
    ],
)
def test_bad_input(
    model: LiftingFlow, heatmaps: Tensor, arguments: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        PoseEstimator(model, 5)(**{"heatmaps": heatmaps, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: expected a LiftingFlow, got Linear"),
        ({"num_samples": 0}, ValueError, "num_samples: expected 1 <="),
        ({"num_samples": 10.0}, TypeError, "num_samples: expected an int"),
        ({"precision": "low"}, ValueError, "precision: expected one of"),
        ({"graph": "yes"}, ValueError, 'graph: expected "auto", True or False'),
    ],
)
def test_refuses(model: LiftingFlow, arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PoseEstimator(**{"model": model, **arguments})


def test_graph_needs_a_gpu(model: LiftingFlow, heatmaps: Tensor) -> None:
    with pytest.raises(ValueError, match="graph: True needs a CUDA device, got cpu"):
        PoseEstimator(model, 5, graph=True)(heatmaps)


# --- on a GPU ---------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_cuda_graph_is_the_plain_call(model: LiftingFlow, heatmaps: Tensor, precision: str) -> None:
    model = model.cuda()
    estimator = PoseEstimator(model, 100, precision)
    plain = PoseEstimator(model, 100, precision, graph=False)
    batches = [heatmaps.cuda() * (1 - 0.1 * seed) for seed in range(3)]
    batches[1][2] = torch.nan
    for estimate_poses in (estimator, estimator, plain):
        estimate_poses(batches[0], seed=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [
            (estimator(maps, seed, image_offset=seed), plain(maps, seed, image_offset=seed))
            for seed, maps in enumerate(batches)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, expected in results:
        assert_same(result, expected)
    assert results[1][0].hypotheses[2].isnan().all()
    assert results[1][0].hypotheses[3].isfinite().all()
    assert [captured is not None for captured in estimator._graphs._kinds.values()] == [True]
    assert not torch.equal(
        estimator(batches[0], seed=5).hypotheses, estimator(batches[0], seed=6).hypotheses
    )


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_notices_new_weights(model: LiftingFlow, heatmaps: Tensor) -> None:
    model, heatmaps = model.cuda(), heatmaps.cuda()
    estimator = PoseEstimator(model, 100, graph=True)
    plain = PoseEstimator(model, 100, graph=False)
    before = estimator(heatmaps, seed=1)
    for change in (
        lambda: model.unwhiten.mul_(1.1),
        lambda: model.condition_net[0].weight.mul_(1.1),
        lambda: setattr(model, "feature_std", 2 * model.feature_std),
    ):
        with torch.no_grad():
            change()
        result = estimator(heatmaps, seed=1)
        assert_same(result, plain(heatmaps, seed=1))
        assert not torch.equal(result.hypotheses, before.hypotheses)
        before = result


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_on_two_streams(model: LiftingFlow, heatmaps: Tensor) -> None:
    model, heatmaps = model.cuda(), heatmaps.cuda()
    plain = PoseEstimator(model, 500, graph=False)
    want = [plain(heatmaps, seed=i) for i in range(20)]
    estimators = [PoseEstimator(model, 500, graph=True) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            got.append(estimators[i % 2](heatmaps, seed=i))
    torch.cuda.synchronize()
    for result, expected in zip(got, want, strict=True):
        assert_same(result, expected)


@pytest.mark.gpu
@needs_gpu
def test_cuda_is_the_cpu(model: LiftingFlow, heatmaps: Tensor) -> None:
    want = PoseEstimator(model, 200, "highest")(heatmaps, seed=1)
    estimator = PoseEstimator(copy.deepcopy(model).cuda(), 200, "highest")
    for _ in range(3):
        got = estimator(heatmaps.cuda(), seed=1)
        scale = float(want.hypotheses.abs().max())
        for name in ("hypotheses", "mode", "mean", "std"):
            difference = getattr(got, name).cpu() - getattr(want, name)
            assert difference.abs().max() < 1e-4 * scale, name
        torch.testing.assert_close(got.log_prob.cpu(), want.log_prob, rtol=1e-4, atol=0.01)
        assert torch.equal(got.observed.cpu(), want.observed)
