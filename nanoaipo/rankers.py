"""Who says which response is better: one function per ranker.

    rank = load_ranker("pairrm", "llm-blender/PairRM", settings, counts)
    for rewards, log_odds in rank(rows): ...

A row has `prompt` (messages), `texts` (its distinct responses, any number), `id`, and `answer`
where prompts carry one. For each row come log_odds (N, N), antisymmetric: [i, j] is that of i
beating j; and rewards (N,), higher is better, nan where a judge gave none; or None in their place,
where the log-odds say all there is. Both are float32. A ranker takes the settings that it needs by
their names, with defaults for those that eval.py lacks, and adds what went wrong to `counts`. A new
ranker is one function and one entry in RANKERS.
"""

import importlib
import itertools
import os
import re

import torch
from tqdm import tqdm

from nanoaipo.chat import control_pattern, render, template_arguments
from nanoaipo.clock import lap
from nanoaipo.engines import exact_attention
from nanoaipo.errors import InputError, reason_of
from nanoaipo.grading import is_right
from nanoaipo.judges import from_rewards, judge, prompt_text, zermelo
from nanoaipo.packing import batches_by_length
from nanoaipo.processes import pick_device
from nanoaipo.questions import kept_replies
from nanoaipo.served import served_fields, served_scores

lap("starting")  # imports are most of it


# ------------------------------------------------------------------------------------------- PairRM


def pairrm(model, counts, *, rank_batch_tokens, **_):
    """PairRM, our own implementation (pairrm.py)."""
    from nanoaipo.pairrm import compare, load_pairrm

    lap("starting")
    network, tokenizer = load_pairrm(model, pick_device())

    def rank(rows):
        prompts = [prompt_text(row["prompt"]) for row in rows]
        texts = [row["texts"] for row in rows]
        matrices = compare(network, tokenizer, prompts, texts, rank_batch_tokens, counts)
        return [(None, log_odds) for log_odds in matrices]

    return rank


def import_llm_blender():
    """The package (llm-blender 0.0.2), with two names put back that transformers 5 lacks."""
    import transformers.utils.hub
    from transformers import PreTrainedTokenizerBase

    transformers.utils.hub.TRANSFORMERS_CACHE = os.path.expanduser("~/.cache/huggingface/hub")
    PreTrainedTokenizerBase.batch_encode_plus = PreTrainedTokenizerBase.__call__
    try:
        return importlib.import_module("llm_blender")
    except ImportError as e:
        raise InputError(
            f"--ranker=llm-blender: {e}; pip install llm-blender==0.0.2, "
            "or take --ranker=pairrm: same weights, same scores"
        ) from e


def llm_blender(model, counts, **_):
    """PairRM by its authors' package, whose truncation depends on the batch."""
    blender = import_llm_blender().Blender()
    blender.loadranker(model, device=pick_device().type)

    def rank(rows):
        comparisons = []  # (index of the row, i, j)
        for r, row in enumerate(rows):
            for i, j in itertools.combinations(range(len(row["texts"])), 2):
                comparisons.append((r, i, j))

        logits = []
        if comparisons:
            logits = blender.compare(
                [prompt_text(rows[r]["prompt"]) for r, _, _ in comparisons],
                [rows[r]["texts"][i] for r, i, _ in comparisons],
                [rows[r]["texts"][j] for r, _, j in comparisons],
                return_logits=True,
                mode="[A,B]+[B,A]",
            ).tolist()

        # it returns logit_ij - logit_ji, which is twice their mean
        matrices = [torch.zeros(len(row["texts"]), len(row["texts"])) for row in rows]  # (N, N)
        for (r, i, j), logit in zip(comparisons, logits):
            matrices[r][i, j] = logit / 2
            matrices[r][j, i] = -logit / 2
        return [(None, log_odds) for log_odds in matrices]

    return rank


# ----------------------------------------------------------------------------------- a reward model


def load_reward_model(model, device):
    """A model with one label and trained weights for it, in bfloat16 on a GPU."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            model,
            dtype=dtype,
            attn_implementation=exact_attention(AutoConfig.from_pretrained(model)),
            use_safetensors=True,  # other formats can run code
            output_loading_info=True,
        )
    except (OSError, ValueError) as e:
        raise InputError(
            f"--ranker_model={model}: no reward model that transformers knows ({reason_of(e)})"
        ) from e
    n_labels = network.config.num_labels
    if n_labels != 1:
        raise InputError(
            f"--ranker_model={model}: a reward model has one label, this one has {n_labels}"
        )

    # a head that was never trained would rank too
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[:3]
        raise InputError(
            f"--ranker_model={model}: its weights lack {missing}; no reward model was trained here"
        )
    return network.to(device).eval()


def load_reward_tokenizer(model):
    """A tokenizer with a chat template, or one that writes two texts as a pair (DeBERTa)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, mistral_format=False)
    except (OSError, ValueError) as e:
        raise InputError(
            f"--ranker_model={model}: no model folder and no hub model that can be loaded "
            f"({reason_of(e)})"
        ) from e
    if not tokenizer.chat_template and tokenizer.sep_token_id not in tokenizer("a", "b").input_ids:
        raise InputError(
            f"--ranker_model={model}: its tokenizer has no chat template, "
            "and no separator that would make a pair of prompt and response"
        )
    return tokenizer


def pair_inputs(tokenizer, control, prompt, text):
    """Inputs of the model for a prompt and a response, as the tokenizer writes a pair of texts.

    A text that spells a control token gets a space behind that token's first character.
    """

    def with_space(match):
        return match[0][0] + " " + match[0][1:]

    return dict(tokenizer(control.sub(with_space, prompt), control.sub(with_space, text)))


def rope_depends_on_batch(config):
    """Whether the longest row of a batch decides its rotary tables (LongRoPE, dynamic NTK)."""
    rope = str(getattr(config.get_text_config(), "rope_parameters", None))  # or one by layer type
    return "'longrope'" in rope or "'dynamic'" in rope


def unused_id(sequences):
    """The smallest token id in none of the sequences."""
    used = set(itertools.chain.from_iterable(sequences))
    i = 0
    while i in used:
        i += 1
    return i


@torch.no_grad()
def rewards_of(network, sequences):
    """Rewards (B,) of B sequences, each {"input_ids": [...], "attention_mask": [...], ...}."""
    # The model reads the last token that is not padding. If its config names none, take an id that
    # no sequence has, in the part of the config where the model looks it up.
    text_config = network.config.get_text_config()
    pad_id = getattr(text_config, "pad_token_id", None)
    names_none = pad_id is None or pad_id < 0  # the first LLaMA says -1
    if names_none:
        pad_id = unused_id(sequence["input_ids"] for sequence in sequences)
        text_config.pad_token_id = pad_id

    inputs = {}
    for name in sequences[0]:
        rows = [torch.tensor(sequence[name]) for sequence in sequences]
        padding = pad_id if name == "input_ids" else 0
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)  # (B, L)
        inputs[name] = x.to(network.device)
    logits = network(inputs.pop("input_ids"), **inputs).logits  # (B, 1)

    if names_none:
        text_config.pad_token_id = None  # the next batch may hold this id
    return logits[:, 0].float().tolist()


def reward(
    model, counts, *, rank_batch_tokens, reward_temperature=1.0, template_kwargs="", date="", **_
):
    """A scalar reward model: one label for the whole conversation, in the model's own template.

    Without a template prompt and response are the tokenizer's pair of texts.
    """
    tokenizer = load_reward_tokenizer(model)
    control = control_pattern(tokenizer)
    network = load_reward_model(model, pick_device())
    arguments = template_arguments(template_kwargs, date)
    if rope_depends_on_batch(network.config):
        rank_batch_tokens = 1  # a reward is the conversation's own: each is a batch

    def inputs_of(row, text):
        if not tokenizer.chat_template:
            return pair_inputs(tokenizer, control, prompt_text(row["prompt"]), text)
        messages = row["prompt"] + [{"role": "assistant", "content": text}]
        where = f"prompt '{row['id']}'"
        ids = render(tokenizer, messages, where, control, opens=False, arguments=arguments)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def rank(rows):
        sequences = []
        for row in rows:
            for text in row["texts"]:
                sequences.append(inputs_of(row, text))
        lengths = [len(sequence["input_ids"]) for sequence in sequences]

        # computed longest first, stored in the order of the texts
        rewards = [0.0] * len(sequences)
        with tqdm(total=len(sequences), desc="rank", unit="resp") as bar:
            for batch in batches_by_length(lengths, rank_batch_tokens):
                batch_rewards = rewards_of(network, [sequences[k] for k in batch])
                for k, value in zip(batch, batch_rewards):
                    rewards[k] = value
                bar.update(len(batch))

        # each row takes as many as it has texts
        labels = []
        start = 0
        for row in rows:
            end = start + len(row["texts"])
            labels.append(from_rewards(rewards[start:end], reward_temperature))
            start = end
        return labels

    return rank


# ------------------------------------------------------------------------------------ right answers


def answer(model, counts, *, reward_temperature=1.0, **_):
    """1 for a response that gives the prompt's `answer`, else 0 (Iterative RPO, 2404.19733).

    Of instructions it has to follow all. Their share as the score would prefer whoever follows two
    of three to whoever follows one, and what most responses do anyway would crowd out the rest.
    """

    def rank(rows):
        for row in rows:
            where = f"--ranker=answer: prompt '{row['id']}'"
            if row.get("answer") is None:
                raise InputError(f"{where} has no 'answer'")
            try:
                rewards = [float(is_right(text, row["answer"])) for text in row["texts"]]
            except (LookupError, TypeError, re.error) as e:
                reason = f"{type(e).__name__}: {e}"
                raise InputError(
                    f"{where}: its 'answer' is not as nanoaipo/grading.py has it ({reason})"
                ) from e
            yield from_rewards(rewards, reward_temperature)

    return rank


# --------------------------------------------------------------------------------------- annotators


def parse_annotators(spec):
    """[(ranker, model)] of "pairrm:MODEL reward:MODEL ..."."""
    names = [name for name in RANKERS if name != "annotators"]
    annotators = []
    for part in spec.split():
        name, _, path = part.partition(":")
        annotators.append((name, path))
    if not annotators or not all(name in names and path for name, path in annotators):
        raise InputError(
            f'--ranker_model={spec}: names annotators as "pairrm:MODEL reward:MODEL ...", '
            f"with rankers {', '.join(names)}"
        )
    return annotators


def annotators(model, counts, *, annotator_votes=9, pseudo_count=0.5, **settings):
    """Several rankers vote on every pair; `model` names them: "pairrm:MODEL reward:MODEL ...".

    annotator_votes = 0: each casts one vote for the response it puts first. k: each casts k votes,
    split by its probability. Rewards are the Bradley-Terry log-strengths of the votes, log-odds
    their differences: iREPO's label z (2405.15230).
    """
    voters = parse_annotators(model)
    settings["pseudo_count"] = pseudo_count  # a judge among them wants it too

    def rank(rows):
        wins = [torch.zeros(len(row["texts"]), len(row["texts"])) for row in rows]  # (N, N)

        # one annotator after the other, so that one model at a time is in memory
        for name, path in voters:
            labels = load_ranker(name, path, settings, counts)(rows)
            for won, (_, log_odds) in zip(wins, labels):
                if annotator_votes:
                    votes = annotator_votes * log_odds.sigmoid()  # (N, N)
                else:
                    votes = (log_odds.sign() + 1) / 2  # (N, N), equals share the vote
                won += torch.where(log_odds.isnan(), 0, votes)
            lap("computing")

        strengths = zermelo(wins, pseudo_count)  # (N,) each
        return [from_rewards(w.tolist(), 1.0) for w in strengths]

    return rank


RANKERS = {
    "pairrm": pairrm,
    "llm-blender": llm_blender,
    "reward": reward,
    "judge": judge,
    "answer": answer,
    "annotators": annotators,
}


def load_ranker(ranker, model, settings, counts):
    """The function `rank` of a ranker, as at the top of this file.

    model: folder or hub name, or the name of a model at judge_url. Raises InputError for a ranker
    that is not in the table, and for a model that the ranker cannot use.
    """
    if ranker not in RANKERS:
        raise InputError(f"--ranker={ranker}: there are {', '.join(RANKERS)}")
    rank = RANKERS[ranker](model, counts, **settings)
    lap("loading")
    return rank


def with_length_bias(rank, length_bias, reward_temperature):
    """The function `rank` of a judge that likes length: points more for each 100 words of a text.

    Rewards rise by them, and the log-odds by their difference / reward_temperature. It is for
    experiments: how much of such a bias does an objective amplify?
    """

    def rank_with_bias(rows):
        for row, (rewards, log_odds) in zip(rows, rank(rows)):
            n_words = torch.tensor([len(text.split()) for text in row["texts"]])  # (N,)
            points = length_bias * n_words / 100
            if rewards is not None:
                rewards = rewards + points
            yield rewards, log_odds + (points[:, None] - points) / reward_temperature

    return rank_with_bias


def who_answered(ranker, model, settings):
    """{judge asked for: its served_model and so on, as served_scores has them}, of an endpoint.

    Who answered stands in the replies kept beside settings["out"]. Empty for a ranker that asks no
    endpoint. Raises InputError where two models have answered to one name.
    """
    asked = []
    if ranker == "judge":
        asked = [model]
    if ranker == "annotators":
        asked = [path for name, path in parse_annotators(model) if name == "judge"]
    if not settings["judge_url"]:
        return {}

    served = {}
    for name in asked:
        replies = kept_replies(settings["out"], name)
        served[name] = served_scores([served_fields(reply) for reply in replies], settings["out"])
    return served
