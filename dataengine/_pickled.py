"""NumPy files of objects, which are pickles, without unpickling: a reader that can make nothing but plain values.

A pickle is a program for a small stack machine (PEP 307, PEP 3154; `pickletools` lists the instructions). Those that
lists, dicts, texts, numbers and arrays need are carried out here, the others are refused. Nothing is imported or
called by what is in a file; arrays are put together here, of a type, a shape and as many bytes as these take.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

_MAGIC = b"\x93NUMPY"
_DTYPE = re.compile(r"[<>|=]?([biuf][1248]|O8?)")
_RECONSTRUCT = {f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")}
_SCALAR = {f"numpy.{core}.multiarray scalar" for core in ("core", "_core")}
_FROM_BUFFER = {f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")}
_KNOWN = {"numpy ndarray", "numpy dtype", "_codecs encode", *_RECONSTRUCT, *_SCALAR, *_FROM_BUFFER}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PLAIN = set(
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 SHORT_BINSTRING BINSTRING".split()
)

_DEEPEST = 32
"""Levels of lists, tuples, dicts and arrays of objects within each other: what ml-4m writes has seven."""

_ROOM = 1 << 20
"""Bytes that any file may hold: what a pickle refers to more than once counts each time, and small ones do that."""

_SMALL_KEY = 1 << 16
"""Numbers below are their own hash and too few to be put into one place of a dict; of larger ones many could be."""

_brief = reprlib.Repr()
_brief.maxlevel = 2


def brief(value: Any) -> str:
    """The beginning of the repr of a value, at most 80 characters, without making the rest of it."""
    return _brief.repr(value)[:80]


class _Global(str):
    """A name that a pickle refers to; nothing is behind it."""


class Objects:
    """An array while it is being read, which is an empty one first; `value` is an array of numbers, or a list."""

    def __init__(self) -> None:
        self.value: np.ndarray | list[Any] = []


class _Dtype:
    def __init__(self, name: Any) -> None:
        if isinstance(name, bytes):
            name = name.decode("latin-1")
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise ValueError(f"an array of type {brief(name)}, expected integers, floats, booleans or objects")
        self.kind = np.dtype(name)

    def state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "=", b"<", b">", b"|"):
            raise ValueError(f"a type of array with the state {brief(state)}")
        if state[1] in (">", b">"):
            self.kind = self.kind.newbyteorder(">")


def decode(data: bytes) -> list[Any]:
    """The items of a one-dimensional .npy of objects: lists, dicts, texts, numbers, and `Objects` for arrays.

    `plain` takes the last away. ValueError when it is something else, holds anything else, or would swell: together,
    counted as often as they are referred to, the values take no more than four bytes for each of the file, or 1 MiB.
    """
    stream = io.BytesIO(data)
    try:
        if not data.startswith(_MAGIC):
            raise ValueError(f"expected a NumPy file, got {data[:8]!r}")
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype != np.dtype(object) or len(shape) > 1:
            raise ValueError(f"expected objects in one dimension, got {dtype} {brief(shape)}")
        program = data[stream.tell() :]
        made = _Machine().run(program)
        _check([made], _room(program))
        value = plain(made)
        items = value if isinstance(value, list) and shape else [value]
        if len(items) != math.prod(shape):
            raise ValueError(f"{len(items)} objects, the header says {brief(shape)}")
        return items
    except Exception as error:  # numpy parses the header as Python, pickletools raises what it likes
        raise ValueError(f"no readable .npy of plain objects: {error or type(error).__name__}") from error


def plain(value: Any) -> Any:
    """The array or list of an `Objects`; other values as they are."""
    return value.value if isinstance(value, Objects) else value


def encode(items: Sequence[Any]) -> bytes:
    """The .npy of a one-dimensional array of objects, as `np.save` writes it: a pickle, for readers that load those."""
    values = np.empty(len(items), dtype=object)
    values[:] = list(items)
    stream = io.BytesIO()
    about = {"descr": "|O", "fortran_order": False, "shape": (len(items),)}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue() + pickle.dumps(values, protocol=4)


def _room(program: bytes) -> int:
    return max(4 * len(program), _ROOM)


def _check(value: Any, room: int) -> None:
    """ValueError when a value is not plain, lies too deep, holds itself, or takes more than `room` when written out.

    Without recursion, for what a file nests is as deep as it likes. A value that several hold is looked into once.
    """
    known: dict[int, tuple[int, int] | None] = {}  # by id: bytes and levels, None while it is being looked into
    todo = [value]
    while todo:
        one = todo[-1]
        inner = _inner(one)
        if inner is None or known.get(id(one)) is not None:
            todo.pop()
            continue
        held = [(item, _inner(item) is not None) for item in inner]
        if id(one) not in known:
            known[id(one)] = None
            new = [item for item, holds in held if holds and id(item) not in known]
            if any(holds and known.get(id(item), ()) is None for item, holds in held):
                raise ValueError("a value that holds itself")
            todo += new
            continue
        below = [known[id(item)] or (0, 0) if holds else (_size(item), 0) for item, holds in held]
        size, levels = 1 + sum(n for n, _ in below), 1 + max((n for _, n in below), default=0)
        if levels > _DEEPEST:
            raise ValueError(f"values within values, deeper than {_DEEPEST} levels")
        if size > room:
            raise ValueError(f"values that swell to more than {room} bytes, which a file of this size has no reason to")
        known[id(one)] = size, levels
        todo.pop()


def _inner(value: Any) -> Collection[Any] | None:
    """What a value holds; None for one that holds no others."""
    if isinstance(value, Objects):
        return value.value if isinstance(value.value, list) else None
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else None


def _size(value: Any) -> int:
    """Bytes of a value that holds no others; of an array at least one for each list that it would be written out as."""
    if isinstance(value, Objects) and isinstance(value.value, np.ndarray):
        return 1 + max(value.value.nbytes, math.prod(max(n, 1) for n in value.value.shape))
    if type(value) in (str, bytes, bytearray):
        return 1 + len(value)
    if value is None or type(value) in (bool, int, float):
        return 1
    raise ValueError(f"a {type(value).__name__.strip('_')}, which is no plain value")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[Any, Any] = {}
        self.room = 0

    def run(self, data: bytes) -> Any:
        self.room = _room(data)
        argument: Any
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PLAIN:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.stack.append(self._known(argument))
            elif name in _DOES:
                _DOES[name](self)
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"the instruction {name}, which plain values do not need")
        raise ValueError("no end")

    @staticmethod
    def _known(name: str) -> _Global:
        if name not in _KNOWN:
            raise ValueError(f"{name.replace(' ', '.', 1)} is not among what arrays are made of: it is not loaded")
        return _Global(name)

    def marked(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"expected a {kind.__name__} to add to, found a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def pop(self) -> None:
        self.stack.pop()

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def empty_list(self) -> None:
        self.stack.append([])

    def empty_dict(self) -> None:
        self.stack.append({})

    def append(self) -> None:
        item = self.stack.pop()
        self.top(list).append(item)

    def appends(self) -> None:
        items = self.marked()
        self.top(list).extend(items)

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.top(dict).update(_pairs([key, value]))

    def setitems(self) -> None:
        items = self.marked()
        self.top(dict).update(_pairs(items))

    def tuple_(self) -> None:
        self.stack.append(tuple(self.marked()))

    def list_(self) -> None:
        self.stack.append(self.marked())

    def dict_(self) -> None:
        items = self.marked()
        self.stack.append(dict(_pairs(items)))

    def tuple_of(self, count: int) -> None:
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        self.stack.append(tuple(items))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError(f"a name {brief(module)} {brief(name)}, expected texts")
        self.stack.append(self._known(f"{module} {name}"))

    def reduce(self) -> None:
        given, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Global) or not isinstance(given, tuple):
            raise ValueError(f"a call of {brief(called)}")
        made: Any
        if called == "numpy dtype":
            made = _Dtype(given[0])
        elif called in _RECONSTRUCT:
            made = Objects()
        elif called in _SCALAR:
            made = _numbers(given[0], (), given[1]).item()
        elif called in _FROM_BUFFER:
            made = Objects()
            made.value = _array(given[1], given[2], given[0], given[3] == "F")
        elif called == "_codecs encode" and len(given) == 2 and given[1] == "latin1":
            if type(given[0]) is not str:
                raise ValueError(f"an encoding of {brief(given[0])}, expected a text")
            self.room -= len(given[0])  # one text may be encoded over and over
            if self.room < 0:
                raise ValueError("more bytes than a file of this size has reason to hold")
            made = given[0].encode("latin-1")
        else:
            raise ValueError(f"a call of {called}")
        self.stack.append(made)

    def build(self) -> None:
        state = self.stack.pop()
        value = self.stack[-1]
        if isinstance(value, _Dtype):
            value.state(state)
        elif isinstance(value, Objects) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, by_columns, content = state
            value.value = _array(dtype, shape, content, bool(by_columns))
        else:
            raise ValueError(f"a state for a {type(value).__name__}")


def _pairs(items: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    """Keys and values; the hash of anything but a text or a small number may take a file's word for its time."""
    for key in items[::2]:
        if type(key) not in (str, bytes) and not (type(key) is int and abs(key) < _SMALL_KEY):
            raise ValueError(f"a key of a dict is {brief(key)}, expected a text or a small number")
    return zip(items[::2], items[1::2], strict=True)


def _array(dtype: Any, shape: Any, content: Any, by_columns: bool) -> np.ndarray | list[Any]:
    if isinstance(dtype, _Dtype) and dtype.kind == np.dtype(object):
        if type(content) is not list or shape != (len(content),):
            raise ValueError(f"objects in the shape {brief(shape)}, expected one dimension")
        return content
    return _numbers(dtype, shape, content, "F" if by_columns else "C")


def _numbers(dtype: Any, shape: Any, content: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(dtype, _Dtype) or dtype.kind == np.dtype(object) or not isinstance(content, bytes | bytearray):
        raise ValueError("an array without a type of number, or without bytes")
    whole = isinstance(shape, tuple) and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
    if not whole or math.prod(shape) * dtype.kind.itemsize != len(content):
        raise ValueError(f"an array {dtype.kind} {brief(shape)} of {len(content)} bytes")
    return np.frombuffer(content, dtype.kind).reshape(shape, order=order)


_DOES: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "MEMOIZE": _Machine.memoize,
    "EMPTY_LIST": _Machine.empty_list,
    "EMPTY_DICT": _Machine.empty_dict,
    "EMPTY_TUPLE": lambda machine: machine.tuple_of(0),
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "TUPLE": _Machine.tuple_,
    "LIST": _Machine.list_,
    "DICT": _Machine.dict_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
