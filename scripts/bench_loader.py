"""Measure how fast batches come from prepared shards, and how fast text becomes tokens.

    .venv/bin/python scripts/bench_loader.py [TEXT] [--rounds 8] [--seconds 1] [--dry]

TEXT is an address as `llm-jax prepare` takes it, by default builtin:python. Batches are of 32 rows of 1024 tokens:
`windows` and `packed` documents, both with segments and positions; `stream`, windows without them, which is all that
the peers give; `table`, packed questions with their answers. The peers read the same tokens through a memory map:
`get_batch`, random windows in `torch.stack` as nanoGPT's users write it; a PyTorch `DataLoader` of shuffled windows
without workers; Grain with an element a window (`pip install torch grain`).

Tokenizing is measured with 1 and 2 processes over TEXT, written twelve times into forty files: megabytes of text a
second of wall time, the start of the processes included, and a second of CPU time of all of them.
"""

import atexit
import functools
import itertools
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench import Bench, row, show

from llm_jax.data import sources
from llm_jax.data.loader import DataConfig, Loader
from llm_jax.data.prepare import cached, prepare
from llm_jax.data.shards import open_shards
from llm_jax.data.task import TaskConfig

ROWS, LENGTH = 32, 1024
TOKENS = ROWS * LENGTH
CACHE = Path(tempfile.gettempdir()) / "llm_jax_bench_loader"
GOAL = "50 million"
COPIES, FILES = 12, 40


def one_vector(uri: str) -> np.ndarray:
    """Return all tokens of the train split as nanoGPT's users have them: a memory map of uint16."""
    store = open_shards(cached(DataConfig(uri=uri), CACHE)).split("train")
    path = CACHE / f"{store.n_tokens}.bin"
    if not path.exists():
        store.read(0, store.n_tokens).astype(np.uint16).tofile(path)
    return np.memmap(path, np.uint16, mode="r")


class Batches:
    """A side that makes batches: `measure` takes them for a while. The setting is `kind seconds uri`."""

    def __init__(self, setting: str) -> None:
        self.kind, seconds, self.uri = setting.split(" ", 2)
        self.seconds, self.batches = float(seconds), self.begin()
        next(self.batches)

    def begin(self) -> Iterator[Any]:
        raise NotImplementedError

    def measure(self) -> dict[str, float]:
        count, wall, cpu = 0, time.perf_counter(), time.process_time()
        while count < 4 or time.perf_counter() - wall < self.seconds:
            next(self.batches)
            count += 1
        return {
            "tokens/s": count * TOKENS / (time.perf_counter() - wall),
            "tokens/s of CPU time": count * TOKENS / (time.process_time() - cpu),
        }


def loader_of(kind: str, uri: str) -> Loader:
    settings: dict[str, dict[str, Any]] = {
        "windows": {"packing": "windows"},
        "packed": {"packing": "documents"},
        "stream": {"packing": "windows", "end_of_text": False},
        "table": {"uri": "builtin:numbers", "tokenizer": "byte", "task": TaskConfig("translate")},
    }
    config = DataConfig(**{"uri": uri, "seq_len": LENGTH, "batch_size": ROWS} | settings[kind])
    return Loader(open_shards(cached(config, CACHE)).split("train"), config)


class Ours(Batches):
    """The loader itself, without its thread."""

    def begin(self) -> Iterator[Any]:
        return map(loader_of(self.kind, self.uri).batch, itertools.count())


class Ahead(Batches):
    """The loader as a run has it, with the thread that reads ahead."""

    def begin(self) -> Iterator[Any]:
        return loader_of(self.kind, self.uri).batches()


class Stacked(Batches):
    """nanoGPT's `get_batch`: random windows of the memory map, stacked."""

    def begin(self) -> Iterator[Any]:
        import torch

        data = one_vector(self.uri)
        while True:
            starts = torch.randint(len(data) - LENGTH, (ROWS,))
            x = torch.stack([torch.from_numpy(data[i : i + LENGTH].astype(np.int64)) for i in starts])
            y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in starts])
            yield x, y


class TorchLoader(Batches):
    """A `torch.utils.data.DataLoader` over windows, one item a window, shuffled."""

    def begin(self) -> Iterator[Any]:
        import torch
        from torch.utils.data import DataLoader, Dataset

        data = one_vector(self.uri)

        class Windows(Dataset):
            def __len__(self) -> int:
                return (len(data) - 1) // LENGTH

            def __getitem__(self, number: int) -> Any:
                read = torch.from_numpy(data[number * LENGTH : (number + 1) * LENGTH + 1].astype(np.int64))
                return read[:-1], read[1:]

        while True:
            yield from DataLoader(Windows(), batch_size=ROWS, shuffle=True, num_workers=0, drop_last=True)


class Grain(Batches):
    """Grain, an element a window."""

    def begin(self) -> Iterator[Any]:
        import grain

        data = one_vector(self.uri)

        def window(number: int) -> dict[str, np.ndarray]:
            read = data[number * LENGTH : (number + 1) * LENGTH + 1].astype(np.int32)
            return {"tokens": read[:-1], "targets": read[1:]}

        rows = grain.MapDataset.range((len(data) - 1) // LENGTH).shuffle(seed=0).repeat()
        return iter(rows.map(window).batch(ROWS).to_iter_dataset(grain.ReadOptions(num_threads=0)))


class Tokenizing:
    """`prepare` with a number of processes; the setting is the text."""

    def __init__(self, setting: str, workers: int) -> None:
        self.workers, self.uri = workers, setting
        self.folder = Path(tempfile.mkdtemp(prefix="bench_loader"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.tokenizer = cached(DataConfig(uri=self.uri), CACHE) / "tokenizer"
        texts = [document.text for document in sources.documents(self.uri)] * COPIES
        (self.folder / "text").mkdir()
        for number in range(FILES):
            text = "<|endoftext|>".join(texts[number::FILES])
            (self.folder / "text" / f"{number:02}.txt").write_text(text, encoding="utf-8")
        self.size = sum(file.stat().st_size for file in (self.folder / "text").iterdir()) / 1e6

    def measure(self) -> dict[str, float]:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        out = self.folder / "out"
        prepare(str(self.folder / "text"), out, tokenizer=str(self.tokenizer), workers=self.workers)
        wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
        shutil.rmtree(out)
        return {"MB/s": self.size / wall, "MB/s of CPU time": self.size / cpu}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


PEERS: dict[str, Callable[[str], Any]] = {"get_batch": Stacked, "DataLoader": TorchLoader, "grain": Grain}
PROCESSES: dict[str, Callable[[str], Any]] = {
    "1 process": functools.partial(Tokenizing, workers=1),
    "2 processes": functools.partial(Tokenizing, workers=2),
}
SIDES: dict[str, Callable[[str], Any]] = {"llm_jax": Ours, "read ahead": Ahead, **PEERS, **PROCESSES}


def main() -> None:
    assert __doc__ is not None
    bench = Bench("loader", __doc__, SIDES, peers=tuple(PEERS))
    bench.parser.add_argument("uri", nargs="?", default="builtin:python", metavar="TEXT")
    bench.parser.add_argument("--seconds", type=float, default=1.0, help="a round, for each side")
    bench.parser.add_argument("--only", choices=("batches", "tokenizing"), help="one half of it")
    given = bench.arguments()
    cached(DataConfig(uri=given.uri), CACHE)  # before the sides, which would all prepare it
    rows = []
    for kind in ("windows", "packed", "stream", "table") if given.only != "tokenizing" else ():
        sides = ["llm_jax", "read ahead", *(PEERS if kind == "stream" else ())]
        rounds = bench.rounds(f"{kind} {given.seconds} {given.uri}", sides)
        goal = GOAL if kind in ("windows", "packed") else ""
        for quantity in ("tokens/s", "tokens/s of CPU time"):
            what = f"batches of {ROWS} x {LENGTH}, {kind}"
            rows.append(row(what, rounds, quantity, goal=goal, peers=tuple(PEERS), tokens=TOKENS))
    if given.only != "batches":
        rounds = bench.rounds(given.uri, list(PROCESSES))
        rows += [row("tokenizing", rounds, quantity, ours="2 processes") for quantity in ("MB/s", "MB/s of CPU time")]
    show(rows)
    bench.finish(rows, text=given.uri)


if __name__ == "__main__":
    main()
