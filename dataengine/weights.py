"""Where weights come from and what they are: resolve a checkpoint to a local file, hash it, tell random ones."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataengine import storage


@dataclass(frozen=True)
class Weights:
    """The weights of a labeler, as provenance records them.

    `random` is true for an untrained checkpoint: what it computes is called random everywhere and never trained on.
    """

    source: str
    sha256: str
    licence: str
    random: bool
    revision: str = ""
    """The commit of the hub's repository that the files are of; empty for files from elsewhere, which have none."""


def resolve(checkpoint: str, filename: str | None = None) -> Path:
    """The local file of a checkpoint: a local path, an fsspec URL (cached once), or a hub id with `filename`.

    A local folder, or a URL that ends with "/", is taken as a hub layout that holds `filename`; a hub id may end with
    `@REVISION`, a branch, tag or commit. FileNotFoundError says what was tried.
    """
    local = Path(checkpoint).expanduser()
    if local.is_file():
        return local
    if local.is_dir() and filename is not None:
        if (local / filename).is_file():
            return local / filename
        raise FileNotFoundError(f"checkpoint folder {checkpoint} holds no {filename}")
    if "://" in checkpoint:
        whole = checkpoint + filename if filename is not None and checkpoint.endswith("/") else checkpoint
        return _from_url(whole)
    if filename is not None and checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/")):
        return _from_hub(checkpoint, filename)
    raise FileNotFoundError(
        f"no checkpoint {checkpoint!r}: expected a local file, an fsspec URL" + (" or a hub id" if filename else "")
    )


def offline() -> bool:
    """Whether nothing may be downloaded: HF_HUB_OFFLINE, the hub's own switch, holds for URLs too."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


COPY = "or set checkpoint=PATH to a copy of it on this machine"
"""What always helps when a file cannot be fetched."""


def _from_url(url: str) -> Path:
    try:
        return storage.cached(url, download=not offline())
    except Exception as error:
        # Every protocol behind fsspec has errors of its own for what is not there and what cannot be reached.
        shown = storage.redacted(url)
        if offline():
            why = "is not on this machine, and downloads are off (HF_HUB_OFFLINE): download it where they are not"
        else:
            first = storage.redacted(error).strip().partition("\n")[0][:200]
            why = f"cannot be downloaded ({type(error).__name__}: {first}): check the address and the network"
        raise FileNotFoundError(f"{shown} {why}, {COPY}") from error


_LOCAL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})
"""Errors of this machine's disk, not of the network."""


def _from_hub(checkpoint: str, filename: str) -> Path:
    import huggingface_hub

    repo, _, revision = checkpoint.partition("@")
    try:
        found = huggingface_hub.hf_hub_download(repo, filename, revision=revision or None, local_files_only=offline())
        return Path(found)
    except (huggingface_hub.errors.EntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{filename} of {repo} {_why(repo, filename, error)}, {COPY}") from error


def _why(repo: str, filename: str, error: Exception) -> str:
    """Why a file of the hub cannot be had, and what to do about it."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms at {page}, then run `hf auth login` with an account that may read it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"cannot be found: {page} does not exist, or is private and needs `hf auth login`"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"cannot be found: {page} has no file of that name"
    if offline():
        return (
            f"is neither cached nor reachable, as downloads are off (HF_HUB_OFFLINE): `hf download {repo} {filename}`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"cannot be found: {page} has no such revision, expected a branch, a tag or a commit after the @"
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return f"cannot be kept: {error.strerror} in {constants.HF_HUB_CACHE} (HF_HOME says where the cache is)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = f"{type(error).__name__}" + ("" if status is None else f", status {status}")
    return f"is neither cached nor reachable at {page} ({said}): check the network"


def describe(checkpoint: str, filename: str | None = None, *, licence: str) -> Weights:
    """Hash and describe a checkpoint. It is random when `mark_random` has said so beside it.

    `licence` is that of the published weights; what `<file>.card.json` states about this file goes before it.
    """
    file = resolve(checkpoint, filename)
    return _described(checkpoint, file, _hashed(file), licence)


def describe_folder(
    checkpoint: str, filenames: Iterable[str], *, licence: str, optional: Iterable[str] = ()
) -> Weights:
    """Hash and describe a checkpoint of several files, as `describe` does one; the card is that of the first.

    The hash is that of the lines of `sha256sum`: any file that changes, and any other name, changes it; so does an
    `optional` one that is there.
    """
    files = {name: beside(checkpoint, name) for name in filenames}
    for name in optional:
        with suppress(FileNotFoundError):
            files[name] = beside(checkpoint, name)
    lines = "".join(f"{_hashed(file)}  {name}\n" for name, file in files.items())
    return _described(checkpoint, next(iter(files.values())), hashlib.sha256(lines.encode()).hexdigest(), licence)


def beside(checkpoint: str, filename: str) -> Path:
    """The local file of this name of a checkpoint of several: a folder, a hub id, or one of the files by path or URL.

    FileNotFoundError says what was tried.
    """
    if "://" in checkpoint:
        return resolve(checkpoint.rpartition("/")[0] + "/" + filename)
    local = Path(checkpoint).expanduser()
    return resolve(str(local.parent) if local.is_file() else checkpoint, filename)


def _hashed(file: Path) -> str:
    stat = file.stat()
    return _sha256(str(file), stat.st_size, stat.st_mtime_ns)


def _described(checkpoint: str, file: Path, sha256: str, licence: str) -> Weights:
    card = stated(file)
    random, licence = bool(card.get("random")), str(card.get("licence", licence))
    if "commercial" in card:
        licence += f"; commercial use {'allowed' if card['commercial'] is True else 'forbidden'}"
    return Weights(
        source=file.name if random else storage.redacted(checkpoint),
        sha256=sha256,
        licence="none (random weights)" if random else licence,
        random=random,
        revision=_revision(file),
    )


def _revision(file: Path) -> str:
    """The commit that a file in the hub's cache is of: `.../snapshots/<commit>/<file>`."""
    folders = file.parts[:-1]
    return folders[folders.index("snapshots") + 1] if "snapshots" in folders[:-1] else ""


def stated(file: Path) -> dict[str, Any]:
    """What `<file>.card.json` says of a checkpoint: `random`, `licence`, `commercial` (whether such use is allowed)."""
    card = _card(file)
    if not card.exists():
        return {}
    try:
        found = json.loads(card.read_text())
    except ValueError as error:
        raise ValueError(f"{card}: expected a JSON object, {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{card}: expected a JSON object, found {found!r:.80}")
    return found


def mark_random(file: Path, seed: int) -> None:
    """Record beside a checkpoint that its weights are random, so that no run can take them for trained ones."""
    _card(file).write_text(json.dumps({"random": True, "seed": seed}) + "\n")


def _card(file: Path) -> Path:
    return file.with_name(file.name + ".card.json")


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
