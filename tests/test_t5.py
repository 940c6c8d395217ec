"""Captions as T5's encoder reads them: parity with transformers, formats of checkpoints, and what is stored."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import time
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataengine import _npz, codecs, modalities
from dataengine.labeler import Staged
from dataengine.sample import Sample
from labelers import t5
from labelers.t5 import T5

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


CAPTIONS = (
    "a dog",
    "",
    "two gulls over the sea, and a third one far away",
    "süß 東京",
    "x " * 200,
    "a red cup on the table",
)


@pytest.fixture
def labeler(tmp_path: Path) -> T5:
    return T5().tiny(tmp_path)


def of(captions: Sequence[str]) -> Sample:
    return Sample("a", {"caption": list(captions)})


def plain(folder: Path, caption: str) -> Any:
    """What transformers computes of one caption without further ado: (tokens, channels)."""
    import torch
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel

    network = T5EncoderModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(77)
    with torch.no_grad():
        return network(input_ids=torch.tensor([tokenizer.encode(caption).ids])).last_hidden_state[0]


def relative(found: Any, expected: Any) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_equal_to_transformers_whatever_the_neighbours(labeler: T5) -> None:
    folder = Path(labeler.checkpoint).parent
    network = t5.encoder(labeler.checkpoint)
    stage = labeler.load("cpu")
    assert isinstance(stage, Staged)
    ids = stage.prepare(of(CAPTIONS))
    assert [len(i) for i in ids[1:5:3]] == [1, 77]
    assert {i[-1] for i in ids} == {1}
    for budget in (77, 160, 4096):
        for order in (range(len(ids)), reversed(range(len(ids)))):
            rows = list(order)
            found = t5.embedded(network, [ids[i] for i in rows], budget, "cpu")
            for i, vectors in zip(rows, found, strict=True):
                assert relative(vectors, plain(folder, CAPTIONS[i])) <= 1e-5, (budget, CAPTIONS[i])


def test_samples_get_their_own_captions_padded_to_their_longest(labeler: T5) -> None:
    run = labeler.load("cpu")
    groups = (CAPTIONS[:2], (), CAPTIONS[2:], ("a",))
    values = [labels["t5_caption"] for labels in run([of(group) for group in groups])]
    for group, value in zip(groups, values, strict=True):
        MODALITY.check(value, (8, 8))
        lengths = value["mask_valid"].sum(axis=1)
        assert value["emb"].shape[:2] == (max(len(group), 1), max(lengths.max(), 1))
        assert not value["emb"][~value["mask_valid"]].any()
        for row, caption in enumerate(group):
            (alone,) = run([of([caption])])
            one = alone["t5_caption"]["emb"][0]
            assert lengths[row] == len(one)
            np.testing.assert_allclose(value["emb"][row, : len(one)], one, rtol=2e-3, atol=1e-4)
    assert not values[1]["mask_valid"].any()


def test_pieces_keep_to_the_budget_and_hold_every_caption_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 78, 200).tolist()
    pieces = t5.packed(lengths, 512)
    assert sorted(i for piece in pieces for i in piece) == list(range(200))
    padded = [len(piece) * max(lengths[i] for i in piece) for piece in pieces]
    assert max(padded) <= 512
    assert sum(padded) < 1.1 * sum(lengths)
    assert t5.packed([], 512) == []


def resaved(source: Path, folder: Path, form: str) -> str:
    """The tiny checkpoint as another publisher lays it out; what to give as `checkpoint`."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    state = load_file(source / "model.safetensors")
    whole = {**state, "lm_head.weight": torch.ones_like(state["shared.weight"])}
    alone = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    if form == "bin":
        # As older versions wrote it: the shared table under all its names.
        tables = {f"{part}.embed_tokens.weight": state["shared.weight"] for part in ("encoder", "decoder")}
        torch.save({**whole, **tables}, folder / "pytorch_model.bin")
        return str(folder)
    if form == "encoder":
        save_file(alone, folder / "model.safetensors")
        return str(folder / "model.safetensors")
    suffix = form.rpartition(" ")[2]
    names = [f"part-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    index = {name: names[i % 2] for i, name in enumerate(sorted(whole))}
    for name in names:
        part = {key: whole[key] for key in whole if index[key] == name}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name)
    head = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    (folder / f"{head}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return str(folder)


@pytest.mark.parametrize("form", ["bin", "encoder", "shards safetensors", "shards bin"])
def test_every_published_layout_gives_the_same(form: str, labeler: T5, tmp_path: Path) -> None:
    own = Path(labeler.checkpoint).parent
    other = dataclasses.replace(labeler, checkpoint=resaved(own, tmp_path / "other", form))
    ids = [[5, 6, 7, 1], [9, 1]]
    found, expected = (t5.embedded(t5.encoder(x.checkpoint), ids, 64, "cpu") for x in (other, labeler))
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) == 0
    described = other.weights()
    assert not described.random
    assert described.licence == "Apache-2.0"
    assert described.sha256 != labeler.weights().sha256


def test_every_file_of_a_checkpoint_is_hashed(labeler: T5, tmp_path: Path) -> None:
    own = Path(labeler.checkpoint).parent
    made = resaved(own, tmp_path / "other", "shards safetensors")
    seen = {T5(checkpoint=made).weights().sha256}
    for name in ("tokenizer.json", "config.json", "part-00001-of-00002.safetensors", "part-00002-of-00002.safetensors"):
        file = tmp_path / "other" / name
        kept = file.read_bytes()
        file.write_bytes(kept + b" ")
        seen.add(T5(checkpoint=made).weights().sha256)
        file.write_bytes(kept)
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "none of tokenizer.json, spiece.model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "expected a tokenizer"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "expected model_type 't5'"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has none of model.safetensors.index.json"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "expected a weight_map of file names",
        ),
        (lambda folder: (folder / "part-00002-of-00002.safetensors").unlink(), "holds no part-00002"),
    ],
)
def test_a_checkpoint_that_lacks_something_says_so(change: Any, message: str, labeler: T5, tmp_path: Path) -> None:
    made = resaved(Path(labeler.checkpoint).parent, tmp_path / "other", "shards safetensors")
    change(tmp_path / "other")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        T5(checkpoint=made).load("cpu")


def test_a_tensor_of_no_known_name_is_refused(labeler: T5, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(resaved(Path(labeler.checkpoint).parent, tmp_path / "other", "encoder"))
    state = load_file(file)
    save_file({**state, "adapter.weight": state["shared.weight"].clone()}, file)
    with pytest.raises(ValueError, match=r"t5: .*unexpected: adapter\.weight"):
        T5(checkpoint=str(file)).load("cpu")


def test_the_published_encoder_is_what_its_names_say() -> None:
    """All names of the published file but the decoder's and the head's are the encoder's; 4.76 billion parameters."""
    import torch
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    sizes = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        published = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu")).state_dict()
        network = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    kept = {name for name in published if not any(re.search(pattern, name) for pattern in t5.DECODER)}
    assert kept == set(network.state_dict())
    assert sum(value.numel() for value in network.parameters()) == 4_762_310_656
    assert len(kept - {"encoder.embed_tokens.weight"}) == 219


def test_sentencepiece_models_give_the_ids_of_sentencepiece(labeler: T5, tmp_path: Path) -> None:
    import sentencepiece

    own = tmp_path / "spiece"
    own.mkdir()
    made = io.BytesIO()
    words = "a the dog cat runs sits on in over sea birds flock gulls red blue cup table picture photo".split()
    rng = np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choice(words, 8)) for _ in range(200)]),
        model_writer=made, vocab_size=64, hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (own / "spiece.model").write_bytes(made.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    tokenizer = t5._tokenizer(str(own))
    for caption in (*CAPTIONS, "  the   Dog\truns\n", "ﬁne ½ cat", "the <cat> & 東京 dogs"):
        assert tokenizer.encode(caption).ids == [*reference.encode(caption), 1], caption


def test_float16_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="overflow float16"):
        T5(precision="float16")
    with pytest.raises(ValueError, match="got 1 and 4096"):
        T5(max_tokens=1)


def test_a_value_that_float16_cannot_hold_is_an_error(labeler: T5, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(resaved(Path(labeler.checkpoint).parent, tmp_path / "other", "encoder"))
    state = load_file(file)
    save_file({**state, "encoder.final_layer_norm.weight": state["encoder.final_layer_norm.weight"] * 1e6}, file)
    with pytest.raises(ValueError, match="no finite float16"):
        T5(checkpoint=str(file)).load("cpu")([of(["a dog"])])
