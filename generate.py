"""Sample from a policy: prompts -> candidate responses, a pool -> new instructions (self-instruct), benchmark questions -> answers.

    python generate.py config/aipo_nemo.py --model=MODEL --prompts=prompts.jsonl --out=candidates.jsonl
    python generate.py config/aipo_nemo.py --model=MODEL --prompts=pool.jsonl --task=instructions --n_prompts=20000 --out=new.jsonl
    torchrun --nproc-per-node=8 generate.py ...            8 GPUs, 8 engines, each its share of the prompts, 8 shards

Tokens in, tokens out: the engine gets the ids of the rendered prompt and its ids are what training will see. Prompts that
are too long or spell a control token are dropped and counted in the manifest. Candidates are kept block by block: run a killed
stage again and it goes on. With --engine=openai a model behind an endpoint answers, in text.
"""
import collections
import itertools
import json
import os
import random
import re
import sys

from configurator import configure
from data import (RANK, WORLD_SIZE, begin, control_text, derive_seed, load_tokenizer, read_prompts, render, shard, write_blocks,
                  write_json, writing)
from engines import ask, endpoint, load_engine, positions

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
instruction_clusters = 0                # topics of the pool (k-means over TF-IDF) that examples are drawn from in turn; 0: from all of it
dtype = "bfloat16"                      # of the computation; float32 on CPUs
seed = 0                                # of the run
block = 2048                            # prompts sampled and kept together; a kill costs one block
generate_rows = 512                     # responses sampled at once (transformers)
tensor_parallel = 1                     # GPUs per engine (vllm)
gpu_memory = 0.9                        # share of a GPU's memory the engine may take (vllm)
config = configure(globals())

CATEGORIES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}   # FastChat's
HEADING = "Here are tasks that people have given to an assistant. All are different in topic, form and length.\n"
EXAMPLES, CALLS, LONGEST = 8, 128, 1024                                 # of the pool in a call, calls in a round at least, tokens of a reply (AIPO)
UNFIT = re.compile(r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE)
UNFIT_START = re.compile(r"write a program|detailed instructions:|task definition:|[^\w\s]|[^\x00-\x7f]", re.IGNORECASE)
ANSWER = re.compile(r"\b(?:answer|output|solution):|^\s*a:(?!.*^\s*b:)", re.IGNORECASE | re.MULTILINE | re.DOTALL)


def read_pool(tokenizer, room):
    """(prompts that fit into max_prompt_tokens and `room`, with prompt_ids; counts of what was dropped and why)."""
    counts, pool = {"prompts": 0, "control_text": 0, "too_long": 0, "too_short": 0}, []
    if tokenizer is None:                                               # an endpoint's model: its server knows its limits
        return read_prompts(prompts, prompt_field), counts
    control = control_text(tokenizer)
    for row in read_prompts(prompts, prompt_field):
        if any(control.search(m["content"]) for m in row["prompt"]):
            counts["control_text"] += 1
            continue
        row["prompt_ids"] = render(tokenizer, row["prompt"], f"{prompts}: prompt '{row['id']}'")
        if len(row["prompt_ids"]) > min(max_prompt_tokens, room):
            counts["too_long"] += 1
        elif min_prompt_tokens and len(tokenizer(row["prompt"][-1]["content"], add_special_tokens=False).input_ids) < min_prompt_tokens:
            counts["too_short"] += 1
        else:
            pool.append(row)
    pool or sys.exit(f"{prompts}: no prompt is left ({counts['control_text']} with control text, {counts['too_long']} above max_prompt_tokens, "
                     f"{counts['too_short']} below min_prompt_tokens)")
    return pool, counts


def candidates(manifest, tokenizer, ends):
    limit = 2**31 if tokenizer is None else positions(model)
    pool, counts = read_pool(tokenizer, limit - max_new_tokens)
    if n_prompts:
        random.Random(seed).shuffle(pool)
        first = max(iteration - 1, 0) * n_prompts
        pool = [pool[k % len(pool)] for k in range(first, first + min(n_prompts, len(pool)))]
    counts["prompts"], rows = len(pool), pool[RANK::WORLD_SIZE]

    def count(records):
        responses = [(len(r.get("ids", ())), r["finished"]) for record in records for r in record["responses"]]
        tokens, finished, each = sum(n for n, _ in responses), sum(done for _, done in responses), max(1, len(responses))
        print(f"{len(rows)} prompts, {len(responses)} responses of {tokens / each:.1f} tokens, {finished / each:.0%} finished -> {shard(out)}")
        return counts | {"responses": len(responses), "tokens": tokens, "finished": finished}

    work = from_endpoint
    if tokenizer is not None and rows:                                  # fewer prompts than processes
        sample = load_engine(engine, model, ends, min(max_prompt_tokens + max_new_tokens, limit), config)

        def work(rows):
            requests = [(row["prompt_ids"], derive_seed(seed, iteration, row["id"])) for row in rows]
            sampled = sample(requests, n_responses=n_responses, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens)
            return [row | {"responses": [{"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids, "finished": finished, "logp": logp}
                                         for ids, finished, logp in responses]} for row, responses in zip(rows, sampled)]

    write_blocks(out, manifest, rows, block, work, count)


def from_endpoint(rows):
    """The rows with the responses of a model behind engine_url, as text; what it refused to answer is missing among them."""
    questions = [{"model": model, "messages": row["prompt"], "temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens, "about": [row["id"], k]}
                 for row in rows for k in range(n_responses)]
    replies = ask(questions, out, endpoint(engine_url, 16))
    any("finish" in r for r in replies) or sys.exit(f"{engine_url}: not one answer to {len(questions)} questions; the first reply: {replies[0]}")
    replies = iter(replies)
    return [row | {"responses": [{"text": r["reply"], "finished": r["finish"] == "stop"} for r in itertools.islice(replies, n_responses) if "finish" in r]}
            for row in rows]


def instruction_of(reply):
    """The instruction at the head of a reply that goes on with the list, cut where an answer begins."""
    text = re.split(rf"\n\s*\n|\n{EXAMPLES + 2}\.", reply)[0].strip()
    return text if "example:" in text.lower() else ANSWER.split(text)[0].strip()


class Known:
    """Texts by their shingles of three words: is a new one nearly equal (Jaccard index above 0.7) to one before?"""

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
        return any(n > 0.7 * (len(shingles) + self.sizes[k] - n) for k, n in shared.items())


def topics(texts):
    """Lists of texts of one topic each: all of them, or k-means over TF-IDF."""
    if not instruction_clusters:
        return [texts]
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        sys.exit(f"--instruction_clusters={instruction_clusters}: needs scikit-learn; pip install scikit-learn, or take 0")
    vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit_transform(texts)
    labels = KMeans(min(instruction_clusters, len(texts)), random_state=seed, n_init=1).fit_predict(vectors)
    return [[t for t, label in zip(texts, labels) if label == k] for k in sorted(set(labels))]


def instructions(manifest, tokenizer, ends):
    """Self-instruct (2212.10560) as AIPO has it: raw text, eight of the pool as a numbered list, the policy writes the ninth.

    Examples come from the pool alone, never from what was written. Calls go out in rounds until this process has its share of
    instructions that differ from each other and from the pool; the program ends when ten times as many calls have not been enough.
    A killed stage begins anew, with the same calls. Processes do not see each other's instructions.
    """
    pool, counts = read_pool(tokenizer, max_prompt_tokens)
    texts = [re.sub(r"\s*\n\s*\n\s*", "\n", row["prompt"][-1]["content"].strip()) for row in pool]
    wanted = len(range(RANK, n_prompts or sys.exit("--n_prompts is not set: how many instructions to write"), WORLD_SIZE))
    len(texts) >= EXAMPLES or sys.exit(f"{prompts}: {len(texts)} prompts that fit; a call shows {EXAMPLES} of them")
    control, known, groups, made = control_text(tokenizer), Known(texts), topics(texts), []
    counts["prompts"] = len(pool)
    counts |= dict.fromkeys(("calls", "unfinished", "empty", "unfit", "too_short", "too_long", "control_text", "known"), 0)
    longest = min(LONGEST, max_new_tokens)
    room = min((EXAMPLES + 1) * max_prompt_tokens, positions(model) - longest)
    sample = wanted and load_engine(engine, model, ends, room + longest, config)
    for n in itertools.count():
        if len(made) == wanted or counts["calls"] >= 10 * max(wanted, CALLS):
            break
        draw, requests = random.Random(derive_seed(seed, iteration, RANK, n)), []
        for call in range(max(CALLS, min(4096, 5 * (wanted - len(made)) // 4))):
            group = groups[call % len(groups)]
            shown = draw.sample(group, min(EXAMPLES, len(group)))
            shown += draw.sample([t for t in texts if t not in shown], EXAMPLES - len(shown)) if len(shown) < EXAMPLES else []       # a small topic
            ids = tokenizer(HEADING + "".join(f"\n{k}. {text}" for k, text in enumerate(shown, 1)) + f"\n{EXAMPLES + 1}.").input_ids
            if len(ids) <= room:
                requests.append((ids, derive_seed(seed, iteration, RANK, n, call)))
        requests or sys.exit(f"--task=instructions: {EXAMPLES} examples do not fit into {room} tokens; lower --max_prompt_tokens or --max_new_tokens")
        replies = sample(requests, n_responses=1, temperature=instruction_temperature, top_k=50, top_p=0.9, max_new_tokens=longest,
                         stop=("\n\n", f"\n{EXAMPLES + 2}."))
        for ((ids, finished, _),) in replies:
            counts["calls"] += 1
            text = instruction_of(tokenizer.decode(ids, skip_special_tokens=True))
            size = len(tokenizer(text, add_special_tokens=False).input_ids)
            reason = ("unfinished" if not finished else "empty" if not text else "unfit" if UNFIT.search(text) or UNFIT_START.match(text) else
                      "too_short" if size < max(4, min_prompt_tokens) else "too_long" if size > max_prompt_tokens else
                      "control_text" if control.search(text) else "known" if text in known else None)
            if reason:
                counts[reason] += 1
            elif len(made) < wanted:
                known.add(text)
                made.append(text)
        print(f"round {n + 1}: {len(made)} of {wanted} instructions after {counts['calls']} calls", flush=True)
    told = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
    len(made) == wanted or sys.exit(f"--task=instructions: {len(made)} of {wanted} distinct instructions ({told}); "
                                    "the policy repeats itself or does not go on with a list: ask for fewer, or raise --instruction_temperature")
    manifest["counts"] = counts
    with writing(out, manifest) as write:
        for k, text in enumerate(made):
            write({"id": f"new-{iteration}-{RANK}-{k}", "prompt": [{"role": "user", "content": text}]})
    print(f"{len(made)} new instructions; {told} -> {shard(out)}")


def answers(manifest, tokenizer, ends):
    """One response to each prompt, and to each further turn of a benchmark's question; nothing is dropped.

    Our records carry the first turn's in `responses` and those of further turns in `later_responses`; beside them stand the
    official files: questions with turns as FastChat's and Arena-Hard's model answers, instructions as AlpacaEval's outputs.
    """
    rows = read_prompts(prompts, prompt_field)[:n_prompts or None][RANK::WORLD_SIZE]
    control, limit, name = control_text(tokenizer), positions(model), answer_name or os.path.basename(model.rstrip("/"))
    questions = [row["turns"] if "turns" in row else [row["prompt"][-1]["content"]] for row in rows]
    talks, given = [list(row["prompt"]) for row in rows], [[] for _ in rows]
    heats = [CATEGORIES.get(row["category"], temperature) if "turns" in row and isinstance(row.get("category"), str) else temperature for row in rows]
    for row, turns, talk in zip(rows, questions, talks):
        row["prompt_ids"] = render(tokenizer, talk, f"{prompts}: prompt '{row['id']}'", control)
        size = len(row["prompt_ids"]) + len(turns) * (max_new_tokens + 32) + len(tokenizer("".join(turns[1:])).input_ids)
        size - 32 <= limit or sys.exit(f"{prompts}: '{row['id']}' may take {size - 32} tokens with its answers, this model has {limit}: lower --max_new_tokens")
    sample = rows and load_engine(engine, model, ends, limit, config)
    for turn in range(max(map(len, questions), default=0)):
        for heat in sorted({heats[k] for k in range(len(rows)) if turn < len(questions[k])}):
            asked = [k for k in range(len(rows)) if turn < len(questions[k]) and heats[k] == heat]
            for k in asked if turn else ():
                talks[k].append({"role": "user", "content": questions[k][turn]})
            requests = [(render(tokenizer, talks[k], f"{prompts}: prompt '{rows[k]['id']}'", control), derive_seed(seed, iteration, rows[k]["id"], turn)) for k in asked]
            sampled = sample(requests, n_responses=1, temperature=heat, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens)
            for k, ((ids, finished, logp),) in zip(asked, sampled):
                given[k].append({"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids, "finished": finished, "logp": logp})
                talks[k].append({"role": "assistant", "content": given[k][-1]["text"]})
    manifest["counts"] = {"prompts": len(rows), "responses": sum(map(len, given))}
    stem = os.path.splitext(shard(out))[0]
    official = [{"question_id": row.get("question_id", row["id"]), "answer_id": f"{name}-{row['id']}", "model_id": name, "tstamp": 0, "choices": [{"index": 0, "turns": [
        r["text"] if len(turns) > 1 else {"content": r["text"], "token_len": len(r["ids"])} for r in responses]}]}
        for row, turns, responses in zip(rows, questions, given) if "turns" in row]
    outputs = [{"dataset": row.get("dataset", ""), "instruction": row["instruction"], "output": r[0]["text"], "generator": name} for row, r in zip(rows, given) if "instruction" in row]
    with writing(out, manifest) as write:
        for row, responses in zip(rows, given):
            write(row | {"responses": responses[:1]} | ({"later_responses": responses[1:]} if "turns" in row else {}))
        if official:
            with open(stem + ".model_answer.tmp", "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in official)
            os.replace(stem + ".model_answer.tmp", stem + ".model_answer.jsonl")
        if outputs:
            write_json(stem + ".model_outputs.json", outputs)
    print(f"{len(rows)} prompts, {manifest['counts']['responses']} responses -> {shard(out)}")


def main():
    tasks = {"candidates": candidates, "instructions": instructions, "answers": answers}
    task in tasks or sys.exit(f"--task={task}: there are {', '.join(tasks)}")
    remote = engine == "openai"
    remote and (task != "candidates" or not engine_url or "@" in engine_url) and sys.exit(
        "--engine=openai: writes candidates, wants --engine_url without user or key in it (OPENAI_API_KEY)")
    manifest = begin(out, ".jsonl", config, "model", "prompts")
    if manifest is not None:
        tasks[task](manifest, *((None, None) if remote else load_tokenizer(model)))


if __name__ == "__main__":
    main()
