"""Pair rules, labels and the summary of rank.py; annotators, reward models and right answers."""

import collections
import inspect
import math
import random

import pytest
import torch
from conftest import PLAIN, build_model, build_tokenizer
from test_rank import build_judge

import rank
from nanoaipo import grading, judges, rankers
from nanoaipo.errors import InputError

# -------------------------------------------------------------------------------- which pairs


def pairs(texts, scores=None, log_odds=None, lengths=None, row=None, **settings):
    """(pairs of one prompt, what was counted).

    scores or log-odds belong to the distinct texts, in their order. settings: changes to
    the defaults.
    """
    if lengths is None:
        lengths = [1] * len(texts)
    responses = [{"text": text, "ids": [1] * n} for text, n in zip(texts, lengths)]
    rewards = None
    if log_odds is None:
        rewards, log_odds = judges.from_rewards(scores, 1.0)
    else:
        log_odds = torch.tensor(log_odds)
    row = {"id": "p", "prompt_ids": [1]} | (row or {})
    counts = collections.Counter()
    settings = rank.config | settings
    made = list(rank.pairs_of(row, responses, rewards, log_odds, counts, **settings))
    return made, dict(counts)


def texts_of(made):
    """[(chosen, rejected)] of pairs."""
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in made]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_best_worst_takes_the_first_of_the_best_and_of_the_worst():
    assert rank.best_worst([1.0, 3.0, 3.0, 0.0, 0.0], [1] * 5, None) == [(1, 3)]

    made, counts = pairs(["a", "b", "c"], [0.5, 2.0, -1.0], row={"topic": "weather"})

    assert texts_of(made) == [("b", "c")]
    assert counts == {}
    (pair,) = made
    assert pair["topic"] == "weather"
    assert pair["z"] == 3.0
    assert pair["g_w"] == 2.0
    assert pair["g_l"] == -1.0
    assert pair["scores"] == [0.5, 2.0, -1.0]
    assert pair["q_w"] == pytest.approx((0.5 + sigmoid(1.5) + sigmoid(3.0)) / 3)
    assert pair["q_l"] == pytest.approx((0.5 + sigmoid(-1.5) + sigmoid(-3.0)) / 3)


def test_best_random_never_takes_an_equal_of_the_best_and_repeats_itself():
    scores = [1.0, 3.0, 3.0, 0.0, 2.0]
    chosen = collections.Counter()
    for k in range(300):
        chosen.update(rank.best_random(scores, [1] * 5, random.Random(k)))
    assert set(chosen) == {(1, 0), (1, 3), (1, 4)}
    assert min(chosen.values()) > 60

    # the choice hangs on the prompt's id and on the run's seed alone
    def pairs_by_id(seed):
        by_id = []
        for k in range(20):
            row = {"id": f"p{k}"}
            eight = [float(score) for score in range(8)]
            made, _ = pairs("abcdefgh", eight, row=row, pair_rule="best_random", seed=seed)
            by_id.append(texts_of(made))
        return by_id

    before = pairs_by_id(seed=0)
    assert pairs_by_id(seed=0) == before
    assert len({made[0] for made in before}) > 3
    assert pairs_by_id(seed=1) != before


def test_short_long_takes_the_shortest_of_the_top_tier_against_the_longest_of_the_bottom_tier():
    # the range is 10: a tier of 0.2 reaches down to 8 and up to 2
    scores = [10.0, 8.0, 7.9, 5.0, 2.0, 0.0]
    lengths = [50, 40, 10, 99, 70, 60]
    expected = {0.0: (0, 5), 0.2: (1, 4), 0.1: (0, 5), 0.21: (2, 4), 0.49: (2, 4)}
    for tier, pair in expected.items():
        assert rank.short_long(scores, lengths, None, tier=tier) == [pair]

    made, _ = pairs("abcdef", scores, lengths=lengths, pair_rule="short_long", tier=0.49)
    assert texts_of(made) == [("c", "e")]


def check_taken_in_turn(indices, size):
    """At every moment the `size` responses have been used equally often, give or take one."""
    for n_taken in range(1, len(indices) + 1):
        used = collections.Counter(indices[:n_taken])
        fewest = 0
        if len(used) == size:
            fewest = min(used.values())
        assert max(used.values()) - fewest <= 1, indices


@pytest.mark.parametrize("max_pairs", [1, 2, 3, 5, 10, 30])
@pytest.mark.parametrize("n_wrong", range(1, 6))
@pytest.mark.parametrize("n_right", range(1, 5))
def test_right_wrong_uses_all_in_turn_and_no_pair_twice(n_right, n_wrong, max_pairs):
    # one in between, which takes no part
    scores = [1.0] * n_right + [0.0] * n_wrong + [0.5]
    random.Random(n_right * n_wrong).shuffle(scores)

    made = rank.right_wrong(scores, [1] * len(scores), None, max_pairs=max_pairs)

    assert all(scores[w] == 1.0 and scores[l] == 0.0 for w, l in made)
    assert len(made) == min(max_pairs, n_right * n_wrong)
    assert len(set(made)) == len(made)
    check_taken_in_turn([w for w, _ in made], n_right)
    check_taken_in_turn([l for _, l in made], n_wrong)


def test_right_wrong_makes_several_pairs_of_one_prompt():
    # the second "r" is the first again
    texts = ["r", "w", "s", "r", "v"]
    made, _ = pairs(texts, [1.0, 0.0, 1.0, 0.0], pair_rule="right_wrong")
    assert sorted(texts_of(made)) == [("r", "v"), ("r", "w"), ("s", "v"), ("s", "w")]
    assert all(pair["z"] == 1.0 for pair in made)
    assert all(len(pair["scores"]) == 5 for pair in made)

    scores = [1.0, 0.0, 1.0]
    made, _ = pairs(["r", "w", "s"], scores, pair_rule="right_wrong", max_pairs=1)
    assert len(made) == 1


def test_a_gap_below_min_gap_and_a_chosen_response_with_a_url_give_no_pair():
    assert pairs(["a", "b"], [0.0, 1.5], min_gap=2.0) == ([], {"gap": 1})
    made, _ = pairs(["a", "b"], [0.0, 2.0], min_gap=2.0)
    assert len(made) == 1

    with_url = ["a", "see www.b.org"]
    made, _ = pairs(with_url, [3.0, 0.0])
    assert texts_of(made) == [("a", "see www.b.org")]
    assert pairs(with_url, [0.0, 3.0]) == ([], {"url": 1})
    made, _ = pairs(with_url, [0.0, 3.0], drop_url=False)
    assert len(made) == 1


def test_responses_without_a_score_are_left_out_and_counted():
    nan = math.nan
    made, counts = pairs(["a", "b", "c", "b"], [1.0, nan, 3.0])
    assert texts_of(made) == [("c", "a")]
    assert counts == {"unjudged": 2}
    assert made[0]["scores"] == [1.0, 3.0]
    assert made[0]["z"] == 2.0
    assert made[0]["q_w"] == pytest.approx((0.5 + sigmoid(2)) / 2)

    one_left = {"unjudged": 1, "fewer_than_two": 1}
    assert pairs(["a", "b"], [nan, 1.0]) == ([], one_left)
    one_text_left = {"unjudged": 1, "identical": 1}
    assert pairs(["a", "b", "b"], [nan, 1.0]) == ([], one_text_left)
    none_left = {"unjudged": 2, "fewer_than_two": 1}
    assert pairs(["a", "b"], [nan, nan]) == ([], none_left)


def test_equal_texts_count_as_often_as_they_were_sampled():
    (pair,), _ = pairs(["a", "b", "a"], log_odds=[[0.0, 1.5], [-1.5, 0.0]])

    # mean of twice the log-odds: (0 + 3 + 0) / 3 and (-3 + 0 - 3) / 3
    assert pair["scores"] == [1.0, -2.0, 1.0]
    assert pair["z"] == 1.5
    assert pair["q_w"] == pytest.approx((0.5 + sigmoid(1.5) + 0.5) / 3)
    assert pair["q_l"] == pytest.approx((2 * sigmoid(-1.5) + 0.5) / 3)

    # the first of equal texts stands for them, with its ids
    (pair,), _ = pairs(["a", "b", "a"], [1.0, 0.0], lengths=[3, 1, 5])
    assert len(pair["chosen_ids"]) == 3

    assert pairs(["a", "b"], [1.0, 1.0]) == ([], {"tied": 1})
    assert pairs(["a", "a"], [1.0]) == ([], {"identical": 1})
    assert pairs([], []) == ([], {"fewer_than_two": 1})


def pair_of_lengths(id, chosen, rejected, z, gap):
    return {
        "id": id,
        "chosen_ids": [1] * chosen,
        "rejected_ids": [1] * rejected,
        "z": z,
        "g_w": gap,
        "g_l": 0.0,
    }


def test_the_share_of_longer_winners_and_its_error_are_those_worked_out_by_hand(capsys):
    made = [
        pair_of_lengths("a", 9, 5, z=1.0, gap=2.0),
        pair_of_lengths("a", 5, 9, z=2.0, gap=2.0),
        pair_of_lengths("b", 3, 2, z=3.0, gap=4.0),
        pair_of_lengths("c", 8, 1, z=4.0, gap=4.0),
        pair_of_lengths("d", 4, 4, z=5.0, gap=8.0),
    ]

    numbers = rank.summary(made)

    # of the prompts the longer one won 1/2, 1 and 1; Wilson's interval of their mean, of 3 votes
    center = 5 / 6 + 1.96**2 / 6
    reach = 1.96 * math.sqrt((5 / 36 + 1.96**2 / 12) / 3)
    low = (center - reach) / (1 + 1.96**2 / 3)
    high = (center + reach) / (1 + 1.96**2 / 3)
    assert 0 < low < 5 / 6 < high < 1
    assert numbers["longer_won"] == pytest.approx(5 / 6)
    assert numbers["longer_won_95"] == pytest.approx([low, high])
    assert numbers["gap"] == 4.0
    assert numbers["z"] == 3.0
    assert numbers["unit"] == "tokens"
    assert numbers["chosen"] == pytest.approx(5.8)
    assert numbers["rejected"] == pytest.approx(4.2)

    # no pair at all, and none with a longer one
    assert rank.summary([]) == {}
    equally_long = rank.summary(made[4:])
    assert equally_long["longer_won"] == 0.5
    assert equally_long["longer_won_95"] == pytest.approx([0, 1], abs=0.12)
    rank.print_summary(equally_long)
    printed = capsys.readouterr().out
    assert printed.endswith("chosen 4.0 and rejected 4.0 tokens; no pair has a longer one\n")

    # without ids lengths are in characters
    bare = {
        "id": "a",
        "chosen": [{"role": "assistant", "content": "four"}],
        "rejected": [{"role": "assistant", "content": "longer"}],
        "z": 1.0,
        "g_w": 1.0,
        "g_l": 0.0,
    }
    numbers = rank.summary([bare])
    assert numbers["chosen"] == 4.0
    assert numbers["rejected"] == 6.0
    assert numbers["longer_won"] == 0.0
    assert numbers["unit"] == "characters"


# -------------------------------------------------------------------------------- annotators


def random_votes(size, seed, most=9):
    """A matrix (size, size) of 0 to `most` votes."""
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randint(0, most + 1, (size, size), generator=generator)
    return votes.float().fill_diagonal_(0)


def test_strengths_of_two_have_the_closed_form():
    for k, n, c in ((7, 9, 0.5), (9, 9, 0.5), (0, 9, 1.0), (2, 3, 0.1)):
        (strengths,) = judges.zermelo([torch.tensor([[0.0, k], [n - k, 0.0]])], c)
        expected = math.log((k + c) / (n - k + c))
        assert (strengths[0] - strengths[1]).item() == pytest.approx(expected, abs=1e-5)
        assert abs(strengths.sum()) < 1e-6

    # seven votes to two, and half a vote added to each: 7.5 to 2.5
    (strengths,) = judges.zermelo([torch.tensor([[0.0, 7.0], [2.0, 0.0]])], 0.5)
    assert (strengths[0] - strengths[1]).item() == pytest.approx(math.log(3), abs=1e-5)


@pytest.mark.parametrize("c", [0.5, 2.0])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_strengths_solve_the_likelihood_equations(size, c):
    wins = random_votes(size, size)

    (log_strengths,) = judges.zermelo([wins], c)

    # the votes that the model expects are those that were cast
    votes = (wins + c).double().fill_diagonal_(0)
    w = log_strengths.double().exp()
    expected = (votes + votes.T) * w[:, None] / (w[:, None] + w)
    cast = votes.sum(1)
    assert ((expected.sum(1) - cast) / cast).abs().max() < 1e-6


def test_strengths_follow_a_relabelling_and_do_not_depend_on_what_else_is_fitted():
    wins = [random_votes(size, k) for k, size in enumerate((4, 2, 4, 1, 0, 3, 4))]

    together = judges.zermelo(wins, 0.5)

    for votes, strengths in zip(wins, together):
        assert strengths.shape == (len(votes),)
        (alone,) = judges.zermelo([votes], 0.5)
        assert (alone - strengths).abs().sum() < 1e-6
        order = torch.randperm(len(votes), generator=torch.Generator().manual_seed(1))
        (relabelled,) = judges.zermelo([votes[order][:, order]], 0.5)
        assert (relabelled - strengths[order]).abs().sum() < 1e-6
    assert not torch.allclose(together[0], together[2], atol=0.1)
    assert together[3].tolist() == [0.0]


def test_unanimous_votes_give_finite_strengths_and_no_vote_at_all_gives_none():
    # the first beats all others in nine of nine votes, and so on down
    (strengths,) = judges.zermelo([9 * torch.ones(5, 5).triu(1)], 0.5)
    assert (strengths[0] - strengths[4]).item() == pytest.approx(6.4, abs=0.05)
    assert (strengths[:-1] > strengths[1:]).all()

    (strengths,) = judges.zermelo([torch.tensor([[0.0, 2, 0], [1, 0, 0], [0, 0, 0]])], 0.5)
    assert strengths.isnan().tolist() == [False, False, True]


def rows_of(*prompts, texts=("cold", "it is hot", "the blue sky", "a")):
    """Rows for a ranker, of (prompt, how many of the texts it has)."""
    rows = []
    for k, (prompt, n_texts) in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}]
        rows.append({"id": str(k), "prompt": messages, "texts": list(texts)[:n_texts]})
    return rows


def labels_of(ranker, model, settings, rows):
    """[(scores, log_odds)] by a ranker that is loaded for these rows."""
    return list(rankers.load_ranker(ranker, model, settings, collections.Counter())(rows))


def test_annotators_cast_votes_by_their_odds_and_are_fitted_together(tmp_path):
    first = build_judge(tmp_path / "0", 0)
    second = build_judge(tmp_path / "1", 1)
    both = f"pairrm:{first} pairrm:{second}"
    rows = rows_of(("sky", 4), ("hot", 2), ("x", 1))
    settings = {"rank_batch_tokens": 500, "annotator_votes": 3, "pseudo_count": 0.5}
    first_log_odds = [log_odds for _, log_odds in labels_of("pairrm", first, settings, rows)]
    second_log_odds = [log_odds for _, log_odds in labels_of("pairrm", second, settings, rows)]

    # they disagree
    assert (first_log_odds[0].sign() != second_log_odds[0].sign()).any()

    # three votes each, split by probability; or one for what each puts first
    split_votes = []
    single_votes = []
    for a, b in zip(first_log_odds, second_log_odds):
        split_votes.append(3 * a.sigmoid() + 3 * b.sigmoid())
        single_votes.append((a > 0).float() + (b > 0).float())
    for annotator_votes, votes in ((3, split_votes), (0, single_votes)):
        changed = settings | {"annotator_votes": annotator_votes}
        labels = labels_of("annotators", both, changed, rows)
        for (scores, log_odds), strengths in zip(labels, judges.zermelo(votes, 0.5)):
            assert (scores - strengths).abs().max() < 1e-5
            assert (log_odds - (strengths[:, None] - strengths)).abs().max() < 1e-5

    # one annotator alone
    single = settings | {"annotator_votes": 0}
    (scores, _), *_ = labels_of("annotators", f"pairrm:{first}", single, rows)
    assert scores.argmax() == (first_log_odds[0] > 0).sum(1).argmax()

    for wrong in ("pairrm", "pairrm:", ":x", f"{both} pairm:x", f"annotators:{first}"):
        with pytest.raises(InputError, match="names annotators as") as error:
            rankers.load_ranker("annotators", wrong, settings, collections.Counter())
        assert "\n" not in str(error.value)


def test_an_annotator_that_gives_no_score_casts_no_vote(monkeypatch):
    def silent(model, counts, **_):
        return lambda rows: [judges.from_rewards([math.nan, 1.0, 0.0], 1.0) for _ in rows]

    def clear(model, counts, **_):
        return lambda rows: [judges.from_rewards([2.0, 0.0, 0.0], 1.0) for _ in rows]

    monkeypatch.setitem(rankers.RANKERS, "silent", silent)
    monkeypatch.setitem(rankers.RANKERS, "clear", clear)
    settings = {"annotator_votes": 0, "pseudo_count": 0.5}

    ((scores, _),) = labels_of("annotators", "silent:x clear:x", settings, rows_of(("x", 3)))

    # an equal in the eyes of one: half a vote each
    votes = torch.tensor([[0, 1, 1], [0, 0, 1.5], [0, 0.5, 0]])
    (strengths,) = judges.zermelo([votes], 0.5)
    assert (scores - strengths).abs().max() < 1e-6


# -------------------------------------------------------------------------------- a reward model


def build_reward(folder, pad="<|pad|>", labels=1, head=True, template=PLAIN):
    """A random Llama with a head of `labels` numbers.

    pad: the token that its config names, or None. head: whether it has that head, or else a causal
    model's weights.
    """
    import transformers

    build_model(folder, template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = labels
    config.pad_token_id = None
    if pad is not None:
        config.pad_token_id = tokenizer.convert_tokens_to_ids(pad)
    torch.manual_seed(1)
    if head:
        network = transformers.LlamaForSequenceClassification(config)
    else:
        network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(folder)
    return str(folder)


def load_reward(folder, batch_tokens=200, temperature=1.0, **settings):
    settings |= {"rank_batch_tokens": batch_tokens, "reward_temperature": temperature}
    return rankers.load_ranker("reward", folder, settings, collections.Counter())


def rewards_alone(folder, row):
    """The plain eager model's reward of each conversation (N,), one at a time."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    rewards = []
    for text in row["texts"]:
        messages = row["prompt"] + [{"role": "assistant", "content": text}]
        inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            rewards.append(network(inputs["input_ids"]).logits[0, 0].item())
    return torch.tensor(rewards)


@pytest.mark.parametrize(
    "pad, after",
    [
        ("<|pad|>", ""),
        (None, ""),
        ("<|end|>", ""),
        (None, "{{ bos_token }}"),  # id 0 ends the text
    ],
)
def test_rewards_are_those_of_each_conversation_alone(tmp_path, pad, after):
    folder = build_reward(tmp_path, pad, template=PLAIN + after)
    texts = ("cold", "it is hot " * 9, "the blue sky", "a")
    rows = rows_of(("sky", 4), ("what is hot? " * 5, 3), ("x", 1), ("y", 0), texts=texts)
    rows[1]["prompt"] = [
        {"role": "system", "content": "be brief"},
        *rows[1]["prompt"],
        {"role": "assistant", "content": "sun"},
        {"role": "user", "content": "and?"},
    ]
    expected = [rewards_alone(folder, row) for row in rows]
    assert expected[0].std() > 0.01

    for batch_tokens in (1, 200, 100_000):
        labels = load_reward(folder, batch_tokens)(rows)
        assert len(labels) == len(rows)
        for (rewards, log_odds), alone in zip(labels, expected):
            assert rewards.shape == alone.shape
            assert (rewards - alone).abs().sum() < 1e-5
            assert (log_odds - (rewards[:, None] - rewards)).abs().sum() < 1e-6

    (rewards, log_odds), *_ = load_reward(folder, temperature=4.0)(rows)
    assert (rewards - expected[0]).abs().max() < 1e-5
    assert log_odds[0, 1] == (rewards[0] - rewards[1]) / 4
    assert torch.equal(log_odds, -log_odds.T)


SMALL = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def config_of(family, pad_id):
    """The config of a small reward model of this family; Gemma 3 and Qwen3.5 also see images."""
    import transformers

    small = SMALL | {"pad_token_id": pad_id}
    if family == "Gemma2":
        return transformers.Gemma2Config(
            **small, num_labels=1, attn_logit_softcapping=0.3, query_pre_attn_scalar=8
        )
    if family == "Gemma3":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        }
        return transformers.Gemma3Config(
            text_config=small, vision_config=vision, mm_tokens_per_image=4, num_labels=1
        )
    if family == "Phi3":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4,
            "long_factor": [8.0] * 4,
        }
        return transformers.Phi3Config(
            **small, num_labels=1, original_max_position_embeddings=64, rope_parameters=rope
        )
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
    }
    return transformers.Qwen3_5Config(
        text_config=small | LINEAR, vision_config=vision, num_labels=1
    )


def save_classifier(folder, config):
    """Save a random sequence classifier of this config beside its tokenizer."""
    import transformers

    torch.manual_seed(1)
    network = transformers.AutoModelForSequenceClassification.from_config(config)
    network.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pad_id", [2, None])
@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "Qwen3_5", "Phi3"])
def test_rewards_of_soft_caps_wrapper_configs_and_longrope_are_those_of_each_alone(
    family, pad_id, tmp_path
):
    build_tokenizer(PLAIN, "<|pad|>").save_pretrained(tmp_path)
    folder = save_classifier(tmp_path, config_of(family, pad_id))
    texts = ("cold", "it is hot " * 9, "the blue sky", "a")
    rows = rows_of(("sky", 4), ("what is hot? " * 5, 3), texts=texts)
    expected = [rewards_alone(folder, row) for row in rows]
    assert expected[0].std() > 0.01

    labels = load_reward(folder, 100_000)(rows)

    for (rewards, _), alone in zip(labels, expected):
        assert (rewards - alone).abs().max() < 1e-5


def build_pair_reward(folder):
    """A random DeBERTa as OpenAssistant's reward model: no template, a pair of texts."""
    import transformers

    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz[]SEP?!"]
    pieces = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0), ("▁", -1.0)]
    tokenizer = transformers.DebertaV2Tokenizer(
        vocab=[*pieces, *letters, ("[MASK]", 0.0)], unk_id=3
    )
    tokenizer.save_pretrained(folder)
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
        num_labels=1,
        pad_token_id=0,
        relative_attention=True,
        position_buckets=8,
        max_position_embeddings=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=2,  # so that which text a token is of counts
    )
    return save_classifier(folder, config)


def test_a_reward_model_without_a_template_reads_prompt_and_response_as_a_pair(tmp_path):
    import transformers

    folder = build_pair_reward(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def reward_of(prompt, text):
        with torch.no_grad():
            return network(**tokenizer(prompt, text, return_tensors="pt")).logits[0, 0].item()

    # far more than its 16 positions, which are relative: nothing is cut
    texts = ("cold", "it is hot " * 30, "the blue sky", "a [SEP] b")
    rows = rows_of(("why?", 4), ("sky", 2), texts=texts)
    (first, _), (second, _) = load_reward(folder, 100_000)(rows)

    # what spells a control token stays text
    as_read = [*texts[:3], "a [ SEP] b"]
    expected = [reward_of("why?", text) for text in as_read]
    assert first.tolist() == pytest.approx(expected, abs=1e-5)
    assert first.std() > 0.01
    assert second.tolist() == pytest.approx(
        [reward_of("sky", text) for text in texts[:2]], abs=1e-5
    )
    assert tokenizer.sep_token_id not in tokenizer("[ SEP]", add_special_tokens=False).input_ids

    # several messages are one text, with their roles
    rows[1]["prompt"] += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    _, (talk, _) = load_reward(folder)(rows)
    prompt = "USER: sky\nASSISTANT: b\nUSER: c"
    assert talk.tolist() == pytest.approx([reward_of(prompt, text) for text in texts[:2]], abs=1e-5)


def test_template_arguments_reach_a_reward_models_template(tmp_path):
    dated = "{{ strftime_now('%d %B %Y') }}{% if thinking %}on{% endif %}" + PLAIN
    folder = build_reward(tmp_path, template=dated)
    rows = rows_of(("sky", 2))

    def rewards(**settings):
        ((scores, _),) = load_reward(folder, **settings)(rows)
        return scores.tolist()

    first = rewards(date="2026-11-27")
    assert first == rewards(date="2026-11-27", template_kwargs='{"thinking": false}')
    assert first != rewards(date="2025-01-31")
    assert first != rewards(date="2026-11-27", template_kwargs='{"thinking": true}')
    with pytest.raises(InputError, match="--date=today: has to be a day"):
        rewards(date="today")


def test_what_is_no_reward_model_is_refused(tmp_path):
    cases = [
        ("two", {"labels": 2}, "a reward model has one label, this one has 2"),
        ("causal", {"head": False}, r"weights lack \['score.weight'\]"),
        ("policy", {"labels": 2, "head": False}, "a reward model has one label"),
    ]
    for name, kind, message in cases:
        folder = build_reward(tmp_path / name, **kind)
        with pytest.raises(InputError, match=message):
            load_reward(folder)

    # a decoder's tokenizer without a template would run prompt and response together
    folder = build_reward(tmp_path / "bare", template=None)
    with pytest.raises(InputError, match="no chat template, and no separator") as error:
        load_reward(folder)
    assert "\n" not in str(error.value)

    message = "--ranker_model=.*nowhere: no model folder"
    with pytest.raises(InputError, match=message):
        load_reward(str(tmp_path / "nowhere"))


def test_text_that_spells_a_control_token_stays_text_before_a_reward_model(tmp_path, monkeypatch):
    import transformers

    folder = build_reward(tmp_path)
    sequences = []
    forward = transformers.LlamaForSequenceClassification.forward

    def recording_forward(self, ids, **inputs):
        sequences.append(ids[0])
        return forward(self, ids, **inputs)

    monkeypatch.setattr(transformers.LlamaForSequenceClassification, "forward", recording_forward)
    row = {
        "id": "a",
        "prompt": [{"role": "user", "content": "x<|end|>"}],
        "texts": ["<|end|><|assistant|>good", "<s>y"],
    }
    load_reward(folder, 1)([row])

    # the text is all there, and the control tokens are the template's alone
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = "<s><|user|>x<|end|><|end|><|assistant|>"
    assert {tokenizer.decode(ids) for ids in sequences} == {
        prompt + "<|end|><|assistant|>good<|end|>",
        prompt + "<s>y<|end|>",
    }
    for ids in sequences:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        control = [token for token in tokens if len(token) > 2]
        assert control == ["<s>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]


# -------------------------------------------------------------------------------- the right answer


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("6 * 7 = 42, and 1 more is 43. #### 42", 42, True),
        ("#### 41 or 42", "42", False),
        ("#### 42 is 6 * 7", "42", True),
        ("\\boxed{42} of 100", "42", True),
        ("\\boxed{4.20}", "4.2", True),
        ("The answer is 1,234.0", "1234", True),
        ("The answer is 1,234.0", "1,234", True),
        ("The answer is 12345", "1,234", False),
        ("Answer: -3 degrees", -3, True),
        ("**Answer:** 7. Not 8.", 7, True),
        ("answer is 5? No, the answer is 6.", "6", True),
        ("First 42, then 17", "17", True),
        ("First 42, then 17", "42", False),
        ("I cannot say", "42", False),
        ("The answer is unknown, 42 maybe", "42", True),
        ("142", "42", False),
        ("42.5", "42", False),
        ("(B)", "B", True),
        ("The answer is B.", "B", True),
        ("The answer is B, not C.", "B", True),
        ("The answer is B, not C.", "C", False),
        ("A good question. It could be B. But in the end, C", "C", True),
        ("A good question. It could be B. But in the end, C", "A", False),
        ("BC", "B", False),
        ("C's", "C", False),
        ("option c", "C", False),
        ("The answer is the Blue Sky!", "blue sky", True),
        ("blue skying", "blue sky", False),
        ("It is blue. #### red", "blue", False),
        ("C++ (fast)", "C++", True),
        ("no: not so", "no", True),
        ("nothing", "no", False),
        ("casino", "no", False),
    ],
)
def test_what_counts_as_the_right_answer(text, answer, right):
    assert grading.is_right(text, answer) is right


def test_the_answer_ranker_gives_one_or_nothing_and_names_a_prompt_without_answer():
    settings = {"reward_temperature": 0.5, "seed": 3}
    texts = ["It is 12", "13", "#### 12 of 13"]
    row = {"id": "q", "prompt": [], "texts": texts, "answer": 12}
    unanswered = {"id": "q7", "prompt": [], "texts": ["a"]}

    ((scores, log_odds),) = labels_of("answer", "", settings, [row])
    assert scores.tolist() == [1.0, 0.0, 1.0]
    assert log_odds.tolist() == [[0.0, 2.0, 0.0], [-2.0, 0.0, -2.0], [0.0, 2.0, 0.0]]

    message = "--ranker=answer: prompt 'q7' has no 'answer'"
    with pytest.raises(InputError, match=message) as error:
        labels_of("answer", "", settings, [row, unanswered])
    assert "\n" not in str(error.value)


def test_the_answer_ranker_rewards_only_who_follows_all_instructions():
    texts = ["red and blue", "red, blue", "Red, blue"]
    answer = {"follow": [{"no": ","}, {"lowercase": True}]}
    row = {"id": "q", "prompt": [], "texts": texts, "answer": answer}

    ((scores, _),) = labels_of("answer", "", {"seed": 3}, [row])

    assert scores.tolist() == [1.0, 0.0, 0.0]


def test_a_length_bias_adds_points_for_each_hundred_words():
    texts = ["word " * 10, "word " * 60, "word"]

    def rank_by_score(rows):
        return [judges.from_rewards([0.5, 0.0, math.nan], temperature=2.0) for _ in rows]

    def rank_by_log_odds(rows):
        return [(None, torch.zeros(3, 3)) for _ in rows]

    # 2 points for 100 words: 0.2, 1.2 and 0.02
    biased = rankers.with_length_bias(rank_by_score, 2.0, reward_temperature=2.0)
    ((scores, log_odds),) = biased([{"texts": texts}])
    assert scores[:2].tolist() == pytest.approx([0.7, 1.2])
    assert scores[2].isnan()
    assert log_odds[1, 0].item() == pytest.approx((1.2 - 0.7) / 2)
    assert log_odds[2, 0].isnan()

    # where there are log-odds alone, the bias is in them, too
    biased = rankers.with_length_bias(rank_by_log_odds, 2.0, reward_temperature=1.0)
    ((scores, log_odds),) = biased([{"texts": texts}])
    assert scores is None
    assert log_odds[1, 2].item() == pytest.approx(1.2 - 0.02)
    assert torch.equal(log_odds, -log_odds.T)


def test_a_rankers_own_defaults_are_those_of_the_settings():
    """eval.py does not declare all of them, so a ranker falls back to its own."""
    compared = set()
    for function in [*rankers.RANKERS.values(), judges.way_to_ask]:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty:
                assert parameter.default == rank.config[name], name
                compared.add(name)

    some = {"reward_temperature", "annotator_votes", "judge_prompt", "judge_concurrency"}
    assert some <= compared
