"""The page of findings is what its script writes: bench/findings.py."""

import re

import findings  # of bench/, where conftest.py looks too
from conftest import ROOT

PAGE = ROOT / "docs" / "findings.md"


def test_every_fixed_line_of_the_script_stands_on_the_page():
    fixed = [line for line in findings.PAGE.splitlines() if "{" not in line]

    written = PAGE.read_text(encoding="utf-8").splitlines()

    assert [line for line in fixed if line not in written] == []


def test_the_page_links_to_files_that_are_there():
    links = re.findall(r"\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))

    assert "findings_why.md" in links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
