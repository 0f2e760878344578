"""The pages name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness.ranks import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)")
PATH = re.compile(r"`((?:a3po_megatron|tests|tools|configs|launchers|slurm|constraints|docs)/[\w./-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_or_names_is_there(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in LINK.findall(text) if not (page.parent / name).exists()]
    missing += [name for name in PATH.findall(text) if not (ROOT / name).exists()]
    assert not missing


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert [
        page.name
        for page in PAGES
        if page.parent.name == "docs" and page.name not in (*LINK.findall(index), "README.md")
    ] == []
