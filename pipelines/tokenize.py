"""Tokenise: a tokenizer is a labeler. That of a map reads a label and the crop settings; that of dense features reads
the image, for features are made on the way to their tokens and never stored."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import modalities, weights
from dataengine.geometry import Crop, crops_of, cut
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.sample import Sample
from dataengine.versions import Versioned
from dataengine.weights import Weights
from pipelines import label as labelling


@dataclass(frozen=True, kw_only=True)
class Tokenize(Labeler):
    """One modality into tokens at one resolution, every crop of the crop settings: ml-4m's `tok_<modality>@<side>`.

    Features that are stored are of whole images, so only a crop that is the whole image can be tokenised from them.
    """

    batch_size = 32
    gpus = 0.1

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
        from model import tokenizers

        tokenizer = tokenizers.read(weights.resolve(self.checkpoint)).to(device)
        codec = modalities.load(self.modality)
        (column,) = self.emits

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            maps, counts = [], []
            for s in samples:
                crops = crops_of(s.values["crop_settings"])
                if codec.kind == "grid" and any(c != whole(s.size) for c in crops):
                    raise ValueError(f"{self.modality} is of the whole image, and a crop is less: see TokenizeFeatures")
                maps += [codec.crop(s.values[self.modality], crop, s.size, self.side) for crop in crops]
                counts.append(len(crops))
            return [{column: rows} for rows in _split(tokenizer.encode_batch(maps), counts)]

        return run


@dataclass(frozen=True, kw_only=True)
class TokenizeFeatures(Labeler):
    """Dense features of every crop into tokens, in one go: `tok_<modality>@<side>`, and no features on any disk.

    `features` labels the pixels of each crop, as ml-4m does: the features of a crop are not a crop of the features of
    its image. They are rounded to what would be stored. A feature costs less to compute than to read back.
    """

    modality: str
    checkpoint: str
    side: int
    features: Labeler

    def __post_init__(self) -> None:
        if self.modality not in self.features.emits or set(self.features.inputs) != {"rgb"}:
            name, reads, emits = self.features.name, self.features.inputs, self.features.emits
            raise ValueError(f"expected a labeler of {self.modality} from rgb, {name} makes {emits} from {reads}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The image, and where to cut it."""
        return ("rgb", "crop_settings")

    @property
    def emits(self) -> tuple[str, ...]:
        """The token column."""
        return (f"tok_{self.modality}@{self.side}",)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """The feature network's; of its crops no more are in it at once either."""
        return self.features.batch_size

    @property
    def gpus(self) -> float:  # type: ignore[override]
        """The feature network's."""
        return self.features.gpus

    def weights(self) -> Weights:
        """The tokenizer's file, under the licence of the feature network, and random if either is."""
        own, network = weights.describe(self.checkpoint, licence=""), self.features.weights()
        licence = "as the data it was trained on" if network is None else network.licence
        return replace(own, licence=licence, random=own.random or self.features.random)

    def facts(self) -> dict[str, Any]:
        """As for a map, and what the features are."""
        own = weights.describe(self.checkpoint, licence="")
        vocab_size, num_tokens = _shape(self.checkpoint, own.sha256)
        network = self.features.weights()
        features = {**self.features.identity(), "weights": None if network is None else asdict(network)}
        return {"vocab_size": vocab_size, "num_tokens": num_tokens, "features": features}

    def identity(self) -> dict[str, Any]:
        """Of both: other features, other tokens."""
        settings = {"modality": self.modality, "side": self.side, "features": self.features.identity()}
        return {
            "labeler": self.name,
            "version": self.version,
            "settings": settings,
            "weights": weights.describe(self.checkpoint, licence="").sha256,
        }

    def load(self, device: str) -> Loaded:
        """Load the feature network and the VQ-VAE onto one device."""
        from model import tokenizers

        network = self.features.load(device)
        prepare, label = (network.prepare, network.label) if isinstance(network, Staged) else (lambda s: s, network)
        tokenizer = tokenizers.read(weights.resolve(self.checkpoint)).to(device)
        codec, at_once = modalities.load(self.modality), self.features.batch_size
        (column,) = self.emits

        def prepared(sample: Sample) -> list[Any]:
            crops = crops_of(sample.values["crop_settings"])
            return [prepare(Sample(sample.key, {"rgb": cut(sample.rgb, crop)})) for crop in crops]

        def run(images: Sequence[list[Any]]) -> list[dict[str, Any]]:
            crops = [crop for image in images for crop in image]
            ids = []
            for start in range(0, len(crops), at_once):
                made = [output[self.modality] for output in label(crops[start : start + at_once])]
                for value in made:
                    codec.check(value, (1, 1))
                ids.append(tokenizer.encode_batch(made))
            return [{column: rows} for rows in _split(np.concatenate(ids), [len(image) for image in images])]

        return Staged(prepared, run)


def whole(size: tuple[int, int]) -> Crop:
    """The crop that is all of an image of (h, w) pixels."""
    return Crop(0, 0, *size)


def _split(ids: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Ids (crops, rows, columns) of several images as uint16 (crops, tokens) for each."""
    return np.split(ids.reshape(len(ids), -1).astype(np.uint16), np.cumsum(counts)[:-1])


@functools.lru_cache(maxsize=64)
def _shape(checkpoint: str, sha256: str) -> tuple[int, int]:
    from model import tokenizers

    tokenizer = tokenizers.read(weights.resolve(checkpoint))
    return tokenizer.vocab_size, math.prod(tokenizer.grid)


def tokenizers_in(folder: str | Path) -> dict[str, Path]:
    """The map tokenizers of a folder, by modality: each is a file `<modality>.safetensors`."""
    found = {f.stem: f for f in sorted(Path(folder).glob("*.safetensors"))}
    if not found:
        raise FileNotFoundError(f"{folder} holds no <modality>.safetensors; `dataengine train-tokenizer` makes them")
    return found


def labelers(folder: str | Path, wanted: Sequence[str], makers: Sequence[Labeler] | None = None) -> list[Labeler]:
    """The tokenizers of a folder for the wanted modalities (`depth`, `tok_depth@64`), all when none is named.

    A version is tokenised to a version of the tokens: `depth@v2` to `tok_depth@64@v2`. Dense features are made on the
    way, by the first of `makers` (`label.candidates`; by default every labeler with its default settings).
    """
    from model import tokenizers

    found = tokenizers_in(folder)
    out: list[Labeler] = []
    for column in wanted or list(found):
        modality, version = modalities.split(column.removeprefix("tok_"))
        name = modality.split("@")[0]
        if name not in found:
            raise ValueError(f"no tokenizer for {name!r} in {folder}; it holds: {', '.join(found)}")
        side = tokenizers.read(found[name]).image_size
        tokenizer: Labeler = Tokenize(modality=name, checkpoint=str(found[name]), side=side)
        reads: tuple[tuple[str, str], ...] = ((name, f"{name}@{version}"),)
        if modalities.load(name).kind == "grid":
            makers = labelling.default_labelers() if makers is None else makers
            features = next(maker for maker in makers if name in maker.emits)
            tokenizer = TokenizeFeatures(modality=name, checkpoint=str(found[name]), side=side, features=features)
            reads = ()
        out.append(Versioned(inner=tokenizer, column_version=version, reads=reads) if version else tokenizer)
    return out
