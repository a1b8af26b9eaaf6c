"""Body models made of integer hashes, in the layouts of the published files, of any size."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

SMPL_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
_HANDS = [
    wrist if finger == 0 else 22 + hand * 15 + 3 * k + finger - 1
    for hand, wrist in enumerate((20, 21))
    for k in range(5)
    for finger in range(3)
]
SMPLH_PARENTS = (*SMPL_PARENTS[:22], *_HANDS)
SMPLX_PARENTS = (*SMPL_PARENTS[:22], 15, 15, 15, *(p + 3 if p > 21 else p for p in _HANDS))


def _numbers(shape: tuple[int, ...], low: int, high: int, salt: int, stream: int) -> np.ndarray:
    """Integers in [low, high]: splitmix64 of a counter, the same on every machine."""
    with np.errstate(over="ignore"):
        seed = np.uint64((salt * 1000003 + stream * 7919 + 12345) & 0xFFFFFFFF)
        z = np.arange(int(np.prod(shape)), dtype=np.uint64)
        z = z + seed * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    found = (z >> np.uint64(32)).astype(np.int64)
    return (low + found % (high - low + 1)).reshape(shape)


def model(
    parents: tuple[int, ...] = SMPL_PARENTS, vertices: int = 120, shapes: int = 10, salt: int = 0
) -> dict[str, Any]:
    """The arrays of a model under the names of SMPL's files; metres."""
    joints = len(parents)
    rest = np.zeros((joints, 3))
    step = _numbers((joints, 3), -200, 200, salt, 8) / 1024
    for joint in range(1, joints):
        rest[joint] = rest[parents[joint]] + step[joint]
    first = np.arange(vertices) * joints // vertices
    template = rest[first] + _numbers((vertices, 3), -64, 64, salt, 1) / 1024
    rows = np.arange(vertices)
    part = _numbers((vertices, 3), 0, 10, salt, 2)
    weights = np.zeros((vertices, joints))
    np.add.at(weights, (rows, first), 64 - part.sum(1))
    np.add.at(weights, (rows, np.maximum(parents, 0)[first]), part[:, 0])
    for k in (1, 2):
        np.add.at(weights, (rows, _numbers((vertices,), 0, joints - 1, salt, 4 + k)), part[:, k])
    regressor = np.zeros((joints, vertices))
    chosen = _numbers((joints, 4), 0, vertices - 1, salt, 9)
    np.add.at(regressor, (np.arange(joints)[:, None], chosen), 0.25)
    i = np.arange(vertices - 2)
    kintree = np.array([[2**32 - 1, *parents[1:]], np.arange(joints)], np.uint32)
    return {
        "v_template": template,
        "shapedirs": _numbers((vertices, 3, shapes), -15, 15, salt, 6) / 1024,
        "posedirs": _numbers((vertices, 3, 9 * (joints - 1)), -7, 7, salt, 7) / 2048,
        "J_regressor": regressor,
        "kintree_table": kintree,
        "weights": weights / 64,
        "f": np.stack([i, i + 1, i + 2], 1).astype(np.uint32),
        "J": regressor @ template,
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }


def with_hands(arrays: dict[str, Any], salt: int = 0) -> dict[str, Any]:
    """The same and what SMPL+H's files hold of the hands."""
    extra = {}
    for k, side in enumerate("lr"):
        extra[f"hands_components{side}"] = _numbers((45, 45), -60, 60, salt, 20 + k) / 512
        extra[f"hands_mean{side}"] = _numbers((45,), -90, 90, salt, 22 + k) / 512
    return {**arrays, **extra}


def with_face(arrays: dict[str, Any], salt: int = 0) -> dict[str, Any]:
    """The same and SMPL-X's landmarks, contour included."""
    faces = len(arrays["f"])
    extra = {}
    for k, (prefix, shape) in enumerate((("lmk", (51,)), ("dynamic_lmk", (79, 17)))):
        weights = _numbers((*shape, 3), 1, 64, salt, 32 + k).astype(np.float64)
        extra[f"{prefix}_faces_idx"] = _numbers(shape, 0, faces - 1, salt, 30 + k)
        extra[f"{prefix}_bary_coords"] = weights / weights.sum(-1, keepdims=True)
    return {**arrays, **extra}


def vertex_ids(vertices: int, salt: int = 0) -> dict[str, int]:
    """Vertices to append to the joints, on a mesh smaller than the published ones."""
    from fasthyp.body.vertex_joints import EXTRA_JOINTS

    chosen = _numbers((len(EXTRA_JOINTS),), 0, vertices - 1, salt, 40)
    return dict(zip(EXTRA_JOINTS, chosen.tolist(), strict=True))


def write_pickle(
    path: Path, arrays: dict[str, Any], protocol: int = 2, sparse: bool = True
) -> Path:
    """As the published files: the regressor as a SciPy matrix."""
    held = dict(arrays)
    if sparse:
        held["J_regressor"] = scipy.sparse.csc_matrix(held["J_regressor"])
    path.write_bytes(pickle.dumps(held, protocol=protocol))
    return path


def write_npz(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


class Python2Writer:
    """Writes what Python 2 wrote: byte strings for names and for the contents of arrays, module
    names of old NumPy and SciPy, and arrays inside objects of chumpy."""

    def __init__(self, protocol: int = 2) -> None:
        self.out = io.BytesIO()
        self.protocol = protocol
        self.out.write(b"\x80\x02" if protocol == 2 else b"")

    def string(self, value: bytes) -> None:
        if self.protocol == 0:
            self.out.write(b"S" + repr(value)[1:].encode() + b"\n")
        elif len(value) < 256:
            self.out.write(b"U" + bytes([len(value)]) + value)
        else:
            self.out.write(b"T" + len(value).to_bytes(4, "little") + value)

    def number(self, value: int) -> None:
        if self.protocol == 0:
            self.out.write(f"I{value}\n".encode())
        else:
            self.out.write(b"J" + value.to_bytes(4, "little", signed=True))

    def name(self, module: str, attribute: str) -> None:
        self.out.write(f"c{module}\n{attribute}\n".encode())

    def array(self, value: np.ndarray) -> None:
        value = np.asarray(value)
        write = self.out.write
        fortran = value.ndim > 1 and value.flags.f_contiguous
        self.name("numpy.core.multiarray", "_reconstruct")
        write(b"(")
        self.name("numpy", "ndarray")
        write(b"(")
        self.number(0)
        write(b"t")
        self.string(b"b")
        write(b"tR(")
        self.number(1)
        write(b"(")
        for n in value.shape:
            self.number(n)
        write(b"t")
        self.name("numpy", "dtype")
        write(b"(")
        self.string(value.dtype.str[1:].encode())
        self.number(0)
        self.number(1)
        write(b"tR(")
        self.number(3)
        self.string(b"<")
        write(b"NNN")
        for n in (-1, -1, 0):
            self.number(n)
        write(b"tb")
        self.number(int(fortran))
        self.string(value.tobytes(order="F" if fortran else "C"))
        write(b"tb")

    def instance(self, module: str, kind: str, state: dict[str, Any]) -> None:
        if self.protocol == 0:
            self.name("copy_reg", "_reconstructor")
            self.out.write(b"(")
            self.name(module, kind)
            self.name("__builtin__", "object")
            self.out.write(b"NtR")
        else:
            self.name(module, kind)
            self.out.write(b")\x81")
        self.dict(state)
        self.out.write(b"b")

    def value(self, value: Any) -> None:
        if isinstance(value, np.ndarray):
            self.array(value)
        elif isinstance(value, Chumpy):
            state = {**value.state, "_dirty_vars": set(), "_itr": None}
            self.instance(*value.name, state)
        elif isinstance(value, set):
            self.name("__builtin__", "set")
            self.out.write(b"((ltR")
        elif isinstance(value, dict):
            self.dict(value)
        elif isinstance(value, str):
            self.string(value.encode())
        elif isinstance(value, tuple):
            self.out.write(b"(")
            for item in value:
                self.value(item)
            self.out.write(b"t")
        elif isinstance(value, list):
            self.out.write(b"(")
            for item in value:
                self.value(item)
            self.out.write(b"l")
        elif value is None:
            self.out.write(b"N")
        elif isinstance(value, int):
            self.number(value)
        else:
            csc = scipy.sparse.csc_matrix(value)
            state = {
                "_shape": tuple(map(int, csc.shape)),
                "maxprint": 50,
                "data": csc.data,
                "indices": csc.indices,
                "indptr": csc.indptr,
            }
            self.instance("scipy.sparse.csc", "csc_matrix", state)

    def dict(self, value: dict[str, Any]) -> None:
        self.out.write(b"(d" if self.protocol == 0 else b"}")
        for key, item in value.items():
            self.string(key.encode())
            self.value(item)
            self.out.write(b"s")

    def done(self, value: Any) -> bytes:
        self.value(value)
        return self.out.getvalue() + b"."


class Chumpy:
    """An object of chumpy, to be written by :class:`Python2Writer`."""

    def __init__(self, module: str, kind: str, **state: Any) -> None:
        self.name, self.state = (module, kind), state


def python2_model(arrays: dict[str, Any], protocol: int = 2) -> bytes:
    """A model as the first SMPL and MANO files are: chumpy's arrays, one of them a selection."""
    shapes = arrays["shapedirs"]
    wide = np.concatenate([shapes, shapes[..., :2] + 1], 2)
    place = np.arange(wide.size).reshape(wide.shape)[..., : shapes.shape[2]]
    selected = Chumpy(
        "chumpy.reordering",
        "Select",
        a=Chumpy("chumpy.ch", "Ch", x=wide),
        idxs=place.ravel(),
        preferred_shape=shapes.shape,
    )
    held = {
        **arrays,
        "shapedirs": selected,
        "v_template": Chumpy("chumpy.ch", "Ch", x=arrays["v_template"]),
        "weights": np.asfortranarray(arrays["weights"]),
        "J_regressor": scipy.sparse.csc_matrix(arrays["J_regressor"]),
    }
    return Python2Writer(protocol).done(held)
