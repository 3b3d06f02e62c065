"""Engines that sample from a model here.

    sample = load_engine("auto", model, ends, longest, dtype="bfloat16", ...)
    responses = sample(requests, n_responses=5, temperature=0.4, top_k=50, top_p=1.0, max_new_tokens=2048)

A request is (prompt ids, seed); it gets a list of n_responses tuples (ids, finished, log-prob in nats under the untempered model).
Sampling ends at an end token, and soon behind any of the texts in `stop`.
"""
import importlib.util
import os
import shutil
import subprocess
import sys
import time

from tqdm import tqdm

from nanoaipo.processes import DTYPES, pick_device
from nanoaipo.seeds import derive_seed


def wait_for_gpus(gpus, share, patience=300, pause=5):
    """Wait until `share` of the memory of each of these GPUs (as nvidia-smi -i names them) is free, saying who holds it.

    A stage before may still be going; after `patience` seconds the program ends. Without nvidia-smi nothing is waited for.
    """
    def smi(what):
        command = ["nvidia-smi", "-i", gpus, f"--query-{what}", "--format=csv,noheader,nounits"]
        lines = (line.split(", ", 3) for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines())
        return [line for line in lines if len(line) == 4 and line[2].isdigit()]          # not [N/A], not "No devices were found"

    for left in range(patience, -1, -pause) if shutil.which("nvidia-smi") else ():
        short = [(name, uuid, int(free), share * int(total)) for name, uuid, free, total in smi("gpu=index,uuid,memory.free,memory.total") if int(free) < share * int(total)]
        if not short:
            return
        name, uuid, free, wanted = short[0]
        holders = "; ".join(f"process {pid} ({used} MiB, {program})" for owner, pid, used, program in smi("compute-apps=gpu_uuid,pid,used_memory,process_name") if owner == uuid)
        told = f"GPU {name}: {free} MiB are free, --gpu_memory={share} wants {wanted:.0f}; it is held by {holders or 'a process of another container'}"
        left >= pause or sys.exit(f"{told}; end that, or lower --gpu_memory")
        print(f"{told}; waiting, {left} s at most", flush=True)
        time.sleep(pause)


def vllm_engine(model, ends, longest, *, dtype, seed, tensor_parallel, gpu_memory):
    """vLLM, all requests in one call."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"                  # the engine lives and dies with this process
    first = int(os.environ.get("LOCAL_RANK", 0)) * tensor_parallel      # each process of a node has GPUs of its own
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(64)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first:first + tensor_parallel])
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)                                      # torchrun's world is not the engine's
    import torch
    torch.cuda.is_initialized() and sys.exit("--engine=vllm: this process uses its GPU already; start the judge as a server and name it with --judge_url")
    if torch.version.cuda and torch.cuda.device_count() != tensor_parallel:
        sys.exit(f"--tensor_parallel={tensor_parallel}: process {first // tensor_parallel} finds {torch.cuda.device_count()} GPUs; start fewer engines")
    if torch.version.cuda:
        wait_for_gpus(os.environ["CUDA_VISIBLE_DEVICES"], gpu_memory)
    from vllm import LLM, SamplingParams
    # On a CPU: compiling takes longer than a small model samples, and a prompt prefilled in parts loses the seed of its
    # request ("CPU Generator does not use offset", vLLM 0.32), so every prompt is prefilled whole.
    cpu = {"kv_cache_memory_bytes": 2 * 2**30, "enforce_eager": True, "enable_chunked_prefill": False,
           "max_num_batched_tokens": max(8192, longest)}
    gpu = {"gpu_memory_utilization": gpu_memory}
    llm = LLM(model, dtype=dtype, seed=seed, max_model_len=longest, enable_prefix_caching=True,
              tensor_parallel_size=tensor_parallel, **(gpu if torch.cuda.is_available() else cpu))

    def sample(requests, *, n_responses, temperature, top_k, top_p, max_new_tokens, stop=()):
        settings = [SamplingParams(n=n_responses, temperature=temperature, top_k=top_k or -1, top_p=top_p, max_tokens=max_new_tokens, seed=s,
                                   logprobs=0, stop_token_ids=sorted(ends), stop=list(stop), detokenize=bool(stop)) for _, s in requests]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], settings)
        return [[(list(o.token_ids), o.finish_reason == "stop", o.cumulative_logprob) for o in output.outputs] for output in outputs]

    return sample


def transformers_engine(model, ends, longest, *, dtype, generate_rows):
    """transformers' generate, any device: rows of similar length together, finished rows dropped on the way."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, StoppingCriteria
    device, tokenizer = pick_device(), AutoTokenizer.from_pretrained(model)
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

        def __init__(self, rows, width, stop):
            self.width, self.stop, self.done = width, stop, torch.zeros(rows, dtype=torch.bool, device=device)
            self.stopped = torch.full((rows,), 2**31, device=device)    # length behind a stop text

        def __call__(self, ids, scores, **_):
            self.done |= torch.isin(ids[:, -1], end)
            if self.stop:
                tails = tokenizer.batch_decode(ids[:, max(self.width, ids.shape[1] - 8):])
                hit = torch.tensor([any(s in tail for s in self.stop) for tail in tails], device=device)
                self.stopped[hit] = self.stopped[hit].clamp(max=ids.shape[1])
            done = self.done | (self.stopped <= ids.shape[1])
            return done | (done.float().mean() > 0.5)

    def sample_rows(rows, temperature, top_k, top_p, max_new_tokens, stop=()):
        """rows of prompt ids -> (ids, finished, log-prob) of one response each."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)                        # (B, L), padded left
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        going, cache, results, logp = torch.arange(len(rows)), None, [None] * len(rows), torch.zeros(len(rows))
        while len(going):
            logprobs, criterion = LogProbs(), MostAreDone(len(going), width, stop)
            asked = GenerationConfig(max_length=width + max_new_tokens, do_sample=temperature > 0, temperature=temperature or None,
                                     top_k=top_k, top_p=top_p, eos_token_id=sorted(ends), pad_token_id=min(ends), return_dict_in_generate=True)
            start = ids.shape[1]
            output = policy.generate(ids, attention_mask=mask, past_key_values=cache, generation_config=asked,
                                     logits_processor=[logprobs], stopping_criteria=[criterion])
            ids, cache = output.sequences, output.past_key_values
            logprobs.add(ids)
            steps = torch.cat(logprobs.steps, 1)                                                             # (B, new)
            ended = torch.isin(ids[:, start:], end)
            places = torch.arange(start, ids.shape[1], device=device)   # nothing counts after the end token or the stop text
            steps = steps * ((ended.cumsum(1) - ended.long() == 0) & (places < criterion.stopped[:, None]))
            logp[going] += steps.sum(1).cpu()
            stopped = criterion.stopped.tolist()
            done = ended.any(1) | (criterion.stopped < 2**31) | (ids.shape[1] >= width + max_new_tokens)
            for b in done.nonzero()[:, 0].tolist():
                response = ids[b, width:stopped[b]].tolist()
                last = next((k for k, token in enumerate(response) if token in ends), None)
                r = int(going[b])
                results[r] = (response if last is None else response[:last + 1], last is not None or stopped[b] < 2**31, float(logp[r]))
            keep = (~done).nonzero()[:, 0]
            going, ids = going[keep.cpu()], ids[keep]
            mask = torch.cat([mask[keep], mask.new_ones(len(keep), ids.shape[1] - mask.shape[1])], 1)
            if len(keep):
                cache.batch_select_indices(keep)
        return results

    @torch.inference_mode()
    def sample(requests, *, n_responses, **sampling):
        order = sorted(range(len(requests)), key=lambda r: len(requests[r][0]))
        results, size = [None] * len(requests), max(1, generate_rows // n_responses)
        with tqdm(total=len(order) * n_responses, desc="generate", unit="resp") as bar:
            for a in range(0, len(order), size):
                batch = order[a:a + size]
                torch.manual_seed(derive_seed(*(requests[r][1] for r in batch)))
                rows = sample_rows([requests[r][0] for r in batch for _ in range(n_responses)], **sampling)
                for k, r in enumerate(batch):
                    results[r] = rows[k * n_responses:(k + 1) * n_responses]
                bar.update(len(rows))
        return results

    return sample


def context_length(model):
    """Tokens of prompt and response together that a model was built for."""
    from transformers import AutoConfig
    return getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", 2**31)


def load_engine(engine, model, ends, longest, *, dtype, seed, tensor_parallel, gpu_memory, generate_rows):
    """An engine's `sample`; longest: tokens of the longest prompt and response together.

    engine: vllm, transformers, or auto, which is vllm where it is installed.
    """
    dtype in DTYPES or sys.exit(f"--dtype={dtype}: there are {', '.join(DTYPES)}")
    found = importlib.util.find_spec("vllm") is not None
    engines = {"vllm": vllm_engine, "transformers": transformers_engine, "auto": vllm_engine if found else transformers_engine}
    engine in engines or sys.exit(f"--engine={engine}: there are {', '.join(engines)}")
    start = engines[engine]
    found or start is transformers_engine or sys.exit("--engine=vllm: vllm is not installed; `make vllm` or --engine=transformers")
    if start is vllm_engine:
        return vllm_engine(model, ends, longest, dtype=dtype, seed=seed, tensor_parallel=tensor_parallel, gpu_memory=gpu_memory)
    return transformers_engine(model, ends, longest, dtype=dtype, generate_rows=generate_rows)
