"""Text that others wrote, made safe to show: what a terminal or a browser would obey becomes something to read."""

from __future__ import annotations

import re
import sys
import traceback
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.text import Text

from dataengine.storage import redacted

# Control characters (an escape begins a command to a terminal, a carriage return overwrites the line) without tab and
# line feed; Unicode's overrides and isolates of direction (UAX 9), which make what follows read backwards; and lone
# surrogates, which stand for bytes of a name that is not UTF-8 and cannot be encoded.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with every such character written as its escape: `\\x1b`, `\\u202e`."""
    return _OBEYED.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class SafeConsole(Console):
    """A console that prints text as it is: markup and emoji codes in it mean nothing, and it commands no terminal."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Where rich turns every plain string into what it prints, also those in tables."""
        return super().render_str(visible(text), **settings)


def crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that nobody expected (for `sys.excepthook`): its texts may quote URLs and data as well."""
    sys.stderr.write(visible(redacted("".join(traceback.format_exception(kind, error, trace)))))
