from __future__ import annotations

import pytest


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Whose kernels compute what lies between two matmuls."""
    return request.param
