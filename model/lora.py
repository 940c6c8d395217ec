"""Low-rank adapters (Hu et al. 2021) on the linear maps of a FourM, through peft; and training of parts of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from model.fourm import FourM

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

Part = Literal["self_attention", "cross_attention", "mlp"]

# Linear maps by the end of their names, and how many matrices each packs into one.
_MAPS: dict[Part, dict[str, int]] = {
    "self_attention": {"attn.qkv": 3, "self_attn.qkv": 3, "attn.proj": 1, "self_attn.proj": 1},
    "cross_attention": {"cross_attn.q": 1, "cross_attn.kv": 2, "cross_attn.proj": 1},
    "mlp": {"mlp.fc1": 1, "mlp.fc2": 1, "mlp.fc3": 1},
}

# What trains in the first phase of ml-4m's fine-tuning, while the blocks and their last norms do not.
OUTSIDE_OF_BLOCKS = (
    "encoder_embeddings.", "decoder_embeddings.", "decoder_proj_context.", "mask_token", "register_tokens"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Where adapters go and how large they are; each adds `alpha / rank` times a product of two matrices.

    A packed map of queries, keys and values has an adapter of thrice the `rank`, as in ml-4m.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    parts: tuple[Part, ...] = ("self_attention", "cross_attention", "mlp")

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.parts or not set(self.parts) <= set(get_args(Part)):
            raise ValueError(f"rank {self.rank} and parts {self.parts}, expected 1 or more of {get_args(Part)}")

    def config(self, model: FourM) -> LoraConfig:
        """peft's settings for a model, with the maps that this model has."""
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        packed = {
            name: num
            for part in self.parts
            for end, num in _MAPS[part].items()
            for name in names
            if name.split(".", 2)[-1] == end and name.startswith(("encoder.", "decoder."))
        }
        return _peft().LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=sorted(packed),
            rank_pattern={name: self.rank * num for name, num in packed.items() if num > 1},
            alpha_pattern={name: self.alpha * num for name, num in packed.items() if num > 1},
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapters need peft: pip install '.[lora]' ({error})") from error
    return peft


def adapted(model: FourM, lora: LoRA, *, seed: int = 0) -> PeftModel:
    """The model with adapters on it, in place, which alone are trainable; it still computes the same.

    The loop trains it like any other model; `save_pretrained` of the result writes the adapters alone.
    """
    get_peft_model = _peft().get_peft_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, lora.config(model))


def load(model: FourM, folder: str | os.PathLike[str], *, trainable: bool = False) -> PeftModel:
    """The model, in place, with the adapters that `PeftModel.save_pretrained` wrote to a folder."""
    return _peft().PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def merged(model: PeftModel) -> FourM:
    """The FourM, in place, with its adapters added to its weights: a model like any other, which ml-4m loads."""
    whole = model.merge_and_unload()
    assert isinstance(whole, FourM)
    return whole.requires_grad_(True)


def train_only(model: nn.Module, starts: Sequence[str] | None = OUTSIDE_OF_BLOCKS) -> None:
    """Let only parameters train whose names start so (None: all): the optimizer leaves the others alone.

    With the default, the first phase of ml-4m's fine-tuning. ValueError where a start other than its own fits nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    unused = [start for start in starts or () if not any(name.startswith(start) for name in names)]
    if unused and starts != OUTSIDE_OF_BLOCKS:
        raise ValueError(f"{unused}: expected the start of a parameter's name")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(starts is None or name.startswith(tuple(starts)))
