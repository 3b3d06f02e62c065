"""AlpacaEval 2.0, MT-Bench, Arena-Hard, WildBench: scores of judgments, and judgments by a judge.

    scores = BENCHMARKS["mt_bench"].score(judgments, model, answers="", lc_data="", baseline="")
    rows = BENCHMARKS["mt_bench"].judge(ask, bench_data, answers, baseline, judge_model)

A benchmark is a file with these two functions, the SUFFIX of its judgments files, an entry below,
and one in answers.JUDGMENT_FIELDS. Published judgments and our own go through the same `score`;
rates are in percent. `ask` takes questions to the judge and returns its replies, in their order. A
verdict that stands in the thought of a reply is none (verdicts.without_thought). What a judge is
asked, and about what, stands in the benchmark's own files (`bench_data`: a clone of its
repository); nothing of them is kept here.
"""

from nanoaipo.benchmarks import alpaca_eval, arena_hard, mt_bench, wild_bench

BENCHMARKS = {
    "alpaca_eval": alpaca_eval,
    "mt_bench": mt_bench,
    "arena_hard": arena_hard,
    "wild_bench": wild_bench,
}
