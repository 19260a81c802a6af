"""Measure attention over long rows beside PyTorch's, and what skipping blocks saves.

    python scripts/bench_attention.py [--lengths 4096 8192 8200 16384 32768] [--rounds 3] [--peer-python PYTHON]
    python scripts/bench_attention.py --masks [--length 4096]

Heads as in GPT-2 124M (12 of 64), one row, float32. The first form times causal attention by the default implementation
of this platform and by `scaled_dot_product_attention`, forward alone and with the gradients of queries, keys and
values; rows of more than 10,000 tokens are timed in one round. The second times ours under sparse masks, all in turn in
one process; a ratio is the median over rounds.
"""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from bench import Bench, row, show

HEADS, SIZE, LONG = 12, 64, 10_000
FORWARD, BACKWARD = "s forward", "s with backward"


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def numbers(length: int) -> list[np.ndarray]:
    """Return queries, keys and values, [L heads head_dim] each."""
    return list(np.random.default_rng(0).standard_normal((3, length, HEADS, SIZE), np.float32))


class Ours:
    """The default implementation of this platform."""

    def __init__(self, setting: str) -> None:
        import jax
        import jax.numpy as jnp

        from llm_jax.ops.attention import attention
        from llm_jax.ops.mask import Mask
        from llm_jax.runtime import reuse_freed_memory

        reuse_freed_memory()
        q, k, v = (jnp.asarray(x)[None] for x in numbers(int(setting)))
        q = q[..., None, :]
        attend = lambda q, k, v: attention(q, k, v, Mask())  # noqa: E731
        gradient = jax.grad(lambda *given: attend(*given).sum(), argnums=(0, 1, 2))
        forward, gradients = (jax.jit(f).lower(q, k, v).compile() for f in (attend, gradient))
        self.programs = {
            FORWARD: lambda: jax.block_until_ready(forward(q, k, v)),
            BACKWARD: lambda: jax.block_until_ready(gradients(q, k, v)),
        }

    def measure(self) -> dict[str, float]:
        """Time each program."""
        found = {name: seconds(run) for name, run in self.programs.items()}
        return found | {"GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


class PyTorch(Ours):
    """`scaled_dot_product_attention`, causal."""

    def __init__(self, setting: str) -> None:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        given: list[Any] = [torch.from_numpy(x).transpose(0, 1)[None].contiguous() for x in numbers(int(setting))]
        wanted: list[Any] = [x.clone().requires_grad_() for x in given]

        def forward() -> Any:
            with torch.no_grad():
                return scaled_dot_product_attention(*given, is_causal=True).transpose(1, 2)

        def backward() -> Any:
            return torch.autograd.grad(scaled_dot_product_attention(*wanted, is_causal=True).sum(), wanted)

        self.programs = {FORWARD: forward, BACKWARD: backward}


def masks() -> dict[str, Any]:
    from llm_jax.ops.chunked import BLOCK
    from llm_jax.ops.config import Sparse
    from llm_jax.ops.mask import Mask

    return {
        "everything": Mask(causal=False),
        "causal": Mask(),
        "window of 512": Mask(window=512),
        "strided, every 8th block": Mask(sparse=Sparse("strided", block=BLOCK, local=2, stride=8)),
        "fixed, groups of 4 blocks": Mask(sparse=Sparse("fixed", block=BLOCK, stride=4)),
        "BigBird, 2 + 1 + 2 blocks": Mask(sparse=Sparse("bigbird", block=BLOCK, local=2, first=1, random=2)),
    }


def program(mask: Any, implementation: str | None) -> Callable:
    """Return a function to output and gradients of attention under `mask`."""
    import jax
    import jax.numpy as jnp

    from llm_jax.ops.attention import attention

    def loss(q: Any, k: Any, v: Any) -> Any:
        return jnp.square(attention(q, k, v, mask, implementation=implementation)).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def measure(programs: dict[str, Callable], length: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Return the seconds of every round, and megabytes of temporaries, by name."""
    import jax

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


def show_masks(length: int, rounds: int) -> None:
    """Print what each mask costs beside full attention, and blocks beside the reference."""
    from llm_jax.ops.chunked import BLOCK
    from llm_jax.ops.mask import Mask
    from llm_jax.runtime import reuse_freed_memory

    reuse_freed_memory()
    found = measure({name: program(mask, None) for name, mask in masks().items()}, length, rounds)
    full = found["everything"][0]
    print(f"forward and backward, {length} tokens\n{'mask':28}{'blocks in view':>16}{'time':>8}{'of all':>8}{'MB':>8}")
    for name, mask in masks().items():
        times, megabytes = found[name]
        share = mask.view(length, length, BLOCK, BLOCK).mean()
        print(f"{name:28}{share:16.0%}{statistics.median(times):7.2f}s{ratio(times, full):8.2f}{megabytes:8.0f}")
    print("\nreference against chunked, causal")
    for length in (256, 512, 1024, 2048):
        forms = measure({name: program(Mask(), name) for name in ("reference", "chunked")}, length, rounds)
        (plain, much), (blocks, little) = forms["reference"], forms["chunked"]
        print(f"{length:6} tokens: chunked takes {ratio(blocks, plain):.2f} of the time, {little:.0f} of {much:.0f} MB")


def main() -> None:
    bench = Bench("attention", __doc__ or "", {"llm_jax": Ours, "PyTorch": PyTorch}, peers=("PyTorch",))
    bench.parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 8200, 16384, 32768])
    bench.parser.add_argument("--masks", action="store_true", help="time sparse masks instead")
    bench.parser.add_argument("--length", type=int, default=4096, help="of a row, with --masks")
    bench.parser.set_defaults(rounds=3)
    given = bench.arguments()
    if given.masks:
        show_masks(given.length, given.rounds)
        return
    rows = []
    for length in given.lengths:
        found = bench.rounds(str(length), number=1 if length > LONG else None)
        sides = {side: {"GB": max(of["GB"])} for side, of in found.items()}
        for quantity in (FORWARD, BACKWARD):
            what = f"causal attention over {length:,} tokens, 12 heads of 64"
            rows.append(row(what, found, quantity, goal="1.0", lower=True, sides=sides if quantity == FORWARD else {}))
        show(rows[-2:])
    bench.finish(rows)


if __name__ == "__main__":
    main()
