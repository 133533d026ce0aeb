"""For every tier."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_remains() -> None:
    """Collects what the tests of other files left in reference cycles (a `pytest.raises` makes one).

    Descriptors and mappings that go away in the middle of a test would disturb the counts of those that look for leaks.
    """
    gc.collect()
