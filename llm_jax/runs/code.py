"""How a run remembers code of a user's own: the import path of each piece, and a hash of what it does.

A config is JSON, and code is not. Whoever resumes a run passes the same code again, or it is imported from where it
was, and that it has not changed is checked before the first step.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import linecache
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import import_object
from llm_jax.model.config import ModelConfig, own_layers, own_mixer
from llm_jax.train.custom import Custom

Record = Mapping[str, Mapping[str, str | None]]

# Where code of other people lies: what is there is known by its name.
INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
MADE = {"__init__", "__repr__", "__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__", "__replace__"}
MADE |= {"__setattr__", "__delattr__"}  # of a frozen dataclass
LINEN = ("_abc_impl", "_state", "_parent_ref", "parent", "scope", "name")  # what flax and abc put into a class
Seen = dict[Any, Any]  # what was spelled already, kept alive so that no id comes twice
PLAIN = (type(None), bool, int, float, complex, str, bytes)


def record_of(custom: Custom, model: ModelConfig) -> Record:
    """Return the import path of each piece of code, None where it has none, and the hash of what it does."""
    pieces = {"loss": custom.loss, "optimizer": custom.made_by or custom.optimizer}
    pieces |= _mixers(model)
    return {
        name: {"path": import_path(piece), "sha256": code_hash(piece)}
        for name, piece in pieces.items()
        if piece is not None
    }


def changed_mixers(model: ModelConfig, record: Record) -> list[str]:
    """Return the import paths of a run's mixers that have other code now than it was trained with."""
    known = {path: cls for path, cls in _mixers(model).items() if path in record}
    return [path for path, cls in known.items() if record[path]["sha256"] != code_hash(cls)]


def found_again(record: Record, given: Custom, model: ModelConfig, run: str) -> Custom:
    """Return the code that the run `run` was trained with: `given`, else imported by the path in `record`.

    Raise `ValueError` where some of it is missing, or has changed.
    """
    passed = {"loss": given.loss, "optimizer": given.made_by or given.optimizer}
    pieces = dict(passed)
    for name, piece in passed.items():
        if piece is None and name in record:
            pieces[name] = _imported(name, record[name]["path"], run)
        elif piece is not None and name not in record:
            raise ValueError(f"{run} was trained without {name}=; leave it out, or start anew with init_from={run}")
    for name, piece in (pieces | _mixers(model)).items():  # compared before it is called
        if piece is not None and name in record and code_hash(piece) != record[name]["sha256"]:
            raise ValueError(_changed(name, passed.get(name), record[name]["path"], run))
    return Custom.of(pieces["loss"], pieces["optimizer"])


def _changed(name: str, passed: Any, path: str | None, run: str) -> str:
    """Say that code, `passed` or else imported from `path`, is not what `run` was trained with."""
    anew, given = f"or start anew with init_from={run}", import_path(passed)
    if passed is None or given == path is not None:
        what = name if path in (None, name) else f"{name}={path}"
        return f"{what} does not do what it did when {run} was trained; restore it, {anew}"
    now = f"{name}={given}" if given else f"the {name}= that was passed"
    return f"{now} does not do what {path or f'the {name}'} does that {run} was trained with; pass that, {anew}"


def import_path(piece: Any) -> str | None:
    """Return `package.module:name` of a function or class; None for what no import could bring back."""
    module, name = getattr(piece, "__module__", None), getattr(piece, "__qualname__", None)
    bound = isinstance(piece, types.MethodType)  # to an object, which is nowhere
    return None if bound or not module or not name or "<" in name else f"{module}:{name}"


def code_hash(piece: Any) -> str:
    """Return the SHA-256 of what a function, class or object does.

    It covers the code without comments, docstrings and line breaks; the values that it closes over; the global values,
    functions, classes and objects that it names, of its own module and of others that are not installed; decorators,
    base classes and the attributes of objects. Installed libraries are known by the names of what is used of them.
    """
    digest = hashlib.sha256()
    for text in _spelled(piece, {}):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _mixers(model: ModelConfig) -> dict[str, Any]:
    return {path: own_mixer(path) for path in own_layers(model)}


def _imported(name: str, path: str | None, run: str) -> Any:
    way = f'resume it from Python: llm_jax.resume("{run}", {name}=...)'
    if path is None or path.startswith("__main__:"):
        where = "a script or notebook" if path else "no module of its own"
        raise ValueError(f"{run} was trained with {name}= from {where}, which can't be found again by itself; {way}")
    try:
        return import_object(path)
    except ValueError as error:
        raise ValueError(f"{run} was trained with {name}={path}: {error}; or {way}") from None


def _spelled(piece: Any, seen: Seen) -> Iterator[str]:
    """Yield what `piece` consists of as text, in an order that is the same in every process."""
    if isinstance(piece, PLAIN):
        yield repr(piece)
        return
    if id(piece) in seen:
        return
    seen[id(piece)] = piece
    match piece:
        case functools.partial():
            yield from _spelled([piece.func, piece.args, piece.keywords], seen)
        case types.MethodType():
            yield from _spelled([piece.__func__, piece.__self__], seen)
        case types.FunctionType():
            yield from _of_function(piece, seen)
        case type():
            yield from _of_class(piece, seen)
        case types.ModuleType() | types.BuiltinFunctionType():
            yield piece.__name__
        case Mapping():
            yield from _spelled(sorted(piece.items(), key=lambda item: str(item[0])), seen)
        case set() | frozenset():
            yield from sorted(" ".join(_spelled(part, dict(seen))) for part in piece)
        case list() | tuple():
            for part in piece:
                yield from _spelled(part, seen)
        case jax.Array() if jnp.issubdtype(piece.dtype, jax.dtypes.prng_key):
            yield from _spelled(jax.random.key_data(piece), seen)
        case _ if hasattr(piece, "__array__"):
            array = np.asarray(piece)
            content = hashlib.sha256(array.tobytes()).hexdigest() if array.dtype != object else ""
            yield f"{array.dtype} {array.shape} {content}"
            yield from _spelled([] if content else array.ravel().tolist(), seen)
        case _:
            yield from _of_object(piece, seen)


def _of_object(piece: Any, seen: Seen) -> Iterator[str]:
    """Yield the class and attributes of an object; of one of a library what it shows of itself, and its functions."""
    yield from _spelled(getattr(piece, "__wrapped__", None), seen)  # as of jax.jit
    attributes = dict(getattr(piece, "__dict__", {}))
    if _is_foreign(type(piece)) and not dataclasses.is_dataclass(piece):
        shown = repr(piece)
        yield type(piece).__qualname__ if shown.startswith("<") else shown
        inner = (types.FunctionType, functools.partial)  # such as the rules of jax.custom_vjp
        yield from _spelled({name: value for name, value in attributes.items() if isinstance(value, inner)}, seen)
        return
    yield from _of_class(type(piece), seen)
    slots = [name for cls in type(piece).__mro__ for name in as_names(vars(cls).get("__slots__", ()))]
    attributes |= {name: getattr(piece, name) for name in slots if hasattr(piece, name)}
    for name, value in attributes.items():
        if not isinstance(getattr(type(piece), name, None), functools.cached_property):  # computed of the others
            yield name
            yield from _known(value, seen)


def _of_function(function: types.FunctionType, seen: Seen) -> Iterator[str]:
    code, installed = function.__code__, function.__code__.co_filename.startswith(INSTALLED)
    yield f"{function.__module__}:{function.__qualname__}" if installed else _syntax(function.__code__)
    yield from _spelled([function.__defaults__, function.__kwdefaults__], seen)
    for cell in function.__closure__ or ():
        if _filled(cell):
            yield from _known(cell.cell_contents, seen)
    yield from _spelled(getattr(function, "__wrapped__", None), seen)
    if not installed:
        yield from _spelled({name: value for name, value in vars(function).items() if name != "__wrapped__"}, seen)
        yield from _of_names(sorted(_names(code)), function.__globals__, seen)


def _of_names(names: Sequence[str], values: Mapping[str, Any], seen: Seen, outer: Sequence[Any] = ()) -> Iterator[str]:
    """Yield the global `names`, and what they consist of; those of a module of the user's own too."""
    for name in names:
        value = values.get(name)
        if value is None or any(value is module for module in outer):
            continue
        yield name
        if isinstance(value, types.ModuleType) and not _is_foreign(value):  # the same code names what it uses
            yield from _of_names(names, vars(value), seen, [*outer, value])
        else:
            yield from _known(value, seen)


def _known(value: Any, seen: Seen) -> Iterator[str]:
    """Yield what `value` consists of; a function, class or module of a library is known by its name."""
    named = isinstance(value, type | types.ModuleType) or callable(inspect.unwrap(value))
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if named and name and "<locals>" not in name and _is_foreign(value):
        yield name
    else:
        yield from _spelled(value, seen)


def _is_foreign(piece: Any) -> bool:
    """Return whether a module, class or function is of a library: installed, built in, or ours."""
    if isinstance(piece, types.ModuleType):
        name = piece.__name__
    else:
        name = getattr(inspect.unwrap(piece), "__module__", None) or type(piece).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    if name.partition(".")[0] == "llm_jax" or (file or "").startswith(INSTALLED):
        return True
    return name in sys.builtin_module_names or (file is None and name in sys.stdlib_module_names)


def _of_class(cls: type, seen: Seen) -> Iterator[str]:
    yield f"{cls.__module__}:{cls.__qualname__}"
    if _is_foreign(cls) or (cls, "class") in seen:
        return
    seen[cls, "class"] = cls
    for name, value in sorted(vars(cls).items()):
        inner = inspect.unwrap(getattr(value, "__func__", None) or getattr(value, "fget", None) or value)
        if isinstance(inner, types.FunctionType):
            made = name in MADE and inner.__code__.co_filename == "<string>"  # by dataclasses
            if not made and not inner.__code__.co_filename.startswith(INSTALLED):
                yield name
                yield from _spelled(inner, seen)
                continue
        if not (name.startswith("__") or name in LINEN):
            yield name
            yield from _known(getattr(value, "func", value), seen)  # of a cached_property
    for base in cls.__bases__:
        yield from _of_class(base, seen)


def as_names(slots: str | Iterable[str]) -> list[str]:
    """Return `__slots__` as a list: it may be one name."""
    return [slots] if isinstance(slots, str) else list(slots)


def _names(code: types.CodeType) -> set[str]:
    """Return the global names in a function, and in those inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return {*code.co_names}.union(*map(_names, inner))


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False


def _syntax(code: types.CodeType) -> str:
    """Return the source of a function in one spelling, without docstrings; its instructions if that is not there."""
    linecache.checkcache(code.co_filename)  # the file may have changed since it was read
    try:
        tree = ast.parse(textwrap.dedent("".join(linecache.getlines(code.co_filename))))
    except SyntaxError:  # a cell with magics
        tree = ast.Module([], [])
    kinds = ast.Lambda if code.co_name == "<lambda>" else ast.FunctionDef
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and _begins(node) == code.co_firstlineno]
    found = [node for node in found if getattr(node, "name", code.co_name) == code.co_name]
    if len(found) != 1 or not _comes_from(code, tree):
        return _instructions(code)
    if isinstance(found[0], ast.FunctionDef):
        found[0].name = "f"  # what it is called changes nothing
    for node in ast.walk(found[0]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(found[0])


def _comes_from(code: types.CodeType, tree: ast.Module) -> bool:
    """Return whether `tree` has the function of `code`; not so where a file changed and was not imported again."""
    inner = [compile(tree, code.co_filename, "exec", dont_inherit=True)]
    for outer in inner:
        inner += [constant for constant in outer.co_consts if isinstance(constant, types.CodeType)]
    there = [one for one in inner if (one.co_name, one.co_firstlineno) == (code.co_name, code.co_firstlineno)]
    return any(_instructions(one) == _instructions(code) for one in there)


def _instructions(code: types.CodeType) -> str:
    constants = [
        _instructions(constant) if isinstance(constant, types.CodeType) else " ".join(_spelled(constant, {}))
        for constant in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _begins(node: Any) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
