"""PairRM, LLM-Blender's pairwise ranker (2306.02561), faster: the published weights and scores.

    model, tokenizer = load_pairrm("llm-blender/PairRM", device)
    matrices = compare(model, tokenizer, prompts, candidates, batch_tokens, counts)

DeBERTa-v3 (transformers' DebertaV2Model) reads a prompt and two candidates, each behind a mark, and
a head reads the hidden states of the three marks.
Comparisons of all prompts are sorted by length and laid end to end: products run over all tokens,
attention within each sequence. Scores do not depend on what shares the batch.
A relative position's score depends on the distance alone, so it is computed once per distance and
not, as in DeBERTa's own code, gathered for every pair of tokens into matrices of L x L:

    on a CPU    it is read through a view with shifted rows (Transformer-XL's trick, 1901.02860)
    on a GPU    one kernel reads it beside the scores that it computes (pairrm_kernel.py)
"""

import itertools
import json
import os
import re

import torch
import torch.nn.functional as F
import torch.utils.mkldnn
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from nanoaipo.chat import encode
from nanoaipo.errors import InputError, reason_of
from nanoaipo.packing import batches_by_length

# the marks; their order fixes their ids
PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
# rows of the shifted view computed at once: fewer waste less, more multiply faster
ROWS = 64


# -------------------------------------------------------------------------------- attention


def add_shifted(scores, x, table):
    """Add to scores[..., i, j] the product x_i · table_(j - i).

    scores: (B, H, L, L). x: (B, H, L, d). table: (H, 2L + 1, d), of the distances -L <= j - i <= L.
    """
    batch, heads, length, _ = x.shape
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        n_rows = stop - start

        # products with every distance that these rows can have, and one: an even width is faster;
        # all sequences in one product, so that no head's table is copied for each of them
        distances = table[:, length - stop : 2 * length - start]  # (H, L + n_rows, d)
        part = x[..., start:stop, :].transpose(0, 1).flatten(1, 2)  # (H, B * n_rows, d)
        products = part @ distances.mT  # (H, B * n_rows, L + n_rows)
        products = products.unflatten(1, (batch, n_rows)).transpose(0, 1)

        # the first row begins n_rows columns in, every further row one earlier
        size = (batch, heads, n_rows, length)
        stride = (*products.stride()[:-2], products.shape[-1] - 1, 1)
        scores[..., start:stop, :].add_(products.as_strided(size, stride, n_rows))


def shifted_attention(q, k, v, key_table, query_table, buckets, scale):
    """Attention (2006.03654, Eq. 4) in B sequences of one length: (B, H, L, d) -> (B, H, L, d).

    key_table, query_table: (H, S, d), scaled keys and queries of S buckets of distances.
    buckets: (2L + 1,), the bucket of each distance i - j = L, ..., -L of query i and key j.
    """
    batch, heads, length, _ = q.shape
    scores = q.new_zeros(batch, heads, length, length)
    add_shifted(scores, q, key_table[:, buckets])  # content to position, j - i rises
    add_shifted(scores.mT, k, query_table[:, buckets.flip(0)])  # position to content, i - j rises
    return F.scaled_dot_product_attention(q, k, v, scores, scale=scale)


# -------------------------------------------------------------------------------- the model


def split_heads(x, heads):
    """(..., L, D) -> (..., H, L, D / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


class PairRM(torch.nn.Module):
    """Parameters have the published names: pretrained_model.*, head_layer.1.*, head_layer.4.*.

    fused: attention is the GPU's kernel.
    """

    fused = False

    def __init__(self, config, n_tasks=1):
        super().__init__()
        width = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = torch.nn.Sequential(
            torch.nn.Dropout(0.0),
            torch.nn.Linear(2 * width, width),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.0),
            torch.nn.Linear(width, n_tasks),
        )

    def score(self, marked):
        """Scores (B, 2) of both candidates from the hidden states of the marks (B, 3, D)."""
        source, first, second = marked.unbind(1)  # (B, D) each
        first = torch.cat([source, first], -1)  # (B, 2D)
        second = torch.cat([source, second], -1)  # (B, 2D)
        return self.head_layer(torch.stack([first, second], 1)).mean(-1)

    def distance_buckets(self, length, device):
        """Rows of the relative embedding for the distances i - j = L, ..., -L: (2L + 1,)."""
        encoder = self.pretrained_model.encoder
        span = encoder.position_buckets
        distance = torch.arange(length, -length - 1, -1, device=device)
        bucket = make_log_bucket_position(distance, span, encoder.max_relative_positions).long()
        return (bucket + span).clamp(0, 2 * span - 1)

    def forward(self, ids, lengths, marks):
        """Scores (B, 2) of B sequences laid end to end, sorted by length.

        ids: (T,). lengths: of each sequence. marks: (B, 3), positions of the marks in ids.
        """
        encoder = self.pretrained_model.encoder
        positions = encoder.get_rel_embedding()  # (2 * span, D)
        sequences = self.lay_out(lengths, ids.device)

        h = self.pretrained_model.embeddings(ids[None])[0]  # (T, D)
        for layer in encoder.layer:
            context = self.attend(layer.attention.self, h, positions, sequences)
            if layer is encoder.layer[-1]:
                # the head reads the marks alone
                context = context[marks]  # (B, 3, D)
                h = h[marks]  # (B, 3, D)
            h = layer.attention.output(context, h)
            h = layer.output(layer.intermediate(h), h)
        return self.score(h.float())

    def lay_out(self, lengths, device):
        """What attention has to know of the sequences, the same in all layers."""
        if self.fused:
            from nanoaipo import pairrm_kernel

            return pairrm_kernel.lay_out(lengths, self.distance_buckets, device)

        # (length, how many sequences of that length follow, their buckets)
        runs = []
        for length, run in itertools.groupby(lengths):
            runs.append((length, len(list(run)), self.distance_buckets(length, device)))
        return runs

    def attend(self, attention, h, positions, sequences):
        """Disentangled attention within each sequence: (T, D) -> (T, D)."""
        heads = attention.num_attention_heads
        scale = (3 * attention.attention_head_size) ** -0.5
        query = attention.query_proj(h)  # (T, D)
        key = attention.key_proj(h)  # (T, D)
        value = attention.value_proj(h)  # (T, D)
        key_table = split_heads(attention.key_proj(positions), heads) * scale  # (H, 2 * span, d)
        query_table = split_heads(attention.query_proj(positions), heads) * scale
        if self.fused:
            from nanoaipo.pairrm_kernel import fused_attention

            return fused_attention(query, key, value, key_table, query_table, sequences, scale)

        context = torch.empty_like(query)
        start = 0
        for length, count, buckets in sequences:
            stop = start + count * length
            shape = (count, length)
            q = split_heads(query[start:stop].unflatten(0, shape), heads)  # (B, H, L, d)
            k = split_heads(key[start:stop].unflatten(0, shape), heads)  # (B, H, L, d)
            v = split_heads(value[start:stop].unflatten(0, shape), heads)  # (B, H, L, d)
            out = shifted_attention(q, k, v, key_table, query_table, buckets, scale)
            context[start:stop] = out.transpose(1, 2).reshape(count * length, -1)
            start = stop
        return context


# -------------------------------------------------------------------------------- text to ids


class PairTokenizer:
    """[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP].

    So llm-blender writes it. A prompt is cut at source_maxlength tokens, a candidate at
    candidate_maxlength plus half of what the prompt leaves (1,224 and 412 in the published model).
    llm-blender lets the longest prompt of the batch decide that; here each prompt stands alone.
    Text that spells a mark or another control token stays text.
    """

    def __init__(self, tokenizer, source_maxlength, candidate_maxlength):
        tokenizer.add_tokens(PREFIXES)
        self.tokenizer = tokenizer
        self.source_maxlength = source_maxlength
        self.candidate_maxlength = candidate_maxlength
        self.prefixes = tokenizer.convert_tokens_to_ids(PREFIXES)

        # the longest first, so that no token hides a longer one that it begins
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
        tokens.sort(key=len, reverse=True)
        self.control = re.compile("|".join(re.escape(token) for token in tokens))

    def segment(self, text, limit):
        """([CLS] mark text [SEP] as at most `limit` ids, whether the text was cut).

        The mark is None until `join` knows which of the three it is.
        """
        ids = encode(self.tokenizer, text, self.control)
        room = limit - 3
        segment = [self.tokenizer.cls_token_id, None, *ids[:room], self.tokenizer.sep_token_id]
        return segment, len(ids) > room

    def candidate_limit(self, source):
        """Ids that a candidate's segment may have beside this source's."""
        return self.candidate_maxlength + (self.source_maxlength - len(source)) // 2

    def join(self, *segments):
        """(ids, positions of the three marks) of a source and two candidates."""
        ids = []
        marks = []
        for segment, mark in zip(segments, self.prefixes):
            marks.append(len(ids) + 1)
            ids += [segment[0], mark, *segment[2:]]
        return ids, marks


# -------------------------------------------------------------------------------- loading


def read_ranker(name):
    """(folder, settings in its config.json, weights) of a folder or hub name."""
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    try:
        folder = name
        if not os.path.isdir(name):
            patterns = ["*.json", "*.model", "*.safetensors"]
            folder = snapshot_download(name, allow_patterns=patterns)
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            settings = json.load(f)
        weights = load_file(os.path.join(folder, "model.safetensors"))
    except Exception as e:  # hub and file errors come in many classes
        raise InputError(
            f"--ranker_model={name}: no folder and no hub model with config.json and "
            f"model.safetensors ({reason_of(e)})"
        ) from e
    if not isinstance(settings, dict):
        raise InputError(f"--ranker_model={name}: its config.json holds no settings")
    return folder, settings, weights


def find_backbone(folder, settings):
    """The backbone's folder, as named or beside the ranker's files, or its hub name."""
    backbone = settings.get("model_name") or folder
    beside = os.path.join(folder, os.path.basename(backbone))
    if not os.path.isdir(backbone) and os.path.isdir(beside):
        return beside
    return backbone


def is_deberta_v3(config):
    """Whether PairRM's forward pass computes what this configuration says."""
    expected = {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "share_att_key": True,
        "position_biased_input": False,
        "norm_rel_ebd": "layer_norm",
    }
    for key, value in expected.items():
        if getattr(config, key, None) != value:
            return False
    if set(config.pos_att_type) != {"c2p", "p2c"}:
        return False
    if config.position_buckets < 1:
        return False
    return not getattr(config, "conv_kernel_size", 0)


def check_weights(name, expected, weights):
    """Raise InputError unless the weights have exactly the expected names and shapes."""
    wrong = []
    for key in expected.keys() | weights.keys():
        if key not in expected or key not in weights or weights[key].shape != expected[key].shape:
            wrong.append(key)
    if wrong:
        raise InputError(
            f"--ranker_model={name}: model.safetensors does not fit a PairRM, missing, foreign "
            f"or of another shape: {', '.join(sorted(wrong)[:3])}"
        )


def load_pairrm(name, device):
    """(PairRM, PairTokenizer) from a folder or hub name in the layout of llm-blender/PairRM.

    config.json names the backbone (model_name: a folder, or a hub name whose config and tokenizer
    are read) and the lengths; model.safetensors must hold exactly the model's weights, else
    InputError: an untrained head ranks too. The encoder computes in float32 on a CPU, in float16
    on a GPU; the head in float32 on both.
    """
    folder, settings, weights = read_ranker(name)
    backbone = find_backbone(folder, settings)
    has_tokenizer = os.path.exists(os.path.join(folder, "tokenizer_config.json"))
    try:
        config = AutoConfig.from_pretrained(backbone)
        tokenizer = PairTokenizer(
            AutoTokenizer.from_pretrained(folder if has_tokenizer else backbone),
            settings["source_maxlength"],
            settings["candidate_maxlength"],
        )
        embeddings = weights["pretrained_model.embeddings.word_embeddings.weight"]
    except (OSError, ValueError) as e:
        raise InputError(
            f"--ranker_model={name}: its backbone {backbone} cannot be loaded ({reason_of(e)})"
        ) from e
    except KeyError as e:
        raise InputError(f"--ranker_model={name}: no PairRM, {e} is missing") from e
    if not is_deberta_v3(config):
        raise InputError(
            f"--ranker_model={name}: its backbone is no DeBERTa-v3 (relative positions both ways, "
            "shared projections, buckets); --ranker=llm-blender reads it"
        )

    # the vocabulary is the ranker's, which has the marks besides the backbone's
    config.vocab_size = len(embeddings)
    with torch.device(device):
        model = PairRM(config, settings.get("n_tasks", 1)).eval()
    check_weights(name, model.state_dict(), weights)
    model.load_state_dict(weights)
    if device.type == "cuda":
        model.fused = True
        # llm-blender's default on a GPU, so the published weights fit its range; bfloat16 has three
        # bits less and turns winners
        model.pretrained_model.half()
    elif torch.backends.mkldnn.is_available():
        # oneDNN's float32 products: twice as fast as MKL's on an AMD
        torch.utils.mkldnn.to_mkldnn(model.pretrained_model.encoder)
    return model, tokenizer


# -------------------------------------------------------------------------------- comparing


def segment_prompt(tokenizer, prompt, texts, counts):
    """[source, *candidates] of a prompt as segments of ids; counts what had to be cut."""
    source, cut = tokenizer.segment(prompt, tokenizer.source_maxlength)
    counts["prompts_cut"] += cut
    limit = tokenizer.candidate_limit(source)
    segments = [source]
    for text in texts:
        segment, cut = tokenizer.segment(text, limit)
        counts["responses_cut"] += cut
        segments.append(segment)
    return segments


def score_batch(model, tokenizer, triples):
    """Log-odds that the first candidate beats the second, of B (source, first, second)."""
    ids = []
    lengths = []
    marks = []
    for triple in triples:
        sequence, positions = tokenizer.join(*triple)
        marks.append([len(ids) + position for position in positions])
        lengths.append(len(sequence))
        ids += sequence

    device = next(model.parameters()).device
    ids = torch.tensor(ids, device=device)  # (T,)
    marks = torch.tensor(marks, device=device)  # (B, 3)
    scores = model(ids, lengths, marks)  # (B, 2)
    return (scores[:, 0] - scores[:, 1]).tolist()


@torch.no_grad()
def compare(model, tokenizer, prompts, candidates, batch_tokens, counts):
    """For each prompt a matrix (N, N), float32: [i, j] is the log-odds that candidate i beats j.

    It is the mean of both orders, so the matrix is antisymmetric. Comparisons are computed longest
    first, about batch_tokens tokens at a time. Adds to counts what had to be cut.
    """
    # every ordered comparison, of candidates i and j of prompt p
    comparisons = []
    triples = []
    for p, (prompt, texts) in enumerate(zip(prompts, candidates)):
        source, *segments = segment_prompt(tokenizer, prompt, texts, counts)
        for i, j in itertools.permutations(range(len(texts)), 2):
            comparisons.append((p, i, j))
            triples.append((source, segments[i], segments[j]))
    lengths = [sum(len(segment) for segment in triple) for triple in triples]

    matrices = [torch.zeros(len(texts), len(texts)) for texts in candidates]
    with tqdm(total=len(triples), desc="rank", unit="cmp", disable=not triples) as bar:
        for batch in batches_by_length(lengths, batch_tokens):
            logits = score_batch(model, tokenizer, [triples[k] for k in batch])
            for k, logit in zip(batch, logits):
                p, i, j = comparisons[k]
                matrices[p][i, j] += logit / 2
                matrices[p][j, i] -= logit / 2
            bar.update(len(batch))
    return matrices
