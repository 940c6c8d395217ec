"""FourM: a masked encoder-decoder over many modalities (4M-21, Bachmann et al. 2024), the same function as ml-4m's.

Only tokens that masking kept are embedded, in one row for the whole batch: nothing is computed at padding. Logits are
computed only where there is a target.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.attention import Group, Groups
from model.blocks import ACTIVATIONS, Block, DecoderBlock, LayerNorm
from model.embeddings import IdEmbedding, PixelEmbedding, TargetEmbedding, VectorEmbedding, encoder_embedding
from model.masking import MaskedBatch
from model.spec import ModalitySpec

# B batch, N encoder tokens, M decoder tokens, S and T all of a batch that are real, R registers, D width, V vocabulary

_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class FourMConfig:
    """Size and variant of a FourM; the names are those of an ml-4m configuration, `act` is its `act_layer`."""

    dim: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    gated_mlp: bool = True
    act: str = "SiLU"
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    num_register_tokens: int = 0
    decoder_causal_mask: bool = False
    decoder_sep_mask: bool = True
    share_modality_embeddings: bool = True
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim {self.dim}, expected a multiple of 4 and of num_heads {self.num_heads}")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act {self.act!r}, expected one of {sorted(ACTIVATIONS)}")

    @classmethod
    def preset(cls, name: str, variant: str = "swiglu_nobias") -> FourMConfig:
        """nano, tiny, small, base, large or xlarge in the variant gelu, swiglu_nobias or swiglu_qknorm_nobias."""
        if name not in _SIZES:
            raise ValueError(f"preset {name!r}, expected one of {sorted(_SIZES)}")
        if variant not in _VARIANTS:
            raise ValueError(f"variant {variant!r}, expected one of {sorted(_VARIANTS)}")
        dim, depth, heads = _SIZES[name]
        size = cls(dim=dim, encoder_depth=depth, decoder_depth=depth, num_heads=heads)
        return replace(size, **_VARIANTS[variant])


_SIZES = {  # width, depth of each side, heads
    "nano": (192, 4, 3),
    "tiny": (384, 6, 6),
    "small": (512, 8, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xlarge": (2048, 24, 32),
}
_BIASED: dict[str, Any] = {"qkv_bias": True, "proj_bias": True, "mlp_bias": True, "norm_bias": True}
_VARIANTS: dict[str, dict[str, Any]] = {
    "gelu": {"gated_mlp": False, "act": "GELU", **_BIASED},
    "swiglu_nobias": {},
    "swiglu_qknorm_nobias": {"qk_norm": True},
}


@dataclass(frozen=True)
class Output:
    """The loss to minimise, the mean cross-entropy (nats) and the number of targets of each output modality.

    A modality without a target in the batch has loss 0 and count 0.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    counts: dict[str, int]


@dataclass(frozen=True)
class Context:
    """What the decoder looks at: the encoder's tokens of all samples in one row (S, D), and how many each has."""

    tokens: Tensor
    lengths: tuple[int, ...]


class FourM(nn.Module):
    """The model; weights are drawn from `seed`, never from the global generator."""

    def __init__(
        self,
        config: FourMConfig,
        specs_in: Sequence[ModalitySpec],
        specs_out: Sequence[ModalitySpec],
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        refused = [spec.name for spec in specs_out if not spec.is_target]
        if refused:
            raise ValueError(f"specs_out has {refused}, expected only tokens and sequences")
        self.config = config
        self.specs_in, self.specs_out = tuple(specs_in), tuple(specs_out)
        dim = config.dim
        with torch.random.fork_rng(devices=[]):  # torch's own initialisers draw globally; init_weights redraws all
            self.encoder_embeddings = nn.ModuleDict({s.name: encoder_embedding(s, dim) for s in specs_in})
            self.decoder_embeddings = nn.ModuleDict(
                {s.name: TargetEmbedding(s, dim, tied=config.tie_embeddings) for s in specs_out}
            )
            if config.share_modality_embeddings:
                for name in self.encoder_embeddings.keys() & self.decoder_embeddings.keys():
                    self.decoder_embeddings[name].mod_emb = self.encoder_embeddings[name].mod_emb
            block: dict[str, Any] = {
                "dim": dim, "num_heads": config.num_heads, "hidden": int(dim * config.mlp_ratio), "act": config.act,
                "gated": config.gated_mlp, "qk_norm": config.qk_norm, "qkv_bias": config.qkv_bias,
                "proj_bias": config.proj_bias, "mlp_bias": config.mlp_bias, "norm_bias": config.norm_bias,
            }  # fmt: skip
            self.encoder = nn.ModuleList(Block(**block) for _ in range(config.encoder_depth))
            self.encoder_norm = LayerNorm(dim, bias=config.norm_bias)
            self.decoder_proj_context = nn.Linear(dim, dim)
            self.decoder = nn.ModuleList(DecoderBlock(**block) for _ in range(config.decoder_depth))
            self.decoder_norm = LayerNorm(dim, bias=config.norm_bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, dim))
        self.init_weights(torch.Generator().manual_seed(seed))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> FourM:
        """The model of a folder, a file or a Hugging Face repository, ours or ml-4m's: `checkpoint.from_pretrained`."""
        from model import checkpoint  # it imports this module

        return checkpoint.from_pretrained(source, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `from_pretrained`, here and in ml-4m, reads."""
        from model import checkpoint

        checkpoint.save_pretrained(self, folder)

    def forward(self, batch: MaskedBatch, loss: Literal["mod", "token"] = "mod") -> Output:
        """Cross-entropy at the targets.

        "mod": the mean over output modalities of each one's mean, modalities without a target counting as 0 (ml-4m's
        default). "token": the mean over all targets.
        """
        hidden, slots = self._decoded(batch, self.encode(batch))
        targets, modality = batch.dec_targets.flatten()[slots], batch.dec_mod.flatten()[slots]
        names = {name: m for m, name in enumerate(batch.modalities)}
        losses: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for spec in self.specs_out:
            index = (modality == names.get(spec.name, len(names))).nonzero().squeeze(1)
            counts[spec.name] = len(index)
            if len(index):
                scores = self.logits(hidden.index_select(0, index), spec.name)
                losses[spec.name] = F.cross_entropy(scores.float(), targets.index_select(0, index))
            else:
                losses[spec.name] = hidden.new_zeros((), dtype=torch.float32)
        return Output(_total(losses, counts, loss), losses, counts)

    def encode(self, batch: MaskedBatch) -> Context:
        """Encoder output projected for the decoder; a sample without inputs has its registers, else one zero token."""
        real = batch.enc_mod >= 0
        registers = self.config.num_register_tokens
        if registers:
            real = torch.cat([real.new_ones(len(real), registers), real], dim=1)
        else:
            empty = ~real.any(dim=1, keepdim=True)
            real = torch.cat([real[:, :1] | empty, real[:, 1:]], dim=1)
        lengths = tuple(real.sum(dim=1).tolist())
        content, place = self._embed_inputs(batch, real)
        groups = Groups([Group(length, length) for length in lengths], content.device)
        x_SD = content + place
        for block in self.encoder:
            x_SD = block(x_SD, groups)
        return Context(self.decoder_proj_context(self.encoder_norm(x_SD)) + place, lengths)

    def decode(self, batch: MaskedBatch, context: Context) -> Tensor:
        """Hidden states (B, M, D) at the decoder tokens, ready for `logits`; zero at padding."""
        hidden, slots = self._decoded(batch, context)
        whole = hidden.new_zeros(batch.dec_mod.numel(), hidden.shape[1])
        return whole.index_copy(0, slots, hidden).view(*batch.dec_mod.shape, -1)

    def _decoded(self, batch: MaskedBatch, context: Context) -> tuple[Tensor, Tensor]:
        """Hidden states (T, D) of the real decoder tokens, and their places in the flat batch (T,)."""
        order, groups, lengths = self._decoder_groups(batch)
        device = batch.dec_mod.device
        slots = torch.from_numpy(order).to(device)
        own = Groups(groups, device)
        cross = Groups([Group(n, m) for n, m in zip(lengths, context.lengths, strict=True)], device)
        y_TD = self._embed_targets(batch, slots)
        for block in self.decoder:
            y_TD = block(y_TD, context.tokens, own, cross)
        return self.decoder_norm(y_TD), slots

    def logits(self, hidden: Tensor, modality: str) -> Tensor:
        """Scores (..., V) over the vocabulary of one output modality."""
        return self._target(modality).to_logits(hidden)

    def _target(self, modality: str) -> TargetEmbedding:
        if modality not in self.decoder_embeddings:
            raise ValueError(f"{modality}: not an output, expected one of {sorted(self.decoder_embeddings)}")
        embedding = self.decoder_embeddings[modality]
        assert isinstance(embedding, TargetEmbedding)
        return embedding

    def _embed_inputs(self, batch: MaskedBatch, real: Tensor) -> tuple[Tensor, Tensor]:
        """Content and place (S, D) of the encoder tokens that are `real` (B, R+N); zero where there is none."""
        ids, positions = batch.enc_ids.flatten(), batch.enc_pos.flatten()
        content, place, order = [], [], []
        for name, index in _members(batch.enc_mod, batch.modalities):
            if name not in self.encoder_embeddings:
                raise ValueError(f"{name}: not an input, expected one of {sorted(self.encoder_embeddings)}")
            embedding = self.encoder_embeddings[name]
            ids_T, positions_T = ids[index], positions[index]
            if isinstance(embedding, PixelEmbedding):
                content.append(embedding.content(batch.pixels[name], ids_T))
            elif isinstance(embedding, VectorEmbedding):
                content.append(embedding.content(batch.embeddings[name], ids_T))
            else:
                assert isinstance(embedding, IdEmbedding)
                content.append(embedding.content(ids_T))
            place.append(embedding.place(positions_T))
            order.append(index)
        source = _source(order, batch.enc_mod)
        first = self.mask_token.new_zeros(1, self.config.dim)
        if registers := self.config.num_register_tokens:
            # Rows 1 to R of the contents are the registers.
            own = torch.arange(1, registers + 1, device=source.device).expand(len(source), registers)
            content_source = torch.cat([own, torch.where(source > 0, source + registers, 0)], dim=1)
            source = torch.cat([torch.zeros_like(own), source], dim=1)
            return (
                _rows([first, self.register_tokens[0], *content], content_source[real]),
                _rows([first, *place], source[real]),
            )
        return _rows([first, *content], source[real]), _rows([first, *place], source[real])

    def _embed_targets(self, batch: MaskedBatch, slots: Tensor) -> Tensor:
        """Decoder inputs (T, D) at places of the flat batch: previous id or mask token, plus place."""
        ids, positions = batch.dec_ids.flatten(), batch.dec_pos.flatten()
        first = self.mask_token.new_zeros(1, self.config.dim)
        tokens, order = [first], []
        for name, index in _members(batch.dec_mod, batch.modalities):
            embedding = self._target(name)
            place = embedding.place(positions[index])
            if embedding.spec.is_grid:
                tokens.append(place + self.mask_token[0])
            else:
                tokens.append(place + embedding.content(ids[index]))
            order.append(index)
        return _rows(tokens, _source(order, batch.dec_mod).flatten()[slots])

    def _decoder_groups(self, batch: MaskedBatch) -> tuple[NDArray[np.int64], list[Group], list[int]]:
        """Places of the real decoder tokens in the flat batch, sample by sample and group by group; who sees whom;
        and how many tokens each sample has.
        """
        modality, reach = batch.dec_mod.cpu().numpy(), batch.dec_reach.cpu().numpy()
        order, groups, lengths = [np.empty(0, np.int64)], [], []
        for sample, (mods, reaches) in enumerate(zip(modality, reach, strict=True)):
            (real,) = np.nonzero(mods >= 0)
            lengths.append(len(real))
            parts = [real]
            if self.config.decoder_sep_mask:
                parts = [real[mods[real] == m] for m in dict.fromkeys(mods[real].tolist())]
            for part in parts:
                limit = part + 1 if self.config.decoder_causal_mask else reaches[part]
                groups.append(Group.by_mask(part[None, :] < limit[:, None]))
                order.append(sample * len(mods) + part)
        return np.concatenate(order), groups, lengths

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """ml-4m's initial distribution: normal(0.02) for embeddings and free tokens, Xavier-uniform for linear maps.

        Where logits are tied to a table the linear map comes last, so the table is Xavier-uniform too.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # Packed projections count as the separate matrices they hold.
                packed = 3 if "qkv" in name else 2 if "kv" in name else 1
                bound = math.sqrt(6.0 / (module.out_features // packed + module.in_features))
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=_INIT_STD, generator=generator)
        for name, parameter in self.named_parameters():
            if name.endswith(("mod_emb", "pos_emb", "mask_token", "register_tokens")):
                parameter.normal_(std=_INIT_STD, generator=generator)


def _members(modality: Tensor, names: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Flat indices of the tokens of each modality that occurs."""
    flat = modality.flatten()
    found = [(name, (flat == m).nonzero().squeeze(1)) for m, name in enumerate(names)]
    return [(name, index) for name, index in found if len(index)]


def _source(order: list[Tensor], modality: Tensor) -> Tensor:
    """For each slot of `modality` (B, N) its row among the parts that `order` places, counted from 1; 0 is none."""
    source = torch.zeros(modality.numel(), dtype=torch.int64, device=modality.device)
    if order:
        index = torch.cat(order)
        source[index] = torch.arange(1, len(index) + 1, device=index.device)
    return source.view(modality.shape)


def _rows(parts: list[Tensor], index: Tensor) -> Tensor:
    # One concatenation and one gather: their backward is cheap, unlike a chain of in-place index writes.
    return torch.cat([part.to(parts[0].dtype) for part in parts]).index_select(0, index)


def _total(losses: dict[str, Tensor], counts: dict[str, int], kind: str) -> Tensor:
    if kind == "mod":
        return torch.stack(list(losses.values())).mean()
    if kind == "token":
        weighted = [losses[name] * count for name, count in counts.items()]
        return torch.stack(weighted).sum() / max(1, sum(counts.values()))
    raise ValueError(f"loss {kind!r}, expected mod or token")
