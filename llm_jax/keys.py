"""Every key of a config: its type, default and meaning; and which key a name from another library means.

The meaning of a key is what the docstring of its dataclass says under `Attributes:`; it is written nowhere else.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import types
from collections.abc import Collection, Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED = dataclasses.MISSING  # the default of a key that has none

# What other libraries, papers and people call them. A name under two keys may mean both.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "model.d_model": ("dim", "hidden", "hidden_size", "hidden_dim", "embed_dim", "n_embd", "embedding_size", "width"),
    "model.n_layers": ("layers", "layer", "depth", "n_layer", "num_layers", "num_hidden_layers", "blocks"),
    "model.n_heads": ("heads", "n_head", "num_heads", "num_attention_heads", "attention_heads"),
    "model.n_kv_heads": ("kv_heads", "num_kv_heads", "num_key_value_heads", "n_query_groups", "kv"),
    "model.head_dim": ("d_head", "head_size", "kv_channels"),
    "model.d_ff": ("ff", "ffn", "ffn_dim", "d_ffn", "mlp_dim", "n_inner", "intermediate_size", "ffn_hidden_size"),
    "model.vocab_size": ("vocab", "vocabulary", "vocabulary_size", "n_vocab", "padded_vocab_size"),
    "data.seq_len": ("context", "ctx", "n_ctx", "context_length", "context_size", "block_size", "length", "max_length"),
    "model.max_seq_len": ("context", "ctx", "n_ctx", "context_length", "max_position_embeddings", "n_positions"),
    "model.positions": ("position", "pos", "position_embedding", "positional_encoding"),
    "model.rotary.theta": ("rope_theta", "rope_base", "rotary_base"),
    "model.rotary.scaling": ("rope", "rope_scaling"),
    "model.attention.window": ("sliding_window", "window_size", "local_window"),
    "model.attention.implementation": ("attn", "flash", "flash_attention", "attn_implementation"),
    "model.norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "model.activation": ("act", "hidden_act", "activation_function", "nonlinearity"),
    "model.tied": ("tie", "tie_embeddings", "tie_word_embeddings", "weight_tying"),
    "model.dtype": ("precision", "bf16", "fp16", "amp", "mixed_precision", "compute_dtype"),
    "model.remat": ("checkpointing", "gradient_checkpointing", "activation_checkpointing", "recompute"),
    "model.experts.number": ("experts", "n_experts", "num_experts", "num_local_experts", "n_routed_experts", "moe"),
    "model.experts.active": ("experts_per_token", "num_experts_per_tok", "moe_top_k"),
    "data.batch_size": ("batch", "bs", "bsz", "batchsize", "global_batch_size", "train_batch_size"),
    "accumulate": ("accumulation", "grad_accum", "accumulation_steps", "gradient_accumulation_steps", "microbatches"),
    "data.epochs": ("epoch", "num_epochs", "n_epochs", "num_train_epochs", "max_epochs"),
    "data.uri": ("data", "dataset", "corpus", "text", "path", "data_path", "train_data", "input"),
    "data.tokenizer": ("tok", "tokeniser", "encoding"),
    "data.heldout": ("val", "validation", "val_split", "validation_split", "test_size", "held_out"),
    "optimizer.name": ("optimizer", "optim", "optimiser", "opt"),
    "optimizer.learning_rate": ("lr", "max_lr", "peak_lr", "learningrate", "step_size", "eta"),
    "optimizer.schedule": ("scheduler", "lr_scheduler", "lr_schedule", "lr_decay", "lr_scheduler_type"),
    "optimizer.warmup_steps": ("warmup", "warm_up", "warmup_iters", "num_warmup_steps"),
    "optimizer.final_fraction": ("min_lr", "final_lr", "min_lr_ratio", "end_lr"),
    "optimizer.weight_decay": ("wd", "decay", "l2"),
    "optimizer.clip": ("grad_clip", "gradient_clip", "max_grad_norm", "clip_grad_norm", "gradient_clip_val"),
    "optimizer.b1": ("beta1", "adam_beta1", "momentum"),
    "optimizer.b2": ("beta2", "adam_beta2"),
    "optimizer.eps": ("epsilon", "adam_eps", "adam_epsilon"),
    "steps": ("iters", "iterations", "max_iters", "max_steps", "n_steps", "num_steps", "train_steps", "total_steps"),
    "evaluate_every": ("eval_every", "eval_interval", "eval_steps", "val_every", "val_interval", "eval_freq"),
    "evaluate_batches": ("eval_iters", "eval_batches", "val_batches"),
    "checkpoint_every": ("save_every", "save_interval", "save_steps", "checkpoint_interval", "ckpt_every"),
    "keep": ("save_total_limit", "keep_last", "max_to_keep"),
    "sample_every": ("generate_every", "sample_interval"),
    "prompts": ("prompt",),
    "seed": ("random_seed", "rng_seed", "rng"),
    "init_from": ("init", "finetune", "pretrained", "checkpoint", "load_from", "from_pretrained", "weights"),
    "mesh.data": ("dp", "data_parallel", "ddp"),
    "mesh.tensor": ("tp", "tensor_parallel", "model_parallel"),
    "mesh.pipeline": ("pp", "pipeline_parallel", "stages"),
    "mesh.context": ("cp", "sp", "context_parallel", "sequence_parallel"),
    "mesh.expert": ("ep", "expert_parallel"),
    "mesh.fsdp": ("zero", "zero3", "shard", "sharding"),
    "loss.label_smoothing": ("smoothing",),
}
# The same for the options of a verb, and for the words that follow it.
OPTIONS: dict[str, tuple[str, ...]] = {
    "CONFIG": ("config", "config_file", "recipe"),
    "URI": ("uri", "data", "dataset", "input", "path"),
    "TEXT": ("text", "input", "prompt"),
    "RUN": ("run", "model", "model_path", "model_name_or_path", "ckpt_dir", "run_dir"),
    "--run": ("out", "output", "out_dir", "output_dir", "run_dir", "run_name", "save_dir", "logdir"),
    "--from": ("finetune", "pretrained", "from_pretrained"),
    "--out": ("output", "output_dir", "out_dir", "save_dir"),
    "--data": ("dataset", "text", "input", "file", "data_path", "eval_data"),
    "--column": ("text_column", "text_field", "text_key", "field"),
    "--checkpoint": ("ckpt", "step", "revision"),
    "--tokenizer": ("tok", "tokeniser", "tokenizer_name", "tokenizer_path", "encoding"),
    "--vocab": ("vocab_size", "vocabulary_size"),
    "--heldout": ("val", "val_split", "validation_split", "test_size"),
    "--prompt": ("text", "input", "start", "prefix", "p"),
    "--max-tokens": (
        "max_new_tokens",
        "max_length",
        "length",
        "num_tokens",
        "new_tokens",
        "n_predict",
        "n",
    ),
    "--samples": ("sample", "num_samples", "n_samples", "num_return_sequences", "num_sequences", "n"),
    "--temperature": ("temp", "t", "do_sample"),
    "--temperature 0": ("greedy", "no_sample", "no_do_sample", "argmax", "deterministic"),
    "--top-k": ("k",),
    "--top-p": ("p", "nucleus"),
    "--repetition-penalty": ("repeat_penalty",),
    "--stop": ("stop_sequence", "stop_sequences", "stop_strings", "stop_token", "eos"),
    "--seed": ("random_seed", "rng_seed", "manual_seed", "s"),
    "--begin": ("bos", "add_bos", "add_bos_token"),
    "--steps": ("max_steps", "max_iters", "total_steps"),
    "--dtype": ("torch_dtype", "precision"),
}
MOST = 3  # suggestions


@dataclasses.dataclass(frozen=True)
class Key:
    """A field of a config, or of one inside it.

    Attributes:
      name: its path, as the command line takes it.
      kind: its annotated type.
      default: `REQUIRED` if it has none.
      meaning: what its docstring says, and its choices if there are few.
      group: the dataclass whose fields follow; None for a value.
    """

    name: str
    kind: Any
    default: Any
    meaning: str
    group: Any


@functools.cache
def keys(cls: Any) -> tuple[Key, ...]:
    """Return all keys of the config class `cls`, those of a group after the group."""
    return tuple(_keys(cls, ""))


def _keys(cls: Any, where: str) -> Iterator[Key]:
    hints, said = get_type_hints(cls), meanings(cls)
    for field in dataclasses.fields(cls):
        name, kind = where + field.name, hints[field.name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        group = _group(kind)
        meaning, few = said.get(field.name, ""), choices(kind)
        if not all(re.search(rf"\b{choice}\b", meaning) for choice in few):
            meaning += f" One of {', '.join(few)}."
        yield Key(name, kind, default, meaning, group)
        if group is not None:
            yield from _keys(group, f"{name}.")


def _group(kind: Any) -> Any:
    """Return the dataclass in an annotation; None if there is none."""
    return next((kind for kind in kinds(kind) if dataclasses.is_dataclass(kind)), None)


def choices(kind: Any) -> tuple[Any, ...]:
    """Return the values that an annotation lists, without None; empty if it lists none."""
    return tuple(choice for each in kinds(kind) if get_origin(each) is Literal for choice in get_args(each))


def kinds(kind: Any) -> tuple[Any, ...]:
    """Return the types of an annotation: the members of a union, or the annotation itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def meanings(cls: Any) -> dict[str, str]:
    """Return what the docstring of `cls` says about each field, in one line."""
    _, _, listed = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    found = {}
    for entry in re.split(r"^ {2}(?=\w)", listed, flags=re.MULTILINE)[1:]:
        name, _, meaning = entry.partition(":")
        found[name] = " ".join(meaning.split())
    return found


def value_at(config: Any, key: Key) -> Any:
    """Return the value of `key` in `config`; its default if its group is None."""
    value = config
    for name in key.name.split("."):
        if value is None:
            return key.default
        value = getattr(value, name)
    return value


def suggestions(name: str, cls: Any) -> list[str]:
    """Return the keys of `cls` that `name` may mean, the likeliest first; none if nothing comes close.

    Keys match by their last word, by synonyms and by spelling; those in the group of `name` come first.
    """
    if len(name) > 100:  # no key is that long
        return []
    known = [key.name for key in keys(cls) if key.group is None]
    group, _, last = name.rpartition(".")
    bare = _bare(last)
    same = [key for key in known if _bare(key.rpartition(".")[2]) == bare]
    synonyms = [key for key, others in SYNONYMS.items() if key in known and bare in map(_bare, others)]
    inside = [key for key in [*same, *synonyms] if key.rpartition(".")[0] == group and group]
    found = list(dict.fromkeys([*inside, *synonyms, *sorted(same, key=lambda key: key.count("."))]))
    if not found:
        tails = [key.rpartition(".")[2] for key in known]
        close = difflib.get_close_matches(last, tails, n=1, cutoff=0.7)
        found = [key for key in known if key.rpartition(".")[2] in close]
        found = [key for key in found if key.rpartition(".")[0] == group] or found[:1]
        found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return found[:MOST]


def options_meant(name: str, known: Collection[str]) -> list[str]:
    """Return which of the options `known` the word `name` may mean, by spelling or by synonyms."""
    bare = _bare(name)
    return [
        option
        for option, others in OPTIONS.items()
        if option.split()[0] in known and bare in (_bare(option), *map(_bare, others))
    ]


def _bare(name: str) -> str:
    return re.sub("[-_]", "", name.lower())
