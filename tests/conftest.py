"""Fixtures that tests of several folders share."""

import shutil
from pathlib import Path

import jax
import pytest
from command import Merge
from families import write_family

jax.config.update("jax_num_cpu_devices", 8)  # fake ones, for meshes; a subprocess does not inherit them

SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference material that is kept next to the repository and not in it."""
    if not SHARED.is_dir():
        pytest.skip(f"reference material absent: {SHARED} is not a directory")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Outputs of the official PyTorch code; its README.md says how each was made."""
    return shared / "golden"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """base, math and law as directories, for reading only."""
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def merge(pristine: Path, tmp_path: Path, monkeypatch, tmp_path_factory) -> Merge:
    """The command line over a family of the test's own, free to be damaged."""
    monkeypatch.setenv("DPPA_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return Merge(tmp_path)
