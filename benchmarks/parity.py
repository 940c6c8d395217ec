"""What FourM computes beside what ml-4m computes: the same weights, the same masked batches, the same files.

python -m benchmarks.parity --reference DIR [--quick] [--json]

DIR is a checkout of apple/ml-4m, which needs einops. All figures are the largest relative difference found, in float32:
of logits and of losses, relative to the largest logit of a modality and to the loss; of gradients, relative to the
largest entry of a parameter's gradient (at least 1e-4 of the largest of all, since some, such as those of key biases,
are zero but for rounding). `presets` are ml-4m's at small width, with the depth and the heads each has; `full` is base
at full size with the modalities of 4M-21 and budgets of 256 and 256 tokens (`--quick`: tiny). `masks` counts pairs of
tokens of which one side lets the first see the second and the other side does not. `checkpoints` are files that one
side wrote and the other loads, strictly. `training` compares the losses of `steps` steps of a small model, ml-4m's
optimizer and schedule beside the loop's. All weights are random.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from benchmarks import _ml4m, _parity_checkpoints, _parity_training, _report
from model.checkpoint import ml4m_spec
from model.fourm import FourM, FourMConfig
from model.masking import MaskedBatch, MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import ModalitySpec

QUICK = tuple(f"fm_base_12e_12d_{variant}" for variant in ("gelu", "swiglu_nobias", "swiglu_qknorm_nobias"))
HEAD = 4
"""Channels a head in the presets at small width."""

OPTIONS: dict[str, dict[str, Any]] = {
    "registers": {"num_register_tokens": 2},
    "causal": {"decoder_causal_mask": True},
    "not separated": {"decoder_sep_mask": False},
    "causal, not separated": {"decoder_causal_mask": True, "decoder_sep_mask": False},
    "untied": {"tie_embeddings": False},
    "own modality embeddings": {"share_modality_embeddings": False},
    "gelu, registers": {"num_register_tokens": 3, "gated_mlp": False, "act": "GELU", "qkv_bias": True,
                        "proj_bias": True, "mlp_bias": True, "norm_bias": True},
    "qk-norm, causal": {"qk_norm": True, "decoder_causal_mask": True},
}  # fmt: skip
SMALL = FourMConfig(dim=32, encoder_depth=2, decoder_depth=2, num_heads=2)

# Small modalities of every kind, the odd ones among them: positions that wrap, chunks, learned positions, vectors.
SPECS = (
    ModalitySpec(name="caption", kind="sequence", max_tokens=20, vocab_size=230, max_positions=5),
    ModalitySpec(name="metadata", kind="sequence", max_tokens=20, vocab_size=220, chunked=True),
    ModalitySpec(name="rgb@64", kind="pixels", max_tokens=16),
    ModalitySpec(name="t5_caption", kind="embeddings", max_tokens=8, dim_in=6),
    ModalitySpec(name="tok_depth@64", kind="tokens", max_tokens=16, vocab_size=40),
    ModalitySpec(name="tok_global", kind="tokens", max_tokens=4, vocab_size=30, learned_positions=True),
    ModalitySpec(name="tok_never@64", kind="tokens", max_tokens=16, vocab_size=20),
)
SPECS_OUT = tuple(spec for spec in SPECS if spec.is_target)


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Differences by preset, of options, at full size, of files and of a short training."""
    if reference is None:
        raise typer.BadParameter("expected --reference, a checkout of apple/ml-4m")
    torch.set_num_threads(1 if quick else 2)
    theirs, say = _ml4m.load(reference), _report.console.print
    found: dict[str, Any] = {"benchmark": "parity", "torch": torch.__version__, "presets": {}, "options": {}}
    batch = hard_batch(0)
    for name in QUICK if quick else _ml4m.PRESETS:
        say(f"{name} ...")
        found["presets"][name] = preset(theirs, name, with_inputs(batch))
    for name, changes in OPTIONS.items():
        say(f"{name} ...")
        found["options"][name] = option(theirs, changes, batch)
    say("full size ...")
    found["full"] = full(theirs, "tiny" if quick else "base", 2 if quick else 3)
    say("checkpoints ...")
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        found["checkpoints"] = _parity_checkpoints.measure(theirs, Path(folder))
    say("training ...")
    found["training"] = _parity_training.measure(theirs, steps=40 if quick else 200)
    return found


def small_preset(name: str) -> tuple[FourMConfig, int]:
    """Our configuration of ml-4m's preset at small width, and that width."""
    size, variant = name.split("_")[1], name.split("_", 4)[4]
    config = FourMConfig.preset(size, variant)
    width = HEAD * config.num_heads
    return replace(config, dim=width), width


def preset(theirs: _ml4m.Reference, name: str, batch: MaskedBatch) -> dict[str, float]:
    """Differences of a preset: ours at small width, and the reference's own with nothing but its width changed."""
    config, width = small_preset(name)
    settings = {**theirs.preset(name), "dim": width}
    ours = FourM(config, SPECS, SPECS_OUT)
    other = theirs.model(settings, list(SPECS), list(SPECS_OUT), tied=True)
    return _both(ours, other, config, batch)


def option(theirs: _ml4m.Reference, changes: dict[str, Any], batch: MaskedBatch) -> dict[str, float]:
    """Differences of a small model with some settings changed, its attention masks and its other loss among them."""
    config = replace(SMALL, **changes)
    ours = FourM(config, SPECS, SPECS_OUT)
    settings = theirs.settings(config)
    other = theirs.model(settings, list(SPECS), list(SPECS_OUT), tied=config.tie_embeddings)
    figures = _both(ours, other, config, batch)
    figures["masks"] = differing_pairs(ours, batch, *reference_masks(other, batch, SPECS))
    return figures


def _both(ours: FourM, other: nn.Module, config: FourMConfig, batch: MaskedBatch) -> dict[str, float]:
    for model in (ours, other):
        _ml4m.draw(model, tied=config.tie_embeddings, shared=config.share_modality_embeddings)
    wanted = run_reference(other, batch, SPECS)
    return differences(run(ours, batch), wanted)


def full(theirs: _ml4m.Reference, size: str, num: int) -> dict[str, float]:
    """Differences of a size as it is, with all modalities of 4M-21; one model after the other is in memory."""
    specs = [ml4m_spec(name) for name in _ml4m.MODALITIES]
    specs_out = [spec for spec in specs if spec.is_target]
    config, batch = FourMConfig.preset(size), large_batch(specs, num)
    other = theirs.model(theirs.settings(config), specs, specs_out, tied=True)
    _ml4m.draw(other)
    wanted = run_reference(other, batch, specs)
    parameters = sum(p.numel() for p in other.parameters())
    del other
    ours = FourM(config, specs, specs_out)
    _ml4m.draw(ours)
    figures: dict[str, Any] = differences(run(ours, batch), wanted)
    counts = {side: int((getattr(batch, f"{side}_mod") >= 0).sum()) for side in ("enc", "dec")}
    targets = sum(len(scores) > 0 for scores in wanted["logits"].values())
    return {
        "size": size, "batch": num, "parameters": parameters, "inputs": counts["enc"], "targets": counts["dec"],
        "modalities_with_targets": targets, "loss": float(wanted["loss"]), **figures,
    }  # fmt: skip


def run(model: FourM, batch: MaskedBatch) -> dict[str, Any]:
    """Loss, losses and logits by modality, and gradients by every name of a parameter."""
    with torch.no_grad():
        hidden = model.decode(batch, model.encode(batch))
        logits = {
            spec.name: model.logits(hidden[batch.dec_mod == batch.modalities.index(spec.name)], spec.name)
            for spec in model.specs_out
        }
    out = model(batch)
    out.loss.backward()
    return {
        "loss": out.loss.detach(), "losses": {name: value.detach() for name, value in out.losses.items()},
        "logits": logits, "gradients": _gradients(model),
    }  # fmt: skip


def run_reference(model: nn.Module, batch: MaskedBatch, specs: Any) -> dict[str, Any]:
    """The same of ml-4m's."""
    kept: dict[str, Tensor] = {}
    for name, embedding in model.decoder_embeddings.items():  # type: ignore[operator, union-attr]
        embedding.to_logits.register_forward_hook(
            lambda _module, _inputs, scores, name=name: kept.__setitem__(name, scores.detach())
        )
    lengths = batch.enc_mod.shape[1], batch.dec_mod.shape[1]
    loss, losses = model(_ml4m.as_reference(batch, list(specs)), *lengths)
    loss.backward()
    return {
        "loss": loss.detach(), "losses": {name: value.detach().squeeze() for name, value in losses.items()},
        "logits": kept, "gradients": _gradients(model),
    }  # fmt: skip


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False)).items()
    return {name: p.grad for name, p in named if p.grad is not None}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of logits, losses and gradients."""
    logits = [_relative(found["logits"][name], scores) for name, scores in wanted["logits"].items() if len(scores)]
    losses = [_relative(found["losses"][name], loss) for name, loss in wanted["losses"].items() if float(loss)]
    ours, theirs = found["gradients"], wanted["gradients"]
    floor = 1e-4 * max(float(gradient.abs().max()) for gradient in theirs.values())
    # ml-4m's are zeros, ours none, where a modality has no token.
    zero = torch.zeros(())
    gradients = [_relative(ours.get(name, zero), theirs.get(name, zero), floor) for name in ours.keys() | theirs.keys()]
    parts = {
        "logits": logits,
        "losses": losses,
        "gradients": gradients,
        "total": [_relative(found["loss"], wanted["loss"])],
    }
    return {name: float(np.max(values)) for name, values in parts.items()}  # np.max keeps a NaN


def _relative(found: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), floor)


def reference_masks(model: nn.Module, batch: MaskedBatch, specs: Any) -> tuple[np.ndarray, np.ndarray]:
    """ml-4m's masks, True where a query does not look: of inputs (B, N), and of targets (B, M, M)."""
    kept: dict[str, Tensor] = {}
    decoder = model.forward_decoder

    def hooked(y: Tensor, context: Tensor, encoder_mask: Tensor, decoder_attention_mask: Tensor) -> Any:
        kept.update(encoder=encoder_mask[:, 0], decoder=decoder_attention_mask)
        return decoder(y, context, encoder_mask=encoder_mask, decoder_attention_mask=decoder_attention_mask)  # type: ignore[operator]

    model.forward_decoder = hooked  # type: ignore[assignment]
    with torch.no_grad():
        model(_ml4m.as_reference(batch, list(specs)), batch.enc_mod.shape[1], batch.dec_mod.shape[1])
    registers = kept["encoder"].shape[1] - batch.enc_mod.shape[1]
    return kept["encoder"][:, registers:].numpy(), kept["decoder"].numpy()


def differing_pairs(model: FourM, batch: MaskedBatch, encoder: np.ndarray, decoder: np.ndarray) -> int:
    """Pairs where ours and ml-4m's masks differ: of a target and an input, and of two targets.

    Ours are found from outside: a token that moves changes what is computed at exactly the tokens that see it.
    """
    real = (batch.dec_mod >= 0).numpy()
    differing = 0
    with torch.no_grad():
        context = model.encode(batch)
        still = model.decode(batch, context)
        for j in range(batch.dec_mod.shape[1]):
            # Moved tokens have another sequence's or grid's place, so that every modality has it.
            places = batch.dec_pos.clone()
            places[:, j] = (places[:, j] + 1) % 4
            seen = (model.decode(replace(batch, dec_pos=places), context) != still).any(-1).numpy()
            theirs = ~decoder[:, :, j] & real[:, j, None]
            differing += int(((seen != theirs) & real).sum())
        for j in range(batch.enc_mod.shape[1]):
            places = batch.enc_pos.clone()
            places[:, j] = (places[:, j] + 1) % 4
            moved = replace(batch, enc_pos=places)
            seen = (model.decode(moved, model.encode(moved)) != still).any(-1).numpy()
            differing += int(((seen != ~encoder[:, j, None]) & real).sum())
    return differing


def hard_batch(seed: int) -> MaskedBatch:
    """Seven samples of unlike lengths: one without inputs, one without targets; a modality that no sample has."""
    rng = np.random.default_rng(seed)
    names = [spec.name for spec in SPECS if spec.name != "tok_never@64"]
    even = dict.fromkeys(names, 0.5)
    component = MixtureComponent(input_alphas=even, target_alphas={name: 0.5 for name in names})
    samples = []
    for inputs, targets in ((24, 28), (20, 9), (24, 28), (3, 28), (0, 20), (16, 0), (24, 4)):
        config = MaskingConfig(components=(component,), input_tokens=(inputs,) * 2, target_tokens=(targets,) * 2)
        sample = {
            "caption": rng.integers(204, 220, 14).tolist(),
            "metadata": rng.integers(204, 220, (6, 2)).tolist(),
            "rgb@64": rng.standard_normal((3, 64, 64), np.float32),
            "t5_caption": rng.standard_normal((7, 6), np.float32),
            "tok_depth@64": rng.integers(0, 40, 16),
            "tok_global": rng.integers(0, 30, 4),
        }
        samples.append(mask_sample(rng, sample, SPECS, config))
    return _in_order(collate(samples, SPECS, 24, 28, trim=False))


def with_inputs(batch: MaskedBatch) -> MaskedBatch:
    """The samples that have inputs.

    One without is a token of zeros, which a model without biases keeps in every layer: each norm multiplies its
    gradient by a thousand, and in deep models, ml-4m's and ours, that ends in NaN.
    """
    kept = (batch.enc_mod >= 0).any(1)
    names = ("enc_ids", "enc_mod", "enc_pos", "dec_ids", "dec_mod", "dec_pos", "dec_targets", "dec_reach")
    return replace(batch, **{name: getattr(batch, name)[kept] for name in names})


def _in_order(batch: MaskedBatch) -> MaskedBatch:
    """The targets of each sample in the order of the modalities: ours is a sample's own, ml-4m's that of a batch.

    It matters where modalities see each other.
    """
    arrays = {name: getattr(batch, name).clone() for name in ("dec_ids", "dec_mod", "dec_pos", "dec_targets")}
    reach = batch.dec_reach.clone()
    for i, modality in enumerate(batch.dec_mod):
        num = int((modality >= 0).sum())
        order = modality[:num].argsort(stable=True)
        for array in arrays.values():
            array[i, :num] = array[i, order]
        for m in modality[:num].unique().tolist():
            (where,) = (arrays["dec_mod"][i] == m).nonzero(as_tuple=True)
            reach[i, where] = int(where[-1]) + 1 if SPECS[m].is_grid else where + 1
    return replace(batch, dec_reach=reach, **arrays)


def large_batch(specs: list[ModalitySpec], num: int) -> MaskedBatch:
    """Budgets of 256 and 256 tokens over the modalities of 4M-21, drawn as its main mixture does."""
    rng = np.random.default_rng(0)
    names = [spec.name for spec in specs]
    component = MixtureComponent(
        input_alphas=dict.fromkeys(names, 0.5), target_alphas={s.name: 0.5 for s in specs if s.is_target}
    )
    config = MaskingConfig(components=(component,), input_tokens=(256, 256), target_tokens=(256, 256))
    samples = [mask_sample(rng, {s.name: _value(s, rng) for s in specs}, specs, config) for _ in range(num)]
    return collate(samples, specs, 256, 256)


def _value(spec: ModalitySpec, rng: np.random.Generator) -> Any:
    if spec.kind == "pixels":
        return rng.standard_normal((3, 224, 224), np.float32)
    if spec.kind == "embeddings":
        return rng.standard_normal((40, spec.dim_in), np.float32)
    if spec.kind == "tokens":
        return rng.integers(0, spec.vocab_size, spec.max_tokens)
    ids = rng.integers(204, 30_000, spec.max_tokens - 5)
    return ids[:34].reshape(-1, 2).tolist() if spec.chunked else ids.tolist()


if __name__ == "__main__":
    _report.main(measure)
