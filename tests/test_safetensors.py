"""Files of safetensors are those of the library, read a tensor at a time; a damaged one is named in one line."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from architectures import config_json
from test_huggingface import save_model

from llm_jax.cli.main import main
from llm_jax.compat import safetensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("theirs") / "llama", config_json("llama llama3"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_is_what_the_library_of_the_format_reads_and_writes(dtype: str, tmp_path: Path):
    library = importlib.import_module("safetensors.numpy")
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(())}
    arrays = {name: x.astype(np.dtype(getattr(jnp, dtype))) for name, x in arrays.items()}
    shapes = {name: x.shape for name, x in arrays.items()}
    safetensors.write_file(tmp_path / "ours", shapes, dtype, arrays.__getitem__)
    found = library.load_file(tmp_path / "ours")
    assert found.keys() == arrays.keys()
    assert all((found[name].dtype, found[name].tolist()) == (x.dtype, x.tolist()) for name, x in arrays.items())
    library.save_file(arrays, tmp_path / "theirs")
    for name, tensor in safetensors.open_file(tmp_path / "theirs").items():
        assert (tensor.shape, tensor.read().tobytes()) == (arrays[name].shape, arrays[name].tobytes())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: b"\xff" * 100,
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data.replace(b"[3]", b"[5]"),  # more numbers than lie between its offsets
    ],
)
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path):
    path = tmp_path / "model.safetensors"
    safetensors.write_file(path, {"a": (3,), "b": (4,)}, "float32", lambda name: np.ones(3 if name == "a" else 4))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file, or damaged \(.*download it again"):
        safetensors.open_file(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "has no 'weight_map'"),
        ("{", "is not JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"weight_map": []}', "'weight_map' is a list, expected an object"),
        ('{"weight_map": {"a": 3}}', "has a: 3 in its weight_map, which names no file"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "has a: ../b.safetensors in its weight_map"),
    ],
)
def test_a_damaged_index_is_named(text: str, says: str, tmp_path: Path):
    (tmp_path / safetensors.INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{safetensors.INDEX}:? {says}"):
        safetensors.open_folder(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "size", "says"),
    [
        ("BOOL", 2, r"a is true or false; known: F32, BF16, F16. convert it .*a.float\(\)"),
        ("F64", 16, r"a is float64; known: F32, BF16, F16. convert it .*a.float\(\)"),
        ("I8", 2, "a is I8, as of a quantised model; known: F32, BF16, F16. save the model dequantised"),
        ("F8_E4M3", 2, "a is F8_E4M3, as of a quantised model; .* save the model dequantised"),
        ("F4", 1, "a is F4, as of a quantised model; .* save the model dequantised"),
        ("I4", 1, "holds I4, which safetensors does not know; save the model dequantised"),
    ],
)
def test_numbers_of_another_kind_are_named_with_the_way_out(dtype: str, size: int, says: str, tmp_path: Path):
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * size)
    with pytest.raises(ValueError, match=f"model.safetensors:? {says}"):
        safetensors.open_file(path)["a"].check()


@pytest.mark.parametrize(
    "header",
    [
        *(b"[]", b"3", b"{", b"\xff", b'{"a": 3}', b'{"a": []}', b'{"a": {"dtype": "F32"}}', b"[" * 5000),
        b'{"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
    ],
)
def test_a_header_of_another_shape_is_named_in_one_line(header: bytes, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file, or damaged"):
        safetensors.open_file(path)


def test_one_file_is_taken_whole_whatever_an_index_beside_it_says(llama: Path, tmp_path: Path, capsys: Any):
    there = tmp_path / "theirs"
    shutil.copytree(llama, there)
    for index in ({"weight_map": {"old.weight": "model-00001-of-00002.safetensors"}}, []):
        (there / safetensors.INDEX).write_text(json.dumps(index))
        assert safetensors.open_folder(there).keys() == safetensors.open_folder(llama).keys()
    assert main(["import", str(there), "--run", str(tmp_path / "run"), "--tokenizer", "byte"]) == 0
    assert (
        "has model.safetensors and model.safetensors.index.json: the first is taken, whole" in capsys.readouterr().err
    )


def test_a_model_in_shards_is_the_model_in_one_file(llama: Path, tmp_path: Path):
    whole = {name: tensor.read() for name, tensor in safetensors.open_folder(llama).items()}
    shards = {name: [n for i, n in enumerate(whole) if i % 3 == k] for k, name in enumerate("abc")}
    for name, part in shards.items():
        file = tmp_path / f"{name}.safetensors"
        safetensors.write_file(file, {n: whole[n].shape for n in part}, "float32", whole.__getitem__)
    index = {n: f"{name}.safetensors" for name, part in shards.items() for n in part}
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": index}))
    found = {name: tensor.read() for name, tensor in safetensors.open_folder(tmp_path).items()}
    assert found.keys() == whole.keys()
    assert all((found[name] == whole[name]).all() for name in whole)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no b.safetensors; download the model again"):
        safetensors.open_folder(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pickled .bin files only, .* save it as safetensors"):
        safetensors.open_folder(tmp_path)
