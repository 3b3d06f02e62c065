"""Records and their files: JSONL and its relatives, shards, writing under a temporary name.

Records are JSON objects, one per line; unknown fields travel along; ids join records, never line numbers.
"""
import glob
import gzip
import json
import os
import re
import sys
import zlib

from nanoaipo.processes import RANK, WORLD_SIZE


def find_files(path):
    """The files behind a path: itself, a folder's *.jsonl, a glob, or the shards NAME-00000-of-00008.jsonl of NAME.jsonl."""
    if os.path.isfile(path):
        return [path]
    stem, suffix = os.path.splitext(path)
    shards = sorted(f for f in glob.glob(f"{stem}-[0-9]*-of-[0-9]*{suffix}") if re.search(rf"-\d+-of-\d+{re.escape(suffix)}$", f))
    found = shards or sorted(glob.glob(os.path.join(path, "*.jsonl") if os.path.isdir(path) else path))
    if not found:
        sys.exit(f"{path}: no such file")
    if shards:
        want = {int(f.rpartition("-of-")[2].partition(".")[0]) for f in shards}
        len(want) == 1 or sys.exit(f"{path}: shards of runs with {' and '.join(map(str, sorted(want)))} processes; remove those of one")
        len(shards) == max(want) or sys.exit(f"{path}: {len(shards)} of {max(want)} shards are there; run the stage that writes them again")
    return found


def read_records(path, *required):
    """Yield (place, record) for each object of a JSONL file, a .json array, either with .gz, a folder, a glob or a set of shards.

    NAME:SPLIT or NAME:CONFIG:SPLIT is a Hugging Face dataset. place is "file:line". A line that is no JSON object or lacks a required
    field ends the program with its place.
    """
    if ":" in path and not os.path.exists(path):
        from datasets import load_dataset
        *name, split = re.split(r":(?![^\[]*\])", path)                  # not the colon of train[:100]
        try:
            rows = load_dataset(*name, split=split)
        except Exception as e:                                          # hub and file errors come in many classes
            sys.exit(f"{path}: no such file, and no data set NAME:SPLIT that can be loaded ({str(e).strip().splitlines()[0]})")
        for n, row in enumerate(rows, 1):
            for field in required:
                field in row or sys.exit(f"{path} row {n}: field '{field}' is missing")
            yield f"{path} row {n}", row
        return
    for file in find_files(path):
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as f:
            array = file.removesuffix(".gz").endswith(".json")
            try:
                rows = json.load(f) if array else f.read().splitlines(keepends=True) if file.endswith(".gz") else f
            except (ValueError, EOFError, OSError, zlib.error) as e:    # of JSON, of UTF-8, of gzip
                sys.exit(f"{file}: not JSON: {e}")
            not array or isinstance(rows, list) or sys.exit(f"{file}: a .json file holds an array of records, not {type(rows).__name__}")
            for n, row in enumerate(rows, 1):
                place, escapes = f"{file}:{n}", array or b"\\ud" in row.lower()
                if not array:
                    if not row.strip():
                        continue
                    try:
                        row = json.loads(row)
                    except ValueError as e:
                        sys.exit(f"{place}: not JSON: {e}")
                isinstance(row, dict) or sys.exit(f"{place}: a record is a JSON object, not {type(row).__name__}")
                if escapes:
                    try:
                        json.dumps(row, ensure_ascii=False).encode()
                    except UnicodeEncodeError:
                        sys.exit(f"{place}: holds half of a surrogate pair, which is no text")
                for field in required:
                    field in row or sys.exit(f"{place}: field '{field}' is missing")
                yield place, row


def json_line(record):
    """A record as a line of JSON; a data set's dates and the like become text."""
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def write_json(path, value):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def shard_path(out, rank=RANK):
    """The file this process writes, or another one."""
    stem, suffix = os.path.splitext(out)
    return f"{stem}-{rank:05d}-of-{WORLD_SIZE:05d}{suffix}" if WORLD_SIZE > 1 else out
