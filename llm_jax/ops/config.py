"""What decides how attention scores and sees, how positions rotate, and how experts are chosen.

These dataclasses belong to the config of a model, so that they need no JAX: a wrong value is refused before it starts.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from llm_jax.config import check_types


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a query and a key make a score.

    Attributes:
      scale: factor on their product; None: `H**-0.5`.
      softcap: scores are limited to (-softcap, softcap) by tanh (Gemma 2, arXiv:2408.00118).
      alibi: each head takes off its slope times the distance, in both directions (`ops/position.py`).
    """

    scale: float | None = None
    softcap: float | None = None
    alibi: bool = False

    def factor(self, H: int) -> float:
        """Return the factor on products of heads of size H."""
        return H**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A pattern of blocks of `block` positions, looking back: blocks it leaves out are never computed.

    `strided` sees the last `local` blocks and every `stride`-th before them; `fixed` sees its own group of `stride`
    blocks and the last block of every earlier group (Child et al. 2019, arXiv:1904.10509); `bigbird` sees the last
    `local` blocks, the first `first`, and `random` others, drawn once for each block and the same in every layer and
    head (Zaheer et al. 2020, arXiv:2007.14062).

    Attributes:
      pattern: how blocks are chosen.
      block: positions in a block.
      local: last blocks that `strided` and `bigbird` see.
      stride: blocks in a group of `fixed`; the step between the earlier blocks that `strided` sees.
      first: first blocks of a row that `bigbird` sees.
      random: other blocks that `bigbird` sees.

    Raise `ValueError` for a number out of its range.
    """

    pattern: Literal["strided", "fixed", "bigbird"] = "strided"
    block: int = 128
    local: int = 2
    stride: int = 8
    first: int = 1
    random: int = 2

    def __post_init__(self) -> None:
        check_types(self, "model.attention.sparse.")
        for name in ("block", "local", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.attention.sparse.{name}={getattr(self, name)} must be at least 1")
        for name in ("first", "random"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.attention.sparse.{name}={getattr(self, name)} must not be negative")

    def view(self, blocks: int) -> Bool[np.ndarray, "blocks blocks"]:
        """Return which block of queries sees which block of keys. More blocks only add rows and columns."""
        query, key = np.arange(blocks)[:, None], np.arange(blocks)[None]
        distance = query - key
        if self.pattern == "strided":
            seen = (distance < self.local) | (distance % self.stride == 0)
        elif self.pattern == "fixed":
            seen = (query // self.stride == key // self.stride) | (key % self.stride == self.stride - 1)
        else:
            seen = (distance < self.local) | (key < self.first)
            for row in range(1, blocks):
                others = np.flatnonzero(~seen[row, :row])
                seen[row, np.random.default_rng((self.random, row)).permutation(others)[: self.random]] = True
        return seen & (distance >= 0)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary embedding: pair i of a head rotates by `theta**(-2i/H)` per position (Su et al. 2021, arXiv:2104.09864).

    Raise `ValueError` for fields that are out of range or don't fit together.

    Attributes:
      theta: how slowly the last pair rotates; larger for longer rows.
      pairs: which of the R numbers that are rotated make pair i: `halves`, i and i + R/2 (GPT-NeoX, Llama and most
        since), or `interleaved`, 2i and 2i + 1 (the paper, GPT-J, GLM). Weights of one mean nothing in the other.
      fraction: of the head that is rotated, its first pairs; the rest has no position (GPT-NeoX rotates a quarter).
      scaling: how a model trained on `original_len` positions reads `factor` times as many: `linear` slows every pair
        (Chen et al. 2023, arXiv:2306.15595), `ntk` slows pair i by `factor**(2i/(H-2))`, `yarn` and `llama3` slow
        those that make fewer than `low_turns` full turns over `original_len`, leave those above `high_turns` (32 for
        YaRN, 4 for Llama 3), and blend between: by pair (Peng et al. 2023, arXiv:2309.00071), or by turns. Two depend
        on the length n of the text: `dynamic` is, beyond `original_len`, `ntk` by
        `factor * n / original_len - (factor - 1)`; `longrope` slows pair i by `long_factors[i]` beyond it, by
        `short_factors[i]` up to it (Ding et al. 2024, arXiv:2402.13753).
      factor: how many times longer the rows are than in training, for `scaling`.
      original_len: positions in training, for `yarn`, `llama3`, `dynamic` and `longrope`.
      low_turns: for `yarn` and `llama3`: turns over `original_len` up to which pairs are slowed in full.
      high_turns: for `yarn` and `llama3`: turns over `original_len` from which on pairs are not slowed at all.
      short_factors: for `longrope`: how much slower each pair rotates in texts up to `original_len`.
      long_factors: for `longrope`: how much slower each pair rotates in longer texts.
      amplitude: of the rotated queries and keys; None: 1, for `yarn` `0.1 ln(factor) + 1`, for `longrope`
        `sqrt(1 + ln(factor) / ln(original_len))`.
      local_theta: of local layers, which are never scaled (Gemma 3); None: as all others.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3", "dynamic", "longrope"] = "none"
    factor: float = 1.0
    original_len: int | None = None
    low_turns: float = 1.0
    high_turns: float = 32.0
    amplitude: float | None = None
    local_theta: float | None = None
    pairs: Literal["halves", "interleaved"] = "halves"
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "model.rotary.")
        for name in ("theta", "factor", "low_turns", "local_theta", "amplitude"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"model.rotary.{name}={value} must be positive")
        if self.theta <= 1:
            raise ValueError(f"model.rotary.theta={self.theta} must exceed 1, or all pairs rotate alike")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"model.rotary.fraction={self.fraction} must lie in (0, 1]")
        if self.high_turns <= self.low_turns:
            raise ValueError(
                f"model.rotary.high_turns={self.high_turns} must exceed model.rotary.low_turns={self.low_turns}"
            )
        if self.scaling not in ("none", "linear", "ntk") and self.original_len is None:
            raise ValueError(
                f"model.rotary.scaling={self.scaling} needs model.rotary.original_len, the positions in training"
            )
        if self.original_len is not None and self.original_len < 2:
            raise ValueError(f"model.rotary.original_len={self.original_len} must be at least 2")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if bool(factors) != (self.scaling == "longrope"):
                raise ValueError(
                    f"model.rotary.{name} has {len(factors)} numbers where model.rotary.scaling={self.scaling}, but "
                    "longrope, and it alone, takes one for each pair; give both lists with it, or leave both empty"
                )
            if any(factor <= 0 for factor in factors):
                raise ValueError(f"model.rotary.{name}={min(factors)} must be positive, as every factor of longrope")

    def check(self, H: int) -> None:
        """Raise `ValueError` for heads of size H that can't be rotated so."""
        rotated, scaling = self.rotated(H), self.scaling
        share = "" if self.fraction == 1 else f" x model.rotary.fraction={self.fraction}"
        if rotated % 2 or not rotated:
            raise ValueError(
                f"rotary positions rotate pairs: model.head_dim={H}{share} must be even; set model.head_dim={H + 1}"
            )
        if scaling in ("ntk", "dynamic") and rotated == 2:
            raise ValueError(
                f"model.rotary.scaling={scaling} slows all pairs but the first, and model.head_dim={H}{share} has no "
                f"other; set model.head_dim={2 * H}, or model.rotary.scaling=none"
            )
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if scaling == "longrope" and len(factors) != rotated // 2:
                raise ValueError(
                    f"model.rotary.{name} has {len(factors)} numbers where model.head_dim={H}{share} has "
                    f"{rotated // 2} pairs; give one for each"
                )

    @property
    def local(self) -> "Rotary":
        """The rotary embedding of local layers."""
        if self.local_theta is None:
            return self
        return Rotary(theta=self.local_theta, fraction=self.fraction, pairs=self.pairs)

    @property
    def by_length(self) -> bool:
        """Whether angles depend on the length of the text."""
        return self.scaling in ("dynamic", "longrope")

    def rotated(self, H: int) -> int:
        """Return how many of a head's H numbers are rotated, the first ones."""
        return int(H * self.fraction)

    def frequencies(self, H: int, length: Any = 0) -> Any:
        """Return the radians per position of every pair, `[pairs]`; `[B pairs]` if the lengths of B texts matter.

        `length` is a number that is known while a program is traced, or an array `[B]` of JAX.
        """
        size = self.rotated(H)
        theta = self.theta * self.factor ** (size / (size - 2)) if self.scaling == "ntk" else self.theta
        plain = theta ** (-np.arange(0, size, 2) / size)
        if self.by_length:
            return self._by_length(plain, length)
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling not in ("yarn", "llama3"):
            return plain
        kept = self._kept(plain, size)
        return plain * kept + plain / self.factor * (1 - kept)

    def _by_length(self, plain: Float[np.ndarray, " pairs"], length: Any) -> Any:
        """Return the frequencies for texts of these lengths, `[B pairs]`: in NumPy for a number, else in JAX."""
        trained, xp = self.original_len, np if isinstance(length, int) else length.__array_namespace__()
        assert trained is not None
        n, plain = xp.asarray(length, np.float32).reshape(-1, 1), plain[None].astype(np.float32)
        if self.scaling == "longrope":
            short, long = (np.array(factors, np.float32)[None] for factors in (self.short_factors, self.long_factors))
            return plain / xp.where(n > trained, long, short)
        stretch = self.factor * xp.maximum(n, trained) / trained - (self.factor - 1)
        return plain * stretch ** (-np.arange(plain.size, dtype=np.float32)[None] / (plain.size - 1))

    def _kept(self, frequencies: np.ndarray, size: int) -> np.ndarray:
        """Return the share of each pair's frequency that is not scaled."""
        trained = self.original_len
        assert trained is not None
        if self.scaling == "llama3":
            turns = trained * frequencies / (2 * math.pi)
            return np.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0, 1)

        def pair(turns: float) -> float:
            return size * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(self.theta))

        first, last = max(0, math.floor(pair(self.high_turns))), min(size - 1, math.ceil(pair(self.low_turns)))
        return 1 - np.clip((np.arange(size // 2) - first) / max(last - first, 1e-3), 0, 1)

    @property
    def scale(self) -> float:
        """The amplitude, or its default."""
        if self.amplitude is not None:
            return self.amplitude
        if self.factor <= 1 or self.original_len is None:
            return 1.0
        longrope = math.sqrt(1 + math.log(self.factor) / math.log(self.original_len))
        return {"yarn": 0.1 * math.log(self.factor) + 1, "longrope": longrope}.get(self.scaling, 1.0)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A feed-forward of many experts, of which a token uses few (Shazeer et al. 2017, arXiv:1701.06538).

    Attributes:
      number: experts that tokens are routed to, E.
      active: experts that each token goes to, k.
      d_ff: width of one expert. None: the model's.
      shared: experts that serve every token, as one feed-forward `shared * d_ff` wide (DeepSeekMoE, arXiv:2401.06066).
      renormalise: the weights of a token's experts sum to 1.
      balance: what balances the load: `loss`, an auxiliary loss; `bias`, a bias on the choice that follows the load.
      balance_weight: weight of the auxiliary loss.
      bias_rate: how far the bias of an expert moves in a step.
      router_z_loss: weight of the squared log-partition of the router; 1e-3 if its logits drift.

    Raise `ValueError` for a number out of its range.
    """

    number: int = 8
    active: int = 2
    d_ff: int | None = None
    shared: int = 0
    renormalise: bool = True
    balance: Literal["loss", "bias", "none"] = "loss"
    balance_weight: float = 0.01
    bias_rate: float = 1e-3
    router_z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "model.experts.")
        if self.number < 2:
            raise ValueError(
                f"model.experts.number={self.number} must be at least 2; for one expert set model.experts=none"
            )
        if not 1 <= self.active <= self.number:
            raise ValueError(f"model.experts.active={self.active} must lie in [1, model.experts.number={self.number}]")
        if self.active == 1 and self.renormalise:
            raise ValueError(
                "model.experts.active=1 renormalised is always weighted 1, from which the router learns nothing; "
                "set model.experts.renormalise=false"
            )
        if self.d_ff is not None and self.d_ff < 1:
            raise ValueError(f"model.experts.d_ff={self.d_ff} must be at least 1; none is the model's")
        for name in ("shared", "balance_weight", "bias_rate", "router_z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.experts.{name}={getattr(self, name)} must not be negative; 0 is off")
