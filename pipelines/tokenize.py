"""Tokenise: a map tokenizer is a labeler whose input is a label and the crop settings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import modalities, weights
from dataengine.geometry import crops_of
from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample
from dataengine.versions import Versioned
from dataengine.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Tokenize(Labeler):
    """One modality into tokens at one resolution, every crop of the crop settings: ml-4m's `tok_<modality>@<side>`."""

    batch_size = 32

    modality: str
    checkpoint: str
    side: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """The map, and where to cut it."""
        return (self.modality, "crop_settings")

    @property
    def emits(self) -> tuple[str, ...]:
        """The token column."""
        return (f"tok_{self.modality}@{self.side}",)

    def weights(self) -> Weights:
        """The tokenizer's file."""
        return weights.describe(self.checkpoint, licence="as the data it was trained on")

    def facts(self) -> dict[str, Any]:
        """The size of the vocabulary and the number of tokens of one crop: what a packed column says of itself."""
        vocab_size, num_tokens = _shape(self.checkpoint, self.weights().sha256)
        return {"vocab_size": vocab_size, "num_tokens": num_tokens}

    def load(self, device: str) -> Loaded:
        """Load the VQ-VAE; crops of a batch are tokenised together."""
        from model.tokenizers.vqvae import VQVAE

        tokenizer = VQVAE.load(weights.resolve(self.checkpoint)).to(device)
        codec = modalities.load(self.modality)
        (column,) = self.emits

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            cut, counts = [], []
            for s in samples:
                crops = crops_of(s.values["crop_settings"])
                cut += [codec.crop(s.values[self.modality], crop, s.size, self.side) for crop in crops]
                counts.append(len(crops))
            ids = tokenizer.encode_batch(cut).reshape(len(cut), -1).astype(np.uint16)
            return [{column: rows} for rows in np.split(ids, np.cumsum(counts)[:-1])]

        return run


@functools.lru_cache(maxsize=64)
def _shape(checkpoint: str, sha256: str) -> tuple[int, int]:
    from model.tokenizers.vqvae import VQVAE

    tokenizer = VQVAE.load(weights.resolve(checkpoint))
    rows, cols = tokenizer.grid
    return tokenizer.vocab_size, rows * cols


def tokenizers_in(folder: str | Path) -> dict[str, Path]:
    """The map tokenizers of a folder, by modality: each is a file `<modality>.safetensors`."""
    found = {f.stem: f for f in sorted(Path(folder).glob("*.safetensors"))}
    if not found:
        raise FileNotFoundError(f"{folder} holds no <modality>.safetensors; `dataengine train-tokenizer` makes them")
    return found


def labelers(folder: str | Path, wanted: Sequence[str]) -> list[Labeler]:
    """The tokenizers of a folder for the wanted modalities (`depth`, `tok_depth@64`), all when none is named.

    A version is tokenised to a version of the tokens: `depth@v2` to `tok_depth@64@v2`.
    """
    from model.tokenizers.vqvae import VQVAE

    found = tokenizers_in(folder)
    out: list[Labeler] = []
    for column in wanted or list(found):
        modality, version = modalities.split(column.removeprefix("tok_"))
        name = modality.split("@")[0]
        if name not in found:
            raise ValueError(f"no tokenizer for {name!r} in {folder}; it holds: {', '.join(found)}")
        side = VQVAE.load(found[name]).config.image_size
        tokenizer = Tokenize(modality=name, checkpoint=str(found[name]), side=side)
        reads = ((name, f"{name}@{version}"),)
        out.append(Versioned(inner=tokenizer, column_version=version, reads=reads) if version else tokenizer)
    return out
