"""Who says which response is better: one function per ranker.

    rank = load_ranker("pairrm", "llm-blender/PairRM", settings, counts)
    for scores, odds in rank(rows): ...

A row has `prompt` (messages), `texts` (its distinct responses, any number), `id`, and `answer` where prompts carry one. For each
row come odds (N, N), antisymmetric: [i, j] is the log-odds that i beats j; and scores (N,), higher is better, nan where a judge
gave none; or None in their place, where the odds say all there is. Both float32. A ranker takes the settings that its
signature names, and adds what went wrong to `counts`.
"""
import importlib
import itertools
import os
import re
import sys

import torch
from tqdm import tqdm

from nanoaipo.chat import control_pattern, load_tokenizer, render
from nanoaipo.grading import is_right
from nanoaipo.judges import from_rewards, judge, prompt_text, zermelo
from nanoaipo.packing import batches_by_length
from nanoaipo.processes import pick_device


def pairrm(model, counts, *, rank_batch_tokens, **_):
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


def llm_blender(model, counts, **_):
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


def reward(model, counts, *, rank_batch_tokens, reward_temperature=1.0, **_):
    """A scalar reward model: AutoModelForSequenceClassification with one label, over the conversation in its own template."""
    from transformers import AutoModelForSequenceClassification
    device = pick_device()
    tokenizer, _ = load_tokenizer(model, "ranker_model")
    control = control_pattern(tokenizer)
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
            for batch in batches_by_length([len(i) for i in ids], rank_batch_tokens):
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


def answer(model, counts, *, reward_temperature=1.0, **_):
    """Exact match with the prompt's `answer` (data.py): 1 or 0, as Iterative RPO has it (2404.19733)."""
    def rank(rows):
        for row in rows:
            row.get("answer") is not None or sys.exit(f"--ranker=answer: prompt '{row['id']}' has no 'answer'")
            try:
                yield from_rewards([float(is_right(text, row["answer"])) for text in row["texts"]], reward_temperature)
            except (LookupError, TypeError, re.error) as e:
                sys.exit(f"--ranker=answer: prompt '{row['id']}': its 'answer' is not as data.py has it ({type(e).__name__}: {e})")

    return rank


def annotators(model, counts, *, annotator_votes=9, pseudo_count=0.5, **settings):
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
    return RANKERS[ranker](model, counts, **settings)
