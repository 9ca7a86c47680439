"""What is read of files: text as it is written, and of a broken one, where it breaks."""

import gzip
import json

import pytest
from datasets import IterableDataset

from papertrl.data import read_files


@pytest.fixture
def read(tmp_path):
    def read(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_files([path], **options)

    return read


WORDS = ["None", "NA", "null", "nan", "N/A", "", "#N/A", "-inf", "007", "1e5", "true", "2024-05-06", "1_000", " 7 "]


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t"), ("CSV", ","), ("csv.gz", ",")])
@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_text_columns_are_text(read, suffix, delimiter, streaming):
    lines = [delimiter.join(('"prompt"', "x", "answer")), *(f'"{w}"{delimiter}{w}{delimiter}4' for w in WORDS)]
    content = "\r\n".join(lines).encode()
    rows = list(
        read(f"rows.{suffix}", gzip.compress(content) if suffix.endswith("gz") else content, streaming=streaming)
    )
    assert [row["prompt"] for row in rows] == [row["x"] for row in rows] == WORDS
    assert {row["answer"] for row in rows} == {"4"}


def test_columns_that_are_read_as_numbers_are_numbers(read):
    header = "chosen_score,rejected_score,label,difficulty,share,code,long\n"
    rows = read("rows.csv", header + "8,1e-1,TRUE,3,0.5,03,12345678901234567890\n7,,0,,2,4,1").to_list()
    assert [list(row.values()) for row in rows] == [
        [8, 0.1, True, 3, 0.5, "03", "12345678901234567890"],
        [7, None, False, None, 2.0, "4", "1"],
    ]
    assert rows[0]["label"] is True and isinstance(rows[0]["difficulty"], int)
    (streamed,) = read("rows.csv", "margin,label,difficulty\n2,false,3\n", streaming=True)
    assert streamed == {"margin": 2, "label": False, "difficulty": "3"}


ROWS = [{"prompt": "2024-05-06T07:08:09", "n": 1}, {"prompt": "1e5", "n": 2.5}, {"prompt": "é\u2028", "n": None}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", f"\n{LINES}\n\n"),
        ("my.rows.json", LINES),
        ("rows.ndjson", LINES.encode("utf-16")),
        ("rows.jsonl", LINES.encode("utf-8-sig")),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("rows.json", json.dumps(ROWS)),
        ("rows.jsonl", json.dumps(ROWS, indent=2)),
        ("rows.json", json.dumps({"version": "2024-05-06", "data": ROWS}, indent=2)),
        ("rows.json", json.dumps({"rows": ROWS})),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_json_in_its_forms(read, name, content, streaming):
    dataset = read(name, content, streaming=streaming)
    assert isinstance(dataset, IterableDataset) == streaming
    assert list(dataset) == ROWS


def test_a_single_row_with_a_list_is_a_row(read):
    row = {"messages": [{"role": "user", "content": "hi"}]}
    assert list(read("row.json", json.dumps(row, indent=1))) == list(read("row.jsonl", json.dumps(row))) == [row]


def test_files_of_one_split_join(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"prompt": str(number)}))
    paths = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    assert read_files(paths)["prompt"] == [row["prompt"] for row in read_files(paths, streaming=True)] == ["0", "1"]
    (tmp_path / "1.jsonl").write_text('{"prompt": 1}')
    with pytest.raises(ValueError, match=r"'0.jsonl', '1.jsonl'.* differ in their types"):
        read_files(paths)


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("rows.jsonl", '{"a": "b"}\n\n{"a" "b"}\n', ["line 3, column 6", "JSON"]),
        ("rows.json", '[\n {"a": 1},\n {"a": 2]\n]', ["line 3", "JSON"]),
        ("rows.json", '{"a": 1}\n{"a": }\n', ["line 2", "JSON"]),
        ("rows.jsonl", '{"a": 1}\n[1]\n', ["line 2", "object", "[1]"]),
        ("rows.json", "[1, 2]", ["item 1", "object"]),
        ("rows.jsonl", '{"a": "b"}\n{"a": "c"}\n{"a": [1]}\n', ["line 3, column `a`: [1]", "another type"]),
        ("rows.jsonl", '{"a": 1}\n' * 10_001 + '{"a": "c"}\n', ["line 10002, column `a`", "another type"]),
        ("rows.jsonl", "\n\n", ["holds no rows"]),
        ("rows.csv", "", ["is empty"]),
        ("rows.csv", "prompt,chosen\n", ["holds no rows"]),
        ("rows.csv", "prompt,chosen\n" + '"a\nb",c\n' + "a,b,c\n", ["line 4", "3 fields", "2"]),
        ("rows.csv", "prompt,chosen\nx\n", ["line 2", "1 fields"]),
        ("rows.csv", 'prompt,chosen\nx,"y\n', ["line 2", "unexpected end"]),
        ("rows.csv", "prompt;chosen\na;b\n", ["line 1", "';'"]),
        ("rows.csv", "prompt,prompt\na,b\n", ["line 1", "['prompt'] twice"]),
        ("rows.csv", "margin\n1\nmuch\n", ["row 1", "`margin`", "'much'"]),
        ("rows.csv", "label\ntrue\nyes\n", ["row 1", "`label`", "'yes'"]),
        ("rows.csv", "prompt\na\nñ\n".encode("latin-1"), ["line 3", "UTF-8", "0xf1"]),
        ("rows.tsv", "prompt\na\n".encode("utf-16-le"), ["UTF-8"]),
        ("rows.jsonl.gz", b'{"a": 1}', ["line 1", "gzip"]),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-12], ["ended before"]),
        ("rows.parquet", b"PAR1", ["cannot be read", "Parquet"]),
        ("rows.txt", "prompt", [".jsonl", ".csv", ".parquet"]),
    ],
)  # fmt: skip
def test_what_is_broken_is_told_with_its_place(read, name, content, parts):
    with pytest.raises(ValueError) as error:
        read(name, content)
    for part in [name, *parts]:
        assert part in str(error.value)
