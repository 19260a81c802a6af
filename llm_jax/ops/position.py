"""Positions of tokens: rotary embedding and its scalings, ALiBi slopes, sinusoidal table."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llm_jax.config import check_types


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

    def frequencies(self, H: int, length: int | Int[Array, " B"] = 0) -> Float[Array | np.ndarray, "*B pairs"]:
        """Return the radians per position of every pair; with a leading B if they depend on the lengths of B texts."""
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

    def _by_length(self, plain: np.ndarray, length: int | Array) -> Float[Array | np.ndarray, "B pairs"]:
        """Return the frequencies for texts of these lengths: in NumPy if it is one that is known at trace time."""
        trained, xp = self.original_len, np if isinstance(length, int) else jnp
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


def rotary(
    x: Float[Array, "B L *heads H"],
    positions: Int[Array, "#B L"],
    config: Rotary,
    length: int | Int[Array, " B"] = 0,
) -> Float[Array, "B L *heads H"]:
    """Rotate the pairs of the first R numbers of every head by their angles at `positions`.

    Where `config.by_length`, angles depend on `length`. They are computed in float32 whatever the dtype of `x`: at
    position 4096 bfloat16 is off by whole turns.
    """
    frequencies = jnp.asarray(config.frequencies(x.shape[-1], length), jnp.float32)
    half, of_rows = frequencies.shape[-1], frequencies.ndim == 2
    angles = positions.astype(jnp.float32)[..., None] * (frequencies[:, None] if of_rows else frequencies[None, None])
    angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), half)
    cos, sin = ((f(angles) * config.scale).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    if config.pairs == "halves":
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    first, second, rest = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
    together = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([together.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)


def alibi_slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """Return how much each head takes off a score per position of distance (Press et al. 2021, arXiv:2108.12409).

    They are `2**(-8 i / heads)` for a power of two; else those of the power below, and every other one of the power
    above. The paper looks back only; keys that are seen ahead, as in a prefix, lose as much.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, between[: heads - power]])


def sinusoidal(positions: Int[Array, "B L"], d_model: int) -> Float[Array, "B L D"]:
    """Return sines then cosines of `positions / 10000**(2i/D)` (Vaswani et al. 2017, arXiv:1706.03762), float32."""
    frequencies = 10_000.0 ** (-jnp.arange(d_model // 2, dtype=jnp.float32) / (d_model // 2))
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
