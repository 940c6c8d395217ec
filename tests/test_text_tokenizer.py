from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from model.tokenizers.text import COCO_CLASSES, NUM_SPECIAL, TextTokenizer, train

TRAINED = os.environ.get("ML4M_TEXT_TOKENIZER", "")
TEXTS = [
    f"a {color} {shape} beside a {other}"
    for color in ("red", "blue")
    for shape in ("cube", "ball")
    for other in ("cone", "cat")
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.json"
    train(TEXTS, NUM_SPECIAL + 120, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer.load(path)


def test_the_first_4284_ids_are_those_of_4m(path: Path) -> None:
    expected = ["[PAD]", "[UNK]", "[SOS]", "[EOS]"]
    expected += [f"[S_{i}]" for i in range(200)]
    expected += [f"v{axis}={i}" for axis in range(4) for i in range(1000)]
    expected += sorted(COCO_CLASSES)
    stored = json.loads(path.read_text())
    assert [token["content"] for token in stored["added_tokens"]] == expected
    assert [token["id"] for token in stored["added_tokens"]] == list(range(4284))
    assert all(token["special"] and not token["lstrip"] and not token["rstrip"] for token in stored["added_tokens"])
    assert [token["single_word"] for token in stored["added_tokens"]] == [False] * 4 + [True] * 4280
    assert [token["normalized"] for token in stored["added_tokens"]] == [False] * 4204 + [True] * 80
    assert [stored["model"]["vocab"][name] for name in expected] == list(range(4284))


def test_the_pipeline_is_that_of_4m(path: Path) -> None:
    stored = json.loads(path.read_text())
    assert stored["normalizer"] == {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    assert stored["pre_tokenizer"] == {"type": "BertPreTokenizer"}
    assert stored["decoder"] == {"type": "WordPiece", "prefix": "##", "cleanup": True}
    assert stored["post_processor"] is None
    assert stored["model"]["continuing_subword_prefix"] == "##"
    assert stored["model"]["max_input_chars_per_word"] == 100


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (
            "v0=0 v1=50 v2=233 v3=200 dining table v0=0 v1=200 v2=500 v3=899 person",
            [204, 1254, 2437, 3404, 4231, 204, 1404, 2704, 4103, 4253],
        ),
        ("v1=0 v0=20", [1204, 224]),
        ("v1=20 v0=2", [1224, 206]),
        ("BUS", [4220]),
        ("hot dog", [4242]),
        ("[S_0] [S_199] [EOS]", [4, 203, 3]),
        ("", []),
    ],
)
def test_coordinates_and_classes_have_known_ids(tokenizer: TextTokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


def test_learned_pieces_come_after_the_fixed_ids(tokenizer: TextTokenizer) -> None:
    a, red, cat = tokenizer.encode("A red Cat")
    assert a >= NUM_SPECIAL
    assert red >= NUM_SPECIAL
    assert cat == NUM_SPECIAL - len(COCO_CLASSES) + COCO_CLASSES.index("cat")


def test_a_coordinate_out_of_range_is_no_single_id(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("v0=1000")) > 1
    assert len(tokenizer.encode("v0=12.0")) > 1


def test_decoding_keeps_coordinates_and_classes(tokenizer: TextTokenizer) -> None:
    text = "v0=1 v1=2 v2=3 v3=4 teddy bear"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode(TEXTS[0]), tokenizer.eos_id]) == TEXTS[0] + " [EOS]"


def test_named_ids(tokenizer: TextTokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 3)
    assert tokenizer.sentinel_ids == list(range(4, 204))
    assert NUM_SPECIAL < tokenizer.vocab_size <= NUM_SPECIAL + 120


def test_the_same_texts_give_the_same_file(path: Path, tmp_path: Path) -> None:
    train(iter(TEXTS), NUM_SPECIAL + 120, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_vocabulary_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 4284, expected more than the 4284"):
        train(TEXTS, 4284, tmp_path / "text.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text tokenizer at"):
        TextTokenizer.load(tmp_path / "none.json")


@pytest.mark.skipif(not TRAINED, reason="ML4M_TEXT_TOKENIZER: the path of text_tokenizer_4m_wordpiece_30k.json")
def test_ml4ms_own_file_is_what_training_writes_but_for_learned_pieces(path: Path) -> None:
    theirs, ours = json.loads(Path(TRAINED).read_text()), json.loads(path.read_text())
    for stored in (theirs, ours):
        vocab = stored["model"].pop("vocab")
        assert sorted(vocab.values()) == list(range(len(vocab)))
    assert theirs == ours
    tokenizer = TextTokenizer.load(Path(TRAINED))
    assert tokenizer.vocab_size == 30_000
    words = {"none": 18109, "human": 6304, "global": 9292, "pose": 8620, "shape": 6631, "camera": 5585}
    words |= {"point": 6712, "polygon": 14445, "dog": 4232, "dining table": 4231, "[S_1]": 5, "v3=999": 4203}
    assert {word: tokenizer.encode(word) for word in words} == {word: [id] for word, id in words.items()}
    assert tokenizer.encode("a dog") == [4321, 4232]
    assert tokenizer.decode([4321, 4232, tokenizer.eos_id]) == "a dog [EOS]"
