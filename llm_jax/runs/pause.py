"""What is due between two steps: an evaluation, samples, a checkpoint, the report."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

from llm_jax import processes
from llm_jax.data.loader import heldout_rows
from llm_jax.infer.generate import Sampler
from llm_jax.log import MetricsLog
from llm_jax.ops.sampling import Sampling
from llm_jax.runs.checkpoint import NotFinite, Progress
from llm_jax.runs.evaluate import Evaluation, evaluate
from llm_jax.runs.meter import Meter
from llm_jax.runs.refusals import diverged, not_saved
from llm_jax.runs.report import write_report
from llm_jax.runs.session import Session
from llm_jax.train.config import RunConfig
from llm_jax.train.step import TrainState

SAMPLE_TOKENS = 80


def pause(
    session: Session, state: TrainState, meter: Meter, rows: MetricsLog, *, end: bool, last: bool
) -> float | None:
    """Evaluate, sample and save, each when it is due; return the held-out loss where it was measured.

    All are due at the `end` of a run, after its last step or where a callback ends it. A run that a signal stops has
    its `last` step too, of which there is only time for a checkpoint. Raise `Diverged` after `patience` bad steps in a
    row.
    """
    c, row, progress = session.config, meter.read(), meter.progress
    step = progress.step
    if end or step % c.evaluate_every == 0:
        result = heldout(session, state)
        row |= result.numbers()
        progress = dataclasses.replace(progress, heldout_loss=result.loss)
        warn_of_own_loss(session, row, progress)
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
    update_report(session)
    meter.restart()
    return progress.heldout_loss


def warn_of_own_loss(session: Session, row: Mapping[str, Any], progress: Progress) -> None:
    """Say where a loss of the caller's own has no gradient, or is as small as means in place of sums would be."""
    if session.program.custom.loss is None:
        return
    tokens, heldout = progress.tokens / progress.step, progress.heldout_loss or 0
    if row["grad_norm"] == 0:
        session.say("the gradient of your own loss is 0: nothing is learned; compute it from params and batch")
    elif 0 < row["loss"] * tokens < 2 * session.config.accumulate * heldout < tokens * heldout / 10:
        session.say(
            f"your own loss is {row['loss']:.2g} a target where held-out loss is {heldout:.2g}: return its sum over "
            "the targets, not the mean"
        )


def is_due(c: RunConfig, step: int) -> bool:
    """Return whether an evaluation, samples or a checkpoint are due after `step`."""
    return any(step % every == 0 for every in (c.evaluate_every, c.checkpoint_every, c.sample_every))


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


def update_report(session: Session) -> None:
    """Write report.html. A page less is no reason to stop, nor to hide one."""
    if processes.is_first():
        with contextlib.suppress(OSError, ValueError):
            write_report(session.folder)
