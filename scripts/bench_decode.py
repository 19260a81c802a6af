"""Measure how fast GPT-2 124M generates text on this machine, against `generate` of Hugging Face.

    python scripts/bench_decode.py [--rounds 5] [--peer-python PYTHON] [--batch 1 8] [--new 256]

The same random weights on every side, greedy, a prompt of 32 tokens and 256 new ones. Beside the tokens of all rows a
second stands the share of what reading the weights once a token would allow: the bandwidth is that of reading 512 MB
on all cores, measured by each side in the same round. The last row is the time to the first token of a prompt of 512
tokens over that of one forward pass. A round at batch 1 takes about a minute on two cores, one at batch 8 about two.
"""

import functools
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from bench import Bench, Rounds, row, show

PROMPT, LONG, VOCABULARY = 32, 512, 50257
NAMES = {"ours float32": "float32", "ours bfloat16": "bfloat16", "ours int8": "int8"}
GOALS = {1: "2.0", 8: "3.0"}


def prompts(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (batch, length), np.int32)


def seconds(run: Any, least: int = 1) -> float:
    """Return the shortest time of a few calls."""
    times = []
    for _ in range(least):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


def read_bandwidth() -> float:
    """Return the bytes a second that all cores together read of memory: the largest of 512 MB of numbers."""
    cores = len(os.sched_getaffinity(0))
    pieces = np.array_split(np.ones(1 << 27, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:  # NumPy releases the interpreter meanwhile
        return 2**29 / seconds(lambda: list(pool.map(np.max, pieces)), 5)


class Ours:
    """Our sampler's programs, whose weights are float32, bfloat16 or int8."""

    def __init__(self, setting: str, weights: str):
        import jax
        import jax.numpy as jnp

        from llm_jax import runtime
        from llm_jax.infer import decode
        from llm_jax.model.shapes import shapes
        from llm_jax.ops.sampling import Sampling, filters
        from llm_jax.runs.start import recipe

        runtime.start()
        (self.batch, self.new), self.decode = map(int, setting.split()), decode
        dtype = "float32" if weights == "int8" else weights
        self.config = recipe("gpt2_124m", {"model.dtype": dtype, "model.remat": "none"}).model
        draw = np.random.default_rng(0)
        random = lambda leaf: jnp.asarray(0.02 * draw.standard_normal(leaf.shape, np.float32))  # noqa: E731
        params = jax.tree.map(random, shapes(self.config))
        self.weights = decode.prepare(self.config, params, "int8" if weights == "int8" else None)
        self.bytes = bytes_of_a_token(self.config, self.weights)
        self.by, self.keys = filters(Sampling(temperature=0)), jax.random.split(jax.random.key(0), self.batch)
        self.text(least=3)
        self.prefills = self.batch == 1 and weights == "float32"
        if self.prefills:
            self.first()
            self.pass_over()

    def request(self, batch: int, length: int, new: int) -> Any:
        rows = list(prompts(batch, length))
        return self.decode.Request(rows, self.keys[:batch], self.by, new, VOCABULARY)

    def text(self, least: int | None = None) -> None:
        """Generate whole texts, or no more than the first `least` pieces."""
        pieces = self.decode.continuations(self.config, self.weights, self.request(self.batch, PROMPT, self.new))
        for _ in itertools.islice(pieces, least):
            pass

    def first(self) -> None:
        next(self.decode.continuations(self.config, self.weights, self.request(1, LONG, 1)))

    def pass_over(self) -> None:
        forward_pass(self.config)(self.weights.params, prompts(1, LONG)).block_until_ready()

    def measure(self) -> dict[str, float]:
        rate, bandwidth = self.batch * self.new / seconds(self.text), read_bandwidth()
        found = {
            "tokens/s": rate,
            "GB/s of memory": bandwidth / 1e9,
            "share of reading the weights once": rate / self.batch * self.bytes / bandwidth,
        }
        if self.prefills:
            found["first token / forward pass"] = seconds(self.first, 3) / seconds(self.pass_over, 3)
        return found


def bytes_of_a_token(config: Any, weights: Any) -> int:
    """Return how much of the weights is read for a token: all layers and the head, and of other tables one row."""
    import jax

    outside = {"embedding", "positions", config.head}
    layers = {name: tree for name, tree in weights.params.items() if name not in outside}
    head = weights.params[config.head] if weights.head is None else weights.head
    return sum(leaf.nbytes for leaf in jax.tree.leaves((layers, head)))


@functools.cache
def forward_pass(config: Any) -> Any:
    """Return a function from weights and tokens to all logits."""
    import jax

    from llm_jax.model.transformer import Transformer, forward

    model = Transformer(config, stacked=False)
    return jax.jit(lambda params, tokens: forward(model, params, tokens).logits)


class HuggingFace:
    """GPT-2 124M of transformers, with random weights, its cache on, greedy."""

    def __init__(self, setting: str):
        import torch
        import transformers

        torch.manual_seed(0)
        batch, self.new = map(int, setting.split())
        config = transformers.GPT2Config(vocab_size=50304, eos_token_id=None, bos_token_id=None)
        self.model: Any = transformers.GPT2LMHeadModel(config).eval()
        self.ids, self.no_grad = torch.from_numpy(prompts(batch, PROMPT).astype(np.int64)), torch.no_grad
        self.text(8)

    def text(self, new: int) -> None:
        with self.no_grad():
            out = self.model.generate(self.ids, use_cache=True, do_sample=False, max_new_tokens=new, pad_token_id=0)
        assert out.shape[1] == PROMPT + new

    def measure(self) -> dict[str, float]:
        return {"tokens/s": len(self.ids) * self.new / seconds(lambda: self.text(self.new))}


def rows_of(batch: int, new: int, found: Rounds) -> list[dict[str, Any]]:
    """Return the rows of one batch size."""
    what, float32, int8 = f"GPT-2 124M, batch {batch}, {new} new tokens", *list(NAMES)[::2]
    rows = [row(what, found, "tokens/s", ours=float32, peers=["Hugging Face"], goal=GOALS.get(batch, ""))]
    only = {name: found[name] for name in NAMES if name in found}
    least = "2.5" if batch == 1 else ""
    rows.append(row(f"{what}: int8 over float32", only, "tokens/s", ours=int8, peers=[float32], goal=least))
    for quantity, least in (("share of reading the weights once", "0.85"), ("GB/s of memory", "")):
        rows.append(row(what, only, quantity, ours=float32, peers=[], goal=least if batch == 1 else ""))
    if batch == 1:
        prefill = f"GPT-2 124M, first token of a prompt of {LONG} tokens, over one forward pass"
        rows.append(row(prefill, only, "first token / forward pass", ours=float32, peers=[], goal="1.5", lower=True))
    return rows


def main() -> None:
    ours = {name: functools.partial(Ours, weights=weights) for name, weights in NAMES.items()}
    bench = Bench("decode", __doc__ or "", {**ours, "Hugging Face": HuggingFace}, peers=("Hugging Face",))
    bench.parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    bench.parser.add_argument("--new", type=int, default=256, help="tokens of each row")
    bench.parser.set_defaults(rounds=5)
    given = bench.arguments()
    rows = [one for batch in given.batch for one in rows_of(batch, given.new, bench.rounds(f"{batch} {given.new}"))]
    show(rows)
    bench.finish(rows)


if __name__ == "__main__":
    main()
