"""Regressors and mappings from files; joint sets."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from fasthyp import body
from fasthyp.body import joint_maps as maps
from fasthyp.skeleton import COCO13_JOINTS
from tests.body.test_files import HOSTILE


def regressor(rows: int = 17, columns: int = 6890) -> np.ndarray:
    rng = np.random.default_rng(0)
    out = np.zeros((rows, columns))
    for row in out:
        row[rng.integers(0, columns, 9)] = rng.random(9)
    return out / out.sum(1, keepdims=True)


def write(path: Path, form: str, value: np.ndarray) -> Path:
    if form == "npy":
        np.save(path.with_suffix(".npy"), value)
        return path.with_suffix(".npy")
    if form == "npz":
        np.savez(path.with_suffix(".npz"), R=value, names=np.arange(len(value)))
        return path.with_suffix(".npz")
    if form.startswith("scipy"):
        matrix = getattr(scipy.sparse, f"{form[6:]}_matrix")(value)
        scipy.sparse.save_npz(path.with_suffix(".npz"), matrix)
        return path.with_suffix(".npz")
    held: Any = {
        "pkl": value,
        "pkl sparse": scipy.sparse.csr_matrix(value),
        "pkl dict": {"cocoplus_regressor": scipy.sparse.csc_matrix(value), "other": np.ones(3)},
    }[form]
    path.with_suffix(".pkl").write_bytes(pickle.dumps(held, 2))
    return path.with_suffix(".pkl")


@pytest.mark.parametrize(
    "form", ["npy", "npz", "scipy csr", "scipy csc", "pkl", "pkl sparse", "pkl dict"]
)
def test_regressors_of_all_files(form: str, tmp_path: Path) -> None:
    value = regressor()
    path = write(tmp_path / "J_regressor_h36m", form, value)
    found = body.load_regressor(path, joints=17)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), value.astype(np.float32))


def test_wrong_regressors_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "R", "npy", regressor())
    with pytest.raises(body.ModelFileError, match=r"expected shape \(14, 6890\), got \(17, 6890\)"):
        body.load_regressor(path, joints=14)
    with pytest.raises(body.ModelFileError, match=r"found 0 among: array \(17, 6890\)"):
        body.load_regressor(path, vertices=10475)
    both = tmp_path / "both.npz"
    np.savez(both, a=regressor(), b=regressor(14))
    with pytest.raises(body.ModelFileError, match="found 2 among"):
        body.load_regressor(both)
    assert body.load_regressor(both, name="b").shape == (14, 6890)
    with pytest.raises(body.ModelFileError, match="'c' is missing"):
        body.load_regressor(both, name="c")
    np.save(path, np.full((2, 6890), np.inf))
    with pytest.raises(body.ModelFileError, match="not finite"):
        body.load_regressor(path)
    with pytest.raises(FileNotFoundError):
        body.load_regressor(tmp_path / "none.npy")
    broken = tmp_path / "sparse.npz"
    np.savez(
        broken,
        data=np.ones(2),
        indices=np.array([0, 10**6]),
        indptr=np.array([0, 1, 2]),
        shape=np.array([2, 6890]),
    )
    with pytest.raises(body.ModelFileError, match="no sparse matrix"):
        body.load_regressor(broken)


@pytest.mark.parametrize("name", ["os.system", "nested reduce", "huge array", "truncated", "empty"])
def test_hostile_regressors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "R.pkl").write_bytes(HOSTILE[name])
    for load in (body.load_regressor, body.load_smplx_to_smpl):
        with pytest.raises(body.ModelFileError, match=r"R\.pkl"):
            load(tmp_path / "R.pkl")
    assert os.listdir(tmp_path) == ["R.pkl"]


@pytest.fixture(scope="module")
def mapping() -> scipy.sparse.csr_matrix:
    rng = np.random.default_rng(1)
    rows = np.repeat(np.arange(6890), 3)
    columns = rng.integers(0, 10475, len(rows))
    values = rng.random(len(rows)) + 0.1
    matrix = scipy.sparse.csr_matrix((values, (rows, columns)), (6890, 10475))
    return scipy.sparse.csr_matrix(matrix / matrix.sum(1))


@pytest.mark.parametrize("form", ["matrix", "transposed", "mtx"])
def test_smplx_to_smpl(form: str, mapping: scipy.sparse.csr_matrix, tmp_path: Path) -> None:
    wide = scipy.sparse.hstack([mapping, 5 * mapping])
    held = {
        "matrix": {"matrix": mapping.tocsc()},
        "transposed": mapping.T.tocoo(),
        "mtx": {"mtx": scipy.sparse.csc_matrix(wide)},
    }[form]
    path = tmp_path / "smplx_to_smpl.pkl"
    path.write_bytes(pickle.dumps(held))
    found = body.load_smplx_to_smpl(path)
    assert found.values.numel() == mapping.nnz
    points = torch.randn(2, 10475, 3)
    want = torch.stack([torch.from_numpy(mapping @ p.double().numpy()) for p in points])
    got = found(points)
    assert got.shape == (2, 6890, 3)
    assert float((got - want).abs().max()) < 1e-5
    # joints of SMPL straight from SMPL-X's mesh
    rows = torch.from_numpy(regressor())
    through = found.double().regressor(rows)
    np.testing.assert_allclose(through.numpy(), rows.numpy() @ mapping.toarray(), atol=1e-7)
    points = torch.randn(1, 10475, 3).double().requires_grad_()
    grad = torch.autograd.grad(found(points).sum(), points)[0]
    np.testing.assert_allclose(grad[0, :, 0], np.asarray(mapping.sum(0))[0], atol=1e-6)


def test_bad_mapping_input(mapping: scipy.sparse.csr_matrix, tmp_path: Path) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"matrix": mapping[:100]}))
    with pytest.raises(body.ModelFileError, match="found 0"):
        body.load_smplx_to_smpl(path)
    path.write_bytes(pickle.dumps({"matrix": mapping}))
    found = body.load_smplx_to_smpl(path)
    with pytest.raises(ValueError, match=r"vertices: expected shape \(\.\.\., 10475, 3\)"):
        found(torch.zeros(1, 6890, 3))
    with pytest.raises(TypeError, match="vertices: expected a tensor"):
        found(np.zeros((1, 10475, 3)))
    with pytest.raises(ValueError, match="regressor: expected shape"):
        found.regressor(torch.zeros(3, 10475))


@pytest.mark.parametrize(
    ("names", "index", "target"),
    [
        (maps.SMPL45_JOINTS, maps.SMPL45_TO_COCO17, maps.COCO17_JOINTS),
        (maps.SMPL45_JOINTS, maps.SMPL45_TO_COCO13, COCO13_JOINTS),
        (maps.J19_JOINTS, maps.J19_TO_COCO13, COCO13_JOINTS),
        (maps.J19_JOINTS, maps.J19_TO_COCO17, maps.COCO17_JOINTS),
        (maps.J24_JOINTS, maps.J24_TO_COCO17, maps.COCO17_JOINTS),
    ],
)
def test_joint_maps(names: Any, index: Any, target: Any) -> None:
    assert tuple(names[k] for k in index) == tuple(target)


def test_published_index_maps() -> None:
    """The lists of SPIN's constants, under which checkpoints and evaluations were made."""
    assert maps.J24_TO_COCO17 == (19, 20, 21, 22, 23, 9, 8, 10, 7, 11, 6, 3, 2, 4, 1, 5, 0)
    assert (*range(13), 18, 19, 20, 21, 22, 23) == maps.J24_TO_J19
    assert [maps.J24_JOINTS[k] for k in maps.J24_TO_J14[:13]] == list(maps.LSP14_JOINTS[:13])
    assert maps.H36M17_TO_LSP14 == (3, 2, 1, 4, 5, 6, 16, 15, 14, 11, 12, 13, 8, 10)
    swapped = [*range(1), 4, 5, 6, 1, 2, 3, *range(7, 17)]
    assert tuple(swapped[k] for k in maps.H36M17_TO_LSP14) == maps.H36M_REGRESSOR_TO_LSP14
    for names in (maps.SMPL24_JOINTS, maps.SMPL45_JOINTS, maps.H36M17_JOINTS, maps.J24_JOINTS):
        assert len(set(names)) == len(names) == {24: 24, 45: 45, 17: 17}[len(names)]


def test_smpl_joint_names_are_those_of_smplx() -> None:
    from smplx.joint_names import JOINT_NAMES

    assert tuple(JOINT_NAMES[:22]) == maps.SMPL24_JOINTS[:22]
    first = JOINT_NAMES.index("nose")
    assert tuple(JOINT_NAMES[first : first + 21]) == maps.SMPL45_JOINTS[24:]


def test_vertices_of_appended_joints_are_those_of_smplx() -> None:
    from smplx.vertex_ids import vertex_ids

    from fasthyp.body.vertex_joints import EXTRA_JOINTS, VERTEX_IDS

    for name in ("smplh", "smplx"):
        assert VERTEX_IDS[name] == {key: vertex_ids[name][key] for key in EXTRA_JOINTS}
