"""The safetensors format: read by the library of that name, a tensor at a time, and written likewise.

A file is eight bytes for the length of the header, the header in JSON, one tensor behind another. No file is ever in
memory whole.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax.compat.outside import optional, read_json

DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype("float16")}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its numbers. Raises `ValueError` for those that are of none of `DTYPES`."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file} holds {self.dtype} numbers; known: {', '.join(DTYPES)}. Save the model in one of these, "
                "dequantised, and import that"
            )
        with _opened(self.file) as file:  # anew for each: a mapping that stays holds all that was ever read
            return file.get_tensor(self.name)


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model in `folder`, by name, in one file or in shards.

    Raises `ValueError` where there is no such file, a shard is missing, or one is damaged.
    """
    names = ["model.safetensors"]
    if (folder / INDEX).is_file():
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{folder / INDEX} lacks weight_map, the file of each tensor; download it again")
        names = sorted(set(map(str, files.values())))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has its weights in PyTorch's pickled .bin files only, which may run any code as they are read; "
            "save it as safetensors (transformers: model.save_pretrained), and import that"
        )
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}; download the model again, all of its files")
    return {name: tensor for file in names for name, tensor in open_file(folder / file).items()}


def open_file(path: Path) -> dict[str, Stored]:
    """Every tensor of one file. Raises `ValueError` where its header does not fit what is there."""
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Stored(path, name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    library = optional("safetensors")
    try:
        with library.safe_open(path, "np") as file:
            yield file
    except library.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error}); download it again") from None


# The library's own writer wants every tensor in memory at once.
def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, read: Callable[[str], np.ndarray]
) -> None:
    """Writes tensors of these names and shapes; `read` gives each as its turn comes."""
    kind, header, end = DTYPES[CODES[dtype]], {}, 0
    for name, shape in shapes.items():
        start, end = end, end + kind.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor begins at a whole word
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == shape
            tensor.astype(kind).tofile(file)
