"""Reads configs: a TOML file plus `key=value` overrides. Whatever is wrong is one line that names the key, the value
and a legal one."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from megakrause.config import RunConfig, Section, SourceConfig
from megakrause.errors import UserError


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a TOML file and applies `section.key=value` overrides (values in TOML's notation, bare words as strings,
    `none` to leave a key out). Raises UserError."""
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid TOML: {error}") from error
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """Checks a tree of plain values. Raises UserError for the first thing that is wrong."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'{override}' is not an override; write section.key=value, such as train.steps=100")
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"unknown config key '{key.strip()}': '{section}' is a value, not a section")
    if text.strip() == "none":
        if key.strip() not in _keys():
            raise UserError(_unknown(key.strip()))
        tree.pop(last, None)
        return
    try:
        value = tomllib.loads(f"value = {text}") if "\n" not in text else {}
    except tomllib.TOMLDecodeError:
        value = {}
    tree[last] = value["value"] if isinstance(value.get("value"), int | float | str | list) else text


def _explain(error: ValidationError) -> str:
    """One line for the first of pydantic's complaints."""
    errors = error.errors()
    first = errors[0]
    place = [str(part) for part in first["loc"]]
    depth = 3 if ".".join(place[:2]) in _tables() else 2
    key = ".".join(place[:depth])  # pydantic adds which type it tried
    if key == "data.train" and (inside := [e for e in errors if len(e["loc"]) > 3]):  # of a list, not of a string
        first = max(inside, key=lambda e: len(e["loc"]))
        number, *rest = first["loc"][3:]
        if first["type"] == "extra_forbidden":
            return f"unknown key '{rest[0]}' in {key}[{number}]; there are {', '.join(SourceConfig.model_fields)}"
        key += f"[{number}]" + "".join(f".{part}" for part in rest[:1])
    match first["type"]:
        case "value_error":
            return str(first["ctx"]["error"])
        case "missing":
            return f"config key '{key}' is missing; it has no default"
        case "extra_forbidden":
            return _unknown(key)
        case _:
            return f"{key} = {first['input']!r} is not allowed: {first['msg'][0].lower()}{first['msg'][1:]}"


def _unknown(key: str) -> str:
    if near := difflib.get_close_matches(key, _keys(), n=1, cutoff=0.5):
        return f"unknown config key '{key}'; did you mean '{near[0]}'?"
    section = key.split(".")[0]
    legal = [k for k in _keys() if k.startswith(f"{section}.")] or [k for k in _keys() if "." not in k]
    return f"unknown config key '{key}'; there are {', '.join(legal)}"


def _keys() -> list[str]:
    """Every legal key, dotted, and every section."""
    return [name for name, _ in _fields(RunConfig)]


def _tables() -> list[str]:
    """The keys of sections that are tables themselves."""
    return [name for name, inside in _fields(RunConfig) if inside and "." in name]


def _fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(dotted key, whether it is a table) of a section and all tables in it."""
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inside = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        yield prefix + name, bool(inside)
        for kind in inside:
            yield from _fields(kind, f"{prefix}{name}.")
