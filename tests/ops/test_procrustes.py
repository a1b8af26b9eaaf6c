"""The alignment kernels: the reference's numbers, broadcast operands, derivatives, laws."""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasthyp import _C
from fasthyp.metrics import pa_mpjpe, procrustes
from fasthyp.metrics.procrustes import aligned_distances
from fasthyp.ops import procrustes as ops
from fasthyp.reference import procrustes as reference
from tests.metrics.test_procrustes import degenerate, poses, rotations

UNIQUE = ("turned", "unrelated", "mirrored", "coplanar", "far away", "huge")
"""Kinds whose best rotation is a single one."""


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)
    threads, level = torch.get_num_threads(), _C.simd_level()
    yield
    torch.set_num_threads(threads)
    _C.set_simd_level(level)


def some_mask(*shape: int, seed: int = 0) -> Tensor:
    """At least five joints of a pose count."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., 2:7] = True
    return mask


def equal(found: Tensor, want: Tensor, rtol: float = 1e-10, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, want, rtol=rtol, atol=atol, equal_nan=True)


# --- the reference ---


@pytest.mark.parametrize("kind", list(degenerate()))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", _C.simd_levels())
def test_the_reference(kind: str, masked: bool, level: str) -> None:
    _C.set_simd_level(level)
    source, target = (x[:19] for x in degenerate()[kind])  # no whole number of vectors
    mask = some_mask(*source.shape[:2]) if masked and source.shape[1] > 7 else None
    operands = source, target, mask
    slack = {"atol": 1e-5 if kind == "far away" else 1e-11}
    equal(ops.pa_mpjpe(*operands, False, False)[0], reference.error(*operands), **slack)
    if kind not in UNIQUE:
        return
    equal(ops.pa_distances(*operands), reference.distances(*operands), **slack)
    fits = ops.procrustes(*operands), reference.procrustes(*operands)
    fits = ops.procrustes(source, target, mask), reference.procrustes(source, target, mask)
    for found, want in zip(*fits, strict=True):
        equal(found, want, rtol=1e-9, **slack)


def shapes() -> dict[str, tuple[tuple[int, ...], ...]]:
    """Leading dimensions of source, target and mask."""
    return {
        "one": ((), (), ()),
        "target per image": ((4, 9), (4, 1), (4, 1)),
        "target per pose of an image": ((4, 9), (9,), (1, 9)),
        "one target": ((4, 9), (), ()),
        "one source": ((), (4, 9), (4, 9)),
        "both": ((4, 1), (1, 9), (9,)),
        "in the middle": ((2, 3, 4), (3, 1), (2, 1, 4)),
        "apart": ((2, 3, 4), (2, 1, 4), (1, 3, 1)),
        "ones": ((1, 5, 1), (5, 1), (1,)),
    }


@pytest.mark.parametrize("kind", list(shapes()))
@pytest.mark.parametrize("masked", [False, True])
def test_broadcasting(kind: str, masked: bool) -> None:
    a, b, c = shapes()[kind]
    source, target = (poses(*x, 9, seed=seed).requires_grad_() for seed, x in enumerate((a, b)))
    mask = some_mask(*c, 9) if masked else None
    error = pa_mpjpe(source, target, mask)
    shape = torch.broadcast_shapes(a, b)
    assert error.shape == shape
    full = [x.expand(*shape, 9, 3) for x in (source, target)]
    wide = None if mask is None else mask.expand(*shape, 9)
    want = reference.error(*full, wide)
    equal(error, want)
    equal(pa_mpjpe(*full, wide), want)
    weight = torch.linspace(-1, 2, error.numel(), dtype=torch.float64).reshape(shape)
    grads, wants = (
        torch.autograd.grad((x * weight).sum(), (source, target)) for x in (error, want)
    )
    for found, expected in zip(grads, wants, strict=True):
        equal(found, expected, rtol=1e-8)
    equal(aligned_distances(source, target, mask), reference.distances(*full, wide).detach())


def test_hypotheses_are_not_copied_and_targets_not_expanded() -> None:
    pred, truth = poses(6, 50, 17), poses(6, 17, seed=1)
    shape = torch.Size([6, 50])
    found, *places = ops._rows(truth[:, None], shape, 2)
    assert (found.data_ptr(), places) == (truth.data_ptr(), [50, 6])
    found, *places = ops._rows(truth[:, None].expand(6, 50, 17, 3), shape, 2)
    assert (found.data_ptr(), places) == (truth.data_ptr(), [50, 6])
    found, *places = ops._rows(pred, shape, 2)
    assert (found.data_ptr(), places) == (pred.data_ptr(), [1, 300])
    found, *places = ops._rows(pred[0], shape, 2)
    assert (found.data_ptr(), places) == (pred.data_ptr(), [1, 50])


@pytest.mark.parametrize("kind", [*UNIQUE, "tiny", "two joints", "collinear", "both collinear"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_reference(kind: str, masked: bool) -> None:
    source, target = (x.clone().requires_grad_() for x in degenerate()[kind])
    mask = some_mask(*source.shape[:2]) if masked and kind != "two joints" else None
    if kind == "huge":  # derivatives by a variance of 1e300 are not numbers in the reference
        _gradients_scale(source, target, mask)
        return
    for leaves in ((source,), (target,), (source, target)):
        pair = [x if any(x is y for y in leaves) else x.detach() for x in (source, target)]
        grads, wants = (
            torch.autograd.grad(function(*pair, mask).sum(), leaves)
            for function in (pa_mpjpe, reference.error)
        )
        for found, want in zip(grads, wants, strict=True):
            if "collinear" in kind or kind == "two joints":
                # The rotation is one of many: no gradient in the directions between them.
                assert found.norm() < 10 * want.norm()
            else:
                size = float(want.abs().max())
                equal(found / size, want / size, rtol=1e-6, atol=1e-8)
            if mask is not None:
                assert (found[~mask] == 0).all()


@pytest.mark.parametrize("fit", [ops.procrustes, reference.procrustes])
def test_scale_of_a_point(fit: Any) -> None:
    """Zero but for the rounding of the mean; a pose of the size of that rounding keeps its own."""
    for joints, place in ((17, 0.0), (17, 0.1), (19, 0.3), (23, 1.7)):
        target = poses(4, joints)
        rotation, scale, translation = fit(torch.full_like(target, place), target, None)
        assert torch.equal(scale, torch.zeros(4).double())
        equal(translation, target.mean(1))
        assert torch.equal(torch.linalg.det(rotation).round(), torch.ones(4).double())
    target = poses(4, 1000)
    assert torch.equal(fit(1 + 3e-15 * target, target, None)[1], torch.zeros(4).double())
    scale = fit(1 + 1e-11 * target, target, None)[1]
    equal(scale, torch.full((4,), 1e11).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("error", [pa_mpjpe, reference.error])
def test_gradient_of_a_point(error: Any) -> None:
    source = torch.full((4, 17, 3), 0.1, dtype=torch.float64, requires_grad=True)
    by_source, by_target = torch.autograd.grad(
        error(source, target := poses(4, 17).requires_grad_()).sum(), (source, target)
    )
    assert torch.equal(by_source, torch.zeros_like(source))
    away = target - target.mean(1, keepdim=True)
    pull = away / away.norm(dim=-1, keepdim=True) / 17
    equal(by_target, (pull - pull.mean(1, keepdim=True)).detach())


@pytest.mark.parametrize("function", [pa_mpjpe, reference.error])
def test_no_gradient_where_the_rotation_is_free(function: Any) -> None:
    sphere, mirrored = degenerate()["mirrored sphere"]
    leaves = [x.clone().requires_grad_() for x in (sphere @ rotations(20).mT, mirrored)]
    for found in torch.autograd.grad(function(*leaves).sum(), leaves):
        assert found.abs().max() < 10


def _gradients_scale(source: Tensor, target: Tensor, mask: Tensor | None) -> None:
    grads = torch.autograd.grad(pa_mpjpe(source, target, mask).sum(), (source, target))
    small = (source * 1e-150).detach().requires_grad_()
    wants = torch.autograd.grad(reference.error(small, target, mask).sum(), (small, target))
    equal(1e150 * grads[0], wants[0], rtol=1e-9)
    equal(grads[1], wants[1], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_similarity_has_gradients(dtype: torch.dtype) -> None:
    source = poses(5, 3, 9, dtype=dtype).requires_grad_()
    target = poses(5, 1, 9, seed=1, dtype=dtype).requires_grad_()
    wants: list[Any] = []
    for function in (procrustes, reference.procrustes):
        results = [x.double() for x in function(source, target)]
        total = sum((x * torch.linspace(-1, 2, x.shape[-1]).double()).sum() for x in results)
        wants.append(torch.autograd.grad(total, (source, target)))
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    for found, want in zip(*wants, strict=True):
        equal(found, want, rtol=rtol, atol=rtol)


def test_float32_is_better_than_an_svd_in_float32() -> None:
    source, noise = 300 * poses(2000, 17), 50 * poses(2000, 17, seed=1)
    for pred, truth in ((source + noise, source), (source + 3000, source + noise - 3000)):
        pred, truth = pred.float(), truth.float()
        exact = reference.error(pred.double(), truth.double())
        a, b = pred - pred.mean(-2, keepdim=True), truth - truth.mean(-2, keepdim=True)
        u, s, vt = torch.linalg.svd(b.mT @ a)
        sign = torch.ones_like(s)
        sign[:, 2] = torch.linalg.det(u @ vt).sign()
        scale = (s * sign).sum(-1) / a.square().sum((-2, -1))
        aligned = scale[:, None, None] * a @ ((u * sign[:, None]) @ vt).mT
        theirs = ((aligned - b).norm(dim=-1).mean(-1) - exact).abs().max()
        ours = (pa_mpjpe(pred, truth) - exact).abs() / exact
        assert ours.max() < 6e-8  # rounded once
        assert float((ours * exact).max()) < theirs


def test_gradient_in_float32() -> None:
    pred = poses(300, 17, dtype=torch.float32)
    truth = poses(300, 17, seed=1, dtype=torch.float32)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = pred.to(dtype).detach().requires_grad_()
        grads += torch.autograd.grad(pa_mpjpe(leaf, truth.to(dtype)).sum(), leaf)
    torch.testing.assert_close(grads[0], grads[1].float(), rtol=1e-6, atol=1e-8)


# --- the same whatever the machine and the batch ---


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 1000), st.booleans())
def test_levels_threads_and_neighbours(number: int, joints: int, seed: int, hard: bool) -> None:
    source, target = poses(number, joints, seed=seed), poses(number, joints, seed=seed + 1)
    if hard:  # what takes more sweeps, beside what takes few
        source[::3, :, 1:] *= 1e-6
        source[::5] = target[::5]
        source[::7] = nan
    first = ops.pa_mpjpe(source, target, None, True, True)[0]
    for level in _C.simd_levels():
        _C.set_simd_level(level)
        whole = ops.pa_mpjpe(source, target, None, True, True)
        equal(whole[0], first, rtol=1e-9)
        for part in (slice(0, 1), slice(3, 17), slice(number - 1, None)):
            alone = ops.pa_mpjpe(source[part], target[part], None, True, True)
            for found, want in zip(alone, whole, strict=True):
                equal(found, want[part], rtol=0, atol=0)


def test_threads() -> None:
    source, target = poses(3001, 17), poses(17, seed=1)
    want = ops.procrustes(source, target, None)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        for found, expected in zip(ops.procrustes(source, target, None), want, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("level", _C.simd_levels())
def test_rotations_are_rotations(level: str) -> None:
    _C.set_simd_level(level)
    sources = [x for x, _ in degenerate().values()]
    targets = [x for _, x in degenerate().values()]
    point = torch.full((20, 5, 3), 0.1, dtype=torch.float64)
    sources += [point, point, poses(20, 5)]
    targets += [poses(20, 5), point, point]
    for axis in range(3):  # along an axis, in a plane, and points of one joint only
        line = torch.zeros(20, 5, 3, dtype=torch.float64)
        line[..., axis] = poses(20, 5)[..., 0]
        sources += [line, line, poses(20, 5)]
        targets += [poses(20, 5), line, line]
    eye = torch.eye(3, dtype=torch.float64).expand(20, 3, 3)
    for source, target in zip(sources, targets, strict=True):
        rotation = ops.procrustes(source, target, None)[0]
        equal(rotation @ rotation.mT, eye, rtol=0, atol=1e-13)
        equal(torch.linalg.det(rotation), eye[:, 0, 0], rtol=0, atol=1e-13)


# --- arguments ---


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_and_no_joint(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTHYP_BACKEND", backend)
    source, target = poses(4, 9, 5), poses(4, 1, 5, seed=1)
    assert pa_mpjpe(source[:0], target[:0]).shape == (0, 9)
    assert [len(x) for x in procrustes(source[:0], target[:0])] == [0, 0, 0]
    mask = torch.ones(4, 1, 5, dtype=torch.bool)
    mask[1] = False
    fit, error = procrustes(source, target, mask), pa_mpjpe(source, target, mask)
    for result in (*fit, error):
        lost = result.isnan().reshape(4, -1)
        assert lost[1].all()
        assert not lost[[0, 2, 3]].any()
    assert (aligned_distances(source, target, mask)[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_reference_backend(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = poses(4, 9, 5).to(dtype), poses(4, 1, 5, seed=1).to(dtype)
    want = *procrustes(source, target), pa_mpjpe(source, target)
    monkeypatch.setenv("FASTHYP_BACKEND", "reference")
    for found, expected in zip(
        (*procrustes(source, target), pa_mpjpe(source, target)), want, strict=True
    ):
        torch.testing.assert_close(found, expected)
        assert found.dtype == torch.float32


POSES = torch.zeros(4, 5, 3)


@pytest.mark.parametrize(
    ("source", "target", "mask", "error", "words"),
    [
        (POSES.half(), POSES.half(), None, TypeError, "source: expected float32 .*float16"),
        (POSES, POSES.double(), None, TypeError, "target: expected torch.float32.*float64"),
        (POSES[0, 0], POSES, None, ValueError, r"source: .*J, 3.* got \(3,\)"),
        (POSES[:, :0], POSES[:, :0], None, ValueError, "source: .*J >= 1"),
        (POSES, POSES[..., :2], None, ValueError, "target: .*J, 3"),
        (POSES, POSES[:, :4], None, ValueError, "target: expected 5 joints as source, got 4"),
        (POSES, POSES, POSES[..., 0], TypeError, "mask: expected bool, got torch.float32"),
        (POSES, POSES, POSES[0, :4, 0].bool(), ValueError, r"mask: expected shape \(..., 5\)"),
        (POSES, POSES, torch.ones(2, 4, 5).bool(), ValueError, r"mask: .*\(2, 4, 5\)"),
        (POSES, POSES.to("meta"), None, ValueError, "target: expected on cpu.*meta"),
    ],
)
def test_bad_arguments(
    source: Tensor, target: Tensor, mask: Tensor | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ops.check(source, target, mask)


# --- the ops ---


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, True), (torch.float64, False)])
def test_opcheck(dtype: torch.dtype, masked: bool) -> None:
    source, target = poses(4, 3, 6, dtype=dtype), poses(4, 1, 6, seed=1, dtype=dtype)
    mask = some_mask(4, 1, 6) if masked else None
    torch.library.opcheck(ops.pa_distances, (source, target, mask))
    torch.library.opcheck(ops.pa_mpjpe, (source, target, mask, False, False))
    source.requires_grad_(), target.requires_grad_()
    torch.library.opcheck(ops.procrustes, (source, target, mask))
    torch.library.opcheck(ops.pa_mpjpe, (source, target, mask, True, True))


def test_no_silent_gradients() -> None:
    source = poses(2, 5).requires_grad_()
    error = ops.pa_mpjpe(source, poses(2, 5, seed=1), None, False, False)[0]
    with pytest.raises(RuntimeError, match="without the gradients"):
        error.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.pa_distances(source, poses(2, 5, seed=1), None).sum().backward()
    for result in procrustes(source, poses(2, 5, seed=1)):
        (first,) = torch.autograd.grad(result.sum(), source, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward(retain_graph=True)


def test_compiles() -> None:
    source, target = poses(4, 9, 5), poses(4, 1, 5, seed=1)
    compiled = torch.compile(lambda a, b: pa_mpjpe(a, b) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(source, target), pa_mpjpe(source, target) * 2)


# --- CUDA ---

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("joints", [1, 13, 17, 127, 128, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_is_the_cpu(joints: int, dtype: torch.dtype, masked: bool) -> None:
    source = poses(7, 33, joints, dtype=dtype)
    target = source[:, :1] + 0.3 * poses(7, 1, joints, seed=1, dtype=dtype)
    mask = some_mask(7, 1, joints) if masked else None
    tolerance = 1e-6 if dtype == torch.float32 else 1e-11
    operands = [(x if x is None else x.cuda()) for x in (source, target, mask)]
    error, *grads = ops.pa_mpjpe(*operands, True, True)
    wants = ops.pa_mpjpe(source, target, mask, True, True)
    equal(error.cpu(), wants[0], tolerance, tolerance)
    if joints > 2:
        for found, want in zip(
            (*grads, *ops.procrustes(*operands)),
            (*wants[1:], *ops.procrustes(source, target, mask)),
            strict=True,
        ):
            equal(found.cpu(), want, tolerance, tolerance)


@pytest.mark.gpu
@needs_gpu
def test_cuda_waits_for_nothing_and_is_captured() -> None:
    source, target = poses(40, 17).cuda(), poses(40, 17, seed=1).cuda()
    want = pa_mpjpe(source, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert pa_mpjpe(source, target).shape == (40,)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(source)
    with torch.cuda.graph(graph):
        captured = pa_mpjpe(static, target)
    static.copy_(source)
    graph.replay()
    assert torch.equal(captured, want)
