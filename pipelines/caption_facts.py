"""What a caption of a rendered scene says, as facts: things, how many, their colours, and what surrounds them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dataengine.corpora._world import COLOURS
from dataengine.corpora.scenes import BY_WALL, NOUNS, NUMBERS, ON_GROUND, UNDER_SKY

_NUMBERS = {"a": 1, "an": 1, **{word: n for n, word in enumerate(NUMBERS) if n}}
_FORMS = {form: (name, plural) for name, nouns in NOUNS.items() for pair in nouns for plural, form in enumerate(pair)}
_COLOUR = "|".join(COLOURS)
_THING = re.compile(
    rf"\b(?:(?P<number>{'|'.join(_NUMBERS)}) )?(?:(?P<colour>{_COLOUR}) )?"
    rf"(?P<noun>{'|'.join(sorted(_FORMS, key=len, reverse=True))})\b"
    rf"(?: in (?:an? )?(?P<worn>{_COLOUR}) (?:shirt|pot)s?)?"
)
_PLACES = {
    **{phrase: f"on {name}" for name, phrases in ON_GROUND.items() for phrase in phrases},
    **{phrase: f"before {name}" for name, phrase in BY_WALL.items()},
    **{phrase: f"sky {name}" for name, phrases in UNDER_SKY.items() for phrase in phrases},
}

ALL = tuple(
    [f"{name}{more}" for name in NOUNS for more in ("", *(f" x {n}" for n in _NUMBERS.values() if n > 1))]
    + [f"{colour} {name}" for name in NOUNS for colour in COLOURS]
    + sorted(set(_PLACES.values()))
)
"""Every fact there is."""


def facts(caption: str) -> frozenset[str]:
    """The facts of a caption: `car`, `car x 2`, `red car`, `on road`, `before wall-brick`, `sky clear`.

    Wordings of one fact are one (`a fridge`, `one refrigerator`); what is in no fact's words is passed over.
    """
    return frozenset(_found(" ".join(caption.lower().split())))


def _found(text: str) -> Iterator[str]:
    for match in _THING.finditer(text):
        name, plural = _FORMS[match["noun"]]
        number = _NUMBERS.get(match["number"] or "", 2 if plural else 1)
        yield name
        if number > 1:
            yield f"{name} x {number}"
        colour = match["colour"] or match["worn"]
        if colour:
            yield f"{colour} {name}"
    yield from (fact for phrase, fact in _PLACES.items() if re.search(rf"\b{phrase}\b", text))
