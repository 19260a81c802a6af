"""Import Hugging Face models as runs, and export runs: config.json, safetensors, tokenizer files.

`families.py` describes each family; this file applies the descriptions.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from llm_jax.compat import safetensors, weights
from llm_jax.compat.config_json import short
from llm_jax.compat.families import FAMILIES
from llm_jax.compat.family import Family, Shapes
from llm_jax.compat.lenses import PATTERN_DROPOUT
from llm_jax.compat.missing import lacking
from llm_jax.compat.outside import optional, read_model_json
from llm_jax.compat.tokenizers import ends_of, files_of
from llm_jax.config import nearest
from llm_jax.data.config import DataConfig
from llm_jax.data.imported_tokenizer import ImportedTokenizer, files_in
from llm_jax.data.tokenizer import Tokenizer, build
from llm_jax.files import whole_folder, write_json
from llm_jax.log import Report
from llm_jax.model.config import ModelConfig
from llm_jax.model.count import parameter_counts
from llm_jax.runs import folder as run_folder
from llm_jax.runs import restore
from llm_jax.runs.checkpoint import Checkpoints, Progress
from llm_jax.runs.folder import ORIGIN, ORIGIN_DTYPES
from llm_jax.runs.run import Run
from llm_jax.runs.seal import seal
from llm_jax.train.config import RunConfig
from llm_jax.train.step import TrainState

HUB_NAME = r"[\w.-]+(/[\w.-]+)?"
# What to download: nothing pickled, and no second copy of the weights in another format.
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
UNWANTED = ["consolidated*", *(f"*/{kind}" for kind in WANTED if kind != "*.jinja")]
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def import_run(
    source: str, folder: str | Path, *, tokenizer: str | None = None, command: str = "", report: Report = print
) -> RunConfig:
    """Make a run, at step 0, of the model in a folder or of that name on the Hugging Face hub; return its config.

    `tokenizer` names one of ours to use instead of the model's own. The run appears whole or not at all; saving it
    takes the memory of its weights twice. `report` gets a line for everything that is ignored. Raise `ValueError` for
    what is missing, unknown or unsupported.
    """
    folder = Path(folder)
    if folder.exists():  # before anything is downloaded
        holds = "already holds a run" if run_folder.is_run(folder) else "exists"
        raise ValueError(f"{folder} {holds}, and an import makes a folder of its own; choose another (--run)")
    there = fetch(source)
    theirs = read_model_json(there / "config.json", {"model_type": str})
    family = family_of(theirs, str(there / "config.json"))
    model = family.read(theirs, str(there / "config.json"))
    attention = dataclasses.replace(model.attention, dropout=0.0)  # a choice of further training
    model = dataclasses.replace(model, attention=attention, dtype=compute_dtype(theirs))
    # If angles depend on the length of a row, that is one the model was trained for: documents may share a row.
    longest = model.rotary.original_len if model.rotary.scaling in ("dynamic", "longrope") else None
    seq_len = min(model.max_seq_len, 1024, longest or 1024)
    data = DataConfig(tokenizer=str(folder.absolute() / "tokenizer"), seq_len=seq_len, batch_size=1)
    config = RunConfig(model=model, data=data)
    run_folder.check_free(folder, config)
    coder = choose_tokenizer(source, there, tokenizer, model)
    stored = safetensors.open_folder(there)
    weights.check_layers(model, stored)
    report(f"{source}: a {family.name} of {sum(parameter_counts(model).values()):,} parameters")
    for line in (safetensors.passed_over(there), ignored(family, theirs)):
        if line is not None:
            report(line)
    params = weights.read_parameters(there, family, model)
    with whole_folder(folder, "import") as scratch:
        coder.save(scratch / "tokenizer")
        # Token ids in config.json belong to the model's own tokenizer.
        known = theirs if tokenizer is None else {name: theirs[name] for name in theirs if name not in IDS}
        write_json(scratch / ORIGIN, known)
        write_json(scratch / ORIGIN_DTYPES, weights.wider(stored))
        write_json(scratch / "environment.json", run_folder.environment(command))
        with Checkpoints(scratch, seal=seal(config, coder.fingerprint, None)) as checkpoints:
            checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, opt_state={}), Progress())
        run_folder.save_config(scratch, config)
    return config


def import_hf(source: str, folder: str | Path, *, tokenizer: str | None = None, report: Report = print) -> Run:
    """Make a run in `folder` of a model from Hugging Face, and return it: a folder, or a name on the hub.

    `tokenizer` names one of ours in place of the model's own. Raise `ValueError` for what is not there, not known, or
    more than we can do.
    """
    import_run(source, folder, tokenizer=tokenizer, report=report)
    return Run.open(folder, report=report)


def export_hf(
    run: Run | str | Path,
    out: str | Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    report: Report = print,
) -> None:
    """Write the model of `run`, or of the run in a folder, to `out`, so that transformers computes the same with it.

    `family` is by default that of its import, or the first that can say what the model is; `dtype` that of its
    computation. Raise `ValueError` where no family can, and for weights that are not finite or don't fit the dtype.
    """
    run = run if isinstance(run, Run) else Run.open(run, report=report)
    params, _ = restore.weights(run.folder, restore.on_the_host(run.config), run.checkpoint, report=report)
    export_run(run.folder, params, out, family=family, dtype=dtype, report=report)


def ignored(family: Family, theirs: Mapping[str, Any]) -> str | None:
    """Return a line with the keys of a config.json that change nothing; None if it has none."""
    used = {*family.keys, *IDS, "model_type", "dtype", "torch_dtype"}
    names = sorted(name for name in theirs if name not in used)
    return f"ignored, as they change nothing that a {family.name} computes: {', '.join(names)}" if names else None


def export_run(
    folder: str | Path,
    params: PyTree,
    out: str | Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    report: Report = print,
) -> Family:
    """Write the model of the run in `folder`, with these weights, for transformers; return its family.

    `family` is by default that of its import if it can express the model, else the first that can; `dtype` is by
    default that of its computation. An imported model keeps its token ids, the wider dtype of some tensors, and keys
    that don't describe the model. `out` appears whole or not at all. Raise `ValueError` if no family can express the
    model, and for weights that are not finite or don't fit the dtype.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists, and an export makes a folder of its own; choose another (--out)")
    config, coder = run_folder.load_config(folder), run_folder.tokenizer_of_run(folder)
    model, task = config.model, config.data.task
    if task is not None and task.kind == "translate":
        raise ValueError(
            f"{folder} sees the whole question at once (data.task.kind=translate), but every family of "
            "docs/architectures.md is causal, and would generate something else; use llm-jax generate"
        )
    origin = read_model_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}
    chosen = choose(model, weights.shapes_of(params), family, origin.get("model_type"))
    if chosen.name != origin.get("model_type"):
        if origin and family is None:
            report(f"a {chosen.name}, as transformers loads no such {origin.get('model_type')}")
        origin = {}
    elsewhere = folder / ORIGIN_DTYPES  # kept unless --dtype says otherwise
    kept = read_model_json(elsewhere) if origin and dtype is None and elsewhere.is_file() else {}
    about = config_json_of(chosen, model, coder, dtype or model.dtype, origin)
    begins = run_folder.begins(folder, config, coder)
    files = {"generation_config.json": generation(about)} | dict(files_of(coder, model.max_seq_len, begins=begins))
    with whole_folder(out, "export") as scratch:
        write_json(scratch / "config.json", about)
        for name, content in files.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_bytes(content)
        weights.write_parameters(scratch / "model.safetensors", chosen, model, params, dtype or model.dtype, kept)
    return chosen


def config_json_of(
    family: Family, model: ModelConfig, coder: Tokenizer, dtype: str, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config.json of a model whose import had the config.json `origin`, or {}.

    The attention dropout of `origin` stays unless the model was trained with a rate of its own.
    """
    ends = list(coder.end_ids)
    ids = dict.fromkeys(IDS) | {"bos_token_id": coder.begin_of_text, "eos_token_id": ends if ends[1:] else ends[0]}
    theirs = origin.get("eos_token_id")  # some name it only in generation_config.json
    came = theirs is None or coder.end_of_text in (theirs if isinstance(theirs, list) else [theirs])
    if came and isinstance(coder, ImportedTokenizer):  # the model's own
        unsaid = {"eos_token_id"} if theirs is None else set()
        ids |= {name: origin[name] for name in IDS if name in origin and name not in unsaid}
    same = PATTERN_DROPOUT if origin and not model.attention.dropout else ()
    ours = {name: value for name, value in family.write(model).items() if name not in same}
    lost = {*family.keys, "auto_map", "torch_dtype"} - {*same}  # rewritten; custom code of the model is not exported
    kept = {name: value for name, value in origin.items() if name not in lost}
    about = {"architectures": [family.architecture], "model_type": family.name, "dtype": dtype, "torch_dtype": dtype}
    return kept | about | ids | ours


def generation(about: Mapping[str, Any]) -> bytes:
    """Return a generation_config.json: which tokens begin and end a text."""
    ids = {name: about[name] for name in IDS if about[name] is not None}
    return (json.dumps({"_from_model_config": True} | ids, indent=2) + "\n").encode()


def fetch(source: str) -> Path:
    """Return the folder `source`, or download the model of that name from the hub. Raise `ValueError` if both fail."""
    if source and Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(HUB_NAME, source) or Path(source).is_file():
        raise ValueError(f"{source} is no folder, nor a name on the Hugging Face hub, such as gpt2 or Qwen/Qwen3-0.6B")
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(source, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source} is no folder here, and the hub does not provide it ({reason}); fix that, or download the model "
            "elsewhere and name its folder"
        ) from error


def family_of(theirs: Mapping[str, Any], where: str = "config.json") -> Family:
    """Return the family of a config.json; errors name it `where`. Raise `ValueError` for an unknown family."""
    name = " ".join(short(theirs.get("model_type")).split())
    if name in FAMILIES:
        return FAMILIES[name]
    lacks = lacking(name)
    why = f"it needs {lacks}, which llm-jax lacks" if lacks else f"known: {', '.join(sorted(FAMILIES))}"
    inside = "; of a model that does more than text, save the text model alone" * ("text_config" in theirs)
    raise ValueError(f"{where} has model_type={name}, an unknown family; {why}{inside}")


def choose(model: ModelConfig, shapes: Shapes, name: str | None, origin: str | None = None) -> Family:
    """Return the family `name`; by default `origin`, if the model belongs to it, or the first that it belongs to.

    Raise `ValueError` if it belongs to none.
    """
    if name is not None and name not in FAMILIES:
        needs = f"it needs {lacks}" if (lacks := lacking(name)) else nearest(name, FAMILIES)
        raise ValueError(f"--family {name}: an unknown family; {needs}")
    names = sorted(FAMILIES, key=lambda each: each != origin) if name is None else [name]
    misfits = {name: FAMILIES[name].misfits(model, shapes) for name in names}
    closest = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[closest]:
        raise ValueError(
            f"no family can express this model; the closest, {closest}, lacks {', '.join(misfits[closest])}. "
            "A model that is to be exported must be one of docs/architectures.md"
        )
    return FAMILIES[closest]


def compute_dtype(theirs: Mapping[str, Any]) -> str:
    """Return the dtype to compute in: bfloat16 if the weights are, else float32."""
    return "bfloat16" if theirs.get("dtype", theirs.get("torch_dtype")) == "bfloat16" else "float32"


def choose_tokenizer(source: str, there: Path, name: str | None, model: ModelConfig) -> Tokenizer:
    """Return the tokenizer of the model `source` in the folder `there`, or ours of the name `name`.

    Raise `ValueError` if there is none, or if it has more ids than the model, not counting added tokens.
    """
    if name is not None:
        coder = build(name, tuple)
    elif (there / "tokenizer.json").is_file():
        ends = ends_of(there)
        if not ends:
            raise ValueError(f"{there} does not say what ends a text; set eos_token_id in its config.json")
        coder = ImportedTokenizer(source, files_in(there), ends[0], model.vocab_size, end_ids=ends)
    else:
        raise ValueError(
            f"{there} has no tokenizer.json. Let transformers write one (AutoTokenizer.from_pretrained(...)."
            "save_pretrained(...)), or name one of ours: tokenizer='gpt2' (--tokenizer gpt2), or a folder"
        )
    if coder.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer {coder.name} has {coder.vocab_size} ids, but the model has {model.vocab_size}; "
            "name another: --tokenizer gpt2, or a folder"
        )
    return coder
