"""Fixtures that tests of several folders share, and a directory that all processes of a run share.

It is $DPPA_JAX_TEST_CACHE, which several runs may share, or a directory of this run alone. It keeps compilations, by
program and compiler, and the demo family, by the code that trains it.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from command import Merge
from families import write_family
from training import write_material

from dppa_jax import demo

jax.config.update("jax_num_cpu_devices", 8)  # fake ones, for meshes; a subprocess does not inherit them

if "DPPA_JAX_TEST_CACHE" not in os.environ:  # the workers of pytest-xdist find it set
    os.environ["DPPA_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="dppa_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["DPPA_JAX_TEST_CACHE"], ignore_errors=True)
CACHE = Path(os.environ["DPPA_JAX_TEST_CACHE"])
COMPILATIONS = {
    "jax_compilation_cache_dir": str(CACHE / "xla"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
for option, value in COMPILATIONS.items():
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)  # for the processes that tests start

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


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A model to fine-tune by the command line, and sums to learn."""
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def trained() -> Path:
    """The demo family of seed 0, trained once for all processes of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPPA_JAX_CACHE", str(CACHE))
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
