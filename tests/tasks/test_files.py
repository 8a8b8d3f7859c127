"""Readers of published data files: what is read, and what a file that is not right makes them say."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffpo_jax.tasks.files import find_file, read_rows

ROWS = [{"q": "one\n\u2028é", "a": 1}, {"q": "", "a": 2}]
SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_find_file_prefers_the_first(tmp_path):
    write(tmp_path / "b", ""), write(tmp_path / "a", ""), (tmp_path / "c").mkdir()
    assert find_file(str(tmp_path), ["c", "b", "a"]) == str(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="holds no x or c; there: a, b, c$"):
        find_file(str(tmp_path), ["x", "c"])


def test_find_file_says_what_the_folder_must_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x", "")
    with pytest.raises(FileNotFoundError, match="no data folder is set: set --config.data.path to a folder that holds x or y"):
        find_file("", ["x", "y"])  # not the folder the program runs in
    with pytest.raises(FileNotFoundError, match="the folder 'gone' does not exist: set --config.data.path"):
        find_file("gone", ["x"])
    for number in range(25):
        write(tmp_path / f"f{number:02}", "")
    with pytest.raises(FileNotFoundError, match="f18, f19 and 6 more$"):
        find_file(".", ["y"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_rows_in_order_with_the_columns_asked_for(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
    else:
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    assert list(read_rows(str(path), ["a", "q"])) == ROWS
    assert list(read_rows(str(path), ["a"])) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".* has no column 'b', 'c'; it has 'q', 'a'$"):
        list(read_rows(str(path), ["b", "a", "c"]))


def test_csv_stays_text(tmp_path):
    path = write(tmp_path / "s.csv", '\ufeffPuzzle,Solution\r\n0012,"1,2"\r\n\r\n1e3, 7\r\n')
    assert list(read_rows(path, ["Puzzle", "Solution"])) == [
        {"Puzzle": "0012", "Solution": "1,2"},
        {"Puzzle": "1e3", "Solution": " 7"},
    ]
    with pytest.raises(ValueError, match="s.csv has no column 'Grid'; it has 'Puzzle', 'Solution'"):
        list(read_rows(path, ["Grid"]))


GOOD = b'{"a": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "rows", "message"),
    [
        ("cut.jsonl", GOOD + b'{"a": 2, "b": "tex', 1, r"cut.jsonl, line 2, is not JSON: Unterminated string.*Is the file cut off\?"),
        ("html.json", b"<html>", 0, "html.json, line 1, is not JSON"),
        ("array.json", b'[{"a": 1},\n{"a": 2}]', 0, "array.json, line 1, is not JSON.*one object a line is expected"),
        ("list.jsonl", GOOD + b"\n[1]\n", 1, "list.jsonl, line 3, is a JSON list, not an object"),
        ("deep.jsonl", b"[" * 100_000, 0, "deep.jsonl, line 1, is not JSON"),
        ("latin.jsonl", GOOD + b'{"a": "\xe9"}', 1, "latin.jsonl, line 2, is not JSON: 'utf-8'"),
        ("column.jsonl", GOOD + b'{"b": 1}', 1, "column.jsonl, line 2, has no column 'a'; it has 'b'"),
        ("empty.jsonl", b"", 0, "empty.jsonl holds no rows"),
        ("blank.jsonl", b" \n\n", 0, "blank.jsonl holds no rows"),
        ("empty.csv", b"", 0, "empty.csv holds no rows"),
        ("header.csv", b"a,b\n", 0, "header.csv holds no rows"),
        ("cut.csv", b"a,b\n1,2\n3", 1, "cut.csv, line 3, has 1 fields, the header has 2"),
        ("more.csv", b"a,b\n1,2,3\n", 0, "more.csv, line 2, has 3 fields, the header has 2"),
        ("quote.csv", b'a,b\n1,2\n3,"4', 1, "quote.csv, after line 3, is not readable csv"),
        ("latin.csv", b"a,b\n1,\xe9\n", 0, "latin.csv, after line [01], is not readable csv: 'utf-8'"),
        ("no.parquet", b"PAR1 and nothing more", 0, "no.parquet is not a readable parquet file"),
        ("empty.parquet", b"", 0, "empty.parquet is not a readable parquet file"),
        ("rows.txt", b"a", 0, "its name must end in one of .jsonl, .json, .parquet, .csv"),
    ],
)
def test_damaged_files_say_where(tmp_path, name, content, rows, message):
    reader = read_rows(write(tmp_path / name, content), ["a"])
    assert len([next(reader) for _ in range(rows)]) == rows  # what precedes the damage is read
    with pytest.raises(ValueError, match=message):
        next(reader)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.jsonl"):
        next(read_rows(str(tmp_path / "gone.jsonl"), ["a"]))


def test_parquet_cut_off_and_without_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    write(tmp_path / "cut.parquet", path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut.parquet is not a readable parquet file.*Is it cut off"):
        next(read_rows(str(tmp_path / "cut.parquet"), ["a"]))
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), path)
    with pytest.raises(ValueError, match="rows.parquet holds no rows"):
        next(read_rows(str(path), ["a"]))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published files in ../shared/data")
@pytest.mark.parametrize(
    ("name", "columns", "number"),
    [
        ("gsm8k/test.jsonl", ["question", "answer"], 1319),
        ("math500/test.jsonl", ["problem", "answer"], 500),
        ("math500/train.parquet", ["prompt", "reward_model"], 7474),
        ("countdown/countdown_cd3_test.jsonl", ["input", "output"], 256),
        ("sudoku/4x4_test_sudoku.csv", ["Puzzle", "Solution"], 500),
    ],
)
def test_published_files(name, columns, number):
    rows = list(read_rows(str(SHARED / name), columns))
    assert len(rows) == number and all(list(row) == columns for row in rows)
    if name.endswith("csv"):
        assert rows[0] == {"Puzzle": "3102200002100320", "Solution": "3142243142131324"}
        assert rows[1]["Puzzle"] == "0140432014020000"
