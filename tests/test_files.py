"""Reading records from whatever holds them, and naming what is none."""

import codecs
import datetime
import decimal
import gzip
import json
import os
import re

import pyarrow.parquet
import pytest

from nanoaipo import files
from nanoaipo.errors import InputError, reason_of


def write_lines(path, *rows):
    """Write rows as JSON lines, texts among them as they are; the path as a text."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def read(path, *required):
    """The records of a file, without where they stand."""
    return [record for _, record in files.read_records(str(path), *required)]


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"id": 1', "not JSON"),
        ("[1]", r"a record is a JSON object, not list"),
        ('{"x": 1}', "field 'id' is missing"),
        (r'{"id": "\ud800"}', "holds half of a surrogate pair, which is no text"),
        ("[" * 5000, "not JSON: lists and objects within each other, more than 100"),
        ('{"id": ' * 300 + "1" + "}" * 300, "not JSON: lists and objects within each other"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(bad, message, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"id": "1"}, "", bad)

    with pytest.raises(InputError, match=r"a\.jsonl:3: " + message):
        read(path, "id")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("b.jsonl", b'{"id": 1}\n{"id": "\xff"}\n', r"b\.jsonl:2: not JSON"),
        (
            "b.jsonl",
            b'{"id": 1}\n{"id": "\xed\xa0\x80"}\n',
            r"b\.jsonl:2: holds half of a surrogate",
        ),
        ("c.json", b'{"id": 1}', "an array of records, not dict"),
        ("d.json", b'["id"]', r"d\.json:1: a record is a JSON object, not str"),
        ("e.json", b'[{"id": 1}', r"e\.json: not JSON: Expecting ','"),
        ("f.jsonl.gz", b"no archive", r"f\.jsonl\.gz: not JSON: Not a gzipped file"),
        ("g.csv", b"prompt,answer\n", r"g\.csv:1: not JSON: .*; what is read is JSON lines"),
        ("g.jsonl", gzip.compress(b'{"id": 1}'), "packed by gzip; its name has to end in .gz"),
    ],
)
def test_a_broken_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError, match=message):
        read(tmp_path / name, "id")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a-00000-of-00001.jsonl", "pipe.jsonl", "link.jsonl"])
def test_what_is_called_jsonl_and_is_no_file_is_named(name, tmp_path):
    if name.startswith("a"):
        (tmp_path / name).mkdir()
    elif name.startswith("pipe"):  # whoever looks at its first lines takes them away
        os.mkfifo(tmp_path / name)
    else:
        os.symlink(tmp_path / "nowhere", tmp_path / name)

    path = tmp_path
    if name.startswith("a-"):
        path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match=f"{name}: a folder, a pipe or a broken link; write what"):
        read(path)


def test_a_folder_without_records_says_so(tmp_path):
    (tmp_path / "b.json").write_text("[]")

    with pytest.raises(InputError, match="a folder without a .jsonl or .parquet file in it"):
        read(tmp_path)


def test_shards_folders_globs_and_arrays_are_read_as_one_file(tmp_path):
    for k in range(3):
        write_lines(tmp_path / f"a-0000{k}-of-00003.jsonl", {"k": k})
    (tmp_path / "b.json").write_text('[{"k": 7}]')
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'[{"k": 8}]'))

    for path in ("a.jsonl", "", "a-*.jsonl"):
        assert read(tmp_path / path) == [{"k": 0}, {"k": 1}, {"k": 2}]
    assert read(tmp_path / "b.json") == [{"k": 7}]
    assert read(tmp_path / "c.json.gz") == [{"k": 8}]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_lines_and_arrays_are_told_apart_by_what_a_file_holds(name, suffix, tmp_path):
    lines = b'{"k": 1}\n\n{"k": 2}\n'
    array = b'[\n {"k": 1},\n {"k": 2}\n]'
    pack = gzip.compress if suffix else bytes

    for content in (lines, array, codecs.BOM_UTF8 + lines, codecs.BOM_UTF8 + array):
        (tmp_path / (name + suffix)).write_bytes(pack(content))
        assert read(tmp_path / (name + suffix)) == [{"k": 1}, {"k": 2}]


def test_a_broken_line_of_a_json_file_is_named_by_its_number(tmp_path):
    path = write_lines(tmp_path / "a.json", {"k": 1}, {"k": 2}, '{"k": ')

    with pytest.raises(InputError, match=r"a\.json:3: not JSON"):
        read(path)


def test_parquet_is_read_by_its_path_and_from_a_folder(tmp_path):
    messages = [{"role": "user", "content": "a", "name": None}]
    rows = [{"k": k, "prompt": messages} for k in range(2500)]
    for n, part in enumerate((rows[:1200], rows[1200:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, tmp_path / f"a-0000{n}-of-00002.parquet")

    assert read(tmp_path) == rows
    assert read(tmp_path / "a.parquet") == rows
    where = [place for place, _ in files.read_records(str(tmp_path / "a-00001-of-00002.parquet"))]
    assert where[-1] == f"{tmp_path}/a-00001-of-00002.parquet:1300"


def test_what_a_table_holds_and_json_does_not_is_text(tmp_path):
    day = datetime.date(2026, 11, 27)
    row = {"day": day, "price": decimal.Decimal("1.50"), "raw": b"x", "list": [{"day": day}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")

    (record,) = read(tmp_path / "a.parquet")

    day = "2026-11-27"
    assert record == {"day": day, "price": "1.50", "raw": "b'x'", "list": [{"day": day}]}


def test_a_text_of_a_table_that_is_no_utf8_is_named(tmp_path):
    texts = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "a.parquet")

    with pytest.raises(InputError, match=r"a\.parquet: not Parquet: 'utf-8' codec"):
        read(tmp_path / "a.parquet")


def test_what_is_called_parquet_and_is_none_is_named(tmp_path):
    path = write_lines(tmp_path / "a.parquet", {"k": 1})

    with pytest.raises(InputError, match=r"a\.parquet: not Parquet: "):
        read(path)


def test_brackets_and_colons_in_the_name_of_a_folder_are_no_pattern(tmp_path):
    for name in ("run[1]", "run1", "lr:1"):
        folder = tmp_path / name
        folder.mkdir()
        for k in range(2):
            write_lines(folder / f"a-0000{k}-of-00002.jsonl", {"k": f"{name} {k}"})

    for path in ("run[1]/a.jsonl", "run[1]", "run[1]/*.jsonl"):
        assert read(tmp_path / path) == [{"k": "run[1] 0"}, {"k": "run[1] 1"}]
    assert read(tmp_path / "lr:1" / "a.jsonl") == [{"k": "lr:1 0"}, {"k": "lr:1 1"}]
    assert read(tmp_path / "run[12]" / "a-00000*")[0] == {
        "k": "run1 0"
    }  # no such folder: a pattern


def test_shards_of_one_run_have_to_be_all_there(tmp_path):
    for k in range(3):
        write_lines(tmp_path / f"a-0000{k}-of-00003.jsonl", {"k": k})
    os.remove(tmp_path / "a-00001-of-00003.jsonl")

    with pytest.raises(InputError, match="2 of 3 shards are there"):
        read(tmp_path / "a.jsonl")

    write_lines(tmp_path / "a-00000-of-00002.jsonl", {"k": 0})
    with pytest.raises(InputError, match="shards of runs with 2 and 3 processes"):
        read(tmp_path / "a.jsonl")


def test_a_json_file_may_be_written_to_a_new_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "scores.json"

    files.write_json(str(path), {"n": 1})

    assert json.loads(path.read_text()) == {"n": 1}


@pytest.mark.parametrize(
    "text, line",
    [
        ("a.jsonl:1: שלום, é, 👩", "a.jsonl:1: שלום, é, 👩"),
        ("role 'us\ner'", r"role 'us\ner'"),
        ("\x1b[2J\u202e\ud800\u2028", r"\x1b[2J\u202e\ud800\u2028"),
        ("a.jsonl:1: " + "x" * 10**6 + "; fix it", "a.jsonl:1: x(.*)x ... x(.*)x; fix it"),
    ],
)
def test_a_message_is_one_line_that_ends_with_the_fix_whatever_it_quotes(text, line):
    message = str(InputError(text))

    if "(.*)" in line:
        assert re.fullmatch(line, message)
        assert len(message) < 1010
    else:
        assert message == line


def test_an_error_without_a_text_is_named_by_its_class():
    assert reason_of(OSError("\nno such model\nsee the hub")) == "no such model"
    assert reason_of(OSError()) == "OSError"
