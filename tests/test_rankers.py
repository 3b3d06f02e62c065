import collections
import math
import random

import pytest
import torch

from nanoaipo import grading
from nanoaipo import judges
from nanoaipo import rankers
from conftest import PLAIN, build_model
from test_rank import build_judge, rank  # noqa: F401 (rank is a fixture)


# ---------------------------------------------------------------------------------------------- which pairs


def pairs(rank, texts, scores=None, odds=None, lengths=None, **row):
    """(pairs of one prompt, what was counted); scores or odds belong to the distinct texts, in their order."""
    counts, distinct = collections.Counter(), list(dict.fromkeys(texts))
    kept = [{"text": t, "ids": [1] * n} for t, n in zip(texts, lengths or [1] * len(texts))]
    rewards, differences = judges.from_rewards(scores, 1.0) if odds is None else (None, torch.tensor(odds))
    made = list(rank.pairs_of({"id": "p", "prompt_ids": [1], **row}, kept, distinct, rewards, differences, counts))
    return made, dict(counts)


def told(made):
    return [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in made]


def test_best_worst_takes_the_first_of_the_best_and_of_the_worst(rank):
    assert rank.best_worst([1.0, 3.0, 3.0, 0.0, 0.0], [1] * 5, None) == [(1, 3)]
    made, counts = pairs(rank, ["a", "b", "c"], [0.5, 2.0, -1.0], topic="weather")
    assert told(made) == [("b", "c")] and counts == {} and made[0]["topic"] == "weather"
    assert (made[0]["z"], made[0]["g_w"], made[0]["g_l"], made[0]["scores"]) == (3.0, 2.0, -1.0, [0.5, 2.0, -1.0])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert made[0]["q_w"] == pytest.approx((0.5 + sigmoid(1.5) + sigmoid(3.0)) / 3) and made[0]["q_l"] == pytest.approx((0.5 + sigmoid(-1.5) + sigmoid(-3.0)) / 3)


def test_best_random_never_takes_an_equal_of_the_best_and_repeats_itself(rank, monkeypatch):
    scores = [1.0, 3.0, 3.0, 0.0, 2.0]
    drawn = collections.Counter(rank.best_random(scores, [1] * 5, random.Random(k))[0] for k in range(300))
    assert set(drawn) == {(1, 0), (1, 3), (1, 4)} and min(drawn.values()) > 60
    monkeypatch.setattr(rank, "pair_rule", "best_random")
    of = lambda id: told(pairs(rank, list("abcdefgh"), [float(k) for k in range(8)], id=id)[0])
    assert [of("x"), of("y"), of("z")] == [of("x"), of("y"), of("z")] and len({of(f"p{k}")[0] for k in range(20)}) > 3
    before = [of(f"p{k}") for k in range(20)]
    monkeypatch.setattr(rank, "seed", 1)
    assert [of(f"p{k}") for k in range(20)] != before


def test_short_long_takes_the_shortest_of_the_top_tier_against_the_longest_of_the_bottom_tier(rank, monkeypatch):
    scores, lengths = [10.0, 8.0, 7.9, 5.0, 2.0, 0.0], [50, 40, 10, 99, 70, 60]
    for tier, pair in ((0.0, (0, 5)), (0.2, (1, 4)), (0.1, (0, 5)), (0.21, (2, 4)), (0.49, (2, 4))):             # range 10: 0.2 reaches down to 8 and up to 2
        monkeypatch.setattr(rank, "tier", tier)
        assert rank.short_long(scores, lengths, None) == [pair]
    monkeypatch.setattr(rank, "pair_rule", "short_long")
    assert told(pairs(rank, list("abcdef"), scores, lengths=lengths)[0]) == [("c", "e")]


def test_right_wrong_uses_all_in_turn_and_no_pair_twice(rank, monkeypatch):
    for n_right in range(1, 5):
        for n_wrong in range(1, 6):
            for most in (1, 2, 3, 5, 10, 30):
                monkeypatch.setattr(rank, "max_pairs", most)
                scores = [1.0] * n_right + [0.0] * n_wrong + [0.5]      # one in between, which takes no part
                random.Random(n_right * n_wrong).shuffle(scores)
                made = rank.right_wrong(scores, [1] * len(scores), None)
                case = f"{n_right} right, {n_wrong} wrong, max_pairs {most}: {made}"
                assert all((scores[w], scores[l]) == (1.0, 0.0) for w, l in made), case
                assert len(made) == len(set(made)) == min(most, n_right * n_wrong), case
                for side, size in ((0, n_right), (1, n_wrong)):
                    for end in range(1, len(made) + 1):
                        used = collections.Counter(pair[side] for pair in made[:end])
                        assert max(used.values()) - (min(used.values()) if len(used) == size else 0) <= 1, case


def test_right_wrong_makes_several_pairs_of_one_prompt(rank, monkeypatch):
    monkeypatch.setattr(rank, "pair_rule", "right_wrong")
    made, _ = pairs(rank, ["r", "w", "s", "r", "v"], [1.0, 0.0, 1.0, 0.0])                                  # the second "r" is the first again
    assert sorted(told(made)) == [("r", "v"), ("r", "w"), ("s", "v"), ("s", "w")] and all(p["z"] == 1.0 and len(p["scores"]) == 5 for p in made)
    monkeypatch.setattr(rank, "max_pairs", 1)
    assert len(pairs(rank, ["r", "w", "s"], [1.0, 0.0, 1.0])[0]) == 1


def test_length_aware_takes_out_what_length_explains_within_the_prompt(rank, monkeypatch):
    lengths, scores = [10, 20, 30, 40], [11.0, 17.0, 33.0, 39.0]        # a point a token, and 1, -3, 3, -1, on which length has no bearing
    assert rank.per_token(scores, lengths) == pytest.approx(1.0) and rank.per_token([1.0, -3.0, 3.0, -1.0], lengths) == pytest.approx(0.0)
    (plain,), _ = pairs(rank, list("abcd"), scores, lengths=lengths)
    assert told([plain]) == [("d", "a")] and plain["z"] == 28.0
    monkeypatch.setattr(rank, "pair_rule", "length_aware")
    (pair,), _ = pairs(rank, list("abcd"), scores, lengths=lengths)
    assert told([pair]) == [("c", "b")] and pair["z"] == pytest.approx(6.0) and pair["g_w"] - pair["g_l"] == pytest.approx(6.0)
    assert pair["scores"] == pytest.approx([26.0, 22.0, 28.0, 24.0])    # their mean, 25, and the quality
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert pair["q_w"] == pytest.approx((0.5 + sigmoid(2.0) + sigmoid(6.0) + sigmoid(4.0)) / 4, abs=1e-5)
    (same,), _ = pairs(rank, list("abcd"), odds=[[a - b for b in scores] for a in scores], lengths=lengths)      # a ranker of odds alone
    assert told([same]) == [("c", "b")] and same["z"] == pytest.approx(6.0, abs=1e-5) and same["g_w"] - same["g_l"] == pytest.approx(12.0, abs=1e-5)


def test_length_aware_adjusts_odds_that_no_scores_explain(rank, monkeypatch):
    monkeypatch.setattr(rank, "pair_rule", "length_aware")
    odds = [[0.0, 2.0, -1.0], [-2.0, 0.0, 4.0], [1.0, -4.0, 0.0]]       # a circle; means 1/3, 2/3, -1; lengths 10, 20, 40: -1/20 a token
    (pair,), _ = pairs(rank, list("abc"), odds=odds, lengths=[10, 20, 40])
    assert pair["scores"] == pytest.approx([2 / 3 - 4 / 3, 4 / 3 - 1 / 3, -2 + 5 / 3])                          # twice the means and twice the slope
    assert told([pair]) == [("b", "a")] and pair["z"] == pytest.approx(-2 + 10 / 20)                            # b is 10 tokens longer than a


def test_two_candidates_of_different_length_are_explained_by_length_and_tie(rank, monkeypatch):
    monkeypatch.setattr(rank, "pair_rule", "length_aware")
    assert pairs(rank, ["a", "b"], [1.0, 3.0], lengths=[4, 9]) == ([], {"tied": 1})
    draw = random.Random(0)
    for _ in range(200):                                                # whatever their size: reward models go beyond 20
        scores, lengths = [draw.uniform(-20, 20) for _ in range(2)], [draw.randint(1, 800), draw.randint(801, 1500)]
        assert pairs(rank, ["a", "b", "a"], scores, lengths=lengths + lengths[:1])[1] == {"tied": 1}, (scores, lengths)
    assert len(pairs(rank, ["a", "b"], [1.0, 3.0], lengths=[4, 4])[0]) == 1


def test_length_explains_nothing_where_all_are_equally_long(rank):
    assert rank.per_token([1.0, 5.0, 2.0], [7, 7, 7]) == 0.0 and rank.per_token([3.0], [7]) == 0.0
    assert rank.per_token([1.0, 4.0], [3, 9]) == pytest.approx(0.5)


def test_a_gap_below_min_gap_and_a_chosen_response_with_a_url_give_no_pair(rank, monkeypatch):
    monkeypatch.setattr(rank, "min_gap", 2.0)
    assert pairs(rank, ["a", "b"], [0.0, 1.5]) == ([], {"gap": 1})
    assert len(pairs(rank, ["a", "b"], [0.0, 2.0])[0]) == 1
    assert told(pairs(rank, ["a", "see www.b.org"], [3.0, 0.0])[0]) == [("a", "see www.b.org")]
    assert pairs(rank, ["a", "see www.b.org"], [0.0, 3.0]) == ([], {"url": 1})
    monkeypatch.setattr(rank, "drop_url", False)
    assert len(pairs(rank, ["a", "see www.b.org"], [0.0, 3.0])[0]) == 1


def test_responses_without_a_score_are_left_out_and_counted(rank):
    nan = math.nan
    made, counts = pairs(rank, ["a", "b", "c", "b"], [1.0, nan, 3.0])
    assert told(made) == [("c", "a")] and counts == {"unjudged": 2} and made[0]["scores"] == [1.0, 3.0] and made[0]["z"] == 2.0
    assert made[0]["q_w"] == pytest.approx((0.5 + 1 / (1 + math.exp(-2))) / 2)
    assert pairs(rank, ["a", "b"], [nan, 1.0]) == ([], {"unjudged": 1, "fewer_than_two": 1})
    assert pairs(rank, ["a", "b", "b"], [nan, 1.0]) == ([], {"unjudged": 1, "identical": 1})
    assert pairs(rank, ["a", "b"], [nan, nan]) == ([], {"unjudged": 2, "fewer_than_two": 1})


def test_equal_texts_count_as_often_as_they_were_sampled(rank):
    (pair,), _ = pairs(rank, ["a", "b", "a"], odds=[[0.0, 1.5], [-1.5, 0.0]])
    assert pair["scores"] == [1.0, -2.0, 1.0] and pair["z"] == 1.5      # mean of twice the odds: (0 + 3 + 0) / 3 and (-3 + 0 - 3) / 3
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert pair["q_w"] == pytest.approx((0.5 + sigmoid(1.5) + 0.5) / 3) and pair["q_l"] == pytest.approx((2 * sigmoid(-1.5) + 0.5) / 3)
    assert pairs(rank, ["a", "b"], [1.0, 1.0]) == ([], {"tied": 1}) and pairs(rank, ["a", "a"], [1.0]) == ([], {"identical": 1})
    assert pairs(rank, [], []) == ([], {"fewer_than_two": 1})


def test_the_share_of_longer_winners_and_its_error_are_those_worked_out_by_hand(rank):
    def pair(id, chosen, rejected, z, gap):
        return {"id": id, "chosen_ids": [1] * chosen, "rejected_ids": [1] * rejected, "z": z, "g_w": gap, "g_l": 0.0}

    made = [pair("a", 9, 5, 1.0, 2.0), pair("a", 5, 9, 2.0, 2.0), pair("b", 3, 2, 3.0, 4.0), pair("c", 8, 1, 4.0, 4.0), pair("d", 4, 4, 5.0, 8.0)]
    told = rank.summary(made)                                           # prompts: 1/2, 1 and 1; their deviation sqrt(1/12), over sqrt(3): 1/6
    low, high = ((5 / 6 + 1.96**2 / 6 + s * 1.96 * math.sqrt((5 / 36 + 1.96**2 / 12) / 3)) / (1 + 1.96**2 / 3) for s in (-1, 1))       # Wilson
    assert told["longer_won"] == pytest.approx(5 / 6) and told["longer_won_95"] == pytest.approx([low, high]) and 0 < low < 5 / 6 < high < 1
    assert (told["gap"], told["z"], told["unit"]) == (4.0, 3.0, "tokens") and (told["chosen"], told["rejected"]) == (pytest.approx(5.8), pytest.approx(4.2))
    assert rank.summary([]) == {} and rank.summary(made[4:])["longer_won_95"] == pytest.approx([0, 1], abs=0.12)
    assert rank.summary(made[-1:])["longer_won"] == 0.5                 # equally long: no winner by length
    message = lambda text: [{"role": "assistant", "content": text}]
    bare = rank.summary([{"id": "a", "chosen": message("four"), "rejected": message("longer"), "z": 1.0, "g_w": 1.0, "g_l": 0.0}])
    assert (bare["chosen"], bare["rejected"], bare["longer_won"], bare["unit"]) == (4.0, 6.0, 0.0, "characters")


# ---------------------------------------------------------------------------------------------- several annotators


def votes_of(size, seed, most=9):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, (size, size), generator=draw).float().fill_diagonal_(0)


def test_strengths_of_two_have_the_closed_form():
    for k, h, c in ((7, 9, 0.5), (9, 9, 0.5), (0, 9, 1.0), (2, 3, 0.1)):
        (w,) = judges.zermelo([torch.tensor([[0.0, k], [h - k, 0.0]])], c)
        assert (w[0] - w[1]).item() == pytest.approx(math.log((k + c) / (h - k + c)), abs=1e-5) and abs(w.sum()) < 1e-6
    (w,) = judges.zermelo([torch.tensor([[0.0, 7.0], [2.0, 0.0]])], 0.5)
    assert (w[0] - w[1]).item() == pytest.approx(math.log(3), abs=1e-5)


def test_strengths_solve_the_likelihood_equations():
    for size in (2, 3, 5, 8):
        for c in (0.5, 2.0):
            wins = votes_of(size, size)
            (log,) = judges.zermelo([wins], c)
            votes, w = (wins + c).double().fill_diagonal_(0), log.double().exp()
            expected = (votes + votes.T) * w[:, None] / (w[:, None] + w)
            assert ((expected.sum(1) - votes.sum(1)) / votes.sum(1)).abs().max() < 1e-6


def test_strengths_follow_a_relabelling_and_do_not_depend_on_what_else_is_fitted():
    wins = [votes_of(size, k) for k, size in enumerate((4, 2, 4, 1, 0, 3, 4))]
    together = judges.zermelo(wins, 0.5)
    for votes, w in zip(wins, together):
        assert w.shape == (len(votes),) and (judges.zermelo([votes], 0.5)[0] - w).abs().sum() < 1e-6
        order = torch.randperm(len(votes), generator=torch.Generator().manual_seed(1))
        assert (judges.zermelo([votes[order][:, order]], 0.5)[0] - w[order]).abs().sum() < 1e-6
    assert not torch.allclose(together[0], together[2], atol=0.1) and together[3].tolist() == [0.0]


def test_unanimous_votes_give_finite_strengths_and_no_vote_at_all_gives_none():
    wins = 9 * torch.ones(5, 5).triu(1)                                 # the first beats all others in nine of nine votes, and so on down
    (w,) = judges.zermelo([wins], 0.5)
    assert (w[0] - w[4]).item() == pytest.approx(6.4, abs=0.05) and (w[:-1] > w[1:]).all()
    (w,) = judges.zermelo([torch.tensor([[0.0, 2, 0], [1, 0, 0], [0, 0, 0]])], 0.5)
    assert w.isnan().tolist() == [False, False, True]


def rows_of(*prompts, texts=("cold", "it is hot", "the blue sky", "a")):
    return [{"id": str(k), "prompt": [{"role": "user", "content": p}], "texts": list(texts)[:n]} for k, (p, n) in enumerate(prompts)]


def test_annotators_cast_votes_by_their_odds_and_are_fitted_together(tmp_path):
    names = [build_judge(tmp_path / str(seed), seed) for seed in (0, 1)]
    rows, settings = rows_of(("sky", 4), ("hot", 2), ("x", 1)), {"rank_batch_tokens": 500, "annotator_votes": 3, "pseudo_count": 0.5}
    each = [[odds for _, odds in rankers.load_ranker("pairrm", name, settings, collections.Counter())(rows)] for name in names]
    assert (each[0][0].sign() != each[1][0].sign()).any()               # they disagree
    label = lambda spec, **changed: list(rankers.load_ranker("annotators", spec, settings | changed, collections.Counter())(rows))
    spec = f"pairrm:{names[0]} pairrm:{names[1]}"
    for votes, of in ((3, lambda o: 3 * o.sigmoid()), (0, lambda o: (o > 0).float())):
        expected = judges.zermelo([of(a) + of(b) for a, b in zip(*each)], 0.5)
        for (scores, odds), w in zip(label(spec, annotator_votes=votes), expected):
            assert (scores - w).abs().max() < 1e-5 and (odds - (w[:, None] - w)).abs().max() < 1e-5
    (alone, _), *_ = label(f"pairrm:{names[0]}", annotator_votes=0)
    assert alone.argmax() == (each[0][0] > 0).sum(1).argmax()
    for wrong in ("pairrm", "pairrm:", ":x", f"{spec} pairm:x", f"annotators:{names[0]}"):
        with pytest.raises(SystemExit, match="names annotators as") as refusal:
            rankers.load_ranker("annotators", wrong, settings, collections.Counter())
        assert "\n" not in str(refusal.value)


def test_an_annotator_that_gives_no_score_casts_no_vote(monkeypatch):
    def silent(model, counts):
        return lambda rows: [judges.from_rewards([math.nan, 1.0, 0.0], 1.0) for _ in rows]

    def clear(model, counts):
        return lambda rows: [judges.from_rewards([2.0, 0.0, 0.0], 1.0) for _ in rows]

    monkeypatch.setitem(rankers.RANKERS, "silent", silent)
    monkeypatch.setitem(rankers.RANKERS, "clear", clear)
    settings = {"annotator_votes": 0, "pseudo_count": 0.5}
    ((scores, _),) = rankers.load_ranker("annotators", "silent:x clear:x", settings, collections.Counter())(rows_of(("x", 3)))
    votes = torch.tensor([[0, 1, 1], [0, 0, 1.5], [0, 0.5, 0]])          # an equal in the eyes of one: half a vote each
    assert (scores - judges.zermelo([votes], 0.5)[0]).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------- a reward model


def build_reward(folder, pad="<|pad|>", labels=1, head=True, template=PLAIN):
    """A random Llama with a head of `labels` numbers; pad: the token that its config names, or None; head: else a causal LM's weights."""
    import transformers
    build_model(folder, template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels, config.pad_token_id = labels, pad and tokenizer.convert_tokens_to_ids(pad)
    torch.manual_seed(1)
    network = (transformers.LlamaForSequenceClassification if head else transformers.LlamaForCausalLM)(config)
    network.save_pretrained(folder)
    return str(folder)


def load_reward(folder, batch_tokens=200, temperature=1.0):
    return rankers.load_ranker("reward", folder, {"rank_batch_tokens": batch_tokens, "reward_temperature": temperature}, collections.Counter())


def alone(folder, row):
    """The plain model's reward of each conversation, one at a time."""
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.LlamaForSequenceClassification.from_pretrained(folder).eval()
    rewards = []
    for text in row["texts"]:
        ids = tokenizer.apply_chat_template(row["prompt"] + [{"role": "assistant", "content": text}], return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rewards.append(network(ids).logits[0, 0])
    return torch.stack(rewards) if rewards else torch.zeros(0)


@pytest.mark.parametrize("pad, after", [("<|pad|>", ""), (None, ""), ("<|end|>", ""), (None, "{{ bos_token }}")])    # the last: id 0 ends the text
def test_rewards_are_those_of_each_conversation_alone(tmp_path, pad, after):
    folder = build_reward(tmp_path, pad, template=PLAIN + after)
    rows = rows_of(("sky", 4), ("what is hot? " * 5, 3), ("x", 1), ("y", 0), texts=("cold", "it is hot " * 9, "the blue sky", "a"))
    rows[1]["prompt"] = [{"role": "system", "content": "be brief"}, *rows[1]["prompt"], {"role": "assistant", "content": "sun"}, {"role": "user", "content": "and?"}]
    expected = [alone(folder, row) for row in rows]
    assert expected[0].std() > 0.01
    for batch_tokens in (1, 200, 100_000):
        for (rewards, odds), plain in zip(load_reward(folder, batch_tokens)(rows), expected):
            assert rewards.shape == plain.shape and (rewards - plain).abs().sum() < 1e-5
            assert (odds - (rewards[:, None] - rewards)).abs().sum() < 1e-6
    (rewards, odds), *_ = load_reward(folder, temperature=4.0)(rows)
    assert (rewards - expected[0]).abs().max() < 1e-5 and odds[0, 1] == (rewards[0] - rewards[1]) / 4 and torch.equal(odds, -odds.T)


def test_what_is_no_reward_model_is_refused(tmp_path):
    for name, kind, message in (("two", {"labels": 2}, "a reward model has one label, this one has 2"), ("causal", {"head": False}, r"weights lack \['score.weight'\]"),
                                ("policy", {"labels": 2, "head": False}, "a reward model has one label")):
        with pytest.raises(SystemExit, match=message):
            load_reward(build_reward(tmp_path / name, **kind))
    with pytest.raises(SystemExit, match="--ranker_model=.*nowhere: no model folder"):
        load_reward(str(tmp_path / "nowhere"))


def test_text_that_spells_a_control_token_stays_text_before_a_reward_model(tmp_path, monkeypatch):
    import transformers
    folder, read = build_reward(tmp_path), []
    forward = transformers.LlamaForSequenceClassification.forward
    monkeypatch.setattr(transformers.LlamaForSequenceClassification, "forward", lambda self, ids, **kw: read.append(ids) or forward(self, ids, **kw))
    row = {"id": "a", "prompt": [{"role": "user", "content": "x<|end|>"}], "texts": ["<|end|><|assistant|>good", "<s>y"]}
    load_reward(folder, 1)([row])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    shown = {tokenizer.decode(ids[0]): tokenizer.convert_ids_to_tokens(ids[0]) for ids in read}
    assert set(shown) == {"<s><|user|>x<|end|><|end|><|assistant|><|end|><|assistant|>good<|end|>", "<s><|user|>x<|end|><|end|><|assistant|><s>y<|end|>"}
    for tokens in shown.values():
        assert [t for t in tokens if len(t) > 2] == ["<s>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]


# ---------------------------------------------------------------------------------------------- the right answer


@pytest.mark.parametrize("text, answer, right", [
    ("6 * 7 = 42, and 1 more is 43. #### 42", 42, True), ("#### 41 or 42", "42", False), ("#### 42 is 6 * 7", "42", True), ("\\boxed{42} of 100", "42", True),
    ("\\boxed{4.20}", "4.2", True), ("The answer is 1,234.0", "1234", True), ("The answer is 1,234.0", "1,234", True), ("The answer is 12345", "1,234", False),
    ("Answer: -3 degrees", -3, True), ("**Answer:** 7. Not 8.", 7, True), ("answer is 5? No, the answer is 6.", "6", True), ("First 42, then 17", "17", True),
    ("First 42, then 17", "42", False), ("I cannot say", "42", False), ("The answer is unknown, 42 maybe", "42", True), ("142", "42", False), ("42.5", "42", False),
    ("(B)", "B", True), ("The answer is B.", "B", True), ("The answer is B, not C.", "B", True), ("The answer is B, not C.", "C", False),
    ("A good question. It could be B. But in the end, C", "C", True), ("A good question. It could be B. But in the end, C", "A", False),
    ("BC", "B", False), ("C's", "C", False), ("option c", "C", False),
    ("The answer is the Blue Sky!", "blue sky", True), ("blue skying", "blue sky", False), ("It is blue. #### red", "blue", False), ("C++ (fast)", "C++", True),
    ("no: not so", "no", True), ("nothing", "no", False), ("casino", "no", False)])
def test_what_counts_as_the_right_answer(text, answer, right):
    assert grading.is_right(text, answer) is right


def test_the_answer_ranker_gives_one_or_nothing_and_names_a_prompt_without_answer():
    rank = rankers.load_ranker("answer", "", {"reward_temperature": 0.5, "seed": 3}, collections.Counter())
    rows = [{"id": "q", "prompt": [], "texts": ["It is 12", "13", "#### 12 of 13"], "answer": 12}]
    ((scores, odds),) = rank(rows)
    assert scores.tolist() == [1.0, 0.0, 1.0] and odds.tolist() == [[0.0, 2.0, 0.0], [-2.0, 0.0, -2.0], [0.0, 2.0, 0.0]]
    with pytest.raises(SystemExit, match="--ranker=answer: prompt 'q7' has no 'answer'") as refusal:
        list(rank(rows + [{"id": "q7", "prompt": [], "texts": ["a"]}]))
    assert "\n" not in str(refusal.value)
