"""Table, figures and report.html from synthetic runs, read back as a browser would read them, and opened in one where there is one."""
import contextlib
import html.parser
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from conftest import ROOT, run
from nanoaipo.report import page as report
from nanoaipo.report import runs as files

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title='pwned'</script> \"quoted\" 'single' &amp; </p></main> \x00\x1b[31m\x07 \u202eback"
VISIBLE = EVIL.translate(files.CONTROL)


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def write_json(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")


def evaluation(t, longer=1.0, **other):
    """eval.json as eval.py writes it."""
    around = lambda x, e: [x - e, x + e]
    length = (7 + t) * longer
    row = {"win_rate": 50 + 3.3 * t, "lc_win_rate": 50 + 2.1 * t, "accuracy": 80.7 + t, "length": length, "finished": 97.0, "distinct_2": 0.41,
           "self_similarity": 0.23}
    reach = {"win_rate": 2, "lc_win_rate": 3, "accuracy": 2, "length": 0.5, "finished": 1, "distinct_2": 0.02, "self_similarity": 0.02}
    row |= {k + "_ci": around(row[k], e) for k, e in reach.items()}
    return {"bench": "win_rate", "judge": "pairrm judge-A", "date": "2026-11-21", "n": 512, "invalid": 0, "ties": 199, "length_unit": "tokens",
            "baseline_length": 7.0} | row | other


def build(folder, T=2, n=40, seed=0, recipe="", reply="an answer", prompt="a question", **scores):
    """A run of T iterations with n prompts each: what the stages leave behind, without weights."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "recipe.py").write_text(f"loss = 'aipo'\nn_prompts = {n}\niterations = {T}\n{recipe}")
    for t in range(T + 1):
        now = folder / f"iter_{t}"
        asked = [{"role": "user", "content": prompt}]
        responses = [{"text": f"{reply} {t}/{k}", "ids": [1, 2, 3], "finished": k > 0} for k in range(8)]
        write(now / "answers.jsonl", [{"id": f"q{k}", "prompt": asked, "responses": [r]} for k, r in enumerate(responses)])
        write_json(now / "eval.json", evaluation(t, **scores))
        if not t:
            continue
        candidates, pairs = [], []
        for k in range(n):
            lengths = draw.permutation(np.arange(1, 31))[:4]
            responses = [{"text": f"w{'x ' * m}", "ids": draw.integers(0, 99, m).tolist(), "logp": draw.normal() - 0.7 * m}
                         for m in lengths.tolist()]
            candidates.append({"id": f"p{t}-{k}", "prompt": asked, "prompt_ids": [5], "responses": responses})
            w, l = responses[0], responses[1]
            pairs.append({"id": f"p{t}-{k}", "prompt": asked, "chosen_ids": w["ids"], "rejected_ids": l["ids"],
                          **{k: [{"role": "assistant", "content": r["text"]}] for k, r in (("chosen", w), ("rejected", l))}})
        write(now / "candidates.jsonl", candidates)
        write(now / "pairs.jsonl", pairs)
        write_json(now / "candidates.manifest.json", {"counts": {"prompts": n, "too_long": 3, "responses": 4 * n}})
        write_json(now / "pairs.manifest.json", {"counts": {"prompts": n, "pairs": n, "identical": 1234, "tied": 0},
                                                 "summary": {"longer_won": 0.8125, "longer_won_n": n}})
        write_json(now / "model" / "manifest.json", {"counts": {"pairs": n, "too_long": 0}})
        step = {"pairs": 8, "tokens": 900, "accuracy": 0.5, "s_ref": -1.25, "logp_chosen": -8.5, "len_chosen": 13.5, "len_rejected": 6.5}
        write(now / "model" / "metrics.jsonl", [step | {"step": k, "reward_chosen": k * 0.1, "reward_rejected": -k * 0.1} for k in range(5)])
    return folder


class Page(html.parser.HTMLParser):
    """A parsed page: its elements, all text, tables as lists of rows."""
    def __init__(self, path):
        super().__init__()
        self.raw = open(path, encoding="utf-8").read()
        self.elements, self.text, self.tables, self.cell = [], "", [], False
        self.feed(self.raw)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.tables += [[]] if tag == "table" else []
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.tables[-1][-1][-1] += data

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def draw(*runs, where=None):
    """Run plot.py, here, where everything is imported already; (what it printed, the parsed page)."""
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Glyph")                      # iterations.png draws what its font has
        patch.setattr(sys, "argv", ["nanoaipo/report", *map(str, runs)])
        runpy.run_module("nanoaipo.report", run_name="__main__")
    last = out.getvalue().strip().splitlines()[-1]
    assert last == f"report: {where or (runs[0] if len(runs) == 1 else runs[0].parent)}/report.html"
    return out.getvalue(), Page(last.removeprefix("report: "))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs, one with far longer answers; what was printed, and the page."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *draw(build(folder / "aipo"), build(folder / "dpo", seed=1, recipe="loss = 'dpo'\n", longer=2.0))


def correlation(title, page):
    return float(re.search(re.escape(title) + r": r = (-?\d\.\d\d)", page.text)[1])


def test_numbers_of_the_tables_are_those_of_the_files(two):
    folder, printed, page = two
    for t in range(3):
        row = next(line.split() for line in printed.splitlines() if line.split()[:2] == ["aipo", str(t)])
        assert row[2:9] == [f"{50 + 3.3 * t:.1f}%", f"{50 + 2.1 * t:.1f}%", f"{80.7 + t:.1f}%", f"{7 + t:.1f}", "97%", "0.41", "0.23"]
        assert row[9:] == (["-1.25", "-8.50", "13.5", "6.5"] if t else ["-"] * 4)
        cells = page.tables[0][2 + t]
        assert cells[1] == str(t) and cells[2] == f"{50 + 3.3 * t:.1f}%{48 + 3.3 * t:.1f} – {52 + 3.3 * t:.1f}%"
        assert cells[5] == f"{7 + t:.1f}{6.5 + t:.1f} – {7.5 + t:.1f}"
    assert "judge: pairrm judge-A; date 2026-11-21; n 512; invalid replies: 0" in printed and "n 512; invalid replies: 0" in page.text
    pairs, counts = page.tables[1], page.tables[2]
    rows = [json.loads(line) for line in open(folder / "aipo/iter_2/pairs.jsonl")]
    logp = {tuple(r["ids"]): r["logp"] for line in open(folder / "aipo/iter_2/candidates.jsonl") for r in json.loads(line)["responses"]}
    means = [f"{np.mean([logp[tuple(r[k])] for r in rows]):+.2f}" for k in ("chosen_ids", "rejected_ids")]
    assert pairs[2][1:3] == ["2", "40"] and pairs[2][4:] == [*means, "81%"]
    assert pairs[1][0] == "aipo" and pairs[2][0] == "" and pairs[3][0] == "dpo"
    assert counts[1].count("identical") == 1 and "1,234" in counts[3] and "160" in counts[3] and "tied" in page.text.partition("0 everywhere")[2]
    assert ["loss", "aipo", "dpo"] in page.tables[3] and ["n_prompts", "40", "40"] in page.tables[3]


def test_similarity_is_the_mean_cosine_of_the_pairs(two):
    from sklearn.feature_extraction.text import TfidfVectorizer
    folder, _, page = two
    sides = [[m[0]["content"] for line in open(path) for m in (json.loads(line)["chosen"], json.loads(line)["rejected"])]
             for path in sorted(folder.glob("*/iter_*/pairs.jsonl"))]
    count = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]").fit(sum(sides, ["."]))
    for row, side in zip(page.tables[1][1:], sides):
        dense = count.transform(side).toarray()
        assert abs(float(row[3]) - np.mean([w @ l for w, l in zip(dense[::2], dense[1::2])])) < 1e-3
    assert "TF-IDF" in page.text


def test_similarity_is_by_sentence_transformers_when_its_model_is_here(tmp_path, monkeypatch):
    """A stand-in package: two texts are as alike as their lengths are equal."""
    (tmp_path / "sentence_transformers.py").write_text("""if True:
        import os, numpy
        class SentenceTransformer:
            def __init__(self, name, local_files_only):
                assert local_files_only
                if "GONE" in os.environ:
                    raise OSError("no such model\\n<b>")
            def encode(self, texts, normalize_embeddings):
                return numpy.array([[0.6, 0.8]] * len(texts))
    """)
    monkeypatch.syspath_prepend(tmp_path)
    page = draw(build(tmp_path / "run", T=1))[1]
    assert page.tables[1][1][3] == "1.000" and report.EMBEDDER in page.text and "TF-IDF" not in page.text
    monkeypatch.setenv("GONE", "1")
    printed, page = draw(tmp_path / "run")
    assert page.tables[1][1][3] != "1.000" and "TF-IDF" in page.text and "is not on this machine" in printed
    sys.modules.pop("sentence_transformers")                            # the stand-in


def test_correlations_are_those_of_the_raw_files(two):
    folder, _, page = two
    for name in ("aipo", "dpo"):
        responses, margins = [], []
        for t in (1, 2):
            logp = {}
            for line in open(folder / name / f"iter_{t}" / "candidates.jsonl"):
                for r in json.loads(line)["responses"]:
                    responses.append((len(r["ids"]), r["logp"]))
                    logp[tuple(r["ids"])] = r["logp"]
            for line in open(folder / name / f"iter_{t}" / "pairs.jsonl"):
                w, l = (tuple(json.loads(line)[k]) for k in ("chosen_ids", "rejected_ids"))
                margins.append((len(w) - len(l), logp[w] - logp[l]))
        found = re.findall(rf"{name}: r = (-?\d\.\d\d), n = (\d+)", page.text)
        assert found == [(f"{np.corrcoef(np.array(x).T)[0, 1]:.2f}", str(len(x))) for x in (responses, margins)]


def test_the_page_loads_nothing_and_runs_nothing(two):
    page = two[2]
    assert "http" not in page.raw.lower().replace("http-equiv", "") and not page.tags("script") and not page.tags("link")
    assert "@import" not in page.raw and "url(" not in re.sub(r"url\(#\w+\)", "", page.raw)
    assert page.tags("meta")[1]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert all(a["href"].startswith("#") for _, a in page.elements if "href" in a)
    assert not any(k.startswith("on") or k == "src" for _, a in page.elements for k in a)
    assert page.tags("html")[0]["lang"] == "en" and page.tags("title") and len(page.raw) < 2e6


def test_figures_are_named_and_their_ids_are_their_own(two):
    page = two[2]
    drawn = page.tags("svg")
    assert len(drawn) == 4 + 3 + 2 + 2 + 2 and all(a["role"] == "img" and len(a["aria-label"]) > 10 for a in drawn)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)) and {ref for ref in re.findall(r'(?:url\(|href=")#([^)"]+)', page.raw)} <= set(ids)
    assert files.INK not in page.raw and "currentColor" in page.raw
    for number in ("Fig. 2", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6", "Table 2"):
        assert f"After {number}" in page.text
    assert "Fig. 1 " not in page.text and "Fig. 7" not in page.text


def test_the_length_alarm_names_run_and_iteration_and_only_those(two, tmp_path):
    banner = two[2].raw.partition('class="banner"')[2].partition("</div>")[0]
    lines = (f"t = {t}: {2 * (7 + t) / 7:.1f} times the baseline's ({14 + 2 * t}.0 against 7.0 tokens)" for t in range(3))
    assert re.sub("<[^>]*>", "", banner).endswith("do not read their win rates as quality.dpo " + "; ".join(lines))
    assert [cells[5] for cells in two[2].tables[0][2:]][2:4] == ["9.08.5 – 9.5", "14.0 ×2.013.5 – 14.5"]
    assert "banner" not in [a.get("class") for _, a in draw(build(tmp_path / "calm"))[1].elements]
    assert "banner" not in [a.get("class") for _, a in draw(build(tmp_path / "edge", T=0, longer=1.5))[1].elements]


def test_text_of_models_prompts_settings_and_names_is_only_text(tmp_path):
    name = "<img src=x onerror=alert(1)>$a_b$ & 'run'"
    _, page = draw(build(tmp_path / "x" / name.replace("/", ""), reply=EVIL, prompt="P" + EVIL, recipe=f"seed = {EVIL!r}\n", judge="J" + EVIL))
    assert not page.tags("script") and not page.tags("img") and page.raw.count("<title>") == 1
    assert f"{VISIBLE} 2/3" in page.text and "P" + VISIBLE in page.text and "J" + VISIBLE in page.text and name in page.text
    assert ["seed", VISIBLE] in page.tables[-1] and not set(page.raw) & set(map(chr, [*range(9), *range(11, 32), 127]))
    _, page = draw(build(tmp_path / r"a$\b{$"), build(tmp_path / "_hidden", recipe="loss = '<b>'\n"))     # no TeX; and names that matplotlib hides
    assert page.text.count(r"a$\b{$") > 5 and page.text.count("_hidden") > 5


def test_answers_stand_side_by_side_for_the_same_prompts(two):
    page = two[2]
    assert len(page.tags("h4")) == 2 * 5 and page.text.count("t = 2, 3 tokens") == 10 and page.text.count(", cut off") == 2 * 3
    assert page.text.index("an answer 0/4") < page.text.index("an answer 1/4") < page.text.index("an answer 2/4") and "2/5" not in page.text


def test_a_long_answer_is_cut_and_says_so(tmp_path):
    _, page = draw(build(tmp_path / "run", T=1, reply="y" * 9000))
    assert "y" * 4000 in page.text and "y" * 4001 not in page.text and "5,004 more characters" in page.text


def test_two_judges_never_share_a_column_or_a_panel(tmp_path):
    runs = [build(tmp_path / name, T=1) for name in ("one", "two")]
    write_json(runs[0] / "iter_1" / "again.json", evaluation(1, judge="pairrm judge-B", win_rate=12.3, win_rate_ci=[10, 14], invalid=7, n=99))
    rows = {"alpaca_eval": {"judge": "gpt-x", "win_rate": 33.3, "standard_error": 1.5, "lc_win_rate": 35.5, "avg_length": 1999},
            "mt_bench": {"judge": "gpt-x", "score": 7.51, "turn_1": 7.9, "turn_2": 7.12, "categories": {"math": 5.25, "<i>": 6.5}},
            "arena_hard": {"judge": "gpt-y", "win_rate": 44.4, "ci": [42.5, 46.0], "avg_tokens": 600}}
    for name, row in rows.items():
        write_json(runs[1] / "iter_1" / f"{name}.json", {"bench": name, "date": "2026-11-20", "n": 80, "invalid": 0} | row)
    write_json(runs[1] / "iter_1" / "mine.json", {"bench": "ifeval", "judge": "rules", "n": 541, "strict": 55.25})
    printed, page = draw(*runs)
    top = page.tables[0][0]
    heads = ["win_rate [1] pairrm judge-A", "win_rate [2] pairrm judge-B", "alpaca_eval [3] gpt-x", "arena_hard [4] gpt-y", "ifeval [5] rules"]
    assert [t.strip() for t in top[1:]] == [*heads, "mt_bench [6] gpt-x", "training pairs"]
    head, first, other = page.tables[0][1], page.tables[0][3], page.tables[0][5]
    assert [c for c, h in zip(first, head) if h == "win rate"] == ["53.3%51.3 – 55.3%", "12.3%10.0 – 14.0%", "-", "-"]
    assert [c for c, h in zip(other, head) if h == "win rate"] == ["53.3%51.3 – 55.3%", "-", "33.3%30.4 – 36.2%", "44.4%42.5 – 46.0%"]
    assert [other[head.index(h)] for h in ("score", "turn 1", "turn 2", "strict", "characters")] == ["7.51", "7.90", "7.12", "55.25", "1,999"]
    assert all("win_rate, judge: pairrm judge-B; date 2026-11-21; n 99; invalid replies: 7 (one t = 1)" in told for told in (printed, page.text))
    panels = [title for title in re.findall(r"<div><p>(.*?)</p><svg", page.raw)]
    judges = ("pairrm judge-A", "pairrm judge-B", "alpaca_eval by gpt-x", "arena_hard by gpt-y")
    assert [panels.count(f"win rate %, {judge}") for judge in judges] == [2] * 4
    assert "strict, ifeval by rules" in panels and "score, mt_bench by gpt-x" in panels
    assert any(table[0] == ["run", "t", "math", "<i>"] and table[1] == ["two", "1", "5.25", "6.50"] for table in page.tables)
    shutil.copy(runs[1] / "iter_1" / "arena_hard.json", runs[1] / "iter_1" / "hard2.json")
    done = run("-m", "nanoaipo.report", runs[1])
    assert done.returncode == 1 and "hard2.json: arena_hard by gpt-y is in another file" in done.stderr


def test_shards_are_one_file_and_unfinished_ones_none(tmp_path):
    whole, parts = build(tmp_path / "whole", T=1), build(tmp_path / "parts", T=1)
    for stage in ("candidates", "pairs"):
        path = parts / "iter_1" / f"{stage}.jsonl"
        rows = [json.loads(line) for line in open(path)]
        for k in (0, 1):
            shard = parts / "iter_1" / f"{stage}-0000{k}-of-00002.jsonl"
            write(shard, rows[k::2])
            counts = {"candidates": {"too_long": 3 * (k == 0), "responses": 80, "prompts": 20}, "pairs": {"prompts": 20, "pairs": 20, "identical": 617}}[stage]
            write_json(shard.with_suffix(".manifest.json"), {"counts": counts, "summary": {"longer_won": 0.5 + 0.5 * k, "longer_won_n": 10 + 20 * k}})
        path.unlink()
        (parts / "iter_1" / f"{stage}.manifest.json").unlink()
    _, page = draw(whole, parts)
    assert correlation("whole", page) == correlation("parts", page)
    one, other = page.tables[1][1:]
    assert one[1:6] == other[1:6] and (one[6], other[6]) == ("81%", "88%")
    assert page.tables[2][2][1:] == page.tables[2][3][1:] and "160" in page.tables[2][3]
    (parts / "iter_1" / "candidates-00001-of-00002.jsonl").unlink()
    _, page = draw(parts)
    assert "Fig. 5" not in page.text and "Fig. 4" in page.text


def test_an_unfinished_run_and_runs_with_parts_missing(tmp_path):
    early = build(tmp_path / "early", T=0)
    assert "Fig. 2" in draw(early)[1].text
    (early / "recipe.py").unlink()
    (early / "iter_0" / "answers.jsonl").unlink()
    page = draw(early)[1]
    assert [a.get("id") for a in page.tags("section")] == ["results", "figures"]
    training = build(tmp_path / "training", T=2)
    (training / "iter_2" / "eval.json").unlink()
    (training / "iter_2" / "answers.jsonl").unlink()
    printed, page = draw(training)
    assert next(line.split() for line in printed.splitlines() if line.startswith("training   2"))[2:] == ["-"] * 7 + ["-1.25", "-8.50", "13.5", "6.5"]
    bare = build(tmp_path / "bare", T=1)
    write(bare / "iter_1" / "candidates.jsonl", [{"prompt": "q", "responses": ["a", "b"]}])
    write(bare / "iter_1" / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    write_json(bare / "iter_1" / "eval.json", evaluation(1, accuracy=None, accuracy_ci=None, length=120.0, length_unit="characters"))
    printed, page = draw(bare)
    assert "characters" in printed and "Fig. 5" not in page.text and "Fig. 6" not in page.text
    assert page.tables[1][1][2:] == ["1", "0.000", "-", "-", "81%"]
    assert run("-m", "nanoaipo.report", tmp_path / "nowhere").stderr.strip().endswith("has iterate.sh evaluated an iteration?")
    (bare / "iter_1" / "eval.json").write_text("{")
    done = run("-m", "nanoaipo.report", bare)
    assert done.returncode == 1 and "eval.json: not JSON" in done.stderr and "Traceback" not in done.stderr


def test_ablations_are_drawn_when_the_runs_are_there(tmp_path):
    runs = [build(tmp_path / f"run{k}", T=1 + k % 2, n=20, recipe=f"beta = {0.1 + k}\n") for k in range(3)]
    _, page = draw(*runs)
    assert "run0: T = 1, P = 20; run1: T = 2, P = 20" in page.text and "Fig. 7" in page.text and "beta 1.1" in page.text
    _, page = draw(*runs[:2])
    assert "Fig. 1 " in page.text.replace("Fig. 1:", "Fig. 1 ") and "Fig. 7" not in page.text


def test_names_of_runs_that_are_equal_become_paths(tmp_path):
    a, b = build(tmp_path / "a" / "run", T=0), build(tmp_path / "b" / "run", T=0)
    printed, page = draw(a, b, where=tmp_path)
    assert str(a) in page.text and str(b) in page.text


def test_a_page_of_many_dots_and_long_answers_stays_small(tmp_path):
    _, page = draw(build(tmp_path / "run", T=4, n=600, reply="word " * 4000))
    assert len(page.raw) < 1.2e6 and "n = 9,600" in page.text


# ---- in a real browser ----


def chromium(tmp_path, page, *flags, dark=False):
    """Headless Chromium on a page; what it printed."""
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", *(f"--disable-{what}" for what in off),
               f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}", *flags, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose texts try to break out, down to the script that would rename it, and to break the layout."""
    folder = tmp_path_factory.mktemp("hostile")
    wide = "unbroken" * 200 + " שלום עולם " + EVIL
    draw(build(folder / ("r" * 120), reply=wide, prompt=wide, recipe=f"model = {'m' * 300!r}\n", longer=3.0), build(folder / "b", judge="j" * 200))
    return folder / "report.html"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: the page is not opened in a browser")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_light_and_dark(hostile, tmp_path, dark):
    from PIL import Image
    chromium(tmp_path, hostile, f"--screenshot={tmp_path}/shot.png", "--window-size=1200,1600", dark=dark)
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("L")).astype(float)
    assert pixels.shape == (1600, 1200) and pixels.std() > 5 and np.bincount(pixels.astype(int).ravel()).argmax() == (23 if dark else 255)
    ink = (pixels > 150).mean() if dark else (pixels < 110).mean()
    assert ink > 0.003


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: the page is not opened in a browser")
def test_nothing_planted_runs_and_nothing_is_wider_than_a_phone(hostile, tmp_path):
    dom = chromium(tmp_path, hostile, "--dump-dom")
    assert "<title>pwned" not in dom and "pwned" in dom and "- nanoAIPO</title>" in dom
    inner = html.escape(open(hostile, encoding="utf-8").read())
    frames = "".join(f'<iframe id=f{w} style="width:{w}px;height:900px;border:0" srcdoc="{inner}"></iframe>' for w in (400, 1200))
    script = "onload = () => out.textContent = [f400, f1200].map(f => f.contentDocument).map(d => " \
             "d.documentElement.scrollWidth + ' ' + d.querySelectorAll('svg').length).join(' ')"
    (tmp_path / "frame.html").write_text(f"<!doctype html><meta charset=utf-8>{frames}<p id=out></p><script>{script}</script>", encoding="utf-8")
    measured = re.search(r'<p id="out">([^<]*)</p>', chromium(tmp_path, tmp_path / "frame.html", "--dump-dom"))[1].split()
    assert measured == ["400", measured[1], "1200", measured[1]] and int(measured[1]) > 10
