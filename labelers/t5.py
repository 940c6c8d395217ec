"""Captions as T5-v1.1-XXL's encoder reads them (Raffel et al. 2020), by transformers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataengine import weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.sample import Sample
from dataengine.weights import Weights
from labelers import _huggingface, _networks

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import T5EncoderModel

TOKENIZERS = ("tokenizer.json", "spiece.model")
"""Under which names a tokenizer is published; both give the same ids."""

DECODER = (r"^decoder\.", r"^lm_head\.")
"""What a checkpoint of the whole T5 has and the encoder does not use."""


@dataclass(frozen=True, kw_only=True)
class T5(Labeler):
    """One vector a token of each caption: float16 (captions, tokens, 4096) and a mask, see `t5_caption`.

    The encoder's last hidden state after its final norm, as 4M-21 takes it: captions as they are, the end-of-sentence
    token included, 77 tokens at most. Captions of a batch are sorted by length and computed in pieces of
    `token_budget` padded tokens; padding is masked, so that a caption's vectors do not depend on its neighbours.

    The published file holds the decoder too, in float32: 44.5 GB are downloaded and half of that is used.
    checkpoint=city96/t5-v1_1-xxl-encoder-bf16 is the same encoder in 9.5 GB.
    """

    inputs = ("caption",)
    emits = ("t5_caption",)
    batch_size = 64
    gpus = 0.5

    checkpoint: str = "google/t5-v1_1-xxl"
    precision: _networks.Precision = "bfloat16"
    max_tokens: int = 77
    token_budget: int = 4096

    def __post_init__(self) -> None:
        if self.precision == "float16":
            raise ValueError(
                "t5: expected precision bfloat16 or float32, got float16: T5 was trained in bfloat16, and its "
                "feed-forward layers overflow float16 (65504)"
            )
        if not 2 <= self.max_tokens <= self.token_budget:
            raise ValueError(
                f"t5: expected 2 <= max_tokens <= token_budget, got {self.max_tokens} and {self.token_budget}"
            )

    def weights(self) -> Weights:
        """The published weights with their tokenizer and configuration, Apache-2.0."""
        return weights.describe_folder(self.checkpoint, _files(self.checkpoint), licence="Apache-2.0")

    def load(self, device: str) -> Loaded:
        """Read the encoder alone and put it on the device."""
        dtype = _networks.dtype_on(device, self.precision)
        network = _networks.placed(encoder(self.checkpoint, dtype), device, self.precision)
        tokenizer = _tokenizer(self.checkpoint)
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_tokens)

        def prepare(sample: Sample) -> list[list[int]]:
            return [found.ids for found in tokenizer.encode_batch(sample.values["caption"])]

        def label(batch: Sequence[list[list[int]]]) -> list[dict[str, Any]]:
            captions = [ids for of_sample in batch for ids in of_sample]
            vectors = iter(_halved(embedded(network, captions, self.token_budget, device)))
            width = network.config.d_model
            return [{"t5_caption": _padded([next(vectors) for _ in of_sample], width)} for of_sample in batch]

        return Staged(prepare, label)

    def tiny(self, folder: Path) -> T5:
        """One random block of width 16 with a tokenizer of letters, in the format of the published checkpoint."""
        from transformers import T5Config, T5ForConditionalGeneration

        own = folder / "t5"
        if not (own / _huggingface.FILE).exists():
            own.mkdir(exist_ok=True)
            _letters().save(str(own / "tokenizer.json"))
            sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
            shape = T5Config.from_dict({**sizes, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
            _huggingface.save_tiny(T5ForConditionalGeneration(shape), own, seed=0)
        return replace(self, checkpoint=str(own / _huggingface.FILE))


def _files(checkpoint: str) -> Iterator[str]:
    """The names of all files that decide what the encoder says of a caption, looked for when asked."""
    yield from _huggingface.weight_files(checkpoint)
    yield _huggingface.CONFIG
    yield _huggingface.first_part(checkpoint, TOKENIZERS)[0]


def encoder(checkpoint: str, dtype: Any = None) -> T5EncoderModel:
    """The encoder of a checkpoint, on the CPU, float32 unless a torch dtype is given."""
    from transformers import T5EncoderModel

    files = _huggingface.weight_files(checkpoint)
    return _huggingface.network(checkpoint, T5EncoderModel, "t5", file=files, unused=DECODER, dtype=dtype)


def embedded(network: T5EncoderModel, captions: Sequence[Sequence[int]], budget: int, device: str) -> list[Tensor]:
    """The last hidden states (tokens, channels) of each caption's token ids, in the network's precision, on the device.

    Nothing is waited for: on a GPU the pieces queue up behind one another.
    """
    import torch

    out: dict[int, Tensor] = {}
    with torch.inference_mode():
        for piece in packed([len(ids) for ids in captions], budget):
            longest = len(captions[piece[-1]])
            padded = np.full((len(piece), longest), network.config.pad_token_id)
            for row, i in enumerate(piece):
                padded[row, : len(captions[i])] = captions[i]
            ids = torch.from_numpy(padded)
            beyond = torch.arange(longest) >= torch.tensor([[len(captions[i])] for i in piece])
            if device.startswith("cuda"):
                ids, beyond = (part.pin_memory().to(device, non_blocking=True) for part in (ids, beyond))
            # The mask as attention adds it: of a plain one transformers asks the device whether anything is masked.
            least = torch.finfo(network.dtype).min
            mask = torch.zeros(beyond.shape, dtype=network.dtype, device=device).masked_fill_(beyond, least)
            states = network(input_ids=ids, attention_mask=mask[:, None, None]).last_hidden_state
            out.update((i, states[row, : len(captions[i])]) for row, i in enumerate(piece))
    return [out[i] for i in range(len(captions))]


def packed(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in pieces, shortest first, each of at most `budget` tokens when padded to its last and longest."""
    pieces: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if pieces and (len(pieces[-1]) + 1) * lengths[i] <= budget:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    return pieces


def _halved(vectors: Sequence[Tensor]) -> list[np.ndarray]:
    """As float16 arrays; ValueError when a value does not fit."""
    import torch

    if not vectors:
        return []
    # One copy of all from the device, and the only moment at which it is waited for.
    together: np.ndarray = torch.cat(list(vectors)).half().cpu().numpy()
    bad = together.size - int(np.isfinite(together).sum())
    if bad:
        raise ValueError(f"t5: {bad} of {together.size} values are no finite float16 (at most 65504)")
    return np.split(together, np.cumsum([len(v) for v in vectors])[:-1])


def _padded(captions: Sequence[np.ndarray], width: int) -> dict[str, np.ndarray]:
    """The captions of a sample, padded to their longest; one row without tokens when there are none."""
    longest = max((len(vectors) for vectors in captions), default=1)
    emb = np.zeros((max(len(captions), 1), longest, width), np.float16)
    mask = np.zeros(emb.shape[:2], np.bool_)
    for row, vectors in enumerate(captions):
        emb[row, : len(vectors)] = vectors
        mask[row, : len(vectors)] = True
    return {"emb": emb, "mask_valid": mask}


def _tokenizer(checkpoint: str) -> Tokenizer:
    from tokenizers import Tokenizer

    name, file = _huggingface.first_part(checkpoint, TOKENIZERS)
    if name == "tokenizer.json":
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{name} of {checkpoint}: expected a tokenizer, {error}") from error
    from transformers import T5Tokenizer

    # sentencepiece's own model, read by that library; transformers adds the rules by which T5 splits and ends a text.
    # Alone in a folder, for other files beside it would change the ids, and are not part of the labeler's identity.
    with tempfile.TemporaryDirectory(prefix="t5-") as alone:
        shutil.copyfile(file, Path(alone, name))
        found: Tokenizer = T5Tokenizer.from_pretrained(alone, local_files_only=True).backend_tokenizer
    return found


def _letters() -> Tokenizer:
    """A tokenizer of T5's kind that knows the letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    known += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    made = Tokenizer(models.Unigram(known, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made
