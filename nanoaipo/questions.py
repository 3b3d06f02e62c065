"""Questions to a model, here or behind an endpoint; every reply is kept the moment it comes.

    replies = ask(questions, "pairs.jsonl", endpoint("https://api.openai.com/v1", 16))

A question is a JSON object with model, messages, temperature, max_tokens, and whatever else tells it from the others; its reply is text.
"""
import concurrent.futures
import glob
import hashlib
import json
import os
import sys
import threading

from tqdm import tqdm

from nanoaipo.chat import control_pattern, load_tokenizer, render
from nanoaipo.engines import load_engine, context_length
from nanoaipo.files import shard_path
from nanoaipo.seeds import derive_seed

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


def local_model(model, *, engine, dtype, seed, tensor_parallel, gpu_memory, generate_rows):
    """The same by an engine of this process, 512 questions at a time, so that a kill costs no more than those."""
    def answer(questions, keep):
        tokenizer, ends = load_tokenizer(model, "ranker_model")
        control, most = control_pattern(tokenizer), questions[0]["max_tokens"]
        ids, room = [render(tokenizer, q["messages"], model, control) for q in questions], context_length(model) - most
        keep({n: {"reply": "", "error": f"{len(i)} tokens, the model has room for {room}"} for n, i in enumerate(ids) if len(i) > room})
        short = [n for n, i in enumerate(ids) if len(i) <= room]
        sample = short and load_engine(engine, model, ends, max(len(ids[n]) for n in short) + most, dtype=dtype, seed=seed,
                                       tensor_parallel=tensor_parallel, gpu_memory=gpu_memory, generate_rows=generate_rows)
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
    stem, path = os.path.splitext(out)[0], os.path.splitext(shard_path(out))[0] + ".replies"
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
