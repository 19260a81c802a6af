"""The layers of the PyTorch twin. Their parameters have our names and shapes."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_jax.compat.torch_positions import rotate
from llm_jax.model.config import ModelConfig

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
    "gelu_exact": F.gelu,
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclasses.dataclass
class Rows:
    """What all layers share about the rows.

    Attributes:
      masks: by mixer, which keys each query attends to: booleans, or numbers to add to the scores; None: causal.
      rotations: by mixer, the cosines and sines that rotate queries and keys.
      segments: the document of each token, 0 in the padding.
    """

    masks: dict[str, Tensor | None]
    rotations: dict[str, tuple[Tensor, Tensor]]
    segments: Int[Tensor, "B L"]


@dataclasses.dataclass
class Use:
    """How the experts of a layer are used: the number of tokens of each, and the two auxiliary losses."""

    load: Float[Tensor, " E"]
    balance: Float[Tensor, ""]
    z: Float[Tensor, ""]


class TwinModule(nn.Module):
    """A module whose parameters have our names and shapes. They are zero until loaded."""

    def declare(self, **shapes: tuple[int, ...]) -> None:
        """Register a parameter of zeros for each name and shape."""
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def linear(self, name: str, x: Float[Tensor, "B L *I"]) -> Float[Tensor, "B L *O"]:
        """Return `x` times `w_{name}`, over all axes of `x` but the first two, plus `b_{name}` if there is one."""
        w, b = getattr(self, f"w_{name}").to(x.dtype), getattr(self, f"b_{name}", None)
        matrix = w.flatten(0, x.ndim - 3).flatten(1)
        y = F.linear(x.flatten(2), matrix.T, None if b is None else b.flatten().to(x.dtype))
        return y.unflatten(-1, w.shape[x.ndim - 2 :])


class Table(TwinModule):
    """A row of width D for each id: the embedding, learned positions, or the head."""

    table: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.declare(table=(rows, width))

    def forward(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Return the rows of `ids`."""
        return F.embedding(ids, self.table)


class Norm(TwinModule):
    """LayerNorm or RMSNorm with our parameters, through PyTorch's own functions."""

    scale: Tensor
    bias: Tensor

    def __init__(self, c: ModelConfig, size: int) -> None:
        super().__init__()
        self.kind, self.eps = c.norm, c.norm_eps
        self.declare(scale=(size,), **{"bias": (size,)} if c.norm == "layernorm" else {})

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """Return `x` normed over its last axis and scaled, in the dtype of `x`."""
        scale = self.scale.to(x.dtype)
        if self.kind == "layernorm":
            return F.layer_norm(x, scale.shape, scale, self.bias.to(x.dtype), self.eps)
        return F.rms_norm(x, scale.shape, 1 + scale if self.kind == "rmsnorm_1p" else scale, self.eps)


class TwinMixer(TwinModule):
    """The projections that every token mixer has, around its `mix`."""

    def __init__(self, c: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.config, self.mixer = c, mixer
        heads = {"q": (c.K, c.G, c.H), "k": (c.K, c.H), "v": (c.K, c.H)}
        if mixer == "delta":
            heads["gate"] = heads["q"]
        self.declare(**{f"w_{name}": (c.d_model, *shape) for name, shape in heads.items()})
        self.declare(w_o=(*heads["q"], c.d_model))
        if c.bias != "none":
            self.declare(**{f"b_{name}": shape for name, shape in heads.items()})
        if c.bias in ("attention", "all"):
            self.declare(b_o=(c.d_model,))

    def forward(self, x: Float[Tensor, "B L D"], rows: Rows) -> Float[Tensor, "B L D"]:
        """Project `x` to queries, keys and values, mix the tokens of each row, and project back to D."""
        q, k, v = (self.linear(name, x) for name in "qkv")
        return self.linear("o", self.mix(x, q, k, v, rows))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Float[Tensor, "B L K G H"]:
        """Return what each head reads, from q [B L K G H] and k, v [B L K H]; each kind of mixer has its own."""
        raise NotImplementedError


class SoftmaxAttention(TwinMixer):
    """Softmax attention: global, local, sparse or without positions, through PyTorch's own kernel where it can."""

    def __init__(self, c: ModelConfig, mixer: str) -> None:
        super().__init__(c, mixer)
        if c.attention.qk_norm != "none":
            whole = c.attention.qk_norm == "whole"
            self.q_norm = Norm(c, c.H * (c.n_heads if whole else 1))
            self.k_norm = Norm(c, c.H * (c.K if whole else 1))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Float[Tensor, "B L K G H"]:
        """Return softmax-weighted sums of values, from q [B L K G H] and k, v [B L K H]."""
        c = self.config
        if c.attention.qk_norm != "none":
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        q, k, v = q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B heads L H]
        if self.mixer in rows.rotations:
            q, k = (rotate(y, *rows.rotations[self.mixer], c.rotary.pairs) for y in (q, k))
        mask = rows.masks[self.mixer]
        if c.attention.softcap is None:
            scale, causal = c.attention.scale, mask is None
            z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=c.G > 1)
        else:
            assert mask is not None
            z = capped_attention(q, k, v, mask, c.attention.scale or c.H**-0.5, c.attention.softcap)
        return z.transpose(1, 2).unflatten(2, (c.K, c.G))

    def _normed(self, norm: Norm, y: Tensor) -> Tensor:
        return norm(y) if self.config.attention.qk_norm == "head" else norm(y.flatten(2)).view_as(y)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Return attention with scores soft-capped to (-cap, cap), which PyTorch's own lacks."""
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
    scores = cap * torch.tanh((q @ k.mT).float() * (scale / cap))
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


class LinearAttention(TwinMixer):
    """Linear attention, token by token: every query reads a sum of keys and values (arXiv:2006.16236)."""

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Float[Tensor, "B L K G H"]:
        """Return what each query reads of the sums, from q [B L K G H] and k, v [B L K H]; sums are float32."""
        q, k, v = F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float()
        memory, total = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), torch.zeros_like(k[:, 0])
        out = []
        for t, same in enumerate(same_document(rows.segments)):
            memory = memory * same[..., None, None, None] + k[:, t, :, :, None] * v[:, t, :, None]
            total = total * same[..., None, None] + k[:, t]
            out.append(q[:, t] @ memory / (q[:, t] @ total[..., None]))
        return torch.stack(out, dim=1).to(x.dtype)


class DeltaRule(TwinMixer):
    """The gated delta rule, token by token: the memory decays, then its value for a key moves towards the new one."""

    w_convolution: Tensor
    z_scale: Tensor
    log_rate: Tensor

    def __init__(self, c: ModelConfig, mixer: str) -> None:
        super().__init__(c, mixer)
        self.declare(w_convolution=(c.attention.convolution, c.K, c.G + 2, c.H), z_scale=(c.H,))
        self.declare(w_beta=(c.d_model, c.K), w_decay=(c.d_model, c.K), b_decay=(c.K,), log_rate=(c.K,))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Float[Tensor, "B L K G H"]:
        """Return what each query reads of the memory, from q [B L K G H] and k, v [B L K H]; it is float32."""
        G, H = q.shape[3:]
        inputs = torch.cat([q, k.unsqueeze(3), v.unsqueeze(3)], dim=3)
        q, k, v = F.silu(self._convolved(inputs, rows.segments)).float().split([G, 1, 1], dim=3)
        q, k, v = unit(q) * H**-0.5, unit(k).squeeze(3), v.squeeze(3)
        keep = torch.exp(-self.log_rate.exp() * F.softplus(self.linear("decay", x).float()))
        beta = self.linear("beta", x).float().sigmoid()
        memory = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
        out = []
        for t, same in enumerate(same_document(rows.segments)):
            memory = memory * (keep[:, t] * same[..., None])[..., None, None]
            known = (k[:, t, :, None] @ memory).squeeze(2)
            memory = memory + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - known))[:, :, None]
            out.append(q[:, t] @ memory)
        z = torch.stack(out, dim=1).to(x.dtype)
        z = F.rms_norm(z, (H,), self.z_scale.to(x.dtype), self.config.norm_eps)
        return z * F.silu(self.linear("gate", x))

    def _convolved(self, x: Tensor, segments: Tensor) -> Tensor:
        """Return the weighted sum of each channel over this token and the last ones of its document."""
        W = self.w_convolution.shape[0]
        past = F.pad(x, (0, 0) * 3 + (W - 1, 0)).unfold(1, W, 1)
        same = F.pad(segments, (W - 1, 0), value=-1).unfold(1, W, 1) == segments[..., None]
        return torch.einsum("BLKGHW,BLW,WKGH->BLKGH", past, same.to(x.dtype), self.w_convolution.to(x.dtype))


class FeedForward(TwinModule):
    """The feed-forward of a dense layer, or the shared experts of a mixture; gated or not."""

    def __init__(self, c: ModelConfig, width: int) -> None:
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[c.activation], c.gated
        rising = ("gate", "up") if c.gated else ("up",)
        self.declare(**{f"w_{name}": (c.d_model, width) for name in rising}, w_down=(width, c.d_model))
        if c.bias == "all":
            self.declare(**{f"b_{name}": (width,) for name in rising}, b_down=(c.d_model,))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return `x` through the up, the gate and the down projection."""
        h = self.activation(self.linear("gate" if self.gated else "up", x))
        return self.linear("down", h * self.linear("up", x) if self.gated else h)


class MixtureOfExperts(TwinModule):
    """The experts that a router chooses for each token, and the shared ones; computed expert by expert."""

    w_router: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    router_bias: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        assert c.experts is not None
        self.experts = e = c.experts
        self.activation, self.gated, width = ACTIVATIONS[c.activation], c.gated, e.d_ff or c.F
        rising = ("gate", "up") if c.gated else ("up",)
        self.declare(**{f"w_{name}": (e.number, c.d_model, width) for name in rising}, w_router=(c.d_model, e.number))
        self.declare(w_down=(e.number, width, c.d_model))
        if e.balance == "bias":
            self.declare(router_bias=(e.number,))
            self.router_bias.requires_grad_(False)  # it follows the load, not the loss
        if e.shared:
            self.shared = FeedForward(c, e.shared * width)

    def forward(self, x: Float[Tensor, "B L D"], counted: Bool[Tensor, "B L"]) -> tuple[Float[Tensor, "B L D"], Use]:
        """Return the weighted sum of what each token's experts compute, and their use by `counted` tokens."""
        e, tokens, counted = self.experts, x.flatten(0, 1), counted.flatten()
        logits = tokens.float() @ self.w_router.to(x.dtype).float()
        probability = logits.softmax(-1)
        chosen = (probability + self.router_bias if e.balance == "bias" else probability).topk(e.active).indices
        weight = probability.gather(-1, chosen)
        if e.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in range(e.number):
            token, rank = torch.where(chosen == expert)
            y = y.index_add(0, token, weight[token, rank, None] * self._expert(expert, tokens[token]).float())
        y = y.to(x.dtype).view_as(x)

        load = torch.bincount(chosen[counted].flatten(), minlength=e.number).float()
        share, likely = load / counted.sum(), probability[counted].mean(0)
        use = Use(load, e.number * share @ likely, logits[counted].logsumexp(-1).square().mean())
        return y + self.shared(x) if e.shared else y, use

    def _expert(self, index: int, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        up, down = (w[index].to(x.dtype) for w in (self.w_up, self.w_down))
        if self.gated:
            return (self.activation(x @ self.w_gate[index].to(x.dtype)) * (x @ up)) @ down
        return self.activation(x @ up) @ down


def same_document(segments: Int[Tensor, "B L"]) -> Sequence[Bool[Tensor, " B"]]:
    """Return for each token whether the previous one is in the same document."""
    return (segments == F.pad(segments, (1, 0), value=-1)[:, :-1]).unbind(1)


def unit(x: Tensor) -> Tensor:
    """Scale the last axis of `x` to unit norm."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
