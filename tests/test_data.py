import json
import os

import pytest

from nanoaipo import chat
from nanoaipo import files
from nanoaipo import grading
from nanoaipo import prompts
from nanoaipo import seeds
from nanoaipo import stages


def lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_a_broken_line_is_named_by_file_and_line(tmp_path):
    for bad, message in (('{"id": 1', "not JSON"), ("[1]", "a record is a JSON object, not list"), ('{"x": 1}', "field 'id' is missing")):
        path = lines(tmp_path / "a.jsonl", {"id": "1"}, "", bad)
        with pytest.raises(SystemExit, match=r"a\.jsonl:3: " + message.replace("[", r"\[")):
            list(files.read_records(path, "id"))
    with pytest.raises(SystemExit, match="no such file"):
        list(files.read_records(str(tmp_path / "none.jsonl")))
    for name, content, message in (("b.jsonl", b'{"id": 1}\n{"id": "\xff"}\n', r"b\.jsonl:2: not JSON"), ("c.json", b'{"id": 1}', "an array of records, not dict"),
                                   ("d.json", b'["id"]', r"d\.json:1: a record is a JSON object, not str")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            list(files.read_records(str(tmp_path / name), "id"))


def test_shards_folders_globs_and_arrays_are_read_as_one_file(tmp_path):
    for k in range(3):
        lines(tmp_path / f"a-0000{k}-of-00003.jsonl", {"k": k})
    for path in ("a.jsonl", "", "a-*.jsonl"):
        assert [r["k"] for _, r in files.read_records(str(tmp_path / path))] == [0, 1, 2]
    (tmp_path / "b.json").write_text('[{"k": 7}]')
    assert [r for _, r in files.read_records(str(tmp_path / "b.json"))] == [{"k": 7}]
    os.remove(tmp_path / "a-00001-of-00003.jsonl")
    with pytest.raises(SystemExit, match="2 of 3 shards are there"):
        list(files.read_records(str(tmp_path / "a.jsonl")))


def test_nothing_half_written_stands_under_the_final_name(tmp_path):
    out = str(tmp_path / "x.jsonl")
    with pytest.raises(RuntimeError), stages.open_output(out, {}) as write:
        write({"a": 1})
        raise RuntimeError("the plug")
    assert not os.path.exists(out)
    with stages.open_output(out, {"settings": {}}) as write:
        write({"a": "ü"})
    assert open(out, encoding="utf-8").read() == '{"a": "ü"}\n' and os.path.exists(tmp_path / "x.manifest.json")


def test_a_finished_stage_is_skipped_and_one_made_otherwise_is_refused(tmp_path):
    source = lines(tmp_path / "in.jsonl", {"a": 1})
    config, out = {"source": source, "out": "", "beta": 0.1}, str(tmp_path / "x.jsonl")
    manifest = stages.open_stage(out, ".jsonl", config, "source")
    with stages.open_output(out, manifest) as write:
        write({})
    assert stages.open_stage(out, ".jsonl", config, "source") is None
    with pytest.raises(SystemExit, match=r"made with another 'beta' \(0.1, now 0.2\)"):
        stages.open_stage(out, ".jsonl", config | {"beta": 0.2}, "source")
    lines(tmp_path / "in.jsonl", {"a": 2})
    with pytest.raises(SystemExit, match="made with another 'source'"):
        stages.open_stage(out, ".jsonl", config, "source")
    os.remove(tmp_path / "x.manifest.json")
    with pytest.raises(SystemExit, match="has no manifest"):
        stages.open_stage(out, ".jsonl", config, "source")
    for wrong, message in ((("", ".jsonl"), "--out is not set"), (("x", ".jsonl"), "has to be a .jsonl file"), (("x.jsonl", ""), "has to be a folder")):
        with pytest.raises(SystemExit, match=message):
            stages.open_stage(*wrong, config, "source")


def test_prompts_come_from_texts_messages_and_instruction_columns_and_get_stable_ids(tmp_path):
    path = lines(tmp_path / "p.jsonl", {"id": "a", "prompt": "one", "extra": 3}, {"prompt": [{"role": "user", "content": "two"}]},
                 {"instruction": "three"}, {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "-"}]}, {"prompt": "two"})
    rows = prompts.read_prompts(path)
    assert [r["prompt"][-1]["content"] for r in rows] == ["one", "two", "three", "four", "two"]
    assert rows[0]["id"] == "a" and rows[0]["extra"] == 3 and len({r["id"] for r in rows}) == 5
    assert [r["id"] for r in rows] == [r["id"] for r in prompts.read_prompts(path)]
    assert [r["id"] for r in prompts.read_prompts(lines(tmp_path / "n.jsonl", {"id": 0, "prompt": "x"}, {"id": 1, "prompt": "x"}))] == ["0", "1"]
    assert prompts.read_prompts(lines(tmp_path / "q.jsonl", {"q": "five"}), "q")[0]["prompt"] == [{"role": "user", "content": "five"}]
    rows = prompts.read_prompts(lines(tmp_path / "t.jsonl", {"prompt": "x", "turns": 3}, {"turns": "y", "uid": "u"}, {"turns": [{"content": "z"}, "w"], "prompt": None}))
    assert [r["prompt"][0]["content"] for r in rows] == ["x", "y", "z"] and [r.get("turns") for r in rows] == [None, ["y"], ["z", "w"]] and rows[1]["id"] == "u"
    for rows, message in (([{"text": "x"}], ":1: 'prompt' has to be"), ([{"turns": 3}], ":1: 'turns' has to be"), ([{"turns": ["x", 3]}], ":1: 'turns' has to be"), ([{"prompt": "x", "id": 1}, {"prompt": "y", "id": 1}], ":2: id '1' is already"), ([], "no prompts in it")):
        with pytest.raises(SystemExit, match=message):
            prompts.read_prompts(lines(tmp_path / "bad.jsonl", *rows))


def test_a_hub_dataset_is_named_with_its_split(tmp_path):
    lines(tmp_path / "part.jsonl", {"prompt": "from datasets"})
    assert prompts.read_prompts(f"{tmp_path}:train")[0]["prompt"][0]["content"] == "from datasets"
    lines(tmp_path / "part.jsonl", {"prompt": "a", "messages": None}, {"prompt": None, "messages": [{"role": "user", "content": "b"}]})
    assert [r["prompt"][0]["content"] for r in prompts.read_prompts(f"{tmp_path}:train")] == ["a", "b"]        # columns that a row lacks are null
    assert len(prompts.read_prompts(f"{tmp_path}:train[:1]")) == len(prompts.read_prompts(f"{tmp_path}:default:train[1:]")) == 1


@pytest.mark.parametrize("text, answer, right", [
    ("It is 12.", 12, True), ("7 plus 5 is 12", "12", True), ("12, no, 13", "12", False), ("1,200 apples", "1200", True), ("-3", -3, True), ("none", 3, False),
    ("The answer is Paris.", "paris", True), ("Parisian", "Paris", False), ("(B)", "B", True),
    ("I would say B, but I am not sure.", "B", True), ("A good question: it is C", "C", True), ("The answer is 42. I hope this answer is clear.", 42, True),
    ("It is .5", 0.5, True), ("10-2 is 8", 8, True), ("so 10-2", -2, False), ("The answer is Paris. Is the answer: Rome?", "Paris", True),
    ("cold. Again, it is cold.", {"accept": ["cold"], "among": r"\b(?:cold|hot|wet)\b"}, True),
    ("cold. Again, it is wet.", {"accept": ["cold"], "among": r"\b(?:cold|hot|wet)\b"}, False),
    ("Sure!", {"accept": ["cold"], "among": r"\b(?:cold|hot|wet)\b"}, False),
    ("car and car", {"accept": ["car", "bus"], "among": r"\b(?:car|bus|tea)\b", "count": 2}, False),
    ("Car and bus", {"accept": ["car", "bus"], "among": r"\b(?:car|bus|tea)\b", "count": 2}, True)])
def test_the_rule_for_right_answers(text, answer, right):
    assert grading.is_right(text, answer) is right


def test_text_that_spells_a_control_token_stays_text(tiny_model):
    tokenizer, ends = chat.load_tokenizer(tiny_model)
    end = tokenizer.eos_token
    control = chat.control_pattern(tokenizer)
    ids = chat.encode(tokenizer, f"a {end}b", control)
    assert not ends & set(ids) and tokenizer.decode(ids).replace(" ", "") == f"a{end}b"
    assert chat.encode(tokenizer, "plain text", control) == tokenizer("plain text", add_special_tokens=False).input_ids
    assert control.search(f"x{end}") and not control.search("x")


def test_seeds_depend_on_run_iteration_and_prompt_and_are_far_apart():
    seeds = {seeds.derive_seed(run, t, f"p{k}") for run in range(3) for t in range(3) for k in range(100)}
    assert len(seeds) == 900 and seeds.derive_seed(0, 1, "a") == seeds.derive_seed(0, 1, "a")
    ordered = sorted(seeds)
    assert min(b - a for a, b in zip(ordered, ordered[1:])) > 5 and max(seeds) < 2**31
