"""An S3 server of this process, and a reverse proxy before it that resets, refuses, cuts and delays as it is told.

    with s3_server() as upstream, FaultyS3(upstream, [Fault("reset", method="PUT", when="after")]) as url: ...
    with s3_server() as upstream, FaultyS3(upstream, chance=0.05, seed=7) as url: ...

Whoever sets AWS_ENDPOINT_URL to `url` speaks through it, in this or in another process.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest

Kind = Literal["reset", "answer", "cut_upload", "cut_download", "shorten", "delay"]


@dataclass(frozen=True)
class Fault:
    """What happens to requests whose method and target (path?query) match; the first rule that fits is the one.

    reset: the connection is reset. answer: `status` with an S3 error document of `code`; 200 makes it a late error.
    `when` says whether the store has done what was asked before that. cut_upload: half of the body reaches the store.
    cut_download: half of the answer, then a reset. shorten: half of the answer, which claims to be whole. delay:
    `seconds` before the store is asked.
    """

    kind: Kind
    method: str = ".*"
    target: str = ".*"
    when: Literal["before", "after"] = "before"
    status: int = 500
    code: str = "InternalError"
    seconds: float = 0.0
    skip: int = 0  # that many fitting requests pass first
    every: int = 1  # then one in so many meets it
    times: int | None = 1  # None: for ever

    def fits(self, method: str, target: str) -> bool:
        """Whether a request is meant."""
        return bool(re.fullmatch(self.method, method) and re.search(self.target, target))


STORM = (
    *(Fault("reset", when="before"), Fault("reset", when="after")),
    *(Fault("answer", status=500, when="before"), Fault("answer", status=500, when="after")),
    *(Fault("answer", status=503, code="SlowDown"), Fault("answer", status=429, code="TooManyRequests")),
    *(Fault("cut_upload", method="PUT|POST"), Fault("cut_download", method="GET"), Fault("shorten", method="GET")),
    Fault("answer", status=409, code="ConditionalRequestConflict", method="PUT"),
    Fault("delay", seconds=0.05),
)
"""What a request may meet in the random mode, each as likely as the others that fit it."""


class FaultyS3:
    """The proxy; a context manager that gives its URL. `seen` are the requests, `injected` counts the faults by kind.

    Rules first; a request that meets none meets one of STORM with probability `chance`, drawn from `seed`. The headers
    `drop_headers` do not reach the store, as if it did not know them. Conditional writes are one step, as on S3.
    """

    def __init__(
        self,
        upstream: str,
        rules: Sequence[Fault] = (),
        *,
        chance: float = 0.0,
        seed: int = 0,
        drop_headers: Sequence[str] = (),
    ) -> None:
        where = urlsplit(upstream)
        self.upstream = (where.hostname or "", where.port or 80)
        self.condition, self._lock = threading.Lock(), threading.Lock()
        self.obey(*rules, chance=chance, seed=seed, drop_headers=drop_headers)

    def obey(self, *rules: Fault, chance: float = 0.0, seed: int = 0, drop_headers: Sequence[str] = ()) -> FaultyS3:
        """Forget what was and follow these rules from now on."""
        with self._lock:
            self.rules, self.chance = rules, chance
            self.dropped = {name.lower() for name in drop_headers} | {"connection", "expect"}
            self.seen: list[tuple[str, str]] = []
            self.injected: Counter[str] = Counter()
            self._random, self._matched = random.Random(seed), Counter[int]()
        return self

    def __enter__(self) -> str:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, method: str, target: str) -> Fault | None:
        """What shall happen to a request."""
        with self._lock:
            self.seen.append((method, target))
            chosen = None
            for i, rule in enumerate(self.rules):
                if rule.fits(method, target):
                    self._matched[i] += 1
                    turn, rest = divmod(self._matched[i] - rule.skip - 1, rule.every)
                    if turn >= 0 and rest == 0 and (rule.times is None or turn < rule.times):
                        chosen = rule
                        break
            if chosen is None and self._random.random() < self.chance:
                chosen = self._random.choice([f for f in STORM if f.fits(method, target)])
            if chosen is not None:
                self.injected[chosen.kind] += 1
            return chosen


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news here."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self._upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        self._leave_upstream()
        with suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def handle_any(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            return self._reset()  # the client died: nothing of it reaches the store
        fault = self.proxy.fault(self.command, self.path)
        if fault is None:
            return self._reply(*self._forward(body))
        if fault.kind == "delay":
            time.sleep(fault.seconds)
            return self._reply(*self._forward(body))
        if fault.kind == "cut_upload":
            self._forward_half(body)
            return self._reset()
        if fault.kind in ("cut_download", "shorten"):
            status, headers, data = self._forward(body)
            half = data[: len(data) // 2]
            if fault.kind == "shorten" and self.command != "HEAD":
                return self._reply(status, headers, half)
            self._reply(status, headers, half, announced=len(data))
            return self._reset()
        if fault.when == "after":
            self._forward(body)
        return self._reset() if fault.kind == "reset" else self._refuse(fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _headers(self) -> list[tuple[str, str]]:
        return [(k, v) for k, v in self.headers.items() if k.lower() not in self.proxy.dropped]

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        # moto looks and then writes: what S3 does in one step is made one step here.
        with self.proxy.condition if "If-None-Match" in self.headers else nullcontext():
            return self._ask(body)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self._headers():
            self._upstream.putheader(name, value)
        self._upstream.endheaders(body or None)
        answer = self._upstream.getresponse()
        data = answer.read()
        headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")]
        if answer.will_close:
            self._leave_upstream()
        return answer.status, headers, data

    def _forward_half(self, body: bytes) -> None:
        with socket.create_connection(self.proxy.upstream, timeout=60) as upstream:
            lines = [f"{self.command} {self.path} HTTP/1.1", *(f"{k}: {v}" for k, v in self._headers()), "", ""]
            upstream.sendall("\r\n".join(lines).encode("latin-1") + body[: len(body) // 2])
            upstream.shutdown(socket.SHUT_WR)
            upstream.recv(1)  # whatever the store makes of it, it has made it by now

    def _leave_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes, announced: int | None = None) -> None:
        self.send_response_only(status)
        lengths = [v for k, v in headers if k.lower() == "content-length"]
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        size = len(data) if announced is None else announced
        self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(size))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(data)

    def _refuse(self, fault: Fault) -> None:
        condition = "<Condition>If-None-Match</Condition>" if fault.status == 412 else ""
        document = f"<Error><Code>{fault.code}</Code><Message>injected</Message>{condition}</Error>"
        data = b'<?xml version="1.0" encoding="UTF-8"?>\n' + document.encode()
        self._reply(fault.status, [("Content-Type", "application/xml")], data)

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        with suppress(OSError):
            self.wfile.close()
        self.connection.close()


@contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """The URL of moto's S3 server with these buckets; the environment of this process has credentials for it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in buckets:
            boto3.client("s3").create_bucket(Bucket=name)
        yield f"http://{host}:{port}"
    server.stop()
