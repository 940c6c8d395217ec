"""Tokenise: a tokenizer is a labeler. That of a map reads a label and the crop settings; that of features reads the
image, for features are made on the way to their tokens and never stored. Those of the image share its crops."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dataengine import modalities, weights
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.plan import LabelPlan, plan_labels
from dataengine.versions import Versioned
from dataengine.weights import Weights
from pipelines import _sources, licences, tokens
from pipelines import label as labelling
from pipelines.tokenize_instances import TokenizeMasks, TokenizePoses
from pipelines.tokens import AT_ONCE, Exact, Precision


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
    precision: Exact = "float32"
    at_once: int = AT_ONCE
    compiled: bool = False
    ml4m_names: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The map, and where to cut it."""
        return (self.modality, "crop_settings")

    @property
    def emits(self) -> tuple[str, ...]:
        """The token column."""
        return (tokens.column(self.modality, self.side, ml4m=self.ml4m_names),)

    def weights(self) -> Weights:
        """The tokenizer's file."""
        return weights.describe(self.checkpoint, licence=tokens.LICENCE)

    def facts(self) -> dict[str, Any]:
        """The size of the vocabulary, and the number of tokens of one crop and their shape: what packing asks."""
        return shape(self.checkpoint, self.weights().sha256, self.side)

    def identity(self) -> dict[str, Any]:
        """As of every labeler, but what the column is called does not decide what is in it."""
        found = super().identity()
        return {**found, "settings": {k: v for k, v in found["settings"].items() if k != "ml4m_names"}}

    def load(self, device: str) -> Loaded:
        """Load the tokenizer's encoder."""
        return _sources.load([_wanted(self)], device)


@dataclass(frozen=True, kw_only=True)
class TokenizeFeatures(Labeler):
    """Features of every crop into tokens, in one go: `tok_<modality>@<side>`, and no features on any disk.

    `features` labels the pixels of each crop, as ml-4m does: the features of a crop are not a crop of the features of
    its image. They are rounded to what would be stored. A feature costs less to compute than to read back. Of one
    vector a crop (`DINOv2-B14-global`) the tokens are `tok_DINOv2-B14_global`.
    """

    modality: str
    checkpoint: str
    side: int
    features: Labeler
    precision: Exact = "float32"
    compiled: bool = False
    ml4m_names: bool = False

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
        return (tokens.column(self.modality, self.side, ml4m=self.ml4m_names),)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """The feature network's; of its crops no more are in it at once either."""
        return self.features.batch_size

    @property
    def at_once(self) -> int:
        """Crops that are in the networks at once: the feature network's batch."""
        return self.features.batch_size

    @property
    def gpus(self) -> float:  # type: ignore[override]
        """The feature network's."""
        return self.features.gpus

    def weights(self) -> Weights:
        """The tokenizer's file, under the stricter of both licences, and random if either network is."""
        own, network = weights.describe(self.checkpoint, licence=tokens.LICENCE), self.features.weights()
        if network is None:
            return own
        names = sorted((own.licence, network.licence), key=lambda name: licences.STRICTNESS.index(licences.terms(name)))
        return replace(own, licence=names[-1], random=own.random or self.features.random)

    def facts(self) -> dict[str, Any]:
        """As for a map, and what the features are."""
        own = weights.describe(self.checkpoint, licence="")
        network = self.features.weights()
        features = {**self.features.identity(), "weights": None if network is None else asdict(network)}
        return {**shape(self.checkpoint, own.sha256, self.side), "features": features}

    def identity(self) -> dict[str, Any]:
        """Of both: other features, other tokens."""
        names = ("modality", "side", "precision", "compiled")
        settings = {name: getattr(self, name) for name in names}
        return {
            "labeler": self.name,
            "version": self.version,
            "settings": {**settings, "features": self.features.identity()},
            "weights": weights.describe(self.checkpoint, licence="").sha256,
        }

    def load(self, device: str) -> Loaded:
        """Load the feature network and the tokenizer's encoder onto one device."""
        return _sources.load([_wanted(self)], device)


@dataclass(frozen=True, kw_only=True)
class TokenizeGroup(Labeler):
    """Tokenizers that read the same columns, on one decoded batch and its crops.

    The image is cut once for all of them, and a feature network that several need runs once: the dense tokens and the
    global ones of DINOv2 come from one pass. Each column has the identity, the provenance and the bytes that its own
    tokenizer would have given alone, so that tokenizers may come and go.
    """

    members: tuple[Tokenize | TokenizeFeatures, ...]

    def __post_init__(self) -> None:
        reads = {member.inputs for member in self.members}
        if len(reads) != 1:
            raise ValueError(f"expected tokenizers that read the same columns, got {sorted(reads)}")
        if len(set(self.emits)) < len(self.emits):
            raise ValueError(f"expected tokenizers of different columns, got {', '.join(self.emits)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """What each of them reads."""
        return self.members[0].inputs

    @property
    def emits(self) -> tuple[str, ...]:
        """The token columns."""
        return tuple(column for member in self.members for column in member.emits)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """The largest of theirs; how many crops are in each at once is its own affair."""
        return max(member.batch_size for member in self.members)

    @property
    def gpus(self) -> float:  # type: ignore[override]
        """The largest share of theirs, for they take turns."""
        return max(member.gpus for member in self.members)

    def of_column(self, column: str) -> Labeler:
        """The tokenizer that makes it."""
        return next(member for member in self.members if column in member.emits)

    def identity(self) -> dict[str, Any]:
        """Of all of them."""
        settings = {"members": [member.identity() for member in self.members]}
        return {"labeler": self.name, "version": self.version, "settings": settings, "weights": None}

    @property
    def random(self) -> bool:
        """Whether any of them is."""
        return any(member.random for member in self.members)

    def load(self, device: str) -> Loaded:
        """Load every encoder, and every feature network once."""
        return _sources.load([_wanted(member) for member in self.members], device)


def grouped(labelers: Sequence[Labeler]) -> list[Labeler]:
    """The same tokenizers, those that read the image and the crop settings as one group."""
    of_image = [x for x in labelers if isinstance(x, Tokenize | TokenizeFeatures) and x.inputs[0] == "rgb"]
    if len(of_image) < 2:
        return list(labelers)
    return [TokenizeGroup(members=tuple(of_image)), *(x for x in labelers if x not in of_image)]


def plan_of(dataset: Dataset, labelers: Sequence[Labeler], *, permissive: bool = False) -> LabelPlan:
    """The label plan of all that some tokenizers make, those of the image as one group.

    ValueError when a column cannot hold what its tokenizer makes; and, with `permissive`, when a tokenizer, a feature
    network, or what made a column that they read may not be used commercially.
    """
    for member in networks(labelers):
        if isinstance(member, Tokenize | TokenizeFeatures):
            shape(member.checkpoint, weights.describe(member.checkpoint, licence="").sha256, member.side)
    if permissive:
        licences.refuse_restricted(networks(labelers), dataset)
    return plan_labels(dataset, [column for x in labelers for column in x.emits], grouped(labelers))


def networks(labelers: Sequence[Labeler]) -> list[Labeler]:
    """Every tokenizer and every feature network by itself, whose licences can differ."""
    out: list[Labeler] = []
    for labeler in labelers:
        own = labeler.inner if isinstance(labeler, Versioned) else labeler
        for member in own.members if isinstance(own, TokenizeGroup) else (own,):
            out.append(member)
            if isinstance(member, TokenizeFeatures):
                out.append(member.features)
    return out


def _wanted(member: Tokenize | TokenizeFeatures) -> _sources.Wanted:
    return _sources.Wanted(
        column=member.emits[0],
        modality=member.modality,
        file=str(weights.resolve(member.checkpoint)),
        precision=member.precision,
        compiled=member.compiled,
        side=member.side,
        at_once=member.at_once,
        features=member.features if isinstance(member, TokenizeFeatures) else None,
    )


@functools.lru_cache(maxsize=64)
def shape(checkpoint: str, sha256: str, side: int = 0) -> dict[str, Any]:
    """`vocab_size`, `num_tokens` and `grid` of what a tokenizer makes of maps of a side, or of vectors.

    ValueError where a token column cannot hold what it makes.
    """
    from model import tokenizers

    tokenizer = tokenizers.read(weights.resolve(checkpoint), encoder_only=True)
    if tokenizer.vocab_size > tokens.LARGEST_VOCABULARY:
        raise ValueError(
            f"{checkpoint}: a vocabulary of {tokenizer.vocab_size} ids, expected at most {tokens.LARGEST_VOCABULARY}: "
            "tokens are int16 on disk"
        )
    *heads, rows, columns = tokenizer.grid
    if (rows, columns) == (1, 1):
        grid = tuple(heads) or (1,)
    else:
        patch = tokenizer.config.patch_size
        if side % patch:
            raise ValueError(f"{checkpoint}: side {side}, expected a multiple of the patch of {patch} pixels")
        grid = (*heads, *((side // patch,) * 2 if side else (rows, columns)))
    return {"vocab_size": tokenizer.vocab_size, "num_tokens": math.prod(grid), "grid": list(grid)}


# -- finding ----------------------------------------------------------------------------------------------------------


def tokenizers_in(folder: str | Path) -> dict[str, Path]:
    """The network tokenizers of a folder, by modality: each is a file `<modality>.safetensors`."""
    found = {f.stem: f for f in sorted(Path(folder).glob("*.safetensors"))}
    if not found:
        raise FileNotFoundError(f"{folder} holds no <modality>.safetensors; `dataengine train-tokenizer` makes them")
    return found


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How tokenizers run, where it is not the default."""

    side: int = 0
    """Pixels of a crop; 0 for those of each tokenizer."""
    precision: Precision = "auto"
    device: str = "auto"
    """Where they will run: what precision "auto" depends on, and nothing else."""
    compiled: bool = False
    ml4m_names: bool = False


def labelers(
    folder: str | Path,
    wanted: Sequence[str],
    makers: Sequence[Labeler] | None = None,
    choice: Choice = Choice(),
) -> list[Labeler]:
    """The tokenizers of a folder for the wanted modalities (`depth`, `tok_depth@64`), all when none is named.

    A version is tokenised to a version of the tokens: `depth@v2` to `tok_depth@64@v2`. Features are made on the way,
    by the first of `makers` (`label.candidates`; by default every labeler with its default settings). The tokenizer of
    canny edges is that of SAM's, too, where that has none of its own, as in ml-4m. Precision "auto" is decided here, so
    that wherever the rest of a column is made it is of one precision.
    """
    found = tokenizers_in(folder)
    out: list[Labeler] = []
    for column in wanted or list(found):
        version = modalities.split(column)[1]
        name, side = tokens.modality_of(column)
        file = found.get(name) or (found.get("canny_edge") if name == "sam_edge" else None)
        if file is None:
            raise ValueError(f"no tokenizer for {name!r} in {folder}; it holds: {', '.join(found)}")
        tokenizer = _labeler(name, str(file), side or choice.side, makers, choice)
        own = () if isinstance(tokenizer, TokenizeFeatures) else tokenizer.inputs[:1]
        reads = tuple((m, f"{m}@{version}") for m in own)
        out.append(Versioned(inner=tokenizer, column_version=version, reads=reads) if version else tokenizer)
    return out


def _labeler(name: str, file: str, side: int, makers: Sequence[Labeler] | None, choice: Choice) -> Labeler:
    precision = tokens.exact(choice.precision, choice.device)
    how: dict[str, Any] = {"checkpoint": file, "precision": precision, "compiled": choice.compiled}
    if name == "human_poses":
        return TokenizePoses(**how)
    if name == "sam_mask":
        return TokenizeMasks(**how)
    how |= {"modality": name, "ml4m_names": choice.ml4m_names}
    # What is no modality is the features of a labeler of one's own.
    if name in modalities.names() and modalities.load(name).kind not in _sources.WHOLE:
        return Tokenize(**how, side=side or own_side(file))
    makers = labelling.default_labelers() if makers is None else makers
    features = next((maker for maker in makers if name in maker.emits), None)
    if features is None:
        raise ValueError(f"no labeler makes {name}, expected one of them among: {', '.join(m.name for m in makers)}")
    seen = int(getattr(features, "side", side or own_side(file)))
    if side not in (0, seen):
        raise ValueError(f"{name} at {side} pixels, but {features.name} sees {seen}: set {features.name}.side={side}")
    return TokenizeFeatures(**how, side=seen, features=features)


def own_side(file: str) -> int:
    """The side of the maps that a tokenizer was made for."""
    from model import tokenizers

    return tokenizers.read(file, encoder_only=True).image_size
