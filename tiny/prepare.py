"""The embedded world: instructions with checkable answers, its base model and its PairRM.

    python tiny/prepare.py          writes tiny/world/{base,judge,prompts.jsonl,heldout.jsonl}
                                    nothing if up to date

Two things are true of this world, and together they make the paper's phenomenon on a laptop. The
base model answers, at times wrongly, and adds content-free filler or restates its answer, at times
contradicting it. The judge learned from an annotator who wants right answers but also likes length
a little: one more filler between equals wins 60:40. Iterating amplifies that. The oracle
(nanoaipo/grading.py, is_right) wants at least one answer stated and every stated answer right.

The order of the random draws is part of the world: a draw more, and every number changes.
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

# ---------------------------------------------------------------------------- the words

# fmt: off
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "light": "dark", "happy": "sad",
    "hard": "soft", "wet": "dry", "old": "young", "rich": "poor", "open": "closed",
    "loud": "quiet", "strong": "weak", "early": "late", "clean": "dirty", "near": "far",
    "push": "pull", "left": "right",
}
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink",
    "horse": "neigh", "lion": "roar", "bee": "buzz", "owl": "hoot", "frog": "croak",
    "snake": "hiss", "mouse": "squeak", "crow": "caw", "wolf": "howl",
}
COLORS = {
    "banana": "yellow", "lemon": "yellow", "corn": "yellow",
    "grass": "green", "leaf": "green", "lime": "green",
    "sky": "blue", "sea": "blue",
    "snow": "white", "milk": "white", "salt": "white",
    "coal": "black", "tar": "black",
    "carrot": "orange", "pumpkin": "orange",
    "tomato": "red", "cherry": "red", "blood": "red",
    "plum": "purple", "grape": "purple",
}
CATEGORIES = {
    "fruits": ["apple", "pear", "peach", "mango", "melon", "kiwi"],
    "tools": ["hammer", "saw", "drill", "wrench", "chisel", "pliers"],
    "vehicles": ["car", "bus", "train", "truck", "bike", "boat"],
    "drinks": ["tea", "coffee", "juice", "cocoa", "cider", "soda"],
    "metals": ["iron", "gold", "silver", "copper", "tin", "zinc"],
    "shapes": ["circle", "square", "cube", "cone", "star", "oval"],
}
OBJECTS = [
    "pen", "cup", "hat", "box", "key", "map", "bag", "ring", "lamp", "book", "sock", "coin",
    "rope", "door", "fork",
]
# fmt: on

OPENERS = [
    "Sure!",
    "Of course!",
    "Glad to help.",
    "Good question.",
    "Certainly.",
    "Let me see.",
]
# no filler holds a word that answers a question
FILLERS = [
    "I hope this helps you.",
    "Please ask me if you need more.",
    "That is a nice thing to know.",
    "It is always good to learn.",
    "Many people ask about this.",
    "Let me know what you think.",
    "I am glad that you asked.",
    "This is easy to remember.",
    "You can check this in any guide.",
    "Feel free to ask again.",
    "There is much more to say here.",
    "I tried to be very clear.",
    "It was a pleasure to answer.",
    "Have a wonderful day today.",
    "Knowledge like this is useful.",
    "Thank you for your question.",
    "We could talk about it longer.",
    "Teachers often explain it this way.",
    "It takes a moment to see why.",
    "This is asked quite often.",
    "Keep asking questions like that.",
    "I would be glad to continue.",
    "Simple things can be interesting.",
    "Most experts would say the same.",
]
RESTATEMENTS = [
    "So the answer is {a}.",
    "Again, it is {a}.",
    "To be brief, {a}.",
    "In short, the answer is {a}.",
    "My final answer is {a}.",
    "To repeat, it is {a}.",
]

# ---------------------------------------------------------------------------- the questions

# family: two ways to ask about x, and the sentence that answers with a
QUESTIONS = {
    "opposite": (
        ["What is the opposite of {x}?", "Give the opposite of {x}."],
        "The opposite of {x} is {a}.",
    ),
    "sound": (
        ["What sound does a {x} make?", "Which sound comes from a {x}?"],
        "A {x} says {a}.",
    ),
    "color": (
        ["What color is {x}?", "Tell me the color of {x}."],
        "The color of {x} is {a}.",
    ),
    "add": (
        ["What is {x}?", "Compute {x}."],
        "The sum is {a}.",
    ),
    "name": (
        ["Name two {x}.", "List two {x}."],
        "Two {x} are {a}.",
    ),
    "max": (
        ["Which is larger: {x}?", "Find the larger number: {x}."],
        "The larger number is {a}.",
    ),
    "count": (
        ["How many words: {x}?", "Count the words: {x}."],
        "There are {a} words.",
    ),
}


def draw_argument(family, rng):
    """(x, right answers, all words that could answer) of a question of this family."""
    if family == "opposite":
        x = rng.choice(list(OPPOSITES))
        words = [word for word in OPPOSITES if word != x]
        return x, [OPPOSITES[x]], words

    if family == "sound":
        x = rng.choice(list(SOUNDS))
        return x, [SOUNDS[x]], list(SOUNDS.values())

    if family == "color":
        x = rng.choice(list(COLORS))
        return x, [COLORS[x]], sorted(set(COLORS.values()))

    if family == "name":
        x = rng.choice(list(CATEGORIES))
        words = []
        for members in CATEGORIES.values():
            words += members
        return x, CATEGORIES[x], words

    if family == "add":
        first = rng.randint(0, 9)
        second = rng.randint(0, 9)
        total = first + second
        near = [n for n in range(total - 3, total + 4) if n >= 0]
        return f"{first} plus {second}", [str(total)], [str(n) for n in near]

    if family == "max":
        numbers = rng.sample(range(13), 2)
        words = [str(n) for n in numbers]
        return " or ".join(words), [str(max(numbers))], words

    n_objects = rng.randint(2, 6)
    objects = [rng.choice(OBJECTS) for _ in range(n_objects)]
    words = [str(n) for n in range(1, 8)]
    return ", ".join(objects), [str(n_objects)], words


def draw_task(rng):
    """One question: prompt, core (the sentence that answers it), right and wrong words, answer.

    `answer` is the oracle's rule: the accepted words, the pattern of all that count as an answer,
    and how many are asked for. `key` names family and argument.
    """
    family = rng.choice(list(QUESTIONS))
    x, right, words = draw_argument(family, rng)
    prompts, core = QUESTIONS[family]

    among = r"\d+"
    if not words[0].isdigit():
        among = r"\b(?:" + "|".join(words) + r")\b"
    count = 2 if family == "name" else 1
    return {
        "family": family,
        "key": f"{family} {x}",
        "prompt": rng.choice(prompts).format(x=x),
        "core": core.replace("{x}", x),
        "right": right,
        "wrong": [word for word in words if word not in right],
        "answer": {"accept": right, "among": among, "count": count},
    }


def is_held_out(task):
    """Whether a key is in the quarter that never enters the prompts of the loop."""
    return hashlib.sha256(task["key"].encode()).digest()[0] % 4 == 0


def write_prompts(name, count, held_out, seed):
    """Write `count` prompts with their answers to tiny/world/NAME.jsonl."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        task = draw_task(rng)
        if is_held_out(task) == held_out:
            row = {
                "id": f"{name}-{len(rows):05d}",
                "prompt": task["prompt"],
                "answer": task["answer"],
                "family": task["family"],
            }
            rows.append(row)
    with open(os.path.join(WORLD, f"{name}.jsonl"), "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------------------- the responses


def draw_answer(task, rng, right):
    """The words of a right or of a wrong answer; of two words asked for, one is wrong."""
    if task["answer"]["count"] == 1:
        return rng.choice(task["right"] if right else task["wrong"])
    if right:
        two = rng.sample(task["right"], 2)
    else:
        two = [rng.choice(task["right"]), rng.choice(task["wrong"])]
    rng.shuffle(two)
    return " and ".join(two)


def draw_response(task, rng, right, n_extras):
    """[opener] + answer + extras: fillers, or restatements of the answer that may contradict it."""
    answer = draw_answer(task, rng, right)
    sentences = []
    if rng.random() < 0.35:
        sentences.append(rng.choice(OPENERS))
    if rng.random() < 0.35:
        sentences.append(f"{answer}.")
    else:
        sentences.append(task["core"].format(a=answer))

    for _ in range(n_extras):
        # what a restatement would say is drawn for a filler too
        restated = answer
        if rng.random() <= 0.12:
            restated = draw_answer(task, rng, rng.random() < 0.3)
        if rng.random() < 0.35:
            sentences.append(rng.choice(RESTATEMENTS).format(a=restated))
        else:
            sentences.append(rng.choice(FILLERS))
    return " ".join(sentences)


def draw_demonstration(rng):
    """(task, response) as the base model sees them: 35 % wrong, one in ten of them chatty."""
    task = draw_task(rng)
    go_on = 0.42
    most = 5
    if rng.random() < 0.1:
        go_on = 0.75
        most = 7
    n_extras = 0
    while n_extras < most and rng.random() < go_on:
        n_extras += 1
    right = rng.random() > 0.35
    return task, draw_response(task, rng, right, n_extras)


# ---------------------------------------------------------------------------- tokens and training


def build_tokenizer(folder, control_tokens, template=None, **roles):
    """BPE over the world's text with a byte for every character it has not seen.

    It is the same at every build. roles: pad_token and its like. Saves it in the folder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    texts = []
    for _ in range(6000):
        task, response = draw_demonstration(rng)
        texts += [task["prompt"], response]

    # words begin with ▁, as in Llama's and DeBERTa's tokenizers
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=control_tokens + byte_tokens, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)

    # bytes are words of the model, not control tokens
    settings = json.loads(tokenizer.to_str())
    added = settings["added_tokens"]
    settings["added_tokens"] = [token for token in added if token["content"] in control_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(settings))

    if "[CLS]" in control_tokens:
        ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=ends
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return wrapped


def batches(examples, size, group=16):
    """Endless batches of similar length.

    `group` batches at a time are drawn by examples(count), sorted by the length of their "ids" and
    shuffled.
    """
    rng = random.Random(1)
    while True:
        drawn = sorted(examples(size * group), key=lambda example: len(example["ids"]))
        starts = list(range(0, len(drawn), size))
        rng.shuffle(starts)
        for start in starts:
            yield drawn[start : start + size]


def fit(parameters, lr, steps, loss_of, stream, name):
    """AdamW with 30 steps of warm-up and a cosine down to 5 %; one line every 200 steps."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    t0 = time.time()
    for step, batch in zip(range(steps), stream):
        warmup = min(1, (step + 1) / 30)
        cosine = 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup * cosine

        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        if (step + 1) % 200 == 0:
            seconds = time.time() - t0
            print(
                f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {seconds:.0f} s",
                flush=True,
            )


def pad(rows, value=0):
    """Lists of ids or labels as one tensor (B, L), filled up on the right."""
    import torch

    tensors = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


# ---------------------------------------------------------------------------- the base model

TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|assistant|>' if m['role'] == 'assistant' else '<|user|>' }}{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_base(folder, steps=1050):
    """A Llama of 0.8M parameters, trained on demonstrations.

    The prompts enter the loss at weight .3, so that it can write prompts too.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(max(1, os.cpu_count() // 2))  # the judge is built beside it
    torch.manual_seed(0)
    tokenizer = build_tokenizer(
        folder,
        ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"],
        TEMPLATE,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    rng = random.Random(2)
    assistant_id = tokenizer.convert_tokens_to_ids("<|assistant|>")

    def examples(count):
        """The ids of `count` demonstrations."""
        chats = []
        for _ in range(count):
            task, response = draw_demonstration(rng)
            question = {"role": "user", "content": task["prompt"]}
            chats.append([question, {"role": "assistant", "content": response}])
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        encoded = tokenizer(texts, add_special_tokens=False)
        return [{"ids": ids} for ids in encoded.input_ids]

    def loss_of(batch):
        """Mean negative log-likelihood of the tokens, those of the prompts at weight .3."""
        ids = pad([example["ids"] for example in batch])  # (B, L)
        in_response = (ids == assistant_id).cumsum(1) > 0
        is_token = ids[:, 1:] != 0
        weight = torch.where(in_response, 1.0, 0.3)[:, :-1] * is_token  # (B, L - 1)

        # padding is on the right, so causal masking hides it
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, L - 1, V)
        targets = ids[:, 1:].flatten()
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets, reduction="none"
        ).view_as(weight)  # (B, L - 1)
        return (nll * weight).sum() / weight.sum()

    fit(list(model.parameters()), 3e-3, steps, loss_of, batches(examples, 64), "base")
    model.save_pretrained(folder)
    check_base(model, tokenizer)


def check_base(model, tokenizer):
    """Print how many held-out prompts the base model answers rightly; too few end the build."""
    import torch

    from nanoaipo.chat import render
    from nanoaipo.grading import is_right

    model.eval()
    rng = random.Random(3)
    tasks = []
    while len(tasks) < 256:
        task = draw_task(rng)
        if is_held_out(task):
            tasks.append(task)

    # sampled in one batch, padded on the left
    prompts = []
    for task in tasks:
        messages = [{"role": "user", "content": task["prompt"]}]
        prompts.append(render(tokenizer, messages, "heldout"))
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])  # (B, L)
    sequences = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        do_sample=True,
        temperature=0.7,
        top_k=0,
        max_new_tokens=64,
    )
    responses = sequences[:, width:]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)

    n_right = sum(is_right(text, task["answer"]) for text, task in zip(texts, tasks))
    right = n_right / len(tasks)
    length = (responses != 0).sum().item() / len(tasks)
    print(
        f"base: {right:.2f} of 256 held-out prompts right at temperature .7, "
        f"{length:.1f} tokens each",
        flush=True,
    )
    assert right > 0.68, "the base model is undertrained: every method would lose accuracy"


# ---------------------------------------------------------------------------- the judge

JUDGE_ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "<unk>",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SOURCE_MAXLENGTH = 1224  # tokens of a prompt, as in the published PairRM
CANDIDATE_MAXLENGTH = 412  # tokens of a response


def judge_config(vocab_size):
    """A small DeBERTa-v3: relative positions both ways, shared projections, no dropout."""
    from transformers import DebertaV2Config

    return DebertaV2Config(
        vocab_size=vocab_size,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=2048,
        type_vocab_size=0,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=32,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        initializer_range=0.08,
    )


def build_judge(folder, steps=1300):
    """A PairRM of 0.3M parameters in the published layout, trained on an annotator's preferences.

    These labels (annotate) alone stay at chance; DeBERTa-v3's own signal (which token is replaced:
    here, which answer word is wrong) makes it learn.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as bce

    from nanoaipo.pairrm import PREFIXES, PairRM, PairTokenizer

    torch.set_num_threads(max(1, os.cpu_count() // 2))  # the base model is built beside it
    torch.manual_seed(0)
    backbone = os.path.join(folder, "backbone")
    control_tokens = ["[PAD]", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = build_tokenizer(backbone, control_tokens, **JUDGE_ROLES)
    model = PairRM(judge_config(len(tokenizer) + len(PREFIXES)))
    pair_tokenizer = PairTokenizer(tokenizer, SOURCE_MAXLENGTH, CANDIDATE_MAXLENGTH)
    detector = torch.nn.Linear(96, 1)  # finds wrong answer words; only for training
    rng = random.Random(4)

    def examples(count):
        return draw_comparisons(count, rng, tokenizer, pair_tokenizer)

    def forward(batch):
        """Hidden states (B, L, D) of the pairs and scores (B, 2) of their responses."""
        ids = pad([example["ids"] for example in batch])  # (B, L)
        mask = (ids != 0).long()
        hidden = model.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        marks = torch.tensor([example["marks"] for example in batch])  # (B, 3)
        rows = torch.arange(len(hidden))[:, None]  # (B, 1)
        return hidden, model.score(hidden[rows, marks])  # (B, L, D), (B, 2)

    def loss_of(batch):
        """The annotator's choice, whether each response is right, and which words are wrong."""
        hidden, scores = forward(batch)
        prefers = torch.tensor([example["prefers"] for example in batch])  # (B,)
        right = torch.tensor([example["right"] for example in batch])  # (B, 2)
        labels = pad([example["labels"] for example in batch], -1.0)  # (B, L)
        is_answer = labels >= 0
        preference_loss = bce(scores[:, 0] - scores[:, 1], prefers)
        right_loss = bce(scores, right)
        word_loss = bce(detector(hidden)[..., 0][is_answer], labels[is_answer])
        return preference_loss + 0.5 * right_loss + word_loss

    parameters = [*model.parameters(), *detector.parameters()]
    fit(parameters, 1.5e-3, steps, loss_of, batches(examples, 64), "judge")

    # the log-odds on pairs that it has not seen
    model.eval()
    test = examples(1536)
    logits = []
    with torch.no_grad():
        for start in range(0, len(test), 256):
            _, scores = forward(test[start : start + 256])
            logits += (scores[:, 0] - scores[:, 1]).tolist()
    check_judge(logits, test)
    save_judge(folder, model, tokenizer)


def draw_comparisons(count, rng, tokenizer, pair_tokenizer):
    """`count` examples of two responses to one prompt, with the annotator's labels.

    ids, marks: of the pair, as PairRM reads it. right: of each response, 1 or 0. longer: tokens_1 -
    tokens_2. prefers: the annotator's probability for the first. labels: of each token 1 in a wrong
    answer word, 0 in a right one, -1 elsewhere.
    """
    # the texts of all, then their tokens at once: prompt and two responses of each example
    tasks = []
    texts = []
    for _ in range(count):
        task = draw_task(rng)
        tasks.append(task)
        texts.append(task["prompt"])
        for _ in range(2):
            right = rng.random() < 0.5
            n_extras = min(8, int(rng.expovariate(1 / 1.3)))
            texts.append(draw_response(task, rng, right, n_extras))
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)

    examples = []
    for k, task in enumerate(tasks):
        segments = []
        labels = []
        for n in range(3 * k, 3 * k + 3):
            word_ids = encoded["input_ids"][n]
            segments.append([tokenizer.cls_token_id, None, *word_ids, tokenizer.sep_token_id])
            word_labels = [-1.0] * len(word_ids)
            if n > 3 * k:
                word_labels = answer_labels(task, texts[n], encoded["offset_mapping"][n])
            labels += [-1.0, -1.0, *word_labels, -1.0]  # [CLS], mark, words, [SEP]
        ids, marks = pair_tokenizer.join(*segments)
        longer = len(segments[1]) - len(segments[2])
        example = {"ids": ids, "marks": marks, "labels": labels, "longer": longer}
        examples.append(example | annotate(task, texts[3 * k + 1 : 3 * k + 3], longer))
    return examples


def answer_labels(task, text, offsets):
    """For each token of a response: 1 in a wrong answer word, 0 in a right one, -1 elsewhere.

    offsets: where each token begins and ends in the text.
    """
    words = list(re.finditer(task["answer"]["among"], text.lower()))
    labels = []
    for start, end in offsets:
        label = -1.0
        for word in words:
            if start < word.end() and end > word.start():
                label = float(word.group() not in task["right"])
                break
        labels.append(label)
    return labels


def annotate(task, responses, longer):
    """Whether each response is right, and the annotator's probability for the first.

    sigmoid(3 * (right_1 - right_2) + .06 * (tokens_1 - tokens_2)): right answers, and a little
    length.
    """
    from nanoaipo.grading import is_right

    right = [float(is_right(response, task["answer"])) for response in responses]
    prefers = 1 / (1 + math.exp(-3 * (right[0] - right[1]) - 0.06 * longer))
    return {"right": right, "prefers": prefers}


def check_judge(logits, examples):
    """Print how often the judge's log-odds are for right and for longer ones of two responses."""
    right_wins = []
    longer_wins = []
    for logit, example in zip(logits, examples):
        first, second = example["right"]
        if first != second:
            right_wins.append((logit > 0) == (first > second))
        elif abs(example["longer"]) > 5:
            longer_wins.append((logit > 0) == (example["longer"] > 0))
    right = sum(right_wins) / len(right_wins)
    longer = sum(longer_wins) / len(longer_wins)
    print(
        f"judge: prefers the right one of two {right:.3f}, the longer of two equals {longer:.3f}",
        flush=True,
    )
    assert right > 0.93, "the judge is undertrained"


def save_judge(folder, model, tokenizer):
    """Save weights, backbone, tokenizer and config in the published layout."""
    from safetensors.torch import save_file

    backbone = os.path.join(folder, "backbone")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    model.pretrained_model.save_pretrained(backbone)
    tokenizer.save_pretrained(folder)

    # the fields that llm-blender reads
    config = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": os.path.relpath(backbone, os.path.dirname(HERE)),
        "source_maxlength": SOURCE_MAXLENGTH,
        "candidate_maxlength": CANDIDATE_MAXLENGTH,
        "n_tasks": 1,
        "drop_out": 0.0,
        "fp16": False,
    }
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=1)


# ---------------------------------------------------------------------------- the build


def main():
    # up to date: built from this very file
    with open(__file__, "rb") as f:
        source = hashlib.sha256(f.read()).hexdigest()
    stamp = os.path.join(WORLD, "built_from")
    if os.path.exists(stamp):
        with open(stamp) as f:
            if f.read() == source:
                return
        os.remove(stamp)

    print(
        "building the tiny world: a base model and a judge, two to three minutes on two cores",
        flush=True,
    )
    t0 = time.time()
    os.makedirs(WORLD, exist_ok=True)

    # both models at once, the prompts meanwhile
    context = multiprocessing.get_context("spawn")
    builds = [
        context.Process(target=build_base, args=(os.path.join(WORLD, "base"),)),
        context.Process(target=build_judge, args=(os.path.join(WORLD, "judge"),)),
    ]
    for build in builds:
        build.start()
    write_prompts("prompts", 4096, held_out=False, seed=5)
    write_prompts("heldout", 512, held_out=True, seed=6)
    for build in builds:
        build.join()
    if any(build.exitcode for build in builds):
        sys.exit("tiny/prepare.py: a build failed, see above")

    with open(stamp, "w") as f:
        f.write(source)
    print(f"tiny/world is ready, {time.time() - t0:.0f} s")


if __name__ == "__main__":
    main()
