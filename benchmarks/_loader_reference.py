"""ml-4m's side of `benchmarks.loader`: its own loaders, as its trainer calls them, on its tars.

It runs in a process that has the checkout, einops and albumentations 1.4 on its path; nothing of it is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import _loader_timing

CONFIG = "cfgs/default/4m/data/cc12m+coyo+c4/main/mix_mod21_all2allmix_rgb2all_capT5bias_C4.yaml"
DATASET = "cc12m"
TEXT_TOKENIZER = "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"


def theirs(
    reference: list[str], source: str, batch_size: int, warm: int, count: int, workers: int, buffers: int
) -> dict[str, Any]:
    """One measurement; `buffers` is the size of its shuffle buffers, in samples."""
    torch.set_num_threads(1)
    checkout = _importable(reference)
    make = _loader(checkout, source, batch_size, buffers)
    return _loader_timing.rate(make, batch_size, warm, count, workers)


def _importable(reference: list[str]) -> Path:
    sys.path[:0] = reference
    return Path(reference[0])


def _loader(checkout: Path, source: str, batch_size: int, buffers: int) -> _loader_timing.Make:
    from fourm.data import build_mixture_dataloader  # type: ignore[import-not-found]
    from fourm.data.modality_info import MODALITY_INFO  # type: ignore[import-not-found]
    from fourm.data.pretrain_utils import (  # type: ignore[import-not-found]
        get_train_dataloader,
        setup_sampling_mod_info,
    )
    from tokenizers import Tokenizer

    config = yaml.safe_load((checkout / CONFIG).read_text())["train"]["datasets"][DATASET]
    config |= {"data_path": source, "alphas_config": str(checkout / config["alphas_config"])}
    config |= {"wds_shuffle_buffer_tar": buffers, "wds_shuffle_buffer_repeat": buffers}
    names = sorted({*config["in_domains"].split("-"), *config["out_domains"].split("-")})
    info = {name: MODALITY_INFO[name] for name in names}
    for each in info.values():
        if each["type"] == "img":
            each["max_tokens"] = (each.get("input_size", 224) // each.get("patch_size", 16)) ** 2
    own, weights = setup_sampling_mod_info(config, info)
    tokenizer = Tokenizer.from_file(str(checkout / TEXT_TOKENIZER))

    def make(workers: int) -> Iterator[Any]:
        # Its trainer's call; one task, and no batches before those of the mixture.
        dataset = get_train_dataloader(config, own, weights, tokenizer, 224, 256, 256, None, None, 1, max(workers, 1))
        mixture = build_mixture_dataloader(
            data_iters=[dataset], weights=[1.0], modality_info=info, batch_size=batch_size, num_workers=max(workers, 1),
            epoch_size=10**9, num_gpus=1,
        )  # fmt: skip
        # Without workers, what its torch DataLoader would give a worker is gone through here.
        return iter(mixture if workers else mixture.pipeline[0].dataset)

    return make
