"""Judgments of a benchmark, written by asking a judge."""

from nanoaipo.errors import InputError
from nanoaipo.questions import ask, n_tokens
from nanoaipo.stages import open_output, write_json_output


def write_judgments(
    benchmark, judgments, manifest, answer, parameters, bench_data, answers, baseline
):
    """Ask a judge what the benchmark asks, write the file of judgments and return their number.

    answer: as endpoints.endpoint or questions.local_model return it. parameters: what each
    question to it has besides the benchmark's own: its model, and what else tells it from others.
    Replies are kept as they come, in NAME.replies beside the file, and none is asked for twice.
    Raises InputError when the judge refuses every question.
    """
    judge_model = parameters["model"]
    replies = []  # of all calls: a benchmark may ask more than once

    def ask_judge(questions):
        new = ask([question | parameters for question in questions], judgments, answer)
        replies.extend(new)

        # a judge that refuses everything is set up wrongly; single refusals are invalid judgments
        if replies and all("error" in reply for reply in replies):
            raise InputError(
                f"--judge_model={judge_model}: not one reply to {len(new)} questions; "
                f"the first: {new[0]['error']}"
            )
        return new

    rows = benchmark.judge(ask_judge, bench_data, answers, baseline, judge_model)
    manifest["counts"] = count_replies(replies)

    # the file appears last, so that one that is there is complete
    if benchmark.SUFFIX == ".json":
        write_json_output(judgments, manifest, rows)
    else:
        with open_output(judgments, manifest) as write:
            for row in rows:
                write(row)
    return len(rows)


def count_replies(replies):
    """Replies, refusals among them, and the tokens they took."""
    counts = {"replies": len(replies), "refused": sum("error" in reply for reply in replies)}
    usage = [reply.get("usage") or {} for reply in replies]
    for kind in ("prompt_tokens", "completion_tokens"):
        counts[kind] = sum(n_tokens(tokens, kind) for tokens in usage)
    return counts
