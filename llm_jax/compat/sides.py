"""The sides of a comparison: ways to take the same train step, each in its own process.

In one process they would share a heap and slow each other down. As they take their steps alternately, other load on
the machine slows them equally, so that ratios within a round are reliable.
"""

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, SupportsFloat

import jax
from jaxtyping import PyTree

from llm_jax import runtime
from llm_jax.data.loader import Batch, Loader
from llm_jax.data.mixture import open_folders
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

Step = Callable[[Batch], tuple[SupportsFloat, SupportsFloat]]  # loss and gradient norm, possibly still being computed
NAMES = {"jax": "llm_jax", "eager": "PyTorch", "compiled": "compiled PyTorch"}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Some steps of a side: loss and gradient norm of each, and the seconds for all.

    `imports` and `peak` are the bytes of its process before there was a model, and at most until now.
    """

    loss: list[float]
    grad_norm: list[float]
    seconds: float
    imports: int
    peak: int


class Side:
    """A way to train, in a process that takes steps on demand and ends with this one, however that ends."""

    def __init__(self, name: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name, (self._pipe, there) = name, spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(name, there), daemon=True)
        was = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the process: Ctrl-C is handled here
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, was)
        there.close()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join(10)
        self._process.kill()  # if a compiler ignored SIGTERM
        self._process.join()

    def begin(self, config: RunConfig, folders: list[Path], params: PyTree, rates: Iterable[float]) -> None:
        """Build the model, with these parameters. Raise `ValueError` if the process fails."""
        self._ask((config, folders, params, rates))

    def train(self, steps: int) -> Stretch:
        """Take the next steps. Raise `ValueError` if the process fails."""
        return self._ask(steps)

    def _ask(self, what: Any) -> Any:
        try:
            self._pipe.send(what)
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            how = "was killed, perhaps for lack of memory" if status == -9 else "failed, as reported above"  # SIGKILL
            raise ValueError(f"the process of {NAMES[self.name]} {how} (status {status})") from None


def _serve(name: str, pipe: Connection) -> None:
    """Run the process of a side: receive a job, then take steps on demand, until it is ended or the pipe closes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an orderly exit, so that libraries clean up
    if name == "jax":
        runtime.start()
    else:
        runtime.reuse_freed_memory()
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # compiler processes might outlive this one
        importlib.import_module("llm_jax.compat.torch_step")
    imports = peak_memory()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        config, folders, params, rates = pipe.recv()
        step = STEPS[name](config, params, rates)
        batches = Loader(open_folders(config.data, folders).split("train"), config.data).batches()
        pipe.send("ready")
        while True:
            steps, start = pipe.recv(), time.perf_counter()
            taken = [step(next(batches)) for _ in range(steps)]
            loss, grad_norm = ([float(pair[i]) for pair in taken] for i in (0, 1))  # waits for the last
            pipe.send(Stretch(loss, grad_norm, time.perf_counter() - start, imports, peak_memory()))


def jax_step(config: RunConfig, params: PyTree, rates: Iterable[float]) -> Step:
    """Return the step of `llm-jax train` on one device; its rates are those of the config."""
    program = Program.on_one_device(config)
    state = program.init()
    ours = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, state.params)
    state = dataclasses.replace(state, params=ours)

    def step(batch: Batch) -> tuple[SupportsFloat, SupportsFloat]:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        return metrics["loss"], metrics["grad_norm"]

    return step


def torch_step(config: RunConfig, params: PyTree, rates: Iterable[float], *, compiled: bool = False) -> Step:
    """Return the same step on the PyTorch twin."""
    from llm_jax.compat.torch_step import TorchStep

    return TorchStep(config, params, rates, compiled=compiled)


STEPS: dict[str, Callable[[RunConfig, PyTree, Iterable[float]], Step]] = {
    "jax": jax_step,
    "eager": torch_step,
    "compiled": lambda *job: torch_step(*job, compiled=True),
}


def why_not_compiled() -> str | None:
    """Return the reason why `torch.compile` can't run here; None if it can."""
    if any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return None
    return "torch.compile needs a C++ compiler, and there is no g++ here"


def peak_memory() -> int:
    """Return the largest resident set of this process until now, in bytes. Raise `ValueError` on Windows."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started us
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    try:
        import resource
    except ImportError:
        raise ValueError("compare measures memory as Linux and macOS count it; on Windows, run it in WSL 2") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
