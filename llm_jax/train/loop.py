"""The training loop: `train` starts a run, `resume` goes on with one; both leave a folder that explains itself."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from rich.console import Console

from llm_jax import log
from llm_jax.data.loader import Loader, heldout_rows
from llm_jax.data.shards import Shards, cached, open_shards
from llm_jax.hardware import peak_flops
from llm_jax.infer.generate import generate
from llm_jax.model.config import flops_per_token, parameter_counts
from llm_jax.model.taps import capture
from llm_jax.ops.sampling import Sampling
from llm_jax.train import run
from llm_jax.train.checkpoint import Checkpoints, Progress
from llm_jax.train.evaluate import Evaluation, evaluate, token_lengths
from llm_jax.train.program import Program
from llm_jax.train.report import write_report
from llm_jax.train.run import RunConfig
from llm_jax.train.step import Metrics, TrainState, cast


class Diverged(ValueError):
    """Loss or gradient was not finite for too many steps in a row."""


def cache_folder() -> Path:
    """Where prepared data and compiled programs are kept: $LLM_JAX_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("LLM_JAX_CACHE", f"{base}/llm_jax")).expanduser()


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, for programs of any size."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def open_data(config: RunConfig, report: Callable[[str], None]) -> Shards:
    """The token shards of `config.data`, prepared on first use. Raises `ValueError` if the vocabulary is too small."""
    prepared = Path(config.data.uri) / "meta.json"
    shards = open_shards(config.data.uri if prepared.is_file() else cached(config.data, cache_folder() / "data", report))
    if shards.manifest.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {shards.manifest.vocab_size} ids, but model.vocab_size={config.model.vocab_size}; "
            f"use at least model.vocab_size={-(-shards.manifest.vocab_size // 64) * 64}"
        )
    return shards


def train(config: RunConfig, folder: str | Path, *, console: Console | None = None, command: str = "") -> Progress:
    """Starts a run of `config` in `folder`. Raises `ValueError`, with nothing written, for whatever can't work."""
    folder, console = Path(folder), console or Console()
    if run.is_run(folder):
        raise ValueError(f"{folder} already holds a run; go on with: llm-jax resume {folder}, or choose another --run")
    shards, program = open_data(config, console.print), Program.on(config)
    Loader(shards.split("train"), config.data).check_horizon(config.steps)
    weights = None if config.init_from is None else load_weights(config.init_from, program, console.print)
    state = program.init()
    if weights is not None:
        state = state.replace(params=weights)
    run.create(folder, config, shards.tokenizer, command)
    return Session(config, folder, shards, program, console).go(state, Progress())


def resume(
    folder: str | Path, *, steps: int | None = None, console: Console | None = None
) -> Progress:
    """Goes on exactly where the run in `folder` stopped; `steps` sets a new total, to which the schedule stretches."""
    folder, console = Path(folder), console or Console()
    config = run.load_config(folder)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    shards, program = open_data(config, console.print), Program.on(config)
    Loader(shards.split("train"), config.data).check_horizon(config.steps)
    if shards.tokenizer.fingerprint != run.load_tokenizer(folder).fingerprint:
        raise ValueError(f"the data of {config.data.uri} has changed since {folder} began; its tokenizer is another one")
    with Checkpoints(folder, read_only=True) as checkpoints:
        if checkpoints.steps():
            state, progress = checkpoints.restore(program.abstract_state, console.print)
        else:
            state, progress = program.init(), Progress()
    if progress.step >= config.steps:
        raise ValueError(f"{folder} is finished at step {progress.step}; train further with --steps N above that")
    console.print(f"resuming {folder} at step {progress.step}: weights, optimizer and data position restored")
    run.save_config(folder, config)
    log.truncate(folder, progress.step)
    return Session(config, folder, shards, program, console).go(state, progress)


def load_weights(folder: str | Path, program: Program, report: Callable[[str], None], step: int | None = None) -> Any:
    """The weights of the run in `folder`, laid out for `program`."""
    theirs, ours = run.load_config(folder).model, program.config.model
    if parameter_counts(theirs) != parameter_counts(ours):
        raise ValueError(f"the model in {folder} has another shape: {parameter_counts(theirs)}, here {parameter_counts(ours)}")
    with Checkpoints(Path(folder), read_only=True) as checkpoints:
        params, step = checkpoints.restore_params(program.abstract_state.params, report, step)
    report(f"weights of {folder} at step {step} restored; optimizer and data start anew")
    return params


@dataclasses.dataclass
class Session:
    """One process's part of a run, from a state to the last step or the first reason to stop."""

    config: RunConfig
    folder: Path
    shards: Shards
    program: Program
    console: Console

    def go(self, state: TrainState, progress: Progress) -> Progress:
        """Trains from `state` on, writes the report, and returns how far it came."""
        c = self.config
        counts = parameter_counts(c.model)
        self.console.print(f"{sum(counts.values()):,} parameters on {jax.device_count()} device(s); run folder {self.folder}")
        metrics_log = log.MetricsLog(
            self.folder,
            console=self.console,
            total_steps=c.steps,
            start_step=progress.step,
            tensorboard=c.tensorboard,
        )
        with Checkpoints(self.folder, c.keep) as checkpoints, metrics_log, stop_signals() as stopped:
            meter = Meter(c, metrics_log, progress)
            try:
                for batch in Loader(self.shards.split("train"), c.data).batches(progress.step):
                    state, metrics = self.program.train_step(state, batch)
                    meter.push(metrics)
                    done = meter.step == c.steps or stopped()
                    if done or self._due(meter.step):
                        meter.flush()
                        self._pause(state, meter, checkpoints, metrics_log, done)
                    if done:
                        break
            except Diverged as error:
                raise Diverged(f"{error}; {self._diagnose(state, meter)}") from None
            finally:
                write_report(self.folder)
        return meter.progress

    def _due(self, step: int) -> bool:
        c = self.config
        return any(step % every == 0 for every in (c.evaluate_every, c.checkpoint_every, c.sample_every))

    def _pause(self, state: TrainState, meter: "Meter", checkpoints: Checkpoints, metrics_log: Any, done: bool) -> None:
        """Evaluates, writes samples and saves, each when it is due."""
        c, step = self.config, meter.step
        best = False
        if step % c.evaluate_every == 0 or step == c.steps:
            result = self.evaluate(state, c.evaluate_batches)
            metrics_log.write(step, {"heldout_loss": result.loss, "bits_per_byte": result.bits_per_byte})
            metrics_log.print(f"step {step:,}  held-out loss {result.loss:.4f}  {result.bits_per_byte:.4f} bits per byte")
            best = meter.evaluated(result.loss)
        if step % c.sample_every == 0 or step == c.steps:
            samples = self.samples(state)
            metrics_log.write(step, {"samples": samples})
            metrics_log.print("\n".join(f"  {sample['prompt']}{sample['text']}" for sample in samples))
        if done or best or step % c.checkpoint_every == 0:
            checkpoints.save(state, meter.progress)
        write_report(self.folder)
        meter.restart()

    def evaluate(self, state: TrainState, limit: int | None = None) -> Evaluation:
        """Scores the first `limit` held-out batches."""
        batches = heldout_rows(self.shards.split("heldout"), self.config.data)
        first = (batch for _, batch in zip(range(limit or 1 << 60), batches, strict=False))
        return evaluate(lambda b: self.program.score(state.params, b), first, token_lengths(self.shards.tokenizer))

    def samples(self, state: TrainState, tokens: int = 80) -> list[dict[str, str]]:
        """What the model writes behind each of the config's prompts."""
        c = self.config
        texts = generate(
            c.model,
            cast(state.params, c.model.dtype),
            self.shards.tokenizer,
            c.prompts,
            sampling=Sampling(temperature=0.8, top_p=0.95),
            max_tokens=tokens,
            begin=c.data.end_of_text,
        )
        return [{"prompt": prompt, "text": text} for prompt, text in zip(c.prompts, texts, strict=True)]

    def _diagnose(self, state: TrainState, meter: "Meter") -> str:
        """Which documents stood in the last batch, and the first activation that was not finite there."""
        c, step = self.config, meter.progress.step - 1
        loader = Loader(self.shards.split("train"), c.data)
        batch = loader.batch(step)
        where = "the forward pass is finite, so the gradient overflowed"
        params = cast(state.params, c.model.dtype)
        taps = capture(self.program.model, params, batch.tokens, segments=batch.segments, positions=batch.positions)
        for name, x in taps.items():
            bad = ~np.isfinite(np.asarray(x, np.float32))
            if bad.any():
                layer = f" of layer {int(np.argmax(bad.reshape(len(bad), -1).any(1)))}" if x.ndim > 3 else ""
                where = f"the first activation to go bad is {name}{layer}"
                break
        return f"batch of step {step}: documents {loader.documents(step).tolist()}; {where}"


class Meter:
    """Reads metrics one step late, so that the device never waits for a number that is only printed."""

    def __init__(self, config: RunConfig, metrics_log: log.MetricsLog, progress: Progress) -> None:
        self.config, self.log, self.progress, self.step = config, metrics_log, progress, progress.step
        self._pending: tuple[int, Metrics] | None = None
        self._bad_in_a_row = 0
        self._flops, self._peak = flops_per_token(config.model, config.data.seq_len), peak_flops()
        self.restart()

    def restart(self) -> None:
        """Forgets the time since the last step: what came between was no training."""
        self._clock = time.perf_counter()

    def push(self, metrics: Metrics) -> None:
        """Takes the metrics of a step just dispatched, and records those of the step before."""
        self.flush()
        self.step += 1
        self._pending = (self.step, metrics)

    def flush(self) -> None:
        """Waits for the newest metrics and records them. Raises `Diverged` after `patience` bad steps in a row."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        rate = values["tokens"] / seconds
        self.progress = Progress(
            step=step,
            tokens=self.progress.tokens + int(values["tokens"]),
            skipped=self.progress.skipped + int(values["skipped"]),
        )
        row = values | {
            "tokens": self.progress.tokens,
            "skipped": self.progress.skipped,
            "tokens_per_second": rate,
            "step_seconds": seconds,
        }
        if self._peak is not None:
            row["peak_fraction"] = rate * self._flops / self._peak
        self.log.write(step, row)
        self._bad_in_a_row = self._bad_in_a_row + 1 if values["skipped"] else 0
        if self._bad_in_a_row >= self.config.patience:
            raise Diverged(f"loss or gradient not finite in {self._bad_in_a_row} steps in a row, up to step {step}")

    def evaluated(self, loss: float) -> bool:
        """Notes a held-out loss; whether it is the best so far."""
        self.progress = dataclasses.replace(self.progress, heldout_loss=loss)
        best, self._best = loss < getattr(self, "_best", float("inf")), min(loss, getattr(self, "_best", float("inf")))
        return best


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGTERM or Ctrl-C into a request to stop after this step; a second one stops at once."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
