"""Text to token shards: `prepare` writes a folder of them, `cached` finds or writes those that a config needs."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import json
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llm_jax.data import sources
from llm_jax.data.config import DataConfig, check_heldout, parse_uri
from llm_jax.data.generated import GENERATED
from llm_jax.data.pool import Encoded, encode_all, workers_of
from llm_jax.data.shards import FORMAT, SPLITS, Manifest, Split, is_prepared, names_a_column, read_manifest
from llm_jax.data.sources import Document
from llm_jax.data.tokenizer import Tokenizer, build, load_tokenizer
from llm_jax.files import sha256_of, whole_folder, write_json, written
from llm_jax.log import Report, no_report

GIVEN = "given"  # the folder in the cache of documents that a program gave (`given.py`)
SETTINGS = ("tokenizer", "separator", "column", "end_of_text", "heldout", "heldout_by", "special")
SHARD_TOKENS = 1 << 25
READER = 2  # the version of how text is read; raise it when the documents of a source change

Cuts = dict[str, str | None]
SplitOf = Callable[[int, int], str]  # of a document, given the hash (`sources.hash_of`) and the number of its bytes


def prepare(
    uri: str,
    out: str | Path,
    *,
    tokenizer: str = "train:4096",
    separator: str | None = None,
    column: str | None = None,
    end_of_text: bool = True,
    heldout: float = 0.05,
    heldout_by: Literal["hash", "tail"] = "hash",
    special: bool = False,
    workers: int | str | None = None,
    report: Report = no_report,
) -> Manifest:
    """Tokenize the documents of `uri` into the folder `out`, which appears whole or not at all.

    Args:
      tokenizer: as `tokenizer.build` takes it; one that learns from text learns from all documents.
      separator: what documents are cut at, as `sources.documents` takes it.
      column: which column is text, as `sources.documents` takes it.
      end_of_text: whether the end-of-text token follows every document.
      heldout: the fraction of documents held out for evaluation.
      heldout_by: "hash" chooses them by content, so that a document keeps its side as the corpus grows, and shares it
        with its copies; "tail" takes the last ones.
      special: whether text that spells a special token becomes it; if not, `report` names the first such document.
      workers: how many processes tokenize (None: one a core), `ray` for a Ray cluster of this machine, or the address
        of one, `ray://HOST:PORT`; the shards are the same.

    Raise `ValueError` if `out` exists, a split stays empty, the disk is full or the text changes, and for a mixture.
    """
    check_heldout(heldout, heldout_by)
    _check_one_source(uri)
    workers = workers_of(workers)
    report = functools.cache(report)  # the source is read several times, and its lines are reported once
    read = functools.partial(sources.documents, uri, separator, column, report)
    content = sources.fingerprint(uri)
    with _new_folder(Path(out)) as folder:
        report(f"building the tokenizer {tokenizer} from {uri}" if learns(tokenizer) else f"tokenizer {tokenizer}")
        encoder = build(tokenizer, lambda: (document.text for document in read()))
        encoder.save(folder / "tokenizer")
        split_of = _split_of(read, heldout, heldout_by)
        labels = dict(zip(SPLITS, SPLITS if heldout else ("tokenized", ""), strict=True))
        writers = {name: SplitWriter(folder, name, encoder, end_of_text, report, labels[name]) for name in SPLITS}
        encoded = encode_all(
            folder / "tokenizer",
            uri,
            separator=separator,
            column=column,
            special=special,
            workers=workers,
            report=report,
        )
        splits = _write(encoded, split_of, writers)
        manifest = Manifest(
            format=FORMAT,
            source=uri,
            separator=separator,
            column=column,
            tokenizer=tokenizer,
            tokenizer_fingerprint=encoder.fingerprint,
            vocab_size=encoder.vocab_size,
            end_of_text=end_of_text,
            heldout=heldout,
            heldout_by=heldout_by,
            splits=splits,
            content=content,
            special=special,
        )
        check_sides(manifest)
        _check_unchanged(uri, content)
        write_json(folder / "meta.json", dataclasses.asdict(manifest))
    return manifest


def _check_one_source(uri: str) -> None:
    if len(parse_uri(uri)) > 1:
        raise ValueError(
            f"{uri} is a mixture, and prepare takes one source; prepare the first into A, each other with --tokenizer "
            "A/tokenizer into B, and train with data.uri=A:0.7,B:0.3 data.tokenizer=A/tokenizer"
        )


def _split_of(read: Callable[[], Iterable[Document]], heldout: float, heldout_by: str) -> SplitOf:
    """Return the split of each document; for the last ones all bytes are counted before."""
    if heldout_by == "hash":
        return by_hash(heldout)
    return by_tail(heldout, sum(len(document.text.encode()) for document in read()))


def _write(encoded: Iterable[Encoded], split_of: SplitOf, writers: Mapping[str, "SplitWriter"]) -> dict[str, Split]:
    """Write each document, with its ids, into its split; return the splits."""
    for job in encoded:
        ids = np.split(job.ids, np.cumsum(job.sizes)[:-1]) if len(job.sizes) else []
        facts = zip(job.origins, job.bytes.tolist(), job.hashes.tolist(), ids, strict=True)
        for origin, n_bytes, hashed, tokens in facts:
            writers[split_of(hashed, n_bytes)].add(origin, n_bytes, tokens)
    return {name: writer.close() for name, writer in writers.items()}


def cached(config: DataConfig, cache_dir: str | Path, report: Report = no_report) -> Path:
    """Return the folder of the shards that `config`, of one source, needs; prepare it in `cache_dir` if missing.

    The name of the folder is a digest of content, settings and reader: text that changed, or would be read differently
    today, is prepared again. If `uri` is itself a folder of shards it is the result; a change of its text or its reader
    since then is reported. Raise `ValueError` if it was prepared with other settings, and like `prepare`.
    """
    settings: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS}
    given = Path(config.uri)
    if is_prepared(config.uri):
        manifest = read_manifest(given)
        _check_agreement(settings, manifest)
        if _has_changed(given, manifest):
            report(
                f"{given} is what {manifest.source} was when it was prepared, and that text has changed since: the run "
                "reads the old one; prepare it again for the new one"
            )
        if not names_a_column(given) and sources.names_rows(manifest.source):
            report(
                f"{given} was prepared by an older reader, which may have read other text of the rows of "
                f"{manifest.source}; if it holds rows, prepare it again"
            )
        return given
    key = settings | {"format": FORMAT, "reader": READER, "content": _content(config.uri)}
    if Path(config.tokenizer).is_dir():
        key["tokenizer"] = load_tokenizer(config.tokenizer).fingerprint
    folder = Path(cache_dir) / _digest(key)
    if not folder.exists():
        try:
            prepare(config.uri, folder, **settings, report=report)
        except ValueError:
            if not folder.exists():  # otherwise another process was faster
                raise
    return folder


def cached_sources(config: DataConfig, cache_dir: str | Path, report: Report = no_report) -> list[Path]:
    """Return the folder of the shards of each source of `config`, all in the ids of one tokenizer.

    A tokenizer that learns from text learns from the documents of all sources, in their order. A separator cuts the
    sources that are text. Raise `ValueError` like `cached`, and if a folder of shards would have to agree with a
    tokenizer that is not trained yet.
    """
    uris = [source.uri for source in config.sources]
    if len(uris) == 1:
        return [cached(config, cache_dir, report)]
    cuts = {uri: cuts_of(config, uri) for uri in uris}
    given, spec = [uri for uri in uris if is_prepared(uri)], config.tokenizer
    if learns(spec) and len(given) < len(uris):
        if given:
            raise ValueError(
                f"{given[0]} has a tokenizer already, which {spec} would not be; set "
                f"data.tokenizer={given[0]}/tokenizer for the whole mixture"
            )
        spec = str(_shared_tokenizer(spec, cuts, Path(cache_dir), report))
    return [
        cached(dataclasses.replace(config, uri=uri, tokenizer=spec, **cuts[uri]), cache_dir, report) for uri in uris
    ]


def learns(spec: str) -> bool:
    """Return whether a tokenizer learns from the text."""
    return re.fullmatch(r"char|train:\d+", spec) is not None


def _shared_tokenizer(spec: str, cuts: Mapping[str, Cuts], cache_dir: Path, report: Report) -> Path:
    """Return the folder of the tokenizer `spec` for all sources, the keys of `cuts`; train it if missing."""
    contents = {uri: _content(uri) for uri in cuts}
    key = {
        "tokenizer": spec,
        "format": FORMAT,
        "reader": READER,
        "sources": [(contents[uri], cuts[uri]) for uri in cuts],
    }
    folder = cache_dir / f"tokenizer-{_digest(key)}"
    if folder.exists():
        return folder
    report(f"building the tokenizer {spec} from {', '.join(cuts)}")
    readers = (sources.documents(uri, cut["separator"], cut["column"]) for uri, cut in cuts.items())
    texts = (document.text for documents in readers for document in documents)
    tokenizer = build(spec, lambda: texts)
    for uri, content in contents.items():
        _check_unchanged(uri, content)
    with contextlib.suppress(FileExistsError), whole_folder(folder, "prepare") as filling:  # or another is faster
        tokenizer.save(filling)
    return folder


def cuts_of(config: DataConfig, uri: str) -> Cuts:
    """Return what cuts `uri`, one of several sources, into documents: for text a separator, for rows a column.

    The other of the two settings is None; shards keep what they were prepared with. Raise `ValueError` if `uri` can't
    be read.
    """
    if is_prepared(uri):
        manifest = read_manifest(Path(uri))
        return {"separator": manifest.separator, "column": manifest.column}
    if uri in GENERATED:
        return {"separator": None, "column": None}
    with _hint(uri):
        rows = sources.holds_records(uri)
    return {"separator": None if rows else config.separator, "column": config.column if rows else None}


def _check_unchanged(uri: str, content: str) -> None:
    """Raise `ValueError` where the text at `uri` has another fingerprint by now."""
    if sources.fingerprint(uri) != content:
        raise ValueError(f"{uri} changed while it was read; wait until it is whole, and start again")


def _content(uri: str) -> str:
    with _hint(uri):
        return sources.fingerprint(uri)


@contextlib.contextmanager
def _hint(uri: str) -> Iterator[None]:
    """Add to an error about an address with a comma how several addresses are written."""
    try:
        yield
    except ValueError as error:
        if "," not in uri:
            raise
        hint = "several sources have a weight each, as in data.uri=a.jsonl:0.7,b.jsonl:0.3"
        raise ValueError(f"{error}; {hint}") from error


def _has_changed(folder: Path, manifest: Manifest) -> bool:
    """Return whether the text of the shards in `folder` is on this machine and has changed since they were made."""
    if manifest.content is None or sources.last_written(manifest.source) <= (folder / "meta.json").stat().st_mtime:
        return False
    return sources.fingerprint(manifest.source) != manifest.content


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


class SplitWriter:
    """Write one split, reported as `label`. Holds one shard of tokens, and two numbers for each document."""

    def __init__(
        self, folder: Path, name: str, encoder: Tokenizer, end_of_text: bool, report: Report, label: str
    ) -> None:
        self._folder, self._name, self._report, self._label = folder, name, report, label
        self._dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
        self._end = np.array([encoder.end_of_text] if end_of_text else [], self._dtype)
        self._offsets, self._bytes = array("q", [0]), array("q")
        self._tokens: list[np.ndarray] = []
        self._origins: list[str] = []
        self._flushed = 0
        self._files: dict[str, str] = {}

    def add(self, origin: str, n_bytes: int, tokens: np.ndarray) -> None:
        """Add the tokens of a document of `n_bytes` bytes; write a shard whenever there are enough."""
        self._tokens += [tokens.astype(self._dtype, copy=False), self._end]
        self._origins.append(" ".join(origin.splitlines()))
        self._offsets.append(self._offsets[-1] + len(tokens) + len(self._end))
        self._bytes.append(n_bytes)
        if self._offsets[-1] - self._flushed >= SHARD_TOKENS:
            self._flush()

    def close(self) -> Split:
        """Write what is left; return the counts of the split and the checksums of its files."""
        self._flush()
        self._save("offsets", np.array(self._offsets, np.int64))
        self._save("bytes", np.array(self._bytes, np.int64))
        origins = f"{self._name}_origins.txt"
        self._files[origins] = sha256_of(self._folder / origins)
        return Split(len(self._bytes), self._offsets[-1], sum(self._bytes), self._files)

    def _flush(self) -> None:
        with open(self._folder / f"{self._name}_origins.txt", "a", encoding="utf-8") as file:
            file.writelines(f"{origin}\n" for origin in self._origins)
        if self._tokens:
            self._save(f"{len(self._files):05d}", np.concatenate(self._tokens))
        if self._label:
            self._report(f"{self._label}: {self._offsets[-1]:,} tokens of {len(self._bytes):,} documents")
        self._tokens, self._origins, self._flushed = [], [], self._offsets[-1]

    def _save(self, what: str, values: np.ndarray) -> None:
        file = f"{self._name}_{what}.npy"
        np.save(content := io.BytesIO(), values)  # not to the file itself: see `files.written`
        with written(self._folder / file) as out:
            out.write(content.getbuffer())
        self._files[file] = sha256_of(self._folder / file)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out` at the end, or is removed after an error."""
    if out.exists():
        raise ValueError(f"{out} exists already, and shards go into a new folder; delete it or name another")
    try:
        with whole_folder(out, "prepare") as folder:
            yield folder
    except OSError as error:  # errors of reading are ValueErrors
        reason = error.strerror or error
        if error.errno != errno.ENOSPC:
            raise ValueError(f"cannot write {out}: {reason}; fix that, or name another folder") from error
        free = shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.exists())).free
        raise ValueError(
            f"cannot write {out}: {reason} ({free:,} bytes free without it); make room, or name a folder on another "
            "disk"
        ) from error


def by_hash(heldout: float) -> SplitOf:
    """Return the split of a document by the hash of its bytes."""
    return lambda hashed, n_bytes: "heldout" if hashed < heldout * 2**64 else "train"


def by_tail(heldout: float, total: int) -> SplitOf:
    """Return the split of each document that comes, of `total` bytes in all: the last ones are held out."""
    first, seen = (1 - heldout) * total, 0

    def side(hashed: int, n_bytes: int) -> str:
        nonlocal seen
        start, seen = seen, seen + n_bytes
        return "heldout" if start >= first else "train"

    return side


def check_sides(manifest: Manifest, given: bool = False) -> None:
    """Raise `ValueError` where nothing is left to train on, or nothing is held out; `given` by a program or not."""
    train, heldout = (manifest.splits[name].documents for name in SPLITS)
    if train and (heldout or not manifest.heldout):
        return
    if given or Path(manifest.source).parent.name == GIVEN:
        raise ValueError(
            f"data= has {train + heldout} documents, of which data.heldout={manifest.heldout:g} by "
            f"{manifest.heldout_by} leaves {train} to train on and {heldout} held out; give more documents, or "
            "another data.heldout (a row of ids is cut where the tokenizer's end_of_text is; cut one without any into "
            "pieces: numpy.array_split(ids, 100))"
        )
    raise ValueError(
        f"data.heldout={manifest.heldout:g} by {manifest.heldout_by} leaves {train} documents to train on and "
        f"{heldout} held out; cut the text into more with a separator, such as data.separator=$'\\n\\n', or change "
        "data.heldout"
    )


def _check_agreement(settings: Mapping[str, Any], manifest: Manifest) -> None:
    made = {name: getattr(manifest, name) for name in settings}
    folder = Path(settings["tokenizer"])
    if folder.is_dir() and load_tokenizer(folder).fingerprint == manifest.tokenizer_fingerprint:
        made["tokenizer"] = settings["tokenizer"]  # a saved one is compared by its ids, not its path
    differ = [name for name in settings if made[name] != settings[name]]
    if differ:
        was, asked = (", ".join(f"{name}={of[name]!r}" for name in differ) for of in (made, settings))
        raise ValueError(f"the shards were prepared with {was}, and the config has {asked}; make them agree")
