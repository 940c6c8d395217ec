"""A folder is a registry: the file name is the plugin's name, and its one public class is the plugin."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from typing import TypeVar

T = TypeVar("T")


def names(package: str) -> list[str]:
    """The plugins of a package, sorted: every module in its folder whose name has no leading underscore."""
    folder = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_"))


def load(package: str, name: str, base: type[T]) -> type[T]:
    """The subclass of `base` that the file `<package>/<name>.py` defines; ValueError when there is none."""
    known = names(package)
    if name not in known:
        raise ValueError(f"unknown {base.__name__.lower()} {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    module = importlib.import_module(f"{package}.{name}")
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    if len(own) != 1:
        raise ValueError(
            f"{package}/{name}.py must define one public {base.__name__}, it defines {[c.__name__ for c in own]}"
        )
    return own[0]


def nearest(name: str, known: list[str]) -> str:
    """A hint for an error message: the known name closest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
