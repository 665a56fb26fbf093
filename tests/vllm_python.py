"""The interpreter that has vLLM, which lives in an environment of its own."""

import os

import pytest

VARIABLE = "DPPA_JAX_VLLM_PYTHON"


def vllm_python() -> str:
    """The interpreter named by the environment; skips the test if there is none."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"vLLM is not tested: {VARIABLE} does not name the Python of an environment that has it")
    return python
