"""Rank candidate responses and make preference pairs of them: candidates -> pairs.

    python rank.py config/aipo_nemo.py --candidates=candidates.jsonl --out=pairs.jsonl
    torchrun --nproc-per-node=8 rank.py ...    8 GPUs, each its share of the prompts, 8 shards

Empty, unfinished and too long responses are left out. The others are ranked, equal texts once, and
those whose score from a judge is not readable are left out too. The pair rule chooses among the
distinct texts. A prompt gives no pair when fewer than two responses are left, when all of them are
the same text, or when their scores tie; a pair is dropped when its scores are closer than min_gap,
its lengths further apart than max_length_gap, or its chosen response holds a URL. The manifest
counts each case. Candidates from elsewhere may be bare texts: {"prompt": ..., "responses": [...]}.

    python rank.py config/aipo_nemo.py --meta=preferences.jsonl --out=agreement.json

judges the judge: how often this ranker is right where it is known which response is.
"""

import collections
import math
import random
import re
import statistics
import time

from configurator import configure, run_script
from nanoaipo.agreement import (
    accuracy_text,
    agreement,
    print_agreement,
    read_preferences,
)
from nanoaipo.chat import template_arguments
from nanoaipo.errors import InputError
from nanoaipo.files import read_records, shard_path
from nanoaipo.messages import Dropped, UnusableRow
from nanoaipo.processes import RANK, WORLD_SIZE, print0
from nanoaipo.prompts import read_candidates, responses_of_pair
from nanoaipo.responses import answer_length
from nanoaipo.seeds import derive_seed
from nanoaipo.served import with_served
from nanoaipo.stages import open_output, open_stage, write_json_output
from nanoaipo.stats import wilson_interval
from nanoaipo.thoughts import split_thought, with_thought

# What imports torch takes seconds, so functions import it: before they run, a finished stage or bad
# input has ended the program

# fmt: off
# ---- settings ----
candidates = ""                         # candidates file, folder or glob
weaker = ""                             # a weaker model's candidates, which join and always lose
meta = ""                               # known preferences: measure the ranker, make no pairs
meta_repeats = 0                        # further runs of meta, for a judge whose replies vary
out = ""                                # pairs to write (JSONL); with meta, the numbers (JSON)
ranker = "pairrm"                       # pairrm, llm-blender, reward, judge, answer or annotators
# "policy" is the policy itself; annotators are written "pairrm:MODEL reward:MODEL ..."
ranker_model = "llm-blender/PairRM"     # folder or hub name, "policy", or the annotators
model = ""                              # the policy that wrote the candidates, if it is to judge
rank_batch_tokens = 4096                # tokens computed at once (pairrm, reward); a GPU takes more
pair_rule = "best_worst"                # or best_two_sigma, best_random, short_long, right_wrong
max_pairs = 10                          # pairs per prompt at most (right_wrong; Iterative RPO: 10)
tier = 0.2                              # share of the scores' range at top and bottom (short_long)
min_gap = 0.0                           # smallest difference of scores in a pair
max_length_gap = 0                      # largest difference of lengths in a pair; 0: any
other_pairs = ""                        # pairs that other policies wrote, mixed in (SimpleMix)
other_share = 0.5                       # their share of all pairs
drop_hardest = 0.0                      # share of prompts dropped, those of the lowest mean score
max_response_tokens = 2016              # longer ones are left out (AIPO: 2,016, of 2,048 generated)
drop_unfinished = True                  # leave out responses that were cut at the engine's limit
drop_url = True                         # no pair whose chosen response holds a URL (AIPO)
reward_temperature = 1.0                # z = difference of scores / this (reward, judge, answer)
length_bias = 0.0                       # points added for each 100 words: a judge that likes length
judge_url = ""                          # OpenAI-compatible (OPENAI_API_KEY); empty: an engine here
judge_mode = "score"                    # score: 0 to 5 points; expected: by log-probs; or pairwise
judge_prompt = ""                       # file with what the judge is asked; empty: ours in prompts/
verdict = ""                            # regular expression with one group; empty: known forms
judge_votes = 3                         # replies to every question (Self-Rewarding: 3)
judge_temperature = 0.7                 # of the judge's replies (ours)
judge_tokens = 512                      # longest reply of the judge
judge_concurrency = 16                  # requests under way at once, of each process
annotator_votes = 9                     # of each on two texts, split by its probability; 0: one
pseudo_count = 0.5                      # added to every count of votes before Bradley-Terry's fit
engine = "auto"                         # vllm, transformers, or auto: vllm where it is installed
dtype = "bfloat16"                      # of the computation; take float32 on CPUs
generate_rows = 512                     # responses sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
seed = 0                                # of the run
template_kwargs = ""                    # of the chat template, JSON: {"enable_thinking": false}
date = ""                               # day in the chat template, YYYY-MM-DD; empty: today's
config = configure(globals())

# what the manifest counts, in this order: prompts and pairs, then what was dropped and why
COUNTS = (
    "prompts", "pairs",
    "unfinished", "too_long", "empty",
    "fewer_than_two", "identical", "tied",
    "unjudged", "hardest",
    "gap", "length_gap", "url", "other_pairs",
)
# fmt: on
URL = re.compile(r"https?://|www\.")


# -------------------------------------------------------------------------------- who competes


def why_left_out(response, drop_unfinished, max_response_tokens):
    """The first reason why a response does not compete (a key of counts), or None."""
    is_empty = not response["text"].strip()
    is_cut = not response.get("finished", True)
    if is_empty and not (is_cut and "thought" in response):  # that one is unfinished
        return "empty"
    if is_cut and drop_unfinished:
        return "unfinished"
    if is_empty:
        return "empty"
    if len(response.get("ids", ())) > max_response_tokens:
        return "too_long"
    return None


def read_weaker(path):
    """{prompt id: row} of a weaker model's candidates, their responses marked as its."""
    rows = {}
    dropped = Dropped()
    for _, row in read_candidates(path, dropped):
        for response in row["responses"]:
            response["is_weaker"] = True
            response.pop("ids", None)  # another model's: pairs with its responses are texts
        rows[row["id"]] = row
    if dropped.counts:
        print0(f"{path}: {dropped}")
    return rows


def read_competitors(path, counts, *, drop_unfinished, max_response_tokens, weaker="", **_):
    """[(record without `responses`, the responses that compete)] of this process's prompts.

    weaker: candidates of a weaker model, whose responses join those of the same prompt id. Counts
    the other responses by their reason, and rows that cannot be used by theirs. Raises InputError
    where no process has a prompt, or one id is that of two prompts.
    """
    weaker_rows = {}
    if weaker:
        weaker_rows = read_weaker(weaker)
    competitors = []
    n_prompts = 0
    dropped = Dropped()
    for _, row in read_candidates(path, dropped):
        is_mine = n_prompts % WORLD_SIZE == RANK
        n_prompts += 1
        if not is_mine:
            continue

        # a weaker model's responses to the same prompt join in
        responses = row.pop("responses")
        other = weaker_rows.get(row["id"])
        if other and other["prompt"] != row["prompt"]:
            raise InputError(
                f"--weaker={weaker}: '{row['id']}' is the id of another prompt there; "
                "join the candidates of the same prompts, with ids of their own"
            )
        if other:
            responses += other["responses"]

        # some are left out
        competing = []
        for response in responses:
            reason = why_left_out(response, drop_unfinished, max_response_tokens)
            if reason:
                counts[reason] += 1
            else:
                competing.append(response)
        competitors.append((row, competing))

    if n_prompts == 0:
        reasons = f" ({dropped.reasons()})" if dropped.counts else ""
        raise InputError(f"{path}: no candidates in it{reasons}")
    if dropped.counts:
        print0(f"{path}: {dropped}")
    if RANK == 0:  # every process reads all rows; the first counts for all
        counts.update(dropped.counts)
    return competitors


def labels_by_model(competitors, reward_temperature):
    """Labels without a ranker: a weaker model's responses lose (delta learning, 2507.06187).

    What both models wrote is the stronger one's, whose responses come first.
    """
    from nanoaipo.judges import from_rewards

    labels = []
    for _, responses in competitors:
        rewards = []
        for k in first_of_each_text(responses):
            rewards.append(float("is_weaker" not in responses[k]))
        labels.append(from_rewards(rewards, reward_temperature))
    return labels


# -------------------------------------------------------------------------------- pair rules
#
# A rule is given the scores and the lengths of the distinct responses of a prompt, not all scores
# equal, and a generator of random numbers that is the prompt's own. It returns pairs (index of the
# chosen, index of the rejected). It names the settings that it wants; pairs_of passes all of them.


def best_worst(scores, lengths, rng, **_):
    """The best against the worst."""
    return [(scores.index(max(scores)), scores.index(min(scores)))]


def best_two_sigma(scores, lengths, rng, **_):
    """The best against the one nearest to the mean less two standard deviations (2502.16825).

    Of up to five responses that is the worst.
    """
    target = statistics.fmean(scores) - 2 * statistics.pstdev(scores)
    best = scores.index(max(scores))
    worse = [k for k, score in enumerate(scores) if score < scores[best]]
    nearest = min(worse, key=lambda k: abs(scores[k] - target))
    return [(best, nearest)]


def best_random(scores, lengths, rng, **_):
    """The best against any that is worse (SPPO's and others' ablation)."""
    best = scores.index(max(scores))
    worse = [k for k, score in enumerate(scores) if score < scores[best]]
    return [(best, rng.choice(worse))]


def short_long(scores, lengths, rng, *, tier, **_):
    """The shortest of the top tier against the longest of the bottom tier (2407.19594)."""
    reach = tier * (max(scores) - min(scores))
    top = [k for k, score in enumerate(scores) if score >= max(scores) - reach]
    bottom = [k for k, score in enumerate(scores) if score <= min(scores) + reach]
    shortest = min(top, key=lambda k: lengths[k])
    longest = max(bottom, key=lambda k: lengths[k])
    return [(shortest, longest)]


def right_wrong(scores, lengths, rng, *, max_pairs, **_):
    """Those of the highest score against those of the lowest, both in turn (2404.19733)."""
    right = [k for k, score in enumerate(scores) if score == max(scores)]
    wrong = [k for k, score in enumerate(scores) if score == min(scores)]

    # after `cycle` pairs both sides begin anew: a shift by one, and no pair comes twice
    cycle = math.lcm(len(right), len(wrong))
    n_pairs = min(max_pairs, len(right) * len(wrong))
    pairs = []
    for k in range(n_pairs):
        w = right[k % len(right)]
        l = wrong[(k + k // cycle) % len(wrong)]
        pairs.append((w, l))
    return pairs


PAIR_RULES = {
    "best_worst": best_worst,
    "best_two_sigma": best_two_sigma,
    "best_random": best_random,
    "short_long": short_long,
    "right_wrong": right_wrong,
}


# -------------------------------------------------------------------------------- pairs of a prompt


def first_of_each_text(responses):
    """For each distinct text the index of the first response that has it, in order."""
    first = {}
    for k, response in enumerate(responses):
        first.setdefault(response["text"], k)
    return list(first.values())


def distinct_texts(responses):
    """The texts of the responses, each once, in order of appearance."""
    return [responses[k]["text"] for k in first_of_each_text(responses)]


def score_responses(responses, rewards, log_odds):
    """Scores (N,) and log-odds (N, N) of all responses, from those of their M distinct texts.

    Both are float64. A text counts as often as it was sampled.
    """
    texts = distinct_texts(responses)
    text_index = [texts.index(response["text"]) for response in responses]  # (N,), below M
    log_odds = log_odds.double()[text_index][:, text_index]  # (N, N)
    if rewards is None:
        scores = 2 * log_odds.mean(1)  # (N,), llm-blender's: the mean of logit_ij - logit_ji
    else:
        scores = rewards.double()[text_index]  # (N,)
    return scores, log_odds


def why_no_pairs(n_responses, scores):
    """Why a prompt gives no pair (a key of counts), or None; scores: of its distinct texts."""
    if n_responses < 2:
        return "fewer_than_two"
    if len(scores) < 2:
        return "identical"
    if max(scores) - min(scores) < 1e-6:
        return "tied"
    return None


def hardest_prompts(competitors, labels, share):
    """Indices of this share of the prompts: those of the lowest mean score (2510.05534).

    A prompt without a score is none of them, nor of those that the share is taken of.
    """
    by_mean = []
    for k, (_, responses) in enumerate(competitors):
        scores, _ = score_responses(responses, *labels[k])
        mean = scores.nanmean().item()
        if not math.isnan(mean):
            by_mean.append((mean, k))
    by_mean.sort()
    n_hardest = round(share * len(by_mean))
    return {k for _, k in by_mean[:n_hardest]}


def pair_record(row, chosen, rejected, has_ids):
    """The fields of the prompt and of two of its responses: ids of all three, or of none.

    Ids hold the thought too; the messages are answers, behind their thoughts where no ids are.
    With ids comes the log-prob that the engine sampled them with, which train.py checks.
    """
    pair = dict(row)
    if not has_ids:
        pair.pop("prompt_ids", None)
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        # a pair that is ranked again may turn around: what its sides had is not theirs any more
        pair.pop(side + "_logp", None)
        pair.pop(side + "_thought_tokens", None)

        content = response["text"]
        if has_ids:
            pair[side + "_ids"] = response["ids"]
            if response.get("logp") is not None:
                pair[side + "_logp"] = response["logp"]
            if "thought_tokens" in response:
                pair[side + "_thought_tokens"] = response["thought_tokens"]
        elif response.get("thought"):
            content = with_thought(response["thought"], content)
        pair[side] = [{"role": "assistant", "content": content}]
    return pair


def why_dropped(chosen, gap, length_gap, *, min_gap, drop_url, max_length_gap=0, **_):
    """Why a pair is dropped (a key of counts), or None; gap: of its scores."""
    if gap < min_gap:
        return "gap"
    if max_length_gap and abs(length_gap) > max_length_gap:
        return "length_gap"
    if drop_url and URL.search(chosen["text"]):
        return "url"
    return None


def pairs_of(row, responses, rewards, log_odds, counts, *, pair_rule, seed, **settings):
    """Yield the pairs of one prompt by the rule; count why it gives none, or why a pair is dropped.

    responses: the N that compete. rewards (M,) or None, and log_odds (M, M): the ranker's, of the M
    distinct texts in order of appearance. settings: what the rules and why_dropped ask for.
    """
    scores, log_odds = score_responses(responses, rewards, log_odds)

    # a judge may have given no readable score
    if scores.isnan().any():
        judged = (~scores.isnan()).nonzero()[:, 0]
        counts["unjudged"] += len(responses) - len(judged)
        responses = [responses[k] for k in judged]
        scores = scores[judged]
        log_odds = log_odds[judged][:, judged]

    # these count a text as often as it was sampled; SPPO's win rate against oneself is 1/2
    n_responses = len(responses)
    all_scores = scores.tolist()
    win_rates = log_odds.sigmoid().mean(1)  # (N,)
    has_ids = "prompt_ids" in row and all("ids" in response for response in responses)

    # from here on all lists are of the M distinct texts; the first response stands for each
    first = first_of_each_text(responses)
    responses = [responses[k] for k in first]
    scores = scores[first].tolist()
    log_odds = log_odds[first][:, first].tolist()  # (M, M)
    win_rates = win_rates[first].tolist()
    reason = why_no_pairs(n_responses, scores)
    if reason:
        counts[reason] += 1
        return

    # lengths are the answers', in tokens, in characters where only texts are known
    if has_ids:
        lengths = [answer_length(response) for response in responses]
    else:
        lengths = [len(response["text"]) for response in responses]

    rule = PAIR_RULES[pair_rule]
    rng = random.Random(derive_seed(seed, row["id"]))
    for w, l in rule(scores, lengths, rng, **settings):
        gap = scores[w] - scores[l]
        reason = why_dropped(responses[w], gap, lengths[w] - lengths[l], **settings)
        if reason:
            counts[reason] += 1
            continue
        yield pair_record(row, responses[w], responses[l], has_ids) | {
            "z": log_odds[w][l],
            "scores": all_scores,
            "q_w": win_rates[w],
            "q_l": win_rates[l],
            "g_w": scores[w],
            "g_l": scores[l],
        }


def mix_in(pairs, path, share, seed):
    """(The pairs, a share of them replaced by pairs of the file, in random order; how many).

    SimpleMix (2505.02363): ours make room for theirs. Raises InputError if the file has too few.
    """
    others = []
    dropped = Dropped()
    for n, (where, row) in enumerate(read_records(path)):
        if n % WORLD_SIZE != RANK:
            continue
        try:
            row["prompt"], (chosen, rejected) = responses_of_pair(where, row)
        except UnusableRow as e:
            dropped.add(e.reason, e)
            continue
        has_ids = "prompt_ids" in row and "ids" in chosen and "ids" in rejected
        others.append(pair_record(row, chosen, rejected, has_ids))

    if dropped.counts:
        print0(f"{path}: {dropped}")
    n_others = round(share * len(pairs))
    if len(others) < n_others:
        raise InputError(
            f"--other_pairs={path}: of {len(pairs)} pairs {n_others} have to be its own, and it "
            f"has {len(others)} that can be used; lower --other_share"
        )
    rng = random.Random(derive_seed(seed, "other_pairs", RANK))
    mixed = rng.sample(pairs, len(pairs) - n_others) + rng.sample(others, n_others)
    rng.shuffle(mixed)
    return mixed, n_others


# -------------------------------------------------------------------------------- summary


def side_length(pair, side):
    """Length of a pair's chosen or rejected answer: tokens, or characters where it has no ids."""
    if side + "_ids" in pair:
        return len(pair[side + "_ids"]) - pair.get(side + "_thought_tokens", 0)
    _, answer = split_thought(pair[side][0]["content"])
    return len(answer)


def longer_won_by_prompt(pairs):
    """For each prompt with pairs of unequal length, the share of them that the longer one won.

    Pairs of one prompt are no independent votes, so a prompt counts once.
    """
    wins = collections.defaultdict(list)
    for pair in pairs:
        chosen = side_length(pair, "chosen")
        rejected = side_length(pair, "rejected")
        if chosen != rejected:
            wins[pair["id"]].append(chosen > rejected)
    return [statistics.fmean(won) for won in wins.values()]


def summary(pairs):
    """Means over the pairs, and how often the longer won: this ranker's length bias here."""
    if not pairs:
        return {}
    shares = longer_won_by_prompt(pairs)
    longer_won = statistics.fmean(shares) if shares else 0.5
    return {
        "gap": statistics.fmean(pair["g_w"] - pair["g_l"] for pair in pairs),
        "z": statistics.fmean(pair["z"] for pair in pairs),
        "longer_won": longer_won,
        "longer_won_n": len(shares),
        "longer_won_95": wilson_interval(longer_won, len(shares)),
        "chosen": statistics.fmean(side_length(pair, "chosen") for pair in pairs),
        "rejected": statistics.fmean(side_length(pair, "rejected") for pair in pairs),
        "unit": "tokens" if "chosen_ids" in pairs[0] else "characters",
    }


def print_summary(numbers):
    """One line of what `summary` gives."""
    low, high = numbers["longer_won_95"]
    longer_won = (
        f"the longer one won in {numbers['longer_won']:.1%} of {numbers['longer_won_n']} prompts "
        f"(95 %: {low:.1%} to {high:.1%})"
    )
    if numbers["longer_won_n"] == 0:
        longer_won = "no pair has a longer one"
    print(
        f"gap {numbers['gap']:.3f}, z {numbers['z']:.3f}; chosen {numbers['chosen']:.1f} "
        f"and rejected {numbers['rejected']:.1f} {numbers['unit']}; {longer_won}"
    )


# -------------------------------------------------------------------------------- who judges


def start_ranker(settings, counts):
    """The ranker of the settings, as in nanoaipo/rankers.py: from rows to (rewards, log_odds)."""
    from nanoaipo.rankers import load_ranker, with_length_bias

    rank = load_ranker(ranker, settings["ranker_model"], settings, counts)
    if length_bias:
        rank = with_length_bias(rank, length_bias, reward_temperature)
    return rank


def who_judged(settings):
    """Of an endpoint the model that it says it served; see nanoaipo/rankers.py."""
    from nanoaipo.rankers import who_answered

    return who_answered(ranker, settings["ranker_model"], settings)


def judge_the_judge(settings, manifest):
    """Write how often the ranker is right about the preferences in `meta`, and print it."""
    if WORLD_SIZE > 1:
        raise InputError("--meta: is for one process; start it without torchrun")
    preferences = read_preferences(meta)
    for row in preferences:
        row["texts"] = distinct_texts(row["responses"])

    # a judge's replies are to a prompt's id: in a further run other ids, other replies
    counts = collections.Counter()
    rank = start_ranker(settings, counts)
    runs = []
    for run in range(1 + meta_repeats):
        rows = preferences
        if run > 0:
            rows = [row | {"id": f"{row['id']} (run {run + 1})"} for row in preferences]
        scores = []
        for row, (rewards, log_odds) in zip(rows, rank(rows)):
            row_scores, _ = score_responses(row["responses"], rewards, log_odds)
            scores.append(row_scores.tolist())
        runs.append(agreement(preferences, scores))

    # who judged, and the first run
    judge = f"{ranker} {settings['ranker_model']}".strip()
    manifest["served"] = who_judged(settings)
    measured = {
        "judge": judge,
        "date": time.strftime("%Y-%m-%d"),
        **manifest["served"].get(settings["ranker_model"], {}),
        **runs[0],
        "counts": dict(counts),
    }
    if meta_repeats:
        measured["runs"] = [one["accuracy"] for one in runs]
    if measured["n"] == 0:
        raise InputError(f"--ranker={ranker}: not one readable verdict on {meta}")

    write_json_output(out, manifest, measured)
    print(f"accuracy of {with_served(judge, measured.get('served_model'))} on {meta}")
    print_agreement(measured)
    if meta_repeats:
        print("of each run:", "; ".join(accuracy_text(one) for one in runs))
    print("->", out)


# -------------------------------------------------------------------------------- the stage


def check_settings():
    """Raise InputError for the first setting out of its range."""
    if pair_rule not in PAIR_RULES:
        raise InputError(f"--pair_rule={pair_rule}: there are {', '.join(PAIR_RULES)}")
    template_arguments(template_kwargs, date)
    if not 0 <= tier < 0.5:
        raise InputError(f"--tier={tier}: from 0 to below 0.5, or top and bottom overlap")
    if not 0 <= drop_hardest < 1:
        raise InputError(f"--drop_hardest={drop_hardest}: a share, from 0 to below 1")
    if not 0 <= other_share <= 1:
        raise InputError(f"--other_share={other_share}: a share, from 0 to 1")
    compares_prompts = ranker in ("reward", "answer")
    if ranker == "judge" and judge_mode != "pairwise":
        compares_prompts = True
    if drop_hardest and not compares_prompts:
        raise InputError(
            f"--drop_hardest={drop_hardest}: the scores of --ranker={ranker} compare the responses "
            "of one prompt; take reward, answer, or a judge that gives points"
        )
    if drop_hardest and WORLD_SIZE > 1:
        raise InputError(
            f"--drop_hardest={drop_hardest}: each process sees only its prompts; rank in one"
        )
    at_least = {
        "max_pairs": 1,
        "judge_votes": 1,
        "judge_concurrency": 1,
        "pseudo_count": 0.01,
        "reward_temperature": 1e-6,
    }
    for key, least in at_least.items():
        if config[key] < least:
            raise InputError(f"--{key}={config[key]}: at least {least}")


def annotator_models(spec):
    """The models in "pairrm:MODEL reward:MODEL ...", each under a name of its own.

    Their weights are inputs of the stage, and the manifest holds a hash of each.
    """
    models = {}
    for k, annotator in enumerate(spec.split()):
        _, _, path = annotator.partition(":")
        if path:
            models[f"annotator_model_{k}"] = path
    return models


def stage_settings():
    """(Settings for the manifest, suffix of `out`, names of the settings that hold inputs).

    From here on ranker_model is read from these settings: in them it is the model itself, and empty
    where no model ranks.
    """
    # the policy may be its own judge
    settings = dict(config)
    policy = settings.pop("model")
    if ranker_model == "policy":
        if not policy:
            raise InputError("--ranker_model=policy: --model is not set")
        settings["ranker_model"] = policy

    # whose content counts: data, and models but for a ranker that reads none
    data = "candidates"
    suffix = ".jsonl"
    if meta:
        data = "meta"
        suffix = ".json"
    models = {}
    if ranker == "annotators":
        models = annotator_models(settings["ranker_model"])
    inputs = [data, "ranker_model", *models]
    if ranker == "answer" or weaker:
        settings["ranker_model"] = ""
        inputs = [data]
    inputs += [key for key in ("weaker", "other_pairs") if config[key]]
    return settings | models, suffix, inputs


def make_pairs(settings, manifest):
    """Rank the candidates and write the pairs that the rule makes of them."""
    # who competes
    counts = collections.Counter(dict.fromkeys(COUNTS, 0))
    competitors = read_competitors(candidates, counts, **settings)
    counts["prompts"] = len(competitors)

    # rewards and log-odds of each prompt's distinct texts
    if weaker:
        labels = labels_by_model(competitors, reward_temperature)
    else:
        rank = start_ranker(settings, counts)
        rows = []
        for row, responses in competitors:
            rows.append(row | {"texts": distinct_texts(responses)})
        labels = list(rank(rows))

    # what the rule makes of them
    hardest = set()
    if drop_hardest:
        hardest = hardest_prompts(competitors, labels, drop_hardest)
    pairs = []
    for k, (row, responses) in enumerate(competitors):
        if k in hardest:
            counts["hardest"] += 1
            continue
        rewards, log_odds = labels[k]
        pairs += pairs_of(row, responses, rewards, log_odds, counts, **settings)
    counts["pairs"] = len(pairs)
    counts_text = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    if not pairs and WORLD_SIZE == 1:  # of several processes another may have some
        raise InputError(f"{candidates}: not one pair; {counts_text}")

    # the summary tells of our own pairs
    manifest["summary"] = summary(pairs)
    if other_pairs:
        pairs, counts["other_pairs"] = mix_in(pairs, other_pairs, other_share, seed)

    # one file, or this process's shard of it
    manifest["counts"] = dict(counts)
    if not weaker:
        manifest["served"] = who_judged(settings)
    with open_output(out, manifest) as write:
        for pair in pairs:
            write(pair)
    print(counts_text, "->", shard_path(out))
    if pairs:
        print_summary(manifest["summary"])


def main():
    check_settings()
    settings, suffix, inputs = stage_settings()
    manifest = open_stage(out, suffix, settings, *inputs)
    if manifest is None:  # complete
        return
    if meta:
        judge_the_judge(settings, manifest)
    else:
        make_pairs(settings, manifest)


if __name__ == "__main__":
    run_script(main)
