"""How csv, JSON-lines and parquet files become chunks of string columns. It gives them no meaning.

Each block of a text file goes through polars when its lines and its records agree one to one, and
through Python's own readers otherwise (line breaks inside quotes, blank or broken lines): slower,
and exact about which row is wrong. The header of a csv file is row 1.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from genrec.data.reading import Block, RawFile, blocks
from genrec.errors import DataError, nearest

PARQUET_ROWS = 500_000
ROW = "__row__"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its number, what is wrong with it, and a word for counting."""

    row: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Some rows: string columns (null = nothing there) and ROW (Int64), and the broken lines."""

    frame: pl.DataFrame
    broken: list[BadRow] = field(default_factory=list)


def require_columns(file: RawFile, wanted: Sequence[str], there: Sequence[str]) -> None:
    """Raise `DataError` naming the missing column and the nearest one that is there."""
    for name in wanted:
        if name not in there:
            raise DataError(
                f"{file.name}: no column {name!r}. It has: {', '.join(map(str, there))}."
                f"{nearest(name, there)}"
            )
        if list(there).count(name) > 1:
            raise DataError(
                f"{file.name}: {list(there).count(name)} columns are named {name!r}, expected one. "
                "Rename the others."
            )


def delimited(
    file: RawFile,
    *,
    separator: str = ",",
    quotes: bool = True,
    encoding: str = "utf-8",
    names: Sequence[str] | None = None,
    columns: Callable[[list[str]], Sequence[str]] | Sequence[str] | None = None,
) -> Iterator[Chunk]:
    """Yield the rows of a csv-like file as string columns.

    Args:
        file: what to read.
        separator: between fields; several characters are allowed ("::").
        quotes: double quotes enclose fields.
        encoding: "utf-8" or "latin-1".
        names: column names of a file without a header; None reads the header.
        columns: which to keep (default all), or a function of the header that says which.

    Raises:
        DataError: as `blocks`, or a wanted column that is not there.
    """
    header = list(names) if names is not None else None
    wanted: list[str] | None = None
    for block in blocks(file, encoding=encoding, quotes=quotes):
        data, first = block.data, block.first_line
        if len(separator) > 1:
            data, mark = data.replace(separator.encode(), b"\x1f"), "\x1f"
        else:
            mark = separator
        if header is None:
            header, data, used = _header(data, mark, quotes)
            first += used
        if wanted is None:
            chosen = columns(header) if callable(columns) else columns
            wanted = list(header if chosen is None else chosen)
            require_columns(file, wanted, header)
        yield _delimited_chunk(data, first, header, wanted, mark, quotes)


def _header(data: bytes, separator: str, quotes: bool) -> tuple[list[str], bytes, int]:
    text = io.StringIO(data.decode("utf-8"), newline="")
    reader = csv.reader(text, delimiter=separator, quoting=_quoting(quotes))
    header = next(row for row in reader if any(name.strip() for name in row))
    used = reader.line_num
    place = 0
    for _ in range(used):
        place = data.index(b"\n", place) + 1
    return [name.strip() for name in header], data[place:], used


def _quoting(quotes: bool) -> Any:
    return csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE


def _delimited_chunk(
    data: bytes, first: int, header: list[str], wanted: list[str], separator: str, quotes: bool
) -> Chunk:
    if not data.strip():
        return Chunk(_frame({name: [] for name in wanted}, []))
    try:
        frame = pl.read_csv(
            io.BytesIO(data),
            has_header=False,
            schema=dict.fromkeys(header, pl.String),
            separator=separator,
            quote_char='"' if quotes else None,
        )
    except pl.exceptions.PolarsError:
        frame = None
    blank = b"\n\n" in data or b"\n\r\n" in data or data[:1] in b"\r\n"
    if frame is not None and not blank and len(frame) == data.count(b"\n"):
        return Chunk(frame.select(wanted).with_row_index(ROW, first).cast({ROW: pl.Int64}))
    return _delimited_slowly(data, first, header, wanted, separator, quotes)


def _delimited_slowly(
    data: bytes, first: int, header: list[str], wanted: list[str], separator: str, quotes: bool
) -> Chunk:
    text = io.StringIO(data.decode("utf-8"), newline="")
    reader = csv.reader(text, delimiter=separator, quoting=_quoting(quotes))
    places = [header.index(name) for name in wanted]
    kept: list[list[str]] = []
    rows: list[int] = []
    broken: list[BadRow] = []
    start = first
    for record in reader:
        row, start = start, first + reader.line_num
        if not record:
            continue
        if len(record) != len(header):
            reason = f"got {len(record)} fields, expected {len(header)}"
            broken.append(BadRow(row, "fields", reason))
            continue
        kept.append([record[place] for place in places])
        rows.append(row)
    values = {name: [record[place] for record in kept] for place, name in enumerate(wanted)}
    return Chunk(_frame(values, rows), broken)


def _frame(columns: dict[str, Any], rows: Sequence[int]) -> pl.DataFrame:
    data = {ROW: rows, **columns}
    return pl.DataFrame(data, schema={ROW: pl.Int64, **dict.fromkeys(columns, pl.String)})


def records(
    file: RawFile, *, parse: Callable[[str], Any] = json.loads, encoding: str = "utf-8"
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (row, object) for each line of a JSON-lines file; None where a line is no object."""
    for block in blocks(file, encoding=encoding):
        yield from _records_of(block, parse)


def _records_of(
    block: Block, parse: Callable[[str], Any]
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    lines = block.data.decode("utf-8").split("\n")
    for row, line in enumerate(lines, start=block.first_line):
        if not line or line.isspace():
            continue
        try:
            value = parse(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
        yield row, value if isinstance(value, dict) else None


def json_lines(
    file: RawFile,
    columns: Sequence[str] | Callable[[list[str]], Sequence[str]],
    *,
    parse: Callable[[str], Any] = json.loads,
    encoding: str = "utf-8",
) -> Iterator[Chunk]:
    """Yield the wanted keys of a JSON-lines file as string columns.

    Args:
        file: what to read.
        columns: the wanted keys, or a function of the first record's keys that names them.
        parse: reads one line where the fast reader cannot.
        encoding: "utf-8" or "latin-1".

    Raises:
        DataError: as `blocks`, or a key that the first record lacks.
    """
    wanted: list[str] | None = None
    for block in blocks(file, encoding=encoding):
        if wanted is None:
            first = next((value for _, value in _records_of(block, parse) if value), {})
            wanted = list(columns(list(first)) if callable(columns) else columns)
            require_columns(file, wanted, list(first))
        yield _json_chunk(block, wanted, parse)


def _json_chunk(block: Block, wanted: list[str], parse: Callable[[str], Any]) -> Chunk:
    frame = None
    try:
        frame = pl.read_ndjson(io.BytesIO(block.data), schema=dict.fromkeys(wanted, pl.String))
    except pl.exceptions.PolarsError:
        pass
    whole = frame is not None and len(frame) == block.data.count(b"\n")
    if frame is not None and whole and not sum(frame.null_count().row(0)):
        index = frame.select(wanted).with_row_index(ROW, block.first_line)
        return Chunk(index.cast({ROW: pl.Int64}))
    rows: list[int] = []
    values: dict[str, list[str | None]] = {name: [] for name in wanted}
    broken: list[BadRow] = []
    for row, record in _records_of(block, parse):
        if record is None:
            broken.append(BadRow(row, "json", "the line is not a JSON object"))
            continue
        rows.append(row)
        for name in wanted:
            values[name].append(as_text(record.get(name)))
    return Chunk(_frame(values, rows), broken)


def as_text(value: Any) -> str | None:
    """Return a JSON scalar as an id would be written: 4.0 is "4"; None stays None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def parquet(file: RawFile, columns: Sequence[str]) -> Iterator[Chunk]:
    """Yield columns of a parquet file as strings; dates and times as epoch milliseconds.

    Raises:
        DataError: not a parquet file, no rows, or a column that is not there.
    """
    file.check()
    schema = parquet_schema(file)
    require_columns(file, columns, list(schema))
    casts = [_parquet_text(name, schema[name]) for name in dict.fromkeys(columns)]
    scan = pl.scan_parquet(file.path).select(casts)
    start = 0
    while True:
        frame = scan.slice(start, PARQUET_ROWS).collect()
        if not len(frame):
            break
        yield Chunk(frame.with_row_index(ROW, start + 1).cast({ROW: pl.Int64}))
        start += len(frame)
    if start == 0:
        raise DataError(f"{str(file.path)!r} holds no rows. Expected data in it.")


def parquet_schema(file: RawFile) -> dict[str, pl.DataType]:
    """Return the columns of a parquet file, or raise `DataError` if it is none."""
    file.check()
    try:
        return dict(pl.read_parquet_schema(file.path))
    except pl.exceptions.PolarsError:
        raise DataError(f"{str(file.path)!r} is not a parquet file. Check its format.") from None


def _parquet_text(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if dtype.is_temporal():
        return column.cast(pl.Datetime("ms")).cast(pl.Int64).cast(pl.String)
    if dtype.is_float():  # pandas writes integer columns with gaps as floats: 4.0 is "4"
        whole = column.cast(pl.Int64, strict=False)
        return (
            pl.when(whole == column).then(whole.cast(pl.String)).otherwise(column.cast(pl.String))
        )
    return column.cast(pl.String)
