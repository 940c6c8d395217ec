"""Writes fourm_recipes.npz: ml-4m's alphas mixtures, read by its own code, and its model configurations as they are.

Reference: https://github.com/apple/ml-4m at cda590f, whose checkout must be on PYTHONPATH and the working directory:
    cd ml-4m && PYTHONPATH=. python <here>/make_fourm_recipes.py
For each dataset of each data file, `setup_sampling_mod_info` gives the concentrations of all its modalities. One
dataset names a file that ml-4m does not have; what it gives for the file of that description stands in its place.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import yaml

HERE = Path(__file__).parent
MISSING = {
    "cfgs/bolt/pretrain/4m/alphas_mixture/all2allmix-oldmod_rgb2all_capbias_v0.yaml": (
        "cfgs/default/4m/alphas_mixture/main/mix_mod7_all2allmix_rgb2all_capbias.yaml"
    ),
    "cfgs/default/4m/alphas_mixture/superres/mix_mod7_superres_caption_rgb_bias": (
        "cfgs/default/4m/alphas_mixture/superres/mix_mod7_superres_caption_rgb_bias.yaml"
    ),
}


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that are not here: what loads and augments images, which mixtures do not need."""

    NAMES = ("albumentations", "boto3", "botocore", "wandb", "torchvision", "einops")

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return mock.MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module):
        pass


def setup():
    """ml-4m's function and modality table."""
    sys.meta_path.insert(0, _Empty())
    from fourm.data.modality_info import MODALITY_INFO
    from fourm.data.pretrain_utils import setup_sampling_mod_info

    return setup_sampling_mod_info, MODALITY_INFO


def main() -> None:
    sampling, info = setup()
    found = {}
    for path in sorted(Path("cfgs/default/4m/data").rglob("*.yaml")):
        config = yaml.safe_load(path.read_text())["train"]
        datasets = []
        for (name, dataset), share in zip(config["datasets"].items(), config["weights"], strict=True):
            dataset["alphas_config"] = MISSING.get(dataset.get("alphas_config"), dataset.get("alphas_config"))
            table, weights = sampling(dataset, info)
            keys = ("input_alphas", "target_alphas", "keep")
            datasets.append(
                {
                    "name": name,
                    "share": share,
                    "weights": weights,
                    "inputs": sorted(dataset["in_domains"].split("-")),
                    "outputs": sorted(dataset["out_domains"].split("-")),
                    "repeats": dataset.get("wds_n_repeats"),
                    "table": {m: {k: v for k, v in table[m].items() if k in keys} for m in sorted(table)},
                }
            )
        found[path.as_posix()] = datasets
    models = {
        path.stem: yaml.safe_load(path.read_text()) for path in sorted(Path("cfgs/default/4m/models").rglob("*.yaml"))
    }
    head = {
        path.stem: [line for line in path.read_text().splitlines() if line.startswith("#")]
        for path in sorted(Path("cfgs/default/4m/models").rglob("*.yaml"))
    }
    np.savez_compressed(
        HERE / "fourm_recipes.npz",
        note="ml-4m at cda590f: mixtures by setup_sampling_mod_info, model configurations as YAML has them, as JSON",
        data=json.dumps(found, sort_keys=True),
        models=json.dumps(models, sort_keys=True),
        comments=json.dumps(head, sort_keys=True),
    )


if __name__ == "__main__":
    main()
