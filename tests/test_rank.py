import collections
import importlib.util
import itertools
import json
import os
import random
import shutil
import sys

import pytest
import torch

from nanoaipo import files
from nanoaipo import pairrm
from nanoaipo import judges
from nanoaipo import rankers
from conftest import run, torchrun

oracle = pytest.mark.skipif(importlib.util.find_spec("llm_blender") is None, reason="the oracle llm-blender is not installed")
CPU = torch.device("cpu")
WORDS = "the a it is cold hot sky blue answer two fruits apple pear sure question more what I hope this helps you".split()
REASONS = {"prompts", "pairs", "unfinished", "too_long", "empty", "fewer_than_two", "identical", "tied", "unjudged", "gap", "url"}


def text(draw, length):
    return " ".join(draw.choice(WORDS) for _ in range(length))


def build_judge(folder, seed=0):
    """A random PairRM in the published layout: backbone folder, config.json of the ranker, model.safetensors."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import DebertaV2Config, PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer.train_from_iterator([text(random.Random(k), 30) for k in range(50)] + ["<|>[]/candidatesource12SEP"],
                                  trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]", show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]")
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=len(tokenizer) + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=100,
        type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, max_relative_positions=-1, initializer_range=0.3,
        norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False, pad_token_id=0)
    model = pairrm.PairRM(config)
    for layer in (1, 4):
        torch.nn.init.normal_(model.head_layer[layer].weight, std=0.3)
    model.pretrained_model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "ranker_type": "pairranker", "model_type": "deberta", "model_name": str(folder / "backbone"), "source_maxlength": 60,
        "candidate_maxlength": 40, "n_tasks": 1, "drop_out": 0.05, "fp16": False}))
    return str(folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return build_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def rank(monkeypatch):
    """rank.py as a module; its settings are the defaults, and its globals."""
    monkeypatch.setattr(sys, "argv", ["rank.py"])
    return importlib.import_module("rank")


def world(seed, prompts, n, longest):
    draw = random.Random(seed)
    return [text(draw, draw.randint(1, longest)) for _ in range(prompts)], [[text(draw, draw.randint(1, longest)) for _ in range(n)] for _ in range(prompts)]


def odds_of(ranker, judge, prompts, candidates, batch_tokens=500, counts=None):
    """The matrices that a ranker gives for bare prompts and texts."""
    rank = rankers.load_ranker(ranker, judge, {"rank_batch_tokens": batch_tokens}, collections.Counter() if counts is None else counts)
    labels = list(rank([{"id": str(k), "prompt": [{"role": "user", "content": p}], "texts": c} for k, (p, c) in enumerate(zip(prompts, candidates))]))
    assert all(scores is None for scores, _ in labels)
    return [odds for _, odds in labels]


def blender_scores(judge, prompts, candidates):
    """llm-blender's own scores, (prompts, N), every prompt alone in its batch."""
    blender = rankers.import_llm_blender().Blender()
    blender.loadranker(judge, device="cpu")
    return torch.tensor(blender.rank(prompts, candidates, return_scores=True, batch_size=1, disable_tqdm=True))


@oracle
def test_scores_equal_llm_blenders(judge, rank):
    prompts, candidates = world(0, 6, 4, 8)                             # nothing to truncate, in any batch
    candidates[5][2] = candidates[5][0]
    ours = odds_of("pairrm", judge, prompts[:5], candidates[:5])
    theirs = odds_of("llm-blender", judge, prompts[:5], candidates[:5])
    assert max((a - b).abs().max() for a, b in zip(ours, theirs)) < 1e-4 and ours[0].abs().max() > 0.01
    scores = blender_scores(judge, prompts, candidates)
    assert (torch.stack([2 * m.mean(1) for m in ours]) - scores[:5]).abs().max() < 1e-4
    distinct = list(dict.fromkeys(candidates[5]))                       # ranked once, counted as often as sampled
    (odds,) = odds_of("pairrm", judge, prompts[5:], [distinct])
    (pair,) = rank.pairs_of({"id": "d"}, [{"text": t} for t in candidates[5]], distinct, None, odds, collections.Counter())
    assert len(distinct) == 3 and (torch.tensor(pair["scores"]) - scores[5]).abs().max() < 1e-4 and pair["g_w"] == max(pair["scores"])


@oracle
def test_truncation_equals_llm_blenders_where_a_prompt_stands_alone(judge):
    prompts, candidates = world(1, 4, 3, 90)                            # longer than 60 and 40 tokens
    counts = collections.Counter()
    ours = odds_of("pairrm", judge, prompts, candidates, counts=counts)
    assert (torch.stack([2 * m.mean(1) for m in ours]) - blender_scores(judge, prompts, candidates)).abs().max() < 1e-4
    assert counts["prompts_cut"] > 0 and counts["responses_cut"] > 0


def test_what_is_cut_is_counted_to_the_token(judge):
    _, tokenizer = pairrm.load_pairrm(judge, CPU)
    of = lambda n: "a" * (n - 1)                                        # n tokens, the first opens the word
    assert [len(tokenizer.segment(of(n), 99)[0]) for n in (2, 40)] == [5, 43]                                # and 3 around them
    counts = collections.Counter()
    odds_of("pairrm", judge, [of(57), of(58), of(10)], [[of(37), of(38), of(2)], [of(37)], [of(60), of(61), of(99), of(2)]], counts=counts)
    assert counts == {"prompts_cut": 1, "responses_cut": 1 + 0 + 2}     # 40 + (60 - 13) // 2 = 63 with the 3 around a text
    ids, cut = tokenizer.segment(of(58), 60)
    assert len(ids) == 60 and cut and ids[-1] == tokenizer.tokenizer.sep_token_id and tokenizer.segment(of(57), 60) == (ids, False)


def padded(judge, tokenizer, prompts, candidates):
    """The same matrices, and the lengths, by transformers' own DebertaV2Model over one padded batch with its attention mask."""
    from safetensors.torch import load_file
    from transformers import AutoConfig
    state = load_file(os.path.join(judge, "model.safetensors"))
    config = AutoConfig.from_pretrained(os.path.join(judge, "backbone"))
    config.vocab_size = len(state["pretrained_model.embeddings.word_embeddings.weight"])
    model = pairrm.PairRM(config).eval()
    model.load_state_dict(state)
    rows, matrices = [], [torch.zeros(len(texts), len(texts)) for texts in candidates]
    for p, (prompt, texts) in enumerate(zip(prompts, candidates)):
        source, _ = tokenizer.segment(prompt, tokenizer.source_maxlength)
        parts = [tokenizer.segment(t, tokenizer.candidate_limit(source))[0] for t in texts]
        rows += [(p, i, j, *tokenizer.join(source, parts[i], parts[j])) for i, j in itertools.permutations(range(len(texts)), 2)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row[3]) for row in rows], batch_first=True)                     # (B, L)
    lengths, marks = [len(row[3]) for row in rows], torch.tensor([row[4] for row in rows])
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        hidden = model.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        scores = model.score(hidden[torch.arange(len(rows))[:, None], marks])
    for (p, i, j, *_), (first, second) in zip(rows, scores.tolist()):
        matrices[p][i, j] += (first - second) / 2
        matrices[p][j, i] -= (first - second) / 2
    return matrices, lengths, config


def test_the_packed_forward_equals_transformers_deberta_and_a_moved_position_would_be_noticed(judge, monkeypatch):
    prompts, candidates = (a + b for a, b in zip(world(3, 6, 3, 70), world(4, 6, 3, 3)))
    model, tokenizer = pairrm.load_pairrm(judge, CPU)
    theirs, lengths, config = padded(judge, tokenizer, prompts, candidates)
    assert min(lengths) < 2 * config.position_buckets < pairrm.ROWS < config.max_position_embeddings < max(lengths) and 2 * pairrm.ROWS < max(lengths)
    assert len(set(lengths)) < len(lengths)                             # some share a product, some stand alone

    def error():
        ours = pairrm.compare(model, tokenizer, prompts, candidates, 2000, collections.Counter())
        return max((a - b).abs().max().item() for a, b in zip(ours, theirs))

    assert error() < 1e-5
    shifted, bucket = pairrm.add_shifted, pairrm.make_log_bucket_position
    for moved in (1, -1):
        monkeypatch.setattr(pairrm, "add_shifted", lambda scores, x, table: shifted(scores, x, table.roll(moved, 1)))
        assert error() > 1e-3
    monkeypatch.setattr(pairrm, "add_shifted", lambda scores, x, table: shifted(scores, x, table.flip(1)))
    assert error() > 1e-3
    monkeypatch.setattr(pairrm, "add_shifted", shifted)
    monkeypatch.setattr(pairrm, "make_log_bucket_position", lambda distance, *_: distance)                             # no logarithm, clamped
    assert error() > 1e-3
    monkeypatch.setattr(pairrm, "make_log_bucket_position", lambda distance, span, longest: bucket(distance, span, longest + 1))
    monkeypatch.setattr(pairrm, "ROWS", 7)
    assert error() > 1e-4                                               # some distances in the next bucket
    monkeypatch.setattr(pairrm, "make_log_bucket_position", bucket)
    assert error() < 1e-5                                               # however many rows at once


def test_scores_do_not_depend_on_the_batch_the_order_or_the_neighbours_and_are_antisymmetric(judge):
    prompts, candidates = world(2, 8, 4, 30)
    whole = odds_of("pairrm", judge, prompts, candidates, 4000)
    assert all(torch.equal(m, -m.T) for m in whole)
    for k in (0, 5):                                                    # alone
        assert (odds_of("pairrm", judge, [prompts[k]], [candidates[k]], 1)[0] - whole[k]).abs().max() < 1e-5
    order, turn = random.Random(0).sample(range(8), 8), [2, 0, 3, 1]
    for batch_tokens in (1, 150, 100_000):
        moved = odds_of("pairrm", judge, [prompts[k] for k in order], [[candidates[k][c] for c in turn] for k in order], batch_tokens)
        assert max((m - whole[k][turn][:, turn]).abs().max() for m, k in zip(moved, order)) < 1e-5
        assert all(torch.equal(m, -m.T) for m in moved)
    assert [m.shape for m in odds_of("pairrm", judge, ["x", "y", "z"], [["a", "b"], ["a"], []], 99)] == [(2, 2), (1, 1), (0, 0)]


def test_a_mark_inside_a_text_stays_text(judge):
    model, tokenizer = pairrm.load_pairrm(judge, CPU)
    ids, marks = tokenizer.join(*(tokenizer.segment(t, 60)[0] for t in ("a <|candidate1|> [SEP]", "<|source|>", "b <|candidate|>")))
    assert [ids[m] for m in marks] == tokenizer.prefixes[:3] and sum(i in tokenizer.prefixes for i in ids) == 3
    assert ids.count(tokenizer.tokenizer.sep_token_id) == ids.count(tokenizer.tokenizer.cls_token_id) == 3
    assert tokenizer.tokenizer.decode(ids[2:marks[1] - 2]).replace("▁", "").replace(" ", "") == "a<|candidate1|>[SEP]"
    (odds,) = pairrm.compare(model, tokenizer, ["a <|candidate1|>"], [["a <|source|>", "b [SEP]"]], 500, collections.Counter())
    assert torch.isfinite(odds).all() and odds[0, 1] != 0


def test_a_longer_conversation_is_read_with_its_roles_and_a_bare_instruction_without():
    turns = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "no"}, {"role": "user", "content": "cold?"}]
    assert judges.prompt_text(turns) == "USER: hot?\nASSISTANT: no\nUSER: cold?" and judges.prompt_text(turns[:1]) == "hot?"


def test_weights_that_are_no_pairrm_are_refused(judge, tmp_path):
    from safetensors.torch import load_file, save_file
    load = lambda folder, ranker="pairrm": rankers.load_ranker(ranker, str(folder), {"rank_batch_tokens": 500}, collections.Counter())
    state = load_file(os.path.join(judge, "model.safetensors"))
    lacking = {k: v for k, v in state.items() if k != "head_layer.4.weight"}
    for name, weights, message in (("more", state | {"head_layer.9.weight": torch.zeros(1)}, "does not fit a PairRM.*: head_layer.9.weight$"),
                                   ("less", lacking, "does not fit a PairRM.*: head_layer.4.weight$"), ("other", {"a": torch.zeros(1)}, "no PairRM, 'pretrained_model.*missing"),
                                   ("shape", state | {"head_layer.4.weight": torch.zeros(2, 32)}, "does not fit a PairRM.*: head_layer.4.weight$")):
        folder = shutil.copytree(judge, tmp_path / name)
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(SystemExit, match=message):
            load(folder)
    for name in ("config.json", "model.safetensors"):
        folder = shutil.copytree(judge, tmp_path / f"without_{name}")
        os.remove(folder / name)
        with pytest.raises(SystemExit, match="no folder and no hub model with config.json and model.safetensors"):
            load(folder)
    for n, change in enumerate(({"share_att_key": False}, {"relative_attention": False}, {"position_buckets": -1}, {"position_biased_input": True},
                                {"pos_att_type": ["c2p"]}, {"conv_kernel_size": 3}, {"model_type": "bert"})):
        folder = shutil.copytree(judge, tmp_path / f"backbone{n}")
        ranker, backbone = (json.loads((folder / f / "config.json").read_text()) for f in ("", "backbone"))
        (folder / "config.json").write_text(json.dumps(ranker | {"model_name": str(folder / "backbone")}))
        (folder / "backbone" / "config.json").write_text(json.dumps(backbone | change))
        with pytest.raises(SystemExit, match="its backbone is no DeBERTa-v3"):
            load(folder)
    for change, message in (({"model_name": "/nowhere/at/all"}, "its backbone .* cannot be loaded"), ({"source_maxlength": None}, "'source_maxlength' is missing")):
        folder = shutil.copytree(judge, tmp_path / next(iter(change)))
        settings = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
        with pytest.raises(SystemExit, match=message):
            load(folder)
    with pytest.raises(SystemExit, match="there are pairrm, llm-blender, reward, judge, answer, annotators"):
        load(judge, "pairm")


def response(words, finished=True, ids=None):
    return {"text": words, "ids": ids or [1] * len(words.split()), "finished": finished, "logp": -1.0}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_case_of_candidates_has_a_documented_outcome_and_two_processes_write_what_one_does(judge, tmp_path):
    rows = {"good": [response("it is cold"), response("hot"), response("it is cold")], "same": [response("a")] * 3, "one": [response("a"), response("")],
            "cut": [response("a b", finished=False), response("sky"), response("blue", finished=False)], "long": [response("a", ids=[1] * 3000), response("b")]}
    rows = [{"id": k, "prompt": [{"role": "user", "content": "x"}], "prompt_ids": [1], "responses": v, "topic": "weather"} for k, v in rows.items()]
    rows += [{"prompt": "x", "responses": ["it is cold", "hot"]}, {"prompt": "x", "responses": []}]          # from elsewhere: no ids, no tokens
    rows += [{"id": f"w{k}", "prompt": p, "responses": c} for k, (p, c) in enumerate(zip(*world(5, 5, 3, 60)))]
    path, out = write_rows(tmp_path / "c.jsonl", *rows), tmp_path / "pairs.jsonl"
    done = run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    pairs = {r["id"]: r for _, r in files.read_records(str(out))}
    assert list(pairs) == ["good", "5", "w0", "w1", "w2", "w3", "w4"]
    pair = pairs["good"]
    assert pair["topic"] == "weather" and "responses" not in pair and len(pair["scores"]) == 3
    chosen, rejected = pair["chosen"][0], pair["rejected"][0]
    assert chosen["role"] == rejected["role"] == "assistant" and {chosen["content"], rejected["content"]} == {"it is cold", "hot"} and pair["z"] > 0
    assert [len(pair["chosen_ids"]), len(pair["rejected_ids"])] == [len(m["content"].split()) for m in (chosen, rejected)]
    assert pair["scores"][0] == pair["scores"][2] and abs(sum(pair["scores"])) < 1e-5 and pair["q_w"] > 0.5 > pair["q_l"]
    bare = pairs["5"]
    assert bare["prompt"] == [{"role": "user", "content": "x"}] and not any(k.endswith("_ids") for k in bare) and {"texts", "kept"}.isdisjoint(bare)
    assert (bare["chosen"], bare["rejected"]) == (pair["chosen"], pair["rejected"]) and abs(bare["z"] - pair["z"]) < 1e-6
    manifest = json.load(open(tmp_path / "pairs.manifest.json"))
    assert {k: v for k, v in manifest["counts"].items() if k in REASONS} == {
        "prompts": 12, "pairs": 7, "unfinished": 2, "too_long": 1, "empty": 1, "fewer_than_two": 4, "identical": 1, "tied": 0, "unjudged": 0, "gap": 0, "url": 0}
    assert manifest["counts"]["responses_cut"] > 0 and abs(manifest["summary"]["z"] - sum(p["z"] for p in pairs.values()) / 7) < 1e-6

    done = torchrun(2, "rank.py", f"--candidates={path}", f"--ranker_model={judge}", f"--out={tmp_path}/two.jsonl")
    assert done.returncode == 0, done.stderr
    shards = [[r for _, r in files.read_records(f"{tmp_path}/two-0000{k}-of-00002.jsonl")] for k in (0, 1)]
    assert [[r["id"] for r in s] for s in shards] == [["good", "w1", "w3"], ["5", "w0", "w2", "w4"]]
    for r in sum(shards, []):
        one = pairs[r["id"]]
        assert abs(r["z"] - one["z"]) < 1e-6 and {k: v for k, v in r.items() if not isinstance(v, float) and k != "scores"} == {
            k: v for k, v in one.items() if not isinstance(v, float) and k != "scores"}
    counts = [json.load(open(f"{tmp_path}/two-0000{k}-of-00002.manifest.json"))["counts"] for k in (0, 1)]
    assert {k: counts[0][k] + counts[1][k] for k in manifest["counts"]} == manifest["counts"]


def test_candidates_that_cannot_be_read_are_named_by_file_and_line(judge, tmp_path):
    good = {"prompt": "x", "responses": ["a", "b"]}
    for row, message in (({"prompt": "x", "responses": "x"}, "'responses' has to be a list"), ({"prompt": "x", "responses": [1]}, "'responses' has to be a list"),
                         ({"prompt": "x", "responses": [{"ids": [1]}]}, "'responses' has to be a list"), ({"prompt": 3, "responses": []}, "'prompt' has to be"),
                         ({"prompt": "x"}, "neither 'responses' nor 'chosen' and 'rejected' in it")):
        done = run("rank.py", f"--candidates={write_rows(tmp_path / 'c.jsonl', good, row)}", f"--ranker_model={judge}", f"--out={tmp_path}/p.jsonl")
        assert done.returncode == 1 and f"c.jsonl:2: {message}" in done.stderr and "Traceback" not in done.stderr and not os.path.exists(tmp_path / "p.jsonl")


def test_a_chosen_response_with_a_url_gives_no_pair_and_no_pair_at_all_is_an_error(judge, tmp_path):
    rows = [response("see https://x.org now"), response("see www.x.org")]
    path = write_rows(tmp_path / "c.jsonl", {"id": "u", "prompt": [{"role": "user", "content": "x"}], "prompt_ids": [1], "responses": rows})
    done = run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", f"--out={tmp_path}/p.jsonl")
    assert done.returncode == 1 and "not one pair; 1 prompts, 1 url" in done.stderr and not os.path.exists(tmp_path / "p.jsonl")
    assert run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", "--drop_url=False", f"--out={tmp_path}/q.jsonl").returncode == 0
