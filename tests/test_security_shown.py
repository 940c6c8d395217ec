"""What others wrote, as pages and terminals show it, and secrets, which nothing shows (docs/security.md)."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine.modalities import Picture
from pipelines import page as pages
from pipelines.page import Cell, Column, Curve, Grid, Page, Plot, Row, Table
from pipelines.visible import SafeConsole, crash, visible
from tests import browser as browsers
from tests import hostile

ROOT = Path(__file__).parents[1]
OBEYED = "\x1b]0;owned\x07\x1b[2J\x9b31m\rover\u202egnp.exe\u2066x\udcff"


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    assert visible(OBEYED) == (r"\x1b]0;owned\x07\x1b[2J\x9b31m\x0dover\u202egnp.exe\u2066x\udcff")
    assert visible("tab\tline\nشجرة 木 👩‍🚀 é") == "tab\tline\nشجرة 木 👩‍🚀 é"


def test_markup_emoji_and_escapes_mean_nothing_to_the_console() -> None:
    from rich.table import Table as Lines

    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=True, color_system=None, width=200)
    text = f"[red]a[/red] [link=file:///etc]b[/link] [/] :boom: {OBEYED}"
    table = Lines(text, title=text)
    table.add_row(text)
    console.print(table)
    console.print(text)
    shown = stream.getvalue()
    assert shown.count("[red]a[/red] [link=file:///etc]b[/link] [/] :boom: \\x1b]0;owned\\x07\\x1b[2J") == 4
    assert not any(c in shown for c in "\x07\x9b\r\u202e\u2066\udcff")
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown


def test_an_error_that_nobody_expected_says_no_secret_and_no_escape(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError(f"{OBEYED} at https://user:hunter2@host/a?sig=s3cr3t")
    except ZeroDivisionError as error:
        crash(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert "ZeroDivisionError: \\x1b]0;owned" in said
    assert "https://***@host/a?sig=***" in said
    assert "hunter2" not in said
    assert "\x1b" not in said


DRIVER = """
import json, sys
from pipelines import commands
from pipelines.cli import app
from pipelines.visible import crash
import pipelines.__main__
for arguments in json.loads(sys.argv[1]):
    try:
        code = app(arguments, standalone_mode=False)
    except SystemExit as error:
        code = error.code
    except Exception as error:
        code = crash(type(error), error, error.__traceback__)
    print("exit", code, flush=True)
"""


def spoken(*commands: list[str], terminal: bool = False) -> str:
    """Everything that these commands print, one after another in one process, raw; on a terminal if asked."""
    arguments = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300", "TERM": "xterm-256color"}
    if not terminal:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(arguments, cwd=ROOT, env=environment, **pipe).stdout.decode(errors="surrogateescape")  # type: ignore[call-overload, no-any-return]
    ours, theirs = pty.openpty()
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        said = b""
        while block := _block(ours):
            said += block
    os.close(ours)
    return said.decode(errors="surrogateescape")


def _block(handle: int) -> bytes:
    try:
        return os.read(handle, 65_536)
    except OSError:  # Linux says so when the other side has closed
        return b""


def test_commands_print_no_escape_that_the_data_holds(tmp_path: Path) -> None:
    root, images = tmp_path / "root", tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(hostile.encode(hostile.image(), "JPEG"))
    spoken(["ingest", f"folder:{images}", str(root), "--runner", "local"])
    record = root / "commits" / "crop_settings" / "shard-00000.json"
    edited = json.loads(record.read_text()) | {"file": f"../{OBEYED[:-1]}[red].tar"}
    edited["provenance"]["labeler"] = f"[bold]{OBEYED[:-1]}[/]"
    record.write_text(json.dumps(edited))
    (root / "rgb" / OBEYED).write_bytes(b"orphan")
    said = spoken(["status", str(root)], ["gc", str(root)], ["verify", str(root)], ["inspect", f"{root}{OBEYED[:-1]}"],
                  terminal=True)  # fmt: skip
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said)  # without the colours of the console itself
    assert plain.count("\\x1b]0;owned\\x07\\x1b[2J") >= 4, said
    assert "[bold]" in said
    assert not any(c in said for c in "\x07\x9b\u202e\u2066\udcff")
    assert "\x1b]0" not in said
    assert "\x1b[2J" not in said
    assert said.count("exit") == 4


# -- the page in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if not browsers.CHROMIUM.exists():
        pytest.skip(f"no Chromium at {browsers.CHROMIUM}")
    with browsers.chromium_browser() as browser:
        yield browser


def everywhere(text: str) -> Page:
    """A page with one text in every place that can hold one."""
    shown = Picture(hostile.image(), text, ((text, text),), ((text, (1, 2, 3)),))
    cell = Cell(text, shown, note=text)
    return Page(
        text,
        text,
        ((text, text),),
        (
            Grid(text, text, (Column(text, text, True), Column(text, text)), (Row(text, (cell, cell)),)),
            Table(text, text, (text, text), ((text, "sha256:" + "0" * 64), (text, text))),
            Plot(text, text, text, (Curve(text, (1.0, 2.0), (1.0, 2.0)),)),
        ),
    )


@pytest.mark.browser
def test_hostile_text_is_shown_literally_and_does_nothing(chromium: Any, tmp_path: Path) -> None:
    tab = chromium.new_page(viewport={"width": 1400, "height": 900})
    trouble: list[str] = []
    tab.on("dialog", lambda dialog: (trouble.append(f"dialog {dialog.message}"), dialog.dismiss()))
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(r.url))
    path = tmp_path / "page.html"
    counted = "[...document.querySelectorAll('*')].map(e => e.tagName).filter(n => n !== 'CODE').sort().join()"
    path.write_text(pages.render(everywhere("plain")), encoding="utf-8")
    tab.goto(path.as_uri())
    elements = tab.evaluate(counted)
    for text in (*hostile.TEXTS, "photo\u202egnp.exe", "a\x1b[2Jb"):
        path.write_text(pages.render(everywhere(text)), encoding="utf-8")
        tab.goto(path.as_uri())
        assert tab.evaluate(counted) == elements, text  # not one element more than for a harmless text
        names = (
            "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on'))"
        )
        assert tab.evaluate(names) == []
        assert tab.title() == visible(text).strip()
        body = tab.evaluate("document.body.textContent")
        assert body.count(visible(text)) >= 20, text
        tab.locator(".open").first.click()
        tab.locator("#viewer").wait_for()
        assert tab.inner_text("#viewer-title").strip() == " ".join(visible(text).split())
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("Escape")
    assert trouble == []
    tab.close()


@pytest.mark.browser
def test_the_page_forbids_what_an_escape_that_was_forgotten_would_allow(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    html = pages.render(everywhere("plain"))
    injected = (
        "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'><svg onload='window.owned = 1'></svg>"
        "<a id=j href='javascript:window.owned = 1'>x</a><base href='http://127.0.0.1:9/'>"
        "<img src='http://127.0.0.1:9/leak'><iframe src='http://127.0.0.1:9/'></iframe>"
        "<form id=f action='http://127.0.0.1:9/'><input></form><link rel=stylesheet href='http://127.0.0.1:9/x.css'>"
    )
    assert html.count("<main") == 1
    path.write_text(html.replace("<main", injected + "<main"), encoding="utf-8")
    tab = chromium.new_page()
    asked: list[str] = []
    refused: list[str] = []
    tab.on("requestfinished", lambda r: asked.append(r.url))
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto(path.as_uri())
    tab.evaluate("document.getElementById('j').click()")
    tab.evaluate("document.getElementById('f').requestSubmit()")
    assert tab.evaluate("window.owned") is None
    assert tab.url == path.as_uri()
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert sum("Content Security Policy" in text for text in refused) >= 6
    tab.close()


# -- secrets ----------------------------------------------------------------------------------------------------------

USER, PASSWORD, SIGNATURE = "theuser", "the-Pass/word", "5ec4e7516na7u4e"


class _Guarded(http.server.BaseHTTPRequestHandler):
    """Files for who has the password and the signature; ranges, as readers of tars ask for them."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != expected or f"={SIGNATURE}" not in query:
            self.send_error(403)
            return
        if path not in self.files:
            self.send_error(404)
            return
        data = self.files[path]
        first, last = 0, len(data) - 1
        wanted = self.headers.get("Range", "")
        if wanted:
            a, _, b = wanted.removeprefix("bytes=").partition("-")
            first, last = int(a), min(int(b), last) if b else last
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def guarded() -> Iterator[str]:
    """The URL of a guarded server, credentials included."""
    from urllib.parse import quote

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Guarded) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_no_secret_of_a_url_is_written_or_said(tmp_path: Path, guarded: str) -> None:
    good = hostile.encode(hostile.image(), "JPEG")
    tar = hostile.member(b"a.jpg", good) + hostile.member(b"b.jpg", b"no image") + hostile.END
    _Guarded.files = {"/t.tar": tar, "/a.jpg": good}
    query = f"?X-Amz-Signature={SIGNATURE}"
    root, table = tmp_path / "root", tmp_path / "table"
    said = spoken(
        ["ingest", f"webdataset:{guarded}/t.tar{query}", str(root), "--runner", "local"],
        ["label", str(root), "canny_edge", "--runner", "local", "--workers", "1"],
        ["status", str(root)], ["verify", str(root)], ["plan", str(root), "metadata"],
        ["inspect", str(root), "--out", str(tmp_path / "page.html")],
        ["ingest", f"webdataset:{guarded}/gone.tar{query}", str(tmp_path / "gone"), "--runner", "local"],
        ["ingest", f"webdataset:{guarded}/t.tar?X-Amz-Signature=un{SIGNATURE[1:]}", str(tmp_path / "shut")],
        ["ingest", f"parquet:{guarded}/t.parquet?token={SIGNATURE}", str(tmp_path / "none"), "--runner", "local"],
        ["ingest", f"s3://key:{SIGNATURE}@bucket/x", str(tmp_path / "none")],
        ["ingest", f"webdataset:s3://key:{SIGNATURE}@bucket/x.tar", str(tmp_path / "none"), "--runner", "local"],
        ["status", f"s3://key:{SIGNATURE}@bucket/x"],
    )  # fmt: skip
    assert said.count("exit None") == 8, said
    assert json.loads((root / "plan.json").read_text())["corpus"].startswith("webdataset:http://***@127.0.0.1:")
    # A table of links with secrets, of which one is found, one is not, and one may not be asked.
    table.mkdir()
    links = [f"{guarded}/a.jpg{query}", f"{guarded}/gone.jpg{query}", f"{guarded}/a.jpg?sig=wrong{SIGNATURE[1:-1]}"]
    pq.write_table(pa.table({"url": [*links, f"s3://key:{SIGNATURE}@bucket/x.jpg"]}), tmp_path / "links.parquet")
    said += spoken(
        ["ingest", f"parquet:{tmp_path}/links.parquet?fetch=any", str(tmp_path / "fetched"), "--runner", "local"],
        ["ingest", f"parquet:{tmp_path}/links.parquet?fetch=yes", str(tmp_path / "public"), "--runner", "local"],
        ["ingest", f"parquet:{tmp_path}/links.parquet", str(tmp_path / "asked"), "--runner", "local"],
        ["inspect", str(tmp_path / "fetched"), "--out", str(tmp_path / "fetched.html")],
    )
    assert (tmp_path / "fetched" / "quarantine" / "shard-00000.jsonl").read_text().count("\n") == 3
    (tmp_path / "links.parquet").unlink()
    secrets = (PASSWORD, PASSWORD.replace("/", "%2F"), SIGNATURE[1:-1], USER)
    written = {p: p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file()}
    assert len(written) > 20
    assert [(str(p), s) for p, text in written.items() for s in secrets if s in text] == []
    assert [s for s in secrets if s in said] == []
