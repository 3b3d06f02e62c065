"""The columns that people's files of prompts have, to our records."""

import pytest
from test_files import write_lines

from nanoaipo.errors import InputError
from nanoaipo.messages import Dropped
from nanoaipo.prompts import read_candidates, read_prompts


def contents(rows):
    """The text of the last message that each row asks."""
    return [row["prompt"][-1]["content"] for row in rows]


def test_prompts_come_from_texts_messages_and_instruction_columns_and_get_stable_ids(tmp_path):
    conversation = [{"role": "user", "content": "four"}, {"role": "assistant", "content": "-"}]
    path = write_lines(
        tmp_path / "p.jsonl",
        {"id": "a", "prompt": "one", "extra": 3},
        {"prompt": [{"role": "user", "content": "two"}]},
        {"instruction": "three"},
        {"messages": conversation},
        {"prompt": "two"},
    )

    rows = read_prompts(path)
    ids = [row["id"] for row in rows]

    assert contents(rows) == ["one", "two", "three", "four", "two"]
    assert ids[0] == "a"
    assert rows[0]["extra"] == 3
    assert len(set(ids)) == 5
    assert ids == [row["id"] for row in read_prompts(path)]


def test_a_number_is_an_id_and_zero_too(tmp_path):
    path = write_lines(tmp_path / "n.jsonl", {"id": 0, "prompt": "x"}, {"id": 1, "prompt": "x"})

    assert [row["id"] for row in read_prompts(path)] == ["0", "1"]


def test_a_column_of_another_name_is_read_where_it_is_named(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", {"q": "five"})

    (row,) = read_prompts(path, "q")

    assert row["prompt"] == [{"role": "user", "content": "five"}]


def test_of_a_benchmarks_turns_the_first_is_asked_and_all_are_kept(tmp_path):
    path = write_lines(
        tmp_path / "t.jsonl",
        {"prompt": "x", "turns": 3},
        {"turns": "y", "uid": "u"},
        {"turns": [{"content": "z"}, "w"], "prompt": None},
    )

    rows = read_prompts(path)

    assert contents(rows) == ["x", "y", "z"]
    assert [row.get("turns") for row in rows] == [None, ["y"], ["z", "w"]]
    assert rows[1]["id"] == "u"


def test_an_instruction_is_asked_with_its_input(tmp_path):
    path = write_lines(
        tmp_path / "i.jsonl",
        {"instruction": "add", "input": "1 2"},
        {"instruction": "sort", "input": "", "instances": [{"input": ""}, {"input": "b a"}]},
        {"instruction": "sing", "input": "", "instances": []},
    )

    assert contents(read_prompts(path)) == ["add\n\n1 2", "sort\n\nb a", "sing"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "x"}], ":1: 'prompt' has to be"),
        ([{"turns": 3}], ":1: 'turns' has to be"),
        ([{"turns": ["x", 3]}], ":1: 'turns' has to be"),
        ([{"prompt": "x", "id": 1}, {"prompt": "y", "id": 1}], ":2: id '1' is already"),
        ([{"prompt": [{"role": "assistant", "content": "x"}]}], ":1: 'prompt' holds no prompt"),
        ([], r"no prompt is left \(no rows\)"),
    ],
)
def test_what_is_no_prompt_is_refused(rows, message, tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", *rows)

    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_prompts_come_in_the_layouts_of_pairs_too(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    talk = [{"from": "human", "value": "c"}, {"from": "gpt", "value": "-"}]
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": [{"role": "user", "content": parts, "name": None}]},
        {"conversations": talk},
        {"question": "d", "system": "Be brief."},
        {"input": {"messages": [{"role": "user", "content": "e"}]}, "preferred_output": []},
        {"chosen": "\n\nHuman: f\n\nAssistant: g", "rejected": "\n\nHuman: f\n\nAssistant: h"},
    )

    rows = read_prompts(path)

    assert contents(rows) == ["a b", "c", "d", "e", "f"]
    assert [len(row["prompt"]) for row in rows] == [1, 1, 2, 1, 1]
    assert rows[0]["prompt"] == [{"role": "user", "content": "a b"}]
    assert rows[2]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_rows_without_a_prompt_are_dropped_and_counted_for_who_asks(tmp_path):
    image = [{"role": "user", "content": [{"type": "image", "image": "x"}]}]
    path = write_lines(tmp_path / "p.jsonl", {"text": "x"}, {"prompt": "a"}, {"prompt": image})
    none = write_lines(tmp_path / "none.jsonl", {"text": "x", "prompt": None})
    dropped = Dropped()

    rows = read_prompts(path, dropped=dropped)

    assert contents(rows) == ["a"]
    assert dropped.counts == {"no_prompt": 1, "not_text": 1}
    assert "p.jsonl:3: 'prompt': message 1 holds an image" in str(dropped)
    with pytest.raises(InputError, match=r"p.jsonl:1: .* the columns are text; wanted is one of"):
        read_prompts(path)
    with pytest.raises(InputError, match=r"none.jsonl: no prompt is left \(1 no_prompt .*are text"):
        read_prompts(none, dropped=Dropped())


def test_a_hub_dataset_is_named_with_its_split(tmp_path):
    write_lines(tmp_path / "part.jsonl", {"prompt": "from datasets"})

    assert contents(read_prompts(f"{tmp_path}:train")) == ["from datasets"]


def test_a_hub_datasets_columns_that_a_row_lacks_are_null_and_not_asked(tmp_path):
    write_lines(
        tmp_path / "part.jsonl",
        {"prompt": "a", "messages": None},
        {"prompt": None, "messages": [{"role": "user", "content": "b"}]},
    )

    assert contents(read_prompts(f"{tmp_path}:train")) == ["a", "b"]
    assert contents(read_prompts(f"{tmp_path}:train[:1]")) == ["a"]
    assert contents(read_prompts(f"{tmp_path}:default:train[1:]")) == ["b"]


def test_what_is_neither_a_file_nor_a_hub_dataset_is_named(tmp_path):
    with pytest.raises(InputError, match="nobody:train: no such file, and no data set NAME:SPLIT"):
        read_prompts(f"{tmp_path}/nobody:train")


def test_pairs_that_are_ranked_again_keep_each_texts_own_ids(tmp_path):
    pair = {"id": "1", "prompt": "x", "prompt_ids": [1], "chosen": "a", "rejected": "b"}
    pair |= {"chosen_ids": [2, 3], "rejected_ids": [4]}
    path = write_lines(tmp_path / "pairs.jsonl", pair)

    ((_, row),) = read_candidates(path)

    assert row["responses"] == [{"text": "a", "ids": [2, 3]}, {"text": "b", "ids": [4]}]
    assert row["prompt_ids"] == [1]
    assert not row.keys() & {"chosen", "rejected", "chosen_ids", "rejected_ids"}


def test_candidates_without_an_id_are_told_apart_by_their_number(tmp_path):
    row = {"id": None, "prompt": "x", "responses": ["a"]}
    path = write_lines(tmp_path / "c.jsonl", row, row, row | {"id": 0.5})

    assert [row["id"] for _, row in read_candidates(path)] == ["0", "1", "0.5"]


def test_an_empty_text_and_nan_are_no_ids(tmp_path):
    rows = [{"id": "", "prompt": "x", "responses": ["a"]}]
    rows += [{"id": float("nan"), "prompt": text, "responses": ["a"]} for text in "yz"]
    path = write_lines(tmp_path / "c.jsonl", *rows)

    assert [row["id"] for _, row in read_candidates(path)] == ["0", "1", "2"]
    assert len({row["id"] for row in read_prompts(path)} - {"", "nan"}) == 3


def test_a_null_in_a_response_is_a_key_that_it_lacks(tmp_path):
    responses = [{"text": "a", "ids": None, "finished": None, "thought": None}, {"text": "b"}]
    path = write_lines(tmp_path / "c.jsonl", {"prompt": "x", "responses": responses})

    ((_, row),) = read_candidates(path)

    assert row["responses"] == [{"text": "a"}, {"text": "b"}]


def test_an_id_that_is_the_number_of_a_row_without_one_is_refused(tmp_path):
    row = {"prompt": "x", "responses": ["a"]}

    for rows in ([row | {"id": 1}, row], [row, row | {"id": "0"}]):
        path = write_lines(tmp_path / "c.jsonl", *rows)
        with pytest.raises(InputError, match=r"c.jsonl:2: '[01]' is the id of one row and the"):
            list(read_candidates(path))


def test_a_system_message_that_is_only_in_the_chosen_conversation_is_asked(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "q"}
    talk = [system, question, {"role": "assistant", "content": "a"}]
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "q", "chosen": talk},
        {"prompt": "another", "chosen": talk},
        {"prompt": "q", "chosen": talk[1:]},
        {"prompt": "q", "chosen": [3, 4]},
    )

    asked = [row["prompt"] for row in read_prompts(path)]

    assert asked[0] == [system, question]
    assert [len(messages) for messages in asked] == [2, 1, 1, 1]


def test_pairs_of_any_layout_are_candidates(tmp_path):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    chosen = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    rejected = {"role": "assistant", "content": "b"}
    path = write_lines(
        tmp_path / "c.jsonl",
        {"prompt": "q", "chosen": talk + [chosen], "rejected": talk + [rejected]},
        {
            "input": {"messages": talk},
            "preferred_output": [chosen],
            "non_preferred_output": [rejected],
        },
    )

    for _, row in read_candidates(path):
        assert row["prompt"] == talk
        assert row["responses"] == [{"text": "a", "thought": "hm"}, {"text": "b"}]
        assert not row.keys() & {"chosen", "rejected", "preferred_output"}


def test_rows_that_are_no_pair_are_dropped_and_counted_for_who_asks(tmp_path):
    path = write_lines(
        tmp_path / "c.jsonl",
        {"chosen": "a", "rejected": "b"},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    )
    dropped = Dropped()

    ((_, row),) = read_candidates(path, dropped)

    assert row["responses"] == [{"text": "a"}, {"text": "b"}]
    assert dropped.counts == {"no_prompt": 1}
    with pytest.raises(InputError, match="c.jsonl:1: field 'prompt' is missing"):
        list(read_candidates(path))


def test_a_thought_in_a_response_from_elsewhere_is_kept_apart(tmp_path):
    responses = [
        {"text": "<think>\nhm\n</think>\n\nyes", "ids": [1, 2]},
        "hm</think>no",
        "<think>endless",
        {"text": "plain <b>", "thought": "told apart already"},
        "plain",
    ]
    path = write_lines(tmp_path / "c.jsonl", {"prompt": "x", "responses": responses})

    ((_, row),) = read_candidates(path)

    assert row["responses"] == [
        {"text": "yes", "ids": [1, 2], "thought": "hm"},
        {"text": "no", "thought": "hm"},
        {"text": "", "thought": "endless"},
        {"text": "plain <b>", "thought": "told apart already"},
        {"text": "plain"},
    ]
