"""Linear maps of vertices: joints from a mesh, and the mesh of SMPL from that of SMPL-X."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasthyp._unpickling import SparseMatrix
from fasthyp.body.arrays import checked
from fasthyp.body.errors import ModelFileError
from fasthyp.body.files import load_arrays

SMPL_VERTICES, SMPLX_VERTICES = 6890, 10475

_MAX_JOINTS = 1024


def load_regressor(
    path: str | os.PathLike[str],
    vertices: int = SMPL_VERTICES,
    joints: int | None = None,
    name: str | None = None,
) -> Tensor:
    """A joint regressor such as ``J_regressor_h36m.npy``.

    Args:
        path: an ``.npy``, ``.npz``, ``.pkl`` or ``.safetensors`` file; a pickle is read without
            being run, and may hold a SciPy matrix, as may an ``.npz`` of SciPy's ``save_npz``.
        vertices: V, of the mesh.
        joints: K, where it is known.
        name: which array of a file with several; by default the only one of a fitting shape.

    Returns:
        (K, V) float32, to be passed to ``body.joints(..., regressor=)``.

    Raises:
        ModelFileError: the file is damaged or refused, or holds no such array.
        FileNotFoundError: there is no such file.
    """
    label = str(path)
    value = _chosen(load_arrays(path), name, label, lambda s: len(s) == 2 and s[1] == vertices)
    rows = value.shape[0]
    if not 0 < rows <= _MAX_JOINTS:
        raise ModelFileError(f"{label}: expected up to {_MAX_JOINTS} joints, got {rows}")
    array = checked(value, name or "regressor", (joints, vertices), label)
    return torch.tensor(np.asarray(array, np.float32))


class VertexMapping(nn.Module):
    """A sparse linear map from the vertices of one mesh to those of another.

    Args:
        matrix: (V_out, V_in), of which only the elements other than zero are kept.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, matrix: SparseMatrix) -> None:
        super().__init__()
        self.shape = matrix.shape
        order = np.lexsort((matrix.columns, matrix.rows))
        for name, value in (
            ("rows", matrix.rows[order]),
            ("columns", matrix.columns[order]),
            ("values", matrix.values[order].astype(np.float32)),
        ):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, vertices: Tensor) -> Tensor:
        """Map vertices.

        Args:
            vertices: (..., V_in, 3) m.

        Returns:
            (..., V_out, 3) m.

        Raises:
            TypeError, ValueError: another type or shape.
        """
        if not isinstance(vertices, Tensor):
            raise TypeError(f"vertices: expected a tensor, got {type(vertices).__name__}")
        if vertices.shape[-2:] != (self.shape[1], 3):
            raise ValueError(
                f"vertices: expected shape (..., {self.shape[1]}, 3), got {tuple(vertices.shape)}"
            )
        parts = vertices[..., self.columns, :] * self.values.to(vertices.dtype)[:, None]
        out = vertices.new_zeros(*vertices.shape[:-2], self.shape[0], 3)
        return out.index_add(-2, self.rows, parts)

    def regressor(self, regressor: Tensor) -> Tensor:
        """A regressor (K, V_out) of the second mesh as one (K, V_in) of the first, so that SMPL's
        joints of an SMPL-X body need neither mesh."""
        if regressor.dim() != 2 or regressor.shape[1] != self.shape[0]:
            raise ValueError(
                f"regressor: expected shape (K, {self.shape[0]}), got {tuple(regressor.shape)}"
            )
        out = regressor.new_zeros(regressor.shape[0], self.shape[1])
        return out.index_add(
            1, self.columns, regressor[:, self.rows] * self.values.to(regressor.dtype)
        )


def load_smplx_to_smpl(path: str | os.PathLike[str], name: str | None = None) -> VertexMapping:
    """The map from SMPL-X's 10475 vertices to SMPL's 6890, with which HUMR and others evaluate.

    Args:
        path: of the published ``smplx_to_smpl.pkl`` (``matrix``), of
            ``smplx2smpl_deftrafo_setup.pkl`` (``mtx``, whose second half, for normals, is left
            out), or any file that :func:`load_regressor` reads, in either orientation.
        name: which array of a file with several.

    Raises:
        ModelFileError: the file is damaged or refused, or holds no such matrix.
        FileNotFoundError: there is no such file.
    """
    label = str(path)
    out, into = SMPL_VERTICES, SMPLX_VERTICES
    shapes = ((out, into), (into, out), (out, 2 * into))
    value = _chosen(load_arrays(path), name, label, lambda shape: shape in shapes)
    if not isinstance(value, SparseMatrix):
        dense = checked(value, name or "matrix", (None, None), label)
        rows, columns = dense.nonzero()
        values = dense[rows, columns].astype(np.float64)
        value = SparseMatrix(rows, columns, values, (dense.shape[0], dense.shape[1]))
    if value.shape == (into, out):
        value = SparseMatrix(value.columns, value.rows, value.values, (out, into))
    kept = value.columns < into
    if not np.isfinite(value.values).all():
        raise ModelFileError(f"{label}: holds values that are not finite")
    return VertexMapping(
        SparseMatrix(value.rows[kept], value.columns[kept], value.values[kept], (out, into))
    )


def _chosen(found: dict[str, Any], name: str | None, label: str, fits: Any) -> Any:
    """The array of that name, or the only one that fits."""
    found = _with_scipy(found, label)
    if name is not None:
        if name not in found:
            raise ModelFileError(f"{label}: the array {name!r} is missing; has {sorted(found)}")
        return found[name]
    fitting = [key for key, value in found.items() if fits(tuple(value.shape))]
    if len(fitting) != 1:
        shapes = ", ".join(f"{key or 'array'} {tuple(v.shape)}" for key, v in found.items())
        raise ModelFileError(
            f"{label}: expected one array of the wanted shape, found {len(fitting)} "
            f"among: {shapes[:200] or 'no arrays'}"
        )
    return found[fitting[0]]


def _with_scipy(found: dict[str, Any], label: str) -> dict[str, Any]:
    """The arrays of ``scipy.sparse.save_npz`` as the matrix that they are."""
    names = {"data", "indices", "indptr", "shape"}
    if not names <= set(found):
        return found
    shape = checked(found["shape"], "shape", (2,), label)
    rows, columns = int(shape[0]), int(shape[1])
    starts = checked(found["indptr"], "indptr", (None,), label).astype(np.int64)
    inner = checked(found["indices"], "indices", (None,), label).astype(np.int64)
    data = checked(found["data"], "data", inner.shape, label).astype(np.float64)
    counts = np.diff(starts)
    by_row = len(starts) == rows + 1 and (not len(inner) or inner.max() < columns)
    outer = rows if by_row else columns
    limit = columns if by_row else rows
    sound = (
        rows != columns  # by rows or by columns is told from the sizes
        and len(starts) == outer + 1
        and (counts >= 0).all()
        and starts[0] == 0
        and starts[-1] == len(inner)
        and (not len(inner) or (inner.min() >= 0 and inner.max() < limit))
    )
    if not sound:
        raise ModelFileError(
            f"{label}: indptr, indices: no sparse matrix of shape {(rows, columns)}"
        )
    full = np.repeat(np.arange(outer), counts)
    i, j = (full, inner) if by_row else (inner, full)
    return {"": SparseMatrix(i, j, data, (rows, columns))}
