"""FourM: a masked encoder-decoder over many modalities (4M-21, Bachmann et al. 2024), the same function as ml-4m's.

Only tokens that masking kept are embedded, in one row for the whole batch: nothing is computed at padding. Logits are
computed only where there is a target. In bfloat16 on CPUs both numbers are rounded up: `FourM._rounds`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import layout
from model.attention import Attend, Group, planned
from model.blocks import ACTIVATIONS, Block, DecoderBlock, LayerNorm
from model.embeddings import IdEmbedding, PixelEmbedding, TargetEmbedding, VectorEmbedding, encoder_embedding
from model.masking import MaskedBatch
from model.spec import ModalitySpec

# B batch, N encoder tokens, M decoder tokens, S and T all of a batch that are real, R registers, D width, V vocabulary

_INIT_STD = 0.02
# What numbers of tokens, and of targets of a modality, are rounded up to multiples of where `_rounds` says so.
_ROUND, _ROUND_LOGITS = 64, 32
_IGNORED = -100


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
        self._compiled = False
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
        hidden, where, tables = self._hidden(batch, self.encode(batch))
        parts = hidden.index_select(0, where.scored).split(where.sizes)
        targets = batch.dec_targets.flatten()[where.slots].split(where.sizes)
        found = dict(zip(where.names, zip(parts, targets, strict=True), strict=True))
        losses: dict[str, Tensor] = {}
        multiple = _ROUND_LOGITS if self._rounds(hidden) else 1
        for spec in self.specs_out:
            if spec.name in found:
                part, wanted = found[spec.name]
                more = -len(part) % multiple
                part, wanted = _longer(part, more), F.pad(wanted, (0, more), value=_IGNORED)
                table = tables.get(spec.name)
                logits = self.logits(part, spec.name) if table is None else F.linear(part, table)
                losses[spec.name] = F.cross_entropy(logits.float(), wanted, ignore_index=_IGNORED)
            else:
                losses[spec.name] = hidden.new_zeros((), dtype=torch.float32)
        counts = {name: len(found[name][1]) if name in found else 0 for name in losses}
        return Output(_total(losses, counts, loss), losses, counts)

    def encode(self, batch: MaskedBatch) -> Context:
        """Encoder output projected for the decoder; a sample without inputs has its registers, else one zero token."""
        where = layout.inputs(batch, self.config.num_register_tokens)
        content, place = self._embed_inputs(batch, where)
        more = self._spare(content)
        # Without any bias, zeros stay zeros in every layer and move no weight; but each norm multiplies their gradient
        # by 1000 (its eps is 1e-6), which no float bears over 24 layers.
        moving = self._biased or self.config.num_register_tokens
        still = None if moving else _longer((where.rows == 0)[:, None], more)
        own = self._planned(where.groups, content, Group(more, more))
        tokens = self._encoded(_longer(content, more), _longer(place, more), own, still)
        return Context(tokens[: len(content)], where.lengths)

    def decode(self, batch: MaskedBatch, context: Context) -> Tensor:
        """Hidden states (B, M, D) at the decoder tokens, ready for `logits`; zero at padding."""
        hidden, where, _ = self._hidden(batch, context)
        whole = hidden.new_zeros(batch.dec_mod.numel(), hidden.shape[1])
        return whole.index_copy(0, where.places, hidden).view(*batch.dec_mod.shape, -1)

    def _hidden(self, batch: MaskedBatch, context: Context) -> tuple[Tensor, layout.Targets, dict[str, Tensor]]:
        """Hidden states (T, D) of the real decoder tokens, where those are, and tables to make logits with."""
        config = self.config
        where = layout.targets(batch, causal=config.decoder_causal_mask, separate=config.decoder_sep_mask)
        y_TD, tables = self._embed_targets(batch, where)
        more, others = self._spare(y_TD), self._spare(context.tokens)
        own = self._planned(where.groups, y_TD, Group(more, more))
        cross = [Group(n, m) for n, m in zip(where.lengths, context.lengths, strict=True)]
        seen = self._planned(cross, y_TD, Group(more, others))
        hidden = self._decoded(_longer(y_TD, more), _longer(context.tokens, others), own, seen)
        return hidden[: len(y_TD)], where, tables

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the encoder's and the decoder's layers, one graph each; the arguments are those of `torch.compile`.

        Lengths are dynamic unless `dynamic` says otherwise. What depends on the data, which tokens there are and who
        sees whom, stays outside: a batch of another size takes the same graph.
        """
        options = {"dynamic": True} | kwargs
        self._encoded = torch.compile(self._encoded, *args, **options)  # type: ignore[method-assign]
        self._decoded = torch.compile(self._decoded, *args, **options)  # type: ignore[method-assign]
        self._compiled = True

    def _encoded(self, content_SD: Tensor, place_SD: Tensor, attend: Attend, still_S1: Tensor | None) -> Tensor:
        x_SD = content_SD + place_SD
        for block in self.encoder:
            x_SD = block(x_SD, attend)
        x_SD = self.encoder_norm(x_SD)
        if still_S1 is not None:
            x_SD = x_SD.masked_fill(still_S1, 0)
        return self.decoder_proj_context(x_SD) + place_SD

    @property
    def _biased(self) -> bool:
        c = self.config
        return c.qkv_bias or c.proj_bias or c.mlp_bias or c.norm_bias

    def _decoded(self, y_TD: Tensor, context_SD: Tensor, own: Attend, cross: Attend) -> Tensor:
        for block in self.decoder:
            y_TD = block(y_TD, context_SD, own, cross)
        return self.decoder_norm(y_TD)

    def _planned(self, groups: Sequence[Group], like: Tensor, spare: Group) -> Attend:
        groups = [*groups, spare] if spare.queries else groups
        return planned(groups, like.device, _computed(like), self.config.dim, compiled=self._compiled)

    def _rounds(self, like: Tensor) -> bool:
        """Whether numbers of tokens are rounded up: in bfloat16 on CPUs, where oneDNN makes a kernel for each number.

        A kernel takes milliseconds and megabytes, and hardly any number comes twice.
        """
        return like.device.type == "cpu" and _computed(like) == torch.bfloat16 and not self._compiled

    def _spare(self, rows_SD: Tensor) -> int:
        """Rows to add to S, which see only one another: none or, so that they see something, at least one."""
        return _ROUND - len(rows_SD) % _ROUND if self._rounds(rows_SD) else 0

    def logits(self, hidden: Tensor, modality: str) -> Tensor:
        """Scores (..., V) over the vocabulary of one output modality."""
        return self._target(modality).to_logits(hidden)

    def _target(self, modality: str) -> TargetEmbedding:
        if modality not in self.decoder_embeddings:
            raise ValueError(f"{modality}: not an output, expected one of {sorted(self.decoder_embeddings)}")
        embedding = self.decoder_embeddings[modality]
        assert isinstance(embedding, TargetEmbedding)
        return embedding

    def _embed_inputs(self, batch: MaskedBatch, where: layout.Inputs) -> tuple[Tensor, Tensor]:
        """Content and place (S, D) of the encoder tokens; zero where there is none."""
        ids = batch.enc_ids.flatten()[where.slots].split(where.sizes)
        positions = batch.enc_pos.flatten()[where.slots].split(where.sizes)
        first = self.mask_token.new_zeros(1, self.config.dim)
        content, place = [first], [first]
        if self.config.num_register_tokens:
            content.append(self.register_tokens[0])
            place.append(torch.zeros_like(self.register_tokens[0]))
        for name, ids_T, positions_T in zip(where.names, ids, positions, strict=True):
            if name not in self.encoder_embeddings:
                raise ValueError(f"{name}: not an input, expected one of {sorted(self.encoder_embeddings)}")
            embedding = self.encoder_embeddings[name]
            if isinstance(embedding, PixelEmbedding):
                content.append(embedding.content(batch.pixels[name], ids_T))
            elif isinstance(embedding, VectorEmbedding):
                content.append(embedding.content(batch.embeddings[name], ids_T))
            else:
                assert isinstance(embedding, IdEmbedding)
                content.append(embedding.content(ids_T))
            place.append(embedding.place(positions_T))
        return _rows(content, where.rows), _rows(place, where.rows)

    def _embed_targets(self, batch: MaskedBatch, where: layout.Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Decoder inputs (T, D), previous id or mask token, plus place; and tables that were looked into."""
        ids = batch.dec_ids.flatten()[where.slots].split(where.sizes)
        positions = batch.dec_pos.flatten()[where.slots].split(where.sizes)
        tokens = [self.mask_token.new_zeros(0, self.config.dim)]
        tables: dict[str, Tensor] = {}
        for name, ids_T, positions_T in zip(where.names, ids, positions, strict=True):
            embedding, content = self._target(name), self.mask_token[0]
            if not embedding.spec.is_grid:
                content, table = embedding.content_and_table(ids_T)
                tables |= {} if table is None else {name: table}
            tokens.append(embedding.place(positions_T) + content)
        return _rows(tokens, where.rows), tables

    def embed_target(self, modality: str, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """(T, D) of decoder tokens of one modality: of a grid what is asked for, of a sequence the previous id."""
        embedding = self._target(modality)
        content = self.mask_token[0] if embedding.spec.is_grid else embedding.content(ids_T)
        return embedding.place(positions_T) + content

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


def _computed(like: Tensor) -> torch.dtype:
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def _longer(rows_SD: Tensor, more: int) -> Tensor:
    return F.pad(rows_SD, (0, 0, 0, more)) if more else rows_SD


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
