"""What an export is to those who read it: transformers of now and of before, mlx-lm, and whoever had the original."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from architectures import CASES, config_json
from arrays import quiet
from grid import tiny
from test_huggingface import byte_level, save_model
from tiny_run import write_corpus

from llm_jax.cli.main import main
from llm_jax.compat import safetensors
from llm_jax.compat.families import FAMILIES
from llm_jax.compat.family import Family
from llm_jax.compat.huggingface import IDS, choose, config_json_of, export_run, family_of, import_run
from llm_jax.config import override
from llm_jax.data import shards
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.model import count
from llm_jax.model.config import ModelConfig
from llm_jax.ops.position import Rotary
from llm_jax.runs import folder as run_folder
from llm_jax.runs import restore

SCALED = {
    "none": Rotary(5e5),
    "linear": Rotary(5e5, scaling="linear", factor=2.0),
    "llama3": Rotary(5e5, scaling="llama3", factor=2.0, original_len=32, low_turns=1.0, high_turns=4.0),
    "yarn": Rotary(5e5, scaling="yarn", factor=4.0, original_len=16),
}
BY_LENGTH = {
    "dynamic": Rotary(5e5, scaling="dynamic", factor=2.0, original_len=32),
    "longrope": Rotary(5e5, scaling="longrope", factor=4.0, original_len=16, short_factors=(1.0,), long_factors=(1.0,)),
}
ROTARY = [case for case in CASES if case.split()[0] not in ("gpt2", "gpt_bigcode")]
LENGTHS = (1, 16, 17, 33, 64)  # of texts, on both sides of every `original_len`
OLD_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}


def positions(case: str, scaling: str) -> tuple[Family, ModelConfig]:
    """The family of `case`, and its model with this scaling, made for 64 positions."""
    family = family_of(config_json(case))
    model = family.read(config_json(case))
    kept = {name: getattr(model.rotary, name) for name in ("fraction", "local_theta", "pairs")}
    rotary = (SCALED | BY_LENGTH)[scaling]
    if scaling == "longrope":
        pairs = np.arange(1.0, 1 + model.rotary.rotated(model.H) // 2)
        kept |= {"short_factors": tuple(pairs), "long_factors": tuple(2 * pairs)}
    return family, dataclasses.replace(model, rotary=dataclasses.replace(rotary, **kept), max_seq_len=64)


def before_rope_parameters(theirs: Mapping[str, Any], theta: str, fraction: str) -> Rotary:
    """As transformers 4 reads positions, and all others that came before `rope_parameters`."""
    rotary = Rotary(theirs.get(theta, 10_000.0), theirs.get(fraction, 1.0))
    scaling, longest = theirs.get("rope_scaling") or {}, theirs["max_position_embeddings"]
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    assert kind == scaling.get("rope_type", kind)
    if kind == "default":
        return rotary
    if kind == "linear":
        assert scaling.keys() <= {"type", "rope_type", "factor"}
    names = {"low_freq_factor": "low_turns", "high_freq_factor": "high_turns", "factor": "factor"}
    names |= {"attention_factor": "amplitude", "beta_slow": "low_turns", "beta_fast": "high_turns"}
    names |= {"short_factor": "short_factors", "long_factor": "long_factors"}
    fields = {names[name]: value for name, value in scaling.items() if name in names}
    inside = scaling.get("original_max_position_embeddings", longest)
    original = {"dynamic": longest, "longrope": theirs.get("original_max_position_embeddings", longest)}
    if kind == "longrope" and "original_max_position_embeddings" in theirs:
        fields["factor"] = longest / original[kind]
    return dataclasses.replace(rotary, scaling=kind, original_len=original.get(kind, inside), **fields)


def angles(rotary: Rotary, model: ModelConfig) -> np.ndarray:
    """Of every pair a position, in texts of LENGTHS, and the amplitude."""
    return np.array([[*np.ravel(rotary.frequencies(model.H, length)), rotary.scale] for length in LENGTHS])


@pytest.mark.parametrize("scaling", [*SCALED, *BY_LENGTH])
@pytest.mark.parametrize("case", ROTARY)
def test_who_does_not_know_rope_parameters_reads_the_same_positions(case: str, scaling: str):
    family, model = positions(case, scaling)
    if family.name == "phi3" and scaling not in ("none", "longrope"):
        with pytest.raises(ValueError, match="the closest, phi3, lacks"):
            choose(model, {}, "phi3")
        return
    assert family.misfits(model, {}) == []
    theirs = family.write(model)
    now = theirs.pop("rope_parameters")
    found = before_rope_parameters(theirs, *OLD_NAMES.get(family.name, ("rope_theta", "partial_rotary_factor")))
    np.testing.assert_array_equal(angles(found, model), angles(model.rotary, model))
    if family.name == "gpt_neox":  # 4.57 takes these where a file has them
        assert before_rope_parameters(theirs, "rope_theta", "partial_rotary_factor") == found
    if scaling == "linear":  # OLMo 2 counts them; others of 4.57 want the second name
        named = {"rope_type"} if family.name in ("gemma3_text", "olmo3", "granite") else set()
        assert theirs["rope_scaling"].keys() == {"type", "factor"} | named
    if family.name == "phi3" and scaling == "longrope":
        assert theirs["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    if family.name == "gemma3_text":
        assert theirs["rope_local_base_freq"] == model.rotary.local_theta
        assert theirs["sliding_window_pattern"] == 6  # which mlx-lm reads, and not layer_types
    elif model.rotary.local_theta is not None:  # OLMo 3, whose local layers go by the same theta
        assert model.rotary.local_theta == theirs["rope_theta"]
    assert family.read(theirs) == family.read({"rope_parameters": now} | theirs)


def test_positions_that_older_readers_would_misread_are_refused():
    _, model = positions("llama llama3", "longrope")
    with pytest.raises(ValueError, match=r"factor=3.0 is not model.max_seq_len=64 / model.rotary.original_len=16"):
        choose(override(model, ["rotary.factor=3.0"]), {}, "llama")
    _, model = positions("olmo3", "yarn")
    with pytest.raises(ValueError, match=r"local_theta=1000.0 is not model.rotary.theta=500000.0"):
        choose(override(model, ["rotary.local_theta=1e3"]), {}, "olmo3")


@pytest.mark.parametrize("change", ["factor=3.0", "amplitude=1.5"])
def test_a_phi3_that_older_readers_would_misread_is_refused_by_them(change: str):
    family, model = positions("phi3 long", "longrope")
    model = override(model, [f"rotary.{change}"])
    assert family.misfits(model, {}) == []
    assert "type" not in family.write(model)["rope_scaling"]
    assert len(family.write(model)["rope_scaling"]) != 3


@pytest.mark.parametrize("scaling", [*SCALED, "longrope"])
def test_a_llama_is_the_same_to_mlx(scaling: str):
    """Its Llama reads rope_theta (10,000 without), rope_traditional (false), rope_scaling by type, then rope_type."""
    family, model = positions("llama llama3", scaling)
    theirs = family.write(model)
    assert not theirs.get("rope_traditional", False)
    assert theirs.get("rope_theta", 10_000) == 5e5
    found = theirs.get("rope_scaling")
    if scaling == "none":
        assert found is None
        return
    assert found is not None
    assert (found.get("type") or found.get("rope_type"), found["factor"]) == (scaling, model.rotary.factor)
    if scaling in ("llama3", "yarn", "longrope"):
        assert found["original_max_position_embeddings"] == model.rotary.original_len


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "llama"),
        ({"d_model": 25, "head_dim": 8}, "mistral"),
        ({"d_model": 25, "head_dim": 8, "bias": "qkv"}, "qwen2"),
        ({"rotary": Rotary(fraction=0.5)}, "phi3"),
        ({"rotary": SCALED["yarn"]}, "llama"),
    ],
)
def test_a_model_goes_out_as_a_family_that_transformers_loads(changes: dict[str, Any], name: str):
    config = tiny(**changes)
    assert choose(config, count.parameter_shapes(config), None).name == name


def test_no_family_loads_partial_rotary_with_a_scaling():
    config = tiny(rotary=dataclasses.replace(SCALED["yarn"], fraction=0.5))
    with pytest.raises(ValueError, match=r"no family can express this model; .*rotary.fraction|rope_type="):
        choose(config, count.parameter_shapes(config), None)


EXPORTS = {
    **{case: FAMILIES[case.split()[0]].read(config_json(case)) for case in CASES},
    "odd width": tiny(d_model=25, head_dim=8),
    "odd width, biases": tiny(d_model=25, head_dim=8, bias="qkv"),
    "wide heads": tiny(head_dim=16),
    "partial rotary": tiny(rotary=Rotary(fraction=0.5)),
    **{f"llama {scaling}": tiny(rotary=rotary) for scaling, rotary in SCALED.items()},
    "llama longrope": positions("llama llama3", "longrope")[1],
    "cwm none": positions("cwm", "none")[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_transformers_loads_every_export(name: str):
    """The config as it goes out makes a model with just our tensors, and with our frequencies."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = EXPORTS[name]
    shapes = count.parameter_shapes(model)
    family = choose(model, shapes, None)
    theirs = json.loads(json.dumps(config_json_of(family, model, ByteTokenizer(), "float32", {})))
    config = transformers.AutoConfig.for_model(**theirs)
    loaded = transformers.AutoModelForCausalLM.from_config(config)
    assert type(loaded).__name__ == family.architecture
    if model.experts is None:  # which transformers fuses
        ours = {tensor.name: tensor.format.shape for tensor in family.tensors_of(model, shapes)}
        found = {name: tuple(x.shape) for name, x in loaded.named_parameters()}
        if "embed_out.weight" in ours:  # the name of a NeoX's head on disk
            found["embed_out.weight"] = found.pop("lm_head.weight")
        assert found == ours
    turns = [module for module in loaded.modules() if hasattr(module, "inv_freq")]
    if model.rotary.local_theta is None and turns:
        np.testing.assert_allclose(turns[0].inv_freq.numpy(), np.ravel(model.rotary.frequencies(model.H)), rtol=1e-5)
        assert turns[0].attention_scaling == pytest.approx(model.rotary.scale)
    with torch.no_grad():
        if model.experts is None:
            assert torch.isfinite(loaded(torch.zeros((1, 4), dtype=torch.int64)).logits).all()


# ---- what an export keeps

ENDS = [1, 5, 7]
ORIGINAL = {"eos_token_id": ENDS, "bos_token_id": 0, "pad_token_id": 3, "initializer_range": 0.013, "use_cache": True}
ORIGINAL |= {"transformers_version": "4.44.0", "tokenizer_class": "X", "auto_map": {"AutoConfig": "x.X"}}
TEMPLATES = {"additional_chat_templates/tools.jinja": "{{ tools }}", "chat_template.jinja": "{{ messages }}"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16 with norms in float32, and all that comes with one."""
    folder = tmp_path_factory.mktemp("original") / "llama"
    theirs = config_json("llama llama3") | ORIGINAL | {"vocab_size": 320}
    save_model(folder, theirs, "bfloat16")
    tensors = {name: x.read().astype(np.float32) for name, x in safetensors.open_folder(folder).items()}
    norms = {name: "float32" if "norm" in name else "bfloat16" for name in tensors}
    tensors["model.norm.weight"] += 1e-3  # which bfloat16 does not hold
    shapes = {name: x.shape for name, x in tensors.items()}
    safetensors.write_file(folder / "model.safetensors", shapes, norms, tensors.__getitem__)
    for name, text in {**TEMPLATES, "tokenizer.json": byte_level()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS, "temperature": 0.6}))
    return folder


def exported(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    params, _ = restore.weights(folder, restore.on_one_device(run_folder.load_config(folder)), report=quiet)
    export_run(folder, params, out, report=quiet, **options)
    return json.loads((out / "config.json").read_text())


def test_an_export_keeps_what_the_original_had(original: Path, tmp_path: Path):
    pytest.importorskip("tokenizers")
    said: list[str] = []
    import_run(str(original), tmp_path / "run", report=said.append)
    assert any(
        re.search("ignored, .*: auto_map, initializer_range, tokenizer_class, .*use_cache", line) for line in said
    )
    about = exported(tmp_path / "run", tmp_path / "out")
    kept = {name: value for name, value in ORIGINAL.items() if name != "auto_map"}  # its code does not come along
    assert about.items() >= kept.items()
    assert "auto_map" not in about
    for name in (*TEMPLATES, "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    before, after = safetensors.open_folder(original), safetensors.open_folder(tmp_path / "out")
    assert {name: x.dtype for name, x in before.items()} == {name: x.dtype for name, x in after.items()}
    assert all(before[name].read().tobytes() == after[name].read().tobytes() for name in before)
    exported(tmp_path / "run", tmp_path / "half", dtype="float16")
    assert {x.dtype for x in safetensors.open_folder(tmp_path / "half").values()} == {"F16"}


def test_ids_stay_as_they_were_though_the_end_is_named_elsewhere(original: Path, tmp_path: Path):
    pytest.importorskip("tokenizers")
    shutil.copytree(original, tmp_path / "theirs")
    theirs = json.loads((original / "config.json").read_text())
    theirs = {name: value for name, value in theirs.items() if name != "eos_token_id"} | {"bos_token_id": 6}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(theirs))
    import_run(str(tmp_path / "theirs"), tmp_path / "run", report=quiet)
    about = exported(tmp_path / "run", tmp_path / "out")
    assert {name: about[name] for name in IDS} == {"bos_token_id": 6, "eos_token_id": ENDS, "pad_token_id": 3}
    run_folder.tokenizer_of_run(tmp_path / "run").save(tmp_path / "coder")  # another model's, for all that is known
    import_run(str(tmp_path / "theirs"), tmp_path / "other", tokenizer=str(tmp_path / "coder"), report=quiet)
    about = exported(tmp_path / "other", tmp_path / "other out")
    assert {name: about[name] for name in IDS} == {"bos_token_id": 0, "eos_token_id": ENDS, "pad_token_id": None}


def test_an_export_with_another_tokenizer_has_the_ids_of_that_one(original: Path, tmp_path: Path):
    import_run(str(original), tmp_path / "run", tokenizer="byte", report=quiet)
    about = exported(tmp_path / "run", tmp_path / "out")
    assert (about["eos_token_id"], about["bos_token_id"], about["pad_token_id"]) == (256, 256, None)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 256, "eos_token_id": 256}


def test_what_was_trained_from_an_import_goes_out_as_the_import_does(original: Path, tmp_path: Path):
    import_run(str(original), tmp_path / "run", tokenizer="byte", report=quiet)
    prepare(str(write_corpus(tmp_path / "corpus", documents=5)), tmp_path / "data", tokenizer="byte", heldout=0.0)
    config = override(run_folder.load_config(tmp_path / "run"), [f"init_from={tmp_path / 'run'}"])
    run_folder.create(tmp_path / "again", config, shards.open_shards(tmp_path / "data"), "llm-jax train")
    (tmp_path / "again" / "checkpoints").symlink_to(tmp_path / "run" / "checkpoints")
    about = exported(tmp_path / "again", tmp_path / "out")
    assert (about["model_type"], about["initializer_range"]) == ("llama", 0.013)
    assert safetensors.open_folder(tmp_path / "out")["model.norm.weight"].dtype == "F32"


@pytest.mark.parametrize(("case", "name"), [("gpt2", "attn_pdrop"), ("llama llama3", "attention_dropout")])
def test_the_dropout_of_an_original_stays_its_own_unless_a_run_has_one(case: str, name: str, tmp_path: Path):
    """An import trains without, whatever the original was trained with, and says again what that said, if it did."""
    for rate in (0.1, 0.3, None):
        said = {} if rate is None else {name: rate}
        there = save_model(tmp_path / f"theirs {rate}", config_json(case) | said)
        config = import_run(str(there), folder := tmp_path / f"run {rate}", tokenizer="byte", report=quiet)
        assert (config.model.attention.dropout, run_folder.load_config(folder)) == (0.0, config)
        assert exported(folder, tmp_path / f"out {rate}").get(name) == rate
    coder, family, model = ByteTokenizer(), family_of(config_json(case)), config.model
    for rate, origin in ((0.2, {}), (0.2, {name: 0.1}), (0.0, {})):
        rated = override(model, [f"attention.dropout={rate}"])
        assert config_json_of(family, rated, coder, "float32", origin)[name] == rate


def test_a_model_that_its_family_can_not_say_goes_out_as_another(original: Path, tmp_path: Path):
    import_run(str(original), tmp_path / "run", tokenizer="byte", report=quiet)
    config = run_folder.load_config(tmp_path / "run")
    params, _ = restore.weights(tmp_path / "run", restore.on_one_device(config), report=quiet)
    for part in ("attention", "feedforward"):
        params["layers"][part] = {name: x for name, x in params["layers"][part].items() if not name.startswith("b_")}
    model = override(config.model, ["bias=none", "layers=local", "attention.window=4"])
    run_folder.save_config(tmp_path / "run", dataclasses.replace(config, model=model))
    said: list[str] = []
    assert export_run(tmp_path / "run", params, tmp_path / "out", report=said.append).name == "mistral"
    assert said == ["a mistral, as transformers loads no such llama"]
    with pytest.raises(ValueError, match=r"the closest, llama, lacks model.attention.window=4"):
        export_run(tmp_path / "run", params, tmp_path / "other", family="llama")


# ---- numbers that are none


def test_weights_that_are_no_numbers_are_named_and_counted(tmp_path: Path):
    there = save_model(tmp_path / "theirs", config_json("qwen3"), "bfloat16")
    tensors = {name: x.read() for name, x in safetensors.open_folder(there).items()}
    tensors["model.layers.1.mlp.up_proj.weight"].reshape(-1)[[3, 77, 78]] = np.nan, np.inf, -np.inf
    library = pytest.importorskip("safetensors.numpy")
    library.save_file(tensors, there / "model.safetensors")
    says = r"model.safetensors: model.layers.1.mlp.up_proj.weight has 3 of 480 numbers that are NaN or infinite"
    with pytest.raises(ValueError, match=says):
        import_run(str(there), tmp_path / "run", tokenizer="byte", report=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_weights_beyond_the_range_of_the_file_are_named(original: Path, tmp_path: Path):
    import_run(str(original), tmp_path / "run", tokenizer="byte", report=quiet)
    params, _ = restore.weights(
        tmp_path / "run", restore.on_one_device(run_folder.load_config(tmp_path / "run")), report=quiet
    )
    table = np.array(params["embedding"]["table"])
    for number, dtype, says in (
        (
            7e4,
            "float16",
            r"model.embed_tokens.weight has 1 of 7,680 numbers that float16 can't hold .*--dtype bfloat16",
        ),
        (
            3.4e38,
            "bfloat16",
            r"model.embed_tokens.weight has 1 of .* bfloat16 can't hold \(up to 3.4e\+38\); .*float32",
        ),
        (np.nan, "float32", r"model.embed_tokens.weight has 1 of 7,680 numbers that are NaN or infinite"),
    ):
        table[2, 3] = number
        params["embedding"]["table"] = jax.numpy.asarray(table)
        with pytest.raises(ValueError, match=says):
            export_run(tmp_path / "run", params, tmp_path / "out", dtype=dtype, report=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- killed


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["import", "export"])
def test_what_a_killed_process_leaves_is_named_and_removed_by_the_next(verb: str, tmp_path: Path, capsys: Any):
    """The process is killed while its folder fills; the same command then leaves nothing but what it makes."""
    sizes = {"vocab_size": 4000, "n_embd": 512, "n_layer": 3, "n_head": 8, "n_positions": 256}
    there = save_model(tmp_path / "theirs", {"model_type": "gpt2", "eos_token_id": 0, **sizes})
    a_run, made = tmp_path / "runs" / "big", tmp_path / "made" / "big"
    if verb == "export":
        assert main(["import", str(there), "--run", str(a_run), "--tokenizer", "byte"]) == 0
    words = ["import", str(there), "--run", str(made), "--tokenizer", "byte"]
    words = words if verb == "import" else ["export", str(a_run), "--out", str(made)]
    process = subprocess.Popen([sys.executable, "-m", "llm_jax", *words], stderr=subprocess.PIPE)
    while not list(made.parent.glob(f".big.{verb}.*/whole/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [left] = made.parent.iterdir()
    assert left.name.startswith(f".big.{verb}.")
    assert main(words) == 0
    assert [path.name for path in made.parent.iterdir()] == ["big"]
    shutil.rmtree(tmp_path)
