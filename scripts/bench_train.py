"""Measure training speed and memory on this machine, against the model's PyTorch twin in the same run.

    .venv/bin/python scripts/bench_train.py [shakespeare_char | medium | gpt2_124m] [--rounds 8]

The sides are ours, ours without native code (ops/native), the twin in eager PyTorch, and the twin compiled; both
twins have a fused AdamW and our allocator setting. Print tokens/s, the share of the matmul peak that JAX reaches here,
the largest resident memory of a side, and the ratio to the best of PyTorch, round by round and as a median: single
figures swing by 40 % on a shared machine, ratios within one run don't. Sides whose package is missing are left out.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from bench import Bench, row, show

from llm_jax import runtime
from llm_jax.chips import measured_matmul_flops
from llm_jax.compat.sides import STEPS, peak_memory
from llm_jax.data.config import DataConfig
from llm_jax.data.loader import Batch
from llm_jax.model.config import ModelConfig
from llm_jax.model.count import flops_per_token
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

GPT = {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "gated": False,
    "bias": "all",
    "init": "gpt2",
}


def medium() -> RunConfig:
    """Return nanoGPT's GPU setting with a smaller batch: 6 layers, 6 heads, width 384, context 256, batch 8."""
    model = ModelConfig(vocab_size=65, d_model=384, n_layers=6, n_heads=6, max_seq_len=256, unroll=6, **GPT)
    return RunConfig(model=model, data=DataConfig(seq_len=256, batch_size=8, packing="windows", end_of_text=False))


def gpt2_on_a_laptop() -> RunConfig:
    """Return GPT-2 124M at context 256 and batch 2, so that it fits a laptop."""
    config = load_recipe("gpt2_124m")
    model = dataclasses.replace(config.model, max_seq_len=256, dtype="float32", remat="none", unroll=12)
    data = dataclasses.replace(config.data, seq_len=256, batch_size=2)
    return dataclasses.replace(config, model=model, data=data, accumulate=1)


SETTINGS: dict[str, Callable[[], RunConfig]] = {
    "shakespeare_char": lambda: load_recipe("shakespeare_char"),
    "medium": medium,
    "gpt2_124m": gpt2_on_a_laptop,
}


def random_batch(config: RunConfig) -> Batch:
    shape = (config.data.batch_size, config.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], segments=None, positions=None)


class Training:
    """One side: take steps on the same batch."""

    def __init__(self, name: str, setting: str, seconds: float, native: bool = True) -> None:
        runtime.reuse_freed_memory()
        runtime.NATIVE = native
        config = SETTINGS[setting]()
        self._batch, self._seconds = random_batch(config), seconds
        params = jax.device_get(Program.on(config).init().params)
        self._step = STEPS[name](config, params, itertools.repeat(1e-3))
        self.measure()  # compiles and warms up

    def measure(self) -> dict[str, float]:
        """Take at least eight steps, for at least so many seconds."""
        start, count = time.perf_counter(), 0
        while count < 8 or time.perf_counter() - start < self._seconds:
            losses = [self._step(self._batch)[0] for _ in range(4)]
            float(losses[-1])  # JAX runs ahead: wait for what was dispatched
            count += 4
        rate = count * self._batch.tokens.size / (time.perf_counter() - start)
        return {"tokens/s": rate, "GB": peak_memory() / 1e9}


class Peak:
    """How fast products of large matrices are at best."""

    def measure(self) -> dict[str, float]:
        """Measure it anew."""
        measured_matmul_flops.cache_clear()
        return {"FLOP/s": measured_matmul_flops()}


SECONDS = 2.0
SIDES: dict[str, Callable[[str], Any]] = {
    "llm_jax": lambda setting: Training("jax", setting, SECONDS),
    "llm_jax, XLA alone": lambda setting: Training("jax", setting, SECONDS, native=False),
    "PyTorch": lambda setting: Training("eager", setting, SECONDS),
    "PyTorch, compiled": lambda setting: Training("compiled", setting, SECONDS),
    "peak": lambda setting: Peak(),
}
PEERS = ("PyTorch", "PyTorch, compiled")
GOALS = {"shakespeare_char": "1.4 x", "medium": "1.1 x, 85 % of the peak", "gpt2_124m": "1.1 x, 85 % of the peak"}


def main() -> None:
    bench = Bench("train", __doc__ or "", SIDES, PEERS)
    bench.parser.add_argument("setting", nargs="?", default="shakespeare_char", choices=SETTINGS)
    setting = bench.arguments().setting
    config, rounds = SETTINGS[setting](), bench.rounds(setting)
    flops = flops_per_token(config.model, config.data.seq_len)
    peaks = rounds.pop("peak")["FLOP/s"]
    for of in rounds.values():
        of["share"] = [rate * flops / peak for rate, peak in zip(of["tokens/s"], peaks, strict=True)]
    facts = {side: {name: statistics.median(of[name]) for name in ("share", "GB")} for side, of in rounds.items()}
    speed = row(setting, rounds, "tokens/s", goal=GOALS[setting], peers=PEERS, sides=facts)
    show([speed])
    print(f"    matmul peak {statistics.median(peaks) / 1e9:.0f} GFLOP/s, {flops / 1e6:.2f} MFLOP a token")
    for side, numbers in facts.items():
        print(f"    {side:24}{numbers['share']:6.0%} of the peak, {numbers['GB']:5.2f} GB")
    bench.finish([speed])


if __name__ == "__main__":
    main()
