import importlib.util
import json
import os
import random

import pytest
import torch

import data
import rankers
from conftest import run

oracle = pytest.mark.skipif(importlib.util.find_spec("llm_blender") is None, reason="the oracle llm-blender is not installed")
WORDS = "the a it is cold hot sky blue answer two fruits apple pear sure question more what I hope this helps you".split()


def text(draw, length):
    return " ".join(draw.choice(WORDS) for _ in range(length))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A random PairRM in the published layout: backbone folder, config.json of the ranker, model.safetensors."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import DebertaV2Config, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer.train_from_iterator([text(random.Random(k), 30) for k in range(50)] + ["<|>[]/candidatesource12SEP"],
                                  trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]", show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]")
    torch.manual_seed(0)
    config = DebertaV2Config(vocab_size=len(tokenizer) + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=512,
                             type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16, max_relative_positions=-1, initializer_range=0.3,
                             norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False, pad_token_id=0)
    model = rankers.PairRM(config)
    for layer in (1, 4):
        torch.nn.init.normal_(model.head_layer[layer].weight, std=0.3)
    model.pretrained_model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "ranker_type": "pairranker", "model_type": "deberta", "model_name": str(folder / "backbone"), "source_maxlength": 60,
        "candidate_maxlength": 40, "n_tasks": 1, "drop_out": 0.05, "fp16": False}))
    return str(folder)


def world(seed, prompts, n, longest):
    draw = random.Random(seed)
    return [text(draw, draw.randint(1, longest)) for _ in range(prompts)], [[text(draw, draw.randint(1, longest)) for _ in range(n)] for _ in range(prompts)]


@oracle
def test_scores_equal_llm_blenders(judge):
    prompts, candidates = world(0, 6, 4, 8)                             # nothing to truncate, in any batch
    ours = rankers.load_ranker("pairrm", judge, 500)(prompts, candidates)
    theirs = rankers.load_ranker("llm-blender", judge, 500)(prompts, candidates)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs)) < 1e-4 and ours[0].abs().max() > 0.01
    import llm_blender
    blender = llm_blender.Blender()
    blender.loadranker(judge, device="cpu")
    scores = torch.tensor(blender.rank(prompts, candidates, return_scores=True, batch_size=1, disable_tqdm=True))
    assert (torch.stack([2 * m.mean(1) for m in ours]) - scores).abs().max() < 1e-4


@oracle
def test_truncation_equals_llm_blenders_where_a_prompt_stands_alone(judge):
    prompts, candidates = world(1, 4, 3, 90)                            # longer than 60 and 40 tokens
    rankers.load_ranker("llm-blender", judge, 500)                      # puts the two names back
    import llm_blender
    blender = llm_blender.Blender()
    blender.loadranker(judge, device="cpu")
    scores = torch.tensor(blender.rank(prompts, candidates, return_scores=True, batch_size=1, disable_tqdm=True))
    ours = rankers.load_ranker("pairrm", judge, 500)(prompts, candidates)
    assert (torch.stack([2 * m.mean(1) for m in ours]) - scores).abs().max() < 1e-4


def test_scores_do_not_depend_on_the_batch_and_are_antisymmetric(judge):
    prompts, candidates = world(2, 8, 4, 30)
    whole = rankers.load_ranker("pairrm", judge, 4000)(prompts, candidates)
    single = rankers.load_ranker("pairrm", judge, 1)
    for k in reversed(range(8)):
        assert (single([prompts[k]], [candidates[k]])[0] - whole[k]).abs().max() < 1e-5
    assert all(torch.equal(m, -m.T) for m in whole)
    assert [m.shape[0] for m in rankers.load_ranker("pairrm", judge, 99)(["x", "y", "z"], [["a", "b"], ["a"], []])] == [2, 1, 0]


def test_a_mark_inside_a_text_stays_text(judge):
    odds = rankers.load_ranker("pairrm", judge, 500)
    _, tokenizer = rankers.load_pairrm(judge)
    ids, marks = tokenizer.join(*(tokenizer.segment(t, 60) for t in ("x <|candidate1|> [SEP]", "<|source|>", "b <|candidate|>")))
    assert [ids[m] for m in marks] == tokenizer.prefixes[:3] and sum(i in tokenizer.prefixes for i in ids) == 3
    assert ids.count(tokenizer.tokenizer.sep_token_id) == 3
    assert torch.isfinite(odds(["x <|candidate1|>"], [["a <|source|>", "b [SEP]"]])[0]).all()


def test_weights_that_are_no_pairrm_are_refused(judge, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    state = load_file(os.path.join(judge, "model.safetensors"))
    for change in ({"head_layer.9.weight": torch.zeros(1)}, None):
        broken = dict(state)
        broken.update(change) if change else broken.pop("head_layer.4.weight")
        folder = tmp_path / f"broken{bool(change)}"
        shutil.copytree(judge, folder)
        save_file(broken, folder / "model.safetensors")
        with pytest.raises(SystemExit, match="model.safetensors lacks"):
            rankers.load_ranker("pairrm", str(folder), 500)
    with pytest.raises(SystemExit, match="no folder and no hub model"):
        rankers.load_ranker("pairrm", str(tmp_path), 500)
    with pytest.raises(SystemExit, match="there are pairrm, llm-blender"):
        rankers.load_ranker("pairm", judge, 500)


def response(words, finished=True, ids=None):
    return {"text": words, "ids": ids or [1] * len(words.split()), "finished": finished, "logp": -1.0}


def test_every_case_of_candidates_has_a_documented_outcome(judge, tmp_path):
    rows = {"good": [response("it is cold"), response("hot"), response("it is cold")], "same": [response("a")] * 3, "one": [response("a"), response("")],
            "cut": [response("a b", finished=False), response("sky"), response("blue", finished=False)], "long": [response("a", ids=[1] * 3000), response("b")]}
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": k, "prompt": [{"role": "user", "content": "x"}], "prompt_ids": [1], "responses": v, "kept": 1}) + "\n" for k, v in rows.items()))
    out = tmp_path / "pairs.jsonl"
    done = run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    (pair,) = [r for _, r in data.read(str(out))]
    assert pair["id"] == "good" and pair["kept"] == 1 and "responses" not in pair and len(pair["scores"]) == 3
    assert {pair["chosen"][0]["content"], pair["rejected"][0]["content"]} == {"it is cold", "hot"} and pair["z"] > 0
    assert pair["scores"][0] == pair["scores"][2] and abs(sum(pair["scores"])) < 1e-5 and pair["q_w"] > 0.5 > pair["q_l"]
    counts = json.load(open(tmp_path / "pairs.manifest.json"))["counts"]
    assert counts == {"prompts": 5, "pairs": 1, "unfinished": 2, "too_long": 1, "empty": 1, "fewer_than_two": 3, "identical": 1, "tied": 0, "url": 0}


def test_a_chosen_response_with_a_url_gives_no_pair_and_no_pair_at_all_is_an_error(judge, tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [response("see https://x.org now"), response("see www.x.org")]
    path.write_text(json.dumps({"id": "u", "prompt": [{"role": "user", "content": "x"}], "prompt_ids": [1], "responses": rows}))
    done = run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", f"--out={tmp_path}/p.jsonl")
    assert done.returncode == 1 and "not one pair; 1 prompts, 1 url" in done.stderr and not os.path.exists(tmp_path / "p.jsonl")
    assert run("rank.py", f"--candidates={path}", f"--ranker_model={judge}", "--drop_url=False", f"--out={tmp_path}/q.jsonl").returncode == 0
