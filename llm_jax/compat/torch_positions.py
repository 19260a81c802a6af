"""Where a token stands, in PyTorch: rotary embedding and its scalings, ALiBi, sinusoids."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_jax.ops.position import Rotary


def turn(x: Float[Tensor, "B heads L H"], cos: Float[Tensor, "B 1 L R"], sin: Float[Tensor, "B 1 L R"]) -> Tensor:
    """The first R numbers of every head as pairs `(x[i], x[i + R/2])`, each turned by its angle."""
    turned, rest = x.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)
    return torch.cat([turned, rest], dim=-1)


def turns(r: Rotary, H: int, positions: Int[Tensor, "B L"]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at `positions`, each pair's twice, times the amplitude."""
    angles = positions[:, None, :, None] * frequencies(r, H).to(positions.device, torch.float32)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * r.scale, angles.sin() * r.scale


def frequencies(r: Rotary, H: int) -> Float[Tensor, " pairs"]:
    """Radians a position of each pair of a head, those that a scaling slows down the slower."""
    size = int(H * r.fraction)
    pair = torch.arange(size // 2, dtype=torch.float64)
    theta = r.theta * r.factor ** (size / (size - 2)) if r.scaling == "ntk" else r.theta
    plain = torch.pow(theta, -2 * pair / size)
    if r.scaling in ("none", "ntk"):
        return plain
    slowed, trained = torch.ones_like(pair), r.original_len or 0
    if r.scaling == "llama3":
        made = trained * plain / (2 * math.pi)  # turns over all positions of training
        slowed = ((r.high_turns - made) / (r.high_turns - r.low_turns)).clamp(0, 1)
    elif r.scaling == "yarn":
        ends = (math.log(trained / (2 * math.pi * n), theta) * size / 2 for n in (r.high_turns, r.low_turns))
        first, last = (max(math.floor(next(ends)), 0), min(math.ceil(next(ends)), size - 1))
        slowed = ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
    return torch.lerp(plain, plain / r.factor, slowed)


def alibi_slopes(heads: int) -> list[float]:
    """A geometric ladder to 2**-8; where `heads` is no power of two, every other rung of a finer one besides."""
    power = 2 ** int(math.log2(heads))
    ladder = [[2 ** (-8 * rung / rungs) for rung in range(1, rungs + 1)] for rungs in (power, 2 * power)]
    return ladder[0] + ladder[1][::2][: heads - power]


def sinusoidal(positions: Int[Tensor, "B L"], width: int) -> Float[Tensor, "B L D"]:
    waves = torch.pow(10_000.0, -torch.arange(0, width, 2, device=positions.device) / width)
    angles = positions[..., None] * waves
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
