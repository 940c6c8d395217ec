"""Computing no padding changes nothing: FourM against the same weights run on padded batches with dense masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import attention
from model.embeddings import TargetEmbedding
from model.fourm import FourM, FourMConfig
from model.masking import MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import PAD, ModalitySpec
from tests import fourm_golden as golden

SPECS = tuple(ModalitySpec(name=name, **value) for name, value in golden.MODALITIES.items())
SPECS_OUT = tuple(spec for spec in SPECS if spec.is_target)
CASES = {
    "gelu": {"variant": "gelu"},
    "swiglu": {"variant": "swiglu_nobias"},
    "qknorm": {"variant": "swiglu_qknorm_nobias"},
    "registers": {"variant": "swiglu_nobias", "num_register_tokens": 2},
    "causal": {"variant": "swiglu_nobias", "decoder_causal_mask": True},
    "not separated": {"variant": "gelu", "decoder_sep_mask": False},
    "causal, not separated": {"variant": "gelu", "decoder_sep_mask": False, "decoder_causal_mask": True},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def build(variant, **changes):
    settings = vars(FourMConfig.preset("nano", variant)) | golden.SIZE | changes
    model = FourM(FourMConfig(**settings), SPECS, SPECS_OUT)
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if golden.is_free(name):
                parameter.copy_(torch.from_numpy(golden.weight(name, tuple(parameter.shape))))
    return model


def masked(rng, num, inputs=(0, 24), targets=(2, 30)):
    names = [spec.name for spec in SPECS]
    component = MixtureComponent(
        input_alphas=dict.fromkeys(names, 0.5), target_alphas=dict.fromkeys(golden.TARGETS, 0.5)
    )
    config = MaskingConfig(components=(component,), input_tokens=inputs, target_tokens=targets)
    return [mask_sample(rng, golden.values(rng), SPECS, config) for _ in range(num)]


def batch_of(seed, **kwargs):
    """Five samples of unlike lengths, and one that has no inputs."""
    rng = np.random.default_rng(seed)
    return collate([*masked(rng, 5), *masked(rng, 1, inputs=(0, 0))], SPECS, 24, 28, **kwargs)


def padded_attention(module, x, mask, context=None):
    context = x if context is None else context
    if hasattr(module, "qkv"):
        q, k, v = module.qkv(x).chunk(3, dim=-1)
    else:
        q, (k, v) = module.q(x), module.kv(context).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return module.proj((weights @ v).transpose(1, 2).flatten(2))


def embedded(batch, side, tokens):
    """(B, N, D) of one token after the other."""
    modality = getattr(batch, f"{side}_mod")
    rows = [
        torch.zeros_like(tokens("zero")) if m < 0 else tokens(batch.modalities[m], sample, slot)
        for sample, line in enumerate(modality.tolist())
        for slot, m in enumerate(line)
    ]
    return torch.stack(rows).view(*modality.shape, -1)


def padded_loss(model, batch):
    """The whole function again, token by token and with every slot computed."""
    config, zero = model.config, model.mask_token[0, 0] * 0

    def content(name, sample=0, slot=0):
        if name == "zero":
            return zero
        embedding = model.encoder_embeddings[name]
        ids = batch.enc_ids[sample, slot][None]
        if embedding.spec.kind == "pixels":
            return embedding.content(batch.pixels[name], ids)[0]
        if embedding.spec.kind == "embeddings":
            return embedding.content(batch.embeddings[name], ids)[0]
        return embedding.content(ids)[0]

    def place(name, sample=0, slot=0):
        return zero if name == "zero" else model.encoder_embeddings[name].place(batch.enc_pos[sample, slot][None])[0]

    def target(name, sample=0, slot=0):
        if name == "zero":
            return zero
        embedding = model.decoder_embeddings[name]
        held = model.mask_token[0, 0]
        if not embedding.spec.is_grid:
            held = embedding.content(batch.dec_ids[sample, slot][None])[0]
        return held + embedding.place(batch.dec_pos[sample, slot][None])[0]

    contents, places = embedded(batch, "enc", content), embedded(batch, "enc", place)
    real = batch.enc_mod >= 0
    if config.num_register_tokens:
        registers = model.register_tokens.expand(len(real), -1, -1)
        contents = torch.cat([registers, contents], dim=1)
        places = torch.cat([torch.zeros_like(registers), places], dim=1)
        real = torch.cat([real.new_ones(registers.shape[:2]), real], dim=1)
    keys = (real | ~real.any(dim=1, keepdim=True))[:, None, None]
    x = contents + places
    for block in model.encoder:
        x = x + padded_attention(block.attn, block.norm1(x), keys)
        x = x + block.mlp(block.norm2(x))
    context = model.decoder_proj_context(model.encoder_norm(x)) + places
    y, slots = embedded(batch, "dec", target), torch.arange(batch.dec_mod.shape[1])
    seen = slots < batch.dec_reach[:, :, None]
    if config.decoder_causal_mask:
        seen = (slots[None] <= slots[:, None]).expand_as(seen)
    queries, others = batch.dec_mod[:, :, None], batch.dec_mod[:, None, :]
    seen = seen & ((queries == others) if config.decoder_sep_mask else (others >= 0))
    seen = (seen | (queries < 0))[:, None]
    for block in model.decoder:
        y = y + padded_attention(block.self_attn, block.norm1(y), seen)
        y = y + padded_attention(block.cross_attn, block.query_norm(y), keys, block.context_norm(context))
        y = y + block.mlp(block.norm2(y))
    y, losses = model.decoder_norm(y), []
    for spec in model.specs_out:
        where = batch.dec_mod == batch.modalities.index(spec.name)
        scores = model.logits(y[where], spec.name)
        losses.append(F.cross_entropy(scores, batch.dec_targets[where]) if len(scores) else scores.new_zeros(()))
    return y, torch.stack(losses).mean()


def near(found, wanted, tolerance=1e-6):
    found, wanted = found.detach(), wanted.detach()
    scale = wanted.abs().max().clamp(min=1e-30)
    return float((found - wanted).abs().max() / scale) <= tolerance


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize(("trim", "call"), [(True, 0.0), (False, 1.0)], ids=["by slices", "by padding"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_padded_computation(case, trim, call, rounded, monkeypatch):
    monkeypatch.setattr(attention, "_CALL", call)  # what a call costs decides the way taken
    monkeypatch.setattr(FourM, "_rounds", lambda self, like: rounded)
    model = build(**CASES[case]).double()
    batch = batch_of(list(CASES).index(case), trim=trim)
    batch.pixels.update({k: v.double() for k, v in batch.pixels.items()})
    batch.embeddings.update({k: v.double() for k, v in batch.embeddings.items()})
    hidden, wanted_loss = padded_loss(model, batch)
    wanted = gradients(model, wanted_loss)
    own = model.decode(batch, model.encode(batch))
    real = batch.dec_mod >= 0
    assert near(own[real], hidden[real])
    out = model(batch)
    found = gradients(model, out.loss)
    assert near(out.loss, wanted_loss)
    whole = max(float(g.abs().max()) for g in wanted.values())
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) <= 1e-6 * max(float(value.abs().max()), 1e-3 * whole), name


def test_no_target_and_no_linear_layer_at_padding():
    model = build("gelu")
    batch = batch_of(3)
    rows = {}
    layers = ("encoder.0.mlp.fc1", "decoder.0.mlp.fc1", "decoder.0.cross_attn.kv")
    for name in layers:
        model.get_submodule(name).register_forward_hook(
            lambda _module, inputs, _out, name=name: rows.__setitem__(name, inputs[0].shape[:-1].numel())
        )
    model(batch)
    inputs, targets = int((batch.enc_mod >= 0).sum()), int((batch.dec_mod >= 0).sum())
    alone = int((~(batch.enc_mod >= 0).any(1)).sum())
    assert alone
    assert [rows[name] for name in layers] == [inputs + alone, targets, inputs + alone]
    nothing = collate(masked(np.random.default_rng(0), 2, targets=(0, 0)), SPECS, 24, 28)
    assert model(nothing).loss.item() == 0
    assert model.decode(nothing, model.encode(nothing)).shape == (2, 1, 32)


def test_numbers_of_tokens_in_bfloat16_are_rounded_up_to_few():
    """A number that did not come before costs a kernel; in float32 nothing is rounded (the test before)."""
    model = build("swiglu_nobias")
    rows = {}
    layers = {"encoder.0.mlp.fc1": 64, "decoder.0.mlp.fc1": 64, "decoder.0.cross_attn.kv": 64}
    layers |= {f"decoder_embeddings.{spec.name}.to_logits": 32 for spec in SPECS_OUT}
    for name in layers:
        model.get_submodule(name).register_forward_hook(
            lambda _module, inputs, _out, name=name: rows.__setitem__(name, inputs[0].shape[:-1].numel())
        )
    for seed in range(3):
        batch = batch_of(seed)
        wanted = model(batch).loss.item()
        rows.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(batch).loss.item() == pytest.approx(wanted, rel=0.02)
            context = model.encode(batch)
        assert rows.keys() >= layers.keys() - {n for n in layers if n.endswith("logits")}
        assert len(rows) > 3
        assert not {name: n for name, n in rows.items() if n % layers[name] or not n}
        assert len(context.tokens) == sum(context.lengths)
    nothing = collate(masked(np.random.default_rng(0), 2, targets=(0, 0)), SPECS, 24, 28)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(nothing).loss.item() == 0
        assert model.decode(nothing, model.encode(nothing)).shape == (2, 1, 32)


def test_a_sample_without_inputs_gives_finite_gradients_in_a_deep_encoder():
    """Each norm of zeros multiplies a gradient by 1000, and ml-4m's is NaN at the depth of its large models."""
    model = build("swiglu_nobias", encoder_depth=24, decoder_depth=1)
    found = gradients(model, model(batch_of(5)).loss)
    assert not [name for name, value in found.items() if not value.isfinite().all()]
    assert all(float(found[f"encoder.{i}.attn.qkv.weight"].abs().max()) > 0 for i in range(24))


class Made(TorchDispatchMode):
    """The operations that give a new tensor of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape == self.shape:
            given = {value.data_ptr() for value in args if isinstance(value, torch.Tensor)}
            self.names += [] if made.data_ptr() in given else [func.name()]
        return made


def test_a_tied_table_gets_one_gradient():
    """Rows that were looked up add theirs to that of the logits, but for the row of PAD, which logits alone move."""
    spec = ModalitySpec(name="caption", kind="sequence", vocab_size=40, max_tokens=8)
    embedding, ids = TargetEmbedding(spec, 12, tied=True).double(), torch.tensor([3, PAD, 7, 3, 39, PAD])
    targets, weight = torch.arange(6), embedding.token_emb.weight
    plain = F.cross_entropy(embedding.to_logits(embedding.content(ids).square()), targets)
    (wanted,) = torch.autograd.grad(plain, [weight])
    content, table = embedding.content_and_table(ids)
    assert table is not None
    loss = F.cross_entropy(F.linear(content.square(), table), targets)
    with Made(weight.shape) as made:
        loss.backward()
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-12, atol=1e-12)
    assert len(made.names) == 1, made.names
    assert embedding.requires_grad_(False).content_and_table(ids)[0].equal(content)
    assert TargetEmbedding(spec, 12, tied=False).content_and_table(ids)[1] is None
