"""What is said when vLLM is absent, hangs or answers wrongly: with stand-ins for its interpreter."""

import os
import sys

import pytest
from families import llama_config, random_weights, write_model

from dppa_jax.evaluate.vllm import SCRATCH, VllmEvaluator, scratch
from dppa_jax.evaluate.worker import WorkerError

ANSWERS = {
    "hang": "time.sleep(300)",
    "crash": "print('CUDA out of memory', file=sys.stderr); sys.exit(1)",
    "deep": "print('[' * 100_000, flush=True)",
    "list": "print('[1]', flush=True)",
    "no seconds": "print('{}', flush=True)",
    "other sums": """print(json.dumps({"seconds": 0, "used": {"w": "1"}, "stored": {}}), flush=True)""",
    "other weights": """print(json.dumps({"seconds": 0, "used": {"w": 1}, "stored": {"w": 2}}), flush=True)""",
}


@pytest.fixture
def model(tmp_path):
    config = llama_config()
    return write_model(tmp_path / "model", config, random_weights(config))


@pytest.fixture
def interpreter(tmp_path):
    """interpreter(behaviour): a program that says it has vLLM, and when started as its child does that instead."""

    def make(behaviour: str):
        program = tmp_path / "python"
        program.write_text(f"""#!{sys.executable}
import json, sys, time
if sys.argv[1] == "-c":
    print(json.dumps({{"vllm": "9.9"}}))
else:
    open({str(tmp_path / "starts")!r}, "a").write("start\\n")
    print("loading the model", file=sys.stderr, flush=True)
    for line in sys.stdin:
        {ANSWERS[behaviour]}
""")
        program.chmod(0o755)
        return program

    return make


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ("hang", r"(?s)did not answer within 1 s.*loading the model"),
        ("crash", r"(?s)ended with exit code 1.*CUDA out of memory"),
        ("deep", r"answered .* no JSON object as expected .*nested too deep"),
        ("list", r"answered b'\[1\]', no JSON object as expected"),
        ("no seconds", r"no JSON object as expected .*missing required field `seconds`"),
        ("other sums", r"no JSON object as expected .*Expected `int`, got `str`"),
        ("other weights", r"does not hold the weights it was given: 1 of 1 parameters differ, first w"),
    ],
)
def test_a_failure_is_told_tried_once_more_and_then_final(interpreter, model, tmp_path, caplog, behaviour, told):
    evaluator = VllmEvaluator(interpreter(behaviour), tmp_path / "work", timeout=1 if behaviour == "hang" else 30)
    with pytest.raises(WorkerError, match=told):
        evaluator.use(model)
    assert (tmp_path / "starts").read_text() == "start\n" * 2
    (warning,) = (record.message for record in caplog.records if "started again" in record.message)
    assert "vLLM failed" in warning


def test_a_path_that_is_no_interpreter_is_refused_at_once(tmp_path):
    for path in (tmp_path / "absent", tmp_path, "/bin/echo"):
        with pytest.raises(ValueError, match=f"--vllm_python={path} is not a Python interpreter"):
            VllmEvaluator(path, tmp_path)


def test_an_interpreter_without_vllm_is_refused_with_the_command_that_installs_it(tmp_path):
    with pytest.raises(ValueError, match=r"vLLM is not installed there.*-m pip install vllm"):
        VllmEvaluator(sys.executable, tmp_path)


def test_what_decides_the_answers_is_known_before_the_engine_starts(interpreter, tmp_path):
    evaluator = VllmEvaluator(interpreter("hang"), tmp_path, dtype="bfloat16", max_model_len=512)
    assert evaluator.decoding["version"] == "vllm 9.9"
    assert evaluator.decoding["dtype"] == "bfloat16"
    assert evaluator.decoding != VllmEvaluator(interpreter("hang"), tmp_path, dtype="float16").decoding


def test_a_relative_path_is_that_from_where_the_command_was_given(interpreter, tmp_path, monkeypatch):
    interpreter("hang")
    monkeypatch.chdir(tmp_path)
    assert VllmEvaluator("./python", tmp_path).version == "vllm 9.9"


def test_scratch_directories_of_killed_runs_go_and_links_and_the_directories_of_others_stay(tmp_path):
    mine, link, young = (tmp_path / f"{SCRATCH}{name}" for name in ("mine", "link", "young"))
    kept = tmp_path / "kept"
    for directory in (mine, young, kept):
        directory.mkdir()
        (directory / "file").touch()
    link.symlink_to(kept)
    for directory in (mine, kept):
        os.utime(directory, (0, 0))
    with scratch(tmp_path) as new:
        assert new.parent == tmp_path
        assert not mine.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"kept", link.name, young.name}
    assert (kept / "file").exists()


def test_answers_need_weights(interpreter, tmp_path):
    with pytest.raises(ValueError, match="call use"):
        VllmEvaluator(interpreter("hang"), tmp_path).generate([[1]], 1)
