"""Checkpoints: which folders are some, and that damage is found. Going on from them: test_train."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist

from nanoaipo.checkpoints import find_checkpoints, load_newest_checkpoint, save_checkpoint
from nanoaipo.processes import start_processes


def test_checkpoints_are_found_in_a_folder_with_brackets_in_its_name(tmp_path):
    output_dir = tmp_path / "run[1]"
    for name in "step_000010", "step_000002", "step_000012.tmp":
        (output_dir / name).mkdir(parents=True)

    found = find_checkpoints(str(output_dir))

    assert found == [str(output_dir / "step_000002"), str(output_dir / "step_000010")]


# ---------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def one_process():
    """The process group of this process alone."""
    start_processes(torch.device("cpu"))
    yield
    dist.destroy_process_group()


def train_and_save(output_dir, steps):
    """Train a layer for so many steps with a checkpoint after each; return its weights by step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 30)
    trained = dict(layer.named_parameters())
    optimizer = torch.optim.AdamW(trained.values())
    weights = {}
    for step in range(1, steps + 1):
        layer(torch.ones(2, 40)).sum().backward()
        optimizer.step()
        save_checkpoint(output_dir, step, trained, optimizer, keep=steps)
        weights[step] = layer.weight.detach().clone()
    return weights


def load(output_dir):
    """(steps, weights) of the newest whole checkpoint, filled into a new layer."""
    layer = torch.nn.Linear(40, 30)
    trained = dict(layer.named_parameters())
    steps = load_newest_checkpoint(output_dir, trained, torch.optim.AdamW(trained.values()))
    return steps, layer.weight.detach()


@pytest.fixture(scope="module")
def three(one_process, tmp_path_factory):
    """(folder with three checkpoints, the weights of each)."""
    folder = tmp_path_factory.mktemp("three")
    return folder, train_and_save(str(folder), 3)


@pytest.fixture
def copied(three, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(three[0], tmp_path / "out.tmp")


def flip_bit(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_checkpoint_is_loaded_where_all_are_whole(three, copied):
    _, weights = three

    steps, loaded = load(str(copied))

    assert steps == 3
    assert torch.equal(loaded, weights[3])


DAMAGES = {  # name: (what is done to a file, what is said of it)
    "flipped": (flip_bit, "is damaged, not the bytes that were written"),
    "emptied": (lambda path: path.write_bytes(b""), "is not whole"),
    "deleted": (os.remove, "is not whole"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_loaded(
    name, damage, message, three, copied, capsys
):
    _, weights = three
    damage(copied / "step_000003" / name)

    steps, loaded = load(str(copied))

    assert steps == 2
    assert torch.equal(loaded, weights[2])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{copied}/step_000003: passed over, {name} {message}"
    assert second == f"going on from {copied}/step_000002"
    assert not (copied / "step_000003").exists()


@pytest.mark.parametrize(
    "text", ["", '{"__0_0.distcp": {"bytes"', "\xff", "[7]", '{".metadata": 7}']
)
def test_a_damaged_manifest_is_no_whole_checkpoint(text, copied, capsys):
    (copied / "step_000003" / "manifest.json").write_text(text, encoding="latin-1")

    steps, _ = load(str(copied))

    assert steps == 2
    assert "step_000003: passed over, manifest.json is not whole\n" in capsys.readouterr().out


def test_what_a_kill_left_under_the_temporary_name_is_no_part_of_the_checkpoint(
    one_process, tmp_path
):
    train_and_save(str(tmp_path), 1)
    left = (tmp_path / "step_000001").rename(tmp_path / "step_000001.tmp")
    (left / "manifest.json.tmp").write_text("{")
    (left / "__7_0.distcp").write_text("of more processes")

    weights = train_and_save(str(tmp_path), 1)

    steps, loaded = load(str(tmp_path))
    assert steps == 1
    assert torch.equal(loaded, weights[1])


def test_without_a_whole_checkpoint_training_begins_at_its_first_step(copied, capsys):
    for folder in find_checkpoints(str(copied)):
        flip_bit(copied / folder / "__0_0.distcp")

    steps, _ = load(str(copied))

    assert steps == 0
    assert capsys.readouterr().out.count("passed over") == 3


def test_the_manifest_describes_every_other_file(three):
    folder = three[0] / "step_000003"

    described = json.loads((folder / "manifest.json").read_text())

    assert {*described, "manifest.json"} == {file.name for file in folder.iterdir()}
    for name, description in described.items():
        assert description["bytes"] == (folder / name).stat().st_size
