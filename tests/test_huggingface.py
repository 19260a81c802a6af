"""Models of Hugging Face become runs, and runs become such models: files, tokenizers, verbs, and what can go wrong.

What is particular to a family stands in `test_families.py`.
"""

import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import config_json
from arrays import quiet
from tiny_run import console, write_corpus

from llm_jax.cli.main import main
from llm_jax.compat import huggingface, safetensors, weights
from llm_jax.compat.huggingface import choose_tokenizer, export_run, fetch, import_run
from llm_jax.compat.tokenizers import ends_of, files_of
from llm_jax.config import override
from llm_jax.data import tokenizer
from llm_jax.data.config import DataConfig
from llm_jax.data.imported_tokenizer import ImportedTokenizer
from llm_jax.data.loader import heldout_rows
from llm_jax.data.prepare import prepare
from llm_jax.data.shards import open_shards
from llm_jax.data.task import TaskConfig
from llm_jax.data.tokenizer import END_OF_TEXT, Tokenizer
from llm_jax.infer.generate import prompt_ids
from llm_jax.model import count
from llm_jax.model.transformer import Transformer, forward
from llm_jax.runs import folder as run_folder
from llm_jax.runs import restore
from llm_jax.runs.fit import fit
from llm_jax.runs.start import load_recipe
from llm_jax.tree import fingerprint

TEXT = "The cat's mat: 12345 mats, naïve 🐈\n\n    def sit(mat):\n\treturn  mat  # <|endoftext|> </s>\r\n ß"


def save_model(folder: Path, theirs: Mapping[str, Any], dtype: str = "float32", shards: int = 1) -> Path:
    """A folder as Hugging Face has it, with random weights, but without a tokenizer."""
    from llm_jax.compat.huggingface import family_of

    family = family_of(theirs)
    config = family.read(theirs)
    shapes = count.parameter_shapes(config)
    tensors = {tensor.name: tensor.format.shape for tensor in family.tensors_of(config, shapes)}
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**theirs, "dtype": dtype}))
    files = {}
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard}.safetensors"
        part = {tensor: shape for i, (tensor, shape) in enumerate(tensors.items()) if i % shards == shard}
        safetensors.write_file(folder / name, part, dtype, lambda tensor: 0.1 * rng.normal(size=tensors[tensor]))
        files |= dict.fromkeys(part, name)
    if shards > 1:
        (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("theirs") / "llama", config_json("llama llama3"))


@pytest.fixture(scope="module")
def imported(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_run(str(llama), folder, tokenizer="byte", command="llm-jax import", report=quiet)
    return folder


# ---- the format


def test_weights_pass_through_the_memory_of_the_host(llama: Path, imported: Path, monkeypatch: pytest.MonkeyPatch):
    host, other = jax.local_devices(backend="cpu")[0], jax.devices()[-1]
    theirs = json.loads((llama / "config.json").read_text())
    family = huggingface.family_of(theirs)
    with jax.default_device(other):
        params = weights.read_parameters(llama, family, family.read(theirs))
    assert {device for leaf in jax.tree.leaves(params) for device in leaf.devices()} == {host}
    monkeypatch.setattr(jax, "devices", lambda *_: [other])
    assert restore.on_the_host(run_folder.load_config(imported)).mesh.devices.ravel().tolist() == [host]


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path):
    """200 MB of them, in a process of its own. Seen: 1.03 times."""
    sizes = {"vocab_size": 8000, "n_embd": 768, "n_layer": 6, "n_head": 12, "n_positions": 1024}
    folder = save_model(tmp_path / "big", {"model_type": "gpt2", "eos_token_id": 0, **sizes})
    program = """
import sys; from pathlib import Path
from llm_jax.compat import weights
from llm_jax.compat.huggingface import family_of, read_model_json
from llm_jax.model.shapes import shapes

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
family = family_of(read_model_json(folder / "config.json"))
config = family.read(read_model_json(folder / "config.json"))
shapes(config)
before = peak()
params = weights.read_parameters(folder, family, config)
print((peak() - before) * 1024 / (folder / "model.safetensors").stat().st_size)
"""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    out = subprocess.run(
        [sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < 1.25


# ---- runs


def test_an_imported_run_is_of_the_weights_in_the_files(llama: Path, imported: Path):
    config = run_folder.load_config(imported)
    params, step = restore.weights(imported, restore.on_one_device(config), report=quiet)
    file = safetensors.open_folder(llama)
    q = file["model.layers.1.self_attn.q_proj.weight"].read()  # [KGH D]
    assert step == 0
    np.testing.assert_array_equal(params["layers"]["attention"]["w_q"][1], q.T.reshape(24, 3, 2, 8))
    assert (config.data.seq_len, config.model.dtype) == (64, "float32")
    assert json.loads((imported / "environment.json").read_text())["command"] == "llm-jax import"


def test_bfloat16_weights_are_computed_with_and_given_back_as_they_were(tmp_path: Path):
    there = save_model(tmp_path / "theirs", config_json("gemma2"), "bfloat16", shards=2)
    config = import_run(str(there), tmp_path / "run", tokenizer="byte", report=quiet)
    assert config.model.dtype == "bfloat16"
    params, _ = restore.weights(tmp_path / "run", restore.on_one_device(config), report=quiet)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    export_run(tmp_path / "run", params, tmp_path / "out")
    before, after = safetensors.open_folder(there), safetensors.open_folder(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].read().tobytes() == after[name].read().tobytes() for name in before)


def test_an_exported_run_imports_as_the_same_run(imported: Path, tmp_path: Path):
    config = run_folder.load_config(imported)
    params, _ = restore.weights(imported, restore.on_one_device(config), report=quiet)
    assert export_run(imported, params, tmp_path / "out").name == "llama"
    again = import_run(str(tmp_path / "out"), tmp_path / "again", tokenizer="byte", report=quiet)
    there, _ = restore.weights(tmp_path / "again", restore.on_one_device(again), report=quiet)
    assert again.model == config.model
    assert fingerprint(there) == fingerprint(params)


def test_an_imported_run_writes_is_measured_and_shown(imported: Path, tmp_path: Path, capsys: Any):
    assert main(["generate", str(imported), "--prompt", "ab", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 0
    corpus = write_corpus(tmp_path / "corpus", documents=3)
    assert main(["evaluate", str(imported), "--data", str(corpus), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 3
    assert main(["show", str(imported), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sizes"]["D"] == 24


@pytest.mark.slow
def test_training_continues_from_an_imported_run(imported: Path, tmp_path: Path):
    corpus = write_corpus(tmp_path / "corpus")
    config = override(
        run_folder.load_config(imported), [f"data.uri={corpus}", f"init_from={imported}", "steps=2", "prompts="]
    )
    config = override(config, ["data.seq_len=32", "data.batch_size=8", "data.heldout=0.2", "optimizer.warmup_steps=1"])
    by = console()
    fit(config, tmp_path / "run", console=by)
    assert f"restored from {imported} at step 0: weights, nothing else" in by.file.getvalue()


@pytest.mark.parametrize("words", [["resume"], ["evaluate"]])
def test_what_an_imported_run_does_not_have_is_said(words: list[str], imported: Path, capsys: Any):
    assert main([*words, str(imported)]) == 2
    says = rf"was imported: .* llm-jax train CONFIG --from {imported}, .* llm-jax evaluate {imported} --data URI"
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda there: (there / "config.json").unlink(), "config.json is missing; name the folder of a model"),
        (lambda there: (there / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda there: (there / "config.json").write_text("[]"), "config.json holds a list, expected an object"),
        (lambda there: (there / "config.json").write_text('{"model_type": "bert"}'), "an unknown family"),
        (lambda there: (there / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda there: None, "has no tokenizer.json. .*--tokenizer gpt2"),
    ],
)
def test_an_import_that_fails_leaves_no_files(damage: Any, says: str, llama: Path, tmp_path: Path, capsys: Any):
    there = tmp_path / "theirs"
    there.mkdir()
    for path in llama.iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    damage(there)
    words = [] if "tokenizer" in says else ["--tokenizer", "byte"]
    (tmp_path / "runs").mkdir()
    assert main(["import", str(there), "--run", str(tmp_path / "runs" / "new"), *words]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_could_not_be_filled_is_gone(
    llama: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space", "disk")

    monkeypatch.setattr(run_folder, "save_config", fail)  # the last that is written, each time
    monkeypatch.setattr(weights, "write_parameters", fail)
    assert main(["import", str(llama), "--run", str(tmp_path / "run"), "--tokenizer", "byte"]) == 2
    assert main(["export", str(imported), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("no space left on the disk") == 2
    assert list(tmp_path.iterdir()) == []


def test_an_import_into_an_existing_folder_is_refused_before_any_reading(tmp_path: Path, capsys: Any):
    """The model may be a download of hours."""
    for name, holds in (("empty", "exists"), ("notes.txt", "exists"), ("config.json", "already holds a run")):
        (folder := tmp_path / f"for {name}").mkdir()
        if name != "empty":
            (folder / name).write_text("{}")
        assert main(["import", str(tmp_path / "nowhere"), "--run", str(folder)]) == 2
        assert f"{folder} {holds}, and an import makes a folder of its own" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_written_to(llama: Path, imported: Path, capsys: Any):
    assert main(["import", str(llama), "--run", str(imported), "--tokenizer", "byte"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["export", str(imported), "--out", str(imported)]) == 2
    assert "an export makes a folder of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--family", "lama"], "--family lama: an unknown family; did you mean 'llama'"),
        (["--family", "gpt_oss"], "--family gpt_oss: an unknown family; it needs learned sinks"),
        (["--family", "qwen3"], "closest, qwen3, lacks model.attention.qk_norm=none"),
        (["--checkpoint", "7"], "no checkpoint of step 7"),
    ],
)
def test_an_export_that_fails_leaves_no_files(words: list[str], says: str, imported: Path, tmp_path: Path, capsys: Any):
    assert main(["export", str(imported), "--out", str(tmp_path / "out"), *words]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_a_prefix_is_not_exported_as_a_causal_one(imported: Path, tmp_path: Path):
    config = run_folder.load_config(imported)
    task = TaskConfig("translate")
    translator = dataclasses.replace(config, data=dataclasses.replace(config.data, task=task, packing="documents"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer").symlink_to(imported / "tokenizer")
    run_folder.save_config(tmp_path / "run", translator)
    params, _ = restore.weights(imported, restore.on_one_device(config), report=quiet)
    with pytest.raises(ValueError, match=r"sees the whole question at once .* every family .* is causal"):
        export_run(tmp_path / "run", params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the hub


def hub(snapshot_download: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the library that downloads."""
    module = ModuleType("huggingface_hub")
    monkeypatch.setattr(module, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_name_is_downloaded_from_the_hub(llama: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(llama)

    hub(snapshot_download, monkeypatch)
    assert fetch("someone/llama") == llama
    [(name, options)] = asked
    assert name == "someone/llama"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("bin" in pattern for pattern in options["allow_patterns"])
    files = ["config.json", "a.safetensors", "additional_chat_templates/tools.jinja"]
    other = ["original/a.safetensors", "onnx/config.json", "consolidated.00.safetensors", "pytorch_model.bin"]
    wanted = lambda name: any(map(functools.partial(fnmatch, name), options["allow_patterns"]))  # noqa: E731
    left = lambda name: any(map(functools.partial(fnmatch, name), options["ignore_patterns"]))  # noqa: E731
    assert [name for name in files + other if wanted(name) and not left(name)] == files


def test_a_hub_that_does_not_answer_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(name: str, **options: Any) -> str:
        raise ConnectionError("no route\nto host")

    hub(snapshot_download, monkeypatch)
    with pytest.raises(ValueError, match=r"and the hub does not provide it \(no route to host\); .* folder"):
        fetch("someone/llama")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"this needs huggingface_hub; install it: pip install 'llm-jax\[hf\]'"):
        fetch("someone/llama")


def test_what_is_neither_a_folder_nor_a_name_is_not_looked_for(tmp_path: Path):
    (tmp_path / "file").touch()
    for source in ("/no/such/folder", "./a/b/c", str(tmp_path / "file"), ""):
        with pytest.raises(ValueError, match="is no folder, nor a name on the Hugging Face hub"):
            fetch(source)


# ---- tokenizers


@functools.cache
def byte_level() -> str:
    """A tokenizer.json as GPT-2 and Llama 3 have it, trained by the library."""
    library = pytest.importorskip("tokenizers")
    coder = library.Tokenizer(library.models.BPE())
    coder.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    coder.train_from_iterator([TEXT] * 3, trainer)
    coder.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    coder.enable_truncation(4)
    return coder.to_str()


@functools.cache
def with_byte_fallback() -> str:
    """A tokenizer.json as Llama 2 and Gemma have it: blanks as U+2581, unknown characters as bytes."""
    library = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {entry: 259 + i for i, entry in enumerate(["▁", "T", "h", "e", "Th", "The", "▁The"])}
    merges = [("T", "h"), ("Th", "e"), ("▁", "The")]
    coder = library.Tokenizer(library.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    coder.add_special_tokens(["<unk>", "<s>", "</s>"])
    coder.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    decoders = library.decoders
    coder.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return coder.to_str()


def folder_of(text: str, folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 5], "bos_token_id": 0, **more}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize("make", [byte_level, with_byte_fallback])
def test_an_imported_tokenizer_gives_the_ids_of_the_library(make: Callable[[], str], tmp_path: Path):
    library = pytest.importorskip("tokenizers")
    coder = opened(folder_of(make(), tmp_path / "theirs"))
    theirs = library.Tokenizer.from_str(make())
    theirs.no_truncation()
    for text in (TEXT.replace("</s>", ""), "The The", "", "🐈" * 50):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert coder.encode(text).tolist() == ids
        assert coder.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        assert coder.decode_bytes(ids).decode().removeprefix(" ") == text.removeprefix(" ")
    assert (coder.begins, coder.begin_of_text) == ((True, 0) if make is byte_level else (False, 1))
    assert (coder.end_of_text, coder.end_ids) == (1, (1, 5))
    assert coder.encode("</s>").tolist() != [theirs.token_to_id("</s>")]
    assert theirs.token_to_id("</s>") in coder.encode("a</s>", special=True).tolist()


def test_an_imported_tokenizer_is_kept_as_it_is(tmp_path: Path):
    there = folder_of(byte_level(), tmp_path / "theirs")
    coder = opened(there)
    coder.save(tmp_path / "kept")
    again = tokenizer.load_tokenizer(tmp_path / "kept")
    assert (again.fingerprint, again.name, again.begin_of_text) == (coder.fingerprint, "someone/theirs", 0)
    assert (again.begins, again.end_ids, again.special_tokens) == (True, (1, 5), {"<s>": 0, "</s>": 1})
    assert (again.encode(TEXT) == coder.encode(TEXT)).all()
    for name, content in files_of(again, 10, begins=True).items():
        assert content == (there / name).read_bytes()
    (tmp_path / "kept" / "tokenizer.json").write_text(with_byte_fallback(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is damaged: its tokenizer.json has changed; import the model again"):
        tokenizer.load_tokenizer(tmp_path / "kept")


def test_a_text_begins_with_the_token_that_the_model_knows_for_it(tmp_path: Path):
    coder = opened(folder_of(byte_level(), tmp_path / "theirs"))
    [ids] = prompt_ids(shapes_vocab(400), coder, [""], begin=True)
    assert ids.tolist() == [0]
    [ids] = prompt_ids(shapes_vocab(400), tokenizer.ByteTokenizer(), [""], begin=True)
    assert ids.tolist() == [256]


def test_documents_begin_in_training_as_prompts_do_in_writing(tmp_path: Path):
    coder = opened(folder_of(byte_level(), tmp_path / "theirs"))
    coder.save(tmp_path / "tokenizer")
    corpus = write_corpus(tmp_path / "corpus", documents=5)
    prepare(str(corpus), tmp_path / "data", tokenizer=str(tmp_path / "tokenizer"), heldout=0.0)
    store = open_shards(tmp_path / "data").split("train")
    texts = [coder.decode(store.read(start, stop - 1)) for start, stop in itertools.pairwise(store.offsets.tolist())]
    ids = [row.tolist() for row in prompt_ids(shapes_vocab(400, max_seq_len=64), coder, texts, begin=True)]
    for packing in ("documents", "windows"):
        config = DataConfig(packing=packing, seq_len=64, batch_size=2)
        for batch in heldout_rows(store, config):
            for number, expected in enumerate(ids):
                found = batch.tokens[batch.documents == number].tolist()
                if len(found) == len(expected):  # a window may have cut it
                    assert found == expected
                    ids[number] = []
        assert packing == "windows" or not any(ids)


def test_added_tokens_that_the_model_has_no_room_for_are_left_out(tmp_path: Path):
    """As of Gemma 3 1B, whose tokenizer knows one of images, beyond the embedding."""
    description = json.loads(byte_level())
    image = description["added_tokens"][0] | {"id": 300, "content": "<image>"}
    description["added_tokens"].append(image)
    there = folder_of(json.dumps(description), tmp_path / "theirs")
    assert opened(there, 301).encode("<image>", special=True).tolist() == [300]
    coder = opened(there, 300)
    assert (coder.vocab_size, coder.encode("<image>", special=True).max() < 300) == (300, True)
    coder.save(tmp_path / "kept")
    again = tokenizer.load_tokenizer(tmp_path / "kept")
    assert (again.fingerprint, again.vocab_size) == (coder.fingerprint, 300)


def opened(there: Path, vocab_size: int = 400) -> Tokenizer:
    return choose_tokenizer("someone/theirs", there, None, shapes_vocab(vocab_size))


def shapes_vocab(size: int, **changes: Any) -> Any:
    from grid import tiny

    return tiny(vocab_size=size, **changes)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": 8}}, (7, 8)),
        ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": [8, 9]}}, (8, 9)),
        ({"config.json": {"eos_token_id": [9, 8]}, "generation_config.json": {"eos_token_id": [8, 9, 4]}}, (9, 8, 4)),
        ({"config.json": {}, "tokenizer_config.json": {"eos_token": "<end>"}}, (3,)),
        ({"config.json": {}, "tokenizer_config.json": {"eos_token": {"content": "<end>"}}}, (3,)),
        ({"config.json": {}, "special_tokens_map.json": {"eos_token": "a"}}, (0,)),
        ({"config.json": {}}, ()),
        ({"config.json": {}, "tokenizer_config.json": {"eos_token": "<none>"}}, ()),
    ],
)
def test_every_end_of_a_text_is_looked_for_where_it_may_stand(
    files: dict[str, Any], ends: tuple[int, ...], tmp_path: Path
):
    described = {"added_tokens": [{"content": "<end>", "id": 3}], "model": {"type": "BPE", "vocab": {"a": 0}}}
    for name, values in ({"tokenizer.json": described} | files).items():
        (tmp_path / name).write_text(json.dumps(values))
    assert ends_of(tmp_path) == ends


@pytest.mark.parametrize("end", [-1, True, "</s>", 1.0, [1, None], 10**30])
def test_an_end_that_is_no_id_is_refused_at_the_import(end: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=r"eos_token_id"):
        opened(folder_of(byte_level(), tmp_path / "theirs", eos_token_id=end))


@pytest.mark.parametrize(
    ("more", "vocab_size", "says"),
    [
        ({"eos_token_id": None}, 400, "does not say what ends a text; set eos_token_id"),
        (
            {"eos_token_id": 999},
            400,
            "token 999 is to end a text, but the tokenizer someone/theirs has the ids 0 to 299",
        ),
        ({}, 20, "the tokenizer someone/theirs has 300 ids, but the model has 20; name another: --tokenizer"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(more: dict[str, Any], vocab_size: int, says: str, tmp_path: Path):
    with pytest.raises(ValueError, match=says):
        opened(folder_of(byte_level(), tmp_path / "theirs", **more), vocab_size)


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("config.json", {"eos_token_id": "2"}, "config.json has eos_token_id=2; expected an id, or a list of ids"),
        ("config.json", {"eos_token_id": []}, r"config.json has eos_token_id=\[\]; expected"),
        ("config.json", {"eos_token_id": [2, None]}, r"config.json has eos_token_id=\[2, null\]; expected"),
        ("config.json", {"eos_token_id": True}, "config.json has eos_token_id=true; expected"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, "generation_config.json has eos_token_id=.*; expected"),
        ("generation_config.json", [], "generation_config.json holds a list, expected an object"),
        (
            "tokenizer_config.json",
            {"eos_token": 3},
            "the tokenizer_config.json of .* has eos_token=3, expected a string",
        ),
        ("tokenizer_config.json", {"eos_token": {"content": [3]}}, "has eos_token={'content'.*}, expected a string"),
        ("tokenizer_config.json", "text", "the tokenizer_config.json of .* holds a string, expected an object"),
        ("tokenizer.json", {"added_tokens": {}}, "the tokenizer.json of .*: 'added_tokens' is no list"),
        ("tokenizer.json", {"added_tokens": [3]}, "a token of added_tokens holds an integer, expected an object"),
        ("tokenizer.json", {"added_tokens": [{"content": "a", "id": "3"}]}, "added_tokens: 'id' is a string, expected"),
    ],
)
def test_a_file_that_says_odd_things_of_tokens_is_named(file: str, values: Any, says: str, tmp_path: Path):
    described = {"model": {"type": "BPE", "vocab": {"a": 0}}}
    for name, content in {"config.json": {}, "tokenizer.json": described, file: values}.items():
        more = described if name == "tokenizer.json" else {}
        (tmp_path / name).write_text(json.dumps({**content, **more} if isinstance(content, dict) else content))
    with pytest.raises(ValueError, match=says) as error:
        opened(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_library_an_imported_tokenizer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"runs on the library tokenizers; install it: pip install 'llm-jax\[hf\]'"):
        ImportedTokenizer("x", {"tokenizer.json": b'{"model": {"vocab": {"a": 0}}}'}, 0)


def test_a_file_that_is_no_tokenizer_is_named():
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"the tokenizer.json of x has no 'model'"):
        ImportedTokenizer("x", {"tokenizer.json": b"{}"}, 0)
    with pytest.raises(ValueError, match=r"the tokenizer.json of x can't be read by tokenizers"):
        ImportedTokenizer("x", {"tokenizer.json": b'{"model": {"vocab": {"a": 0}}}'}, 0)


@pytest.mark.slow
def test_transformers_loads_an_exported_run_and_computes_the_same(tmp_path: Path):
    """A run as quickstart makes it, trained for a step here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    corpus = write_corpus(tmp_path / "corpus")
    config = load_recipe("quickstart")
    changes = [
        "steps=2",
        "optimizer.warmup_steps=0",
        "prompts=",
        "data.batch_size=8",
        "accumulate=1",
        "evaluate_batches=1",
        "data.heldout=0.2",
    ]
    sizes = ["data.tokenizer=train:300", "model.vocab_size=320", "model.n_layers=2"]
    config = override(config, [f"data.uri={corpus}", *changes, *sizes])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
        fit(config, tmp_path / "run", console=console())
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    theirs, coder = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        run_folder.tokenizer_of_run(tmp_path / "run"),
    )
    text = "abc def" + END_OF_TEXT + "gh"
    ids = coder.encode(text, special=True)
    assert theirs(text)["input_ids"] == [coder.begin_of_text, *ids.tolist()]  # as documents began in training
    assert run_folder.begins(tmp_path / "run", config, coder)
    assert (theirs.eos_token_id, model.config.eos_token_id) == (coder.end_of_text,) * 2
    params, _ = restore.weights(tmp_path / "run", restore.on_one_device(config), report=quiet)
    out = forward(Transformer(override(config.model, ["dtype=float32"])), params, jnp.asarray(ids)[None])
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits.numpy()
    np.testing.assert_allclose(np.asarray(out.logits), logits, atol=1e-5 * np.abs(logits).max())
