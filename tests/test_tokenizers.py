from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import domains, tokenizers
from model.loop import LoopConfig, fit
from model.tokenizers import Tokenizer
from model.tokenizers._mlp import BottleneckMLP, mlp_size
from model.tokenizers._quantize import Codebook, Quantizer, usage
from model.tokenizers._vit import ViTEncoder, sincos_2d, vit_size
from model.tokenizers.vqvae import VQVAE, VQVAEConfig, dead_code_threshold, reconstruction_loss


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The contract: every file of model/tokenizers that holds a tokenizer.


@pytest.fixture(params=tokenizers.names())
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizers.load(request.param).tiny()


def test_names_are_files() -> None:
    assert {"text", "vqvae"} <= set(tokenizers.names())
    with pytest.raises(ValueError, match="did you mean 'vqvae'"):
        tokenizers.load("vqvea")
    with pytest.raises(ValueError, match="unknown tokenizer 'domains'"):
        tokenizers.load("domains")


def test_ids_are_in_range_and_of_the_grids_shape(tokenizer: Tokenizer) -> None:
    for value in tokenizer.examples():
        ids = np.asarray(tokenizer.encode(value))
        assert ids.dtype == np.int64
        assert ids.size > 0
        assert ids.min() >= 0
        assert ids.max() < tokenizer.vocab_size
        assert not tokenizer.grid or ids.shape == tokenizer.grid


def test_decoding_gives_a_value_of_the_same_kind(tokenizer: Tokenizer) -> None:
    for value in tokenizer.examples():
        decoded = tokenizer.decode(tokenizer.encode(value))
        assert type(decoded) is type(value)
        if isinstance(value, np.ndarray):
            assert (decoded.dtype, decoded.shape) == (value.dtype, value.shape)
        else:
            assert decoded == value


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a" / "tokenizer")
    tokenizer.save(tmp_path / "b" / "tokenizer")
    assert (tmp_path / "a" / "tokenizer").read_bytes() == (tmp_path / "b" / "tokenizer").read_bytes()
    loaded = type(tokenizer).load(tmp_path / "a" / "tokenizer")
    assert (loaded.vocab_size, loaded.grid) == (tokenizer.vocab_size, tokenizer.grid)
    for value in tokenizer.examples():
        ids = tokenizer.encode(value)
        assert np.array_equal(loaded.encode(value), ids)
        assert np.array_equal(loaded.decode(ids), tokenizer.decode(ids))


def test_a_tiny_one_overfits_four_images(tokenizer: Tokenizer, tmp_path: Path) -> None:
    if not isinstance(tokenizer, VQVAE):
        pytest.skip("nothing to train by gradients")
    values = tokenizer.examples()
    batch = tokenizer.domain.to_network(values)
    config = LoopConfig(steps=250, lr=3e-3, warmup_steps=20, log_every=250, seed=0, progress=False, threads=1)
    fit(tokenizer, lambda step: batch, reconstruction_loss, config, tmp_path)
    decoded = tokenizer.decode_batch(tokenizer.encode_batch(values))
    error = np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(values, decoded, strict=True)])
    assert error < 8  # of 255, where the mean colour leaves about 64


# The quantizer, against numpy.


def test_a_training_step_of_the_codebook_is_the_written_formula() -> None:
    rng = np.random.default_rng(0)
    decay = 0.9
    quantizer = Quantizer(8, 4, decay=decay, dead_threshold=0.0, commitment_weight=2.0, norm_latents=False, seed=0)
    quantizer.train()
    book = quantizer._codebook
    embed = rng.normal(size=(8, 4)).astype(np.float32) * 0.5
    embed[0] = -100  # never the nearest
    sizes = rng.uniform(size=8).astype(np.float32)
    book.embed.copy_(torch.from_numpy(embed))
    book.cluster_size.copy_(torch.from_numpy(sizes))
    x = np.abs(rng.normal(size=(2, 4, 3, 3))).astype(np.float32) * 3
    out, loss, ids = quantizer(torch.from_numpy(x))

    flat = x.transpose(0, 2, 3, 1).reshape(-1, 4)
    z = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    e = embed / np.linalg.norm(embed, axis=1, keepdims=True)
    expected = (z @ e.T).argmax(axis=1)
    assert np.array_equal(ids.numpy().reshape(-1), expected)
    q = embed[expected].reshape(2, 3, 3, 4).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(out.numpy(), q, atol=1e-5)
    assert float(loss) == pytest.approx(2.0 * float(((q - x) ** 2).mean()), rel=1e-5)

    counts = np.bincount(expected, minlength=8)
    assert counts[0] == 0
    np.testing.assert_allclose(book.cluster_size.numpy(), decay * sizes + (1 - decay) * counts, rtol=1e-5)
    new = e.copy()
    for code in counts.nonzero()[0]:
        total = z[expected == code].sum(axis=0)
        new[code] = total / np.linalg.norm(total)
    np.testing.assert_allclose(book.embed.numpy(), decay * embed + (1 - decay) * new, rtol=1e-4, atol=1e-5)


def test_dead_codes_become_latents_of_the_batch_drawn_by_the_generator() -> None:
    def run(seed: int) -> tuple[Codebook, np.ndarray]:
        book = Codebook(6, 4, decay=0.5, dead_threshold=0.4, seed=seed)
        book.embed.copy_(torch.eye(6, 4))
        book.cluster_size.copy_(torch.tensor([1.0, 1.0, 0.1, 1.0, 0.0, 1.0]))
        z = torch.nn.functional.normalize(torch.arange(1.0, 13).reshape(3, 4), dim=1)
        book.update(z, torch.tensor([0, 0, 1]))
        return book, z.numpy()

    book, z = run(0)
    # After the decay the counts of codes 2 and 4 are under 0.4, and those of 3 and 5, at 0.5, are not.
    for code in (2, 4):
        assert any(np.array_equal(book.embed[code].numpy(), row) for row in z)
    assert np.allclose(book.embed[3].numpy(), [0, 0, 0, 1])
    assert book.cluster_size.tolist() == pytest.approx([1.5, 1.0, 0.05, 0.5, 0.0, 0.5])
    assert torch.equal(book.embed, run(0)[0].embed)
    drawn = {tuple(run(seed)[0].embed[2].tolist()) for seed in range(8)}
    assert len(drawn) > 1


def test_in_eval_mode_the_codebook_stays_and_codes_come_out_raw() -> None:
    quantizer = Quantizer(8, 4, decay=0.9, dead_threshold=1.0, commitment_weight=1.0, norm_latents=False, seed=0).eval()
    before = quantizer._codebook.embed.clone()
    out, loss, ids = quantizer(torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert float(loss) == 0
    assert torch.equal(quantizer._codebook.embed, before)
    assert torch.equal(out, quantizer.lookup(ids))


def test_the_gradient_passes_the_codes_unchanged() -> None:
    quantizer = Quantizer(8, 4, decay=0.9, dead_threshold=0.0, commitment_weight=0.0, norm_latents=False, seed=0)
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    weight = torch.randn(1, 4, 2, 2)
    (quantizer(x)[0] * weight).sum().backward()
    assert torch.allclose(x.grad, weight)


def test_usage_and_the_threshold() -> None:
    assert usage([torch.tensor([0, 1, 2, 3])], 8) == (4, pytest.approx(4.0))
    assert usage([torch.tensor([5, 5]), torch.tensor([5])], 8) == (1, pytest.approx(1.0))
    assert dead_code_threshold(4096, 1024) == 0.125


# The network.


def test_the_position_table_is_sines_then_cosines_of_row_then_column() -> None:
    table = sincos_2d(3, 5, 8)[0].numpy()
    omega = 1 / 10000.0 ** (np.arange(2) / 2)
    for row, col in ((0, 0), (2, 1), (1, 4)):
        parts = [np.sin(row * omega), np.cos(row * omega), np.sin(col * omega), np.cos(col * omega)]
        np.testing.assert_allclose(table[:, row, col], np.concatenate(parts), atol=1e-5)


def test_state_dict_keys_are_those_of_4m() -> None:
    config = replace(
        VQVAE.tiny().config,
        domain=domains.Semseg(num_classes=9),
        n_labels=10,
        n_channels=6,
        out_conv=True,
    )
    shapes = {name: tuple(value.shape) for name, value in VQVAE(config).state_dict().items()}
    block = {
        f"{part}.{end}"
        for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for end in ("weight", "bias")
    }
    both = {f"{m}.{end}" for m in ("norm_mlp", "post_mlp.fc1", "post_mlp.fc2") for end in ("weight", "bias")}
    both |= {"pos_emb"} | {f"blocks.0.{name}" for name in block}
    conv = {f"{m}.{end}" for m in ("dwconv", "norm", "pwconv1", "pwconv2") for end in ("weight", "bias")} | {"gamma"}
    expected = {f"{half}.{name}" for half in ("encoder", "decoder") for name in both}
    expected |= {f"decoder.out_conv.{i}.{name}" for i in (0, 1) for name in conv}
    expected |= {f"{m}.{end}" for m in ("encoder.proj", "decoder.out_proj", "quant_proj") for end in ("weight", "bias")}
    expected |= {"post_quant_proj.weight", "post_quant_proj.bias", "cls_emb.weight"}
    expected |= {f"quantize._codebook.{name}" for name in ("initted", "cluster_size", "embed")}
    assert set(shapes) == expected
    assert shapes["encoder.pos_emb"] == (1, 64, 4, 4)
    assert shapes["encoder.proj.weight"] == (64, 6, 8, 8)
    assert shapes["quant_proj.weight"] == (16, 64, 1, 1)
    assert shapes["post_quant_proj.weight"] == (64, 16, 1, 1)
    assert shapes["quantize._codebook.embed"] == (64, 16)
    assert shapes["decoder.out_proj.weight"] == (10 * 64, 64)
    assert shapes["cls_emb.weight"] == (10, 6)


@pytest.mark.parametrize("channels", [1, 3, 8, 64])
def test_patches_are_projected_as_by_the_convolution_in_both_precisions(channels: int) -> None:
    encoder = ViTEncoder(channels, 8, (4, 4), (64, 0, 2), post_mlp=False)
    encoder.pos_emb.data.zero_()
    x = torch.randn(2, channels, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = encoder.proj(x)
        assert torch.allclose(encoder(x), exact, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(x).float()
    assert float((rounded - exact).abs().max()) < 0.03 * float(exact.abs().max())


def test_patches_are_laid_out_channel_then_row_then_column() -> None:
    model = VQVAE.tiny()
    model.decoder.out_proj.weight.data.zero_()
    model.decoder.out_proj.bias.data.copy_(torch.arange(192.0))
    out = model.decode_tokens(torch.zeros(1, 4, 4, dtype=torch.long))
    assert torch.allclose(out[0, :, 8:16, :8], torch.arange(192.0).reshape(3, 8, 8))


def test_other_sizes_work_and_their_positions_are_interpolated() -> None:
    model = VQVAE.tiny()
    ids = model.tokenize(torch.zeros(1, 3, 64, 48))
    assert ids.shape == (1, 8, 6)
    assert model.decode_tokens(ids).shape == (1, 3, 64, 48)
    with pytest.raises(ValueError, match=r"\(36, 32\) pixels, expected multiples of the patch size 8"):
        model.tokenize(torch.zeros(1, 3, 36, 32))


def test_sizes_have_4ms_names() -> None:
    assert vit_size("vit_s_enc", "enc") == (512, 8, 8)
    assert vit_size("vit_b_dec", "dec") == (768, 12, 12)
    assert vit_size("vit_l_enc", "enc") == (1024, 24, 16)
    assert vit_size("vit_96x2x3_dec", "dec") == (96, 2, 3)
    with pytest.raises(ValueError, match="'BottleneckMLP/B_6-Wi_1024', expected vit_s_enc"):
        vit_size("BottleneckMLP/B_6-Wi_1024", "enc")


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = VQVAE.tiny().state_dict(), VQVAE.tiny().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ids_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected ids \(b, h, w\) in 0..63"):
        VQVAE.tiny().decode(np.full((4, 4), 64))


# Vectors, feature maps, masks, several codebooks, a frozen half.


MLP = {"enc_type": "BottleneckMLP/B_2-Wi_32", "dec_type": "BottleneckMLP/B_2-Wi_32"}
MEMCODES = {"quant_type": "memcodes", "latent_dim": 32, "codebook_size": 20, "num_codebooks": 8}
VIT = {"enc_type": "vit_64x1x2_enc", "dec_type": "vit_64x1x2_dec", "codebook_size": 64, "latent_dim": 16}
OTHERS = {
    "vector": (
        VQVAEConfig(domain=domains.Vector(channels=24), n_channels=24, **MLP, **MEMCODES),
        np.linspace(-1, 1, 24, dtype=np.float32),
        (8, 1, 1),
    ),
    "pose": (
        VQVAEConfig(domain=domains.Poses(), n_channels=207, **MLP, **MEMCODES),
        np.tile(np.eye(3, dtype=np.float32).ravel(), 23),
        (8, 1, 1),
    ),
    "mask": (
        VQVAEConfig(domain=domains.SamMask(), n_channels=1, image_size=64, patch_size=16, out_conv=True, **VIT),
        np.tri(64, dtype=np.bool_),
        (4, 4),
    ),
    "features": (
        VQVAEConfig(
            domain=domains.Features(channels=6), n_channels=6, image_size=56, patch_size=14, patch_proj=False, **VIT
        ),
        np.ones((4, 4, 6), np.float32),
        (4, 4),
    ),
    "heads": (
        VQVAEConfig(domain=domains.Rgb(), image_size=32, patch_size=8, num_codebooks=3, **VIT),
        np.zeros((32, 32, 3), np.uint8),
        (3, 4, 4),
    ),
    "fsq": (
        VQVAEConfig(domain=domains.Rgb(), image_size=32, patch_size=8, quant_type="fsq", **VIT),
        np.zeros((32, 32, 3), np.uint8),
        (4, 4),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_value_goes_to_ids_and_back_and_is_learned(name: str) -> None:
    config, value, grid = OTHERS[name]
    model = VQVAE(config)
    assert model.grid == grid
    ids = model.encode_batch([value, value])
    assert (ids.shape, ids.dtype) == ((2, *grid), np.int64)
    assert ids.max() < model.vocab_size
    back = model.decode(ids[0])
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    with pytest.raises(ValueError, match="b, heads, h, w" if len(grid) == 3 else "b, h, w"):
        model.decode_batch(ids.reshape(2, -1))
    model.train()
    loss, figures = model.training_loss(model.domain.to_network([value, value]))
    loss.backward()
    assert figures["reconstruction"] > 0
    assert all(p.grad is not None for p in model.decoder.parameters() if p.requires_grad)
    assert model.quant_proj.weight.grad is not None


def test_the_mlp_is_its_formula() -> None:
    mlp = BottleneckMLP(5, 7, (1, 4, 2))
    x = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    h = x.permute(0, 2, 3, 1) @ mlp.linear_in.weight.T + mlp.linear_in.bias
    inner = mlp.blocks[0].block
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h + torch.nn.functional.gelu(normed @ inner[0].weight.T + inner[0].bias) @ inner[2].weight.T + inner[2].bias
    expected = (h @ mlp.linear_out.weight.T + mlp.linear_out.bias).permute(0, 3, 1, 2)
    assert torch.allclose(mlp(x), expected, atol=1e-5)


def test_mlps_have_4ms_names() -> None:
    assert mlp_size("BottleneckMLP/B_6-Wi_1024") == (6, 1024, 4)
    assert mlp_size("BottleneckMLP/B_12-Wi_64-E_2") == (12, 64, 2)
    for name in ("MLP/B_6-Wi_1024", "BottleneckMLP/B_6", "BottleneckMLP/B_0-Wi_8"):
        with pytest.raises(ValueError, match="expected BottleneckMLP/B_<blocks>-Wi_<width>"):
            mlp_size(name)


def test_a_frozen_encoder_half_stays_as_it_is() -> None:
    model = VQVAE(replace(VQVAE.tiny().config, freeze_enc=True)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss, _ = model.training_loss(x)
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert {name.split(".")[0] for name in changed} <= {"decoder", "post_quant_proj"}
    assert model.decoder.training
    assert not any(part.training for part in (model.encoder, model.quantize))


def test_standardised_images_are_undone_for_tensors_and_not_for_maps() -> None:
    plain = VQVAE.tiny()
    undone = VQVAE(replace(plain.config, undo_std=True))
    undone.load_state_dict(plain.state_dict())
    (image, *_) = plain.examples()
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    standardised = (x - mean[:, None, None]) / std[:, None, None]
    ids = plain.encode(image)
    assert np.array_equal(undone.eval().tokenize(standardised)[0].numpy(), ids)
    assert np.array_equal(undone.encode(image), ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domain": domains.Depth()}, "n_channels 3, expected 1 for the depth domain"),
        ({"patch_size_dec": 5}, "image size 224, expected a multiple of the patch size 5"),
        ({"quant_type": "fsq", "num_codebooks": 2}, "num_codebooks 2 of quant_type 'fsq', expected 1"),
        ({"enc_type": "resnet50"}, "'resnet50', expected vit_s_enc"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQVAE(VQVAEConfig(**settings))


# The file.


def test_a_file_of_4m_loads_without_our_settings(tmp_path: Path) -> None:
    model = VQVAE.tiny()
    model.save(tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["codebook_size"] == "64"
    assert header["post_mlp"] == "True"
    assert header["image_size_enc"] == "None"
    assert header["threshold_ema_dead_code"] == "0.05"
    theirs = {name: text for name, text in header.items() if name not in ("domain", "domain_settings", "seed")}
    theirs |= {"sync_codebook": "True", "ckpt_path": "None", "commitment_weight": "1e-05", "ema_decay": "1"}
    save_file(model.state_dict(), tmp_path / "theirs.safetensors", metadata=theirs)
    bare = VQVAE.load(tmp_path / "theirs.safetensors")
    assert bare.config.commitment_weight == 1e-5
    with pytest.raises(ValueError, match="no domain"):
        bare.encode(model.examples()[0])
    loaded = VQVAE.load(tmp_path / "theirs.safetensors", domain=domains.Rgb())
    assert np.array_equal(loaded.encode(model.examples()[0]), model.encode(model.examples()[0]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"quant_type": "rvq"}, "quant_type 'rvq', expected one of lucid"),
        ({"norm_codes": "1"}, "norm_codes 1, expected"),
        ({"codebook_size": "True"}, "codebook_size True, expected"),
        ({"codebook_size": "many"}, "codebook_size 'many', expected"),
        ({"domain_settings": "__import__('os').getcwd()", "domain": "rgb"}, "getcwd.*, expected a dict"),
        ({"domain_settings": "{'scale': 2}", "domain": "rgb"}, "unknown settings"),
        ({"domain_settings": "{}", "domain": "thermal"}, "domain 'thermal', expected one of rgb"),
    ],
)
def test_a_header_that_we_cannot_follow_is_refused(tmp_path: Path, setting: dict[str, str], message: str) -> None:
    model = VQVAE.tiny()
    model.save(tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        header = file.metadata()
    save_file(model.state_dict(), tmp_path / "file", metadata=header | setting)
    with pytest.raises(ValueError, match=message):
        VQVAE.load(tmp_path / "file")


def test_the_domain_is_saved_with_its_settings(tmp_path: Path) -> None:
    tiny = VQVAE.tiny().config
    for config in (
        replace(tiny, n_channels=1, domain=domains.Depth(nearest=0.05, smooth_at=0.25)),
        replace(tiny, n_labels=3, domain=domains.Semseg(classes=(2, 119))),
    ):
        VQVAE(config).save(tmp_path / "file")
        assert VQVAE.load(tmp_path / "file").config == config
    assert pickle.loads(pickle.dumps(config)) == config
