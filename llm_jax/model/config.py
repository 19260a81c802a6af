"""The model's configuration, and what follows from it by arithmetic: parameter and FLOP counts."""

import dataclasses
from typing import Literal

from llm_jax.config import nearest

# The named activations, in the order in which a token meets them, and where each lives in the module tree.
# `model/taps.py` says how to look at them and how to edit them.
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
    "mlp_out": "layers/mlp_out",
    "resid_post": "layers/resid_post",
    "final": "final",
    "logits": "logits",
}

REMAT = ("none", "full", "dots")
# What rematerialization can keep besides: the taps inside a block, but those that fast attention never holds.
KEEPABLE = tuple(
    name for name, place in TAPS.items() if place.startswith("layers/") and name not in ("attn_scores", "pattern")
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      n_kv_heads: key/value heads; fewer than `n_heads` is grouped-query attention. None: `n_heads`.
      head_dim: None: `d_model / n_heads`.
      d_ff: None: `4 * d_model`, or where gated 8/3 of it rounded up to a multiple of 64, the same cost.
      positions: how the model knows where a token stands; `learned`, `sinusoidal` are added to the embedding.
      window: attention sees only the last `window` positions. None: all of them.
      tied: the output head is the embedding table.
      init: a row of `model/init.py`; `mup` needs a free head.
      dtype: of the computation. Parameters and optimizer are float32 always.
      remat: what the backward pass computes again: `none`, `full` (all of a block), `dots` (all but matrix
        products), or all but the taps to keep, as `resid_mid,mlp_post`.
      unroll: layers a step of the scan; `n_layers` unrolls the loop, faster on CPU and slower to compile.
      attention: an implementation of `ops/attention.py`. None: the fastest that accepts.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    max_seq_len: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    positions: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"
    rope_theta: float = 10_000.0
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    activation: Literal["relu", "gelu", "silu", "relu2"] = "silu"
    gated: bool = True
    bias: bool = False
    window: int | None = None
    dropout: float = 0.0
    tied: bool = True
    init: Literal["gpt2", "scaled", "mup"] = "scaled"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"model.{name}={value} must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must lie in [0, 1)")
        if self.init == "mup" and self.tied:
            raise ValueError(
                "model.init=mup shrinks the head with width, which the embedding can't; set model.tied=false"
            )
        self._check_widths()
        for name in self.kept:
            if name not in KEEPABLE:
                raise ValueError(
                    f"model.remat={self.remat!r} can't keep {name!r}; {nearest(name, KEEPABLE)} "
                    f"Or use {', '.join(REMAT)}"
                )

    def _check_widths(self) -> None:
        if self.head_dim is None and self.d_model % self.n_heads:
            below = self.d_model // self.n_heads * self.n_heads
            widths = " or ".join(str(width) for width in (below, below + self.n_heads) if width)
            raise ValueError(
                f"model.n_heads={self.n_heads} does not divide model.d_model={self.d_model}; "
                f"set model.head_dim, or use d_model={widths}"
            )
        if self.n_heads % self.K:
            raise ValueError(
                f"model.n_kv_heads={self.K} does not divide model.n_heads={self.n_heads}; use one of "
                f"{[k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]}"
            )
        if self.positions == "rotary" and self.H % 2:
            raise ValueError(
                f"rotary positions turn pairs: head_dim={self.H} must be even; set model.head_dim={self.H + 1}"
            )
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
    def kept(self) -> tuple[str, ...]:
        """The taps that rematerialization keeps."""
        return () if self.remat in REMAT else tuple(name.strip() for name in self.remat.split(","))


def parameter_counts(c: ModelConfig) -> dict[str, int]:
    """Parameters by component. Their sum is the size of the tree that `init` makes (a test compares them)."""
    norm = c.d_model * (2 if c.norm == "layernorm" else 1)
    heads = c.n_heads + 2 * c.K
    attention = (heads + c.n_heads) * c.H * c.d_model + c.bias * (heads * c.H + c.d_model)
    up = 2 if c.gated else 1
    feedforward = (up + 1) * c.d_model * c.F + c.bias * (up * c.F + c.d_model)
    return {
        "embedding": c.vocab_size * c.d_model,
        "positions": c.max_seq_len * c.d_model if c.positions == "learned" else 0,
        "attention": c.n_layers * attention,
        "feedforward": c.n_layers * feedforward,
        "norms": (2 * c.n_layers + (c.norm_position == "pre")) * norm,
        "unembedding": 0 if c.tied else c.vocab_size * c.d_model,
    }


def flops_per_token(c: ModelConfig, seq_len: int) -> int:
    """FLOPs of a training step a token: 6 a matrix weight, and 12 N (K G) H for each key in view.

    2 forward and 4 backward for each multiply-add (Kaplan et al. 2020, arXiv:2001.08361; PaLM, appendix B).
    Causal attention looks at `(L + 1) / 2` keys on average; the half above the diagonal is not counted.
    Recomputation is not counted: this is the model's work, not the machine's.
    """
    matrices = 2 * c.d_model * c.H * (c.n_heads + c.K) + (3 if c.gated else 2) * c.d_model * c.F
    window = seq_len if c.window is None else min(c.window, seq_len)
    keys = window - window * (window - 1) / (2 * seq_len)
    return int(6 * (c.n_layers * matrices + c.vocab_size * c.d_model) + 12 * c.n_layers * c.n_heads * c.H * keys)
