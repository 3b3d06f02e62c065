"""What the benchmarks' files have in common: answers, judgments of one model by one judge, the benchmark's own folder.
"""
import glob
import os
import sys
import time

from nanoaipo.files import read_records


def answers_of(path):
    """{key: (texts of all turns, tokens or None)} and the model's name, from an official answers file of any benchmark or one of ours.

    key: the instruction (AlpacaEval), else question_id or uid. tokens: the length as the file has it (Arena-Hard).
    """
    found, names = {}, set()
    for place, row in read_records(path):
        try:
            key, tokens = row.get("question_id", row.get("uid", row.get("instruction"))), row.get("metadata", {}).get("token_len")
            if "output" in row:
                texts, name = [row["output"]], row.get("generator")
            elif "choices" in row:
                turns, name = row["choices"][0]["turns"], row["model_id"]
                texts = [t["content"] if isinstance(t, dict) else t for t in turns]
                tokens = turns[0].get("token_len") if isinstance(turns[0], dict) else None
            elif "messages" in row:
                said, name = [m["content"] for m in row["messages"] if m["role"] == "assistant"], row["model"]
                texts = [s["answer"] if isinstance(s, dict) else s for s in said]
            else:
                texts, name = [r["text"] for r in row["responses"][:1] + row.get("later_responses", [])], None
            if not isinstance(key, (str, int)) or not texts or not all(isinstance(t, str) for t in texts):
                raise ValueError
        except (LookupError, TypeError, ValueError, AttributeError):
            sys.exit(f"{place}: no answer as AlpacaEval, MT-Bench, Arena-Hard or generate.py --task=answers write it")
        key not in found or sys.exit(f"{place}: answers '{str(key)[:60]}' a second time")
        found[key], names = (texts, tokens), names | {name}
    len(names) == 1 or sys.exit(f"{path}: answers of {len(names)} models; one file each")
    return found, names.pop() or os.path.basename(path)


def one_model(rows, model, path, wanted):
    """The (place, row) of the model that is wanted, or of the only one there; and its name."""
    names = sorted({model(row) for _, row in rows})
    if not wanted and len(names) != 1:
        sys.exit(f"{path}: judgments of {len(names)} models ({', '.join(names[:9])}); --answer_name says which one to score")
    wanted = wanted or names[0]
    wanted in names or sys.exit(f"{path}: no judgments of --answer_name={wanted}, but of {', '.join(names[:9])}")
    return [(place, row) for place, row in rows if model(row) == wanted], wanted


def one_judge(rows, judge, path):
    names = sorted({judge(row) for _, row in rows})
    len(names) == 1 or sys.exit(f"{path}: judged by {' and by '.join(names)}; two judges are never put into one score, split the file")
    return names[0]


def once(rows, key):
    seen = {}
    for place, row in rows:
        key(row) not in seen or sys.exit(f"{place}: judges {str(key(row))[:70]} again, as {seen[key(row)]} did; remove the one that shall not count")
        seen[key(row)] = place


def judged_at(rows):
    """The day of the last judgment, or "unknown" where the file does not say."""
    stamps = [row["tstamp"] for _, row in rows if isinstance(row.get("tstamp"), (int, float))]
    return time.strftime("%Y-%m-%d", time.gmtime(max(stamps))) if stamps else "unknown"


def find(folder, pattern, origin):
    """The file of a benchmark's own that the pattern names, anywhere below the folder; of several the one with the shortest path.

    So of alpaca_eval_clf_gpt4_turbo/ and alpaca_eval_clf_cot_gpt4_turbo/ the first, and mt_bench/ rather than vicuna_bench/.
    """
    folder or sys.exit(f"--bench_data is not set: the benchmark's own files, such as git clone https://github.com/{origin}")
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "**", pattern), recursive=True), key=lambda name: (len(name), name))
    return found[0] if found else sys.exit(f"--bench_data={folder}: holds no {pattern}; it is in https://github.com/{origin}")
