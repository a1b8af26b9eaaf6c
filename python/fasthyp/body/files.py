"""The arrays of model files: ``.pkl``, ``.npz``, ``.npy`` and ``.safetensors``.

Whatever a file says of itself is checked against its size before memory is taken for it, nothing
in it is executed, and errors name the file and the array.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from fasthyp._files import replacing
from fasthyp._unpickling import SparseMatrix, UnreadableFile, read_pickle
from fasthyp.body.errors import ModelFileError

MAX_FILE_BYTES = 1 << 30
"""No model file comes near a gigabyte; larger ones are refused unread."""

SUFFIXES = (".pkl", ".npz", ".npy", ".safetensors")

_SAFETENSORS_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"},
    **{"I8": "<i1", "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "|b1"},
}


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a model file that is an array.

    Args:
        path: a ``.pkl`` (read without being run, see :mod:`fasthyp._unpickling`), ``.npz``,
            ``.npy`` or ``.safetensors`` file.

    Returns:
        Name to NumPy array or :class:`~fasthyp._unpickling.SparseMatrix`; the array of an
        ``.npy`` file and of a pickle that is one array has the empty name.

    Raises:
        ModelFileError: the file is damaged, or refused.
        FileNotFoundError: there is no such file.
        ValueError: another ending.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelFileError(f"{file}: refused, {size} bytes are more than any model has")
    name = str(file)
    if file.suffix == ".npz":
        return dict(_read_npz(file))
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        return _read_safetensors(data, name)
    if file.suffix == ".npy":
        return {"": _read_npy(data, name)}
    try:
        value = read_pickle(data, name)
    except UnreadableFile as error:
        raise ModelFileError(str(error)) from None
    if not isinstance(value, dict):
        value = {"": value}
    return {k: v for k, v in value.items() if isinstance(v, np.ndarray | SparseMatrix)}


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write NumPy arrays as a ``.safetensors`` file; it appears whole or not at all.

    Raises:
        ValueError: another ending, or an array of a type that the format lacks.
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save_file

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file name that ends in .safetensors")
    plain = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    for name, value in plain.items():
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{name}: expected an array of numbers, got {value.dtype}")
    with replacing(path) as temporary:
        save_file(plain, temporary)


def _read_npz(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > MAX_FILE_BYTES or len(members) > 1000:
                raise ModelFileError(
                    f"{file}: refused, it unpacks to {total} bytes in {len(members)} arrays"
                )
            for member in members:
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    value = _read_member(stream, member.file_size, f"{file}: {name}")
                if value is not None:
                    yield name, value
    except ModelFileError:
        raise
    except Exception as error:  # whatever damaged bytes lead zipfile and zlib to
        raise ModelFileError(
            f"{file}: damaged or truncated .npz file ({type(error).__name__}: {error})"
        ) from None


def _read_member(stream: IO[bytes], size: int, name: str) -> np.ndarray | None:
    dtype, fortran, shape, start = _npy_header(stream, name)
    if dtype.hasobject or dtype.kind not in "biuf":
        return None  # joint names and the like: nothing here needs them, and objects are not read
    _check_bytes(dtype, shape, size - start, name)
    # One byte more than announced would be a lie about the size; it is never unpacked.
    return _shaped(stream.read(size - start), dtype, fortran, shape, name)


def _read_npy(data: bytes, name: str) -> np.ndarray:
    import io

    stream = io.BytesIO(data)
    dtype, fortran, shape, start = _npy_header(stream, name)
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ModelFileError(f"{name}: refused, expected numbers, got elements of type {dtype}")
    _check_bytes(dtype, shape, len(data) - start, name)
    return _shaped(data[start:], dtype, fortran, shape, name)


def _npy_header(stream: IO[bytes], name: str) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """Type, order and shape of an ``.npy`` stream, and where its elements start.

    NumPy's own reader takes the memory that the header asks for before it looks at the file.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(stream, max_header_size=10_000)
    except Exception as error:
        raise ModelFileError(
            f"{name}: damaged array header ({type(error).__name__}: {str(error)[:120]})"
        ) from None
    if not _sane(shape):
        raise ModelFileError(f"{name}: damaged array header, no shape of an array")
    return dtype, fortran, shape, stream.tell()


def _sane(shape: tuple[int, ...]) -> bool:
    return len(shape) <= 8 and all(0 <= n < 1 << 48 for n in shape)


def _check_bytes(dtype: np.dtype, shape: tuple[int, ...], held: int, name: str) -> None:
    wanted = dtype.itemsize
    for n in shape:
        wanted *= n
    if wanted != held:
        raise ModelFileError(
            f"{name}: an array of shape {shape} takes {wanted} bytes, but the file holds {held}"
        )


def _shaped(
    raw: bytes, dtype: np.dtype, fortran: bool, shape: tuple[int, ...], name: str
) -> np.ndarray:
    _check_bytes(dtype, shape, len(raw), name)
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


def _read_safetensors(data: bytes, name: str) -> dict[str, np.ndarray]:
    # The format is a length, a JSON header and the bytes; read here so that the messages name the
    # array (https://github.com/huggingface/safetensors, "Format").
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(len(data) - 8, 1 << 20):
            raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
        header = json.loads(data[8 : 8 + length].decode())
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        body = data[8 + length :]
    except Exception as error:
        raise ModelFileError(f"{name}: damaged .safetensors file ({str(error)[:120]})") from None
    arrays = {}
    for key, entry in entries.items():
        what = f"{name}: {key}"
        try:
            dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
            shape = tuple(int(n) for n in entry["shape"])
            start, end = (int(n) for n in entry["data_offsets"])
            if not 0 <= start <= end <= len(body) or not _sane(shape):
                raise ValueError(f"no place among {len(body)} bytes, or no shape of an array")
        except Exception as error:
            raise ModelFileError(
                f"{what}: damaged entry ({type(error).__name__}: {str(error)[:120]})"
            ) from None
        arrays[key] = _shaped(body[start:end], dtype, False, shape, what)
    return arrays
