"""SMPL, SMPL+H and SMPL-X against smplx in the same process, and what must hold for any body."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smplx
import smplx.body_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fasthyp
from fasthyp import body
from tests.body import synthetic_models as synthetic
from tests.conftest import max_error

V = 210
IDS = synthetic.vertex_ids(V)
KINDS = ("SMPL", "SMPLH", "SMPLX")
BODY = {"SMPL": 69, "SMPLH": 63, "SMPLX": 63}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}  # of the largest coordinate, or of a metre


def arrays_of(kind: str, shapes: int | None = None) -> dict[str, Any]:
    if kind == "SMPL":
        return synthetic.model(vertices=V, shapes=shapes or 10)
    if kind == "SMPLH":
        return synthetic.with_hands(synthetic.model(synthetic.SMPLH_PARENTS, V, shapes or 10))
    made = synthetic.model(synthetic.SMPLX_PARENTS, V, shapes or 20)
    return synthetic.with_face(synthetic.with_hands(made))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("SMPL", "SMPLH"):
        synthetic.write_pickle(folder / f"{kind}_NEUTRAL.pkl", arrays_of(kind))
    synthetic.write_npz(folder / "SMPLX_NEUTRAL.npz", arrays_of("SMPLX"))
    synthetic.write_npz(folder / "SMPLX_MALE.npz", arrays_of("SMPLX", 400))
    return folder


@pytest.fixture(autouse=True)
def _small_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    # smplx takes SMPL-X's vertices from this table whatever it is given
    for table in (smplx.body_models.VERTEX_IDS, body.smpl.VERTEX_IDS):
        for name in ("smplh", "smplx"):
            monkeypatch.setitem(table, name, IDS)


def pair(kind: str, files: Path, layer: bool = False, **kw: Any) -> tuple[Any, Any]:
    """Ours and smplx's of the same file."""
    own = dict(kw)
    if layer:
        parts = ("betas", "global_orient", "body_pose", "transl")
        if kind != "SMPL":
            parts += ("left_hand_pose", "right_hand_pose")
        if kind == "SMPLX":
            parts += ("expression", "jaw_pose", "leye_pose", "reye_pose")
        own.update({f"create_{part}": False for part in parts})
    peer = getattr(smplx, f"{kind}Layer" if layer else kind)(str(files), **kw)
    return getattr(body, kind)(files, **own), peer


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def rotations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    q, _ = torch.linalg.qr(numbers(*shape, 3, 3, seed=seed, dtype=torch.float64))
    return (q * q.det().sign()[..., None, None]).to(dtype)


def inputs_of(
    kind: str,
    batch: int,
    dtype: torch.dtype = torch.float32,
    matrices: bool = False,
    hands: int = 6,
) -> dict[str, Tensor]:
    def turn(joints: int, seed: int) -> Tensor:
        if matrices:
            return rotations(batch, joints, seed=seed, dtype=dtype)
        return numbers(batch, 3 * joints, seed=seed, dtype=dtype)

    found = {
        "betas": numbers(batch, 10, seed=1, dtype=dtype),
        "body_pose": turn(BODY[kind] // 3, 2),
        "global_orient": turn(1, 3),
        "transl": numbers(batch, 3, seed=4, dtype=dtype),
    }
    if kind != "SMPL":
        for k, side in enumerate(("left", "right")):
            hand = turn(15, 5) if matrices else numbers(batch, hands, seed=5 + k, dtype=dtype)
            found[f"{side}_hand_pose"] = hand
    if kind == "SMPLX":
        found["expression"] = numbers(batch, 10, seed=7, dtype=dtype)
        for k, name in enumerate(("jaw", "leye", "reye")):
            found[f"{name}_pose"] = turn(1, 8 + k)
    return found


def assert_equal(ours: Any, peers: Any, dtype: torch.dtype = torch.float32) -> None:
    for name in peers.keys():  # noqa: SIM118  iterating an output of smplx gives an iterator's keys
        want, got = peers[name], ours[name]
        if want is None:
            assert got is None, name
            continue
        if name == "transl":  # only one class of smplx reports it
            continue
        assert got is not None, name
        assert got.shape == want.shape, name
        assert got.dtype == want.dtype, name
        size = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
        assert max_error(got, want) <= TOLERANCE[dtype] * size, name


# --- live equality ---


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_that_of_smplx(kind: str, files: Path) -> None:
    for kw in ({}, {"use_face_contour": True}) if kind == "SMPLX" else ({},):
        ours, peer = pair(kind, files, **kw, batch_size=2)
        want, got = peer.state_dict(), ours.state_dict()
        assert set(got) == set(want)
        for name, value in want.items():
            assert torch.equal(got[name], value), name
            assert got[name].dtype == value.dtype, name
        assert [*dict(ours.named_parameters())] == [*dict(peer.named_parameters())]
        ours.load_state_dict(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_smplx(kind: str, batch: int, dtype: torch.dtype, files: Path) -> None:
    ours, peer = pair(kind, files, dtype=dtype)
    inputs = inputs_of(kind, batch, dtype)
    assert_equal(
        ours(**inputs, return_full_pose=True), peer(**inputs, return_full_pose=True), dtype
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equals_smplx_with_each_input_left_out(kind: str, files: Path) -> None:
    ours, peer = pair(kind, files, batch_size=3)
    with torch.no_grad():
        for k, (mine, theirs) in enumerate(zip(ours.parameters(), peer.parameters(), strict=True)):
            value = numbers(*mine.shape, seed=50 + k)
            mine.copy_(value)
            theirs.copy_(value)
    inputs = inputs_of(kind, 3)
    assert_equal(ours(), peer())
    for name in inputs:
        rest = {key: value for key, value in inputs.items() if key != name}
        assert_equal(ours(**rest), peer(**rest))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_rotation_matrices(kind: str, files: Path) -> None:
    ours, peer = pair(kind, files, layer=True)
    inputs = inputs_of(kind, 3, matrices=True)
    found = peer(**inputs, pose2rot=False, return_full_pose=True, return_shaped=False)
    own = {"return_shaped": False} if kind == "SMPLX" else {}
    assert_equal(ours(**inputs, pose2rot=False, return_full_pose=True, **own), found)
    for name in inputs:  # identities and zeros
        rest = {key: value for key, value in inputs.items() if key != name}
        assert_equal(ours(**rest, pose2rot=False, **own), peer(**rest, pose2rot=False))
    assert_equal(ours(pose2rot=False, **own), peer(pose2rot=False))


@pytest.mark.parametrize(
    "setting",
    [
        {"use_pca": False},
        {"num_pca_comps": 12},
        {"flat_hand_mean": True},
        {"num_betas": 4},
        {"use_hands": False},
        {"use_feet_keypoints": False},
        {"create_transl": False},
    ],
)
@pytest.mark.parametrize("kind", ["SMPLH", "SMPLX"])
def test_settings(kind: str, setting: dict[str, Any], files: Path) -> None:
    ours, peer = pair(kind, files, **setting)
    hands = 45 if "use_pca" in setting else setting.get("num_pca_comps", 6)
    inputs = inputs_of(kind, 2, hands=hands)
    if "num_betas" in setting:
        inputs["betas"] = inputs["betas"][:, :4]
    if "create_transl" in setting:
        del inputs["transl"]
    assert_equal(ours(**inputs), peer(**inputs))


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_face_contour(scale: float, files: Path) -> None:
    ours, peer = pair("SMPLX", files, use_face_contour=True)
    inputs = inputs_of("SMPLX", 40)
    inputs["body_pose"] = inputs["body_pose"] * scale
    inputs["global_orient"] = inputs["global_orient"] * scale
    found = ours(**inputs)
    assert found.joints.shape == (40, 55 + 21 + 51 + 17, 3)
    assert_equal(found, peer(**inputs))
    lean = ours(**inputs, vertices=False)
    assert lean.vertices is None
    assert torch.equal(lean.joints, found.joints)
    layer, peers = pair("SMPLX", files, layer=True, use_face_contour=True)
    turned = inputs_of("SMPLX", 8, matrices=True)
    assert_equal(
        layer(**turned, pose2rot=False, return_shaped=False), peers(**turned, pose2rot=False)
    )


def test_large_files_of_smplx(files: Path) -> None:
    ours, peer = pair("SMPLX", files, gender="male", num_betas=16, num_expression_coeffs=30)
    inputs = inputs_of("SMPLX", 2)
    inputs["betas"], inputs["expression"] = numbers(2, 16), numbers(2, 30)
    assert_equal(ours(**inputs), peer(**inputs))
    none = body.SMPLX(files, num_expression_coeffs=0)
    assert none().expression is None
    assert none.joints(inputs["betas"][:, :10]).shape == (2, 127, 3)


def test_kid(files: Path, tmp_path: Path) -> None:
    template = tmp_path / "kid.npy"
    np.save(template, numbers(V, 3, dtype=torch.float64).numpy())
    for kind in ("SMPL", "SMPLX"):
        ours, peer = pair(kind, files, age="kid", kid_template_path=str(template))
        inputs = inputs_of(kind, 2)
        inputs["betas"] = numbers(2, 11)
        assert ours.num_betas == 11
        assert_equal(ours(**inputs), peer(**inputs))
    with pytest.raises(ValueError, match="kid_template_path"):
        body.SMPL(files, age="kid")


def test_joint_mapper_template_and_helpers(files: Path) -> None:
    def pick(joints: Tensor, vertices: Tensor | None = None) -> Tensor:
        return joints[:, [0, 12, 30]]

    template = numbers(V, 3)
    for kind in KINDS:
        kw = {"joint_mapper": pick, "v_template": template}
        ours, peer = pair(kind, files, **kw)
        assert_equal(ours(**inputs_of(kind, 2)), peer(**inputs_of(kind, 2)))
        assert ours(**inputs_of(kind, 2), vertices=False).joints.shape == (2, 3, 3)
        for name in ("num_betas", "num_expression_coeffs"):
            assert getattr(ours, name) == getattr(peer, name)
        assert ours.name() == peer.name()
        assert ours.get_num_verts() == peer.get_num_verts()
        assert ours.get_num_faces() == peer.get_num_faces()
        np.testing.assert_array_equal(ours.faces, peer.faces)
        betas = numbers(3, 10)
        assert_equal(ours.forward_shape(betas), peer.forward_shape(betas))
        ours.reset_params(betas=torch.ones(1, 10))
        assert float(ours.betas.detach().sum()) == 10
        assert float(ours.body_pose.detach().abs().sum()) == 0
        assert kind in repr(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_smplx(kind: str, files: Path) -> None:
    ours, peer = pair(kind, files, dtype=torch.float64)
    grads = []
    for model in (ours, peer):
        inputs = {k: v.requires_grad_() for k, v in inputs_of(kind, 2, torch.float64).items()}
        out = model(**inputs)
        loss = (out.vertices * numbers(2, V, 3, seed=30, dtype=torch.float64)).sum()
        loss = loss + (out.joints.square()).sum()
        grads.append(dict(zip(inputs, torch.autograd.grad(loss, [*inputs.values()]), strict=True)))
    for name, want in grads[1].items():
        assert max_error(grads[0][name], want) <= 1e-11 * max(1, float(want.abs().max())), name


# --- batches ---


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_none_one_and_many(kind: str, files: Path) -> None:
    ours = getattr(body, kind)(files)
    whole = inputs_of(kind, 4)
    none = ours(**{name: value[:0] for name, value in whole.items()})
    assert none.vertices.shape == (0, V, 3)
    assert none.joints.shape[0] == 0
    assert ours.joints(whole["betas"][:0]).shape == none.joints.shape
    for name in whole:
        mixed = {key: value[:1] if key == name else value for key, value in whole.items()}
        full = {key: value.expand(4, *value.shape[1:]) for key, value in mixed.items()}
        for got, want in ((ours(**mixed), ours(**full)),):
            torch.testing.assert_close(got.vertices, want.vertices)
            torch.testing.assert_close(got.joints, want.joints)
    alone = ours(body_pose=whole["body_pose"])  # all else is the model's own, of batch one
    assert alone.vertices.shape == (4, V, 3)
    assert alone.betas.shape == (4, 10)
    rows = torch.cat(
        [ours(**{k: v[i : i + 1] for k, v in whole.items()}).vertices for i in range(4)]
    )
    torch.testing.assert_close(ours(**whole).vertices, rows, atol=2e-6, rtol=0)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(ours(**whole).vertices, ours(**whole).vertices)
            torch.testing.assert_close(ours(**whole).vertices, rows, atol=2e-6, rtol=0)


def test_shapes_of_rotations(files: Path) -> None:
    ours = body.SMPL(files)
    flat = numbers(2, 69)
    want = ours(body_pose=flat)
    torch.testing.assert_close(ours(body_pose=flat.view(2, 23, 3)).joints, want.joints)
    turns = body.rotations.rotation_matrices(flat.view(2, 23, 3))
    for shape in ((2, 23, 3, 3), (2, 23, 9), (2, 207)):
        got = ours(body_pose=turns.reshape(shape), pose2rot=False)
        torch.testing.assert_close(got.joints, want.joints, atol=1e-5, rtol=0)
    # parameters of the model itself, which are axis angles, go with matrices too
    with torch.no_grad():
        ours.global_orient.copy_(numbers(1, 3))
    got = ours(body_pose=turns, pose2rot=False).joints
    torch.testing.assert_close(got, ours(body_pose=flat).joints, atol=1e-5, rtol=0)
    hands = body.SMPLH(files)
    got = hands(pose2rot=False).joints
    torch.testing.assert_close(got, hands().joints, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", body.skinning.reference.ROTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rotations_by_name(kind: str, form: Any, files: Path) -> None:
    ours = (
        getattr(body, kind)(files, dtype=torch.float64, use_face_contour=True)
        if (kind == "SMPLX")
        else getattr(body, kind)(files, dtype=torch.float64)
    )
    inputs = inputs_of(kind, 3, torch.float64, matrices=True)
    want = ours(**inputs, pose2rot=False)
    given = dict(inputs)
    for name, value in inputs.items():
        if value.dim() != 4:
            continue
        if form == "axis_angle":
            given[name] = fasthyp.geometry.matrix_to_axis_angle(value)
        elif form != "matrix":
            given[name] = fasthyp.geometry.matrix_to_rotation_6d(value, form)
    if form == "axis_angle" and kind != "SMPL":  # hands are then components
        given |= {f"{side}_hand_pose": torch.zeros(3, 6).double() for side in ("left", "right")}
        want = ours(**given)
    got = ours(**given, rotation=form, return_full_pose=True)
    limit = 1e-7 if form == "axis_angle" else 1e-12  # 1e-8 is added to those
    assert max_error(got.vertices, want.vertices) < limit
    assert max_error(got.joints, want.joints) < limit
    assert max_error(ours.joints(**given, rotation=form), want.joints) < limit
    flat = {n: v.flatten(1) if v.dim() == 3 else v for n, v in given.items()}
    assert torch.equal(ours(**flat, rotation=form).vertices, got.vertices)
    wide = {"axis_angle": (3, 3 * len(ours.parents)), "matrix": (3, len(ours.parents), 3, 3)}
    assert got.full_pose.shape == wide.get(form, (3, 6 * len(ours.parents)))
    for name in inputs:  # what is not given is at rest, or the model's own
        rest = {key: value for key, value in given.items() if key != name}
        turned = {key: value for key, value in inputs.items() if key != name}
        if form != "axis_angle":
            error = max_error(
                ours(**rest, rotation=form).vertices, ours(**turned, pose2rot=False).vertices
            )
            assert error < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_projected_joints(kind: str, files: Path) -> None:
    ours = getattr(body, kind)(files)
    inputs = inputs_of(kind, 3)
    move = numbers(3, 3) + torch.tensor([0, 0, 9.0])
    camera = body.Camera.perspective(move, 500.0, numbers(3, 2, seed=3))
    regressor = regressors()[0]
    points, joints = ours.project_joints(camera, **inputs, regressor=regressor)
    assert torch.equal(joints, ours.joints(**inputs, regressor=regressor))
    assert torch.equal(points, camera(joints))
    points, joints = ours.project_joints(camera, **inputs)
    assert torch.equal(joints, ours.joints(**inputs))
    assert torch.equal(points, camera(joints))
    mapped = getattr(body, kind)(files, joint_mapper=lambda joints, vertices=None: joints[:, 3:9])
    points, joints = mapped.project_joints(camera, **inputs)
    assert joints.shape == (3, 6, 3)
    assert torch.equal(points, camera(joints))


# --- without the mesh ---


def regressors(seed: int = 0) -> list[Tensor]:
    found = []
    for rows, per in ((17, 8), (24, V), (14, 3), (19, 16), (1, 1)):
        dense = torch.zeros(rows, V)
        for row in range(rows):
            chosen = torch.randperm(V, generator=torch.Generator().manual_seed(seed + row))[:per]
            dense[row, chosen] = torch.rand(per, generator=torch.Generator().manual_seed(row))
        found.append(dense / dense.sum(1, keepdim=True))
    return found


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
def test_joints_without_mesh(kind: str, dtype: torch.dtype, most: float, files: Path) -> None:
    ours = getattr(body, kind)(files, dtype=dtype)
    for matrices in (False, True):
        inputs = inputs_of(kind, 3, dtype, matrices)
        mesh = ours(**inputs, pose2rot=not matrices)
        lean = ours(**inputs, pose2rot=not matrices, vertices=False)
        assert lean.vertices is None
        assert max_error(lean.joints, mesh.joints) <= most
        assert max_error(ours.joints(**inputs, pose2rot=not matrices), mesh.joints) <= most
        for regressor in regressors():
            want = regressor.to(dtype) @ mesh.vertices
            for given_as in (regressor, regressor.to_sparse(), regressor.to_sparse_csr()):
                got = ours.joints(**inputs, regressor=given_as, pose2rot=not matrices)
                assert max_error(got, want) <= most
    assert ours(**inputs_of(kind, 2, dtype), return_verts=False).vertices is None


def test_folds_follow_changes(files: Path) -> None:
    ours = body.SMPL(files)
    regressor = regressors()[0].clone()

    def check() -> None:
        out = ours(**inputs_of("SMPL", 2, ours.v_template.dtype))
        inputs = inputs_of("SMPL", 2, ours.v_template.dtype)
        got = ours.joints(**inputs, regressor=regressor)
        torch.testing.assert_close(got, regressor.to(got) @ out.vertices, atol=1e-5, rtol=0)
        lean = ours(**inputs, vertices=False).joints
        torch.testing.assert_close(lean, out.joints, atol=1e-5, rtol=0)

    check()
    regressor.mul_(0.5)
    check()
    ours.v_template.add_(0.25)
    check()
    ours.load_state_dict({**ours.state_dict(), "shapedirs": ours.shapedirs * 2})
    check()
    ours.double()
    check()
    for _ in range(20):  # more regressors than are remembered
        regressor = regressor.clone()
        check()
    copied = pickle.loads(pickle.dumps(ours))
    assert "_cache" not in copied.__dict__
    ours = copy.deepcopy(copied)
    check()


def test_gradients_without_mesh(files: Path) -> None:
    ours = body.SMPL(files, dtype=torch.float64)
    regressor = regressors()[0].double()
    found = []
    for lean in (True, False):
        inputs = {k: v.requires_grad_() for k, v in inputs_of("SMPL", 2, torch.float64).items()}
        joints = (
            ours.joints(**inputs, regressor=regressor)
            if lean
            else regressor @ ours(**inputs).vertices
        )
        found.append(torch.autograd.grad(joints.square().sum(), [*inputs.values()]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


# --- what holds for any body ---


@settings(max_examples=15, deadline=None)
@given(salt=st.integers(0, 1000), seed=st.integers(0, 1000), joints=st.integers(1, 9))
def test_properties_of_bodies(salt: int, seed: int, joints: int) -> None:
    generator = np.random.default_rng(seed)
    parents = (-1, *(int(generator.integers(0, j)) for j in range(1, joints)))
    arrays = synthetic.model(parents, 40, 4, salt)
    model = body.LinearBody(arrays, dtype=torch.float64)
    betas = numbers(2, 4, seed=seed, dtype=torch.float64)
    # zero pose: template and shape, and the rest joints
    rest = model(betas)
    shaped = model.v_template + torch.einsum("vcs,bs->bvc", model.shapedirs, betas)
    assert max_error(rest.vertices, shaped) < 1e-12
    assert max_error(rest.joints, model.J_regressor @ shaped) < 1e-12
    assert max_error(model().vertices, model.v_template[None]) < 1e-12
    # a turn of the root about its joint, and a translation, are rigid
    pose = rotations(2, joints, seed=seed, dtype=torch.float64)
    turn, shift = rotations(2, seed=seed + 1, dtype=torch.float64), numbers(2, 3).double()
    turned = torch.cat([(turn @ pose[:, 0])[:, None], pose[:, 1:]], 1)
    posed = model(betas, pose, pose2rot=False)
    moved = model(betas, turned, shift, pose2rot=False)
    root = rest.joints[:, :1]
    for name in ("vertices", "joints"):
        want = (posed[name] - root) @ turn.mT + root + shift[:, None]
        assert max_error(moved[name], want) < 1e-12, name
    lean = model(betas, turned, shift, pose2rot=False, vertices=False)
    assert max_error(lean.joints, moved.joints) < 1e-12
    # no pose blend shapes is the same as zero ones
    bare = {k: v for k, v in arrays.items() if k != "posedirs"}
    zero = {**arrays, "posedirs": np.zeros_like(arrays["posedirs"])}
    got = [
        body.LinearBody(a, dtype=torch.float64)(betas, pose, pose2rot=False) for a in (bare, zero)
    ]
    assert max_error(got[0].vertices, got[1].vertices) < 1e-12


def test_body_from_arrays(files: Path, tmp_path: Path) -> None:
    """The same arrays by a mapping, a file and a converted file give the same SMPL."""
    held = arrays_of("SMPL")
    inputs = inputs_of("SMPL", 2)
    want = body.SMPL(files)(**inputs).vertices
    assert torch.equal(body.SMPL(held)(**inputs).vertices, want)
    tensors = {k: torch.from_numpy(v) for k, v in held.items() if k in ("v_template", "weights")}
    assert torch.equal(body.SMPL({**held, **tensors})(**inputs).vertices, want)
    body.export_safetensors(files / "SMPL_NEUTRAL.pkl", tmp_path / "SMPL_NEUTRAL.safetensors")
    assert torch.equal(body.SMPL(tmp_path)(**inputs).vertices, want)
    body.export_safetensors(files / "SMPLX_NEUTRAL.npz", tmp_path / "SMPLX_NEUTRAL.safetensors")
    other = inputs_of("SMPLX", 2)
    got = body.SMPLX(tmp_path)(**other)
    assert torch.equal(got.vertices, body.SMPLX(files)(**other).vertices)
    pose = torch.cat([inputs["global_orient"], inputs["body_pose"]], 1)
    got = body.LinearBody(held)(inputs["betas"], pose, inputs["transl"])
    assert torch.equal(got.vertices, want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"betas": np.zeros((1, 10))}, TypeError, "betas: expected a tensor"),
        (
            {"betas": torch.zeros(1, 9)},
            ValueError,
            r"betas: expected shape \(B, 10\), got \(1, 9\)",
        ),
        ({"betas": torch.zeros(1, 10).double()}, TypeError, "betas: expected torch.float32"),
        ({"betas": torch.zeros(1, 10).long()}, TypeError, "betas: expected torch.float32"),
        ({"body_pose": torch.zeros(1, 72)}, ValueError, r"body_pose: .*\(B, 69\)"),
        ({"body_pose": torch.zeros(1, 23, 3, 3)}, ValueError, "body_pose: expected axis angles"),
        ({"global_orient": torch.zeros(3)}, ValueError, "global_orient: expected"),
        ({"transl": torch.zeros(1, 4)}, ValueError, r"transl: expected shape \(B, 3\)"),
        (
            {"betas": torch.zeros(2, 10), "transl": torch.zeros(3, 3)},
            ValueError,
            "batch: .*betas 2",
        ),
        ({"pose2rot": False, "body_pose": torch.zeros(1, 69)}, ValueError, "rotation matrices"),
        ({"body_poze": torch.zeros(1, 69)}, TypeError, "body_poze"),
        ({"rotation": "quaternion"}, ValueError, "rotation: expected one of axis_angle, matrix"),
        (
            {"rotation": "rows", "body_pose": torch.zeros(1, 69)},
            ValueError,
            r"body_pose: expected 6D rows of shape \(B, 138\) or \(B, 23, 6\), got \(1, 69\)",
        ),
        ({"expression": torch.zeros(1, 10)}, TypeError, "expression"),
    ],
)
def test_bad_input(call: dict[str, Any], error: type[Exception], message: str, files: Path) -> None:
    ours = body.SMPL(files)
    with pytest.raises(error, match=message):
        ours(**call)


def test_bad_settings(files: Path) -> None:
    with pytest.raises(ValueError, match="expected the 52 joints of SMPL"):
        body.SMPLH(arrays_of("SMPL"))
    with pytest.raises(body.ModelFileError, match="'hands_componentsl' is missing"):
        body.SMPLH(synthetic.model(synthetic.SMPLH_PARENTS, V))
    made = synthetic.model(synthetic.SMPLX_PARENTS, V, 20)
    with pytest.raises(body.ModelFileError, match="lmk_faces_idx"):
        body.SMPLX(synthetic.with_hands(made))
    with pytest.raises(ValueError, match="vertex_ids: expected all of"):
        body.SMPL(files, vertex_ids={"nose": 1})
    with pytest.raises(ValueError, match="vertex_ids: expected vertices below"):
        body.SMPL(files, vertex_ids={**IDS, "nose": V})
    with pytest.raises(ValueError, match="num_pca_comps"):
        body.SMPLH(files, num_pca_comps=0)
    with pytest.raises(ValueError, match=r"betas: expected shape \(B, 10\)"):
        body.SMPL(files, betas=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="batch_size"):
        body.SMPL(files, batch_size=-1)
    with pytest.raises(ValueError, match="regressor: expected shape"):
        body.SMPL(files).joints(regressor=torch.zeros(3, 4))
    with pytest.raises(TypeError, match="jaw_pose"):
        body.SMPL(files).joints(jaw_pose=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="expression: SMPL has none"):
        body.SMPL(files).joints(expression=torch.zeros(1, 10))


def test_half_precision_is_raised(files: Path) -> None:
    ours = body.SMPL(files)
    out = ours(betas=numbers(2, 10).bfloat16())
    assert out.vertices.dtype == torch.float32


# --- modules of smplx ---


class Regressing(torch.nn.Module):
    """A model that holds a body, as research code does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.smpl = inner

    def forward(self, **kw: Any) -> Any:
        return self.smpl(**kw)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerated_modules_of_smplx(kind: str, layer: bool, files: Path) -> None:
    _, peer = pair(kind, files, layer=layer)
    model = Regressing(peer)
    fast = fasthyp.accelerate(model)
    assert isinstance(fast.smpl, type(peer))
    assert type(fast.smpl) is not type(peer)
    assert fast.smpl.v_template is peer.v_template
    inputs = inputs_of(kind, 3, matrices=layer)
    kw = {"pose2rot": False} if layer else {}
    calls = []
    assert_equal(fast(**inputs, **kw), model(**inputs, **kw))
    made = body.smplx_modules._with_own_lbs(type(peer))
    namespace = made.__globals__
    own = namespace["lbs"]
    assert own is fasthyp.body.lbs
    namespace["lbs"] = lambda *a, **k: calls.append(1) or own(*a, **k)
    fast(**inputs, **kw)
    namespace["lbs"] = own
    assert calls == [1]
    assert fasthyp.explain(fast).rows == [
        {
            "name": "smpl",
            "kind": type(peer).__name__,
            "accelerated": True,
            "reason": "skinning by fasthyp.body.lbs",
        }
    ]
    assert not fasthyp.explain(model).rows[0]["accelerated"]
    assert fasthyp.restore(fast) is model
    again = pickle.loads(pickle.dumps(fast))
    assert_equal(again(**inputs, **kw), model(**inputs, **kw))
    same = fasthyp.accelerate(peer, inplace=True)
    assert same is peer
    assert type(fasthyp.restore(same)) is getattr(smplx, type(peer).__name__)


class Derived(smplx.SMPL):
    """What research code makes of smplx's SMPL: more joints."""

    def forward(self, *args: Any, **kw: Any) -> Any:
        out = super().forward(*args, **kw)
        out.joints = torch.cat([out.joints, out.vertices[:, :3]], 1)
        return out


class Skinless(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_classes_derived_from_those_of_smplx(files: Path) -> None:
    peer = Derived(str(files / "SMPL_NEUTRAL.pkl"))
    fast = fasthyp.accelerate(peer)
    assert isinstance(fast, Derived)
    assert fasthyp.explain(fast).rows[0]["accelerated"]
    inputs = inputs_of("SMPL", 2)
    want = peer(**inputs)
    assert want.joints.shape[1] == 48
    for model in (fast, pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert_equal(model(**inputs), want)
    namespace = body.smplx_modules._with_own_lbs(smplx.SMPL).__globals__
    own, calls = namespace["lbs"], []
    namespace["lbs"] = lambda *a, **k: calls.append(1) or own(*a, **k)
    fast(**inputs)
    namespace["lbs"] = own
    assert calls == [1]
    assert fasthyp.restore(fast) is peer
    assert type(fasthyp.accelerate(Skinless())) is Skinless


def test_hands_of_smplx(tmp_path: Path) -> None:
    """MANO has no class here, but its skinning is the same."""
    parents = (-1, *(0 if k % 3 == 0 else k for k in range(15)))
    arrays = synthetic.model(parents, 60)
    arrays["hands_components"] = np.eye(45)
    arrays["hands_mean"] = np.linspace(-1, 1, 45)
    tips = {f"{side}{name}": 7 for side in "lr" for name in ("thumb", "index", "middle")}
    path = synthetic.write_pickle(tmp_path / "MANO_RIGHT.pkl", arrays)
    peer = smplx.MANO(str(path), vertex_ids={**IDS, **tips}, create_body_pose=False)
    fast = fasthyp.accelerate(peer)
    assert fasthyp.explain(fast).rows[0]["accelerated"]
    inputs = {"hand_pose": numbers(2, 6), "betas": numbers(2, 10), "global_orient": numbers(2, 3)}
    assert_equal(fast(**inputs), peer(**inputs))


def test_nothing_is_printed(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        getattr(body, kind)(files)
    assert capfd.readouterr().out == ""


def test_from_a_flow_to_joints_in_the_image(files: Path) -> None:
    """The chain of docs/body.md: samples of a flow, 24 rotations in 6D each, to 2D joints."""
    torch.manual_seed(0)
    flow = fasthyp.flows.ConditionalGlow(144, 16, 1, 1, context_features=8)
    sampler = fasthyp.HypothesisSampler(flow.eval())
    samples = sampler(numbers(2, 8), num_samples=20, seed=0)
    assert samples.shape == (2, 20, 144)
    ours, regressor = body.SMPL(files), regressors()[0]
    betas, weak = numbers(2, 10, seed=1), numbers(2, 3, seed=2).abs() + 0.5
    flat = samples.flatten(0, 1)
    many = {"betas": betas.repeat_interleave(20, 0)}
    camera = body.Camera.prohmr(weak.repeat_interleave(20, 0))
    points, joints = ours.project_joints(
        *(camera, many["betas"], flat[:, 6:], flat[:, :6]), regressor=regressor, rotation="columns"
    )
    folded = body.fold_joints(*ours._model(), regressor)
    again = body.project_joints(folded, many["betas"], flat, camera, rotation="columns")
    assert torch.equal(again[0], points)
    turns = fasthyp.geometry.rotation_6d_to_matrix(flat.view(-1, 24, 6), "columns")
    mesh = ours(**many, body_pose=turns[:, 1:], global_orient=turns[:, :1], pose2rot=False)
    want = regressor @ mesh.vertices
    assert max_error(joints, want) < 1e-5
    move = body.prohmr_camera(weak).repeat_interleave(20, 0)
    assert max_error(points, body.project(want, move, 5000 / 224)) < 1e-4
