"""The training loop: `train` starts a run, `resume` goes on with one; both leave a folder that explains itself."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from llm_jax import log, processes, runtime
from llm_jax.config import differences, override, to_dict
from llm_jax.data.loader import Loader, heldout_rows, task_of
from llm_jax.data.mixture import Mixture, open_folders
from llm_jax.data.prepare import cached_sources
from llm_jax.data.shards import Shards
from llm_jax.infer.generate import generate, prompt_ids
from llm_jax.model.count import parameter_counts
from llm_jax.ops.attention import heard
from llm_jax.ops.sampling import Sampling
from llm_jax.runs import folder as run_folder
from llm_jax.runs.checkpoint import Checkpoints, NotFinite, Progress, Report
from llm_jax.runs.diagnose import diagnose
from llm_jax.runs.evaluate import Evaluation, evaluate
from llm_jax.runs.meter import Meter
from llm_jax.runs.report import write_report
from llm_jax.runs.seal import LAYOUT, moves, seal, seal_of
from llm_jax.runs.signals import stop_signals
from llm_jax.sharding import mesh_sizes
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import make_schedule
from llm_jax.train.program import Program
from llm_jax.train.step import TrainState, cast

# How the numbers of an evaluation are said in a line.
SAID = {
    "heldout_loss": "held-out loss {:.4f}",
    "bits_per_byte": "{:.4f} bits per byte",
    "heldout_accuracy": "{:.2%} right",
}


def _said(result: Evaluation) -> str:
    """An evaluation in a line, and of a mixture the held-out loss of each source."""
    numbers = result.numbers()
    whole = [text.format(numbers[name]) for name, text in SAID.items() if name in numbers]
    return "  ".join([*whole, *(f"{name} {source.loss:.4f}" for name, source in result.sources.items())])


class Diverged(ValueError):
    """Loss, gradient or update was not finite for too many steps in a row, or the state at hand is not."""


def on(console: Console) -> Report:
    """Prints lines there as they are."""
    return functools.partial(console.print, markup=False, emoji=False, highlight=False, soft_wrap=True)


def open_data(config: RunConfig, report: Report) -> Shards | Mixture:
    """The token shards of `config.data`, prepared on first use. Raises `ValueError` if the vocabulary is too small."""
    shards = open_folders(config.data, _prepared(config, report))
    ids = shards.tokenizer.vocab_size
    if ids > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {ids} ids, but model.vocab_size={config.model.vocab_size}; "
            f"use at least model.vocab_size={-(-ids // 64) * 64}"
        )
    return shards


def _prepared(config: RunConfig, report: Report) -> list[Path]:
    """The folders of `config`'s shards. Of several processes the first one prepares them, and the others find them."""

    def find() -> list[Path]:
        return cached_sources(config.data, runtime.cache_folder() / "data", report)

    first = [Path(folder) for folder in processes.from_first(lambda: [str(folder) for folder in find()])]
    return first if all(folder.is_dir() for folder in first) else find()  # a cache of this machine's own


def open_run_data(folder: Path, config: RunConfig, report: Report) -> Shards | Mixture:
    """The token shards that the run in `folder` began with: where they lay, or else prepared again from their source.

    Raises `ValueError` where neither is what it was.
    """
    there = run_folder.shards_folders(folder, config)
    known = all(path.is_dir() for path in there)
    shards = open_folders(config.data, there) if known else open_data(config, report)
    run_folder.check_data(folder, shards)
    return shards


def train(config: RunConfig, folder: str | Path, *, console: Console | None = None, command: str = "") -> Progress:
    """Starts a run of `config` in `folder`. What fails before the first step is over leaves nothing behind.

    Raises `ValueError` for what can't work, `Diverged` after `config.patience` bad steps in a row.
    """
    folder = Path(folder)
    processes.from_first(lambda: run_folder.check_free(folder, config))
    console = console or Console()
    check_before_data(config)
    session = Session.open(config, folder, console, open_data(config, on(console)))
    with processes.watched(_way_on(folder)):
        state = session.begin()
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        ours = run_folder.identity(folder)
        with run_folder.owned(folder):
            processes.from_first(lambda: run_folder.check_free(folder, config))  # still
            try:
                if processes.is_first():
                    run_folder.create(folder, config, session.shards, command)
                return session.go(state, Progress())
            except BaseException:
                if processes.is_first() and run_folder.identity(folder) == ours and not log.read(folder):
                    run_folder.remove(folder, keep_folder=existed)
                raise


def check_before_data(config: RunConfig) -> None:
    """Raises `ValueError` for what no data can put right: it may take hours to prepare."""
    make_schedule(config.optimizer, config.steps)
    mesh_sizes(config.mesh, jax.device_count())


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
    old = run_folder.load_config(folder)
    if other := [word for word in layout if not word.startswith(LAYOUT)]:
        raise ValueError(
            f"{other[0]}: a run goes on with its own config, of which only {', '.join(LAYOUT)} may change; "
            f"for another one start a new run with init_from={folder}"
        )
    config = override(old if steps is None else dataclasses.replace(old, steps=steps), layout)
    console = console or Console()
    check_before_data(config)
    with run_folder.owned(folder):
        session = Session.open(config, folder, console, open_run_data(folder, old, on(console)))
        with processes.watched(_way_on(folder)):
            state, progress = session.restore(old)
            if processes.is_first():
                if lost := log.missing(folder, progress.step):
                    session.say(f"{folder}/{log.FILE} has no row of step {log.spans(lost)}; report.html lacks them too")
                run_folder.save_config(folder, config)
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
    shards: Shards | Mixture
    program: Program
    loader: Loader
    checkpoints: Checkpoints

    @classmethod
    def open(cls, config: RunConfig, folder: Path, console: Console, shards: Shards | Mixture) -> "Session":
        """The program of `config` on `shards`. Raises `ValueError` for what can't work, before anything is computed."""
        if not shards.split("heldout").n_documents:
            raise ValueError(f"data.heldout={config.data.heldout} leaves nothing to evaluate on; set it above 0")
        task_of(shards.split("heldout"), config.data)  # raises now, and not at the first evaluation
        program = Program.on(config)
        loader = Loader(shards.split("train"), config.data, rows=program.rows)
        loader.check_horizon(config.steps)
        try:
            asked = [config.data.ask(prompt) for prompt in config.prompts]
            prompt_ids(config.model, shards.tokenizer, asked, config.data.end_of_text, config.data.special)
        except ValueError as error:
            raise ValueError(f"prompts={config.prompts}: {error}; or set prompts= for no samples") from error
        checkpoints = Checkpoints(folder, config.keep, seal=seal_of(config, shards), say=on(console))
        return cls(config, folder, console, shards, program, loader, checkpoints)

    def say(self, line: str) -> None:
        on(self.console)(line)

    def begin(self) -> TrainState:
        """The state before the first step."""
        source = self.config.init_from
        params = None if source is None else self._weights_of(source)
        state = self.program.init()
        return state if params is None else dataclasses.replace(state, params=params)

    def _weights_of(self, source: str) -> PyTree:
        changed = differences(to_dict(run_folder.load_config(source).model), to_dict(self.config.model))
        theirs, ours = run_folder.load_tokenizer(source), self.shards.tokenizer
        if theirs.fingerprint != ours.fingerprint:
            raise ValueError(
                f"init_from={source} knows the tokens of {theirs.name}, but the data is in those of {ours.name}; "
                f"set data.tokenizer={source}/tokenizer"
            )
        if changed:
            self.say(f"the model of {source} is not quite this one: {'; '.join(changed)}")
        return load_weights(source, self.program, self.say)

    def restore(self, old: RunConfig) -> tuple[TrainState, Progress]:
        """The state to go on from. Says what was restored, and what is not as it was under `old`.

        Raises `ValueError` where no step is left.
        """
        c, restored = self.config, self.checkpoints.restore(self.program.abstract_state, self.say)
        if restored is None:
            self.say(f"{self.folder} has no checkpoint yet: it begins again")
            return self.begin(), Progress()
        if (step := restored[1].step) >= c.steps:
            raise ValueError(f"{self.folder} is finished at step {step}; train further with --steps N above that")
        self.say(
            f"resumed {self.folder} at step {step} of {c.steps}: weights, optimizer, schedule and data position "
            f"({self.loader.position(step)}) restored"
        )
        there = self.checkpoints.sealed(step) or seal(old, "", None) | {
            "machine": run_folder.first_machine(self.folder)
        }
        if c.steps != (steps := there["config"]["steps"]):
            now, before = (np.asarray(make_schedule(c.optimizer, total)(step)).item() for total in (c.steps, steps))
            line = f"steps {steps} -> {c.steps}: the {c.optimizer.schedule} schedule stretches"
            if now != before:
                line += ", and here the learning rate is {} instead of {}".format(*log.apart(now, before))
            self.say(line)
        for change in moves(there, seal(c, "", None)):
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
        for line in self.loader.said(c.steps):
            self.say(line)
        rows = log.MetricsLog(
            self.folder if processes.is_first() else None,
            console=self.console,
            total_steps=c.steps,
            start_step=progress.step,
            tensorboard=c.tensorboard,
        )
        with run_folder.held(self.folder) as moved:
            try:
                progress = self._steps(state, Meter(c, rows, progress, self.loader.token_shares), rows, moved)
                if (best := self.checkpoints.best()) is not None:
                    self.say(f"the best checkpoint is of step {best:,}: generate and evaluate take it")
                return progress
            except OSError as error:
                self._check_moved(moved)
                way = f"go on with: llm-jax resume {self.folder}" if self.checkpoints.steps() else "start again"
                # What is written to an open file names none.
                said = f"{error.filename or self.folder}: {error.strerror}" if error.strerror else error
                raise ValueError(f"{said}; {self._newest_checkpoint()}; fix this, then {way}") from error
            finally:
                if moved() is None:
                    self._report()

    def _steps(
        self, state: TrainState, meter: Meter, rows: log.MetricsLog, moved: Callable[[], str | None]
    ) -> Progress:
        """One step after the other, with what is due between them; how far it came, and the last held-out loss."""
        measured, last, asked = meter.progress.heldout_loss, False, False
        with stop_signals() as stopping, self.checkpoints, rows:  # the last save too ends in peace
            if not self.checkpoints.steps():  # what a run began from, it need not find again
                self._save(state, meter.progress)
            for batch in self.loader.batches(meter.step):
                with heard(self.say):  # the first one, which is traced, says who attends
                    state, metrics = self.program.train_step(state, batch)
                meter.push(metrics)
                self._check(state, meter.progress)
                asked = stopping(meter.step)
                last = asked or meter.step == self.config.steps
                if last or self._due(meter.step):
                    self._check_moved(moved)
                    found = self._pause(state, meter, rows, last)
                    measured = measured if found is None else found
                if last:
                    break
        stopped = asked and meter.step < self.config.steps
        return dataclasses.replace(meter.progress, heldout_loss=measured, stopped=stopped)

    def _due(self, step: int) -> bool:
        c = self.config
        return any(step % every == 0 for every in (c.evaluate_every, c.checkpoint_every, c.sample_every))

    def _pause(self, state: TrainState, meter: Meter, rows: log.MetricsLog, last: bool) -> float | None:
        """Evaluates, generates samples and saves, each when it is due, and at the end of the run; the held-out loss."""
        c = self.config
        row, progress = meter.read(), meter.progress
        step, end = progress.step, progress.step == c.steps
        if end or step % c.evaluate_every == 0:
            result = self.evaluate(state, c.evaluate_batches)
            row |= result.numbers()
            progress = dataclasses.replace(progress, heldout_loss=result.loss)
            rows.print(f"step {step:,}  {_said(result)}")
        if c.prompts and (end or step % c.sample_every == 0):
            row["samples"] = self.samples(state)
            rows.print("\n".join(f"  {sample['prompt']}{sample['text']}" for sample in row["samples"]))
        meter.write(row)  # before the checkpoint: what is resumed has all its rows
        self._check(state, progress)
        due = step % c.checkpoint_every == 0 or self.checkpoints.is_best(progress.heldout_loss)
        # After a bad step the state is as before it, but may be what makes steps bad: such a one is not kept, except
        # where the run ends and this is where it has come to.
        if last or (due and not progress.skipped_in_a_row):
            self._save(state, progress)
        self._report()
        meter.restart()
        return progress.heldout_loss

    def _save(self, state: TrainState, progress: Progress) -> None:
        try:
            self.checkpoints.save(state, progress)
        except NotFinite as error:
            raise Diverged(
                f"{error}; {self._newest_checkpoint()}; start anew, from other weights or a new seed"
            ) from None

    def evaluate(self, state: TrainState, limit: int | None = None) -> Evaluation:
        """Scores the first `limit` held-out batches."""
        store = self.shards.split("heldout")
        batches = itertools.islice(heldout_rows(store, self.config.data), limit)
        return evaluate(functools.partial(self.program.score, state.params), batches, store, self.config.data.task)

    def samples(self, state: TrainState, tokens: int = 80) -> list[dict[str, str]]:
        """Generate a continuation of each of the config's prompts. Only the first process does; the others get `[]`."""
        c, params = self.config, processes.gathered(cast(state.params, self.config.model.dtype))
        if not processes.is_first():
            return []
        prompts = [c.data.ask(prompt) for prompt in c.prompts]
        options = {"begin": c.data.end_of_text, "special": c.data.special, "task": c.data.task, "max_tokens": tokens}
        # There are many ways to go on with a text, and one right answer.
        sampling = Sampling(temperature=0.8, top_p=0.95) if c.data.task is None else Sampling(temperature=0)
        try:
            texts = generate(c.model, params, self.shards.tokenizer, prompts, sampling=sampling, **options)
        except ValueError as error:  # the weights overflow: the loop itself says more of that, and a run goes on
            self.say(f"no samples: {error}")
            return []
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

    def _report(self) -> None:
        if not processes.is_first():
            return
        with contextlib.suppress(OSError, ValueError):  # a page less is no reason to stop, nor to hide one
            write_report(self.folder)

    def _check(self, state: TrainState, progress: Progress) -> None:
        """Raises `Diverged` after too many bad steps: the last, what was read there, what went bad, what is left."""
        if progress.skipped_in_a_row < self.config.patience:
            return
        step = progress.step - 1
        loader = Loader(self.shards.split("train"), self.config.data)  # of all rows
        documents = loader.documents(step)
        origins = ", ".join(self.shards.split("train").origins(documents[:5])) + ", ..." * (len(documents) > 5)
        reason = diagnose(self.program, state.params, loader.batch(step), step, state.opt_state)
        self.checkpoints.wait()
        raise Diverged(
            f"loss, gradient or update was not finite in {progress.skipped_in_a_row} steps in a row; at step "
            f"{progress.step}, on documents {origins}: {reason}; {self._newest_checkpoint()}; "
            f"start anew with less learning rate and init_from={self.folder}"
        )

    def _check_moved(self, moved: Callable[[], str | None]) -> None:
        """Raises `ValueError` where the folder is no longer where it was: a save would begin another one there."""
        if (now := moved()) is not None:
            with contextlib.suppress(OSError):
                self.checkpoints.finish()
            raise ValueError(
                f"{self.folder} was moved or removed while its run trained; {self._newest_checkpoint()}, and nothing "
                f"was written elsewhere; go on with: llm-jax resume {now}"
            )

    def _newest_checkpoint(self) -> str:
        step = self.checkpoints.newest()
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is of step {step}"
