"""Wrong weights: another network's, cut short, a web page, a pickle of code, gated, absent. The labelers are found by
their files; each must say what it was given, what it expected, and what to do, and run nothing."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from dataengine import plugins, weights
from dataengine.labeler import Labeler

MADE_OF_WEIGHTS = [
    name
    for name in plugins.names("labelers")
    if any(f.name == "checkpoint" for f in fields(plugins.load("labelers", name, Labeler)))
]
REFUSALS = (ValueError, FileNotFoundError)


class Evil:
    """What a pickle can do to who opens it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(params=MADE_OF_WEIGHTS, scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Labeler:
    return plugins.load("labelers", request.param, Labeler)().tiny(tmp_path_factory.mktemp(request.param))


@pytest.fixture
def copied(tiny: Labeler, tmp_path: Path) -> tuple[Labeler, Path]:
    """The labeler on a copy of its checkpoint, and the file of that copy that holds the tensors."""
    given = Path(tiny.checkpoint)  # type: ignore[attr-defined]
    target = tmp_path / given.name
    if given.is_dir():
        shutil.copytree(given, target)
        tensors = [f for f in target.rglob("*") if f.suffix in {".safetensors", ".pth", ".pt", ".ckpt", ".pkl", ".bin"}]
        file = max(tensors, key=lambda f: f.stat().st_size)
    else:
        # What belongs to a single file lies beside it: the card, a configuration, a vocabulary.
        for other in given.parent.iterdir():
            if other.is_file():
                shutil.copyfile(other, tmp_path / other.name)
        file = target
    return replace(tiny, checkpoint=str(target)), file  # type: ignore[call-arg]


def another_network(file: Path, mark: Path) -> None:
    """A file of the same type, sound, with a classifier in it."""
    import torch
    from safetensors.torch import save_file

    state = {"conv1.weight": torch.zeros(4, 3, 7, 7), "layer1.0.bn1.weight": torch.ones(4), "fc.bias": torch.ones(10)}
    if file.suffix == ".safetensors":
        save_file(state, file)
    elif file.suffix == ".pkl":
        file.write_bytes(pickle.dumps({"model": {n: t.numpy() for n, t in state.items()}}))
    else:
        torch.save(state, file)


def cut_short(file: Path, mark: Path) -> None:
    """What an interrupted download leaves."""
    data = file.read_bytes()
    file.write_bytes(data[: 2 * len(data) // 3])


def web_page(file: Path, mark: Path) -> None:
    """What a server gives to who is not logged in."""
    file.write_bytes(b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>\n")


def pickled_code(file: Path, mark: Path) -> None:
    """A pickle that acts when it is opened."""
    import torch

    if file.suffix in {".safetensors", ".pkl"}:
        file.write_bytes(pickle.dumps({"model": Evil(mark)}))
    else:
        torch.save({"state_dict": Evil(mark)}, file)


@pytest.mark.parametrize("spoil", [another_network, cut_short, web_page, pickled_code])
def test_a_wrong_file_is_refused_by_name_and_not_run(
    copied: tuple[Labeler, Path], tmp_path: Path, spoil: Callable[[Path, Path], None]
) -> None:
    labeler, file = copied
    mark = tmp_path / "pwned"
    spoil(file, mark)
    said = refusal(labeler)
    assert said is not None, "it was taken"
    assert file.name in said or labeler.name in said, said
    assert not mark.exists()
    assert len(said) < 2000


def refusal(labeler: Labeler) -> str | None:
    """What a labeler says of its file, None when it takes it."""
    try:
        labeler.load("cpu")
    except REFUSALS as error:
        return str(error)
    return None


def test_a_tensor_too_few_or_too_many_is_named(copied: tuple[Labeler, Path]) -> None:
    labeler, file = copied
    state, save = opened(file)
    names = sorted(state)
    refused = []
    for name in names[:: max(len(names) // 8, 1)]:
        save({n: t for n, t in state.items() if n != name})
        said = refusal(labeler)  # None for what a labeler leaves out on purpose: a decoder, a head that nobody asks
        if said is not None:
            refused.append(name)
            assert file.name in said or labeler.name in said, said
    assert refused, "any tensor may be missing"
    save({**state, f"{refused[0]}.surprise": state[refused[0]] * 2})
    said = refusal(labeler)
    assert said is not None, f"{refused[0]}.surprise was taken for nothing"
    assert "surprise" in said


def opened(file: Path) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    """The named tensors of a tiny checkpoint, however its trainer has wrapped them, and what writes others there."""
    import torch
    from safetensors.torch import load_file, save_file

    if file.suffix == ".safetensors":
        return load_file(file), lambda state: save_file(state, file)
    if file.suffix == ".pkl":
        whole = pickle.loads(file.read_bytes())
        return whole["model"], lambda state: file.write_bytes(pickle.dumps({**whole, "model": state})) and None
    whole = torch.load(file, weights_only=False)  # our own file
    inside = next((name for name in ("state_dict", "model") if isinstance(whole.get(name), dict)), None)
    if inside is None:
        return whole, lambda state: torch.save(state, file)
    return whole[inside], lambda state: torch.save({**whole, inside: state}, file)


def published(name: str) -> Labeler:
    return plugins.load("labelers", name, Labeler)()


@pytest.fixture
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", MADE_OF_WEIGHTS)
def test_without_a_network_it_says_how_to_get_the_weights(
    name: str, nothing_cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    labeler = published(name)
    with pytest.raises(FileNotFoundError) as raised:
        labeler.weights()
    said = str(raised.value)
    assert labeler.checkpoint in said  # type: ignore[attr-defined]
    assert "downloads are off (HF_HUB_OFFLINE)" in said
    assert "set checkpoint=PATH" in said


def answering(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("HEAD", "https://hub/x"))


HUB = {
    "gated": (errors.GatedRepoError("no", response=answering(403)), ("is gated: accept its terms", "hf auth login")),
    "private": (errors.RepositoryNotFoundError("no", response=answering(401)), ("does not exist", "hf auth login")),
    "no such file": (errors.RemoteEntryNotFoundError("no", response=answering(404)), ("no file of that name",)),
    "down": (errors.HfHubHTTPError("no", response=answering(503)), ("neither cached nor reachable", "status 503")),
    "no network": (errors.LocalEntryNotFoundError("no"), ("neither cached nor reachable", "check the network")),
}


@pytest.mark.parametrize("what", list(HUB))
def test_what_the_hub_answers_is_said_with_what_to_do(
    what: str, nothing_cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, expected = HUB[what]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError) as raised:
        weights.resolve("somebody/something", "model.safetensors")
    said = str(raised.value)
    for part in ("model.safetensors of somebody/something", *expected, "set checkpoint=PATH"):
        assert part in said
    assert what == "no network" or f"{huggingface_hub.constants.ENDPOINT}/somebody/something" in said


def test_an_address_that_answers_nothing_is_said_with_what_to_do(
    nothing_cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    url = "http://user:secret@127.0.0.1:9/weights.pth"
    with pytest.raises(
        FileNotFoundError, match=r"cannot be downloaded.*check the address and the network.*checkpoint="
    ) as e:
        weights.resolve(url)
    assert "secret" not in str(e.value)


def test_a_gate_is_said_where_there_is_one() -> None:
    for name in MADE_OF_WEIGHTS:
        gate = published(name).gate
        assert not gate or "accept" in gate or "register" in gate or "request" in gate, f"{name}: {gate}"
