"""From arguments and configuration files to dataclasses: tyro does the parsing, files give the defaults.

YAML, JSON and TOML are read. A file may hold any part of a configuration; arguments override it.
"""

from __future__ import annotations

import argparse
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro
import yaml

from conjugo.errors import UnknownName, unknown

__all__ = ["Switch", "as_yaml", "merge_file", "option", "parse"]

T = TypeVar("T")

_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}

Switch = tyro.conf.FlagCreatePairsOff[bool]
"""A flag of one command, off by default: there is no use for --no-NAME."""


def parse(kind: type[T], argv: Sequence[str], *, command: str, default: T | None = None) -> T:
    """An instance of dataclass *kind* from *argv*; exits with a message, code 2, where that cannot be.

    default: gives the values of options that are not in *argv*.
    """
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_options_rule)
    registry.primitive_rule(_choice_rule)
    with registry:
        found: Any = tyro.cli(kind, args=list(argv), prog=f"conjugo {command}", default=default)
    return cast(T, found)


def option(name: str, argv: Sequence[str]) -> str | None:
    """The value of option *name* alone, read before all others because they depend on it; None also if it lacks a value."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument(name, dest="value")
    try:
        value: str | None = reader.parse_known_args(list(argv))[0].value
    except argparse.ArgumentError:  # said by :func:`parse`, with the command's usage
        return None
    return value


def merge_file(config: T, path: Path) -> T:
    """*config*, a dataclass, with what the file at *path* says otherwise.

    Raises ValueError naming file and setting for a setting that does not exist, a value of the wrong type or out of range, and
    for a file that cannot be understood; OSError if it cannot be read.
    """
    try:
        values = _load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: cannot be understood ({' '.join(str(error).split())})") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: settings expected, such as 'lr: 0.1', got {type(values).__name__}")
    try:
        return _merge(config, values)
    except UnknownName as error:
        raise UnknownName(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def as_yaml(config: Any) -> str:
    """The whole configuration as a YAML file that :func:`merge_file` reads back."""
    plain = json.loads(json.dumps(config.to_dict()))
    text: str = yaml.safe_dump(plain, sort_keys=False)
    return text


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    return yaml.safe_load(text) or {}


def _merge(config: T, values: Mapping[str, Any], prefix: str = "") -> T:
    assert is_dataclass(config)
    hints = get_type_hints(type(config))
    known = [field.name for field in fields(config) if field.init]
    changed = {}
    for name, value in values.items():
        if name not in known:
            unknown("setting", f"{prefix}{name}", [f"{prefix}{other}" for other in known])
        now = getattr(config, name)
        if is_dataclass(now):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{name} must hold settings, got {value!r}")
            changed[name] = _merge(now, value, f"{prefix}{name}.")
        else:
            changed[name] = _fitted(value, hints[name], f"{prefix}{name}")
    merged: T = replace(config, **changed)  # type: ignore[type-var]
    return merged


def _fitted(value: Any, kind: Any, name: str) -> Any:
    """*value* as *kind*, if it is that: integers are floats too, lists tuples, and YAML's text 1e-3 a number."""
    for choice in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,):
        origin, inner = get_origin(choice), get_args(choice)
        if origin is Literal and value in inner:
            return value
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(_fitted(item, inner[0], f"{name}[{i}]") for i, item in enumerate(value))
        if origin is dict and isinstance(value, Mapping):
            return {option: _plain(chosen) for option, chosen in value.items()}
        if choice is type(None) and value is None:
            return value
        if choice is float and (number := _number(value)) is not None:
            return number
        if isinstance(choice, type) and isinstance(value, choice) and not (choice is int and isinstance(value, bool)):
            return value
    raise ValueError(f"{name} must be {_described(kind)}, got {value!r}")


def _plain(value: Any) -> Any:
    """*value*, with numbers for texts such as 1e-3, which YAML does not take for numbers; also inside a list."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    number = _number(value) if isinstance(value, str) else None
    return value if number is None else number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) or not isinstance(value, str) else None


def _described(kind: Any) -> str:
    """*kind* in the words of configuration files."""
    words = {type(None): "null", float: "a number", int: "an integer", str: "text", bool: "true or false"}
    if kind in words:
        return words[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(repr(value) for value in inner)
    if origin is tuple:
        return f"a list (each item {_described(inner[0])})"
    if origin is dict:
        return "settings (name: value)"
    return " or ".join(_described(choice) for choice in inner)


def _options_rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Rule for tyro: options of unknown type are pairs of name and value, the values read as YAML (0.9, true, text)."""
    if info.type != dict[str, Any]:
        return None

    def read(words: list[str]) -> dict[str, Any]:
        if len(words) % 2:
            raise ValueError(f"pairs of name and value expected, got {len(words)} words")
        return {name: _yaml_value(value) for name, value in zip(words[::2], words[1::2], strict=True)}

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME VALUE ...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [word for name, option in value.items() for word in (name, json.dumps(option))],
    )


def _choice_rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Rule for tyro: what is of several types, or may be None, is read as in a file, and a mistake is told as there."""
    if get_origin(info.type) not in (Union, types.UnionType):
        return None
    choices = [choice for choice in get_args(info.type) if choice is not type(None)]
    kinds = tuple(choice for choice in choices if choice in _METAVARS)
    literals = [value for choice in choices if get_origin(choice) is Literal for value in get_args(choice)]
    if not all(choice in kinds or get_origin(choice) is Literal for choice in choices):
        return None

    def read(words: list[str]) -> Any:
        (word,) = words
        if word in ("None", "null"):
            return _fitted(None, info.type, "it")
        text = next((kind for kind in kinds if kind in (str, Path)), None)
        return _fitted(_yaml_value(word), info.type, "it") if text is None else text(word)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join([*(_METAVARS[kind] for kind in kinds), *map(str, literals)]),
        instance_from_str=read,
        is_instance=lambda value: value is None or value in literals or isinstance(value, kinds),
        str_from_instance=lambda value: [str(value)],
    )


def _yaml_value(word: str) -> Any:
    """What *word* means in YAML; itself where that is nothing."""
    try:
        return _plain(yaml.safe_load(word))
    except yaml.YAMLError:
        return word
