"""The fixture that the tests of this folder share."""

import pytest


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the losses, on whatever device the test's tensors are made."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="the triton package is not installed")
    return request.param
