"""The instructions of the pickle format, as an interpreter that can call nothing.

What it takes from a file is said in :mod:`fasthyp._unpickling`. The format is that of Python's
``pickletools`` documentation, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_LONGEST = 900
_MAX_STEPS = 100_000  # a model file takes a few hundred, and this many under a second
MAX_RANK = 8
_OTHER_DTYPE = re.compile(r"[<>=|]?(O|O4|O8|[SUa]\d{1,6})")
_ESCAPES = re.compile(rb"""\\(?:[\\'"nrt]|x[0-9a-fA-F]{2})""")  # those of Python 2's repr
_PLAIN_DTYPE = re.compile(r"([<>=|]?)([biuf])([1248])")

# Module names differ between releases of NumPy, SciPy and Python; the function is the same.
_RECONSTRUCT = "numpy _reconstruct"
_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): "numpy scalar",
    ("numpy._core.multiarray", "scalar"): "numpy scalar",
    ("numpy.core.numeric", "_frombuffer"): "numpy _frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "numpy _frombuffer",
    ("numpy", "ndarray"): "ndarray",
    ("numpy.matrixlib.defmatrix", "matrix"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("copy_reg", "_reconstructor"): "_reconstructor",
    ("copyreg", "_reconstructor"): "_reconstructor",
    ("__builtin__", "object"): "object",
    ("builtins", "object"): "object",
    ("__builtin__", "set"): "set",
    ("builtins", "set"): "set",
    ("chumpy.ch", "Ch"): "Ch",
    ("chumpy.reordering", "Select"): "Select",
    **{
        (f"scipy.sparse.{module}", f"{kind}_matrix"): f"{kind}_matrix"
        for kind in ("csc", "csr", "coo")
        for module in (kind, f"_{kind}")
    },
}
_INSTANCES = ("Ch", "Select", "csc_matrix", "csr_matrix", "coo_matrix")


class UnreadableFile(ValueError):
    """A file that cannot be read; says the file, the array and what is wrong."""

    def __init__(self, message: str) -> None:
        # what a file names, and so puts into a message, may be as long as the file
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")


@dataclass(frozen=True)
class _Name:
    """What a known name stands for; never the thing itself."""

    kind: str


@dataclass
class Array:
    """An array under construction: its state comes after it."""

    value: np.ndarray | List | _Opaque | None = None


@dataclass
class _Dtype:
    """The type of an array's elements; no code for texts and objects, of which no array is made,
    but where asked for a list."""

    code: str | None
    value: np.dtype | None = None
    other: str = ""


@dataclass
class List:
    """What an array of objects or texts holds."""

    items: list[Any]
    shape: tuple[int, ...]


class _Opaque:
    """A value that nobody can use as an array: it was read, and is not looked into."""


@dataclass
class Instance:
    """An object of chumpy or SciPy: its class's name and the attributes that it was saved with."""

    kind: str
    state: dict[Any, Any] = field(default_factory=dict)


_MARK = object()


class Machine:
    """The instructions of the pickle format, on values that cannot do anything."""

    def __init__(self, data: bytes, steps: int = _MAX_STEPS, objects: bool = False) -> None:
        self.data = data
        self.steps = steps
        self.objects = objects
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Bytes that may still be copied, so that a short loop over one long string cannot fill
        # the memory. A real file copies each of its bytes at most once.
        self.budget = 2 * len(data) + 4096

    def run(self) -> Any:
        for _ in range(self.steps):
            code = self.take(1)
            if code == b".":
                return self.pop()
            action = _ACTIONS.get(code)
            if action is None:
                what = _REFUSED.get(code, f"the unknown instruction {code!r}")
                raise UnreadableFile(
                    f"refused: the pickle holds {what} (byte {self.position - 1}), "
                    "which no file of arrays needs"
                )
            action(self)
        raise UnreadableFile(f"refused: a pickle of more than {self.steps} instructions")

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise UnreadableFile(
                f"damaged or truncated pickle: {count} more bytes expected at byte "
                f"{self.position} of {len(self.data)}"
            )
        out = self.data[self.position : end]
        self.position = end
        return out

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.position + (1 << 28))
        if end < 0:
            raise UnreadableFile(
                f"damaged or truncated pickle: a line without end at byte {self.position}"
            )
        out = self.data[self.position : end]
        self.position = end + 1
        return out

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise UnreadableFile(f"damaged pickle: a value is missing at byte {self.position}")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise UnreadableFile(f"damaged pickle: a mark is missing at byte {self.position}")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise UnreadableFile(
                f"damaged pickle: expected a {kind.__name__} at byte {self.position}"
            )
        return self.stack[-1]

    def fetch(self, index: int) -> None:
        if index not in self.memo:
            raise UnreadableFile(f"damaged pickle: nothing was kept under {index}")
        self.stack.append(self.memo[index])

    def keep(self, index: int) -> None:
        if not self.stack or index < 0:
            raise UnreadableFile(f"damaged pickle: nothing to keep at byte {self.position}")
        self.memo[index] = self.stack[-1]

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise UnreadableFile("refused: a pickle that unfolds to more than it holds")

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise UnreadableFile("damaged pickle: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str | bytes | int):  # others are never asked for, and may be costly
                target[key] = value

    def name(self, module: Any, attribute: Any) -> None:
        pair = (as_text(module), as_text(attribute))
        if pair not in _KNOWN:
            shown = f"{pair[0][:80]}.{pair[1][:80]}"
            raise UnreadableFile(
                f"refused: the pickle names {shown!r}; of what a pickle can name, only arrays of "
                "NumPy, sparse matrices of SciPy and arrays of chumpy are read, and nothing is run"
            )
        self.push(_Name(_KNOWN[pair]))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise UnreadableFile("refused: the pickle calls something that is no known function")
        action = _CALLS.get(function.kind)
        if action is None:
            raise UnreadableFile(f"refused: the pickle calls {function.kind!r}")
        self.push(action(self, *arguments))

    def make(self) -> None:
        arguments, kind = self.pop(), self.pop()
        if not isinstance(kind, _Name) or kind.kind not in _INSTANCES or arguments != ():
            raise UnreadableFile("refused: the pickle makes an object of an unexpected class")
        self.push(Instance(kind.kind))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1] if self.stack else None
        if isinstance(target, Array):
            _, shape, dtype, fortran, raw = state
            target.value = _array(raw, dtype, shape, "F" if fortran else "C", self.objects)
        elif isinstance(target, _Dtype):
            order = as_text(state[1]) if isinstance(state, tuple) and len(state) > 4 else ""
            if order not in ("<", ">", "|", "=") or any(state[i] is not None for i in (2, 3, 4)):
                raise UnreadableFile("refused: an array whose elements are records")
            if order == ">" and target.other[:1] == "U":
                raise UnreadableFile("refused: an array of texts with the other byte order")
            if target.code is not None:
                target.value = np.dtype(target.code).newbyteorder(order)  # type: ignore[arg-type]
        elif isinstance(target, Instance) and isinstance(state, dict):
            target.state = state
        else:
            raise UnreadableFile("refused: the pickle sets the state of an unexpected object")


def _array(
    raw: Any, dtype: Any, shape: Any, order: Any, objects: bool = False
) -> np.ndarray | List | _Opaque:
    if not isinstance(dtype, _Dtype):
        raise UnreadableFile("damaged pickle: an array without a type of elements")
    if dtype.code is None:
        return _list_of(raw, dtype, shape) if objects else _Opaque()
    kind = dtype.value if dtype.value is not None else np.dtype(dtype.code)
    if not isinstance(raw, bytes | bytearray):
        raise UnreadableFile("damaged pickle: an array of numbers without their bytes")
    if not isinstance(shape, tuple) or len(shape) > MAX_RANK:
        raise UnreadableFile("damaged pickle: an array without a shape")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise UnreadableFile("damaged pickle: an array whose shape is not made of sizes")
    wanted = kind.itemsize
    for n in shape:  # Python's integers do not overflow
        wanted *= n
    if wanted != len(raw):
        raise UnreadableFile(
            f"an array of shape {shape} takes {wanted} bytes, but the file holds {len(raw)}"
        )
    flat = np.frombuffer(raw, kind)
    return flat.reshape(shape, order="F" if as_text(order) == "F" else "C")


def _list_of(raw: Any, dtype: _Dtype, shape: Any) -> List:
    """The elements of an array of objects or texts, in the order of the file."""
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise UnreadableFile("damaged pickle: an array without a shape")
    if len(shape) > 1:
        raise UnreadableFile(f"an array of objects or texts of shape {shape}: expected one axis")
    count = shape[0] if shape else 1
    if isinstance(raw, list):
        items = raw
    else:
        kind, width = dtype.other[:1], 0 if dtype.other[1:] == "" else int(dtype.other[1:])
        size = width * (4 if kind == "U" else 1)
        if kind not in "SaU" or not isinstance(raw, bytes | bytearray):
            raise UnreadableFile("damaged pickle: an array of objects without its elements")
        if size * count != len(raw):
            raise UnreadableFile(f"an array of {count} texts: the file holds {len(raw)} bytes")
        coding = "utf-32-le" if kind == "U" else "latin1"
        items = [raw[k : k + size].decode(coding).rstrip("\0") for k in range(0, len(raw), size)]
    if len(items) != count:
        raise UnreadableFile(f"an array of {count} objects: the file holds {len(items)}")
    return List(items, shape)


def _make_dtype(machine: Machine, code: Any, *rest: Any) -> _Dtype:
    if _OTHER_DTYPE.fullmatch(as_text(code)):  # names of joints, for example
        return _Dtype(None, other=as_text(code).lstrip("<>=|"))
    match = _PLAIN_DTYPE.fullmatch(as_text(code))
    if match is None or (match[2] == "f" and match[3] == "1"):
        raise UnreadableFile(
            f"refused: an array with elements of type {shortened(as_text(code))!r}"
        )
    return _Dtype(as_text(code))


def _make_scalar(machine: Machine, dtype: Any, raw: Any) -> Any:
    value = _array(raw, dtype, (), "C", machine.objects)
    if isinstance(value, List):
        return value.items[0]
    return value if isinstance(value, _Opaque) else value.item()


def _encode(machine: Machine, text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes in the old protocols.
    if not isinstance(text, str) or as_text(encoding) not in ("latin1", "latin-1"):
        raise UnreadableFile("refused: a text encoded other than as latin1")
    machine.spend(len(text))
    return text.encode("latin1")


def _reconstructor(machine: Machine, kind: Any, base: Any, state: Any) -> Instance:
    # How Python 2 writes objects in the old protocols.
    if not isinstance(kind, _Name) or kind.kind not in _INSTANCES or base != _Name("object"):
        raise UnreadableFile("refused: the pickle makes an object of an unexpected class")
    return Instance(kind.kind)


def _reconstruct(machine: Machine, kind: Any, *rest: Any) -> Array:
    if kind != _Name("ndarray"):
        raise UnreadableFile("refused: an array of an unexpected class")
    return Array()


def _make_set(machine: Machine, *items: Any) -> _Opaque:
    return _Opaque()  # chumpy's list of changed variables, which nobody asks for


def _frombuffer(machine: Machine, raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return Array(_array(raw, dtype, shape, order, machine.objects))


_CALLS: dict[str, Callable[..., Any]] = {
    "numpy _reconstruct": _reconstruct,
    "numpy _frombuffer": _frombuffer,
    "numpy scalar": _make_scalar,
    "dtype": _make_dtype,
    "encode": _encode,
    "_reconstructor": _reconstructor,
    "set": _make_set,
}


def as_text(value: Any) -> str:
    """Python 2 wrote its names as bytes."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, str):
        return value
    raise UnreadableFile(f"damaged pickle: expected a text, got {type(value).__name__}")


def shortened(value: object) -> str:
    # str() of a value from the file could be long or deep; of an error or a tuple of ints it is not
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _integer_line(machine: Machine) -> Any:
    line = machine.line()
    if line in (b"00", b"01"):  # how protocol 0 writes False and True
        return line == b"01"
    if len(line) > 32:
        raise UnreadableFile("damaged pickle: an integer of more than 32 digits")
    return int(line.rstrip(b"L"))


def _long(machine: Machine, count: int) -> int:
    if not 0 <= count <= 16:
        raise UnreadableFile(f"refused: an integer of {count} bytes")
    return int.from_bytes(machine.take(count), "little", signed=True)


def _quoted(line: bytes) -> bytes:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise UnreadableFile("damaged pickle: a text without quotes")
    if b"\\" in _ESCAPES.sub(b"", line):
        raise UnreadableFile("damaged pickle: a text with unknown escapes")
    return codecs.escape_decode(line[1:-1])[0]


def _sized(layout: str, convert: Callable[[bytes], Any]) -> Callable[[Machine], None]:
    return lambda m: m.push(convert(m.take(m.number(layout))))


def _unicode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _tuple(count: int) -> Callable[[Machine], None]:
    def action(machine: Machine) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(items)))

    return action


def _append(machine: Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _appends(machine: Machine) -> None:
    values = machine.pop_mark()
    machine.top(list).extend(values)


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _set_items(machine: Machine) -> None:
    machine.set_items(machine.pop_mark())


def _dict(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.push({})
    machine.set_items(items)


def _global(machine: Machine) -> None:
    module = machine.line()
    machine.name(module, machine.line())


def _stack_global(machine: Machine) -> None:
    attribute, module = machine.pop(), machine.pop()
    machine.name(module, attribute)


def _proto(machine: Machine) -> None:
    protocol = machine.number("<B")
    if protocol > 5:
        raise UnreadableFile(f"damaged pickle: protocol {protocol} is unknown")


def _discard(machine: Machine) -> None:
    if not machine.stack:
        raise UnreadableFile("damaged pickle: nothing to discard")
    machine.stack.pop()


_ACTIONS: dict[bytes, Callable[[Machine], Any]] = {
    b"\x80": _proto,
    b"\x95": lambda m: m.take(8),  # a frame's length, which a reader of the whole file needs not
    b"(": lambda m: m.push(_MARK),
    b"0": _discard,
    b"1": lambda m: m.pop_mark(),
    b"2": lambda m: m.push(m.top(object)),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer_line(m)),
    b"L": lambda m: m.push(_integer_line(m)),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(_long(m, m.number("<B"))),
    b"\x8b": lambda m: m.push(_long(m, m.number("<i"))),
    b"F": lambda m: m.push(float(m.line()[:64])),
    b"G": lambda m: m.push(m.number(">d")),
    b"S": lambda m: m.push(_quoted(m.line())),
    b"T": _sized("<i", bytes),
    b"U": _sized("<B", bytes),
    b"C": _sized("<B", bytes),
    b"B": _sized("<I", bytes),
    b"\x8e": _sized("<Q", bytes),
    b"\x96": _sized("<Q", bytes),
    b"V": lambda m: m.push(m.line().decode("raw-unicode-escape")),
    b"X": _sized("<I", _unicode),
    b"\x8c": _sized("<B", _unicode),
    b"\x8d": _sized("<Q", _unicode),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_mark()),
    b"a": _append,
    b"e": _appends,
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"}": lambda m: m.push({}),
    b"d": _dict,
    b"s": _set_item,
    b"u": _set_items,
    b"p": lambda m: m.keep(int(m.line()[:20])),
    b"q": lambda m: m.keep(m.number("<B")),
    b"r": lambda m: m.keep(m.number("<I")),
    b"\x94": lambda m: m.keep(len(m.memo)),
    b"g": lambda m: m.fetch(int(m.line()[:20])),
    b"h": lambda m: m.fetch(m.number("<B")),
    b"j": lambda m: m.fetch(m.number("<I")),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": Machine.call,
    b"\x81": Machine.make,
    b"b": Machine.build,
}

_REFUSED = {
    b"i": "an old-style instance (INST)",
    b"o": "an old-style instance (OBJ)",
    b"P": "a persistent id",
    b"Q": "a persistent id",
    b"\x82": "a name from the extension registry",
    b"\x83": "a name from the extension registry",
    b"\x84": "a name from the extension registry",
    b"\x92": "an object made with keywords (NEWOBJ_EX)",
    b"\x97": "an out-of-band buffer",
    b"\x98": "a read-only buffer",
    b"\x8f": "a set",
    b"\x90": "a set",
    b"\x91": "a frozen set",
}
