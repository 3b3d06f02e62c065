"""What the report warns of: answers that grow, and a win rate that rises while the guard falls.

Both name the run and its iterations. nanoaipo/guard.py says why the second is not noise.
"""

from nanoaipo.guard import GUARDS, guard_interval, lies_above
from nanoaipo.report.runs import (
    LENGTH,
    Column,
    all_iterations,
    field_title,
    format_number,
    is_number,
)
from nanoaipo.stats import LENGTH_ALARM

# ---- length ----


def length_alarm(scores):
    """How many times as long as the baseline's the answers are, if alarmingly long; else None.

    As {"ratio", "length", "baseline", "unit"}.
    """
    units = [unit for unit in LENGTH if is_number(scores.get(unit)) and scores[unit]]
    baseline = scores.get("baseline_length")
    if not units or not is_number(baseline) or not baseline:
        return None
    unit = units[0]
    length = scores[unit]
    if length <= LENGTH_ALARM * baseline:
        return None
    return {"ratio": length / baseline, "length": length, "baseline": baseline, "unit": unit}


def length_alarms(runs):
    """{name: alarms of its iterations}: those of length_alarm, with their "t"."""
    alarms = {}
    for name, t, iteration in all_iterations(runs):
        found = [length_alarm(scores) for scores in iteration["scores"].values()]
        found = [alarm for alarm in found if alarm]
        if found:
            # two judges have read the same answers, so one of them is enough
            alarms.setdefault(name, []).append(found[0] | {"t": t})
    return alarms


# ---- guard ----


def guards_of(all_scores):
    """[Column]: what is said of an iteration's answers without a judge; {Source: scores}."""
    guards = {}
    for source, scores in all_scores.items():
        for field in (*GUARDS, scores.get("guard")):  # the last of lm-evaluation-harness
            # two judges have read the same answers, so the first of them is enough
            if is_number(scores.get(field)):
                guards.setdefault((source.bench, field), Column(source, field))
    return list(guards.values())


def without_guard(runs):
    """Names of the runs of which nothing is known but what a judge says."""
    names = []
    for name, run in runs.items():
        if not any(guards_of(iteration["scores"]) for iteration in run["iterations"].values()):
            names.append(name)
    return names


def guard_falls(run):
    """[(t, guard, s, source)]: from iteration s to t the guard fell and a win rate rose.

    The guard is a Column, the source says whose win rate. Of several s it is the one with the best
    guard, of several judges the first.
    """
    iterations = {t: iteration["scores"] for t, iteration in run["iterations"].items()}
    falls = []
    for t, after in iterations.items():
        for guard in guards_of(after):
            found = []
            for s, before in iterations.items():
                source = win_rate_that_rose(before, after)
                if s < t and source and guard_fell(before, after, guard):
                    found.append((before[guard.source][guard.field], s, source))
            if found:
                _, s, source = max(found)
                falls.append((t, guard, s, source))
    return falls


def guard_fell(before, after, guard):
    """Whether a guard's interval lies wholly below an earlier one; both are {Source: scores}."""
    earlier = guard_interval(before.get(guard.source, {}), guard.field)
    later = guard_interval(after[guard.source], guard.field)
    return lies_above(earlier, later)


def win_rate_that_rose(before, after):
    """The first Source whose win rate's interval lies wholly above an earlier one, else None."""
    for source, scores in after.items():
        earlier = before.get(source, {}).get("win_rate_ci")
        if lies_above(scores.get("win_rate_ci"), earlier):
            return source
    return None


def guard_alarms(runs):
    """{name: a sentence per iteration and guard that fell while a win rate rose}."""
    alarms = {}
    for name, run in runs.items():
        for t, guard, s, source in guard_falls(run):
            before = run["iterations"][s]["scores"]
            after = run["iterations"][t]["scores"]
            wins = two_numbers(before, after, Column(source, "win_rate"))
            truths = two_numbers(before, after, guard)
            alarms.setdefault(name, []).append(
                f"from t = {s} to t = {t} the win rate by {source.judge} rose from {wins}, "
                f"but {guard_in_words(guard)} fell from {truths}"
            )
    return alarms


def guard_in_words(guard):
    """What fell: "the accuracy", "the guard's accuracy" or "exact_match of lm_eval gsm8k"."""
    words = GUARDS.get(guard.field, field_title(guard.field))
    if guard.source.bench == "win_rate":
        return f"the {words}"
    if guard.source.bench == "guard":
        return f"the guard's {words}"
    return f"{words} of {guard.source.bench}"


def two_numbers(before, after, column):
    """The numbers of a column in two iterations, as text."""
    source, field = column
    earlier = format_number(before[source][field], field)
    later = format_number(after[source][field], field)
    return f"{earlier} to {later}"
