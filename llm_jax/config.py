"""Frozen dataclasses to JSON and back, new values by path, and `key=value` overrides from the command line.

A config is a frozen dataclass, possibly of frozen dataclasses, whose leaves are numbers, strings, booleans,
`None`, or tuples `tuple[X, ...]` of these. The annotations are the schema: nothing is declared twice.
As text, `none` is None, and a tuple is its items with commas between, and optionally after the last one. A number is
ASCII digits, with a point or an exponent: neither `1_000` nor the digits of another script.
"""

import dataclasses
import difflib
import functools
import importlib
import itertools
import json
import math
import re
import sys
import types
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llm_jax.keys import choices, keys, kinds, suggestions

Config = TypeVar("Config")

type_hints = functools.cache(get_type_hints)

TRUTH = {"true": True, "false": False}
NUMBER = re.compile(r"[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]+)?")
LONGEST_NUMBER = 500  # characters; Python itself refuses to read integers of some thousand digits
MOST_ITEMS = 10_000  # of a tuple
INT32 = 2**31 - 1
FLOAT32 = (2.0**-126, 3.4028234e38)  # sizes of the smallest normal number and the largest
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}


def to_dict(config: Any) -> dict[str, Any]:
    """Return `config` as nested dicts of JSON values; tuples become lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_dict(value)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Return a `cls` from the result of `to_dict`; absent keys take their defaults.

    Raise `ValueError` for an unknown key, a wrong type, or an absent key without a default.
    """
    hints = type_hints(cls)
    _check_known(values, hints, where)
    _check_complete(values, cls, where)
    return cls(**{key: _coerce(value, hints[key], where + key) for key, value in values.items()})


def replace(config: Config, /, *assignments: str | Mapping[str, Any], **changes: Any) -> Config:
    """Return `config` with new values by path: `replace(config, {"model.n_layers": 4}, steps=9)`.

    `assignments` may also be words as on the command line, `"steps=9"`. All take effect together, so that two fields
    which must agree can change in one call. Raise `ValueError` for an unknown path, a value of another type (text for a
    number too), and a config that can't be.
    """
    words = [word for word in assignments if not isinstance(word, Mapping)]
    for more in (found for found in assignments if isinstance(found, Mapping)):
        if twice := changes.keys() & more.keys():
            raise ValueError(f"{min(twice)} is set twice; keep one of them")
        changes |= more
    new, known = override(config, words, **changes), {key.name: key for key in keys(type(config))}
    for path, value in changes.items():
        if isinstance(value, str) and not isinstance(functools.reduce(getattr, path.split("."), new), str):
            raise _wrong_type(value, kinds(known[path].kind), path)
    return new


def override(config: Config, assignments: Sequence[Any], **changes: Any) -> Config:
    """Return `config` with each `"a.b=value"` of the command line applied, and `changes` as in `replace` before them.

    Raise `ValueError` for a key that is unknown, with the likely ones, or that is set twice, and as `replace` does.
    """
    known = {key.name: key for key in keys(type(config))}
    groups = {path: value for path, value in changes.items() if dataclasses.is_dataclass(value) and "." not in path}
    values: dict[str, Any] = {}
    for path, value in changes.items():
        if path not in known:
            raise _unknown(type(config), path, plain(value))
        if path not in groups:
            _insert(values, path, value)
    for assignment in assignments:
        if not isinstance(assignment, str):
            raise ValueError(f"expected 'key=value' or {{key: value}}, got {_short(assignment)}")
        key, equals, text = assignment.partition("=")
        if key not in known and key.strip() in known:
            raise ValueError(f"{_short(assignment)} has blanks; write {key.strip()}={text.strip()}")
        if not equals or not key:
            example = "model.n_layers=8, without blanks"
            raise ValueError(f"expected key=value, got {_short(assignment)}; for example {example}")
        below_a_value = any(key.startswith(f"{name}.") for name, at in known.items() if at.group is None)
        if key not in known and not below_a_value:
            raise _unknown(type(config), key, text)
        if key in known and known[key].group and text != "none" and (meant := suggestions(key, type(config))):
            raise ValueError(f"{key} is a group of keys; did you mean {_as_typed(meant, text)}?")
        _insert(values, key, text)
    return _replace(config, values, "", groups)


def _insert(values: dict[str, Any], path: str, value: Any) -> None:
    """Put `value` at `path` of nested dicts. Raise `ValueError` if another value, or a group of values, is there."""
    *groups, leaf = path.split(".")
    for depth, group in enumerate(groups, 1):
        inner: Any = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise _mixed(".".join(groups[:depth]))
        values = inner
    if isinstance(values.get(leaf), dict):
        raise _mixed(path)
    if values.setdefault(leaf, value) != value:
        raise ValueError(f"{path} is set twice, to {_short(values[leaf])} and to {_short(value)}; keep one of them")


def checked(config: Config) -> Config:
    """Return `config` with every leaf of its annotated type: a recipe is Python, and could hold anything.

    Raise `ValueError` like `from_dict`.
    """
    return from_dict(type(config), to_dict(config))


def check_types(config: Any, where: str) -> None:
    """Raise `ValueError` for a field of another type than its annotation, or not among its choices.

    So too for a subclass, here or as a field: config.json would lose it.
    """
    _check_exact(config)
    for name, kind in type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            _check_exact(value)
        if not any(_is_a(value, each) for each in kinds(kind)):
            raise _wrong_type(value, kinds(kind), where + name)


def _is_a(value: Any, kind: Any) -> bool:
    """Return whether `value` is of the type `kind`, which is no union."""
    if kind in (int, float):  # a whole number is a float too
        return isinstance(value, int | kind) and not isinstance(value, bool)
    origin = get_origin(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, get_args(kind)[0]) for item in value)
    return value in get_args(kind) if origin is Literal else isinstance(value, kind)


def check_ranges(config: Any, where: str) -> None:
    """Raise `ValueError` for a number, here or in a config inside, that is out of the range of arrays.

    Whole numbers are indices and counts, int32; a seed may use all 32 bits. Others become float32, where a number that
    is too small is 0.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), where + field.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and abs(item) > INT32 and field.name != "seed":
                raise ValueError(f"{name}={_short(item)} is more than int32 can count; use at most {INT32}")
            if isinstance(item, float) and item != 0.0 and not FLOAT32[0] <= abs(item) <= FLOAT32[1]:
                raise ValueError(f"{name}={item:g} is no float32; use 0, or a size from 1.2e-38 to 3.4e+38")


def plain(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(plain, value))
    return value if isinstance(value, str) else json.dumps(value) if value is not None else "none"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: what the user may have meant, or all known names."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _replace(config: Any, values: Mapping[str, Any], where: str, fields: Mapping[str, Any] | None = None) -> Any:
    hints = type_hints(type(config))
    _check_known(values, hints, where)
    changes = dict(fields or {})
    for key, value in values.items():
        old = changes.get(key, getattr(config, key))
        if isinstance(value, Mapping) and dataclasses.is_dataclass(old):
            changes[key] = _replace(old, value, f"{where}{key}.")
        else:
            changes[key] = _coerce(value, hints[key], where + key)
    return dataclasses.replace(config, **changes)


def _check_known(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in known:
            names = [where + name for name in known]
            raise ValueError(f"unknown config key {_short(where + key)}; {nearest(where + key, names)}")


def _check_complete(values: Mapping[str, Any], cls: Any, where: str) -> None:
    for field in dataclasses.fields(cls):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in values and not optional:
            raise ValueError(f"config key {where + field.name!r} is missing; it has no default, so set it")


def _unknown(cls: type, key: str, text: str) -> ValueError:
    """Return the error about an unknown key: what to type instead of `key=text`."""
    group = key.rpartition(".")[0] + "."
    inside = [name for name in (found.name for found in keys(cls)) if group != "." and name.startswith(group)]
    if meant := suggestions(key, cls):
        say = f"did you mean {_as_typed(meant, text)}?"
    elif inside:
        say = f"known: {', '.join(inside)}"
    else:
        say = "llm-jax show CONFIG --config lists all that there are"
    return ValueError(f"unknown config key {_short(key)}; {say}")


def _as_typed(names: Sequence[str], text: str) -> str:
    return ", or ".join(f"{name}={text}" for name in names)


def _mixed(key: str) -> ValueError:
    return ValueError(f"{key} is set both as a value and as a group of values; keep one of them")


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """Return `value`, from Python, JSON or as text from the command line, as the annotated type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, arguments, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return from_dict(kind, value, where + ".")
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and (items := _items(value)) is not None:
        if len(items) > MOST_ITEMS:
            raise ValueError(f"{where} takes at most {MOST_ITEMS:,} values, got {len(items):,}")
        return tuple(_coerce(item, arguments[0], where) for item in items)
    if (leaf := _leaf(value, kind)) is not None:
        return leaf
    raise _wrong_type(value, (kind,), where)


def _coerce_union(value: Any, kinds: Sequence[Any], where: str) -> Any:
    if types.NoneType in kinds and (value is None or value == "none"):
        return None
    for kind in kinds:
        try:
            return _coerce(value, kind, where)
        except ValueError:
            if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
                raise  # the mistake is inside the group, and says where
    raise _wrong_type(value, kinds, where)


def _items(value: Any) -> Sequence[Any] | None:
    """Return the items of a JSON list, or of text; None for anything else."""
    if isinstance(value, str):
        items = value.split(",")
        return items if items[-1] else items[:-1]
    return value if isinstance(value, Sequence) else None


def _leaf(value: Any, kind: Any) -> Any:
    """Return `value` as a bool, int, float or str, or None if it is not one."""
    if kind is bool and isinstance(value, str):
        return TRUTH.get(value.lower())
    if kind in (bool, str):
        return value if isinstance(value, kind) else None
    if kind not in (int, float) or isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return _number(value, kind)


def _number(value: str | int | float, kind: type) -> int | float | None:
    """Return `value` as an int or float, or None: `1e6` is an int and `3` is a float; infinity and nan are neither."""
    if isinstance(value, str) and (len(value) > LONGEST_NUMBER or not NUMBER.fullmatch(value)):
        return None
    if kind is int and (isinstance(value, int) or re.fullmatch("[+-]?[0-9]+", str(value))):
        return int(value)  # not through float, which has 53 bits
    try:
        number = float(value)
    except OverflowError:
        return None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        return None
    return kind(number)


def read_number(text: str, kind: type) -> int | float:
    """Return the number in the text of a command-line option. Raise `ValueError` as for a key of a config."""
    number = _number(text, kind)
    if number is None:
        raise ValueError(f"takes {NAMES[kind]}, got {_short(text)}{_in_ascii(text, kind)}")
    return number


def _wrong_type(value: Any, kinds: Sequence[Any], where: str) -> ValueError:
    got = f"a group of values ({_short(', '.join(value))[1:-1]})" if isinstance(value, Mapping) else _short(value)
    say = next((way for kind in kinds if kind in (int, float) and (way := _in_ascii(value, kind))), "")
    few = [str(choice) for kind in kinds for choice in choices(kind)]
    if isinstance(value, str) and (close := difflib.get_close_matches(value[:100].lower(), few, n=1)):
        say = f"; did you mean {where}={close[0]}?"
    say = say or _python_way(value, kinds)
    return ValueError(f"{where} takes {' or '.join(_describe(kind, where) for kind in kinds)}, got {got}{say}")


def _python_way(value: Any, kinds: Sequence[Any]) -> str:
    """Return what a Python program gives in the place of a `value` that is nearly right; else nothing."""
    if getattr(value, "shape", None) == ():  # a number of NumPy or JAX, which JSON can't hold
        return f"; give {type(value.item()).__name__}(...) of it"
    classes = [item for item in (value if isinstance(value, tuple | list) else [value]) if isinstance(item, type)]
    if classes and classes[0].__module__ != "__main__":  # of a layer of the user's own
        return f"; give its import path: {f'{classes[0].__module__}:{classes[0].__qualname__}'!r}"
    if isinstance(value, str | list) and any(get_origin(kind) is tuple for kind in kinds):
        return f"; give a tuple: {_short((value,) if isinstance(value, str) else tuple(value))}"
    group = (
        [kind.__name__ for kind in kinds if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
        if not isinstance(value, str)
        else []
    )
    return f"; give a {group[0]}(...)" if group else ""


def _in_ascii(value: Any, kind: type) -> str:
    """Return how to write what looks like a number but is none: `1_000`, or digits of another script."""
    if not isinstance(value, str) or len(value) > LONGEST_NUMBER:
        return ""
    digits = "".join(str(unicodedata.decimal(letter, letter)) for letter in value if letter not in "_ ,'")
    return f"; write {digits}" if digits != value and _number(digits, kind) is not None else ""


def _short(value: Any) -> str:
    """Return `value` as Python writes it, without the middle of a long one."""
    try:
        text = repr(value)
    except ValueError:  # an integer with too many digits for Python to print
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"


def _describe(kind: Any, where: str) -> str:
    if dataclasses.is_dataclass(kind):
        fields = ", ".join(f"{where}.{field.name}" for field in dataclasses.fields(kind))
        return f"a group of values (set one of {fields})"
    if get_origin(kind) is tuple:
        return f"values of type {_describe(get_args(kind)[0], where)} separated by commas"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return NAMES.get(kind, str(kind))


def differences(there: Mapping[str, Any], here: Mapping[str, Any], where: str = "") -> list[str]:
    """Return a phrase for each leaf in which two nested mappings differ: `model.n_layers is 4 there, 8 here`."""
    found = []
    for key in [*there, *(key for key in here if key not in there)]:
        a, b = there.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key} is {_abbreviated(a, b)} there, {_abbreviated(b, a)} here")
    return found


def _abbreviated(value: Any, other: Any) -> str:
    """Return a value; of a long one, such as a digest, as much of the beginning as distinguishes it from `other`."""
    text = plain(value)
    alike = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, plain(other), strict=False))))
    return text if len(text) < 40 else f"{text[: max(12, alike + 1)]}..."


def _check_exact(config: Any) -> None:
    """Raise `ValueError` for an instance of a subclass of a config: config.json would lose it."""
    if parents := [cls for cls in type(config).__mro__[1:] if dataclasses.is_dataclass(cls)]:
        name = parents[0].__name__
        raise ValueError(
            f"{type(config).__name__} is a subclass of {name}, which config.json can't bring back; use {name} itself, "
            "and pass code of your own as fit(loss=..., optimizer=..., metrics=...) or as model.layers=my.module:Mixer"
        )


def import_object(path: str) -> Any:
    """Return what `package.module:name` names. Raise `ValueError` where there is no such thing here."""
    module, _, name = path.partition(":")
    if module == "__main__" and not hasattr(sys.modules["__main__"], name.partition(".")[0]):
        raise ValueError(f"{path} was in a script or notebook, where nothing can find it again; move it to a module")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{path} can't be imported here ({error}); start from the folder that holds {module.partition('.')[0]}, or "
            "put that on PYTHONPATH"
        ) from None
    except Exception as error:  # of the code in the module itself
        raise ValueError(
            f"{module} fails when it is imported: {type(error).__name__}: {error}; fix it first"
        ) from error
