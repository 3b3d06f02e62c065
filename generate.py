"""Sample candidate responses from a policy: prompts -> candidates.

    python generate.py config/aipo_nemo.py --model=MODEL --prompts=prompts.jsonl --out=candidates.jsonl
    torchrun --nproc-per-node=8 generate.py ...            8 GPUs, 8 engines, each its share of the prompts, 8 shards

Tokens in, tokens out: the engine gets the ids of the rendered prompt and its ids are what training will see. Prompts that
are too long or spell a control token are dropped and counted in the manifest.
"""
import importlib.util
import os
import random
import sys

from configurator import configure
from data import DTYPES, RANK, WORLD_SIZE, begin, control_text, derive_seed, load_tokenizer, pick_device, read_prompts, render, writing

# ---- settings ----
model = ""                              # policy: Hugging Face folder or hub name
prompts = ""                            # JSONL, a JSON array, or NAME:SPLIT of a Hugging Face dataset
prompt_field = ""                       # column of the prompt; empty: the first of prompt, messages, instruction
n_prompts = 0                           # prompts to take, others at every iteration until all are used up; 0: all
iteration = 0                           # t; chooses the prompts and enters the seeds
out = ""                                # candidates file to write (JSONL)
engine = "auto"                         # vllm, transformers, or auto: vllm where it is installed
n_responses = 5                         # responses per prompt (AIPO: N = 5)
temperature = 0.4                       # 0 is greedy (AIPO's repository: 0.4)
top_k = 50                              # 0: off (AIPO's repository: 50)
top_p = 1.0                             # nucleus
max_new_tokens = 2048                   # longest response, end token included
max_prompt_tokens = 512                 # longer prompts are dropped, template included (AIPO: 512)
dtype = "bfloat16"                      # of the computation; float32 on CPUs
seed = 0                                # of the run
generate_rows = 512                     # responses sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
config = configure(globals())


def vllm_engine(ends):
    """Requests (prompt ids, seed) -> lists of (ids, finished, log-prob), by vLLM, all requests in one call."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"                  # the engine lives and dies with this process
    first = int(os.environ.get("LOCAL_RANK", 0)) * tensor_parallel      # each process of a node has GPUs of its own
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(64)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first:first + tensor_parallel])
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)                                      # torchrun's world is not the engine's
    import torch
    if torch.version.cuda and torch.cuda.device_count() != tensor_parallel:
        sys.exit(f"--tensor_parallel={tensor_parallel}: process {first // tensor_parallel} finds {torch.cuda.device_count()} GPUs; start fewer engines")
    from vllm import LLM, SamplingParams
    # On a CPU: compiling takes longer than a small model samples, and a prompt prefilled in parts loses the seed of its
    # request ("CPU Generator does not use offset", vLLM 0.32), so every prompt is prefilled whole.
    cpu = {"kv_cache_memory_bytes": 2 * 2**30, "enforce_eager": True, "enable_chunked_prefill": False,
           "max_num_batched_tokens": max(8192, max_prompt_tokens + max_new_tokens)}
    gpu = {"gpu_memory_utilization": gpu_memory}
    llm = LLM(model, dtype=dtype, seed=seed, max_model_len=max_prompt_tokens + max_new_tokens, enable_prefix_caching=True,
              tensor_parallel_size=tensor_parallel, **(gpu if torch.cuda.is_available() else cpu))

    def sample(requests):
        settings = [SamplingParams(n=n_responses, temperature=temperature, top_k=top_k or -1, top_p=top_p, max_tokens=max_new_tokens,
                                   seed=s, logprobs=0, stop_token_ids=sorted(ends), detokenize=False) for _, s in requests]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], settings)
        return [[(list(o.token_ids), o.finish_reason == "stop", o.cumulative_logprob) for o in output.outputs] for output in outputs]

    return sample


def transformers_engine(ends):
    """The same by transformers' generate, any device: rows of similar length together, finished rows dropped on the way."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, StoppingCriteria
    device = pick_device()
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
    policy.generation_config = GenerationConfig()                       # else its own penalties would enter what is left unset
    end = torch.tensor(sorted(ends), device=device)

    class LogProbs(LogitsProcessor):
        """Runs before temperature and top-k: keeps log p(token) of the token that the step before sampled."""

        def __init__(self):
            self.before, self.steps = None, []

        def __call__(self, ids, logits):
            self.add(ids)
            self.before = logits.float().log_softmax(-1)                                                     # (B, V)
            return logits

        def add(self, ids):
            if self.before is not None:
                self.steps.append(self.before.gather(1, ids[:, -1:]))                                        # (B, 1)

    class MostAreDone(StoppingCriteria):
        """Stops once half of the rows have ended, so that the other half goes on in a smaller batch."""

        def __init__(self, rows):
            self.done = torch.zeros(rows, dtype=torch.bool, device=device)

        def __call__(self, ids, scores, **_):
            self.done |= torch.isin(ids[:, -1], end)
            return self.done | (self.done.float().mean() > 0.5)

    def sample_rows(rows):
        """rows of prompt ids -> (ids, finished, log-prob) of one response each."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)                        # (B, L), padded left
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        going, cache, results, logp = torch.arange(len(rows)), None, [None] * len(rows), torch.zeros(len(rows))
        while len(going):
            logprobs, criterion = LogProbs(), MostAreDone(len(going))
            asked = GenerationConfig(max_length=width + max_new_tokens, do_sample=temperature > 0, temperature=temperature or None,
                                     top_k=top_k, top_p=top_p, eos_token_id=sorted(ends), pad_token_id=min(ends), return_dict_in_generate=True)
            start = ids.shape[1]
            output = policy.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=asked,
                                     logits_processor=[logprobs], stopping_criteria=[criterion])
            ids, cache = output.sequences, output.past_key_values
            logprobs.add(ids)
            steps = torch.cat(logprobs.steps, 1)                                                             # (B, new)
            ended = torch.isin(ids[:, start:], end)
            steps = steps * (ended.cumsum(1) - ended.long() == 0)       # nothing counts after the end token
            logp[going] += steps.sum(1).cpu()
            done = ended.any(1) | (ids.shape[1] >= width + max_new_tokens)
            for b in done.nonzero()[:, 0].tolist():
                response = ids[b, width:].tolist()
                stop = next((k for k, token in enumerate(response) if token in ends), None)
                r = int(going[b])
                results[r] = (response if stop is None else response[:stop + 1], stop is not None, float(logp[r]))
            keep = (~done).nonzero()[:, 0]
            going, ids = going[keep.cpu()], ids[keep]
            mask = torch.cat([mask[keep], mask.new_ones(len(keep), ids.shape[1] - mask.shape[1])], 1)
            if len(keep):
                cache.batch_select_indices(keep)
        return results

    @torch.inference_mode()
    def sample(requests):
        order = sorted(range(len(requests)), key=lambda r: len(requests[r][0]))
        results, size = [None] * len(requests), max(1, generate_rows // n_responses)
        with tqdm(total=len(order) * n_responses, desc="generate", unit="resp") as bar:
            for a in range(0, len(order), size):
                batch = order[a:a + size]
                torch.manual_seed(derive_seed(*(requests[r][1] for r in batch)))
                rows = sample_rows([requests[r][0] for r in batch for _ in range(n_responses)])
                for k, r in enumerate(batch):
                    results[r] = rows[k * n_responses:(k + 1) * n_responses]
                bar.update(len(rows))
        return results

    return sample


def main():
    dtype in DTYPES or sys.exit(f"--dtype={dtype}: there are {', '.join(DTYPES)}")
    manifest = begin(out, ".jsonl", config, "model", "prompts")
    if manifest is None:
        return
    tokenizer, ends = load_tokenizer(model)
    control = control_text(tokenizer)
    counts, pool = {"prompts": 0, "control_text": 0, "too_long": 0}, []
    for row in read_prompts(prompts, prompt_field):
        if any(control.search(m["content"]) for m in row["prompt"]):
            counts["control_text"] += 1
            continue
        row["prompt_ids"] = render(tokenizer, row["prompt"], f"{prompts}: prompt '{row['id']}'")
        if len(row["prompt_ids"]) > max_prompt_tokens:
            counts["too_long"] += 1
            continue
        pool.append(row)
    pool or sys.exit(f"{prompts}: no prompt is left ({counts['control_text']} with control text, {counts['too_long']} above max_prompt_tokens)")
    if n_prompts:
        random.Random(seed).shuffle(pool)
        first = max(iteration - 1, 0) * n_prompts
        pool = [pool[k % len(pool)] for k in range(first, first + min(n_prompts, len(pool)))]
    counts["prompts"], rows = len(pool), pool[RANK::WORLD_SIZE]

    found = importlib.util.find_spec("vllm") is not None
    engines = {"vllm": vllm_engine, "transformers": transformers_engine, "auto": vllm_engine if found else transformers_engine}
    engine in engines or sys.exit(f"--engine={engine}: there are {', '.join(engines)}")
    found or engines[engine] is transformers_engine or sys.exit("--engine=vllm: vllm is not installed; `make vllm` or --engine=transformers")
    requests = [(row["prompt_ids"], derive_seed(seed, iteration, row["id"])) for row in rows]
    responses = engines[engine](ends)(requests) if requests else []     # fewer prompts than processes
    with writing(out, manifest) as write:
        for row, sampled in zip(rows, responses):
            write(row | {"responses": [
                {"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids, "finished": finished, "logp": logp}
                for ids, finished, logp in sampled]})
        lengths = [len(ids) for sampled in responses for ids, *_ in sampled]
        counts |= {"responses": len(lengths), "tokens": sum(lengths), "finished": sum(f for s in responses for _, f, _ in s)}
        manifest["counts"] = counts
    print(f"{len(rows)} prompts, {len(lengths)} responses of {sum(lengths) / max(1, len(lengths)):.1f} tokens,",
          f"{counts['finished'] / max(1, len(lengths)):.0%} finished -> {out}")


if __name__ == "__main__":
    main()
