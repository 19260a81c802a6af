"""Rows of the formats that are text, read as streams: held are a block and a row.

.jsonl .ndjson .json    objects, one a line or one after the other, or one array of them
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

ROW_CHARS = 1 << 26  # a longer row is no row but a file of another shape, and memory ends somewhere
TOKEN_CHARS = 16  # more than any name or escape has in JSON, such as -Infinity
BLANKS = re.compile(r"[ \t\n\r]*")
# No number is ever text, so their values don't matter: float takes integers of any length.
DECODER = json.JSONDecoder(parse_int=float)

Row = tuple[str, dict[str, Any]]  # where it is, and its columns


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


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    """Whether the fault may be only that its text ends there: inside of a string, or of any other token."""
    return error.msg.startswith("Unterminated string") or error.pos > len(error.doc) - TOKEN_CHARS


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


# Of formats that are text: from a name and blocks of it to rows, each with its line or its number.
ROWS: dict[str, Callable[[str, Iterator[str]], Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
}
