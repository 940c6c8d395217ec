"""Which weights they are: their hash, and the hub's commit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import constants

from dataengine import provenance, weights
from dataengine.weights import Weights
from labelers.siglip2 import SigLip2

COMMITS = ("1" * 40, "2" * 40)
REPO = "somebody/network"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits of a repository in the hub's own cache layout, the second one the head of main."""
    folder = tmp_path / "models--somebody--network"
    for commit in COMMITS:
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model.safetensors").write_bytes(commit.encode())
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMITS[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("cache")
def test_the_commit_of_a_hub_checkpoint_is_known_and_can_be_named() -> None:
    def described(checkpoint: str) -> Weights:
        return weights.describe(checkpoint, "model.safetensors", licence="MIT")

    head, pinned = described(REPO), described(f"{REPO}@{COMMITS[0]}")
    assert (head.revision, pinned.revision) == (COMMITS[1], COMMITS[0])
    assert pinned.sha256 == hashlib.sha256(COMMITS[0].encode()).hexdigest() != head.sha256
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors of somebody/network .*HF_HUB_OFFLINE"):
        described(f"{REPO}@v3")
    made = provenance.of_labeler(SigLip2(checkpoint=f"{REPO}@{COMMITS[0]}"))
    assert made["weights"]["revision"] == COMMITS[0]


def test_a_file_from_elsewhere_has_no_commit(tmp_path: Path) -> None:
    file = tmp_path / "snapshots.safetensors"
    file.write_bytes(b"x")
    assert weights.describe(str(file), licence="MIT").revision == ""
