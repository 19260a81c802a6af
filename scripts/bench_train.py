"""Measure training speed on this machine, against the model's PyTorch twin in the same run.

    .venv/bin/python scripts/bench_train.py [shakespeare_char | medium | gpt2_124m] [--rounds 8] [--seconds 2]

Print tokens/s, the share of the matmul peak that JAX itself reaches here, and the ratio to PyTorch eager, round
by round and as a median: single figures swing by 40 % on a shared machine, ratios within one run don't. Without
PyTorch (`pip install torch`) print our own figures alone.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import SupportsFloat

import jax
import numpy as np

from llm_jax.chips import measured_matmul_flops
from llm_jax.compat.sides import STEPS
from llm_jax.data.config import DataConfig
from llm_jax.data.loader import Batch
from llm_jax.model.config import ModelConfig
from llm_jax.model.count import flops_per_token
from llm_jax.runs.start import load_recipe
from llm_jax.runtime import reuse_freed_memory
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

Step = Callable[[], SupportsFloat]

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


SIDES = {"llm_jax": "jax", "pytorch": "eager"}
step_here: Step | None = None  # that of the one side which this process runs


def begin(side: str, setting: str) -> None:
    global step_here
    reuse_freed_memory()
    config = SETTINGS[setting]()
    batch, params = random_batch(config), jax.device_get(Program.on(config).init().params)
    step = STEPS[SIDES[side]](config, params, itertools.repeat(1e-3))
    step_here = lambda: step(batch)[0]  # noqa: E731  (JAX's loss is still on the device: the caller waits for it)


def steps_per_second(seconds: float) -> float:
    """Measure over at least eight steps and `seconds`."""
    assert step_here is not None
    start, count = time.perf_counter(), 0
    while True:
        loss = step_here()
        count += 1
        if count % 4 == 0:
            float(loss)  # JAX runs ahead: wait for what was dispatched
            if count >= 8 and time.perf_counter() - start > seconds:
                return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", nargs="?", default="shakespeare_char", choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="a round, for each side")
    arguments = parser.parse_args()

    # A process for each side: in one they would share a heap and slow each other.
    spawn = multiprocessing.get_context("spawn")
    names = list(SIDES) if importlib.util.find_spec("torch") else ["llm_jax"]
    sides = {side: ProcessPoolExecutor(1, spawn, begin, (side, arguments.setting)) for side in names}

    def rate(side: str) -> float:
        return sides[side].submit(steps_per_second, arguments.seconds).result()

    for side in sides:
        rate(side)  # compiles and warms up
    config = SETTINGS[arguments.setting]()
    tokens, flops = random_batch(config).tokens.size, flops_per_token(config.model, config.data.seq_len)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    peaks = []
    for _ in range(arguments.rounds):
        measured_matmul_flops.cache_clear()
        peaks.append(measured_matmul_flops())
        for side in sides:
            rates[side].append(rate(side) * tokens)
    print(f"{arguments.setting}: {tokens} tokens a step, {flops / 1e6:.2f} MFLOP a token")
    print(f"matmul peak {statistics.median(peaks) / 1e9:.0f} GFLOP/s (median of {len(peaks)})")
    for side, values in rates.items():
        share = statistics.median(value * flops / peak for value, peak in zip(values, peaks, strict=True))
        print(f"{side:8}  {statistics.median(values):10,.0f} tokens/s   {share:4.0%} of peak")
    if "pytorch" in rates:
        ratios = sorted(a / b for a, b in zip(rates["llm_jax"], rates["pytorch"], strict=True))
        print(f"ratio     {statistics.median(ratios):.2f}  (rounds {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
