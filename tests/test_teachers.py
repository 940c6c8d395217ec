"""The teachers of features, each against what its authors run: the same function of whole photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dataengine.labeler import Labeler, Staged
from labelers import (
    _checkpoints,
    _images,
    _networks,
    _openclip,
    clip_b16,
    dinov2_b14,
    imagebind_h14,
    openclip_h14,
)
from labelers.clip_b16 import ClipB16
from labelers.dinov2_b14 import DinoV2
from labelers.dinov3 import DinoV3
from labelers.imagebind_h14 import ImageBindH14
from labelers.openclip_h14 import OpenClipH14
from labelers.siglip2 import SigLip2
from tests.golden import make_clip, make_dinov2, make_imagebind
from tests.teachers import HALF, SAMPLES, TOLERANCE, batch, error, run

GOLDEN = Path(__file__).parent / "golden"


def shapes(text: str) -> dict[str, Tensor]:
    """Tensors without values, of names and shapes one a line."""
    lines = (line.split() for line in text.splitlines())
    return {name: torch.empty([int(n) for n in shape], device="meta") for name, *shape in lines}


# -- ImageBind --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagebind() -> dict[str, Any]:
    with np.load(GOLDEN / "imagebind.npz", allow_pickle=False) as stored:
        return dict(stored)


def imagebind_state() -> dict[str, Tensor]:
    return imagebind_h14.random_state(make_imagebind.SHAPE, make_imagebind.SEED)


@pytest.mark.parametrize(("final_norm", "name"), [(False, "tokens"), (True, "normed")])
def test_imagebind_tokens_are_those_of_its_repository(imagebind: dict[str, Any], final_norm: bool, name: str) -> None:
    tower = imagebind_h14.network(imagebind_state())
    pixels = batch(224, _images.CLIP)
    assert error(run(tower, pixels)[0], imagebind["embedding"]) < TOLERANCE
    cls, patches = run(_openclip.trunk(tower, final_norm=final_norm), pixels)
    tokens = torch.cat([cls[:, None], patches], 1)[:, :: make_imagebind.EVERY]
    assert error(tokens, imagebind[name]) < TOLERANCE
    assert error(cls, imagebind[name][:, 0]) < TOLERANCE


def test_imagebind_labels_are_those_of_its_repository(imagebind: dict[str, Any], tmp_path: Path) -> None:
    torch.save(imagebind_state(), tmp_path / "imagebind_huge.pth")
    for final_norm, name in ((False, "tokens"), (True, "normed")):
        setting = ImageBindH14(
            checkpoint=str(tmp_path / "imagebind_huge.pth"), normalisation="native", final_norm=final_norm
        )
        for labels, expected in zip(setting.load("cpu")(SAMPLES), imagebind[name], strict=True):
            assert labels["ImageBind-H14"].shape == (16, 16, 160)
            patches = labels["ImageBind-H14"].reshape(256, 160)[make_imagebind.EVERY - 1 :: make_imagebind.EVERY]
            assert error(patches, expected[1:]) < HALF
            assert error(labels["ImageBind-H14-global"], expected[0]) < HALF


def test_every_published_tensor_of_imagebind_is_known(imagebind: dict[str, Any]) -> None:
    published = shapes(str(imagebind["published"]))
    assert len(published) == 1311
    vision = {name for name in published if ".vision." in name}
    assert len(vision) == 8 + 32 * 12
    assert {name for name in published if not imagebind_h14.UNUSED.match(name)} == vision
    tower = imagebind_h14.network(published)
    assert len(tower.state_dict()) == len(vision)
    assert sum(t.numel() for t in tower.state_dict().values()) == 632_076_800
    block = tower.transformer.resblocks[0]
    assert (len(tower.transformer.resblocks), block.attn.num_heads, block.ln_1.eps) == (32, 16, 1e-6)
    assert type(block.mlp.gelu) is torch.nn.GELU
    assert block.mlp.gelu.approximate == "none"
    tiny = {name: t.shape for name, t in imagebind_state().items() if ".vision." in name}
    assert {n.replace("blocks.1.", "blocks.0.") for n in tiny} == {n for n in vision if "blocks" not in n} | {
        n for n in vision if "blocks.0." in n
    }


def test_imagebind_refuses_what_it_is_not(tmp_path: Path) -> None:
    state = imagebind_state()
    with pytest.raises(ValueError, match=r"imagebind_h14: .*1 tensors unexpected: modality_heads\.smell\.0\.weight"):
        imagebind_h14.network(state | {"modality_heads.smell.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 tensors unexpected: modality_trunks\.vision\.post\.weight"):
        imagebind_h14.network(state | {"modality_trunks.vision.post.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 tensors unexpected: transformer\.resblocks\.1\.attn\.more"):
        imagebind_h14.network(state | {"modality_trunks.vision.blocks.1.attn.more": torch.zeros(1)})
    del state["modality_trunks.vision.blocks.1.norm_1.bias"]
    with pytest.raises(ValueError, match=r"1 tensors missing: transformer\.resblocks\.1\.ln_1\.bias"):
        imagebind_h14.network(state)
    with pytest.raises(ValueError, match="no tensor of vision"):
        imagebind_h14.network({"modality_heads.audio.0.weight": torch.zeros(1)})
    torch.save({n: v for n, v in imagebind_state().items() if "heads.vision.2" not in n}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"imagebind_h14: .* found no proj"):
        ImageBindH14(checkpoint=str(tmp_path / "cut.pth")).load("cpu")


def test_twins_are_told_by_their_tensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = imagebind_state()
    torch.save(state, tmp_path / "imagebind_huge.pth")
    twin = {f"visual.{name}": value.contiguous() for name, value in imagebind_h14.renamed(state).items()}
    save_file(twin | {"logit_scale": torch.zeros(())}, tmp_path / "twin.safetensors")
    same = openclip_h14.twin_differences(tmp_path / "imagebind_huge.pth", tmp_path / "twin.safetensors")
    assert len(same) == 8 + 2 * 12
    assert set(same.values()) == {0.0}
    twin["visual.ln_post.bias"] = twin["visual.ln_post.bias"] + 0.25
    del twin["visual.proj"]
    save_file(twin, tmp_path / "other.safetensors")
    other = openclip_h14.twin_differences(tmp_path / "imagebind_huge.pth", tmp_path / "other.safetensors")
    changed = {name: value for name, value in other.items() if value}
    assert changed == {"ln_post.bias": pytest.approx(0.25, abs=1e-6), "proj": float("inf")}
    # And their features differ by the epsilon of the norms alone.
    paths = (tmp_path / "imagebind_huge.pth", tmp_path / "twin.safetensors")
    one = ImageBindH14(checkpoint=str(paths[0])).load("cpu")(SAMPLES)
    two = OpenClipH14(checkpoint=str(paths[1])).load("cpu")(SAMPLES)
    for mine, theirs in zip(one, two, strict=True):
        assert error(mine["ImageBind-H14"], theirs["OpenCLIP-H14"]) < 2 * HALF
        assert error(mine["ImageBind-H14-global"], theirs["OpenCLIP-H14-global"]) < 2 * HALF


# -- OpenCLIP ViT-H and CLIP ------------------------------------------------------------------------------------------


def test_openclip_h14_is_the_tower_that_open_clip_builds(tmp_path: Path) -> None:
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower
    from safetensors.torch import save_file

    published = open_clip.get_model_config("ViT-H-14")["vision_cfg"]
    assert "quick_gelu" not in open_clip.get_model_config("ViT-H-14")
    reference = _build_vision_tower(24, CLIPVisionCfg(**published | {"width": 160, "layers": 2})).eval()
    state = _checkpoints.randomised(reference.state_dict(), seed=3)
    reference.load_state_dict(state)
    reference.output_tokens = True
    save_file({f"visual.{name}": value for name, value in state.items()}, tmp_path / "open_clip_model.safetensors")
    pixels = batch(224, _images.CLIP)
    pooled, tokens = run(reference, pixels)
    ours = openclip_h14.network(state)
    assert error(run(ours, pixels)[0], pooled) < TOLERANCE
    cls, patches = run(_openclip.trunk(ours, final_norm=True), pixels)
    assert error(patches, tokens) < TOLERANCE
    assert error(cls @ state["proj"], pooled) < TOLERANCE
    raw = run(_openclip.trunk(openclip_h14.network(state), final_norm=False), pixels)
    last = run(reference.forward_intermediates, pixels, indices=1, output_fmt="NLC", output_extra_tokens=True)
    assert error(raw[1], last["image_intermediates"][0]) < TOLERANCE
    assert error(raw[0], last["image_intermediates_prefix"][0][:, 0]) < TOLERANCE
    labels = OpenClipH14(checkpoint=str(tmp_path), normalisation="native").load("cpu")(SAMPLES)
    for got, expected in zip(labels, tokens, strict=True):
        assert error(got["OpenCLIP-H14"].reshape(256, 160), expected) < HALF


def test_every_published_tensor_of_openclip_h14_is_known() -> None:
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        published = _build_vision_tower(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]))
    ours = openclip_h14.network(published.state_dict())
    assert len(ours.state_dict()) == 8 + 32 * 12
    assert [m.eps for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)] == [1e-5] * 66
    heads = {m.num_heads for m in (*ours.modules(), *published.modules()) if isinstance(m, torch.nn.MultiheadAttention)}
    assert heads == {16}


def test_clip_features_are_those_that_tokenizers_were_trained_on(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with np.load(GOLDEN / "clip.npz", allow_pickle=False) as stored:
        dense = stored["dense"]
    state = make_clip.random_state()
    tower = clip_b16.network(state, quick_gelu=True)
    assert error(run(clip_b16.dense, tower, batch(224, _images.IMAGENET)), dense) < TOLERANCE
    other = clip_b16.network(state, quick_gelu=False)
    assert error(run(clip_b16.dense, other, batch(224, _images.IMAGENET)), dense) > 100 * TOLERANCE
    save_file({f"visual.{name}": value for name, value in state.items()}, tmp_path / "open_clip_model.safetensors")
    for labels, expected in zip(ClipB16(checkpoint=str(tmp_path)).load("cpu")(SAMPLES), dense, strict=True):
        assert error(labels["CLIP-B16"].reshape(196, 24), expected) < HALF


# -- DINOv2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [224, 518])
def test_dinov2_features_are_those_of_its_repository(side: int, tmp_path: Path) -> None:
    with np.load(GOLDEN / "dinov2.npz", allow_pickle=False) as stored:
        cls, patches = stored[f"cls_{side}"], stored[f"patches_{side}"]
    every = make_dinov2.EVERY * (1 if side == 224 else 10)
    trunk = dinov2_b14.network(make_dinov2.random_state(), side)
    tokens = run(trunk, batch(side, _images.IMAGENET))
    assert error(tokens[:, 0], cls) < TOLERANCE
    assert error(tokens[:, 1:][:, ::every], patches) < TOLERANCE
    torch.save(make_dinov2.random_state(), tmp_path / "dinov2.pth")
    labels = DinoV2(checkpoint=str(tmp_path / "dinov2.pth"), side=side).load("cpu")(SAMPLES)
    for got, vector, grid in zip(labels, cls, patches, strict=True):
        assert error(got["DINOv2-B14-global"], vector) < HALF
        assert error(got["DINOv2-B14"].reshape(-1, 128)[::every], grid) < HALF


def test_every_published_tensor_of_dinov2_is_known() -> None:
    with np.load(GOLDEN / "dinov2.npz", allow_pickle=False) as stored:
        published = shapes(str(stored["published"]))
    assert len(published) == 175
    with torch.device("meta"):
        trunk = dinov2_b14.network(published, 518)
    assert set(trunk.state_dict()) | {"mask_token"} == set(published)
    assert trunk.blocks[0].attn.num_heads == 12
    assert trunk.norm.eps == 1e-6


# -- all of them ------------------------------------------------------------------------------------------------------

TEACHERS: list[Labeler] = [ClipB16(), DinoV2(), ImageBindH14(), OpenClipH14(), SigLip2(), DinoV3()]


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda t: t.name)
def test_statistics_and_squeezing_are_as_set(teacher: Any, tmp_path: Path) -> None:
    tiny = teacher.tiny(tmp_path)
    seen = {}
    for setting in ("imagenet", "native", "inception"):
        loaded = type(tiny)(checkpoint=tiny.checkpoint, normalisation=setting).load("cpu")
        assert isinstance(loaded, Staged)
        prepared = [loaded.prepare(sample) for sample in SAMPLES]
        assert {(p.dtype, p.shape[0] == p.shape[1]) for p in prepared} == {(np.dtype(np.uint8), True)}
        seen[setting] = loaded.label(prepared)[1][teacher.emits[0]].tobytes()
    # "native" is one of the other two where the network's own statistics are ImageNet's or -1 to 1.
    expected = {"dinov2_b14": 2, "dinov3": 2, "siglip2": 2}.get(teacher.name, 3)
    assert len(set(seen.values())) == expected
    with pytest.raises(ValueError, match=f"{teacher.name}: expected normalisation"):
        type(tiny)(checkpoint=tiny.checkpoint, normalisation="none")


def test_a_network_of_half_precision_gets_half_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_networks, "dtype_on", lambda device, precision: getattr(torch, precision))
    for teacher in TEACHERS:
        tiny: Any = teacher.tiny(tmp_path)
        exact = type(tiny)(checkpoint=tiny.checkpoint, precision="float32").load("cpu")(SAMPLES)
        rounded = type(tiny)(checkpoint=tiny.checkpoint, precision="float16").load("cpu")(SAMPLES)
        for name in teacher.emits:
            assert 0 < error(rounded[1][name], exact[1][name]) < 3e-2
