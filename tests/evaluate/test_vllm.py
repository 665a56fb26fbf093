"""Real vLLM: its answers are those of the in-process model, follow the weights, and survive its death."""

import os
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from command import launch
from decoders import MODELS, torch_model
from families import edit_json, fine_tuned, llama_config, random_weights, read_json, write_model
from safetensors.numpy import save_file
from vllm_python import vllm_python

import dppa_jax
from dppa_jax.architecture.table import ARCHITECTURES
from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.vllm import Done, VllmEvaluator
from dppa_jax.evaluate.worker import Worker

pytestmark = pytest.mark.slow

# Tied, because vLLM's own reload leaves a tied lm_head as it was on CPUs; heads of a size that its kernels take.
CONFIG = llama_config(hidden_size=128, intermediate_size=96, tie_word_embeddings=True, dtype="float32")
PROMPTS = [np.random.default_rng(i).integers(3, 64, 3 + 2 * i).tolist() for i in range(12)]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    base = random_weights(CONFIG)
    write_model(root / "base", CONFIG, base)
    write_model(root / "math", CONFIG, fine_tuned(base, 1, size=0.1))
    for member in ("base", "math"):
        edit_json(root / member / "generation_config.json", repetition_penalty=2.0)  # which greedy decoding ignores
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def vllm(workdir):
    """One engine for all tests: a start takes up to a minute."""
    evaluator = VllmEvaluator(vllm_python(), workdir, max_num_seqs=8, cpu_cache_gb=1, timeout=300)
    yield evaluator
    evaluator.close()


def in_process(weights, limits=10) -> list[list[int]]:
    evaluator = JaxEvaluator()
    evaluator.use(weights)
    return evaluator.generate(PROMPTS, limits)


def processes(interpreter: str) -> list[psutil.Process]:
    """vLLM's, of this test: they are in the process group of a child that runs the interpreter."""
    children = [p for p in psutil.Process().children() if p.cmdline()[:1] == [interpreter]]
    groups = {child.pid for child in children}
    return [p for p in psutil.process_iter() if p.status() != psutil.STATUS_ZOMBIE and os.getpgid(p.pid) in groups]


def test_answers_follow_the_weights_that_are_handed_over(vllm, family):
    base, expert = dppa_jax.load(family / "base"), dppa_jax.load(family / "math")
    merged = dppa_jax.merge(base, {"math": expert}, "magnitude", rate=0.5)
    answers = []
    for weights in (family / "base", merged, expert, family / "base"):
        vllm.use(weights)
        answers.append(vllm.generate(PROMPTS, 10))
        assert answers[-1] == in_process(weights)
    assert answers[0] == answers[3]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(a != b for a, b in zip(answers[one], answers[other], strict=True)) > len(PROMPTS) / 2
    assert len(vllm.seconds["start"]) == 1  # the rest came in place
    assert len(vllm.seconds["replace"]) == 3


def test_every_prompt_has_its_own_limit_and_prompts_without_room_get_no_answer(vllm, family):
    vllm.use(family / "base")
    limits = [0, 1, 7, 120] * 3  # the model has 128 positions
    answers = vllm.generate(PROMPTS, limits)
    assert answers == in_process(family / "base", limits)
    assert [len(answer) for answer in answers[:3]] == [0, 1, 7]
    assert vllm.generate([[5] * 128, [5] * 127], 4) == [[], vllm.generate([[5] * 127], 1)[0]]


def test_an_answer_ends_at_the_end_tokens_of_the_generation_config(vllm, family, tmp_path):
    vllm.use(family / "base")
    endless = vllm.generate(PROMPTS, 10)
    ends = {endless[1][5], 2}
    model = write_model(tmp_path / "model", CONFIG | {"eos_token_id": endless[0][3]}, random_weights(CONFIG))
    edit_json(model / "generation_config.json", eos_token_id=[endless[1][5], 2])
    vllm.use(model)
    answers = vllm.generate(PROMPTS, 10)
    assert answers == in_process(model)
    for answer, long in zip(answers, endless, strict=True):
        end = next((i for i, token in enumerate(long) if token in ends), 9)
        assert answer == long[: end + 1]


def test_a_directory_with_other_content_under_its_old_name_is_read_anew(vllm, family, tmp_path):
    model = write_model(tmp_path / "model", CONFIG, random_weights(CONFIG))
    vllm.use(model)
    before = vllm.generate(PROMPTS, 10)
    save_file(fine_tuned(random_weights(CONFIG), 1, size=0.1), model / "model.safetensors", {"format": "pt"})
    vllm.use(model)
    assert vllm.generate(PROMPTS, 10) == in_process(family / "math") != before


def test_weights_that_did_not_arrive_are_noticed(vllm, family, monkeypatch, caplog):
    vllm.use(family / "base")
    ask, starts = Worker.ask, len(vllm.seconds["start"])

    def reload_nothing(self, message, *rest):
        return Done(0.0) if message["do"] == "replace" else ask(self, message, *rest)

    monkeypatch.setattr(Worker, "ask", reload_nothing)
    vllm.use(family / "math")
    assert "does not hold the weights it was given" in caplog.text
    assert len(vllm.seconds["start"]) == starts + 1
    assert vllm.generate(PROMPTS, 10) == in_process(family / "math")


def test_after_a_killed_engine_the_request_is_repeated(vllm, family, caplog):
    vllm.use(dppa_jax.load(family / "math"))
    answers = vllm.generate(PROMPTS, 10)
    (engine,) = processes(vllm_python())  # there is one process: its own workers take twice as long to start
    engine.send_signal(signal.SIGKILL)
    time.sleep(0.5)
    assert vllm.generate(PROMPTS, 10) == answers
    assert "vLLM failed and is started again" in caplog.text


def test_a_model_of_another_shape_gets_another_engine(vllm, tmp_path):
    config = llama_config(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, dtype="bfloat16")
    model = write_model(tmp_path / "small", config, random_weights(config))
    vllm.use(model)
    assert read_json(model / "config.json")["tie_word_embeddings"] is False
    assert [len(answer) > 0 for answer in vllm.generate(PROMPTS, 5)] == [True] * len(PROMPTS)


WIDE = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 128, "dtype": "float32", "eos_token_id": 2}
WIDE |= {"attention_bias": False}  # vLLM's Qwen3 has no bias of o_proj, which the check of its weights tells


@pytest.mark.parametrize(
    "name", [name for name, row in ARCHITECTURES.items() if row.vllm and row.forward and name != "Llama"]
)
def test_merges_of_other_families_answer_as_in_this_process(name, vllm, tmp_path):
    model_type, changes = MODELS[name]
    model = torch_model(model_type, changes | WIDE)
    model.save_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "math")
    models = f"--base={tmp_path / 'base'}", f"--expert=math={tmp_path / 'math'}"
    launch(*models, "--method=ties", "--density=0.5", f"--output={tmp_path / 'merged'}")
    vllm.use(tmp_path / "merged")
    assert vllm.generate(PROMPTS, 10) == in_process(tmp_path / "merged")


def test_close_leaves_no_process_and_no_weights(vllm, workdir):
    assert processes(vllm_python())
    vllm.close()
    assert not processes(vllm_python())
    assert [path.name for path in workdir.iterdir()] == ["vllm.log"]
