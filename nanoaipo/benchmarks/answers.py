"""What the benchmarks' files have in common: answers, judgments of one model, their own folder."""

import collections
import glob
import os
import time

from nanoaipo.errors import InputError
from nanoaipo.files import read_records
from nanoaipo.messages import found_field

# texts: of all turns; tokens: of the first turn as the file says, or None
Answer = collections.namedtuple("Answer", "texts tokens")


def turn_text(turn, field):
    """A turn's text: the turn itself, or the field of an object."""
    if isinstance(turn, dict):
        return turn[field]
    return turn


def parse_answer(row):
    """(key, model name or None, Answer) of a record in the format of any benchmark or of ours.

    The key is question_id, uid, instruction (AlpacaEval) or session_id (WildBench). Raises one of
    LookupError, TypeError, ValueError, AttributeError when the record is in none of these formats.
    """
    key = row.get(found_field(row, ("question_id", "uid", "instruction", "session_id")))
    tokens = None

    if "output" in row:  # AlpacaEval, WildBench
        name = row.get("generator")
        texts = [row["output"]]
        if isinstance(row["output"], list):  # WildBench's samples
            texts = row["output"][:1]
    elif "choices" in row:  # MT-Bench, Arena-Hard v0.1
        name = row["model_id"]
        turns = row["choices"][0]["turns"]
        texts = [turn_text(turn, "content") for turn in turns]
        if isinstance(turns[0], dict):  # Arena-Hard's have a length, MT-Bench's are texts
            tokens = turns[0].get("token_len")
        if tokens is None and isinstance(row.get("conv_metadata"), dict):  # of late 2024
            tokens = row["conv_metadata"].get("token_len")
    elif "messages" in row:  # Arena-Hard v2.0
        name = row["model"]
        contents = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        texts = [turn_text(content, "answer") for content in contents]
        if isinstance(row.get("metadata"), dict):  # some write a text, or null
            tokens = row["metadata"].get("token_len")
    else:  # generate.py --task=answers
        name = None  # its file does not say
        responses = row["responses"][:1] + row.get("later_responses", [])
        texts = [response["text"] for response in responses]

    if not isinstance(key, (str, int)):
        raise TypeError("a key is a text or a number")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError("an answer is one text per turn")
    return key, name, Answer(texts, tokens)


def read_answers(path):
    """({key: Answer}, the model's name) of an answers file: an official one, or generate.py's.

    A file without a name in it gives its own. Raises InputError for an unknown format, a question
    answered twice, answers of several models.
    """
    answers = {}
    names = set()
    for where, row in read_records(path):
        try:
            key, name, answer = parse_answer(row)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{where}: no answer as AlpacaEval, MT-Bench, Arena-Hard or "
                "generate.py --task=answers write it"
            ) from None
        if key in answers:
            raise InputError(f"{where}: answers '{str(key)[:60]}' a second time")
        answers[key] = answer
        names.add(name)

    # a score is one model's
    if len(names) != 1:
        raise InputError(f"{path}: answers of {len(names)} models; one file each")
    return answers, names.pop() or os.path.basename(path)


# ---- judgments: (where, row) pairs, as read_records yields them ----

# fields by which a benchmark's judgments are known
JUDGMENT_FIELDS = {
    "preference": "alpaca_eval",
    "turn": "mt_bench",
    "games": "arena_hard",
    "model_b": "arena_hard",  # of its battles
    "session_id": "wild_bench",
}


def check_benchmark(path, bench):
    """Raise InputError if a file's first record is another benchmark's, or an answer."""
    where, first = next(read_records(path), ("", {}))
    benchmarks = [name for field, name in JUDGMENT_FIELDS.items() if field in first]
    if bench in benchmarks:
        return
    if benchmarks:
        raise InputError(f"{where}: looks like --bench={benchmarks[0]}, not {bench}")
    if found_field(first, ("output", "choices", "messages", "responses")):
        raise InputError(
            f"{where}: an answer, not a judgment: --answers takes it, for a --judge_model"
        )


def select_model(rows, model_of, path, wanted):
    """The rows about the model that is wanted, or about the only one there; and its name."""
    names = sorted({model_of(row) for _, row in rows})
    if not wanted and len(names) != 1:
        raise InputError(
            f"{path}: judgments of {len(names)} models ({', '.join(names[:9])}); "
            "--answer_name says which one to score"
        )
    name = wanted or names[0]
    if name not in names:
        raise InputError(
            f"{path}: no judgments of --answer_name={name}, but of {', '.join(names[:9])}"
        )
    return [(where, row) for where, row in rows if model_of(row) == name], name


def only_judge(rows, judge_of, path):
    """The name of the judge of all rows; raises InputError if there are several."""
    names = sorted({judge_of(row) for _, row in rows})
    if len(names) != 1:
        raise InputError(
            f"{path}: judged by {' and by '.join(names)}; two judges are never put into one score, "
            "split the file"
        )
    return names[0]


def check_no_duplicates(rows, key_of):
    """Raise InputError if two rows judge the same thing."""
    seen = {}
    for where, row in rows:
        key = key_of(row)
        if key in seen:
            raise InputError(
                f"{where}: judges {str(key)[:70]} again, as {seen[key]} did; "
                "remove the one that shall not count"
            )
        seen[key] = where


def last_day(rows):
    """The day of the last judgment, or "unknown" where the file does not say."""
    stamps = [row.get("tstamp") for _, row in rows]
    stamps = [stamp for stamp in stamps if isinstance(stamp, (int, float))]
    if not stamps:
        return "unknown"
    return time.strftime("%Y-%m-%d", time.gmtime(max(stamps)))


# ---- the benchmark's own files ----


def files_below(folder, pattern):
    """Files anywhere below a folder that the pattern names."""
    return glob.glob(os.path.join(glob.escape(folder), "**", pattern), recursive=True)


def find_bench_file(folder, pattern, origin):
    """The benchmark's own file that the pattern names; of several the one with the shortest path.

    So of alpaca_eval_clf_gpt4_turbo/ and alpaca_eval_clf_cot_gpt4_turbo/ the first, and mt_bench/
    rather than vicuna_bench/. origin: the repository on GitHub that a message sends people to.
    """
    if not folder:
        raise InputError(
            "--bench_data is not set: the benchmark's own files, such as "
            f"git clone https://github.com/{origin}"
        )
    found = sorted(files_below(folder, pattern), key=lambda path: (len(path), path))
    if not found:
        raise InputError(
            f"--bench_data={folder}: holds no {pattern}; it is in https://github.com/{origin}"
        )
    return found[0]
