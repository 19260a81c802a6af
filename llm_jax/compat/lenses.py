"""Lenses between keys of a config.json and fields of `ModelConfig`; each translates in both directions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_jax.compat.config_json import short
from llm_jax.model.config import ModelConfig
from llm_jax.model.pattern import kinds_of
from llm_jax.ops.config import Experts, Rotary

Theirs = Mapping[str, Any]  # a config.json
Fields = dict[str, Any]  # of `ModelConfig`, by path: `attention.window`

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Lens:
    """`ours` reads these keys, `theirs` writes them from a config that is `canonical`."""

    keys: tuple[str, ...]
    ours: Callable[[Theirs], Fields]
    theirs: Callable[[ModelConfig], dict[str, Any]]


def key(theirs: str, ours: str, default: Any = REQUIRED, values: Mapping[Any, Any] | None = None) -> Lens:
    """Return the lens of a key and a field; `default` is what its absence means, `values` their words for ours."""
    words = {word: name for name, word in reversed(list((values or {}).items()))}  # the first of several

    def read(config: Theirs) -> Fields:
        value = config[theirs] if default is REQUIRED else config.get(theirs, default)
        return {ours: value if values is None else known(theirs, values, value)}

    def write(c: ModelConfig) -> dict[str, Any]:
        value = functools.reduce(lambda group, name: getattr(group, name, default), ours.split("."), c)
        return {theirs: value if values is None else words.get(value, next(iter(values)))}

    return Lens((theirs,), read, write)


# ---- which layers see how much

KINDS = {"full_attention": "global", "sliding_attention": "local"}


def pattern(kinds: Sequence[str], window: int | None) -> Fields:
    """Return the fields of layers of these kinds. Raise `ValueError` for local layers without a `window`."""
    local = any("local" in kind for kind in kinds)
    if local and window is None:
        raise ValueError(
            "config.json has layers of sliding_attention and no window for them (sliding_window is null, or "
            "use_sliding_window is false), which transformers does not compute either; make all full_attention there"
        )
    return {"layers": period(kinds), "attention.window": window if local else None}


def period(kinds: Sequence[Any]) -> tuple[Any, ...]:
    """Return the shortest prefix of `kinds` that gives all of them when repeated."""
    sizes = range(1, len(kinds) + 1)
    size = next((n for n in sizes if all(kind == kinds[i % n] for i, kind in enumerate(kinds))), 0)
    return tuple(kinds[:size])


def of_each_layer(config: Theirs, name: str) -> Sequence[Any] | None:
    """Return what a key says of each layer, if it is there. Raise `ValueError` for another number of layers."""
    said, n_layers = config.get(name), config["num_hidden_layers"]
    if said is not None and len(said) != n_layers:
        raise ValueError(
            f"config.json has {len(said)} {name} for num_hidden_layers={n_layers}; give one for each layer there"
        )
    return said


def flag(config: Theirs, name: str, absent: bool = False) -> bool:
    """Return a key that is true or false. Raise `ValueError` for any other value, as transformers does."""
    said = config.get(name, absent)
    if not isinstance(said, bool):
        raise ValueError(f"config.json has {name}={short(said)}; expected true or false")
    return said


def sliding_window(config: Theirs, absent: int | None = 4096) -> int | None:
    """Return the window if `use_sliding_window` is true; `absent` is what a missing `sliding_window` means.

    Raise `ValueError` for a switch that is not true or false.
    """
    return config.get("sliding_window", absent) if flag(config, "use_sliding_window") else None


def window(default: int | None, feedforward: str = "") -> Lens:
    """Return the lens of `sliding_window` in families where all layers have one, or none."""

    def read(config: Theirs) -> Fields:
        size = config.get("sliding_window", default)
        return pattern([("global" if size is None else "local") + feedforward], size)

    return Lens(("sliding_window",), read, lambda c: {"sliding_window": c.attention.window})


def layer_types(guess: Callable[[Theirs, int], bool], keys: tuple[str, ...], use: bool = False) -> Lens:
    """Return the lens of `layer_types`; without, `guess` says from `keys` whether the i-th layer has a window.

    `use`: the family has a switch `use_sliding_window`.
    """

    def read(config: Theirs) -> Fields:
        types = of_each_layer(config, "layer_types")
        if types is None:
            layers = range(config["num_hidden_layers"])
            types = ["sliding_attention" if guess(config, i) else "full_attention" for i in layers]
        size = sliding_window(config) if use else config.get("sliding_window", 4096)
        return pattern([known("layer_types", KINDS, name) for name in types], size)

    def write(c: ModelConfig) -> dict[str, Any]:
        local = ["local" in kind for kind in kinds_of(c)]
        types = ["sliding_attention" if near else "full_attention" for near in local]
        switch: dict[str, Any] = {"use_sliding_window": any(local)} if use else {}
        cycle = period(local)
        if (
            "sliding_window_pattern" in keys and not cycle[-1] and all(cycle[:-1])
        ):  # for readers that ignore layer_types
            switch["sliding_window_pattern"] = len(cycle)
        return {"layer_types": types, "sliding_window": c.attention.window, **switch}

    return Lens(("layer_types", "sliding_window", *keys), read, write)


def no_rope_layers() -> Lens:
    """Return the lens of SmolLM3: layers with 0 in `no_rope_layers` (every fourth) have no positions.

    Reading raises `ValueError` for such a layer with a window.
    """

    def read(config: Theirs) -> Fields:
        every, layers = config.get("no_rope_layer_interval", 4), range(config["num_hidden_layers"])
        rotated = of_each_layer(config, "no_rope_layers") or [(i + 1) % every for i in layers]
        sliding = sliding_window(config, absent=None)
        types = of_each_layer(config, "layer_types")
        if types is None:
            types = ["full_attention" if rope or sliding is None else "sliding_attention" for rope in rotated]
        kinds = [known("layer_types", KINDS, name) for name in types]
        if any(kind == "local" and not rope for kind, rope in zip(kinds, rotated, strict=True)):
            raise ValueError(
                "config.json has layers with a window and without positions (no_rope_layers has a 0 where layer_types "
                "has sliding_attention), a kind that llm-jax lacks; known: global, local, nope"
            )
        return pattern([kind if rope else "nope" for kind, rope in zip(kinds, rotated, strict=True)], sliding)

    def write(c: ModelConfig) -> dict[str, Any]:
        kinds = kinds_of(c)
        return {
            "no_rope_layers": [int(kind != "nope") for kind in kinds],
            "layer_types": ["sliding_attention" if kind == "local" else "full_attention" for kind in kinds],
            "use_sliding_window": "local" in kinds,
            "sliding_window": c.attention.window,
        }

    keys = ("no_rope_layers", "no_rope_layer_interval", "layer_types", "use_sliding_window", "sliding_window")
    return Lens((*keys, "max_window_layers"), read, write)  # the last one changes nothing in this family


def exaone_layers() -> Lens:
    """Return the lens of EXAONE 4: if some layers have a window, the others have no positions; else all have some."""

    def read(config: Theirs) -> Fields:
        window, every = config.get("sliding_window", 4096), config.get("sliding_window_pattern", 4)
        types = of_each_layer(config, "layer_types")
        if types is None:
            layers = range(config["num_hidden_layers"])
            types = ["sliding_attention" if window and (i + 1) % every else "full_attention" for i in layers]
        kinds = [known("layer_types", KINDS, name) for name in types]
        return pattern([kind if kind == "local" or window is None else "nope" for kind in kinds], window)

    def write(c: ModelConfig) -> dict[str, Any]:
        types = ["sliding_attention" if kind == "local" else "full_attention" for kind in kinds_of(c)]
        return {"layer_types": types, "sliding_window": c.attention.window}

    return Lens(("layer_types", "sliding_window", "sliding_window_pattern"), read, write)


def sparse_layers(chosen: Lens) -> Lens:
    """Return the lens of Qwen3 MoE: which layers have experts, as `chosen` reads them, and whether all have windows."""

    def read(config: Theirs) -> Fields:
        dense, every = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
        sliding = sliding_window(config)
        mixer = "global" if sliding is None else "local"
        layers = range(config["num_hidden_layers"])
        sparse = [i not in dense and (i + 1) % every == 0 for i in layers]
        kinds = [f"{mixer}+moe" if experts else mixer for experts in sparse]
        return pattern(kinds, sliding) | (chosen.ours(config) if any(sparse) else {})

    def write(c: ModelConfig) -> dict[str, Any]:
        window = c.attention.window
        dense = [i for i, kind in enumerate(kinds_of(c)) if "+moe" not in kind]
        local = {"use_sliding_window": window is not None, "sliding_window": window}
        return {"mlp_only_layers": dense} | local | chosen.theirs(c)

    keys = ("mlp_only_layers", "decoder_sparse_step", "use_sliding_window", "sliding_window")
    return Lens((*keys, *chosen.keys, "max_window_layers"), read, write)  # the last one changes nothing in this family


# ---- how many of what


def experts(number: int, active: int, width: int | None = None) -> Lens:
    """Return the lens of the number, choice and `width` of experts; transformers 5 says `num_local_experts`."""
    lenses = (
        key("num_experts_per_tok", "experts.active", active),
        key("norm_topk_prob", "experts.renormalise", False),
        *([] if width is None else [key("moe_intermediate_size", "experts.d_ff", width)]),
    )

    def read(config: Theirs) -> Fields:
        count = config.get("num_local_experts", config.get("num_experts", number))
        return {"experts.number": count} | {name: value for lens in lenses for name, value in lens.ours(config).items()}

    def write(c: ModelConfig) -> dict[str, Any]:
        count = number if c.experts is None else c.experts.number
        return {"num_experts": count} | {name: value for lens in lenses for name, value in lens.theirs(c).items()}

    return Lens(("num_experts", "num_local_experts", *(name for lens in lenses for name in lens.keys)), read, write)


def heads(kv: int | None = None, size: int | None = None) -> tuple[Lens, ...]:
    """Return the lenses of key/value heads and head size; null means one per query head, and their share of D."""
    return key("num_key_value_heads", "n_kv_heads", kv), key("head_dim", "head_dim", size)


def biases(table: Mapping[str, tuple[bool, ...]], **absent: bool) -> Lens:
    """Return the lens of the keys that say which linear maps have biases, with the value that `absent` ones have."""

    def read(config: Theirs) -> Fields:
        said = tuple(flag(config, name, value) for name, value in absent.items())
        return {"bias": known(", ".join(absent), {values: name for name, values in table.items()}, said)}

    def write(c: ModelConfig) -> dict[str, Any]:
        return dict(zip(absent, table.get(c.bias, next(iter(table.values()))), strict=True))

    return Lens(tuple(absent), read, write)


PATTERN_DROPOUT = ("attention_dropout", "attn_pdrop")


def pattern_dropout(name: str, absent: float = 0.0) -> Lens:
    """Return the lens of the dropout on the attention pattern, under one of the names above; null is none."""
    assert name in PATTERN_DROPOUT
    return Lens(
        (name,),
        lambda config: {"attention.dropout": config.get(name, absent) or 0.0},
        lambda c: {name: c.attention.dropout},
    )


def silent(*names: str) -> Lens:
    """Return the lens of keys that don't change what the model computes."""
    return Lens(names, lambda config: {}, lambda c: {})


ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
    "swish": "silu",
}
SIZES = (
    key("vocab_size", "vocab_size"),
    key("hidden_size", "d_model"),
    key("num_hidden_layers", "n_layers"),
    key("num_attention_heads", "n_heads"),
    key("max_position_embeddings", "max_seq_len"),
    pattern_dropout("attention_dropout"),
)
WIDTH = key("intermediate_size", "d_ff")
ATTENTION_BIAS = biases({"none": (False,), "attention": (True,)}, attention_bias=False)  # and none elsewhere
UNTIED = key("tie_word_embeddings", "tied", False)
TIED = key("tie_word_embeddings", "tied", True)


def activation(absent: str = "silu", name: str = "hidden_act") -> Lens:
    """Return the lens of the activation function at the key `name`; `absent` is what its absence means."""
    return key(name, "activation", absent, {absent: ACTIVATIONS[absent]} | ACTIVATIONS)


def rms_norm(eps: float) -> Lens:
    """Return the lens of the epsilon of an RMS norm; `eps` is what its absence means."""
    return key("rms_norm_eps", "norm_eps", eps)


def _check_whole_heads(c: ModelConfig) -> dict[str, Any]:
    if c.d_model % c.n_heads:
        raise ValueError(
            f"model.d_model={c.d_model} is no multiple of model.n_heads={c.n_heads}, as transformers wants it"
        )
    return {}


# For families whose config transformers refuses unless the heads divide the width, whatever their size.
WHOLE_HEADS = Lens((), lambda config: {}, _check_whole_heads)


def known(name: str, names: Mapping[Any, Any], value: Any) -> Any:
    """Return `names[value]`. Raise `ValueError` for a value that is not there."""
    if value not in names:
        raise ValueError(f"config.json has {name}={value}, which llm-jax can't do; known: {', '.join(map(str, names))}")
    return names[value]


def canonical(c: ModelConfig) -> ModelConfig:
    """Return the one config of the same function: every field explicit, and all about training at its default."""
    experts, d_ff = c.experts, c.F
    if experts is not None:
        experts = Experts(experts.number, experts.active, experts.d_ff or c.F, experts.shared, experts.renormalise)
        d_ff = experts.d_ff if all(layer.moe for layer in c.period) else d_ff
    rotary = Rotary() if c.positions != "rotary" else c.rotary
    if rotary.scaling == "none" and rotary.local_theta == rotary.theta:
        rotary = dataclasses.replace(rotary, local_theta=None)
    return dataclasses.replace(
        c,
        n_kv_heads=c.K,
        head_dim=c.H,
        d_ff=d_ff,
        layers=period(kinds_of(c)),
        rotary=rotary,
        attention=dataclasses.replace(c.attention, scale=c.scores.factor(c.H), convolution=4, implementation=None),
        experts=experts,
        dropout=0.0,
        init="scaled",
        dtype="float32",
        remat="none",
        unroll=1,
    )
