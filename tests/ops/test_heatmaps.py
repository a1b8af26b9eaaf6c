"""Samples of heatmaps: the official sampler, the reference's cells, frequencies, splits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

import fasthyp
from fasthyp import _C
from fasthyp.ops import heatmaps as ops
from fasthyp.reference import heatmaps as reference
from tests.conftest import Golden, golden_files

OFFICIAL = {
    "default": {},
    "tau2": {"temperature": 2.0, "threshold": 0.05},
    "ordered": {"temperature": 0.5},
}
"""Arguments of the golden files' runs that sample and do no more."""


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)
    threads, level = torch.get_num_threads(), _C.simd_level()
    yield
    torch.set_num_threads(threads)
    _C.set_simd_level(level)


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    """Noise around a blob, a third of the cells negative."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape[-2:]
    y, x = torch.arange(height)[:, None] - height / 3, torch.arange(width) - width / 2
    blob = torch.exp(-(x**2 + y**2) / (2 + height * width / 50))
    return blob + 0.3 * torch.randn(shape, generator=generator)


# --- the official sampler ---


@pytest.mark.parametrize("path", golden_files("humr_losses_sampler.npz"))
@pytest.mark.parametrize("run", OFFICIAL)
def test_weights_are_the_official_ones(path: Path, run: str) -> None:
    golden = Golden(path)
    maps = golden["in/heatmaps"]
    weights = reference.weights(maps, **OFFICIAL[run])
    weights[weights.sum((-2, -1)) == 0] = 1  # the official one gives all cells 0.001
    ours, theirs = weights.flatten(0, 1).flatten(1), golden[f"out/{run}/weights"].double()
    ours, theirs = ours / ours.sum(1, keepdim=True), theirs / theirs.sum(1, keepdim=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("path", golden_files("humr_losses_sampler.npz"))
@pytest.mark.parametrize("run", OFFICIAL)
def test_points_and_probabilities_are_the_official_ones(
    path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the cells that the official sampler was given, some of no weight."""
    golden = Golden(path)
    maps = golden["in/heatmaps"]
    images, joints, _, width = maps.shape
    cells = golden["in/indices"].reshape(images, joints, -1).transpose(1, 2)

    def given_cells(
        maps: Tensor, n: int, temperature: float, threshold: float, flat_value: float, *_: int
    ) -> tuple[Tensor, Tensor]:
        weights = reference.weights(maps, temperature, threshold).flatten(-2)
        values = torch.where(weights > 0, maps.flatten(-2), 0)
        values[weights.sum(-1) == 0] = flat_value
        points = torch.stack([cells % width, cells // width], -1).to(maps.dtype)
        return points, values.transpose(1, 2).gather(1, cells)

    monkeypatch.setattr(ops, "sample_heatmaps", given_cells)
    settings = {**OFFICIAL[run], "ordered": run == "ordered", "return_probabilities": True}
    points, probabilities = fasthyp.sample_heatmaps(maps, cells.shape[1], seed=0, **settings)
    theirs = golden[f"out/{run}/probs"]
    torch.testing.assert_close(probabilities, theirs, rtol=1e-4, atol=1e-7)
    # samples of the same probability may come in another order
    alone = torch.ones_like(theirs, dtype=torch.bool)
    if run == "ordered":
        alone = (theirs[:, :, None] == theirs[:, None]).sum(1) == 1
        assert alone.float().mean() > 0.5
    assert torch.equal(points[alone], golden[f"out/{run}/samples"].reshape(points.shape)[alone])


# --- what is drawn ---


@pytest.mark.parametrize("shape", [(64, 64), (33, 17), (1, 1), (1, 50), (7, 3), (130, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
def test_the_cells_of_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, temperature: float
) -> None:
    maps = random_maps(2, 3, *shape).to(dtype)
    arguments = maps, 50, temperature, 0.05, 0.25, 2**64 - 3, 2**32 - 1
    points, values = ops.sample_heatmaps(*arguments)
    expected, expected_values = reference.sample_heatmaps(*arguments)
    assert torch.equal(points, expected)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_frequencies(temperature: float) -> None:
    maps = random_maps(2, 5, 7)
    n = 200_000
    points = fasthyp.sample_heatmaps(maps, n, temperature, seed=3).long()
    weights = reference.weights(maps, temperature).flatten(-2)
    for joint in range(2):
        cells = points[:, joint, 1] * 7 + points[:, joint, 0]
        counts = torch.bincount(cells, minlength=35).double()
        possible = weights[joint] > 0
        assert counts[~possible].sum() == 0
        expected = n * weights[joint] / weights[joint].sum()
        often = expected > 5
        scale = counts[often].sum() / expected[often].sum()
        assert chisquare(counts[often], expected[often] * scale).pvalue > 1e-3


def test_one_cell_and_no_cell() -> None:
    maps = torch.full((3, 20, 30), -1.0)
    maps[0, 12, 25] = 1e-30
    maps[1, 3, 4] = maps[2, 5, 6] = 0.2
    points, values = fasthyp.sample_heatmaps(
        maps, 2000, 2.0, threshold=0.3, seed=0, return_probabilities=True
    )
    only = fasthyp.sample_heatmaps(maps, 2000, 2.0, seed=0)
    assert (only == torch.tensor([[25.0, 12.0], [4.0, 3.0], [6.0, 5.0]])).all()
    # nothing reaches the threshold: uniform
    torch.testing.assert_close(values, torch.full_like(values, 0.001**0.5))
    cells = (points[..., 1] * 30 + points[..., 0]).long()
    assert cells.min() >= 0
    assert cells.max() < 600
    assert chisquare(torch.bincount(cells.flatten() // 20, minlength=30)).pvalue > 1e-3


def test_maps_that_are_not_finite() -> None:
    maps = random_maps(2, 4, 9, 11)
    maps[0, 1, 3, 3] = math.nan
    maps[1, 2, 8, 10] = math.inf
    maps[1, 3, 0, 0] = -math.inf  # negative, nothing more
    points = fasthyp.sample_heatmaps(maps, 5, seed=0)
    bad = points.isnan().all((1, 3))
    assert points.isnan().any((1, 3)).tolist() == bad.tolist()
    assert bad.tolist() == [[False, True, False, False], [False, False, True, False]]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-38),
        (torch.float32, 1e38),
        (torch.float64, 1e-250),
        (torch.float64, 1e300),
    ],
)
def test_scale_does_not_matter(dtype: torch.dtype, scale: float, temperature: float) -> None:
    maps = random_maps(3, 16, 16).to(dtype)
    points = fasthyp.sample_heatmaps(maps, 300, temperature, seed=1)
    assert (
        points == fasthyp.sample_heatmaps(maps * scale, 300, temperature, seed=1)
    ).double().mean() > 0.99


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**64 - 1), st.floats(0.2, 5))
def test_only_cells_with_weight(height: int, width: int, seed: int, temperature: float) -> None:
    maps = random_maps(1, height, width, seed=seed % 1000)
    points, values = fasthyp.sample_heatmaps(
        maps, 64, temperature, 0.1, seed, return_probabilities=True
    )
    x, y = points[:, 0].long().unbind(-1)
    if bool((maps >= 0.1).any()):
        assert (values >= 0.1).all()
        assert torch.equal(maps[0, y, x], values[:, 0])


# --- the same whatever the machine ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_levels_threads_and_splits(temperature: float) -> None:
    maps = random_maps(5, 3, 31, 45)
    expected = fasthyp.sample_heatmaps(maps, 40, temperature, seed=9)
    for level in _C.simd_levels():
        _C.set_simd_level(level)
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(fasthyp.sample_heatmaps(maps, 40, temperature, seed=9), expected)
    parts = [
        fasthyp.sample_heatmaps(maps[i : i + 1], 40, temperature, seed=9, image_offset=i)
        for i in range(5)
    ]
    assert torch.equal(torch.cat(parts), expected)
    assert torch.equal(fasthyp.sample_heatmaps(maps, 17, temperature, seed=9), expected[:, :17])


def test_seeds_and_generators() -> None:
    maps = random_maps(2, 3, 16, 16)
    draw = partial(fasthyp.sample_heatmaps, maps, 30)
    assert not torch.equal(draw(seed=1), draw(seed=2))
    assert not torch.equal(draw(), draw())
    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    assert torch.equal(draw(generator=generators[0]), draw(generator=generators[1]))


def test_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = random_maps(2, 3, 9, 8)
    expected = fasthyp.sample_heatmaps(maps, 7, seed=4)
    monkeypatch.setenv("FASTHYP_BACKEND", "reference")
    assert torch.equal(fasthyp.sample_heatmaps(maps, 7, seed=4), expected)


# --- arguments ---


def test_shapes_and_dtypes() -> None:
    maps = random_maps(2, 4, 3, 12, 10)
    points, values = fasthyp.sample_heatmaps(maps, 6, seed=0, return_probabilities=True)
    assert points.shape == (2, 4, 6, 3, 2)
    assert values.shape == (2, 4, 6, 3)
    assert fasthyp.sample_heatmaps(maps[0, 0], 6, seed=0).shape == (6, 3, 2)
    assert fasthyp.sample_heatmaps(maps[:0], 6, seed=0).shape == (0, 4, 6, 3, 2)
    assert fasthyp.sample_heatmaps(maps.half(), 6, seed=0).dtype == torch.float32
    turned = maps.transpose(-1, -2)
    same = fasthyp.sample_heatmaps(turned.contiguous(), 6, seed=0)
    assert torch.equal(fasthyp.sample_heatmaps(turned, 6, seed=0), same)
    assert not fasthyp.sample_heatmaps(maps.requires_grad_(), 6, seed=0).requires_grad
    assert fasthyp.heatmap_argmax(maps.bfloat16()).dtype == torch.float32


MAPS = torch.ones(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heatmaps": MAPS.numpy()}, TypeError, "heatmaps: expected a torch.Tensor, got ndarray"),
        ({"heatmaps": MAPS.int()}, TypeError, "heatmaps: expected float32 or float64, got .*int32"),
        ({"heatmaps": MAPS[0, 0]}, ValueError, r"heatmaps: .*J, H, W.* got \(8, 8\)"),
        ({"heatmaps": MAPS[..., :0]}, ValueError, "heatmaps: expected maps of 1 to .* got 8 x 0"),
        ({"n": 0}, ValueError, "n: expected 1 <= n < 2147483648, got 0"),
        ({"n": 5.0}, TypeError, "n: expected an int, got float"),
        ({"temperature": 0.0}, ValueError, "temperature: expected .* above 0, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature: expected .*, got -1.0"),
        ({"temperature": math.inf}, ValueError, "temperature: .* got inf"),
        ({"temperature": math.nan}, ValueError, "temperature: .* got nan"),
        ({"temperature": "high"}, TypeError, "temperature: expected float, got str"),
        ({"threshold": math.nan}, ValueError, "threshold: .* got nan"),
        ({"threshold": None}, TypeError, "threshold: expected float, got NoneType"),
        ({"seed": -1}, ValueError, "seed: expected .*, got -1"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, got float"),
        ({"generator": torch.Generator()}, ValueError, "seed, generator: expected at most one"),
        ({"image_offset": 2**32}, ValueError, "image_offset: expected .*, got 4294967296"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fasthyp.sample_heatmaps(**{"heatmaps": MAPS, "n": 4, "seed": 0, **arguments})


# --- the op ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.fasthyp.sample_heatmaps.default
    torch.library.opcheck(op, (random_maps(2, 3, 9, 8).to(dtype), 5, 1.0, 0.0, 0.001, -3, 0))


def test_compiles() -> None:
    maps = random_maps(2, 3, 9, 8)
    compiled = torch.compile(lambda h: fasthyp.sample_heatmaps(h, 5, seed=3) * 2, fullgraph=True)
    assert torch.equal(compiled(maps), fasthyp.sample_heatmaps(maps, 5, seed=3) * 2)


# --- CUDA ---

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(64, 64), (33, 17), (1, 1), (130, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_cuda_draws_the_same(
    shape: tuple[int, int], dtype: torch.dtype, temperature: float
) -> None:
    maps = random_maps(40, 3, *shape).to(dtype)
    maps[0, 0] = 0
    maps[1, 1, 0, 0] = math.nan
    for n in (1, 25, 3000):
        arguments = n, temperature, 0.05, 11
        cpu = fasthyp.sample_heatmaps(maps, *arguments, return_probabilities=True)
        cuda = fasthyp.sample_heatmaps(maps.cuda(), *arguments, return_probabilities=True)
        for ours, theirs in zip(cuda, cpu, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@needs_gpu
def test_cuda_streams_and_graph() -> None:
    maps = random_maps(4, 3, 64, 48).cuda()
    expected = fasthyp.sample_heatmaps(maps, 25, seed=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = fasthyp.sample_heatmaps(maps, 25, seed=2)
    stream.synchronize()
    assert torch.equal(other, expected)
    graph = torch.cuda.CUDAGraph()
    static = torch.ones_like(maps)
    with torch.cuda.graph(graph):
        captured = fasthyp.sample_heatmaps(static, 25, seed=2)
    static.copy_(maps)
    graph.replay()
    assert torch.equal(captured, expected)
