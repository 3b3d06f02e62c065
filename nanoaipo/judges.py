"""A language model as judge: its replies are points, or votes with Bradley-Terry strengths."""

import itertools
import json
import math
import os
import re

import torch

from nanoaipo.chat import template_arguments
from nanoaipo.endpoints import endpoint
from nanoaipo.errors import InputError
from nanoaipo.logprobs import expected_digit, first_token
from nanoaipo.questions import ask, local_model
from nanoaipo.stages import fingerprint
from nanoaipo.verdicts import read_score, read_verdict, reader_of


def prompt_text(messages):
    """A prompt as PairRM and judges read it: one message bare, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role'].upper()}: {m['content']}" for m in messages)


def from_rewards(rewards, temperature):
    """Rewards (N,) and the log-odds (N, N) they imply: [i, j] = (r_i - r_j) / temperature."""
    rewards = torch.tensor(rewards, dtype=torch.float32)  # (N,)
    log_odds = (rewards[:, None] - rewards) / temperature  # (N, N)
    return rewards, log_odds


# ---------------------------------------------------------------------------------------- the judge

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
    judge_url,
    judge_mode="score",
    judge_prompt="",
    verdict="",
    judge_votes=3,
    judge_temperature=0.7,
    judge_tokens=512,
    reward_temperature=1.0,
    pseudo_count=0.5,
    **settings,
):
    """A ranker that asks a language model, here by an engine or at an OpenAI-compatible endpoint.

    Each question gets judge_votes replies. Mode "score" asks for points for each response (the
    additive rubric of Self-Rewarding, 2401.10020); a response's reward is the mean over its votes.
    Mode "expected" asks once for a digit, whose mean by its log-probs is the response's reward.
    Mode "pairwise" shows two responses at a time, in both orders, and fits Bradley-Terry strengths
    to the votes, as for annotators. What is asked stands in prompts/judge_MODE.txt or in the file
    judge_prompt, with places for columns of the prompt's record. verdict is a regular expression
    that finds the verdict. settings: as way_to_ask takes them.
    """
    check_mode(judge_mode, judge_url, verdict)
    read, fields = JUDGE_MODES[judge_mode]
    if verdict:
        read = reader_of(verdict, judge_mode)
    template = load_template(judge_mode, judge_prompt, fields)

    by_log_probs = judge_mode == "expected"
    sampling = {"temperature": judge_temperature, "max_tokens": judge_tokens}
    if by_log_probs:
        judge_votes = 1  # the log-probs of one token hold all votes
        sampling = {"temperature": 1.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    answer, identity = way_to_ask(model, judge_url, **settings)

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
                    **sampling,
                    "about": [rows[r]["id"], *shown, vote],
                }
                questions.append(identity | question)

        # an endpoint without log-probs shows at the first reply, before the others are paid for
        if by_log_probs:
            check_log_probs(ask(questions[:1], out, answer), model)

        # replies to votes
        replies = ask(questions, out, answer)
        if by_log_probs:
            readings = [expected_digit(reply) for reply in replies]
        else:
            readings = [read(reply["reply"]) for reply in replies]
        count_unreadable(replies, readings, counts, judge_tokens)
        votes = readable_votes(readings, judge_votes)

        # votes to rewards and log-odds of each row
        if judge_mode == "pairwise":
            strengths = zermelo(count_wins(rows, comparisons, votes), pseudo_count)
            return [from_rewards(row_strengths.tolist(), 1.0) for row_strengths in strengths]
        rewards = mean_scores(rows, comparisons, votes)
        return [from_rewards(row_rewards, reward_temperature) for row_rewards in rewards]

    return rank


def check_mode(judge_mode, judge_url, verdict):
    """Raise InputError for a mode that is none, or that wants other settings than these."""
    if judge_mode not in JUDGE_MODES:
        raise InputError(f"--judge_mode={judge_mode}: there are {', '.join(JUDGE_MODES)}")
    if judge_mode == "expected" and (verdict or not judge_url):
        raise InputError(
            "--judge_mode=expected: reads the log-probs of an endpoint: set --judge_url, and "
            "no --verdict"
        )


def way_to_ask(
    model,
    judge_url,
    *,
    judge_concurrency=16,
    engine,
    dtype,
    seed,
    tensor_parallel,
    gpu_memory,
    generate_rows,
    template_kwargs="",
    date="",
    **_,
):
    """(A way to answer questions as ask wants it, what tells this judge's questions from others').

    Behind an endpoint a judge is known by its model's name, wherever it is served; here by its
    weights too, by the seed, and by what goes to its template.
    """
    if judge_url:
        return endpoint(judge_url, judge_concurrency), {"model": model}

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
    return answer, identity


# --------------------------------------------------------------------------------- what it is asked

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# {rubric} in a template, filled from the prompt's record; \boxed{answer} is none
PLACE = re.compile(r"(?<!\w)\{([a-z_]\w*)\}")


def all_comparisons(rows, n_shown):
    """(row's index, indices of the n_shown responses that are shown), of two in both orders."""
    comparisons = []
    for r, row in enumerate(rows):
        for shown in itertools.permutations(range(len(row["texts"])), n_shown):
            comparisons.append((r, shown))
    return comparisons


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


# ----------------------------------------------------------------------------- what its replies say


def check_log_probs(replies, model):
    """Raise InputError where a reply that is no error has no log-probs."""
    for reply in replies:
        if "error" not in reply and first_token(reply) is None:
            raise InputError(
                f"--judge_mode=expected: '{model}' gives no log-probs with its replies; take "
                "another model or --judge_mode=score"
            )


def count_unreadable(replies, readings, counts, judge_tokens):
    """Count the replies that could not be read, and print the first where none could.

    Whether that is an error the caller decides: other processes may have readable replies.
    """
    unreadable = readings.count(None)
    counts["replies"] += len(replies)
    counts["unreadable_replies"] += unreadable
    if not replies or unreadable < len(replies):
        return

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


# ---------------------------------------------------------------------------------------- strengths


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
