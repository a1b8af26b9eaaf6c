"""Reading the arrays of a pickle without running it.

Body models come as pickles: most from Python 2, some with arrays wrapped by chumpy, joint
regressors as SciPy matrices. So do data sets: nested dicts of arrays, alone or as an array of
objects in an ``.npz``. A pickle is a program that may call any function of any module. This
reader interprets that program and can call nothing (:mod:`fasthyp._pickle_machine`): the dozen
functions and classes that such files name are stood in for by code that builds NumPy arrays and
plain values. What a file names beyond those is an error that says the name; so are the instructions
that model files do not use, and every size is checked against the bytes that the file really holds
before memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fasthyp._pickle_machine import (
    MAX_RANK,
    Array,
    Instance,
    List,
    Machine,
    UnreadableFile,
    as_text,
    shortened,
)

__all__ = ["SparseMatrix", "UnreadableFile", "read_nested_pickle", "read_pickle"]

_MAX_DEPTH = 32


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix as its non-zero entries, duplicates adding up.

    Attributes:
        rows, columns: (N,) int64.
        values: (N,) float64.
        shape: (rows, columns).
    """

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def dense(self) -> np.ndarray:
        """(rows, columns) float64; the caller has checked the shape."""
        out = np.zeros(self.shape)
        np.add.at(out, (self.rows, self.columns), self.values)
        return out


def read_pickle(data: bytes, name: str) -> Any:
    """The value of a pickle: dicts with str keys, lists, tuples, numbers, ``str`` or ``bytes``,
    NumPy arrays and :class:`SparseMatrix`.

    Nothing of the file is executed and no module is imported. Values that a file holds but nobody
    can use as an array (old pickled sets, for example) come back as opaque objects.

    Args:
        data: the whole file.
        name: of the file, for messages.

    Raises:
        UnreadableFile: the pickle is damaged, or holds anything but arrays and plain values.
    """
    machine = Machine(data)
    try:
        value = machine.run()
    except UnreadableFile as error:
        raise UnreadableFile(f"{name}: {error}") from None
    except Exception as error:  # whatever damaged bytes lead to
        raise UnreadableFile(
            f"{name}: damaged pickle, near byte {machine.position} of {len(data)} "
            f"({type(error).__name__}: {shortened(error)})"
        ) from None
    return _result(value, name)


def read_nested_pickle(data: bytes, name: str) -> Any:
    """The value of a pickle of a data set: dicts, lists and tuples inside each other, numbers,
    ``str`` (for Python 2's texts as well), ``bytes``, None and NumPy arrays. Arrays of texts and of
    objects come as lists of their elements, those without axes as their one element.

    Args and errors are those of :func:`read_pickle`; nothing is executed either.
    """
    machine = Machine(data, steps=len(data), objects=True)
    try:
        return _Plain()(machine.run())
    except UnreadableFile as error:
        raise UnreadableFile(f"{name}: {error}") from None
    except Exception as error:  # whatever damaged bytes lead to
        raise UnreadableFile(
            f"{name}: damaged pickle, near byte {machine.position} of {len(data)} "
            f"({type(error).__name__}: {shortened(error)})"
        ) from None


class _Plain:
    """Replaces what stands for arrays, each object once, however often it is named."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Any, Any]] = {}
        self.open: set[int] = set()

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, bytes):
            return as_text(value)
        if not isinstance(value, dict | list | tuple | Array | List | Instance):
            return value
        if depth > _MAX_DEPTH:
            raise UnreadableFile("values inside each other, deeper than any data set has them")
        if id(value) not in self.made:
            if id(value) in self.open:
                raise UnreadableFile("a value that holds itself")
            self.open.add(id(value))
            self.made[id(value)] = value, self._plain(value, depth + 1)  # the object stays alive
        return self.made[id(value)][1]

    def _plain(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return {
                as_text(key) if isinstance(key, bytes) else key: self(item, depth)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self(item, depth) for item in value]
        if isinstance(value, tuple):
            return tuple(self(item, depth) for item in value)
        if isinstance(value, List):
            items = [self(item, depth) for item in value.items]
            return items[0] if value.shape == () else items
        if isinstance(value, Array) and isinstance(value.value, List):
            return self(value.value, depth)
        return _numeric(value)


def _result(value: Any, name: str) -> Any:
    """The outermost one or two levels as plain values; deeper ones stay what they are."""
    if isinstance(value, dict):
        return {
            as_text(key): _finished(item, f"{name}: {as_text(key)}")
            for key, item in value.items()
            if isinstance(key, str | bytes)
        }
    return _finished(value, name)


def _finished(value: Any, name: str) -> Any:
    try:
        return _numeric(value)
    except UnreadableFile as error:
        raise UnreadableFile(f"{name}: {error}") from None
    except Exception as error:
        raise UnreadableFile(
            f"{name}: cannot be read as an array ({type(error).__name__}: {shortened(error)})"
        ) from None


def _numeric(value: Any, depth: int = 0) -> Any:
    """An array for what stands for one; everything else as it is."""
    if depth > MAX_RANK:
        raise UnreadableFile("objects of chumpy inside each other, deeper than any model has")
    if isinstance(value, Array):
        if value.value is None:
            raise UnreadableFile("the array's contents are missing")
        return value.value
    if not isinstance(value, Instance):
        return value
    state = {
        as_text(key): item for key, item in value.state.items() if isinstance(key, str | bytes)
    }
    if value.kind == "Ch":
        return _numeric(state["x"], depth + 1)
    if value.kind == "Select":
        picked = _array_in(state, "a", depth).ravel()[_array_in(state, "idxs", depth, np.int64)]
        shape = state.get("preferred_shape")
        if shape is None:
            return picked
        if isinstance(shape, Array):
            shape = _array_in(state, "preferred_shape", depth).tolist()
        return picked.reshape(tuple(int(n) for n in shape))
    return _sparse(value.kind, state)


def _array_in(state: dict[str, Any], name: str, depth: int = 0, dtype: Any = None) -> np.ndarray:
    """An attribute that must be an array: NumPy is never asked to make one of nested lists, which
    a few bytes can make endless."""
    value = _numeric(state.get(name), depth + 1)
    if not isinstance(value, np.ndarray):
        raise UnreadableFile(f"{name}: expected an array, got {type(value).__name__}")
    return value if dtype is None else value.astype(dtype)


def _sparse(kind: str, state: dict[str, Any]) -> SparseMatrix:
    shape = state.get("_shape", state.get("shape"))
    rows, columns = (int(n) for n in shape)  # type: ignore[union-attr]
    if rows < 0 or columns < 0:
        raise UnreadableFile(f"expected a matrix, got shape {(rows, columns)}")
    data = _array_in(state, "data", 0, np.float64)
    if kind == "coo_matrix":
        if "coords" in state:
            state["row"], state["col"] = state["coords"]
        i, j = (_array_in(state, part, 0, np.int64) for part in ("row", "col"))
    else:
        inner, starts = (_array_in(state, part, 0, np.int64) for part in ("indices", "indptr"))
        outer = rows if kind == "csr_matrix" else columns
        if starts.shape != (outer + 1,) or starts[0] != 0 or starts[-1] > len(inner):
            raise UnreadableFile(f"indptr: expected {outer + 1} rising offsets into the indices")
        counts = np.diff(starts)
        if (counts < 0).any():
            raise UnreadableFile("indptr: expected rising offsets into the indices")
        full = np.repeat(np.arange(outer), counts)
        inner, data = inner[: starts[-1]], data[: starts[-1]]
        i, j = (full, inner) if kind == "csr_matrix" else (inner, full)
    if not i.shape == j.shape == data.shape or i.ndim != 1:
        raise UnreadableFile("a sparse matrix whose indices and values differ in number")
    if len(i) and (i.min() < 0 or j.min() < 0 or i.max() >= rows or j.max() >= columns):
        raise UnreadableFile(f"a sparse matrix with entries outside its shape {(rows, columns)}")
    return SparseMatrix(i, j, data, (rows, columns))
