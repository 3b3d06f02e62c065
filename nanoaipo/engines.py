"""Everything that writes text: engines that sample from a model here, and endpoints that are asked over the network.

    sample = load_engine("auto", model, ends, longest, settings)
    responses = sample(requests, n_responses=5, temperature=0.4, top_k=50, top_p=1.0, max_new_tokens=2048)

A request is (prompt ids, seed); it gets a list of n_responses tuples (ids, finished, log-prob in nats under the untempered model).
Sampling ends at an end token, and soon behind any of the texts in `stop`.

    replies = ask(questions, "pairs.jsonl", endpoint("https://api.openai.com/v1", 16))

A question is a JSON object with model, messages, temperature, max_tokens, and whatever else tells it from the others; its reply is text.
"""
import concurrent.futures
import glob
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import time

from tqdm import tqdm

from nanoaipo.data import DTYPES, control_text, derive_seed, load_tokenizer, pick_device, render, shard


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


def positions(model):
    """Tokens of prompt and response together that a model was built for."""
    from transformers import AutoConfig
    return getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", 2**31)


def load_engine(engine, model, ends, longest, settings):
    """An engine's `sample`; longest: tokens of the longest prompt and response together; settings: those of the script.

    engine: vllm, transformers, or auto, which is vllm where it is installed. Each takes the settings that its signature names.
    """
    settings["dtype"] in DTYPES or sys.exit(f"--dtype={settings['dtype']}: there are {', '.join(DTYPES)}")
    found = importlib.util.find_spec("vllm") is not None
    engines = {"vllm": vllm_engine, "transformers": transformers_engine, "auto": vllm_engine if found else transformers_engine}
    engine in engines or sys.exit(f"--engine={engine}: there are {', '.join(engines)}")
    start = engines[engine]
    found or start is transformers_engine or sys.exit("--engine=vllm: vllm is not installed; `make vllm` or --engine=transformers")
    return start(model, ends, longest, **{k: settings[k] for k in inspect.getfullargspec(start).kwonlyargs})


# ---------------------------------------------------------------------------------------------- questions and replies


PARAMETERS = ("model", "messages", "temperature", "top_p", "max_tokens", "logprobs", "top_logprobs")
OPTIONAL = {*PARAMETERS} - {"model", "messages"}                        # some models refuse some of them


def endpoint(url, concurrency):
    """A way to answer questions: an OpenAI-compatible endpoint, `concurrency` requests at a time, the key from OPENAI_API_KEY.

    The client repeats what fails in passing (no connection, 429, 5xx, no answer for two minutes) up to 20 times, 8 seconds
    apart at most. A parameter that the model does not know is left out, aloud. What the endpoint refuses to answer (400, 413, 422:
    too long, filtered), or answers four times with nothing in it, has an error for a reply; any other refusal ends the program.
    However it ends, requests under way are waited for, and their replies kept.
    """
    from openai import APIStatusError, OpenAI, OpenAIError
    key = os.environ.get("OPENAI_API_KEY") or "none"
    key.isascii() or sys.exit("OPENAI_API_KEY: has characters that no key has")
    client = OpenAI(base_url=url, api_key=key, max_retries=20, timeout=120)

    refused = set()                                                     # parameters that this model does not take

    def one(question, tries=3):
        asked = {k: question[k] for k in PARAMETERS if k in question and k not in refused}
        if "max_tokens" in refused:                                     # reasoning models have another name for it
            asked["max_completion_tokens"] = question["max_tokens"]
        try:
            response = client.chat.completions.with_raw_response.create(**asked)
        except APIStatusError as e:
            if e.status_code not in (400, 413, 422):
                raise
            if e.code in ("unsupported_parameter", "unsupported_value") and e.param in asked.keys() & OPTIONAL:
                e.param in refused or print(f"{url}: {question['model']} does not take this {e.param}, asked without it from now on", flush=True)
                refused.update({"logprobs", "top_logprobs"} if "logprobs" in e.param else {e.param})
                return one(question)
            return {"reply": "", "error": str(e).replace(key, "***")[:300]}
        text = response.http_response.text
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            reply = {"reply": ("" + (choice["message"]["content"] or "")).encode(errors="replace").decode(),
                     "finish": choice.get("finish_reason"), "usage": {**(body.get("usage") or {})}}
            return reply | ({"logprobs": choice["logprobs"]} if choice.get("logprobs") else {})
        except (ValueError, LookupError, TypeError):                    # status 200 and no answer in it
            return one(question, tries - 1) if tries else {"reply": "", "error": f"no answer in it: {text.replace(key, '***')[:200]}"}

    def answer(questions, keep):
        pool = concurrent.futures.ThreadPoolExecutor(concurrency)
        try:
            for future in concurrent.futures.as_completed([pool.submit(lambda n: keep({n: one(questions[n])}), n) for n in range(len(questions))]):
                future.result()
        except OpenAIError as e:
            sys.exit(f"{url}: {type(e).__name__}: {str(e).replace(key, '***')[:300]}; the replies that came are kept, the same command asks for the rest")
        finally:
            pool.shutdown(cancel_futures=True)

    return answer


def local_model(engine, model, settings):
    """The same by an engine of this process, 512 questions at a time, so that a kill costs no more than those."""
    def answer(questions, keep):
        tokenizer, ends = load_tokenizer(model, "ranker_model")
        control, most = control_text(tokenizer), questions[0]["max_tokens"]
        ids, room = [render(tokenizer, q["messages"], model, control) for q in questions], positions(model) - most
        keep({n: {"reply": "", "error": f"{len(i)} tokens, the model has room for {room}"} for n, i in enumerate(ids) if len(i) > room})
        short = [n for n, i in enumerate(ids) if len(i) <= room]
        sample = short and load_engine(engine, model, ends, max(len(ids[n]) for n in short) + most, settings)
        for start in range(0, len(short), 512):
            block = short[start:start + 512]
            sampled = sample([(ids[n], derive_seed(questions[n])) for n in block], n_responses=1, temperature=questions[0]["temperature"],
                             top_k=0, top_p=1.0, max_new_tokens=most)
            keep({n: {"reply": tokenizer.decode(response, skip_special_tokens=True), "usage": {"prompt_tokens": len(ids[n]), "completion_tokens": len(response)}}
                  for n, ((response, *_),) in zip(block, sampled)})

    return answer


def ask(questions, out, answer):
    """The replies to `questions`, in their order, as {reply, usage, ...}. Each is kept as it came, the moment it comes, in NAME.replies beside `out`.

    answer(questions, keep) calls keep({index: {reply, usage}}), from any thread, in any order. A question that an earlier run or
    another process of this one has a reply to is not asked again, nor is the same question twice; one with an error is.
    """
    stem, path = os.path.splitext(out)[0], os.path.splitext(shard(out))[0] + ".replies"
    keys, kept = [hashlib.sha256(json.dumps(q, sort_keys=True).encode()).hexdigest() for q in questions], {}
    for file in glob.glob(glob.escape(stem) + ".replies") + glob.glob(glob.escape(stem) + "-[0-9]*-of-[0-9]*.replies"):
        with open(file, "rb") as f:
            lines = f.read().splitlines(keepends=True)
        if file == path and lines and not lines[-1].endswith(b"\n"):    # a kill has cut the last one
            os.truncate(path, sum(map(len, lines[:-1])))
        kept |= {line["key"]: line for line in map(json.loads, (line for line in lines if line.endswith(b"\n"))) if "error" not in line}
    missing = {key: q for key, q in zip(keys, questions) if key not in kept}
    if missing:
        names, before, lock = list(missing), len({*keys} & kept.keys()), threading.Lock()
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with tqdm(total=len(missing), desc="ask", unit="reply") as bar:
            def keep(replies):
                lines = [{"key": names[n], "about": missing[names[n]].get("about"), **reply} for n, reply in replies.items()]
                with lock, open(path, "a", encoding="utf-8") as f:
                    f.write("".join(json.dumps(line) + "\n" for line in lines))
                    f.flush()
                    os.fsync(f.fileno())
                    kept.update((line["key"], line) for line in lines)
                    bar.update(len(lines))

            answer(list(missing.values()), keep)
        usage, errors = [kept[name].get("usage", {}) for name in names], [kept[name]["error"] for name in names if "error" in kept[name]]
        print(f"{len(missing)} questions asked, {before} replies were there; {sum(u.get('prompt_tokens') or 0 for u in usage)} tokens read,",
              f"{sum(u.get('completion_tokens') or 0 for u in usage)} written -> {path}" + (f"; {len(errors)} refused, such as: {errors[0]}" if errors else ""))
    return [kept[key] for key in keys]
