"""Files that nobody writes on purpose are read to whole records, or refused in one line.

Hypothesis makes them: rows of known layouts in which anything that JSON can hold stands in for some
of the values, lines with damaged bytes, settings with any value. Its choices are fixed, so that a
run repeats itself.
"""

import functools
import json
import math
import operator
import signal

import pytest
from conftest import PLAIN, build_model, build_tokenizer, run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import configurator
from nanoaipo.errors import LONGEST, InputError
from nanoaipo.files import json_line, read_records
from nanoaipo.messages import Dropped
from nanoaipo.pairs import IDS, NUMBERS, read_pairs
from nanoaipo.prompts import read_candidates, read_prompts

fixed = settings(
    derandomize=True,
    database=None,
    max_examples=120,
    deadline=None,  # other processes may take the time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# writes whatever a message may hold beside its content, and tools, which PLAIN does not
TOOLS = """
{%- for tool in tools or [] %}{{- '<|system|>' + tool.function.name + '<|end|>' }}{%- endfor %}
{%- for m in messages %}
  {{- '<|' + m.role + '|>' + (m.name or '') + m.content }}
  {%- for call in m.tool_calls or [] %}{{- call.function.arguments | tojson }}{%- endfor %}
  {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""

# ------------------------------------------------------------------------------------ what is read

TEXTS = (
    "",
    " \n",
    "Two?",
    "\x00\x1b[2J",
    "👩‍👩‍👧 é \u2028",
    "שלום \u202e",
    "\ud800",
    "<|end|>",
    "<s><|user|>Two?<|end|><|assistant|>",
    "\n\nHuman: Two?\n\nAssistant: 2",
    "\n\nHuman:",
    "<think>1 + 1</think>2",
    "</think>",
    "2</s>",
    '[{"role": "user", "content": "Two?"}]',
    "[" * 600,
    '["\\ud800"]',
    '[{"function": {"name": "<|end|>"}}]',
)
texts = st.sampled_from(TEXTS) | st.text(max_size=5)
numbers = st.integers(-2, 300) | st.floats() | st.just(10**400)
scalars = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    scalars,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(texts, inside, max_size=3),
    max_leaves=5,
)

ASK = {"role": "user", "content": "Two?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Two?"}]}
THINKS = {"role": "assistant", "content": "2", "reasoning_content": "1 + 1"}
NO = {"role": "assistant", "content": "three"}
SHAREGPT = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]
ANSWERS = {"chosen": "2", "rejected": "three"}
WITH_IDS = {"prompt_ids": [0, 7], "chosen_ids": [9, 1], "rejected_ids": [8, 1]}
RANKED = {"z": 1.5, "q_w": 0.9, "g_w": 2, "chosen_logp": -3.5, "rejected_logp": -4.0}
RESPONSES = ["2", {"text": "3", "ids": [9, 1], "finished": True, "logp": -3.5}]
THOUGHT = {"text": "4", "thought": "1 + 1", "thought_tokens": 3, "ids": [1, 2, 3, 4]}

PROMPTS = (
    {"id": "1", "prompt": "Two?"},
    {"question_id": 2, "prompt": [SYSTEM, PARTS], "answer": "2"},
    {"prompt": [ASK, CALLS, {"role": "tool", "content": "2", "name": "add"}], "tools": [CALL]},
    {"instruction": "Add.", "input": "1 1"},
    {"instruction": "Add.", "instances": [{"input": "1 1"}]},
    {"turns": ["Two?", "Three?"], "uid": "x"},
    {"question": "Two?", "system": "Be brief.", "history": [["Hi.", "Hello."]]},
    {"conversations": SHAREGPT, "chat_template_kwargs": {"enable_thinking": False}},
    {"input": {"messages": [ASK], "tools": [CALL]}, "images": []},
)
PAIRS = (
    ANSWERS | {"prompt": "Two?"} | RANKED,
    ANSWERS | {"prompt": [SYSTEM, PARTS], "chosen": [THINKS]} | WITH_IDS,
    {"chosen": [ASK, THINKS], "rejected": [ASK, NO], "tools": '[{"function": {"name": "add"}}]'},
    {"messages": [ASK, CALLS], "rejected_messages": [ASK, NO], "tools": [CALL]},
    {"input": {"messages": [ASK]}, "preferred_output": [THINKS], "non_preferred_output": [NO]},
    {"query": "Two?", "response": "2</s>", "rejected_response": "three", "history": []},
)
CANDIDATES = tuple(row | {"responses": [*RESPONSES, THOUGHT]} for row in PROMPTS)


@st.composite
def altered(draw, value):
    """A value in which one part in eight has become anything, or is no more."""
    if draw(st.integers(0, 7)) == 0:
        return draw(anything)
    if isinstance(value, list):
        return [draw(altered(item)) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if draw(st.integers(0, 15)) > 0:
            kept[key] = draw(altered(item))
    return kept


def files_of(rows):
    """Strategy: up to three rows of these layouts, altered, and perhaps with columns of another."""
    row = st.sampled_from(rows).flatmap(altered)
    objects = row.filter(is_object)
    mixed = st.builds(operator.or_, objects, objects)
    return st.lists(objects | mixed, min_size=1, max_size=3)


def is_object(value):
    return isinstance(value, dict)


def write(path, rows):
    """Write rows as JSON lines, halves of surrogate pairs and NaN among them; the path's text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_or_refused(path, read):
    """What read(path) gives, or None if it refuses the file in one line that names it."""
    try:
        return read(path)
    except InputError as e:
        message = str(e)
        assert message.startswith(f"{path}:")
        assert message.isprintable()
        assert len(message) < 12 * LONGEST
        return None


def written_and_read_again(tmp_path, records, read):
    """What read(path) gives for the records, written as the stages write them."""
    path = tmp_path / "again.jsonl"
    path.write_text("".join(map(json_line, records)), encoding="utf-8")
    return read(str(path))


def same(first, second):
    """Whether two lists of records are equal, NaN and all."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def list_candidates(path, dropped=None):
    return [record for _, record in read_candidates(path, dropped)]


@fixed
@given(rows=files_of(PROMPTS + PAIRS))
@example(rows=[{"instruction": "Add.", "instances": 5}])
@example(rows=[{"prompt": [{"role": "us\ner", "content": "x"}]}])
@example(rows=[{"prompt": "\x00"}, {"prompt": "\x00"}])
@example(rows=[{"id": "x" * 10**6}, {"x" * 10**6: 1}])
def test_prompts_are_read_to_the_same_again_or_refused(rows, tmp_path):
    path = write(tmp_path / "prompts.jsonl", rows)
    dropped = Dropped()

    read_or_refused(path, read_prompts)
    prompts = read_or_refused(path, lambda path: read_prompts(path, dropped=dropped))

    assert str(dropped).isprintable()
    if prompts is None:
        return
    assert len(prompts) + dropped.counts.total() == len(rows)
    assert len({prompt["id"] for prompt in prompts}) == len(prompts)
    again = written_and_read_again(tmp_path, prompts, read_prompts)
    for first, second in zip(prompts, again, strict=True):
        first.pop("turns", None)  # of a row that has a prompt, they are not asked
        assert same(first, second)


@fixed
@given(rows=files_of(CANDIDATES + PAIRS))
@example(rows=[{"prompt": "a", "responses": [{"text": "b", "ids": [1], "thought_tokens": "x"}]}])
def test_candidates_are_read_to_the_same_again_or_refused(rows, tmp_path):
    path = write(tmp_path / "candidates.jsonl", rows)
    dropped = Dropped()

    read_or_refused(path, list_candidates)
    candidates = read_or_refused(path, lambda path: list_candidates(path, dropped))

    if candidates is None:
        return
    assert len(candidates) + dropped.counts.total() == len(rows)
    again = written_and_read_again(tmp_path, candidates, list_candidates)
    assert same(candidates, again)


@pytest.fixture(scope="module")
def tokenizers():
    """Of a plain chat template, and of one that writes tools, calls and names."""
    return build_tokenizer(PLAIN, "<|pad|>"), build_tokenizer(TOOLS, "<|end|>")


@fixed
@given(rows=files_of(PAIRS))
@example(rows=[ANSWERS | WITH_IDS | {"prompt_ids": 5}])
@example(rows=[ANSWERS | WITH_IDS | {"prompt_ids": [True]}])
@example(rows=[ANSWERS | {"prompt": "a"}, ANSWERS | {"prompt": "a", "z": math.nan}])
@example(rows=[ANSWERS | {"prompt": "a", "z": math.inf, "g_w": -math.inf}])
@example(rows=[ANSWERS | {"prompt": "a", "z": 10**400}])
@example(rows=[ANSWERS | {"prompt": "a", "tools": "[" * 600}])
def test_pairs_are_read_to_ids_and_numbers_that_train_or_refused(rows, tokenizers, tmp_path):
    path = write(tmp_path / "pairs.jsonl", rows)

    for tokenizer in tokenizers:
        reader = functools.partial(read_pairs, tokenizer=tokenizer, eos_ids={1}, max_length=60)
        read = read_or_refused(path, reader)

        if read is None:
            continue
        pairs, counts = read
        assert sum(counts.values()) == len(rows)
        for pair in pairs:
            ids = [i for key in IDS for i in pair[key]]
            assert all(0 <= i < len(tokenizer) for i in ids)
            assert all(len(pair[key]) > 0 for key in IDS)
            assert len(pair["prompt_ids"]) + len(pair["chosen_ids"]) <= 60
            for key in NUMBERS:
                assert math.isfinite(pair.get(key) or 0) or key == "z"
            assert not math.isnan(pair.get("z") or 0)


# ------------------------------------------------------------------------------------ damaged bytes


@st.composite
def damaged(draw):
    """The bytes of two rows in which some have become others."""
    rows = draw(st.lists(st.sampled_from(PROMPTS + PAIRS + CANDIDATES), min_size=1, max_size=2))
    content = b"".join(json_line(row).encode() for row in rows)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.integers(0, 8))
        content = content[:start] + draw(st.binary(max_size=4)) + content[stop:]
    return content


@fixed
@given(content=damaged(), name=st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"]))
@example(content=b"", name="a.jsonl")
@example(content=b"\xef\xbb\xbf", name="a.json")
@example(content=b"\x00" * 4096, name="a.jsonl")
@example(content=b'{"prompt": "\xed\xa0\x80"}', name="a.jsonl")
@example(content='{"prompt": "a"}\n{"prompt": "b"}'.encode("utf-16"), name="a.jsonl")
@example(content=b"[" * 10**6, name="a.jsonl")
@example(content=b'{"a":' * 300 + b"1" + b"}" * 300, name="a.json")
@example(content=b'{"a": ' + b"1" * 5000 + b"}", name="a.jsonl")
def test_damaged_bytes_are_read_to_what_can_be_written_or_refused(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)

    records = read_or_refused(str(path), lambda path: [r for _, r in read_records(path)])

    if records:
        again = written_and_read_again(
            tmp_path, records, lambda path: [r for _, r in read_records(path)]
        )
        assert same(records, again)


# ------------------------------------------------------------------------------------ no end of it


@pytest.fixture
def no_longer_than_a_minute():
    """Ends what hangs: these texts once took hours."""

    def end(*_):
        raise TimeoutError("a minute")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


MEGABYTE = 10**6
LONG = {  # name: text
    "spaces": " " * MEGABYTE + "x",
    "end marks": "x" + "</s> " * (MEGABYTE // 5),
    "end marks inside": "</s>" * (MEGABYTE // 4) + "x",
    "headings": "### Instruction: ### Response: x" * (MEGABYTE // 32),
    "speakers": "USER: " + "Assistant: " * (MEGABYTE // 11) + "x",
    "turns": "\n\nHuman: a" * (MEGABYTE // 10),
    "marks of thoughts": "<think></think>" * (MEGABYTE // 15),
    "brackets": "[" * MEGABYTE,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_line_of_a_megabyte_is_read_in_seconds(
    text, tokenizers, tmp_path, no_longer_than_a_minute
):
    plain, _ = tokenizers
    row = {"prompt": text, "chosen": text, "rejected": "three", "tools": text}
    path = write(tmp_path / "long.jsonl", [row])

    read_or_refused(path, read_prompts)
    read_or_refused(path, list_candidates)
    read_or_refused(path, lambda path: read_pairs(path, plain, {1}, 60))


# ----------------------------------------------------------------------------------------- settings


EVERY = configurator.declared_by_all()  # {name: (default, ...)} of all scripts
values = texts | numbers.map(str) | st.sampled_from(["1e999", "-1", "nan", "True", "None", "0x1"])


@fixed
@given(key=st.sampled_from(sorted(EVERY)) | texts, value=values)
@example(key="beta", value="nan")
@example(key="lr", value="-1")
@example(key="batch_size", value="-1")
@example(key="out", value="\x00")
@example(key="out", value="\udcff")
def test_a_setting_takes_its_type_or_is_refused_by_name(key, value):
    try:
        changed = configurator.changes([f"--{key}={value}"], EVERY, EVERY)
    except InputError as e:
        assert str(e).startswith("--") and str(e).isprintable()
        return

    ((name, taken),) = changed.items()
    assert type(taken) is type(EVERY[name][0])
    assert taken == taken and taken not in (math.inf, -math.inf)
    if isinstance(taken, (int, float)) and name not in configurator.SIGNED:
        assert taken >= 0
    str(taken).encode()  # raises for half of a surrogate pair


recipes = st.sampled_from(
    [
        b"beta = 0.2\n",
        b"# a comment\nlr = 1e-6  # rate\n",
        b"batch_size = 8\nmodel = 'm'\n",
        b"loss = dpo()\n",
    ]
)


@fixed
@given(start=recipes, damage=st.binary(max_size=6), end=recipes)
@example(start=b"", damage=b"\x00", end=b"")
@example(start=b"", damage=b"\xff", end=b"")
@example(start=b"", damage=b"beta = {[]: 1}", end=b"")
@example(start=b"", damage=b"beta = " + b"(" * 10**5, end=b"")
@example(start=b"", damage=b"beta = " + b"-" * 10**5 + b"1", end=b"")
@example(start=b"", damage=b"beta = 1e999", end=b"")
def test_a_recipe_is_read_or_refused_by_its_line(start, damage, end, tmp_path):
    path = tmp_path / "recipe.py"
    path.write_bytes(start + damage + end)

    try:
        changed = configurator.changes([str(path)], EVERY, EVERY)
    except InputError as e:
        assert str(e).startswith(f"{path}:") and str(e).isprintable()
        return

    for name, taken in changed.items():
        assert type(taken) is type(EVERY[name][0])


# ------------------------------------------------------------------------- longer than the model


def test_a_pair_that_is_longer_than_the_model_is_dropped(tmp_path):
    positions = {"max_position_embeddings": 40, "word_embed_proj_dim": 32, "ffn_dim": 64}
    model = build_model(tmp_path / "model", "OPT", **positions)  # an embedding for each position
    pair = {"prompt": "Two?", "chosen": "2", "rejected": "three"}
    path = write(tmp_path / "pairs.jsonl", [pair, pair | {"chosen": "2" * 50}])

    done = run(
        "train.py", model=model, pairs=path, out=tmp_path / "out", loss="dpo", dtype="float32"
    )

    assert done.returncode == 0, done.stderr
    assert "1 row dropped: 1 too_long (" in done.stdout
