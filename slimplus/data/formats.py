"""Rows of local files: text, JSON, CSV and Parquet, plain or compressed by gzip, read one after the other.

Only the column that holds the text is looked at, so that other columns may hold anything, and nothing of a file is read
beyond what the caller takes. Libraries are imported inside the functions: `find_format` is called while a command line
is validated.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO, cast

CHUNK = 2**20  # characters, or bytes, read at a time
LARGEST_ROW = 2**26  # characters of a JSON value: beyond them the file is no list of rows
TEXT_COLUMN = "text"
CHAT_COLUMNS = ("messages", "conversations")

Rows = Iterator[object]
"""The value of the text column of each row: a text, the messages of a chat, or None."""


class ColumnError(ValueError):
    """Error of a column that a file does not have.

    Attributes:
        columns: the columns it has.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        super().__init__(", ".join(columns))
        self.columns = columns


def find_format(file: Path) -> str | None:
    """Return which of `FORMATS` the name of a file says, in upper or lower case, or None."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    kind = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    return kind[0] if kind and kind[0] in FORMATS else None


def read_rows(file: Path, column: str | None, limit: int) -> Rows:
    """Yield the value of the text column of each row of a file; a text file is one row.

    Args:
        file: a file whose format `find_format` knows.
        column: name of the column; None is `text`, or else `messages` or `conversations`.
        limit: characters after which a text file is left, at the end of a line; it bounds no other format.

    Raises:
        ColumnError: if a row does not have the column.
        ValueError: if the file is damaged; errors of gzip and Arrow are ValueError or OSError as well.
        OSError: if the file cannot be read.
    """
    kind = find_format(file)
    if kind in _READERS:
        yield from _READERS[kind](file, column)
    else:
        yield _read_text(file, limit)


def choose_column(columns: Sequence[str], column: str | None) -> str:
    """Return the column that holds the text.

    Raises:
        ColumnError: if `columns` has none of that name.
    """
    names = (TEXT_COLUMN, *CHAT_COLUMNS) if column is None else (column,)
    for name in names:
        if name in columns:
            return name
    raise ColumnError(columns)


def _open(file: Path) -> TextIO:
    """Open a file as UTF-8 text, with or without a byte order mark, with all line ends read as line feeds."""
    if is_compressed(file):
        return cast("TextIO", gzip.open(file, "rt", encoding="utf-8-sig"))
    return file.open(encoding="utf-8-sig")


def is_compressed(file: Path) -> bool:
    """Return whether the size of a file says little about the length of its text."""
    return file.suffix.lower() in (".gz", ".parquet")


def _read_text(file: Path, limit: int) -> str:
    """Return a text file, or its first lines of at least `limit` characters together."""
    with _open(file) as opened:
        text = opened.read(limit)
        return text + opened.readline(CHUNK) if len(text) == limit else text


def _read_lines(file: Path, column: str | None) -> Rows:
    """Yield the rows of a file with a JSON object a line."""
    with _open(file) as opened:
        for number, line in enumerate(opened, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
                yield _value(row, column)


def _read_json(file: Path, column: str | None) -> Rows:
    """Yield the rows of a JSON array, or of JSON objects one after the other."""
    with _open(file) as opened:
        for row in _decode(opened):
            yield _value(row, column)


def _decode(opened: TextIO) -> Iterator[object]:
    """Yield the elements of a JSON array, or one value after the other, without holding more than one of them."""
    decoder, buffer, ended = json.JSONDecoder(), opened.read(CHUNK).lstrip(), False
    is_array = buffer.startswith("[")
    buffer = buffer[is_array:]
    while buffer or not ended:
        chunk = opened.read(CHUNK)
        ended = not chunk
        buffer += chunk
        start = 0
        while (start := _skip(buffer, start, " \t\r\n," if is_array else " \t\r\n")) < len(buffer):
            if is_array and buffer[start] == "]":
                return
            try:
                row, end = decoder.raw_decode(buffer, start)
            except ValueError:
                if ended or len(buffer) - start > LARGEST_ROW:
                    raise
                break  # the rest of the row has not been read
            if end == len(buffer) and not ended:
                break  # a number may go on
            yield row
            start = end
        buffer = buffer[start:]
    if is_array:
        raise ValueError("the list has no end")


def _skip(text: str, start: int, characters: str) -> int:
    """Return the first position from `start` that holds none of the characters."""
    while start < len(text) and text[start] in characters:
        start += 1
    return start


def _value(row: object, column: str | None) -> object:
    """Return the text column of a row of JSON."""
    if not isinstance(row, dict):
        raise ValueError(f"a row is of type {type(row).__name__}, not an object with columns")
    return row[choose_column(list(row), column)]


def _read_csv(file: Path, column: str | None) -> Rows:
    """Yield the rows of a table whose first line names the columns."""
    import pyarrow
    from pyarrow import csv as arrow_csv

    with _open(file) as opened:
        header = next(csv.reader(opened), [])
    name = choose_column(header, column)
    convert = arrow_csv.ConvertOptions(include_columns=[name], column_types={name: pyarrow.string()})
    read = arrow_csv.ReadOptions(block_size=LARGEST_ROW // 4, use_threads=False)  # a row must fit into a block
    with pyarrow.input_stream(str(file), compression="gzip" if is_compressed(file) else None) as stream:
        batches = arrow_csv.open_csv(stream, read, arrow_csv.ParseOptions(newlines_in_values=True), convert)
        for batch in batches:
            yield from batch.column(0).to_pylist()


def _read_parquet(file: Path, column: str | None) -> Rows:
    """Yield the rows of a Parquet file."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        name = choose_column(opened.schema_arrow.names, column)
        for batch in opened.iter_batches(batch_size=256, columns=[name], use_threads=False):
            yield from batch.column(0).to_pylist()


_READERS: dict[str, Callable[[Path, str | None], Rows]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
FORMATS = (".txt", *_READERS)
