"""Models of Hugging Face as runs of ours, and back: config.json, safetensors, tokenizer files.

What there is to say about a family stands in `families.py`; here it is applied.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from llm_jax.compat import weights
from llm_jax.compat.families import FAMILIES
from llm_jax.compat.family import Family, Shapes
from llm_jax.compat.outside import optional, read_json
from llm_jax.compat.tokenizers import ends_of, files_of
from llm_jax.config import nearest
from llm_jax.data.config import DataConfig
from llm_jax.data.imported import ImportedTokenizer, files_in
from llm_jax.data.tokenizer import Tokenizer, build
from llm_jax.files import whole_folder, write_json
from llm_jax.model.config import ModelConfig
from llm_jax.train import run
from llm_jax.train.checkpoint import Checkpoints, Progress
from llm_jax.train.count import parameter_counts
from llm_jax.train.run import RunConfig
from llm_jax.train.seal import seal
from llm_jax.train.step import TrainState

SOURCE = "huggingface.json"  # in an imported run: the config.json that it came with
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"

Report = Callable[[str], object]


def import_run(
    source: str, folder: str | Path, *, tokenizer: str | None = None, command: str = "", report: Report = print
) -> RunConfig:
    """Makes a run, at step 0, of the model in a folder or of that name on the Hugging Face hub.

    `tokenizer` names one of ours in place of the model's own. The run appears whole or not at all, and takes the
    memory of its weights twice as they are saved. Raises `ValueError` for what is not there, not known, or more than
    we can do.
    """
    there, folder = fetch(source), Path(folder)
    theirs = read_json(there / "config.json")
    family = family_of(theirs)
    model = dataclasses.replace(family.read(theirs), dtype=compute_dtype(theirs))
    data = DataConfig(
        tokenizer=str(folder.absolute() / "tokenizer"), seq_len=min(model.max_seq_len, 1024), batch_size=1
    )
    config = RunConfig(model=model, data=data)
    run.check_free(folder, config)
    coder = open_tokenizer(source, there, tokenizer, model)
    report(f"{source}: a {family.name} of {sum(parameter_counts(model).values()):,} parameters")
    params = weights.load(there, family, model)
    with whole_folder(folder, "import") as scratch:
        coder.save(scratch / "tokenizer")
        write_json(scratch / SOURCE, theirs)
        write_json(scratch / "environment.json", run.environment(command))
        with Checkpoints(scratch, seal=seal(config, coder.fingerprint, None)) as checkpoints:
            checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, opt_state={}), Progress())
        run.save_config(scratch, config)
    return config


def export_run(
    folder: str | Path, params: PyTree, out: str | Path, *, family: str | None = None, dtype: str | None = None
) -> Family:
    """Writes the model of the run in `folder`, with these weights, so that transformers loads it.

    `family` is by default that of its import, or else the first that can say what the model is; `dtype` that of its
    computation. `out` appears whole or not at all. Raises `ValueError` where no family can.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists, and an export makes a folder of its own; choose another --out")
    config, coder = run.load_config(folder), run.load_tokenizer(folder)
    model, task = config.model, config.data.task
    if task is not None and task.kind == "translate":
        raise ValueError(
            f"{folder} sees the whole question at once (data.task.kind=translate), but every family of "
            "docs/architectures.md sees no token ahead, and would write something else; let llm-jax generate answer"
        )
    if family is None and (folder / SOURCE).is_file():
        family = read_json(folder / SOURCE)["model_type"]
    chosen = choose(model, weights.shapes_of(params), family)
    begins = run.begins(folder, config, coder)
    about = {
        "architectures": [chosen.architecture],
        "model_type": chosen.name,
        "dtype": dtype or model.dtype,
        "bos_token_id": coder.begin_of_text,
        "eos_token_id": coder.end_of_text,
        "pad_token_id": None,
    }
    with whole_folder(out, "export") as scratch:
        write_json(scratch / "config.json", about | chosen.write(model))
        for name, content in files_of(coder, model.max_seq_len, begins=begins).items():
            (scratch / name).write_bytes(content)
        weights.save(scratch / "model.safetensors", chosen, model, params, dtype or model.dtype)
    return chosen


def fetch(source: str) -> Path:
    """The folder of that name, or that into which the model of that name on the hub is downloaded."""
    if source and Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(HUB_NAME, source) or Path(source).is_file():
        raise ValueError(f"{source} is no folder, nor a name on the Hugging Face hub, such as gpt2 or Qwen/Qwen3-0.6B")
    hub = optional("huggingface_hub")
    try:
        files = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(hub.snapshot_download(source, allow_patterns=files, ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source} is no folder here, and the hub does not give it ({reason}); mend that, or download the model "
            "elsewhere and name its folder"
        ) from error


def family_of(theirs: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises `ValueError` for one that has no map."""
    name = str(theirs.get("model_type"))
    if name not in FAMILIES:
        inside = "; of a model that does more than text, save the text model alone" * ("text_config" in theirs)
        raise ValueError(
            f"config.json has model_type={name}, a family without a map; {nearest(name, FAMILIES)}{inside}"
        )
    return FAMILIES[name]


def choose(model: ModelConfig, shapes: Shapes, name: str | None) -> Family:
    """The family of that name, or the first that the model belongs to. Raises `ValueError` where it belongs to none."""
    names = list(FAMILIES) if name is None else [family_of({"model_type": name}).name]
    misfits = {name: FAMILIES[name].misfits(model, shapes) for name in names}
    closest = min(misfits, key=lambda name: len(misfits[name]))
    if misfits[closest]:
        raise ValueError(
            f"no family can say what this model is; the closest, {closest}, lacks {', '.join(misfits[closest])}. "
            "A model that is to be exported must be one of docs/architectures.md"
        )
    return FAMILIES[closest]


def compute_dtype(theirs: Mapping[str, Any]) -> str:
    """What a model computes in: bfloat16 where it is kept so, else float32."""
    return "bfloat16" if theirs.get("dtype", theirs.get("torch_dtype")) == "bfloat16" else "float32"


def open_tokenizer(source: str, there: Path, name: str | None, model: ModelConfig) -> Tokenizer:
    """The tokenizer of the model `source` in the folder `there`, or the one of ours of that name.

    Raises `ValueError` where there is none, or one of more ids than the model knows, added tokens apart.
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
            "save_pretrained(...)), or name a tokenizer: --tokenizer gpt2, or a folder"
        )
    if coder.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer {coder.name} has {coder.vocab_size} ids, but the model knows {model.vocab_size}; "
            "name another: --tokenizer gpt2, or a folder"
        )
    return coder
