"""Golden values of apple/ml-4m for the tests of the model and of masking, and the recipes both sides share.

    python tests/fourm_golden.py <checkout of apple/ml-4m>     # rewrites tests/golden/fourm*.npz, needs einops

The reference's fm.py and masking.py run unpatched; only packages beside them that need albumentations are replaced by
the two names used of them, and random.sample, which fails on Python 3.11, keeps the order of the modalities: it decides
only what is cut.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "fourm.npz"
GRADIENTS = GOLDEN.with_name("fourm_gradients.npz")
NUM_ENCODER, NUM_DECODER, NUM_DRAWS = 24, 24, 5000
SIZE = {"dim": 32, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2}
BIASED = {"qkv_bias": True, "proj_bias": True, "mlp_bias": True, "norm_bias": True}
UNBIASED = dict.fromkeys(BIASED, False)
VARIANTS = {
    "gelu": {"gated_mlp": False, "act": "GELU", **BIASED},
    "swiglu_nobias": {"gated_mlp": True, "act": "SiLU", **UNBIASED},
    "qknorm": {"gated_mlp": True, "act": "SiLU", "qk_norm": True, "num_register_tokens": 2, **UNBIASED},
}
# Sequences longer than their table of decoder positions, learned positions, vectors: the odd cases are in.
MODALITIES = {
    "caption": {"kind": "sequence", "max_tokens": 20, "vocab_size": 230, "max_positions": 5},
    "metadata": {"kind": "sequence", "max_tokens": 20, "vocab_size": 220, "chunked": True},
    "rgb@64": {"kind": "pixels", "max_tokens": 16},
    "t5_caption": {"kind": "embeddings", "max_tokens": 8, "dim_in": 6},
    "tok_depth@64": {"kind": "tokens", "max_tokens": 16, "vocab_size": 40},
    "tok_global": {"kind": "tokens", "max_tokens": 4, "vocab_size": 30, "learned_positions": True},
}
TARGETS = [name for name, value in MODALITIES.items() if value["kind"] in ("tokens", "sequence")]
# Masking statistics: an even mixture component and a lopsided one, with a target concentration of zero.
MASKED = ["caption", "metadata", "rgb@64", "tok_depth@64"]
ALPHAS_IN = {"caption": [1.0, 0.05], "metadata": [1.0, 5.0], "rgb@64": [1.0, 0.05], "tok_depth@64": [1.0, 0.05]}
ALPHAS_OUT = {"caption": [1.0, 0.1], "metadata": [1.0, 0.1], "rgb@64": [0.0, 0.0], "tok_depth@64": [1.0, 0.1]}
WEIGHTS, INPUT_TOKENS, TARGET_TOKENS = [1.0, 0.5], (8, 40), (10, 30)
KEEP = {"caption": ["random", "all"], "metadata": ["random", "binary"]}


def values(rng: np.random.Generator) -> dict:
    """A sample as the trainer sees it; text is ids."""
    return {
        "caption": rng.integers(204, 220, 14).tolist(),
        "metadata": rng.integers(204, 220, (6, 2)).tolist(),
        "rgb@64": rng.standard_normal((3, 64, 64)).astype(np.float32),
        "t5_caption": rng.standard_normal((7, 6)).astype(np.float32),
        "tok_depth@64": rng.integers(0, 40, 16),
        "tok_global": rng.integers(0, 30, 4),
    }


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A value for each parameter that depends on its name alone; both names of a shared one get the same."""
    shared = name.replace("decoder_embeddings", "encoder_embeddings") if name.endswith("mod_emb") else name
    shared = shared.replace("to_logits", "token_emb")
    seed = int(hashlib.sha256(shared.encode()).hexdigest()[:8], 16)
    drawn = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return 1 + 0.2 * drawn if "norm" in name and name.endswith("weight") else 0.3 * drawn


def sampled(name: str, gradient: np.ndarray) -> np.ndarray:
    """What is kept of a gradient: its norm, its largest entry, its projection on a random direction, 48 entries."""
    flat = gradient.astype(np.float64).reshape(-1)
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    direction = rng.standard_normal(flat.size)
    whole = [np.linalg.norm(flat), np.abs(flat).max(), flat @ direction / np.linalg.norm(direction)]
    return np.concatenate([whole, flat[rng.integers(0, flat.size, 48)]])


def is_free(name: str) -> bool:
    """Whether the recipe sets it: not the fixed tables of positions."""
    return not name.endswith("pos_emb") or "global" in name


class NumberTokenizer:
    """Text is the ids themselves, in decimal."""

    def token_to_id(self, token: str) -> int:
        return {"[PAD]": 0, "[EOS]": 3}[token]

    def get_vocab(self) -> dict[str, int]:
        return {f"[S_{k}]": 4 + k for k in range(200)}

    def encode(self, text: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(ids=[int(word) for word in text.split()])

    def encode_batch(self, texts: list[str]) -> list[types.SimpleNamespace]:
        return [self.encode(text) for text in texts]


def _reference(checkout: str) -> tuple:
    sys.path.insert(0, checkout)
    package, info, transforms = (
        types.ModuleType(f"fourm.data{end}") for end in ("", ".modality_info", ".modality_transforms")
    )
    package.__path__ = [f"{checkout}/fourm/data"]
    info.MODALITY_INFO = {}
    transforms.get_transform_key = lambda name: name.split("@")[0]
    datasets = types.ModuleType("fourm.utils.generation_datasets")
    sys.modules |= {module.__name__: module for module in (package, info, transforms, datasets)}
    import fourm.data.masking as masking
    import fourm.models.decoder_embeddings as decoder
    import fourm.models.encoder_embeddings as encoder
    import fourm.models.fm as fm

    fm.random = types.SimpleNamespace(sample=lambda items, num: list(items))
    return fm, masking, encoder, decoder


def _as_text(sample: dict) -> dict:
    import torch

    def spelled(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    text = {"caption": spelled(sample["caption"]), "metadata": [spelled(chunk) for chunk in sample["metadata"]]}
    return {name: text[name] if name in text else torch.as_tensor(value) for name, value in sample.items()}


def _info(names: list[str], inputs: dict, targets: dict, keep: dict) -> dict:
    types_ = {"pixels": "img", "tokens": "img", "sequence": "seq", "embeddings": "seq_emb"}
    return {
        name: {
            "id": number, "type": types_[MODALITIES[name]["kind"]], "min_tokens": 0,
            "max_tokens": MODALITIES[name]["max_tokens"], "input_alphas": inputs[name], "target_alphas": targets[name],
            "keep": keep.get(name, ["random"] * 2),
        }
        for number, name in enumerate(names)
    }  # fmt: skip


def _statistics(masking) -> dict[str, np.ndarray]:
    """Histograms of used input tokens and of predictions, (2, bins) for each modality."""
    import torch

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    info = _info(MASKED, ALPHAS_IN, ALPHAS_OUT, KEEP)
    mask = masking.UnifiedMasking(info, NumberTokenizer(), INPUT_TOKENS, TARGET_TOKENS, sampling_weights=WEIGHTS)
    sample = _as_text(values(np.random.default_rng(1)))
    counts = {name: np.zeros((2, 48), np.int64) for name in MASKED}
    for _ in range(NUM_DRAWS):
        for name, masked in mask({name: sample[name] for name in MASKED}).items():
            used, targets = (int((~masked[key]).sum()) for key in ("input_mask", "target_mask"))
            if info[name]["type"] == "seq":
                targets = max(0, targets - 1)
            counts[name][0, used] += 1
            counts[name][1, targets] += 1
    return counts


def _masked_batch(masking) -> dict:
    import torch

    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    even = {name: [1.0, 3.0] for name in MODALITIES}
    mask = masking.UnifiedMasking(_info(list(MODALITIES), even, even, {}), NumberTokenizer(), (14, 24), (14, 30))
    rng = np.random.default_rng(2)
    masked = [mask(_as_text(values(rng))) for _ in range(3)]
    return {
        name: {key: torch.stack([sample[name][key] for sample in masked]) for key in masked[0][name]}
        for name in MODALITIES
    }


def _run(fm, encoder, decoder, variant: str, batch: dict, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """State, losses and logits of the reference; its gradients go into `gradients`."""
    import torch

    enc = {
        "caption": encoder.SequenceEncoderEmbedding(230, 5), "metadata": encoder.SequenceEncoderEmbedding(220, 20),
        "rgb@64": encoder.ImageEncoderEmbedding(3, 16, image_size=64),
        "t5_caption": encoder.SequenceEmbEncoderEmbedding(8, orig_emb_dim=6),
        "tok_depth@64": encoder.ImageTokenEncoderEmbedding(40, 16, image_size=64),
        "tok_global": encoder.ImageTokenEncoderEmbedding(30, 56, image_size=112, sincos_pos_emb=False),
    }  # fmt: skip
    dec = {
        "caption": decoder.SequenceDecoderEmbedding(230, 5), "metadata": decoder.SequenceDecoderEmbedding(220, 20),
        "tok_depth@64": decoder.ImageTokenDecoderEmbedding(40, 16, image_size=64),
        "tok_global": decoder.ImageTokenDecoderEmbedding(30, 56, image_size=112, sincos_pos_emb=False),
    }  # fmt: skip
    settings = dict(VARIANTS[variant])
    settings["act_layer"] = getattr(torch.nn, settings.pop("act"))
    settings["norm_layer"] = partial(fm.LayerNorm, eps=1e-6, bias=settings.pop("norm_bias"))
    model = fm.FourM(enc, dec, _info(list(MODALITIES), *[dict.fromkeys(MODALITIES)] * 2, {}), **SIZE, **settings).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if is_free(name) and name in dict(model.named_parameters(remove_duplicate=False)):
            tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))
    shapes = json.dumps({name: list(tensor.shape) for name, tensor in state.items()})
    out = {f"{variant}/state": np.frombuffer(shapes.encode(), np.uint8)}
    kept: dict[str, torch.Tensor] = {}
    for name in TARGETS:
        model.decoder_embeddings[name].to_logits.register_forward_hook(
            lambda _module, _inputs, scores, name=name: kept.__setitem__(name, scores)
        )
    loss, losses = model({n: dict(d) for n, d in batch.items()}, NUM_ENCODER, NUM_DECODER)
    loss.backward()
    out[f"{variant}/loss"] = loss.detach().numpy()
    for name in TARGETS:
        out[f"{variant}/loss/{name}"] = losses[name].detach().numpy()
        out[f"{variant}/logits/{name}"] = kept[name].detach().numpy()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[f"{variant}/{name}"] = sampled(name, parameter.grad.numpy()).astype(np.float32)
    return out


def main(checkout: str) -> None:
    import torch

    fm, masking, encoder, decoder = _reference(checkout)
    arrays = {f"counts/{name}": value for name, value in _statistics(masking).items()}
    batch = _masked_batch(masking)
    for name, masked in batch.items():
        stored = {key: value for key, value in masked.items() if name not in ("rgb@64",) or key != "tensor"}
        arrays |= {f"batch/{name}/{key}": value.numpy() for key, value in stored.items()}
    gradients: dict[str, np.ndarray] = {}
    for variant in VARIANTS:
        arrays |= _run(fm, encoder, decoder, variant, batch, gradients)
    np.savez_compressed(GOLDEN, **arrays)
    note = f"apple/ml-4m FourM, torch {torch.__version__}, float32, mean over modalities; fourm_golden.sampled of each"
    np.savez_compressed(GRADIENTS, note=note, **gradients)
    for path in (GOLDEN, GRADIENTS):
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1])
