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
EXAMPLES, CALLS, LONGEST = 8, 128, 1024                                 # of the pool in a call, calls in a round, tokens of a reply (AIPO)
UNFIT = re.compile(r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE)
UNFIT_START = re.compile(r"write a program|detailed instructions:|task definition:|[^\w\s]|[^\x00-\x7f]", re.IGNORECASE)
ANSWER = re.compile(r"\b(answer|output|solution|a):", re.IGNORECASE)


def read_pool(tokenizer):
    """(prompts that fit, with prompt_ids; counts of what was dropped and why)."""
    counts, pool = {"prompts": 0, "control_text": 0, "too_long": 0, "too_short": 0}, []
    if tokenizer is None:                                               # an endpoint's model: its server knows its limits
        return read_prompts(prompts, prompt_field), counts
    control = control_text(tokenizer)
    for row in read_prompts(prompts, prompt_field):
        if any(control.search(m["content"]) for m in row["prompt"]):
            counts["control_text"] += 1
            continue
        row["prompt_ids"] = render(tokenizer, row["prompt"], f"{prompts}: prompt '{row['id']}'")
        if len(row["prompt_ids"]) > max_prompt_tokens:
            counts["too_long"] += 1
        elif min_prompt_tokens and len(tokenizer(row["prompt"][-1]["content"], add_special_tokens=False).input_ids) < min_prompt_tokens:
            counts["too_short"] += 1
        else:
            pool.append(row)
    pool or sys.exit(f"{prompts}: no prompt is left ({', '.join(f'{v} {k}' for k, v in counts.items() if v)})")
    return pool, counts


def candidates(manifest, tokenizer, ends):
    pool, counts = read_pool(tokenizer)
    if n_prompts:
        random.Random(seed).shuffle(pool)
        first = max(iteration - 1, 0) * n_prompts
        pool = [pool[k % len(pool)] for k in range(first, first + min(n_prompts, len(pool)))]
    counts["prompts"], rows = len(pool), pool[RANK::WORLD_SIZE]

    def count(records):
        lengths, finished = [], 0
        for record in records:
            lengths += [len(r.get("ids", ())) for r in record["responses"]]
            finished += sum(r["finished"] for r in record["responses"])
        print(f"{len(rows)} prompts, {len(lengths)} responses of {sum(lengths) / max(1, len(lengths)):.1f} tokens, {finished / max(1, len(lengths)):.0%} finished",
              "->", shard(out))
        return counts | {"responses": len(lengths), "tokens": sum(lengths), "finished": finished}

    if tokenizer is None:
        answers = endpoint(engine_url, 16)

        def work(rows):
            questions = [{"model": model, "messages": row["prompt"], "temperature": temperature, "max_tokens": max_new_tokens, "about": [row["id"], k]}
                         for row in rows for k in range(n_responses)]
            replies = iter(ask(questions, out, answers))
            return [row | {"responses": [{"text": r["reply"], "finished": r.get("finish") == "stop"} for r in itertools.islice(replies, n_responses)]} for row in rows]
    else:
        sample = rows and load_engine(engine, model, ends, max_prompt_tokens + max_new_tokens, config)     # fewer prompts than processes

        def work(rows):
            requests = [(row["prompt_ids"], derive_seed(seed, iteration, row["id"])) for row in rows]
            sampled = sample(requests, n_responses=n_responses, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens)
            return [row | {"responses": [{"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids, "finished": finished, "logp": logp}
                                         for ids, finished, logp in responses]} for row, responses in zip(rows, sampled)]

    write_blocks(out, manifest, rows, block, work, count)


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

    Examples come from the pool alone, never from what was written. Rounds of 128 calls, until this process has its share of
    distinct instructions; the program ends when ten times the calls that would do have not been enough. A killed stage begins anew,
    with the same calls: this takes minutes.
    """
    pool, counts = read_pool(tokenizer)
    texts = [re.sub(r"\s*\n\s*\n\s*", "\n", row["prompt"][-1]["content"].strip()) for row in pool]
    wanted = len(range(RANK, n_prompts or sys.exit("--n_prompts is not set: how many instructions to write"), WORLD_SIZE))
    len(texts) >= EXAMPLES or sys.exit(f"{prompts}: {len(texts)} prompts that fit; a call shows {EXAMPLES} of them")
    control, known, groups, made = control_text(tokenizer), Known(texts), topics(texts), []
    counts["prompts"] = len(pool)
    counts |= dict.fromkeys(("calls", "unfinished", "empty", "unfit", "too_short", "too_long", "control_text", "known"), 0)
    longest = min(LONGEST, max_new_tokens)
    room, rounds = min((EXAMPLES + 1) * max_prompt_tokens, positions(model) - longest), max(10, 10 * wanted // CALLS)
    sample = wanted and load_engine(engine, model, ends, room + longest, config)
    for n in range(rounds):
        if len(made) == wanted:
            break
        draw, requests = random.Random(derive_seed(seed, iteration, RANK, n)), []
        for call in range(CALLS):
            group = groups[(n * CALLS + call) % len(groups)]
            shown = draw.sample(group, min(EXAMPLES, len(group)))
            shown += draw.sample(texts, EXAMPLES - len(shown))          # a small topic
            ids = tokenizer(HEADING + "".join(f"\n{k}. {text}" for k, text in enumerate(shown, 1)) + f"\n{EXAMPLES + 1}.").input_ids
            if len(ids) <= room:
                requests.append((ids, derive_seed(seed, iteration, RANK, n, call)))
        replies = requests and sample(requests, n_responses=1, temperature=instruction_temperature, top_k=50, top_p=0.9, max_new_tokens=longest,
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
    told = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
    len(made) == wanted or sys.exit(f"--task=instructions: {len(made)} of {wanted} distinct instructions after {rounds} rounds ({told}); "
                                    "the policy repeats itself or does not go on with a list: ask for fewer, or raise --instruction_temperature")
    manifest["counts"] = counts
    with writing(out, manifest) as write:
        for k, text in enumerate(made):
            write({"id": f"new-{iteration}-{RANK}-{k}", "prompt": [{"role": "user", "content": text}]})
    print(f"{len(made)} new instructions; {told} -> {shard(out)}")


def answers(manifest, tokenizer, ends):
    """One response to each prompt, and to each further turn of a benchmark's question, in its official format besides ours."""
    pool, counts = read_pool(tokenizer)
    rows, name = pool[RANK::WORLD_SIZE], os.path.basename(model.rstrip("/"))
    turns = max((len(row.get("turns", [0])) for row in rows), default=1)
    longest = min(turns * (max_prompt_tokens + max_new_tokens), positions(model))
    sample = rows and load_engine(engine, model, ends, longest, config)
    for row in rows:
        row["responses"], row["conversation"] = [], list(row["prompt"])
    for turn in range(turns):
        asked = [row for row in rows if turn < len(row.get("turns", [0]))]
        for row in asked if turn else ():
            said = row["turns"][turn]
            row["conversation"].append({"role": "user", "content": said if isinstance(said, str) else said["content"]})
        heat = lambda row: CATEGORIES.get(row.get("category"), temperature)
        for t in sorted({heat(row) for row in asked}):
            group = [row for row in asked if heat(row) == t]
            ids = [render(tokenizer, row["conversation"], f"{prompts}: prompt '{row['id']}'") for row in group]
            long = [row["id"] for row, i in zip(group, ids) if len(i) + max_new_tokens > longest]
            long and sys.exit(f"{prompts}: turn {turn + 1} of '{long[0]}' has no room for {max_new_tokens} tokens in this model's {longest}: lower --max_new_tokens")
            requests = [(i, derive_seed(seed, iteration, row["id"], turn)) for row, i in zip(group, ids)]
            for row, ((response, finished, logp),) in zip(group, sample(requests, n_responses=1, temperature=t, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens)):
                text = tokenizer.decode(response, skip_special_tokens=True)
                row["responses"].append({"text": text, "ids": response, "finished": finished, "logp": logp})
                row["conversation"].append({"role": "assistant", "content": text})
    counts |= {"prompts": len(pool), "responses": sum(len(row["responses"]) for row in rows)}
    manifest["counts"], stem = counts, os.path.splitext(shard(out))[0]
    official = [{"question_id": row.get("question_id", row["id"]), "answer_id": f"{name}-{row['id']}", "model_id": name, "tstamp": 0, "choices": [
        {"index": 0, "turns": [r["text"] if isinstance(row["turns"][0], str) else {"content": r["text"]} for r in row["responses"]]}]} for row in rows if "turns" in row]
    outputs = [{"dataset": row.get("dataset", ""), "instruction": row["instruction"], "output": row["responses"][0]["text"], "generator": name} for row in rows if "instruction" in row]
    with writing(out, manifest) as write:
        for row in rows:
            write({k: v for k, v in row.items() if k != "conversation"})
        if official:
            with open(stem + ".model_answer.jsonl", "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in official)
        if outputs:
            write_json(stem + ".model_outputs.json", outputs)
    print(", ".join(f"{v} {k}" for k, v in counts.items() if v), "->", shard(out))


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
