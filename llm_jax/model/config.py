"""The configuration of a model: which pieces there are, and how they fit together."""

import dataclasses
from typing import Any, Literal

from llm_jax.config import check_ranges, check_types, import_object, nearest
from llm_jax.ops.config import Experts, Rotary, Scores, Sparse

# The named activations in the order of the forward pass, and the path of each in the module tree; `model/taps.py`
# captures and edits them.
TAPS = {
    "embed": "embed",
    "resid_pre": "layers/resid_pre",
    "q": "layers/attention/q",
    "k": "layers/attention/k",
    "v": "layers/attention/v",
    "attn_scores": "layers/attention/attn_scores",
    "pattern": "layers/attention/pattern",
    "z": "layers/attention/z",
    "attn_out": "layers/attn_out",
    "resid_mid": "layers/resid_mid",
    "mlp_pre": "layers/feedforward/mlp_pre",
    "mlp_post": "layers/feedforward/mlp_post",
    "router": "layers/experts/router",
    "mlp_out": "layers/mlp_out",
    "resid_post": "layers/resid_post",
    "final": "final",
    "logits": "logits",
}

MOST_LAYERS = 10_000  # some code visits each layer in Python: with two billion of them it would seem to hang

REMAT = ("none", "full", "dots", "offload")
# What rematerialization can keep by name: the taps inside a block, except those that fast attention never holds.
KEEPABLE = tuple(
    name
    for name, path in TAPS.items()
    if path.startswith("layers/") and name not in ("attn_scores", "pattern", "router")
)

# How a layer mixes tokens: softmax attention to all, to the last `window`, along a block-sparse pattern, or to all
# without positions; kernelised linear attention; the gated delta rule.
SOFTMAX = ("global", "local", "sparse", "nope")
MIXERS = (*SOFTMAX, "linear", "delta")

ImplementationName = Literal[
    "reference", "chunked", "flash", "splash", "cudnn", "tokamax", "native", "ring", "zigzag", "ulysses"
]


def is_own(mixer: str) -> bool:
    """Return whether a mixer is a class of the user's own, by its import path `package.module:Name`."""
    return ":" in mixer


def own_layers(config: "ModelConfig") -> list[str]:
    """Return the import paths of the layers of a user's own, each once."""
    return list(dict.fromkeys(layer.mixer for layer in config.period if is_own(layer.mixer)))


def own_mixer(path: str) -> Any:
    """Return the class that a layer names. Raise `ValueError` where it can't be imported, or is no `Mixer`."""
    cls = import_object(path)
    if not hasattr(cls, "init_state") or not hasattr(cls, "axes"):
        raise ValueError(f"model.layers: {path} is no subclass of llm_jax.Mixer (model/mixer.py); make it one")
    if not isinstance(cls.axes, tuple):
        raise ValueError(f"model.layers: {path} has axes={cls.axes!r}; give a tuple of mesh axes: ('data', 'fsdp')")
    return cls


@dataclasses.dataclass(frozen=True)
class Layer:
    """The kind of a layer, written `mixer` or `mixer+moe` in the layer pattern."""

    mixer: str
    moe: bool

    @property
    def memory(self) -> str:
        """What it remembers of earlier tokens, and so whose slots of the cache it counts with."""
        if self.mixer in SOFTMAX:
            return "keys"
        return self.mixer if is_own(self.mixer) else "state"

    @classmethod
    def of(cls, text: str) -> "Layer":
        """Return the kind that `text` spells."""
        mixer, plus, _ = text.partition("+")
        return cls(mixer, bool(plus))

    def has(self, tap: str) -> bool:
        """Return whether a layer of this kind has the activation `tap`."""
        if tap in ("attn_scores", "pattern"):
            return self.mixer in SOFTMAX
        if tap in ("q", "k", "v", "z"):
            return not is_own(self.mixer)
        return self.moe if tap == "router" else not (self.moe and tap in ("mlp_pre", "mlp_post"))


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What attention sees, and how it scores. Raise `ValueError` for a number out of its range.

    Attributes:
      window: positions that `local` layers see.
      sinks: first positions of a document that `local` layers see as well.
      sparse: the pattern of `sparse` layers.
      qk_norm: queries and keys are normed, each head separately (`head`, Qwen3) or all together (`whole`, OLMo 2).
      scale: factor on the scores; None: `H**-0.5`.
      softcap: scores are limited to (-softcap, softcap) by tanh; None: they are not.
      dropout: the share of the pattern that is zeroed in training, by `reference` and `chunked` only.
      convolution: tokens that the short convolution of `delta` layers spans.
      implementation: of `ops/attention.py`. None: the fastest that accepts; `zigzag` if `mesh.context` splits rows.
    """

    window: int | None = None
    sinks: int = 0
    sparse: Sparse | None = None
    qk_norm: Literal["none", "head", "whole"] = "none"
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    convolution: int = 4
    implementation: ImplementationName | None = None

    def __post_init__(self) -> None:
        check_types(self, "model.attention.")
        for name, least in (("window", 1), ("sinks", 0), ("convolution", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"model.attention.{name}={value} must be at least {least}")
        for name in ("scale", "softcap"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"model.attention.{name}={value} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.attention.dropout={self.dropout} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Raise `ValueError` for fields that don't fit together.

    Attributes:
      vocab_size: rows of the token table, at least as many as the tokenizer has ids; a multiple of 64 is faster.
      d_model: width of the residual stream.
      n_layers: blocks, each attention and a feed-forward.
      n_heads: query heads of each block.
      max_seq_len: the longest row that the model reads, prompt and answer together.
      n_kv_heads: key/value heads; fewer than `n_heads` is grouped-query attention. None: `n_heads`.
      head_dim: width of one head. None: `d_model / n_heads`.
      d_ff: width of the feed-forward. None: `4 * d_model`, or if gated 8/3 of it rounded up to a multiple of 64, at
        the same cost.
      layers: the kinds of layers, repeated until there are `n_layers`: how each mixes tokens (`global`, `local`,
        `sparse`, `nope` (no positions), `linear`, `delta`, or the import path of a class of your own,
        `my.module:Mixer`), and `+moe` if its feed-forward is a mixture of experts.
      attention: what attention sees, and how it scores.
      experts: the mixture of experts of `+moe` layers; None: there is none.
      positions: how the model knows the position of a token; `learned`, `sinusoidal` are added to the embedding.
      rotary: of `positions=rotary`: how queries and keys rotate.
      residual: how a sublayer f joins the stream x: `pre` x + f(norm(x)), `post` norm(x + f(x)), `sandwich`
        x + norm(f(norm(x))), `output` x + norm(f(x)) (OLMo 2), `parallel` x + attention(norm(x)) + mlp(norm(x)).
      norm: how the stream is normed before a sublayer; `rmsnorm_1p` scales by 1 + w.
      norm_eps: added to the variance, or to the mean square.
      activation: of the feed-forward; `gelu` is the tanh form, `relu2` the square of relu.
      gated: the feed-forward multiplies by a second, linear product (SwiGLU with `silu`).
      bias: none, in every linear map (`all`), in those of attention alone, or only where queries, keys and values are
        made (`qkv`, Qwen2).
      embedding_scale: factor on token embeddings.
      residual_scale: factor on the output of a sublayer, before it is added to the stream (Granite).
      logit_scale: factor on logits (Granite, Cohere), before they are capped.
      logit_softcap: logits are limited to (-cap, cap) by tanh.
      dropout: share of the embeddings and of each sublayer's output that is zeroed in training.
      tied: the output head is the embedding table.
      n_classes: the head predicts one of so many classes, with its own table, instead of the next token.
      init: a row of `model/init.py`; `mup` needs a free head.
      dtype: of the computation. Parameters and optimizer are float32 always.
      remat: what the backward pass recomputes: `none`, `full` (all of a block), `dots` (all but matrix products), all
        but the taps to keep, as `resid_mid,mlp_post`, or all, with the inputs of blocks in the host's memory
        (`offload`).
      unroll: periods of `layers` per step of the scan; as many as there are unroll the loop, which is faster on CPU and
        slower to compile.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    max_seq_len: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    layers: tuple[str, ...] = ("global",)
    attention: AttentionConfig = AttentionConfig()
    experts: Experts | None = None
    positions: Literal["rotary", "alibi", "learned", "sinusoidal", "none"] = "rotary"
    rotary: Rotary = Rotary()
    residual: Literal["pre", "post", "sandwich", "output", "parallel"] = "pre"
    norm: Literal["rmsnorm", "rmsnorm_1p", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Literal["relu", "gelu", "gelu_exact", "silu", "relu2"] = "silu"
    gated: bool = True
    bias: Literal["none", "qkv", "attention", "all"] = "none"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    dropout: float = 0.0
    tied: bool = True
    n_classes: int | None = None
    init: Literal["gpt2", "scaled", "mup"] = "scaled"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        check_types(self, "model.")
        check_ranges(self, "model.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ValueError(f"model.{field.name}={value} must be at least 1")
        if self.n_layers > MOST_LAYERS:
            raise ValueError(f"model.n_layers={self.n_layers} is more than {MOST_LAYERS:,}; use that or less")
        for name in ("norm_eps", "embedding_scale", "residual_scale", "logit_scale", "logit_softcap"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"model.{name}={value} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must lie in [0, 1)")
        if self.init == "mup" and self.head == "embedding":
            raise ValueError(
                "model.init=mup shrinks the head with width, which the embedding can't; set model.tied=false"
            )
        self._check_widths()
        self._check_layers()
        alone = () if "," in self.remat else REMAT
        for name in self.kept:
            if name not in KEEPABLE:
                raise ValueError(
                    f"model.remat={self.remat!r} can't keep {name!r}; {nearest(name, (*KEEPABLE, *alone))} "
                    f"Or use {', '.join(REMAT)}"
                )

    def _check_layers(self) -> None:
        if not 0 < len(self.layers) <= self.n_layers:
            raise ValueError(
                f"model.layers names {len(self.layers)} layers where model.n_layers={self.n_layers}; "
                "give one period of the pattern"
            )
        for text in self.layers:
            mixer, plus, feedforward = text.partition("+")
            known = (*MIXERS, mixer) if is_own(mixer) else MIXERS
            if mixer not in known or (plus and feedforward != "moe"):
                way = nearest(mixer, known)
                if way.startswith("known"):
                    way += ", or a class of your own, as my.module:Mixer"
                example = mixer if mixer in known else "global"
                raise ValueError(
                    f"model.layers: {text!r} is no kind of layer; {way.removesuffix('?')}; a mixture of experts is "
                    f"{example}+moe"
                )
            if is_own(mixer):
                own_mixer(mixer)
        mixers = {layer.mixer for layer in self.period}
        needs = (
            ("local", "attention.window", self.attention.window, "4096"),
            ("sparse", "attention.sparse", self.attention.sparse, "strided, as model.attention.sparse.pattern"),
            ("+moe", "experts", self.experts, "8, as model.experts.number"),
        )
        if self.attention.sinks and "local" not in mixers:
            raise ValueError(
                f"model.attention.sinks={self.attention.sinks} are what local layers see besides their window, but "
                f"model.layers={','.join(self.layers)} has none; set sinks to 0, or name a layer local"
            )
        if self.attention.dropout and mixers.isdisjoint(SOFTMAX):
            raise ValueError(
                f"model.attention.dropout={self.attention.dropout} zeroes a share of softmax attention, but "
                f"model.layers={','.join(self.layers)} has none; set it to 0"
            )
        for kind, name, value, example in needs:
            used = any(layer.moe for layer in self.period) if kind == "+moe" else kind in mixers
            if used and value is None:
                raise ValueError(f"model.layers={','.join(self.layers)} needs model.{name}; set it to {example}")
            if value is not None and not used:
                raise ValueError(
                    f"model.{name} is set, but no layer of model.layers={','.join(self.layers)} is {kind}; "
                    f"name one, as model.layers={kind if kind != '+moe' else 'global+moe'}"
                )

    def _check_widths(self) -> None:
        if self.head_dim is None and self.d_model % self.n_heads:
            below = self.d_model // self.n_heads * self.n_heads
            widths = " or ".join(str(width) for width in (below, below + self.n_heads) if width)
            raise ValueError(
                f"model.n_heads={self.n_heads} does not divide model.d_model={self.d_model}; "
                f"set model.head_dim, or use model.d_model={widths}"
            )
        if self.n_heads % self.K:
            most = min(self.K, self.n_heads)
            divisor = next((k for k in range(most, max(1, most - 1000), -1) if self.n_heads % k == 0), 1)
            raise ValueError(
                f"model.n_kv_heads={self.K} does not divide model.n_heads={self.n_heads}; use a divisor, as {divisor}"
            )
        if self.positions == "rotary":
            self.rotary.check(self.H)
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(
                f"sinusoidal positions come in pairs: model.d_model={self.d_model} must be even; use {self.d_model + 1}"
            )

    @property
    def K(self) -> int:
        """Key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def G(self) -> int:
        """Query heads per key/value head."""
        return self.n_heads // self.K

    @property
    def H(self) -> int:
        """Head dimension."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def F(self) -> int:
        """Feed-forward width."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // (3 * 64)) * 64 if self.gated else 4 * self.d_model

    @property
    def period(self) -> tuple[Layer, ...]:
        """The kinds of the layers of one period, in order; `model/stack.py` says which layer has which."""
        return tuple(map(Layer.of, self.layers))

    @property
    def head(self) -> str:
        """The parameter with the table of the output head."""
        if self.n_classes is not None:
            return "classes"
        return "embedding" if self.tied else "unembedding"

    @property
    def scores(self) -> Scores:
        """How attention scores."""
        return Scores(self.attention.scale, self.attention.softcap, self.positions == "alibi")

    @property
    def kept(self) -> tuple[str, ...]:
        """The taps that rematerialization keeps."""
        if self.remat == "offload":
            return ("resid_pre",)  # the input of a block, by a name that a policy can send to the host
        return () if self.remat in REMAT else tuple(name.strip() for name in self.remat.split(","))
