"""A run to use: its metrics, its weights, and what its model says of a text."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from llm_jax import log
from llm_jax.data.loader import heldout_rows
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.infer.classify import Answer, classify
from llm_jax.infer.generate import Sampler, chosen_sampling
from llm_jax.log import Report
from llm_jax.model.precision import in_dtype
from llm_jax.model.taps import capture, edit
from llm_jax.model.transformer import Transformer
from llm_jax.ops.sampling import Sampling
from llm_jax.runs import folder as run_folder
from llm_jax.runs import restore
from llm_jax.runs.checkpoint import Checkpoints, Progress
from llm_jax.runs.code import changed_mixers
from llm_jax.runs.data import all_text, check_address, open_documents, open_run_data, open_text
from llm_jax.runs.evaluate import Evaluation, evaluate
from llm_jax.runs.report import card, line_of_run
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program


class Run:
    """The run in a folder. Its config is read, and its weights restored to one device, when they are first needed.

        run = Run.open("runs/quickstart")
        run.metrics["loss"][-1], run.evaluate().bits_per_byte
        run.generate(["def f("], temperature=0.5)

    `checkpoint` is `best` (by held-out loss; the last where none was measured), `last`, or a step. `report` gets a line
    for what happens on the way. Of a run that `fit` or `resume` returns, `progress` says how far it came and what it
    last measured; of one that is opened it is None. Raise `ValueError` where there is no run, or no checkpoint can be
    called so.
    """

    def __init__(
        self,
        folder: str | Path,
        checkpoint: str | int = "best",
        *,
        progress: Progress | None = None,
        report: Report = print,
    ) -> None:
        self.checkpoint, self.progress, self._report = str(checkpoint), progress, report
        self._given, self._absolute = run_folder.as_path(folder), run_folder.as_path(folder).absolute()
        run_folder.check_run(self.folder)
        if self.checkpoint not in ("best", "last") and not self.checkpoint.isdecimal():
            raise ValueError(f"no checkpoint is called {checkpoint!r}; use best, last, or a step, such as 1000")

    @classmethod
    def open(cls, folder: str | Path, checkpoint: str | int = "best", *, report: Report = print) -> "Run":
        """Return the run in `folder`. Raise `ValueError` where there is none, and name one nearby."""
        return cls(folder, checkpoint, report=report)

    @property
    def folder(self) -> Path:
        """Where the run is: as it was given, while the working directory is as it was then."""
        return self._given if self._given.absolute() == self._absolute else self._absolute

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, checkpoint={self.checkpoint!r})"

    def __str__(self) -> str:
        """Return where the run is and how far it came, of its files only: neither code nor weights are loaded."""
        return line_of_run(self.folder)

    def _repr_html_(self) -> str:
        return card(self.folder)

    @functools.cached_property
    def config(self) -> RunConfig:
        """What the run was made with. Raise `ValueError` where it is damaged, or names a layer that is not here."""
        return run_folder.load_config(self.folder)

    @functools.cached_property
    def model(self) -> Transformer:
        """The model of these weights: `lj.forward(run.model, run.params, run.tokens("a text"))`."""
        return Transformer(self.config.model)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run reads with."""
        return run_folder.tokenizer_of_run(self.folder)

    @property
    def metrics(self) -> Mapping[str, np.ndarray]:
        """What metrics.jsonl has by now, as columns: `step`, and each number, NaN where a row lacks it."""
        return columns(log.read(self.folder))

    @property
    def params(self) -> PyTree:
        """The weights, float32, in the tree of `Transformer(config.model)`."""
        return self._weights[0]

    @property
    def step(self) -> int:
        """The optimizer step of these weights."""
        if "_weights" in vars(self):
            return self._weights[1]
        with Checkpoints(self.folder, read_only=True) as checkpoints:
            return checkpoints.order(self.checkpoint)[0]

    @functools.cached_property
    def _weights(self) -> tuple[PyTree, int]:
        for path in changed_mixers(self.config.model, run_folder.load_code(self.folder)):
            self._report(f"{path} does not do what it did when {self.folder} was trained: its numbers may be others")
        with jax.ensure_compile_time_eval():  # a loss may ask for the weights of a teacher while it is traced
            return restore.weights(self.folder, self._program, self.checkpoint, report=self._report)

    @functools.cached_property
    def _program(self) -> Program:
        return restore.on_one_device(self.config)

    def evaluate(
        self, data: str | Path | Iterable[Any] | None = None, *, column: str | None = None, begin: bool | None = None
    ) -> Evaluation:
        """Return how well the model predicts what the run held out; or all of `data`, an address or documents.

        An address is what `data.uri` takes, documents are what `fit(data=)` takes: a list of texts, or of ids. They
        begin and end as in training. Those of an imported run begin as its tokenizer begins a text: with begin-of-text,
        and then an end is scored too, or with nothing, and then neither the first token nor an end is. `begin` says
        otherwise. `column` is the one of rows at an address that is text; None: that of the run. Raise `ValueError` for
        data that can't be read, and for a `column` of documents.
        """
        config = self.config
        if data is None:
            store = open_run_data(self.folder, config, self._report).split("heldout")
            batches, what = heldout_rows(store, config.data), f"what {self.folder} held out"
        else:
            begin = run_folder.begins(self.folder, config, self.tokenizer) if begin is None else begin
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, end_of_text=begin))
            if isinstance(data, str | Path):
                check_address(str(data))
                what, found = f"all of {data}", open_text(str(data), self.folder, config, self._report, column)
            else:
                if column is not None:
                    raise ValueError(f"column={column!r} is for rows at an address; leave it out with documents")
                what, found = "all that was given", open_documents(data, self.folder, config)
            store, batches = all_text(found, config.data)
        self._report(f"scoring {what}: {store.offsets[-1]:,} tokens of {store.n_documents:,} documents")
        program = restore.on_all_devices(config)
        if program.mesh.size == 1:
            params = self.params
        else:
            params, _ = restore.weights(self.folder, program, str(self.step), report=self._report)
        return evaluate(functools.partial(program.score, params), batches, store, config.data.task)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The model ready to generate. Made once a run; prompts begin as the documents did that it was trained on."""
        return self.new_sampler()

    def new_sampler(
        self, *, begin: bool | None = None, special: bool | None = None, weights: str | None = None
    ) -> Sampler:
        """Return a sampler for prompts that begin, or whose special tokens are read, otherwise than in training.

        `weights="int8"` holds matrices in a quarter of the memory.
        """
        reading, task = self._reading(begin, special), self.config.data.task
        return Sampler(self.config.model, self.params, self.tokenizer, task=task, weights=weights, **reading)

    def _reading(self, begin: bool | None, special: bool | None) -> dict[str, bool]:
        """Return how prompts are read: where the caller does not say, as documents were in training."""
        c = self.config
        return {
            "begin": run_folder.begins(self.folder, c, self.tokenizer) if begin is None else begin,
            "special": c.data.special if special is None else special,
        }

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        *,
        max_tokens: int = 200,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        draft: Sampler | str | None = None,
        **fields: Any,
    ) -> list[str]:
        """Return the continuation of each prompt, or of the only one.

        `fields` are those of `Sampling`, such as `temperature=0.5`, in the place of a `sampling`; without any the
        model's own distribution is sampled, temperature 1. A `draft` proposes tokens: the `sampler` of a smaller run,
        or `"lookup"`. Raise `ValueError` as `Sampler.stream` does.
        """
        sampling = chosen_sampling(sampling, fields)  # before the weights are restored
        return self.sampler.generate(prompts, sampling, max_tokens=max_tokens, stop=stop, seed=seed, draft=draft)

    def classify(
        self, prompts: str | Sequence[str], *, begin: bool | None = None, special: bool | None = None
    ) -> list[Answer]:
        """Return the likeliest answer to each prompt, or to the only one.

        Raise `ValueError` unless the run is a classifier.
        """
        model, task = self.config.model, self.config.data.task
        if task is None or model.n_classes is None:
            raise ValueError(f"{self.folder} is no classifier; use run.generate(prompts), or: llm-jax generate")
        params = in_dtype(self.params, model.dtype)
        return classify(model, params, self.tokenizer, task, prompts, **self._reading(begin, special))

    def tokens(self, text: str) -> Int[Array, "1 L"]:
        """Return `text` as a row of token ids, begun as a document is.

        Raise `ValueError` for anything but one text, and for one longer than `model.max_seq_len`.
        """
        if not isinstance(text, str):
            raise ValueError(
                f"this takes one text, got a {type(text).__name__}; call it for each text, or pass rows of ids to "
                "llm_jax.capture(run.model, run.params, tokens)"
            )
        reading = self._reading(None, None)
        begin = [self.tokenizer.begin_of_text] * reading["begin"]
        ids = [*begin, *self.tokenizer.encode(text, special=reading["special"])]
        if len(ids) > (most := self.config.model.max_seq_len):
            raise ValueError(
                f"the text has {len(ids)} tokens, and the model reads model.max_seq_len={most}; shorten it"
            )
        return jnp.array([ids], jnp.int32)

    def capture(self, text: str) -> dict[str, Array]:
        """Return every named activation of a forward pass over `text`: `{"resid_pre": [N, 1, L, D], ...}`."""
        return capture(self._program.model, self.params, self.tokens(text))

    def edit(self, text: str, edits: Mapping[str, Array]) -> Float[Array, "1 L V"]:
        """Return the logits over `text` with named activations replaced by `edits`, in the shapes of `capture`."""
        return edit(self._program.model, self.params, self.tokens(text), edits)


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return each number of some rows as an array over all of them, NaN where a row lacks it; `step` is int64."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, int | float))
    found = {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}
    return found | {"step": np.array([row["step"] for row in rows], np.int64)}
