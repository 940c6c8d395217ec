"""Words of the grammars: coordinate tokens `v<axis>=<bin>` with bins 0..999, as ml-4m's text tokenizer has them."""

from __future__ import annotations

import re

NUM_BINS = 1000
INT = r"(0|[1-9]\d{0,2})"
"""A bin as its token spells it: 0..999 without leading zeros."""

SPECIAL = re.compile(r"v[0-3]=\S*|\[(?:PAD|UNK|SOS|EOS|S_\d+)\]")


def until_end(text: str) -> str:
    """What stands before the first [EOS], with [PAD] left out and outer white space gone."""
    return text.split("[EOS]", 1)[0].replace("[PAD]", "").strip()


def quoted(text: str) -> str:
    """A piece of a model's output for a message, cut to a readable length."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
