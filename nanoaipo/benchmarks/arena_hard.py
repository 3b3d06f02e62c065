"""Arena-Hard: two games a question against a baseline.
"""
import collections
import re
import sys
import time

import numpy as np

from nanoaipo.benchmarks.answers import answers_of, find, judged_at, once, one_judge, one_model
from nanoaipo.files import read_records

VERDICTS = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B>A": (0, 1), "B>>A": (0, 3)}               # share that A wins, weight
ALSO = {"B<<A": (1, 3), "B<A": (1, 1), "B=A": (0.5, 1), "A<B": (0, 1), "A<<B": (0, 3)}                   # read by Arena-Hard v2.0 only


def score_arena_hard(judgments, name, answers, tables, resamples=1000):
    """Win rate against the baseline over two games a question; its 95 % interval by bootstrap over questions; average tokens.

    A strong verdict weighs 3. As every battle is against the baseline, the Bradley-Terry win probability is the weighted share won.
    v0.1 leaves out a game without a verdict, v2.0 (records with uid) the question. Battles files have the games one by one.
    """
    rows = list(read_records(judgments))
    battles = bool(rows) and "winner" in rows[0][1]
    rows, name = one_model(rows, lambda r: r["model_b"] if battles else r["model"], judgments, name)
    judge = "unknown (a battles file does not say)" if battles else one_judge(rows, lambda r: r["judge"], judgments)
    battles or once(rows, lambda r: r.get("question_id", r.get("uid")))
    won, invalid, groups = collections.defaultdict(lambda: np.zeros(2)), 0, {}
    for place, row in rows:
        key = row.get("question_id", row.get("uid"))
        if battles:
            games = [{"model_a": (0, 1), "model_b": (1, 1), "tie": (0.5, 1)}.get(row["winner"].partition(" ")[0])]
        else:
            known = VERDICTS | ALSO if "uid" in row else VERDICTS
            first, second = (known.get((game or {}).get("score")) for game in row["games"])
            games = [first and (1 - first[0], first[1]), second]        # game 1 shows the baseline as A
        invalid += games.count(None)
        for share, weight in () if "uid" in row and None in games else filter(None, games):
            won[key] += share * weight, weight
            groups[key] = row.get("category", "all")
    won or sys.exit(f"{judgments}: not one verdict on {name}")

    def table(keys):
        counts, draw = np.array([won[k] for k in keys]), np.random.default_rng(0)                            # (Q, [won, weight])
        drawn = counts[draw.integers(len(keys), size=(resamples, len(keys)))].sum(1)                         # (resamples, 2)
        interval = 100 * np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
        return {"n": len(keys), "win_rate": 100 * counts[:, 0].sum() / counts[:, 1].sum(), "ci": interval.tolist()}

    lengths = [tokens for _, tokens in answers_of(answers)[0].values()] if answers else [None]
    parts = {c: table([k for k in won if groups[k] == c]) for c in sorted(set(groups.values()))}
    return {"model": name, "judge": judge, "date": judged_at(rows), "invalid": invalid, **table(list(won)),
            "avg_tokens": None if None in lengths else int(np.mean(lengths)), **({"categories": parts} if len(parts) > 1 else {})}


def judge_arena_hard(folder, answers, baseline, judge, asked):
    """Two games a question; a judge that gives no verdict is asked once to go on and finish with one.

    The judge's prompt is read from judge_config.yaml, which the repository had until v2.0 put it into code.
    """
    import yaml
    with open(find(folder, "*judge_config*.y*ml", "lm-sys/arena-hard-auto (its tree of September 2024)"), encoding="utf-8") as f:
        settings = yaml.safe_load(f)
    for field in ("system_prompt", "prompt_template", "temperature", "max_tokens"):
        field in settings or sys.exit(f"{f.name}: '{field}' is missing")
    template = settings["prompt_template"] if isinstance(settings["prompt_template"], str) else settings["prompt_template"][0]
    baseline or sys.exit("--baseline is not set: the answers file of the model to compare with (v0.1: model_answer/gpt-4-0314.jsonl)")
    (ours, name), (theirs, other) = answers_of(answers), answers_of(baseline)
    asks = {row.get("question_id", row.get("uid")): row for _, row in read_records(find(folder, "question.jsonl", "lm-sys/arena-hard-auto"))}
    keys = [key for key in asks if key in ours] or sys.exit(f"{answers}: answers none of Arena-Hard's questions")
    lacking = [key for key in keys if key not in theirs]
    lacking and sys.exit(f"{baseline}: no answer to {len(lacking)} of the questions, such as '{lacking[0]}'")
    new, talks = "uid" in asks[keys[0]], []
    for key in keys:
        turn = asks[key].get("prompt") or asks[key]["turns"][0]
        question = turn if isinstance(turn, str) else turn["content"]
        for a, b in ((theirs[key][0][0], ours[key][0][0]), (ours[key][0][0], theirs[key][0][0])):
            text = template.format(question_1=question, answer_1=a, answer_2=b, QUESTION=question, ANSWER_A=a, ANSWER_B=b)
            talks.append([{"role": "system", "content": settings["system_prompt"]}, {"role": "user", "content": text}])

    def said(which):
        replies = asked([{"messages": talks[k], "temperature": float(settings["temperature"]), "max_tokens": settings["max_tokens"],
                          "about": [keys[k // 2], k % 2 + 1]} for k in which])
        return [reply["reply"] for reply in replies]

    judged = said(range(len(talks)))
    silent = [k for k, reply in enumerate(judged) if reply and not re.search(r"\[\[[AB<>=]+\]\]", reply)]
    for k in silent:
        talks[k] += [{"role": "assistant", "content": judged[k]},
                     {"role": "user", "content": "continue your judgment and finish by outputting a final verdict label"}]
    for k, reply in zip(silent, said(silent) if silent else ()):
        judged[k] += "\n" + reply
    games = [{"user_prompt": talk[1]["content"], "judgment": reply, "score": verdict_of(reply, new)} for talk, reply in zip(talks, judged)]
    who = {"model": name, "judge": judge, "baseline": other, "tstamp": time.time()}
    return [({"uid": key, "category": asks[key]["category"]} if new else {"question_id": key}) | who | {"games": games[2 * k:2 * k + 2]}
            for k, key in enumerate(keys)]


def verdict_of(reply, new):
    """The [[verdict]] of a reply, or None: v0.1 wants one distinct verdict, v2.0 takes the last, in single brackets if need be."""
    text = reply.upper() if new else reply
    found = re.findall(r"\[\[([AB<>=]+)\]\]", text) or (re.findall(r"\[([AB<>=]+)\]", text) if new else [])
    return found[-1] if found and (new or len(set(found)) == 1) else None
