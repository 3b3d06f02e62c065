"""policy.py: rows and segments by hand, log-probs and gradients against plain transformers, one kernel against the other, adapters."""
import inspect
import random
from array import array

import pytest
import torch
import torch.distributed as dist
from conftest import build_model, write_pairs
from safetensors.torch import load_file
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

from nanoaipo import chat
from nanoaipo import pairs
from nanoaipo.packing import layout, pack, packed_sdpa, packed_varlen
from nanoaipo.policy import build_policy, flops, load_weights, save_policy

KERNELS = ("packed_sdpa", "packed_varlen")
ARCHITECTURES = {
    "Llama": {}, "Mistral": {"sliding_window": 16}, "Phi3": {"sliding_window": 16}, "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},                # the second layer only
    "Gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 16,
               "tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def mesh():
    """A world of one process, as train.py makes it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def build(model, mesh, **settings):
    """The policy as train.py builds it, in float32 and without recomputation unless set otherwise."""
    settings = {"chunk": 16, "recompute": False, "compile": False, "lora_rank": 0, "lora_alpha": 16.0} | settings
    policy = build_policy(str(model), mesh, torch.float32, **settings)
    load_weights(policy, str(model))
    return policy


def random_pairs(n, seed=0, longest=40):
    draw = random.Random(seed)
    return [{k: array("i", draw.choices(range(6, 262), k=draw.randint(1, longest))) for k in ("prompt_ids", "chosen_ids", "rejected_ids")}
            for _ in range(n)]


def sequences(pairs):
    """(prompt, response) as lists, in the order of pack."""
    return [(p["prompt_ids"].tolist(), p[k].tolist()) for p in pairs for k in ("chosen_ids", "rejected_ids")]


def alone(lm, pairs):
    """Log-probs of all response tokens, in the order of pack, from a plain model that sees one sequence at a time."""
    logp = []
    for prompt, response in sequences(pairs):
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        logp.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(logp)


def saved(policy, model, folder):
    """The weights of the folder that the policy is saved as."""
    folder.mkdir()
    policy.reshard()                                                    # as train.py after a pass without gradient
    save_policy(policy, str(folder), torch.float32, *chat.load_tokenizer(model), 0)
    return load_file(folder / "model.safetensors")


def plain(folder, **config):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **config)


# ---------------------------------------------------------------------------------------------- rows and segments


def test_a_pair_by_hand():
    pair = {"prompt_ids": array("i", [10, 11, 12]), "chosen_ids": array("i", [20, 21]), "rejected_ids": array("i", [30])}
    segments = {"packed_sdpa": {"rows": [[[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]], "back": [0, 1, 2, 3, 4, 8]},
                "packed_varlen": {"flat": [0, 1, 2, 3, 4, 0, 1, 2, 5], "starts": [0, 5, 9], "longest": 5, "back": [0, 1, 2, 3, 4, 8]}}
    for kernel in KERNELS:
        row, lengths, padding = pack([pair], kernel)
        own = row.pop("segments")
        assert {k: v.tolist() for k, v in row.items()} == {
            "input_ids": [[10, 11, 12, 20, 21, 30]], "position_ids": [[0, 1, 2, 3, 4, 3]], "index": [2, 3, 2], "labels": [20, 21, 30]}
        assert lengths.tolist() == [2, 1] and padding == pytest.approx(0.1 if kernel == "packed_sdpa" else 0.0, abs=1e-12)
        assert {k: [r.tolist() for r in v] if k == "rows" else v if k == "longest" else v.tolist() for k, v in own.items()} == segments[kernel]
    assert own["starts"].dtype == torch.int32                           # the kernel reads no other


def test_sequences_of_unlike_lengths_are_in_blocks_of_their_own():
    segments, slots = layout([torch.tensor([0, 1, 6]), torch.arange(6)], "packed_sdpa")
    assert [r.tolist() for r in segments["rows"]] == [[[0, 1, 2, 3, 4, 5]], [[0, 1, 6]]] and slots == 9
    assert segments["back"].tolist() == [0, 1, 2, 3, 4, 5, 8]
    segments, slots = layout([torch.arange(7), torch.arange(8), torch.arange(10)], "packed_sdpa")
    assert [r.shape for r in segments["rows"]] == [(2, 10), (1, 7)] and slots == 27                     # 8 is four fifths of 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_segments_hold_every_sequence_once_and_give_every_token_back(kernel):
    for seed in range(100):
        pairs = random_pairs(1 + seed % 9, seed, longest=(3, 40, 200)[seed % 3])
        row, lengths, padding = pack(pairs, kernel)
        ids, segments = row["input_ids"][0], row["segments"]
        assert len(ids) == sum(len(v) for p in pairs for v in p.values())                               # a prompt once, nothing else
        if kernel == "packed_sdpa":                                     # index 0 begins a sequence, so at an end it is padding
            found = [r[:1 + r.nonzero().max()] for block in segments["rows"] for r in block]
            slots = torch.cat([block.flatten() for block in segments["rows"]])
        else:
            slots, starts = segments["flat"], segments["starts"]
            found = slots.split(starts.diff().tolist())
            assert starts[0] == 0 and starts[-1] == len(slots) and segments["longest"] == starts.diff().max()
        assert sorted(ids[f].tolist() for f in found) == sorted(p + r for p, r in sequences(pairs))
        assert all(row["position_ids"][0, f].tolist() == list(range(len(f))) for f in found)
        assert torch.equal(slots[segments["back"]], torch.arange(len(ids)))
        assert padding == pytest.approx(1 - sum(map(len, found)) / len(slots), abs=1e-12)
        assert 0 <= padding < 0.2 if kernel == "packed_sdpa" else padding == 0


def test_the_trained_labels_of_a_row_read_as_the_responses(tiny_model, tmp_path):
    texts = write_pairs(tmp_path / "pairs.jsonl", 7)
    tokenizer, ends = chat.load_tokenizer(tiny_model)
    records, _ = pairs.read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, ends, 2560)
    row, lengths, _ = pack(records, "packed_sdpa")
    ids, positions, index = row["input_ids"][0], row["position_ids"][0], row["index"].split(lengths.tolist())
    labels = row["labels"].split(lengths.tolist())
    assert [tokenizer.decode(part) for part in labels] == [t[key][0]["content"] + "<|end|>" for t in texts for key in ("chosen", "rejected")]
    for n, (predicted_at, part) in enumerate(zip(index, labels)):
        record, last = records[n // 2], predicted_at[0].item()          # the first token is predicted at the prompt's last ...
        prompt = slice(last + 1 - len(record["prompt_ids"]), last + 1)
        assert ids[prompt].tolist() == record["prompt_ids"].tolist() and positions[prompt].tolist() == list(range(len(record["prompt_ids"])))
        assert torch.equal(ids[predicted_at[1:]], part[:-1])            # ... each other where the one before it stands
        assert positions[predicted_at].tolist() == [len(record["prompt_ids"]) - 1 + i for i in range(len(part))]
    assert tokenizer.decode(records[0]["prompt_ids"]) == f"<s><|user|>{texts[0]['prompt'][0]['content']}<|end|><|assistant|>"


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_of_no_pairs_has_a_token_and_no_labels(kernel):
    row, lengths, padding = pack([], kernel)
    assert row["input_ids"].shape == row["position_ids"].shape == (1, 1) and padding == 0
    assert len(row["labels"]) == len(row["index"]) == lengths.sum() == 0 and row["segments"]["back"].tolist() == [0]


# ---------------------------------------------------------------------------------------------- against plain transformers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_log_probs_equal_each_sequence_alone_in_plain_transformers(architecture, mesh, tmp_path):
    settings = ARCHITECTURES[architecture]
    model, pairs = build_model(tmp_path / "model", architecture, **settings), random_pairs(7)
    policy, (row, lengths, _) = build(model, mesh), pack(pairs, "packed_sdpa")
    with torch.no_grad():
        packed, reference = policy(**row), alone(plain(model), pairs)
        assert policy.kernel == "packed_sdpa" and len(packed) == lengths.sum()
        assert (packed - reference).abs().max() < 1e-5
        for key in settings.keys() & {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}:       # each one matters
            wrong = alone(plain(model, **{key: settings[key] + 1}), pairs)
            assert (packed - wrong).abs().max() > 1e-3, key
    before, after = load_file(model / "model.safetensors"), saved(policy, model, tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("architecture, recompute", [("Llama", False), ("Llama", True), ("Gemma2", False)])
def test_packed_gradients_equal_those_of_plain_transformers(architecture, recompute, mesh, tmp_path):
    model, pairs = build_model(tmp_path / "model", architecture, **ARCHITECTURES[architecture]), random_pairs(7)
    policy, lm, (row, lengths, _) = build(model, mesh, recompute=recompute), plain(model), pack(pairs, "packed_sdpa")
    share = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(0))     # each token counts differently
    (policy(**row) * share).sum().backward()
    (alone(lm, pairs) * share).sum().backward()
    ours = {name: p.grad.full_tensor() for name, p in policy.lm.named_parameters()}
    assert ours.keys() == dict(lm.named_parameters()).keys()
    for name, p in lm.named_parameters():
        assert p.grad.norm() > 0 and (ours[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name


def test_layers_that_would_mix_the_sequences_of_a_row_are_refused(mesh, tmp_path):
    model = build_model(tmp_path / "model", "Lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(SystemExit) as end:
        build(model, mesh)
    assert "Lfm2ForCausalLM is not supported (['conv']" in str(end.value)


# ---------------------------------------------------------------------------------------------- one kernel against the other


class Attention(torch.nn.Module):
    """Stands for a layer of transformers, of which the kernels read the name only."""


def heads(row, width, dtype=torch.float32, device="cpu"):
    """Random query (1, 4, T, d), key and value (1, 2, T, d) for a row."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, row["input_ids"].shape[1], width, generator=draw).to(device, dtype).requires_grad_() for n in (4, 2, 2)]


def both(pairs, window, width=8, dtype=torch.float32, device="cpu"):
    """Output and gradients of packed_sdpa in float32 and of packed_varlen in `dtype` on the same heads."""
    results = []
    for kernel, attention in zip(KERNELS, (packed_sdpa, packed_varlen)):
        row, _, _ = pack(pairs, kernel)
        qkv = heads(row, width, dtype, device)
        used = [x.float() for x in qkv] if attention is packed_sdpa else qkv
        segments = {k: [r.to(device) for r in v] if k == "rows" else v if k == "longest" else v.to(device) for k, v in row["segments"].items()}
        out, _ = attention(Attention(), *used, None, scaling=0.3, segments=segments, sliding_window=window)
        share = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
        (out * share).sum().backward()
        results.append([out, *(x.grad for x in qkv)])
    return results


@pytest.mark.parametrize("window", [None, 16])
def test_packed_varlen_equals_packed_sdpa(window, monkeypatch):
    signature = inspect.signature(varlen.varlen_attn)                   # of the real kernel: wrong arguments do not bind

    def one_by_one(*args, **settings):
        call = signature.bind(*args, **settings)
        call.apply_defaults()
        a = call.arguments
        (left, right), starts, outputs = a["window_size"], a["cu_seq_q"], []
        assert right == 0 and torch.equal(starts, a["cu_seq_k"]) and starts.dtype == torch.int32
        assert a["max_q"] == a["max_k"] == starts.diff().max() and (a["enable_gqa"] or a["query"].shape == a["key"].shape == a["value"].shape)
        for i, j in zip(starts[:-1], starts[1:]):
            back = torch.arange(j - i)[:, None] - torch.arange(j - i)   # how far behind the query a key is
            seen = (back >= 0) & ((left < 0) | (back <= left))
            scores = torch.einsum("qhd,khd->hqk", a["query"][i:j], a["key"][i:j]) * a["scale"]
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), a["value"][i:j]))
        return torch.cat(outputs)

    monkeypatch.setattr(varlen, "varlen_attn", one_by_one)
    for a, b in zip(*both(random_pairs(7), window)):
        assert (a - b).abs().max() < 1e-5


def test_the_window_matters_to_the_pairs_it_is_tested_with():
    (wide, *_), (narrow, *_) = (packed_sdpa(Attention(), *heads(row, 8), None, scaling=0.3, segments=row["segments"], sliding_window=w)
                                for row, w in ((pack(random_pairs(7), "packed_sdpa")[0], w) for w in (17, 16)))
    assert (wide - narrow).abs().max() > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
@pytest.mark.parametrize("window", [None, 16])
def test_packed_varlen_equals_packed_sdpa_on_a_gpu_in_bfloat16(window):
    for a, b in zip(*both(random_pairs(7), window, 64, torch.bfloat16, "cuda")):
        assert (a.float() - b.float()).norm() < 0.02 * a.float().norm()


@pytest.mark.parametrize("attention, extra", [(packed_sdpa, "s_aux"), (packed_varlen, "s_aux"), (packed_varlen, "softcap")])
def test_what_a_kernel_cannot_compute_it_refuses(attention, extra):
    row, _, _ = pack(random_pairs(1), attention.__name__)
    with pytest.raises(SystemExit) as end:
        attention(Attention(), *heads(row, 8), None, scaling=0.3, segments=row["segments"], **{extra: torch.ones(4) if extra == "s_aux" else 2.0})
    assert "Attention: " in str(end.value) and {"s_aux": "sinks", "softcap": "soft-capping"}[extra] in str(end.value)


# ---------------------------------------------------------------------------------------------- FLOPs and adapters


def test_flops_by_hand(tiny_model, mesh):
    pair = {"prompt_ids": [1] * 3, "chosen_ids": [1] * 2, "rejected_ids": [1]}
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32            # q and o, k and v, the MLP's three, two norms
    rest = 2 * 262 * 32 * 3 + 2 * 2 * (4 * 8) * (5**2 + 4**2 - 3**2)    # the head where a response token is predicted; attention
    assert flops(build(tiny_model, mesh), [pair]) == 3 * (2 * 2 * layer * 6 + rest) == 831360
    adapters = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert flops(build(tiny_model, mesh, lora_rank=4), [pair, pair]) == 2 * 2 * (2 * 2 * (layer + adapters) * 6 + rest) == 2 * 652544


def test_adapters_start_at_the_model_and_are_saved_merged_as_the_policy_computes(tiny_model, mesh, tmp_path):
    pairs = random_pairs(7)
    policy, (row, _, _) = build(tiny_model, mesh, lora_rank=4, lora_alpha=6.0), pack(pairs, "packed_sdpa")
    trained = {name: p for name, p in policy.lm.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(".lora_" in name for name in trained)              # A and B, layers, linear maps of each
    with torch.no_grad():
        start = policy(**row)
        assert (start - alone(plain(tiny_model), pairs)).abs().max() < 1e-5
        policy.reshard()
        draw = torch.Generator().manual_seed(0)
        for name, p in trained.items():
            if ".lora_B." in name:
                p.to_local().normal_(0, 0.05, generator=draw)
        moved = policy(**row)
        before, after = load_file(tiny_model / "model.safetensors"), saved(policy, tiny_model, tmp_path / "saved")
        assert (moved - alone(plain(tmp_path / "saved"), pairs)).abs().max() < 1e-5 < 0.1 < (moved - start).abs().max()
    assert before.keys() == after.keys()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {k for k in before if k.endswith("_proj.weight")}
