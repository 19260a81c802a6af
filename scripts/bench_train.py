"""Training speed on this machine, beside a plain PyTorch GPT measured in turn in the same run.

    .venv/bin/python scripts/bench_train.py [shakespeare_char | medium | gpt2_124m] [--rounds 8] [--seconds 2]

Prints tokens/s, the share of the matmul peak that JAX itself measures here, and the ratio to PyTorch eager, round
by round and as a median: single figures swing by 40 % on a shared machine, ratios within one run don't. Without
PyTorch (`pip install torch`) it prints our own figures alone.
"""

import argparse
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import SupportsFloat

import numpy as np

from llm_jax.data.loader import Batch, DataConfig
from llm_jax.hardware import measured_matmul_flops, reuse_freed_memory
from llm_jax.model.config import ModelConfig
from llm_jax.model.count import flops_per_token
from llm_jax.train.program import Program
from llm_jax.train.run import RunConfig, load_recipe

Step = Callable[[], SupportsFloat]

GPT = {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "gated": False,
    "bias": True,
    "init": "gpt2",
}


def medium() -> RunConfig:
    """6 layers, 6 heads, width 384, context 256, batch 8, characters: nanoGPT's GPU setting, shrunk in batch."""
    model = ModelConfig(vocab_size=65, d_model=384, n_layers=6, n_heads=6, max_seq_len=256, unroll=6, **GPT)
    return RunConfig(model=model, data=DataConfig(seq_len=256, batch_size=8, packing="windows", end_of_text=False))


def gpt2_on_a_laptop() -> RunConfig:
    """GPT-2 124M at context 256 and batch 2, so that it fits a laptop."""
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


def ours(config: RunConfig, batch: Batch) -> Step:
    """The library's own train step: what `llm-jax train` runs."""
    program = Program.on(config)
    state = program.init()

    def step() -> SupportsFloat:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        return metrics["loss"]  # on the device still: the caller waits for it

    return step


def theirs(config: RunConfig, batch: Batch) -> Step | None:
    """A GPT-2 of the same sizes in eager PyTorch with its fused attention and fused AdamW; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    from torch import nn
    from torch.nn import functional as F

    c = config.model

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(c.d_model), nn.LayerNorm(c.d_model)
            self.qkv, self.out = (
                nn.Linear(c.d_model, 3 * c.d_model, bias=c.bias == "all"),
                nn.Linear(c.d_model, c.d_model, bias=c.bias == "all"),
            )
            self.up, self.down = (
                nn.Linear(c.d_model, c.F, bias=c.bias == "all"),
                nn.Linear(c.F, c.d_model, bias=c.bias == "all"),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            B, L, D = x.shape
            q, k, v = (y.view(B, L, c.n_heads, c.H).transpose(1, 2) for y in self.qkv(self.norm_1(x)).split(D, dim=2))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, L, D)
            x = x + self.out(z)
            return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = (
                nn.Embedding(c.vocab_size, c.d_model),
                nn.Embedding(c.max_seq_len, c.d_model),
            )
            self.blocks, self.norm = (
                nn.ModuleList(Block() for _ in range(c.n_layers)),
                nn.LayerNorm(c.d_model),
            )

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.tokens.weight.T
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model = GPT2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, targets = (torch.from_numpy(x.astype(np.int64)) for x in (batch.tokens, batch.targets))

    def step() -> float:
        loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


SIDES = {"llm_jax": ours, "pytorch": theirs}
step_here: Step | None = None  # of the one side that this process runs


def begin(side: str, setting: str) -> None:
    global step_here
    reuse_freed_memory()
    config = SETTINGS[setting]()
    step_here = SIDES[side](config, random_batch(config))


def steps_per_second(seconds: float) -> float | None:
    """Over at least eight steps; None without PyTorch."""
    if step_here is None:
        return None
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
    sides = {side: ProcessPoolExecutor(1, spawn, begin, (side, arguments.setting)) for side in SIDES}

    def rate(side: str) -> float | None:
        return sides[side].submit(steps_per_second, arguments.seconds).result()

    sides = {side: sides[side] for side in sides if rate(side) is not None}  # compiles and warms up
    config = SETTINGS[arguments.setting]()
    tokens, flops = random_batch(config).tokens.size, flops_per_token(config.model, config.data.seq_len)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    peaks = []
    for _ in range(arguments.rounds):
        measured_matmul_flops.cache_clear()
        peaks.append(measured_matmul_flops())
        for side in sides:
            rates[side].append((rate(side) or 0.0) * tokens)
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
