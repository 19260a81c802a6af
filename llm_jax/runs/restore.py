"""A run that is there to be used: its weights, on the devices that are here now."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from llm_jax.data.config import DataConfig, parse_uri
from llm_jax.data.loader import IGNORE, Batch, heldout_rows
from llm_jax.data.mixture import Mixture
from llm_jax.data.prepare import cuts_of
from llm_jax.data.shards import SPLITS, Shards, TokenStore, is_prepared, open_shards
from llm_jax.runs import folder as run_folder
from llm_jax.runs.checkpoint import Checkpoints
from llm_jax.runs.evaluate import Evaluation
from llm_jax.runs.evaluate import evaluate as measure
from llm_jax.runs.loop import open_data, open_run_data
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

Report = Callable[[str], object]


def on_one_device(config: RunConfig) -> Program:
    """The program of `config` on the first device, whatever the run was trained on."""
    return Program.on_one_device(config)


def on_the_host(config: RunConfig) -> Program:
    """The program of `config` in the memory of the host, which holds what an accelerator may not."""
    return Program.on_one_device(config, jax.local_devices(backend="cpu")[0])


def on_all_devices(config: RunConfig) -> Program:
    """The program of `config` as the run was trained; where its mesh does not fit these devices, on one of them."""
    try:
        return Program.on(config)
    except ValueError:
        return on_one_device(config)


def restore(
    folder: str | Path, program: Program, checkpoint: str = "best", *, report: Report = print
) -> tuple[PyTree, int]:
    """The weights of the run in `folder`, laid out for `program`, and their step.

    `checkpoint` is `best` (by held-out loss; the last where none was measured), `last`, or a step. One of the first
    two that is damaged is named, and passed over for the newest. Raises `ValueError` where there is no such
    checkpoint, or none that can be read.
    """
    with Checkpoints(Path(folder), read_only=True) as checkpoints:
        params, step = checkpoints.restore_params(program.abstract_state.params, report, checkpoint)
    report(f"{folder}: weights of step {step:,}")
    return params, step


def evaluate(
    folder: str | Path,
    uri: str | None = None,
    checkpoint: str = "best",
    *,
    column: str | None = None,
    begin: bool | None = None,
    report: Report = print,
) -> tuple[Evaluation, int]:
    """Return how well the run in `folder` predicts what it held out, or all the text at `uri`; and the weights' step.

    Documents at `uri` begin and end as in training. Those of an imported run begin as its tokenizer begins a text: with
    begin-of-text, and then an end is scored too, or with nothing, and then neither the first token nor an end is.
    `begin` says otherwise. `column` is the one of rows at `uri` that is text; None: that of the run.
    """
    config = run_folder.load_config(folder)
    if uri is None:
        store = open_run_data(Path(folder), config, report).split("heldout")
        batches = heldout_rows(store, config.data)
    else:
        begin = run_folder.begins(Path(folder), config, run_folder.load_tokenizer(folder)) if begin is None else begin
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, end_of_text=begin))
        shards = open_text(uri, Path(folder), config, report, column)
        store, batches = all_text(shards, config.data)
    what = f"what {folder} held out" if uri is None else f"all of {uri}"
    report(f"scoring {what}: {store.offsets[-1]:,} tokens of {store.n_documents:,} documents")
    program = on_all_devices(config)
    params, step = restore(folder, program, checkpoint, report=report)
    return measure(functools.partial(program.score, params), batches, store, config.data.task), step


def open_text(uri: str, folder: Path, config: RunConfig, report: Report, column: str | None = None) -> Shards | Mixture:
    """The text at `uri` in the tokens of the run in `folder`. Raises `ValueError` for shards that have others.

    Of several sources those that are prepared are taken as they are, and the others have nothing held out: all of both
    is text to score. `column` is that of the sources that have rows.
    """
    sources = parse_uri(uri)
    if is_prepared(uri) or len(sources) == 1:
        return _open_one(uri, folder, config, report, column)
    rows = dataclasses.replace(config, data=dataclasses.replace(config.data, column=column or config.data.column))
    return Mixture(sources, [_open_one(source.uri, folder, rows, report) for source in sources])


def _open_one(uri: str, folder: Path, config: RunConfig, report: Report, column: str | None = None) -> Shards:
    if not is_prepared(uri):
        data = dataclasses.replace(config.data, uri=uri, tokenizer=str(folder / "tokenizer"), heldout=0.0)
        data = dataclasses.replace(data, **cuts_of(data, uri))
        data = dataclasses.replace(data, column=column or data.column)
        found = open_data(dataclasses.replace(config, data=data), report)
        assert isinstance(found, Shards)
        return found
    shards, ours = open_shards(uri), run_folder.load_tokenizer(folder)
    if shards.tokenizer.fingerprint != ours.fingerprint:
        raise ValueError(
            f"{uri} is in the tokens of {shards.tokenizer.name}, but {folder} knows those of {ours.name}; "
            f"prepare the text with --tokenizer {folder}/tokenizer, or name the text itself"
        )
    if column not in (None, shards.manifest.column):
        raise ValueError(
            f"{uri} is prepared already, of the column {shards.manifest.column!r}; leave out --column {column}"
        )
    if shards.manifest.end_of_text != config.data.end_of_text:
        raise ValueError(
            f"{uri} has end_of_text={shards.manifest.end_of_text}, but texts of {folder} have "
            f"end_of_text={config.data.end_of_text}; add {'--no-begin' if config.data.end_of_text else '--begin'}, or "
            "name the text itself"
        )
    return shards


def all_text(data: Shards | Mixture, config: DataConfig) -> tuple[TokenStore, Iterator[Batch]]:
    """Both splits of `data` as one store, in which each source is a part, and all of their rows."""
    sources, shards = (data.sources, data.shards) if isinstance(data, Mixture) else ((), [data])
    splits = [list(map(one.split, SPLITS)) for one in shards]
    whole = TokenStore.joined(list(map(TokenStore.joined, splits)), sources)
    return whole, all_rows([store for both in splits for store in both], config)


def all_rows(stores: Sequence[TokenStore], config: DataConfig) -> Iterator[Batch]:
    """The batches of one store after the other, as `heldout_rows` cuts them; documents are numbered on."""
    before = 0
    for store in stores:
        for batch in heldout_rows(store, config) if store.n_documents else ():
            counted = batch.documents != IGNORE
            yield dataclasses.replace(batch, documents=np.where(counted, batch.documents + before, IGNORE))
        before += store.n_documents
