"""Rows of the formats that are text, read as streams, a block and a row at a time.

.jsonl .ndjson .json    objects, on a line each or one after the other, or one array of them
.csv                    a header, then fields between commas; quotes as in RFC 4180
.tsv                    a header, then fields between tabs; no quotes, as in IANA's text/tab-separated-values
"""

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from llm_jax.data.addresses import brief

ROW_CHARS = 1 << 26  # a longer row means a file of another shape, and memory is limited
TOKEN_CHARS = 16  # longer than any name or escape of JSON, such as -Infinity
BLANKS = re.compile(r"[ \t\n\r]*")
# Numbers are never text, so their values don't matter: float accepts integers of any length.
DECODER = json.JSONDecoder(parse_int=float)

Row = tuple[str, dict[str, Any]]  # its line or number, and its columns


def json_rows(name: str, blocks: Iterator[str]) -> Iterator[Row]:
    """Yield objects, one after the other or in one array, from the `blocks` of text of the file `name`.

    Raise `ValueError`, with the line, for anything else.
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
    """A window that slides over JSON."""

    def __init__(self, name: str, blocks: Iterator[str]) -> None:
        self.line = 1
        self._name, self._blocks = name, blocks
        self._text, self._at = "", 0

    def peek(self) -> str:
        """Return the next character that is no blank; empty at the end."""
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
            except json.JSONDecodeError as error:  # the object is incomplete so far, or is not JSON
                if not _may_be_cut(error):
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise self.error(f"not JSON ({error.msg}, line {line})") from None
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
        """Read as much again as is left, so that a long row is parsed few times. Return whether there was more."""
        rest = self._text[self._at :]
        read, size = [], 0
        for block in self._blocks:
            read.append(block)
            size += len(block)
            if size >= len(rest):
                break
        self._text, self._at = "".join([rest, *read]), 0
        return bool(read)


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Return whether the error may only be that the text ends inside a string or another token."""
    return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - TOKEN_CHARS


def csv_rows(name: str, blocks: Iterator[str]) -> Iterator[Row]:
    """Yield the rows of a table in CSV. Raise `ValueError`, with the line, for bad quotes or missing fields."""
    return _table_rows(name, csv.reader(_lines(name, blocks), strict=True))


def tsv_rows(name: str, blocks: Iterator[str]) -> Iterator[Row]:
    """Yield the rows of a table with a tab between fields. Raise `ValueError` for rows of another width."""
    return _table_rows(name, csv.reader(_lines(name, blocks), delimiter="\t", quoting=csv.QUOTE_NONE))


def _table_rows(name: str, reader: Any) -> Iterator[Row]:
    """Yield the rows below the header. Raise `ValueError` for more or fewer fields: a comma may have cut a text."""
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
            if twice := [column for column, times in Counter(filter(None, header)).items() if times > 1]:
                raise ValueError(f"{name}, {where}: two columns are named {brief(twice[0])!r}; rename one of them")
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


# The readers by suffix: from the name and the blocks of a file to its rows.
ROWS: dict[str, Callable[[str, Iterator[str]], Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
}
