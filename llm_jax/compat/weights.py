"""Read parameters from the tensors of a family, and write them.

They are read leaf by leaf and written tensor by tensor: neither takes much more memory than the parameters themselves.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from llm_jax import tree as trees
from llm_jax.compat import safetensors
from llm_jax.compat.family import Family, Shapes, Tensor
from llm_jax.compat.safetensors import Stored
from llm_jax.model.config import ModelConfig
from llm_jax.model.shapes import shapes

# Old files contain buffers, which follow from the config.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(masked_)?bias$")


def read_parameters(folder: Path, family: Family, config: ModelConfig) -> PyTree:
    """Return the parameters of the model in `folder`, float32, in host memory: no accelerator needs to hold them.

    Raise `ValueError` with the names of tensors that are missing, unknown, of another shape, or not floating-point
    numbers, before it reads any; and for NaN or infinity in one.
    """
    abstract, cpu = shapes(config), jax.local_devices(backend="cpu")[0]
    tensors = list(family.tensors_of(config, shapes_of(abstract)))
    stored = matched(family, config, tensors, safetensors.open_folder(folder))
    holders: dict[str, list[tuple[Tensor, int, tuple[int, ...]]]] = {}
    for tensor in tensors:
        for number, (path, index) in enumerate(tensor.homes):
            holders.setdefault(path, []).append((tensor, number, index))

    def leaf(path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        x = _empty(shape.shape)
        for tensor, number, index in holders[path]:
            x[index] = tensor.format.split(stored[tensor.name].read())[number]
            safetensors.check_finite(x[index], f"{stored[tensor.name].file}: {tensor.name}")
        return jax.device_put(x, cpu)

    return trees.map_with_path(leaf, abstract)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised float32 array aligned to 64 bytes, which JAX takes over on CPU without a copy."""
    room = np.empty(4 * math.prod(shape) + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + 4 * math.prod(shape)].view(np.float32).reshape(shape)


def write_parameters(
    path: Path, family: Family, config: ModelConfig, params: PyTree, dtype: str, kept: Mapping[str, str] | None = None
) -> None:
    """Write the parameters as the tensors of the family; `kept` names those of another dtype.

    Raise `ValueError` with the name of a tensor whose numbers are not finite, or don't fit the dtype.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in trees.leaves(params).items()}
    tensors = {tensor.name: tensor for tensor in family.tensors_of(config, shapes_of(params))}

    def read(name: str) -> np.ndarray:
        return tensors[name].format.join([leaves[path][index] for path, index in tensors[name].homes])

    dtypes = dict.fromkeys(tensors, dtype) | {name: kind for name, kind in (kept or {}).items() if name in tensors}
    safetensors.write_file(path, {name: tensor.format.shape for name, tensor in tensors.items()}, dtypes, read)


def wider(stored: Mapping[str, Stored]) -> dict[str, str]:
    """Return the float32 tensors, by name, of a model that mostly has fewer bits: its norms, for example."""
    dtypes = [tensor.dtype for tensor in stored.values()]
    if max(dtypes, key=dtypes.count) == "F32":
        return {}
    return {name: "float32" for name, tensor in stored.items() if tensor.dtype == "F32"}


def check_layers(config: ModelConfig, stored: Mapping[str, Stored]) -> None:
    """Raise `ValueError` for a model with more layers than tensors, before anything of that size is allocated."""
    if config.n_layers > len(stored):
        raise ValueError(
            f"config.json has {config.n_layers:,} layers, but there are {len(stored):,} tensors; are both of one model?"
        )


def shapes_of(params: PyTree) -> Shapes:
    """Return the shape of every leaf, by path."""
    return {path: leaf.shape for path, leaf in trees.leaves(params).items()}


def matched(
    family: Family, config: ModelConfig, tensors: Sequence[Tensor], stored: Mapping[str, Stored]
) -> dict[str, Stored]:
    """Return what is stored, by the names of `tensors`. Raise `ValueError` unless names and shapes agree."""
    embedding = tensors[0].name
    prefix = embedding.partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in stored):  # saved without its head, as GPT-2 was
        stored = {prefix + name: tensor for name, tensor in stored.items()}
    found = {name: tensor for name, tensor in stored.items() if not BUFFERS.search(name)}
    head = next(name for name, _, leaves in family.tensors if leaves == ("unembedding/table",))
    copy = found.pop(head, None) if config.tied else None
    if copy is not None and embedding in found and not np.array_equal(copy.read(), found[embedding].read()):
        raise ValueError(
            f"config.json ties {head} to {embedding}, but they differ; set tie_word_embeddings to false there"
        )
    wanted = {tensor.name: tensor.format.shape for tensor in tensors}
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name].shape != shape
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{what}: {_first(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"the tensors are not those of the {family.name} in config.json; {said}. Are both of one model?"
        )
    for name in wanted:
        found[name].check()
    return found


def _first(names: Sequence[str], most: int = 6) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
