"""The training loop, from top to bottom: a step, what is due after it, and the reasons to stop."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable

from llm_jax import processes
from llm_jax.data.loader import heldout_rows
from llm_jax.infer.generate import Sampler
from llm_jax.log import MetricsLog
from llm_jax.ops.sampling import Sampling
from llm_jax.runs.checkpoint import NotFinite, Progress
from llm_jax.runs.evaluate import Evaluation, evaluate
from llm_jax.runs.meter import Meter
from llm_jax.runs.refusals import diverged, moved_away, not_saved
from llm_jax.runs.report import write_report
from llm_jax.runs.session import Session
from llm_jax.runs.signals import Stop, stop_signals
from llm_jax.train.config import RunConfig
from llm_jax.train.step import Metrics, TrainState

Moved = Callable[[], str | None]  # where the run folder was moved to; None while it is where it was
SAMPLE_TOKENS = 80


def loop(session: Session, state: TrainState, progress: Progress, moved: Moved) -> Progress:
    """Train from `state` to the last step, or until something asks to stop; return how far it came.

    A step is dispatched before the metrics of the one before it are read: the device never waits for a number that is
    only printed. What is returned has the last held-out loss that was measured. Raise `Diverged` after
    `config.patience` bad steps in a row, and `ValueError` where the run folder is moved away.
    """
    c, checkpoints, measured, stopped = session.config, session.checkpoints, progress.heldout_loss, False
    with stop_signals() as stopping, checkpoints, metrics_log(session, progress) as rows:
        meter = Meter(c, rows, progress, session.loader.token_shares)
        if not checkpoints.steps():  # what a run began from, it need not find again
            save(session, state, progress)
        for batch in session.loader.batches(progress.step):
            state, metrics = session.program.train_step(state, batch)
            if meter.step == progress.step:  # the first step has been traced
                for note in session.program.attention_notes:
                    session.say(note)
            try:
                metrics |= watched(session, meter.step + 1, state, metrics)
            except Stop as reason:
                session.say(f"step {meter.step + 1:,}: {reason}")
                stopping.ask()
            meter.push(metrics)
            if meter.progress.skipped_in_a_row >= c.patience:
                raise diverged(session.folder, session.program, session.shards, checkpoints, state, meter.progress)
            stopped = stopping(meter.step)
            last = stopped or meter.step == c.steps
            if last or is_due(c, meter.step):
                if (now := moved()) is not None:
                    raise moved_away(session.folder, now, checkpoints)
                found = pause(session, state, meter, rows, last)
                measured = measured if found is None else found
            if last:
                break
    return dataclasses.replace(meter.progress, heldout_loss=measured, stopped=stopped and meter.step < c.steps)


def pause(session: Session, state: TrainState, meter: Meter, rows: MetricsLog, last: bool) -> float | None:
    """Evaluate, sample and save, each when it is due and at the end of the run; return the held-out loss."""
    c, row, progress = session.config, meter.read(), meter.progress
    step, end = progress.step, progress.step == c.steps
    if end or step % c.evaluate_every == 0:
        result = heldout(session, state)
        row |= result.numbers()
        progress = dataclasses.replace(progress, heldout_loss=result.loss)
        rows.print(f"step {step:,}  {result.said()}")
    if c.prompts and (end or step % c.sample_every == 0):
        row["samples"] = samples(session, state)
        rows.print("\n".join(f"  {sample['prompt']}{sample['text']}" for sample in row["samples"]))
    meter.write(row)  # before the checkpoint: what is resumed has all its rows
    if progress.skipped_in_a_row >= c.patience:
        raise diverged(session.folder, session.program, session.shards, session.checkpoints, state, progress)
    due = step % c.checkpoint_every == 0 or session.checkpoints.is_best(progress.heldout_loss)
    # After a bad step the state is as before it, but may be what makes steps bad: it is not kept, except where the run
    # ends and this is what it came to.
    if last or (due and not progress.skipped_in_a_row):
        save(session, state, progress)
    report(session)
    meter.restart()
    return progress.heldout_loss


def is_due(c: RunConfig, step: int) -> bool:
    """Return whether an evaluation, samples or a checkpoint are due after `step`."""
    return any(step % every == 0 for every in (c.evaluate_every, c.checkpoint_every, c.sample_every))


def metrics_log(session: Session, progress: Progress) -> MetricsLog:
    """Return where the rows of this run go: the first of several processes writes them."""
    folder = session.folder if processes.is_first() else None
    total, tensorboard = session.config.steps, session.config.tensorboard
    return MetricsLog(
        folder, console=session.console, total_steps=total, start_step=progress.step, tensorboard=tensorboard
    )


def watched(session: Session, step: int, state: TrainState, metrics: Metrics) -> Metrics:
    """Return what the watchers of a run add to the metrics of a step. Raise `ValueError` for a name that is taken."""
    added: Metrics = {}
    for watcher in session.watchers:
        for name, value in (watcher(step, state, metrics) or {}).items():
            if name in metrics or name in added:
                raise ValueError(f"a metric is called {name!r} already; return it under another name")
            added[name] = value
    return added


def heldout(session: Session, state: TrainState) -> Evaluation:
    """Score the first `evaluate_batches` batches of held-out text."""
    c, store = session.config, session.shards.split("heldout")
    batches = itertools.islice(heldout_rows(store, c.data), c.evaluate_batches)
    return evaluate(functools.partial(session.program.score, state.params), batches, store, c.data.task)


def samples(session: Session, state: TrainState) -> list[dict[str, str]]:
    """Continue each of the config's prompts. Only the first process does; the others get `[]`."""
    c, params = session.config, processes.gathered(state.params)
    if not processes.is_first():
        return []
    # A text has many continuations, and a question one right answer.
    sampling = Sampling(temperature=0.8, top_p=0.95) if c.data.task is None else Sampling(temperature=0)
    sampler = Sampler(
        c.model,
        params,
        session.shards.tokenizer,
        begin=c.data.end_of_text,
        special=c.data.special,
        task=c.data.task,
    )
    prompts = [c.data.ask(prompt) for prompt in c.prompts]
    try:
        texts = sampler.generate(prompts, sampling, max_tokens=SAMPLE_TOKENS)
    except ValueError as error:  # the weights overflow: the loop itself says more of that, and the run continues
        session.say(f"no samples: {error}")
        return []
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def save(session: Session, state: TrainState, progress: Progress) -> None:
    """Save a checkpoint. Raise `Diverged` for a state that is not finite."""
    try:
        session.checkpoints.save(state, progress)
    except NotFinite as error:
        raise not_saved(error, session.checkpoints) from None


def report(session: Session) -> None:
    """Write report.html. A page less is no reason to stop, nor to hide one."""
    if processes.is_first():
        with contextlib.suppress(OSError, ValueError):
            write_report(session.folder)
