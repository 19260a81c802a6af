"""The training loop: `train` starts a run, `resume` goes on with one; both leave a folder that explains itself."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from llm_jax import log, processes, runtime
from llm_jax.config import override, to_dict
from llm_jax.data.loader import Loader, heldout_rows, task_of
from llm_jax.data.shards import Shards, cached, open_shards
from llm_jax.infer.generate import generate, prompt_ids
from llm_jax.ops.attention import heard
from llm_jax.ops.sampling import Sampling
from llm_jax.train import run
from llm_jax.train.checkpoint import Checkpoints, Progress, Report
from llm_jax.train.count import parameter_counts
from llm_jax.train.diagnose import diagnose
from llm_jax.train.evaluate import Evaluation, evaluate, target_lengths
from llm_jax.train.meter import Meter
from llm_jax.train.optimizer import make_schedule
from llm_jax.train.program import Program
from llm_jax.train.report import write_report
from llm_jax.train.run import RunConfig
from llm_jax.train.step import TrainState, cast
from llm_jax.train.stop import stop_signals

# How the numbers of an evaluation are said in a line.
SAID = {
    "heldout_loss": "held-out loss {:.4f}",
    "bits_per_byte": "{:.4f} bits per byte",
    "heldout_accuracy": "{:.2%} right",
}


class Diverged(ValueError):
    """Loss or gradient was not finite for too many steps in a row."""


def on(console: Console) -> Report:
    """Prints lines there as they are."""
    return functools.partial(console.print, markup=False, emoji=False, highlight=False, soft_wrap=True)


def open_data(config: RunConfig, report: Report) -> Shards:
    """The token shards of `config.data`, prepared on first use. Raises `ValueError` if the vocabulary is too small."""
    shards = open_shards(_prepared(config, report))
    if shards.manifest.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {shards.manifest.vocab_size} ids, but model.vocab_size={config.model.vocab_size}; "
            f"use at least model.vocab_size={-(-shards.manifest.vocab_size // 64) * 64}"
        )
    return shards


def _prepared(config: RunConfig, report: Report) -> Path:
    """The folder of `config`'s shards. Of several processes the first one prepares them, and the others find them."""

    def find() -> Path:
        return cached(config.data, runtime.cache_folder() / "data", report)

    first = Path(processes.from_first(lambda: str(find())))
    return first if first.is_dir() else find()  # a cache of this machine's own


def open_run_data(folder: Path, config: RunConfig, report: Report) -> Shards:
    """The token shards that the run in `folder` began with: where they lay, or else prepared again from their source.

    Raises `ValueError` where neither is what it was.
    """
    there = run.shards_folder(folder)
    shards = open_shards(there) if there.is_dir() else open_data(config, report)
    run.check_data(folder, shards)
    return shards


# What may change when a run goes on: how it is laid out and computed, not what.
LAYOUT = (
    "mesh.",
    "pipeline.",
    "accumulate=",
    "offload=",
    "loss.chunk=",
    "model.remat=",
    "model.unroll=",
    "model.attention.implementation=",
)


def train(config: RunConfig, folder: str | Path, *, console: Console | None = None, command: str = "") -> Progress:
    """Starts a run of `config` in `folder`. What fails before the first step is over leaves nothing behind.

    Raises `ValueError` for what can't work, `Diverged` after `config.patience` bad steps in a row.
    """
    folder = Path(folder)
    processes.from_first(lambda: run.check_free(folder, config))
    console = console or Console()
    session = Session.open(config, folder, console, open_data(config, on(console)))
    with processes.watched(_way_on(folder)):
        state = session.begin()
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with run.owned(folder):
            processes.from_first(lambda: run.check_free(folder, config))  # still
            try:
                if processes.is_first():
                    run.create(folder, config, session.shards, command)
                return session.go(state, Progress())
            except BaseException:
                if processes.is_first() and not log.read(folder):
                    run.remove(folder, keep_folder=existed)
                raise


def _way_on(folder: Path) -> str:
    return f"start all of them again, with fewer if you like: llm-jax resume {folder}"


def resume(
    folder: str | Path, *, steps: int | None = None, layout: Sequence[str] = (), console: Console | None = None
) -> Progress:
    """Goes on exactly where the run in `folder` stopped; `steps` sets a new total, to which the schedule stretches.

    `layout` are words such as `mesh.fsdp=2`, for other devices than before: the state is the same in every layout.
    Raises `ValueError` where there is no run, or its data or model is no longer what it was, and as `train` does.
    """
    folder = Path(folder)
    old = run.load_config(folder)
    if other := [word for word in layout if not word.startswith(LAYOUT)]:
        raise ValueError(
            f"{other[0]}: a run goes on with its own config, of which only {', '.join(LAYOUT)} may change; "
            f"for another one start a new run with init_from={folder}"
        )
    config = override(old if steps is None else dataclasses.replace(old, steps=steps), layout)
    console = console or Console()
    with run.owned(folder):
        session = Session.open(config, folder, console, open_run_data(folder, old, on(console)))
        with processes.watched(_way_on(folder)):
            state, progress = session.restore(old)
            if progress.step >= config.steps:
                raise ValueError(
                    f"{folder} is finished at step {progress.step}; train further with --steps N above that"
                )
            if processes.is_first():
                run.save_config(folder, config)
                log.truncate(folder, progress.step)
            return session.go(state, progress)


def load_weights(folder: str | Path, program: Program, report: Report) -> PyTree:
    """The best weights of the run in `folder`, laid out for `program`."""
    with Checkpoints(Path(folder), read_only=True) as checkpoints:
        params, step = checkpoints.restore_params(program.abstract_state.params, report)
    report(f"restored from {folder} at step {step}: weights, nothing else; optimizer, schedule and data start anew")
    return params


@dataclasses.dataclass
class Session:
    """One process's part of a run, from a state to the last step or the first reason to stop."""

    config: RunConfig
    folder: Path
    console: Console
    shards: Shards
    program: Program
    loader: Loader
    checkpoints: Checkpoints

    @classmethod
    def open(cls, config: RunConfig, folder: Path, console: Console, shards: Shards) -> "Session":
        """The program of `config` on `shards`. Raises `ValueError` for what can't work, before anything is computed."""
        if not shards.split("heldout").n_documents:
            raise ValueError(f"data.heldout={config.data.heldout} leaves nothing to evaluate on; set it above 0")
        task_of(shards.split("heldout"), config.data)  # raises now, and not at the first evaluation
        program = Program.on(config)
        loader = Loader(shards.split("train"), config.data, rows=program.rows)
        loader.check_horizon(config.steps)
        try:
            asked = [config.data.ask(prompt) for prompt in config.prompts]
            prompt_ids(config.model, shards.tokenizer, asked, config.data.end_of_text)
        except ValueError as error:
            raise ValueError(f"prompts={config.prompts}: {error}; or set prompts= for no samples") from error
        return cls(config, folder, console, shards, program, loader, Checkpoints(folder, config.keep))

    def say(self, line: str) -> None:
        on(self.console)(line)

    def begin(self) -> TrainState:
        """The state before the first step."""
        source = self.config.init_from
        params = None if source is None else self._weights_of(source)
        state = self.program.init()
        return state if params is None else dataclasses.replace(state, params=params)

    def _weights_of(self, source: str) -> PyTree:
        changed = run.differences(to_dict(run.load_config(source).model), to_dict(self.config.model))
        theirs, ours = run.load_tokenizer(source), self.shards.tokenizer
        if theirs.fingerprint != ours.fingerprint:
            raise ValueError(
                f"init_from={source} knows the tokens of {theirs.name}, but the data is in those of {ours.name}; "
                f"set data.tokenizer={source}/tokenizer"
            )
        if changed:
            self.say(f"the model of {source} is not quite this one: {'; '.join(changed)}")
        return load_weights(source, self.program, self.say)

    def restore(self, old: RunConfig) -> tuple[TrainState, Progress]:
        """The state to go on from. Says what was restored, and what is not as it was under `old`."""
        c, restored = self.config, self.checkpoints.restore(self.program.abstract_state, self.say)
        if restored is None:
            self.say(f"{self.folder} has no checkpoint yet: it begins again")
            return self.begin(), Progress()
        step = restored[1].step
        self.say(
            f"resumed {self.folder} at step {step} of {c.steps}: weights, optimizer, schedule and data position "
            f"(epoch {self.loader.epoch(step):.2f}) restored"
        )
        if c.steps != old.steps:
            before, now = (np.asarray(make_schedule(o.optimizer, o.steps)(step)) for o in (old, c))
            self.say(
                f"steps {old.steps} -> {c.steps}: the {c.optimizer.schedule} schedule stretches, "
                f"and here the learning rate is {now:.3g} instead of {before:.3g}"
            )
        before, now = (to_dict(dataclasses.replace(o, steps=c.steps)) for o in (old, c))
        for change in run.differences(before, now) + run.changed_environment(self.folder):
            self.say(f"not the same bits as without the stop: {change}")
        return restored

    def go(self, state: TrainState, progress: Progress) -> Progress:
        """Trains from `state` to the last step, or until it is told to stop; how far it came."""
        c = self.config
        count = sum(parameter_counts(c.model).values())
        among = f" of {processes.count()} processes" if processes.count() > 1 else ""
        self.say(f"{count:,} parameters on {jax.device_count()} device(s){among}; run folder {self.folder}")
        if unguarded := runtime.warning(jax.local_devices()[0]):
            self.say(unguarded)
        if self.program.pipeline is not None:
            self.say(self.program.pipeline.timetable.summary)
        rows = log.MetricsLog(
            self.folder if processes.is_first() else None,
            console=self.console,
            total_steps=c.steps,
            start_step=progress.step,
            tensorboard=c.tensorboard,
        )
        meter = Meter(c, rows, progress)
        try:
            with stop_signals() as stopping, self.checkpoints, rows:  # the last save too ends in peace
                if not self.checkpoints.steps():  # what a run began from, it need not find again
                    self.checkpoints.save(state, progress)
                for batch in self.loader.batches(progress.step):
                    with heard(self.say):  # the first one, which is traced, says who attends
                        state, metrics = self.program.train_step(state, batch)
                    meter.push(metrics)
                    self._check(state, meter.progress)
                    last = stopping(meter.step) or meter.step == c.steps
                    if last or self._due(meter.step):
                        self._pause(state, meter, rows, last)
                    if last:
                        break
        except OSError as error:
            way = f"go on with: llm-jax resume {self.folder}" if self.checkpoints.steps() else "start again"
            raise ValueError(f"{error}; {self._newest_checkpoint()}; mend this, then {way}") from error
        finally:
            self._report()
        return meter.progress

    def _due(self, step: int) -> bool:
        c = self.config
        return any(step % every == 0 for every in (c.evaluate_every, c.checkpoint_every, c.sample_every))

    def _pause(self, state: TrainState, meter: Meter, rows: log.MetricsLog, last: bool) -> None:
        """Evaluates, writes samples and saves, each when it is due, and at the end of the run."""
        c = self.config
        row, progress = meter.read(), meter.progress
        step, end = progress.step, progress.step == c.steps
        if end or step % c.evaluate_every == 0:
            result = self.evaluate(state, c.evaluate_batches)
            row |= (numbers := result.numbers())
            progress = dataclasses.replace(progress, heldout_loss=result.loss)
            rows.print("  ".join([f"step {step:,}", *(SAID[name].format(x) for name, x in numbers.items())]))
        if c.prompts and (end or step % c.sample_every == 0):
            row["samples"] = self.samples(state)
            rows.print("\n".join(f"  {sample['prompt']}{sample['text']}" for sample in row["samples"]))
        meter.write(row)  # before the checkpoint: what is resumed has all its rows
        self._check(state, progress)
        due = step % c.checkpoint_every == 0 or self.checkpoints.is_best(progress.heldout_loss)
        # After a bad step the state is as before it, but may be what makes steps bad: such a one is not kept, except
        # where the run ends and this is where it has come to.
        if last or (due and not progress.skipped_in_a_row):
            self.checkpoints.save(state, progress)
        self._report()
        meter.restart()

    def evaluate(self, state: TrainState, limit: int | None = None) -> Evaluation:
        """Scores the first `limit` held-out batches."""
        batches = itertools.islice(heldout_rows(self.shards.split("heldout"), self.config.data), limit)
        score = functools.partial(self.program.score, state.params)
        return evaluate(score, batches, self._target_lengths, self.config.data.task)

    @functools.cached_property
    def _target_lengths(self) -> np.ndarray:
        return target_lengths(self.shards.tokenizer, self.config.data.task)

    def samples(self, state: TrainState, tokens: int = 80) -> list[dict[str, str]]:
        """What the model writes behind each of the config's prompts; of several processes the first one lets it."""
        c, params = self.config, processes.gathered(cast(state.params, self.config.model.dtype))
        if not processes.is_first():
            return []
        prompts = [c.data.ask(prompt) for prompt in c.prompts]
        texts = generate(
            c.model,
            params,
            self.shards.tokenizer,
            prompts,
            # There are many ways to go on with a text, and one right answer.
            sampling=Sampling(temperature=0.8, top_p=0.95) if c.data.task is None else Sampling(temperature=0),
            max_tokens=tokens,
            begin=c.data.end_of_text,
            task=c.data.task,
        )
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

    def _report(self) -> None:
        if not processes.is_first():
            return
        with contextlib.suppress(OSError):  # a page less is no reason to stop, nor to hide one
            write_report(self.folder)

    def _check(self, state: TrainState, progress: Progress) -> None:
        """Raises `Diverged` after too many bad steps: the last, what was read there, what went bad, what is left."""
        if progress.skipped_in_a_row < self.config.patience:
            return
        step = progress.step - 1
        loader = Loader(self.shards.split("train"), self.config.data)  # of all rows
        documents = loader.documents(step)
        origins = ", ".join(self.shards.split("train").origins(documents[:5])) + ", ..." * (len(documents) > 5)
        reason = diagnose(self.program, state.params, loader.batch(step), step)
        self.checkpoints.wait()
        raise Diverged(
            f"loss or gradient was not finite in {progress.skipped_in_a_row} steps in a row; at step {progress.step}, "
            f"on documents {origins}: {reason}; {self._newest_checkpoint()}; "
            f"start anew with less learning rate and init_from={self.folder}"
        )

    def _newest_checkpoint(self) -> str:
        steps = self.checkpoints.steps()
        return f"the last good checkpoint is of step {steps[0]}" if steps else "there is no checkpoint yet"
