"""Questions to a model, here or behind an endpoint; every reply is kept the moment it comes.

    replies = ask(questions, "pairs.jsonl", endpoint("https://api.openai.com/v1", 16))

A question is a JSON object with model, messages, temperature, max_tokens, and `about` or whatever
else tells it from the others. A reply is an object too: {reply: text, usage, ...}, or {reply: "",
error} where there is no answer. Its text is kept as it came, a thought before the answer included.
What answers is a local_model (below) or an endpoint (endpoints.py).
"""

import glob
import hashlib
import json
import os
import threading

from tqdm import tqdm

from nanoaipo.chat import control_pattern, load_tokenizer, render
from nanoaipo.engines import context_length, load_engine
from nanoaipo.errors import InputError
from nanoaipo.files import shard_path
from nanoaipo.processes import WORLD_SIZE
from nanoaipo.seeds import derive_seed
from nanoaipo.served import check_served, count_served, nothing_served, print_served
from nanoaipo.thoughts import MARKS, split_thought_ids, with_thought

# ------------------------------------------------------------------ asking, and keeping the replies


def ask(questions, out, answer):
    """The replies to `questions`, in their order, as {reply, usage, ...}.

    answer(questions, keep): an endpoint or a local_model, which calls keep({index: reply}) from any
    thread, in any order. Each reply is kept as it came, the moment it comes, in NAME.replies beside
    `out`. What this or an earlier run has there is not asked again, unless it is an error, and
    equal questions are asked once. Raises InputError when one name has been answered by two models.
    """
    path = replies_path(out)
    replies = read_replies(out, path)
    names = sorted({question["model"] for question in questions})
    served = nothing_served(names)
    count_served(replies.values(), served)
    check_served(served, path)

    # one question per key: equal ones share a reply
    keys = [question_hash(question) for question in questions]
    already = len(replies.keys() & set(keys))
    missing = {}
    for key, question in zip(keys, questions):
        if key not in replies:
            missing[key] = question

    if missing:
        new = ask_missing(missing, path, answer, served)
        replies.update(new)
        print(f"{len(missing)} questions asked, {already} replies were there; {costs(new, path)}")

        # the other processes may meanwhile have been answered by another model
        if WORLD_SIZE > 1:
            served = nothing_served(names)
            count_served(read_replies(out, path).values(), served)
            check_served(served, path)
        print_served(served)
    return [replies[key] for key in keys]


def question_hash(question):
    """SHA-256 of a question, by which its reply is found again."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def replies_path(out):
    """Where this process keeps the replies that `out` is made of."""
    return os.path.splitext(shard_path(out))[0] + ".replies"


def kept_replies(out, model):
    """The replies that were asked of a model and are kept beside `out`, errors left out."""
    replies = read_replies(out, replies_path(out))
    return [reply for reply in replies.values() if reply.get("asked") == model]


def read_replies(out, path):
    """The replies {key: line} that all processes of this stage kept beside `out`, errors left out.

    path: this process's own file, whose last line is removed if a kill has cut it.
    """
    stem = glob.escape(os.path.splitext(out)[0])
    files = glob.glob(stem + ".replies") + glob.glob(stem + "-[0-9]*-of-[0-9]*.replies")
    replies = {}
    for file in files:
        with open(file, "rb") as f:
            lines = f.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # cut, or another process is writing it
            del lines[-1]
            if file == path:
                os.truncate(path, sum(map(len, lines)))
        for line in lines:
            try:
                reply = json.loads(line)
                key = reply["key"]
            except (ValueError, TypeError, LookupError):  # damaged: the question is asked again
                continue
            if "error" not in reply:
                replies[key] = reply
    return replies


def ask_missing(missing, path, answer, served):
    """The replies {key: line} to questions {key: question}, appended to the file as they come."""
    keys = list(missing)
    replies = {}
    lock = threading.Lock()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with tqdm(total=len(missing), desc="ask", unit="reply") as bar:

        def keep(came):
            lines = []
            for n, reply in came.items():
                question = missing[keys[n]]
                line = {"key": keys[n], "about": question.get("about"), "asked": question["model"]}
                lines.append(line | reply)
            text = "".join(json.dumps(line) + "\n" for line in lines)

            # on the disk before it counts: a reply that was paid for is never asked again
            with lock, open(path, "a", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
                for line in lines:
                    replies[line["key"]] = line
                bar.update(len(lines))
                count_served(lines, served)
                check_served(served, path)

        try:
            answer(list(missing.values()), keep)
        except InputError:
            check_served(served, path)  # those that were under way count too
            raise
    return {key: replies[key] for key in keys}


def costs(replies, path):
    """What replies cost in tokens, where they are, and one of the errors among them, as text."""
    read = 0
    written = 0
    errors = []
    for reply in replies.values():
        usage = reply.get("usage", {})
        read += n_tokens(usage, "prompt_tokens")
        written += n_tokens(usage, "completion_tokens")
        if "error" in reply:
            errors.append(reply["error"])

    text = f"{read} tokens read, {written} written -> {path}"
    if errors:
        text += f"; {len(errors)} refused, such as: {errors[0]}"
    return text


def n_tokens(usage, key):
    """A number of a reply's usage; 0 where a server does not count, or not in numbers."""
    value = usage.get(key)
    if not isinstance(value, int):
        return 0
    return value


# ------------------------------------------------------------------------------------- a model here

BLOCK = 512  # questions between two savings of a local model's replies


def local_model(
    model, *, engine, dtype, seed, tensor_parallel, gpu_memory, generate_rows, arguments=None
):
    """A way to answer questions by an engine of this process.

    Replies are kept after every 512 questions, so that a kill costs no more than those. All have
    the temperature and max_tokens of the first. A question too long for the model has an error.
    arguments: of its chat template, as chat.template_arguments returns them.
    """

    def answer(questions, keep):
        tokenizer, eos_ids = load_tokenizer(model, "ranker_model")
        control = control_pattern(tokenizer)
        max_tokens = questions[0]["max_tokens"]
        temperature = questions[0]["temperature"]

        # a question too long for the model is answered at once, with an error
        room = context_length(model) - max_tokens
        prompt_ids = []
        for question in questions:
            messages = question["messages"]
            prompt_ids.append(render(tokenizer, messages, model, control, arguments=arguments))
        fitting, errors = sort_by_room(prompt_ids, room)
        keep(errors)
        if not fitting:
            return

        # the engine gets no more context than the longest question that fits needs
        longest = max(len(prompt_ids[n]) for n in fitting) + max_tokens
        sample = load_engine(
            engine,
            model,
            eos_ids,
            longest,
            dtype=dtype,
            seed=seed,
            tensor_parallel=tensor_parallel,
            gpu_memory=gpu_memory,
            generate_rows=generate_rows,
        )

        # votes on one response have different seeds: the number of the vote is in the question
        for start in range(0, len(fitting), BLOCK):
            block = fitting[start : start + BLOCK]
            sampled = sample(
                [(prompt_ids[n], derive_seed(questions[n])) for n in block],
                n_responses=1,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_tokens,
            )
            replies = {}
            for n, responses in zip(block, sampled):
                ids, _, _ = responses[0]
                usage = {"prompt_tokens": len(prompt_ids[n]), "completion_tokens": len(ids)}
                reply = reply_text(tokenizer, prompt_ids[n], ids)
                replies[n] = {"reply": reply, "usage": usage}
            keep(replies)

    return answer


def sort_by_room(prompt_ids, room):
    """(Indices of the questions that fit into `room` tokens, {index: error reply} of the rest)."""
    fitting = []
    errors = {}
    for n, ids in enumerate(prompt_ids):
        if len(ids) <= room:
            fitting.append(n)
        else:
            error = f"{len(ids)} tokens, the model has room for {room}"
            errors[n] = {"reply": "", "error": error}
    return fitting, errors


def reply_text(tokenizer, prompt_ids, ids):
    """A reply as text, its thought between marks that are plain text, for whoever reads it."""
    thought, answer, _, has_ended = split_thought_ids(tokenizer, prompt_ids, ids)
    if thought is None:
        return answer
    if not has_ended:
        begins, _ = MARKS[0]
        return f"{begins}\n{thought}"
    return with_thought(thought, answer)
