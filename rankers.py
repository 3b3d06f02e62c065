"""Who says which response is better: one function per ranker, from prompts and candidate responses to log-odds.

A ranker is built once, `odds = RANKERS[name](ranker_model, batch_tokens)`, and called with prompts (texts) and, for each,
its candidates (texts, any number). It returns one (N, N) float32 tensor per prompt: [i, j] is the log-odds that
candidate i beats candidate j, averaged over both orders of presentation, so the tensor is antisymmetric.
"""
import importlib
import json
import os
import re
import sys

import torch
from tqdm import tqdm

from data import encode, pick_device

device = pick_device()
PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]      # their order fixes their ids


class PairRM(torch.nn.Module):
    """LLM-Blender's pairwise ranker (2306.02561): DeBERTa-v2 over prompt and both candidates, a head on the marks.

    Parameters carry the published names: pretrained_model.*, head_layer.1.* and head_layer.4.*.
    """

    def __init__(self, config, n_tasks=1):
        from transformers import DebertaV2Model
        super().__init__()
        self.pretrained_model = DebertaV2Model(config)
        d = config.hidden_size
        self.head_layer = torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Linear(2 * d, d), torch.nn.Tanh(),
                                              torch.nn.Dropout(0.0), torch.nn.Linear(d, n_tasks))

    def forward(self, input_ids, attention_mask, marks):
        """Scores of both candidates, (B, 2); marks (B, 3): positions of source, candidate1 and candidate2."""
        return self.score(self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, marks)

    def score(self, h, marks):
        source, first, second = h[torch.arange(len(h), device=h.device)[:, None], marks].unbind(1)           # (B, D)
        pairs = torch.stack([torch.cat([source, c], -1) for c in (first, second)], 1)                        # (B, 2, 2D)
        return self.head_layer(pairs).mean(-1)


class PairTokenizer:
    """[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|> b [SEP], as llm-blender writes it.

    A prompt is cut at source_maxlength tokens, a candidate at candidate_maxlength plus half of what the prompt leaves.
    llm-blender lets the longest prompt of the batch decide that; here each prompt stands alone. Text that spells a mark
    or another control token stays text.
    """

    def __init__(self, tokenizer, source_maxlength, candidate_maxlength):
        tokenizer.add_tokens(PREFIXES)
        self.tokenizer, self.source_maxlength, self.candidate_maxlength = tokenizer, source_maxlength, candidate_maxlength
        self.prefixes = tokenizer.convert_tokens_to_ids(PREFIXES)
        every = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, every)))

    def segment(self, text, limit):
        """Ids of [CLS] mark text [SEP], the mark still to be filled in, cut to `limit` tokens."""
        ids = encode(self.tokenizer, text, self.control)[:limit - 3]
        return [self.tokenizer.cls_token_id, None, *ids, self.tokenizer.sep_token_id]

    def candidate_limit(self, source):
        return self.candidate_maxlength + (self.source_maxlength - len(source)) // 2

    def join(self, *segments):
        """(ids, positions of the three marks) of a source and two candidates."""
        ids, marks = [], []
        for segment, mark in zip(segments, self.prefixes):
            marks.append(len(ids) + 1)
            ids += [segment[0], mark, *segment[2:]]
        return ids, marks


def load_pairrm(name):
    """(PairRM in float32 on the device, PairTokenizer) from a folder or hub name in the layout of llm-blender/PairRM.

    config.json names the backbone (model_name: a folder, or a hub name whose config and tokenizer are read) and the
    lengths; model.safetensors must hold exactly the model's weights, else the program ends: an untrained head ranks too.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer
    try:
        folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns=["*.json", "*.model", "*.safetensors"])
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            settings = json.load(f)
        state = load_file(os.path.join(folder, "model.safetensors"))
    except Exception as e:                                              # hub and file errors come in many classes
        sys.exit(f"--ranker_model={name}: no folder and no hub model with config.json and model.safetensors ({str(e).splitlines()[0]})")
    backbone = settings.get("model_name") or folder
    backbone = next((p for p in (backbone, os.path.join(folder, os.path.basename(backbone))) if os.path.isdir(p)), backbone)
    config = AutoConfig.from_pretrained(backbone)
    words = state.get("pretrained_model.embeddings.word_embeddings.weight")
    words is not None or sys.exit(f"--ranker_model={name}: its weights are not a PairRM's (pretrained_model.*, head_layer.*)")
    config.vocab_size = len(words)
    with torch.device(device):
        model = PairRM(config, settings.get("n_tasks", 1)).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        sys.exit(f"--ranker_model={name}: model.safetensors lacks {missing[:3]} and has {unexpected[:3]} that no PairRM has")
    own = os.path.exists(os.path.join(folder, "tokenizer_config.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder if own else backbone)
    return model, PairTokenizer(tokenizer, settings["source_maxlength"], settings["candidate_maxlength"])


def pairrm(name, batch_tokens):
    model, tokenizer = load_pairrm(name)

    @torch.no_grad()
    def odds(prompts, candidates):
        rows, where = [], []                                            # (ids, marks) of each ordered comparison
        for p, (prompt, texts) in enumerate(zip(prompts, candidates)):
            source = tokenizer.segment(prompt, tokenizer.source_maxlength)
            segments = [tokenizer.segment(text, tokenizer.candidate_limit(source)) for text in texts]
            for i in range(len(texts)):
                for j in range(len(texts)):
                    if i != j:
                        rows.append(tokenizer.join(source, segments[i], segments[j]))
                        where.append((p, i, j))
        matrices = [torch.zeros(len(texts), len(texts)) for texts in candidates]
        order = sorted(range(len(rows)), key=lambda r: -len(rows[r][0]))
        with tqdm(total=len(rows), desc="rank", unit="cmp", disable=not rows) as bar:
            while order:                                                # longest first: the budget is tested at once
                count = max(1, batch_tokens // len(rows[order[0]][0]))
                batch, order = order[:count], order[count:]
                ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[r][0]) for r in batch], batch_first=True).to(device)
                lengths = torch.tensor([len(rows[r][0]) for r in batch], device=device)
                mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()                 # (B, L)
                scores = model(ids, mask, torch.tensor([rows[r][1] for r in batch], device=device))
                for r, logit in zip(batch, (scores[:, 0] - scores[:, 1]).tolist()):
                    p, i, j = where[r]
                    matrices[p][i, j] += logit / 2
                    matrices[p][j, i] -= logit / 2
                bar.update(len(batch))
        return matrices

    return odds


def llm_blender(name, batch_tokens):
    """The package itself (llm-blender 0.0.2), two names put back that transformers 5 no longer has."""
    import transformers.utils.hub
    from transformers import PreTrainedTokenizerBase
    transformers.utils.hub.TRANSFORMERS_CACHE = os.path.expanduser("~/.cache/huggingface/hub")
    PreTrainedTokenizerBase.batch_encode_plus = PreTrainedTokenizerBase.__call__
    try:
        Blender = importlib.import_module("llm_blender").Blender
    except ImportError as e:
        sys.exit(f"--ranker=llm-blender: {e}; pip install llm-blender==0.0.2, or take --ranker=pairrm: same weights, same scores")
    blender = Blender()
    blender.loadranker(name, device=device.type)

    def odds(prompts, candidates):
        where = [(p, i, j) for p, texts in enumerate(candidates) for i in range(len(texts)) for j in range(i)]
        matrices = [torch.zeros(len(texts), len(texts)) for texts in candidates]
        if where:
            logits = blender.compare([prompts[p] for p, _, _ in where], [candidates[p][i] for p, i, _ in where],
                                     [candidates[p][j] for p, _, j in where], return_logits=True, mode="[A,B]+[B,A]")
            for (p, i, j), twice in zip(where, logits.tolist()):        # it returns logit_ij - logit_ji, twice their mean
                matrices[p][i, j], matrices[p][j, i] = twice / 2, -twice / 2
        return matrices

    return odds


RANKERS = {"pairrm": pairrm, "llm-blender": llm_blender}


def load_ranker(ranker, ranker_model, batch_tokens):
    ranker in RANKERS or sys.exit(f"--ranker={ranker}: there are {', '.join(RANKERS)}")
    ranker_model or sys.exit("--ranker_model is not set: a folder or a hub name such as llm-blender/PairRM")
    return RANKERS[ranker](ranker_model, batch_tokens)


def prompt_text(messages):
    """What a ranker reads of a prompt: the bare instruction, or every turn of a longer conversation with its role."""
    return messages[0]["content"] if len(messages) == 1 else "\n".join(f"{m['role'].upper()}: {m['content']}" for m in messages)
