"""What error messages say about sizes."""

from __future__ import annotations

import pytest

from anchortp.errors import BudgetExceeded, in_words


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (65_536, "65.5 kB (65,536 bytes)"),
        (1_000_000, "1.0 MB (1,000,000 bytes)"),
        (140_633_518_080, "140.6 GB (140,633,518,080 bytes)"),
        (5 * 10**12, "5.0 TB (5,000,000,000,000 bytes)"),
    ],
)
def test_sizes_are_said_twice(num_bytes, text):
    assert in_words(num_bytes) == text


def test_a_budget_says_what_does_not_fit_and_what_to_do():
    error = BudgetExceeded(device="cpu:1", requested_bytes=2_000_000, committed_bytes=7, budget_bytes=1_500_000)
    assert str(error).startswith(
        "cpu:1: 2.0 MB (2,000,000 bytes) more do not fit: 7 bytes of 1.5 MB (1,500,000 bytes) are in use. Give"
    )
