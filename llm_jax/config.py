"""Frozen dataclasses to JSON and back, and `key=value` overrides from the command line.

A config is a frozen dataclass, possibly of frozen dataclasses, whose leaves are numbers, strings, booleans,
`None`, or tuples of these. The annotations are the schema: nothing is declared twice.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

TRUTH = {"true": True, "false": False}


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as nested dicts of JSON values; tuples become lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_dict(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """The inverse of `to_dict`. Raises `ValueError` for an unknown key or a wrong type; absent keys take defaults."""
    hints = get_type_hints(cls)
    _check_known(values, hints, where)
    return cls(**{key: _coerce(value, hints[key], where + key) for key, value in values.items()})


def override(config: Config, assignments: Sequence[str]) -> Config:
    """`config` with each `"a.b=value"` applied in order, checked by type and by every `__post_init__` on the way.

    All assignments take effect together, so that two fields which must agree can change in one call.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {assignment!r}; for example model.n_layers=8")
        *groups, leaf = key.split(".")
        branch = values
        for group in groups:
            branch = branch.setdefault(group, {})
        if not isinstance(branch, dict) or isinstance(branch.get(leaf), dict):
            raise ValueError(f"{key} is set both as a value and as a group of values; keep one of them")
        branch[leaf] = text
    return _replace(config, values, "")


def checked(config: Config) -> Config:
    """`config`, once every leaf is known to have its annotated type: a recipe is Python and could hold anything."""
    return from_dict(type(config), to_dict(config))


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: what the user may have meant, or all there is."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _replace(config: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(type(config))
    _check_known(values, hints, where)
    changes = {}
    for key, value in values.items():
        old = getattr(config, key)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(old):
            changes[key] = _replace(old, value, f"{where}{key}.")
        else:
            changes[key] = _coerce(value, hints[key], where + key)
    return dataclasses.replace(config, **changes)


def _check_known(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"unknown config key {where + key!r}; {nearest(key, known)}")


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """`value`, from JSON or as text from the command line, as the annotated type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        return from_dict(kind, value, where + ".")
    if origin in (Union, types.UnionType):
        return _coerce_union(value, arguments, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where}={value!r} is not one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, Sequence):
            return tuple(_coerce(item, arguments[0], where) for item in items if item != "")
    elif (leaf := _leaf(value, kind)) is not None:
        return leaf
    raise ValueError(f"{where} takes {_describe(kind)}, got {value!r}")


def _coerce_union(value: Any, arguments: Sequence[Any], where: str) -> Any:
    if type(None) in arguments and (value is None or value == "none"):
        return None
    *others, last = [kind for kind in arguments if kind is not type(None)]
    for kind in others:
        try:
            return _coerce(value, kind, where)
        except ValueError:
            continue
    return _coerce(value, last, where)


def _leaf(value: Any, kind: Any) -> Any:
    """`value` as a bool, int, float or str, or None where it is not one. `1e6` is an int, `3` is a float."""
    if kind is bool:
        return TRUTH.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None
    if kind is str:
        return value if isinstance(value, str) else None
    if kind not in (int, float) or isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
        return number if kind is float else int(value) if str(value).isdigit() else _integral(number)
    except ValueError:
        return None


def _integral(number: float) -> int | None:
    return int(number) if number.is_integer() else None


def _describe(kind: Any) -> str:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return f"a group of values (set one of {', '.join(field.name for field in dataclasses.fields(kind))})"
    if get_origin(kind) is tuple:
        return f"values of type {_describe(get_args(kind)[0])} separated by commas"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
