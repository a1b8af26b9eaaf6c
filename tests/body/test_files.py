"""Reading model files: what is read, what is refused, and that nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from safetensors.numpy import save_file

from fasthyp._unpickling import SparseMatrix, UnreadableFile, read_pickle
from fasthyp.body import (
    SMPL,
    ModelFileError,
    body_arrays,
    export_safetensors,
    load_arrays,
    save_arrays,
)
from fasthyp.body import arrays as arrays_module
from tests.body import synthetic_models as synthetic

MODEL = synthetic.model(vertices=60, shapes=3)
CHECKED = ("v_template", "shapedirs", "posedirs", "weights", "f")


def assert_same(found: Any, arrays: dict[str, Any] = MODEL) -> None:
    for name in CHECKED:
        got = found[name] if isinstance(found, dict) else getattr(found, _field(name))
        np.testing.assert_array_equal(got, arrays[name], err_msg=name)


def _field(name: str) -> str:
    return "faces" if name == "f" else name


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_all_protocols(tmp_path: Path, protocol: int, sparse: bool) -> None:
    path = synthetic.write_pickle(tmp_path / "SMPL.pkl", MODEL, protocol, sparse)
    assert_same(load_arrays(path))
    found = body_arrays(path)
    assert_same(found)
    np.testing.assert_array_equal(found.J_regressor, MODEL["J_regressor"])
    assert found.parents.tolist() == list(synthetic.SMPL_PARENTS)
    assert found.parents.dtype == np.int64


@pytest.mark.parametrize("protocol", [0, 2])
def test_python2_pickles_with_chumpy(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "SMPL.pkl"
    path.write_bytes(synthetic.python2_model(MODEL, protocol))
    found = body_arrays(path)
    assert_same(found)
    np.testing.assert_array_equal(found.J_regressor, MODEL["J_regressor"])


def test_python2_writer_writes_what_pickle_reads() -> None:
    """The writer of these tests against Python's own reader, where that one has the classes."""
    plain = {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3))}
    for protocol in (0, 2):
        raw = synthetic.Python2Writer(protocol).done(plain)
        found = pickle.loads(raw, encoding="latin1")
        for name, value in plain.items():
            np.testing.assert_array_equal(found[name], value)


def test_objects_where_numbers_belong(tmp_path: Path) -> None:
    path = tmp_path / "SMPL.pkl"
    path.write_bytes(pickle.dumps({**MODEL, "weights": np.array([[None]])}))
    with pytest.raises(ModelFileError, match="'weights' is missing, or holds no numbers"):
        body_arrays(path)


@pytest.mark.parametrize("kind", ["csc", "csr", "coo"])
def test_sparse_matrices(kind: str) -> None:
    dense = np.zeros((5, 7))
    dense[[0, 1, 4, 4], [6, 0, 2, 3]] = [1.5, -2.0, 3.0, 4.0]
    found = read_pickle(pickle.dumps(getattr(scipy.sparse, f"{kind}_matrix")(dense)), "m")
    assert isinstance(found, SparseMatrix)
    np.testing.assert_array_equal(found.dense(), dense)


def test_other_values_of_files() -> None:
    value = {
        "big": np.arange(4, dtype=">f8"),
        "half": np.ones(3, np.float16),
        "flag": np.array([True, False]),
        "scalar": np.float64(2.5),
        "names": ["a", "b"],
        "text": "umlaut: \N{LATIN SMALL LETTER U WITH DIAERESIS}",
        "none": None,
        "part2num": np.array({"head": 1}),
        "joint_names": np.array(["pelvis", "hip"]),
        "bytes": np.array([b"pelvis"]),
        "name": np.str_("pelvis"),
        "long": 2**60,
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found = read_pickle(pickle.dumps(value, protocol), "m")
        np.testing.assert_array_equal(found["big"], value["big"])  # type: ignore[arg-type]
        np.testing.assert_array_equal(found["flag"], value["flag"])  # type: ignore[arg-type]
        assert found["half"].dtype == np.float16
        assert found["scalar"] == 2.5
        for name in ("names", "text", "none", "long"):
            assert found[name] == value[name], name
        for name in ("part2num", "joint_names", "bytes", "name"):  # read over, not made
            assert type(found[name]).__name__ == "_Opaque", name


def test_npz_and_safetensors(tmp_path: Path) -> None:
    path = synthetic.write_npz(tmp_path / "SMPL.npz", {**MODEL, "names": np.array({"a": 1})})
    assert_same(body_arrays(path))
    assert "names" not in load_arrays(path)  # an array of objects, which only pickle could read
    copy = tmp_path / "copy.safetensors"
    export_safetensors(path, copy)
    found = body_arrays(copy)
    assert_same(found)
    assert found.parents.tolist() == list(synthetic.SMPL_PARENTS)
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(ValueError, match=r"\.safetensors"):
        export_safetensors(path, tmp_path / "copy.npz")
    with pytest.raises(ValueError, match="names: expected an array of numbers"):
        save_arrays(copy, {"names": np.array(["a"])})


# --- hostile pickles ---


class _Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _named(module: str, name: str, protocol: int = 0) -> bytes:
    """A call of that name with a command that would leave a file behind."""
    if protocol == 4:
        names = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
        return b"\x80\x04" + names + b"\x93\x8c\x11touch fasthyp_pwnd\x85R."
    return f"c{module}\n{name}\n(S'touch fasthyp_pwnd'\ntR.".encode()


def _array_state(state: bytes) -> bytes:
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    return head + state + b"b."


_F8 = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR"
_CSC = b"\x80\x02cscipy.sparse.csc\ncsc_matrix\n)\x81"

HOSTILE: dict[str, bytes] = {
    **{
        f"{module}.{name}{protocol or ''}": _named(module, name, protocol)
        for protocol in (0, 4)
        for module, name in (
            *(("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen")),
            *(("subprocess", "Popen"), ("subprocess", "call"), ("builtins", "eval")),
            *(("__builtin__", "eval"), ("builtins", "exec"), ("builtins", "getattr")),
            *(("builtins", "__import__"), ("__builtin__", "file"), ("builtins", "open")),
            *(("pty", "spawn"), ("shutil", "rmtree"), ("webbrowser", "open"), ("pdb", "run")),
            *(("numpy", "load"), ("numpy.testing._private.utils", "runstring")),
            *(("numpy.core.multiarray", "fromfile"), ("numpy", "memmap"), ("torch", "load")),
            *(("pickle", "loads"), ("marshal", "loads"), ("codecs", "open"), ("runpy", "run_path")),
            *(("scipy.sparse.csc", "os"), ("chumpy.ch", "depends_on"), ("chumpy", "Ch")),
            *(("numpy", "ndarray.tofile"), ("operator", "attrgetter"), ("types", "CodeType")),
        )
    },
    "nested reduce": pickle.dumps({"v_template": _Calls(list, (_Calls(os.system, "true"),))}),
    "reduce in state": pickle.dumps({"a": [1, {"b": _Calls(os.system, "true")}]}, 2),
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fcore.sys.system\x93.",
    "name of a module": b"\x80\x04\x8c\x02os\x8c\x00\x93.",
    "module with line": b"\x80\x04\x8c\x05numpy\x8c\x08ndarray\n\x93.",
    "call of a text": b"(S'os.system'\n(S'true'\ntR.",
    "call of an array": _array_state(b"")[:-2] + b"(tR.",
    "call of ndarray": b"cnumpy\nndarray\n((I9\ntS'f8'\ntR.",
    "call of object": b"c__builtin__\nobject\n(tR.",
    "call of Ch": b"cchumpy.ch\nCh\n(I1\ntR.",
    "arguments that are no tuple": b"c_codecs\nencode\n]R.",
    "old instance": b"(S'true'\nios\nsystem\n.",
    "old object": b"(cos\nsystem\nS'true'\no.",
    "old object of a known class": b"(cchumpy.ch\nCh\no.",
    "new object of os": b"\x80\x02cos\nsystem\n)\x81.",
    "new object with arguments": b"\x80\x02cchumpy.ch\nCh\nS'x'\n\x85\x81.",
    "new object with keywords": b"\x80\x04\x8c\x09chumpy.ch\x8c\x02Ch\x93)}\x92.",
    "new object of ndarray": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "extension 1": b"\x80\x02\x82\x01.",
    "extension 2": b"\x80\x02\x83\x01\x00.",
    "extension 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent id": b"Pos.system\n.",
    "binary persistent id": b"S'os.system'\nQ.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05C\x01a\x98.",
    "state of a dict": b"}}S'__class__'\nNsb.",
    "state of a list": b"]}b.",
    "state of a name": b"cchumpy.ch\nCh\n}S'x'\nNsb.",
    "state with slots": b"\x80\x02cchumpy.ch\nCh\n)\x81N}\x86b.",
    "memo of nothing": b"h\x07.",
    "memo beyond": b"j\xff\xff\xff\xff.",
    "memo at a huge place, read": b"Nr\xff\xff\xff\x7fj\xff\xff\xff\x7eR.",
    "memo of a mark": b"(q\x00h\x00h\x00R.",
    "memo swap": b"c__builtin__\nset\nq\x00S'x'\np0\n0h\x00(tR.",
    "negative memo": b"Np-1\n.",
    "call in an array of objects": _array_state(
        b"(I1\n(I1\nt" + _F8.replace(b"f8", b"O8") + b"I0\n(lcos\nsystem\n(S'true'\ntRat"
    ),
    "list as an array's bytes": _array_state(b"(I1\n(I1\nt" + _F8 + b"I0\n(lS'os'\nat"),
    "records in an array": b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR"
    b"(I3\nS'|'\nN(S'a'\nt}NI-1\nI-1\nI0\ntb.",
    "types from a text": b"cnumpy\ndtype\n(S'f8,O'\nI0\nI1\ntR.",
    "long integer": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\xff" * 64,
    "many digits": b"I" + b"9" * 100_000 + b"\n.",
    "many digits as a long": b"L" + b"9" * 100_000 + b"L\n.",
    # sizes
    "huge text": b"T\xff\xff\xff\x7f.",
    "huge text 8": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
    "huge bytes 8": b"\x80\x04\x8e" + struct.pack("<Q", 2**63 + 1) + b".",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"(",
    "negative text": b"T\xff\xff\xff\xff.",
    "huge array": _array_state(b"(I1\n(I1000000\nI1000000\nt" + _F8 + b"I0\nS'abc'\nt"),
    "array beyond 64 bits": _array_state(b"(I1\n(L99999999999999999999L\nt" + _F8 + b"I0\nS''\nt"),
    "negative array": _array_state(b"(I1\n(I-1\nt" + _F8 + b"I0\nS'abcdefgh'\nt"),
    "array of many axes": _array_state(
        b"(I1\n(" + b"I1\n" * 99 + b"t" + _F8 + b"I0\nS'abcdefgh'\nt"
    ),
    "many steps": b"(" + b"N" * 400_000 + b"l.",
    "many copies": b"\x80\x02X"
    + struct.pack("<I", 100_000)
    + b"a" * 100_000
    + b"q\x000"
    + b"c_codecs\nencode\nq\x01h\x00X\x06\x00\x00\x00latin1\x86R"
    + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 5_000
    + b".",
    "deep tuples": b")" + b"\x85" * 150_000 + b"b.",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b"R.",
    "deep lists as a shape": b"]" * 50_000
    + b"a" * 49_999
    + b"q\x000"
    + _array_state(b"(I1\nh\x00" + _F8 + b"I0\nS''\nt"),
    "endless tuples as a shape": b")q\x00"
    + b"0h\x00h\x00\x86q\x00" * 60
    + b"0"
    + _array_state(b"(I1\n(h\x00t" + _F8 + b"I0\nS''\nt"),
    "endless tuples as a key": b"}q\x01)q\x00" + b"0h\x00h\x00\x86q\x00" * 60 + b"Ns" + b"R.",
    "recursive list": b"]q\x00h\x00aR.",
    "truncated": pickle.dumps(MODEL, 2)[:-200],
    "empty": b"",
    "only a protocol": b"\x80\x02",
    "unknown protocol": b"\x80\x09N.",
    "no value": b".",
    "mark as a value": b"(.",
    "text": b"<html>404 not found</html>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "SMPL_NEUTRAL.pkl"
    path.write_bytes(HOSTILE[name])
    start = time.process_time()
    with pytest.raises(ModelFileError, match=r"SMPL_NEUTRAL\.pkl"):
        load_arrays(path)
    assert time.process_time() - start < 1.0
    assert os.listdir(tmp_path) == [path.name]


def test_refusal_says_what_was_named() -> None:
    with pytest.raises(UnreadableFile, match=r"model\.pkl: refused: the pickle names 'os\.system'"):
        read_pickle(HOSTILE["os.system"], "model.pkl")
    with pytest.raises(UnreadableFile, match="persistent id"):
        read_pickle(HOSTILE["persistent id"], "m")
    with pytest.raises(UnreadableFile, match="extension registry"):
        read_pickle(HOSTILE["extension 1"], "m")


def test_reader_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *rest: Any, **kw: Any) -> Any:
        raise AssertionError(f"import of {name}")

    monkeypatch.setattr("builtins.__import__", refuse)
    with pytest.raises(UnreadableFile):
        read_pickle(b"cantigravity\nfly\n.", "m")


@pytest.mark.parametrize(
    "state",
    [
        {"_shape": (4, 10**9), "data": np.ones(1), "indices": np.zeros(1, int), "indptr": None},
        {"_shape": (10**9, 10**9), "data": [], "indices": [], "indptr": []},
    ],
)
def test_sparse_matrices_that_lie(state: dict[str, Any]) -> None:
    state = {k: np.asarray(v) if isinstance(v, list) else v for k, v in state.items()}
    writer = synthetic.Python2Writer()
    writer.instance("scipy.sparse.csc", "csc_matrix", state)
    with pytest.raises(UnreadableFile):
        read_pickle(writer.out.getvalue() + b".", "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indptr": np.array([0, 2, 1, 2])}, "rising offsets"),
        ({"indptr": np.array([0, 1])}, "4 rising offsets"),
        ({"indptr": np.array([0, 1, 2, 9])}, "rising offsets"),
        ({"indices": np.array([0, 5])}, "outside its shape"),
        ({"indices": np.array([0, -1])}, "outside its shape"),
        ({"data": np.ones(1)}, "indices and values differ"),
        ({"data": None}, "data: expected an array"),
    ],
)
def test_damaged_sparse_matrices(change: dict[str, Any], message: str) -> None:
    state = {
        "_shape": (2, 3),
        "data": np.ones(2),
        "indices": np.array([0, 1]),
        "indptr": np.array([0, 1, 2, 2]),
        **change,
    }
    writer = synthetic.Python2Writer()
    writer.out.write(b"}")
    writer.string(b"J_regressor")
    writer.instance("scipy.sparse.csc", "csc_matrix", state)
    raw = writer.out.getvalue() + b"s."
    with pytest.raises(UnreadableFile, match=rf"J_regressor.*({message})"):
        read_pickle(raw, "m")


# --- wrong and damaged arrays ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_template": None}, "'v_template' is missing"),
        (
            {"v_template": np.zeros((60, 2))},
            r"v_template: expected shape \(any, 3\), got \(60, 2\)",
        ),
        ({"v_template": np.zeros((0, 3))}, "v_template: 0 vertices"),
        ({"v_template": np.full((60, 3), np.nan)}, "v_template: holds values that are not finite"),
        ({"shapedirs": np.zeros((59, 3, 3))}, r"shapedirs: expected shape \(60, 3, any\)"),
        ({"shapedirs": np.zeros((60, 3))}, "shapedirs: expected shape"),
        ({"posedirs": np.zeros((60, 3, 200))}, r"posedirs: expected shape \(60, 3, 207\)"),
        ({"J_regressor": np.zeros((23, 60))}, r"J_regressor: expected shape \(24, 60\)"),
        ({"J_regressor": scipy.sparse.csr_matrix((24, 10**9))}, "J_regressor: expected shape"),
        ({"weights": np.zeros((60, 25))}, r"weights: expected shape \(60, 24\)"),
        ({"kintree_table": np.zeros((3, 24))}, "kintree_table: expected shape"),
        ({"kintree_table": np.tile(np.arange(24), (2, 1))}, "kintree_table: expected a parent"),
        ({"kintree_table": np.full((2, 24), 30)}, "kintree_table: expected the root first"),
        ({"f": np.full((5, 3), 60)}, "f: a face names a vertex outside 0 to 59"),
        ({"f": np.full((5, 3), 1.5)}, "f: expected whole numbers"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    held = {k: v for k, v in {**MODEL, **change}.items() if v is not None}
    path = tmp_path / "SMPL.pkl"
    path.write_bytes(pickle.dumps(held))
    with pytest.raises(ModelFileError, match=message) as caught:
        body_arrays(path)
    assert str(path) in str(caught.value)


def test_array_shorter_than_its_shape_is_named(tmp_path: Path) -> None:
    raw = pickle.dumps({"v_template": np.zeros((8, 3)), "x": 1}, 4)
    place = raw.index(b"K\x08K\x03\x86")
    path = tmp_path / "SMPL.pkl"
    path.write_bytes(raw[:place] + b"K\x09" + raw[place + 2 :])
    with pytest.raises(ModelFileError, match=r"shape \(9, 3\) takes 216 bytes.*holds 192"):
        load_arrays(path)


def test_npz_that_lies_about_its_size(tmp_path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
    )
    path = tmp_path / "SMPL.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("v_template.npy", head.getvalue() + bytes(64))
    with pytest.raises(ModelFileError, match=r"v_template.*takes 8000000000000 bytes.*holds 64"):
        load_arrays(path)
    (tmp_path / "a.npy").write_bytes(head.getvalue())
    with pytest.raises(ModelFileError, match="holds 0"):
        load_arrays(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", ["9" * 4000 + ", " + "9" * 4000, "-1", ", ".join("1" * 20)])
def test_headers_without_a_shape(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({shape},)}}\n".encode()
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)
    (tmp_path / "a.npy").write_bytes(npy)
    entry = f'{{"a": {{"dtype": "F64", "shape": [{shape}], "data_offsets": [0, 8]}}}}'.encode()
    tensors = struct.pack("<Q", len(entry)) + entry + bytes(8)
    (tmp_path / "a.safetensors").write_bytes(tensors)
    for name in ("a.npy", "a.safetensors"):
        with pytest.raises(ModelFileError, match=rf"{name}.*(no shape of an array|damaged)"):
            load_arrays(tmp_path / name)


def test_npz_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "SMPL.npz"
    np.savez_compressed(path, a=np.zeros(1 << 18))
    monkeypatch.setattr("fasthyp.body.files.MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(ModelFileError, match="refused, it unpacks to"):
        load_arrays(path)


def test_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "SMPL.pkl"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(ModelFileError, match="refused"):
        load_arrays(path)


def test_object_arrays_of_npy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "R.npy"
    np.save(path, np.array([_Calls(os.system, "true")], object), allow_pickle=True)
    with pytest.raises(ModelFileError, match="refused, expected numbers"):
        load_arrays(path)


def test_file_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_arrays(tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="ends in"):
        load_arrays(tmp_path / "model.zip")
    with pytest.raises(FileNotFoundError, match="holds no SMPL_MALE file"):
        SMPL(tmp_path, gender="male")
    with pytest.raises(TypeError, match="expected a path or a mapping"):
        body_arrays(3)  # type: ignore[arg-type]


# --- fuzz ---


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """A few random changes: bits, bytes, pieces left out, doubled, or moved, and cut ends."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            break
        # half of the changes near the ends and in small pieces, where the structure is
        place = (
            rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 400))
        )
        kind = rng.randrange(7)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.randrange(256)
        elif kind == 2:
            del data[place : place + rng.choice((1, 2, 8, 300))]
        elif kind == 3:
            data[place:place] = rng.randbytes(rng.choice((1, 2, 8, 40)))
        elif kind == 4:
            del data[place:]
        elif kind == 5:
            other = rng.randrange(len(data))
            data[place:place] = data[other : other + rng.choice((2, 20, 200))]
        else:
            data[place : place + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4))
            )
    return bytes(data)


def corpus(tmp_path: Path) -> list[tuple[str, bytes]]:
    small = synthetic.model(parents=(-1, 0, 0), vertices=8, shapes=2)
    seeds = [("pkl", synthetic.python2_model(small, p)) for p in (0, 2)]
    for protocol in (0, 2, 4, 5):
        path = synthetic.write_pickle(tmp_path / "seed.pkl", small, protocol, protocol != 4)
        seeds.append(("pkl", path.read_bytes()))
    seeds.append(("npz", synthetic.write_npz(tmp_path / "seed.npz", small).read_bytes()))
    plain = {k: v for k, v in small.items() if isinstance(v, np.ndarray)}
    save_file(plain, tmp_path / "seed.safetensors")
    seeds.append(("safetensors", (tmp_path / "seed.safetensors").read_bytes()))
    return seeds


def _error_of(path: Path, case: str) -> str | None:
    try:
        body_arrays(path)
    except ModelFileError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{case}: {error!r}") from error
    return None


def test_mutated_files_give_clear_errors(tmp_path: Path) -> None:
    rounds = int(os.environ.get("FASTHYP_FUZZ", "2000"))
    seeds = corpus(tmp_path)
    for suffix, raw in seeds:
        (tmp_path / f"whole.{suffix}").write_bytes(raw)
        body_arrays(tmp_path / f"whole.{suffix}")
    refused = 0
    for number in range(rounds):
        rng = random.Random(number)
        suffix, raw = seeds[number % len(seeds)]
        path = tmp_path / f"case.{suffix}"
        path.write_bytes(mutated(raw, rng))
        start = time.process_time()
        message = _error_of(path, f"case {number} ({suffix})")
        refused += message is not None
        assert message is None or (str(path) in message and len(message) < 1000), f"case {number}"
        assert time.process_time() - start < 1.0, f"case {number}"
    assert refused > rounds / 2


def test_numpy_is_never_asked_for_more_than_the_file_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is made dense only after its shape was checked."""
    calls = []
    dense = SparseMatrix.dense
    monkeypatch.setattr(SparseMatrix, "dense", lambda self: calls.append(self) or dense(self))
    huge = SparseMatrix(*(np.zeros(0, np.int64),) * 2, np.zeros(0), (24, 10**9))
    with pytest.raises(ModelFileError, match="expected shape"):
        arrays_module.checked(huge, "J_regressor", (24, 60), "m")
    assert calls == []
