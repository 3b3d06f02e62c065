"""PairRM, LLM-Blender's pairwise ranker (2306.02561), faster: the published weights and scores, whatever shares the batch.

    model, tokenizer = load_pairrm("llm-blender/PairRM", device)
    logits = compare(model, tokenizer, prompts, candidates, batch_tokens, counts)

DeBERTa-v2 reads a prompt and two candidates, a head reads the three marks before them. Comparisons of all prompts are sorted
by length and laid end to end without padding: products run over all tokens, attention over sequences of one length at a
time. A relative position's score depends on the distance alone, so it is computed once per distance and read through a view with
shifted rows (Transformer-XL's trick, 1901.02860), where DeBERTa's own code gathers it for every pair of tokens.
"""
import itertools
import json
import os
import re
import sys

import torch
import torch.nn.functional as F
import torch.utils.mkldnn
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from nanoaipo.chat import encode
from nanoaipo.packing import batches_by_length

PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]      # their order fixes their ids
ROWS = 64                               # of the shifted view computed at once: fewer waste less, more multiply faster


def add_shifted(scores, x, table):
    """scores[..., i, j] += x_i · table_(j - i), for scores (B, H, L, L), x (B, H, L, D) and table (H, 2L - 1, D) of -L < j - i < L."""
    length = x.shape[-2]
    for a in range(0, length, ROWS):
        b = min(a + ROWS, length)
        part = x[..., a:b, :] @ table[:, length - b:2 * length - 1 - a].mT                                   # (B, H, b - a, L + b - a - 1)
        size, stride = (*part.shape[:-1], length), (*part.stride()[:-2], part.shape[-1] - 1, 1)              # every row begins one earlier
        scores[..., a:b, :] += part.as_strided(size, stride, b - a - 1)


class PairRM(torch.nn.Module):
    """Parameters carry the published names: pretrained_model.*, head_layer.1.* and head_layer.4.*."""

    def __init__(self, config, n_tasks=1):
        super().__init__()
        self.pretrained_model = DebertaV2Model(config)
        d = config.hidden_size
        self.head_layer = torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Linear(2 * d, d), torch.nn.Tanh(),
                                              torch.nn.Dropout(0.0), torch.nn.Linear(d, n_tasks))

    def score(self, marked):
        """Scores (B, 2) of both candidates from the hidden states of the marks (B, 3, D)."""
        source, first, second = marked.unbind(1)
        return self.head_layer(torch.stack([torch.cat([source, c], -1) for c in (first, second)], 1)).mean(-1)

    def forward(self, ids, lengths, marks):
        """Scores (B, 2) of sequences laid end to end: ids (T,), their lengths in tokens, positions of the marks in ids (B, 3)."""
        encoder, last = self.pretrained_model.encoder, self.pretrained_model.encoder.layer[-1]
        h = self.pretrained_model.embeddings(ids[None])[0]                                                   # (T, D)
        runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
        span, positions, buckets = encoder.position_buckets, encoder.get_rel_embedding(), {}
        for length, _ in runs:                                          # row of `positions` for each distance i - j, falling
            distance = torch.arange(length - 1, -length, -1, device=ids.device)
            bucket = make_log_bucket_position(distance, span, encoder.max_relative_positions).long()
            buckets[length] = (bucket + span).clamp(0, 2 * span - 1)
        for layer in encoder.layer:
            context = self.attend(layer.attention.self, h, positions, runs, buckets)
            if layer is last:                                           # the head reads the marks alone
                context, h = context[marks], h[marks]                                                        # (B, 3, D)
            h = layer.attention.output(context, h)
            h = layer.output(layer.intermediate(h), h)
        return self.score(h.float())

    def attend(self, attention, h, positions, runs, buckets):
        """Disentangled attention (2006.03654, Eq. 4): content to content, content to position, position to content."""
        heads, width = attention.num_attention_heads, attention.attention_head_size
        split = lambda x: x.unflatten(-1, (heads, width)).transpose(-3, -2)
        scale = (3 * width) ** -0.5
        query, key, value = attention.query_proj(h), attention.key_proj(h), attention.value_proj(h)          # (T, D)
        position_key, position_query = (split(projection(positions)) * scale for projection in (attention.key_proj, attention.query_proj))
        context, at = torch.empty_like(query), 0
        for length, count in runs:
            rows = slice(at, at := at + count * length)
            q, k, v = (split(x[rows].unflatten(0, (count, length))) for x in (query, key, value))            # (B, H, L, D / H)
            scores = q.new_zeros(count, heads, length, length)
            add_shifted(scores, q, position_key[:, buckets[length]])
            add_shifted(scores.mT, k, position_query[:, buckets[length].flip(0)])
            context[rows] = F.scaled_dot_product_attention(q, k, v, scores, scale=scale).transpose(1, 2).reshape(-1, heads * width)
        return context


class PairTokenizer:
    """[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP], as llm-blender writes it.

    A prompt is cut at source_maxlength tokens, a candidate at candidate_maxlength plus half of what the prompt leaves (1,224
    and 412 in the published model). llm-blender lets the longest prompt of the batch decide that; here each prompt stands
    alone. Text that spells a mark or another control token stays text.
    """

    def __init__(self, tokenizer, source_maxlength, candidate_maxlength):
        tokenizer.add_tokens(PREFIXES)
        self.tokenizer, self.source_maxlength, self.candidate_maxlength = tokenizer, source_maxlength, candidate_maxlength
        self.prefixes = tokenizer.convert_tokens_to_ids(PREFIXES)
        every = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, every)))

    def segment(self, text, limit):
        """(ids of [CLS] mark text [SEP], at most `limit`, the mark still to be filled in; whether text was cut off)."""
        ids = encode(self.tokenizer, text, self.control)
        return [self.tokenizer.cls_token_id, None, *ids[:limit - 3], self.tokenizer.sep_token_id], len(ids) > limit - 3

    def candidate_limit(self, source):
        return self.candidate_maxlength + (self.source_maxlength - len(source)) // 2

    def join(self, *segments):
        """(ids, positions of the three marks) of a source and two candidates."""
        ids, marks = [], []
        for segment, mark in zip(segments, self.prefixes):
            marks.append(len(ids) + 1)
            ids += [segment[0], mark, *segment[2:]]
        return ids, marks


def load_pairrm(name, device):
    """(PairRM, PairTokenizer) from a folder or hub name in the layout of llm-blender/PairRM.

    config.json names the backbone (model_name: a folder, or a hub name whose config and tokenizer are read) and the
    lengths; model.safetensors must hold exactly the model's weights, else the program ends: an untrained head ranks too.
    The encoder computes in float32 on a CPU, in bfloat16 on a GPU; the head in float32 on both.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    try:
        folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns=["*.json", "*.model", "*.safetensors"])
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            settings = json.load(f)
        state = load_file(os.path.join(folder, "model.safetensors"))
    except Exception as e:                                              # hub and file errors come in many classes
        sys.exit(f"--ranker_model={name}: no folder and no hub model with config.json and model.safetensors ({str(e).splitlines()[0]})")
    isinstance(settings, dict) or sys.exit(f"--ranker_model={name}: its config.json holds no settings")
    backbone = settings.get("model_name") or folder
    backbone = next((p for p in (backbone, os.path.join(folder, os.path.basename(backbone))) if os.path.isdir(p)), backbone)
    own = os.path.exists(os.path.join(folder, "tokenizer_config.json"))
    try:
        config = AutoConfig.from_pretrained(backbone)
        tokenizer = PairTokenizer(AutoTokenizer.from_pretrained(folder if own else backbone), settings["source_maxlength"], settings["candidate_maxlength"])
        words = state["pretrained_model.embeddings.word_embeddings.weight"]
    except (OSError, ValueError) as e:
        sys.exit(f"--ranker_model={name}: its backbone {backbone} cannot be loaded ({str(e).strip().splitlines()[0]})")
    except KeyError as e:
        sys.exit(f"--ranker_model={name}: no PairRM, {e} is missing")
    kind = [getattr(config, key, None) for key in ("model_type", "relative_attention", "share_att_key", "position_biased_input", "norm_rel_ebd")]
    if kind != ["deberta-v2", True, True, False, "layer_norm"] or set(config.pos_att_type) != {"c2p", "p2c"} or config.position_buckets < 1 or getattr(config, "conv_kernel_size", 0):
        sys.exit(f"--ranker_model={name}: its backbone is no DeBERTa-v3 (relative positions both ways, shared projections, buckets); --ranker=llm-blender reads it")
    config.vocab_size = len(words)
    with torch.device(device):
        model = PairRM(config, settings.get("n_tasks", 1)).eval()
    want = {k: v.shape for k, v in model.state_dict().items()}
    wrong = sorted(k for k in want.keys() | state.keys() if k not in want or k not in state or state[k].shape != want[k])
    if wrong:
        sys.exit(f"--ranker_model={name}: model.safetensors does not fit a PairRM, missing, foreign or of another shape: {', '.join(wrong[:3])}")
    model.load_state_dict(state)
    if device.type == "cuda":
        model.pretrained_model.bfloat16()
    elif torch.backends.mkldnn.is_available():                          # oneDNN's float32 products: twice as fast as MKL's on an AMD
        torch.utils.mkldnn.to_mkldnn(model.pretrained_model.encoder)
    return model, tokenizer


@torch.no_grad()
def compare(model, tokenizer, prompts, candidates, batch_tokens, counts):
    """For each prompt a matrix (N, N): [i, j] = log-odds that candidate i beats j, mean of both orders, so antisymmetric.

    Comparisons are computed longest first, about batch_tokens tokens at a time. Adds to counts what had to be cut.
    """
    device = next(model.parameters()).device
    segments, where = [], []                                            # of each prompt (source, *candidates); each ordered comparison
    for p, (prompt, texts) in enumerate(zip(prompts, candidates)):
        source, cut = tokenizer.segment(prompt, tokenizer.source_maxlength)
        counts["prompts_cut"] += cut
        segments.append([source])
        for text in texts:
            segment, cut = tokenizer.segment(text, tokenizer.candidate_limit(source))
            counts["responses_cut"] += cut
            segments[p].append(segment)
        where += [(p, i, j) for i, j in itertools.permutations(range(len(texts)), 2)]
    matrices = [torch.zeros(len(texts), len(texts)) for texts in candidates]
    with tqdm(total=len(where), desc="rank", unit="cmp", disable=not where) as bar:
        for batch in batches_by_length([len(segments[p][0]) + len(segments[p][i + 1]) + len(segments[p][j + 1]) for p, i, j in where], batch_tokens):
            batch = [where[k] for k in batch]
            rows = [tokenizer.join(segments[p][0], segments[p][i + 1], segments[p][j + 1]) for p, i, j in batch]
            lengths = [len(ids) for ids, _ in rows]
            starts = itertools.accumulate(lengths[:-1], initial=0)
            marks = torch.tensor([[start + mark for mark in marks] for (_, marks), start in zip(rows, starts)], device=device)
            scores = model(torch.tensor([i for ids, _ in rows for i in ids], device=device), lengths, marks)
            for (p, i, j), logit in zip(batch, (scores[:, 0] - scores[:, 1]).tolist()):
                matrices[p][i, j] += logit / 2
                matrices[p][j, i] -= logit / 2
            bar.update(len(batch))
    return matrices
