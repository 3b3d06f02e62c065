"""PairRM as a GPU computes it, in one padded block of 16 bits, on a CPU."""

import collections

import pytest
import torch
from test_rank import build_judge, largest_difference, random_prompts

from nanoaipo import pairrm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return build_judge(tmp_path_factory.mktemp("judge"))


def compare(judge, monkeypatch, padded, dtype=torch.float32):
    """Matrices of random prompts, with or without padding, the encoder in `dtype`."""
    monkeypatch.setattr(pairrm, "SHORTEST", 16)  # that is the compiled kernel's, and slow here
    # oneDNN's layers cannot change their type
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model, tokenizer = pairrm.load_pairrm(judge, CPU)
    model.pretrained_model.to(dtype)

    score_batch = pairrm.score_batch

    def score_so(model, tokenizer, triples, _):
        return score_batch(model, tokenizer, triples, padded)

    with monkeypatch.context() as patch:
        patch.setattr(pairrm, "score_batch", score_so)
        prompts, candidates = random_prompts(3, 6, 4, 40)
        return pairrm.compare(model, tokenizer, prompts, candidates, 4000, collections.Counter())


def test_padding_a_batch_to_one_length_changes_no_score(judge, monkeypatch):
    shapes = []
    attention = pairrm.fused_attention

    def recording(q, *inputs):
        shapes.append(q.shape)
        return attention(q, *inputs)

    alone = compare(judge, monkeypatch, padded=False)
    monkeypatch.setattr(pairrm, "fused_attention", recording)
    padded = compare(judge, monkeypatch, padded=True)

    assert largest_difference(padded, alone) < 1e-5

    # sequences of several lengths in each block
    assert shapes
    assert all(length % 16 == 0 for _, _, length, _ in shapes)
    assert len(shapes) < 10


def test_float16_gives_the_same_winners_and_bfloat16_is_farther_away(judge, monkeypatch):
    exact = torch.stack(compare(judge, monkeypatch, padded=True))
    half = torch.stack(compare(judge, monkeypatch, padded=True, dtype=torch.float16))
    coarse = torch.stack(compare(judge, monkeypatch, padded=True, dtype=torch.bfloat16))

    assert torch.isfinite(half).all()
    clear = exact.abs() > 0.02 * exact.std()
    assert torch.equal((half > 0)[clear], (exact > 0)[clear])
    assert 3 * (half - exact).abs().mean() < (coarse - exact).abs().mean()
