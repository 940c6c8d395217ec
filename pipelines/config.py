"""Recipes: typed configurations as Python functions, changed by `field=value` on the command line, saved resolved."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from dataengine import plugins

C = TypeVar("C")


def load(name: str, kind: type[C]) -> C:
    """The configuration that a recipe returns: a name in `pipelines/recipes/`, or a Python file with `def recipe()`.

    `NAME.large` is another function of the same file. ValueError when there is no such recipe (naming the nearest) or
    it configures another kind of run.
    """
    function = "recipe"
    if name.endswith(".py"):
        made = importlib.util.spec_from_file_location(Path(name).stem, name)
        if made is None or made.loader is None or not Path(name).is_file():
            raise ValueError(f"recipe {name!r}: no such Python file")
        module = importlib.util.module_from_spec(made)
        made.loader.exec_module(module)
    else:
        file, _, function = name.partition(".")
        function = function or "recipe"
        known = plugins.names("pipelines.recipes")
        if file not in known:
            raise ValueError(f"unknown recipe {file!r}{plugins.nearest(file, known)}; known: {', '.join(known)}")
        module = importlib.import_module(f"pipelines.recipes.{file}")
        variants = recipes_of(module)
        if function not in variants:
            raise ValueError(f"recipe {file} has no {function!r}, expected {' or '.join(variants)}")
    config = getattr(module, function)()
    if not isinstance(config, kind):
        raise ValueError(f"recipe {name!r} configures a {type(config).__name__}, this command runs a {kind.__name__}")
    return config


def recipes_of(module: ModuleType) -> list[str]:
    """The names of a recipe file's functions that return configurations: its own public ones without parameters."""
    own = [(n, f) for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    return [name for name, f in own if not name.startswith("_") and not inspect.signature(f).parameters]


def override(config: C, assignments: Sequence[str]) -> C:
    """The configuration with `path.to.field=value` applied; values are YAML, checked against the field's type."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r}: expected field=value")
        config = _set(config, path.split("."), yaml.safe_load(text), path)
    return config


def _set(config: Any, path: list[str], value: Any, whole: str) -> Any:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"{whole!r}: {type(config).__name__} has no fields to set")
    known = [f.name for f in dataclasses.fields(config)]
    name, *rest = path
    if name not in known:
        hint = plugins.nearest(name, known)
        raise ValueError(f"unknown setting {whole!r}{hint}; {type(config).__name__} has: {', '.join(known)}")
    if rest:
        return dataclasses.replace(config, **{name: _set(getattr(config, name), rest, value, whole)})
    try:
        checked = TypeAdapter(get_type_hints(type(config))[name]).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{whole}={value!r}: {error.errors()[0]['msg']}") from error
    return dataclasses.replace(config, **{name: checked})


def resolved(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, for the record."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {"kind": type(config).__name__, **values}


def keep(config: Any, folder: Path, free: Collection[str] = ()) -> None:
    """Write a run's configuration to `recipe.json` in its folder; ValueError when another run has begun there.

    Weights of one configuration must not go on, or be saved, under another. `free` names fields that may differ; the
    settings of the training loop look after themselves (`model.settings.check`).
    """
    file, found = folder / "recipe.json", resolved(config)
    if file.exists() and (folder / "checkpoint").exists():
        before = _aged(json.loads(file.read_text()), config)
        fixed = sorted((before.keys() | found.keys()) - {"loop", "out", *free})
        changed = [f"{n} {before.get(n)!r} -> {found.get(n)!r}" for n in fixed if before.get(n) != found.get(n)]
        if changed:
            raise ValueError(
                f"{folder} holds a run of another configuration: {'; '.join(changed)}; "
                "expected the same, or another `out`"
            )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


def _aged(before: Any, config: Any) -> Any:
    """A record with the settings that are younger than it: they had their defaults."""
    if isinstance(before, list) and isinstance(config, tuple) and len(before) == len(config):
        return [_aged(old, new) for old, new in zip(before, config, strict=True)]
    if not isinstance(before, dict) or not dataclasses.is_dataclass(config):
        return before
    known = {
        f.name: _aged(before[f.name], getattr(config, f.name)) for f in dataclasses.fields(config) if f.name in before
    }
    young = {
        f.name: json.loads(json.dumps(f.default, default=str))
        for f in dataclasses.fields(config)
        if f.name not in before and f.default is not dataclasses.MISSING
    }
    return {**before, **known, **young}


def with_paths(config: C, old: str, new: str) -> C:
    """The configuration with every text that starts with the folder `old` moved to `new`."""
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        moved = _moved(value, old, new)
        if moved != value:
            changes[f.name] = moved
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return new + value.removeprefix(old) if value.startswith(old) else value
    if isinstance(value, tuple):
        return tuple(_moved(v, old, new) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return with_paths(value, old, new)
    return value
