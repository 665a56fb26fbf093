"""Every flagfile in configs/ means what it meant: its resolved config, field by field, is a file of tests/resolved."""

import json
from dataclasses import asdict
from pathlib import Path

import grain  # noqa: F401  defines flags, which flagsaver would take back
import pytest
from absl import flags
from absl.testing import flagsaver

from dppa_jax.flags import read_flags
from dppa_jax.jobs import JOBS

FLAGS = flags.FLAGS
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.cfg"))
RESOLVED = Path(__file__).with_name("resolved")


@pytest.fixture
def parsed(request):
    """The flags of a flagfile, taken back after the test."""
    with flagsaver.flagsaver():
        FLAGS(["dppa_jax", f"--flagfile={request.param}"])
        yield request.param


def resolved() -> dict:
    config = JOBS[FLAGS.job].config(read_flags())
    if FLAGS.job == "finetune":
        return {"finetune": asdict(config)}
    if FLAGS.job == "report":
        return {"run": asdict(config.run), "sweep": asdict(config.sweep)}
    return {"run": asdict(config)}


@pytest.mark.parametrize("parsed", CONFIGS, ids=lambda path: path.stem, indirect=True)
def test_a_flagfile_resolves_to_what_it_did(parsed):
    found = {"job": FLAGS.job, **resolved()}
    for config in found.values():
        if isinstance(config, dict):
            config.pop("flags", None)
            config.pop("command", None)
            for options in ("method_options", "tensor_options"):
                assert not config.get("merge", config).pop(options, {}), "none has options of its own"
    text = json.dumps(found, indent=1, sort_keys=True, default=str) + "\n"
    assert text == (RESOLVED / f"{parsed.stem}.json").read_text()
