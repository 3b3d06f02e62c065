"""A language model as judge, and Bradley-Terry strengths of its votes.
"""
import itertools
import math
import os
import re
import sys

import torch

from nanoaipo.questions import ask, endpoint, local_model
from nanoaipo.stages import fingerprint


def prompt_text(messages):
    """What PairRM and a judge read of a prompt: the bare instruction, or every turn of a longer conversation with its role."""
    return messages[0]["content"] if len(messages) == 1 else "\n".join(f"{m['role'].upper()}: {m['content']}" for m in messages)


def from_rewards(rewards, temperature):
    """Bradley-Terry: log-odds = difference of rewards / temperature."""
    rewards = torch.tensor(rewards, dtype=torch.float32)
    return rewards, (rewards[:, None] - rewards) / temperature


def read_score(reply):
    """The last line "Score: N" of a reply, 0 to 5, or None."""
    found = re.findall(r"^\W*(?:final )?score\b\W*(?:is\W*)?(\d+(?:\.\d+)?)", reply, re.IGNORECASE | re.MULTILINE)
    return float(found[-1]) if found and float(found[-1]) <= 5 else None


def read_verdict(reply):
    """The last line "Better: A", "B" or "tie" as 1, 0 or a half, or None."""
    found = re.findall(r"^\W*better\b\W*(?:response\W*)?(a|b|tie)\W*$", reply, re.IGNORECASE | re.MULTILINE)
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[-1].lower()] if found else None


def judge(model, counts, *, out, engine, judge_url, judge_mode="score", judge_prompt="", judge_votes=3, judge_temperature=0.7, judge_tokens=512,
          judge_concurrency=16, reward_temperature=1.0, pseudo_count=0.5, dtype, seed, tensor_parallel, gpu_memory, generate_rows, **_):
    """A language model as judge: here (by an engine) or at an OpenAI-compatible endpoint; judge_votes replies to each question.

    judge_mode "score": points for each response (additive rubric, as in Self-Rewarding, 2401.10020), their mean over the votes.
    "pairwise": two responses at a time, in both orders; Bradley-Terry strengths of the votes, as for annotators. What is asked
    stands in prompts/judge_MODE.txt or in the file judge_prompt. An endpoint's judge is its model's name, wherever it is served.
    """
    modes = {"score": (read_score, ("{prompt}", "{response}")), "pairwise": (read_verdict, ("{prompt}", "{response_a}", "{response_b}"))}
    judge_mode in modes or sys.exit(f"--judge_mode={judge_mode}: there are {', '.join(modes)}")
    read, places = modes[judge_mode]
    path = judge_prompt or os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "prompts", f"judge_{judge_mode}.txt")
    os.path.isfile(path) or sys.exit(f"--judge_prompt={path}: no such file")
    with open(path, encoding="utf-8") as f:
        template = f.read().strip()
    for place in places:
        place in template or sys.exit(f"{path}: lacks {place}, where the text to judge goes")
    answers = endpoint(judge_url, judge_concurrency) if judge_url else local_model(
        model, engine=engine, dtype=dtype, seed=seed, tensor_parallel=tensor_parallel, gpu_memory=gpu_memory, generate_rows=generate_rows)
    who = {"model": model} if judge_url else {"model": model, "weights": fingerprint(model), "seed": seed}

    def rank(rows):
        sizes = [len(row["texts"]) for row in rows]
        shown = [(r, c) for r, size in enumerate(sizes) for c in itertools.permutations(range(size), len(places) - 1)]        # one response, or two in order
        questions = []
        for r, candidates in shown:
            filled = dict(zip(places, (prompt_text(rows[r]["prompt"]), *(rows[r]["texts"][i] for i in candidates))))
            text = re.sub("|".join(map(re.escape, places)), lambda place: filled[place[0]], template)          # texts are not searched again
            questions += [who | {"messages": [{"role": "user", "content": text}], "temperature": judge_temperature, "max_tokens": judge_tokens,
                                 "about": [rows[r]["id"], *candidates, vote]} for vote in range(judge_votes)]
        votes = [read(reply["reply"]) for reply in ask(questions, out, answers)]
        counts["replies"] += len(votes)
        counts["unreadable_replies"] += votes.count(None)
        told = [[v for v in votes[k:k + judge_votes] if v is not None] for k in range(0, len(votes), judge_votes)]
        if judge_mode == "score":
            means = iter([sum(t) / len(t) if t else math.nan for t in told])
            return [from_rewards(list(itertools.islice(means, size)), reward_temperature) for size in sizes]
        wins = [torch.zeros(size, size) for size in sizes]
        for (r, (i, j)), t in zip(shown, told):
            wins[r][i, j] += sum(t)
            wins[r][j, i] += len(t) - sum(t)
        return [from_rewards(w.tolist(), 1.0) for w in zermelo(wins, pseudo_count)]

    return rank


def zermelo(wins, pseudo_count, rounds=100_000):
    """Bradley-Terry log-strengths (N,) of each matrix of votes (N, N), where [i, j] counts how often i beat j; mean 0.

    Zermelo's iteration, all strengths of a matrix at once (iREPO, 2405.15230); pseudo_count > 0 is added to every entry, without it
    the strengths of unanimous votes diverge. Two candidates have the closed form log((k + c) / (h - k + c)). nan: no vote at all.
    """
    strengths = [None] * len(wins)
    for size in {len(w) for w in wins}:
        places = [k for k, w in enumerate(wins) if len(w) == size]
        votes = (torch.stack([wins[k].double() for k in places]) + pseudo_count) * (1 - torch.eye(size))                       # (B, N, N)
        logs = torch.zeros(len(places), size, dtype=torch.double)
        for _ in range(rounds if size > 1 else 0):
            w = logs.exp()
            new = (votes.sum(2) / ((votes + votes.mT) / (w[:, :, None] + w[:, None])).sum(2)).log()
            new -= new.mean(1, keepdim=True)
            done, logs = (new - logs).abs().max() < 1e-10, new
            if done:
                break
        for k, log in zip(places, logs):
            strengths[k] = torch.where((wins[k] + wins[k].T).sum(1) > 0, log.float(), math.nan) if size > 1 else log.float()
    return strengths
