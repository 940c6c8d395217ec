"""Captions written by Florence-2 (Xiao et al. 2024), beside those that an image came with, by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dataengine import weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.weights import Weights
from labelers import _huggingface, _images, _networks

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import Florence2ForConditionalGeneration, GenerationConfig

Task = Literal["CAPTION", "DETAILED_CAPTION", "MORE_DETAILED_CAPTION"]

PROMPTS: dict[Task, str] = {
    "CAPTION": "What does the image describe?",
    "DETAILED_CAPTION": "Describe in detail what is shown in the image.",
    "MORE_DETAILED_CAPTION": "Describe with a paragraph what is shown in the image.",
}
"""The words that the network was trained to answer, by the publisher's name of the task (there in angle brackets)."""

TOKENIZER = "tokenizer.json"
STRIDE = 32
"""Pixels of the image that one visual token stands for, along each side."""


@dataclass(frozen=True, kw_only=True)
class Florence2(Labeler):
    """One sentence or paragraph about each image, in English, from the whole image at 768 x 768.

    `dataengine label ROOT caption@florence2=florence2` makes a column beside the captions that were ingested, which
    stay as they are. Decoding is the published one: a search with three beams in which no three tokens come twice; one
    beam (greedy) is about twice as fast. Nothing is sampled: the same image gives the same words.
    """

    inputs = ("rgb",)
    emits = ("caption",)
    batch_size = 16
    gpus = 0.2
    alternative = True

    checkpoint: str = "florence-community/Florence-2-large"
    precision: _networks.Precision = "float16"  # as published
    task: Task = "DETAILED_CAPTION"
    beams: int = 3
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"florence2: expected task {', '.join(get_args(Task))}, got {self.task!r}")
        if self.beams < 1 or self.max_tokens < 1:
            raise ValueError(
                f"florence2: expected beams and max_tokens of at least 1, got {self.beams} and {self.max_tokens}"
            )

    def weights(self) -> Weights:
        """The published weights with their tokenizer, configuration and preprocessing, MIT."""
        return weights.describe_folder(self.checkpoint, _files(self.checkpoint), licence="MIT")

    def load(self, device: str) -> Loaded:
        """Read the network and its tokenizer, and put it on the device."""
        network = _networks.placed(writer(self.checkpoint), device, self.precision)
        # A search among words whose scores are no numbers ends in no words, which is a valid caption.
        network.lm_head.register_forward_hook(lambda _layer, _inputs, logits: _networks.finite(logits, self.name))
        side, resample, statistics = _preprocessing(self.checkpoint)
        tokenizer = _tokenizer(self.checkpoint)
        prompt = prompt_ids(network, tokenizer, self.task, side)
        decoding = generation(network, self.beams, self.max_tokens)

        def label(images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
            pixels = _images.normalised(images, statistics, device, network.dtype)
            said = tokenizer.decode_batch(written(network, pixels, prompt, decoding).tolist(), skip_special_tokens=True)
            return [{"caption": [caption.strip()] if caption.strip() else []} for caption in said]

        return Staged(lambda sample: _huggingface.resized(sample.rgb, side, side, resample), label)

    def tiny(self, folder: Path) -> Florence2:
        """A random network of width 16 that sees 64 x 64 pixels and writes 12 letters, in the published format."""
        own = folder / "florence2"
        if not (own / _huggingface.FILE).exists():
            _write_tiny(own)
        return replace(self, checkpoint=str(own / _huggingface.FILE), max_tokens=min(self.max_tokens, 12))


def _files(checkpoint: str) -> Iterator[str]:
    """The names of all files that decide what the network says of an image, looked for when asked."""
    yield from _huggingface.weight_files(checkpoint)
    yield from (_huggingface.CONFIG, _huggingface.PREPROCESSOR, TOKENIZER)


def writer(checkpoint: str) -> Florence2ForConditionalGeneration:
    """The network of a checkpoint, on the CPU, float32."""
    from transformers import Florence2ForConditionalGeneration

    files = _huggingface.weight_files(checkpoint)
    return _huggingface.network(checkpoint, Florence2ForConditionalGeneration, "florence2", file=files)


def prompt_ids(network: Florence2ForConditionalGeneration, tokenizer: Tokenizer, task: Task, side: int) -> list[int]:
    """What the encoder reads: places for the visual tokens of an image of `side` pixels and their mean, then words."""
    words = tokenizer.encode(PROMPTS[task], add_special_tokens=False).ids
    text: Any = network.config.text_config
    visual = [network.config.image_token_id] * ((side // STRIDE) ** 2 + 1)
    return [*visual, text.bos_token_id, *words, text.eos_token_id]


def generation(network: Florence2ForConditionalGeneration, beams: int, max_tokens: int) -> GenerationConfig:
    """How words are found, in full: nothing is left to what a checkpoint or a version of transformers presets."""
    from transformers import GenerationConfig

    text: Any = network.config.text_config
    return GenerationConfig(
        num_beams=beams,
        do_sample=False,
        no_repeat_ngram_size=3,
        early_stopping=beams > 1,
        max_new_tokens=max_tokens,
        decoder_start_token_id=text.decoder_start_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        forced_bos_token_id=text.bos_token_id,
        forced_eos_token_id=text.eos_token_id,
    )


def written(
    network: Florence2ForConditionalGeneration, pixels: Tensor, prompt: Sequence[int], decoding: GenerationConfig
) -> Tensor:
    """The token ids (n, tokens) that the network writes of images (n, 3, side, side), on its device."""
    import torch

    ids = torch.tensor([prompt], device=pixels.device).expand(len(pixels), -1)
    with torch.inference_mode():
        made: Any = network.generate(  # type: ignore[misc]
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, generation_config=decoding
        )
    found: Tensor = made
    return found


def _preprocessing(checkpoint: str) -> tuple[int, int, _images.Statistics]:
    """The side of the square that the network sees, how Pillow numbers the way there, mean and deviation."""
    found = _huggingface.document(checkpoint, _huggingface.PREPROCESSOR)
    try:
        side, resample = int(found["size"]["height"]), int(found["resample"])
        mean, std = (tuple(float(level) for level in found[name]) for name in ("image_mean", "image_std"))
        if found["size"]["width"] != side or side % STRIDE or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError("a square of a multiple of 32 pixels and three channels")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_huggingface.PREPROCESSOR} of {checkpoint}: expected size, resample, image_mean and image_std of a "
            f"square of a multiple of {STRIDE} pixels, {error!r}"
        ) from error
    return side, resample, (mean, std)


def _tokenizer(checkpoint: str) -> Tokenizer:
    from tokenizers import Tokenizer

    file = _huggingface.part(checkpoint, TOKENIZER)
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{TOKENIZER} of {checkpoint}: expected a tokenizer, {error}") from error
    found.no_padding()
    found.no_truncation()
    return found


def _write_tiny(folder: Path) -> None:
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = ["\u0120", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    known = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(known, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in [*special, "<image>"]])
    text = BartConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=16, max_position_embeddings=128,
        encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_layers=1, decoder_ffn_dim=32, decoder_attention_heads=2,
    )  # fmt: skip
    shape = Florence2Config(
        text_config=text.to_dict(),
        vision_config={
            "embed_dim": [8, 8, 8, 16], "num_heads": [1, 1, 1, 2], "num_groups": [1, 1, 1, 2], "depths": [1, 1, 1, 1],
            "window_size": 4, "projection_dim": 16,
        },
        image_token_id=tokenizer.get_vocab()["<image>"],
    )  # fmt: skip
    _huggingface.save_tiny(Florence2ForConditionalGeneration(shape), folder, seed=0, scale=2.0)  # so that images matter
    tokenizer.save(str(folder / TOKENIZER))
    mean, std = _images.IMAGENET
    facts = {"size": {"height": 64, "width": 64}, "resample": 3, "image_mean": mean, "image_std": std}
    more = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "image_seq_length": 5}
    (folder / _huggingface.PREPROCESSOR).write_text(json.dumps({**facts, **more}) + "\n")
