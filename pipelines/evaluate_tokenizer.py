"""Judge a tokenizer: how well it gives samples back, how it uses its codebook, and what its tokens cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import modalities, weights
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from model import domains, perceptual, tokenizers
from model.domains import Domain
from model.tokenizers._vq import VQ
from pipelines import label, reconstruction
from pipelines.label_batches import Example, LabelBatches, source_of
from pipelines.pack import is_random
from pipelines.tokenizer_health import codebooks, decoded, encoded

_BY_DOMAIN = {
    "rgb": "rgb", "depth": "depth", "normal": "normal", "semseg": "semseg", "edges": "canny_edge",
    "sam_mask": "sam_mask", "poses": "human_poses",
}  # fmt: skip
"""The modality that a domain is of, where it says it."""


@dataclass(frozen=True)
class Score:
    """One metric: the tokenizer's, that of the best constant, and what 4M-21's tokenizers reach on other data."""

    metric: str
    value: float
    constant: float
    larger_is_better: bool
    paper: float | None = None
    paper_data: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was found of `samples` values; bits are of one of them, `entropy_bits` if each code cost what it carries."""

    file: str
    sha256: str
    kind: str
    modality: str
    root: str
    samples: int
    side: int
    tokens: int
    vocab_size: int
    bits: float
    entropy_bits: float
    usage: float
    codes_used: int
    codes: int
    perplexity: float
    random: bool
    scores: tuple[Score, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN as null."""
        found = asdict(self)
        for score in found["scores"]:
            score.update({k: None for k, v in score.items() if isinstance(v, float) and not math.isfinite(v)})
        return found


@dataclass(frozen=True)
class Pair:
    """An original and what came back."""

    example: Example
    made: Any


def evaluate(
    file: str,
    root: str,
    *,
    samples: int = 256,
    modality: str = "",
    steps: int = 25,
    side: int | None = None,
    device: str = "auto",
    makers: Sequence[Labeler] | None = None,
) -> tuple[Judgement, Domain, list[Pair]]:
    """Encode and decode the first values of a dataset, whose crops are the central ones, in float32.

    `steps` is for diffusion decoders. Features are made by the first of `makers` (by default all labelers) that makes
    them. ValueError for a tokenizer whose file does not say what it is of, when `modality` does not either, and for
    labels that come from random weights.
    """
    path = weights.resolve(file) if not Path(file).is_dir() else Path(file)
    model = tokenizers.read(path, domain=_told(modality))
    name = modality or _modality(model, Path(file))
    dataset = Dataset(root)
    chosen = label.pick_device(device)
    teacher = _teacher(name, dataset, makers)
    source = source_of(name, (dataset,), teacher, chosen)
    if is_random(dataset, source.columns[0]):
        raise ValueError(f"{source.columns[0]} of {dataset.store.name} comes from random weights: it cannot judge")
    batches = LabelBatches(
        datasets=(dataset,),
        source=source,
        domain=model.domain,
        sides=(side or model.image_size,),
        batch_size=1,
        seed=0,
    )
    examples = batches.examples(samples)
    if not examples:
        raise ValueError(f"{root} holds no {name}, expected at least one value")
    model.to(chosen).eval()
    values = [example.value for example in examples]
    ids = encoded(model, values)
    made = decoded(model, ids, steps)
    judged = _judge(file, path, root, name, model, ids, made, values, side or model.image_size)
    true = reconstruction.comparable(model.domain, values)
    pairs = [Pair(e._replace(value=t), m) for e, t, m in zip(examples, true, made, strict=True)]
    return judged, model.domain, pairs


def _judge(
    file: str, path: Path, root: str, name: str, model: VQ, ids: Any, made: list[Any], values: list[Any], side: int
) -> Judgement:
    domain = model.domain
    true = reconstruction.comparable(domain, values)
    own = reconstruction.figures(domain, made, true)
    best = reconstruction.constant(domain, true)
    alone = reconstruction.figures(domain, [best] * len(true), true)
    seen = reconstruction.usage(ids, model.vocab_size, codebooks(model))
    about = weights.describe(str(path), licence="") if path.is_file() else None
    num_tokens = math.prod(ids.shape[1:])
    return Judgement(
        file=file,
        sha256="" if about is None else about.sha256,
        kind=type(model).__name__,
        modality=name,
        root=root,
        samples=len(values),
        side=side,
        tokens=num_tokens,
        vocab_size=model.vocab_size,
        bits=num_tokens * math.log2(model.vocab_size),
        entropy_bits=num_tokens * math.log2(max(seen.perplexity, 1.0)),
        usage=seen.share,
        codes_used=seen.used,
        codes=seen.entries,
        perplexity=seen.perplexity,
        random=about is not None and about.random,
        scores=tuple(_score(domain, metric, value, alone[metric], len(values)) for metric, value in own.items()),
        notes=_notes(domain, ids, seen),
    )


def _score(domain: Domain, metric: str, value: float, constant: float, num: int) -> Score:
    known = reconstruction.BOUNDS.get(domain.name)
    paper = known if known is not None and known[0] == metric else None
    if metric == "kNN agreement":
        constant = min(reconstruction.NEIGHBOURS, (num - 1) // 2) / max(num - 1, 1)  # all are as near: chance
    return Score(
        metric,
        value,
        constant,
        metric in reconstruction.LARGER_IS_BETTER,
        None if paper is None else paper[1],
        "" if paper is None else paper[2],
    )


def _notes(domain: Domain, ids: np.ndarray, seen: reconstruction.Usage) -> tuple[str, ...]:
    """What a reader must know so as not to be misled."""
    found = []
    if isinstance(domain, domains.Rgb) and not perceptual.lpips_weights("vgg").exists():
        file = perceptual.lpips_weights("vgg").name
        found.append(f"no LPIPS: the weights of its network ({file}) are not in torchvision's folder")
    if ids.size < 10 * seen.entries:
        found.append(f"{ids.size} tokens are too few to tell unused codes of {seen.entries} from rare ones")
    if isinstance(domain, domains.Poses):
        found.append("joints are those of a stick figure of ordinary proportions, not of SMPL's body")
    if isinstance(domain, domains.Depth) and domain.mapping == "standardised":
        found.append("depth is standardised crop by crop: scale is lost, and errors are in deviations")
    return tuple(found)


def _told(modality: str) -> Domain | None:
    """The domain of a modality that a file of ml-4m may not say, where the modality says it."""
    name = modalities.split(modality)[0] if modality else ""
    return domains.Edges() if name == "sam_edge" else None


def _modality(model: VQ, file: Path) -> str:
    """By the domain, or by the name of the file, as `train-tokenizer` gives it."""
    stem = file.stem
    name = _BY_DOMAIN.get(model.domain.name, "")
    if name and not (name == "canny_edge" and stem == "sam_edge"):
        return name
    if stem in modalities.names():
        return stem
    raise ValueError(f"{file} is a tokenizer of {model.domain.name}, expected --modality, or a file named by it")


def _teacher(modality: str, dataset: Dataset, makers: Sequence[Labeler] | None) -> Labeler | None:
    """Who makes the features of the crops; None for labels, and for features that lie there."""
    known = modality in modalities.names()  # a teacher may make what is no modality
    if known and (modalities.load(modality).kind not in ("grid", "vector") or dataset.committed(modality)):
        return None
    found = label.default_labelers() if makers is None else makers
    maker = next((one for one in found if modality in one.emits), None)
    if maker is None:
        raise ValueError(f"no labeler makes {modality}, and {dataset.store.name} holds none")
    return maker
