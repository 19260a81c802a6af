"""Positions in PyTorch: rotary embedding and its scalings, ALiBi, sinusoids."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_jax.ops.config import Rotary


def rotate(
    x: Float[Tensor, "B heads L H"], cos: Float[Tensor, "B 1 L P"], sin: Float[Tensor, "B 1 L P"], pairs: str
) -> Tensor:
    """Rotate the first numbers of every head in pairs, each as a complex number."""
    rotated, rest = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    shape = (-1, 2) if pairs == "interleaved" else (2, -1)  # the numbers of a pair are adjacent, or half of them apart
    along = -1 if pairs == "interleaved" else -2
    real, imaginary = rotated.unflatten(-1, shape).unbind(along)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=along)
    return torch.cat([rotated.flatten(-2), rest], dim=-1)


def rotations(r: Rotary, H: int, positions: Int[Tensor, "B L"]) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the angle of each pair at `positions`, times the amplitude."""
    slow = frequencies(r, H, positions.shape[1])
    angles = positions[:, None, :, None] * slow.to(positions.device, torch.float32)
    return angles.cos() * r.scale, angles.sin() * r.scale


def frequencies(r: Rotary, H: int, length: int) -> Float[Tensor, " pairs"]:
    """Return the radians per position of each pair of a head, as the scaling changes them for texts of `length`."""
    size, trained = int(H * r.fraction), r.original_len or 0
    pair = torch.arange(size // 2, dtype=torch.float64)
    stretch = {"ntk": r.factor, "dynamic": 1 + r.factor * max(length - trained, 0) / max(trained, 1)}.get(r.scaling)
    theta = r.theta if stretch is None else r.theta * stretch ** (size / (size - 2))
    plain = torch.pow(theta, -2 * pair / size)
    if r.scaling == "longrope":
        return plain / torch.tensor(r.long_factors if length > trained else r.short_factors, dtype=torch.float64)
    slowed = torch.zeros_like(pair)
    if r.scaling == "linear":
        slowed = torch.ones_like(pair)
    elif r.scaling == "llama3":
        made = trained * plain / (2 * math.pi)  # full rotations over all positions of training
        slowed = ((r.high_turns - made) / (r.high_turns - r.low_turns)).clamp(0, 1)
    elif r.scaling == "yarn":
        ends = (math.log(trained / (2 * math.pi * n), theta) * size / 2 for n in (r.high_turns, r.low_turns))
        first, last = (max(math.floor(next(ends)), 0), min(math.ceil(next(ends)), size - 1))
        slowed = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
    return torch.lerp(plain, plain / r.factor, slowed)


def alibi_slopes(heads: int) -> list[float]:
    """Return a geometric series down to 2**-8; if `heads` is no power of two, also every other term of a finer one."""
    power = 2 ** int(math.log2(heads))
    ladder = [[2 ** (-8 * rung / rungs) for rung in range(1, rungs + 1)] for rungs in (power, 2 * power)]
    return ladder[0] + ladder[1][::2][: heads - power]


def sinusoidal(positions: Int[Tensor, "B L"], width: int) -> Float[Tensor, "B L D"]:
    """Return the sinusoidal embedding of `positions` (Vaswani et al. 2017, arXiv:1706.03762)."""
    waves = torch.pow(10_000.0, -torch.arange(0, width, 2, device=positions.device) / width)
    angles = positions[..., None] * waves
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
