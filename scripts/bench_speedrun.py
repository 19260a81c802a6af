"""Measure the time from nothing to a validation loss of 1.88 nats a character on tiny Shakespeare.

    python scripts/bench_speedrun.py --text tinyshakespeare.txt --seeds 5

The clock starts with the process of a side, and runs while it imports, reads the raw text, tokenizes, compiles and
trains; programs are compiled anew. Both sides have nanoGPT's split, the first 90 % of the characters, and are scored on
all of the rest, in rows of 64. Scoring is outside the clock for both, and so are the C++ of ops/native, which is
compiled once a machine, and what the twin needs of JAX: its import, and the weights that it starts from.

- llm_jax trains `configs/shakespeare_fast.py` to its last step, and is scored there.
- PyTorch is the eager twin of `configs/shakespeare_char.py` under nanoGPT's own recipe for a CPU (which does not
  compile): 4 layers, width 128, batch 12, 2,000 steps, AdamW. It is scored every 250 steps, and its time is that of the
  first score of at most 1.88, or of the last step where it reaches none: the row "validation loss" says which.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GOAL, EVERY, SCORED_ROWS = 1.88, 250, 128


class Clock:
    """Seconds since a moment of `time.monotonic`, which all processes share, without those that are `paused`."""

    def __init__(self, began: float):
        self._began, self._paused = began, 0.0

    def read(self) -> float:
        """Return the seconds."""
        return time.monotonic() - self._began - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop for what is no part of training."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start


def prepared(recipe: str, text: Path, seed: int, folder: Path) -> tuple[Any, Any]:
    """Return the config of a recipe on nanoGPT's split of `text`, and the store of its tokens."""
    from llm_jax.data.prepare import prepare
    from llm_jax.data.shards import open_shards
    from llm_jax.runs.start import recipe as load

    characters = text.read_text(encoding="utf-8")
    cut = int(len(characters) * 0.9)
    (folder / "text").mkdir()
    for name, half in (("0.txt", characters[:cut]), ("1.txt", characters[cut:])):
        (folder / "text" / name).write_text(half, encoding="utf-8")
    rules: dict[str, Any] = {"tokenizer": "char", "end_of_text": False, "heldout": 0.2, "heldout_by": "tail"}
    prepare(str(folder / "text"), folder / "tokens", workers=1, **rules)  # of the two files, the last is held out
    changes = {"data.uri": str(folder / "tokens"), "data.separator": None, "data.heldout": 0.2}
    return load(recipe, changes, seed=seed, **{"data.seed": seed}), open_shards(folder / "tokens")


def heldout(config: Any, store: Any, nll: Callable[[Any], Any]) -> float:
    """Return the mean over the whole held-out split of `nll(batch)`, a sum over the targets of a batch."""
    from llm_jax.data.loader import IGNORE, heldout_rows

    data, total, count = dataclasses.replace(config.data, batch_size=SCORED_ROWS), 0.0, 0
    for batch in heldout_rows(store.split("heldout"), data):
        total += float(nll(dataclasses.replace(batch, documents=None)))
        count += int((batch.targets != IGNORE).sum())
    return total / count


def ours(clock: Clock, text: Path, seed: int, folder: Path) -> dict[str, float]:
    """Train our recipe to its end; return seconds, loss, and what the seconds went to."""
    from llm_jax import runtime

    runtime.start()
    import jax

    from llm_jax.data.loader import Loader
    from llm_jax.ops import native
    from llm_jax.train.program import Program

    jax.config.update("jax_enable_compilation_cache", False)
    with clock.paused():
        native.not_built()
    config, store = prepared("shakespeare_fast", text, seed, folder)
    program = Program.on_one_device(config)
    state, began = program.init(), clock.read()
    with contextlib.closing(Loader(store.split("train"), config.data).batches()) as batches:
        state, _ = program.train_step(state, next(batches))
        jax.block_until_ready(state)
        first = clock.read()
        for batch in itertools.islice(batches, config.steps - 1):
            state, _ = program.train_step(state, batch)
        jax.block_until_ready(state)
    seconds = clock.read()

    def nll(batch: Any) -> float:
        return float(scoring.score(state.params, batch).nll.sum())

    scored = dataclasses.replace(config.data, batch_size=SCORED_ROWS)
    scoring = Program.on_one_device(dataclasses.replace(config, data=scored))
    found = {"seconds": seconds, "loss": heldout(config, store, nll), "steps": config.steps}
    return found | {"seconds to the first step": began, "seconds of steps": seconds - first}


def twin(clock: Clock, text: Path, seed: int, folder: Path) -> dict[str, float]:
    """Train nanoGPT's recipe until it reaches the goal, or to its end; return what `ours` returns."""
    import numpy as np
    import torch

    from llm_jax import runtime

    runtime.reuse_freed_memory()  # our allocator setting, as in bench_train.py
    with clock.paused():
        import jax

        from llm_jax.compat.torch_step import TorchStep, tensors
        from llm_jax.data.loader import Loader
        from llm_jax.train.optimizer import make_schedule
        from llm_jax.train.program import Program
    config, store = prepared("shakespeare_char", text, seed, folder)
    with clock.paused():
        params = jax.device_get(Program.on_one_device(config).init().params)
        schedule = make_schedule(config.optimizer, config.steps)
        rates = np.asarray(jax.vmap(schedule)(np.arange(config.steps))).tolist()
    step, began = TorchStep(config, params, rates), clock.read()

    @torch.no_grad()
    def nll(batch: Any) -> float:
        return float(step.loss(**tensors(batch))[0])

    with contextlib.closing(Loader(store.split("train"), config.data).batches()) as batches:
        for number in range(1, config.steps + 1):
            step(next(batches))
            if number % EVERY == 0 or number == config.steps:
                seconds = clock.read()
                with clock.paused():
                    loss = heldout(config, store, nll)
                if loss <= GOAL or number == config.steps:
                    found = {"seconds": seconds, "loss": loss, "steps": number}
                    return found | {"seconds to the first step": began, "seconds of steps": seconds - began}
    raise AssertionError("the last step returns")


RUNS: dict[str, Callable[[Clock, Path, int, Path], dict[str, float]]] = {"llm_jax": ours, "PyTorch": twin}


class Training:
    """One side: train once for each measurement, with the next seed, in a new process."""

    def __init__(self, name: str, text: str):
        self._name, self._text, self._seeds = name, text, itertools.count()

    def measure(self) -> dict[str, float]:
        """Return what a run gave. Raise `SystemExit` where its process fails."""
        command = [sys.executable, sys.argv[0], "--run", self._name, str(next(self._seeds)), str(time.monotonic())]
        done = subprocess.run([*command, "--text", self._text], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def run(name: str, seed: str, began: str, text: Path) -> None:
    """Be the process of one run."""
    with tempfile.TemporaryDirectory(prefix="bench_speedrun_") as folder:
        print(json.dumps(RUNS[name](Clock(float(began)), text, int(seed), Path(folder))))


def main() -> None:
    if "--run" in sys.argv:  # before anything else is imported
        parser = argparse.ArgumentParser()
        parser.add_argument("--run", nargs=3)
        parser.add_argument("--text", type=Path)
        given = parser.parse_args()
        name, seed, began = given.run
        run(name, seed, began, given.text)
        return

    from bench import Bench, row, show

    sides = {name: lambda text, name=name: Training(name, text) for name in RUNS}
    bench = Bench("speedrun", __doc__ or "", sides, peers=("PyTorch",))
    bench.parser.add_argument("--text", default="tinyshakespeare.txt", help="the raw text, which is not ours to ship")
    bench.parser.add_argument("--seeds", type=int, default=5, help="runs of each side, in turn")
    given = bench.arguments()
    if not Path(given.text).is_file():
        raise SystemExit(f"no file {given.text}; configs/shakespeare_char.py says where tiny Shakespeare is")
    found = bench.rounds(given.text, number=given.seeds)
    what = "tiny Shakespeare, from nothing"
    facts = {side: {name: statistics.median(of[name]) for name in list(of)[2:]} for side, of in found.items()}
    seeds = {side: {name: of[name] for name in ("seconds", "loss")} for side, of in found.items()}
    rows = [
        row(f"{what} to {GOAL} nats", found, "seconds", goal="8 x", lower=True, sides=facts, seeds=seeds),
        row(f"{what}: validation loss", found, "loss", goal=f"at most {GOAL}", lower=True),
    ]
    show(rows)
    for side, of in found.items():
        low, high = min(of["seconds"]), max(of["seconds"])
        reached = sum(loss <= GOAL for loss in of["loss"])
        print(f"    {side:24}{low:.1f} to {high:.1f} s; {reached} of {len(of['loss'])} seeds reach {GOAL}")
        print(f"    {'':24}loss {min(of['loss']):.4f} to {max(of['loss']):.4f}, after {of['steps']} steps")
    bench.finish(rows)


if __name__ == "__main__":
    main()
