"""What a check found, and how that is written: a line, a JSON record, a row of a table."""

import json
import math
import time


class Skip(Exception):
    """A check that has nothing to do here; its text says why."""


class Report:
    """A check is a function that takes one of these and fills it."""

    def __init__(self):
        self.differences = {}  # by name: (the largest so far, its limit)
        self.statements = {}  # by name: whether it is true
        self.measured = []  # (what, text), rows for bench/RESULTS.md

    def below(self, name, value, limit):
        """Note a difference that has to be below its limit; of one name the largest counts."""
        value = float(value)
        if math.isnan(value):
            value = math.inf
        if name in self.differences:
            value = max(value, self.differences[name][0])
        self.differences[name] = (value, limit)

    def holds(self, name, is_true):
        """Note a statement that has to be true, each time that it is made."""
        self.statements[name] = self.statements.get(name, True) and bool(is_true)

    def measure(self, what, text):
        """Note a measurement."""
        self.measured.append((what, text))

    def figures(self):
        """The differences and the true statements, as texts."""
        texts = [f"{name} {value:.1e}" for name, (value, _) in self.differences.items()]
        return texts + [name for name, is_true in self.statements.items() if is_true]

    def wrong(self):
        """What is not as it has to be, as texts."""
        texts = []
        for name, (value, limit) in self.differences.items():
            if not value < limit:
                texts.append(f"{name} {value:.1e}, not below {limit:.1e}")
        for name, is_true in self.statements.items():
            if not is_true:
                texts.append(f"not true: {name}")
        return texts


# ---------------------------------------------------------------------------- as text


def short_name(record):
    return record["name"].removeprefix("bench.gpu.")


def outcome(record):
    """Why a check failed or was skipped, and its figures, in one line."""
    texts = [record.get("reason", ""), *record.get("figures", [])]
    return "; ".join(text for text in texts if text)


def line(record):
    """The line of a check, its measurements included."""
    texts = [outcome(record)]
    texts += [f"{what}: {text}" for what, text in record.get("measured", [])]
    found = "; ".join(text for text in texts if text)
    return f"{record['status']} {short_name(record):28} {record['seconds']:5.1f} s  {found}"


def write_down(record, path):
    """Print the line of a check and append its record to a JSONL file."""
    print(line(record), flush=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def markdown(described, records, dry):
    """Two tables for bench/RESULTS.md, below a paragraph on the machine.

    described: {what: text} of the machine. records: of all checks.
    """
    command = "bash bench/gpu.sh"
    if dry:
        command += " --dry"
    versions = ", ".join(f"{what} {text}" for what, text in described.items() if text != "none")
    lines = [f"`{command}`, {time.strftime('%Y-%m-%d')}, {versions}.", ""]

    lines += ["| check | | s | largest differences |", "|---|---|---|---|"]
    for record in records:
        text = outcome(record).replace("|", "/")
        row = (short_name(record), record["status"], f"{record['seconds']:.0f}", text)
        lines.append("| " + " | ".join(row) + " |")

    lines += ["", "| measured | |", "|---|---|"]
    for record in records:
        for what, text in record.get("measured", []):
            lines.append(f"| {what} | {text} |")
    return "\n".join(lines) + "\n"
