"""Whatever system call fails, or kills the run: nothing is lost, no final name holds a part, and a rerun ends the work.

A small library stands before libc (faults.c). It counts the calls that write, flush, rename, remove or open something
below one directory, and at a random one it kills the process or lets the call fail.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import tree
from families import write_family

HERE = Path(__file__).parent
RUNS = int(os.environ.get("DPPA_JAX_FAULTS", "30"))  # of each job; more look at more calls
FAULTS = (0, 0, errno.EIO, errno.ENOSPC)  # 0: the process is killed
LAST_CALLS = 40
SEED = 20261127


class Server:
    """A process that runs command lines, each in a fork of its own."""

    def __init__(self, root: Path):
        library, self.log = root / "faults.so", root / "log"
        compiler = os.environ.get("CC") or shutil.which("cc") or pytest.skip("NO C COMPILER: no fault was injected")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, HERE / "faults.c", "-ldl"], check=True
        )
        environment = {**os.environ, "LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "DPPA_JAX_CACHE": str(root / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, HERE / "server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, flags: list[str], *fault) -> tuple[int, str]:
        """Run a command line; return the status of the process and what it printed."""
        print(json.dumps([flags, fault, str(self.log)]), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline()), self.log.read_text(errors="replace")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_family(tmp_path_factory.mktemp("models"))


def flags_of(job: str, models: Path, root: Path) -> list[str]:
    """A command line that writes below root."""
    if job == "convert":
        return ["--job=convert", f"--base={models / 'base'}", f"--output={root / 'out'}", "--output_dtype=float32"]
    experts = [f"--expert={name}={models / name}" for name in ("math", "law")]
    merge = [f"--base={models / 'base'}", *experts, f"--output={root / 'out'}", "--method=magnitude", "--rate=0.5"]
    if job == "overwrite":
        return [*merge, "--overwrite"]
    return [*merge, f"--save_delta={root / 'deltas'}", "--max_shard_size=20000"]


OUTPUTS = {"merge": ("out", "deltas/math", "deltas/law"), "convert": ("out",), "overwrite": ("out",)}


def weights(directory: Path) -> dict[str, bytes]:
    """The files of a model but those that tell the time."""
    return {name: content for name, content in tree(directory).items() if name not in ("recipe.json", "README.md")}


@pytest.mark.slow
@pytest.mark.parametrize("job", OUTPUTS)
def test_no_fault_loses_anything_or_leaves_a_part_under_a_final_name(server, models, tmp_path, job):
    inputs, generator = tree(models), np.random.default_rng(SEED)
    undisturbed = tmp_path / "undisturbed"
    status, said = server(flags_of(job, models, undisturbed), str(undisturbed), 10**9, 0, 0)
    assert status == 0, said
    calls = int(said.splitlines()[-1])
    wanted = {name: weights(undisturbed / name) for name in OUTPUTS[job]}
    old = weights(models / "law")
    killed = failed = 0
    for run in range(RUNS):
        root = tmp_path / str(run)
        if job == "overwrite":
            shutil.copytree(models / "law", root / "out")
        first = 1 if run % 2 else calls - LAST_CALLS  # those that give the names are few among many writes
        count, number = int(generator.integers(first, calls + 1)), int(generator.choice(FAULTS))
        stays = int(generator.integers(2))  # as on a disk that stays full
        status, said = server(flags_of(job, models, root), str(root), count, number, stays)
        what = f"run {run}: {'killed' if not number else errno.errorcode[number]} at call {count}: {status}: {said}"
        killed, failed = killed + (status == -9), failed + (status == 1)
        assert status in (0, 1) if number else status in (0, -9), what
        assert status != 1 or "error: " in said, what
        assert tree(models) == inputs, what
        complete = 0
        for name in OUTPUTS[job]:
            if (root / name).exists():
                found = {file: content for file, content in weights(root / name).items() if not unfinished(file)}
                assert found in (wanted[name], old) if job == "overwrite" else found == wanted[name], f"{what}: {name}"
                complete += found == wanted[name]
        assert job != "overwrite" or (root / "out").exists(), what
        status, said = server(flags_of(job, models, root))
        done = complete == len(OUTPUTS[job]) and "is not empty" in said
        assert status == 0 or done, f"{what}; then again: {said}"
        for name in OUTPUTS[job]:
            assert weights(root / name) == wanted[name], f"{what}: {name} after a rerun"
        assert {path.name for path in root.iterdir()} == {name.split("/")[0] for name in OUTPUTS[job]}, what
        shutil.rmtree(root)
    assert killed > RUNS // 4, "the calls are not reached"
    assert failed > RUNS // 10, "the calls are not reached"


def unfinished(file: str) -> bool:
    """Is it a note of a run whose other outputs had not their names yet?"""
    return file == ".dppa_jax.json" or file.endswith(".jsonl")
