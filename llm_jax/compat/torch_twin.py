"""The same model in PyTorch: a second opinion on every value, gradient and training curve.

    twin = Twin(config)
    load_parameters(twin, params)
    twin(tokens).logits                      # those of Transformer(config), up to rounding

It is written from the papers, not from `model/`: masks are boolean tensors, attention is PyTorch's own, recurrences are
loops over time, experts are computed one by one. Parameters keep our paths and shapes, layer by layer, so that they
are loaded by path, and gradients are compared leaf by leaf. It has no dropout: no two libraries draw the same numbers.
"""

import dataclasses
import math

import jax
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, PyTree
from torch import Tensor, nn
from torch.nn import functional as F

from llm_jax.compat.torch_layers import (
    DeltaRule,
    FeedForward,
    LinearAttention,
    MixtureOfExperts,
    Norm,
    Rows,
    SoftmaxAttention,
    Table,
    Use,
)
from llm_jax.compat.torch_positions import alibi_slopes, rotations, sinusoidal
from llm_jax.model.config import SOFTMAX, Layer, ModelConfig, own_layers
from llm_jax.model.pattern import locate
from llm_jax.model.stack import unstack
from llm_jax.tree import leaves

MIXERS = {**dict.fromkeys(SOFTMAX, SoftmaxAttention), "linear": LinearAttention, "delta": DeltaRule}


@dataclasses.dataclass
class Output:
    """The logits, and the use of the experts in each layer that has some."""

    logits: Float[Tensor, "B L V"]
    uses: list[Use]


class Block(nn.Module):
    """One layer: a token mixer and a feed-forward, joined by the residual form of the config."""

    def __init__(self, c: ModelConfig, kind: Layer) -> None:
        super().__init__()
        self.residual, self.scale, self.moe = c.residual, c.residual_scale, kind.moe
        self.attention = MIXERS[kind.mixer](c, kind.mixer)
        if kind.moe:
            self.experts = MixtureOfExperts(c)
        else:
            self.feedforward = FeedForward(c, c.F)
        if c.residual != "output":
            self.attention_norm, self.feedforward_norm = Norm(c, c.d_model), Norm(c, c.d_model)
        if c.residual in ("sandwich", "output"):
            self.attention_out_norm, self.feedforward_out_norm = Norm(c, c.d_model), Norm(c, c.d_model)

    def forward(self, x: Float[Tensor, "B L D"], rows: Rows) -> tuple[Float[Tensor, "B L D"], Use | None]:
        """Return the residual stream after the layer, and the use of its experts if it has some."""
        use = None

        def attention(x: Tensor) -> Tensor:
            return self.attention(x, rows)

        def feed(x: Tensor) -> Tensor:
            nonlocal use
            if not self.moe:
                return self.feedforward(x)
            y, use = self.experts(x, rows.segments != 0)
            return y

        scale = self.scale
        match self.residual:
            case "pre":
                x = x + scale * attention(self.attention_norm(x))
                x = x + scale * feed(self.feedforward_norm(x))
            case "post":
                x = self.attention_norm(x + scale * attention(x))
                x = self.feedforward_norm(x + scale * feed(x))
            case "sandwich":
                x = x + scale * self.attention_out_norm(attention(self.attention_norm(x)))
                x = x + scale * self.feedforward_out_norm(feed(self.feedforward_norm(x)))
            case "output":
                x = x + scale * self.attention_out_norm(attention(x))
                x = x + scale * self.feedforward_out_norm(feed(x))
            case "parallel":
                x = x + scale * (attention(self.attention_norm(x)) + feed(self.feedforward_norm(x)))
        return x, use


class Twin(nn.Module):
    """Token ids to logits, like `Transformer`, without cache and dropout.

    Raise `ValueError` for a layer of the user's own, which is written in JAX alone.
    """

    blocks: Bool[Tensor, "blocks blocks"]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        if own := own_layers(c):
            raise ValueError(f"model.layers: {own[0]} has no twin in PyTorch; use kinds of llm_jax, such as global")
        self.embedding = Table(c.vocab_size, c.d_model)
        if c.positions == "learned":
            self.positions = Table(c.max_seq_len, c.d_model)
        self.layers = nn.ModuleList(Block(c, locate(c, index).kind) for index in range(c.n_layers))
        if c.residual != "post":
            self.final_norm = Norm(c, c.d_model)
        if c.head != "embedding":
            self.add_module(c.head, Table(c.n_classes or c.vocab_size, c.d_model))
        if c.attention.sparse is not None:
            blocks = c.attention.sparse.view(-(-c.max_seq_len // c.attention.sparse.block))
            self.register_buffer("blocks", torch.from_numpy(blocks), persistent=False)

    def forward(
        self,
        tokens: Int[Tensor, "B L"],
        segments: Int[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        prefix: Bool[Tensor, "B L"] | None = None,
    ) -> Output:
        """Return the logits [B L V]; the arguments mean what they mean to `Transformer`."""
        c, dtype = self.config, getattr(torch, self.config.dtype)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embedding(tokens).to(dtype) * c.embedding_scale
        if c.positions == "learned":
            x = x + self.positions(positions).to(dtype)
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(positions, c.d_model).to(dtype)

        rows = self._rows(positions, segments, prefix)
        uses = []
        for layer in self.layers:
            x, use = layer(x, rows)
            uses += [use] if use is not None else []
        x = x if c.residual == "post" else self.final_norm(x)
        head = self.get_parameter(f"{c.head}.table").to(dtype)
        logits = F.linear(x.float(), head.float()) * c.logit_scale
        if c.logit_softcap is not None:
            logits = c.logit_softcap * torch.tanh(logits / c.logit_softcap)
        return Output(logits, uses)

    def _rows(self, positions: Tensor, segments: Tensor | None, prefix: Tensor | None) -> Rows:
        c, mixers = self.config, {layer.mixer for layer in self.config.period}
        rotated = mixers & {"global", "local", "sparse"} if c.positions == "rotary" else set()
        return Rows(
            masks={mixer: self._mask(mixer, positions.shape[1], segments, prefix) for mixer in mixers & set(SOFTMAX)},
            rotations={m: rotations(c.rotary.local if m == "local" else c.rotary, c.H, positions) for m in rotated},
            segments=torch.ones_like(positions) if segments is None else segments,
        )

    def _mask(self, mixer: str, L: int, segments: Tensor | None, prefix: Tensor | None) -> Tensor | None:
        """Return which keys each query of a mixer attends to, [B or 1, heads or 1, L, L]; None: all before it."""
        c, scored = self.config, self.config.positions == "alibi" or self.config.attention.softcap is not None
        if mixer in ("global", "nope") and segments is None and prefix is None and not scored:
            return None
        position = torch.arange(L, device=self.embedding.table.device)
        distance = position[:, None] - position  # of a query from a key before it
        seen = (distance >= 0)[None] if prefix is None else (distance >= 0) | prefix[:, None]
        together = torch.ones_like(seen) if segments is None else segments[:, :, None] == segments[:, None]
        if mixer == "local":
            assert c.attention.window is not None
            first = together.tril(-1).sum(-1) < c.attention.sinks  # tokens with few before them in their document
            seen = seen & ((distance < c.attention.window) | first[:, None])
        elif mixer == "sparse":
            assert c.attention.sparse is not None
            size = c.attention.sparse.block
            seen = seen & self.blocks[position[:, None] // size, position // size]
        seen = (seen & together)[:, None]
        if c.positions != "alibi":
            return seen
        slopes = torch.tensor(alibi_slopes(c.n_heads), device=position.device)[:, None, None]
        return torch.where(seen, -slopes * distance.abs(), -math.inf)


def parameters(twin: Twin) -> dict[str, nn.Parameter]:
    """Return the parameters by the paths of `unstack`: `layers_0/attention/w_q`."""
    return {name.replace(".", "/").replace("layers/", "layers_"): p for name, p in twin.named_parameters()}


def load_parameters(twin: Twin, params: PyTree) -> None:
    """Copy our parameters, as from `init`, into the twin. Raise `ValueError` for a leaf that only one side has."""
    # As NumPy arrays, whose slices are views: JAX would compile a program for each shape.
    ours, theirs = leaves(unstack(twin.config, jax.tree.map(np.asarray, params))), parameters(twin)
    here, there = ({path: tuple(leaf.shape) for path, leaf in side.items()} for side in (ours, theirs))
    if apart := sorted({path for path, _ in here.items() ^ there.items()}):
        told = "; ".join(f"{path} is {here.get(path)} here, {there.get(path)} in the twin" for path in apart)
        raise ValueError(f"{told}; build the twin from the config of these parameters")
    with torch.no_grad():
        for path, parameter in theirs.items():
            parameter.copy_(torch.tensor(ours[path]))
