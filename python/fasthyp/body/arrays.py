"""The arrays of one body model, named, checked and in the layout that the models compute with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fasthyp._unpickling import SparseMatrix
from fasthyp.body.errors import ModelFileError
from fasthyp.body.files import SUFFIXES, load_arrays, save_arrays

_MAX_VERTICES, _MAX_JOINTS, _MAX_SHAPES = 1 << 20, 1 << 10, 1 << 12
_ROOT = (-1, 2**32 - 1)


@dataclass
class BodyArrays:
    """A linear blend skinning model.

    Attributes:
        v_template: (V, 3) m, the rest vertices.
        shapedirs: (V, 3, S) m per unit of each shape coefficient.
        posedirs: (V, 3, 9 (J - 1)) m per element of the rotations of all joints but the root, less
            the identity; or (V, 3, 0) for none.
        J_regressor: (J, V), the rest joints from the rest vertices.
        parents: (J,) int64, each joint's parent, which comes before it; -1 for the root.
        weights: (V, J) skinning weights.
        faces: (F, 3) int64 vertices of each triangle.
        extras: what else the file holds, by its name there (hand components, landmarks).
        source: of the arrays, for messages.
    """

    v_template: np.ndarray
    shapedirs: np.ndarray
    posedirs: np.ndarray
    J_regressor: np.ndarray
    parents: np.ndarray
    weights: np.ndarray
    faces: np.ndarray
    extras: dict[str, Any] = field(default_factory=dict)
    source: str = "arrays"

    def extra(self, name: str, *shape: int | None) -> np.ndarray:
        """One of the extras, checked as :func:`checked` does."""
        if name not in self.extras:
            raise ModelFileError(f"{self.source}: the array {name!r} is missing")
        return checked(self.extras[name], name, shape, self.source)


def checked(value: Any, name: str, shape: tuple[int | None, ...], source: str) -> np.ndarray:
    """``value`` as an array of numbers of the given shape (None: any size), all finite.

    Raises:
        ModelFileError: it is none; with the name and what was expected.
    """
    if isinstance(value, SparseMatrix):
        given: tuple[int, ...] = value.shape
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        given = value.shape
    else:
        raise ModelFileError(
            f"{source}: {name}: expected an array of numbers, got {type(value).__name__}"
        )
    fits = len(given) == len(shape) and all(
        want is None or have == want for have, want in zip(given, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ModelFileError(f"{source}: {name}: expected shape ({wanted}), got {given}")
    array = value.dense() if isinstance(value, SparseMatrix) else value
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ModelFileError(f"{source}: {name}: holds values that are not finite")
    return array


def body_arrays(source: str | os.PathLike[str] | Mapping[str, Any], name: str = "") -> BodyArrays:
    """The arrays of a model file, or of a mapping with the same names, checked.

    The names are those of the SMPL files: ``v_template``, ``shapedirs``, ``posedirs`` (optional),
    ``J_regressor``, ``kintree_table`` or ``parents``, ``weights`` and ``f`` (optional).

    Args:
        source: a path, or a mapping of names to NumPy arrays, tensors or SciPy matrices.
        name: what to call the source in messages; by default the path.

    Raises:
        ModelFileError: an array is missing, or is not what it should be.
        FileNotFoundError, ValueError: as :func:`~fasthyp.body.files.load_arrays`.
        TypeError: neither a path nor a mapping.
    """
    if isinstance(source, str | os.PathLike):
        label = name or str(source)
        raw: dict[str, Any] = load_arrays(source)
    elif isinstance(source, Mapping):
        label = name or "arrays"
        raw = {str(key): _as_array(value) for key, value in source.items()}
    else:
        raise TypeError(f"model: expected a path or a mapping, got {type(source).__name__}")

    def take(key: str, *shape: int | None) -> np.ndarray:
        if key not in raw:
            raise ModelFileError(f"{label}: the array {key!r} is missing, or holds no numbers")
        return checked(raw.pop(key), key, shape, label)

    template = take("v_template", None, 3)
    vertices = len(template)
    if not 0 < vertices <= _MAX_VERTICES:
        raise ModelFileError(f"{label}: v_template: {vertices} vertices")
    if "parents" in raw:
        parents = take("parents", None)
        raw.pop("kintree_table", None)
    else:
        parents = take("kintree_table", 2, None)[0]
    parents = _tree(parents, label)
    joints = len(parents)
    shapedirs = take("shapedirs", vertices, 3, None)
    if shapedirs.shape[2] > _MAX_SHAPES:
        raise ModelFileError(f"{label}: shapedirs: {shapedirs.shape[2]} shape coefficients")
    if "posedirs" in raw:
        posedirs = take("posedirs", vertices, 3, None)
        if posedirs.shape[2] not in (0, 9 * (joints - 1)):
            raise ModelFileError(
                f"{label}: posedirs: expected shape ({vertices}, 3, {9 * (joints - 1)}) for "
                f"{joints} joints, got {posedirs.shape}"
            )
    else:
        posedirs = np.zeros((vertices, 3, 0))
    regressor = take("J_regressor", joints, vertices)
    weights = take("weights", vertices, joints)
    faces = take("f", None, 3) if "f" in raw else np.zeros((0, 3), np.int64)
    if faces.dtype.kind == "f":
        raise ModelFileError(f"{label}: f: expected whole numbers, got {faces.dtype}")
    faces = faces.astype(np.int64)
    if len(faces) and not (faces.min() >= 0 and faces.max() < vertices):
        raise ModelFileError(f"{label}: f: a face names a vertex outside 0 to {vertices - 1}")
    return BodyArrays(template, shapedirs, posedirs, regressor, parents, weights, faces, raw, label)


def export_safetensors(
    source: str | os.PathLike[str] | Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Write a model as a ``.safetensors`` file, which every model of this package loads: all its
    arrays unchanged, sparse ones as dense ones, the kinematic tree as ``parents``.

    Args:
        source: as :func:`body_arrays`.
        path: to write; appears whole or not at all.

    Raises:
        ModelFileError: the source is damaged, or refused.
        ValueError: ``path`` does not end in ``.safetensors``.
        OSError: the file cannot be written.
    """
    arrays = body_arrays(source)
    names = ("v_template", "shapedirs", "posedirs", "J_regressor", "parents", "weights")
    dense = {
        k: v.dense() if isinstance(v, SparseMatrix) and len(arrays.weights) in v.shape else v
        for k, v in arrays.extras.items()
    }
    numbers = {
        k: v for k, v in dense.items() if isinstance(v, np.ndarray) and v.dtype.kind in "biuf"
    }
    save_arrays(path, {**numbers, **{k: getattr(arrays, k) for k in names}, "f": arrays.faces})


def _as_array(value: Any) -> Any:
    """Tensors and SciPy's matrices as what files give."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if hasattr(value, "tocoo"):
        coo = value.tocoo()
        return SparseMatrix(
            np.asarray(coo.row, np.int64),
            np.asarray(coo.col, np.int64),
            np.asarray(coo.data, np.float64),
            (int(coo.shape[0]), int(coo.shape[1])),
        )
    return np.asarray(value) if isinstance(value, list | tuple | np.ndarray) else value


def _tree(parents: np.ndarray, label: str) -> np.ndarray:
    if not 0 < len(parents) <= _MAX_JOINTS:
        raise ModelFileError(f"{label}: kintree_table: {len(parents)} joints")
    values = [int(p) for p in parents]
    if values[0] not in _ROOT and values[0] != 0:
        raise ModelFileError(
            f"{label}: kintree_table: expected the root first, got a joint with parent {values[0]}"
        )
    values[0] = -1
    for joint, parent in enumerate(values[1:], 1):
        if not 0 <= parent < joint:
            raise ModelFileError(
                f"{label}: kintree_table: expected a parent of joint {joint} in 0 to "
                f"{joint - 1}, got {parent}"
            )
    return np.array(values, np.int64)


def find_model_file(path: str | os.PathLike[str], stem: str, preferred: str | None = None) -> Path:
    """The file itself, or in a folder the one called ``stem`` with the first ending that exists.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(path)
    if not place.is_dir():
        if not place.is_file():
            raise FileNotFoundError(f"{place}: no such file or folder")
        return place
    endings = [f".{preferred}"] if preferred else [s for s in SUFFIXES if s != ".npy"]
    for ending in endings:
        if (place / f"{stem}{ending}").is_file():
            return place / f"{stem}{ending}"
    raise FileNotFoundError(f"{place}: holds no {stem} file ({', '.join(endings)})")
