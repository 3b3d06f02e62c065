"""PairRM's attention on a GPU: one kernel of Triton's, over sequences of any length end to end.

    sequences = lay_out(lengths, distance_buckets, device)
    context = fused_attention(query, key, value, key_table, query_table, sequences, scale)

DeBERTa adds two scores to that of query i and key j, which depend on the distance of the two
(2006.03654, Eq. 4). Distances share buckets, so plain products give both scores for every token and
bucket, and what is left is to read them for every i and j:

    scale * q_i · k_j  +  to_position[i, bucket(i - j)]  +  from_position[j, bucket(i - j)]

The kernel computes TILE queries and TILE keys at a time and keeps the softmax up to date as it goes
(FlashAttention, 2205.14135). The buckets of such a tile depend on how far it is from the diagonal
alone. They are laid out once, tile by tile, because the order in which a GPU reads decides how fast
it reads: neighbouring threads get the neighbouring buckets of one token.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 64
LOG2_E = tl.constexpr(1.4426950408889634)  # the kernel's exponentials are powers of two


class Sequences(NamedTuple):
    """What the kernel has to know of B sequences end to end, the same in all layers."""

    starts: torch.Tensor  # (B + 1,), int32, where they begin and end
    n_tiles: int  # of the longest, in one direction
    by_query: torch.Tensor  # (2 * n_tiles - 1, TILE, TILE), int16, buckets [query, key]
    by_key: torch.Tensor  # the same as [key, query]


def lay_out(lengths, distance_buckets, device):
    """The Sequences of these lengths.

    distance_buckets(L): the bucket of each distance i - j = L, ..., -L, (2L + 1,).
    """
    starts = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)  # (B + 1,)
    n_tiles = triton.cdiv(max(lengths), TILE)

    # the first tile holds the last queries and the first keys, the last one the other way round
    longest = n_tiles * TILE
    place = torch.arange(TILE, device=device)
    apart = TILE * torch.arange(1 - n_tiles, n_tiles, device=device)
    minus_distance = apart[:, None, None] + place - place[:, None]  # (2 * n_tiles - 1, TILE, TILE)
    by_query = distance_buckets(longest, device)[longest + minus_distance].short()
    return Sequences(starts, n_tiles, by_query, by_query.mT.contiguous())


def fused_attention(query, key, value, key_table, query_table, sequences, scale):
    """Attention within each sequence: (T, H * d) -> (T, H * d).

    key_table, query_table: (H, S, d), scaled keys and queries of S buckets of distances; d is a
    power of two.
    """
    n_tokens, width = query.shape
    heads, n_buckets, head_size = key_table.shape
    to_position = position_scores(query, key_table)  # (H, T, S)
    from_position = position_scores(key, query_table)  # (H, T, S)

    context = torch.empty_like(query)
    grid = (sequences.n_tiles, heads, len(sequences.starts) - 1)
    attention_kernel[grid](
        query,
        key,
        value,
        to_position,
        from_position,
        sequences.starts,
        sequences.n_tiles,
        sequences.by_query,
        sequences.by_key,
        context,
        scale,
        n_tokens,
        width,
        head_size,
        n_buckets,
        TILE,
    )
    return context


def position_scores(x, table):
    """x_i · table_s of x (T, H * d) and table (H, S, d): (H, T, S)."""
    heads, _, head_size = table.shape
    return x.unflatten(-1, (heads, head_size)).transpose(0, 1) @ table.mT


# else it would be compiled again where these are multiples of 16
@triton.jit(do_not_specialize=["n_tiles", "n_tokens"])
def attention_kernel(
    query,
    key,
    value,
    to_position,
    from_position,
    starts,
    n_tiles,
    by_query,
    by_key,
    context,
    scale,
    n_tokens,
    width,
    HEAD_SIZE: tl.constexpr,
    BUCKETS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of queries of one head of one sequence."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start
    first_i = tile * TILE
    if first_i >= length:
        return

    # its queries
    place = tl.arange(0, TILE)
    i = first_i + place
    columns = head * HEAD_SIZE + tl.arange(0, HEAD_SIZE)
    rows_i = (start + i)[:, None] * width + columns[None, :]  # (TILE, HEAD_SIZE)
    q = tl.load(query + rows_i, mask=(i < length)[:, None], other=0.0)

    # where the scores by bucket of this head and sequence begin, and then those of each query; what
    # is behind the sequence's end is read as its last token
    begin = (head * n_tokens + start).to(tl.int64) * BUCKETS
    to_position += begin
    from_position += begin
    offset_i = tl.minimum(i, length - 1)[:, None] * BUCKETS  # (TILE, 1)

    # the largest score so far, the sum of e^(score - largest), and the values weighted by these
    largest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE, HEAD_SIZE], tl.float32)
    for first_j in range(0, length, TILE):
        # a tile of keys and values
        j = first_j + place
        rows_j = (start + j)[:, None] * width + columns[None, :]  # (TILE, HEAD_SIZE)
        k = tl.load(key + rows_j, mask=(j < length)[:, None], other=0.0)
        v = tl.load(value + rows_j, mask=(j < length)[:, None], other=0.0)

        # scores of the distance; max_contiguous: neighbouring threads shall read one token's
        tiles_right = first_j // TILE - tile  # of the diagonal
        in_tile = place[:, None] * TILE + place[None, :]  # (TILE, TILE)
        in_tile += (tiles_right + n_tiles - 1) * TILE * TILE
        bucket = tl.max_contiguous(tl.load(by_query + in_tile), [1, TILE])  # [i, j]
        from_i = tl.load(to_position + (offset_i + bucket))
        bucket = tl.max_contiguous(tl.load(by_key + in_tile), [1, TILE])  # [j, i]
        offset_j = tl.minimum(j, length - 1)[:, None] * BUCKETS  # (TILE, 1)
        from_j = tl.load(from_position + (offset_j + bucket))

        # all scores; ieee: without it, products of float32 would be rounded to 10 bits
        scores = tl.dot(q, k.T, input_precision="ieee") * scale + from_i + from_j.T
        scores = tl.where((j < length)[None, :], scores * LOG2_E, float("-inf"))

        # softmax: what was added up before is measured by the new largest score
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        shrink = tl.exp2(before - largest)
        weights = tl.exp2(scores - largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        weighted *= shrink[:, None]
        weighted = tl.dot(weights.to(v.dtype), v, weighted, input_precision="ieee")

    weighted = weighted / total[:, None]
    tl.store(context + rows_i, weighted.to(context.dtype.element_ty), mask=(i < length)[:, None])
