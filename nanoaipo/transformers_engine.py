"""Sampling with transformers' generate, on any device.

Rows of similar length are sampled together. Whenever more than half of a batch has ended, generate
stops, the rows that have ended leave the batch, and the others go on with their part of the cache.
"""

import os

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

from nanoaipo.engines import exact_attention
from nanoaipo.errors import InputError, reason_of
from nanoaipo.model_folders import weight_file_names
from nanoaipo.processes import pick_device
from nanoaipo.seeds import derive_seed

NEVER = 2**31  # the length at which a row without a stop text ends
STOP_TAIL = 8  # tokens at the end of a row in which a stop text is looked for


class SampledLogProbs(LogitsProcessor):
    """Log-probs of the sampled tokens, under the logits before temperature and top-k."""

    def __init__(self):
        self.next_logps = None
        self.steps = []

    def __call__(self, ids, logits):
        self.add_last(ids)
        self.next_logps = logits.float().log_softmax(-1)  # (B, V)
        return logits

    def add_last(self, ids):
        """Look up the token sampled last in the log-probs of the step that sampled it."""
        if self.next_logps is not None:
            self.steps.append(self.next_logps.gather(1, ids[:, -1:]))  # (B, 1)

    def all_steps(self, ids):
        """Log-probs (B, new) of all tokens sampled, once generate has returned ids (B, L)."""
        self.add_last(ids)
        return torch.cat(self.steps, 1)


class MostRowsEnded(StoppingCriteria):
    """Stops generate once more than half of the rows have ended, so that the rest goes on alone.

    stop_lengths (B,): length of a row when a stop text was first seen in it, else NEVER.
    """

    def __init__(self, n_rows, prompt_width, eos, stop, tokenizer):
        self.prompt_width = prompt_width
        self.eos = eos
        self.stop = stop
        self.tokenizer = tokenizer
        self.has_eos = torch.zeros(n_rows, dtype=torch.bool, device=eos.device)
        self.stop_lengths = torch.full((n_rows,), NEVER, device=eos.device)

    def __call__(self, ids, scores, **kwargs):
        length = ids.shape[1]
        self.has_eos |= torch.isin(ids[:, -1], self.eos)
        if self.stop:
            hit = self.finds_stop(ids)
            self.stop_lengths[hit] = self.stop_lengths[hit].clamp(max=length)

        # generate stops once every row is True
        ended = self.has_eos | (self.stop_lengths <= length)  # (B,)
        most_ended = ended.float().mean() > 0.5
        return ended | most_ended

    def finds_stop(self, ids):
        """Whether the end of each response holds one of the stop texts, (B,)."""
        start = max(self.prompt_width, ids.shape[1] - STOP_TAIL)
        tails = self.tokenizer.batch_decode(ids[:, start:])
        hit = [any(text in tail for text in self.stop) for tail in tails]
        return torch.tensor(hit, device=ids.device)


class TransformersEngine:
    """A model whose method `sample` is an engine's (nanoaipo/engines.py)."""

    def __init__(self, model, eos_ids, *, dtype, generate_rows):
        self.device = pick_device()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.policy = load_model(model, dtype).to(self.device).eval()
        # the model's own would fill in what ours leaves unset, such as a repetition penalty
        self.policy.generation_config = GenerationConfig()
        self.eos_ids = eos_ids
        self.eos = torch.tensor(sorted(eos_ids), device=self.device)
        self.generate_rows = generate_rows

    @torch.inference_mode()
    def sample(self, requests, *, n_responses, **sampling):
        """Lists of n_responses tuples (ids, finished, log-prob), one list for each request.

        Raises InputError for a prompt with an id that the model has no embedding for.
        """
        check_vocabulary(requests, self.policy)

        # prompts of similar length in a batch, and no more rows than the GPU's memory has room for
        by_length = sorted(range(len(requests)), key=lambda r: len(requests[r][0]))
        n_rows = self.generate_rows
        if self.device.type == "cuda" and requests:
            longest = len(requests[by_length[-1]][0]) + sampling["max_new_tokens"]
            n_rows = rows_that_fit(n_rows, longest, bytes_per_token(self.policy), self.memory())
        size = max(1, n_rows // n_responses)

        results = [None] * len(requests)
        with tqdm(total=len(requests) * n_responses, desc="generate", unit="resp") as bar:
            for start in range(0, len(by_length), size):
                batch = by_length[start : start + size]

                # the rows of a batch share one generator, seeded by all their requests
                torch.manual_seed(derive_seed(*(requests[r][1] for r in batch)))
                rows = []
                for r in batch:
                    prompt_ids, _ = requests[r]
                    rows += [prompt_ids] * n_responses
                responses = self.sample_rows(rows, **sampling)

                # in the order of the requests again
                for k, r in enumerate(batch):
                    results[r] = responses[k * n_responses : (k + 1) * n_responses]
                bar.update(len(rows))
        return results

    def memory(self):
        """Bytes of the GPU that keys and values may take: half of what the weights leave."""
        # not of what is free now, or a run that goes on would make other batches
        total = torch.cuda.get_device_properties(self.device).total_memory
        weights = sum(p.nbytes for p in self.policy.parameters())
        return (total - weights) // 2

    def sample_rows(self, prompts, *, temperature, top_k, top_p, max_new_tokens, stop=()):
        """One response (ids, finished, log-prob) to each of these lists of prompt ids."""
        # prompts end in one column, so that responses begin in the next
        ids, mask = self.pad_left(prompts)  # (B, L)
        prompt_width = ids.shape[1]
        max_length = prompt_width + max_new_tokens
        generation_config = GenerationConfig(
            max_length=max_length,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=sorted(self.eos_ids),
            pad_token_id=min(self.eos_ids),
            return_dict_in_generate=True,
        )

        # the batch shrinks, so each of its rows knows the prompt that it belongs to
        responses = [None] * len(prompts)
        logp = torch.zeros(len(prompts))  # of each response so far
        rows = torch.arange(len(prompts))  # (B,), the prompt of each row of the batch
        cache = None
        while len(rows):
            # sample on until most rows have ended
            start = ids.shape[1]
            recorder = SampledLogProbs()
            criterion = MostRowsEnded(len(rows), prompt_width, self.eos, stop, self.tokenizer)
            output = self.policy.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=generation_config,
                logits_processor=[recorder],
                stopping_criteria=[criterion],
            )
            ids = output.sequences  # (B, L + new)
            cache = output.past_key_values
            stop_lengths = criterion.stop_lengths  # (B,)

            # nothing counts after the end token or the stop text
            is_eos = torch.isin(ids[:, start:], self.eos)  # (B, new)
            steps = recorder.all_steps(ids)  # (B, new)
            logp[rows] += sum_logps(steps, is_eos, start, stop_lengths).cpu()

            # rows that have ended are responses
            ended = is_eos.any(1) | (stop_lengths < NEVER) | (ids.shape[1] >= max_length)  # (B,)
            for b in ended.nonzero()[:, 0].tolist():
                r = int(rows[b])
                stop_length = int(stop_lengths[b])
                response, has_eos = self.cut_at_eos(ids[b, prompt_width:stop_length].tolist())
                responses[r] = (response, has_eos or stop_length < NEVER, float(logp[r]))

            # the others go on in a smaller batch
            keep = (~ended).nonzero()[:, 0]
            rows = rows[keep.cpu()]
            ids = ids[keep]
            new_mask = mask.new_ones(len(keep), ids.shape[1] - mask.shape[1])
            mask = torch.cat([mask[keep], new_mask], 1)  # (B, L)
            # reorder_cache, because batch_select_indices leaves out the states of linear attention;
            # a cache that generate keeps to itself (Mamba) is computed anew
            if len(keep) and cache is not None:
                cache.reorder_cache(keep)
        return responses

    def pad_left(self, prompts):
        """Ids and attention mask (B, L) of lists of ids, with zeros on the left."""
        width = max(map(len, prompts))
        ids = [[0] * (width - len(p)) + p for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def cut_at_eos(self, response):
        """(Ids up to and with the first end token, or all of them; whether there is one)."""
        for k, token in enumerate(response):
            if token in self.eos_ids:
                return response[: k + 1], True
        return response, False


def load_model(model, dtype):
    """A causal language model in this dtype; raises InputError for one that cannot be loaded."""
    if os.path.isdir(model):
        weight_file_names(model)  # refuses an index of files that are not there
    try:
        policy, found = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            attn_implementation=exact_attention(AutoConfig.from_pretrained(model)),
            use_safetensors=True,  # other formats can run code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
        )
    except Exception as e:  # an architecture's own code can fail in any way
        raise InputError(f"{model}: its weights cannot be loaded ({reason_of(e)})") from e

    # transformers would go on with random numbers
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        key, stored, configured = mismatched[0]
        raise InputError(
            f"{model}: weight {key} has shape {list(stored)}, "
            f"its config.json says {list(configured)}"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"{model}: weight {missing[0]} is missing in its safetensors")
    return policy


def check_vocabulary(requests, policy):
    """Raise InputError for a prompt whose tokenizer knows more tokens than the model has."""
    n_tokens = policy.get_input_embeddings().weight.shape[0]
    for ids, _ in requests:
        if max(ids) >= n_tokens:
            raise InputError(
                f"{policy.name_or_path}: its tokenizer gives a prompt the id {max(ids)}, and the "
                f"model has {n_tokens} tokens: take the tokenizer that it was trained with"
            )


def bytes_per_token(policy):
    """Bytes of keys and values that the cache holds for one token of one row."""
    one_token = torch.zeros(1, 1, dtype=torch.long, device=policy.device)
    cache = getattr(policy(one_token, use_cache=True), "past_key_values", None)
    n_bytes = 0
    for layer in getattr(cache, "layers", []):
        if getattr(layer, "keys", None) is not None:  # linear attention has states instead
            n_bytes += layer.keys.nbytes + layer.values.nbytes
    return n_bytes


def rows_that_fit(n_rows, n_tokens, token_bytes, memory):
    """n_rows, or as many rows of n_tokens as fit into this many bytes, but one at least."""
    row_bytes = n_tokens * token_bytes
    if n_rows * row_bytes <= memory:
        return n_rows
    return max(1, memory // row_bytes)


def sum_logps(steps, is_eos, start, stop_lengths):
    """Sums (B,) of log-probs (B, new) up to and with the end token, or before the stop length.

    is_eos: (B, new); start: position of the first of the new tokens; stop_lengths: (B,).
    """
    no_eos_before = is_eos.cumsum(1) - is_eos.long() == 0  # (B, new)
    positions = torch.arange(start, start + steps.shape[1], device=steps.device)  # (new,)
    is_before_stop = positions < stop_lengths[:, None]  # (B, new)
    return (steps * (no_eos_before & is_before_stop)).sum(1)
