"""Which folders are checkpoints. That a run goes on from them: test_train.py."""

from nanoaipo.checkpoints import find_checkpoints


def test_checkpoints_are_found_in_a_folder_with_brackets_in_its_name(tmp_path):
    output_dir = tmp_path / "run[1]"
    for name in "step_000010", "step_000002", "step_000012.tmp":
        (output_dir / name).mkdir(parents=True)

    found = find_checkpoints(str(output_dir))

    assert found == [str(output_dir / "step_000002"), str(output_dir / "step_000010")]
