"""Measure how long the command line takes to begin, and how compile time grows with depth.

    python scripts/bench_start.py [--rounds 8] [--dry]

Each round starts every command once, in a process of its own: help, a config that is refused, `show` (until its counts
are there, and whole), and two steps of training from a warm cache of compiled programs and prepared data; `import jax`
and `import torch` are beside them. Wall and CPU seconds, medians over the rounds; a round before the first fills the
caches. Then the train step of a small model is compiled without a cache, its layers in a scan, at 12, 48 and 96 layers.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import ROOT, Bench, row, show

CLI = [sys.executable, "-m", "llm_jax"]
WORDS = "The king had three sons, and the youngest of them was called Dummling. "
TWO_STEPS = ["steps=2", "optimizer.warmup_steps=0", "model.vocab_size=512", "data.tokenizer=byte"]

# What is started -> the wall seconds that it may take.
GOALS: dict[str, float | None] = {
    "help": 0.5,
    "refusal": 1.0,
    "counts": 1.0,
    "show": 2.5,
    "two_steps": 5.0,
    "import_jax": None,
    "import_torch": None,
}
DEPTHS = (12, 48, 96)
COUNTS = "from llm_jax.plan.describe import describe; from llm_jax.runs.start import recipe; describe(recipe({!r}))"


class Command:
    """A command that is started anew for each measurement."""

    def __init__(self, words: Sequence[str], prepare: bool = False, status: int = 0):
        self._words, self._status = list(words), status
        self._folder = Path(tempfile.mkdtemp(prefix="bench_start_"))
        self._prepare = prepare
        if prepare:
            (self._folder / "text").mkdir()
            for number in range(400):
                (self._folder / "text" / f"{number}.txt").write_text(f"{number} {WORDS * 20}", encoding="utf-8")
        self.measure()  # fills the caches, of files too

    def measure(self) -> dict[str, float]:
        """Return wall and CPU seconds of one start."""
        words = list(self._words)
        if self._prepare:
            words += [f"data.uri={self._folder / 'text'}", "--run", str(self._folder / f"run_{time.time_ns()}")]
        before, start = _cpu_of_children(), time.perf_counter()
        done = subprocess.run(words, cwd=ROOT, env=self._environment(), capture_output=True, text=True)
        wall, cpu = time.perf_counter() - start, _cpu_of_children() - before
        if done.returncode != self._status:
            raise SystemExit(f"{' '.join(words)} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return {"wall_seconds": wall, "cpu_seconds": cpu}

    def _environment(self) -> dict[str, str]:
        return os.environ | {"LLM_JAX_CACHE": str(self._folder / "cache")}


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Compiling:
    """The compile time of a train step at some depths, without a cache."""

    def __init__(self, setting: str):
        from llm_jax import runtime

        runtime.start()
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
        compile_step(2)  # what is done once in a process is no matter of depth

    def measure(self) -> dict[str, float]:
        """Return the seconds of tracing and compiling, by depth."""
        found: dict[str, float] = {}
        for layers in DEPTHS:
            start = time.perf_counter()
            compile_step(layers)
            found[f"{layers}_layers_seconds"] = time.perf_counter() - start
        return found


def compile_step(layers: int) -> None:
    """Trace and compile the train step of a small model with so many layers, all in one scan."""
    import jax

    from llm_jax.runs.start import recipe
    from llm_jax.train.program import Program

    config = recipe("quickstart", {"model.n_layers": layers, "model.unroll": 1, "optimizer.name": "adamw"})
    jax.clear_caches()
    Program.on_one_device(config).lowered().compile()


SIDES: dict[str, Any] = {
    "help": lambda _: Command([*CLI, "help"]),
    "refusal": lambda _: Command([*CLI, "train", "quickstart", "model.d_model=7"], status=2),
    "counts": lambda recipe: Command([sys.executable, "-c", COUNTS.format(recipe)]),
    "show": lambda recipe: Command([*CLI, "show", recipe]),
    "two_steps": lambda _: Command([*CLI, "train", "quickstart", *TWO_STEPS], prepare=True),
    "import_jax": lambda _: Command([sys.executable, "-c", "import jax"]),
    "import_torch": lambda _: Command([sys.executable, "-c", "import torch"]),
    "compiling": Compiling,
}


def main() -> None:
    bench = Bench("start", __doc__ or "", SIDES, peers=("import_torch",))
    bench.parser.add_argument("--recipe", default="llama2_7b", help="that `show` shows")
    given = bench.arguments()
    measured = bench.rounds(given.recipe, names=list(GOALS))
    rows = []
    for side, goal in GOALS.items():
        if side not in measured:
            continue
        alone = {side: measured[side]}
        for quantity in ("wall_seconds", "cpu_seconds"):
            said = f"at most {goal} s" if goal and quantity == "wall_seconds" else ""
            rows.append(row(side.replace("_", " "), alone, quantity, ours=side, goal=said, lower=True))
    depths = bench.rounds(given.recipe, names=["compiling"], number=min(3, given.rounds))
    if "compiling" in depths:
        rows += depth_rows(depths["compiling"])
    show(rows)
    bench.finish(rows)


def depth_rows(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return the compile seconds of each depth, and that of the deepest over that of the shallowest."""
    first, last = (f"{depth}_layers_seconds" for depth in (DEPTHS[0], DEPTHS[-1]))
    growth = [deep / flat for deep, flat in zip(seconds[last], seconds[first], strict=True)]
    rows = []
    for depth in DEPTHS:
        alone = {"llm_jax": {"seconds": seconds[f"{depth}_layers_seconds"]}}
        rows.append(row(f"compile a train step, {depth} layers", alone, "seconds", lower=True))
    what = f"compile time of {DEPTHS[-1]} layers over {DEPTHS[0]}"
    return [*rows, row(what, {"llm_jax": {"x": growth}}, "x", goal="at most 1.2", lower=True)]


if __name__ == "__main__":
    main()
