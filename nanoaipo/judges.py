"""A language model as judge: its replies are points, or votes with Bradley-Terry strengths."""

import itertools
import json
import math
import os
import re

import torch

from nanoaipo.chat import template_arguments
from nanoaipo.errors import InputError
from nanoaipo.logprobs import expected_digit, first_token
from nanoaipo.questions import ask, endpoint, local_model
from nanoaipo.stages import fingerprint
from nanoaipo.thoughts import marks_of, split_thought

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# a thought in tags that a prompt asked for, wherever it stands; one cut short has no end
THOUGHT_TAG = r"<(thinking|reasoning|analysis|scratchpad)>"
TAGGED_THOUGHT = re.compile(
    rf"{THOUGHT_TAG}.*?</\1>|\A\s*{THOUGHT_TAG}.*", re.IGNORECASE | re.DOTALL
)
# LaTeX's commands, such as \boxed; HTML's tags; bold and italics
MARKUP = re.compile(r"\\[a-z]+|</?[a-z]+>|\b_+|_+\b", re.IGNORECASE)

# "Score (0-5): 4": what the judge says of the score, on its line or, under a heading, the next one
SCORE_LINE = re.compile(
    r"^\W*(?:(?:final|total|overall) )?score\b(?:[^\w\n]*\n)*"
    r"([^\w\n]*(?:\([^()\n]*\)\W*)?(?:is\W*)?\d.*)$",
    re.IGNORECASE | re.MULTILINE,
)
REMARK = re.compile(r"\((?!\s*\d+(?:\.\d+)?\s*\))[^()]*\)")  # in brackets; (4) is none

# what the points are out of, at the end of a remark: (0-10), (out of 10)
SCALE = re.compile(
    r"(?:/|\bof\b|\bmax(?:imum)?\b|\b[01]\s*(?:[-–—]|\bto\b))\W*(\d+(?:\.\d+)?)\W*$",
    re.IGNORECASE,
)
# behind it: where a sentence ends, or its reason begins
CLAUSE_END = re.compile(r"[.!?;:\"]|\b(?:because|since|as)\b", re.IGNORECASE)

# one number from 0 up, perhaps "out of 5", and no second one beside it: no sum, no range
POINTS = re.compile(
    r"\W*(?:is\W*)?(?<![-−–<>≤≥.\d])(\d+(?:\.\d+)?)(?![\w%])(?:\s*points?\b)?"
    r"(?:\W*(?:/|out of|of)\W*5(?:\.0)?)?"
    r"(?!\W*(?:or\b|(?:to|and|plus|minus|out of|of)?\W*\d))(?!.*\+\W*(?:\d|$))",
    re.IGNORECASE,
)

# a verdict: which is better, perhaps by how much (Arena-Hard), or neither
NOUN = r"(?:response|answer|assistant|model)"
CHOICE = r"(a\s*(?:>>?|<<?|=)\s*b|b\s*(?:>>?|<<?|=)\s*a|a|b|c|tie)"

# "Better: A"; a line that says something else in its place, such as "Better: A or B", has no group
VERDICT = re.compile(
    rf"^\W*better\b(?:\W*(?:{NOUN}\W*)?{CHOICE}"
    r"(?:\W*\((?!or\b)[^()\n]*\)|\W+(?:because|since|as)\b.*)?\W*$|[^\w\n]*:.*$)",
    re.IGNORECASE | re.MULTILINE,
)

# where no line says so, how judges mark a verdict: [RESULT] 4 (Prometheus), \boxed{4}, [[4]]
MARKED = re.compile(
    r"\[result\][\s:]*(?P<result>(?:(?!\[result\]).)*)"
    r"|\\boxed\{(?:\\[a-z]+\{)?(?P<boxed>[^{}]*)\}"
    r"|\[\[(?P<brackets>[^\[\]]*)\]\]"
    r"|<(?P<tag>answer|score|rating|verdict|winner)>(?P<tagged>[^<]*)</(?P=tag)>",
    re.IGNORECASE,
)
# and where nothing is marked: "Final verdict: Assistant B", "Rating: 4/5"
LABELLED = re.compile(
    rf"^\W*(?:(?:my|the|final|overall)\W+)*(?:verdict|winner|rating|better {NOUN})\b"
    r"\W*(?:is\b\W*)?(.+)$",
    re.IGNORECASE | re.MULTILINE,
)
MARKED_POINTS = re.compile(r"(?:(?:score|rating)\W+)?(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*5)?")
MARKED_VERDICT = re.compile(rf"(?:{NOUN}[\s_]*)?{CHOICE}")
# MT-Bench's tie is [[C]]; Arena-Hard's judges turn A>B around to B<A now and then
# fmt: off
OUTCOMES = {
    "a": 1.0, "a>b": 1.0, "a>>b": 1.0, "b<a": 1.0, "b<<a": 1.0,
    "b": 0.0, "b>a": 0.0, "b>>a": 0.0, "a<b": 0.0, "a<<b": 0.0,
    "c": 0.5, "tie": 0.5, "a=b": 0.5, "b=a": 0.5,
}
# fmt: on

# {"score": 4}, {"winner": "A"}: which keys of a JSON object hold a verdict
SCORE_KEYS = re.compile(r"(?:(?:final|total|overall)_)?(?:score|rating)")
VERDICT_KEYS = re.compile(
    rf"(?:final_)?(?:winner|better|verdict|choice|preference|preferred)(?:_{NOUN})?"
)
JSON = json.JSONDecoder(strict=False)  # its texts may hold line breaks

NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?")  # what --verdict finds where points are asked for

# {rubric} in a template, filled from the prompt's record; \boxed{answer} is none
PLACE = re.compile(r"(?<!\w)\{([a-z_]\w*)\}")


def prompt_text(messages):
    """A prompt as PairRM and judges read it: one message bare, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role'].upper()}: {m['content']}" for m in messages)


def from_rewards(rewards, temperature):
    """Rewards (N,) and the log-odds (N, N) they imply: [i, j] = (r_i - r_j) / temperature."""
    rewards = torch.tensor(rewards, dtype=torch.float32)  # (N,)
    odds = (rewards[:, None] - rewards) / temperature  # (N, N)
    return rewards, odds


def read_score(reply):
    """The number on the last line "Score: N" of a reply, in JSON behind it, else marked, or None.

    A sum counts as what it comes to. A range, a fraction, one of several numbers, a number below 0
    or above 5 or on another scale, and what stands in a thought are no score.
    """
    values, answer = cut_json(without_thought(reply), SCORE_KEYS)
    found = SCORE_LINE.findall(plain_lines(answer))
    if not found:
        points = one_verdict(values or marked_texts(answer), MARKED_POINTS)
        if points is None or float(points) > 5:
            return None
        return float(points)

    # another scale, in brackets before or behind the number
    for remark in REMARK.findall(found[-1]):
        scale = SCALE.search(remark)
        if scale and float(scale[1]) != 5:
            return None

    line = REMARK.sub("", found[-1])
    terms, _, line = line.rpartition("=")  # 1 + 1 + 0 = 2
    match = POINTS.match(line)
    if match is None or float(match[1]) > 5 or "/" in terms:
        return None

    # "3, perhaps 4", "1 for relevance, 1 for depth"
    rest = CLAUSE_END.split(line[match.end() :])[0]
    if re.search(r"\d", rest):
        return None
    return float(match[1])


def read_verdict(reply):
    """The last line "Better: A", "B" or "tie" of a reply as 1, 0 or a half, or None.

    JSON behind it counts in its place, and what is marked where there is neither.
    """
    values, answer = cut_json(without_thought(reply), VERDICT_KEYS)
    found = VERDICT.findall(plain_lines(answer))
    if not found:
        return OUTCOMES.get(one_verdict(values or marked_texts(answer), MARKED_VERDICT))
    return OUTCOMES.get(re.sub(r"\s", "", found[-1].lower()))


def without_thought(reply):
    """What a judge says behind its thought, and outside of those in tags that a prompt asks for."""
    _, answer = split_thought(reply)
    return TAGGED_THOUGHT.sub("", answer)


def plain_lines(answer):
    """An answer without markup and without the lines that have no word in them.

    A judge that falls into a loop writes thousands of those, and a pattern would try each.
    """
    lines = MARKUP.sub("", answer).splitlines()
    return "\n".join(line for line in lines if re.search(r"\w", line))


def cut_json(answer, keys):
    """What JSON objects in an answer have under these keys, as texts, and the answer behind them.

    keys: a pattern of names in lower case with underscores. Where no object has such a key, that is
    all of the answer.
    """
    values = []
    end = 0  # of the last object
    for match in re.finditer(r"\{", answer):
        begin = match.start()
        if begin < end:
            continue
        try:
            found, stop = JSON.raw_decode(answer, begin)
        except ValueError:  # no JSON
            continue
        except RecursionError:  # thousands of brackets: each would be tried in turn
            break
        names = [name for name in found if keys.fullmatch(re.sub(r"\W+", "_", name.lower()))]
        if names:
            values += [str(found[name]) for name in names]
            end = stop
    return values, answer[end:]


def marked_texts(answer):
    """What an answer marks as its verdict, else what lines call one, else the whole answer."""
    marked = []
    for match in MARKED.finditer(answer):
        marked += marked_texts(match[match.lastgroup])  # <answer>[[A]]</answer>
    return marked or LABELLED.findall(plain_lines(answer)) or [answer]


def one_verdict(texts, pattern):
    """The verdict that all these texts give, in lower case, or None where one gives another.

    pattern: of a verdict; its group is returned, and text of another form is none.
    """
    verdicts = set()
    for text in texts:
        match = pattern.fullmatch(without_bold(text))
        verdicts.add(match and re.sub(r"\s", "", match[1]))
    if len(verdicts) != 1:
        return None
    return verdicts.pop()


def without_bold(text):
    """A verdict without the brackets, quotes and bold around it, in lower case."""
    return text.lstrip(" \n*_`($\"'").rstrip(" \n*_`)$\"'}.!").lower()


def reader_of(verdict, judge_mode):
    """A function as read_score or read_verdict, which reads what a regular expression finds.

    Of several matches behind the thought the last counts, in it the group `verdict`, or the only
    group. Points may be any number: the scale is that of the judge_prompt. Raises InputError.
    """
    try:
        pattern = re.compile(verdict, re.MULTILINE)
    except re.error as e:
        raise InputError(f"--verdict={verdict}: no regular expression: {e}") from e
    group = 1
    if "verdict" in pattern.groupindex:
        group = "verdict"
    elif pattern.groups != 1:
        raise InputError(
            f"--verdict={verdict}: has {pattern.groups} groups; wanted is one, "
            "or one that is named: (?P<verdict>...)"
        )

    def read(reply):
        # not split_thought: marks around the answer may be what the expression looks for
        marks = marks_of(reply)
        if marks:
            _, _, reply = reply.partition(marks[1])
        matches = list(pattern.finditer(TAGGED_THOUGHT.sub("", reply)))
        if not matches:
            return None
        text = without_bold(matches[-1][group] or "")
        if judge_mode == "pairwise":
            return OUTCOMES.get(one_verdict([text], MARKED_VERDICT))
        if NUMBER.fullmatch(text) is None:
            return None
        return float(text.replace("−", "-"))

    return read


# mode: how a reply is read, and the fields of its template, the prompt's first
JUDGE_MODES = {
    "score": (read_score, ("{prompt}", "{response}")),
    "pairwise": (read_verdict, ("{prompt}", "{response_a}", "{response_b}")),
    "expected": (None, ("{prompt}", "{response}")),  # its log-probs say it all
}


def judge(
    model,
    counts,
    *,
    out,
    engine,
    judge_url,
    judge_mode="score",
    judge_prompt="",
    verdict="",
    judge_votes=3,
    judge_temperature=0.7,
    judge_tokens=512,
    judge_concurrency=16,
    reward_temperature=1.0,
    pseudo_count=0.5,
    dtype,
    seed,
    tensor_parallel,
    gpu_memory,
    generate_rows,
    template_kwargs="",
    date="",
    **_,
):
    """A ranker that asks a language model, here by an engine or at an OpenAI-compatible endpoint.

    Each question gets judge_votes replies. Mode "score" asks for points for each response (the
    additive rubric of Self-Rewarding, 2401.10020); a response's reward is the mean over its votes.
    Mode "expected" asks once for a digit, whose mean by its log-probs is the response's reward.
    Mode "pairwise" shows two responses at a time, in both orders, and fits Bradley-Terry strengths
    to the votes, as for annotators. What is asked stands in prompts/judge_MODE.txt or in the file
    judge_prompt, with places for columns of the prompt's record. verdict is a regular expression
    that finds the verdict. Behind an endpoint a judge is known by its model's name, wherever it is
    served.
    """
    if judge_mode not in JUDGE_MODES:
        raise InputError(f"--judge_mode={judge_mode}: there are {', '.join(JUDGE_MODES)}")
    read, fields = JUDGE_MODES[judge_mode]
    by_log_probs = judge_mode == "expected"
    how = {"temperature": judge_temperature, "max_tokens": judge_tokens}
    if by_log_probs:
        judge_votes = 1  # the log-probs of one token hold all votes
        how = {"temperature": 1.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        if verdict or not judge_url:
            raise InputError(
                "--judge_mode=expected: reads the log-probs of an endpoint: set --judge_url, and "
                "no --verdict"
            )
    if verdict:
        read = reader_of(verdict, judge_mode)
    template = load_template(judge_mode, judge_prompt, fields)

    # `identity` enters every question, so that another judge is asked anew
    if judge_url:
        answer = endpoint(judge_url, judge_concurrency)
        identity = {"model": model}
    else:
        answer = local_model(
            model,
            engine=engine,
            dtype=dtype,
            seed=seed,
            tensor_parallel=tensor_parallel,
            gpu_memory=gpu_memory,
            generate_rows=generate_rows,
            arguments=template_arguments(template_kwargs, date),
        )
        identity = {"model": model, "weights": fingerprint(model), "seed": seed}
        if template_kwargs:
            identity["template_kwargs"] = template_kwargs

    def rank(rows):
        # judge_votes questions per response, or per ordered pair of responses
        comparisons = all_comparisons(rows, len(fields) - 1)
        questions = []
        for r, shown in comparisons:
            content = fill_template(template, fields, rows[r], shown)
            for vote in range(judge_votes):
                # the seed of a local reply is a hash of its question: the order of keys counts
                question = {
                    "messages": [{"role": "user", "content": content}],
                    **how,
                    "about": [rows[r]["id"], *shown, vote],
                }
                questions.append(identity | question)

        # an endpoint without log-probs shows at the first reply, before the others are paid for
        if by_log_probs:
            check_log_probs(ask(questions[:1], out, answer), model)

        # replies to votes; what cannot be read is counted and is no vote
        replies = ask(questions, out, answer)
        if by_log_probs:
            readings = [expected_digit(reply) for reply in replies]
        else:
            readings = [read(reply["reply"]) for reply in replies]
        unreadable = readings.count(None)
        counts["replies"] += len(readings)
        counts["unreadable_replies"] += unreadable
        if replies and unreadable == len(replies):
            print_unreadable(replies, judge_tokens)
        votes = readable_votes(readings, judge_votes)

        # votes to scores and log-odds of each row
        if judge_mode != "pairwise":
            rewards = mean_scores(rows, comparisons, votes)
            return [from_rewards(row_rewards, reward_temperature) for row_rewards in rewards]
        strengths = zermelo(count_wins(rows, comparisons, votes), pseudo_count)
        return [from_rewards(row_strengths.tolist(), 1.0) for row_strengths in strengths]

    return rank


def load_template(judge_mode, judge_prompt, fields):
    """The text a judge is asked, from the file judge_prompt or ours; each field has to be in it."""
    path = judge_prompt or os.path.join(ROOT, "prompts", f"judge_{judge_mode}.txt")
    if not os.path.isfile(path):
        raise InputError(f"--judge_prompt={path}: no such file")
    with open(path, encoding="utf-8") as f:
        template = f.read().strip()
    for field in fields:
        if field not in template:
            raise InputError(f"{path}: lacks {field}, where the text to judge goes")
    return template


def fill_template(template, fields, row, shown):
    """The template with the row's prompt and the responses `shown` (indices) in its fields.

    Other places, such as {rubric}, take the row's column of that name. Raises InputError for a row
    without it.
    """
    texts = [prompt_text(row["prompt"])]
    for i in shown:
        texts.append(row["texts"][i])
    values = {}
    for field, text in zip(fields, texts):
        values[field] = without_tags(text, template)

    for place in PLACE.finditer(template):
        if place[0] in fields:
            continue
        value = row.get(place[1])
        if value is None:
            raise InputError(
                f"prompt '{row['id']}': no '{place[1]}', which {place[0]} in the judge_prompt "
                f"stands for; its columns are {', '.join(row)}"
            )
        values[place[0]] = column_text(value)

    # one pass over the template: a text that spells a field stays as it is
    any_field = "|".join(map(re.escape, values))
    return re.sub(any_field, lambda match: values[match[0]], template)


def without_tags(text, template):
    """A text that cannot close the tags around it: </response> becomes &lt;/response>.

    This goes for the tags that the template has, however they are spaced, with invisible
    characters in front of the name and with the wide < that some languages type, too.
    """
    names = set(re.findall(r"</(\w+)", template))
    if not names:
        return text
    tag = rf"[<＜﹤](?=[^\w<>]{{0,8}}(?:{'|'.join(names)})\b)"
    return re.sub(tag, "&lt;", text, flags=re.IGNORECASE)


def column_text(value):
    """A column as a judge reads it: a text as it is, a list of texts numbered, else JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(f"{n}. {item}" for n, item in enumerate(value, 1))
    return json.dumps(value, ensure_ascii=False, default=str)


def check_log_probs(replies, model):
    """Raise InputError where a reply that is no error has no log-probs."""
    for reply in replies:
        if "error" not in reply and first_token(reply) is None:
            raise InputError(
                f"--judge_mode=expected: '{model}' gives no log-probs with its replies; take "
                "another model or --judge_mode=score"
            )


def all_comparisons(rows, n_shown):
    """(row's index, indices of the n_shown responses that are shown), of two in both orders."""
    comparisons = []
    for r, row in enumerate(rows):
        for shown in itertools.permutations(range(len(row["texts"])), n_shown):
            comparisons.append((r, shown))
    return comparisons


def print_unreadable(replies, judge_tokens):
    """Show the first of a judge's replies, of which not one could be read.

    Whether it is an error the caller decides: other processes may have readable replies.
    """
    # an error, where the endpoint refused the question, says more than an empty reply
    first = replies[0].get("error") or replies[0]["reply"]
    line = " ".join(first.split())[:200]
    print(
        f"not one of {len(replies)} replies of the judge could be read; they have {judge_tokens} "
        f'tokens at most (--judge_tokens, in eval.py --verdict_tokens), the first: "{line}"',
        flush=True,
    )


def readable_votes(readings, judge_votes):
    """For each comparison the list of its readable votes; it has judge_votes readings in a row."""
    votes = []
    for start in range(0, len(readings), judge_votes):
        block = readings[start : start + judge_votes]
        votes.append([reading for reading in block if reading is not None])
    return votes


def mean_scores(rows, comparisons, votes):
    """For each row the mean score of each response over its votes; nan where none could be read."""
    means = [[math.nan] * len(row["texts"]) for row in rows]
    for (r, (i,)), scores in zip(comparisons, votes):
        if scores:
            means[r][i] = sum(scores) / len(scores)
    return means


def count_wins(rows, comparisons, votes):
    """For each row a matrix (N, N), where [i, j] counts how often i beat j; a tie is half a win."""
    wins = [torch.zeros(len(row["texts"]), len(row["texts"])) for row in rows]
    for (r, (i, j)), verdicts in zip(comparisons, votes):
        wins[r][i, j] += sum(verdicts)
        wins[r][j, i] += len(verdicts) - sum(verdicts)
    return wins


def zermelo(wins, pseudo_count, rounds=100_000):
    """Bradley-Terry log-strengths (N,), mean 0, of each matrix (N, N) in `wins`.

    wins[k][i, j] counts how often i beat j. pseudo_count > 0 is added to every entry; without it
    the strengths of unanimous votes diverge. Of two candidates, of which one won k of h votes, the
    difference has the closed form log((k + c) / (h - k + c)). A candidate without any vote has nan.
    """
    log_strengths = [None] * len(wins)
    for size in {len(matrix) for matrix in wins}:
        same_size = [k for k, matrix in enumerate(wins) if len(matrix) == size]
        # who meets nobody has log-strength 0
        if size < 2:
            for k in same_size:
                log_strengths[k] = torch.zeros(size)
            continue

        # all matrices of one size together
        counts = torch.stack([wins[k].double() for k in same_size])  # (B, N, N)
        fitted = iterate_zermelo(counts + pseudo_count, rounds)  # (B, N)
        for k, values in zip(same_size, fitted):
            has_votes = (wins[k] + wins[k].T).sum(1) > 0  # (N,)
            log_strengths[k] = torch.where(has_votes, values.float(), math.nan)
    return log_strengths


def iterate_zermelo(wins, rounds):
    """Zermelo's iteration (iREPO, 2405.15230) on matrices (B, N, N) at once: log-strengths (B, N).

    At its fixed point each candidate has as many wins as its strength lets expect.
    """
    size = wins.shape[1]
    wins = wins * (1 - torch.eye(size))  # nobody meets itself
    won = wins.sum(2)  # (B, N)
    met = wins + wins.mT  # (B, N, N)
    logs = torch.zeros(len(wins), size, dtype=torch.double)
    for _ in range(rounds):
        strengths = logs.exp()  # (B, N)
        per_strength = met / (strengths[:, :, None] + strengths[:, None])  # (B, N, N)
        new = (won / per_strength.sum(2)).log()  # (B, N)
        new = new - new.mean(1, keepdim=True)  # only differences are determined

        # logs of the strengths are compared: a small strength has to settle as a large one does
        change = (new - logs).abs().max()
        logs = new
        if change < 1e-10:
            break
    return logs
