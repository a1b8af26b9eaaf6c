"""Procrustes alignment: SciPy's, the official codes' numbers, degenerate poses, gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.transform import Rotation
from torch import Tensor

from fasthyp.metrics import mpjpe, pa_mpjpe, procrustes
from tests.conftest import Golden, assert_as_good_as, golden_files

MIRROR = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)


def poses(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 3, generator=generator, dtype=torch.float64).to(dtype)


def rotations(number: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(Rotation.random(number, random_state=seed).as_matrix())


def degenerate() -> dict[str, tuple[Tensor, Tensor]]:
    """Sources and targets (N, J, 3) whose best rotation is hard, or not unique."""
    general, noise = poses(20, 17), 0.1 * poses(20, 17, seed=1)
    turned = general @ rotations(20).mT
    flat = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    line = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    repeated = general[:, :3].repeat(1, 6, 1)
    sphere = torch.cat([torch.eye(3), -torch.eye(3)]).double().expand(20, 6, 3)
    return {
        "same": (general, general),
        "turned": (3 * turned + 5, general + noise),
        "unrelated": (general, poses(20, 17, seed=3)),
        "mirrored": (general * MIRROR, general),
        "mirrored sphere": (sphere * MIRROR, sphere),
        "sphere mirrored in a point": (-sphere @ rotations(20).mT, sphere + 0.01 * poses(20, 6)),
        "coplanar": (flat * turned, flat * general + noise),
        "both coplanar": (flat * general, flat * (general + noise)),
        "collinear": (general[..., :1] * line, general + noise),
        "both collinear": (general[..., :1] * line, (general[..., :1] + noise[..., :1]) * line),
        "nearly collinear": (general[..., :1] * line + 1e-9 * noise, general),
        "slightly bent": (general[..., :1] * line + 1e-6 * noise, general),
        "repeated points": (repeated @ rotations(20).mT, repeated + 0.01 * poses(20, 18)),
        "two joints": (general[:, :2], turned[:, :2]),
        "tiny": (1e-150 * turned, 1e-150 * (general + noise)),
        "huge": (1e150 * turned, general + noise),
        "far away": (turned + 1e4, general + noise - 1e4),
    }


def by_scipy(source: np.ndarray, target: np.ndarray) -> float:
    """Least sum of squares over similarities, from Rotation.align_vectors' best rotation."""
    a, b = source - source.mean(0), target - target.mean(0)
    scale = max(np.linalg.norm(a), 1e-300)
    rotation, _ = Rotation.align_vectors(b / max(np.linalg.norm(b), 1e-300), a / scale)
    turned = rotation.apply(a / scale)
    factor = (turned * b).sum() / (turned**2).sum()
    return float(((factor * turned - b) ** 2).sum())


@pytest.mark.parametrize("kind", list(degenerate()))
@pytest.mark.filterwarnings("ignore:Optimal rotation is not uniquely")
def test_as_good_as_scipys(kind: str) -> None:
    source, target = degenerate()[kind]
    fit = procrustes(source, target)
    eye = torch.eye(3, dtype=torch.float64).expand(20, 3, 3)
    torch.testing.assert_close(fit.rotation @ fit.rotation.mT, eye, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        torch.linalg.det(fit.rotation), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-11
    )
    found = (fit(source) - target).square().sum((1, 2))
    size = (target - target.mean(1, keepdim=True)).square().sum((1, 2))
    want = torch.tensor(
        [by_scipy(a, b) for a, b in zip(source.numpy(), target.numpy(), strict=True)],
        dtype=torch.float64,
    )
    slack = 1e-13 * size * (1e4 if kind == "far away" else 1)
    assert ((found - want).abs() <= 1e-11 * want + slack).all(), (found - want, slack)
    error = (fit(source) - target).norm(dim=-1).mean(-1)
    torch.testing.assert_close(
        pa_mpjpe(source, target), error, rtol=1e-9, atol=1e-6 if kind == "far away" else 1e-11
    )


def test_scipy_spatial_procrustes() -> None:
    """Its disparity, of poses in which the best orthogonal map is a rotation."""
    target = poses(10, 17)
    source = target @ rotations(10).mT + 0.05 * poses(10, 17, seed=1)
    found = (procrustes(source, target)(source) - target).square().sum((1, 2))
    size = (target - target.mean(1, keepdim=True)).square().sum((1, 2))
    want = [scipy_procrustes(b, a)[2] for a, b in zip(source.numpy(), target.numpy(), strict=True)]
    torch.testing.assert_close(
        found / size, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("place", [0.0, 0.1])
def test_a_pose_in_one_point(place: float) -> None:
    target = poses(4, 17)
    source = torch.full_like(target, place)
    fit = procrustes(source, target)
    assert torch.equal(fit.scale, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(fit.translation, target.mean(1))
    spread = (target - target.mean(1, keepdim=True)).norm(dim=-1).mean(-1)
    torch.testing.assert_close(pa_mpjpe(source, target), spread)
    torch.testing.assert_close(
        pa_mpjpe(target, source), torch.zeros(4).double(), atol=1e-14, rtol=0
    )


@pytest.mark.parametrize("path", golden_files("w21_losses_metrics.npz"))
def test_wehrbein_et_al(path: Path) -> None:
    golden = Golden(path)
    for dtype in (torch.float64, torch.float32):
        pred, truth = (golden[f"in/{name}"].to(dtype).mT for name in ("pred", "gt"))
        fit = procrustes(pred, truth)
        results = {
            "Z": fit(pred).mT.flatten(0, 1),
            "rot": fit.rotation.mT.flatten(0, 1),
            "scale": fit.scale.flatten(),
            "tr": fit.translation.flatten(0, 1),
            "err": pa_mpjpe(pred, truth),
            "pabest": pa_mpjpe(pred, truth).amin(0),
            "es": pa_mpjpe(pred[0], truth).sum(),
        }
        results["pa"] = results["Z"]
        for name, value in results.items():
            if dtype == torch.float64:
                want = golden[f"out64/{name}"]
                torch.testing.assert_close(value, want, rtol=1e-11, atol=1e-9, msg=name)
            elif name != "es":  # that one was a Python float there
                assert_as_good_as(value, golden[f"out/{name}"], golden[f"out64/{name}"], name)


@pytest.mark.parametrize("path", golden_files("prohmr_losses_geometry.npz"))
def test_prohmr(path: Path) -> None:
    golden = Golden(path)
    source, target = golden["in/S1"].double(), golden["in/S2"].double()
    aligned = procrustes(source, target)(source)
    torch.testing.assert_close(aligned, golden["out64/S1_hat"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(pa_mpjpe(source, target), golden["out64/re"], rtol=1e-11, atol=0)


def test_masked_joints_do_not_count() -> None:
    source, target = poses(6, 17), poses(6, 17, seed=1)
    mask = torch.rand(6, 17, generator=torch.Generator().manual_seed(0)) < 0.6
    hidden = source.masked_fill(~mask[..., None], torch.nan)
    fit, errors = procrustes(hidden, target, mask), pa_mpjpe(hidden, target, mask)
    for row in range(6):
        few = source[row, mask[row]], target[row, mask[row]]
        want = procrustes(*few)
        for found, value in zip(fit, want, strict=True):
            torch.testing.assert_close(found[row], value)
        torch.testing.assert_close(errors[row], pa_mpjpe(*few))
    mask[2] = False
    errors = pa_mpjpe(source, target, mask)
    assert errors.isnan().tolist() == [row == 2 for row in range(6)]


def test_one_bad_pose_spoils_no_other() -> None:
    source, target = poses(5, 17), poses(5, 17, seed=1)
    want = pa_mpjpe(source, target)
    source[1, 3, 0], source[3, 0, 1] = torch.nan, torch.inf
    found = pa_mpjpe(source, target)
    assert found.isnan().tolist() == [False, True, False, True, False]
    assert torch.equal(found[::2], want[::2])
    source.requires_grad_()
    pa_mpjpe(source, target)[::2].sum().backward()
    assert source.grad is not None
    assert source.grad[::2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    pred, truth = poses(4, 9, 13, dtype=dtype), poses(4, 13, seed=1, dtype=dtype)
    found = pa_mpjpe(pred, truth[:, None])
    assert found.shape == (4, 9)
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found[2, 5], pa_mpjpe(pred[2, 5], truth[2]))
    strided = pred.mT.contiguous().mT
    assert torch.equal(pa_mpjpe(strided, truth[:, None]), found)
    assert pa_mpjpe(pred[:0], truth[:0, None]).shape == (0, 9)
    fit = procrustes(pred, truth[:, None])
    assert [tuple(x.shape) for x in fit] == [(4, 9, 3, 3), (4, 9), (4, 9, 3)]


def test_the_result_does_not_depend_on_the_batch() -> None:
    pred, truth = poses(9001, 13, dtype=torch.float32), poses(13, seed=1, dtype=torch.float32)
    found = pa_mpjpe(pred, truth)
    assert torch.equal(found[5000:5007], pa_mpjpe(pred[5000:5007], truth))


@pytest.mark.parametrize("kind", ["turned", "unrelated", "mirrored", "coplanar", "two joints"])
def test_gradients(kind: str) -> None:
    source, target = (x[:2, :6].clone().requires_grad_() for x in degenerate()[kind])
    with torch.no_grad():  # not the same pose, where the error has a corner
        target += 0.05 * poses(*target.shape[:2], seed=5)
    if kind == "coplanar":
        with torch.no_grad():
            source += 1e-3 * poses(*source.shape[:2], seed=6)
    if kind != "two joints":
        assert torch.autograd.gradcheck(pa_mpjpe, (source, target), atol=1e-6)
        mask = torch.ones(source.shape[:2], dtype=torch.bool)
        mask[:, 3] = False
        assert torch.autograd.gradcheck(
            lambda a, b: pa_mpjpe(a, b, mask), (source, target), atol=1e-6
        )
        assert torch.autograd.gradcheck(lambda a, b: procrustes(a, b)(a), (source, target))
    else:
        pa_mpjpe(source, target).sum().backward()
        assert source.grad is not None
        assert source.grad.isfinite().all()


def test_gradient_of_a_perfect_pose_is_zero() -> None:
    pose = poses(2, 17).requires_grad_()
    pa_mpjpe(pose, pose.detach()).sum().backward()
    assert pose.grad is not None
    assert pose.grad.abs().max() < 10  # of distances of about 1e-16: no direction is right
    assert pose.grad.isfinite().all()


def test_second_derivatives_are_refused() -> None:
    pose = poses(2, 17).requires_grad_()
    (first,) = torch.autograd.grad(
        pa_mpjpe(pose, poses(2, 17, seed=1)).sum(), pose, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    joints=st.integers(1, 20),
    scale=st.floats(1e-3, 1e3),
    flat=st.sampled_from([0.0, 1e-9, 1e-4, 1.0]),
)
def test_invariant_to_similarities(seed: int, joints: int, scale: float, flat: float) -> None:
    pred, truth = poses(3, joints, seed=seed), poses(3, joints, seed=seed + 1)
    pred = pred * torch.tensor([1.0, 1.0, flat], dtype=torch.float64)
    moved = scale * pred @ rotations(3, seed).mT + 2 * poses(3, 1, seed=seed + 2)
    error = pa_mpjpe(pred, truth)
    torch.testing.assert_close(pa_mpjpe(moved, truth), error, rtol=1e-6, atol=1e-8)
    squares = (procrustes(pred, truth)(pred) - truth).square().sum((1, 2))
    # The least of squares: no other similarity has less, so neither has none.
    assert (squares <= (pred - truth).square().sum((1, 2)) * (1 + 1e-12)).all()
    root_mean_square = (pred - truth).square().sum(-1).mean(-1).sqrt()
    assert (error <= root_mean_square * (1 + 1e-12)).all()


def test_not_above_mpjpe_of_noisy_poses() -> None:
    truth = poses(200, 17)
    pred = truth + 0.1 * poses(200, 17, seed=1)
    assert (pa_mpjpe(pred, truth) < mpjpe(pred, truth)).double().mean() > 0.95
    assert pa_mpjpe(pred, truth).mean() < mpjpe(pred, truth).mean()


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (([1.0], torch.zeros(2, 3)), TypeError, "pred.*tensor, got list"),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)), TypeError, "pred.*int64"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).double()), TypeError, "truth.*float32.*float64"),
        ((torch.zeros(2, 2), torch.zeros(2, 2)), ValueError, r"pred.*J, 3.*\(2, 2\)"),
        ((torch.zeros(3), torch.zeros(3)), ValueError, r"pred.*\(3,\)"),
        ((torch.zeros(4, 0, 3), torch.zeros(4, 0, 3)), ValueError, r"pred.*J >= 1"),
        ((torch.zeros(4, 5, 3), torch.zeros(4, 6, 3)), ValueError, r"truth.*\(4, 6, 3\)"),
        ((torch.zeros(4, 5, 3), torch.zeros(3, 5, 3)), ValueError, r"truth.*\(3, 5, 3\)"),
        ((torch.zeros(4, 5, 3), torch.zeros(5, 3), torch.ones(5)), TypeError, "mask.*float32"),
        (
            (torch.zeros(4, 5, 3), torch.zeros(5, 3), torch.ones(4, 4).bool()),
            ValueError,
            r"mask.*\(4, 5\).*\(4, 4\)",
        ),
        (
            (torch.zeros(4, 5, 3), torch.zeros(5, 3), torch.ones(2, 4, 5).bool()),
            ValueError,
            r"mask.*\(2, 4, 5\)",
        ),
    ],
)
def test_bad_input(arguments: tuple[object, ...], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        pa_mpjpe(*arguments)  # type: ignore[arg-type]
    with pytest.raises(kind, match=words.replace("pred", "source").replace("truth", "target")):
        procrustes(*arguments)  # type: ignore[arg-type]
