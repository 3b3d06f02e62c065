"""Which process computes what when; a micro-batch as one row; attention over its sequences.

A micro-batch is one row of tokens, (1, T), without padding. A pair is laid out as prompt, chosen, rejected: each token of the
prompt is computed once (prefix sharing, 2410.20305), and only attention knows that these are two sequences. transformers
hands its layers' queries, keys and values to the two attention functions, registered under names of their own.
"""
import sys

import torch
import torch.nn.functional as F
from transformers import AttentionInterface


def batches_by_length(lengths, budget):
    """Yield lists of indices, longest first, so that a list padded to its longest takes `budget` tokens at most (or is one alone)."""
    order, at = sorted(range(len(lengths)), key=lambda i: -lengths[i]), 0
    while at < len(order):
        batch = order[at:at + max(1, budget // lengths[order[at]])]
        yield batch
        at += len(batch)


def plan(lengths, order, batch_size, world_size, budget):
    """Fix which process computes which pairs when: for each step a list of micro-batches, one list of pairs per process.

    lengths: tokens to compute for each pair. order: the pairs' indices as the optimizer shall see them, batch_size a
    step, the last step with what is left. Each step's pairs are dealt to equally many micro-batches on every process,
    longest first into the emptiest, so that none exceeds `budget` tokens (unless one pair alone does). An empty list is
    a micro-batch that a process computes only because the others need its collectives.
    """
    steps = []
    for start in range(0, len(order), batch_size):
        batch = sorted(order[start:start + batch_size], key=lambda i: -lengths[i])
        most = -(-len(batch) // world_size)                              # one pair each
        count = min(most, -(-sum(lengths[i] for i in batch) // (budget * world_size)))
        while True:
            groups = [[0, g, []] for g in range(count * world_size)]
            for i in batch:
                emptiest = min(groups)
                emptiest[0] += lengths[i]
                emptiest[2].append(i)
            if max(groups)[0] <= budget or count == most:
                break
            count += 1
        groups = [sorted(g) for _, _, g in sorted(groups, reverse=True)]
        steps.append([groups[m * world_size:(m + 1) * world_size] for m in range(count)])
    return steps


def pack(pairs, kernel):
    """The row of these B pairs: (arguments of Policy.forward, response tokens of each sequence, share of padding).

    One pair of prompt 3 with responses of 2 and 1 tokens:

        input_ids, position_ids   (1, T)    [[p p p c c r]] and [[0 1 2 3 4 3]]
        index, labels             (N,)      where each response token is predicted, [2 3 2], and its id
        segments                  dict      of the sequences [0 1 2 3 4] and [0 1 2 5], as the kernel wants them
        lengths                   (2B,)     [2 1], of chosen and rejected of each pair in turn

    The row has no padding; the rows of packed_sdpa, in which attention alone is computed, have a little.
    """
    ids, positions, sequences, index, labels, at = [], [], [], [], [], 0
    for pair in pairs:
        prompt, chosen, rejected = (torch.frombuffer(pair[k], dtype=torch.int32).long() for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
        p, w, l = len(prompt), len(chosen), len(rejected)
        places = torch.arange(at, at := at + p + w + l)
        ids += [prompt, chosen, rejected]
        positions += [torch.arange(p + w), torch.arange(p, p + l)]
        sequences += [places[:p + w], torch.cat([places[:p], places[p + w:]])]
        index += [s[p - 1:-1] for s in sequences[-2:]]
        labels += [chosen, rejected]
    if not pairs:                                                       # collectives need a row, if only of one token
        ids = positions = sequences = [torch.zeros(1, dtype=torch.long)]
        index = labels = [torch.zeros(0, dtype=torch.long)]
    segments, slots = layout(sequences, kernel)
    row = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None], "index": torch.cat(index), "labels": torch.cat(labels)}
    return row | {"segments": segments}, torch.tensor([len(x) for x in labels[:2 * len(pairs)]]), 1 - sum(map(len, sequences)) / slots


def layout(sequences, kernel):
    """(What the kernel needs to know of a row of T tokens, the slots it computes).

    sequences: tensors of the places of each one's tokens in the row, together covering it; a token may be in two.

        packed_sdpa     rows   list of (n, L) indices, sequences of about one length, padded by index 0
        packed_varlen   flat   (S,) indices, sequence after sequence; starts (n + 1,); longest
        both            back   (T,) where in the kernel's output a token is found
    """
    blocks = []
    for ids in sorted(sequences, key=len, reverse=True):
        if not blocks or kernel == "packed_sdpa" and len(ids) < 0.8 * len(blocks[-1][0]):
            blocks.append([])                                           # so at most a fifth of a row is padding
        blocks[-1].append(ids)
    rows = [torch.nn.utils.rnn.pad_sequence(block, True, -1) for block in blocks]                            # (n, L)
    slots = torch.cat([r.flatten() for r in rows])
    if kernel == "packed_varlen":
        slots = slots[slots >= 0]
    real = slots >= 0
    back = torch.full((1 + slots.max(),), len(slots)).scatter_reduce_(0, slots[real], torch.arange(len(slots))[real], "amin")   # the first place
    if kernel == "packed_sdpa":
        return {"rows": [r.clamp(min=0) for r in rows], "back": back}, len(slots)
    starts = torch.tensor([0] + [len(ids) for ids in blocks[0]])
    return {"flat": slots, "starts": starts.cumsum(0, dtype=torch.int32), "longest": len(blocks[0][0]), "back": back}, len(slots)


def take(x, index):
    """Rows of x (T, H, d) by index (...,): (..., H, d). An embedding, because its backward pass is fast and repeatable."""
    return F.embedding(index, x.reshape(len(x), -1)).unflatten(-1, x.shape[1:])


@torch.compiler.disable
def packed_sdpa(module, query, key, value, attention_mask, scaling=None, segments=None, sliding_window=None, softcap=None, s_aux=None, **_):
    """Causal attention within each sequence: (1, H, T, d) -> (1, T, H, d). Runs anywhere; soft-caps and windows are exact."""
    if s_aux is not None:
        sys.exit(f"{module.__class__.__name__}: attention sinks are not supported")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))                                # (T, H, d)
    outputs = []
    for rows in segments["rows"]:
        q, k, v = (take(x, rows).transpose(1, 2) for x in (query, key, value))                             # (n, H, L, d)
        length = rows.shape[1]
        seen = None                                                     # causal; padding is last, so no token sees it
        if softcap is not None or sliding_window is not None and length > sliding_window:
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            seen = seen if sliding_window is None else seen.triu(1 - sliding_window)
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=True)
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            scores = softcap * torch.tanh((q @ k.transpose(2, 3)) * scaling / softcap)
            out = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return take(torch.cat(outputs), segments["back"])[None], None


def packed_varlen(module, query, key, value, attention_mask, scaling=None, segments=None, sliding_window=None, softcap=None, s_aux=None, **_):
    """The same by PyTorch's variable-length flash kernel: CUDA, 16 bits, no soft-caps."""
    from torch.nn.attention import varlen
    if s_aux is not None or softcap is not None:
        sys.exit(f"{module.__class__.__name__}: the variable-length kernel has no soft-capping and no attention sinks")
    q, k, v = (take(x[0].transpose(0, 1), segments["flat"]) for x in (query, key, value))                  # (S, H, d)
    starts, longest = segments["starts"], segments["longest"]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens to the left, none to the right
    out = varlen.varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=window)
    return take(out, segments["back"])[None], None


AttentionInterface.register("packed_sdpa", packed_sdpa)
AttentionInterface.register("packed_varlen", packed_varlen)
