"""What a run works with: opened, checked and restored before its first step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from llm_jax import log, processes, runtime
from llm_jax.config import differences, to_dict
from llm_jax.data.loader import Loader, is_segmented, task_of
from llm_jax.data.mixture import Mixture
from llm_jax.data.shards import Shards
from llm_jax.infer.generate import prompt_ids
from llm_jax.log import Report, no_report
from llm_jax.model.config import own_layers
from llm_jax.model.count import parameter_counts
from llm_jax.model.mixer import check_decoding, check_mixer
from llm_jax.runs import folder as run_folder
from llm_jax.runs import restore
from llm_jax.runs.checkpoint import Checkpoints, Progress
from llm_jax.runs.code import Record, record_of
from llm_jax.runs.refusals import check_can_evaluate
from llm_jax.runs.seal import moves, seal, seal_of
from llm_jax.train.config import RunConfig
from llm_jax.train.custom import Custom
from llm_jax.train.optimizer import make_schedule
from llm_jax.train.program import Program
from llm_jax.train.step import Metrics, TrainState

# A callback of `fit`: what it returns is added to the row of the step in metrics.jsonl.
Callback = Callable[[int, TrainState, Metrics], Mapping[str, Any] | None]


def on(console: Console) -> Report:
    """Return a function that prints lines on `console` as they are."""
    return functools.partial(console.print, markup=False, emoji=False, highlight=False, soft_wrap=True)


@dataclasses.dataclass
class Session:
    """One process's share of a run: its program, data, checkpoints, and whoever watches.

    `code` is a user's own code that the run is made with, as it was when the session was opened.
    """

    config: RunConfig
    folder: Path
    console: Console
    shards: Shards | Mixture
    program: Program
    loader: Loader
    checkpoints: Checkpoints
    code: Record
    callbacks: Sequence[Callback] = ()

    @classmethod
    def open(
        cls,
        config: RunConfig,
        folder: Path,
        console: Console,
        shards: Shards | Mixture,
        custom: Custom = Custom(),
        callbacks: Sequence[Callback] = (),
    ) -> "Session":
        """Return the session of `config` on `shards`. Raise `ValueError` for what can't work, before it is computed."""
        check_can_evaluate(shards, config.data.heldout)
        task_of(shards.split("heldout"), config.data)  # raises now, and not at the first evaluation
        for mixer in own_layers(config.model):
            check_mixer(config.model, mixer, is_segmented(config.data))
            check_decoding(config.model, mixer)
        program = Program.on(config, custom=custom)
        loader = Loader(shards.split("train"), config.data, rows=program.rows, needs=custom.needs)
        loader.check_horizon(config.steps)
        try:
            asked = [config.data.ask(prompt) for prompt in config.prompts]
            prompt_ids(config.model, shards.tokenizer, asked, config.data.end_of_text, config.data.special)
        except ValueError as error:
            raise ValueError(
                f"prompts={config.prompts}: {error}; or set prompts=() (prompts=) for no samples"
            ) from error
        code = record_of(custom, config.model)
        seal = seal_of(config, shards, code)
        checkpoints = Checkpoints(folder, config.keep, seal=seal, say=on(console))
        return cls(config, folder, console, shards, program, loader, checkpoints, code, callbacks)

    def say(self, line: str) -> None:
        """Print `line` as it is."""
        on(self.console)(line)

    def begin(self) -> TrainState:
        """Return the state before the first step: fresh, or with the weights of `config.init_from`."""
        source = self.config.init_from
        return self.program.init() if source is None else self.program.init_with(self._weights_of(source))

    def _weights_of(self, source: str) -> PyTree:
        changed = differences(to_dict(run_folder.load_config(source).model), to_dict(self.config.model))
        theirs, ours = run_folder.tokenizer_of_run(source), self.shards.tokenizer
        if theirs.fingerprint != ours.fingerprint:
            raise ValueError(
                f"init_from={source} knows the tokens of {theirs.name}, but the data is in those of {ours.name}; "
                f"set data.tokenizer={source}/tokenizer"
            )
        if changed:
            self.say(f"the model of {source} is not quite this one: {'; '.join(changed)}")
        params, step = restore.weights(source, self.program, report=no_report)
        self.say(
            f"restored from {source} at step {step}: weights, nothing else; optimizer, schedule and data start anew"
        )
        return params

    def restore(self, old: RunConfig) -> tuple[TrainState, Progress]:
        """Return the state to resume from. Say what was restored, and what is not as it was under `old`.

        Raise `ValueError` where no step is left.
        """
        c, restored = self.config, self.checkpoints.restore(self.program.abstract_state, self.say)
        if restored is None:
            self.say(f"{self.folder} has no checkpoint yet: it begins again")
            return self.begin(), Progress()
        if (step := restored[1].step) >= c.steps:
            raise ValueError(
                f"{self.folder} is finished at step {step}; train further with more steps: --steps N, or "
                f"llm_jax.resume({str(self.folder)!r}, steps=N)"
            )
        own = self.program.custom.optimizer is not None
        self.say(
            f"resumed {self.folder} at step {step} of {c.steps}: weights, optimizer{'' if own else ', schedule'} and "
            f"data position ({self.loader.position(step)}) restored"
        )
        first = run_folder.first_machine
        there = self.checkpoints.sealed(step) or seal(old, "", None) | {"machine": first(self.folder)}
        if c.steps != (steps := there["config"]["steps"]) and own:
            self.say(f"steps {steps} -> {c.steps}: a schedule inside your own optimizer stays as it was")
        elif c.steps != steps:
            now, before = (np.asarray(make_schedule(c.optimizer, total)(step)).item() for total in (c.steps, steps))
            line = f"steps {steps} -> {c.steps}: the {c.optimizer.schedule} schedule stretches"
            if now != before:
                line += ", and here the learning rate is {} instead of {}".format(*log.apart(now, before))
            self.say(line)
        for change in moves(there, seal(c, "", None)):
            self.say(f"not the same bits as without the stop: {change}")
        return restored

    def last_heldout(self, progress: Progress) -> float | None:
        """Return the last held-out loss that was measured up to `progress`; None if none was."""
        rows = [row for row in log.read(self.folder) if row["step"] <= progress.step]
        return next((row["heldout_loss"] for row in reversed(rows) if "heldout_loss" in row), progress.heldout_loss)

    def introduce(self) -> None:
        """Say what will run where, and on how much text."""
        count = sum(parameter_counts(self.config.model).values())
        among = f" of {processes.count()} processes" if processes.count() > 1 else ""
        for path in (path for path in own_layers(self.config.model) if path.startswith("__main__:")):
            self.say(f"{path} is in a script or notebook: only there can this run be opened; a module can be imported")
        self.say(f"{count:,} parameters on {jax.device_count()} device(s){among}; run folder {self.folder}")
        if unguarded := runtime.warning(jax.local_devices()[0]):
            self.say(unguarded)
        if self.program.pipeline is not None:
            self.say(self.program.pipeline.timetable.summary)
        for line in self.loader.said(self.config.steps):
            self.say(line)
