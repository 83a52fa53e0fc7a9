"""The cost of a split vocabulary: its numbers are those of the code, and docs/vocabulary_split.md has its table."""

from pathlib import Path

import pytest

from benchmarks import split_cost

PAGE = Path(__file__).parents[2] / "docs" / "vocabulary_split.md"


def test_the_page_has_the_table():
    assert "\n".join(split_cost.table()) in PAGE.read_text()


def test_bytes_of_the_longest_search():
    """At most 600 bytes a token for 8 ranks, 64 where the nucleus is the whole vocabulary; README has the first."""
    longest = split_cost.ring_bytes(split_cost.numbers_of(split_cost.ROUNDS["float32"]))
    assert longest == 2 * 7 / 8 * 4 * (7 + 3 * 16 + 5) <= 600
    assert f"at most {longest:.0f} bytes a token for 8 ranks" in (PAGE.parents[1] / "README.md").read_text()
    assert split_cost.ring_bytes(split_cost.SUMS + 1) <= 64


def test_seconds_by_hand():
    link = split_cost.Link("a link", 1e-5, 1e9)
    sent = 4096 * 2 * 7 / 8 * 4 * (7 + 3 * 8 + 5)
    assert split_cost.seconds_of_ranks(link, 8) == pytest.approx(14 * 1e-5 + sent / 1e9)
    assert split_cost.seconds_of_gathering(link, 2) == pytest.approx(1e-5 + 4096 * 7 / 8 * 151_936 * 2 / 1e9)
