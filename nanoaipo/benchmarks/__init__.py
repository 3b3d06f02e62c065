"""AlpacaEval 2.0, MT-Bench and Arena-Hard: scores of judgment files in their official formats, and such files from a judge.

    scores = BENCHMARKS["mt_bench"].score(judgments, name, answers, tables)
    rows = BENCHMARKS["mt_bench"].judge(folder, answers, baseline, judge, asked)

Published judgments and our own go through the same functions. Rates are in percent. What a judge is asked, and about what, stands in
the benchmarks' own files (`folder`: a clone of theirs); nothing of them is kept here.
"""
import collections

from nanoaipo.benchmarks.alpaca_eval import judge_alpaca_eval, score_alpaca_eval
from nanoaipo.benchmarks.arena_hard import judge_arena_hard, score_arena_hard
from nanoaipo.benchmarks.mt_bench import judge_mt_bench, score_mt_bench

Benchmark = collections.namedtuple("Benchmark", "score judge")
BENCHMARKS = {"alpaca_eval": Benchmark(score_alpaca_eval, judge_alpaca_eval), "mt_bench": Benchmark(score_mt_bench, judge_mt_bench),
              "arena_hard": Benchmark(score_arena_hard, judge_arena_hard)}
