"""Captions as T5's encoder reads them: parity with transformers, formats of checkpoints, and what is stored."""

from __future__ import annotations

import io
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataengine import _npz, codecs, modalities

MODALITY = modalities.load("t5_caption")


def example() -> dict[str, np.ndarray]:
    value: dict[str, np.ndarray] = MODALITY.example(np.random.default_rng(0), (48, 48))
    return value


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return sink.getvalue()


def test_numpy_reads_what_is_stored_as_ml4m_does(tmp_path: Path) -> None:
    value = example()
    file = tmp_path / "a.npz"
    file.write_bytes(MODALITY.encode(value))
    with np.load(file, allow_pickle=False) as stored:
        emb, mask = stored["emb"], stored["mask_valid"]
    assert (emb.dtype, emb.shape, mask.dtype, mask.shape) == (np.float16, (3, 5, 64), np.bool_, (3, 5))
    for row in range(3):
        kept = emb[row][mask[row]]
        np.testing.assert_array_equal(kept, value["emb"][row][value["mask_valid"][row]])
        assert 1 <= len(kept) <= 5
    assert emb[0][MODALITY.placeholder((8, 8))["mask_valid"][0, :1].repeat(5)].shape == (0, 64)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_stores_is_read(save: Any) -> None:
    value = example()
    sink = io.BytesIO()
    save(sink, emb=value["emb"].astype(np.float32), mask_valid=value["mask_valid"].astype(np.int64), more=np.ones(3))
    back = MODALITY.decode(sink.getvalue())
    np.testing.assert_array_equal(back["emb"], value["emb"])
    np.testing.assert_array_equal(back["mask_valid"], value["mask_valid"])


def test_the_bytes_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    first = MODALITY.encode(example())
    moment = time.localtime(1_900_000_000)
    monkeypatch.setattr(time, "localtime", lambda *_: moment)
    monkeypatch.setattr(time, "time", lambda: 1_900_000_000.0)
    assert MODALITY.encode(example()) == first


def test_a_value_too_large_for_float16_is_read_as_infinite_and_refused() -> None:
    value = example()
    large = _npz.encode({**value, "emb": value["emb"].astype(np.float32) + 1e6})
    with pytest.raises(ValueError, match="finite"):
        MODALITY.check(MODALITY.decode(large), (8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emb": lambda v: v.astype(np.float32)}, "float16"),
        ({"emb": lambda v: v[0]}, "captions, tokens, channels"),
        ({"emb": lambda v: v[:, :0]}, "captions, tokens, channels"),
        ({"emb": lambda v: v * np.float16("nan")}, "finite"),
        ({"mask_valid": lambda v: v[:2]}, r"bool \(3, 5\), got bool \(2, 5\)"),
        ({"mask_valid": lambda v: v.astype(np.uint8)}, "got uint8"),
    ],
)
def test_check_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    value = example()
    with pytest.raises(ValueError, match=message):
        MODALITY.check({name: change.get(name, lambda v: v)(array) for name, array in value.items()}, (8, 8))


def bent() -> dict[str, bytes]:
    """Archives that must be refused, by what is wrong with them."""
    emb, mask = (codecs.encode_npy(example()[name]) for name in ("emb", "mask_valid"))
    good = zipped({"emb.npy": emb, "mask_valid.npy": mask})
    large = b"\x93NUMPY\x01\x00" + len(head := b"{'descr':'<f2','fortran_order':False,'shape':(1,1,30000000)}\n")\
        .to_bytes(2, "little") + head  # fmt: skip
    bomb = zipped({"emb.npy": large + bytes(60_000_000), "mask_valid.npy": mask}, zipfile.ZIP_DEFLATED)
    sizes = bytearray(bomb)
    for at in (sizes.index(b"PK\x03\x04") + 22, sizes.index(b"PK\x01\x02") + 24):
        sizes[at : at + 4] = (1000).to_bytes(4, "little")
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    return {
        "of 60 MB": bomb,
        "that says 1000 bytes and holds 60 MB": bytes(sizes),
        "lzma": zipped({"emb.npy": emb, "mask_valid.npy": mask}, zipfile.ZIP_LZMA),
        "of objects": zipped({"emb.npy": pickled.getvalue(), "mask_valid.npy": mask}),
        "without a mask": zipped({"emb.npy": emb}),
        "of a thousand members": zipped({"emb.npy": emb, "mask_valid.npy": mask, **{str(i): b"" for i in range(1000)}}),
        "with a damaged value": good.replace(emb[200:240], bytes(40)),
        "with a comment": good + b"PK\x05\x06" + bytes(30),
    }


def test_bombs_and_bent_archives_are_refused_in_bounded_memory() -> None:
    for what, data in bent().items():
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"no readable \.npz"):
            _npz.decode(data, ("emb", "mask_valid"), max_bytes=1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20, (what, peak)
