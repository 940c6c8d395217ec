"""Writes masking.npz: how ml-4m's UnifiedMasking distributes tokens and spans, and what it does with given draws.

The reference is https://github.com/apple/ml-4m at commit COMMIT below, of which fourm/data/masking.py alone is run, as
it is. From the root of this repository, with the reference checked out at DIR (140,000 samples: some ten minutes):

    PYTHONPATH=. python tests/golden/make_masking.py DIR [DRAWS]

Draw i of a component masks sample i % len(samples()). Of every draw and modality the file counts what `FIGURES` names.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from model.spec import EOS, NUM_SENTINELS, PAD, SENTINEL_0, ModalitySpec

COMMIT = "cda590faa3b9f022c28537193d3e1650527646a3"
FILE = Path(__file__).with_name("masking.npz")
DRAWS = 20_000
SEED = 29
INPUT_TOKENS = TARGET_TOKENS = (128, 256)
WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5)
FIGURES = ("inputs", "targets", "input_sentinels", "target_sentinels", "first_sentinel", "first_span")
"""Tokens a sample: kept as input, predicted; sentinels of either; number of the target's first one, ids after it."""

_SEQUENCES = {"caption": 256, "color_palette": 23, "det": 256, "human_poses": 275, "metadata": 40, "sam_instance": 290}
_GRIDS = {
    **dict.fromkeys(("canny_edge@224", "clip@224", "depth@224", "normal@224", "rgb@224", "sam_edge@224"), 196),
    "semseg@224": 196,
    "dinov2@224": 256,
    "imagebind@224": 256,
    "dinov2_global": 16,
    "imagebind_global": 16,
}
_LENGTHS = {
    "caption": (12, 20, 40, 300),
    "color_palette": (4, 13, 22, 22),
    "det": (0, 10, 45, 265),
    "human_poses": (0, 40, 80, 274),
    "metadata": (12, 20, 38, 38),
    "sam_instance": (60, 150, 289, 330),
}
"""Ids without EOS of each sample's text: nothing, what fits, what just fits, what is cut."""
_ROWS = (5, 17, 40, 90)


def specs() -> tuple[ModalitySpec, ...]:
    """The modalities that the 4M-21 mixture names."""
    found = [ModalitySpec(name="rgb@224", kind="pixels", max_tokens=196, patch_size=1)]
    found.append(ModalitySpec(name="t5_caption", kind="embeddings", max_tokens=77, dim_in=1))
    for name, n in _GRIDS.items():
        found.append(
            ModalitySpec(name=f"tok_{name}", kind="tokens", max_tokens=n, vocab_size=9, learned_positions=n == 16)
        )
    for name, n in _SEQUENCES.items():
        found.append(
            ModalitySpec(name=name, kind="sequence", max_tokens=n, vocab_size=9000, chunked=name == "metadata")
        )
    return tuple(sorted(found, key=lambda spec: spec.name))


def tables() -> list[tuple[dict[str, float], dict[str, float], dict[str, str]]]:
    """Concentrations of inputs and of targets, and keep schemes, of each component of the 4M-21 mixture."""
    names = [spec.name for spec in specs()]
    out = []
    for c in range(len(WEIGHTS)):
        even = (0.01, 0.1, 1.0, 10.0, 0.0, 0.05, 0.05)[c]
        inputs = dict.fromkeys(names, even)
        targets = dict.fromkeys(names, (0.01, 0.1, 1.0, 10.0, 0.5, 0.5, 0.5)[c])
        targets["rgb@224"] = 0.0
        if c == 4:
            inputs["rgb@224"] = 1000.0
        if c in (5, 6):
            biased, other = ("caption", "t5_caption") if c == 5 else ("t5_caption", "caption")
            inputs |= {biased: 5.0, other: 0.0}
            targets[biased] = 0.0
        keep = {name: "random" for name in (*_SEQUENCES, "t5_caption")} | {"color_palette": "binary"}
        if c in (5, 6):
            keep[biased] = "all"
        out.append((inputs, targets, keep))
    return out


def samples() -> list[dict[str, Any]]:
    """What is masked; ids of texts are never sentinels, rows of embeddings never zero."""
    rng = np.random.default_rng(SEED)
    out = []
    for i in range(len(_ROWS)):
        sample: dict[str, Any] = {"rgb@224": np.zeros((3, 14, 14), np.float32)}
        for name, n in _GRIDS.items():
            sample[f"tok_{name}"] = rng.integers(0, 9, n)
        for name, lengths in _LENGTHS.items():
            sample[name] = rng.integers(300, 9000, lengths[i]).tolist()
        pairs = sample["metadata"]
        sample["metadata"] = [pairs[k : k + 2] for k in range(0, len(pairs), 2)]
        sample["t5_caption"] = rng.uniform(1, 2, (_ROWS[i], 1)).astype(np.float32)
        out.append(sample)
    return out


def figures_of(inputs: Sequence[int], targets: Sequence[int]) -> tuple[int, ...]:
    """FIGURES of a sequence; a target of one id predicts nothing."""
    inside = [i for i in inputs if SENTINEL_0 <= i < SENTINEL_0 + NUM_SENTINELS]
    if len(targets) < 2:
        return len(inputs), 0, len(inside), 0, 0, 0
    places = [k for k, i in enumerate(targets) if SENTINEL_0 <= i < SENTINEL_0 + NUM_SENTINELS]
    first_span = (places[1] if len(places) > 1 else len(targets)) - 1
    return len(inputs), len(targets) - 1, len(inside), len(places), targets[0] - SENTINEL_0, first_span


class Words:
    """Stands in for the text tokenizer: a text is its ids in digits."""

    def token_to_id(self, token: str) -> int:
        """Ids of the two tokens that are asked for."""
        return {"[PAD]": PAD, "[EOS]": EOS}[token]

    def get_vocab(self) -> dict[str, int]:
        """The sentinels."""
        return {f"[S_{k}]": SENTINEL_0 + k for k in range(NUM_SENTINELS)}

    def encode(self, text: str) -> Any:
        """The ids of a text."""
        return SimpleNamespace(ids=[int(word) for word in text.split()])

    def encode_batch(self, texts: list[str]) -> list[Any]:
        """The ids of texts."""
        return [self.encode(text) for text in texts]


def reference(folder: Path) -> ModuleType:
    """fourm/data/masking.py of a checkout, without the rest of its package."""

    def sentinels(tokenizer: Any) -> dict[int, int]:
        return {int(k[3:-1]): v for k, v in tokenizer.get_vocab().items()}

    stubs = {
        "einops": {"rearrange": lambda x, _: x.T},
        "fourm": {},
        "fourm.data": {},
        "fourm.data.modality_transforms": {"get_transform_key": lambda name: name},
        "fourm.utils": {"to_2tuple": lambda x: x if isinstance(x, tuple) else (x, x)},
        "fourm.utils.tokenizer": {"get_sentinel_to_id_mapping": sentinels},
    }
    modules = {}
    for name, content in stubs.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
    spec = importlib.util.spec_from_file_location("ml4m_masking", folder / "fourm/data/masking.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules):
        spec.loader.exec_module(module)
    return module


def masker(module: ModuleType, components: Sequence[int]) -> Any:
    """ml-4m's UnifiedMasking with some components of the mixture."""
    types = {"pixels": "img", "tokens": "img", "sequence": "seq", "embeddings": "seq_emb"}
    tabled = [tables()[c] for c in components]
    info: dict[str, dict[str, Any]] = {}
    for s in specs():
        info[s.name] = {"min_tokens": 0, "max_tokens": s.max_tokens, "type": types[s.kind]}
        info[s.name] |= {
            "input_alphas": [t[0][s.name] for t in tabled],
            "target_alphas": [t[1][s.name] for t in tabled],
        }
        if not s.is_grid:
            info[s.name]["keep"] = [t[2][s.name] for t in tabled]
    weights = [WEIGHTS[c] for c in components]
    return module.UnifiedMasking(info, Words(), INPUT_TOKENS, TARGET_TOKENS, sampling_weights=weights)


def as_ml4m(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample in the form that UnifiedMasking takes."""
    out: dict[str, Any] = {}
    for name, value in sample.items():
        if name == "metadata":
            out[name] = [" ".join(map(str, chunk)) for chunk in value]
        else:
            out[name] = " ".join(map(str, value)) if isinstance(value, list) else torch.from_numpy(value)
    return out


def histograms(module: ModuleType, component: int, draws: int) -> NDArray[np.uint16]:
    """(modalities, figures, values 0..299): how often, in `draws` samples of ml-4m."""
    masking = masker(module, [component])
    values = [as_ml4m(sample) for sample in samples()]
    counts = np.zeros((len(specs()), len(FIGURES), 300), np.uint16)
    every = np.arange(len(FIGURES))
    for i in range(draws):
        masked = masking(values[i % len(values)])
        for m, spec in enumerate(specs()):
            one = masked[spec.name]
            inputs, targets = ~one["input_mask"], ~one["target_mask"]
            if spec.kind == "sequence":
                found = figures_of(one["tensor"][inputs].tolist(), one["tensor"][targets].tolist())
            elif spec.kind == "embeddings":
                found = (int(inputs.sum()), 0, int((one["tensor"][inputs] == 0).all(1).sum()), 0, 0, 0)
            else:
                found = (int(inputs.sum()), int(targets.sum()) if spec.is_target else 0, 0, 0, 0, 0)
            counts[m, every, found] += 1
    return counts


def given_draws(module: ModuleType) -> dict[str, NDArray[Any]]:
    """What the reference makes of draws that are given: budgets, spans with their truncation, and grids."""
    rng = np.random.default_rng(SEED)
    masking = masker(module, range(len(WEIGHTS)))
    caps = np.array([spec.max_tokens for spec in specs()])
    out: dict[str, list[Any]] = {name: [] for name in ("first", "fresh", "budget", "ids", "keep", "spans")}
    for total in (0, 1, 40, 255, 256, 700):
        first = rng.dirichlet(np.full(len(caps), 0.3)).astype(np.float32)
        left = total - int(np.floor(first * np.float32(total)).sum())
        fresh = rng.dirichlet(np.full(len(caps), 0.3), left).astype(np.float32)
        fed = mock.Mock(
            **{"sample.return_value": torch.from_numpy(first), "sample_n.return_value": torch.from_numpy(fresh)}
        )
        masking.input_dirichlets[0] = masking.target_dirichlets[0] = fed
        inputs = masking.input_token_budget(total, 0)
        targets = masking.target_token_budget(inputs, total, 0)
        out["first"].append(first)
        out["fresh"].append(np.pad(fresh.argmax(-1), (0, len(caps) - left), constant_values=-1))
        out["budget"].append([np.full(len(caps), total), inputs, targets])
    for _ in range(60):
        n, budget = int(rng.integers(1, 40)), int(rng.integers(0, 45))
        ids = rng.integers(300, 9000, n)
        draws = rng.random(n).astype(np.float32)
        share, chosen = float(rng.random()), int(rng.integers(0, 1000))
        with (
            mock.patch.object(module, "sample_uniform", return_value=share),
            mock.patch.object(module.torch, "rand", return_value=torch.from_numpy(draws)),
            mock.patch.object(module.np.random, "randint", chosen.__mod__),
        ):
            one = masking.sequence_token_mask(ids, 100, 60, budget, "random", 0)
        tensor = one["tensor"].numpy()
        inputs, targets = tensor[~one["input_mask"].numpy()], tensor[~one["target_mask"].numpy()]
        out["ids"].append(np.pad(ids, (0, 40 - n)))
        out["keep"].append([np.pad(draws <= share, (0, 40 - n)), np.arange(40) < n])
        padded = [np.pad(x, (0, 82 - len(x))) for x in (inputs, targets)]
        out["spans"].append([*padded, np.pad([budget, chosen], (0, 80))])
    return {f"given_{name}": np.array(values) for name, values in out.items()}


def main() -> None:
    """Write the file."""
    draws = int(sys.argv[2]) if len(sys.argv) > 2 else DRAWS
    torch.set_num_threads(1)
    module = reference(Path(sys.argv[1]))
    given = given_draws(module)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    counts = []
    for component in range(len(WEIGHTS)):
        counts.append(histograms(module, component, draws))
        print(f"component {component}", flush=True)
    note = f"ml-4m {COMMIT}, fourm/data/masking.py, torch {torch.__version__}, seed {SEED}, {draws} draws a component"
    np.savez_compressed(FILE, note=np.array(note), counts=np.stack(counts), **given)


if __name__ == "__main__":
    main()
