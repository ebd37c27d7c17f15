"""Faults 1 and 2: every malformed file is an error that names file and line."""

import json

import pytest

from moalign.data import rows as rows_module
from moalign.data.rows import read_rows
from moalign.errors import DataError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fails(path, line, *words):
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    error = caught.value
    assert (error.file, error.line) == (str(path), line), str(error)
    assert str(error).startswith(f"{path}:{line}: ")
    for word in words:
        assert word in str(error)
    return error


GOOD = '{"a": 1}\n'


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (GOOD + '{"a": }\n', 2, ["malformed JSON", "column 7"]),
        (GOOD + '{"a": "cut of', 2, ["cut off", "last line"]),
        (GOOD + '{"a": 1', 2, ["cut off", "last line"]),
        (GOOD + '{"a": 1} {"a": 2}\n', 2, ["after the end", "column 10"]),
        (GOOD.encode() + b'{"a": "x\x00y"}\n', 2, ["NUL byte at byte 9"]),
        (GOOD.encode() + b'{"a": "\xff"}\n', 2, ["not UTF-8", "0xff"]),
        (GOOD.encode() + b'{"a": "\xed\xa0\x80"}\n', 2, ["not UTF-8"]),
        (GOOD + '{"a": "\\ud800"}\n', 2, ["lone surrogate", "\\ud800"]),
        (GOOD + '{"a": {"b\\udc00": 1}}\n', 2, ["lone surrogate", "\\udc00"]),
        (GOOD + '{"a": 1, "b": {"c": 1, "c": 2}}\n', 2, ["duplicate key", "'c'"]),
        (GOOD + "[1, 2]\n", 2, ["must be an object", "array"]),
        (GOOD + "null\n", 2, ["must be an object", "null"]),
        (GOOD + '{"a": NaN}\n', 2, ["NaN", "null"]),
        (GOOD + '{"a": -Infinity}\n', 2, ["-Infinity"]),
        (GOOD + '{"a": 1e999}\n', 2, ["out of range", "1e999"]),
        (GOOD + '{"a": ' + "1" * 5000 + "}\n", 2, ["out of range"]),
        (GOOD + '{"a": ' + "[" * 200_000 + "}\n", 2, ["nested too deeply"]),
        (GOOD + "\ufeff" + GOOD, 2, ["malformed JSON"]),
        ("", 1, ["no rows"]),
        ("\n \n", 1, ["no rows"]),
        (b"\xef\xbb\xbf", 1, ["no rows"]),
        ('{"a": 1}\n'.encode("utf-16"), 1, ["UTF-16"]),
    ],
)
def test_jsonl_fault_is_placed(tmp_path, content, line, words):
    fails(write(tmp_path, "rows.jsonl", content), line, *words)


def test_good_jsonl_rows_come_with_their_lines(tmp_path):
    pair = '{"a": "\\ud83d\\ude00"}'  # a surrogate pair is a character
    path = write(tmp_path, "rows.jsonl", b"\xef\xbb\xbf" + f'{{"a": "ä"}}\r\n\n{pair}\n{{"a": 3}}'.encode())
    found = list(read_rows(path))
    assert [line for _, line, _ in found] == [1, 3, 4]
    assert [row["a"] for *_, row in found] == ["ä", "😀", 3]
    assert all(file == str(path) for file, *_ in found)


def test_line_over_the_limit_is_refused_without_being_read(tmp_path, monkeypatch):
    assert rows_module.LINE_LIMIT == 100_000_000
    monkeypatch.setattr(rows_module, "LINE_LIMIT", 1000)
    fits = json.dumps({"a": "x" * 900}) + "\n"
    path = write(tmp_path, "rows.jsonl", fits + '{"a": "' + "x" * 2000)
    error = fails(path, 2, "longer than 1,000 bytes")
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("content", "element", "words"),
    [
        ('[{"a": 1}, {"a": 1,, "b": 2}]', 2, ["malformed JSON"]),
        ('[{"a": 1}, {"a": 1', 2, ["cut off"]),
        ('[{"a": 1}, {"a": 1}', 2, ["cut off"]),
        ('[{"a": 1}, {"a": 1}] x', 1, ["after the end of the array"]),
        ('[{"a": 1}, {"a": 1, "a": 2}]', 2, ["duplicate key: 'a'"]),
        ('[{"a": 1}, 3]', 2, ["must be an object", "a number"]),
        ('[{"a": 1}, {"a": NaN}]', 2, ["NaN"]),
        ('[{"a": 1}, {"a": "\\udfff"}]', 2, ["lone surrogate"]),
        ('[{"a": 1} {"a": 2}]', 1, ["expected ','"]),
        ('[{"a": 1},\n {"a": 2},\n {"a": x}]', 3, ["line 3 of the file, column 8"]),
        ('{"data": [{"a": 1}, {"a": ]}', 2, ["malformed JSON"]),
        ('{"data": [{"a": 1}], "data": []}', 1, ["duplicate key: 'data'"]),
        ('{"rows": [{"a": 1}]}', 1, ['without "data"', ".jsonl"]),
        ("{}", 1, ['without "data"']),
        ('{"data": [{"a": 1}]}\n{"data": []}', 1, ["after the end", ".jsonl"]),
        ('"text"', 1, ["array of objects"]),
        ("[]", 1, ["no rows"]),
        ("", 1, ["no rows"]),
        ('[{"a": 1},]', 2, ["malformed JSON"]),
    ],
)
def test_json_fault_is_placed_by_element(tmp_path, content, element, words):
    fails(write(tmp_path, "rows.json", content), element, *words)


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": 1}, {"a": 2}]',
        ' {"version": [1, {"x": 2}], "data": [{"a": 1}, {"a": 2}], "n": 0} ',
        '{"data":[{"a":1},{"a":2}]}',
    ],
)
def test_json_array_and_data_object(tmp_path, content):
    path = write(tmp_path, "rows.json", content)
    assert [(line, row) for _, line, row in read_rows(path)] == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("a,b\n1,2\n3\n", 3, ["1 fields", "header 2"]),
        ("a,b\n1,2\n3,4,5\n", 3, ["3 fields"]),
        ('a,b\n"x\ny",2\n3\n', 4, ["1 fields"]),
        ('a,b\n1,"open\n\n', 2, ["malformed table"]),
        ('a,b\n1,"x"y\n', 2, ["malformed table"]),
        ("a,a\n1,2\n", 1, ["two columns", "'a'"]),
        ("a,\n1,2\n", 1, ["no name"]),
        ("a,b\n", 1, ["no rows"]),
        ("", 1, ["no rows"]),
        (b"a,b\n1,\x00\n", 2, ["NUL byte"]),
        (b"a,b\n1,\xff\n", 2, ["not UTF-8"]),
    ],
)
def test_csv_fault_is_placed(tmp_path, content, line, words):
    fails(write(tmp_path, "rows.csv", content), line, *words)


def test_csv_and_tsv_rows_start_where_the_row_starts(tmp_path):
    long = "x" * 200_000  # more than the csv module allows by itself
    path = write(tmp_path, "rows.csv", f'\ufeffa,b\r\n"one\ntwo",2\r\n\r\n{long},3\r\n')
    assert [(line, row) for _, line, row in read_rows(path)] == [
        (2, {"a": "one\ntwo", "b": "2"}),
        (5, {"a": long, "b": "3"}),
    ]
    path = write(tmp_path, "rows.tsv", "a\tb\n1,5\t2\n")
    assert [row for *_, row in read_rows(path)] == [{"a": "1,5", "b": "2"}]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    rows = [{"a": "x", "b": [1.0, None]}, {"a": None, "b": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [(line, row) for _, line, row in read_rows(path)] == [(1, rows[0]), (2, rows[1])]
    whole = path.read_bytes()
    fails(write(tmp_path, "cut.parquet", whole[:-20]), 1, "Parquet")
    fails(write(tmp_path, "empty.parquet", b""), 1, "Parquet")
    table = pyarrow.table([[1], [2]], names=["a", "a"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    fails(tmp_path / "twice.parquet", 1, "two columns", "'a'")


def test_paths_that_cannot_be_read(tmp_path):
    good = write(tmp_path, "feedback.jsonl", GOOD)
    for path, words in {
        tmp_path / "fedback.jsonl": ["no such file", str(good)],
        tmp_path / "nowhere" / "x.jsonl": ["no such file"],
        tmp_path: ["is a directory", "feedback.jsonl"],
        write(tmp_path, "rows.txt", GOOD): ["unknown file type '.txt'", ".jsonl", ".parquet"],
        tmp_path / ("x" * 5000 + ".jsonl"): ["cannot be read"],
    }.items():
        with pytest.raises(DataError) as caught:
            read_rows(path)
        assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)
