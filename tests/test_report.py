"""Table, figures and report.html of synthetic runs.

They are read back as a browser would read them, and opened in a browser where there is one.
"""

import contextlib
import html
import html.parser
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import run

from nanoaipo.report.figures import INK, draw_rewards
from nanoaipo.report.runs import CONTROL
from nanoaipo.report.similarity import EMBEDDER

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)
EVIL = (
    "<script>document.title='pwned'</script> \"quoted\" 'single' &amp; </p></main> "
    "\x00\x1b[31m\x07 \u202eback"
)
VISIBLE = EVIL.translate(CONTROL)


# ---- synthetic runs ----


def write(path, records):
    """Write records as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def read(path):
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")


def evaluation(t, longer=1.0, **other):
    """eval.json as eval.py writes it; longer: factor of answers' length; other: fields to set."""
    # value, and half the width of its interval
    metrics = {
        "win_rate": (50 + 3.3 * t, 2),
        "lc_win_rate": (50 + 2.1 * t, 3),
        "accuracy": (80.7 + t, 2),
        "length": ((7 + t) * longer, 0.5),
        "finished": (97.0, 1),
        "distinct_2": (0.41, 0.02),
        "self_similarity": (0.23, 0.02),
    }
    record = {
        "bench": "win_rate",
        "judge": "pairrm judge-A",
        "date": "2026-11-21",
        "n": 512,
        "invalid": 0,
        "ties": 199,
        "length_unit": "tokens",
        "baseline_length": 7.0,
    }
    for name, (value, margin) in metrics.items():
        record[name] = value
        record[name + "_ci"] = [value - margin, value + margin]
    return record | other


def build_run(
    folder, T=2, n=40, seed=0, recipe="", reply="an answer", prompt="a question", **scores
):
    """A run of T iterations with n prompts each: what the stages leave behind, without weights."""
    rng = np.random.default_rng(seed)
    messages = [{"role": "user", "content": prompt}]
    folder.mkdir(parents=True)
    (folder / "recipe.py").write_text(
        f"loss = 'aipo'\nn_prompts = {n}\niterations = {T}\n{recipe}", encoding="utf-8"
    )
    for t in range(T + 1):
        iteration_dir = folder / f"iter_{t}"
        write_evaluation(iteration_dir, t, messages, reply, scores)
        if t > 0:
            write_pairs_of_iteration(iteration_dir, t, n, messages, rng)
            write_training(iteration_dir, n)
    return folder


def write_evaluation(iteration_dir, t, messages, reply, scores):
    """Eight answers of three tokens, the first of them cut off, and eval.json."""
    answers = []
    for k in range(8):
        response = {"text": f"{reply} {t}/{k}", "ids": [1, 2, 3], "finished": k > 0}
        answers.append({"id": f"q{k}", "prompt": messages, "responses": [response]})
    write(iteration_dir / "answers.jsonl", answers)
    write_json(iteration_dir / "eval.json", evaluation(t, **scores))


def write_pairs_of_iteration(iteration_dir, t, n, messages, rng):
    """Four candidates for each of n prompts, and a pair of the first two, with manifests."""
    candidates = []
    pairs = []
    for k in range(n):
        responses = []
        for length in rng.permutation(np.arange(1, 31))[:4].tolist():
            ids = rng.integers(0, 99, length).tolist()
            logp = rng.normal() - 0.7 * length
            responses.append({"text": f"w{'x ' * length}", "ids": ids, "logp": logp})
        prompt = {"id": f"p{t}-{k}", "prompt": messages}
        candidates.append(prompt | {"prompt_ids": [5], "responses": responses})

        chosen, rejected = responses[:2]
        pair = {
            "chosen_ids": chosen["ids"],
            "rejected_ids": rejected["ids"],
            "chosen": [{"role": "assistant", "content": chosen["text"]}],
            "rejected": [{"role": "assistant", "content": rejected["text"]}],
        }
        pairs.append(prompt | pair)
    write(iteration_dir / "candidates.jsonl", candidates)
    write(iteration_dir / "pairs.jsonl", pairs)

    counts = {"prompts": n, "too_long": 3, "responses": 4 * n}
    write_json(iteration_dir / "candidates.manifest.json", {"counts": counts})
    counts = {"prompts": n, "pairs": n, "identical": 1234, "tied": 0}
    summary = {"longer_won": 0.8125, "longer_won_n": n}
    write_json(iteration_dir / "pairs.manifest.json", {"counts": counts, "summary": summary})


def write_training(iteration_dir, n):
    """The log of five steps of training, and the manifest of the model."""
    same = {
        "pairs": 8,
        "tokens": 900,
        "accuracy": 0.5,
        "s_ref": -1.25,
        "logp_chosen": -8.5,
        "len_chosen": 13.5,
        "len_rejected": 6.5,
    }
    steps = []
    for k in range(5):
        steps.append(same | {"step": k, "reward_chosen": k * 0.1, "reward_rejected": -k * 0.1})
    write(iteration_dir / "model" / "metrics.jsonl", steps)
    write_json(iteration_dir / "model" / "manifest.json", {"counts": {"pairs": n, "too_long": 0}})


# ---- the report, read back ----


class Page(html.parser.HTMLParser):
    """A parsed page: its elements, all text, tables as lists of rows."""

    def __init__(self, path):
        super().__init__()
        self.raw = Path(path).read_text(encoding="utf-8")
        self.elements = []
        self.text = ""
        self.tables = []
        self.in_cell = False
        self.feed(self.raw)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def tags(self, name):
        """The attributes of all elements of one name."""
        return [attributes for tag, attributes in self.elements if tag == name]

    def sections(self):
        """The ids of the page's sections."""
        return [attributes.get("id") for attributes in self.tags("section")]

    def has_banner(self):
        return any(attributes.get("class") == "banner" for _, attributes in self.elements)


def make_report(*runs, where=None):
    """Run the report in this process, which has imported everything already.

    (What it printed, the parsed page.) where: the folder in which report.html has to be; by default
    that of a single run, or the parent of several.
    """
    if where is None:
        where = runs[0] if len(runs) == 1 else runs[0].parent
    with contextlib.ExitStack() as stack:
        printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Glyph")  # iterations.png draws what its font has
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", ["nanoaipo/report", *map(str, runs)])
        runpy.run_module("nanoaipo.report", run_name="__main__")

    last_line = printed.getvalue().strip().splitlines()[-1]
    assert last_line == f"report: {where}/report.html"
    return printed.getvalue(), Page(f"{where}/report.html")


def printed_row(printed, name, t):
    """The words of a line of the printed table, behind the run and t."""
    for line in printed.splitlines():
        words = line.split()
        if words[:2] == [name, str(t)]:
            return words[2:]
    raise AssertionError(f"no line of {name}, t = {t}")


def printed_correlation(name, page):
    """The first r that the page gives for a run."""
    return float(re.search(re.escape(name) + r": r = (-?\d\.\d\d)", page.text)[1])


def correlation(points):
    """Pearson's r as the page writes it."""
    return f"{np.corrcoef(np.array(points).T)[0, 1]:.2f}"


def logps_of(iteration_dir):
    """{ids: log-prob} of an iteration's candidates."""
    logps = {}
    for row in read(iteration_dir / "candidates.jsonl"):
        for response in row["responses"]:
            logps[tuple(response["ids"])] = response["logp"]
    return logps


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs, one with far longer answers: (their folder, what was printed, the page)."""
    folder = tmp_path_factory.mktemp("two")
    aipo = build_run(folder / "aipo")
    dpo = build_run(folder / "dpo", seed=1, recipe="loss = 'dpo'\n", longer=2.0)
    printed, page = make_report(aipo, dpo)
    return folder, printed, page


# ---- numbers ----


@pytest.mark.parametrize("t", range(3))
def test_numbers_of_the_tables_are_those_of_the_files(two, t):
    _, printed, page = two
    win_rate = 50 + 3.3 * t
    length = 7 + t

    row = printed_row(printed, "aipo", t)
    cells = page.tables[0][2 + t]

    assert row[:4] == [
        f"{win_rate:.1f}%",
        f"{50 + 2.1 * t:.1f}%",
        f"{80.7 + t:.1f}%",
        f"{length:.1f}",
    ]
    assert row[4:7] == ["97%", "0.41", "0.23"]
    if t == 0:
        assert row[7:] == ["-"] * 4
    else:
        assert row[7:] == ["-1.25", "-8.50", "13.5", "6.5"]
    assert cells[1] == str(t)
    assert cells[2] == f"{win_rate:.1f}%{win_rate - 2:.1f} – {win_rate + 2:.1f}%"
    assert cells[5] == f"{length:.1f}{length - 0.5:.1f} – {length + 0.5:.1f}"


@pytest.mark.parametrize("n_steps, marked", [(1, True), (2, False)])
def test_the_rewards_of_a_single_step_are_points(n_steps, marked):
    import matplotlib.pyplot as plt

    step = {"reward_chosen": 0.5, "reward_rejected": -0.5}
    figure, axis = plt.subplots()

    draw_rewards({1: [step] * n_steps, 2: [step] * n_steps}, "red", axis)

    rewards = [line for line in axis.lines if set(line.get_ydata()) in ({0.5}, {-0.5})]
    assert len(rewards) == 4
    for line in rewards:
        assert (line.get_marker() == "o") is marked
    plt.close(figure)


def test_a_line_says_who_judged(two):
    _, printed, page = two

    assert "judge: pairrm judge-A; date 2026-11-21; n 512; invalid replies: 0" in printed
    assert "n 512; invalid replies: 0" in page.text


def test_the_table_of_pairs_is_that_of_the_files(two):
    folder, _, page = two
    iteration_dir = folder / "aipo" / "iter_2"
    logps = logps_of(iteration_dir)
    pairs = read(iteration_dir / "pairs.jsonl")
    means = []
    for field in ("chosen_ids", "rejected_ids"):
        mean = np.mean([logps[tuple(pair[field])] for pair in pairs])
        means.append(f"{mean:+.2f}")

    table = page.tables[1]

    assert table[2][1:3] == ["2", "40"]
    assert table[2][4:] == [*means, "81%"]
    # a run's name stands once
    assert table[1][0] == "aipo"
    assert table[2][0] == ""
    assert table[3][0] == "dpo"


def test_counts_and_settings_are_those_of_the_files(two):
    page = two[2]
    counts = page.tables[2]
    settings = page.tables[3]

    assert counts[1].count("identical") == 1
    assert "1,234" in counts[3]
    assert "160" in counts[3]
    assert "tied" in page.text.partition("0 everywhere")[2]
    assert ["loss", "aipo", "dpo"] in settings
    assert ["n_prompts", "40", "40"] in settings


def test_similarity_is_the_mean_cosine_of_the_pairs(two):
    from sklearn.feature_extraction.text import TfidfVectorizer

    folder, _, page = two
    iterations = []  # texts of chosen and rejected by turns
    for path in sorted(folder.glob("*/iter_*/pairs.jsonl")):
        texts = []
        for pair in read(path):
            texts += [pair["chosen"][0]["content"], pair["rejected"][0]["content"]]
        iterations.append(texts)
    vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]").fit(sum(iterations, ["."]))

    for row, texts in zip(page.tables[1][1:], iterations):
        vectors = vectorizer.transform(texts).toarray()
        cosines = [w @ l for w, l in zip(vectors[::2], vectors[1::2])]
        assert abs(float(row[3]) - np.mean(cosines)) < 1e-3
    assert "TF-IDF" in page.text


STAND_IN = """
import os, numpy

class SentenceTransformer:
    def __init__(self, name, local_files_only):
        assert local_files_only
        if "GONE" in os.environ:
            raise OSError("no such model\\n<b>")

    def encode(self, texts, normalize_embeddings):
        return numpy.array([[0.6, 0.8]] * len(texts))
"""


def test_similarity_is_by_sentence_transformers_when_its_model_is_here(tmp_path, monkeypatch):
    """A stand-in package, for which all texts are alike."""
    (tmp_path / "sentence_transformers.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        _, page = make_report(build_run(tmp_path / "run", T=1))

        assert page.tables[1][1][3] == "1.000"
        assert EMBEDDER in page.text
        assert "TF-IDF" not in page.text

        monkeypatch.setenv("GONE", "1")
        printed, page = make_report(tmp_path / "run")

        assert page.tables[1][1][3] != "1.000"
        assert "TF-IDF" in page.text
        assert "is not on this machine" in printed
    finally:
        sys.modules.pop("sentence_transformers", None)


@pytest.mark.parametrize("name", ["aipo", "dpo"])
def test_correlations_are_those_of_the_raw_files(two, name):
    folder, _, page = two
    responses = []  # length, log-prob
    margins = []  # difference of length, s_ref
    for t in (1, 2):
        iteration_dir = folder / name / f"iter_{t}"
        logps = logps_of(iteration_dir)
        for row in read(iteration_dir / "candidates.jsonl"):
            responses += [(len(r["ids"]), r["logp"]) for r in row["responses"]]
        for pair in read(iteration_dir / "pairs.jsonl"):
            w = tuple(pair["chosen_ids"])
            l = tuple(pair["rejected_ids"])
            margins.append((len(w) - len(l), logps[w] - logps[l]))

    found = re.findall(rf"{name}: r = (-?\d\.\d\d), n = (\d+)", page.text)

    assert found == [
        (correlation(responses), str(len(responses))),
        (correlation(margins), str(len(margins))),
    ]


# ---- the page ----


def test_the_page_loads_nothing_and_runs_nothing(two):
    page = two[2]

    assert "http" not in page.raw.lower().replace("http-equiv", "")
    assert not page.tags("script")
    assert not page.tags("link")
    assert "@import" not in page.raw
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page.raw)
    policy = page.tags("meta")[1]["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for _, attributes in page.elements:
        assert attributes.get("href", "#").startswith("#")
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert page.tags("html")[0]["lang"] == "en"
    assert page.tags("title")
    assert len(page.raw) < 2e6


def test_figures_are_named_and_their_ids_are_their_own(two):
    page = two[2]
    panels = page.tags("svg")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', page.raw)

    assert len(panels) == 4 + 3 + 2 + 2 + 2
    for attributes in panels:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 10
    assert len(ids) == len(set(ids))
    assert set(references) <= set(ids)
    assert INK not in page.raw
    assert "currentColor" in page.raw
    for number in ("Fig. 2", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6", "Table 2"):
        assert f"After {number}" in page.text
    assert "Fig. 1 " not in page.text
    assert "Fig. 1:" not in page.text
    assert "Fig. 7" not in page.text


def test_the_length_alarm_names_run_and_iteration_and_only_those(two, tmp_path):
    page = two[2]
    banner = page.raw.partition('class="banner"')[2].partition("</div>")[0]
    texts = []
    for t in range(3):
        length = 2 * (7 + t)
        texts.append(
            f"t = {t}: {length / 7:.1f} times the baseline's ({length}.0 against 7.0 tokens)"
        )

    end = "do not read their win rates as quality.dpo " + "; ".join(texts)
    assert re.sub("<[^>]*>", "", banner).endswith(end)
    lengths = [cells[5] for cells in page.tables[0][2:]]
    assert lengths[2:4] == ["9.08.5 – 9.5", "14.0 ×2.013.5 – 14.5"]

    _, page = make_report(build_run(tmp_path / "calm"))
    assert not page.has_banner()
    _, page = make_report(build_run(tmp_path / "edge", T=0, longer=1.5))
    assert not page.has_banner()


def test_text_of_models_prompts_settings_and_names_is_only_text(tmp_path):
    name = "<img src=x onerror=alert(1)>$a_b$ & 'run'"
    hostile = build_run(
        tmp_path / "x" / name.replace("/", ""),
        reply=EVIL,
        prompt="P" + EVIL,
        recipe=f"seed = {EVIL!r}\n",
        judge="J" + EVIL,
    )

    _, page = make_report(hostile)

    assert not page.tags("script")
    assert not page.tags("img")
    assert page.raw.count("<title>") == 1
    assert f"{VISIBLE} 2/3" in page.text
    assert "P" + VISIBLE in page.text
    assert "J" + VISIBLE in page.text
    assert name in page.text
    assert ["seed", VISIBLE] in page.tables[-1]
    control = {chr(code) for code in [*range(9), *range(11, 32), 127]}
    assert not set(page.raw) & control


def test_names_are_no_tex_and_none_is_hidden(tmp_path):
    """matplotlib reads TeX between dollars, and its legends leave out what begins with _."""
    tex = build_run(tmp_path / r"a$\b{$")
    hidden = build_run(tmp_path / "_hidden", recipe="loss = '<b>'\n")

    _, page = make_report(tex, hidden)

    assert page.text.count(r"a$\b{$") > 5
    assert page.text.count("_hidden") > 5


def test_answers_stand_side_by_side_for_the_same_prompts(two):
    page = two[2]

    assert len(page.tags("h4")) == 2 * 5
    assert page.text.count("t = 2, 3 tokens") == 10
    assert page.text.count(", cut off") == 2 * 3
    places = [page.text.index(f"an answer {t}/4") for t in range(3)]
    assert places[0] < places[1] < places[2]
    assert "2/5" not in page.text


def test_a_long_answer_is_cut_and_says_so(tmp_path):
    _, page = make_report(build_run(tmp_path / "run", T=1, reply="y" * 9000))

    assert "y" * 4000 in page.text
    assert "y" * 4001 not in page.text
    assert "5,004 more characters" in page.text


# ---- the guard ----


def build_guarded_run(folder, values, guard="accuracy", **other):
    """A run whose iterations have (win rate, guard), all of them with intervals of 2 around."""
    build_run(folder, T=len(values) - 1, n=4)
    for t, (wins, truth) in enumerate(values):
        scores = {"win_rate": wins, "win_rate_ci": [wins - 2, wins + 2]}
        scores |= {guard: truth, guard + "_ci": [truth - 2, truth + 2]}
        write_json(folder / f"iter_{t}" / "eval.json", evaluation(t, **scores) | other)
    return folder


def guard_lines(printed):
    return [line for line in printed.splitlines() if line.startswith("GUARD ALARM")]


@pytest.mark.parametrize(
    "guard, words", [("accuracy", "accuracy"), ("followed", "share of prompts followed")]
)
def test_a_win_rate_that_rises_while_the_guard_falls_is_named_with_numbers(tmp_path, guard, words):
    values = [(50, 78), (60, 90), (70, 89), (80, 84)]
    same = {"accuracy_ci": None} if guard == "followed" else {}
    run = build_guarded_run(tmp_path / "run", values, guard, **same)

    printed, page = make_report(run)

    # iteration 2 is within the noise of iteration 1, iteration 3 is below it and above iteration 0
    sentence = (
        "from t = 1 to t = 3 the win rate by pairrm judge-A rose from 60.0% to 80.0%, "
        f"but the {words} fell from 90.0% to 84.0%"
    )
    assert guard_lines(printed) == [f"GUARD ALARM: run: win rate rises, guard falls: {sentence}"]
    assert f"run {sentence}" in page.text
    column = page.tables[0][1].index(guard)
    cells = [row[column] for row in page.tables[0][2:]]
    assert cells[3] == "84.0% falls82.0 – 86.0%"
    assert cells[2] == f"{values[2][1]}.0%87.0 – 91.0%"


@pytest.mark.parametrize(
    "values",
    [
        [(50, 80), (60, 76)],  # the guard's intervals touch
        [(50, 80), (54, 60)],  # those of the win rates do
        [(60, 80), (50, 60)],  # both fall
        [(50, 80), (60, 90)],  # both rise
    ],
)
def test_what_may_be_noise_or_is_no_contradiction_raises_no_guard_alarm(tmp_path, values):
    printed, page = make_report(build_guarded_run(tmp_path / "run", values))

    assert not guard_lines(printed)
    assert not page.has_banner()


@pytest.mark.parametrize("n, alarmed", [(3, False), (300, True)])
def test_answers_that_are_all_right_or_all_wrong_alarm_only_if_they_are_many(tmp_path, n, alarmed):
    run = build_guarded_run(tmp_path / "run", [(50, 100), (70, 0)], n_accuracy=n)
    for t, truth in enumerate((100, 0)):
        path = run / f"iter_{t}" / "eval.json"
        scores = json.loads(path.read_text())
        write_json(path, scores | {"accuracy_ci": [truth, truth]})

    printed, _ = make_report(run)

    assert bool(guard_lines(printed)) is alarmed


def test_a_guard_of_prompts_of_its_own_has_columns_and_raises_the_alarm(tmp_path):
    run = build_run(tmp_path / "run", T=1, n=4, accuracy=None, accuracy_ci=None)
    shared = {"bench": "guard", "judge": "answer", "date": "2026-11-27", "n": 200}
    for t, (right, followed) in enumerate([(90, 60), (80, 62)]):
        guard = shared | {"accuracy": right, "accuracy_ci": [right - 3, right + 3]}
        guard |= {"followed": followed, "followed_ci": [followed - 9, followed + 9]}
        write_json(run / f"iter_{t}" / "guard.json", guard)
        wins = {"win_rate": 50 + 20 * t, "win_rate_ci": [47 + 20 * t, 53 + 20 * t]}
        scores = json.loads((run / f"iter_{t}" / "eval.json").read_text())
        write_json(run / f"iter_{t}" / "eval.json", scores | wins)

    printed, page = make_report(run)

    sentence = (
        "from t = 0 to t = 1 the win rate by pairrm judge-A rose from 50.0% to 70.0%, "
        "but the guard's accuracy fell from 90.0% to 80.0%"
    )
    assert guard_lines(printed) == [f"GUARD ALARM: run: win rate rises, guard falls: {sentence}"]
    assert "[2] guard, judge: answer; date 2026-11-27; n 200;" in printed
    assert "no guard" not in printed + page.text
    column = page.tables[0][1].index("accuracy")
    cells = [row[column] for row in page.tables[0][2:]]
    assert cells == ["90.0%87.0 – 93.0%", "80.0% falls77.0 – 83.0%"]


def test_the_figures_show_the_guard_beside_the_evaluation_and_no_other_benchmark(tmp_path):
    run = build_run(tmp_path / "run", T=1, accuracy=None, accuracy_ci=None)
    for t in (0, 1):
        guard = {"bench": "guard", "judge": "answer", "accuracy": 90 - t, "followed": 60 + t}
        write_json(run / f"iter_{t}" / "guard.json", guard | {"followed_share": 70})
        other = {"bench": "mt_bench", "judge": "gpt-4", "score": 7}
        write_json(run / f"iter_{t}" / "mt.json", other)

    _, page = make_report(run)

    # win rate, the guard's accuracy and followed, and in the first length as well
    assert n_panels(run / "iterations.png") == 4
    assert n_panels(run / "length.png") == 3
    assert "accuracy %, the guard" in page.text
    assert "followed %, the guard" in page.text


def n_panels(path):
    """How many panels a PNG holds, by its width: each has 4.6 inches of 150 dots."""
    width = int.from_bytes(path.read_bytes()[16:20], "big")
    return width / (4.6 * 150)


def test_two_judges_of_the_same_answers_raise_one_guard_alarm(tmp_path):
    run = build_guarded_run(tmp_path / "run", [(50, 80), (60, 70)])
    for t in (0, 1):
        scores = json.loads((run / f"iter_{t}" / "eval.json").read_text())
        write_json(run / f"iter_{t}" / "other.json", scores | {"judge": "another"})

    printed, _ = make_report(run)

    assert len(guard_lines(printed)) == 1


def test_a_run_without_any_guard_says_so(two, tmp_path):
    _, printed, page = two
    assert "no guard" not in printed
    assert "no guard" not in page.text

    run = build_run(tmp_path / "blind", T=1, accuracy=None, accuracy_ci=None)
    printed, page = make_report(run)

    assert "blind: no guard: no prompt carries an 'answer'" in printed
    assert "blind: no guard: no prompt carries an 'answer'" in page.text


# ---- several judges ----


BENCHMARKS = {
    "alpaca_eval": {
        "judge": "gpt-x",
        "win_rate": 33.3,
        "standard_error": 1.5,
        "lc_win_rate": 35.5,
        "avg_length": 1999,
    },
    "mt_bench": {
        "judge": "gpt-x",
        "score": 7.51,
        "turn_1": 7.9,
        "turn_2": 7.12,
        "categories": {"math": 5.25, "<i>": 6.5},
    },
    "arena_hard": {
        "judge": "gpt-y",
        "win_rate": 44.4,
        "ci": [42.5, 46.0],
        "avg_tokens": 600,
    },
}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Two runs: a second judge has seen one, four benchmarks the other."""
    folder = tmp_path_factory.mktemp("judges")
    one = build_run(folder / "one", T=1)
    second = {"judge": "pairrm judge-B", "win_rate": 12.3, "win_rate_ci": [10, 14]}
    write_json(one / "iter_1" / "again.json", evaluation(1, invalid=7, n=99, **second))

    two = build_run(folder / "two", T=1)
    for name, scores in BENCHMARKS.items():
        same = {"bench": name, "date": "2026-11-20", "n": 80, "invalid": 0}
        write_json(two / "iter_1" / f"{name}.json", same | scores)
    own = {"bench": "ifeval", "judge": "rules", "n": 541, "strict": 55.25}
    write_json(two / "iter_1" / "mine.json", own)

    printed, page = make_report(one, two)
    return folder, printed, page


def test_two_judges_never_share_a_column_or_a_panel(judges):
    _, printed, page = judges
    groups, head, _, one, _, two = page.tables[0]

    # columns
    assert [group.strip() for group in groups[1:]] == [
        "win_rate [1] pairrm judge-A",
        "win_rate [2] pairrm judge-B",
        "alpaca_eval [3] gpt-x",
        "arena_hard [4] gpt-y",
        "ifeval [5] rules",
        "mt_bench [6] gpt-x",
        "training pairs",
    ]
    own = "53.3%51.3 – 55.3%"
    win_rates = [cell for cell, heading in zip(one, head) if heading == "win rate"]
    assert win_rates == [own, "12.3%10.0 – 14.0%", "-", "-"]
    win_rates = [cell for cell, heading in zip(two, head) if heading == "win rate"]
    assert win_rates == [own, "-", "33.3%30.4 – 36.2%", "44.4%42.5 – 46.0%"]
    others = [two[head.index(h)] for h in ("score", "turn 1", "turn 2", "strict", "characters")]
    assert others == ["7.51", "7.90", "7.12", "55.25", "1,999"]

    # the line of a judge
    line = "win_rate, judge: pairrm judge-B; date 2026-11-21; n 99; invalid replies: 7 (one t = 1)"
    assert line in printed
    assert line in page.text

    # panels
    titles = re.findall(r"<div><p>(.*?)</p><svg", page.raw)
    for judge in (
        "pairrm judge-A",
        "pairrm judge-B",
        "alpaca_eval by gpt-x",
        "arena_hard by gpt-y",
    ):
        assert titles.count(f"win rate %, {judge}") == 2
    assert "strict, ifeval by rules" in titles
    assert "score, mt_bench by gpt-x" in titles


def test_two_models_that_answered_to_one_name_never_share_a_column(tmp_path):
    folder = build_run(tmp_path / "run", T=3)
    for t, served in ((1, "gpt-x"), (2, "gpt-x-2025"), (3, None)):
        scores = evaluation(t, judge="judge gpt-x", served_model=served)
        write_json(folder / f"iter_{t}" / "eval.json", scores)

    printed, page = make_report(folder)

    groups = [group.strip() for group in page.tables[0][0]]
    assert "win_rate [1] judge gpt-x" in groups
    assert "win_rate [2] judge gpt-x (served gpt-x-2025)" in groups
    assert "win_rate, judge: judge gpt-x (served gpt-x-2025); date 2026-11-21" in printed


# half of Arena-Hard v2.0's categories has no verdict in the second iteration
ARENA_2 = {
    "bench": "arena_hard",
    "judge": "gpt-4.1",
    "served_model": "gpt-4.1-2025-04-14",
    "date": "2026-11-20",
    "invalid": 3,
    "categories": {
        "creative_writing": {"invalid": 1, "n": 249, "win_rate": 12.0, "ci": [9.5, 14.5]},
        "hard_prompt": {"invalid": 2, "n": 498, "win_rate": 4.0, "ci": [3.0, 5.5]},
    },
    "pooled": "what follows is of all categories together",
    "win_rate": 99.9,
    "n": 747,
}


def test_categories_with_scores_of_their_own_have_a_column_each_and_none_together(tmp_path):
    run = build_run(tmp_path / "run", T=2)
    write_json(run / "iter_1" / "arena.json", ARENA_2)
    unread = {"invalid": 500, "n": 0, "win_rate": None, "ci": None}
    categories = {"creative_writing": unread, "hard_prompt": ARENA_2["categories"]["hard_prompt"]}
    write_json(run / "iter_2" / "arena.json", ARENA_2 | {"categories": categories})

    printed, page = make_report(run)

    judge = "gpt-4.1 (served gpt-4.1-2025-04-14)"
    groups = [group.strip() for group in page.tables[0][0]]
    assert f"arena_hard creative_writing [2] {judge}" in groups
    assert f"arena_hard hard_prompt [3] {judge}" in groups
    head, _, first, second = page.tables[0][1:]
    places = [place for place, heading in enumerate(head) if heading == "win rate"]
    assert [first[place] for place in places[1:]] == ["12.0%9.5 – 14.5%", "4.0%3.0 – 5.5%"]
    assert [second[place] for place in places[1:]] == ["-", "4.0%3.0 – 5.5%"]
    assert "99.9" not in page.text
    assert "99.9" not in printed

    # n and invalid replies of each iteration where they differ
    line = f"arena_hard creative_writing, judge: {judge}; date 2026-11-20; "
    line += "n 249 (run t = 1), 0 (run t = 2); invalid replies: 1 (run t = 1), 500 (run t = 2)"
    assert line in printed
    assert line in page.text
    titles = re.findall(r"<div><p>(.*?)</p><svg", page.raw)
    assert f"win rate %, arena_hard hard_prompt by {judge}" in titles


def test_the_printed_table_has_half_of_each_interval_below_its_number(two):
    _, printed, _ = two
    lines = printed.splitlines()
    place = next(k for k, line in enumerate(lines) if line.split()[:2] == ["aipo", "1"])
    head, below = lines[0], lines[place + 1]

    assert below.split() == ["±2.0", "±3.0", "±2.0", "±0.5", "±1", "±0.02", "±0.02"]
    for name, margin in (("win rate", "±2.0"), ("self-sim.", "±0.02")):
        end = head.index(name) + len(name)
        assert below[:end].endswith(margin)
    assert "±: half the width of a 95 % interval" in lines


def test_scores_by_category_have_a_table_of_their_own(judges):
    page = judges[2]
    tables = [table for table in page.tables if table[0] == ["run", "t", "math", "<i>"]]

    assert len(tables) == 1
    assert tables[0][1] == ["two", "1", "5.25", "6.50"]


def test_a_judge_is_in_one_file_of_an_iteration(tmp_path):
    folder = build_run(tmp_path / "run", T=1)
    arena_hard = {"bench": "arena_hard"} | BENCHMARKS["arena_hard"]
    write_json(folder / "iter_1" / "arena_hard.json", arena_hard)
    write_json(folder / "iter_1" / "hard2.json", arena_hard)

    done = run("-m", "nanoaipo.report", folder)

    assert done.returncode == 1
    assert "hard2.json: arena_hard by gpt-y is in another file" in done.stderr


# ---- shards, and runs with parts missing ----


def split_into_shards(iteration_dir):
    """Split candidates and pairs into two shards each, with counts that add up to the same."""
    counts_of_shards = {
        "candidates": [
            {"too_long": 3, "responses": 80, "prompts": 20},
            {"too_long": 0, "responses": 80, "prompts": 20},
        ],
        "pairs": [{"prompts": 20, "pairs": 20, "identical": 617}] * 2,
    }
    for stage in ("candidates", "pairs"):
        path = iteration_dir / f"{stage}.jsonl"
        records = read(path)
        for k in (0, 1):
            shard = iteration_dir / f"{stage}-0000{k}-of-00002.jsonl"
            write(shard, records[k::2])
            summary = {"longer_won": 0.5 + 0.5 * k, "longer_won_n": 10 + 20 * k}
            manifest = {"counts": counts_of_shards[stage][k], "summary": summary}
            write_json(shard.with_suffix(".manifest.json"), manifest)
        path.unlink()
        path.with_suffix(".manifest.json").unlink()


def test_shards_are_one_file_and_unfinished_ones_none(tmp_path):
    whole = build_run(tmp_path / "whole", T=1)
    parts = build_run(tmp_path / "parts", T=1)
    split_into_shards(parts / "iter_1")

    _, page = make_report(whole, parts)

    assert printed_correlation("whole", page) == printed_correlation("parts", page)
    pairs_of_whole, pairs_of_parts = page.tables[1][1:]
    assert pairs_of_whole[1:6] == pairs_of_parts[1:6]
    assert pairs_of_whole[6] == "81%"
    assert pairs_of_parts[6] == "88%"  # mean over shards, weighted
    counts = page.tables[2]
    assert counts[2][1:] == counts[3][1:]
    assert "160" in counts[3]

    (parts / "iter_1" / "candidates-00001-of-00002.jsonl").unlink()
    _, page = make_report(parts)

    assert "Fig. 5" not in page.text
    assert "Fig. 4" in page.text


def test_a_run_may_have_nothing_but_its_first_evaluation(tmp_path):
    early = build_run(tmp_path / "early", T=0)
    _, page = make_report(early)
    assert "Fig. 2" in page.text

    (early / "recipe.py").unlink()
    (early / "iter_0" / "answers.jsonl").unlink()
    _, page = make_report(early)
    assert page.sections() == ["results", "figures"]


def test_a_run_may_be_trained_but_not_evaluated(tmp_path):
    training = build_run(tmp_path / "training", T=2)
    (training / "iter_2" / "eval.json").unlink()
    (training / "iter_2" / "answers.jsonl").unlink()

    printed, _ = make_report(training)

    expected = ["-"] * 7 + ["-1.25", "-8.50", "13.5", "6.5"]
    assert printed_row(printed, "training", 2) == expected


def test_records_may_lack_ids_and_the_truth(tmp_path):
    bare = build_run(tmp_path / "bare", T=1)
    iteration_dir = bare / "iter_1"
    write(iteration_dir / "candidates.jsonl", [{"prompt": "q", "responses": ["a", "b"]}])
    write(iteration_dir / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    without_truth = {"accuracy": None, "accuracy_ci": None}
    scores = evaluation(1, length=120.0, length_unit="characters", **without_truth)
    write_json(iteration_dir / "eval.json", scores)

    printed, page = make_report(bare)

    assert "characters" in printed
    assert "Fig. 5" not in page.text
    assert "Fig. 6" not in page.text
    assert page.tables[1][1][2:] == ["1", "0.000", "-", "-", "81%"]


def test_instructions_followed_stand_beside_accuracy_and_are_drawn(tmp_path):
    followed = {"followed": 41.5, "followed_ci": [35.0, 48.0], "followed_share": 62.5}
    run = build_run(tmp_path / "run", T=1, **followed)

    printed, page = make_report(run)

    assert "accuracy  followed  share followed    tokens" in printed.splitlines()[0]
    assert printed_row(printed, "run", 1)[2:5] == ["81.7%", "41.5%", "62.5%"]
    assert page.tables[0][1][4:7] == ["accuracy", "followed", "share followed"]
    assert page.tables[0][2][5:7] == ["41.5%35.0 – 48.0%", "62.5%"]
    assert "followed %, the truth" in page.text
    labels = [attributes.get("aria-label") for attributes in page.tags("svg")]
    assert "run from 41.5 to 41.5" in labels


def test_a_run_without_scores_and_a_broken_file_are_refused_in_one_line(tmp_path):
    done = run("-m", "nanoaipo.report")
    assert done.returncode == 1
    assert "\n    python -m nanoaipo.report out/tiny_aipo\n" in done.stderr  # its lines, unescaped

    done = run("-m", "nanoaipo.report", tmp_path / "nowhere")
    assert done.stderr.strip().endswith("has iterate.sh evaluated an iteration?")

    broken = build_run(tmp_path / "broken", T=1)
    (broken / "iter_1" / "eval.json").write_text("{")
    done = run("-m", "nanoaipo.report", broken)
    assert done.returncode == 1
    assert "eval.json: not JSON" in done.stderr
    assert "Traceback" not in done.stderr


# ---- several runs ----


def test_ablations_are_drawn_when_the_runs_are_there(tmp_path):
    runs = []
    for k in range(3):
        recipe = f"beta = {0.1 + k}\n"
        runs.append(build_run(tmp_path / f"run{k}", T=1 + k % 2, n=20, recipe=recipe))

    _, page = make_report(*runs)
    assert "run0: T = 1, P = 20; run1: T = 2, P = 20" in page.text
    assert "Fig. 7" in page.text
    assert "beta 1.1" in page.text

    _, page = make_report(*runs[:2])
    assert "Fig. 1:" in page.text
    assert "Fig. 7" not in page.text


def test_what_is_drawn_of_a_single_run_lies_in_it_and_of_several_beside_them(tmp_path):
    one = build_run(tmp_path / "one", T=1)
    other = build_run(tmp_path / "other", T=1)
    drawn = {"iterations.png", "length.png", "report.html"}

    make_report(one)
    assert drawn <= {path.name for path in one.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"}

    make_report(one, other)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other"} | drawn


def test_names_of_runs_that_are_equal_become_paths(tmp_path):
    one = build_run(tmp_path / "a" / "run", T=0)
    other = build_run(tmp_path / "b" / "run", T=0)

    _, page = make_report(one, other, where=tmp_path)

    assert str(one) in page.text
    assert str(other) in page.text


def test_a_page_of_many_dots_and_long_answers_stays_small(tmp_path):
    _, page = make_report(build_run(tmp_path / "run", T=4, n=600, reply="word " * 4000))

    assert len(page.raw) < 1.2e6
    assert "n = 9,600" in page.text


# ---- in a real browser ----


needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: the page is not opened in a browser"
)


def chromium(tmp_path, page, *flags, dark=False):
    """What headless Chromium prints on a page."""
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        "--hide-scrollbars",
        *(f"--disable-{feature}" for feature in off),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *flags,
        f"file://{page}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose texts try to break out, with a script that would rename it, and the layout."""
    folder = tmp_path_factory.mktemp("hostile")
    wide = "unbroken" * 200 + " שלום עולם " + EVIL
    recipe = f"model = {'m' * 300!r}\n"
    long_name = build_run(folder / ("r" * 120), reply=wide, prompt=wide, recipe=recipe, longer=3.0)
    long_judge = build_run(folder / "b", judge="j" * 200)
    make_report(long_name, long_judge)
    return folder / "report.html"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_light_and_dark(hostile, tmp_path, dark):
    from PIL import Image

    screenshot = tmp_path / "shot.png"
    chromium(tmp_path, hostile, f"--screenshot={screenshot}", "--window-size=1200,1600", dark=dark)
    pixels = np.asarray(Image.open(screenshot).convert("L")).astype(float)

    assert pixels.shape == (1600, 1200)
    assert pixels.std() > 5
    page_colour = np.bincount(pixels.astype(int).ravel()).argmax()
    if dark:
        ink = pixels > 150
        assert page_colour == 23
    else:
        ink = pixels < 110
        assert page_colour == 255
    assert ink.mean() > 0.003


# width of the content and number of panels of each frame
MEASURE = """
onload = () => {
  const pages = [f400, f1200].map(frame => frame.contentDocument)
  const measures = pages.flatMap(
    page => [page.documentElement.scrollWidth, page.querySelectorAll('svg').length])
  out.textContent = measures.join(' ')
}
"""


@needs_browser
def test_nothing_planted_runs_and_nothing_is_wider_than_a_phone(hostile, tmp_path):
    dom = chromium(tmp_path, hostile, "--dump-dom")

    assert "<title>pwned" not in dom
    assert "pwned" in dom
    assert "- nanoAIPO</title>" in dom

    inner = html.escape(hostile.read_text(encoding="utf-8"))
    frames = ""
    for width in (400, 1200):
        style = f"width:{width}px;height:900px;border:0"
        frames += f'<iframe id=f{width} style="{style}" srcdoc="{inner}"></iframe>'
    frame_page = tmp_path / "frame.html"
    frame_page.write_text(
        f"<!doctype html><meta charset=utf-8>{frames}<p id=out></p><script>{MEASURE}</script>",
        encoding="utf-8",
    )
    dom = chromium(tmp_path, frame_page, "--dump-dom")
    measured = re.search(r'<p id="out">([^<]*)</p>', dom)[1].split()

    phone_width, phone_panels, wide_width, wide_panels = measured
    assert phone_width == "400"
    assert wide_width == "1200"
    assert phone_panels == wide_panels
    assert int(phone_panels) > 10
