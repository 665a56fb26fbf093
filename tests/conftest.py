"""Fixtures that tests of several folders share, and the cache of compilations that all processes of a run share."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # set before JAX is imported, and for the processes of this one
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dppa_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import pytest
from command import Merge
from families import write_family

from dppa_jax import demo

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
def trained(tmp_path_factory) -> Path:
    """The demo family of seed 0, trained once for all processes of the run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPPA_JAX_CACHE", str(root / "cache"))
        return demo.directory("base").parent


@pytest.fixture
def family(trained: Path, monkeypatch) -> list[str]:
    """Flags of the demo family's models."""
    monkeypatch.setenv("DPPA_JAX_CACHE", str(trained.parent))
    return ["--base=demo:base", *(f"--expert={name}=demo:{name}" for name in ("math", "finance", "law"))]


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
