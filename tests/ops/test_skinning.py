"""Linear blend skinning: smplx's numbers, the reference's, gradients, mesh-free joints, laws."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasthyp import _C, body
from fasthyp.ops import skinning as ops
from fasthyp.reference import skinning as reference
from tests.conftest import Golden, assert_as_good_as, golden_files, max_error

FLOATS = [torch.float32, torch.float64]
KINDS = ("axis_angle", "matrix")
EXACT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTHYP_BACKEND", raising=False)
    threads, level = torch.get_num_threads(), _C.simd_level()
    yield
    torch.set_num_threads(threads)
    _C.set_simd_level(level)


def random_model(
    vertices: int = 61,
    joints: int = 7,
    shapes: int = 5,
    pose_blend: bool = True,
    bones: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Any, ...]:
    """The arrays of a model of any tree; some pose directions and weights are zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parents = [-1] + [int(abs(normal(1)) * 1000) % j for j in range(1, joints)]
    regressor = normal(joints, vertices).softmax(1)
    weights = normal(vertices, joints).softmax(1)
    least = weights.topk(min(bones, joints)).values[:, -1:]
    weights = torch.where(weights < least, 0, weights)
    posedirs = 0.05 * normal(9 * (joints - 1), 3 * vertices)
    posedirs[::3, : 3 * vertices // 2] = 0
    arrays = (
        normal(vertices, 3),
        0.1 * normal(vertices, 3, shapes),
        posedirs if pose_blend else None,
        regressor,
        torch.tensor(parents),
        weights / weights.sum(1, keepdim=True),
    )
    return tuple(a.to(dtype) if a is not None and a.is_floating_point() else a for a in arrays)


def random_bodies(
    count: int,
    model: tuple[Any, ...],
    rotation: str = "axis_angle",
    seed: int = 0,
    shapes: int = -1,
    poses: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """betas, pose (B, J, C), transl; the first pose is zero where that is a rotation."""
    generator = torch.Generator().manual_seed(seed + 1)
    dtype, joints = model[0].dtype, model[4].numel()
    pose = torch.randn(
        count if poses < 0 else poses, joints, 3, generator=generator, dtype=torch.float64
    )
    pose[:1] = 0
    if rotation == "matrix":
        pose = reference.rodrigues(pose).flatten(2)
    elif rotation != "axis_angle":
        pose = torch.randn(*pose.shape[:2], 6, generator=generator, dtype=torch.float64)
    betas = torch.randn(count if shapes < 0 else shapes, model[1].shape[-1], generator=generator)
    transl = torch.randn(count, 3, generator=generator)
    return tuple(t.to(dtype).requires_grad_() for t in (betas, pose, transl))  # type: ignore


def plain(model: tuple[Any, ...], given: tuple[Any, ...], rotation: str) -> tuple[Tensor, Tensor]:
    arrays = (*model[:4], model[4].tolist(), model[5])
    return reference.lbs(*given, *arrays, rotation)


def gradients(results: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    total = torch.zeros((), dtype=results[0].dtype)
    for result in results:
        weights = torch.linspace(-1, 2, max(result.numel(), 1), dtype=result.dtype)
        total = total + (result * weights[: result.numel()].view_as(result)).sum()
    return torch.autograd.grad(total, inputs, retain_graph=True)


# --- the official code ---

_FILES = [p for p in golden_files("*.npz") if Path(p.values[0]).stem.startswith("smpl_lbs_")]


@pytest.mark.parametrize("path", _FILES)
@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("kind", KINDS)
def test_golden_files(path: Path, level: str, kind: str) -> None:
    _C.set_simd_level(level)
    golden = Golden(path)
    names = ("v_template", "shapedirs", "posedirs", "J_regressor", "parents", "lbs_weights")
    end, pose_name = ("", "pose_aa") if kind == "axis_angle" else ("_rotmat", "pose_rotmat")
    for dtype in FLOATS:
        arrays = [golden[f"in/{name}"] for name in names]
        arrays = [a.to(dtype) if a.is_floating_point() else a for a in arrays]
        betas, pose = (golden[f"in/{n}"].to(dtype).requires_grad_() for n in ("betas", pose_name))
        found = body.lbs(betas, pose, *arrays, pose2rot=kind == "axis_angle")  # type: ignore
        cotangents = [golden[f"in/W_{name}"].to(dtype) for name in ("verts", "joints")]
        sum((r * c).sum() for r, c in zip(found, cotangents, strict=True)).backward()  # type: ignore
        pairs = [
            (f"{'out'}/{name}{end}", result)
            for name, result in zip(("verts", "joints"), found, strict=True)
        ] + [(f"grad/betas{end}", betas.grad), (f"grad/{pose_name}", pose.grad)]
        for name, value in pairs:
            exact = golden[name.replace("/", "64/", 1)]
            assert value is not None
            if dtype == torch.float32:
                assert_as_good_as(value, golden[name], exact, name)
            else:
                torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-12)
    odd = golden["in/pose_nonorth"]
    arrays = [golden[f"in/{name}"] for name in names]
    found = body.lbs(golden["in/betas"], odd, *arrays, pose2rot=False)  # type: ignore
    torch.testing.assert_close(found[0], golden["out/verts_nonorth"], rtol=0, atol=2e-6)
    torch.testing.assert_close(found[1], golden["out/joints_nonorth"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", golden_files("rot_conventions*.npz"))
@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize(
    ("rotation", "given_name", "name"),
    [
        ("axis_angle", "aa", "smplx_batch_rodrigues"),
        ("columns", "x6", "prohmr_rot6d"),
        ("interleaved", "x6", "poco_rot6d"),
        ("rows", "x6", "p3d_rotation_6d_to_matrix"),
    ],
)
def test_rotations_are_the_official_ones(
    path: Path, level: str, rotation: Any, given_name: str, name: str
) -> None:
    """Three vertices at the ends of the axes turn into the columns of the matrix."""
    _C.set_simd_level(level)
    golden = Golden(path)
    for dtype in FLOATS:
        numbers = golden[f"in/{given_name}"].to(dtype)
        arrays = torch.eye(3), torch.zeros(3, 3, 0), None, torch.zeros(1, 3)
        model = body.SkinningModel(
            *(None if a is None else a.to(dtype) for a in arrays),  # type: ignore[arg-type]
            torch.tensor([-1]),
            torch.ones(3, 1).to(dtype),
        )
        found = model.vertices(numbers.new_zeros(1, 0), numbers, rotation=rotation).mT
        exact = golden[f"out64/{name}"]
        if dtype == torch.float32:
            assert_as_good_as(found, golden[f"out/{name}"], exact, name, times=3)
        else:
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", golden_files("humr_losses_misc*.npz"))
def test_humr_camera(path: Path) -> None:
    golden = Golden(path)
    names = ("pare_cam", "bbox_height", "bbox_center", "img_w", "img_h", "focal")
    camera, height, center, width, tall, focal = (golden[f"in/{n}"].double() for n in names)
    found = body.humr_camera(camera, height, center, width, tall, focal)
    torch.testing.assert_close(found, golden["out64/cam_t"], **EXACT)
    k = golden["in/K"].double()
    points = golden["in/points"].double()
    projected = body.project(points, found, k[:, [0, 1], [0, 1]], k[:, :2, 2])
    torch.testing.assert_close(projected, golden["out64/proj2d"], rtol=1e-6, atol=1e-4)


def test_prohmr_camera_and_weak_perspective() -> None:
    camera = torch.tensor([[0.9, 0.1, -0.2], [1.1, 0.0, 0.3]])
    found = body.prohmr_camera(camera)
    depth = 2 * 5000 / (224 * camera[:, 0] + 1e-9)
    torch.testing.assert_close(found, torch.stack([*camera[:, 1:].unbind(1), depth], 1))
    points = 0.01 * torch.randn(2, 5, 3)  # near the origin both agree, in half image sides
    both = body.project(points, found, 5000 / 112), body.weak_perspective(points, camera)
    torch.testing.assert_close(*both, rtol=0, atol=1e-3)
    per_body = body.project(points, found, torch.tensor([3.0, 4.0]))
    pairs = body.project(points, found, torch.tensor([[3.0, 3.0], [4.0, 4.0]]), torch.zeros(2))
    assert torch.equal(per_body, pairs)


def cameras(count: int, dtype: torch.dtype) -> dict[str, tuple[Any, Any]]:
    """Of every convention: (one of project_joints, what it stands for as functions of joints)."""
    generator = torch.Generator().manual_seed(9)

    def rand(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)

    weak, move, sides, middle, focal = rand(count, 3), rand(count, 3), rand(count), None, 5000.0
    move[:, 2] += 9
    middle, focals = 100 * rand(count, 2), 100 * rand(count, 2)
    box = 99 * sides, 9 * middle, torch.tensor(640.0, dtype=dtype), 480.0, 1100.0
    height, width = torch.tensor([320.0, 240.0], dtype=dtype), body.humr_camera(weak, *box)
    return {
        "weak": (body.Camera.weak(weak), lambda x: body.weak_perspective(x, weak)),
        "perspective": (
            body.Camera.perspective(move, focals, middle),
            lambda x: body.project(x, move, focals, middle),
        ),
        "a number": (
            body.Camera.perspective(move, 5000 / 224),
            lambda x: body.project(x, move, 5000 / 224),
        ),
        "focal lengths": (
            body.Camera.perspective(move, focals[:, 0], middle[:1].sum(0)),
            lambda x: body.project(x, move, focals[:, 0], middle[:1].sum(0)),
        ),
        "prohmr": (
            body.Camera.prohmr(weak),
            lambda x: body.project(x, body.prohmr_camera(weak), focal / 224),
        ),
        "humr": (
            body.Camera.humr(weak, *box),
            lambda x: body.project(x, width, 1100.0, height),
        ),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("name", list(cameras(1, torch.float32)))
def test_projection_is_that_of_the_joints(dtype: torch.dtype, count: int, name: str) -> None:
    arrays = random_model(dtype=dtype)
    given = random_bodies(count, arrays, "columns")
    folded = body.SkinningModel(*arrays).fold(regressors(61, 7)["dense"].to(dtype))
    for cams in [count, 1] if count else [0]:
        camera, expected = cameras(cams, dtype)[name]
        points, joints = body.project_joints(
            *(folded, *given[:2], camera, given[2]), rotation="columns"
        )
        alone = body.regress_joints(folded, *given, rotation="columns")
        assert torch.equal(joints, alone)
        assert torch.equal(points, expected(alone))  # to the last bit
        assert torch.equal(camera(alone), points)
    plain_twin = reference.skin(
        *(*given, *folded.points.arrays, True, "columns", 17, True, camera.numbers)  # type: ignore
    )
    limit = 1e-3 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(plain_twin[2], points, rtol=1e-4, atol=limit)


@pytest.mark.parametrize("rotation", ["axis_angle", "interleaved"])
@pytest.mark.parametrize("numbers", [reference.WEAK, reference.PERSPECTIVE])
def test_gradcheck_of_projection(rotation: Any, numbers: int) -> None:
    arrays = random_model(9, 4, 2)
    folded = body.SkinningModel(*arrays).fold(
        torch.rand(3, 9, generator=torch.Generator().manual_seed(0)).double()
    )
    given = tuple((t + 0.1).detach().requires_grad_() for t in random_bodies(3, arrays, rotation))
    for cams in (3, 1):
        camera = torch.rand(cams, numbers, generator=torch.Generator().manual_seed(1)).double()
        camera[:, 2] += 9
        camera = camera.requires_grad_()

        def both(camera: Tensor, *bodies: Tensor) -> tuple[Tensor, Tensor]:
            found = (folded, *bodies[:2], body.Camera(camera), bodies[2])
            return body.project_joints(*found, rotation=rotation)

        assert torch.autograd.gradcheck(both, (camera, *given))
        assert torch.autograd.gradcheck(lambda *a: both(*a)[0].sin(), (camera, *given))
        assert torch.autograd.gradcheck(lambda *a: both(*a)[1].sin(), (camera, *given))
        assert torch.autograd.gradgradcheck(both, (camera, *given))


def test_projection_on_many_threads() -> None:
    arrays = random_model(dtype=torch.float32)
    folded = body.SkinningModel(*arrays).fold(regressors(61, 7)["dense"].float())
    given = random_bodies(50, arrays)
    camera = cameras(50, torch.float32)["perspective"][0].numbers.requires_grad_()

    def results() -> tuple[Tensor, ...]:
        found = body.project_joints(folded, *given[:2], body.Camera(camera), given[2])
        by_all = torch.autograd.grad(found[0].square().sum() + found[1].sum(), (*given, camera))
        return *found, *by_all

    expected = results()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for ours, theirs in zip(results(), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 17, 1000])
def test_smplx_in_the_same_process(kind: str, dtype: torch.dtype, count: int) -> None:
    smplx = pytest.importorskip("smplx.lbs")
    model = random_model(dtype=dtype)
    betas, pose, _ = random_bodies(count, model, kind)
    pose = pose.unflatten(-1, (3, 3)).detach().requires_grad_() if kind == "matrix" else pose
    if count == 0:  # smplx cannot
        found = body.lbs(betas, pose, *model, pose2rot=kind == "axis_angle")
        assert found[0].shape == (0, 61, 3)
        assert found[1].shape == (0, 7, 3)
        for grad, leaf in zip(gradients(found, (betas, pose)), (betas, pose), strict=True):
            assert grad.shape == leaf.shape
        return
    theirs = smplx.lbs(betas, pose, *model, pose2rot=kind == "axis_angle")
    ours = body.lbs(betas, pose, *model, pose2rot=kind == "axis_angle")
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else EXACT
    torch.testing.assert_close(ours, theirs, **tolerance)
    by_ours, by_theirs = (gradients(r, (betas, pose)) for r in (ours, theirs))
    for mine, other in zip(by_ours, by_theirs, strict=True):
        scale = float(other.abs().max())
        limit = (1e-5 if dtype == torch.float32 else 1e-12) * scale
        torch.testing.assert_close(mine, other, rtol=0, atol=limit)


# --- the reference ---


@pytest.mark.parametrize("rotation", reference.ROTATIONS)
@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("counts", [(1, 1), (4, 4), (1, 9), (9, 1), (40, 40), (2, 1)])
def test_the_reference_in_float64(rotation: Any, level: str, counts: tuple[int, int]) -> None:
    _C.set_simd_level(level)
    for pose_blend, bones in ((True, 4), (False, 2)):
        arrays = random_model(pose_blend=pose_blend, bones=bones)
        model = body.SkinningModel(*arrays)
        given = random_bodies(max(counts), arrays, rotation, shapes=counts[0], poses=counts[1])
        for transl in (None, given[2]):
            bodies = (*given[:2], transl)
            leaves = bodies[: 2 if transl is None else 3]
            expected = plain(arrays, bodies, rotation)
            found = model(*bodies, rotation=rotation)
            torch.testing.assert_close(found, expected, **EXACT)
            by_ours, by_plain = (gradients(r, leaves) for r in (found, expected))  # type: ignore
            torch.testing.assert_close(by_ours, by_plain, rtol=1e-10, atol=1e-10)
            twin = reference.skin(
                *(*bodies, *model.points().arrays, pose_blend, rotation, 61, True)  # type: ignore
            )[:2]
            torch.testing.assert_close(twin, expected, **EXACT)
            alone = model.joints(*bodies, rotation=rotation)
            assert torch.equal(alone, found[1])
            by_joints = gradients((alone,), leaves)  # type: ignore
            expected_grads = gradients(expected[1:], leaves)  # type: ignore
            torch.testing.assert_close(by_joints, expected_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("vertices", [1, 7, 8, 9, 1300])
@pytest.mark.parametrize("joints", [1, 2, 30])
def test_sizes(vertices: int, joints: int) -> None:
    """Tiles, parts and trees of all sizes; no shape coefficients at all."""
    for shapes, bones in ((0, 1), (3, 30)):
        arrays = random_model(vertices, joints, shapes, bones=bones)
        given = random_bodies(20, arrays)
        expected = plain(arrays, given, "axis_angle")
        found = body.SkinningModel(*arrays)(*given)
        torch.testing.assert_close(found, expected, **EXACT)
        by_ours, by_plain = (gradients(r, given) for r in (found, expected))
        torch.testing.assert_close(by_ours, by_plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", _C.simd_levels())
def test_float32_is_as_good_as_the_reference(level: str) -> None:
    _C.set_simd_level(level)
    wide = random_model(300, 24, 10)
    narrow = tuple(a.float() if a.is_floating_point() else a for a in wide)
    wide = tuple(a.double() if a.is_floating_point() else a for a in narrow)
    given = random_bodies(70, narrow)
    exact_given = tuple(t.detach().double().requires_grad_() for t in given)
    peer, exact = plain(narrow, given, "axis_angle"), plain(wide, exact_given, "axis_angle")
    ours = body.SkinningModel(*narrow)(*given)
    for mine, other, best in zip(ours, peer, exact, strict=True):
        assert_as_good_as(mine, other, best)
    grads = gradients(ours, given), gradients(peer, given), gradients(exact, exact_given)
    for mine, other, best in zip(*grads, strict=True):
        assert_as_good_as(mine, other, best, times=4)


@pytest.mark.parametrize("rotation", reference.ROTATIONS)
def test_gradcheck(rotation: Any) -> None:
    arrays = random_model(9, 4, 2)
    model = body.SkinningModel(*arrays)
    folded = model.fold(torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).double())
    given = random_bodies(3, arrays, rotation, seed=3)

    def everything(*bodies: Tensor) -> tuple[Tensor, ...]:
        return *model(*bodies, rotation=rotation), body.regress_joints(
            folded, *bodies, rotation=rotation
        )

    smooth = tuple((t + 0.1).detach().requires_grad_() for t in given)
    assert torch.autograd.gradcheck(everything, smooth)
    assert torch.autograd.gradgradcheck(everything, smooth)


def test_gradients_of_small_angles() -> None:
    arrays = random_model(9, 4, 2)
    betas, pose, _ = random_bodies(9, arrays)
    scales = torch.tensor([0, 1e-12, 1e-9, 1e-7, 1e-4, 1e-2, 1, 3.14159, 9e3]).double()
    direction = torch.tensor([0.6, -0.64, 0.48]).double()
    pose = (scales[:, None, None] * direction).expand(9, 4, 3).clone().requires_grad_()
    expected = plain(arrays, (betas, pose, None), "axis_angle")
    found = body.lbs(betas, pose, *arrays)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    by_ours, by_plain = (gradients(r, (betas, pose)) for r in (found, expected))
    torch.testing.assert_close(by_ours, by_plain, rtol=1e-6, atol=1e-6)
    narrow = tuple(a.float() if a.is_floating_point() else a for a in arrays)
    leaves = tuple(t.detach().float().requires_grad_() for t in (betas, pose))
    ours = gradients(body.lbs(*leaves, *narrow), leaves)
    for mine, best in zip(ours, by_plain, strict=True):
        assert max_error(mine[:8], best[:8]) < 1e-4 * float(best.abs().max())


# --- joints without a mesh ---


def regressors(vertices: int, joints: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    few = torch.where(rand(9, vertices) < 0.06, rand(9, vertices), 0)
    chosen = torch.zeros(4, vertices).double()
    chosen[torch.arange(4), torch.arange(4) * 3] = 1
    signed = rand(5, vertices) - 0.5
    return {
        "dense": rand(17, vertices).softmax(1),
        "few vertices": few,
        "selected vertices": chosen,
        "sums near zero": signed - signed.mean(1, keepdim=True),
        "an empty row": torch.cat([few[:2], torch.zeros(1, vertices).double(), few[2:4]]),
        "every vertex": torch.eye(vertices).double(),
        "none": torch.zeros(0, vertices).double(),
    }


@pytest.mark.parametrize("name", list(regressors(61, 7)))
@pytest.mark.parametrize("count", [1, 21])
@pytest.mark.parametrize("level", _C.simd_levels())
def test_joints_of_a_regressor_are_those_of_the_vertices(name: str, count: int, level: str) -> None:
    _C.set_simd_level(level)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        arrays = random_model(dtype=dtype)
        regressor = regressors(61, 7)[name].to(dtype)
        given = random_bodies(count, arrays)
        wide = tuple(a.double() if a.is_floating_point() else a for a in arrays)
        exact_given = tuple(t.detach().double().requires_grad_() for t in given)
        vertices = plain(wide, exact_given, "axis_angle")[0]
        expected = torch.einsum("kv,bvc->bkc", regressor.double(), vertices)
        model = body.SkinningModel(*arrays)
        found = model.joints(*given, regressor=regressor)
        assert found.shape == (count, len(regressor), 3)
        assert max_error(found, expected) < limit
        if not len(regressor):
            continue
        ours, theirs = gradients((found,), given), gradients((expected,), exact_given)
        for mine, best in zip(ours, theirs, strict=True):
            assert max_error(mine, best) < 10 * limit * max(1.0, float(best.abs().max()))
        again = body.regress_joints(model.fold(regressor.to_sparse()), *given)
        assert torch.equal(again, found)


def test_a_regressor_is_folded_again_when_it_changes() -> None:
    arrays = random_model()
    model = body.SkinningModel(*arrays)
    betas, pose, _ = random_bodies(3, arrays)
    regressor = regressors(61, 7)["dense"]
    assert model.fold(regressor) is model.fold(regressor)
    before = model.joints(betas, pose, regressor=regressor)
    regressor *= 2
    torch.testing.assert_close(model.joints(betas, pose, regressor=regressor), 2 * before)
    arrays[0].add_(1)
    changed = regressor @ model.vertices(betas, pose)
    torch.testing.assert_close(model.joints(betas, pose, regressor=regressor), changed)


# --- laws ---


def _rotation(seed: int) -> Tensor:
    return reference.rodrigues(
        torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 6),
    st.integers(1, 20),
    st.integers(0, 999),
)
def test_a_rigid_motion_of_the_root_moves_everything(
    vertices: int, joints: int, shapes: int, count: int, seed: int
) -> None:
    arrays = random_model(vertices, joints, shapes, seed=seed)
    model = body.SkinningModel(*arrays)
    betas, pose, transl = (t.detach() for t in random_bodies(count, arrays, "matrix", seed))
    turn = _rotation(seed)
    turned = pose.unflatten(-1, (3, 3)).clone()
    turned[:, 0] = turn @ turned[:, 0]
    regressor = torch.rand(3, vertices, generator=torch.Generator().manual_seed(seed)).double()
    regressor /= regressor.sum(1, keepdim=True)
    before = (*model(betas, pose), model.joints(betas, pose, regressor=regressor))
    after = (
        *model(betas, turned, transl),
        model.joints(betas, turned, transl, regressor=regressor),
    )
    root = before[1][:, :1]
    for old, new in zip(before, after, strict=True):
        moved = (old - root) @ turn.T + root + transl[:, None]
        torch.testing.assert_close(new, moved, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 6), st.integers(0, 999))
def test_a_pose_of_zero_leaves_the_shaped_body(
    vertices: int, joints: int, shapes: int, seed: int
) -> None:
    arrays = random_model(vertices, joints, shapes, seed=seed)
    betas = random_bodies(4, arrays, seed=seed)[0].detach()
    found = body.lbs(betas, torch.zeros(1, joints * 3).double(), *arrays)
    shaped = arrays[0] + torch.einsum("bl,mkl->bmk", betas, arrays[1])
    torch.testing.assert_close(found[0], shaped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], arrays[3] @ shaped, rtol=1e-12, atol=1e-12)


# --- the same whatever the machine ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("level", _C.simd_levels())
def test_threads_and_splits(dtype: torch.dtype, level: str) -> None:
    _C.set_simd_level(level)
    arrays = random_model(1300, 9, 4, dtype=dtype)  # several parts
    model = body.SkinningModel(*arrays)
    regressor = torch.rand(3, 1300, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = random_bodies(37, arrays)

    def results(*bodies: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(t.detach().requires_grad_() for t in bodies)
        found = (*model(*leaves), model.joints(*leaves, regressor=regressor))
        by_all = torch.autograd.grad(sum(f.square().sum() for f in found), leaves)  # type: ignore
        return *found, *by_all

    expected = results(*given)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for ours, theirs in zip(results(*given), expected, strict=True):
            assert torch.equal(ours, theirs)
    for part in (slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 11), slice(11, 37)):
        for ours, theirs in zip(results(*(t[part] for t in given)), expected, strict=True):
            assert torch.equal(ours, theirs[part])


@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_bodies_with_joints_at_rest(level: str, count: int) -> None:
    """Features of zero are not read; tiles whose columns differ are done together."""
    _C.set_simd_level(level)
    arrays = random_model(205, 12, 4, bones=12)
    arrays[2].view(99, 205, 3)[:, 50:90] = 0  # type: ignore[union-attr]
    betas, pose, transl = (t.detach() for t in random_bodies(count, arrays))
    pose[:, 3:9] = 0
    betas[:, 1] = 0
    expected = plain(arrays, (betas, pose, transl), "axis_angle")
    model = body.SkinningModel(*arrays)
    found = model(betas, pose, transl)
    torch.testing.assert_close(found, expected, **EXACT)
    many = model(*(t.repeat(9, *[1] * (t.ndim - 1)) for t in (betas, pose, transl)))
    assert torch.equal(many[0][:count], found[0])


def test_without_the_dispatcher_nothing_changes() -> None:
    arrays = random_model()
    model = body.SkinningModel(*arrays)
    given = random_bodies(3, arrays)
    expected = model(*given)
    assert expected[0].requires_grad
    bare = tuple(t.detach() for t in given)
    assert ops.is_plain(bare)
    assert not ops.is_plain(given)
    with torch.no_grad():
        assert ops.is_plain(given)
        for ours, theirs in zip(model(*given), expected, strict=True):
            assert torch.equal(ours, theirs)
    with torch.autograd.forward_ad.dual_level():
        assert not ops.is_plain(bare)
    with torch.profiler.profile():
        assert not ops.is_plain(bare)
    with torch.overrides.BaseTorchFunctionMode():
        assert not ops.is_plain(bare)
    assert not ops.is_plain((bare[0].as_subclass(Derived), *bare[1:]))


class Derived(Tensor):
    """A tensor of another kind."""


def test_levels_agree() -> None:
    arrays = random_model(dtype=torch.float32)
    given = random_bodies(20, arrays)
    model = body.SkinningModel(*arrays)
    found = []
    for level in _C.simd_levels():
        _C.set_simd_level(level)
        found.append(model(*given))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-6, atol=2e-6)


def test_nan_stays_in_its_body() -> None:
    arrays = random_model(dtype=torch.float32)
    betas, pose, _ = (t.detach() for t in random_bodies(20, arrays))
    expected = body.lbs(betas, pose, *arrays)
    pose[7, 0, 1] = torch.nan
    found = body.lbs(betas, pose, *arrays)
    keep = torch.arange(20) != 7
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[keep], theirs[keep])
    assert found[0][7].isnan().all()


# --- models that change ---


def test_a_changed_model_is_noticed() -> None:
    arrays = random_model()
    model = body.SkinningModel(*arrays)
    given = random_bodies(2, arrays)
    for change in (0, 1, 2, 3, 5):
        model(*given)
        body.lbs(*given[:2], *arrays)
        arrays[change].mul_(1.25)
        expected = plain(arrays, given, "axis_angle")
        torch.testing.assert_close(model(*given), expected, **EXACT)
        shapes = plain(arrays, (*given[:2], None), "axis_angle")
        torch.testing.assert_close(body.lbs(*given[:2], *arrays), shapes, **EXACT)


def test_folded_models_are_reused_and_dropped() -> None:
    from fasthyp.body import skinning as module

    arrays = random_model()
    given = random_bodies(2, arrays)[:2]
    body.lbs(*given, *arrays)
    points = next(reversed(module._models.values()))[-1]
    body.lbs(*given, *arrays)
    assert next(reversed(module._models.values()))[-1] is points
    for seed in range(6):
        body.lbs(*given, *random_model(seed=seed))
    assert len(module._models) <= module._REMEMBERED


def test_gradients_of_the_model_take_the_reference() -> None:
    arrays = list(random_model(9, 3, 2))
    given = random_bodies(2, tuple(arrays))
    leaves = []
    for i in (0, 1, 2, 3, 5):
        arrays[i] = arrays[i].requires_grad_()
        leaves.append(arrays[i])
    found = gradients(body.lbs(*given[:2], *arrays), tuple(leaves))  # type: ignore
    expected = gradients(plain(tuple(arrays), (*given[:2], None), "axis_angle"), tuple(leaves))
    torch.testing.assert_close(found, expected)


def test_pickle_and_copy() -> None:
    arrays = random_model()
    model = body.SkinningModel(*arrays)
    given = random_bodies(2, arrays)
    expected = model(*given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*given)[0], expected[0])
        other.v_template.add_(1)
        assert not torch.equal(other(*given)[0], expected[0])
    assert torch.equal(model(*given)[0], expected[0])


# --- arguments ---


def test_shapes_of_a_pose() -> None:
    arrays = random_model()
    model = body.SkinningModel(*arrays)
    betas, pose, _ = (t.detach() for t in random_bodies(3, arrays))
    expected = model(betas, pose)
    matrices = reference.rodrigues(pose)
    for other in (pose.flatten(1), matrices, matrices.flatten(2), matrices.flatten(1)):
        torch.testing.assert_close(model(betas, other), expected, **EXACT)
    turned = pose.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(model(betas, turned)[0], expected[0])
    assert torch.equal(model(betas[:1].expand(3, -1), pose)[1], model(betas[:1], pose)[1])
    assert torch.equal(model.vertices(betas, pose), expected[0])
    assert model(betas, pose, vertices=False)[0].shape == (0,)
    template = (arrays[0][None], *arrays[1:])
    assert torch.equal(body.lbs(betas, pose, *template)[0], expected[0])
    sparse = (*arrays[:3], arrays[3].to_sparse(), *arrays[4:])
    torch.testing.assert_close(body.lbs(betas, pose, *sparse), expected, **EXACT)
    none = body.lbs(betas, pose, *arrays[:2], torch.zeros(0, 183).double(), *arrays[3:])
    torch.testing.assert_close(none, body.lbs(betas, pose, *arrays[:2], None, *arrays[3:]))


def test_gradients_that_are_not_contiguous() -> None:
    arrays = random_model()
    given = random_bodies(4, arrays)
    found = body.SkinningModel(*arrays)(*given)
    for kind in range(3):
        cotangents = []
        for result in found:
            wide = torch.randn(*result.shape[:-1], 6).double()
            cotangents.append(
                (wide[..., ::2], wide[..., :1].expand_as(result), wide[..., 3:])[kind]
            )
        ours = torch.autograd.grad(found, given, cotangents, retain_graph=True)
        clones = [c.clone() for c in cotangents]
        theirs = torch.autograd.grad(found, given, clones, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


B, P, A = torch.zeros(2, 5), torch.zeros(2, 21), random_model(dtype=torch.float32)
NAMES = (
    "betas",
    "pose",
    "v_template",
    "shapedirs",
    "posedirs",
    "J_regressor",
    "parents",
    "lbs_weights",
)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"betas": B.numpy()}, TypeError, "betas: expected a torch.Tensor, got ndarray"),
        ({"betas": B[:, :4]}, ValueError, r"betas: expected shape \(B, 5\), got \(2, 4\)"),
        ({"betas": B[0]}, ValueError, r"betas: expected shape \(B, 5\), got \(5,\)"),
        ({"betas": B.double()}, TypeError, "betas: expected torch.float32 as the model"),
        ({"betas": torch.zeros(3, 5)}, ValueError, "expected as many of each or one, got 3 betas"),
        ({"pose": None}, TypeError, "pose: expected a torch.Tensor, got NoneType"),
        ({"pose": P[:, :20]}, ValueError, r"pose: expected 3 numbers \(axis_angle\) for each of 7"),
        ({"pose": P.half()}, TypeError, "pose: expected torch.float32 as the model"),
        ({"v_template": A[0][:, :2]}, ValueError, r"v_template: expected shape \(\*, 3\)"),
        ({"v_template": A[0].half()}, TypeError, "v_template: expected float32 or float64"),
        ({"v_template": A[0][:-1]}, ValueError, r"shapedirs: expected shape \(60, 3, \*\)"),
        ({"shapedirs": A[1][:, :2]}, ValueError, r"shapedirs: expected shape \(61, 3, \*\)"),
        (
            {"shapedirs": A[1].double()},
            TypeError,
            "shapedirs: expected torch.float32 as v_template",
        ),
        ({"posedirs": A[2][:-1]}, ValueError, r"posedirs: expected shape \(54, 183\), got"),
        ({"J_regressor": A[3].T}, ValueError, r"J_regressor: expected shape \(7, 61\), got"),
        ({"parents": A[4].float()}, TypeError, "parents: expected integers, got torch.float32"),
        ({"parents": torch.zeros(0).long()}, ValueError, "parents: expected at least one joint"),
        (
            {"parents": torch.tensor([-1, 0, 1, 3, 1, 2, 3])},
            ValueError,
            "parents: expected a joint before it for joint 3, got 3",
        ),
        (
            {"parents": torch.tensor([-1, -1, 1, 2, 1, 2, 3])},
            ValueError,
            "parents: expected a joint before it for joint 1, got -1",
        ),
        ({"lbs_weights": A[5].T}, ValueError, r"lbs_weights: expected shape \(61, 7\), got"),
        ({"lbs_weights": A[5].to("meta")}, ValueError, "lbs_weights: expected on cpu"),
    ],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(NAMES, (B, P, *A), strict=True)) | changed
    with pytest.raises(error, match=message):
        body.lbs(**arguments)


def test_more_bad_input() -> None:
    model = body.SkinningModel(*A)
    with pytest.raises(ValueError, match="rotation: expected one of axis_angle, matrix, columns"):
        model(B, P, rotation="quaternion")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pose: expected 3 or 9 numbers for each of 7 joints, or"):
        model(B, torch.zeros(2, 42))
    with pytest.raises(ValueError, match=r"transl: expected shape \(B, 3\), got \(2, 2\)"):
        model(B, P, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"regressor: expected shape \(K, 61\), got \(3, 60\)"):
        model.fold(torch.zeros(3, 60))
    with pytest.raises(TypeError, match="regressor: expected floating numbers, got"):
        model.fold(torch.zeros(3, 61).long())
    with pytest.raises(TypeError, match=r"regressor: expected a torch\.Tensor, got list"):
        model.fold([[0.0] * 61])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="folded: expected FoldedJoints, got SkinningModel"):
        body.regress_joints(model, B, P)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"joints: expected shape \(\*, \*, 3\), got \(2, 3\)"):
        body.project(torch.zeros(2, 3), torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"camera: expected shape \(\*, 3\), got \(3,\)"):
        body.prohmr_camera(torch.zeros(3))
    folded = model.fold(torch.ones(3, 61))
    with pytest.raises(TypeError, match="camera: expected a Camera, got Tensor"):
        body.project_joints(folded, B, P, torch.zeros(1, 3))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"camera: expected shape \(B, 3\) or \(B, 7\), got \(2, 4\)"
    ):
        body.project_joints(folded, B, P, body.Camera(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="expected as many of each or one, got 2 betas, 2 pose, 3"):
        body.project_joints(folded, B, P, body.Camera(torch.zeros(3, 3)))
    with pytest.raises(TypeError, match=r"camera: expected torch\.float32 as the model, got"):
        body.project_joints(folded, B, P, body.Camera(torch.zeros(2, 3).double()))
    with pytest.raises(ValueError, match="camera: expected points that are summed up into joints"):
        model.points()(B, P.view(2, 7, 3), None, "axis_angle", camera=torch.zeros(2, 3))


def test_the_op_refuses_arrays_that_do_not_fit() -> None:
    points = body.SkinningModel(*A).points()
    arrays = dict(zip(ops.ARRAYS, points.arrays, strict=True))
    for name, wrong in (
        ("rest", arrays["rest"][:-1]),
        ("rows", arrays["rows"].long()),
        ("columns", arrays["columns"].T),
        ("starts", arrays["starts"][:-9]),
        ("weights", arrays["weights"].double()),
        ("base", arrays["base"].T.contiguous().T),
    ):
        given = {**arrays, name: wrong}
        with pytest.raises((ValueError, TypeError)):
            ops.skinning(
                *(B, P.view(2, 7, 3), None, *given.values(), True, "axis_angle", 61, True, None)
            )


# --- the op ---


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rotation", ["axis_angle", "rows"])
@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("want", [False, True])
def test_opcheck(dtype: torch.dtype, rotation: str, mesh: bool, want: bool) -> None:
    arrays = random_model(9, 4, 2, dtype=dtype)
    model = body.SkinningModel(*arrays)
    points = model.points() if mesh else model.fold(torch.rand(2, 9).to(dtype)).points
    given = random_bodies(3, arrays, rotation)
    for bodies in (given, (*given[:2], None), (given[0].detach()[:1], *given[1:])):
        arguments = (*bodies, *points.arrays, True, rotation, points.outputs, want)
        camera = None if mesh else torch.rand(3, 7).to(dtype).requires_grad_()
        for cams in (None, *[camera] * (not mesh)):
            torch.library.opcheck(torch.ops.fasthyp.skinning.default, (*arguments, cams))
    detached = [t.detach() for t in given]
    grads = torch.randn(3, points.outputs, 3).to(dtype), torch.randn(3, 4, 3).to(dtype)
    for out_grad, joints_grad in (grads, (grads[0], None), (None, grads[1])):
        arguments = (out_grad, joints_grad, *detached, *points.arrays, True, rotation)  # type: ignore
        op = torch.ops.fasthyp.skinning_backward.default
        torch.library.opcheck(op, (*arguments, points.outputs, None, None, None))
    if not mesh:
        flat, camera = torch.randn(3, 2, 2).to(dtype), torch.rand(3, 3).to(dtype)
        arguments = (None, None, *detached, *points.arrays, True, rotation)  # type: ignore
        torch.library.opcheck(op, (*arguments, points.outputs, flat, camera, grads[0]))


def test_function_transforms() -> None:
    arrays = random_model(9, 4, 2)
    model = body.SkinningModel(*arrays)
    betas, pose, _ = (t.detach() for t in random_bodies(6, arrays))
    expected = model.vertices(betas, pose)

    def one(betas: Tensor, pose: Tensor) -> Tensor:
        return model.vertices(betas[None], pose[None])[0]

    torch.testing.assert_close(torch.func.vmap(one)(betas, pose), expected)


def test_compiles() -> None:
    arrays = random_model()
    model = body.SkinningModel(*arrays)
    given = random_bodies(3, arrays)
    folded = model.fold(regressors(61, 7)["dense"])

    def joints(betas: Tensor, pose: Tensor, transl: Tensor) -> Tensor:
        return 2 * body.regress_joints(folded, betas, pose.sin(), transl)

    def vertices(betas: Tensor, pose: Tensor, transl: Tensor) -> Tensor:
        return 2 * model.vertices(betas, pose.sin(), transl)

    # whether a model has changed is not for a graph to say: that breaks it once
    for function, whole in ((joints, True), (vertices, False)):
        found, expected = torch.compile(function, fullgraph=whole)(*given), function(*given)
        assert torch.equal(found, expected)
        ours, theirs = gradients((found,), given), gradients((expected,), given)
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_the_backend_can_be_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = random_model()
    given = random_bodies(3, arrays)
    expected = body.SkinningModel(*arrays)(*given)
    monkeypatch.setenv("FASTHYP_BACKEND", "reference")
    monkeypatch.setattr(ops, "skinning", None)
    torch.testing.assert_close(body.SkinningModel(*arrays)(*given), expected, **EXACT)


# --- CUDA ---

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.cuda_archs is None,
    reason="needs a CUDA device and a build with CUDA kernels",
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rotation", reference.ROTATIONS)
@pytest.mark.parametrize("count", [0, 1, 33, 1000])
def test_cuda_is_as_the_cpu(dtype: torch.dtype, rotation: Any, count: int) -> None:
    arrays = random_model(700, 24, 10, dtype=dtype)
    there = tuple(None if a is None else a.cuda() for a in arrays)
    regressor = regressors(700, 24)["dense"].to(dtype)
    given = random_bodies(count, arrays, rotation, shapes=1 if count == 33 else -1)
    moved = tuple(t.detach().cuda().requires_grad_() for t in given)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    results = []
    for model, bodies, matrix in (
        (body.SkinningModel(*arrays), given, regressor),
        (body.SkinningModel(*there), moved, regressor.cuda()),
    ):
        found = (
            *model(*bodies, rotation=rotation),
            model.joints(*bodies, rotation=rotation, regressor=matrix),
        )
        by_all = torch.autograd.grad(sum(f.sin().sum() for f in found), bodies)  # type: ignore
        results.append((*found, *by_all))
    for on_cpu, on_cuda in zip(*results, strict=True):
        scale = max([1.0, *on_cpu.detach().abs().flatten()[:1000].tolist()])
        torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=tolerance * scale)


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_and_stream() -> None:
    arrays = random_model(dtype=torch.float32)
    model = body.SkinningModel(*(a.cuda() for a in arrays))
    given = tuple(t.detach().cuda() for t in random_bodies(40, arrays))
    expected = model(*given)
    static = tuple(torch.zeros_like(t) for t in given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(model(*given)[0], expected[0])
        model(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(*static)
    for to, source in zip(static, given, strict=True):
        to.copy_(source)
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)
