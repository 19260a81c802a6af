"""Keys of config.json and the fields of `ModelConfig` that say the same, each pair a lens that looks both ways."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_jax.compat.config_json import short
from llm_jax.model.config import ModelConfig
from llm_jax.model.stack import kinds_of
from llm_jax.ops.experts import Experts
from llm_jax.ops.position import Rotary

Theirs = Mapping[str, Any]  # a config.json
Fields = dict[str, Any]  # of `ModelConfig`, by path: `attention.window`

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Lens:
    """`ours` reads these keys, `theirs` writes them, of a config that is `canonical`."""

    keys: tuple[str, ...]
    ours: Callable[[Theirs], Fields]
    theirs: Callable[[ModelConfig], dict[str, Any]]


def key(theirs: str, ours: str, default: Any = REQUIRED, values: Mapping[Any, Any] | None = None) -> Lens:
    """A key and a field; `default` is what its absence means, `values` their words for ours where they differ."""
    words = {word: name for name, word in reversed(list((values or {}).items()))}  # of several, the first

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
    """The fields of layers of these kinds; `window` is that of those that have one. Raises `ValueError` without it."""
    local = any("local" in kind for kind in kinds)
    if local and window is None:
        raise ValueError(
            "config.json has layers of sliding_attention and no window for them (sliding_window is null, or "
            "use_sliding_window is false), which transformers does not compute either; make all full_attention there"
        )
    return {"layers": period(kinds), "attention.window": window if local else None}


def period(kinds: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest beginning of `kinds` that makes all of them, repeated."""
    sizes = range(1, len(kinds) + 1)
    size = next((n for n in sizes if all(kind == kinds[i % n] for i, kind in enumerate(kinds))), 0)
    return tuple(kinds[:size])


def of_each_layer(config: Theirs, name: str) -> Sequence[Any] | None:
    """What a key says of every layer, if it is there. Raises `ValueError` where that are not all, or too many."""
    said, n_layers = config.get(name), config["num_hidden_layers"]
    if said is not None and len(said) != n_layers:
        raise ValueError(
            f"config.json has {len(said)} {name} for num_hidden_layers={n_layers}; give one for each layer there"
        )
    return said


def flag(config: Theirs, name: str, absent: bool = False) -> bool:
    """What a key that is true or false says. Raises `ValueError` for any other value, as transformers does."""
    said = config.get(name, absent)
    if not isinstance(said, bool):
        raise ValueError(f"config.json has {name}={short(said)}; expected true or false")
    return said


def sliding_window(config: Theirs, absent: int | None = 4096) -> int | None:
    """The window of layers that have one, if `use_sliding_window` says that any do; `absent`: what no key means."""
    return config.get("sliding_window", absent) if flag(config, "use_sliding_window") else None


def window(default: int | None, feedforward: str = "") -> Lens:
    """`sliding_window`, where all layers have it or none."""

    def read(config: Theirs) -> Fields:
        size = config.get("sliding_window", default)
        return pattern([("global" if size is None else "local") + feedforward], size)

    return Lens(("sliding_window",), read, lambda c: {"sliding_window": c.attention.window})


def layer_types(guess: Callable[[Theirs, int], bool], keys: tuple[str, ...], use: bool = False) -> Lens:
    """`layer_types`; where they are not given, `guess` says from `keys` whether the i-th layer has a window.

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
        if "sliding_window_pattern" in keys and not cycle[-1] and all(cycle[:-1]):  # for who reads no layer_types
            switch["sliding_window_pattern"] = len(cycle)
        return {"layer_types": types, "sliding_window": c.attention.window, **switch}

    return Lens(("layer_types", "sliding_window", *keys), read, write)


def no_rope_layers() -> Lens:
    """SmolLM3: where `no_rope_layers` says 0 (every fourth layer) there are no positions, but maybe a window."""

    def read(config: Theirs) -> Fields:
        every, layers = config.get("no_rope_layer_interval", 4), range(config["num_hidden_layers"])
        turned = of_each_layer(config, "no_rope_layers") or [(i + 1) % every for i in layers]
        sliding = sliding_window(config, absent=None)
        types = of_each_layer(config, "layer_types")
        if types is None:
            types = ["full_attention" if turns or sliding is None else "sliding_attention" for turns in turned]
        kinds = [known("layer_types", KINDS, name) for name in types]
        if any(kind == "local" and not turns for kind, turns in zip(kinds, turned, strict=True)):
            raise ValueError(
                "config.json has layers with a window and without positions (no_rope_layers has a 0 where layer_types "
                "has sliding_attention), a kind that llm-jax lacks; known: global, local, nope"
            )
        return pattern([kind if turns else "nope" for kind, turns in zip(kinds, turned, strict=True)], sliding)

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
    """EXAONE 4: where some layers have a window the others have no positions; without a window all have some."""

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
    """Qwen3 MoE: which layers have the experts that `chosen` reads; and whether all have a window, or none."""

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
    """How many experts, `num_local_experts` in transformers 5, and how the chosen are weighted; `width` of one."""
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
    """What the absence of these keys means; null is one for each query head, and their share of the width."""
    return key("num_key_value_heads", "n_kv_heads", kv), key("head_dim", "head_dim", size)


def biases(table: Mapping[str, tuple[bool, ...]], **absent: bool) -> Lens:
    """Keys that together say which linear maps have biases; what the absence of each means."""

    def read(config: Theirs) -> Fields:
        said = tuple(flag(config, name, value) for name, value in absent.items())
        return {"bias": known(", ".join(absent), {values: name for name, values in table.items()}, said)}

    def write(c: ModelConfig) -> dict[str, Any]:
        return dict(zip(absent, table.get(c.bias, next(iter(table.values()))), strict=True))

    return Lens(tuple(absent), read, write)


PATTERN_DROPOUT = ("attention_dropout", "attn_pdrop")


def pattern_dropout(name: str, absent: float = 0.0) -> Lens:
    """The share of attention's pattern that training drops, by one of the names above; null is none."""
    assert name in PATTERN_DROPOUT
    return Lens(
        (name,),
        lambda config: {"attention.dropout": config.get(name, absent) or 0.0},
        lambda c: {name: c.attention.dropout},
    )


def silent(*names: str) -> Lens:
    """Keys that change nothing of what the model computes."""
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
    return key(name, "activation", absent, {absent: ACTIVATIONS[absent]} | ACTIVATIONS)


def rms_norm(eps: float) -> Lens:
    return key("rms_norm_eps", "norm_eps", eps)


def _check_whole_heads(c: ModelConfig) -> dict[str, Any]:
    if c.d_model % c.n_heads:
        raise ValueError(
            f"model.d_model={c.d_model} is no multiple of model.n_heads={c.n_heads}, as transformers wants it"
        )
    return {}


# Of families whose config transformers refuses unless the heads divide the width, whatever their size.
WHOLE_HEADS = Lens((), lambda config: {}, _check_whole_heads)


def known(name: str, names: Mapping[Any, Any], value: Any) -> Any:
    """`names[value]`. Raises `ValueError` for a value that is not there."""
    if value not in names:
        raise ValueError(f"config.json has {name}={value}, which llm-jax can't do; known: {', '.join(map(str, names))}")
    return names[value]


def canonical(c: ModelConfig) -> ModelConfig:
    """The same function said in one way: nothing left to follow from another field, and nothing about training."""
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
