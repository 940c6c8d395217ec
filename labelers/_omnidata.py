"""Omnidata's dense prediction transformers (DPT-hybrid, version 2) from their own checkpoints, by transformers' DPT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labelers import _checkpoints, _networks

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import DPTForDepthEstimation

PATCH = 16
HEAD_WIDTH = 64
GROUPS = 32
"""Groups of the convolutional stem's normalisation: no tensor shows them."""

STUBS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "argparse.Namespace",
)
"""What Lightning may have saved beside the tensors; none of it is needed."""

_UNUSED = re.compile(r"^pretrained\.model\.head\.")
"""The ImageNet classifier of the trunk, which no dense prediction reads."""

_NAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^pretrained\.model\.cls_token$", "dpt.embeddings.cls_token"),
        (r"^pretrained\.model\.pos_embed$", "dpt.embeddings.position_embeddings"),
        (r"^pretrained\.model\.patch_embed\.proj\.", "dpt.embeddings.projection."),
        (
            r"^pretrained\.model\.patch_embed\.backbone\.stem\.conv\.",
            "dpt.embeddings.backbone.bit.embedder.convolution.",
        ),
        (r"^pretrained\.model\.patch_embed\.backbone\.stem\.norm\.", "dpt.embeddings.backbone.bit.embedder.norm."),
        (
            r"^pretrained\.model\.patch_embed\.backbone\.stages\.(\d+)\.blocks\.",
            r"dpt.embeddings.backbone.bit.encoder.stages.\1.layers.",
        ),
        (r"^pretrained\.model\.blocks\.(\d+)\.attn\.proj\.", r"dpt.encoder.layer.\1.attention.output.dense."),
        (r"^pretrained\.model\.blocks\.(\d+)\.mlp\.fc1\.", r"dpt.encoder.layer.\1.intermediate.dense."),
        (r"^pretrained\.model\.blocks\.(\d+)\.mlp\.fc2\.", r"dpt.encoder.layer.\1.output.dense."),
        (r"^pretrained\.model\.blocks\.(\d+)\.norm1\.", r"dpt.encoder.layer.\1.layernorm_before."),
        (r"^pretrained\.model\.blocks\.(\d+)\.norm2\.", r"dpt.encoder.layer.\1.layernorm_after."),
        (r"^pretrained\.model\.norm\.", "dpt.layernorm."),
        (r"^pretrained\.act_postprocess3\.0\.project\.0\.", "neck.reassemble_stage.readout_projects.2.0."),
        (r"^pretrained\.act_postprocess4\.0\.project\.0\.", "neck.reassemble_stage.readout_projects.3.0."),
        (r"^pretrained\.act_postprocess3\.3\.", "neck.reassemble_stage.layers.2.projection."),
        (r"^pretrained\.act_postprocess4\.3\.", "neck.reassemble_stage.layers.3.projection."),
        (r"^pretrained\.act_postprocess4\.4\.", "neck.reassemble_stage.layers.3.resize."),
        (r"^scratch\.output_conv\.", "head.head."),
    )
)
_QKV = re.compile(r"^pretrained\.model\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")
_MERGED = re.compile(r"^scratch\.layer([1-4])_rn\.")
_REFINED = re.compile(r"^scratch\.refinenet([1-4])\.(out_conv|resConfUnit([12])\.conv([12]))\.")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a network; the defaults are those of the published ones."""

    stem: int = 64
    stages: tuple[int, int, int] = (256, 512, 1024)
    blocks: tuple[int, int, int] = (3, 4, 9)
    width: int = 768
    mlp: int = 3072
    depth: int = 12
    grid: int = 24
    neck: tuple[int, int] = (768, 768)
    fusion: int = 256
    channels: int = 1
    """1 for depth, 3 for normals."""

    @property
    def groups(self) -> int:
        """Groups of each group norm: 32, or fewer where a layer of a small network has fewer channels."""
        return min(GROUPS, self.stem, _narrow(self.stages[0]))


def runnable(network: DPTForDepthEstimation) -> nn.Module:
    """Pixels (n, 3, h, w), sides multiples of 32, to maps float32 (n, channels, h, w) of 0 or more.

    As the reference runs it on images of any such size, which transformers' own forward pass refuses: positions are
    interpolated to the grid, and the outputs of blocks 8 and 11 (of 12) go on with those of two convolutional stages.
    The last layer computes in float32 whatever the rest does, since half precision has too few steps for a map that
    is stored in 65536.
    """
    from torch import nn

    depth = len(network.dpt.encoder.layer)
    taps = (depth * 3 // 4 - 1, depth - 1)

    class Dpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: Tensor) -> Tensor:
            rows, cols = pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH
            dpt = self.network.dpt
            embedded = dpt.embeddings(pixels.to(dpt.embeddings.cls_token.dtype), interpolate_pos_encoding=True)
            tokens, tapped = embedded.last_hidden_states, []
            for i, layer in enumerate(dpt.encoder.layer):
                tokens = layer(tokens)
                if i in taps:
                    tapped.append(tokens)
            fused = self.network.neck([*embedded.intermediate_activations, *tapped], rows, cols)[-1]
            first, grow, second, relu, last, _ = self.network.head.head
            features = relu(second(grow(first(fused))))
            weight, bias = (value.float() for value in last.parameters())
            return nn.functional.relu(nn.functional.conv2d(features.float(), weight, bias))

    return Dpt()


def load(file: Path, channels: int, who: str) -> nn.Module:
    """The network of a published file, Lightning's or its bare tensors, on the CPU in float32.

    ValueError when it is another network's, or answers with another number of channels.
    """
    state: dict[str, Tensor] = dict(_checkpoints.read(file, stubs=STUBS))
    if any(name.startswith("model.") for name in state):
        foreign = sorted(name for name in state if not name.startswith("model."))
        if foreign:
            raise ValueError(f"{who}: expected tensors named model.*, found {', '.join(foreign[:5])}")
        state = {name.removeprefix("model."): value for name, value in state.items()}
    return network(state, channels, who)


def network(state: Mapping[str, Tensor], channels: int, who: str) -> nn.Module:
    """The network whose tensors these are, by their published names without `model.`."""
    import torch

    found = shape_of(state, who)
    if found.channels != channels:
        kinds = {1: "depth", 3: "normals"}
        raise ValueError(
            f"{who}: expected {channels} output channels ({kinds[channels]}), the checkpoint has {found.channels}"
            + (f" ({kinds[found.channels]})" if found.channels in kinds else "")
        )
    with torch.device("meta"):
        built = _build(found)
    built.to_empty(device="cpu")  # fill refuses to leave anything empty, and there are no buffers
    _networks.fill(built, renamed(state), who)
    _standardise(built)
    return runnable(built.eval().requires_grad_(False))


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by transformers' names; the unused classifier is left out, an unknown name stays as it is."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if _UNUSED.match(name):
            continue
        if qkv := _QKV.match(name):
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[f"dpt.encoder.layer.{qkv[1]}.attention.attention.{part}.{qkv[2]}"] = rows
        else:
            out[_renamed(name)] = value
    return out


def _renamed(name: str) -> str:
    if merged := _MERGED.match(name):
        return f"neck.convs.{int(merged[1]) - 1}.{name[merged.end() :]}"
    if refined := _REFINED.match(name):
        layer = "projection" if refined[2] == "out_conv" else f"residual_layer{refined[3]}.convolution{refined[4]}"
        # The reference counts from the finest map, transformers from the coarsest.
        return f"neck.fusion_stage.layers.{4 - int(refined[1])}.{layer}.{name[refined.end() :]}"
    for pattern, new in _NAMES:
        replaced, hits = pattern.subn(new, name)
        if hits:
            return replaced
    return name


def shape_of(state: Mapping[str, Tensor], who: str) -> Shape:
    """The sizes of the network whose tensors these are; ValueError when it is no such network."""
    trunk, backbone = "pretrained.model.", "pretrained.model.patch_embed.backbone."
    try:
        stages = [state[f"{backbone}stages.{s}.blocks.0.conv3.weight"].shape[0] for s in range(3)]
        blocks = [_checkpoints.count(state, f"{backbone}stages.{s}.blocks.") for s in range(3)]
        return Shape(
            stem=state[f"{backbone}stem.conv.weight"].shape[0],
            stages=(stages[0], stages[1], stages[2]),
            blocks=(blocks[0], blocks[1], blocks[2]),
            width=state[f"{trunk}cls_token"].shape[-1],
            mlp=state[f"{trunk}blocks.0.mlp.fc1.weight"].shape[0],
            depth=_checkpoints.count(state, f"{trunk}blocks."),
            grid=round((state[f"{trunk}pos_embed"].shape[1] - 1) ** 0.5),
            neck=(
                state["pretrained.act_postprocess3.3.weight"].shape[0],
                state["pretrained.act_postprocess4.3.weight"].shape[0],
            ),
            fusion=state["scratch.layer1_rn.weight"].shape[0],
            channels=state["scratch.output_conv.4.weight"].shape[0],
        )
    except KeyError as error:
        raise ValueError(f"{who}: expected the tensors of Omnidata's DPT-hybrid, there is no {error}") from error


def shapes(of: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published file and its shape, by its name without `model.`."""
    out: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = weight
        if bias:
            out[f"{name}.bias"] = weight[:1]

    trunk = "pretrained.model"
    width = of.width
    out[f"{trunk}.cls_token"] = (1, 1, width)
    out[f"{trunk}.pos_embed"] = (1, 1 + of.grid**2, width)
    backbone = f"{trunk}.patch_embed.backbone"
    layer(f"{backbone}.stem.conv", of.stem, 3, 7, 7, bias=False)
    layer(f"{backbone}.stem.norm", of.stem)
    inside = of.stem
    for s, (outside, blocks) in enumerate(zip(of.stages, of.blocks, strict=True)):
        narrow = _narrow(outside)
        for b in range(blocks):
            block = f"{backbone}.stages.{s}.blocks.{b}"
            if b == 0:
                layer(f"{block}.downsample.conv", outside, inside, 1, 1, bias=False)
                layer(f"{block}.downsample.norm", outside)
            layer(f"{block}.conv1", narrow, outside if b else inside, 1, 1, bias=False)
            layer(f"{block}.norm1", narrow)
            layer(f"{block}.conv2", narrow, narrow, 3, 3, bias=False)
            layer(f"{block}.norm2", narrow)
            layer(f"{block}.conv3", outside, narrow, 1, 1, bias=False)
            layer(f"{block}.norm3", outside)
        inside = outside
    layer(f"{trunk}.patch_embed.proj", width, inside, 1, 1)
    for b in range(of.depth):
        block = f"{trunk}.blocks.{b}"
        layer(f"{block}.norm1", width)
        layer(f"{block}.attn.qkv", 3 * width, width)
        layer(f"{block}.attn.proj", width, width)
        layer(f"{block}.norm2", width)
        layer(f"{block}.mlp.fc1", of.mlp, width)
        layer(f"{block}.mlp.fc2", width, of.mlp)
    layer(f"{trunk}.norm", width)
    layer(f"{trunk}.head", 1000, width)
    for n, neck in zip((3, 4), of.neck, strict=True):
        layer(f"pretrained.act_postprocess{n}.0.project.0", width, 2 * width)
        layer(f"pretrained.act_postprocess{n}.3", neck, width, 1, 1)
    layer("pretrained.act_postprocess4.4", of.neck[1], of.neck[1], 3, 3)
    for n, channels in enumerate((*of.stages[:2], *of.neck), start=1):
        layer(f"scratch.layer{n}_rn", of.fusion, channels, 3, 3, bias=False)
        layer(f"scratch.refinenet{n}.out_conv", of.fusion, of.fusion, 1, 1)
        for unit in (1, 2):
            for conv in (1, 2):
                layer(f"scratch.refinenet{n}.resConfUnit{unit}.conv{conv}", of.fusion, of.fusion, 3, 3)
    layer("scratch.output_conv.0", of.fusion // 2, of.fusion, 3, 3)
    layer("scratch.output_conv.2", 32, of.fusion // 2, 3, 3)
    layer("scratch.output_conv.4", of.channels, 32, 1, 1)
    return out


def random_state(of: Shape, seed: int) -> dict[str, Tensor]:
    """Seeded random tensors by the published names without `model.`, whose maps lie about the middle of 0..1."""
    import torch

    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes(of).items()}
    state = _checkpoints.randomised(empty, seed)
    state["scratch.output_conv.4.weight"] *= 0.2
    state["scratch.output_conv.4.bias"] += 0.5
    return state


def save_tiny(file: Path, channels: int, seed: int) -> None:
    """A random network of width 16 as Lightning saves it, in half precision."""
    import torch

    tiny = Shape(
        stem=16, stages=(32, 32, 32), blocks=(1, 1, 1), width=16, mlp=32, depth=2, grid=4, neck=(16, 16), fusion=16
    )
    tiny = Shape(**{**tiny.__dict__, "channels": channels})
    state = {f"model.{name}": value.half() for name, value in random_state(tiny, seed).items()}
    torch.save({"epoch": 0, "global_step": 0, "state_dict": state}, file)


def _build(of: Shape) -> DPTForDepthEstimation:
    from torch import nn
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        is_hybrid=True,
        hidden_size=of.width,
        num_hidden_layers=of.depth,
        num_attention_heads=max(of.width // HEAD_WIDTH, 1),
        intermediate_size=of.mlp,
        layer_norm_eps=1e-6,
        image_size=PATCH * of.grid,
        patch_size=PATCH,
        readout_type="project",
        reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[*of.stages[:2], *of.neck],
        fusion_hidden_size=of.fusion,
        backbone_featmap_shape=[1, of.stages[-1], of.grid, of.grid],
        backbone_config={
            "model_type": "bit",
            "embedding_size": of.stem,
            "hidden_sizes": [*of.stages, 2 * of.stages[-1]],
            "depths": list(of.blocks),
            "num_groups": of.groups,
            "global_padding": "same",
            "layer_type": "bottleneck",
            "out_features": ["stage1", "stage2", "stage3"],
            "embedding_dynamic_padding": True,
        },
    )
    built = DPTForDepthEstimation(config)
    built.head.head[4] = nn.Conv2d(32, of.channels, kernel_size=1)
    return built


def _standardise(built: DPTForDepthEstimation) -> None:
    """Standardise the weights of the convolutional stem once, in float32, and not in each forward pass.

    There half precision would do it, badly, and a small batch would wait for it.
    """
    import torch
    from torch import nn
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    found = [(name, m) for name, m in built.named_modules() if isinstance(m, WeightStandardizedConv2d)]
    for name, module in found:
        flat = module.weight.reshape(1, module.out_channels, -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0, eps=module.eps)
        with torch.device("meta"):
            plain = nn.Conv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
        plain.weight = nn.Parameter(weight.reshape_as(module.weight), requires_grad=False)
        plain.bias = module.bias
        built.set_submodule(name, plain if module.pad is None else nn.Sequential(module.pad, plain))


def _narrow(outside: int) -> int:
    """Channels inside a bottleneck block: a quarter, in multiples of 8."""
    return max(8, (outside // 4 + 4) // 8 * 8)
