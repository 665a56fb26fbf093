"""What is killed goes on where it was: the same bytes, and no more than a block of work done twice."""

import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors reads bfloat16 with it
import numpy as np
import pytest
from command import Merge, launch, tree
from families import edit_json, edit_tensors
from safetensors.numpy import load_file

DPPA = ["--method=dppa", "--rate=0.8", "--factors=1.8,1.3"]
BLOCK_PARTS = 9  # seven linears and two norms

processes = multiprocessing.get_context("forkserver")  # a fresh process without a second of imports
processes.set_forkserver_preload(["jax", "dppa_jax.jobs.write_merge", "dppa_jax.launch"])


def killed_after(events: int, log: Path, environment: dict, flags: list[str]) -> None:
    """The command line, which writes what it does to a log and kills itself after so many of its writes and notes."""
    from dppa_jax.checkpoint import SafetensorsWriter
    from dppa_jax.runtime.journal import Journal

    os.environ.update(environment)
    left = [events]

    def told(function, key):
        def wrapped(self, *arguments):
            function(self, *arguments)
            with log.open("a") as file:
                file.write(f"{key} {arguments[0]}\n")
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    SafetensorsWriter.write_rows = told(SafetensorsWriter.write_rows, "wrote")
    Journal.add = told(Journal.add, "noted")
    launch(*flags)


def run(events: int, log: Path, flags: list[str]) -> bool:
    """Did it come to its end?"""
    environment = {"DPPA_JAX_CACHE": os.environ["DPPA_JAX_CACHE"], "JAX_PLATFORMS": "cpu"}
    process = processes.Process(target=killed_after, args=(events, log, environment, flags))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def weights(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


def log_of(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.mark.slow
def test_killed_at_random_points_again_and_again_gives_the_same_bytes(merge, tmp_path):
    deltas = tmp_path / "deltas"
    flags = [*merge.flags(), *DPPA, f"--save_delta={deltas}"]
    wanted, wanted_deltas = tmp_path / "undisturbed", tmp_path / "undisturbed deltas"
    assert run(0, tmp_path / "undisturbed log", [*flags, f"--output={wanted}", f"--save_delta={wanted_deltas}"])
    log, generator, kills = log_of(tmp_path), np.random.default_rng(), 0
    points = []
    for _ in range(20):
        points.append(int(generator.integers(3, 70)))
        if run(points[-1], log, flags):
            break
        kills += 1
        assert not merge.output.exists()
    what = f"killed after {points[:-1]} writes and notes"
    assert kills >= 2, what
    assert weights(merge.output) == weights(wanted), what
    for name in ("math", "law"):
        assert weights(deltas / name) == weights(wanted_deltas / name), what

    counts, undisturbed = (Counter(file.read_text().splitlines()) for file in (log, tmp_path / "undisturbed log"))
    again = sum((counts - undisturbed)[event] for event in counts if event.startswith("wrote"))
    directories = 3
    assert again <= kills * BLOCK_PARTS * directories, f"{what}: {again} pieces were written again"
    surveyed = [event for event in counts if event.startswith("noted survey")]
    assert len(surveyed) == 3
    assert sum(counts[event] - 1 for event in surveyed) <= kills, what
    assert sorted(path.name for path in tmp_path.iterdir() if "incomplete" in path.name) == []


@pytest.fixture
def half(merge, tmp_path) -> Merge:
    """A merge that was killed in its middle."""
    assert not run(40, log_of(tmp_path), [*merge.flags(), *DPPA])
    log_of(tmp_path).unlink()
    return merge


def written_by(merge: Merge, *flags: str) -> set[str]:
    """The tensors that a rerun, in a process of its own, writes."""
    assert run(0, log_of(merge.root), [*merge.flags(), *DPPA, *flags])
    lines = (line.split() for line in log_of(merge.root).read_text().splitlines())
    return {words[1] for words in lines if words[0] == "wrote"}


def change_weight(merge: Merge) -> list[str]:
    edit_tensors(merge.math / "model.safetensors", lambda arrays: arrays["model.norm.weight"].__setitem__(0, 2))
    return []


CHANGES = {
    "a weight of an expert": change_weight,
    "config.json": lambda merge: edit_json(merge.base / "config.json", rms_norm_eps=1e-6) or [],
    "factors": lambda merge: ["--factors=1.8,1.2"],
    "layers of a block": lambda merge: ["--block_layers=2"],
    "no resume": lambda merge: ["--noresume"],
}


FAST = ("factors", "bit of a shard", "journal is no text")


@pytest.mark.parametrize(
    "change", [pytest.param(CHANGES[of], id=of, marks=[] if of in FAST else pytest.mark.slow) for of in CHANGES]
)
def test_anything_that_changes_the_merge_starts_it_anew(half, tmp_path, change):
    flags = change(half)
    written = written_by(half, *flags)
    launch(*half.flags(), *DPPA, *flags, f"--output={tmp_path / 'other'}")
    assert weights(half.output) == weights(tmp_path / "other")
    assert written == load_file(half.output / "model.safetensors").keys()


def test_the_same_again_goes_on(half, tmp_path):
    assert written_by(half) < load_file(half.output / "model.safetensors").keys()


@pytest.mark.slow
def test_a_merge_that_solves_for_linears_goes_on_in_the_middle_of_a_layer(merge, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"word{n} word{59 - n} word{n // 2}" for n in range(60)))
    flags = [*merge.flags(), "--method=regmean", f"--calibration={tmp_path / 'text.txt'}"]
    assert not run(2 * (BLOCK_PARTS + 4), log_of(tmp_path), flags)
    log_of(tmp_path).unlink()
    assert run(0, log_of(tmp_path), flags)
    written = {line.split()[1] for line in log_of(tmp_path).read_text().splitlines() if line.startswith("wrote")}
    assert written < load_file(merge.output / "model.safetensors").keys()
    launch(*flags, f"--output={tmp_path / 'undisturbed'}")
    assert weights(merge.output) == weights(tmp_path / "undisturbed")


@pytest.mark.parametrize("resume", [True, False])
def test_conversion_that_was_killed_goes_on(merge, tmp_path, resume):
    output = tmp_path / "out"
    flags = ["--job=convert", f"--base={merge.base}", "--output_dtype=float32", f"--resume={resume}"]
    assert not run(21, log_of(tmp_path), [*flags, f"--output={output}"])
    log_of(tmp_path).unlink()
    assert run(0, log_of(tmp_path), [*flags, f"--output={output}"])
    written = sum(line.startswith("wrote") for line in log_of(tmp_path).read_text().splitlines())
    launch(*flags, f"--output={tmp_path / 'undisturbed'}")
    assert weights(output) == weights(tmp_path / "undisturbed")
    everything = len(load_file(output / "model.safetensors"))
    assert written == (everything - 11 if resume else everything), "it was killed when it had noted the eleventh"
    assert not [name for name in tree(output) if "journal" in name or "identity" in name]


@pytest.mark.slow
def test_journal_of_files_that_are_gone_is_not_believed(half, tmp_path):
    aside = half.output.with_name("out.incomplete")
    (aside / "model.safetensors.incomplete").unlink()
    written_by(half)
    launch(*half.flags(), *DPPA, f"--output={tmp_path / 'other'}")
    assert weights(half.output) == weights(tmp_path / "other")


def test_what_another_merge_left_is_replaced(half, tmp_path):
    half("--method=dare", "--rate=0.5")
    launch(*half.flags(), "--method=dare", "--rate=0.5", f"--output={tmp_path / 'other'}")
    assert weights(half.output) == weights(tmp_path / "other")
    assert not [name for name in tree(half.output) if "journal" in name or "identity" in name]


def zeros_at_the_end(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def one_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes(raw)


DAMAGES = {
    "shard ends in zeros": ("model.safetensors.incomplete", zeros_at_the_end),
    "shard is cut": ("model.safetensors.incomplete", cut),
    "bit of a shard": ("model.safetensors.incomplete", one_bit),
    "bit of a journal": ("journal-0.jsonl", one_bit),
    "journal of rows is cut": ("rows-0.jsonl", cut),
    "journal is no text": ("journal-0.jsonl", lambda file: file.write_bytes(b"5\n\xff")),
    "mark is damaged": (".dppa_jax.json", lambda file: file.write_bytes(b"\xff")),
}


@pytest.mark.parametrize("damage", [pytest.param(of, marks=[] if of in FAST else pytest.mark.slow) for of in DAMAGES])
def test_what_was_damaged_after_a_kill_is_done_again(half, tmp_path, damage):
    """As after a power failure, which may lose what was written last; or a file that someone touched."""
    name, change = DAMAGES[damage]
    change(half.output.with_name("out.incomplete") / name)
    half(*DPPA)
    launch(*half.flags(), *DPPA, f"--output={tmp_path / 'other'}")
    assert weights(half.output) == weights(tmp_path / "other")


def test_line_that_was_cut_off_is_ignored(tmp_path):
    from dppa_jax.runtime.journal import Journal

    notes = Journal(tmp_path / "notes")
    notes.add("first", 1)
    notes.add("second", 2)
    notes.close()
    text = (tmp_path / "notes").read_text()
    (tmp_path / "notes").write_text(text[:-5])
    assert Journal(tmp_path / "notes", keep=True).resumed == 1
