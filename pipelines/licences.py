"""What the licences of weights allow: the `permissive` profile refuses weights that may not be used commercially."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from dataengine import evolve, plugins, weights
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from dataengine.storage import redacted
from dataengine.versions import Versioned

Terms = Literal["free", "conditional", "inherited", "unknown", "forbidden"]
"""free: use at will; conditional: commercial use under conditions; inherited: that of its training data; forbidden: no
commercial use."""

STRICTNESS: tuple[Terms, ...] = ("free", "conditional", "inherited", "unknown", "forbidden")
"""From the most to the least permissive."""

_FREE = (
    *("apache-2.0", "mit", "bsd-2", "bsd-2-clause", "bsd-3", "bsd-3-clause", "isc", "unlicense", "cc0-1.0"),
    *("cc-by-3.0", "cc-by-4.0", "public-domain", "none-random-weights"),
)
_CONDITIONAL = {
    "cc-by-sa-3.0": "what is made from it is shared alike",
    "cc-by-sa-4.0": "what is made from it is shared alike",
    "openrail++": "uses that it lists are excluded",
    "rail++-m": "uses that it lists are excluded",
    "creativeml-openrail-m": "uses that it lists are excluded",
    "dinov3-license": "Meta's terms, which exclude some uses",
    "sam-license": "Meta's terms, which exclude some uses",
    "apple-sample-code": "Apple's terms; no patents are granted",
}
_INHERITED = ("as-the-data-it-was-trained-on",)
# Whole words of a normalised name. Omnidata's licence (clause 9) and the body models of SMPL are non-commercial
# whatever the code around them is; PML needs a paid plan.
_FORBIDDEN = re.compile(
    r"\b(nc|non-?commercial|research|academic|omnidata|smplx?|dsine|imperial|amlr|naver|mpi|pml|commercial-use-forbidden)\b"
)

_VITDET = "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/cascade_mask_rcnn_vitdet_"

PUBLISHED = {
    "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth": "Apache-2.0",
    "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth": "Apache-2.0",
    "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth": "Apache-2.0",
    "facebook/sam2.1-hiera-large": "Apache-2.0",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth": "Apache-2.0",
    f"{_VITDET}h/f328730692/model_final_f05665.pkl": "CC-BY-SA-3.0",
    f"{_VITDET}l/f328021305/model_final_1a9f28.pkl": "CC-BY-SA-3.0",
    f"{_VITDET}b/f325358525/model_final_435fa9.pkl": "CC-BY-SA-3.0",
    "timm/vit_base_patch16_clip_224.openai": "MIT",
    "google/t5-v1_1-xxl": "Apache-2.0",
    "city96/t5-v1_1-xxl-encoder-bf16": "Apache-2.0",
    "florence-community/Florence-2-large": "MIT",
    "florence-community/Florence-2-base": "MIT",
    "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth": "CC-BY-NC-SA-4.0",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "MIT",
    "google/siglip2-base-patch16-224": "Apache-2.0",
    "timm/vit_base_patch16_dinov3.lvd1689m": "DINOv3-license",
    "facebook/dinov3-vitb16-pretrain-lvd1689m": "DINOv3-license",
    "https://people.eecs.berkeley.edu/~jathushan/projects/4dhumans/hmr2_data.tar.gz": "MIT (code), research (SMPL)",
    "usyd-community/vitpose-base-simple": "Apache-2.0",
    "facebook/mask2former-swin-base-coco-panoptic": "CC-BY-NC-4.0",
    "tue-mps/coco_panoptic_eomt_large_640": "MIT",
    "ustc-community/dfine-xlarge-obj2coco": "Apache-2.0",
    "https://zenodo.org/records/10447888/files/omnidata_dpt_depth_v2.ckpt": "Omnidata EULA (non-commercial research)",
    "https://zenodo.org/records/10447888/files/omnidata_dpt_normal_v2.ckpt": "Omnidata EULA (non-commercial research)",
    "prs-eth/marigold-normals-v1-1": "RAIL++-M",
    "depth-anything/Depth-Anything-V2-Small-hf": "Apache-2.0",
    "depth-anything/Depth-Anything-V2-Base-hf": "CC-BY-NC-4.0",
    "depth-anything/Depth-Anything-V2-Large-hf": "CC-BY-NC-4.0",
    "depth-anything/DA3MONO-LARGE": "Apache-2.0",
    "depth-anything/DA3METRIC-LARGE": "Apache-2.0",
    "apple/DepthPro-hf": "Apple AMLR (research)",
    "Ruicheng/moge-2-vitl-normal": "MIT",
}
"""Licences of published checkpoints, by the name a `checkpoint` setting has: known before anything is downloaded."""


def terms(licence: str) -> Terms:
    """What a licence allows, by its name, or as somebody has stated it (`dataengine.weights.stated`)."""
    name = _normalised(licence)
    if name.endswith("commercial-use-allowed"):
        return "conditional"
    if name in _FREE:
        return "free"
    if name in _CONDITIONAL:
        return "conditional"
    if name in _INHERITED:
        return "inherited"
    return "forbidden" if _FORBIDDEN.search(name) else "unknown"


def conditions(licence: str) -> str:
    """Under which conditions a licence allows commercial use, in words; empty when there are none or it does not."""
    return _CONDITIONAL.get(_normalised(licence), "")


def _normalised(licence: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-")


def refuse_restricted(labelers: Sequence[Labeler], dataset: Dataset | None = None) -> None:
    """ValueError when weights of these labelers may not be used commercially, or nobody says that they may.

    It names each such labeler, its weights and licence, and what could stand in. With a dataset, the columns that they
    read there are held to the same, and so is what those were made from.
    """
    refused = []
    for labeler in labelers:
        own = labeler.inner if isinstance(labeler, Versioned) else labeler
        checkpoint, licence, found = _weights_terms(own)
        if found not in ("free", "conditional"):
            refused.append(
                f"{labeler.name} ({', '.join(labeler.emits)}) with {redacted(checkpoint)}, {_said(licence, found)}; "
                + _remedy(own, checkpoint, found)
            )
    if dataset is not None:
        made = {m for labeler in labelers for m in labeler.emits}
        read = {m for labeler in labelers for m in labeler.inputs} - made
        refused += [
            f"the column {m}, an input, comes from weights under {why}" for m, why in _restricted(dataset, read)
        ]
    if refused:
        raise ValueError("the permissive profile refuses " + "; and ".join(refused))


def _said(licence: str, found: Terms) -> str:
    if found == "forbidden":
        return f"whose licence, {licence}, forbids commercial use"
    return f"whose licence is not known{f' ({licence})' if licence else ''}"


def _weights_terms(labeler: Labeler) -> tuple[str, str, Terms]:
    """The checkpoint of a labeler, its licence and what that allows; what a labeler says of its weights holds for its
    default checkpoint only, for another file somebody has to state it."""
    setting = {f.name: f for f in fields(labeler)}.get("checkpoint")
    checkpoint = "" if setting is None else str(getattr(labeler, "checkpoint"))  # noqa: B009
    published = PUBLISHED.get(checkpoint) or PUBLISHED.get(checkpoint.partition("@")[0])
    if published is not None:
        return checkpoint, published, terms(published)
    made = labeler.weights()
    if made is None:
        return checkpoint, "", "free"
    if made.random:
        return made.source, made.licence, "free"
    found = terms(made.licence)
    if setting is None or checkpoint == setting.default or found == "forbidden" or _is_stated(checkpoint):
        return checkpoint or made.source, made.licence, found
    return checkpoint, "", "unknown"


def _is_stated(checkpoint: str) -> bool:
    """Whether a licence is stated beside a local checkpoint, or in a local folder of one."""
    path = Path(checkpoint).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.card.json")) if checkpoint and path.is_dir() else []
    cards = [weights.stated(file.with_name(file.name.removesuffix(".card.json"))) for file in files]
    return any({"licence", "commercial"} & set(card) for card in cards)


def _remedy(labeler: Labeler, checkpoint: str, found: Terms) -> str:
    lines = []
    if found != "forbidden":
        file = checkpoint if Path(checkpoint).expanduser().is_file() else "FILE"
        lines.append(
            f'to state it, write {{"licence": "Apache-2.0"}} to {file}.card.json beside '
            + ("the file" if file == checkpoint else "a local copy of the file")
            + ', with "commercial": true or false for a licence that is not known here'
        )
    ins = stand_ins(labeler)
    lines.append(f"could stand in: {'; '.join(ins)}" if ins else "none yet could stand in")
    return "; ".join(lines)


def stand_ins(labeler: Labeler) -> list[str]:
    """What this program can run instead, for each modality of a labeler: labelers and checkpoints of free licences."""
    out = []
    for name in plugins.names("labelers"):
        kind = plugins.load("labelers", name, Labeler)
        other = kind()
        covered = [m for m in labeler.emits if m in other.emits]
        setting = {f.name: f for f in fields(other)}.get("checkpoint")
        licence = "" if setting is None else PUBLISHED.get(str(setting.default), "")
        if not covered or (setting is not None and terms(licence) not in ("free", "conditional")):
            continue
        if setting is None:
            if type(labeler) is not kind:
                out.append(f"{name} for {', '.join(covered)} ({_about(kind)} No weights)")
        else:
            out.append(f"{name} with {name}.checkpoint={setting.default} for {', '.join(covered)} ({licence})")
    return out


def _about(kind: type[Labeler]) -> str:
    module = inspect.getmodule(kind)
    return (inspect.getdoc(module) or "").partition("\n")[0]


def _restricted(dataset: Dataset, columns: Iterable[str]) -> list[tuple[str, str]]:
    """Of some columns those that come from restricted weights, directly or through what they were made from."""
    sources = evolve.made_from(dataset)
    out = []
    for column in sorted(set(columns) & set(sources)):
        seen, left = set(), [column]
        while left:
            one = left.pop()
            if one in seen or one not in sources:
                continue
            seen.add(one)
            left += sources[one]
            made = evolve.existing(dataset, one, dataset.committed(one)[0]).provenance.get("weights")
            if made and not made["random"] and terms(made["licence"]) not in ("free", "conditional"):
                out.append((column, f"{made['licence']} ({one}, {made['source']})"))
    return out
