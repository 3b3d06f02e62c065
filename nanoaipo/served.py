"""Which model answered: what a server says of it, beside the name that was asked for.

    served = {"gpt-4.1": (Counter(), Counter())}
    count_served(replies, served)
    check_served(served, "pairs.replies")

A provider may send a name to another model from one day to the next, as Google does with
gemini-2.5-pro from December 2026 on. Two models are two judges, under one name too. A system
fingerprint is of the server around the model: it may change, which is counted and printed.
"""

import collections

from nanoaipo.errors import InputError

# ---- replies ----


def nothing_served(names):
    """{name asked for: (Counter of models, Counter of fingerprints)} before any reply."""
    return {name: (collections.Counter(), collections.Counter()) for name in names}


def count_served(replies, served):
    """Count who answered to the names in `served`; a reply that does not say is left out."""
    for reply in replies:
        if "error" in reply or reply.get("asked") not in served:  # older replies lack `asked`
            continue
        models, fingerprints = served[reply["asked"]]
        if "model" in reply:
            models[reply["model"]] += 1
        if "system_fingerprint" in reply:
            fingerprints[reply["system_fingerprint"]] += 1


def check_served(served, path):
    """Raise InputError where a name was answered by two models; path: the file of the replies."""
    for asked, (models, _) in served.items():
        if len(models) > 1:
            names = " and now by ".join(f"'{name}'" for name in models)
            raise InputError(
                f"{path}: '{asked}' was answered by {names} ({counts_of(models)} replies), and two "
                "models are never mixed: ask for a dated snapshot, which stays one model, or "
                "remove the lines of all but one from this file"
            )


def print_served(served):
    """A line where a name was answered by another, and one where the fingerprint has changed."""
    for asked, (models, fingerprints) in served.items():
        for model in models:
            if model != asked:
                print(f"'{asked}' was answered by '{model}'", flush=True)
        if len(fingerprints) > 1:
            names = " and ".join(f"'{name}'" for name in fingerprints)
            print(
                f"'{asked}' was answered with the system fingerprints {names} "
                f"({counts_of(fingerprints)} replies)",
                flush=True,
            )


def counts_of(counter):
    """The counts as text, in the order in which the names came."""
    return " and ".join(map(str, counter.values()))


# ---- judgments and scores ----


def served_fields(reply):
    """What a judgment keeps of who gave its reply: nothing of an error, null where none says."""
    if "error" in reply:
        return {}
    return {
        "served_model": reply.get("model"),
        "system_fingerprint": reply.get("system_fingerprint"),
    }


def served_scores(judgments, path):
    """The scores' served_model, None where no judgment names it, and what else is to be told.

    judgments: objects with the served_fields; path: their file. Beside it stand the number of
    judgments that do not name a model while others do, and how many have which fingerprint.
    Raises InputError where two models have judged.
    """
    said = [row for row in judgments if "served_model" in row]  # else published, tied or refused
    models = collections.Counter(row["served_model"] for row in said)
    n_unknown = models.pop(None, 0)
    if len(models) > 1:
        names = " and by ".join(f"'{name}'" for name in models)
        raise InputError(
            f"{path}: judged by {names} ({counts_of(models)} judgments) under one name; two judges "
            "are never put into one score: split the file by 'served_model', or ask a dated "
            "snapshot for all"
        )

    scores = {"served_model": next(iter(models), None)}
    if models and n_unknown:
        scores["served_unknown"] = n_unknown
    fingerprints = collections.Counter(row.get("system_fingerprint") for row in said)
    del fingerprints[None]
    if fingerprints:
        scores["fingerprints"] = dict(fingerprints)
    return scores


def with_served(judge, served_model):
    """A judge's name, with that of the model that answered to it where this is another."""
    if served_model in (None, judge) or judge == f"judge {served_model}":
        return judge
    return f"{judge} (served {served_model})"
