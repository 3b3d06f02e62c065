"""Sample from a policy: prompts -> candidate responses, a pool -> new instructions (self-instruct), benchmark questions -> answers.

    python generate.py config/aipo_nemo.py --model=MODEL --prompts=prompts.jsonl --out=candidates.jsonl
    python generate.py config/aipo_nemo.py --model=MODEL --prompts=pool.jsonl --task=instructions --n_prompts=20000 --out=new.jsonl
    torchrun --nproc-per-node=8 generate.py ...            8 GPUs, 8 engines, each its share of the prompts, 8 shards

Tokens in, tokens out: the engine gets the ids of the rendered prompt and its ids are what training will see. Prompts that
are too long or spell a control token are dropped and counted in the manifest. Candidates and answers are kept block by block: run
a killed stage again and it goes on. With --engine=openai a model behind an endpoint answers, in text.
"""
import collections
import functools
import itertools
import json
import os
import random
import re
import sys
import time

from configurator import configure, run_script
from nanoaipo.chat import control_pattern, load_tokenizer, render
from nanoaipo.files import json_line, read_records, shard_path
from nanoaipo.processes import RANK, WORLD_SIZE
from nanoaipo.prompts import read_prompts
from nanoaipo.seeds import derive_seed
from nanoaipo.stages import open_stage, check_same_run, write_blocks, open_output
from nanoaipo.engines import load_engine, context_length
from nanoaipo.questions import ask, endpoint

# ---- settings ----
task = "candidates"                     # candidates; instructions: prompts written by the policy after the pool's; answers: one to each turn of each prompt
model = ""                              # policy: Hugging Face folder or hub name; with engine=openai a name at engine_url
prompts = ""                            # JSONL, a JSON array, or NAME:SPLIT of a Hugging Face dataset
prompt_field = ""                       # column of the prompt; empty: the first of prompt, messages, instruction, turns, chosen
n_prompts = 0                           # prompts to take (to write), others at every iteration until all are used up; 0: all
iteration = 0                           # t; chooses the prompts and enters the seeds
out = ""                                # candidates or prompts file to write (JSONL)
engine = "auto"                         # vllm, transformers, or auto: vllm where it is installed; openai: an endpoint
engine_url = ""                         # OpenAI-compatible endpoint, key in OPENAI_API_KEY (openai)
n_responses = 5                         # responses per prompt (AIPO: N = 5)
temperature = 0.4                       # 0 is greedy (AIPO's repository: 0.4)
top_k = 50                              # 0: off (AIPO's repository: 50)
top_p = 1.0                             # nucleus
max_new_tokens = 2048                   # longest response, end token included
max_prompt_tokens = 512                 # longer prompts are dropped, template included (AIPO: 512)
min_prompt_tokens = 0                   # shorter instructions are dropped, template not included (AIPO: 3)
answer_name = ""                        # the model's name in official answer files; empty: the last part of its path
instruction_temperature = 0.5           # of new instructions (AIPO's repository: 0.5, top_p 0.9, top_k 50)
instruction_examples = 8                # of the pool, shown in a call (AIPO: 8)
instruction_unfit = (r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b"
                     r"|^(write a program|detailed instructions:|task definition:|[^\w\s]|[^\x00-\x7f])")   # regex of what is dropped (AIPO)
instruction_similarity = 0.7            # Jaccard index of three-word shingles from which on two are one; 0: off, as in AIPO's repository
instruction_clusters = 0                # topics of the pool (k-means over TF-IDF) that examples are drawn from in turn; 0: from all of it
dtype = "bfloat16"                      # of the computation; float32 on CPUs
seed = 0                                # of the run
block = 2048                            # prompts sampled and kept together; a kill costs one block
generate_rows = 512                     # responses sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
config = configure(globals())
engine_settings = {k: config[k] for k in ("dtype", "seed", "tensor_parallel", "gpu_memory", "generate_rows")}

CATEGORIES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}   # FastChat's
HEADING = "Here are tasks that people have given to an assistant. All are different in topic, form and length.\n"
CALLS, LONGEST = 128, 1024                                              # calls in a round at least, tokens of a reply (AIPO)
ANSWER = re.compile(r"\b(?:answer|output|solution):|^\s*a:(?!.*^\s*b:)", re.IGNORECASE | re.MULTILINE | re.DOTALL)


def read_pool(tokenizer, room):
    """(prompts that fit into max_prompt_tokens and `room`, with prompt_ids; counts of what was dropped and why, by process 0 for all)."""
    counts, pool = {"prompts": 0, "control_text": 0, "too_long": 0, "too_short": 0}, []
    if tokenizer is None:                                               # an endpoint's model: its server knows its limits
        return [{k: v for k, v in row.items() if k != "prompt_ids"} for row in read_prompts(prompts, prompt_field)], counts
    control, most = control_pattern(tokenizer), min(max_prompt_tokens, room)
    for row in read_prompts(prompts, prompt_field):
        if any(control.search(m["content"]) for m in row["prompt"]):
            counts["control_text"] += 1
            continue
        row["prompt_ids"] = render(tokenizer, row["prompt"], f"{prompts}: prompt '{row['id']}'")
        if len(row["prompt_ids"]) > most:
            counts["too_long"] += 1
        elif min_prompt_tokens and len(tokenizer(row["prompt"][-1]["content"], add_special_tokens=False).input_ids) < min_prompt_tokens:
            counts["too_short"] += 1
        else:
            pool.append(row)
    pool or sys.exit(f"{prompts}: no prompt is left ({counts['control_text']} with control text, {counts['too_long']} above max_prompt_tokens "
                     f"and what max_new_tokens leaves, {most}, {counts['too_short']} below min_prompt_tokens)")
    return pool, counts if RANK == 0 else dict.fromkeys(counts, 0)


def counted(counts, records):
    """The counts of a finished file for its manifest, told aloud."""
    responses = [(len(r.get("ids", ())), r["finished"]) for record in records for r in record["responses"] + record.get("later_responses", [])]
    tokens, finished, each = sum(n for n, _ in responses), sum(done for _, done in responses), max(1, len(responses))
    print(f"{counts['prompts']} prompts, {len(responses)} responses of {tokens / each:.1f} tokens, {finished / each:.0%} finished -> {shard_path(out)}")
    return counts | {"responses": len(responses), "tokens": tokens, "finished": finished}


def candidates(manifest, tokenizer, ends):
    limit = 2**31 if tokenizer is None else context_length(model)
    pool, counts = read_pool(tokenizer, limit - max_new_tokens)
    if n_prompts:
        random.Random(seed).shuffle(pool)
        first = max(iteration - 1, 0) * n_prompts
        pool = [pool[k % len(pool)] for k in range(first, first + min(n_prompts, len(pool)))]
    rows = pool[RANK::WORLD_SIZE]
    counts["prompts"] = len(rows)
    work = from_endpoint
    if tokenizer is not None and rows:                                  # fewer prompts than processes
        sample = load_engine(engine, model, ends, min(max_prompt_tokens + max_new_tokens, limit), **engine_settings)

        def work(rows):
            requests = [(row["prompt_ids"], derive_seed(seed, iteration, row["id"])) for row in rows]
            sampled = sample(requests, n_responses=n_responses, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens)
            return [row | {"responses": [{"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids, "finished": finished, "logp": logp}
                                         for ids, finished, logp in responses]} for row, responses in zip(rows, sampled)]

    write_blocks(out, manifest, rows, block, work, functools.partial(counted, counts))


def from_endpoint(rows):
    """The rows with the responses of a model behind engine_url, as text; what it refused to answer is missing among them."""
    questions = [{"model": model, "messages": row["prompt"], "temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens, "about": [row["id"], k]}
                 for row in rows for k in range(n_responses)]
    for _ in range(2):                                                  # what had an error for a reply once more: it may pass
        replies = ask(questions, out, endpoint(engine_url, 16))
    any("finish" in r for r in replies) or os.path.getsize(shard_path(out) + ".tmp") or sys.exit(      # a block before had answers
        f"{engine_url}: not one answer to {len(questions)} questions; the first reply: {replies[0]}")
    replies = iter(replies)
    return [row | {"responses": [{"text": r["reply"], "finished": r["finish"] == "stop"} for r in itertools.islice(replies, n_responses) if "finish" in r]}
            for row in rows]


def instruction_of(reply):
    """The instruction at the head of a reply that goes on with the list, cut where an answer begins."""
    text = re.split(rf"\n\s*\n|\n{instruction_examples + 2}\.", reply)[0].strip()
    return text if "example:" in text.lower() else ANSWER.split(text)[0].strip()


class Known:
    """Texts by their shingles of three words: is a new one nearly equal (Jaccard index of instruction_similarity) to one before?"""

    def __init__(self, texts):
        self.sizes, self.holders = [], collections.defaultdict(list)
        for text in texts:
            self.add(text)

    def shingles(self, text):
        words = re.findall(r"\w+", text.lower())
        return {hash(tuple(words[k:k + 3])) for k in range(max(1, len(words) - 2))}

    def add(self, text):
        for shingle in (shingles := self.shingles(text)):
            self.holders[shingle].append(len(self.sizes))
        self.sizes.append(len(shingles))

    def __contains__(self, text):
        shingles = self.shingles(text)
        shared = collections.Counter(k for shingle in shingles for k in self.holders.get(shingle, ()))
        return any(n / (len(shingles) + self.sizes[k] - n) >= (instruction_similarity or 2) for k, n in shared.items())


def topics(texts):
    """Lists of texts of one topic each: all of them, or k-means over TF-IDF."""
    if not instruction_clusters:
        return [texts]
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit_transform(texts)
    labels = KMeans(min(instruction_clusters, len(texts)), random_state=seed, n_init=1).fit_predict(vectors)
    return [[t for t, label in zip(texts, labels) if label == k] for k in sorted(set(labels))]


def instructions(manifest, tokenizer, ends):
    """Self-instruct (2212.10560) as AIPO has it: raw text, eight of the pool as a numbered list, the policy writes the ninth.

    Examples come from the pool alone, never from what was written. Calls go out in rounds until this process has its share of
    instructions that differ from each other, from the pool and from those of the processes before it, for which it waits; the
    program ends when ten times as many calls have not been enough. A killed stage begins anew, with the same calls.
    """
    try:
        unfit = re.compile(instruction_unfit or "(?!)", re.IGNORECASE)
    except re.error as e:
        sys.exit(f"--instruction_unfit={instruction_unfit}: not a regular expression: {e}")
    longest, limit = min(LONGEST, max_new_tokens), context_length(model)
    most = min(max_prompt_tokens, limit - max_new_tokens)               # of a rendered instruction, which is to be answered next
    pool, counts = read_pool(tokenizer, max_prompt_tokens)
    alone = [row["prompt"][-1]["content"] for row in pool if sum(m["role"] != "system" for m in row["prompt"]) == 1]        # else the end of a talk
    texts = list(dict.fromkeys(re.sub(r"\s*\n\s*\n\s*", "\n", text.strip()) for text in alone))
    wanted = len(range(RANK, n_prompts or sys.exit("--n_prompts is not set: how many instructions to write"), WORLD_SIZE))
    len(texts) >= instruction_examples or sys.exit(f"{prompts}: {len(texts)} prompts that fit; a call shows {instruction_examples} of them")
    control, known, groups, made, theirs = control_pattern(tokenizer), Known(texts), topics(texts), [], None
    counts["prompts"] = len(pool)
    counts |= dict.fromkeys(("calls", "unfinished", "empty", "unfit", "too_short", "too_long", "control_text", "known"), 0)
    room = min((instruction_examples + 1) * max_prompt_tokens, limit - longest)
    sample = wanted and load_engine(engine, model, ends, room + longest, **engine_settings)
    for n in itertools.count():
        if RANK and len(made) == wanted and theirs is None:
            while not all(map(os.path.exists, before := [shard_path(out, rank) for rank in range(RANK)])):        # they come first
                time.sleep(1)
            for path in before:
                check_same_run(path, manifest)
            theirs = Known(row["prompt"][0]["content"] for path in before for _, row in read_records(path))
            made = [text for text in made if text not in theirs]
            counts["known"] += wanted - len(made)
        if len(made) == wanted or counts["calls"] >= 10 * max(wanted, CALLS):
            break
        draw, requests = random.Random(derive_seed(seed, iteration, RANK, n)), []
        for call in range(max(CALLS, min(4096, 5 * (wanted - len(made)) // 4))):
            group = groups[call % len(groups)]
            shown = draw.sample(group, min(instruction_examples, len(group)))
            if len(shown) < instruction_examples:                       # a small topic
                shown += draw.sample([t for t in texts if t not in shown], instruction_examples - len(shown))
            ids = tokenizer(HEADING + "".join(f"\n{k}. {text}" for k, text in enumerate(shown, 1)) + f"\n{instruction_examples + 1}.").input_ids
            if len(ids) <= room:
                requests.append((ids, derive_seed(seed, iteration, RANK, n, call)))
        requests or sys.exit(f"--task=instructions: {instruction_examples} examples do not fit into {room} tokens; "
                             "lower --max_prompt_tokens, --max_new_tokens or --instruction_examples")
        replies = sample(requests, n_responses=1, temperature=instruction_temperature, top_k=50, top_p=0.9, max_new_tokens=longest,
                         stop=("\n\n", f"\n{instruction_examples + 2}."))
        for ((ids, finished, _),) in replies:
            counts["calls"] += 1
            text = instruction_of(tokenizer.decode(ids, skip_special_tokens=True))
            reason = ("unfinished" if not finished else "empty" if not text else "unfit" if unfit.search(text) else
                      "control_text" if control.search(text) else
                      "too_short" if len(tokenizer(text, add_special_tokens=False).input_ids) < max(4, min_prompt_tokens) else
                      "too_long" if len(render(tokenizer, [{"role": "user", "content": text}], model)) > most else
                      "known" if text in known or theirs and text in theirs else None)
            if reason:
                counts[reason] += 1
            elif len(made) < wanted:
                known.add(text)
                made.append(text)
        print(f"round {n + 1}: {len(made)} of {wanted} instructions after {counts['calls']} calls", flush=True)
    told = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
    len(made) == wanted or sys.exit(f"--task=instructions: {len(made)} of {wanted} distinct instructions ({told}); "
                                    "the policy repeats itself or does not go on with a list: ask for fewer, raise "
                                    "--instruction_temperature, or draw prompts from the pool (--new_instructions=0 in the loop)")
    manifest["counts"] = counts
    with open_output(out, manifest) as write:
        for k, text in enumerate(made):
            write({"id": f"new-{iteration}-{RANK}-{k}", "prompt": [{"role": "user", "content": text}]})
    print(f"{len(made)} new instructions; {told} -> {shard_path(out)}")


def answers(manifest, tokenizer, ends):
    """One response to each prompt, and to each further turn of a benchmark's question; nothing is dropped.

    Records carry the first turn's in `responses`, those of further turns in `later_responses`. A block holds all turns of its questions.
    """
    rows = read_prompts(prompts, prompt_field)[:n_prompts or None][RANK::WORLD_SIZE]
    control, limit, longest = control_pattern(tokenizer), context_length(model), 0
    turns = lambda row: row.get("turns", [""])                          # of a plain prompt there is the first
    heat = lambda row: CATEGORIES.get(str(row.get("category")), temperature) if "turns" in row else temperature
    for row in rows:
        row["prompt_ids"] = render(tokenizer, row["prompt"], f"{prompts}: prompt '{row['id']}'", control)
        size = len(row["prompt_ids"]) + max_new_tokens + sum(len(tokenizer(turn).input_ids) + 32 + max_new_tokens for turn in turns(row)[1:])
        size <= limit or sys.exit(f"{prompts}: '{row['id']}' may take {size} tokens with its answers, this model has {limit}: lower --max_new_tokens")
        longest = max(longest, size)
    sample = rows and load_engine(engine, model, ends, min(limit, 2 * longest), **engine_settings)        # an answer read again may be more tokens

    def work(rows):
        talks, given = [list(row["prompt"]) for row in rows], [[] for _ in rows]
        for turn in range(max(len(turns(row)) for row in rows)):
            for degree in sorted({heat(row) for row in rows if turn < len(turns(row))}):
                asked = [k for k, row in enumerate(rows) if turn < len(turns(row)) and heat(row) == degree]
                for k in asked if turn else ():
                    talks[k].append({"role": "user", "content": turns(rows[k])[turn]})
                requests = [(render(tokenizer, talks[k], f"{prompts}: prompt '{rows[k]['id']}'", control),
                             derive_seed(seed, iteration, rows[k]["id"], turn)) for k in asked]
                sampled = sample(requests, n_responses=1, temperature=degree, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens)
                for k, ((ids, finished, logp),) in zip(asked, sampled):
                    given[k].append({"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids, "finished": finished, "logp": logp})
                    talks[k].append({"role": "assistant", "content": given[k][-1]["text"]})
        return [row | {"responses": r[:1]} | ({"later_responses": r[1:]} if "turns" in row else {}) for row, r in zip(rows, given)]

    write_blocks(out, manifest, rows, block, work, functools.partial(counted, {"prompts": len(rows)}))


@functools.cache
def encoding(name):
    """tiktoken's, or None where the package or the encoding's file, cached or from the network, is not to be had."""
    try:
        import tiktoken
        return tiktoken.get_encoding(name)
    except Exception:                                                   # the network's errors come in many classes
        return None


def model_answer(row, name):
    """An answer as FastChat keeps it (several turns), Arena-Hard v0.1 (one turn) or v2.0 (a uid, no turns; with its style): stripped."""
    texts = [r["text"].strip() for r in row["responses"] + row.get("later_responses", [])]
    record = {"question_id": row.get("question_id", row["id"]), "answer_id": f"{name}-{row['id']}", "model_id": name, "tstamp": 0}
    if len(texts) > 1:
        return record | {"choices": [{"index": 0, "turns": texts}]}
    text, kind = texts[0], "cl100k_base" if "turns" in row else "o200k_base"
    size = len(encoding(kind).encode(text, disallowed_special=()) if encoding(kind) else row["responses"][0]["ids"])
    record["token_len_by"] = f"tiktoken {kind}" if encoding(kind) else "the policy's tokenizer"
    if "turns" in row:
        return record | {"choices": [{"index": 0, "turns": [{"content": text, "token_len": size}]}]}
    plain = functools.reduce(lambda t, code: t.replace(code, ""), re.findall(r"```([^`]*)```", text), text)
    count = lambda **patterns: {k: len(re.findall(pattern, plain, re.MULTILINE)) for k, pattern in patterns.items()}
    style = {"token_len": size, "header_count": count(**{f"h{k}": rf"^#{{{k}}}\s" for k in range(1, 7)}),
             "list_count": count(ordered=r"^\s*\d+\.\s", unordered=r"^\s*[-*+]\s"),
             "bold_count": count(**{"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"})}
    return {"uid": row["uid"], "ans_id": record["answer_id"], "model": name, "tstamp": 0, "metadata": style, "token_len_by": record["token_len_by"],
            "messages": [*row["prompt"], {"role": "assistant", "content": {"answer": text}}]}


def official():
    """The benchmarks' own files, each for all processes and in the order of the questions; whoever finds every shard there writes them."""
    paths, name = [shard_path(out, rank) for rank in range(WORLD_SIZE)], answer_name or os.path.basename(model.rstrip("/"))
    if not all(map(os.path.exists, paths)):
        return
    rows = [found[1] for deal in itertools.zip_longest(*map(read_records, paths)) for found in deal if found]
    given = "".join(json_line(model_answer(row, name)) for row in rows if "turns" in row or row.get("uid") is not None)
    outputs = [{"dataset": row.get("dataset", ""), "instruction": row["instruction"], "output": row["responses"][0]["text"], "generator": name}
               for row in rows if row.get("instruction") is not None]
    for suffix, text in (("model_answer.jsonl", given), ("model_outputs.json", outputs and json.dumps(outputs, ensure_ascii=False, indent=1))):
        path = out.removesuffix("jsonl") + suffix
        if text:
            with open(f"{path}.{RANK}.tmp", "w", encoding="utf-8") as f:
                f.write(text)
            os.replace(f"{path}.{RANK}.tmp", path)


def main():
    tasks = {"candidates": candidates, "instructions": instructions, "answers": answers}
    task in tasks or sys.exit(f"--task={task}: there are {', '.join(tasks)}")
    for key, least in {"n_prompts": 0, "n_responses": 1, "max_new_tokens": 1, "block": 1, "generate_rows": 1, "instruction_examples": 1}.items():
        config[key] >= least or sys.exit(f"--{key}={config[key]}: has to be {least} at least")
    0 <= instruction_similarity <= 1 or sys.exit(f"--instruction_similarity={instruction_similarity}: has to be between 0 and 1")
    remote = engine == "openai"
    remote and (task != "candidates" or not engine_url or "@" in engine_url) and sys.exit(
        "--engine=openai: writes candidates, wants --engine_url without user or key in it (OPENAI_API_KEY)")
    manifest = open_stage(out, ".jsonl", config, "model", "prompts")
    if manifest is not None:
        tasks[task](manifest, *((None, None) if remote else load_tokenizer(model)))
    if task == "answers":
        official()


if __name__ == "__main__":
    run_script(main)
