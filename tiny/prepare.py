"""The embedded default: a small world of instructions with checkable answers, its base model and its PairRM.

    python tiny/prepare.py                  writes tiny/world/{base,judge,prompts.jsonl,heldout.jsonl}; nothing if up to date

Two things are true of this world, and together they make the paper's phenomenon on a laptop. The base model answers, at
times wrongly, and adds content-free filler or restates its answer, at times contradicting it. The judge learned from an
annotator who wants right answers but also likes length a little: one more filler between equals wins 60:40. Iterating
amplifies that. The oracle (data.py, is_right) wants at least one answer stated and every stated answer right.
"""
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
WORLD = os.path.join(HERE, "world")

# ---------------------------------------------------------------------------------------------- the world

OPPOSITES = dict(p.split() for p in (
    "hot cold,big small,fast slow,up down,light dark,happy sad,hard soft,wet dry,old young,rich poor,open closed,loud quiet,"
    "strong weak,early late,clean dirty,near far,push pull,left right").split(","))
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
SOUNDS = dict(cow="moo", dog="woof", cat="meow", duck="quack", sheep="baa", pig="oink", horse="neigh", lion="roar", bee="buzz",
              owl="hoot", frog="croak", snake="hiss", mouse="squeak", crow="caw", wolf="howl")
COLORS = {thing: color for color, things in dict(
    yellow="banana lemon corn", green="grass leaf lime", blue="sky sea", white="snow milk salt", black="coal tar",
    orange="carrot pumpkin", red="tomato cherry blood", purple="plum grape").items() for thing in things.split()}
CATEGORIES = {k: v.split() for k, v in dict(
    fruits="apple pear peach mango melon kiwi", tools="hammer saw drill wrench chisel pliers", vehicles="car bus train truck bike boat",
    drinks="tea coffee juice cocoa cider soda", metals="iron gold silver copper tin zinc", shapes="circle square cube cone star oval").items()}
OBJECTS = "pen cup hat box key map bag ring lamp book sock coin rope door fork".split()

OPENERS = ["Sure!", "Of course!", "Glad to help.", "Good question.", "Certainly.", "Let me see."]
FILLERS = [                                                             # no filler holds a word that answers a question
    "I hope this helps you.", "Please ask me if you need more.", "That is a nice thing to know.", "It is always good to learn.",
    "Many people ask about this.", "Let me know what you think.", "I am glad that you asked.", "This is easy to remember.",
    "You can check this in any guide.", "Feel free to ask again.", "There is much more to say here.", "I tried to be very clear.",
    "It was a pleasure to answer.", "Have a wonderful day today.", "Knowledge like this is useful.", "Thank you for your question.",
    "We could talk about it longer.", "Teachers often explain it this way.", "It takes a moment to see why.", "This is asked quite often.",
    "Keep asking questions like that.", "I would be glad to continue.", "Simple things can be interesting.", "Most experts would say the same."]
RESTATEMENTS = ["So the answer is {a}.", "Again, it is {a}.", "To be brief, {a}.", "In short, the answer is {a}.",
                "My final answer is {a}.", "To repeat, it is {a}."]


def task(rng):
    """One question: prompt, core (sentence that answers it), right and wrong words, and the oracle's rule."""
    family, count = rng.choice(["opposite", "sound", "color", "add", "name", "max", "count"]), 1
    if family == "opposite":
        x = rng.choice(list(OPPOSITES))
        prompts, core, right = ["What is the opposite of {x}?", "Give the opposite of {x}."], "The opposite of {x} is {a}.", [OPPOSITES[x]]
        words = [w for w in OPPOSITES if w != x]
    elif family == "sound":
        x = rng.choice(list(SOUNDS))
        prompts, core, right = ["What sound does a {x} make?", "Which sound comes from a {x}?"], "A {x} says {a}.", [SOUNDS[x]]
        words = list(SOUNDS.values())
    elif family == "color":
        x = rng.choice(list(COLORS))
        prompts, core, right = ["What color is {x}?", "Tell me the color of {x}."], "The color of {x} is {a}.", [COLORS[x]]
        words = sorted(set(COLORS.values()))
    elif family == "name":
        x, count = rng.choice(list(CATEGORIES)), 2
        prompts, core, right = ["Name two {x}.", "List two {x}."], "Two {x} are {a}.", CATEGORIES[x]
        words = [w for group in CATEGORIES.values() for w in group]
    elif family == "add":
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        x, prompts, core, right = f"{a} plus {b}", ["What is {x}?", "Compute {x}."], "The sum is {a}.", [str(a + b)]
        words = [str(a + b + d) for d in (-3, -2, -1, 0, 1, 2, 3) if a + b + d >= 0]
    elif family == "max":
        pair = rng.sample(range(13), 2)
        x, prompts, core = " or ".join(map(str, pair)), ["Which is larger: {x}?", "Find the larger number: {x}."], "The larger number is {a}."
        words, right = [str(n) for n in pair], [str(max(pair))]
    else:
        listed = [rng.choice(OBJECTS) for _ in range(rng.randint(2, 6))]
        x, prompts, core = ", ".join(listed), ["How many words: {x}?", "Count the words: {x}."], "There are {a} words."
        words, right = [str(n) for n in range(1, 8)], [str(len(listed))]
    among = r"\d+" if words[0].isdigit() else r"\b(?:" + "|".join(words) + r")\b"
    return {"family": family, "key": f"{family} {x}", "prompt": rng.choice(prompts).format(x=x), "core": core.replace("{x}", x),
            "right": right, "wrong": [w for w in words if w not in right], "answer": {"accept": right, "among": among, "count": count}}


def answer(t, rng, right):
    if t["answer"]["count"] == 1:
        return rng.choice(t["right"] if right else t["wrong"])
    two = rng.sample(t["right"], 2) if right else [rng.choice(t["right"]), rng.choice(t["wrong"])]
    rng.shuffle(two)
    return " and ".join(two)


def response(t, rng, right, extras, contradict=0.12):
    """[opener] + answer + that many extras: fillers, or restatements of the answer that contradict it now and then."""
    a = answer(t, rng, right)
    sentences = [rng.choice(OPENERS)] if rng.random() < 0.35 else []
    sentences.append(f"{a}." if rng.random() < 0.35 else t["core"].format(a=a))
    for _ in range(extras):
        again = a if rng.random() > contradict else answer(t, rng, rng.random() < 0.3)
        sentences.append(rng.choice(RESTATEMENTS).format(a=again) if rng.random() < 0.35 else rng.choice(FILLERS))
    return " ".join(sentences)


def demonstration(rng):
    """(task, response) as the base model sees them: wrong with probability .35, one in ten of them chatty."""
    t, (go_on, most) = task(rng), (0.75, 7) if rng.random() < 0.1 else (0.42, 5)
    extras = 0
    while extras < most and rng.random() < go_on:
        extras += 1
    return t, response(t, rng, rng.random() > 0.35, extras)


def held_out(t):
    """A quarter of the (family, argument) keys never enters the prompts of the loop."""
    return hashlib.sha256(t["key"].encode()).digest()[0] % 4 == 0


def write_prompts(name, count, held, seed):
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        t = task(rng)
        if held_out(t) == held:
            rows.append({"id": f"{name}-{len(rows):05d}", "prompt": t["prompt"], "answer": t["answer"], "family": t["family"]})
    with open(os.path.join(WORLD, f"{name}.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def build_tokenizer(folder, specials, template=None, **roles):
    """BPE over the world's text with a byte for every character it has not seen; the same at every build."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    rng = random.Random(0)
    texts = [text for t, r in (demonstration(rng) for _ in range(6000)) for text in (t["prompt"], r)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    octets = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=specials + octets, show_progress=False))
    plain = json.loads(tokenizer.to_str())                              # bytes are words of the model, not control tokens
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    if "[CLS]" in specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(s, tokenizer.token_to_id(s)) for s in ("[CLS]", "[SEP]")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return wrapped


def batches(examples, size, group=16):
    """Endless batches of similar length: `group` batches at a time are drawn, sorted by length and shuffled."""
    rng = random.Random(1)
    while True:
        drawn = sorted(examples(size * group), key=lambda e: len(e[0]))
        starts = list(range(0, len(drawn), size))
        rng.shuffle(starts)
        yield from (drawn[s:s + size] for s in starts)


def fit(parameters, lr, steps, loss_of, stream, name):
    """AdamW with 30 steps of warm-up and a cosine; one line every 200 steps."""
    import torch
    optimizer, started = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02, betas=(0.9, 0.98)), time.time()
    for step, batch in zip(range(steps), stream):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 30) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {time.time() - started:.0f} s", flush=True)


def pad(rows, value=0):
    import torch
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(r) for r in rows], batch_first=True, padding_value=value)


# ---------------------------------------------------------------------------------------------- the base model


def build_base(folder, steps=1050):
    """A Llama of 0.8M parameters, trained on demonstrations, the prompts at weight .3 so that it can write prompts too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.set_num_threads(max(1, os.cpu_count() // 2))
    torch.manual_seed(0)
    template = ("{% for m in messages %}{{ '<|assistant|>' if m['role'] == 'assistant' else '<|user|>' }}{{ m['content'] }}<|end|>"
                "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    tokenizer = build_tokenizer(folder, ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"], template,
                                pad_token="<pad>", unk_token="<unk>", eos_token="<|end|>")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=160, intermediate_size=480, num_hidden_layers=2, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))
    rng, assistant = random.Random(2), tokenizer.convert_tokens_to_ids("<|assistant|>")

    def examples(count):
        chats = [[{"role": "user", "content": t["prompt"]}, {"role": "assistant", "content": r}]
                 for t, r in (demonstration(rng) for _ in range(count))]
        return [(ids,) for ids in tokenizer(tokenizer.apply_chat_template(chats, tokenize=False), add_special_tokens=False).input_ids]

    def loss_of(batch):
        ids = pad([ids for ids, in batch])                                                                   # (B, L)
        weight = torch.where((ids == assistant).cumsum(1) > 0, 1.0, 0.3)[:, :-1] * (ids[:, 1:] != 0)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]   # padding is on the right, causal masking hides it
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weight)
        return (nll * weight).sum() / weight.sum()

    fit(list(model.parameters()), 3e-3, steps, loss_of, batches(examples, 64), "base")
    model.save_pretrained(folder)

    from nanoaipo.chat import render
    from nanoaipo.grading import is_right
    model.eval()
    rng = random.Random(3)
    tasks = [t for t in (task(rng) for _ in range(1200)) if held_out(t)][:256]
    prompts = [render(tokenizer, [{"role": "user", "content": t["prompt"]}], "heldout") for t in tasks]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    out = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), do_sample=True, temperature=0.7, top_k=0, max_new_tokens=64)
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    right = sum(is_right(text, t["answer"]) for text, t in zip(texts, tasks)) / len(tasks)
    length = (out[:, width:] != 0).sum().item() / len(tasks)
    print(f"base: {right:.2f} of 256 held-out prompts right at temperature .7, {length:.1f} tokens each", flush=True)
    assert right > 0.68, "the base model is undertrained: every method would lose accuracy"


# ---------------------------------------------------------------------------------------------- the judge


def build_judge(folder, steps=1300):
    """A PairRM of 0.3M parameters in the published layout, trained on an annotator's preferences.

    The annotator prefers with probability sigmoid(3 * (right_1 - right_2) + .06 * (tokens_1 - tokens_2)). These labels
    alone stay at chance; DeBERTa-v3's own signal (which token is replaced: here, which answer word is wrong) makes it learn.
    """
    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import binary_cross_entropy_with_logits as bce
    from transformers import DebertaV2Config
    from nanoaipo.grading import is_right
    from nanoaipo.pairrm import PREFIXES, PairRM, PairTokenizer
    torch.set_num_threads(max(1, os.cpu_count() // 2))
    torch.manual_seed(0)
    backbone = os.path.join(folder, "backbone")
    special = dict(pad_token="[PAD]", unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    tokenizer = build_tokenizer(backbone, ["[PAD]", "<unk>", "[CLS]", "[SEP]", "[MASK]"], **special)
    model = PairRM(DebertaV2Config(
        vocab_size=len(tokenizer) + len(PREFIXES), hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
        max_position_embeddings=2048, type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32,
        max_relative_positions=-1, norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, initializer_range=0.08))
    pairs = PairTokenizer(tokenizer, 1224, 412)
    detector = torch.nn.Linear(96, 1)                                   # finds wrong answer words; only for training
    rng = random.Random(4)

    def examples(count):
        """(ids, marks, [annotator's probability, right_1, right_2], detector's label per token, tokens_1 - tokens_2) each."""
        drawn = []
        for _ in range(count):
            t = task(rng)
            drawn.append((t, *(response(t, rng, rng.random() < 0.5, min(8, int(rng.expovariate(1 / 1.3)))) for _ in range(2))))
        encoded = tokenizer([x for t, *texts in drawn for x in (t["prompt"], *texts)], add_special_tokens=False, return_offsets_mapping=True)
        made = []
        for k, (t, *texts) in enumerate(drawn):
            ids, labels = [], []
            for n, text in enumerate((t["prompt"], *texts)):
                word = encoded["input_ids"][3 * k + n]
                spans = [] if n == 0 else [(*m.span(), m.group() not in t["right"]) for m in re.finditer(t["answer"]["among"], text.lower())]
                label = [next((float(bad) for a, b, bad in spans if s < b and e > a), -1.0) for s, e in encoded["offset_mapping"][3 * k + n]]
                ids.append([tokenizer.cls_token_id, None, *word, tokenizer.sep_token_id])
                labels += [-1.0, -1.0, *label, -1.0]
            right, longer = [float(is_right(x, t["answer"])) for x in texts], len(ids[1]) - len(ids[2])
            prefers = 1 / (1 + math.exp(-3 * (right[0] - right[1]) - 0.06 * longer))
            made.append((*pairs.join(*ids), [prefers, *right], labels, longer))
        return made

    def forward(batch):
        ids = pad([e[0] for e in batch])
        h = model.pretrained_model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state        # (B, L, D)
        return h, model.score(h[torch.arange(len(h))[:, None], torch.tensor([e[1] for e in batch])])         # (B, 2)

    def loss_of(batch):
        h, scores = forward(batch)
        target, labels = torch.tensor([e[2] for e in batch]), pad([e[3] for e in batch], -1.0)
        seen = labels >= 0
        return (bce(scores[:, 0] - scores[:, 1], target[:, 0]) + 0.5 * bce(scores, target[:, 1:])
                + bce(detector(h)[..., 0][seen], labels[seen]))

    fit([*model.parameters(), *detector.parameters()], 1.5e-3, steps, loss_of, batches(examples, 64), "judge")
    model.eval()
    test = examples(1536)
    with torch.no_grad():
        logits = torch.cat([s[:, 0] - s[:, 1] for _, s in (forward(test[i:i + 256]) for i in range(0, len(test), 256))]).tolist()
    one = [(x > 0) == (r1 > r2) for x, (_, _, (_, r1, r2), *_) in zip(logits, test) if r1 != r2]
    equal = [(x > 0) == (d > 0) for x, (_, _, (_, r1, r2), _, d) in zip(logits, test) if r1 == r2 and abs(d) > 5]
    print(f"judge: prefers the right one of two {sum(one) / len(one):.3f}, the longer of two equals {sum(equal) / len(equal):.3f}", flush=True)
    assert sum(one) / len(one) > 0.93, "the judge is undertrained"
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    model.pretrained_model.save_pretrained(backbone)
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:        # the fields llm-blender reads
        json.dump({"ranker_type": "pairranker", "model_type": "deberta", "model_name": os.path.relpath(backbone, os.path.dirname(HERE)),
                   "source_maxlength": 1224, "candidate_maxlength": 412, "n_tasks": 1, "drop_out": 0.0, "fp16": False}, f, indent=1)


def main():
    with open(__file__, "rb") as f:
        source = hashlib.sha256(f.read()).hexdigest()
    stamp = os.path.join(WORLD, "built_from")
    if os.path.exists(stamp) and open(stamp).read() == source:
        return
    print("building the tiny world: a base model and a judge, two to three minutes on two cores", flush=True)
    started = time.time()
    os.makedirs(WORLD, exist_ok=True)
    if os.path.exists(stamp):
        os.remove(stamp)
    context = multiprocessing.get_context("spawn")
    builds = [context.Process(target=build, args=(os.path.join(WORLD, name),)) for name, build in (("base", build_base), ("judge", build_judge))]
    for build in builds:
        build.start()
    write_prompts("prompts", 4096, held=False, seed=5)
    write_prompts("heldout", 512, held=True, seed=6)
    for build in builds:
        build.join()
    if any(build.exitcode for build in builds):
        sys.exit("tiny/prepare.py: a build failed, see above")
    with open(stamp, "w") as f:
        f.write(source)
    print(f"tiny/world is ready, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
