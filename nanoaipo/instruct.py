"""New instructions by self-instruct (arXiv 2212.10560) as AIPO has it: the policy writes prompts.

A call shows the policy examples from the pool as a numbered list of raw text, and the policy writes
the next item. Examples come from the pool alone, never from what was written. Each process calls in
rounds until it has its share of instructions, which differ from each other, from the pool and from
those of the processes of lower rank. A killed stage begins anew, with the same calls.
"""

import collections
import itertools
import os
import random
import re
import time

from nanoaipo.chat import control_pattern, render, template_arguments, token_ids
from nanoaipo.engines import context_length
from nanoaipo.errors import InputError
from nanoaipo.files import read_records, shard_path
from nanoaipo.processes import RANK, WORLD_SIZE
from nanoaipo.seeds import derive_seed
from nanoaipo.stages import check_same_run, open_output

HEADING = (
    "Here are tasks that people have given to an assistant. "
    "All are different in topic, form and length.\n"
)
FIRST_CALLS = 16  # in the first round; the next have twice as many each, so that counts come early
MIN_CALLS = 128  # in a later round (AIPO)
MAX_CALLS = 4096  # in a round
MAX_REPLY_TOKENS = 1024  # AIPO
MIN_TOKENS = 4  # of an instruction
CALLS_PER_INSTRUCTION = 10  # at most, as if MIN_CALLS were wanted at least; then it is an error

# of the manifest: prompts to show, calls, and replies dropped by the first of Rules that they break
COUNTS = (
    "prompts",
    "control_text",
    "too_long",
    "too_short",
    "calls",
    "unfinished",
    "empty",
    "unfit",
    "known",
)

# Where a reply goes on with an answer. "A:" with a "B:" below it is a choice, not an answer.
ANSWER = re.compile(
    r"\b(?:answer|output|solution):|^\s*a:(?!.*^\s*b:)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)


def write_instructions(pool, manifest, tokenizer, start_engine, s):
    """Write this process's share of n_prompts new instructions to `out`, as a file of prompts.

    pool: prompt records to show; start_engine(max_tokens): an engine's `sample`; s: the settings of
    generate.py. Raises InputError when the pool is too small, or when no call is left.
    """
    # what a call shows comes from the pool
    examples = example_texts(pool)
    if len(examples) < s.instruction_examples:
        raise InputError(
            f"{s.prompts}: {len(examples)} prompts that fit; "
            f"a call shows {s.instruction_examples} of them"
        )

    # this process's share; there may be more processes than instructions
    wanted = len(range(RANK, s.n_prompts, WORLD_SIZE))
    counts = dict.fromkeys(COUNTS, 0)
    counts["prompts"] = len(pool)
    instructions = []
    if wanted:
        writer = Writer(tokenizer, examples, start_engine, s)
        rules = Rules(tokenizer, examples, s)
        instructions = collect(wanted, writer, rules, counts, s.out, manifest)

    # fewer than wanted are an error, and nothing is written
    summary = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    if len(instructions) < wanted:
        raise InputError(
            f"--task=instructions: {len(instructions)} of {wanted} distinct instructions "
            f"({summary}); the policy repeats itself or does not go on with a list: ask for fewer, "
            "raise --instruction_temperature, or draw prompts from the pool (--new_instructions=0 "
            "in the loop)"
        )

    manifest["counts"] = counts
    with open_output(s.out, manifest) as write:
        for k, text in enumerate(instructions):
            prompt = [{"role": "user", "content": text}]
            write({"id": f"new-{s.iteration}-{RANK}-{k}", "prompt": prompt})
    print(f"{len(instructions)} new instructions; {summary} -> {shard_path(s.out)}")


def collect(wanted, writer, rules, counts, out, manifest):
    """The `wanted` instructions of this process, or fewer when no call is left.

    counts: of calls, and of what the rules drop. out, manifest: of this stage, which the processes
    of lower rank write too.
    """
    instructions = []
    met_lower_ranks = RANK == 0
    max_calls = CALLS_PER_INSTRUCTION * max(wanted, MIN_CALLS)
    for n_round in itertools.count():
        # those of lower ranks have precedence: drop ours that are near to theirs, then go on
        if len(instructions) == wanted and not met_lower_ranks:
            theirs = wait_for_lower_ranks(out, manifest)
            instructions = drop_near(instructions, theirs, rules.seen.similarity)
            counts["known"] += wanted - len(instructions)
            for text in theirs:
                rules.seen.add(text)
            met_lower_ranks = True

        # done, or out of calls, which is for the caller to tell
        missing = wanted - len(instructions)
        if missing == 0 or counts["calls"] >= max_calls:
            return instructions

        # one round, of a quarter more calls than are missing; the first ones are shorter
        n_calls = max(MIN_CALLS, min(MAX_CALLS, 5 * missing // 4))
        n_calls = min(n_calls, FIRST_CALLS * 2**n_round)
        for text, finished in writer.write(n_calls, n_round):
            counts["calls"] += 1
            reason = rules.why_unfit(text, finished)
            if reason:
                counts[reason] += 1
            elif len(instructions) < wanted:
                rules.seen.add(text)
                instructions.append(text)
        print(
            f"round {n_round + 1}: {len(instructions)} of {wanted} instructions "
            f"after {counts['calls']} calls",
            flush=True,
        )


# ------------------------------------------------------------------------------ what a call shows


def example_texts(pool):
    """The distinct texts of the pool's prompts of one turn, without blank lines inside.

    Longer conversations are left out: their last turn alone is no instruction.
    """
    texts = []
    for row in pool:
        turns = [m for m in row["prompt"] if m["role"] != "system"]
        if len(turns) == 1:
            # a blank line ends an item of the list
            text = row["prompt"][-1]["content"].strip()
            texts.append(re.sub(r"\s*\n\s*\n\s*", "\n", text))
    return list(dict.fromkeys(texts))


class Writer:
    """The policy, which is shown examples as a numbered list and writes the next item."""

    def __init__(self, tokenizer, examples, start_engine, s):
        self.tokenizer = tokenizer
        self.examples = examples
        self.n_examples = s.instruction_examples  # in a call
        self.temperature = s.instruction_temperature
        self.seeds = (s.seed, s.iteration, RANK)

        # a call has room for the list and for the reply
        self.reply_tokens = min(MAX_REPLY_TOKENS, s.max_new_tokens)
        room = context_length(s.model) - self.reply_tokens
        self.list_tokens = min((self.n_examples + 1) * s.max_prompt_tokens, room)
        self.sample = start_engine(self.list_tokens + self.reply_tokens)

    def write(self, n_calls, n_round):
        """Yield (text, finished) of the instructions of a round of calls."""
        replies = self.sample(
            self.requests(n_calls, n_round),
            n_responses=1,
            temperature=self.temperature,
            top_k=50,
            top_p=0.9,
            max_new_tokens=self.reply_tokens,
            stop=("\n\n", next_number(self.n_examples)),
        )
        for responses in replies:
            ids, finished, _ = responses[0]
            reply = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield instruction_of(reply, self.n_examples), finished

    def requests(self, n_calls, n_round):
        """Requests (ids, seed) of a round, each with a new draw of examples; no too long ones.

        Raises InputError when no request is left.
        """
        rng = random.Random(derive_seed(*self.seeds, n_round))
        requests = []
        for call in range(n_calls):
            text = HEADING
            for k, example in enumerate(rng.sample(self.examples, self.n_examples), 1):
                text += f"\n{k}. {example}"
            text += f"\n{self.n_examples + 1}."  # the item that the policy is to write

            ids = self.tokenizer(text).input_ids
            while ids[-1] in self.tokenizer.all_special_ids:  # some tokenizers end every text
                ids.pop()
            if len(ids) <= self.list_tokens:
                requests.append((ids, derive_seed(*self.seeds, n_round, call)))
        if not requests:
            raise InputError(
                f"--task=instructions: {self.n_examples} examples do not fit into "
                f"{self.list_tokens} tokens; "
                "lower --max_prompt_tokens, --max_new_tokens or --instruction_examples"
            )
        return requests


# -------------------------------------------------------------------------- what becomes of a reply


def next_number(n_examples):
    """The beginning of the item after the one that the policy writes, where that one has ended."""
    return f"\n{n_examples + 2}."


def instruction_of(reply, n_examples):
    """The instruction at the head of a reply, cut where the list goes on or an answer begins."""
    item = re.split(rf"\n\s*\n|{re.escape(next_number(n_examples))}", reply)[0].strip()
    if "example:" in item.lower():  # its answer belongs to the instruction
        return item
    return ANSWER.split(item)[0].strip()


def compile_unfit(pattern):
    """--instruction_unfit, upper and lower case alike; an empty one finds nothing."""
    try:
        return re.compile(pattern or "(?!)", re.IGNORECASE)
    except re.error as e:
        raise InputError(f"--instruction_unfit={pattern}: not a regular expression: {e}") from e


class Rules:
    """What an instruction has to be: whole, fit, of the right length, and new."""

    def __init__(self, tokenizer, examples, s):
        self.tokenizer = tokenizer
        self.model = s.model
        self.arguments = template_arguments(s.template_kwargs, s.date)
        self.unfit = compile_unfit(s.instruction_unfit)
        self.control = control_pattern(tokenizer)
        self.seen = NearDuplicateFinder(s.instruction_similarity, examples)

        # it is a prompt of the next stage, which needs room for max_new_tokens behind it
        room = context_length(s.model) - s.max_new_tokens
        self.max_tokens = min(s.max_prompt_tokens, room)  # rendered
        self.min_tokens = max(MIN_TOKENS, s.min_prompt_tokens)  # of the text alone

    def why_unfit(self, text, finished):
        """The first rule an instruction breaks (a key of counts), or None."""
        if not finished:
            return "unfinished"
        if not text:
            return "empty"
        if self.unfit.search(text):
            return "unfit"
        if self.control.search(text):
            return "control_text"
        if len(token_ids(self.tokenizer, text)) < self.min_tokens:
            return "too_short"
        messages = [{"role": "user", "content": text}]
        ids = render(self.tokenizer, messages, self.model, arguments=self.arguments)
        if len(ids) > self.max_tokens:
            return "too_long"
        if self.seen.is_near_duplicate(text):
            return "known"
        return None


class NearDuplicateFinder:
    """Finds whether a text is nearly equal to one of those added before.

    Nearly equal: the Jaccard index of their sets of three-word shingles is at least `similarity`.
    With similarity 0 nothing is found.
    """

    def __init__(self, similarity, texts=()):
        self.similarity = similarity
        self.sizes = []  # number of shingles of each text
        self.texts_with = collections.defaultdict(list)  # shingle -> indices of texts
        for text in texts:
            self.add(text)

    def add(self, text):
        shingles = shingles_of(text)
        for shingle in shingles:
            self.texts_with[shingle].append(len(self.sizes))
        self.sizes.append(len(shingles))

    def is_near_duplicate(self, text):
        if not self.similarity:
            return False
        shingles = shingles_of(text)
        # only texts that share a shingle are looked at
        n_shared = collections.Counter()  # index of a text -> shingles in common
        for shingle in shingles:
            n_shared.update(self.texts_with.get(shingle, ()))
        for k, n in n_shared.items():
            n_either = len(shingles) + self.sizes[k] - n
            if n / n_either >= self.similarity:
                return True
        return False


def shingles_of(text):
    """Hashes of all three words that follow each other in a text, upper and lower case alike."""
    words = re.findall(r"\w+", text.lower())
    n_shingles = max(1, len(words) - 2)  # a shorter text is one shingle
    return {hash(tuple(words[k : k + 3])) for k in range(n_shingles)}


# ------------------------------------------------------------------------------------ other ranks


def wait_for_lower_ranks(out, manifest):
    """The instructions of the processes before this one, once all of them have written theirs."""
    paths = [shard_path(out, rank) for rank in range(RANK)]
    # a file under its final name is complete
    while not all(map(os.path.exists, paths)):
        time.sleep(1)
    texts = []
    for path in paths:
        check_same_run(path, manifest)
        for _, row in read_records(path):
            texts.append(row["prompt"][0]["content"])
    return texts


def drop_near(texts, others, similarity):
    """The texts that are not nearly equal to one of the others."""
    finder = NearDuplicateFinder(similarity, others)
    return [text for text in texts if not finder.is_near_duplicate(text)]
