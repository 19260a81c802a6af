"""Batches recorded in tests/golden/batches.json: a run that was begun by an older version reads the same ones on.

python tests/recorded_batches.py    # writes them anew, which ends the exact resume of every run there is
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.loader import Batch, DataConfig, Loader, heldout_rows
from llm_jax.data.shards import SourceSlice, TokenStore
from llm_jax.data.task import TaskConfig
from llm_jax.data.tokenizer import build

RECORD = Path(__file__).parent / "golden" / "batches.json"
TASKS = {
    "causal": None,
    "translate": TaskConfig("translate", separator=":"),
    "classify": TaskConfig("classify", separator=":", answers=("yes", "no")),
}


def store(end_of_text: bool, sources: int = 1, edges: tuple[int, ...] = (), questions: bool = False) -> TokenStore:
    """A store that no file and no random generator decides, in shards that end at `edges`.

    Documents have 0 to 44 tokens, or are questions with the answer yes or no.
    """
    tokenizer = build("byte", tuple)
    end = [tokenizer.end_of_text] if end_of_text else []
    documents = []
    for number in range(211):
        length = (number * number * 37 + 11 * number) % 45
        text = "".join(chr(97 + (number * number + 7 * i) % 26) for i in range(length))
        text = f"{text[:9]}:{'yes' if number % 3 else 'no'}" if questions else text
        documents.append([*tokenizer.encode(text).tolist(), *end])
    stream = np.array([token for document in documents for token in document], np.uint16)
    offsets = np.cumsum([0, *map(len, documents)])
    starts = [*[0, 120, 151][:sources], 211]
    slices = [
        SourceSlice(f"source {i}", share, slice(a, b), slice(int(offsets[a]), int(offsets[b])))
        for i, (a, b, share) in enumerate(zip(starts, starts[1:], shares(sources), strict=False))
    ]
    shards = np.split(stream, edges)
    return TokenStore(tokenizer, shards, offsets, np.diff(offsets), [], slices if sources > 1 else ())


def shares(sources: int) -> list[Fraction]:
    weights = [5, 2, 3][:sources]
    return [Fraction(weight, sum(weights)) for weight in weights]


def recorded() -> Iterator[tuple[str, Loader | list[Batch]]]:
    """Every kind of batch: its name, and the loader of it or the batches of an evaluation."""
    for packing in ("documents", "windows"):
        for end in (True, False):
            c: Any = {"packing": packing, "end_of_text": end, "seq_len": 19, "batch_size": 6}
            kind = f"{packing}{'' if end else ', no ends'}"
            whole, pieces, three = store(end), store(end, edges=(1, 700, 701, 2000)), store(end, sources=3)
            yield kind, Loader(whole, DataConfig(**c))
            yield f"{kind}, other seed", Loader(whole, DataConfig(**c, seed=3))
            yield f"{kind}, many shards", Loader(pieces, DataConfig(**c))
            yield f"{kind}, mixture", Loader(three, DataConfig(**c))
            for process in range(2):
                rows = range(3 * process, 3 * process + 3)
                yield f"{kind}, mixture, process {process}", Loader(three, DataConfig(**c), rows=rows)
            yield f"{kind}, with documents", Loader(pieces, DataConfig(**c), needs=("documents",))
            yield f"{kind}, held out", list(heldout_rows(three, DataConfig(**c)))
            for name, task in TASKS.items():
                if packing == "documents" and task is not None and (end or name == "classify"):
                    asked = store(end, questions=True)
                    yield f"{kind}, {name}", Loader(asked, DataConfig(**c, task=task))
                    yield f"{kind}, {name}, held out", list(heldout_rows(asked, DataConfig(**c, task=task)))


def digest(batch: Batch) -> str:
    found = hashlib.sha256()
    for field in dataclasses.fields(batch):
        if (value := getattr(batch, field.name)) is not None:
            found.update(f"{field.name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:16]


def digests(of: Loader | list[Batch]) -> list[str]:
    """Those of some steps, over two epochs and far on; of an evaluation all."""
    if isinstance(of, list):
        return [digest(batch) for batch in of]
    epoch = of.steps_per_epoch
    return [digest(of.batch(step)) for step in (0, 1, 2, epoch - 1, epoch, epoch + 1, 5 * epoch + 3, 10**9)]


if __name__ == "__main__":
    kinds = {kind: digests(of) for kind, of in recorded()}
    RECORD.write_text(json.dumps(kinds, indent=1) + "\n")
