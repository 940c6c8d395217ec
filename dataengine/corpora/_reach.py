"""How far a corpus may reach: what its tables, links and URLs name is read only where the user has allowed it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import posixpath
import re
import socket
import stat
import zipfile
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import tenacity

from dataengine import storage
from dataengine.storage import redacted

MAX_BYTES = 1 << 29
"""Bytes of one encoded image, or of one caption file: what the largest image takes with 16 bits a channel and no
compression."""

Fetch = Literal["no", "yes", "any"]
"""no: nothing but what lies in the corpus itself; yes: public web addresses and object stores; any: also addresses of
private networks and of this machine."""

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//|:)")
_ATTEMPTS = 4
WAIT = tenacity.wait_random_exponential(max=30)  # seconds between attempts
_PASSING = (408, 425, 429)  # answers of 400 to 499 that another attempt may change
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SECONDS = 60.0  # for one download


@dataclass(frozen=True)
class Reach:
    """Where the places that a corpus names may lie. `beside`: the URL of the folder that relative ones start from.

    `folders` are the local folders, or URLs of remote ones, that may be read whatever `fetch` says.
    """

    beside: str
    folders: tuple[str, ...]
    fetch: Fetch = "no"

    def read(self, place: str) -> bytes:
        """The bytes of a path or a URL; ValueError when it is out of reach, OSError when it cannot be read."""
        if "\0" in place:
            raise ValueError(f"{place!r}: expected a path or a URL")
        archive = re.fullmatch(r"zip://([^:]+)::(/[^:]+)", place)
        if archive is not None:  # how `datasets` names a file of a zip it has downloaded
            inside(archive[2], self.folders)
            try:
                return _whole(place)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{archive[2]} is no zip: {error}") from error
        scheme = _SCHEME.match(place)
        if scheme is None:
            return self._relative(place)
        if scheme[2] == "//" and scheme[1].lower() in ("file", "local"):
            return read_local(re.sub(r"^\w+://", "", place), self.folders)
        if scheme[2] == "//" and "::" not in place:
            if _below(place, self.folders):
                return _whole(place)
            if scheme[1].lower() in ("http", "https"):
                self._ask(place)
                return fetched(place, private=self.fetch == "any")
            if scheme[1].lower() in STORES:
                self._ask(place)
                return _whole(place)
        schemes = f"http, https, {', '.join(STORES)}"
        raise ValueError(f"{redacted(place)}: a corpus may name a path or a URL of {schemes}")

    def _relative(self, path: str) -> bytes:
        beside = re.sub(r"^(file|local)://", "", self.beside)
        if _SCHEME.match(beside) is None:
            return read_local(os.path.join(beside, path), self.folders)
        if path.startswith("/"):
            return read_local(path, self.folders)
        url = f"{beside}/{path}"
        if not _below(url, self.folders):
            raise ValueError(f"{path} leads out of the corpus")
        return _whole(url)

    def _ask(self, url: str) -> None:
        if self.fetch == "no":
            raise ValueError(f"{redacted(url)} is not fetched unless the corpus has the option ?fetch=yes")


def reach_of(option: str, spec: str) -> Fetch:
    """A `fetch` option as the user wrote it."""
    if option not in get_args(Fetch):
        raise ValueError(f"{spec}: fetch is {option!r}, expected yes or no, or any for private addresses too")
    return cast(Fetch, option)


def hold_to_limit(size: int) -> None:
    """ValueError for more bytes than one item may have."""
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes, at most {MAX_BYTES} are taken for one image")


def inside(path: str, folders: tuple[str, ...]) -> str:
    """The real path of a local file, links followed; ValueError when that is below none of the folders."""
    real = os.path.realpath(path)
    for folder in folders:
        if _SCHEME.match(folder) is None and real.startswith(os.path.realpath(folder).rstrip("/") + "/"):
            return real
    raise ValueError(f"{path} leads out of the corpus, to {real}")


def read_local(path: str, folders: tuple[str, ...]) -> bytes:
    """A regular file of this machine below one of the folders; a pipe or a device is never opened to be read."""
    handle = os.open(inside(path, folders), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no regular file")
        hold_to_limit(status.st_size)
        return stream.read(MAX_BYTES + 1)


def read_remote(fs: Any, path: str) -> bytes:
    """A whole object of a store."""
    hold_to_limit(int(fs.info(path).get("size") or 0))
    data: bytes = fs.cat_file(path)
    return data


def _whole(url: str) -> bytes:
    return read_remote(*storage.split_url(url))


def _below(url: str, folders: tuple[str, ...]) -> bool:
    """Whether a URL lies below one of the remote folders, however many `..` it has."""
    scheme, _, path = url.partition("://")
    plain = f"{scheme}://{posixpath.normpath(path)}"
    return any(_SCHEME.match(f) and plain.startswith(f.rstrip("/") + "/") for f in folders)


def fetched(url: str, private: bool) -> bytes:
    """What a web server answers, asked several times; ValueError when its address is not public and may not be asked.

    The address is checked when it is connected to, so neither a redirect nor a name that resolves otherwise the second
    time leads elsewhere.
    """
    again = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=WAIT,
        retry=tenacity.retry_if_not_exception_type((FileNotFoundError, PermissionError, ValueError)),
        reraise=True,
    )
    try:
        return again(lambda: asyncio.run(_get(url, private)))
    except (FileNotFoundError, PermissionError, ValueError):
        raise
    except Exception as error:  # whatever the network library raises, it says that this item is out of reach
        raise OSError(f"{redacted(url)}: {type(error).__name__}: {redacted(error)}") from error


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, also when it is an IPv4 address in IPv6's clothes."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return found.is_global and not found.is_multicast


async def _get(url: str, private: bool) -> bytes:
    import aiohttp

    refused: list[str] = []

    def connect(address: Any) -> socket.socket:
        family, kind, protocol, _, place = address
        if not private and not is_public(place[0]):
            refused.append(place[0])
            raise OSError("not a public address")
        return socket.socket(family, kind, protocol)

    connector = aiohttp.TCPConnector(socket_factory=connect)
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    # The body is taken as it was sent: a server cannot make gigabytes of kilobytes by declaring it compressed.
    asked = {"Accept-Encoding": "identity"}
    try:
        async with (
            aiohttp.ClientSession(
                connector=connector, timeout=timeout, auto_decompress=False, headers=asked
            ) as session,
            session.get(url, max_redirects=5) as answer,
        ):
            if answer.status in (404, 410):
                raise FileNotFoundError(f"{redacted(url)} is not there")
            if 400 <= answer.status < 500 and answer.status not in _PASSING:
                raise PermissionError(f"{redacted(url)}: {answer.status} {answer.reason}")
            answer.raise_for_status()
            parts, size = [], 0
            async for part in answer.content.iter_chunked(1 << 18):
                size += len(part)
                hold_to_limit(size)
                parts.append(part)
            return b"".join(parts)
    except aiohttp.InvalidURL as error:
        raise ValueError(f"{redacted(url)} is no URL of a web server") from error
    except aiohttp.ClientConnectionError as error:
        if refused:
            raise ValueError(
                f"{redacted(url)} leads to {refused[-1]}, an address that is not public: ?fetch=any allows it"
            ) from error
        raise
