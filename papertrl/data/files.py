"""Files of rows: JSON and delimited text are read as they are written, without guesses at types."""

import csv
import difflib
import gzip
import io
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset

READ = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": ",", ".tsv": "\t", ".parquet": "parquet"}
FILE_TYPES = ", ".join(READ) + ", and all but the last also with .gz"
# Cells of delimited text are text, but in these columns, which are read as numbers
NUMBERS = {
    "chosen_score",
    "rejected_score",
    "score_chosen",
    "score_rejected",
    "margin",
    "feedback_turn",
}
LABEL = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# Columns that are text even where every cell of a file happens to be a number
TEXTS = {"prompt", "chosen", "rejected", "completion", "feedback", "text", "hint", "messages", "answer", "solution"}
# Lists of objects that are a row's own, and not the rows of a file
LISTS = {"messages", "prompt", "completion", "completions", "chosen", "rejected", "tools", "hints"}
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
CHUNK = 10_000
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def file_type(path: Path) -> str | None:
    """What a file name says that the file holds: `"json"`, `"parquet"` or a delimiter; `None` if it is not read."""
    kind = READ.get(_suffix(path))
    return None if kind == "parquet" and path.suffix.lower() == ".gz" else kind


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def looks_like_a_file(name: str) -> bool:
    """Whether a name means something on this machine, be it there or not, and no dataset of the Hub."""
    path = Path(name).expanduser()
    known = file_type(path) is not None or (path.suffix[1:].isalpha() and path.parent.is_dir())
    return path.exists() or known or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def near_file(path: Path) -> str:
    """A hint at the name beside `path` that is most like its own, or nothing."""
    if not path.parent.is_dir():
        return f"There is no folder '{path.parent}' either. "
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f"Did you mean '{path.parent / near[0]}'? " if near else ""


def read_files(paths: list[Path], streaming: bool = False) -> Dataset | IterableDataset:
    """
    Rows of JSON, CSV, TSV or Parquet files.

    Text stays text: `None`, `NA`, `007`, `1e5`, dates and empty cells of delimited text are what is written there, and
    so are strings of JSON. Columns of delimited text become numbers where a trainer reads numbers (`label`,
    `chosen_score`, `rejected_score`, `margin`, `feedback_turn`), and, except when streaming, where every cell is one
    in plain notation and the column is none of text that is trained on (`prompt`, `answer` and so on).

    Args:
        paths (`list[Path]`):
            Files with a suffix of [`FILE_TYPES`]: objects in lines, an array of objects, or an object with one list of
            objects, such as `data`; or text with a header. In UTF-8, or with a byte order mark.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether rows are read when they are needed.

    Raises:
        `ValueError`: if a file cannot be read; the message says where, by the line, and why.
    """
    kinds = [file_type(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind is None:
            raise ValueError(f"'{path}' is of no type that is read; those are {FILE_TYPES}.")
        if path.stat().st_size == 0:
            raise ValueError(f"'{path}' is empty: it holds no rows.")
    if set(kinds) == {"parquet"}:
        return _parquet(paths, streaming)
    if "parquet" in kinds:
        raise ValueError(
            f"Parquet stands beside files of other types, {[path.name for path in paths]}. Keep one type."
        )
    if streaming:
        return IterableDataset.from_generator(_stream, gen_kwargs={"paths": [str(path) for path in paths]})
    parts = [Dataset(_table(path, kind)) for path, kind in zip(paths, kinds, strict=True)]
    try:
        return concatenate_datasets(parts)
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"The columns of {[path.name for path in paths]} differ in their types ({cause_of(error)})."
        ) from error


def _parquet(paths: list[Path], streaming: bool) -> Dataset | IterableDataset:
    try:
        return load_dataset("parquet", data_files=list(map(str, paths)), split="train", streaming=streaming)
    except Exception as error:
        raise ValueError(f"{', '.join(map(repr, map(str, paths)))} cannot be read: {cause_of(error)}.") from error


def cause_of(error: BaseException) -> str:
    """What the first error in a chain says."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- Text -------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file with what ends them."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    number = 1
    try:
        with opened(path, "rb") as file:
            start = file.read(4)
        encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
        if encoding == "utf-8" and b"\0" in start:
            raise ValueError(f"'{path}' is no text in UTF-8: it begins with {start!r}. Save it as UTF-8.")
        with (
            opened(path, "rb") as file,
            io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="") as text,
        ):
            for line in text:
                if not line.isascii():
                    # Says which byte it is that is not of the encoding
                    line.encode("utf-8", "surrogateescape").decode("utf-8")
                yield line
                number += 1
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}', line {number}: is no text in UTF-8 ({error}). Save the file as UTF-8, for example by "
            f"`iconv -f latin1 -t utf-8 {path.name}` if it is Latin-1."
        ) from error
    except (UnicodeError, EOFError, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"'{path}', line {number}: cannot be read: {cause_of(error)}.") from error


# --- JSON -------------------------------------------------------------------------------------------------------


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the lines that they stand in; those of a document that is not of lines with their number, from 1."""
    lines = ((number, line) for number, line in enumerate(_lines(path), start=1) if line.strip())
    first = list(islice(lines, 2))
    if not first:
        return
    number, line = first[0]
    if line.lstrip().startswith("{") and (_suffix(path) != ".json" or _parses(line)):
        if len(first) > 1 or _rows_within(row := _json_value(path, number, line)) is None:
            for number, line in chain(first, lines):
                yield number, _object(path, f"line {number}", _json_value(path, number, line))
            return
    else:
        text = "\n" * (number - 1) + "".join(line for _, line in chain(first, lines))
        row = _json_value(path, 1, text)
    rows = row if isinstance(row, list) else _rows_within(row) or [row]
    for number, row in enumerate(rows, start=1):
        yield number, _object(path, f"item {number}", row)


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _json_value(path: Path, number: int, text: str) -> Any:
    """Value that a text holds which begins in line `number` of a file."""
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        place = f"line {number + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"'{path}', {place}: is no valid JSON ({error.msg}).") from error
    except RecursionError as error:
        raise ValueError(f"'{path}', line {number}: is no valid JSON (nested too deep).") from error


def _object(path: Path, place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"'{path}', {place}: must be an object of columns and values, got {str(row)[:80]!r}.")
    return row


def _rows_within(document: Any) -> list[dict[str, Any]] | None:
    """Rows of a document that is one object with a list of objects; `None` if it is a row itself."""
    if not isinstance(document, dict) or LISTS & document.keys():
        return None
    lists = [value for value in document.values() if isinstance(value, list) and value]
    lists = [value for value in lists if all(isinstance(row, dict) for row in value)]
    return lists[0] if len(lists) == 1 else None


# --- Delimited text ---------------------------------------------------------------------------------------------


def _delimited_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with the lines that they end in."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        names = _names(path, header, delimiter)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"'{path}', line {reader.line_num}: has {len(cells)} fields, but the header has {len(names)}. "
                    "Quote fields that hold the delimiter."
                )
            yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"'{path}', line {reader.line_num}: {error}. Quotes inside of a field are doubled."
        ) from error


def _names(path: Path, header: list[str], delimiter: str) -> list[str]:
    """Names of columns. Pandas writes its index without one."""
    names = [name.strip() or f"unnamed_{i}" for i, name in enumerate(header)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"'{path}', line 1: the header names the columns {twice} twice.")
    other = next((mark for mark in ",;\t|" if mark != delimiter and mark in "".join(header)), None)
    if len(names) == 1 and other is not None:
        raise ValueError(
            f"'{path}', line 1: the header {header[0]!r} seems to be delimited by {other!r}, but a {path.suffix} file "
            f"is by {delimiter!r}."
        )
    return names


def _with_numbers(path: Path, table: pa.Table, only_known: bool) -> pa.Table:
    """The table with numbers and labels in place of the text of columns that hold them."""
    for place, name in enumerate(table.column_names):
        if name in TEXTS:
            continue
        values = [value.strip() for value in table[name].to_pylist()]
        if name == "label":
            values = _labels(path, values)
        elif name in NUMBERS:
            values = [_number(path, name, row, value) for row, value in enumerate(values)]
        elif only_known or not any(values) or not all(value == "" or NUMBER.fullmatch(value) for value in values):
            continue
        else:
            number = float if any("." in value for value in values) else int
            values = [number(value) if value else None for value in values]
        try:
            table = table.set_column(place, name, pa.array(values))
        except OverflowError:  # as text, such integers keep all of their digits
            continue
    return table


def _labels(path: Path, values: list[str]) -> list[Any]:
    """Labels as booleans, or, if they are neither words nor numbers for these, as they are."""
    words = [value.lower() for value in values]
    odd = next((row for row, word in enumerate(words) if word and word not in LABEL), None)
    if odd is None:
        return [LABEL.get(word) for word in words]
    if {"true", "false"} & set(words):
        raise ValueError(
            f"'{path}', row {odd} (counted from 0), column `label`: must be true or false, got {values[odd]!r}."
        )
    return values


def _number(path: Path, column: str, row: int, value: str) -> float | None:
    try:
        return (int(value) if value.lstrip("-").isdecimal() else float(value)) if value else None
    except ValueError as error:
        raise ValueError(
            f"'{path}', row {row} (counted from 0), column `{column}`: must be a number, got {value!r}."
        ) from error


# --- Tables -----------------------------------------------------------------------------------------------------


def _stream(paths: list[str]) -> Iterator[dict[str, Any]]:
    for path in map(Path, paths):
        kind = file_type(path)
        if kind == "json":
            yield from (row for _, row in _json_rows(path))
            continue
        for _, row in _delimited_rows(path, kind):
            yield _with_numbers(path, pa.Table.from_pylist([row]), only_known=True).to_pylist()[0]


def _table(path: Path, kind: str) -> pa.Table:
    """All rows as columns, those that a row lacks empty in it."""
    rows = _json_rows(path) if kind == "json" else _delimited_rows(path, kind)
    tables: list[pa.Table] = []
    names: dict[str, None] = {}
    while chunk := list(islice(rows, CHUNK)):
        names |= dict.fromkeys(name for _, row in chunk for name in row)
        columns = {name: _column(path, name, chunk) for name in names}
        tables.append(pa.table(columns))
        try:
            tables = [pa.concat_tables(tables, promote_options="permissive")]
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"'{path}', from line {chunk[0][0]} on: values are of another type than those before ({error})."
            ) from error
    if not tables:
        raise ValueError(f"'{path}' holds no rows.")
    return tables[0] if kind == "json" else _with_numbers(path, tables[0], only_known=False)


def _column(path: Path, name: str, chunk: list[tuple[int, dict[str, Any]]]) -> pa.Array:
    values = [row.get(name) for _, row in chunk]
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        # The shortest part that has no common type ends with the value that is the odd one
        low, high = 1, len(values)
        while low < high:
            middle = (low + high) // 2
            if _fits(values[:middle]):
                low = middle + 1
            else:
                high = middle
        raise ValueError(
            f"'{path}', line {chunk[low - 1][0]}, column `{name}`: {json.dumps(values[low - 1])[:80]} is of another "
            f"type than the values before ({' '.join(str(error).split())[:120]})."
        ) from error


def _fits(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return False
    return True
