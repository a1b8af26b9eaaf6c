"""Named arrays of .npz, .npy, HDF5 and Zarr files, read on demand."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fasthyp._unpickling import read_nested_pickle

_NUMBERS = "biuf"
_DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def optional(name: str) -> Any:
    """A module of the extra ``data``.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"reading this file needs {name}: pip install 'fasthyp[data]' ({error})"
        ) from error


class Arrays:
    """Arrays by name, of which rows are read on demand. Safe in worker processes, started by
    ``fork`` or ``spawn``: every process opens the file for itself.

    Raises:
        ValueError: the file, or an array of it, is damaged or missing; names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._process = -1
        self._opened: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array of numbers."""
        return tuple(self._array(name).shape)

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Some of the rows of an array of numbers, in this order."""
        array = self._array(name)
        try:
            if not len(rows):
                return np.asarray(array[:0])
            low, high = int(rows.min()), int(rows.max())
            if high - low < 4 * len(rows):  # one stretch of the file
                return np.asarray(array[low : high + 1])[rows - low]
            return np.stack([np.asarray(array[int(row)]) for row in rows])
        except _DAMAGE as error:
            raise ValueError(f"{self.path}: array {name!r} cannot be read: {error}") from error

    def all(self, name: str) -> np.ndarray:
        """A whole array of numbers."""
        return (
            self.rows(name, np.arange(self.shape(name)[0]))
            if self.shape(name)
            else np.asarray(self._array(name)[()])
        )

    def texts(self, name: str) -> list[str]:
        """A whole array of texts."""
        raise NotImplementedError

    def check(self, name: str, *shape: int | str) -> int:
        """The number of rows of an array, whose shape must be ``("N", *shape)``; sizes that are
        texts stand for any.

        Raises:
            ValueError: it is missing or of another shape; names it.
        """
        got = self.shape(name)
        fits = len(got) == 1 + len(shape) and all(
            isinstance(want, str) or want == size
            for want, size in zip(shape, got[1:], strict=False)
        )
        if not fits:
            expected = ", ".join(map(str, ("N", *shape)))
            raise ValueError(f"{self.path}: {name}: expected shape ({expected}), got {got}")
        return got[0]

    def need(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(
                f"{self.path}: expected an array {name!r}, found only {sorted(self.names)[:20]}"
            )

    def _array(self, name: str) -> Any:
        """What stands for the array of numbers in this process: has a shape, and can be sliced."""
        self.need(name)
        return self._held(name, lambda: self._open(name))

    def _held(self, key: str, make: Callable[[], Any]) -> Any:
        if self._process != os.getpid():
            self._process, self._opened = os.getpid(), {}
        if key not in self._opened:
            try:
                self._opened[key] = make()
            except _DAMAGE as error:
                if str(error).startswith(self.path):
                    raise
                raise ValueError(f"{self.path}: {key or 'the file'}: {error}") from error
        return self._opened[key]

    def _open(self, name: str) -> Any:
        raise NotImplementedError

    def _numbers(self, name: str, dtype: np.dtype) -> None:
        if dtype.kind not in _NUMBERS or dtype.hasobject:
            raise ValueError(f"{self.path}: {name}: expected numbers, got {dtype}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_process": -1}


@dataclass(frozen=True)
class _Member:
    """Where an array of an .npz is: ``offset`` of its bytes in the file, None where compressed."""

    file: str
    header: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int | None


class NpzArrays(Arrays):
    """Members of an ``.npz``: those that are stored (``np.savez``) are mapped into memory, those
    that are compressed are read whole when first asked for, and kept. Never unpickled, but for
    :meth:`nested`, which runs nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        try:
            size = os.stat(self.path).st_size
            with zipfile.ZipFile(self.path) as archive, open(self.path, "rb") as raw:
                self._members = {
                    info.filename.removesuffix(".npy"): _member(archive, raw, info, size)
                    for info in archive.infolist()
                    if info.filename.endswith(".npy")
                }
        except FileNotFoundError:
            raise
        except _DAMAGE as error:
            raise ValueError(
                f"{self.path}: not a readable .npz file, perhaps cut off: {error}"
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def shape(self, name: str) -> tuple[int, ...]:
        self.need(name)
        return self._members[name].shape

    def texts(self, name: str) -> list[str]:
        self.need(name)
        member = self._members[name]
        if member.dtype.kind == "O":
            values = self.nested(name)
            values = values if isinstance(values, list) else [values]
        elif member.dtype.kind in "SU":
            values = self._held(name, lambda: self._read(member)).ravel().tolist()
            values = [v.decode("latin1") if isinstance(v, bytes) else v for v in values]
        else:
            values = [None]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.path}: {name}: expected texts, got {member.dtype}")
        return values

    def nested(self, name: str) -> Any:
        """The value of an array of objects (a pickle, read by
        :func:`fasthyp._unpickling.read_nested_pickle`); read again each time."""
        self.need(name)
        member = self._members[name]
        if not member.dtype.hasobject:
            raise ValueError(f"{self.path}: {name}: expected objects, got {member.dtype}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                data = archive.read(member.file)[member.header :]
        except _DAMAGE as error:
            raise ValueError(f"{self.path}: array {name!r} cannot be read: {error}") from error
        return read_nested_pickle(data, f"{self.path}: {name}")

    def _open(self, name: str) -> Any:
        member = self._members[name]
        self._numbers(name, member.dtype)
        return self._read(member)

    def _read(self, member: _Member) -> np.ndarray:
        order: Any = "F" if member.fortran else "C"
        if member.offset is not None and 0 not in member.shape:
            return np.memmap(
                self.path, member.dtype, "r", member.offset, member.shape or (1,), order
            ).reshape(member.shape)
        with zipfile.ZipFile(self.path) as archive:
            data = archive.read(member.file)[member.header :]
        return np.frombuffer(data, member.dtype).reshape(member.shape, order=order)


def _member(archive: zipfile.ZipFile, raw: Any, info: zipfile.ZipInfo, size: int) -> _Member:
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"{info.filename}: unknown version {version} of the .npy format")
        shape, fortran, dtype = read(stream)
        header = stream.tell()
    offset = None
    if not dtype.hasobject:
        wanted = dtype.itemsize
        for n in shape:
            wanted *= n
        if wanted != info.file_size - header:
            raise ValueError(
                f"{info.filename}: shape {shape} takes {wanted} bytes, but the file holds "
                f"{info.file_size - header}"
            )
        if info.compress_type == zipfile.ZIP_STORED:
            raw.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", raw.read(4))
            offset = info.header_offset + 30 + name + extra + header
            if offset + wanted > size:
                raise ValueError(f"{info.filename}: the file ends before its end")
    return _Member(info.filename, header, shape, dtype, fortran, offset)


class NpyArrays(Arrays):
    """The one array of an ``.npy``, mapped into memory, under a given name."""

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        super().__init__(path)
        self._name = name
        self._array(name)

    @property
    def names(self) -> tuple[str, ...]:
        return (self._name,)

    def _open(self, name: str) -> Any:
        array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        self._numbers(name, array.dtype)
        return array


class HDF5Arrays(Arrays):
    """Data sets of an HDF5 file, those of MATLAB 7.3 among them (their axes reversed)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        h5py = optional("h5py")
        self._names = tuple(
            name for name, item in self._file().items() if isinstance(item, h5py.Dataset)
        )

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def texts(self, name: str) -> list[str]:
        self.need(name)
        values = np.asarray(self._file()[name][()]).ravel().tolist()
        values = [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.path}: {name}: expected texts")
        return values

    def _file(self) -> Any:
        return self._held("", lambda: optional("h5py").File(self.path, "r"))

    def _open(self, name: str) -> Any:
        array = self._file()[name]
        self._numbers(name, array.dtype)
        return array


class ZarrArrays(Arrays):
    """Arrays of a Zarr group (a folder), format 2 or 3. One whose chunks are to be decoded by
    running a pickle is refused."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        optional("zarr")
        try:
            self._names = tuple(self._group().array_keys())
        except Exception as error:  # of many kinds, and different ones in each release
            raise ValueError(f"{self.path}: not a readable Zarr group: {error}") from error

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def texts(self, name: str) -> list[str]:
        self.need(name)
        array = self._item(name)
        if array.dtype.kind not in "UT":
            raise ValueError(f"{self.path}: {name}: expected texts, got {array.dtype}")
        return [str(value) for value in np.asarray(array[:]).ravel().tolist()]

    def _group(self) -> Any:
        return self._held("", lambda: optional("zarr").open_group(self.path, mode="r"))

    def _open(self, name: str) -> Any:
        array = self._item(name)
        self._numbers(name, array.dtype)
        return array

    def _item(self, name: str) -> Any:
        try:
            array = self._group()[name]
            described = str(array.metadata.to_dict()).lower()
        except Exception as error:  # of many kinds, and different ones in each release
            raise ValueError(f"{self.path}: {name}: not a readable array: {error}") from error
        if "pickle" in described:
            raise ValueError(f"{self.path}: {name}: refused, its chunks are pickles")
        return array


def open_arrays(path: str | os.PathLike[str], name: str = "heatmaps") -> Arrays:
    """The arrays of a file by its ending: ``.npz``, ``.npy`` (its one array called ``name``),
    ``.h5``, ``.hdf5``, ``.mat``, or a folder or ``.zarr``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: h5py or Zarr is needed and not installed.
        ValueError: another ending, or a damaged file.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    if file.is_dir() or file.suffix == ".zarr":
        return ZarrArrays(file)
    if file.suffix == ".npz":
        return NpzArrays(file)
    if file.suffix == ".npy":
        return NpyArrays(file, name)
    if file.suffix in (".h5", ".hdf5", ".mat"):
        return HDF5Arrays(file)
    raise ValueError(f"{file}: expected .npz, .npy, .h5, .hdf5, .mat or .zarr")


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """The value of a pickle file of a data set; nothing of it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or refused; says what it named.
    """
    return read_nested_pickle(Path(path).read_bytes(), str(path))


def entry(value: Any, source: str, *keys: str | int) -> Any:
    """What nested dicts and lists hold under these keys.

    Raises:
        ValueError: there is nothing; names the keys.
    """
    for depth, key in enumerate(keys):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            shown = "/".join(map(str, keys[: depth + 1]))
            found = (
                sorted(map(str, value))[:20] if isinstance(value, dict) else type(value).__name__
            )
            raise ValueError(f"{source}: expected {shown!r}, found {found}") from None
    return value


def array_of(value: Any, source: str, *shape: int | str) -> np.ndarray:
    """A value that must be an array of numbers of a shape; sizes that are texts stand for any.

    Raises:
        ValueError: it is not; names the source.
    """
    expected = f"expected an array ({', '.join(map(str, shape))})"
    if isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value):
        value = np.array(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in _NUMBERS:
        raise ValueError(f"{source}: {expected}, got {type(value).__name__}")
    if len(value.shape) != len(shape) or any(
        not isinstance(want, str) and want != size
        for want, size in zip(shape, value.shape, strict=True)
    ):
        raise ValueError(f"{source}: {expected}, got {value.shape}")
    return value


def matching(values: Sequence[str] | None, found: Sequence[str], what: str, source: str) -> list:
    """The found ones, or those of them that were asked for.

    Raises:
        ValueError: one that was asked for is not there; names it.
    """
    if values is None:
        return list(found)
    for value in values:
        if value not in found:
            raise ValueError(f"{source}: {what}: {value!r} is not among {list(found)[:20]}")
    return [value for value in found if value in values]
