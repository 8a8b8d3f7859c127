"""Readers of published data files: JSON lines, parquet, csv. A file that does not hold what is asked for is an error that says where."""

import csv
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

NAMES_SHOWN = 20  # of a folder's files in an error


def find_file(folder: str, candidates: Sequence[str]) -> str:
    """The path of the first of `candidates`, names in order of preference, that is a file in `folder`.

    Raises:
      FileNotFoundError: none is, or there is no such folder; the message lists the candidates and what is there.
    """
    wanted = " or ".join(candidates)
    if not folder or not os.path.isdir(folder):
        what = f"the folder {folder!r} does not exist" if folder else "no data folder is set"
        raise FileNotFoundError(f"{what}: set --config.data.path to a folder that holds {wanted}")
    for name in candidates:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    there = sorted(os.listdir(folder))
    more = f" and {len(there) - NAMES_SHOWN} more" if len(there) > NAMES_SHOWN else ""
    raise FileNotFoundError(f"{folder} holds no {wanted}; there: {', '.join(there[:NAMES_SHOWN]) or 'nothing'}{more}")


def read_rows(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a data file in order, each as {column: value} of `columns`.

    Args:
      path: a .jsonl or .json file (one JSON object a line; blank lines hold no row), a .parquet file, or a .csv file with a header.
      columns: names of the columns to read; values of a .csv file stay text.

    Raises (at the first row, what a row shows at that row):
      FileNotFoundError: there is no such file.
      ValueError: another kind of file, one without rows, one without a column (the message lists those there are), or one that is cut off
        or damaged; with the line where the format has lines.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    kind = os.path.splitext(path)[1]
    if kind not in READERS:
        raise ValueError(f"cannot read {path}: its name must end in one of {', '.join(READERS)}")
    empty = True
    for row in READERS[kind](path, columns):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path} holds no rows")


def read_texts(path: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """`read_rows` of columns that hold text.

    Raises:
      FileNotFoundError, ValueError: as `read_rows`; or a value that is no text.
    """
    for number, row in enumerate(read_rows(path, columns), 1):
        for name, value in row.items():
            check_text(value, f"{path}, row {number}: {name}")
        yield row


def check_text(value: Any, where: str) -> None:
    """Raises ValueError, which starts with `where`, unless `value` is text."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, not {value!r:.80}")


def _pick(row: dict[str, Any], columns: Sequence[str], where: str) -> dict[str, Any]:
    _check_columns(row, columns, where)
    return {name: row[name] for name in columns}


def _check_columns(there: Collection[str], columns: Sequence[str], where: str) -> None:
    missing = [name for name in columns if name not in there]
    if missing:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"{where} has no column {names}; it has {', '.join(map(repr, there)) or 'none'}")


def _read_json_lines(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number},"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
                raise ValueError(f"{where} is not JSON: {error}; one object a line is expected. Is the file cut off?") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where} is a JSON {type(row).__name__}, not an object")
            yield _pick(row, columns, where)


def _read_parquet(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"reading {path} needs the package pyarrow: pip install pyarrow") from None
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns, path)
            for batch in file.iter_batches(columns=list(columns)):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}. Is it cut off?") from None


def _read_csv(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if header:
                _check_columns(header, columns, path)
            for fields in reader:
                where = f"{path}, line {reader.line_num},"
                if fields and len(fields) != len(header):
                    raise ValueError(f"{where} has {len(fields)} fields, the header has {len(header)}. Is the file cut off?")
                if fields:
                    yield _pick(dict(zip(header, fields, strict=True)), columns, where)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}, is not readable csv: {error}. Is the file cut off?") from None


READERS: dict[str, Callable[[str, Sequence[str]], Iterator[dict[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
