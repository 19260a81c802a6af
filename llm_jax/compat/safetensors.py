"""The safetensors format: read by the library of that name, a tensor at a time, and written here, a tensor at a time.

A file is eight bytes for the length of the header, the header in JSON, then one tensor after another. It is never in
memory as a whole.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax.compat.outside import optional, read_model_json
from llm_jax.files import written

DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype("float16")}
BFLOAT16_MOST = 3.38e38  # larger numbers round to infinity
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOAD = "download the model again, all of its .safetensors files"
DEQUANTISE = "save the model dequantised, in bfloat16 or float32 (transformers: model.dequantize(), save_pretrained)"
OTHER = {"BOOL": "true or false", "F64": "float64", "C64": "complex64"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Return its numbers. Raise `ValueError` for a dtype that is not in `DTYPES`."""
        self.check()
        with _opened(self.file) as file:  # opened anew for each: an open mapping keeps all that was ever read
            return file.get_tensor(self.name)

    def check(self) -> None:
        """Raise `ValueError` for a dtype that is not in `DTYPES`, with the way to convert it."""
        if self.dtype in DTYPES:
            return
        kind = OTHER.get(self.dtype, f"{self.dtype}, as of a quantised model")
        way = f"convert it to one of these ({self.name}.float()), and save" if self.dtype in OTHER else DEQUANTISE
        raise ValueError(f"{self.file}: {self.name} is {kind}; known: {', '.join(DTYPES)}. {way}, and import that")


def open_folder(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the model in `folder`, by name, in one file or in shards.

    If both exist, the one file is taken, as in transformers. Raise `ValueError` if there is none, a shard is missing,
    or one is damaged.
    """
    if (folder / WHOLE).is_file():
        return open_file(folder / WHOLE)
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"{folder} has its weights in PyTorch's pickled .bin files only, which may run any code as they are "
                "read; save it as safetensors (transformers: model.save_pretrained), and import that"
            )
        raise ValueError(f"{folder} has no {WHOLE}; {DOWNLOAD}")
    shards = read_model_json(folder / INDEX, {"weight_map": dict})["weight_map"]
    odd = [f"{name}: {file}" for name, file in shards.items() if not isinstance(file, str) or Path(file).name != file]
    if odd:
        raise ValueError(f"{folder / INDEX} has {odd[0]} in its weight_map, which names no file there; {DOWNLOAD}")
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing[:3])}; {DOWNLOAD}")
    return {name: tensor for file in names for name, tensor in open_file(folder / file).items()}


def passed_over(folder: Path) -> str | None:
    """Return a line about what `open_folder` ignores; None if nothing."""
    if (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        return f"{folder} has {WHOLE} and {INDEX}: the first is taken, whole, as transformers does"
    return None


def open_file(path: Path) -> dict[str, Stored]:
    """Return every tensor of one file. Raise `ValueError` if the file does not match its header."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Stored(path, name, x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    library = optional("safetensors")
    try:
        with library.safe_open(path, "np") as file:
            yield file
    except library.SafetensorError as error:
        if dtype := re.search("unknown variant `(.*?)`", str(error)):
            raise ValueError(f"{path} holds {dtype[1]}, which safetensors does not know; {DEQUANTISE}") from None
        raise ValueError(f"{path} is no safetensors file, or damaged ({error}); download it again") from None


# The library's own writer needs every tensor in memory at once.
def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str | Mapping[str, str],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write tensors of these names and shapes, one `read` at a time. `dtype` is of all, or of each by name.

    Raise `ValueError` with the name of a tensor with numbers that are not finite in its dtype, and `OSError`.
    """
    codes = {name: CODES[dtype if isinstance(dtype, str) else dtype[name]] for name in shapes}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + DTYPES[codes[name]].itemsize * math.prod(shape)
        header[name] = {"dtype": codes[name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned to 8 bytes
    with written(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == shape
            file.write(_cast(tensor, codes[name], name).reshape(-1).view(np.uint8).data)


def _cast(tensor: np.ndarray, code: str, name: str) -> np.ndarray:
    """Return `tensor` in the dtype of that code. Raise `ValueError` unless all of its numbers stay finite."""
    with np.errstate(over="ignore"):
        cast = tensor.astype(DTYPES[code])
    if lost := count_not_finite(cast):
        check_finite(tensor, name)
        most = float(np.abs(tensor).max())
        dtype = "bfloat16" if code == "F16" and most < BFLOAT16_MOST else "float32"
        raise ValueError(
            f"{name} has {lost:,} of {tensor.size:,} numbers that {DTYPES[code].name} can't hold (up to {most:.3g}); "
            f"use --dtype {dtype}"
        )
    return cast


def check_finite(x: np.ndarray, name: str) -> None:
    """Raise `ValueError` if `x` contains NaN or infinity."""
    if count := count_not_finite(x):
        raise ValueError(f"{name} has {count:,} of {x.size:,} numbers that are NaN or infinite; use earlier weights")


def count_not_finite(x: np.ndarray, block: int = 1 << 22) -> int:
    """Count the numbers that are NaN or infinite, a block at a time: in no more memory than a block takes."""
    flat = x.reshape(-1)
    return sum(int(np.count_nonzero(~np.isfinite(flat[i : i + block]))) for i in range(0, flat.size, block))
