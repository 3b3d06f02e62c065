"""Which process computes what when; a micro-batch as rows; attention over its sequences.

A micro-batch is one row of tokens, (1, T), without padding. A pair lies in it as prompt, chosen,
rejected, so each token of the prompt is computed once (prefix sharing, 2410.20305). Only attention
has to know that these are two sequences with a common beginning: its argument `segments` tells it
where each one's tokens stand in the row. Everything else in a transformer treats its tokens one by
one.

There are two attention functions ("kernels"). Both copy the sequences out of the row, attend within
each, and copy one result per token back:

    packed_sdpa      PyTorch's scaled_dot_product_attention on padded blocks; runs anywhere
    packed_varlen    PyTorch's variable-length flash attention on a flat list; CUDA, 16 bits

Where these would be wrong (layouts.py finds out), a micro-batch is padded rows with one sequence
each, and the model's own attention computes them. Our word for that kernel is "padded".
"""

import math

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from nanoaipo.errors import InputError

# ---- which process computes what when ----


def batches_by_length(lengths, budget):
    """Yield lists of indices, longest first: the rankers' batches, and padded ones of training.

    A list padded to its longest takes `budget` tokens at most, or it is one index alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        size = max(1, budget // longest)
        yield order[start : start + size]
        start += size


def plan(lengths, order, batch_size, world_size, budget, padded=False):
    """For each step a list of micro-batches, and each micro-batch a list of pairs per process.

    lengths: tokens to compute for each pair. order: the pairs' indices as the optimizer shall see
    them, batch_size a step; the last step takes what is left. No micro-batch of a process exceeds
    `budget` tokens, unless one pair alone does. All processes compute equally many micro-batches,
    because their collectives have to meet; so a list may be empty.

    padded: a micro-batch of a process takes as many tokens as its longest pair times its pairs.
    """
    steps = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if padded:
            groups = padded_groups(lengths, batch, world_size, budget)
        else:
            groups = packed_groups(lengths, batch, world_size, budget)

        # Largest groups come first, so those of one micro-batch are about equally large, and no
        # process waits long for another
        starts = range(0, len(groups), world_size)
        steps.append([groups[k : k + world_size] for k in starts])
    return steps


def padded_groups(lengths, batch, world_size, budget):
    """The pairs of one step in groups, longest first; of a group all are about equally long."""
    groups = []
    for places in batches_by_length([lengths[i] for i in batch], budget):
        groups.append([batch[place] for place in places])
    while len(groups) % world_size:
        groups.append([])
    return groups


def packed_groups(lengths, batch, world_size, budget):
    """The pairs of one step in groups, fullest first; as few groups as the budget allows."""
    longest_first = sorted(batch, key=lambda i: -lengths[i])
    n_tokens = sum(lengths[i] for i in batch)

    # At least as many as the tokens fill; at most so many that each holds one pair per process
    most = math.ceil(len(batch) / world_size)
    n_micro_batches = min(most, math.ceil(n_tokens / (budget * world_size)))
    while True:
        groups, fullest = deal(lengths, longest_first, n_micro_batches * world_size)
        if fullest <= budget or n_micro_batches == most:
            return groups
        n_micro_batches += 1


def deal(lengths, longest_first, n_groups):
    """Deal pairs into groups, each to the one with the fewest tokens so far.

    Returns the groups, fullest first, and the tokens of the fullest.
    """
    groups = [[] for _ in range(n_groups)]
    n_tokens = [0] * n_groups
    for i in longest_first:
        emptiest = n_tokens.index(min(n_tokens))
        groups[emptiest].append(i)
        n_tokens[emptiest] += lengths[i]
    fullest_first = sorted(range(n_groups), key=lambda g: (n_tokens[g], g), reverse=True)
    return [sorted(groups[g]) for g in fullest_first], max(n_tokens)


def tokens_of_pairs(pairs, padded=False):
    """For each pair the tokens to compute: `lengths` of `plan`.

    The prompt counts once, or for padded rows as `pad` makes them twice, with the longer response.
    """
    n_tokens = []
    for pair in pairs:
        prompt = len(pair["prompt_ids"])
        chosen = len(pair["chosen_ids"])
        rejected = len(pair["rejected_ids"])
        if padded:
            n_tokens.append(2 * (prompt + max(chosen, rejected)))
        else:
            n_tokens.append(prompt + chosen + rejected)
    return n_tokens


# ---- a micro-batch as one row, or as padded rows ----


def pack(pairs, kernel):
    """The row of these B pairs: (arguments of Policy.forward, lengths of the responses, padding).

    One pair, of a prompt of 3 tokens with responses of 2 and 1 tokens:

        place in the row    0  1  2  3  4  5
        input_ids  (1, T)   p0 p1 p2 c0 c1 r0
        position_ids        0  1  2  3  4  3      (1, T): r0 follows p2, as c0 does
        sequences           [0 1 2 3 4] and [0 1 2 5], the places of each one's tokens
        index      (N,)     [2 3 2], the places whose hidden states predict c0, c1 and r0
        labels     (N,)     [c0 c1 r0]
        segments            the sequences as the kernel wants them, see `segments_of`
        lengths    (2B,)    [2 1], of chosen and rejected of each pair in turn

    N counts the response tokens of all pairs. padding: the share of what attention computes that is
    no token; the row itself has none. For the kernel "padded" there are rows as of `pad`.
    """
    if kernel == "padded":
        return pad(pairs)
    ids = []
    positions = []
    sequences = []
    index = []
    labels = []
    n_tokens = 0  # of the row so far: the next place
    for pair in pairs:
        prompt = as_tensor(pair["prompt_ids"])  # (P,)
        prompt_places = torch.arange(n_tokens, n_tokens + len(prompt))  # (P,)
        n_tokens += len(prompt)
        ids.append(prompt)
        positions.append(torch.arange(len(prompt)))

        for key in ("chosen_ids", "rejected_ids"):
            response = as_tensor(pair[key])  # (R,)
            places = torch.arange(n_tokens, n_tokens + len(response))  # (R,)
            n_tokens += len(response)
            ids.append(response)
            positions.append(torch.arange(len(prompt), len(prompt) + len(response)))

            # A token is predicted where the one before it stands: the first at the prompt's last
            sequence = torch.cat([prompt_places, places])  # (P + R,)
            sequences.append(sequence)
            index.append(sequence[len(prompt) - 1 : -1])
            labels.append(response)
    lengths = torch.tensor([len(response) for response in labels])  # (2B,)

    # A process without pairs computes one token and no label, for the sake of the collectives
    if not pairs:
        ids = positions = sequences = [torch.zeros(1, dtype=torch.long)]
        index = labels = [torch.zeros(0, dtype=torch.long)]

    segments, n_slots = segments_of(sequences, kernel)
    padding = 1 - sum(len(sequence) for sequence in sequences) / n_slots
    row = {
        "input_ids": torch.cat(ids)[None],  # (1, T)
        "position_ids": torch.cat(positions)[None],  # (1, T)
        "index": torch.cat(index),  # (N,)
        "labels": torch.cat(labels),  # (N,)
        "segments": segments,
    }
    return row, lengths, padding


def pad(pairs):
    """Rows (n, L) with one sequence each, padded on the right; returns what pack returns.

    The pair of pack's example, with places counted over both rows:

        input_ids     (n, L)   p0 p1 p2 c0 c1
                               p0 p1 p2 r0  0       padding is token 0
        position_ids  (n, L)   0  1  2  3  4
                               0  1  2  3  0
        index         (N,)     [2 3 7]
        labels, lengths        as of pack

    No mask is needed: padding stands last, so nothing causal sees it.
    """
    ids = []
    responses = []
    for pair in pairs:
        prompt = as_tensor(pair["prompt_ids"])  # (P,)
        for key in ("chosen_ids", "rejected_ids"):
            response = as_tensor(pair[key])  # (R,)
            ids.append(torch.cat([prompt, response]))
            responses.append(response)
    lengths = torch.tensor([len(response) for response in responses])  # (2B,)

    # A process without pairs computes one token and no label, for the sake of the collectives
    if not pairs:
        ids = [torch.zeros(1, dtype=torch.long)]
        responses = [torch.zeros(0, dtype=torch.long)]

    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (n, L)
    positions = [torch.arange(len(sequence)) for sequence in ids]
    longest = input_ids.shape[1]
    index = []
    for i, (sequence, response) in enumerate(zip(ids, responses)):
        # A token is predicted where the one before it stands
        end = i * longest + len(sequence) - 1
        index.append(torch.arange(end - len(response), end))
    row = {
        "input_ids": input_ids,
        "position_ids": torch.nn.utils.rnn.pad_sequence(positions, batch_first=True),  # (n, L)
        "index": torch.cat(index),  # (N,)
        "labels": torch.cat(responses),  # (N,)
    }
    padding = 1 - sum(len(sequence) for sequence in ids) / input_ids.numel()
    return row, lengths, padding


def as_tensor(buffer):
    """The int32 ids of an array as a tensor of int64, (T,)."""
    return torch.frombuffer(buffer, dtype=torch.int32).long()


def segments_of(sequences, kernel):
    """The segments of a row, a dict of what its kernel needs, and how many slots S it computes.

    sequences: a tensor for each, the places of its tokens in the row. Together they cover the row,
    and a token of a prompt is in two of them. A slot holds one token of one sequence, or padding.
    In the example of `pack`, where places 0, 1 and 2 are computed twice:

        packed_sdpa     rows     [[0 1 2 3 4], [0 1 2 5 0]], a list of such (n, L) blocks; the last
                                 0 is padding
                        back     [0 1 2 3 4 8], (T,), the slot that gives a token its result
        packed_varlen   flat     [0 1 2 3 4 0 1 2 5], (S,)
                        starts   [0 5 9], (n + 1,), int32, where in flat the sequences begin and end
                        longest  5
                        back     as above
    """
    longest_first = sorted(sequences, key=len, reverse=True)
    if kernel == "packed_varlen":
        return varlen_segments(longest_first)
    return sdpa_segments(longest_first)


def sdpa_segments(longest_first):
    """The segments of packed_sdpa."""
    # A block's sequences have about one length, so at most a fifth of it is padding
    blocks = []
    for sequence in longest_first:
        if not blocks or len(sequence) < 0.8 * len(blocks[-1][0]):
            blocks.append([])
        blocks[-1].append(sequence)
    rows = []
    for block in blocks:
        row = torch.nn.utils.rnn.pad_sequence(block, batch_first=True, padding_value=-1)  # (n, L)
        rows.append(row)

    # Padding has to be some token: the row's first. It stands last, so causal attention hides it
    slots = torch.cat([row.flatten() for row in rows])  # (S,)
    segments = {"rows": [row.clamp(min=0) for row in rows], "back": first_slots(slots)}
    return segments, len(slots)


def varlen_segments(longest_first):
    """The segments of packed_varlen."""
    flat = torch.cat(longest_first)  # (S,)
    lengths = torch.tensor([0] + [len(sequence) for sequence in longest_first])
    segments = {
        "flat": flat,
        "starts": lengths.cumsum(0, dtype=torch.int32),  # (n + 1,)
        "longest": len(longest_first[0]),
        "back": first_slots(flat),
    }
    return segments, len(flat)


def first_slots(slots):
    """For each token of the row, (T,), the first slot that computes it.

    slots (S,): the places of their tokens, -1 for padding. Any slot of a token would do: in both
    sequences of a pair a token of the prompt sees the same tokens.
    """
    real = slots >= 0
    numbers = torch.arange(len(slots))
    n_tokens = 1 + int(slots.max())
    back = torch.full((n_tokens,), len(slots))
    return back.scatter_reduce_(0, slots[real], numbers[real], "amin")


# ---- attention over the sequences of a row, as transformers' layers call it ----

# Arguments that change nothing here: positions are in query and key, dropout is off (policy.py)
HARMLESS = {
    "cache_position",
    "dropout",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


def refuse_others(module, segments, attention_mask, s_aux, others):
    """Raise InputError for what attention is asked to do, and our functions cannot."""
    layer = module.__class__.__name__
    if segments is None:
        raise InputError(f"{layer}: layers do not hand the row's sequences to attention")
    if s_aux is not None:
        raise InputError(f"{layer}: attention sinks are not supported")
    if attention_mask is not None:
        raise InputError(f"{layer}: a mask of its own")
    for key, value in others.items():
        if key not in HARMLESS and value is not None:
            raise InputError(f"{layer}: the argument '{key}' of attention is unknown")


def take(x, index):
    """Rows of x (T, H, d) by index (...,): (..., H, d).

    An embedding, because its backward pass is fast and gives the same bits each time.
    """
    n_tokens, n_heads, width = x.shape
    rows = F.embedding(index, x.reshape(n_tokens, -1))  # (..., H * d)
    return rows.unflatten(-1, (n_heads, width))


def causal_mask(length, sliding_window, device):
    """(L, L), true where a query (row) sees a key (column): itself and what is before it.

    With a sliding window these are `sliding_window` tokens in all, itself included.
    """
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if sliding_window is not None:
        mask = mask.triu(1 - sliding_window)
    return mask


def softcapped_attention(q, k, v, mask, scaling, softcap):
    """Attention (n, H, L, d) in plain operations, scores cut softly to +-softcap (Gemma-2)."""
    repeats = q.shape[1] // k.shape[1]  # query heads that share one key head
    k = k.repeat_interleave(repeats, 1)
    v = v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(2, 3)  # (n, H, L, L)
    scores = softcap * torch.tanh(scores * scaling / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v  # (n, H, L, d)


@torch.compiler.disable
def packed_sdpa(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    segments=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **others,
):
    """Causal attention within each sequence: (1, H, T, d) -> (1, T, H, d).

    Runs anywhere; soft-caps and windows are exact. Raises InputError for attention sinks, a mask,
    and arguments that it does not know.
    """
    refuse_others(module, segments, attention_mask, s_aux, others)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)

    outputs = []
    for rows in segments["rows"]:  # (n, L)
        q, k, v = (take(x, rows).transpose(1, 2) for x in (query, key, value))  # (n, H, L, d)
        length = rows.shape[1]
        if softcap is not None:
            mask = causal_mask(length, sliding_window, q.device)
            out = softcapped_attention(q, k, v, mask, scaling, softcap)
        elif sliding_window is not None and length > sliding_window:
            mask = causal_mask(length, sliding_window, q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True
            )
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (n * L, H, d)

    slots = torch.cat(outputs)  # (S, H, d)
    return take(slots, segments["back"])[None], None


def packed_varlen(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    segments=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **others,
):
    """What packed_sdpa computes, by PyTorch's variable-length flash kernel: CUDA, 16 bits.

    Raises InputError for soft-caps, which the kernel does not have, and for what packed_sdpa
    refuses.
    """
    from torch.nn.attention import varlen

    if s_aux is not None or softcap is not None:
        raise InputError(
            f"{module.__class__.__name__}: "
            "the variable-length kernel has no soft-capping and no attention sinks"
        )
    refuse_others(module, segments, attention_mask, s_aux, others)
    flat = segments["flat"]
    q, k, v = (take(x[0].transpose(0, 1), flat) for x in (query, key, value))  # (S, H, d)
    repeats = q.shape[1] // k.shape[1]  # query heads that share one key head
    k = k.repeat_interleave(repeats, 1)
    v = v.repeat_interleave(repeats, 1)

    left = -1  # tokens before itself that a query sees; -1: all of them
    if sliding_window is not None:
        left = sliding_window - 1
    starts = segments["starts"]
    longest = segments["longest"]
    slots = varlen.varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(left, 0)
    )  # (S, H, d)
    return take(slots, segments["back"])[None], None


# transformers finds them by these names, as attn_implementation
AttentionInterface.register("packed_sdpa", packed_sdpa)
AttentionInterface.register("packed_varlen", packed_varlen)
