"""The safetensors format: eight bytes for the length of the header, the header in JSON, one tensor behind another.

Read and written a tensor at a time, so that no file is ever in memory whole.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype("float16")}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """Its numbers, mapped from the file. Raises `ValueError` for those that are of none of `DTYPES`."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file} holds {self.dtype} numbers; known: {', '.join(DTYPES)}. Save the model in one of these, "
                "dequantised, and import that"
            )
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.start, self.shape)


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model in `folder`, by name, in one file or in shards.

    Raises `ValueError` where there is no such file, a shard is missing, or one is damaged.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
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
    """Every tensor of one file. Raises `ValueError` where its header can't be read or speaks of more than there is."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < size else b"")
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error}); download it again") from None
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes of {wanted:,}; download it again")
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


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
