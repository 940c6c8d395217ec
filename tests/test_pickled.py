"""NumPy files of objects are read without unpickling: what they may hold, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest

from dataengine import _pickled, ml4m
from dataengine.shards import Member


def instances(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = np.empty(2, dtype=object)
    for i in range(2):
        out[i] = {
            "points": [(rng.integers(0, 224, (3 + i, 1, 2)).astype(np.int32),) for _ in range(2)],
            "token_ids": rng.integers(0, 1024, (2, 16)),
            "bbox": np.asfortranarray(
                np.sort(rng.integers(0, 224, (2, 2, 2)), axis=1).reshape(2, 4).astype(np.float32)
            ),
        }
    return out


def npy(value: Any, protocol: int) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.empty(len(value), dtype=object), allow_pickle=True)
    header = sink.getvalue()[: sink.getvalue().index(b"\n") + 1]
    return header + pickle.dumps(value, protocol=protocol)


@pytest.mark.parametrize("protocol", range(6))
def test_object_arrays_of_every_protocol_are_read_without_unpickling(
    protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = npy(instances(protocol), protocol)
    if protocol < 5:  # as the numpy of ml-4m writes it
        data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    value = ml4m.decode("sam_instance", Member("k", "npy", data))
    for crop, expected in zip(value["crops"], instances(protocol), strict=True):
        assert [i["polygon"] for i in crop] == [c[0][:, 0].tolist() for c in expected["points"]]
        assert [i["tokens"] for i in crop] == expected["token_ids"].tolist()
        assert [i["bbox"] for i in crop] == expected["bbox"].tolist()


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_nothing_in_a_pickle_is_called(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for protocol in range(6):
        value = np.empty(1, dtype=object)
        value[0] = Payload(str(proof))
        data = npy(value, protocol)
        with pytest.raises(ValueError, match=r"posix.mkdir is not among what arrays are made of: it is not loaded"):
            _pickled.decode(data)
    assert not proof.exists()
    np.load(io.BytesIO(data), allow_pickle=True)
    assert proof.is_dir()


def test_a_bent_pickle_is_a_value_error_and_takes_no_room(tmp_path: Path) -> None:
    data = npy(instances(0), 4)
    rng = np.random.default_rng(0)
    start = data.index(b"\n") + 1
    refused = 0
    for _ in range(400):
        bent = bytearray(data)
        for at in rng.integers(start, len(data), 3):
            bent[at] = rng.integers(256)
        try:
            ml4m.decode("sam_instance", Member("k", "npy", bytes(bent)))
        except ValueError:
            refused += 1
    assert refused > 100
    text = b"X" + (1000).to_bytes(4, "little") + b"a" * 1000
    again = b"c_codecs\nencode\n" + b"h\x00" + b"X\x06\x00\x00\x00latin1" + b"\x86R"
    for program in (
        b"\x80\x04\x96" + (1 << 40).to_bytes(8, "little") + b".",  # a bytearray of a terabyte
        b"\x80\x04Nr\xff\xff\xff\xff.",  # the memo's last place
        b"\x80\x02" + text + b"q\x00" + again * 1000 + b".",  # one text over and over
        b"\x80\x02]q\x00h\x00a.",  # a list in itself
        b"\x80\x02(((((((.", b".", b"\x80\x02a.", b"\x80\x02K\x01P1\n.", b"\x80\x02\x82\x01.",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"no readable|sam_instance"):
            ml4m.decode("sam_instance", Member("k", "npy", data[:start] + program))
    for other in (b"", b"\x93NUMPY", codecs_npy(np.zeros(3))):
        with pytest.raises(ValueError, match=r"no readable .npy of plain objects"):
            _pickled.decode(other)


def of_one(program: bytes) -> bytes:
    """A file of one object that a program of protocol 4 makes."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "|O", "fortran_order": False, "shape": ()})
    return sink.getvalue() + b"\x80\x04" + program + b"."


def test_a_key_is_a_text_or_a_small_number_for_its_hash_takes_a_program() -> None:
    chain = b")" + b"\x85" * 1_000_000  # tuples in a tuple: hash() recurses without a limit, and the process dies
    code = (
        "import sys; from dataengine import _pickled\n"
        "try:\n    _pickled.decode(sys.stdin.buffer.read())\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=of_one(b"}" + chain + b"Ns"), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"a key of a dict is ((" in done.stdout
    doubled = b")\x94" + b"".join(b"0h%ch%c\x86\x94" % (i, i) for i in range(60))  # (t, t) takes twice as long
    large = b"\x8a\x09" + ((1 << 61) - 1).to_bytes(9, "little")  # of such ones any number has one hash
    for key in (doubled, large, b"]", b"c_codecs\nencode\n", b"N"):
        for program in (b"}" + key + b"Ns", b"}(" + key + b"Nu", b"(" + key + b"Nd"):
            with pytest.raises(ValueError, match=r"a key of a dict is .*, expected a text or a small number"):
                _pickled.decode(of_one(program))
    assert _pickled.decode(of_one(b"}(\x8c\x01aK\x01C\x01bK\x02K\x07K\x03u")) == [{"a": 1, b"b": 2, 7: 3}]


def test_values_that_are_deep_or_swell_are_refused_at_once() -> None:
    shared = b"]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(60))  # a list twice in a list twice ...
    later = b"".join(b"]\x94" for _ in range(60))  # the same, where lists are filled after they were referred to
    later += b"".join(b"h%c(h%ch%ce0" % (i, i + 1, i + 1) for i in range(59)) + b"0" * 59
    block = pickle.dumps(np.zeros(20_000, np.uint8), protocol=4)[2:-1]
    one_array = b"](" + block + b"r\xe7\x03\x00\x00" + b"j\xe7\x03\x00\x00" * 5_000 + b"e"
    no_bytes = b"cnumpy._core.numeric\n_frombuffer\n(C\x00cnumpy\ndtype\n\x8c\x02i8\x85R"
    hollow = no_bytes + b"J\x00\xca\x9a;K\x00\x86\x8c\x01CtR"  # a thousand million rows
    for program, said in (
        (b"]" * 100_000 + b"a" * 99_999, "values within values, deeper than 32 levels"),
        (b")" + b"\x85" * 100_000, "values within values, deeper than 32 levels"),
        (b"]\x94h\x00a", "a value that holds itself"),
        (shared[:-1], "values that swell to more than 1048576 bytes"),
        (later, "values that swell to more than 1048576 bytes"),
        (one_array, "values that swell to more than 1048576 bytes"),
        (hollow, "values that swell to more than 1048576 bytes"),
        (b"cnumpy\ndtype\n", "a Global, which is no plain value"),
        (shared + b"h\x01\x93", "a name .* expected texts"),
        (shared + b"cnumpy\ndtype\nh<\x85R", "an array of type "),
    ):
        began = process_time()
        with pytest.raises(ValueError, match=said) as caught:
            _pickled.decode(of_one(program))
        assert process_time() - began < 20  # without limits it would not end
        assert len(str(caught.value)) < 300
    assert len(_pickled.brief([["a" * 10**6] * 10**6] * 10**6)) <= 80


def codecs_npy(value: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, value)
    return sink.getvalue()
