import pytest


@pytest.fixture(scope="session")
def golden(shared):
    """The outputs of the official PyTorch code."""
    return shared / "golden"
