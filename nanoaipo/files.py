"""Records and their files: JSONL and its relatives, shards, writing under a temporary name.

Records are JSON objects, one per line. Unknown fields travel along. Ids join records, line
numbers never do.

    prompts      id, prompt (list of chat messages; a plain string is one user message) and, if
                 right and wrong can be told apart, answer (nanoaipo/grading.py)
    candidates   the same, and prompt_ids, responses: a list of {text, ids, finished, logp}
    pairs        id, prompt, chosen, rejected (lists of messages, as datasets and TRL read them),
                 prompt_ids, chosen_ids, rejected_ids, z (log-odds that chosen beats rejected),
                 scores of all candidates, and q_w, q_l, g_w, g_l for objectives that want them
"""

import codecs
import contextlib
import glob
import gzip
import json
import os
import re
import zlib

from nanoaipo.errors import InputError, reason_of
from nanoaipo.processes import RANK, WORLD_SIZE

PARQUET = ".parquet"
MAX_DEPTH = 100  # lists and objects within each other; what walks through them has its limits

# ---------------------------------------------------------------------------------------- finding


def find_files(path):
    """The files behind a path: itself, its shards, all JSONL or Parquet of a folder, or a glob.

    Shards of NAME.jsonl are called NAME-00000-of-00008.jsonl. A folder that is there is meant as it
    is written: in out/run[1]/*.jsonl only the name is a pattern. Raises InputError if there is no
    file, if one is none that can be read again, or if shards are missing.
    """
    if os.path.isfile(path):
        return [path]

    # what several processes wrote, all of it
    shards = find_shards(path)
    if shards:
        check_all_shards(path, shards)
        check_are_files(shards)
        return shards

    # a folder's files, JSONL before Parquet, or a glob
    if os.path.isdir(path):
        patterns = [os.path.join(glob.escape(path), f"*{suffix}") for suffix in (".jsonl", PARQUET)]
    else:
        folder, name = os.path.split(path)
        if os.path.isdir(folder):
            folder = glob.escape(folder)
        patterns = [os.path.join(folder, name)]
    for pattern in patterns:
        files = sorted(glob.glob(pattern))
        if files:
            check_are_files(files)
            return files

    if os.path.isdir(path):
        raise InputError(f"{path}: a folder without a .jsonl or .parquet file in it; name the file")
    raise InputError(f"{path}: no such file")


def check_are_files(paths):
    """Raise InputError for what is there and no file."""
    for path in paths:
        if not os.path.isfile(path):  # what is read from a pipe is gone for the next reader
            raise InputError(
                f"{path}: a folder, a pipe or a broken link; write what it holds to a file"
            )


def find_shards(path):
    """What several processes wrote under this name, in order."""
    stem, suffix = os.path.splitext(path)
    numbered = re.compile(rf"-\d+-of-\d+{re.escape(suffix)}$")
    found = glob.glob(f"{glob.escape(stem)}-[0-9]*-of-[0-9]*{glob.escape(suffix)}")
    return sorted(file for file in found if numbered.search(file))


def check_all_shards(path, shards):
    """Raise InputError unless the shards are those of one run, and all of them."""
    totals = sorted({int(f.rpartition("-of-")[2].partition(".")[0]) for f in shards})
    if len(totals) > 1:
        numbers = " and ".join(map(str, totals))
        raise InputError(f"{path}: shards of runs with {numbers} processes; remove those of one")
    if len(shards) != totals[0]:
        raise InputError(
            f"{path}: {len(shards)} of {totals[0]} shards are there; "
            "run the stage that writes them again"
        )


# ---------------------------------------------------------------------------------------- reading


def read_records(path, *required):
    """Yield (where, record) for each object of a file; `where` is "file:line", for messages.

    path: a file of JSON lines or of a JSON array, with .gz or without, or of Parquet; a glob or
    shards of such files; a folder of them; or NAME:SPLIT or NAME:CONFIG:SPLIT of a Hugging Face
    data set. Raises InputError for what is no record or lacks a required field.
    """
    for where, record in read_rows(path):
        if not isinstance(record, dict):
            raise InputError(f"{where}: a record is a JSON object, not {type(record).__name__}")
        for field in required:
            if field not in record:
                raise InputError(f"{where}: field '{field}' is missing")
        yield where, record


def read_rows(path):
    """Yield (where, value) from whatever kind of source the path names."""
    is_file = os.path.exists(path) or find_shards(path)
    if ":" in path and not is_file:  # a file's name may hold a colon too
        yield from read_data_set(path)
        return

    for file in find_files(path):
        if file.endswith(PARQUET):
            yield from read_parquet(file)
        elif holds_array(file):
            yield from read_json_array(file)
        else:
            yield from read_json_lines(file)


def read_data_set(path):
    """Yield (where, row) of a Hugging Face data set NAME:SPLIT or NAME:CONFIG:SPLIT."""
    from datasets import load_dataset

    *name, split = re.split(r":(?![^\[]*\])", path)  # not at the colon of train[:100]
    try:
        rows = load_dataset(*name, split=split)
    except Exception as e:  # hub and file errors come in many classes
        raise InputError(
            f"{path}: no such file, and no data set NAME:SPLIT that can be loaded ({reason_of(e)})"
        ) from e
    for n, row in enumerate(rows, 1):
        yield f"{path} row {n}", as_json(row)


def read_parquet(file):
    """Yield (where, row) of a Parquet file, a batch of rows in memory."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    n = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    n += 1
                    yield f"{file}:{n}", as_json(row)
    except (ArrowException, OSError, OverflowError, ValueError) as e:  # of bytes, of dates
        raise InputError(f"{file}: not Parquet: {reason_of(e)}") from e


def as_json(row):
    """A row of a table as JSON lines would have it: dates and the like become text."""
    return json.loads(json_line(row))


def holds_array(file):
    """Whether a file is one JSON value, an array, and not a value a line; its first lines say it.

    Names do not: many a .json holds lines, and a .jsonl an array.
    """
    first, second = first_lines(file)
    if first.startswith(b"\x1f\x8b"):
        raise InputError(f"{file}: packed by gzip; its name has to end in .gz")
    if first.startswith(b"["):
        return True
    if not file.removesuffix(".gz").endswith(".json"):
        return False

    # a .json file holds lines if the first of several is a value of its own
    try:
        load_json(first)
    except ValueError:
        return True
    return not second


def first_lines(file):
    """The first two lines with something in them, stripped; empty where there are no more."""
    lines = []
    unpack = gzip.open if file.endswith(".gz") else open
    with unpack(file, "rb") as f, contextlib.suppress(EOFError, OSError, zlib.error):
        for line in f:  # what is broken is named by whoever reads all of it
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if line:
                lines.append(line)
            if len(lines) == 2:
                break
    first, second = (lines + [b"", b""])[:2]
    return first, second


def read_json_array(file):
    """Yield (where, value) of a file that holds one array."""
    content = read_bytes(file)
    try:
        values = load_json(content)
    except ValueError as e:
        raise InputError(f"{file}: not JSON: {e}") from e
    if not isinstance(values, list):
        kind = type(values).__name__
        raise InputError(f"{file}: a .json file holds an array of records, not {kind}")

    for n, value in enumerate(values, 1):
        where = f"{file}:{n}"
        if holds_surrogate(value):
            raise InputError(f"{where}: {SURROGATE}")
        yield where, value


def read_json_lines(file):
    """Yield (where, value) of a file with a value a line; empty lines are passed over."""
    for n, line in enumerate(read_lines(file), 1):
        if not line.strip():  # it has a number too
            continue
        where = f"{file}:{n}"
        try:
            value = load_json(line)
        except ValueError as e:
            formats = ""
            if n == 1:  # perhaps a file of another kind, such as CSV
                formats = "; what is read is JSON lines, a JSON array or Parquet"
            raise InputError(f"{where}: not JSON: {e}{formats}") from e
        # the two ways to write half of a pair: its escape, and bytes that are no UTF-8
        if (b"\\ud" in line.lower() or b"\xed" in line) and holds_surrogate(value):
            raise InputError(f"{where}: {SURROGATE}")
        yield where, value


def read_lines(file):
    """Yield the lines of a file as bytes."""
    if file.endswith(".gz"):  # read whole: only the checksum at its end shows damage
        yield from read_bytes(file).splitlines(keepends=True)
        return
    with open(file, "rb") as f:
        yield from f


def read_bytes(file):
    """The content of a file, unpacked if its name ends in .gz."""
    if not file.endswith(".gz"):
        with open(file, "rb") as f:
            return f.read()
    with gzip.open(file) as f:
        try:
            return f.read()
        except (EOFError, OSError, zlib.error) as e:
            raise InputError(f"{file}: not JSON: {e}") from e


def load_json(content):
    """The value of JSON in bytes.

    Raises ValueError for what is no JSON, no UTF-8 or nested deeper than MAX_DEPTH.
    """
    n_brackets = content.count(b"[") + content.count(b"{")
    try:
        value = json.loads(content)
        is_deep = n_brackets > MAX_DEPTH and depth_of(value) > MAX_DEPTH
    except RecursionError:
        is_deep = True
    if is_deep:
        raise ValueError(f"lists and objects within each other, more than {MAX_DEPTH}")
    return value


def depth_of(value):
    """How many lists and objects a value has within each other."""
    depth = 0
    level = [value]
    while level:
        inside = []
        for item in level:
            if isinstance(item, dict):
                inside += item.values()
            elif isinstance(item, list):
                inside += item
        level = [item for item in inside if isinstance(item, (dict, list))]
        depth += 1
    return depth


SURROGATE = "holds half of a surrogate pair, which is no text"


def holds_surrogate(value):
    """Whether a text in the value cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


# ---------------------------------------------------------------------------------------- writing


def json_line(record):
    """A record as a line of JSON; a data set's dates and the like become text."""
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def write_json(path, value):
    """Write a value as an indented JSON file, which appears under its name when it is whole."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def shard_path(out, rank=RANK):
    """The file that a process writes its share of `out` to: a shard if there are several."""
    if WORLD_SIZE == 1:
        return out
    stem, suffix = os.path.splitext(out)
    return f"{stem}-{rank:05d}-of-{WORLD_SIZE:05d}{suffix}"
