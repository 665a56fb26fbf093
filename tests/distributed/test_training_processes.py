"""Fine-tuning by several real processes: the expert of one process, whatever ends one of them."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command import launch
from families import read_json
from processes import IMPATIENT, LAUNCH, check_success, finish, run_processes, said, start_processes
from safetensors.numpy import load_file
from training import WEIGHTS, flags, kept

MESH = ("--mesh=data=2,fsdp=2", "--train_steps=8", "--checkpoint_every=2")


def log(root: Path) -> list[dict]:
    return read_json(root / "out/finetune.json")["log"]


@pytest.mark.slow
def test_two_processes_of_which_one_was_killed_make_the_expert_of_one_process(material, tmp_path):
    several, alone = tmp_path / "several", tmp_path / "alone"
    given = flags(material, several, *MESH)
    code = f"{IMPATIENT}\nfrom dppa_jax import launch\nlaunch.run()"
    running = start_processes(2, [sys.executable, "-c", code, *given], devices=2)
    end = time.monotonic() + 300
    while not kept(several) and time.monotonic() < end and all(one.poll() is None for one in running):
        time.sleep(0.002)
    running[1].kill()
    ended = finish(running, timeout=90)
    assert ended[0].returncode not in (0, -9), said(ended)  # by itself
    assert not (several / "out").exists()
    last = kept(several)[-1]

    found = run_processes(2, [*LAUNCH, *given], devices=2, timeout=300)
    check_success(found)
    assert all(f"goes on after step {last}" in process.stderr for process in found)
    assert "step 8 of 8: loss" in found[0].stderr
    assert "step 8 of 8: loss" not in found[1].stderr  # the first one tells
    assert not kept(several)

    launch(*flags(material, alone, *MESH))
    of_several, of_one = (load_file(root / "out" / WEIGHTS) for root in (several, alone))
    assert of_several.keys() == of_one.keys()
    for name in of_one:
        np.testing.assert_allclose(of_several[name], of_one[name], rtol=0, atol=1e-6, err_msg=name)
    for a, b in zip(log(several), log(alone), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert log(several)[-1]["eval_loss"] == pytest.approx(log(alone)[-1]["eval_loss"], rel=1e-6)
