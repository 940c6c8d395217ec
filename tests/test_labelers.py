"""What every labeler promises; the labelers are found by their files."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from dataengine import modalities, plugins
from dataengine.labeler import Labeler
from dataengine.sample import Sample

SIZES = ((96, 128), (130, 70), (64, 64))
"""Heights and widths of one batch, in pixels."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=plugins.names("labelers"))
def labeler(request: pytest.FixtureRequest, tmp_path: Path) -> Labeler:
    return plugins.load("labelers", request.param, Labeler)().tiny(tmp_path)


def photographs(inputs: tuple[str, ...]) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for i, (source, (height, width)) in enumerate(zip(("astronaut", "coffee", "chelsea"), SIZES, strict=True)):
        rgb = np.asarray(Image.fromarray(getattr(skimage.data, source)()).resize((width, height)))
        values: dict[str, Any] = {"rgb": rgb}
        for name in inputs:
            if name != "rgb":
                values[name] = modalities.load(name).example(rng, (height, width))
        samples.append(Sample(f"photo{i}", values))
    return samples


def run(labeler: Labeler, samples: list[Sample]) -> list[dict[str, Any]]:
    return labeler.load("cpu")(samples)


def test_values_are_valid_in_order_and_the_same_after_two_loads(labeler: Labeler) -> None:
    samples = photographs(labeler.inputs)
    first, second = run(labeler, samples), run(labeler, samples)
    assert len(first) == len(second) == len(samples)
    for sample, value, again in zip(samples, first, second, strict=True):
        assert set(value) == set(labeler.emits)
        for name in labeler.emits:
            modality = modalities.load(name)
            modality.check(value[name], sample.size)
            assert modality.encode(value[name]) == modality.encode(again[name])


def test_each_image_is_labelled_for_itself(labeler: Labeler) -> None:
    samples = photographs(labeler.inputs)
    together, backwards = run(labeler, samples), run(labeler, samples[::-1])[::-1]
    for name in labeler.emits:
        modality = modalities.load(name)
        for one, other in zip(together, backwards, strict=True):
            a, b = modality.decode(modality.encode(one[name])), modality.decode(modality.encode(other[name]))
            assert_close(a, b)


def test_a_network_that_gives_no_numbers_labels_nothing(labeler: Labeler, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a number passes no threshold, so that it would become "nothing found", and is below no maximum."""
    import torch

    from labelers import _checkpoints

    read, seen = _checkpoints.read, []

    def poisoned(*args: Any, **kwargs: Any) -> _checkpoints.State:
        state = read(*args, **kwargs)
        seen.append(state.source)
        nan = {name: torch.full_like(v, torch.nan) if v.is_floating_point() else v for name, v in state.items()}
        return _checkpoints.State(nan, state.source)

    def labelled() -> None:
        samples = photographs(labeler.inputs)
        for sample, value in zip(samples, run(labeler, samples), strict=True):
            for name in labeler.emits:
                modalities.load(name).check(value[name], sample.size)

    if labeler.weights() is None:
        return
    monkeypatch.setattr(_checkpoints, "read", poisoned)
    with pytest.raises((FloatingPointError, ValueError), match=r"(?i)finite|nan"):
        labelled()
    assert seen


def assert_close(a: Any, b: Any) -> None:
    if isinstance(a, np.ndarray) and a.dtype.kind == "f":
        np.testing.assert_allclose(a, b, atol=2e-2, rtol=2e-2)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name])
    else:
        np.testing.assert_equal(a, b)


def test_settings_are_frozen_hashable_and_picklable(labeler: Labeler) -> None:
    assert pickle.loads(pickle.dumps(labeler)) == labeler
    assert hash(labeler) == hash(dataclasses.replace(labeler))
    assert labeler.identity() == pickle.loads(pickle.dumps(labeler)).identity()
    field = dataclasses.fields(labeler)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(labeler, field, None)


def test_known_modalities(labeler: Labeler) -> None:
    for name in (*labeler.inputs, *labeler.emits):
        assert modalities.load(name).name == name
    assert not set(labeler.inputs) & set(labeler.emits)


def test_a_random_checkpoint_says_so_and_is_the_same_everywhere(labeler: Labeler, tmp_path: Path) -> None:
    weights = labeler.weights()
    if weights is None:
        assert "checkpoint" not in {field.name for field in dataclasses.fields(labeler)}
        return
    assert weights.random
    assert str(tmp_path) not in weights.source
    assert Path(labeler.checkpoint).stat().st_size < 300_000  # type: ignore[attr-defined]
    other = tmp_path / "elsewhere"
    other.mkdir()
    again = plugins.load("labelers", labeler.name, Labeler)().tiny(other)
    assert again.identity() == labeler.identity()


def test_importing_and_configuring_labelers_imports_no_network_library() -> None:
    code = (
        "import sys\n"
        "from dataengine import plugins\n"
        "from dataengine.labeler import Labeler\n"
        "found = [plugins.load('labelers', name, Labeler)() for name in plugins.names('labelers')]\n"
        "assert len(found) > 5\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'timm', 'segment_anything', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
