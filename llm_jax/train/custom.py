"""A caller's own loss or optimizer, in place of the config's, and how a run remembers it.

A config is JSON, and code is not. So a run folder keeps the import path and a hash of each piece of code; whoever
resumes the run has to pass the same code again, which is checked before the first step.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from llm_jax.config import import_object
from llm_jax.data.loader import Batch
from llm_jax.model.config import ModelConfig, is_own, own_mixer
from llm_jax.model.transformer import Transformer
from llm_jax.train.config import RunConfig
from llm_jax.train.step import Metrics

BATCH_FIELDS = ("segments", "positions", "documents")  # what a batch has only on request
Record = dict[str, dict[str, str | None]]


# A caller's own loss: `(model, params, batch, key)` -> sums over the counted targets, of the loss and of each metric.
# They are sums, not means: the step divides them by the number of targets, over all microbatches and devices.
# `params` are float32; `train.step.forward_batch` casts them and runs the model. A function with an attribute `needs`,
# some of `BATCH_FIELDS`, gets batches that have these.
Loss = Callable[[Transformer, PyTree, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]


@dataclasses.dataclass(frozen=True)
class Custom:
    """Code in place of a field of the config; None: as the config says.

    Attributes:
      loss: the loss in place of `config.loss`.
      optimizer: an optax transformation in place of `config.optimizer`, its learning rate and schedule included; what
        it returns is added to the parameters unchanged.
      made_by: the function that made the optimizer, if one did: a run records its code.
    """

    loss: Loss | None = None
    optimizer: optax.GradientTransformation | None = None
    made_by: Callable[[], optax.GradientTransformation] | None = None

    @classmethod
    def of(cls, loss: Any = None, optimizer: Any = None) -> "Custom":
        """Return the code passed to `fit`. An optimizer may be a function without arguments that makes one.

        Raise `ValueError` for what is neither, and for a field that a loss needs and no batch has.
        """
        if loss is not None and not callable(loss):
            raise ValueError(f"loss={loss!r} is no function (model, params, batch, key) -> (sum, metrics)")
        for field in getattr(loss, "needs", ()):
            if field not in BATCH_FIELDS:
                raise ValueError(f"the loss needs {field!r}, and batches can have {', '.join(BATCH_FIELDS)} besides")
        own: Any = loss
        if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
            return cls(own, optimizer)
        made: Any = optimizer() if callable(optimizer) else optimizer
        if not isinstance(made, optax.GradientTransformation):
            raise ValueError(
                f"optimizer={optimizer!r} is no optax transformation, nor a function without arguments that makes one"
            )
        maker: Any = optimizer
        return cls(own, made, maker)

    @property
    def needs(self) -> tuple[str, ...]:
        """The batch fields that the loss asks for."""
        return tuple(getattr(self.loss, "needs", ()))

    def check(self, config: RunConfig, mesh: Mesh) -> None:
        """Raise `ValueError` for a layout in which code that sees the whole model can't run."""
        if self.loss is not None and (stages := mesh.shape["pipeline"]) > 1:
            raise ValueError(
                f"mesh.pipeline={stages} cuts the model into stages, and a loss of your own sees all of it; use "
                "mesh.pipeline=1, and mesh.fsdp in its place"
            )
        if self.optimizer is not None and config.offload != "none":
            raise ValueError(
                f"offload={config.offload} updates a layer at a time, and an optimizer of your own gets all of them; "
                "use offload=none"
            )

    def record(self) -> Record:
        """Return the import path of each piece of code, None where it has none, and the hash of its code."""
        pieces = {"loss": self.loss, "optimizer": self.made_by or self.optimizer}
        return {
            name: {"path": import_path(piece), "sha256": code_hash(piece)}
            for name, piece in pieces.items()
            if piece is not None
        }


def mixers_of(model: ModelConfig) -> Record:
    """Return the record of each mixer of a user's own in the layers of a model, by its path."""
    paths = dict.fromkeys(layer.mixer for layer in model.period if is_own(layer.mixer))
    return {path: {"path": path, "sha256": code_hash(own_mixer(path))} for path in paths}


def check_mixers(model: ModelConfig, record: Mapping[str, Mapping[str, str | None]], run: str) -> None:
    """Raise `ValueError` where a mixer of a run has other code than it was trained with."""
    for path, now in mixers_of(model).items():
        if path in record and record[path]["sha256"] != now["sha256"]:
            raise ValueError(
                f"{path} has other code than {run} was trained with; restore it, or start anew with init_from={run}"
            )


def found_again(record: Mapping[str, Mapping[str, str | None]], given: Custom, run: str) -> Custom:
    """Return the code that the run `run` was trained with: `given`, else imported by the path in `record`.

    Raise `ValueError` where some of it is missing, or has changed.
    """
    there, pieces = given.record(), {"loss": given.loss, "optimizer": given.made_by or given.optimizer}
    record = {name: record[name] for name in pieces if name in record}
    for name, known in record.items():
        if name not in there:
            pieces[name] = _imported(name, known["path"], run)
    now = Custom.of(pieces["loss"], pieces["optimizer"])
    for name, known in now.record().items():
        if name not in record:
            raise ValueError(
                f"{run} was trained without {name}=; leave it out, or start a new run with init_from={run}"
            )
        if known["sha256"] != record[name]["sha256"]:
            raise ValueError(
                f"the {name} of {run}, {record[name]['path'] or 'given as an object'}, has other code than it was "
                f"trained with; restore it, or start anew with init_from={run}"
            )
    return now


def _imported(name: str, path: str | None, run: str) -> Any:
    way = f'resume it from Python: llm_jax.resume("{run}", {name}=...)'
    if path is None or path.startswith("__main__:"):
        where = "a script or notebook" if path else "no module of its own"
        raise ValueError(f"{run} was trained with {name}= from {where}, which can't be found again by itself; {way}")
    try:
        return import_object(path)
    except ValueError as error:
        raise ValueError(f"{run} was trained with {name}={path}: {error}; or {way}") from None


def import_path(piece: Any) -> str | None:
    """Return `package.module:name` of a function or class; None for what no import could bring back."""
    module, name = getattr(piece, "__module__", None), getattr(piece, "__qualname__", None)
    return None if not module or not name or "<" in name else f"{module}:{name}"


def code_hash(piece: Any) -> str:
    """Return the SHA-256 of a function's syntax tree and of the values that it closes over.

    Comments, docstrings and line breaks change nothing. Global functions that it calls are not followed.
    """
    digest = hashlib.sha256()
    for text in _spelled(piece, set()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _spelled(piece: Any, seen: set[int]) -> Iterator[str]:
    """Yield what `piece` consists of as text, in an order that is the same in every process."""
    if id(piece) in seen:
        return
    seen = seen | {id(piece)}
    if isinstance(piece, functools.partial):
        yield from _spelled([piece.func, piece.args, sorted(piece.keywords.items())], seen)
    elif isinstance(piece, type):
        yield _syntax(piece)
    elif isinstance(piece, types.MethodType):
        yield from _spelled([piece.__func__, piece.__self__], seen)
    elif isinstance(piece, types.FunctionType):
        yield _syntax(piece)
        yield from _spelled([piece.__defaults__, piece.__kwdefaults__], seen)
        yield from _spelled([cell.cell_contents for cell in piece.__closure__ or () if _filled(cell)], seen)
    elif isinstance(piece, Mapping):
        yield from _spelled([[str(key), value] for key, value in piece.items()], seen)
    elif isinstance(piece, list | tuple):
        for item in piece:
            yield from _spelled(item, seen)
    elif hasattr(piece, "__array__"):
        array = np.asarray(piece)
        yield f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    else:
        yield re.sub(r" at 0x[0-9a-f]+", "", repr(piece))


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False


def _syntax(piece: types.FunctionType | type) -> str:
    """Return the syntax tree of a function or class without docstrings; its bytecode where it has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(piece)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or a lambda in the middle of a line
        if isinstance(piece, type):
            raise ValueError(f"the source of {piece.__qualname__} can't be read; put it in a file") from None
        code = piece.__code__
        return (
            f"{code.co_code.hex()} {code.co_names} {[c for c in code.co_consts if not isinstance(c, types.CodeType)]}"
        )
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
