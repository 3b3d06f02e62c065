"""packing.py: rows and segments by hand, and one attention function against the other."""

import inspect
import random
from array import array

import pytest
import torch
from conftest import write_pairs
from torch.nn.attention import varlen

from nanoaipo import chat, pairs
from nanoaipo.errors import InputError
from nanoaipo.packing import pack, packed_sdpa, packed_varlen, plan, segments_of

KERNELS = ("packed_sdpa", "packed_varlen")


def random_pairs(n, seed=0, longest=40):
    """Pairs of random ids of the tiny model's plain tokens, as pairs.py reads them."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        pair = {}
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            length = rng.randint(1, longest)
            pair[key] = array("i", rng.choices(range(6, 262), k=length))
        made.append(pair)
    return made


def prompts_with_responses(pairs):
    """(prompt, response) as lists of ids, in the order of pack."""
    sequences = []
    for pair in pairs:
        for key in ("chosen_ids", "rejected_ids"):
            sequences.append((pair["prompt_ids"].tolist(), pair[key].tolist()))
    return sequences


# ---- rows and segments ----


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pair_by_hand(kernel):
    pair = {
        "prompt_ids": array("i", [10, 11, 12]),
        "chosen_ids": array("i", [20, 21]),
        "rejected_ids": array("i", [30]),
    }

    row, lengths, padding = pack([pair], kernel)

    assert row.keys() == {"input_ids", "position_ids", "index", "labels", "segments"}
    assert row["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert row["index"].tolist() == [2, 3, 2]
    assert row["labels"].tolist() == [20, 21, 30]
    assert lengths.tolist() == [2, 1]

    segments = row["segments"]
    assert segments["back"].tolist() == [0, 1, 2, 3, 4, 8]
    if kernel == "packed_sdpa":
        assert segments.keys() == {"rows", "back"}
        assert [rows.tolist() for rows in segments["rows"]] == [[[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]]
        assert padding == pytest.approx(0.1, abs=1e-12)
    else:
        assert segments.keys() == {"flat", "starts", "longest", "back"}
        assert segments["flat"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
        assert segments["starts"].tolist() == [0, 5, 9]
        assert segments["starts"].dtype == torch.int32  # the kernel reads no other
        assert segments["longest"] == 5
        assert padding == pytest.approx(0.0, abs=1e-12)


def test_the_same_pair_in_padded_rows():
    pair = {
        "prompt_ids": array("i", [10, 11, 12]),
        "chosen_ids": array("i", [20, 21]),
        "rejected_ids": array("i", [30]),
    }

    row, lengths, padding = pack([pair], "padded")

    assert row.keys() == {"input_ids", "position_ids", "index", "labels"}
    assert row["input_ids"].tolist() == [[10, 11, 12, 20, 21], [10, 11, 12, 30, 0]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    assert row["index"].tolist() == [2, 3, 7]
    assert row["labels"].tolist() == [20, 21, 30]
    assert lengths.tolist() == [2, 1]
    assert padding == pytest.approx(0.1, abs=1e-12)


def test_padded_rows_predict_the_labels_of_the_packed_row_in_its_order():
    pairs = random_pairs(7)

    packed, lengths, _ = pack(pairs, "packed_sdpa")
    padded, padded_lengths, padding = pack(pairs, "padded")

    assert torch.equal(padded["labels"], packed["labels"])
    assert torch.equal(padded_lengths, lengths)
    for key in ("input_ids", "position_ids"):
        before = packed[key].flatten()[packed["index"]]
        assert torch.equal(padded[key].flatten()[padded["index"]], before)
    n_tokens = sum(len(p) + len(r) for p, r in prompts_with_responses(pairs))
    assert padding == pytest.approx(1 - n_tokens / padded["input_ids"].numel(), abs=1e-12)


@pytest.mark.parametrize("kernel", (*KERNELS, "padded"))
def test_a_process_without_pairs_computes_one_token_and_no_label(kernel):
    row, lengths, padding = pack([], kernel)

    assert row["input_ids"].shape == (1, 1)
    assert len(row["index"]) == len(row["labels"]) == len(lengths) == 0
    assert padding == 0


def test_padded_micro_batches_hold_pairs_of_about_one_length_within_the_budget():
    rng = random.Random(0)
    lengths = [rng.randint(10, 400) for _ in range(50)]

    steps = plan(lengths, list(range(50)), 20, 2, 500, padded=True)

    assert len(steps) == 3
    planned = []
    for step in steps:
        for micro_batch in step:
            assert len(micro_batch) == 2  # a list for each process
            for indices in micro_batch:
                planned += indices
                longest = max((lengths[i] for i in indices), default=0)
                assert len(indices) == 1 or longest * len(indices) <= 500
    assert sorted(planned) == list(range(50))


def test_sequences_of_unlike_lengths_are_in_blocks_of_their_own():
    short_and_long = [torch.tensor([0, 1, 6]), torch.arange(6)]

    segments, n_slots = segments_of(short_and_long, "packed_sdpa")

    assert [rows.tolist() for rows in segments["rows"]] == [[[0, 1, 2, 3, 4, 5]], [[0, 1, 6]]]
    assert segments["back"].tolist() == [0, 1, 2, 3, 4, 5, 8]
    assert n_slots == 9

    # 8 is four fifths of 10, so these two share a block; 7 is less
    near_the_limit = [torch.arange(7), torch.arange(8), torch.arange(10)]

    segments, n_slots = segments_of(near_the_limit, "packed_sdpa")

    assert [rows.shape for rows in segments["rows"]] == [(2, 10), (1, 7)]
    assert n_slots == 27


def sequences_of_blocks(blocks):
    """The sequences in the padded blocks of packed_sdpa: lists of places in the row."""
    sequences = []
    for block in blocks:
        for row in block:
            # Place 0 begins every sequence of the first pair; at an end it is padding
            last = row.nonzero().max()
            sequences.append(row[: 1 + last])
    return sequences


@pytest.mark.parametrize("kernel", KERNELS)
def test_segments_hold_every_sequence_once_and_give_every_token_back(kernel):
    for seed in range(100):
        pairs = random_pairs(1 + seed % 9, seed, longest=(3, 40, 200)[seed % 3])

        row, _, padding = pack(pairs, kernel)

        # Each prompt is there once, and nothing besides prompts and responses
        ids = row["input_ids"][0]
        assert len(ids) == sum(len(part) for pair in pairs for part in pair.values())

        segments = row["segments"]
        if kernel == "packed_sdpa":
            sequences = sequences_of_blocks(segments["rows"])
            slots = torch.cat([block.flatten() for block in segments["rows"]])
            assert 0 <= padding < 0.2
        else:
            slots = segments["flat"]
            starts = segments["starts"]
            sequences = slots.split(starts.diff().tolist())
            assert starts[0] == 0
            assert starts[-1] == len(slots)
            assert segments["longest"] == starts.diff().max()
            assert padding == 0

        expected = [prompt + response for prompt, response in prompts_with_responses(pairs)]
        assert sorted(ids[places].tolist() for places in sequences) == sorted(expected)
        for places in sequences:
            assert row["position_ids"][0, places].tolist() == list(range(len(places)))
        assert torch.equal(slots[segments["back"]], torch.arange(len(ids)))
        n_tokens = sum(len(places) for places in sequences)
        assert padding == pytest.approx(1 - n_tokens / len(slots), abs=1e-12)


def test_the_trained_labels_of_a_row_read_as_the_responses(tiny_model, tmp_path):
    texts = write_pairs(tmp_path / "pairs.jsonl", 7)
    tokenizer, eos_ids = chat.load_tokenizer(tiny_model)
    records, _ = pairs.read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, eos_ids, 2560)

    row, lengths, _ = pack(records, "packed_sdpa")

    # The labels are the responses with their end token
    labels = row["labels"].split(lengths.tolist())
    expected = []
    for text in texts:
        for key in ("chosen", "rejected"):
            expected.append(text[key][0]["content"] + "<|end|>")
    assert [tokenizer.decode(response) for response in labels] == expected
    first_prompt = tokenizer.decode(records[0]["prompt_ids"])
    content = texts[0]["prompt"][0]["content"]
    assert first_prompt == f"<s><|user|>{content}<|end|><|assistant|>"

    ids = row["input_ids"][0]
    positions = row["position_ids"][0]
    index = row["index"].split(lengths.tolist())
    for n, (predicted_at, response) in enumerate(zip(index, labels)):
        prompt_ids = records[n // 2]["prompt_ids"].tolist()

        # The first token is predicted at the prompt's last ...
        end = predicted_at[0].item() + 1
        prompt_places = slice(end - len(prompt_ids), end)
        assert ids[prompt_places].tolist() == prompt_ids
        assert positions[prompt_places].tolist() == list(range(len(prompt_ids)))

        # ... each other where the one before it stands
        assert torch.equal(ids[predicted_at[1:]], response[:-1])
        first = len(prompt_ids) - 1
        assert positions[predicted_at].tolist() == list(range(first, first + len(response)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_of_no_pairs_has_a_token_and_no_labels(kernel):
    row, lengths, padding = pack([], kernel)

    assert row["input_ids"].shape == (1, 1)
    assert row["position_ids"].shape == (1, 1)
    assert row["segments"]["back"].tolist() == [0]
    assert len(row["labels"]) == 0
    assert len(row["index"]) == 0
    assert lengths.sum() == 0
    assert padding == 0


# ---- one attention function against the other ----


class Attention(torch.nn.Module):
    """Stands for a layer of transformers, of which the kernels read the name only."""


def random_heads(row, width, dtype=torch.float32, device="cpu"):
    """Random query (1, 4, T, d), key and value (1, 2, T, d) for a row."""
    rng = torch.Generator().manual_seed(0)
    n_tokens = row["input_ids"].shape[1]
    tensors = []
    for n_heads in (4, 2, 2):
        x = torch.randn(1, n_heads, n_tokens, width, generator=rng)
        tensors.append(x.to(device, dtype).requires_grad_())
    return tensors


def move_segments(segments, device):
    """The same segments on a device, as FSDP moves the arguments of the policy."""
    moved = {}
    for key, value in segments.items():
        if key == "rows":
            moved[key] = [rows.to(device) for rows in value]
        elif key == "longest":
            moved[key] = value
        else:
            moved[key] = value.to(device)
    return moved


def output_and_gradients(kernel, pairs, window, width=8, dtype=torch.float32, device="cpu"):
    """Output, and gradients of query, key and value; packed_sdpa computes in float32 always."""
    row, _, _ = pack(pairs, kernel)
    segments = move_segments(row["segments"], device)
    heads = random_heads(row, width, dtype, device)
    if kernel == "packed_sdpa":
        attention = packed_sdpa
        inputs = [x.float() for x in heads]
    else:
        attention = packed_varlen
        inputs = heads

    output, _ = attention(
        Attention(), *inputs, None, scaling=0.3, segments=segments, sliding_window=window
    )
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (output * weights).sum().backward()
    return [output, *(x.grad for x in heads)]


def one_by_one(query, key, value, starts, left, scale):
    """What the variable-length kernel computes: sequence after sequence, in plain operations."""
    outputs = []
    for i, j in zip(starts[:-1], starts[1:]):
        distance = torch.arange(j - i)[:, None] - torch.arange(j - i)  # from query back to key
        mask = distance >= 0
        if left >= 0:
            mask &= distance <= left
        scores = torch.einsum("qhd,khd->hqk", query[i:j], key[i:j]) * scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[i:j]))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 16])
def test_packed_varlen_equals_packed_sdpa(window, monkeypatch):
    signature = inspect.signature(varlen.varlen_attn)  # of the real kernel

    def stand_in(*args, **settings):
        call = signature.bind(*args, **settings)  # wrong arguments do not bind
        call.apply_defaults()
        given = call.arguments
        query, key, value = given["query"], given["key"], given["value"]
        starts = given["cu_seq_q"]
        left, right = given["window_size"]
        assert right == 0
        assert torch.equal(starts, given["cu_seq_k"])
        assert starts.dtype == torch.int32
        assert given["max_q"] == given["max_k"] == starts.diff().max()
        assert given["enable_gqa"] or query.shape == key.shape == value.shape
        return one_by_one(query, key, value, starts, left, given["scale"])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    pairs = random_pairs(7)

    padded = output_and_gradients("packed_sdpa", pairs, window)
    flat = output_and_gradients("packed_varlen", pairs, window)

    for a, b in zip(padded, flat):
        assert (a - b).abs().max() < 1e-5


def test_the_window_matters_to_the_pairs_it_is_tested_with():
    pairs = random_pairs(7)

    wide = output_and_gradients("packed_sdpa", pairs, 17)[0]
    narrow = output_and_gradients("packed_sdpa", pairs, 16)[0]

    assert (wide - narrow).abs().max() > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
@pytest.mark.parametrize("window", [None, 16])
def test_packed_varlen_equals_packed_sdpa_on_a_gpu_in_bfloat16(window):
    pairs = random_pairs(7)

    padded = output_and_gradients("packed_sdpa", pairs, window, 64, torch.bfloat16, "cuda")
    flat = output_and_gradients("packed_varlen", pairs, window, 64, torch.bfloat16, "cuda")

    for a, b in zip(padded, flat):
        assert (a.float() - b.float()).norm() < 0.02 * a.float().norm()


@pytest.mark.parametrize(
    "attention, extra, reason",
    [
        (packed_sdpa, {"s_aux": torch.ones(4)}, "attention sinks are not supported"),
        (packed_varlen, {"s_aux": torch.ones(4)}, "no soft-capping and no attention sinks"),
        (packed_varlen, {"softcap": 2.0}, "no soft-capping and no attention sinks"),
        (packed_sdpa, {"position_bias": 1.0}, "the argument 'position_bias' .* is unknown"),
        (packed_varlen, {"position_bias": 1.0}, "the argument 'position_bias' .* is unknown"),
    ],
)
def test_what_a_kernel_cannot_compute_it_refuses(attention, extra, reason):
    row, _, _ = pack(random_pairs(1), attention.__name__)
    heads = random_heads(row, 8)

    with pytest.raises(InputError, match=f"^Attention: .*{reason}"):
        attention(Attention(), *heads, None, scaling=0.3, segments=row["segments"], **extra)
