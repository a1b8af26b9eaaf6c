"""Statistics over hypotheses, k-means and the best of many hypotheses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp.metrics import (
    best_of_m,
    diversity,
    hypothesis_source,
    kmeans,
    mpjpe,
    over_hypotheses,
    pa_mpjpe,
    sharpness,
)
from fasthyp.sampling import HypothesisSampler
from tests.conftest import random_flow
from tests.metrics.test_procrustes import poses


def test_over_hypotheses() -> None:
    errors = torch.tensor([[4.0, 1.0, 3.0, 2.0], [7.0, 5.0, 5.0, 100.0]])
    found = over_hypotheses(errors)
    assert [x.tolist() for x in found] == [[1, 5], [2.5, 29.25], [2, 5], [4, 100]]
    for a, b in zip(found, over_hypotheses(errors.T, dim=0), strict=True):
        assert torch.equal(a, b)
    errors[0, 2] = torch.nan
    assert all(x.isnan().tolist() == [True, False] for x in over_hypotheses(errors))


def test_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 2.0, 5.0])
    drawn = scale * torch.randn(3, 4000, 2, 3, generator=generator) + 100
    torch.testing.assert_close(diversity(drawn), scale.expand(3, 2, 3), rtol=0.05, atol=0.0)
    two = torch.tensor([[[[0.0, 1.0]], [[2.0, 1.0]]]])  # one image, two hypotheses, one joint
    assert diversity(two).flatten().tolist() == pytest.approx([2**0.5, 0])
    assert diversity(two, correction=0).flatten().tolist() == pytest.approx([1, 0])
    assert sharpness(two).flatten().tolist() == pytest.approx([1])
    torch.testing.assert_close(sharpness(drawn), diversity(drawn, 0).square().sum(-1).sqrt())
    assert diversity(two[:, :1]).isnan().all()
    assert torch.equal(sharpness(two[:, :1]), torch.zeros(1, 1))


# --- k-means ---


def blobs(images: int, per_blob: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hypotheses (B, M, 5, 3) about known centres (B, k, 5, 3), in known numbers."""
    centres = 50 * poses(images, len(per_blob), 5, seed=seed) + 1000
    drawn = centres.repeat_interleave(torch.tensor(per_blob), 1)
    return drawn + poses(*drawn.shape[:3], seed=seed + 1), centres


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kmeans_finds_blobs(dtype: torch.dtype) -> None:
    drawn, centres = blobs(6, [40, 25, 10])
    order = torch.randperm(75, generator=torch.Generator().manual_seed(0))
    found = kmeans(drawn[:, order].to(dtype), 3, seed=0)
    assert found.centres.dtype == dtype
    assert found.sizes.tolist() == [[40, 25, 10]] * 6
    truth = torch.arange(3).repeat_interleave(torch.tensor([40, 25, 10]))[order]
    assert torch.equal(found.labels, truth.expand(6, -1))
    means = torch.stack([part.mean(1) for part in drawn.split([40, 25, 10], 1)], 1)
    torch.testing.assert_close(found.centres.double(), means, rtol=1e-5, atol=0)
    assert (found.centres - centres).abs().max() < 2


def test_kmeans_is_a_fixed_point_and_repeatable() -> None:
    drawn = poses(3, 200, 5)
    found = kmeans(drawn, 8, seed=3)
    for a, b in zip(found, kmeans(drawn, 8, seed=3), strict=True):
        assert torch.equal(a, b)
    distance = torch.cdist(drawn.flatten(2), found.centres.flatten(2))
    assert torch.equal(distance.argmin(-1), found.labels)
    for image in range(3):
        for cluster in range(8):
            members = drawn[image, found.labels[image] == cluster]
            assert len(members) == found.sizes[image, cluster] > 0
            torch.testing.assert_close(members.mean(0), found.centres[image, cluster])


def test_kmeans_lowers_the_best_error_of_few() -> None:
    """What it is for: k representatives come nearer to the truth than k random hypotheses."""
    drawn, truth = poses(100, 300, 5), poses(100, 5, seed=1)
    drawn = drawn * torch.linspace(0.1, 3, 100, dtype=torch.float64)[:, None, None, None]
    centres = kmeans(drawn, 5, seed=0).centres
    few = mpjpe(drawn[:, :5], truth[:, None]).amin(1).mean()
    assert mpjpe(centres, truth[:, None]).amin(1).mean() < few


def test_kmeans_extremes() -> None:
    drawn = poses(2, 6, 5)
    all_of_them = kmeans(drawn, 6, seed=0)
    assert all_of_them.sizes.tolist() == [[1] * 6] * 2
    torch.testing.assert_close(all_of_them.centres.sum(1), drawn.sum(1))
    torch.testing.assert_close(kmeans(drawn, 1, seed=0).centres[:, 0], drawn.mean(1))
    same = kmeans(torch.ones(2, 6, 5, 3), 3, seed=0)
    assert torch.equal(same.centres, torch.ones(2, 3, 5, 3))
    assert same.sizes.tolist() == [[6, 0, 0]] * 2


# --- the best of M ---


def draw_from(drawn: Tensor) -> Any:
    return lambda first, count: drawn[:, first : first + count]


@pytest.mark.parametrize("rows", [1, 30, 77, 10_000])
@pytest.mark.parametrize("error", [mpjpe, pa_mpjpe, partial(mpjpe, root=(1, 2))])
def test_best_of_m_is_that_of_all_at_once(rows: int, error: Any) -> None:
    drawn, truth = poses(3, 200, 5), poses(3, 5, seed=1)
    errors = error(drawn, truth[:, None])
    want = over_hypotheses(errors)
    for hypotheses in (drawn, drawn.flatten(2)):
        found = best_of_m(draw_from(hypotheses), truth, 200, error=error, rows=rows)
        torch.testing.assert_close(found.best, want.best)
        assert torch.equal(found.number, errors.argmin(1))
        assert torch.equal(found.pose, drawn[torch.arange(3), errors.argmin(1)])
        torch.testing.assert_close(found.mean, want.mean)
        torch.testing.assert_close(found.worst, want.worst)
        assert found.mean.dtype == torch.float64


@pytest.mark.parametrize(("images", "chunk"), [(2, 4369), (512, 256)])
def test_best_of_m_takes_a_megabyte_at_a_time(images: int, chunk: int) -> None:
    asked = []

    def draw(first: int, count: int) -> Tensor:
        asked.append((first, count))
        return torch.zeros(1, 1, 5, 3, dtype=torch.float64).expand(images, count, 5, 3)

    best_of_m(draw, poses(images, 5), chunk + 100)
    assert asked == [(0, chunk), (chunk, 100)]


def test_best_of_m_with_nan() -> None:
    drawn, truth = poses(3, 50, 5), poses(3, 5, seed=1)
    drawn[0, 7] = torch.nan
    drawn[2] = torch.nan
    errors = mpjpe(drawn, truth[:, None])
    found = best_of_m(draw_from(drawn), truth, 50, rows=30)
    assert float(found.best[0]) == float(errors[0][~errors[0].isnan()].min())
    assert found.number[2] == -1
    assert found.best.isnan().tolist() == [False, False, True]
    assert found.pose.isnan().all(-1).all(-1).tolist() == [False, False, True]
    assert found.mean.isnan().tolist() == found.worst.isnan().tolist() == [True, False, True]


def test_the_source_numbers_hypotheses_as_the_sampler_does() -> None:
    torch.manual_seed(0)
    flow, conditions = random_flow(9, (4,)), torch.randn(3, 4)
    sampler = HypothesisSampler(flow, "highest")
    whole = sampler(conditions, 50, seed=7, include_mode=True, image_offset=4)
    source = hypothesis_source(sampler, conditions, seed=7, include_mode=True, image_offset=4)
    parts = torch.cat([source(0, 20), source(20, 1), source(21, 29)], 1)
    assert torch.equal(parts, whole)
    assert torch.equal(source(30, 5), parts[:, 30:35])
    unseeded = hypothesis_source(sampler, conditions)
    assert torch.equal(unseeded(3, 2), unseeded(2, 3)[:, 1:])
    fixed = torch.randn(3, 2)
    part = hypothesis_source(sampler, conditions, seed=1, fixed=fixed)(5, 4)
    assert torch.equal(part, sampler(conditions, 9, seed=1, fixed=fixed)[:, 5:])


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda a, t: over_hypotheses(a.long()), TypeError, "errors"),
        (lambda a, t: over_hypotheses(a[:, :0], 1), ValueError, "errors.*at least one"),
        (lambda a, t: over_hypotheses(a, 4), ValueError, "dim"),
        (lambda a, t: diversity(a[0, 0]), ValueError, "hypotheses"),
        (lambda a, t: diversity(a, 2), ValueError, "correction"),
        (lambda a, t: sharpness(a[:, :0]), ValueError, "hypotheses"),
        (lambda a, t: kmeans(a, 0), ValueError, "k: "),
        (lambda a, t: kmeans(a, 11), ValueError, "k: "),
        (lambda a, t: kmeans(a / 0, 2), ValueError, "hypotheses.*finite"),
        (lambda a, t: kmeans(a, 2, seed=-1), ValueError, "seed"),
        (lambda a, t: best_of_m(draw_from(a), t[0], 10), ValueError, r"truth.*\(5, 3\)"),
        (lambda a, t: best_of_m(draw_from(a), t, 0), ValueError, "num_samples"),
        (lambda a, t: best_of_m(draw_from(a), t, 11), ValueError, r"draw.*\(2, 11, 5, 3\)"),
        (lambda a, t: best_of_m(draw_from(a), t, 5, rows=0), ValueError, "rows"),
        (
            lambda a, t: best_of_m(draw_from(a), t, 5, error=lambda p, q: p),
            ValueError,
            r"error.*\(2, 5\)",
        ),
        (lambda a, t: hypothesis_source("flow"), TypeError, "sampler.*str"),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call(poses(2, 10, 5), poses(2, 5))
