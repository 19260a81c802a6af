"""What a family of models is: a table of its tensors and a list of lenses for its config, both read and written."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.compat.config_json import HUGE, check_field, check_known, check_values, short
from llm_jax.compat.lenses import Lens, Theirs, canonical
from llm_jax.compat.tensor_format import TensorFormat
from llm_jax.config import from_dict, to_dict
from llm_jax.model.config import ModelConfig
from llm_jax.model.pattern import locate
from llm_jax.paths import first_match
from llm_jax.sharding import LETTERS

Shapes = Mapping[str, tuple[int, ...]]  # of our parameters, by path
Row = tuple[str, str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of their tensors; `homes` are the paths of our leaves in it, each with an index of its first axes."""

    name: str
    format: TensorFormat
    homes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      name: what they call it, `model_type`.
      architecture: the class of transformers that loads it.
      models: its best known models.
      tensors: rows of name, format (`tensor_format.py`) and leaves.
      lenses: how keys of their config and fields of ours correspond.
      fixed: fields of `ModelConfig` that are the same in all its models.
    """

    name: str
    architecture: str
    models: str
    tensors: tuple[Row, ...]
    lenses: tuple[Lens, ...]
    fixed: Mapping[str, Any]

    @property
    def keys(self) -> set[str]:
        """The keys of a config.json that say what the model is."""
        return {name for lens in self.lenses for name in lens.keys}

    def read(self, theirs: Theirs, where: str = "config.json") -> ModelConfig:
        """Return the model of a config.json; errors name it `where`.

        Raise `ValueError`, and nothing else whatever the file holds, for what is unknown, unsupported or impossible.
        """
        try:
            check_known(theirs, self.keys, self.name)
            check_values(theirs, self.keys)
            fields, origins = self._fields(theirs)
            config = _config(fields, origins, theirs)
            _check_positions(config)
            if (kinds := theirs.get("layer_types")) is not None and len(kinds) != (n := config.n_layers):  # read or not
                raise ValueError(f"config.json has {len(kinds)} layer_types for {n} layers; give one for each")
            return config
        except ValueError as error:
            said = " ".join(str(error).split())[:1000]  # a key may contain anything, such as line breaks
            said = said.removeprefix("config.json") if said.startswith("config.json ") else f": {said}"
            raise ValueError(where + said) from None

    def _fields(self, theirs: Theirs) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
        """Return what the lenses read: fields of `ModelConfig` by path, and the keys that each comes from."""
        fields, origins = dict(self.fixed), {}
        for lens in self.lenses:
            try:
                read = lens.ours(theirs)
            except KeyError as error:
                raise ValueError(f"config.json of a {self.name} lacks {error}; download it again") from None
            except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
                said = ", ".join(f"{name}={short(theirs[name])}" for name in lens.keys if name in theirs)
                raise ValueError(
                    f"config.json of a {self.name} has {said}, which is not a valid value ({error}); download it again"
                ) from None
            for name, value in read.items():
                check_field(name, value, [key for key in lens.keys if key in theirs])
            fields |= read
            origins |= dict.fromkeys(read, lens.keys)
        return fields, origins

    def write(self, c: ModelConfig) -> dict[str, Any]:
        """Return the config.json of a model. `misfits` says what it can't express."""
        c = canonical(c)
        return {name: value for lens in self.lenses for name, value in lens.theirs(c).items()}

    def misfits(self, c: ModelConfig, shapes: Shapes) -> list[str]:
        """Return what keeps a model out of the family: fields that differ after its config is written and read again,
        and parameters that no tensor holds.
        """
        try:
            theirs = _flat(to_dict(canonical(self.read(self.write(c)))))
        except ValueError as error:
            return [str(error)]
        ours = _flat(to_dict(canonical(c)))
        fields = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        held = {path for tensor in self.tensors_of(c, shapes) for path, _ in tensor.homes}
        return [
            *(f"model.{name}={ours.get(name)} (there: {theirs.get(name)})" for name in fields),
            *(f"the parameter {path}" for path in shapes if path not in held),
        ]

    def tensors_of(self, c: ModelConfig, shapes: Shapes) -> Iterator[Tensor]:
        """Yield every tensor of a model whose parameters have these shapes."""
        for row in self.tensors:
            for i in range(c.n_layers) if "{i}" in row[0] else [None]:
                yield from _tensors(row, c, i, shapes)


def _tensors(row: Row, c: ModelConfig, i: int | None, shapes: Shapes) -> Iterator[Tensor]:
    """Yield the tensors of a row in layer i, or outside of layers: one, one for each expert, or none."""
    name, text, leaves = row
    where = None if i is None else locate(c, i)
    stacked = None if where is None else where.row
    paths = [leaf if where is None else f"{where.path}/{leaf}" for leaf in leaves]
    if not all(path in shapes for path in paths):
        return
    letters = [first_match(LETTERS, path).removeprefix("N" if stacked is None else "") for path in paths]
    sizes = {
        letter: size
        for path, axes in zip(paths, letters, strict=True)
        for letter, size in zip(axes, shapes[path], strict=True)
    }
    for e in range(sizes["E"]) if "{e}" in name else [None]:
        index = tuple(each for each in (stacked, e) if each is not None)
        ours = tuple(axes[len(index) :] for axes in letters)
        yield Tensor(name.format(i=i, e=e), TensorFormat(text, ours, sizes), tuple((path, index) for path in paths))


def table(text: str) -> tuple[Row, ...]:
    """Return rows of name, format and leaves, from the text of `tensors.py`."""
    words = (line.split() for line in text.strip().splitlines())
    return tuple((name, letters, tuple(leaves)) for name, letters, *leaves in words)


def _config(fields: Mapping[str, Any], origins: Mapping[str, tuple[str, ...]], theirs: Theirs) -> ModelConfig:
    """Return the model of these fields. Raise `ValueError` with the keys that a bad field comes from."""
    try:
        return from_dict(ModelConfig, _grouped(fields), "model.")
    except ValueError as error:
        named = [path for path in origins if re.search(rf"\b{re.escape(path)}\b", str(error))]
        keys = dict.fromkeys(key for path in named for key in origins[path] if key in theirs)
        said = ", ".join(f"{key}={short(theirs[key])}" for key in keys)
        raise ValueError(f"config.json has {said}: {error}" if said else str(error)) from None


def _check_positions(config: ModelConfig) -> None:
    """Raise `ValueError` if the rotary embedding rotates by angles that are not finite."""
    if config.positions != "rotary":
        return
    for rotary in (config.rotary, config.rotary.local):
        try:
            with np.errstate(all="ignore"):
                numbers = np.append(np.ravel(rotary.frequencies(config.H)), rotary.scale)
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"config.json has positions that can't be computed: {rotary} ({error})") from None
        if not ((numbers > 0) & (numbers < HUGE)).all():
            raise ValueError(f"config.json has positions that are not finite: {rotary}")


def _grouped(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Nest fields by path: `{"attention.window": 8}` becomes `{"attention": {"window": 8}}`."""
    groups: dict[str, Any] = {}
    for path, value in fields.items():
        group, dot, name = path.partition(".")
        if dot:
            groups.setdefault(group, {})[name] = value
        else:
            groups[path] = value
    return groups


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested fields: the inverse of `_grouped`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat
