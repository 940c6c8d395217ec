"""Networks of the transformers library, built from the files of a checkpoint alone: a config and tensors.

A checkpoint is a hub id, a local folder, an fsspec URL of a folder (it ends with "/"), or the weights file itself with
the other files beside it. Nothing in it is run, and nothing it names is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dataengine import weights
from labelers import _checkpoints

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    Config = TypeVar("Config", bound=PreTrainedConfig)
    Model = TypeVar("Model", bound=PreTrainedModel)

FILE = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
INDEX = ".index.json"
FORMATS = (FILE + INDEX, FILE, "pytorch_model.bin" + INDEX, "pytorch_model.bin")
"""Under which names transformers has published tensors, the best first; an index names several files."""

_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_EXPERTS = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
_IGNORED = frozenset((*_ATTENTION, *_EXPERTS, "fusion_config", "auto_map"))
"""Settings that choose or fetch code: that is ours to choose, not a checkpoint's."""


def part(checkpoint: str, name: str) -> Path:
    """The local file of this name in a checkpoint; FileNotFoundError when it has none."""
    return weights.beside(checkpoint, name)


def weight_files(checkpoint: str) -> list[str]:
    """The names of the files that hold the tensors of a checkpoint, one or several; safetensors where there are both.

    FileNotFoundError when it has none of `FORMATS`.
    """
    own = checkpoint.partition("?")[0].rpartition("/")[2]
    is_file = Path(checkpoint).expanduser().is_file() or ("://" in checkpoint and bool(own))
    name, _ = first_part(checkpoint, (own,) if is_file else FORMATS)
    return _shards(checkpoint, name) if name.endswith(INDEX) else [name]


def first_part(checkpoint: str, names: Sequence[str]) -> tuple[str, Path]:
    """The first of some names that a checkpoint has, and its local file; FileNotFoundError when it has none of them.

    A hub that cannot be reached or refuses is asked once, not once a name.
    """
    from huggingface_hub import errors

    hopeless = (errors.LocalEntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    for name in names:
        try:
            return name, part(checkpoint, name)
        except FileNotFoundError as error:
            missing = error
            refused = isinstance(error.__cause__, hopeless)
            if refused and not weights.offline():
                raise
    why = f"has none of {', '.join(names)}"
    if weights.offline() and not Path(checkpoint).expanduser().exists():
        why += f" on this machine, and downloads are off (HF_HUB_OFFLINE): `hf download {checkpoint}`, {weights.COPY}"
    raise FileNotFoundError(f"{checkpoint} {why}") from missing


def _shards(checkpoint: str, index: str) -> list[str]:
    """The files that an index of a checkpoint names, which are beside it."""
    found = document(checkpoint, index).get("weight_map")
    names = sorted({str(name) for name in found.values()}) if isinstance(found, dict) else []
    if not names or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
        raise ValueError(f"{index} of {checkpoint}: expected a weight_map of file names, found {found!r:.80}")
    return names


def describe(checkpoint: str, licence: str) -> weights.Weights:
    """What a checkpoint is, hashed with all that decides what its network computes: tensors, config, preprocessor.

    The preprocessor's file may be absent; FileNotFoundError when another is.
    """
    return weights.describe_folder(checkpoint, _files(checkpoint), optional=(PREPROCESSOR,), licence=licence)


def _files(checkpoint: str) -> Iterator[str]:
    """The names of the files that a checkpoint must have, looked for when asked."""
    yield from weight_files(checkpoint)
    yield CONFIG


def document(checkpoint: str, name: str) -> dict[str, Any]:
    """A JSON object of a checkpoint (`CONFIG`, `PREPROCESSOR`, ...); ValueError when the file is something else."""
    file = part(checkpoint, name)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} of {checkpoint}: expected a JSON object, {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} of {checkpoint}: expected a JSON object, found {found!r:.80}")
    return found


def config(checkpoint: str, kind: type[Config], **changes: Any) -> Config:
    """The network's configuration, of this kind, with some of its settings changed.

    ValueError when it is that of another architecture, or of quantised weights.
    """
    found = _without(document(checkpoint, CONFIG), _IGNORED)
    if found.get("model_type") != kind.model_type:
        raise ValueError(
            f"{CONFIG} of {checkpoint}: expected model_type {kind.model_type!r}, found {found.get('model_type')!r}"
        )
    if found.get("quantization_config"):
        raise ValueError(f"{CONFIG} of {checkpoint}: quantised weights are not read, use the original ones")
    made: Config = kind.from_dict({**found, **changes})
    if getattr(made, "use_pretrained_backbone", False):
        made.use_pretrained_backbone = False
    return made


def network(
    checkpoint: str,
    model_class: type[Model],
    who: str,
    *,
    file: Sequence[str] | None = None,
    configuration: PreTrainedConfig | None = None,
    unused: Sequence[str] = (),
    idle: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Model:
    """The network on the CPU for inference, every tensor of it read from the checkpoint and every tensor there used.

    `file` names the files of the tensors, by default `weight_files`. transformers renames what older versions of it
    have named otherwise, and ties what is tied. Regular expressions name what differs on purpose: `unused` tensors of
    the file that the network does not need, `idle` tensors of the network that its output does not depend on and that
    the file may lack. float32 unless a `dtype` is given. ValueError lists what is missing, unexpected or of another
    shape.
    """
    state: dict[str, Tensor] = {}
    for name in weight_files(checkpoint) if file is None else file:
        state |= _checkpoints.read(part(checkpoint, name))
    if configuration is None:
        kind: Any = model_class.config_class
        configuration = config(checkpoint, kind)
    return filled(model_class, configuration, state, who, unused=unused, idle=idle, dtype=dtype)


def filled(
    model_class: type[Model],
    configuration: PreTrainedConfig,
    state: Mapping[str, Tensor],
    who: str,
    *,
    unused: Sequence[str] = (),
    idle: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Model:
    """A network of these tensors, as `network` makes it of those in a file."""
    import torch
    from transformers.utils import logging

    state = {name: value for name, value in state.items() if not _any(unused, name)}
    logging.disable_progress_bar()
    build: Any = model_class.from_pretrained
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what did not fit; ours is the one below
    try:
        model, report = build(
            None,
            config=configuration,
            state_dict=state,
            dtype=dtype or torch.float32,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(level)
    complaints = []
    for what in ("missing", "unexpected"):
        found = sorted(report[f"{what}_keys"])
        if what == "missing":
            found = [name for name in found if not _any(idle, name)]
        if found:
            complaints.append(f"{len(found)} tensors {what}: {', '.join(found[:5])}{', ...' * (len(found) > 5)}")
    reshaped = [
        f"{name} is {tuple(there)}, expected {tuple(here)}" for name, there, here in sorted(report["mismatched_keys"])
    ]
    if reshaped:
        shown = f"{', '.join(reshaped[:5])}{', ...' * (len(reshaped) > 5)}"
        complaints.append(f"{len(reshaped)} tensors of another shape: {shown}")
    if complaints or report["error_msgs"]:
        complaints += report["error_msgs"]
        raise ValueError(f"{who}: the checkpoint is not that of this network: {'; '.join(complaints)}")
    made: Model = model.eval().requires_grad_(False)
    return made


def resized(rgb: np.ndarray, height: int, width: int, resample: int = 2) -> np.ndarray:
    """An image uint8 (h, w, 3) at another size as transformers' image processors make it: torchvision's, antialiased.

    `resample` is Pillow's number, as `preprocessor_config.json` states it: 2 bilinear, 3 bicubic.
    """
    import torch
    from torchvision.transforms.v2 import InterpolationMode, functional

    if rgb.shape[:2] == (height, width):
        return rgb
    modes = {0: InterpolationMode.NEAREST_EXACT, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
    if resample not in modes:
        raise ValueError(f"expected resample 0, 2 or 3, got {resample!r}")
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    out = functional.resize(pixels, [height, width], interpolation=modes[resample], antialias=True)
    made: np.ndarray = out.permute(1, 2, 0).contiguous().numpy()
    return made


def save_tiny(model: PreTrainedModel, folder: Path, seed: int, *, scale: float = 1.0, idle: Sequence[str] = ()) -> Path:
    """Write a network with seeded random tensors as transformers publishes it, and mark it random: the weights file.

    Buffers and frozen parameters keep their values, `idle` tensors (see `network`) are left out. A folder that holds a
    network already is left as it is.
    """
    import torch
    from transformers.utils import logging

    file = folder / FILE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        with torch.no_grad():
            for name, value in _checkpoints.randomised(trained, seed, scale).items():
                trained[name].copy_(value)
        state = {name: value for name, value in model.state_dict().items() if not _any(idle, name)}
        logging.disable_progress_bar()
        model.save_pretrained(folder, state_dict=state)
        weights.mark_random(file, seed)
    return file


def _without(found: Any, names: frozenset[str]) -> Any:
    if isinstance(found, dict):
        return {name: _without(value, names) for name, value in found.items() if name not in names}
    return [_without(value, names) for value in found] if isinstance(found, list) else found


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
