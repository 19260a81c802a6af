"""The text in rows of JSON, CSV, TSV (`rows.py`) and parquet: one column of a whole source, chosen by name.

Rows without text in it are counted (`Tally`).
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from llm_jax.data.addresses import File, brief, one_line
from llm_jax.data.compressed import open_seekable, read_text
from llm_jax.data.rows import ROWS, Row

COLUMNS = ("text", "content")
HEAD_ROWS = 1000  # rows of a file that are searched for its columns
HEAD_FILES = 100
BATCH_ROWS = 128  # of parquet, whose rows may be books
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell but UTF-8 can't

STRING, NULL, TURNS, OBJECTS = "a string", "null", "a list of turns", "a list of objects"
TURN_KEYS = ({"role", "content"}, {"from", "value"})
CHAT_NAMES = ("messages", "conversations", "conversation", "chosen", "rejected")


@dataclass
class Tally:
    """How many rows of a source have no text, where the first one is, and the files without any text."""

    column: str
    rows: int = 0
    without: int = 0
    first: str = ""
    bare: list[str] = field(default_factory=list)

    def skip(self, file: File, where: str, rows: int = 1) -> None:
        """Count `rows` rows without text, the first of them at `where` in `file`."""
        self.rows += rows
        self.without += rows
        self.first = self.first or (f"{file.name}, {where}" if rows else "")

    def add(self, other: "Tally") -> None:
        """Add what was counted in the files after these."""
        self.rows += other.rows
        self.without += other.without
        self.first = self.first or other.first
        self.bare += other.bare

    def line(self, uri: str, files: int) -> str:
        """Return how many rows of `uri`, which has `files` files, lack text, as a line for the user."""
        first = self.first if files > 1 else self.first.rpartition(", ")[2]
        line = f"{brief(uri)}: {self.without:,} of {self.rows:,} rows have no {self.column!r} (first: {first})"
        if files > 1 and self.bare:
            more = f" and {len(self.bare) - 3:,} more files" if len(self.bare) > 3 else ""
            line += f"; no row has it in {', '.join(self.bare[:3])}{more}"
        return line


def text_column(uri: str, files: Sequence[File], asked: str | None) -> str:
    """Return the column of `files`, all records, that is their text: `asked`, else `text`, else `content`.

    The first file with one of them in its first rows decides. Raise `ValueError` if there is none, with the columns
    that there are.
    """
    wanted = COLUMNS if asked is None else (asked,)
    seen: dict[str, str] = {}
    for file in files[:HEAD_FILES]:
        head = _parquet_columns(file) if file.suffix == ".parquet" else _columns(file, wanted[0])
        seen = head | seen
        for name in wanted:
            if head.get(name, NULL) != NULL or name == asked in head:
                return name
    if seen:
        _refuse(uri, seen, asked)
    return wanted[0]


def texts(file: File, tally: Tally) -> Iterator[str]:
    """Yield the text of each row of `file`, in order; count rows without. Raise `ValueError` for a damaged file."""
    rows, without = tally.rows, tally.without
    if file.suffix == ".parquet":
        yield from _parquet_texts(file, tally)
    else:
        for where, row in _rows(file):
            text = row.get(tally.column)
            if not isinstance(text, str | None):
                raise _no_string(file, where, tally.column, _kind(text))
            if text:
                tally.rows += 1
                yield SURROGATE.sub("\ufffd", text)
            else:
                tally.skip(file, where)
    if tally.rows - rows == tally.without - without > 0:
        tally.bare.append(file.name)


def _columns(file: File, wanted: str) -> dict[str, str]:
    """Return the columns in the first rows of `file`, each with its kind, up to the first row that has `wanted`."""
    seen: dict[str, str] = {}
    for _, row in itertools.islice(_rows(file), HEAD_ROWS):
        seen |= {name: _kind(value) for name, value in row.items() if value is not None or name not in seen}
        if seen.get(wanted, NULL) != NULL:
            break
    return seen


def _kind(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return TURNS if any(keys <= value[0].keys() for keys in TURN_KEYS) else OBJECTS
    names = {str: STRING, type(None): NULL, dict: "an object", list: "a list", bool: "true or false"}
    return names.get(type(value), "a number")


def _refuse(uri: str, seen: Mapping[str, str], asked: str | None) -> NoReturn:
    """Raise `ValueError`: why no column of `seen` is the text of `uri`, and what to do."""
    names = list(seen)
    shown = ", ".join(brief(repr(name)) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    chat = [name for name in names if seen[name] == TURNS] or [name for name in CHAT_NAMES if name in seen]
    if asked is not None:
        raise ValueError(f"{brief(uri)} has no {asked!r} in its first rows, only {shown}; name one of those")
    if chat:
        raise ValueError(
            f"{brief(uri)} holds chats ({chat[0]!r} of {shown}), which can't be trained on yet; name a column of text "
            "if there is one: data.column=NAME"
        )
    inner = [name for name in names if seen[name] == OBJECTS]
    move = "name the one that is text: data.column=NAME"
    if len(inner) == 1 and inner[0].isidentifier() and STRING not in seen.values():
        move = f"if {inner[0]!r} lists the rows, write them one a line: jq -c '.{inner[0]}[]' FILE > rows.jsonl"
    raise ValueError(f"{brief(uri)} has no 'text' or 'content' in its first rows, only {shown}; {move}")


def _no_string(file: File, where: str, column: str, kind: str) -> ValueError:
    if kind == TURNS:
        return ValueError(
            f"{file}, {where}: {column!r} is a chat, which can't be trained on yet; name a column of text"
        )
    return ValueError(f"{file}, {where}: {column!r} is {kind}, expected a string; fix the row, or take it out")


def _rows(file: File) -> Iterator[Row]:
    return ROWS[file.suffix](str(file), read_text(file))


def _parquet_columns(file: File) -> dict[str, str]:
    with _open_parquet(file) as (_, columns):
        return dict(columns)


def _parquet_texts(file: File, tally: Tally) -> Iterator[str]:
    column = tally.column
    with _open_parquet(file) as (table, columns):
        kinds = [kind for name, kind in columns if name == column]
        if len(kinds) > 1:
            raise ValueError(f"{file} has {len(kinds)} columns named {column!r}; rename all but one")
        if kinds in ([], [NULL]):
            tally.skip(file, "row 1", table.metadata.num_rows)
            return
        if kinds != [STRING]:
            raise _no_string(file, "row 1", column, kinds[0])
        batches, number = table.iter_batches(batch_size=BATCH_ROWS, columns=[column]), 0
        while True:
            with _undamaged(file):
                batch = next(batches, None)
            if batch is None:
                return
            for text in _strings(file, batch.column(0), number):
                number += 1
                if text:
                    tally.rows += 1
                    yield text
                else:
                    tally.skip(file, f"row {number}")


def _strings(file: File, array: Any, before: int) -> list[str | None]:
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(array, start=before + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise ValueError(
                    f"{file}, row {number}: the byte 0x{byte:02x} is not UTF-8; fix the row, or take it out"
                ) from None
        raise


def _parquet_kind(kind: Any) -> str:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return STRING
    if types.is_null(kind):
        return NULL
    if (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type):
        names = {kind.value_type.field(i).name for i in range(kind.value_type.num_fields)}
        return TURNS if any(keys <= names for keys in TURN_KEYS) else OBJECTS
    return brief(kind)


@contextlib.contextmanager
def _open_parquet(file: File) -> Iterator[tuple[Any, list[tuple[str, str]]]]:
    """Yield the table in `file`, and the name of each column with its kind."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"cannot read {file}: parquet needs pyarrow; pip install 'llm-jax[hf]'") from None
    with open_seekable(file) as raw:
        with _undamaged(file):
            table = parquet.ParquetFile(raw, page_checksum_verification=True)
            columns = [(field.name, _parquet_kind(field.type)) for field in table.schema_arrow]
        yield table, columns


@contextlib.contextmanager
def _undamaged(file: File) -> Iterator[None]:
    """Turn whatever pyarrow raises about the content of `file` into a `ValueError` of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} is damaged: {one_line(error)}; copy or download it again") from error
