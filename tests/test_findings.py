"""The page of findings is what its script writes: bench/findings.py."""

import re

import findings  # of bench/, where conftest.py looks too
import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

PAGE = ROOT / "docs" / "findings.md"


def test_every_fixed_line_of_the_script_stands_on_the_page():
    fixed = [line for line in findings.PAGE.splitlines() if "{" not in line]

    written = PAGE.read_text(encoding="utf-8").splitlines()

    assert [line for line in fixed if line not in written] == []


def test_the_page_links_to_files_that_are_there():
    links = re.findall(r"\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))

    assert "findings_why.md" in links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_the_interval_of_a_difference_is_that_of_welchs_test():
    one = [80.0, 84.0, 89.5]
    other = [74.0, 78.0, 81.4]
    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval()

    mean, half = findings.difference(
        (np.mean(one), np.std(one, ddof=1)), (np.mean(other), np.std(other, ddof=1))
    )

    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert "not resolved" in findings.claim_row("x", None, "y")
