"""The WordPiece tokenizer of every text-like modality, with ml-4m's ids: captions, boxes and metadata share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers as hf
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from dataengine import coco
from model import snapshots
from model.tokenizers import Tokenizer

PAD, UNK, SOS, EOS = "[PAD]", "[UNK]", "[SOS]", "[EOS]"
NUM_SENTINELS = 200
COORDINATES = ("v0", "v1", "v2", "v3")
COORDINATE_BINS = 1000
PREFIX = "##"  # of a piece that continues a word
_PRIVATE = 0xF0000  # where Unicode has 65 534 characters without a meaning
COCO_CLASSES = tuple(sorted(coco.THINGS))


def special_tokens() -> list[AddedToken]:
    """The 4284 tokens with fixed ids, in the order of their ids.

    A class name is matched after lower-casing, anywhere in a text, so it is one id in a caption too; the others are
    matched as they are written.
    """
    plain = [AddedToken(name, single_word=False, normalized=False) for name in (PAD, UNK, SOS, EOS)]
    sentinels = [f"[S_{i}]" for i in range(NUM_SENTINELS)]
    coordinates = [f"{axis}={i}" for axis in COORDINATES for i in range(COORDINATE_BINS)]
    exact = [AddedToken(name, single_word=True, normalized=False) for name in sentinels + coordinates]
    classes = [AddedToken(name, single_word=True, normalized=True) for name in COCO_CLASSES]
    return plain + exact + classes


NUM_SPECIAL = 4 + NUM_SENTINELS + len(COORDINATES) * COORDINATE_BINS + len(COCO_CLASSES)


class TextTokenizer(Tokenizer):
    """Lower-cased WordPiece (Wu et al. 2016) behind 4284 fixed ids; adds no start or end token of its own."""

    def __init__(self, inner: hf.Tokenizer) -> None:
        self._inner = inner
        for id, token in enumerate((PAD, UNK, SOS, EOS, "[S_0]")):
            if inner.token_to_id(token) != id:
                raise ValueError(f"{token} has the id {inner.token_to_id(token)}, expected {id}: not a 4M vocabulary")

    @property
    def vocab_size(self) -> int:
        """The number of ids, the fixed ones included."""
        return self._inner.get_vocab_size()

    @property
    def grid(self) -> tuple[int, ...]:
        """(): texts differ in length."""
        return ()

    @property
    def pad_id(self) -> int:
        """The id of [PAD]."""
        return self._id(PAD)

    @property
    def eos_id(self) -> int:
        """The id of [EOS], which masking puts after a text."""
        return self._id(EOS)

    @property
    def sentinel_ids(self) -> list[int]:
        """The ids of [S_0], [S_1] and so on, in that order."""
        return [self._id(f"[S_{i}]") for i in range(NUM_SENTINELS)]

    def _id(self, token: str) -> int:
        id = self._inner.token_to_id(token)
        if id is None:
            raise ValueError(f"{token} is not in the vocabulary, expected a 4M text tokenizer")
        return id

    def encode(self, value: str) -> list[int]:
        """The ids of a text, without [EOS]."""
        return self._inner.encode(value).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; coordinates and class names are special tokens, and kept."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """The `tokenizers` JSON format."""
        snapshots.write_file(Path(path), self._inner.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """The tokenizer in a `tokenizers` JSON file, ml-4m's own included."""
        if not Path(path).is_file():
            raise ValueError(f"no text tokenizer at {path}, expected a tokenizers JSON file")
        return cls(hf.Tokenizer.from_file(str(path)))

    @classmethod
    def tiny(cls) -> TextTokenizer:
        """Trained on four sentences."""
        return cls(_trained(_EXAMPLES, NUM_SPECIAL + 100))

    def examples(self) -> list[str]:
        """Four lower-case texts."""
        return list(_EXAMPLES)


_EXAMPLES = (
    "a red cube on the floor",
    "two balls and a dog",
    "v0=0 v1=50 v2=233 v3=200 dining table v0=0 v1=200 v2=500 v3=899 person",
    "v1=10 v0=24",
)


def words(texts: Sequence[str]) -> list[list[str]]:
    """The words of each text that pieces are needed for: without those that have a fixed id, and as they are spelled.

    Training on a whole `v0=13 person` would spend ids on `v0`, `=`, `13` and `person`, which no encoded text has.
    """
    cut = _pipeline(models.WordLevel({"word": 0}, unk_token="word"))  # any word but a special token is id 0
    cut.add_special_tokens(special_tokens())
    encoded = zip(texts, cut.encode_batch(list(texts)), strict=True)
    return [[text[a:b] for (a, b), id in zip(e.offsets, e.ids, strict=True) if id == 0] for text, e in encoded]


def train(texts: Iterable[str], vocab_size: int, path: Path) -> TextTokenizer:
    """Learn word pieces for the ids from 4284 up to at most `vocab_size` - 1, and save the tokenizer."""
    tokenizer = TextTokenizer(_trained(texts, vocab_size))
    tokenizer.save(path)
    return tokenizer


def _pipeline(model: models.Model) -> hf.Tokenizer:
    inner = hf.Tokenizer(model)
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return inner


def _trained(texts: Iterable[str], vocab_size: int) -> hf.Tokenizer:
    if vocab_size <= NUM_SPECIAL:
        raise ValueError(f"vocab_size {vocab_size}, expected more than the {NUM_SPECIAL} fixed ids")
    inner = _pipeline(models.WordPiece(unk_token=UNK))
    inner.decoder = decoders.WordPiece(prefix=PREFIX)
    normalized = (inner.normalizer.normalize_str(text) for text in texts)
    lines = [[word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text)] for text in normalized]
    special = special_tokens()
    contents = [token.content for token in special]
    # A learned piece may be a class name, which has its id already.
    pieces = [piece for piece in _pieces(lines, vocab_size - NUM_SPECIAL) if piece not in COCO_CLASSES]
    vocab = {token: id for id, token in enumerate(contents + pieces)}
    inner.model = models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100, continuing_subword_prefix=PREFIX)
    inner.add_special_tokens(special)
    return inner


def _pieces(lines: list[list[str]], num: int) -> list[str]:
    """At most `num` word pieces of the words of all lines, in the order in which they were learned.

    WordPieceTrainer does this too, but numbers the continuing characters in the order of a randomly seeded hash map,
    and breaks ties by these numbers: two runs give two vocabularies. So continuing characters become characters of
    their own, of the private-use plane, and BpeTrainer, which sorts its alphabet, does the same merges.
    """
    chars = sorted({char for line in lines for word in line for char in word})
    inside = {char: chr(_PRIVATE + i) for i, char in enumerate(chars)}
    outside = {private: char for char, private in inside.items()}
    marked = (" ".join(word[0] + "".join(inside[c] for c in word[1:]) for word in line) for line in lines)
    bpe = hf.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=num, min_frequency=0, initial_alphabet=chars, show_progress=False)
    bpe.train_from_iterator(marked, trainer)
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return [
        (PREFIX if piece[0] in outside else "") + "".join(outside.get(char, char) for char in piece)
        for piece, _ in learned
    ]
