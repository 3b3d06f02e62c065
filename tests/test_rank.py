"""PairRM against llm-blender and transformers' own DeBERTa; rank.py from candidates to pairs."""

import collections
import importlib.util
import itertools
import json
import os
import random
import shutil

import pytest
import torch
from conftest import run, torchrun

import rank
from nanoaipo import files, judges, pairrm, rankers
from nanoaipo.errors import InputError

oracle = pytest.mark.skipif(
    importlib.util.find_spec("llm_blender") is None,
    reason="the oracle llm-blender is not installed",
)
CPU = torch.device("cpu")
WORDS = (
    "the a it is cold hot sky blue answer two fruits apple pear sure question more what I hope "
    "this helps you"
).split()


def random_text(rng, length):
    return " ".join(rng.choice(WORDS) for _ in range(length))


def random_prompts(seed, n_prompts, n_candidates, longest):
    """(prompts, their candidates) of 1 to `longest` words."""
    rng = random.Random(seed)

    def text():
        return random_text(rng, rng.randint(1, longest))

    prompts = [text() for _ in range(n_prompts)]
    candidates = [[text() for _ in range(n_candidates)] for _ in range(n_prompts)]
    return prompts, candidates


def build_tokenizer(folder):
    """Save a unigram tokenizer of 120 pieces with DeBERTa's special tokens; return its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
        unk_token="[UNK]",
        show_progress=False,
    )
    texts = [random_text(random.Random(k), 30) for k in range(50)]
    core.train_from_iterator(texts + ["<|>[]/candidatesource12SEP"], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def build_judge(folder, seed=0):
    """A random PairRM in the published layout: backbone, config.json, model.safetensors."""
    from safetensors.torch import save_file
    from transformers import DebertaV2Config

    vocabulary = build_tokenizer(folder / "backbone")
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=vocabulary + len(pairrm.PREFIXES),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=100,
        type_vocab_size=0,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        max_relative_positions=-1,
        initializer_range=0.3,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        pad_token_id=0,
    )
    model = pairrm.PairRM(config)
    for layer in (1, 4):
        torch.nn.init.normal_(model.head_layer[layer].weight, std=0.3)
    model.pretrained_model.save_pretrained(folder / "backbone")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": str(folder / "backbone"),
        "source_maxlength": 60,
        "candidate_maxlength": 40,
        "n_tasks": 1,
        "drop_out": 0.05,
        "fp16": False,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return build_judge(tmp_path_factory.mktemp("judge"))


# -------------------------------------------------------------------------------- PairRM


def log_odds_of(ranker, judge, prompts, candidates, batch_tokens=500, counts=None):
    """The matrices that a ranker gives for bare prompts and texts."""
    if counts is None:
        counts = collections.Counter()
    rows = []
    for k, (prompt, texts) in enumerate(zip(prompts, candidates)):
        messages = [{"role": "user", "content": prompt}]
        rows.append({"id": str(k), "prompt": messages, "texts": texts})

    settings = {"rank_batch_tokens": batch_tokens}
    labels = list(rankers.load_ranker(ranker, judge, settings, counts)(rows))

    assert all(scores is None for scores, _ in labels)
    return [log_odds for _, log_odds in labels]


def largest_difference(ours, theirs):
    """Between two lists of matrices."""
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


def mean_scores(matrices):
    """llm-blender's scores (prompts, N) of matrices of log-odds: the mean of both directions."""
    return torch.stack([2 * log_odds.mean(1) for log_odds in matrices])


def blender_scores(judge, prompts, candidates):
    """llm-blender's own scores, (prompts, N), every prompt alone in its batch."""
    blender = rankers.import_llm_blender().Blender()
    blender.loadranker(judge, device="cpu")
    scores = blender.rank(prompts, candidates, return_scores=True, batch_size=1, disable_tqdm=True)
    return torch.tensor(scores)


@oracle
def test_scores_equal_llm_blenders(judge):
    # nothing to truncate, in any batch
    prompts, candidates = random_prompts(0, 6, 4, 8)
    candidates[5][2] = candidates[5][0]

    ours = log_odds_of("pairrm", judge, prompts[:5], candidates[:5])
    theirs = log_odds_of("llm-blender", judge, prompts[:5], candidates[:5])
    assert largest_difference(ours, theirs) < 1e-4
    assert ours[0].abs().max() > 0.01
    scores = blender_scores(judge, prompts, candidates)
    assert (mean_scores(ours) - scores[:5]).abs().max() < 1e-4

    # equal texts are ranked once, and counted as often as they were sampled
    distinct = list(dict.fromkeys(candidates[5]))
    assert len(distinct) == 3
    (log_odds,) = log_odds_of("pairrm", judge, prompts[5:], [distinct])
    responses = [{"text": text} for text in candidates[5]]
    (pair,) = rank.pairs_of(
        {"id": "d"}, responses, None, log_odds, collections.Counter(), **rank.config
    )
    assert (torch.tensor(pair["scores"]) - scores[5]).abs().max() < 1e-4
    assert pair["g_w"] == max(pair["scores"])


@oracle
def test_truncation_equals_llm_blenders_where_a_prompt_stands_alone(judge):
    # longer than 60 and 40 tokens
    prompts, candidates = random_prompts(1, 4, 3, 90)
    counts = collections.Counter()

    ours = log_odds_of("pairrm", judge, prompts, candidates, counts=counts)

    theirs = blender_scores(judge, prompts, candidates)
    assert (mean_scores(ours) - theirs).abs().max() < 1e-4
    assert counts["prompts_cut"] > 0
    assert counts["responses_cut"] > 0


def text_of(n_tokens):
    """A text of so many tokens; the first opens the word."""
    return "a" * (n_tokens - 1)


def test_what_is_cut_is_counted_to_the_token(judge):
    _, tokenizer = pairrm.load_pairrm(judge, CPU)

    # a segment has three ids around a text
    for n_tokens in (2, 40):
        segment, _ = tokenizer.segment(text_of(n_tokens), 99)
        assert len(segment) == n_tokens + 3

    # prompts hold 60 - 3, candidates 40 - 3 and half of what the prompt leaves:
    # 40 + (60 - 13) // 2 = 63 with the 3 around the text
    counts = collections.Counter()
    prompts = [text_of(57), text_of(58), text_of(10)]
    candidates = [
        [text_of(37), text_of(38), text_of(2)],
        [text_of(37)],
        [text_of(60), text_of(61), text_of(99), text_of(2)],
    ]
    log_odds_of("pairrm", judge, prompts, candidates, counts=counts)
    assert counts == {"prompts_cut": 1, "responses_cut": 1 + 0 + 2}

    ids, cut = tokenizer.segment(text_of(58), 60)
    assert cut
    assert len(ids) == 60
    assert ids[-1] == tokenizer.tokenizer.sep_token_id
    assert tokenizer.segment(text_of(57), 60) == (ids, False)


def load_plain_pairrm(judge):
    """PairRM on transformers' own backbone in float32, and the backbone's configuration."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    weights = load_file(os.path.join(judge, "model.safetensors"))
    config = AutoConfig.from_pretrained(os.path.join(judge, "backbone"))
    config.vocab_size = len(weights["pretrained_model.embeddings.word_embeddings.weight"])
    model = pairrm.PairRM(config).eval()
    model.load_state_dict(weights)
    return model, config


def compare_padded(model, tokenizer, prompts, candidates):
    """(matrices, lengths) by transformers' own DebertaV2Model over one padded batch with a mask."""
    comparisons = []
    sequences = []
    marks = []
    for p, (prompt, texts) in enumerate(zip(prompts, candidates)):
        source, _ = tokenizer.segment(prompt, tokenizer.source_maxlength)
        limit = tokenizer.candidate_limit(source)
        segments = [tokenizer.segment(text, limit)[0] for text in texts]
        for i, j in itertools.permutations(range(len(texts)), 2):
            ids, positions = tokenizer.join(source, segments[i], segments[j])
            comparisons.append((p, i, j))
            sequences.append(torch.tensor(ids))
            marks.append(positions)

    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (B, L)
    lengths = torch.tensor([len(sequence) for sequence in sequences])  # (B,)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()  # (B, L)
    with torch.no_grad():
        output = model.pretrained_model(input_ids=ids, attention_mask=mask)
        hidden = output.last_hidden_state  # (B, L, D)
        each = torch.arange(len(sequences))[:, None]
        scores = model.score(hidden[each, torch.tensor(marks)])  # (B, 2)

    matrices = [torch.zeros(len(texts), len(texts)) for texts in candidates]
    for (p, i, j), (first, second) in zip(comparisons, scores.tolist()):
        matrices[p][i, j] += (first - second) / 2
        matrices[p][j, i] -= (first - second) / 2
    return matrices, lengths.tolist()


def test_the_packed_forward_equals_transformers_deberta_and_a_moved_position_would_be_noticed(
    judge, monkeypatch
):
    # some sequences within the exact buckets, some longer than two blocks of rows; some share a
    # product, some stand alone
    long_prompts, long_candidates = random_prompts(3, 6, 3, 70)
    short_prompts, short_candidates = random_prompts(4, 6, 3, 3)
    prompts = long_prompts + short_prompts
    candidates = long_candidates + short_candidates
    model, tokenizer = pairrm.load_pairrm(judge, CPU)
    plain, config = load_plain_pairrm(judge)
    theirs, lengths = compare_padded(plain, tokenizer, prompts, candidates)
    assert min(lengths) < 2 * config.position_buckets < pairrm.ROWS
    assert pairrm.ROWS < config.max_position_embeddings < max(lengths)
    assert 2 * pairrm.ROWS < max(lengths)
    assert len(set(lengths)) < len(lengths)

    def error():
        counts = collections.Counter()
        ours = pairrm.compare(model, tokenizer, prompts, candidates, 2000, counts)
        return largest_difference(ours, theirs)

    assert error() < 1e-5

    # positions moved by one, and in reverse
    add_shifted = pairrm.add_shifted

    def moved_forward(scores, x, table):
        add_shifted(scores, x, table.roll(1, 1))

    def moved_back(scores, x, table):
        add_shifted(scores, x, table.roll(-1, 1))

    def reversed_positions(scores, x, table):
        add_shifted(scores, x, table.flip(1))

    for wrong in (moved_forward, moved_back, reversed_positions):
        monkeypatch.setattr(pairrm, "add_shifted", wrong)
        assert error() > 1e-3
    monkeypatch.setattr(pairrm, "add_shifted", add_shifted)

    # buckets without the logarithm, which are clamped; and some distances in the next bucket
    make_bucket = pairrm.make_log_bucket_position

    def linear_buckets(distance, *_):
        return distance

    def next_buckets(distance, span, longest):
        return make_bucket(distance, span, longest + 1)

    monkeypatch.setattr(pairrm, "make_log_bucket_position", linear_buckets)
    assert error() > 1e-3
    monkeypatch.setattr(pairrm, "make_log_bucket_position", next_buckets)
    monkeypatch.setattr(pairrm, "ROWS", 7)
    assert error() > 1e-4

    # however many rows at once
    monkeypatch.setattr(pairrm, "make_log_bucket_position", make_bucket)
    assert error() < 1e-5


def is_antisymmetric(matrix):
    return torch.equal(matrix, -matrix.T)


def test_scores_do_not_depend_on_the_batch_the_order_or_the_neighbours_and_are_antisymmetric(judge):
    prompts, candidates = random_prompts(2, 8, 4, 30)
    together = log_odds_of("pairrm", judge, prompts, candidates, 4000)
    assert all(is_antisymmetric(log_odds) for log_odds in together)

    # alone
    for k in (0, 5):
        (alone,) = log_odds_of("pairrm", judge, [prompts[k]], [candidates[k]], 1)
        assert (alone - together[k]).abs().max() < 1e-5

    # in another order, of prompts and of candidates, whatever the batch
    prompt_order = random.Random(0).sample(range(8), 8)
    candidate_order = [2, 0, 3, 1]
    moved_prompts = [prompts[k] for k in prompt_order]
    moved_candidates = []
    expected = []
    for k in prompt_order:
        moved_candidates.append([candidates[k][c] for c in candidate_order])
        expected.append(together[k][candidate_order][:, candidate_order])
    for batch_tokens in (1, 150, 100_000):
        moved = log_odds_of("pairrm", judge, moved_prompts, moved_candidates, batch_tokens)
        assert largest_difference(moved, expected) < 1e-5
        assert all(is_antisymmetric(log_odds) for log_odds in moved)

    # two candidates, one, none
    small = log_odds_of("pairrm", judge, ["x", "y", "z"], [["a", "b"], ["a"], []], 99)
    assert [log_odds.shape for log_odds in small] == [(2, 2), (1, 1), (0, 0)]


def test_a_mark_inside_a_text_stays_text(judge):
    model, tokenizer = pairrm.load_pairrm(judge, CPU)
    texts = ("a <|candidate1|> [SEP]", "<|source|>", "b <|candidate|>")

    ids, marks = tokenizer.join(*(tokenizer.segment(text, 60)[0] for text in texts))

    assert [ids[mark] for mark in marks] == tokenizer.prefixes[:3]
    assert sum(i in tokenizer.prefixes for i in ids) == 3
    assert ids.count(tokenizer.tokenizer.sep_token_id) == 3
    assert ids.count(tokenizer.tokenizer.cls_token_id) == 3
    source = tokenizer.tokenizer.decode(ids[2 : marks[1] - 2])
    assert source.replace("▁", "").replace(" ", "") == "a<|candidate1|>[SEP]"

    (log_odds,) = pairrm.compare(
        model,
        tokenizer,
        ["a <|candidate1|>"],
        [["a <|source|>", "b [SEP]"]],
        500,
        collections.Counter(),
    )
    assert torch.isfinite(log_odds).all()
    assert log_odds[0, 1] != 0


def test_a_longer_conversation_is_read_with_its_roles_and_a_bare_instruction_without():
    turns = [
        {"role": "user", "content": "hot?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "cold?"},
    ]

    assert judges.prompt_text(turns) == "USER: hot?\nASSISTANT: no\nUSER: cold?"
    assert judges.prompt_text(turns[:1]) == "hot?"


# -------------------------------------------------------------------------------- what is refused


def load_judge(folder, ranker="pairrm"):
    settings = {"rank_batch_tokens": 500}
    return rankers.load_ranker(ranker, str(folder), settings, collections.Counter())


def change_json(path, change):
    """Change fields of a JSON file; None takes a field away."""
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def check_wrong_weights_are_refused(judge, folder):
    """Weights with one too many, one too few, none of them, and one of another shape."""
    from safetensors.torch import load_file, save_file

    weights = load_file(os.path.join(judge, "model.safetensors"))
    lacking = {k: v for k, v in weights.items() if k != "head_layer.4.weight"}
    misfit = "does not fit a PairRM.*: "
    cases = {
        "more": (
            weights | {"head_layer.9.weight": torch.zeros(1)},
            misfit + "head_layer.9.weight$",
        ),
        "less": (lacking, misfit + "head_layer.4.weight$"),
        "other": ({"a": torch.zeros(1)}, "no PairRM, 'pretrained_model.*missing"),
        "shape": (
            weights | {"head_layer.4.weight": torch.zeros(2, 32)},
            misfit + "head_layer.4.weight$",
        ),
    }
    for name, (wrong, message) in cases.items():
        copy = shutil.copytree(judge, folder / name)
        save_file(wrong, copy / "model.safetensors")
        with pytest.raises(InputError, match=message):
            load_judge(copy)


def check_missing_files_are_refused(judge, folder):
    message = "no folder and no hub model with config.json and model.safetensors"
    for name in ("config.json", "model.safetensors"):
        copy = shutil.copytree(judge, folder / f"without_{name}")
        os.remove(copy / name)
        with pytest.raises(InputError, match=message):
            load_judge(copy)


def check_other_backbones_are_refused(judge, folder):
    changes = [
        {"share_att_key": False},
        {"relative_attention": False},
        {"position_buckets": -1},
        {"position_biased_input": True},
        {"pos_att_type": ["c2p"]},
        {"conv_kernel_size": 3},
        {"model_type": "bert"},
    ]
    for n, change in enumerate(changes):
        copy = shutil.copytree(judge, folder / f"backbone{n}")
        change_json(copy / "config.json", {"model_name": str(copy / "backbone")})
        change_json(copy / "backbone" / "config.json", change)
        with pytest.raises(InputError, match="its backbone is no DeBERTa-v3"):
            load_judge(copy)


def check_wrong_settings_are_refused(judge, folder):
    cases = [
        ({"model_name": "/nowhere/at/all"}, "its backbone .* cannot be loaded"),
        ({"source_maxlength": None}, "'source_maxlength' is missing"),
    ]
    for n, (change, message) in enumerate(cases):
        copy = shutil.copytree(judge, folder / f"settings{n}")
        change_json(copy / "config.json", change)
        with pytest.raises(InputError, match=message):
            load_judge(copy)


def test_weights_that_are_no_pairrm_are_refused(judge, tmp_path):
    check_wrong_weights_are_refused(judge, tmp_path)
    check_missing_files_are_refused(judge, tmp_path)
    check_other_backbones_are_refused(judge, tmp_path)
    check_wrong_settings_are_refused(judge, tmp_path)
    rankers_there = "there are pairrm, llm-blender, reward, judge, answer, annotators"
    with pytest.raises(InputError, match=rankers_there):
        load_judge(judge, "pairm")


# -------------------------------------------------------------------------------- the stage


def response(text, finished=True, ids=None):
    """A response of generate.py, by default of one token per word."""
    if ids is None:
        ids = [1] * len(text.split())
    return {"text": text, "ids": ids, "finished": finished, "logp": -1.0}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def candidates_of_every_case():
    """Twelve rows: our own with ids, bare texts from elsewhere, and five random ones."""
    responses = {
        "good": [response("it is cold"), response("hot"), response("it is cold")],
        "same": [response("a"), response("a"), response("a")],
        "one": [response("a"), response("")],
        "cut": [
            response("a b", finished=False),
            response("sky"),
            response("blue", finished=False),
        ],
        "long": [response("a", ids=[1] * 3000), response("b")],
    }
    rows = []
    for name, own in responses.items():
        prompt = {"prompt": [{"role": "user", "content": "x"}], "prompt_ids": [1]}
        rows.append({"id": name, **prompt, "responses": own, "topic": "weather"})

    # no ids of tokens, and none of the prompt
    rows.append({"prompt": "x", "responses": ["it is cold", "hot"]})
    rows.append({"prompt": "x", "responses": []})
    for k, (prompt, texts) in enumerate(zip(*random_prompts(5, 5, 3, 60))):
        rows.append({"id": f"w{k}", "prompt": prompt, "responses": texts})
    return rows


def read_list(path):
    return [record for _, record in files.read_records(str(path))]


def read_manifest(path):
    return json.loads(path.read_text())


def without_scores(pair):
    """The fields of a pair that are equal to the bit whatever the batch was."""
    return {k: v for k, v in pair.items() if not isinstance(v, float) and k != "scores"}


def check_pairs(pairs):
    """The pair of ids and the pair of bare texts have what the candidates had, and labels."""
    pair = pairs["good"]
    assert pair["topic"] == "weather"
    assert "responses" not in pair
    chosen = pair["chosen"][0]
    rejected = pair["rejected"][0]
    assert chosen["role"] == rejected["role"] == "assistant"
    assert {chosen["content"], rejected["content"]} == {"it is cold", "hot"}
    assert len(pair["chosen_ids"]) == len(chosen["content"].split())
    assert len(pair["rejected_ids"]) == len(rejected["content"].split())
    assert pair["z"] > 0
    assert len(pair["scores"]) == 3
    assert pair["scores"][0] == pair["scores"][2]
    assert abs(sum(pair["scores"])) < 1e-5
    assert pair["q_w"] > 0.5 > pair["q_l"]

    bare = pairs["5"]
    assert bare["prompt"] == [{"role": "user", "content": "x"}]
    assert not any(key.endswith("_ids") for key in bare)
    assert {"texts", "kept"}.isdisjoint(bare)
    assert bare["chosen"] == pair["chosen"]
    assert bare["rejected"] == pair["rejected"]
    assert abs(bare["z"] - pair["z"]) < 1e-6


def test_every_case_of_candidates_has_a_documented_outcome_and_two_processes_write_what_one_does(
    judge, tmp_path
):
    path = write_rows(tmp_path / "c.jsonl", *candidates_of_every_case())
    out = tmp_path / "pairs.jsonl"
    done = run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", f"--out={out}")
    assert done.returncode == 0, done.stderr

    pairs = {pair["id"]: pair for pair in read_list(out)}
    assert list(pairs) == ["good", "5", "w0", "w1", "w2", "w3", "w4"]
    check_pairs(pairs)
    manifest = read_manifest(tmp_path / "pairs.manifest.json")
    expected_counts = {
        "prompts": 12,
        "pairs": 7,
        "unfinished": 2,
        "too_long": 1,
        "empty": 1,
        "fewer_than_two": 4,
        "identical": 1,
        "tied": 0,
        "unjudged": 0,
        "hardest": 0,
        "gap": 0,
        "length_gap": 0,
        "url": 0,
    }
    of_rank = {k: v for k, v in manifest["counts"].items() if k in expected_counts}
    assert of_rank == expected_counts
    assert manifest["counts"]["responses_cut"] > 0
    mean_z = sum(pair["z"] for pair in pairs.values()) / 7
    assert abs(manifest["summary"]["z"] - mean_z) < 1e-6

    # two processes: every other prompt each, the same pairs, and counts that add up
    two = tmp_path / "two.jsonl"
    arguments = [f"--candidates={path}", f"--ranker_model={judge}", f"--out={two}"]
    done = torchrun(2, "rank.py", *arguments)
    assert done.returncode == 0, done.stderr
    first = read_list(tmp_path / "two-00000-of-00002.jsonl")
    second = read_list(tmp_path / "two-00001-of-00002.jsonl")
    assert [pair["id"] for pair in first] == ["good", "w1", "w3"]
    assert [pair["id"] for pair in second] == ["5", "w0", "w2", "w4"]
    for pair in first + second:
        one = pairs[pair["id"]]
        assert abs(pair["z"] - one["z"]) < 1e-6
        assert without_scores(pair) == without_scores(one)
    first_counts = read_manifest(tmp_path / "two-00000-of-00002.manifest.json")["counts"]
    second_counts = read_manifest(tmp_path / "two-00001-of-00002.manifest.json")["counts"]
    for key, count in manifest["counts"].items():
        assert first_counts[key] + second_counts[key] == count, key


def test_candidates_that_cannot_be_read_are_dropped_and_named_by_file_and_line(judge, tmp_path):
    good = {"prompt": "x", "responses": ["a", "b"]}
    no_list = "'responses' has to be a list"
    cases = [
        ({"prompt": "x", "responses": "x"}, no_list),
        ({"prompt": "x", "responses": [1]}, no_list),
        ({"prompt": "x", "responses": [{"ids": [1]}]}, no_list),
        ({"prompt": "x", "responses": ["a", None]}, no_list),
        ({"prompt": "x", "responses": None}, "neither 'responses' nor"),
        ({"prompt": 3, "responses": []}, "'prompt' has to be"),
        ({"prompt": "x"}, "neither 'responses' nor 'chosen' and 'rejected' in it"),
    ]
    out = tmp_path / "p.jsonl"
    for row, message in cases:
        # the others are ranked
        path = write_rows(tmp_path / "c.jsonl", good, row)
        counts = collections.Counter()
        (competitor,) = rank.read_competitors(
            str(path), counts, drop_unfinished=True, max_response_tokens=9
        )
        assert competitor[1] == [{"text": "a"}, {"text": "b"}]
        assert counts.total() == 1

        # a file of nothing else is an error
        path = write_rows(tmp_path / "c.jsonl", row)
        done = run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", f"--out={out}")
        assert done.returncode == 1
        assert f"c.jsonl:1: {message}" in done.stderr
        assert "no candidates in it (1 no_" in done.stderr
        assert "Traceback" not in done.stderr
        assert not out.exists()

    # what was dropped stands in the manifest
    path = write_rows(tmp_path / "c.jsonl", good, {"prompt": "x", "responses": None})
    done = run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "1 row dropped: 1 no_responses" in done.stdout
    counts = read_manifest(tmp_path / "p.manifest.json")["counts"]
    assert (counts["prompts"], counts["pairs"], counts["no_responses"]) == (1, 1, 1)


def test_a_chosen_response_with_a_url_gives_no_pair_and_no_pair_at_all_is_an_error(judge, tmp_path):
    row = {
        "id": "u",
        "prompt": [{"role": "user", "content": "x"}],
        "prompt_ids": [1],
        "responses": [response("see https://x.org now"), response("see www.x.org")],
    }
    path = write_rows(tmp_path / "c.jsonl", row)
    arguments = ["rank.py", f"--candidates={path}", f"--ranker_model={judge}"]

    out = tmp_path / "p.jsonl"
    done = run(*arguments, f"--out={out}")
    assert done.returncode == 1
    assert "not one pair; 1 prompts, 1 url" in done.stderr
    assert not out.exists()

    done = run(*arguments, "--drop_url=False", f"--out={tmp_path}/q.jsonl")
    assert done.returncode == 0


@pytest.mark.parametrize(
    "response, drop_unfinished, reason",
    [
        ({"text": "yes"}, True, None),  # a bare text from elsewhere counts as finished
        ({"text": " \n"}, True, "empty"),
        ({"text": "yes", "finished": False}, True, "unfinished"),
        ({"text": "yes", "finished": False}, False, None),
        ({"text": "yes", "finished": True, "ids": [1, 2, 3]}, True, None),
        ({"text": "yes", "finished": True, "ids": [1, 2, 3, 4]}, True, "too_long"),
        ({"text": "yes", "finished": False, "ids": [1, 2, 3, 4]}, False, "too_long"),
        ({"text": "", "finished": False, "thought": "so"}, True, "unfinished"),
        ({"text": "", "finished": False, "thought": "so"}, False, "empty"),
    ],
)
def test_what_keeps_a_response_from_competing(response, drop_unfinished, reason):
    assert rank.why_left_out(response, drop_unfinished, max_response_tokens=3) == reason


# -------------------------------------------------------------------------------- which pairs


def test_two_sigma_rejects_the_response_nearest_to_that_score_and_not_the_worst():
    # mean 0, standard deviation sqrt(130 / 20) = 2.55: -4 is nearer to -5.1 than -10
    scores = [0.0] * 4 + [1.0] * 14 + [-4.0, -10.0]

    assert rank.best_two_sigma(scores, [1] * 20, None) == [(4, 18)]
    assert rank.best_worst(scores, [1] * 20, None) == [(4, 19)]


def test_two_sigma_of_up_to_five_responses_is_best_against_worst():
    rng = random.Random(0)
    for n_responses in (2, 3, 4, 5):
        for _ in range(200):
            scores = [rng.gauss(0, 1) ** 3 for _ in range(n_responses)]
            lengths = [1] * n_responses
            expected = rank.best_worst(scores, lengths, None)
            assert rank.best_two_sigma(scores, lengths, None) == expected


def test_two_sigma_never_rejects_an_equal_of_the_best():
    # mean -0.01, standard deviation 0.0995: 0 is nearer to -0.21 than -1
    scores = [0.0] * 99 + [-1.0]

    assert rank.best_two_sigma(scores, [1] * 100, None) == [(0, 99)]


@pytest.mark.parametrize("max_length_gap, n_pairs", [(0, 1), (2, 0), (3, 1), (4, 1)])
@pytest.mark.parametrize("best", ["a b c d", "e"])  # the longer one wins, the shorter one
def test_a_pair_whose_lengths_differ_by_more_than_the_cap_is_dropped_and_counted(
    best, max_length_gap, n_pairs
):
    responses = [response("a b c d"), response("e")]
    rewards, log_odds = judges.from_rewards([float(r["text"] == best) for r in responses], 1.0)
    counts = collections.Counter()
    settings = rank.config | {"max_length_gap": max_length_gap}
    row = {"id": "p", "prompt_ids": [1]}

    made = list(rank.pairs_of(row, responses, rewards, log_odds, counts, **settings))

    assert len(made) == n_pairs
    assert counts["length_gap"] == 1 - n_pairs


def prompts_of_known_difficulty():
    """Five prompts whose answer is 4: the mean scores are 1/2, 1/3, 1/4, 2/3, and none."""
    texts = {
        "half": ["4", "5"],
        "third": ["4", "5", "6"],
        "quarter": ["5", "4", "5", "5"],  # equal texts count as often as they were sampled
        "two_thirds": ["4", "5", "4"],
        "none": [],
    }
    rows = []
    for name, responses in texts.items():
        rows.append({"id": name, "prompt": "2 + 2", "answer": "4", "responses": responses})
    return rows


@pytest.mark.parametrize(
    "share, kept",
    [
        (0.0, ["half", "third", "quarter", "two_thirds"]),
        (0.1, ["half", "third", "quarter", "two_thirds"]),
        (0.25, ["half", "third", "two_thirds"]),
        (0.5, ["half", "two_thirds"]),
        (0.75, ["two_thirds"]),
    ],
)
def test_the_prompts_of_the_lowest_mean_score_give_no_pair_and_are_counted(share, kept, tmp_path):
    path = write_rows(tmp_path / "c.jsonl", *prompts_of_known_difficulty())
    out = tmp_path / "p.jsonl"

    done = run(
        "rank.py",
        "--ranker=answer",
        f"--candidates={path}",
        f"--drop_hardest={share}",
        f"--out={out}",
    )

    assert done.returncode == 0, done.stderr
    assert [pair["id"] for pair in read_list(out)] == kept
    counts = read_manifest(tmp_path / "p.manifest.json")["counts"]
    assert counts["hardest"] == 4 - len(kept)
    assert counts["fewer_than_two"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranker=pairrm", "--drop_hardest=0.3"], "--drop_hardest=0.3: the scores of --ranker="),
        (
            ["--ranker=judge", "--judge_mode=pairwise", "--drop_hardest=0.3"],
            "--drop_hardest=0.3: the scores of --ranker=judge",
        ),
        (["--ranker=answer", "--drop_hardest=1.0"], "--drop_hardest=1.0: a share, from 0 to below"),
        (["--ranker=answer", "--max_length_gap=-1"], "--max_length_gap=-1: at least 0"),
    ],
)
def test_wrong_settings_of_what_is_dropped_are_refused(arguments, message, tmp_path):
    path = write_rows(tmp_path / "c.jsonl", *prompts_of_known_difficulty())

    done = run("rank.py", f"--candidates={path}", f"--out={tmp_path}/p.jsonl", *arguments)

    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_several_processes_are_told_that_none_of_them_knows_the_hardest_prompts(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", *prompts_of_known_difficulty())
    arguments = ["--ranker=answer", "--drop_hardest=0.5", f"--candidates={path}"]

    done = torchrun(2, "rank.py", *arguments, f"--out={tmp_path}/p.jsonl")

    assert done.returncode != 0
    assert "each process sees only its prompts; rank in one" in done.stderr


# -------------------------------------------------------------------------------- other policies


def two_models():
    """Candidates of a stronger and a weaker model: all cases, the second file in another order."""
    ask = [{"role": "user", "content": "2 + 2"}]
    stronger = {
        "both": [response("four"), response("4")],
        "same": [response("four")],
        "one": [response("four")],
        "cut": [response("four")],
        "shared": [response("four"), response("so 4")],
    }
    weaker = {
        "shared": [response("so 4"), response("five")],
        "cut": [response("five", finished=False)],
        "same": [response("four")],
        "both": [response("five"), response("six")],
    }
    files_of_both = []
    for by_id in (stronger, weaker):
        rows = []
        for name, responses in by_id.items():
            rows.append({"id": name, "prompt": ask, "prompt_ids": [1], "responses": responses})
        files_of_both.append(rows)
    return files_of_both


def texts_of(pair):
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def test_the_responses_of_a_weaker_model_lose_without_a_ranker(tmp_path):
    stronger, weaker = two_models()
    arguments = [
        f"--candidates={write_rows(tmp_path / 's.jsonl', *stronger)}",
        f"--weaker={write_rows(tmp_path / 'w.jsonl', *weaker)}",
        "--ranker_model=no/such/model",
    ]

    done = run("rank.py", *arguments, "--pair_rule=right_wrong", f"--out={tmp_path}/p.jsonl")

    assert done.returncode == 0, done.stderr
    pairs = read_list(tmp_path / "p.jsonl")
    assert [(pair["id"], *texts_of(pair)) for pair in pairs] == [
        ("both", "four", "five"),
        ("both", "4", "six"),
        ("both", "four", "six"),
        ("both", "4", "five"),
        # what both wrote is the stronger one's
        ("shared", "four", "five"),
        ("shared", "so 4", "five"),
    ]
    for pair in pairs:
        assert pair["z"] == 1
        # ids would be those of two models
        assert not any(key.endswith(("_ids", "_logp")) for key in pair)
    counts = read_manifest(tmp_path / "p.manifest.json")["counts"]
    assert (counts["prompts"], counts["unfinished"], counts["identical"]) == (5, 1, 1)
    assert counts["fewer_than_two"] == 2  # those that one model alone has answered

    # every process finds the weaker model's responses to its own prompts
    two = tmp_path / "two.jsonl"
    done = torchrun(2, "rank.py", *arguments, "--pair_rule=right_wrong", f"--out={two}")
    assert done.returncode == 0, done.stderr
    assert sorted(map(texts_of, read_list(two))) == sorted(map(texts_of, pairs))


def test_an_id_that_is_another_prompt_of_the_weaker_model_is_refused(tmp_path):
    stronger = [{"prompt": "2 + 2", "responses": ["4"]}]  # its id is its number
    weaker = [{"prompt": "3 + 3", "responses": ["6"]}]

    done = run(
        "rank.py",
        f"--candidates={write_rows(tmp_path / 's.jsonl', *stronger)}",
        f"--weaker={write_rows(tmp_path / 'w.jsonl', *weaker)}",
        f"--out={tmp_path}/p.jsonl",
    )

    assert done.returncode == 1
    assert "w.jsonl: '0' is the id of another prompt there" in done.stderr


def pairs_of_others():
    """Three pairs in layouts of others, one of them with ids, and a row that is none."""
    ask = [{"role": "user", "content": "2 + 2"}]
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    return [
        {"id": "trl", "prompt": "2 + 2", "chosen": "other 4", "rejected": "other 5"},
        {"id": "ids", "prompt": ask, "chosen": "other 4", "rejected": "other 5", "z": 2.0, **ids},
        {"id": "orca", "system": "Add.", "question": "2 + 2", "chosen": "4!", "rejected": "5!"},
        {"id": "none", "prompt": "2 + 2", "chosen": "other 4"},
    ]


@pytest.mark.parametrize("share, n_others", [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)])
def test_others_pairs_take_their_share_of_as_many_pairs(share, n_others, tmp_path):
    path = write_rows(tmp_path / "c.jsonl", *prompts_of_known_difficulty())
    others = write_rows(tmp_path / "others.jsonl", *pairs_of_others())
    arguments = ["--ranker=answer", f"--candidates={path}", f"--other_pairs={others}"]

    done = run("rank.py", *arguments, f"--other_share={share}", f"--out={tmp_path}/p.jsonl")

    assert done.returncode == 0, done.stderr
    pairs = {pair["id"]: pair for pair in read_list(tmp_path / "p.jsonl")}
    theirs = {name: pair for name, pair in pairs.items() if name in ("trl", "ids", "orca")}
    assert len(pairs) == 4
    assert len(theirs) == n_others
    manifest = read_manifest(tmp_path / "p.manifest.json")
    assert manifest["counts"]["pairs"] == 4
    assert manifest["counts"]["other_pairs"] == n_others
    assert manifest["summary"]["gap"] == 1  # ours, before they make room

    # each as training reads it
    for pair in theirs.values():
        assert pair["prompt"][-1] == {"role": "user", "content": "2 + 2"}
        assert pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant"
    if "ids" in theirs:
        assert theirs["ids"]["chosen_ids"] == [2]
        assert theirs["ids"]["z"] == 2

    # the same seed, the same mix
    done = run("rank.py", *arguments, f"--other_share={share}", f"--out={tmp_path}/q.jsonl")
    assert read_list(tmp_path / "q.jsonl") == read_list(tmp_path / "p.jsonl")


def test_too_few_pairs_of_others_are_told_with_what_was_dropped(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", *prompts_of_known_difficulty())
    others = write_rows(tmp_path / "others.jsonl", *pairs_of_others())
    arguments = ["--ranker=answer", f"--candidates={path}", f"--other_pairs={others}"]

    done = run("rank.py", *arguments, "--other_share=1.0", f"--out={tmp_path}/p.jsonl")

    assert done.returncode == 1
    assert "of 4 pairs 4 have to be its own, and it has 3 that can be used" in done.stderr
    assert "1 row dropped: 1 no_responses" in done.stdout
    assert "others.jsonl:4" in done.stdout
    assert not (tmp_path / "p.jsonl").exists()

    done = run("rank.py", *arguments, "--other_share=1.5", f"--out={tmp_path}/p.jsonl")
    assert "--other_share=1.5: a share, from 0 to 1" in done.stderr


# ---------------------------------------------------------------------------------------- thoughts


def pair_of_thinkers(with_ids):
    """The pair of two responses, of which the better one has the shorter answer."""
    responses = [
        {"text": "short", "thought": "a long one", "finished": True},
        {"text": "a longer answer", "thought": "so", "finished": True},
        {"text": "the longest answer of all", "finished": True},
    ]
    lengths = ((9, 7), (5, 1), (6, 0))  # tokens, of which the thought has
    row = {"id": "a", "prompt": [{"role": "user", "content": "hi"}]}
    if with_ids:
        row["prompt_ids"] = [1]
        for response, (n_tokens, n_thought) in zip(responses, lengths):
            response["ids"] = list(range(n_tokens))
            if n_thought:
                response["thought_tokens"] = n_thought
    (pair,) = rank.pairs_of(
        row,
        responses,
        torch.tensor([1.0, 0.9, 0.0]),
        torch.zeros(3, 3),
        collections.Counter(),
        pair_rule="short_long",
        tier=0.2,
        min_gap=0.0,
        drop_url=True,
        seed=0,
    )
    return pair


def test_lengths_are_those_of_the_answers_and_ids_hold_the_thoughts():
    pair = pair_of_thinkers(with_ids=True)

    assert pair["chosen"][0]["content"] == "short"
    assert len(pair["chosen_ids"]) == 9
    assert len(pair["rejected_ids"]) == 6
    numbers = rank.summary([pair])
    assert numbers["chosen"] == 2
    assert numbers["rejected"] == 6
    assert numbers["longer_won"] == 0


def test_a_pair_of_texts_keeps_its_thoughts_for_training():
    pair = pair_of_thinkers(with_ids=False)

    assert pair["chosen"][0]["content"] == "<think>\na long one\n</think>\n\nshort"
    assert pair["rejected"][0]["content"] == "the longest answer of all"
    assert rank.summary([pair])["chosen"] == len("short")


# ---------------------------------------------------------------------------------------- log-probs


def test_a_pair_with_ids_has_the_log_probs_that_its_responses_were_sampled_with():
    row = {"id": "a", "prompt_ids": [1]}
    chosen = {"text": "yes", "ids": [2, 3], "logp": -1.5}
    rejected = {"text": "no", "ids": [4], "logp": -0.5}

    pair = rank.pair_record(row, chosen, rejected, has_ids=True)
    text_pair = rank.pair_record(row, chosen, rejected, has_ids=False)

    assert pair["chosen_logp"] == -1.5
    assert pair["rejected_logp"] == -0.5
    assert "chosen_logp" not in text_pair


def test_a_pair_ranked_again_keeps_nothing_that_the_other_side_had():
    row = {
        "id": "a",
        "prompt_ids": [1],
        "chosen_logp": -9.0,
        "rejected_logp": -8.0,
        "chosen_thought_tokens": 7,
    }
    chosen = {"text": "yes", "ids": [2, 3]}
    rejected = {"text": "no", "ids": [4], "logp": -0.5, "thought_tokens": 1}

    pair = rank.pair_record(row, chosen, rejected, has_ids=True)

    assert pair["rejected_logp"] == -0.5
    assert pair["rejected_thought_tokens"] == 1
    assert "chosen_logp" not in pair
    assert "chosen_thought_tokens" not in pair
