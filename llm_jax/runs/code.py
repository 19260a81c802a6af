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
import re
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import import_object
from llm_jax.model.config import ModelConfig, is_own, own_mixer
from llm_jax.train.custom import Custom

Record = Mapping[str, Mapping[str, str | None]]

# Where code of other people lies: what is there is known by its name.
INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
Seen = dict[int, Any]  # what was spelled already, kept alive so that no id comes twice
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
    return {layer.mixer: own_mixer(layer.mixer) for layer in model.period if is_own(layer.mixer)}


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
        case _ if hasattr(piece, "__wrapped__"):  # as of jax.jit
            yield from _spelled(piece.__wrapped__, seen)
        case _:
            yield from _of_class(type(piece), seen)
            yield from _spelled(getattr(piece, "__dict__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(piece)), seen)


def _of_function(function: types.FunctionType, seen: Seen) -> Iterator[str]:
    code, installed = function.__code__, function.__code__.co_filename.startswith(INSTALLED)
    yield f"{function.__module__}:{function.__qualname__}" if installed else _syntax(function.__code__)
    yield from _spelled([function.__defaults__, function.__kwdefaults__], seen)
    yield from _spelled([cell.cell_contents for cell in function.__closure__ or () if _filled(cell)], seen)
    yield from _spelled(getattr(function, "__wrapped__", None), seen)
    if not installed:
        yield from _of_names(sorted(_names(code)), function.__globals__, seen)


def _of_names(names: Sequence[str], values: Mapping[str, Any], seen: Seen, outer: Sequence[Any] = ()) -> Iterator[str]:
    """Yield those of the global `names` that are not of installed libraries, and what they consist of."""
    for name in names:
        value = values.get(name)
        if value is None or value in outer or _is_installed(value):
            continue
        yield name
        if isinstance(value, types.ModuleType):  # of which the same code names what it uses
            yield from _of_names(names, vars(value), seen, [*outer, value])
        else:
            yield from _spelled(value, seen)


def _is_installed(piece: Any) -> bool:
    """Return whether a module, class, function or object is other people's. One with values of a user's own is not."""
    if isinstance(piece, (*PLAIN, tuple, list, dict, set, frozenset, functools.partial)) or hasattr(piece, "__array__"):
        return False
    if not isinstance(piece, type) and (
        dataclasses.is_dataclass(piece) or "<locals>" in getattr(piece, "__qualname__", "")
    ):
        return False
    if isinstance(piece, types.ModuleType):
        name = piece.__name__
    else:
        name = getattr(inspect.unwrap(piece), "__module__", None) or type(piece).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    return name != "__main__" and (name.partition(".")[0] == "llm_jax" or file is None or file.startswith(INSTALLED))


def _of_class(cls: type, seen: Seen) -> Iterator[str]:
    yield f"{cls.__module__}:{cls.__qualname__}"
    if getattr(sys.modules.get(cls.__module__), "__file__", None) is None and cls.__module__ != "__main__":
        return  # built in
    for name, value in sorted(vars(cls).items()):
        function = inspect.unwrap(getattr(value, "__func__", None) or getattr(value, "fget", None) or value)
        if isinstance(function, types.FunctionType):
            file = function.__code__.co_filename
            if file != "<string>" and not file.startswith(INSTALLED):  # neither made by dataclasses nor a library's
                yield name
                yield from _spelled(function, seen)
        elif isinstance(value, PLAIN) and not name.startswith("_"):
            yield f"{name}={value!r}"
    for base in cls.__bases__:
        if base.__module__.partition(".")[0] not in ("builtins", "flax", "llm_jax"):
            yield from _of_class(base, seen)


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
