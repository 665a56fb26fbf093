"""A merge by several real processes: the bits of one, its own bytes for each, and one directory or none."""

import signal
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors reads bfloat16 with it
import numpy as np
import pytest
from command import Merge
from families import edit_tensors, read_json, write_family
from processes import IMPATIENT, LAUNCH, check_success, finish, run_processes, said, start_processes
from safetensors.numpy import load_file

LAYERS = 5
DPPA = ["--method=dppa", "--rate=0.8", "--factors=1.8,1.3", "--coefficient=0.4"]
DARE = ["--method=dare", "--rate=0.7"]  # no survey, no thresholds: little to compile

INTERFERING = """
import os, signal
from dppa_jax import launch
from dppa_jax.checkpoint import SafetensorsWriter

write_rows = SafetensorsWriter.write_rows
left = [{before}]

def killed(self, *arguments):
    write_rows(self, *arguments)
    left[0] -= 1
    if not left[0] and {process} == launch.FLAGS.process_id:
        os.kill(os.getpid(), signal.SIGKILL)

SafetensorsWriter.write_rows = killed
launch.run()
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"), num_hidden_layers=LAYERS)


@pytest.fixture
def merge(family, tmp_path) -> Merge:
    found = Merge(family)
    found.output = tmp_path / "out"
    return found


def tensors(directory: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(directory: Path, wanted: Path) -> None:
    found, of_one = tensors(directory), tensors(wanted)
    assert found.keys() == of_one.keys()
    assert not [name for name in found if found[name].tobytes() != of_one[name].tobytes()]
    assert read_json(directory / "recipe.json")["experts"] == read_json(wanted / "recipe.json")["experts"]


@pytest.fixture
def of_one(merge, tmp_path):
    """of_one(flags): the merge by one process."""

    def run(flags: list[str]) -> Path:
        merge(*flags, f"--output={tmp_path / 'one'}")
        return tmp_path / "one"

    return run


@pytest.mark.slow
def test_two_processes_rank_the_heads_and_neurons_of_their_own_layers(merge, of_one):
    """The counts of what is gone are those of the whole model."""
    flags = ["--method=magnitude", "--score=group", "--rate=0.5"]
    check_success(run_processes(2, [*LAUNCH, *merge.flags(), *flags], devices=2))
    assert_same(merge.output, of_one(flags))


@pytest.mark.slow
def test_two_processes_solve_for_the_linears_of_their_own_layers(merge, of_one, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"word{n} word{59 - n} word{n // 2}" for n in range(60)))
    flags = ["--method=regmean", f"--calibration={tmp_path / 'text.txt'}"]
    check_success(run_processes(2, [*LAUNCH, *merge.flags(), *flags], devices=2))
    assert_same(merge.output, of_one(flags))


def test_two_processes_make_the_bits_of_one_from_their_own_layers_alone(merge, of_one):
    check_success(run_processes(2, [*LAUNCH, *merge.flags(), *DPPA], devices=2))
    assert_same(merge.output, of_one(DPPA))

    sizes = {name: array.nbytes for name, array in tensors(merge.base).items()}
    second = [f"model.layers.{layer}." for layer in (3, 4)] + ["model.norm", "lm_head"]
    own = [0, 0]
    surveyed = [0, 0]
    for name, size in sizes.items():
        process = int(name.startswith(tuple(second)))
        own[process] += size
        surveyed[process] += size * name.startswith("model.layers")
    cost = read_json(merge.output / "recipe.json")["cost"]["processes"]
    models = 3
    assert cost["bytes_read"] == [models * (a + b) for a, b in zip(own, surveyed, strict=True)]
    files = sorted(merge.output.glob("*.safetensors"))
    assert [file.stat().st_size for file in files] == cost["bytes_written"]
    assert [sum(array.nbytes for array in load_file(file).values()) for file in files] == own


@pytest.mark.slow
@pytest.mark.parametrize("flags", [DARE, [*DARE, "--prune=all"], ["--method=magnitude", "--prune=backbone"]], ids=str)
def test_more_processes_than_layers_make_the_bits_of_one(flags, tmp_path):
    merge = Merge(write_family(tmp_path, num_hidden_layers=3))
    check_success(run_processes(4, [*LAUNCH, *merge.flags(), *flags]))
    merge(*flags, f"--output={tmp_path / 'one'}")
    assert_same(merge.output, tmp_path / "one")


@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_process_ends_the_others_with_the_reason_and_a_rerun_goes_on(merge, of_one, process):
    before = int(np.random.default_rng().integers(2, 20))
    code = IMPATIENT + INTERFERING.format(before=before, process=process)
    started = start_processes(2, [sys.executable, "-c", code, *merge.flags(), *DARE])
    ended = finish(started, 120)
    assert ended[process].returncode == -signal.SIGKILL
    other = ended[1 - process]
    assert other.returncode
    assert "another task died" in other.stderr, said(ended)
    assert not merge.output.exists()

    again = run_processes(2, [*LAUNCH, *merge.flags(), *DARE])
    check_success(again)
    assert "goes on after" in said(again[process : process + 1]), f"killed after {before} writes"
    assert_same(merge.output, of_one(DARE))


def test_error_of_one_process_is_told_by_all_and_leaves_nothing(merge, tmp_path):
    merge = Merge(write_family(tmp_path))
    edit_tensors(merge.law / "model.safetensors", lambda arrays: arrays["lm_head.weight"].__setitem__((3, 1), np.nan))
    ended = run_processes(2, [*LAUNCH, *merge.flags(), *DARE])
    assert [process.returncode for process in ended] == [1, 1], said(ended)
    assert "lm_head.weight of 'law' holds 1 NaN or Inf" in ended[1].stderr
    assert "error: process 1: " in ended[0].stderr
    assert "lm_head.weight of 'law' holds 1 NaN or Inf" in ended[0].stderr
    assert not list(tmp_path.glob("out*"))


OTHER_SECRETS = """
import os, sys
os.environ["DPPA_JAX_SECRET"] = sys.argv[-1]  # --process_id=…
from dppa_jax import launch
launch.run()
"""


@pytest.mark.slow
def test_processes_of_different_secrets_say_so_before_they_work(merge):
    ended = run_processes(2, [sys.executable, "-c", OTHER_SECRETS, *merge.flags(), *DARE], timeout=60)
    assert [process.returncode for process in ended] == [1, 1], said(ended)
    for process, of_process in enumerate(ended):
        message = f"error: process {1 - process} has another $DPPA_JAX_SECRET than process {process}, or another job"
        assert message in of_process.stderr
        assert "Traceback" not in of_process.stderr
    assert not merge.output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=here"], "--coordinator=here: give HOST:PORT of process 0, or auto."),
        (["--coordinator=here:1"], "--coordinator=here:1 needs --num_processes and --process_id."),
        (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], "--process_id=0 to --process_id=1."),
        (["--num_processes=2", "--process_id=0"], "need --coordinator=HOST:PORT, the first process's address."),
        (["--coordinator=here:1", "--job=inspect"], "--job=inspect takes one process: leave out --coordinator."),
    ],
)
def test_processes_that_cannot_be_meant_are_refused(merge, flags, message):
    assert message in merge.refusal(*flags)
