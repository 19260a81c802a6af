"""Rows and the text in them: JSON lines, JSON arrays, CSV, TSV and parquet, all read as streams.

    .jsonl .ndjson .json    objects, one a line or one after the other, or one array of them
    .csv                    a header, then fields between commas; quotes as in RFC 4180
    .tsv                    a header, then fields between tabs; no quotes, as in IANA's text/tab-separated-values
    .parquet                strings in any of their encodings

One column is the text of a whole source (`text_column`). A row that has none, or an empty one, is counted (`Tally`).
"""

import contextlib
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from llm_jax.data.addresses import File, brief, one_line
from llm_jax.data.compressed import open_seekable, read_text

COLUMNS = ("text", "content")
HEAD_ROWS = 1000  # rows of a file that are looked at for its columns
HEAD_FILES = 100
BATCH_ROWS = 128  # of parquet, whose rows may be books
ROW_CHARS = 1 << 27  # a longer row is no row but a file of another shape, and memory ends somewhere
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 cannot
BLANKS = re.compile(r"[ \t\n\r]*")
# No number is ever text, so their values don't matter: float takes integers of any length.
DECODER = json.JSONDecoder(parse_int=float)

Row = tuple[str, dict[str, Any]]  # where it is, and its columns

STRING, NULL, TURNS, OBJECTS = "a string", "null", "a list of turns", "a list of objects"
TURN_KEYS = ({"role", "content"}, {"from", "value"})
CHAT_NAMES = ("messages", "conversations", "conversation", "chosen", "rejected")


@dataclass
class Tally:
    """How many rows of a source have no text, where the first one is, and the files where all are so."""

    column: str
    rows: int = 0
    without: int = 0
    first: str = ""
    bare: list[str] = field(default_factory=list)

    def skip(self, file: File, where: str, rows: int = 1) -> None:
        self.rows += rows
        self.without += rows
        self.first = self.first or (f"{file.name}, {where}" if rows else "")

    def line(self, uri: str, files: int) -> str:
        first = self.first if files > 1 else self.first.rpartition(", ")[2]
        line = f"{brief(uri)}: {self.without:,} of {self.rows:,} rows have no {self.column!r} (first: {first})"
        if files > 1 and self.bare:
            more = f" and {len(self.bare) - 3:,} more files" if len(self.bare) > 3 else ""
            line += f"; no row has it in {', '.join(self.bare[:3])}{more}"
        return line


def text_column(uri: str, files: Sequence[File], asked: str | None) -> str:
    """The column of `files`, all records, that is their text: `asked`, else `text`, else `content`.

    The first file decides that has one of them in a row of its head. Raises `ValueError` where none does, with the
    columns that there are.
    """
    wanted = COLUMNS if asked is None else (asked,)
    seen: dict[str, str] = {}
    for file in files[:HEAD_FILES]:
        head = _parquet_columns(file) if file.suffix == ".parquet" else _columns(file, wanted[0])
        seen |= {name: kind for name, kind in head.items() if kind != NULL or name not in seen}
        for name in wanted:
            if seen.get(name, NULL) != NULL or name == asked in seen:
                return name
    if seen:
        _refuse(uri, seen, asked)
    return wanted[0]


def texts(file: File, tally: Tally) -> Iterator[str]:
    """The text of each row of `file` that has some, in order; the others go into `tally`."""
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
    """The columns in the head of `file`, each with what it holds, up to the first row that has `wanted`."""
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
    """Say why no column of `seen` is the text of `uri`, and what to do."""
    names = list(seen)
    shown = ", ".join(brief(repr(name)) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    chat = [name for name in names if seen[name] == TURNS] or [name for name in CHAT_NAMES if name in seen]
    if asked is not None:
        raise ValueError(f"{brief(uri)} has no {asked!r} in its first rows but {shown}; name one of those")
    if chat:
        raise ValueError(
            f"{brief(uri)} holds chats ({chat[0]!r} of {shown}), which can't be trained on yet; name a column of text "
            "if there is one (data.column=NAME, --column NAME)"
        )
    inner = [name for name in names if seen[name] == OBJECTS]
    move = "name the one to train on (data.column=NAME, --column NAME)"
    if len(inner) == 1 and inner[0].isidentifier() and STRING not in seen.values():
        move = f"if {inner[0]!r} lists the rows, write them one a line: jq -c '.{inner[0]}[]' FILE > rows.jsonl"
    raise ValueError(f"{brief(uri)} has no 'text' or 'content' in its first rows but {shown}; {move}")


def _no_string(file: File, where: str, column: str, kind: str) -> ValueError:
    if kind == TURNS:
        return ValueError(
            f"{file}, {where}: {column!r} is a chat, which can't be trained on yet; name a column of text"
        )
    return ValueError(f"{file}, {where}: {column!r} is {kind}, expected a string; fix the row, or take it out")


def _rows(file: File) -> Iterator[Row]:
    return ROWS[file.suffix](str(file), read_text(file))


def json_rows(name: str, blocks: Iterator[str]) -> Iterator[Row]:
    """Objects one after the other, each on a line of its own or not, or one array of them.

    `blocks` are the text of the file `name`, which is held a block and a row at a time.
    """
    text = _JsonText(name, blocks)
    in_array = text.peek() == "["
    if in_array:
        text.pass_character()
    for number in itertools.count(1):
        found = text.peek()
        if in_array and number > 1 and found == ",":
            text.pass_character()
            found = text.peek()
        elif in_array and found != "]" and number > 1:
            raise text.error("expected a comma or the end of the array")
        elif found == ("]" if in_array else ""):
            break
        where = f"row {number}" if in_array else f"line {text.line}"
        yield where, text.take_object()
    if in_array:
        text.pass_character()
        if text.peek():
            raise text.error("expected nothing after the array")


class _JsonText:
    """A window on JSON, which slides over it."""

    def __init__(self, name: str, blocks: Iterator[str]) -> None:
        self.line = 1
        self._name, self._blocks = name, blocks
        self._text, self._at = "", 0

    def peek(self) -> str:
        """The next character that is no blank; none at the end."""
        while True:
            blanks = BLANKS.match(self._text, self._at)
            assert blanks is not None
            self._advance(blanks.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def pass_character(self) -> None:
        self._advance(self._at + 1)

    def take_object(self) -> dict[str, Any]:
        if self.peek() != "{":
            raise self.error('expected an object such as {"text": "..."}')
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except RecursionError:
                raise self.error("nested too deeply") from None
            except json.JSONDecodeError as error:  # of what is not all there yet, or of what is no JSON
                if len(self._text) - self._at > ROW_CHARS:
                    raise self.error(f"no object ends within {ROW_CHARS:,} characters; write one a line") from None
                if not self._read_on():
                    raise self.error(f"not JSON ({error.msg})") from None
            else:
                self._advance(end)
                return value

    def error(self, fault: str) -> ValueError:
        found = "the end of the file"
        if self.peek():
            found = repr(self._text[self._at : self._at + 20].partition("\n")[0])
        return ValueError(f"{self._name}, line {self.line}: {fault}, found {found}; fix it, or copy the file again")

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read_on(self) -> bool:
        """Read as much again as is left, so that a long row is tried few times. Returns whether there was more."""
        rest = self._text[self._at :]
        read, size = [], 0
        for block in self._blocks:
            read.append(block)
            size += len(block)
            if size >= len(rest):
                break
        self._text, self._at = "".join([rest, *read]), 0
        return bool(read)


def csv_rows(name: str, blocks: Iterator[str]) -> Iterator[Row]:
    """The rows of a table in CSV. Raises `ValueError` for what stands wrongly in quotes."""
    return _table_rows(name, csv.reader(_lines(name, blocks), strict=True))


def tsv_rows(name: str, blocks: Iterator[str]) -> Iterator[Row]:
    """The rows of a table with a tab between fields."""
    return _table_rows(name, csv.reader(_lines(name, blocks), delimiter="\t", quoting=csv.QUOTE_NONE))


def _table_rows(name: str, reader: Any) -> Iterator[Row]:
    """The rows below the header. Raises `ValueError` for one with more or fewer fields: a comma may have cut a text."""
    csv.field_size_limit(max(csv.field_size_limit(), ROW_CHARS))
    header: list[str] = []
    while True:
        where = f"line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}, {where}: {error}; fix its quotes, or copy the file again") from None
        if fields is None:
            return
        if not header:
            header = [column.strip() for column in fields]
            if twice := next((column for column in header if column and header.count(column) > 1), None):
                raise ValueError(f"{name}, {where}: two columns are named {twice!r}; rename one of them")
        elif len(fields) == len(header):
            yield where, dict(zip(header, fields, strict=True))
        elif fields:
            raise ValueError(
                f"{name}, {where}: {len(fields)} fields, expected {len(header)} as in the header; put a field with a "
                "separator or a line end in it between quotes, or use .jsonl"
            )


def _lines(name: str, blocks: Iterator[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from (f"{line}\n" for line in lines)
        if len(rest) > ROW_CHARS:
            raise ValueError(f"{name} has a line of more than {ROW_CHARS:,} characters; expected a row of fields")
    if rest:
        yield rest


def _parquet_columns(file: File) -> dict[str, str]:
    with _open_parquet(file) as table:
        return {field.name: _parquet_kind(field.type) for field in table.schema_arrow}


def _parquet_texts(file: File, tally: Tally) -> Iterator[str]:
    column = tally.column
    with _open_parquet(file) as table:
        kinds = [_parquet_kind(field.type) for field in table.schema_arrow if field.name == column]
        if len(kinds) > 1:
            raise ValueError(f"{file} has {len(kinds)} columns named {column!r}; rename all but one")
        if kinds in ([], [NULL]):
            tally.skip(file, "row 1", table.metadata.num_rows)
            return
        if kinds != [STRING]:
            raise _no_string(file, "row 1", column, kinds[0])
        number = 0
        for batch in _undamaged(file, table.iter_batches(batch_size=BATCH_ROWS, columns=[column])):
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
def _open_parquet(file: File) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"cannot read {file}: parquet needs pyarrow; pip install 'llm-jax[hf]'") from None
    with open_seekable(file) as raw:
        (table,) = _undamaged(file, (parquet.ParquetFile(raw, page_checksum_verification=True) for _ in range(1)))
        yield table


def _undamaged(file: File, items: Iterable[Any]) -> Iterator[Any]:
    """`items`, which pyarrow reads from `file` one by one. Raises `ValueError`, one line, where it can't."""
    iterator = iter(items)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # its own, those of Python, and those of the store
            raise ValueError(f"{file} is damaged: {one_line(error)}; copy or download it again") from error
        yield item


# Of formats that are text: from a name and blocks of it to rows, each with its line or its number.
ROWS: dict[str, Callable[[str, Iterator[str]], Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
}
