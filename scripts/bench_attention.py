"""Measure what skipping blocks saves: attention under sparse masks, against full attention in the same run.

    python scripts/bench_attention.py [--length 4096] [--rounds 5]

Heads as in GPT-2 124M (12 of 64), one row, float32, the default implementation of this platform. Each round runs
all masks in turn, so that a busy machine slows all alike; a ratio is the median over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.ops.attention import LONG, attention
from llm_jax.ops.chunked import BLOCK
from llm_jax.ops.config import Sparse
from llm_jax.ops.mask import Mask
from llm_jax.runtime import reuse_freed_memory

HEADS, SIZE = 12, 64


def masks() -> dict[str, Mask]:
    return {
        "everything": Mask(causal=False),
        "causal": Mask(),
        "window of 512": Mask(window=512),
        "strided, every 8th block": Mask(sparse=Sparse("strided", block=BLOCK, local=2, stride=8)),
        "fixed, groups of 4 blocks": Mask(sparse=Sparse("fixed", block=BLOCK, stride=4)),
        "BigBird, 2 + 1 + 2 blocks": Mask(sparse=Sparse("bigbird", block=BLOCK, local=2, first=1, random=2)),
    }


def program(mask: Mask, implementation: str | None) -> Callable:
    """Return a function to output and gradients of attention under `mask`."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.square(attention(q, k, v, mask, implementation=implementation)).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def measure(programs: dict[str, Callable], length: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Return the seconds of every round, and megabytes of temporaries, by name."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, length, HEADS, 1, SIZE))
    k, v = (jax.random.normal(key, (1, length, HEADS, SIZE)) for key in keys[1:])
    compiled = {name: jax.jit(run).lower(q, k, v).compile() for name, run in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(rounds + 1):
        for name, run in compiled.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(q, k, v))
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
    memory: dict[str, Any] = {name: run.memory_analysis() for name, run in compiled.items()}
    return {name: (seconds[name], memory[name].temp_size_in_bytes / 1e6) for name in programs}


def ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    reuse_freed_memory()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; forward and backward, {args.length} tokens")
    found = measure({name: program(mask, None) for name, mask in masks().items()}, args.length, args.rounds)
    full = found["everything"][0]
    print(f"{'mask':28}{'blocks in view':>16}{'time':>8}{'of all':>8}{'MB':>8}")
    for name, mask in masks().items():
        seconds, megabytes = found[name]
        share = mask.view(args.length, args.length, BLOCK, BLOCK).mean()
        print(f"{name:28}{share:16.0%}{statistics.median(seconds):7.2f}s{ratio(seconds, full):8.2f}{megabytes:8.0f}")
    print(f"\nreference against chunked, causal; chunked is the default on a CPU from {LONG} tokens on")
    for length in (256, 512, 1024, 2048):
        forms = measure({name: program(Mask(), name) for name in ("reference", "chunked")}, length, args.rounds)
        (plain, much), (blocks, little) = forms["reference"], forms["chunked"]
        print(f"{length:6} tokens: chunked takes {ratio(blocks, plain):.2f} of the time, {little:.0f} of {much:.0f} MB")


if __name__ == "__main__":
    main()
