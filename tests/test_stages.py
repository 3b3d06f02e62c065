"""Manifests: what is complete is left alone, what another run made is refused."""

import os

import pytest
from test_files import write_lines

from nanoaipo import stages
from nanoaipo.errors import InputError


def test_nothing_half_written_stands_under_the_final_name(tmp_path):
    out = tmp_path / "x.jsonl"

    with pytest.raises(RuntimeError):
        with stages.open_output(str(out), {}) as write:
            write({"a": 1})
            raise RuntimeError("the plug")
    assert not out.exists()

    with stages.open_output(str(out), {"settings": {}}) as write:
        write({"a": "ü"})
    assert out.read_text(encoding="utf-8") == '{"a": "ü"}\n'
    assert (tmp_path / "x.manifest.json").exists()


def test_a_finished_stage_is_skipped_and_one_made_otherwise_is_refused(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", {"a": 1})
    settings = {"source": source, "out": "", "beta": 0.1, "compile": False}
    out = str(tmp_path / "x.jsonl")
    manifest = stages.open_stage(out, ".jsonl", settings, "source")
    with stages.open_output(out, manifest) as write:
        write({})
    capsys.readouterr()

    # the same settings and inputs: nothing to do; a setting that is FREE does not count
    assert stages.open_stage(out, ".jsonl", settings, "source") is None
    assert capsys.readouterr().out == f"{out}: complete, nothing to do\n"
    assert stages.open_stage(out, ".jsonl", settings | {"compile": True}, "source") is None

    # another setting
    with pytest.raises(InputError, match=r"made with another 'beta' \(0.1, now 0.2\)"):
        stages.open_stage(out, ".jsonl", settings | {"beta": 0.2}, "source")

    # other content of an input
    write_lines(tmp_path / "in.jsonl", {"a": 2})
    with pytest.raises(InputError, match="made with another 'source'"):
        stages.open_stage(out, ".jsonl", settings, "source")

    # a file that no stage wrote
    os.remove(tmp_path / "x.manifest.json")
    with pytest.raises(InputError, match="has no manifest"):
        stages.open_stage(out, ".jsonl", settings, "source")


@pytest.mark.parametrize("other", ["{}", '[{"name": "app"}]', '{"files": ["a.bin"]}'])
def test_a_manifest_that_no_stage_wrote_is_no_manifest(other, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "manifest.json").write_text(other)
    (model / "config.json").write_text("{}")

    # as an input it says nothing
    stages.check_undamaged(str(model))

    # as an output it is another's
    with pytest.raises(InputError, match="manifest.json: missing, or not written by a stage"):
        stages.open_stage(str(model), "", {"out": ""})


@pytest.mark.parametrize("folder", ["run", "run[1]"])
def test_the_content_of_an_input_counts_wherever_it_lies(tmp_path, folder):
    folder = tmp_path / folder
    folder.mkdir()
    shards = [folder / f"p-0000{k}-of-00002.jsonl" for k in (0, 1)]
    model = folder / "model[a]"
    (model / "additional_chat_templates").mkdir(parents=True)
    template = model / "additional_chat_templates" / "tool_use.jinja"
    for path in (*shards, template, model / "config.json"):
        path.write_text("{}")
    inputs = {
        shards[1]: [str(folder / "p.jsonl"), str(folder / "p-*.jsonl")],
        template: [str(model)],
        model / "config.json": [str(model)],
    }

    for changed, paths in inputs.items():
        before = [stages.fingerprint(path) for path in paths]
        assert not set(before) & set(paths)
        changed.write_text('{"a": 1}')
        for path, old in zip(paths, before):
            assert stages.fingerprint(path) != old

    assert stages.fingerprint("org/model") == "org/model"


@pytest.mark.parametrize("off", ["", 0, False])
def test_a_setting_that_came_later_and_is_off_is_no_difference(tmp_path, off):
    out = str(tmp_path / "x.jsonl")
    manifest = {"settings": {"beta": 0.1}, "inputs": {}}
    with stages.open_output(out, manifest) as write:
        write({})

    # off: what was made before it came is as it would be now
    stages.check_same_run(out, {"settings": {"beta": 0.1, "later": off}, "inputs": {}})

    # on; and off where the manifest does know it
    with pytest.raises(InputError, match=r"made with another 'later' \(None, now on\)"):
        stages.check_same_run(out, {"settings": {"beta": 0.1, "later": "on"}, "inputs": {}})
    with pytest.raises(InputError, match="made with another 'beta'"):
        stages.check_same_run(out, {"settings": {"beta": off}, "inputs": {}})


@pytest.mark.parametrize(
    "out, suffix, message",
    [
        ("", ".jsonl", "--out is not set"),
        ("x", ".jsonl", "has to be a .jsonl file"),
        ("x.jsonl", "", "has to be a folder"),
        ("{folder}", ".jsonl", "is a folder; remove it or choose another --out"),
    ],
)
def test_an_output_of_another_kind_is_refused(out, suffix, message, tmp_path):
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    out = out.format(folder=folder)
    source = write_lines(tmp_path / "in.jsonl", {"a": 1})

    with pytest.raises(InputError, match=message):
        stages.open_stage(out, suffix, {"source": source, "out": out}, "source")


@pytest.mark.parametrize(
    "key, path, message",
    [
        ("pairs", "", "--pairs is not set: give a path$"),
        ("model", "", "--model is not set: give a path or a hub name$"),
        ("pairs", "nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_an_input_that_is_not_there_is_refused(key, path, message):
    with pytest.raises(InputError, match=message):
        stages.open_stage("x.jsonl", ".jsonl", {key: path}, key)


def test_a_killed_stage_goes_on_behind_its_last_whole_block(tmp_path, capsys):
    out = str(tmp_path / "x.jsonl")
    manifest = {"settings": {"beta": 0.1}, "inputs": {}}
    asked = []

    def squares(block):
        asked.extend(block)
        if 5 in block and len(asked) < 7:
            raise RuntimeError("the plug")
        return [{"n": n, "square": n * n} for n in block]

    def count(records):
        return {"rows": len(list(records))}

    # the third of four blocks of two fails, and a piece of it is already on disk
    with pytest.raises(RuntimeError):
        stages.write_blocks(out, manifest, list(range(7)), 2, squares, count)
    with open(out + ".tmp", "ab") as f:
        f.write(b'{"n": 4, "square": 16}\n{"n": 5')
    assert not os.path.exists(out)

    stages.write_blocks(out, manifest, list(range(7)), 2, squares, count)

    assert asked == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert "goes on behind 4 of 7 prompts" in capsys.readouterr().out
    with open(out, encoding="utf-8") as f:
        assert [line for line in f] == [f'{{"n": {n}, "square": {n * n}}}\n' for n in range(7)]
    assert manifest["counts"] == {"rows": 7}
    assert not os.path.exists(out + ".tmp")


@pytest.mark.parametrize("damage", [b"\x00" * 10, b'{"n": 1 "squ', b"\xff\xfe"])
def test_a_half_written_file_that_was_damaged_is_made_again_from_there(damage, tmp_path):
    out = str(tmp_path / "x.jsonl")
    manifest = {"settings": {}, "inputs": {}}
    asked = []

    def copies(block):
        asked.extend(block)
        if 6 in block and len(asked) < 8:
            raise RuntimeError("the plug")
        return [{"n": n} for n in block]

    def count(records):
        return {"rows": len(list(records))}

    # a byte flipped or a block lost after it was written: the fourth of six records
    with pytest.raises(RuntimeError):
        stages.write_blocks(out, manifest, list(range(7)), 2, copies, count)
    with open(out + ".tmp", "rb+") as f:
        lines = f.read().splitlines(keepends=True)
        f.seek(sum(map(len, lines[:3])))
        f.write(damage[: len(lines[3]) - 1])

    stages.write_blocks(out, manifest, list(range(7)), 2, copies, count)

    assert asked == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6]
    with open(out, encoding="utf-8") as f:
        assert f.read() == "".join(f'{{"n": {n}}}\n' for n in range(7))


def test_checkpoints_without_their_manifest_are_named(tmp_path):
    (tmp_path / "policy.tmp" / "step_1").mkdir(parents=True)

    with pytest.raises(InputError, match="policy.tmp/manifest.json: missing, or not written by"):
        stages.open_stage(str(tmp_path / "policy"), "", {"out": ""})


def test_what_another_run_left_half_written_is_refused(tmp_path):
    out = str(tmp_path / "x.jsonl")
    manifest = {"settings": {"beta": 0.1}, "inputs": {}}

    def fail(block):
        raise RuntimeError("the plug")

    with pytest.raises(RuntimeError):
        stages.write_blocks(out, manifest, [1, 2], 1, fail, len)
    manifest["settings"]["beta"] = 0.2
    with pytest.raises(InputError, match=r"made with another 'beta' \(0.1, now 0.2\)"):
        stages.write_blocks(out, manifest, [1, 2], 1, fail, len)
