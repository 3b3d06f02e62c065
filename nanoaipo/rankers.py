"""Who says which response is better: one function per ranker.

    rank = load_ranker("pairrm", "llm-blender/PairRM", settings, counts)
    for scores, odds in rank(rows): ...

A row has `prompt` (messages), `texts` (its distinct responses, any number), `id`, and `answer` where prompts carry one. For each
row come odds (N, N), antisymmetric: [i, j] is the log-odds that i beats j; and scores (N,), higher is better, nan where a judge
gave none; or None in their place, where the odds say all there is. Both float32. A ranker takes the settings that its
signature names, and adds what went wrong to `counts`.
"""
import importlib
import inspect
import itertools
import math
import os
import re
import sys

import torch
from tqdm import tqdm

from nanoaipo.data import by_length, control_text, fingerprint, is_right, load_tokenizer, pick_device, render
from nanoaipo.engines import ask, endpoint, local_model


def prompt_text(messages):
    """What PairRM and a judge read of a prompt: the bare instruction, or every turn of a longer conversation with its role."""
    return messages[0]["content"] if len(messages) == 1 else "\n".join(f"{m['role'].upper()}: {m['content']}" for m in messages)


def from_rewards(rewards, temperature):
    """Bradley-Terry: log-odds = difference of rewards / temperature."""
    rewards = torch.tensor(rewards, dtype=torch.float32)
    return rewards, (rewards[:, None] - rewards) / temperature


def pairrm(model, counts, *, rank_batch_tokens):
    """PairRM, ours (pairrm.py)."""
    from nanoaipo.pairrm import compare, load_pairrm
    model, tokenizer = load_pairrm(model, pick_device())
    return lambda rows: [(None, odds) for odds in compare(model, tokenizer, [prompt_text(row["prompt"]) for row in rows],
                                                          [row["texts"] for row in rows], rank_batch_tokens, counts)]


def import_llm_blender():
    """The package (llm-blender 0.0.2), two names put back that transformers 5 no longer has."""
    import transformers.utils.hub
    from transformers import PreTrainedTokenizerBase
    transformers.utils.hub.TRANSFORMERS_CACHE = os.path.expanduser("~/.cache/huggingface/hub")
    PreTrainedTokenizerBase.batch_encode_plus = PreTrainedTokenizerBase.__call__
    try:
        return importlib.import_module("llm_blender")
    except ImportError as e:
        sys.exit(f"--ranker=llm-blender: {e}; pip install llm-blender==0.0.2, or take --ranker=pairrm: same weights, same scores")


def llm_blender(model, counts):
    """The package itself; its truncation depends on the batch."""
    blender = import_llm_blender().Blender()
    blender.loadranker(model, device=pick_device().type)

    def rank(rows):
        where = [(row, i, j) for row in rows for i, j in itertools.combinations(range(len(row["texts"])), 2)]
        logits = where and blender.compare(*([prompt_text(row["prompt"]) for row, *_ in where], [row["texts"][i] for row, i, _ in where],
                                             [row["texts"][j] for row, _, j in where]), return_logits=True, mode="[A,B]+[B,A]").tolist()
        odds = {id(row): torch.zeros(len(row["texts"]), len(row["texts"])) for row in rows}
        for (row, i, j), twice in zip(where, logits):                   # it returns logit_ij - logit_ji, twice their mean
            odds[id(row)][i, j], odds[id(row)][j, i] = twice / 2, -twice / 2
        return [(None, odds[id(row)]) for row in rows]

    return rank


def reward(model, counts, *, rank_batch_tokens, reward_temperature):
    """A scalar reward model: AutoModelForSequenceClassification with one label, over the conversation in its own template."""
    from transformers import AutoModelForSequenceClassification
    device = pick_device()
    tokenizer, _ = load_tokenizer(model, "ranker_model")
    control = control_text(tokenizer)
    try:
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, output_loading_info=True)
    except (OSError, ValueError) as e:
        sys.exit(f"--ranker_model={model}: no reward model that transformers knows ({str(e).strip().splitlines()[0]})")
    network.config.num_labels == 1 or sys.exit(f"--ranker_model={model}: a reward model has one label, this one has {network.config.num_labels}")
    loading["missing_keys"] and sys.exit(f"--ranker_model={model}: its weights lack {sorted(loading['missing_keys'])[:3]}; no reward model was trained here")
    network.to(device).eval()
    own = network.config.pad_token_id

    @torch.no_grad()
    def rank(rows):
        ids = [render(tokenizer, row["prompt"] + [{"role": "assistant", "content": text}], f"prompt '{row['id']}'", control, opens=False)
               for row in rows for text in row["texts"]]
        rewards = [0.0] * len(ids)
        with tqdm(total=len(ids), desc="rank", unit="resp") as bar:
            for batch in by_length([len(i) for i in ids], rank_batch_tokens):
                if own is None:                                         # it reads the last token that is no padding: take an id not in use
                    network.config.pad_token_id = next(i for i in itertools.count() if not any(i in ids[r] for r in batch))
                pad = network.config.pad_token_id
                x = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[r]) for r in batch], batch_first=True, padding_value=pad)
                mask = torch.arange(x.shape[1]) < torch.tensor([len(ids[r]) for r in batch])[:, None]                 # (B, L)
                for r, logit in zip(batch, network(x.to(device), attention_mask=mask.long().to(device)).logits[:, 0].float().tolist()):
                    rewards[r] = logit
                bar.update(len(batch))
        rewards = iter(rewards)
        return [from_rewards(list(itertools.islice(rewards, len(row["texts"]))), reward_temperature) for row in rows]

    return rank


def answer(model, counts, *, reward_temperature):
    """Exact match with the prompt's `answer` (data.py): 1 or 0, as Iterative RPO has it (2404.19733)."""
    def rank(rows):
        for row in rows:
            row.get("answer") is not None or sys.exit(f"--ranker=answer: prompt '{row['id']}' has no 'answer'")
            try:
                yield from_rewards([float(is_right(text, row["answer"])) for text in row["texts"]], reward_temperature)
            except (LookupError, TypeError, re.error) as e:
                sys.exit(f"--ranker=answer: prompt '{row['id']}': its 'answer' is not as data.py has it ({type(e).__name__}: {e})")

    return rank


# ---------------------------------------------------------------------------------------------- a language model as judge


def read_score(reply):
    """The last line "Score: N" of a reply, 0 to 5, or None."""
    found = re.findall(r"^\W*(?:final )?score\b\W*(?:is\W*)?(\d+(?:\.\d+)?)", reply, re.IGNORECASE | re.MULTILINE)
    return float(found[-1]) if found and float(found[-1]) <= 5 else None


def read_verdict(reply):
    """The last line "Better: A", "B" or "tie" as 1, 0 or a half, or None."""
    found = re.findall(r"^\W*better\b\W*(?:response\W*)?(a|b|tie)\W*$", reply, re.IGNORECASE | re.MULTILINE)
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[-1].lower()] if found else None


def judge(model, counts, *, out, engine, judge_url, judge_mode, judge_prompt, judge_votes, judge_temperature, judge_tokens, judge_concurrency,
          reward_temperature, pseudo_count, **settings):
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
    answers = endpoint(judge_url, judge_concurrency) if judge_url else local_model(engine, model, settings)
    who = {"model": model} if judge_url else {"model": model, "weights": fingerprint(model), "seed": settings["seed"]}

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


# ---------------------------------------------------------------------------------------------- several annotators


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


def annotators(model, counts, *, annotator_votes, pseudo_count, **settings):
    """Several rankers vote on every pair; `model` names them: "pairrm:llm-blender/PairRM reward:Skywork/...".

    annotator_votes = 0: each casts one vote for the response it puts first. k: each casts k votes, split by its probability.
    Scores are the Bradley-Terry log-strengths of the votes, odds their differences: iREPO's label z.
    """
    voters = [spec.partition(":") for spec in model.split()]
    voters and all(name in RANKERS and name != "annotators" and path for name, _, path in voters) or sys.exit(
        f'--ranker_model={model}: names annotators as "pairrm:MODEL reward:MODEL ...", with rankers {", ".join(k for k in RANKERS if k != "annotators")}')

    def rank(rows):
        wins = [torch.zeros(len(row["texts"]), len(row["texts"])) for row in rows]
        for name, _, path in voters:
            for w, (_, odds) in zip(wins, load_ranker(name, path, settings | {"pseudo_count": pseudo_count}, counts)(rows)):
                votes = annotator_votes * odds.sigmoid() if annotator_votes else (odds.sign() + 1) / 2
                w += torch.where(odds.isnan(), 0, votes)
        return [from_rewards(w.tolist(), 1.0) for w in zermelo(wins, pseudo_count)]

    return rank


RANKERS = {"pairrm": pairrm, "llm-blender": llm_blender, "reward": reward, "judge": judge, "answer": answer,
           "annotators": annotators}


def load_ranker(ranker, model, settings, counts):
    """The ranker's function over rows, see above; model: folder or hub name, or the name of a model at judge_url."""
    ranker in RANKERS or sys.exit(f"--ranker={ranker}: there are {', '.join(RANKERS)}")
    names = inspect.getfullargspec(RANKERS[ranker])
    wanted = settings if names.varkw else {k: settings[k] for k in names.kwonlyargs}
    return RANKERS[ranker](model, counts, **wanted)
