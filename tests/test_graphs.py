"""GraphCache: what is captured when, what a replay reads and returns, what is forgotten."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthyp._graphs import KEEP, GraphCache, Noise
from tests.replays import Replays

CPU = torch.device("cpu")


class Work:
    """x + seed and y + image offset + first sample (y may be missing), in float64; counts its
    runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: Tensor, y: Tensor | None, noise: Noise) -> tuple[Tensor, ...]:
        self.runs += 1
        counter = torch.zeros(3) if noise.counter is None else noise.counter
        total = x + noise.seed + counter[0]
        if y is None:
            return (total,)
        return (total, y + noise.image_offset + counter[1] + noise.first_sample + counter[2])

    def call(
        self, cache: GraphCache, x: Tensor, y: Tensor | None, *noise: int, **given: Any
    ) -> tuple[Tensor, ...]:
        version = given.get("version", 0)
        return cache(
            *(self, (x, y), Noise(*noise), CPU), key=given.get("key"), version=lambda: version
        )


@pytest.fixture
def work() -> Work:
    return Work()


def test_the_second_call_captures(work: Work, replays: type[Replays]) -> None:
    cache = GraphCache()
    for call in range(4):
        x, y = torch.randn(3, 2), torch.randn(3)
        total, other = work.call(cache, x, y, 5 + call, 7 + call, 100 * call)
        torch.testing.assert_close(total, x + 5 + call)
        torch.testing.assert_close(other, y + 7 + 101 * call)
        assert len(replays.made) == min(call, 1)
    assert replays.made[0].replays == 3


def test_true_captures_at_once_and_false_never(work: Work, replays: type[Replays]) -> None:
    work.call(GraphCache(True), torch.zeros(2), None)
    assert [graph.replays for graph in replays.made] == [1]
    never = GraphCache(False)
    for _ in range(3):
        work.call(never, torch.zeros(2), None)
    assert len(replays.made) == 1


def test_results_are_the_callers(work: Work, replays: type[Replays]) -> None:
    cache, x = GraphCache(True), torch.randn(3, 2)
    first = work.call(cache, x, None, 1)[0]
    kept = first.clone()
    second = work.call(cache, x, None, 2)[0]
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert second.untyped_storage().nbytes() == second.numel() * 4
    second.zero_()
    x.zero_()
    torch.testing.assert_close(work.call(cache, kept - 1, None, 3)[0], kept + 2)


def test_inputs_of_other_layouts(work: Work, replays: type[Replays]) -> None:
    cache = GraphCache(True)
    for x in (torch.randn(2, 3).T, torch.randn(1, 2).expand(3, 2), torch.randn(3, 2)):
        torch.testing.assert_close(work.call(cache, x, None, 1)[0], x + 1)
    assert len(replays.made) == 1


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_seeds_of_64_bits(seed: int, replays: type[Replays]) -> None:
    def function(noise: Noise) -> tuple[Tensor, ...]:
        assert noise.counter is not None
        return (noise.counter + 0,)

    counter = GraphCache(True)(function, (), Noise(seed, 3, 4), CPU, None, lambda: 0)[0]
    assert counter.tolist() == [seed - 2**64 if seed >= 2**63 else seed, 3, 4]


def test_kinds_of_calls(work: Work, replays: type[Replays]) -> None:
    cache, x = GraphCache(True), torch.zeros(3, 2)
    work.call(cache, x, None)
    for others in ((x[:2], None, {}), (x.double(), None, {}), (x, x, {}), (x, None, {"key": 1})):
        before = len(replays.made)
        *inputs, given = others
        for _ in range(2):
            work.call(cache, *inputs, **given)
        assert len(replays.made) == before + 1
    work.call(cache, x, None)
    assert len(replays.made) == 5


def test_another_version_forgets(work: Work, replays: type[Replays]) -> None:
    cache, x = GraphCache(), torch.zeros(2)
    for version, captured in ((0, 0), (0, 1), (1, 1), (1, 2), (0, 2), (0, 3), (0, 3)):
        work.call(cache, x, None, version=[version])
        assert len(replays.made) == captured
    assert len(cache._kinds) == 1


def test_the_least_recently_used_goes(work: Work, replays: type[Replays]) -> None:
    cache = GraphCache(True)
    for size in range(KEEP + 1):
        work.call(cache, torch.zeros(size), None)
        work.call(cache, torch.zeros(0), None)
    assert len(cache._kinds) == KEEP
    assert len(replays.made) == KEEP + 1
    work.call(cache, torch.zeros(0), None)
    assert len(replays.made) == KEEP + 1
    work.call(cache, torch.zeros(1), None)
    assert len(replays.made) == KEEP + 2


@pytest.mark.parametrize("graph", ["auto", True])
def test_runs_plainly(
    graph: Any,
    work: Work,
    replays: type[Replays],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, x = GraphCache(graph), torch.randn(2)
    replays.occupied = True
    for _ in range(3):
        assert torch.equal(work.call(cache, x, None, 4)[0], x + 4)
    replays.occupied = False
    monkeypatch.setenv("FASTHYP_BACKEND", "reference")
    for _ in range(3):
        assert torch.equal(work.call(cache, x, None, 4)[0], x + 4)
    assert not replays.made
    assert work.runs == 6


def test_what_cannot_be_captured(work: Work, replays: type[Replays]) -> None:
    auto = GraphCache()
    for _ in range(3):
        work.call(auto, torch.zeros(2), None, version="an odd subnet")
    assert work.runs == 3
    with pytest.raises(ValueError, match=r"graph: True, but .*: an odd subnet"):
        work.call(GraphCache(True), torch.zeros(2), None, version="an odd subnet")


def test_on_a_cpu_nothing_is_captured(work: Work) -> None:
    cache = GraphCache()
    for _ in range(3):
        work.call(cache, torch.zeros(2), None)
    assert work.runs == 3
    with pytest.raises(ValueError, match="graph: True needs a CUDA device, got cpu"):
        work.call(GraphCache(True), torch.zeros(2), None)


def test_a_failed_capture_leaves_nothing(work: Work, replays: type[Replays]) -> None:
    def fails(x: Tensor, y: Tensor | None, noise: Noise) -> tuple[Tensor, ...]:
        if noise.counter is not None:
            raise RuntimeError("out of memory")
        return (x,)

    cache, x = GraphCache(), torch.zeros(2)
    cache(fails, (x, None), Noise(), CPU, None, lambda: 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache(fails, (x, None), Noise(), CPU, None, lambda: 0)
    assert torch.equal(work.call(cache, x, None, 3)[0], x + 3)


def test_inference_mode(work: Work, replays: type[Replays]) -> None:
    cache = GraphCache(True)
    with torch.inference_mode():
        work.call(cache, torch.zeros(2), None)
    assert torch.equal(work.call(cache, torch.ones(2), None, 1)[0], torch.full((2,), 2.0))
    with torch.inference_mode():
        assert torch.equal(work.call(cache, torch.zeros(2), None, 1)[0], torch.ones(2))


def test_threads_take_turns(work: Work, replays: type[Replays]) -> None:
    cache = GraphCache()
    inputs = [torch.full((50,), float(i)) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: work.call(cache, x, None, 1)[0], inputs))
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, x + 1)
    assert len(replays.made) == 1


def test_copies_are_empty(work: Work, replays: type[Replays]) -> None:
    cache = GraphCache(True)
    work.call(cache, torch.zeros(2), None)
    for twin in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert twin.graph is True
        assert not twin._kinds


@pytest.mark.parametrize("graph", ["never", None, 1, "True", []])
def test_bad_graph(graph: Any) -> None:
    with pytest.raises(ValueError, match='graph: expected "auto", True or False'):
        GraphCache(graph)
