"""lm-evaluation-harness's results as a bench of the report, and the package itself where it is.

lm_eval_results.json was written by lm_eval 0.4.13 for the tasks below, with 16 questions and a
model whose answers were written by hand; the tasks' configurations and the machine are taken out.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import NO_GPU, ROOT
from test_report import build_run, evaluation, guard_lines, make_report, write, write_json

from nanoaipo.errors import InputError
from nanoaipo.report.lm_eval import read_results

RESULTS = ROOT / "tests" / "lm_eval_results.json"


@pytest.fixture
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


# ---- the reader ----


def test_a_task_has_its_metrics_with_intervals_and_names_what_they_depend_on(results):
    row = results["results"]["tiny_stated"]

    scores = read_results(results, "results.json")

    assert set(scores["categories"]) == {"tiny_stated", "tiny_choice"}
    stated = scores["categories"]["tiny_stated"]
    name = "exact_match,behind-is"
    value = 100 * row[name]
    half = 196 * row["exact_match_stderr,behind-is"]
    assert stated[name] == pytest.approx(value)
    assert 0 < value < 100
    assert stated[name + "_ci"] == pytest.approx([value - half, value + half])
    assert (stated["n"], stated["guard"]) == (16, name)
    assert stated["judge"] == "version 1.0, 0-shot, chat template"
    assert scores["categories"]["tiny_choice"]["judge"] == "version 2.0, 0-shot, chat template"


def test_a_group_with_numbers_stands_for_its_tasks_and_texts_are_no_numbers(results):
    tasks = list(results["results"])
    results["group_subtasks"] = {"tiny_world": tasks}
    assert set(read_results(results, "r.json")["categories"]) == set(tasks)  # a mere list of tasks

    group = {"alias": "tiny_world", "acc,none": 0.5, "acc_stderr,none": "N/A"}
    results["results"]["tiny_world"] = group | {"perplexity,none": 12.5}

    categories = read_results(results, "r.json")["categories"]

    assert set(categories) == {"tiny_world"}
    assert categories["tiny_world"]["acc,none"] == 50
    assert categories["tiny_world"]["perplexity,none"] == 12.5
    assert "acc,none_ci" not in categories["tiny_world"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"results": {"arc": {"acc": 0.5, "acc_stderr": 0.1}}}, "no 'metric,filter' with a number"),
        ({"results": {}}, "no 'metric,filter' with a number"),
        ({"results": {"arc": 0.5}}, "not results of lm-evaluation-harness 0.4"),
        ({"date": "today"}, "not results of lm-evaluation-harness 0.4"),
    ],
)
def test_what_an_older_version_wrote_or_nobody_is_refused_in_one_line(results, change, message):
    with pytest.raises(InputError, match=message) as refusal:
        read_results(results | change, "r.json")

    assert str(refusal.value).startswith("r.json: ")
    assert "\n" not in str(refusal.value)


# ---- in the table and the report ----


def test_tasks_are_columns_of_the_table_wherever_the_package_has_written(results, tmp_path):
    run = build_run(tmp_path / "run", T=2)
    write_json(run / "iter_1" / "lm_eval" / "out__model" / "results_2026-11-27T1.json", results)
    results["n-shot"]["tiny_stated"] = 5
    write_json(run / "iter_2" / "lm_eval_2026-11-27T2.json", results)

    printed, page = make_report(run)

    groups = [group.strip() for group in page.tables[0][0]]
    head, _, first, second = page.tables[0][1:]
    assert "lm_eval tiny_choice [2] version 2.0, 0-shot, chat template" in groups
    assert "lm_eval tiny_stated [3] version 1.0, 0-shot, chat template" in groups
    assert "lm_eval tiny_stated [4] version 1.0, 5-shot, chat template" in groups
    places = [k for k, heading in enumerate(head) if heading == "exact_match behind-is"]
    row = results["results"]["tiny_stated"]
    value = f"{100 * row['exact_match,behind-is']:.1f}%"
    assert [first[place].startswith(value) for place in places] == [True, False]
    assert [second[place].startswith(value) for place in places] == [False, True]
    assert {"acc", "acc_norm"} <= set(head)
    assert "lm_eval tiny_choice, judge: version 2.0, 0-shot, chat template; date 2026-" in printed


def test_a_task_in_two_files_of_an_iteration_is_refused(results, tmp_path):
    run = build_run(tmp_path / "run", T=1)
    for name in ("results_1.json", "results_2.json"):
        write_json(run / "iter_1" / "lm_eval" / name, results)

    with pytest.raises(SystemExit, match=r"results_2.json: lm_eval tiny_\w+ by .* keep one"):
        make_report(run)


def test_a_task_that_falls_while_the_win_rate_rises_is_a_guard(results, tmp_path):
    run = build_run(tmp_path / "run", T=1, accuracy=None, accuracy_ci=None)
    for t, share in enumerate((0.9, 0.5)):
        wins = 50 + 20 * t
        scores = {"win_rate": wins, "win_rate_ci": [wins - 2, wins + 2], "accuracy": None}
        write_json(run / f"iter_{t}" / "eval.json", evaluation(t, **scores))
        row = results["results"]["tiny_stated"]
        row |= {"exact_match,behind-is": share, "exact_match_stderr,behind-is": 0.05}
        write_json(run / f"iter_{t}" / "results_1.json", results)

    printed, _ = make_report(run)

    (line,) = guard_lines(printed)
    assert line.endswith(
        "but exact_match behind-is of lm_eval tiny_stated fell from 90.0% to 50.0%"
    )
    assert "no guard" not in printed


# ---- the package itself ----

COMMON = """\
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{question}}"
"""
TASKS = {
    "tiny_stated": """\
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["</s>"], do_sample: false, max_gen_toks: 24}
filter_list:
  - name: behind-is
    filter: [{function: regex, regex_pattern: "is (\\\\w+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
""",
    "tiny_choice": """\
output_type: multiple_choice
doc_to_target: 0
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
""",
}


def write_tasks(folder, n):
    """Tasks of our own in the package's format, on n opposites of the embedded world."""
    rows = []
    for line in open(ROOT / "tiny" / "world" / "heldout.jsonl", encoding="utf-8"):
        prompt = json.loads(line)
        if prompt["family"] == "opposite":
            right = prompt["answer"]["accept"][0]
            wrong = "cold" if right == "hot" else "hot"
            choices = [right, wrong]
            rows.append({"question": prompt["prompt"], "answer": right, "choices": choices})
    data = folder / "opposites.jsonl"
    write(data, rows[:n])
    for name, text in TASKS.items():
        task = f"task: {name}\n{COMMON.replace('DATA', str(data))}{text}"
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")


def run_harness(folder, output, n):
    """The command of docs/evaluation.md, on the tasks above and a processor."""
    write_tasks(folder, n)
    model = ROOT / "tiny" / "world" / "base"
    command = f"-m lm_eval run --model hf --model_args pretrained={model},dtype=float32"
    command += f" --tasks {','.join(TASKS)} --include_path {folder} --apply_chat_template"
    command += f" --batch_size 8 --device cpu --output_path {output}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=os.environ | NO_GPU | offline,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_package_evaluates_a_saved_policy_and_the_report_reads_it(tmp_path):
    reason = "lm_eval is not installed, so its results come from a file: pip install 'lm_eval[hf]'"
    pytest.importorskip("lm_eval", reason=reason)
    run = build_run(tmp_path / "run", T=1)

    run_harness(tmp_path, run / "iter_1" / "lm_eval", n=16)

    printed, page = make_report(run)
    assert "lm_eval tiny_stated, judge: version 1.0, 0-shot, chat template" in printed
    assert "; n 16; " in printed
    head = page.tables[0][1]
    assert {"exact_match behind-is", "acc", "acc_norm"} <= set(head)
